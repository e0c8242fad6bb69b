import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfstep import checkpoint as checkpoint_module
from halfstep import records
from halfstep import training as training_module
from halfstep.checkpoint import Rounding, load_checkpoint
from halfstep.control.sensitivity import Choice
from halfstep.errors import CheckpointError, DataError, HalfstepError, RecordError, UnsupportedError
from halfstep.plan import Plan
from halfstep.records import EndRecord, EvaluationRecord, PlanRecord, Record, RunRecord, StepRecord
from halfstep.stepper import Stepper, prepare
from halfstep.stepping import plan_in_force
from halfstep.training import (
    Metric,
    Run,
    TrainSettings,
    build_optimizer,
    build_schedule,
    evaluate,
    evaluation_steps,
    train_steps,
)
from helpers import SPLIT, assert_same, copy_weights, make_mlp, make_profile, seeded

HEAD = RunRecord(
    task="tiny", arm="halfstep", precision="any", seed=0, steps=12, recipe="", machine="by hand",
    torch_version=torch.__version__, threads=1, date="2026-01-01",
)  # fmt: skip
SETTINGS = TrainSettings(
    steps=12,
    batch_size=8,
    lr=1e-2,
    weight_decay=0.1,
    schedule="cosine",
    warmup=2,
    accumulate=2,
    evaluations=3,
    clip=0.5,
)
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", SPLIT, "auto")


class TinyTask:
    """Regression with dropout. In `weights` a factor on the loss of chosen steps; a NaN there is a bad batch."""

    metric = Metric(name="error", unit="", higher_is_better=False, margin=0.1)

    def __init__(self, width: int = 16, weights: dict[int, float] | None = None) -> None:
        self.width, self.weights = width, weights or {}
        self.modes: list[tuple[bool, bool]] = []  # (training, gradients wanted) at every evaluation

    def build_model(self) -> nn.Module:
        with seeded(0):
            return nn.Sequential(
                nn.Linear(8, self.width), nn.Tanh(), nn.Dropout(0.3), nn.LayerNorm(self.width), nn.Linear(self.width, 3)
            )

    def make_batch(self, step: int) -> tuple[Tensor, Tensor]:
        with seeded(step):
            x = torch.randn(8, 8)
        return x, torch.sin(x[:, :3]) * self.weights.get(step, 1.0)

    def measure_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]).float(), batch[1])

    def evaluate(self, model: nn.Module) -> float:
        self.modes.append((model.training, torch.is_grad_enabled()))
        x, y = self.make_batch(0)
        return float(F.mse_loss(model(x).float(), y))


def open_run(
    folder: Path,
    precision: str = "32-true",
    *,
    settings: TrainSettings = SETTINGS,
    task: TinyTask | None = None,
    name: str = "tiny",
) -> Run:
    """A new model, optimizer, schedule and stepper in a folder, as a new process would make them."""
    torch.manual_seed(0)
    task = task or TinyTask()
    model = task.build_model()
    optimizer = build_optimizer(model, settings, fused=False)
    stepper = prepare(
        model, optimizer, precision, accumulate=settings.accumulate, clip=settings.clip or None,
        schedulers=build_schedule(optimizer, settings), profile=make_profile("slower"),
    )  # fmt: skip
    return Run(task, stepper, settings, folder, name=name)


def drive(run: Run, *, stop_after: int = 0, save_every: int = 0) -> list[Record]:
    seen = []
    for record in run.drive(save_every=save_every):
        seen.append(record)
        if isinstance(record, StepRecord) and record.step == stop_after:
            run.stop = True
    return seen


def begin(run: Run) -> Run:
    run.begin(HEAD)
    return run


def read_losses(folder: Path) -> dict[int, float]:
    steps = [record for record in records.read(folder / "record.jsonl") if isinstance(record, StepRecord)]
    losses = {record.step: record.loss for record in steps}
    assert len(losses) == len(steps), "a step was recorded twice"
    assert list(losses) == sorted(losses)
    return losses


def read_evaluations(folder: Path) -> dict[int, float]:
    return {
        record.step: record.value
        for record in records.read(folder / "record.jsonl")
        if isinstance(record, EvaluationRecord)
    }


def assert_runs_are_equal(one: Run, other: Run) -> None:
    assert read_losses(one.folder) == read_losses(other.folder)
    assert_same(copy_weights(one.stepper.model), copy_weights(other.stepper.model))
    assert one.stepper.state_dict() == other.stepper.state_dict()
    for first, second in zip(one.stepper.optimizer.state.values(), other.stepper.optimizer.state.values(), strict=True):
        assert_same(first, second)
    ours, theirs = (run.stepper.schedulers[0].state_dict() for run in (one, other))
    assert ours == theirs


# --- settings


