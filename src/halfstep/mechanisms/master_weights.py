"""The fp32 truth behind 16-bit weights, for any torch optimizer.

The live weight is 16 bits wide while the model runs. For the update it is widened to its fp32 truth in place, the
optimizer does to it what it always does, and it is narrowed again:

    for each chunk of parameters:  widen;  optimizer.step();  narrow

The optimizer sees ordinary fp32 parameters with fp32 gradients, so its states are fp32 and any optimizer will do. Only
one chunk is wide at a time; optimizers skip parameters that have no gradient, which is how a step is confined to it.

Two ways to keep the truth:

    fp32    a second, fp32 tensor.                                       2 + 4 bytes a parameter
    split   the 16 bits that bf16 lacks.                                 2 + 2 bytes, exact

`split` rounds the fp32 word to its upper 16 bits and remembers what that left over, as a signed number:

    live      = (bits32 + 0x8000) >> 16      modulo 2^32: the nearest bf16; a tie goes away from zero
    remainder = bits32 - (live << 16)        within 16 signed bits
    bits32    = (live << 16) + remainder     every fp32 word comes back, bit for bit

A tie has to go away from zero and not to even: rounded to even, half of the ties would leave a remainder of +0x8000, one
more than 16 signed bits hold. `live` is bf16 infinity from 3.396e38 on, as in every rounding to nearest.

Sources: Kalamkar et al. 2019 (arXiv 1905.12322), split SGD; Micikevicius et al. 2018, section 3.1, master weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.errors import UnsupportedError

HALF_ULP = 0x8000
CHUNK = 1 << 20  # parameters that are wide at once: 8 MB of weights and gradients

PARAMETERWISE = {
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.Adamax, torch.optim.AdamW, torch.optim.ASGD,
    torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
}  # fmt: skip
"""Optimizers known to treat parameters one by one; any other gets all of its parameters in one chunk."""


def split_slowly(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 tensor -> (bf16, int16 remainder), as the head of this module defines it: the readable truth.

    Examples:
        >>> live, remainder = split_slowly(torch.tensor([1.00390625]))      # halfway between two bf16 numbers
        >>> live.item(), remainder.item()
        (1.0078125, -32768)
    """
    bits = weight.view(torch.int32).to(torch.int64)
    live = ((bits + HALF_ULP) >> 16) & 0xFFFF
    return _as_int16(live).view(torch.bfloat16), _as_int16((bits - (live << 16)) & 0xFFFF)


