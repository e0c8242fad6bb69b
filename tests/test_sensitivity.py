import ctypes
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from halfstep.control import sensitivity
from halfstep.control.monitor import observe_shapes
from halfstep.control.sensitivity import (
    choose_plan,
    measure_costs,
    measure_harm,
)
from halfstep.control.trials import run_once
from halfstep.conversion import convert
from halfstep.errors import PlanError
from halfstep.machine.timing import Stopwatch
from halfstep.numerics import rows
from halfstep.numerics.kernels import Library
from halfstep.plan import Plan, Rule
from halfstep.records import Measurement
from helpers import assert_same, copy_weights, make_cnn, make_mlp, make_profile, seeded


class TiedModel(nn.Module):
    """A head that is the embedding, beside a layer that is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.body(self.embedding(ids))))
        return logits


def pretend_times(
    monkeypatch: pytest.MonkeyPatch,
    product: Callable[[tuple[int, ...], str], float],
    *,
    trial: tuple[float, float] = (2.0, 1.0),
) -> list[tuple[tuple[int, ...], str]]:
    """Give products the times that `product` says, casts none, and the trial (fp32, plan) the ones of `trial`.

    Everything that would be timed still runs. The list that is returned fills with the products that were timed.
    """
    timed: list[tuple[tuple[int, ...], str]] = []
    turns = itertools.cycle(trial)

    def time_products(operation: str, shape: tuple[int, ...], format: str, watch: Stopwatch) -> list[Measurement]:
        timed.append((shape, format))
        ms = product(shape, format)
        return [Measurement(operation=operation, product="output", format=format, shape=shape, milliseconds=ms)]

    def time_once(self: Stopwatch, call: Callable[[], object]) -> float:
        call()
        return next(turns)

    monkeypatch.setattr(sensitivity, "time_products", time_products)
    monkeypatch.setattr(sensitivity, "_time_cast", lambda format, watch: 0.0)
    monkeypatch.setattr(Stopwatch, "time_once", time_once)
    return timed


def bf16_is_faster(shape: tuple[int, ...], format: str) -> float:
    return {"fp32": 4.0}.get(format, 1.0)


# --- what is chosen


def test_every_layer_gets_bf16_with_a_reason_where_it_is_faster_and_the_trial_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_times(monkeypatch, bf16_is_faster)
    model = make_mlp()
    choice = choose_plan(model, (torch.randn(4, 8),), profile=make_profile("native"))
    rules = {rule.path: rule for rule in choice.plan.rules if rule.names_a_path}
    assert set(rules) == {"0", "2", "4"}
    assert {(rule.compute, rule.storage, rule.master) for rule in rules.values()} == {("bf16", "bf16", "split")}
    assert all(rule.why for rule in choice.plan.rules)
    assert "1 ms under the plan and 2 ms in fp32" in choice.why
    assert choice.seconds > 0
    assert Plan.parse(str(choice.plan)) == choice.plan


def test_only_layers_that_gain_leave_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_times(monkeypatch, lambda shape, format: 2.0 if format == "fp32" or shape[1:] == (16, 16) else 1.0)
    choice = choose_plan(make_mlp(), (torch.randn(4, 8),), profile=make_profile("native"))
    formats = {rule.path: rule.compute for rule in choice.plan.rules if rule.names_a_path}
    assert formats == {"0": "bf16", "2": "fp32", "4": "bf16"}


def test_plan_that_loses_the_trial_is_dropped_and_the_numbers_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_times(monkeypatch, bf16_is_faster, trial=(1.0, 2.0))
    choice = choose_plan(make_mlp(), (torch.randn(4, 8),), profile=make_profile("native"))
    assert {rule.compute for rule in choice.plan.rules} == {"fp32"}
    assert "kept in fp32" in choice.why
    assert "2 ms under the plan and 1 ms in fp32" in choice.why
    assert all("the model as a whole loses" in rule.why for rule in choice.plan.rules if rule.names_a_path)


def test_gain_within_timing_noise_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_times(monkeypatch, lambda shape, format: 1.0 if format == "fp32" else 0.97)
    choice = choose_plan(make_mlp(), (torch.randn(4, 8),), profile=make_profile("native"))
    assert {rule.compute for rule in choice.plan.rules} == {"fp32"}
    assert "no layer is faster in 16 bits" in choice.why


@pytest.mark.parametrize(("trial", "storage"), [((2.0, 1.0), "bf16"), ((1.0, 2.0), "fp32")])
def test_layers_that_cannot_be_timed_leave_the_choice_to_the_trial(
    monkeypatch: pytest.MonkeyPatch, trial: tuple[float, float], storage: str
) -> None:
    pretend_times(monkeypatch, bf16_is_faster, trial=trial)
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4))
    plan = choose_plan(model, (torch.randn(4, 3, 8, 8),), profile=make_profile("native")).plan
    with convert(model, plan) as conversion:
        assert [record.storage for record in conversion.describe()] == [storage, "fp32"]


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_tables_with_sparse_gradients_keep_fp32_weights_without_kernels(
    monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    pretend_times(monkeypatch, bf16_is_faster)
    monkeypatch.setattr(rows.KERNELS, "library", Library(ctypes.CDLL(None) if kernels else None, "by hand"))
    model = nn.Sequential(nn.Embedding(5, 8, sparse=True), nn.Linear(8, 2))
    plan = choose_plan(model, (torch.arange(4),), profile=make_profile("native")).plan
    with convert(model, plan) as conversion:
        assert [record.storage for record in conversion.describe()] == ["bf16" if kernels else "fp32", "bf16"]


@pytest.mark.parametrize("sparse", [False, True])
def test_tables_that_are_cut_to_a_norm_keep_fp32_weights(monkeypatch: pytest.MonkeyPatch, sparse: bool) -> None:
    pretend_times(monkeypatch, bf16_is_faster)
    monkeypatch.setattr(rows.KERNELS, "library", Library(ctypes.CDLL(None), "by hand"))
    model = nn.Sequential(nn.Embedding(5, 8, sparse=sparse, max_norm=1.0), nn.Linear(8, 2))
    plan = choose_plan(model, (torch.arange(4),), profile=make_profile("native")).plan
    with convert(model, plan) as conversion:
        table, layer = conversion.describe()
    assert (table.storage, layer.storage) == ("fp32", "bf16")
    assert table.why.startswith("max_norm writes to the weights")


def test_fp16_brings_a_dynamic_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_times(monkeypatch, bf16_is_faster)
    choice = choose_plan(make_mlp(), (torch.randn(4, 8),), profile=make_profile("slower", "native"))
    assert {rule.compute for rule in choice.plan.rules} == {"fp16"}
    assert choice.plan.loss_scale == "dynamic"
    convert(make_mlp(), choice.plan)


@pytest.mark.parametrize(("best", "formats"), [(1.0, {"fp32", "bf16"}), (2.0, {"fp32", "bf16", "fp16"})])
def test_fp16_is_timed_only_where_it_can_beat_bf16(
    monkeypatch: pytest.MonkeyPatch, best: float, formats: set[str]
) -> None:
    timed = pretend_times(monkeypatch, bf16_is_faster)
    profile = make_profile("native", "native")
    capabilities = [replace(c, ratio_best=best) if c.format == "fp16" else c for c in profile.capabilities]
    choose_plan(make_mlp(), (torch.randn(4, 8),), profile=replace(profile, capabilities=tuple(capabilities)))
    assert {format for _, format in timed} == formats


def test_machine_without_a_fast_16_bit_format_gets_fp32_with_its_reasons_and_the_model_is_never_run() -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the model was run")

    model = make_mlp()
    model.register_forward_pre_hook(fail)
    choice = choose_plan(model, (torch.randn(4, 8),), profile=make_profile("slower", "unsupported"))
    assert {rule.compute for rule in choice.plan.rules} == {"fp32"}
    assert choice.why == choice.plan.rules[0].why
    assert "bf16: bf16 by hand; fp16: fp16 by hand" in choice.why


@pytest.mark.parametrize("status", ["slower", "emulated", "unsupported"])
def test_only_native_formats_are_candidates(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    timed = pretend_times(monkeypatch, bf16_is_faster)
    profile = make_profile(status, status)  # type: ignore[arg-type]
    assert choose_plan(make_mlp(), (torch.randn(4, 8),), profile=profile).plan.rules[0].compute == "fp32"
    assert not timed


def test_every_distinct_shape_is_timed_once_and_counted_as_often_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = pretend_times(monkeypatch, bf16_is_faster)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, shared, nn.Linear(8, 8), nn.Linear(8, 3))
    with observe_shapes(model) as shapes:
        model(torch.randn(4, 8))
    costs = {cost.path: cost for cost in measure_costs(shapes, ("fp32", "bf16"), Stopwatch())}
    assert sorted(timed) == sorted({((4, 8, 8), "fp32"), ((4, 8, 8), "bf16"), ((4, 8, 3), "fp32"), ((4, 8, 3), "bf16")})
    assert costs["0"].products == {"fp32": 8.0, "bf16": 2.0}
    assert costs["2"].products == {"fp32": 4.0, "bf16": 1.0}


def test_a_shape_that_seems_to_lose_is_timed_again_and_the_faster_times_count(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed = iter([9.0])

    def product(shape: tuple[int, ...], format: str) -> float:
        if shape == (4, 8, 3):
            return 2.0  # in both
        return 4.0 if format == "fp32" else next(disturbed, 1.0)

    timed = pretend_times(monkeypatch, product)
    with observe_shapes(model := nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))) as shapes:
        model(torch.randn(4, 8))
    first, second = measure_costs(shapes, ("fp32", "bf16"), Stopwatch())
    assert first.gains("bf16") and first.products == {"fp32": 4.0, "bf16": 1.0}
    assert not second.gains("bf16")
    assert len(timed) == 8


def test_casts_are_counted_for_inputs_and_outputs_of_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_times(monkeypatch, bf16_is_faster)
    monkeypatch.setattr(sensitivity, "_time_cast", lambda format, watch: 0.5)
    model = nn.Sequential(nn.Linear(8, 3))
    with observe_shapes(model) as shapes:
        model(torch.randn(4, 8))
    (cost,) = measure_costs(shapes, ("fp32", "bf16"), Stopwatch())
    assert cost.casts == {"bf16": 0.5 * (4 * 8 + 4 * 3)}


# --- shared weights


def test_modules_that_share_a_weight_get_one_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_times(monkeypatch, bf16_is_faster)
    model = TiedModel()
    choice = choose_plan(model, (torch.arange(6),), profile=make_profile("native"))
    rules = {rule.path: rule for rule in choice.plan.rules if rule.names_a_path}
    settings = [(rules[p].compute, rules[p].storage, rules[p].master) for p in ("embedding", "head")]
    assert settings == [("bf16", "bf16", "split")] * 2
    assert "shares a weight with head" in rules["embedding"].why
    with convert(model, choice.plan):
        assert model.head.weight is model.embedding.weight


def test_shared_weight_stays_fp32_where_one_of_its_layers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_times(monkeypatch, lambda shape, format: 2.0 if format == "fp32" or shape[-1] == 11 else 1.0)
    model = TiedModel()
    choice = choose_plan(model, (torch.arange(6),), profile=make_profile("native"))
    rules = {rule.path: rule for rule in choice.plan.rules if rule.names_a_path}
    assert {path: rule.compute for path, rule in rules.items()} == {
        "embedding": "fp32", "head": "fp32", "body": "bf16",
    }  # fmt: skip
    convert(model, choice.plan).undo()


def test_layers_that_share_weights_in_a_chain_get_one_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_times(monkeypatch, lambda shape, format: 2.0 if format == "fp32" or shape[-1] == 9 else 1.0)
    first, second, third = nn.Linear(8, 9), nn.Linear(8, 9), nn.Linear(4, 9)
    second.weight, third.bias = first.weight, second.bias

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = first, second, third

        def forward(self, x: Tensor) -> Tensor:
            total: Tensor = self.first(x[:2]) + self.second(x[:2]) + self.third(x[:2, :4])
            return total

    model = Chain()
    monkeypatch.setattr(
        sensitivity, "time_products",
        lambda operation, shape, format, watch: [
            Measurement(operation=operation, product="output", format=format, shape=shape,
                        milliseconds=2.0 if format == "fp32" or shape[1] == 4 else 1.0)
        ],
    )  # fmt: skip
    choice = choose_plan(model, (torch.randn(4, 8),), profile=make_profile("native"))
    with convert(model, choice.plan):
        assert len({parameter.dtype for parameter in model.parameters()}) == 1


# --- no trace


@pytest.mark.parametrize("trial", [(2.0, 1.0), (1.0, 2.0)], ids=["wins", "loses"])
def test_choosing_a_plan_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, trial: tuple[float, float]) -> None:
    pretend_times(monkeypatch, bf16_is_faster, trial=trial)
    model = nn.Sequential(make_cnn(), nn.Dropout(0.5))
    before, classes = copy_weights(model), [type(module) for module in model.modules()]
    with seeded(0):
        x, random = torch.randn(4, 3, 8, 8), torch.get_rng_state()
        kept = x.clone()
        choose_plan(model, (x,), profile=make_profile("native"))
        assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, kept)
    assert_same(copy_weights(model), before)
    assert [type(module) for module in model.modules()] == classes
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_choosing_a_plan_leaves_the_model_as_it_was_when_its_forward_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_times(monkeypatch, bf16_is_faster)
    model = make_mlp()
    with pytest.raises(RuntimeError, match="shapes"):
        choose_plan(model, (torch.randn(4, 7),), profile=make_profile("native"))
    assert_same(copy_weights(model), copy_weights(make_mlp()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_trial_sees_half_of_the_batch_and_keyword_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 3)
            self.rows: list[int] = []

        def forward(self, x: Tensor, *, factor: Tensor) -> Tensor:
            self.rows.append(len(x))
            y: Tensor = self.fc(x) * factor
            return y

    pretend_times(monkeypatch, bf16_is_faster)
    model = Scaled()
    choose_plan(model, (torch.randn(6, 8),), {"factor": torch.ones(6, 1)}, profile=make_profile("native"))
    assert model.rows[0] == 6
    assert set(model.rows[1:]) == {3}


def test_model_on_which_bf16_is_really_timed_gets_a_plan_that_can_be_honoured() -> None:
    model = make_cnn()
    choice = choose_plan(model, (torch.randn(4, 3, 8, 8),), profile=make_profile("native", "native"))
    assert choice.why
    with convert(model, choice.plan) as conversion, conversion.autocast():
        run_once(model, (torch.randn(4, 3, 8, 8),), {})


def test_harm_names_the_layer_whose_gradient_underflows_and_leaves_no_trace() -> None:
    """Behind layer 2 gradients are below fp16's smallest number, so it learns nothing in fp16 without a loss scale."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    before = copy_weights(model)
    batches = torch.randn(2, 8, 6)

    def run(number: int) -> None:
        (model(batches[number]).square().mean() * 1e-9).backward()

    plan = Plan.parse("path=0 compute=bf16\npath=1 compute=fp32\ncompute=fp16 cast=unit")
    random_state = torch.get_rng_state()
    (harm,) = measure_harm(model, plan, run)
    assert (harm.path, harm.compute) == ("2", "fp16")
    assert harm.error == 1.0
    assert harm.sqnr_db == 0.0
    assert_same(copy_weights(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_harm_is_the_rounding_error_of_the_format_and_noise_that_between_batches() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    batches = torch.randn(2, 64, 32)

    def run(number: int) -> None:
        model(batches[number]).square().mean().backward()

    plan = Plan.parse("path=1 compute=fp16 cast=unit\ncompute=fp32")
    (harm,) = measure_harm(model, plan, run)
    assert 2.0**-11 / 30 < harm.error**0.5 < 3 * 2.0**-11  # fp16 rounds by at most 2^-11 of a number
    gradients = []
    for number in (0, 1):
        run(number)
        gradients.append(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    expected = (gradients[0] - gradients[1]).square().sum() / 2 / gradients[0].square().sum()
    assert harm.noise == pytest.approx(expected.item(), rel=1e-6)


# --- rules of the user's own


def test_given_rules_stand_before_the_chosen_ones_and_their_layers_are_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = pretend_times(monkeypatch, bf16_is_faster)
    given = Plan(rules=(Rule(path="4", compute="fp32"),), rest="auto", states="8-bit", name="mine")
    model = make_mlp()
    plan = choose_plan(model, (torch.randn(4, 8),), profile=make_profile("native"), given=given).plan
    assert (plan.rest, plan.name, plan.states, plan.functions) == ("fp32", "mine", "8-bit", "fast")
    assert plan.rules[0] == given.rules[0]
    with convert(model, plan) as conversion:
        stored = {layer.path: (layer.compute, layer.storage, layer.master) for layer in conversion.describe()}
    assert stored["0"] == ("bf16", "bf16", "split") and stored["4"] == ("fp32", "fp32", "none")
    assert {shape for shape, _ in timed} == {(4, 8, 16), (4, 16, 16)}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(kind="embedding", storage="fp32"), ("bf16", "fp32", "none")),
        (Rule(kind="embedding", compute="fp32"), ("fp32", "fp32", "none")),
        (Rule(path="table", compute="bf16", storage="bf16", master="kahan"), ("bf16", "bf16", "kahan")),
        (Rule(saved="int8"), ("bf16", "bf16", "split")),
    ],
    ids=str,
)
@pytest.mark.parametrize("trial", [(2.0, 1.0), (1.0, 2.0)], ids=["wins", "loses"])
def test_given_rules_say_all_of_the_weights_or_nothing(
    monkeypatch: pytest.MonkeyPatch, rule: Rule, expected: tuple[str, str, str], trial: tuple[float, float]
) -> None:
    pretend_times(monkeypatch, bf16_is_faster, trial=trial)
    model = nn.Sequential()
    model.add_module("table", nn.EmbeddingBag(9, 8))
    model.add_module("out", nn.Linear(8, 4))
    plan = choose_plan(
        model, (torch.randint(9, (4, 3)),), profile=make_profile("native"), given=Plan(rules=(rule,), rest="auto")
    ).plan
    with convert(model, plan) as conversion:
        table = conversion.describe()[0]
    if trial[0] > trial[1] or rule.path == "table":
        assert (table.compute, table.storage, table.master) == expected
    else:
        assert (table.compute, table.storage) == ("fp32", "fp32")