@pytest.mark.parametrize(
    ("steps", "evaluations", "expected"),
    [(10, 2, [5, 10]), (10, 3, [3, 7, 10]), (10, 1, [10]), (10, 0, [10]), (3, 9, [1, 2, 3]), (1, 5, [1])],
)
def test_evaluations_are_spread_evenly_and_the_last_is_after_the_last_step(
    steps: int, evaluations: int, expected: list[int]
) -> None:
    assert sorted(evaluation_steps(TrainSettings(steps=steps, evaluations=evaluations))) == expected


def list_rates(settings: TrainSettings) -> list[float]:
    optimizer = torch.optim.SGD(make_mlp().parameters(), lr=settings.lr)
    schedule = build_schedule(optimizer, settings)
    rates = []
    for _ in range(settings.steps // settings.accumulate):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "constant", "warmup": 2}, [0.5, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        ({"schedule": "step", "step_every": 2, "gamma": 0.1}, [1, 1, 0.1, 0.1]),
        ({"schedule": "linear", "warmup": 2, "steps": 8, "accumulate": 2}, [0.5, 1, 1, 0.5]),
    ],
)
def test_schedule_counts_updates(options: dict[str, Any], expected: list[float]) -> None:
    settings = TrainSettings(**({"steps": 4, "lr": 1.0} | options))
    assert list_rates(settings) == pytest.approx(expected)


