"""Compare: train the same thing in several precisions from paired seeds, and say what was gained and whether it held.

Fair by construction: every arm has the same initial weights, the same batches, the same optimizer settings and
schedule, and its own process. The processes of a seed live side by side and take turns of a few steps, one at a time,
so that a machine whose speed drifts slows all arms alike; time ratios are taken turn by turn. `arms` says what they are.

The verdict is that of two one-sided t-tests on the paired differences to fp32 (Schuirmann 1987; Lakens 2017): the arm
is equivalent when the 90 % confidence interval of the mean difference lies within the margin, worse or better when it
lies beyond it, inconclusive otherwise. An arm whose loss has not moved is "not trained", whatever its metric is.
"""

import contextlib
import datetime
import itertools
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO

import torch
from scipy import stats

from halfstep import records
from halfstep.arms import CONTROL, DEFAULT_ARMS, REFERENCE, TURN_OVER, YOUR_TURN, require_arms
from halfstep.control.search import repair_plan
from halfstep.errors import RecipeError, TrainingError
from halfstep.machine.hardware import name_machine
from halfstep.plan import Plan
from halfstep.records import (
    ArmResult,
    ComparisonRecord,
    EndRecord,
    EvaluationRecord,
    HarmRecord,
    PlanRecord,
    Point,
    Record,
    StepRecord,
)
from halfstep.training import (
    Metric,
    TrainSettings,
    evaluation_steps,
)

TURNS = 10
REPAIRED = "repaired"  # the arm that a rehearsal may add


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
    harms: list[HarmRecord] = field(default_factory=list)
    failed: str = ""  # what it died of, while it trained

    def send(self, step: int) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it died: `listen` says of what
                self.process.stdin.write(f"{YOUR_TURN} {step}\n" if step else "end\n")
                self.process.stdin.flush()

    def listen(self, turn: int) -> Iterator[Record]:
        """Records until the worker gives its turn back or ends. Raises TrainingError when it died."""
        for line in self.process.stdout or ():
            if line.strip() == TURN_OVER:
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
                case HarmRecord():
                    self.harms.append(record)
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
                if not worker.steps or worker.steps[-1].step < limit:
                    _let_train(worker, limit, turn, notify)
        for worker in workers:
            _let_train(worker, 0, TURNS, notify)
        return workers


