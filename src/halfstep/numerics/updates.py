"""One update of AdamW, Adam or SGD: the readable truth, and its fast twin in updates.c, which reads and writes each byte once.

The arithmetic is that of torch's own optimizers, operation by operation in fp32, so that both give torch's bits:

    g       = gradient * factor                               factor: unscaling and clipping in one
    AdamW   w = w * (1 - lr * decay)
    Adam    g = fma(decay, w, g)
    both    m = lerp(m, g, 1 - beta1)                         fma(1 - beta1, g - m, m), from the nearer end
            v = fma((1 - beta2) * g, g, beta2 * v)
            w = w + (-lr / c1) * m / (sqrt(v) / sqrt(c2) + eps)        c = 1 - beta^t
    SGD     g = fma(decay, w, g)
            b = fma(1 - dampening, g, momentum * b)           at first b = g
            w = fma(-lr, b, w)                                Nesterov: fma(momentum, b, g) in place of b

fma(a, b, c) = a * b + c is rounded once: torch's vector loops do so on processors that can. Factors such as lr / c1 are computed
in Python's fp64 and rounded to fp32 once. Square roots are of two kinds:

    rooted by torch    as torch.sqrt gives them. Built with MKL they are MKL's, of which one in five is not the nearest fp32
                       number; the kernel calls the same function. With them an update has the bits of torch's loops (fused=False)
    nearest            the processor's: fast, and the nearest number. With them it has the bits of torch's fused=True, but for
                       the last numbers of a tensor, fewer than a vector, which torch takes one by one and rounds otherwise

Where another torch, or another processor, rounds otherwise, the twin does not agree with the truth and is not used.

Many small tensors are one call: it takes lists of addresses, and threads share out the blocks of all tensors as if they were one.

States of Adam may be kept in 8 bits (`codebooks`): decoded, updated and encoded on the way, each byte of them read and written
once. Weights, codes and scales have the bits of the truth, which dequantizes, updates and quantizes. Whether a mean is negative
and whether all states stay finite must be known before the first is written, so gradients are looked through before that. States
that could overflow are left to the truth.

A weight is kept in one of three ways; bytes read and written for each with a bf16 gradient, by Adam:

    wide     fp32                                                              14 + 12
    split    bf16, and the 16 bits that it lacks (numerics/words)              14 + 12
    copy     bf16, rounded to nearest from an fp32 tensor beside it            14 + 14
"""

import ctypes
import itertools
import os
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfstep.numerics import codebooks, kernels
from halfstep.numerics.codebooks import Quantized, dequantize, make_zeros, quantize
from halfstep.numerics.kernels import COUNT, INT, POINTER, Kernels
from halfstep.numerics.words import join, split

WIDE, SPLIT, COPY = range(3)
PLAIN, DECOUPLED, COUPLED = range(3)
NONE, BEGINS, GOES_ON = range(3)
FP32, WIDTHS = torch.float32, (torch.float32, torch.bfloat16)  # of states; of gradients


class Weight(NamedTuple):
    """A weight as it is kept: fp32 alone, bf16 with int16 (split), or bf16 with fp32 (copy)."""

    live: Tensor
    rest: Tensor | None = None

    @property
    def storage(self) -> int:
        if self.rest is None:
            return WIDE
        return SPLIT if self.rest.dtype == torch.int16 else COPY

    def read(self) -> Tensor:
        """The fp32 value; the kept tensor itself where that is fp32."""
        if self.rest is None:
            return self.live
        return join(self.live, self.rest) if self.storage == SPLIT else self.rest

    def write(self, value: Tensor) -> None:
        """Take over what `read` gave, after it was updated."""
        if self.rest is not None and self.storage == SPLIT:
            split(value, self.live, self.rest)
        elif self.rest is not None:
            self.live.copy_(value)


