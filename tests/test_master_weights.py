"""fp32 truth behind narrow weights: exact to the bit, for any optimizer."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from halfstep.conversion import convert
from halfstep.errors import UnsupportedError
from halfstep.mechanisms import master_weights
from halfstep.mechanisms.master_weights import DENSE, PARAMETERWISE, WAYS, MasterWeights
from halfstep.numerics import truths
from halfstep.numerics.movement import ELEMENTWISE
from halfstep.numerics.words import split_slowly
from halfstep.plan import Plan
from halfstep.stepper import prepare
from helpers import bits, copy_weights, make_mlp, seeded

# torch's own Adagrad warns so, once a process
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")

SHAPES = [(7, 5), (13,), (2, 3, 4), (), (1, 1)]
STEPS = 30


def parameters(seed: int = 0) -> list[nn.Parameter]:
    noise = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=noise)) for shape in SHAPES]


def gradients(dtype: torch.dtype = torch.float32) -> Iterator[list[Tensor]]:
    noise = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield [torch.randn(shape, generator=noise).to(dtype) for shape in SHAPES]


class Lars(Optimizer):
    """An optimizer in which every parameter depends on all others, so that it cannot be fed chunk by chunk."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        size = sum(p.square().sum() for p in given) + sum(p.grad.square().sum() for p in given)
        for p in given:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.mul_(0.9).add_(p.grad / size.sqrt())
            p.sub_(0.01 * momentum)


