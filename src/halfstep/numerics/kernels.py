"""Kernels in C, compiled for the machine's own instruction set when they are first needed.

    numerics/NAME.py    the readable truth, and what calls the kernel where there is one
    numerics/NAME.c     its fast twin: one pass over the numbers where torch takes many

A source is compiled once a machine (a few seconds), kept in the user's cache folder under a name that tells source, compiler,
flags and processor, and compared with the truth before it is used. Without a C compiler, on another device and for other
dtypes the truth runs itself; `Kernels.describe` says which it is.

A kernel reads memory directly. Where something has to see the operations themselves (torch.func, a dispatch mode, a subclass of
Tensor), `find_obstacle` says so, and torch's own function runs. torch.compile gets kernels as operators (`traced`).

Kernels run on torch's own OpenMP threads where torch is built with the compiler's OpenMP, as on Linux.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import platformdirs
import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

HOME = Path(__file__).parent
HEADER = HOME / "kernels.h"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-std=c11",
    "-O3",
    "-ffp-contract=off",  # contraction would round once where the truth rounds twice
    "-fno-math-errno",  # so that square roots are instructions, not calls
    "-fPIC",
    "-shared",
)
TRIES = (("-march=native", "-fopenmp"), ("-march=native",), ())
PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
Allocate = Callable[[int], Tensor]  # bytes -> [bytes] uint8 on the processor

POINTER, INT, COUNT, WORD = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32
FLOAT, DOUBLE = ctypes.c_float, ctypes.c_double


P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Library:
    """The compiled functions, or why there are none."""

    functions: ctypes.CDLL | None
    why: str


class Kernels:
    """The functions of one C source.

    Args:
        source: name of a file in this folder.
        signatures: name of each function -> ctypes of its arguments; none returns anything.
        agrees: whether the compiled functions compute what the truth says, tried on a few numbers.

    Examples:
        >>> Kernels("missing.c", {}, bool).describe()
        "torch: there is no 'missing.c'"
    """

    language = "C"
    compilers: tuple[str, ...] = ()  # those to look for; none: COMPILERS
    libraries: tuple[str, ...] = ("-lm",)

    def __init__(
        self, source: str, signatures: Mapping[str, Sequence[Any]], agrees: Callable[[ctypes.CDLL], bool]
    ) -> None:
        self.source, self.signatures, self.agrees = HOME / source, signatures, agrees

    @cached_property
    def library(self) -> Library:
        """Compiled if need be, once a process and mostly once a machine."""
        return self.find(Path(platformdirs.user_cache_dir("halfstep")))

    @property
    def ways(self) -> Iterable[tuple[str, ...]]:
        """Flags of the compiler, the best ones first."""
        return [(*FLAGS, *extra) for extra in TRIES]

    def take(self, *tensors: Tensor) -> ctypes.CDLL | None:
        """The functions, if they can work on these tensors: on the processor, in one stretch of memory."""
        if all(t.device.type == "cpu" and t.is_contiguous() for t in tensors):
            return self.library.functions
        return None

    @property
    def way(self) -> str:
        """`describe` without the compiler's command: "native", or "torch: ..." and the reason."""
        return "native" if self.library.functions else self.describe()

    def describe(self) -> str:
        """What computes on this machine's processor: "native: ..." or "torch: ..." and the reason."""
        return f"{'native' if self.library.functions else 'torch'}: {self.library.why}"

    def find(self, folder: Path) -> Library:
        """The kernels kept in a folder, compiled into it where they are missing; without a word where that cannot be done."""
        if not self.source.exists():
            return Library(None, f"there is no '{self.source.name}'")
        compilers = self.compilers or COMPILERS
        compiler = next(filter(None, map(shutil.which, compilers)), None)
        if compiler is None:
            return Library(None, f"no {self.language} compiler was found (looked for {', '.join(compilers)})")
        failure = ""
        for flags in self.ways:
            try:
                functions = self._open(self._compile(compiler, flags, folder))
            except (OSError, AttributeError, subprocess.SubprocessError) as error:
                failure = str(getattr(error, "stderr", "") or error).strip().partition("\n")[0]
                continue
            if fault := self._try(functions):
                failure = fault
                continue
            return Library(functions, f"{compiler} {' '.join(flags)}")
        return Library(None, f"{compiler} failed: {failure}")

    def _try(self, functions: ctypes.CDLL) -> str:
        """Why they are of no use; "" where they compute what they should, in whatever block of the user's they are tried."""
        plain = torch.autocast("cpu", enabled=False)
        with _disable_current_modes(), torch._C.DisableTorchFunction(), plain:  # some modes give tensors without memory
            try:
                agrees = self.agrees(functions)
            except RuntimeError as error:
                return f"what was compiled could not be tried: {str(error).partition(chr(10))[0]}"
        return "" if agrees else f"what was compiled does not compute what {self.source.stem}.py says"

    def _compile(self, compiler: str, flags: tuple[str, ...], folder: Path) -> Path:
        """Into a file beside, then moved: another process never sees half a library."""
        texts = [path.read_text(encoding="utf-8") for path in (self.source, HEADER)]
        key = "|".join([*texts, compiler, *flags, _describe_processor()])
        path = folder / f"{self.source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            made = Path(beside) / path.name
            command = [compiler, *flags, f"-I{HOME}", str(self.source), "-o", str(made), *self.libraries]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            os.replace(made, path)
        return path

    def _open(self, path: Path) -> ctypes.CDLL:
        functions = ctypes.CDLL(str(path))
        for name, arguments in self.signatures.items():
            function = getattr(functions, name)
            function.argtypes, function.restype = list(arguments), None
        return functions


