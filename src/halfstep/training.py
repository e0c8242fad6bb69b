"""The loop, read from top to bottom.

A task says what is trained (model, data, loss, metric), settings say how, a stepper makes each step. `train_steps` is a
generator: it yields a record after every step and every evaluation, and between two records nothing runs, so whoever
drives it may pause, save or stop there. `Run` drives it for `halfstep train`: record on disk, checkpoints, resume.

Batches are a pure function of the step's number, so that the position in the data is that number and nothing else.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Protocol

import torch
from filelock import FileLock
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from halfstep import records
from halfstep.checkpoint import Rounding, change_plan, claim_folder, force_to_disk, load_checkpoint, save_checkpoint
from halfstep.errors import CheckpointError, DataError, RecordError
from halfstep.machine.runtime import read_peak_memory
from halfstep.plan import Plan
from halfstep.records import EndRecord, EvaluationRecord, PlanRecord, Record, StepOutcome, StepRecord
from halfstep.stepper import Stepper, read_plan

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a task is trained; every task has its own defaults in its recipe."""

    steps: Count = 100
    batch_size: Count = 16
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Positive = 1e-3
    eps: Positive = 1e-8  # adam, adamw
    momentum: Share = 0.9  # sgd
    weight_decay: NotNegative = 0.0
    schedule: Literal["constant", "cosine", "linear", "step"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0  # steps of linear warm-up
    step_every: Count = 1000  # schedule "step": multiply by gamma every so many steps
    gamma: Positive = 0.7
    clip: NotNegative = 0.0  # largest gradient norm; 0 means no clipping
    accumulate: Count = 1  # micro-batches in one update
    evaluations: Count = 5  # evenly spread, the last one after the last step
    seed: Annotated[int, Field(ge=0, lt=2**40)] = 0


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a task is judged by on held-out data. `margin` is the difference to fp32 that still counts as equal."""

    name: str
    unit: str
    higher_is_better: bool
    margin: float


class Task(Protocol):
    """One thing to train. Batches and initial weights depend on the seed and the step alone."""

    metric: Metric

    def build_model(self) -> nn.Module: ...

    def make_batch(self, step: int) -> tuple[Tensor, Tensor]: ...

    def measure_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor: ...

    def evaluate(self, model: nn.Module) -> float: ...


class Steps(Protocol):
    """What makes a step: halfstep's Stepper, or a rival's loop in `comparison`."""

    model: nn.Module
    skipped: int
    plan_record: PlanRecord | None

    def autocast(self) -> AbstractContextManager[Any]: ...

    def step(self, loss: Tensor) -> StepOutcome: ...


def build_optimizer(model: nn.Module, settings: TrainSettings, *, fused: bool) -> Optimizer:
    """The optimizer of a recipe. Weight decay leaves out biases and norms (all one-dimensional parameters)."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    choose = fused or None
    if settings.optimizer == "sgd":
        nesterov = settings.momentum > 0
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=choose)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=settings.lr, eps=settings.eps, fused=choose)