def _let_train(worker: _Worker, limit: int, turn: int, notify: Callable[[str, Record], None]) -> None:
    """Give a worker its turn. One that dies of its training has failed and gets no other; without the reference nothing can
    be compared, so its death ends the comparison."""
    if worker.failed:
        return
    worker.send(limit)
    try:
        for record in worker.listen(turn):
            notify(worker.arm, record)
    except TrainingError as error:
        if worker.arm == REFERENCE:
            raise
        worker.failed = str(error)
        if worker.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # of what it never read
                worker.process.stdin.close()


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
    """Whether the loss has moved: its mean over the last tenth is below the first by over 1 % and 3 standard deviations.

    Steps that were skipped do not count: their loss may be of any size, and has moved nothing.
    """
    losses = [s.loss for s in steps if not s.outcome.skipped]
    if len(losses) < 2:
        return False
    tail = losses[-max(2, len(losses) // 10) :]
    drop = losses[0] - statistics.fmean(tail)
    return drop > 0.01 * abs(losses[0]) and drop > 3 * statistics.pstdev(tail)


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


def _mean_harms(workers: Sequence[_Worker]) -> tuple[HarmRecord, ...]:
    """Harm of each layer, mean over the seeds that measured it: a policy may have widened it in others."""
    by_layer: dict[tuple[str, str], list[HarmRecord]] = {}
    for harm in itertools.chain.from_iterable(w.harms for w in workers):
        by_layer.setdefault((harm.path, harm.compute), []).append(harm)
    return tuple(
        replace(h[0], error=statistics.fmean(x.error for x in h), noise=statistics.fmean(x.noise for x in h))
        for h in by_layer.values()
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
    if any(w.failed for w in mine):
        return Verdict("failed", math.nan, (math.nan, math.nan))
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
    failed = "; ".join(w.failed for w in mine if w.failed)
    values = tuple(math.nan if w.failed else w.evaluations[-1].value for w in mine)
    verdict = _judge(mine, reference, metric)
    if name == REFERENCE and verdict.word in ("equivalent", "not tested"):
        verdict = replace(verdict, word="reference")
    turns = _turn_medians(mine)
    speedup, memory = {}, {}
    peak = _find_peak(mine)
    for rival in (r for r in by_arm if r not in (name, CONTROL)):
        theirs = _turn_medians(by_arm[rival])
        shared = [theirs[key] / ms for key, ms in turns.items() if key in theirs]
        if shared and not failed and not any(w.failed for w in by_arm[rival]):
            speedup[rival] = statistics.median(shared)
            memory[rival] = peak / _find_peak(by_arm[rival])
    evaluations = () if failed else _mean_evaluations(mine)
    times = list(turns.values()) or [math.nan]
    reached = [p.seconds for p in evaluations if (p.value >= target if metric.higher_is_better else p.value <= target)]
    return ArmResult(
        name=name, verdict=verdict.word, metric_mean=statistics.fmean(values),
        metric_sd=_spread(values), metrics=values,
        difference=verdict.difference, interval=verdict.interval,
        step_ms=statistics.median(times), step_ms_spread=(min(times), max(times)),
        peak_memory_bytes=peak, skipped_steps=sum(s.outcome.skipped for w in mine for s in w.steps),
        seconds_to_target=reached[0] if reached else None,
        setup_seconds=statistics.fmean(w.plan.seconds if w.plan else 0.0 for w in mine),
        speedup=speedup, memory_ratio=memory, loss=_mean_curve(mine), evaluations=evaluations, plan=mine[0].plan,
        harms=_mean_harms(mine), failure=failed,
    )  # fmt: skip


def _find_peak(workers: Sequence[_Worker]) -> int:
    """Bytes; 0 where none has lived to say it."""
    return max((w.end.peak_memory_bytes for w in workers if w.end), default=0)


def compare_repaired(
    first: ComparisonRecord, plan: Plan, compare_again: Callable[[Plan], ComparisonRecord]
) -> tuple[ComparisonRecord, Plan | None]:
    """A rehearsal's comparison with one arm more: the plan repaired by what its layers were seen to do, see `repair_plan`.

    plan: what the arm `halfstep` was trained under.
    compare_again: the same comparison under another plan, with the reference and the arm `halfstep`.

    Returns the record as it was and None where the plan needs no repair, or the harm of its layers suggests none.
    """
    ours = next((arm for arm in first.arms if arm.name == "halfstep"), None)
    if ours is None or ours.verdict in ("equivalent", "better"):
        return first, None
    repaired = repair_plan(plan, ours.harms)
    if repaired is plan:
        return first, None
    arm = next(arm for arm in compare_again(repaired).arms if arm.name == "halfstep")
    return replace(first, arms=(*first.arms, replace(arm, name=REPAIRED))), repaired


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
    died = "; ".join(w.failed for w in by_arm[CONTROL] if w.failed)
    return ComparisonRecord(
        recipe_name=recipe_name, recipe=recipe, metric=metric.name, unit=metric.unit,
        higher_is_better=metric.higher_is_better, margin=metric.margin, target=target, seeds=seeds,
        steps=settings.steps, machine=name_machine(), torch_version=torch.__version__, threads=torch.get_num_threads(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), seconds=time.perf_counter() - begin,
        command="", arms=results, control=died or f"{control.word}, {control.difference:+.3g} {metric.unit}",
        gate_works=_rejects(control, by_arm, metric),
        speedup=next((r.speedup for r in results if r.name == "halfstep"), {}),
        memory_ratio=next((r.memory_ratio for r in results if r.name == "halfstep"), {}),
    )  # fmt: skip
