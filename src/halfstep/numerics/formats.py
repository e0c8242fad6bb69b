"""Number formats, complete: from these few fields every code of a format has one meaning.

    float:   value = (-1)^s * 2^(e - bias) * (1 + m / 2^mantissa_bits)         e > 0
             value = (-1)^s * 2^(1 - bias) * (m / 2^mantissa_bits)             e = 0, subnormal
    integer: value = two's complement

The codes at the top of the exponent range differ from format to format: `ieee` gives the whole last exponent to
infinity (m = 0) and NaN (m > 0); `last` has no infinity and gives only the very last code to NaN, which is how
fp8_e4m3 reaches 448. Limits are derived from the fields, never typed in.

Sources: IEEE 754-2019, section 3.4 (fp32, fp16); OCP 8-bit Floating Point Specification 1.0, table 1 (fp8);
NVIDIA, "TensorFloat-32", A100 white paper 2020 (tf32).
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from halfstep.errors import FormatError, describe_unknown


@dataclass(frozen=True, kw_only=True)
class Format:
    """A number format.

    Examples:
        >>> FP16.max, BF16.eps, FP8_E4M3.smallest_subnormal
        (65504.0, 0.0078125, 0.001953125)
    """

    name: str
    kind: Literal["float", "integer"]
    exponent_bits: int
    mantissa_bits: int  # stored ones; an integer has bits - 1 of them
    storage_bits: int  # what one number takes in memory
    bias: int
    specials: Literal["ieee", "last", "none"]  # what the top exponent holds
    saturates: bool  # out-of-range values become the largest, not infinity
    aliases: tuple[str, ...] = field(default=())

    @property
    def bits(self) -> int:
        """Bits that carry information: sign, exponent and mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def has_infinity(self) -> bool:
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        return self.specials != "none"

    @property
    def has_subnormals(self) -> bool:
        return self.kind == "float"

    @property
    def has_negative_zero(self) -> bool:
        return self.kind == "float"

    @property
    def largest_code(self) -> int:
        """The code of the largest finite number."""
        all_ones = (1 << (self.bits - 1)) - 1
        return all_ones - {"ieee": 1 << self.mantissa_bits, "last": 1, "none": 0}[self.specials]

    @property
    def max(self) -> float:
        """The largest finite number."""
        return self.decode(self.largest_code)

    @property
    def min(self) -> float:
        """The most negative finite number."""
        return -self.max if self.kind == "float" else -self.max - 1

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with a full mantissa; 1 for an integer."""
        return 2.0 ** (1 - self.bias) if self.kind == "float" else 1.0

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number."""
        return self.decode(1)

    @property
    def eps(self) -> float:
        """The distance from 1 to the next number."""
        return 2.0**-self.mantissa_bits if self.kind == "float" else 1.0

    def decode(self, code: int) -> float:
        """The value of a code in [0, 2**bits).

        Examples:
            >>> FP8_E4M3.decode(0x7E), BF16.decode(0x3F80)
            (448.0, 1.0)

        Raises FormatError when the code does not fit in the format's bits.
        """
        if not 0 <= code < 1 << self.bits:
            raise FormatError(f"{self.name} has codes 0 to {(1 << self.bits) - 1}; got {code}")
        if self.kind == "integer":
            return float(code - (1 << self.bits) if code >> (self.bits - 1) else code)
        sign = -1.0 if code >> (self.bits - 1) else 1.0
        magnitude = code & ((1 << (self.bits - 1)) - 1)
        if magnitude > self.largest_code:
            infinity = self.has_infinity and magnitude == self.largest_code + 1
            return sign * math.inf if infinity else math.nan
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        if exponent == 0:
            return sign * math.ldexp(mantissa, 1 - self.bias - self.mantissa_bits)
        return sign * math.ldexp((1 << self.mantissa_bits) + mantissa, exponent - self.bias - self.mantissa_bits)


def _ieee(name: str, exponent_bits: int, mantissa_bits: int, storage_bits: int, aliases: tuple[str, ...]) -> Format:
    return Format(
        name=name,
        kind="float",
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        storage_bits=storage_bits,
        bias=(1 << (exponent_bits - 1)) - 1,
        specials="ieee",
        saturates=storage_bits == 8,
        aliases=aliases,
    )


FP32 = _ieee("fp32", 8, 23, 32, ("float32", "float"))
TF32 = _ieee("tf32", 8, 10, 32, ())
BF16 = _ieee("bf16", 8, 7, 16, ("bfloat16",))
FP16 = _ieee("fp16", 5, 10, 16, ("float16", "half"))
FP8_E5M2 = _ieee("fp8_e5m2", 5, 2, 8, ("float8_e5m2",))
FP8_E4M3 = Format(
    name="fp8_e4m3", kind="float", exponent_bits=4, mantissa_bits=3, storage_bits=8, bias=7,
    specials="last", saturates=True, aliases=("float8_e4m3fn",),
)  # fmt: skip
INT8 = Format(
    name="int8", kind="integer", exponent_bits=0, mantissa_bits=7, storage_bits=8, bias=0,
    specials="none", saturates=True,
)  # fmt: skip

FORMATS: dict[str, Format] = {f.name: f for f in (FP32, TF32, BF16, FP16, FP8_E4M3, FP8_E5M2, INT8)}
_BY_ANY_NAME = {name: f for f in FORMATS.values() for name in (f.name, *f.aliases)}


def find_format(name: str) -> Format:
    """The format of that name or alias.

    Examples:
        >>> find_format("bfloat16").name
        'bf16'

    Raises FormatError, naming the nearest format, when there is none.
    """
    if name not in _BY_ANY_NAME:
        raise FormatError(describe_unknown("format", name, FORMATS))
    return _BY_ANY_NAME[name]
