import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LRScheduler, SequentialLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from halfstep import stepper as stepper_module
from halfstep.checkpoint import change_plan, pack, unpack
from halfstep.control import sensitivity
from halfstep.control.sensitivity import Choice
from halfstep.conversion import convert
from halfstep.distributed import Alone
from halfstep.errors import (
    CheckpointError,
    FormatError,
    HalfstepError,
    ModelError,
    PlanError,
    StallWarning,
    TrainingError,
    UnheldWarning,
    UnsupportedError,
)
from halfstep.mechanisms.loss_scale import UNSCALED, LossScale, LossScaleRule
from halfstep.numerics import scaled_attention
from halfstep.numerics.codebooks import Quantized
from halfstep.numerics.updates import KERNELS
from halfstep.plan import Plan
from halfstep.records import StepOutcome
from halfstep.stepper import Stepper, prepare, read_plan
from halfstep.stepping import plan_in_force
from helpers import (
    FP32_MASTER,
    NO_MASTER,
    PRESET_NAMES,
    SPLIT,
    assert_near,
    assert_same,
    bits,
    copy_weights,
    has_hooks,
    make_class_batches,
    make_cnn,
    make_mlp,
    make_profile,
    make_regression_batches,
    seeded,
)

FP16_MASTER = "compute=fp16 storage=fp16 master=fp32"
MODES = (*PRESET_NAMES, SPLIT, FP32_MASTER, NO_MASTER, FP16_MASTER)
TRUTHFUL = ("32-true", "bf16-mixed", "16-mixed", SPLIT, FP32_MASTER, FP16_MASTER)  # an fp32 truth is kept
Batch = tuple[Tensor, Tensor]


def train(stepper: Stepper, batches: Iterable[Batch]) -> list[StepOutcome]:
    outcomes = []
    for x, y in batches:
        with stepper.autocast():
            loss = F.mse_loss(stepper.model(x).float(), y)
        outcomes.append(stepper.step(loss))
    return outcomes


def train_by_hand(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    *,
    accumulate: int = 1,
    clip: Callable[[list[nn.Parameter]], object] = lambda _: None,
    scheduler: LRScheduler | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """The loop that everybody writes."""
    for number, (x, y) in enumerate(batches, start=1):
        with autocast():
            loss = F.mse_loss(model(x).float(), y)
        (loss / accumulate).backward()
        if number % accumulate:
            continue
        clip(list(model.parameters()))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def poison(parameter: Any, value: float) -> Any:
    """Put `value` into the gradient of a parameter; the handle that is returned takes it out again."""
    return parameter.register_hook(lambda gradient: torch.full_like(gradient, value))


def make_adamw(model: nn.Module, **options: Any) -> AdamW:
    return AdamW(model.parameters(), **({"lr": 1e-2} | options))


# --- training in every mode


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_three_line_loop_trains_a_classifier(mode: str) -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model, eps=1e-4), mode, profile=make_profile("slower"))
    losses, outcomes = [], []
    for x, y in make_class_batches(60):
        with stepper.autocast():
            loss = F.cross_entropy(stepper.model(x), y)
        outcomes.append(stepper.step(loss))
        losses.append(loss.item())
    assert all(outcome.applied for outcome in outcomes[10:])
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert stepper.applied + stepper.skipped == 60


@pytest.mark.parametrize("mode", PRESET_NAMES)
def test_model_with_batch_norm_trains(mode: str) -> None:
    model = make_cnn()
    with seeded(1):
        x = torch.randn(16, 3, 8, 8)
        y = x.mean((2, 3))
    stepper = prepare(model, make_adamw(model, eps=1e-4), mode)
    losses = []
    for _ in range(20):
        with stepper.autocast():
            loss = F.mse_loss(stepper.model(x).float(), y)
        stepper.step(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- equal to what one would write in plain PyTorch


@pytest.mark.parametrize("kind", ["plain", "accumulated", "scheduled", "all"])
def test_32_true_equals_a_loop_written_by_hand_bit_for_bit(kind: str) -> None:
    accumulate = 2 if kind in ("accumulated", "all") else 1
    models = make_mlp(), make_mlp()
    ours, theirs = (make_adamw(model) for model in models)
    schedules = [CosineAnnealingLR(o, 50) for o in (ours, theirs)] if kind in ("scheduled", "all") else []
    batches = make_regression_batches(50 * accumulate)
    stepper = prepare(models[0], ours, "32-true", accumulate=accumulate, schedulers=schedules[:1])
    outcomes = train(stepper, batches)
    train_by_hand(models[1], theirs, batches, accumulate=accumulate, scheduler=schedules[1] if schedules else None)
    assert_same(copy_weights(models[0]), copy_weights(models[1]))
    assert sum(outcome.applied for outcome in outcomes) == 50
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


def test_32_true_on_a_model_with_batch_norm_and_dropout_equals_a_loop_written_by_hand_bit_for_bit() -> None:
    models = [nn.Sequential(make_cnn(), nn.Dropout(0.3)) for _ in range(2)]
    with seeded(5):
        batches = [(torch.randn(4, 3, 8, 8), torch.randn(4, 3)) for _ in range(20)]
    with seeded(1):
        train(prepare(models[0], make_adamw(models[0]), "32-true"), batches)
    with seeded(1):
        train_by_hand(models[1], make_adamw(models[1]), batches)
    assert_same(copy_weights(models[0]), copy_weights(models[1]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_in_32_true_follows_clip_grad_norm(accumulate: int) -> None:
    models, batches = (make_mlp(), make_mlp()), make_regression_batches(50 * accumulate)
    ours, theirs = (SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models)
    outcomes = train(prepare(models[0], ours, "32-true", accumulate=accumulate, clip=0.05), batches)
    train_by_hand(models[1], theirs, batches, accumulate=accumulate,
                  clip=lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05))  # fmt: skip
    norms = [outcome.gradient_norm for outcome in outcomes if outcome.gradient_norm is not None]
    assert sum(norm > 0.05 for norm in norms) > 5, "nothing was clipped"
    for name, weight in copy_weights(models[0]).items():
        assert_near(weight, copy_weights(models[1])[name], torch.float32)


def test_clipping_in_32_true_with_adamw_equals_a_loop_written_by_hand_bit_for_bit() -> None:
    def clip(parameters: list[nn.Parameter]) -> None:
        norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.mul_(min(1.0, 0.05 / (norm + 1e-6)))

    models, batches = (make_mlp(), make_mlp()), make_regression_batches(50)
    train(prepare(models[0], make_adamw(models[0]), "32-true", clip=0.05), batches)
    train_by_hand(models[1], make_adamw(models[1]), batches, clip=clip)
    assert_same(copy_weights(models[0]), copy_weights(models[1]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bf16_mixed_equals_torch_autocast_bit_for_bit(accumulate: int) -> None:
    models, batches = (make_mlp(), make_mlp()), make_regression_batches(30)
    train(prepare(models[0], make_adamw(models[0]), "bf16-mixed", accumulate=accumulate), batches)
    train_by_hand(models[1], make_adamw(models[1]), batches, accumulate=accumulate,
                  autocast=lambda: torch.autocast("cpu", torch.bfloat16))  # fmt: skip
    assert_same(copy_weights(models[0]), copy_weights(models[1]))


def test_16_mixed_skips_and_scales_as_torch_amp_does() -> None:
    models, batches = (make_mlp(), make_mlp()), make_regression_batches(40)
    weights = [1e9 if number in (3, 4, 11, 25) else 1.0 for number in range(40)]
    stepper = prepare(models[0], make_adamw(models[0]), "16-mixed")
    outcomes = []
    for (x, y), weight in zip(batches, weights, strict=True):
        with stepper.autocast():
            loss = weight * F.mse_loss(models[0](x).float(), y)
        outcomes.append(stepper.step(loss))

    optimizer, scaler = make_adamw(models[1]), torch.amp.GradScaler("cpu")
    scales, skipped = [], []
    for (x, y), weight in zip(batches, weights, strict=True):
        with torch.autocast("cpu", torch.float16):
            loss = weight * F.mse_loss(models[1](x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        skipped.append(scaler.get_scale() < before)

    assert [outcome.skipped for outcome in outcomes] == skipped
    assert {3, 4, 11, 25} <= {number for number, skip in enumerate(skipped) if skip}
    assert [outcome.scale_after for outcome in outcomes] == scales
    for name, weight_ in copy_weights(models[0]).items():
        assert_near(weight_, copy_weights(models[1])[name], torch.float32, scale=10)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_split_and_fp32_master_give_the_same_truth_bit_for_bit_while_no_weight_is_a_tie(
    kind: Callable[..., Optimizer],
) -> None:
    """Both update the same fp32 word; the live weights differ only where the word lies halfway between two bf16."""
    models, batches = (make_mlp(), make_mlp()), make_regression_batches(30)
    steppers = [
        prepare(model, kind([*model.parameters()], lr=0.01), plan)
        for model, plan in zip(models, (SPLIT, FP32_MASTER), strict=True)
    ]
    compared = 0
    for batch in batches:
        truth = copy_weights(models[0])
        if any(((w.view(torch.int32) & 0xFFFF) == 0x8000).any() for w in truth.values()):
            break
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
        for stepper in steppers:
            assert train(stepper, [batch])[0].applied
        assert_same(copy_weights(models[0]), copy_weights(models[1]))
        compared += 1
    assert compared >= 3


def test_split_and_fp32_master_stay_close_after_a_tie() -> None:
    """A tie is rounded away from zero by the split, because 16 bits cannot remember its parity, and to even by fp32."""
    models = make_mlp(), make_mlp()
    for model in models:
        with torch.no_grad():
            model.get_parameter("0.weight").view(torch.int32).bitwise_and_(-65536).bitwise_or_(0x8000)
    steppers = [
        prepare(model, SGD(model.parameters(), lr=0.01), plan)
        for model, plan in zip(models, (SPLIT, FP32_MASTER), strict=True)
    ]
    assert not torch.equal(*(model.get_parameter("0.weight") for model in models))
    assert_same(copy_weights(models[0]), copy_weights(models[1]))
    for stepper in steppers:
        train(stepper, make_regression_batches(20))
    for name, weight in copy_weights(models[0]).items():
        assert_near(weight, copy_weights(models[1])[name], torch.bfloat16, scale=20)


@pytest.mark.parametrize("sparse", [SGD, torch.optim.SparseAdam])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sparse_gradients_in_32_true_equal_a_loop_written_by_hand(
    sparse: Callable[..., Optimizer], accumulate: int
) -> None:
    def build() -> nn.Embedding:
        with seeded(0):
            return nn.Embedding(20, 4, sparse=True)

    with seeded(1):
        batches = [(torch.randint(20, (6,)), torch.randn(6, 4)) for _ in range(10)]
    models = build(), build()
    ours, theirs = (sparse([*model.parameters()], lr=0.1) for model in models)
    stepper = prepare(models[0], ours, "32-true", accumulate=accumulate)
    outcomes = train(stepper, batches)
    train_by_hand(models[1], theirs, batches, accumulate=accumulate)
    assert_same(copy_weights(models[0]), copy_weights(models[1]))
    assert sum(outcome.applied for outcome in outcomes) == 10 // accumulate


def test_sparse_gradients_are_measured_clipped_and_checked_like_dense_ones() -> None:
    results = []
    for sparse in (False, True):
        with seeded(0):
            model = nn.Embedding(20, 4, sparse=sparse)
        stepper = prepare(model, SGD(model.parameters(), lr=1.0), "32-true", clip=0.01)
        healthy = train(stepper, [(torch.tensor([1, 1, 3]), torch.zeros(3, 4))])[0]
        bad = train(stepper, [(torch.tensor([2]), torch.full((1, 4), math.nan))])[0]
        assert (bad.status, bad.tensors) == ("skipped", ("weight",))
        results.append((healthy.gradient_norm, copy_weights(model)["weight"]))
    assert results[0][0] == pytest.approx(results[1][0])
    assert_near(results[0][1], results[1][1], torch.float32)


def test_model_in_fp64_trains_under_32_true() -> None:
    model = make_mlp().double()
    stepper = prepare(model, make_adamw(model), "32-true")
    (x, y), *_ = make_regression_batches(1)
    loss = F.mse_loss(model(x.double()), y.double())
    assert stepper.step(loss).applied
    assert model[0].weight.dtype is torch.float64


# --- outcomes


def test_outcomes_of_a_window_are_accumulated_then_applied() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "16-mixed", accumulate=3)
    outcomes = train(stepper, make_regression_batches(6))
    assert [outcome.status for outcome in outcomes] == ["accumulated", "accumulated", "applied"] * 2
    assert [outcome.step for outcome in outcomes] == [0, 0, 1, 1, 1, 2]
    assert all(o.gradient_norm is None and not o.cause and not o.tensors for o in outcomes if o.status == "accumulated")
    assert all(outcome.scale_before == outcome.scale_after == 2.0**16 for outcome in outcomes)
    assert (stepper.applied, stepper.skipped) == (2, 0)


@pytest.mark.parametrize("mode", ["32-true", "16-mixed", SPLIT, NO_MASTER])
def test_gradient_norm_is_that_of_torch_after_unscaling_and_before_clipping(mode: str) -> None:
    model, batch = make_mlp(), make_regression_batches(1)
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), mode, clip=1e-3)
    with stepper.autocast():
        loss = F.mse_loss(model(batch[0][0]).float(), batch[0][1])
    gradients = torch.autograd.grad(stepper.scale * loss, list(model.parameters()))
    expected = float(nn.utils.get_total_norm([g.float() for g in gradients])) / stepper.scale
    outcome = train(stepper, batch)[0]
    assert outcome.gradient_norm is not None
    assert outcome.gradient_norm == pytest.approx(expected, rel=1e-6)
    assert outcome.gradient_norm > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_skip_names_cause_and_guilty_tensors_in_the_order_of_the_model(mode: str) -> None:
    model = make_mlp()
    groups = [{"params": list(module.parameters())} for module in (model[4], model[2], model[0])]
    stepper = prepare(model, SGD(groups, lr=0.1), mode)
    for parameter in (model[4].bias, model[0].weight, model[2].bias):
        poison(parameter, math.nan)
    outcome = train(stepper, make_regression_batches(1))[0]
    assert outcome.skipped
    assert outcome.tensors == ("0.weight", "2.bias", "4.bias")
    assert "3 gradients are not finite, the first on the way back is 4.bias" in outcome.cause
    assert (outcome.layer, outcome.forward_nonfinite) == ("4", False)
    dynamic = mode == "16-mixed"
    assert (outcome.scale_before, outcome.scale_after) == ((65536.0, 32768.0) if dynamic else (1.0, 1.0))
    assert (outcome.step, stepper.skipped) == (0, 1)


def test_parameter_of_the_optimizer_that_is_not_in_the_model_is_checked_too() -> None:
    model, extra = make_mlp(), nn.Parameter(torch.ones(3))
    stepper = prepare(model, SGD([*model.parameters(), extra], lr=0.1), "32-true")
    poison(extra, math.inf)
    x, y = make_regression_batches(1)[0]
    outcome = stepper.step(F.mse_loss(model(x) * extra, y))
    assert outcome.tensors == ("(a parameter outside the model)",)
    assert torch.equal(extra, torch.ones(3))
    assert extra.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_skip_moves_neither_weights_nor_optimizer_state_nor_schedule(mode: str) -> None:
    model = make_mlp()
    optimizer = make_adamw(model, eps=1e-4)
    schedule = StepLR(optimizer, 1, 0.5)
    stepper = prepare(model, optimizer, mode, schedulers=schedule)
    train(stepper, make_regression_batches(2))
    applied = stepper.applied
    weights, live = copy_weights(model), [p.detach().clone() for p in model.parameters()]
    states = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    rate = optimizer.param_groups[0]["lr"]
    poison(model[2].weight, math.inf)
    assert train(stepper, make_regression_batches(1))[0].skipped
    assert_same(copy_weights(model), weights)
    assert all(torch.equal(now, before) for now, before in zip(model.parameters(), live, strict=True))
    for parameter, state in states.items():
        assert_same(optimizer.state[parameter], state)
    assert optimizer.param_groups[0]["lr"] == rate
    assert schedule.last_epoch == stepper.applied == applied
    assert all(p.grad is None for p in model.parameters())


def test_every_schedule_steps_once_for_every_applied_step_and_only_then() -> None:
    model = make_mlp()
    optimizer = SGD(model.parameters(), lr=1.0)
    schedules = [StepLR(optimizer, 1, 0.5), StepLR(optimizer, 2, 0.1)]
    stepper = prepare(model, optimizer, "32-true", accumulate=2, schedulers=schedules)
    train(stepper, make_regression_batches(4))
    handle = poison(model[0].weight, math.nan)
    train(stepper, make_regression_batches(2))
    handle.remove()
    train(stepper, make_regression_batches(1))
    assert [schedule.last_epoch for schedule in schedules] == [2, 2]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.5 * 0.1)


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "16-mixed", SPLIT])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_loss_that_is_not_finite_is_skipped_and_said_to_be_the_cause(mode: str, value: float) -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), mode)
    before = copy_weights(model)
    with stepper.autocast():
        loss = model(torch.ones(2, 8)).float().mean() + value
    outcome = stepper.step(loss)
    assert outcome.skipped
    assert outcome.cause == f"the loss is {value}, though every output of the model is finite"
    assert_same(copy_weights(model), before)


