"""fp32 truth behind narrow weights: exact to the bit, for any optimizer."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.errors import UnsupportedError
from halfstep.mechanisms import master_weights
from halfstep.mechanisms.master_weights import PARAMETERWISE, MasterWeights
from halfstep.numerics.movement import ELEMENTWISE
from halfstep.numerics.rounding import split_slowly
from helpers import bits

SHAPES = [(7, 5), (13,), (2, 3, 4), (), (1, 1)]
STEPS = 30


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
