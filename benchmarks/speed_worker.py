"""One run of the speed benchmark, in a process of its own: a workload trained in one arm, timed, and evaluated.

`measure` makes all steps at once; `serve` makes them in turns, a few whenever it is asked (see `turns`).

    fp32                 as documented: the optimizer's plain constructor, nothing set
    fp32-tuned           fused optimizer, channels_last for convolutions, halfstep's allocator settings, as all tuned arms
    torch-amp            as documented: bf16 autocast around forward pass and loss
    torch-amp-tuned      the same with the settings of fp32-tuned
    torch-amp-compile    the same with torch.compile on the model, for fixed shapes
    halfstep             `prepare(model, optimizers, "auto")` with the settings of fp32-tuned
    halfstep-memory      the same, activations saved in int8, gradients released and optimizer states in 8 bits:
                         `prepare(..., saved="int8", release=True, states="8-bit")`
    halfstep-compile     halfstep, and torch.compile after the first step, when "auto" has chosen: before, it cannot be traced,
                         and a model that was compiled before `prepare` would be timed by "auto" while it compiles

Timed is a step from the batch that is already there to cleared gradients. Every step begins with the same state of the random
numbers, so that arms whose dropout draws alike have the same noise. Set-up is what the run has cost above its steady steps:
building, `prepare`, compiling, choosing a plan.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

import halfstep
from halfstep.machine.profiles import get_profile
from halfstep.machine.runtime import read_peak_memory, use_channels_last
from halfstep.numerics import dropouts, gelus, losses, packing, rows, scaled_attention, updates
from speed_summary import REFERENCE
from turns import END
from workloads.catalogue import WORKLOADS
from workloads.template import Trainer, Workload

KERNELS = tuple(m.KERNELS for m in (dropouts, gelus, losses, packing, rows, scaled_attention, updates))
GAUGE_S, CALIBRATION_S = 1.5, 5.0  # seconds of products, in every turn and before all
LARGE_SHAPES = ((2048, 2048, 2048), (4096, 1024, 4096), (1024, 4096, 1024), (2048, 512, 8192))  # m, k, n


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What an arm does to a workload."""

    tuned: bool = False
    autocast: bool = False
    compiled: bool = False
    halfstep: bool = False
    small: bool = False


ARMS = {
    "fp32": Arm(),
    "fp32-tuned": Arm(tuned=True),
    "torch-amp": Arm(autocast=True),
    "torch-amp-tuned": Arm(tuned=True, autocast=True),
    "torch-amp-compile": Arm(tuned=True, autocast=True, compiled=True),
    "halfstep": Arm(tuned=True, halfstep=True),
    "halfstep-memory": Arm(tuned=True, halfstep=True, small=True),
    "halfstep-compile": Arm(tuned=True, compiled=True, halfstep=True),
}


class TorchTrainer:
    """A network trained by plain torch.

    apart: of several networks that share a graph, compute the gradients of this one alone; otherwise, as in the usual loop,
        those of the others are computed too and thrown away.
    """

    def __init__(self, model: nn.Module, optimizers: list[Optimizer], arm: Arm, *, apart: bool) -> None:
        self.model, self.optimizers, self.arm = model, optimizers, arm
        self.inputs = [p for p in model.parameters() if p.requires_grad] if apart else None

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.arm.autocast else nullcontext()

    def clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, loss: Tensor) -> None:
        self.clear()  # of what another network's backward pass has left
        loss.backward(inputs=self.inputs)
        for optimizer in self.optimizers:
            optimizer.step()
        self.clear()


class HalfstepTrainer:
    """A network trained by a stepper."""

    def __init__(
        self, model: nn.Module, optimizers: list[Optimizer], *, compiled: bool = False, small: bool = False
    ) -> None:
        self.model, self.compiled = model, compiled
        saved, states = ("int8", "8-bit") if small else (None, None)
        self.stepper = halfstep.prepare(model, optimizers, "auto", saved=saved, states=states, release=small)

    def autocast(self) -> AbstractContextManager[object]:
        return self.stepper.autocast()

    def step(self, loss: Tensor) -> None:
        outcome = self.stepper.step(loss)
        if outcome.status != "applied":
            raise AssertionError(f"a step of the benchmark was {outcome.status}: {outcome.cause}")
        if self.compiled and outcome.step == 1:
            self.model = compile_model(self.model)

    def describe(self) -> dict[str, Any]:
        """The plan in force, shortly."""
        record = self.stepper.plan_record
        rows = record.layers if record else ()
        kinds: dict[str, int] = {}
        for row in rows:
            key = f"{row.compute}, {row.storage}" + (f" + {row.master}" if row.storage != "fp32" else "")
            kinds[key] = kinds.get(key, 0) + 1
        return {"layers": kinds, "why": record.why if record else ""}