@pytest.mark.parametrize("mode", ["32-true", "16-mixed", SPLIT, NO_MASTER])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_nan_in_one_micro_batch_skips_the_window_and_the_next_one_is_applied(mode: str, bad: int) -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), mode, accumulate=3)
    before = copy_weights(model)
    batches = make_regression_batches(6)
    batches[bad] = (batches[bad][0].clone().fill_(math.nan), batches[bad][1])
    outcomes = train(stepper, batches[:3])
    assert [outcome.status for outcome in outcomes] == ["accumulated", "accumulated", "skipped"]
    assert outcomes[-1].cause == "the loss is nan: so is the input"
    assert outcomes[-1].forward_nonfinite
    assert outcomes[-1].tensors == tuple(name for name, _ in model.named_parameters())
    assert_same(copy_weights(model), before)
    last = train(stepper, batches[3:])[-1]
    assert last.applied
    assert not last.cause


def test_step_without_any_gradient_is_skipped_and_leaves_the_scale() -> None:
    model = make_mlp()
    with pytest.warns(UnheldWarning):
        stepper = prepare(model, SGD(model[0].parameters(), lr=0.1), "16-mixed")
    outcome = stepper.step(model.get_parameter("4.weight").square().mean())
    assert outcome.skipped
    assert "gradient" in outcome.cause
    assert outcome.scale_before == outcome.scale_after


@pytest.mark.parametrize("mode", ["32-true", NO_MASTER])
def test_parameters_that_the_optimizer_does_not_hold_stay_and_do_not_count_in_the_norm(mode: str) -> None:
    x, y = make_regression_batches(1)[0]
    norms = []
    for accumulate in (1, 2):
        model = make_mlp()
        with pytest.warns(UnheldWarning):
            stepper = prepare(model, SGD(model[4].parameters(), lr=0.1), mode, accumulate=accumulate)
        before = copy_weights(model)
        outcome = train(stepper, [(x, y)] * accumulate)[-1]
        assert outcome.gradient_norm is not None
        norms.append(outcome.gradient_norm)
        assert torch.equal(copy_weights(model)["0.weight"], before["0.weight"])
        assert not torch.equal(copy_weights(model)["4.weight"], before["4.weight"])
        assert model[0].weight.grad is None
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_small_gradients_are_not_lost_beside_a_large_one_when_micro_batches_of_bf16_weights_are_summed() -> None:
    model = nn.Linear(1, 1, bias=False)
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), NO_MASTER, accumulate=64)
    for weight in (256.0, *[1.0] * 63):
        outcome = stepper.step(model.weight.float().sum() * weight)
    assert outcome.gradient_norm == pytest.approx((256 + 63) / 64, rel=1e-3)  # 4.0 where sums are kept in bf16


def test_norm_of_summed_16_bit_gradients_does_not_depend_on_the_order_in_memory() -> None:
    with seeded(0):
        slopes = torch.randn(60, 10)
    norms, kept = set(), []
    for _ in range(12):
        model = nn.ParameterList([nn.Parameter(torch.zeros(10)) for _ in slopes])
        kept.append(model)  # so that the next one lies elsewhere
        stepper = prepare(model, SGD(model.parameters(), lr=0.1), NO_MASTER, accumulate=2)
        for _ in range(2):
            outcome = stepper.step((torch.stack([*model]).float() * slopes).sum())
        norms.add(outcome.gradient_norm)
    assert len(norms) == 1


# --- loss scale


def test_scale_grows_after_an_interval_of_clean_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepper_module, "DYNAMIC", LossScaleRule(interval=3))
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.01), "16-mixed")
    stepper.load_state_dict(stepper.state_dict() | {"loss_scale": {"scale": 8.0, "clean": 0, "overflows": 0}})
    outcomes = train(stepper, make_regression_batches(7))
    assert [outcome.scale_after for outcome in outcomes] == [8, 8, 16, 16, 16, 32, 32]
    assert [outcome.scale_before for outcome in outcomes] == [8, 8, 8, 16, 16, 16, 32]


def test_scale_after_200_overflows_is_above_zero_and_the_next_healthy_step_is_applied() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "16-mixed")
    stepper.recovery_rule = replace(stepper.recovery_rule, limit=201)
    before = copy_weights(model)
    handle = poison(model[0].weight, math.inf)
    outcomes = train(stepper, make_regression_batches(200))
    assert all(outcome.skipped for outcome in outcomes)
    assert min(outcome.scale_after for outcome in outcomes) > 0
    assert stepper.skipped == 200
    handle.remove()
    outcome = train(stepper, make_regression_batches(1))[0]
    assert outcome.applied
    assert all(weight.isfinite().all() for weight in copy_weights(model).values())
    assert not torch.equal(copy_weights(model)["0.weight"], before["0.weight"])


@pytest.mark.parametrize("clip", [None, 1.0])
def test_finite_gradients_whose_squares_overflow_fp32_are_applied(clip: float | None) -> None:
    model = nn.Linear(4, 1, bias=False)
    before = copy_weights(model)["weight"]
    poison(model.weight, 1e25)
    stepper = prepare(model, SGD(model.parameters(), lr=1e-26 if clip is None else 1.0), "32-true", clip=clip)
    outcome = stepper.step(model(torch.ones(1, 4)).sum())
    assert outcome.applied
    assert outcome.gradient_norm == pytest.approx(2e25)
    moved = before - copy_weights(model)["weight"]
    assert_near(moved, torch.full((1, 4), 0.1 if clip is None else 0.5), torch.float32, scale=10)


@pytest.mark.parametrize("mode", ["32-true", "16-mixed", SPLIT, FP16_MASTER])
def test_clipping_happens_after_unscaling(mode: str) -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=1.0), mode, clip=0.01)
    before = copy_weights(model)
    outcome = train(stepper, make_regression_batches(1))[0]
    assert outcome.applied
    after = copy_weights(model)
    moved = nn.utils.get_total_norm([after[name] - before[name] for name in before])
    assert float(moved) == pytest.approx(0.01, rel=1e-2)


def test_gradients_below_the_threshold_are_not_clipped() -> None:
    models = make_mlp(), make_mlp()
    for model, clip in zip(models, (None, 1e6), strict=True):
        stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true", clip=clip)
        train(stepper, make_regression_batches(3))
    assert_same(copy_weights(models[0]), copy_weights(models[1]))


# --- errors


def test_model_without_trainable_parameters_is_refused() -> None:
    model = make_mlp().requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameters"):
        prepare(model, SGD(model.parameters(), lr=0.1), "32-true")


def test_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"none of the 6 trainable parameters"):
        prepare(make_mlp(), SGD(make_mlp().parameters(), lr=0.1), "32-true")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda model: model(torch.ones(2, 8)).mean().detach(), "requires_grad=False"),
        (lambda model: torch.tensor(1.0), "requires_grad=False"),
        (lambda model: model(torch.ones(2, 8)), r"shape \(2, 3\)"),
    ],
    ids=["detached", "constant", "vector"],
)
def test_loss_that_is_not_one_number_with_a_graph_is_refused(build: Callable[[nn.Module], Tensor], words: str) -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true")
    with pytest.raises(ModelError, match=words):
        stepper.step(build(model))
    assert train(stepper, make_regression_batches(1))[0].applied


def test_profile_of_another_kind_is_refused() -> None:
    model = make_mlp()
    with pytest.raises(ModelError, match=r"profile takes a HardwareProfile.*got 'x'"):
        prepare(model, SGD(model.parameters(), lr=0.1), "auto", profile="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"accumulate": 0}, {"accumulate": -1}, {"clip": 0.0}, {"clip": -1.0}])
def test_accumulate_below_one_and_clip_not_above_zero_are_refused(options: dict[str, Any]) -> None:
    model = make_mlp()
    with pytest.raises(ModelError, match="accumulate must be at least 1 and clip above 0"):
        prepare(model, SGD(model.parameters(), lr=0.1), "32-true", **options)


def test_16_true_with_an_eps_that_is_zero_in_fp16_is_refused_and_the_model_left_as_it_was() -> None:
    model = make_mlp()
    before = copy_weights(model)
    with pytest.raises(UnsupportedError, match=r"AdamW has eps=1e-08, which is 0 in fp16"):
        prepare(model, AdamW(model.parameters()), "16-true")
    assert type(model) is nn.Sequential
    assert type(model[0]) is nn.Linear
    assert_same({name: p.detach() for name, p in model.named_parameters()}, before)


def test_model_that_is_16_bits_wide_already_is_refused() -> None:
    model = make_mlp().bfloat16()
    with pytest.raises(ModelError, match=r"'0\.weight' is torch\.bfloat16 already"):
        prepare(model, SGD(model.parameters(), lr=0.1), "bf16-mixed")


@pytest.mark.parametrize(
    ("plan", "error"), [("bf17-mixed", PlanError), ("path=nowhere compute=bf16", PlanError),
                        ("compute=bf17", FormatError), ("compute=fp8_e4m3", UnsupportedError), ("no.toml", PlanError)],
)  # fmt: skip
def test_plan_that_cannot_be_read_or_honoured_is_refused_and_the_model_untouched(
    plan: str, error: type[Exception]
) -> None:
    model = make_mlp()
    with pytest.raises(error) as caught:
        prepare(model, SGD(model.parameters(), lr=0.1), plan)
    assert "\n" not in str(caught.value)
    assert_same({name: p.detach() for name, p in model.named_parameters()}, copy_weights(make_mlp()))
    assert not has_hooks(model)


@pytest.mark.parametrize("suffix", ["toml", "json", "plan"])
def test_plan_is_read_from_a_file(tmp_path: Path, suffix: str) -> None:
    plan = Plan.parse(f"name=mine loss_scale=dynamic\npath='re:[0-3]' compute=fp32\n{SPLIT}")
    plan.save(tmp_path / f"mine.{suffix}")
    assert read_plan(str(tmp_path / f"mine.{suffix}")) == plan
    assert read_plan(plan) is plan


# --- auto


def take_plan(monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    """Let "auto" choose this plan, whatever was measured."""
    choice = Choice(plan=Plan.parse(plan), why="chosen by hand", seconds=0.5)
    monkeypatch.setattr(plan_in_force, "choose_plan", lambda *_args, **_options: choice)


def test_auto_is_fp32_until_a_training_batch_is_seen() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "auto", profile=make_profile("slower"))
    assert stepper.plan.name == "32-true"
    assert stepper.state_dict()["plan"] is None
    model.eval()
    model(torch.ones(2, 8))
    model.train()
    with torch.no_grad():
        model(torch.ones(2, 8))
    assert stepper.state_dict()["plan"] is None
    assert train(stepper, make_regression_batches(1))[0].applied
    assert stepper.state_dict()["plan"] is not None
    assert not stepper._in_force.is_waiting
    stepper.restore()
    assert not has_hooks(model)


def test_auto_on_a_machine_without_fast_16_bits_stays_in_fp32_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: str) -> None:
        raise AssertionError("the profile was given")

    monkeypatch.setattr(plan_in_force, "get_profile", fail)
    models, batches = (make_mlp(), make_mlp()), make_regression_batches(10)
    stepper = prepare(models[0], make_adamw(models[0]), "auto", profile=make_profile("slower"))
    train(stepper, batches)
    train_by_hand(models[1], make_adamw(models[1]), batches)
    assert_same(copy_weights(models[0]), copy_weights(models[1]))
    assert stepper.plan_record is not None
    assert stepper.plan.name == "auto"
    assert "no 16-bit format is faster than fp32" in stepper.plan_record.why
    assert "bf16 by hand" in stepper.plan_record.why
    assert {layer.compute for layer in stepper.plan_record.layers} == {"fp32"}


def test_auto_on_a_machine_with_fast_bf16_gives_every_layer_a_format_and_a_reason() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "auto", profile=make_profile("native"))
    train(stepper, make_regression_batches(3))
    assert stepper.plan_record is not None
    assert stepper.plan_record.why
    assert [layer.path for layer in stepper.plan_record.layers] == ["0", "2", "4"]
    assert all(layer.why for layer in stepper.plan_record.layers)


def test_auto_asks_for_the_profile_of_this_machine_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_in_force, "get_profile", lambda device: make_profile("slower"))
    model = make_mlp()
    stepper = prepare(model, make_adamw(model))
    train(stepper, make_regression_batches(1))
    assert stepper.plan.name == "auto"


def test_choosing_a_plan_leaves_random_numbers_and_batch_norm_as_they_were() -> None:
    models = [nn.Sequential(make_cnn(), nn.Dropout(0.5)) for _ in range(2)]
    states = []
    plans = ("auto", "functions=fast\ncompute=fp32")  # fast dropout draws other numbers than torch's
    for model, plan, profile in zip(models, plans, (make_profile("native"), None), strict=True):
        stepper = prepare(model, SGD(model.parameters(), lr=0.0), plan, profile=profile)
        with seeded(3):
            with stepper.autocast():
                loss = model(torch.randn(4, 3, 8, 8)).float().square().mean()
            stepper.step(loss)
            states.append((torch.get_rng_state(), copy_weights(model)))
    assert torch.equal(states[0][0], states[1][0])
    batches_seen = "0.1.num_batches_tracked"
    assert states[0][1][batches_seen] == states[1][1][batches_seen] == 1
    torch.testing.assert_close(states[0][1], states[1][1], rtol=1.6e-2, atol=1e-3)


def test_trials_of_auto_save_activations_as_training_will(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Plan] = []

    def try_plan(_model: nn.Module, _args: Any, _kwargs: Any, wide: Plan, plan: Plan, _watch: Any) -> tuple[bool, str]:
        tried.extend((wide, plan))
        return True, "made up"

    monkeypatch.setattr(sensitivity, "try_plan", try_plan)
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "auto", profile=make_profile(), saved="int8")
    train(stepper, make_regression_batches(1))
    for plan in (*tried, stepper.plan):
        assert [rule.saved for rule in plan.rules if rule.saved] == ["int8"]
    assert len(tried) == 2


