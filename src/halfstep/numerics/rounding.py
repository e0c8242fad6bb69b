"""Rounding: the number of a format that stands for a given one.

Between two powers of two a format's numbers are equally far apart, one `quantum`; below its smallest normal number the
distance stays what it is there. So rounding is: divide by the quantum, round to a whole number, multiply again. Both the
division and the product are exact, because a quantum is a power of two.

    quantum = 2^(max(floor(log2 |x|), lowest exponent) - mantissa bits)        of an integer format: 1

    nearest_even   the nearest number; of two at the same distance, the even multiple of the quantum
    toward_zero    the nearest that is not larger in size
    up, down       the nearest that is not smaller, not larger
    stochastic     away from zero with the probability rest / quantum, else toward zero: in the mean, x itself. A draw has
                   16 bits, so the probability is rounded to a multiple of 2^-16, and less than 2^-17 of a quantum vanishes.

Beyond the largest number, and at the infinities (the two modes of OCP FP8 1.0):

    saturating     the largest number of that sign
    not            infinity where the format has one, else NaN, from halfway to where the next number would be. Away from
                   the infinities, a mode that rounds toward zero stops at the largest (IEEE 754-2019, section 7.4).
    stochastic     beyond the largest number as nearest_even: there is nothing above to choose

NaN stays NaN, also where the format has no code for it: what is broken has to stay visible. Negative zero, and what is
rounded to it, is zero where the format has no negative zero. A format of powers of two (e8m0) gives its smallest for zero
and all that is smaller, NaN for negative numbers, and takes two multiples of the quantum for even and one for odd, so a tie
goes up: as torch and ml_dtypes convert. (They differ on zero, NaN in ml_dtypes, and on negative numbers, which lose their
sign in torch; both take fp32 numbers little above 2^-127, which are subnormal, to 2^-126.)

A number is rounded once: fp64 does not pass through fp32. The result has x's dtype; where that lacks a number of the format
(65504 of fp16 in bf16) it is what conversion makes of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from halfstep.errors import FormatError, describe_unknown
from halfstep.numerics.formats import Format, find_format

MODES = ("nearest_even", "toward_zero", "up", "down", "stochastic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Formats that torch converts to by one rounding to nearest, ties to even, without saturation."""

BLOCK = 1 << 17  # numbers that are rounded at once by a thread: their buffers fit into its cache
WORDS = {torch.float32: (torch.int32, 8, 23), torch.float64: (torch.int64, 11, 52)}  # integers; exponent, mantissa bits


