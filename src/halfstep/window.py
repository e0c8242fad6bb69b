"""What comes in between two updates: micro-batches, their losses and gradients; and whether it may be applied.

The first forward pass of a window notes the buffers, so that a window that is not applied can leave no trace; each forward
pass notes its arguments, so that one that fails can be run again to see where. When nothing fails, looking costs one
reduction over gradients and losses.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.optim import Optimizer

from halfstep.control.monitor import find_first_nonfinite
from halfstep.distributed import communicates, is_inside_wrapper
from halfstep.errors import ModelError, PrecisionWarning
from halfstep.mechanisms.gradients import find_nonfinite, measure_norm, measure_norm_slowly, take_values
from halfstep.nests import list_tensors, map_tensors
from halfstep.numerics.products import Histories
from halfstep.snapshot import Buffers, copy_buffers, find_owners, put_back_buffers

NO_GRADIENT = "no parameter that the optimizer holds received a gradient"
ABOUT_DATA = {"(input)": ": so is the input", "(empty)": ": the batch is empty"}
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
PRODUCTS = ("AddmmBackward", "MmBackward", "BmmBackward", "BaddbmmBackward", "ConvolutionBackward")
CASTS = ("ToCopyBackward",)  # nodes of a graph, by the beginning of their names


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the check of a window found; it may be applied when `cause` is empty."""

    norm: float = 0.0  # of the unscaled gradients
    cause: str = ""
    tensors: tuple[str, ...] = ()
    layer: str = ""
    forward_nonfinite: bool = False
    nonfinite: bool = False


