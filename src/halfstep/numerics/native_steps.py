"""Steps of torch's AdamW, Adam and SGD by the kernels of `updates`: what may take that way, and how. `native_rows` does the same
for sparse gradients, by those of `rows`.

The optimizer stays the owner of its states and hyperparameters: states are made, named and typed as torch makes them, so that a
`state_dict()` goes either way. Only the arithmetic is done elsewhere, and it gives torch's bits: those of its loops, or of its
fused kernels where a group says `fused=True` (`updates` says for which numbers). So an optimizer goes this way only where nobody
would see that its `step` was not called:

    the type is one of KINDS itself          a subclass may do anything in `step`
    `step` is torch's                        a scheduler's counter around it is told; anything else around it must be called
    no hooks before or after a step          they may look at gradients or change them
    no amsgrad, maximize, differentiable, capturable; numbers as hyperparameters
    fp32 states, gradients in 16 bits or fp32, all dense and in the same order in memory
    states in 8 bits: AdamW's and Adam's, of weights that lie in memory row by row, as codes do

A kernel is called once for all parameters of a group whose weights are kept alike, whose gradients have the same width, and which
have taken as many steps: of a model of many small tensors, calls would cost more than the arithmetic.
"""

import ctypes
import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, SparseAdam
from torch.optim import optimizer as torch_optimizer

from halfstep.numerics.codebooks import SMALLEST, Quantized, make_zeros
from halfstep.numerics.updates import (
    BEGINS,
    GOES_ON,
    KERNELS,
    NONE,
    AdamStep,
    SgdStep,
    Tensors,
    Weight,
    run_adam,
    run_adam_narrow,
    run_sgd,
    take,
    take_narrow,
)

KINDS = (AdamW, Adam, SGD)
ROW_KINDS = (SparseAdam, Adagrad, SGD)  # for sparse gradients
Job = tuple[nn.Parameter, Weight, Tensor]
"""A parameter, how its value is kept, and its gradient."""

Alike = tuple[torch.dtype | None, torch.dtype, float]
"""Dtypes of what is kept beside a weight and of its gradient, and the number of its step."""

SWITCHES = ("amsgrad", "maximize", "differentiable", "capturable")
NUMBERS = ("betas", "eps", "weight_decay", "momentum", "dampening")


def find_reason(optimizer: Optimizer) -> str:
    """Why an optimizer has to step by itself; empty where its arithmetic may be done here.

    Examples:
        >>> find_reason(torch.optim.RMSprop([torch.zeros(1)]))
        'RMSprop has no kernel'
    """
    if type(optimizer) not in (*KINDS, *ROW_KINDS):
        return f"{type(optimizer).__name__} has no kernel"
    if not _steps_as_torch_does(optimizer):
        return f"{type(optimizer).__name__}.step was replaced"
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    everywhere = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    if any(len(hooks) for hooks in (*own, *everywhere)):
        return "the optimizer has step hooks"
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        return "a GradScaler has left its scale to the optimizer"
    return ""


def _steps_as_torch_does(optimizer: Optimizer) -> bool:
    kind, own = type(optimizer).step, vars(optimizer).get("step")
    if not inspect.unwrap(kind).__module__.startswith("torch.optim."):
        return False
    return own is None or (hasattr(own, "_wrapped_by_lr_sched") and getattr(own, "__wrapped__", None) is kind)


def find_group_reason(optimizer: Optimizer, group: dict[str, Any]) -> str:
    """Why the parameters of a group that have dense gradients are left to torch; empty where they are not.

    Examples:
        >>> optimizer = torch.optim.Adam([torch.zeros(1)], amsgrad=True)
        >>> find_group_reason(optimizer, optimizer.param_groups[0])
        'amsgrad=True has no kernel'
    """
    if type(optimizer) not in KINDS:
        return f"{type(optimizer).__name__} has no kernel for dense gradients"
    return find_switch(group) or ("" if KERNELS.library.functions else KERNELS.library.why)


