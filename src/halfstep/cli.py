"""The command `halfstep`: parse, one public call, print.

Errors of halfstep are one line on stderr and exit code 2; `--debug` shows the traceback. Heavy imports wait for the
command that needs them, so that `halfstep --help` answers at once.
"""

import dataclasses
import datetime
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from halfstep import records
from halfstep.errors import HalfstepError, RecipeError, RecordError

if TYPE_CHECKING:
    from halfstep.records import Record
    from halfstep.tasks.recipe import Recipe
    from halfstep.training import Run

app = typer.Typer(
    help="Train neural networks in mixed precision: measured, safe, and proved against fp32.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
console = Console(soft_wrap=False, markup=False)  # a path may hold brackets

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="Name of a recipe that comes with halfstep, or the path of a .toml file."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the recipe; may be repeated."),
]
Data = Annotated[
    str | None, typer.Option("--data", metavar="PATH", help="File or folder to train on; the same as --set data=PATH.")
]
Precision = Annotated[str | None, typer.Option("--precision", help="auto, a precision name, or a plan file.")]
RecoveryName = Annotated[
    str | None,
    typer.Option(
        "--recovery",
        metavar="POLICY",
        help="What is done about steps that keep failing: skip, back-off, roll-back, widen or stop; default: as the plan says.",
    ),
]
StepCount = Annotated[int | None, typer.Option("--steps", help="Training steps; the same as --set steps=N.")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON; '-' is standard output.")
]
DEFAULT_ARMS = "fp32,torch-amp,torch-amp-tuned,halfstep"
Arms = Annotated[
    str,
    typer.Option(help="Comma-separated: fp32, fp32-tuned, torch-amp, torch-amp-tuned, halfstep, halfstep:PLAN."),
]
Target = Annotated[
    float | None, typer.Option(help="Metric for 's to target'; default: fp32's, loosened by the margin.")
]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]


def main() -> NoReturn:
    """Run the command and turn errors into one line."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app(args=[a for a in arguments if a != "--debug"], prog_name="halfstep", standalone_mode=True)
    except (HalfstepError, OSError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Train neural networks in mixed precision: measured, safe, and proved against fp32."""


def _load(name: str, overrides: list[str] | None, **shorthands: object) -> "Recipe":
    from halfstep.tasks.recipe import load_recipe

    return load_recipe(name, [*(overrides or []), *_spell(**shorthands)])


def _spell(**shorthands: object) -> list[str]:
    """Options that were given, as overrides."""
    return [f"{key}={value}" for key, value in shorthands.items() if value is not None]


def _write_json(record: "Record", target: Path | None) -> None:
    if target is None:
        return
    text = records.encode(record) + "\n"
    if str(target) == "-":
        sys.stdout.write(text)
        return
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{target} cannot be written ({error.strerror}); give another --json") from None


def _require_writable(*paths: Path | None) -> None:
    """Find out before the work, not after it. Raises RecordError."""
    for path in paths:
        if path is None or str(path) == "-":
            continue
        folder = path.absolute().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise RecordError(f"{path} cannot be written; give a file in a folder that exists and may be written")


@app.command()
def probe(
    json: Json = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to keep the profile; default: the cache folder.")
    ] = None,
    device: Device = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="3 seconds: fewer shapes, no convolutions.")] = False,
) -> None:
    """Time this machine and say for each number format whether it pays here."""
    from halfstep.machine.hardware import probe_hardware
    from halfstep.machine.profiles import locate_profile, save_profile
    from halfstep.report.terminal import show_profile

    _require_writable(json)
    profile = probe_hardware(device, quick=quick)
    path = out or locate_profile(device)
    save_profile(profile, path)
    if str(json) != "-":
        console.print(show_profile(profile))
        console.print(f"kept in {path}", soft_wrap=True)
    _write_json(profile, json)


@app.command()
def plan(
    recipe: RecipeName,
    precision: Precision = None,
    overrides: Overrides = None,
    data: Data = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Write the plan (.toml, .json, or text).")
    ] = None,
) -> None:
    """Show which formats each layer of a recipe's model gets on this machine, and why."""
    from halfstep.control.sensitivity import choose_plan
    from halfstep.control.trials import leave_no_trace
    from halfstep.conversion import convert
    from halfstep.machine.profiles import get_profile
    from halfstep.machine.runtime import tune_process, use_channels_last
    from halfstep.report.terminal import show_plan
    from halfstep.stepper import read_plan

    _require_writable(save)
    loaded = _load(recipe, overrides, precision=precision, data=data)
    task = loaded.build_task()
    model = task.build_model()
    use_channels_last(model)
    why = ""
    chosen = read_plan(loaded.precision)
    if chosen.rest == "auto":
        with tune_process():
            choice = choose_plan(model, (task.make_batch(1)[0],), profile=get_profile(), given=chosen)
        chosen, why = choice.plan, choice.why
    if chosen.saved_budget:
        why = f"formats for saved activations are chosen when the first batch arrives, within {chosen.saved_budget}"
    with convert(model, dataclasses.replace(chosen, saved_budget="")) as conversion:
        if chosen.functions == "fast":  # which ones are called shows as they are
            with leave_no_trace(model), conversion.autocast():
                task.measure_loss(model, task.make_batch(1))
        console.print(show_plan(dataclasses.replace(conversion.make_record(why=why), plan=str(chosen))))
    if save is not None:
        chosen.save(save)


