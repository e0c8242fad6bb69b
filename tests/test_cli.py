"""The command: each test runs it in a process of its own, as a user does."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from halfstep import records
from halfstep.cli import _tell_end, app
from halfstep.plan import Plan
from halfstep.records import EndRecord, EvaluationRecord, HardwareProfile, PlanRecord, RunRecord, StepRecord

RECIPE = """
task = "text-generation"
precision = "bf16-mixed"
[train]
steps = {steps}
batch_size = 4
lr = 1e-2
schedule = "cosine"
warmup = 2
evaluations = 2
[options]
data = {data!r}
layers = 1
width = 32
heads = 2
context = 16
held_out_sequences = 8
"""
COMMANDS = ("probe", "plan", "train", "compare", "report")
STEPS = 400  # enough for a signal to arrive in the middle, at about 2 ms each


class House:
    """A folder with text, recipes and a cache, and the command run in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said = ""  # what the fixture's own command printed
        (root / "text").mkdir(parents=True)
        for i in range(24):
            (root / "text" / f"chapter{i}.txt").write_text("the quick brown fox jumps over the lazy dog " * (8 + i % 5))
        (root / "tiny.toml").write_text(RECIPE.format(steps=6, data=str(root / "text")))
        (root / "long.toml").write_text(RECIPE.format(steps=STEPS, data=str(root / "text")))
        self.environment = {
            **os.environ, "XDG_CACHE_HOME": str(root / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "80", "NO_COLOR": "1",
        }  # fmt: skip

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "halfstep", *arguments], cwd=self.root, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "halfstep", *arguments], cwd=self.root, env=self.environment, text=True,
            capture_output=True, timeout=300, check=False,
        )  # fmt: skip

    def succeed(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def read(self, folder: str) -> list[records.Record]:
        return list(records.read(self.root / folder / "record.jsonl"))

    def losses(self, folder: str) -> list[float]:
        return [r.loss for r in self.read(folder) if isinstance(r, StepRecord)]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "house")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> House:
    """A house with a finished run in `whole` and TensorBoard events in `events`."""
    house = House(tmp_path_factory.mktemp("trained") / "house")
    house.said = house.succeed("train", "long.toml", "--out", "whole", "--tensorboard", "events")
    return house


def refuse_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no JSON")


def load_strictly(text: str) -> dict[str, Any]:
    values = json.loads(text, parse_constant=refuse_constant)
    assert isinstance(values, dict)
    return values


class TestHelp:
    def test_names_every_command(self, house: House) -> None:
        said = house.succeed("--help")
        assert all(re.search(rf"^  {name} ", said, re.MULTILINE) for name in COMMANDS)
        assert "worker" not in said

    @pytest.mark.parametrize("name", COMMANDS)
    def test_of_a_command_explains_every_option(self, house: House, name: str) -> None:
        said = house.succeed(name, "--help")
        assert f"halfstep {name} [OPTIONS]" in said
        bare = re.findall(r"^  (--[a-z-]+(?: <\w+>| [A-Z=]+)?)\s*$(?!\n {10,}\S)", said, re.MULTILINE)
        assert bare == []

    def test_every_command_has_a_docstring(self) -> None:
        commands = [info.callback for info in app.registered_commands]
        assert {c.__name__ for c in commands if c is not None} == {*COMMANDS, "worker"}
        assert all(c is not None and c.__doc__ and c.__doc__.strip().endswith((".", "?")) for c in commands)


class TestProbe:
    def test_prints_nothing_but_the_json_and_keeps_the_profile_in_the_cache(self, house: House) -> None:
        said = house.succeed("probe", "--quick", "--json", "-")
        assert load_strictly(said)["record"] == "HardwareProfile"
        profile = records.decode(said)
        assert isinstance(profile, HardwareProfile)
        assert profile.device == "cpu"
        assert {"bf16", "fp16"} <= {c.format for c in profile.capabilities}
        (kept,) = (path for path in (house.root / "cache").rglob("*") if path.is_file())
        assert records.decode(kept.read_text()) == profile

    def test_report_shows_a_profile_that_probe_wrote(self, house: House) -> None:
        profile = HardwareProfile(
            device="cpu", machine="Some Processor", unit="AVX-512", torch_version="2.9", threads=2, date="2026-01-01"
        )
        (house.root / "profile.json").write_text(records.encode(profile) + "\n")
        assert "Some Processor; AVX-512" in house.succeed("report", "profile.json")


