"""Rounding of fp32 words to fewer bits: defined to the bit, and the fast twins do just that."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfstep.numerics.formats import BF16
from halfstep.numerics.words import (
    apply_compensation,
    compensate,
    compensate_slowly,
    join,
    join24,
    join24_slowly,
    join_slowly,
    round_stochastically,
    round_stochastically_slowly,
    round_to_24_bits,
    split,
    split24,
    split24_slowly,
    split_slowly,
)
from helpers import bits, words

Split = Callable[[Tensor], tuple[Tensor, Tensor]]
Join = Callable[[Tensor, Tensor], Tensor]

HIGH_HALVES = {
    "zero": 0x0000,
    "negative zero": 0x8000,
    "smallest subnormals": 0x0001,
    "negative subnormals": 0x8040,
    "largest subnormals": 0x007F,
    "smallest normals": 0x0080,
    "one": 0x3F80,
    "just below one": 0x3F7F,
    "negative": 0xC049,
    "largest finite": 0x7F7F,
    "most negative finite": 0xFF7F,
    "infinity and NaN": 0x7F80,
    "negative infinity and NaN": 0xFF80,
}
EDGES = pytest.mark.parametrize("high", HIGH_HALVES.values(), ids=HIGH_HALVES)


def make_fast(write: Callable[[Tensor, Tensor, Tensor], None], dtype: torch.dtype) -> Split:
    def take_apart(weight: Tensor) -> tuple[Tensor, Tensor]:
        live = torch.empty_like(weight, dtype=torch.bfloat16)
        kept = torch.empty_like(weight, dtype=dtype)
        write(weight.clone(), live, kept)
        return live, kept

    return take_apart


split_fast = make_fast(split, torch.int16)
TWINS: dict[str, tuple[Split, Join]] = {"slow": (split_slowly, join_slowly), "fast": (split_fast, join)}
TWINS_24: dict[str, tuple[Split, Join]] = {
    "slow": (split24_slowly, join24_slowly),
    "fast": (make_fast(split24, torch.int8), join24),
}
TWINS_KAHAN: dict[str, Split] = {"slow": compensate_slowly, "fast": make_fast(compensate, torch.bfloat16)}
ALL_WAYS: dict[str, tuple[Split, Join]] = {
    **{f"split {name}": twin for name, twin in TWINS.items()},
    **{f"split24 {name}": twin for name, twin in TWINS_24.items()},
    **{f"kahan {name}": (apart, apply_compensation) for name, apart in TWINS_KAHAN.items()},
}


@pytest.fixture(params=TWINS)
def twin(request: pytest.FixtureRequest) -> tuple[Split, Join]:
    return TWINS[request.param]


def block(high: int) -> Tensor:
    """All 2^16 words with one high half, without the NaNs."""
    weight = words(np.arange(1 << 16, dtype=np.uint32) | np.uint32(high << 16))
    return weight[~weight.isnan()]


def nearest_distance(value: Tensor) -> Tensor:
    """fp64 distance from finite fp32 numbers to the nearest bf16, its exponent range taken as unbounded above."""
    exact = value.to(torch.float64).numpy()
    _, exponent = np.frexp(exact)
    grid = np.ldexp(1.0, np.maximum(exponent, -125) - 8)  # 8 significant bits; fixed spacing below 2^-126
    return torch.from_numpy(np.abs(exact - np.rint(exact / grid) * grid))


def as_fp64(live: Tensor) -> Tensor:
    """bf16 in fp64, with infinity where the next number after the largest would be."""
    wide = live.to(torch.float64)
    return torch.where(wide.isinf(), torch.sign(wide) * 2.0**128, wide)


@EDGES
def test_every_low_half_comes_back_bit_for_bit(twin: tuple[Split, Join], high: int) -> None:
    apart, together = twin
    weight = block(high)
    live, remainder = apart(weight)
    assert (live.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(bits(together(live, remainder)), bits(weight))


@EDGES
def test_live_weight_is_a_nearest_bf16(twin: tuple[Split, Join], high: int) -> None:
    weight = block(high)
    weight = weight[weight.isfinite()]
    if weight.numel() == 0:
        weight = torch.tensor([3.3e38])
    live, _ = twin[0](weight)
    assert torch.equal((as_fp64(live) - weight.to(torch.float64)).abs(), nearest_distance(weight))
    assert torch.equal(live.signbit(), weight.signbit())


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinity_stays_infinity_while_it_is_narrow(twin: tuple[Split, Join], value: float) -> None:
    apart, together = twin
    live, remainder = apart(torch.tensor([value]))
    assert live.tolist() == [value]
    assert together(live, remainder).tolist() == [value]


def test_tie_goes_away_from_zero(twin: tuple[Split, Join]) -> None:
    ties = words([0x3F808000, 0x3F818000, 0xBF808000, 0x00008000, 0x80008000])
    live, _ = twin[0](ties)
    assert (bits(live).to(torch.int32) & 0xFFFF).tolist() == [0x3F81, 0x3F82, 0xBF81, 0x0001, 0x8001]


def test_nan_stays_nan_in_its_usual_forms(twin: tuple[Split, Join]) -> None:
    apart, together = twin
    live, remainder = apart(words([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF80FFFF, 0x7FA12345]))
    assert together(live, remainder).isnan().all()
    assert live[:2].isnan().all()


@EDGES
def test_fast_split_and_join_agree_with_the_readable_truth(high: int) -> None:
    weight = block(high)
    (live, remainder), (slow_live, slow_remainder) = split_fast(weight), split_slowly(weight)
    assert torch.equal(bits(live), bits(slow_live))
    assert torch.equal(remainder, slow_remainder)
    assert torch.equal(bits(join(slow_live, slow_remainder)), bits(join_slowly(slow_live, slow_remainder)))


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_random_words_come_back_bit_for_bit_from_both_twins(patterns: list[int]) -> None:
    weight = words(patterns)
    weight = weight[~weight.isnan()]
    finite = weight[weight.isfinite()]
    for apart, together in TWINS.values():
        assert torch.equal(bits(together(*apart(weight))), bits(weight))
        assert torch.equal((as_fp64(apart(finite)[0]) - finite.to(torch.float64)).abs(), nearest_distance(finite))


@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_split_and_join_keep_the_shape(twin: tuple[Split, Join], shape: tuple[int, ...]) -> None:
    apart, together = twin
    live, remainder = apart(torch.ones(shape))
    assert live.shape == remainder.shape == together(live, remainder).shape == torch.Size(shape)


def test_join_leaves_its_inputs_as_they_were(twin: tuple[Split, Join]) -> None:
    apart, together = twin
    live, remainder = apart(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    before = live.clone(), remainder.clone()
    together(live, remainder)
    assert torch.equal(live, before[0]) and torch.equal(remainder, before[1])


@pytest.fixture(params=TWINS_24)
def twin24(request: pytest.FixtureRequest) -> tuple[Split, Join]:
    return TWINS_24[request.param]


@pytest.fixture(params=TWINS_KAHAN)
def apart_kahan(request: pytest.FixtureRequest) -> Split:
    return TWINS_KAHAN[request.param]


def whole_block(high: int) -> Tensor:
    """All 2^16 words with one high half, NaNs too."""
    return words(np.arange(1 << 16, dtype=np.uint32) | np.uint32(high << 16))


def nearest_even(value: Tensor, significant_bits: int) -> Tensor:
    """Finite fp32 numbers rounded in fp64 to that many bits, ties to even, in fp32's exponent range."""
    exact = value.to(torch.float64).numpy()
    _, exponent = np.frexp(exact)
    grid = np.ldexp(1.0, np.maximum(exponent, -125) - significant_bits)
    return torch.from_numpy(np.rint(exact / grid) * grid).to(torch.float32)


