"""Saved activations: what is packed by which rule, gradients beside exact ones, life with the rest of torch."""

import gc
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from halfstep.control.search import choose_saved_formats
from halfstep.control.sensitivity import measure_saved_costs
from halfstep.errors import PlanError, UnsupportedError
from halfstep.mechanisms import activations
from halfstep.mechanisms.activations import SMALLEST, Keeper
from halfstep.numerics import scaled_attention
from halfstep.numerics.packing import mark_activations
from halfstep.records import SavedRecord
from helpers import has_hooks, seeded

ROWS, WIDTH = 512, 64  # 32 KiB as bool, 128 KiB in fp32
LOSSY = ("bf16", "int8", "int4")
lossy = pytest.mark.parametrize("format", LOSSY)


class Call(nn.Module):
    """A module that calls a function, with a parameter and a buffer for it to use."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        with seeded(1):
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
            self.big = nn.Parameter(torch.randn(ROWS, WIDTH))
            self.register_buffer("mask", torch.rand(ROWS, WIDTH) < 0.5)

    def forward(self, *args: Any) -> Tensor:
        return self.function(self, *args)


def make_input(seed: int = 0, rows: int = ROWS) -> Tensor:
    with seeded(seed):
        return torch.randn(rows, WIDTH, requires_grad=True)


def make_net() -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(
            nn.Linear(WIDTH, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)
        )


def differentiate(model: nn.Module, x: Tensor, keeper: Keeper | None = None, seed: int = 0) -> list[Tensor]:
    with seeded(seed):
        if keeper is None:
            y = model(x)
        else:
            with keeper.keep():
                y = model(x)
    inputs = [t for t in (x, *model.parameters()) if t.requires_grad]
    return [g for g in torch.autograd.grad(y.square().mean(), inputs, allow_unused=True) if g is not None]


def find_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Squared error of a gradient as a share of its square."""
    error = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
    return error / sum(float(b.square().sum()) for b in exact)


def list_ways(function: Callable[..., Tensor], *args: Any, format: str = "int8") -> set[str]:
    """In which formats, or else by which rules as it is, the tensors of a function were kept."""
    model = Call(function)
    keeper = Keeper(model, {"": format})
    with keeper.keep():
        model(*(args or (make_input(),)))
    return {record.format or record.why for record in keeper.records}


def change_view_in_place(_: Call, x: Tensor) -> Tensor:
    y = x * 3
    F.relu(y.view(-1), inplace=True)
    return y


RULES: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "a float with a graph": (lambda _, x: (x * 2).exp().sin(), {"int8"}),
    "relu's own result": (lambda _, x: F.relu(x * 2), {"positive"}),
    "relu's result as another's input": (lambda m, x: F.linear(F.relu(x * 2), m.weight), {"positive", "int8", "resident"}),
    "relu in place": (lambda _, x: F.relu(x * 2, inplace=True), {"positive"}),
    "a view changed in place": (change_view_in_place, {"in place"}),
    "dropout's noise": (lambda _, x: F.dropout(x * 2, 0.5), {"two values"}),
    "a comparison": (lambda _, x: torch.where(x * 2 > 0, x, 0.0), {"bits"}),
    "a mask that is a buffer": (lambda m, x: torch.where(m.mask, x, 0.0), {"resident"}),
    "a parameter": (lambda m, x: x * m.big, {"resident"}),
    "a view of a parameter": (lambda m, x: x * m.big.view(-1).view(ROWS, WIDTH), {"resident"}),
    "a cast of a parameter": (lambda m, x: (x * 2) * m.big.double().float(), {"int8", "weight"}),
    "the input": (lambda _, x: x.sin(), {"resident"}),
    "what is small": (lambda _, x: (x[:4] * 2).sin(), {"small"}),
    "fp64": (lambda _, x: (x.double() * 2).sin(), {"kind"}),
    "no graph": (lambda m, x: x * m.big.detach().sin(), {"no graph"}),
    "log-softmax": (lambda _, x: F.log_softmax(x * 2, -1), {"logarithm"}),
    "an expanded tensor": (lambda _, x: (x[:1] * 2).expand(ROWS, WIDTH).sin(), {"expanded"}),
    "indices of max-pooling": (
        lambda _, x: F.max_pool2d((x * 2).view(2, 4, 64, 64), 1), {"int8", "integers"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "ways"), RULES.values(), ids=list(RULES))
def test_every_rule(function: Callable[..., Tensor], ways: set[str]) -> None:
    assert list_ways(function) == ways


