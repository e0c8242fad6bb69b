"""Speed at equal accuracy: every workload in every arm, by turns, each run in a process of its own. `make bench`.

    python benchmarks/speed.py                              all, three rounds: some hours
    python benchmarks/speed.py --quick                      two workloads without compiling, about three minutes
    python benchmarks/speed.py --only gpt,lstm --arms fp32,torch-amp-tuned,halfstep --rounds 5

Writes benchmarks/results/NAME.json after every workload of a round, so that an interrupted benchmark keeps what it has. Arms and
rules stand in `speed_worker` and `speed_summary`, how arms take turns in `turns`, workloads in `workloads`, and all of it in
docs/benchmarks.md. Nothing else should run on the machine; all arms of a workload are in memory at once.
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
from statistics import median
from typing import Any

import torch
from rich.console import Console

from halfstep.machine.hardware import BUSY, name_machine, read_load
from speed_summary import Run, show, show_means, summarize
from speed_worker import ARMS, calibrate, gauge, serve
from turns import Process, find_last_words, take_turns
from workloads.catalogue import QUICK, WORKLOADS

ROOT = Path(__file__).parent.parent
TABLE_WIDTH = 152
Measure = Callable[[str, Sequence[str], int], list[Run]]


def order_groups(workloads: Sequence[str], arms: Sequence[str], rounds: int) -> Iterator[tuple[int, str, list[str]]]:
    """(round, workload, arms in the order in which they start): a different one first each time."""
    for number in range(rounds):
        for place, workload in enumerate(workloads):
            shift = (number + place) % len(arms)
            yield number, workload, [*arms[shift:], *arms[:shift]]


def conduct(
    order: Iterable[tuple[int, str, list[str]]],
    measure: Measure,
    keep: Callable[[list[Run]], None],
    notify: Callable[[Run], None],
) -> list[Run]:
    """Group after group; what is there is kept after each, and whatever ends the benchmark leaves it kept."""
    runs: list[Run] = []
    for number, workload, arms in order:
        found = measure(workload, arms, number)
        runs += found
        keep(runs)
        for run in found:
            notify(run)
    return runs


def measure_by_turns(
    options: argparse.Namespace,
    environment: dict[str, str],
    gauging: Process,
    workload: str,
    arms: Sequence[str],
    seed: int,
) -> list[Run]:
    """The runs of a workload in a round, each in a process of its own; one that fails gives its last words."""
    load = round(read_load(), 2)
    words = [f"--{key}={getattr(options, key)}" for key in ("warmup", "threads")]

    def start(arm: str) -> Process:
        command = [sys.executable, __file__, "--worker", workload, arm, str(seed), *words]
        return Process(command, environment, options.timeout)

    turns = -(-options.steps // options.turn)
    found = take_turns(start, arms, gauging, turns=turns, steps=options.turn)
    common = {"round": seed, "workload": workload, "load": load}
    return [common | {"arm": arm} | condense(answer) for arm, answer in found.items()]


def condense(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with the median step of each turn in place of all steps."""
    turns = [{"step_ms": median(turn["step_ms"])} | turn["gauge"] for turn in answer.get("turns", [])]
    return answer | ({"turns": turns} if turns else {})


def call(command: Sequence[str], environment: dict[str, str], timeout: float) -> dict[str, Any]:
    """The JSON in the last line that a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"took over {timeout:g} s"}
    if done.returncode:
        return {"error": find_last_words(done.stderr)}
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
        f"loss {found['loss']:.4f}  spin {median(turn['spin_ms'] for turn in found['turns']):.1f} ms"
    )
    console.print(f"{place} {said}", highlight=False, markup=False, soft_wrap=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAMES", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--arms", metavar="NAMES", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--rounds", type=int, help="3, or 2 with --quick; round number = seed")
    parser.add_argument("--steps", type=int, help="timed steps: 20, or 6 with --quick")
    parser.add_argument(
        "--turn", type=int, help="timed steps of an arm before it is the next one's turn: 4, or 2 with --quick"
    )
    parser.add_argument("--warmup", type=int, help="steps before all turns: 5, or 3 with --quick")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that a process may take for an answer")
    parser.add_argument("--name", help="of the result: speed, or speed-quick")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--refuse-busy", action="store_true", help="stop, where the default is to warn, on a busy machine"
    )
    parser.add_argument("--worker", nargs=3, metavar=("WORKLOAD", "ARM", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gauge", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    default = {"rounds": (3, 2), "steps": (20, 6), "turn": (4, 2), "warmup": (5, 3), "name": ("speed", "speed-quick")}
    for key, pair in default.items():
        if getattr(options, key) is None:
            setattr(options, key, pair[options.quick])
    if min(options.rounds, options.steps, options.turn, options.warmup, options.threads) < 1:
        parser.error("--rounds, --steps, --turn, --warmup and --threads are at least 1")
    quick_arms = [name for name, arm in ARMS.items() if not (arm.compiled or arm.small)]
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
        answer(serve(name, arm, int(seed), warmup=options.warmup, threads=options.threads, lines=sys.stdin))
    elif options.gauge:
        answer(gauge(options.threads, sys.stdin))
    elif options.calibrate:
        print(json.dumps(calibrate(options.threads)))
    else:
        benchmark(options)


def answer(answers: Iterable[Any]) -> None:
    """Print answers as `Process` reads them, and whatever else is printed meanwhile where errors go."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for each in answers:
            print(json.dumps(each), file=out, flush=True)


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
            "rounds": options.rounds, "steps": options.steps, "turn": options.turn, "warmup": options.warmup,
            "arms": options.arms,
        }  # fmt: skip
        result: dict[str, Any] = {}

        def keep(runs: list[Run]) -> None:
            loads = {r["round"]: r["load"] for r in reversed(runs)}  # that before the first run of each round
            summary = summarize(runs, options.arms)
            result.update(head | {"load": [loads[n] for n in sorted(loads)]} | summary | {"runs": runs})
            write(path, result)

        order = order_groups(options.only, options.arms, options.rounds)
        words = [sys.executable, __file__, "--gauge", f"--threads={options.threads}"]
        try:
            with Process(words, environment, options.timeout) as gauging:
                conduct(order, partial(measure_by_turns, options, environment, gauging), keep, partial(notify, console))
        finally:
            if result:
                console.print(show(result), show_means(result))
                console.print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
