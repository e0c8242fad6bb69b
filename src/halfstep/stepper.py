"""The state machine of one training step.

    backward of loss * scale / accumulate                   every call
    sum the micro-batches                                    until `accumulate` of them are in
    norm of all gradients / scale                            one pass; not finite -> skip, name the tensors, scale down
    clip, unscale and update in one factor                   chunk by chunk on the fp32 truth
    schedulers, scale up                                     only when the weights moved

Every call returns a StepOutcome: applied, skipped or accumulated, and why.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from halfstep.control.sensitivity import choose_plan
from halfstep.conversion import Conversion, convert, draft_conversion
from halfstep.errors import ModelError, PlanError, UnsupportedError
from halfstep.machine.hardware import get_profile
from halfstep.mechanisms.loss_scale import DYNAMIC, UNSCALED, LossScale, adjust
from halfstep.mechanisms.master_weights import match_states
from halfstep.numerics.formats import find_format
from halfstep.plan import PRESETS, Plan
from halfstep.records import HardwareProfile, PlanRecord, StepOutcome

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


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
        optimizer: Optimizer,
        *,
        accumulate: int,
        clip: float | None,
        schedulers: tuple[LRScheduler, ...],
        profile: HardwareProfile | None,
    ) -> None:
        self.model, self.optimizer, self.schedulers = model, optimizer, schedulers
        self.accumulate, self.clip = accumulate, clip
        self.applied = 0  # optimizer steps that moved the weights
        self.skipped = 0
        self.plan_record: PlanRecord | None = None  # the plan in force; None until "auto" has chosen
        self._profile = profile
        self._waiting: RemovableHandle | None = None  # "auto" that has not seen a batch yet
        self._around: ExitStack | None = None  # of the `with stepper.autocast()` that is open
        self._micro = 0  # micro-batches in the window so far
        self._bad_loss = ""
        self._sums: dict[nn.Parameter, Tensor] = {}  # fp32 sums of 16-bit gradients over the window
        self._names = {p: name for name, p in model.named_parameters()}
        self._scale, self._rule = LossScale(scale=1.0), UNSCALED
        self._incoming: dict[str, Any] = {}  # optimizer state on its way in
        self.conversion = convert(model, PRESETS["32-true"])
        self._hooks = ExitStack()
        self._hooks.callback(optimizer.register_load_state_dict_pre_hook(self._before_load).remove)
        self._hooks.callback(optimizer.register_load_state_dict_post_hook(self._after_load).remove)

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

    def step(self, loss: Tensor) -> StepOutcome:
        """Backward, then update unless this is a micro-batch of a window or a gradient is not finite.

        loss: one number with a graph, fp32 or 16 bits, the mean over its micro-batch.

        Raises ModelError when the loss has no graph or is not one number.
        """
        if loss.numel() != 1 or not loss.requires_grad:
            raise ModelError(
                f"step() takes the loss: one number that depends on the weights; got shape {tuple(loss.shape)}, "
                f"requires_grad={loss.requires_grad}; reduce it with .mean() and do not detach it"
            )
        (loss.to(torch.float32) * (self.scale / self.accumulate)).backward()
        if not math.isfinite(value := loss.item()):
            self._bad_loss = f"the loss is {value}"
        self._micro += 1
        if self._micro < self.accumulate:
            self._collect()
            return StepOutcome(status="accumulated", step=self.applied, scale_before=self.scale, scale_after=self.scale)
        return self._finish_window()

    def _collect(self) -> None:
        """Move 16-bit gradients of a micro-batch into fp32 sums: adding in bf16 loses what is 256 times smaller."""
        for parameter in self._find_held():
            if parameter.grad is not None and (parameter in self._sums or parameter.grad.dtype in SIXTEEN_BITS):
                gradient = parameter.grad.to(torch.float32)
                self._sums[parameter] = self._sums[parameter].add_(gradient) if parameter in self._sums else gradient
                parameter.grad = None

    def _find_held(self) -> list[nn.Parameter]:
        """The parameters that the optimizer moves, in its order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _finish_window(self) -> StepOutcome:
        if self.accumulate > 1:
            self._collect()
        found = {p: self._sums.get(p, p.grad) for p in self._find_held()}
        gradients = {p: gradient for p, gradient in found.items() if gradient is not None}
        before, cause = self.scale, self._bad_loss
        tensors: tuple[str, ...] = ()
        norm = _measure_norm(gradients.values()) / before
        if not math.isfinite(norm):
            tensors = self._find_nonfinite(gradients)
            norm = norm if tensors else _measure_norm_slowly(gradients.values()) / before
        if tensors and not cause:
            cause = f"{len(tensors)} gradients are not finite, the first is {tensors[0]}"
        overflowed = bool(cause)
        if not gradients and not cause:
            cause = "no parameter that the optimizer holds received a gradient"
        if cause:
            self.skipped += 1
        else:
            factor = 1.0 / before
            if self.clip is not None:
                factor *= min(1.0, self.clip / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_ does
            self.conversion.masters.step(self.optimizer, gradients, factor)
            self.applied += 1
            for scheduler in self.schedulers:
                scheduler.step()
        self._scale = adjust(self._scale, self._rule, found_nonfinite=overflowed)
        self._clear_window()
        return StepOutcome(
            status="skipped" if cause else "applied", step=self.applied, scale_before=before, scale_after=self.scale,
            cause=cause, tensors=tensors, gradient_norm=norm,
        )  # fmt: skip

    def _find_nonfinite(self, gradients: dict[nn.Parameter, Tensor]) -> tuple[str, ...]:
        bad = {p for p, gradient in gradients.items() if not bool(torch.isfinite(_values(gradient)).all())}
        known = tuple(name for p, name in self._names.items() if p in bad)
        return known + ("(a parameter outside the model)",) * (len(bad) > len(known))

    def _clear_window(self) -> None:
        self._micro, self._bad_loss = 0, ""
        self._sums.clear()
        for parameter in self._names:
            parameter.grad = None
        self.optimizer.zero_grad(set_to_none=True)

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
        """Put another plan in force between two windows; weights and optimizer state go on from their fp32 truth.

        Raises what `convert` raises; the plan before stays in force then.
        """
        if self._micro:
            raise PlanError(
                f"{self._micro} of {self.accumulate} micro-batches are in; change the plan after the window"
            )
        self._stop_waiting()
        self._adopt(plan, why)

    def _adopt(self, plan: Plan, why: str, seconds: float = 0.0) -> None:
        before = self.conversion.plan
        self.conversion.undo()
        try:
            drafted = draft_conversion(self.model, plan)
            self._require_eps(drafted)
            drafted.apply()
        except Exception:
            self.conversion = convert(self.model, before)
            raise
        self.conversion = drafted
        self._match_states()
        self._rule = DYNAMIC if plan.loss_scale == "dynamic" else UNSCALED
        self._scale = LossScale() if plan.loss_scale == "dynamic" else LossScale(scale=1.0)
        self.plan_record = PlanRecord(
            step=self.applied, plan=str(plan), layers=self.conversion.describe(), why=why, seconds=seconds
        )

    def _match_states(self) -> None:
        """Optimizer states follow the precision that the optimizer sees: fp32 where a truth is kept."""
        for parameter in self._find_held():
            seen = torch.float32 if parameter in self.conversion.masters else parameter.dtype
            match_states(self.optimizer, parameter, seen)

    def _require_eps(self, drafted: Conversion) -> None:
        """fp16(1e-8) is 0: an optimizer that keeps fp16 states with it divides 0 by 0."""
        fp16 = find_format("fp16")
        narrow = {p for p, s in drafted.storage.items() if s.storage == "fp16" and s.master == "none"}
        for group in self.optimizer.param_groups:
            eps = group.get("eps")
            if eps is not None and eps < fp16.smallest_subnormal and narrow.intersection(group["params"]):
                raise UnsupportedError(
                    f"{type(self.optimizer).__name__} has eps={eps:g}, which is 0 in fp16, and the plan keeps no fp32 "
                    f"master; give eps >= {fp16.smallest_subnormal:.2g} (1e-4 is usual), or master=fp32 in the plan"
                )

    def restore(self) -> nn.Module:
        """Undo the conversion and give the model back in fp32; the optimizer goes on with it as a plain one."""
        self._stop_waiting()
        self._hooks.close()
        self.conversion.undo()
        self.conversion = convert(self.model, PRESETS["32-true"])
        self._match_states()
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on and that model, optimizer and schedulers do not hold themselves."""
        return {
            "plan": str(self.plan) if self._waiting is None else None,
            "loss_scale": asdict(self._scale),
            "applied": self.applied,
            "skipped": self.skipped,
            "micro": self._micro,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a saved state in force, its plan included.

        Raises PlanError when the state was saved inside an accumulation window, whose gradients it does not hold.
        """
        self._clear_window()
        if state["micro"]:
            raise PlanError("the state was saved in the middle of an accumulation window; save after an applied step")
        if state["plan"] is not None and state["plan"] != str(self.plan):
            self.adopt(Plan.parse(state["plan"]), "restored")
        if state["plan"] is not None:
            self._stop_waiting()
        self._scale = LossScale(**state["loss_scale"])
        self.applied, self.skipped = state["applied"], state["skipped"]

    def _before_load(self, _optimizer: Optimizer, state: dict[str, Any]) -> None:
        self._incoming = state

    def _after_load(self, optimizer: Optimizer) -> None:
        """Optimizer.load_state_dict has cast states to the 16 bits of their parameter: take them again, in fp32."""
        for saved, group in zip(self._incoming["param_groups"], optimizer.param_groups, strict=True):
            for index, parameter in zip(saved["params"], group["params"], strict=True):
                if parameter in self.conversion.masters:
                    for key, value in self._incoming["state"].get(index, {}).items():
                        if isinstance(value, Tensor) and key != "step":
                            optimizer.state[parameter][key] = value.to(parameter.device, torch.float32, copy=True)
        self._incoming = {}


def _values(gradient: Tensor) -> Tensor:
    dense = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(dense) if dense.is_complex() else dense


def _measure_norm(gradients: Iterable[Tensor]) -> float:
    """2-norm over all gradients, accumulated in fp32; one pass, one number read back."""
    dense = [_values(gradient) for gradient in gradients]
    if not dense:
        return 0.0
    wide = torch.float64 if any(gradient.dtype is torch.float64 for gradient in dense) else torch.float32
    norms = torch._foreach_norm(dense, 2, dtype=wide)
    return float(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))


