"""What a plan's words ask of a module's products, and the functions that do it in place of torch's."""

import pytest
import torch
from torch.nn import functional as F

from halfstep.mechanisms.replacements import read_products, replace_functions
from halfstep.numerics.casting import Scaling
from halfstep.numerics.products import Operand, Product, ProductState
from halfstep.plan import Settings


def operand(format: str, scaling: str = "tensor") -> Operand:
    return Operand(format=format, scaling=Scaling.parse(scaling))


def test_compute_is_for_activations_and_weights_and_grad_for_the_gradient() -> None:
    products = read_products(Settings(compute="fp8_e4m3", grad="fp8_e5m2", scaling="row"))
    forward, gradient = operand("fp8_e4m3", "row"), operand("fp8_e5m2", "row")
    assert products.output == Product(left=forward, right=forward)
    assert products.grad_input == Product(left=gradient, right=forward)
    assert products.grad_weight == Product(left=gradient, right=forward)


def test_grad_is_as_compute_where_it_is_left_out() -> None:
    assert read_products(Settings(compute="int8")).grad_input.left.format == "int8"


@pytest.mark.parametrize("slot", ["grad_input", "grad_weight"])
@pytest.mark.parametrize("format", ["bf16", "fp8_e5m2", "mxfp8_e4m3"])
def test_a_product_of_its_own_has_both_operands_in_that_format(slot: str, format: str) -> None:
    products = read_products(Settings(compute="int8", scaling="row", **{slot: format}))
    for name in ("output", "grad_input", "grad_weight"):
        product = getattr(products, name)
        assert {product.left.format, product.right.format} == {format if name == slot else "int8"}


def test_square_blocks_are_for_weights_alone() -> None:
    products = read_products(Settings(compute="fp8_e4m3", scaling="128x128"))
    assert products.output == Product(left=operand("fp8_e4m3", "1x128"), right=operand("fp8_e4m3", "128x128"))
    assert products.grad_weight == Product(left=operand("fp8_e4m3", "1x128"), right=operand("fp8_e4m3", "1x128"))


def test_block_formats_bring_their_own_blocks() -> None:
    products = read_products(Settings(compute="mxfp8_e4m3", grad="nvfp4", scaling="tensor"))
    assert str(products.output.right.scaling) == "1x32"
    assert str(products.grad_input.left.scaling) == "1x16"


@pytest.mark.parametrize("keyword", [False, True])
def test_functions_take_what_torchs_take(keyword: bool) -> None:
    functions = replace_functions(read_products(Settings(compute="int8", scaling="row")), ProductState())
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    own = functions[F.conv2d]
    ours = own(input=x, weight=weight, padding=1) if keyword else own(x, weight, None, 1, 1)
    exact = F.conv2d(x, weight, padding=1) if keyword else F.conv2d(x, weight, None, 1, 1)
    error = (ours - exact).norm() / exact.norm()
    assert 0 < error < 0.03  # int8 rounds by up to 1/254 of the largest number, which is some 3 deviations
