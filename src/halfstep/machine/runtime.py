"""Process-wide settings that decide how fast training runs: set on entry, restored on exit, each with its reason.

    allocator           glibc returns large blocks to the system after every operation, so that the next one faults its
                        pages in again; raising the mmap and trim thresholds keeps them (mallopt(3)), and large tensors
                        come from a pool that leaves few holes (`pool`).
    threads             torch's intra-operation threads.
    flush_denormals     subnormal fp32 operands cost tens of cycles each on x86.

glibc cannot say what its thresholds are, so at the end of the outermost block they are set to what its own adjustment comes to in
a process that has freed large blocks (mallopt(3): at most 32 MiB, and twice that for the other). Where a setting has no effect
(musl, macOS, another allocator preloaded) it is left out, and the returned table says so.
"""

import ctypes
import mmap
import platform
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from halfstep.errors import ModelError, describe_unknown
from halfstep.machine import pool

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_GROWN = {_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20, _M_TOP_PAD: 128 << 10}
ALLOCATORS = (True, False, "pool", "glibc")
_KEEP_BLOCKS = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: (1 << 31) - 1, _M_TOP_PAD: 16 << 20}
_keeping: list[bool] = []  # an entry for each open block


def _mallopt(values: dict[int, int]) -> bool:
    """Set glibc's thresholds in this order, until it refuses one; whether it took all."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return hasattr(libc, "mallopt") and all(libc.mallopt(key, value) == 1 for key, value in values.items())


@contextmanager
def _keep_blocks() -> Iterator[bool]:
    """A block in which glibc keeps what is freed; yields whether it does. Inside another one it changes nothing."""
    if not _keeping:
        older = _KEEP_BLOCKS | {_M_MMAP_THRESHOLD: 32 << 20}  # the most that glibc before 2.35 takes
        kept = _mallopt(_KEEP_BLOCKS) or _mallopt(older)
    _keeping.append(kept if not _keeping else _keeping[0])
    try:
        yield _keeping[-1]
    finally:
        if _keeping.pop() and not _keeping:
            _mallopt(_GROWN)


@contextmanager
def tune_process(
    *, allocator: bool | Literal["pool", "glibc"] = True, threads: int | None = None, flush_denormals: bool = False
) -> Iterator[dict[str, str]]:
    """Apply settings for the length of a `with` block; yields {setting: what was done and why}.

    allocator: "glibc": thresholds of the C library alone; "pool" or True: the pool for large tensors too; False: untouched.
    threads: of torch inside an operation; None leaves them.
    flush_denormals: whether subnormal fp32 numbers count as zero.

    Examples:
        >>> with tune_process(allocator=False, threads=1) as settings:
        ...     settings["threads"]
        '1: as asked'
    """
    if threads is not None and threads < 1:
        raise ModelError(f"threads must be at least 1; got {threads}")
    if allocator not in ALLOCATORS:
        raise ModelError(describe_unknown("allocator", str(allocator), [str(known) for known in ALLOCATORS]))
    settings: dict[str, str] = {}
    with ExitStack() as restore:
        if allocator:
            kept = restore.enter_context(_keep_blocks())
            settings["allocator"] = "glibc keeps freed blocks" if kept else "untouched: the C library does not take it"
        if allocator in (True, "pool"):
            why = restore.enter_context(pool.open_pool())
            settings["pool"] = f"none: {why}" if why else "large tensors lie in it"
        if threads is not None:
            restore.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
            settings["threads"] = f"{threads}: as asked"
        if flush_denormals:
            restore.callback(torch.set_flush_denormal, _flushes_denormals())
            done = torch.set_flush_denormal(True)
            settings["flush_denormals"] = (
                "on in this thread and those that it starts: subnormals cost cycles"
                if done
                else "untouched: the processor cannot"
            )
        yield settings


class Arena:
    """Memory for many buffers that live long and die together, away from the heap.

    Buffers that outlive what was allocated around them would leave holes in the heap that nothing fits into: small ones that a
    forward pass leaves behind for the backward pass kept as much heap from being used again as they had saved. Here they lie
    one behind the other in slabs, on huge pages where the system has them (faulting 4 KiB pages in takes about ten times as
    long); a slab is given back to the system with the last buffer that lies in it. While the pool is open buffers lie in that,
    which uses what they leave for whatever comes next.

    slab: bytes of a slab; a larger buffer has one of its own.

    Examples:
        >>> arena = Arena()
        >>> arena.allocate(100).shape, arena.allocate(100).dtype
        (torch.Size([100]), torch.uint8)
    """

    ALIGNMENT = 64  # bytes

    def __init__(self, slab: int = 16 << 20) -> None:
        self.slab = slab
        self._current: mmap.mmap | None = None
        self._free = 0  # where the rest of it begins
        self._lock = threading.Lock()

    def allocate(self, count: int) -> Tensor:
        """[count] uint8, not filled; it begins at a multiple of 64 bytes."""
        if pool.is_open():
            return torch.empty(count, dtype=torch.uint8, device="cpu")
        with self._lock:
            if self._current is None or self._free + count > len(self._current):
                self._current, self._free = _map_memory(max(count, self.slab)), 0
            start, memory = self._free, self._current
            self._free += -(-count // self.ALIGNMENT) * self.ALIGNMENT
        return (
            torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=start) if count else torch.empty(0).byte()
        )


def _map_memory(count: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, count)
    slab = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            slab.madvise(mmap.MADV_HUGEPAGE)
    return slab


def _flushes_denormals() -> bool:
    """torch has no way to ask but to try."""
    return float(torch.tensor([1e-40]) * 1.0) == 0.0


def release_memory() -> None:
    """Give freed pages back to the system, those of the heap where the C library can (malloc_trim(3)): after odd sizes."""
    pool.release_pool()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class HeapTrimmer:
    """Gives freed heap back to the system while it is fragmented, and leaves it alone when that brings nothing.

    glibc before 2.38 seldom fits an aligned block into the hole that one of the same size has left, so a heap of large tensors
    that come and go stays resident at about twice what is in use. Resident memory is let grow to an eighth above the most
    that a trim has left (what is in use at the worst moment, after the first steps); beyond that the heap is trimmed. Pages
    that were given back and are used again must be faulted in again, so trimming oftener costs time.

    Examples:
        >>> trimmer = HeapTrimmer()
        >>> trimmer.look()
        >>> trimmer.trims in (0, 1)                 # 0 where the C library or the system has no such thing
        True
    """

    SLACK = 1 / 8

    def __init__(self) -> None:
        self.trims = 0
        self._limit = 0.0  # bytes
        self._statm = Path("/proc/self/statm")
        self._works = platform.libc_ver()[0] == "glibc" and self._statm.exists()

    def look(self) -> None:
        """Read resident memory, about 20 microseconds, and trim if it is above the limit; nothing where the pool is open."""
        if self._works and not pool.is_open() and self._read_resident() > self._limit:
            release_memory()
            self.trims += 1
            self._limit = max(self._limit, (1 + self.SLACK) * self._read_resident())

    def _read_resident(self) -> int:
        return int(self._statm.read_bytes().split()[1]) * mmap.PAGESIZE


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
