"""Everything that a step moves, copied at one moment and put back at another: weights in their full precision, buffers,
optimizer states and hyperparameters, schedules. In memory, on the device it came from; `checkpoint` is for the disk."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from halfstep.mechanisms.master_weights import MasterWeights

Buffers = dict[tuple[nn.Module, str], Tensor]  # (module that owns it, its name there) -> value


class Snapshot:
    """The state at the moment it was made.

    Examples:
        >>> layer = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> before = layer.weight.item()
        >>> snapshot = Snapshot(layer, MasterWeights(), [optimizer])
        >>> _ = nn.init.zeros_(layer.weight)
        >>> snapshot.put_back(); layer.weight.item() == before
        True
    """

    def __init__(
        self,
        model: nn.Module,
        masters: MasterWeights,
        optimizers: Iterable[Optimizer],
        schedulers: Iterable[LRScheduler] = (),
    ) -> None:
        self._masters = masters
        self._optimizers, self._schedulers = list(optimizers), list(schedulers)
        held = [p for o in self._optimizers for group in o.param_groups for p in group["params"]]
        parameters = dict.fromkeys([*model.parameters(), *held])
        self._weights = {p: masters.read(p) if p in masters else p.detach().clone() for p in parameters}
        self.buffers = copy_buffers(find_owners(model))
        self._states = [{p: copy.deepcopy(state) for p, state in o.state.items()} for o in self._optimizers]
        self._groups = [[_copy_settings(group) for group in o.param_groups] for o in self._optimizers]
        self._schedules = [copy.deepcopy(s.state_dict()) for s in self._schedulers]

    @torch.no_grad()
    def put_back(self) -> None:
        """Make everything what it was. May be called again later: nothing of the copy is given away."""
        for parameter, value in self._weights.items():
            self._masters.write(parameter, value)
        put_back_buffers(self.buffers)
        for optimizer, states, groups in zip(self._optimizers, self._states, self._groups, strict=True):
            for parameter in [p for p in optimizer.state if p in self._weights]:
                del optimizer.state[parameter]
            optimizer.state.update({p: copy.deepcopy(state) for p, state in states.items()})
            for group, settings in zip(
                optimizer.param_groups, groups, strict=False
            ):  # groups may have been added since
                group.update(copy.deepcopy(settings))
        for scheduler, state in zip(self._schedulers, self._schedules, strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))


def _copy_settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def find_owners(model: nn.Module) -> list[nn.Module]:
    """The modules that have buffers."""
    return [module for module in model.modules() if module._buffers]


def copy_buffers(owners: Iterable[nn.Module]) -> Buffers:
    """A copy of every buffer, by the place where it stands: modules may put another tensor there."""
    return {(m, name): b.clone() for m in owners for name, b in m._buffers.items() if b is not None}


@torch.no_grad()
def put_back_buffers(copies: Buffers) -> None:
    """Write the values that `copy_buffers` took back."""
    for (module, name), value in copies.items():
        buffer = module._buffers.get(name)
        if buffer is None or buffer.shape != value.shape:
            module._buffers[name] = value.clone()
        else:
            buffer.copy_(value)
