"""An allocator for torch's large tensors on the processor, which wastes little memory.

A training step takes and gives back the same few hundred blocks again and again. glibc before 2.38 makes a hole that was left by
an aligned block fit no other one of the same size, small blocks settle in the slivers beside it, and a heap of large tensors
stays a quarter to a half larger than what is in use at the worst moment. Here large tensors have a stretch of addresses of
their own:

    take      the shortest hole that is long enough, the lowest of several; else from the end
    give      holes that touch become one; one at the end is taken off
    small     under 64 KiB: the allocator that was there before

Addresses are reserved at once, and memory is had when it is first written to, on huge pages where the system has them. It is kept
for the next tensor; `release_pool` gives back what nothing lies in. Tensors made while the pool is open may outlive it.

torch takes another allocator in C++ only (c10::SetCPUAllocator), so this one is compiled against torch's own headers when it is
first needed (a few seconds, once a machine). Where that cannot be done `open_pool` says why, and nothing is changed.

Sources: Knuth 1997, "The Art of Computer Programming" 1, section 2.5: best fit, coalescing; Wilson et al. 1995, "Dynamic storage
allocation: a survey", section 3.4: address-ordered best fit wastes least on real programs.
"""

import ctypes
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from halfstep.numerics.kernels import COUNT, POINTER, Kernels

TORCH = Path(torch.__file__).parent
ADDRESSES = 1 << 40  # bytes, where the system does not say how much memory it has


@dataclass(frozen=True)
class Usage:
    """How a pool is filled, in bytes.

    Examples:
        >>> Usage(taken=60, top=100, holes=2, addresses=1000).taken
        60
    """

    taken: int
    top: int  # end of the last block; less `taken`: what lies in holes
    holes: int  # how many
    addresses: int


class PoolLibrary(Kernels):
    """The allocator, compiled against the headers that came with torch."""

    language, compilers = "C++", ("c++", "g++", "clang++")
    libraries = (f"-L{TORCH / 'lib'}", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}")

    @property
    def ways(self) -> Iterable[tuple[str, ...]]:
        """torch's version stands among the flags, so that another torch gets a library of its own."""
        return [("-std=c++20", "-O2", "-fPIC", "-shared", f"-I{TORCH / 'include'}", f'-DTORCH="{torch.__version__}"')]

    def start(self) -> str:
        """Have torch allocate from the pool; why it does not, "" where it does."""
        if platform.system() != "Linux":
            return f"there is none for {platform.system()}"
        if limit := _find_limit():
            return limit
        functions, done = self.library.functions, ctypes.c_int64()
        if functions is None:
            return self.library.why
        functions.start_pool(_count_memory(), ctypes.byref(done))
        return "" if done.value else "the process may not have the addresses, or has an allocator of another kind"


def _agrees(functions: ctypes.CDLL) -> bool:
    """Whether a tensor that is made while the pool is open lies in it, and leaves it."""
    done = ctypes.c_int64()
    functions.start_pool(_count_memory(), ctypes.byref(done))
    if not done.value:
        return True  # `start` will say so
    before = _read(functions).taken
    held = torch.empty(1 << 17, dtype=torch.uint8, device="cpu")
    during = _read(functions).taken
    functions.stop_pool()
    del held
    return before < during and _read(functions).taken == before


def _find_limit() -> str:
    """Why addresses may not be taken in advance."""
    import resource  # not on Windows

    for name in ("RLIMIT_AS", "RLIMIT_DATA"):
        if resource.getrlimit(getattr(resource, name))[0] != resource.RLIM_INFINITY:
            return f"the addresses of the process are limited ({name}), and a pool reserves many"
    try:
        strict = Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2"
    except OSError:
        return ""
    return "the system counts reserved addresses as used (vm.overcommit_memory is 2)" if strict else ""


def _count_memory() -> int:
    try:
        return max(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 1 << 30)
    except (AttributeError, ValueError, OSError):
        return ADDRESSES


def _read(functions: ctypes.CDLL) -> Usage:
    numbers = (ctypes.c_int64 * 4)()
    functions.read_pool(numbers)
    return Usage(*numbers)


LIBRARY = PoolLibrary(
    str(Path(__file__).with_suffix(".cpp")),
    {"start_pool": [COUNT, POINTER], "stop_pool": [], "release_pool": [], "read_pool": [POINTER]},
    _agrees,
)
_OPEN: list[ctypes.CDLL] = []  # one entry for each open block


@contextmanager
def open_pool() -> Iterator[str]:
    """A block in which torch's large tensors come from the pool; yields why they do not, "" where they do.

    Examples:
        >>> with open_pool() as why:
        ...     usage = read_pool()
        >>> bool(why) == (usage is None)
        True
    """
    why = LIBRARY.start()
    functions = None if why else LIBRARY.library.functions
    if functions is not None:
        _OPEN.append(functions)
    try:
        yield why
    finally:
        if functions is not None:
            _OPEN.pop()
            functions.stop_pool()
            functions.release_pool()


def is_open() -> bool:
    """Whether torch's large tensors come from the pool now."""
    return bool(_OPEN)


def read_pool() -> Usage | None:
    """How the pool is filled; None where none is open."""
    return _read(_OPEN[-1]) if _OPEN else None


def release_pool() -> None:
    """Give pages in which nothing lies back to the system, also when no block is open any more."""
    library = vars(LIBRARY).get("library")  # None where no block has ever been open
    if library is not None and library.functions is not None:
        library.functions.release_pool()
