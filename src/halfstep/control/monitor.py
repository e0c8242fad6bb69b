"""Observers of a running model. They watch and write down; they decide nothing.

`Audit` sits below autocast, where torch's dispatcher hands over the operations that really run: the dtype of every
matmul and convolution and every conversion between float formats, under the name of the module that was running. In the
backward pass no module runs; there it is the module whose forward made the node of the graph that is running: nodes are
numbered as they are made, so the numbers at which modules began and ended tell. Inside the audit's block everything costs
more; outside it nothing does.
"""

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.machine.timing import describe_convolution
from halfstep.mechanisms.layers import DTYPES, find_kind
from halfstep.nests import list_tensors

_aten = torch.ops.aten
_PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_scaled_mm", "_int_mm", "_addmm_activation",
    "convolution", "convolution_backward", "conv1d", "conv2d", "conv3d",
    "mkldnn_linear", "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward",
}  # fmt: skip
_CASTS = {"_to_copy", "copy_"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BACKWARD = "(backward)"


def name_dtype(dtype: torch.dtype) -> str:
    """halfstep's name of a torch dtype.

    Examples:
        >>> name_dtype(torch.bfloat16)
        'bf16'
    """
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


@contextmanager
def follow_modules(model: nn.Module, stack: list[str], note: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keep `stack` at the paths of the modules whose forward is running, outermost first. note: called when it changed."""
    with ExitStack() as hooks:
        for path, module in model.named_modules():

            def enter(_module: nn.Module, _args: Any, path: str = path) -> None:
                stack.append(path)
                note()

            def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
                stack.pop()
                note()

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def name_backward(path: str | None) -> str:
    """What the backward pass of a module is called; None for nodes that no module's forward made, as those of the loss.

    Examples:
        >>> name_backward("fc"), name_backward(""), name_backward(None)
        ('fc (backward)', '(model) (backward)', '(backward)')
    """
    return BACKWARD if path is None else f"{path or '(model)'} {BACKWARD}"


class Trail:
    """Which module's forward made a node of autograd's graph, by the number that the node got when it was made.

    Numbers are a thread's own: of forward passes in other threads nothing is known.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._numbers: list[int] = []  # of the nodes from which on another module runs
        self._paths: list[str | None] = []

    def note(self, path: str | None) -> None:
        """From now on the module at `path` makes nodes; None: none does."""
        if threading.get_ident() == self._thread:
            self._numbers.append(torch._C._autograd._get_sequence_nr())
            self._paths.append(path)

    def find_running(self) -> str | None:
        """The module that made the node that the backward pass is at; None where that cannot be told."""
        node = torch._C._current_autograd_node()
        index = bisect_right(self._numbers, node._sequence_nr()) if node is not None else 0
        return self._paths[index - 1] if index else None


class Audit(TorchDispatchMode):
    """What every layer really ran in, seen at run time. A product that is emulated is named with both formats.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> with Audit(model) as audit:
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> audit.computed
        {'0': Counter({'fp32': 1}), '0 (backward)': Counter({'fp32': 1})}
    """

    def __init__(self, model: nn.Module, replaced: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.model = model
        self.replaced = replaced or {}  # path of a module with products of its own -> their format
        self.computed: dict[str, Counter[str]] = {}  # path -> {format: products run in it}
        self.casts: Counter[tuple[str, str, str]] = Counter()  # (path, from, to) -> how often
        self.cast_numbers: Counter[tuple[str, str, str]] = Counter()  # (path, from, to) -> numbers converted
        self._running: list[str] = []
        self._trail = Trail()
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        self._trail = Trail()
        self._hooks.enter_context(follow_modules(self.model, self._running, self._note_change))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._hooks.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        path = self._running[-1] if self._running else name_backward(self._trail.find_running())
        if name in _PRODUCTS or "attention" in name:
            tensors = [t for t in list_tensors(args) if t.dtype not in (torch.bool, torch.int64)]
            if tensors:
                self.computed.setdefault(path, Counter())[self._name_format(path, tensors[0].dtype)] += 1
        elif name in _CASTS:
            self._note_cast(path, args[1] if name == "copy_" else args[0], result)
        return result

    def _note_change(self) -> None:
        self._trail.note(self._running[-1] if self._running else None)

    def _name_format(self, path: str, dtype: torch.dtype) -> str:
        """The format of a product, and where no unit multiplies it here, the one that it is emulated in."""
        seen, planned = name_dtype(dtype), self.replaced.get(path, "")
        return seen if planned in ("", seen) else f"{planned} emulated in {seen}"

    def _note_cast(self, path: str, source: Any, result: Tensor) -> None:
        if not isinstance(source, Tensor) or source.dtype == result.dtype:
            return
        if source.is_floating_point() and result.is_floating_point():
            key = (path, name_dtype(source.dtype), name_dtype(result.dtype))
            self.casts[key] += 1
            self.cast_numbers[key] += result.numel()

    def __str__(self) -> str:
        lines = []
        for path, counts in self.computed.items():
            lines.append(f"{path or '(model)'}: {', '.join(f'{n} in {f}' for f, n in counts.items())}")
        for key, count in self.casts.items():
            path, source, target = key
            numbers = self.cast_numbers[key]
            lines.append(f"{path or '(model)'}: cast {source} -> {target}, {count} times, {numbers} numbers")
        return "\n".join(lines)


def find_first_nonfinite(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Run the model once more and name what was first not finite: "(input)", the path of a module, or "" for nothing.

    The module named is the first that returned a NaN or an infinity, and of modules inside each other the innermost.
    The random numbers that the run draws are given back, and buffers that it moves are the caller's to put back.

    Examples:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> _ = nn.init.constant_(model[1].weight, float("inf"))
        >>> find_first_nonfinite(model, (torch.ones(1, 1),), {})
        '1'
    """
    if not _is_finite((args, kwargs), masks=True):
        return "(input)"
    found: list[str] = []
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack, torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        for path, module in model.named_modules():

            def look(_module: nn.Module, _args: Any, result: Any, path: str = path) -> None:
                if not found and not _is_finite(result):
                    found.append(path or "(model)")

            stack.callback(module.register_forward_hook(look).remove)
        model(*args, **kwargs)
    return found[0] if found else ""


def _is_finite(values: Any, *, masks: bool = False) -> bool:
    """masks: negative infinity is one, as in an attention mask, and no fault."""
    leaves = [t for t in list_tensors(values) if t.is_floating_point() or t.is_complex()]
    return all(
        bool((torch.isfinite(t) | (torch.isneginf(t) if masks and not t.is_complex() else False)).all()) for t in leaves
    )


@dataclass(kw_only=True)
class LayerShape:
    """The product that a layer makes, and how often in one forward pass."""

    path: str
    kind: str
    operation: str  # matmul | conv2d
    shape: tuple[int, ...]  # as in records.Measurement
    calls: int = 1
    input_numbers: int = 0  # numbers that would be converted on the way in
    output_numbers: int = 0
    weight: tuple[int, ...] = field(default=())


@contextmanager
def observe_shapes(model: nn.Module) -> Iterator[Mapping[str, LayerShape]]:
    """Inside the block, note the product that every linear and 2-d convolution makes; filled as the model runs."""
    seen: dict[str, LayerShape] = {}
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):

                def note(module: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path) -> None:
                    if path in seen:
                        seen[path].calls += 1
                    else:
                        seen[path] = _describe(path, module, args[0] if args else kwargs["input"], result)

                hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        yield seen


def _describe(path: str, module: nn.Module, x: Tensor, y: Tensor) -> LayerShape:
    shape: tuple[int, ...]
    if isinstance(module, nn.Conv2d):
        operation, shape = "conv2d", describe_convolution(module, x.shape)
    else:
        operation, shape = "matmul", (x.numel() // x.shape[-1], x.shape[-1], y.shape[-1])
    weight = getattr(module, "weight", None)
    return LayerShape(
        path=path, kind=find_kind(module), operation=operation, shape=shape,
        input_numbers=x.numel(), output_numbers=y.numel(), weight=tuple(weight.shape) if weight is not None else (),
    )  # fmt: skip
