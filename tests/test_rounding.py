"""Rounding to a format: every number, every tie and its neighbours, against a search among the decoded codes."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.numerics import rounding
from halfstep.numerics.formats import BF16, E8M0, FORMATS, FP8_E5M2, FP16, TF32, Format, find_format
from halfstep.numerics.noise import derive_keys, draw_noise
from halfstep.numerics.rounding import MODES, round_to, round_to_slowly
from halfstep.numerics.words import round_stochastically
from helpers import words

Array = np.ndarray[Any, np.dtype[np.float64]]
Round = Callable[..., Tensor]
TWINS: dict[str, Round] = {"slow": round_to_slowly, "fast": round_to}
PLAIN = [format for format in FORMATS.values() if not format.block]
NARROW = [format for format in PLAIN if format.bits <= 8]
DIRECTED = [mode for mode in MODES if mode != "stochastic"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TORCH = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
         "fp8_e5m2fnuz": torch.float8_e5m2fnuz, "bf16": torch.bfloat16, "fp16": torch.float16}  # fmt: skip
NUMPY: dict[str, Any] = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2, "fp8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "fp8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz, "fp6_e2m3": ml_dtypes.float6_e2m3fn, "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn, "e8m0": ml_dtypes.float8_e8m0fnu, "bf16": ml_dtypes.bfloat16, "fp16": np.float16,
}  # fmt: skip
WIDE = {np.float16: np.float32, np.float32: np.float64}


def name_of(value: object) -> str:
    return value.name if isinstance(value, Format) else str(value).removeprefix("torch.")


@pytest.fixture(params=TWINS)
def round_with(request: pytest.FixtureRequest) -> Round:
    return TWINS[request.param]


by_format = pytest.mark.parametrize("format", NARROW, ids=name_of)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def can_overflow(format: Format) -> list[bool]:
    """What `saturate` may be."""
    return [True, False] if format.has_nan else [True]


# --- the third truth: a search among the numbers that the codes decode to


@cache
def list_numbers(format: Format) -> Array:
    """All finite numbers of a format, in order, zero once."""
    if format is TF32:
        positive = (np.arange(0x3FC00, dtype=np.uint32) << 13).view(np.float32).astype(np.float64)
        return np.concatenate([-positive[:0:-1], positive])
    values = np.array([format.decode(code) for code in range(1 << format.bits)])
    return np.unique(values[np.isfinite(values)])


def search(x: Array, format: Format, mode: str, *, saturate: bool) -> Array:
    """The number of the format that `x` (fp64, exact) is rounded to, by its neighbours on either side."""
    numbers = list_numbers(format)
    top = 2 * numbers[-1] - numbers[-2]  # where the next number would be
    if format is E8M0:
        top = 2.0**128
    bottom = -top if format.kind != "exponent" else -1.0
    grid = np.concatenate([[bottom], numbers, [top]]) if not saturate else numbers
    inside = np.clip(x, grid[0], grid[-1])
    above = np.clip(np.searchsorted(grid, inside), 1, len(grid) - 1)  # grid[above - 1] < inside <= grid[above]
    low, high = grid[above - 1], grid[above]
    middle = low + (high - low) / 2
    zero = np.searchsorted(grid, 0.0)  # number 0 has an even code; codes grow by one from there on, on both sides
    even_above = ((above - zero) % 2 == 0) | (format is E8M0)
    nearest = np.where((inside > middle) | ((inside == middle) & even_above), high, low)
    inward = np.where(inside > 0, low, high)
    found = {"nearest_even": nearest, "toward_zero": inward, "up": high, "down": low}[mode]
    found = np.where(inside == high, high, np.where(inside == low, low, found))
    if not saturate:
        end = math.inf if format.has_infinity else math.nan
        stops = {"toward_zero": x == x, "up": x < 0, "down": x > 0}.get(mode, x != x) & np.isfinite(x)
        found = np.where(np.abs(found) >= top, np.copysign(np.where(stops, numbers[-1], end), x), found)
    if format is E8M0:
        found = np.where(x < 0, math.nan, np.maximum(found, numbers[0]))
    found = np.where(np.isnan(x), math.nan, found)
    return np.copysign(found, x) if format.has_negative_zero else np.where(found == 0, 0.0, found)


def list_edges(format: Format) -> Array:
    """Every number of a format, every tie between two neighbours, and what is beyond, as fp64."""
    numbers = list_numbers(format)
    if format.bits > 16:
        numbers = numbers[:: 7 if format.bits < 32 else 7001]
    ties = numbers[:-1] + (numbers[1:] - numbers[:-1]) / 2
    gap = numbers[-1] - numbers[-2]
    beyond = numbers[-1] + gap * np.array([0.25, 0.5, 0.75, 1.0, 1.5, 7.0])
    rare = [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, -5e-324, 1e-30, -1e-30, 1.7e308, -1.7e308]
    return np.concatenate([numbers, ties, beyond, -beyond, rare])


def make_inputs(format: Format, dtype: torch.dtype) -> Tensor:
    """All numbers of a 16-bit dtype; in a wide one the edges of the format, and their neighbours on both sides."""
    if dtype.itemsize == 2:
        return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    with np.errstate(over="ignore"):
        edges = list_edges(format).astype({4: np.float32, 8: np.float64}[dtype.itemsize])
        return torch.from_numpy(np.concatenate([edges, np.nextafter(edges, np.inf), np.nextafter(edges, -np.inf)]))


def widen(x: Tensor) -> Array:
    wide: Array = x.to(torch.float64).numpy()
    return wide


def assert_numbers(actual: Tensor, expected: Array, x: Tensor, what: str) -> None:
    """The same numbers with the same signs, zero's too, once `expected` is in x's dtype; NaN where NaN is expected."""
    wanted = torch.from_numpy(np.ascontiguousarray(expected)).to(x.dtype)
    same = (actual == wanted) & (actual.signbit() == wanted.signbit()) | (actual.isnan() & wanted.isnan())
    wrong = (~same).nonzero()[:3, 0]
    assert not wrong.numel(), f"{what}: of {x[wrong].tolist()} {actual[wrong].tolist()}, not {wanted[wrong].tolist()}"


@by_format
@by_dtype
def test_every_number_is_rounded_as_a_search_among_the_codes_says(
    round_with: Round, format: Format, dtype: torch.dtype
) -> None:
    x = make_inputs(format, dtype)
    for mode in DIRECTED:
        for saturate in can_overflow(format):
            found = round_with(x, format, mode=mode, saturate=saturate)
            assert (found.dtype, found.shape) == (x.dtype, x.shape)
            assert_numbers(found, search(widen(x), format, mode, saturate=saturate), x, f"{mode} {saturate=}")


@pytest.mark.parametrize("format", [FP16, BF16, TF32], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_wider_formats_are_rounded_as_a_search_among_the_codes_says(
    round_with: Round, format: Format, dtype: torch.dtype
) -> None:
    x = make_inputs(format, dtype)
    for mode in DIRECTED:
        for saturate in (False, True):
            found = round_with(x, format, mode=mode, saturate=saturate)
            assert_numbers(found, search(widen(x), format, mode, saturate=saturate), x, f"{mode} {saturate=}")


def test_fp64_is_rounded_to_fp32_as_numpy_does_it(round_with: Round) -> None:
    high = np.arange(0, 0x7F800000, 65521, dtype=np.uint32).view(np.float32).astype(np.float64)
    next_one = (np.arange(0, 0x7F800000, 65521, dtype=np.uint32) + 1).view(np.float32).astype(np.float64)
    ties = high + (np.where(np.isinf(next_one), 2.0**128, next_one) - high) / 2
    x = np.concatenate([high, ties, np.nextafter(ties, np.inf), np.nextafter(ties, 0), [1e39, 1e-46, 1e-45, math.nan]])
    x = np.concatenate([x, -x])
    with np.errstate(over="ignore"):
        nearest = x.astype(np.float32).astype(np.float64)
        below = np.where(nearest > x, np.nextafter(nearest.astype(np.float32), np.float32(-np.inf)), nearest)
        above = np.where(nearest < x, np.nextafter(nearest.astype(np.float32), np.float32(np.inf)), nearest)
    inward = np.where(x > 0, below, above)
    given = torch.from_numpy(x)
    for mode, expected in {"nearest_even": nearest, "down": below, "up": above, "toward_zero": inward}.items():
        expected = np.copysign(expected.astype(np.float64), x)
        assert_numbers(round_with(given, "fp32", mode=mode), expected, given, mode)


# --- other people's truths


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_nearest_is_what_ml_dtypes_converts_to(round_with: Round, name: str, dtype: torch.dtype) -> None:
    format, x = find_format(name), make_inputs(find_format(name), dtype)
    if format is E8M0:
        x = x[x.to(torch.float64) >= 2.0**-126]  # what is less is NaN there, or rounded up too far
    if not format.has_nan:
        x = x[~x.isnan()]  # zero there
    with np.errstate(all="ignore"):
        theirs = x.to(torch.float32).numpy().astype(NUMPY[name]).astype(np.float64)
    assert_numbers(round_with(x, format, saturate=not format.has_nan), theirs, x, name)


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_nearest_is_what_torch_converts_to(round_with: Round, name: str, dtype: torch.dtype) -> None:
    format, x = find_format(name), make_inputs(find_format(name), dtype)
    x = x[(x.abs() <= format.max) | x.isnan()]  # beyond it, torch's fp8_e4m3 depends on its version
    theirs = widen(x.to(TORCH[name]).to(torch.float64))
    assert_numbers(round_with(x, format), theirs, x, name)


def test_scales_are_what_torch_converts_to(round_with: Round) -> None:
    x = make_inputs(E8M0, torch.float32)
    x = x[(x >= 2.0**-126) | (x == 2.0**-127) | (x == 0) | x.isnan()]  # in between it rounds up too much
    assert_numbers(round_with(x, E8M0), widen(x.to(torch.float8_e8m0fnu).to(torch.float64)), x, "e8m0")


# --- stochastic


ALL_NOISE = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("fp8_e4m3", 16.0, 18.0), ("fp8_e4m3", 0.0, 2.0**-9), ("fp8_e5m2", 2.0**-16, 2.0**-15), ("fp4_e2m1", 4.0, 6.0),
     ("fp6_e3m2", -5.0, -6.0), ("int8", -3.0, -4.0), ("int4", 0.0, 1.0), ("e8m0", 2.0, 4.0), ("fp8_e5m2fnuz", -7.0, -8.0),
     ("tf32", 1.0, 1 + 2.0**-10), ("fp16", 3 * 2.0**-24, 4 * 2.0**-24), ("bf16", 1.0, 1 + 2.0**-7)],
)  # fmt: skip
@by_dtype
def test_over_all_noise_the_larger_is_taken_as_often_as_it_should(
    round_with: Round, name: str, low: float, high: float, dtype: torch.dtype
) -> None:
    for share in (0.0, 2.0**-18, 2.0**-17, 2.0**-16, 0.25, 0.5, 0.5 + 2.0**-16, 0.7, 1 - 2.0**-16, 1 - 2.0**-18):
        x = torch.tensor(low + share * (high - low), dtype=torch.float64).to(dtype)
        exact = (x.item() - low) / (high - low)
        if not 0 <= exact <= 1 or torch.tensor(high).to(dtype).item() != high:
            continue  # the dtype has no number there
        rounded = round_with(x.expand(1 << 16), name, mode="stochastic", noise=ALL_NOISE)
        larger = int((rounded == high).sum())
        assert larger + int((rounded == low).sum()) == 1 << 16
        assert larger == math.floor(exact * 2**16 + 0.5)


@by_format
def test_in_the_mean_it_is_the_number_itself(round_with: Round, format: Format) -> None:
    draws = 1 << 12
    x = torch.linspace(0.003, 0.997, 64, dtype=torch.float64) * min(format.max, 7.0)
    x = torch.cat([x, x * 2.0**-6, -x, format.smallest_subnormal * torch.linspace(0.1, 1.9, 19, dtype=torch.float64)])
    x = x[x >= format.smallest_subnormal] if format is E8M0 else x
    noise = draw_noise(derive_keys(5, 0, 0), 0, draws * x.numel()).view(draws, -1)
    drawn = round_with(x.expand(draws, -1), format, mode="stochastic", noise=noise)
    up, down = (torch.from_numpy(search(widen(x), format, mode, saturate=True)) for mode in ("up", "down"))
    share = (x - down) / (up - down).clamp(min=1e-300)
    sigma = (up - down) * (share * (1 - share) / draws).sqrt()
    assert bool(((drawn.mean(0) - x).abs() <= 4 * sigma + (up - down) * 2.0**-17).all())


def test_bf16_is_drawn_as_stochastic_master_weights_are(round_with: Round) -> None:
    for high in (0x0000, 0x8000, 0x007F, 0x3F80, 0xC049, 0x7F7E, 0x7F7F, 0xFF7F, 0x7F80):
        weight = words(np.arange(1 << 16, dtype=np.uint32) | np.uint32(high << 16))
        for shift in (0, 12345):
            noise = ALL_NOISE.roll(shift)
            rounded = round_with(weight, "bf16", mode="stochastic", noise=noise)
            assert_numbers(rounded, widen(round_stochastically(weight, noise)), weight, hex(high))


@pytest.mark.parametrize("noise", [-(1 << 15), 0, (1 << 15) - 1])
def test_beyond_the_largest_number_a_draw_is_to_nearest(round_with: Round, noise: int) -> None:
    x = torch.tensor([448.0, 463.0, 464.0, 465.0, 1e9, math.inf, math.nan])
    x = torch.cat([x, -x])
    draws = torch.full(x.shape, noise, dtype=torch.int16)
    for saturate in (True, False):
        drawn = round_with(x, "fp8_e4m3", mode="stochastic", saturate=saturate, noise=draws)
        nearest = round_with(x, "fp8_e4m3", saturate=saturate)
        assert_numbers(drawn, widen(nearest), x, f"{saturate=}")
    x = torch.tensor([127.5, -127.5, -128.5, 128.0, -1e9])
    assert round_with(x, "int8", mode="stochastic", noise=draws[:5]).tolist() == [
        127.0,
        -128.0 if noise >= 0 else -127.0,
        -128.0,
        127.0,
        -128.0,
    ]


# --- properties


MIRRORED = {
    "nearest_even": "nearest_even",
    "toward_zero": "toward_zero",
    "up": "down",
    "down": "up",
    "stochastic": "stochastic",
}
PATTERNS = st.lists(st.integers(0, 2**32 - 1) | st.floats(width=32).map(lambda x: int(np.float32(x).view(np.uint32))),
                    min_size=1, max_size=50).map(words)  # fmt: skip
DRAWS = st.integers(-(1 << 15), (1 << 15) - 1)
HYPOTHESIS = settings(max_examples=150, deadline=None, database=None)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(12345.0), other.nan_to_num(12345.0)) and torch.equal(
        one.signbit(), other.signbit()
    )


def make_noise(x: Tensor, mode: str, draw: int) -> Tensor | None:
    return torch.full(x.shape, draw, dtype=torch.int16) if mode == "stochastic" else None


@HYPOTHESIS
@given(PATTERNS, st.sampled_from(PLAIN), st.sampled_from(MODES), st.sampled_from(DTYPES), DRAWS, st.booleans())
def test_fast_twin_agrees_with_the_readable_truth(
    x: Tensor, format: Format, mode: str, dtype: torch.dtype, draw: int, saturate: bool
) -> None:
    x, noise = x.to(dtype), make_noise(x, mode, draw)
    saturate = saturate or not format.has_nan
    slow = round_to_slowly(x, format, mode=mode, saturate=saturate, noise=noise)
    assert_numbers(
        round_to(x, format, mode=mode, saturate=saturate, noise=noise), widen(slow), x, f"{format.name} {mode}"
    )


@HYPOTHESIS
@given(PATTERNS, st.sampled_from(PLAIN), st.sampled_from(MODES), DRAWS)
def test_what_is_rounded_stays_and_keeps_its_order_and_its_bounds(
    x: Tensor, format: Format, mode: str, draw: int
) -> None:
    x = x.sort().values
    noise = make_noise(x, mode, draw)
    rounded = round_to(x, format, mode=mode, noise=noise)
    assert same(round_to(rounded, format, mode=mode, noise=noise), rounded)
    numbers = ~rounded.isnan()
    assert bool((rounded[numbers].diff() >= 0).all() or rounded[numbers].isinf().any())
    within = numbers & (x >= format.min) & (x <= format.max)
    assert bool(((rounded[within] >= format.min) & (rounded[within] <= format.max)).all())
    if mode == "up":
        assert bool((rounded[within] >= x[within]).all())
    if mode == "down" and format is not E8M0:
        assert bool((rounded[within] <= x[within]).all())


@HYPOTHESIS
@given(PATTERNS, st.sampled_from([f for f in PLAIN if f.kind == "float"]), st.sampled_from(MODES), DRAWS)
def test_rounding_is_symmetric(x: Tensor, format: Format, mode: str, draw: int) -> None:
    noise = make_noise(x, mode, draw)
    rounded = round_to(x, format, mode=mode, noise=noise)
    mirrored = round_to(-x, format, mode=MIRRORED[mode], noise=noise)
    zero = 0.0 if not format.has_negative_zero else -0.0
    numbers = ~x.isnan() & ~rounded.isnan()
    assert torch.equal(mirrored.isnan(), rounded.isnan())
    assert same((-mirrored + zero)[numbers], (rounded + zero)[numbers])


@pytest.mark.parametrize("format", [f for f in PLAIN if f.bits <= 16], ids=name_of)
@pytest.mark.parametrize("mode", MODES)
def test_numbers_of_the_format_never_move(round_with: Round, format: Format, mode: str) -> None:
    x = torch.from_numpy(list_numbers(format))
    for draw in (-(1 << 15), -1, (1 << 15) - 1):
        assert torch.equal(round_with(x, format, mode=mode, noise=make_noise(x, mode, draw)), x)


# --- rules


@pytest.mark.parametrize("format", PLAIN, ids=name_of)
def test_nan_stays_nan(round_with: Round, format: Format) -> None:
    for dtype in DTYPES:
        x = torch.full((3,), math.nan, dtype=dtype)
        for mode in MODES:
            assert round_with(x, format, mode=mode, noise=make_noise(x, mode, 7)).isnan().all(), (mode, dtype)


def test_a_format_saturates_by_itself_or_not(round_with: Round) -> None:
    x = torch.tensor([1e30, -math.inf])
    for format in NARROW:
        expected = [format.max, format.min] if format.saturates else [2.0**100, math.nan]
        found = round_with(x, format).tolist()
        assert found[0] == expected[0] and (found[1] == expected[1] or math.isnan(expected[1]))
    assert round_with(x, "fp16").tolist() == [math.inf, -math.inf]
    assert round_with(x, "fp16", saturate=True).tolist() == [65504.0, -65504.0]
    assert round_with(x, FP8_E5M2, saturate=False).tolist() == [math.inf, -math.inf]


def test_negative_zero_stays_where_the_format_has_one(round_with: Round) -> None:
    x = torch.tensor([-0.0, -1e-30])
    for format in PLAIN:
        if format.has_zero:
            found = round_with(x, format, mode="toward_zero")
            kept = torch.equal(found.signbit(), torch.tensor([True, True]))
            assert kept == format.has_negative_zero or format.name in ("fp32", "tf32", "bf16")
            assert bool((found[:1] == 0).all())


def test_scale_format_has_neither_zero_nor_negative_numbers(round_with: Round) -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -1.0, -math.inf, 3.0, 3.4e38])
    found = round_with(x, "e8m0")
    assert found[:3].tolist() == [2.0**-127] * 3
    assert found[3:5].isnan().all()
    assert found[5].item() == 4.0 and found[6].isnan()
    assert round_with(x, "e8m0", mode="up")[5].item() == 4.0
    assert round_with(x, "e8m0", saturate=True)[6].item() == 2.0**127


def test_result_that_the_dtype_lacks_is_what_conversion_makes_of_it(round_with: Round) -> None:
    assert round_with(torch.tensor([65504.0], dtype=torch.float16), "bf16").tolist() == [math.inf]
    assert round_with(torch.tensor([1e9], dtype=torch.bfloat16), "fp16", saturate=True).tolist() == [65536.0]


# --- tensors


@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2, 0, 3), (2, 3, 4)])
def test_shape_and_dtype_stay(round_with: Round, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        for name in ("fp8_e4m3", "bf16", "fp32"):
            found = round_with(torch.ones(shape, dtype=dtype), name)
            assert (found.shape, found.dtype) == (torch.Size(shape), dtype)


def test_order_in_memory_makes_no_difference(round_with: Round) -> None:
    x = torch.randn(6, 8, 10, generator=torch.Generator().manual_seed(0))
    noise = draw_noise(derive_keys(0, 0, 0), 0, 480).view(6, 8, 10)
    for view in (x.permute(2, 0, 1), x[::2, 1::3], x[:, :, 3], x[0, 0].expand(4, 10)):
        assert torch.equal(round_with(view, "fp4_e2m1"), round_with(view.contiguous(), "fp4_e2m1"))
    drawn = round_with(x.permute(2, 0, 1), "fp4_e2m1", mode="stochastic", noise=noise.permute(2, 0, 1))
    assert torch.equal(drawn, round_with(x, "fp4_e2m1", mode="stochastic", noise=noise).permute(2, 0, 1))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp32", "bf16", "int8"])
def test_x_stays_as_it_is_and_the_result_is_new(round_with: Round, name: str) -> None:
    for dtype in DTYPES:
        x = torch.tensor([1.0, 300.7, -math.inf, -0.0], dtype=dtype)
        before = x.clone()
        found = round_with(x, name)
        assert torch.equal(x, before) and found.data_ptr() != x.data_ptr()


def test_result_has_no_graph(round_with: Round) -> None:
    x = torch.ones(3, requires_grad=True)
    for name in ("fp8_e4m3", "bf16", "fp32"):
        assert not round_with(x, name).requires_grad
        assert not round_with(x * 2, name, mode="up").requires_grad


def test_pieces_of_a_large_tensor_are_put_together_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    noise = draw_noise(derive_keys(0, 0, 0), 0, 1001)
    expected = [round_to(x, "fp8_e4m3"), round_to(x, "fp8_e4m3", mode="stochastic", noise=noise)]
    monkeypatch.setattr(rounding, "BLOCK", 100)
    assert torch.equal(round_to(x, "fp8_e4m3"), expected[0])
    assert torch.equal(round_to(x, "fp8_e4m3", mode="stochastic", noise=noise), expected[1])


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"format": "nvfp4"},
            "nvfp4 stores a scale with every 16 numbers; round_to takes formats without scales, as fp4_e2m1; "
            "numerics.casting quantizes to nvfp4",
        ),
        (
            {"mode": "nearest"},
            "unknown rounding mode 'nearest'; did you mean 'nearest_even'? Allowed: down, nearest_even, stochastic, "
            "toward_zero, up",
        ),
        (
            {"x": torch.ones(2, dtype=torch.int32)},
            "round_to takes fp32, bf16, fp16 and fp64 tensors; got torch.int32; convert it first",
        ),
        (
            {"mode": "stochastic"},
            "mode 'stochastic' needs noise, and other modes take none; got mode 'stochastic' with no noise",
        ),
        (
            {"noise": torch.zeros(2, dtype=torch.int16)},
            "mode 'stochastic' needs noise, and other modes take none; got mode 'nearest_even' with noise of shape (2,)",
        ),
        (
            {"mode": "stochastic", "noise": torch.zeros(3, dtype=torch.int16)},
            "noise is int16 of x's shape (2,); got torch.int16 of (3,); use draw_noise",
        ),
        (
            {"mode": "stochastic", "noise": torch.zeros(2)},
            "noise is int16 of x's shape (2,); got torch.float32 of (2,); use draw_noise",
        ),
        (
            {"format": "int8", "saturate": False},
            "int8 has neither infinity nor NaN, so it always saturates; leave saturate=False out",
        ),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_what_cannot_be_rounded_is_refused_in_one_line(
    round_with: Round, arguments: dict[str, Any], message: str
) -> None:
    arguments = {"x": torch.ones(2), "format": "fp8_e4m3"} | arguments
    with pytest.raises(FormatError) as caught:
        round_with(arguments.pop("x"), arguments.pop("format"), **arguments)
    assert str(caught.value) == message
