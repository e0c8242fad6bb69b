"""The fp32 truth behind 16-bit weights, for any torch optimizer.

The live weight is 16 bits wide while the model runs. For the update it is widened to its fp32 truth in place, the
optimizer does to it what it always does, and it is narrowed again:

    for each chunk of parameters:  widen;  optimizer.step();  narrow

The optimizer sees ordinary fp32 parameters with fp32 gradients, so its states are fp32 and any optimizer will do. Only
one chunk is wide at a time; optimizers skip parameters that have no gradient, which is how a step is confined to it.

An optimizer that is known to find its parameters in its groups, and their states under them, is given a stand-in for each
wide parameter. Any other works on the parameter itself, whose data is wide for the time of the step. Both give the same
bits; but torch drops the node that accumulates a parameter's gradient, and the hooks that others have put there, when its
data changes dtype. DistributedDataParallel is such another: it would go on without averaging.

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

One pass: where AdamW, Adam or SGD is stepped on the processor, nothing is widened. Parameters behind `split`, behind `fp32` with
bf16, and those that are fp32 anyway are read, updated and written in one pass over memory (`numerics.native_steps` says which
and why not others), with the gradient in the bits it came in. It is the same update, to the bit that torch's own would give.

Rows: where a gradient is sparse and the optimizer works row by row, only the rows that have a gradient are widened, updated
and narrowed again, with their rows of the optimizer's states.

Sources: Kalamkar et al. 2019 (arXiv 1905.12322), split SGD; Micikevicius et al. 2018, section 3.1, master weights;
Zamirai et al. 2020 (arXiv 2010.06192), stochastic rounding and Kahan summation for bf16 weights.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.errors import UnsupportedError
from halfstep.numerics.movement import ELEMENTWISE, FORMAT_NAMES, Watch
from halfstep.numerics.native_steps import find_group_reason, find_reason, step_natively
from halfstep.numerics.noise import derive_keys, draw_noise, draw_noise_at
from halfstep.numerics.updates import KERNELS, Weight
from halfstep.numerics.words import (
    apply_compensation,
    compensate,
    join,
    join24,
    round_stochastically,
    split,
    split24,
)
from halfstep.records import Stall

CHUNK = 1 << 20  # parameters that are wide at once: 8 MB of weights and gradients
BLOCK = 1 << 16  # weights that are narrowed at once: a few buffers of them fit into a core's second-level cache

ONE_PASS = ("split", "fp32")  # kinds behind bf16 whose update may take one pass over memory

PARAMETERWISE = {*ELEMENTWISE, torch.optim.SparseAdam}
"""Optimizers known to treat parameters one by one; any other gets all of its parameters in one chunk."""

DENSE = {*ELEMENTWISE.difference((torch.optim.SGD, torch.optim.Adagrad)), torch.optim.Adafactor}
"""Optimizers known to refuse sparse gradients."""

BY_ROWS = {torch.optim.SparseAdam, torch.optim.Adagrad, torch.optim.SGD}
"""Optimizers that take sparse gradients and treat rows one by one; SGD without momentum."""


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


def match_states(optimizer: Optimizer, parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Bring the floating-point states that have a parameter's shape to `dtype`, what the optimizer sees it in, and to the
    parameter's strides: fused kernels walk through memory, not through indices."""
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape and key != "step":
            laid_out = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            is_so = value.is_sparse or value.stride() == laid_out.stride()
            state[key] = value.to(dtype) if is_so else laid_out.copy_(value)


