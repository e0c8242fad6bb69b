"""GradScaler: a twin trained without scaling is the truth, bit for bit, since powers of two scale without rounding."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.errors import HalfstepError, ModelError, TrainingError
from halfstep.mechanisms.grad_scaler import GradScaler
from helpers import assert_near, assert_same, copy_weights, make_mlp, make_regression_batches, seeded

BOTH = pytest.mark.parametrize("kind", [torch.amp.GradScaler, GradScaler], ids=["torch", "halfstep"])
MakeOptimizer = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "sgd-foreach": lambda p: SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: Adam(p, lr=1e-2, foreach=False),
    "adam-foreach": lambda p: Adam(p, lr=1e-2, foreach=True),
    "adam-fused": lambda p: Adam(p, lr=1e-2, fused=True),
    "adamw": lambda p: AdamW(p, lr=1e-2, amsgrad=True),
    "adamw-fused": lambda p: AdamW(p, lr=1e-2, fused=True),
}


def make_scaler(init_scale: float = 2.0**10, growth_interval: int = 2, **settings: Any) -> GradScaler:
    return GradScaler("cpu", init_scale, growth_interval=growth_interval, **settings)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def overflow(model: nn.Module) -> None:
    """What a backward pass that overflows leaves in one gradient: a new tensor, since no loop writes into the old."""
    parameter = next(model.parameters())
    assert parameter.grad is not None
    parameter.grad = parameter.grad.clone()
    parameter.grad.view(-1)[0] = torch.inf


def copy_state(optimizer: Optimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def assert_same_states(actual: Any, expected: Any) -> None:
    """Nested containers of numbers and tensors, bit for bit equal."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same_states(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same_states(one, other)
    else:
        assert actual == expected


def train(
    model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler | None, steps: str, **how: Any
) -> list[float]:
    """One step a letter: '.' healthy, 'x' with a gradient that overflows; without a scaler those are left out."""
    clip, accumulate = how.get("clip"), how.get("accumulate", 1)
    batches = make_regression_batches(len(steps) * accumulate)
    losses = []
    for number, step in enumerate(steps):
        if scaler is None and step == "x":
            continue
        optimizer.zero_grad()
        for batch in batches[number * accumulate : (number + 1) * accumulate]:
            loss = loss_of(model, batch) / accumulate
            losses.append(loss.item())
            (scaler.scale(loss) if scaler else loss).backward()
        if step == "x":
            overflow(model)
        if scaler and clip:
            scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    return losses


# -- the same numbers as without scaling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", [{}, {"clip": 0.05}, {"accumulate": 3}], ids=["plain", "clip", "accumulate"])
def test_scaled_twin_is_the_twin_that_never_saw_the_overflows(name: str, how: dict[str, Any]) -> None:
    steps = "..x....xx....x......"
    control, scaled = make_mlp(), make_mlp()
    plain, optimizer = OPTIMIZERS[name](control.parameters()), OPTIMIZERS[name](scaled.parameters())
    scaler = make_scaler()
    train(control, plain, None, steps, **how)
    train(scaled, optimizer, scaler, steps, **how)
    assert_same(copy_weights(scaled), copy_weights(control))
    assert_same_states(optimizer.state_dict()["state"], plain.state_dict()["state"])
    assert scaler.get_outcome().step == steps.count(".")


