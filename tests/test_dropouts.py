"""Dropout: truth and kernel give the same bits; the rate, the mean and the gradient are those of the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from halfstep.numerics import dropouts
from halfstep.numerics.dropouts import DTYPES, KERNELS, LEVELS, Drop, drop_slowly, dropout, explain_dropout
from helpers import bits, seeded

native = pytest.mark.skipif(KERNELS.library.functions is None, reason="no C compiler")
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def make_numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with seeded(0):
        return torch.randn(shape).to(dtype)


def drop_seeded(x: Tensor, p: float, seed: int = 3) -> Tensor:
    with seeded(seed):
        return dropout(x, p)


@native
@dtypes
@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 100_001])
@pytest.mark.parametrize("keys", [(1, 2), (2**32 - 3, 2**31)])
def test_kernel_gives_the_bits_of_the_truth(dtype: torch.dtype, count: int, keys: tuple[int, int]) -> None:
    x, drop, functions = make_numbers(count, dtype=dtype), Drop(0.3, keys), KERNELS.library.functions
    assert functions is not None
    assert torch.equal(bits(dropouts._drop(functions, x, drop)), bits(drop_slowly(x, drop)))


@dtypes
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_rate_and_mean_are_those_asked_for(dtype: torch.dtype, p: float) -> None:
    count = 1_000_000
    y = drop_seeded(torch.ones(count, dtype=dtype), p)
    sigma = (p * (1 - p) / count) ** 0.5
    assert abs(float((y == 0).double().mean()) - p) < 4 * sigma
    wide = drop_seeded(torch.ones(count), p).double()
    assert abs(float(wide.mean()) - 1) < 4 * sigma / (1 - p)
    assert set(wide.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - round(p * LEVELS) / LEVELS)))}


def test_neighbours_rows_and_calls_are_dropped_independently() -> None:
    with seeded(0):
        one, other = (dropout(torch.ones(1024, 1024), 0.5) == 0 for _ in range(2))
    limit = 4 * 0.25 / 2**10
    for a, b in [(one[:, 1:], one[:, :-1]), (one[:, 2:], one[:, :-2]), (one[1:], one[:-1]), (one, other)]:
        assert abs(float((a & b).double().mean()) - 0.25) < 1.1 * limit


@dtypes
def test_gradient_is_dropped_like_the_numbers_and_second_derivatives_are_exact(dtype: torch.dtype) -> None:
    x = make_numbers(40, 50, dtype=dtype).requires_grad_()
    y = drop_seeded(x, 0.4)
    gradient = make_numbers(50, 40, dtype=dtype).T.requires_grad_()
    (found,) = torch.autograd.grad(y, x, gradient, create_graph=True)
    factor = drop_seeded(torch.ones(40, 50), 0.4)
    assert torch.equal(found, (gradient.float() * factor).to(dtype))
    (second,) = torch.autograd.grad(found, gradient, torch.ones_like(found))
    assert torch.equal(second, factor.to(dtype))


@native
def test_nothing_but_keys_waits_for_the_backward_pass() -> None:
    def refuse(_: Tensor) -> None:
        raise AssertionError("a tensor was saved")

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t):
        dropout(make_numbers(10).requires_grad_(), 0.5)


def test_the_seed_alone_governs_the_mask() -> None:
    x = make_numbers(1000)
    assert torch.equal(drop_seeded(x, 0.5), drop_seeded(x, 0.5))
    assert not torch.equal(drop_seeded(x, 0.5), drop_seeded(x, 0.5, seed=4))
    wide = make_numbers(20, 50)
    assert torch.equal(drop_seeded(wide.T.contiguous(), 0.5), drop_seeded(wide.T, 0.5))


def test_checkpointing_drops_the_same_again() -> None:
    x = make_numbers(1000).requires_grad_()
    with seeded(0):
        y = checkpoint(lambda t: dropout(t.exp(), 0.5).square(), x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(
        x.grad, 2 * y.detach()
    )  # d/dx (f e^x)^2 = 2 (f e^x)^2, with the factors f of the first run


@native
@pytest.mark.parametrize(
    ("x", "arguments", "why"),
    [
        (torch.ones(3), (0.0,), "p = 0.0"),
        (torch.ones(3), (1.0,), "p = 1.0"),
        (torch.ones(3), (0.5, False), "not training"),
        (torch.ones(3), (0.5, True, True), "in place"),
        (torch.ones(0), (0.5,), "empty"),
        (torch.ones(3, dtype=torch.float64), (0.5,), "dtype float64"),
        (torch.ones(3, device="meta"), (0.5,), "device meta"),
        (torch.eye(3).to_sparse(), (0.0,), "layout torch.sparse_coo"),
    ],
)
def test_what_is_left_to_torch(x: Tensor, arguments: tuple[Any, ...], why: str) -> None:
    assert explain_dropout(x, *arguments) == why
    with seeded(1):
        found = dropout(x.clone(), *arguments)
    with seeded(1):
        expected = F.dropout(x.clone(), *arguments)
    assert found.device == expected.device and found.dtype == expected.dtype
    if x.device.type == "cpu":
        assert torch.equal(found.to_dense(), expected.to_dense())


@native
def test_what_watches_operations_sees_those_of_torch() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert explain_dropout(torch.ones(2)) == "a dispatch mode watches it"

    def drop(x: Tensor) -> Tensor:
        assert explain_dropout(x) == "torch.func transforms it"
        return dropout(x, 0.5)

    assert torch.func.vmap(drop, randomness="different")(torch.ones(2, 3)).shape == (2, 3)


def test_a_dropped_nan_is_still_seen() -> None:
    assert bool(drop_seeded(torch.full((100,), torch.nan), 0.5).isnan().all())


def test_a_wrong_p_is_torchs_error() -> None:
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        dropout(torch.ones(2), 1.5)