@EDGES
def test_24_bits_are_the_nearest_with_ties_to_even_for_every_low_half(twin24: tuple[Split, Join], high: int) -> None:
    apart, together = twin24
    weight = whole_block(high)
    live, remainder = apart(weight)
    assert (live.dtype, remainder.dtype) == (torch.bfloat16, torch.int8)
    back, finite = together(live, remainder), weight.isfinite()
    assert torch.equal(bits(back[finite]), bits(nearest_even(weight[finite], 16)))
    assert torch.equal(bits(back[weight.isinf()]), bits(weight[weight.isinf()]))
    assert (bits(back[weight.isnan()]) == 0x7FC00000).all() and live[weight.isnan()].isnan().all()
    assert torch.equal(bits(back), bits(round_to_24_bits(weight)))


@EDGES
def test_live_weight_of_24_bits_is_nearest_to_what_is_kept(twin24: tuple[Split, Join], high: int) -> None:
    apart, together = twin24
    weight = round_to_24_bits(whole_block(high))
    weight = weight[weight.isfinite()]
    live, remainder = apart(weight)
    assert torch.equal((as_fp64(live) - weight.to(torch.float64)).abs(), nearest_distance(weight))
    assert torch.equal(bits(together(live, remainder)), bits(weight))


@EDGES
def test_fast_24_bit_split_agrees_with_the_readable_truth(high: int) -> None:
    weight = whole_block(high)
    (live, remainder), (slow_live, slow_remainder) = TWINS_24["fast"][0](weight), split24_slowly(weight)
    assert torch.equal(bits(live), bits(slow_live)) and torch.equal(remainder, slow_remainder)
    assert torch.equal(bits(join24(live, remainder)), bits(join24_slowly(live, remainder)))


