"""What stands in for torch's functions inside a module whose products follow a plan.

A plan's words become `Products`: `compute` for activations and weights, `grad` for the gradient that comes in, `grad_input`
and `grad_weight` for both operands of the product of that name. `scaling=128x128` is DeepSeek-V3's: weights in blocks of
128x128, activations and gradients in blocks of 1x128 (arXiv 2412.19437, section 3.3).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from halfstep.errors import UnsupportedError
from halfstep.numerics import attention, convolution, lookup, multiplication, recurrence
from halfstep.numerics.casting import Scaling
from halfstep.numerics.formats import find_format
from halfstep.numerics.products import PLAIN, Operand, Product, Products, ProductState
from halfstep.plan import Settings

Function = Callable[..., Any]


def read_products(settings: Settings) -> Products:
    """The three products of a module with these settings.

    Examples:
        >>> products = read_products(Settings(compute="int8", scaling="row", grad_weight="bf16"))
        >>> products.output.right.format, products.grad_weight.right.format
        ('int8', 'bf16')
    """
    activation = _make_operand(settings.compute, "1x128" if settings.scaling == "128x128" else settings.scaling)
    weight = _make_operand(settings.compute, settings.scaling)
    gradient = replace(activation, format=settings.grad or settings.compute)
    if find_format(gradient.format).block != find_format(activation.format).block:
        gradient = _make_operand(gradient.format, "")
    return Products(
        output=Product(left=activation, right=weight),
        grad_input=_override(Product(left=gradient, right=weight), settings.grad_input),
        grad_weight=_override(Product(left=gradient, right=activation), settings.grad_weight),
    )


def _make_operand(format: str, scaling: str) -> Operand:
    block = find_format(format).block
    return Operand(format=format, scaling=Scaling.parse(f"1x{block}" if block else scaling or "tensor"))


def _override(product: Product, format: str) -> Product:
    """Both operands in a format of their own, where one is stated."""
    if not format:
        return product
    if format in PLAIN or find_format(format).block:
        return Product(left=_make_operand(format, ""), right=_make_operand(format, ""))
    return Product(left=replace(product.left, format=format), right=replace(product.right, format=format))


def can_be_replaced(module: nn.Module) -> bool:
    """Whether all products that a module makes by itself are among those of `replace_functions`; one with a forward of its
    own might make others.

    Examples:
        >>> can_be_replaced(nn.GRU(2, 2)), can_be_replaced(nn.GRUCell(2, 2))
        (True, False)
    """
    return isinstance(module, REPLACEABLE) and any(type(module).forward is kind.forward for kind in REPLACEABLE)


def require_products(module: nn.Module, products: Products) -> None:
    """Raises UnsupportedError for blocks where the module's products have no kernel that sums by them."""
    operands = [o for p in (products.output, products.grad_input, products.grad_weight) for o in (p.left, p.right)]
    blocks = [str(o.scaling) for o in operands if o.scaling.kind == "block"]
    if blocks and isinstance(module, nn.modules.conv._ConvNd):
        raise UnsupportedError(
            f"convolutions take scaling=tensor, delayed or row; got blocks of {blocks[0]}; give them bf16"
        )
    if products.output.right.scaling.rows > 1 and isinstance(module, nn.Embedding | nn.EmbeddingBag):
        raise UnsupportedError(f"embeddings take scales within a vector; got blocks of {products.output.right.scaling}")


def replace_functions(products: Products, state: ProductState) -> Mapping[Function, Function]:
    """torch function -> function with the same signature whose products follow `products`.

    state: for the products of modules that make one. Those that make several share but its weights: a history of largest
        magnitudes follows one product.
    """
    functions: dict[Function, Function] = {
        theirs: partial(_run_single, partial(ours, products=products, state=state), state)
        for theirs, ours in _SINGLE.items()
    }
    functions[F.scaled_dot_product_attention] = partial(attention.scaled_dot_product_attention, products=products)
    for theirs, padded, packed in _RECURRENT:
        functions[theirs] = partial(
            _run_recurrent, partial(padded, products=products), partial(packed, products=products)
        )
    return functions


REPLACEABLE = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding,
    nn.EmbeddingBag, nn.MultiheadAttention, nn.LSTM, nn.GRU,
)  # fmt: skip
_SINGLE: dict[Function, Function] = {
    F.linear: multiplication.linear, torch.matmul: multiplication.matmul, torch.mm: multiplication.mm,
    torch.bmm: multiplication.bmm, torch.addmm: multiplication.addmm, torch.baddbmm: multiplication.baddbmm,
    F.conv1d: convolution.conv1d, F.conv2d: convolution.conv2d, F.conv3d: convolution.conv3d,
    F.conv_transpose1d: convolution.conv_transpose1d, F.conv_transpose2d: convolution.conv_transpose2d,
    F.conv_transpose3d: convolution.conv_transpose3d, F.embedding: lookup.embedding,
    F.embedding_bag: lookup.embedding_bag,
}  # fmt: skip

_RECURRENT: tuple[tuple[Function, Function, Function], ...] = (
    (torch.lstm, recurrence.lstm, recurrence.lstm_packed),
    (torch.gru, recurrence.gru, recurrence.gru_packed),
)


def _run_single(function: Function, state: ProductState, *args: Any, **kwargs: Any) -> Any:
    """torch's functions call their first argument `input`; ours call it by its part in the product."""
    state.is_training = torch.is_grad_enabled()
    first = (kwargs.pop("input"),) if "input" in kwargs else ()
    return function(*first, *args, **kwargs)


def _run_recurrent(padded: Function, packed: Function, *args: Any) -> Any:
    """torch.lstm and torch.gru have two signatures: of packed sequences the second argument are batch sizes."""
    return (packed if isinstance(args[3], list | tuple) else padded)(*args)
