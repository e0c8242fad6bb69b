"""Steps of torch's SparseAdam, Adagrad and SGD with sparse gradients by the kernels of `rows`: what may take that way, and how.

As in `native_steps`, of which this is the other half, the optimizer stays the owner of its states and hyperparameters, and its
`step` has to be torch's own. Besides:

    SGD without momentum and weight decay    its momentum is sparse too, and moves rows of earlier gradients
    Adagrad without weight decay             which torch refuses with sparse gradients, as it does fused=True
    tables that lie in memory row by row     with fp32 states like them; gradients that name whole rows

All tables of a group whose weights are kept alike are one call.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Optimizer

from halfstep.numerics.native_steps import ROW_KINDS, Alike, Job, find_switch, note_steps, sort_job
from halfstep.numerics.rows import KERNELS, RowStep, Table, run_rows, take_table
from halfstep.numerics.updates import Weight

MOMENTS = ("exp_avg", "exp_avg_sq")
UNFIT: dict[type[Optimizer], tuple[str, ...]] = {
    SGD: ("momentum", "weight_decay", "fused"),
    Adagrad: ("weight_decay", "fused"),
}


def find_rows_reason(optimizer: Optimizer, group: dict[str, Any]) -> str:
    """Why the parameters of a group that have sparse gradients are left to torch; empty where they are not.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], momentum=0.9)
        >>> find_rows_reason(optimizer, optimizer.param_groups[0])
        'momentum=0.9 has no kernel for sparse gradients'
    """
    if type(optimizer) not in ROW_KINDS:
        return f"{type(optimizer).__name__} has no kernel for sparse gradients"
    unfit = next((name for name in UNFIT.get(type(optimizer), ()) if group.get(name)), "")
    if unfit:
        return f"{unfit}={group[unfit]} has no kernel for sparse gradients"
    return find_switch(group) or ("" if KERNELS.library.functions else KERNELS.library.why)


def step_rows(optimizer: Optimizer, group: dict[str, Any], jobs: Sequence[Job], factor: float) -> list[nn.Parameter]:
    """One update of the rows that gradients name, for parameters of a group for which there is no reason against it. Returns
    those that were updated; with the others, whose tensors do not fit, nothing was done."""
    batches: dict[Alike, list[tuple[Job, Table, dict[str, Tensor]]]] = defaultdict(list)
    for job in jobs:
        parameter, weight, gradient = job
        state = _take_states(optimizer, parameter, weight)
        table = None if state is None else take_table(weight, gradient, *state.values())
        if table is not None and state is not None:
            batches[sort_job(weight, table.values, _read_count(optimizer, parameter))].append((job, table, state))
    done: list[Job] = []
    functions = KERNELS.library.functions
    for (_, _, count), batch in batches.items():
        numbers = _find_numbers(optimizer, group, batch[0][0][1], count, factor)
        if functions is None or not run_rows(functions, [table for _, table, _ in batch], numbers):
            continue
        for job, _, state in batch:
            if state:
                _keep_states(optimizer, job[0], state)
            done.append(job)
    note_steps(optimizer, done)
    return [parameter for parameter, *_ in done]


def _take_states(optimizer: Optimizer, parameter: nn.Parameter, weight: Weight) -> dict[str, Tensor] | None:
    """The states of a parameter's numbers, those that torch begins with where there are none; None where they are others."""
    if type(optimizer) is SGD:
        return {}
    state = optimizer.state.get(parameter, {})
    if type(optimizer) is Adagrad:
        found = {"sum": state.get("sum")}
    elif not state:
        return {name: torch.zeros_like(weight.live, dtype=torch.float32, requires_grad=False) for name in MOMENTS}
    else:
        found = {name: state.get(name) for name in MOMENTS}
    if not all(isinstance(value, Tensor) for value in found.values()):
        return None
    narrow = weight.rest is not None  # torch may have made them like the live weight
    return {name: value.to(torch.float32) if narrow else value for name, value in found.items()}


def _keep_states(optimizer: Optimizer, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
    held = optimizer.state[parameter]
    held.setdefault("step", 0)
    held.update(state)
    held["step"] += 1


def _read_count(optimizer: Optimizer, parameter: nn.Parameter) -> float:
    """The number of this step, from 1."""
    return float(optimizer.state.get(parameter, {}).get("step", 0)) + 1


def _find_numbers(optimizer: Optimizer, group: dict[str, Any], weight: Weight, count: float, factor: float) -> RowStep:
    lr = group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
    if type(optimizer) is SGD:
        return RowStep.of_sgd(lr=lr, each=weight.rest is None, factor=factor)
    if type(optimizer) is Adagrad:
        return RowStep.of_adagrad(lr=lr, lr_decay=group["lr_decay"], eps=group["eps"], count=count, factor=factor)
    return RowStep.of_adam(lr=lr, betas=group["betas"], eps=group["eps"], count=count, factor=factor)
