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


@pytest.mark.parametrize("policy", ["back-off", "roll-back", "widen"])
def test_failures_that_are_half_of_the_last_thirty_steps_make_the_policy_act(policy: str) -> None:
    actions, state = run(policy, "nn." * 10)  # 20 of 30, never three in a row
    assert [i for i, action in enumerate(actions, start=1) if action] == [22]
    assert (state.actions, len(state.failed_at)) == (1, 5)
    assert not any(run(policy, "n.." * 40)[0])
    assert run(policy, "n..n", window=4)[0] == ["", "", "", policy]
    assert run(policy, "n..n", window=4, share=0.75)[0] == [""] * 4


def test_failures_beyond_the_window_do_not_count() -> None:
    assert not any(run("roll-back", "nn" + "." * 29 + "nn." * 6 + "n")[0])
    assert run("roll-back", "nn." * 7 + "n", window=30)[0][-1] == "roll-back"
    assert not any(run("roll-back", ("nn." * 7)[:-1] + "." * 10 + "n")[0])


def test_decision_says_how_many_of_how_many_failed() -> None:
    rule, memory = RecoveryRule(policy="roll-back"), Recovery()
    for step in "nn." * 7 + "n":
        memory, decision = decide(memory, rule, WORDS[step])
    assert decision.why == "15 of the last 22 steps failed as no loss scale can mend; the last: the loss is nan"


@pytest.mark.parametrize("kind", ["o", "n"])
def test_fifty_skips_among_a_hundred_steps_end_the_run(kind: str) -> None:
    actions, _ = run("skip", f"{kind}." * 60)
    assert [i for i, action in enumerate(actions, start=1) if action] == [99]
    assert not any(run("skip", f"{kind}.." * 200)[0])
    rule, memory = RecoveryRule(), Recovery()
    for step in f"{kind}." * 49 + kind:
        memory, decision = decide(memory, rule, WORDS[step])
    assert decision.why.startswith("50 of the last 99 steps were skipped; the last: ")


def test_run_that_goes_on_after_its_limit_is_counted_anew() -> None:
    actions, _ = run("skip", "o." * 50 + "o.")
    assert actions.count("stop") == 1


def test_roll_back_halves_the_learning_rate_and_gives_it_back() -> None:
    assert run("roll-back", "nnn")[1].rate == 0.5
    assert run("roll-back", "nnn..nnn")[1].rate == 0.25
    assert run("roll-back", "nnn..nnn" + "." * 10, interval=5)[1].rate == 1.0
    assert run("widen", "nnn")[1].rate == 1.0


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
    assert decision.why == "3 steps in a row failed as no loss scale can mend; the last: the loss is nan"


@given(st.sampled_from(["skip", "back-off", "roll-back", "widen", "stop"]), st.text(alphabet=".ofn", max_size=80))
def test_any_sequence_keeps_the_invariants(policy: Any, steps: str) -> None:
    rule, state = RecoveryRule(policy=policy), Recovery()
    for step in steps:
        state, decision = decide(state, rule, WORDS[step])
        assert rule.lowest_rate <= state.rate <= 1.0
        assert 0 <= state.failures <= state.skips <= rule.limit or decision.action == "stop"
        assert (decision.action == "") == (decision.why == "")
        assert set(state.failed_at) <= {*state.skipped_at} or decision.action == "stop"
        assert all(state.step - rule.window < at <= state.step for at in state.failed_at) or step == "."
        assert decision.action in ("", "stop", policy)
        if step == ".":
            assert (state.skips, state.failures, decision) == (0, 0, Decision())
