"""Trials of a whole model under plans, on one batch, that leave no trace.

    order     memory formats of convolutions, proposed by control/memory_formats: with them and without in turns, and what wins
              is taken. First, because the formats decide in convolutions whether 16 bits pay
    try       forward and backward of the whole model on half the batch, fp32 against the found plan in turns: the plan
              must win, at the second try at the latest. Half, so that a model which fits into memory only in 16 bits can be
              tried in fp32 at all

The trial is there because a small model can lose by dispatch and elementwise casts what its layers gain. Random states and
buffers are put back, gradients dropped, weights untouched.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.control.memory_formats import (
    is_there_already,
    measure_convolutions,
    propose_memory_formats,
    state_memory_formats,
)
from halfstep.control.monitor import LayerShape
from halfstep.control.search import NOISE, LayerCost
from halfstep.conversion import convert
from halfstep.machine.timing import Stopwatch
from halfstep.nests import list_tensors, map_tensors
from halfstep.plan import Plan, Rule
from halfstep.snapshot import copy_buffers, find_owners, put_back_buffers

TRIALS = 5
TRIES = 2  # before a plan that seems to lose is given up: other work on the machine may hide what it gains
ORDER_GAIN = 1.02  # that a change of memory formats must bring; the fastest of TRIALS repeats better than medians do


def find_devices(model: nn.Module) -> list[int]:
    """The CUDA devices that a model's parameters are on."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def leave_no_trace(model: nn.Module) -> Iterator[None]:
    """Random states, buffers and gradients are as before after the block."""
    devices = find_devices(model)
    buffers = copy_buffers(find_owners(model))
    gradients = {p: p.grad for p in model.parameters()}
    for parameter in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        put_back_buffers(buffers)
        for parameter, gradient in gradients.items():
            parameter.grad = None
            parameter.grad = gradient


def run_once(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Forward and backward; every floating-point output gets the same gradient everywhere. The gradients of the weights are
    dropped as they come: a trial should not need more memory than the training after it."""
    outputs = [t for t in list_tensors(model(*args, **kwargs)) if t.requires_grad]
    with ExitStack() as hooks:
        for parameter in model.parameters():
            if parameter.requires_grad:
                hooks.callback(parameter.register_post_accumulate_grad_hook(_drop_gradient).remove)
        torch.autograd.backward(outputs, [torch.full_like(t, 1.0 / max(1, t.numel())) for t in outputs])


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def halve_batch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The first half of every tensor, where all agree on the size of their first dimension; else all as it is.

    Examples:
        >>> halve_batch((torch.ones(4, 2),), {})[0][0].shape
        torch.Size([2, 2])
    """
    sizes = {t.shape[0] if t.ndim else 0 for t in list_tensors((args, kwargs))}
    if len(sizes) != 1 or min(sizes) < 2:
        return args, kwargs
    halved: tuple[Sequence[Any], Mapping[str, Any]] = map_tensors(lambda t: t[: t.shape[0] // 2], (args, kwargs))
    return halved


def choose_batch(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], wide: Plan
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """What trials run on: half of a batch, where the model takes it; all of it where not.

    The first dimension may be none of samples, as in [sequence, batch]; and half a batch may be too small, as one sample is
    for a batch norm of vectors.

    wide: the plan that it is tried under.
    """
    half = halve_batch(args, kwargs)
    try:
        with convert(model, wide) as conversion, conversion.autocast():
            run_once(model, *half)
    except Exception:
        return args, kwargs
    return half


def try_plan(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], wide: Plan, plan: Plan, watch: Stopwatch
) -> tuple[bool, str]:
    """Whether the whole model is faster under the plan than under the wide one, and the numbers.

    wide: the plan with fp32 in place of all that was chosen.
    """
    if all(rule.compute == "fp32" for rule in plan.rules if rule.compute and rule not in wide.rules):
        return True, "no layer is faster in 16 bits at its own shape"
    for _ in range(TRIES):
        try:
            times = race(model, args, kwargs, (wide, plan), watch)
        except Exception as error:  # inputs in fp32 beside weights in 16 bits, where torch wants them alike
            return False, f"kept in fp32: in 16 bits the model raises {str(error).partition(chr(10))[0]}"
        before, after = (statistics.median(times[tried]) for tried in (wide, plan))
        timed = f"forward and backward take {after:.3g} ms under the plan and {before:.3g} ms in fp32"
        if before / after >= NOISE:
            return True, timed
    return False, f"kept in fp32: {timed}; the casts between the layers cost more than the layers gain"


def stay_wide(plan: Plan, why: str) -> Plan:
    """The plan with all of it in fp32, because of what its trial has given.

    Examples:
        >>> [str(rule) for rule in stay_wide(Plan.parse("path=0 compute=bf16 why=fast"), "slow").rules]
        ["path=0 compute=fp32 why='fast; but the model as a whole loses'", "path='**' compute=fp32 why=slow"]
    """
    layers = [
        Rule(path=rule.path, compute="fp32", why=f"{rule.why}; but the model as a whole loses")
        for rule in plan.rules
        if rule.names_a_path
    ]
    return Plan(rules=(*layers, Rule(compute="fp32", why=why)), functions=plan.functions, name="auto")


def race(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], plans: Sequence[Plan], watch: Stopwatch
) -> dict[Plan, list[float]]:
    """Milliseconds of forward and backward under each plan, by turns; a first turn only warms up."""
    times: dict[Plan, list[float]] = {plan: [] for plan in plans}
    for turn in range(1 + TRIALS):
        for plan, found in times.items():
            with convert(model, plan) as conversion:

                def step(conversion: Any = conversion) -> None:
                    with conversion.autocast():
                        run_once(model, args, kwargs)

                ms = watch.time_once(step)
                if turn:
                    found.append(ms)
    return times


def try_memory_formats(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], plan: Plan, shapes: Mapping[str, LayerShape],
    costs: Sequence[LayerCost], device: str,
) -> tuple[Plan, str]:  # fmt: skip
    """The plan with the memory formats under which the whole model is fastest, and the times; itself where it is.

    A model that cannot run in an order, as one that views what it may not view then, keeps its own.
    """
    convolutions = measure_convolutions(model, shapes, costs, plan, Stopwatch(device, seconds=0.04))
    best, why = plan, ""
    for formats in propose_memory_formats(convolutions):
        if is_there_already(model, formats):
            continue
        stated = state_memory_formats(plan, model, formats, convolutions)
        try:
            times = race(model, args, kwargs, (best, stated), Stopwatch(device))
        except Exception:  # the model's own code may raise anything
            continue
        before, after = min(times[best]), min(times[stated])
        if before / after >= ORDER_GAIN:
            changed = f"{before:.3g} ms become {after:.3g} with memory formats chosen by timing"
            best, why = stated, "; ".join(filter(None, [why, changed]))
    return best, why
