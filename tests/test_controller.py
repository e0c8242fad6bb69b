"""Recovery decisions: exact sequences, limits, and that the same observations give the same decisions."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.control.controller import Decision, Observation, Recovery, RecoveryRule, decide

GOOD = Observation(applied=True)
OVERFLOW = Observation(applied=False, cause="overflow", layer="head", scale_can_fall=True)
AT_FLOOR = Observation(applied=False, cause="overflow at the floor", layer="head")
FORWARD = Observation(applied=False, cause="the loss is nan", layer="body", forward_nonfinite=True, scale_can_fall=True)
WORDS = {".": GOOD, "o": OVERFLOW, "f": AT_FLOOR, "n": FORWARD}


def run(policy: Any, steps: str, **numbers: Any) -> tuple[list[str], Recovery]:
    """The action after each step, and the last state."""
    rule, state = RecoveryRule(policy=policy, **numbers), Recovery()
    actions: list[str] = []
    for step in steps:
        state, decision = decide(state, rule, WORDS[step])
        actions.append(decision.action)
    return actions, state


def test_skip_does_nothing_more_until_the_limit() -> None:
    actions, state = run("skip", "n" * 50)
    assert actions == [""] * 49 + ["stop"]
    assert state.skips == 50


@pytest.mark.parametrize("policy", ["skip", "back-off", "roll-back", "widen", "stop"])
def test_overflows_that_the_loss_scale_mends_are_left_to_it_until_the_limit(policy: str) -> None:
    actions, _ = run(policy, "o" * 50)
    assert actions == [""] * 49 + ["stop"]


@pytest.mark.parametrize("policy", ["back-off", "roll-back", "widen"])
@pytest.mark.parametrize("kind", ["f", "n"])
def test_policy_acts_at_every_third_failure_in_a_row(policy: str, kind: str) -> None:
    actions, state = run(policy, kind * 7)
    assert actions == ["", "", policy, "", "", policy, ""]
    assert state.actions == 2


def test_an_applied_step_ends_the_row() -> None:
    assert run("roll-back", "nn.nn.nnn")[0] == [""] * 8 + ["roll-back"]


def test_stop_ends_the_run_at_the_first_failure_that_no_scale_can_mend() -> None:
    assert run("stop", "..oon")[0] == ["", "", "", "", "stop"]


def test_widen_without_a_known_layer_waits_for_one() -> None:
    rule, state = RecoveryRule(policy="widen"), Recovery()
    for _ in range(5):
        state, decision = decide(state, rule, Observation(applied=False, cause="?"))
        assert decision == Decision()
    assert decide(state, rule, AT_FLOOR)[1].action == "widen"


@pytest.mark.parametrize("policy", ["back-off", "roll-back", "widen"])
def test_bad_data_is_left_to_the_limit_by_all_policies_but_stop(policy: Any) -> None:
    bad = Observation(applied=False, cause="the loss is nan", forward_nonfinite=True, data_nonfinite=True, layer="a")
    state = Recovery()
    for _ in range(10):
        state, decision = decide(state, RecoveryRule(policy=policy), bad)
        assert decision == Decision()
    assert decide(Recovery(), RecoveryRule(policy="stop"), bad)[1].action == "stop"


def test_learning_rate_is_halved_and_given_back() -> None:
    assert run("back-off", "nnn")[1].rate == 0.5
    assert run("back-off", "nnnnnn")[1].rate == 0.25
    assert run("back-off", "nnnnnn" + "." * 4, interval=5)[1].rate == 0.25
    assert run("back-off", "nnnnnn" + "." * 5, interval=5)[1].rate == 0.5
    assert run("back-off", "nnnnnn" + "." * 50, interval=5)[1].rate == 1.0


def test_learning_rate_falls_no_further_than_its_lowest() -> None:
    assert run("back-off", "n" * 49, patience=1, budget=100)[1].rate == 2.0**-10


def test_more_actions_than_the_budget_end_the_run() -> None:
    actions, _ = run("roll-back", "nnn." * 4, budget=3)
    assert [action for action in actions if action] == ["roll-back"] * 3 + ["stop"]


def test_decision_says_why() -> None:
    _, decision = decide(Recovery(failures=2), RecoveryRule(policy="widen"), FORWARD)
    assert decision.why == "3 in a row that no loss scale can mend; the last: the loss is nan"


@given(st.sampled_from(["skip", "back-off", "roll-back", "widen", "stop"]), st.text(alphabet=".ofn", max_size=80))
def test_any_sequence_keeps_the_invariants(policy: Any, steps: str) -> None:
    rule, state = RecoveryRule(policy=policy), Recovery()
    for step in steps:
        state, decision = decide(state, rule, WORDS[step])
        assert rule.lowest_rate <= state.rate <= 1.0
        assert 0 <= state.failures <= state.skips <= rule.limit or decision.action == "stop"
        assert (decision.action == "") == (decision.why == "")
        assert decision.action in ("", "stop", policy)
        if step == ".":
            assert (state.skips, state.failures, decision) == (0, 0, Decision())
