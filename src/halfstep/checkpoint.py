"""Checkpoints: one file, written whole or not at all, loaded without running code from it.

The file is in safetensors format: tensors with their names, and a header with two text entries. One holds everything
else as JSON: a state is any nest of dicts, lists, tuples, numbers, strings and tensors; `pack` takes the tensors out and
leaves their names, `unpack` puts them back. The other is a SHA-256 (FIPS 180-4) over all that a reader gets back:

    the JSON text;  for each tensor in the order of names:  JSON of [name, dtype, shape], its bytes

so a bit that flipped on disk is found wherever it lies. It guards against accidents; who means harm can write a new one.
Schema 1 had no checksum; its files are still read.

The file is written beside its place, forced to disk and renamed over the old one, and the rename is forced to disk too,
so that at every moment, also when the power fails, one complete checkpoint is there.

A checkpoint holds weights in fp32 and the plan they were trained under. `change_plan` goes on under another one, and
counts what that rounds.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from halfstep.errors import CheckpointError, RecordError
from halfstep.plan import Plan
from halfstep.stepper import Stepper, read_plan

SCHEMA = 2
READABLE = (1, 2)
_TENSOR, _SPARSE, _PAIRS, _TUPLE = "$tensor", "$sparse", "$pairs", "$tuple"


def pack(state: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What JSON can hold of a state; its tensors go into `tensors` under fresh names.

    Examples:
        >>> tensors = {}
        >>> pack({"w": torch.ones(2), 3: (1, "a")}, tensors)
        {'$pairs': [['w', {'$tensor': '0'}], [3, {'$tuple': [1, 'a']}]]}

    Raises CheckpointError for a value of another kind.
    """
    if isinstance(state, torch.Tensor) and state.layout is torch.sparse_coo:
        inside = [state._indices(), state._values(), list(state.shape), state.is_coalesced()]
        return {_SPARSE: [pack(part, tensors) for part in inside]}
    if isinstance(state, torch.Tensor) and state.layout is torch.strided:
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
    given = f"a tensor of layout {state.layout}" if isinstance(state, torch.Tensor) else type(state).__name__
    raise CheckpointError(f"a checkpoint holds tensors, numbers, strings and containers; got {given}")


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
        if kind == _SPARSE:
            indices, values, shape, is_coalesced = unpack(value, tensors)
            return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=is_coalesced, check_invariants=True)
        if kind == _TUPLE:
            return tuple(unpack(item, tensors) for item in value)
        return {unpack(key, tensors): unpack(item, tensors) for key, item in value}
    return packed


def compute_digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a checkpoint's JSON text and its tensors, as the head of this module defines it.

    Examples:
        >>> compute_digest("", {"0": torch.zeros(2)}) == compute_digest("", {"0": torch.zeros(2, dtype=torch.int32)})
        False
    """
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(path: Path | str, state: dict[str, Any]) -> None:
    """Write a state to `path`, whole or not at all.

    Examples:
        >>> save_checkpoint(getfixture("tmp_path") / "c.safetensors", {"step": 3, "weight": torch.ones(2)})

    Raises CheckpointError when it cannot be written; the checkpoint that stood there before is still there then.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps({"schema": SCHEMA, "state": pack(state, tensors)})
    header = {"halfstep": text, "sha256": compute_digest(text, tensors)}
    beside = path.with_name(
        path.name + ".part"
    )  # a folder, since safetensors writes through a file with a name of its own
    try:
        _clear(beside)
        beside.mkdir(parents=True)
        temporary = beside / path.name
        save_file(tensors, temporary, metadata=header)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        kept = f"; the checkpoint before is kept in {path}" if path.exists() else ""
        raise CheckpointError(
            f"checkpoint {path} cannot be written: {error}{kept}; free some space or choose another folder"
        ) from None
    finally:
        _clear(beside)
    force_to_disk(path.parent)


