"""Steps of torch's AdamW, Adam and SGD by the kernels of `updates`: what may take that way, and how.

The optimizer stays the owner of its states and hyperparameters: states are made, named and typed as torch makes them, so that a
`state_dict()` goes either way. Only the arithmetic is done elsewhere, and it gives torch's bits: those of its loops, or of its
fused kernels where a group says `fused=True` (`updates` says for which numbers). So an optimizer goes this way only where nobody
would see that its `step` was not called:

    the type is AdamW, Adam or SGD itself    a subclass may do anything in `step`
    `step` is torch's                        a scheduler's counter around it is told; anything else around it must be called
    no hooks before or after a step          they may look at gradients or change them
    no amsgrad, maximize, differentiable, capturable; numbers as hyperparameters
    fp32 states, gradients in 16 bits or fp32, all dense and in the same order in memory
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from halfstep.numerics.updates import (
    BEGINS,
    GOES_ON,
    KERNELS,
    NONE,
    AdamStep,
    SgdStep,
    Weight,
    run_adam,
    run_sgd,
    take,
)

SWITCHES = ("amsgrad", "maximize", "differentiable", "capturable")
NUMBERS = ("betas", "eps", "weight_decay", "momentum", "dampening")


def find_reason(optimizer: Optimizer) -> str:
    """Why an optimizer has to step by itself; empty where its arithmetic may be done here.

    Examples:
        >>> find_reason(torch.optim.RMSprop([torch.zeros(1)]))
        'RMSprop has no kernel'
    """
    if type(optimizer) not in (AdamW, Adam, SGD):
        return f"{type(optimizer).__name__} has no kernel"
    if not _steps_as_torch_does(optimizer):
        return f"{type(optimizer).__name__}.step was replaced"
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    everywhere = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    if any(len(hooks) for hooks in (*own, *everywhere)):
        return "the optimizer has step hooks"
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        return "a GradScaler has left its scale to the optimizer"
    return "" if KERNELS.library.functions else KERNELS.library.why


def _steps_as_torch_does(optimizer: Optimizer) -> bool:
    kind, own = type(optimizer).step, vars(optimizer).get("step")
    if not inspect.unwrap(kind).__module__.startswith("torch.optim."):
        return False
    return own is None or (hasattr(own, "_wrapped_by_lr_sched") and getattr(own, "__wrapped__", None) is kind)


def find_group_reason(group: dict[str, Any]) -> str:
    """Why the parameters of a group are left to torch; empty where they are not.

    Examples:
        >>> optimizer = torch.optim.Adam([torch.zeros(1)], amsgrad=True)
        >>> find_group_reason(optimizer.param_groups[0])
        'amsgrad=True has no kernel'
    """
    switched = [name for name in SWITCHES if group.get(name)]
    if switched:
        return f"{switched[0]}=True has no kernel"
    lr = group["lr"]
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or lr.numel() != 1 or lr.requires_grad):
        return "lr is a tensor on another device"
    values = [v for name in NUMBERS if name in group for v in (group[name] if name == "betas" else (group[name],))]
    return "" if all(isinstance(v, int | float) for v in values) else "a hyperparameter is a tensor"


def step_natively(
    optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter, weight: Weight, gradient: Tensor,
    factor: float,
) -> bool:  # fmt: skip
    """One update of one parameter of a group for which there is no reason against it; False, with nothing done, where its
    tensors do not fit."""
    if gradient.layout is torch.strided and gradient.stride() != weight.live.stride():
        gradient = torch.empty_like(weight.live, dtype=gradient.dtype).copy_(gradient)
    step_one = _step_sgd if type(optimizer) is SGD else _step_adam
    if not step_one(optimizer, group, parameter, weight, gradient, factor):
        return False
    if weight.rest is None:
        torch.autograd.graph.increment_version(parameter)  # as an operation in place would have done
    if "step" in vars(optimizer):
        optimizer._opt_called = True  # type: ignore[attr-defined] # what a scheduler's counter notes
    return True


def _step_adam(
    optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter, weight: Weight, gradient: Tensor,
    factor: float,
) -> bool:  # fmt: skip
    state = optimizer.state.get(parameter) or _begin_adam(weight, fused=bool(group["fused"]))
    exp_avg, exp_avg_sq, count = (state.get(name) for name in ("exp_avg", "exp_avg_sq", "step"))
    if not (isinstance(exp_avg, Tensor) and isinstance(exp_avg_sq, Tensor) and isinstance(count, Tensor)):
        return False
    functions = take(weight, gradient, exp_avg, exp_avg_sq)
    if functions is None or count.device.type != "cpu":
        return False
    optimizer.state[parameter] = state
    count.add_(1)
    lr = group["lr"]
    numbers = AdamStep.of(
        lr=lr.squeeze() if isinstance(lr, Tensor) else lr, betas=group["betas"], eps=group["eps"],
        decay=group["weight_decay"], decoupled=group["decoupled_weight_decay"], count=count.item(), factor=factor,
        nearest=bool(group["fused"]),
    )  # fmt: skip
    run_adam(functions, weight, gradient, exp_avg, exp_avg_sq, numbers)
    return True


def _begin_adam(weight: Weight, *, fused: bool) -> dict[str, Any]:
    """The states that torch begins with."""
    double = torch.get_default_dtype() == torch.float64 and not fused
    step = torch.zeros((), dtype=torch.float64 if double else torch.float32, device="cpu")
    zeros = [torch.zeros_like(weight.live, dtype=torch.float32, requires_grad=False) for _ in range(2)]
    return {"step": step, "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}


def _step_sgd(
    optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter, weight: Weight, gradient: Tensor,
    factor: float,
) -> bool:  # fmt: skip
    momentum, buffer, way = float(group["momentum"]), None, NONE
    if momentum:
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        way = BEGINS if buffer is None else GOES_ON
        if buffer is None:
            buffer = torch.empty_like(weight.live, dtype=torch.float32, requires_grad=False)
    functions = take(weight, gradient, *(() if buffer is None else (buffer,)))
    if functions is None:
        return False
    if buffer is not None:
        optimizer.state[parameter]["momentum_buffer"] = buffer
    numbers = SgdStep(
        momentum, 1 - group["dampening"], -float(group["lr"]), group["weight_decay"], factor, way, group["nesterov"]
    )
    run_sgd(functions, weight, gradient, buffer, numbers)
    return True
