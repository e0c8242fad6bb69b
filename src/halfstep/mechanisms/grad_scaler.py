"""torch.amp.GradScaler, with a scale that keeps within bounds, closures, and steps that say what they did.

What torch leaves open, and what happens here:

    scale        halves without end, reaches 0, and then writes NaN    floor, ceiling, hysteresis, a limit of skips in a row
    closure      refused, or given scaled gradients                    unscaled gradients; the step is taken or undone whole
    no gradient  an assertion                                          nothing is done, and the outcome says so
    clipping     of scaled gradients goes unseen                       a warning
    step         says nothing                                          outcome: applied or skipped, why, which tensors

The scale and its counters are tensors beside the gradients, and the host reads them only where torch does: when it must
know whether to call an optimizer that cannot skip by itself. Outcomes are read when somebody asks.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from halfstep.distributed import Ranks, find_ranks
from halfstep.errors import ModelError, TrainingError
from halfstep.mechanisms.loss_scale import LossScaleRule, adjust_tensors
from halfstep.mechanisms.scaler_memory import Mark, Memory, get_local
from halfstep.records import StepOutcome
from halfstep.snapshot import Snapshot

LARGEST = 2.0**126
"""Bound of floor and ceiling, up and down: the scale and its reciprocal are normal fp32 numbers."""

NO_GRADIENT = "no parameter that the optimizer holds received a gradient"


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler with a scale that keeps within bounds, closures, and steps that say what they did.

    Use it as torch's: `scale(loss).backward()`, optionally `unscale_(optimizer)` and clipping, `step(optimizer)`,
    `update()`. It is one for isinstance, takes torch's arguments in torch's order, and reads and writes its state_dict.

    Args:
        device: the kind of device that trains, "cuda" or "cpu"; the scale lives where the first loss does.
        init_scale: the factor at the start.
        growth_factor: above 1.
        backoff_factor: below 1.
        growth_interval: updates without a non-finite gradient before growth.
        enabled: if False, losses pass through unscaled and every step is taken.
        floor: smallest scale. 1 is a gradient as the model computes it.
        ceiling: largest scale.
        hysteresis: skipped updates in a row before the scale backs off.
        skip_limit: updates that may be skipped in a row. `update` looks once every `skip_limit` updates, so that the
            device is not waited for at each, and raises TrainingError before twice as many have been skipped. 100 is four
            times the 24 halvings from the default ceiling to the default floor. None: any number.
        ranks: the processes that train together, which skip together: all of them where torch.distributed is initialised, a
            `distributed.Group(process_group)`, or `distributed.Alone()`. Every rank has to step the same optimizers.

    Closures: `step(optimizer, closure)` calls the closure for the optimizer (LBFGS, SAM). The closure calls
    `scale(loss).backward()` and returns the loss, scaled or not; it may call `unscale_(optimizer)` and clip after that. For
    the time of the step, weights and optimizer state are held twice.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> scaler = GradScaler("cpu")
        >>> scaler.name_parameters(model)
        >>> for x in torch.ones(1, 2), torch.full((1, 2), torch.inf):
        ...     optimizer.zero_grad()
        ...     scaler.scale(model(x).sum()).backward()
        ...     _ = scaler.step(optimizer)
        ...     scaler.update()
        ...     print(scaler.get_outcome().status, scaler.get_outcome().tensors, scaler.get_scale())
        applied () 65536.0
        skipped ('weight',) 32768.0

    Raises ModelError unless 2**-126 <= floor <= init_scale <= ceiling <= 2**126, hysteresis >= 1 and skip_limit >= 1.
    """

    def __init__(  # noqa: PLR0913  (torch's arguments, and ours)
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        floor: float = 1.0,
        ceiling: float = 2.0**24,
        hysteresis: int = 1,
        skip_limit: int | None = 100,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        if not 1 / LARGEST <= floor <= init_scale <= ceiling <= LARGEST:
            raise ModelError(
                f"the loss scale needs 2**-126 <= floor <= init_scale <= ceiling <= 2**126; got floor={floor:g}, "
                f"init_scale={init_scale:g}, ceiling={ceiling:g}; move floor or ceiling, or start in between"
            )
        if hysteresis < 1 or (skip_limit is not None and skip_limit < 1):
            raise ModelError(f"hysteresis and skip_limit must be at least 1; got {hysteresis} and {skip_limit}")
        self._floor, self._ceiling = floor, ceiling
        self._hysteresis, self._skip_limit = hysteresis, skip_limit
        self._overflows = torch.zeros((), dtype=torch.int32)  # in a row, counted anew at each backoff
        self._skips = torch.zeros((), dtype=torch.int32)  # updates in a row that found a non-finite gradient
        self._updates = 0  # of them so far; says when to look at the skips
        self._ranks = ranks
        self._memory = Memory()

    def name_parameters(self, model: nn.Module) -> None:
        """Let outcomes call parameters by their names in `model`, and not by their places in the optimizer."""
        self._memory.names.update({parameter: name for name, parameter in model.named_parameters()})

    def get_outcome(self, optimizer: Optimizer | None = None) -> StepOutcome:
        """What the last `step` did, or the last `step` of one optimizer. Waits for the device.

        `scale_before` and `scale_after` are those of the `update` that followed; until then both are the scale in use.
        `step` counts the steps of that optimizer that this scaler has seen applied. `tensors` are the parameters whose
        gradient was not finite when `step` was called; for fused optimizers they are known until the gradients are replaced.

        Raises TrainingError before the first `step`.
        """
        memory = self._memory
        step = memory.last if optimizer is None else memory.steps.get(optimizer)
        if step is None:
            raise TrainingError("there is no outcome before the first step; call scaler.step(optimizer)")
        held_by = step.optimizer()
        overflowed = bool(step.overflowed)
        if overflowed and held_by is not None and step.witness is not None and step.witness.is_unchanged():
            step.tensors, step.witness = memory.find_nonfinite(held_by), None
        return step.describe()

    def scale(self, outputs: Any) -> Any:
        """A tensor, or a list, tuple or iterable of tensors, times the scale."""
        scaled = super().scale(outputs)
        return self._follow(scaled) if self._enabled else scaled

    def _follow(self, scaled: Any) -> Any:
        """Remember scaled losses within a closure; have gradients marked at the end of their backward pass."""
        if isinstance(scaled, list | tuple):
            return type(scaled)(self._follow(value) for value in scaled)
        if not isinstance(scaled, Tensor):
            return map(self._follow, scaled)
        if self._memory.scaled is not None:
            self._memory.scaled.append(scaled)
        if self._memory.optimizers and scaled.requires_grad and not torch.compiler.is_compiling():
            scaled.register_hook(self._queue_marking)
        return scaled

    def _queue_marking(self, _gradient: Tensor) -> None:
        """Queued twice: data-parallel wrappers write gradients in callbacks of their own, queued during the pass."""
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._memory.mark_gradients))

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, once before each `step`; clip after it.

        Warns once when gradients were changed in place between backward and here. Raises ModelError, a ValueError, for fp16
        gradients.
        """
        if self._enabled and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            self._look_for_early_change(optimizer)
        super().unscale_(optimizer)

    def _look_for_early_change(self, optimizer: Optimizer) -> None:
        changed = self._memory.find_changed(optimizer)
        if changed and not self._memory.warned:
            self._memory.warned = True
            warnings.warn(
                f"{len(changed)} gradients, the first of {changed[0]}, were changed in place after the backward pass and "
                "before unscale_(), while they were multiplied by the loss scale. Clipping, noise and unscaled gradients come "
                "out wrong there: call scaler.unscale_(optimizer) first. A constant factor does no harm",
                stacklevel=3,
            )

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        try:
            found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        except ValueError as error:
            raise ModelError(
                f"{error} The weights are fp16 and would lose small updates: call model.float() before making the optimizer "
                'and run the model under autocast, or let halfstep.prepare(model, optimizer, "compute=fp16 storage=fp16 '
                'master=fp32") keep fp32 masters behind fp16 weights'
            ) from None
        self._agree_on_found(found.values(), inv_scale.device)
        return found

    def _agree_on_found(self, found: Iterable[Tensor], device: torch.device) -> None:
        """What one rank has found, all have: one number goes round, also from a rank that has no gradient at all."""
        ranks = self._ranks or find_ranks()
        if ranks.size > 1:
            found = list(found)
            here = _add_up(found, device)
            everywhere = ranks.maximize(torch.zeros((), device=device) if here is None else here)
            for one in found:
                one.copy_(everywhere)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Unscale the gradients unless that was done, then `optimizer.step(*args, **kwargs)` unless one is not finite.

        Returns what `optimizer.step` returned, None when it was skipped; `get_outcome` tells more.

        Raises ModelError for fp16 gradients and for a closure that does not call `scale`.
        """
        if not self._enabled:
            value: float | None = optimizer.step(*args, **kwargs)
            self._memory.note(optimizer, 1.0)
            self._memory.open.clear()  # nobody waits for an update
            return value
        if callable(kwargs.get("closure")) or (args and callable(args[0])):
            return self._step_with_closure(optimizer, args, kwargs)
        kwargs.pop("closure", None)  # torch refuses also a closure that is None
        scale, _ = self._check_scale_growth_tracker("step")
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            return self._step_fused(optimizer, scale, args, kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is not OptState.STEPPED and not any(self._memory.find_gradients(optimizer)):
            state["stage"] = OptState.STEPPED
            self._agree_on_found((), scale.device)
            self._memory.note(optimizer, scale, cause=NO_GRADIENT)
            return None
        return super().step(optimizer, *args, **kwargs)

    def _maybe_opt_step(
        self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        scale, _ = self._check_scale_growth_tracker("step")
        if any(found.item() for found in optimizer_state["found_inf_per_device"].values()):
            self._memory.note(optimizer, scale, True, tensors=self._memory.find_nonfinite(optimizer))
            return None
        result: float | None = optimizer.step(*args, **kwargs)
        self._memory.note(optimizer, scale)
        return result

    def _step_fused(
        self, optimizer: Optimizer, scale: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> float | None:
        """The optimizer unscales and skips on its device by itself; what it did is left there until somebody asks."""
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.READY:
            self._look_for_early_change(optimizer)
        result = super().step(optimizer, *args, **kwargs)
        found = _add_up(state["found_inf_per_device"].values(), scale.device)
        if found is None:
            self._memory.note(optimizer, scale, cause=NO_GRADIENT)
        else:
            witness = next((Mark(parameter) for _, parameter in self._memory.find_gradients(optimizer)), None)
            self._memory.note(optimizer, scale, found, witness=witness)
        return result

    def _step_with_closure(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        """A step that evaluates the loss itself: taken whole, or undone whole."""
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        if state["stage"] is OptState.READY and self._memory.has_new_gradients(optimizer):
            self.unscale_(optimizer)
        if callable(kwargs.get("closure")):
            kwargs["closure"] = functools.partial(self._evaluate, optimizer, kwargs["closure"])
        else:
            args = (functools.partial(self._evaluate, optimizer, args[0]), *args[1:])
        result: float | None = None
        tensors: tuple[str, ...] | None = None
        before = Snapshot(optimizers=[optimizer])
        try:
            self._require_finite(optimizer)
            result = optimizer.step(*args, **kwargs)
        except _NonFiniteError as error:
            before.put_back()
            tensors = error.tensors
        except BaseException:
            before.put_back()
            raise
        self._per_optimizer_states[id(optimizer)]["stage"] = OptState.STEPPED
        self._memory.mark_left(optimizer)
        scale = 1.0 if self._scale is None else self._scale  # None: no gradient was there and the closure never called
        self._memory.note(optimizer, scale, tensors is not None, tensors=tensors or ())
        return result

    def _evaluate(self, optimizer: Optimizer, closure: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the closure for the optimizer: gradients and loss come out unscaled."""
        if self._scale is not None:  # what the closure may add to gets the size of what it adds
            with torch.no_grad():
                for _, p in self._memory.find_gradients(optimizer):
                    scaled_again = torch.mul(p.grad, self._scale.to(p.device))  # new: the optimizer may hold the old
                    p.grad = scaled_again.to(p.dtype)
        self._per_optimizer_states[id(optimizer)]["stage"] = OptState.READY
        scaled: list[Tensor] = []
        self._memory.scaled = scaled
        try:
            loss = closure(*args, **kwargs)
        finally:
            self._memory.scaled = None
        if self._scale is None or not scaled:
            raise ModelError(
                "the closure given to step() did not call scaler.scale(); let it call scaler.scale(loss).backward() and "
                "return loss"
            )
        if self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            self.unscale_(optimizer)
        self._require_finite(optimizer)
        if isinstance(loss, Tensor):  # line searches have to see the same on all ranks
            is_scaled = any(_share_storage(loss, one) for one in scaled)
            value = loss / self._scale.to(loss.device) if is_scaled else loss
            ranks = self._ranks or find_ranks()
            return ranks.average(value.detach()) if ranks.size > 1 else value
        return loss

    def _require_finite(self, optimizer: Optimizer) -> None:
        if any(found.item() for found in self._found_inf_per_device(optimizer).values()):
            raise _NonFiniteError(self._memory.find_nonfinite(optimizer))

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Move the scale for the next iteration, or set it: a float, or a one-element tensor that is clamped.

        Raises ModelError for a float outside floor and ceiling, TrainingError when `skip_limit` is reached.
        """
        if not self._enabled:
            return
        scale, clean = self._check_scale_growth_tracker("update")
        states = self._per_optimizer_states.values()
        found = _add_up((f for state in states for f in state["found_inf_per_device"].values()), scale.device)
        before = scale.clone()
        if isinstance(new_scale, float) and not self._floor <= new_scale <= self._ceiling:
            raise ModelError(
                f"the loss scale stays between floor {self._floor:g} and ceiling {self._ceiling:g}; got {new_scale:g}; "
                "make the scaler with other bounds"
            )
        adjusts = new_scale is None and found is not None
        if new_scale is not None:
            super().update(new_scale)
            scale.clamp_(self._floor, self._ceiling)
        elif found is not None:
            self._adjust(scale, clean, found != 0)
        elif all(state["stage"] is OptState.READY for state in states):
            super().update()  # nothing was stepped: raises
        self._per_optimizer_states.clear()
        self._memory.close(before, scale)
        if adjusts:
            self._look_at_skips(scale)

    def _adjust(self, scale: Tensor, clean: Tensor, found_nonfinite: Tensor) -> None:
        """In place, since a captured graph reads the scale where it is."""
        rule = LossScaleRule(
            growth=self._growth_factor, backoff=self._backoff_factor, interval=self._growth_interval,
            hysteresis=self._hysteresis, floor=self._floor, ceiling=self._ceiling,
        )  # fmt: skip
        after = adjust_tensors(scale, clean, self._overflows, rule, found_nonfinite=found_nonfinite)
        for old, new in zip((scale, clean, self._overflows), after, strict=True):
            old.copy_(new)
        self._skips.add_(1).mul_(found_nonfinite)
        self._updates += 1

    def _look_at_skips(self, scale: Tensor) -> None:
        limit = self._skip_limit
        if limit is None or self._updates % limit != 0:
            return
        if (skips := int(self._skips.item())) >= limit:
            raise TrainingError(
                f"{skips} updates in a row were skipped for gradients that are not finite, skip_limit is {limit} and the loss "
                f"scale is down to {scale.item():g}; scaler.get_outcome() names the tensors: look for a loss or an input that "
                f"is not finite, a learning rate that is too large, or fp16 overflow that a floor below {self._floor:g} cures"
            )

    def state_dict(self) -> dict[str, Any]:
        """torch's five entries, and `_overflow_tracker` and `_skip_tracker`: overflows and skips in a row."""
        state = super().state_dict()
        if self._enabled:
            state.update(_overflow_tracker=int(self._overflows.item()), _skip_tracker=int(self._skips.item()))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of this class or of torch's. A scale outside the bounds is moved into them, with a warning."""
        state = dict(state_dict)
        if self._enabled and state:
            state["scale"] = min(max(self._floor, state["scale"]), self._ceiling)  # in this order NaN becomes the floor
            if state["scale"] != state_dict["scale"]:
                warnings.warn(
                    f"the loaded loss scale {state_dict['scale']:g} is outside floor {self._floor:g} and ceiling "
                    f"{self._ceiling:g}; going on with {state['scale']:g}",
                    stacklevel=2,
                )
            self._overflows.fill_(state.get("_overflow_tracker", 0))
            self._skips.fill_(state.get("_skip_tracker", 0))
        super().load_state_dict(state)

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        super()._lazy_init_scale_growth_tracker(dev)
        self._overflows, self._skips = self._overflows.to(dev), self._skips.to(dev)

    def __getstate__(self) -> dict[str, Any]:
        """As torch's: between iterations only. Outcomes and parameter names stay behind."""
        state = {**super().__getstate__(), "_overflows": self._overflows.cpu(), "_skips": self._skips.cpu()}
        del state["_memory"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._memory = Memory()


class _NonFiniteError(Exception):
    """Leads out of an optimizer that is evaluating a closure."""

    def __init__(self, tensors: tuple[str, ...]) -> None:
        super().__init__(tensors)
        self.tensors = tensors


def _add_up(found: Iterable[Tensor], device: torch.device) -> Tensor | None:
    """Sum of one-element tensors from several devices; None of none."""
    here = [one.to(device, non_blocking=True) for one in found]
    return functools.reduce(torch.add, here) if here else None


def _share_storage(one: Tensor, other: Tensor) -> bool:
    """Whether the two are the same numbers: one is the other, or it detached or reshaped."""
    return get_local(one).untyped_storage().data_ptr() == get_local(other).untyped_storage().data_ptr()
