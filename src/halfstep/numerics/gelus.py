"""GELU of bf16 numbers on the processor, from tables of all of them.

    gelu(x)  = x P(x)                    P: the share of a normal distribution that lies below x
    gelu'(x) = P(x) + x exp(-x^2 / 2) / sqrt(2 pi)

There are 65,536 numbers in bf16, so values and derivatives of all of them are computed once, in fp64, and looked up. A value is
therefore the nearest there is, where torch's, from an error function made for fp32, loses its bits below -5; a gradient is
rounded to bf16 once. torch takes three times as long as memory does, the tables 0.6 of that, forward and backward: numbers of a
layer lie close together, and so do their entries in the cache. The approximation by tanh has tables of its own.

fp32 and fp16 are left to torch, as are second derivatives.

Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415), section 2.
"""

import ctypes
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.numerics.kernels import COUNT, POINTER, Kernels, find_obstacle

DTYPES = (torch.bfloat16,)
LEAST_NUMBERS = 1 << 16  # below, calls take as long as looking up
APPROXIMATIONS = ("none", "tanh")


def explain_gelu(input: Tensor, approximate: str = "none") -> str:
    """Why `gelu` leaves this call to torch's own function; "" where it does not.

    Examples:
        >>> explain_gelu(torch.ones(4))
        'dtype float32'
    """
    if obstacle := find_obstacle(input, dtypes=DTYPES):
        return obstacle
    if approximate not in APPROXIMATIONS or input.numel() < LEAST_NUMBERS:
        return f"approximate {approximate}, {input.numel()} numbers"
    return "" if KERNELS.library.functions is not None else KERNELS.describe()


def gelu(input: Tensor, *, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.gelu`: any shape -> the same.

    In bf16 on a processor. Others, small tensors and calls with an `out` are left to torch.

    Examples:
        >>> x = torch.full((1 << 16,), -1.0, dtype=torch.bfloat16)
        >>> gelu(x)[0].item()
        -0.158203125

    Raises RuntimeError for an approximation that there is not, as torch does.
    """
    if out is not None:
        return F.gelu(input, approximate=approximate, out=out)  # type: ignore[call-arg]  # which torch takes, and hides
    if torch.compiler.is_compiling() or explain_gelu(input, approximate):
        return F.gelu(input, approximate=approximate)
    result: Tensor = _Gelu.apply(input, approximate)
    return result


@lru_cache
def make_tables(approximate: str = "none") -> tuple[Tensor, Tensor]:
    """[65536] fp32 each, at the bits of x: gelu(x), rounded to bf16, and its derivative.

    Examples:
        >>> values, slopes = make_tables()
        >>> values[0x3F80].item(), round(slopes[0x3F80].item(), 5)  # of 1
        (0.83984375, 1.08332)
    """
    with torch._C.DisableTorchFunction():
        x = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.int16).view(torch.bfloat16).double()
        if approximate == "none":
            below = torch.erfc(-x / math.sqrt(2)) / 2  # (1 + erf) / 2 would lose what lies far below 0
            value, slope = x * below, below + x * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        else:
            value = F.gelu(x, approximate=approximate)
            slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)
        return value.to(torch.bfloat16).float(), slope.float()


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        return look_up(x, approximate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        is_traced = torch.compiler.is_compiling()  # by a compiler of backward passes
        # hooks may have unpacked x in another dtype
        if is_traced or torch.is_grad_enabled() or find_obstacle(gradient, x, dtypes=DTYPES):
            return torch.ops.aten.gelu_backward(gradient, x, approximate=ctx.approximate), None
        return multiply(gradient, x, ctx.approximate), None


def look_up(x: Tensor, approximate: str) -> Tensor:
    """gelu(x), from its table."""
    return _look_up("look_up", make_tables(approximate)[0], x)


def multiply(gradient: Tensor, x: Tensor, approximate: str) -> Tensor:
    """gradient * gelu'(x), from the table of derivatives."""
    return _look_up("multiply", make_tables(approximate)[1], x, gradient)


def _look_up(name: str, table: Tensor, x: Tensor, *others: Tensor) -> Tensor:
    """By a kernel over the memory of all of them, whose order is that of x or of a dense copy."""
    result = torch.empty_like(x)
    operands = [t if t.stride() == result.stride() else torch.empty_like(result).copy_(t) for t in (x, *others)]
    pointers = (t.data_ptr() for t in (table, *operands, result))
    getattr(KERNELS.library.functions, name)(*pointers, x.numel())
    return result


def _agrees(functions: ctypes.CDLL) -> bool:
    """Whether the kernels give what torch looks up, tried on two blocks and a bit."""
    x = torch.linspace(-9.0, 9.0, 1029, device="cpu").to(torch.bfloat16)
    values, slopes = (table[x.view(torch.int16).int() & 0xFFFF] for table in make_tables())
    found = [torch.empty_like(x) for _ in range(2)]
    functions.look_up(make_tables()[0].data_ptr(), x.data_ptr(), found[0].data_ptr(), x.numel())
    functions.multiply(make_tables()[1].data_ptr(), x.data_ptr(), x.data_ptr(), found[1].data_ptr(), x.numel())
    return torch.equal(found[0].float(), values) and torch.equal(found[1], (slopes * x.float()).to(torch.bfloat16))


KERNELS = Kernels("gelus.c", {"look_up": [*[POINTER] * 3, COUNT], "multiply": [*[POINTER] * 4, COUNT]}, _agrees)
