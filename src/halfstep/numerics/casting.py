"""Scaled numbers: a tensor in a narrow format, and beside it the scales that bring it into the format's range.

    scale     = a permitted number near  amax / largest number of the format      amax: largest magnitude that shares it
    values    = x * (1 / scale), rounded to the format, beyond its largest number the largest
    x         ~ values * scale

What shares a scale, written as a word:

    tensor    all of it
    delayed   all of it, and amax is the largest of the last calls: `numerics.amax`
    row       all that one sum of a product runs over: with x as [rows, contraction], one scale a row
    RxC       blocks of R rows and C numbers along the contraction; 1x128 and 128x128 (DeepSeek-V3), 1x32 (MX), 1x16 (NVFP4)

and after a colon which scales are permitted, where that is not as the format has it:

    :e8m0     powers of two, the smallest with amax / scale <= largest number; so nothing overflows. Multiplying by them is
              exact, and a float loses no precision to them, only less than one binade of its range. For floats.
    :fp32     any number. For integers, whose precision is their range.

MX formats round the exponent up as `:e8m0` does (NVIDIA 2025, "RCEIL"); rounded down, as OCP MX 1.0 suggests, up to half of
the binade below amax would overflow. NVFP4 has two levels, and its block scales round to nearest, not up:

    tensor scale = amax / (largest fp4 * largest fp8_e4m3);        block scale = fp8_e4m3(block's amax / 6 / tensor scale)

What is not finite stays visible, because a step that meets it must not be applied. amax is that of the finite numbers. NaN
stays NaN, and infinity becomes the format's infinity, else its NaN. Where a format has no NaN (int8, fp6, fp4) the scale of
the block becomes NaN, and so all of the block. A block of zeros, and one without elements, has scale 1; a block of NVFP4 whose
scale rounds to zero is zero. Scales are kept within 2^-126 and 2^127: also their reciprocals are normal fp32 numbers.

Sources: Micikevicius et al. 2022, "FP8 formats for deep learning" (arXiv 2209.05433), section 3.1: amax to the format's
largest number; NVIDIA Transformer Engine's documentation, "delayed scaling": history of 1024, margin 0; DeepSeek-V3 technical
report 2024 (arXiv 2412.19437), section 3.3: tiles and blocks; Mishra et al. 2025, "Recipes for pre-training LLMs with MXFP8"
(arXiv 2506.08027): exponents up; NVIDIA 2025 (arXiv 2509.25149), section 2: NVFP4.
"""

import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from halfstep.errors import FormatError, describe_unknown
from halfstep.numerics.amax import align_scale, count_blocks, find_amaxes, join_blocks, split_blocks
from halfstep.numerics.formats import Format, find_format
from halfstep.numerics.rounding import round_to, round_to_slowly

STORAGE = {
    "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2fnuz": torch.float8_e5m2fnuz, "fp6_e2m3": torch.float8_e4m3fn, "fp6_e3m2": torch.float8_e4m3fn,
    "fp4_e2m1": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.int8,
}  # fmt: skip
"""What the numbers of an element format are kept in. Formats of 6 and 4 bits take 8: e4m3 has every number of theirs."""

