import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.errors import UnsupportedError
from halfstep.machine import hardware
from halfstep.machine.hardware import EQUAL, compare_with_fp32, judge_format, probe_hardware
from halfstep.machine.timing import DTYPES, Stopwatch
from halfstep.numerics.formats import FORMATS
from halfstep.records import Capability, HardwareProfile, Measurement

SMALL, LARGE = (64, 64, 64), (1024, 1024, 1024)


def measure(format: str, *times: float) -> list[Measurement]:
    """One measurement a shape; fp32 takes 1 ms for each."""
    measured = []
    for shape, ms in zip((SMALL, LARGE, (8, 8, 8), (9, 9, 9)), times, strict=False):
        for name, milliseconds in (("fp32", 1.0), (format, ms)):
            measured.append(
                Measurement(operation="matmul", product="output", format=name, shape=shape, milliseconds=milliseconds)
            )
    return measured


@pytest.fixture(scope="module")
def profile() -> HardwareProfile:
    return probe_hardware(quick=True)


# --- verdicts


def test_format_that_is_faster_at_every_shape_is_native() -> None:
    verdict = judge_format("bf16", measure("bf16", 0.5, 0.25), {"bf16": "amx_bf16"})
    assert (verdict.status, verdict.ratio_best) == ("native", 4.0)
    assert verdict.ratio == pytest.approx(8**0.5)
    assert verdict.why == "amx_bf16 multiplies it; best at 1024x1024x1024"


def test_format_that_is_as_fast_within_noise_is_native() -> None:
    assert judge_format("bf16", measure("bf16", 1.02, 1.02), {}).status == "native"


@pytest.mark.parametrize("units", [{}, {"bf16": "avx512_bf16"}], ids=["no unit", "unit"])
@pytest.mark.parametrize("times", [(1.2, 1.2), (100.0, 3.0)])
def test_format_that_was_slower_everywhere_is_slower_whatever_the_flags_say(
    units: dict[str, str], times: tuple[float, float]
) -> None:
    verdict = judge_format("bf16", measure("bf16", *times), units)
    assert verdict.status == "slower"
    assert "slower than fp32 at every timed shape" in verdict.why
    assert verdict.ratio is not None
    assert verdict.ratio < 1


def test_mixed_results_follow_the_mean_and_name_the_shapes() -> None:
    faster = judge_format("bf16", measure("bf16", 2.0, 0.1), {"bf16": "unit"})
    slower = judge_format("bf16", measure("bf16", 20.0, 0.5), {"bf16": "unit"})
    assert (faster.status, slower.status) == ("native", "slower")
    for verdict in (faster, slower):
        assert "best at 1024x1024x1024; slower than fp32 at 64x64x64" in verdict.why


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2", "int8"])
def test_eight_bits_without_a_unit_are_emulated_even_when_they_were_fast(format: str) -> None:
    assert judge_format(format, measure(format, 0.5), {}).status == "emulated"
    assert judge_format(format, measure(format, 0.5), {format: "unit"}).status == "native"
    assert judge_format(format, measure(format, 2.0), {format: "unit"}).status == "slower"


def test_format_that_failed_or_was_not_timed_is_unsupported_with_the_reason() -> None:
    failed = judge_format("fp16", measure("fp16", 0.5), {"fp16": "unit"}, "torch cannot multiply it here")
    assert (failed.status, failed.why, failed.ratio) == ("unsupported", "torch cannot multiply it here", None)
    untimed = judge_format("fp16", [], {"fp16": "unit"})
    assert (untimed.status, untimed.why) == ("unsupported", "not timed")


def test_fp32_is_the_yardstick() -> None:
    assert judge_format("fp32", [], {}) == Capability(
        format="fp32", status="native", ratio=1.0, ratio_best=1.0, why="the yardstick"
    )


@given(
    times=st.lists(st.floats(0.01, 100), min_size=1, max_size=4),
    format=st.sampled_from([name for name in FORMATS if name != "fp32"]),
    has_unit=st.booleans(),
)
@settings(deadline=None)
def test_no_format_is_native_that_was_measured_slower(times: list[float], format: str, has_unit: bool) -> None:
    verdict = judge_format(format, measure(format, *times), {format: "unit"} if has_unit else {})
    if statistics.geometric_mean(1 / ms for ms in times) < EQUAL * (1 - 1e-9):
        assert verdict.status != "native"
    assert verdict.why
    assert "\n" not in verdict.why


def test_ratio_sums_the_three_products_of_a_shape_and_leaves_other_operations_out() -> None:
    measured = [
        Measurement(operation=operation, product=product, format=format, shape=SMALL, milliseconds=ms)
        for operation, product, format, ms in (
            ("matmul", "output", "fp32", 3.0), ("matmul", "grad_input", "fp32", 1.0),
            ("matmul", "output", "bf16", 1.0), ("matmul", "grad_input", "bf16", 1.0),
            ("conv2d", "output", "fp32", 50.0), ("conv2d", "output", "bf16", 1.0),
        )
    ]  # fmt: skip
    assert compare_with_fp32(measured, "bf16") == {SMALL: 2.0}
    assert compare_with_fp32(measured, "bf16", "conv2d") == {SMALL: 50.0}
    assert compare_with_fp32(measured, "fp16") == {}


# --- the probe


def test_quick_probe_judges_every_format_with_a_reason(profile: HardwareProfile) -> None:
    assert [capability.format for capability in profile.capabilities] == list(DTYPES)
    assert all(capability.why and "\n" not in capability.why for capability in profile.capabilities)
    fp32 = profile.find_capability("fp32")
    assert fp32 is not None
    assert fp32.status == "native"
    assert profile.find_capability("fp64") is None


def test_quick_probe_calls_native_only_what_it_measured_to_be_as_fast(profile: HardwareProfile) -> None:
    for name in ("bf16", "fp16"):
        capability = profile.find_capability(name)
        ratios = compare_with_fp32(profile.measurements, name)
        assert capability is not None
        if not ratios:
            assert capability.status == "unsupported"
        else:
            assert (capability.status == "native") == (statistics.geometric_mean(ratios.values()) >= EQUAL)


def test_profile_names_this_machine(profile: HardwareProfile) -> None:
    assert profile.machine == hardware.name_machine()
    assert profile.torch_version == torch.__version__
    assert profile.threads == torch.get_num_threads()
    assert profile.device == "cpu"
    assert profile.date.endswith("+00:00")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="use device='cpu'"):
        probe_hardware("cuda")


def test_probe_goes_on_when_torch_cannot_multiply_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    def climb(operation: str, ladder: object, format: str, watch: Stopwatch) -> list[Measurement]:
        if format == "fp16":
            raise RuntimeError("not implemented for 'Half'\nand a second line")
        return measure(format, 0.5)

    monkeypatch.setattr(hardware, "_climb", climb)
    capability = probe_hardware(quick=True).find_capability("fp16")
    assert capability is not None
    assert capability.status == "unsupported"
    assert capability.why == "torch cannot multiply it here: not implemented for 'Half'"
