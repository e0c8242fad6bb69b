"""Recipes: reading, checking, overriding and writing them."""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.errors import HalfstepError, RecipeError
from halfstep.tasks.recipe import TASKS, list_recipes, load_recipe, parse_recipe
from halfstep.training import TrainSettings

TEXT: dict[str, Any] = {"task": "text-generation"}
IMAGES: dict[str, Any] = {"task": "image-classification"}


def read_refusal(values: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, "mine", overrides)
    said = str(caught.value)
    assert "\n" not in said
    return said


class TestShipped:
    @pytest.mark.parametrize("name", list_recipes())
    def test_every_recipe_loads(self, name: str) -> None:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.task in TASKS
        assert isinstance(recipe.train, TrainSettings)
        assert isinstance(recipe.options, TASKS[recipe.task][1])

    def test_there_is_one_for_each_task(self) -> None:
        assert {load_recipe(name).task for name in list_recipes()} == set(TASKS)

    @pytest.mark.parametrize("name", list_recipes())
    def test_the_text_of_a_recipe_reads_back_equal(self, name: str) -> None:
        recipe = load_recipe(name)
        assert parse_recipe(tomllib.loads(str(recipe)), name) == recipe

    @pytest.mark.parametrize("name", list_recipes())
    def test_the_text_of_a_recipe_states_every_value(self, name: str) -> None:
        recipe = load_recipe(name)
        values = tomllib.loads(str(recipe))
        assert set(values["train"]) == {f.name for f in fields(TrainSettings)}
        assert set(values["options"]) == {f.name for f in fields(TASKS[recipe.task][1])}


class TestFiles:
    def test_a_path_is_read_and_named_after_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text(
            'task = "text-generation"\nprecision = "bf16-mixed"\n[train]\nsteps = 7\n[options]\nlayers = 2\n'
        )
        recipe = load_recipe(str(path))
        assert (recipe.name, recipe.precision, recipe.train.steps, recipe.options.layers) == (
            "mine",
            "bf16-mixed",
            7,
            2,
        )
        assert recipe.train.batch_size == TrainSettings().batch_size

    def test_the_precision_is_auto_unless_said(self) -> None:
        assert parse_recipe(TEXT, "mine").precision == "auto"

    @pytest.mark.parametrize("content", [b"task = ", b'task = "\xff"', b"task = 'a'\ntask = 'b'"])
    def test_a_malformed_file_is_named(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "mine.toml"
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=r"mine\.toml cannot be read"):
            load_recipe(str(path))

    def test_a_folder_is_no_recipe(self, tmp_path: Path) -> None:
        (tmp_path / "mine.toml").mkdir()
        with pytest.raises(RecipeError, match=r"mine\.toml cannot be read"):
            load_recipe(str(tmp_path / "mine.toml"))

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"no file '.*gone\.toml'"):
            load_recipe(str(tmp_path / "gone.toml"))


class TestUnknownWords:
    def test_recipe(self) -> None:
        with pytest.raises(RecipeError, match=r"'text-generatoin'.*did you mean 'text-generation'"):
            load_recipe("text-generatoin")

    def test_task(self) -> None:
        assert "did you mean 'image-classification'" in read_refusal({"task": "image-clasification"})

    def test_no_task(self) -> None:
        assert "Allowed: image-classification, text-generation" in read_refusal({})

    def test_key_at_the_top(self) -> None:
        assert "unknown key 'precison'; did you mean 'precision'" in read_refusal(TEXT | {"precison": "bf16"})

    def test_key_in_train(self) -> None:
        assert "unknown key 'batchsize'; did you mean 'batch_size'" in read_refusal(TEXT | {"train": {"batchsize": 4}})

    def test_key_in_options(self) -> None:
        assert "unknown key 'layer'; did you mean 'layers'" in read_refusal(TEXT | {"options": {"layer": 4}})

    def test_key_of_another_task(self) -> None:
        assert "unknown key 'augment'" in read_refusal(TEXT | {"options": {"augment": True}})

    def test_key_in_an_override(self) -> None:
        assert "unknown key 'stesp'; did you mean 'steps'" in read_refusal(TEXT, "stesp=3")

    def test_word_where_a_few_are_allowed(self) -> None:
        said = read_refusal(TEXT | {"train": {"optimizer": "adamv"}})
        assert "optimizer='adamv'" in said
        assert "'adamw'" in said