@app.command()
def train(
    recipe: RecipeName,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where the run is kept; default: runs/RECIPE-DATE.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FOLDER", help="Go on with the run in this folder.")
    ] = None,
    precision: Precision = None,
    recovery: RecoveryName = None,
    steps: StepCount = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of weights and data order.")] = None,
    data: Data = None,
    overrides: Overrides = None,
    save_every: Annotated[
        int, typer.Option("--save-every", help="Steps between checkpoints; 0: only at the end.")
    ] = 100,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", metavar="FOLDER", help="Also write TensorBoard events.")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Train a recipe. Ctrl-C saves and ends; --resume goes on exactly where it stopped.

    With --precision, --resume goes on in another precision, from the fp32 weights, and says what that rounds; with
    --recovery under another policy.
    """
    from halfstep.machine.hardware import require_device
    from halfstep.machine.runtime import tune_process
    from halfstep.runs import build_run, describe_run, drive, names, read_file, take_over

    if out is not None and resume is not None:
        raise RecipeError("give --out for a new run or --resume for an old one, not both")
    if save_every < 0:
        raise RecipeError(f"--save-every takes a number of steps, or 0 to save only at the end; got {save_every}")
    require_device(device)
    given = [
        *(overrides or []),
        *_spell(precision=precision, recovery=recovery, steps=steps, seed=seed, data=data),
    ]
    loaded = _load(recipe, given)
    if resume is not None:
        loaded = take_over(resume, loaded, given, read_file(recipe))
    folder = resume or out or Path("runs") / f"{loaded.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    with tune_process() as process:
        run = build_run(loaded, folder, device, keeps_policy=resume is not None and not names("recovery", given))
        if resume is None:
            run.begin(describe_run(loaded, process, device, read_file(recipe)))
        elif not _go_on(run, loaded.precision if names("precision", given) else None):
            return
        end = drive(run, save_every, tensorboard, console)
    _tell_end(end, folder, loaded.train.steps)


def _go_on(run: "Run", precision: str | None) -> bool:
    """Bring a run to where it stopped, in another precision where one is given; False when it is finished."""
    end = run.find_end()
    if end is not None and end.reason == "finished":
        console.print("this run is finished; nothing to do")
        return False
    rounding = run.resume(precision)
    after = f"going on after step {run.done}"
    console.print(after if run.done else "no checkpoint is there yet: starting again at step 0")
    if rounding is not None:
        console.print(f"from here on in {precision}: {rounding}", soft_wrap=True)
    return True


def _tell_end(end: records.EndRecord, folder: Path, steps: int) -> None:
    """Raises typer.Exit for a run that was interrupted."""
    console.print(f"kept in {folder}", soft_wrap=True)
    if 10 * end.skipped_steps > end.step:
        console.print(f"{end.skipped_steps} steps were skipped: this run has hardly trained; see the causes above")
    if end.reason == "interrupted":
        again = shlex.join(["halfstep", *_drop_options(sys.argv[1:], "--out", "--resume"), "--resume", str(folder)])
        console.print(f"stopped after step {end.step} of {steps}; go on with: {again}", soft_wrap=True)
        raise typer.Exit(130)


def _drop_options(words: list[str], *names: str) -> list[str]:
    """A command's words without some options and their values."""
    kept = [w for w, before in zip(words, ["", *words], strict=False) if w not in names and before not in names]
    return [w for w in kept if not w.startswith(tuple(f"{name}=" for name in names))]


