"""Embeddings whose vectors are rounded: the numbers of the format forward, torch's gradients backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.errors import UnsupportedError
from halfstep.numerics.casting import quantize
from halfstep.numerics.lookup import embedding, embedding_bag
from halfstep.numerics.products import Operand, Product, Products, ProductState
from helpers import seeded

RECIPES = {
    "fp8": Products.of("fp8_e4m3"),
    "int8": Products.of("int8"),
    "mxfp4": Products.of("mxfp4"),
}


def make_table() -> Tensor:
    with seeded(0):
        return torch.randn(12, 32).requires_grad_()


NUMBERS = torch.tensor([[1, 4, 4], [7, 1, 0], [11, 11, 2]])


def run(function: Callable[..., Tensor], table: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    y = function(NUMBERS, table, **options)
    (grad,) = torch.autograd.grad(y, table, torch.linspace(-1, 1, y.numel()).view(y.shape))
    return y, grad.to_dense()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 4}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding_is_that_of_the_rounded_table(name: str, options: dict[str, Any]) -> None:
    table, products = make_table(), RECIPES[name]
    operand = products.output.right
    rounded = quantize(table, operand.format, operand.scaling).dequantize().requires_grad_()
    actual, expected = run(embedding, table, **options, products=products), run(F.embedding, rounded, **options)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "sum", "sparse": True}, {"mode": "max"}, {"padding_idx": 4}, {"padding_idx": -1}, {"padding_idx": 5},
     {"mode": "sum", "scale_grad_by_freq": True}],
    ids=str,
)  # fmt: skip
def test_embedding_bag_is_that_of_the_rounded_table(name: str, options: dict[str, Any]) -> None:
    table, products = make_table(), RECIPES[name]
    operand = products.output.right
    rounded = quantize(table, operand.format, operand.scaling).dequantize().requires_grad_()
    actual, expected = run(embedding_bag, table, **options, products=products), run(F.embedding_bag, rounded, **options)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])


def test_bags_with_offsets_and_weights_are_those_of_torch() -> None:
    table, flat, offsets = make_table(), NUMBERS.flatten(), torch.tensor([0, 2, 2, 9])
    rounded = quantize(table, "fp8_e4m3").dequantize()
    weights = torch.linspace(0, 1, 9)
    options: dict[str, Any] = {"mode": "sum", "per_sample_weights": weights, "include_last_offset": True}
    actual = embedding_bag(flat, table, offsets, products=RECIPES["fp8"], **options)
    torch.testing.assert_close(actual, F.embedding_bag(flat, rounded, offsets, **options))


def test_norms_are_limited_in_the_table_as_by_torch() -> None:
    ours, theirs = make_table().detach(), make_table().detach()
    embedding(NUMBERS, ours, max_norm=1.0, products=RECIPES["fp8"])
    F.embedding(NUMBERS, theirs, max_norm=1.0)
    assert torch.equal(ours, theirs)


def test_one_scale_a_tensor_is_that_of_the_whole_table() -> None:
    table = torch.ones(3, 2)
    table[2] = 300
    assert embedding(torch.tensor([0]), table * 1.03, products=RECIPES["fp8"]).unique().item() == 1.0
    state = ProductState(reduce=lambda amax: amax * 2**20)
    assert embedding(torch.tensor([0]), table, products=RECIPES["fp8"], state=state).unique().item() == 0.0
    delayed = ProductState()
    embedding(torch.tensor([0]), table, products=Products.of("fp8_e4m3", scaling="delayed"), state=delayed)
    assert delayed.histories["right"].amaxes[-1] == 300


def test_plain_operands_and_blocks_of_rows() -> None:
    bf16 = Product(left=Operand(format="bf16"), right=Operand(format="bf16"))
    products = Products(output=bf16, grad_input=bf16, grad_weight=bf16)
    table = make_table()
    assert torch.equal(
        embedding(NUMBERS, table, products=products), table.to(torch.bfloat16)[NUMBERS].to(torch.float32)
    )
    with pytest.raises(UnsupportedError, match="blocks span vectors"):
        embedding(NUMBERS, table, products=Products.of("fp8_e4m3", scaling="1x128", weight_scaling="128x128"))