Tensors = tuple[Weight, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""What a kernel needs of one parameter: weight, gradient, exp_avg or momentum, exp_avg_sq, and its fp32 number of steps, if that
is to be raised."""

NarrowTensors = tuple[Weight, Tensor, Quantized, Quantized, Tensor | None]
"""The same with states in 8 bits."""


class AdamStep(NamedTuple):
    """What one step of Adam or AdamW multiplies with, in the order of updates.c.

    Examples:
        >>> step = AdamStep.of(lr=0.1, betas=(0.9, 0.999), eps=1e-8, decay=0.5, decoupled=True, count=1)
        >>> step.decay, round(step.step, 9)
        (0.95, -1.0)
    """

    first: float  # 1 - beta1
    kept: float  # beta2
    second: float  # 1 - beta2
    correction: float  # sqrt(1 - beta2^t)
    eps: float
    step: float  # -lr / (1 - beta1^t)
    decay: float  # 1 - lr * decay where that is decoupled
    factor: float
    way: int  # PLAIN, DECOUPLED or COUPLED
    nearest: bool = False  # square roots are the processor's

    @staticmethod
    def of(
        *, lr: float | Tensor, betas: tuple[float, float], eps: float, decay: float, decoupled: bool, count: float,
        factor: float = 1.0, nearest: bool = False,
    ) -> "AdamStep":  # fmt: skip
        """Computed as torch does; a tensor `lr` takes part in its own dtype. count: steps with this one."""
        (beta1, beta2), way = betas, PLAIN
        if decay:
            way = DECOUPLED if decoupled else COUPLED
        step = float(-(lr / (1 - beta1**count)))
        shrink = float(1 - lr * decay) if decoupled else decay
        return AdamStep(1 - beta1, beta2, 1 - beta2, (1 - beta2**count) ** 0.5, eps, step, shrink, factor, way, nearest)


class SgdStep(NamedTuple):
    """What one step of SGD multiplies with, in the order of updates.c."""

    momentum: float
    fresh: float  # 1 - dampening
    step: float  # -lr
    decay: float
    factor: float
    way: int  # NONE, BEGINS or GOES_ON
    nesterov: bool


def update_adam_slowly(weight: Weight, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamStep) -> None:
    """One update in place, in torch's operations.

    Examples:
        >>> weight, m, v = Weight(torch.ones(1)), torch.zeros(1), torch.zeros(1)
        >>> step = AdamStep.of(lr=0.1, betas=(0.9, 0.999), eps=0.0, decay=0.0, decoupled=True, count=1)
        >>> update_adam_slowly(weight, torch.tensor([4.0]), m, v, step)
        >>> round(weight.live.item(), 4)
        0.9
    """
    w, g = weight.read(), gradient.to(torch.float32) * step.factor
    if step.way == DECOUPLED:
        w.mul_(step.decay)
    elif step.way == COUPLED:
        g = g.add(w, alpha=step.decay)
    exp_avg.lerp_(g, step.first)
    exp_avg_sq.mul_(step.kept).addcmul_(g, g, value=step.second)
    root = exp_avg_sq.to(torch.float64).sqrt().to(torch.float32) if step.nearest else exp_avg_sq.sqrt()
    w.addcdiv_(exp_avg, (root / step.correction).add_(step.eps), value=step.step)
    weight.write(w)


def update_adam_narrow_slowly(
    weight: Weight, gradient: Tensor, exp_avg: Quantized, exp_avg_sq: Quantized, step: AdamStep
) -> tuple[Tensor | Quantized, Tensor | Quantized]:
    """`update_adam_slowly` of states in 8 bits: returns the next ones. One that is not finite stays in fp32.

    Examples:
        >>> weight, state = Weight(torch.ones(1)), make_zeros(torch.Size([1]))
        >>> step = AdamStep.of(lr=0.1, betas=(0.9, 0.999), eps=0.0, decay=0.0, decoupled=True, count=1)
        >>> exp_avg, _ = update_adam_narrow_slowly(weight, torch.tensor([4.0]), state, state, step)
        >>> round(weight.live.item(), 4), round(dequantize(exp_avg).item(), 4)
        (0.9, 0.4)
    """
    m, v = dequantize(exp_avg), dequantize(exp_avg_sq)
    update_adam_slowly(weight, gradient, m, v, step)
    narrowed = [quantize(state) if bool(torch.isfinite(state).all()) else state for state in (m, v)]
    return narrowed[0], narrowed[1]


def update_sgd_slowly(weight: Weight, gradient: Tensor, buffer: Tensor | None, step: SgdStep) -> None:
    """One update in place, in torch's operations; `buffer` holds the momentum, if there is any.

    Examples:
        >>> weight = Weight(torch.ones(1))
        >>> update_sgd_slowly(weight, torch.tensor([4.0]), None, SgdStep(0.0, 1.0, -0.1, 0.0, 0.5, NONE, False))
        >>> round(weight.live.item(), 4)
        0.8
    """
    w, g = weight.read(), gradient.to(torch.float32) * step.factor
    if step.decay:
        g = g.add(w, alpha=step.decay)
    if buffer is not None:
        if step.way == BEGINS:
            buffer.copy_(g)
        else:
            buffer.mul_(step.momentum).add_(g, alpha=step.fresh)
        g = g.add(buffer, alpha=step.momentum) if step.nesterov else buffer
    w.add_(g, alpha=step.step)
    weight.write(w)


def update_adam(weight: Weight, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamStep) -> None:
    """`update_adam_slowly`, by the kernel where there is one; all tensors lie in memory in the same order."""
    functions = take(weight, gradient, exp_avg, exp_avg_sq)
    if functions is None:
        update_adam_slowly(weight, gradient, exp_avg, exp_avg_sq, step)
    else:
        run_adam(functions, [(weight, gradient, exp_avg, exp_avg_sq, None)], step)


def update_adam_narrow(
    weight: Weight, gradient: Tensor, exp_avg: Quantized, exp_avg_sq: Quantized, step: AdamStep
) -> tuple[Tensor | Quantized, Tensor | Quantized]:
    """`update_adam_narrow_slowly`, by the kernel where there is one; codes and scales are overwritten there."""
    functions = take_narrow(weight, gradient, exp_avg, exp_avg_sq)
    found = run_adam_narrow(functions, [(weight, gradient, exp_avg, exp_avg_sq, None)], step) if functions else [None]
    return found[0] or update_adam_narrow_slowly(weight, gradient, exp_avg, exp_avg_sq, step)


def update_sgd(weight: Weight, gradient: Tensor, buffer: Tensor | None, step: SgdStep) -> None:
    """`update_sgd_slowly`, by the kernel where there is one; all tensors lie in memory in the same order."""
    functions = take(weight, gradient, *(() if buffer is None else (buffer,)))
    if functions is None:
        update_sgd_slowly(weight, gradient, buffer, step)
    else:
        run_sgd(functions, [(weight, gradient, buffer, None, None)], step)


def take(weight: Weight, gradient: Tensor, *states: Tensor) -> ctypes.CDLL | None:
    """The kernels, if they can work on these: dtypes, device, and all of them in memory in the same order without gaps."""
    live, rest = weight
    if live.dtype is not (FP32 if rest is None else torch.bfloat16) or gradient.dtype not in WIDTHS:
        return None
    for state in states:
        if state.dtype is not FP32:
            return None
    if rest is None:
        tensors = (live, gradient, *states)
    elif rest.dtype is torch.int16 or rest.dtype is FP32:
        tensors = (live, rest, gradient, *states)
    else:
        return None
    return KERNELS.library.functions if _lie_alike(tensors) else None


def take_narrow(weight: Weight, gradient: Tensor, exp_avg: Quantized, exp_avg_sq: Quantized) -> ctypes.CDLL | None:
    """The kernels, if they can work on these: as `take` says, in the order of the codes; only a mean may have a sign."""
    parts = (exp_avg.codes, exp_avg_sq.codes, exp_avg.scales, exp_avg_sq.scales)
    if exp_avg_sq.signed or not weight.live.is_contiguous() or not all(p.is_cpu and p.is_contiguous() for p in parts):
        return None
    if exp_avg.shape != weight.live.shape or exp_avg_sq.shape != weight.live.shape:
        return None
    return take(weight, gradient)


def lie_alike(*tensors: Tensor) -> bool:
    """Whether dense tensors on the processor have their numbers in the same order in memory, without gaps.

    Examples:
        >>> x = torch.zeros(2, 3)
        >>> lie_alike(x, x.clone()), lie_alike(x.T, x.clone().T), lie_alike(x.T, torch.zeros(3, 2))
        (True, True, False)
    """
    return _lie_alike(tensors)


def _lie_alike(tensors: tuple[Tensor, ...]) -> bool:
    shape, contiguous = tensors[0].shape, True
    for tensor in tensors:
        if (
            type(tensor) not in kernels.PLAIN
            or not tensor.is_cpu
            or tensor.layout is not torch.strided
            or tensor.shape != shape
        ):
            return False
        contiguous = contiguous and tensor.is_contiguous()
    return contiguous or (_is_dense(tensors[0]) and all(t.stride() == tensors[0].stride() for t in tensors))


def _is_dense(x: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


ROW = 7  # addresses of one parameter


def list_addresses(group: Sequence[Tensors | NarrowTensors]) -> "array[int]":
    """What the kernels are told of each parameter: live, rest, gradient, states, number of steps, and how many numbers."""
    listed: list[int] = []
    for (live, rest), gradient, state, square, steps in group:
        listed += (
            live.data_ptr(),
            0 if rest is None else rest.data_ptr(),
            gradient.data_ptr(),
            0 if state is None else (state.codes if isinstance(state, Quantized) else state).data_ptr(),
            0 if square is None else (square.codes if isinstance(square, Quantized) else square).data_ptr(),
            0 if steps is None else steps.data_ptr(),
            gradient.numel(),
        )
    return array("q", listed)


def pack(step: Sequence[float], count: int) -> "ctypes.Array[ctypes.c_float]":
    """The first numbers of a step, as the kernels take them."""
    return (ctypes.c_float * count)(*step[:count])


def run_adam(functions: ctypes.CDLL, group: Sequence[Tensors], step: AdamStep) -> None:
    """`update_adam` of several parameters by kernels that `take` gave for each; weights kept alike, gradients of one width."""
    weight, gradient, *_ = group[0]
    run_adam_at(functions, list_addresses(group), weight.storage, gradient.dtype is torch.bfloat16, step)


def run_adam_at(functions: ctypes.CDLL, addresses: "array[int]", storage: int, half: bool, step: AdamStep) -> None:
    """`run_adam` by addresses of `list_addresses`; half: whether gradients are bf16."""
    place, count = addresses.buffer_info()
    roots = None if step.nearest else find_roots()
    functions.update_adam(storage, int(half), step.way, place, count // ROW, pack(step, 8), roots)


def have_stepped_alike(functions: ctypes.CDLL, addresses: "array[int]") -> bool:
    """Whether all parameters have the same number of steps, by addresses of `list_addresses`."""
    place, count = addresses.buffer_info()
    alike = ctypes.c_int()
    functions.compare_steps(place, count // ROW, ctypes.addressof(alike))
    return bool(alike.value)


def run_adam_narrow(
    functions: ctypes.CDLL, group: Sequence[NarrowTensors], step: AdamStep
) -> list[tuple[Quantized, Quantized] | None]:
    """`update_adam_narrow` of several parameters by kernels that `take_narrow` gave for each; weights kept alike, gradients of
    one width. Returns the next states, whose codes and scales were overwritten; None where nothing was done, because a state
    could overflow."""
    weight, gradient, *_ = group[0]
    addresses, half = list_addresses(group), int(gradient.dtype is torch.bfloat16)
    scales = array("q")
    for _, _, exp_avg, exp_avg_sq, _ in group:  # was signed, is signed, fits
        scales.extend((exp_avg.scales.data_ptr(), exp_avg_sq.scales.data_ptr(), int(exp_avg.signed), 0, 1))
    functions.update_adam_narrow(
        weight.storage, half, step.way, addresses.buffer_info()[0], len(group), pack(step, 8),
        None if step.nearest else find_roots(), scales.buffer_info()[0], _list_books()[0].buffer_info()[0],
    )  # fmt: skip
    found: list[tuple[Quantized, Quantized] | None] = []
    for (_, _, exp_avg, exp_avg_sq, _), is_signed, fits in zip(group, scales[3::5], scales[4::5], strict=True):
        if exp_avg.signed != bool(is_signed):
            exp_avg = replace(exp_avg, signed=bool(is_signed))
        found.append((exp_avg, exp_avg_sq) if fits else None)
    return found


@cache
def _list_books() -> "tuple[array[int], list[Tensor]]":
    """Addresses of numbers and codes without and with signs, and the tensors that hold them."""
    cpu = torch.device("cpu")
    numbers = [torch.tensor(codebooks.list_codes(signed=signed), dtype=FP32, device=cpu) for signed in (False, True)]
    codes = [codebooks.tabulate_codes(cpu, signed=signed) for signed in (False, True)]
    return array("q", [tensor.data_ptr() for tensor in numbers + codes]), numbers + codes


@cache
def find_roots() -> int | None:
    """Address of the function that torch takes square roots with; None where it takes the processor's."""
    if not torch.backends.mkl.is_available():
        return None
    try:
        home = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
        return ctypes.cast(ctypes.CDLL(home).vmsSqrt, POINTER).value
    except (OSError, AttributeError):
        return None  # the kernel then does not agree with torch


def run_sgd(functions: ctypes.CDLL, group: Sequence[Tensors], step: SgdStep) -> None:
    """`update_sgd` of several parameters by kernels that `take` gave for each; kept alike, gradients and momenta alike."""
    weight, gradient, buffer, *_ = group[0]
    addresses, half = list_addresses(group), int(gradient.dtype is torch.bfloat16)
    way = NONE if buffer is None else step.way
    functions.update_sgd(
        weight.storage, half, way, int(step.nesterov), addresses.buffer_info()[0], len(group), pack(step, 5)
    )


def _agrees(functions: ctypes.CDLL) -> bool:
    """Whether kernels and truth give the same bits, tried on whole vectors and some numbers more, over a few steps."""
    storages = (WIDE, SPLIT, COPY)
    return all(
        _agrees_on_adam(functions, storage, decoupled, nearest)
        and _agrees_on_narrow_adam(functions, storage, decoupled, nearest)
        and _agrees_on_sgd(functions, storage, decoupled)
        for storage, decoupled, nearest in itertools.product(storages, (True, False), (True, False))
    )


def _draw(count: int, start: int) -> Tensor:
    """Numbers of many magnitudes and both signs, without touching torch's noise."""
    place = torch.arange(start, start + count, device="cpu", dtype=torch.float32)
    return torch.sin(place * 12.9898) * torch.exp(2 * torch.sin(place * 78.233))


def _keep(value: Tensor, storage: int) -> Weight:
    if storage == WIDE:
        return Weight(value.clone())
    live = torch.empty_like(value, dtype=torch.bfloat16)
    if storage == COPY:
        return Weight(live.copy_(value), value.clone())
    rest = torch.empty_like(value, dtype=torch.int16)
    split(value.clone(), live, rest)
    return Weight(live, rest)


def _equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, ours, theirs))


