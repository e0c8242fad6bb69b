"""Train what the README reports and write it to benchmarks/results. `make bench-results`, or with arguments:

    python benchmarks/run.py                                the machine and the demo
    python benchmarks/run.py --cifar10 FOLDER               also CIFAR-10, from FOLDER/train.parquet and test.parquet
    python benchmarks/run.py --only text-generation         one of them

Every result is the JSON that the command itself writes; the command, date and machine stand in it.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from halfstep import records

ROOT = Path(__file__).parent.parent
EIGHT_BITS = "fp32,torch-amp,halfstep:fp8-mixed,halfstep:int8-mixed"


def list_commands(cifar10: str | None) -> dict[str, list[str]]:
    """Name of a result -> arguments of the command that makes it."""
    commands = {
        "probe": ["probe"],
        "text-generation": ["compare", "text-generation"],
        "8-bit-text": [
            "compare",
            "text-generation",
            "--arms",
            EIGHT_BITS,
            "--seeds",
            "12",  # six decide in every second comparison (docs/experiments.md)
            "--steps",
            "60",
            "--set",
            "seed=100",  # none that fp8 was looked into with
            "--set",
            "evaluations=2",
        ],
        "8-bit-images": [
            "compare",
            "image-classification",
            "--arms",
            EIGHT_BITS,
            "--seeds",
            "5",
            "--set",
            "model=resnet9",
        ],
        "rehearsal-text": ["compare", "text-generation", "--rehearse", "fp8-h100"],
    }
    if cifar10:
        commands["tutorial-cnn"] = ["compare", "tutorial-cnn", "--seeds", "2", "--data", cifar10]
        commands["resnet-cifar10"] = ["train", "resnet-cifar10", "--data", cifar10]
        commands["resnet-cifar10-short"] = [
            "compare", "resnet-cifar10", "--arms", "fp32,halfstep", "--seeds", "3", "--steps", "194",
            "--set", "warmup=39", "--set", "evaluations=2", "--data", cifar10,
        ]  # fmt: skip
        for seed in range(3):
            commands[f"airbench-cifar10-{seed}"] = [
                "train",
                "airbench-cifar10",
                "--set",
                f"seed={seed}",
                "--data",
                cifar10,
            ]
        commands["airbench-cifar10-arms"] = [  # one seed of every arm to the end: about 80 minutes
            "compare", "airbench-cifar10", "--arms", "fp32,torch-amp,torch-amp-tuned,halfstep", "--seeds", "1", "--data", cifar10,
        ]  # fmt: skip
        commands["airbench-cifar10-steps"] = [  # step times of the arms, in the recipe's mixture of image sizes
            "compare", "airbench-cifar10", "--arms", "fp32,torch-amp,torch-amp-tuned,halfstep", "--seeds", "1",
            "--steps", "50", "--set", "warmup=10", "--set", "evaluations=1", "--data", cifar10,
        ]  # fmt: skip
    return commands


def main() -> None:
    """Run the commands one after another; nothing else should run on the machine meanwhile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", metavar="FOLDER")
    parser.add_argument("--only", metavar="NAME")
    options = parser.parse_args()
    commands = list_commands(options.cifar10)
    if options.only and options.only not in commands:
        parser.error(f"--only takes one of {', '.join(commands)}; got {options.only}")
    for name, arguments in commands.items():
        if options.only in (None, name):
            run = measure_training if arguments[0] == "train" else measure
            run(name, [sys.executable, "-m", "halfstep", *arguments], ROOT / "benchmarks" / "results" / f"{name}.json")


def measure(name: str, command: list[str], result: Path) -> None:
    """A command that writes its result itself."""
    page = ["--page", f"{name}.html"] if "compare" in command else []
    subprocess.run([*command, "--json", str(result.relative_to(ROOT)), *page], check=True, cwd=ROOT)


def measure_training(_name: str, command: list[str], result: Path) -> None:
    """A training run, whose evaluations are taken from its record."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "--out", f"{folder}/run"], check=True, cwd=ROOT)
        write_evaluations(Path(folder) / "run" / "record.jsonl", ["halfstep", *command[3:]], result)


def write_evaluations(record: Path, command: list[str], result: Path) -> None:
    """The evaluations of a run, with its head, as JSON."""
    lines = list(records.read(record))
    (head,) = (r for r in lines if isinstance(r, records.RunRecord))
    end = next(r for r in reversed(lines) if isinstance(r, records.EndRecord))
    steps = sorted(r.milliseconds for r in lines if isinstance(r, records.StepRecord))
    values = {
        "command": shlex.join(command), "date": head.date, "machine": head.machine, "torch": head.torch_version,
        "threads": head.threads, "seed": head.seed, "precision": head.precision, "steps": end.step,
        "training_seconds": round(sum(steps) / 1e3, 1),
        "fastest_step_ms": round(steps[0], 1), "median_step_ms": round(statistics.median(steps), 1),
        "skipped_steps": end.skipped_steps, "peak_memory_bytes": end.peak_memory_bytes,
        "evaluations": [
            {"step": r.step, "metric": r.metric, "value": r.value} for r in lines if isinstance(r, records.EvaluationRecord)
        ],
    }  # fmt: skip
    result.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
