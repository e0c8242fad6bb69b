"""Noise for stochastic rounding, 16 bits a number.

It is a hash of (seed, parameter number, step, element), not a stream: it is the same on every replica, device and
after a resume, in whatever pieces it is drawn. (seed, number, step) go through splitmix64 into two 32-bit keys, and

    x = element // 2 + key 1;  x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x += key 2;  x *= 0x846CA68B;  x ^= x >> 16

is a bijection of 32-bit counters whose two halves serve two elements. That is good enough for rounding, which needs each
draw to be uniform and draws of neighbouring elements, steps and parameters to be uncorrelated; it is no cipher.

Sources: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", splitmix64; C. Wellons, "Prospecting for
hash functions" (2018), the multipliers and shifts of the 32-bit hash ("lowbias32").
"""

import torch
from torch import Tensor

_WORD, _HALF = 0xFFFFFFFF, 0xFFFF


def _mix64(word: int) -> int:
    """The finalizer of splitmix64."""
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & (1 << 64) - 1
    return word ^ word >> 31


def derive_keys(seed: int, number: int, step: int) -> tuple[int, int]:
    """Two 32-bit keys of the noise of one parameter at one step.

    Examples:
        >>> derive_keys(0, 0, 1) == derive_keys(0, 1, 0)
        False
    """
    key = 0
    for word in (seed, number, step):
        key = _mix64((key ^ word & (1 << 64) - 1) + 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    return key & _WORD, key >> 32


def draw_noise_at(keys: tuple[int, int], element: Tensor) -> Tensor:
    """int64 element numbers of any shape -> their int16 noise, uniform over [-2^15, 2^15): the readable truth.

    Examples:
        >>> draw_noise_at(derive_keys(0, 0, 0), torch.tensor([0, 1, 2**40])).shape
        torch.Size([3])
    """
    first, second = keys
    x = (element // 2 + first) & _WORD
    x = ((x ^ x >> 16) * 0x7FEB352D) & _WORD
    x = ((x ^ x >> 15) + second) & _WORD
    x = (x * 0x846CA68B) & _WORD
    x = x ^ x >> 16
    half = torch.where(element % 2 == 0, x & _HALF, x >> 16)
    return torch.where(half >= 1 << 15, half - (1 << 16), half).to(torch.int16)


def draw_noise(keys: tuple[int, int], start: int, count: int, device: torch.device | None = None) -> Tensor:
    """`draw_noise_at` of the elements start, start + 1, ..., by vectorised passes: int16, shape (count,).

    Examples:
        >>> keys = derive_keys(1, 2, 3)
        >>> torch.equal(draw_noise(keys, 5, 7), draw_noise_at(keys, torch.arange(5, 12)))
        True
    """
    first, second = keys
    pairs = (start + count + 1) // 2 - start // 2
    x = torch.arange(pairs, dtype=torch.int32, device=device).add_(_wrap(start // 2 + first))
    _xor_shifted(x, 16)
    _xor_shifted(x.mul_(0x7FEB352D), 15)
    _xor_shifted(x.add_(_wrap(second)).mul_(_wrap(0x846CA68B)), 16)
    return x.view(torch.int16)[start % 2 :][:count]


def _wrap(word: int) -> int:
    """A 32-bit word as the signed number that int32 arithmetic takes it for."""
    word &= _WORD
    return word - (1 << 32) if word >> 31 else word


def _xor_shifted(x: Tensor, places: int) -> None:
    """x ^= x >> places, filled with zeros; torch's shift of a signed integer repeats the sign."""
    x.bitwise_xor_(x.bitwise_right_shift(places).bitwise_and_((1 << (32 - places)) - 1))
