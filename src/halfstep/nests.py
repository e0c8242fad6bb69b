"""Tensors in what a module takes and returns: lists, tuples, dictionaries, whatever torch's pytree knows, and dataclasses."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def map_tensors(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """The same nest with another tensor in the place of each; a dataclass in which none is another is the same object.

    Examples:
        >>> import torch
        >>> map_tensors(torch.neg, {"a": [torch.tensor(1), "b"]})
        {'a': [tensor(-1), 'b']}
    """

    def map_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        return _map_fields(function, leaf) if _is_record(leaf) else leaf

    return tree_map(map_leaf, values)


def list_tensors(values: Any) -> list[Tensor]:
    """All tensors of a nest, in their order.

    Examples:
        >>> import torch
        >>> list_tensors(([torch.tensor(1)], 2, {"b": torch.tensor(3)}))
        [tensor(1), tensor(3)]
    """
    found: list[Tensor] = []
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif _is_record(leaf):
            found += list_tensors(list(_read_fields(leaf).values()))
    return found


def _is_record(leaf: Any) -> bool:
    """Whether it is a dataclass of which torch's pytree knows nothing, as it knows of those that registered themselves."""
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


def _read_fields(record: Any) -> dict[str, Any]:
    return {
        field.name: getattr(record, field.name) for field in dataclasses.fields(record) if hasattr(record, field.name)
    }


def _map_fields(function: Callable[[Tensor], Tensor], record: Any) -> Any:
    before = _read_fields(record)
    after = {name: map_tensors(function, value) for name, value in before.items()}
    if all(new is old for new, old in zip(list_tensors(after), list_tensors(before), strict=True)):
        return record
    twin = copy.copy(record)
    for name, value in after.items():
        object.__setattr__(twin, name, value)  # a frozen one too
    return twin
