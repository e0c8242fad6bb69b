"""Number formats against torch and ml_dtypes: every code of the narrow ones, the limits of all."""

import math
import struct
from dataclasses import fields
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from halfstep.errors import FormatError
from halfstep.numerics.formats import (
    BF16,
    E8M0,
    FORMATS,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E4M3FNUZ,
    FP8_E5M2,
    FP8_E5M2FNUZ,
    FP16,
    FP32,
    INT4,
    INT8,
    MXFP4,
    NVFP4,
    TF32,
    Format,
    find_format,
)

TORCH = {
    FP32: torch.float32,
    BF16: torch.bfloat16,
    FP16: torch.float16,
    FP8_E4M3: torch.float8_e4m3fn,
    FP8_E5M2: torch.float8_e5m2,
    FP8_E4M3FNUZ: torch.float8_e4m3fnuz,
    FP8_E5M2FNUZ: torch.float8_e5m2fnuz,
    E8M0: torch.float8_e8m0fnu,
}
NUMPY: dict[Format, Any] = {
    FP32: np.float32,
    BF16: ml_dtypes.bfloat16,
    FP16: np.float16,
    FP8_E4M3: ml_dtypes.float8_e4m3fn,
    FP8_E5M2: ml_dtypes.float8_e5m2,
    FP8_E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
    FP8_E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
    FP6_E2M3: ml_dtypes.float6_e2m3fn,
    FP6_E3M2: ml_dtypes.float6_e3m2fn,
    FP4_E2M1: ml_dtypes.float4_e2m1fn,
    E8M0: ml_dtypes.float8_e8m0fnu,
}
PLAIN = [format for format in FORMATS.values() if not format.block]
BLOCKS = [format for format in FORMATS.values() if format.block]
NARROW = [format for format in PLAIN if format.bits <= 16]


def name_of(format: Format) -> str:
    return format.name


def decode_all(format: Format) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([format.decode(code) for code in range(1 << format.bits)])


def widen(numbers: Any) -> Any:
    """As float64; a signalling NaN makes numpy warn."""
    with np.errstate(invalid="ignore"):
        return numbers.astype(np.float64)


def assert_same_numbers(ours: Any, theirs: Any) -> None:
    """Bit for bit, the sign of zero too; a NaN is a NaN whatever its payload."""
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    numbers = ~np.isnan(ours)
    assert np.array_equal(ours[numbers].view(np.int64), theirs[numbers].view(np.int64))


def test_table_holds_each_format_under_its_own_name() -> None:
    plain = "fp32 tf32 bf16 fp16 fp8_e4m3 fp8_e5m2 fp8_e4m3fnuz fp8_e5m2fnuz fp6_e2m3 fp6_e3m2 fp4_e2m1 int8 int4 e8m0"
    blocks = "mxfp8_e4m3 mxfp8_e5m2 mxfp6_e2m3 mxfp6_e3m2 mxfp4 nvfp4"
    assert list(FORMATS) == f"{plain} {blocks}".split()
    assert all(name == format.name for name, format in FORMATS.items())


@pytest.mark.parametrize("format", [f for f in TORCH if f is not FP32], ids=name_of)
def test_every_code_decodes_as_torch_says(format: Format) -> None:
    integers = {8: torch.uint8, 16: torch.int16}[format.bits]
    codes = torch.arange(1 << format.bits, dtype=torch.int32).to(integers)
    assert_same_numbers(decode_all(format), codes.view(TORCH[format]).to(torch.float64).numpy())


@pytest.mark.parametrize("format", [f for f in NUMPY if f is not FP32], ids=name_of)
def test_every_code_decodes_as_ml_dtypes_says(format: Format) -> None:
    codes = np.arange(1 << format.bits, dtype=np.uint16 if format.bits == 16 else np.uint8)
    assert_same_numbers(decode_all(format), widen(codes.view(NUMPY[format])))


@pytest.mark.parametrize("format", [INT8, INT4], ids=name_of)
def test_every_code_of_an_integer_decodes_as_twos_complement(format: Format) -> None:
    half = 1 << (format.bits - 1)
    assert_same_numbers(decode_all(format), np.array([*range(half), *range(-half, 0)], dtype=np.float64))


