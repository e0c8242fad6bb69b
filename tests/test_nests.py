"""Tensors are found and replaced wherever modules put them."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from halfstep.nests import list_tensors, map_tensors

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]
    name: str = "output"


@dataclass(frozen=True, slots=True)
class Frozen:
    logits: Tensor
    inner: Output
    made: int = field(default=3, init=False)


def make_nests() -> list[Any]:
    one, two, three = (torch.tensor(float(n)) for n in (1, 2, 3))
    return [
        [one, (two, {"c": three})],
        Pair(one, [two, three]),
        OrderedDict(a=one, b=None, c=[two, "word", three]),
        Output(one, [two, three]),
        {"out": Frozen(one, Output(two, [three]))},
    ]


@pytest.mark.parametrize("number", range(len(make_nests())))
def test_every_tensor_is_found_and_replaced_and_nothing_else(number: int) -> None:
    values = make_nests()[number]
    assert [float(t) for t in list_tensors(values)] == [1.0, 2.0, 3.0]
    mapped = map_tensors(lambda t: t * 10, values)
    assert [float(t) for t in list_tensors(mapped)] == [10.0, 20.0, 30.0]
    assert [float(t) for t in list_tensors(values)] == [1.0, 2.0, 3.0]
    assert type(mapped) is type(values)


def test_dataclasses_keep_their_other_fields_and_the_object_where_nothing_changes() -> None:
    output = Output(torch.ones(1), [torch.ones(1)], name="mine")
    assert map_tensors(lambda t: t, output) is output
    assert map_tensors(lambda t: t + 1, output).name == "mine"
    assert map_tensors(lambda t: t, Output) is Output


def test_a_field_that_was_never_set_is_left_out() -> None:
    output = object.__new__(Output)
    output.logits = torch.ones(1)
    assert len(list_tensors(output)) == 1


def test_a_dataclass_that_holds_itself_is_walked_once() -> None:
    output = Output(torch.ones(1), [])
    output.hidden = [torch.ones(2), output]  # type: ignore[list-item]
    assert len(list_tensors(output)) == 2
    assert map_tensors(lambda t: t + 1, output).logits == 2


def test_dataclasses_are_left_alone_where_that_is_asked_for() -> None:
    output = Output(torch.ones(1), [])
    assert map_tensors(lambda t: t + 1, [output], records=False)[0] is output
