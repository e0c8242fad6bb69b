"""Measure what the README says and write it to benchmarks/results. `make bench`, or with arguments:

    python benchmarks/run.py                                the machine and the demo
    python benchmarks/run.py --cifar10 FOLDER               also CIFAR-10, from FOLDER/train.parquet and test.parquet
    python benchmarks/run.py --only text-generation         one of them

Every result is the JSON that the command itself writes; the command, date and machine stand in it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def list_commands(cifar10: str | None) -> dict[str, list[str]]:
    """Name of a result -> arguments of the command that makes it."""
    commands = {
        "probe": ["probe"],
        "text-generation": ["compare", "text-generation"],
    }
    if cifar10:
        commands["tutorial-cnn"] = ["compare", "tutorial-cnn", "--seeds", "2", "--data", cifar10]
        commands["resnet-cifar10-short"] = [
            "compare", "resnet-cifar10", "--arms", "fp32,torch-amp-tuned,halfstep", "--seeds", "1", "--steps", "12",
            "--set", "warmup=2", "--set", "evaluations=1", "--data", cifar10,
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
            page = ["--page", f"{name}.html"] if arguments[0] == "compare" else []
            words = [sys.executable, "-m", "halfstep", *arguments, "--json", f"benchmarks/results/{name}.json", *page]
            subprocess.run(words, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
