"""Compare: train the same thing in several precisions from paired seeds, and say what was gained and whether it held.

Fair by construction: every arm has the same initial weights, the same batches, the same optimizer settings and
schedule, and its own process. The processes of a seed live side by side and take turns of a few steps, one at a time,
so that a machine whose speed drifts slows all arms alike; time ratios are taken turn by turn.

    fp32              plain PyTorch
    fp32-tuned        + fused optimizer, channels_last for convolutions, allocator settings
    torch-amp         torch.autocast, and GradScaler for fp16, as the PyTorch documentation writes it
    torch-amp-tuned   + fused optimizer, channels_last for convolutions, allocator settings
    halfstep          the recipe's precision, with the same tuning; `halfstep:PLAN` for another one
    control           bf16 weights without a master at a thousandth of the learning rate: nearly every update is
                      rounded away. It runs to the first evaluation, and the gate has to reject it there.

The verdict is that of two one-sided t-tests on the paired differences to fp32 (Schuirmann 1987; Lakens 2017): the arm
is equivalent when the 90 % confidence interval of the mean difference lies within the margin, worse or better when it
lies beyond it, inconclusive otherwise. An arm whose loss has not moved is "not trained", whatever its metric is.
"""

import contextlib
import datetime
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from halfstep import records
from halfstep.control.controller import Policy
from halfstep.errors import RecipeError, TrainingError, describe_unknown
from halfstep.machine.hardware import name_machine
from halfstep.machine.runtime import read_peak_memory, tune_process, use_channels_last
from halfstep.records import (
    ArmResult,
    ComparisonRecord,
    EndRecord,
    EvaluationRecord,
    PlanRecord,
    Point,
    Record,
    StepOutcome,
    StepRecord,
)
from halfstep.stepper import prepare, read_plan
from halfstep.training import (
    Metric,
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
TURNS = 10
_YOUR_TURN, _TURN_OVER = "go", "turn over"


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
        if name.startswith("halfstep:") and name != "halfstep:auto":
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
    tuned = name.endswith("-tuned") or name.startswith("halfstep")
    return tune_process(allocator=tuned)


def work(
    name: str,
    task: Task,
    settings: TrainSettings,
    precision: str,
    source: IO[str],
    sink: IO[str],
    *,
    recovery: Policy | None = None,
) -> None:
    """One arm in a process of its own: runs as many steps as each line of `source` allows, writes records to `sink`."""
    with tune_arm(name):
        stepper = build_arm(name, task, settings, precision, recovery)
        running = train_steps(task, stepper, settings)
        plan: PlanRecord | None = None
        allowed = _wait_for_turn(source, sink)
        last = 0
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
        device = str(next(stepper.model.parameters()).device)
        end = EndRecord(
            step=last, reason="finished", peak_memory_bytes=read_peak_memory(device), skipped_steps=stepper.skipped
        )
        records.append(sink, [end])


def _wait_for_turn(source: IO[str], sink: IO[str]) -> int:
    """Give the turn back, and wait for the step up to which the next one goes; 0 when there is none."""
    sink.write(_TURN_OVER + "\n")
    sink.flush()
    line = source.readline().split()
    return int(line[1]) if line and line[0] == _YOUR_TURN else 0


@dataclass
class _Worker:
    """One arm of one seed, as the conductor sees it."""

    arm: str
    seed: int
    process: "subprocess.Popen[str]"
    errors: IO[str]
    steps: list[StepRecord] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)  # turn of each step
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    plan: PlanRecord | None = None
    end: EndRecord | None = None

    def send(self, step: int) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it died: `listen` says of what
                self.process.stdin.write(f"{_YOUR_TURN} {step}\n" if step else "end\n")
                self.process.stdin.flush()

    def listen(self, turn: int) -> Iterator[Record]:
        """Records until the worker gives its turn back or ends. Raises TrainingError when it died."""
        for line in self.process.stdout or ():
            if line.strip() == _TURN_OVER:
                return
            record = records.decode(line)
            match record:
                case StepRecord():
                    self.steps.append(record)
                    self.turns.append(turn)
                case EvaluationRecord():
                    self.evaluations.append(record)
                case PlanRecord():
                    self.plan = record
                case EndRecord():
                    self.end = record
            yield record
        if self.process.wait() != 0:
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines() or ["(it said nothing)"]
            raise TrainingError(f"arm '{self.arm}', seed {self.seed}, stopped: {said[-1].removeprefix('error: ')}")


