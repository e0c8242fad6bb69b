"""Trials of a whole model: they leave no trace, take half of a batch, and a plan under which the model fails is not taken."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfstep.control import trials
from halfstep.control.trials import choose_batch, halve_batch, leave_no_trace, run_once, stay_wide, try_plan
from halfstep.machine.timing import Stopwatch
from halfstep.plan import Plan
from helpers import assert_same, copy_weights, make_cnn


def test_everything_is_as_before_after_the_block() -> None:
    model = nn.Sequential(make_cnn(), nn.Dropout(0.5))
    x = torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters]
    values = [p.grad.clone() for p in parameters if p.grad is not None]
    before, random = copy_weights(model), torch.get_rng_state()
    with leave_no_trace(model):
        assert all(p.grad is None for p in parameters)
        run_once(model, (x,), {})
        torch.randn(5)
        assert not torch.equal(model.state_dict()["0.1.running_mean"], before["0.1.running_mean"])
    assert_same(copy_weights(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
    assert all(torch.equal(p.grad, v) for p, v in zip(parameters, values, strict=True) if p.grad is not None)


def test_everything_is_as_before_after_an_exception() -> None:
    model = make_cnn()
    before, random = copy_weights(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="no"), leave_no_trace(model):
        model(torch.randn(4, 3, 8, 8))
        raise ValueError("no")
    assert_same(copy_weights(model), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_gradients_of_a_trial_never_exist_together() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    found: list[int] = []

    def count(*_: object) -> None:
        found.append(sum(p.grad is not None for p in model.parameters()))

    for layer in model:
        layer.register_full_backward_hook(count)
    run_once(model, (torch.randn(2, 8, requires_grad=True),), {})
    assert found == [0, 0, 0, 0]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize(
    "inputs", [(torch.ones(1, 2),), (torch.ones(4, 2), torch.ones(3)), (torch.ones(()),), ()], ids=str
)
def test_batch_that_has_no_half_stays_whole(inputs: tuple[Tensor, ...]) -> None:
    assert halve_batch(inputs, {}) == (inputs, {})


class Attending(nn.Module):
    """[sequence, batch, 8] and a mask [sequence, sequence]: the first dimension is none of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return y


@pytest.mark.parametrize(
    ("model", "batch", "is_halved"),
    [
        (nn.Linear(8, 2), (torch.ones(4, 8),), True),
        (Attending(), (torch.ones(4, 3, 8), torch.zeros(4, 4)), False),
        (nn.BatchNorm1d(8), (torch.randn(2, 8),), False),  # raises a ValueError for one sample
    ],
    ids=["linear", "sequence first", "batch norm"],
)
def test_trials_run_on_the_whole_batch_where_the_model_does_not_take_half(
    model: nn.Module, batch: tuple[Tensor, ...], is_halved: bool
) -> None:
    args, kwargs = choose_batch(model, batch, {}, Plan.preset("32-true"))
    assert (len(args[0]) == len(batch[0]) // 2) == is_halved and kwargs == {}
    given = Plan.parse("compute=bf16 storage=bf16 master=split")
    assert "raises" not in try_plan(model, args, kwargs, Plan.preset("32-true"), given, Stopwatch("cpu"))[1]


def test_a_model_that_fails_in_16_bits_stays_in_fp32_with_the_error_as_its_reason() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.EmbeddingBag(9, 4, mode="sum")

        def forward(self, x: Tensor, weights: Tensor) -> Tensor:
            y: Tensor = self.table(x, per_sample_weights=weights)
            return y

    batch = (torch.randint(9, (4, 3)), torch.rand(4, 3))
    given = Plan.parse("compute=bf16 storage=bf16 master=split")
    wins, why = try_plan(Weighted(), batch, {}, Plan.preset("32-true"), given, Stopwatch("cpu"))
    assert not wins
    assert {rule.compute for rule in stay_wide(given, why).rules} == {"fp32"}
    assert why.startswith("kept in fp32: in 16 bits the model raises ") and "weight" in why


@pytest.mark.parametrize(
    ("found", "wins", "tries"),
    [([9.0], True, 1), ([10.0, 9.0], True, 2), ([10.0, 12.0], False, 2), ([9.7, 9.6, 1.0], False, 2)],
)
def test_a_plan_that_seems_to_lose_has_a_second_try(
    monkeypatch: pytest.MonkeyPatch, found: list[float], wins: bool, tries: int
) -> None:
    left = list(found)

    def race(
        _model: nn.Module, _args: Any, _kwargs: Any, plans: Sequence[Plan], _watch: Any
    ) -> dict[Plan, list[float]]:
        return dict(zip(plans, ([10.0], [left.pop(0)]), strict=True))

    monkeypatch.setattr(trials, "race", race)
    plan = Plan.parse("compute=bf16")
    won, why = try_plan(make_cnn(), (), {}, Plan.preset("32-true"), plan, Stopwatch("cpu"))
    assert won == wins and len(found) - len(left) == tries
    assert f"take {found[tries - 1]:.3g} ms under the plan and 10 ms in fp32" in why
