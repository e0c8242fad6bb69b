"""Reports: charts, terminal tables, the sentence to quote, progress, TensorBoard."""

import dataclasses
import io
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from halfstep.errors import MissingExtraError, TrainingError
from halfstep.records import (
    ArmResult,
    Capability,
    ComparisonRecord,
    EndRecord,
    EvaluationRecord,
    HardwareProfile,
    HarmRecord,
    LayerRecord,
    Measurement,
    PlanRecord,
    Point,
    Record,
    StepOutcome,
    StepRecord,
    group_layers,
)
from halfstep.report.charts import Line, choose_ticks, draw_bars, draw_lines
from halfstep.report.page import render_page
from halfstep.report.progress import follow_comparison, follow_run
from halfstep.report.tensorboard import TensorBoard
from halfstep.report.terminal import conclude, show_comparison, show_plan, show_profile
from halfstep.training import Metric

SVG = "{http://www.w3.org/2000/svg}"
ARMS = ("fp32", "fp32-tuned", "torch-amp", "torch-amp-tuned", "halfstep", "halfstep:bf16-true")
VERDICTS = ("reference", "equivalent", "worse", "inconclusive", "better", "not trained")


def make_arm(name: str, verdict: str = "equivalent", *, speedup: float = 1.5) -> ArmResult:
    return ArmResult(
        name=name, verdict=verdict, metric_mean=92.1234, metric_sd=0.1234, metrics=(92.0, 92.25), difference=-0.0123,
        interval=(-0.2345, 0.2101), step_ms=1234.5, step_ms_spread=(1200.0, 1300.0), peak_memory_bytes=1234 * 2**20,
        skipped_steps=12, seconds_to_target=None if verdict == "not trained" else 1234.5,
        speedup={"fp32": speedup, "torch-amp": speedup - 0.2}, memory_ratio={"fp32": 0.8, "torch-amp": 1.0},
        loss=tuple(Point(step=i, seconds=i / 2, value=3 / i) for i in range(1, 20)),
        evaluations=(Point(step=10, seconds=5, value=80), Point(step=19, seconds=9, value=92.1)),
    )  # fmt: skip


def make_comparison(arms: Sequence[ArmResult], *, gate_works: bool = True, recipe: str = "") -> ComparisonRecord:
    ours = next((arm for arm in arms if arm.name == "halfstep"), None)
    return ComparisonRecord(
        recipe_name="image-classification", recipe=recipe, metric="accuracy", unit="%", higher_is_better=True, margin=0.5,
        target=91.5, seeds=3, steps=100, machine="a machine", torch_version="2.9", threads=2, date="2026-01-01",
        seconds=60, command="halfstep compare", arms=tuple(arms), control="not trained, -80 %", gate_works=gate_works,
        speedup=ours.speedup if ours else {}, memory_ratio=ours.memory_ratio if ours else {},
    )  # fmt: skip


def render(renderable: RenderableType, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def read_path(path: ElementTree.Element) -> list[tuple[float, float]]:
    numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", path.attrib["d"])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


class TestTicks:
    @given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6))
    def test_are_even_round_and_inside(self, low: float, span: float) -> None:
        high = low + span
        ticks = choose_ticks(low, high)
        assert 1 <= len(ticks) <= 6
        slack = 1e-6 * (high - low)
        assert all(low - slack <= tick <= high + slack for tick in ticks)
        steps = {f"{b - a:.1e}" for a, b in itertools.pairwise(ticks)}
        assert len(steps) <= 1
        assert all(step[0] in "125" for step in steps)

    @pytest.mark.parametrize("value", [-5.0, 0.0, 3.0, 1e9])
    def test_of_one_value_are_that_value(self, value: float) -> None:
        assert choose_ticks(value, value) == [value]

    @pytest.mark.parametrize("span", [1e-9, 1e-12])
    def test_of_a_tiny_range_are_distinct(self, span: float) -> None:
        ticks = choose_ticks(0, span)
        assert len(set(ticks)) == len(ticks) >= 3


