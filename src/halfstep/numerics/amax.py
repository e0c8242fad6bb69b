"""The largest magnitudes, amax: of a tensor, of blocks of it, and of the calls before.

A block is given by its size along each dimension of the tensor; the last one of a dimension may be short. Blocks as long as the
dimension, or longer, are one. Quantization asks for one number a block: `find_amaxes`; delayed scaling for one number that is
known before the tensor is read: `AmaxHistory`.

Source: NVIDIA Transformer Engine's documentation, "delayed scaling": the largest of 1024 calls, margin 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.errors import FormatError


def count_blocks(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks there are along each dimension, one at least.

    Examples:
        >>> count_blocks((5, 64), (1, 48))
        (5, 2)
    """
    return tuple(1 if block >= size else -(-size // block) for size, block in zip(shape, blocks, strict=True))


def split_blocks(x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Each dimension that is cut into several blocks becomes two: which block, and where in it. Zeros fill the last block."""
    padding = [-size % block if 1 < block < size else 0 for size, block in zip(x.shape, blocks, strict=True)]
    if any(padding):
        x = F.pad(x, [n for size in reversed(padding) for n in (0, size)])
    for d in reversed(range(x.dim())):
        if 1 < blocks[d] < x.shape[d]:
            x = x.unflatten(d, (-1, blocks[d]))
    return x


def align_scale(scale: Tensor, blocks: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Scales with a dimension of 1 beside each that `split_blocks` splits."""
    for d in reversed(range(len(shape))):
        if 1 < blocks[d] < shape[d]:
            scale = scale.unsqueeze(d + 1)
    return scale


def join_blocks(parts: Tensor, blocks: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The inverse of `split_blocks`."""
    for d in range(len(shape)):
        if 1 < blocks[d] < shape[d]:
            parts = parts.flatten(d, d + 1).narrow(d, 0, shape[d])
    return parts


def find_amaxes(x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Largest magnitude of each block, shaped as the scale; 0 for a block without elements. NaN and infinity go through."""
    counts = count_blocks(x.shape, blocks)
    if x.numel() == 0:
        return x.new_zeros(counts)
    if all(count == 1 for count in counts):
        low, high = torch.aminmax(x)
        return torch.maximum(-low, high).reshape(counts)
    parts, dims, place = split_blocks(x, blocks).abs(), [], 0
    for size, block in zip(x.shape, blocks, strict=True):
        split = 1 < block < size
        if split or block >= size:
            dims.append(place + split)
        place += 1 + split
    return parts.amax(dims, keepdim=True).reshape(counts) if dims else parts


def find_amax(x: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The largest finite magnitude of a tensor, fp32, of no dimensions; with `reduce`, that of all ranks.

    Examples:
        >>> find_amax(torch.tensor([1.0, -3.0, torch.inf])).item()
        3.0
    """
    shape = tuple(x.shape)
    amax = find_amaxes(x.detach(), shape)
    if x.device.type != "cpu" or not bool(amax.isfinite().all()):
        amax = find_amaxes(torch.where(x.isfinite(), x, 0.0), shape)
    amax = amax.reshape(()).to(torch.float32)
    return reduce(amax) if reduce else amax


class AmaxHistory:
    """The largest magnitudes of the last calls, for delayed scaling: a scale that is known before the tensor is read.

    The scale is one call old: an outlier saturates once, then the history knows it. The first call takes its own amax.

    window: calls that count. margin: binades of headroom above the largest of them. Defaults as in Transformer Engine.
    reduce: agrees on a magnitude with other ranks, as an all-reduce with maximum does.

    Examples:
        >>> history = AmaxHistory(window=2)
        >>> [history.follow(torch.tensor([amax])).item() for amax in (8.0, 1.0, 2.0, 2.0)]
        [8.0, 8.0, 8.0, 2.0]
    """

    def __init__(
        self, *, window: int = 1024, margin: int = 0, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        if window < 1:
            raise FormatError(f"an amax history takes a window of 1 or more calls; got {window}")
        self.margin, self.reduce = margin, reduce
        self.amaxes = torch.zeros(window)  # the oldest first; 0 where there was no call yet. Written in place

    def follow(self, x: Tensor, *, join: bool = True) -> Tensor:
        """The amax to scale `x` by: the largest of the calls before, times 2^margin; then x's own joins them.

        What is not finite in `x` is left out of the history. join: False for a call that training does not go through.
        """
        own = find_amax(x, self.reduce).reshape(1)
        if self.amaxes.device != own.device:
            self.amaxes = self.amaxes.to(own.device)
        known = self.amaxes.amax()
        if join:
            self.amaxes.copy_(torch.cat([self.amaxes[1:], own]))
        return torch.where(known > 0, known, own).reshape(()) * 2.0**self.margin

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"amaxes": self.amaxes.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.amaxes.copy_(state["amaxes"])
