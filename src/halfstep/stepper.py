"""The state machine of one training step.

    forward          note the batch and the buffers, so that a step that fails can be explained and leaves no trace
    backward         of loss * scale / accumulate; sum the micro-batches until `accumulate` of them are in
    check            one reduction over gradients and losses; what one process finds holds for all that train together
    not finite       name the guilty, put the buffers back, lower the scale, ask the recovery policy
    finite           clip, unscale and update in one factor, chunk by chunk on the fp32 truth; then the schedulers

Every call returns a StepOutcome: applied, skipped or accumulated, and why. A skipped step changes nothing but the loss
scale and the counters of skips: weights, optimizer states, buffers, schedules and averages are as before it.

`window` collects and checks; the room `stepping` holds the rest: the optimizers as one, closures, gradient release, the plan
in force, what is kept against steps that go on failing, and what `prepare` refuses.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from halfstep.control.controller import Decision, Recovery, RecoveryRule, find_policy
from halfstep.control.sensitivity import Choice
from halfstep.conversion import Conversion
from halfstep.distributed import Ranks
from halfstep.errors import CheckpointError, HalfstepError, ModelError, PlanError, TrainingError
from halfstep.mechanisms.functions import FAST, get_routes, put_back_routes
from halfstep.mechanisms.loss_scale import DYNAMIC, UNSCALED, LossScale, adjust
from halfstep.mechanisms.operators import forget_casts
from halfstep.numerics.kernels import list_commands
from halfstep.plan import AUTO, PRESETS, Plan
from halfstep.records import HardwareProfile, PlanRecord, StepOutcome
from halfstep.snapshot import Snapshot
from halfstep.stepping.agreement import agree_on_finding
from halfstep.stepping.closures import ClosureStep
from halfstep.stepping.copies import guard_copies
from halfstep.stepping.gradient_release import Release
from halfstep.stepping.optimizers import Optimizers, list_unheld
from halfstep.stepping.options import (
    Options,
    read_saved,
    read_states,
    require_alone,
    require_possible,
    require_several,
    require_stand_ins,
    require_trainable,
    require_whole,
    take_several,
    warn_of_unheld,
)
from halfstep.stepping.plan_in_force import PlanInForce
from halfstep.stepping.plan_in_force import read_plan as read_plan
from halfstep.stepping.rescue import Rescue, widen_layer
from halfstep.stepping.stalls import StallReports
from halfstep.window import Finding, Window


class Stepper:
    """Trains a model under a plan, one step a call. Made by `prepare`.

    Examples:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> stepper = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), "32-true", accumulate=2)
        >>> [stepper.step(model(torch.ones(1, 2)).sum()).status for _ in range(2)]
        ['accumulated', 'applied']
    """

    def __init__(self, model: nn.Module, optimizers: tuple[Optimizer, ...], options: Options) -> None:
        self.model, self.optimizers, self.options = model, optimizers, options
        self.accumulate, self.schedulers = options.accumulate, options.schedulers
        self.applied = 0  # optimizer steps that moved the weights
        self.skipped = 0
        self.outcome: StepOutcome | None = None  # of the last call of step()
        self.plan_record: PlanRecord | None = None  # the plan in force; None until "auto" has chosen
        self.chosen_for = ""  # text of the plan with rest=auto that was given; "" where nothing was left open
        self._is_first = True  # whether no step has been made under the plan in force
        self._around: ExitStack | None = None  # of the `with stepper.autocast()` that is open
        self._scale, self._rule = LossScale(scale=1.0), UNSCALED
        self._optimizers = Optimizers(optimizers)
        self._in_force = PlanInForce(model, self._optimizers, options)
        self._rescue, self._stalls = Rescue(), StallReports()
        self._window = Window(model, optimizers)
        self._window.clips = options.clip is not None
        self._window.when_loaded = self._rescue.forget_state
        self._hooks = ExitStack()
        self._hooks.callback(self._optimizers.close)
        self._hooks.enter_context(self._window.watch())
        self._hooks.enter_context(guard_copies(model, lambda: self.conversion.read_wide()))

    def __repr__(self) -> str:
        plan = self.plan.name or "a plan of its own"
        if self._in_force.is_waiting:
            budget = self._in_force.budget
            plan = f"{plan}, saved_budget={budget} not met yet" if budget else "auto, not chosen yet"
        return f"Stepper({plan}; {self.applied} applied, {self.skipped} skipped; loss scale {self.scale:g})"

    @property
    def optimizer(self) -> Optimizer:
        """The first of the optimizers, which is mostly the only one."""
        return self.optimizers[0]

    @property
    def conversion(self) -> Conversion:
        """What the plan in force has done to the model."""
        return self._in_force.conversion

    @property
    def plan(self) -> Plan:
        return self.conversion.plan

    @property
    def scale(self) -> float:
        """The factor that the next loss is multiplied by."""
        return self._scale.scale

    @property
    def recovery_rule(self) -> RecoveryRule:
        """The numbers of the recovery policy; may be set."""
        return self._rescue.rule

    @recovery_rule.setter
    def recovery_rule(self, rule: RecoveryRule) -> None:
        self._rescue.rule = rule

    @property
    def ranks(self) -> Ranks:
        """The processes that this one takes its steps with."""
        return self.options.find_ranks()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """What the forward pass and the loss run under."""
        outer = self._around
        with ExitStack() as stack:
            self._open_autocast(stack)
            self._around = stack
            try:
                yield
            finally:
                self._around = outer

    def _open_autocast(self, stack: ExitStack) -> None:
        if self.conversion.keeper is not None:  # the same noise whatever was skipped or evaluated before
            self.conversion.keeper.passes = self.applied * self.accumulate + self._window.micro
        stack.enter_context(self.conversion.autocast())

    def step(self, loss: Tensor | None = None, *, closure: Callable[[], Tensor] | None = None) -> StepOutcome:
        """Backward, then update unless this is a micro-batch of a window or a gradient is not finite.

        loss: one number with a graph, fp32 or 16 bits, the mean over its micro-batch.
        closure: for optimizers that evaluate the loss themselves: a function that runs the model and returns the loss,
            without calling backward. `step(closure=f)` for LBFGS; `step(loss, closure=f)` for those that start from
            gradients already there, as SAM does.

        Raises ModelError when the loss has no graph or is not one number, and when several processes have different
        gradients; TrainingError when the recovery policy ends the run; the weights are those of the last applied step then.
        """
        if closure is not None:
            return self._step_by_closure(loss, closure)
        if any(isinstance(optimizer, LBFGS) for optimizer in self.optimizers):
            raise ModelError("LBFGS evaluates the loss itself; call step(closure=f), where f() returns the loss")
        self._in_force.require_met_budget()
        self._note_first_step()
        if self.options.release:
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
        with self._window.dropped_on_error():
            finding = self._agree(self._window.inspect(gradients, lift, self.conversion.autocast))
            if not finding.cause:
                if self.ranks.size > 1:
                    self.conversion.histories.agree(self.ranks.maximize)
                self._rescue.keep_if_due(self.applied, self._take_snapshot)
        if not finding.cause:
            watch = self._stalls.is_due(self.applied + 1)
            try:
                with self._optimizers.at_rate(self._rescue.rate):
                    stalls = self._optimizers.step(gradients, self._clip(finding.norm) / lift, watch=watch)
                if watch:
                    self._stalls.note(stalls, stacklevel=4)
                self._advance()
            except BaseException:
                self._window.clear()
                raise
        return self._settle(finding, before)

    def _step_released(self, loss: Tensor | None) -> StepOutcome:
        require_alone(self.ranks)
        with self._window.dropped_on_error():
            finding = self._window.inspect_loss(loss, self.conversion.autocast)
            if not finding.cause:
                self._rescue.keep_if_due(self.applied, self._take_snapshot)
        if not finding.cause:
            with self._optimizers.at_rate(self._rescue.rate):
                finding = Release(self._window, self._optimizers).go_backward(loss)
            if not finding.cause:
                self._advance()
        return self._settle(finding, 1.0)

    def _step_by_closure(self, loss: Tensor | None, closure: Callable[[], Tensor]) -> StepOutcome:
        """One bad evaluation undoes the whole step."""
        require_whole(self.options, self.optimizers)
        self._let_auto_choose(closure)
        self._in_force.require_met_budget()
        snapshot, before, is_due = self._take_snapshot(), self.scale, self._rescue.needs_state(self.applied)
        step = ClosureStep(
            window=self._window, optimizers=self._optimizers, masters=self.conversion.masters, autocast=self.autocast,
            scale=before, clip=self._clip, agree=partial(self._agree, closure=True), average=self.ranks.average,
        )  # fmt: skip
        try:
            with self._optimizers.at_rate(self._rescue.rate):
                finding = step.take(loss, closure)
            self._note_first_step()
            if not finding.cause:
                if is_due:
                    self._rescue.keep_state(self.applied, snapshot)
                self._advance()
        except BaseException:
            snapshot.put_back()
            self._forget_casts()
            self._window.clear()
            raise
        if finding.cause:
            snapshot.put_back()
            self._forget_casts()
            self._window.clear()
        return self._settle(finding, before)

    def _agree(self, finding: Finding, *, closure: bool = False) -> Finding:
        """What this process found -> what all found that train together."""
        if self._window.is_wrapped and len(self.conversion.masters):
            require_stand_ins(self.optimizers, closure=closure)
        return agree_on_finding(finding, self.ranks, next(self.model.parameters()).device)

    def _clip(self, norm: float) -> float:
        """The factor that clips, as torch.nn.utils.clip_grad_norm_ does."""
        return 1.0 if self.options.clip is None else min(1.0, self.options.clip / (norm + 1e-6))

    def _advance(self) -> None:
        """What moves when the weights did."""
        self.applied += 1
        self._forget_casts()
        for scheduler in self.schedulers:
            scheduler.step()
        if self.options.averages:
            with self.conversion.shown_wide():
                for average in self.options.averages:
                    average.update_parameters(self.model)

    def _forget_casts(self) -> None:
        """Converted weights are held as long as a block around several steps is open."""
        forget_casts()
        self.conversion.quantized.clear()

    def _settle(self, finding: Finding, before: float) -> StepOutcome:
        """Scale, counters and recovery after a window; the step's outcome."""
        if finding.cause:
            self.skipped += 1
            self._window.put_back()
        can_fall = before > self._rule.floor and self._rule.backoff < 1.0
        failed_backward = finding.nonfinite and not finding.forward_nonfinite
        if failed_backward or not finding.cause:  # of a bad forward pass, and of no gradient, the scale is not guilty
            self._scale = adjust(self._scale, self._rule, found_nonfinite=failed_backward)
        decision = self._rescue.judge(finding, scale_can_fall=can_fall)
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
        self,
        status: Literal["applied", "skipped", "accumulated"],
        before: float,
        finding: Finding | None = None,
        decision: Decision | None = None,
    ) -> StepOutcome:
        outcome = StepOutcome(status=status, step=self.applied, scale_before=before, scale_after=self.scale)
        if finding:
            outcome = replace(outcome, cause=finding.cause, tensors=finding.tensors, gradient_norm=finding.norm,
                              layer=finding.layer, forward_nonfinite=finding.forward_nonfinite)  # fmt: skip
        if status == "applied":
            outcome = replace(outcome, stalls=self._stalls.take())
        if decision and decision.action:
            outcome = replace(outcome, recovery=f"{decision.action}: {decision.why}")
        self.outcome = outcome
        return outcome

    def _take_snapshot(self) -> Snapshot:
        snapshot = Snapshot(self.model, self.conversion.masters, self.optimizers, self.schedulers)
        snapshot.buffers.update(self._window.buffers)  # those in the model have seen this window's forward pass
        histories = self.conversion.histories
        snapshot.others.append(partial(histories.put_back, histories.copy() | self._window.amaxes))
        return snapshot

    def _recover(self, decision: Decision, finding: Finding) -> Decision:
        """Do what was decided; what cannot be done ends the run."""
        why, rate = decision.why, f"learning rates are now multiplied by {self._rescue.rate:g}"
        match decision.action:
            case "back-off":
                why += f"; {rate}"
            case "roll-back":
                applied = self._rescue.roll_back()
                self._forget_casts()
                if applied is None:
                    return Decision(action="stop", why=f"{why}; there is no good state to go back to")
                why += f"; {rate}; from applied step {self.applied} to {applied}"
                self.applied = applied
            case "widen":
                try:
                    why += f"; now in fp32: {', '.join(self._widen(finding.layer, why))}"
                except HalfstepError as error:
                    return Decision(action="stop", why=f"{why}; it cannot be widened: {error}")
        return replace(decision, why=why)

    def _widen(self, layer: str, why: str) -> list[str]:
        """Put a layer into fp32, and those that share its weights."""
        rules, scale = widen_layer(self.model, self.conversion, layer), self._scale
        self._adopt(replace(self.plan, rules=(*rules, *self.plan.rules)), f"widened: {why}")
        self._scale = scale
        return [rule.path for rule in rules]

    def wait_for_batch(self, budget: str = "", given: Plan = AUTO) -> None:
        """Choose the plan when the first training batch arrives, just before the model sees it.

        budget: choose nothing but the formats of saved activations, so that they fit into it.
        given: the plan whose rest is chosen.
        """

        def take(choice: Choice) -> None:
            self._window.forget_passes()  # of trials, which came through the model too
            window, before, plan, record = self._window.state_dict(), self.scale, self.plan, self.plan_record
            try:
                self._adopt(choice.plan, choice.why, choice.seconds)
            except BaseException:  # it is chosen again when the next batch arrives, from here
                self._adopt(plan, "")
                self.plan_record = record
                raise
            if window is not None:
                self._window.load_state_dict(window, self.scale / before)
            if self._around is not None:
                self._open_autocast(self._around)

        if not budget:
            self._in_force.require_possible(given)
            self.chosen_for = str(given)
        self._in_force.wait_for_batch(take, budget, given)

    def _let_auto_choose(self, closure: Callable[[], Tensor]) -> None:
        """It does so in a forward pass, which must not be one in the middle of an update."""
        if self._in_force.is_waiting:
            with self.autocast():
                closure()
            self._window.put_back()
            self._window.clear()

    def adopt(self, plan: Plan, why: str = "") -> None:
        """Put another plan in force; weights, optimizer state and the gradients of an open window go on from fp32.

        A plan with rest=auto is chosen when the next batch arrives, and until then all is fp32.

        Raises what `convert` raises; the plan before stays in force then.
        """
        if plan.rest == "auto":
            self._in_force.require_possible(plan)
        window, before = self._window.state_dict(), self.scale
        try:
            self._adopt(PRESETS["32-true"] if plan.rest == "auto" else plan, why)
        finally:
            self._window.load_state_dict(window, self.scale / before)
        self.chosen_for = ""
        if plan.rest == "auto":
            self.wait_for_batch(given=plan)

    def _adopt(self, plan: Plan, why: str, seconds: float = 0.0) -> None:
        budget = plan.saved_budget
        try:
            self._in_force.adopt(plan)
        finally:  # a plan that stays in force when another is refused has a conversion of its own too
            self._window.histories = self.conversion.histories
            self._window.autocast_weights = self.conversion.list_autocast_weights()
            self._window.stand_by = self.conversion.stand_by
            self._rescue.forget_state()
        plan = self.plan
        self._rescue.rule = replace(self._rescue.rule, policy=find_policy(plan.recovery))
        self._rule = DYNAMIC if plan.loss_scale == "dynamic" else UNSCALED
        self._scale = LossScale() if plan.loss_scale == "dynamic" else LossScale(scale=1.0)
        record = self.conversion.make_record(step=self.applied, why=why, seconds=seconds)
        self.plan_record = replace(
            record, updates=self._optimizers.describe_updates(), unheld=list_unheld(self.model, self.optimizers)
        )
        self._note_kernels()
        self._is_first = True
        if budget:
            self.wait_for_batch(budget)

    def _note_first_step(self) -> None:
        """The forward pass has called what the model and its loss call."""
        if self._is_first:
            self._note_kernels()
            self._is_first = False

    def _note_kernels(self) -> None:
        """Say in the record which fast functions were called, and what compiled all that is native."""
        if self.plan_record is not None:
            called = (k for function in self.conversion.called_functions if (k := FAST[function].kernels))
            found = replace(
                self.plan_record, functions=self.conversion.describe_functions(),
                kernels=list_commands((*called, *self._optimizers.list_kernels())),
            )  # fmt: skip
            if found != self.plan_record:
                self.plan_record = found

    def restore(self) -> nn.Module:
        """Undo the conversion and give the model back in fp32; the optimizer goes on with it as a plain one."""
        self._hooks.close()
        self._window.clear()
        self._rescue.forget_state()
        self._in_force.end()
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on and that model, optimizer and schedulers do not hold themselves.

        Inside an accumulation window it holds the gradients so far, by the optimizers' order of parameters, and the
        buffers from before the window.
        """
        return {
            "plan": None if self._in_force.is_waiting else str(self.plan),
            "chosen_for": self.chosen_for,
            "loss_scale": asdict(self._scale),
            "recovery": asdict(self._rescue.memory),
            "masters": self.conversion.masters.state_dict(),
            "amaxes": self.conversion.histories.copy(),
            "routes": get_routes() if self.plan.functions == "fast" else [],
            "functions": [function.__name__ for function in self.conversion.called_functions],
            "applied": self.applied,
            "skipped": self.skipped,
            "micro": self._window.micro,
            "window": self._window.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a saved state in force, its plan included.

        Raises PlanError when the state was saved inside an accumulation window and does not hold its gradients, or
        the window is longer than this stepper's; CheckpointError when it is no state of a stepper.
        """
        needed = ("plan", "loss_scale", "applied", "skipped", "micro")
        missing = [key for key in needed if key not in state]
        if missing:
            raise CheckpointError(
                f"this is no state of a stepper, it lacks {', '.join(missing)}; give what stepper.state_dict() returned"
            )
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
        self._rescue.forget_state()
        if state["plan"] is not None and state["plan"] != str(self.plan):
            self.adopt(Plan.parse(state["plan"]), "restored")
        if state["plan"] is not None:
            self._in_force.stop_waiting()
            self.chosen_for = state.get("chosen_for", str(AUTO) if self.plan.name == AUTO.name else "")
        self._scale = LossScale(**state["loss_scale"])
        self._rescue.memory = Recovery(**state.get("recovery", {}))
        self.conversion.masters.load_state_dict(state.get("masters", self.conversion.masters.state_dict()))
        self.conversion.histories.put_back(state.get("amaxes", {}))
        put_back_routes(state.get("routes", []))
        if state.get("functions"):
            self.conversion.recall_functions(state["functions"])
            self._note_kernels()
            self._is_first = False
        self.conversion.quantized.clear()
        self.applied, self.skipped = state["applied"], state["skipped"]
        self._window.load_state_dict(window)


