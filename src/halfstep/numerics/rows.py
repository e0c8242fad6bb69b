"""Updates of the rows that a sparse gradient names: the readable truth, and its fast twin in rows.c.

A gradient of an embedding is a list of rows and their values; the same row may occur several times. The arithmetic is that of
torch's own optimizers, operation by operation in fp32:

    g            = sum of gradient * factor over the occurrences of a row, in their order
    SparseAdam   m = m + (1 - beta1) * (g - m)
                 v = v + (1 - beta2) * (g * g - v)
                 w = w + (-lr * sqrt(c2) / c1) * (m / (sqrt(v) + eps))          c = 1 - beta^t
    Adagrad      s = s + g * g
                 w = fma(-lr / (1 + (t - 1) * lr_decay), g / (sqrt(s) + eps), w)
    SGD          w = fma(-lr, g, w)

Rows that no gradient names stay as they are, their states too. Square roots are torch's (`updates.find_roots`). In which order
torch's `coalesce` adds up a row that occurs three times or oftener is not defined: it sorts without keeping the order. Here it is
the order of the list. With up to two occurrences, and after `coalesce`, both have the same bits. SGD with fp32 weights is the
exception that torch makes: there is no sum, w takes one fma for each occurrence, in their order.

The twin sorts the occurrences of each table, then reads and writes each row once. torch sorts, sums into a new tensor, looks up
the rows of each state by a search, and makes a sparse tensor of each intermediate result.
"""

import ctypes
import itertools
import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from halfstep.numerics import kernels
from halfstep.numerics.kernels import COUNT, INT, POINTER, Kernels
from halfstep.numerics.updates import COPY, FP32, SPLIT, WIDE, WIDTHS, Weight, find_roots, lie_alike, pack
from halfstep.numerics.words import split

ADAM, ADAGRAD, SGD, SGD_EACH = range(4)
LIMIT = 1 << 31  # rows and occurrences are numbered in half a word


class RowStep(NamedTuple):
    """What one step multiplies with, in the order of rows.c; what a kind does not use is 0.

    Examples:
        >>> RowStep.of_adam(lr=0.5, betas=(0.5, 0.75), eps=0.0, count=1)
        RowStep(first=0.5, second=0.25, eps=0.0, step=-0.5, factor=1.0, kind=0)
    """

    first: float  # 1 - beta1
    second: float  # 1 - beta2
    eps: float
    step: float
    factor: float
    kind: int  # ADAM, ADAGRAD, SGD, or SGD_EACH: one fma for each occurrence

    @staticmethod
    def of_adam(
        *, lr: float | Tensor, betas: tuple[float, float], eps: float, count: float, factor: float = 1.0
    ) -> "RowStep":
        """Of SparseAdam, computed as torch does; a tensor `lr` takes part in its own dtype. count: steps with this one."""
        beta1, beta2 = betas
        size = lr * math.sqrt(1 - beta2**count) / (1 - beta1**count)
        return RowStep(1 - beta1, 1 - beta2, eps, float(-size), factor, ADAM)

    @staticmethod
    def of_adagrad(*, lr: float | Tensor, lr_decay: float, eps: float, count: float, factor: float = 1.0) -> "RowStep":
        return RowStep(0.0, 0.0, eps, float(-(lr / (1 + (count - 1) * lr_decay))), factor, ADAGRAD)

    @staticmethod
    def of_sgd(*, lr: float | Tensor, each: bool, factor: float = 1.0) -> "RowStep":
        return RowStep(0.0, 0.0, 0.0, float(-lr), factor, SGD_EACH if each else SGD)


class Table(NamedTuple):
    """A table with its gradient and its states: two for SparseAdam, one for Adagrad, none for SGD."""

    weight: Weight
    rows: Tensor  # [occurrences] int64
    values: Tensor  # [occurrences, ...] fp32 or bf16
    states: tuple[Tensor, ...] = ()


