"""Attention by scaled products: torch's with plain operands, and the two products where they belong."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.errors import UnsupportedError
from halfstep.numerics.attention import scaled_dot_product_attention
from halfstep.numerics.casting import measure_error
from halfstep.numerics.multiplication import matmul
from halfstep.numerics.products import Operand, Product, Products, ProductState
from helpers import seeded

FP32 = Product(left=Operand(format="fp32"), right=Operand(format="fp32"))
PLAIN = Products(output=FP32, grad_input=FP32, grad_weight=FP32)


def make_heads(keys: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of 2 batches and 4 heads."""
    with seeded(0):
        return torch.randn(2, 4, 5, 8), torch.randn(2, 4, keys, 8), torch.randn(2, 4, keys, 8)


def make_mask() -> Tensor:
    with seeded(1):
        mask = torch.rand(5, 6) > 0.5
    mask[0] = False  # a query that may look at no key
    return mask


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": make_mask()}, {"attn_mask": torch.linspace(-3, 3, 30).view(5, 6)},
     {"attn_mask": torch.where(make_mask(), 0.0, -math.inf)}],
    ids=["plain", "causal", "scale", "mask", "bias", "infinite bias"],
)  # fmt: skip
def test_with_plain_operands_it_is_the_attention_of_torch(options: dict[str, Any]) -> None:
    results = []
    functions: list[Any] = [partial(scaled_dot_product_attention, products=PLAIN), F.scaled_dot_product_attention]
    for function in functions:
        heads = [h.requires_grad_() for h in make_heads()]
        y = function(*heads, **options)
        results.append([y, *torch.autograd.grad(y.square().sum(), heads)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_grouped_queries_share_keys() -> None:
    q, k, v = make_heads()
    y = scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True, products=PLAIN)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True))


def test_both_products_are_quantized() -> None:
    q, k, v = make_heads()
    products = Products.of("fp8_e4m3")
    scores = matmul(q, k.mT, products=products)
    expected = matmul(torch.softmax(scores / 8**0.5, -1), v, products=products)
    assert torch.equal(scaled_dot_product_attention(q, k, v, products=products), expected)
    for name, least in (
        ("fp8_e4m3", 20),
        ("int8", 35),
        ("mxfp8_e4m3", 20),
    ):  # dB: 6 p + 6 of e4m3 is 24, of a product 21
        y = scaled_dot_product_attention(q, k, v, products=Products.of(name))
        assert least < measure_error(F.scaled_dot_product_attention(q, k, v), y, "fp32").sqnr < 60


def test_dropout_keeps_the_mean_and_states_follow_each_product() -> None:
    q, k, v = make_heads(keys=500)
    v = torch.ones_like(v)
    with seeded(0):
        y = scaled_dot_product_attention(q, k, v, dropout_p=0.5, products=PLAIN)
    assert 0 < (y - 1).abs().mean() < 0.1
    states = (ProductState(), ProductState())
    scaled_dot_product_attention(q, k, v, products=Products.of("fp8_e4m3", scaling="delayed"), states=states)
    assert states[0].histories["left"].amaxes[-1] == q.abs().max()
    assert states[1].histories["right"].amaxes[-1] == 1


def test_autocast_leaves_softmax_in_fp32() -> None:
    q, k, v = make_heads()
    with torch.autocast("cpu", torch.bfloat16):
        y = scaled_dot_product_attention(q, k, v, products=PLAIN)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.to(torch.float32), F.scaled_dot_product_attention(q, k, v), rtol=2e-2, atol=2e-2)


def test_a_mask_beside_is_causal_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="attn_mask or is_causal, not both"):
        scaled_dot_product_attention(*make_heads(), attn_mask=make_mask(), is_causal=True, products=PLAIN)
