"""Records as tables for the terminal."""

import math
from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from halfstep.comparison import REPAIRED
from halfstep.machine.hardware import BUSY
from halfstep.records import ArmResult, ComparisonRecord, HardwareProfile, Measurement, PlanRecord, group_layers

_COLOURS = {
    "native": "green", "emulated": "yellow", "slower": "red", "unsupported": "dim",
    "equivalent": "green", "reference": "default", "better": "green", "worse": "red", "inconclusive": "yellow",
    "not trained": "red", "no reference": "red", "not tested": "yellow", "failed": "red",
}  # fmt: skip


def _table(*columns: str, title: str = "") -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
    )  # fmt: skip
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.lstrip(">"),
            justify="right" if right else "left",
            no_wrap=column not in ("why", "module", "compute"),
            overflow="fold",
        )
    return table


def _word(word: str) -> Text:
    return Text(word, style=_COLOURS.get(word, "default"))


def show_profile(profile: HardwareProfile) -> RenderableType:
    """The machine, a verdict for each format, and the times behind it."""
    head = Text(f"{profile.machine}; {profile.unit}; torch {profile.torch_version}, {profile.threads} threads")
    busy = f"The machine was busy (load {profile.load:.1f} a core): probe again when it is quiet."
    verdicts = _table("format", "verdict", ">speed, fp32 = 1", ">at best", "why", title="Formats")
    for c in profile.capabilities:
        ratio, best = (f"{r:.2f}" if r else "-" for r in (c.ratio, c.ratio_best))
        verdicts.add_row(c.format, _word(c.status), ratio, best, c.why)
    parts: list[RenderableType] = [head, *([Text(busy, style="red")] if profile.load > BUSY else []), verdicts]
    for operation, shape in (
        ("matmul", "m x k x n"),
        ("conv2d", "batch x in x out x h x w x kernel x stride x groups"),
    ):
        title = f"{operation}, {shape}: GFLOP/s over forward and both backward products"
        table = show_rates([m for m in profile.measurements if m.operation == operation], title)
        parts += [table] if table.row_count else []
    memory = [m for m in profile.measurements if m.operation in ("copy", "cast")]
    if memory:
        names = {"copy": "copy in fp32", "cast": "cast fp32 -> bf16"}
        said = [f"{names[m.operation]} of {m.shape[0]:,} numbers {m.rate:.0f} GB/s" for m in memory]
        parts.append(Text(f"Memory: {'; '.join(said)}"))
    for m in profile.measurements:
        if m.operation == "dispatch":
            parts.append(Text(f"Dispatch: {1000 * m.milliseconds:.1f} microseconds an operation, however small"))
    return Group(*parts)


def show_rates(measured: Iterable[Measurement], title: str) -> Table:
    """Shapes down, formats across: the rate over all products of a shape."""
    totals: dict[tuple[int, ...], dict[str, tuple[float, float]]] = {}
    for m in measured:
        work, ms = totals.setdefault(m.shape, {}).get(m.format, (0.0, 0.0))
        totals[m.shape][m.format] = (work + m.rate * m.milliseconds, ms + m.milliseconds)
    formats = list(dict.fromkeys(f for row in totals.values() for f in row))
    table = _table("shape", *(f">{f}" for f in formats), title=title)
    for shape, row in totals.items():
        table.add_row(
            "x".join(map(str, shape)), *(f"{row[f][0] / row[f][1]:.4g}" if f in row else "-" for f in formats)
        )
    return table


def show_plan(plan: PlanRecord) -> RenderableType:
    """What a plan came to, layer by layer, then the reasons; layers that got the same for the same reason share a row."""
    table = _table("module", "kind", "compute", "weights", ">parameters", title="Plan")
    reasons: dict[str, str] = {}
    for row in group_layers(plan.layers):
        table.add_row(row.path, row.kind, row.describe_compute(), row.describe_storage(), f"{row.parameters:,}")
        if row.why and row.why != plan.why:
            reasons.setdefault(row.why, row.path)
    return Group(
        table,
        *(Text(f"{path}: {why}") for why, path in reasons.items()),
        *([Text(f"the model: {plan.why}")] if plan.why else []),
        *(Text(f"operations in {said}") for said in plan.operations),
        *(Text(f"fast functions: {said}") for said in plan.functions),
        *(Text(f"updates of {said}") for said in plan.updates),
        *(Text(f"native is compiled by {command}") for command in plan.kernels),
    )


