"""8-bit optimizer states: training with them, saving and restoring them."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from halfstep.mechanisms.optimizer_states import NarrowStates
from halfstep.numerics.codebooks import Quantized
from helpers import seeded


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
