"""Comparison: the equivalence test, the arms, and whole comparisons through worker processes."""

import io
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from halfstep import comparison, records
from halfstep.arms import CONTROL, CONTROL_LR, TURN_OVER, PlainLoop, build_arm, is_arm, require_arms, work
from halfstep.comparison import (
    REPAIRED,
    _mean_harms,
    compare,
    compare_repaired,
    has_trained,
    judge_equivalence,
    run_seed,
    summarise,
)
from halfstep.errors import PlanError, RecipeError, TrainingError
from halfstep.plan import Plan
from halfstep.records import (
    ArmResult,
    ComparisonRecord,
    EndRecord,
    EvaluationRecord,
    HarmRecord,
    Record,
    StepOutcome,
    StepRecord,
)
from halfstep.rehearsals import find_rehearsal
from halfstep.report.page import render_page
from halfstep.report.terminal import show_comparison
from halfstep.stepper import Stepper
from halfstep.tasks.recipe import Recipe, load_recipe
from halfstep.training import Metric, TrainSettings, build_optimizer, build_schedule
from helpers import TINY_RECIPE

ALL_ARMS = ("fp32", "fp32-tuned", "torch-amp", "torch-amp-tuned", "halfstep", "halfstep:bf16-true", CONTROL)
E2E_ARMS = ("fp32", "halfstep", "halfstep:bf16-true")


def write_text(folder: Path) -> Path:
    """A folder of small text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(24):
        (folder / f"chapter{i}.txt").write_text("the quick brown fox jumps over the lazy dog " * (8 + i % 5))
    return folder


def write_recipe(folder: Path, **changes: object) -> Recipe:
    path = folder / "tiny.toml"
    path.write_text(TINY_RECIPE.format(data=str(write_text(folder / "text"))))
    return load_recipe(str(path), [f"{key}={value}" for key, value in changes.items()])


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers take turns; threads that wait beside each other only get in the way."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def make_step(step: int, loss: float) -> StepRecord:
    outcome = StepOutcome(status="applied", step=step, scale_before=1.0, scale_after=1.0)
    return StepRecord(step=step, loss=loss, milliseconds=1.0, samples=1, learning_rate=0.1, outcome=outcome)


@dataclass
class ConvTask:
    """Two-channel noise into three classes."""

    settings: TrainSettings
    metric: Metric = field(default_factory=lambda: Metric(name="accuracy", unit="%", higher_is_better=True, margin=0.5))

    def build_model(self) -> nn.Module:
        torch.manual_seed(self.settings.seed)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3))

    def make_batch(self, step: int) -> tuple[Tensor, Tensor]:
        noise = torch.Generator().manual_seed(step)
        count = self.settings.batch_size
        return torch.randn(count, 2, 6, 6, generator=noise), torch.randint(3, (count,), generator=noise)

    def measure_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> float:
        x, y = self.make_batch(0)
        return 100 * float((model(x).argmax(1) == y).float().mean())


def expect_word(differences: list[float], margin: float, *, higher_is_better: bool) -> tuple[str, float]:
    """The verdict from scipy's p-values, and how near the nearest of them is to 5 %."""

    def p_value(bound: float, alternative: str) -> float:
        return float(stats.ttest_1samp(differences, bound, alternative=alternative).pvalue)

    inside = p_value(-margin, "greater"), p_value(margin, "less")
    above, below = p_value(margin, "greater"), p_value(-margin, "less")
    nearness = min(abs(p - 0.05) for p in (*inside, above, below))
    if max(inside) < 0.05:
        return "equivalent", nearness
    if above < 0.05:
        return ("better" if higher_is_better else "worse"), nearness
    if below < 0.05:
        return ("worse" if higher_is_better else "better"), nearness
    return "inconclusive", nearness


