"""Scaled tensors against their slow truth; what must never happen to a number that is not finite; errors as theory has them."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.numerics.amax import AmaxHistory, find_amax
from halfstep.numerics.casting import (
    STORAGE,
    ScaledTensor,
    Scaling,
    measure_error,
    quantize,
    quantize_slowly,
    widen,
)
from halfstep.numerics.formats import FORMATS, find_format
from halfstep.numerics.noise import derive_keys, draw_noise
from halfstep.numerics.rounding import round_to_slowly
from helpers import seeded

ELEMENTS = list(STORAGE)
BLOCKED = [name for name, form in FORMATS.items() if form.block]
WORDS = ["tensor", "row", "1x8", "4x8", "3x5:fp32", "tensor:fp32", "row:e8m0"]
PAIRS = [(name, word) for name in ("fp8_e4m3", "int8") for word in WORDS]
PAIRS += [(name, word) for name in ELEMENTS if name not in ("fp8_e4m3", "int8") for word in ("tensor", "4x8")]
PAIRS += [(name, "") for name in BLOCKED] + [("nvfp4", "16x16"), ("mxfp4", "32x32")]
SHAPES = [(5, 33), (2, 3, 20), (1, 1), (0, 4), (4, 0)]


def make_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers of many binades."""
    with seeded(seed):
        return (torch.randn(shape) * torch.exp(3 * torch.randn(shape))).to(dtype)


def assert_equal(actual: ScaledTensor, expected: ScaledTensor) -> None:
    for a, e in ((actual.scale, expected.scale), (actual.values, expected.values)):
        torch.testing.assert_close(a.to(torch.float32), e.to(torch.float32), rtol=0, atol=0, equal_nan=True)
    if expected.tensor_scale is not None:
        assert torch.equal(actual.tensor_scale, expected.tensor_scale)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "word"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_is_its_slow_truth(name: str, word: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for dim in (-1, -2):
            x = make_tensor(shape, dtype)
            assert_equal(quantize(x, name, word, dim=dim), quantize_slowly(x, name, word, dim=dim))


@pytest.mark.parametrize(("name", "word"), PAIRS)
def test_quantize_is_its_slow_truth_for_zeros_and_what_is_not_finite(name: str, word: str) -> None:
    x = make_tensor((6, 40))
    x[0, 1], x[1, 2], x[2, 3], x[3] = math.nan, math.inf, -math.inf, 0.0
    for dim in (-1, -2):
        assert_equal(quantize(x, name, word, dim=dim), quantize_slowly(x, name, word, dim=dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "int8", "mxfp8_e4m3", "nvfp4"])
def test_other_dtypes_are_quantized_too(name: str, dtype: torch.dtype) -> None:
    x = make_tensor((8, 64)).to(torch.float16)  # every dtype has these numbers
    assert_equal(quantize(x.to(dtype), name), quantize(x.to(torch.float32), name))


@pytest.mark.parametrize(("name", "word"), PAIRS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("delayed", [False, True])
def test_nothing_that_is_not_finite_becomes_finite(name: str, word: str, wrong: float, delayed: bool) -> None:
    x = make_tensor((6, 40))
    x[3, 17] = wrong
    amax = torch.tensor(10.0) if delayed else None
    back = quantize(x, name, word, amax=amax).dequantize()
    assert not back[3, 17].isfinite()
    if find_format(name).has_nan:
        assert back.isfinite().sum() == x.numel() - 1, "its neighbours stay as they were"


def test_infinity_stays_infinity_where_the_format_has_it() -> None:
    x = torch.tensor([1.0, math.inf, -math.inf])
    assert quantize(x, "fp8_e5m2").dequantize().tolist() == [1.0, math.inf, -math.inf]
    assert quantize(x, "fp8_e4m3").dequantize()[1:].isnan().all()


@pytest.mark.parametrize(("name", "word"), PAIRS)
def test_zeros_come_back_as_zeros(name: str, word: str) -> None:
    x = torch.zeros(6, 40)
    scaled = quantize(x, name, word)
    assert torch.equal(scaled.dequantize(), x)
    assert (scaled.scale == 1).all()


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4)])
def test_any_shape_comes_back(shape: tuple[int, ...]) -> None:
    for word in ("tensor", "row", "1x2"):
        assert quantize(torch.ones(shape), "fp8_e4m3", word).dequantize().shape == shape