@pytest.mark.parametrize("rule", ["path=head compute=fp32", "kind=embedding storage=fp32"])
@pytest.mark.parametrize("trial", [(2.0, 1.0), (1.0, 2.0)], ids=["wins", "loses"])
def test_weights_that_are_shared_with_those_of_a_given_rule_follow_it(
    monkeypatch: pytest.MonkeyPatch, rule: str, trial: tuple[float, float]
) -> None:
    pretend_times(monkeypatch, bf16_is_faster, trial=trial)
    model, given = TiedModel(), Plan.parse(f"rest=auto\n{rule}")
    plan = choose_plan(model, (torch.randint(11, (4, 3)),), profile=make_profile("native"), given=given).plan
    with convert(model, plan) as conversion:
        layers = {layer.path: layer for layer in conversion.describe()}
    assert [layers[path].storage for path in ("embedding", "head")] == ["fp32", "fp32"]
    assert layers["body"].storage == ("bf16" if trial[0] > trial[1] else "fp32")


def test_a_plan_whose_rest_is_open_is_not_converted() -> None:
    with pytest.raises(PlanError, match="rest=auto is chosen by timing a batch"):
        convert(make_mlp(), Plan(rest="auto"))


def test_kinds_that_the_model_lacks_get_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_times(monkeypatch, bf16_is_faster)
    plan = choose_plan(make_mlp(), (torch.randn(4, 8),), profile=make_profile("native")).plan
    assert {rule.kind for rule in plan.rules} == {None}
    given = Plan(rules=(Rule(kind="conv", compute="bf16"),), rest="auto")
    plan = choose_plan(make_mlp(), (torch.randn(4, 8),), profile=make_profile("native"), given=given).plan
    assert [rule.kind for rule in plan.rules if rule.kind] == ["conv"]