def compile_model(model: nn.Module) -> nn.Module:
    """For fixed shapes: two networks share torch's code, and each would make the shapes of the other dynamic."""
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]  # a module for a module


def build_trainers(workload: Workload, arm: Arm) -> dict[str, Trainer]:
    """The networks of a workload, each with how it is trained."""
    models = workload.build_models()
    if arm.tuned:
        for model in models.values():
            use_channels_last(model)
    optimizers = workload.build_optimizers(models, fused=arm.tuned)
    trainers: dict[str, Trainer] = {}
    for name, model in models.items():
        if arm.halfstep:
            trainers[name] = HalfstepTrainer(model, optimizers[name], compiled=arm.compiled, small=arm.small)
        else:
            trainer = TorchTrainer(model, optimizers[name], arm, apart=arm.tuned and len(models) > 1)
            if arm.compiled:
                trainer.model = compile_model(model)
            trainers[name] = trainer
    return trainers


@contextmanager
def tuned(arm: Arm, threads: int) -> Iterator[None]:
    """The process settings of an arm."""
    with ExitStack() as stack:
        stack.enter_context(halfstep.tune_process(allocator=arm.tuned, threads=threads))
        yield


class Training:
    """A workload that is trained in an arm, some steps at a time.

    start: also evaluate before the first step.
    """

    def __init__(self, workload: Workload, arm: Arm, *, start: bool = False) -> None:
        begin = time.perf_counter()
        self.workload, self.trainers = workload, build_trainers(workload, arm)
        self._built = time.perf_counter() - begin
        self._start = {"start_loss": workload.evaluate(self.trainers)} if start else {}
        self._timed: list[Timed] = []
        self._untimed_s: list[float] = []
        self._losses: list[float] = []

    def take(self, steps: int, *, untimed: int = 0) -> list[float]:
        """Milliseconds of some steps, before which others are made that do not count as timed."""
        found = [self._step() for _ in range(untimed + steps)]
        self._untimed_s += [one.seconds for one in found[:untimed]]
        self._timed += found[untimed:]
        return [round(1e3 * one.seconds, 3) for one in found[untimed:]]

    def _step(self) -> "Timed":
        step = len(self._losses)
        batch = self.workload.make_batch(step)
        torch.manual_seed(self.workload.seed * 10_000_019 + step)  # of the dropout
        before, before_busy = time.perf_counter(), time.process_time()
        loss = self.workload.take_step(self.trainers, batch)
        timed = Timed(time.perf_counter() - before, time.process_time() - before_busy)
        self._losses.append(float(loss))
        return timed

    def finish(self) -> dict[str, Any]:
        """What the benchmark wants to know, once all steps are made."""
        peak = read_peak_memory()
        seconds = [one.seconds for one in self._timed]
        steady = median(seconds)
        plans = {name: t.describe() for name, t in self.trainers.items() if isinstance(t, HalfstepTrainer)}
        return self._start | {
            "step_ms": round(1e3 * steady, 3),
            "cpu_ms": round(1e3 * median(one.busy for one in self._timed), 3),
            "fastest_ms": round(1e3 * min(seconds), 3),
            "slowest_ms": round(1e3 * max(seconds), 3),
            "peak_memory_bytes": peak,
            "setup_s": round(self._built + sum(self._untimed_s) - len(self._untimed_s) * steady, 3),
            "loss": self.workload.evaluate(self.trainers),
            "losses": [round(value, 5) for value in self._losses],
            "torch": torch.__version__,
            **({"plans": plans} if plans else {}),
        }  # fmt: skip


class Timed(NamedTuple):
    """A step: seconds that passed, and seconds of the processor over all threads."""

    seconds: float
    busy: float


def measure(workload: Workload, arm: Arm, *, warmup: int, steps: int, start: bool = False) -> dict[str, Any]:
    """Train a workload in an arm, all steps at once.

    start: also evaluate before the first step.
    """
    training = Training(workload, arm, start=start)
    training.take(steps, untimed=warmup)
    return training.finish()