@settings(max_examples=200, deadline=None)
@given(st.floats(min_value=2.0**-126, max_value=2.0**127, width=32), st.sampled_from(ELEMENTS))
def test_power_of_two_scales_are_the_smallest_that_do_not_overflow(amax: float, name: str) -> None:
    largest = find_format(name).max
    scale = quantize(torch.tensor([amax]), name, "tensor:e8m0").scale.item()
    assert math.frexp(scale)[0] == 0.5
    assert amax / scale <= largest
    assert amax / (scale / 2) > largest or scale == 2.0**-126


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_error_is_at_most_half_a_quantum(data: st.DataObject) -> None:
    name, word = data.draw(st.sampled_from([pair for pair in PAIRS if pair[0] != "nvfp4"]))
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 70)))
    exponent = data.draw(st.integers(-80, 80))
    x = make_tensor(shape, seed=data.draw(st.integers(0, 1000))) * 2.0**exponent
    scaled = quantize(x, name, word)
    unit = spread(scaled)
    error = (x.to(torch.float64) - scaled.dequantize(torch.float64)).abs()
    bound = find_quantum(x, scaled, unit) / 2 * (1 + 2**-20)  # free scales: x * (1 / scale) is itself rounded
    assert (error <= bound).all()


def spread(scaled: ScaledTensor) -> Tensor:
    """The scale of each number."""
    return replace(scaled, values=torch.ones(scaled.shape).to(scaled.values.dtype)).dequantize(torch.float64)


def find_quantum(x: Tensor, scaled: ScaledTensor, unit: Tensor) -> Tensor:
    """The distance between the format's numbers around each x."""
    element = scaled.format.element
    if element.kind == "integer":
        return unit
    _, exponent = torch.frexp(x.abs().to(torch.float64) / unit)
    power = torch.ldexp(torch.ones_like(unit), exponent - 1).clamp_min(element.smallest_normal)
    return power * unit * 2.0**-element.mantissa_bits


@pytest.mark.parametrize("name", [name for name in ELEMENTS + BLOCKED if find_format(name).element.bits > 4])
def test_noise_is_that_of_errors_spread_evenly_over_a_quantum(name: str) -> None:
    """SQNR = sum x^2 / sum quantum^2 / 12. A square of such an error varies by 0.9 of its mean, and 2^16 of them, of which
    the largest count most, by 0.5 %: 0.1 dB is 5 times that. (In 4 bits the data is not even over a quantum.)"""
    with seeded(1):
        x = torch.randn(256, 256)
    scaled = quantize(x, name, "row" if name == "int8" else "")
    noise = find_quantum(x, scaled, spread(scaled)).square().sum() / 12
    expected = 10 * math.log10((x.to(torch.float64).square().sum() / noise).item())
    assert measure_error(x, scaled).sqnr == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.int8])