class TestWrongValues:
    @pytest.mark.parametrize(
        ("values", "overrides"),
        [
            (TEXT | {"train": {"steps": "many"}}, ()),
            (TEXT | {"train": {"steps": 1.5}}, ()),
            (TEXT | {"train": {"steps": [3]}}, ()),
            (TEXT, ("steps=1e3x",)),
            (TEXT, ("steps=",)),
            (IMAGES, ("augment=maybe",)),
        ],
    )
    def test_a_value_of_the_wrong_type_is_named(self, values: dict[str, Any], overrides: tuple[str, ...]) -> None:
        said = read_refusal(values, *overrides)
        assert "recipe 'mine': " in said
        assert "steps=" in said or "augment=" in said

    @pytest.mark.parametrize(
        "values", [{"train": 3}, {"train": [1]}, {"options": "small"}, {"task": ["text-generation"]}]
    )
    def test_something_else_than_a_table_or_a_name_is_refused(self, values: dict[str, Any]) -> None:
        read_refusal(TEXT | values)

    @pytest.mark.parametrize("value", ["0", "-1"])
    @pytest.mark.parametrize("key", ["steps", "batch_size", "lr", "accumulate", "evaluations"])
    def test_a_train_setting_that_must_be_positive_is_named(self, key: str, value: str) -> None:
        assert f"{key}='{value}': Input should be greater than 0" in read_refusal(TEXT, f"{key}={value}")

    @pytest.mark.parametrize("value", ["0", "-1"])
    @pytest.mark.parametrize("key", ["layers", "width", "heads", "context", "held_out_sequences"])
    def test_an_option_that_must_be_positive_is_named(self, key: str, value: str) -> None:
        assert f"{key}='{value}': Input should be greater than 0" in read_refusal(TEXT, f"{key}={value}")

    @pytest.mark.parametrize(
        "override",
        [
            "lr=nan", "lr=inf", "weight_decay=-1", "clip=-1", "warmup=-1", "momentum=-1", "step_every=0", "margin=-1",
            "label_smoothing=2", f"seed={2**70}",
        ],
    )  # fmt: skip
    def test_a_value_that_no_training_can_use_is_refused(self, override: str) -> None:
        assert override.partition("=")[0] in read_refusal(IMAGES, override)

    def test_steps_that_accumulation_does_not_divide_are_refused(self) -> None:
        assert "steps=7 is no multiple of accumulate=2" in read_refusal(TEXT, "steps=7", "accumulate=2")


class TestOverrides:
    def test_reach_every_table_as_numbers_words_and_truths(self) -> None:
        recipe = parse_recipe(
            IMAGES | {"precision": "auto", "train": {"lr": 0.5}},
            "mine",
            ["lr=1e-2", "steps=12", "augment=true", "model=resnet9", "precision=bf16-mixed", "data=a=b"],
        )
        assert (recipe.train.lr, recipe.train.steps, recipe.precision) == (0.01, 12, "bf16-mixed")
        assert (recipe.options.augment, recipe.options.model, recipe.options.data) == (True, "resnet9", "a=b")

    def test_the_last_of_several_wins(self) -> None:
        assert parse_recipe(TEXT, "mine", ["steps=3", "steps=5"]).train.steps == 5

    def test_leave_the_given_tables_alone(self) -> None:
        values = TEXT | {"train": {"steps": 3}}
        parse_recipe(values, "mine", ["steps=5"])
        assert values["train"] == {"steps": 3}

    def test_without_an_equals_sign_are_refused(self) -> None:
        assert "key=value; got 'steps'" in read_refusal(TEXT, "steps")


@given(
    steps=st.integers(1, 10**6),
    lr=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**31),
    data=st.text(st.characters(codec="utf-8")),
    width=st.integers(1, 10**6),
)
def test_any_recipe_reads_back_from_its_text(steps: int, lr: float, seed: int, data: str, width: int) -> None:
    values = TEXT | {"train": {"steps": steps, "lr": lr, "seed": seed}, "options": {"data": data, "width": width}}
    recipe = parse_recipe(values, "mine")
    assert parse_recipe(tomllib.loads(str(recipe)), "mine") == recipe


def test_a_recipe_error_is_one_of_halfsteps() -> None:
    assert issubclass(RecipeError, HalfstepError)


def test_a_recovery_is_kept_and_stated_where_it_is_given() -> None:
    plain = load_recipe("image-classification")
    assert plain.recovery is None and "recovery" not in str(plain)
    given = load_recipe("image-classification", ["recovery=back-off"])
    assert given.recovery == "back-off"
    assert parse_recipe(tomllib.loads(str(given)), given.name) == given
    with pytest.raises(
        RecipeError, match="recipe 'image-classification': unknown recovery 'backoff'; did you mean 'back-off'"
    ):
        load_recipe("image-classification", ["recovery=backoff"])
