"""A comparison as one HTML file: no network, no script needed, light and dark, readable on a phone."""

from importlib import resources
from pathlib import Path

import jinja2

from halfstep.errors import RecordError
from halfstep.records import ArmResult, ComparisonRecord, group_layers
from halfstep.report.charts import Line, draw_bars, draw_lines
from halfstep.report.terminal import conclude, describe_arm, rank_harms

MEGABYTE = 2**20


def render_page(comparison: ComparisonRecord) -> str:
    """The page's HTML."""
    c, colours = comparison, {arm.name: i for i, arm in enumerate(comparison.arms)}

    def lines(curve: str, axis: str) -> list[Line]:
        return [
            Line(a.name, tuple((getattr(p, axis), p.value) for p in getattr(a, curve)), colours[a.name]) for a in c.arms
        ]

    charts = [
        ("Loss over steps", draw_lines(lines("loss", "step"), "steps", "training loss")),
        ("Loss over time", draw_lines(lines("loss", "seconds"), "seconds of training", "training loss")),
        (
            f"Held-out {c.metric} over time",
            draw_lines(lines("evaluations", "seconds"), "seconds of training", c.metric),
        ),
        (
            "Time per step",
            draw_bars([(a.name, a.step_ms, f"{a.step_ms:.1f} ms", colours[a.name]) for a in c.arms if a.step_ms > 0]),
        ),
    ]
    memory = [
        (a.name, a.peak_memory_bytes, f"{a.peak_memory_bytes / MEGABYTE:.0f} MB", colours[a.name])
        for a in c.arms
        if a.peak_memory_bytes
    ]
    charts.append(("Peak memory of the process", draw_bars(memory)))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        resources.files("halfstep.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.render(
        c=c, charts=charts, colours=colours, conclusion=conclude(c), rows=[_row(a) for a in c.arms],
        harms=[(a, rank_harms(a)) for a in c.arms if a.harms],
        plans=[(a, group_layers(a.plan.layers)) for a in c.arms if a.plan],
    )  # fmt: skip


def _row(arm: ArmResult) -> list[str]:
    cells = describe_arm(arm)
    difference = "" if arm.verdict == "reference" else f"{cells['difference']} ({cells['interval']})"
    order = ("ms", "speed", "peak", "skips", "target")
    return [arm.name, cells["metric"], difference, arm.verdict, *(cells[name] for name in order)]


def write_page(comparison: ComparisonRecord, path: Path) -> None:
    """Write the page. Raises RecordError when the place cannot be written."""
    try:
        path.write_text(render_page(comparison), encoding="utf-8")
    except OSError as error:
        raise RecordError(f"page {path} cannot be written ({error.strerror}); give another --page") from None
