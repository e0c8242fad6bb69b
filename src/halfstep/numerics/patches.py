"""A convolution as one product of matrices: patches of the images, times a weight.

    patches[n, i, j, u, v, c]  = x[n, c, stride * i + dilation * u - padding, stride * j + dilation * v - padding], 0 outside of x
    output[n, o, i, j]         = sum over u, v, c of weight[o, c, u, v] * patches[n, i, j, u, v, c]
    grad_weight[o, u, v, c]    = sum over n, i, j of grad_output[n, o, i, j] * patches[n, i, j, u, v, c]
    grad_input                 = output of grad_output and the turned weight, weight[o, c, -u, -v], where the stride is 1

A transposed convolution has output and grad_input in each other's place. All three round the sums that torch's convolutions
round, taken in another order. When this is the faster way, `routed_convolutions` asks a clock.

Source: Chellapilla, Puri and Simard 2006, "High Performance Convolutional Neural Networks for Document Processing", section 3.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Product = Literal["output", "grad_input", "grad_weight"]
PRODUCTS: tuple[Product, ...] = get_args(Product)
Pair = tuple[int, int]

DTYPES: Mapping[Product, tuple[torch.dtype, ...]] = {  # in fp32 patches of the others win by little, and seldom
    "output": (torch.bfloat16,),
    "grad_input": (torch.bfloat16,),
    "grad_weight": (torch.float32, torch.bfloat16),
}
LEAST_WORK = 1 << 24  # operations of one product; below, calls take as long as arithmetic
MOST_BYTES = 1 << 27  # of patches, which torch's way does not make


class Window(NamedTuple):
    """How a kernel moves over an image, down and across.

    output_padding: of a transposed convolution, which makes the image of which this is the window; None of another.
    """

    stride: Pair
    padding: Pair
    dilation: Pair
    output_padding: Pair | None = None


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
