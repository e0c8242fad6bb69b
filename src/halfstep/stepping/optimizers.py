"""The optimizers of a stepper, taken as one.

Their states follow the plan: in the precision that the optimizer sees a parameter in, which is fp32 where a truth is kept,
and in 8 bits between the steps where the plan says so. States that are loaded are brought to the same.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from halfstep.mechanisms.master_weights import MasterWeights, match_states
from halfstep.mechanisms.optimizer_states import NarrowStates
from halfstep.numerics.kernels import Kernels
from halfstep.numerics.openings import match_state
from halfstep.records import Stall


class Optimizers:
    """Steps several optimizers, each on its own parameters, as their masters have them.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> optimizers = Optimizers((torch.optim.SGD(layer.parameters(), lr=0.5),))
        >>> before = layer.bias.item()
        >>> with optimizers.at_rate(0.5):
        ...     _ = optimizers.step({layer.bias: torch.tensor([4.0])}, 1.0)
        >>> round(before - layer.bias.item(), 3)
        1.0
    """

    def __init__(self, optimizers: tuple[Optimizer, ...]) -> None:
        self.all, self.masters = optimizers, MasterWeights()
        self._states: dict[Optimizer, NarrowStates] = {}  # of a plan with states in 8 bits
        self._incoming: dict[str, Any] = {}  # state on its way in
        self._hooks = ExitStack()
        for optimizer in optimizers:
            self._hooks.callback(optimizer.register_load_state_dict_pre_hook(self._before_load).remove)
            self._hooks.callback(optimizer.register_load_state_dict_post_hook(self._after_load).remove)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What they move, in their order."""
        return [parameter for optimizer in self.all for parameter in list_parameters(optimizer)]

    def follow(self, masters: MasterWeights, *, narrow: bool = False) -> None:
        """Bring the states to the precision that these masters have the parameters in; narrow: kept in 8 bits."""
        self.masters = masters
        for states in self._states.values():
            states.undo()
        for optimizer in self.all:
            for parameter in list_parameters(optimizer):
                match_states(optimizer, parameter, self._find_dtype(parameter))
        self._states = {optimizer: NarrowStates(optimizer) for optimizer in self.all} if narrow else {}

    def step(self, gradients: dict[nn.Parameter, Tensor], factor: float, *, watch: bool = False) -> list[Stall]:
        """Each steps on its share of the gradients, times a factor; the gradients are used up."""
        stalls: list[Stall] = []
        for optimizer in self.all:
            share = gradients
            if len(self.all) > 1:
                share = {p: gradients.pop(p) for p in list_parameters(optimizer) if p in gradients}
            if share:
                stalls += self.step_one(optimizer, share, factor, watch=watch)
        return stalls

    def step_one(
        self, optimizer: Optimizer, gradients: dict[nn.Parameter, Tensor], factor: float = 1.0, *, watch: bool = False
    ) -> tuple[Stall, ...]:
        """One of them steps on gradients of its own parameters."""
        states = self._states.get(optimizer)
        return self.masters.step(optimizer, gradients, factor, watch=watch, widened=states.widened if states else None)

    def describe_updates(self) -> tuple[str, ...]:
        """What computes each optimizer's updates."""
        return tuple(
            f"{type(o).__name__}: {self.masters.describe_updates(o, narrow=o in self._states)}" for o in self.all
        )

    def list_kernels(self) -> tuple[Kernels, ...]:
        """Those that compute updates."""
        return tuple(k for o in self.all for k in self.masters.list_kernels(o, narrow=o in self._states))

    @contextmanager
    def widened(self) -> Iterator[None]:
        """Everything that an optimizer sees in fp32 inside the block, for one that is to be called as it is."""
        with ExitStack() as stack:
            for states in self._states.values():
                stack.enter_context(states.widened(self.parameters))
            stack.enter_context(self.masters.widened())
            yield

    @contextmanager
    def at_rate(self, factor: float) -> Iterator[None]:
        """Learning rates times a factor inside the block; schedulers never see it."""
        groups = [group for optimizer in self.all for group in optimizer.param_groups if "lr" in group]
        rates = [group["lr"] for group in groups]
        lent = rates if factor == 1.0 else [rate * factor for rate in rates]
        for group, rate in zip(groups, lent, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate, shown in zip(groups, rates, lent, strict=True):
                group["lr"] = rate if group["lr"] is shown else group["lr"] / factor  # an optimizer may set its own

    def close(self) -> None:
        """Look at no states that are loaded from now on."""
        self._hooks.close()

    def _find_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        return torch.float32 if parameter in self.masters else parameter.dtype

    def _before_load(self, _optimizer: Optimizer, state: dict[str, Any]) -> None:
        self._incoming = state

    def _after_load(self, optimizer: Optimizer) -> None:
        """Optimizer.load_state_dict has cast states to the 16 bits of their parameter, and left them the strides they were
        saved with: take them again, as the optimizer sees the parameter. Where that is in 16 bits too, states of other shapes
        are left as torch has them."""
        for saved, group in zip(self._incoming["param_groups"], optimizer.param_groups, strict=True):
            for index, parameter in zip(saved["params"], group["params"], strict=True):
                for key, value in self._incoming["state"].get(index, {}).items():
                    is_alike = isinstance(value, Tensor) and (value.dim() == 0 or value.shape == parameter.shape)
                    is_tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
                    if key != "step" and (is_alike or (is_tensors and parameter in self.masters)):
                        own = tree_map(partial(_copy_to, parameter.device), value)
                        optimizer.state[parameter][key] = match_state(own, parameter, self._find_dtype(parameter))
        self._incoming = {}
        if optimizer in self._states:
            self._states[optimizer].narrow(optimizer.state)


def _copy_to(device: torch.device, value: Any) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def list_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of all groups, in their order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def list_unheld(model: nn.Module, optimizers: Iterable[Optimizer]) -> tuple[str, ...]:
    """Names of the parameters of a model that require gradients and that no optimizer holds.

    Examples:
        >>> layer = nn.Linear(1, 1)
        >>> list_unheld(layer, [torch.optim.SGD([layer.weight], lr=0.1)])
        ('bias',)
    """
    held = {parameter for optimizer in optimizers for parameter in list_parameters(optimizer)}
    return tuple(name for name, p in model.named_parameters() if p.requires_grad and p not in held)
