"""Speed at equal accuracy: every workload in every arm, interleaved, each run in a process of its own. `make bench`.

    python benchmarks/speed.py                              all, three rounds: some hours
    python benchmarks/speed.py --quick                      two workloads without compiling, under three minutes
    python benchmarks/speed.py --only gpt,lstm --arms fp32,torch-amp-tuned,halfstep --rounds 5

Writes benchmarks/results/NAME.json after every run, so that an interrupted benchmark keeps what it has. Arms and rules stand
in `speed_worker` and `speed_summary`, workloads in `workloads`, and all of it in docs/benchmarks.md. Nothing else should run
on the machine.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from halfstep.machine.hardware import BUSY, name_machine, read_load
from speed_summary import Run, show, show_means, summarize
from speed_worker import ARMS, calibrate, run, spin
from workloads.catalogue import QUICK, WORKLOADS

ROOT = Path(__file__).parent.parent
TABLE_WIDTH = 140
COMPILED = [name for name, arm in ARMS.items() if arm.compiled]
Measure = Callable[[str, str, int], dict[str, Any]]


def order_runs(workloads: Sequence[str], arms: Sequence[str], rounds: int) -> Iterator[tuple[int, str, str]]:
    """(round, workload, arm): arms one after another, and a different one first each time."""
    for number in range(rounds):
        for place, workload in enumerate(workloads):
            shift = (number + place) % len(arms)
            for arm in [*arms[shift:], *arms[:shift]]:
                yield number, workload, arm


def conduct(
    order: Sequence[tuple[int, str, str]],
    measure: Measure,
    keep: Callable[[list[Run]], None],
    notify: Callable[[Run], None],
) -> list[Run]:
    """Run after run; what is there is kept after each, and whatever ends the benchmark leaves it kept."""
    runs: list[Run] = []
    for number, workload, arm in order:
        found = {"round": number, "workload": workload, "arm": arm} | measure(workload, arm, number)
        runs.append(found)
        keep(runs)
        notify(found)
    return runs


def measure_in_process(
    options: argparse.Namespace, environment: dict[str, str], workload: str, arm: str, seed: int
) -> Run:
    """A run in a process of its own; one that fails gives its last words."""
    before = {"load": round(read_load(), 2), "spin_ms": spin()}
    words = [f"--{key}={getattr(options, key)}" for key in ("warmup", "steps", "threads")]
    command = [sys.executable, __file__, "--worker", workload, arm, str(seed), *words]
    return before | call(command, environment, options.timeout)


def call(command: Sequence[str], environment: dict[str, str], timeout: float) -> dict[str, Any]:
    """The JSON in the last line that a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"took over {timeout:g} s"}
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return {"error": next((x for x in reversed(said) if "Error" in x), said[-1] if said else "it said nothing")}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    """A result appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def notify(console: Console, found: Run) -> None:
    place = f"round {found['round']} {found['workload']:13s} {found['arm']:18s}"
    said = found.get("error") or (
        f"{found['step_ms']:9.1f} ms {found['peak_memory_bytes'] / 2**20:7.0f} MiB  set-up {found['setup_s']:6.1f} s  "
        f"loss {found['loss']:.4f}  spin {found['spin_ms']:.1f} ms, load {found['load']}"
    )
    console.print(f"{place} {said}", highlight=False, markup=False, soft_wrap=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAMES", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--arms", metavar="NAMES", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--rounds", type=int, help="3, or 2 with --quick; round number = seed")
    parser.add_argument("--steps", type=int, help="timed steps: 20, or 8 with --quick")
    parser.add_argument("--warmup", type=int, help="steps before: 5, or 3 with --quick")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one run may take")
    parser.add_argument("--name", help="of the result: speed, or speed-quick")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--refuse-busy", action="store_true", help="stop, where the default is to warn, on a busy machine"
    )
    parser.add_argument("--worker", nargs=3, metavar=("WORKLOAD", "ARM", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    default = {"rounds": (3, 2), "steps": (20, 8), "warmup": (5, 3), "name": ("speed", "speed-quick")}
    for key, pair in default.items():
        if getattr(options, key) is None:
            setattr(options, key, pair[options.quick])
    if options.rounds < 1 or options.steps < 1 or options.warmup < 1 or options.threads < 1:
        parser.error("--rounds, --steps, --warmup and --threads are at least 1")
    quick_arms = [arm for arm in ARMS if arm not in COMPILED]
    options.only = choose(parser, "--only", options.only, WORKLOADS, QUICK if options.quick else WORKLOADS)
    options.arms = choose(parser, "--arms", options.arms, ARMS, quick_arms if options.quick else ARMS)
    return options


def choose(
    parser: argparse.ArgumentParser, flag: str, given: str | None, known: Iterable[str], default: Iterable[str]
) -> list[str]:
    if given is None:
        return list(default)
    names = given.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"{flag} takes names of {', '.join(known)}, with commas between; got {', '.join(unknown)}")
    return names


def main() -> None:
    options = parse()
    if options.worker:
        name, arm, seed = options.worker
        found = run(name, arm, int(seed), warmup=options.warmup, steps=options.steps, threads=options.threads)
        print(json.dumps(found))
    elif options.calibrate:
        print(json.dumps(calibrate(options.threads)))
    else:
        benchmark(options)


def benchmark(options: argparse.Namespace) -> None:
    console, load = Console(), read_load()
    console.width = max(console.width, TABLE_WIDTH)  # also where the output is a file
    if load > BUSY:
        said = f"the machine is busy (load {load:.1f} a core): its times are not to be trusted"
        if options.refuse_busy:
            sys.exit(f"{said}; run again when it is quiet, or leave --refuse-busy out")
        console.print(f"[red]{said}[/red]")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated; what was measured is kept"))
    torch.set_num_threads(options.threads)
    path = ROOT / "benchmarks" / "results" / f"{options.name}.json"
    with tempfile.TemporaryDirectory(prefix="halfstep-speed-") as cache:  # the first round compiles, later ones find it
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        words = [sys.executable, __file__, "--calibrate", f"--threads={options.threads}"]
        machine = call(words, environment, options.timeout)
        if "error" in machine:
            sys.exit(f"the machine could not be measured: {machine['error']}")
        head = {
            "command": f"python benchmarks/speed.py {shlex.join(sys.argv[1:])}".strip(),
            "date": date.today().isoformat(), "machine": name_machine(), "torch": torch.__version__,
            "threads": options.threads, "load_before": round(load, 2), "load": [], **machine,
            "rounds": options.rounds, "steps": options.steps, "warmup": options.warmup, "arms": options.arms,
        }  # fmt: skip
        result: dict[str, Any] = {}

        def keep(runs: list[Run]) -> None:
            loads = {r["round"]: r["load"] for r in reversed(runs)}  # that before the first run of each round
            summary = summarize(runs, machine["matmul_gflops"], options.arms)
            result.update(head | {"load": [loads[n] for n in sorted(loads)]} | summary | {"runs": runs})
            write(path, result)

        order = list(order_runs(options.only, options.arms, options.rounds))
        try:
            conduct(order, partial(measure_in_process, options, environment), keep, partial(notify, console))
        finally:
            if result:
                console.print(show(result), show_means(result))
                console.print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
