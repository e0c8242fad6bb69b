"""A step of AdamW or Adam like the one before: what was looked at then, and has not changed since, is not looked at again.

`native_steps` looks at four or five tensors of every parameter in Python before a kernel is called. Of small tensors that costs
more than their arithmetic. In training the same parameters come step after step, so after a step that went through kernels as a
whole the following is kept, and the next step goes by it:

    order       the parameters with a gradient, of all groups, and of all states, in their order; compared by identity
    guards      type, dtype, device, shape and strides of weights, gradients and states; torch compares them in C++
    addresses   what a kernel is told; those of weights, gradients and states are read anew at every step

Gradients and states are taken from where they are at every step, so it does not matter that they are other tensors than before as
long as they look alike. Whatever differs sends the step through `native_steps`, before anything has moved.
"""

import ctypes
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from halfstep.numerics.native_steps import Alike, find_adam_numbers, find_group_reason, note_steps, sort_job
from halfstep.numerics.truths import Truth
from halfstep.numerics.updates import KERNELS, ROW, Weight, have_stepped_alike, list_addresses, run_adam_at, take

try:  # not a public part of torch: where it is missing, every step looks at every tensor
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]

NAMES = ("exp_avg", "exp_avg_sq", "step")  # of states, in the order of ROW
LIVE, GRADIENT, STATES = 0, 2, (3, 4, 5)  # columns of ROW

read_states, read_version, read_noted = itemgetter(*NAMES), attrgetter("_version"), attrgetter("version")


class RepeatedSteps:
    """The step that was last noted of each optimizer; a copy has none.

    Noting how everything looks costs more than a step. Where steps go on being unlike what was noted, as with gradients that
    come and go, it is done after the first, second, fourth, eighth ... of them, until two in a row are alike.

    Examples:
        >>> optimizer = AdamW([nn.Parameter(torch.ones(2))])
        >>> RepeatedSteps().take(optimizer, {}, 1.0)
        False
    """

    def __init__(self) -> None:
        self._noted: WeakKeyDictionary[Optimizer, RepeatedStep] = WeakKeyDictionary()
        self._alike: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()  # steps in a row
        self._unlike: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()  # steps since two were alike

    def __len__(self) -> int:
        return len(self._noted)

    def __reduce__(self) -> tuple[type["RepeatedSteps"], tuple[()]]:
        return type(self), ()

    def clear(self) -> None:
        """Forget what was noted: weights are kept in another way."""
        self._noted.clear()

    def take(self, optimizer: Optimizer, gradients: Mapping[nn.Parameter, Tensor], factor: float) -> bool:
        """Make the step, if it is like the one that was noted; where it is not, nothing was done."""
        noted = self._noted.get(optimizer)
        if noted is None or not noted.take(optimizer, gradients, factor):
            self._alike[optimizer], self._unlike[optimizer] = 0, self._unlike.get(optimizer, 0) + 1
            return False
        self._alike[optimizer] += 1
        if self._alike[optimizer] > 1:
            self._unlike[optimizer] = 0
        return True

    def note(
        self, optimizer: Optimizer, gradients: Mapping[nn.Parameter, Tensor], truths: Mapping[nn.Parameter, Truth]
    ) -> None:
        """After a step that `take` has left to kernels. A parameter that came alone was released: the next is another."""
        unlike = self._unlike[optimizer]
        if len(gradients) > 1 and not unlike & (unlike - 1):
            noted = RepeatedStep.of(optimizer, gradients, truths)
            if noted:
                self._noted[optimizer] = noted


