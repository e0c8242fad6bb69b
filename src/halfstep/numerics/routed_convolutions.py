"""Convolutions of which each product goes by patches or torch's way, whichever was faster.

oneDNN, which torch calls on a processor, makes no patches; where images are small and a unit for products is fast (AMX) that
takes up to eight times as long as making them and one large product (docs/experiments.md); elsewhere it is the faster way. So
both are timed, once for every shape and product, and ROUTES remembers where patches won by over 10 %. Both round the same sums,
taken in another order: put back ROUTES of a run (`ROUTES.update`) to repeat it bit for bit, or let none be timed, by
torch.use_deterministic_algorithms(True).

In compiled code the gradient of the weight alone goes by patches: the same functions are traced, and what surrounds the
product is fused; shapes are timed meanwhile.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.numerics.kernels import PLAIN, are_fixed, find_obstacle, hold_constant
from halfstep.numerics.patches import DTYPES, PRODUCTS, Pair, Product, Window, compute_by_patches, may_pay
from halfstep.numerics.routes import measure_route

MOST_SIZES = 16  # of images that are timed with one weight: with a size of its own for each batch it would never end
GAIN = 0.9  # of torch's time, below which patches are taken
Route = Literal["patches", "torch"]
Place = tuple[tuple[int, ...], bool]  # a shape, and whether it is contiguous in memory or else channels_last


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
    wanted = [product for product in PRODUCTS if product != "grad_input" or input.requires_grad]
    if torch.compiler.is_compiling():
        wanted = ["grad_weight"]  # it would keep patches of the output, and a turned weight, for the backward pass
    routed = tuple(p for p in wanted if find_route(input, weight, window, dtype, p) == "patches")
    if not routed:
        return None
    operands = (t if t is None or not is_cast else t.to(dtype) for t in (input, weight, bias))
    result: Tensor = _Convolution.apply(*operands, window, routed)
    return result


def find_route(
    x: Tensor, weight: Tensor, window: Window, dtype: torch.dtype, product: Product = "grad_weight"
) -> Route:
    """Which way was faster when this shape was first seen.

    torch's, untimed, where patches cannot pay; where deterministic algorithms are asked for; where products in fp32 may be
    rounded, by a setting of torch's; where images come in ever new sizes; and where a compiler keeps a size or a
    number of the window open.

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
    if dtype == torch.float32 and _rounds_products():
        return "torch"
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


def _rounds_products() -> bool:
    """Whether torch may round operands of products in fp32, as it does those of convolutions by another setting."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it was set by the newer attributes, backend by backend
        return True


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