def find_narrow_reason(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, *, sparse: bool = False) -> str:
    """Why a parameter of a group that has kernels is left to torch where states are kept in 8 bits; empty where it is not.

    sparse: whether its gradients are.

    Examples:
        >>> weight = torch.zeros(64, 64)
        >>> optimizer = torch.optim.SGD([weight], momentum=0.9)
        >>> find_narrow_reason(optimizer, optimizer.param_groups[0], weight)
        'momentum in 8 bits has no kernel'
    """
    if parameter.numel() < SMALLEST:
        return ""  # its states are fp32
    if type(optimizer) is SGD:
        return "momentum in 8 bits has no kernel" if group["momentum"] else ""
    if sparse:
        return "8-bit states have no kernel for sparse gradients"
    return "" if parameter.is_contiguous() else "8-bit states have no kernel for weights that do not lie row by row"


def find_switch(group: dict[str, Any]) -> str:
    """What hyperparameters ask for that no kernel does; empty where there is nothing."""
    switched = [name for name in SWITCHES if group.get(name)]
    if switched:
        return f"{switched[0]}=True has no kernel"
    lr = group["lr"]
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or lr.numel() != 1 or lr.requires_grad):
        return "lr is a tensor on another device"
    values = [v for name in NUMBERS if name in group for v in (group[name] if name == "betas" else (group[name],))]
    return "" if all(isinstance(v, int | float) for v in values) else "a hyperparameter is a tensor"


def step_natively(
    optimizer: Optimizer, group: dict[str, Any], jobs: Sequence[Job], factor: float, *, narrow: bool = False
) -> list[nn.Parameter]:
    """One update of parameters of a group for which there is no reason against it. Returns those that were updated; with the
    others, whose tensors do not fit, nothing was done.

    narrow: states of large parameters are in 8 bits, also those that begin here.
    """
    functions, done = KERNELS.library.functions, []
    if functions and type(optimizer) is SGD:
        done = _step_sgd(functions, optimizer, group, jobs, factor)
    elif functions:
        done = _step_adam(functions, optimizer, group, jobs, factor, narrow=narrow)
    note_steps(optimizer, done)
    return [parameter for parameter, *_ in done]


def note_steps(optimizer: Optimizer, jobs: Sequence[Job | tuple[nn.Parameter, Weight]]) -> None:
    """What others see of a step of torch's own: that weights changed in place, and what a scheduler's counter notes."""
    torch.autograd.graph.increment_version([job[0] for job in jobs if job[1].rest is None])
    if "step" in vars(optimizer):
        optimizer._opt_called = True  # type: ignore[attr-defined]


def _align(weight: Weight, gradient: Tensor, *states: Any) -> Tensor | None:
    """The gradient, laid out like its weight if it lies in memory otherwise; None where there is no kernel even so."""
    fits = take_narrow if any(isinstance(state, Quantized) for state in states) else take
    if fits(weight, gradient, *states):
        return gradient
    if gradient.layout is not torch.strided or gradient.stride() == weight.live.stride():
        return None
    gradient = torch.empty_like(weight.live, dtype=gradient.dtype, requires_grad=False).copy_(gradient)
    return gradient if fits(weight, gradient, *states) else None


def sort_job(weight: Weight, gradient: Tensor, count: float) -> Alike:
    """What has to be alike in one call of a kernel; count: whatever else its numbers depend on."""
    return None if weight.rest is None else weight.rest.dtype, gradient.dtype, count


