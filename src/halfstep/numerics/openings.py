"""What an optimizer finds in the place of a narrow parameter: its fp32 truth, all of it or some rows, for the time of a step.

An optimizer that is known to find its parameters in its groups, and their states under them, is given a stand-in for each
wide parameter. Any other works on the parameter itself, whose data is wide for the time of the step. Both give the same
bits; but torch drops the node that accumulates a parameter's gradient, and the hooks that others have put there, when its
data changes dtype. DistributedDataParallel is such another: it would go on without averaging.

Rows: where a gradient is sparse and the optimizer works row by row, only the rows that have a gradient are widened, updated
and narrowed again, with their rows of the optimizer's states.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from halfstep.numerics.movement import Watch
from halfstep.numerics.truths import Truth, show

Places = Mapping[nn.Parameter, tuple[list[nn.Parameter], int]]  # parameter -> the list of its group, and where there


def match_states(optimizer: Optimizer, parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Bring an optimizer's states of a parameter to `dtype`, what the optimizer sees it in, as `match_state` does."""
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if key != "step":
            state[key] = match_state(value, parameter, dtype)


def match_state(state: Any, parameter: nn.Parameter, dtype: torch.dtype) -> Any:
    """A state of a parameter, or a nest of them, with its floating-point tensors as the optimizer wants them.

    Those of the parameter's shape come in `dtype` and with its strides, because fused kernels walk through memory, not through
    indices. Others, as rows and columns of a factored state, leave 16 bits where the parameter does; they are made narrow by
    nobody here, and single numbers stay as they are: optimizers keep those in fp32 whatever the parameter is in.

    Examples:
        >>> match_state([torch.ones(3).bfloat16(), 2], nn.Parameter(torch.ones(4)), torch.float32)
        [tensor([1., 1., 1.]), 2]
    """

    def match(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value.shape != parameter.shape:
            return value.to(dtype) if value.dim() and dtype == torch.float32 else value
        laid_out = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        is_so = value.is_sparse or value.stride() == laid_out.stride()
        return value.to(dtype) if is_so else laid_out.copy_(value)

    return tree_map(match, state)


@contextmanager
def substitute(optimizer: Optimizer, places: Places, parameter: nn.Parameter, weight: Tensor) -> Iterator[nn.Parameter]:
    """What the optimizer finds in a parameter's place inside the block: with that weight, and the parameter's states."""
    if parameter not in places:
        parameter.data = weight
        yield parameter
        return
    params, index = places[parameter]
    params[index] = wide = nn.Parameter(weight, requires_grad=parameter.requires_grad)
    if parameter in optimizer.state:
        optimizer.state[wide] = optimizer.state.pop(parameter)
    try:
        yield wide
    finally:
        params[index] = parameter
        if wide in optimizer.state:
            optimizer.state[parameter] = optimizer.state.pop(wide)


Opened = tuple[nn.Parameter, "Truth | None"]
"""What the optimizer finds in a parameter's place, and what that was read from."""


@contextmanager
def open_wide(parameter: nn.Parameter, gradient: Tensor) -> Iterator[Opened]:
    """A parameter that is wide anyway."""
    parameter.grad = gradient
    try:
        yield parameter, None
    finally:
        parameter.grad = None


@contextmanager
def open_whole(
    optimizer: Optimizer,
    places: Places,
    parameter: nn.Parameter,
    gradient: Tensor,
    opened: Truth,
    keys: tuple[int, int],
) -> Iterator[Opened]:
    """`opened` is the parameter's truth, or rows of it."""
    with substitute(optimizer, places, parameter, opened.read()) as wide:
        wide.grad = gradient
        try:
            yield wide, opened
        finally:
            wide.grad = None
            opened.update(wide.data, keys)
            show(parameter, opened.whole)


@contextmanager
def open_rows(
    optimizer: Optimizer,
    places: Places,
    parameter: nn.Parameter,
    gradient: Tensor,
    truth: Truth,
    keys: tuple[int, int],
) -> Iterator[Opened]:
    """Rows that have a gradient, as a parameter of their own with their rows of the states.

    States that the optimizer makes now begin as zeros in the other rows, as the optimizers of BY_ROWS make them.
    """
    rows, values = gradient.indices()[0], gradient.values()
    whole = {k: v for k, v in optimizer.state[parameter].items() if _is_like(v, parameter)}
    optimizer.state[parameter].update({key: value[rows] for key, value in whole.items()})
    numbers = torch.arange(len(rows), device=rows.device)[None]
    renumbered = torch.sparse_coo_tensor(numbers, values, values.shape, is_coalesced=True, check_invariants=True)
    try:
        with open_whole(optimizer, places, parameter, renumbered, truth.take_rows(rows), keys) as opened:
            yield opened
    finally:
        state = optimizer.state[parameter]
        for key in [key for key, value in state.items() if key in whole or _is_like(value, values)]:
            full = whole.get(key, torch.zeros_like(truth.live, dtype=torch.float32))
            state[key] = full.index_copy_(0, rows, state[key])


def _is_like(value: object, parameter: Tensor) -> bool:
    """Whether a state is one number for each of the parameter's."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape


def look_before(
    watcher: Watch,
    optimizer: Optimizer,
    places: Places,
    parameter: nn.Parameter,
    truth: Truth | None,
    gradient: Tensor,
    factor: float,
) -> nn.Parameter:
    """Let the watcher see a parameter as its optimizer would find it; returns what it saw."""
    storage, kind = (truth.live.dtype, truth.kind) if truth else (parameter.dtype, "none")
    weight = truth.read() if truth else parameter.detach()
    with substitute(optimizer, places, parameter, weight) as seen:
        seen.grad = gradient.to(torch.float32) * factor
        watcher.look_before(seen, storage, kind)
        seen.grad = None
    return seen
