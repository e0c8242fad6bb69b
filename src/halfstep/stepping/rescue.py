"""What is kept against steps that go on failing: the policy's memory, and a state to go back to.

`control.controller` decides; the stepper does what was decided.
"""

from collections.abc import Callable

from torch import nn

from halfstep.control.controller import Decision, Observation, Recovery, RecoveryRule, decide
from halfstep.conversion import Conversion
from halfstep.errors import PlanError
from halfstep.plan import Rule
from halfstep.snapshot import Snapshot
from halfstep.window import ABOUT_DATA, Finding


class Rescue:
    """The rule in force, what it remembers, and the last good state.

    Examples:
        >>> rescue = Rescue()
        >>> rescue.judge(Finding(), scale_can_fall=False).action
        ''
    """

    def __init__(self) -> None:
        self.rule = RecoveryRule()
        self.memory = Recovery()
        self._good: tuple[int, Snapshot] | None = None  # applied steps, and the state then

    @property
    def rate(self) -> float:
        """What the policy leaves of the learning rates."""
        return self.memory.rate

    def judge(self, finding: Finding, *, scale_can_fall: bool) -> Decision:
        """Take in what a window came to; what is to be done about it."""
        layer = "" if finding.layer.startswith("(") else finding.layer  # the input, or the model's own code
        seen = Observation(applied=not finding.cause, cause=finding.cause, layer=layer,
                           forward_nonfinite=finding.forward_nonfinite, data_nonfinite=finding.layer in ABOUT_DATA,
                           scale_can_fall=scale_can_fall or not finding.nonfinite)  # fmt: skip
        self.memory, decision = decide(self.memory, self.rule, seen)
        return decision

    def needs_state(self, applied: int) -> bool:
        """Whether the state before the next update is to be kept."""
        due = self._good is None or applied - self._good[0] >= self.rule.every
        return due and self.rule.policy == "roll-back"

    def keep_state(self, applied: int, snapshot: Snapshot) -> None:
        """The state to go back to from now on."""
        self._good = applied, snapshot

    def keep_if_due(self, applied: int, take_snapshot: Callable[[], Snapshot]) -> None:
        """Before an update whose gradients are finite: now and then, the state to go back to."""
        if self.needs_state(applied):
            self.keep_state(applied, take_snapshot())

    def forget_state(self) -> None:
        self._good = None

    def roll_back(self) -> int | None:
        """Go back to the good state; the number of steps that had been applied then, None where there is no such state."""
        if self._good is None:
            return None
        applied, snapshot = self._good
        snapshot.put_back()
        return applied


def widen_layer(model: nn.Module, conversion: Conversion, layer: str) -> tuple[Rule, ...]:
    """Rules that put a layer into fp32, and those that share its weights. Raises PlanError where that cannot help."""
    modules = dict(model.named_modules())
    if layer not in modules:
        raise PlanError(f"what failed first is '{layer}', which is no layer of its own")
    if conversion.table[layer].compute == "fp32":
        raise PlanError(f"'{layer}' runs in fp32 already")
    own = set(modules[layer].parameters(recurse=False))
    layers = [path for path, module in modules.items() if path == layer or own & set(module.parameters(recurse=False))]
    return tuple(Rule(path=path, compute="fp32", storage="fp32", master="none", why="widened") for path in layers)
