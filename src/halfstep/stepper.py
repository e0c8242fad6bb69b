"""The state machine of one training step.

    forward          note the batch and the buffers, so that a step that fails can be explained and leaves no trace
    backward         of loss * scale / accumulate; sum the micro-batches until `accumulate` of them are in
    check            one reduction over gradients and losses
    not finite       name the guilty, put the buffers back, lower the scale, ask the recovery policy
    finite           clip, unscale and update in one factor, chunk by chunk on the fp32 truth; then the schedulers

Every call returns a StepOutcome: applied, skipped or accumulated, and why. A skipped step changes nothing but the loss
scale and the counters of skips: weights, optimizer states, buffers, schedules and averages are as before it.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from halfstep.control.controller import Decision, Observation, Recovery, RecoveryRule, decide
from halfstep.control.sensitivity import choose_plan
from halfstep.conversion import Conversion, convert, draft_conversion
from halfstep.errors import HalfstepError, ModelError, PlanError, StallWarning, TrainingError, UnsupportedError
from halfstep.machine.hardware import get_profile
from halfstep.mechanisms.gradients import find_nonfinite, measure_norm, measure_norm_slowly
from halfstep.mechanisms.loss_scale import DYNAMIC, UNSCALED, LossScale, adjust
from halfstep.mechanisms.master_weights import PARAMETERWISE, match_states
from halfstep.mechanisms.optimizer_states import NarrowStates
from halfstep.numerics.formats import find_format
from halfstep.plan import PRESETS, Plan, Rule
from halfstep.records import HardwareProfile, PlanRecord, Stall, StepOutcome
from halfstep.snapshot import Snapshot
from halfstep.window import ABOUT_DATA, NO_GRADIENT, SIXTEEN_BITS, Finding, Noting, Window, lay_out_like

FIRST_WATCHES, WATCH_EVERY = (10, 20), 500
"""Updates in which it is looked whether weights move: after the optimizer's moments have filled, and now and then."""


class _NotFiniteError(Exception):
    """Leaves an optimizer that is in the middle of evaluating a closure."""


