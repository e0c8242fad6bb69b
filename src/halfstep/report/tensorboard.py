"""Records as TensorBoard events: loss, learning rate, loss scale, step time, held-out metric."""

import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Self

from halfstep.errors import MissingExtraError, RecordError
from halfstep.records import EvaluationRecord, Record, StepRecord


class TensorBoard:
    """Writes records into a folder that TensorBoard reads. Raises MissingExtraError when tensorboard is not installed."""

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingExtraError("tensorboard", "tensorboard", "writing TensorBoard events")
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            raise RecordError(f"{folder} cannot be written ({error.strerror}); give another --tensorboard") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, record: Record) -> None:
        """Add what a record holds; other records than steps and evaluations are passed over."""
        if isinstance(record, StepRecord):
            values = {
                "train/loss": record.loss, "train/learning_rate": record.learning_rate,
                "train/step_ms": record.milliseconds, "train/loss_scale": record.outcome.scale_after,
                "train/skipped": float(record.outcome.skipped),
            }  # fmt: skip
        elif isinstance(record, EvaluationRecord):
            values = {f"held_out/{record.metric.replace(' ', '_')}": record.value}
        else:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, record.step)