class Window:
    """The micro-batches since the last update, and the gradients they left."""

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self.model, self.optimizers = model, tuple(optimizers)
        self.histories = Histories({})  # of the plan's delayed scales
        self.names = {p: name for name, p in model.named_parameters()}
        self.when_loaded: Callable[[], None] = lambda: None  # called after the model's load_state_dict
        self.stand_by: Callable[[], AbstractContextManager[Any]] = nullcontext  # what backward passes run under
        self.autocast_weights: set[nn.Parameter] = set()  # which autocast should bring to 16 bits
        self.clips = False  # whether gradients will be clipped, by a norm with the bits of torch's
        self.is_wrapped = False  # whether forward passes come through DistributedDataParallel
        self._has_strangers: bool | None = None  # whether the loss reaches parameters of other models
        self._empty()

    def _empty(self) -> None:
        self.micro = 0  # micro-batches that are in
        self.buffers: Buffers = {}  # as they were before the window
        self.amaxes: dict[str, Tensor] = {}  # of the histories, likewise
        self._losses: list[Tensor] = []
        self._inputs: dict[int, tuple[Any, Any]] = {}  # micro-batch -> arguments of the model
        self._sums: dict[nn.Parameter, Tensor] = {}  # fp32 sums of 16-bit gradients

    @property
    def held(self) -> list[nn.Parameter]:
        """The parameters that the optimizers move, in their order."""
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

    def watch(self) -> ExitStack:
        """Note what every forward pass of the model begins from, until the stack that is returned is closed."""
        hooks = ExitStack()
        hooks.callback(self.model.register_forward_pre_hook(Noting(self), with_kwargs=True).remove)
        hooks.callback(self.model.register_load_state_dict_post_hook(_Forgetting(self)).remove)
        return hooks

    def note_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of a forward pass, and before the first one of a window the buffers."""
        if not self._inputs:
            self.buffers, self.amaxes = copy_buffers(find_owners(self.model)), self.histories.copy()
        self.is_wrapped = is_inside_wrapper()
        # detached: another network's graph may hang on them
        self._inputs[self.micro] = map_tensors(Tensor.detach, (args, kwargs), records=False)

    def forget_passes(self) -> None:
        """Forward passes that no backward pass has followed do not count any more: the model has been loaded since."""
        if not self.micro:
            self.buffers, self.amaxes, self._inputs = {}, {}, {}

    def go_backward(self, loss: Tensor | None, factor: float) -> None:
        """Backward of loss * factor. An error on the way, as for lack of memory, drops the whole window."""
        loss = _require_loss(loss)
        if not self.micro:
            self._require_no_gradients()
        if self._has_strangers is None:
            self._has_strangers = _reaches_strangers(loss, {*self.names, *self.held})
            if self.autocast_weights and _lacks_autocast(loss, self.autocast_weights):
                warnings.warn(
                    "the plan computes products in 16 bits under autocast, but this loss was computed in fp32 throughout; run "
                    "the model and the loss inside `with stepper.autocast():`",
                    PrecisionWarning,
                    stacklevel=3,
                )
        # another model's gradients stay its own business, as in the generator's step of a GAN
        inputs = [p for p in self.held if p.requires_grad] if self._has_strangers else None
        with self.dropped_on_error(), self.stand_by():
            try:
                (loss.to(torch.float32) * factor).backward(inputs=inputs)
            except RuntimeError as error:
                if "a second time" not in str(error):
                    raise
                raise ModelError(
                    "the loss has been through a backward pass already; step() makes it itself: leave out loss.backward()"
                ) from None
        self._losses.append(loss.detach())
        self.micro += 1

    @contextmanager
    def dropped_on_error(self) -> Iterator[None]:
        """An error inside the block drops the window, and everything is as before it."""
        try:
            yield
        except BaseException:
            self.put_back()
            self.clear()
            raise

    def _require_no_gradients(self) -> None:
        """What is there at the start of a window would be added to, and divided by the scale."""
        stale = [p for p in self.held if p.grad is not None and bool(take_values(p.grad).any())]
        if stale:
            names = self.name_tensors(set(stale))
            raise ModelError(
                f"{len(stale)} parameters hold gradients that no step() made, the first is {names[0]}; step() makes the backward "
                "pass itself: leave out loss.backward(), add losses up before step(), or call optimizer.zero_grad()"
            )

    def collect(self) -> None:
        """Move 16-bit gradients of a micro-batch into fp32 sums: adding in bf16 loses what is 256 times smaller."""
        sums = self._sums
        for parameter in self.held:
            if parameter.grad is not None and (parameter in sums or parameter.grad.dtype in SIXTEEN_BITS):
                gradient = parameter.grad.to(torch.float32)
                sums[parameter] = sums[parameter].add_(gradient) if parameter in sums else gradient
                parameter.grad = None

    def take_gradients(self) -> dict[nn.Parameter, Tensor]:
        """The sums over the window, of every parameter that received a gradient."""
        sums = self._sums
        found = [(p, sums.get(p, p.grad) if sums else p.grad) for p in self.held]
        return {p: gradient for p, gradient in found if gradient is not None}

    def inspect(
        self, gradients: dict[nn.Parameter, Tensor], lift: float, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> Finding:
        """Whether the window may be applied. lift: the gradients over those of the mean loss."""
        norm, losses = measure_norm(gradients.values(), self._losses, like_torch=self.clips)
        bad_loss = next((micro for micro, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if math.isfinite(norm) and bad_loss is None:
            cause = "" if gradients else NO_GRADIENT
            return Finding(norm=norm / lift, cause=cause)
        tensors = self.name_tensors(set(find_nonfinite(gradients)))
        if bad_loss is not None:
            found = self._find_guilty(bad_loss, autocast)
            layer, cause = found or "", f"the loss is {losses[bad_loss]}{self._explain(found)}"
        elif tensors:
            layer = tensors[-1].rpartition(".")[0]  # backward meets the last layer first
            are = "gradient is" if len(tensors) == 1 else "gradients are"
            cause = f"{len(tensors)} {are} not finite, the first on the way back is {tensors[-1]}"
        else:
            return Finding(norm=measure_norm_slowly(gradients.values()) / lift)
        return Finding(norm=norm / lift, cause=cause, tensors=tensors, layer=layer,
                       forward_nonfinite=bad_loss is not None, nonfinite=True)  # fmt: skip

    def inspect_loss(self, loss: Tensor | None, autocast: Callable[[], AbstractContextManager[Any]]) -> Finding:
        """What can be said before the backward pass."""
        _, losses = measure_norm((), [_require_loss(loss)])
        if math.isfinite(losses[0]):
            return Finding()
        self._losses = [_require_loss(loss)]
        return self.inspect({}, 1.0, autocast)

    def name_tensors(self, bad: set[nn.Parameter]) -> tuple[str, ...]:
        """Names of parameters, in the model's order."""
        known = tuple(name for p, name in self.names.items() if p in bad)
        return ("(a parameter outside the model)",) * (len(bad) > len(known)) + known

    def _find_guilty(self, micro: int, autocast: Callable[[], AbstractContextManager[Any]]) -> str | None:
        """The layer where a bad forward pass went wrong, by running it again; None where that cannot be told."""
        if micro not in self._inputs or communicates(self.model):
            return None
        if any(not tensor.numel() for tensor in list_tensors(self._inputs[micro])):
            return "(empty)"
        try:
            with autocast():
                return find_first_nonfinite(self.model, *self._inputs[micro])
        except Exception:  # an explanation that cannot be had must not end the run
            return None

    def _explain(self, layer: str | None) -> str:
        """What a pass that was run again has shown, in words that go on after "the loss is nan"."""
        if layer in ABOUT_DATA:
            return ABOUT_DATA[layer]
        if not layer:
            return "" if layer is None else ", though every output of the model is finite"
        module = dict(self.model.named_modules()).get(layer, self.model)
        bad = [name for name, p in module.named_parameters(recurse=False) if not bool(torch.isfinite(p).all())]
        first = f", first in the output of '{layer}'"
        return f"{first}, whose {bad[0]} is not finite" if bad else first

    def put_back(self) -> None:
        """Make buffers and histories what they were before the window."""
        put_back_buffers(self.buffers)
        self.histories.put_back(self.amaxes)

    def clear(self) -> None:
        """Begin anew, without gradients."""
        self._empty()
        for parameter in self.names:
            parameter.grad = None
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any] | None:
        """A window that is open: losses, gradients by the optimizers' order of parameters, and the buffers before it."""
        if not self.micro:
            return None
        return {
            "losses": [float(loss) for loss in self._losses],
            "sums": {i: self._sums[p].clone() for i, p in enumerate(self.held) if p in self._sums},
            "gradients": {i: p.grad.clone() for i, p in enumerate(self.held) if p.grad is not None},
            "buffers": [None if value is None else value.clone() for value in self.buffers.values()],
            "amaxes": self.amaxes,
        }

    def load_state_dict(self, state: dict[str, Any] | None, factor: float = 1.0) -> None:
        """Go on in the middle of a window. factor: the loss scale over that of the saved gradients."""
        self.clear()
        if state is None:
            return
        held = self.held
        self.micro = len(state["losses"])
        self._losses = [torch.tensor(loss, device=held[0].device) for loss in state["losses"]]
        self._inputs = {-1: ((), {})}  # the window's first forward pass was before
        for i, value in [*state["sums"].items(), *state["gradients"].items()]:
            if i in state["sums"] or value.dtype != held[i].dtype or value.dtype in SIXTEEN_BITS:
                self._sums[held[i]] = lay_out_like(held[i], value, torch.float32) * factor
            else:
                held[i].grad = lay_out_like(held[i], value, held[i].dtype) * factor
        self.amaxes = self.histories.copy() | state.get("amaxes", {})  # a plan that came since may have some of its own
        if state["buffers"]:  # none are noted in evaluation mode
            places = copy_buffers(find_owners(self.model))
            if len(places) > len(state["buffers"]):  # by a version that noted no places without a buffer
                places = {place: now for place, now in places.items() if now is not None}
            self.buffers = {
                place: None if value is None else value.to(held[0].device if now is None else now.device)
                for (place, now), value in zip(places.items(), state["buffers"], strict=True)
            }