def _describe_processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return " ".join(platform.uname())
    return platform.machine() + "".join(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model"))})
    )


def make_buffer(count: int) -> Tensor:
    """[count] uint8 from the heap."""
    return torch.empty(count, dtype=torch.uint8, device="cpu")


def hold_constant(function: Callable[P, R]) -> Callable[P, R]:
    """As torch.compiler.assume_constant_result does, which would import the compiler: run while code is traced, and not again.

    Examples:
        >>> @hold_constant
        ... def count_threads() -> int:
        ...     return torch.get_num_threads()
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def hide_frame(function: Callable[P, R]) -> Callable[P, R]:
    """Let the compiler begin no graph in it, nor in what it calls; graphs begun elsewhere still lead through it.

    As torch._dynamo's skip_code does, which would import the compiler. Where that cannot trace a part of a model (nn.LSTM), it
    takes the frames it finds there one by one, those of a torch function mode as well; and in its graph of such a frame the
    dtype of a tensor comes out as a number.

    Examples:
        >>> @hide_frame
        ... def call(function, *arguments):
        ...     return function(*arguments)
    """
    skip = eval_frame._FrameAction.SKIP
    strategy = eval_frame._FrameExecStrategy(skip, skip)  # of the frame, and of those in it
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function


def are_fixed(numbers: Iterable[int]) -> bool:
    """False where a compiler keeps one of them open, as the size of a tensor; its graph then serves many.

    Examples:
        >>> are_fixed(torch.ones(2, 3).shape)
        True
    """
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports the compiler, which is there by now

    return all(map(has_static_value, numbers))


def find_obstacle(*tensors: Tensor, dtypes: Sequence[torch.dtype]) -> str:
    """Why a kernel cannot stand in for torch's function on these tensors, here and now; "" where it can, in compiled code as
    an operator.

    Examples:
        >>> find_obstacle(torch.ones(1), dtypes=[torch.bfloat16])
        'dtype float32'
    """
    watcher = _find_transform() if torch.compiler.is_compiling() else _find_watcher()
    return watcher or next((fault for t in tensors if (fault := _find_fault(t, dtypes))), "")


def _find_transform() -> str:
    return "torch.func transforms it" if torch._C._are_functorch_transforms_active() else ""


def _find_watcher() -> str:
    """What has to see each of torch's operations."""
    if torch.jit.is_tracing() or torch.jit.is_scripting():
        return "torch.jit records it"
    if transform := _find_transform():
        return transform
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode watches it"
    return "forward-mode derivatives" if forward_ad._current_level >= 0 else ""


def _find_fault(tensor: Tensor, dtypes: Sequence[torch.dtype]) -> str:
    if type(tensor) not in PLAIN:
        return f"a {type(tensor).__name__}"
    if tensor.device.type != "cpu":
        return f"device {tensor.device.type}"
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout}"
    if not torch.compiler.is_compiling():  # operators are given plain ones
        if tensor.is_neg():
            return "a lazily negated view"
        if torch._C._functorch.is_legacy_batchedtensor(tensor):  # of torch.autograd.grad(is_grads_batched=True)
            return "torch.vmap batches it"
    return "" if tensor.dtype in dtypes else f"dtype {str(tensor.dtype).removeprefix('torch.')}"


def list_commands(used: Iterable[Kernels]) -> tuple[str, ...]:
    """The commands that compiled kernels, each once; none for those that did not compile.

    Examples:
        >>> list_commands([Kernels("missing.c", {}, bool)])
        ()
    """
    return tuple(dict.fromkeys(kernels.library.why for kernels in used if kernels.library.functions))
