"""Number formats, complete: from these few fields every code of a format has one meaning.

    float:    value = (-1)^s * 2^(e - bias) * (1 + m / 2^mantissa_bits)         e > 0
              value = (-1)^s * 2^(1 - bias) * (m / 2^mantissa_bits)             e = 0, subnormal
    integer:  value = two's complement
    exponent: value = 2^(e - bias), without a sign, without zero: a format for scales

Which codes hold no finite number differs from format to format:

    ieee            the whole last exponent: infinity (m = 0) and NaN (m > 0)
    last            the very last code is NaN; there is no infinity, which is how fp8_e4m3 reaches 448
    negative_zero   the code of negative zero is NaN; there is neither infinity nor negative zero ("fnuz")
    none            every code is a finite number

A block format stores numbers of a plain format, its `element`, and beside them one scale for each `block` of them along the
dimension that a product sums over; `tensor_scale` is one more for the whole tensor:

    value = element * scale of its block * scale of its tensor

Limits are derived from the fields, never typed in; those of a block format are its element's, before the scales.

Sources: IEEE 754-2019, section 3.4 (fp32, fp16); NVIDIA, "TensorFloat-32", A100 white paper 2020 (tf32); OCP 8-bit Floating
Point Specification 1.0, table 1 (fp8_e4m3, fp8_e5m2); Noune et al. 2022, "8-bit Numerical Formats for Deep Neural Networks",
arXiv 2206.02915, and ONNX, "Float stored in 8 bits" (fnuz); OCP Microscaling Formats (MX) Specification 1.0, section 5 (fp6,
fp4, e8m0, mxfp8, mxfp6, mxfp4); NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, arXiv 2509.25149 (nvfp4).
"""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from halfstep.errors import FormatError, describe_unknown

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Format:
    """A number format.

    Examples:
        >>> FP16.max, BF16.eps, FP8_E4M3.smallest_subnormal
        (65504.0, 0.0078125, 0.001953125)
        >>> NVFP4.element.max, NVFP4.bits_per_number
        (6.0, 4.5)
    """

    name: str
    kind: Literal["float", "integer", "exponent"]
    exponent_bits: int
    mantissa_bits: int  # stored ones; an integer has bits - 1 of them
    storage_bits: int  # what one number takes in memory, packed, without scales
    bias: int
    specials: Literal["ieee", "last", "negative_zero", "none"]  # which codes hold no finite number
    saturates: bool  # out-of-range values become the largest, not infinity
    aliases: tuple[str, ...] = field(default=())
    block: int = 0  # numbers that share a scale, along the dimension that a product sums over; 0: no block
    scale: str = ""  # format of that scale
    tensor_scale: str = ""  # format of one more scale a tensor
    element_name: str = ""  # of a block format: the format of its numbers

    @property
    def element(self) -> "Format":
        """The format of a block format's numbers; of any other, itself."""
        return find_format(self.element_name) if self.block else self

    @property
    def is_signed(self) -> bool:
        return self.kind != "exponent"

    @property
    def bits(self) -> int:
        """Bits that carry information: sign, exponent and mantissa."""
        return self.is_signed + self.exponent_bits + self.mantissa_bits

    @property
    def bits_per_number(self) -> float:
        """Bits that a number takes in memory with its share of its block's scale.

        A tensor's own scale is left out: it is shared by too many to count.
        """
        return self.storage_bits + (find_format(self.scale).storage_bits / self.block if self.block else 0)

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
    def has_zero(self) -> bool:
        return self.kind != "exponent"

    @property
    def has_negative_zero(self) -> bool:
        return self.kind == "float" and self.specials != "negative_zero"

    @property
    def largest_code(self) -> int:
        """The code of the largest finite number."""
        all_ones = (1 << (self.bits - self.is_signed)) - 1
        return all_ones - {"ieee": 1 << self.mantissa_bits, "last": 1, "negative_zero": 0, "none": 0}[self.specials]

    @property
    def max(self) -> float:
        """The largest finite number."""
        return self.decode(self.largest_code)

    @property
    def min(self) -> float:
        """The most negative finite number; of a format without a sign, the smallest."""
        return {"float": -self.max, "integer": -self.max - 1, "exponent": self.decode(0)}[self.kind]

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with a full mantissa; 1 for an integer."""
        return {"float": 2.0 ** (1 - self.bias), "integer": 1.0, "exponent": 2.0**-self.bias}[self.kind]

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number."""
        return self.decode(1 if self.has_zero else 0)

    @property
    def eps(self) -> float:
        """The distance from 1 to the next number."""
        return 1.0 if self.kind == "integer" else 2.0**-self.mantissa_bits

    def decode(self, code: int) -> float:
        """The value of a code in [0, 2**bits).

        Examples:
            >>> FP8_E4M3.decode(0x7E), BF16.decode(0x3F80), E8M0.decode(0)
            (448.0, 1.0, 5.877471754111438e-39)

        Raises FormatError when the code does not fit in the format's bits.
        """
        if not 0 <= code < 1 << self.bits:
            raise FormatError(f"{self.name} has codes 0 to {(1 << self.bits) - 1}; got {code}")
        if self.kind == "integer":
            return float(code - (1 << self.bits) if code >> (self.bits - 1) else code)
        if self.kind == "exponent":
            return math.nan if code > self.largest_code else math.ldexp(1.0, code - self.bias)
        sign = -1.0 if code >> (self.bits - 1) else 1.0
        magnitude = code & ((1 << (self.bits - 1)) - 1)
        if magnitude > self.largest_code:
            infinity = self.has_infinity and magnitude == self.largest_code + 1
            return sign * math.inf if infinity else math.nan
        if self.specials == "negative_zero" and sign < 0 and magnitude == 0:
            return math.nan
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        if exponent == 0:
            return sign * math.ldexp(mantissa, 1 - self.bias - self.mantissa_bits)
        return sign * math.ldexp((1 << self.mantissa_bits) + mantissa, exponent - self.bias - self.mantissa_bits)