def test_weight_decay_leaves_out_biases_norms_and_frozen_parameters() -> None:
    model = TinyTask().build_model()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    optimizer = build_optimizer(model, TrainSettings(weight_decay=0.1), fused=False)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 16)]
    assert {p.ndim for p in plain["params"]} == {1}
    assert not any(p is frozen for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_is_that_of_the_settings(name: Any, kind: type, fused: bool) -> None:
    settings = TrainSettings(optimizer=name, lr=0.25, momentum=0.5)
    optimizer = build_optimizer(make_mlp(), settings, fused=fused)
    assert type(optimizer) is kind
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    if name == "sgd":
        assert all((group["momentum"], group["nesterov"]) == (0.5, True) for group in optimizer.param_groups)


def test_sgd_without_momentum_is_plain() -> None:
    optimizer = build_optimizer(make_mlp(), TrainSettings(optimizer="sgd", momentum=0.0), fused=False)
    assert not optimizer.param_groups[0]["nesterov"]


# --- the loop


def make_ticks() -> Iterator[float]:
    return (0.5 * number for number in range(1000))


def test_loop_yields_a_record_after_every_step_and_every_evaluation(tmp_path: Path) -> None:
    run, ticks = open_run(tmp_path), make_ticks()
    task = run.task
    seen = list(train_steps(task, run.stepper, SETTINGS, clock=lambda: next(ticks)))
    steps = [record for record in seen if isinstance(record, StepRecord)]
    evaluations = [record for record in seen if isinstance(record, EvaluationRecord)]
    assert [record.step for record in steps] == list(range(1, 13))
    assert [record.step for record in evaluations] == [4, 8, 12]
    assert [record.milliseconds for record in steps] == [500.0] * 12
    assert [record.train_seconds for record in evaluations] == [2.0, 4.0, 6.0]
    assert all(record.samples == 8 for record in steps)
    assert [record.outcome.status for record in steps] == ["accumulated", "applied"] * 6
    assert steps[0].learning_rate == pytest.approx(0.005)
    assert [seen.index(record) for record in evaluations] == [4, 9, 14]


def test_evaluation_runs_in_eval_mode_without_gradients_in_the_precision_of_training(tmp_path: Path) -> None:
    task = TinyTask()
    run = open_run(tmp_path, "bf16-mixed", task=task)
    dtypes: list[torch.dtype] = []
    head = run.stepper.model.get_submodule("4")
    head.register_forward_hook(lambda _module, _args, result: dtypes.append(result.dtype))
    evaluate(task, run.stepper)
    assert task.modes == [(False, False)]
    assert dtypes == [torch.bfloat16]
    list(train_steps(task, run.stepper, TrainSettings(steps=1)))
    assert task.modes[-1] == (False, False)


def test_model_is_in_training_mode_again_after_an_evaluation(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    for record in train_steps(run.task, run.stepper, TrainSettings(steps=4, evaluations=4)):
        assert run.stepper.model.training == isinstance(record, StepRecord)


def test_clock_that_goes_back_gives_no_negative_time(tmp_path: Path) -> None:
    times = iter([100.0, 40.0, 40.0, 41.0, 30.0, -5.0] * 4)
    run = begin(open_run(tmp_path))
    seen = list(run.drive(clock=lambda: next(times)))
    milliseconds = [record.milliseconds for record in seen if isinstance(record, StepRecord)]
    assert milliseconds == [0.0, 1000.0, 0.0] * 4
    totals = [record.train_seconds for record in seen if isinstance(record, EvaluationRecord)]
    assert totals == [1.0, 3.0, 4.0]
    assert run.train_seconds == 4.0


def test_loop_goes_on_from_a_step() -> None:
    run = open_run(Path("unused"))
    seen = list(train_steps(run.task, run.stepper, SETTINGS, start=9, train_seconds=100.0))
    assert [record.step for record in seen] == [10, 11, 12, 12]
    assert isinstance(seen[-1], EvaluationRecord)
    assert seen[-1].train_seconds > 100


# --- runs on disk


def test_run_writes_what_it_yields_and_a_checkpoint(tmp_path: Path) -> None:
    run = begin(open_run(tmp_path / "new" / "folder"))
    seen = drive(run)
    assert list(records.read(run.record)) == [HEAD, *seen]
    assert isinstance(seen[0], PlanRecord)
    assert isinstance(seen[-1], EndRecord)
    assert (seen[-1].step, seen[-1].reason, seen[-1].skipped_steps) == (12, "finished", 0)
    assert seen[-1].peak_memory_bytes > 0
    assert sorted(file.name for file in run.folder.iterdir()) == [".lock", "checkpoint.safetensors", "record.jsonl"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, precision: str, stop_after: int
) -> None:
    whole = begin(open_run(tmp_path / "whole", precision))
    drive(whole)
    first = begin(open_run(tmp_path / "parts", precision))
    end = drive(first, stop_after=stop_after)[-1]
    assert isinstance(end, EndRecord)
    assert (end.reason, end.step) == ("interrupted", stop_after)
    second = open_run(tmp_path / "parts", precision)
    assert second.stepper.model is not first.stepper.model
    torch.manual_seed(99)
    second.resume()
    assert_same(copy_weights(second.stepper.model), copy_weights(first.stepper.model))
    end = drive(second)[-1]
    assert isinstance(end, EndRecord)
    assert end.reason == "finished"
    assert_runs_are_equal(second, whole)


@pytest.mark.parametrize("precision", ["bf16-true", SPLIT, "16-mixed"])
def test_run_that_is_interrupted_again_and_again_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, precision: str
) -> None:
    whole = begin(open_run(tmp_path / "whole", precision))
    drive(whole)
    run = begin(open_run(tmp_path / "parts", precision))
    for stop_after in (2, 3, 4, 7, 10, 12):
        drive(run, stop_after=stop_after)
        if stop_after < 12:
            run = open_run(tmp_path / "parts", precision)
            run.resume()
    assert_runs_are_equal(run, whole)


def test_resumed_run_with_skipped_steps_and_a_moving_loss_scale_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def task() -> TinyTask:
        return TinyTask(weights={1: 1e5, 3: 1e5, 4: 1e5, 9: 1e5})

    whole = begin(open_run(tmp_path / "whole", "16-mixed", task=task()))
    drive(whole)
    assert whole.stepper.skipped >= 3
    assert whole.stepper.applied >= 1
    first = begin(open_run(tmp_path / "parts", "16-mixed", task=task()))
    drive(first, stop_after=4)
    assert first.stepper.scale < 65536
    second = open_run(tmp_path / "parts", "16-mixed", task=task())
    second.resume()
    assert second.stepper.state_dict() == first.stepper.state_dict()
    drive(second)
    assert_runs_are_equal(second, whole)


@pytest.mark.parametrize("stop_after", [2, 6])
def test_plan_that_auto_chose_is_kept_over_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    choices: list[str] = []

    def choose(*_args: Any, **_options: Any) -> Choice:
        choices.append(SPLIT)
        plan = Plan.parse(f"name=auto\nkind=norm compute=fp32 storage=fp32 master=none why='by hand'\n{SPLIT}")
        return Choice(plan=plan, why="chosen by hand", seconds=0.0)

    monkeypatch.setattr(plan_in_force, "choose_plan", choose)
    whole = begin(open_run(tmp_path / "whole", "auto"))
    drive(whole)
    drive(begin(open_run(tmp_path / "parts", "auto")), stop_after=stop_after)
    assert len(choices) == 2
    second = open_run(tmp_path / "parts", "auto")
    second.resume()
    assert next(second.stepper.model.parameters()).dtype is torch.bfloat16
    drive(second)
    assert len(choices) == 2, "it was chosen again"
    assert_runs_are_equal(second, whole)


def test_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    whole = begin(open_run(tmp_path / "whole"))
    drive(whole)
    killed = begin(open_run(tmp_path / "parts"))
    driver = killed.drive(save_every=4)
    for record in driver:
        if isinstance(record, StepRecord) and record.step == 7:
            break
    driver.close()  # type: ignore[attr-defined]
    assert max(read_losses(killed.folder)) == 7
    second = open_run(tmp_path / "parts")
    second.resume()
    assert second.done == 4
    assert max(read_losses(second.folder)) == 4
    drive(second)
    assert_runs_are_equal(second, whole)
    assert read_evaluations(second.folder) == read_evaluations(whole.folder)


@pytest.mark.parametrize("stop_after", [4, 8, 6])
def test_evaluations_are_the_same_with_and_without_an_interruption(tmp_path: Path, stop_after: int) -> None:
    whole = begin(open_run(tmp_path / "whole"))
    drive(whole)
    drive(begin(open_run(tmp_path / "parts")), stop_after=stop_after)
    second = open_run(tmp_path / "parts")
    second.resume()
    drive(second)
    assert read_evaluations(second.folder) == read_evaluations(whole.folder)


def test_record_that_was_cut_off_in_its_last_line_is_repaired_by_resuming(tmp_path: Path) -> None:
    whole = begin(open_run(tmp_path / "whole"))
    drive(whole)
    first = begin(open_run(tmp_path / "parts"))
    drive(first, stop_after=6)
    text = first.record.read_text()
    first.record.write_text(text[:-30])
    second = open_run(tmp_path / "parts")
    second.resume()
    drive(second)
    assert_runs_are_equal(second, whole)
    assert all(json.loads(line) for line in second.record.read_text().splitlines())
    ends = [record for record in records.read(second.record) if isinstance(record, EndRecord)]
    assert [end.reason for end in ends] == ["finished"]


def test_resuming_a_finished_run_only_ends_it_again(tmp_path: Path) -> None:
    drive(begin(open_run(tmp_path)))
    run = open_run(tmp_path)
    run.resume()
    seen = drive(run)
    assert [type(record) for record in seen] == [EndRecord]
    assert max(read_losses(tmp_path)) == 12


@pytest.mark.parametrize("save_every", [1, 3, 5])
def test_checkpoint_may_fall_into_a_window(tmp_path: Path, save_every: int) -> None:
    run = begin(open_run(tmp_path))
    for record in run.drive(save_every=save_every):
        if isinstance(record, StepRecord) and record.step == save_every + 1:
            break
    state = load_checkpoint(run.checkpoint)
    assert (state["done"], state["stepper"]["micro"]) == (save_every, 1)
    assert len(state["stepper"]["window"]["losses"]) == 1


# --- what a crash leaves


def cut_off(folder: Path, after: int, **options: Any) -> Run:
    """A run that is killed after a step, as far as one process can be."""
    run = begin(open_run(folder, **options))
    driver = run.drive(save_every=4)
    for record in driver:
        if isinstance(record, StepRecord) and record.step == after:
            break
    driver.close()  # type: ignore[attr-defined]
    return run


def test_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    whole = begin(open_run(tmp_path / "whole"))
    drive(whole)
    killed = cut_off(tmp_path / "parts", 3)
    assert not killed.checkpoint.exists()
    second = open_run(tmp_path / "parts")
    assert second.resume() is None
    assert second.done == 0
    assert list(records.read(second.record)) == [HEAD]
    drive(second)
    assert_runs_are_equal(second, whole)


def test_run_whose_checkpoint_was_lost_after_it_ended_is_not_started_over(tmp_path: Path) -> None:
    save_run(tmp_path)
    run = open_run(tmp_path)
    run.checkpoint.unlink()
    before = run.record.read_bytes()
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        run.resume()
    assert run.record.read_bytes() == before


GARBAGE = [b'{"schema":1,"rec', b"\0" * 700, b"\0" * 700 + b"\n", b"\xff\xfe\n{}\n", b'{"schema":9}\n']


@pytest.mark.parametrize("garbage", GARBAGE, ids=["torn", "zeros", "line of zeros", "bytes", "another schema"])
@pytest.mark.parametrize("steps_beyond", [0, 2])
def test_what_a_crash_leaves_beyond_the_checkpoint_does_no_harm(
    tmp_path: Path, garbage: bytes, steps_beyond: int
) -> None:
    whole = begin(open_run(tmp_path / "whole"))
    drive(whole)
    killed = cut_off(tmp_path / "parts", 7)
    lines = killed.record.read_bytes().splitlines(keepends=True)
    saved = next(i for i, line in enumerate(lines) if b'"EvaluationRecord"' in line) + 1  # of step 4
    killed.record.write_bytes(b"".join(lines[: saved + steps_beyond]) + garbage)
    second = open_run(tmp_path / "parts")
    second.resume()
    assert second.done == 4
    drive(second)
    assert_runs_are_equal(second, whole)
    assert read_evaluations(second.folder) == read_evaluations(whole.folder)


def test_damage_before_the_checkpoint_is_named_by_its_line_and_nothing_is_changed(tmp_path: Path) -> None:
    run = cut_off(tmp_path, 7)
    lines = run.record.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:3], b"damaged\n", *lines[4:]])
    run.record.write_bytes(damaged)
    with pytest.raises(RecordError, match=r"record\.jsonl, line 4"):
        open_run(tmp_path).resume()
    assert run.record.read_bytes() == damaged