def test_carry_of_the_24_bit_rounding_runs_into_the_live_weight_and_into_infinity(twin24: tuple[Split, Join]) -> None:
    live, remainder = twin24[0](words([0x3F807FFF, 0x3F80FFFF, 0x3FFFFFFF, 0x7F7FFFFF, 0x00007FFF, 0x807FFFFF]))
    found = (bits(live).to(torch.int32) & 0xFFFF).tolist()
    assert found == [0x3F81, 0x3F81, 0x4000, 0x7F80, 0x0001, 0x8080]
    assert remainder.tolist() == [-128, 0, 0, 0, -128, 0]


@EDGES
def test_fast_compensation_agrees_with_the_readable_truth(high: int) -> None:
    weight = whole_block(high)
    (live, rest), (slow_live, slow_rest) = TWINS_KAHAN["fast"](weight), compensate_slowly(weight)
    known = ~weight.isnan()
    assert torch.equal(bits(live[known]), bits(slow_live[known]))
    assert torch.equal(rest, slow_rest)  # zeros of either sign
    assert live[~known].isnan().all() and slow_live[~known].isnan().all()


@EDGES
def test_compensated_weight_has_17_bits_and_its_sum_is_exact(apart_kahan: Split, high: int) -> None:
    weight = whole_block(high)
    live, rest = apart_kahan(weight)
    back, exact = apply_compensation(live, rest), live.to(torch.float64) - rest.to(torch.float64)
    finite = back.isfinite()
    assert torch.equal(back.to(torch.float64)[finite], exact[finite])
    _, exponent = torch.frexp(weight[finite].to(torch.float64))
    bound = torch.from_numpy(np.ldexp(1.0, np.maximum(exponent.numpy() - 18, -134)))
    error = (back[finite].to(torch.float64) - weight[finite].to(torch.float64)).abs()
    assert bool((error <= bound).all())
    assert torch.equal(live[finite].to(torch.float32), nearest_even(back[finite], 8))
    assert torch.equal(back.isnan(), weight.isnan())
    overflows = 2.0**128 - 2.0**119  # half a unit above the largest bf16; less what 17 bits round up to it
    assert bool((weight[back.isinf()].to(torch.float64).abs() >= overflows - 2.0**110).all())


