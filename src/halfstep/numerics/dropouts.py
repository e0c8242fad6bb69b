"""Dropout on the processor: torch's function with noise that is computed, not stored.

    share  = round(p * 2^16) / 2^16                     p in steps of 2^-16
    factor = 0 with probability share, else 1 / (1 - share)
    y      = x * factor                                 E y = x exactly: the scale is that of the rounded share
    grad_x = grad_y * factor                            the same function: nothing but two keys waits for the backward pass

The noise is the hash of `noise.draw_noise` over the element's number, in the order of a contiguous tensor. Its keys are drawn
from torch's default generator, once a call: torch.manual_seed governs them, and so does activation checkpointing, which puts
the generator back for the second run. torch draws a number an element there, so its masks are others for the same seed.

The product is taken in fp32 and rounded once; torch rounds the scale to bf16 first, which moves the mean (by 0.2 % at p = 0.1).
As in torch, a dropped NaN or infinity comes out as NaN: a bad step must be seen.

Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting", in the inverted form.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.numerics.kernels import COUNT, FLOAT, INT, POINTER, WORD, Kernels, find_obstacle
from halfstep.numerics.noise import draw_noise

DTYPES = (torch.float32, torch.bfloat16)
LEVELS = 1 << 16


@dataclass(frozen=True)
class Drop:
    """Which elements are dropped, and what the others are multiplied by.

    Examples:
        >>> drop = Drop(0.25, (1, 2))
        >>> drop.threshold / LEVELS + 0.5, round(drop.scale, 3)
        (0.25, 1.333)
    """

    p: float  # below 1 - 2^-17
    keys: tuple[int, int]

    @property
    def threshold(self) -> int:
        """Elements whose int16 noise is below it are dropped."""
        return round(self.p * LEVELS) - LEVELS // 2

    @property
    def scale(self) -> float:
        return LEVELS / (LEVELS - round(self.p * LEVELS))


def draw_keys() -> tuple[int, int]:
    """Two keys of `noise.draw_noise`, from torch's default generator.

    Examples:
        >>> with torch.random.fork_rng(devices=[]):
        ...     _ = torch.manual_seed(1)
        ...     one = draw_keys()
        ...     _ = torch.manual_seed(1)
        ...     one == draw_keys()
        True
    """
    word = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    return word & 0xFFFFFFFF, word >> 32


def drop_slowly(x: Tensor, drop: Drop) -> Tensor:
    """Any shape, fp32, bf16 or fp16 -> the same: the readable truth, on any device.

    Examples:
        >>> drop_slowly(torch.ones(8), Drop(0.5, (1, 2))).tolist()
        [2.0, 2.0, 0.0, 0.0, 2.0, 2.0, 2.0, 0.0]
    """
    noise = draw_noise(drop.keys, 0, x.numel(), x.device).view(x.shape)
    factors = torch.full_like(noise, drop.scale, dtype=torch.float32).masked_fill_(noise < drop.threshold, 0.0)
    return (x.to(torch.float32) * factors).to(x.dtype)


def explain_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> str:
    """Why `dropout` leaves this call to torch's own function; "" where it does not.

    Examples:
        >>> explain_dropout(torch.ones(2), 0.5, True, True)
        'in place'
    """
    obstacle = find_obstacle(input, dtypes=DTYPES)
    if obstacle:
        return obstacle
    if not isinstance(p, float) or not 0.5 <= p * LEVELS < LEVELS - 0.5:
        return f"p = {p}"
    if not training or inplace or not input.numel():
        return "not training" if not training else "in place" if inplace else "empty"
    return "" if KERNELS.library.functions is not None else KERNELS.describe()


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout`, with the noise computed where it is needed.

    Args:
        input: any shape; fp32 and bf16 on the processor. Others, and calls in place, are left to torch.
        p: the share that is dropped, rounded to a multiple of 2^-16.
        training: whether anything is dropped.
        inplace: left to torch.

    Examples:
        >>> x = torch.ones(100_000, dtype=torch.bfloat16)
        >>> y = dropout(x, 0.25)
        >>> abs(float((y == 0).float().mean()) - 0.25) < 0.01
        True

    Raises ValueError for p outside 0 ... 1, as torch does.
    """
    if torch.compiler.is_compiling() or explain_dropout(input, p, training, inplace):
        return F.dropout(input, p, training, inplace)
    result: Tensor = _Dropout.apply(input, Drop(p, draw_keys()))
    return result


class _Dropout(torch.autograd.Function):
    """Its own derivative: linear in x, so second derivatives are exact too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Drop) -> Tensor:
        ctx.rule = rule
        return drop(x, rule)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        if find_obstacle(gradient, dtypes=DTYPES):
            return drop_slowly(gradient, ctx.rule), None
        return _Dropout.apply(gradient, ctx.rule), None


def drop(x: Tensor, rule: Drop) -> Tensor:
    """Without a graph, by kernel where there is one: any shape -> the same.

    Examples:
        >>> drop(torch.ones(4), Drop(0.5, (1, 2))).tolist()
        [2.0, 2.0, 0.0, 0.0]
    """
    functions = KERNELS.library.functions
    return drop_slowly(x, rule) if functions is None else _drop(functions, x.contiguous(), rule)


def _drop(functions: ctypes.CDLL, x: Tensor, drop: Drop) -> Tensor:
    y, wide = torch.empty_like(x), int(x.dtype is torch.float32)
    functions.drop(x.data_ptr(), wide, x.numel(), drop.threshold, drop.scale, *drop.keys, y.data_ptr())
    return y


def _agrees(functions: ctypes.CDLL) -> bool:
    """Whether kernel and truth give the same bits, tried on two blocks and a bit."""
    x, drop = torch.linspace(-1.0, 3.0, 1029, dtype=torch.float32, device="cpu"), Drop(0.3, (12345, 678))
    return all(torch.equal(_drop(functions, n, drop), drop_slowly(n, drop)) for n in (x, x.to(torch.bfloat16)))


KERNELS = Kernels("dropouts.c", {"drop": [POINTER, INT, COUNT, INT, FLOAT, WORD, WORD, POINTER]}, _agrees)