class TestJudgeEquivalence:
    @given(
        noise=st.lists(st.integers(-100, 100), min_size=2, max_size=8),
        shift=st.floats(-2, 2),
        spread=st.sampled_from([0.001, 0.01, 0.1]),
        margin=st.floats(0.05, 1),
        higher_is_better=st.booleans(),
    )
    @example(noise=[-1, 0, 1], shift=0.0, spread=0.01, margin=0.5, higher_is_better=True)
    @example(noise=[-1, 0, 1], shift=1.0, spread=0.01, margin=0.5, higher_is_better=True)
    @example(noise=[-1, 0, 1], shift=-1.0, spread=0.01, margin=0.5, higher_is_better=True)
    @example(noise=[-1, 0, 1], shift=-1.0, spread=0.01, margin=0.5, higher_is_better=False)
    @example(noise=[-90, 0, 90], shift=0.4, spread=0.01, margin=0.5, higher_is_better=False)
    def test_agrees_with_scipys_one_sided_tests(
        self, noise: list[int], shift: float, spread: float, margin: float, higher_is_better: bool
    ) -> None:
        assume(statistics.pstdev(noise) > 0.1)
        differences = [shift + spread * n for n in noise]
        word, nearness = expect_word(differences, margin, higher_is_better=higher_is_better)
        assume(nearness > 1e-6)
        assert judge_equivalence(differences, margin, higher_is_better=higher_is_better).word == word

    @pytest.mark.parametrize(
        ("differences", "higher_is_better", "word"),
        [
            ([0.01, -0.01, 0.02], True, "equivalent"),
            ([0.01, -0.01, 0.02], False, "equivalent"),
            ([0.9, 1.0, 1.1], True, "better"),
            ([0.9, 1.0, 1.1], False, "worse"),
            ([-0.9, -1.0, -1.1], True, "worse"),
            ([-0.9, -1.0, -1.1], False, "better"),
            ([-0.9, 0.1, 1.1], True, "inconclusive"),
            ([0.4, 0.5, 0.6], True, "inconclusive"),
            ([0.1], True, "not tested"),
            ([0.0, 0.0, 0.0], True, "equivalent"),
            ([2.0, 2.0], True, "better"),
        ],
    )
    def test_gives_each_of_its_words(self, differences: list[float], higher_is_better: bool, word: str) -> None:
        assert judge_equivalence(differences, 0.5, higher_is_better=higher_is_better).word == word

    def test_the_interval_is_the_90_percent_confidence_interval_of_the_mean(self) -> None:
        differences = [0.3, -0.1, 0.25, 0.6]
        verdict = judge_equivalence(differences, 0.5, higher_is_better=True)
        expected = stats.ttest_1samp(differences, 0).confidence_interval(0.9)
        assert verdict.difference == pytest.approx(statistics.fmean(differences))
        assert verdict.interval == pytest.approx((expected.low, expected.high))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_metric_that_is_not_finite_is_never_equivalent(self, bad: float) -> None:
        verdict = judge_equivalence([bad, 0.1, 0.0], 0.5, higher_is_better=False)
        assert verdict.word in ("worse", "inconclusive")


class TestHasTrained:
    @pytest.mark.parametrize(
        ("losses", "trained"),
        [
            ([2.0 * 0.9**i for i in range(30)], True),
            ([2.0] * 30, False),
            ([2.0 - 0.0005 * i for i in range(30)], False),  # 0.7 % lower
            ([1.0 + 0.1 * i for i in range(30)], False),
            ([2.0] * 27 + [1.9, 1.0, 2.4], False),  # lower on average, and within its noise
            ([2.0] * 20 + [math.nan] * 10, False),
            ([-1.0 - 0.1 * i for i in range(30)], True),  # a loss may be negative
        ],
    )
    def test_asks_for_a_drop_beyond_one_percent_and_the_noise(self, losses: list[float], trained: bool) -> None:
        assert has_trained([make_step(i, loss) for i, loss in enumerate(losses, start=1)]) is trained

    @pytest.mark.parametrize("place", [0, 15, 29])
    @pytest.mark.parametrize("loss", [math.inf, math.nan, 1e9])
    def test_a_step_that_was_skipped_does_not_count(self, place: int, loss: float) -> None:
        steps = [make_step(i, 2.0 * 0.9**i) for i in range(30)]
        skipped = replace(steps[place].outcome, status="skipped", cause="the loss is inf")
        steps[place] = replace(steps[place], loss=loss, outcome=skipped)
        assert has_trained(steps)
        assert not has_trained([replace(step, outcome=skipped) for step in steps])


FAKE_WORKER = """
import sys
arm, step = sys.argv[sys.argv.index("--arm") + 1], 0
print(TURN_OVER, flush=True)
for line in sys.stdin:
    if line.split()[0] == "end":
        break
    while step < int(line.split()[1]):
        step += 1
        if arm == DIES and step > 5:
            sys.exit("error: training stopped at applied step 5")
        print(RECORDS[step])
    print(TURN_OVER, flush=True)
    if arm == DIES and WAITING:
        sys.exit("error: training stopped at applied step 5")
print(RECORDS[0])
"""  # imports nothing, so that it starts at once


