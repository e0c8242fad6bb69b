"""Saved activations: keep what the backward pass needs in fewer bits.

Every tensor that autograd saves inside `Keeper.keep()` goes through `torch.autograd.graph.saved_tensors_hooks`: it is packed
when the forward pass saves it, unpacked when the backward pass asks for it, and the original is freed with the forward pass.
The module that is running when a tensor is saved says in which format (the table, by module path):

    ""      as it is                 int8    8.25 bits a number    groups of 256, lowest value and step, rounded up or
    bf16    fp32 as bf16, nearest    int4    4.25 bits a number    down at random without bias (`numerics/packing`)

Exact whatever the format: masks (bool, and dropout's noise, which has two values) take 1 bit a number, integers the narrowest
type that holds them (max-pool's indices 16 bits of 64 mostly), and ReLU's own result 1 bit, since its backward pass asks only
which numbers are positive. Left as they are, each by a rule of `_find_exception`:

    outside      saved while no module of the model runs: the loss, which is not the model's
    kind         fp64, complex and sparse numbers, subclasses of Tensor
    resident     in a parameter's memory, a buffer's or that of what the model was called with: it lives anyway
    asked        its format is ""
    small        under 32 KiB
    weight       a view or a cast of a parameter: rounding noise would be the same for the whole batch
    expanded     larger than the memory behind it
    no graph     floats that need no gradient: means and rstd of norms, log-sum-exp of attention; but not what a function of our
                 own has marked as activations (`packing.mark_activations`)
    statistic    last dimension 1: means and variances that scale whole rows
    logarithm    log-softmax: an error of e in log p changes the gradient by a factor of exp(e)
    in place     a view that was changed in place: it does not say by what, and it may have been ReLU
    narrow       already no wider than the format

A region of memory that several operations save, as it is or in views, is packed once for each format. Packing makes a copy,
so what is changed in place afterwards gives the gradient at the values that were saved; for tensors kept as they are torch's
error is raised here, since torch does not look at versions behind hooks. Second derivatives through rounded tensors are refused.

What torch.utils.checkpoint saves, the inputs of its part of the model, is kept like everything else in both of its variants, so
that part is computed again from rounded inputs; what it saves in the second computation is not packed.

On a processor packed numbers lie away from the heap (`runtime.Arena`), and the holes that originals leave there are given back to
the system (`runtime.HeapTrimmer`); otherwise the process would stay as large as before.

Sources: Chen et al. 2021, "ActNN" (arXiv 2104.14129); Liu et al. 2022, "GACT" (arXiv 2206.11357), sections 3 to 5: any model
through saved-tensor hooks, sensitivities measured from gradients; Jain et al. 2018, "Gist" (ISCA): one bit for ReLU.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from halfstep.errors import PlanError, UnsupportedError, describe_unknown
from halfstep.machine.runtime import Arena, HeapTrimmer
from halfstep.nests import list_tensors
from halfstep.numerics.kernels import Allocate
from halfstep.numerics.noise import derive_keys
from halfstep.numerics.packing import Groups, is_marked, pack_bits, pack_groups, unpack_bits, unpack_groups
from halfstep.records import SavedRecord

BITS = {"int8": 8, "int4": 4}
SAVED_FORMATS = ("", "bf16", *BITS)
SMALLEST = 1 << 15  # bytes

_SHAPE_ONLY = {  # operations between a parameter and its views and casts
    "ToCopy", "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Slice", "Select", "Unsqueeze",
    "Squeeze", "Split", "SplitWithSizes", "Unbind", "AsStrided", "Alias", "Clone", "torch::autograd::CopyBackwards",
}  # fmt: skip
_INTEGERS = (torch.uint8, torch.int16, torch.int32)  # tried in this order
_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Rounded:
    """Floats in groups."""

    groups: Groups
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.groups.nbytes

    def restore(self, allocate: Allocate) -> Tensor:
        return unpack_groups(self.groups, self.dtype, allocate)


@dataclass(frozen=True, eq=False)
class _Cast:
    """Numbers in a narrower dtype."""

    values: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def restore(self, _: Allocate) -> Tensor:
        return self.values.to(self.dtype)


@dataclass(frozen=True, eq=False)
class _TwoValued:
    """A bit a number; what 0 and 1 stand for, None for bools."""

    codes: Tensor
    count: int
    values: tuple[Tensor, Tensor] | None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def restore(self, _: Allocate) -> Tensor:
        mask = unpack_bits(self.codes, self.count)
        return mask if self.values is None else torch.where(mask, self.values[1], self.values[0])


Region = _Rounded | _Cast | _TwoValued


@dataclass(frozen=True)
class _Packed:
    """How one saved tensor lies in a packed region of memory."""

    region: Region
    shape: torch.Size
    strides: tuple[int, ...]
    path: str
    on_processor: bool
    source: StorageWeakRef  # while it lives, no other storage has the same address: keys of regions stay unique


@dataclass(frozen=True)
class _Whole:
    """A saved tensor as it is; detached, since a result that holds its own graph would never be freed."""

    tensor: Tensor
    version: int


@dataclass
class _Tally:
    """What was saved in one module in one way."""

    tensors: int = 0
    bytes: int = 0
    kept: int = 0
    signal: float = 0.0
    noise: float = 0.0


def _name_operation(node: Any) -> str:
    """`ReluBackward0` -> `Relu`."""
    return str(node.name()).rstrip("0123456789").removesuffix("Backward")


def _is_own_result(node: Any) -> bool:
    """Whether a tensor that is being saved was made by the operation that saves it: then its node is the newest one.

    Operations save their inputs after their own node has been made.
    """
    return bool(node._sequence_nr() == torch._C._autograd._get_sequence_nr() - 1)


def _comes_from_parameter(node: Any) -> bool:
    """Whether a tensor is a view or a cast of a parameter."""
    while node is not None and _name_operation(node) in _SHAPE_ONLY:
        node = next((earlier for earlier, _ in node.next_functions if earlier is not None), None)
    return node is not None and isinstance(getattr(node, "variable", None), nn.Parameter)


def _is_dense(x: Tensor) -> bool:
    """Whether the numbers fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _find_two_values(flat: Tensor) -> tuple[Tensor, Tensor] | None:
    """The two values that a tensor consists of; None where there are more. The first numbers mostly tell."""
    words = flat.view({4: torch.int32, 2: torch.int16}[flat.element_size()])
    if words[:256].unique().numel() > 2:
        return None
    first = words[0]
    others = words != first
    second = words[others.to(torch.uint8).argmax()]
    return (flat[0], second.view(flat.dtype)) if bool((~others | (words == second)).all()) else None