def test_int4_is_that_of_ml_dtypes() -> None:
    assert (INT4.min, INT4.max) == (int(ml_dtypes.iinfo(ml_dtypes.int4).min), int(ml_dtypes.iinfo(ml_dtypes.int4).max))


def test_fp32_codes_decode_as_the_machine_says() -> None:
    edges = [0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0x3F800001, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF]
    spread = [(i * 2654435761) % (1 << 32) for i in range(4096)]
    codes = np.array([*edges, *(edge | 1 << 31 for edge in edges), *spread], dtype=np.uint32)
    ours = np.array([FP32.decode(int(code)) for code in codes])
    assert_same_numbers(ours, widen(codes.view(np.float32)))


def test_tf32_codes_are_the_top_19_bits_of_fp32() -> None:
    codes = np.arange(0, 1 << 19, 7, dtype=np.uint32)
    ours = np.array([TF32.decode(int(code)) for code in codes])
    assert_same_numbers(ours, widen((codes << 13).view(np.float32)))


@pytest.mark.parametrize("format", TORCH, ids=name_of)
def test_limits_are_those_of_torch(format: Format) -> None:
    info = torch.finfo(TORCH[format])
    assert (format.max, format.min) == (info.max, info.min)
    assert format.smallest_normal == info.smallest_normal
    if format is not FP8_E5M2FNUZ:  # of which torch says 1/8, though 1 and 1.25 are neighbours
        assert format.eps == info.eps
    assert format.storage_bits == format.bits == info.bits


@pytest.mark.parametrize("format", NUMPY, ids=name_of)
def test_limits_are_those_of_ml_dtypes(format: Format) -> None:
    info = ml_dtypes.finfo(NUMPY[format])
    assert (format.max, format.min) == (float(info.max), float(info.min))
    assert format.eps == float(info.eps)
    assert format.smallest_normal == float(info.smallest_normal)
    assert format.smallest_subnormal == float(info.smallest_subnormal)
    assert format.mantissa_bits == info.nmant


def test_limits_of_int8_are_those_of_torch() -> None:
    info = torch.iinfo(torch.int8)
    assert (INT8.max, INT8.min, INT8.bits) == (info.max, info.min, info.bits)
    assert (INT8.eps, INT8.smallest_normal, INT8.smallest_subnormal) == (1.0, 1.0, 1.0)


def test_limits_of_tf32_are_fp32s_range_with_fp16s_precision() -> None:
    assert TF32.max == struct.unpack("<f", struct.pack("<I", 0x7F7FE000))[0]
    assert TF32.min == -TF32.max
    assert TF32.eps == FP16.eps == 2.0**-10
    assert TF32.smallest_normal == FP32.smallest_normal == 2.0**-126
    assert TF32.smallest_subnormal == 2.0**-136
    assert (TF32.bits, TF32.storage_bits) == (19, 32)


@pytest.mark.parametrize("format", [f for f in PLAIN if f.has_nan and f.specials != "negative_zero"], ids=name_of)
def test_largest_code_is_the_last_finite_one(format: Format) -> None:
    assert math.isfinite(format.decode(format.largest_code))
    assert not math.isfinite(format.decode(format.largest_code + 1))


@pytest.mark.parametrize("format", NARROW, ids=name_of)
def test_what_a_format_says_it_has_is_what_its_codes_hold(format: Format) -> None:
    values = decode_all(format)
    assert format.has_infinity == bool(np.isinf(values).any())
    assert format.has_nan == bool(np.isnan(values).any())
    assert format.has_zero == bool((values == 0).any())
    assert format.has_negative_zero == bool((np.signbit(values) & (values == 0)).any())
    assert format.has_subnormals == bool((np.abs(values[values != 0]) < format.smallest_normal).any())
    assert format.is_signed == bool((values < 0).any())


@pytest.mark.parametrize("format", NARROW, ids=name_of)
def test_limits_are_those_of_the_decoded_numbers(format: Format) -> None:
    values = decode_all(format)
    finite = np.unique(values[np.isfinite(values)])
    assert (format.min, format.max) == (finite[0], finite[-1])
    assert format.smallest_subnormal == finite[finite > 0][0]
    assert format.eps == finite[finite > 1][0] - 1