def write_fake_worker(dies: str, *, waiting: bool = False) -> str:
    """Ten steps, evaluated after five and ten; that of one arm dies after five."""
    steps: dict[int, list[Record]] = {step: [make_step(step, 2.0 * 0.9**step)] for step in range(1, 11)}
    for step in (5, 10):
        steps[step].append(EvaluationRecord(step=step, metric="accuracy", value=step, train_seconds=1.0))
    steps[0] = [EndRecord(step=10, reason="finished", peak_memory_bytes=7, skipped_steps=0)]
    lines = {step: "\n".join(map(records.encode, found)) for step, found in steps.items()}
    return f"DIES, WAITING, TURN_OVER, RECORDS = {dies!r}, {waiting}, {TURN_OVER!r}, {lines!r}\n{FAKE_WORKER}"


class TestAnArmThatDies:
    METRIC = Metric(name="accuracy", unit="%", higher_is_better=True, margin=0.5)
    ARMS = ("fp32", "halfstep", "halfstep:16-true", CONTROL)

    def run(self, dies: str, *, waiting: bool = False) -> dict[str, ArmResult]:
        """waiting: it dies while it is not its turn, as one does that the system kills."""
        command = [sys.executable, "-c", write_fake_worker(dies, waiting=waiting)]
        settings = TrainSettings(steps=10, evaluations=2)
        by_arm: dict[str, list[Any]] = {arm: [] for arm in self.ARMS}
        for seed in range(2):
            for worker in run_seed(command, self.ARMS, seed, settings, lambda *_: None):
                by_arm[worker.arm].append(worker)
        return {arm: summarise(arm, by_arm, self.METRIC, 5.0) for arm in self.ARMS if arm != CONTROL}

    def test_is_told_and_the_others_keep_what_they_have(self) -> None:
        found = self.run("halfstep:16-true")
        dead, ours = found["halfstep:16-true"], found["halfstep"]
        assert (dead.verdict, ours.verdict, found["fp32"].verdict) == ("failed", "equivalent", "reference")
        assert dead.failure.count("stopped: training stopped at applied step 5") == 2 and math.isnan(dead.metric_mean)
        assert len(dead.loss) == 5 and dead.speedup == {} and dead.evaluations == ()
        assert set(ours.speedup) == {"fp32"} and not ours.failure

    def test_may_die_while_it_waits(self) -> None:
        found = self.run("halfstep", waiting=True)
        assert found["halfstep"].verdict == "failed" and found["halfstep:16-true"].verdict == "equivalent"

    def test_shows_nothing_of_the_gate_where_it_is_the_control(self, monkeypatch: pytest.MonkeyPatch) -> None:
        start, command = comparison._start, [sys.executable, "-c", write_fake_worker(CONTROL, waiting=True)]
        monkeypatch.setattr(comparison, "_start", lambda _, *rest: start(command, *rest))
        settings = TrainSettings(steps=10, evaluations=2)
        found = compare("", "fake", self.METRIC, settings, arms=("fp32", "halfstep"), seeds=2)
        assert not found.gate_works and "stopped: training stopped" in found.control

    def test_ends_all_where_it_is_the_reference(self) -> None:
        with pytest.raises(TrainingError, match="arm 'fp32', seed 0, stopped: training stopped"):
            self.run("fp32")

    def test_is_shown_and_stored(self) -> None:
        arms = tuple(self.run("halfstep").values())
        comparison = ComparisonRecord(
            recipe_name="r", recipe="", metric="accuracy", unit="%", higher_is_better=True, margin=0.5, target=5.0, seeds=2,
            steps=10, machine="m", torch_version="2", threads=1, date="today", seconds=1.0, command="c", arms=arms,
            control="worse", gate_works=True,
        )  # fmt: skip
        with (console := Console(width=200, markup=False)).capture() as shown:
            console.print(show_comparison(comparison))
        assert "halfstep failed: arm 'halfstep', seed 0, stopped: training stopped" in shown.get()
        assert "halfstep did not train to the end." in shown.get() and "nan" not in shown.get()
        page = render_page(comparison)
        assert "halfstep failed: arm" in page and "nan" not in page.split("<table")[1].split("</table")[0]
        stored = records.decode(records.encode(comparison))
        assert isinstance(stored, ComparisonRecord) and stored.arms[1].failure == arms[1].failure


def test_harm_of_layers_is_averaged_over_the_seeds_that_measured_them() -> None:
    """A policy may have put a layer into fp32 in one of them."""
    harms = [[HarmRecord(path=p, compute="fp16", error=e, noise=1.0) for p, e in pairs]
             for pairs in ([("a", 0.1), ("b", 0.2)], [("b", 0.4)])]  # fmt: skip
    workers: list[Any] = [SimpleNamespace(harms=h) for h in harms]
    assert {h.path: h.error for h in _mean_harms(workers)} == pytest.approx({"a": 0.1, "b": 0.3})


