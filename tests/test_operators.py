"""The table of operations, the mode that follows it, and torch.autocast beside it."""

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from halfstep.mechanisms.operators import OperatorMode
from halfstep.numerics.operations import DIFFERENCES, TABLE
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