def prepare(  # noqa: PLR0913  (one entry for everything about a step)
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    plan: Plan | str | Path = "auto",
    *,
    accumulate: int = 1,
    clip: float | None = None,
    schedulers: LRScheduler | Iterable[LRScheduler] = (),
    averages: AveragedModel | Iterable[AveragedModel] = (),
    release: bool = False,
    profile: HardwareProfile | None = None,
    recovery: str | None = None,
    saved: str | None = None,
    states: str | None = None,
    ranks: Ranks | None = None,
) -> Stepper:
    """Make a model and its optimizer train under a plan.

    Args:
        model: an fp32 module. To train it in several processes, wrap `stepper.model` afterwards.
        optimizer: any torch optimizer over its parameters, or several that share them out.
        plan: a precision name ("auto", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "32-true"), a Plan, its text, or the
            path of a plan file (.toml, .json). "auto" chooses when the first batch arrives, by timing the model on it; so
            does a plan with `rest="auto"`, whatever its rules leave open; a plan with `saved_budget` chooses formats for
            saved activations then.
        accumulate: micro-batches in one update; each loss is divided by it.
        clip: largest 2-norm of all gradients together, after unscaling.
        schedulers: stepped once for every applied step.
        averages: torch.optim.swa_utils.AveragedModel of the model (EMA, SWA), made before this call; updated from the full
            precision of the weights after every applied step.
        release: update each parameter in the backward pass, as soon as its gradient is there, and free the gradient: all
            gradients never exist together. Without accumulation, clipping or a dynamic loss scale, and only for
            optimizers that treat parameters one by one. A gradient that is not finite leaves out its own parameter.
        profile: the machine as measured; "auto" reads the cached one, or probes for three seconds.
        recovery: what is done about failures that come back, in place of what the plan says: "skip", "back-off", "roll-back",
            "widen" or "stop", as `control.controller` defines them.
        saved: format in which activations wait for the backward pass where no rule of the plan says so, also of the one that
            "auto" finds: "bf16", "int8" or "int4".
        states: how the optimizers' states are kept between steps, in place of what the plan says: "fp32" or "8-bit", a quarter of
            their memory. With `saved` and `release` the smallest process at little cost in time.
        ranks: the processes that train this model together, which agree on every step: all of them where torch.distributed
            is initialised, a `distributed.Group(process_group)`, or `distributed.Alone()`.

    Examples:
        >>> import torch
        >>> model = nn.Linear(4, 1)
        >>> stepper = prepare(model, torch.optim.AdamW(model.parameters()), "bf16-mixed")
        >>> with stepper.autocast():
        ...     loss = stepper.model(torch.ones(2, 4)).square().mean()
        >>> stepper.step(loss).status
        'applied'

    Warns of parameters that require gradients and that no optimizer holds: they are not trained.

    Raises ModelError when there is nothing to train, PlanError, FormatError or UnsupportedError for the plan.
    """
    optimizers: tuple[Any, ...] = take_several(optimizer, Optimizer)
    require_trainable(model, optimizers, optimizer)
    options = Options(
        accumulate=accumulate, clip=clip, release=release, profile=profile, ranks=ranks,
        schedulers=require_several(schedulers, LRScheduler, "schedulers", does="step"),
        averages=require_several(averages, AveragedModel, "averages", does="update_parameters"),
        recovery=None if recovery is None else find_policy(recovery), saved=None if saved is None else read_saved(saved),
        states=None if states is None else read_states(states),
    )  # fmt: skip
    require_possible(options, model, optimizers)
    warn_of_unheld(model, optimizers)
    stepper = Stepper(model, optimizers, options)
    try:
        plan = read_plan(plan)
        if plan.rest == "auto":
            stepper.wait_for_batch(given=plan)
        else:
            stepper.adopt(plan)
    except Exception:
        stepper.restore()
        raise
    return stepper
