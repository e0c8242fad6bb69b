"""One result of the speed benchmark from several that were run apart, each with workloads of its own.

    python benchmarks/merge_results.py WHOLE.json PART.json PART.json

A workload that several parts have is taken from the last of them. `parts` keeps command, date, steps and calibration of each,
also of what was merged before; parts may differ in them, but not in machine, versions, threads and arms.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from speed import TABLE_WIDTH, write
from speed_summary import show, show_means, summarize
from workloads.catalogue import WORKLOADS

SHARED = ("machine", "torch", "threads", "kernels", "arms")
APART = ("command", "date", "rounds", "steps", "turn", "warmup", "load", "matmul_gflops", "spin_ms")


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for parts that were not measured alike."""
    first = parts[0]
    differing = [key for key in SHARED if any(part[key] != first[key] for part in parts)]
    if differing:
        raise ValueError(f"parts differ in {', '.join(differing)}; only what was measured alike can be merged")
    source = {name: part for part in parts for name in part["workloads"]}
    runs = [r for name in WORKLOADS if name in source for r in source[name]["runs"] if r["workload"] == name]
    heads = [head for part in parts for head in part.get("parts", [{k: part[k] for k in APART if k in part}])]
    shared = {key: first[key] for key in SHARED} | {"date": max(part["date"] for part in parts), "parts": heads}
    return shared | summarize(runs, first["arms"]) | {"runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whole", type=Path)
    parser.add_argument("parts", type=Path, nargs="+")
    options = parser.parse_args()
    try:
        result = merge([json.loads(path.read_text(encoding="utf-8")) for path in options.parts])
    except ValueError as error:
        sys.exit(f"not merged: {error}")
    write(options.whole, result)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(show(result), show_means(result))


if __name__ == "__main__":
    main()
