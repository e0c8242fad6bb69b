"""A plan with a budget for saved activations: formats are chosen when the first batch arrives."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW

from halfstep.checkpoint import change_plan
from halfstep.control import sensitivity
from halfstep.control.search import SavedCost
from halfstep.control.sensitivity import ALIVE_ANYWAY, fit_saved, measure_harm, project
from halfstep.conversion import Conversion, convert
from halfstep.errors import ModelError, PlanError
from halfstep.plan import Plan, Rule
from halfstep.stepper import Stepper, prepare
from halfstep.stepping import plan_in_force
from helpers import assert_same, copy_weights, has_hooks, seeded

BUDGET = "700KiB"  # of about 2 MiB that make_net saves for make_batch
MIXED = Plan(rules=(Rule(compute="bf16"),), name="mine", saved_budget=BUDGET)


def make_net() -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(
            nn.Linear(64, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, 8),
        )  # fmt: skip


def make_batch(number: int = 0) -> tuple[Tensor, Tensor]:
    with seeded(number + 1):
        return torch.randn(512, 64), torch.randn(512, 8)


def compute_loss(stepper: Stepper, number: int = 0) -> Tensor:
    x, y = make_batch(number)
    with stepper.autocast():
        return F.mse_loss(stepper.model(x).float(), y)


def train(stepper: Stepper, steps: int = 3) -> None:
    with seeded(9):
        for number in range(steps):
            assert stepper.step(compute_loss(stepper, number)).applied


def count_kept(conversion: Conversion) -> int:
    assert conversion.keeper is not None
    return sum(record.kept for record in conversion.keeper.records if record.why not in ALIVE_ANYWAY)


def prepare_net(plan: Plan = MIXED, model: nn.Module | None = None) -> Stepper:
    model = make_net() if model is None else model
    return prepare(model, SGD(model.parameters(), lr=0.1), plan)


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_the_first_pass_keeps_no_more_than_the_budget_already(compute: str) -> None:
    stepper = prepare_net(replace(MIXED, rules=(Rule(compute=compute),)))
    assert stepper.conversion.keeper is None
    loss = compute_loss(stepper)
    first = count_kept(stepper.conversion)
    assert 0 < first <= MIXED.saved_bytes
    stepper.step(loss)
    compute_loss(stepper, 1)
    assert count_kept(stepper.conversion) == first


def test_what_is_as_it_is_takes_more_than_the_budget() -> None:
    stepper = prepare_net(replace(MIXED, saved_budget="", rules=(Rule(path="6", saved="int8"), *MIXED.rules)))
    compute_loss(stepper)
    assert count_kept(stepper.conversion) > MIXED.saved_bytes


def test_the_record_says_what_was_chosen_for_each_module_and_why() -> None:
    stepper = prepare_net(replace(MIXED, rules=(Rule(path="4", compute="bf16", why="mine"), *MIXED.rules)))
    assert stepper.plan_record is not None and not any(layer.saved for layer in stepper.plan_record.layers)
    assert repr(stepper).startswith("Stepper(mine, saved_budget=700KiB not met yet;")
    compute_loss(stepper)
    record, rules = stepper.plan_record, [rule for rule in stepper.plan.rules if rule.saved]
    assert record is not None and record.seconds > 0
    assert record.plan == str(stepper.plan) and "saved_budget" not in record.plan
    assert (
        record.why.startswith("saved_budget=700KiB: saved activations take ") and f"{len(rules)} modules" in record.why
    )
    chosen = {rule.path: rule for rule in rules}
    assert chosen
    layers = {layer.path: layer for layer in record.layers}
    assert {path for path, layer in layers.items() if layer.saved} == chosen.keys() & layers.keys()
    for path, rule in chosen.items():
        assert f" in {rule.saved}, which changes the gradient by " in rule.why
        if path in layers:
            assert (layers[path].saved, layers[path].why) == (rule.saved, rule.why)
    assert layers["4"].why.startswith("mine; saved activations take ")
    assert repr(stepper).startswith("Stepper(mine; ")


def test_choosing_leaves_no_trace() -> None:
    chosen = prepare_net()
    train(chosen)
    given = prepare_net(chosen.plan)
    train(given)
    assert_same(copy_weights(chosen.model), copy_weights(given.model))
    assert chosen.model.state_dict()["1.num_batches_tracked"] == 3


def test_choosing_leaves_delayed_scales_as_they_were() -> None:
    rules = (Rule(path="4", compute="fp8_e4m3", scaling="delayed"), Rule(compute="bf16"))
    chosen = prepare_net(Plan(rules=rules, saved_budget="900KiB"))
    train(chosen)
    given = prepare_net(chosen.plan)
    train(given)
    assert_same(chosen.conversion.histories.copy(), given.conversion.histories.copy())
    assert_same(copy_weights(chosen.model), copy_weights(given.model))


def test_where_all_fits_nothing_is_rounded() -> None:
    stepper = prepare_net(replace(MIXED, saved_budget="1GiB"))
    train(stepper, 1)
    assert stepper.conversion.keeper is None
    assert stepper.plan == replace(MIXED, saved_budget="")
    assert stepper.plan_record is not None
    assert stepper.plan_record.why.endswith("those of 0 modules in fewer bits")


def test_a_budget_that_cannot_be_met_is_refused_at_every_batch_and_no_step_is_made() -> None:
    stepper = prepare_net(replace(MIXED, saved_budget="10KiB"))
    for _ in range(2):
        with pytest.raises(
            PlanError, match=r"saved_budget=10KiB cannot be met: .* take 0\.\d+ MiB in the narrowest"
        ) as caught:
            compute_loss(stepper)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="saved_budget=10KiB has not been met yet"):
        stepper.step(next(stepper.model.parameters()).sum())
    stepper.adopt(replace(MIXED, saved_budget=""))
    train(stepper, 1)


def test_a_step_without_a_call_of_the_model_in_training_mode_is_refused() -> None:
    stepper = prepare_net()
    stepper.model.eval()
    loss = compute_loss(stepper)
    with pytest.raises(
        ModelError, match=r"saved_budget=700KiB has not been met yet: formats are chosen when stepper\.model"
    ):
        stepper.step(loss)
    stepper.model.train()
    with torch.no_grad():
        compute_loss(stepper)
    assert stepper.conversion.keeper is None
    train(stepper, 1)
    assert stepper.conversion.keeper is not None


@pytest.mark.parametrize("saved", ["fp32", "bf16", "int4"])
def test_what_a_rule_states_stands(saved: str) -> None:
    plan = replace(MIXED, rules=(Rule(path="4", saved=saved), Rule(compute="fp32")), saved_budget="1100KiB")
    stepper = prepare_net(plan)
    compute_loss(stepper)
    assert stepper.conversion.table["4"].saved == saved
    assert count_kept(stepper.conversion) <= plan.saved_bytes
    assert any(rule.saved and rule.path != "4" for rule in stepper.plan.rules)


def test_what_a_rule_states_may_leave_too_little_room() -> None:
    stepper = prepare_net(replace(MIXED, rules=(Rule(saved="fp32", compute="fp32"),)))
    with pytest.raises(PlanError, match="in the narrowest formats that the plan allows"):
        compute_loss(stepper)


def test_a_choice_that_takes_more_than_its_costs_say_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where modules in different formats save one tensor."""
    model, (x, _) = make_net(), make_batch()
    costs = tuple(
        SavedCost(path=path, bytes={"": 600_000, "int8": 150_000}, harm={"": 0.0, "int8": harm})
        for path, harm in (("2", 0.1), ("4", 0.2))
    )
    monkeypatch.setattr(sensitivity, "measure_saved_costs", lambda *_: costs)
    kept = iter([900_000, 700_000])
    monkeypatch.setattr(sensitivity, "_measure_kept", lambda *_: next(kept))
    plan = fit_saved(model, Plan(saved_budget="750KiB"), lambda: model(x).mean()).plan
    assert {rule.path: rule.saved for rule in plan.rules} == {"2": "int8", "4": "int8"}
    monkeypatch.setattr(sensitivity, "_measure_kept", lambda *_: 900_000)
    with pytest.raises(PlanError, match=r"saved_budget=750KiB cannot be met: .* take 0\.8583 MiB"):
        fit_saved(model, Plan(saved_budget="750KiB"), lambda: model(x).mean())