def build(kind: type[Optimizer], params: list[nn.Parameter]) -> Optimizer:
    extra: dict[type[Optimizer], dict[str, Any]] = {
        torch.optim.SGD: {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
        torch.optim.Adam: {"lr": 0.01, "amsgrad": True},
        torch.optim.RMSprop: {"lr": 0.01, "momentum": 0.5, "centered": True},
        torch.optim.ASGD: {"lr": 0.05, "t0": 5},
    }
    return kind(params, **extra.get(kind, {}))


OPTIMIZERS = [*sorted(ELEMENTWISE, key=lambda kind: kind.__name__), Lars, torch.optim.Adafactor]


def narrowed(kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[list[nn.Parameter], MasterWeights]:
    params, masters = parameters(), MasterWeights()
    for parameter in params:
        masters.narrow(parameter, dtype, kind)
    return params, masters


@pytest.fixture(params=[16, 1 << 20], ids=lambda size: f"chunks of {size}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(master_weights, "CHUNK", request.param)
    return int(request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("master", ["split", "fp32"])
@pytest.mark.parametrize("optimizer_kind", OPTIMIZERS, ids=lambda kind: str(kind.__name__))
def test_any_optimizer_behind_a_master_moves_exactly_as_in_fp32(optimizer_kind: type[Optimizer], master: str) -> None:
    plain = parameters()
    reference = build(optimizer_kind, plain)
    params, masters = parameters(), MasterWeights()
    optimizer = build(optimizer_kind, params)
    for parameter in params:
        masters.narrow(parameter, torch.bfloat16, master)
    for fresh in gradients():
        for parameter, gradient in zip(plain, fresh, strict=True):
            parameter.grad = gradient.clone()
        reference.step()
        masters.step(optimizer, dict(zip(params, fresh, strict=True)))
    for parameter, expected, start in zip(params, plain, parameters(), strict=True):
        assert torch.equal(bits(masters.read(parameter)), bits(expected.detach()))
        assert not torch.equal(expected, start)
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.detach().float(), expected.detach().bfloat16().float())
        assert parameter.grad is None
    for ours, theirs in zip(params, plain, strict=True):
        states = {k: v for k, v in optimizer.state[ours].items() if isinstance(v, Tensor)}
        assert all(torch.equal(value, reference.state[theirs][key]) for key, value in states.items())
        assert {v.dtype for v in states.values() if v.is_floating_point()} <= {torch.float32}


@pytest.mark.parametrize("optimizer_kind", OPTIMIZERS, ids=lambda kind: str(kind.__name__))
def test_optimizer_that_is_built_on_narrow_parameters_has_fp32_states_too(optimizer_kind: type[Optimizer]) -> None:
    params, masters = narrowed("split")
    optimizer = build(optimizer_kind, params)
    for _ in range(2):
        masters.step(optimizer, {p: torch.ones(p.shape) for p in params})
    states = [value for p in params for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    assert {value.dtype for value in states if value.is_floating_point()} <= {torch.float32}


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("master", ["split", "fp32"])
def test_fp16_and_wide_parameters_may_stand_beside_each_other(master: str) -> None:
    plain, params, masters = parameters(), parameters(), MasterWeights()
    masters.narrow(params[0], torch.bfloat16, master)
    masters.narrow(params[2], torch.float16, "fp32")
    reference, optimizer = torch.optim.AdamW(plain, lr=0.01), torch.optim.AdamW(params, lr=0.01)
    for fresh in gradients():
        for parameter, gradient in zip(plain, fresh, strict=True):
            parameter.grad = gradient.clone()
        reference.step()
        masters.step(optimizer, dict(zip(params, fresh, strict=True)))
    for parameter, expected in zip(params, plain, strict=True):
        assert torch.equal(masters.read(parameter), expected)
    assert [p.dtype for p in params[:3]] == [torch.bfloat16, torch.float32, torch.float16]


@pytest.mark.parametrize("factor", [1.0, 2.0**-16, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("master", ["split", "fp32"])
def test_gradients_are_multiplied_by_the_factor_in_fp32(master: str, dtype: torch.dtype, factor: float) -> None:
    plain = parameters()
    reference = torch.optim.SGD(plain, lr=0.1)
    params, masters = narrowed(master)
    optimizer = torch.optim.SGD(params, lr=0.1)
    for fresh in gradients(dtype):
        for parameter, gradient in zip(plain, fresh, strict=True):
            parameter.grad = gradient.float() * factor
        reference.step()
        masters.step(optimizer, dict(zip(params, fresh, strict=True)), factor)
    for parameter, expected in zip(params, plain, strict=True):
        assert torch.equal(masters.read(parameter), expected)


def test_factor_reaches_parameters_without_a_master() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    MasterWeights().step(optimizer, {parameter: torch.tensor([4.0, 8.0])}, 0.25)
    assert parameter.tolist() == [0.0, 0.0]
    assert parameter.grad is None


def test_update_too_small_for_bf16_is_kept_by_the_master_and_lost_without() -> None:
    for kind, expected in (("split", 1 - 100 * 2.0**-15), ("fp32", 1 - 100 * 2.0**-15), ("none", 1.0)):
        parameter, masters = nn.Parameter(torch.ones(4)), MasterWeights()
        masters.narrow(parameter, torch.bfloat16, kind)
        optimizer = torch.optim.SGD([parameter], lr=2.0**-15)
        for _ in range(100):
            masters.step(optimizer, {parameter: torch.ones(4)})
        assert masters.read(parameter).tolist() == [expected] * 4


class Counting(torch.optim.SGD):
    """SGD that notes which parameters each call of `step` saw, and in which dtype."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.seen: list[list[tuple[int, torch.dtype]]] = []
        self.wide: list[int] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = self.param_groups[0]["params"]
        self.seen.append([(i, p.dtype) for i, p in enumerate(params) if p.grad is not None])
        self.wide.append(sum(p.numel() for p in params if p.dtype == torch.float32))
        super().step()


def step_counted(monkeypatch: pytest.MonkeyPatch, *, known: bool) -> Counting:
    monkeypatch.setattr(master_weights, "CHUNK", 40)  # shapes have 35, 13, 24, 1 and 1 numbers
    if known:
        monkeypatch.setattr(master_weights, "PARAMETERWISE", PARAMETERWISE | {Counting})
    params, masters = narrowed("split")
    optimizer = Counting(params)
    masters.step(optimizer, dict(zip(params, next(gradients()), strict=True)))
    return optimizer


def test_only_one_chunk_is_wide_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = step_counted(monkeypatch, known=True)
    assert [[i for i, _ in call] for call in optimizer.seen] == [[0], [1, 2, 3, 4]]
    assert {dtype for call in optimizer.seen for _, dtype in call} == {torch.float32}
    assert optimizer.wide == [35, 39]


def test_unknown_optimizer_sees_all_parameters_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = step_counted(monkeypatch, known=False)
    assert [[i for i, _ in call] for call in optimizer.seen] == [[0, 1, 2, 3, 4]]
    assert {dtype for call in optimizer.seen for _, dtype in call} == {torch.float32}


def test_parameters_that_are_wide_anyway_go_with_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master_weights, "CHUNK", 40)
    monkeypatch.setattr(master_weights, "PARAMETERWISE", PARAMETERWISE | {Counting})
    params, masters = parameters(), MasterWeights()
    masters.narrow(params[0], torch.bfloat16, "split")
    masters.narrow(params[2], torch.bfloat16, "split")
    optimizer = Counting(params)
    masters.step(optimizer, dict(zip(params, next(gradients()), strict=True)))
    assert [[i for i, _ in call] for call in optimizer.seen] == [[0, 1, 3, 4], [2]]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("optimizer_kind", [torch.optim.AdamW, Lars])
def test_parameter_without_a_gradient_does_not_move(optimizer_kind: type[Optimizer]) -> None:
    params, masters = narrowed("split")
    optimizer = optimizer_kind(params)  # type: ignore[call-arg]
    params[1].grad = None
    given = {p: torch.ones_like(p) for p in params if p is not params[1]}
    masters.step(optimizer, given)
    moved = [not torch.equal(masters.read(p), start) for p, start in zip(params, parameters(), strict=True)]
    assert moved == [True, False, True, True, True]


def test_stale_gradient_of_a_later_chunk_is_not_applied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master_weights, "CHUNK", 1)
    params, masters = parameters(), MasterWeights()
    for parameter in params:
        masters.narrow(parameter, torch.bfloat16, "split")
        parameter.grad = torch.ones_like(parameter)
    given = {p: p.grad.clone() for p in params if p.grad is not None}
    masters.step(torch.optim.SGD(params, lr=0.5), given)
    for parameter, start in zip(params, parameters(), strict=True):
        assert torch.equal(masters.read(parameter), start.detach() - 0.5)
        assert parameter.grad is None
    assert given == {}


def test_optimizer_that_raises_leaves_weights_narrow_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise ArithmeticError("no step")

    params, masters = narrowed("split")
    optimizer = Broken(params, lr=0.1)
    with pytest.raises(ArithmeticError, match="no step"):
        masters.step(optimizer, {p: torch.ones_like(p) for p in params})
    for parameter, start in zip(params, parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16
        assert parameter.grad is None
        assert torch.equal(masters.read(parameter), start)


@pytest.mark.parametrize("master", ["split", "fp32"])
def test_narrow_and_widen_give_back_the_same_parameter_bit_for_bit(master: str) -> None:
    params, masters = narrowed(master)
    before = [id(p) for p in params]
    assert len(masters) == len(params)
    assert all(p in masters and p.dtype == torch.bfloat16 for p in params)
    for parameter in params:
        masters.widen(parameter)
    assert [id(p) for p in params] == before
    assert len(masters) == 0
    for parameter, start in zip(params, parameters(), strict=True):
        assert isinstance(parameter, nn.Parameter) and parameter.requires_grad
        assert parameter.dtype == torch.float32
        assert torch.equal(bits(parameter.detach()), bits(start.detach()))


@pytest.mark.parametrize("master", ["split", "fp32", "none"])
def test_narrow_and_widen_leave_no_gradient(master: str) -> None:
    parameter, masters = nn.Parameter(torch.ones(3)), MasterWeights()
    parameter.grad = torch.ones(3)
    masters.narrow(parameter, torch.bfloat16, master)
    assert parameter.grad is None
    parameter.grad = torch.ones(3, dtype=torch.bfloat16)
    masters.widen(parameter)
    assert parameter.grad is None
    assert parameter.dtype == torch.float32


@pytest.mark.parametrize("master", ["split", "fp32"])
def test_tensor_that_a_parameter_was_made_of_is_left_as_it_was(master: str) -> None:
    given = torch.tensor([1.0009765625, -3.0, 0.1])
    before, parameter, masters = given.clone(), nn.Parameter(given), MasterWeights()
    masters.narrow(parameter, torch.bfloat16, master)
    masters.step(torch.optim.SGD([parameter], lr=0.1), {parameter: torch.ones(3)})
    assert torch.equal(given, before)


def test_none_keeps_no_truth() -> None:
    parameter, masters = nn.Parameter(torch.tensor([1.001])), MasterWeights()
    masters.narrow(parameter, torch.bfloat16, "none")
    assert parameter not in masters and len(masters) == 0
    assert masters.read(parameter).tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_split_behind_anything_but_bf16_is_refused_and_changes_nothing(dtype: torch.dtype) -> None:
    parameter, masters = nn.Parameter(torch.ones(3)), MasterWeights()
    with pytest.raises(UnsupportedError) as caught:
        masters.narrow(parameter, dtype, "split")
    assert (
        str(caught.value)
        == f"master 'split' works behind bf16 weights; got {dtype}, which is not a prefix of fp32; use master='fp32'"
    )
    assert parameter.dtype == torch.float32 and len(masters) == 0


@pytest.mark.parametrize(("master", "dtype"), [("split", torch.bfloat16), ("fp32", torch.float16)])
def test_read_is_a_copy_and_write_sets_truth_and_live_weight(master: str, dtype: torch.dtype) -> None:
    parameter, masters = nn.Parameter(torch.ones(3)), MasterWeights()
    masters.narrow(parameter, dtype, master)
    masters.read(parameter).zero_()
    assert masters.read(parameter).tolist() == [1.0] * 3
    value = torch.tensor([1.0009765625, -3.0, 0.1])
    given = value.clone()
    masters.write(parameter, given)
    assert torch.equal(given, value)
    given.zero_()
    assert torch.equal(masters.read(parameter), value)
    assert torch.equal(parameter.detach(), value.to(dtype))


def test_write_without_a_truth_sets_the_parameter() -> None:
    parameter = nn.Parameter(torch.ones(2))
    MasterWeights().write(parameter, torch.tensor([2.0, 3.0]))
    assert parameter.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("master", ["split", "fp32"])
def test_widened_shows_the_truth_and_takes_changes_back_also_after_an_exception(master: str) -> None:
    params, masters = narrowed(master)
    with pytest.raises(KeyError), masters.widened():
        for parameter, start in zip(params, parameters(), strict=True):
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, start)
            parameter.data.add_(2.0**-12)
        raise KeyError
    for parameter, start in zip(params, parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(masters.read(parameter), start.detach() + 2.0**-12)


def test_memory_format_survives_narrow_and_widen() -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    for master in ("split", "fp32", "none"):
        parameter, masters = nn.Parameter(weight.clone()), MasterWeights()
        masters.narrow(parameter, torch.bfloat16, master)
        assert parameter.is_contiguous(memory_format=torch.channels_last)
        masters.widen(parameter)
        assert parameter.is_contiguous(memory_format=torch.channels_last)
        if master != "none":
            assert torch.equal(parameter, weight)


def test_split_takes_no_more_memory_than_fp32() -> None:
    live, remainder = split_slowly(torch.ones(1000))
    assert live.nbytes + remainder.nbytes == torch.ones(1000).nbytes


def test_forward_and_backward_run_on_the_narrow_weight() -> None:
    layer, masters = nn.Linear(3, 2, bias=False), MasterWeights()
    (weight,) = layer.parameters()
    masters.narrow(weight, torch.bfloat16, "split")
    layer(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["split", "fp32"])
def test_weights_that_are_changed_in_place_become_the_truth(kind: str) -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    masters = MasterWeights()
    masters.narrow(weight, torch.bfloat16, kind)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with torch.no_grad():
        weight.clamp_(min=0)
    assert torch.equal(masters.read(weight), weight.detach().float())
    masters.step(optimizer, {weight: torch.ones(8, 8)})
    assert bool((masters.read(weight) >= 0).all())
    with torch.no_grad():
        weight.fill_(0.5)
    masters.widen(weight)
    assert bool((weight == 0.5).all())


KINDS = list(WAYS)


def narrowed_pair(parameter: nn.Parameter, masters: MasterWeights) -> tuple[Tensor, Tensor]:
    truth = masters._truths[parameter]
    return bits(truth.live.detach()).clone(), bits(truth.kept).clone()


@pytest.mark.parametrize(
    ("kind", "bytes_each"), [("fp32", 6), ("split", 4), ("kahan", 4), ("split24", 3), ("stochastic", 2)]
)
def test_weight_takes_the_bytes_that_the_table_says(kind: str, bytes_each: int) -> None:
    parameter, masters = nn.Parameter(torch.ones(10, 10)), MasterWeights()
    masters.narrow(parameter, torch.bfloat16, kind)
    truth = masters._truths[parameter]
    assert truth.live.nbytes + truth.kept.nbytes == 100 * bytes_each
    assert truth.live.data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_values_that_were_read_restore_every_master_bit_for_bit_and_training_goes_on_as_it_would(
    kind: str,
) -> None:
    params, masters = narrowed(kind)
    optimizer = torch.optim.AdamW(params, lr=0.01)
    for fresh in gradients():
        masters.step(optimizer, dict(zip(params, fresh, strict=True)))

    others, resumed = parameters(seed=5), MasterWeights(seed=9)
    for parameter in others:
        resumed.narrow(parameter, torch.bfloat16, kind)
    again = torch.optim.AdamW(others, lr=0.01)
    again.load_state_dict(optimizer.state_dict())
    for parameter, other in zip(params, others, strict=True):
        resumed.write(other, masters.read(parameter))
        again.state[other] = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    resumed.load_state_dict(masters.state_dict())

    def assert_same_pairs() -> None:
        for parameter, other in zip(params, others, strict=True):
            one, two = narrowed_pair(parameter, masters), narrowed_pair(other, resumed)
            assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])

    assert_same_pairs()
    for fresh in gradients():
        masters.step(optimizer, dict(zip(params, [g.clone() for g in fresh], strict=True)))
        resumed.step(again, dict(zip(others, fresh, strict=True)))
        assert_same_pairs()
    assert resumed.state_dict() == masters.state_dict() == {"seed": 0, "steps": 2 * STEPS}


@pytest.mark.parametrize("kind", KINDS)
def test_block_that_changes_nothing_leaves_the_same_pair(kind: str) -> None:
    params, masters = narrowed(kind)
    masters.step(torch.optim.SGD(params, lr=0.01), dict(zip(params, next(gradients()), strict=True)))
    before = [narrowed_pair(p, masters) for p in params]
    with masters.widened():
        assert {p.dtype for p in params} == {torch.float32}
    for parameter, (live, kept) in zip(params, before, strict=True):
        now = narrowed_pair(parameter, masters)
        assert torch.equal(now[0], live) and torch.equal(now[1], kept)


@pytest.mark.parametrize("kind", KINDS)
def test_result_does_not_depend_on_chunks_blocks_or_memory_format(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.Generator().manual_seed(3)
    starts, fresh = ([torch.randn(4, 6, 5, 5, generator=noise) for _ in range(3)] for _ in range(2))
    results = []
    for chunk, block, format in [
        (1 << 20, 1 << 16, torch.contiguous_format),
        (1, 7, torch.contiguous_format),
        (700, 128, torch.channels_last),
    ]:
        monkeypatch.setattr(master_weights, "CHUNK", chunk)
        monkeypatch.setattr(truths, "BLOCK", block)
        params, masters = [nn.Parameter(s.clone(memory_format=format)) for s in starts], MasterWeights(seed=1)
        for parameter in params:
            masters.narrow(parameter, torch.bfloat16, kind)
        optimizer = torch.optim.SGD(params, lr=0.01)
        for _ in range(3):
            masters.step(optimizer, {p: g.clone() for p, g in zip(params, fresh, strict=True)})
        results.append([masters.read(p).contiguous() for p in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def train_stochastically(seed: int) -> Tensor:
    parameter, masters = nn.Parameter(torch.ones(4096)), MasterWeights(seed)
    masters.narrow(parameter, torch.bfloat16, "stochastic")
    optimizer = torch.optim.SGD([parameter], lr=2.0**-13)
    for _ in range(64):
        masters.step(optimizer, {parameter: torch.ones(4096)})
    return masters.read(parameter)


def test_updates_far_below_half_a_unit_move_stochastic_weights_in_the_mean() -> None:
    weight = train_stochastically(0)
    gap = 2.0**-8  # of bf16 just below 1: every update is 1/32 of it
    sigma = gap * (64 / 32 * 31 / 32) ** 0.5
    assert abs(weight.mean().item() - (1 - 64 * 2.0**-13)) < 4 * sigma / 4096**0.5
    assert weight.std().item() == pytest.approx(sigma, rel=0.05)
    assert torch.equal(weight, train_stochastically(0)), "replicas with one seed stay equal"
    assert not torch.equal(weight, train_stochastically(1))


def test_parameters_and_steps_have_noise_of_their_own() -> None:
    params, masters = [nn.Parameter(torch.ones(4096)) for _ in range(2)], MasterWeights()
    for parameter in params:
        masters.narrow(parameter, torch.bfloat16, "stochastic")
    optimizer = torch.optim.SGD(params, lr=2.0**-9)
    seen = []
    for _ in range(2):
        masters.step(optimizer, {p: torch.ones(4096) for p in params})
        seen += [masters.read(p) for p in params]
        for parameter in params:
            masters.write(parameter, torch.ones(4096))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("split24", "is not a prefix of fp32"),
        ("kahan", "has no range for a compensation far below its weight"),
        ("stochastic", "has no range for small weights"),
    ],
)
def test_masters_that_need_the_range_of_bf16_say_why_they_refuse_fp16(kind: str, reason: str) -> None:
    parameter, masters = nn.Parameter(torch.ones(3)), MasterWeights()
    with pytest.raises(UnsupportedError) as caught:
        masters.narrow(parameter, torch.float16, kind)
    expected = f"master '{kind}' works behind bf16 weights; got torch.float16, which {reason}; use master='fp32'"
    assert str(caught.value) == expected
    assert parameter.dtype == torch.float32 and len(masters) == 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_only_fp32_parameters_are_narrowed(kind: str, dtype: torch.dtype) -> None:
    parameter, masters = nn.Parameter(torch.ones(3, dtype=dtype)), MasterWeights()
    with pytest.raises(UnsupportedError, match=f"only fp32 parameters can be narrowed; got {dtype}"):
        masters.narrow(parameter, torch.bfloat16, kind)
    assert parameter.dtype == dtype and len(masters) == 0


# Sparse gradients: rows


def sparse(rows: list[int], values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, shape, check_invariants=True)


def sparse_gradients(dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    noise = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        rows = torch.randint(12, (5,), generator=noise).tolist()  # some of them twice
        yield sparse(rows, torch.randn(5, 4, generator=noise).to(dtype), (12, 4))


SPARSE: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05, initial_accumulator_value=0.125),
    "SparseAdam": lambda params: torch.optim.SparseAdam(params, lr=0.05),
}


def start_table() -> Tensor:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("built_first", [True, False], ids=["optimizer before", "optimizer after"])
@pytest.mark.parametrize("kind", ["fp32", "split"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients_move_an_exact_master_as_in_fp32(name: str, kind: str, built_first: bool) -> None:
    plain, table, masters = nn.Parameter(start_table()), nn.Parameter(start_table()), MasterWeights()
    reference, optimizer = SPARSE[name]([plain]), SPARSE[name]([table])
    masters.narrow(table, torch.bfloat16, kind)
    if not built_first:
        optimizer = SPARSE[name]([table])
    for gradient in sparse_gradients():
        plain.grad = gradient.coalesce()  # SGD would add a row that occurs twice in two roundings
        reference.step()
        masters.step(optimizer, {table: gradient})
        assert table.grad is None and table.shape == (12, 4) and table.dtype == torch.bfloat16
    assert torch.equal(bits(masters.read(table)), bits(plain.detach()))
    for key, value in optimizer.state[table].items():
        if isinstance(value, Tensor):
            assert torch.equal(value.to_dense(), reference.state[plain][key].to_dense()), key


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_updated_as_the_whole_would_be(kind: str) -> None:
    tables, results = [nn.Parameter(start_table()) for _ in range(2)], []
    for table in tables:
        masters = MasterWeights()
        masters.narrow(table, torch.bfloat16, kind)
        optimizer = torch.optim.SGD([table], lr=0.01)
        for gradient in sparse_gradients(torch.bfloat16):
            dense = gradient.to(torch.float32).to_dense()
            masters.step(optimizer, {table: gradient if table is tables[0] else dense}, 0.5)
        results.append(narrowed_pair(table, masters))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


class SeeingAdagrad(torch.optim.Adagrad):
    seen: tuple[Any, ...] = ()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (parameter,) = self.param_groups[0]["params"]
        self.seen = (*parameter.shape, *self.state[parameter]["sum"].shape)
        super().step()


@pytest.mark.parametrize("kind", KINDS)
def test_only_rows_with_a_gradient_are_widened(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master_weights, "BY_ROWS", {SeeingAdagrad})
    table, masters = nn.Parameter(start_table()), MasterWeights()
    masters.narrow(table, torch.bfloat16, kind)
    optimizer, before = SeeingAdagrad([table], lr=0.5), masters.read(table)
    masters.step(optimizer, {table: sparse([7, 2, 7], torch.ones(3, 4), (12, 4))})
    assert optimizer.seen == (2, 4, 2, 4)
    moved = (masters.read(table) != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [2, 7]
    assert optimizer.state[table]["sum"].any(dim=1).nonzero().flatten().tolist() == [2, 7]


def test_rows_that_occur_twice_are_summed_in_fp32() -> None:
    table, masters = nn.Parameter(torch.zeros(3, 1)), MasterWeights()
    masters.narrow(table, torch.bfloat16, "split")
    gradient = sparse([1, 1], torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16), (3, 1))
    masters.step(torch.optim.SGD([table], lr=1.0), {table: gradient})
    assert masters.read(table).flatten().tolist() == [0.0, -257.0, 0.0]


def test_sparse_gradient_without_entries_moves_nothing() -> None:
    for name, build_optimizer in SPARSE.items():
        table, masters = nn.Parameter(start_table()), MasterWeights()
        masters.narrow(table, torch.bfloat16, "stochastic")
        before = masters.read(table)
        masters.step(build_optimizer([table]), {table: sparse([], torch.zeros(0, 4), (12, 4))})
        assert torch.equal(masters.read(table), before), name


@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize("optimizer_kind", sorted(DENSE, key=str), ids=lambda kind: str(kind.__name__))
def test_sparse_gradient_that_the_optimizer_refuses_is_named_before_anything_moves(
    optimizer_kind: type[Optimizer], kind: str
) -> None:
    other, table, masters = nn.Parameter(torch.ones(3)), nn.Parameter(start_table()), MasterWeights()
    for parameter in (other, table):
        masters.narrow(parameter, torch.bfloat16, kind)
    before = masters.read(other)
    optimizer = optimizer_kind([other, table])  # type: ignore[call-arg]
    with pytest.raises(UnsupportedError) as caught:
        masters.step(optimizer, {other: torch.ones(3), table: next(sparse_gradients())})
    assert str(caught.value) == (
        f"{optimizer_kind.__name__} takes no sparse gradients; use SparseAdam, Adagrad or SGD, or make the embedding "
        "with sparse=False"
    )
    assert torch.equal(masters.read(other), before) and masters.steps == 0


def test_dense_gradient_for_sparse_adam_is_refused() -> None:
    table, masters = nn.Parameter(start_table()), MasterWeights()
    with pytest.raises(UnsupportedError, match="SparseAdam takes only sparse gradients"):
        masters.step(torch.optim.SparseAdam([table]), {table: torch.ones(12, 4)})


def test_optimizer_that_raises_gives_rows_and_states_back() -> None:
    class Broken(torch.optim.Adagrad):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise ArithmeticError("no step")

    table, masters = nn.Parameter(start_table()), MasterWeights()
    masters.narrow(table, torch.bfloat16, "split24")
    before = narrowed_pair(table, masters)
    optimizer = Broken([table])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(master_weights, "BY_ROWS", {Broken})
        with pytest.raises(ArithmeticError):
            masters.step(optimizer, {table: next(sparse_gradients())})
    after = narrowed_pair(table, masters)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    assert table.shape == (12, 4) and optimizer.state[table]["sum"].shape == (12, 4)


# Whole models


def plan_of(kind: str) -> str:
    return f"compute=bf16 storage=bf16 master={kind}"


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too; `extra` is complex and `exact` fp64."""

    def __init__(self, *, is_sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6, sparse=is_sparse)
        self.norm = nn.LayerNorm(6)
        self.output = nn.Linear(6, 10, bias=False)
        self.output.weight = self.embedding.weight
        self.extra = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.exact = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        scale = self.extra.abs().sum() + self.exact.sum().to(torch.float32)
        found: Tensor = self.output(self.norm(self.embedding(tokens)))
        return found * scale.to(found.dtype)


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_tied_weight_is_stepped_once_and_complex_and_fp64_stay_as_they_are(kind: str) -> None:
    with seeded(0):
        model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    stepper = prepare(model, optimizer, plan_of(kind))
    before = copy_weights(model)
    for _ in range(3):
        loss = model(torch.tensor([1, 2, 3])).to(torch.float32).square().mean()
        assert stepper.step(loss).applied
    assert model.output.weight is model.embedding.weight
    assert len(stepper.conversion.masters) == (0 if kind == "none" else 3)
    assert (model.extra.dtype, model.exact.dtype) == (torch.complex64, torch.float64)
    after = model.state_dict()
    assert torch.equal(after["embedding.weight"], after["output.weight"])
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert optimizer.state[model.embedding.weight]["step"].item() == 3
    assert {v.dtype for v in after.values()} == {torch.float32, torch.complex64, torch.float64}


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_rest_and_move_once_they_are_unfrozen_and_given_to_the_optimizer(kind: str) -> None:
    model = make_mlp()
    first, *rest = model
    assert isinstance(first, nn.Linear)
    first.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for layer in rest for p in layer.parameters()], lr=0.01)
    stepper = prepare(model, optimizer, plan_of(kind))
    start = copy_weights(model)
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    stepper.step(model(x).float().square().mean())
    frozen = copy_weights(model)
    assert torch.equal(frozen["0.weight"], start["0.weight"]) and not torch.equal(frozen["4.weight"], start["4.weight"])
    first.requires_grad_(True)
    optimizer.add_param_group({"params": list(first.parameters()), "lr": 0.1})
    added = nn.Parameter(torch.ones(3))  # not of the model: it has no master
    optimizer.add_param_group({"params": [added]})
    for _ in range(2):
        assert stepper.step(model(x).float().square().mean() + added.sum()).applied
    after = copy_weights(model)
    assert all(not torch.equal(after[name], frozen[name]) for name in frozen)
    assert first.weight.dtype == torch.bfloat16 and added.dtype == torch.float32 and bool((added < 1).all())
    assert optimizer.state[first.weight]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_of_a_converted_model_restores_live_and_kept(kind: str) -> None:
    model = make_mlp()
    stepper = prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01), plan_of(kind))
    for _ in range(5):
        stepper.step(model(torch.ones(4, 8, dtype=torch.bfloat16)).float().square().mean())
    other = make_mlp(seed=1)
    again = convert(other, Plan.parse(plan_of(kind)))
    other.load_state_dict(model.state_dict())
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        one = narrowed_pair(ours, stepper.conversion.masters)
        two = narrowed_pair(theirs, again.masters)
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_sparse_embedding_of_a_model_trains_by_rows(kind: str) -> None:
    with seeded(0):
        model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    stepper = prepare(model, optimizer, plan_of(kind))
    before = copy_weights(model)["0.weight"]
    assert stepper.step(model(torch.tensor([3, 5, 3])).float().square().mean()).applied
    moved = (copy_weights(model)["0.weight"] != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [3, 5]


# Every optimizer behind every master

LEAST_SQUARES_STEPS = 200
LEARNING_RATE = 0.01
EVERY_OPTIMIZER: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    **{
        str(kind.__name__): functools.partial(kind, lr=LEARNING_RATE)
        for kind in [*OPTIMIZERS, torch.optim.Muon, torch.optim.SparseAdam]
        if kind is not Lars
    },
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=LEARNING_RATE, momentum=0.9, nesterov=True),
}
ONLY_MATRICES = {"Muon", "SparseAdam"}
GROWTH = {"Adafactor": (1 + LEARNING_RATE) ** LEAST_SQUARES_STEPS}
"""How much a rounding error can grow: Adafactor's step is proportional to the weights' root mean square, so an error is
multiplied by 1 + lr a step at most; the steps of the others do not depend on the weights, or shrink them."""
ROUNDOFF = {"split24": 2.0**-16, "kahan": 2.0**-17}


@functools.cache
def follow_in_fp32(name: str) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Weights at the end, and the gradients of every step, of a least-squares fit; each step sees 5 of 12 inputs."""
    noise = torch.Generator().manual_seed(6)
    shapes = [(12, 4)] if name in ONLY_MATRICES else [(12, 4), (4,)]
    params = [nn.Parameter(torch.randn(shape, generator=noise)) for shape in shapes]
    goal = torch.randn(12, 4, generator=noise)
    optimizer, given = EVERY_OPTIMIZER[name](params), []
    for _ in range(LEAST_SQUARES_STEPS):
        x = torch.randn(16, 12, generator=noise)
        x[:, torch.randperm(12, generator=noise)[:7]] = 0
        error = x @ (params[0].detach() - goal) + (params[1].detach() if len(params) > 1 else 0)
        found = [x.T @ error / 16, error.mean(0)][: len(params)]
        given.append([g.to_sparse(1) if name == "SparseAdam" else g for g in found])
        for parameter, gradient in zip(params, given[-1], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in params], given


@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
def test_every_optimizer_behind_every_master_stays_as_near_to_fp32_as_it_is_precise(
    name: str, kind: str, record_property: Callable[[str, object], None]
) -> None:
    expected, given = follow_in_fp32(name)
    noise, masters, largest = torch.Generator().manual_seed(6), MasterWeights(), 0.0
    params = [nn.Parameter(torch.randn(value.shape, generator=noise)) for value in expected]
    optimizer = EVERY_OPTIMIZER[name](params)
    for parameter in params:
        masters.narrow(parameter, torch.bfloat16, kind)
    for fresh in given:
        masters.step(optimizer, {p: g.clone() for p, g in zip(params, fresh, strict=True)})
        largest = max(largest, *(p.detach().abs().max().item() for p in params))
    values = [masters.read(p) for p in params]
    error = torch.cat([(v - e).flatten() for v, e in zip(values, expected, strict=True)])
    record_property("rms_distance_to_fp32", error.square().mean().sqrt().item())
    if kind in ("fp32", "split"):
        assert all(torch.equal(bits(v), bits(e)) for v, e in zip(values, expected, strict=True))
        return
    assert bool(error.isfinite().all())
    growth, exact = GROWTH.get(name, 1.0), LEAST_SQUARES_STEPS * 2.0**-24  # exact: the roundings of fp32 itself
    if kind == "stochastic":
        # Hoeffding's inequality for a sum of errors of mean 0, each within one unit of 2^-7: less than 1 in 10^6 for all
        chance = math.log(2 * error.numel() * 1e6)
        within = 2.0**-7 * math.sqrt(LEAST_SQUARES_STEPS * chance / 2) + 2.0**-8
        assert error.abs().max().item() <= growth * (within + exact) * largest
    elif kind != "none":
        roundings = (LEAST_SQUARES_STEPS + 1) * ROUNDOFF[kind]
        assert error.square().mean().sqrt().item() <= growth * (roundings + exact) * largest * (1 + 2.0**-8)


class OwnSGD(SGD):
    """An optimizer that may keep its parameters anywhere."""


@pytest.mark.parametrize("kind", ["split", "fp32", "stochastic"])
@pytest.mark.parametrize(("optimizer", "stays"), [(SGD, True), (AdamW, True), (OwnSGD, False)])
def test_known_optimizers_leave_the_hooks_on_narrow_weights(kind: str, optimizer: Any, stays: bool) -> None:
    weight = nn.Parameter(torch.ones(4))
    masters = MasterWeights()
    masters.narrow(weight, torch.bfloat16, kind)
    node = torch.autograd.graph.get_gradient_edge(weight).node  # where DistributedDataParallel has its hook
    held = optimizer([weight], lr=0.5)
    for _ in range(2):
        masters.step(held, {weight: torch.ones(4)})
        assert (torch.autograd.graph.get_gradient_edge(weight).node is node) is stays
        assert held.param_groups[0]["params"][0] is weight
        assert set(held.state) <= {weight}
        assert weight.grad is None
    assert masters.read(weight).max() < 1.0
