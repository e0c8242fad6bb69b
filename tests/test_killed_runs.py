"""Runs that are killed at any moment (`kill -9`) lose nothing but the steps since the last checkpoint."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from halfstep import records
from halfstep.checkpoint import load_checkpoint, pack
from halfstep.records import EndRecord, EvaluationRecord, RunRecord, StepRecord
from helpers import SPLIT, assert_same

KILLS = 50
FILES = {"checkpoint.safetensors", "checkpoint.safetensors.part", "record.jsonl", "record.part", ".lock"}


class Zygote:
    """The process of zygote.py; `begin` starts a life in it."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # CUDA does not survive a fork
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))], env=environment, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.read("loaded")

    def read(self, *expected: str) -> int:
        """The number in the next line, which has to begin with one of some words; -1 for `end`."""
        assert self.process.stdout is not None
        word, _, number = self.process.stdout.readline().decode().strip().partition(" ")
        assert word in expected, f"the trainer says '{word} {number}'"
        return int(number or -1)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    def begin(self, folder: Path, precision: str, overrides: list[str], last_effect: int = 0) -> int:
        """Start a life; gives its process."""
        order = {"folder": str(folder), "precision": precision, "overrides": overrides, "last_effect": last_effect}
        self.tell(json.dumps(order))
        return self.read("pid")

    def finish(self, folder: Path, precision: str, overrides: list[str]) -> None:
        """A life that goes on to its end."""
        self.begin(folder, precision, overrides)
        while self.read("step", "end") > 0:
            self.tell("")
        self.tell("")
        assert self.read("gone") == 0


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    assert zygote.process.stdin is not None and zygote.process.stdout is not None
    zygote.process.stdin.close()
    assert zygote.process.wait(timeout=60) == 0
    zygote.process.stdout.close()


def read_saved_step(folder: Path) -> int:
    path = folder / "checkpoint.safetensors"
    return int(load_checkpoint(path)["done"]) if path.exists() else 0


def read_run(folder: Path) -> tuple[list[float], list[float]]:
    """Losses and metrics of a whole record; it has one head, one end, and every step once and in order."""
    run = list(records.read(folder / "record.jsonl"))
    steps = [r for r in run if isinstance(r, StepRecord)]
    assert [r.step for r in steps] == list(range(1, len(steps) + 1))
    assert [i for i, r in enumerate(run) if isinstance(r, RunRecord)] == [0]
    ends = [r for r in run if isinstance(r, EndRecord)]
    assert [end.reason for end in ends] == ["finished"] and ends[0] is run[-1]
    return [r.loss for r in steps], [r.value for r in run if isinstance(r, EvaluationRecord)]


def assert_ended_alike(folder: Path, whole: Path) -> None:
    """The same losses and metrics, and the same checkpoint bit for bit, time aside; and nothing beside them."""
    assert {file.name for file in folder.iterdir()} == {"checkpoint.safetensors", "record.jsonl", ".lock"}
    assert read_run(folder) == read_run(whole)
    states: list[dict[str, Any]] = [load_checkpoint(f / "checkpoint.safetensors") for f in (folder, whole)]
    taken: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    packed = [pack(s | {"train_seconds": 0.0}, t) for s, t in zip(states, taken, strict=True)]
    assert packed[0] == packed[1]
    assert_same(taken[0], taken[1])


def assert_nothing_is_lost(folder: Path, seen: int, before: int) -> int:
    """After a kill; `seen` is the last step that the life reported. Gives the step that can be gone on from."""
    saved = read_saved_step(folder)
    assert saved >= max(before, seen - 1)
    if (folder / "record.jsonl").exists():
        recorded = [r.step for r in records.read(folder / "record.jsonl") if isinstance(r, StepRecord)]
        assert recorded == list(range(1, len(recorded) + 1))
        assert len(recorded) >= max(saved, seen)
    else:
        assert saved == seen == 0
    if folder.exists():
        assert {file.name for file in folder.iterdir()} <= FILES
    return saved


@pytest.mark.parametrize("precision", ["bf16-mixed", SPLIT], ids=["bf16-mixed", "split"])
def test_run_that_is_killed_fifty_times_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, zygote: Zygote, precision: str
) -> None:
    overrides = [f"steps={4 * KILLS}", "batch_size=8", "evaluations=4", "accumulate=2", "schedule=cosine"]
    zygote.finish(tmp_path / "whole", precision, overrides)
    folder, noise, saved = tmp_path / "killed", random.Random(precision), 0
    usual = {"start": 0.05, "step": 0.01}  # seconds, followed as they are seen
    for _ in range(KILLS):
        asked, child = noise.randrange(4), zygote.begin(folder, precision, overrides)
        seen, place, began = 0, "start", time.monotonic()
        for _ in range(asked):
            seen = zygote.read("step")
            usual[place] += 0.2 * (time.monotonic() - began - usual[place])
            zygote.tell("")
            place, began = "step", time.monotonic()
        time.sleep(max(0.0, 1.2 * noise.random() * usual[place]))
        os.kill(child, signal.SIGKILL)
        while (said := zygote.process.stdout.readline().decode().split())[0] != "gone":  # type: ignore[union-attr]
            assert said[0] == "step"
            seen = int(said[1])
        assert int(said[1]) == signal.SIGKILL
        saved = assert_nothing_is_lost(folder, seen, saved)
    assert saved < 4 * KILLS
    zygote.finish(folder, precision, overrides)
    assert_ended_alike(folder, tmp_path / "whole")


def test_run_that_dies_within_any_of_its_effects_on_the_disk_equals_an_uninterrupted_one(
    tmp_path: Path, zygote: Zygote
) -> None:
    overrides = ["steps=3", "batch_size=8", "evaluations=1"]
    zygote.finish(tmp_path / "whole", SPLIT, overrides)
    status, effects = -1, 0
    while status != 0:
        effects += 1
        folder, seen = tmp_path / f"effect{effects}", 0
        zygote.begin(folder, SPLIT, overrides, last_effect=effects)
        while (said := zygote.process.stdout.readline().decode().split())[0] != "gone":  # type: ignore[union-attr]
            seen = int(said[1]) if said[0] == "step" else seen
            zygote.tell("")
        status = int(said[1])
        assert status in (0, signal.SIGKILL)
        assert_nothing_is_lost(folder, seen, 0)
        if status:
            zygote.finish(folder, SPLIT, overrides)
        assert_ended_alike(folder, tmp_path / "whole")
    assert effects > 20