def train_by_hand(task: ConvTask, settings: TrainSettings, dtype: torch.dtype | None) -> tuple[nn.Module, list[float]]:
    """Slow reference: the training loop as a user would write it."""
    model = task.build_model()
    optimizer = build_optimizer(model, settings, fused=False)
    scheduler = build_schedule(optimizer, settings)
    losses = []
    for step in range(1, settings.steps + 1):
        with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
            loss = task.measure_loss(model, task.make_batch(step))
        losses.append(loss.item())
        (loss / settings.accumulate).backward()
        if step % settings.accumulate:
            continue
        if settings.clip:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, losses


def make_loop(task: ConvTask, settings: TrainSettings, dtype: torch.dtype | None) -> tuple[PlainLoop, LRScheduler]:
    model = task.build_model()
    optimizer = build_optimizer(model, settings, fused=False)
    scheduler = build_schedule(optimizer, settings)
    return PlainLoop(model, optimizer, scheduler, settings, dtype), scheduler


class TestPlainLoop:
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    @pytest.mark.parametrize(
        "settings",
        [
            TrainSettings(steps=6, lr=0.05, schedule="cosine", warmup=2),
            TrainSettings(steps=6, lr=0.05, optimizer="sgd", clip=0.1),
            TrainSettings(steps=6, lr=0.05, accumulate=2, schedule="linear", weight_decay=0.1),
        ],
        ids=["schedule", "clip", "accumulate"],
    )
    def test_equals_a_loop_written_by_hand_bit_for_bit(
        self, settings: TrainSettings, dtype: torch.dtype | None
    ) -> None:
        task = ConvTask(settings)
        expected, expected_losses = train_by_hand(task, settings, dtype)
        loop, _ = make_loop(task, settings, dtype)
        losses, statuses = [], []
        for step in range(1, settings.steps + 1):
            with loop.autocast():
                loss = task.measure_loss(loop.model, task.make_batch(step))
            losses.append(loss.item())
            statuses.append(loop.step(loss).status)
        assert losses == expected_losses
        assert statuses == (["accumulated"] * (settings.accumulate - 1) + ["applied"]) * (6 // settings.accumulate)
        for mine, theirs in zip(loop.model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(mine, theirs)

    def test_fp16_skips_an_overflow_and_moves_neither_weights_nor_schedule(self) -> None:
        settings = TrainSettings(steps=6, lr=0.05, schedule="linear")
        task = ConvTask(settings)
        loop, scheduler = make_loop(task, settings, torch.float16)
        before = [p.detach().clone() for p in loop.model.parameters()]
        x, y = task.make_batch(1)
        with loop.autocast():
            loss = task.measure_loss(loop.model, (x * math.inf, y))
        outcome = loop.step(loss)
        assert outcome.status == "skipped"
        assert outcome.scale_after < outcome.scale_before
        assert (loop.skipped, loop.applied, scheduler.last_epoch) == (1, 0, 0)
        assert all(torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))
        with loop.autocast():
            loss = task.measure_loss(loop.model, (x, y))
        assert loop.step(loss).status == "applied"
        assert (loop.skipped, loop.applied, scheduler.last_epoch) == (1, 1, 1)
        assert any(not torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))


def find_optimizer(arm: object) -> Optimizer:
    assert isinstance(arm, PlainLoop | Stepper)
    return arm.optimizer