@dataclass
class _Truth:
    """How one parameter's fp32 value is kept while its live weight is narrow."""

    kind: str
    number: int  # of the parameter, for its noise
    live: Tensor
    kept: Tensor  # what the way keeps beside it; empty where that is nothing
    version: int = 0  # of the parameter when `live` last became its data

    @staticmethod
    def of(weight: Tensor, kind: str, number: int, dtype: torch.dtype) -> "_Truth":
        beside = WAYS[kind].kept
        kept = torch.empty(0) if beside is None else torch.empty_like(weight, dtype=beside)
        truth = _Truth(kind, number, torch.empty_like(weight, dtype=dtype), kept)
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
    def whole(self) -> "_Truth":
        return self

    def take_rows(self, rows: Tensor) -> "_Rows":
        live, kept = (t[rows] for t in self._tensors())
        return _Rows(self.kind, self.number, live, kept, origin=self, rows=rows)

    def _tensors(self) -> tuple[Tensor, Tensor]:
        """Live and kept, both with the parameter's shape."""
        return self.live, self.live if WAYS[self.kind].kept is None else self.kept


@dataclass(kw_only=True)
class _Rows(_Truth):
    """Some rows of a truth; an update goes into the whole."""

    origin: _Truth
    rows: Tensor

    @property
    def whole(self) -> _Truth:
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


def _show(parameter: nn.Parameter, truth: _Truth) -> None:
    """Let the model see the live weight."""
    parameter.data = truth.live
    truth.version = parameter._version


Places = Mapping[nn.Parameter, tuple[list[nn.Parameter], int]]  # parameter -> the list of its group, and where there


def _find_places(optimizer: Optimizer) -> Places:
    """Where stand-ins may be put; nowhere in an optimizer that may keep its parameters elsewhere too."""
    if type(optimizer) not in PARAMETERWISE:
        return {}
    return {p: (group["params"], i) for group in optimizer.param_groups for i, p in enumerate(group["params"])}


@contextmanager
def _substitute(
    optimizer: Optimizer, places: Places, parameter: nn.Parameter, weight: Tensor
) -> Iterator[nn.Parameter]:
    """What the optimizer finds in a parameter's place inside the block: with that weight, and the parameter's states."""
    if parameter not in places:
        parameter.data = weight
        yield parameter
        return
    params, index = places[parameter]
    params[index] = wide = nn.Parameter(weight, requires_grad=parameter.requires_grad)
    if parameter in optimizer.state:
        optimizer.state[wide] = optimizer.state.pop(parameter)
    try:
        yield wide
    finally:
        params[index] = parameter
        if wide in optimizer.state:
            optimizer.state[parameter] = optimizer.state.pop(wide)


Opened = tuple[nn.Parameter, "_Truth | None"]
"""What the optimizer finds in a parameter's place, and what that was read from."""


@contextmanager
def _open_wide(parameter: nn.Parameter, gradient: Tensor) -> Iterator[Opened]:
    parameter.grad = gradient
    try:
        yield parameter, None
    finally:
        parameter.grad = None


@contextmanager
def _open_whole(
    optimizer: Optimizer,
    places: Places,
    parameter: nn.Parameter,
    gradient: Tensor,
    opened: _Truth,
    keys: tuple[int, int],
) -> Iterator[Opened]:
    """`opened` is the parameter's truth, or rows of it."""
    with _substitute(optimizer, places, parameter, opened.read()) as wide:
        wide.grad = gradient
        try:
            yield wide, opened
        finally:
            wide.grad = None
            opened.update(wide.data, keys)
            _show(parameter, opened.whole)


@contextmanager
def _open_rows(
    optimizer: Optimizer,
    places: Places,
    parameter: nn.Parameter,
    gradient: Tensor,
    truth: _Truth,
    keys: tuple[int, int],
) -> Iterator[Opened]:
    """Rows that have a gradient, as a parameter of their own with their rows of the states.

    States that the optimizer makes now begin as zeros in the other rows, as the optimizers of BY_ROWS make them.
    """
    rows, values = gradient.indices()[0], gradient.values()
    whole = {k: v for k, v in optimizer.state[parameter].items() if _is_like(v, parameter)}
    optimizer.state[parameter].update({key: value[rows] for key, value in whole.items()})
    numbers = torch.arange(len(rows), device=rows.device)[None]
    renumbered = torch.sparse_coo_tensor(numbers, values, values.shape, is_coalesced=True, check_invariants=True)
    try:
        with _open_whole(optimizer, places, parameter, renumbered, truth.take_rows(rows), keys) as opened:
            yield opened
    finally:
        state = optimizer.state[parameter]
        for key in [key for key, value in state.items() if key in whole or _is_like(value, values)]:
            full = whole.get(key, torch.zeros_like(truth.live, dtype=torch.float32))
            state[key] = full.index_copy_(0, rows, state[key])