COUNT_TRIED = 1029  # a block, and a few numbers that fill no vector


def _list_steps(decoupled: bool, nearest: bool) -> list[AdamStep]:
    return [
        AdamStep.of(
            lr=0.03, betas=(0.9 if decoupled else 0.4, 0.97), eps=1e-6, decay=0.1, decoupled=decoupled, count=t,
            factor=0.3, nearest=nearest,
        )
        for t in (1, 2, 3)
    ]  # fmt: skip


def _draw_gradient(t: int) -> Tensor:
    return _draw(COUNT_TRIED, t * COUNT_TRIED).to(torch.bfloat16 if t == 2 else torch.float32)


def _agrees_on_adam(functions: ctypes.CDLL, storage: int, decoupled: bool, nearest: bool) -> bool:
    ours, theirs = _begin(storage), _begin(storage)
    for t, step in enumerate(_list_steps(decoupled, nearest), 1):
        gradient = _draw_gradient(t)
        update_adam_slowly(ours[0], gradient, *ours[1:], step)
        run_adam(functions, [(theirs[0], gradient, *theirs[1:], None)], step)
    return _equal((ours[0].read(), ours[0].live, *ours[1:]), (theirs[0].read(), theirs[0].live, *theirs[1:]))


def _agrees_on_narrow_adam(functions: ctypes.CDLL, storage: int, decoupled: bool, nearest: bool) -> bool:
    (ours, *_), (theirs, *_) = _begin(storage), _begin(storage)
    start, states = make_zeros(ours.live.shape), (make_zeros(ours.live.shape), make_zeros(ours.live.shape))
    truth: Any = (start, start)
    for t, step in enumerate(_list_steps(decoupled, nearest), 1):
        gradient = _draw_gradient(t).abs_() if t == 1 else _draw_gradient(t)  # the first means have no sign
        truth = update_adam_narrow_slowly(ours, gradient, truth[0], truth[1], step)
        (found,) = run_adam_narrow(functions, [(theirs, gradient, *states, None)], step)
        if found is None:
            return False
        states = found
        if [q.signed for q in truth] != [q.signed for q in states]:
            return False
    kept = [[x for q in pair for x in (q.codes, q.scales)] for pair in (truth, states)]
    return _equal((ours.read(), ours.live, *kept[0]), (theirs.read(), theirs.live, *kept[1]))