def lay_out_like(parameter: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A value with the strides of its parameter: fused kernels walk through memory, not through indices."""
    if value.is_sparse:
        return value.to(parameter.device, dtype)
    return torch.empty_like(parameter, dtype=dtype, requires_grad=False).copy_(value)


class Noting:
    """The forward pre-hook. A copy of the model that is made or saved takes an inert one along, and no window."""

    def __init__(self, window: Window | None) -> None:
        self.window = window

    def __reduce__(self) -> tuple[type, tuple[None]]:
        return type(self), (None,)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self.window is None:
            return
        if module.training and torch.is_grad_enabled():
            self.window.note_batch(args, kwargs)


class _Forgetting(Noting):
    """The hook after load_state_dict."""

    def __call__(self, module: nn.Module, keys: Any) -> None:  # type: ignore[override]
        if self.window is not None:
            self.window.forget_passes()
            self.window.when_loaded()


def _require_loss(loss: Tensor | None) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss
    given = repr(loss)
    if isinstance(loss, Tensor):
        given = f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
    raise ModelError(
        f"step() takes the loss: one number that depends on the weights; got {given}; reduce it with .mean() and do not "
        "detach it"
    )


def _reaches_strangers(loss: Tensor, own: set[nn.Parameter]) -> bool:
    """Whether the graph of a loss ends in parameters that are not `own`."""
    leaves = (getattr(node, "variable", None) for node in _walk(loss))
    return any(isinstance(leaf, nn.Parameter) and leaf not in own for leaf in leaves)


def _lacks_autocast(loss: Tensor, weights: set[nn.Parameter]) -> bool:
    """Whether a loss was computed from some of these fp32 weights without any autocast, whoever might have opened it.

    A product of an fp32 weight under autocast leaves a cast in the graph. A node that is written in Python, or compiled,
    may hide casts, so that nothing can be said then.
    """
    nodes = list(_walk(loss))
    names = {node.name() for node in nodes}
    if any(isinstance(node, BackwardCFunction) for node in nodes) or any(name.startswith(CASTS) for name in names):
        return False
    leaves = {getattr(node, "variable", None) for node in nodes}
    return not weights.isdisjoint(leaves) and any(name.startswith(PRODUCTS) for name in names)


def _walk(loss: Tensor) -> Iterator[Node]:
    """Every node of a loss's graph, once."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [next_node for next_node, _ in node.next_functions]
