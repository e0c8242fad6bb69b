"""The ways to keep the fp32 truth of a 16-bit weight, and one parameter's truth.

Five ways to keep the truth, each of them a way to read an fp32 word and to write it back:

    fp32         a second, fp32 tensor                        2 + 4 bytes a weight    24 significant bits, exact
    split        the 16 bits that bf16 lacks                  2 + 2                   24, exact
    kahan        a bf16 compensation                          2 + 2                   17 at least
    split24      8 of the 16 bits that bf16 lacks             2 + 1                   16
    stochastic   nothing; updates are rounded stochastically  2                       8, and 24 in the mean

`numerics.words` defines them to the bit. What is read and written back without an update in between is the same pair
again, so a state dict of fp32 values restores every one of them bit for bit. All but `fp32` need bf16: fp16 is not a prefix
of fp32, and its range ends where a compensation 2^11 times smaller than its weight begins.

`kahan` keeps the state of Kahan summation: weight and running compensation. Zamirai et al. take the compensation into the
update and round the sum into the weight; here the optimizer works on the compensated weight in fp32 and the result is split
again: the same recursion with fewer roundings, in which weight decay sees the compensated weight.

Sources: Kalamkar et al. 2019 (arXiv 1905.12322), split SGD; Micikevicius et al. 2018, section 3.1, master weights;
Zamirai et al. 2020 (arXiv 2010.06192), stochastic rounding and Kahan summation for bf16 weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfstep.numerics.noise import draw_noise, draw_noise_at
from halfstep.numerics.words import (
    apply_compensation,
    compensate,
    join,
    join24,
    round_stochastically,
    split,
    split24,
)

BLOCK = 1 << 16  # weights that are narrowed at once: a few buffers of them fit into a core's second-level cache


@dataclass(frozen=True)
class Way:
    """A way to keep fp32 values: what stands beside the live weight, how it is read, how it is written at nearest."""

    kept: torch.dtype | None
    read: Callable[[Tensor, Tensor], Tensor]  # live, kept -> fp32
    write: Callable[[Tensor, Tensor, Tensor], None]  # fp32, used up; live and kept, written to
    why_bf16: str = ""  # why it takes no other live weight; empty where it does


def _copy_both(weight: Tensor, live: Tensor, kept: Tensor) -> None:
    if kept.data_ptr() != weight.data_ptr():  # `read` hands out the kept tensor itself
        kept.copy_(weight)
    live.copy_(weight)


def _round_live(weight: Tensor, live: Tensor, _kept: Tensor) -> None:
    live.copy_(weight)


WAYS = {
    "fp32": Way(torch.float32, lambda live, kept: kept, _copy_both),
    "split": Way(torch.int16, join, split, "is not a prefix of fp32"),
    "split24": Way(torch.int8, join24, split24, "is not a prefix of fp32"),
    "kahan": Way(
        torch.bfloat16, apply_compensation, compensate, "has no range for a compensation far below its weight"
    ),
    "stochastic": Way(None, lambda live, kept: live.to(torch.float32), _round_live, "has no range for small weights"),
}


@dataclass
class Truth:
    """How one parameter's fp32 value is kept while its live weight is narrow."""

    kind: str
    number: int  # of the parameter, for its noise
    live: Tensor
    kept: Tensor  # what the way keeps beside it; empty where that is nothing
    version: int = 0  # of the parameter when `live` last became its data

    @staticmethod
    def of(weight: Tensor, kind: str, number: int, dtype: torch.dtype) -> "Truth":
        beside = WAYS[kind].kept
        kept = torch.empty(0) if beside is None else torch.empty_like(weight, dtype=beside)
        truth = Truth(kind, number, torch.empty_like(weight, dtype=dtype), kept)
        truth.write(weight.clone())
        return truth

    def read(self) -> Tensor:
        """The fp32 value; for `fp32` the kept tensor itself."""
        return WAYS[self.kind].read(self.live, self.kept)

    def write(self, weight: Tensor) -> None:
        """Take an fp32 tensor over as the new value, rounded to nearest; the tensor is used up."""
        for _, block, live, kept in self._divide(weight):
            WAYS[self.kind].write(block, live, kept)

    def update(self, weight: Tensor, keys: tuple[int, int]) -> None:
        """Take over what an optimizer made of the value; the tensor is used up."""
        if self.kind != "stochastic":
            return self.write(weight)
        for start, block, live, _ in self._divide(weight):
            noise = draw_noise(keys, start, block.numel(), block.device)
            live.copy_(round_stochastically(block, noise.view(block.shape)))

    def _divide(self, weight: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """First element, weight, live and kept of blocks that fit into a core's cache, so that many passes over them are
        cheap; a tensor in another memory format in one piece."""
        tensors = (weight, *self._tensors())
        if weight.numel() <= BLOCK or not all(tensor.is_contiguous() for tensor in tensors):
            yield 0, *tensors
            return
        flat = [tensor.view(-1) for tensor in tensors]
        for start in range(0, weight.numel(), BLOCK):
            wide, live, kept = (tensor[start : start + BLOCK] for tensor in flat)
            yield start, wide, live, kept

    def read_at(self, picks: Tensor) -> Tensor:
        """The fp32 values of elements by their number."""
        live, kept = (t.reshape(-1)[picks] for t in self._tensors())
        return WAYS[self.kind].read(live, kept)

    @property
    def whole(self) -> "Truth":
        return self

    def take_rows(self, rows: Tensor) -> "Rows":
        live, kept = (t[rows] for t in self._tensors())
        return Rows(self.kind, self.number, live, kept, origin=self, rows=rows)

    def _tensors(self) -> tuple[Tensor, Tensor]:
        """Live and kept, both with the parameter's shape."""
        return self.live, self.live if WAYS[self.kind].kept is None else self.kept


@dataclass(kw_only=True)
class Rows(Truth):
    """Some rows of a truth; an update goes into the whole."""

    origin: Truth
    rows: Tensor

    @property
    def whole(self) -> Truth:
        return self.origin

    def update(self, weight: Tensor, keys: tuple[int, int]) -> None:
        if self.kind == "stochastic":
            width = weight[0].numel() if len(weight) else 0
            element = self.rows[:, None] * width + torch.arange(width, device=weight.device)
            self.live = round_stochastically(weight, draw_noise_at(keys, element).view(weight.shape))
        else:
            self.write(weight)
            self.whole.kept.index_copy_(0, self.rows, self.kept)
        self.whole.live.index_copy_(0, self.rows, self.live)


def show(parameter: nn.Parameter, truth: Truth) -> None:
    """Let the model see the live weight."""
    parameter.data = truth.live
    truth.version = parameter._version
