"""Two results of the speed benchmark side by side: what has changed beyond the spread of both.

    python benchmarks/compare_results.py OLD.json NEW.json

ratio = median step of OLD / median step of NEW: above 1, NEW is faster. A change is marked where all rounds of one result lie
on one side of all rounds of the other, and by over 2 %. Between two machines, or two settings, differences mean little: it
says so where the heads differ.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LEAST = 0.02  # changes below are not marked, however steady the rounds are
HEAD = ("machine", "torch", "threads", "steps", "warmup", "kernels")


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each workload and arm that either has."""
    pairs = [(w, a) for result in (old, new) for w, rows in result["workloads"].items() for a in rows["arms"]]
    return [compare_arm(w, a, find(old, w, a), find(new, w, a)) for w, a in dict.fromkeys(pairs)]


def find(result: dict[str, Any], workload: str, arm: str) -> dict[str, Any] | None:
    row: dict[str, Any] | None = result["workloads"].get(workload, {}).get("arms", {}).get(arm)
    return row if row and row["step_ms"] else None


def compare_arm(workload: str, arm: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"workload": workload, "arm": arm}
    if old is None or new is None:
        return row | {"only_in": "new" if old is None else "old"} if old or new else row | {"only_in": "neither"}
    before, after = old["step_ms"], new["step_ms"]
    return row | {
        "ratio": statistics.median(before) / statistics.median(after),
        "ratio_range": (min(before) / max(after), max(before) / min(after)),
        "change": describe_change(before, after),
        "memory_ratio": new["peak_memory_bytes"] / old["peak_memory_bytes"],
        "verdicts": (old["verdict"], new["verdict"]),
    }


def describe_change(before: Sequence[float], after: Sequence[float]) -> str:
    """ "faster" or "slower" where the rounds do not overlap, else ""."""
    if min(before) > (1 + LEAST) * max(after):
        return "faster"
    return "slower" if min(after) > (1 + LEAST) * max(before) else ""


def list_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Where the two were not measured alike."""
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in HEAD if old.get(key) != new.get(key)]


def show(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("workload", "arm", box=None, title="Old step / new step: above 1, new is faster")
    for column in ("ratio", "(range)", "memory, new / old"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("change")
    table.add_column("verdict")
    for row in rows:
        if "only_in" in row:
            table.add_row(row["workload"], row["arm"], "-", "", "-", f"only in {row['only_in']}", "")
            continue
        colour = {"faster": "green", "slower": "red", "": "default"}[row["change"]]
        before, after = row["verdicts"]
        verdict = after if before == after else f"[red]{before} -> {after}[/red]"
        low, high = row["ratio_range"]
        table.add_row(row["workload"], row["arm"], f"{row['ratio']:.3f}", f"{low:.2f} to {high:.2f}",
                      f"{row['memory_ratio']:.3f}", f"[{colour}]{row['change']}[/]", verdict)  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (options.old, options.new))
    console = Console()
    for difference in list_differences(old, new):
        console.print(f"[yellow]measured differently: {difference}[/yellow]")
    console.print(show(compare(old, new)))


if __name__ == "__main__":
    main()
