"""From measured costs to a plan: who leaves fp32, into what, and what the rest does."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.control.search import NOISE, LayerCost, SavedCost, choose_formats, choose_saved_formats, repair_plan
from halfstep.errors import PlanError
from halfstep.plan import Plan, Settings
from halfstep.records import HarmRecord

MILLISECONDS = st.floats(0.001, 1000.0)


def cost_of(path: str, casts: dict[str, float] | None = None, **products: float) -> LayerCost:
    return LayerCost(path=path, shape=(8, 16, 32), products=products, casts=casts or {})


def settings_of(plan: Plan, **modules: str) -> dict[str, Settings]:
    return dict(plan.resolve(modules).table)


@st.composite
def cost_lists(draw: st.DrawFn) -> list[LayerCost]:
    formats = draw(st.sampled_from([("fp32",), ("fp32", "bf16"), ("fp32", "fp16"), ("fp32", "bf16", "fp16")]))
    return [
        LayerCost(
            path=f"layer{i}",
            shape=(4, 4, 4),
            products={f: draw(MILLISECONDS) for f in formats},
            casts={f: draw(MILLISECONDS) for f in formats if f != "fp32"},
        )
        for i in range(draw(st.integers(0, 4)))
    ]


def test_total_counts_products_and_casts() -> None:
    cost = cost_of("fc", {"bf16": 0.25}, fp32=2.0, bf16=0.5)
    assert (cost.total("fp32"), cost.total("bf16")) == (2.0, 0.75)


def test_layer_that_gains_leaves_fp32_in_compute_and_storage() -> None:
    plan = choose_formats([cost_of("fc", {"bf16": 0.1}, fp32=2.0, bf16=0.5)])
    assert plan.name == "auto"
    fc = settings_of(plan, fc="linear")["fc"]
    assert (fc.compute, fc.storage, fc.master) == ("bf16", "bf16", "split")


def test_casts_may_eat_the_gain() -> None:
    plan = choose_formats([cost_of("fc", {"bf16": 1.6}, fp32=2.0, bf16=0.5)])
    assert {rule.compute for rule in plan.rules} == {"fp32"}


def test_gain_within_noise_is_no_gain() -> None:
    below = choose_formats([cost_of("fc", fp32=1.0, bf16=1.0 / (NOISE - 0.01))])
    above = choose_formats([cost_of("fc", fp32=1.0, bf16=1.0 / (NOISE + 0.01))])
    assert (below.rules[0].compute, above.rules[0].compute) == ("fp32", "bf16")


def test_one_16_bit_format_serves_the_whole_model_and_bf16_where_none_is_clearly_faster() -> None:
    plan = choose_formats([cost_of("a", fp32=4.0, bf16=2.0, fp16=1.0), cost_of("b", fp32=4.0, bf16=1.0, fp16=2.0)])
    assert [rule.compute for rule in plan.rules[:2]] == ["bf16", "bf16"]
    plan = choose_formats([cost_of("a", fp32=4.0, bf16=2.0, fp16=1.0), cost_of("b", fp32=4.0, bf16=1.5, fp16=1.6)])
    assert [rule.compute for rule in plan.rules[:2]] == ["fp16", "fp16"]


def test_only_fp32_gives_plain_fp32_for_all() -> None:
    plan = choose_formats([cost_of("fc", fp32=1.0)])
    assert plan.loss_scale == "none"
    fc = settings_of(plan, fc="linear", relu="", embed="embedding")
    assert {(s.compute, s.storage, s.master, s.output) for s in fc.values()} == {("fp32", "fp32", "none", "")}


def test_no_layers_give_plain_fp32() -> None:
    assert [rule.compute for rule in choose_formats([]).rules] == ["fp32"]


def test_operations_between_follow_the_layers_that_left_fp32() -> None:
    plan = choose_formats([cost_of("a", fp32=9.0, bf16=8.9), cost_of("b", fp32=2.0, bf16=0.5)])
    table = settings_of(plan, a="linear", b="linear", relu="")
    assert (table["a"].compute, table["b"].compute) == ("fp32", "bf16")
    assert (table["relu"].compute, table["relu"].storage, table["relu"].cast) == ("bf16", "fp32", "op")


def test_layers_that_are_not_timed_are_tried_in_16_bits_where_no_timed_one_gains() -> None:
    plan = choose_formats([cost_of("a", fp32=9.0, bf16=8.9)], untimed="bf16")
    table = plan.resolve({"": "", "a": "linear", "b": "conv", "c": "recurrent", "d": "norm"}).table
    assert [table[path].storage for path in "abcd"] == ["fp32", "bf16", "fp32", "fp32"]
    assert [table[path].compute for path in "abcd"] == ["fp32", "bf16", "bf16", "bf16"]


def test_rest_follows_the_format_with_the_most_work() -> None:
    costs = [
        cost_of("a", fp32=1.0, bf16=0.1, fp16=0.5),
        cost_of("b", fp32=1.0, bf16=0.1, fp16=0.5),
        cost_of("c", fp32=9.0, bf16=5.0, fp16=1.0),
    ]
    table = settings_of(choose_formats(costs), a="linear", c="linear", relu="")
    assert [table[path].compute for path in ("a", "c", "relu")] == ["fp16", "fp16", "fp16"]


def test_embeddings_are_stored_in_the_format_of_the_rest() -> None:
    plan = choose_formats([cost_of("fc", fp32=2.0, bf16=0.5)])
    embed = settings_of(plan, embed="embedding")["embed"]
    assert (embed.compute, embed.storage, embed.master) == ("bf16", "bf16", "split")


def test_fp16_keeps_fp32_masters_because_it_cannot_be_split() -> None:
    plan = choose_formats([cost_of("fc", fp32=2.0, fp16=0.5)], master="split")
    assert {rule.master for rule in plan.rules if rule.storage == "fp16"} == {"fp32"}


def test_master_is_taken_as_asked_behind_bf16() -> None:
    plan = choose_formats([cost_of("fc", fp32=2.0, bf16=0.5)], master="fp32")
    assert {rule.master for rule in plan.rules if rule.storage == "bf16"} == {"fp32"}


@pytest.mark.parametrize(("format", "loss_scale"), [("bf16", "none"), ("fp16", "dynamic")])
def test_loss_is_scaled_for_fp16_and_not_for_bf16(format: str, loss_scale: str) -> None:
    cost = LayerCost(path="fc", shape=(8, 8, 8), products={"fp32": 2.0, format: 0.5}, casts={})
    assert choose_formats([cost]).loss_scale == loss_scale


def test_loss_is_scaled_in_fp16_and_in_fp16_alone() -> None:
    assert choose_formats([cost_of("a", fp32=9.0, bf16=2.0, fp16=1.0)]).loss_scale == "dynamic"
    assert choose_formats([cost_of("a", fp32=9.0, bf16=1.0, fp16=2.0)]).loss_scale == "none"


def test_reason_holds_the_numbers_it_was_decided_by() -> None:
    costs = [
        cost_of("fast", {"bf16": 0.1}, fp32=2.0, bf16=0.4),
        cost_of("slow", {"bf16": 0.5}, fp32=2.0, bf16=1.75),
    ]
    fast, slow, *_ = choose_formats(costs).rules
    assert fast.why == "8 rows, 16 -> 32: bf16 0.5 ms with casts, fp32 2 ms: 4.0x"
    assert slow.why == "8 rows, 16 -> 32: fp32 2 ms, bf16 2.25 ms with casts: no gain"
    assert choose_formats([cost_of("fc", fp32=2.0)]).rules[0].why == (
        "8 rows, 16 -> 32: fp32 2 ms, no 16-bit format is fast here with casts: no gain"
    )


@settings(max_examples=100, deadline=None, database=None)
@given(cost_lists())
def test_no_layer_gets_a_format_slower_than_fp32(costs: list[LayerCost]) -> None:
    plan = choose_formats(costs)
    table = plan.resolve({cost.path: "linear" for cost in costs}).table
    for cost in costs:
        chosen = table[cost.path].compute
        assert cost.total(chosen) <= cost.total("fp32")
        assert chosen == "fp32" or cost.total("fp32") / cost.total(chosen) >= NOISE
    assert plan.resolve({cost.path: "linear" for cost in costs}).dead == ()
    assert Plan.parse(str(plan)) == plan
    assert plan == choose_formats(costs)


def harm_of(path: str, error: float, compute: str = "fp8_e4m3") -> HarmRecord:
    return HarmRecord(path=path, compute=compute, error=error, noise=1.0)


def test_repair_takes_the_worst_layers_until_the_rest_is_small_beside_the_noise() -> None:
    plan = Plan.preset("fp8-mixed")
    repaired = repair_plan(plan, [harm_of("a", 0.02), harm_of("b", 0.5), harm_of("c", 0.06), harm_of("d", 0.03)])
    assert [rule.path for rule in repaired.rules[:2]] == ["b", "c"]
    assert repaired.rules[2:] == plan.rules
    assert "0.5 of itself" in repaired.rules[0].why
    settings = settings_of(repaired, z="linear", b="linear", a="linear", y="linear")
    assert (settings["b"].compute, settings["b"].grad, settings["b"].grad_weight) == ("bf16", "", "")
    assert settings["a"].compute == "fp8_e4m3"


def test_repair_leaves_a_plan_that_does_little_harm() -> None:
    plan = Plan.preset("fp8-mixed")
    assert repair_plan(plan, [harm_of("a", 0.02), harm_of("b", 0.07)]) is plan
    assert repair_plan(plan, []) is plan


@pytest.mark.parametrize(("compute", "wide"), [("tf32", "fp32"), ("fp16", "fp32"), ("int8", "bf16"), ("nvfp4", "bf16")])
def test_repair_widens(compute: str, wide: str) -> None:
    assert repair_plan(Plan(), [harm_of("a", 0.5, compute)]).rules[0].compute == wide


@pytest.mark.parametrize("error", [float("inf"), float("nan")])
def test_repair_takes_a_layer_whose_gradient_is_not_finite(error: float) -> None:
    repaired = repair_plan(Plan.preset("16-mixed"), [harm_of("a", 0.0, "fp16"), harm_of("b", error, "fp16")])
    assert [(rule.path, rule.compute) for rule in repaired.rules[:-1]] == [("b", "fp32")]


@given(st.lists(st.floats(0, 10), max_size=6), st.floats(0, 1))
def test_what_repair_leaves_narrow_is_always_within_the_share(errors: list[float], share: float) -> None:
    harms = [harm_of(f"layer{i}", error) for i, error in enumerate(errors)]
    taken = {rule.path for rule in repair_plan(Plan(), harms, share=share).rules}
    assert sum(harm.error for harm in harms if harm.path not in taken) <= share


@st.composite
def saved_costs(draw: st.DrawFn) -> list[SavedCost]:
    costs = []
    for i in range(draw(st.integers(1, 5))):
        size, harm = draw(st.integers(64, 10_000)), draw(st.floats(0, 1))
        sizes = {"": size, "bf16": draw(st.sampled_from([size, size // 2])), "int8": size // 4, "int4": size // 8}
        costs.append(
            SavedCost(
                path=str(i), bytes=sizes, harm={"": 0.0, "bf16": harm / 1e6, "int8": harm / 1e4, "int4": harm / 30}
            )
        )
    return costs


@settings(max_examples=50)
@given(saved_costs(), st.floats(0, 1))
def test_saved_formats_fit_into_the_budget_and_harm_no_more_than_the_narrowest(
    costs: list[SavedCost], share: float
) -> None:
    most, least = sum(c.bytes[""] for c in costs), sum(c.bytes["int4"] for c in costs)
    budget = least + int(share * (most - least))
    chosen = choose_saved_formats(costs, budget)
    assert list(chosen) == [c.path for c in costs]
    assert sum(c.bytes[chosen[c.path]] for c in costs) <= budget
    assert sum(c.harm[chosen[c.path]] for c in costs) <= sum(c.harm["int4"] for c in costs)


def test_saved_activations_stay_as_they_are_where_they_fit() -> None:
    cost = SavedCost(path="a", bytes={"": 80, "int8": 20}, harm={"": 0.0, "int8": 0.1})
    assert choose_saved_formats([cost], 80) == {"a": ""}
    assert choose_saved_formats([cost], 79) == {"a": "int8"}


def test_what_harms_nothing_is_narrowed_first_and_of_those_most() -> None:
    masks = SavedCost(path="masks", bytes={"": 90, "bf16": 80, "int8": 5}, harm={"": 0.0, "bf16": 0.0, "int8": 0.0})
    other = SavedCost(path="other", bytes={"": 90, "bf16": 45, "int8": 20}, harm={"": 0.0, "bf16": 1e-9, "int8": 1e-3})
    assert choose_saved_formats([other, masks], 170) == {"other": "", "masks": "int8"}
    assert choose_saved_formats([other, masks], 60) == {"other": "bf16", "masks": "int8"}


def test_a_budget_that_cannot_be_met_is_refused_with_the_least_that_can() -> None:
    cost = SavedCost(path="a", bytes={"": 80, "int8": 20}, harm={"": 0.0, "int8": 0.1})
    with pytest.raises(PlanError, match=r"a budget of 19 bytes .* in the narrowest formats they take 20"):
        choose_saved_formats([cost], 19)
