"""A run goes on as what it began as, or not at all."""

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from halfstep import records
from halfstep.errors import CheckpointError
from halfstep.records import EndRecord
from halfstep.runs import build_run, describe_run, drive, read_file, take_over
from halfstep.tasks.recipe import Recipe, load_recipe
from helpers import TINY_RECIPE


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 50)
    path = tmp_path / "mine.toml"
    path.write_text(TINY_RECIPE.format(data=str(text)))
    return path


def begin(recipe: Path, folder: Path, *given: str) -> None:
    loaded = load_recipe(str(recipe), given)
    run = build_run(loaded, folder, "cpu", keeps_policy=False)
    run.begin(describe_run(loaded, {}, "cpu", read_file(str(recipe))))


def take(recipe: Path, folder: Path, *given: str) -> Recipe:
    return take_over(folder, load_recipe(str(recipe), given), given, read_file(str(recipe)))


def test_options_of_the_run_need_not_be_given_again(recipe: Path, tmp_path: Path) -> None:
    begin(recipe, tmp_path / "run", "seed=7", "lr=0.5")
    for given in ((), ("seed=7",)):
        taken = take(recipe, tmp_path / "run", *given)
        assert (taken.train.seed, taken.train.lr) == (7, 0.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [(("seed=8",), "seed = 7 then, seed = 8 now"), (("width=64",), "width = 32 then, width = 64 now")],
)
def test_other_options_are_refused_by_name(recipe: Path, tmp_path: Path, given: Sequence[str], said: str) -> None:
    begin(recipe, tmp_path / "run", "seed=7")
    with pytest.raises(CheckpointError, match=said):
        take(recipe, tmp_path / "run", *given)


def test_precision_and_recovery_may_change(recipe: Path, tmp_path: Path) -> None:
    begin(recipe, tmp_path / "run")
    taken = take(recipe, tmp_path / "run", "precision=32-true", "recovery=stop")
    assert (taken.precision, taken.recovery) == ("32-true", "stop")


def test_a_recipe_file_that_has_changed_is_refused_by_name(recipe: Path, tmp_path: Path) -> None:
    begin(recipe, tmp_path / "run", "lr=0.5")
    before = recipe.read_text()
    recipe.write_text(before.replace("lr = 1e-2", "lr = 2e-2"))
    with pytest.raises(
        CheckpointError, match=r"mine\.toml has changed since .*: lr = 0\.01 then, lr = 0\.02 now; put it back"
    ):
        take(recipe, tmp_path / "run")
    recipe.write_text(before.replace('precision = "bf16-mixed"', 'precision = "bf16-mixed"\nrecovery = "stop"'))
    with pytest.raises(CheckpointError, match='recovery = null then, recovery = "stop" now'):
        take(recipe, tmp_path / "run")
    recipe.write_text(before + "# a remark\n")
    assert take(recipe, tmp_path / "run").train.lr == 0.5


def test_a_run_from_before_the_file_was_noted_goes_on(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(str(recipe))
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "record.jsonl").open("w") as file:
        records.append(file, [describe_run(loaded, {}, "cpu", None)])
    recipe.write_text(recipe.read_text().replace("lr = 1e-2", "lr = 2e-2"))
    assert take(recipe, tmp_path / "run").train.lr == 0.01


def test_a_recipe_that_comes_with_halfstep_is_no_file_of_the_users() -> None:
    assert read_file("text-generation") is None


def test_signals_do_after_a_run_what_they_did_before(recipe: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    begin(recipe, tmp_path / "run")
    run = build_run(load_recipe(str(recipe)), tmp_path / "run", "cpu", keeps_policy=False)
    end = drive(run, 0, None, Console(quiet=True))
    assert isinstance(end, EndRecord) and (end.reason, end.step) == ("finished", 12)
    assert signal.getsignal(signal.SIGTERM) is before
