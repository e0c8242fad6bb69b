"""A process that has torch and halfstep loaded and forks a trainer for every line it reads: a life of a run costs
milliseconds, so that it can be killed often.

    parent -> {"folder": ..., "precision": ..., "overrides": [...], "last_effect": ...}     a life begins
    zygote -> pid N
    child  -> step N             after every step; it waits for an empty line before it goes on
    child  -> end                after the last one; it waits again, so that it is there to be killed
    zygote -> gone STATUS

The child does what `halfstep train` does with the recipe image-classification: `--resume` where the folder holds a run,
`--out` where it does not. Before effect number `last_effect` on the disk is complete, it kills itself.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from halfstep import checkpoint, records
from halfstep.records import RunRecord, StepRecord
from halfstep.stepper import prepare
from halfstep.tasks.recipe import load_recipe
from halfstep.training import Run, build_optimizer, build_schedule

SAVE_EVERY = 1


def read_line() -> str:
    """A line of standard input, and nothing behind it: what follows may be for another process."""
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1) or sys.exit(0)
    return line.decode().strip()


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def open_run(folder: Path, precision: str, overrides: Sequence[str]) -> Run:
    """As `halfstep train` opens it."""
    recipe = load_recipe("image-classification", [f"precision={precision}", *overrides])
    task, settings = recipe.build_task(), recipe.train
    model = task.build_model()
    optimizer = build_optimizer(model, settings, fused=True)
    stepper = prepare(
        model, optimizer, precision, accumulate=settings.accumulate, schedulers=build_schedule(optimizer, settings)
    )
    run = Run(task, stepper, settings, folder, name="killed")
    if run.record.exists():
        run.resume()
    else:
        run.begin(
            RunRecord(task="image-classification", arm="halfstep", precision=precision, seed=0, steps=settings.steps,
                      recipe=str(recipe), machine="", torch_version=torch.__version__, threads=1, date="")
        )  # fmt: skip
    return run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_effect(last: int) -> None:
    """Count what is done to the disk, and die in the middle of number `last`, or before it where it has no middle."""
    done = 0

    def count(effect: Callable[..., Any], half: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == last:
                half(*args, **options)
                die()
            return effect(*args, **options)

        return counted

    def save_half(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata=metadata)
        os.truncate(path, path.stat().st_size // 2)
        path.with_name(".tmp7fA3bC").write_bytes(b"what safetensors leaves")

    def append_half(file: Any, some: Any) -> None:
        text = "".join(records.encode(record) + "\n" for record in some)
        file.write(text[: len(text) // 2])
        file.flush()

    def do_nothing(*_args: Any) -> None:
        pass

    save_file = checkpoint.save_file
    checkpoint.save_file = count(save_file, save_half)
    records.append = count(records.append, append_half)
    os.fsync = count(os.fsync, do_nothing)
    Path.replace = count(Path.replace, do_nothing)  # type: ignore[method-assign]


def live(order: dict[str, Any], *, alone: bool = False) -> None:
    """One life of a run; `alone` tells nobody and waits for nobody."""
    if order["last_effect"]:
        die_at_effect(order["last_effect"])
    run = open_run(Path(order["folder"]), order["precision"], order["overrides"])
    for record in run.drive(save_every=SAVE_EVERY):
        if isinstance(record, StepRecord) and not alone:
            say(f"step {record.step}")
            read_line()
    if not alone:
        say("end")
        read_line()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:  # imports that wait for their first use are done before the fork
        live({"folder": folder, "precision": "bf16-mixed", "overrides": ["steps=2"], "last_effect": 0}, alone=True)
    say("loaded")
    while True:
        order = read_line()
        if not order:
            continue  # meant for a child that was killed before it could read it
        child = os.fork()
        if child == 0:
            live(json.loads(order))
            os._exit(0)
        say(f"pid {child}")
        say(f"gone {os.waitpid(child, 0)[1]}")


if __name__ == "__main__":
    main()