class TestLines:
    def test_every_line_is_a_path_with_its_name(self) -> None:
        svg = parse(draw_lines([Line("a", ((0, 1), (1, 2)), 0), Line("b", ((0, 2), (1, 1)), 3)], "steps", "loss"))
        paths = svg.findall(f"{SVG}path")
        assert [path.attrib["class"] for path in paths] == ["line c0", "line c3"]
        assert [path.findtext(f"{SVG}title") for path in paths] == ["a", "b"]

    def test_points_lie_inside_and_in_order(self) -> None:
        points = tuple((float(x), math.sin(x)) for x in range(50))
        svg = parse(draw_lines([Line("a", points, 0)], "steps", "loss"))
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        places = read_path(svg.findall(f"{SVG}path")[0])
        assert len(places) == 50
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
        assert [x for x, _ in places] == sorted(x for x, _ in places)

    def test_a_larger_value_is_drawn_higher(self) -> None:
        svg = parse(draw_lines([Line("a", ((0, 1), (1, 2)), 0)], "steps", "loss"))
        (_, low), (_, high) = read_path(svg.findall(f"{SVG}path")[0])
        assert high < low

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_points_that_are_not_finite_are_left_out(self, bad: float) -> None:
        with_bad = draw_lines([Line("a", ((0, 1), (1, bad), (bad, 2), (2, 3)), 0)], "steps", "loss")
        assert with_bad == draw_lines([Line("a", ((0, 1), (2, 3)), 0)], "steps", "loss")

    def test_a_line_without_any_finite_point_draws_no_broken_path(self) -> None:
        svg = parse(draw_lines([Line("a", ((0, 1), (1, 2)), 0), Line("b", ((0, math.nan),), 1)], "steps", "loss"))
        assert all(len(read_path(path)) >= 1 for path in svg.findall(f"{SVG}path"))

    def test_nothing_finite_draws_nothing(self) -> None:
        assert draw_lines([Line("a", ((0, math.nan),), 0)], "steps", "loss") == ""
        assert draw_lines([], "steps", "loss") == ""

    def test_axes_carry_ticks_and_labels(self) -> None:
        svg = parse(draw_lines([Line("a", ((0, 0), (100, 10)), 0)], "steps", "loss"))
        texts = [text.text for text in svg.findall(f"{SVG}text")]
        assert {"0", "20", "40", "60", "80", "100", "2", "4", "6", "8", "10", "steps", "loss"} <= set(texts)
        assert len(svg.findall(f"{SVG}line")) == 6

    def test_names_are_escaped(self) -> None:
        svg = draw_lines([Line("<b>&", ((0, 0), (1, 1)), 0)], '"x" <i>', "</svg>")
        tree = parse(svg)
        assert tree.findall(f"{SVG}path")[0].findtext(f"{SVG}title") == "<b>&"
        assert '"x" <i>' in [text.text for text in tree.findall(f"{SVG}text")]


class TestBars:
    def test_length_follows_the_value(self) -> None:
        svg = parse(draw_bars([("a", 10, "10 ms", 0), ("b", 5, "5 ms", 1), ("c", 0, "0 ms", 2)]))
        lengths = [float(rect.attrib["width"]) for rect in svg.findall(f"{SVG}rect")]
        assert lengths[0] > 100
        assert lengths[1] == pytest.approx(lengths[0] / 2)
        assert lengths[2] == 0
        assert [rect.attrib["class"] for rect in svg.findall(f"{SVG}rect")] == ["bar c0", "bar c1", "bar c2"]

    def test_every_bar_has_its_name_and_number(self) -> None:
        svg = parse(draw_bars([("<a>", 1, "1 & 2", 0)]))
        assert [text.text for text in svg.findall(f"{SVG}text")] == ["<a>", "1 & 2"]

    def test_bars_lie_inside_the_picture(self) -> None:
        svg = parse(draw_bars([(str(i), i, "", i) for i in range(8)]))
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        for rect in svg.findall(f"{SVG}rect"):
            assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width
            assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height

    def test_all_zero_and_none_draw_without_an_error(self) -> None:
        assert draw_bars([("a", 0, "", 0)]).startswith("<svg")
        assert draw_bars([]).startswith("<svg")


