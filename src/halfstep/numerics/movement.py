"""Which weights an update moves, and what it would take to move the others.

An update smaller than half a unit in the last place of its weight is rounded away, and the weight stands still however
long it is trained (Zamirai et al. 2020, arXiv 2010.06192, section 3). With p significant bits that floor is

    smallest step = 2^(floor(log2 |w|) - p)         p: fp32 24, kahan 17, split24 16, fp16 11, bf16 8

(From a power of two toward zero, where numbers lie twice as close, half of that is enough; a small compensation of `kahan`
has more than 17 bits.)

A weight is *stuck* in an update when its gradient was not zero and its value is the same before and after. A parameter
group *stalls* when half of its weights or more are stuck: its median weight does not move. What counts as the value:

    a master         its fp32 value, read back after it was written
    none             the weight itself: the optimizer works on it
    stochastic       what the optimizer made of it in fp32: rounding then moves it in the mean, however seldom

Momentum needs no exception: the first update of every torch optimizer has the gradient in it, later ones have those before
as well. An optimizer that rests a weight on purpose (Rprop, where a gradient changes its sign) has it counted as stuck. A
group whose learning rate is 0 does not stall, nor does one without gradients.

The update of a median weight is measured: behind a master by what the optimizer did in fp32; without one by letting a copy
of the optimizer, with its states, work on an fp32 copy of the sampled weights. An update is taken to be proportional to the
learning rate. All of it is done on a sample spread evenly over the group, so that watching costs the same for any model.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.numerics.formats import find_format
from halfstep.records import Stall

SAMPLE = 1 << 16  # weights of a group that are looked at
SIGNIFICANT_BITS = {"fp32": 24, "split": 24, "stochastic": 24, "kahan": 17, "split24": 16}  # of a master
FORMAT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

ELEMENTWISE = {
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.Adamax, torch.optim.AdamW, torch.optim.ASGD,
    torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
}  # fmt: skip
"""Optimizers known to treat a weight without regard to any other."""


def find_smallest_step(weight: float, storage: str, master: str) -> float:
    """The smallest change that can move a weight of that size: half a unit in its last place.

    Examples:
        >>> find_smallest_step(1.0, "bf16", "none"), find_smallest_step(1.5, "bf16", "split24")
        (0.00390625, 1.52587890625e-05)
    """
    format = find_format(storage)
    if master != "none":
        bits, floor = SIGNIFICANT_BITS[master], find_format("fp32").smallest_subnormal
    else:
        bits, floor = format.mantissa_bits + 1, format.smallest_subnormal
    _, exponent = math.frexp(weight)  # weight in [2^(exponent - 1), 2^exponent)
    return max(math.ldexp(1.0, exponent - 1 - bits), floor / 2) if weight else floor / 2


def sample_gradient(gradient: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Numbers of every `stride`-th element of a parameter that has a gradient, and the gradient there.

    A sparse gradient has elements where it has entries, whole rows for an embedding.

    Examples:
        >>> [found.tolist() for found in sample_gradient(torch.tensor([0.0, 1.0, 2.0]), 2)]
        [[0, 2], [0.0, 2.0]]
    """
    if gradient.is_sparse and gradient.sparse_dim() == 1:
        gradient = gradient.coalesce()
        values, width = gradient.values().reshape(-1), math.prod(gradient.shape[1:])
        picks = torch.arange(0, values.numel(), stride, device=values.device)
        return gradient.indices()[0][picks // width] * width + picks % width, values[picks]
    values = (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)
    picks = torch.arange(0, values.numel(), stride, device=values.device)
    return picks, values[picks]


def preview_update(optimizer: Optimizer, parameter: nn.Parameter, picks: Tensor) -> Tensor | None:
    """What an elementwise optimizer would add to these elements of a narrow parameter if it worked in fp32.

    The optimizer and its states stay as they are. None for other optimizers and for sparse gradients.
    """
    if type(optimizer) not in ELEMENTWISE or parameter.grad is None or parameter.grad.is_sparse:
        return None
    weight = parameter.detach().reshape(-1)[picks].to(torch.float32)
    sample = nn.Parameter(weight.clone())
    sample.grad = parameter.grad.reshape(-1)[picks].to(torch.float32)
    states: dict[str, Any] = {}
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor):
            belongs = value.shape == parameter.shape and key != "step"
            value = value.reshape(-1)[picks].to(torch.float32) if belongs else value.clone()
        states[key] = value
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    plain = {key: False for key in ("foreach", "fused", "capturable") if key in group}
    twin = copy.copy(optimizer)  # without hooks and without what a scheduler put around `step`
    twin.param_groups = [group | plain | {"params": [sample]}]
    twin.state = defaultdict(dict, {sample: states})
    twin.step()
    return sample.detach() - weight


