"""The arms of a comparison: ways of training the same thing, each in a process of its own.

    fp32              plain PyTorch
    fp32-tuned        + fused optimizer, channels_last for convolutions, allocator settings
    torch-amp         torch.autocast, and GradScaler for fp16, as the PyTorch documentation writes it
    torch-amp-tuned   + fused optimizer, channels_last for convolutions, allocator settings
    halfstep          the recipe's precision, with the same tuning; `halfstep:PLAN` for another one
    control           bf16 weights without a master at a thousandth of the learning rate: nearly every update is
                      rounded away. It runs to the first evaluation, and the gate has to reject it there.

An arm whose plan rehearses other hardware ends with what each of its layers does to the gradient.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from halfstep import records
from halfstep.control.controller import Policy
from halfstep.control.sensitivity import measure_harm
from halfstep.errors import RecipeError, TrainingError, describe_unknown
from halfstep.machine.runtime import read_peak_memory, tune_process, use_channels_last
from halfstep.records import EndRecord, EvaluationRecord, HarmRecord, PlanRecord, StepOutcome
from halfstep.stepper import Stepper, prepare, read_plan
from halfstep.training import (
    Steps,
    Task,
    TrainSettings,
    build_optimizer,
    build_schedule,
    evaluation_steps,
    train_steps,
)

DEFAULT_ARMS = ("fp32", "torch-amp", "torch-amp-tuned", "halfstep")
RIVALS = ("fp32", "fp32-tuned", "torch-amp", "torch-amp-tuned")
REFERENCE, CONTROL = "fp32", "control"
CONTROL_PLAN, CONTROL_LR = "bf16-true", 1e-3
YOUR_TURN, TURN_OVER = "go", "turn over"


class PlainLoop:
    """A training step as PyTorch's documentation writes it; `dtype` None is fp32."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        settings: TrainSettings,
        dtype: torch.dtype | None,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.settings, self.dtype = (
            model,
            optimizer,
            scheduler,
            settings,
            dtype,
        )
        self.device_type = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=dtype is torch.float16)
        self.applied = self.skipped = self.micro = 0
        self.plan_record: PlanRecord | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device_type, dtype=self.dtype) if self.dtype else nullcontext()

    def step(self, loss: Tensor) -> StepOutcome:
        before = self.scaler.get_scale()
        self.scaler.scale(loss / self.settings.accumulate).backward()
        self.micro += 1
        if self.micro < self.settings.accumulate:
            return StepOutcome(status="accumulated", step=self.applied, scale_before=before, scale_after=before)
        self.micro = 0
        if self.settings.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        skipped = self.scaler.get_scale() < before
        if skipped:
            self.skipped += 1
        else:
            self.applied += 1
            self.scheduler.step()
        return StepOutcome(
            status="skipped" if skipped else "applied",
            step=self.applied,
            scale_before=before,
            scale_after=self.scaler.get_scale(),
        )


def is_arm(name: str) -> bool:
    """Whether an arm has that name.

    Examples:
        >>> is_arm("halfstep:bf16-true"), is_arm("fp23")
        (True, False)
    """
    return name in (*RIVALS, "halfstep", CONTROL) or name.startswith("halfstep:")


def require_arms(names: Sequence[str]) -> None:
    """Raises RecipeError for an unknown or repeated arm, or when the reference is missing; PlanError for a bad plan."""
    for name in names:
        if not is_arm(name) or name == CONTROL:
            raise RecipeError(describe_unknown("arm", name, [*RIVALS, "halfstep", "halfstep:PLAN"]))
        if name.startswith("halfstep:"):
            read_plan(name.partition(":")[2])
    if REFERENCE not in names or len(set(names)) != len(names):
        raise RecipeError(f"arms are named once each and '{REFERENCE}' is one of them; got {', '.join(names)}")


def build_arm(name: str, task: Task, settings: TrainSettings, precision: str, recovery: Policy | None = None) -> Steps:
    """Model, optimizer and step of an arm. precision, recovery: of the arms that halfstep makes."""
    tuned = name.endswith("-tuned") or name.startswith("halfstep")
    if name == CONTROL:
        settings, precision = replace(settings, lr=settings.lr * CONTROL_LR), CONTROL_PLAN
    elif ":" in name:
        precision = name.partition(":")[2]
    model = task.build_model()
    if tuned:
        use_channels_last(model)
    optimizer = build_optimizer(model, settings, fused=tuned)
    scheduler = build_schedule(optimizer, settings)
    if name.startswith(("halfstep", CONTROL)):
        return prepare(
            model,
            optimizer,
            precision,
            accumulate=settings.accumulate,
            clip=settings.clip or None,
            schedulers=scheduler,
            recovery=recovery,
        )
    device_type = next(model.parameters()).device.type
    dtype = {"cpu": torch.bfloat16, "cuda": torch.float16}[device_type] if "amp" in name else None
    return PlainLoop(model, optimizer, scheduler, settings, dtype)


def tune_arm(name: str) -> AbstractContextManager[dict[str, str]]:
    """Process settings of an arm: those of the tuned ones are the same for rivals and halfstep."""
    return tune_process(allocator=name.endswith("-tuned") or name.startswith("halfstep"))


def work(
    name: str, task: Task, settings: TrainSettings, precision: str, source: IO[str], sink: IO[str], *,
    recovery: Policy | None = None,
) -> None:  # fmt: skip
    """One arm in a process of its own: runs as many steps as each line of `source` allows, writes records to `sink`."""
    with tune_arm(name):
        stepper = build_arm(name, task, settings, precision, recovery)
        running = train_steps(task, stepper, settings)
        plan: PlanRecord | None = None
        allowed = _wait_for_turn(source, sink)
        last = 0
        try:
            for record in running:
                if stepper.plan_record is not plan:
                    plan = stepper.plan_record
                    records.append(sink, [plan] if plan else [])
                records.append(sink, [record])
                last = record.step
                if last >= allowed and (isinstance(record, EvaluationRecord) or last not in evaluation_steps(settings)):
                    allowed = _wait_for_turn(source, sink)
                    if not allowed:
                        break
        except TrainingError:  # a rehearsal wants to know of which layers
            records.append(sink, _measure_harm(task, stepper, settings))
            raise
        device = str(next(stepper.model.parameters()).device)
        end = EndRecord(
            step=last, reason="finished", peak_memory_bytes=read_peak_memory(device), skipped_steps=stepper.skipped
        )
        records.append(sink, [end, *_measure_harm(task, stepper, settings)])


def _measure_harm(task: Task, stepper: Steps, settings: TrainSettings) -> tuple[HarmRecord, ...]:
    """What each layer of a rehearsal does to the gradient, at the weights it ends with, on batches it has not seen."""
    if not (isinstance(stepper, Stepper) and stepper.plan.products == "emulated"):
        return ()
    plan, scale = stepper.plan, stepper.scale
    model = stepper.restore().train()

    def run(number: int) -> None:
        (task.measure_loss(model, task.make_batch(settings.steps + 1 + number)) * scale).backward()

    return measure_harm(model, plan, run)


def _wait_for_turn(source: IO[str], sink: IO[str]) -> int:
    """Give the turn back, and wait for the step up to which the next one goes; 0 when there is none."""
    sink.write(TURN_OVER + "\n")
    sink.flush()
    line = source.readline().split()
    return int(line[1]) if line and line[0] == YOUR_TURN else 0
