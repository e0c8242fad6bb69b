"""Convolutions of which a product goes by patches, one large product of matrices, where that is faster than torch's kernel.

    patches[n, i, j, u, v, c]  = x[n, c, stride * i + dilation * u - padding, stride * j + dilation * v - padding], 0 outside of x
    output[n, o, i, j]         = sum over u, v, c of weight[o, c, u, v] * patches[n, i, j, u, v, c]
    grad_weight[o, u, v, c]    = sum over n, i, j of grad_output[n, o, i, j] * patches[n, i, j, u, v, c]
    grad_input                 = output of grad_output and the turned weight, weight[o, c, -u, -v], where the stride is 1

A transposed convolution has output and grad_input in each other's place. oneDNN, which torch calls on a processor, makes no
patches; where images are small and a unit for products is fast (AMX) that takes up to eight times as long as making them and
one large product (docs/experiments.md); elsewhere it is the faster way. So both are timed, once for every shape and product,
and ROUTES remembers where patches won by over 10 %. Both round the same sums, taken in another order: put back ROUTES of a run
(`ROUTES.update`) to repeat it bit for bit, or let none be timed, by torch.use_deterministic_algorithms(True).

In compiled code the gradient of the weight alone goes by patches: the same functions are traced, and what surrounds the
product is fused; shapes are timed meanwhile.

Source: Chellapilla, Puri and Simard 2006, "High Performance Convolutional Neural Networks for Document Processing", section 3.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.numerics.kernels import PLAIN, are_fixed, find_obstacle, hold_constant
from halfstep.numerics.routes import measure_route

DTYPES: Mapping[str, tuple[torch.dtype, ...]] = {  # in fp32 patches of the others win by little, and seldom
    "output": (torch.bfloat16,),
    "grad_input": (torch.bfloat16,),
    "grad_weight": (torch.float32, torch.bfloat16),
}
LEAST_WORK = 1 << 24  # operations of one product; below, calls take as long as arithmetic
MOST_BYTES = 1 << 27  # of patches, which torch's way does not make
MOST_SIZES = 16  # of images that are timed with one weight: with a size of its own for each batch it would never end
GAIN = 0.9  # of torch's time, below which patches are taken

Route = Literal["patches", "torch"]
Product = Literal["output", "grad_input", "grad_weight"]
PRODUCTS: tuple[Product, ...] = get_args(Product)
Pair = tuple[int, int]
Place = tuple[tuple[int, ...], bool]  # a shape, and whether it is contiguous in memory or else channels_last


class Window(NamedTuple):
    """How a kernel moves over an image, down and across.

    output_padding: of a transposed convolution, which makes the image of which this is the window; None of another.
    """

    stride: Pair
    padding: Pair
    dilation: Pair
    output_padding: Pair | None = None


@dataclass(frozen=True)
class Shape:
    """What the time of one call depends on."""

    images: str  # batch x channels x height x width
    weight: str
    window: str
    dtype: str
    order: str  # of the images in memory
    threads: int
    product: Product


ROUTES: dict[Shape, Route] = {}


def make_patches(x: Tensor, kernel: Pair, window: Window) -> Tensor:
    """[N, C, H, W] -> [N * rows * columns, kernel * kernel * C], in the dtype of x.

    Examples:
        >>> x = torch.arange(9.0).view(1, 1, 3, 3)
        >>> make_patches(x, (2, 2), Window((1, 1), (0, 0), (1, 1))).tolist()[0]
        [0.0, 1.0, 3.0, 4.0]
    """
    (stride, padding, dilation, _), (batch, channels, height, width) = window, x.shape
    rows, columns = _count_places(x.shape, kernel, window)
    images = x.permute(0, 2, 3, 1)
    if kernel == stride == (1, 1) and padding == (0, 0):
        return images.reshape(-1, channels)
    padded = x.new_zeros(batch, height + 2 * padding[0], width + 2 * padding[1], channels)
    padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = images
    image, row, column, _ = padded.stride()
    return padded.as_strided(
        (batch, rows, columns, *kernel, channels),
        (image, stride[0] * row, stride[1] * column, dilation[0] * row, dilation[1] * column, 1),
    ).reshape(batch * rows * columns, -1)


def shrink(large: Tensor, weight: Tensor, bias: Tensor | None, window: Window, order: torch.memory_format) -> Tensor:
    """The convolution: [N, C, H, W], [O, C, kernel, kernel], [O] -> [N, O, rows, columns], in that order of memory.

    Examples:
        >>> x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)
        >>> shrink(x, w, None, Window((1, 1), (0, 0), (1, 1)), torch.channels_last).flatten().tolist()
        [4.0, 4.0, 4.0, 4.0]
    """
    outputs, _, *kernel = weight.shape
    patches = make_patches(large, (kernel[0], kernel[1]), window)
    shape = large.shape[0], outputs, *_count_places(large.shape, kernel, window)
    return _multiply_to_images(patches, weight.permute(0, 2, 3, 1).reshape(outputs, -1).mT, bias, shape, order)


def grow(small: Tensor, weight: Tensor, bias: Tensor | None, window: Window, order: torch.memory_format) -> Tensor:
    """The transposed convolution with strides of 1: [N, O, rows, columns], [O, C, kernel, kernel], [C] -> [N, C, H, W].

    Examples:
        >>> x, w = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 2, 2)
        >>> grow(x, w, None, Window((1, 1), (0, 0), (1, 1)), torch.contiguous_format).flatten().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    _, channels, *kernel = weight.shape
    turned = _turn(kernel, window)
    patches = make_patches(small, (kernel[0], kernel[1]), turned)
    shape = small.shape[0], channels, *_count_places(small.shape, kernel, turned)
    filters = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, channels)
    return _multiply_to_images(patches, filters, bias, shape, order)


