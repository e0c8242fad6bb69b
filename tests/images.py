"""Operands of small convolutions, and how close to fp64 a result has to be."""

import torch
from torch import Tensor

from helpers import seeded

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}  # of the largest number


def make_inputs(
    dtype: torch.dtype = torch.float32, *, size: int = 7, channels: int = 3, outputs: int = 5, kernel: int = 3,
    order: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with seeded(0):
        x, w = torch.randn(2, channels, size, size + 1), torch.randn(outputs, channels, kernel, kernel)
        b = torch.randn(outputs)
    x, w = (t.to(dtype, memory_format=order).requires_grad_() for t in (x, w))
    return x, w, b.to(dtype).requires_grad_()


def require_close(found: Tensor, right: Tensor) -> None:
    error = (found.double() - right.double()).abs().max() / right.double().abs().max()
    assert error <= TOLERANCE[found.dtype]
    assert found.shape == right.shape
