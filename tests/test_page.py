"""The page of a comparison, as a browser shows it."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfstep.records import ArmResult, ComparisonRecord, HarmRecord, LayerRecord, PlanRecord, Point
from halfstep.report.page import write_page

pytestmark = pytest.mark.browser

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
NAMES = ("fp32", "torch-amp", "torch-amp-tuned", "halfstep", "halfstep:bf16-true")
LINE_CHARTS = 3


def make_comparison() -> ComparisonRecord:
    def make_arm(number: int, name: str) -> ArmResult:
        layers = tuple(
            LayerRecord(path=f"blocks.{i}.attention.project", kind="linear", compute="bf16", storage="bf16",
                        master="split", parameters=65_536 * (i + 1), why=f"output {1.3 + i} times as fast as fp32")
            for i in range(3)
        )  # fmt: skip
        return ArmResult(
            name=name, verdict="reference" if name == "fp32" else "equivalent", metric_mean=2.5 + 0.01 * number,
            metric_sd=0.02, metrics=(2.48, 2.52), difference=0.01 * number, interval=(-0.02, 0.03), step_ms=100 - 10 * number,
            step_ms_spread=(80, 120), peak_memory_bytes=(400 + 10 * number) * 2**20, skipped_steps=0,
            seconds_to_target=9.5, speedup={other: 1.2 for other in NAMES if other != name},
            memory_ratio={other: 0.9 for other in NAMES if other != name},
            loss=tuple(
                Point(step=i, seconds=0.1 * i * (1 - 0.1 * number), value=2 + 3.5 * math.exp(-i / 20) + 0.05 * number)
                for i in range(1, 101)
            ),
            evaluations=tuple(
                Point(step=20 * i, seconds=2.0 * i * (1 - 0.1 * number), value=4.5 / i + 0.05 * number) for i in range(1, 6)
            ),
            plan=PlanRecord(step=0, plan="", layers=layers, why="measured") if name.startswith("halfstep") else None,
        )  # fmt: skip

    arms = tuple(make_arm(number, name) for number, name in enumerate(NAMES))
    return ComparisonRecord(
        recipe_name="text-generation", recipe='task = "text-generation"\n' + "# a long line " * 30, metric="bits per byte",
        unit="bit", higher_is_better=False, margin=0.03, target=2.53, seeds=3, steps=100,
        machine="Some Processor with a Long Name 9999 @ 3.00GHz", torch_version="2.9", threads=2, date="2026-01-01",
        seconds=300, arms=arms, command="halfstep compare text-generation --data /home/someone/experiments/corpora/gutenberg",
        control="not trained, +3.53 bit", gate_works=True, speedup=arms[3].speedup, memory_ratio=arms[3].memory_ratio,
    )  # fmt: skip


def make_rehearsal() -> ComparisonRecord:
    comparison = make_comparison()
    harms = tuple(
        HarmRecord(path=f"blocks.{i}.attention.project", compute="fp8_e4m3", error=error, noise=0.5)
        for i, error in enumerate((0.001, math.nan, 0.25, *[1e-5] * 40))
    )
    arms = tuple(replace(arm, harms=harms) if arm.name == "halfstep" else arm for arm in comparison.arms)
    return replace(comparison, arms=arms)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "compare.html"
    write_page(make_comparison(), path)
    return path


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that has the page open."""
    missing = next((str(path) for path in (CHROMIUM, DRIVER) if not path.exists()), None)
    try:
        from selenium import webdriver
    except ImportError:
        missing = "selenium"
    if missing is not None:
        if os.environ.get("HALFSTEP_REQUIRE_BROWSER"):
            pytest.fail(f"HALFSTEP_REQUIRE_BROWSER is set and {missing} is missing")
        pytest.skip(f"{missing} is missing")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        driver.set_page_load_timeout(60)
        driver.get(page.as_uri())
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def at_desk(browser: Any) -> Any:
    """The browser with a window of 1280 x 900, whatever a test did before."""
    set_size(browser, 1280, 900)
    return browser


@pytest.fixture
def at_rehearsal(at_desk: Any, page: Path) -> Iterator[Any]:
    """The browser with the page of a rehearsal, which stands beside the other."""
    rehearsal = page.with_name("rehearsal.html")
    write_page(make_rehearsal(), rehearsal)
    at_desk.get(rehearsal.as_uri())
    yield at_desk
    at_desk.get(page.as_uri())


