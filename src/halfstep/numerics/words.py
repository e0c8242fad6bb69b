"""fp32 words in fewer bits: how they are rounded, and what is kept of what rounding leaves over.

A bf16 number is the upper half of an fp32 word, so all of this is integer arithmetic on 32-bit words; a carry runs from
the mantissa into the exponent by itself, and from the largest finite number into infinity.

`split`: the nearest bf16, and the rest as a signed 16-bit number. Every fp32 word comes back, bit for bit.

    live      = (word + 0x8000) >> 16        modulo 2^32; a tie goes away from zero
    remainder = word - (live << 16)          within 16 signed bits
    word      = (live << 16) + remainder

A tie has to go away from zero and not to even: rounded to even, half of the ties would leave a remainder of +0x8000, one
more than 16 signed bits hold. Nothing is lost in `remainder`, so this adds up to no bias.

`split24`: the word is first rounded to its upper 24 bits (16 significant ones), then taken apart in the same way.

    word24    = (word + 0x7F + (bit 8 of word)) >> 8      the nearest; a tie goes to even
    live      = (word24 + 0x80) >> 8
    remainder = word24 - (live << 8)         within 8 signed bits

Here a tie goes to even, because this rounding does lose something, at every update, and a low byte of exactly 0x80 is not
rare: away from zero, weights would grow by 2^-24 of themselves a step. NaN becomes the quiet NaN 0x7FC00000: a carry would
turn others into infinity or zero. Infinities, signed zeros and subnormals follow the rule above.

Kahan: live = bf16(weight), compensation = bf16(live - weight), weight = live - compensation in fp32: 17 significant bits at
least, more where the compensation is small. It is subtracted, as in Kahan's summation, so that a negative zero stays one.
Where the compensation rounds up to half a unit of `live`, the difference is a tie that would round to another pair next
time; the pair kept is the one of the difference, so that reading and writing back changes nothing. Finite weights from
3.396e38 on, whose nearest bf16 is infinity, become infinity, with compensation 0. Absolute precision ends at 2^-134, half
the smallest bf16.

Stochastic: bf16(weight) away from zero with the probability of its low half / 2^16, else toward zero, so that the mean is
the weight. Weights beyond the largest bf16, infinities and NaN are rounded to nearest: there is nothing above to choose.

Sources: Kalamkar et al. 2019 (arXiv 1905.12322), split SGD; Zamirai et al. 2020 (arXiv 2010.06192), Kahan summation and
stochastic rounding of bf16 weights.
"""

import math

import torch
from torch import Tensor

from halfstep.numerics.formats import BF16

HALF_ULP = 0x8000  # of bf16, in an fp32 word
QUIET_NAN = 0x7FC00000
_WORD, _HALF = 0xFFFFFFFF, 0xFFFF


def _as_unsigned(weight: Tensor) -> Tensor:
    return weight.view(torch.int32).to(torch.int64) & _WORD


