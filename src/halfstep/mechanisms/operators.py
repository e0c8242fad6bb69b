"""Precision of each operation under `cast = "op"`, as the table of numerics.operations has it.

Two ways to have it done:

    OperatorMode       the readable truth: a torch function mode that looks every call up. Costs Python for each operation
    torch.autocast     the fast twin, in C++, under torch's own list for the device

`choose_twin` says which one a format, a device and a set of replacements get. What the table does not name runs as it is,
and torch's autocast looks after what happens inside of it.

The mode and torch.autocast share one switch, autocast's state (enabled, dtype): entering the mode sets it, and the mode
acts only while it is as the mode has set it. Whoever sets it otherwise further in decides from there on: a nested mode, a
torch.autocast block, torch.amp.custom_fwd. And whoever saves and restores it brings the mode back with it: activation
checkpointing and custom_bwd do so in the backward pass, for which the mode stands by (`OperatorMode.stand_by`).
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FunctionType, TracebackType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from halfstep.errors import UnsupportedError, describe_unknown
from halfstep.insides import BACKWARD, INSIDES
from halfstep.numerics.kernels import PLAIN, hide_frame
from halfstep.numerics.operations import DIFFERENCES, TABLE, Policy

Function = Callable[..., Any]
_Key = tuple[str, str, int]  # format, device, and a number that tells modes with replacements apart
_numbers = itertools.count(1)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CASTABLE = frozenset(_DTYPES.values())  # fp64 was asked for, and 8-bit values mean nothing without their scales


def _spell(name: str) -> Iterator[Function]:
    """Every function of torch's that is the operation of that name: torch.matmul, Tensor.matmul, Tensor.__matmul__."""
    core: Any = torch._C
    homes = (torch, Tensor, F, core._nn, core._linalg, core._fft, core._special)
    spellings = (name, f"__{name}__", f"__r{name}__", f"special_{name}", _OPERATORS.get(name, name))
    found = (getattr(home, spelling, None) for home in homes for spelling in spellings)
    yield from (function for function in found if callable(function))


_OPERATORS = {"reciprocal": "__rdiv__"}  # 1 / x


_OPERATIONS: Mapping[Function, str] = {F.cross_entropy: "cross_entropy_loss"}
"""Function of torch's in Python -> the one operation that it is made of."""

POLICIES: Mapping[Function, Policy] = {
    function: operation.policy for name, operation in TABLE.items() for function in _spell(name)
}
"""Function as a torch function mode sees it -> policy."""


@dataclass(frozen=True)
class _Kept:
    """A weight that has been cast, and what it was then."""

    weight: Tensor  # held, so that its id stays its own
    version: int
    address: int | None
    value: Tensor

    def holds(self, weight: Tensor) -> bool:
        unchanged = self.version == weight._version and self.address == _find_address(weight)
        return unchanged and (self.value.requires_grad or not torch.is_grad_enabled())


def _find_address(weight: Tensor) -> int | None:
    """Where it lies in memory; `weight.data = other` moves it. None for what torch.func has wrapped."""
    try:
        return weight.data_ptr()
    except RuntimeError:
        return None