def _measure_norm_slowly(gradients: Iterable[Tensor]) -> float:
    """The same in fp64, for finite gradients whose squares overflow fp32."""
    squares = [torch.linalg.vector_norm(_values(g), dtype=torch.float64) ** 2 for g in gradients]
    return math.sqrt(sum(float(s) for s in squares))


def prepare(
    model: nn.Module,
    optimizer: Optimizer,
    plan: Plan | str = "auto",
    *,
    accumulate: int = 1,
    clip: float | None = None,
    schedulers: LRScheduler | Iterable[LRScheduler] = (),
    profile: HardwareProfile | None = None,
) -> Stepper:
    """Make a model and its optimizer train under a plan.

    Args:
        model: an fp32 module.
        optimizer: any torch optimizer over its parameters.
        plan: a precision name ("auto", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "32-true"), a Plan, its text, or the
            path of a plan file (.toml, .json). "auto" chooses when the first batch arrives, by timing the model on it.
        accumulate: micro-batches in one update; each loss is divided by it.
        clip: largest 2-norm of all gradients together, after unscaling.
        schedulers: stepped once for every applied step.
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
    trainable = {p for p in model.parameters() if p.requires_grad}
    if not trainable:
        raise ModelError(f"{type(model).__name__} has no trainable parameters; set requires_grad on some of them")
    if not trainable & {p for group in optimizer.param_groups for p in group["params"]}:
        raise ModelError(
            f"the optimizer holds none of the {len(trainable)} trainable parameters of {type(model).__name__}; "
            "make it from model.parameters()"
        )
    if accumulate < 1 or (clip is not None and clip <= 0):
        raise ModelError(f"accumulate must be at least 1 and clip above 0; got accumulate={accumulate}, clip={clip}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ModelError(
            "LBFGS evaluates the loss itself, through a closure; halfstep steps optimizers that take gradients"
        )
    chosen = [schedulers] if isinstance(schedulers, LRScheduler) else list(schedulers)
    if any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in chosen):
        raise ModelError("ReduceLROnPlateau needs a metric; leave it out and step it yourself after each evaluation")
    stepper = Stepper(model, optimizer, accumulate=accumulate, clip=clip, schedulers=tuple(chosen), profile=profile)
    if plan == "auto":
        stepper.wait_for_batch()
    else:
        stepper.adopt(read_plan(plan))
    return stepper


def read_plan(plan: Plan | str) -> Plan:
    """A plan from whatever names one: a Plan, a preset's name, a plan's text, or a plan file."""
    from pathlib import Path

    if isinstance(plan, Plan):
        return plan
    if plan.endswith((".toml", ".json", ".plan")):
        return Plan.load(Path(plan))
    return Plan.parse(plan)