def test_the_chosen_formats_come_back_with_a_saved_state() -> None:
    first, second = prepare_net(), prepare_net()
    train(first)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.plan == first.plan
    train(first)
    train(second)
    assert_same(copy_weights(first.model), copy_weights(second.model))


def test_a_state_from_before_the_first_batch_waits_on() -> None:
    first, second = prepare_net(), prepare_net()
    assert first.state_dict()["plan"] is None
    second.load_state_dict(first.state_dict())
    train(second, 1)
    assert second.conversion.keeper is not None


def test_a_budget_can_be_adopted_in_the_middle_and_a_plan_that_fails_leaves_it_waiting() -> None:
    stepper = prepare_net(replace(MIXED, saved_budget=""))
    train(stepper, 1)
    change_plan(stepper, MIXED, "less memory")
    with pytest.raises(PlanError, match="matches no module"):
        stepper.adopt(Plan(rules=(Rule(path="nowhere", compute="bf16"),)))
    train(stepper, 1)
    assert count_kept(stepper.conversion) <= MIXED.saved_bytes


def test_closures_choose_before_the_first_update() -> None:
    model = make_net()
    stepper = prepare(model, LBFGS(model.parameters(), max_iter=2), MIXED)
    assert stepper.step(closure=lambda: compute_loss(stepper)).applied
    assert count_kept(stepper.conversion) <= MIXED.saved_bytes