@pytest.mark.parametrize("name", ["adam", "adam-fused", "adamw", "adamw-fused"])
def test_adam_over_240_steps_with_overflows_is_fp32_bit_for_bit(name: str) -> None:
    steps = ".........x..x.....xx......" * 9 + "......"
    control, scaled = make_mlp(), make_mlp()
    train(control, OPTIMIZERS[name](control.parameters()), None, steps)
    scaler = make_scaler(2.0**16, growth_interval=5)
    losses = train(scaled, OPTIMIZERS[name](scaled.parameters()), scaler, steps)
    assert_same(copy_weights(scaled), copy_weights(control))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_adam_in_fp16_over_220_steps_with_overflows_ends_where_fp32_does(kind: Callable[..., Optimizer]) -> None:
    """The loss is so small that fp16 loses gradients of it; without scaling the same run strays far."""
    small, steps = 2.0**-14, "....x......x....xx......." * 8 + "." * 20
    batches = make_regression_batches(len(steps), seed=1)
    x, y = (torch.cat(parts) for parts in zip(*batches[:20], strict=True))

    def train_in(dtype: torch.dtype, scaler: GradScaler, chosen: list[bool]) -> tuple[Tensor, Tensor, list[bool]]:
        model = make_mlp()
        optimizer = kind(model.parameters(), lr=1e-3, eps=2.0**-30)
        applied = []
        for batch, step, wanted in zip(batches, steps, chosen, strict=True):
            if wanted:
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                    output = model(batch[0])
                loss = small * nn.functional.mse_loss(output.to(torch.float32), batch[1])
                scaler.scale(loss * (torch.inf if step == "x" else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
                applied.append(scaler.get_outcome().applied)
        with torch.no_grad():
            return nn.utils.parameters_to_vector(model.parameters()), loss_of(model, (x, y)), applied

    scaled, loss, applied = train_in(torch.float16, GradScaler("cpu", growth_interval=3), [True] * len(steps))
    assert 160 < sum(applied) <= steps.count(".")
    control, expected, _ = train_in(torch.float32, GradScaler("cpu", enabled=False), applied)
    unscaled, _, _ = train_in(torch.float16, GradScaler("cpu", enabled=False), applied)
    assert_near(loss, expected, torch.float16)
    assert torch.dist(scaled, control) < 0.25 * torch.dist(unscaled, control)


@BOTH
def test_scale_moves_as_torchs(kind: type[torch.amp.GradScaler]) -> None:
    model = make_mlp()
    scaler = kind("cpu", 2.0**10, 3.0, 0.25, 3)
    optimizer = SGD(model.parameters(), lr=0.0)
    states = []
    for step in "...x....x.xx.......":
        train(model, optimizer, scaler, step)
        states.append((scaler.get_scale(), scaler._get_growth_tracker()))
    assert states[:5] == [(1024.0, 1), (1024.0, 2), (3072.0, 0), (768.0, 0), (768.0, 1)]
    assert states[-1] == (324.0, 1)


@pytest.mark.parametrize("enabled", [True, False])
def test_loop_needs_no_other_control_flow_when_disabled(enabled: bool) -> None:
    control, model = make_mlp(), make_mlp()
    train(control, SGD(control.parameters(), lr=0.1), None, "....", clip=0.05)
    scaler = make_scaler(enabled=enabled)
    train(model, SGD(model.parameters(), lr=0.1), scaler, "....", clip=0.05)
    assert_same(copy_weights(model), copy_weights(control))
    assert scaler.get_outcome().applied and scaler.get_outcome().step == 4
    assert scaler.state_dict() == {} or enabled
    assert scaler.is_enabled() is enabled


def test_scale_takes_nested_iterables() -> None:
    scaler = make_scaler(8.0)
    one, two = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0)
    scaled = scaler.scale([one, (two, iter([two, one]))])
    assert isinstance(scaled, list) and isinstance(scaled[1], tuple)
    assert scaled[0].item() == 8.0 and scaled[1][0].item() == 16.0
    assert [value.item() for value in scaled[1][1]] == [16.0, 8.0]
    with pytest.raises(ValueError, match="outputs must be a Tensor or an iterable of Tensors"):
        scaler.scale(3.0)


def test_gradient_penalty_is_that_of_fp32() -> None:
    def train_with_penalty(model: nn.Module, scaler: GradScaler | None) -> None:
        optimizer = SGD(model.parameters(), lr=0.1)
        for batch in make_regression_batches(4):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            first = scaler.scale(loss) if scaler else loss
            gradients = torch.autograd.grad(first, list(model.parameters()), create_graph=True)
            scale = scaler.get_scale() if scaler else 1.0
            loss = loss + sum(((g / scale).square().sum() for g in gradients), torch.tensor(0.0)).sqrt()
            if scaler:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()

    control, model = make_mlp(), make_mlp()
    train_with_penalty(control, None)
    train_with_penalty(model, make_scaler())
    assert_same(copy_weights(model), copy_weights(control))


@pytest.mark.parametrize("fused", [False, True])
def test_several_models_losses_and_optimizers_each_have_their_outcome(fused: bool) -> None:
    models, twins = [make_mlp(0), make_mlp(1)], [make_mlp(0), make_mlp(1)]
    optimizers = [SGD(models[0].parameters(), lr=0.1, fused=fused), Adam(models[1].parameters(), fused=True)]
    plain = [SGD(twins[0].parameters(), lr=0.1, fused=fused), Adam(twins[1].parameters(), fused=True)]
    scaler = make_scaler(16.0, growth_interval=100)
    for number, batch in enumerate(make_regression_batches(5)):
        for one, other in zip(optimizers, plain, strict=True):
            one.zero_grad()
            other.zero_grad()
        outputs = [model(batch[0]) for model in models]
        for weight in (1.0, 2.0):
            loss = weight * (outputs[0] - outputs[1]).square().mean() + (outputs[0] - batch[1]).abs().mean()
            scaler.scale(loss).backward(retain_graph=True)
        outputs = [twin(batch[0]) for twin in twins]
        for weight in (1.0, 2.0):
            loss = weight * (outputs[0] - outputs[1]).square().mean() + (outputs[0] - batch[1]).abs().mean()
            loss.backward(retain_graph=True)
        if number == 2:
            overflow(models[1])
        for index, optimizer in enumerate(optimizers):
            scaler.step(optimizer)
            if not (number == 2 and index == 1):
                plain[index].step()
        scaler.update()
        statuses = [scaler.get_outcome(optimizer).status for optimizer in optimizers]
        assert statuses == ["applied", "skipped" if number == 2 else "applied"]
        assert scaler.get_outcome() == scaler.get_outcome(optimizers[1])
    for model, twin in zip(models, twins, strict=True):
        assert_same(copy_weights(model), copy_weights(twin))
    assert scaler.get_scale() == 8.0
    assert [scaler.get_outcome(optimizer).step for optimizer in optimizers] == [5, 4]


def test_outcome_of_an_optimizer_that_waits_stays_as_it_was() -> None:
    first, second = make_mlp(0), make_mlp(1)
    scaler = make_scaler(growth_interval=1)
    optimizer = SGD(first.parameters(), lr=0.1)
    train(first, optimizer, scaler, ".")
    outcome = scaler.get_outcome(optimizer)
    train(second, SGD(second.parameters(), lr=0.1), scaler, "...")
    assert scaler.get_outcome(optimizer) == outcome
    assert (outcome.scale_before, outcome.scale_after) == (2.0**10, 2.0**11)


def test_sparse_gradients_are_unscaled_and_checked() -> None:
    with seeded(0):
        embedding, twin = nn.Embedding(6, 3, sparse=True), nn.Embedding(6, 3, sparse=True)
    twin.load_state_dict(embedding.state_dict())
    optimizer, plain = SGD(embedding.parameters(), lr=1.0), SGD(twin.parameters(), lr=1.0)
    scaler = make_scaler()
    scaler.scale(embedding(torch.tensor([1, 1, 4])).square().sum()).backward()
    twin(torch.tensor([1, 1, 4])).square().sum().backward()
    scaler.step(optimizer)
    plain.step()
    scaler.update()
    assert_same(copy_weights(embedding), copy_weights(twin))
    optimizer.zero_grad()
    scaler.scale(embedding(torch.tensor([2])).sum() * torch.inf).backward()
    scaler.step(optimizer)
    assert scaler.get_outcome().tensors == ("param_groups[0]['params'][0]",)
    assert_same(copy_weights(embedding), copy_weights(twin))


# -- drop-in: errors, state, contracts ------------------------------------------------------------------------------------


def take_backward(scaler: torch.amp.GradScaler, model: nn.Module) -> None:
    scaler.scale(model(torch.ones(1, 8)).sum()).backward()


def unscale_twice(scaler: torch.amp.GradScaler, model: nn.Module, optimizer: Optimizer) -> None:
    take_backward(scaler, model)
    scaler.unscale_(optimizer)
    scaler.unscale_(optimizer)


def unscale_after_step(scaler: torch.amp.GradScaler, model: nn.Module, optimizer: Optimizer) -> None:
    take_backward(scaler, model)
    scaler.step(optimizer)
    scaler.unscale_(optimizer)


def step_twice(scaler: torch.amp.GradScaler, model: nn.Module, optimizer: Optimizer) -> None:
    take_backward(scaler, model)
    scaler.step(optimizer)
    scaler.step(optimizer)


def step_without_scale(scaler: torch.amp.GradScaler, _model: nn.Module, optimizer: Optimizer) -> None:
    scaler.step(optimizer)


def update_without_step(scaler: torch.amp.GradScaler, model: nn.Module, _optimizer: Optimizer) -> None:
    take_backward(scaler, model)
    scaler.update()


def update_without_scale(scaler: torch.amp.GradScaler, _model: nn.Module, _optimizer: Optimizer) -> None:
    scaler.update()


def pickle_within_an_iteration(scaler: torch.amp.GradScaler, model: nn.Module, optimizer: Optimizer) -> None:
    take_backward(scaler, model)
    scaler.step(optimizer)
    pickle.dumps(scaler)


def load_nothing(scaler: torch.amp.GradScaler, _model: nn.Module, _optimizer: Optimizer) -> None:
    scaler.load_state_dict({})


def grow_downwards(scaler: torch.amp.GradScaler, _model: nn.Module, _optimizer: Optimizer) -> None:
    type(scaler)("cpu", growth_factor=0.5)


def back_off_upwards(scaler: torch.amp.GradScaler, _model: nn.Module, _optimizer: Optimizer) -> None:
    type(scaler)("cpu", backoff_factor=2.0)


@BOTH
@pytest.mark.parametrize(
    ("mistake", "error", "text"),
    [
        (unscale_twice, RuntimeError, "unscale_() has already been called on this optimizer since the last update()."),
        (unscale_after_step, RuntimeError, "unscale_() is being called after step()."),
        (step_twice, RuntimeError, "step() has already been called since the last update()."),
        (step_without_scale, AssertionError, "Attempted step but _scale is None."),
        (update_without_step, AssertionError, "No inf checks were recorded prior to update."),
        (update_without_scale, AssertionError, "Attempted update but _scale is None."),
        (pickle_within_an_iteration, AssertionError, "A GradScaler instance may only be pickled at the beginning"),
        (load_nothing, RuntimeError, "The source state dict is empty"),
        (grow_downwards, AssertionError, "The growth factor must be > 1.0."),
        (back_off_upwards, AssertionError, "The backoff factor must be < 1.0."),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_mistakes_raise_what_torch_raises(
    kind: type[torch.amp.GradScaler], mistake: Callable[..., None], error: type[Exception], text: str, fused: bool
) -> None:
    model = make_mlp()
    with pytest.raises(error) as caught:
        mistake(kind("cpu"), model, SGD(model.parameters(), lr=0.1, fused=fused))
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("settings", [
    {"init_scale": 0.5}, {"init_scale": 2.0**25}, {"floor": 0.0}, {"floor": 1e-40}, {"floor": 8.0, "ceiling": 4.0},
    {"ceiling": float("inf")}, {"floor": float("nan")}, {"hysteresis": 0}, {"skip_limit": 0},
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="got "):
        GradScaler("cpu", **settings)


def test_default_device_without_cuda_is_disabled_as_torchs() -> None:
    if torch.cuda.is_available():
        assert GradScaler().is_enabled()
    else:
        with pytest.warns(UserWarning, match="CUDA is not available"):
            assert not GradScaler().is_enabled()


def test_constructor_takes_torchs_arguments_in_torchs_order() -> None:
    scaler = GradScaler("cpu", 8.0, 4.0, 0.25, 7, True)
    assert isinstance(scaler, torch.amp.GradScaler)
    assert scaler.state_dict() == {
        "scale": 8.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 7, "_growth_tracker": 0,
        "_overflow_tracker": 0, "_skip_tracker": 0,
    }  # fmt: skip


def make_worn_scaler(**settings: Any) -> GradScaler:
    """With no entry of its state at its default."""
    model = make_mlp()
    scaler = GradScaler("cpu", 2.0**10, 4.0, 0.25, 7, hysteresis=2, **settings)
    train(model, SGD(model.parameters(), lr=0.1), scaler, "xxx")
    scaler._growth_tracker = torch.tensor(5, dtype=torch.int32)
    return scaler


WORN = {
    "scale": 256.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 7, "_growth_tracker": 5,
    "_overflow_tracker": 1, "_skip_tracker": 3,
}  # fmt: skip


@pytest.mark.parametrize("used", [False, True])
def test_state_goes_round(used: bool) -> None:
    scaler = make_worn_scaler()
    assert scaler.state_dict() == WORN
    other = GradScaler("cpu")
    if used:
        other.scale(torch.ones(()))
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == WORN


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))])
def test_copies_go_on_with_the_same_state_and_settings(copy_of: Callable[[GradScaler], GradScaler]) -> None:
    scaler = make_worn_scaler(floor=2.0, ceiling=2.0**12, skip_limit=9)
    scaler.name_parameters(make_mlp())
    other = copy_of(scaler)
    assert other.state_dict() == WORN
    model, twin = make_mlp(), make_mlp()
    train(model, SGD(model.parameters(), lr=0.1), scaler, "x.......x")
    train(twin, SGD(twin.parameters(), lr=0.1), other, "x.......x")
    assert scaler.state_dict() == other.state_dict() != WORN
    for one in (scaler, other):
        with pytest.raises(TrainingError, match="skip_limit is 9"):
            train(model, SGD(model.parameters(), lr=0.1), one, "x" * 18)
        assert one.get_scale() == 2.0


