"""What this machine does with each number format, by timing it.

A capability flag says that an instruction exists, not that it pays: bf16 is advertised on processors where it is a
hundred times slower than fp32. So every verdict below rests on a measured ratio to fp32, and the flags are only named
as the reason.

    native        multiplies in this format, and was faster than fp32 or as fast
    slower        multiplies in this format, and was slower than fp32
    emulated      no product in this format here; numerics are rehearsed by quantizing, then multiplying in fp32 or bf16
    unsupported   neither

The ladder of shapes is climbed until the next rung would take longer than the time allowed, so that a format which is a
thousand times slower costs the probe seconds, not hours.
"""

import datetime
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from halfstep.errors import UnsupportedError
from halfstep.machine.timing import DTYPES, Stopwatch, count_operations, time_products
from halfstep.numerics.formats import FORMATS
from halfstep.records import Capability, HardwareProfile, Measurement

TRAINED = ("fp32", "bf16", "fp16")  # formats that whole layers are timed in
MATMULS = ((64, 64, 64), (256, 256, 256), (1024, 256, 1024), (1024, 1024, 1024), (2048, 1024, 4096))
CONVS = ((16, 16, 32, 32, 32, 3, 1, 1), (32, 64, 64, 32, 32, 3, 1, 1), (32, 256, 256, 8, 8, 3, 1, 1))
EQUAL = 0.97  # a ratio from here on counts as "not slower": medians repeat to about 3 %
BUSY = 0.5  # load a core, from which on timings are not to be trusted


def _climb(operation: str, ladder: Iterable[tuple[int, ...]], format: str, watch: Stopwatch) -> list[Measurement]:
    """Time a ladder of shapes, small to large, and stop before a rung that would take over 20 times the watch's time."""
    measured: list[Measurement] = []
    for shape in ladder:
        work = count_operations(operation, shape)
        if measured and work / measured[-1].rate / 1e9 > 20 * watch.seconds:
            break
        measured += time_products(operation, shape, format, watch)
    return measured


def compare_with_fp32(
    measured: Iterable[Measurement], format: str, operation: str = "matmul"
) -> dict[tuple[int, ...], float]:
    """Per shape: time of the three products in fp32 over their time in the format."""
    totals: dict[tuple[str, tuple[int, ...]], float] = {}
    for m in measured:
        if m.operation == operation:
            totals[m.format, m.shape] = totals.get((m.format, m.shape), 0.0) + m.milliseconds
    return {s: totals["fp32", s] / ms for (f, s), ms in totals.items() if f == format and ("fp32", s) in totals}