def build_schedule(optimizer: Optimizer, settings: TrainSettings) -> LambdaLR:
    """Learning rate over applied steps: linear warm-up, then the recipe's schedule."""
    updates = max(1, settings.steps // settings.accumulate)

    def factor(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        done = min(1.0, (step - settings.warmup) / max(1, updates - settings.warmup))
        match settings.schedule:
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                return 1.0 - done
            case "step":
                return settings.gamma ** (step // settings.step_every)
            case _:
                return 1.0

    return LambdaLR(optimizer, factor)


def evaluation_steps(settings: TrainSettings) -> set[int]:
    """The steps after which the task is evaluated.

    Examples:
        >>> sorted(evaluation_steps(TrainSettings(steps=10, evaluations=2)))
        [5, 10]
    """
    count = max(1, min(settings.evaluations, settings.steps))
    return {round(settings.steps * (i + 1) / count) for i in range(count)}


def train_steps(
    task: Task,
    stepper: Steps,
    settings: TrainSettings,
    *,
    start: int = 0,
    train_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[StepRecord | EvaluationRecord]:
    """Train from step `start` on, yielding a record after every step and every evaluation."""
    evaluate_after = evaluation_steps(settings)
    for number in range(start + 1, settings.steps + 1):
        batch = task.make_batch(number)
        rate = _read_learning_rate(stepper)
        stepper.model.train()
        begin = clock()
        with stepper.autocast():
            loss = task.measure_loss(stepper.model, batch)
        outcome = stepper.step(loss)
        seconds = max(0.0, clock() - begin)  # a clock may be set back
        train_seconds += seconds
        yield StepRecord(step=number, loss=loss.item(), milliseconds=1000 * seconds, samples=len(batch[0]),
                         learning_rate=rate, outcome=outcome)  # fmt: skip
        if number in evaluate_after:
            value = evaluate(task, stepper)
            yield EvaluationRecord(step=number, metric=task.metric.name, value=value, train_seconds=train_seconds)


def evaluate(task: Task, stepper: Steps) -> float:
    """The task's metric on held-out data, in the precision of training."""
    stepper.model.eval()
    with torch.no_grad(), stepper.autocast():
        return task.evaluate(stepper.model)


def _read_learning_rate(stepper: Steps) -> float:
    optimizer: Optimizer | None = getattr(stepper, "optimizer", None)
    return float(optimizer.param_groups[0]["lr"]) if optimizer is not None else 0.0


class Run:
    """A run in a folder: `record.jsonl` and `checkpoint.safetensors`.

    A run that is interrupted, or killed, and resumed gives the same weights and the same losses as one that was not. From
    `begin` or `resume` on the folder is this run's alone, until `drive` ends, `close` is called or the process ends.
    """

    def __init__(self, task: Task, stepper: Stepper, settings: TrainSettings, folder: Path, *, name: str) -> None:
        self.task, self.stepper, self.settings, self.folder, self.name = task, stepper, settings, folder, name
        self.done = 0
        self.train_seconds = 0.0
        self.stop = False  # set it, from a signal handler for example, to save and end after the current step
        self._plan_written: PlanRecord | None = None
        self._lock: FileLock | None = None

    def close(self) -> None:
        """Leave the folder to others."""
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """The folder is this run's from here on, unless an error comes."""
        self.close()
        self._lock = claim_folder(self.folder)
        try:
            yield
        except BaseException:
            self.close()
            raise

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def record(self) -> Path:
        return self.folder / "record.jsonl"

    def begin(self, head: Record) -> None:
        """Start a fresh record.

        Raises RecordError when the folder cannot be written, holds a run already, or is in use by another process.
        """
        with self._claimed():
            if self.record.exists():
                raise RecordError(
                    f"{self.folder} holds a run already; give --resume to go on with it, another --out, or delete the folder"
                )
            self._write_record([head])

    def find_end(self) -> EndRecord | None:
        """How the run in the folder ended; None for one that was killed or has not begun."""
        last: Record | None = None
        with suppress(RecordError):  # missing, or with lines that a crash left
            for record in records.read(self.record):
                last = record
        return last if isinstance(last, EndRecord) else None

    def resume(self, plan: Plan | str | Path | None = None) -> Rounding | None:
        """Go on from the folder's checkpoint; what the record holds beyond it is dropped.

        A run that was killed before its first checkpoint starts again at step 0: `done` is 0 then.

        plan: what `prepare` takes, to go on under another plan than the saved one. Weights and optimizer states are taken
            over from fp32, the loss scale starts anew, and the plan record's `why` says what was rounded.

        Returns what another plan has rounded; None where it is the saved one.

        Raises CheckpointError when the checkpoint is missing, damaged or of another model or recipe, RecordError when the
        record cannot be read or another process is at work in the folder, and what `Stepper.adopt` raises for the plan; the
        folder is left as it was then.
        """
        if not self.folder.exists():
            raise CheckpointError(f"there is no checkpoint {self.checkpoint}; give the folder of a run that saved one")
        with self._claimed():
            return self._go_on(plan)

    def _go_on(self, plan: Plan | str | Path | None) -> Rounding | None:
        end, rounding = self.find_end(), None
        saved_before = end is not None and end.reason != "failed"  # a checkpoint that is missing now has been lost
        if self.checkpoint.exists() or saved_before or not self.record.exists():
            self._restore(load_checkpoint(self.checkpoint))
        kept = self._read_record()
        given = None if plan is None else self._keep_policy(read_plan(plan))
        if given is not None and not self._is_in_force(given):
            before = self.stepper.plan.name or "an unnamed plan"
            why = f"on resuming after step {self.done}, in place of {before}"
            rounding = change_plan(self.stepper, given, why)
        else:
            written = next((r for r in reversed(kept) if isinstance(r, PlanRecord)), None)
            if written is not None and written.plan == str(self.stepper.plan):
                self._plan_written = self.stepper.plan_record
        self._write_record(kept)
        return rounding

    def _restore(self, state: dict[str, Any]) -> None:
        if state.get("name") != self.name:
            raise CheckpointError(f"{self.checkpoint} is of '{state.get('name')}'; this recipe is '{self.name}'")
        _require_same_shapes(self.checkpoint, state["model"], self.stepper.model.state_dict())
        self.stepper.load_state_dict(state["stepper"])
        self.stepper.model.load_state_dict(state["model"])
        self.stepper.optimizer.load_state_dict(state["optimizer"])
        for scheduler, saved in zip(self.stepper.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        _set_random_states(state["random"])
        self.done, self.train_seconds = state["done"], state["train_seconds"]

    def _keep_policy(self, plan: Plan) -> Plan:
        """A plan with what the run does about failures, where it says nothing of that itself, as no name of a precision does."""
        says_nothing = plan.recovery == Plan().recovery
        return replace(plan, recovery=self.stepper.plan.recovery) if says_nothing else plan

    def _is_in_force(self, plan: Plan) -> bool:
        chosen_for = self.stepper.chosen_for and str(self._keep_policy(Plan.parse(self.stepper.chosen_for)))
        return str(plan) in (self.stepper.state_dict()["plan"], chosen_for)

    def _read_record(self) -> list[Record]:
        """The records up to the checkpoint. What stands behind it is not looked at, so a torn line there does no harm."""
        kept: list[Record] = []
        try:
            for record in records.read(self.record):
                if isinstance(record, StepRecord) and record.step > self.done:
                    break
                if not isinstance(record, EndRecord):
                    kept.append(record)
        except RecordError:
            if not kept or max(getattr(r, "step", 0) for r in kept) < self.done:
                raise
        if not kept:
            raise RecordError(f"{self.record} is empty; delete the folder and start the run again")
        while kept and isinstance(kept[-1], PlanRecord):  # of the step that comes next
            kept.pop()
        return kept

    def _write_record(self, kept: list[Record]) -> None:
        """The whole record, at once or not at all."""
        temporary = self.record.with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                records.append(file, kept)
                os.fsync(file.fileno())
            temporary.replace(self.record)
        except OSError as error:
            raise RecordError(f"{self.folder} cannot be written ({error.strerror}); give another --out") from None
        force_to_disk(self.folder)

    def save(self) -> None:
        """Write the checkpoint. Raises CheckpointError; the one before is kept then."""
        save_checkpoint(
            self.checkpoint,
            {
                "name": self.name,
                "done": self.done,
                "train_seconds": self.train_seconds,
                "model": dict(self.stepper.model.state_dict()),
                "optimizer": self.stepper.optimizer.state_dict(),
                "schedulers": [scheduler.state_dict() for scheduler in self.stepper.schedulers],
                "stepper": self.stepper.state_dict(),
                "random": _get_random_states(),
            },
        )

    def drive(self, *, save_every: int = 0, clock: Callable[[], float] = time.perf_counter) -> Iterator[Record]:
        """Train to the end or to `stop`, writing the record and yielding what is written.

        save_every: steps between checkpoints; 0 saves at the end only. One that falls inside an accumulation window holds
        the window's gradients.

        Raises DataError when the loss is not finite from the first step on. That error and any other is written down in
        the record's end before it goes on its way; the last checkpoint stays as it is.
        """
        file = self.record.open("a", encoding="utf-8")
        try:
            for record in self._train(file, save_every, clock):
                records.append(file, [record])
                yield record
            self._save_with(file)
            end = self._make_end("finished" if self.done == self.settings.steps else "interrupted")
            records.append(file, [end])
            yield end
        except Exception as error:
            with suppress(RecordError):  # a full disk may be what went wrong
                records.append(file, [self._make_end("failed", f"{type(error).__name__}: {error}")])
            raise
        finally:
            with suppress(OSError):
                file.close()
            self.close()

    def _train(
        self, file: IO[str], save_every: int, clock: Callable[[], float]
    ) -> Iterator[PlanRecord | StepRecord | EvaluationRecord]:
        """The steps that are left, saved on the way."""
        evaluated, first, saved = evaluation_steps(self.settings), self.done == 0, self.done
        for record in train_steps(
            self.task, self.stepper, self.settings, start=self.done, train_seconds=self.train_seconds, clock=clock
        ):
            plan = self.stepper.plan_record
            if plan is not None and plan is not self._plan_written:
                self._plan_written = plan
                yield plan
            yield record
            if isinstance(record, StepRecord):
                self.done, self.train_seconds = record.step, self.train_seconds + record.milliseconds / 1000
                if first and not math.isfinite(record.loss):
                    raise DataError(
                        f"the loss of the very first batch is {record.loss}: look for NaN in the data or labels"
                    )
                first = False
                if record.step in evaluated:
                    continue  # what follows is its evaluation
            if self.done == self.settings.steps:
                continue
            if self.stop:
                return
            if save_every and self.done // save_every > saved // save_every:
                self._save_with(file)
                saved = self.done

    def _save_with(self, file: IO[str]) -> None:
        """Save, with the record on disk before the checkpoint that counts on it."""
        os.fsync(file.fileno())
        self.save()

    def _make_end(self, reason: str, error: str = "") -> EndRecord:
        device = next(self.stepper.model.parameters()).device
        return EndRecord(step=self.done, reason=reason, peak_memory_bytes=read_peak_memory(str(device)),
                         skipped_steps=self.stepper.skipped, error=error)  # fmt: skip


def _require_same_shapes(path: Path, saved: dict[str, Tensor], here: dict[str, Tensor]) -> None:
    for name in saved.keys() ^ here.keys():
        side = "the checkpoint" if name in saved else "the model"
        raise CheckpointError(f"{path} is of another model: only {side} has '{name}'; use the recipe it was saved with")
    for name, tensor in saved.items():
        if tensor.shape != here[name].shape:
            raise CheckpointError(
                f"{path} is of another model: '{name}' has shape {tuple(tensor.shape)} there and "
                f"{tuple(here[name].shape)} here; use the recipe it was saved with"
            )


def _get_random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for index in range(torch.cuda.device_count()):  # the machine may be another one, with fewer devices or more
        if f"cuda:{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{index}"], index)