def test_copy_of_a_disabled_scaler() -> None:
    scaler = pickle.loads(pickle.dumps(make_scaler(enabled=False)))
    assert not scaler.is_enabled() and scaler.state_dict() == {}
    scaler.load_state_dict({})


def test_state_of_torchs_scaler_is_read_and_the_other_way_round() -> None:
    theirs = torch.amp.GradScaler("cpu", 512.0, 4.0, 0.25, 7)
    ours = make_worn_scaler()
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict() == {**theirs.state_dict(), "_overflow_tracker": 0, "_skip_tracker": 0}
    theirs.load_state_dict(make_worn_scaler().state_dict())
    assert theirs.state_dict() == {key: WORN[key] for key in theirs.state_dict()}


@pytest.mark.parametrize(("loaded", "used"), [(0.0, 2.0), (float("nan"), 2.0), (float("inf"), 64.0), (2.0**-9, 2.0)])
def test_collapsed_scale_of_a_checkpoint_is_brought_back_with_a_warning(loaded: float, used: float) -> None:
    scaler = GradScaler("cpu", 4.0, floor=2.0, ceiling=64.0)
    with pytest.warns(UserWarning, match=f"going on with {used:g}"):
        scaler.load_state_dict({**torch.amp.GradScaler("cpu").state_dict(), "scale": loaded})
    assert scaler.get_scale() == used