class Stepper:
    """Trains a model under a plan, one step a call. Made by `prepare`.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> stepper = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), "32-true", accumulate=2)
        >>> [stepper.step(model(torch.ones(1, 2)).sum()).status for _ in range(2)]
        ['accumulated', 'applied']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: tuple[Optimizer, ...],
        *,
        accumulate: int,
        clip: float | None,
        schedulers: tuple[LRScheduler, ...],
        averages: tuple[AveragedModel, ...],
        release: bool,
        profile: HardwareProfile | None,
    ) -> None:
        self.model, self.optimizers, self.schedulers, self.averages = model, optimizers, schedulers, averages
        self.accumulate, self.clip = accumulate, clip
        self.applied = 0  # optimizer steps that moved the weights
        self.skipped = 0
        self.outcome: StepOutcome | None = None  # of the last call of step()
        self.plan_record: PlanRecord | None = None  # the plan in force; None until "auto" has chosen
        self.recovery_rule = RecoveryRule()
        self._recovery = Recovery()
        self._good: tuple[int, Snapshot] | None = None  # applied steps and state to roll back to
        self._profile = profile
        self._states: dict[Optimizer, NarrowStates] = {}  # of a plan with states in 8 bits
        self._stalls: tuple[str, ...] = ()  # to be said in the next outcome
        self._stalled_before: set[str] = set()
        self._warned: set[str] = set()
        self._waiting: RemovableHandle | None = None  # "auto" that has not seen a batch yet
        self._around: ExitStack | None = None  # of the `with stepper.autocast()` that is open
        self._window = Window(model, optimizers)
        self._scale, self._rule = LossScale(scale=1.0), UNSCALED
        self._incoming: dict[str, Any] = {}  # optimizer state on its way in
        self.conversion = convert(model, PRESETS["32-true"])
        self.release = release  # gradients, each as soon as it is there
        self._left_out: set[nn.Parameter] = set()  # whose gradient was not finite when it was released
        self._norms: list[float] = []  # of the gradients that were released
        self._hooks = ExitStack()
        for optimizer in optimizers:
            self._hooks.callback(optimizer.register_load_state_dict_pre_hook(self._before_load).remove)
            self._hooks.callback(optimizer.register_load_state_dict_post_hook(self._after_load).remove)
        self._hooks.enter_context(self._window.watch())
        self._window.when_loaded = self._drop_good_state

    def __repr__(self) -> str:
        plan = "auto, not chosen yet" if self._waiting else self.plan.name or "a plan of its own"
        return f"Stepper({plan}; {self.applied} applied, {self.skipped} skipped; loss scale {self.scale:g})"

    @property
    def optimizer(self) -> Optimizer:
        """The first of the optimizers, which is mostly the only one."""
        return self.optimizers[0]

    @property
    def plan(self) -> Plan:
        return self.conversion.plan

    @property
    def scale(self) -> float:
        """The factor that the next loss is multiplied by."""
        return self._scale.scale

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """What the forward pass and the loss run under."""
        outer = self._around
        with ExitStack() as stack:
            stack.enter_context(self.conversion.autocast())
            self._around = stack
            try:
                yield
            finally:
                self._around = outer

    def step(self, loss: Tensor | None = None, *, closure: Callable[[], Tensor] | None = None) -> StepOutcome:
        """Backward, then update unless this is a micro-batch of a window or a gradient is not finite.

        loss: one number with a graph, fp32 or 16 bits, the mean over its micro-batch.
        closure: for optimizers that evaluate the loss themselves: a function that runs the model and returns the loss,
            without calling backward. `step(closure=f)` for LBFGS; `step(loss, closure=f)` for those that start from
            gradients already there, as SAM does.

        Raises ModelError when the loss has no graph or is not one number, TrainingError when the recovery policy ends
        the run; the weights are those of the last applied step then.
        """
        if closure is not None:
            return self._step_by_closure(loss, closure)
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in self.optimizers):
            raise ModelError("LBFGS evaluates the loss itself; call step(closure=f), where f() returns the loss")
        if self.release:
            return self._step_released(loss)
        self._window.go_backward(loss, self.scale / self.accumulate)
        if self._window.micro < self.accumulate:
            self._window.collect()
            return self._conclude("accumulated", self.scale)
        return self._finish_window()

    def flush(self) -> StepOutcome | None:
        """Apply a window that is not full, at the end of an epoch: the mean over the micro-batches that are in.

        Returns None when there are none.
        """
        return self._finish_window() if self._window.micro else None

    def _finish_window(self) -> StepOutcome:
        if self.accumulate > 1:
            self._window.collect()
        before, gradients = self.scale, self._window.take_gradients()
        lift = before * self._window.micro / self.accumulate  # of the gradients above those of the mean
        finding = self._window.inspect(gradients, lift, self.conversion.autocast)
        if not finding.cause:
            self._keep_good_state()
            try:
                with self._at_reduced_rate():
                    self._update(gradients, self._clip(finding.norm) / lift)
                self._advance()
            except BaseException:
                self._window.clear()
                raise
        return self._settle(finding, before)

    def _release(self, optimizer: Optimizer, hooks: ExitStack) -> None:
        """Have each parameter updated in the backward pass, as soon as its gradient is there."""

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
            with self._at_reduced_rate():
                self._step_masters(optimizer, {held: gradient}, 1.0)

        for parameter in [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]:
            hooks.callback(parameter.register_post_accumulate_grad_hook(update).remove)

    def _step_released(self, loss: Tensor | None) -> StepOutcome:
        """A loss that is not finite is seen before anything moves; a gradient that is not leaves out its parameter alone."""
        self._left_out, self._norms = set(), []
        finding = self._window.inspect_loss(loss, self.conversion.autocast)
        if finding.cause:
            return self._settle(finding, 1.0)
        self._keep_good_state()
        with ExitStack() as hooks:
            for optimizer in self.optimizers:
                self._release(optimizer, hooks)
            self._window.go_backward(loss, 1.0)
        finding = Finding(norm=math.hypot(*self._norms), tensors=self._window.name_tensors(self._left_out))
        if self._norms:
            self._advance()
        elif finding.tensors:
            finding = replace(finding, cause="no gradient is finite", nonfinite=True)
        else:
            finding = replace(finding, cause=NO_GRADIENT)
        return self._settle(finding, 1.0)

    def _clip(self, norm: float) -> float:
        """The factor that clips, as torch.nn.utils.clip_grad_norm_ does."""
        return 1.0 if self.clip is None else min(1.0, self.clip / (norm + 1e-6))

    def _update(self, gradients: dict[nn.Parameter, Tensor], factor: float) -> None:
        number = self.applied + 1
        watch = number in FIRST_WATCHES or number % WATCH_EVERY == 0
        stalls: list[Stall] = []
        for optimizer in self.optimizers:
            own = [p for group in optimizer.param_groups for p in group["params"]]
            share = {p: gradients.pop(p) for p in own if p in gradients}
            if share:
                stalls += self._step_masters(optimizer, share, factor, watch=watch)
        if watch:
            self._report(stalls)

    def _step_masters(
        self, optimizer: Optimizer, gradients: dict[nn.Parameter, Tensor], factor: float, *, watch: bool = False
    ) -> tuple[Stall, ...]:
        states = self._states.get(optimizer)
        around = states.widened if states else None
        return self.conversion.masters.step(optimizer, gradients, factor, watch=watch, around=around)

    def _report(self, stalls: list[Stall]) -> None:
        """Warn once of a group that stalls twice running: once is what a warm-up does."""
        names = {f"{stall.group} {stall.storage} {stall.master}": stall for stall in stalls}
        self._stalls = tuple(str(stall) for name, stall in names.items() if name in self._stalled_before)
        self._stalled_before = set(names)
        for name, stall in names.items():
            if str(stall) in self._stalls and name not in self._warned:
                self._warned.add(name)
                warnings.warn(str(stall), StallWarning, stacklevel=5)

    def _advance(self) -> None:
        """What moves when the weights did."""
        self.applied += 1
        torch.clear_autocast_cache()  # which holds converted weights as long as a block around several steps is open
        for scheduler in self.schedulers:
            scheduler.step()
        if self.averages:
            with self.conversion.widened():
                for average in self.averages:
                    average.update_parameters(self.model)

    def _settle(self, finding: Finding, before: float) -> StepOutcome:
        """Scale, counters and recovery after a window; the step's outcome."""
        if finding.cause:
            self.skipped += 1
            self._window.put_back()
        can_fall = before > self._rule.floor and self._rule.backoff < 1.0
        failed_backward = finding.nonfinite and not finding.forward_nonfinite
        if failed_backward or not finding.cause:  # of a bad forward pass, and of no gradient, the scale is not guilty
            self._scale = adjust(self._scale, self._rule, found_nonfinite=failed_backward)
        mendable = can_fall or not finding.nonfinite
        layer = "" if finding.layer.startswith("(") else finding.layer  # the input, or the model's own code
        seen = Observation(applied=not finding.cause, cause=finding.cause, layer=layer,
                           forward_nonfinite=finding.forward_nonfinite, data_nonfinite=finding.layer in ABOUT_DATA,
                           scale_can_fall=mendable)  # fmt: skip
        self._recovery, decision = decide(self._recovery, self.recovery_rule, seen)
        self._window.clear()
        if decision.action:
            decision = self._recover(decision, finding)
        outcome = self._conclude("skipped" if finding.cause else "applied", before, finding, decision)
        if decision.action == "stop":
            raise TrainingError(
                f"training stopped at applied step {self.applied}: {decision.why}. The loss scale is {self.scale:g}; the "
                "weights are those of the last applied step. Look at the batch and the layer named, or go on from there "
                "with a lower learning rate, precision 32-true, or another recovery in the plan"
            )
        return outcome

    def _conclude(
        self, status: Any, before: float, finding: Finding | None = None, decision: Decision | None = None
    ) -> StepOutcome:
        outcome = StepOutcome(status=status, step=self.applied, scale_before=before, scale_after=self.scale)
        if finding:
            outcome = replace(outcome, cause=finding.cause, tensors=finding.tensors, gradient_norm=finding.norm,
                              layer=finding.layer, forward_nonfinite=finding.forward_nonfinite)  # fmt: skip
        if status == "applied":
            outcome, self._stalls = replace(outcome, stalls=self._stalls), ()
        if decision and decision.action:
            outcome = replace(outcome, recovery=f"{decision.action}: {decision.why}")
        self.outcome = outcome
        return outcome

    def _keep_good_state(self) -> None:
        """Before an update whose gradients are finite, now and then: the state to roll back to."""
        if self._needs_good_state():
            self._good = self.applied, self._take_snapshot()

    def _drop_good_state(self) -> None:
        self._good = None

    def _needs_good_state(self) -> bool:
        due = self._good is None or self.applied - self._good[0] >= self.recovery_rule.every
        return due and self.recovery_rule.policy == "roll-back"

    def _take_snapshot(self) -> Snapshot:
        snapshot = Snapshot(self.model, self.conversion.masters, self.optimizers, self.schedulers)
        snapshot.buffers.update(self._window.buffers)  # those in the model have seen this window's forward pass
        return snapshot

    def _recover(self, decision: Decision, finding: Finding) -> Decision:
        """Do what was decided; what cannot be done ends the run."""
        if decision.action == "back-off":
            decision = replace(
                decision, why=f"{decision.why}; learning rates are now multiplied by {self._recovery.rate:g}"
            )
        elif decision.action == "roll-back" and self._good is not None:
            applied, snapshot = self._good
            snapshot.put_back()
            decision = replace(decision, why=f"{decision.why}; from applied step {self.applied} to {applied}")
            self.applied = applied
        elif decision.action == "roll-back":
            decision = replace(decision, action="stop", why=f"{decision.why}; there is no good state to go back to")
        elif decision.action == "widen":
            try:
                layers = self._widen(finding.layer, decision.why)
                decision = replace(decision, why=f"{decision.why}; now in fp32: {', '.join(layers)}")
            except HalfstepError as error:
                decision = replace(decision, action="stop", why=f"{decision.why}; it cannot be widened: {error}")
        return decision

    def _widen(self, layer: str, why: str) -> list[str]:
        """Put a layer into fp32, and those that share its weights."""
        modules = dict(self.model.named_modules())
        if layer not in modules:
            raise PlanError(f"what failed first is '{layer}', which is no layer of its own")
        if self.conversion.table[layer].compute == "fp32":
            raise PlanError(f"'{layer}' runs in fp32 already")
        own = set(modules[layer].parameters(recurse=False))
        layers = [
            path for path, module in modules.items() if path == layer or own & set(module.parameters(recurse=False))
        ]
        rules = tuple(Rule(path=path, compute="fp32", storage="fp32", master="none", why="widened") for path in layers)
        scale = self._scale
        self._adopt(replace(self.plan, rules=(*rules, *self.plan.rules)), f"widened: {why}")
        self._scale = scale
        return layers

    @contextmanager
    def _at_reduced_rate(self) -> Iterator[None]:
        """Learning rates times what the recovery policy leaves of them; schedulers never see it."""
        if self._recovery.rate == 1.0:
            yield
            return
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups if "lr" in group]
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * self._recovery.rate
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _let_auto_choose(self, closure: Callable[[], Tensor]) -> None:
        """It does so in a forward pass, which must not be one in the middle of an update."""
        if self._waiting is not None:
            with self.autocast():
                closure()
            self._window.put_back()
            self._window.clear()

    def _step_by_closure(self, loss: Tensor | None, closure: Callable[[], Tensor]) -> StepOutcome:
        """Hand an optimizer a closure that evaluates under the plan; one bad evaluation undoes the whole step."""
        if self.accumulate > 1 or len(self.optimizers) > 1:
            raise ModelError(
                "a closure needs one optimizer and accumulate=1: it evaluates the whole loss again and again"
            )
        self._let_auto_choose(closure)
        masters, before, finding = self.conversion.masters, self.scale, Finding()
        snapshot, applied, is_due = self._take_snapshot(), self.applied, self._needs_good_state()

        def take() -> dict[nn.Parameter, Tensor]:
            """The gradients of what has just gone backward, checked, unscaled and clipped, in full precision."""
            nonlocal finding
            gradients = self._window.take_gradients()
            finding = self._window.inspect(gradients, before, self.conversion.autocast)
            self._window.clear()
            if finding.cause:
                raise _NotFiniteError
            factor = self._clip(finding.norm) / before
            return {p: (g.to(torch.float32) if p in masters else g) * factor for p, g in gradients.items()}

        def evaluate() -> float:
            self._window.clear()
            with masters.narrowed(), torch.enable_grad():
                with self.autocast():
                    value = closure()
                self._window.go_backward(value, self.scale)
                gradients = take()
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            return float(value.detach())

        try:
            if loss is not None:
                self._window.go_backward(loss, self.scale)
            first = take() if loss is not None else {}
            with ExitStack() as stack:
                for states in self._states.values():
                    stack.enter_context(states.widened(self._window.held))
                stack.enter_context(masters.widened())
                stack.enter_context(self._at_reduced_rate())
                for parameter, gradient in first.items():
                    parameter.grad = gradient
                self.optimizer.step(evaluate)
            self._advance()
            if is_due:
                self._good = applied, snapshot
        except BaseException as error:
            snapshot.put_back()
            self._window.clear()
            if not isinstance(error, _NotFiniteError):
                raise
        return self._settle(finding, before)

    def wait_for_batch(self) -> None:
        """Choose the plan when the first training batch arrives, just before the model sees it."""

        def choose(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not module.training or not torch.is_grad_enabled():
                return
            self._stop_waiting()
            profile = self._profile or get_profile(self.conversion.device_type)
            choice = choose_plan(module, args, kwargs, profile=profile)
            self._adopt(choice.plan, choice.why, choice.seconds)
            if self._around is not None:
                self._around.enter_context(self.conversion.autocast())

        self._waiting = self.model.register_forward_pre_hook(choose, with_kwargs=True)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.remove()
        self._waiting = None

    def adopt(self, plan: Plan, why: str = "") -> None:
        """Put another plan in force; weights, optimizer state and the gradients of an open window go on from fp32.

        Raises what `convert` raises; the plan before stays in force then.
        """
        window, before = self._window.state_dict(), self.scale
        self._stop_waiting()
        try:
            self._adopt(plan, why)
        finally:
            self._window.load_state_dict(window, self.scale / before)

    def _adopt(self, plan: Plan, why: str, seconds: float = 0.0) -> None:
        before, noise = self.conversion.plan, self.conversion.masters.state_dict()
        self.conversion.undo()
        try:
            drafted = draft_conversion(self.model, plan)
            self._require_eps(drafted)
            if self.release and plan.loss_scale == "dynamic":
                raise UnsupportedError(
                    "release=True updates weights before an overflow is known; use another loss_scale"
                )
            drafted.apply()
        except Exception:
            self.conversion = convert(self.model, before)
            self.conversion.masters.load_state_dict(noise)
            raise
        self.conversion = drafted
        self._window.autocast_weights = drafted.list_autocast_weights()
        self.conversion.masters.load_state_dict(noise)
        self._narrow_states(False)
        self._match_states()
        self._narrow_states(plan.states == "8-bit")
        self._good = None
        self.recovery_rule = replace(self.recovery_rule, policy=plan.recovery)  # type: ignore[arg-type]  # Plan has checked it
        self._rule = DYNAMIC if plan.loss_scale == "dynamic" else UNSCALED
        self._scale = LossScale() if plan.loss_scale == "dynamic" else LossScale(scale=1.0)
        self.plan_record = PlanRecord(
            step=self.applied, plan=str(plan), layers=self.conversion.describe(), why=why, seconds=seconds
        )

    def _narrow_states(self, narrow: bool) -> None:
        for states in self._states.values():
            states.undo()
        self._states = {optimizer: NarrowStates(optimizer) for optimizer in self.optimizers} if narrow else {}

    def _match_states(self) -> None:
        """Optimizer states follow the precision that the optimizer sees: fp32 where a truth is kept."""
        for optimizer in self.optimizers:
            for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
                seen = torch.float32 if parameter in self.conversion.masters else parameter.dtype
                match_states(optimizer, parameter, seen)

    def _require_eps(self, drafted: Conversion) -> None:
        """fp16(1e-8) is 0: an optimizer that keeps fp16 states with it divides 0 by 0."""
        fp16 = find_format("fp16")
        narrow = {p for p, s in drafted.storage.items() if s.storage == "fp16" and s.master == "none"}
        for optimizer, group in ((o, group) for o in self.optimizers for group in o.param_groups):
            eps = group.get("eps")
            if eps is not None and eps < fp16.smallest_subnormal and narrow.intersection(group["params"]):
                raise UnsupportedError(
                    f"{type(optimizer).__name__} has eps={eps:g}, which is 0 in fp16, and the plan keeps no fp32 "
                    f"master; give eps >= {fp16.smallest_subnormal:.2g} (1e-4 is usual), or master=fp32 in the plan"
                )

    def restore(self) -> nn.Module:
        """Undo the conversion and give the model back in fp32; the optimizer goes on with it as a plain one."""
        self._stop_waiting()
        self._hooks.close()
        self._window.clear()
        self._good = None
        self.conversion.undo()
        self.conversion = convert(self.model, PRESETS["32-true"])
        self._narrow_states(False)
        self._match_states()
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on and that model, optimizer and schedulers do not hold themselves.

        Inside an accumulation window it holds the gradients so far, by the optimizers' order of parameters, and the
        buffers from before the window.
        """
        return {
            "plan": str(self.plan) if self._waiting is None else None,
            "loss_scale": asdict(self._scale),
            "recovery": asdict(self._recovery),
            "masters": self.conversion.masters.state_dict(),
            "applied": self.applied,
            "skipped": self.skipped,
            "micro": self._window.micro,
            "window": self._window.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a saved state in force, its plan included.

        Raises PlanError when the state was saved inside an accumulation window and does not hold its gradients, or
        the window is longer than this stepper's.
        """
        window = state.get("window")
        if state["micro"] and (window is None or state["micro"] >= self.accumulate):
            raise PlanError(
                f"the state was saved after {state['micro']} micro-batches of a window, and "
                + (
                    f"this stepper has accumulate={self.accumulate}; give the same"
                    if window
                    else "without their gradients"
                )
            )
        self._window.clear()
        self._good = None
        if state["plan"] is not None and state["plan"] != str(self.plan):
            self.adopt(Plan.parse(state["plan"]), "restored")
        if state["plan"] is not None:
            self._stop_waiting()
        self._scale = LossScale(**state["loss_scale"])
        self._recovery = Recovery(**state.get("recovery", {}))
        self.conversion.masters.load_state_dict(state.get("masters", self.conversion.masters.state_dict()))
        self.applied, self.skipped = state["applied"], state["skipped"]
        self._window.load_state_dict(window)

    def _before_load(self, _optimizer: Optimizer, state: dict[str, Any]) -> None:
        self._incoming = state

    def _after_load(self, optimizer: Optimizer) -> None:
        """Optimizer.load_state_dict has cast states to the 16 bits of their parameter, and left them the strides they were
        saved with: take them again, as the optimizer sees the parameter."""
        for saved, group in zip(self._incoming["param_groups"], optimizer.param_groups, strict=True):
            for index, parameter in zip(saved["params"], group["params"], strict=True):
                seen = torch.float32 if parameter in self.conversion.masters else parameter.dtype
                for key, value in self._incoming["state"].get(index, {}).items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step":
                        dtype = seen if value.is_floating_point() else value.dtype
                        optimizer.state[parameter][key] = lay_out_like(parameter, value, dtype)
        self._incoming = {}
        if optimizer in self._states:
            self._states[optimizer].narrow(optimizer.state)


def prepare(  # noqa: PLR0913  (one entry for everything about a step)
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    plan: Plan | str = "auto",
    *,
    accumulate: int = 1,
    clip: float | None = None,
    schedulers: LRScheduler | Iterable[LRScheduler] = (),
    averages: AveragedModel | Iterable[AveragedModel] = (),
    release: bool = False,
    profile: HardwareProfile | None = None,
) -> Stepper:
    """Make a model and its optimizer train under a plan.

    Args:
        model: an fp32 module.
        optimizer: any torch optimizer over its parameters, or several that share them out.
        plan: a precision name ("auto", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "32-true"), a Plan, its text, or the
            path of a plan file (.toml, .json). "auto" chooses when the first batch arrives, by timing the model on it.
        accumulate: micro-batches in one update; each loss is divided by it.
        clip: largest 2-norm of all gradients together, after unscaling.
        schedulers: stepped once for every applied step.
        averages: torch.optim.swa_utils.AveragedModel of the model (EMA, SWA), made before this call; updated from the full
            precision of the weights after every applied step.
        release: update each parameter in the backward pass, as soon as its gradient is there, and free the gradient: all
            gradients never exist together. Without accumulation, clipping or a dynamic loss scale, and only for
            optimizers that treat parameters one by one. A gradient that is not finite leaves out its own parameter.
        profile: the machine as measured; "auto" reads the cached one, or probes for three seconds.

    Examples:
        >>> model = nn.Linear(4, 1)
        >>> stepper = prepare(model, torch.optim.AdamW(model.parameters()), "bf16-mixed")
        >>> with stepper.autocast():
        ...     loss = stepper.model(torch.ones(2, 4)).square().mean()
        >>> stepper.step(loss).status
        'applied'

    Raises ModelError when there is nothing to train, PlanError, FormatError or UnsupportedError for the plan.
    """
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer) if _is_many(optimizer) else ()
    _require_trainable(model, optimizers, optimizer)
    if not isinstance(accumulate, int) or accumulate < 1 or (clip is not None and not clip > 0):
        raise ModelError(f"accumulate must be at least 1 and clip above 0; got accumulate={accumulate}, clip={clip}")
    if release and (accumulate > 1 or clip is not None or any(type(o) not in PARAMETERWISE for o in optimizers)):
        raise ModelError(
            "release=True needs accumulate=1, no clip, and optimizers that treat parameters one by one "
            f"({', '.join(sorted(kind.__name__ for kind in PARAMETERWISE))})"
        )
    chosen = [schedulers] if isinstance(schedulers, LRScheduler) else list(schedulers)
    if any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in chosen):
        raise ModelError("ReduceLROnPlateau needs a metric; leave it out and step it yourself after each evaluation")
    means: tuple[AveragedModel, ...] = (averages,) if isinstance(averages, AveragedModel) else tuple(averages)
    if any(p.dtype in SIXTEEN_BITS for mean in means for p in mean.parameters()):
        raise ModelError(
            "an AveragedModel has 16-bit weights: it was made from a converted model; make it before prepare()"
        )
    stepper = Stepper(
        model,
        optimizers,
        accumulate=accumulate,
        clip=clip,
        schedulers=tuple(chosen),
        averages=means,
        release=release,
        profile=profile,
    )
    try:
        if plan == "auto":
            stepper.wait_for_batch()
        else:
            stepper.adopt(read_plan(plan))
    except Exception:
        stepper.restore()
        raise
    return stepper