SMALLEST_SCALE = 2.0**-126
SCALES = ("e8m0", "fp32")


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What shares a scale, and which scales are permitted.

    Examples:
        >>> Scaling.parse("1x128"), str(Scaling.parse("row:fp32"))
        (Scaling(kind='block', rows=1, columns=128, scale=''), 'row:fp32')

    Raises FormatError for a word that is none of those at the head of this module.
    """

    kind: Literal["tensor", "delayed", "row", "block"]
    rows: int = 0
    columns: int = 0  # along the contraction
    scale: str = ""  # "": as the format has it

    def __post_init__(self) -> None:
        if self.scale not in ("", *SCALES):
            raise FormatError(describe_unknown("scale format", self.scale, SCALES))
        if (self.kind == "block") != (self.rows > 0 and self.columns > 0):
            raise FormatError(
                f"blocks, and only they, have rows and columns; got {self.rows}x{self.columns} {self.kind}"
            )

    @classmethod
    def parse(cls, word: "str | Scaling") -> "Scaling":
        """The scaling of a word; a Scaling is given back as it is."""
        if isinstance(word, Scaling):
            return word
        name, _, scale = word.partition(":")
        if block := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
            return cls(kind="block", rows=int(block[1]), columns=int(block[2]), scale=scale)
        if name not in ("tensor", "delayed", "row"):
            raise FormatError(
                describe_unknown("scaling", word, ["tensor", "delayed", "row", "1x128", "128x128", "1x32"])
            )
        return cls(kind=name, scale=scale)  # type: ignore[arg-type]

    def __str__(self) -> str:
        name = f"{self.rows}x{self.columns}" if self.kind == "block" else self.kind
        return f"{name}:{self.scale}" if self.scale else name

    def find_scale_format(self, format: Format) -> str:
        """The name of the format that scales of this scaling and that number format have."""
        return self.scale or format.scale or ("fp32" if format.kind == "integer" else "e8m0")

    def find_blocks(self, format: Format, shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
        """How many numbers share a scale, along each dimension; `dims`, counted from 0, are the contraction."""
        if format.block and (self.kind != "block" or self.columns != format.block or self.scale):
            raise FormatError(f"{format.name} scales blocks of 1x{format.block}, in its own scale format; got '{self}'")
        if self.kind in ("tensor", "delayed"):
            return shape
        if self.kind == "row":
            return tuple(size if d in dims else 1 for d, size in enumerate(shape))
        if len(dims) != 1 or (self.rows > 1 and (len(shape) < 2 or dims[0] < len(shape) - 2)):
            raise FormatError(
                f"'{self}' takes one contraction dimension, and for rows > 1 one of the last two; got {dims} of {shape}"
            )
        other = 2 * len(shape) - 3 - dims[0]
        return tuple(self.columns if d == dims[0] else self.rows if d == other else 1 for d in range(len(shape)))


@dataclass(frozen=True, eq=False)
class ScaledTensor:
    """Numbers of a narrow format and their scales. Checked when it is made, without reading a number:

    - `values` has the dtype that STORAGE gives the format's element
    - `scale` is fp32, on the same device, with as many dimensions as `values`: ceil(size / block) long in each
    - `tensor_scale` is one fp32 number where the format has such a scale, else None

    Numbers of `scale` are positive (NVFP4: or zero) or NaN, and of the scale's own format.

    Examples:
        >>> x = quantize(torch.tensor([[1.0, 300.0]]), "fp8_e4m3", "tensor")
        >>> x.values.dtype, x.scale.tolist(), x.dequantize().tolist()
        (torch.float8_e4m3fn, [[1.0]], [[1.0, 288.0]])
    """

    values: Tensor
    scale: Tensor
    format: Format
    scaling: Scaling
    blocks: tuple[int, ...]  # numbers that share a scale, along each dimension
    tensor_scale: Tensor | None = None

    def __post_init__(self) -> None:
        expected = STORAGE[self.format.element.name]
        if self.values.dtype != expected:
            raise FormatError(f"{self.format.name} is stored in {expected}; got values of {self.values.dtype}")
        counts = count_blocks(self.values.shape, self.blocks)
        if self.scale.dtype != torch.float32 or tuple(self.scale.shape) != counts:
            raise FormatError(
                f"values of {tuple(self.values.shape)} in blocks of {self.blocks} take an fp32 scale of {counts}; got "
                f"{self.scale.dtype} of {tuple(self.scale.shape)}"
            )
        if self.scale.device != self.values.device:
            raise FormatError(f"values are on {self.values.device}, their scale on {self.scale.device}; move one")
        if (self.tensor_scale is not None) != bool(self.format.tensor_scale):
            raise FormatError(f"a tensor scale is for formats that have one; got {self.format.name}")

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def mT(self) -> Self:  # noqa: N802 - torch's name
        """The same numbers with the last two dimensions exchanged; nothing is copied and nothing rounded again."""
        blocks = (*self.blocks[:-2], self.blocks[-1], self.blocks[-2])
        return replace(self, values=self.values.mT, scale=self.scale.mT, blocks=blocks)

    @property
    def is_exact_in_bf16(self) -> bool:
        """Whether bf16 holds every number, scale included: 8 significant bits, and powers of two for scales.

        Numbers below 2^-133 aside: those are none that a sum of products would show.
        """
        return self.scaling.find_scale_format(self.format) == "e8m0"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, times their scales: in fp32, or fp64 for fp64, and then rounded to `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values, scale = widen(self.values).to(wide), self.find_scales().to(wide)
        if scale.numel() == 1:
            return values.mul_(scale.reshape(())).to(dtype)
        parts = split_blocks(values, self.blocks) * align_scale(scale, self.blocks, self.shape)
        return join_blocks(parts, self.blocks, self.shape).to(dtype)

    def find_scales(self) -> Tensor:
        """The scales, fp32, with the tensor's own multiplied in."""
        return self.scale if self.tensor_scale is None else self.scale * self.tensor_scale