def _start(command: Sequence[str], arm: str, seed: int, stack: ExitStack) -> _Worker:
    errors = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))  # noqa: SIM115
    process = subprocess.Popen(
        [*command, "--arm", arm, "--seed", str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    return _Worker(arm, seed, process, errors)


def run_seed(
    command: Sequence[str],
    arms: Sequence[str],
    seed: int,
    settings: TrainSettings,
    notify: Callable[[str, Record], None],
) -> list[_Worker]:
    """All arms of one seed, turn by turn."""
    with ExitStack() as stack:
        workers = [_start(command, arm, seed, stack) for arm in arms]
        for worker in workers:
            list(worker.listen(0))  # set-up is over when the first turn is given back
        size = max(1, settings.steps // TURNS)
        control_ends = min(evaluation_steps(settings))
        for turn, goal in enumerate([1, *range(size, settings.steps, size), settings.steps]):
            shift = turn % len(workers)
            for worker in workers[shift:] + workers[:shift]:
                limit = min(goal, control_ends) if worker.arm == CONTROL else goal
                if worker.steps and worker.steps[-1].step >= limit:
                    continue
                worker.send(limit)
                for record in worker.listen(turn):
                    notify(worker.arm, record)
        for worker in workers:
            worker.send(0)
            for record in worker.listen(TURNS):
                notify(worker.arm, record)
        return workers


@dataclass(frozen=True)
class Verdict:
    """Two one-sided tests on paired differences."""

    word: str
    difference: float
    interval: tuple[float, float]


def judge_equivalence(differences: Sequence[float], margin: float, *, higher_is_better: bool) -> Verdict:
    """Two one-sided t-tests at 5 %, as a 90 % confidence interval against the margin.

    Examples:
        >>> judge_equivalence([0.01, -0.01, 0.0], 0.1, higher_is_better=True).word
        'equivalent'
    """
    mean = statistics.fmean(differences)
    if not math.isfinite(mean):
        return Verdict("worse", math.nan, (math.nan, math.nan))
    if len(differences) < 2:
        return Verdict("not tested", mean, (mean, mean))
    error = statistics.stdev(differences) / len(differences) ** 0.5
    reach = float(stats.t.ppf(0.95, len(differences) - 1)) * error
    low, high = mean - reach, mean + reach
    if -margin < low and high < margin:
        word = "equivalent"
    elif low > margin or high < -margin:
        word = "better" if (low > margin) == higher_is_better else "worse"
    else:
        word = "inconclusive"
    return Verdict(word, mean, (low, high))


def has_trained(steps: Sequence[StepRecord]) -> bool:
    """Whether the loss has moved: its mean over the last tenth is below the first by over 1 % and 3 standard deviations."""
    tail = [s.loss for s in steps[-max(2, len(steps) // 10) :]]
    drop = steps[0].loss - statistics.fmean(tail)
    return drop > 0.01 * abs(steps[0].loss) and drop > 3 * statistics.pstdev(tail)


def _turn_medians(workers: Sequence[_Worker]) -> dict[tuple[int, int], float]:
    """(seed, turn) -> median milliseconds; the first turns, a tenth of the run, are warm-up."""
    medians = {}
    for worker in workers:
        for turn in sorted(set(worker.turns)):
            timed = [s.milliseconds for s, t in zip(worker.steps, worker.turns, strict=True) if t == turn]
            medians[worker.seed, turn] = statistics.median(timed)
    warm = {key: ms for key, ms in medians.items() if key[1] > 1}
    return warm or medians


def _mean_curve(workers: Sequence[_Worker], points: int = 150) -> tuple[Point, ...]:
    """Training loss over steps and seconds, mean over seeds, smoothed to at most `points` points."""
    count = min(len(w.steps) for w in workers)
    width = max(1, math.ceil(count / points))
    curve = []
    elapsed = [0.0] * len(workers)
    for begin in range(0, count - width + 1, width):
        pieces = [w.steps[begin : begin + width] for w in workers]
        elapsed = [e + sum(s.milliseconds for s in piece) / 1000 for e, piece in zip(elapsed, pieces, strict=True)]
        loss = statistics.fmean(statistics.fmean(s.loss for s in piece) for piece in pieces)
        curve.append(Point(step=begin + width, seconds=statistics.fmean(elapsed), value=loss))
    return tuple(curve)


def _mean_evaluations(workers: Sequence[_Worker]) -> tuple[Point, ...]:
    together = zip(*(w.evaluations for w in workers), strict=True)
    return tuple(
        Point(
            step=e[0].step,
            seconds=statistics.fmean(x.train_seconds for x in e),
            value=statistics.fmean(x.value for x in e),
        )
        for e in together
    )


def _spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for one seed, NaN when a run diverged."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _rejects(control: Verdict, by_arm: dict[str, list[_Worker]], metric: Metric) -> bool:
    """Whether the gate told the control from the reference, over the steps that both ran."""
    if control.word == "not trained":
        return all(
            has_trained(r.steps[: len(c.steps)]) for r, c in zip(by_arm[REFERENCE], by_arm[CONTROL], strict=True)
        )
    single = control.word == "not tested" and abs(control.difference) > metric.margin
    return control.word == "worse" or single


def _judge(mine: Sequence[_Worker], reference: Sequence[_Worker], metric: Metric) -> Verdict:
    """The gate: paired differences at the last evaluation that both have."""
    last = min(len(mine[0].evaluations), len(reference[0].evaluations)) - 1
    differences = [m.evaluations[last].value - r.evaluations[last].value for m, r in zip(mine, reference, strict=True)]
    verdict = judge_equivalence(differences, metric.margin, higher_is_better=metric.higher_is_better)
    if not all(has_trained(w.steps) for w in mine):
        return replace(verdict, word="not trained")
    if not all(math.isfinite(r.evaluations[last].value) and has_trained(r.steps) for r in reference):
        return Verdict("no reference", math.nan, (math.nan, math.nan))
    return verdict


def summarise(name: str, by_arm: dict[str, list[_Worker]], metric: Metric, target: float) -> ArmResult:
    """One arm's row."""
    mine, reference = by_arm[name], by_arm[REFERENCE]
    values = tuple(w.evaluations[-1].value for w in mine)
    verdict = _judge(mine, reference, metric)
    if name == REFERENCE and verdict.word in ("equivalent", "not tested"):
        verdict = replace(verdict, word="reference")
    turns = _turn_medians(mine)
    speedup, memory = {}, {}
    peak = max(w.end.peak_memory_bytes for w in mine if w.end)
    for rival in (r for r in by_arm if r not in (name, CONTROL)):
        theirs = _turn_medians(by_arm[rival])
        speedup[rival] = statistics.median(theirs[key] / ms for key, ms in turns.items() if key in theirs)
        memory[rival] = peak / max(w.end.peak_memory_bytes for w in by_arm[rival] if w.end)
    evaluations = _mean_evaluations(mine)
    reached = [p.seconds for p in evaluations if (p.value >= target if metric.higher_is_better else p.value <= target)]
    return ArmResult(
        name=name, verdict=verdict.word, metric_mean=statistics.fmean(values),
        metric_sd=_spread(values), metrics=values,
        difference=verdict.difference, interval=verdict.interval,
        step_ms=statistics.median(turns.values()), step_ms_spread=(min(turns.values()), max(turns.values())),
        peak_memory_bytes=peak, skipped_steps=sum(w.end.skipped_steps for w in mine if w.end),
        seconds_to_target=reached[0] if reached else None,
        setup_seconds=statistics.fmean(w.plan.seconds if w.plan else 0.0 for w in mine),
        speedup=speedup, memory_ratio=memory, loss=_mean_curve(mine), evaluations=evaluations, plan=mine[0].plan,
    )  # fmt: skip


def compare(
    recipe: str,
    recipe_name: str,
    metric: Metric,
    settings: TrainSettings,
    *,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: int = 3,
    target: float | None = None,
    notify: Callable[[int, str, Record], None] = lambda seed, arm, record: None,
) -> ComparisonRecord:
    """Train a recipe (TOML text) in every arm and seed; see the head of this module.

    target: metric for "time to target"; left out, the reference's final mean, loosened by the margin.

    Raises RecipeError for unknown arms, TrainingError when a worker stops.
    """
    require_arms(arms)
    if seeds < 1:
        raise RecipeError(f"seeds must be at least 1; got {seeds}")
    begin = time.perf_counter()
    by_arm: dict[str, list[_Worker]] = {arm: [] for arm in (*arms, CONTROL)}
    with tempfile.TemporaryDirectory(prefix="halfstep-") as folder:
        path = Path(folder) / f"{recipe_name}.toml"
        path.write_text(recipe, encoding="utf-8")
        command = [sys.executable, "-m", "halfstep", "worker", str(path)]
        for seed in range(settings.seed, settings.seed + seeds):
            for worker in run_seed(command, (*arms, CONTROL), seed, settings, partial(notify, seed)):
                by_arm[worker.arm].append(worker)
    final = statistics.fmean(w.evaluations[-1].value for w in by_arm[REFERENCE])
    if target is None:
        target = final - metric.margin if metric.higher_is_better else final + metric.margin
    results = tuple(summarise(name, by_arm, metric, target) for name in arms)
    control = _judge(by_arm[CONTROL], by_arm[REFERENCE], metric)
    return ComparisonRecord(
        recipe_name=recipe_name, recipe=recipe, metric=metric.name, unit=metric.unit,
        higher_is_better=metric.higher_is_better, margin=metric.margin, target=target, seeds=seeds,
        steps=settings.steps, machine=name_machine(), torch_version=torch.__version__, threads=torch.get_num_threads(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), seconds=time.perf_counter() - begin,
        command="", arms=results, control=f"{control.word}, {control.difference:+.3g} {metric.unit}",
        gate_works=_rejects(control, by_arm, metric),
        speedup=next((r.speedup for r in results if r.name == "halfstep"), {}),
        memory_ratio=next((r.memory_ratio for r in results if r.name == "halfstep"), {}),
    )  # fmt: skip