def test_int8_has_nothing_but_integers() -> None:
    assert not (INT8.has_infinity or INT8.has_nan or INT8.has_subnormals or INT8.has_negative_zero)


def test_formats_of_8_bits_or_less_saturate_but_for_scales() -> None:
    assert [f.name for f in FORMATS.values() if not f.saturates] == ["fp32", "tf32", "bf16", "fp16", "e8m0"]


@pytest.mark.parametrize("format", FORMATS.values(), ids=name_of)
@pytest.mark.parametrize("beyond", [0, 1])
def test_code_outside_the_format_is_refused(format: Format, beyond: int) -> None:
    codes = 1 << format.bits
    code = codes if beyond else -1
    with pytest.raises(FormatError) as caught:
        format.decode(code)
    assert str(caught.value) == f"{format.name} has codes 0 to {codes - 1}; got {code}"


@pytest.mark.parametrize("format", FORMATS.values(), ids=name_of)
def test_format_is_found_by_its_name_and_every_alias(format: Format) -> None:
    assert all(find_format(name) is format for name in (format.name, *format.aliases))


@pytest.mark.parametrize("format", TORCH, ids=name_of)
def test_torchs_own_names_are_aliases(format: Format) -> None:
    assert find_format(str(TORCH[format]).removeprefix("torch.")) is find_format(TORCH[format]) is format


@pytest.mark.parametrize("format", NUMPY, ids=name_of)
def test_the_names_of_ml_dtypes_are_aliases(format: Format) -> None:
    assert find_format(np.dtype(NUMPY[format]).name) is format


def test_torchs_name_of_two_packed_fp4_numbers_is_an_alias() -> None:
    assert find_format(str(torch.float4_e2m1fn_x2).removeprefix("torch.")) is FP4_E2M1


# --- blocks


@pytest.mark.parametrize("format", BLOCKS, ids=name_of)
def test_block_format_is_its_element_with_scales(format: Format) -> None:
    element = format.element
    assert element in PLAIN and element.element is element
    own = {"name", "aliases", "block", "scale", "tensor_scale", "element_name"}
    for field in fields(Format):
        if field.name not in own:
            assert getattr(format, field.name) == getattr(element, field.name), field.name
    assert (format.max, format.smallest_subnormal) == (element.max, element.smallest_subnormal)
    assert [format.decode(code) for code in range(4)] == [element.decode(code) for code in range(4)]


@pytest.mark.parametrize("format", PLAIN, ids=name_of)
def test_plain_format_is_its_own_element_and_has_no_scales(format: Format) -> None:
    assert format.element is format
    assert (format.block, format.scale, format.tensor_scale) == (0, "", "")
    assert format.bits_per_number == format.storage_bits


def test_blocks_are_those_of_their_specifications() -> None:
    found = {f.name: (f.element.name, f.block, f.scale, f.tensor_scale, f.bits_per_number) for f in BLOCKS}
    assert found == {
        "mxfp8_e4m3": ("fp8_e4m3", 32, "e8m0", "", 8.25),
        "mxfp8_e5m2": ("fp8_e5m2", 32, "e8m0", "", 8.25),
        "mxfp6_e2m3": ("fp6_e2m3", 32, "e8m0", "", 6.25),
        "mxfp6_e3m2": ("fp6_e3m2", 32, "e8m0", "", 6.25),
        "mxfp4": ("fp4_e2m1", 32, "e8m0", "", 4.25),
        "nvfp4": ("fp4_e2m1", 16, "fp8_e4m3", "fp32", 4.5),
    }
    assert find_format("mxfp4_e2m1") is MXFP4
    assert find_format(NVFP4.scale) is FP8_E4M3


def test_no_alias_has_two_meanings() -> None:
    names = [name for f in FORMATS.values() for name in (f.name, *f.aliases)]
    assert len(names) == len(set(names))


def test_unknown_format_names_the_nearest_one() -> None:
    with pytest.raises(FormatError) as caught:
        find_format("bf61")
    assert str(caught.value) == (f"unknown format 'bf61'; did you mean 'bf16'? Allowed: {', '.join(sorted(FORMATS))}")
