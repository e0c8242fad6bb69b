"""Runs of the speed benchmark -> its result: ratios, floor, memory, verdicts.

A run is a dictionary: workload, arm, round, and what `speed_worker` has found, or an error; `turns` has for each turn the median
step and what the gauge said of the machine. Arms are paired by round, which is also the seed, and within it by turn. Nothing here
needs torch, a clock or a machine.

    ratio        step time of an arm over that of halfstep in the same turn, its median over the turns of a round: above 1,
                 halfstep is faster
    floor        operations of products and convolutions / highest rate of a product in bf16 in the same turn: no arm that
                 computes the same in bf16 can be faster; floor_share = floor / step, and sustained_share the same by the rate
                 that products one after another kept up
    verdict      two one-sided t-tests on the paired differences of the held-out loss to fp32, margin: see workloads.template
    cpu_ms       processor time of a step, over all threads; other work disturbs it less than the step's time
    disturbed    rounds in which in half of the turns a fixed product took over 15 % more than at its best
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from halfstep.comparison import judge_equivalence
from workloads.template import MARGIN_SHARE, has_fallen

REFERENCE, OURS, OURS_COMPILED = "fp32", "halfstep", "halfstep-compile"
DISTURBED = 1.15  # times the fastest spin
Run = dict[str, Any]


def summarize(runs: Sequence[Run], arms: Sequence[str]) -> dict[str, Any]:
    """The part of a result that follows from its runs, which may be incomplete."""
    names = list(dict.fromkeys(run["workload"] for run in runs))
    quiet = min((turn["spin_ms"] for run in runs for turn in run.get("turns", [])), default=0.0)
    workloads = {name: summarize_workload([r for r in runs if r["workload"] == name], arms, quiet) for name in names}
    result: dict[str, Any] = {"workloads": workloads}
    for key, ours in (("geomean", [OURS]), ("geomean_best", [OURS, OURS_COMPILED])):
        result[key], result[f"{key}_over"] = average_ratios(workloads, ours, arms)
    result["not_equivalent"] = {
        arm: {name: w["arms"][arm]["verdict"] for name, w in workloads.items()
              if arm in w["arms"] and w["arms"][arm]["verdict"] not in ("equivalent", "better", "reference")}
        for arm in arms
    }  # fmt: skip
    return result


def summarize_workload(runs: Sequence[Run], arms: Sequence[str], quiet: float) -> dict[str, Any]:
    done = {arm: {r["round"]: r for r in runs if r["arm"] == arm and "error" not in r} for arm in arms}
    reference = done.get(REFERENCE, {})
    flops = next((r["flops"] for r in reference.values() if "flops" in r), None)
    falls = [r["start_loss"] - r["loss"] for r in reference.values()]
    margin = MARGIN_SHARE * statistics.fmean(falls) if falls else math.nan
    rows = {}
    for arm in arms:
        errors = [r["error"] for r in runs if r["arm"] == arm and "error" in r]
        if done[arm] or errors:
            rows[arm] = summarize_arm(done[arm], flops, quiet) | ({"errors": errors} if errors else {})
            rows[arm] |= judge(arm, done[arm], reference, margin)
            rows[arm]["ratio"] = spread(pair_ratios(done[arm], done.get(OURS, {})))
    return {
        "flops": flops, "margin": margin, "start_loss": [r["start_loss"] for r in reference.values()], "arms": rows,
    }  # fmt: skip


def summarize_arm(done: dict[int, Run], flops: int | None, quiet: float) -> dict[str, Any]:
    """What an arm has shown by itself; lists are over rounds."""
    runs = list(done.values())
    turns = [turn for r in runs for turn in r["turns"]]
    row = {
        "rounds": list(done),
        "step_ms": [r["step_ms"] for r in runs],
        "cpu_ms": [r["cpu_ms"] for r in runs],
        "peak_memory_bytes": max((r["peak_memory_bytes"] for r in runs), default=None),
        "floor_share": share_floor(turns, flops, "bf16"),
        "sustained_share": share_floor(turns, flops, "bf16_sustained"),
        "setup_s": [r["setup_s"] for r in runs],
        "loss": [r["loss"] for r in runs],
        "disturbed": [
            n for n, r in done.items() if statistics.median(t["spin_ms"] for t in r["turns"]) > DISTURBED * quiet
        ],
    }
    plans = next((r["plans"] for r in runs if "plans" in r), None)
    return row | ({"plans": plans} if plans else {})


def share_floor(turns: Sequence[dict[str, float]], flops: int | None, rate: str) -> float | None:
    """The floor by a rate of the gauge over the step, its median over turns; None where one of them is unknown."""
    shares = [flops / (1e6 * turn[rate]) / turn["step_ms"] for turn in turns if rate in turn] if flops else []
    return round(statistics.median(shares), 4) if shares else None


def judge(arm: str, done: dict[int, Run], reference: dict[int, Run], margin: float) -> dict[str, Any]:
    """Verdict, mean difference and interval of an arm's held-out losses beside those of fp32 in the same rounds."""
    shared = [n for n in done if n in reference]
    none = {"verdict": "no reference", "difference": None, "interval": None}
    if not shared or not all(has_fallen(reference[n]["start_loss"], [reference[n]["loss"]]) for n in reference):
        return none
    if arm == REFERENCE:
        return {"verdict": "reference", "difference": 0.0, "interval": [0.0, 0.0]}
    found = judge_equivalence([done[n]["loss"] - reference[n]["loss"] for n in shared], margin, higher_is_better=False)
    word = found.word
    if any(done[n]["loss"] > (reference[n]["start_loss"] + reference[n]["loss"]) / 2 for n in shared):
        word = "not trained"  # less than half of the way of fp32
    return {"verdict": word, "difference": found.difference, "interval": list(found.interval)}


