"""What a workload is: models, optimizers, batches and a loss, the same for every arm; arms differ only in how a step is made.

    models, optimizers    built by the workload from the seed; the arm says whether optimizers are fused
    step                  batch -> loss -> `Trainer.step`; loops with several networks write their own `take_step`
    evaluate              mean loss over held-out batches, in the precision of the arm

The margin of a verdict is a share of what training in fp32 has gained, the same for all workloads and fixed before any was
run: MARGIN_SHARE of the fall of the held-out loss, from the weights that training begins with to those of the last step. A
result within 2 % of the gain is one that the next few steps of training would hide.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MARGIN_SHARE = 0.02  # of the fall of the held-out loss in fp32
HELD_OUT = 1_000_000  # step number of the first held-out batch; no training goes so far
Models = dict[str, nn.Module]


class Trainer(Protocol):
    """How an arm trains one network."""

    model: nn.Module

    def autocast(self) -> AbstractContextManager[object]:
        """What the forward pass and the loss run under."""

    def step(self, loss: Tensor) -> None:
        """Backward, update, and gradients cleared."""


class Workload:
    """Base of all workloads. `batch_size` is the number of samples, sequences or rows in a batch."""

    name = ""
    about = ""
    batch_size = 0
    held_out_batches = 4

    def __init__(self, seed: int, *, small: bool = False) -> None:
        self.seed = seed
        if small:
            self.shrink()
        self.prepare_data()

    def shrink(self) -> None:
        """Set the sizes of a test."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Make what batches are drawn from; the same in every round."""

    def build_model(self) -> nn.Module:
        raise NotImplementedError

    def build_models(self) -> Models:
        """Network by name, from the seed alone."""
        torch.manual_seed(self.seed)
        return {"model": self.build_model()}

    def build_optimizers(self, models: Models, *, fused: bool) -> dict[str, list[Optimizer]]:
        """Optimizers of each network. Constructors are plain unless `fused` is asked for."""
        raise NotImplementedError

    def draw_batch(self, noise: torch.Generator) -> Any:
        raise NotImplementedError

    def make_batch(self, step: int) -> Any:
        """A batch that depends on seed and step alone."""
        return self.draw_batch(torch.Generator().manual_seed(self.seed * 10_000_019 + step))

    def make_held_out(self, number: int) -> Any:
        """A batch that no training sees; other rounds have others."""
        return self.make_batch(HELD_OUT + number)

    def measure_loss(self, model: nn.Module, batch: Any) -> Tensor:
        raise NotImplementedError

    def take_step(self, trainers: dict[str, Trainer], batch: Any) -> Tensor:
        """One training step."""
        (trainer,) = trainers.values()
        with trainer.autocast():
            loss = self.measure_loss(trainer.model, batch)
        trainer.step(loss)
        return loss.detach()

    def measure_held_out(self, trainers: dict[str, Trainer], batch: Any) -> Tensor:
        """What is judged; the loss, unless the loss of a workload does not fall."""
        (trainer,) = trainers.values()
        return self.measure_loss(trainer.model, batch)

    def evaluate(self, trainers: dict[str, Trainer]) -> float:
        """Mean over the held-out batches."""
        models = [trainer.model for trainer in trainers.values()]
        for model in models:
            model.eval()
        values = []
        with torch.no_grad(), ExitStack() as stack:
            for trainer in trainers.values():
                stack.enter_context(trainer.autocast())
            for number in range(self.held_out_batches):
                values.append(float(self.measure_held_out(trainers, self.make_held_out(number))))
        for model in models:
            model.train()
        return sum(values) / len(values)


def ask_fused(fused: bool) -> dict[str, Any]:
    """Arguments of a constructor: none at all for the plain one."""
    return {"fused": True} if fused else {}


def has_fallen(start: float, values: Sequence[float], share: float = 0.05) -> bool:
    """Whether held-out losses ended below their start by a share of it, every one: else a verdict means nothing."""
    return all(value < (1 - share) * start for value in values)
