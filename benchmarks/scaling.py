"""How step time and peak memory grow with a GPT's width, depth, batch, sequence length, and with threads.

    python benchmarks/scaling.py                writes benchmarks/results/scaling.json and docs/figures/scaling.svg
    python benchmarks/scaling.py --steps 2      a look

One size is changed at a time, from the middle of the grid (BASE); every point and arm is a process of its own, arms one after
another. Times are medians; memory is the peak of the process, less that of one which has imported everything and trained a
model of almost no size.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from halfstep.machine.hardware import name_machine, read_load
from halfstep.report.charts import HEIGHT, WIDTH, Line, draw_lines
from speed import call, write
from speed_worker import ARMS, calibrate, measure, tuned
from workloads.text import Gpt

ROOT = Path(__file__).parent.parent
SCALED_ARMS = ("fp32-tuned", "torch-amp-tuned", "halfstep")
BASE = {"width": 256, "layers": 4, "batch": 8, "context": 128, "threads": 2}
TINY = BASE | {"width": 32, "layers": 1, "batch": 1, "context": 8}
GRID = {
    "width": (64, 128, 256, 512), "layers": (1, 2, 4, 8), "batch": (1, 2, 4, 8, 16), "context": (32, 64, 128, 256, 512),
    "threads": (1, 2),
}  # fmt: skip
COLOURS = ("#808b96", "#2471a3", "#c0392b")
STYLE = (
    "text{font:12px sans-serif;fill:#555}.grid{stroke:#bbb;stroke-width:.5}.line{fill:none;stroke-width:1.6}"
    "@media(prefers-color-scheme:dark){text{fill:#bbb}.grid{stroke:#555}}"
)
MIB = 2**20


def list_points(grid: Mapping[str, Sequence[int]], base: dict[str, int]) -> list[tuple[str, dict[str, int]]]:
    """(what is changed, all sizes) of every point; the middle of the grid is in each line."""
    return [(key, base | {key: value}) for key, values in grid.items() for value in values]


class SizedGpt(Gpt):
    """A GPT of the sizes of a point, with heads of 32."""

    name, about, vocabulary = "sized-gpt", "GPT of a given size", 2048

    def __init__(self, sizes: dict[str, int]) -> None:
        self.width, self.layers, self.heads = sizes["width"], sizes["layers"], max(1, sizes["width"] // 32)
        self.batch_size, self.context = sizes["batch"], sizes["context"]
        super().__init__(seed=0)


def run_point(sizes: dict[str, int], arm: str, steps: int) -> dict[str, Any]:
    """One process: median step and peak memory."""
    with tuned(ARMS[arm], sizes["threads"]):
        found = measure(SizedGpt(sizes), ARMS[arm], warmup=3, steps=steps)
    return {key: found[key] for key in ("step_ms", "peak_memory_bytes", "setup_s")}


def run_point_in_process(sizes: dict[str, int], arm: str, steps: int) -> dict[str, Any]:
    return call(
        [sys.executable, __file__, "--point", json.dumps(sizes), arm, f"--steps={steps}"], dict(os.environ), 600.0
    )


def draw(points: list[dict[str, Any]], idle: dict[str, int], grid: Mapping[str, Sequence[int]]) -> str:
    """Two charts a size, time and memory, one below the other, as a file of its own."""
    parts = []
    for row, key in enumerate(grid):
        for column, (label, read) in enumerate((
            ("milliseconds a step", lambda p, arm: p["arms"][arm]["step_ms"]),
            ("MiB above an idle process", lambda p, arm: (p["arms"][arm]["peak_memory_bytes"] - idle[arm]) / MIB),
        )):  # fmt: skip
            mine = [p for p in points if p["changed"] == key]
            lines = [
                Line(arm, tuple((p["sizes"][key], read(p, arm)) for p in mine if arm in p["arms"]), colour)
                for colour, arm in enumerate(SCALED_ARMS)
            ]
            chart = draw_lines(lines, key, label)
            place = f'<svg x="{column * WIDTH}" y="{24 + row * HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            parts.append(chart.replace("<svg ", place, 1))
    colours = "".join(f".c{i}{{stroke:{colour}}}" for i, colour in enumerate(COLOURS))
    legend = "".join(
        f'<text style="fill:{COLOURS[i]}" x="{60 + 140 * i}" y="16">{arm}</text>' for i, arm in enumerate(SCALED_ARMS)
    )
    size = f'viewBox="0 0 {2 * WIDTH} {24 + len(grid) * HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}{colours}</style>{legend}{"".join(parts)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--point", nargs=2, metavar=("SIZES", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(run_point(json.loads(options.point[0]), options.point[1], options.steps)))
        return
    load, machine = round(read_load(), 2), calibrate(BASE["threads"])
    idle = {arm: run_point_in_process(TINY, arm, 2)["peak_memory_bytes"] for arm in SCALED_ARMS}
    points: list[dict[str, Any]] = []
    done: dict[str, dict[str, Any]] = {}
    for number, (changed, sizes) in enumerate(list_points(GRID, BASE)):
        key = json.dumps(sizes)
        if key not in done:  # the middle of the grid is run once
            shift = number % len(SCALED_ARMS)
            order = SCALED_ARMS[shift:] + SCALED_ARMS[:shift]
            done[key] = {arm: run_point_in_process(sizes, arm, options.steps) for arm in order}
        points.append({"changed": changed, "sizes": sizes, "arms": done[key]})
        said = "  ".join(f"{arm} {found.get('step_ms', found.get('error'))}" for arm, found in done[key].items())
        print(f"{changed} {sizes[changed]}: {said}", flush=True)
    head = {
        "command": f"python benchmarks/scaling.py --steps {options.steps}", "date": date.today().isoformat(),
        "machine": name_machine(), "torch": torch.__version__, "load_before": load, **machine,
        "base": BASE, "idle_memory_bytes": idle,
    }  # fmt: skip
    write(ROOT / "benchmarks" / "results" / "scaling.json", head | {"points": points})
    for point in points:
        point["arms"] = {arm: found for arm, found in point["arms"].items() if "error" not in found}
    (ROOT / "docs" / "figures" / "scaling.svg").write_text(draw(points, idle, GRID), encoding="utf-8")


if __name__ == "__main__":
    main()