@app.command()
def compare(
    recipe: RecipeName,
    arms: Arms = DEFAULT_ARMS,
    seeds: Annotated[int, typer.Option("--seeds", help="Paired seeds; the equivalence test needs two or more.")] = 3,
    steps: StepCount = None,
    data: Data = None,
    recovery: RecoveryName = None,
    overrides: Overrides = None,
    target: Target = None,
    json: Json = None,
    page: Annotated[Path | None, typer.Option("--page", metavar="FILE", help="Where the HTML page goes.")] = Path(
        "compare.html"
    ),
    rehearse: Annotated[
        str | None,
        typer.Option(
            "--rehearse",
            metavar="HARDWARE",
            help="Train with the numerics of hardware that is not here: fp8-h100, ..., or of a plan file.",
        ),
    ] = None,
    repaired: Annotated[
        Path, typer.Option("--repaired", metavar="FILE", help="Where the plan goes that mends a rehearsal.")
    ] = Path("repaired.toml"),
) -> None:
    """Train a recipe in fp32, torch.amp and halfstep from paired seeds: was it faster, was it smaller, did accuracy hold?

    With --rehearse, in fp32 and as other hardware would: does the model survive it, which layers do not, what mends it?
    """
    from dataclasses import replace

    from halfstep import comparison
    from halfstep.arms import require_arms
    from halfstep.rehearsals import find_rehearsal
    from halfstep.report.page import write_page
    from halfstep.report.progress import follow_comparison
    from halfstep.report.terminal import show_comparison
    from halfstep.stepper import read_plan
    from halfstep.training import evaluation_steps

    rehearsal = find_rehearsal(rehearse) if rehearse else None
    if rehearsal and arms == DEFAULT_ARMS:
        arms = "fp32,halfstep"
    names = [name.strip() for name in arms.split(",")]
    require_arms(names)
    if rehearsal and "halfstep" not in names:
        raise RecipeError(f"--rehearse is for the arm 'halfstep'; got --arms {arms}; add it")
    _require_writable(json, page, repaired if rehearsal else None)
    loaded = _load(
        recipe,
        overrides,
        precision=str(rehearsal.plan) if rehearsal else None,
        steps=steps,
        data=data,
        recovery=recovery,
    )
    read_plan(loaded.precision)  # raises here what would end an arm after others have trained
    task = loaded.build_task()

    def compare_arms(recipe: "Recipe", names: list[str]) -> comparison.ComparisonRecord:
        total = seeds * (len(names) * loaded.train.steps + min(evaluation_steps(loaded.train)))
        with follow_comparison(total, Console(stderr=True, markup=False)) as notify:
            return comparison.compare(
                str(recipe),
                recipe.name,
                task.metric,
                recipe.train,
                arms=names,
                seeds=seeds,
                target=target,
                notify=notify,
            )

    result = replace(compare_arms(loaded, names), command=shlex.join(["halfstep", *sys.argv[1:]]))
    if rehearsal:
        _write_json(result, None if str(json) == "-" else json)  # what comes now may be stopped, and this was the work
        result, mended = comparison.compare_repaired(
            result,
            rehearsal.plan,
            lambda plan: compare_arms(replace(loaded, precision=str(plan)), ["fp32", "halfstep"]),
        )
        if mended:
            mended.save(repaired)
            console.print(
                f"{len(mended.rules) - len(rehearsal.plan.rules)} layers kept wider; the plan: {repaired}",
                soft_wrap=True,
            )
    if str(json) != "-":
        console.print(show_comparison(result))
        if rehearsal:
            console.print(f"{rehearsal.name} is {rehearsal.hardware}. Not rehearsed: {rehearsal.differs}.")
    _write_json(result, json)
    if page is not None:
        write_page(result, page)
        if str(json) != "-":
            console.print(f"curves: {page}", soft_wrap=True)
    if not result.gate_works or any(arm.failure for arm in result.arms):
        raise typer.Exit(1)


@app.command()
def report(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="What `halfstep compare --json` or `halfstep probe --json` wrote.")
    ],
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Also write the HTML page of a comparison.")
    ] = None,
) -> None:
    """Show a stored result again."""
    from halfstep.records import ComparisonRecord, HardwareProfile
    from halfstep.report.page import write_page
    from halfstep.report.terminal import show_comparison, show_profile

    try:
        record = records.decode(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{source} cannot be read: {error}") from None
    if isinstance(record, ComparisonRecord):
        console.print(show_comparison(record))
        if page is not None:
            write_page(record, page)
    elif isinstance(record, HardwareProfile):
        console.print(show_profile(record))
    else:
        raise RecordError(f"{source} holds a {type(record).__name__}; give a comparison or a profile")


@app.command(hidden=True)
def worker(recipe: RecipeName, arm: Annotated[str, typer.Option()], seed: Annotated[int, typer.Option()]) -> None:
    """One arm of a comparison; `compare` starts these and tells them over standard input when to run."""
    from halfstep.arms import work

    loaded = _load(recipe, None, seed=seed)
    task = loaded.build_task()
    work(arm, task, loaded.train, loaded.precision, sys.stdin, sys.stdout, recovery=loaded.recovery)