def _as_signed(unsigned: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return torch.where(unsigned >= 1 << (bits - 1), unsigned - (1 << bits), unsigned).to(dtype)


def split_slowly(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 tensor -> (bf16, int16 remainder), as the head of this module defines it: the readable truth.

    Examples:
        >>> live, remainder = split_slowly(torch.tensor([1.00390625]))      # halfway between two bf16 numbers
        >>> live.item(), remainder.item()
        (1.0078125, -32768)
    """
    word = _as_unsigned(weight)
    live = ((word + HALF_ULP) >> 16) & _HALF
    remainder = (word - (live << 16)) & _HALF
    return _as_signed(live, 16, torch.int16).view(torch.bfloat16), _as_signed(remainder, 16, torch.int16)


def join_slowly(live: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor that `split_slowly` took apart."""
    word = ((live.view(torch.int16).to(torch.int64) << 16) + remainder.to(torch.int64)) & _WORD
    return _as_signed(word, 32, torch.int32).view(torch.float32)


def split(weight: Tensor, live: Tensor, remainder: Tensor) -> None:
    """`split_slowly` into given tensors, by vectorised passes; `weight` is used up."""
    word = weight.view(torch.int32)
    remainder.copy_(word)  # conversion to a narrower integer keeps the low 16 bits, which are the remainder
    live.view(torch.int16).copy_(word.add_(HALF_ULP).bitwise_right_shift_(16))


def join(live: Tensor, remainder: Tensor) -> Tensor:
    """`join_slowly` by vectorised passes."""
    weight = live.to(torch.float32)  # the same as a shift by 16, and faster
    weight.view(torch.int32).add_(remainder)
    return weight


def round_to_24_bits(weight: Tensor) -> Tensor:
    """fp32 -> the nearest fp32 whose low 8 bits are zero, ties to even; NaN becomes the quiet one: the readable truth.

    Examples:
        >>> tie = torch.tensor([0x3F800080, 0x3F800180], dtype=torch.int32).view(torch.float32)
        >>> [hex(word) for word in round_to_24_bits(tie).view(torch.int32).tolist()]
        ['0x3f800000', '0x3f800200']
    """
    word = _as_unsigned(weight)
    upper, rest = word >> 8, word & 0xFF
    up = (rest > 0x80) | ((rest == 0x80) & (upper & 1 == 1))
    rounded = torch.where(weight.isnan(), QUIET_NAN, (upper + up.to(torch.int64)) << 8)
    return _as_signed(rounded, 32, torch.int32).view(torch.float32)


def split24_slowly(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 tensor -> (bf16, int8 remainder): the upper 24 bits of `round_to_24_bits`, taken apart."""
    word24 = _as_unsigned(round_to_24_bits(weight)) >> 8
    live = ((word24 + 0x80) >> 8) & _HALF
    remainder = (word24 - (live << 8)) & 0xFF
    return _as_signed(live, 16, torch.int16).view(torch.bfloat16), _as_signed(remainder, 8, torch.int8)


def join24_slowly(live: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor that `split24_slowly` took apart, rounded to 24 bits."""
    word = ((live.view(torch.int16).to(torch.int64) << 16) + (remainder.to(torch.int64) << 8)) & _WORD
    return _as_signed(word, 32, torch.int32).view(torch.float32)


def split24(weight: Tensor, live: Tensor, remainder: Tensor) -> None:
    """`split24_slowly` into given tensors, by vectorised passes; `weight` is used up."""
    word = weight.nan_to_num_(math.nan, math.inf, -math.inf).view(torch.int32)
    odd = word.bitwise_right_shift(8).bitwise_and_(1)
    word.add_(odd).add_(0x7F).bitwise_right_shift_(8)
    remainder.copy_(word)  # keeps the low 8 bits
    live.view(torch.int16).copy_(word.add_(0x80).bitwise_right_shift_(8))


def join24(live: Tensor, remainder: Tensor) -> Tensor:
    """`join24_slowly` by vectorised passes."""
    weight = live.to(torch.float32)
    weight.view(torch.int32).add_(remainder, alpha=0x100)
    return weight


def compensate_slowly(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 tensor -> (bf16, bf16 compensation), by exact fp64 arithmetic: the readable truth.

    Examples:
        >>> live, compensation = compensate_slowly(torch.tensor([1.001]))
        >>> live.item(), compensation.item()
        (1.0, -0.00099945068359375)
    """

    def take_apart(exact: Tensor) -> tuple[Tensor, Tensor]:
        live = exact.to(torch.float32).to(torch.bfloat16)
        excess = torch.where(live.isfinite(), live.to(torch.float64) - exact, 0.0)
        return live, excess.to(torch.float32).to(torch.bfloat16)

    live, compensation = take_apart(weight.to(torch.float64))
    return take_apart(live.to(torch.float64) - compensation.to(torch.float64))


def compensate(weight: Tensor, live: Tensor, compensation: Tensor) -> None:
    """`compensate_slowly` into given tensors, by vectorised passes; `weight` is used up."""
    live.copy_(weight)
    compensation.copy_(torch.sub(live, weight, out=weight).nan_to_num_(0.0, 0.0, 0.0))
    weight.copy_(live).sub_(compensation)  # what will be read; taken apart once more, it stays as it is
    live.copy_(weight)
    compensation.copy_(torch.sub(live, weight, out=weight).nan_to_num_(0.0, 0.0, 0.0))


def apply_compensation(live: Tensor, compensation: Tensor) -> Tensor:
    """The fp32 tensor that `compensate` keeps; the difference is exact."""
    return live.to(torch.float32).sub_(compensation)


def round_stochastically_slowly(weight: Tensor, noise: Tensor) -> Tensor:
    """fp32, int16 noise in [-2^15, 2^15) -> bf16, as the head of this module defines it: the readable truth.

    Away from zero where noise + 2^15 + low half >= 2^16: for `low half` of the 2^16 possible draws.

    Examples:
        >>> quarter = torch.full((2,), 1 + 2**-9)            # a quarter of the way from 1 to the next bf16 number
        >>> round_stochastically_slowly(quarter, torch.tensor([16383, 16384], dtype=torch.int16)).tolist()
        [1.0, 1.0078125]
    """
    word = _as_unsigned(weight)
    up = noise.to(torch.int64) + HALF_ULP + (word & _HALF) >= 1 << 16
    drawn = _as_signed(((word >> 16) + up.to(torch.int64)) & _HALF, 16, torch.int16).view(torch.bfloat16)
    within = (word & 0x7FFFFFFF) <= BF16.largest_code << 16
    return torch.where(within, drawn, weight.to(torch.bfloat16))


def round_stochastically(weight: Tensor, noise: Tensor) -> Tensor:
    """`round_stochastically_slowly` by vectorised passes; `weight` stays as it is.

    What is beyond the largest bf16 is set aside and put back after the draw: 0 for all weights but huge and non-finite ones.
    """
    drawn = weight.clamp(-BF16.max, BF16.max)
    beyond = drawn - weight
    drawn.view(torch.int32).add_(HALF_ULP).add_(noise).bitwise_and_(-1 << 16)
    return drawn.sub_(beyond).to(torch.bfloat16)
