"""8-bit optimizer states: the fast path against the readable one, error bounds, and training with them."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from halfstep.mechanisms.optimizer_states import (
    BLOCK,
    NarrowStates,
    Quantized,
    dequantize,
    list_codes,
    quantize,
    quantize_slowly,
)
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


def build(make: Callable[[Any], Optimizer], seed: int = 0) -> tuple[nn.Module, Optimizer]:
    with seeded(seed):
        model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    return model, make(model.parameters())


def step(model: nn.Module, optimizer: Optimizer, number: int, states: NarrowStates | None) -> float:
    with seeded(number):
        x = torch.randn(64, 64)
    loss = F.mse_loss(model(x), torch.sin(x.roll(1, 1)))
    loss.backward()
    if states is None:
        optimizer.step()
    else:
        with states.widened(model.parameters()):
            optimizer.step()
    optimizer.zero_grad()
    return loss.item()


OPTIMIZERS = [
    lambda p: Adam(p, lr=3e-3),
    lambda p: AdamW(p, lr=3e-3, foreach=True),
    lambda p: SGD(p, lr=0.3, momentum=0.9),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_training_with_narrow_states_follows_fp32(make: Callable[[Any], Optimizer]) -> None:
    losses = []
    for narrow in (False, True):
        model, optimizer = build(make)
        states = NarrowStates(optimizer) if narrow else None
        losses.append([step(model, optimizer, number, states) for number in range(150)])
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.02)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_states_are_a_quarter_as_large_between_steps_and_fp32_in_the_state_dict(
    make: Callable[[Any], Optimizer],
) -> None:
    model, optimizer = build(make)
    states = NarrowStates(optimizer)
    step(model, optimizer, 0, states)
    large = [
        v for p, s in optimizer.state.items() if p.ndim == 2 for k, v in s.items() if k != "step" and v is not None
    ]
    assert all(isinstance(value, Quantized) for value in large)
    size = sum(v.codes.nbytes + v.scales.nbytes for v in large)
    assert size / sum(4 * math.prod(v.shape) for v in large) == pytest.approx(0.254, abs=0.001)
    saved = optimizer.state_dict()["state"]
    assert not any(isinstance(value, Quantized) for state in saved.values() for value in state.values())
    assert any(isinstance(value, Quantized) for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_saved_and_restored_states_go_on_bit_for_bit(make: Callable[[Any], Optimizer]) -> None:
    model, optimizer = build(make)
    states = NarrowStates(optimizer)
    for number in range(5):
        step(model, optimizer, number, states)
    other, fresh = build(make, seed=1)
    other.load_state_dict(model.state_dict())
    fresh_states = NarrowStates(fresh)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(5, 9):
        assert step(model, optimizer, number, states) == step(other, fresh, number, fresh_states)


def test_undo_gives_a_plain_optimizer_back() -> None:
    model, optimizer = build(OPTIMIZERS[0])
    states = NarrowStates(optimizer)
    step(model, optimizer, 0, states)
    states.undo()
    step(model, optimizer, 1, None)
    assert all(isinstance(value, Tensor) for state in optimizer.state.values() for value in state.values())


def test_states_that_are_not_finite_are_left_as_they_are() -> None:
    model, optimizer = build(OPTIMIZERS[0])
    states = NarrowStates(optimizer)
    step(model, optimizer, 0, states)
    weight = next(model.parameters())
    states.widen([weight])
    optimizer.state[weight]["exp_avg"].view(-1)[3] = math.inf
    states.narrow([weight])
    assert optimizer.state[weight]["exp_avg"].view(-1)[3] == math.inf