@pytest.mark.parametrize("way", ALL_WAYS)
@EDGES
def test_what_was_read_is_written_back_as_the_same_pair(way: str, high: int) -> None:
    apart, together = ALL_WAYS[way]
    live, kept = apart(whole_block(high))
    again, kept_again = apart(together(live, kept))
    known = ~together(live, kept).isnan()
    assert torch.equal(bits(again[known]), bits(live[known]))
    assert torch.equal(bits(kept_again[known]), bits(kept[known]))
    assert together(again, kept_again)[~known].isnan().all()


@pytest.mark.parametrize("way", ALL_WAYS)
@settings(max_examples=100, deadline=None, database=None)
@given(patterns=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_random_words_are_read_and_written_back_as_the_same_pair(way: str, patterns: list[int]) -> None:
    apart, together = ALL_WAYS[way]
    weight = words(patterns)
    live, kept = apart(weight[~weight.isnan()])
    again, kept_again = apart(together(live, kept))
    assert torch.equal(bits(again), bits(live)) and torch.equal(bits(kept_again), bits(kept))


Rounding = Callable[[Tensor, Tensor], Tensor]
ROUNDINGS: dict[str, Rounding] = {"slow": round_stochastically_slowly, "fast": round_stochastically}
ALL_NOISE = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)


@pytest.fixture(params=ROUNDINGS)
def rounding(request: pytest.FixtureRequest) -> Rounding:
    return ROUNDINGS[request.param]


@pytest.mark.parametrize(
    "word", [0x3F800001, 0x3F808000, 0x3F80FFFF, 0xBFFFC000, 0x00000001, 0x8000A000, 0x7F7EFFFF, 0]
)
def test_over_all_noise_the_mean_is_the_weight(rounding: Rounding, word: int) -> None:
    weight = words([word])
    rounded = rounding(weight.expand(1 << 16).clone(), ALL_NOISE)
    away = (bits(rounded).to(torch.int32) & 0xFFFF) == (word >> 16) + 1
    assert int(away.sum()) == word & 0xFFFF
    assert bool(((bits(rounded).to(torch.int32) & 0xFFFF)[~away] == word >> 16).all())
    assert rounded.to(torch.float64).mean().item() == weight.item()


@EDGES
def test_fast_stochastic_rounding_agrees_with_the_readable_truth(high: int) -> None:
    weight = whole_block(high)
    for shift in (0, 12345, 40000):
        noise = ALL_NOISE.roll(shift)
        slow, fast = round_stochastically_slowly(weight, noise), round_stochastically(weight, noise)
        assert torch.equal(bits(fast)[~weight.isnan()], bits(slow)[~weight.isnan()])
        assert fast[weight.isnan()].isnan().all() and slow[weight.isnan()].isnan().all()


@pytest.mark.parametrize("noise", [-(1 << 15), 0, (1 << 15) - 1])
def test_beyond_the_largest_bf16_the_rounding_is_to_nearest(rounding: Rounding, noise: int) -> None:
    largest, inf = BF16.max, math.inf
    weight = torch.tensor([largest, -largest, 3.39e38, -3.39e38, 3.4e38, -3.4e38, inf, -inf, math.nan])
    rounded = rounding(weight, torch.full((9,), noise, dtype=torch.int16))
    assert rounded[:8].tolist() == [largest, -largest, largest, -largest, inf, -inf, inf, -inf]
    assert rounded[8].isnan()


def test_numbers_of_bf16_never_move(rounding: Rounding) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()]
    for noise in (-(1 << 15), -1, (1 << 15) - 1):
        rounded = rounding(every.to(torch.float32), torch.full(every.shape, noise, dtype=torch.int16))
        assert torch.equal(bits(rounded), bits(every))