def test_new_scale_stays_within_the_bounds() -> None:
    scaler = GradScaler("cpu", 4.0, floor=2.0, ceiling=64.0)
    scaler.scale(torch.ones(()))
    scaler.update(32.0)
    assert scaler.get_scale() == 32.0
    scaler.update(torch.tensor(16.0))
    assert scaler.get_scale() == 16.0
    scaler.update(torch.tensor(0.0))
    assert scaler.get_scale() == 2.0
    with pytest.raises(ModelError, match="between floor 2 and ceiling 64; got 128"):
        scaler.update(128.0)


@BOTH
def test_preset_grad_scale_is_multiplied(kind: type[torch.amp.GradScaler]) -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = SGD([weight], lr=1.0, fused=True)
    optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
    scaler = kind("cpu", 8.0)
    (scaler.scale(weight.sum()) * 4.0).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.0] * 4
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@BOTH
def test_optimizer_of_the_older_contract_is_handed_the_scaler(kind: type[torch.amp.GradScaler]) -> None:
    class Older(SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None, *, grad_scaler: Any = None) -> Any:
            grad_scaler.unscale_(self)
            if not any(found.item() for found in grad_scaler._found_inf_per_device(self).values()):
                super().step()

    model, twin = make_mlp(), make_mlp()
    train(twin, SGD(twin.parameters(), lr=0.1), None, "..x.")
    scaler = kind("cpu", 2.0**10)
    with pytest.warns(FutureWarning, match="stop passing itself"):
        train(model, Older(model.parameters(), lr=0.1), scaler, "..x.")
    assert_same(copy_weights(model), copy_weights(twin))
    assert scaler.get_scale() == 2.0**9


