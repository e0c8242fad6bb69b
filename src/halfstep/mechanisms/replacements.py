"""What stands in for torch's functions inside a module whose products follow a plan.

A plan's words become `Products`: `compute` for activations and weights, `grad` for the gradient that comes in, `grad_input`
and `grad_weight` for both operands of the product of that name. `scaling=128x128` is DeepSeek-V3's: weights in blocks of
128x128, activations and gradients in blocks of 1x128 (arXiv 2412.19437, section 3.3).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from halfstep.numerics import convolution, multiplication
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


def replace_functions(products: Products, state: ProductState) -> Mapping[Function, Function]:
    """torch function -> function with the same signature whose products follow `products`."""
    functions: dict[Function, Function] = {
        F.linear: multiplication.linear,
        F.conv1d: convolution.conv1d,
        F.conv2d: convolution.conv2d,
        F.conv3d: convolution.conv3d,
        F.conv_transpose1d: convolution.conv_transpose1d,
        F.conv_transpose2d: convolution.conv_transpose2d,
        F.conv_transpose3d: convolution.conv_transpose3d,
    }
    return {theirs: partial(_call, partial(ours, products=products, state=state)) for theirs, ours in functions.items()}


def _call(function: Function, *args: Any, **kwargs: Any) -> Tensor:
    """torch calls the first argument `input`, ours do not."""
    first = (kwargs.pop("input"),) if "input" in kwargs else ()
    result: Tensor = function(*first, *args, **kwargs)
    return result
