"""Tensors in 8 bits by codebooks: what optimizer states are kept as, a quarter of their memory.

Each block of 256 numbers is divided by its largest magnitude and rounded to the nearest of 255 codes that lie between -1 and
1, or between 0 and 1 for a tensor without negative numbers. The codes are those of dynamic tree quantization: the nearer to
zero, the denser, over seven decades. Where all numbers are positive none is rounded to zero: a second
moment of zero would turn a small update into a division by eps.

    per number    8 bits of code + 32/256 bits of scale

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), sections 2.1 and 2.2; blocks of 256
and no 8 bits for small tensors as in their library. The codes here are scaled so that 1 is one of them: quantizing what was
quantized changes nothing, so that a saved and restored state is the same state.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

BLOCK = 256
SMALLEST = 4096  # tensors with fewer numbers stay as they are


@dataclass(frozen=True)
class Quantized:
    """A tensor in 8 bits."""

    codes: Tensor  # uint8, the tensor's numbers in order
    scales: Tensor  # fp32, the largest magnitude of each block
    shape: torch.Size
    signed: bool


@cache
def list_codes(*, signed: bool) -> tuple[float, ...]:
    """The code book, ascending: 255 numbers in [-1, 1] with 0, or 256 in [0, 1].

    Examples:
        >>> codes = list_codes(signed=True)
        >>> len(codes), codes[0], codes[127], codes[-1]
        (255, -1.0, 0.0, 1.0)
    """
    positive = []
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)  # the larger the numbers, the finer
        step = 0.9 / count
        positive += [(0.1 + (i + 0.5) * step) * 10.0 ** (decade - 6) for i in range(count)]
    if not signed:
        positive.insert(0, 1e-8)
    positive = [value / positive[-1] for value in positive]
    return (*(-value for value in reversed(positive)), 0.0, *positive) if signed else (0.0, *positive)


def quantize_slowly(x: Tensor) -> Quantized:
    """fp32 tensor -> 8 bits: the readable truth, one number at a time."""
    signed = bool((x < 0).any())
    codes, blocks = list_codes(signed=signed), x.flatten().split(BLOCK)
    scales = [float(block.abs().max()) for block in blocks]
    chosen = []
    for block, scale in zip(blocks, scales, strict=True):
        for value in (block / (scale or 1.0)).tolist():
            nearest = min(range(len(codes)), key=lambda i: abs(codes[i] - value))
            chosen.append(max(nearest, 1) if value > 0 and not signed else nearest)
    return Quantized(torch.tensor(chosen, dtype=torch.uint8), torch.tensor(scales), x.shape, signed)


def quantize(x: Tensor) -> Quantized:
    """`quantize_slowly` by vectorised passes; a number halfway between two codes, within fp16, may take the other one."""
    signed = bool((x < 0).any())
    blocks = _take_blocks(x)
    scales = blocks.abs().amax(1)
    unit = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    table = tabulate_codes(x.device, signed=signed)
    index = unit.to(torch.float16).view(torch.int16).to(torch.int32).add_(1 << 15)
    codes = table.index_select(0, index.view(-1))[: x.numel()]
    if not signed:
        codes = torch.maximum(codes, (x.flatten() > 0).to(torch.uint8))
    return Quantized(codes, scales, x.shape, signed)


def make_zeros(shape: torch.Size) -> Quantized:
    """What `quantize` makes of zeros on the processor.

    Examples:
        >>> dequantize(make_zeros(torch.Size([2, 2]))).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """
    count = shape.numel()
    codes = torch.zeros(count, dtype=torch.uint8, device="cpu")
    return Quantized(codes, torch.zeros(-(-count // BLOCK), dtype=torch.float32, device="cpu"), shape, signed=False)


@cache
def tabulate_codes(device: torch.device, *, signed: bool) -> Tensor:
    """The code of each of the 65,536 fp16 numbers, by their bits as a signed integer, ascending."""
    codes = torch.tensor(list_codes(signed=signed), dtype=torch.float32)
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16).to(torch.float32)
    nearest = torch.bucketize(numbers.nan_to_num(), (codes[1:] + codes[:-1]) / 2)
    return nearest.to(torch.uint8).to(device)


def _take_blocks(x: Tensor) -> Tensor:
    """[blocks, BLOCK], the last one filled up with zeros."""
    return nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def dequantize(quantized: Quantized) -> Tensor:
    """8 bits -> the fp32 tensor they stand for."""
    codes = torch.tensor(list_codes(signed=quantized.signed), dtype=torch.float32, device=quantized.codes.device)
    values = _take_blocks(codes.index_select(0, quantized.codes.to(torch.int32))) * quantized.scales[:, None]
    return values.view(-1)[: quantized.codes.numel()].view(quantized.shape)
