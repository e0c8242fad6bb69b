"""The fp32 truth behind 16-bit weights, for any torch optimizer.

The live weight is 16 bits wide while the model runs. For the update it is widened to its fp32 truth in place, the
optimizer does to it what it always does, and it is narrowed again:

    for each chunk of parameters:  widen;  optimizer.step();  narrow

The optimizer sees ordinary fp32 parameters with fp32 gradients, so its states are fp32 and any optimizer will do. Only
one chunk is wide at a time; optimizers skip parameters that have no gradient, which is how a step is confined to it.

`numerics.truths` holds the ways to keep the truth, `numerics.openings` what an optimizer finds in a narrow parameter's place.

One pass: where AdamW, Adam or SGD is stepped on the processor, nothing is widened. Parameters behind `split`, behind `fp32` with
bf16, and those that are fp32 anyway are read, updated and written in one pass over memory (`numerics.native_steps` says which
and why not others), with the gradient in the bits it came in, and states in 8 bits as they are. It is the same update, to the bit
that torch's own would give.

Rows: where a gradient is sparse, SparseAdam, Adagrad and SGD read, update and write the rows that it names in the same way
(`numerics.native_rows`). Behind other masters those rows are widened, stepped by torch and narrowed again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.errors import UnsupportedError
from halfstep.numerics import rows, updates
from halfstep.numerics.kernels import Kernels
from halfstep.numerics.movement import ELEMENTWISE, FORMAT_NAMES, Watch
from halfstep.numerics.native_rows import find_rows_reason, step_rows
from halfstep.numerics.native_steps import (
    Job,
    find_group_reason,
    find_narrow_reason,
    find_reason,
    step_natively,
)
from halfstep.numerics.noise import derive_keys
from halfstep.numerics.openings import (
    Opened,
    Places,
    look_before,
    match_states,
    open_rows,
    open_whole,
    open_wide,
)
from halfstep.numerics.repeated_steps import RepeatedSteps
from halfstep.numerics.truths import WAYS, Truth, show
from halfstep.numerics.updates import Weight
from halfstep.records import Stall

__all__ = ["WAYS", "MasterWeights", "match_states"]

CHUNK = 1 << 20  # parameters that are wide at once: 8 MB of weights and gradients

ONE_PASS = ("split", "fp32")  # kinds behind bf16 whose update may take one pass over memory

PARAMETERWISE = {*ELEMENTWISE, torch.optim.SparseAdam}
"""Optimizers known to treat parameters one by one; any other gets all of its parameters in one chunk."""

DENSE = {*ELEMENTWISE.difference((torch.optim.SGD, torch.optim.Adagrad)), torch.optim.Adafactor}
"""Optimizers known to refuse sparse gradients."""

BY_ROWS = {torch.optim.SparseAdam, torch.optim.Adagrad, torch.optim.SGD}
"""Optimizers that take sparse gradients and treat rows one by one; SGD without momentum."""


Step = Callable[[Optimizer, dict[str, Any], list[Job], float], list[nn.Parameter]]
"""An update of parameters of a group, times a factor; returns those that were updated."""


def _find_places(optimizer: Optimizer) -> Places:
    """Where stand-ins may be put; nowhere in an optimizer that may keep its parameters elsewhere too."""
    if type(optimizer) not in PARAMETERWISE:
        return {}
    return {p: (group["params"], i) for group in optimizer.param_groups for i, p in enumerate(group["params"])}


def _goes_by_rows(optimizer: Optimizer, parameter: nn.Parameter, gradient: Tensor) -> bool:
    if not gradient.is_sparse or gradient.sparse_dim() != 1 or type(optimizer) not in BY_ROWS:
        return False
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    return not group.get("momentum")  # SGD's momentum is sparse too, and moves rows of earlier gradients


def _require_sparse(
    optimizer: Optimizer, gradients: Mapping[nn.Parameter, Tensor], by_rows: list[nn.Parameter]
) -> None:
    """Raises UnsupportedError where optimizer and gradients do not fit, before anything has moved. by_rows: with sparse ones."""
    name = type(optimizer).__name__
    if type(optimizer) in DENSE and by_rows:
        raise UnsupportedError(
            f"{name} takes no sparse gradients; use SparseAdam, Adagrad or SGD, or make the embedding with sparse=False"
        )
    if isinstance(optimizer, torch.optim.SparseAdam) and len(by_rows) < len(gradients):
        raise UnsupportedError(
            "SparseAdam takes only sparse gradients; give the other parameters an optimizer of their own"
        )


class MasterWeights:
    """Keeps parameters narrow, and steps an optimizer on their fp32 truth.

    seed: of the noise of stochastic rounding; the same on all replicas, so that they stay equal.
    fused: update in one pass over memory where that can be done; `describe_updates` says where.

    Examples:
        >>> layer = nn.Linear(4, 4)
        >>> masters = MasterWeights()
        >>> masters.narrow(layer.weight, torch.bfloat16, "split")
        >>> layer.weight.dtype, masters.read(layer.weight).dtype
        (torch.bfloat16, torch.float32)
    """

    def __init__(self, seed: int = 0, *, fused: bool = True) -> None:
        self.seed, self.fused = seed, fused
        self.steps = 0  # calls of `step`; each has noise of its own
        self._truths: dict[nn.Parameter, Truth] = {}
        self._by_rows: set[nn.Parameter] = set()  # parameters with sparse gradients, as far as is known
        self._repeated = RepeatedSteps()  # with the truths of now
        self._narrowed = 0  # parameters that were ever narrowed: the number of the next

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._truths

    def __len__(self) -> int:
        return len(self._truths)

    def state_dict(self) -> dict[str, int]:
        """What the noise of the next update depends on; the values are in the model's own state dict, as fp32.

        Examples:
            >>> MasterWeights(seed=3).state_dict()
            {'seed': 3, 'steps': 0}
        """
        return {"seed": self.seed, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with the noise of a saved state."""
        self.seed, self.steps = state["seed"], state["steps"]

    def expect_sparse(self, parameters: Iterable[nn.Parameter]) -> None:
        """Say whose gradients will be sparse, so that `describe_updates` knows it before the first step.

        Examples:
            >>> masters, weight = MasterWeights(), nn.Parameter(torch.ones(3, 2))
            >>> masters.expect_sparse([weight])
            >>> masters.describe_updates(torch.optim.SGD([weight], momentum=0.9))
            'torch: momentum=0.9 has no kernel for sparse gradients'
        """
        self._by_rows.update(parameters)

    def narrow(self, parameter: nn.Parameter, dtype: torch.dtype, kind: str) -> None:
        """Make an fp32 parameter's live weight `dtype` and keep its fp32 truth as `kind`: a word of WAYS, or none.

        Raises UnsupportedError for a kind that needs bf16 behind anything else, and for parameters that are not fp32.
        """
        if parameter.dtype != torch.float32:
            raise UnsupportedError(f"only fp32 parameters can be narrowed; got {parameter.dtype}; leave it as it is")
        if kind != "none" and WAYS[kind].why_bf16 and dtype is not torch.bfloat16:
            raise UnsupportedError(
                f"master '{kind}' works behind bf16 weights; got {dtype}, which {WAYS[kind].why_bf16}; use master='fp32'"
            )
        parameter.grad = None
        number, self._narrowed = self._narrowed, self._narrowed + 1
        if kind == "none":
            parameter.data = parameter.data.to(dtype)
            return
        self._repeated.clear()
        truth = Truth.of(parameter.data, kind, number, dtype)
        self._truths[parameter] = truth
        show(parameter, truth)

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The parameter in fp32: its truth where one is kept, else the live weight converted."""
        truth = self._find_truth(parameter)
        return truth.read().clone() if truth else parameter.detach().to(torch.float32)

    def _find_truth(self, parameter: nn.Parameter) -> Truth | None:
        """A parameter's truth. Where somebody has changed the live weight in place (clamped, pruned, initialised again),
        what they wrote is the truth from now on."""
        truth = self._truths.get(parameter)
        if truth:
            self._refresh(parameter, truth)
        return truth

    @staticmethod
    def _refresh(parameter: nn.Parameter, truth: Truth) -> None:
        if truth.version != parameter._version or truth.live.data_ptr() != parameter.data_ptr():
            truth.write(parameter.data.to(torch.float32, copy=True))
            show(parameter, truth)

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the parameter from an fp32 tensor, truth and live weight, rounded to nearest."""
        if parameter in self._truths:
            wide = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)  # with the parameter's strides
            self._truths[parameter].write(wide.copy_(value.detach()))
            show(parameter, self._truths[parameter])
        else:
            parameter.data.copy_(value)

    def widen(self, parameter: nn.Parameter) -> None:
        """Give a parameter back its fp32 truth for good."""
        truth = self._find_truth(parameter)
        self._repeated.clear()
        self._truths.pop(parameter, None)
        parameter.grad = None
        parameter.data = truth.read() if truth else parameter.data.to(torch.float32)

    def step(
        self,
        optimizer: Optimizer,
        gradients: dict[nn.Parameter, Tensor],
        factor: float = 1.0,
        *,
        watch: bool = False,
        widened: Callable[[list[nn.Parameter]], AbstractContextManager[None]] | None = None,
    ) -> tuple[Stall, ...]:
        """One optimizer step with `gradients` times `factor`, chunk by chunk; leaves no gradient behind.

        The gradients are used up. Where `watch` is true, the parameter groups that stall are returned, as
        `numerics.movement` defines it; the update is the same to the bit, and costs more.
        widened: where optimizer states are kept in 8 bits, the block in which those of some parameters are in fp32
            (`optimizer_states.NarrowStates.widened`); what cannot be stepped in one pass is stepped in it, chunk by chunk.

        Raises UnsupportedError for a sparse gradient that the optimizer is known to refuse; nothing has moved then.
        """
        by_rows = [parameter for parameter, gradient in gradients.items() if gradient.is_sparse]
        _require_sparse(optimizer, gradients, by_rows)
        self._by_rows.update(by_rows)
        self.steps += 1
        watcher = Watch(optimizer, gradients) if watch else None
        for parameter in gradients:
            parameter.grad = None
        narrow = widened is not None
        if self._step_in_one_pass(optimizer, gradients, factor, watcher, narrow=narrow):
            return watcher.judge() if watcher else ()
        places = _find_places(optimizer)
        for chunk in self._chunks(optimizer, gradients, wide_too=narrow):
            opened: list[Opened] = []
            with widened(chunk) if widened else nullcontext(), ExitStack() as narrowing:
                for parameter in chunk:
                    opening = self._open(optimizer, places, parameter, gradients.pop(parameter), factor)
                    opened.append(narrowing.enter_context(opening))
                if watcher:
                    for wide, truth in opened:
                        storage, kind = (truth.live.dtype, truth.kind) if truth else (wide.dtype, "none")
                        watcher.look_before(wide, storage, kind)
                optimizer.step()
                if watcher:
                    for wide, _ in opened:
                        watcher.look_after(wide)
            if watcher:
                for wide, truth in opened:
                    if truth:
                        watcher.look_narrowed(wide, truth.read_at)
        return watcher.judge() if watcher else ()

    def _open(
        self, optimizer: Optimizer, places: Places, parameter: nn.Parameter, gradient: Tensor, factor: float
    ) -> AbstractContextManager[Opened]:
        """A parameter as its optimizer is to find it: wide, with its gradient; at the end of the block it is narrow again,
        without one."""
        truth = self._find_truth(parameter)
        if truth:
            gradient = gradient.to(torch.float32)
        if factor != 1.0:
            gradient.mul_(factor)
        if truth is None:
            return open_wide(parameter, gradient.to(parameter.dtype))
        if gradient.is_sparse:
            gradient = gradient.coalesce()  # in fp32: sums rows that occur twice
        match_states(optimizer, parameter, torch.float32)
        keys = derive_keys(self.seed, truth.number, self.steps)
        if _goes_by_rows(optimizer, parameter, gradient):
            return open_rows(optimizer, places, parameter, gradient, truth, keys)
        return open_whole(optimizer, places, parameter, gradient, truth, keys)

    def describe_updates(self, optimizer: Optimizer, *, narrow: bool = False) -> str:
        """What computes an optimizer's updates: "native", or "torch: ..." and the reason; both where it differs from parameter to
        parameter. narrow: with states in 8 bits.

        Examples:
            >>> masters, weight = MasterWeights(), nn.Parameter(torch.ones(3))
            >>> masters.describe_updates(torch.optim.RMSprop([weight]))
            'torch: RMSprop has no kernel'
        """
        reason = find_reason(optimizer) if self.fused else "fused=False"
        if reason:
            return f"torch: {reason}"
        surveyed = self._survey(optimizer, narrow=narrow)
        left = [reason for _, reason in surveyed if reason]
        named = "; ".join(dict.fromkeys(left))
        if not left:
            return "native"
        if len(left) == len(surveyed):
            return f"torch: {named}"
        return f"native; torch for {len(left)} of {len(surveyed)} parameters: {named}"

    def list_kernels(self, optimizer: Optimizer, *, narrow: bool = False) -> tuple[Kernels, ...]:
        """Those that compute updates of an optimizer. narrow: with states in 8 bits.

        Examples:
            >>> MasterWeights().list_kernels(torch.optim.RMSprop([nn.Parameter(torch.ones(3))]))
            ()
        """
        if not self.fused or find_reason(optimizer):
            return ()
        surveyed = self._survey(optimizer, narrow=narrow)
        return tuple(dict.fromkeys(kernels for kernels, reason in surveyed if not reason))

    def _survey(self, optimizer: Optimizer, *, narrow: bool) -> list[tuple[Kernels, str]]:
        """The kernels for the update of each parameter, and why it is left to torch; empty where it is not."""
        found = []
        for group in optimizer.param_groups:
            dense, sparse = find_group_reason(optimizer, group), find_rows_reason(optimizer, group)
            for p in group["params"]:
                by_rows = p in self._by_rows or type(optimizer) is torch.optim.SparseAdam
                reason = (sparse if by_rows else dense) or self._find_reason(p, self._truths.get(p))
                if narrow and not reason:
                    reason = find_narrow_reason(optimizer, group, p, sparse=by_rows)
                found.append((rows.KERNELS if by_rows else updates.KERNELS, reason))
        return found

    @staticmethod
    def _find_reason(parameter: nn.Parameter, truth: Truth | None) -> str:
        """Why a parameter of a group that has kernels is left to torch; empty where it is not."""
        dtype = parameter.dtype
        if parameter.is_cpu and dtype is (torch.bfloat16 if truth else torch.float32):
            return (
                ""
                if truth is None or truth.kind in ONE_PASS
                else f"master '{truth.kind}' behind bf16 weights has no kernel"
            )
        if not parameter.is_cpu:
            return f"weights on {parameter.device.type}"
        name = FORMAT_NAMES.get(dtype, dtype)
        if truth:
            return f"master '{truth.kind}' behind {name} weights has no kernel"
        return f"{name} weights without a master have no kernel"

    def _step_in_one_pass(
        self,
        optimizer: Optimizer,
        gradients: dict[nn.Parameter, Tensor],
        factor: float,
        watcher: Watch | None,
        *,
        narrow: bool,
    ) -> bool:
        """Update what can be updated without widening, and take its gradients out; whether that was all. narrow: states are
        in 8 bits."""
        if not self.fused or not gradients or find_reason(optimizer):
            return False
        repeats = watcher is None and not narrow
        if repeats and self._repeated.take(optimizer, gradients, factor):
            gradients.clear()
            return True
        given = dict(gradients) if repeats else {}
        places = _find_places(optimizer) if watcher else {}
        steps: tuple[Step, Step] = (partial(step_natively, narrow=narrow), step_rows)
        for group in optimizer.param_groups:
            for step, jobs in zip(steps, self._find_jobs(optimizer, group, gradients, narrow=narrow), strict=True):
                if watcher:  # one by one: it sees a wide copy of each
                    watched = partial(
                        self._step_watched, step, optimizer, places, group, factor=factor, watcher=watcher
                    )
                    done = [p for job in jobs for p in watched(job)]
                else:
                    done = step(optimizer, group, jobs, factor) if jobs else []
                if len(done) == len(gradients):
                    gradients.clear()
                for parameter in done if gradients else ():
                    del gradients[parameter]
        if repeats and not gradients:
            self._repeated.note(optimizer, given, self._truths)
        return not gradients

    def _find_jobs(
        self, optimizer: Optimizer, group: dict[str, Any], gradients: Mapping[nn.Parameter, Tensor], *, narrow: bool
    ) -> tuple[list[Job], list[Job]]:
        """Parameters of a group that may be updated without widening: those with a dense gradient, and with a sparse one."""
        dense, by_rows = find_group_reason(optimizer, group), find_rows_reason(optimizer, group)
        jobs: tuple[list[Job], list[Job]] = [], []
        for parameter in group["params"]:
            gradient = gradients.get(parameter)
            if gradient is None:
                continue
            truth, is_sparse = self._truths.get(parameter) if self._truths else None, gradient.is_sparse
            if (by_rows if is_sparse else dense) or self._find_reason(parameter, truth):
                continue
            if narrow and find_narrow_reason(optimizer, group, parameter, sparse=is_sparse):
                continue
            if truth:
                self._refresh(parameter, truth)
                jobs[is_sparse].append((parameter, Weight(truth.live, truth.kept), gradient))
            elif gradient.dtype is torch.float32:  # without a master the factor rounds a gradient in its own dtype
                jobs[is_sparse].append((parameter, Weight(parameter), gradient))
        return jobs

    def _step_watched(
        self,
        step: Step,
        optimizer: Optimizer,
        places: Places,
        group: dict[str, Any],
        job: Job,
        factor: float,
        watcher: Watch,
    ) -> list[nn.Parameter]:
        """The parameter, if it could be updated."""
        parameter, weight, gradient = job
        truth = self._truths.get(parameter)
        seen = look_before(watcher, optimizer, places, parameter, truth, gradient, factor)
        done = step(optimizer, group, [job], factor)
        if done:
            seen.data = weight.read().detach()
            watcher.look_after(seen)
            seen.data = seen.data.new_empty(0)  # the watcher holds it to the end of the step
        else:
            watcher.forget(seen)
        return done

    @contextmanager
    def widened(self) -> Iterator[None]:
        """All parameters at their fp32 truth inside the block, for work that must see fp32 dtypes."""
        for parameter in self._truths:
            truth = self._find_truth(parameter)
            parameter.grad = None
            parameter.data = truth.read() if truth else parameter.data
        try:
            yield
        finally:
            for parameter, truth in self._truths.items():
                truth.write(parameter.data)
                show(parameter, truth)

    @contextmanager
    def narrowed(self) -> Iterator[None]:
        """Within `widened`: the live weights again inside the block, for work that runs the model."""
        for parameter, truth in self._truths.items():
            parameter.grad = None
            truth.write(parameter.data)
            show(parameter, truth)
        try:
            yield
        finally:
            for parameter, truth in self._truths.items():
                parameter.grad = None
                parameter.data = truth.read()

    def _chunks(
        self, optimizer: Optimizer, gradients: Mapping[nn.Parameter, Tensor], *, wide_too: bool
    ) -> Iterator[list[nn.Parameter]]:
        """Chunks of about CHUNK numbers; those that are wide already all in the first, unless `wide_too`."""
        narrow = [p for p in gradients if wide_too or p in self._truths]
        wide = [p for p in gradients if not wide_too and p not in self._truths]
        if not narrow or type(optimizer) not in PARAMETERWISE:
            yield wide + narrow
            return
        chunk, size = wide, 0
        for parameter in narrow:
            if chunk and size + parameter.numel() > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append(parameter)
            size += parameter.numel()
        yield chunk
