"""Optimizer steps in one pass behind masters: the bits of torch's own, and torch's own wherever somebody could tell."""

import copy
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from halfstep.mechanisms.master_weights import MasterWeights
from halfstep.mechanisms.optimizer_states import NarrowStates
from halfstep.numerics import native_steps
from halfstep.numerics.codebooks import SMALLEST, Quantized
from halfstep.numerics.movement import Watch
from halfstep.numerics.updates import KERNELS
from halfstep.stepper import prepare
from helpers import bits, make_mlp, narrow_all, seeded, train_in_two_ways

SHAPES = [(32, 5), (64,), (4, 8, 2, 2), (33,), (), (0, 3)]
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW fused": (AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "Adam": (Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "Adam, lr a tensor": (Adam, {"lr": torch.tensor(0.01)}),
    "SGD": (SGD, {"lr": 0.05}),
    "SGD momentum": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "SGD nesterov": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "foreach": True}),
}
kinds = pytest.mark.parametrize("name", KINDS)
pytestmark = pytest.mark.skipif(KERNELS.library.functions is None, reason=KERNELS.library.why)


def parameters() -> list[nn.Parameter]:
    with seeded(0):
        tensors = [torch.randn(shape) for shape in SHAPES]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in tensors]


def gradients(steps: int, dtype: torch.dtype = torch.float32) -> Iterator[list[Tensor]]:
    noise = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [torch.randn(shape, generator=noise).to(dtype) for shape in SHAPES]