class TestBuildArm:
    SETTINGS = TrainSettings(steps=10, lr=0.01, weight_decay=0.1)

    @pytest.mark.parametrize(
        ("name", "tuned"),
        [
            ("fp32", False), ("fp32-tuned", True), ("torch-amp", False), ("torch-amp-tuned", True), ("halfstep", True),
            ("halfstep:bf16-true", True), (CONTROL, False),
        ],
    )  # fmt: skip
    def test_tuned_arms_have_a_fused_optimizer_and_channels_last(self, name: str, tuned: bool) -> None:
        arm = build_arm(name, ConvTask(self.SETTINGS), self.SETTINGS, "bf16-mixed")
        weight = next(p for p in arm.model.parameters() if p.ndim == 4)
        assert weight.is_contiguous(memory_format=torch.channels_last) is tuned
        assert all(group["fused"] is (True if tuned else None) for group in find_optimizer(arm).param_groups)

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("fp32", None), ("fp32-tuned", None), ("torch-amp", torch.bfloat16), ("torch-amp-tuned", torch.bfloat16),
        ],
    )  # fmt: skip
    def test_rivals_compute_in_what_their_name_says(self, name: str, dtype: torch.dtype | None) -> None:
        arm = build_arm(name, ConvTask(self.SETTINGS), self.SETTINGS, "16-mixed")
        assert isinstance(arm, PlainLoop)
        assert arm.dtype is dtype
        with arm.autocast():
            assert torch.is_autocast_enabled("cpu") is (dtype is not None)
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is (dtype or torch.float32)

    @pytest.mark.parametrize(
        ("name", "plan"),
        [("halfstep", "16-mixed"), ("halfstep:bf16-true", "bf16-true"), ("halfstep:32-true", "32-true"),
         (CONTROL, "bf16-true")],
    )  # fmt: skip
    def test_halfstep_runs_under_the_plan_that_the_arm_names(self, name: str, plan: str) -> None:
        arm = build_arm(name, ConvTask(self.SETTINGS), self.SETTINGS, "16-mixed")
        assert isinstance(arm, Stepper)
        assert arm.plan.name == plan

    @pytest.mark.parametrize("name", ALL_ARMS)
    def test_every_arm_has_the_recipes_learning_rate_but_the_control(self, name: str) -> None:
        groups = find_optimizer(build_arm(name, ConvTask(self.SETTINGS), self.SETTINGS, "bf16-mixed")).param_groups
        assert all(group["lr"] == 0.01 * (CONTROL_LR if name == CONTROL else 1) for group in groups)
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]

    def test_every_arm_starts_from_the_same_weights(self) -> None:
        expected = ConvTask(self.SETTINGS).build_model().state_dict()
        for name in ALL_ARMS:
            model = build_arm(name, ConvTask(self.SETTINGS), self.SETTINGS, "bf16-mixed").model
            narrow = name in ("halfstep:bf16-true", CONTROL)  # these have no fp32 truth
            for key, weight in model.state_dict().items():
                wanted = expected[key].to(torch.bfloat16).float() if narrow else expected[key]
                assert torch.equal(weight.float(), wanted), (name, key)

    @pytest.mark.parametrize("name", ["fp32", "halfstep:bf16-mixed"])
    def test_clipping_and_accumulation_reach_the_arm(self, name: str) -> None:
        settings = replace(self.SETTINGS, accumulate=2, clip=1e-6, optimizer="sgd", momentum=0.0, weight_decay=0.0)
        task = ConvTask(settings)
        arm = build_arm(name, task, settings, "bf16-mixed")
        before = [p.detach().clone() for p in arm.model.parameters()]
        statuses = []
        for step in (1, 2):
            with arm.autocast():
                loss = task.measure_loss(arm.model, task.make_batch(step))
            statuses.append(arm.step(loss).status)
        assert statuses == ["accumulated", "applied"]
        moved = [(a - b.detach()).double().norm().item() for a, b in zip(before, arm.model.parameters(), strict=True)]
        assert 0 < math.hypot(*moved) < 1e-6 * settings.lr * 5

    def test_bf16_mixed_trains_as_torch_autocast_does(self) -> None:
        task = ConvTask(self.SETTINGS)
        losses: dict[str, list[float]] = {}
        for name in ("torch-amp-tuned", "halfstep:bf16-mixed"):
            arm = build_arm(name, task, self.SETTINGS, "auto")
            losses[name] = []
            for step in range(1, 11):
                with arm.autocast():
                    loss = task.measure_loss(arm.model, task.make_batch(step))
                losses[name].append(loss.item())
                arm.step(loss)
        rival, ours = losses.values()
        assert ours[0] == rival[0]
        assert ours == pytest.approx(rival, rel=1e-3)
        assert len(set(ours)) == 10


