"""The time of one optimizer update a parameter: behind masters, in one pass and chunk by chunk, beside torch's own.

    python benchmarks/updates.py                    writes benchmarks/results/updates.json
    python benchmarks/updates.py --rounds 3         a look

Every arm updates parameters of its own, 16 equal ones, with AdamW and weight decay; gradients have the width of the live
weight and lie ready. Arms take turns, one step each, and a round's times are divided by that of torch's fused AdamW on fp32 in
the same round: a ratio says what a busy machine does not. Times are of the thread for one thread, and by the clock for more.

    torch fused, loop, foreach    torch's AdamW on fp32 weights, by its three ways
    wide, split, fp32             halfstep: fp32 weights; bf16 behind each master, in one pass
    ..., loop                     the same with the bits of torch's loop (fused=None) in place of its fused kernels'
    split, chunks                 as without kernels: widened, stepped by torch, narrowed
    ..., 8-bit                    with optimizer states in 8 bits, decoded and encoded on the way
    split, 8-bit, chunks          as without kernels: states are widened too
    none                          bf16 weights without a master, stepped by torch's fused AdamW in bf16

Many small tensors: the same with 300 tensors of 4 Ki numbers, where calls cost as much as arithmetic.

Rows: a table of 200,000 rows of 64 numbers, of which a batch of 2048 looks up 4 each, by SparseAdam, Adagrad and SGD:

    torch           torch's own, on an fp32 table
    wide, split     halfstep: an fp32 table; bf16 behind a split master, with a bf16 gradient
    split, torch    as without kernels: rows are widened, stepped by torch, narrowed
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from halfstep.machine.hardware import name_machine, read_load
from halfstep.machine.runtime import tune_process
from halfstep.mechanisms.master_weights import MasterWeights
from halfstep.mechanisms.optimizer_states import NarrowStates
from halfstep.numerics.updates import KERNELS

ROOT = Path(__file__).parent.parent
TENSORS = 16
SMALL = (300, 4096)  # tensors, numbers of each
TABLE, LOOKUPS = (200_000, 64), 2048 * 4
BASE = "torch fused"
TORCH: dict[str, dict[str, bool]] = {
    BASE: {"fused": True}, "torch loop": {"foreach": False, "fused": False}, "torch foreach": {"foreach": True}
}  # fmt: skip


class Way(NamedTuple):
    """How halfstep updates."""

    master: str = ""
    fused: bool = True  # with the bits of torch's fused optimizer
    in_one_pass: bool = True
    eight_bits: bool = False  # states


OURS = {
    "wide": Way(), "split": Way("split"), "fp32": Way("fp32"),
    "wide, loop": Way(fused=False), "split, loop": Way("split", fused=False),
    "wide, 8-bit": Way(eight_bits=True), "split, 8-bit": Way("split", eight_bits=True),
    "split, 8-bit, loop": Way("split", fused=False, eight_bits=True),
    "split, 8-bit, chunks": Way("split", in_one_pass=False, eight_bits=True),
    "split, chunks": Way("split", in_one_pass=False), "none": Way("none"),
}  # fmt: skip
Step = Callable[[], float]


def build_torch(start: Tensor, tensors: int, options: dict[str, bool]) -> Step:
    """Seconds of one step, whatever clock `read_clock` is."""
    params = [nn.Parameter(part.clone()) for part in start.chunk(tensors)]
    optimizer = torch.optim.AdamW(params, lr=1e-4, foreach=options.get("foreach"), fused=options.get("fused"))
    for parameter in params:
        parameter.grad = torch.randn_like(parameter)

    def step() -> float:
        begun = read_clock()
        optimizer.step()
        return read_clock() - begun

    return step


def build_ours(start: Tensor, tensors: int, way: Way) -> Step:
    params = [nn.Parameter(part.clone()) for part in start.chunk(tensors)]
    masters = MasterWeights(fused=way.in_one_pass)
    for parameter in params if way.master else []:
        masters.narrow(parameter, torch.bfloat16, way.master)
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=way.fused)
    widened = NarrowStates(optimizer).widened if way.eight_bits else None
    gradients = {parameter: torch.randn_like(parameter) for parameter in params}

    def step() -> float:
        given = dict(gradients)
        begun = read_clock()
        factor = 1.0 if way.master == "none" or not way.in_one_pass else 0.999
        masters.step(optimizer, given, factor, widened=widened)
        return read_clock() - begun

    return step


def read_clock() -> float:
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(size: int, threads: int, rounds: int, tensors: int = TENSORS) -> dict[str, Any]:
    """Nanoseconds a parameter and ratios to torch's fused AdamW of the same round."""
    torch.set_num_threads(threads)
    start = torch.randn(size)
    arms = {name: build_torch(start, tensors, options) for name, options in TORCH.items()}
    for name, way in OURS.items():
        arms[name] = build_ours(start, tensors, way)
    return compare(arms, BASE, rounds, 1e9 / size, "ns")