def test_empty_record_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "record.jsonl").write_text("")
    with pytest.raises(RecordError, match=r"is empty; delete the folder") as caught:
        open_run(tmp_path).resume()
    assert "\n" not in str(caught.value)


def test_record_that_cannot_be_written_anew_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path)
    run = open_run(tmp_path)
    before = run.record.read_bytes()

    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RecordError, match=r"cannot be written \(No space left on device\)"):
        run.resume()
    assert run.record.read_bytes() == before


@pytest.mark.parametrize("again", ["16-mixed", "bf16-mixed"])
def test_precision_that_is_given_again_leaves_the_policy_of_the_run(tmp_path: Path, again: str) -> None:
    """That of the recipe, or of --recovery: the name of a precision says nothing of it."""
    given = str(replace(Plan.preset("16-mixed"), recovery="roll-back"))
    drive(begin(open_run(tmp_path, given)), stop_after=4)
    run = open_run(tmp_path, given)
    rounding = run.resume(again)
    assert (rounding is None) == (again == "16-mixed")
    assert run.stepper.plan.recovery == "roll-back" and run.stepper.plan.name == again
    drive(run)


@pytest.mark.parametrize("precision", ["bf16-mixed", "auto"])
def test_plan_is_recorded_once_however_often_a_run_is_resumed(tmp_path: Path, precision: str) -> None:
    run = begin(open_run(tmp_path, precision))
    for stop_after in (2, 4, 6, 12):
        drive(run, stop_after=stop_after)
        run = open_run(tmp_path, precision)
        run.resume()
    written = [record for record in records.read(run.record) if isinstance(record, PlanRecord)]
    assert [Plan.parse(record.plan).name for record in written] == [precision]