def build(name: str, params: list[nn.Parameter], **extra: Any) -> Optimizer:
    kind, options = KINDS[name]
    made: Optimizer = kind(params, **copy.deepcopy(options) | extra)  # a schedule changes a tensor in place
    return made


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step that torch computes fail, without a trace that would be seen."""

    def fail(*_: object) -> None:
        raise AssertionError("torch was asked to step")

    monkeypatch.setattr(sys.modules["torch.optim.sgd"], "sgd", fail)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "adam", fail)


@kinds
@pytest.mark.parametrize("kind", ["split", "fp32", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_updates_have_torchs_bits_and_torch_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: str, dtype: torch.dtype
) -> None:
    dtype = torch.float32 if kind == "none" else dtype
    found = []
    for fused in (False, True):
        params = parameters()
        masters = narrow_all(MasterWeights(fused=fused), params, kind)
        optimizer = build(name, params, **({} if fused or not KINDS[name][1].get("fused") else {"fused": False}))
        with monkeypatch.context() as patch:
            if fused:
                refuse(patch)
            for fresh in gradients(20, dtype):
                masters.step(optimizer, dict(zip(params, fresh, strict=True)), 0.3)
        found.append((params, masters, optimizer))
    (theirs, their_masters, reference), (ours, our_masters, optimizer) = found
    near = "fused" in name  # torch's fused kernels take other square roots
    for a, b in zip(ours, theirs, strict=True):
        if near:
            torch.testing.assert_close(our_masters.read(a), their_masters.read(b), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(bits(our_masters.read(a)), bits(their_masters.read(b)))
            assert torch.equal(a, b)
        assert a.grad is None
        assert list(optimizer.state[a]) == list(reference.state[b])
        for key, value in optimizer.state[a].items():
            like = reference.state[b][key]
            assert (value.dtype, value.shape, value.device) == (like.dtype, like.shape, like.device)
            assert not value.requires_grad
            assert near or torch.equal(value, like)


@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "SGD momentum"])
def test_split_equals_fp32_storage_over_200_steps_with_clipping_and_decay(name: str) -> None:
    wide, narrowed = parameters(), parameters()
    masters = narrow_all(MasterWeights(), narrowed, "split")
    optimizers = build(name, wide), build(name, narrowed)
    for i, fresh in enumerate(gradients(200, torch.bfloat16)):
        factor = 1.0 / (1 + i % 7)
        MasterWeights().step(optimizers[0], {p: g.float() for p, g in zip(wide, fresh, strict=True)}, factor)
        masters.step(optimizers[1], dict(zip(narrowed, fresh, strict=True)), factor)
    for a, b in zip(wide, narrowed, strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(bits(a.detach()), bits(masters.read(b)))


@kinds
@pytest.mark.parametrize("kind", ["split", "fp32", "none"])
def test_watched_steps_give_the_same_bits_and_the_records_of_torchs(name: str, kind: str) -> None:
    found, stalls = [], []
    for fused, watch in ((True, False), (True, True), (False, True)):
        params = parameters()
        masters = narrow_all(MasterWeights(fused=fused), params, kind)
        optimizer = build(name, params, lr=1e-10)
        for fresh in gradients(3):
            seen = masters.step(optimizer, dict(zip(params, fresh, strict=True)), 0.5, watch=watch)
        found.append([masters.read(p) for p in params])
        stalls.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert stalls[0] == () and len(stalls[1]) == 1
    if "fused" not in name:
        assert stalls[1] == stalls[2]


def test_a_watched_step_holds_no_wide_weight_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    inner = Watch.judge

    def judge(watch: Watch) -> tuple[Any, ...]:
        held.extend(parameter.numel() for parameter in watch._seen)
        return inner(watch)

    monkeypatch.setattr(Watch, "judge", judge)
    params = parameters()
    masters = narrow_all(MasterWeights(), params, "split")
    masters.step(AdamW(params), dict(zip(params, next(gradients(1)), strict=True)), watch=True)
    assert held == [0] * len(params)


@kinds
def test_state_dicts_go_to_plain_torch_and_back_in_the_middle(name: str) -> None:
    straight, broken = parameters(), parameters()
    one, other = train_in_two_ways(
        partial(build, name), straight, broken, gradients(12), lambda i: bool(i % 3) or "fused" in name
    )
    for a, b in zip(straight, broken, strict=True):
        assert torch.equal(bits(a.detach()), bits(b.detach()))
        for key, value in one.state[a].items():
            assert torch.equal(value, other.state[b][key])


def test_parameters_that_go_either_way_may_stand_in_one_optimizer() -> None:
    found = []
    for fused in (False, True):
        params = parameters()
        masters = MasterWeights(seed=3, fused=fused)
        for parameter, kind in zip(params, ("split", "kahan", "fp32", "stochastic", "split24"), strict=False):
            masters.narrow(parameter, torch.bfloat16, kind)
        groups: list[dict[str, Any]] = [
            {"params": params[:2]},
            {"params": params[2:4], "amsgrad": True},
            {"params": params[4:]},
        ]
        optimizer = AdamW(groups)
        for fresh in gradients(10):
            masters.step(optimizer, dict(zip(params, fresh, strict=True)))
        found.append([masters.read(p) for p in params])
        described = masters.describe_updates(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert described.startswith("native; torch for 4 of 6 parameters: ")
    named = ("amsgrad=True has no kernel", "master 'kahan' behind bf16", "master 'split24' behind bf16")
    assert all(words in described for words in named)


LARGE = [(70, 65), (64,), (4096,), (64, 8, 3, 3), (4095,), (33, 200)]


def build_narrow(
    optimizer_of: Any, *, kind: str, fused: bool, seed: int = 0
) -> tuple[list[nn.Parameter], MasterWeights, Optimizer, NarrowStates]:
    with seeded(seed):
        params = [nn.Parameter(torch.randn(shape)) for shape in LARGE]
    masters = narrow_all(MasterWeights(fused=fused), params, kind)
    optimizer = optimizer_of(params)
    return params, masters, optimizer, NarrowStates(optimizer)


def draw_large(turn: int, dtype: torch.dtype) -> list[Tensor]:
    noise = torch.Generator().manual_seed(turn)
    return [torch.randn(shape, generator=noise).to(dtype) for shape in LARGE]


def step_narrow(
    made: tuple[Any, MasterWeights, Optimizer, NarrowStates], turn: int, dtype: torch.dtype, **words: Any
) -> Any:
    params, masters, optimizer, states = made
    given = dict(zip(params, draw_large(turn, dtype), strict=True))
    return masters.step(optimizer, given, 0.3, widened=states.widened, **words)


NARROW_KINDS = {
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "Adam": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "groups": lambda p: AdamW([{"params": p[:3]}, {"params": p[3:], "lr": 0.1, "weight_decay": 0.0}]),
}
narrow_kinds = pytest.mark.parametrize("name", NARROW_KINDS)


@narrow_kinds
@pytest.mark.parametrize("kind", ["split", "fp32", "none"])
@pytest.mark.parametrize("watch", [False, True])
def test_states_in_8_bits_have_the_bits_of_torchs_steps_in_fp32_between_two_roundings(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: str, watch: bool
) -> None:
    dtype = torch.float32 if kind == "none" else torch.bfloat16
    found = []
    for fused in (False, True):
        made = build_narrow(NARROW_KINDS[name], kind=kind, fused=fused)
        with monkeypatch.context() as patch:
            if fused:
                refuse(patch)
                assert made[1].describe_updates(made[2], narrow=True) == KERNELS.way
            for turn in range(8):
                step_narrow(made, turn, dtype, watch=watch)
        found.append(made)
    for a, b in zip(*(made[0] for made in found), strict=True):
        assert torch.equal(bits(found[0][1].read(a)), bits(found[1][1].read(b)))
        theirs, ours = found[0][2].state[a], found[1][2].state[b]
        assert list(theirs) == list(ours) and theirs["step"] == ours["step"] == 8
        for key in ("exp_avg", "exp_avg_sq"):
            assert isinstance(ours[key], Quantized) == isinstance(theirs[key], Quantized) == (a.numel() >= SMALLEST)
            if isinstance(ours[key], Quantized):
                assert (ours[key].signed, ours[key].shape) == (theirs[key].signed, theirs[key].shape)
                assert torch.equal(ours[key].codes, theirs[key].codes)
                assert torch.equal(ours[key].scales, theirs[key].scales)
            else:
                assert torch.equal(ours[key], theirs[key])


@narrow_kinds
@pytest.mark.parametrize("fused", [False, True])
def test_states_in_8_bits_are_saved_and_go_on_in_either_way(name: str, fused: bool) -> None:
    straight = build_narrow(NARROW_KINDS[name], kind="split", fused=fused)
    for turn in range(4):
        step_narrow(straight, turn, torch.bfloat16)
    saved = copy.deepcopy(straight[2].state_dict())
    values = [straight[1].read(p) for p in straight[0]]
    other = build_narrow(NARROW_KINDS[name], kind="split", fused=not fused, seed=1)
    for parameter, value in zip(other[0], values, strict=True):
        other[1].write(parameter, value)
    other[2].load_state_dict(saved)
    for index, parameter in enumerate(other[0]):  # in fp32, as a stepper's Optimizers takes them
        other[2].state[parameter].update({k: v.clone() for k, v in saved["state"][index].items()})
    other[3].narrow(other[0])
    for turn in range(4, 8):
        step_narrow(straight, turn, torch.bfloat16)
        step_narrow(other, turn, torch.bfloat16)
    for a, b in zip(straight[0], other[0], strict=True):
        assert torch.equal(bits(straight[1].read(a)), bits(other[1].read(b)))


def test_states_that_overflow_are_stepped_by_torch_and_come_back_to_the_kernel() -> None:
    found = []
    for fused in (False, True):
        made = build_narrow(NARROW_KINDS["AdamW"], kind="split", fused=fused)
        params, masters, optimizer, states = made
        for turn, size in enumerate((1.0, 1e30, 1.0)):
            given = dict(zip(params, draw_large(turn, torch.float32), strict=True))
            given[params[0]][3, 4] = size
            masters.step(optimizer, given, widened=states.widened)
        state = optimizer.state[params[0]]
        assert isinstance(state["exp_avg"], Quantized) and state["exp_avg_sq"][3, 4] == torch.inf
        assert isinstance(optimizer.state[params[2]]["exp_avg_sq"], Quantized)
        found.append([masters.read(p) for p in params] + [state["step"]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_states_in_8_bits_that_are_left_to_torch_say_why() -> None:
    with seeded(0):
        params = [nn.Parameter(torch.randn(128, 64).T), nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(5))]
    masters = MasterWeights()
    described = masters.describe_updates(AdamW(params), narrow=True)
    assert described.endswith(
        "torch for 1 of 3 parameters: 8-bit states have no kernel for weights that do not lie row by row"
    )
    described = masters.describe_updates(SGD(params, momentum=0.9), narrow=True)
    assert described.startswith("native; ")
    assert described.endswith("torch for 2 of 3 parameters: momentum in 8 bits has no kernel")
    assert masters.describe_updates(SGD(params), narrow=True) == KERNELS.way
    table = nn.Parameter(torch.randn(100, 64))
    sparse = torch.optim.SparseAdam([table])
    assert masters.describe_updates(sparse, narrow=True) == "torch: 8-bit states have no kernel for sparse gradients"


@pytest.mark.parametrize("make", [AdamW, lambda p: SGD(p, lr=0.1, momentum=0.9)])
def test_states_in_8_bits_that_are_left_to_torch_are_the_same(make: Any) -> None:
    found = []
    for fused in (False, True):
        with seeded(0):
            params = [nn.Parameter(torch.randn(128, 64).T), nn.Parameter(torch.randn(64, 64))]
            masters, optimizer = MasterWeights(fused=fused), make(params)
            states = NarrowStates(optimizer)
            for _ in range(5):
                masters.step(optimizer, {p: torch.randn(p.shape) for p in params}, widened=states.widened)
        assert all(isinstance(v, Quantized) for p in params for k, v in optimizer.state[p].items() if k != "step")
        found.append([p.detach() for p in params])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))


class Mine(AdamW):
    """A subclass, which may do anything."""


REASONS: dict[str, Any] = {
    "Mine has no kernel": lambda p: Mine(p),
    "RMSprop has no kernel": lambda p: torch.optim.RMSprop(p),
    "amsgrad=True has no kernel": lambda p: AdamW(p, amsgrad=True),
    "maximize=True has no kernel": lambda p: SGD(p, maximize=True),
    "a hyperparameter is a tensor": lambda p: AdamW(p, betas=(torch.tensor(0.9), torch.tensor(0.99))),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_left_to_torch_says_why_and_is_the_same(reason: str) -> None:
    found = []
    for fused in (True, False):
        params = parameters()
        masters = narrow_all(MasterWeights(fused=fused), params, "split")
        optimizer = REASONS[reason](params)
        for fresh in gradients(3):
            masters.step(optimizer, dict(zip(params, fresh, strict=True)))
        found.append([masters.read(p) for p in params])
        assert masters.describe_updates(optimizer) == f"torch: {reason if fused else 'fused=False'}"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_replaced_steps_and_hooks_are_called() -> None:
    calls: list[str] = []
    params = parameters()
    masters = narrow_all(MasterWeights(), params, "split")

    def step(optimizer: Optimizer, reason: str) -> None:
        assert masters.describe_updates(optimizer) == f"torch: {reason}"
        masters.step(optimizer, dict(zip(params, next(gradients(1)), strict=True)))

    patched = AdamW(params)
    inner = patched.step

    def outer(*args: Any, **words: Any) -> Any:
        calls.append("patched")
        return inner(*args, **words)

    patched.step = outer  # type: ignore[method-assign]
    step(patched, "AdamW.step was replaced")
    hooked = AdamW(params)
    hooked.register_step_post_hook(lambda *_: calls.append("post"))
    step(hooked, "the optimizer has step hooks")
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append("everywhere"))
    try:
        step(SGD(params), "the optimizer has step hooks")
    finally:
        handle.remove()
    assert calls == ["patched", "post", "everywhere"]
    assert masters.describe_updates(SGD(params)) == "native"


def test_a_step_that_was_patched_before_a_scheduler_came_is_called() -> None:
    calls: list[str] = []

    class Patched:
        def step(self, *_: object) -> None:
            calls.append("mine")

    parameter, *_ = parameters()
    optimizer = AdamW([parameter])
    optimizer.step = Patched().step  # type: ignore[method-assign,assignment]
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    MasterWeights().step(optimizer, {parameter: torch.ones_like(parameter)})
    assert calls == ["mine"]


@kinds
def test_schedulers_see_that_the_optimizer_stepped(name: str) -> None:
    params = parameters()
    optimizer = build(name, params)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    masters = MasterWeights()
    assert masters.describe_updates(optimizer) == KERNELS.way
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masters.step(optimizer, dict(zip(params, next(gradients(1)), strict=True)))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(float(KINDS[name][1]["lr"]) / 2)


def test_gradients_stay_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    inner = native_steps.run_adam

    def note(functions: Any, group: Any, step: Any) -> None:
        seen.extend(gradient.dtype for _, gradient, *_ in group)
        inner(functions, group, step)

    monkeypatch.setattr(native_steps, "run_adam", note)
    masters, params = MasterWeights(), [nn.Parameter(torch.ones(8))]
    masters.narrow(params[0], torch.bfloat16, "split")
    masters.step(AdamW(params), {params[0]: torch.ones(8, dtype=torch.bfloat16)}, 0.5)
    assert seen == [torch.bfloat16]


def test_a_group_is_one_call_and_parameters_of_another_age_are_another(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    inner = native_steps.run_adam

    def note(functions: Any, group: Any, step: Any) -> None:
        calls.append(len(group))
        inner(functions, group, step)

    monkeypatch.setattr(native_steps, "run_adam", note)
    found = []
    for fused in (True, False):
        params, masters = parameters(), MasterWeights(fused=fused)
        optimizer = build("AdamW", params)
        for turn, fresh in enumerate(gradients(3)):  # two parameters have no gradient at first
            given = list(zip(params, fresh, strict=True))[2 if turn == 0 else 0 :]
            masters.step(optimizer, dict(given))
        found.append([p.detach() for p in params])
    assert calls == [4, 4, 2, 4, 2] or calls == [4, 2, 4, 2, 4]
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))


def test_versions_of_fp32_weights_move_so_that_kept_casts_are_made_anew() -> None:
    (parameter, *_) = parameters()
    before = parameter._version
    MasterWeights().step(SGD([parameter]), {parameter: torch.ones_like(parameter)})
    assert parameter._version > before


def test_weight_that_was_set_between_steps_is_the_truth() -> None:
    parameter, masters = nn.Parameter(torch.full((64,), 1.001)), MasterWeights()
    masters.narrow(parameter, torch.bfloat16, "split")
    with torch.no_grad():
        parameter.fill_(2.0)
    masters.step(SGD([parameter], lr=0.5), {parameter: torch.ones(64, dtype=torch.bfloat16)})
    assert masters.read(parameter).unique().tolist() == [1.5]


@pytest.mark.parametrize("release", [False, True])
def test_a_prepared_model_trains_to_the_same_bits_either_way(monkeypatch: pytest.MonkeyPatch, release: bool) -> None:
    found = []
    for fused in (True, False):
        with seeded(4):
            model = make_mlp()
            data = torch.randn(8, next(model.parameters()).shape[1])
        optimizer = AdamW(model.parameters(), lr=0.01)
        stepper = prepare(model, optimizer, "bf16-mixed", **({"release": True} if release else {"clip": 0.1}))
        stepper.conversion.masters.fused = fused
        with monkeypatch.context() as patch:
            if fused:
                refuse(patch)
            for _ in range(5):
                with stepper.autocast():
                    loss = stepper.model(data).float().square().mean()
                stepper.step(loss)
        found.append([p.detach().float().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
