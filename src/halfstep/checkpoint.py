"""Checkpoints: one file, written whole or not at all, loaded without running code from it.

The file is in safetensors format: tensors with their names, and a header whose one text entry holds everything else as
JSON. A state is any nest of dicts, lists, tuples, numbers, strings and tensors; `pack` takes the tensors out and leaves
their names, `unpack` puts them back. The file is written beside its place, forced to disk and renamed over the old one,
so that at every moment one complete checkpoint is there.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from halfstep.errors import CheckpointError

SCHEMA = 1
_TENSOR, _PAIRS, _TUPLE = "$tensor", "$pairs", "$tuple"


def pack(state: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What JSON can hold of a state; its tensors go into `tensors` under fresh names.

    Examples:
        >>> tensors = {}
        >>> pack({"w": torch.ones(2), 3: (1, "a")}, tensors)
        {'$pairs': [['w', {'$tensor': '0'}], [3, {'$tuple': [1, 'a']}]]}

    Raises CheckpointError for a value of another kind.
    """
    if isinstance(state, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = state.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(state, dict):
        return {_PAIRS: [[pack(key, tensors), pack(value, tensors)] for key, value in state.items()]}
    if isinstance(state, tuple):
        return {_TUPLE: [pack(value, tensors) for value in state]}
    if isinstance(state, list):
        return [pack(value, tensors) for value in state]
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise CheckpointError(f"a checkpoint holds tensors, numbers, strings and containers; got {type(state).__name__}")


def unpack(packed: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The state that `pack` took apart.

    Examples:
        >>> unpack(pack({1: [2.5, None]}, {}), {})
        {1: [2.5, None]}
    """
    if isinstance(packed, list):
        return [unpack(value, tensors) for value in packed]
    if isinstance(packed, dict):
        ((kind, value),) = packed.items()
        if kind == _TENSOR:
            return tensors[value]
        if kind == _TUPLE:
            return tuple(unpack(item, tensors) for item in value)
        return {unpack(key, tensors): unpack(item, tensors) for key, item in value}
    return packed


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a state to `path`, whole or not at all.

    Raises CheckpointError when it cannot be written; the checkpoint that stood there before is still there then.
    """
    tensors: dict[str, torch.Tensor] = {}
    header = {"halfstep": json.dumps({"schema": SCHEMA, "state": pack(state, tensors)})}
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=header)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = f"; the checkpoint before is kept in {path}" if path.exists() else ""
        raise CheckpointError(
            f"checkpoint {path} cannot be written: {error}{kept}; free some space or give another --out"
        ) from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that was saved at `path`. Raises CheckpointError for a file that is missing, cut off or another kind."""
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}; give the folder of a run that saved one")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["halfstep"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        schema, packed = header["schema"], header["state"]
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error}); it was cut off or is not halfstep's: use an older copy"
        ) from None
    if schema != SCHEMA:
        raise CheckpointError(f"checkpoint {path} has schema {schema}; this version reads schema {SCHEMA}")
    try:
        state: dict[str, Any] = dict(unpack(packed, tensors))
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error!r}); use an older copy") from None
    return state