ROW_KINDS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SparseAdam": lambda params: torch.optim.SparseAdam(params, lr=1e-4),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-4),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-4),
}


def build_rows(kind: str, master: str, *, by_torch: bool, in_one_pass: bool = True) -> Step:
    table, masters = nn.Parameter(torch.randn(TABLE)), MasterWeights(fused=in_one_pass)
    if master:
        masters.narrow(table, torch.bfloat16, master)
    optimizer = ROW_KINDS[kind]([table])
    noise = torch.Generator().manual_seed(0)

    def step() -> float:
        numbers, values = torch.randint(TABLE[0], (1, LOOKUPS), generator=noise), torch.randn(LOOKUPS, TABLE[1])
        gradient = torch.sparse_coo_tensor(numbers, values.to(table.dtype), TABLE, check_invariants=False)
        begun = read_clock()
        if by_torch:
            table.grad = gradient
            optimizer.step()
        else:
            masters.step(optimizer, {table: gradient}, 0.999 if master else 1.0)
        return read_clock() - begun

    return step


def measure_table(kind: str, threads: int, rounds: int) -> dict[str, Any]:
    """Microseconds of an update and ratios to torch's own of the same round."""
    torch.set_num_threads(threads)
    arms = {
        "torch": build_rows(kind, "", by_torch=True), "wide": build_rows(kind, "", by_torch=False),
        "split": build_rows(kind, "split", by_torch=False),
        "split, torch": build_rows(kind, "split", by_torch=False, in_one_pass=False),
    }  # fmt: skip
    return compare(arms, "torch", rounds, 1e6, "us")


def compare(arms: dict[str, Step], base: str, rounds: int, unit: float, name_of_unit: str) -> dict[str, Any]:
    """Arms take turns; times in a unit, and ratios to those of `base` in the same round."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 2):
        for name, step in arms.items():
            seconds = step()
            if turn >= 2:
                times[name].append(unit * seconds)
    found = {}
    for name, spans in times.items():
        ratios = [ours / base for ours, base in zip(spans, times[base], strict=True)]
        found[name] = {
            name_of_unit: round(statistics.median(spans), 3), f"{name_of_unit}_least": round(min(spans), 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
        }  # fmt: skip
    return found


def measure_key(
    report: dict[str, Any], name: str, threads: int, rounds: int, measure_one: Callable[..., dict[str, Any]], what: Any
) -> None:
    key = f"{name}, {threads} thread{'s' * (threads > 1)}"
    report[key] = {"rounds": rounds, "load": read_load()} | measure_one(what, threads, rounds)
    print(key, {arm: found["ratio"] for arm, found in report[key].items() if isinstance(found, dict)}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="at 1 Mi parameters; fewer for more")
    parser.add_argument("--mebi", type=int, nargs="*", default=[1, 4, 16], help="Mi parameters")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "updates.json")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/updates.py", *sys.argv[1:]]), "date": date.today().isoformat(),
        "machine": name_machine(), "torch": torch.__version__, "kernels": KERNELS.describe(), "load_before": read_load(),
        "clock": "thread time for one thread, else wall time",
    }  # fmt: skip
    torch.sparse.check_sparse_tensor_invariants.disable()  # torch's default, said aloud
    with tune_process():
        for threads in options.threads:
            for mebi in options.mebi:
                rounds = max(7, options.rounds // mebi) if mebi > 1 else options.rounds
                measure_key(report, f"{mebi} Mi", threads, rounds, measure, mebi << 20)
            tensors, numbers = SMALL
            name = f"{tensors} tensors of {numbers}"
            measure_key(report, name, threads, options.rounds, partial(measure, tensors=tensors), tensors * numbers)
            for kind in ROW_KINDS:
                measure_key(report, f"rows, {kind}", threads, options.rounds, measure_table, kind)
    text = ",\n".join(json.dumps({key: value})[1:-1] for key, value in report.items())
    options.out.write_text("{" + text + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