class TestRequireArms:
    @pytest.mark.parametrize(
        "names", [["fp32"], ["torch-amp", "fp32"], ["fp32", "halfstep:auto", "halfstep:bf16-true"]]
    )
    def test_takes_known_arms_with_the_reference_among_them(self, names: list[str]) -> None:
        require_arms(names)

    @pytest.mark.parametrize(
        ("names", "said"),
        [
            (["fp32", "torch-apm"], "did you mean 'torch-amp'"),
            (["fp32", "halfstop"], "did you mean 'halfstep'"),
            (["fp32", ""], "unknown arm ''"),
            (["fp32", CONTROL], "unknown arm 'control'"),
            (["torch-amp", "halfstep"], "'fp32' is one of them"),
            (["fp32", "halfstep", "halfstep"], "named once each"),
            ([], "'fp32' is one of them"),
        ],
    )
    def test_refuses_unknown_repeated_and_missing_arms(self, names: list[str], said: str) -> None:
        with pytest.raises(RecipeError, match=said):
            require_arms(names)

    @pytest.mark.parametrize("plan", ["bf61-mixed", "", "gone.toml", "compute=bf61"])
    def test_refuses_a_plan_that_cannot_be_read(self, plan: str) -> None:
        with pytest.raises((PlanError, ValueError), match=r"bf16|gone|precision"):
            require_arms(["fp32", f"halfstep:{plan}"])

    def test_every_arm_that_is_documented_is_one(self) -> None:
        assert all(is_arm(name) for name in ALL_ARMS)


class TestWork:
    def drive(self, tmp_path: Path, lines: str, arm: str = "fp32") -> list[str]:
        recipe = write_recipe(tmp_path)
        sink = io.StringIO()
        work(arm, recipe.build_task(), recipe.train, recipe.precision, io.StringIO(lines), sink)
        return sink.getvalue().splitlines()

    def test_runs_as_far_as_each_turn_allows(self, tmp_path: Path) -> None:
        lines = self.drive(tmp_path, "go 2\ngo 5\nend\n")
        kinds = [line if line == "turn over" else type(records.decode(line)).__name__ for line in lines]
        assert kinds == ["turn over", *["StepRecord"] * 2, "turn over", *["StepRecord"] * 3, "turn over", "EndRecord"]

    def test_a_rehearsal_that_dies_says_what_its_layers_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step = Stepper.step

        def step_or_stop(stepper: Stepper, loss: Tensor) -> StepOutcome:
            if stepper.applied == 3:
                raise TrainingError("training stopped")
            return step(stepper, loss)

        monkeypatch.setattr(Stepper, "step", step_or_stop)
        recipe, sink = write_recipe(tmp_path, precision=str(find_rehearsal("fp8-h100").plan)), io.StringIO()
        with pytest.raises(TrainingError):
            work("halfstep", recipe.build_task(), recipe.train, recipe.precision, io.StringIO("go 12\n"), sink)
        said = [records.decode(line) for line in sink.getvalue().splitlines() if line != "turn over"]
        assert sum(isinstance(record, StepRecord) for record in said) == 3
        assert sum(isinstance(record, HarmRecord) and record.error > 0 for record in said) > 3

    @pytest.mark.parametrize("arm", ALL_ARMS)
    def test_every_arm_runs_to_its_end(self, tmp_path: Path, arm: str) -> None:
        said = [records.decode(line) for line in self.drive(tmp_path, "go 12\nend\n", arm) if line != "turn over"]
        steps = [record for record in said if isinstance(record, StepRecord)]
        assert [record.step for record in steps] == list(range(1, 13))
        assert has_trained(steps) is (arm != CONTROL)
        end = said[-1]
        assert isinstance(end, EndRecord)
        assert (end.step, end.reason, end.skipped_steps) == (12, "finished", 0)

    def test_evaluates_before_it_gives_the_turn_back(self, tmp_path: Path) -> None:
        lines = self.drive(tmp_path, "go 6\nend\n")
        assert isinstance(records.decode(lines[-3]), EvaluationRecord)
        assert lines[-2] == "turn over"

    def test_ends_when_the_conductor_is_gone(self, tmp_path: Path) -> None:
        end = records.decode(self.drive(tmp_path, "go 1\n")[-1])
        assert isinstance(end, EndRecord)
        assert end.step == 1


class Log:
    """Every record that a comparison tells of."""

    def __init__(self) -> None:
        self.records: list[tuple[int, str, Record]] = []
        self.note: Callable[[int, str, Record], None] = lambda seed, arm, record: self.records.append(
            (seed, arm, record)
        )

    def steps(self, seed: int, arm: str) -> list[StepRecord]:
        return [r for s, a, r in self.records if (s, a) == (seed, arm) and isinstance(r, StepRecord)]

    def losses(self, seed: int, arm: str) -> list[float]:
        return [record.loss for record in self.steps(seed, arm)]

    def evaluations(self, seed: int, arm: str) -> list[float]:
        return [r.value for s, a, r in self.records if (s, a) == (seed, arm) and isinstance(r, EvaluationRecord)]


