import datetime
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.errors import RecordError, UnsupportedError
from halfstep.machine import hardware
from halfstep.machine.hardware import (
    BUSY_HOURS,
    EQUAL,
    Stopwatch,
    compare_with_fp32,
    count_operations,
    get_profile,
    is_trusted,
    judge_format,
    load_profile,
    locate_profile,
    probe_hardware,
    save_profile,
    time_products,
)
from halfstep.numerics.formats import FORMATS
from halfstep.records import Capability, EndRecord, HardwareProfile, Measurement, encode

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


# --- timing


@pytest.mark.parametrize(
    ("operation", "shape"),
    [("matmul", (4, 5, 6)), ("conv2d", (2, 4, 8, 6, 6, 3, 1, 1)), ("conv2d", (2, 4, 8, 6, 6, 3, 2, 2))],
)
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
def test_three_products_of_a_layer_are_timed(operation: str, shape: tuple[int, ...], format: str) -> None:
    measured = time_products(operation, shape, format, Stopwatch(seconds=0.001))
    assert [m.product for m in measured] == ["output", "grad_input", "grad_weight"]
    assert all(m.milliseconds > 0 and m.rate > 0 and m.shape == shape and m.format == format for m in measured)


def test_operations_are_counted_as_two_for_a_multiply_add() -> None:
    assert count_operations("matmul", (2, 3, 4)) == 48
    assert count_operations("conv2d", (1, 4, 8, 6, 6, 3, 2, 2)) == 2 * 2 * 8 * 3 * 3 * 9


def test_stopwatch_calls_at_least_five_times_and_a_slow_call_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for ms, expected in ((1.0, 5), (1e6, 1), (1e-6, 52)):
        calls: list[int] = []

        def time_once(self: Stopwatch, call: object, ms: float = ms, calls: list[int] = calls) -> float:
            calls.append(1)
            return ms

        monkeypatch.setattr(Stopwatch, "time_once", time_once)
        assert Stopwatch(seconds=0.003).time(lambda: None) == ms
        assert len(calls) == expected


# --- the probe


def test_quick_probe_judges_every_format_with_a_reason(profile: HardwareProfile) -> None:
    assert [capability.format for capability in profile.capabilities] == list(hardware.DTYPES)
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


# --- on disk


def test_profile_comes_back_from_disk_as_it_was(profile: HardwareProfile, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "profile.json"
    save_profile(profile, path)
    assert load_profile(path) == profile
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def test_name_of_the_file_depends_on_machine_torch_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locate() -> Path:
        return locate_profile("cpu", tmp_path)

    first = locate()
    assert locate() == first
    assert first.parent == tmp_path
    names = {first.name}
    for target, attribute, value in (
        (torch, "__version__", "0.0.0"),
        (torch, "get_num_threads", lambda: 99),
        (hardware, "name_machine", lambda device: "another"),
        (hardware, "describe_unit", lambda device: ("another", {})),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, value)
            names.add(locate().name)
    assert len(names) == 5
    assert locate() == first


def test_place_that_cannot_be_written_gives_one_line(profile: HardwareProfile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError, match="cannot be written") as caught:
        save_profile(profile, tmp_path / "file" / "profile.json")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_failed_write_leaves_nothing_behind(profile: HardwareProfile, tmp_path: Path) -> None:
    (tmp_path / "profile.json").mkdir()
    with pytest.raises(RecordError, match="cannot be written"):
        save_profile(profile, tmp_path / "profile.json")
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_damaged_profile_counts_as_none(profile: HardwareProfile, tmp_path: Path) -> None:
    path, whole = tmp_path / "profile.json", encode(profile)
    damaged = [
        b"", b"\n", b"{", whole[: len(whole) // 2].encode(), b"[]", b"null", b"\xff\xfe\x00binary",
        whole.replace('"schema":1', '"schema":2').encode(),
        whole.replace('"native"', '"wonderful"').encode(),
        encode(EndRecord(step=1, reason="finished", peak_memory_bytes=0, skipped_steps=0)).encode(),
    ]  # fmt: skip
    for content in damaged:
        path.write_bytes(content)
        assert load_profile(path) is None, content[:40]
    assert load_profile(tmp_path / "missing.json") is None
    assert load_profile(tmp_path) is None


NOW = datetime.datetime(2026, 11, 25, 12, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("measured_at", "hours", "load", "trusted"),
    [
        (0.1, 10_000, 0.1, True), (0.1, 10_000, 3.0, True),  # quiet: for good
        (2.0, 1, 2.0, True), (2.0, 1, 0.6, True), (2.0, BUSY_HOURS, 2.0, True),  # busy, as it is still
        (2.0, 1, 0.5, False), (2.0, 1, 0.0, False),  # quiet by now
        (2.0, BUSY_HOURS + 0.1, 2.0, False), (2.0, -1, 2.0, False),  # long ago, or by a clock that was wrong
    ],
)  # fmt: skip
def test_profile_of_a_busy_machine_serves_while_it_is_busy(
    profile: HardwareProfile, measured_at: float, hours: float, load: float, trusted: bool
) -> None:
    date = (NOW - datetime.timedelta(hours=hours)).isoformat()
    assert is_trusted(replace(profile, load=measured_at, date=date), load=load, now=NOW) is trusted


@pytest.mark.parametrize("date", ["", "2026-11-25", "yesterday"])
def test_profile_of_a_busy_machine_without_a_time_is_not_trusted(profile: HardwareProfile, date: str) -> None:
    assert not is_trusted(replace(profile, load=2.0, date=date), load=2.0, now=NOW)


def test_busy_machine_is_probed_once_and_again_when_it_is_quiet(
    profile: HardwareProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, probes = 2.0, []

    def probe(device: str, *, quick: bool) -> HardwareProfile:
        probes.append(load)
        return replace(profile, load=load, date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    monkeypatch.setattr(hardware, "locate_profile", lambda device: tmp_path / "profile.json")
    monkeypatch.setattr(hardware, "probe_hardware", probe)
    monkeypatch.setattr(hardware, "read_load", lambda: load)
    assert [get_profile().load for _ in range(3)] == [2.0, 2.0, 2.0]
    assert probes == [2.0]
    load = 0.1
    assert [get_profile().load for _ in range(2)] == [0.1, 0.1]
    load = 2.0
    assert get_profile().load == 0.1
    assert probes == [2.0, 0.1]


def test_profile_is_probed_once_and_then_read(
    profile: HardwareProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes: list[str] = []
    profile = replace(profile, load=0.0)

    def probe(device: str, *, quick: bool) -> HardwareProfile:
        probes.append(device)
        return profile

    monkeypatch.setattr(hardware, "locate_profile", lambda device: tmp_path / "cache" / "profile.json")
    monkeypatch.setattr(hardware, "probe_hardware", probe)
    assert get_profile() == get_profile() == profile
    assert probes == ["cpu"]


def test_profile_that_cannot_be_kept_is_still_given(
    profile: HardwareProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(hardware, "locate_profile", lambda device: tmp_path / "file" / "profile.json")
    monkeypatch.setattr(hardware, "probe_hardware", lambda device, quick: profile)
    assert get_profile() == profile