def find_weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """The gradient of a weight [O, C, kernel, kernel], in its order of memory, from that of the output [N, O, rows, columns].

    Of a transposed convolution with weight [C, O, kernel, kernel]: its x in place of the gradient, and the other way round.

    Examples:
        >>> x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)
        >>> find_weight_gradient(torch.ones(1, 1, 2, 2), x, w, Window((1, 1), (0, 0), (1, 1))).flatten().tolist()
        [4.0, 4.0, 4.0, 4.0]
    """
    outputs, channels, *kernel = weight.shape
    patches = make_patches(x, (kernel[0], kernel[1]), window)
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
    found = _multiply(rows.mT, patches, None, rows.new_empty(outputs, patches.shape[1]))
    found = found.view(outputs, *kernel, channels).permute(0, 3, 1, 2)
    return found.contiguous() if weight.is_contiguous() else found


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Autocast, that of a backward pass too, leaves products alone that write into a given tensor."""
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _multiply_to_images(
    a: Tensor, b: Tensor, bias: Tensor | None, shape: Sequence[int], order: torch.memory_format
) -> Tensor:
    """[N * rows * columns, n] times [n, O]: images of that shape, which are no view, so that they may be written to."""
    batch, outputs, rows, columns = shape
    images = torch.empty(
        batch, outputs, rows, columns, dtype=a.dtype, device=a.device, memory_format=torch.channels_last
    )
    _multiply(a, b, bias, images.permute(0, 2, 3, 1).view(-1, outputs))
    return images if order == torch.channels_last else images.clone(memory_format=torch.contiguous_format)


def _turn(kernel: Sequence[int], window: Window) -> Window:
    """How the turned kernel moves over the small images."""
    down, across = (
        dilation * (edge - 1) - padding
        for edge, padding, dilation in zip(kernel, window.padding, window.dilation, strict=True)
    )
    return Window((1, 1), (down, across), window.dilation)


def find_order(*tensors: Tensor) -> torch.memory_format:
    """In which torch's convolution gives images: channels_last where one of its operands is, which may have gaps.

    Examples:
        >>> x = torch.ones(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
        >>> find_order(x[:, :4], torch.ones(4, 4, 1, 1))
        torch.channels_last
    """
    return torch.channels_last if any(map(_is_channels_last, tensors)) else torch.contiguous_format


def _is_channels_last(t: Tensor) -> bool:
    """As c10's is_channels_last_strides_2d: strides grow from channels over columns and rows to images."""
    least, first = 0, t.stride(1)
    for axis in (1, 3, 2, 0):
        stride, size = t.stride(axis), t.shape[axis]
        if size == 0 or stride < least or (axis == 0 and least == first) or first == 0:
            return False
        least = stride * max(size, 1)
    return True


def explain_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> str:
    """Why `conv2d` and `conv_transpose2d` leave such calls to torch's own function; "" where both ways are timed.

    Examples:
        >>> explain_conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))
        'no gradient of the weight'
    """
    if obstacle := find_obstacle(input, weight, *(() if bias is None else (bias,)), dtypes=DTYPES["grad_weight"]):
        return obstacle
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return "no gradient of the weight"
    return "groups, or images without a batch" if groups != 1 or not input.dim() == weight.dim() == 4 else ""


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0, dilation: int | Sequence[int] = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.conv2d`: [N, C, H, W], [O, C / groups, kernel, kernel], [O] -> [N, O, rows, columns].

    In fp32 and bf16 on a processor; under autocast all are cast to its dtype. What is left to torch: groups, calls without a
    gradient of the weight, and products of shapes for which patches are too large or not faster.

    Examples:
        >>> conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)).flatten().tolist()
        [4.0, 4.0, 4.0, 4.0]
    """
    if not explain_conv2d(input, weight, bias, groups):
        result = _run(input, weight, bias, _read_window(weight, stride, padding, dilation))
        if result is not None:
            return result
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0, output_padding: int | Sequence[int] = 0, groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.conv_transpose2d`: [N, C, H, W], [C, O / groups, kernel, kernel], [O] -> [N, O, rows, columns].

    As `conv2d`, of which it is the gradient of the input.

    Examples:
        >>> conv_transpose2d(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 2, 2)).flatten().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    if not explain_conv2d(input, weight, bias, groups):
        result = _run(input, weight, bias, _make_window(stride, padding, dilation, output_padding))
        if result is not None:
            return result
    return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _read_window(weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Window | None:
    """None for what torch has to read or to refuse, and for a padding that is not the same on both sides."""
    if padding == "valid":
        return _make_window(stride, 0, dilation)
    if padding != "same":
        return _make_window(stride, padding, dilation)
    window = _make_window(stride, 0, dilation)
    if window is None or window.stride != (1, 1):
        return None
    down, across = (step * (edge - 1) for step, edge in zip(window.dilation, weight.shape[2:], strict=True))
    return window._replace(padding=(down // 2, across // 2)) if down % 2 == across % 2 == 0 else None


def _make_window(stride: Any, padding: Any, dilation: Any, output_padding: Any = None) -> Window | None:
    """None for anything but plain numbers that make sense, one or two of each: torch takes others too, or has words for them.

    An output padding that is no less than the stride adds places of which the small images have none.
    """
    steps, edges, gaps = _pair(stride), _pair(padding), _pair(dilation)
    added = None if output_padding is None else _pair(output_padding)
    if not (steps and edges and gaps and (added or output_padding is None)):
        return None
    if min(*steps, *gaps) < 1 or min(edges) < 0 or any(a >= b for a, b in zip(added or (), steps, strict=False)):
        return None
    return Window(steps, edges, gaps, added)


def _pair(value: Any) -> Pair | None:
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
    if len(numbers) not in (1, 2) or any(type(number) is not int for number in numbers):
        return None
    return numbers[0], numbers[-1]


def _run(input: Tensor, weight: Tensor, bias: Tensor | None, window: Window | None) -> Tensor | None:
    """The convolution of operands as autocast casts them; None where torch's way is to be taken."""
    is_cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if is_cast else input.dtype
    fits = dtype in DTYPES["grad_weight"] and (is_cast or all(t is None or t.dtype == dtype for t in (weight, bias)))
    outputs = weight.shape[0 if window is None or window.output_padding is None else 1]
    if window is None or not fits or (bias is not None and bias.shape != (outputs,)):
        return None
    # a compiler would keep the patches of the output, and a turned copy of the weight, for the backward pass
    left = (
        {"output", "grad_input"} if torch.compiler.is_compiling() else set() if input.requires_grad else {"grad_input"}
    )
    wanted = [product for product in PRODUCTS if product not in left]
    routed = tuple(p for p in wanted if find_route(input, weight, window, dtype, p) == "patches")
    if not routed:
        return None
    operands = (t if t is None or not is_cast else t.to(dtype) for t in (input, weight, bias))
    result: Tensor = _Convolution.apply(*operands, window, routed)
    return result


def _count_places(images: Sequence[int], kernel: Sequence[int], window: Window) -> Pair:
    rows, columns = (
        (size + 2 * padding - dilation * (edge - 1) - 1) // stride + 1
        for size, edge, stride, padding, dilation in zip(images[2:], kernel, *window[:3], strict=True)
    )
    return rows, columns


def may_pay(
    images: Sequence[int], weight: Sequence[int], window: Window, dtype: torch.dtype, product: Product = "grad_weight"
) -> bool:
    """Whether patches can compute it, with enough to compute and not too much to keep.

    images, weight: their shapes, [N, C, H, W] and [O, C, kernel, kernel]; of a transposed convolution [N, C, rows, columns] and
        [C, O, kernel, kernel].

    Examples:
        >>> may_pay((64, 512, 4, 4), (512, 512, 3, 3), Window((1, 1), (1, 1), (1, 1)), torch.bfloat16)
        True
    """
    if dtype not in DTYPES[product]:
        return False
    small, large = _find_places(images, weight, window)
    if _grows(product, window):
        if window.stride != (1, 1) or any(window.output_padding or ()) or min(_turn(weight[2:], window).padding) < 0:
            return False
        numbers, others = images[0] * large * weight[0] * math.prod(weight[2:]), weight[1]
    else:
        numbers, others = images[0] * small * math.prod(weight[1:]), weight[0]
    return 2 * numbers * others >= LEAST_WORK and numbers * dtype.itemsize <= MOST_BYTES  # numbers: in patches


def _grows(product: Product, window: Window) -> bool:
    """Whether it is the larger images that a product makes."""
    return product == ("grad_input" if window.output_padding is None else "output")


def _find_places(images: Sequence[int], weight: Sequence[int], window: Window) -> Pair:
    """Places of the small and of the large images, of which one kind is given; the other of strides of 1."""
    given = math.prod(images[2:])
    if window.output_padding is None:
        return math.prod(_count_places(images, weight[2:], window)), given
    return given, math.prod(_count_places(images, weight[2:], _turn(weight[2:], window)))


def find_route(
    x: Tensor, weight: Tensor, window: Window, dtype: torch.dtype, product: Product = "grad_weight"
) -> Route:
    """Which way was faster when this shape was first seen.

    torch's, untimed, where patches cannot pay; where deterministic algorithms are asked for; where images come in ever new
    sizes; and where a compiler keeps a size or a number of the window open.

    Examples:
        >>> find_route(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), Window((1, 1), (0, 0), (1, 1)), torch.float32)
        'torch'
    """
    numbers = itertools.chain(x.shape, weight.shape, *filter(None, window))
    if not (are_fixed(numbers) and may_pay(x.shape, weight.shape, window, dtype, product)):
        return "torch"
    images, filters = ((tuple(t.shape), t.is_contiguous()) for t in (x, weight))
    return _time_route(images, filters, tuple(window), dtype, product)


@hold_constant
def _time_route(images: Place, weight: Place, window: tuple[Any, ...], dtype: torch.dtype, product: Product) -> Route:
    """window: as a plain tuple, since the compiler loses the numbers of a named one."""
    moves = Window(*window)
    shape = _name_shape(images, weight, window, dtype, torch.get_num_threads(), product)
    if shape in ROUTES:
        return ROUTES[shape]
    known = [one for one in list(ROUTES) if one.weight == shape.weight]  # other threads may add to it meanwhile
    sizes = sum(replace(one, images=shape.images) == shape for one in known)
    if sizes >= MOST_SIZES or torch.are_deterministic_algorithms_enabled():
        return "torch"
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, filters = _make_ones(images, dtype), _make_ones(weight, dtype)
        gradient = _convolve(x, filters, None, moves)
        seconds = measure_route({
            "patches": lambda: compute_by_patches(product, gradient, x, filters, None, moves),
            "torch": lambda: _compute_by_torch(product, gradient, x, filters, moves),
        })  # fmt: skip
    ROUTES[shape] = "patches" if seconds["patches"] < GAIN * seconds["torch"] else "torch"
    return ROUTES[shape]


@lru_cache
def _name_shape(
    images: Place, weight: Place, window: tuple[Any, ...], dtype: torch.dtype, threads: int, product: Product
) -> Shape:
    """Kept, because it is asked for in every call."""
    return Shape(
        "x".join(map(str, images[0])), "x".join(map(str, weight[0])), str(window), str(dtype).removeprefix("torch."),
        "contiguous" if images[1] else "channels_last", threads, product,
    )  # fmt: skip


def _make_ones(place: Place, dtype: torch.dtype) -> Tensor:
    shape, is_contiguous = place
    order = torch.contiguous_format if is_contiguous else torch.channels_last
    return torch.ones(shape, dtype=dtype, device="cpu").contiguous(memory_format=order)


def compute_by_patches(
    product: Product, gradient: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window
) -> Tensor:
    """One product of a convolution with that window.

    gradient: of the output; not needed for the output.
    bias: added to the output.
    """
    images = x if product == "output" or gradient is None else gradient
    if product == "grad_weight":
        small, large = (images, x) if window.output_padding is None else (x, images)
        return find_weight_gradient(small, large, weight, window)
    make = grow if _grows(product, window) else shrink
    return make(images, weight, bias if product == "output" else None, window, find_order(x, weight))


def _compute_by_torch(product: Product, gradient: Tensor, x: Tensor, weight: Tensor, window: Window) -> object:
    if product == "output":
        return _convolve(x, weight, None, window)
    return _convolve_backward(gradient, x, weight, window, [product == "grad_input", product == "grad_weight", False])


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    return torch.ops.aten.convolution(x, weight, bias, *_spread(window))  # type: ignore[no-any-return]


def _convolve_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, window: Window, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias, by torch."""
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        gradient, x, weight, gradient.shape[1:2], *_spread(window), wanted
    )


def _spread(window: Window) -> tuple[Any, ...]:
    """As aten's convolutions take it, with one group."""
    stride, padding, dilation, output_padding = window
    return stride, padding, dilation, output_padding is not None, output_padding or (0, 0), 1


def _is_plain(gradient: Tensor) -> bool:
    """Whether it is numbers and nothing else, as none is that torch.func or torch.autograd.grad(is_grads_batched=True) gives."""
    if type(gradient) not in PLAIN or torch._C._are_functorch_transforms_active():
        return False
    return torch.compiler.is_compiling() or not torch._C._functorch.is_legacy_batchedtensor(gradient)


class _Convolution(torch.autograd.Function):
    """Of operands as autocast has cast them; routed: what goes by patches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, routed: tuple[Product, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.window, ctx.routed = window, routed
        if "output" in routed:
            return compute_by_patches("output", None, x, weight, bias, window)
        return _convolve(x, weight, bias, window)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight), window = gradients, ctx.saved_tensors, ctx.window
        wanted = list(ctx.needs_input_grad[:3])
        found: list[Tensor | None] = [None, None, None]
        if _is_plain(gradient) and not torch.is_grad_enabled():  # torch's way has second derivatives
            for place, product in enumerate(PRODUCTS[1:]):
                if wanted[place] and product in ctx.routed:
                    found[place] = compute_by_patches(product, gradient, x, weight, None, window)
            if wanted[2] and found[1] is not None:  # torch's gradient of the bias would bring that of the weight along
                found[2] = gradient.sum((0, 2, 3))
        left = [asked and one is None for asked, one in zip(wanted, found, strict=True)]
        if any(left):
            rest = _convolve_backward(gradient, x, weight, window, left)
            found = [one if one is not None else other for one, other in zip(found, rest, strict=True)]
        return *found, None, None