def _float(
    name: str,
    exponent_bits: int,
    mantissa_bits: int,
    aliases: tuple[str, ...] = (),
    *,
    specials: Literal["ieee", "last", "negative_zero", "none"] = "ieee",
    storage_bits: int = 0,
) -> Format:
    """A float with IEEE's bias, or one more where negative zero gave its code away (Noune et al.)."""
    bits = 1 + exponent_bits + mantissa_bits
    return Format(
        name=name,
        kind="float",
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        storage_bits=storage_bits or bits,
        bias=(1 << (exponent_bits - 1)) - (specials != "negative_zero"),
        specials=specials,
        saturates=bits <= 8,
        aliases=aliases,
    )


def _integer(bits: int) -> Format:
    return Format(
        name=f"int{bits}", kind="integer", exponent_bits=0, mantissa_bits=bits - 1, storage_bits=bits, bias=0,
        specials="none", saturates=True,
    )  # fmt: skip


def _block(
    name: str, element: Format, block: int, scale: str, aliases: tuple[str, ...] = (), tensor_scale: str = ""
) -> Format:
    return replace(
        element, name=name, aliases=aliases, block=block, scale=scale, tensor_scale=tensor_scale,
        element_name=element.name,
    )  # fmt: skip


FP32 = _float("fp32", 8, 23, ("float32", "float"))
TF32 = _float("tf32", 8, 10, storage_bits=32)
BF16 = _float("bf16", 8, 7, ("bfloat16",))
FP16 = _float("fp16", 5, 10, ("float16", "half"))
FP8_E4M3 = _float("fp8_e4m3", 4, 3, ("float8_e4m3fn",), specials="last")
FP8_E5M2 = _float("fp8_e5m2", 5, 2, ("float8_e5m2",))
FP8_E4M3FNUZ = _float("fp8_e4m3fnuz", 4, 3, ("float8_e4m3fnuz",), specials="negative_zero")
FP8_E5M2FNUZ = _float("fp8_e5m2fnuz", 5, 2, ("float8_e5m2fnuz",), specials="negative_zero")
FP6_E2M3 = _float("fp6_e2m3", 2, 3, ("float6_e2m3fn",), specials="none")
FP6_E3M2 = _float("fp6_e3m2", 3, 2, ("float6_e3m2fn",), specials="none")
FP4_E2M1 = _float("fp4_e2m1", 2, 1, ("float4_e2m1fn", "float4_e2m1fn_x2"), specials="none")
INT8 = _integer(8)
INT4 = _integer(4)
E8M0 = Format(
    name="e8m0", kind="exponent", exponent_bits=8, mantissa_bits=0, storage_bits=8, bias=127,
    specials="last", saturates=False, aliases=("float8_e8m0fnu",),
)  # fmt: skip
MXFP8_E4M3 = _block("mxfp8_e4m3", FP8_E4M3, 32, "e8m0")
MXFP8_E5M2 = _block("mxfp8_e5m2", FP8_E5M2, 32, "e8m0")
MXFP6_E2M3 = _block("mxfp6_e2m3", FP6_E2M3, 32, "e8m0")
MXFP6_E3M2 = _block("mxfp6_e3m2", FP6_E3M2, 32, "e8m0")
MXFP4 = _block("mxfp4", FP4_E2M1, 32, "e8m0", ("mxfp4_e2m1",))
NVFP4 = _block("nvfp4", FP4_E2M1, 16, "fp8_e4m3", tensor_scale="fp32")

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        FP32, TF32, BF16, FP16, FP8_E4M3, FP8_E5M2, FP8_E4M3FNUZ, FP8_E5M2FNUZ, FP6_E2M3, FP6_E3M2, FP4_E2M1, INT8, INT4,
        E8M0, MXFP8_E4M3, MXFP8_E5M2, MXFP6_E2M3, MXFP6_E3M2, MXFP4, NVFP4,
    )
}  # fmt: skip
_BY_ANY_NAME = {name: f for f in FORMATS.values() for name in (f.name, *f.aliases)}


def find_format(name: "str | torch.dtype") -> Format:
    """The format of that name or alias, or of torch's dtype.

    Examples:
        >>> find_format("bfloat16").name
        'bf16'
        >>> import torch
        >>> find_format(torch.float8_e4m3fn).name
        'fp8_e4m3'

    Raises FormatError, naming the nearest format, when there is none.
    """
    word = str(name).removeprefix("torch.")
    if word not in _BY_ANY_NAME:
        raise FormatError(describe_unknown("format", word, FORMATS))
    return _BY_ANY_NAME[word]