# --- another plan


MOVES = [
    (SPLIT, "32-true"), ("16-mixed", "bf16-mixed"), ("bf16-mixed", "16-mixed"), ("32-true", SPLIT), ("auto", "32-true"),
    ("bf16-true", "32-true"), (SPLIT, "bf16-mixed"), ("32-true", "bf16-true"), (SPLIT, "bf16-true"),
]  # fmt: skip


def read_states(run: Run) -> list[Tensor]:
    """Optimizer states, in fp32."""
    return [
        value.float() for state in run.stepper.optimizer.state.values() for key, value in state.items() if key != "step"
    ]


def round_to_bf16(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `bf16-true` does to weights: all but those of the normalisation, which is module 3."""
    return {name: w if name.startswith("3.") else w.bfloat16().float() for name, w in weights.items()}


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_run_goes_on_under_another_plan_from_fp32_and_says_what_was_rounded(
    tmp_path: Path, before: str, after: str
) -> None:
    first = begin(open_run(tmp_path, before))
    drive(first, stop_after=6)
    weights, states = copy_weights(first.stepper.model), [state.clone() for state in read_states(first)]
    second = open_run(tmp_path, after)
    rounding = second.resume(after)
    assert rounding is not None
    assert str(second.stepper.plan) == str(Plan.parse(after))
    assert second.stepper.scale == (65536.0 if after == "16-mixed" else 1.0)
    assert (second.done, second.stepper.applied) == (6, 3)
    expected = round_to_bf16(weights) if after == "bf16-true" else weights
    assert_same(copy_weights(second.stepper.model), expected)
    if after == "bf16-true":
        changes = [(w != expected[name], (w - expected[name]).abs() / w.abs()) for name, w in weights.items()]
        assert rounding.weights_changed == sum(int(changed.sum()) for changed, _ in changes) > 0
        assert rounding.weights_largest == pytest.approx(max(float(r[c].max()) for c, r in changes if c.any()))
        assert 0 < rounding.states_changed <= rounding.states
        assert f"{rounding.weights_changed} of {rounding.weights} weights were rounded" in str(rounding)
    else:
        for now, then in zip(read_states(second), states, strict=True):
            assert torch.equal(now, then)
        assert (rounding.weights_changed, rounding.states_changed, str(rounding)) == (0, 0, "nothing was rounded")
    assert rounding.weights == sum(w.numel() for w in weights.values())
    assert rounding.states == sum(state.numel() for state in states)
    drive(second)
    (record,) = [r for r in records.read(second.record) if isinstance(r, PlanRecord)][1:]
    name = first.stepper.plan.name or "an unnamed plan"
    assert record.why == f"on resuming after step 6, in place of {name}: {rounding}"
    assert Plan.parse(record.plan) == Plan.parse(after)


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_run_that_was_moved_trains_as_one_that_changed_its_plan_without_a_stop(
    tmp_path: Path, before: str, after: str
) -> None:
    straight = begin(open_run(tmp_path / "straight", before))
    for record in straight.drive():
        if isinstance(record, StepRecord) and record.step == 6:
            straight.stepper.adopt(Plan.parse(after))
    drive(begin(open_run(tmp_path / "moved", before)), stop_after=6)
    moved = open_run(tmp_path / "moved", after)
    moved.resume(after)
    drive(moved, stop_after=8)
    again = open_run(tmp_path / "moved", before)
    assert again.resume() is None, "the plan that was moved to is the saved one now"
    drive(again)
    assert_runs_are_equal(again, straight)


def test_run_moved_to_auto_chooses_when_its_next_batch_arrives(tmp_path: Path) -> None:
    drive(begin(open_run(tmp_path, SPLIT)), stop_after=6)
    run = open_run(tmp_path, "auto")
    rounding = run.resume("auto")
    assert str(rounding) == "nothing was rounded"
    assert run.stepper.state_dict()["plan"] is None
    drive(run)
    (record,) = [r for r in records.read(run.record) if isinstance(r, PlanRecord)][1:]
    assert Plan.parse(record.plan).name == "auto"
    assert "no 16-bit format is faster" in record.why
    again = open_run(tmp_path, "auto")
    assert again.resume("auto") is None


def test_run_whose_rest_was_chosen_goes_on_with_the_same_plan_and_moves_to_another(tmp_path: Path) -> None:
    mine, other = "rest=auto\npath=0 saved=bf16", "rest=auto\npath=0 saved=int8"
    drive(begin(open_run(tmp_path, mine)), stop_after=6)
    chosen = open_run(tmp_path, mine)
    assert chosen.resume(mine) is None
    assert chosen.stepper.state_dict()["plan"] == str(chosen.stepper.plan)
    chosen.close()
    for plan in ("auto", other):
        run = open_run(tmp_path, plan)
        assert run.resume(plan) is not None
        assert run.stepper.state_dict()["plan"] is None
        run.close()


@pytest.mark.parametrize("plan", [SPLIT, Plan.parse(SPLIT)], ids=["text", "plan"])
def test_plan_that_is_in_force_already_changes_nothing(tmp_path: Path, plan: Plan | str) -> None:
    whole = begin(open_run(tmp_path / "whole", SPLIT))
    drive(whole)
    drive(begin(open_run(tmp_path / "parts", SPLIT)), stop_after=6)
    run = open_run(tmp_path / "parts", SPLIT)
    assert run.resume(plan) is None
    drive(run)
    assert_runs_are_equal(run, whole)
    assert sum(isinstance(record, PlanRecord) for record in records.read(run.record)) == 1


def test_run_that_was_never_saved_starts_again_under_the_plan_that_is_asked_for(tmp_path: Path) -> None:
    whole = begin(open_run(tmp_path / "whole", SPLIT))
    drive(whole)
    cut_off(tmp_path / "parts", 3)
    run = open_run(tmp_path / "parts")
    assert run.resume(SPLIT) is not None
    drive(run)
    assert_runs_are_equal(run, whole)


def test_plan_that_is_refused_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    save_run(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UnsupportedError, match="fp8_e4m3"):
        open_run(tmp_path).resume("compute=fp8_e4m3")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_rounding_says_what_became_of_weights_and_states() -> None:
    nothing = Rounding(
        weights=9, weights_changed=0, weights_largest=0.0, states=18, states_changed=0, states_largest=0.0
    )
    assert str(nothing) == "nothing was rounded"
    some = Rounding(
        weights=9000, weights_changed=1234, weights_largest=2**-8, states=18, states_changed=2, states_largest=1.0
    )
    assert (
        str(some)
        == "1,234 of 9,000 weights were rounded, by up to 0.39 %; 2 of 18 optimizer states were rounded, by up to 1e+02 %"
    )


def test_random_states_of_devices_that_are_not_here_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path)
    load = checkpoint_module.load_checkpoint

    def load_with_a_device(path: Path) -> dict[str, Any]:
        state = load(path)
        return state | {"random": state["random"] | {"cuda:99": torch.zeros(16, dtype=torch.uint8)}}

    monkeypatch.setattr(training_module, "load_checkpoint", load_with_a_device)
    run = open_run(tmp_path)
    run.resume()
    assert run.done == 4


# --- what goes wrong on the way


class FailingTask(TinyTask):
    """Fails once, at step 7 or at the evaluation after step 8, in one of the places where a task runs."""

    def __init__(self, place: str, error: Exception) -> None:
        super().__init__()
        self.place, self.error, self.step = place, error, 0

    def make_batch(self, step: int) -> tuple[Tensor, Tensor]:
        self.step = step
        self.fail_at("batch")
        return super().make_batch(step)

    def measure_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.fail_at("forward")
        loss = super().measure_loss(model, batch)
        loss.register_hook(lambda _gradient: self.fail_at("backward"))
        return loss

    def evaluate(self, model: nn.Module) -> float:
        if self.place == "evaluation" and self.step == 8:
            raise self.error
        return super().evaluate(model)

    def fail_at(self, place: str) -> None:
        if self.place == place and self.step == 7:
            raise self.error


OUT_OF_MEMORY = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a capacity of 8 GiB."
)


def assert_failed_and_can_go_on(run: Run, whole: Run, error: str, *, saved: tuple[int, ...] = (6,)) -> None:
    """The last checkpoint is of a step in `saved`, the record says what went wrong, and a sound process ends the run."""
    assert load_checkpoint(run.checkpoint)["done"] in saved
    end = list(records.read(run.record))[-1]
    assert isinstance(end, EndRecord)
    assert end.reason == "failed"
    assert error in end.error
    second = open_run(run.folder)
    second.resume()
    assert second.done in saved
    drive(second)
    assert_runs_are_equal(second, whole)
    assert [r.reason for r in records.read(run.record) if isinstance(r, EndRecord)] == ["finished"]


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, ValueError("bad label 11")], ids=["out of memory", "error"])
@pytest.mark.parametrize("place", ["batch", "forward", "backward", "evaluation"])
def test_error_on_the_way_is_recorded_and_leaves_the_last_checkpoint(
    tmp_path: Path, place: str, error: Exception
) -> None:
    whole = begin(open_run(tmp_path / "whole"))
    drive(whole)
    run = begin(open_run(tmp_path / "failed", task=FailingTask(place, error)))
    with pytest.raises(type(error)) as caught:
        drive(run, save_every=1)
    assert caught.value is error
    saved = (7,) if place == "evaluation" else (6,)
    assert_failed_and_can_go_on(run, whole, f"{type(error).__name__}: {error}", saved=saved)


class DyingData(torch.utils.data.Dataset[int]):
    """Its worker dies at item 7."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        if index == 7:
            os._exit(1)
        return index


class LoadingTask(TinyTask):
    """Takes its steps' numbers from another process."""

    def __init__(self) -> None:
        super().__init__()
        self.loader = iter(
            torch.utils.data.DataLoader(
                DyingData(), batch_size=None, sampler=range(1, 20), num_workers=1, prefetch_factor=1
            )
        )

    def make_batch(self, step: int) -> tuple[Tensor, Tensor]:
        return super().make_batch(int(next(self.loader)) if step else 0)


def test_folder_is_left_to_others_by_a_run_that_is_refused_there(tmp_path: Path) -> None:
    whole = begin(open_run(tmp_path / "run"))
    second = open_run(tmp_path / "run")
    with pytest.raises(RecordError, match="in use by another process"):
        second.resume()
    whole.close()
    with pytest.raises(RecordError, match="holds a run already"):
        begin(second)
    third = open_run(tmp_path / "run")
    third.resume()
    drive(third)
    open_run(tmp_path / "run").resume()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_data_worker_that_dies_is_recorded_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    whole = begin(open_run(tmp_path / "whole"))
    drive(whole)
    run = begin(open_run(tmp_path / "failed", task=LoadingTask()))
    with pytest.raises(RuntimeError, match="worker"):
        drive(run, save_every=1)
    # item 7 is fetched while step 6 is made, and torch raises the error wherever that step, or its saving, has come to
    assert_failed_and_can_go_on(run, whole, "exited unexpectedly", saved=(4, 5, 6))


def test_disk_that_fills_up_while_saving_keeps_the_former_checkpoint_and_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = begin(open_run(tmp_path / "whole"))
    drive(whole)
    run, save_file = begin(open_run(tmp_path / "full")), checkpoint_module.save_file

    def save(tensors: dict[str, Tensor], path: Path, *, metadata: dict[str, str]) -> None:
        if run.done == 8:
            path.write_bytes(b"as much as there was room for")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", save)
        with pytest.raises(CheckpointError, match="No space left on device; the checkpoint before is kept in"):
            drive(run, save_every=1)
    assert sorted(file.name for file in run.folder.iterdir()) == [".lock", "checkpoint.safetensors", "record.jsonl"]
    assert_failed_and_can_go_on(run, whole, "No space left on device", saved=(7,))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_record_that_no_longer_fits_on_the_disk_ends_the_run_in_one_line(tmp_path: Path) -> None:
    run = begin(open_run(tmp_path))
    run.record.unlink()
    run.record.symlink_to("/dev/full")
    with pytest.raises(RecordError, match="No space left on device") as caught:
        drive(run)
    assert "\n" not in str(caught.value)


# --- what cannot go on


def save_run(folder: Path) -> None:
    drive(begin(open_run(folder)), stop_after=4)


def test_checkpoint_of_another_recipe_is_refused_with_both_names(tmp_path: Path) -> None:
    save_run(tmp_path)
    with pytest.raises(CheckpointError, match="is of 'tiny'; this recipe is 'other'"):
        open_run(tmp_path, name="other").resume()


def test_checkpoint_of_another_model_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    save_run(tmp_path)
    run = open_run(tmp_path, task=TinyTask(width=12))
    before, record = copy_weights(run.stepper.model), run.record.read_bytes()
    with pytest.raises(CheckpointError, match=r"of another model: '0\.weight' has shape \(16, 8\) there and \(12, 8\)"):
        run.resume()
    assert_same(copy_weights(run.stepper.model), before)
    assert run.record.read_bytes() == record
    assert run.done == 0


def test_checkpoint_of_a_model_with_other_names_is_refused(tmp_path: Path) -> None:
    class Named(TinyTask):
        def build_model(self) -> nn.Module:
            model = super().build_model()
            model.add_module("extra", nn.Linear(3, 3))
            return model

    save_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"only the model has 'extra\.(weight|bias)'"):
        open_run(tmp_path, task=Named()).resume()


