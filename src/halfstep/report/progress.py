"""Progress while something runs: a bar on a terminal, a line an evaluation where there is none."""

import statistics
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from halfstep.errors import StallWarning
from halfstep.records import EndRecord, EvaluationRecord, PlanRecord, Record, StepRecord
from halfstep.report.tensorboard import TensorBoard
from halfstep.report.terminal import show_plan
from halfstep.training import Metric


def _make_bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console)


def follow_run(
    run: Iterable[Record], steps: int, metric: Metric, console: Console, tensorboard: Path | None
) -> EndRecord:
    """Drive a run to its end, showing loss, throughput, loss scale and skips."""
    recent: deque[StepRecord] = deque(maxlen=20)
    skips = 0
    with ExitStack() as stack:
        board = stack.enter_context(TensorBoard(tensorboard)) if tensorboard else None
        bar = stack.enter_context(_make_bar(console))
        stack.enter_context(warnings.catch_warnings(action="ignore", category=StallWarning))  # outcomes say the same
        line = bar.add_task("training", total=steps, note="")
        for record in run:
            if board is not None:
                board.write(record)
            match record:
                case StepRecord():
                    recent.append(record)
                    skips += record.outcome.skipped
                    elapsed = sum(r.milliseconds for r in recent)  # 0 when the clock was set back
                    rate = 1000 * sum(r.samples for r in recent) / elapsed if elapsed else 0.0
                    loss = statistics.fmean(r.loss for r in recent)
                    note = (
                        f"loss {loss:.4f}, {rate:,.0f} samples/s, scale {record.outcome.scale_after:g}, {skips} skipped"
                    )
                    bar.update(line, completed=record.step, note=note)
                    if record.outcome.skipped:
                        bar.console.print(f"step {record.step} skipped: {record.outcome.cause}")
                    for news in (record.outcome.recovery, *record.outcome.stalls):
                        if news:
                            bar.console.print(f"step {record.step}: {news}")
                case EvaluationRecord():
                    bar.console.print(
                        f"step {record.step}: {metric.name} {record.value:.4f} {metric.unit} after {record.train_seconds:.1f} s"
                    )
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