def test_plan_that_auto_chose_is_in_force_in_the_first_step_already(monkeypatch: pytest.MonkeyPatch) -> None:
    take_plan(monkeypatch, SPLIT)
    models, batches = (make_mlp(), make_mlp()), make_regression_batches(5)
    chosen = prepare(models[0], make_adamw(models[0]), "auto", profile=make_profile())
    given = prepare(models[1], make_adamw(models[1]), SPLIT)
    for batch in batches:
        for stepper in (chosen, given):
            assert train(stepper, [batch])[0].applied
        assert_same(copy_weights(models[0]), copy_weights(models[1]))
    assert str(chosen.plan) == str(given.plan)
    assert chosen.plan_record is not None
    assert (chosen.plan_record.why, chosen.plan_record.seconds) == ("chosen by hand", 0.5)
    assert not torch.is_autocast_enabled("cpu")


def test_auto_casts_what_comes_after_the_model_in_the_first_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    take_plan(monkeypatch, "bf16-mixed")
    model, head = make_mlp(), torch.ones(3, 2)
    stepper = prepare(model, make_adamw(model), "auto", profile=make_profile())
    with stepper.autocast():
        first = model(torch.ones(2, 8)) @ head
    with stepper.autocast():
        second = model(torch.ones(2, 8)) @ head
    assert first.dtype is second.dtype is torch.bfloat16
    assert torch.equal(first, second)
    assert not torch.is_autocast_enabled("cpu")


def test_rules_of_ones_own_stand_before_what_auto_chooses() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "rest=auto\npath=4 compute=fp32", profile=make_profile("native"))
    assert stepper.plan_record is None and stepper.state_dict()["plan"] is None
    train(stepper, make_regression_batches(2))
    assert str(stepper.plan.rules[0]) == "path=4 compute=fp32"
    assert stepper.plan_record is not None and stepper.plan_record.why
    stepper.adopt(Plan.parse("rest=auto\npath=0 compute=fp32"))
    assert stepper.plan.name == "32-true"
    train(stepper, make_regression_batches(1))
    assert str(stepper.plan.rules[0]) == "path=0 compute=fp32"
    before = str(stepper.plan)
    with pytest.raises(PlanError, match="path=haed"):
        stepper.adopt(Plan.parse("rest=auto\npath=haed compute=fp32"))
    assert str(stepper.plan) == before


@pytest.mark.parametrize(
    ("plan", "said"),
    [("rest=auto\npath=haed compute=fp32", "path=haed"), ("rest=auto\npath=4 storage=int8", "storage=int8")],
)
def test_rules_that_cannot_be_honoured_beside_auto_are_refused_before_a_batch(plan: str, said: str) -> None:
    model = make_mlp()
    with pytest.raises(HalfstepError, match=said):
        prepare(model, make_adamw(model), plan)
    assert not has_hooks(model)


def test_parameters_that_no_optimizer_holds_are_warned_of_and_recorded() -> None:
    model = make_mlp()
    with pytest.warns(UnheldWarning, match=r"no optimizer given .* holds 0.weight, 0.bias, which .*requires_grad_"):
        stepper = prepare(model, SGD([*model[2].parameters(), *model[4].parameters()], lr=0.1), "bf16-mixed")
    assert stepper.plan_record is not None
    assert stepper.plan_record.unheld == ("0.weight", "0.bias")
    stepper.restore()
    model[0].requires_grad_(False)
    assert prepare(model, SGD([*model[2].parameters(), *model[4].parameters()], lr=0.1), "bf16-mixed").plan_record


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedulers": 3}, "schedulers takes one LRScheduler or several; got int"),
        ({"schedulers": ["cosine"]}, "got str"),
        ({"schedulers": [None]}, "got NoneType"),
        ({"schedulers": StepLR}, "got type"),
        ({"schedulers": [StepLR]}, "got type"),
        ({"schedulers": SGD([torch.ones(1)], lr=0.1)}, "got SGD"),
        ({"averages": nn.Linear(1, 1)}, "averages takes one AveragedModel or several; got Linear"),
        ({"clip": "1"}, "clip above 0; got accumulate=1, clip='1'"),
        ({"saved": "int3"}, "unknown saved format 'int3'.*Allowed: bf16, fp32, int4, int8"),
    ],
)
def test_options_of_another_kind_are_refused(options: dict[str, Any], said: str) -> None:
    model = make_mlp()
    with pytest.raises(HalfstepError, match=said):
        prepare(model, make_adamw(model), "bf16-mixed", **options)


@pytest.mark.parametrize("several", [False, True])
def test_a_scheduler_of_ones_own_needs_no_more_than_a_step(several: bool) -> None:
    class Counter:
        steps = 0

        def step(self) -> None:
            self.steps += 1

    model, counter = make_mlp(), Counter()
    schedulers: Any = [counter] if several else counter
    train(prepare(model, make_adamw(model), "32-true", schedulers=schedulers), make_regression_batches(3))
    assert counter.steps == 3
    other = make_mlp()
    assert prepare(other, make_adamw(other), "32-true", schedulers=None).schedulers == ()  # type: ignore[arg-type]


def test_a_state_that_is_none_of_a_stepper_says_what_it_lacks() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "bf16-mixed")
    with pytest.raises(CheckpointError, match="lacks plan, loss_scale, applied, skipped, micro; give what"):
        stepper.load_state_dict(dict(model.state_dict()))


def test_a_plan_file_may_be_given_as_a_path(tmp_path: Path) -> None:
    model, path = make_mlp(), tmp_path / "mine.toml"
    Plan.preset("bf16-mixed").save(path)
    assert prepare(model, make_adamw(model), path).plan.name == "bf16-mixed"


@pytest.mark.parametrize("plan", ["rest=auto loss_scale=dynamic", "saved_budget=1GiB loss_scale=dynamic"])
def test_a_window_that_is_open_when_a_plan_is_chosen_goes_on(plan: str) -> None:
    batches, weights = make_regression_batches(2), []
    for later in (plan, ""):
        model = make_mlp()
        stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true", accumulate=2, profile=make_profile())
        train(stepper, batches[:1])
        if later:
            stepper.adopt(Plan.parse(later))
        assert train(stepper, batches[1:])[-1].applied
        assert stepper.scale == (65536.0 if later else 1.0)
        weights.append(copy_weights(model))
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value)


def test_adopting_a_plan_ends_the_wait_of_auto() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "auto", profile=make_profile())
    stepper.adopt(Plan.preset("bf16-mixed"), "asked for")
    train(stepper, make_regression_batches(1))
    assert stepper.plan.name == "bf16-mixed"
    assert stepper.plan_record is not None
    assert stepper.plan_record.why == "asked for"
    assert not stepper._in_force.is_waiting


# --- state


def test_state_round_trip_with_every_field_away_from_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_attention, "ROUTES", {})
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "16-mixed")
    fresh = stepper.state_dict()
    state: dict[str, Any] = {
        "plan": str(
            Plan.parse(
                "name=mine loss_scale=dynamic functions=fast\n"
                f"path='re:[0-3]' compute=fp32 storage=fp32 master=none why='by hand'\n{SPLIT}"
            )
        ),
        "loss_scale": {"scale": 8.0, "clean": 7, "overflows": 2},
        "recovery": {
            "step": 9,
            "skipped_at": (6, 7, 8),
            "failed_at": (7, 8),
            "skips": 3,
            "failures": 2,
            "clean": 4,
            "rate": 0.25,
            "actions": 1,
        },
        "masters": {"seed": 7, "steps": 6},
        "amaxes": {},
        "routes": [
            asdict(scaled_attention.Shape(6, 5, 4, 3, 2, "bfloat16", True, "bool[True]", 7)) | {"route": "kernel"}
        ],
        "chosen_for": "name=mine loss_scale=none rest=auto",
        "functions": ["cross_entropy", "dropout"],
        "applied": 5,
        "skipped": 3,
        "micro": 0,
        "window": None,
    }
    assert state.keys() == fresh.keys()
    assert state["recovery"].keys() == fresh["recovery"].keys()
    assert all(state[key] != fresh[key] for key in ("plan", "loss_scale", "recovery", "masters", "applied", "skipped"))
    stepper.load_state_dict(state)
    assert stepper.state_dict() == state
    assert (stepper.scale, stepper.applied, stepper.skipped) == (8.0, 5, 3)
    assert model[4].weight.dtype is torch.bfloat16
    assert model[0].weight.dtype is torch.float32


def test_state_of_a_waiting_auto_waits_again() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "auto", profile=make_profile("slower"))
    stepper.load_state_dict(stepper.state_dict())
    train(stepper, make_regression_batches(1))
    assert stepper.plan.name == "auto"


def test_state_that_was_saved_inside_a_window_without_its_gradients_is_refused() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "32-true", accumulate=2)
    train(stepper, make_regression_batches(1))
    state = stepper.state_dict() | {"window": None}
    assert state["micro"] == 1
    with pytest.raises(PlanError, match="after 1 micro-batches of a window, and without their gradients"):
        stepper.load_state_dict(state)


def test_state_of_a_longer_window_is_refused() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "32-true", accumulate=3)
    train(stepper, make_regression_batches(2))
    state = stepper.state_dict()
    shorter_model = make_mlp()
    shorter = prepare(shorter_model, make_adamw(shorter_model), "32-true", accumulate=2)
    with pytest.raises(PlanError, match="this stepper has accumulate=2"):
        shorter.load_state_dict(state)


@pytest.mark.parametrize("mode", ["32-true", "16-mixed", SPLIT, "bf16-true"])
@pytest.mark.parametrize("bad", [None, 1])
def test_resuming_in_the_middle_of_a_window_goes_on_bit_for_bit(mode: str, bad: int | None) -> None:
    batches = make_regression_batches(8)
    if bad is not None:
        batches[bad] = (batches[bad][0] * math.inf, batches[bad][1])
    models = [make_cnn(), make_cnn()]
    images = [
        (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) + x.sum(), y[:4])
        for i, (x, y) in enumerate(batches)
    ]
    straight = prepare(models[0], make_adamw(models[0]), mode, accumulate=4)
    expected = train(straight, images)
    first = prepare(models[1], make_adamw(models[1]), mode, accumulate=4)
    train(first, images[:3])
    state, weights, moments = first.state_dict(), copy_weights(models[1]), copy.deepcopy(first.optimizer.state_dict())
    fresh = make_cnn(seed=1)
    second = prepare(fresh, make_adamw(fresh), mode, accumulate=4)
    second.load_state_dict(copy.deepcopy(state))
    fresh.load_state_dict(weights)
    second.optimizer.load_state_dict(moments)
    assert train(second, images[3:])[-1].status == expected[-1].status
    assert_same(copy_weights(fresh), copy_weights(models[0]))
    assert second.skipped == straight.skipped == (0 if bad is None else 1)


@pytest.mark.parametrize("mode", [SPLIT, FP32_MASTER, FP16_MASTER])
def test_optimizer_states_of_a_narrow_model_stay_fp32_when_they_are_loaded(mode: str) -> None:
    model = make_mlp()
    optimizer = make_adamw(model)
    stepper = prepare(model, optimizer, mode)
    train(stepper, make_regression_batches(3))
    truth, saved = copy_weights(model), optimizer.state_dict()
    saved["state"] = {k: {n: v.clone() for n, v in state.items()} for k, state in saved["state"].items()}
    train(stepper, make_regression_batches(2))
    weights = copy_weights(model)
    optimizer.load_state_dict(saved)
    for number, state in optimizer.state_dict()["state"].items():
        assert state["exp_avg"].dtype is torch.float32
        assert_same(state, saved["state"][number])
    assert_same(copy_weights(model), weights)
    assert model[0].weight.dtype is not torch.float32
    assert not torch.equal(truth["0.weight"], weights["0.weight"])
    assert train(stepper, make_regression_batches(1))[0].applied


@pytest.mark.parametrize("mode", [SPLIT, FP32_MASTER])
def test_optimizer_state_that_does_not_fit_leaves_the_model_narrow(mode: str) -> None:
    model = make_mlp()
    optimizer = make_adamw(model)
    prepare(model, optimizer, mode)
    before = copy_weights(model)
    with pytest.raises(ValueError, match="parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_same(copy_weights(model), before)


@pytest.mark.parametrize("mode", MODES)
def test_restore_gives_the_model_back_in_fp32(mode: str) -> None:
    model = make_mlp()
    parameters = list(model.parameters())
    stepper = prepare(model, make_adamw(model, eps=1e-4), mode)
    train(stepper, make_regression_batches(2))
    truth = copy_weights(model)
    assert stepper.restore() is model
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert [type(module) for module in model.modules()] == [type(module) for module in make_mlp().modules()]
    assert_same({name: p.detach() for name, p in model.named_parameters()}, truth)


def test_restore_of_a_waiting_auto_takes_its_hook_away() -> None:
    model = make_mlp()
    prepare(model, make_adamw(model), "auto", profile=make_profile()).restore()
    assert not has_hooks(model)


# --- changing the plan


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(("32-true", "16-mixed", SPLIT), 2)))
def test_gradients_of_an_open_window_go_on_under_another_plan(before: str, after: str) -> None:
    models, batches = [make_mlp(), make_mlp()], make_regression_batches(4)
    steppers = [prepare(m, SGD(m.parameters(), lr=0.1), before, accumulate=4) for m in models]
    for stepper in steppers:
        train(stepper, batches[:3])
    steppers[0].adopt(read_plan(after))
    outcomes = [train(stepper, batches[3:])[0] for stepper in steppers]
    assert all(outcome.applied for outcome in outcomes)
    assert outcomes[0].gradient_norm == pytest.approx(outcomes[1].gradient_norm, rel=1e-2)
    for name, weight in copy_weights(models[0]).items():
        assert_near(weight, copy_weights(models[1])[name], torch.bfloat16)


@pytest.mark.parametrize("mode", ["32-true", "16-mixed", SPLIT])
def test_plan_that_is_refused_inside_a_window_leaves_it_as_it_is(mode: str) -> None:
    models, batches = [make_mlp(), make_mlp()], make_regression_batches(2)
    steppers = [prepare(m, SGD(m.parameters(), lr=0.1), mode, accumulate=2) for m in models]
    for stepper in steppers:
        train(stepper, batches[:1])
    with pytest.raises(PlanError, match="matches no module"):
        steppers[0].adopt(Plan.parse("path=nowhere compute=bf16"))
    for stepper in steppers:
        assert train(stepper, batches[1:])[0].applied
    assert_same(copy_weights(models[0]), copy_weights(models[1]))


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(TRUTHFUL, 2)))
def test_changing_the_plan_keeps_the_fp32_truth_and_the_optimizer_state_bit_for_bit(before: str, after: str) -> None:
    model = make_mlp()
    optimizer = make_adamw(model)
    stepper = prepare(model, optimizer, before, accumulate=2)
    train(stepper, make_regression_batches(4))
    truth = copy_weights(model)
    states = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    stepper.adopt(Plan.parse(after), "for a reason")
    assert_same(copy_weights(model), truth)
    for parameter, state in states.items():
        assert_same(optimizer.state[parameter], state)
    assert stepper.plan_record is not None
    assert (stepper.plan_record.step, stepper.plan_record.why) == (stepper.applied, "for a reason")
    assert train(stepper, make_regression_batches(2))[-1].applied
    assert stepper.scale == (65536.0 if after == "16-mixed" else 1.0)


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize(
    ("before", "after"), [("bf16-true", "32-true"), ("32-true", "bf16-true"), (SPLIT, NO_MASTER), (NO_MASTER, SPLIT)]
)
def test_training_goes_on_when_the_plan_changes_to_or_from_one_without_a_truth(
    before: str, after: str, kind: Callable[..., Optimizer]
) -> None:
    model = make_mlp()
    options = {"momentum": 0.9} if kind is SGD else {}
    stepper = prepare(model, kind(model.parameters(), lr=0.01, **options), before)
    train(stepper, make_regression_batches(2))
    stepper.adopt(Plan.parse(after))
    assert [outcome.status for outcome in train(stepper, make_regression_batches(2))] == ["applied"] * 2


