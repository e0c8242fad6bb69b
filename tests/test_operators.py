"""The table of operations, the mode that follows it, and torch.autocast beside it."""

import contextlib
import copy
import gc
import itertools
import logging
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from halfstep.errors import UnsupportedError
from halfstep.mechanisms.operators import OperatorMode, cast_operations, choose_twin
from halfstep.numerics.operations import DIFFERENCES, TABLE
from helpers import seeded
from operator_examples import KEYS, Example, list_examples, list_operations

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
UNSEEN = {"_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "mkldnn_rnn_layer", "_scaled_dot_product_flash_attention"}
"""Operations that no function in Python is; others call them."""
NEEDS_CUDA = {"cudnn_convolution", "cudnn_convolution_transpose"}
NEEDS_MEMORY = {"grid_sampler", "grid_sampler_2d", "_grid_sampler_2d_cpu_fallback", "ctc_loss", "geqrf", "linalg_lstsq",
                "fake_quantize_per_tensor_affine", "gru_cell"}  # fmt: skip
"""Kernels for CUDA that cannot be tried without it."""


# --- the table


@pytest.mark.parametrize("key", KEYS)
def test_table_names_every_operation_that_torch_has_a_policy_for(key: str) -> None:
    assert len(list_operations(key)) > 100
    assert list_operations(key) - set(TABLE) == set()


def test_table_names_nothing_else() -> None:
    listed = set.union(*map(list_operations, KEYS))
    assert set(TABLE) - listed == {"linalg_matmul"}  # which is matmul


def vary(example: Example, narrow: torch.dtype) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments in 16 bits, in fp32, and in both by turns."""
    for kinds in ([narrow], [FP32], [narrow, FP32], [FP32, narrow]):
        turns = itertools.cycle(kinds)
        yield tree_map(
            lambda v, turns=turns: v.to(next(turns)) if isinstance(v, Tensor) and v.dtype in (FP32, BF16, FP16) else v,
            (example.args, example.kwargs),
        )


def describe(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The formats of what a call returns, or the error that it raises."""
    try:
        result = function(*args, **kwargs)
    except (RuntimeError, TypeError, AssertionError) as error:
        return ("raises", type(error).__name__)
    return tuple(str(v.dtype) if isinstance(v, Tensor) else type(v).__name__ for v in tree_leaves(result))


@contextlib.contextmanager
def pretend_cuda() -> Iterator[Callable[[Tensor], Tensor]]:
    """CUDA tensors without memory, on which torch.autocast works as on real ones; gives a function that makes them."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with mock.patch("torch.cuda.is_available", lambda: True), FakeTensorMode(allow_non_fake_inputs=True):
        logger.disabled = True
        try:
            yield lambda value: torch.empty(value.shape, dtype=value.dtype, device="cuda")
        finally:
            logger.disabled = False


def compare_with_autocast(device_type: str, compute: str, narrow: torch.dtype) -> tuple[set[str], set[str], set[str]]:
    """Operations that were run, those for which the two differ, those that raised an error under the mode."""
    run, different, failed = set(), set(), set()
    examples = list(list_examples())
    with pretend_cuda() if device_type == "cuda" else contextlib.nullcontext(lambda v: v) as place:
        for example in examples:
            run.add(example.name)
            moved = tree_map(lambda v: place(v) if isinstance(v, Tensor) else v, (example.args, example.kwargs))
            for args, kwargs in vary(example._replace(args=moved[0], kwargs=moved[1]), narrow):
                with torch.autocast(device_type, dtype=narrow):
                    theirs = describe(example.function, args, kwargs)
                with OperatorMode(compute, device_type):
                    ours = describe(example.function, args, kwargs)
                if ours[0] == "raises":
                    failed.add(example.name)
                elif ours != theirs:
                    different.add(example.name)
    return run, different, failed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("device_type", "compute", "narrow"), [("cpu", "bf16", BF16), ("cpu", "fp16", FP16), ("cuda", "fp16", FP16)]
)
def test_the_mode_and_torch_autocast_differ_exactly_where_the_table_says_so(
    device_type: str, compute: str, narrow: torch.dtype
) -> None:
    run, different, failed = compare_with_autocast(device_type, compute, narrow)
    stated = {
        name for difference in DIFFERENCES if difference.device_type == device_type for name in difference.names.split()
    }
    missing = NEEDS_CUDA | NEEDS_MEMORY if device_type == "cuda" else NEEDS_CUDA
    assert set(TABLE) - run == UNSEEN
    assert failed == missing  # nothing else is an error under the mode, mixed inputs included
    assert different - stated == set()
    assert stated - different - missing == set()


def apply_by_hand(example: Example, dtype: torch.dtype) -> Any:
    """A call without any mode, of inputs that were cast as the table says."""
    policy = TABLE[example.name].policy
    leaves = [v.dtype for v in tree_leaves((example.args, example.kwargs)) if isinstance(v, Tensor)]
    floats = {d for d in leaves if d.is_floating_point}
    target = {"compute": dtype, "fp32": FP32, "widest": FP32 if len(floats) > 1 else next(iter(floats))}.get(policy)
    args, kwargs = tree_map(
        lambda v: v.to(target) if target and isinstance(v, Tensor) and v.is_floating_point() else v,
        (example.args, example.kwargs),
    )
    return example.function(*args, **kwargs)


@pytest.mark.filterwarnings("ignore")
def test_the_mode_computes_what_casts_by_hand_compute() -> None:
    counts: Counter[str] = Counter()
    for example in list_examples():
        if example.name in NEEDS_CUDA:
            continue
        for args, kwargs in vary(example, BF16):
            varied = example._replace(args=args, kwargs=kwargs)
            with OperatorMode("bf16", "cpu"):
                actual = example.function(*args, **kwargs)
            for ours, expected in zip(tree_leaves(actual), tree_leaves(apply_by_hand(varied, BF16)), strict=True):
                if isinstance(expected, Tensor):
                    torch.testing.assert_close(ours, expected, equal_nan=True)
                    counts[TABLE[example.name].policy] += 1
    assert min(counts.values()) > 3 and len(counts) == 4


# --- range: why fp16 on a processor takes the mode

HUGE: dict[str, Callable[[Tensor], Any]] = {
    "exp": lambda x: x.exp(), "expm1": lambda x: x.expm1(), "cosh": lambda x: x.cosh(), "sinh": lambda x: x.sinh(),
    "pow": lambda x: x**5, "reciprocal": lambda x: 1 / (x * 0 + 6e-8), "sum": lambda x: (x * 5000).sum(),
    "cumsum": lambda x: (x * 5000).cumsum(0), "cumprod": lambda x: x.cumprod(0), "norm": lambda x: (x * 5000).norm(),
    "frobenius_norm": lambda x: torch.frobenius_norm(x[None] * 5000, (0, 1)),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x * 5000),
    "linalg_matrix_norm": lambda x: torch.linalg.matrix_norm(x[None] * 5000),
    "dist": lambda x: torch.dist(x * 5000, -x),
}  # fmt: skip


def test_what_is_said_to_overflow_does_so_under_torch_autocast_and_not_under_the_mode() -> None:
    stated = {name for difference in DIFFERENCES if difference.overflows for name in difference.names.split()}
    assert stated == set(HUGE)
    x = torch.full((8,), 12.0, dtype=FP16)
    for name, function in HUGE.items():
        with torch.autocast("cpu", dtype=FP16):
            assert not torch.isfinite(function(x)).all(), name
        with OperatorMode("fp16", "cpu"):
            assert torch.isfinite(function(x)).all(), name


@pytest.mark.parametrize(
    ("compute", "device_type", "replaced", "name"),
    [
        ("bf16", "cpu", False, "torch.autocast"),
        ("bf16", "cuda", False, "torch.autocast"),
        ("fp16", "cuda", False, "torch.autocast"),
        ("bf16", "xpu", False, "torch.autocast"),
        ("fp32", "cpu", False, "torch.autocast"),
        ("fp16", "cpu", False, "OperatorMode"),
        ("bf16", "cpu", True, "OperatorMode"),
        ("fp32", "cuda", True, "OperatorMode"),
    ],
)
def test_twin_is_chosen_for_a_reason(compute: str, device_type: str, replaced: bool, name: str) -> None:
    replacements = {F.linear: F.linear} if replaced else None
    twin = choose_twin(compute, device_type, replacements)
    assert twin.name == name
    assert twin.why
    if device_type == "cpu":
        made = cast_operations(compute, device_type, replacements)
        assert isinstance(made, OperatorMode) == (name == "OperatorMode")
        with made:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is {"fp32": FP32, "bf16": BF16, "fp16": FP16}[compute]


def test_unknown_formats_and_devices_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="did you mean 'bf16'"):
        OperatorMode("bf61", "cpu")
    with pytest.raises(UnsupportedError, match="did you mean 'bf16'"):
        choose_twin("bf61", "cpu")
    with pytest.raises(UnsupportedError, match="'abacus'"):
        OperatorMode("bf16", "abacus")


# --- the mode


def multiply() -> torch.dtype:
    """The format of a product of fp32 matrices here."""
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def is_clean() -> bool:
    return not torch.is_autocast_enabled("cpu") and multiply() is FP32 and torch._C._len_torch_function_stack() == 0


def test_what_cannot_be_cast_is_left_alone() -> None:
    with OperatorMode("bf16", "cpu"):
        assert (torch.ones(2, 2, dtype=torch.float64) @ torch.ones(2, 2, dtype=torch.float64)).dtype is torch.float64
        assert (torch.ones(2, 2, dtype=torch.int64) @ torch.ones(2, 2, dtype=torch.int64)).dtype is torch.int64
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2), out=torch.empty(2, 2)).dtype is FP32
        assert torch.mm(torch.ones(2, 2, device="meta"), torch.ones(2, 2, device="meta")).dtype is FP32
        assert torch.ones(2, 2).mul(2.0).dtype is FP32


def test_fp32_brings_products_of_16_bit_inputs_to_fp32() -> None:
    with OperatorMode("fp32", "cpu"):
        assert F.linear(torch.ones(2, 2, dtype=BF16), torch.ones(2, 2)).dtype is FP32


def test_the_innermost_block_decides() -> None:
    outer, inner, plain = OperatorMode("bf16", "cpu"), OperatorMode("fp16", "cpu"), OperatorMode("fp32", "cpu")
    with outer:
        with inner:
            assert multiply() is FP16
            with plain:
                assert multiply() is FP32
            with outer, outer:
                assert multiply() is BF16
            assert multiply() is FP16
        with torch.autocast("cpu", enabled=False):
            assert multiply() is FP32
        with torch.autocast("cpu", dtype=FP16):
            assert multiply() is FP16
        with plain, inner:
            assert multiply() is FP16
        assert multiply() is BF16
    assert is_clean()


def test_an_error_inside_leaves_nothing_behind() -> None:
    with pytest.raises(RuntimeError), OperatorMode("bf16", "cpu"), OperatorMode("fp32", "cpu"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert is_clean()
    mode = OperatorMode("bf16", "cpu")
    with mode:
        with pytest.raises(RuntimeError):
            torch.ones(2, 3) @ torch.ones(2, 3)
        assert multiply() is BF16


def test_blocks_of_other_threads_do_not_meet() -> None:
    mode, found, together = OperatorMode("bf16", "cpu"), {}, threading.Barrier(2)

    def work(name: str, own: OperatorMode | None) -> None:
        with own or contextlib.nullcontext():
            together.wait()
            found[name] = multiply()
            together.wait()

    with mode:
        threads = [threading.Thread(target=work, args=args) for args in (("same", mode), ("none", None))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert multiply() is BF16
    assert found == {"same": BF16, "none": FP32}


def test_a_generator_may_have_a_block_of_its_own() -> None:
    def produce(mode: OperatorMode) -> Generator[torch.dtype, None, None]:
        with mode:
            yield multiply()
            yield multiply()

    assert list(produce(OperatorMode("bf16", "cpu"))) == [BF16, BF16]
    assert is_clean()
    with OperatorMode("fp16", "cpu"):
        assert [(x, multiply()) for x in list(produce(OperatorMode("bf16", "cpu")))] == [(BF16, FP16)] * 2
    unfinished = produce(OperatorMode("bf16", "cpu"))
    assert next(unfinished) is BF16
    unfinished.close()
    assert is_clean()


class Entering(nn.Module):
    """A module that runs in a mode that it holds."""

    def __init__(self, mode: OperatorMode) -> None:
        super().__init__()
        self.mode, self.inner = mode, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with self.mode:
            return self.inner(x)  # type: ignore[no-any-return]


def double_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch._C._nn.linear(x, weight, bias) * 2


def test_copies_follow_the_same_rules_and_share_nothing() -> None:
    module = Entering(OperatorMode("bf16", "cpu", {F.linear: double_linear}))
    x = torch.randn(2, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.mode is not module.mode
        assert torch.equal(twin(x), module(x))
        assert repr(twin.mode) == repr(module.mode) == "OperatorMode(bf16, cpu, 1 replacements)"
    with OperatorMode("fp16", "cpu"):
        assert module(x).dtype is BF16


# --- weights


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what is called below autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_in_the_outermost_block() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4, dtype=BF16)
    mode = OperatorMode("bf16", "cpu")
    with Counting() as counting, mode:
        for _ in range(3):
            layer(x)
            with mode:
                layer(x)
    assert counting.calls["_to_copy"] == 2  # weight and bias
    with Counting() as counting:
        for _ in range(3):
            with mode:
                layer(x)
    assert counting.calls["_to_copy"] == 6


def test_nested_formats_do_not_mix_their_weights() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with OperatorMode("bf16", "cpu"):
        assert layer(x).dtype is BF16
        with OperatorMode("fp16", "cpu"):
            assert layer(x).dtype is FP16
        assert layer(x).dtype is BF16


@pytest.mark.parametrize("change", ["in place", "data"])
def test_a_weight_that_changes_inside_a_block_is_cast_again(change: str) -> None:
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(2, 4)
    with OperatorMode("bf16", "cpu"):
        before = layer(x)
        if change == "data":
            layer.weight.data = layer.weight.data * 2
        else:
            with torch.no_grad():
                layer.weight.mul_(2)
        assert torch.equal(layer(x), 2 * before)


def test_a_weight_that_was_cast_without_gradients_still_gets_them() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with OperatorMode("bf16", "cpu"):
        with torch.no_grad():
            layer(x)
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype is FP32


def test_no_weight_is_held_after_the_block() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with OperatorMode("bf16", "cpu") as mode:
        layer(x)
    with mode.stand_by(), OperatorMode("bf16", "cpu"):
        layer(x)
    held = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert held() is None


def test_functional_transforms_pass() -> None:
    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, weight).float().square().sum()

    weight, x = torch.randn(3, 4), torch.randn(5, 4)
    with OperatorMode("bf16", "cpu"):
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
        whole = torch.func.grad(loss)(weight, x)
    torch.testing.assert_close(each.sum(0), whole, rtol=2e-2, atol=2e-2)


# --- replacements


class Recording:
    """Replacements that note the function they stand for and the formats they are given, and call it."""

    def __init__(self, *functions: Callable[..., Any]) -> None:
        self.calls: list[str] = []
        self.formats: set[torch.dtype] = set()
        self.autocast: set[torch.dtype | None] = set()  # that they were called under
        self.replacements = {function: partial(self.call, function) for function in functions}

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls.append(function.__name__)
        self.formats |= {
            v.dtype for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.is_floating_point()
        }
        self.autocast.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return function(*args, **kwargs)


@pytest.mark.parametrize("key", [torch.matmul, Tensor.matmul, Tensor.__matmul__])
def test_one_spelling_replaces_them_all(key: Callable[..., Any]) -> None:
    recording, x = Recording(key), torch.ones(2, 2)
    with OperatorMode("bf16", "cpu", recording.replacements):
        results = [x @ x, x.matmul(x), torch.matmul(x, x)]
    assert len(recording.calls) == 3
    assert recording.formats == {FP32}, "as they are"
    assert recording.autocast == {BF16}
    assert {y.dtype for y in results} == {BF16}


def test_a_function_of_another_signature_is_not_taken_for_the_same() -> None:
    recording = Recording(F.embedding)
    with OperatorMode("bf16", "cpu", recording.replacements):
        nn.Embedding(3, 2)(torch.tensor([1]))
        torch.embedding(torch.ones(3, 2), torch.tensor([1]))
    assert recording.calls == ["embedding"]


@pytest.mark.parametrize(
    ("build", "function", "shape"),
    [
        (lambda: nn.Linear(4, 4), F.linear, (2, 4)),
        (lambda: nn.Conv1d(4, 4, 3), F.conv1d, (2, 4, 5)),
        (lambda: nn.Conv2d(4, 4, 3, padding="same"), F.conv2d, (2, 4, 5, 5)),
        (lambda: nn.ConvTranspose2d(4, 4, 3), F.conv_transpose2d, (2, 4, 5, 5)),
        (lambda: nn.LSTM(4, 4), torch._VF.lstm, (2, 3, 4)),
        (lambda: nn.GRU(4, 4), torch._VF.gru, (2, 3, 4)),
        (lambda: nn.LSTMCell(4, 4), torch._VF.lstm_cell, (2, 4)),
        (lambda: nn.Bilinear(4, 4, 4), F.bilinear, (2, 4)),
    ],
)
def test_modules_reach_what_replaces_their_function(
    build: Callable[[], nn.Module], function: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    recording, x = Recording(function), torch.randn(shape)
    module = build()
    with OperatorMode("bf16", "cpu", recording.replacements):
        module(*[x] * (2 if isinstance(module, nn.Bilinear) else 1))
    assert len(recording.calls) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_reaches_linear_and_its_products(training: bool, gradients: bool, need_weights: bool) -> None:
    recording = Recording(F.linear, torch.bmm, F.scaled_dot_product_attention)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True).train(training), torch.randn(2, 3, 8)
    with torch.set_grad_enabled(gradients), OperatorMode("bf16", "cpu", recording.replacements):
        result, _ = attention(x, x, x, need_weights=need_weights)
    inside = ["bmm", "bmm"] if need_weights else ["scaled_dot_product_attention"]
    assert recording.calls == ["linear", *inside, "linear"]
    assert result.dtype is BF16


@pytest.mark.parametrize("training", [True, False])
def test_the_transformer_takes_no_shortcut(training: bool) -> None:
    recording = Recording(F.linear, F.scaled_dot_product_attention)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).train(training), torch.randn(2, 3, 8)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    with torch.set_grad_enabled(training), OperatorMode("bf16", "cpu", recording.replacements):
        model(x, src_key_padding_mask=mask)
    assert Counter(recording.calls) == {"linear": 8, "scaled_dot_product_attention": 2}


def test_a_replacement_may_enter_a_mode_of_its_own() -> None:
    recording = Recording(torch.matmul)

    def narrower(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        with OperatorMode("fp16", "cpu", recording.replacements):
            return x.float() @ weight.float().mT

    with OperatorMode("bf16", "cpu", {F.linear: narrower}):
        assert nn.Linear(4, 4)(torch.randn(2, 4)).dtype is FP16
        assert multiply() is BF16
    assert recording.calls == ["matmul"]
    assert recording.formats == {FP32}
    assert recording.autocast == {FP16}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_replacements_are_those_of_the_innermost_block_alone(compute: str) -> None:
    outer, inner = Recording(torch.matmul, torch.relu), Recording(torch.matmul)
    around = OperatorMode(compute, "cpu", outer.replacements)
    with around, around:
        multiply()
        assert outer.calls == ["matmul"]
        with OperatorMode("bf16", "cpu", inner.replacements):
            multiply()
            torch.relu(torch.ones(2))
        with OperatorMode("bf16", "cpu"):
            multiply()
    assert (len(outer.calls), len(inner.calls)) == (1, 1)
    assert outer.autocast == {BF16 if compute == "bf16" else None}


# --- the backward pass


class Doubling(torch.autograd.Function):
    """A custom function whose backward pass multiplies matrices."""

    formats: ClassVar[list[torch.dtype]] = []

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        Doubling.formats.append(multiply())
        return gradients[0] * 2


class Restoring(torch.autograd.Function):
    """One that runs its backward pass under the autocast of its forward pass."""

    formats: ClassVar[list[torch.dtype]] = []

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(context: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        Restoring.formats.append(multiply())
        return gradients[0] * 2


class InFp32(torch.autograd.Function):
    """One that asks for fp32 inputs, and for no autocast."""

    formats: ClassVar[list[torch.dtype]] = []

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=FP32)
    def forward(context: Any, x: Tensor) -> Tensor:
        InFp32.formats += [x.dtype, multiply()]
        return x * 2

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        InFp32.formats.append(multiply())
        return gradients[0] * 2


@pytest.mark.parametrize(("function", "formats"), [(Doubling, [FP32]), (Restoring, [BF16]), (InFp32, [FP32] * 3)])
def test_custom_functions_run_as_under_torch_autocast(function: Any, formats: list[torch.dtype]) -> None:
    for around, behind in ((torch.autocast("cpu", dtype=BF16), contextlib.nullcontext()), stand_by_pair("bf16")):
        function.formats.clear()
        x = torch.ones(2, 2, requires_grad=True)
        with around:
            y = function.apply(x @ x)
        with behind:
            y.float().sum().backward()
        assert function.formats == formats


def stand_by_pair(compute: str) -> tuple[OperatorMode, contextlib.AbstractContextManager[None]]:
    mode = OperatorMode(compute, "cpu")
    return mode, mode.stand_by()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("wrapped", ["lambda", "module"])
def test_checkpointing_recomputes_what_the_forward_pass_computed(reentrant: bool, wrapped: str) -> None:
    """Products that are replaced by something that autocast alone would not compute."""
    with seeded(0):
        weight, x = torch.randn(4, 4), torch.randn(2, 4)
    mode = OperatorMode("bf16", "cpu", {torch.matmul: lambda a, b: torch.mm(a, b) * 2, F.linear: double_linear})
    module = Entering(mode)

    def train(run: Callable[..., Tensor]) -> list[Tensor | None]:
        module.zero_grad()
        inputs, own = x.clone().requires_grad_(), weight.clone().requires_grad_()
        block: Any = module if wrapped == "module" else lambda inputs: ((inputs @ own).exp() @ own).tanh()
        if wrapped == "module":
            loss = run(block, inputs).float().square().sum()
            loss.backward()  # the module enters its mode by itself
        else:
            with mode:
                loss = run(block, inputs).float().square().sum()
            with mode.stand_by():
                loss.backward()
        return [inputs.grad, own.grad, *(p.grad for p in module.parameters())]

    plain = train(lambda block, inputs: block(inputs))
    again = train(lambda block, inputs: checkpoint(block, inputs, use_reentrant=reentrant))
    for expected, actual in zip(plain, again, strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None and actual is not None:
            assert torch.equal(expected, actual)


def test_backward_inside_the_block_and_twice() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    gradients = []
    for _ in range(2):
        layer.zero_grad()
        with OperatorMode("bf16", "cpu"):
            for _ in range(2):
                layer(x).float().sum().backward()
        assert layer.weight.grad is not None
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)


# --- torch.compile


def make_block(name: str) -> nn.Module:
    blocks: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.Softmax(-1)),
        "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        "convolution": lambda: nn.Sequential(nn.Conv1d(3, 3, 3, padding=1), nn.BatchNorm1d(3)),
    }
    with seeded(0):
        return blocks[name]()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["mlp", "transformer", "convolution"])
@pytest.mark.parametrize("replaced", [False, True])
def test_compiled_code_computes_the_same_without_a_graph_break(backend: str, name: str, replaced: bool) -> None:
    torch._dynamo.reset()
    mode = OperatorMode("bf16", "cpu", {F.linear: double_linear} if replaced else None)
    plain, x = make_block(name), torch.randn(2, 3, 8)
    compiled: Any = torch.compile(make_block(name), backend=backend, fullgraph=True)
    results = []
    for module in (plain, compiled):
        with mode:
            y = module(x)
        y.float().square().sum().backward()
        results.append([y, *(p.grad for p in module.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1.6e-2, atol=1e-3)


def test_a_block_inside_compiled_code() -> None:
    torch._dynamo.reset()
    mode = OperatorMode("bf16", "cpu", {torch.matmul: lambda a, b: torch.mm(a, b) * 2})

    def run(x: Tensor) -> Tensor:
        with mode.opened():
            y = x @ x
        return y.float() + (x @ x)

    x = torch.eye(2)
    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x), 3 * x)
    assert is_clean()


def test_entering_again_compiles_nothing_again() -> None:
    torch._dynamo.reset()
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=keep)
    for compute in ("bf16", "bf16", "fp16", "bf16"):
        mode = OperatorMode(compute, "cpu")
        for _ in range(2):
            with mode:
                assert compiled(x).dtype is {"bf16": BF16, "fp16": FP16}[compute]
    assert compiled(x).dtype is FP32
    assert len(graphs) <= 5
