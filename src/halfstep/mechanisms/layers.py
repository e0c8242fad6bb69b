"""Units: modules that follow a rule, made by giving a module a subclass of its own class.

The object stays: references to it, tied weights, hooks, `isinstance` and state_dict keys hold, also when it is the model
itself; undoing gives the class back. torch's parametrizations and FSDP2 work the same way. The subclass's forward is

    inputs -> compute format;  the original forward, under an autocast of its own;  result -> output format

The autocast around it also converts the weights that the products read; a weight that is already stored in the compute
format is not touched. Where torch's autocast will not do, a unit is given another block that stands in for it.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from halfstep.errors import PrecisionWarning
from halfstep.nests import map_tensors

Block = Callable[[], AbstractContextManager[Any]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_KINDS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("linear", (nn.Linear, nn.Bilinear)),
    ("conv", (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("norm", (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)),
    ("attention", (nn.MultiheadAttention,)),
    ("recurrent", (nn.RNNBase, nn.RNNCellBase)),
)


def find_kind(module: nn.Module) -> str:
    """The word a plan has for this module; "" when it has none.

    Examples:
        >>> find_kind(nn.Linear(2, 2)), find_kind(nn.Sequential())
        ('linear', '')
    """
    return next((kind for kind, classes in _KINDS if isinstance(module, classes)), "")


def cast_floats(values: Any, dtype: torch.dtype, *, records: bool = True) -> Any:
    """Every floating-point tensor in a nest of containers in `dtype`; all else as it is. records: of dataclasses too."""
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, values, records=records)


def autocast(device_type: str, compute: str, *, cache: bool = True) -> AbstractContextManager[Any]:
    """torch's autocast to a format; for fp32 the one that switches an outer autocast off.

    cache: keep converted weights until the outermost autocast ends. The cache knows a weight but not its format, so
    an autocast within another one must not use it.
    """
    if compute == "fp32":
        return torch.autocast(device_type, enabled=False)
    return torch.autocast(device_type, dtype=DTYPES[compute], cache_enabled=cache)


class Unit:
    """What the subclasses share. `_halfstep` holds (original class, device type, compute, output), `_halfstep_inside` opens
    the block that the original forward runs in, where that is not torch's autocast."""

    _halfstep: tuple[type[nn.Module], str, str, str]
    _halfstep_inside: Block | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original, device_type, compute, output = self._halfstep
        inside = self._halfstep_inside
        with autocast(device_type, compute, cache=False) if inside is None else inside():
            args, kwargs = cast_floats((args, kwargs), DTYPES[compute], records=False)
            result = original.forward(self, *args, **kwargs)
        return cast_floats(result, DTYPES[output]) if output else result


class Gate(Unit):
    """A unit that only converts what the module returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original, _, _, output = self._halfstep
        return cast_floats(original.forward(self, *args, **kwargs), DTYPES[output])


class ProductUnit(Unit):
    """A unit inside which torch's product functions are replaced, by the block that it is given.

    It converts no inputs: a product rounds its operands itself, from the numbers as they are. Its result is in the format
    of the autocast around it; where that was forgotten, in fp32 like everything else there. The products of a
    parametrization, which make a weight, are none of the module's: they are made before.
    """

    _halfstep_inside: Block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original, device_type, around, output = self._halfstep
        is_around = around == "fp32" or torch.is_autocast_enabled(device_type)
        if not is_around and not torch.compiler.is_compiling() and torch.is_grad_enabled():
            warnings.warn(
                "the plan computes what is between scaled products in 16 bits under autocast, but there is none here; run the "
                "model and the loss inside `with stepper.autocast():`",
                PrecisionWarning,
                stacklevel=2,
            )
        with self._make_weights(), self._halfstep_inside():
            result = original.forward(self, *args, **kwargs)
        return cast_floats(result, DTYPES[output or (around if is_around else "fp32")])

    def _make_weights(self) -> AbstractContextManager[Any]:
        """Have those of a parametrization at hand inside the block."""
        module = cast(nn.Module, self)
        if not parametrize.is_parametrized(module):
            return nullcontext()
        with ExitStack() as stack:
            stack.enter_context(parametrize.cached())
            for name in cast(nn.ModuleDict, module.parametrizations):
                getattr(module, name)
            return stack.pop_all()


class ScaledUnit(Unit):
    """A linear or convolution unit whose backward products are scaled by themselves, for gradients that no one scale for
    all layers can lift above fp16's floor (2^-24) and keep below its largest number (65504).

        s               = the largest power of two for which no product can overflow
        g               -> fp16(s g)
        grad_input      = fp16(s g) W / s          grad_weight = fp16(s g)^T x / s          / s in fp32, exact

    Between layers gradients travel in fp32, unscaled, so branches and joins need no care; that is where this differs
    from Zhao et al. 2019 (arXiv 1910.12385), who carry the scale along. The bound on s is theirs (65504 over the
    number of terms times the largest product), taken from the largest magnitudes of g, W and x at every step.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _, _, _, output = self._halfstep
        (x, *rest), kwargs = (args or (kwargs["input"],)), {k: v for k, v in kwargs.items() if k != "input"}
        if not x.numel():
            return super().forward(x, *rest, **kwargs)
        cell = _Cell()
        with _shown(self, lambda p: _Lower.apply(p, cell)) as stored:
            y = super().forward(_Lower.apply(x.to(torch.float32), cell), *rest, **kwargs)
        weight, channels = stored["weight"], -1 - len(getattr(self, "kernel_size", ()))  # the place of the channels
        terms = weight.numel() / x.shape[channels], y.numel() / y.shape[channels]
        cell.bounds = [weight.detach().abs().amax() * terms[0], x.detach().abs().amax().clamp_min(1.0) * terms[1]]
        return _Lift.apply(y, cell).to(DTYPES[output or "fp32"])


