"""What a scaler has seen of optimizers and gradients, so that a step can say what it did without waiting for the device.

A gradient is recognised by the tensor and its version counter, which torch raises at every change in place.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep.records import StepOutcome


class Mark:
    """A gradient as it was at a moment: which tensor, and how often it had been written to."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        gradient = parameter.grad
        self.gradient = weakref.ref(gradient) if gradient is not None else None
        self.version = gradient._version if gradient is not None else 0

    def is_same_tensor(self) -> bool:
        return self.gradient is not None and self.parameter.grad is self.gradient()

    def is_unchanged(self) -> bool:
        gradient = self.parameter.grad
        return gradient is not None and self.is_same_tensor() and gradient._version == self.version


@dataclass(kw_only=True)
class Step:
    """What one step did, as far as it can be known without waiting for the device."""

    optimizer: weakref.ref[Optimizer]
    applied: int | Tensor  # steps of this optimizer until now
    overflowed: bool | Tensor  # nonzero where a gradient was not finite
    before: float | Tensor
    after: float | Tensor
    cause: str
    tensors: tuple[str, ...]
    witness: Mark | None  # as long as this gradient is there, the others are too

    def describe(self) -> StepOutcome:
        cause = self.cause
        if bool(self.overflowed):
            cause = "a gradient is not finite; it was on another rank, or has been replaced since step()"
            if self.tensors:
                cause = f"{len(self.tensors)} gradients are not finite, the first is {self.tensors[0]}"
        return StepOutcome(
            status="skipped" if cause else "applied", step=int(self.applied), scale_before=float(self.before),
            scale_after=float(self.after), cause=cause, tensors=self.tensors,
        )  # fmt: skip


@dataclass
class Memory:
    """What a scaler has seen of optimizers and gradients. Not part of its state: a copy starts with none."""

    names: dict[Tensor, str] = field(default_factory=dict)
    steps: weakref.WeakKeyDictionary[Optimizer, Step] = field(default_factory=weakref.WeakKeyDictionary)
    last: Step | None = None
    open: list[Step] = field(default_factory=list)  # since the last update
    scaled: list[Tensor] | None = None  # what scale() gave within the closure that is running
    left: weakref.WeakKeyDictionary[Optimizer, dict[Tensor, Mark]] = field(default_factory=weakref.WeakKeyDictionary)
    optimizers: weakref.WeakSet[Optimizer] = field(default_factory=weakref.WeakSet)  # whose gradients are marked
    marks: dict[Tensor, Mark] = field(default_factory=dict)  # gradients as the last backward pass left them
    warned: bool = False

    def note(
        self, optimizer: Optimizer, scale: float | Tensor, overflowed: bool | Tensor = False, *, cause: str = "",
        tensors: tuple[str, ...] = (), witness: Mark | None = None,
    ) -> None:  # fmt: skip
        earlier = self.steps.get(optimizer)
        applied = earlier.applied if earlier else 0
        self.last = self.steps[optimizer] = Step(
            optimizer=weakref.ref(optimizer), applied=applied if cause else applied + (overflowed == 0),
            overflowed=overflowed, before=scale, after=scale, cause=cause, tensors=tensors, witness=witness,
        )  # fmt: skip
        self.open.append(self.last)

    def close(self, before: Tensor, scale: Tensor) -> None:
        """After an update: its steps keep the scale as it was before and as it is now."""
        after = scale.clone()
        for step in self.open:
            step.before, step.after = before, after
        self.open.clear()
        self.marks.clear()

    def find_gradients(self, optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
        """Parameters with a gradient, under the best name known."""
        for g, group in enumerate(optimizer.param_groups):
            names = group.get("param_names")
            for i, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    place = names[i] if names else f"param_groups[{g}]['params'][{i}]"
                    yield self.names.get(parameter, place), parameter

    def find_nonfinite(self, optimizer: Optimizer) -> tuple[str, ...]:
        with torch.no_grad():
            return tuple(name for name, p in self.find_gradients(optimizer) if not _is_finite(p.grad))

    def mark_gradients(self) -> None:
        for optimizer in self.optimizers:
            self.marks.update({p: Mark(p) for _, p in self.find_gradients(optimizer)})

    def find_changed(self, optimizer: Optimizer) -> list[str]:
        """Names of gradients written to since they were marked. From now on the optimizer's gradients are marked."""
        if self.warned:
            self.optimizers.clear()
            return []
        self.optimizers.add(optimizer)
        marks = [(name, self.marks.get(p)) for name, p in self.find_gradients(optimizer)]
        return [name for name, mark in marks if mark and mark.is_same_tensor() and not mark.is_unchanged()]

    def mark_left(self, optimizer: Optimizer) -> None:
        """Gradients that a step with closure leaves behind are unscaled already."""
        self.left[optimizer] = {p: Mark(p) for _, p in self.find_gradients(optimizer)}

    def has_new_gradients(self, optimizer: Optimizer) -> bool:
        left = self.left.get(optimizer, {})
        return any(p not in left or not left[p].is_unchanged() for _, p in self.find_gradients(optimizer))


def get_local(tensor: Any) -> Tensor:
    """This rank's part of a distributed tensor; any other as it is."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _is_finite(gradient: Tensor) -> bool:
    local = get_local(gradient)
    return bool(torch.isfinite(local._values() if local.is_sparse else local).all())
