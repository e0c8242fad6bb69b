"""A snapshot puts everything back, bit for bit, as often as it is asked to."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from halfstep.conversion import convert
from halfstep.mechanisms.master_weights import MasterWeights
from halfstep.plan import Plan
from halfstep.snapshot import Snapshot
from helpers import FP32_MASTER, NO_MASTER, SPLIT, assert_same, copy_weights, make_cnn


def change(model: nn.Module, optimizer: Optimizer) -> None:
    x = torch.randn(4, 3, 8, 8)

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x).float(), torch.ones(4, 3))
        loss.backward()
        return float(loss.detach())

    if isinstance(optimizer, LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: Adam(p, lr=0.1), LBFGS])
@pytest.mark.parametrize("moved_before", [False, True])
def test_everything_is_put_back_twice(make: Callable[[Any], Optimizer], moved_before: bool) -> None:
    model = make_cnn()
    optimizer = make(model.parameters())
    schedule = OneCycleLR(optimizer, max_lr=0.5, total_steps=9, cycle_momentum=False)
    if moved_before:
        change(model, optimizer)
        schedule.step()
    before = copy_weights(model), copy.deepcopy(optimizer.state_dict()), copy.deepcopy(schedule.state_dict())
    snapshot = Snapshot(model, MasterWeights(), [optimizer], [schedule])
    for _ in range(2):
        change(model, optimizer)
        schedule.step()
        assert not torch.equal(copy_weights(model)["1.running_mean"], before[0]["1.running_mean"])
        snapshot.put_back()
        assert_same(copy_weights(model), before[0])
        torch.testing.assert_close(optimizer.state_dict(), before[1], rtol=0, atol=0)
        assert schedule.state_dict() == before[2]


@pytest.mark.parametrize("plan", [SPLIT, FP32_MASTER, NO_MASTER])
def test_truth_behind_narrow_weights_is_put_back(plan: str) -> None:
    model = make_cnn()
    with convert(model, Plan.parse(plan)) as conversion:
        before = copy_weights(model)
        snapshot = Snapshot(model, conversion.masters, [SGD(model.parameters(), lr=0.1)])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.37)
        snapshot.put_back()
        assert_same(copy_weights(model), before)
        assert model[0].weight.dtype is torch.bfloat16


class Lookahead(Optimizer):
    """Holds another optimizer, and objects of its own in the state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.inner = Adam(self.param_groups, lr=0.1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["since"] = group.get("since", 0) + 1
            for p in group["params"]:
                self.state[p].setdefault("past", {"weights": []})["weights"].append(p.detach().clone())
        self.inner.step()


def test_optimizer_within_another_and_what_was_added_to_groups_are_put_back() -> None:
    layer = nn.Linear(2, 1)
    optimizer = Lookahead(layer.parameters())

    def move() -> None:
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    fresh = Snapshot(layer, optimizers=[optimizer])
    move()
    before, snapshot = copy.deepcopy(optimizer.inner.state_dict()), Snapshot(layer, optimizers=[optimizer])
    move()
    assert len(optimizer.state[layer.weight]["past"]["weights"]) == 2
    snapshot.put_back()
    torch.testing.assert_close(optimizer.inner.state_dict(), before, rtol=0, atol=0)
    assert len(optimizer.state[layer.weight]["past"]["weights"]) == 1
    assert optimizer.param_groups[0]["since"] == 1
    fresh.put_back()
    assert "since" not in optimizer.param_groups[0]
    assert not optimizer.inner.state and not optimizer.state


def test_parameters_that_an_optimizer_was_given_since_stay_with_it() -> None:
    first, second = nn.Linear(2, 1), nn.Linear(1, 1)
    optimizer = SGD(first.parameters(), lr=0.1, momentum=0.9)
    snapshot = Snapshot(first, optimizers=[optimizer])
    optimizer.add_param_group({"params": list(second.parameters())})
    second(first(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    snapshot.put_back()
    assert set(optimizer.state) == set(second.parameters())
    assert len(optimizer.param_groups) == 2