def test_statistics_of_rows_are_left_alone() -> None:
    assert list_ways(lambda _, x: (x * 2).norm(dim=-1, keepdim=True).reciprocal(), make_input(rows=SMALLEST // 4)) == {
        "int8",
        "statistic",
    }


def test_sixteen_bits_are_not_narrowed_to_bf16() -> None:
    assert list_ways(lambda _, x: (x * 2).bfloat16().sin(), format="bf16") == {"narrow"}
    assert list_ways(lambda _, x: (x * 2).bfloat16().sin(), format="int8") == {"int8"}


def test_what_is_saved_outside_of_the_model_is_left_alone() -> None:
    model = Call(lambda _, x: x * 2)
    keeper = Keeper(model, {"": "int8"})
    with keeper.keep():
        model(make_input()).sin()
    assert {record.why for record in keeper.records} == {"outside"}


EXACT: dict[str, Callable[..., Tensor]] = {
    "relu": lambda _, x: F.relu(x * 2),
    "dropout": lambda _, x: F.dropout(x * 2, 0.3),
    "where": lambda _, x: torch.where(x * 2 > 0.5, x, -x),
    "max-pool": lambda _, x: F.max_pool2d((x * 2).view(2, 4, 64, 64), 2),
    "log-softmax": lambda _, x: F.log_softmax(x * 2, -1),
    "bf16 relu": lambda _, x: F.relu((x * 2).bfloat16()),
}


@lossy
@pytest.mark.parametrize("function", EXACT.values(), ids=list(EXACT))
def test_masks_indices_and_logarithms_give_the_exact_gradient(function: Callable[..., Tensor], format: str) -> None:
    model, x = Call(function), make_input()
    keeper = Keeper(model, {"": format})
    for found, exact in zip(differentiate(model, x, keeper), differentiate(model, x), strict=True):
        assert torch.equal(found, exact)
    assert any(record.format or record.why == "logarithm" for record in keeper.records)


@pytest.mark.parametrize(("format", "levels"), [("int8", 255), ("int4", 15)])
def test_error_of_evenly_spread_numbers_is_that_of_theory(format: str, levels: int) -> None:
    model = Call(lambda _, x: (x * 1).square())
    keeper = Keeper(model, {"": format})
    with seeded(0), keeper.keep(measure=True):
        model(torch.rand(4096, WIDTH, requires_grad=True))
    (record,) = keeper.records
    mean_square, step_square = 1 / 3, (255 / 257 / levels) ** 2  # the range of 256 even draws is 255 / 257
    assert record.sqnr == pytest.approx(10 * torch.tensor(mean_square / (step_square / 6)).log10().item(), abs=0.1)


@pytest.mark.parametrize(("format", "levels"), [("int8", 255), ("int4", 15)])
def test_gradients_that_are_linear_in_activations_are_unbiased(format: str, levels: int) -> None:
    model, x, draws = Call(lambda m, x: (x * 1) @ m.weight), make_input(), 200
    with seeded(3):
        direction = torch.randn(ROWS, WIDTH)
    exact = (x.T @ direction).detach().double()
    found = torch.zeros_like(exact)
    for seed in range(draws):
        keeper = Keeper(model, {"": format}, seed=seed)
        with keeper.keep():
            y = model(x)
        found += torch.autograd.grad(y, model.weight, direction)[0].double() / draws
    groups = x.detach().view(-1, 256).double()
    step = ((groups.amax(1) - groups.amin(1)) / levels)[:, None].expand(-1, 256).reshape(ROWS, WIDTH)
    sigma = ((step.square() / 4).T @ direction.double().square() / draws).sqrt()  # variance of a number <= step^2 / 4
    assert bool(((found - exact).abs() <= 4 * sigma).all())
    assert float((found - exact).abs().mean()) > 0


def test_finer_formats_give_nearer_gradients() -> None:
    model, x = make_net(), make_input()
    exact = differentiate(model, x)
    errors = [find_error(differentiate(model, x, Keeper(model, {"": format})), exact) for format in LOSSY]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.05
    assert errors[2] / errors[1] == pytest.approx((255 / 15) ** 2, rel=0.5)
    assert find_error(differentiate(model, x, Keeper(model, {"": ""})), exact) == 0


def test_formats_go_by_path_and_are_inherited() -> None:
    first, second = make_net(), make_net()
    first[5], second[0] = nn.Linear(128, WIDTH), nn.Linear(WIDTH, 128)
    model = nn.Sequential(first, second)
    keeper = Keeper(model, {"": "int8", "1": "int4", "1.1": ""})
    with keeper.keep():
        model(make_input())
    formats = {record.path: record.format for record in keeper.records if record.format in LOSSY}
    assert formats["0.1"] == formats["0.3"] == "int8"
    assert formats["1.3"] == "int4" and "1.1" not in formats
    assert ("1.1", "asked") in {(record.path, record.why) for record in keeper.records}


def test_unknown_paths_and_formats_are_refused() -> None:
    with pytest.raises(PlanError, match=r"unknown module path 'O'\. Allowed: "):
        Keeper(make_net(), {"O": "int8"})
    with pytest.raises(PlanError, match="unknown saved format 'int7'"):
        Keeper(make_net(), {"": "int7"})


def count_packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    original = activations.pack_groups

    def pack_groups(x: Tensor, *rest: Any) -> Any:
        sizes.append(x.numel())
        return original(x, *rest)

    monkeypatch.setattr(activations, "pack_groups", pack_groups)
    return sizes


def use_often(_: Call, x: Tensor) -> Tensor:
    y = x * 2
    return y.sin() + y * y + y.view(-1, 8).cos().view_as(y) + y.t().exp().t().cos() * 0


def test_what_several_operations_save_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = count_packs(monkeypatch)
    model = Call(use_often)
    keeper = Keeper(model, {"": "int8"})
    with keeper.keep():
        y = model(make_input())
    assert len(sizes) == 2  # y however often and however viewed, and exp(y), which two save
    (record,) = keeper.records
    assert (record.tensors, record.bytes) == (6, 2 * 4 * ROWS * WIDTH)
    y.sum().backward()


def test_memory_that_is_used_again_is_not_taken_for_what_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed tensors leave their addresses to new ones of the same shape and version."""
    sizes = count_packs(monkeypatch)

    def run(_: Call, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for i in range(1, 20):
            total = total + ((x * i).square() / i).sum()
        return total

    model, x = Call(run), make_input()
    assert find_error(differentiate(model, x, Keeper(model, {"": "int8"})), differentiate(model, x)) < 1e-3
    assert len(sizes) == 19


def test_views_and_memory_formats_come_back_with_their_strides() -> None:
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            context.save_for_backward(x)
            context.strides = x.stride()
            return x.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            (x,) = context.saved_tensors
            seen.append((x.stride(), context.strides, x.detach().clone()))
            return gradient

    def run(_: Call, x: Tensor) -> Tensor:
        y = (x * 2).view(8, 16, 16, 16)
        last, turned, part = y.contiguous(memory_format=torch.channels_last), y.permute(3, 0, 2, 1), y[:, 2:14]
        return Look.apply(last).sum() + Look.apply(turned).sum() + Look.apply(part).sum()  # type: ignore[no-any-return]

    model, x = Call(run), make_input()
    differentiate(model, x, Keeper(model, {"": "int8"}))
    part, turned, last = seen
    y = (x * 2).detach().view(8, 16, 16, 16)
    assert last[0] == last[1] and turned[0] == turned[1]
    for (_, _, found), exact in zip((part, turned, last), (y[:, 2:14], y.permute(3, 0, 2, 1), y), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=0.1)


def test_a_model_in_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0):
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3))
        x = torch.randn(8, 3, 32, 32, requires_grad=True).contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    keeper = Keeper(model, {"": "int8"})
    assert find_error(differentiate(model, x, keeper), differentiate(model, x)) < 1e-3
    assert {("2", "positive"), ("3", "integers"), ("1", "int8")} <= {(r.path, r.format) for r in keeper.records}


def test_what_is_changed_in_place_after_it_was_packed_gives_the_gradient_at_the_saved_values() -> None:
    def run(_: Call, x: Tensor) -> Tensor:
        y = x * 2
        z = y.sin()
        y.mul_(0)
        return z + y

    model, x = Call(run), make_input()
    with Keeper(model, {"": "int8"}).keep():
        z = model(x)
    (found,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(found, 2 * (2 * x).cos(), rtol=0, atol=0.1)


def test_what_is_changed_in_place_and_kept_as_it_is_raises_torchs_error() -> None:
    model, x = Call(lambda m, x: x * m.big), make_input()
    for keeper in (Keeper(model, {"": "int8"}), Keeper(model, {})):
        with keeper.keep():
            y = model(x)
        with torch.no_grad():
            model.big.add_(1)
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            y.sum().backward()


def test_versions_make_two_packs_of_one_memory() -> None:
    def run(_: Call, x: Tensor) -> Tensor:
        y = x * 2
        first = y.sin()
        y.mul_(2)
        return first + y.sin()

    model, x = Call(run), make_input()
    with Keeper(model, {"": "int8"}).keep():
        y = model(x)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], 2 * (2 * x).cos() + 4 * (4 * x).cos(), rtol=0, atol=0.8
    )


@lossy
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(format: str, reentrant: bool) -> None:
    net = make_net()
    model = Call(lambda _, x: checkpoint(net, x * 2, use_reentrant=reentrant) + (x * 2).sin().sum())
    model.net = net
    x = make_input()
    exact = differentiate_by_backward(model, x)
    for inside in (False, True):
        found = differentiate_by_backward(model, x, Keeper(model, {"": format}), inside=inside)
        assert find_error(found, exact) < {"bf16": 1e-4, "int8": 1e-3, "int4": 0.1}[format]


def differentiate_by_backward(
    model: nn.Module, x: Tensor, keeper: Keeper | None = None, *, inside: bool = False
) -> list[Tensor]:
    """Reentrant checkpoints know backward() alone."""
    keeper = keeper or Keeper(model, {})
    with keeper.keep():
        loss = model(x).square().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    found = [t.grad for t in (x, *model.parameters()) if t.grad is not None]
    for t in (x, *model.parameters()):
        t.grad = None
    return found


@lossy
def test_autocast(format: str) -> None:
    model, x = make_net(), make_input()
    keeper = Keeper(model, {"": format})
    with torch.autocast("cpu", torch.bfloat16):
        exact = differentiate(model, x)
    with torch.autocast("cpu", torch.bfloat16), keeper.keep():
        y = model(x)
    found = torch.autograd.grad(y.float().square().mean(), [x, *model.parameters()])
    assert find_error(list(found), exact) < {"bf16": 1e-3, "int8": 1e-3, "int4": 0.1}[format]
    assert ("1", format if format != "bf16" else "narrow") in {(r.path, r.format or r.why) for r in keeper.records}


def test_nothing_is_packed_without_gradients() -> None:
    model = make_net()
    keeper = Keeper(model, {"": "int8"})
    with keeper.keep(), torch.no_grad():
        model(make_input())
    assert keeper.records == ()


def test_backward_twice_through_a_graph_that_is_kept() -> None:
    model, x = make_net(), make_input()
    with Keeper(model, {"": "int4"}).keep():
        y = model(x).square().mean()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_second_derivatives_are_refused_where_numbers_were_rounded_and_exact_elsewhere() -> None:
    x = make_input()
    rounded = Call(lambda _, x: (x * 2).sin())
    with Keeper(rounded, {"": "int8"}).keep():
        y = rounded(x).sum()
    with pytest.raises(UnsupportedError, match="second derivatives through module ''"):
        torch.autograd.grad(y, x, create_graph=True)
    masked = Call(lambda _, x: F.relu(x * 2) * (x * 3).relu())
    with Keeper(masked, {"": ""}).keep():
        (first,) = torch.autograd.grad(masked(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 12.0 * (x > 0))


def test_keepers_within_each_other_keep_each_its_own_model() -> None:
    outer, inner = Call(lambda _, x: (x * 2).sin()), Call(lambda _, x: (x * 2).cos())
    one, two = Keeper(outer, {"": "int8"}), Keeper(inner, {"": "int4"})
    with one.keep():
        with two.keep():
            inner(make_input())
        outer(make_input())
    assert [record.format for record in two.records] == ["int4"]
    assert [record.format for record in one.records] == ["int8"]


def test_other_threads_are_left_alone() -> None:
    model, x = make_net(), make_input()
    exact, found = differentiate(model, x), []
    keeper = Keeper(model, {"": "int4"})
    with keeper.keep():
        model[0](x)
        thread = threading.Thread(target=lambda: found.append(differentiate(model, x)))
        thread.start()
        thread.join()
        y = model(x)
    assert find_error(found[0], exact) == 0
    assert {record.path for record in keeper.records} == {"0", "1", "2", "3", "4", "5"}
    y.sum().backward()


def test_a_module_that_runs_in_another_thread_is_not_taken_for_one_of_this() -> None:
    inside, done = threading.Event(), threading.Event()

    def wait(_: Call, x: Tensor) -> Tensor:
        inside.set()
        done.wait(10)
        return x * 2

    model = Call(wait)
    keeper = Keeper(model, {"": "int8"})
    with keeper.keep():
        thread = threading.Thread(target=lambda: model(make_input()))
        thread.start()
        assert inside.wait(10)
        (make_input() * 2).sin()
        done.set()
        thread.join()
    assert {record.why for record in keeper.records} == {"outside"}


def test_threads_with_keepers_of_their_own() -> None:
    model, x = make_net(), make_input()
    expected = differentiate(model, x, Keeper(model, {"": "int8"}))
    found: dict[int, list[Tensor]] = {}

    def run(number: int) -> None:
        keeper = Keeper(model, {"": "int8"})
        for _ in range(5):
            keeper.passes = 0
            with keeper.keep():
                y = model(x)
            found[number] = list(torch.autograd.grad(y.square().mean(), [x, *model.parameters()]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gradients in found.values():
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert len(found) == 3


def test_the_block_leaves_nothing_behind_also_after_an_error() -> None:
    def fail(_: Call, x: Tensor) -> Tensor:
        raise ValueError("on purpose")

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Call(fail))
    keeper = Keeper(model, {"": "int8"})
    with pytest.raises(ValueError, match="on purpose"), keeper.keep():
        model(make_input())
    assert not has_hooks(model)
    x = make_input()
    y = (x * 2).sin()
    assert y.grad_fn is not None and torch.equal(y.grad_fn._saved_self, x * 2)  # type: ignore[attr-defined]


def test_an_error_that_is_caught_does_not_confuse_the_paths() -> None:
    def fail(_: Call, x: Tensor) -> Tensor:
        raise ValueError("on purpose")

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad, self.good = Call(fail), Call(lambda _, x: (x * 2).sin())

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.bad(x)
            except ValueError:
                x = (x * 3).cos()
            y: Tensor = self.good(x)
            return y

    model = Tries()
    keeper = Keeper(model, {"bad": "int4", "": "bf16", "good": "int8"})
    with keeper.keep():
        model(make_input())
    assert {(record.path, record.format) for record in keeper.records} == {("", "bf16"), ("good", "int8")}


def test_originals_are_freed_in_the_forward_pass_and_packs_in_the_backward_pass() -> None:
    originals, packs = [], []

    def run(_: Call, x: Tensor) -> Tensor:
        y = x * 2
        originals.append(StorageWeakRef(y.untyped_storage()))
        z = F.log_softmax(y.sin() * 3, -1)
        originals.append(StorageWeakRef(z.untyped_storage()))
        return z * z

    original_make = activations._Pass._make_region

    def make(self: Any, flat: Tensor, format: str) -> Any:
        region = original_make(self, flat, format)
        assert isinstance(region, activations._Rounded)
        packs.append(StorageWeakRef(region.groups.codes.untyped_storage()))
        return region

    model, x = Call(run), make_input()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(activations._Pass, "_make_region", make)
            with Keeper(model, {"": "int8"}).keep():
                y = model(x)
        assert originals[0].expired() and packs and not any(pack.expired() for pack in packs)
        y.sum().backward()
        del y
        assert originals[1].expired() and all(pack.expired() for pack in packs)
        with Keeper(model, {"": "int8"}).keep():
            y = model(x)
        del y  # without a backward pass: a result that is kept must not keep itself
        assert originals[3].expired()
    finally:
        gc.enable()


def test_the_same_seed_and_pass_give_the_same_bits_and_others_do_not() -> None:
    model, x = make_net(), make_input()

    def run(seed: int, passes: int) -> Tensor:
        keeper = Keeper(model, {"": "int4"}, seed=seed, passes=passes)
        return differentiate(model, x, keeper)[0]

    assert torch.equal(run(0, 0), run(0, 0))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([run(0, 0), run(0, 1), run(1, 0)], 2))
    keeper = Keeper(model, {"": "int4"})
    differentiate(model, x, keeper)
    assert torch.equal(differentiate(model, x, keeper)[0], run(0, 1))


def test_a_bad_number_is_not_hidden() -> None:
    model, x = Call(lambda m, x: (x * 1) @ m.weight), make_input().detach()
    x[3, 3] = torch.inf
    x.requires_grad_()
    with Keeper(model, {"": "int8"}).keep():
        y = model(x)
    y.nan_to_num(0.0, 0.0, 0.0).sum().backward()
    assert model.weight.grad is not None and not bool(model.weight.grad.isfinite().all())


def test_training_with_kept_activations_follows_exact_training() -> None:
    curves = []
    for format in ("", "int8", "int4"):
        model = make_net()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        keeper = Keeper(model, {"": format})
        losses = []
        for step in range(40):
            x = make_input(step).detach()
            with keeper.keep():
                y = model(x)
            loss = F.mse_loss(y, torch.tanh(x[:, :8]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    exact, eight, four = curves
    assert exact[-1] < 0.8 * exact[0]
    assert eight[-1] == pytest.approx(exact[-1], rel=0.01)
    assert four[-1] == pytest.approx(exact[-1], rel=0.05)


def test_measured_costs_fit_into_a_budget_and_keep_what_matters() -> None:
    model, x = make_net(), make_input(rows=1024)
    costs = measure_saved_costs(model, lambda: model(x).square().mean())
    assert not has_hooks(model) and all(p.grad is None for p in model.parameters())
    most, least = (sum(pick(cost.bytes.values()) for cost in costs) for pick in (max, min))
    budget = (most + 3 * least) // 4
    table = choose_saved_formats(costs, budget)
    keeper = Keeper(model, {path: table.get(path, "") for path, _ in model.named_modules()})
    with keeper.keep():
        model(x)
    assert sum(r.kept for r in keeper.records) <= budget
    exact = differentiate(model, x)
    harm = sum(cost.harm[table[cost.path]] for cost in costs)
    seeds = [Keeper(model, keeper.table, seed=seed) for seed in range(8)]
    found = sum(find_error(differentiate(model, x, k), exact) for k in seeds) / len(seeds)
    assert found == pytest.approx(harm, rel=0.5)


def test_a_harm_that_was_extrapolated_is_that_which_is_measured() -> None:
    model, x = make_net(), make_input(rows=1024)
    (cost,) = [c for c in measure_saved_costs(model, lambda: model(x).square().mean()) if c.path == "3"]
    exact = differentiate(model, x)[1:]
    table = {path: "int8" if path == "3" else "" for path, _ in model.named_modules()}
    seeds = [Keeper(model, table, seed=seed) for seed in range(8)]
    found = sum(find_error(differentiate(model, x, keeper)[1:], exact) for keeper in seeds) / len(seeds)
    assert found == pytest.approx(cost.harm["int8"], rel=0.3)


class KeepsSquares(torch.autograd.Function):
    """Saves a tensor that it has made itself, and so has no graph."""

    marked = True

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        squares = x * x
        if KeepsSquares.marked:
            mark_activations(squares)
        ctx.save_for_backward(squares)
        return squares * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (squares,) = ctx.saved_tensors
        found: Tensor = 3 * squares * gradients[0]
        return found


@pytest.mark.parametrize("marked", [True, False])
def test_what_a_function_has_marked_is_rounded_though_it_has_no_graph(
    monkeypatch: pytest.MonkeyPatch, marked: bool
) -> None:
    monkeypatch.setattr(KeepsSquares, "marked", marked)

    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = KeepsSquares.apply(x)
            return found

    model, x = nn.Sequential(nn.Linear(64, 256), Cube()), torch.randn(256, 64)
    keeper = Keeper(model, {"": "int8"})
    with keeper.keep(measure=True):
        model(x).sum().backward()
    (record,) = [r for r in keeper.records if r.path == "1"]
    assert (record.format, record.why) == (("int8", "") if marked else ("", "no graph"))
    assert (record.kept < 0.27 * record.bytes) == marked


def test_fast_attention_lets_its_weights_be_rounded() -> None:
    """[2, 4, 128, 32]: q, k, v and 128 x 128 weights, none of which has a graph where they are saved."""

    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.reshape(2, 128, 4, 32).transpose(1, 2) for part in x.chunk(3, -1))
            return scaled_attention.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)

    model, x = nn.Sequential(nn.Linear(16, 384), Attend()), torch.randn(2, 128, 16)
    gradients = []
    for table in ({"": ""}, {"": "int8"}):
        keeper = Keeper(model, table)
        model.zero_grad()
        torch.manual_seed(0)  # of the dropout
        with keeper.keep():
            model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    if scaled_attention.KERNELS.library.functions is None:
        pytest.skip("torch's own attention")
    assert next((r.tensors, r.format) for r in keeper.records if r.path == "1") == (4, "int8")
    assert 0 < find_error(gradients[1], gradients[0]) < 1e-3


def test_records_say_what_was_kept() -> None:
    record = SavedRecord(path="", format="", why="small", tensors=2, bytes=10, kept=10, sqnr=None)
    assert str(record) == "the model: 2 tensors, 10 bytes as they are: small"
