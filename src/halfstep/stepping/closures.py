"""Steps of optimizers that evaluate the loss themselves (LBFGS), or that start from gradients and ask for others (SAM).

    widen everything;  optimizer.step(evaluate)         evaluate: narrow, forward, backward, check, unscale, clip, widen

The optimizer sees fp32 parameters with fp32 gradients of the unscaled loss. One evaluation that is not finite leaves the
optimizer where it is, in the middle: the caller undoes the whole step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.mechanisms.master_weights import MasterWeights
from halfstep.mechanisms.operators import forget_casts
from halfstep.stepping.optimizers import Optimizers
from halfstep.window import Finding, Window


class _NotFiniteError(Exception):
    """Leads out of an optimizer that is evaluating a closure."""


@dataclass(kw_only=True)
class ClosureStep:
    """One step of one optimizer through a closure."""

    window: Window
    optimizers: Optimizers
    masters: MasterWeights
    autocast: Callable[[], AbstractContextManager[Any]]
    scale: float
    clip: Callable[[float], float]  # norm -> factor on the gradients
    agree: Callable[[Finding], Finding]  # what this process found -> what all found
    average: Callable[[Tensor], Tensor]  # over all processes
    finding: Finding = field(default_factory=Finding, init=False)  # of the last evaluation

    def take(self, loss: Tensor | None, closure: Callable[[], Tensor]) -> Finding:
        """Step, beginning with the gradients of `loss` where it is given.

        When the finding has a cause, weights and states are those in the middle of the step.
        """
        try:
            first: dict[nn.Parameter, Tensor] = {}
            if loss is not None:
                self.window.go_backward(loss, self.scale)
                first = self._take_gradients()
            with self.optimizers.widened():
                for parameter, gradient in first.items():
                    parameter.grad = gradient
                self.optimizers.all[0].step(lambda: self._evaluate(closure))
        except _NotFiniteError:
            pass
        return self.finding

    def _evaluate(self, closure: Callable[[], Tensor]) -> float:
        self.window.clear()
        forget_casts()  # of the weights before the optimizer moved them
        with self.masters.narrowed(), torch.enable_grad():
            with self.autocast():
                value = closure()
            self.window.go_backward(value, self.scale)
            gradients = self._take_gradients()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return float(self.average(value.detach()))

    def _take_gradients(self) -> dict[nn.Parameter, Tensor]:
        """The gradients of what has just gone backward, checked, unscaled and clipped, in full precision."""
        gradients = self.window.take_gradients()
        self.finding = self.agree(self.window.inspect(gradients, self.scale, self.autocast))
        self.window.clear()
        if self.finding.cause:
            raise _NotFiniteError
        factor = self.clip(self.finding.norm) / self.scale
        return {p: (g.to(torch.float32) if p in self.masters else g) * factor for p, g in gradients.items()}