def test_resuming_where_nothing_was_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        open_run(tmp_path).resume()


def test_resuming_without_the_record_is_refused_in_one_line(tmp_path: Path) -> None:
    save_run(tmp_path)
    (tmp_path / "record.jsonl").unlink()
    with pytest.raises(HalfstepError) as caught:
        open_run(tmp_path).resume()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", SPLIT, "auto"])
def test_first_batch_with_a_loss_that_is_not_finite_is_an_error_of_the_data(
    tmp_path: Path, precision: str, value: float
) -> None:
    run = begin(open_run(tmp_path, precision, task=TinyTask(weights={1: value})))
    with pytest.raises(DataError, match="very first batch") as caught:
        drive(run)
    assert "\n" not in str(caught.value)
    assert [record.step for record in records.read(run.record) if isinstance(record, StepRecord)] == [1]
    end = run.find_end()
    assert end is not None
    assert (end.reason, end.error) == ("failed", f"DataError: {caught.value}")
    assert not run.checkpoint.exists()


def test_later_batch_with_nan_is_skipped_and_recorded(tmp_path: Path) -> None:
    run = begin(open_run(tmp_path, task=TinyTask(weights={5: math.nan})))
    seen = drive(run)
    statuses = {record.step: record.outcome.status for record in seen if isinstance(record, StepRecord)}
    assert (statuses[5], statuses[6], statuses[8]) == ("accumulated", "skipped", "applied")
    losses = read_losses(tmp_path)
    assert math.isnan(losses[5])
    assert math.isfinite(losses[12])
    assert isinstance(seen[-1], EndRecord)
    assert seen[-1].skipped_steps == 1