def quantize(
    x: Tensor,
    format: str | Format,
    scaling: str | Scaling = "",
    *,
    dim: int | tuple[int, ...] = -1,
    amax: Tensor | None = None,
    mode: str = "nearest_even",
    noise: Tensor | None = None,
) -> ScaledTensor:
    """`x` in a narrow format, as the head of this module defines it.

    x: floating point, any shape.
    scaling: "" is "tensor", for a block format its own blocks.
    dim: the dimension, or for "tensor" and "row" dimensions, that the product will sum over.
    amax: take this for the largest magnitudes, as a history or all ranks together say; shaped as `scale`, or of one number.
    mode, noise: as `round_to` takes them.

    Examples:
        >>> quantize(torch.tensor([[1.0, -127.0], [0.5, 0.0]]), "int8", "row").values.tolist()
        [[1, -127], [127, 0]]
        >>> quantize(torch.full((2, 40), 3.0), "mxfp4").scale.tolist()
        [[0.5, 0.5], [0.5, 0.5]]

    Raises FormatError for a format that is no 8-bit or narrower one, and for a scaling that does not fit it or x's shape.
    """
    target, scaling, blocks = _settle(x, format, scaling, dim)
    x = x.detach()
    x = x.to(torch.float32) if x.dtype == torch.float16 else x  # times a scale it could leave fp16
    measured = find_amaxes(x, blocks)
    finite = None
    if x.device.type != "cpu" or not bool(measured.isfinite().all()):  # to ask another device would be to wait for it
        finite = x.isfinite()
        measured = find_amaxes(torch.where(finite, x, 0.0), blocks)
    scale, tensor_scale = _find_scales(measured if amax is None else amax.expand_as(measured), target, scaling)
    effective = scale if tensor_scale is None else scale * tensor_scale
    exact = scaling.find_scale_format(target) == "e8m0"
    inverse = torch.where(effective > 0, 1 / effective, 0.0).to(x.dtype if exact else torch.float32)
    if scale.numel() == 1:
        parts = x * inverse.reshape(()) if exact else x.to(inverse.dtype) * inverse.reshape(())
        scaled = parts.reshape(x.shape)
    else:
        parts = split_blocks(x if exact else x.to(inverse.dtype), blocks) * align_scale(inverse, blocks, x.shape)
        scaled = join_blocks(parts, blocks, x.shape)
    element = target.element
    if finite is not None:
        scaled = torch.where(finite, scaled.clamp(-element.max, element.max), x if element.has_nan else 0.0)
        if element.has_nan and not element.has_infinity:
            scaled = scaled.masked_fill_(scaled.isinf(), torch.nan)
        elif not element.has_nan:
            scale = scale.masked_fill(find_amaxes((~finite).to(torch.float32), blocks) > 0, torch.nan)
    values = _narrow(scaled, element, mode, noise, bounded=amax is None or finite is not None)
    return ScaledTensor(values, scale, target, scaling, blocks, tensor_scale)


def _settle(
    x: Tensor, format: str | Format, scaling: str | Scaling, dim: int | tuple[int, ...]
) -> tuple[Format, Scaling, tuple[int, ...]]:
    """Format, scaling and blocks of a call of `quantize`. Raises FormatError for what does not go together."""
    target = find_format(format) if isinstance(format, str) else format
    if target.element.name not in STORAGE:
        raise FormatError(
            f"{target.name} takes no scales; quantize takes 8-bit and narrower formats: {', '.join(STORAGE)}"
        )
    if not x.is_floating_point():
        raise FormatError(f"quantize takes floating-point tensors; got {x.dtype}; convert it first")
    scaling = Scaling.parse(scaling or (f"1x{target.block}" if target.block else "tensor"))
    dims = tuple(d % max(x.dim(), 1) for d in (dim if isinstance(dim, tuple) else (dim,)))
    return target, scaling, scaling.find_blocks(target, tuple(x.shape), dims)


