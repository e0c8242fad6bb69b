"""The exception tree, and messages that name the nearest word."""

import inspect
import pickle

import pytest

from halfstep import errors
from halfstep.errors import HalfstepError, MissingExtraError, StallWarning, describe_unknown

TREE = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if kind.__module__ == errors.__name__ and not issubclass(kind, Warning)
]  # every error of the module, the root too


def test_every_error_is_a_halfstep_error_and_a_builtin_kind() -> None:
    builtin = {
        "FormatError": ValueError,
        "PlanError": ValueError,
        "UnsupportedError": ValueError,
        "RecipeError": ValueError,
        "DataError": ValueError,
        "ModelError": ValueError,
        "CheckpointError": RuntimeError,
        "RecordError": RuntimeError,
        "TrainingError": RuntimeError,
        "MissingExtraError": ImportError,
        "HalfstepError": Exception,
    }
    assert {kind.__name__ for kind in TREE} == set(builtin)
    for kind in TREE:
        assert issubclass(kind, HalfstepError)
        assert issubclass(kind, builtin[kind.__name__])


def test_warnings_are_named_in_the_docstring_and_are_no_errors() -> None:
    assert issubclass(StallWarning, UserWarning) and not issubclass(StallWarning, HalfstepError)
    assert "StallWarning" in (errors.__doc__ or "")


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert errors.__doc__ is not None
    assert [kind.__name__ for kind in TREE if kind.__name__ not in errors.__doc__] == []


@pytest.mark.parametrize("kind", [kind for kind in TREE if kind is not MissingExtraError])
def test_errors_carry_their_message(kind: type[HalfstepError]) -> None:
    assert str(kind("what was given")) == "what was given"
    assert str(pickle.loads(pickle.dumps(kind("across processes")))) == "across processes"


def test_missing_extra_says_what_to_install() -> None:
    error = MissingExtraError("pyarrow", "images", "reading parquet")
    assert str(error) == (
        "reading parquet needs pyarrow, which is not installed; run in halfstep's checkout: pip install '.[images]'"
    )


def test_missing_extra_survives_pickling() -> None:
    error = MissingExtraError("pyarrow", "images", "reading parquet")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_unknown_word_names_the_nearest_and_all_allowed_in_order() -> None:
    text = describe_unknown("format", "fp61", ["fp32", "fp16", "bf16"])
    assert text == "unknown format 'fp61'; did you mean 'fp16'? Allowed: bf16, fp16, fp32"


def test_unknown_word_without_neighbour_gives_no_hint() -> None:
    assert describe_unknown("format", "zzz", ["bf16"]) == "unknown format 'zzz'. Allowed: bf16"


def test_unknown_word_where_nothing_is_allowed() -> None:
    assert describe_unknown("path", "a.b", []) == "unknown path 'a.b'. Allowed: none"


def test_unknown_word_may_be_of_any_type() -> None:
    assert describe_unknown("record", None, ["Point"]) == "unknown record 'None'. Allowed: Point"


def test_unknown_word_takes_a_one_time_iterable() -> None:
    words = (word for word in ["split", "none"])
    assert describe_unknown("master", "splt", words).endswith("Allowed: none, split")