Finished = tuple[ComparisonRecord, Recipe, Log]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    recipe = write_recipe(tmp_path_factory.mktemp("comparison"))
    log = Log()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        metric = recipe.build_task().metric
        result = compare(
            str(recipe), recipe.name, metric, recipe.train, arms=E2E_ARMS, seeds=2, notify=log.note
        )  # fmt: skip
    return result, recipe, log


class TestWholeComparison:
    def test_arms_come_in_order_without_the_control(self, finished: Finished) -> None:
        result, recipe, _ = finished
        assert tuple(arm.name for arm in result.arms) == E2E_ARMS
        assert (result.recipe_name, result.recipe, result.seeds, result.steps) == ("tiny", str(recipe), 2, 12)
        assert (result.metric, result.unit, result.higher_is_better) == ("bits per byte", "bit", False)

    def test_every_arm_starts_from_the_same_loss(self, finished: Finished) -> None:
        log = finished[2]
        for seed in (0, 1):
            first = {arm: log.losses(seed, arm)[0] for arm in (*E2E_ARMS, CONTROL)}
            assert all(loss == pytest.approx(first["fp32"], rel=2e-3) for loss in first.values())
        assert log.losses(0, "fp32")[0] != log.losses(1, "fp32")[0]

    def test_bf16_differs_from_fp32_by_rounding_only(self, finished: Finished) -> None:
        log = finished[2]
        for seed in (0, 1):
            assert log.losses(seed, "halfstep") != log.losses(seed, "fp32")
            assert log.losses(seed, "halfstep") == pytest.approx(log.losses(seed, "fp32"), rel=5e-2)

    def test_every_step_of_every_arm_is_reported(self, finished: Finished) -> None:
        log = finished[2]
        for seed in (0, 1):
            for arm in E2E_ARMS:
                assert [s.step for s in log.steps(seed, arm)] == list(range(1, 13))
            assert [s.step for s in log.steps(seed, CONTROL)] == list(range(1, 7))  # to the first evaluation

    def test_numbers_follow_from_the_records(self, finished: Finished) -> None:
        result, _, log = finished
        finals = {arm: [log.evaluations(seed, arm)[-1] for seed in (0, 1)] for arm in E2E_ARMS}
        for arm in result.arms:
            assert list(arm.metrics) == finals[arm.name]
            assert arm.metric_mean == pytest.approx(statistics.fmean(finals[arm.name]))
            assert arm.metric_sd == pytest.approx(statistics.stdev(finals[arm.name]))
            paired = [mine - theirs for mine, theirs in zip(finals[arm.name], finals["fp32"], strict=True)]
            assert arm.difference == pytest.approx(statistics.fmean(paired))
            assert arm.interval[0] <= arm.difference <= arm.interval[1]
            means = [
                statistics.fmean(pair) for pair in zip(log.losses(0, arm.name), log.losses(1, arm.name), strict=True)
            ]
            assert [p.value for p in arm.loss] == pytest.approx(means)
            assert [p.step for p in arm.evaluations] == [6, 12]
        assert result.target == pytest.approx(statistics.fmean(finals["fp32"]) + result.margin)

    def test_every_field_of_every_arm_is_filled(self, finished: Finished) -> None:
        result = finished[0]
        assert result.arms[0].verdict == "reference"
        for arm in result.arms:
            others = set(E2E_ARMS) - {arm.name}
            assert set(arm.speedup) == set(arm.memory_ratio) == others
            assert all(value > 0 for value in (*arm.speedup.values(), *arm.memory_ratio.values()))
            assert arm.step_ms_spread[0] <= arm.step_ms <= arm.step_ms_spread[1]
            assert arm.peak_memory_bytes > 50 * 2**20
            assert arm.skipped_steps == 0
            assert arm.verdict in ("reference", "equivalent", "worse", "better", "inconclusive")
        assert result.arms[0].seconds_to_target is not None
        for name in ("machine", "torch_version", "threads", "date", "seconds", "control"):
            assert getattr(result, name)
        assert {f.name for f in fields(ComparisonRecord) if not getattr(result, f.name)} <= {
            "command",
            "higher_is_better",
        }
        ours = next(arm for arm in result.arms if arm.name == "halfstep")
        assert result.speedup == ours.speedup
        assert result.memory_ratio == ours.memory_ratio

    def test_halfsteps_arms_carry_their_plan_and_rivals_none(self, finished: Finished) -> None:
        plans = {arm.name: arm.plan for arm in finished[0].arms}
        assert plans["fp32"] is None
        for name, compute, storage in (("halfstep", "bf16", "fp32"), ("halfstep:bf16-true", "bf16", "bf16")):
            plan = plans[name]
            assert plan is not None
            layer = next(row for row in plan.layers if row.path == "blocks.0.qkv")
            assert (layer.compute, layer.storage) == (compute, storage)

    def test_the_gate_rejects_the_control(self, finished: Finished) -> None:
        result = finished[0]
        assert result.gate_works
        assert result.control.startswith(("not trained, +", "worse, +"))

    def test_the_record_survives_the_disk(self, finished: Finished) -> None:
        assert records.decode(records.encode(finished[0])) == finished[0]

    @pytest.mark.usefixtures("one_thread")
    def test_a_loss_that_did_not_move_is_not_trained(self, tmp_path: Path) -> None:
        recipe = write_recipe(tmp_path, lr=1e-12, steps=6, evaluations=1)
        metric = recipe.build_task().metric
        result = compare(str(recipe), recipe.name, metric, recipe.train, arms=("fp32",), seeds=1)
        assert result.arms[0].verdict == "not trained"