def _agrees_on_sgd(functions: ctypes.CDLL, storage: int, nesterov: bool) -> bool:
    ours, theirs = _begin(storage), _begin(storage)
    for t in (1, 2, 3):
        step = SgdStep(0.9, 1.0 if nesterov else 0.7, -0.03, 0.1, 0.3, BEGINS if t == 1 else GOES_ON, nesterov)
        gradient = _draw_gradient(t)
        update_sgd_slowly(ours[0], gradient, ours[1], step)
        run_sgd(functions, [(theirs[0], gradient, theirs[1], None, None)], step)
    return _equal((ours[0].read(), ours[0].live, ours[1]), (theirs[0].read(), theirs[0].live, theirs[1]))


def _begin(storage: int) -> tuple[Weight, Tensor, Tensor]:
    """A weight and two states."""
    start = _draw(COUNT_TRIED, 0)
    return _keep(start, storage), torch.zeros_like(start), torch.zeros_like(start)


KERNELS = Kernels(
    "updates.c",
    {
        "update_adam": [INT, INT, INT, POINTER, COUNT, POINTER, POINTER],
        "update_adam_narrow": [INT, INT, INT, POINTER, COUNT, POINTER, POINTER, POINTER, POINTER],
        "update_sgd": [INT, INT, INT, INT, POINTER, COUNT, POINTER],
        "compare_steps": [POINTER, COUNT, POINTER],
    },
    _agrees,
)