def pair_ratios(rival: dict[int, Run], ours: dict[int, Run]) -> list[float]:
    """For each round that both have, the median over its turns of the rival's step over ours."""
    return [
        statistics.median(a["step_ms"] / b["step_ms"] for a, b in zip(rival[n]["turns"], ours[n]["turns"], strict=True))
        for n in rival
        if n in ours
    ]


def average_ratios(
    workloads: dict[str, Any], ours: Sequence[str], rivals: Sequence[str]
) -> tuple[dict[str, float], dict[str, int]]:
    """Rival -> geometric mean over workloads of its ratio over the best of ours, and over how many workloads."""
    means, counts = {}, {}
    for rival in rivals:
        ratios = []
        for workload in workloads.values():
            measured = {arm: row["ratio"]["median"] for arm, row in workload["arms"].items() if row["ratio"]}
            best = [measured[arm] for arm in ours if arm in measured]
            if best and rival in measured:
                ratios.append(measured[rival] / min(best))
        if ratios and rival not in ours:
            means[rival], counts[rival] = round(average_geometrically(ratios), 4), len(ratios)
    return means, counts


def average_geometrically(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {name: round(f(values), 4) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def show(result: dict[str, Any]) -> Table:
    """A row for each workload and arm."""
    table = Table(title="Step times; ratio: arm / halfstep, above 1 halfstep is faster", box=None)
    for column in ("workload", "arm"):
        table.add_column(column, no_wrap=True, min_width=len(OURS_COMPILED))
    for column in ("step ms", "ratio", "(min to max)", "floor", "sustained", "MiB", "set-up s", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")  # the only one that gives way to the others, as a failure's words may be long
    for name, workload in result["workloads"].items():
        for number, (arm, row) in enumerate(workload["arms"].items()):
            table.add_row(name if number == 0 else "", arm, *show_row(row))
    return table


def show_means(result: dict[str, Any]) -> Table:
    """A row for each rival: geometric means of its ratios."""
    table = Table("rival", title="Geometric mean of rival / ours over workloads", box=None)
    for column in ("halfstep", "best of halfstep, compiled or not", "workloads"):
        table.add_column(column, justify="right")
    for rival in [arm for arm in result["arms"] if arm in result["geomean"] or arm in result["geomean_best"]]:
        pair = [f"{result[key][rival]:.3f}" if rival in result[key] else "-" for key in ("geomean", "geomean_best")]
        table.add_row(rival, *pair, str(result["geomean_over"].get(rival, result["geomean_best_over"].get(rival))))
    return table


def show_row(row: dict[str, Any]) -> list[str]:
    if not row["step_ms"]:
        return ["-", "-", "", "-", "-", "-", "-", "-", f"[red]failed: {row['errors'][0][:60]}[/red]"]
    ratio = row["ratio"]
    shares = [row.get(key) for key in ("floor_share", "sustained_share")]
    colours = {"equivalent": "green", "better": "green", "reference": "default", "inconclusive": "yellow"}
    notes = f", {len(row['disturbed'])} disturbed" if row["disturbed"] else ""
    return [
        f"{statistics.median(row['step_ms']):.1f}",
        f"{ratio['median']:.2f}" if ratio else "-",
        f"{ratio['min']:.2f} to {ratio['max']:.2f}" if ratio else "",
        *(f"{100 * share:.0f} %" if share else "-" for share in shares),
        f"{row['peak_memory_bytes'] / 2**20:.0f}",
        f"{row['setup_s'][0]:.1f}",
        f"{row['difference']:+.4f}" if row["difference"] is not None else "-",
        f"[{colours.get(row['verdict'], 'red')}]{row['verdict']}[/]{notes}",
    ]