def set_size(browser: Any, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def set_theme(browser: Any, theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def read_colour(browser: Any, selector: str, style: str) -> str:
    said: str = browser.execute_script(
        "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, style
    )
    return said


def measure_boxes(browser: Any, selector: str) -> list[tuple[float, float]]:
    script = """return [...document.querySelectorAll(arguments[0])].map(e => {
        const b = e.getBoundingClientRect(); return [b.width, b.height] })"""
    return [(width, height) for width, height in browser.execute_script(script, selector)]


def luminance(colour: str) -> float:
    red, green, blue = (int(number) for number in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_curve_has_a_visible_extent(at_desk: Any) -> None:
    boxes = measure_boxes(at_desk, "path.line")
    assert len(boxes) == LINE_CHARTS * len(NAMES)
    assert all(width > 20 and height > 20 for width, height in boxes), boxes


def test_the_curves_of_a_chart_have_distinct_visible_colours(at_desk: Any) -> None:
    script = """return [...document.querySelectorAll('figure')].map(f => [...f.querySelectorAll('path.line')].map(
        p => [getComputedStyle(p).stroke, getComputedStyle(p).fill]))"""
    charts = [chart for chart in at_desk.execute_script(script) if chart]
    assert len(charts) == LINE_CHARTS
    back = read_colour(at_desk, "figure", "backgroundColor")
    for chart in charts:
        strokes = [stroke for stroke, _ in chart]
        assert len(set(strokes)) == len(NAMES)
        assert not {"none", back} & set(strokes)
        assert {fill for _, fill in chart} == {"none"}


def test_bars_have_width_and_the_longest_belongs_to_the_slowest(at_desk: Any) -> None:
    boxes = measure_boxes(at_desk, "rect.bar")
    assert len(boxes) == 2 * len(NAMES)
    assert all(width > 20 and height > 5 for width, height in boxes)
    times = [width for width, _ in boxes[: len(NAMES)]]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1] * 1.5


def test_bars_have_the_colours_of_the_curves(at_desk: Any) -> None:
    script = "return [...document.querySelectorAll(arguments[0])].map(e => getComputedStyle(e)[arguments[1]])"
    bars = at_desk.execute_script(script, "rect.bar", "fill")
    lines = at_desk.execute_script(script, "path.line", "stroke")
    assert bars[: len(NAMES)] == lines[: len(NAMES)]


def test_no_text_of_a_chart_is_cut_off(at_desk: Any) -> None:
    script = """return [...document.querySelectorAll('svg text')].filter(t => {
        const b = t.getBoundingClientRect(), s = t.ownerSVGElement.getBoundingClientRect();
        return b.left < s.left - 1 || b.right > s.right + 1 || b.top < s.top - 1 || b.bottom > s.bottom + 1;
    }).map(t => t.textContent)"""
    assert at_desk.execute_script(script) == []


def test_the_table_has_a_row_for_each_arm(at_desk: Any) -> None:
    script = "return [...document.querySelectorAll('#arms tbody tr')].map(r => r.cells[0].innerText.trim())"
    assert at_desk.execute_script(script) == list(NAMES)


def test_the_plans_layers_are_listed(at_desk: Any) -> None:
    text = at_desk.execute_script("return document.querySelector('details[open]').innerText")
    assert "blocks.0.attention.project" in text
    assert "bf16 + split" in text


def test_a_rehearsal_lists_the_harm_of_every_layer_the_worst_first(at_rehearsal: Any) -> None:
    script = (
        "return [...document.querySelectorAll('.harms tbody tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
    )
    rows = at_rehearsal.execute_script(script)
    assert len(rows) == 43
    assert rows[:3] == [
        ["blocks.1.attention.project", "fp8_e4m3", "nan", "nan"],
        ["blocks.2.attention.project", "fp8_e4m3", "6.0", "0.5"],
        ["blocks.0.attention.project", "fp8_e4m3", "30.0", "0.002"],
    ]
    assert all(width > 20 and height > 10 for width, height in measure_boxes(at_rehearsal, ".harms td"))


def test_the_harms_of_a_rehearsal_stand_in_columns_and_never_scroll_the_document(at_rehearsal: Any) -> None:
    script = """return [...document.querySelectorAll('.harms tr')].map(r => [...r.cells].map(
        c => Math.round(c.getBoundingClientRect().right)))"""
    assert len({tuple(row) for row in at_rehearsal.execute_script(script)}) == 1
    assert read_colour(at_rehearsal, ".harms td.number", "textAlign") == "right"
    set_size(at_rehearsal, 360, 800)
    wide, seen = at_rehearsal.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= seen


def test_a_comparison_that_is_no_rehearsal_has_no_harms(at_desk: Any) -> None:
    assert measure_boxes(at_desk, ".harms") == []


def test_no_request_leaves_the_file(browser: Any, page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    outside = re.findall(r"""(?<!xmlns=["'])https?://\S+""", source)
    assert outside == []
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\(", source)
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_browser_finds_nothing_to_complain_about(browser: Any) -> None:
    assert [entry["message"] for entry in browser.get_log("browser")] == []


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_document_never_scrolls_sideways(browser: Any, width: int) -> None:
    set_size(browser, width, 800)
    wide, seen = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width - 20 <= seen <= width  # a desktop's scroll bar takes some
    assert wide <= seen


def test_curves_stay_visible_on_a_phone(browser: Any) -> None:
    set_size(browser, 360, 800)
    boxes = measure_boxes(browser, "path.line")
    assert len(boxes) == LINE_CHARTS * len(NAMES)
    assert all(width > 20 and height > 20 for width, height in boxes)


def test_dark_mode_swaps_back_and_ink(at_desk: Any) -> None:
    seen = {}
    for theme in ("light", "dark"):
        set_theme(at_desk, theme)
        seen[theme] = (
            luminance(read_colour(at_desk, "body", "backgroundColor")),
            luminance(read_colour(at_desk, "body", "color")),
        )
    set_theme(at_desk, "light")
    assert seen["light"][0] > 200 > 100 > seen["light"][1]
    assert seen["dark"][0] < 100 < 200 < seen["dark"][1]


def test_dark_mode_lightens_the_curves(at_desk: Any) -> None:
    strokes = []
    for theme in ("light", "dark"):
        set_theme(at_desk, theme)
        strokes.append([luminance(read_colour(at_desk, f".line.c{i}", "stroke")) for i in range(len(NAMES))])
    set_theme(at_desk, "light")
    assert all(dark > light for light, dark in zip(*strokes, strict=True))