def test_empty_batch_is_skipped_and_recorded(tmp_path: Path) -> None:
    class Gap(TinyTask):
        def make_batch(self, step: int) -> tuple[Tensor, Tensor]:
            x, y = super().make_batch(step)
            return (x[:0], y[:0]) if step == 5 else (x, y)

    run = begin(open_run(tmp_path, task=Gap()))
    outcomes = {record.step: record for record in drive(run) if isinstance(record, StepRecord)}
    assert (outcomes[5].samples, outcomes[6].outcome.cause) == (0, "the loss is nan: the batch is empty")
    assert [outcomes[step].outcome.status for step in (4, 6, 8)] == ["applied", "skipped", "applied"]


def test_folder_that_holds_a_run_already_is_refused_and_left_alone(tmp_path: Path) -> None:
    save_run(tmp_path)
    before = (tmp_path / "record.jsonl").read_bytes()
    with pytest.raises(RecordError, match="holds a run already"):
        open_run(tmp_path).begin(HEAD)
    assert (tmp_path / "record.jsonl").read_bytes() == before


def test_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError, match="cannot be written") as caught:
        open_run(tmp_path / "file" / "run").begin(HEAD)
    assert "\n" not in str(caught.value)


def test_stepper_and_run_agree_on_what_is_trained(tmp_path: Path) -> None:
    run = open_run(tmp_path, SPLIT.replace("compute", "kind=linear compute"))
    assert isinstance(run.stepper, Stepper)
    assert isinstance(run.stepper.model, nn.Sequential)
    assert run.stepper.model[0].weight.dtype is torch.bfloat16
    assert run.stepper.model[3].weight.dtype is torch.float32