def sum_rows(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Each row once, in their order, and the sum of its values in the order in which they occur.

    Examples:
        >>> rows, sums = sum_rows(torch.tensor([7, 2, 7]), torch.tensor([[1.0], [2.0], [4.0]]))
        >>> rows.tolist(), sums.flatten().tolist()
        ([2, 7], [2.0, 5.0])
    """
    distinct, places, counts = torch.unique(rows, return_inverse=True, return_counts=True)
    order, starts = places.argsort(stable=True), counts.cumsum(0) - counts
    sums = values[order[starts]]
    for turn in range(1, int(counts.max()) if len(counts) else 0):
        more = counts > turn
        sums[more] += values[order[starts[more] + turn]]
    return distinct, sums


def update_rows_slowly(table: Table, step: RowStep) -> None:
    """One update in place, in torch's operations.

    Examples:
        >>> table = Table(Weight(torch.ones(3, 1)), torch.tensor([2, 2]), torch.tensor([[1.0], [3.0]]))
        >>> update_rows_slowly(table, RowStep.of_sgd(lr=0.5, each=False))
        >>> table.weight.live.flatten().tolist()
        [1.0, 1.0, -1.0]
    """
    live, rest = table.weight
    scaled = table.values.to(FP32) * step.factor
    if step.kind == SGD_EACH:
        wide = table.weight.read()
        for row, value in zip(table.rows.tolist(), scaled, strict=True):
            wide[row].add_(value, alpha=step.step)
        table.weight.write(wide)
        return
    rows, g = sum_rows(table.rows, scaled)
    states = [state[rows] for state in table.states]
    some = Weight(live[rows], None if rest is None else rest[rows])
    w = some.read()
    if step.kind == ADAM:
        m, v = states
        m.add_(g.sub(m).mul_(step.first))
        v.add_(g.pow(2).sub_(v).mul_(step.second))
        w.add_(m.div(v.sqrt().add_(step.eps)).mul_(step.step))
    elif step.kind == ADAGRAD:
        states[0].add_(g.pow(2))
        w.add_(g / states[0].sqrt().add_(step.eps), alpha=step.step)
    else:
        w.add_(g, alpha=step.step)
    some.write(w)
    for whole, part in ((live, some.live), (rest, some.rest), *zip(table.states, states, strict=True)):
        if whole is not None and part is not None:
            whole.index_copy_(0, rows, part)


def update_rows(table: Table, step: RowStep) -> None:
    """`update_rows_slowly`, by the kernel where there is one."""
    if KERNELS.library.functions is None or not run_rows(KERNELS.library.functions, [table], step):
        update_rows_slowly(table, step)


def take_table(weight: Weight, gradient: Tensor, *states: Tensor) -> Table | None:
    """A table that the kernels can work on; None for other dtypes, devices, layouts, and gradients that name no whole rows."""
    live, rest = weight
    kept = FP32 if rest is None else torch.bfloat16
    if KERNELS.library.functions is None or live.dtype is not kept or gradient.dtype not in WIDTHS:
        return None
    if rest is not None and rest.dtype not in (torch.int16, FP32):
        return None
    beside = states if rest is None else (rest, *states)
    if any(state.dtype is not FP32 for state in states) or not lie_alike(live, *beside) or not live.is_contiguous():
        return None
    found = _take_gradient(gradient)
    return Table(weight, *found, states) if found and gradient.shape == live.shape else None


def _take_gradient(gradient: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows and values, where the gradient is a list of whole rows on the processor."""
    if type(gradient) not in kernels.PLAIN or not gradient.is_cpu or gradient.layout is not torch.sparse_coo:
        return None
    rows, values = gradient._indices(), gradient._values()
    if gradient.sparse_dim() != 1 or rows.dtype is not torch.int64 or values.dtype not in WIDTHS:
        return None
    if gradient.numel() == 0 or max(gradient.shape[0], len(values)) >= LIMIT:
        return None
    return rows[0].contiguous(), values.contiguous()


def measure_norms(gradients: Sequence[Tensor]) -> Tensor | None:
    """[gradients] 2-norm of each sparse gradient after the occurrences of a row were summed in fp32; None where no kernel can
    measure them.

    Examples:
        >>> numbers, values = torch.tensor([[1, 1]]), torch.tensor([[1.0], [2.0]])
        >>> gradient = torch.sparse_coo_tensor(numbers, values, (4, 1), check_invariants=True)
        >>> norms = measure_norms([gradient])
        >>> norms is None or norms.tolist() == [3.0]
        True
    """
    functions, found = KERNELS.library.functions, [_take_gradient(gradient) for gradient in gradients]
    norms = torch.empty(len(found), dtype=torch.float64, device="cpu")
    if functions is None or None in found:
        return None
    for dtype in WIDTHS:
        some = [i for i, pair in enumerate(found) if pair is not None and pair[1].dtype is dtype]
        parts = [(0, 0, *pair, 0, 0) for pair in (found[i] for i in some) if pair is not None]
        shapes = [(g.shape[0], g.numel() // g.shape[0]) for g in (gradients[i] for i in some)]
        addresses, _scratch = _list_addresses(parts, shapes)
        squares, done = torch.empty(len(some), dtype=torch.float64, device="cpu"), ctypes.c_int64()
        half, first = int(dtype is torch.bfloat16), addresses.buffer_info()[0]
        functions.measure_rows(half, first, len(some), squares.data_ptr(), ctypes.addressof(done))
        if not done.value:
            return None
        norms[some] = squares.sqrt_()
    return norms


def run_rows(functions: ctypes.CDLL, tables: Sequence[Table], step: RowStep) -> bool:
    """`update_rows` of tables that `take_table` gave, kept alike, with gradients of one width. False, with nothing done, where a
    gradient names a row that its table does not have."""
    parts: list[Parts] = []
    shapes: list[tuple[int, int]] = []
    for (live, rest), rows, values, states in tables:
        state, square = [state.data_ptr() for state in states] + [0] * (2 - len(states))
        parts.append((live.data_ptr(), 0 if rest is None else rest.data_ptr(), rows, values, state, square))
        shapes.append((live.shape[0], live.numel() // live.shape[0]))
    addresses, _scratch = _list_addresses(parts, shapes)
    first, done = tables[0], ctypes.c_int64()
    functions.update_rows(
        step.kind, first.weight.storage, int(first.values.dtype is torch.bfloat16), addresses.buffer_info()[0],
        len(tables), pack(step, 5), find_roots(), ctypes.addressof(done),
    )  # fmt: skip
    return bool(done.value)


Parts = tuple[int, int, Tensor, Tensor, int, int]  # live, rest, rows, values, states


def _list_addresses(parts: Sequence[Parts], shapes: Sequence[tuple[int, int]]) -> "tuple[array[int], Tensor]":
    """What the kernels are told of each table, and the memory in which they sort."""
    scratch = torch.empty(sum(3 * len(values) + 2 for _, _, _, values, *_ in parts), dtype=torch.int64, device="cpu")
    listed, place = [], scratch.data_ptr()
    for (live, rest, rows, values, state, square), (height, width) in zip(parts, shapes, strict=True):
        listed += [live, rest, rows.data_ptr(), values.data_ptr(), state, square, place, len(values), height, width]
        place += 8 * (3 * len(values) + 2)
    return array("q", listed), scratch


def _agrees(functions: ctypes.CDLL) -> bool:
    """Whether kernels and truth give the same bits, tried on rows that occur up to five times, of several widths."""
    kinds, storages = (ADAM, ADAGRAD, SGD, SGD_EACH), (WIDE, SPLIT, COPY)
    return all(
        _agrees_on(functions, kind, storage, width)
        for kind, storage, width in itertools.product(kinds, storages, (5, 64, 1029))
    )


def _agrees_on(functions: ctypes.CDLL, kind: int, storage: int, width: int) -> bool:
    place = torch.arange(25 * width, device="cpu", dtype=FP32).view(25, width)
    start = torch.sin(place * 12.9898) * torch.exp(2 * torch.sin(place * 78.233))
    rows = torch.arange(25, device="cpu") ** 2 % 19  # 10 of 25 rows
    found = []
    for runs in (False, True):
        live = start.clone() if storage == WIDE else start.to(torch.bfloat16)
        rest = (
            None
            if storage == WIDE
            else start.clone()
            if storage == COPY
            else torch.empty_like(start, dtype=torch.int16)
        )
        if storage == SPLIT and rest is not None:
            split(start.clone(), live, rest)
        states = tuple(start.abs() for _ in range({ADAM: 2, ADAGRAD: 1}.get(kind, 0)))
        for turn, dtype in enumerate(WIDTHS):
            table = Table(Weight(live, rest), rows, start.roll(turn + 1, 0).to(dtype), states)
            step = RowStep(0.1, 0.03, 1e-6, -0.03, 0.3, kind)
            if not runs:
                update_rows_slowly(table, step)
            elif not run_rows(functions, [table], step):
                return False
        found.append((live, *(() if rest is None else (rest,)), *states))
    return all(map(torch.equal, *found))


KERNELS = Kernels(
    "rows.c",
    {
        "update_rows": [INT, INT, INT, POINTER, COUNT, POINTER, POINTER, POINTER],
        "measure_rows": [INT, POINTER, COUNT, POINTER, POINTER],
    },
    _agrees,
)