@pytest.mark.parametrize("bad", ["compute=fp8_e4m3", "path=nowhere compute=fp32", "16-true"])
@pytest.mark.parametrize("before", ["32-true", SPLIT])
def test_plan_that_is_refused_leaves_the_one_before_in_force(before: str, bad: str) -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), before)
    train(stepper, make_regression_batches(2))
    truth, record = copy_weights(model), stepper.plan_record
    with pytest.raises((PlanError, UnsupportedError)):
        stepper.adopt(Plan.parse(bad))
    assert str(stepper.plan) == str(Plan.parse(before))
    assert stepper.plan_record is record
    assert_same(copy_weights(model), truth)
    assert model[0].weight.dtype is (torch.bfloat16 if before == SPLIT else torch.float32)
    assert train(stepper, make_regression_batches(1))[0].applied


def test_weights_trained_under_several_plans_are_those_of_the_plans_in_turn() -> None:
    def train_apart(plans: Sequence[str]) -> dict[str, Tensor]:
        model = make_mlp()
        optimizer = make_adamw(model)
        for plan, batch in zip(plans, make_regression_batches(len(plans)), strict=True):
            stepper = prepare(model, optimizer, plan)
            train(stepper, [batch])
            stepper.restore()
        return copy_weights(model)

    plans = ["32-true", SPLIT, "bf16-mixed", FP32_MASTER, SPLIT]
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), plans[0])
    for plan, batch in zip(plans, make_regression_batches(len(plans)), strict=True):
        stepper.adopt(Plan.parse(plan))
        train(stepper, [batch])
    assert_same(copy_weights(model), train_apart(plans))


def test_restored_model_and_optimizer_go_on_without_the_stepper() -> None:
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    stepper = prepare(model, optimizer, "bf16-true")
    x, y = make_regression_batches(1)[0]
    with stepper.autocast():
        loss = nn.functional.mse_loss(stepper.model(x), y)
    stepper.step(loss)
    stepper.restore()
    with stepper.autocast():
        assert model(x).dtype is torch.float32
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_loading_a_state_empties_the_window() -> None:
    model = make_mlp()
    stepper = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), "bf16-mixed", accumulate=2)
    saved = stepper.state_dict()
    x, y = make_regression_batches(1)[0]
    with stepper.autocast():
        losses = [nn.functional.mse_loss(model(x), y) for _ in range(2)]
    stepper.step(losses[0])
    stepper.load_state_dict(saved)
    assert all(p.grad is None for p in model.parameters())
    assert stepper.step(losses[1]).status == "accumulated"


# --- a skipped step leaves no trace


def make_images(count: int, *, bad: Iterable[int] = ()) -> list[Batch]:
    """Images for make_cnn and targets; those in `bad` are NaN."""
    with seeded(3):
        batches = [(torch.randn(4, 3, 8, 8), torch.randn(4, 3)) for _ in range(count)]
    return [(x * math.nan, y) if number in bad else (x, y) for number, (x, y) in enumerate(batches)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_run_with_bad_batches_equals_one_that_never_saw_them(mode: str, accumulate: int) -> None:
    bad = {3, 8}
    windows = [range(i, i + accumulate) for i in range(0, 12, accumulate)]
    good = [number for window in windows if not bad & set(window) for number in window]
    states = []
    for batches in (make_images(12, bad=bad), [make_images(12)[number] for number in good]):
        model = make_cnn()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimizer = make_adamw(model, eps=1e-4)
        schedule = CosineAnnealingLR(optimizer, 20)
        stepper = prepare(model, optimizer, mode, accumulate=accumulate, schedulers=schedule, averages=average)
        stepper._scale = LossScale(scale=8.0) if stepper.plan.loss_scale == "dynamic" else stepper._scale
        stepper._rule = UNSCALED
        train(stepper, batches)
        states.append((copy_weights(model), copy_weights(average), optimizer.state_dict(), schedule.state_dict()))
    assert_same(states[0][0], states[1][0])
    assert_same(states[0][1], states[1][1])
    torch.testing.assert_close(states[0][2], states[1][2], rtol=0, atol=0)
    assert states[0][3] == states[1][3]


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", SPLIT, "bf16-true"])
@pytest.mark.parametrize(("path", "layer"), [("0", "0"), ("2", "2")])
def test_skip_names_the_layer_where_the_forward_pass_went_wrong(mode: str, path: str, layer: str) -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), mode)
    with torch.no_grad():
        model.get_parameter(f"{path}.weight").fill_(math.inf)
    outcome = train(stepper, make_regression_batches(1))[0]
    assert (outcome.status, outcome.layer, outcome.forward_nonfinite) == ("skipped", layer, True)
    assert f"first in the output of '{layer}'" in outcome.cause


def test_loss_function_that_fails_on_finite_outputs_names_no_layer() -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true")
    outcome = stepper.step((model(torch.ones(2, 8)).sum() * 0).log())
    assert (outcome.layer, outcome.forward_nonfinite, outcome.cause) == (
        "",
        True,
        "the loss is -inf, though every output of the model is finite",
    )


def test_looking_for_the_guilty_layer_draws_no_random_numbers() -> None:
    model = nn.Sequential(make_mlp(), nn.Dropout())
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true")
    torch.manual_seed(5)
    loss = model(torch.full((2, 8), math.nan)).sum()
    expected = torch.get_rng_state()
    stepper.step(loss)
    assert torch.equal(torch.get_rng_state(), expected)


def test_error_in_backward_drops_the_window_and_leaves_everything_as_before_it() -> None:
    """As running out of memory does."""
    models = [make_cnn(), make_cnn()]
    batches = make_images(6)
    broken, whole = (prepare(m, make_adamw(m), SPLIT, accumulate=2) for m in models)
    train(broken, batches[:3])
    handle = models[0].get_parameter("3.weight").register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(broken, batches[3:4])
    handle.remove()
    train(broken, batches[4:])
    train(whole, batches[:2] + batches[4:])
    assert_same(copy_weights(models[0]), copy_weights(models[1]))
    assert (broken.applied, broken.skipped) == (2, 0)


# --- windows, several optimizers, averages


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "16-mixed", SPLIT])
def test_flush_applies_the_mean_of_what_is_in(mode: str) -> None:
    batches = make_regression_batches(5)
    models = [make_mlp(), make_mlp()]
    partial = prepare(models[0], SGD(models[0].parameters(), lr=0.1), mode, accumulate=4)
    train(partial, batches[:2])
    outcome = partial.flush()
    assert outcome is not None
    assert outcome.applied
    full = prepare(models[1], SGD(models[1].parameters(), lr=0.1), mode, accumulate=2)
    expected = train(full, batches[:2])[-1]
    assert outcome.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-6)
    for name, weight in copy_weights(models[0]).items():
        torch.testing.assert_close(weight, copy_weights(models[1])[name], rtol=1e-6, atol=1e-7)
    assert partial.flush() is None


@pytest.mark.parametrize("mode", ["32-true", SPLIT])
def test_several_optimizers_share_one_step(mode: str) -> None:
    models = [make_mlp(), make_mlp()]
    matrices, vectors = ([p for p in models[0].parameters() if p.ndim == n] for n in (2, 1))
    both = prepare(models[0], [SGD(matrices, lr=0.1), SGD(vectors, lr=0.2)], mode, clip=0.5)
    groups = [
        {"params": [p for p in models[1].parameters() if p.ndim == n], "lr": lr} for n, lr in ((2, 0.1), (1, 0.2))
    ]
    one = prepare(models[1], SGD(groups), mode, clip=0.5)
    batches = make_regression_batches(6)
    norms = [[outcome.gradient_norm for outcome in train(stepper, batches)] for stepper in (both, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for name, weight in copy_weights(models[0]).items():
        torch.testing.assert_close(weight, copy_weights(models[1])[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="two optimizers hold the same parameter"):
        both.restore()
        prepare(models[0], [SGD(matrices, lr=0.1), SGD(models[0].parameters(), lr=0.1)], "32-true")


@pytest.mark.parametrize("mode", ["32-true", "16-mixed", SPLIT])
def test_two_models_trained_against_each_other_keep_their_gradients_apart(mode: str) -> None:
    """As the GAN of every tutorial; the same by hand with zero_grad in the right places."""
    generators, critics = (
        [make_mlp(1), make_mlp(1)],
        [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(2)],
    )
    critics[1].load_state_dict(critics[0].state_dict())
    batches = make_regression_batches(6)
    g = prepare(generators[0], SGD(generators[0].parameters(), lr=0.05), mode)
    c = prepare(critics[0], SGD(critics[0].parameters(), lr=0.05), mode)
    for stepper in (g, c):
        stepper._scale = replace(stepper._scale, scale=min(stepper.scale, 256.0))  # of a mean over few numbers
    for x, real in batches:
        with g.autocast(), c.autocast():
            fake = g.model(x).detach()
            loss = critics[0](fake).float().mean() - critics[0](real).float().mean()
        assert c.step(loss).applied
        with g.autocast(), c.autocast():
            loss = -c.model(g.model(x)).float().mean()
        assert g.step(loss).applied
        assert all(p.grad is None for p in critics[0].parameters())
    if mode != "32-true":
        return
    optimizers = [SGD(generators[1].parameters(), lr=0.05), SGD(critics[1].parameters(), lr=0.05)]
    for x, real in batches:
        optimizers[1].zero_grad()
        (critics[1](generators[1](x).detach()).mean() - critics[1](real).mean()).backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        (-critics[1](generators[1](x)).mean()).backward()
        optimizers[0].step()
    assert_same(copy_weights(generators[0]), copy_weights(generators[1]))
    assert_same(copy_weights(critics[0]), copy_weights(critics[1]))


def test_gradient_penalty_under_a_loss_scale_equals_fp32() -> None:
    models = [make_mlp(), make_mlp()]
    steppers = [
        prepare(m, SGD(m.parameters(), lr=0.05), mode) for m, mode in zip(models, ("32-true", "16-mixed"), strict=True)
    ]
    for x, y in make_regression_batches(5):
        for stepper in steppers:
            with stepper.autocast():
                loss = F.mse_loss(stepper.model(x).float(), y)
            grads = torch.autograd.grad(loss * stepper.scale, list(stepper.model.parameters()), create_graph=True)
            penalty = sum((g / stepper.scale).square().sum() for g in grads)
            assert stepper.step(loss + 0.1 * penalty).applied
    for name, weight in copy_weights(models[1]).items():
        assert_near(weight, copy_weights(models[0])[name], torch.float16, scale=10)


def test_average_is_taken_from_the_full_precision() -> None:
    model = make_mlp()
    average = AveragedModel(model)
    stepper = prepare(model, SGD(model.parameters(), lr=1e-3), SPLIT, averages=average)
    weights = []
    for batch in make_regression_batches(4):
        train(stepper, [batch])
        weights.append(copy_weights(model)["0.weight"])
    torch.testing.assert_close(
        average.module.get_parameter("0.weight"), torch.stack(weights).mean(0), rtol=1e-6, atol=1e-7
    )
    assert model[0].weight.dtype is torch.bfloat16


def test_average_of_a_converted_model_is_refused_and_of_a_prepared_one_full_precision() -> None:
    model, converted, other = make_mlp(), make_mlp(), make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), SPLIT)
    assert all(p.dtype is torch.float32 for p in AveragedModel(stepper.model).parameters())
    convert(converted, Plan.parse(SPLIT))
    average = AveragedModel(converted)
    with pytest.raises(ModelError, match="make it before"):
        prepare(other, SGD(other.parameters(), lr=0.1), "32-true", averages=average)


# --- closures


def test_average_of_another_model_is_refused_and_one_of_this_model_is_not() -> None:
    model, other = make_mlp(), nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelError, match=r"is of another model: '2.weight' has shape none there and \(16, 16\) here"):
        prepare(model, optimizer, "32-true", averages=[AveragedModel(model), AveragedModel(nn.Sequential(other[0]))])
    with pytest.raises(ModelError, match=r"'1.weight' has shape \(3, 16\) there and none here"):
        prepare(nn.Sequential(other[0]), SGD(other.parameters(), lr=0.1), "32-true", averages=AveragedModel(other))
    assert prepare(model, optimizer, "32-true", averages=AveragedModel(model)).accumulate == 1


def test_schedule_of_another_optimizer_is_refused() -> None:
    model = make_mlp()
    own, other = SGD(model.parameters(), lr=0.1), SGD(make_mlp().parameters(), lr=0.2)
    with pytest.raises(ModelError, match=r"StepLR schedules SGD with lr=0.2, which is none of the optimizers given"):
        prepare(model, own, "32-true", schedulers=[StepLR(own, 1), StepLR(other, 1)])
    with pytest.raises(ModelError, match="SequentialLR schedules SGD"):
        others: list[LRScheduler] = [StepLR(other, 1), StepLR(other, 2)]
        prepare(model, own, "32-true", schedulers=SequentialLR(other, others, milestones=[2]))
    steps: list[LRScheduler] = [StepLR(own, 1), StepLR(own, 2)]
    assert prepare(model, own, "32-true", schedulers=ChainedScheduler(steps)).schedulers