def test_widening_is_exact_for_every_code(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    for some in (codes, codes[codes.to(torch.float32).isfinite()], codes.view(16, 16).mT, codes[:0]):
        torch.testing.assert_close(widen(some), some.to(torch.float32), rtol=0, atol=0, equal_nan=True)


def test_transposing_changes_no_number() -> None:
    for word in ("tensor", "row", "1x8", "4x8"):
        scaled = quantize(make_tensor((3, 10, 24)), "fp8_e4m3", word)
        assert torch.equal(scaled.mT.dequantize(), scaled.dequantize().mT)


def test_a_scaled_tensor_is_checked_when_it_is_made() -> None:
    good = quantize(make_tensor((4, 8)), "fp8_e4m3", "row")
    form, scaling, blocks = good.format, good.scaling, good.blocks
    with pytest.raises(FormatError, match=r"stored in torch\.float8_e4m3fn; got values of torch\.int8"):
        ScaledTensor(good.values.view(torch.int8), good.scale, form, scaling, blocks)
    with pytest.raises(FormatError, match=r"take an fp32 scale of \(4, 1\); got torch\.float32 of \(4,\)"):
        ScaledTensor(good.values, good.scale[:, 0], form, scaling, blocks)
    with pytest.raises(FormatError, match=r"got torch\.float64"):
        ScaledTensor(good.values, good.scale.double(), form, scaling, blocks)
    with pytest.raises(FormatError, match="tensor scale"):
        ScaledTensor(good.values, good.scale, form, scaling, blocks, torch.ones(()))


@pytest.mark.parametrize(
    ("name", "word", "text"),
    [
        ("bf16", "tensor", "bf16 takes no scales"),
        ("fp8_e4m3", "tensr", "did you mean 'tensor'"),
        ("fp8_e4m3", "0x4", "unknown scaling '0x4'"),
        ("fp8_e4m3", "row:fp8", "unknown scale format 'fp8'"),
        ("mxfp4", "1x16", "mxfp4 scales blocks of 1x32"),
        ("nvfp4", "tensor", "nvfp4 scales blocks of 1x16"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, word: str, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        quantize(torch.ones(2, 4), name, word)


def test_blocks_of_rows_need_one_of_the_last_two_dimensions() -> None:
    with pytest.raises(FormatError, match="one of the last two"):
        quantize(torch.ones(2, 3, 4), "fp8_e4m3", "2x2", dim=0)
    with pytest.raises(FormatError, match="one contraction dimension"):
        quantize(torch.ones(2, 3, 4), "fp8_e4m3", "1x2", dim=(1, 2))
    with pytest.raises(FormatError, match="floating-point"):
        quantize(torch.ones(2, 3, dtype=torch.int32), "fp8_e4m3")


@pytest.mark.parametrize("word", ["tensor", "delayed", "row", "1x128", "128x128", "row:fp32", "1x32:e8m0"])
def test_words_come_back(word: str) -> None:
    assert str(Scaling.parse(word)) == word
    assert Scaling.parse(Scaling.parse(word)) == Scaling.parse(word)


def test_stochastic_rounding_keeps_the_mean() -> None:
    x = torch.full((1, 1 << 16), 1.03)
    x[0, 0] = 448.0
    noise = draw_noise(derive_keys(0, 0, 0), 0, x.numel()).reshape(x.shape)
    rounded = quantize(x, "fp8_e4m3", mode="stochastic", noise=noise).dequantize()[0, 1:]
    quantum = 0.125
    spread = quantum * math.sqrt(0.24 * 0.76 / rounded.numel())  # of a mean of draws between 1 and 1.125
    assert set(rounded.tolist()) == {1.0, 1.125}
    assert abs(rounded.mean().item() - 1.03) < 5 * spread


def test_an_outlier_beyond_delayed_scales_saturates_once() -> None:
    history = AmaxHistory(window=3)
    calm, outlier = torch.tensor([1.0, -2.0]), torch.tensor([1.0, -5000.0])
    for x, expected in ((calm, -2.0), (outlier, -3.5), (outlier, -5120.0), (calm, -2.0)):  # 448 of 2^-7, of 2^4
        assert quantize(x, "fp8_e4m3", "delayed", amax=history.follow(x)).dequantize()[1] == expected
    assert history.follow(calm) == 5000
    assert history.follow(calm) == 5000
    assert history.follow(calm) == 2, "the outlier has left the window"


@pytest.mark.parametrize("name", ELEMENTS)
def test_what_delayed_scales_did_not_foresee_becomes_the_largest_number(name: str) -> None:
    x = torch.tensor([0.5, 1e3, -1e30])
    scaled = quantize(x, name, "delayed", amax=torch.ones(()))
    end = (find_format(name).max * scaled.scale).item()
    assert scaled.dequantize()[1:].tolist() == [end, -end]


def test_a_history_leaves_out_what_is_not_finite_and_keeps_headroom() -> None:
    history = AmaxHistory(margin=2)
    assert history.follow(torch.tensor([1.0, math.inf, math.nan])) == 4.0
    assert history.follow(torch.tensor([0.5])) == 4.0


def test_a_history_asks_the_other_ranks_and_comes_back() -> None:
    history = AmaxHistory(window=2, reduce=lambda amax: amax * 3)
    history.follow(torch.tensor([1.0]))
    again = AmaxHistory(window=2)
    again.load_state_dict(history.state_dict())
    assert again.follow(torch.tensor([7.0])) == 3.0
    assert history.amaxes.tolist() == [0.0, 3.0], "a loaded history is its own"
    with pytest.raises(FormatError, match="window of 1 or more"):
        AmaxHistory(window=0)


def test_amax_is_of_the_finite_numbers() -> None:
    assert find_amax(torch.tensor([1.0, -3.0, math.nan, -math.inf])) == 3.0
    assert find_amax(torch.zeros(0)) == 0.0


def test_error_counts_what_overflows_underflows_and_vanishes() -> None:
    x = torch.tensor([1.0, 500.0, 2.0**-7, 2.0**-11, 0.0, math.nan])
    error = measure_error(x, round_to_slowly(x, "fp8_e4m3"), "fp8_e4m3")
    assert (error.overflowed, error.underflowed, error.vanished) == (0.25, 0.5, 0.25)
    assert error.sqnr == pytest.approx(10 * math.log10((1 + 500**2) / 52**2), abs=0.01)
    rows = torch.tensor([[1.0, 0.001], [1000.0, 1.0]])
    scaled = measure_error(rows, quantize(rows, "int8", "row"))
    assert (scaled.overflowed, scaled.underflowed, scaled.vanished) == (0.0, 0.5, 0.5)


def test_error_of_an_exact_copy_is_none() -> None:
    assert measure_error(torch.ones(3), torch.ones(3), "bf16").sqnr == math.inf
    assert measure_error(torch.zeros(3), torch.ones(3), "bf16").sqnr == -math.inf