class TestPageText:
    def test_the_recipe_cannot_end_its_element(self) -> None:
        page = render_page(make_comparison([make_arm("fp32", "reference")], recipe="</pre><script>alert(1)</script>"))
        assert "<script" not in page
        assert "&lt;script&gt;" in page

    def test_a_diverged_arm_is_shown(self) -> None:
        nan = Point(step=1, seconds=1, value=math.nan)
        arm = replace(make_arm("halfstep", "not trained"), loss=(nan,), evaluations=(nan,), metric_mean=math.nan)
        page = render_page(make_comparison([make_arm("fp32", "reference"), arm]))
        assert "not trained" in page
        assert 'd="M"' not in page

    def test_the_failed_gate_is_said_before_the_table(self) -> None:
        page = render_page(make_comparison([make_arm("fp32", "reference")], gate_works=False))
        assert 0 < page.index('class="warning"') < page.index("<table")


class TestTables:
    def require_fit(self, text: str) -> None:
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
        assert "…" not in text

    def test_a_comparison_fits_80_columns_with_all_arms_and_verdicts_in_full(self) -> None:
        text = render(show_comparison(make_comparison([make_arm(n, v) for n, v in zip(ARMS, VERDICTS, strict=True)])))
        self.require_fit(text)
        rows = [line.split() for line in text.splitlines()]
        for name, verdict in zip(ARMS, VERDICTS, strict=True):
            assert any(row[:1] == [name] and verdict in " ".join(row) for row in rows), (name, verdict)
        assert "1234" in text
        assert "-0.2345 .. +0.2101" in text
        assert "never" in text

    def test_a_comparison_of_bits_per_byte_fits_80_columns(self) -> None:
        c = replace(
            make_comparison([make_arm(n, v) for n, v in zip(ARMS, VERDICTS, strict=True)]), metric="bits per byte"
        )
        self.require_fit(render(show_comparison(c)))

    def test_a_comparison_says_what_its_control_came_to(self) -> None:
        arms = [make_arm("fp32", "reference")]
        assert "the gate works" in " ".join(render(show_comparison(make_comparison(arms))).split())
        failed = " ".join(render(show_comparison(make_comparison(arms, gate_works=False))).split())
        assert "FAILED" in failed
        assert "not trained, -80 %" in failed

    def test_the_arms_own_ratio_to_each_rival_is_shown(self) -> None:
        text = render(show_comparison(make_comparison([make_arm("fp32", "reference"), make_arm("halfstep")])))
        assert re.search(r"torch-amp +1\.30 x +1\.00 x", text)

    def test_a_plan_fits_80_columns_with_every_reason_in_whole_words(self) -> None:
        why = "output 1.62, grad_input 1.31 and grad_weight 1.20 times as fast as fp32, casts included"
        layers = tuple(
            LayerRecord(path=f"blocks.{i}.attention_norm", kind=kind, compute="bf16", storage=storage, master=master,
                        parameters=1_048_576, why=f"{why} ({i})")
            for i, (kind, storage, master) in enumerate(
                [("linear", "bf16", "split"), ("embedding", "fp32", "none"), ("attention", "bf16", "fp32")]
            )
        )  # fmt: skip
        text = render(show_plan(PlanRecord(step=0, plan="", layers=layers, why="the sentence about the whole")))
        self.require_fit(text)
        words = set(text.split())
        assert {"grad_input", "grad_weight", "included", "embedding", "bf16", "1,048,576", "(2)"} <= words
        assert "blocks.0.attention_norm" in words
        assert "the sentence about the whole" in text

    def test_a_plan_says_who_casts_operations(self) -> None:
        said = "fp16 by OperatorMode: sums overflow in torch's list"
        plan = PlanRecord(step=0, plan="", layers=(), operations=(said,))
        assert f"operations in {said}" in render(show_plan(plan), width=200)
        arms = [make_arm("fp32", "reference"), replace(make_arm("halfstep"), plan=plan)]
        assert "Operations in fp16 by OperatorMode: sums overflow" in render_page(make_comparison(arms))

    def test_a_plan_says_what_compiled_its_kernels(self) -> None:
        plan = PlanRecord(step=0, plan="", layers=(), updates=("AdamW: native",), kernels=("cc -O3",))
        assert "native is compiled by cc -O3" in render(show_plan(plan))
        page = render_page(make_comparison([make_arm("fp32", "reference"), replace(make_arm("halfstep"), plan=plan)]))
        assert "Native is compiled by <code>cc -O3</code>" in page

    def test_a_profile_fits_80_columns_with_every_format_and_verdict(self) -> None:
        statuses: list[Literal["native", "emulated", "slower", "unsupported"]]
        statuses = ["native", "emulated", "slower", "unsupported"]
        profile = HardwareProfile(
            device="cpu", machine="Some Processor with a Long Name 9999 @ 3.00GHz", unit="AVX-512", torch_version="2.9",
            threads=2, date="2026-01-01",
            capabilities=tuple(
                Capability(format=f, status=s, ratio=1.2345, ratio_best=None, why="timed at shapes that models have " * 2)
                for f, s in zip(("bf16", "fp8_e4m3", "fp16", "int8"), statuses, strict=True)
            ),
            measurements=tuple(
                Measurement(operation=operation, product=product, format=f, shape=shape, milliseconds=1.0, rate=1234.5)
                for operation, shape in (("matmul", (4096, 1024, 4096)), ("conv2d", (64, 256, 256, 16, 16, 3, 1, 1)))
                for product in ("output", "grad_input", "grad_weight")
                for f in ("fp32", "bf16")
            ),
        )  # fmt: skip
        text = render(show_profile(profile))
        self.require_fit(text)
        words = set(text.split())
        assert {"bf16", "fp8_e4m3", "fp16", "int8", *statuses, "1.23", "4096x1024x4096"} <= words

    def test_layers_of_equal_settings_share_a_row(self) -> None:
        def layer(path: str, kind: str, why: str) -> LayerRecord:
            return LayerRecord(
                path=path, kind=kind, compute="bf16", storage="fp32", master="none", parameters=5, why=why
            )

        merged = group_layers(
            [
                layer("a", "linear", "fast"),
                layer("b", "linear", "fast"),
                layer("", "norm", ""),
                layer("c", "linear", "no"),
            ]
        )
        assert [(m.path, m.parameters) for m in merged] == [("a and 1 more", 10), ("(model)", 5), ("c", 5)]