class SAM(Optimizer):
    """Foret et al. 2021: step to where the loss is worst nearby, take the gradient there, come back, step with it."""

    def __init__(self, params: Any, base: type[Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> float:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"]]
        length = torch.stack([p.grad.norm() for p in held]).norm()
        moved = [p.grad * (self.param_groups[0]["rho"] / length) for p in held]
        for p, way in zip(held, moved, strict=True):
            p.add_(way)
        with torch.enable_grad():
            loss: float = closure()
        for p, way in zip(held, moved, strict=True):
            p.sub_(way)
        self.base.step()
        return loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_trains_through_a_closure(mode: str, search: str | None) -> None:
    model, (x, y) = make_mlp(), make_regression_batches(1)[0]
    stepper = prepare(model, LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn=search), mode)
    losses: list[float] = []

    def closure() -> Tensor:
        loss = F.mse_loss(stepper.model(x).float(), y)
        losses.append(loss.item())
        return loss

    outcomes = [stepper.step(closure=closure) for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]
    assert sum(outcome.applied for outcome in outcomes) >= 4
    assert stepper.applied == sum(outcome.applied for outcome in outcomes)


def test_lbfgs_in_32_true_equals_a_loop_written_by_hand_bit_for_bit() -> None:
    models, (x, y) = [make_mlp(), make_mlp()], make_regression_batches(1)[0]
    ours, theirs = (LBFGS(m.parameters(), max_iter=5, line_search_fn="strong_wolfe") for m in models)
    stepper = prepare(models[0], ours, "32-true")

    def by_hand() -> Tensor:
        theirs.zero_grad()
        loss = F.mse_loss(models[1](x), y)
        loss.backward()
        return loss

    for _ in range(4):
        assert stepper.step(closure=lambda: F.mse_loss(models[0](x), y)).applied
        theirs.step(by_hand)
    assert_same(copy_weights(models[0]), copy_weights(models[1]))


@pytest.mark.parametrize("mode", ["32-true", "16-mixed", SPLIT, NO_MASTER])
@pytest.mark.parametrize("bad", [1, 3])
def test_one_bad_evaluation_undoes_the_whole_step(mode: str, bad: int) -> None:
    model, (x, y) = make_mlp(), make_regression_batches(1)[0]
    stepper = prepare(model, LBFGS(model.parameters(), lr=0.5, max_iter=4), mode)
    assert stepper.step(closure=lambda: F.mse_loss(stepper.model(x).float(), y)).applied
    before, state = copy_weights(model), copy.deepcopy(stepper.optimizer.state_dict())
    calls = itertools.count(1)

    def closure() -> Tensor:
        return F.mse_loss(stepper.model(x * (math.nan if next(calls) == bad else 1.0)).float(), y)

    outcome = stepper.step(closure=closure)
    assert (outcome.status, outcome.forward_nonfinite) == ("skipped", True)
    assert_same(copy_weights(model), before)
    torch.testing.assert_close(stepper.optimizer.state_dict(), state, rtol=0, atol=0)
    assert stepper.step(closure=lambda: F.mse_loss(stepper.model(x).float(), y)).applied


class Again(SGD):
    """Evaluates its closure twice and keeps the second gradient."""

    def step(self, closure: Any = None) -> Any:
        closure()
        loss = closure()
        super().step()
        return loss


def test_bad_evaluation_before_a_good_one_undoes_the_step_too() -> None:
    model, (x, y), calls = make_mlp(), make_regression_batches(1)[0], itertools.count(1)
    stepper, before = prepare(model, Again(model.parameters(), lr=0.1), "32-true"), copy_weights(model)
    assert stepper.step(closure=lambda: F.mse_loss(model(x), y * (math.nan if next(calls) == 1 else 1.0))).skipped
    assert next(calls) == 2
    assert_same(copy_weights(model), before)


@pytest.mark.parametrize("mode", ["32-true", SPLIT])
def test_gradients_of_a_closure_are_clipped(mode: str) -> None:
    model, (x, y) = make_mlp(), make_regression_batches(1)[0]
    stepper, before = prepare(model, Again(model.parameters(), lr=1.0), mode, clip=1e-3), copy_weights(model)
    outcome = stepper.step(closure=lambda: F.mse_loss(stepper.model(x).float(), y))
    assert outcome.gradient_norm is not None and outcome.gradient_norm > 0.01
    moved = [copy_weights(model)[name] - weight for name, weight in before.items()]
    assert math.hypot(*(float(way.norm()) for way in moved)) == pytest.approx(1e-3, rel=1e-2)


def test_error_inside_a_closure_undoes_the_step_and_is_raised() -> None:
    model = make_mlp()
    stepper = prepare(model, LBFGS(model.parameters()), SPLIT)
    before = copy_weights(model)

    def closure() -> Tensor:
        with torch.no_grad():
            model.get_parameter("0.bias").add_(1.0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stepper.step(closure=closure)
    assert_same(copy_weights(model), before)
    assert model[0].weight.dtype is torch.bfloat16


@pytest.mark.parametrize("mode", ["32-true", "16-mixed", SPLIT])
def test_sam_starts_from_the_gradient_of_the_loss(mode: str) -> None:
    models, batches = [make_mlp(), make_mlp()], make_regression_batches(5)
    stepper = prepare(models[0], SAM(models[0].parameters(), SGD, lr=0.1), mode)
    by_hand = SAM(models[1].parameters(), SGD, lr=0.1)
    for x, y in batches:
        with stepper.autocast():
            loss = F.mse_loss(stepper.model(x).float(), y)
        assert stepper.step(loss, closure=lambda x=x, y=y: F.mse_loss(stepper.model(x).float(), y)).applied  # type: ignore[misc]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            by_hand.zero_grad()
            loss = F.mse_loss(models[1](x), y)
            loss.backward()
            return loss

        closure()
        by_hand.step(closure)
    dtype = {"32-true": torch.float32, "16-mixed": torch.float16, SPLIT: torch.bfloat16}[mode]
    for name, weight in copy_weights(models[0]).items():
        assert_near(weight, copy_weights(models[1])[name], dtype, scale=5)


def test_lbfgs_without_a_closure_and_a_closure_in_a_window_say_what_to_do() -> None:
    model = make_mlp()
    stepper = prepare(model, LBFGS(model.parameters()), "32-true")
    with pytest.raises(ModelError, match=r"call step\(closure=f\)"):
        train(stepper, make_regression_batches(1))
    stepper.restore()
    window = prepare(model, SGD(model.parameters(), lr=0.1), "32-true", accumulate=2)
    with pytest.raises(ModelError, match="accumulate=1"):
        window.step(closure=lambda: model(torch.ones(1, 8)).sum())


def test_lbfgs_in_a_window_or_beside_another_optimizer_is_refused_by_prepare() -> None:
    model = make_mlp()
    with pytest.raises(ModelError, match=r"takes one optimizer and accumulate=1.*; got 1 and accumulate=2"):
        prepare(model, LBFGS(model.parameters()), "32-true", accumulate=2)
    halves = LBFGS(model[0].parameters()), SGD(model[2].parameters(), lr=0.1)
    with pytest.raises(ModelError, match="got 2 and accumulate=1"):
        prepare(model, halves, "32-true")


# --- recovery


def test_fifty_skips_in_a_row_end_the_run_with_a_report_and_good_weights() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "bf16-mixed")
    train(stepper, make_regression_batches(3))
    before = copy_weights(model)
    x, y = make_regression_batches(1)[0]
    with pytest.raises(
        TrainingError, match=r"50 steps in a row were skipped; the last: the loss is nan: so is the input"
    ):
        train(stepper, [(x * math.nan, y)] * 60)
    assert stepper.skipped == 50
    assert stepper.outcome is not None
    assert stepper.outcome.recovery.startswith("stop: ")
    assert_same(copy_weights(model), before)
    stepper.recovery_rule = replace(stepper.recovery_rule, limit=1000)
    assert train(stepper, make_regression_batches(1))[0].applied


@pytest.mark.parametrize("mode", ["32-true", SPLIT, "16-mixed"])
def test_roll_back_returns_to_the_last_good_state(mode: str) -> None:
    model = make_cnn()
    optimizer = make_adamw(model)
    schedule = StepLR(optimizer, 2, gamma=0.5)
    plan = replace(read_plan(mode), recovery="roll-back")
    stepper = prepare(model, optimizer, plan, schedulers=schedule)
    stepper.recovery_rule = replace(stepper.recovery_rule, every=4)
    batches = [(x, y * math.nan) if number in (7, 8, 9) else (x, y) for number, (x, y) in enumerate(make_images(12))]
    stepper._scale = replace(stepper._scale, scale=min(stepper.scale, 256.0))
    train(stepper, batches[:4])
    kept = copy_weights(model), copy.deepcopy(optimizer.state_dict()), schedule.state_dict()
    train(stepper, batches[4:7])
    assert stepper.applied == 7
    outcomes = train(stepper, batches[7:10])
    assert [bool(outcome.recovery) for outcome in outcomes] == [False, False, True]
    assert outcomes[-1].recovery.endswith("from applied step 7 to 4")
    assert stepper.applied == outcomes[-1].step == 4
    assert_same(copy_weights(model), kept[0])
    torch.testing.assert_close(optimizer.state_dict(), kept[1], rtol=0, atol=0)
    assert schedule.state_dict() == kept[2]
    assert all(outcome.applied for outcome in train(stepper, batches[10:]))


def test_back_off_halves_the_learning_rate_and_gives_it_back() -> None:
    model = make_mlp()
    optimizer = SGD(model.parameters(), lr=0.25)
    schedule = StepLR(optimizer, 1000)
    stepper = prepare(model, optimizer, replace(Plan.preset("32-true"), recovery="back-off"), schedulers=schedule)
    stepper.recovery_rule = replace(stepper.recovery_rule, interval=3)
    (x, y), *good = make_regression_batches(6)

    def find_rate(batch: Batch) -> float:
        before = copy_weights(model)["4.bias"]
        gradient = torch.autograd.grad(F.mse_loss(model(batch[0]), batch[1]), list(model.parameters()))[-1]
        train(stepper, [batch])
        return float(((before - copy_weights(model)["4.bias"]) / gradient).median())

    assert find_rate(good[0]) == pytest.approx(0.25, rel=1e-3)
    assert train(stepper, [(x, y * math.inf)] * 3)[-1].recovery.endswith("multiplied by 0.5")
    rates = [find_rate(batch) for batch in good[1:]]
    assert rates == pytest.approx([0.125, 0.125, 0.125, 0.25], rel=1e-3)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_roll_back_ends_a_divergence_by_a_learning_rate_that_is_small_enough() -> None:
    model, batches = make_mlp(), make_regression_batches(400)
    stepper = prepare(model, SGD(model.parameters(), lr=64.0), "32-true", recovery="roll-back")
    outcomes = train(stepper, batches)
    told = [outcome.recovery for outcome in outcomes if outcome.recovery]
    assert 3 <= len(told) < 12
    assert "learning rates are now multiplied by 0.125; from applied step" in told[2]
    assert all(outcome.applied for outcome in outcomes[-50:])
    assert all(bool(torch.isfinite(value).all()) for value in copy_weights(model).values())


@pytest.mark.parametrize("mode", ["32-true", SPLIT])
def test_run_at_a_reduced_rate_resumes_bit_for_bit(mode: str) -> None:
    models, (bad, *batches) = [make_mlp(), make_mlp()], make_regression_batches(12)
    steppers = [prepare(m, make_adamw(m), mode, recovery="back-off") for m in models]
    first, second = steppers
    for stepper in steppers:
        stepper.recovery_rule = replace(stepper.recovery_rule, interval=6)
    train(first, [batches[0], *[(bad[0], bad[1] * math.nan)] * 3, *batches[1:4]])
    tensors: dict[str, Tensor] = {}
    parts = (first.state_dict(), models[0].state_dict(), first.optimizer.state_dict())
    state, weights, optimizer = unpack(pack(parts, tensors), tensors)
    second.load_state_dict(state)
    models[1].load_state_dict(weights)
    second.optimizer.load_state_dict(optimizer)
    rates = []
    for batch in batches[4:]:
        for stepper in steppers:
            train(stepper, [batch])
        rates.append(second._rescue.rate)
        assert_same(copy_weights(models[1]), copy_weights(models[0]))
    assert rates == [0.5, 0.5] + [1.0] * 5


def test_policy_that_prepare_is_given_goes_before_that_of_the_plan() -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "auto", profile=make_profile("slower"), recovery="widen")
    train(stepper, make_regression_batches(1))
    assert stepper.recovery_rule.policy == stepper.plan.recovery == "widen"
    stepper.adopt(replace(Plan.preset("bf16-mixed"), recovery="stop"))
    assert stepper.recovery_rule.policy == "widen"
    stepper.restore()
    with pytest.raises(PlanError, match="unknown recovery 'rollback'; did you mean 'roll-back'"):
        prepare(model, SGD(model.parameters(), lr=0.1), "32-true", recovery="rollback")


def test_widen_puts_the_layer_that_overflows_into_fp32() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    with torch.no_grad():
        model.get_parameter("1.weight").fill_(2.0**14)  # fp16 ends at 65504
        model.get_parameter("2.weight").mul_(2.0**-14)
    plan = replace(Plan.preset("16-mixed"), recovery="widen")
    stepper = prepare(model, SGD(model.parameters(), lr=1e-30), plan)
    outcomes = train(stepper, [(torch.full((16, 8), 32.0), torch.zeros(16, 3))] * 20)
    recoveries = [outcome.recovery for outcome in outcomes if outcome.recovery]
    assert [recovery.rpartition("; ")[2] for recovery in recoveries] == ["now in fp32: 1", "now in fp32: 2"]
    assert [stepper.conversion.table[path].compute for path in "012"] == ["fp16", "fp32", "fp32"]
    assert outcomes[-1].applied
    assert stepper.plan_record is not None
    assert stepper.plan_record.why.startswith("widened: 3 steps in a row failed as no loss scale can mend")
    assert Plan.parse(stepper.plan_record.plan) == stepper.plan


def test_widen_of_what_is_fp32_already_ends_the_run() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), replace(Plan.preset("32-true"), recovery="widen"))
    poison(model[2].weight, math.nan)
    with pytest.raises(TrainingError, match="it cannot be widened: '2' runs in fp32 already"):
        train(stepper, make_regression_batches(5))


def test_policy_of_the_plan_is_in_force_after_resume() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), replace(Plan.preset("bf16-mixed"), recovery="stop"))
    state = stepper.state_dict()
    fresh_model = make_mlp()
    fresh = prepare(fresh_model, make_adamw(fresh_model), "32-true")
    fresh.load_state_dict(state)
    x, y = make_regression_batches(1)[0]
    with pytest.raises(TrainingError, match="the loss is nan"):
        train(fresh, [(x * math.nan, y)])


# --- optimizer states in 8 bits, gradient release, stalls


def make_wide(seed: int = 0) -> nn.Sequential:
    """Large enough for 8-bit states: 8 numbers in, 3 out."""
    with seeded(seed):
        return nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 16), nn.Linear(16, 3))


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", SPLIT, NO_MASTER])
@pytest.mark.parametrize("fused", [False, True])
def test_states_in_8_bits_train_as_fp32_states_do(mode: str, fused: bool) -> None:
    losses = []
    for states in ("fp32", "8-bit"):
        model = make_wide()
        stepper = prepare(model, make_adamw(model, lr=3e-3, fused=fused), replace(read_plan(mode), states=states))
        train(stepper, make_regression_batches(60))
        held = [v for state in stepper.optimizer.state.values() for v in state.values()]
        assert any(isinstance(value, Quantized) for value in held) == (states == "8-bit" and mode != NO_MASTER)
        with torch.no_grad(), stepper.autocast():
            losses.append(sum(F.mse_loss(model(x).float(), y).item() for x, y in make_regression_batches(4)))
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.01)


def test_states_in_8_bits_resume_bit_for_bit_and_can_be_left() -> None:
    batches = make_regression_batches(12)
    models = [make_wide(), make_wide(1)]
    plan = replace(read_plan(SPLIT), states="8-bit")
    straight = prepare(models[0], make_adamw(models[0]), plan)
    train(straight, batches[:6])
    saved = copy.deepcopy((straight.state_dict(), copy_weights(models[0]), straight.optimizer.state_dict()))
    train(straight, batches[6:])
    fresh = prepare(models[1], make_adamw(models[1]), "32-true")
    fresh.load_state_dict(saved[0])
    models[1].load_state_dict(saved[1])
    fresh.optimizer.load_state_dict(saved[2])
    train(fresh, batches[6:])
    assert_same(copy_weights(models[0]), copy_weights(models[1]))
    fresh.adopt(read_plan(SPLIT))
    assert not any(isinstance(v, Quantized) for state in fresh.optimizer.state.values() for v in state.values())
    assert train(fresh, batches[:1])[0].applied


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", SPLIT, "bf16-true"])
def test_release_in_the_backward_pass_gives_the_same_weights(mode: str) -> None:
    models = [make_wide(), make_wide()]
    steppers = [
        prepare(m, make_adamw(m), mode, release=release) for m, release in zip(models, (False, True), strict=True)
    ]
    outcomes = [train(stepper, make_regression_batches(8)) for stepper in steppers]
    assert_same(copy_weights(models[0]), copy_weights(models[1]))
    assert [o.applied for o in outcomes[1]] == [True] * 8
    norms = [[o.gradient_norm for o in one] for one in outcomes]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_release_never_holds_two_gradients() -> None:
    model = make_wide()
    stepper = prepare(model, make_adamw(model), SPLIT, release=True)
    alive: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    train(stepper, make_regression_batches(2))
    assert len(alive) == 12
    assert max(alive) <= 1


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", SPLIT])
def test_saved_and_release_work_together(mode: str) -> None:
    """Activations in 8 bits, and no two gradients at a time: the steps are those of the same format without release."""
    batches = [
        (torch.randn(4096, 8, generator=torch.Generator().manual_seed(i)), torch.zeros(4096, 3)) for i in range(4)
    ]
    found = []
    for saved, release in (("int8", True), ("int8", False), (None, False)):
        model = make_wide()
        stepper = prepare(model, make_adamw(model), mode, saved=saved, release=release)
        assert all(outcome.applied for outcome in train(stepper, batches))
        keeper = stepper.conversion.keeper
        found.append(
            (
                copy_weights(model),
                {} if keeper is None else {r.format: r.kept / r.bytes for r in keeper.records if r.format and r.bytes},
            )
        )
    assert_same(found[0][0], found[1][0])
    assert found[0][1]["int8"] < 0.53 and not found[2][1]
    rounded, exact = (torch.cat([w.float().flatten() for w in found[i][0].values()]) for i in (0, 2))
    moved = exact - torch.cat([p.detach().flatten() for p in make_wide().parameters()])
    assert 0 < (rounded - exact).norm() < 0.2 * moved.norm()


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", SPLIT])
def test_states_saved_and_release_work_together_and_resume(mode: str) -> None:
    """The steps are those without release, to the bit, also after they were saved and loaded in the middle."""
    batches = [
        (torch.randn(4096, 8, generator=torch.Generator().manual_seed(i)), torch.zeros(4096, 3)) for i in range(6)
    ]
    models = [make_wide(), make_wide(), make_wide(1)]
    steppers = [
        prepare(m, make_adamw(m, fused=True), mode, saved="int8", states="8-bit", release=release)
        for m, release in zip(models, (True, False, True), strict=True)
    ]
    for stepper in steppers:
        assert stepper.plan_record is not None and stepper.plan_record.updates == (f"AdamW: {KERNELS.way}",)
    assert all(outcome.applied for stepper in steppers[:2] for outcome in train(stepper, batches[:3]))
    assert any(isinstance(v, Quantized) for state in steppers[0].optimizer.state.values() for v in state.values())
    saved = copy.deepcopy((steppers[0].state_dict(), copy_weights(models[0]), steppers[0].optimizer.state_dict()))
    steppers[2].load_state_dict(saved[0])
    models[2].load_state_dict(saved[1])
    steppers[2].optimizer.load_state_dict(saved[2])
    for stepper in steppers:
        train(stepper, batches[3:])
    assert_same(copy_weights(models[0]), copy_weights(models[1]))
    assert_same(copy_weights(models[0]), copy_weights(models[2]))