class TestPlan:
    def test_shows_every_layer_and_saves_a_plan_that_trains(self, house: House) -> None:
        said = house.succeed("plan", "tiny.toml", "--precision", "bf16-true", "--save", "plan.toml")
        assert "linear" in said
        assert "embedding" in said
        assert Plan.load(house.root / "plan.toml") == Plan.preset("bf16-true")
        house.succeed("train", "tiny.toml", "--precision", "plan.toml", "--out", "run")
        assert len(house.losses("run")) == 6


class TestTrain:
    def test_a_run_is_written_down_from_head_to_end(self, trained: House) -> None:
        run = trained.read("whole")
        assert isinstance(run[0], RunRecord)
        assert (run[0].task, run[0].precision, run[0].steps) == ("text-generation", "bf16-mixed", STEPS)
        steps = [r for r in run if isinstance(r, StepRecord)]
        assert [r.step for r in steps] == list(range(1, STEPS + 1))
        assert [r.step for r in run if isinstance(r, EvaluationRecord)] == [STEPS // 2, STEPS]
        assert isinstance(run[-1], EndRecord)
        assert run[-1].reason == "finished"
        assert steps[-1].loss < 0.5 * steps[0].loss

    def test_the_metric_and_the_folder_are_printed(self, trained: House) -> None:
        said = trained.said
        assert f"step {STEPS}: bits per byte" in said
        assert "kept in whole" in said

    def test_tensorboard_events_hold_every_step(self, trained: House) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(trained.root / "events"), size_guidance={"scalars": 0})
        events.Reload()
        losses = [event.value for event in events.Scalars("train/loss")]
        assert losses == pytest.approx(trained.losses("whole"), rel=1e-6)
        assert len(events.Scalars("held_out/bits_per_byte")) == 2

    def test_an_interrupted_run_ends_cleanly_and_resumes_bit_for_bit(self, trained: House) -> None:
        step = interrupt(trained, "cut", signal.SIGINT)
        with (trained.root / "cut" / "record.jsonl").open("a") as file:
            # what a crash leaves beyond the checkpoint: a step, and half of another
            late = next(r for r in trained.read("whole") if isinstance(r, StepRecord) and r.step == step + 1)
            records.append(file, [replace(late, loss=99.0)])
            file.write('{"schema":1,"record":"StepRe')
        assert f"going on after step {step}" in trained.succeed("train", "long.toml", "--resume", "cut")
        resumed, whole = trained.read("cut"), trained.read("whole")
        assert trained.losses("cut") == trained.losses("whole")
        metrics = [[r.value for r in run if isinstance(r, EvaluationRecord)] for run in (resumed, whole)]
        assert metrics[0] == metrics[1]
        assert [r.step for r in resumed if isinstance(r, StepRecord)] == list(range(1, STEPS + 1))
        assert sum(isinstance(r, RunRecord) for r in resumed) == 1
        assert sum(isinstance(r, EndRecord) for r in resumed) == 1

    def test_more_signals_do_no_harm_and_the_run_goes_on_in_another_precision(self, trained: House) -> None:
        step = interrupt(trained, "moved", signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
        before = (trained.root / "moved" / "record.jsonl").read_bytes()
        options = ("train", "long.toml", "--resume", "moved", "--precision", "32-true")
        require_one_line(trained.run(*options, "--seed", "1"), "seed = 0 then, seed = 1 now")
        assert (trained.root / "moved" / "record.jsonl").read_bytes() == before
        said = trained.succeed(*options)
        assert f"going on after step {step}" in said
        assert "from here on in 32-true: nothing was rounded" in said
        assert len(trained.losses("moved")) == STEPS
        assert trained.losses("moved")[:step] == trained.losses("whole")[:step]
        first, second = (r for r in trained.read("moved") if isinstance(r, PlanRecord))
        assert (Plan.parse(first.plan).name, Plan.parse(second.plan).name) == ("bf16-mixed", "32-true")
        assert second.why == f"on resuming after step {step}, in place of bf16-mixed: nothing was rounded"

    def test_a_folder_in_use_is_refused_until_its_process_is_dead(self, trained: House) -> None:
        process, record = trained.start("train", "long.toml", "--out", "both"), trained.root / "both" / "record.jsonl"
        while process.poll() is None and not (record.exists() and '"StepRecord"' in record.read_text()):
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
        for way in ("--resume", "--out"):
            require_one_line(trained.run("train", "long.toml", way, "both"), "both is in use by another process")
        process.kill()
        process.communicate(timeout=60)
        said = trained.succeed("train", "long.toml", "--resume", "both", "--recovery", "roll-back")
        assert "starting again at step 0" in said or "going on after step" in said
        assert trained.losses("both") == trained.losses("whole")
        *_, plan = (r for r in trained.read("both") if isinstance(r, PlanRecord))
        assert Plan.parse(plan.plan).recovery == "roll-back"

    def test_resuming_a_finished_run_changes_nothing(self, trained: House) -> None:
        before = {file.name: file.read_bytes() for file in (trained.root / "whole").iterdir()}
        assert "this run is finished" in trained.succeed("train", "long.toml", "--resume", "whole")
        assert {file.name: file.read_bytes() for file in (trained.root / "whole").iterdir()} == before

    def test_options_that_are_not_given_again_are_those_of_the_run(self, trained: House) -> None:
        trained.succeed(
            "train", "tiny.toml", "--steps", "4", "--precision", "bf16-mixed", "--set", "layers=1", "--out", "mine"
        )
        record = trained.root / "mine" / "record.jsonl"
        *lines, end = record.read_text().splitlines()
        assert '"finished"' in end
        record.write_text("\n".join(lines) + "\n")  # as if it had been killed before it wrote its end
        assert "going on after step 4" in trained.succeed("train", "tiny.toml", "--resume", "mine")
        refused = trained.run("train", "image-classification", "--resume", "mine")
        require_one_line(
            refused, "is a run of task text-generation; recipe 'image-classification' is image-classification"
        )

    def test_folders_with_brackets_are_printed_as_they_are(self, capsys: pytest.CaptureFixture[str]) -> None:
        end = EndRecord(step=3, reason="finished", peak_memory_bytes=1, skipped_steps=0)
        _tell_end(end, Path("runs/cnn[lr=0.1][/x]"), 3)
        assert capsys.readouterr().out == "kept in runs/cnn[lr=0.1][/x]\n"

    def test_a_run_that_was_killed_before_it_saved_starts_again(self, trained: House) -> None:
        (trained.root / "early").mkdir()
        with (trained.root / "early" / "record.jsonl").open("w") as file:
            records.append(file, [r for r in trained.read("whole") if getattr(r, "step", 0) < 9])
        said = trained.succeed("train", "long.toml", "--resume", "early")
        assert "no checkpoint is there yet: starting again at step 0" in said
        assert trained.losses("early") == trained.losses("whole")


def interrupt(house: House, folder: str, *signals: signal.Signals) -> int:
    """Start a run, send it signals that arrive together, and see it end as it should; gives the step it saved."""
    process, record = house.start("train", "long.toml", "--out", folder), house.root / folder / "record.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if record.exists() and record.read_text().count('"StepRecord"') >= 3:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    for number in signals:
        process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    said, complaints = process.communicate(timeout=120)
    assert (process.returncode, complaints) == (130, "")
    assert f"--resume {folder}" in said
    end = house.read(folder)[-1]
    assert isinstance(end, EndRecord)
    assert end.reason == "interrupted"
    assert 3 <= end.step < STEPS
    assert f"stopped after step {end.step} of {STEPS}" in said
    return end.step


class TestCompare:
    @pytest.fixture(scope="class")
    @classmethod
    def compared(cls, tmp_path_factory: pytest.TempPathFactory) -> House:
        house = House(tmp_path_factory.mktemp("compared") / "house")
        done = house.run(
            "compare", "tiny.toml", "--seeds", "1", "--arms", "fp32,halfstep", "--json", "out.json", "--page", "out.html",
            "--set", "steps=12", "--set", "evaluations=1",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        house.said = done.stdout
        return house

    def test_rehearsal_names_layers_and_says_what_it_leaves_out(self, tmp_path: Path) -> None:
        house = House(tmp_path / "house")
        done = house.run(
            "compare", "tiny.toml", "--seeds", "1", "--rehearse", "mxfp8-b200", "--json", "out.json", "--page", "out.html",
            "--set", "steps=12", "--set", "evaluations=1",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        values = load_strictly((house.root / "out.json").read_text())
        assert [arm["name"] for arm in values["arms"]][:2] == ["fp32", "halfstep"]
        harms = values["arms"][1]["harms"]
        assert harms and {harm["compute"] for harm in harms} == {"mxfp8_e4m3"}
        assert all(0 < harm["error"] < 0.1 for harm in harms)
        assert "SQNR in dB" in done.stdout
        assert "mxfp8-b200 is NVIDIA B200. Not rehearsed:" in done.stdout

    def test_a_rehearsal_that_is_not_known_is_refused(self, tmp_path: Path) -> None:
        done = House(tmp_path / "house").run("compare", "tiny.toml", "--rehearse", "fp8-h10")
        assert done.returncode != 0
        assert "did you mean 'fp8-h100'" in done.stderr
        assert "Traceback" not in done.stderr

    def test_json_is_strict_and_holds_what_a_reader_needs(self, compared: House) -> None:
        values = load_strictly((compared.root / "out.json").read_text())
        assert [arm["name"] for arm in values["arms"]] == ["fp32", "halfstep"]
        for arm in values["arms"]:
            assert isinstance(arm["verdict"], str)
            assert isinstance(arm["skipped_steps"], int)
            assert isinstance(arm["peak_memory_bytes"], int)
            for key in ("metric_mean", "metric_sd", "step_ms"):
                assert isinstance(arm[key], float)
                assert math.isfinite(arm[key])
        for table in (values["speedup"], values["memory_ratio"]):
            assert set(table) == {"fp32"}
            assert table["fp32"] > 0
        assert values["gate_works"] is True
        assert values["command"].startswith("halfstep compare tiny.toml")

    def test_table_and_page_are_written(self, compared: House) -> None:
        said = compared.said
        assert "halfstep" in said
        assert "the gate works" in " ".join(said.split())
        assert "curves: out.html" in said
        assert "</svg>" in (compared.root / "out.html").read_text()

    def test_report_shows_the_stored_result_again(self, compared: House) -> None:
        said = compared.succeed("report", "out.json", "--page", "again.html")
        assert said.strip() in compared.said
        assert (compared.root / "again.html").read_text() == (compared.root / "out.html").read_text()


def leave(house: House) -> None:
    """The house as it is."""


def make_folder(house: House) -> None:
    (house.root / "empty").mkdir()


def make_file(house: House) -> None:
    (house.root / "file").write_text("a regular file")


def misspell_key(house: House) -> None:
    text = (house.root / "tiny.toml").read_text().replace("batch_size", "batchsize")
    (house.root / "tiny.toml").write_text(text)


def write_plan(house: House) -> None:
    (house.root / "plan.toml").write_text('[[rule]]\npath = "blokcs.0.qkv"\ncompute = "bf16"\n')


BAD_INPUT: dict[str, tuple[Callable[[House], None], str, str]] = {
    "missing data path": (leave, "train tiny.toml --out run --data nowhere", "nowhere"),
    "empty corpus": (make_folder, "train tiny.toml --out run --data empty", "'empty' gives 0 bytes"),
    "output folder below a file": (make_file, "train tiny.toml --out file/run", "file/run cannot be written"),
    "events below a file": (make_file, "train tiny.toml --out run --tensorboard file/events", "file/events"),
    "unknown recipe key": (misspell_key, "train tiny.toml --out run", "did you mean 'batch_size'"),
    "unknown precision": (leave, "train tiny.toml --out run --precision bf61-mixed", "did you mean 'bf16-mixed'"),
    "negative interval of saving": (leave, "train tiny.toml --out run --save-every -1", "--save-every takes"),
    "recipe that is missing": (leave, "train nowhere.toml", "there is no file 'nowhere.toml'; give the path"),
    "data for digits": (leave, "train image-classification --data nowhere", "the digits come with scikit-learn"),
    "images that are missing": (make_folder, "plan resnet-cifar10 --data empty", "there is no 'empty/train.parquet'"),
    "unknown recovery": (leave, "train tiny.toml --out run --recovery rollback", "did you mean 'roll-back'"),
    "unknown format": (leave, "train tiny.toml --out run --precision compute=bf61", "did you mean 'bf16'"),
    "unknown layer path": (write_plan, "plan tiny.toml --precision plan.toml", "did you mean 'blocks.0.qkv'"),
    "unknown device": (leave, "train tiny.toml --out run --device gpu", "gpu"),
    "unknown precision of an arm": (
        leave,
        "compare tiny.toml --set precision=bf61 --seeds 1",
        "unknown precision 'bf61'",
    ),
    "unknown arm": (leave, "compare tiny.toml --arms fp32,halfstop", "did you mean 'halfstep'"),
    "page below a file": (
        make_file,
        "compare tiny.toml --arms fp32 --seeds 1 --page file/out.html",
        "file/out.html cannot be written",
    ),
    "json in no folder": (leave, "probe --quick --json nowhere/out.json", "nowhere/out.json cannot be written"),
    "folder without a run": (make_folder, "train tiny.toml --resume empty", "empty/checkpoint"),
    "result that is missing": (leave, "report nowhere.json", "nowhere.json"),
    "result of another kind": (leave, "report tiny.toml", "not a JSON object"),
}


def require_one_line(done: "subprocess.CompletedProcess[str]", said: str) -> None:
    assert done.returncode not in (0, 1), done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


class TestBadInput:
    @pytest.mark.parametrize("case", BAD_INPUT)
    def test_is_one_line_that_says_what_to_do(self, house: House, case: str) -> None:
        prepare, command, said = BAD_INPUT[case]
        prepare(house)
        require_one_line(house.run(*command.split()), said)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    def test_a_device_that_is_not_there_is_one_line(self, house: House) -> None:
        require_one_line(house.run("train", "tiny.toml", "--out", "run", "--device", "cuda"), "cuda")

    def test_debug_shows_the_traceback(self, house: House) -> None:
        done = house.run("--debug", "train", "nowhere.toml")
        assert done.returncode != 0
        assert "Traceback" in done.stderr
        assert "RecipeError: there is no file 'nowhere.toml'" in done.stderr

    def test_a_truncated_checkpoint_is_one_line(self, trained: House) -> None:
        checkpoint = trained.root / "broken" / "checkpoint.safetensors"
        checkpoint.parent.mkdir()
        checkpoint.write_bytes((trained.root / "whole" / "checkpoint.safetensors").read_bytes()[:-100])
        require_one_line(trained.run("train", "long.toml", "--resume", "broken"), "broken/checkpoint.safetensors")

    def test_a_checkpoint_of_another_model_is_one_line(self, trained: House) -> None:
        done = trained.run("train", "long.toml", "--resume", "whole", "--set", "width=64")
        require_one_line(done, "was started with other options")

    def test_a_folder_that_holds_a_run_is_not_overwritten(self, trained: House) -> None:
        before = (trained.root / "whole" / "record.jsonl").read_bytes()
        require_one_line(trained.run("train", "long.toml", "--out", "whole"), "holds a run already")
        assert (trained.root / "whole" / "record.jsonl").read_bytes() == before