def _narrow(scaled: Tensor, element: Format, mode: str, noise: Tensor | None, *, bounded: bool) -> Tensor:
    """Rounded to the element format, in its storage. `bounded`: nothing finite is beyond its largest number.

    The conversion of torch is taken where it is the same: nearest, ties to even. What it does beyond the largest number
    differs from format to format and from version to version, so nothing beyond may reach it.
    """
    storage = STORAGE[element.name]
    if mode == "nearest_even" and element.name.startswith("fp8"):
        return (scaled if bounded else scaled.clamp(-element.max, element.max)).to(storage)
    if mode == "nearest_even" and element.kind == "integer":
        return scaled.round().clamp_(-element.max, element.max).to(storage)
    wide = scaled if scaled.dtype == torch.float64 else scaled.to(torch.float32)
    rounded = round_to(wide, element, mode=mode, saturate=True, noise=noise)
    return rounded.clamp_(-element.max, element.max).to(storage)


def quantize_slowly(
    x: Tensor, format: str | Format, scaling: str | Scaling = "", *, dim: int | tuple[int, ...] = -1
) -> ScaledTensor:
    """`quantize` to nearest, block after block in Python: the readable truth."""
    target, scaling, blocks = _settle(x, format, scaling, dim)
    element, counts = target.element, count_blocks(x.shape, blocks)
    rounded, scales = torch.zeros(x.shape, dtype=torch.float32), torch.ones(counts)
    largest = max((abs(v) for v in x.flatten().tolist() if math.isfinite(v)), default=0.0)
    tensor_scale = torch.tensor(1.0)
    if target.tensor_scale and largest:
        tensor_scale = torch.tensor(largest) / (find_format(target.scale).max * element.max)
    for place in itertools.product(*map(range, counts)):
        here = tuple(slice(i * b, (i + 1) * b) for i, b in zip(place, blocks, strict=True))
        block = x[here].to(torch.float64)
        amax = max((abs(v) for v in block.flatten().tolist() if math.isfinite(v)), default=0.0)
        scale = _find_scale_slowly(amax, target, scaling, tensor_scale)
        product = torch.tensor(scale, dtype=torch.float32) * tensor_scale
        numbers = block.to(torch.float32) * (1 / product if product > 0 else 0.0)
        bounded = torch.where(block.isfinite(), numbers.clamp(-element.max, element.max), block.to(torch.float32))
        if not element.has_infinity:
            bounded[bounded.isinf()] = torch.nan
        if not element.has_nan and bounded.isnan().any():
            scale, bounded = math.nan, bounded.nan_to_num(0.0)
        scales[place] = scale
        rounded[here] = torch.where(bounded.isfinite(), round_to_slowly(bounded, element), bounded)
    two_levels = tensor_scale if target.tensor_scale else None
    return ScaledTensor(rounded.to(STORAGE[element.name]), scales, target, scaling, blocks, two_levels)


def _find_scale_slowly(amax: float, target: Format, scaling: Scaling, tensor_scale: Tensor) -> float:
    form = scaling.find_scale_format(target)
    if amax == 0:
        return 1.0
    if target.tensor_scale:
        return round_to_slowly(torch.tensor(amax) / (target.element.max * tensor_scale), form).item()
    if form == "e8m0":
        scale = SMALLEST_SCALE
        while amax / scale > target.element.max:
            scale *= 2
        return scale
    inverse = torch.tensor(target.element.max / amax).clamp(max=1 / SMALLEST_SCALE)
    return (1 / inverse).item()


def _find_scales(amax: Tensor, target: Format, scaling: Scaling) -> tuple[Tensor, Tensor | None]:
    """Scales, fp32, and that of the tensor where the format has one, from magnitudes that are finite."""
    form, largest = scaling.find_scale_format(target), target.element.max
    amax = amax.to(torch.float32)
    if target.tensor_scale:
        top = amax.amax() if amax.numel() else amax.new_zeros(())
        tensor_scale = torch.where(top > 0, top / (find_format(form).max * largest), 1.0)
        scale = round_to(amax / (largest * tensor_scale), form)
        return torch.where(amax > 0, scale, 1.0), tensor_scale
    if form == "e8m0":
        scale = _round_up_to_power_of_two(amax, largest)
    else:
        scale = 1 / (largest / amax.to(torch.float64)).to(torch.float32).clamp(max=1 / SMALLEST_SCALE)
    return torch.where(amax > 0, scale, 1.0), None


