"""Convolutions whose operands are scaled numbers, forward and backward.

    output       sums over input channels and the kernel        x: a scale a sample          w: a scale an output channel
    grad_input   sums over output channels and the kernel       g: a scale a sample          w: a scale an input channel
    grad_weight  sums over samples and positions                g: a scale an output channel x: a scale an input channel

are the "row" scales of `numerics.casting`; one scale a tensor works as everywhere. Blocks along the sum would cut it into parts
that no convolution kernel adds up one by one; they are refused. All convolutions are emulated: in bf16 where the operands are
exact in it and the result is wanted in it, else in fp32, as for products of matrices.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.errors import UnsupportedError
from halfstep.numerics.casting import ScaledTensor
from halfstep.numerics.multiplication import differentiate_once, find_result_dtype, save
from halfstep.numerics.products import Copies, Operand, Products, ProductState, expand_operands

Size = int | Sequence[int]


class _Convolve(torch.autograd.Function):
    """x [N, C, ...], weight [O, C / groups, ...], where transposed [C, O / groups, ...]. `options` are aten's, in its order:
    stride, padding, dilation, transposed, output_padding, groups."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...], products: Products,
        state: ProductState | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        sample, channel = _find_sums(x)
        over_in, over_out = (channel, sample) if options[3] else (sample, channel)  # of the weight's dimensions
        xs, ws = (
            Copies(x, state, "left"),
            Copies(weight, state, "right", state.weights if state and state.is_training else None),
        )
        operands = xs.take(products.output.left, sample), ws.take(products.output.right, over_in)
        with torch.autocast(x.device.type, enabled=False):
            a, w = expand_operands(*operands, dtype)
            y = torch.ops.aten.convolution(a, w, None, *options).to(dtype)
        kept_x = xs.take(products.grad_weight.right, channel) if context.needs_input_grad[1] else None
        kept_w = ws.take(products.grad_input.right, over_out) if context.needs_input_grad[0] else None
        context.take_apart = save(context, kept_x, kept_w)
        context.shapes, context.dtypes = (x.shape, weight.shape), (dtype, x.dtype, weight.dtype)
        context.bias_dtype = bias.dtype if bias is not None else None
        context.options, context.products, context.state = options, products, state
        return y if bias is None else y.add_(bias.reshape(-1, *[1] * (x.dim() - 2)))  # type: ignore[no-any-return]

    @staticmethod
    @differentiate_once
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), products = gradients, context.products
        x, weight = context.take_apart(context)
        sample, channel = _find_sums(g)
        copies = Copies(g, context.state, "gradient")
        dtype, x_dtype, weight_dtype = context.dtypes
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(g.device.type, enabled=False):
            if weight is not None:
                operands = copies.take(products.grad_input.left, sample), weight
                grad_x = _differentiate(operands, context, dtype, of_weight=False).to(x_dtype)
            if x is not None:
                operands = copies.take(products.grad_weight.left, channel), x
                grad_weight = _differentiate(operands, context, dtype, of_weight=True).to(weight_dtype)
            if context.bias_dtype is not None and context.needs_input_grad[2]:
                wide = torch.float64 if g.dtype == torch.float64 else torch.float32
                grad_bias = g.sum(dim=channel, dtype=wide).to(context.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _find_sums(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All dimensions but the first, and all but the second."""
    places = tuple(range(2, x.dim()))
    return (1, *places), (0, *places)


def _differentiate(
    operands: tuple[ScaledTensor | Tensor, ScaledTensor | Tensor], context: Any, dtype: torch.dtype, *, of_weight: bool
) -> Tensor:
    """One of the two backward products; the tensor that it is the gradient of is there by its shape alone."""
    g, other = expand_operands(*operands, dtype)
    x_shape, weight_shape = context.shapes
    x = other if of_weight else g.new_empty(1).expand(x_shape)
    weight = g.new_empty(1).expand(weight_shape) if of_weight else other
    mask = [not of_weight, of_weight, False]
    results = torch.ops.aten.convolution_backward(g, x, weight, None, *context.options, mask)
    return results[1 if of_weight else 0].to(dtype)  # type: ignore[no-any-return]


def _convolve(  # noqa: PLR0913 - torch's arguments
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, padding: Size | str, dilation: Size, groups: int,
    products: Products, state: ProductState | None, output_padding: Size | None = None,
) -> Tensor:  # fmt: skip
    _require_no_blocks(products)
    places = weight.dim() - 2
    if x.dim() == places + 1:
        batch = _convolve(x[None], weight, bias, stride, padding, dilation, groups, products, state, output_padding)
        return batch.squeeze(0)
    stride, dilation = _repeat(stride, places), _repeat(dilation, places)
    if isinstance(padding, str):
        x, padding = _pad(x, weight, padding, stride, dilation)
    transposed = output_padding is not None
    options = (
        stride, _repeat(padding, places), dilation, transposed, _repeat(output_padding or 0, places), groups,
    )  # fmt: skip
    y: Tensor = _Convolve.apply(x, weight, bias, options, products, state, find_result_dtype(x))
    return y


def _require_no_blocks(products: Products) -> None:
    operands: list[Operand] = []
    for product in (products.output, products.grad_input, products.grad_weight):
        operands += [product.left, product.right]
    for operand in operands:
        if operand.is_scaled and operand.scaling.kind == "block":
            raise UnsupportedError(
                f"convolutions take scales a tensor or row; got {operand.format} in blocks of {operand.scaling}; give them "
                "scaling=tensor or another format"
            )


def _repeat(size: Size, count: int) -> list[int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * count if len(sizes) == 1 else sizes


def _pad(x: Tensor, weight: Tensor, word: str, stride: list[int], dilation: list[int]) -> tuple[Tensor, Size]:
    """The input and the padding that "same" or "valid" stands for; an odd zero goes to the end, as in torch."""
    if word == "valid":
        return x, 0
    if word != "same" or any(step != 1 for step in stride):
        raise UnsupportedError(
            f"padding is 'valid', 'same' with stride 1, or numbers; got '{word}' with stride {stride}"
        )
    totals = [gap * (size - 1) for gap, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [n for total in reversed(totals) for n in (0, total % 2)])
    return x, [total // 2 for total in totals]


def _require_places(name: str, weight: Tensor, places: int) -> None:
    if weight.dim() != places + 2:
        raise UnsupportedError(f"{name} takes a weight of {places + 2} dimensions; got {weight.dim()}")


def conv1d(  # noqa: PLR0913 - torch's arguments
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0, dilation: Size = 1,
    groups: int = 1, *, products: Products, state: ProductState | None = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.conv1d`, x [N, C, L], weight [O, C / groups, kernel], by scaled products.

    Examples:
        >>> conv1d(torch.ones(1, 2, 5), torch.ones(3, 2, 3), products=Products.of("fp8_e4m3")).shape
        torch.Size([1, 3, 3])

    Raises UnsupportedError for scales in blocks, here and in the other convolutions.
    """
    _require_places("conv1d", weight, 1)
    return _convolve(x, weight, bias, stride, padding, dilation, groups, products, state)


def conv2d(  # noqa: PLR0913 - torch's arguments
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0, dilation: Size = 1,
    groups: int = 1, *, products: Products, state: ProductState | None = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.conv2d`, x [N, C, H, W], weight [O, C / groups, *kernel], by scaled products.

    Examples:
        >>> conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3), padding="same", products=Products.of("int8")).shape
        torch.Size([1, 3, 5, 5])
    """
    _require_places("conv2d", weight, 2)
    return _convolve(x, weight, bias, stride, padding, dilation, groups, products, state)


def conv3d(  # noqa: PLR0913 - torch's arguments
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0, dilation: Size = 1,
    groups: int = 1, *, products: Products, state: ProductState | None = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.conv3d`, x [N, C, D, H, W], weight [O, C / groups, *kernel], by scaled products.

    Examples:
        >>> conv3d(torch.ones(1, 2, 3, 3, 3), torch.ones(4, 2, 3, 3, 3), products=Products.of("int8")).shape
        torch.Size([1, 4, 1, 1, 1])
    """
    _require_places("conv3d", weight, 3)
    return _convolve(x, weight, bias, stride, padding, dilation, groups, products, state)


def conv_transpose1d(  # noqa: PLR0913 - torch's arguments
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0, output_padding: Size = 0,
    groups: int = 1, dilation: Size = 1, *, products: Products, state: ProductState | None = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.conv_transpose1d`, x [N, C, L], weight [C, O / groups, kernel], by scaled products.

    Examples:
        >>> conv_transpose1d(torch.ones(1, 2, 3), torch.ones(2, 4, 3), products=Products.of("int8")).shape
        torch.Size([1, 4, 5])
    """
    _require_places("conv_transpose1d", weight, 1)
    return _convolve(x, weight, bias, stride, padding, dilation, groups, products, state, output_padding)


def conv_transpose2d(  # noqa: PLR0913 - torch's arguments
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0, output_padding: Size = 0,
    groups: int = 1, dilation: Size = 1, *, products: Products, state: ProductState | None = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.conv_transpose2d`, x [N, C, H, W], weight [C, O / groups, *kernel], by scaled products.

    Examples:
        >>> conv_transpose2d(torch.ones(1, 2, 3, 3), torch.ones(2, 4, 3, 3), products=Products.of("int8")).shape
        torch.Size([1, 4, 5, 5])
    """
    _require_places("conv_transpose2d", weight, 2)
    return _convolve(x, weight, bias, stride, padding, dilation, groups, products, state, output_padding)


def conv_transpose3d(  # noqa: PLR0913 - torch's arguments
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0, output_padding: Size = 0,
    groups: int = 1, dilation: Size = 1, *, products: Products, state: ProductState | None = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.conv_transpose3d`, x [N, C, D, H, W], weight [C, O / groups, *kernel], by scaled products.

    Examples:
        >>> conv_transpose3d(torch.ones(1, 2, 1, 1, 1), torch.ones(2, 4, 2, 2, 2), products=Products.of("int8")).shape
        torch.Size([1, 4, 2, 2, 2])
    """
    _require_places("conv_transpose3d", weight, 3)
    return _convolve(x, weight, bias, stride, padding, dilation, groups, products, state, output_padding)
