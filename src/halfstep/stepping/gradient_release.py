"""Gradient release: each parameter is updated in the backward pass, as soon as its gradient is there, and the gradient is
freed, so that all gradients never exist together (Lv et al. 2023, arXiv 2306.09782, fuse the two likewise).

What has been updated cannot be taken back: a loss that is not finite is seen before anything moves; a gradient that is
not leaves out its own parameter alone.
"""

import math
from contextlib import ExitStack
from dataclasses import replace
from typing import cast

from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.mechanisms.gradients import find_nonfinite, measure_norm, measure_norm_slowly
from halfstep.stepping.optimizers import Optimizers, list_parameters
from halfstep.window import NO_GRADIENT, Finding, Window


class Release:
    """One backward pass that updates as it goes; `go_backward` gives what it found."""

    def __init__(self, window: Window, optimizers: Optimizers) -> None:
        self._window, self._optimizers = window, optimizers
        self._left_out: set[nn.Parameter] = set()  # whose gradient was not finite
        self._norms: list[float] = []  # of the gradients that were applied

    def go_backward(self, loss: Tensor | None) -> Finding:
        """Backward of a finite loss, and the update of all parameters that it gives a finite gradient."""
        with ExitStack() as hooks:
            for optimizer in self._optimizers.all:
                self._watch(optimizer, hooks)
            self._window.go_backward(loss, 1.0)
        finding = Finding(norm=math.hypot(*self._norms), tensors=self._window.name_tensors(self._left_out))
        if self._norms:
            return finding
        if finding.tensors:
            return replace(finding, cause="no gradient is finite", nonfinite=True)
        return replace(finding, cause=NO_GRADIENT)

    def _watch(self, optimizer: Optimizer, hooks: ExitStack) -> None:
        def update(parameter: Tensor) -> None:
            gradient, held = parameter.grad, cast(nn.Parameter, parameter)
            if gradient is None:
                return
            norm = measure_norm([gradient])[0]
            if not math.isfinite(norm) and find_nonfinite({held: gradient}):
                self._left_out.add(held)
                parameter.grad = None
                return
            self._norms.append(norm if math.isfinite(norm) else measure_norm_slowly([gradient]))
            self._optimizers.step_one(optimizer, {held: gradient})

        for parameter in [p for p in list_parameters(optimizer) if p.requires_grad]:
            hooks.callback(parameter.register_post_accumulate_grad_hook(update).remove)
