"""Tensors in 8 bits: the fast path against the readable one, and error bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfstep.numerics.codebooks import BLOCK, dequantize, list_codes, make_zeros, quantize, quantize_slowly
from helpers import seeded


@pytest.mark.parametrize("signed", [True, False])
def test_codes_ascend_between_their_ends(signed: bool) -> None:
    codes = list_codes(signed=signed)
    assert list(codes) == sorted(set(codes))
    assert (codes[0], codes[-1], len(codes)) == ((-1.0, 1.0, 255) if signed else (0.0, 1.0, 256))
    assert 0.0 in codes


def test_signed_codes_are_symmetric_and_span_six_decades() -> None:
    codes = list_codes(signed=True)
    assert codes == tuple(-code for code in reversed(codes))
    assert 1e-7 < min(code for code in codes if code > 0) < 1e-6


def draw(count: int, spread: float, *, signed: bool, seed: int) -> Tensor:
    """Numbers of very different sizes."""
    with seeded(seed):
        x = torch.randn(count) * torch.exp(spread * torch.randn(count))
    return x if signed else x.abs()


@given(st.integers(1, 700), st.floats(0, 6), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_fast_path_takes_the_nearest_code(count: int, spread: float, signed: bool, seed: int) -> None:
    x = draw(count, spread, signed=signed, seed=seed)
    fast, slow = quantize(x), quantize_slowly(x)
    assert (fast.shape, fast.signed) == (slow.shape, slow.signed)
    assert torch.equal(fast.scales, slow.scales)
    scale = slow.scales.repeat_interleave(BLOCK)[:count]
    errors = [(dequantize(q).flatten() - x).abs() for q in (fast, slow)]
    assert (errors[0] <= errors[1] + scale * (x.abs() / scale.clamp_min(1e-30) * 2**-10 + 2**-24)).all()


@given(st.integers(1, 700), st.floats(0, 6), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_quantizing_what_was_quantized_changes_nothing(count: int, spread: float, signed: bool, seed: int) -> None:
    once = dequantize(quantize(draw(count, spread, signed=signed, seed=seed)))
    assert torch.equal(dequantize(quantize(once)), once)


@pytest.mark.parametrize("signed", [True, False])
def test_error_is_below_what_the_codes_allow(signed: bool) -> None:
    x = draw(100_000, 1.0, signed=signed, seed=1)
    codes = torch.tensor(list_codes(signed=signed), dtype=torch.float64)
    q = quantize(x)
    scale = q.scales.repeat_interleave(BLOCK)[: len(x)].double()
    unit, y = x.double() / scale, dequantize(q).double() / scale
    gap = (codes[1:] - codes[:-1])[(torch.bucketize(unit, codes) - 1).clamp(0, len(codes) - 2)]
    assert ((unit - y).abs() <= 0.5 * gap + unit.abs() * 2**-10 + 2**-24).all()


def test_a_positive_number_is_never_stored_as_zero_beside_much_larger_ones() -> None:
    x = torch.full((BLOCK,), 1e-30)
    x[7] = 1.0
    x[8] = 0.0
    y = dequantize(quantize(x))
    assert (y[x > 0] > 0).all()
    assert y[8] == 0
    assert torch.equal(y, dequantize(quantize_slowly(x)))


def test_zeros_and_shapes_are_kept() -> None:
    x = torch.zeros(3, 5, 100)
    y = dequantize(quantize(x))
    assert torch.equal(x, y)
    assert y.shape == x.shape


@pytest.mark.parametrize("shape", [(1,), (256,), (3, 5, 100)])
def test_zeros_are_made_as_they_are_quantized(shape: tuple[int, ...]) -> None:
    made, found = make_zeros(torch.Size(shape)), quantize(torch.zeros(shape))
    assert (made.shape, made.signed) == (found.shape, found.signed)
    assert torch.equal(made.codes, found.codes) and torch.equal(made.scales, found.scales)


def test_numbers_are_fp32_whatever_the_default_is() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert dequantize(make_zeros(torch.Size([3]))).dtype is torch.float32
    finally:
        torch.set_default_dtype(before)