class TestConclusion:
    def conclude_for(self, verdict: str, speedup: float, *, gate_works: bool = True) -> str:
        arms = [make_arm("fp32", "reference"), make_arm("halfstep", verdict, speedup=speedup)]
        return conclude(make_comparison(arms, gate_works=gate_works))

    @pytest.mark.parametrize("speedup", [0.5, 0.9, 1.0, 1.03])
    def test_says_no_gain_when_no_rival_is_slower(self, speedup: float) -> None:
        assert self.conclude_for("equivalent", speedup).startswith("No gain here: ")

    def test_says_how_much_slower(self) -> None:
        assert "slower (0.50 times the speed) than fp32" in self.conclude_for("equivalent", 0.5)

    def test_names_the_gain_over_each_rival_and_the_memory(self) -> None:
        said = self.conclude_for("equivalent", 1.5)
        assert said.startswith("halfstep is 1.50 times as fast as fp32, 1.30 times as fast as torch-amp")
        assert "at equal accuracy" in said
        assert "20 % less memory than fp32" in said

    @pytest.mark.parametrize("verdict", ["worse", "inconclusive", "not trained"])
    def test_a_gain_without_equal_accuracy_is_qualified(self, verdict: str) -> None:
        said = self.conclude_for(verdict, 1.5)
        assert f"but accuracy is {verdict}" in said
        assert "equal" not in said

    def test_a_failed_control_takes_all_trust_away(self) -> None:
        said = self.conclude_for("equivalent", 1.5, gate_works=False)
        assert "no verdict here can be trusted" in said
        assert "times as fast" not in said

    def test_is_silent_without_an_arm_of_halfstep(self) -> None:
        assert conclude(make_comparison([make_arm("fp32", "reference")])) == ""


def make_step(step: int, status: str = "applied", loss: float = 2.0) -> StepRecord:
    skipped = status == "skipped"
    outcome = StepOutcome(
        status="skipped" if skipped else "applied", step=step, scale_before=8.0, scale_after=4.0 if skipped else 8.0,
        cause="the loss is nan" if skipped else "",
    )  # fmt: skip
    return StepRecord(step=step, loss=loss, milliseconds=5.0, samples=16, learning_rate=0.1 / step, outcome=outcome)


RUN: tuple[Record, ...] = (
    PlanRecord(step=0, plan="", layers=(), why="chosen by hand"),
    make_step(1),
    make_step(2, "skipped", loss=math.nan),
    make_step(3, loss=1.5),
    EvaluationRecord(step=3, metric="bits per byte", value=2.5, train_seconds=0.015),
    EndRecord(step=3, reason="finished", peak_memory_bytes=1, skipped_steps=1),
)
BITS = Metric(name="bits per byte", unit="bit", higher_is_better=False, margin=0.03)