class _Cell:
    """What the backward pass of one call of a ScaledUnit shares."""

    bounds: list[Tensor]  # the largest sums that a gradient of 1 can lead to
    scale: Tensor


class _Lower(torch.autograd.Function):
    """The identity; its gradient is divided by the cell's scale."""

    @staticmethod
    def forward(context: Any, x: Tensor, cell: _Cell) -> Tensor:
        context.cell = cell
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / context.cell.scale, None


class _Lift(torch.autograd.Function):
    """fp16 to fp32; chooses the cell's scale for the gradient that comes back, and multiplies by it."""

    @staticmethod
    def forward(context: Any, y: Tensor, cell: _Cell) -> Tensor:
        context.cell, context.dtype = cell, y.dtype
        return y.to(torch.float32)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        cell: _Cell = context.cell
        largest = gradients[0].abs().amax() * torch.stack([*cell.bounds, torch.ones_like(cell.bounds[0])]).amax()
        cell.scale = torch.exp2(torch.floor(torch.log2(torch.finfo(context.dtype).max / largest)).clamp(-100, 100))
        return (gradients[0] * cell.scale).to(context.dtype), None


class NormUnit(Unit):
    """A normalisation whose weights are stored in 16 bits: they are read in fp32, and it is computed in fp32."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original, device_type, _, output = self._halfstep
        with _shown(self, lambda p: p.to(torch.float32)), autocast(device_type, "fp32"):
            args, kwargs = cast_floats((args, kwargs), torch.float32, records=False)
            return cast_floats(original.forward(self, *args, **kwargs), DTYPES[output])


_showing = threading.RLock()


@contextmanager
def _shown(unit: Unit, function: Callable[[Tensor], Tensor]) -> Iterator[dict[str, Any]]:
    """A block in which a module has what a function makes of its parameters; yields them as they are.

    One thread at a time: another one would take what is shown for the parameters, and leave it there.
    """
    parameters: dict[str, Any] = unit._parameters  # type: ignore[attr-defined]
    with nullcontext() if torch.compiler.is_compiling() else _showing:
        stored = dict(parameters)
        parameters.update({name: function(p) for name, p in stored.items() if p is not None})
        try:
            yield stored
        finally:
            parameters.update(stored)


def make_unit(
    module: nn.Module, base: type[Unit], device_type: str, compute: str, output: str, inside: Block | None = None
) -> None:
    """Turn a module into a unit, in place. inside: opens the block that its forward runs in, in place of torch's autocast."""
    original = type(module)
    unit = type(original.__name__, (base, original), {"__module__": original.__module__})
    module.__dict__["_halfstep"] = (original, device_type, compute, output)
    if inside is not None:
        module.__dict__["_halfstep_inside"] = inside
    module.__class__ = unit


def is_unit(module: nn.Module) -> bool:
    """Whether `make_unit` has made it one."""
    return "_halfstep" in module.__dict__


def undo_unit(module: nn.Module) -> None:
    """Give a module its class back."""
    module.__dict__.pop("_halfstep_inside", None)
    module.__class__ = module.__dict__.pop("_halfstep")[0]
