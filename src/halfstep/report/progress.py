"""Progress while something runs: a bar on a terminal, a line an evaluation where there is none."""

import statistics
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from halfstep.errors import StallWarning
from halfstep.records import EndRecord, EvaluationRecord, PlanRecord, Record, StepRecord
from halfstep.report.tensorboard import TensorBoard
from halfstep.report.terminal import show_plan
from halfstep.training import Metric


class _Note(ProgressColumn):
    """The only column that gives way where the line is too long; what stands at its end goes first."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


def _make_bar(console: Console) -> Progress:
    """About thirty columns, so that eighty leave room for what the note says first."""
    return Progress(BarColumn(bar_width=10), MofNCompleteColumn(), TimeRemainingColumn(), _Note(), console=console)


@dataclass
class _Skips:
    """Tells of the first skipped step, and now and then how many more there were."""

    count: int = 0
    untold: int = 0
    last: StepRecord | None = None

    def note(self, record: StepRecord) -> str:
        """What to say at once of a step; empty for nothing."""
        if not record.outcome.skipped:
            return ""
        self.count, self.last = self.count + 1, record
        if self.count == 1:
            return f"step {record.step} skipped: {record.outcome.cause}"
        self.untold += 1
        return ""

    def summarise(self) -> str:
        """What has not been told yet, once; empty for nothing."""
        if not self.untold or self.last is None:
            return ""
        more, self.untold = self.untold, 0
        steps = "1 more step" if more == 1 else f"{more} more steps"
        return f"{steps} skipped, the last is step {self.last.step}: {self.last.outcome.cause}"


def _describe(recent: Iterable[StepRecord], skipped: int) -> str:
    """The note of a run, what matters most first: at eighty columns the end may be cut off."""
    recent = list(recent)
    elapsed = sum(r.milliseconds for r in recent)  # 0 when the clock was set back
    rate = 1000 * sum(r.samples for r in recent) / elapsed if elapsed else 0.0
    scale = recent[-1].outcome.scale_after
    words = [f"loss {statistics.fmean(r.loss for r in recent):.4f}"]
    words += [f"{skipped} skipped"] * (skipped > 0) + [f"scale {scale:g}"] * (scale != 1.0)
    return ", ".join([*words, f"{rate:,.0f} samples/s"])


def follow_run(
    run: Iterable[Record], steps: int, metric: Metric, console: Console, tensorboard: Path | None
) -> EndRecord:
    """Drive a run to its end, showing loss, skips, loss scale and throughput."""
    recent: deque[StepRecord] = deque(maxlen=20)
    skips = _Skips()
    with ExitStack() as stack:
        board = stack.enter_context(TensorBoard(tensorboard)) if tensorboard else None
        bar = stack.enter_context(_make_bar(console))
        stack.enter_context(warnings.catch_warnings(action="ignore", category=StallWarning))  # outcomes say the same
        line = bar.add_task("training", total=steps, note="")

        def tell(*news: str) -> None:
            for one in filter(None, news):
                bar.console.print(one)

        stack.callback(lambda: tell(skips.summarise()))  # also of a run that fails
        for record in run:
            if board is not None:
                board.write(record)
            match record:
                case StepRecord():
                    recent.append(record)
                    tell(skips.note(record))
                    bar.update(line, completed=record.step, note=_describe(recent, skips.count))
                    outcome = record.outcome
                    tell(*(f"step {record.step}: {news}" for news in (outcome.recovery, *outcome.stalls) if news))
                case EvaluationRecord():
                    value = f"{metric.name} {record.value:.4f} {metric.unit}"
                    tell(skips.summarise(), f"step {record.step}: {value} after {record.train_seconds:.1f} s")
                case PlanRecord():
                    bar.console.print(show_plan(record))
                case EndRecord():
                    return record
    raise AssertionError("a run ends with an EndRecord")


@contextmanager
def follow_comparison(total: int, console: Console) -> Iterator[Callable[[int, str, Record], None]]:
    """Yields what `comparison.compare` calls with every record of every arm: a bar, or lines where there is no terminal."""
    if not console.is_terminal:

        def tell(seed: int, arm: str, record: Record) -> None:
            if isinstance(record, EvaluationRecord):
                console.print(f"seed {seed}, {arm}, step {record.step}: {record.metric} {record.value:.4f}")

        yield tell
        return
    with _make_bar(console) as bar:
        line = bar.add_task("comparing", total=total, note="")

        def notify(seed: int, arm: str, record: Record) -> None:
            if isinstance(record, StepRecord):
                bar.update(
                    line, advance=1, note=f"seed {seed}, {arm}: loss {record.loss:.3f}, {record.milliseconds:.0f} ms"
                )

        yield notify
