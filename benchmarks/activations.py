"""Saved activations in fewer bits: memory, time and loss beside plain torch.amp.

    python benchmarks/activations.py                        writes benchmarks/results/activations.json
    python benchmarks/activations.py --rounds 1 --steps 4   a look

The text-generation model is trained under bf16 autocast, in a loop of plain torch; the arms differ only in what waits for the
backward pass. Every run is a process of its own with one seed a round; the arms of a round run one after another, and are
compared with the torch-amp run of their round.

    activation memory    peak resident memory, less that of torch-amp with a batch of one sequence
    time                 the median step, without the first two; CPU time beside it, which other work on the machine disturbs less
    torch-amp            as documented, nothing set
    torch-amp-pool       large tensors come from halfstep's pool, as in the arms in fewer bits
    int8-trimmed         without the pool: the heap of the C library, trimmed while it is fragmented
    loss                 mean over the last quarter of the steps
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from halfstep.machine.hardware import name_machine, read_load
from halfstep.machine.runtime import read_peak_memory, tune_process
from halfstep.mechanisms.activations import Keeper
from halfstep.numerics.packing import KERNELS, pack_groups, unpack_groups
from halfstep.tasks.text_generation import Options, TextGeneration
from halfstep.training import TrainSettings

ROOT = Path(__file__).parent.parent
ARMS = {"torch-amp": "", "torch-amp-pool": "", "bf16": "bf16", "int8": "int8", "int4": "int4", "int8-trimmed": "int8"}
PLAIN = ("torch-amp", "int8-trimmed")  # without the pool
MIB = 2**20


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process."""
    with tune_process(allocator=options.arm not in PLAIN and "pool", threads=options.threads):
        return train_arm(options)


