"""The fast twins of `packing`, in C: one pass over the numbers where torch takes about fifteen.

`kernels.c` is compiled for the machine's own instruction set when it is first needed (about a second), kept in the user's cache
folder under a name that tells source, compiler flags and processor, and compared with the truth before it is used. Without a
C compiler, on another device and for other dtypes the truth runs itself; `describe_kernels` says which it is.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import platformdirs
import torch
from torch import Tensor

from halfstep.numerics.packing import (
    BITS,
    GROUP,
    Groups,
    pack_bits_slowly,
    pack_groups_slowly,
    unpack_bits_slowly,
    unpack_groups_slowly,
)

SOURCE = Path(__file__).with_name("kernels.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-std=c11",
    "-O3",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
)  # contraction would round once where the truth rounds twice
TRIES = (("-march=native", "-fopenmp"), ("-march=native",), ())
NATIVE = (torch.float32, torch.bfloat16)
Allocate = Callable[[int], Tensor]  # bytes -> [bytes] uint8 on the processor

_POINTER, _INT, _COUNT, _WORD = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32
_ARGUMENTS = {
    "pack_groups": [_POINTER, _INT, _COUNT, _INT, _WORD, _WORD, _POINTER, _POINTER],
    "unpack_groups": [_POINTER, _POINTER, _INT, _COUNT, _INT, _POINTER],
    "pack_bits": [_POINTER, _COUNT, _POINTER],
    "unpack_bits": [_POINTER, _COUNT, _POINTER],
}


@dataclass(frozen=True)
class Library:
    """The compiled functions, or why there are none."""

    functions: ctypes.CDLL | None
    why: str


def describe_kernels() -> str:
    """What packs tensors on this machine's processor: "native: ..." or "torch: ..." and the reason."""
    library = load_library()
    return f"{'native' if library.functions else 'torch'}: {library.why}"


@cache
def load_library() -> Library:
    """The kernels of this machine; compiled if need be, once a process and mostly once a machine."""
    return find_library(Path(platformdirs.user_cache_dir("halfstep")))


def find_library(folder: Path) -> Library:
    """The kernels kept in a folder, compiled into it where they are missing; without a word where that cannot be done."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return Library(None, f"no C compiler was found (looked for {', '.join(COMPILERS)})")
    failure = ""
    for extra in TRIES:
        flags = (*FLAGS, *extra)
        key = "|".join([SOURCE.read_text(encoding="utf-8"), compiler, *flags, _describe_processor()])
        path = folder / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        try:
            if not path.exists():
                _compile(compiler, flags, path)
            functions = _open(path)
        except (OSError, subprocess.SubprocessError) as error:
            failure = str(getattr(error, "stderr", "") or error).strip().partition("\n")[0]
            continue
        if not _agrees(functions):
            failure = "what was compiled does not compute what numerics/packing.py says"
            continue
        return Library(functions, f"{compiler} {' '.join(flags)}")
    return Library(None, f"{compiler} failed: {failure}")


def _describe_processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return " ".join(platform.uname())
    return platform.machine() + "".join(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model"))})
    )


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Into a file beside, then moved: another process never sees half a library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        subprocess.run(
            [compiler, *flags, str(SOURCE), "-o", str(made)], check=True, capture_output=True, text=True, timeout=120
        )
        os.replace(made, path)


def _open(path: Path) -> ctypes.CDLL:
    functions = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = arguments, None
    return functions


def _agrees(functions: ctypes.CDLL) -> bool:
    """Whether kernels and truth give the same bits, tried on three groups, the last one short."""
    x, keys = torch.linspace(-1.0, 3.0, 2 * GROUP + 5, device="cpu"), (12345, 678)
    for bits in BITS:
        truth, native = pack_groups_slowly(x, bits, keys), _pack_groups(functions, x, bits, keys)
        same = torch.equal(truth.codes, native.codes) and torch.equal(truth.scales, native.scales)
        same = same and torch.equal(unpack_groups_slowly(truth, x.dtype), _unpack_groups(functions, native, x.dtype))
        if not same:
            return False
    return True


def make_buffer(count: int) -> Tensor:
    """[count] uint8 from the heap."""
    return torch.empty(count, dtype=torch.uint8)


def pack_groups(x: Tensor, bits: int, keys: tuple[int, int], allocate: Allocate = make_buffer) -> Groups:
    """`pack_groups_slowly`, by a kernel where there is one, into buffers from `allocate`.

    Examples:
        >>> x = torch.linspace(0, 1, 1000)
        >>> bool((unpack_groups(pack_groups(x, 8, (1, 2)), x.dtype) - x).abs().max() < 1 / 255 / 3)
        True
    """
    functions = _find_functions(x)
    if functions is None or x.dtype not in NATIVE:
        return pack_groups_slowly(x, bits, keys)
    return _pack_groups(functions, x, bits, keys, allocate)


def unpack_groups(groups: Groups, dtype: torch.dtype, allocate: Allocate = make_buffer) -> Tensor:
    """`unpack_groups_slowly`, by a kernel where there is one, into a buffer from `allocate`."""
    functions = _find_functions(groups.codes)
    if functions is None or dtype not in NATIVE:
        return unpack_groups_slowly(groups, dtype)
    return _unpack_groups(functions, groups, dtype, allocate)


def pack_bits(mask: Tensor, allocate: Allocate = make_buffer) -> Tensor:
    """`pack_bits_slowly`, by a kernel where there is one, into a buffer from `allocate`."""
    functions = _find_functions(mask)
    if functions is None:
        return pack_bits_slowly(mask)
    codes = allocate(-(-mask.numel() // 8))
    functions.pack_bits(mask.data_ptr(), mask.numel(), codes.data_ptr())
    return codes


def unpack_bits(codes: Tensor, count: int) -> Tensor:
    """`unpack_bits_slowly`, by a kernel where there is one."""
    functions = _find_functions(codes)
    if functions is None:
        return unpack_bits_slowly(codes, count)
    mask = torch.empty(count, dtype=torch.bool)
    functions.unpack_bits(codes.data_ptr(), count, mask.data_ptr())
    return mask


def _find_functions(x: Tensor) -> ctypes.CDLL | None:
    return load_library().functions if x.device.type == "cpu" and x.is_contiguous() else None


def _pack_groups(
    functions: ctypes.CDLL, x: Tensor, bits: int, keys: tuple[int, int], allocate: Allocate = make_buffer
) -> Groups:
    rows, wide = -(-x.numel() // GROUP), int(x.dtype is torch.float32)
    codes, scales = allocate(rows * GROUP * bits // 8), allocate(8 * rows).view(torch.float32).view(rows, 2)
    functions.pack_groups(x.data_ptr(), wide, x.numel(), bits, *keys, codes.data_ptr(), scales.data_ptr())
    return Groups(codes, scales, x.numel(), bits)


def _unpack_groups(
    functions: ctypes.CDLL, groups: Groups, dtype: torch.dtype, allocate: Allocate = make_buffer
) -> Tensor:
    x = allocate(groups.count * dtype.itemsize).view(dtype)
    codes, scales = groups.codes.data_ptr(), groups.scales.data_ptr()
    functions.unpack_groups(codes, scales, groups.bits, groups.count, int(dtype is torch.float32), x.data_ptr())
    return x
