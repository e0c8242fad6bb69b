"""Recipes: task, precision and settings in a TOML file. Data only; unknown keys are errors.

    task = "text-generation"
    precision = "auto"
    recovery = "roll-back"    left out: what the plan says
    [train]     training.TrainSettings
    [options]   the Options of the task

A recipe is named by the path of a file, or by the name of one of those that come with halfstep.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from halfstep.control.controller import Policy, find_policy
from halfstep.errors import PlanError, RecipeError, describe_unknown
from halfstep.tasks import image_classification, text_generation
from halfstep.training import Task, TrainSettings

TASKS: dict[str, tuple[type, type]] = {
    "text-generation": (text_generation.TextGeneration, text_generation.Options),
    "image-classification": (image_classification.ImageClassification, image_classification.Options),
}
FOLDER = Path(__file__).with_name("recipes")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe, read and checked."""

    name: str
    task: str
    precision: str
    train: TrainSettings
    options: Any
    recovery: Policy | None = None  # None: what the plan says

    def build_task(self, device: str = "cpu") -> Task:
        task: Task = TASKS[self.task][0](self.options, self.train, device)
        return task

    def __str__(self) -> str:
        """The recipe as TOML, every value stated."""
        head = {"task": self.task, "precision": self.precision} | ({"recovery": self.recovery} if self.recovery else {})
        return tomli_w.dumps(head | {"train": asdict(self.train), "options": asdict(self.options)})


def list_recipes() -> list[str]:
    """Names of the recipes that come with halfstep."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or path, with `key=value` overrides.

    Examples:
        >>> load_recipe("text-generation", ["layers=2"]).options.layers
        2

    Raises RecipeError, naming the nearest word, for an unknown recipe, task or key, and for a value of the wrong kind.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.exists():
        if name.endswith(".toml"):
            raise RecipeError(
                f"there is no file '{name}'; give the path of a recipe, or the name of one: {', '.join(list_recipes())}"
            )
        raise RecipeError(f"{describe_unknown('recipe', name, list_recipes())}; or give the path of a .toml file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    return parse_recipe(values, path.stem, overrides)


def parse_recipe(values: Mapping[str, Any], name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from its tables. Raises RecipeError."""
    allowed = ("task", "precision", "recovery", "train", "options")
    for key in values:
        if key not in allowed:
            raise RecipeError(f"recipe '{name}': {describe_unknown('key', key, allowed)}")
    task = values.get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise RecipeError(f"recipe '{name}': {describe_unknown('task', task, TASKS)}")
    for key in ("train", "options"):
        if not isinstance(values.get(key, {}), Mapping):
            raise RecipeError(f"recipe '{name}': {key} is a table of settings; got {values[key]!r:.60}")
    tables = {"train": dict(values.get("train", {})), "options": dict(values.get("options", {}))}
    plan = {"precision": "auto"} | {key: str(values[key]) for key in ("precision", "recovery") if key in values}
    kinds = {"train": TrainSettings, "options": TASKS[task][1]}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"an override is written key=value; got '{override}'")
        if key in ("precision", "recovery"):
            plan[key] = value
            continue
        home = next((table for table, kind in kinds.items() if key in _names(kind)), None)
        if home is None:
            raise RecipeError(
                f"recipe '{name}': {describe_unknown('key', key, [n for k in kinds.values() for n in _names(k)])}"
            )
        tables[home][key] = value
    train = _check(TrainSettings, tables["train"], name)
    if train.steps % train.accumulate:
        raise RecipeError(f"recipe '{name}': steps={train.steps} is no multiple of accumulate={train.accumulate}")
    return Recipe(
        name=name,
        task=task,
        precision=plan["precision"],
        train=train,
        options=_check(kinds["options"], tables["options"], name),
        recovery=_read_recovery(plan.get("recovery"), name),
    )


def _read_recovery(word: str | None, name: str) -> Policy | None:
    try:
        return find_policy(word) if word else None
    except PlanError as error:
        raise RecipeError(f"recipe '{name}': {error}") from None


def _names(kind: type) -> list[str]:
    return [f.name for f in fields(kind)]


def _check(kind: type, table: Mapping[str, Any], name: str) -> Any:
    """A dataclass from a table; numbers may come as text from the command line."""
    for key in table:
        if key not in _names(kind):
            raise RecipeError(f"recipe '{name}': {describe_unknown('key', key, _names(kind))}")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        value = adapter.validate_python(dict(table))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        raise RecipeError(f"recipe '{name}': {key}={problem['input']!r:.60}: {problem['msg']}") from None
    return value