def show_comparison(comparison: ComparisonRecord) -> RenderableType:
    """One row an arm, what halfstep gained over each, what the gate said of its control, and a sentence to quote."""
    c = comparison
    direction = "higher" if c.higher_is_better else "lower"
    seeds = "1 seed" if c.seeds == 1 else f"{c.seeds} seeds"
    title = f"{c.recipe_name}: {seeds}, {c.steps} steps; ms a step, MB at peak, training time to target"
    table = _table("arm", f">{c.metric}", "verdict", ">ms", ">MB", ">skips", ">target", title=title)
    against = _table("arm", f">{c.metric} minus fp32's", ">90 % interval", title="Difference to fp32")
    gains = _table("halfstep against", ">speed", ">memory", title="Gain")
    for arm in c.arms:
        cells = describe_arm(arm)
        row = (cells["metric"], _word(arm.verdict), cells["ms"], cells["peak"], cells["skips"], cells["target"])
        table.add_row(arm.name, *row, style="bold" if arm.name == "halfstep" else None)
        if arm.verdict != "reference":
            against.add_row(arm.name, cells["difference"], cells["interval"])
    for rival, ratio in c.speedup.items():
        gains.add_row(rival, f"{ratio:.2f} x", f"{c.memory_ratio[rival]:.2f} x")
    target = f"{c.metric}: {direction} is better; equal within {c.margin:g} {c.unit}; target {c.target:.4g}"
    works = "works" if c.gate_works else "FAILED: verdicts mean nothing"
    gate = f"control, trained so that it must be rejected: {c.control}; the gate {works}"
    plans = [Text(f"{a.name} chose: {a.plan.why}") for a in c.arms if a.plan and a.plan.why]
    failures = [Text(f"{a.name} failed: {a.failure}", style="red") for a in c.arms if a.failure]
    return Group(
        table,
        against,
        *(show_harms(a) for a in c.arms if a.harms),
        *([gains] if c.speedup and not any(a.harms for a in c.arms) else []),
        *plans,
        *failures,
        Text(target),
        Text(gate),
        Text(conclude(c), style="bold"),
    )


def show_harms(arm: ArmResult, count: int = 10) -> Table:
    """The layers of a rehearsal that change the gradient most."""
    worst = rank_harms(arm)[:count]
    title = f"{arm.name}: what a layer's formats do to the model's gradient, the worst {len(worst)} of {len(arm.harms)}"
    table = _table("module", "format", ">SQNR in dB", ">error, batches = 1", title=title)
    for cells in worst:
        table.add_row(*cells)
    return table


def rank_harms(arm: ArmResult) -> list[tuple[str, str, str, str]]:
    """The layers of a rehearsal in words, the worst first: module, format, SQNR in dB, error over that between batches."""
    worst = sorted(arm.harms, key=lambda harm: harm.error if math.isfinite(harm.error) else math.inf, reverse=True)
    return [(h.path, h.compute, f"{h.sqnr_db:.1f}", f"{h.error / h.noise:.2g}") for h in worst]


def describe_arm(arm: ArmResult) -> dict[str, str]:
    """An arm's numbers in words."""
    low, high = arm.interval
    numbers = {
        "metric": f"{arm.metric_mean:.3f} ± {arm.metric_sd:.3f}",
        "difference": f"{arm.difference:+.4f}",
        "interval": f"{low:+.4f} .. {high:+.4f}" if arm.verdict != "not tested" else "-",
        "ms": f"{arm.step_ms:.4g}" if math.isfinite(arm.step_ms) else "-",
        "speed": f"{arm.speedup.get('fp32', 1.0):.2f}",
        "peak": f"{arm.peak_memory_bytes / 2**20:.0f}",
        "skips": str(arm.skipped_steps),
        "target": f"{arm.seconds_to_target:.4g} s" if arm.seconds_to_target is not None else "never",
    }
    return (
        numbers | dict.fromkeys(("metric", "difference", "interval", "speed", "peak"), "-") if arm.failure else numbers
    )


def conclude(c: ComparisonRecord) -> str:
    """One sentence that a reader may quote, gain or no gain.

    A speed within 3 % counts as the same: medians on a shared machine repeat no better.
    """
    ours = next((a for a in c.arms if a.name == "halfstep"), None)
    if ours is None or not c.gate_works:
        distrust = "The control was not rejected: no verdict here can be trusted. Train longer or use more seeds."
        return "" if c.gate_works else distrust
    if ours.harms:
        return conclude_rehearsal(c, ours)
    if ours.failure:
        return "halfstep did not train to the end."
    gains = [f"{_times(ratio)} {rival}" for rival, ratio in ours.speedup.items()]
    memory = [f"{_size(ratio)} {rival}" for rival, ratio in ours.memory_ratio.items()]
    held = {"equivalent": "at equal accuracy", "better": "at better accuracy"}.get(
        ours.verdict, f"but accuracy is {ours.verdict}"
    )
    lead = "" if max(ours.speedup.values(), default=1.0) > 1.03 else "No gain here: "
    return f"{lead}halfstep is {', '.join(gains)}, {held}; it takes {', '.join(memory)}."


def conclude_rehearsal(c: ComparisonRecord, ours: ArmResult) -> str:
    """The same of a rehearsal, of which no time counts."""
    if ours.verdict in ("equivalent", "better"):
        return f"The model survives these numerics: {c.metric} is {ours.verdict} to fp32's."
    repaired = next((a for a in c.arms if a.name == REPAIRED), None)
    found = "training fails" if ours.failure else f"{c.metric} is {ours.verdict}"
    if repaired is not None:
        what = c.metric if ours.failure else "it"
        return f"In these numerics {found}; with the worst layers kept wider {what} is {repaired.verdict}."
    cause = "their layers change the gradient by little beside what batches do"
    advice = "use more seeds or steps" if ours.verdict == "inconclusive" else "look at the losses over steps"
    return f"In these numerics {found}, though {cause}; {advice}."


def _times(ratio: float) -> str:
    if ratio > 1.03:
        return f"{ratio:.2f} times as fast as"
    return "as fast as" if ratio > 0.97 else f"slower ({ratio:.2f} times the speed) than"


def _size(ratio: float) -> str:
    percent = round(100 * (ratio - 1))
    if percent == 0:
        return "the memory of"
    return f"{abs(percent)} % {'less' if percent < 0 else 'more'} memory than"