class _State(threading.local):
    """The blocks that are open in a thread, the innermost last, and the weights that were cast in them."""

    def __init__(self) -> None:
        self.blocks: list[_Key] = []
        self.casts: dict[tuple[int, torch.dtype], _Kept] = {}
        self.busy = -1  # how many blocks are open around an operation that is running, which modes must leave alone

    def cast_once(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A leaf in another format, cast when it is first met and again after it has changed."""
        kept = self.casts.get((id(weight), dtype))
        if kept is not None and kept.holds(weight):
            return kept.value
        value = weight.to(dtype)
        self.casts[id(weight), dtype] = _Kept(weight, weight._version, _find_address(weight), value)
        return value

    @contextmanager
    def open(self, key: _Key) -> Iterator[None]:
        """A block, from which on the modes of that key decide."""
        self.blocks.append(key)
        try:
            yield
        finally:
            self.blocks.pop()
            if not self.blocks:
                self.casts.clear()


_state = _State()


def forget_casts() -> None:
    """Cast weights anew in blocks that are open, those of torch.autocast too, which looks at no version of a weight; and
    torch's fused AdamW on a processor changes weights without a new one."""
    _state.casts.clear()
    torch.clear_autocast_cache()


class OperatorMode:
    """A `with` block in which every operation follows the table.

    Args:
        compute: "fp32", "bf16" or "fp16".
        device_type: whose tensors are cast; those of other devices are left alone.
        replacements: torch function -> function with the same signature, called in its place with the inputs as they are:
            what rounds them further rounds once. One for torch.matmul is one for Tensor.matmul and `@` too. What it
            calls of torch runs under torch.autocast in the compute format. Inside compiled code it is given inputs that
            the policy has cast: a backend may run its calls under this mode once more.
        equals: torch function -> function that computes the same up to rounding, as those of `mechanisms.functions`: it is
            given inputs that the policy has cast, and nothing it calls is cast any more. Compiled code and subclasses of Tensor
            keep torch's own.

    Weights are cast once in the outermost block. A module may hold a mode and enter it in its forward pass; copies share
    nothing. The innermost block decides, of modes and of torch.autocast. For the backward pass there is `stand_by`.

    Inside of what torch.compile compiles, write `with mode.opened():`, which it can trace.

    Examples:
        >>> x = torch.ones(2, 2)
        >>> with OperatorMode("bf16", "cpu"):
        ...     (x @ x).dtype, (x @ x).exp().dtype
        (torch.bfloat16, torch.float32)

    Raises UnsupportedError for another format or device.
    """

    def __init__(
        self, compute: str, device_type: str, replacements: Mapping[Function, Function] | None = None,
        equals: Mapping[Function, Function] | None = None,
    ) -> None:  # fmt: skip
        if compute not in _DTYPES:
            raise UnsupportedError(describe_unknown("compute format of operations", compute, _DTYPES))
        if not hasattr(Tensor, f"is_{device_type}"):
            raise UnsupportedError(f"operations on '{device_type}' are not told apart; allowed: cpu, cuda, mps, xpu")
        self.compute, self.device_type = compute, device_type
        self.replacements, self.equals = dict(replacements or {}), dict(equals or {})
        self._follower = _Follower(compute, device_type, self.replacements, self.equals)
        self._local = _Entered()

    def __reduce__(self) -> tuple[type, tuple[str, str, dict[Function, Function], dict[Function, Function]]]:
        return type(self), (self.compute, self.device_type, self.replacements, self.equals)

    def __repr__(self) -> str:
        return f"OperatorMode({self.compute}, {self.device_type}, {len(self.replacements)} replacements)"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The block itself."""
        dtype = _DTYPES[self.compute] if self.compute != "fp32" else None
        switch = torch.autocast(self.device_type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
        with _state.open(self._follower.key), switch, self._follower:
            yield

    @contextmanager
    def stand_by(self) -> Iterator[None]:
        """What a backward pass runs under, so that activation checkpointing recomputes what the forward pass computed.

        The mode acts only where autocast's state is restored, as torch.utils.checkpoint and torch.amp.custom_bwd do it;
        the backward pass itself and other custom functions in it are left alone.
        """
        with _state.open(self._follower.key), self._follower:
            yield

    def __enter__(self) -> Self:
        block = self.opened()
        block.__enter__()
        self._local.blocks.append(block)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._local.blocks.pop().__exit__(kind, error, trace)


class _Entered(threading.local):
    def __init__(self) -> None:
        self.blocks: list[AbstractContextManager[None]] = []


class _Follower(TorchFunctionMode):
    """What sees every operation. It enters and leaves as torch has made it: torch.compile would pass over anything else."""

    def __init__(
        self,
        compute: str,
        device_type: str,
        replacements: Mapping[Function, Function],
        equals: Mapping[Function, Function],
    ) -> None:
        super().__init__()
        self.compute, self.device_type = compute, device_type
        self.key: _Key = (compute, device_type, next(_numbers) if replacements or equals else 0)
        self._dtype, self._is_here = _DTYPES[compute], f"is_{device_type}"
        self._calls = _respell(replacements)
        self._equals = {theirs: ours for theirs, ours in equals.items() if theirs not in self._calls}

    @hide_frame
    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._equals and all(kind in PLAIN for kind in types) and not torch.compiler.is_compiling():
            return self._run_equal(func, args, kwargs)
        policy, call = POLICIES.get(func), self._calls.get(func, func)
        if policy is None and call is func:
            if isinstance(func, FunctionType):
                return self._run_inside(func, types, args, kwargs)
            policy = _find_policy(func) if isinstance(func, _NAMED) else None
            if policy is None:
                return func(*args, **kwargs)
        if not self._decides() or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        as_they_are = call is not func and not torch.compiler.is_compiling()
        if policy is not None and policy != "as is" and not as_they_are:
            args, kwargs = self._cast((args, kwargs), self._choose_dtype(policy, (args, kwargs)))
        return self._run(call, args, kwargs, autocast=as_they_are and self.compute != "fp32")

    def _run_equal(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the table says of a function holds for its equal too, also where torch's is written in Python."""
        if not self._decides():
            return func(*args, **kwargs)
        policy = TABLE[_OPERATIONS[func]].policy if func in _OPERATIONS else POLICIES.get(func, "as is")
        if policy != "as is":
            args, kwargs = self._cast((args, kwargs), self._choose_dtype(policy, (args, kwargs)))
        return self._run(self._equals[func], args, kwargs)

    def _run(self, call: Function, args: tuple[Any, ...], kwargs: dict[str, Any], *, autocast: bool = False) -> Any:
        """Call what follows the table already, or sees to itself, with no mode casting any more."""
        around, _state.busy = _state.busy, len(_state.blocks)
        try:
            if torch.compiler.is_compiling():
                with torch.autocast(self.device_type, enabled=False):
                    return call(*args, **kwargs)
            torch.set_autocast_enabled(self.device_type, autocast)
            try:
                return call(*args, **kwargs)
            finally:
                torch.set_autocast_enabled(self.device_type, self.compute != "fp32")
        finally:
            _state.busy = around

    def _decides(self) -> bool:
        """Whether this is the innermost block, and no one has set autocast otherwise since."""
        state = _state
        if state.busy == len(state.blocks) or (state.blocks and state.blocks[-1] != self.key):
            return False
        if self.compute == "fp32":
            return not torch.is_autocast_enabled(self.device_type)
        return torch.is_autocast_enabled(self.device_type) and torch.get_autocast_dtype(self.device_type) == self._dtype

    def _run_inside(self, func: FunctionType, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of torch's that is written in Python and made of operations, so that the mode sees those.

        A backward pass always sees it: it may call what restores autocast's state by itself.
        """
        inside = INSIDES.get(func)
        is_left = any(kind not in PLAIN for kind in types)  # to a class that looks after it
        if inside is None or is_left or not (func in BACKWARD or self._decides()):
            is_traced = func is Tensor.unflatten and torch.compiler.is_compiling()  # which cannot trace it under a mode
            return torch.unflatten(*args, **kwargs) if is_traced else func(*args, **kwargs)
        with self:
            return inside(*args, **kwargs)

    def _choose_dtype(self, policy: Policy, values: Any) -> torch.dtype:
        if policy == "compute":
            return self._dtype
        found = set(_list_dtypes(values)) if policy == "widest" else set()
        return found.pop() if len(found) == 1 else torch.float32

    def _cast(self, values: Any, dtype: torch.dtype) -> Any:
        """The tensors in nested tuples, lists and dicts in `dtype`."""
        if isinstance(values, Tensor):
            return self._cast_tensor(values, dtype)
        if isinstance(values, dict):
            return {key: self._cast(value, dtype) for key, value in values.items()}
        if type(values) in (tuple, list):
            return type(values)([self._cast(value, dtype) for value in values])
        return values

    def _cast_tensor(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        if value.dtype is dtype or value.dtype not in _CASTABLE or not getattr(value, self._is_here):
            return value
        is_weight = value.requires_grad and value.is_leaf and dtype is not torch.float32
        if is_weight and not torch.compiler.is_compiling() and _state.blocks:
            return _state.cast_once(value, dtype)
        return value.to(dtype)


def _list_dtypes(values: Any) -> Iterator[torch.dtype]:
    """The castable formats among the tensors of nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        if values.dtype in _CASTABLE:
            yield values.dtype
    elif isinstance(values, dict):
        yield from _list_dtypes(tuple(values.values()))
    elif type(values) in (tuple, list):
        for value in values:
            yield from _list_dtypes(value)


_NAMED = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def _find_policy(func: Any) -> Policy | None:
    """Of an operation that is called by its name in the dispatcher: torch.ops.aten.mm."""
    operation = TABLE.get(func.__name__.partition(".")[0]) if func.__module__ == "torch._ops.aten" else None
    return operation.policy if operation else None


def _respell(replacements: Mapping[Function, Function]) -> dict[Function, Function]:
    """The replacements, and each of a function in `torch` also for the method of that name, and the other way round."""
    respelled: dict[Function, Function] = {}
    for function, replacement in replacements.items():
        name = function.__name__.strip("_")
        spellings = [getattr(home, word, None) for home in (torch, Tensor) for word in (name, f"__{name}__")]
        if function in spellings:
            respelled |= {other: replacement for other in spellings if other is not None}
    return respelled | dict(replacements)


@dataclass(frozen=True, kw_only=True)
class Twin:
    """Who follows the table, and why."""

    name: Literal["torch.autocast", "OperatorMode"]
    why: str


def choose_twin(compute: str, device_type: str, replacements: Mapping[Function, Function] | None = None) -> Twin:
    """The fast twin wherever it leaves nothing out that a training run would notice.

    Examples:
        >>> choose_twin("bf16", "cpu").name, choose_twin("fp16", "cpu").name
        ('torch.autocast', 'OperatorMode')

    Raises UnsupportedError for a format that has no torch.autocast.
    """
    if compute not in _DTYPES:
        raise UnsupportedError(describe_unknown("compute format of operations", compute, _DTYPES))
    if replacements:
        return Twin(
            name="OperatorMode", why=f"{len(replacements)} functions are replaced, which torch.autocast cannot do"
        )
    if compute == "fp32":
        return Twin(name="torch.autocast", why="nothing is cast; it only switches off what is around it")
    departures = [difference for difference in DIFFERENCES if difference.device_type == device_type]
    for difference in departures:
        if compute in difference.overflows:
            left = f"torch's list for {device_type} leaves {difference.names.split()[0]} and others as they are"
            return Twin(name="OperatorMode", why=f"{left}: {difference.why}")
    compared = "departs from the table in no range" if departures else "has not been compared with the table"
    return Twin(name="torch.autocast", why=f"in {compute} torch's list for {device_type} {compared}")


def cast_operations(
    compute: str, device_type: str, replacements: Mapping[Function, Function] | None = None
) -> AbstractContextManager[Any]:
    """A `with` block in which operations follow the table, by the twin that is chosen.

    Examples:
        >>> with cast_operations("bf16", "cpu"):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    if choose_twin(compute, device_type, replacements).name == "OperatorMode":
        return OperatorMode(compute, device_type, replacements)
    if compute == "fp32":
        return torch.autocast(device_type, enabled=False)
    return torch.autocast(device_type, dtype=_DTYPES[compute])
