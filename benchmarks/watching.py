"""What it costs to look whether weights still move (`stepping.stalls`), as a share of a training.

    python benchmarks/watching.py               writes benchmarks/results/watching.json

Workloads of `speed.py` train with halfstep; every other step looks, whatever its number. What a look adds to a step is compared
within the pair, since the machine's speed changes. From the median of the pairs:

    look      of the time of a step without one
    share     of a whole training, in which every 500th update looks; the two early looks, at updates 10 and 20, are not in it
"""

import argparse
import json
import sys
from datetime import date
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from halfstep.machine.hardware import name_machine, read_load
from halfstep.stepper import Stepper
from halfstep.stepping.stalls import EVERY, StallReports
from speed_worker import ARMS, HalfstepTrainer, Training, tuned
from workloads.catalogue import WORKLOADS

ROOT = Path(__file__).parent.parent


class Alternate(StallReports):
    """Every other update is due, the first is not."""

    def __init__(self) -> None:
        super().__init__()
        self._answers = cycle((False, True))

    def is_due(self, number: int) -> bool:
        return next(self._answers)


def measure(name: str, pairs: int) -> dict[str, Any]:
    training = Training(WORKLOADS[name](0), ARMS["halfstep"])
    training.take(0, untimed=3)
    steppers: list[Stepper] = [t.stepper for t in training.trainers.values() if isinstance(t, HalfstepTrainer)]
    for stepper in steppers:
        stepper._stalls = Alternate()
    training.take(0, untimed=2)
    found = [training.take(2) for _ in range(pairs)]
    looks = [look / plain - 1 for plain, look in found]
    return {
        "step_ms": round(median(plain for plain, _ in found), 3),
        "look": round(median(looks), 4),
        "look_quartiles": [round(q, 4) for q in quantiles(looks, n=4)[::2]],
        "share": round(median(looks) / EVERY, 6),
        "weights": sum(p.numel() for t in training.trainers.values() for p in t.model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="gpt,nanogpt-tiny,lstm,mlp", help="workloads")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "watching.json")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/watching.py", *sys.argv[1:]]), "date": date.today().isoformat(),
        "machine": name_machine(), "torch": torch.__version__, "threads": options.threads, "load_before": read_load(),
        "pairs": options.pairs, "workloads": {},
    }  # fmt: skip
    with tuned(ARMS["halfstep"], options.threads):
        for name in options.only.split(","):
            found = report["workloads"][name] = measure(name, options.pairs)
            print(
                f"{name:14} step {found['step_ms']:8.1f} ms   look {found['look']:+7.1%}   training {found['share']:+.3%}",
                flush=True,
            )
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