def _clear(folder: Path) -> None:
    """Take away what a save that was killed has left."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.unlink()  # schema 1 was written through a file of this name


def force_to_disk(folder: Path) -> None:
    """Let the names in a folder outlive a power failure. Where the platform cannot open folders, it does so by itself."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def claim_folder(folder: Path | str) -> FileLock:
    """Keep other processes out of a run's folder, until `release()` or until this process ends, however it ends.

    The lock is the system's, on the file `.lock` there; the file by itself means nothing.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> lock = claim_folder(folder)
        >>> claim_folder(folder)
        Traceback (most recent call last):
        halfstep.errors.RecordError: ...
        >>> lock.release(); claim_folder(folder).is_locked
        True

    Raises RecordError where another one is at work.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise RecordError(f"{folder} is in use by another process; wait until it ends, or give another --out") from None
    except OSError as error:
        raise RecordError(f"{folder} cannot be written ({error.strerror}); give another --out") from None
    return lock


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """The state that was saved at `path`.

    Examples:
        >>> path = getfixture("tmp_path") / "c.safetensors"
        >>> save_checkpoint(path, {"step": 3, "rates": (0.1, 0.2)})
        >>> load_checkpoint(path)
        {'step': 3, 'rates': (0.1, 0.2)}

    Raises CheckpointError for a file that is missing, cut off, changed since it was written, or of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}; give the folder of a run that saved one")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = header["halfstep"]
        content = json.loads(text)
        schema, packed = content["schema"], content["state"]
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error}); it was cut off or is not halfstep's: use an older copy"
        ) from None
    if schema not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise CheckpointError(f"checkpoint {path} has schema {schema}; this version reads schema {known}")
    written = header.get("sha256")
    if (schema > 1 or written is not None) and written != compute_digest(text, tensors):
        raise CheckpointError(
            f"checkpoint {path} was changed after it was written: its checksum does not match; use an older copy"
        )
    try:
        state: dict[str, Any] = dict(unpack(packed, tensors))
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error!r}); use an older copy") from None
    return state


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How many numbers of a model and its optimizer a change of plan has changed, and the largest relative change."""

    weights: int
    weights_changed: int
    weights_largest: float  # largest |after - before| / |before|
    states: int
    states_changed: int
    states_largest: float

    def __str__(self) -> str:
        parts = [
            f"{changed:,} of {numbers:,} {noun} were rounded, by up to {100 * largest:.2g} %"
            for noun, numbers, changed, largest in (
                ("weights", self.weights, self.weights_changed, self.weights_largest),
                ("optimizer states", self.states, self.states_changed, self.states_largest),
            )
            if changed
        ]
        return "; ".join(parts) or "nothing was rounded"


def change_plan(stepper: Stepper, plan: Plan | str | Path, why: str = "") -> Rounding:
    """Put another plan in force, as `Stepper.adopt` does, and count what it rounds; the plan record's `why` says it too.

    plan: what `prepare` takes. "auto", and a plan with rest=auto, go to fp32 and choose when the next batch arrives.

    Examples:
        >>> from halfstep.stepper import prepare
        >>> layer = torch.nn.Linear(64, 64)
        >>> stepper = prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.1), "bf16-mixed")
        >>> str(change_plan(stepper, "compute=bf16 storage=bf16 master=split"))
        'nothing was rounded'
        >>> change_plan(stepper, "bf16-true").weights_largest <= 2**-8
        True

    Raises what `Stepper.adopt` raises; the plan before stays in force then.
    """
    weights, states = (list(tensors) for tensors in _copy_numbers(stepper))
    stepper.adopt(read_plan(plan))
    weights_now, states_now = _copy_numbers(stepper)
    changed = [_count_changes(weights, weights_now), _count_changes(states, states_now)]
    rounding = Rounding(
        weights=sum(t.numel() for t in weights), weights_changed=changed[0][0], weights_largest=changed[0][1],
        states=sum(t.numel() for t in states), states_changed=changed[1][0], states_largest=changed[1][1],
    )  # fmt: skip
    if stepper.plan_record is not None:
        stepper.plan_record = replace(stepper.plan_record, why=f"{why}: {rounding}" if why else str(rounding))
    return rounding


def _copy_numbers(stepper: Stepper) -> tuple[Iterator[torch.Tensor], Iterator[torch.Tensor]]:
    """Weights, from their fp32 truth where one is kept, and optimizer states; always in the same order."""
    held, names = stepper.model.state_dict(), [name for name, _ in stepper.model.named_parameters()]
    states = [
        value
        for optimizer in stepper.optimizers
        for state in optimizer.state_dict()["state"].values()  # in fp32, where it is kept in 8 bits
        for key, value in sorted(state.items())
        if isinstance(value, torch.Tensor) and key != "step"
    ]
    return (held[name].detach().clone() for name in names), (value.clone() for value in states)


def _count_changes(before: list[torch.Tensor], after: Iterator[torch.Tensor]) -> tuple[int, float]:
    """Numbers that differ, and the largest relative difference."""
    count, largest = 0, 0.0
    for old, new in zip(before, after, strict=True):
        old, new = (t.to_dense() if t.is_sparse else t for t in (old, new))
        differs = (old != new) & ~(old.isnan() & new.isnan())
        if bool(differs.any()):
            was, now = old[differs].double(), new[differs].double()
            count += was.numel()
            largest = max(largest, float(((now - was) / was).abs().max()))
    return count, largest