class RepeatedStep:
    """What a step of an optimizer needs to be like the one before.

    Examples:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimizer = AdamW([weight])
        >>> RepeatedStep.of(optimizer, {weight: torch.ones(2)}, {}) is None  # it has no states yet
        True
    """

    def __init__(self, optimizer: Optimizer, gradients: Iterable[nn.Parameter], batches: "list[Batch]") -> None:
        self._given, self._listed, self._held = list(gradients), _list_parameters(optimizer), list(optimizer.state)
        self._sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._batches = batches

    @staticmethod
    def of(
        optimizer: Optimizer, gradients: Mapping[nn.Parameter, Tensor], truths: Mapping[nn.Parameter, Truth]
    ) -> "RepeatedStep | None":
        """After a step in which kernels updated all of `gradients`; None where the next one needs more than addresses."""
        if TensorGuards is None or type(optimizer) not in (AdamW, Adam):
            return None
        places = {parameter: place for place, parameter in enumerate(gradients)}
        held = {parameter: place for place, parameter in enumerate(optimizer.state)}
        batches = []
        for number, group in enumerate(optimizer.param_groups):
            members: dict[Alike, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter in gradients:
                    alike = _look(
                        parameter, truths.get(parameter), gradients[parameter], optimizer.state.get(parameter)
                    )
                    if alike is None:
                        return None
                    members[alike].append(parameter)
            for params in members.values():
                batch = Batch(number, params, [places[p] for p in params], [held[p] for p in params])
                batch.keep(truths, [gradients[p] for p in params], [optimizer.state[p] for p in params])
                batches.append(batch)
        return RepeatedStep(optimizer, gradients, batches)

    def take(self, optimizer: Optimizer, gradients: Mapping[nn.Parameter, Tensor], factor: float) -> bool:
        """Make the step, if it is like the one before; where it is not, nothing was done."""
        functions, groups, states = KERNELS.library.functions, optimizer.param_groups, optimizer.state
        same = (
            functions is not None
            and [len(group["params"]) for group in groups] == self._sizes
            and _are_same(_list_parameters(optimizer), self._listed)
            and _are_same(gradients, self._given)
            and _are_same(states, self._held)
            and not any(find_group_reason(optimizer, groups[batch.group]) for batch in self._batches)
        )
        if not same or functions is None:
            return False
        given, held = list(gradients.values()), list(states.values())
        if not all(batch.look(functions, given, held) for batch in self._batches):
            return False
        for batch in self._batches:
            batch.run(functions, groups[batch.group], factor)
            note_steps(optimizer, batch.jobs)
        return True


class Batch:
    """Parameters of a group that one call updates; places: of their gradients and states among those of the optimizer."""

    def __init__(self, group: int, params: list[nn.Parameter], places: list[int], held: list[int]) -> None:
        self.group, self._params, self._places, self._held = group, params, places, held

    def keep(
        self, truths: Mapping[nn.Parameter, Truth], gradients: list[Tensor], states: list[dict[str, Tensor]]
    ) -> None:
        """Note how everything looks now."""
        self._truths = [truths[p] for p in self._params if p in truths]  # of all of them, or of none
        weights = [Weight(p) for p in self._params]
        if self._truths:
            weights = [Weight(truth.live, truth.kept) for truth in self._truths]
        self.jobs = list(zip(self._params, weights, strict=True))
        self._half = gradients[0].dtype is torch.bfloat16
        tensors = [(w, g, *read_states(s)) for w, g, s in zip(weights, gradients, states, strict=True)]
        self._addresses = list_addresses(tensors)
        self._lives = self._addresses[LIVE::ROW]
        columns = zip(*map(read_states, states), strict=True)
        self._guards = TensorGuards(
            *self._params, *gradients, *chain(*columns), dynamic_dims_sizes=None, dynamic_dims_strides=None
        )

    def look(self, functions: ctypes.CDLL, given: Sequence[Tensor], held: Sequence[dict[str, Any]]) -> bool:
        """Whether everything looks as it did; addresses are those of now then."""
        if self._truths and list(map(read_version, self._params)) != list(map(read_noted, self._truths)):
            return False  # somebody has written to a live weight, which is the truth then
        try:
            states = list(zip(*[read_states(held[place]) for place in self._held], strict=True))
        except (KeyError, TypeError):
            return False
        gradients = [given[place] for place in self._places]
        if not self._guards.check(*self._params, *gradients, *chain(*states)):
            return False
        addresses = self._addresses
        columns: list[Sequence[Tensor]] = [self._params, gradients, *states]
        for column, tensors in zip((LIVE, GRADIENT, *STATES), columns, strict=True):
            addresses[column::ROW] = array("q", map(Tensor.data_ptr, tensors))
        if self._truths and addresses[LIVE::ROW] != self._lives:
            return False
        self._count = states[-1][0]
        return have_stepped_alike(functions, addresses)

    def run(self, functions: ctypes.CDLL, group: dict[str, Any], factor: float) -> None:
        """The update, after `look`."""
        numbers = find_adam_numbers(group, self._count.item() + 1, factor)
        run_adam_at(functions, self._addresses, self.jobs[0][1].storage, self._half, numbers)


def _are_same(now: Collection[Any], before: Collection[Any]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


def _list_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _look(
    parameter: nn.Parameter, truth: Truth | None, gradient: Tensor, state: Mapping[str, Any] | None
) -> Alike | None:
    """What has to be alike in one call; None where a kernel cannot take these tensors as they are."""
    weight = Weight(truth.live, truth.kept) if truth else Weight(parameter)
    found = [tensor for name in NAMES if state and isinstance(tensor := state.get(name), Tensor)]
    if len(found) < len(NAMES):
        return None
    exp_avg, exp_avg_sq, step = found
    if not step.is_cpu or step.dtype is not torch.float32 or take(weight, gradient, exp_avg, exp_avg_sq) is None:
        return None
    return sort_job(weight, gradient, step.item())