def require_device(device: str) -> None:
    """Raises UnsupportedError for a device that halfstep does not know or that is not there."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UnsupportedError(f"device '{device}' is not known; give cpu, cuda, or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UnsupportedError(
            f"device '{device}' is not there; torch sees {torch.cuda.device_count()} CUDA devices; use device='cpu'"
        )


def read_load() -> float:
    """Processes that wanted to run in the last minute, per core: from about 0.5 on, timings are not to be trusted."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def name_machine(device: str = "cpu") -> str:
    """The processor's own name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return f"{names[0]} ({os.cpu_count()} cores)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


_TENSOR_CORES = {7: "Volta or Turing", 8: "Ampere or Ada", 9: "Hopper", 10: "Blackwell", 12: "Blackwell"}


def describe_unit(device: str = "cpu") -> tuple[str, dict[str, str]]:
    """What multiplies here: the instruction set or Tensor Core generation, and for each format the unit that has it."""
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        units = {"fp16": "Tensor Cores"} if major >= 7 else {}
        if major >= 8:
            units |= {"bf16": "Tensor Cores", "tf32": "Tensor Cores", "int8": "Tensor Cores"}
        if (major, minor) >= (8, 9):
            units |= {"fp8_e4m3": "Tensor Cores", "fp8_e5m2": "Tensor Cores"}
        return f"sm_{major}{minor}, {_TENSOR_CORES.get(major, 'no')} Tensor Cores", units
    flags = _read_cpu_flags()
    units = {}
    for format, candidates in {
        "bf16": ("amx_bf16", "avx512_bf16", "bf16"), "fp16": ("amx_fp16", "avx512_fp16"), "int8": ("amx_int8", "avx512_vnni"),
    }.items():  # fmt: skip
        found = [flag for flag in candidates if flags.get(flag)]
        if found:
            units[format] = found[0]
    simd = torch.backends.cpu.get_cpu_capability()
    return ", ".join([simd, *sorted(set(units.values()))]), units


def _read_cpu_flags() -> dict[str, bool]:
    read = getattr(torch.cpu, "get_capabilities", None)
    if read is not None:
        return {key: value for key, value in read().items() if isinstance(value, bool)}
    names = {
        "amx_bf16": "_is_amx_tile_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "avx512_vnni": "_is_vnni_supported",
    }
    return {flag: bool(getattr(torch.cpu, function, bool)()) for flag, function in names.items()}


def judge_format(format: str, measured: list[Measurement], units: dict[str, str], failure: str = "") -> Capability:
    """A verdict from ratios: see the head of this module."""
    ratios = compare_with_fp32(measured, format)
    unit = units.get(format)
    if format == "fp32":
        return Capability(format=format, status="native", ratio=1.0, ratio_best=1.0, why="the yardstick")
    if failure or not ratios:
        return Capability(format=format, status="unsupported", ratio=None, ratio_best=None, why=failure or "not timed")
    ratio, best = statistics.geometric_mean(ratios.values()), max(ratios.values())
    if format in ("fp8_e4m3", "fp8_e5m2", "int8") and unit is None:
        why = "no unit for it here: quantized, then multiplied in a wider format; a rehearsal of numerics, not speed"
        return Capability(format=format, status="emulated", ratio=ratio, ratio_best=best, why=why)
    has = f"{unit} multiplies it" if unit else "no unit multiplies it here"
    shape = max(ratios, key=ratios.__getitem__)
    if best < EQUAL:
        return Capability(
            format=format,
            status="slower",
            ratio=ratio,
            ratio_best=best,
            why=f"{has}; slower than fp32 at every timed shape",
        )
    below = [s for s, r in ratios.items() if r < EQUAL]
    at = f"; best at {'x'.join(map(str, shape))}"
    at += f"; slower than fp32 at {', '.join('x'.join(map(str, s)) for s in below)}" if below else ""
    return Capability(
        format=format, status="native" if ratio >= EQUAL else "slower", ratio=ratio, ratio_best=best, why=has + at
    )


def _time_8bit(format: str, watch: Stopwatch, wide: str, unit: str | None) -> list[Measurement]:
    """A matmul with both operands quantized on the way in, one scale a tensor: by the unit that multiplies 8 bits where
    there is one, else in `wide`. Every product is written as a[m,k] b[n,k]^T, the layout that 8-bit units ask for."""
    largest, narrow = FORMATS[format].max, DTYPES[format]

    def quantize(x: torch.Tensor) -> torch.Tensor:
        scale = largest / x.abs().amax()
        return (x * scale).round().to(narrow) if narrow is torch.int8 else (x * scale).to(narrow)

    one = torch.ones((), device=watch.device)

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if unit is None:
            return a.to(DTYPES[wide]) @ b.to(DTYPES[wide]).t()
        if narrow is torch.int8:
            return torch._int_mm(a, b.t())
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    measured = []
    for shape in MATMULS[1:4]:
        m, k, n = shape
        for product, (rows, depth, columns) in {
            "output": (m, k, n), "grad_input": (m, n, k), "grad_weight": (n, m, k),
        }.items():  # fmt: skip
            a, b = torch.randn(rows, depth, device=watch.device), torch.randn(columns, depth, device=watch.device)
            ms = watch.time(partial(_quantized, multiply, quantize, a, b))
            measured.append(Measurement(operation="matmul", product=product, format=format, shape=shape, milliseconds=ms,
                                        rate=count_operations("matmul", shape) / ms / 1e6))  # fmt: skip
    return measured


def _quantized(
    multiply: Callable[..., torch.Tensor], quantize: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    return multiply(quantize(a), quantize(b))


def _time_memory(watch: Stopwatch) -> list[Measurement]:
    """Copy and cast bandwidth at a size that fits in cache and one that does not (bytes read plus written)."""
    measured = []
    for count in (1 << 18, 1 << 24):
        source = torch.randn(count, device=watch.device)
        for name, format, size in (("copy", "fp32", 8), ("cast", "bf16", 6)):
            target = torch.empty_like(source, dtype=DTYPES[format])
            ms = watch.time(partial(target.copy_, source))
            measured.append(
                Measurement(
                    operation=name,
                    product="",
                    format=format,
                    shape=(count,),
                    milliseconds=ms,
                    rate=size * count / ms / 1e6,
                )
            )
    return measured


def _time_dispatch(watch: Stopwatch) -> Measurement:
    """Cost of one operation on one number: what every extra cast costs, however small its tensor."""
    x = torch.ones(1, device=watch.device)

    def hundred() -> None:
        for _ in range(100):
            x.add(1.0)

    return Measurement(
        operation="dispatch", product="", format="fp32", shape=(1,), milliseconds=watch.time(hundred) / 100
    )


def probe_hardware(device: str = "cpu", *, quick: bool = False) -> HardwareProfile:
    """Time this machine and judge every format that a product may be in.

    Takes about 20 seconds on two cores, 3 with `quick` (fewer shapes, no convolutions, no memory).

    Examples:
        >>> profile = probe_hardware(quick=True)
        >>> profile.find_capability("fp32").status
        'native'

    Raises UnsupportedError when the device is not there.
    """
    load = read_load()
    require_device(device)
    watch = Stopwatch(device, seconds=0.03 if quick else 0.12)
    unit, units = describe_unit(device)
    measured: list[Measurement] = []
    failures: dict[str, str] = {}
    for format in TRAINED:
        try:
            measured += _climb("matmul", MATMULS[1:4:2] if quick else MATMULS, format, watch)
            measured += [] if quick else _climb("conv2d", CONVS, format, watch)
        except RuntimeError as error:
            failures[format] = f"torch cannot multiply it here: {str(error).splitlines()[0]}"
    bf16 = judge_format("bf16", measured, units, failures.get("bf16", ""))
    wide = "bf16" if bf16.status == "native" else "fp32"
    for format in () if quick else ("fp8_e4m3", "fp8_e5m2", "int8"):
        try:
            measured += _time_8bit(format, watch, wide, units.get(format))
        except RuntimeError as error:
            failures[format] = f"torch cannot multiply it here: {str(error).splitlines()[0]}"
    if not quick:
        measured += [*_time_memory(watch), _time_dispatch(watch)]
    if "tf32" not in units:
        failures["tf32"] = "this device has no tf32 unit"
    elif device.startswith("cuda"):
        measured += _time_tf32(watch, quick)
    if quick:
        failures |= dict.fromkeys(("fp8_e4m3", "fp8_e5m2", "int8"), "not timed in a quick probe")
    return HardwareProfile(
        device=device,
        machine=name_machine(device),
        unit=unit,
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        load=load,
        capabilities=tuple(judge_format(f, measured, units, failures.get(f, "")) for f in DTYPES),
        measurements=tuple(measured),
    )


def _time_tf32(watch: Stopwatch, quick: bool) -> list[Measurement]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return _climb("matmul", MATMULS[1:4:2] if quick else MATMULS, "tf32", watch)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