class Reads(TorchDispatchMode):
    """Counts how often the host waits for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
def test_host_waits_no_more_than_with_torch_but_for_a_look_each_skip_limit(fused: bool) -> None:
    counts = []
    for scaler in (torch.amp.GradScaler("cpu", 2.0**10), make_scaler(skip_limit=None), make_scaler(skip_limit=10)):
        model = make_mlp()
        optimizer = Adam(model.parameters(), fused=fused)
        batches = make_regression_batches(30)
        with Reads() as reads:
            for batch in batches:
                optimizer.zero_grad()
                scaler.scale(loss_of(model, batch)).backward()
                scaler.step(optimizer)
                scaler.update()
        counts.append(reads.count)
    assert counts == [counts[0], counts[0], counts[0] + 3]
    assert fused or counts[0] >= 30


def test_fused_step_reads_nothing_and_stays_on_its_device() -> None:
    """On the meta device there is nothing that could be read."""

    class Fused(SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None) -> Any:
            assert self.grad_scale.is_meta and self.found_inf.is_meta  # type: ignore[attr-defined]

    model = make_mlp().to("meta")
    scaler, optimizer = make_scaler(hysteresis=2), Fused(model.parameters(), lr=0.1)
    for x, y in make_regression_batches(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, (x.to("meta"), y.to("meta")))).backward()
        scaler.step(optimizer)
        scaler.update()
    with pytest.raises(RuntimeError, match="meta"):
        scaler.get_scale()
    with pytest.raises(RuntimeError, match="meta"):
        scaler.get_outcome()


# -- 1 and 2: bounds, hysteresis, limit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_weights_stay_finite_after_1000_overflows(fused: bool) -> None:
    control, model = make_mlp(), make_mlp()
    scaler = GradScaler("cpu", skip_limit=None)
    optimizer = Adam(model.parameters(), fused=fused)
    batch = make_regression_batches(1)[0]
    scaler.scale(loss_of(model, batch)).backward()
    overflow(model)
    for _ in range(1000):
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1.0
    assert_same(copy_weights(model), copy_weights(control))
    train(model, optimizer, scaler, ".")
    train(control, Adam(control.parameters(), fused=fused), None, ".")
    assert_same(copy_weights(model), copy_weights(control))


def test_scale_stays_below_the_ceiling_and_backs_off_with_hysteresis() -> None:
    model = make_mlp()
    scaler = make_scaler(2.0, growth_interval=1, ceiling=8.0, hysteresis=2)
    optimizer = SGD(model.parameters(), lr=0.1)
    seen = []
    for step in "....xx.x.xxx":
        train(model, optimizer, scaler, step)
        seen.append(scaler.get_scale())
    assert seen == [4.0, 8.0, 8.0, 8.0, 8.0, 4.0, 8.0, 8.0, 8.0, 8.0, 4.0, 4.0]


@pytest.mark.parametrize("fused", [False, True])
def test_run_that_only_skips_ends_with_what_to_do(fused: bool) -> None:
    model = make_mlp()
    scaler = make_scaler(skip_limit=5)
    optimizer = Adam(model.parameters(), fused=fused)
    train(model, optimizer, scaler, "...xxxx....xxxx")  # looked at after 5, 10 and 15
    with pytest.raises(TrainingError, match=r"9 updates in a row .* skip_limit is 5 .* down to 1; .*floor below 1"):
        train(model, optimizer, scaler, "xxxxx")
    assert issubclass(TrainingError, HalfstepError)
    train(model, optimizer, scaler, ".....")  # what the error left can go on


# -- 3: closures --------------------------------------------------------------------------------------------------------------


class SAM(Optimizer):
    """Foret et al. 2021: the gradient is taken where the loss is highest nearby."""

    def __init__(self, parameters: Any, rho: float = 0.05) -> None:
        super().__init__(parameters, {"rho": rho})
        self.inner = SGD(self.param_groups, lr=0.1, momentum=0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        held = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in held]).norm() + 1e-12
        for p in held:
            self.state[p]["here"] = p.clone()
            p.add_(p.grad, alpha=float(self.param_groups[0]["rho"] / norm))
        loss = torch.enable_grad()(closure)()
        for p in held:
            p.copy_(self.state[p]["here"])
        self.inner.step()
        return loss


CLOSED: dict[str, MakeOptimizer] = {
    "lbfgs": lambda p: LBFGS(p, lr=0.3, max_iter=4),
    "lbfgs-wolfe": lambda p: LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
    "sam": SAM,
    "adam-fused": lambda p: Adam(p, lr=1e-2, fused=True),
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9),
}


class ClosedRun:
    """Trains with closures; `poison` is the call of each closure, from 1, whose gradient overflows."""

    def __init__(self, name: str, scaler: GradScaler | None, *, given: str = "position", back: str = "loss") -> None:
        self.model, self.name, self.scaler, self.given, self.back = make_mlp(), name, scaler, given, back
        self.optimizer = CLOSED[name](self.model.parameters())
        self.returned: list[float] = []

    def backward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.optimizer.zero_grad()
        loss = loss_of(self.model, batch)
        scaled = self.scaler.scale(loss) if self.scaler else loss
        scaled.backward()
        return {"loss": loss, "scaled": scaled, "detached": scaled.detach()}[self.back]

    def step(self, batch: tuple[Tensor, Tensor], poison: int = 0) -> Any:
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            loss = self.backward(batch)
            if calls == poison:
                overflow(self.model)
            return loss

        if self.name == "sam":
            self.backward(batch)
            if poison == -1:
                overflow(self.model)
        step: Any = self.scaler.step if self.scaler else lambda optimizer, *a, **k: optimizer.step(*a, **k)
        given = {"closure": closure} if self.given == "keyword" else {}
        result = step(self.optimizer, *([] if given else [closure]), **given)
        if self.scaler:
            self.scaler.update()
        return result


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("given", ["position", "keyword"])
@pytest.mark.parametrize("back", ["loss", "scaled", "detached"])
def test_closure_trains_the_twin(name: str, given: str, back: str) -> None:
    control = ClosedRun(name, None)
    run = ClosedRun(name, make_scaler(), given=given, back=back)
    for batch in make_regression_batches(6):
        loss, expected = run.step(batch), control.step(batch)
        assert float(loss.detach()) == float(expected.detach())
    assert_same(copy_weights(run.model), copy_weights(control.model))
    assert run.scaler is not None and run.scaler.get_outcome().step == 6
    assert run.scaler.get_scale() == 2.0**13


@pytest.mark.parametrize(
    ("name", "poison"),
    [("lbfgs", 1), ("lbfgs", 3), ("lbfgs-wolfe", 2), ("sam", 1), ("sam", -1), ("adam-fused", 1), ("sgd", 1)],
)
def test_overflow_within_a_closure_undoes_the_whole_step(name: str, poison: int) -> None:
    control, run = ClosedRun(name, None), ClosedRun(name, make_scaler(growth_interval=100))
    assert run.scaler is not None
    for number, batch in enumerate(make_regression_batches(6)):
        if number not in (0, 3):
            control.step(batch)
            run.step(batch)
            continue
        weights, state = copy_weights(run.model), copy_state(run.optimizer)
        inner = copy_state(run.optimizer.inner) if isinstance(run.optimizer, SAM) else None
        assert run.step(batch, poison) is None
        assert_same(copy_weights(run.model), weights)
        assert_same_states(run.optimizer.state_dict(), state)
        assert inner is None or isinstance(run.optimizer, SAM)
        if isinstance(run.optimizer, SAM):
            assert_same_states(run.optimizer.inner.state_dict(), inner)
        assert run.scaler.get_outcome().skipped
        assert run.scaler.get_outcome().tensors == ("param_groups[0]['params'][0]",)
    assert_same(copy_weights(run.model), copy_weights(control.model))
    assert run.scaler.get_scale() == 2.0**8


def test_optimizer_that_steps_what_it_wraps_before_the_closure_is_undone_with_it() -> None:
    class Lookahead(SAM):
        def step(self, closure: Any = None) -> Any:
            self.inner.step()
            self.param_groups[0]["rho"] *= 2
            self.param_groups[0]["new"] = 1
            return closure()

    model = make_mlp()
    optimizer, scaler = Lookahead(model.parameters()), make_scaler()

    def closure() -> Tensor:
        take_backward(scaler, model)
        overflow(model)
        return torch.zeros(())

    take_backward(scaler, model)
    weights, state = copy_weights(model), copy_state(optimizer)
    scaler.step(optimizer, closure)
    assert scaler.get_outcome().skipped
    assert_same(copy_weights(model), weights)
    assert_same_states(optimizer.state_dict(), state)
    assert optimizer.inner.state_dict()["state"] == {}


def test_closure_may_accumulate_and_clip() -> None:
    class Twice(SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            closure()
            super().step()

    def train_twice(model: nn.Module, scaler: GradScaler | None) -> None:
        optimizer = Twice(model.parameters(), lr=0.1)
        for batch in make_regression_batches(4):
            optimizer.zero_grad()

            def closure(batch: tuple[Tensor, Tensor] = batch) -> None:
                loss = loss_of(model, batch)
                (scaler.scale(loss) if scaler else loss).backward()
                if scaler:
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)

            if scaler:
                scaler.step(optimizer, closure)
                scaler.update()
            else:
                optimizer.step(closure)

    control, model = make_mlp(), make_mlp()
    train_twice(control, None)
    train_twice(model, make_scaler())
    assert_same(copy_weights(model), copy_weights(control))


def test_closure_without_scale_is_refused_and_undone() -> None:
    model = make_mlp()
    optimizer, scaler = LBFGS(model.parameters()), make_scaler()

    def closure() -> Tensor:
        loss = loss_of(model, make_regression_batches(1)[0])
        loss.backward()
        return loss

    for _ in range(2):
        with pytest.raises(ModelError, match=r"did not call scaler\.scale\(\); let it call"):
            scaler.step(optimizer, closure)
        scaler.scale(torch.ones(()))
    assert optimizer.state_dict()["state"] == {}
    assert_same(copy_weights(model), copy_weights(make_mlp()))


def test_error_within_a_closure_leaves_weights_as_they_were() -> None:
    run = ClosedRun("sam", make_scaler())
    batch = make_regression_batches(1)[0]
    run.backward(batch)
    weights = copy_weights(run.model)
    with pytest.raises(KeyboardInterrupt):
        assert run.scaler is not None
        run.scaler.step(run.optimizer, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert_same(copy_weights(run.model), weights)


def test_closure_by_keyword_behind_another_argument() -> None:
    class Loud(SGD):
        def step(self, note: str, closure: Any = None) -> Any:  # type: ignore[override]
            return note, super().step(closure)

    model, twin = make_mlp(), make_mlp()
    train(twin, SGD(twin.parameters(), lr=0.1), None, ".")
    scaler, optimizer = make_scaler(), Loud(model.parameters(), lr=0.1)

    def closure() -> float:
        scaler.scale(loss_of(model, make_regression_batches(1)[0])).backward()
        return 1.0

    returned: Any = scaler.step(optimizer, "note", closure=closure)
    assert returned == ("note", 1.0)
    assert_same(copy_weights(model), copy_weights(twin))


@pytest.mark.parametrize("sparse", [False, True])
def test_closure_with_an_embedding_adds_to_gradients_that_are_there(sparse: bool) -> None:
    class Twice(SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            super().step(closure)

    with seeded(0):
        embedding, twin = nn.Embedding(6, 3, sparse=sparse), nn.Embedding(6, 3, sparse=sparse)
    twin.load_state_dict(embedding.state_dict())
    scaler = make_scaler()
    words = torch.tensor([1, 1, 4])
    scaler.step(Twice(embedding.parameters(), lr=1.0), lambda: scaler.scale(embedding(words).square().sum()).backward())
    Twice(twin.parameters(), lr=1.0).step(lambda: twin(words).square().sum().backward())
    assert_same(copy_weights(embedding), copy_weights(twin))


@pytest.mark.parametrize("given", [{"args": (None,)}, {"closure": None}])
def test_closure_that_is_none_is_no_closure(given: dict[str, Any]) -> None:
    model, twin = make_mlp(), make_mlp()
    train(twin, SGD(twin.parameters(), lr=0.1), None, ".")
    scaler, optimizer = make_scaler(), SGD(model.parameters(), lr=0.1)
    scaler.scale(loss_of(model, make_regression_batches(1)[0])).backward()
    scaler.step(optimizer, *given.pop("args", ()), **given)
    assert_same(copy_weights(model), copy_weights(twin))


def test_step_with_closure_twice_raises_as_without() -> None:
    run = ClosedRun("sgd", make_scaler())
    assert run.scaler is not None
    run.scaler.step(run.optimizer, lambda: run.backward(make_regression_batches(1)[0]))
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last update\(\)\."):
        run.scaler.step(run.optimizer, lambda: None)


# -- 4: no gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_optimizer_without_gradients_does_nothing(fused: bool, unscaled: bool) -> None:
    idle, model = make_mlp(), make_mlp()
    scaler = make_scaler(growth_interval=1)
    optimizer = Adam(idle.parameters(), fused=fused)
    scaler.scale(loss_of(model, make_regression_batches(1)[0])).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    assert scaler.step(optimizer) is None
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(optimizer)
    scaler.update()
    outcome = scaler.get_outcome(optimizer)
    assert (outcome.status, outcome.step, outcome.tensors) == ("skipped", 0, ())
    assert outcome.cause == "no parameter that the optimizer holds received a gradient"
    assert outcome.scale_before == outcome.scale_after == 2.0**10
    assert optimizer.state_dict()["state"] == {}


def test_optimizer_without_gradients_beside_one_with() -> None:
    idle, model = make_mlp(), make_mlp()
    scaler = make_scaler(growth_interval=1)
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler.scale(loss_of(model, make_regression_batches(1)[0])).backward()
    scaler.step(optimizer)
    scaler.step(SGD(idle.parameters(), lr=0.1))
    scaler.update()
    assert scaler.get_outcome(optimizer).applied
    assert scaler.get_scale() == 2.0**11


# -- 5: gradients changed while scaled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("explicit", "fused"), [(False, False), (True, False), (False, True)])
def test_clipping_before_unscaling_is_noticed_once(explicit: bool, fused: bool) -> None:
    model = make_mlp()
    scaler = make_scaler()
    scaler.name_parameters(model)
    optimizer = SGD(model.parameters(), lr=0.1, fused=fused)
    noticed = []
    for batch in make_regression_batches(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if explicit:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        noticed += [str(one.message) for one in caught] or [""]
    assert [bool(text) for text in noticed] == [False, True, False, False]
    assert noticed[1].startswith("6 gradients, the first of 0.weight, were changed in place")
    assert "call scaler.unscale_(optimizer) first" in noticed[1]


def test_adding_the_gradients_of_an_unscaled_loss_is_noticed() -> None:
    model, scaler = make_mlp(), make_scaler()
    optimizer = SGD(model.parameters(), lr=0.1)
    train(model, optimizer, scaler, ".")
    optimizer.zero_grad()
    scaler.scale(loss_of(model, make_regression_batches(1)[0])).backward()
    loss_of(model, make_regression_batches(1)[0]).backward()
    with pytest.warns(UserWarning, match="changed in place"):
        scaler.step(optimizer)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_usual_loops_are_not_warned_of(set_to_none: bool) -> None:
    """Two optimizers whose losses reach both, accumulation, clipping after unscaling, changes within the backward pass."""
    models = [make_mlp(0), make_mlp(1)]
    optimizers = [SGD(model.parameters(), lr=0.1) for model in models]
    scaler = make_scaler()
    changes = 0

    def average(parameter: Tensor) -> None:
        def finish() -> None:
            nonlocal changes
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)
            changes += 1

        torch.autograd.Variable._execution_engine.queue_callback(finish)

    for parameter in models[0].parameters():
        parameter.register_post_accumulate_grad_hook(average)
    for batch in make_regression_batches(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad(set_to_none=set_to_none)
            for _ in range(2):
                both = (models[0](batch[0]) + models[1](batch[0]) - batch[1]).square().mean()
                scaler.scale(both + loss_of(model, batch)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
        scaler.update()
    assert changes == 4 * 2 * 2 * 6


def test_zeroed_gradients_are_no_change() -> None:
    model, scaler = make_mlp(), make_scaler()
    optimizer = SGD(model.parameters(), lr=0.1)
    train(model, optimizer, scaler, "..")
    weights = copy_weights(model)
    optimizer.zero_grad(set_to_none=False)
    scaler.step(optimizer)
    assert_same(copy_weights(model), weights)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("bucket_view", [False, True])
def test_data_parallel_model_trains_the_twin_without_a_warning(one_rank: None, bucket_view: bool) -> None:
    control, model = make_mlp(), make_mlp()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    train(control, SGD(control.parameters(), lr=0.1), None, ".x...", accumulate=2)
    train(wrapped, SGD(wrapped.parameters(), lr=0.1), make_scaler(), ".x...", accumulate=2)
    assert_same(copy_weights(model), copy_weights(control))


def test_distributed_tensors_train_the_twin(one_rank: None) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    control = make_mlp()
    model = make_mlp()
    for module in model:
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()])))
    scaler = make_scaler()
    scaler.name_parameters(model)
    optimizer, plain = SGD(model.parameters(), lr=0.1), SGD(control.parameters(), lr=0.1)
    for batch, poisoned in zip(make_regression_batches(4), (False, True, False, False), strict=True):
        optimizer.zero_grad()
        x, y = (distribute_tensor(one, mesh, [Replicate()]) for one in batch)
        scaler.scale(loss_of(model, (x, y)) * (torch.inf if poisoned else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_outcome().skipped is poisoned
        assert len(scaler.get_outcome().tensors) == 6 * poisoned
        if not poisoned:
            plain.zero_grad()
            loss_of(control, batch).backward()
            plain.step()
    for (_, one), (_, other) in zip(model.named_parameters(), control.named_parameters(), strict=True):
        assert isinstance(one, DTensor)
        assert torch.equal(one.to_local(), other)


# -- 6: outcomes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_outcome_says_what_why_and_where(fused: bool) -> None:
    model = make_mlp()
    scaler, optimizer = make_scaler(growth_interval=100), Adam(model.parameters(), fused=fused)
    scaler.name_parameters(model)
    with pytest.raises(TrainingError, match=r"call scaler\.step\(optimizer\)"):
        scaler.get_outcome()
    scaler.scale(loss_of(model, make_regression_batches(1)[0])).backward()
    for index in (0, 4):
        gradient = list(model.parameters())[index].grad
        assert gradient is not None
        gradient.view(-1)[0] = torch.nan
    scaler.step(optimizer)
    before = scaler.get_outcome()
    scaler.update()
    after = scaler.get_outcome(optimizer)
    assert (before.scale_before, before.scale_after) == (1024.0, 1024.0)
    assert (after.scale_before, after.scale_after) == (1024.0, 512.0)
    assert after.status == "skipped" and after.step == 0
    assert after.tensors == ("0.weight", "4.weight")
    assert after.cause == "2 gradients are not finite, the first is 0.weight"
    train(model, optimizer, scaler, "x.")
    assert scaler.get_outcome().applied and scaler.get_outcome().step == 1
    assert scaler.get_outcome().scale_before == scaler.get_outcome().scale_after == 256.0
    with pytest.raises(TrainingError):
        scaler.get_outcome(SGD(model.parameters(), lr=0.1))


def test_outcome_of_a_fused_step_that_is_read_late_does_not_guess() -> None:
    model = make_mlp()
    scaler, optimizer = make_scaler(), Adam(model.parameters(), fused=True)
    train(model, optimizer, scaler, "x")
    optimizer.zero_grad()
    loss_of(model, make_regression_batches(1)[0]).backward()
    overflow(model)
    assert scaler.get_outcome().skipped and scaler.get_outcome().tensors == ()
    assert scaler.get_outcome().cause.startswith(
        "a gradient is not finite; it was on another rank, or has been replaced"
    )


def test_outcomes_use_the_names_that_an_optimizer_knows() -> None:
    model = make_mlp()
    scaler = make_scaler()
    train(model, SGD(model.named_parameters(), lr=0.1), scaler, "x")
    assert scaler.get_outcome().tensors == ("0.weight",)


def test_step_returns_what_the_optimizer_returns() -> None:
    class Answer(SGD):
        def step(self, closure: Any = None) -> Any:
            super().step()
            return 42.0

    model = make_mlp()
    scaler, optimizer = make_scaler(), Answer(model.parameters(), lr=0.1)
    take_backward(scaler, model)
    assert scaler.step(optimizer) == 42.0


# -- 7: fp16 ----------------------------------------------------------------------------------------------------------------


def test_fp16_gradients_are_refused_with_what_to_do() -> None:
    model = make_mlp().half()
    scaler, optimizer = make_scaler(), SGD(model.parameters(), lr=0.1)
    scaler.scale(model(torch.ones(1, 8, dtype=torch.float16)).sum()).backward()
    with pytest.raises(ValueError, match=r"Attempting to unscale FP16 gradients\. .*halfstep\.prepare") as caught:
        scaler.step(optimizer)
    assert isinstance(caught.value, ModelError)


def test_gradients_that_vanish_in_fp16_are_lifted() -> None:
    weight = nn.Parameter(torch.zeros(4))
    scaler, optimizer = GradScaler("cpu", 2.0**16), SGD([weight], lr=1.0)
    loss = (weight.to(torch.float16) * 2.0**-15).to(torch.float32).sum() * 2.0**-12
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert weight.tolist() == [-(2.0**-27)] * 4  # 2^-25 is the smallest that fp16 does not round to 0


def test_a_disabled_scaler_keeps_nothing_of_its_steps() -> None:
    model = nn.Linear(2, 1)
    optimizer, scaler = SGD(model.parameters(), lr=0.1), GradScaler("cpu", enabled=False)
    for _ in range(3):
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not scaler._memory.open


def test_unscaling_twice_is_torchs_error_and_no_warning_of_clipping() -> None:
    model = nn.Linear(2, 1)
    optimizer, scaler = SGD(model.parameters(), lr=0.1), GradScaler("cpu")
    for _ in range(3):
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
