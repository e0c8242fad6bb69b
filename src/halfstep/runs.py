"""What `halfstep train` does with a folder: begin a run in it, or take over the one that is there; and train to the end.

A run goes on only as what it began as: its task, the recipe's file and the options of the command are compared with what stands
at its head, all but precision and recovery.
"""

import datetime
import json
import signal
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from halfstep import records
from halfstep.errors import CheckpointError
from halfstep.machine.hardware import name_machine
from halfstep.machine.runtime import use_channels_last
from halfstep.report.progress import follow_run
from halfstep.stepper import prepare
from halfstep.tasks.recipe import Recipe, load_recipe, parse_recipe
from halfstep.training import Run, build_optimizer, build_schedule


def _read_head(folder: Path) -> records.RunRecord | None:
    """What stands at the head of the run in a folder; None where there is none."""
    record = folder / "record.jsonl"
    head = next(records.read(record), None) if record.exists() else None
    return head if isinstance(head, records.RunRecord) else None


def read_file(recipe: str) -> Recipe | None:
    """A recipe of the user's own as its file has it; None for one that comes with halfstep."""
    return load_recipe(recipe) if recipe.endswith(".toml") else None


def take_over(folder: Path, recipe: Recipe, given: Sequence[str], file: Recipe | None) -> Recipe:
    """The recipe of the run that is resumed, with the options that are given now.

    file: what the recipe's file has now, where it is the user's own.

    Raises CheckpointError, naming what differs, for another task, for a file that has changed, and for options that would make
    it another run: all but precision and recovery.
    """
    head = _read_head(folder)
    if head is None:
        return recipe
    if head.task != recipe.task:
        raise CheckpointError(f"{folder} is a run of task {head.task}; recipe '{recipe.name}' is {recipe.task}")

    def read(text: str, overrides: Sequence[str] = ()) -> Recipe:
        return parse_recipe(tomllib.loads(text), recipe.name, overrides)

    if head.recipe_file and file and (changed := _list_changes(read(head.recipe_file), file)):
        raise CheckpointError(
            f"{recipe.name}.toml has changed since {folder} was started: {changed}; put it back, or begin another run; precision "
            "and recovery can be changed by --precision and --recovery"
        )
    before, now = read(head.recipe), read(head.recipe, given)
    if changed := _list_changes(before, replace(now, precision=before.precision, recovery=before.recovery)):
        raise CheckpointError(
            f"{folder} was started with other options: {changed}; give the same ones; only --precision and --recovery may change"
        )
    return now


def _list_changes(before: Recipe, now: Recipe) -> str:
    """What two recipes of one task differ in; "" where in nothing."""
    then, later = (
        {"precision": r.precision, "recovery": r.recovery, **asdict(r.train), **asdict(r.options)}
        for r in (before, now)
    )
    return "; ".join(
        f"{key} = {json.dumps(then[key])} then, {key} = {json.dumps(later[key])} now"
        for key in then
        if then[key] != later[key]
    )


def names(key: str, given: Sequence[str]) -> bool:
    """Whether overrides say something of a key."""
    return any(word.startswith(f"{key}=") for word in given)


def build_run(recipe: Recipe, folder: Path, device: str, *, keeps_policy: bool) -> Run:
    """keeps_policy: what is done about failures is what the checkpoint says, where there is one."""
    task, settings = recipe.build_task(device), recipe.train
    model = task.build_model()
    use_channels_last(model)
    optimizer = build_optimizer(model, settings, fused=True)
    has_policy = keeps_policy and (folder / "checkpoint.safetensors").exists()
    stepper = prepare(
        model, optimizer, recipe.precision, accumulate=settings.accumulate, clip=settings.clip or None,
        schedulers=build_schedule(optimizer, settings), recovery=None if has_policy else recipe.recovery,
    )  # fmt: skip
    stepper.conversion.masters.seed = settings.seed
    return Run(task, stepper, settings, folder, name=f"{recipe.name}, {recipe.task}")


def describe_run(recipe: Recipe, process: dict[str, str], device: str, file: Recipe | None) -> records.RunRecord:
    """The head of a new run."""
    return records.RunRecord(
        task=recipe.task, arm="halfstep", precision=recipe.precision, seed=recipe.train.seed, steps=recipe.train.steps,
        recipe=str(recipe), recipe_file=str(file or ""), machine=name_machine(device), torch_version=torch.__version__,
        threads=torch.get_num_threads(), settings=process,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def drive(run: Run, save_every: int, tensorboard: Path | None, console: Console) -> records.EndRecord:
    """Train to the end, or to a signal; what the signals did before is restored."""

    def stop(_signal: int, _frame: Any) -> None:
        run.stop = True

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return follow_run(run.drive(save_every=save_every), run.settings.steps, run.task.metric, console, tensorboard)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