def test_states_are_said_of_whatever_plan_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    take_plan(monkeypatch, SPLIT)
    model = make_wide()
    stepper = prepare(
        model, SGD(model.parameters(), lr=0.1, momentum=0.9), "auto", states="8-bit", profile=make_profile()
    )
    train(stepper, make_regression_batches(1))
    assert stepper.plan.states == "8-bit" and stepper.plan_record is not None
    assert "momentum in 8 bits has no kernel" in stepper.plan_record.updates[0]
    stepper.adopt(Plan.preset("32-true"))
    assert stepper.plan.states == "8-bit"
    other = make_wide()
    with pytest.raises(PlanError, match="8-bit"):
        prepare(other, make_adamw(other), "auto", states="9-bit")


def test_saved_is_for_what_no_rule_speaks_of_and_outlives_another_plan() -> None:
    model = make_wide()
    stepper = prepare(model, make_adamw(model), "path=2 saved=fp32\ncompute=bf16", saved="int8")
    assert [stepper.conversion.table[path].saved for path in ("0", "2")] == ["int8", "fp32"]
    stepper.adopt(stepper.plan)
    assert str(stepper.plan).count("saved=int8") == 1  # not once more each time
    stepper.adopt(Plan.preset("32-true"))
    assert stepper.conversion.table["2"].saved == "int8"


def test_saved_is_said_of_the_plan_that_auto_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(plan=Plan.parse("compute=bf16 storage=bf16 master=split"), why="as told", seconds=0.0)
    monkeypatch.setattr(plan_in_force, "choose_plan", lambda *_, **__: choice)
    monkeypatch.setattr(plan_in_force, "get_profile", lambda _: None)
    model = make_wide()
    stepper = prepare(model, make_adamw(model), "auto", saved="int8", release=True)
    train(stepper, [(torch.randn(4096, 8), torch.zeros(4096, 3))])
    keeper = stepper.conversion.keeper
    assert keeper is not None and any(r.format == "int8" for r in keeper.records)  # of the first batch already


@pytest.mark.parametrize(("saved", "error"), [("int9", FormatError), ("fp8_e4m3", PlanError)])
def test_a_saved_format_that_there_is_not_is_refused_at_once(saved: str, error: type[Exception]) -> None:
    model = make_wide()
    with pytest.raises(error, match="int8"):
        prepare(model, make_adamw(model), "auto", saved=saved)


def test_a_saved_format_beside_a_budget_is_refused() -> None:
    model = make_wide()
    with pytest.raises(PlanError, match=r"saved='bf16' and the plan's saved_budget='400KiB'.*give one of them"):
        prepare(model, make_adamw(model), Plan(saved_budget="400KiB"), saved="bf16")


def test_release_leaves_out_a_gradient_that_is_not_finite_and_skips_a_loss_that_is_not() -> None:
    model = make_wide()
    stepper = prepare(model, make_adamw(model), "bf16-mixed", release=True)
    handle = poison(model[2].weight, math.inf)
    before = copy_weights(model)
    outcome = train(stepper, make_regression_batches(1))[0]
    assert (outcome.status, outcome.tensors) == ("applied", ("2.weight",))
    after = copy_weights(model)
    assert torch.equal(after["2.weight"], before["2.weight"])
    assert not torch.equal(after["0.weight"], before["0.weight"])
    handle.remove()
    x, y = make_regression_batches(1)[0]
    outcome = train(stepper, [(x * math.nan, y)])[0]
    assert (outcome.status, outcome.cause) == ("skipped", "the loss is nan: so is the input")
    assert_same(copy_weights(model), after)


def test_release_is_refused_with_what_needs_all_gradients() -> None:
    model = make_mlp()
    for options in ({"accumulate": 2}, {"clip": 1.0}):
        with pytest.raises(ModelError, match="release=True needs"):
            prepare(model, make_adamw(model), "32-true", release=True, **options)
    with pytest.raises(ModelError, match="release=True needs"):
        prepare(model, LBFGS(model.parameters()), "32-true", release=True)
    with pytest.raises(UnsupportedError, match="release=True updates weights before an overflow is known"):
        prepare(model, make_adamw(model), "16-mixed", release=True)
    assert not has_hooks(model)


def test_weights_that_do_not_move_are_reported_once_with_the_numbers() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model, lr=1e-7), NO_MASTER)
    outcomes = train(stepper, make_regression_batches(19))
    assert not any(outcome.stalls for outcome in outcomes)
    with pytest.warns(
        StallWarning, match=r"parameter group 0 stalls at lr=1e-07: .* did not move; .* use master=split"
    ):
        (outcome,) = train(stepper, make_regression_batches(1))
    assert len(outcome.stalls) == 1
    assert train(stepper, make_regression_batches(1))[0].stalls == ()


@pytest.mark.parametrize("mode", [SPLIT, "32-true", FP32_MASTER])
def test_weights_behind_a_master_that_is_fine_enough_are_not_reported(mode: str) -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model, lr=1e-7), mode)
    assert not any(outcome.stalls for outcome in train(stepper, make_regression_batches(25)))


def test_noise_of_stochastic_masters_goes_on_after_resume_and_a_change_of_plan() -> None:
    plan = "compute=bf16 storage=bf16 master=stochastic"
    batches = make_regression_batches(8)
    models = [make_mlp(), make_mlp(), make_mlp(1)]
    straight, first, second = (prepare(m, make_adamw(m), plan) for m in models)
    for stepper in (straight, first):
        stepper.conversion.masters.seed = 11
    train(straight, batches)
    train(first, batches[:4])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    models[2].load_state_dict(copy_weights(models[1]))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.adopt(Plan.preset("32-true"))
    second.adopt(Plan.parse(plan))
    train(second, batches[4:])
    assert_same(copy_weights(models[2]), copy_weights(models[0]))


def test_stepper_shows_its_plan_and_counters() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "16-mixed")
    train(stepper, make_regression_batches(2))
    assert repr(stepper) == "Stepper(16-mixed; 2 applied, 0 skipped; loss scale 65536)"
    stepper.restore()
    waiting = prepare(model, make_adamw(model), "auto", profile=make_profile())
    assert repr(waiting) == "Stepper(auto, not chosen yet; 0 applied, 0 skipped; loss scale 1)"


# --- what comes together


def make_channels_last() -> nn.Sequential:
    return make_cnn().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", SPLIT, FP32_MASTER, "states=8-bit\ncompute=bf16"])
@pytest.mark.parametrize(
    "make", [lambda p: AdamW(p, lr=1e-2, fused=True), lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True)]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loaded_states_have_the_strides_of_their_parameters(
    mode: str, make: Callable[[Any], Optimizer], accumulate: int
) -> None:
    """Fused kernels walk through memory; a checkpoint holds contiguous tensors."""
    images = make_images(7)
    models = [make_channels_last(), make_channels_last(), make_channels_last()]
    straight, first, second = (prepare(m, make(m.parameters()), mode, accumulate=accumulate) for m in models)
    train(straight, images)
    train(first, images[:3])
    tensors: dict[str, Tensor] = {}
    states = (first.state_dict(), dict(models[1].state_dict()), first.optimizer.state_dict())
    saved = unpack(pack(states, tensors), tensors)
    second.load_state_dict(saved[0])
    models[2].load_state_dict(saved[1])
    second.optimizer.load_state_dict(saved[2])
    train(second, images[3:])
    assert_same(copy_weights(models[2]), copy_weights(models[0]))


def test_states_in_8_bits_keep_the_strides_of_their_parameters() -> None:
    losses = []
    for states in ("fp32", "8-bit"):
        with seeded(0):
            model = nn.Sequential(
                nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 3)
            )
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        stepper = prepare(model, AdamW(model.parameters(), lr=1e-3, fused=True), Plan(states=states))
        train(stepper, make_images(1) * 30)
        losses.append([F.mse_loss(model(x), y).item() for x, y in make_images(1)])
    assert losses[1] == pytest.approx(losses[0], rel=0.2, abs=2e-3)


@pytest.mark.parametrize("mode", ["32-true", SPLIT])
def test_error_inside_the_optimizer_or_a_schedule_ends_the_window(mode: str) -> None:
    model = make_mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    stepper = prepare(model, optimizer, mode)
    batch = make_regression_batches(1)
    handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        train(stepper, batch)
    handle.remove()
    other = make_mlp()
    expected = train(prepare(other, SGD(other.parameters(), lr=0.1), mode), batch)[0]
    assert train(stepper, batch)[0].gradient_norm == expected.gradient_norm
    assert_same(copy_weights(model), copy_weights(other))


@pytest.mark.parametrize("plan", ["16-mixed", "bf16-true", SPLIT])
def test_auto_chooses_before_a_closure_is_evaluated(monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    take_plan(monkeypatch, plan)
    model, (x, y) = make_mlp(), make_regression_batches(1)[0]
    stepper = prepare(model, LBFGS(model.parameters(), lr=0.1), "auto", profile=make_profile())
    outcome = stepper.step(closure=lambda: F.mse_loss(stepper.model(x).float(), y))
    assert outcome.applied
    assert outcome.gradient_norm is not None
    assert outcome.gradient_norm < 10
    states = [v for v in stepper.optimizer.state[next(model.parameters())].values() if isinstance(v, Tensor)]
    assert all(v.dtype is (torch.bfloat16 if plan == "bf16-true" else torch.float32) for v in states)


def test_release_acts_in_its_own_backward_pass_only() -> None:
    model = make_mlp()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true", release=True)
    before = copy_weights(model)
    model(torch.ones(2, 8)).sum().backward()
    assert_same(copy_weights(model), before)
    model.zero_grad()
    late = nn.Parameter(torch.ones(1))
    stepper.optimizer.add_param_group({"params": [late]})
    assert stepper.step((late * model(torch.ones(2, 8)).detach().sum().sign()).sum()).applied
    assert abs(late.item() - 1.0) == pytest.approx(0.1)


def test_release_without_a_gradient_is_skipped_and_with_zeros_applied() -> None:
    model, other = make_mlp(), nn.Parameter(torch.ones(1))
    stepper = prepare(model, SGD(model.parameters(), lr=0.1, weight_decay=0.1), "32-true", release=True)
    outcome = stepper.step((other * 2).sum())
    assert (outcome.status, stepper.applied) == ("skipped", 0)
    outcome = stepper.step((model(torch.ones(2, 8)) * 0).sum())
    assert (outcome.status, outcome.gradient_norm) == ("applied", 0.0)


def test_release_applies_a_finite_gradient_whose_square_overflows() -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=1e-30), "32-true", release=True)
    poison(model[4].bias, 1e25)
    outcome = train(stepper, make_regression_batches(1))[0]
    assert (outcome.status, outcome.tensors) == ("applied", ())
    assert outcome.gradient_norm == pytest.approx(1e25 * 3**0.5, rel=1e-5)


@pytest.mark.parametrize("closure", [False, True])
def test_roll_back_with_release_and_with_closures_has_a_state_to_go_back_to(closure: bool) -> None:
    model, (x, y) = make_mlp(), make_regression_batches(1)[0]
    plan = replace(Plan.preset("32-true"), recovery="roll-back")
    optimizer = LBFGS(model.parameters(), max_iter=2) if closure else SGD(model.parameters(), lr=0.1)
    stepper = prepare(model, optimizer, plan, release=not closure)
    before = copy_weights(model)

    def step(y: Tensor) -> StepOutcome:
        if closure:
            return stepper.step(closure=lambda: F.mse_loss(model(x), y))
        return train(stepper, [(x, y)])[0]

    assert step(y).applied
    outcomes = [step(y * math.nan) for _ in range(3)]
    assert outcomes[-1].recovery.startswith("roll-back")
    assert_same(copy_weights(model), before)


@pytest.mark.parametrize("load", ["stepper", "model"])
def test_roll_back_does_not_go_back_past_what_was_loaded(load: str) -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), replace(Plan.preset("32-true"), recovery="roll-back"))
    x, y = make_regression_batches(1)[0]
    train(stepper, [(x, y)])
    if load == "stepper":
        stepper.load_state_dict(stepper.state_dict())
    else:
        model.load_state_dict(model.state_dict())
    with pytest.raises(TrainingError, match="there is no good state to go back to"):
        train(stepper, [(x, y * math.nan)] * 3)


class Running(nn.Module):
    """Replaces its buffer at each forward pass."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return x - self.mean


def test_buffers_that_are_replaced_are_put_back() -> None:
    with seeded(0):
        model = nn.Sequential(Running(), nn.Linear(8, 3))
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true")
    (x, y), second = make_regression_batches(2)
    train(stepper, [(x, y)])
    before = copy_weights(model)
    assert train(stepper, [(x * math.nan, y)])[0].skipped
    assert_same(copy_weights(model), before)
    assert train(stepper, [second])[0].applied


def test_forward_passes_before_loading_do_not_undo_it() -> None:
    model = make_cnn()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true")
    model(torch.randn(4, 3, 8, 8))
    state = copy_weights(model) | {"1.running_mean": torch.full((8,), 7.0)}
    model.load_state_dict(state)
    assert train(stepper, make_images(1, bad={0}))[0].skipped
    assert_same(copy_weights(model), state)


def test_plan_may_change_in_an_open_window_of_a_model_in_evaluation_mode() -> None:
    model = make_cnn().eval()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true", accumulate=2)
    images = make_images(2)
    train(stepper, images[:1])
    stepper.adopt(Plan.preset("bf16-mixed"))
    assert train(stepper, images[1:])[0].applied


def test_states_in_8_bits_with_closures_changes_of_plan_and_narrow_weights() -> None:
    model = make_wide()
    eight = replace(Plan.preset("32-true"), states="8-bit")
    stepper = prepare(model, SAM(model.parameters(), SGD, lr=0.1), eight)
    x, y = make_regression_batches(1)[0]
    for _ in range(3):
        loss = F.mse_loss(model(x), y)
        assert stepper.step(loss, closure=lambda: F.mse_loss(model(x), y)).applied
    model = make_wide()
    stepper = prepare(model, make_adamw(model), eight)
    train(stepper, make_regression_batches(2))
    for plan in (
        replace(read_plan(NO_MASTER), states="8-bit"),
        replace(read_plan(SPLIT), states="8-bit"),
        read_plan("32-true"),
    ):
        rounding = change_plan(stepper, plan)
        assert rounding.states > 0
        assert train(stepper, make_regression_batches(1))[0].applied


class Stubborn(Optimizer):
    """Keeps its rate to itself."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(0.1 * p.grad)