@pytest.mark.usefixtures("one_thread")
class TestFailures:
    def test_a_worker_that_fails_is_named_with_what_it_said(self, tmp_path: Path) -> None:
        recipe = write_recipe(tmp_path, steps=2)
        metric = recipe.build_task().metric
        for path in (tmp_path / "text").iterdir():
            path.unlink()
        with pytest.raises(TrainingError, match=r"arm 'fp32', seed 4, stopped: .*0 bytes to train on") as caught:
            compare(str(recipe), recipe.name, metric, replace(recipe.train, seed=4), arms=("fp32",), seeds=1)
        assert "\n" not in str(caught.value)
        assert "error: " not in str(caught.value)

    @pytest.mark.parametrize("seeds", [0, -1])
    def test_no_seeds_are_refused(self, tmp_path: Path, seeds: int) -> None:
        recipe = write_recipe(tmp_path)
        metric = recipe.build_task().metric
        with pytest.raises(RecipeError, match=f"at least 1; got {seeds}"):
            compare(str(recipe), recipe.name, metric, recipe.train, arms=("fp32",), seeds=seeds)

    def test_an_unknown_arm_is_refused_before_anything_runs(self, tmp_path: Path) -> None:
        recipe = write_recipe(tmp_path)
        metric = recipe.build_task().metric
        with pytest.raises(RecipeError, match="unknown arm 'pf32'"):
            compare("no recipe at all", recipe.name, metric, recipe.train, arms=("fp32", "pf32"), seeds=1)


class TestRepair:
    def arm(self, verdict: str, error: float) -> ArmResult:
        harm = HarmRecord(path="a", compute="fp8_e4m3", error=error, noise=0.5)
        return ArmResult(
            name="halfstep", verdict=verdict, metric_mean=1, metric_sd=0, metrics=(1.0,), difference=0, interval=(0, 0),
            step_ms=1, step_ms_spread=(1, 1), peak_memory_bytes=1, skipped_steps=0, harms=(harm,),
        )  # fmt: skip

    def record(self, arm: ArmResult) -> ComparisonRecord:
        return ComparisonRecord(
            recipe_name="", recipe="", metric="", unit="", higher_is_better=True, margin=1, target=1, seeds=2, steps=1,
            machine="", torch_version="", threads=1, date="", seconds=1, command="", arms=(arm,), control="",
            gate_works=True,
        )  # fmt: skip

    def test_a_plan_that_fails_is_repaired_and_tried_again(self) -> None:
        tried: list[Plan] = []

        def compare_again(plan: Plan) -> ComparisonRecord:
            tried.append(plan)
            return self.record(self.arm("equivalent", 0.0))

        plan = find_rehearsal("fp8-h100").plan
        result, repaired = compare_repaired(self.record(self.arm("worse", 0.4)), plan, compare_again)
        assert repaired is not None and tried == [repaired]
        assert repaired.rules[1:] == plan.rules and repaired.rules[0].path == "a"
        assert [(arm.name, arm.verdict) for arm in result.arms] == [("halfstep", "worse"), (REPAIRED, "equivalent")]

    @pytest.mark.parametrize(("verdict", "error"), [("equivalent", 0.4), ("better", 0.4), ("worse", 0.01)])
    def test_a_plan_that_holds_or_whose_layers_are_not_the_cause_is_left(self, verdict: str, error: float) -> None:
        def compare_again(plan: Plan) -> ComparisonRecord:
            raise AssertionError(plan)

        first = self.record(self.arm(verdict, error))
        assert compare_repaired(first, find_rehearsal("fp8-h100").plan, compare_again) == (first, None)
