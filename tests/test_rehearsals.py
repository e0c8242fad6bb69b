"""Rehearsals: each is a whole plan of its name, whose products are emulated."""

from dataclasses import replace
from pathlib import Path

import pytest

from halfstep.errors import PlanError
from halfstep.plan import Plan
from halfstep.rehearsals import REHEARSALS, find_rehearsal

MODEL = {"": "", "embed": "embedding", "a": "linear", "norm": "norm", "b": "conv", "c": "linear", "head": "linear"}


@pytest.mark.parametrize("name", REHEARSALS)
def test_rehearsal_is_an_emulated_plan_of_its_name_that_comes_back(name: str) -> None:
    rehearsal = find_rehearsal(name)
    assert rehearsal.plan.name == name
    assert rehearsal.plan.products == "emulated"
    assert Plan.parse(str(rehearsal.plan)) == rehearsal.plan
    assert rehearsal.hardware
    assert rehearsal.differs


@pytest.mark.parametrize("name", REHEARSALS)
def test_rehearsal_computes_inner_layers_in_the_formats_of_its_hardware(name: str) -> None:
    table = find_rehearsal(name).plan.resolve(MODEL).table
    family = name.split("-")[0]
    assert {table[path].compute.split("_")[0] for path in "ac"} == {family}


def test_convolutions_stay_in_bf16_where_operands_are_scaled_in_blocks() -> None:
    for name, rehearsal in REHEARSALS.items():
        settings = rehearsal.plan.resolve(MODEL).table["b"]
        blocks = name.startswith(("mx", "nv")) or name.endswith("blocks")
        assert (settings.compute == "bf16") == blocks


def test_only_the_scaled_formats_keep_the_ends_wider() -> None:
    for name, rehearsal in REHEARSALS.items():
        head = rehearsal.plan.resolve(MODEL).table["head"]
        assert head.compute == ({"fp16-v100": "fp16", "tf32-a100": "tf32"}.get(name, "bf16"))


def test_a_rehearsal_that_is_not_known_names_the_nearest() -> None:
    with pytest.raises(PlanError, match="did you mean 'fp8-h100'"):
        find_rehearsal("fp8-h10")


def test_a_plan_file_is_rehearsed_with_emulated_products(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    Plan.preset("int8-mixed").save(path)
    rehearsal = find_rehearsal(str(path))
    assert rehearsal.plan == replace(Plan.preset("int8-mixed"), products="emulated")
    with pytest.raises(PlanError, match="cannot be read"):
        find_rehearsal(str(tmp_path / "none.toml"))
