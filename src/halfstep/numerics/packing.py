"""Tensors in 8, 4 or 1 bits a number: the readable truth, and its fast twin in packing.c.

Groups of 256 neighbours share a lowest value and a step. A number becomes the number of steps above the lowest, rounded up or
down at random so that the mean of what comes back is the number itself:

    step  = (highest - lowest) / levels             levels = 2^bits - 1
    code  = floor((x - lowest) * (1 / step) + u)    u uniform in (0, 1): u = (noise + 2^15 + 1/2) / 2^16
    x'    = lowest + step * code                    E x' = x,   Var x' = f (1 - f) step^2 <= step^2 / 4

where f is the fractional part of the code. Over f evenly spread the variance is step^2 / 6, twice that of rounding to nearest,
but errors of many numbers cancel in a sum instead of adding up: gradients computed from rounded activations stay unbiased where
they are linear in them. A group costs `bits` a number and two fp32 words: 8.25 and 4.25 bits a number.

    all numbers the same, or so near that 1 / step overflows     come back as the lowest, exactly or nearly
    a NaN or an infinity in the group                            the whole group comes back as NaN: a bad step must be seen

The noise is the hash of `noise.draw_noise`: the same for the same keys on every device.

Sources: Chen et al. 2021, "ActNN" (arXiv 2104.14129), section 4: groups of 256, min-max, stochastic rounding, unbiased gradients.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from halfstep.numerics.kernels import COUNT, INT, POINTER, WORD, Allocate, Kernels, make_buffer
from halfstep.numerics.noise import draw_noise

GROUP = 256
BITS = (8, 4)
NATIVE = (torch.float32, torch.bfloat16)  # dtypes that the kernels read and write


@dataclass(frozen=True)
class Groups:
    """A tensor's numbers, in order, in few bits."""

    codes: Tensor  # uint8 [groups * 256 * bits / 8]; of 4 bits the first half of a group low, the second half high
    scales: Tensor  # fp32 [groups, 2]: lowest value and step
    count: int
    bits: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def mark_activations(*tensors: Tensor) -> None:
    """Say of tensors that a function of our own saves, and that have no graph, that they may be rounded like any activation.

    Examples:
        >>> x = torch.zeros(2)
        >>> mark_activations(x)
        >>> is_marked(x), is_marked(x.clone())
        (True, False)
    """
    for tensor in tensors:
        tensor._is_activation = True  # type: ignore[attr-defined]


def is_marked(tensor: Tensor) -> bool:
    """Whether `mark_activations` was told so of this very tensor.

    Examples:
        >>> is_marked(torch.zeros(2))
        False
    """
    return getattr(tensor, "_is_activation", False)


def pack_groups_slowly(x: Tensor, bits: int, keys: tuple[int, int]) -> Groups:
    """[n] fp32, bf16 or fp16 -> groups, with the noise of the keys (`noise.derive_keys`).

    Examples:
        >>> groups = pack_groups_slowly(torch.tensor([0.0, 255.0, 7.0]), 8, (0, 0))
        >>> groups.codes[:3].tolist(), groups.scales.tolist()
        ([0, 255, 7], [[0.0, 1.0]])
    """
    rows = _take_rows(x.to(torch.float32))
    low, high = rows.amin(1, keepdim=True) + 0.0, rows.amax(1, keepdim=True)  # -0 + 0 is 0
    finite, levels = torch.isfinite(high - low), 2**bits - 1
    step = torch.where(finite, (high - low) / levels, 0.0)
    inverse = torch.ones_like(step) / step
    step, inverse = (torch.where(torch.isfinite(inverse), value, 0.0) for value in (step, inverse))
    draw = draw_noise(keys, 0, rows.numel(), x.device).view_as(rows).to(torch.float32) * 2.0**-16 + (0.5 + 2.0**-17)
    shares = torch.where(finite, (rows - low) * inverse + draw, 0.0)
    codes = shares.to(torch.int32).clamp_max(levels).to(torch.uint8)
    if bits == 4:
        codes = codes[:, : GROUP // 2] | codes[:, GROUP // 2 :] << 4
    scales = torch.cat([torch.where(finite, low, torch.nan), step], 1)
    return Groups(codes.flatten(), scales, x.numel(), bits)


def unpack_groups_slowly(groups: Groups, dtype: torch.dtype) -> Tensor:
    """Groups -> [n] in `dtype`."""
    codes = groups.codes.view(len(groups.scales), -1)
    if groups.bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], 1)
    low, step = groups.scales[:, :1], groups.scales[:, 1:]
    return (low + step * codes.to(torch.float32)).flatten()[: groups.count].to(dtype)


