"""The loss scale: exact sequences, and a scale that never leaves its bounds."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.mechanisms.loss_scale import DYNAMIC, UNSCALED, LossScale, LossScaleRule, adjust, adjust_tensors


def adjust_quickly(state: LossScale, rule: LossScaleRule, *, found_nonfinite: bool) -> LossScale:
    """The fast twin, with the signature of the readable truth."""
    scale, clean, overflows = adjust_tensors(
        torch.tensor(state.scale),
        torch.tensor(state.clean, dtype=torch.int32),
        torch.tensor(state.overflows, dtype=torch.int32),
        rule,
        found_nonfinite=torch.tensor(found_nonfinite),
    )
    assert (scale.dtype, clean.dtype, overflows.dtype) == (torch.float32, torch.int32, torch.int32)
    return LossScale(scale=scale.item(), clean=int(clean.item()), overflows=int(overflows.item()))


def run(state: LossScale, rule: LossScaleRule, steps: str) -> list[LossScale]:
    """The states after each step: '.' was clean, 'x' found a non-finite gradient. Both twins must agree on them."""
    states = []
    for step in steps:
        quick = adjust_quickly(state, rule, found_nonfinite=step == "x")
        state = adjust(state, rule, found_nonfinite=step == "x")
        state = dataclasses.replace(state, scale=float(np.float32(state.scale)))
        assert quick == state
        states.append(state)
    return states


def scales(state: LossScale, rule: LossScaleRule, steps: str) -> list[float]:
    return [after.scale for after in run(state, rule, steps)]


def test_constants_are_torchs_with_a_floor_and_a_ceiling() -> None:
    assert dataclasses.asdict(DYNAMIC) == {
        "growth": 2.0, "backoff": 0.5, "interval": 2000, "hysteresis": 1, "floor": 1.0, "ceiling": 2.0**24,
    }  # fmt: skip
    assert LossScale() == LossScale(scale=2.0**16, clean=0, overflows=0)


def test_scale_grows_after_an_interval_of_clean_steps() -> None:
    rule = LossScaleRule(interval=3)
    assert run(LossScale(scale=8.0), rule, ".......") == [
        LossScale(scale=8.0, clean=1),
        LossScale(scale=8.0, clean=2),
        LossScale(scale=16.0),
        LossScale(scale=16.0, clean=1),
        LossScale(scale=16.0, clean=2),
        LossScale(scale=32.0),
        LossScale(scale=32.0, clean=1),
    ]


def test_scale_backs_off_at_once_and_clean_steps_are_counted_anew() -> None:
    rule = LossScaleRule(interval=3)
    assert run(LossScale(scale=8.0), rule, "..x..x...") == [
        LossScale(scale=8.0, clean=1),
        LossScale(scale=8.0, clean=2),
        LossScale(scale=4.0),
        LossScale(scale=4.0, clean=1),
        LossScale(scale=4.0, clean=2),
        LossScale(scale=2.0),
        LossScale(scale=2.0, clean=1),
        LossScale(scale=2.0, clean=2),
        LossScale(scale=4.0),
    ]


def test_default_grows_after_exactly_2000_clean_steps() -> None:
    states = scales(LossScale(), DYNAMIC, "." * 2001)
    assert states[1998:] == [2.0**16, 2.0**17, 2.0**17]


def test_floor_holds() -> None:
    assert scales(LossScale(scale=4.0), LossScaleRule(floor=1.5), "xxxx") == [2.0, 1.5, 1.5, 1.5]


def test_ceiling_holds() -> None:
    assert scales(LossScale(scale=4.0), LossScaleRule(interval=1, ceiling=12.0), "....") == [8.0, 12.0, 12.0, 12.0]


def test_hysteresis_waits_for_overflows_in_a_row() -> None:
    rule = LossScaleRule(hysteresis=3, interval=100)
    assert run(LossScale(scale=8.0), rule, "xx.xxxx") == [
        LossScale(scale=8.0, overflows=1),
        LossScale(scale=8.0, overflows=2),
        LossScale(scale=8.0, clean=1),
        LossScale(scale=8.0, overflows=1),
        LossScale(scale=8.0, overflows=2),
        LossScale(scale=4.0),
        LossScale(scale=4.0, overflows=1),
    ]


def test_overflow_that_hysteresis_forgives_still_ends_the_row_of_clean_steps() -> None:
    rule = LossScaleRule(hysteresis=2, interval=2)
    assert scales(LossScale(scale=8.0), rule, ".x.x..") == [8.0, 8.0, 8.0, 8.0, 8.0, 16.0]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("steps", ["." * 2500, "x" * 50, "x.x." * 600])
def test_unscaled_stays_where_it_is(scale: float, steps: str) -> None:
    assert set(scales(LossScale(scale=scale), UNSCALED, steps)) == {scale}


def test_state_is_a_value_that_adjust_leaves_alone() -> None:
    state = LossScale(scale=8.0, clean=1)
    adjust(state, DYNAMIC, found_nonfinite=True)
    assert state == LossScale(scale=8.0, clean=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.scale = 1.0  # type: ignore[misc]


@st.composite
def cases(draw: st.DrawFn) -> tuple[LossScale, LossScaleRule]:
    floor = draw(st.floats(2.0**-100, 2.0**100, width=32))
    ceiling = draw(st.floats(floor, 2.0**126, width=32))
    rule = LossScaleRule(
        growth=draw(st.floats(1.0, 2.0**20, width=32)),
        backoff=draw(st.floats(2.0**-20, 1.0, width=32)),
        interval=draw(st.integers(1, 4)),
        hysteresis=draw(st.integers(1, 4)),
        floor=floor,
        ceiling=ceiling,
    )
    return LossScale(scale=draw(st.floats(floor, ceiling, width=32))), rule


@settings(max_examples=200, deadline=None, database=None)
@given(cases(), st.text("x.", max_size=60))
def test_scale_stays_within_floor_and_ceiling_and_is_never_zero(
    case: tuple[LossScale, LossScaleRule], steps: str
) -> None:
    state, rule = case
    for after in run(state, rule, steps):
        assert 0.0 < rule.floor <= after.scale <= rule.ceiling
        assert 0 <= after.clean < rule.interval
        assert 0 <= after.overflows < rule.hysteresis


@settings(max_examples=100, deadline=None, database=None)
@given(cases(), st.text("x.", max_size=60))
def test_scale_moves_down_only_on_an_overflow_and_up_only_on_a_clean_step(
    case: tuple[LossScale, LossScaleRule], steps: str
) -> None:
    state, rule = case
    for step in steps:
        after = adjust(state, rule, found_nonfinite=step == "x")
        assert after.scale <= state.scale if step == "x" else after.scale >= state.scale
        state = after