@dataclass
class _Seen:
    """The sampled weights of one parameter on their way through an update."""

    group: int
    storage: str
    master: str
    picks: Tensor
    before: Tensor
    update: Tensor | None = None
    after: Tensor | None = None


class Watch:
    """Looks at one optimizer step; `judge` says which groups stall.

    Examples:
        >>> weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer = torch.optim.SGD([weight], lr=2**-10)
        >>> watch = Watch(optimizer, {weight: weight.grad})
        >>> watch.look_before(weight, torch.bfloat16, "none")
        >>> optimizer.step()
        >>> watch.look_after(weight)
        >>> [(stall.share, stall.learning_rate_needed) for stall in watch.judge()]
        [(1.0, 0.00390625)]
    """

    def __init__(self, optimizer: Optimizer, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        self._optimizer = optimizer
        groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        sizes: dict[int, int] = defaultdict(int)
        for parameter, gradient in gradients.items():
            sizes[groups[parameter]] += gradient._values().numel() if gradient.is_sparse else gradient.numel()
        self._strides = {group: max(1, math.ceil(size / SAMPLE)) for group, size in sizes.items()}
        self._seen: dict[nn.Parameter, _Seen] = {}

    def look_before(self, parameter: nn.Parameter, storage: torch.dtype, master: str) -> None:
        """Note the weights as the optimizer is about to find them; their gradient is in place."""
        group = next(
            i for i, one in enumerate(self._optimizer.param_groups) if any(p is parameter for p in one["params"])
        )
        if (
            storage not in FORMAT_NAMES
            or parameter.grad is None
            or not self._optimizer.param_groups[group].get("lr", 1)
        ):
            return
        picks, gradient = sample_gradient(parameter.grad, self._strides[group])
        picks = picks[gradient != 0]
        seen = _Seen(group, FORMAT_NAMES[storage], master, picks, self._take(parameter, picks))
        if master == "none" and storage != torch.float32:
            seen.update = preview_update(self._optimizer, parameter, picks)
        self._seen[parameter] = seen

    def look_after(self, parameter: nn.Parameter) -> None:
        """Note the weights as the optimizer left them, before they are narrowed."""
        if parameter in self._seen:
            seen = self._seen[parameter]
            seen.after = self._take(parameter, seen.picks)
            if seen.master != "none":
                seen.update = seen.after - seen.before

    def look_narrowed(self, parameter: nn.Parameter, read_at: Callable[[Tensor], Tensor]) -> None:
        """Note the weights as they are kept; `read_at` gives the fp32 values of elements by their number."""
        if parameter in self._seen and self._seen[parameter].master != "stochastic":
            self._seen[parameter].after = read_at(self._seen[parameter].picks)

    def forget(self, parameter: nn.Parameter) -> None:
        """Take back what was noted of a parameter."""
        self._seen.pop(parameter, None)

    @staticmethod
    def _take(parameter: nn.Parameter, picks: Tensor) -> Tensor:
        return parameter.detach().reshape(-1)[picks].to(torch.float32)

    def judge(self) -> tuple[Stall, ...]:
        """One record for each parameter group, format and master whose median weight did not move."""
        alike: dict[tuple[int, str, str], list[_Seen]] = defaultdict(list)
        for seen in self._seen.values():
            if seen.picks.numel():
                alike[seen.group, seen.storage, seen.master].append(seen)
        stalls = (self._judge(*key, seen) for key, seen in sorted(alike.items(), key=lambda item: item[0]))
        return tuple(stall for stall in stalls if stall.share >= 0.5)

    def _judge(self, group: int, storage: str, master: str, seen: list[_Seen]) -> Stall:
        lr = float(self._optimizer.param_groups[group].get("lr", math.nan))
        median = float(torch.cat([s.before.cpu() for s in seen]).abs().median())
        updates = [s.update.cpu() for s in seen if s.update is not None]
        update = float(torch.cat(updates).abs().median()) if updates else 0.0
        step = find_smallest_step(median, storage, master)
        return Stall(
            group=group, storage=storage, master=master, learning_rate=lr,
            weights=sum(s.picks.numel() for s in seen),
            stuck=sum(int((s.before == s.after).sum()) for s in seen if s.after is not None),
            median_weight=median, smallest_step=step, median_update=update or None,
            learning_rate_needed=lr * step / update if update and lr == lr else None,
        )  # fmt: skip
