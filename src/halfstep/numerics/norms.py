"""Squares of many tensors added up in one pass: what a norm over all gradients is made of, and what shows a NaN or an infinity.

    sum over tensors of sum x * x        in fp32 within 4096 numbers, in fp64 across them

Every step reads all gradients once for this before it changes a weight. torch takes a call a tensor and is slow on 16 bits;
here one call reads them all at the speed of memory, on all threads. The sums of blocks are added up in the order of the tensors,
so the number of threads does not show in the result.

Where a square overflows fp32 the sum is infinite; whoever needs to know whether that was an infinity has to look again.
"""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from halfstep.numerics.kernels import COUNT, INT, POINTER, Kernels

DTYPES = (torch.float32, torch.bfloat16)
BLOCK = 1 << 16  # numbers, as in norms.c


def can_measure(tensor: Tensor) -> bool:
    """Whether the kernel takes a tensor: fp32 or bf16 on the processor, in one stretch of memory.

    Examples:
        >>> can_measure(torch.ones(2, dtype=torch.float64))
        False
    """
    is_plain = tensor.is_cpu and tensor.layout is torch.strided and tensor.dtype in DTYPES
    return is_plain and not tensor.is_neg() and _is_dense(tensor) and KERNELS.library.functions is not None


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def sum_squares(tensors: Sequence[Tensor]) -> float:
    """The sum of the squares of all numbers of tensors that `can_measure` takes.

    Examples:
        >>> x = [torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.bfloat16)]
        >>> sum_squares(x)
        25.0
    """
    functions = KERNELS.library.functions
    if functions is None:
        return sum(float(t.to(torch.float64).square().sum()) for t in tensors)
    return sum(_sum_alike(functions, [t for t in tensors if t.dtype is dtype], dtype) for dtype in DTYPES)


def _sum_alike(functions: ctypes.CDLL, tensors: Sequence[Tensor], dtype: torch.dtype) -> float:
    parts, blocks = array("q"), 0
    for tensor in tensors:
        count = tensor.numel()
        if count:
            parts.extend((tensor.data_ptr(), count, blocks))
            blocks += -(-count // BLOCK)
    if not blocks:
        return 0.0
    sums = torch.empty(blocks, dtype=torch.float64, device="cpu")
    wide = int(dtype is torch.float32)
    functions.measure_squares(parts.buffer_info()[0], len(parts) // 3, wide, blocks, sums.data_ptr())
    return float(sums.sum())


def _agrees(functions: ctypes.CDLL) -> bool:
    """Whether the kernel computes what fp64 does, tried on three tensors, one of them of more than a block."""
    x = [torch.linspace(-2.0, 1.0, n, device="cpu", dtype=torch.float32) for n in (1, BLOCK + 4099, 77)]
    for dtype in DTYPES:
        some = [t.to(dtype) for t in x]
        right = sum(float(t.to(torch.float64).square().sum()) for t in some)
        if abs(_sum_alike(functions, some, dtype) - right) > 1e-6 * right:
            return False
    return True


KERNELS = Kernels("norms.c", {"measure_squares": [POINTER, COUNT, INT, COUNT, POINTER]}, _agrees)