def test_gradient_release_and_narrow_weights() -> None:
    model = make_net()
    rules = (
        Rule(kind="norm", compute="fp32", storage="fp32", master="none"),
        Rule(compute="bf16", storage="bf16", master="split"),
    )
    stepper = prepare(model, AdamW(model.parameters()), replace(MIXED, rules=rules), release=True)
    train(stepper, 2)
    assert count_kept(stepper.conversion) <= MIXED.saved_bytes
    assert {p.dtype for p in stepper.restore().parameters()} == {torch.float32}
    assert not has_hooks(model)


def test_inside_a_wrapper_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = prepare_net()
    monkeypatch.setattr(plan_in_force, "is_inside_wrapper", lambda: True)
    with pytest.raises(ModelError, match=r"saved_budget=700KiB puts its plan in force anew.*before you wrap it"):
        compute_loss(stepper)


def test_convert_refuses_a_budget_and_measuring_products_leaves_it_out() -> None:
    with pytest.raises(PlanError, match="saved_budget=700KiB is met by measuring a batch, and convert"):
        convert(make_net(), MIXED)
    model, (x, _) = make_net(), make_batch()
    plan = Plan(rules=(Rule(path="4", compute="fp16", cast="unit"), Rule(compute="fp32")), saved_budget=BUDGET)
    assert len(measure_harm(model, plan, lambda _: model(x).square().mean().backward())) == 1


def test_a_gradient_that_is_not_known_yet_is_random_and_reaches_every_output() -> None:
    x = torch.ones(4, 4, requires_grad=True)
    outputs = {"a": 2 * x, "b": (x.bfloat16(), x.detach())}
    with seeded(0):
        first = torch.autograd.grad(project(outputs), x)[0]
    assert first.unique().numel() == 16
    with pytest.raises(ModelError, match="returns no tensor that depends on its weights"):
        project(x.detach())


def test_a_budget_is_written_and_read(tmp_path: Path) -> None:
    for suffix in ("toml", "json", "plan"):
        MIXED.save(tmp_path / f"plan.{suffix}")
        assert Plan.load(tmp_path / f"plan.{suffix}") == MIXED
    assert Plan(saved_budget=" 1.5  GiB ").saved_budget == "1.5GiB"
    assert Plan(saved_budget="1.5 GiB").saved_bytes == 3 * 2**29
    assert "saved_budget" not in str(Plan())


@pytest.mark.parametrize("text", ["64", "64MB", "MiB", "-1MiB", "0MiB", "64 mib", "1e3MiB", "nanMiB"])
def test_a_budget_that_is_no_size_is_refused(text: str) -> None:
    make: Callable[[], Plan] = lambda: Plan(saved_budget=text)  # noqa: E731
    with pytest.raises(PlanError, match=r"saved_budget.*64MiB"):
        make()