def pack_bits_slowly(mask: Tensor) -> Tensor:
    """[n] bool -> uint8 [n / 8 rounded up], the first of eight in the lowest bit.

    Examples:
        >>> pack_bits_slowly(torch.tensor([True, False, True])).tolist()
        [5]
    """
    rows = pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (rows << _places(mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits_slowly(codes: Tensor, count: int) -> Tensor:
    """The [count] bools that were packed."""
    return (codes[:, None] >> _places(codes.device) & 1).flatten()[:count].to(torch.bool)


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _take_rows(x: Tensor) -> Tensor:
    """[groups, 256], the last row filled up with its last number."""
    missing = -x.numel() % GROUP
    return torch.cat([x, x[-1:].expand(missing)]).view(-1, GROUP) if missing else x.view(-1, GROUP)


def pack_groups(x: Tensor, bits: int, keys: tuple[int, int], allocate: Allocate = make_buffer) -> Groups:
    """`pack_groups_slowly`, by a kernel where there is one, into buffers from `allocate`.

    Examples:
        >>> x = torch.linspace(0, 1, 1000)
        >>> bool((unpack_groups(pack_groups(x, 8, (1, 2)), x.dtype) - x).abs().max() < 1 / 255 / 3)
        True
    """
    functions = KERNELS.take(x)
    if functions is None or x.dtype not in NATIVE:
        return pack_groups_slowly(x, bits, keys)
    return _pack_groups(functions, x, bits, keys, allocate)


def unpack_groups(groups: Groups, dtype: torch.dtype, allocate: Allocate = make_buffer) -> Tensor:
    """`unpack_groups_slowly`, by a kernel where there is one, into a buffer from `allocate`."""
    functions = KERNELS.take(groups.codes)
    if functions is None or dtype not in NATIVE:
        return unpack_groups_slowly(groups, dtype)
    return _unpack_groups(functions, groups, dtype, allocate)


def pack_bits(mask: Tensor, allocate: Allocate = make_buffer) -> Tensor:
    """`pack_bits_slowly`, by a kernel where there is one, into a buffer from `allocate`."""
    functions = KERNELS.take(mask)
    if functions is None:
        return pack_bits_slowly(mask)
    codes = allocate(-(-mask.numel() // 8))
    functions.pack_bits(mask.data_ptr(), mask.numel(), codes.data_ptr())
    return codes


def unpack_bits(codes: Tensor, count: int) -> Tensor:
    """`unpack_bits_slowly`, by a kernel where there is one."""
    functions = KERNELS.take(codes)
    if functions is None:
        return unpack_bits_slowly(codes, count)
    mask = torch.empty(count, dtype=torch.bool, device="cpu")
    functions.unpack_bits(codes.data_ptr(), count, mask.data_ptr())
    return mask


def _pack_groups(
    functions: ctypes.CDLL, x: Tensor, bits: int, keys: tuple[int, int], allocate: Allocate = make_buffer
) -> Groups:
    rows, wide = -(-x.numel() // GROUP), int(x.dtype is torch.float32)
    codes, scales = allocate(rows * GROUP * bits // 8), allocate(8 * rows).view(torch.float32).view(rows, 2)
    functions.pack_groups(x.data_ptr(), wide, x.numel(), bits, *keys, codes.data_ptr(), scales.data_ptr())
    return Groups(codes, scales, x.numel(), bits)


def _unpack_groups(
    functions: ctypes.CDLL, groups: Groups, dtype: torch.dtype, allocate: Allocate = make_buffer
) -> Tensor:
    x = allocate(groups.count * dtype.itemsize).view(dtype)
    codes, scales = groups.codes.data_ptr(), groups.scales.data_ptr()
    functions.unpack_groups(codes, scales, groups.bits, groups.count, int(dtype is torch.float32), x.data_ptr())
    return x


def _agrees(functions: ctypes.CDLL) -> bool:
    """Whether kernels and truth give the same bits, tried on three groups, the last one short."""
    x, keys = torch.linspace(-1.0, 3.0, 2 * GROUP + 5, dtype=torch.float32, device="cpu"), (12345, 678)
    for bits in BITS:
        truth, native = pack_groups_slowly(x, bits, keys), _pack_groups(functions, x, bits, keys)
        same = torch.equal(truth.codes, native.codes) and torch.equal(truth.scales, native.scales)
        same = same and torch.equal(unpack_groups_slowly(truth, x.dtype), _unpack_groups(functions, native, x.dtype))
        if not same:
            return False
    return True


KERNELS = Kernels(
    "packing.c",
    {
        "pack_groups": [POINTER, INT, COUNT, INT, WORD, WORD, POINTER, POINTER],
        "unpack_groups": [POINTER, POINTER, INT, COUNT, INT, POINTER],
        "pack_bits": [POINTER, COUNT, POINTER],
        "unpack_bits": [POINTER, COUNT, POINTER],
    },
    _agrees,
)