def count_products(workload: Workload) -> int:
    """Floating-point operations of matrix products and convolutions in one training step in fp32.

    torch's counter knows neither fused attention nor fused LSTM layers, so both are taken apart into their products. Causal
    attention counts as the full square, which is what is computed then.
    """
    trainers = build_trainers(workload, ARMS["fp32"])
    batch = workload.make_batch(0)
    counter = FlopCounterMode(display=False)
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    has_lstm = any(isinstance(m, nn.LSTM) for t in trainers.values() for m in t.model.modules())
    with math, without_onednn() if has_lstm else nullcontext(), counter:
        workload.take_step(trainers, batch)
    return int(counter.get_total_flops())


@contextmanager
def without_onednn() -> Iterator[None]:
    """torch.backends.mkldnn.flags does the same, but also sets what only another vendor's GPUs have, and warns of it."""
    enabled = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)


def time_call(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def time_best(call: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of some calls, after one that is not timed."""
    call()
    return min(time_call(call) for _ in range(times))


class Rates(NamedTuple):
    """GFLOP/s of matrix products: of the fastest call, and kept up over the later half of many calls one after another."""

    burst: float
    sustained: float


def measure_rates(dtype: torch.dtype, seconds: float) -> Rates:
    """Each the highest of a few large shapes, which take turns for some seconds.

    Some processors run the units of matrix products at full speed for about a second and then at half of it, so that steps,
    which last longer, never meet the burst.
    """
    calls = [
        partial(nn.functional.linear, torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype))
        for m, k, n in LARGE_SHAPES
    ]
    operations = torch.tensor([2.0 * m * k * n for m, k, n in LARGE_SHAPES])
    spans: list[list[float]] = []
    begin = time.perf_counter()
    while len(spans) < 4 or time.perf_counter() - begin < seconds:
        spans.append([time_call(call) for call in calls])
    table = torch.tensor(spans[1:])  # one row has each shape once; the first is warm-up
    burst = operations / table.amin(0)
    sustained = operations / table[len(table) // 2 :].mean(0)
    return Rates(burst=round(1e-9 * float(burst.max()), 1), sustained=round(1e-9 * float(sustained.max()), 1))


def spin(times: int = 8) -> float:
    """Milliseconds of a fixed product in fp32: more than usual means that something else is running."""
    a = torch.ones(1024, 1024)
    return round(1e3 * time_best(lambda: a @ a, times), 3)


def calibrate(threads: int) -> dict[str, Any]:
    """What the whole benchmark needs to know once; also measures halfstep's profile of the machine, where it is missing."""
    torch.set_num_threads(threads)
    get_profile()
    return {
        "matmul_gflops": {
            name: measure_rates(dtype, CALIBRATION_S)._asdict()
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        },
        "spin_ms": spin(),
        "kernels": {k.source.stem: k.describe() for k in KERNELS},
    }


def serve(name: str, arm_name: str, seed: int, *, warmup: int, threads: int, lines: Iterable[str]) -> Iterator[Any]:
    """Everything that a process of the benchmark does. It answers each line: a number of steps with their times, `turns.END` with
    what it has found.

    The first step of a turn finds the caches as another process has left them; it is made besides and not timed.
    """
    arm, is_reference = ARMS[arm_name], arm_name == REFERENCE
    with tuned(arm, threads):
        workload = WORKLOADS[name](seed)
        training = Training(workload, arm, start=is_reference)
        training.take(0, untimed=warmup - 1)
        for line in lines:
            if line.strip() == END:
                break
            yield {"step_ms": training.take(int(line), untimed=1)}
        yield training.finish() | ({"flops": count_products(workload)} if is_reference and seed == 0 else {})


def gauge(threads: int, lines: Iterable[str]) -> Iterator[dict[str, float]]:
    """How fast the machine is whenever a line asks for it: rates of a product in bf16 in GFLOP/s, and `spin`."""
    torch.set_num_threads(threads)
    for _ in lines:
        rates = measure_rates(torch.bfloat16, GAUGE_S)
        yield {"bf16": rates.burst, "bf16_sustained": rates.sustained, "spin_ms": spin(times=3)}


if __name__ == "__main__":
    sys.exit("this is a part of benchmarks/speed.py; run that")