def join_slowly(live: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor that `split_slowly` took apart."""
    bits = ((live.view(torch.int16).to(torch.int64) << 16) + remainder.to(torch.int64)) & 0xFFFFFFFF
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def _as_int16(unsigned: Tensor) -> Tensor:
    return torch.where(unsigned >= 1 << 15, unsigned - (1 << 16), unsigned).to(torch.int16)


def split(weight: Tensor, live: Tensor, remainder: Tensor) -> None:
    """`split_slowly` into given tensors, by vectorised passes; `weight` is used up."""
    bits = weight.view(torch.int32)
    remainder.copy_(bits)  # conversion to a narrower integer keeps the low 16 bits, which are the remainder
    live.view(torch.int16).copy_(bits.add_(HALF_ULP).bitwise_right_shift_(16))


def join(live: Tensor, remainder: Tensor) -> Tensor:
    """`join_slowly` by vectorised passes."""
    weight = live.to(torch.float32)  # the same as a shift by 16, and faster
    weight.view(torch.int32).add_(remainder)
    return weight


def match_states(optimizer: Optimizer, parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Bring the floating-point states that have a parameter's shape to `dtype`: what the optimizer sees it in."""
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape and key != "step":
            state[key] = value.to(dtype)


@dataclass
class _Truth:
    """How one parameter's fp32 value is kept while its live weight is narrow."""

    kind: str
    dtype: torch.dtype
    live: Tensor
    kept: Tensor  # split: int16 remainder; fp32: the fp32 value
    version: int = 0  # of the parameter when `live` last became its data

    @staticmethod
    def of(weight: Tensor, kind: str, dtype: torch.dtype) -> "_Truth":
        live = torch.empty_like(weight, dtype=dtype)
        kept = torch.empty_like(weight, dtype=torch.int16) if kind == "split" else torch.empty(0)
        truth = _Truth(kind, dtype, live, kept)
        truth.write(weight.clone())
        return truth

    def read(self) -> Tensor:
        """The fp32 value; for `fp32` the kept tensor itself."""
        return join(self.live, self.kept) if self.kind == "split" else self.kept

    def write(self, weight: Tensor) -> None:
        """Take an fp32 tensor over as the new value."""
        if self.kind == "split":
            split(weight, self.live, self.kept)
        else:
            self.kept = weight
            self.live.copy_(weight)


def _show(parameter: nn.Parameter, truth: _Truth) -> None:
    """Let the model see the live weight."""
    parameter.data = truth.live
    truth.version = parameter._version


class MasterWeights:
    """Keeps parameters narrow, and steps an optimizer on their fp32 truth.

    Examples:
        >>> layer = nn.Linear(4, 4)
        >>> masters = MasterWeights()
        >>> masters.narrow(layer.weight, torch.bfloat16, "split")
        >>> layer.weight.dtype, masters.read(layer.weight).dtype
        (torch.bfloat16, torch.float32)
    """

    def __init__(self) -> None:
        self._truths: dict[nn.Parameter, _Truth] = {}

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._truths

    def __len__(self) -> int:
        return len(self._truths)

    def narrow(self, parameter: nn.Parameter, dtype: torch.dtype, kind: str) -> None:
        """Make a parameter's live weight `dtype` and keep its fp32 truth as `kind`: fp32, split or none.

        Raises UnsupportedError for a split behind anything but bf16: fp16 is not a prefix of fp32.
        """
        if kind == "split" and dtype is not torch.bfloat16:
            raise UnsupportedError(f"master 'split' works behind bf16 weights; got {dtype}; use master='fp32'")
        parameter.grad = None
        if kind == "none":
            parameter.data = parameter.data.to(dtype)
            return
        truth = _Truth.of(parameter.data, kind, dtype)
        self._truths[parameter] = truth
        _show(parameter, truth)

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The parameter in fp32: its truth where one is kept, else the live weight converted."""
        truth = self._find_truth(parameter)
        return truth.read().clone() if truth else parameter.detach().to(torch.float32)

    def _find_truth(self, parameter: nn.Parameter) -> _Truth | None:
        """A parameter's truth. Where somebody has changed the live weight in place (clamped, pruned, initialised again),
        what they wrote is the truth from now on."""
        truth = self._truths.get(parameter)
        if truth and (truth.version != parameter._version or truth.live.data_ptr() != parameter.data_ptr()):
            truth.write(parameter.data.to(torch.float32, copy=True))
            _show(parameter, truth)
        return truth

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the parameter from an fp32 tensor, truth and live weight."""
        if parameter in self._truths:
            self._truths[parameter].write(value.detach().to(parameter.device, torch.float32).clone())
            _show(parameter, self._truths[parameter])
        else:
            parameter.data.copy_(value)

    def widen(self, parameter: nn.Parameter) -> None:
        """Give a parameter back its fp32 truth for good."""
        truth = self._find_truth(parameter)
        self._truths.pop(parameter, None)
        parameter.grad = None
        parameter.data = truth.read() if truth else parameter.data.to(torch.float32)

    def step(self, optimizer: Optimizer, gradients: dict[nn.Parameter, Tensor], factor: float = 1.0) -> None:
        """One optimizer step with `gradients` times `factor`, chunk by chunk; leaves no gradient behind.

        The gradients are used up.
        """
        for parameter in gradients:
            parameter.grad = None
        for chunk in self._chunks(optimizer, gradients):
            for parameter in chunk:
                gradient = gradients.pop(parameter)
                truth = self._find_truth(parameter)
                if truth:
                    parameter.data = truth.read()
                    match_states(optimizer, parameter, torch.float32)
                    gradient = gradient.to(torch.float32)
                if factor != 1.0:
                    gradient.mul_(factor)
                parameter.grad = gradient.to(parameter.dtype)
            try:
                optimizer.step()
            finally:
                for parameter in chunk:
                    parameter.grad = None
                    if parameter in self._truths:
                        self._truths[parameter].write(parameter.data)
                        _show(parameter, self._truths[parameter])

    @contextmanager
    def widened(self) -> Iterator[None]:
        """All parameters at their fp32 truth inside the block, for work that must see fp32 dtypes."""
        for parameter in self._truths:
            truth = self._find_truth(parameter)
            parameter.grad = None
            parameter.data = truth.read() if truth else parameter.data
        try:
            yield
        finally:
            for parameter, truth in self._truths.items():
                truth.write(parameter.data)
                _show(parameter, truth)

    @contextmanager
    def narrowed(self) -> Iterator[None]:
        """Within `widened`: the live weights again inside the block, for work that runs the model."""
        for parameter, truth in self._truths.items():
            parameter.grad = None
            truth.write(parameter.data)
            _show(parameter, truth)
        try:
            yield
        finally:
            for parameter, truth in self._truths.items():
                parameter.grad = None
                parameter.data = truth.read()

    def _chunks(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """Parameters that are already wide in the first chunk, the others in chunks of about CHUNK numbers."""
        narrow = [p for p in parameters if p in self._truths]
        wide = [p for p in parameters if p not in self._truths]
        if not narrow or type(optimizer) not in PARAMETERWISE:
            yield wide + narrow
            return
        chunk, size = wide, 0
        for parameter in narrow:
            if chunk and size + parameter.numel() > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append(parameter)
            size += parameter.numel()
        yield chunk
