"""Tensors in what a module takes and returns: lists, tuples, dictionaries, whatever torch's pytree knows, and dataclasses."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def map_tensors(function: Callable[[Tensor], Tensor], values: Any, *, records: bool = True) -> Any:
    """The same nest with another tensor in the place of each; a dataclass in which none is another is the same object.

    records: whether dataclasses are looked into. What a module is given should not be: it may write to the one it was given.

    Examples:
        >>> import torch
        >>> map_tensors(torch.neg, {"a": [torch.tensor(1), "b"]})
        {'a': [tensor(-1), 'b']}
    """
    inside: set[int] = set()  # dataclasses that are being looked into: one may hold itself

    def map_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not records or not _is_record(leaf) or id(leaf) in inside:
            return leaf
        inside.add(id(leaf))
        before = _read_fields(leaf)
        after = {name: tree_map(map_leaf, value) for name, value in before.items()}
        inside.remove(id(leaf))
        pairs = zip(tree_leaves(after), tree_leaves(before), strict=True)
        return leaf if all(new is old for new, old in pairs) else _replace_fields(leaf, after)

    return tree_map(map_leaf, values)


def list_tensors(values: Any) -> list[Tensor]:
    """All tensors of a nest, in their order.

    Examples:
        >>> import torch
        >>> list_tensors(([torch.tensor(1)], 2, {"b": torch.tensor(3)}))
        [tensor(1), tensor(3)]
    """
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, values)
    return found


def _is_record(leaf: Any) -> bool:
    """Whether it is a dataclass of which torch's pytree knows nothing, as it knows of those that registered themselves."""
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


def _read_fields(record: Any) -> dict[str, Any]:
    return {
        field.name: getattr(record, field.name) for field in dataclasses.fields(record) if hasattr(record, field.name)
    }


def _replace_fields(record: Any, values: dict[str, Any]) -> Any:
    twin = copy.copy(record)
    for name, value in values.items():
        object.__setattr__(twin, name, value)  # a frozen one too
    return twin
