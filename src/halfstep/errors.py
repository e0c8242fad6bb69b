"""What can go wrong, as a tree. Every message says what was given, what is allowed, and what to do.

    HalfstepError
    ├── FormatError         a number format that does not exist, or cannot be rounded to as asked
    ├── PlanError           a plan that cannot be read, or whose rules do not fit the model
    ├── UnsupportedError    a plan that is well formed and cannot be honoured here
    ├── RecipeError         a recipe with an unknown key or a value of the wrong kind
    ├── DataError           input data that is missing, empty or not finite
    ├── ModelError          a model or an optimizer that cannot be trained
    ├── CheckpointError     a checkpoint that cannot be written, read or applied
    ├── RecordError         a record that cannot be written or read
    ├── TrainingError       a run that cannot go on
    └── MissingExtraError   an optional dependency that is not installed

    StallWarning            a UserWarning: weights that no longer move, because updates are too small for their precision
    PrecisionWarning        a UserWarning: a plan that is not in force where it should be
    UnheldWarning           a UserWarning: parameters that require gradients and that no optimizer holds

A user's mistake raises one of these. `assert` is kept for halfstep's own invariants.
"""

import difflib
from collections.abc import Iterable


class HalfstepError(Exception):
    """Root of every error that halfstep raises on purpose.

    Examples:
        >>> issubclass(PlanError, HalfstepError)
        True
    """


class FormatError(HalfstepError, ValueError):
    """A number format that does not exist, or that cannot be rounded to as asked."""


class PlanError(HalfstepError, ValueError):
    """A plan that cannot be read, or whose rules do not fit the model."""


class UnsupportedError(HalfstepError, ValueError):
    """A plan that is well formed and cannot be honoured here."""


class RecipeError(HalfstepError, ValueError):
    """A recipe with an unknown key or a value of the wrong kind."""


class DataError(HalfstepError, ValueError):
    """Input data that is missing, empty or not finite."""


class ModelError(HalfstepError, ValueError):
    """A model or an optimizer that cannot be trained."""


class CheckpointError(HalfstepError, RuntimeError):
    """A checkpoint that cannot be written, read or applied."""


class RecordError(HalfstepError, RuntimeError):
    """A record that cannot be written or read."""


class TrainingError(HalfstepError, RuntimeError):
    """A run that cannot go on."""


class MissingExtraError(HalfstepError, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed; run in halfstep's checkout: pip install '.[{extra}]'"
        )
        self._arguments = (package, extra, purpose)

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), self._arguments


class StallWarning(UserWarning):
    """Weights that do not move, because their updates are too small for the precision they are kept in."""


class PrecisionWarning(UserWarning):
    """A plan that is not in force where it should be."""


class UnheldWarning(UserWarning):
    """Parameters that require gradients and that no optimizer holds, so that they are not trained."""


def describe_unknown(what: str, given: object, allowed: Iterable[str]) -> str:
    """One line that names the unknown word, its nearest neighbour and all that is allowed.

    Examples:
        >>> describe_unknown("format", "bf61", ["bf16", "fp16"])
        "unknown format 'bf61'; did you mean 'bf16'? Allowed: bf16, fp16"
    """
    choices = sorted(allowed)
    near = difflib.get_close_matches(str(given), choices, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return f"unknown {what} '{given}'{hint} Allowed: {', '.join(choices) or 'none'}"
