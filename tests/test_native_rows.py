"""Steps on sparse gradients in one pass: the bits of torch's own, and torch's own wherever somebody could tell."""

import copy
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from halfstep.mechanisms.master_weights import MasterWeights
from halfstep.numerics.rows import KERNELS
from halfstep.stepper import prepare
from helpers import bits, narrow_all, seeded, train_in_two_ways

SHAPES = [(60, 8), (30, 3), (5, 4)]
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SparseAdam": (SparseAdam, {"lr": 0.05}),
    "SparseAdam, lr a tensor": (SparseAdam, {"lr": torch.tensor(0.05)}),
    "Adagrad": (Adagrad, {"lr": 0.05, "lr_decay": 0.1, "initial_accumulator_value": 0.125}),
    "SGD": (SGD, {"lr": 0.05}),
}
kinds = pytest.mark.parametrize("name", KINDS)
pytestmark = pytest.mark.skipif(KERNELS.library.functions is None, reason=KERNELS.library.why)


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    with torch.sparse.check_sparse_tensor_invariants(True):  # torch warns where nothing is said of them
        yield


def parameters() -> list[nn.Parameter]:
    with seeded(0):
        return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def gradients(steps: int, dtype: torch.dtype = torch.float32, occurrences: int = 2) -> Iterator[list[Tensor]]:
    """Rows occur up to so often."""
    noise = torch.Generator().manual_seed(1)
    for _ in range(steps):
        found = []
        for shape in SHAPES:
            some = torch.randperm(shape[0], generator=noise)[: shape[0] // 2]
            numbers = torch.cat([some] * occurrences)[: 3 * len(some) // 2]
            values = torch.randn(len(numbers), shape[1], generator=noise).to(dtype)
            found.append(torch.sparse_coo_tensor(numbers[None], values, shape, check_invariants=True))
        yield found


def build(name: str, params: list[nn.Parameter]) -> Optimizer:
    kind, options = KINDS[name]
    made: Optimizer = kind(params, **copy.deepcopy(options))
    return made


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step that torch computes fail, without a trace that would be seen."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("torch was asked to step")

    monkeypatch.setattr(sys.modules["torch.optim.sgd"], "sgd", fail)
    monkeypatch.setattr(sys.modules["torch.optim.adagrad"], "adagrad", fail)
    monkeypatch.setattr(torch.optim._functional, "sparse_adam", fail)


def run(name: str, kind: str, dtype: torch.dtype, *, fused: bool) -> tuple[list[Tensor], list[nn.Parameter], Optimizer]:
    params = parameters()
    masters, optimizer = narrow_all(MasterWeights(fused=fused), params, kind), build(name, params)
    for fresh in gradients(20, dtype):
        masters.step(optimizer, dict(zip(params, fresh, strict=True)), 0.3)
    return [masters.read(p) for p in params], params, optimizer


@kinds
@pytest.mark.parametrize("kind", ["split", "fp32", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_updates_have_torchs_bits_and_torch_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: str, dtype: torch.dtype
) -> None:
    dtype = torch.float32 if kind == "none" else dtype
    theirs, their_params, reference = run(name, kind, dtype, fused=False)
    with monkeypatch.context() as patch:
        refuse(patch)
        ours, our_params, optimizer = run(name, kind, dtype, fused=True)
    for a, b, value, expected in zip(our_params, their_params, ours, theirs, strict=True):
        assert torch.equal(bits(value), bits(expected)) and torch.equal(a, b)
        assert a.grad is None and a.requires_grad
        assert list(optimizer.state[a]) == list(reference.state[b])
        for key, state in optimizer.state[a].items():
            like = reference.state[b][key]
            assert type(state) is type(like)
            assert torch.equal(state, like) if isinstance(state, Tensor) else state == like


@pytest.mark.parametrize("name", ["SparseAdam", "Adagrad"])
def test_split_equals_fp32_storage_over_200_steps(name: str) -> None:
    wide, narrowed = parameters(), parameters()
    masters = narrow_all(MasterWeights(), narrowed, "split")
    optimizers = build(name, wide), build(name, narrowed)
    for i, fresh in enumerate(gradients(200, torch.bfloat16, occurrences=3)):
        factor = 1.0 / (1 + i % 7)
        MasterWeights().step(optimizers[0], {p: g.float() for p, g in zip(wide, fresh, strict=True)}, factor)
        masters.step(optimizers[1], dict(zip(narrowed, fresh, strict=True)), factor)
    for a, b in zip(wide, narrowed, strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(bits(a.detach()), bits(masters.read(b)))


@kinds
@pytest.mark.parametrize("kind", ["split", "none"])
def test_watched_steps_give_the_same_bits_and_the_records_of_torchs(name: str, kind: str) -> None:
    found, stalls = [], []
    for fused, watch in ((True, False), (True, True), (False, True)):
        params = parameters()
        masters = narrow_all(MasterWeights(fused=fused), params, kind)
        optimizer = build(name, params)
        optimizer.param_groups[0]["lr"] = 1e-10
        for fresh in gradients(3):
            seen = masters.step(optimizer, dict(zip(params, fresh, strict=True)), 0.5, watch=watch)
        found.append([masters.read(p) for p in params])
        stalls.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert stalls[0] == () and len(stalls[1]) == 1
    assert stalls[1] == stalls[2]


@kinds
def test_state_dicts_go_to_plain_torch_and_back_in_the_middle(name: str) -> None:
    straight, broken = parameters(), parameters()
    train_in_two_ways(partial(build, name), straight, broken, gradients(12), lambda i: bool(i % 3))
    for a, b in zip(straight, broken, strict=True):
        assert torch.equal(bits(a.detach()), bits(b.detach()))


def test_sgd_adds_rows_that_occur_often_one_after_another_as_torch_does() -> None:
    plain, ours = parameters(), parameters()
    optimizers = build("SGD", plain), build("SGD", ours)
    for fresh in gradients(5, occurrences=3):
        for parameter, gradient in zip(plain, fresh, strict=True):
            parameter.grad = gradient.clone()
        optimizers[0].step()
        MasterWeights().step(optimizers[1], dict(zip(ours, fresh, strict=True)))
    assert all(torch.equal(bits(a.detach()), bits(b.detach())) for a, b in zip(plain, ours, strict=True))


REASONS: dict[str, Any] = {
    "momentum=0.9 has no kernel for sparse gradients": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "maximize=True has no kernel": lambda p: SparseAdam(p, lr=0.05, maximize=True),
    "a hyperparameter is a tensor": lambda p: Adagrad(p, lr=0.05, eps=torch.tensor(1e-8)),  # type: ignore[arg-type]
    "Adagrad.step was replaced": lambda p: replace_step(Adagrad(p, lr=0.05)),
}


def replace_step(optimizer: Optimizer) -> Optimizer:
    inner = optimizer.step
    optimizer.step = lambda *args: inner(*args)  # type: ignore[method-assign,assignment]
    return optimizer


@pytest.mark.parametrize("kind", ["split", "none"])
@pytest.mark.parametrize("reason", REASONS)
def test_what_is_left_to_torch_says_why_and_is_the_same(reason: str, kind: str) -> None:
    found = []
    for fused in (True, False):
        params = parameters()
        masters = narrow_all(MasterWeights(fused=fused), params, kind)
        optimizer = REASONS[reason](params)
        for fresh in gradients(3):
            masters.step(optimizer, dict(zip(params, fresh, strict=True)))
        found.append([masters.read(p) for p in params])
        assert masters.describe_updates(optimizer) == f"torch: {reason if fused else 'fused=False'}"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_descriptions_follow_the_gradients_that_were_seen() -> None:
    params, masters = parameters(), MasterWeights()
    optimizer = Adagrad(params)
    assert masters.describe_updates(optimizer) == "torch: Adagrad has no kernel for dense gradients"
    masters.step(optimizer, dict(zip(params, next(gradients(1)), strict=True)))
    assert masters.describe_updates(optimizer) == KERNELS.way
    assert masters.describe_updates(SparseAdam(parameters())) == KERNELS.way
    momentum = SGD(params, momentum=0.9)
    assert masters.describe_updates(momentum) == "torch: momentum=0.9 has no kernel for sparse gradients"
    assert masters.describe_updates(SGD(parameters(), momentum=0.9)) == "native"


@kinds
def test_schedulers_see_that_the_optimizer_stepped_and_versions_move(name: str) -> None:
    params = parameters()
    optimizer = build(name, params)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = [parameter._version for parameter in params]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MasterWeights().step(optimizer, dict(zip(params, next(gradients(1)), strict=True)))
        scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)
    assert all(parameter._version > version for parameter, version in zip(params, before, strict=True))


def test_a_gradient_without_entries_counts_a_step_and_moves_nothing() -> None:
    for name in KINDS:
        params = parameters()
        optimizer, before = build(name, params), [p.detach().clone() for p in params]
        empty = [torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), torch.empty(0, s[1]), s) for s in SHAPES]
        MasterWeights().step(optimizer, dict(zip(params, empty, strict=True)))
        assert all(torch.equal(p, start) for p, start in zip(params, before, strict=True))
        assert all(float(optimizer.state[p].get("step", 1)) == 1 for p in params)


class Bags(nn.Module):
    """Two tables, one looked up in bags, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bags = nn.Embedding(50, 8, sparse=True), nn.EmbeddingBag(50, 8, mode="sum", sparse=True)
        self.head = nn.Linear(16, 1)

    def forward(self, numbers: Tensor) -> Tensor:
        both = torch.cat([self.table(numbers[:, 0]), self.bags(numbers)], 1)
        found: Tensor = self.head(both.to(self.head.weight.dtype))
        return found


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_prepared_model_trains_to_the_same_bits_either_way(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    found = []
    for fused in (True, False):
        with seeded(4):
            model = Bags()
            numbers = torch.randperm(48).view(16, 3)
        tables = [model.table.weight, model.bags.weight]
        optimizers = [SparseAdam(tables, lr=0.01), SGD(model.head.parameters(), lr=0.01)]
        stepper = prepare(model, optimizers, precision)
        stepper.conversion.masters.fused = fused
        with monkeypatch.context() as patch:
            if fused and precision != "bf16-true":
                refuse(patch)
            for _ in range(5):
                with stepper.autocast():
                    loss = stepper.model(numbers).float().square().mean()
                stepper.step(loss)
        found.append([p.detach().float().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
