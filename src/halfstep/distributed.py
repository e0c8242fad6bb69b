"""The other processes that train the same model: what must be the same on all of them, and the few numbers exchanged for it.

Data parallelism keeps its replicas equal by doing the same to all of them, from gradients that were averaged. So every
decision about a step has to be the same everywhere: whether it is applied, how the loss scale moves, what a recovery
policy does, which plan "auto" means. The engine is torch.distributed; this module holds every call of it. What decides takes
a `Ranks` as an argument and never asks which one it is.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

T = TypeVar("T")


class Ranks(Protocol):
    """Processes that take their steps together. All of them call the same of these, in the same order."""

    @property
    def size(self) -> int: ...

    def maximize(self, numbers: Tensor) -> Tensor:
        """Elementwise the largest over all ranks."""

    def average(self, numbers: Tensor) -> Tensor:
        """Elementwise the mean over all ranks."""

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of the ranks; anything that pickles."""


@dataclass(frozen=True)
class Alone:
    """A process by itself: also one among many that train models of their own, for `prepare(..., ranks=Alone())`.

    Examples:
        >>> Alone().maximize(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """

    size: int = field(default=1, init=False)

    def maximize(self, numbers: Tensor) -> Tensor:
        return numbers

    def average(self, numbers: Tensor) -> Tensor:
        return numbers

    def gather(self, value: T) -> list[T]:
        return [value]


@dataclass(frozen=True)
class Group:
    """The ranks of a process group; None is all that torch.distributed knows of."""

    group: Any = None

    @property
    def size(self) -> int:
        return torch.distributed.get_world_size(self.group)

    def maximize(self, numbers: Tensor) -> Tensor:
        largest = numbers.clone()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, self.group)
        return largest

    def average(self, numbers: Tensor) -> Tensor:
        mean = numbers.clone()
        torch.distributed.all_reduce(mean, torch.distributed.ReduceOp.SUM, self.group)
        return mean / self.size

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, self.group)
        return values


def find_ranks() -> Ranks:
    """All processes where torch.distributed has been initialised for several, else this one alone.

    Examples:
        >>> find_ranks()
        Alone(size=1)
    """
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Group() if known and torch.distributed.get_world_size() > 1 else Alone()


def is_wrapped(model: nn.Module) -> bool:
    """Whether a model is one of torch's data-parallel wrappers."""
    return isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)


def is_inside_wrapper() -> bool:
    """Whether a forward pass of DistributedDataParallel is running."""
    return nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds only parts of the parameters: torch's FSDP, or distributed tensors."""
    units = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return units or any(hasattr(parameter, "to_local") for parameter in model.parameters())


def communicates(model: nn.Module) -> bool:
    """Whether a forward pass of the model itself waits for other ranks, so that none may run it by itself."""
    return find_ranks().size > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