def test_optimizer_without_a_learning_rate_trains_and_backs_off_without_effect() -> None:
    model = make_mlp()
    stepper = prepare(model, Stubborn(model.parameters()), replace(Plan.preset("32-true"), recovery="back-off"))
    x, y = make_regression_batches(1)[0]
    train(stepper, [(x, y)] + [(x, y * math.nan)] * 3)
    assert train(stepper, [(x, y)])[0].applied


def test_widen_leaves_bad_data_to_the_limit() -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), replace(Plan.preset("bf16-mixed"), recovery="widen"))
    x, y = make_regression_batches(1)[0]
    assert train(stepper, [(x * math.nan, y)] * 6 + [(x, y)])[-1].applied


def test_numbers_of_a_recovery_stay_when_the_plan_changes() -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true")
    stepper.recovery_rule = replace(stepper.recovery_rule, patience=1, limit=7)
    stepper.adopt(replace(Plan.preset("bf16-mixed"), recovery="stop"))
    assert (stepper.recovery_rule.patience, stepper.recovery_rule.limit, stepper.recovery_rule.policy) == (1, 7, "stop")


def test_mask_of_negative_infinity_is_no_bad_input() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.softmax(self.inner(x) + mask, -1)

    model = Masked()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true")
    with torch.no_grad():
        model.inner.weight.fill_(math.nan)
    outcome = stepper.step(model(torch.ones(2, 4), torch.tensor([0.0, 0.0, -math.inf, 0.0])).sum())
    assert outcome.layer == "inner"


def test_copy_and_saved_model_take_no_window_along(tmp_path: Path) -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "32-true")
    model(torch.ones(2, 8).requires_grad_() * 2)
    twin = copy.deepcopy(model)
    twin(torch.ones(2, 8))
    torch.save(model, tmp_path / "model.pt")
    assert train(stepper, make_regression_batches(1))[0].applied
    assert torch.load(tmp_path / "model.pt", weights_only=False)(torch.ones(1, 8)).shape == (1, 3)


class Scripted(nn.Module):
    """Holds a layer in a plain list too, and has a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.LayerNorm(8)
        self.third = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.places = [self.first]
        self.register_forward_hook(double_output)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.third(self.second(self.places[0](x))[:, None])[:, 0])


def double_output(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return 2 * output


@pytest.mark.parametrize("mode", ["32-true", "bf16-mixed", "bf16-true", SPLIT, FP16_MASTER])
@pytest.mark.parametrize("way", ["deepcopy", "torch.save", "inside another"])
def test_copies_and_saved_models_are_plain_fp32_ones(tmp_path: Path, mode: str, way: str) -> None:
    with seeded(0):
        model = Scripted()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), mode)
    for _ in range(2):
        with stepper.autocast():
            loss = model(torch.ones(2, 8)).float().square().mean()
        assert stepper.step(loss).applied
    before, live = copy_weights(model), [bits(p).clone() for p in model.parameters()]
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        twin = pickle.loads(pickle.dumps(nn.Sequential(model)))[0]
    assert_same(copy_weights(twin), before)
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    assert {type(module).__module__.partition(".")[0] for module in twin.modules()} == {"torch", Scripted.__module__}
    assert twin.places[0] is twin.first
    assert len(twin._forward_hooks) == 1 and not any(m._forward_pre_hooks for m in twin.modules())
    assert all(torch.equal(bits(p), kept) for p, kept in zip(model.parameters(), live, strict=True))
    plain = stepper.restore()
    assert torch.equal(twin(torch.ones(2, 8)), plain(torch.ones(2, 8)))
    assert set(vars(plain)) == set(vars(twin)) == set(vars(Scripted()))


def test_restore_in_an_open_window_leaves_no_scaled_gradients() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "16-mixed", accumulate=4)
    train(stepper, make_regression_batches(1))
    stepper.restore()
    assert all(p.grad is None for p in model.parameters())


def test_noted_inputs_hold_no_graph() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "32-true")
    model(torch.ones(2, 8, requires_grad=True) * 2)
    ((args, _),) = stepper._window._inputs.values()
    assert not args[0].requires_grad


def test_saved_window_does_not_change_with_the_next_micro_batch() -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true", accumulate=3)
    batches = make_regression_batches(2)
    train(stepper, batches[:1])
    state = stepper.state_dict()
    before = copy.deepcopy(state)
    train(stepper, batches[1:])
    torch.testing.assert_close(state["window"]["gradients"], before["window"]["gradients"], rtol=0, atol=0)


class Checkpointed(nn.Module):
    """Computes its middle again in the backward pass, in what the forward pass computed it in, or autograd complains."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.inner, self.reentrant = make_mlp(), reentrant

    def middle(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x).sum(dim=-1, keepdim=True).exp()
        return y

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.middle(x)
        y: Tensor = checkpoint(lambda x: self.middle(x), x.clone().requires_grad_(), use_reentrant=self.reentrant)
        return y


@pytest.mark.parametrize("way", ["step", "accumulate", "closure", "release"])
@pytest.mark.parametrize("plan", ["16-mixed", "path=0** compute=fp16\ncompute=bf16", "compute=fp16 cast=unit"])
def test_fp16_on_a_processor_is_checkpointed_as_it_is_computed(plan: str, way: str) -> None:
    x, y = make_regression_batches(1)[0]
    results = []
    for reentrant in (None, True, False):
        model = nn.Sequential(Checkpointed(reentrant))
        given = replace(Plan.parse(plan), loss_scale="none")
        accumulate, release = 2 if way == "accumulate" else 1, way == "release"
        optimizer = SGD(model.parameters(), lr=0.1)
        stepper = prepare(model, optimizer, given, accumulate=accumulate, release=release)

        def compute(stepper: Stepper = stepper) -> Tensor:
            with stepper.autocast():
                return F.mse_loss(stepper.model(x).float(), y[:, :1])

        for _ in range(2):
            outcome = stepper.step(closure=compute) if way == "closure" else stepper.step(compute())
        assert outcome.applied
        results.append(copy_weights(model))
    for result in results[1:]:
        assert_same(result, results[0])
    assert not torch.equal(results[0]["0.inner.0.weight"], make_mlp().get_parameter("0.weight"))


@pytest.mark.parametrize("plan", ["bf16-mixed", "16-mixed"])
def test_casts_of_weights_are_forgotten_after_a_fused_update_which_leaves_their_version(plan: str) -> None:
    losses: list[list[float]] = []
    x, y = make_regression_batches(1)[0]
    for around in (True, False):
        model = make_mlp()
        stepper = prepare(model, AdamW(model.parameters(), lr=0.1, fused=True), plan)
        losses.append([])
        with stepper.autocast() if around else nullcontext():
            for _ in range(4):
                with stepper.autocast():
                    loss = F.mse_loss(model(x).float(), y)
                losses[-1].append(loss.item())
                assert stepper.step(loss).applied
    assert losses[0] == losses[1]


def test_the_record_of_a_plan_says_who_casts_operations() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "16-mixed")
    assert stepper.plan_record is not None
    (said,) = stepper.plan_record.operations
    assert said.startswith("fp16 by OperatorMode: torch's list for cpu leaves exp")
    stepper.adopt(Plan.preset("32-true"))
    assert stepper.plan_record.operations == ()


@pytest.mark.parametrize("plan", ["bf16-mixed", "16-mixed", "states=8-bit\ncompute=fp16", "compute=fp16 cast=unit"])
def test_steps_inside_one_autocast_block_see_new_weights(plan: str) -> None:
    model = make_mlp()
    stepper = prepare(model, SGD(model.parameters(), lr=0.5), plan)
    x, y = make_regression_batches(1)[0]
    losses = []
    with stepper.autocast():
        for _ in range(3):
            loss = F.mse_loss(model(x).float(), y)
            losses.append(loss.item())
            stepper.step(loss)
    assert losses[0] > losses[1] > losses[2]


# --- what users get wrong


def test_backward_made_by_hand_is_an_error_that_says_so() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), "32-true")
    x, y = make_regression_batches(1)[0]
    loss = F.mse_loss(model(x), y)
    loss.backward()
    with pytest.raises(ModelError, match=r"6 parameters hold gradients that no step\(\) made, the first is 0.weight"):
        stepper.step(loss)
    stepper.optimizer.zero_grad(set_to_none=False)
    with pytest.raises(ModelError, match=r"leave out loss.backward\(\)"):
        stepper.step(loss)
    assert train(stepper, [(x, y)])[0].applied


def test_model_that_is_prepared_is_refused_until_it_is_restored() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), SPLIT)
    with pytest.raises(ModelError, match=r"prepared already; go on with its stepper, or call restore\(\)"):
        prepare(model, make_adamw(model), SPLIT)
    stepper.restore()
    assert train(prepare(model, make_adamw(model), SPLIT), make_regression_batches(1))[0].applied


def test_skip_says_which_weights_are_not_finite() -> None:
    model = make_mlp()
    stepper = prepare(model, make_adamw(model), SPLIT)
    with torch.no_grad():
        model.get_parameter("2.bias")[0] = math.nan
    assert train(stepper, make_regression_batches(1))[0].cause == (
        "the loss is nan, first in the output of '2', whose bias is not finite"
    )


@pytest.mark.parametrize(
    "arguments", [(None, None), (nn.Linear(1, 1), AdamW), (nn.Linear(1, 1), nn.Linear(1, 1)), (nn.Linear(1, 1), [])]
)
def test_prepare_says_what_it_takes(arguments: tuple[Any, Any]) -> None:
    with pytest.raises(ModelError, match="prepare takes a module and an optimizer"):
        prepare(*arguments, "32-true")


@pytest.mark.parametrize("plan", [torch.bfloat16, None, 16])
def test_plan_of_another_type_is_refused(plan: Any) -> None:
    model = make_mlp()
    with pytest.raises(
        PlanError, match="a plan is a Plan, the name of a precision, a plan's text, or the path of a plan file; got"
    ):
        prepare(model, make_adamw(model), plan)


def test_delayed_scaling_forgets_a_skipped_step_and_does_not_learn_from_evaluation() -> None:
    plan = Plan.parse("path=0 compute=fp8_e4m3 grad=fp8_e5m2 scaling=delayed\ncompute=fp32")
    runs = []
    for disturbed in (False, True):
        with seeded(3):
            model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
            stepper = prepare(model, SGD(model.parameters(), lr=0.1), plan)
            batches = torch.randn(6, 16, 4)
        for number, x in enumerate(batches):
            if disturbed and number == 3:
                with torch.no_grad(), stepper.autocast():
                    model(100 * x)
                with stepper.autocast():
                    assert stepper.step((model(1000 * x) * math.inf).sum()).skipped
            with stepper.autocast():
                assert stepper.step((model(x) - 1).square().mean()).applied
        runs.append({**stepper.model.state_dict(), "amaxes": stepper.state_dict()["amaxes"]["0"]})
    assert runs[0]["amaxes"].count_nonzero(dim=1).tolist() == [len(batches)] * 3
    assert_same(*runs)


def test_micro_batches_share_quantized_weights_and_steps_do_not() -> None:
    """torch's fused AdamW changes weights without a new version, so a stale copy would stay unseen."""
    plan = Plan.parse("path=0 compute=int8\ncompute=fp32")
    x, losses = torch.randn(8, 16), []
    for accumulate in (1, 2):
        with seeded(1):
            model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
            stepper = prepare(model, AdamW(model.parameters(), lr=0.1, fused=True), plan, accumulate=accumulate)
            for _ in range(3):
                for _ in range(accumulate):
                    with stepper.autocast():
                        loss = model(x).square().mean()
                    stepper.step(loss)
                losses.append(loss.item())
    assert losses[:3] == losses[3:]
    assert losses[0] != losses[1]


def test_saved_activations_take_the_plans_format_and_train_to_the_same_loss() -> None:
    losses = {}
    for text in ("compute=bf16", "saved=int8 compute=bf16", "path=0 saved=bf16\nsaved=int4 compute=bf16"):
        with seeded(2):
            model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1))
            x = torch.randn(256, 64)
            stepper = prepare(model, AdamW(model.parameters(), lr=1e-2), Plan.parse(text))
            y = x[:, :1].tanh()
            for _ in range(60):
                with stepper.autocast():
                    loss = F.mse_loss(stepper.model(x), y)
                assert stepper.step(loss).applied
        losses[text] = loss.item()
        keeper = stepper.conversion.keeper
        if "saved" in text:
            assert keeper is not None
            assert sum(r.kept for r in keeper.records) < 0.7 * sum(r.bytes for r in keeper.records)
        else:
            assert keeper is None
    assert max(losses.values()) < 0.02
    assert len(set(losses.values())) == 3, "rounding must have shown"


def test_the_noise_of_saved_activations_does_not_count_evaluations_and_skipped_steps() -> None:
    states = []
    for disturbed in (False, True):
        with seeded(4):
            model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 1))
            stepper = prepare(model, SGD(model.parameters(), lr=0.1), Plan.parse("saved=int4 compute=fp32"))
            batches = torch.randn(4, 64, 64)
        for number, x in enumerate(batches):
            if disturbed and number == 2:
                with torch.no_grad(), stepper.autocast():
                    model(x)
                with stepper.autocast():
                    assert stepper.step((model(x) * math.inf).sum()).skipped
            with stepper.autocast():
                assert stepper.step((model(x) - 1).square().mean()).applied
        states.append(model.state_dict())
    assert_same(*states)


DELAYED = "path=0 compute=fp8_e4m3 grad=fp8_e5m2 scaling=delayed\ncompute=fp32"


def make_delayed(accumulate: int = 1, **options: Any) -> Stepper:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    return prepare(model, SGD(model.parameters(), lr=0.1), Plan.parse(DELAYED), accumulate=accumulate, **options)


def step_once(stepper: Stepper, x: Tensor) -> StepOutcome:
    with stepper.autocast():
        loss = stepper.model(x).square().mean()
    return stepper.step(loss)


def test_a_pass_without_gradients_between_forward_and_backward_leaves_the_histories_on() -> None:
    stepper, x = make_delayed(), torch.randn(8, 4)
    for _ in range(3):
        with stepper.autocast():
            loss = stepper.model(x).square().mean()
        with torch.no_grad(), stepper.autocast():
            stepper.model(x)
        stepper.step(loss)
    assert stepper.state_dict()["amaxes"]["0"].count_nonzero(dim=1).tolist() == [3, 3, 3]


def test_histories_survive_a_plan_that_is_refused_and_one_that_keeps_their_layer() -> None:
    stepper = make_delayed()
    step_once(stepper, torch.randn(8, 4))
    before = stepper.state_dict()["amaxes"]
    with pytest.raises(PlanError):
        stepper.adopt(Plan.parse("path=nowhere compute=bf16\ncompute=fp32"))
    assert_same(stepper.state_dict()["amaxes"], before)
    stepper.adopt(Plan.parse(f"path=2 compute=bf16\n{DELAYED}"))
    assert_same(stepper.state_dict()["amaxes"], before)