def _is_like(value: object, parameter: Tensor) -> bool:
    """Whether a state is one number for each of the parameter's."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape


def _look_before(
    watcher: Watch,
    optimizer: Optimizer,
    places: Places,
    parameter: nn.Parameter,
    truth: _Truth | None,
    gradient: Tensor,
    factor: float,
) -> nn.Parameter:
    """Let the watcher see a parameter as its optimizer would find it; returns what it saw."""
    storage, kind = (truth.live.dtype, truth.kind) if truth else (parameter.dtype, "none")
    weight = truth.read() if truth else parameter.detach()
    with _substitute(optimizer, places, parameter, weight) as seen:
        seen.grad = gradient.to(torch.float32) * factor
        watcher.look_before(seen, storage, kind)
        seen.grad = None
    return seen


def _goes_by_rows(optimizer: Optimizer, parameter: nn.Parameter, gradient: Tensor) -> bool:
    if not gradient.is_sparse or gradient.sparse_dim() != 1 or type(optimizer) not in BY_ROWS:
        return False
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    return not group.get("momentum")  # SGD's momentum is sparse too, and moves rows of earlier gradients


def _require_sparse(optimizer: Optimizer, gradients: Mapping[nn.Parameter, Tensor]) -> None:
    """Raises UnsupportedError where optimizer and gradients do not fit, before anything has moved."""
    name = type(optimizer).__name__
    if type(optimizer) in DENSE and any(gradient.is_sparse for gradient in gradients.values()):
        raise UnsupportedError(
            f"{name} takes no sparse gradients; use SparseAdam, Adagrad or SGD, or make the embedding with sparse=False"
        )
    if isinstance(optimizer, torch.optim.SparseAdam) and not all(g.is_sparse for g in gradients.values()):
        raise UnsupportedError(
            "SparseAdam takes only sparse gradients; give the other parameters an optimizer of their own"
        )


class MasterWeights:
    """Keeps parameters narrow, and steps an optimizer on their fp32 truth.

    seed: of the noise of stochastic rounding; the same on all replicas, so that they stay equal.
    fused: update in one pass over memory where that can be done; `describe_updates` says where.

    Examples:
        >>> layer = nn.Linear(4, 4)
        >>> masters = MasterWeights()
        >>> masters.narrow(layer.weight, torch.bfloat16, "split")
        >>> layer.weight.dtype, masters.read(layer.weight).dtype
        (torch.bfloat16, torch.float32)
    """

    def __init__(self, seed: int = 0, *, fused: bool = True) -> None:
        self.seed, self.fused = seed, fused
        self.steps = 0  # calls of `step`; each has noise of its own
        self._truths: dict[nn.Parameter, _Truth] = {}
        self._narrowed = 0  # parameters that were ever narrowed: the number of the next

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._truths

    def __len__(self) -> int:
        return len(self._truths)

    def state_dict(self) -> dict[str, int]:
        """What the noise of the next update depends on; the values are in the model's own state dict, as fp32.

        Examples:
            >>> MasterWeights(seed=3).state_dict()
            {'seed': 3, 'steps': 0}
        """
        return {"seed": self.seed, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with the noise of a saved state."""
        self.seed, self.steps = state["seed"], state["steps"]

    def narrow(self, parameter: nn.Parameter, dtype: torch.dtype, kind: str) -> None:
        """Make an fp32 parameter's live weight `dtype` and keep its fp32 truth as `kind`: a word of WAYS, or none.

        Raises UnsupportedError for a kind that needs bf16 behind anything else, and for parameters that are not fp32.
        """
        if parameter.dtype != torch.float32:
            raise UnsupportedError(f"only fp32 parameters can be narrowed; got {parameter.dtype}; leave it as it is")
        if kind != "none" and WAYS[kind].why_bf16 and dtype is not torch.bfloat16:
            raise UnsupportedError(
                f"master '{kind}' works behind bf16 weights; got {dtype}, which {WAYS[kind].why_bf16}; use master='fp32'"
            )
        parameter.grad = None
        number, self._narrowed = self._narrowed, self._narrowed + 1
        if kind == "none":
            parameter.data = parameter.data.to(dtype)
            return
        truth = _Truth.of(parameter.data, kind, number, dtype)
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
        """Set the parameter from an fp32 tensor, truth and live weight, rounded to nearest."""
        if parameter in self._truths:
            wide = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)  # with the parameter's strides
            self._truths[parameter].write(wide.copy_(value.detach()))
            _show(parameter, self._truths[parameter])
        else:
            parameter.data.copy_(value)

    def widen(self, parameter: nn.Parameter) -> None:
        """Give a parameter back its fp32 truth for good."""
        truth = self._find_truth(parameter)
        self._truths.pop(parameter, None)
        parameter.grad = None
        parameter.data = truth.read() if truth else parameter.data.to(torch.float32)

    def step(
        self,
        optimizer: Optimizer,
        gradients: dict[nn.Parameter, Tensor],
        factor: float = 1.0,
        *,
        watch: bool = False,
        around: Callable[[list[nn.Parameter]], AbstractContextManager[None]] | None = None,
    ) -> tuple[Stall, ...]:
        """One optimizer step with `gradients` times `factor`, chunk by chunk; leaves no gradient behind.

        The gradients are used up. Where `watch` is true, the parameter groups that stall are returned, as
        `numerics.movement` defines it; the update is the same to the bit, and costs more.
        around: a block that every chunk of parameters is stepped in, which may prepare their optimizer states.

        Raises UnsupportedError for a sparse gradient that the optimizer is known to refuse; nothing has moved then.
        """
        _require_sparse(optimizer, gradients)
        self.steps += 1
        watcher, places = Watch(optimizer, gradients) if watch else None, _find_places(optimizer)
        for parameter in gradients:
            parameter.grad = None
        if around is None and self._step_in_one_pass(optimizer, places, gradients, factor, watcher):
            return watcher.judge() if watcher else ()
        for chunk in self._chunks(optimizer, gradients, wide_too=around is not None):
            opened: list[Opened] = []
            with around(chunk) if around else nullcontext(), ExitStack() as narrowing:
                for parameter in chunk:
                    opening = self._open(optimizer, places, parameter, gradients.pop(parameter), factor)
                    opened.append(narrowing.enter_context(opening))
                if watcher:
                    for wide, truth in opened:
                        storage, kind = (truth.live.dtype, truth.kind) if truth else (wide.dtype, "none")
                        watcher.look_before(wide, storage, kind)
                optimizer.step()
                if watcher:
                    for wide, _ in opened:
                        watcher.look_after(wide)
            if watcher:
                for wide, truth in opened:
                    if truth:
                        watcher.look_narrowed(wide, truth.read_at)
        return watcher.judge() if watcher else ()

    def _open(
        self, optimizer: Optimizer, places: Places, parameter: nn.Parameter, gradient: Tensor, factor: float
    ) -> AbstractContextManager[Opened]:
        """A parameter as its optimizer is to find it: wide, with its gradient; at the end of the block it is narrow again,
        without one."""
        truth = self._find_truth(parameter)
        if truth:
            gradient = gradient.to(torch.float32)
        if factor != 1.0:
            gradient.mul_(factor)
        if truth is None:
            return _open_wide(parameter, gradient.to(parameter.dtype))
        if gradient.is_sparse:
            gradient = gradient.coalesce()  # in fp32: sums rows that occur twice
        match_states(optimizer, parameter, torch.float32)
        keys = derive_keys(self.seed, truth.number, self.steps)
        if _goes_by_rows(optimizer, parameter, gradient):
            return _open_rows(optimizer, places, parameter, gradient, truth, keys)
        return _open_whole(optimizer, places, parameter, gradient, truth, keys)

    def describe_updates(self, optimizer: Optimizer) -> str:
        """What computes an optimizer's updates: "native: ..." with the compiler, or "torch: ..." and the reason; both where it
        differs from parameter to parameter.

        Examples:
            >>> masters, weight = MasterWeights(), nn.Parameter(torch.ones(3))
            >>> masters.describe_updates(torch.optim.RMSprop([weight]))
            'torch: RMSprop has no kernel'
        """
        reason = find_reason(optimizer) if self.fused else "fused=False"
        if reason:
            return f"torch: {reason}"
        reasons = [
            find_group_reason(group) or self._find_reason(p)
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        left = [reason for reason in reasons if reason]
        if not left:
            return KERNELS.describe()
        named = "; ".join(dict.fromkeys(left))
        if len(left) == len(reasons):
            return f"torch: {named}"
        return f"{KERNELS.describe()}; torch for {len(left)} of {len(reasons)} parameters: {named}"

    def _find_reason(self, parameter: nn.Parameter) -> str:
        """Why a parameter of a group that has kernels is left to torch; empty where it is not."""
        truth, dtype = self._truths.get(parameter), parameter.dtype
        if not parameter.is_cpu:
            return f"weights on {parameter.device.type}"
        if truth and (truth.kind not in ONE_PASS or dtype != torch.bfloat16):
            return f"master '{truth.kind}' behind {FORMAT_NAMES.get(dtype, dtype)} weights has no kernel"
        if not truth and dtype != torch.float32:
            return f"{FORMAT_NAMES.get(dtype, dtype)} weights without a master have no kernel"
        return ""

    def _step_in_one_pass(
        self,
        optimizer: Optimizer,
        places: Places,
        gradients: dict[nn.Parameter, Tensor],
        factor: float,
        watcher: Watch | None,
    ) -> bool:
        """Update what can be updated without widening, and take its gradients out; whether that was all."""
        if not self.fused or not gradients or find_reason(optimizer):
            return False
        for group in [group for group in optimizer.param_groups if not find_group_reason(group)]:
            for parameter in [p for p in group["params"] if p in gradients and not self._find_reason(p)]:
                truth, gradient = self._find_truth(parameter), gradients[parameter]
                if gradient.is_sparse or (truth is None and gradient.dtype != torch.float32):
                    continue  # without a master the factor rounds a gradient in its own dtype
                weight = Weight(truth.live, truth.kept) if truth else Weight(parameter.detach())
                seen = _look_before(watcher, optimizer, places, parameter, truth, gradient, factor) if watcher else None
                if step_natively(optimizer, group, parameter, weight, gradient, factor):
                    del gradients[parameter]
                    if watcher and seen is not None:
                        seen.data = weight.read()
                        watcher.look_after(seen)
                elif watcher and seen is not None:
                    watcher.forget(seen)
        return not gradients

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

    def _chunks(
        self, optimizer: Optimizer, gradients: Mapping[nn.Parameter, Tensor], *, wide_too: bool
    ) -> Iterator[list[nn.Parameter]]:
        """Chunks of about CHUNK numbers; those that are wide already all in the first, unless `wide_too`."""
        narrow = [p for p in gradients if wide_too or p in self._truths]
        wide = [p for p in gradients if not wide_too and p not in self._truths]
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
