"""Process-wide settings that decide how fast training runs: set on entry, restored on exit, each with its reason.

    allocator           glibc returns large blocks to the system after every operation, so that the next one faults its
                        pages in again; raising the mmap and trim thresholds keeps them (mallopt(3)).
    threads             torch's intra-operation threads.
    flush_denormals     subnormal fp32 operands cost tens of cycles each on x86.

glibc cannot say what its thresholds are, so on exit they are set to its documented defaults. Where a setting has no
effect (musl, macOS, another allocator preloaded) it is left out, and the returned table says so.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from halfstep.errors import ModelError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_GLIBC_DEFAULTS = {_M_TRIM_THRESHOLD: 128 << 10, _M_TOP_PAD: 128 << 10, _M_MMAP_THRESHOLD: 128 << 10}
_KEEP_BLOCKS = {_M_TRIM_THRESHOLD: (1 << 31) - 1, _M_TOP_PAD: 16 << 20, _M_MMAP_THRESHOLD: 1 << 30}


def _mallopt(values: dict[int, int]) -> bool:
    """Set glibc's thresholds; whether that was possible."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return hasattr(libc, "mallopt") and all(libc.mallopt(key, value) == 1 for key, value in values.items())


@contextmanager
def tune_process(
    *, allocator: bool = True, threads: int | None = None, flush_denormals: bool = False
) -> Iterator[dict[str, str]]:
    """Apply settings for the length of a `with` block; yields {setting: what was done and why}.

    Examples:
        >>> with tune_process(allocator=False, threads=1) as settings:
        ...     settings["threads"]
        '1: as asked'
    """
    if threads is not None and threads < 1:
        raise ModelError(f"threads must be at least 1; got {threads}")
    settings: dict[str, str] = {}
    with ExitStack() as restore:
        if allocator:
            restore.callback(_mallopt, _GLIBC_DEFAULTS)
            kept = _mallopt(_KEEP_BLOCKS)
            settings["allocator"] = "glibc keeps freed blocks" if kept else "untouched: the C library does not take it"
        if threads is not None:
            restore.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
            settings["threads"] = f"{threads}: as asked"
        if flush_denormals:
            restore.callback(torch.set_flush_denormal, _flushes_denormals())
            done = torch.set_flush_denormal(True)
            settings["flush_denormals"] = "on: subnormals cost cycles" if done else "untouched: the processor cannot"
        yield settings


def _flushes_denormals() -> bool:
    """torch has no way to ask but to try."""
    return float(torch.tensor([1e-40]) * 1.0) == 0.0


def release_memory() -> None:
    """Give freed heap pages back to the system where the C library can (malloc_trim(3)); after a burst of odd sizes."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def use_channels_last(model: nn.Module) -> None:
    """Convolution weights in the memory order that oneDNN and cuDNN multiply in; activations follow them."""
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def read_peak_memory(device: str = "cpu") -> int:
    """Largest memory this process has held, in bytes: resident set on a CPU, allocated tensors on a CUDA device.

    Linux is asked through VmHWM, which belongs to this program alone; `ru_maxrss`, used elsewhere, also counts what the
    parent had when it forked.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
