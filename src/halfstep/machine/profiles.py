"""A machine's profile on disk: measured once, kept in the user's cache folder, measured again where it is not to be trusted."""

import contextlib
import datetime
import hashlib
import os
from pathlib import Path

import platformdirs
import torch

from halfstep import records
from halfstep.errors import RecordError
from halfstep.machine.hardware import BUSY, describe_unit, name_machine, probe_hardware, read_load
from halfstep.records import HardwareProfile

BUSY_HOURS = 6  # that timings of a busy machine are used, as long as it stays busy


def locate_profile(device: str = "cpu", folder: Path | None = None) -> Path:
    """Where this machine's profile is kept: the user's cache folder, keyed by machine, torch version and threads."""
    key = f"{name_machine(device)}|{describe_unit(device)[0]}|{torch.__version__}|{torch.get_num_threads()}|{device}"
    folder = folder or Path(platformdirs.user_cache_dir("halfstep"))
    return folder / f"profile-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def save_profile(profile: HardwareProfile, path: Path) -> None:
    """Write a profile. Raises RecordError when the place cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            temporary.write_text(records.encode(profile) + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RecordError(
            f"profile {path} cannot be written ({error.strerror}); give another place with --out"
        ) from None


def load_profile(path: Path) -> HardwareProfile | None:
    """The profile at `path`; None when there is none or it is of another version."""
    try:
        profile = records.decode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecordError):
        return None
    return profile if isinstance(profile, HardwareProfile) else None


def is_trusted(profile: HardwareProfile, *, load: float, now: datetime.datetime) -> bool:
    """Whether a profile is as good as one that were measured now, on a machine with this load.

    One of a quiet machine holds for good. One of a busy machine holds for BUSY_HOURS while the machine is busy still, when a
    new one would be no better; as soon as it is quiet, it is measured again.

    Examples:
        >>> profile = HardwareProfile(device="cpu", machine="M", unit="AVX2", torch_version="2.13", threads=2, load=2.0,
        ...                           date="2026-01-01T12:00:00+00:00")
        >>> soon = datetime.datetime(2026, 1, 1, 13, tzinfo=datetime.UTC)
        >>> is_trusted(profile, load=2.0, now=soon), is_trusted(profile, load=0.1, now=soon)
        (True, False)
    """
    if profile.load <= BUSY:
        return True
    try:
        age = now - datetime.datetime.fromisoformat(profile.date)
    except (TypeError, ValueError):  # a date without a time zone, or none
        return False
    return load > BUSY and datetime.timedelta(0) <= age <= datetime.timedelta(hours=BUSY_HOURS)


def get_profile(device: str = "cpu") -> HardwareProfile:
    """This machine's profile from the cache, or a quick probe that is then cached where the cache can be written.

    What was measured on a busy machine serves while it is busy, for some hours (`is_trusted`).
    """
    path = locate_profile(device)
    profile = load_profile(path)
    if profile is None or not is_trusted(profile, load=read_load(), now=datetime.datetime.now(datetime.UTC)):
        profile = probe_hardware(device, quick=True)
        with contextlib.suppress(RecordError):  # a profile that cannot be kept costs the next run a few seconds
            save_profile(profile, path)
    return profile