def _round_up_to_power_of_two(amax: Tensor, largest: float) -> Tensor:
    """The smallest power of two, not below 2^-126, with amax <= largest * power, by arithmetic on fp32 words.

    amax = m 2^e and largest = n 2^f, with m and n in [1, 2): the power is 2^(e - f), or twice that where m > n.
    """
    fraction, exponent = math.frexp(largest)
    steps = round((2 * fraction - 1) * 2**23)  # n's mantissa
    word = amax.contiguous().view(torch.int32) + (2**23 - 1 - steps)  # carries into the exponent where m > n
    power = (word >> 23) - (exponent - 1)
    return power.clamp_(1, 254).bitwise_left_shift_(23).view(torch.float32)


def widen(values: Tensor) -> Tensor:
    """Narrow numbers in fp32, exactly.

    torch converts fp8 on a CPU number by number (3 ns each on an EPYC with AVX-512; this takes 0.3). Shifted into place,
    e5m2 is fp16 without its last 8 bits, and e4m3 is fp16 with an exponent that is 8 too small, NaN aside.
    """
    if values.device.type != "cpu" or values.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return values.to(torch.float32)
    codes = values.view(torch.int8)
    if values.dtype == torch.float8_e5m2:
        return codes.to(torch.int16).bitwise_left_shift_(8).view(torch.float16).to(torch.float32)
    if codes.numel() and codes.bitwise_and(0x7F).amax() == 0x7F:
        return values.to(torch.float32)
    words = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # bit 14: a copy of the sign
    return words.view(torch.float16).to(torch.float32).mul_(2.0**8)


@dataclass(frozen=True, kw_only=True)
class RoundingError:
    """What rounding did to a tensor; shares are of its finite numbers that are not zero."""

    sqnr: float  # signal to quantization noise, 10 log10(sum x^2 / sum (x - rounded)^2), dB; inf where nothing changed
    overflowed: float  # share beyond the largest number of the format, by more than half of the last step to it
    underflowed: float  # share below its smallest normal number
    vanished: float  # share that became zero


def measure_error(exact: Tensor, rounded: Tensor | ScaledTensor, format: str | Format = "") -> RoundingError:
    """Compare a tensor with what became of it; numbers that are not finite are left out.

    rounded: of the same shape. A plain tensor needs the `format` it was rounded to, without scales.

    Examples:
        >>> x = torch.tensor([1.0, 1000.0, 0.01, 0.0001])
        >>> measure_error(x, round_to(x, "fp8_e4m3"), "fp8_e4m3")
        RoundingError(sqnr=5.161..., overflowed=0.25, underflowed=0.5, vanished=0.25)
    """
    if isinstance(rounded, ScaledTensor):
        limits = rounded.format.element
        aligned = align_scale(rounded.find_scales().to(torch.float64), rounded.blocks, rounded.shape)
        one = torch.ones(rounded.shape, dtype=torch.float64, device=exact.device)
        unit = join_blocks(split_blocks(one, rounded.blocks) * aligned, rounded.blocks, rounded.shape)
        result = rounded.dequantize(torch.float64)
    else:
        limits = find_format(format) if isinstance(format, str) else format
        unit, result = torch.ones((), dtype=torch.float64, device=exact.device), rounded.to(torch.float64)
    wide = exact.detach().to(torch.float64)
    counted = wide.isfinite() & result.isfinite()
    size, noise = wide.abs()[counted], (wide - result)[counted].square().sum().item()
    unit, zeros = unit.expand_as(wide)[counted], result[counted] == 0
    last = limits.max - limits.decode(limits.largest_code - 1)
    signal, total = size.square().sum().item(), max(int((size > 0).sum()), 1)
    ratio = 10 * math.log10(signal / noise) if signal and noise else (-math.inf if noise else math.inf)

    def share(which: Tensor) -> float:
        return int((which & (size > 0)).sum()) / total

    return RoundingError(
        sqnr=ratio,
        overflowed=share(size > (limits.max + last / 2) * unit),
        underflowed=share(size < limits.smallest_normal * unit),
        vanished=share(zeros),
    )