def test_another_plan_inside_a_window_leaves_the_buffers_of_the_model_alone() -> None:
    stepper = make_delayed(accumulate=2)
    step_once(stepper, torch.randn(8, 4))
    shapes = {name: b.shape for name, b in stepper.model.named_buffers()}
    stepper.adopt(Plan.parse("path=2 compute=fp8_e4m3 scaling=delayed\ncompute=fp32"))
    with stepper.autocast():
        loss = (stepper.model(torch.randn(8, 4)) * math.inf).sum()
    assert stepper.step(loss).skipped
    assert {name: b.shape for name, b in stepper.model.named_buffers()} == shapes
    assert stepper.state_dict()["amaxes"]["2"].count_nonzero() == 0, "the skipped step is forgotten"


def test_histories_go_along_with_averages_and_roll_back() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    average = AveragedModel(model, use_buffers=True)
    plan = replace(Plan.parse(DELAYED), recovery="roll-back")
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), plan, averages=average)
    stepper.recovery_rule = replace(stepper.recovery_rule, every=1, patience=1)
    for _ in range(3):
        assert step_once(stepper, torch.randn(8, 4)).applied
    with stepper.autocast():
        loss = (stepper.model(torch.randn(8, 4)) * math.inf).sum()
    assert stepper.step(loss).recovery.startswith("roll-back")
    assert stepper.state_dict()["amaxes"]["0"].count_nonzero(dim=1).tolist() == [2, 2, 2]


class PairedRanks(Alone):
    """Beside a rank whose numbers are always 100."""

    size = 2

    def maximize(self, numbers: Tensor) -> Tensor:
        return numbers.clamp_min(100.0) if numbers.dim() == 3 else numbers


def test_ranks_agree_on_histories_at_every_update() -> None:
    stepper = make_delayed(ranks=PairedRanks())
    step_once(stepper, torch.randn(8, 4))
    assert stepper.state_dict()["amaxes"]["0"].min() == 100.0


def test_evaluation_with_other_weights_leaves_nothing_in_the_shared_copies() -> None:
    losses = []
    for swapped in (False, True):
        with seeded(1):
            model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1)), torch.randn(8, 16)
        plan, weight = Plan.parse("path=0 compute=int8\ncompute=fp32"), model[0].get_parameter("weight")
        stepper = prepare(model, AdamW(model.parameters()), plan, accumulate=2)
        if swapped:
            original = weight.data.clone()
            weight.data.copy_(torch.full_like(original, 3.0))
            with torch.no_grad(), stepper.autocast():
                model(x)
            weight.data.copy_(original)
            with torch.inference_mode(), stepper.autocast():
                model(x)
        with stepper.autocast():
            losses.append(model(x).square().mean())
    assert torch.equal(*losses)


def test_widening_a_layer_widens_its_gradient_too() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), replace(Plan.preset("fp8-mixed"), recovery="widen"))
    stepper.recovery_rule = replace(stepper.recovery_rule, patience=1)
    handle = model[1].register_forward_hook(lambda _m, _a, y: y * math.inf)
    with stepper.autocast():
        loss = model(torch.randn(4, 8)).square().mean()
    outcome = stepper.step(loss)
    handle.remove()
    assert "now in fp32: 1" in outcome.recovery
    with stepper.conversion.audit() as audit, stepper.autocast():
        loss = model(torch.randn(4, 8)).square().mean()
    assert set(audit.computed["1"]) == {"fp32"}
    assert stepper.step(loss).applied


def test_the_record_says_before_the_first_step_what_updates_a_table_with_sparse_gradients() -> None:
    model = nn.Sequential(nn.EmbeddingBag(9, 4, sparse=True), nn.Linear(4, 2))
    table, layer = model
    optimizers = [torch.optim.SGD(table.parameters(), lr=0.1, momentum=0.9), torch.optim.AdamW(layer.parameters())]
    stepper = prepare(model, optimizers, "compute=bf16 storage=bf16 master=split")
    assert stepper.plan_record is not None
    said = "SGD: torch: momentum=0.9 has no kernel for sparse gradients"
    assert stepper.plan_record.updates[0] == said
    with stepper.autocast():
        loss = stepper.model(torch.arange(6).view(2, 3)).square().mean()
    assert stepper.step(loss).applied
    assert (
        stepper.plan_record.updates[0] == said == f"SGD: {stepper.conversion.masters.describe_updates(optimizers[0])}"
    )


# --- what must not be lost on the way


@pytest.mark.parametrize("way", ["copy", "average"])
def test_hooks_of_others_on_narrow_weights_outlive_copies_and_averages(way: str) -> None:
    """DistributedDataParallel averages gradients by such hooks."""
    model = make_mlp()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    stepper = prepare(model, make_adamw(model), SPLIT, averages=average if way == "average" else ())
    weight, called = model.get_parameter("0.weight"), []
    node = cast(Any, weight.expand_as(weight).grad_fn).next_functions[0][0]
    node.register_hook(lambda *_: called.append(1))
    for number, batch in enumerate(make_regression_batches(3), start=1):
        train(stepper, [batch])
        if way == "copy":
            copy.deepcopy(model)
        assert len(called) == number and weight.dtype is torch.bfloat16


@pytest.mark.parametrize("mode", ["32-true", SPLIT])
@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.ASGD, torch.optim.Adafactor, SGD])
def test_states_of_every_shape_are_loaded_as_they_were_saved(kind: Any, mode: str) -> None:
    """torch has cast them to the 16 bits of their parameter, single numbers too."""
    batches, models = make_regression_batches(8), [make_mlp(), make_mlp()]
    straight, resumed = (prepare(m, kind(m.parameters(), lr=0.01), mode) for m in models)
    train(straight, batches[:4])
    states = copy.deepcopy((straight.state_dict(), straight.optimizer.state_dict(), copy_weights(models[0])))
    resumed.load_state_dict(states[0])
    models[1].load_state_dict(states[2])
    resumed.optimizer.load_state_dict(states[1])
    for stepper in (straight, resumed):
        train(stepper, batches[4:])
    assert_same(copy_weights(models[0]), copy_weights(models[1]))
    torch.testing.assert_close(resumed.optimizer.state_dict(), straight.optimizer.state_dict(), rtol=0, atol=0)


def test_states_in_lists_are_loaded_too_and_follow_a_plan() -> None:
    models, (x, y) = [make_mlp(), make_mlp()], make_regression_batches(1)[0]
    first, second = (prepare(m, LBFGS(m.parameters(), lr=0.1, max_iter=3), SPLIT) for m in models)

    def evaluate(stepper: Stepper) -> Tensor:
        with stepper.autocast():
            return F.mse_loss(stepper.model(x).float(), y)

    first.step(closure=lambda: evaluate(first))
    saved = copy.deepcopy((first.state_dict(), first.optimizer.state_dict(), copy_weights(models[0])))
    second.load_state_dict(saved[0])
    models[1].load_state_dict(saved[2])
    second.optimizer.load_state_dict(saved[1])
    for stepper in (first, second):
        assert stepper.step(closure=partial(evaluate, stepper)).applied
    assert_same(copy_weights(models[0]), copy_weights(models[1]))


def test_states_in_lists_follow_a_plan_to_fp32_and_stay_wide_where_the_model_is_partly() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    x, y = make_regression_batches(1)[0]
    stepper = prepare(model, LBFGS(model.parameters(), lr=0.1, max_iter=3), "bf16-true")
    for plan in ("bf16-true", SPLIT, "32-true"):
        stepper.adopt(Plan.parse(plan))
        for _ in range(2):
            assert stepper.step(closure=lambda: F.mse_loss(stepper.model(x).float(), y)).applied


@pytest.mark.parametrize("mode", ["bf16-mixed", "16-mixed"])
def test_a_closure_inside_an_autocast_block_sees_the_weights_of_each_evaluation(mode: str) -> None:
    results = []
    for block in (False, True):
        model, (x, y) = make_mlp(), make_regression_batches(1)[0]
        stepper = prepare(model, LBFGS(model.parameters(), lr=0.5, max_iter=4), mode)

        def evaluate(stepper: Stepper = stepper, x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.mse_loss(stepper.model(x).float(), y)

        for _ in range(2):
            with stepper.autocast() if block else nullcontext():
                stepper.step(closure=evaluate)
        results.append(copy_weights(model))
    assert_same(*results)


def test_a_roll_back_inside_an_autocast_block_is_seen_in_it() -> None:
    model, batches = make_mlp(), make_regression_batches(1) * 60
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), replace(read_plan("bf16-mixed"), recovery="roll-back"))
    with stepper.autocast():
        train(stepper, batches[:3])
        with torch.no_grad():
            model.get_parameter("0.weight").fill_(math.nan)
        torch.clear_autocast_cache()
        outcomes: list[StepOutcome] = []
        while not outcomes or not outcomes[-1].recovery:
            outcomes += train(stepper, batches[:1])
        assert outcomes[-1].recovery.startswith("roll-back")
        assert train(stepper, batches[:1])[0].applied


def test_a_learning_rate_that_the_optimizer_itself_changes_stays_changed() -> None:
    model = make_mlp()
    optimizer = SGD(model.parameters(), lr=0.5)
    optimizer.register_step_post_hook(lambda own, *_: own.param_groups[0].update(lr=own.param_groups[0]["lr"] / 2))
    stepper = prepare(model, optimizer, "32-true", recovery="back-off")
    train(stepper, make_regression_batches(2))
    assert optimizer.param_groups[0]["lr"] == 0.125
    stepper._rescue.memory = replace(stepper._rescue.memory, rate=0.5)
    train(stepper, make_regression_batches(1))
    assert optimizer.param_groups[0]["lr"] == 0.0625


@pytest.mark.parametrize("way", ["roll-back", "closure"])
def test_a_scheduler_that_only_steps_needs_no_state(way: str) -> None:
    class Counter:
        steps = 0

        def step(self) -> None:
            self.steps += 1

    model, counter, (x, y) = make_mlp(), Counter(), make_regression_batches(1)[0]
    optimizer = SGD(model.parameters(), lr=0.1)
    stepper = prepare(model, optimizer, "32-true", schedulers=cast(Any, counter), recovery="roll-back")
    if way == "closure":
        stepper.step(closure=lambda: F.mse_loss(stepper.model(x), y))
    else:
        train(stepper, [(x, y)])
    assert counter.steps == 1


def test_an_error_while_the_good_state_is_copied_leaves_no_window_open(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = make_mlp(), make_regression_batches(1)
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "32-true", recovery="roll-back")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(stepper, "_take_snapshot", lambda: (_ for _ in ()).throw(MemoryError()))
        train(stepper, batches)
    assert all(p.grad is None for p in model.parameters())
    before = copy_weights(make_mlp())
    assert_same(copy_weights(model), before)
    assert train(stepper, batches)[0].applied


class Centred(nn.Module):
    """Makes its buffer when the first batch arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.register_buffer("centre", None)
        self.centre: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if self.centre is None:
            self.centre = x.mean(0)
        y: Tensor = self.layer(x - self.centre)
        return y


def test_a_skipped_batch_leaves_no_trace_in_buffers_that_came_later() -> None:
    x, y = make_regression_batches(1)[0]
    model = nn.Sequential(Centred())
    optimizer = SGD(model.parameters(), lr=0.1)
    stepper = prepare(model, optimizer, "32-true")
    assert train(stepper, [(x * math.nan, y)])[0].skipped
    assert cast(Centred, model[0]).centre is None
    assert train(stepper, [(x, y)])[0].applied
    model.append(nn.BatchNorm1d(3))
    optimizer.add_param_group({"params": model[1].parameters()})
    assert train(stepper, [(x * math.nan, y)])[0].skipped
    assert torch.equal(model.get_buffer("1.running_mean"), torch.zeros(3))


def test_an_open_window_goes_on_with_a_buffer_that_was_not_there_at_its_start() -> None:
    (x, y), *_ = batches = make_regression_batches(2)
    models = [nn.Sequential(Centred()) for _ in range(2)]
    first, second = (prepare(m, SGD(m.parameters(), lr=0.1), "32-true", accumulate=2) for m in models)
    train(first, batches[:1])
    cast(Centred, models[1][0]).centre = torch.zeros(8)
    models[1].load_state_dict(models[0].state_dict())
    tensors: dict[str, Tensor] = {}
    packed = pack(first.state_dict(), tensors)
    second.load_state_dict(unpack(packed, tensors))
    for stepper in (first, second):
        assert train(stepper, [(x * math.nan, y)])[0].skipped
    assert [cast(Centred, model[0]).centre for model in models] == [None, None]


def test_after_a_plan_was_refused_a_roll_back_still_has_the_full_precision() -> None:
    model, batches = make_mlp(), make_regression_batches(1)
    stepper = prepare(model, SGD(model.parameters(), lr=1e-4), replace(read_plan(SPLIT), recovery="roll-back"))
    train(stepper, batches)
    before = copy_weights(model)
    assert not torch.equal(before["0.weight"], before["0.weight"].bfloat16().float())
    with pytest.raises(PlanError):
        stepper.adopt(Plan.parse("path=nowhere compute=bf16\ncompute=fp32"))
    train(stepper, batches)
    assert stepper._rescue.roll_back() == 1
    assert_same(copy_weights(model), before)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["choosing", "taking"])
def test_auto_waits_on_after_it_was_interrupted(failure: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = make_mlp(), make_regression_batches(1)
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "auto", profile=make_profile("slower"))
    places: dict[str, tuple[Any, str]] = {
        "choosing": (plan_in_force, "choose_plan"),
        "taking": (stepper._in_force, "adopt"),
    }
    owner, name = places[where]
    with monkeypatch.context() as patch, pytest.raises(failure):
        patch.setattr(owner, name, lambda *_, **__: (_ for _ in ()).throw(failure()))
        train(stepper, batches)
    assert "not chosen yet" in repr(stepper) and stepper.state_dict()["plan"] is None
    assert train(stepper, batches)[0].applied and stepper.plan_record is not None


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_auto_that_is_interrupted_once_its_plan_is_in_force_goes_back_and_waits(
    failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while kernels are compiled for the record."""
    model, batches = make_mlp(), make_regression_batches(1)
    choice = Choice(plan=Plan.parse(SPLIT), why="so", seconds=0.0)
    monkeypatch.setattr(plan_in_force, "choose_plan", lambda *_, **__: choice)
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "auto", profile=make_profile("native"))
    calls = iter([failure(), None])

    def describe() -> tuple[str, ...]:
        if error := next(calls):
            raise error
        return ()

    with monkeypatch.context() as patch, pytest.raises(failure):
        patch.setattr(stepper._optimizers, "describe_updates", describe)
        train(stepper, batches)
    assert model[0].weight.dtype is torch.float32 and "not chosen yet" in repr(stepper) and stepper.plan_record is None
    assert train(stepper, batches)[0].applied
    assert model[0].weight.dtype is torch.bfloat16 and stepper.plan_record is not None


def test_a_trial_of_auto_leaves_no_buffer_behind() -> None:
    (x, y), model = make_regression_batches(1)[0], nn.Sequential(Centred())
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "auto", profile=make_profile("native"))
    assert train(stepper, [(x * math.nan, y)])[0].skipped
    assert cast(Centred, model[0]).centre is None
    assert train(stepper, [(x, y)])[0].applied


def test_a_bad_first_batch_of_auto_is_explained_by_the_batch_and_not_by_that_of_a_trial() -> None:
    model, (x, y) = make_mlp(), make_regression_batches(1)[0]
    x[-1] = math.nan  # trials see the first half
    stepper = prepare(model, SGD(model.parameters(), lr=0.1), "auto", profile=make_profile("native"))
    (outcome,) = train(stepper, [(x, y)])
    assert outcome.cause.endswith(": so is the input") and stepper.plan_record is not None