def _find_narrowest(flat: Tensor) -> torch.dtype | None:
    """The narrowest dtype that holds these integers; None where that is their own."""
    low, high = (int(value) for value in flat.aminmax())
    for dtype in _INTEGERS:
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max and dtype.itemsize < flat.element_size():
            return dtype
    return None


class _Pass:
    """One forward pass in one thread: which module runs, what has been packed."""

    def __init__(self, keeper: "Keeper", number: int, *, measure: bool) -> None:
        self.keeper, self.number, self.measure = keeper, number, measure
        self.thread = threading.get_ident()
        self.running: list[str] = []  # paths of the modules that are running, the innermost last
        self.tallies: dict[tuple[str, str, str], _Tally] = defaultdict(_Tally)
        self.resident = {t.untyped_storage()._cdata for t in (*keeper.model.parameters(), *keeper.model.buffers())}
        self._inputs: list[StorageWeakRef] = []  # keep the addresses in `resident` from being used again
        self._regions: WeakValueDictionary[tuple[Any, ...], Region] = WeakValueDictionary()
        self._arena = Arena()
        self._unpacked = Arena(slab=2 << 20)  # what lives for one operation of the backward pass
        self._drawn = 0
        self._wholes: set[int] = set()

    def enter(self, path: str, arguments: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        if not self.running:
            inputs = [t for t in list_tensors(arguments) if t.grad_fn is None]
            self._inputs += [StorageWeakRef(t.untyped_storage()) for t in inputs if t.layout is torch.strided]
            self.resident |= {reference.cdata for reference in self._inputs}
        self.running.append(path)

    def leave(self) -> None:
        if threading.get_ident() == self.thread and self.running:
            self.running.pop()

    def pack(self, x: Tensor) -> _Packed | _Whole:
        """What autograd keeps in place of a tensor that it saves."""
        with torch.no_grad():
            path = self.running[-1] if self.running else ""
            why = self._find_exception(x, path)
            if not why:
                packed = self._pack(x.detach(), path, x.grad_fn, marked=is_marked(x))
                if packed is not None:
                    return packed
                why = "no graph" if x.is_floating_point() and x.grad_fn is None else "narrow"
            return self._keep_whole(x, path if self.running else "", why)

    def unpack(self, saved: _Packed | _Whole) -> Tensor:
        """The tensor that autograd gets back. Raises RuntimeError as torch does, UnsupportedError for second derivatives."""
        if isinstance(saved, _Whole):
            if saved.tensor._version != saved.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"[{saved.tensor.type()} {list(saved.tensor.shape)}] is at version {saved.tensor._version}; expected version "
                    f"{saved.version} instead"
                )
            return saved.tensor
        if (
            torch.is_grad_enabled()
            and not isinstance(saved.region, _TwoValued)
            and saved.region.dtype.is_floating_point
        ):
            raise UnsupportedError(
                f"second derivatives through module '{saved.path}': it keeps its activations rounded, so they would not be those "
                'of the first ones; give the modules that create_graph=True goes through the saved format ""'
            )
        if saved.on_processor:
            self.keeper.look_at_heap()
        with torch.no_grad():
            return saved.region.restore(self._unpacked.allocate).as_strided(saved.shape, saved.strides)

    def _find_exception(self, x: Tensor, path: str) -> str:
        """The rule by which a tensor stays as it is; "" where none applies."""
        if not self.running:
            return "outside"
        if type(x) not in (Tensor, nn.Parameter) or x.layout is not torch.strided or x.dtype not in _DTYPES:
            return "kind"
        if x.untyped_storage()._cdata in self.resident:
            return "resident"
        if not self.keeper.table[path]:
            return "asked"
        if x.nbytes < SMALLEST:
            return "small"
        if x.nbytes > x.untyped_storage().nbytes():
            return "expanded"
        return self._find_harm(x) if x.is_floating_point() and x.grad_fn is not None else ""

    @staticmethod
    def _find_harm(x: Tensor) -> str:
        """The rule by which rounding a float that needs a gradient would do harm."""
        operation = _name_operation(x.grad_fn)
        if _comes_from_parameter(x.grad_fn):
            return "weight"
        if operation == "LogSoftmax":
            return "logarithm"
        if x.shape[-1] == 1:
            return "statistic"
        # the node of a view that was changed in place is made when it is asked for: just now
        return "in place" if operation == "AsStrided" and _is_own_result(x.grad_fn) else ""

    def _pack(self, x: Tensor, path: str, node: Any, *, marked: bool) -> _Packed | None:
        """A tensor in fewer bits; None where that gains nothing."""
        format = self.keeper.table[path]
        if not x.is_floating_point():
            format = "bits" if x.dtype is torch.bool else "integers"
        elif node is None and not marked:
            format = "two values"
        elif node is not None and _name_operation(node) == "Relu" and _is_own_result(node):
            format = "positive"
        elif format == "bf16" and x.dtype is not torch.float32:
            return None
        source, dense = StorageWeakRef(x.untyped_storage()), _is_dense(x)
        place = (x.storage_offset(), x.numel()) if dense else (x.storage_offset(), x.shape, x.stride())
        key = (source.cdata, x._version, x.dtype, place, format)
        if not dense:
            x = x.clone()
        region = self._regions.get(key)
        if region is None:
            flat = x.as_strided((x.numel(),), (1,))
            region = self._make_region(flat, format)
            if region is None:
                return None
            self._regions[key] = region
            if flat.device.type == "cpu":
                self.keeper.look_at_heap()
            self._count(path, format, flat, region)
        else:
            self._tally(path, format).tensors += 1
        return _Packed(region, x.shape, x.stride(), path, x.device.type == "cpu", source)

    def _make_region(self, flat: Tensor, format: str) -> Region | None:
        if format in BITS:
            self._drawn += 1
            keys = derive_keys(self.keeper.seed, self._drawn, self.number)
            return _Rounded(pack_groups(flat, BITS[format], keys, self._arena.allocate), flat.dtype)
        if format == "bf16":
            return _Cast(self._cast(flat, torch.bfloat16), flat.dtype)
        if format == "bits":
            return _TwoValued(pack_bits(flat, self._arena.allocate), flat.numel(), None)
        if format == "positive":
            return _TwoValued(
                pack_bits(flat > 0, self._arena.allocate), flat.numel(), (flat.new_zeros(()), flat.new_ones(()))
            )
        if format == "integers":
            dtype = _find_narrowest(flat)
            return None if dtype is None else _Cast(self._cast(flat, dtype), flat.dtype)
        values = _find_two_values(flat)
        if values is None:
            return None
        codes = pack_bits(flat == values[1], self._arena.allocate)
        return _TwoValued(codes, flat.numel(), (values[0].clone(), values[1].clone()))

    def _cast(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        if flat.device.type != "cpu":
            return flat.to(dtype)
        return self._arena.allocate(flat.numel() * dtype.itemsize).view(dtype).copy_(flat)

    def _keep_whole(self, x: Tensor, path: str, why: str) -> _Whole:
        tally = self._tally(path, "", why)
        tally.tensors += 1
        if why != "resident" and x.layout is torch.strided and x.untyped_storage()._cdata not in self._wholes:
            self._wholes.add(x.untyped_storage()._cdata)
            tally.bytes += x.untyped_storage().nbytes()
            tally.kept += x.untyped_storage().nbytes()
        return _Whole(x.detach(), x._version)

    def _tally(self, path: str, format: str, why: str = "") -> _Tally:
        return self.tallies[path, format, why]

    def _count(self, path: str, format: str, flat: Tensor, region: Region) -> None:
        tally = self._tally(path, format)
        tally.tensors += 1
        tally.bytes += flat.nbytes
        tally.kept += region.nbytes
        if self.measure and format in SAVED_FORMATS:
            exact = flat.to(torch.float32)
            tally.signal += float(exact.square().sum())
            tally.noise += float((region.restore(self._unpacked.allocate).to(torch.float32) - exact).square().sum())


@dataclass
class Keeper:
    """Keeps the saved activations of a model in fewer bits, inside `keep()` and nowhere else.

    model: any module run eagerly; nothing of it is changed.
    table: module path -> "", "bf16", "int8" or "int4"; a path that is not in it has the format of the nearest module above
        it that is, "" above all.
    seed: of the rounding; the same seed and number of passes give the same bits on every device.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1))
        >>> keeper = Keeper(model, {"": "int8", "2": "int4"})
        >>> with keeper.keep():
        ...     loss = model(torch.randn(256, 64)).sum()
        >>> loss.backward()
        >>> [(r.path, r.format, r.bytes, r.kept) for r in keeper.records if r.format]
        [('1', 'positive', 262144, 8192), ('2', 'int4', 262144, 34816)]

    Raises PlanError for a path that the model does not have and for an unknown format.
    """

    model: nn.Module
    table: Mapping[str, str]
    seed: int = 0
    passes: int = 0  # forward passes so far; save and restore it for a run that goes on bit for bit
    trim: bool = True  # give the holes of freed originals back to the system: a smaller process, for time
    records: tuple[SavedRecord, ...] = field(default=(), init=False)  # of the last pass
    _trimmer: HeapTrimmer = field(default_factory=HeapTrimmer, init=False, repr=False)

    def __post_init__(self) -> None:
        modules = dict(self.model.named_modules())
        for path, format in self.table.items():
            if path not in modules:
                raise PlanError(describe_unknown("module path", path, modules))
            if format not in SAVED_FORMATS:
                raise PlanError(describe_unknown("saved format", format, (repr(f) for f in SAVED_FORMATS)))
        self.table = {path: _inherit(self.table, path) for path in modules}

    @contextmanager
    def keep(self, *, measure: bool = False) -> Iterator[None]:
        """A block for the forward pass. Backward may run inside or after it.

        measure: also unpack everything at once and write its error into the records.
        """
        self.passes += 1
        here = _Pass(self, self.passes, measure=measure)
        with ExitStack() as stack:
            if any(self.table.values()):
                self._follow(here, stack)
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(here.pack, here.unpack))
            yield
        self.records = _make_records(here.tallies)

    def look_at_heap(self) -> None:
        """Called whenever a tensor was packed or is about to be unpacked on a processor."""
        if self.trim:
            self._trimmer.look()

    def _follow(self, here: _Pass, stack: ExitStack) -> None:
        """Have the pass told which module runs. The hooks last as long as the block."""

        def enter(path: str) -> Callable[..., None]:
            return lambda _module, args, kwargs: here.enter(path, (args, kwargs))

        def leave(*_: Any) -> None:
            here.leave()

        for path, module in self.model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(path), prepend=True, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def _inherit(table: Mapping[str, str], path: str) -> str:
    while path and path not in table:
        path = path.rpartition(".")[0]
    return table.get(path, "")


def _make_records(tallies: Mapping[tuple[str, str, str], _Tally]) -> tuple[SavedRecord, ...]:
    return tuple(
        SavedRecord(path=path, format=format, why=why, tensors=t.tensors, bytes=t.bytes, kept=t.kept,
                    sqnr=10 * math.log10(t.signal / t.noise) if t.noise > 0 and t.signal > 0 else None)
        for (path, format, why), t in tallies.items()
    )  # fmt: skip
