"""What a module can be given: settings that cannot be honoured are refused before anything is done to a model, and what other
weights are made of is kept in fp32."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from halfstep.errors import FormatError, UnsupportedError
from halfstep.mechanisms.activations import SAVED_FORMATS
from halfstep.mechanisms.layers import DTYPES, find_kind
from halfstep.mechanisms.master_weights import WAYS
from halfstep.mechanisms.memory_formats import CONVOLUTIONS
from halfstep.mechanisms.replacements import REPLACEABLE, can_be_replaced, read_products, require_products
from halfstep.numerics.formats import find_format
from halfstep.plan import Plan, Settings


def require_scalable(path: str, module: nn.Module, settings: Settings) -> None:
    """Raises UnsupportedError for a module that loss_scale=layer cannot scale."""
    scalable = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and settings.cast == "unit"
    scalable = scalable and module._parameters.get("weight") is not None  # and not made by a parametrization
    if settings.compute == "fp16" and not (scalable and settings.storage == "fp32"):
        raise UnsupportedError(
            f"module '{path}': loss_scale=layer scales the products of linear and convolution layers with cast=unit and "
            f"storage=fp32; got {type(module).__name__} with cast={settings.cast} storage={settings.storage}; give such "
            "modules compute=fp32"
        )


def has_formats_of_its_own(settings: Settings) -> bool:
    """Whether a module's products take formats that torch does not compute in, or not the same for all.

    Examples:
        >>> has_formats_of_its_own(Settings(compute="bf16", grad="bf16")), has_formats_of_its_own(Settings(compute="int8"))
        (False, True)
    """
    stated = {settings.compute, *filter(None, (settings.grad, settings.grad_input, settings.grad_weight))}
    return len(stated) > 1 or not stated <= DTYPES.keys()


def replaces_products(plan: Plan, module: nn.Module, settings: Settings) -> bool:
    """Whether a module's products are other than torch's own in its compute format.

    A lookup multiplies nothing, so there is nothing to emulate in an embedding.
    """
    multiplies = can_be_replaced(module) and find_kind(module) != "embedding"
    emulated = plan.products == "emulated" and settings.compute != "fp32" and multiplies
    return emulated or has_formats_of_its_own(settings)


def name_around(settings: Settings) -> str:
    """The format of what is not a product in a module: its compute format, where torch has that."""
    return settings.compute if settings.compute in DTYPES else "bf16"


def require_possible(path: str, module: nn.Module, settings: Settings) -> None:
    """Raises UnsupportedError, in one line, for settings that a module cannot be given here."""
    where = f"module '{path}'" if path else "the model"
    for slot in ("storage", "output"):
        format = getattr(settings, slot)
        if format and format not in DTYPES:
            raise UnsupportedError(f"{where}: {slot}={format} cannot be honoured; allowed: {', '.join(DTYPES)}")
    if settings.saved not in (*SAVED_FORMATS, "fp32"):
        allowed = ", ".join(["fp32 (as they are)", *filter(None, SAVED_FORMATS)])
        raise UnsupportedError(
            f"{where}: saved={settings.saved} cannot be honoured; activations are saved in {allowed}"
        )
    if settings.memory_format and find_kind(module) and not isinstance(module, CONVOLUTIONS):
        raise UnsupportedError(
            f"{where} is a {type(module).__name__}, and memory_format={settings.memory_format} is for 2-d convolutions; give "
            "that rule their paths, or kind=conv where the model has no others"
        )
    if has_formats_of_its_own(settings):
        _require_products(where, module, settings)
    elif settings.storage != "fp32" and settings.storage != settings.compute:
        raise UnsupportedError(
            f"{where}: storage={settings.storage} with compute={settings.compute}; weights are stored in fp32 or in the "
            "format they are computed in"
        )
    if settings.master in ("none", "fp32"):
        return
    if settings.storage == "fp32":
        raise UnsupportedError(
            f"{where}: master={settings.master} needs storage=bf16; fp32 weights are their own truth"
        )
    if find_format(settings.storage).name != "bf16":
        raise UnsupportedError(
            f"{where}: master={settings.master} works behind bf16; storage={settings.storage} "
            f"{WAYS[settings.master].why_bf16}, it takes master=fp32"
        )


def _require_products(where: str, module: nn.Module, settings: Settings) -> None:
    if not can_be_replaced(module):
        slots = ("compute", "grad", "grad_input", "grad_weight")
        odd = [f"{s}={getattr(settings, s)}" for s in slots if getattr(settings, s) not in ("", "fp32", "bf16", "fp16")]
        raise UnsupportedError(
            f"{where} is a {type(module).__name__}, and {' '.join(odd) or 'products in several formats'} is for "
            f"{', '.join(kind.__name__ for kind in REPLACEABLE)}; give that rule a kind, such as kind=linear, or a path, and "
            "the rest compute=bf16"
        )
    if find_format(settings.compute).block and settings.scaling != "tensor":
        raise UnsupportedError(
            f"{where}: {settings.compute} brings its own scales; leave scaling={settings.scaling} out"
        )
    try:
        require_products(module, read_products(settings))
    except (FormatError, UnsupportedError) as error:
        raise UnsupportedError(f"{where}: {error}") from None
    if settings.scaling == "delayed" and find_kind(module) in ("attention", "recurrent"):
        raise UnsupportedError(f"{where} makes several products, and scaling=delayed follows one; use scaling=tensor")


def keep_ingredients_wide(model: nn.Module, table: Mapping[str, Settings]) -> dict[str, Settings]:
    """Settings under which what other weights are made of is stored in fp32, also where it is used itself: code that makes
    them may mix it with buffers, as spectral norm does, and buffers are not converted."""
    ingredients = {p for module in model.modules() for p in _list_ingredients(module)}
    kept = dict(table)
    for path, module in model.named_modules():
        if table[path].storage != "fp32" and not ingredients.isdisjoint(module.parameters(recurse=False)):
            why = "; ".join(filter(None, [table[path].why, "other weights are made of it"]))
            kept[path] = replace(table[path], storage="fp32", master="none", why=why)
    return kept


def _list_ingredients(module: nn.Module) -> list[nn.Parameter]:
    """What a module makes weights of: a parametrization, or one under the older functions, which hook into it."""
    hooks = module._forward_pre_hooks.values()
    if isinstance(module, ParametrizationList):
        return list(module.parameters())
    is_older = any(isinstance(hook, SpectralNorm | WeightNorm) for hook in hooks)
    return list(module.parameters(recurse=False)) if is_older else []
