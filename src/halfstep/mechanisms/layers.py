"""Units: modules that follow a rule, made by giving a module a subclass of its own class.

The object stays: references to it, tied weights, hooks, `isinstance` and state_dict keys hold, also when it is the model
itself; undoing gives the class back. torch's parametrizations and FSDP2 work the same way. The subclass's forward is

    inputs -> compute format;  the original forward, under an autocast of its own;  result -> output format

The autocast around it also converts the weights that the products read; a weight that is already stored in the compute
format is not touched.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

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


def cast_floats(values: Any, dtype: torch.dtype) -> Any:
    """Every floating-point tensor in a nest of containers in `dtype`; all else as it is."""
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)


def autocast(device_type: str, compute: str, *, cache: bool = True) -> AbstractContextManager[Any]:
    """torch's autocast to a format; for fp32 the one that switches an outer autocast off.

    cache: keep converted weights until the outermost autocast ends. The cache knows a weight but not its format, so
    an autocast within another one must not use it.
    """
    if compute == "fp32":
        return torch.autocast(device_type, enabled=False)
    return torch.autocast(device_type, dtype=DTYPES[compute], cache_enabled=cache)


class Unit:
    """What the subclasses share. `_halfstep` holds (original class, device type, compute, output)."""

    _halfstep: tuple[type[nn.Module], str, str, str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original, device_type, compute, output = self._halfstep
        with autocast(device_type, compute, cache=False):
            args, kwargs = cast_floats((args, kwargs), DTYPES[compute])
            result = original.forward(self, *args, **kwargs)
        return cast_floats(result, DTYPES[output]) if output else result


class Gate(Unit):
    """A unit that only converts what the module returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original, _, _, output = self._halfstep
        return cast_floats(original.forward(self, *args, **kwargs), DTYPES[output])


class NormUnit(Unit):
    """A normalisation whose weights are stored in 16 bits: they are read in fp32, and it is computed in fp32."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original, device_type, _, output = self._halfstep
        parameters: dict[str, Any] = self._parameters  # type: ignore[attr-defined]
        stored = dict(parameters)
        parameters.update(cast_floats(stored, torch.float32))
        try:
            with autocast(device_type, "fp32"):
                args, kwargs = cast_floats((args, kwargs), torch.float32)
                return cast_floats(original.forward(self, *args, **kwargs), DTYPES[output])
        finally:
            parameters.update(stored)


def make_unit(module: nn.Module, base: type[Unit], device_type: str, compute: str, output: str) -> None:
    """Turn a module into a unit, in place."""
    original = type(module)
    module.__dict__["_halfstep"] = (original, device_type, compute, output)
    module.__class__ = type(original.__name__, (base, original), {"__module__": original.__module__})


def undo_unit(module: nn.Module) -> None:
    """Give a module its class back."""
    module.__class__ = module.__dict__.pop("_halfstep")[0]
