"""What to do about a step whose numbers are not finite: (state, rule, what was seen) -> (state, decision).

A bad step is never applied, whatever the policy. That alone is enough for a bad batch, and a loss scale that was too high
falls by itself. What is left are failures that come back: the forward pass overflows again and again, or the gradients do
although there is no scale left to lower. After `patience` of those in a row, or when they are a `share` of the last
`window` steps, the policy decides:

    skip         nothing more than leaving the updates out
    back-off     halve the learning rate, and give it back after `interval` applied steps without another failure
    roll-back    go back to the weights and optimizer state of up to `every` applied steps ago, and on with other data, at
                 half the learning rate, which is given back likewise: what led there at full rate may do so again
    widen        compute and store the layer that failed first in fp32
    stop         end the run with a report, at the first such failure

and after `limit` skipped steps among the last `2 * limit`, whatever their cause, every policy ends the run with a report: a
run that skips half of its steps costs twice as much as one that trains. DeepSpeed stops at its lowest scale for the same
reason.

Pure: the same observations give the same decisions, so a stored run can be replayed.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from halfstep.errors import PlanError, describe_unknown

Policy = Literal["skip", "back-off", "roll-back", "widen", "stop"]
Action = Literal["", "back-off", "roll-back", "widen", "stop"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


def find_policy(word: str) -> Policy:
    """The policy of that name. Raises PlanError, naming the nearest one.

    Examples:
        >>> find_policy("roll-back")
        'roll-back'
    """
    for policy in POLICIES:
        if policy == word:
            return policy
    raise PlanError(describe_unknown("recovery", word, POLICIES))


@dataclass(frozen=True, kw_only=True)
class RecoveryRule:
    """When a policy acts. The counts are choices, not measurements: far above what a loss scale needs to settle (16 skips
    from 2^16 to 1), far below what a user would wait for."""

    policy: Policy = "skip"
    patience: int = 3  # failures in a row, that no loss scale can mend, before the policy acts
    window: int = 30  # steps in which failures are counted that do not come in a row
    share: float = 0.5  # of the window: as many failures make the policy act too
    limit: int = 50  # skipped steps, in a row or among the last 2 * limit, before the run ends
    every: int = 100  # applied steps between two states kept for a roll-back
    interval: int = 100  # applied steps until a learning rate that was halved is doubled again
    budget: int = 20  # actions in one run; a run that needs more has another problem
    lowest_rate: float = 2.0**-10  # the learning rate's factor falls no further


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a policy remembers."""

    step: int = 0  # steps seen
    skipped_at: tuple[int, ...] = ()  # the last of them that were skipped
    failed_at: tuple[int, ...] = ()  # those of them that no loss scale can mend, since the policy last acted
    skips: int = 0  # skipped steps in a row
    failures: int = 0  # those of them that no loss scale can mend, since the policy last acted
    clean: int = 0  # applied steps since the learning rate last changed
    rate: float = 1.0  # factor on the learning rate
    actions: int = 0  # how often the policy has acted


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a step showed."""

    applied: bool
    cause: str = ""
    layer: str = ""  # the first layer whose numbers were not finite, where it is known
    forward_nonfinite: bool = False
    data_nonfinite: bool = False  # whether the input already was not finite, of which no policy but `stop` can relieve
    scale_can_fall: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done, and why; `action` is empty for nothing."""

    action: Action = ""
    why: str = ""


def decide(state: Recovery, rule: RecoveryRule, seen: Observation) -> tuple[Recovery, Decision]:
    """The next state, and what is to be done now.

    Examples:
        >>> bad = Observation(applied=False, cause="the loss is nan", forward_nonfinite=True)
        >>> decide(Recovery(), RecoveryRule(policy="stop"), bad)[1].action
        'stop'
    """
    state = replace(state, step=state.step + 1)
    if seen.applied:
        return _count_applied(state, rule), Decision()
    mendable = (seen.scale_can_fall and not seen.forward_nonfinite) or (seen.data_nonfinite and rule.policy != "stop")
    state = _count_skipped(state, rule, failed=not mendable)
    if max(state.skips, len(state.skipped_at)) >= rule.limit:
        why = f"{_spell(state.skips, rule.limit, state.skipped_at, state.step)} were skipped; the last: {seen.cause}"
        return replace(state, skipped_at=()), Decision(action="stop", why=why)
    patience = 1 if rule.policy == "stop" else rule.patience
    has_come_back = state.failures >= patience or len(state.failed_at) >= rule.share * rule.window
    if rule.policy == "skip" or mendable or not has_come_back:
        return state, Decision()
    failures = _spell(state.failures, patience, state.failed_at, state.step)
    why = f"{failures} failed as no loss scale can mend; the last: {seen.cause}"
    if rule.policy == "stop":
        return state, Decision(action="stop", why=why)
    if state.actions >= rule.budget:
        return state, Decision(action="stop", why=f"{rule.policy} was tried {state.actions} times; {why}")
    if rule.policy == "widen" and not seen.layer:
        return state, Decision()
    state = replace(state, failures=0, failed_at=(), actions=state.actions + 1)
    if rule.policy in ("back-off", "roll-back"):
        state = replace(state, rate=max(state.rate / 2, rule.lowest_rate))
    return state, Decision(action=rule.policy, why=why)


def _count_skipped(state: Recovery, rule: RecoveryRule, *, failed: bool) -> Recovery:
    """One more, among those that are not too long ago."""
    skipped = tuple(step for step in state.skipped_at if step > state.step - 2 * rule.limit)
    failures = tuple(step for step in state.failed_at if step > state.step - rule.window)
    return replace(
        state, skips=state.skips + 1, skipped_at=(*skipped, state.step), failures=state.failures + failed,
        failed_at=(*failures, state.step) if failed else failures, clean=0,
    )  # fmt: skip


def _spell(row: int, enough: int, at: tuple[int, ...], step: int) -> str:
    """How many steps, where they were in a row and where not."""
    if row >= enough:
        return f"{row} step{'s' * (row > 1)} in a row"
    return f"{len(at)} of the last {step - at[0] + 1} steps"


def _count_applied(state: Recovery, rule: RecoveryRule) -> Recovery:
    """A step that moved the weights ends every row, and brings a halved learning rate nearer to its full value."""
    state = replace(state, skips=0, failures=0, clean=state.clean + 1 if state.rate < 1.0 else 0)
    if state.rate < 1.0 and state.clean >= rule.interval:
        return replace(state, rate=2 * state.rate, clean=0)
    return state
