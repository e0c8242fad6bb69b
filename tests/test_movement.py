"""Which weights an update moves: counted right, told with the right numbers, and without a trace on the update."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

from halfstep.mechanisms.master_weights import WAYS, MasterWeights
from halfstep.numerics import movement
from halfstep.numerics.formats import find_format
from halfstep.numerics.movement import (
    ELEMENTWISE,
    SIGNIFICANT_BITS,
    find_smallest_step,
    preview_update,
    sample_gradient,
)
from halfstep.numerics.words import round_to_24_bits
from halfstep.records import Stall
from helpers import bits

MASTERS = [*WAYS, "none"]


def random_weights(count: int = 4096) -> Tensor:
    """Between 1 and 2, where half a unit of p bits is 2^-p."""
    return 1 + torch.rand(count, generator=torch.Generator().manual_seed(0))


def watch_once(
    master: str,
    lr: float,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weight: Tensor | None = None,
    gradient: Tensor | None = None,
) -> tuple[Stall, ...]:
    """SGD takes lr * gradient off weights between 1 and 2, or off those given."""
    parameter = nn.Parameter(random_weights() if weight is None else weight.clone())
    masters = MasterWeights()
    if dtype != torch.float32:
        masters.narrow(parameter, dtype, master)
    gradient = torch.ones(parameter.shape) if gradient is None else gradient
    return masters.step(torch.optim.SGD([parameter], lr=lr), {parameter: gradient}, watch=True)


def floor_of(master: str) -> float:
    """Half a unit in the last place of a weight between 1 and 2."""
    return 2.0 ** -SIGNIFICANT_BITS.get(master, 8)


@pytest.mark.parametrize("master", ["fp32", "split", "stochastic", "split24", "none"])
def test_updates_below_half_a_unit_stall_and_those_above_do_not(master: str) -> None:
    (stall,) = watch_once(master, floor_of(master) / 2)
    assert (stall.stuck, stall.weights, stall.share) == (4096, 4096, 1.0)
    assert (stall.group, stall.storage, stall.master) == (0, "bf16", master)
    assert stall.learning_rate == floor_of(master) / 2
    assert stall.smallest_step == floor_of(master)
    assert watch_once(master, floor_of(master) * 2) == ()


def test_kahan_stalls_below_its_compensation_and_not_above_17_bits() -> None:
    assert watch_once("kahan", floor_of("kahan") * 2) == ()
    (stall,) = watch_once("kahan", floor_of("kahan") / 16)
    assert stall.share > 0.5 and stall.smallest_step == 2.0**-17


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_weights_without_a_master_stall_in_their_own_format(dtype: torch.dtype) -> None:
    floor = 2.0 ** -{torch.float16: 11, torch.float32: 24}[dtype]
    (stall,) = watch_once("none", floor / 2, dtype=dtype)
    assert (stall.smallest_step, stall.share, stall.storage) == (floor, 1.0, {2: "fp16", 4: "fp32"}[dtype.itemsize])
    assert watch_once("none", floor * 2, dtype=dtype) == ()


@pytest.mark.parametrize("master", ["none", "split24"])
def test_learning_rate_needed_moves_the_median_weight(master: str) -> None:
    weight = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(4096, generator=torch.Generator().manual_seed(2))
    (stall,) = watch_once(master, floor_of(master) / 64, weight=weight, gradient=gradient)
    assert stall.learning_rate_needed is not None and stall.median_update is not None
    assert stall.median_weight == pytest.approx(weight.abs().median().item(), rel=2**-8)
    assert stall.median_update == pytest.approx(
        gradient.abs().median().item() * stall.learning_rate, rel=2**-8, abs=2**-24
    )
    assert stall.learning_rate_needed == stall.learning_rate * stall.smallest_step / stall.median_update
    assert watch_once(master, 2 * stall.learning_rate_needed, weight=weight, gradient=gradient) == ()
    assert len(watch_once(master, stall.learning_rate_needed / 4, weight=weight, gradient=gradient)) == 1


def test_update_that_fp32_itself_loses_has_no_size() -> None:
    (stall,) = watch_once("split", 2.0**-30)
    assert (stall.median_update, stall.learning_rate_needed) == (None, None)


def test_learning_rate_of_zero_is_no_stall() -> None:
    assert [watch_once(master, 0.0) for master in MASTERS] == [()] * len(MASTERS)


def test_weights_without_a_gradient_do_not_count() -> None:
    gradient = torch.zeros(4096)
    assert watch_once("none", 2.0**-12, gradient=gradient) == ()
    gradient[:10] = 1
    (stall,) = watch_once("none", 2.0**-12, gradient=gradient)
    assert (stall.weights, stall.stuck) == (10, 10)


def test_half_of_the_weights_make_a_stall() -> None:
    gradient = torch.full((4096,), 2.0**-5)
    gradient[:2049] = 4.0
    assert watch_once("none", 2.0**-8, gradient=gradient) == ()
    gradient[0] = 2.0**-5
    (stall,) = watch_once("none", 2.0**-8, gradient=gradient)
    assert stall.share == 0.5


def test_groups_formats_and_masters_are_judged_apart() -> None:
    params = [nn.Parameter(random_weights(64)) for _ in range(5)]
    masters = MasterWeights()
    for parameter, kind in zip(params, ["none", "split", "none", "split24"], strict=False):
        masters.narrow(parameter, torch.bfloat16, kind)
    optimizer = torch.optim.SGD(
        [
            {"params": params[:2], "lr": 2.0**-12},
            {"params": params[2:4], "lr": 2.0**-20},
            {"params": params[4:], "lr": 1},
        ]
    )
    stalls = masters.step(optimizer, {p: torch.ones(64) for p in params}, watch=True)
    assert [(s.group, s.master, s.learning_rate, s.weights) for s in stalls] == [
        (0, "none", 2.0**-12, 64), (1, "none", 2.0**-20, 64), (1, "split24", 2.0**-20, 64),
    ]  # fmt: skip


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("master", MASTERS)
def test_watched_update_is_the_same_to_the_bit(master: str, fused: bool) -> None:
    results: list[list[Tensor]] = []
    for watch in (True, False):
        params, masters = [nn.Parameter(random_weights(300)), nn.Parameter(random_weights(7))], MasterWeights()
        for parameter in params:
            masters.narrow(parameter, torch.bfloat16, master)
        optimizer = torch.optim.AdamW(params, lr=1e-3, fused=fused)
        noise = torch.Generator().manual_seed(1)
        for _ in range(5):
            masters.step(optimizer, {p: torch.randn(p.shape, generator=noise) for p in params}, watch=watch)
        states = [v for p in params for v in optimizer.state[p].values()]
        results.append([*(masters.read(p) for p in params), *states])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", sorted(ELEMENTWISE, key=str), ids=lambda kind: str(kind.__name__))
def test_preview_is_what_the_optimizer_does_in_fp32(kind: type[Optimizer]) -> None:
    weight = nn.Parameter(random_weights(50).to(torch.bfloat16))
    optimizer = kind([weight], lr=2.0**-4)  # type: ignore[call-arg]
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("hook"))
    scheduler = StepLR(optimizer, 1)
    for _ in range(3):
        weight.grad = torch.randn(50, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
        optimizer.step()
    scheduler.step()
    states = {key: value.clone() for key, value in optimizer.state[weight].items() if isinstance(value, Tensor)}
    before, picks = weight.detach().clone(), torch.arange(0, 50, 3)

    update = preview_update(optimizer, weight, picks)

    assert calls == ["hook"] * 3
    assert torch.equal(weight.detach(), before)
    assert all(torch.equal(optimizer.state[weight][key], value) for key, value in states.items())
    wide = nn.Parameter(before.to(torch.float32))
    assert weight.grad is not None
    wide.grad = weight.grad.to(torch.float32)
    other = kind([wide], lr=optimizer.param_groups[0]["lr"])  # type: ignore[call-arg]
    other.state[wide] = {k: v.float() if isinstance(v, Tensor) else v for k, v in optimizer.state[weight].items()}
    other.step()
    assert update is not None
    assert torch.equal(update, (wide.detach() - before.to(torch.float32))[picks])
    assert update.abs().max() > 0


def test_preview_is_left_out_where_weights_depend_on_each_other() -> None:
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    assert preview_update(torch.optim.Adafactor([weight]), weight, torch.arange(4)) is None
    masters = MasterWeights()
    (stall,) = masters.step(torch.optim.Adafactor([weight], lr=1e-6), {weight: weight.grad}, watch=True)
    assert stall.share == 1 and stall.learning_rate_needed is None


def test_large_group_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movement, "SAMPLE", 100)
    weight = torch.cat([torch.full((3000,), 1.5), torch.full((1000,), 1e-3)])
    (stall,) = watch_once("none", 2.0**-10, weight=weight)
    assert stall.weights == 100
    assert stall.share == 0.75
    assert stall.median_weight == 1.5


@pytest.mark.parametrize("master", MASTERS)
def test_rows_of_a_sparse_gradient_are_watched(master: str) -> None:
    table, masters = nn.Parameter(random_weights(40).view(10, 4)), MasterWeights()
    masters.narrow(table, torch.bfloat16, master)
    gradient = torch.sparse_coo_tensor(torch.tensor([[7, 2, 7]]), torch.ones(3, 4), (10, 4), check_invariants=True)
    (stall,) = masters.step(torch.optim.SGD([table], lr=2.0**-32), {table: gradient.clone()}, watch=True)
    assert (stall.weights, stall.stuck) == (8, 8)
    assert masters.step(torch.optim.SGD([table], lr=0.5), {table: gradient}, watch=True) == ()


def test_sample_of_a_sparse_gradient_has_the_numbers_of_its_elements() -> None:
    gradient = torch.sparse_coo_tensor(
        torch.tensor([[2, 0]]), torch.tensor([[5.0, 6.0], [1.0, 2.0]]), (3, 2), check_invariants=True
    )
    picks, values = sample_gradient(gradient, 1)
    assert (picks.tolist(), values.tolist()) == ([0, 1, 4, 5], [1.0, 2.0, 5.0, 6.0])
    scattered = torch.sparse_coo_tensor(
        torch.tensor([[2, 0], [1, 0]]), torch.tensor([7.0, 3.0]), (3, 2), check_invariants=True
    )
    picks, values = sample_gradient(scattered, 1)
    assert values[5] == 7 and values[0] == 3 and values.count_nonzero() == 2


def test_parameters_that_are_complex_or_fp64_are_stepped_and_not_watched() -> None:
    params = [nn.Parameter(torch.ones(3, dtype=torch.complex64)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    given = {p: torch.full_like(p, 2.0).detach() for p in params}
    masters = MasterWeights()
    assert masters.step(torch.optim.SGD(params, lr=1e-30), dict(given), watch=True) == ()
    masters.step(torch.optim.SGD(params, lr=0.5), given, 0.25)
    assert params[0].tolist() == [0.75 + 0j] * 3 and params[1].tolist() == [0.75] * 3


def test_optimizer_without_a_learning_rate_is_watched() -> None:
    class Plain(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    parameter, masters = nn.Parameter(random_weights()), MasterWeights()
    masters.narrow(parameter, torch.bfloat16, "split")
    (stall,) = masters.step(Plain([parameter]), {parameter: torch.ones(4096)}, watch=True)
    assert math.isnan(stall.learning_rate) and stall.learning_rate_needed is None


@pytest.mark.parametrize("weight", [1.0, 1.5, 0.03, 1e-30, 300.0])
def test_smallest_step_is_half_the_gap_that_rounding_leaves(weight: float) -> None:
    roundings = {
        ("bf16", "none"): lambda w: w.to(torch.bfloat16).to(torch.float32),
        ("bf16", "split24"): round_to_24_bits,
        ("fp32", "none"): lambda w: w,
    }
    for (storage, master), rounded in roundings.items():
        value = rounded(torch.tensor([weight]))
        step = find_smallest_step(value.item(), storage, master)
        above = rounded((value.to(torch.float64) + 1.01 * step).to(torch.float32))
        below = rounded((value.to(torch.float64) + 0.99 * step).to(torch.float32))
        assert torch.equal(bits(below), bits(value)) and above > value, (storage, master)


def test_smallest_step_ends_at_the_smallest_subnormal() -> None:
    for name in ("fp16", "bf16"):
        half = find_format(name).smallest_subnormal / 2
        assert find_smallest_step(0.0, name, "none") == find_smallest_step(half * 2, name, "none") == half


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({}, "use master=split, or lr >= 6.1e-05"),
        ({"storage": "fp16"}, "use master=fp32, or lr >= 6.1e-05"),
        ({"master": "kahan", "learning_rate_needed": None}, "use master=split, or a larger lr"),
        ({"master": "split"}, "fp32 is too coarse for it; use lr >= 6.1e-05"),
        ({"master": "stochastic"}, "fp32 is too coarse for it; use lr >= 6.1e-05"),
        ({"storage": "fp32"}, "fp32 is too coarse for it; use lr >= 6.1e-05"),
    ],
)
def test_message_gives_the_numbers_and_what_to_do(changed: dict[str, Any], remedy: str) -> None:
    values: dict[str, Any] = {
        "group": 1, "storage": "bf16", "master": "none", "learning_rate": 1e-6, "weights": 1000, "stuck": 985,
        "median_weight": 0.03, "smallest_step": 6.104e-5, "median_update": 1e-6, "learning_rate_needed": 6.104e-5,
    }  # fmt: skip
    stall = Stall(**values | changed)
    assert str(stall) == (
        f"parameter group 1 stalls at lr=1e-06: 98.5 % of its {stall.storage} weights (master={stall.master}) that had a "
        f"gradient did not move; the median weight 0.03 moves by 6.1e-05 or more, its update was 1e-06; {remedy}"
    )