def train_arm(options: argparse.Namespace) -> dict[str, Any]:
    settings = TrainSettings(seed=options.seed, batch_size=options.batch, steps=options.steps)
    task = TextGeneration(Options(layers=options.layers, width=options.width, context=options.context), settings)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    keeper = Keeper(model, {"": ARMS[options.arm]}, seed=options.seed)
    losses, seconds, busy = [], [], []
    for step in range(options.steps):
        batch = task.make_batch(step)
        start, start_busy = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16), keeper.keep() if ARMS[options.arm] else nullcontext():
            loss = task.measure_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - start_busy)
        losses.append(loss.item())
    peak = read_peak_memory()
    tail = max(1, options.steps // 4)
    return {
        "peak_mib": round(peak / MIB, 1),
        "step_ms": round(1e3 * statistics.median(seconds[2:] or seconds), 1),
        "cpu_ms": round(1e3 * statistics.median(busy[2:] or busy), 1),
        "loss": round(statistics.mean(losses[-tail:]), 5),
        "losses": [round(value, 4) for value in losses],
        "saved": describe_saved(task, model) if options.batch > 1 else {},
    }


def describe_saved(task: TextGeneration, model: torch.nn.Module) -> dict[str, Any]:
    """Where the bytes of one forward pass are, by module and way: MiB as they are and in int8, and the error."""
    keeper, totals = Keeper(model, {"": "int8"}), defaultdict(lambda: [0, 0])
    errors = defaultdict(list)
    with torch.autocast("cpu", torch.bfloat16), keeper.keep(measure=True):
        task.measure_loss(model, task.make_batch(0))
    for record in keeper.records:
        parts = [part for part in record.path.split(".") if not part.isdigit()]
        name = f"{'.'.join(parts) or 'model'}: {record.format or record.why}"
        totals[name][0] += record.bytes
        totals[name][1] += record.kept
        errors[name] += [record.sqnr] if record.sqnr is not None else []
    return {
        name: {"mib": round(before / MIB, 3), "kept_mib": round(kept / MIB, 3)}
        | ({"sqnr_db": round(statistics.mean(errors[name]), 1)} if errors[name] else {})
        for name, (before, kept) in sorted(totals.items(), key=lambda item: -item[1][0])
        if before
    }


def time_packing() -> dict[str, float]:
    """Nanoseconds a number, the fastest of ten, on 4 Mi numbers."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1 << 22).to(dtype)
        for bits in (8, 4):
            name, packed = f"{str(dtype)[6:]} {bits} bits", pack_groups(x, bits, (1, 2))
            found[f"pack {name}"] = time_call(partial(pack_groups, x, bits, (1, 2))) / x.numel()
            found[f"unpack {name}"] = time_call(partial(unpack_groups, packed, dtype)) / x.numel()
    return {name: round(value, 3) for name, value in found.items()}


def time_call(call: Callable[[], object]) -> float:
    spans = []
    for _ in range(10):
        start = time.perf_counter_ns()
        call()
        spans.append(time.perf_counter_ns() - start)
    return min(spans)


def run_arm(arm: str, seed: int, options: argparse.Namespace, **changes: int) -> dict[str, Any]:
    """A run in a process of its own."""
    values = vars(options) | changes | {"arm": arm, "seed": seed}
    arguments = [
        f"--{key}={values[key]}" for key in ("arm", "seed", "steps", "layers", "width", "context", "batch", "threads")
    ]
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def summarize(runs: list[dict[str, dict[str, Any]]], idle: float) -> dict[str, dict[str, Any]]:
    """Each arm beside torch-amp of the same round: medians, with the smallest and the largest."""
    table = {}
    for arm in ARMS:
        memory = [run[arm]["peak_mib"] - idle for run in runs]
        less = [(run["torch-amp"]["peak_mib"] - idle) / (run[arm]["peak_mib"] - idle) for run in runs]
        slower = [run[arm]["step_ms"] / run["torch-amp"]["step_ms"] for run in runs]
        busier = [run[arm]["cpu_ms"] / run["torch-amp"]["cpu_ms"] for run in runs]
        worse = [run[arm]["loss"] - run["torch-amp"]["loss"] for run in runs]
        table[arm] = {
            "activation_mib": round(statistics.median(memory), 1),
            "memory_ratio": spread(less),
            "step_ms": [run[arm]["step_ms"] for run in runs],
            "time_ratio": spread(slower),
            "cpu_ms": [run[arm]["cpu_ms"] for run in runs],
            "cpu_time_ratio": spread(busier),
            "loss": [run[arm]["loss"] for run in runs],
            "loss_difference": spread(worse),
        }
    return table


def spread(values: list[float]) -> dict[str, float]:
    return {name: round(f(values), 4) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS, help="one run in this process; for the benchmark itself")
    parser.add_argument("--seed", type=int, default=0)
    for name, value in {"steps": 40, "layers": 6, "width": 256, "context": 256, "batch": 32, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(train(options)))
        return
    torch.set_num_threads(options.threads)
    load = round(read_load(), 2)
    idle = run_arm("torch-amp", 0, options, batch=1, steps=3)["peak_mib"]
    runs = []
    for seed in range(options.rounds):
        runs.append({arm: run_arm(arm, seed, options) for arm in ARMS})
        for arm, run in runs[-1].items():
            print(
                f"{seed} {arm:14s} {run['peak_mib'] - idle:7.1f} MiB {run['step_ms']:7.1f} ms, {run['cpu_ms']:7.1f} ms of CPU  "
                f"loss {run['loss']:.4f}",
                flush=True,
            )
    command = " ".join(
        f"--{key} {getattr(options, key)}"
        for key in ("rounds", "steps", "layers", "width", "context", "batch", "threads")
    )
    head = {
        "command": f"python benchmarks/activations.py {command}",
        "date": date.today().isoformat(),
        "machine": name_machine(),
        "torch": torch.__version__,
        "kernels": KERNELS.describe(),
        "load_before": load,
        "idle_mib": idle,
        "ns_a_number": time_packing(),
        "saved_in_int8": runs[0]["torch-amp"]["saved"],
    }
    losses = {arm: [run[arm]["losses"] for run in runs] for arm in ARMS}
    result = head | {"arms": summarize(runs, idle), "losses": losses}
    text = json.dumps(result).replace('}, "', '},\n"')
    (ROOT / "benchmarks" / "results" / "activations.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