class TestProgress:
    def test_a_run_is_followed_to_its_end(self, tmp_path: Path) -> None:
        console = Console(width=80, record=True, file=io.StringIO())
        end = follow_run(iter(RUN), 3, BITS, console, None)
        assert end is RUN[-1]
        said = console.export_text()
        assert "step 3: bits per byte 2.5000 bit" in said
        assert "step 2 skipped: the loss is nan" in said
        assert "chosen by hand" in said

    def test_recovery_and_stalls_are_told(self) -> None:
        console = Console(width=200, record=True, file=io.StringIO())
        news = make_step(1)
        news = dataclasses.replace(
            news, outcome=dataclasses.replace(news.outcome, recovery="roll-back: why", stalls=("group 0 stalls",))
        )
        follow_run(iter((news, RUN[-1])), 3, BITS, console, None)
        said = console.export_text()
        assert "step 1: roll-back: why" in said
        assert "step 1: group 0 stalls" in said

    def test_the_bar_tells_loss_scale_and_skips(self) -> None:
        console = Console(width=200, file=io.StringIO(), force_terminal=True)
        follow_run(iter(RUN[:2] + RUN[3:]), 3, BITS, console, None)
        assert isinstance(console.file, io.StringIO)
        drawn = console.file.getvalue()
        assert "loss 1.7500" in drawn
        assert "3,200 samples/s" in drawn
        assert "scale 8" in drawn

    def test_what_matters_is_seen_at_80_columns(self) -> None:
        console = Console(width=80, file=io.StringIO(), force_terminal=True)
        run = [make_step(n, "skipped" if n < 14 else "applied") for n in range(1, 15)]
        long = replace(run[-1], outcome=replace(run[-1].outcome, scale_after=2.0**16), samples=10**6, step=99_999)
        follow_run(iter([*run, long, RUN[-1]]), 100_000, BITS, console, None)
        assert isinstance(console.file, io.StringIO)
        assert "loss 2.0000, 13 skipped, scale 65536" in console.file.getvalue()
        assert "99999/100000" in console.file.getvalue()

    def test_many_skips_are_one_line_and_a_summary(self) -> None:
        run = [make_step(n, "skipped" if n % 2 else "applied") for n in range(1, 40)]
        for parts in ([*run, RUN[-2], RUN[-1]], [*run, RUN[-1]]):
            console = Console(width=120, record=True, file=io.StringIO())
            follow_run(iter(parts), 40, BITS, console, None)
            told = [line for line in console.export_text().splitlines() if "skipped" in line and "loss 2" not in line]
            assert told == [
                "step 1 skipped: the loss is nan", "19 more steps skipped, the last is step 39: the loss is nan",
            ]  # fmt: skip

    def test_skips_of_a_run_that_fails_are_summed_up(self) -> None:
        def fail() -> Iterator[Record]:
            yield from (make_step(1, "skipped"), make_step(2, "skipped"))
            raise TrainingError("stopped")

        console = Console(width=120, record=True, file=io.StringIO())
        with pytest.raises(TrainingError):
            follow_run(fail(), 3, BITS, console, None)
        assert "1 more step skipped, the last is step 2: the loss is nan" in console.export_text()

    def test_steps_that_took_no_time_by_a_clock_that_was_set_back_are_shown(self) -> None:
        console = Console(width=200, file=io.StringIO(), force_terminal=True)
        follow_run(iter([replace(make_step(1), milliseconds=0.0), RUN[-1]]), 3, BITS, console, None)
        assert isinstance(console.file, io.StringIO)
        assert "0 samples/s" in console.file.getvalue()

    def test_steps_of_a_comparison_are_counted_and_named(self) -> None:
        console = Console(width=120, file=io.StringIO(), force_terminal=True)
        with follow_comparison(2, console) as notify:
            notify(0, "halfstep", make_step(1))
            notify(0, "halfstep", RUN[4])
            notify(1, "torch-amp", make_step(1, loss=1.25))
        assert isinstance(console.file, io.StringIO)
        drawn = console.file.getvalue()
        assert "seed 1, torch-amp: loss 1.250, 5 ms" in drawn
        assert "2/2" in drawn


