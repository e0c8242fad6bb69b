"""Looking at gradients: is every number finite, how long are they, which are not.

The check of a step is one reduction over all gradients, whose result is read back together with the losses of the step:
a NaN or an infinity anywhere makes the norm non-finite. Only then is each tensor looked at by itself.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from halfstep.numerics.norms import can_measure, sum_squares
from halfstep.numerics.rows import measure_norms


def measure_norm(
    gradients: Iterable[Tensor], losses: Iterable[Tensor] = (), *, like_torch: bool = False
) -> tuple[float, list[float]]:
    """2-norm over all gradients, accumulated in fp32 at least, and the losses; numbers of a device are read back at once.

    like_torch: the bits of torch.nn.utils.clip_grad_norm_, which takes longer.

    Examples:
        >>> measure_norm([torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor(2.0)])
        (5.0, [2.0])
    """
    given = list(gradients)
    sparse = [gradient for gradient in given if gradient.is_sparse]
    by_rows = measure_norms(sparse) if sparse else None  # without adding up rows that occur twice in memory
    by_kernel: list[Tensor] = []
    others: list[Tensor] = []
    for gradient in given:
        if not like_torch and can_measure(gradient):
            by_kernel.append(gradient)
        elif by_rows is None or not gradient.is_sparse:
            others.append(take_values(gradient))
    square = sum_squares(by_kernel) if by_kernel else 0.0
    square += 0.0 if by_rows is None else float(by_rows.square().sum())
    norm, values = _measure_by_torch(others, losses)
    return math.sqrt(square + norm * norm) if square else norm, values


def _measure_by_torch(dense: list[Tensor], losses: Iterable[Tensor]) -> tuple[float, list[float]]:
    wide = torch.float64 if any(tensor.dtype is torch.float64 for tensor in dense) else torch.float32
    norms = list(torch._foreach_norm(dense, 2, dtype=wide)) if dense else []
    scalars = [loss.detach().reshape(()).to(wide) for loss in losses]
    if not norms and not scalars:
        return 0.0, []
    device = (norms or scalars)[0].device
    norm = (
        torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
        if norms
        else torch.zeros((), device=device)
    )
    norm_value, *loss_values = torch.stack([norm.to(wide), *(s.to(device) for s in scalars)]).tolist()
    return norm_value, loss_values


def measure_norm_slowly(gradients: Iterable[Tensor]) -> float:
    """The norm in fp64, for finite gradients whose squares overflow fp32."""
    squares = [torch.linalg.vector_norm(take_values(g), dtype=torch.float64) ** 2 for g in gradients]
    return math.sqrt(sum(float(s) for s in squares))


def find_nonfinite(gradients: Mapping[nn.Parameter, Tensor]) -> list[nn.Parameter]:
    """The parameters whose gradient holds a NaN or an infinity."""
    return [p for p, gradient in gradients.items() if not bool(torch.isfinite(take_values(gradient)).all())]


def take_values(gradient: Tensor) -> Tensor:
    """The numbers of a gradient as one dense real tensor: those of a sparse one, both parts of a complex one."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(values) if values.is_complex() else values