def _require_trainable(model: nn.Module, optimizers: tuple[Optimizer, ...], given: object) -> None:
    """Raises ModelError unless the optimizers move some of the model's parameters, each by one of them."""
    if not isinstance(model, nn.Module) or not all(isinstance(o, Optimizer) for o in optimizers) or not optimizers:
        raise ModelError(
            f"prepare takes a module and an optimizer, or several; got {type(model).__name__} and {type(given).__name__}"
        )
    if any(isinstance(hook, Noting) and hook.window for hook in model._forward_pre_hooks.values()):
        raise ModelError("the model is prepared already; go on with its stepper, or call restore() on that first")
    trainable = {p for p in model.parameters() if p.requires_grad}
    if not trainable:
        raise ModelError(f"{type(model).__name__} has no trainable parameters; set requires_grad on some of them")
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    if not trainable & set(held):
        raise ModelError(
            f"the optimizer holds none of the {len(trainable)} trainable parameters of {type(model).__name__}; "
            "make it from model.parameters()"
        )
    if len(set(held)) < len(held):
        raise ModelError("two optimizers hold the same parameter; give every parameter to one of them")


def _is_many(optimizer: object) -> bool:
    return isinstance(optimizer, Iterable) and not isinstance(optimizer, nn.Module | Tensor | type)


def read_plan(plan: Plan | str) -> Plan:
    """A plan from whatever names one: a Plan, a preset's name, a plan's text, or a plan file."""
    from pathlib import Path

    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str):
        raise PlanError(f"a plan is a Plan, the name of a precision, or a path; got {plan!r:.60}")
    if plan.endswith((".toml", ".json", ".plan")):
        return Plan.load(Path(plan))
    return Plan.parse(plan)