def round_to_slowly(
    x: Tensor,
    format: str | Format,
    *,
    mode: str = "nearest_even",
    saturate: bool | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """`round_to`, as the head of this module defines it, in fp64: the readable truth.

    Examples:
        >>> round_to_slowly(torch.tensor([17.0, 19.0, 1000.0, 0.001]), "fp8_e4m3").tolist()
        [16.0, 20.0, 448.0, 0.001953125]
    """
    target, saturates = _require_possible(x, format, mode, saturate, noise)
    exact = x.detach().to(torch.float64)
    size = exact.abs()
    if target.kind == "integer":
        quantum = torch.ones_like(size)
    else:
        fraction, _ = torch.frexp(size)  # in [1/2, 1)
        power = torch.fmax(size / (2 * fraction), size.new_tensor(target.smallest_normal))
        quantum = power * 2.0**-target.mantissa_bits
    steps = size / quantum
    whole = steps.floor()
    rest = steps - whole
    nearest = (rest > 0.5) | (rest == 0.5) & (whole % 2 == 1)
    if noise is not None:
        within = (target.min <= exact) & (exact <= target.max)
        away = torch.where(within, rest >= (2**15 - 0.5 - noise.to(torch.float64)) / 2**16, nearest)
    else:
        away = {
            "nearest_even": nearest,
            "toward_zero": torch.zeros_like(nearest),
            "up": (rest > 0) & (exact > 0),
            "down": (rest > 0) & (exact < 0),
        }[mode]
    rounded = torch.copysign((whole + away) * quantum, exact)
    return _bound(rounded, exact, target, mode, saturates).to(x.dtype)


def round_to(
    x: Tensor,
    format: str | Format,
    *,
    mode: str = "nearest_even",
    saturate: bool | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Every number of `x` rounded to a number of `format`; the head of this module says to which.

    x: fp32, bf16, fp16 or fp64, any shape, on any device. The result has its shape and dtype, and no graph.
    saturate: beyond the largest number, the largest one; None: as the format does by itself.
    noise: int16, of x's shape, uniform over [-2^15, 2^15), as `numerics.noise` draws it; for mode "stochastic".

    Examples:
        >>> x = torch.tensor([17.0, 19.0, 1000.0, 0.001])
        >>> round_to(x, "fp8_e4m3").tolist()
        [16.0, 20.0, 448.0, 0.001953125]
        >>> round_to(x, "fp8_e4m3", mode="up", saturate=False).tolist()
        [18.0, 20.0, nan, 0.001953125]

    Raises FormatError for a dtype, a mode or noise that is none of these, for a block format, which needs scales, and for
    saturate=False where the format has neither infinity nor NaN.
    """
    target, saturates = _require_possible(x, format, mode, saturate, noise)
    x, native = x.detach(), NATIVE.get(target.name)
    if native and mode == "nearest_even" and not saturates and (x.dtype != torch.float64 or native == torch.float32):
        return x.to(native, copy=True).to(x.dtype)
    rounded = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    numbers, results = x.reshape(-1), rounded.view(-1)
    draws = None if noise is None else noise.reshape(-1)
    wide = _choose_width(x.dtype, target)
    size = BLOCK * torch.get_num_threads() if x.device.type == "cpu" else max(1, x.numel())
    for start in range(0, x.numel(), size):
        block = slice(start, start + size)
        draw = None if draws is None else draws[block]
        results[block] = _round_block(numbers[block].to(wide), target, mode, saturates, draw)
    return rounded


def _choose_width(dtype: torch.dtype, target: Format) -> torch.dtype:
    """fp32, unless it lacks bits of x or has the format's smallest quantum only as a subnormal number."""
    fits = target.kind == "integer" or target.smallest_normal * 2.0**-target.mantissa_bits >= 2.0**-126
    return torch.float32 if fits and dtype != torch.float64 else torch.float64


def _round_block(x: Tensor, target: Format, mode: str, saturates: bool, noise: Tensor | None) -> Tensor:
    quantum = _find_quantum(x, target) if target.kind != "integer" else torch.ones((), dtype=x.dtype, device=x.device)
    steps = x / quantum
    if noise is None:
        rounded = ROUND[mode](steps).mul_(quantum)
    else:
        rounded = _round_at_random(steps, noise).mul_(quantum)
        if not saturates:
            rounded = torch.where(x.abs() <= target.max, rounded, steps.round_().mul_(quantum))
    return _bound(rounded, x, target, mode, saturates)


def _truncate(steps: Tensor) -> Tensor:
    return torch.copysign(steps.abs().floor_(), steps)  # some 8 times as fast on a processor as `trunc`


ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "nearest_even": Tensor.round_,
    "toward_zero": _truncate,
    "up": Tensor.ceil_,
    "down": Tensor.floor_,
}


def _find_quantum(x: Tensor, target: Format) -> Tensor:
    """A power of two for each number, from its word: the exponent's bits alone are the power of two below it."""
    integer, exponent_bits, mantissa_bits = WORDS[x.dtype]
    one, last = 1 << mantissa_bits, (1 << exponent_bits) - 1  # a step of the exponent; infinity's
    bias = last >> 1
    lowest = (-target.bias if target.kind == "exponent" else 1 - target.bias) + bias
    word = x.view(integer).bitwise_and(last * one)
    return word.clamp_(lowest * one, (last - 1) * one).sub_(target.mantissa_bits * one).view(x.dtype)


def _round_at_random(steps: Tensor, noise: Tensor) -> Tensor:
    """`steps` to a whole number, away from zero with the probability of the rest beyond the one toward zero.

    Away where rest + noise / 2^16 + 2^-17 - 1/2 is not negative; floating-point sums have the right sign.
    """
    size = steps.abs().clamp_(max=2.0**24)  # infinity has no rest
    whole = size.floor()
    draw = noise.to(steps.dtype).mul_(2.0**-16).add_(2.0**-17 - 0.5)
    away = size.sub_(whole).add_(draw).floor_().add_(1.0)
    return torch.copysign(whole.add_(away), steps)


INWARD: dict[str, Callable[[Tensor], Tensor | bool]] = {
    "toward_zero": lambda x: True,
    "up": lambda x: x < 0,
    "down": lambda x: x > 0,
}
"""Modes that round some numbers toward zero, and which."""


def _bound(rounded: Tensor, x: Tensor, target: Format, mode: str, saturates: bool) -> Tensor:
    """What becomes of results beyond the format's numbers, of negative zero, and of zero where there is none."""
    if saturates:
        rounded = rounded.clamp_(target.min, target.max)
    else:
        if mode in INWARD:
            stops = x.isfinite() & INWARD[mode](x)
            rounded = torch.where(stops, rounded.clamp(-target.max, target.max), rounded)
        rounded.div_((rounded.abs() <= target.max).to(rounded.dtype))  # by 1, or by 0, which gives infinity
        if not target.has_infinity:
            rounded.addcmul_(rounded, torch.zeros_like(rounded))  # infinity times 0 is NaN
    if not target.has_zero:
        return rounded.clamp_(min=target.min).masked_fill_(x < 0, torch.nan)
    return rounded if target.has_negative_zero else rounded.add_(0.0)


def _require_possible(
    x: Tensor, format: str | Format, mode: str, saturate: bool | None, noise: Tensor | None
) -> tuple[Format, bool]:
    """The format, and whether it is to saturate. Raises FormatError."""
    target = find_format(format) if isinstance(format, str) else format
    if target.block:
        raise FormatError(
            f"{target.name} stores a scale with every {target.block} numbers; round_to takes formats without scales, as "
            f"{target.element.name}; numerics.casting quantizes to {target.name}"
        )
    if x.dtype not in DTYPES:
        raise FormatError(f"round_to takes fp32, bf16, fp16 and fp64 tensors; got {x.dtype}; convert it first")
    if mode not in MODES:
        raise FormatError(describe_unknown("rounding mode", mode, MODES))
    if (mode == "stochastic") != (noise is not None):
        found = "no noise" if noise is None else f"noise of shape {tuple(noise.shape)}"
        raise FormatError(f"mode 'stochastic' needs noise, and other modes take none; got mode '{mode}' with {found}")
    if noise is not None and (noise.dtype != torch.int16 or noise.shape != x.shape):
        raise FormatError(
            f"noise is int16 of x's shape {tuple(x.shape)}; got {noise.dtype} of {tuple(noise.shape)}; use draw_noise"
        )
    if saturate is False and not (target.has_infinity or target.has_nan):
        raise FormatError(
            f"{target.name} has neither infinity nor NaN, so it always saturates; leave saturate=False out"
        )
    return target, target.saturates if saturate is None else saturate
