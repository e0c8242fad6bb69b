"""Everything that a step moves, copied at one moment and put back at another: weights in their full precision, buffers,
optimizer states and hyperparameters, schedules. In memory, on the device it came from; `checkpoint` is for the disk."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map

Buffers = dict[tuple[nn.Module, str], Tensor | None]  # (module that owns it, its name there) -> value


class Truths(Protocol):
    """What keeps the full precision of weights that are narrow; `mechanisms.master_weights.MasterWeights` is one."""

    def __contains__(self, parameter: object) -> bool: ...

    def read(self, parameter: nn.Parameter) -> Tensor: ...

    def write(self, parameter: nn.Parameter, value: Tensor) -> None: ...


class Snapshot:
    """The state at the moment it was made.

    Args:
        model: whose parameters and buffers are copied; None leaves it at the parameters that the optimizers hold.
        truths: read and written in place of the parameters that it contains.
        optimizers: with those that they hold as attributes, as SAM and Lookahead do.
        schedulers: whose state is copied, if they have one to give.

    Examples:
        >>> layer = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> before = layer.weight.item()
        >>> snapshot = Snapshot(layer, optimizers=[optimizer])
        >>> _ = nn.init.zeros_(layer.weight)
        >>> snapshot.put_back(); layer.weight.item() == before
        True
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        truths: Truths | None = None,
        optimizers: Iterable[Optimizer] = (),
        schedulers: Iterable[LRScheduler] = (),
    ) -> None:
        self._truths = truths
        self._optimizers, self._schedulers = (
            _find_nested(optimizers),
            [s for s in schedulers if hasattr(s, "state_dict")],
        )
        held = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
        parameters = dict.fromkeys([*(model.parameters() if model else ()), *held])
        self._weights = {
            p: truths.read(p) if truths is not None and p in truths else p.detach().clone() for p in parameters
        }
        self.buffers = copy_buffers(find_owners(model)) if model else {}
        self._states = [{p: _copy(state) for p, state in o.state.items()} for o in self._optimizers]
        self._groups = [[_copy_settings(group) for group in o.param_groups] for o in self._optimizers]
        self._schedules = [copy.deepcopy(s.state_dict()) for s in self._schedulers]
        self.others: list[Callable[[], None]] = []  # put back what the owner of this snapshot has copied beside it

    @torch.no_grad()
    def put_back(self) -> None:
        """Make everything what it was. May be called again later: nothing of the copy is given away.

        Parameters and groups that an optimizer was given since stay with it, as they are.
        """
        for parameter, value in self._weights.items():
            if self._truths is not None and parameter in self._truths:
                self._truths.write(parameter, value)
            else:
                parameter.copy_(value)
        put_back_buffers(self.buffers)
        for put_back in self.others:
            put_back()
        for optimizer, states, groups in zip(self._optimizers, self._states, self._groups, strict=True):
            added = {
                p: state for p, state in optimizer.state.items() if isinstance(p, Tensor) and p not in self._weights
            }
            optimizer.state.clear()
            optimizer.state.update({p: _copy(state) for p, state in states.items()} | added)
            for group, settings in zip(optimizer.param_groups, groups, strict=False):
                for key in group.keys() - settings.keys() - {"params"}:
                    del group[key]
                group.update(_copy(settings))
        for scheduler, state in zip(self._schedulers, self._schedules, strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))


def _find_nested(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Optimizers, and those that they hold as attributes."""
    found: dict[Optimizer, None] = {}
    waiting = list(optimizers)[::-1]
    while waiting:
        optimizer = waiting.pop()
        if optimizer not in found:
            found[optimizer] = None
            waiting += [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    return list(found)


def _copy(value: Any) -> Any:
    """A copy in which parameters are the same objects, and no tensor belongs to a graph."""

    def copy_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, nn.Parameter) else leaf.detach().clone()
        return copy.deepcopy(leaf)

    return tree_map(copy_leaf, value)


def _copy_settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) for key, value in group.items() if key != "params"}


def find_owners(model: nn.Module) -> list[nn.Module]:
    """The modules that have buffers."""
    return [module for module in model.modules() if module._buffers]


def copy_buffers(owners: Iterable[nn.Module]) -> Buffers:
    """A copy of every buffer, by the place where it stands: modules may put another tensor there."""
    return {(m, name): None if b is None else b.clone() for m in owners for name, b in m._buffers.items()}


@torch.no_grad()
def put_back_buffers(copies: Buffers) -> None:
    """Write the values that `copy_buffers` took back."""
    for (module, name), value in copies.items():
        buffer = module._buffers.get(name)
        if value is None:
            module._buffers[name] = None
        elif buffer is None or buffer.shape != value.shape:
            module._buffers[name] = value.clone()
        else:
            buffer.copy_(value)
