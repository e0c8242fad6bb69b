"""A machine's profile on disk: it comes back as it was, is measured again where it is not to be trusted, and never ends a run."""

import datetime
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfstep.errors import RecordError
from halfstep.machine import profiles
from halfstep.machine.hardware import probe_hardware
from halfstep.machine.profiles import BUSY_HOURS, get_profile, is_trusted, load_profile, locate_profile, save_profile
from halfstep.records import EndRecord, HardwareProfile, encode


@pytest.fixture(scope="module")
def profile() -> HardwareProfile:
    return probe_hardware(quick=True)


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
        (profiles, "name_machine", lambda device: "another"),
        (profiles, "describe_unit", lambda device: ("another", {})),
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

    monkeypatch.setattr(profiles, "locate_profile", lambda device: tmp_path / "profile.json")
    monkeypatch.setattr(profiles, "probe_hardware", probe)
    monkeypatch.setattr(profiles, "read_load", lambda: load)
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

    monkeypatch.setattr(profiles, "locate_profile", lambda device: tmp_path / "cache" / "profile.json")
    monkeypatch.setattr(profiles, "probe_hardware", probe)
    assert get_profile() == get_profile() == profile
    assert probes == ["cpu"]


def test_profile_that_cannot_be_kept_is_still_given(
    profile: HardwareProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(profiles, "locate_profile", lambda device: tmp_path / "file" / "profile.json")
    monkeypatch.setattr(profiles, "probe_hardware", lambda device, quick: profile)
    assert get_profile() == profile