def _step_adam(
    functions: ctypes.CDLL,
    optimizer: Optimizer,
    group: dict[str, Any],
    jobs: Sequence[Job],
    factor: float,
    *,
    narrow: bool,
) -> list[Job]:
    fused, states = bool(group["fused"]), optimizer.state
    done: list[Job] = []
    batches: dict[tuple[bool, Alike], list[tuple[Job, Any]]] = defaultdict(list)
    for job in jobs:
        parameter, weight, gradient = job
        in_codes = narrow and parameter.numel() >= SMALLEST
        held, kind = states.get(parameter), Quantized if in_codes else Tensor
        state = held or _begin_adam(weight, fused=fused, in_codes=in_codes)
        exp_avg, exp_avg_sq, count = state.get("exp_avg"), state.get("exp_avg_sq"), state.get("step")
        if not (isinstance(exp_avg, kind) and isinstance(exp_avg_sq, kind) and isinstance(count, Tensor)):
            continue
        aligned = _align(weight, gradient, exp_avg, exp_avg_sq)
        if aligned is None or not count.is_cpu:
            continue
        if not held:
            states[parameter] = state
        raised = count if count.dtype is torch.float32 else None  # the kernel counts in fp32
        tensors = (weight, aligned, exp_avg, exp_avg_sq, raised)
        batches[in_codes, sort_job(weight, aligned, count.item() + 1)].append((job, tensors))
    for (in_codes, (_, _, number)), batch in batches.items():
        numbers = find_adam_numbers(group, number, factor)
        if in_codes:
            batch = _run_narrow(functions, optimizer, batch, numbers)
        else:
            run_adam(functions, [tensors for _, tensors in batch], numbers)
        for job, (*_, raised) in batch:
            if raised is None:
                states[job[0]]["step"].add_(1)
            done.append(job)
    return done


def find_adam_numbers(group: dict[str, Any], count: float, factor: float) -> AdamStep:
    """What a step of a group of Adam or AdamW multiplies with; count: steps with this one."""
    lr = group["lr"]
    return AdamStep.of(
        lr=lr.squeeze() if isinstance(lr, Tensor) else lr, betas=group["betas"], eps=group["eps"],
        decay=group["weight_decay"], decoupled=group["decoupled_weight_decay"], count=count, factor=factor,
        nearest=bool(group["fused"]),
    )  # fmt: skip


def _run_narrow(
    functions: ctypes.CDLL, optimizer: Optimizer, batch: list[tuple[Job, Any]], numbers: AdamStep
) -> list[tuple[Job, Any]]:
    """Those that were updated."""
    found = run_adam_narrow(functions, [tensors for _, tensors in batch], numbers)
    for (job, _), states in zip(batch, found, strict=True):
        if states:
            optimizer.state[job[0]].update(zip(("exp_avg", "exp_avg_sq"), states, strict=True))
    return [one for one, states in zip(batch, found, strict=True) if states]


def _begin_adam(weight: Weight, *, fused: bool, in_codes: bool) -> dict[str, Any]:
    """The states that torch begins with."""
    double = torch.get_default_dtype() == torch.float64 and not fused
    step = torch.zeros((), dtype=torch.float64 if double else torch.float32, device="cpu")
    zeros: list[Any] = [
        make_zeros(weight.live.shape)
        if in_codes
        else torch.zeros_like(weight.live, dtype=torch.float32, requires_grad=False)
        for _ in range(2)
    ]
    return {"step": step, "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}


def _step_sgd(
    functions: ctypes.CDLL, optimizer: Optimizer, group: dict[str, Any], jobs: Sequence[Job], factor: float
) -> list[Job]:
    momentum = float(group["momentum"])
    done: list[Job] = []
    batches: dict[Alike, list[Tensors]] = defaultdict(list)
    for job in jobs:
        parameter, weight, gradient = job
        buffer, way = None, NONE
        if momentum:
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            way = BEGINS if buffer is None else GOES_ON
            if buffer is None:
                buffer = torch.empty_like(weight.live, dtype=torch.float32, requires_grad=False)
        aligned = _align(weight, gradient, *(() if buffer is None else (buffer,)))
        if aligned is None:
            continue
        if way == BEGINS:
            optimizer.state[parameter]["momentum_buffer"] = buffer
        batches[sort_job(weight, aligned, way)].append((weight, aligned, buffer, None, None))
        done.append(job)
    for (_, _, moment), batch in batches.items():
        numbers = SgdStep(
            momentum,
            1 - group["dampening"],
            -float(group["lr"]),
            group["weight_decay"],
            factor,
            int(moment),
            group["nesterov"],
        )
        run_sgd(functions, batch, numbers)
    return done
