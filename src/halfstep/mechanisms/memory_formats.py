"""Memory formats of 2-d convolutions: the order in which weights and activations lie in memory.

    contiguous       [batch][channel][row][column]      torch's own
    channels_last    [batch][row][column][channel]      what most kernels for convolutions are fastest in, but not all

A convolution whose format is stated has its weight laid out once, and what it is given on entry, where that comes in the
other order. Its result is in the same order, so that neighbours of one format convert nothing between them; so do gradients
on the way back. torch by itself would go by either of both: one tensor in channels_last makes the whole product so.

The formats differ in no number but by rounding: kernels add up in other orders.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.nests import map_tensors

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def find_memory_format(module: nn.Module) -> str:
    """The memory format of a convolution's weight; "" where it is in both, as with a kernel of 1x1, or has no weight of its own.

    Examples:
        >>> find_memory_format(nn.Conv2d(3, 4, 3)), find_memory_format(nn.Conv2d(3, 4, 1))
        ('contiguous', '')
    """
    weight = module._parameters.get("weight")  # that of a parametrization is made anew for each call
    if weight is None:
        return ""
    found = [name for name, order in MEMORY_FORMATS.items() if weight.is_contiguous(memory_format=order)]
    return found[0] if len(found) == 1 else ""


def lay_out(module: nn.Module, memory_format: str) -> Callable[[], None]:
    """Give a convolution a memory format; what is returned takes it back.

    Examples:
        >>> layer = nn.Conv2d(3, 4, 3)
        >>> undo = lay_out(layer, "channels_last")
        >>> layer(torch.ones(2, 3, 5, 5)).is_contiguous(memory_format=torch.channels_last)
        True
        >>> undo(); layer(torch.ones(2, 3, 5, 5)).is_contiguous()
        True
    """
    before, order = find_memory_format(module), MEMORY_FORMATS[memory_format]
    _lay_out_weight(module, order)
    handle = module.register_forward_pre_hook(partial(_lay_out_input, memory_format), with_kwargs=True)

    def undo() -> None:
        handle.remove()
        if before:
            _lay_out_weight(module, MEMORY_FORMATS[before])

    return undo


def return_contiguous(model: nn.Module) -> Callable[[], None]:
    """From now on the model returns contiguous tensors, which may be viewed; what is returned takes that back.

    Examples:
        >>> layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        >>> undo = return_contiguous(layer)
        >>> layer(torch.ones(2, 3, 5, 5)).view(-1).shape
        torch.Size([72])
    """
    return model.register_forward_hook(_make_contiguous).remove


def _lay_out_weight(module: nn.Module, order: torch.memory_format) -> None:
    """Of the parameter, which stays the same object, and of a gradient that waits in it."""
    weight = module._parameters.get("weight")
    if weight is not None and not weight.is_contiguous(memory_format=order):
        gradient, weight.grad = weight.grad, None
        weight.data = weight.data.contiguous(memory_format=order)
        weight.grad = None if gradient is None else gradient.contiguous(memory_format=order)


def _lay_out_input(
    memory_format: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An image without a batch has one order in torch, and torch.vmap knows one only."""
    is_mapped = torch._C._are_functorch_transforms_active()

    def convert(value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.ndim == 4 and not is_mapped
        return value.contiguous(memory_format=MEMORY_FORMATS[memory_format]) if is_batch else value

    return tuple(map(convert, args)), {key: convert(value) for key, value in kwargs.items()}


def _make_contiguous(_module: nn.Module, _args: Any, result: Any) -> Any:
    return map_tensors(lambda t: t.contiguous() if t.ndim == 4 else t, result)