class TestTensorBoard:
    def test_events_are_readable_and_hold_every_step(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with TensorBoard(tmp_path) as board:
            for record in RUN:
                board.write(record)
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert set(read) == {
            "train/loss", "train/learning_rate", "train/step_ms", "train/loss_scale", "train/skipped",
            "held_out/bits_per_byte",
        }  # fmt: skip
        assert read["held_out/bits_per_byte"] == [(3, 2.5)]
        assert read["train/skipped"] == [(1, 0.0), (2, 1.0), (3, 0.0)]
        assert read["train/loss_scale"] == [(1, 8.0), (2, 4.0), (3, 8.0)]
        assert [step for step, _ in read["train/loss"]] == [1, 2, 3]
        assert read["train/loss"][2][1] == 1.5

    def test_without_tensorboard_the_extra_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(MissingExtraError, match=r"\.\[tensorboard\]"):
            TensorBoard(tmp_path)


HARMS = tuple(HarmRecord(path=f"blocks.{i}.up", compute="fp8_e4m3", error=10.0**-i, noise=0.5) for i in range(1, 14))


class TestRehearsal:
    def test_shows_the_worst_layers_first_and_no_times(self) -> None:
        arms = [make_arm("fp32", "reference"), replace(make_arm("halfstep", "worse"), harms=HARMS[::-1])]
        shown = render(show_comparison(make_comparison(arms)))
        assert "the worst 10 of 13" in shown
        assert shown.index("blocks.1.up") < shown.index("blocks.2.up")
        assert "blocks.11.up" not in shown
        assert re.search(r"blocks.1.up +fp8_e4m3 +10.0 +0.2", shown)
        assert "halfstep against" not in shown

    @pytest.mark.parametrize(
        ("verdicts", "sentence"),
        [
            (("equivalent",), "The model survives these numerics: accuracy is equivalent to fp32's."),
            (("worse", "equivalent"), "accuracy is worse; with the worst layers kept wider it is equivalent."),
            (("inconclusive",), "use more seeds or steps"),
        ],
    )
    def test_says_whether_the_model_survives(self, verdicts: tuple[str, ...], sentence: str) -> None:
        arms = [
            replace(make_arm(name, verdict), harms=HARMS)
            for name, verdict in zip(("halfstep", "repaired"), verdicts, strict=False)
        ]
        shown = render(show_comparison(make_comparison([make_arm("fp32", "reference"), *arms])), width=200)
        assert sentence in shown
        assert "times as fast" not in shown

    def test_plans_name_the_gradients_and_saved_formats(self) -> None:
        layer = LayerRecord(path="fc", kind="linear", compute="fp8_e4m3", storage="fp32", master="none", parameters=4,
                            grad="fp8_e5m2", saved="int8")  # fmt: skip
        shown = render(show_plan(PlanRecord(step=0, plan="", layers=(layer,))))
        assert "fp8_e4m3, gradient fp8_e5m2, saves int8" in shown

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({}, "int8"),
            ({"grad": "int8", "grad_input": "int8", "grad_weight": "int8"}, "int8"),
            ({"grad_weight": "bf16", "scaling": "row"}, "int8, grad_weight bf16, scales by row"),
            (
                {"grad": "bf16", "grad_input": "int8", "scaling": "delayed"},
                "int8, gradient bf16, grad_input int8, delayed scales",
            ),
        ],
    )
    def test_products_of_their_own_are_shown_where_they_say_something(
        self, settings: dict[str, str], words: str
    ) -> None:
        layer = LayerRecord(path="a.b.fc", kind="linear", compute="int8", storage="fp32", master="none", parameters=4, why="so",
                            **settings)  # fmt: skip
        assert layer.describe_compute() == words
        plan = PlanRecord(step=0, plan="", layers=(layer,))
        assert words in render(show_plan(plan), width=200)
        narrow = render(show_plan(plan))
        assert set(words.split()) | {"a.b.fc"} <= set(narrow.split())
        assert max(map(len, narrow.splitlines())) <= 80
        arms = [make_arm("fp32", "reference"), replace(make_arm("halfstep"), plan=plan)]
        assert f"<td>{words}</td>" in render_page(make_comparison(arms))
