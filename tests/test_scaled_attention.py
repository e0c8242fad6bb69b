"""Attention by kernel: against the definition in fp64, with every mask; dropout; and the way that was measured faster."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from halfstep.errors import UnsupportedError
from halfstep.numerics import routes, scaled_attention
from halfstep.numerics.dropouts import Drop
from halfstep.numerics.scaled_attention import (
    DTYPES,
    KERNELS,
    ROUTES,
    Rule,
    attend_slowly,
    describe_shape,
    explain_attention,
    scaled_dot_product_attention,
)  # fmt: skip
from helpers import seeded

pytestmark = pytest.mark.skipif(KERNELS.library.functions is None, reason="no C compiler")
dtypes = pytest.mark.parametrize("dtype", DTYPES)
Inputs = tuple[Tensor, Tensor, Tensor]
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}  # of the norm of the error to the norm of the truth


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel's way, whatever is faster."""
    monkeypatch.setattr(scaled_attention, "measure_route", lambda _: {"kernel": 0.0, "torch": 1.0})
    yield
    ROUTES.clear()


def make_inputs(dtype: torch.dtype, queries: int = 33, keys: int = 33, batch: tuple[int, ...] = (2, 3)) -> Inputs:
    with seeded(0):
        shapes = [(*batch, queries, 16), (*batch, keys, 16), (*batch, keys, 24)]
        query, key, value = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    return query, key, value


def make_mask(kind: str, queries: int, keys: int) -> Tensor | None:
    with seeded(1):
        padding = torch.arange(keys) < torch.tensor([keys, keys // 2])[:, None]
        return {
            "none": None,
            "padding": padding[:, None, None],
            "bool": torch.rand(2, 3, queries, keys) > 0.4,
            "one for all": torch.rand(queries, keys) > 0.4,
            "of a query": torch.rand(2, 1, queries, 1) > 0.4,
            "added": torch.randn(1, 3, queries, keys),
            "added bf16": torch.randn(queries, keys).bfloat16(),
            "turned": torch.randn(3, keys, queries).mT,
            "-inf": torch.zeros(2, 1, 1, keys).masked_fill(~padding[:, None, None], -math.inf),
            "lowest": torch.zeros(queries, keys).masked_fill(torch.rand(queries, keys) > 0.5, torch.finfo().min),
        }[kind]


def measure(out: Tensor, inputs: Inputs) -> list[Tensor]:
    """Output and gradients in fp64, for a gradient that lies as a transformer's does."""
    with seeded(2):
        gradient = torch.randn(out.transpose(-2, -3).shape).to(out.dtype).transpose(-2, -3)
    found = [out, *torch.autograd.grad(out, inputs, gradient)]
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(found[1:], inputs, strict=True))
    return [t.detach().double() for t in found]


def assert_near(found: list[Tensor], truth: list[Tensor], bound: float) -> None:
    for one, other in zip(found, truth, strict=True):
        assert (one - other).norm() <= bound * other.norm() + 1e-30


def widen(inputs: Inputs) -> Inputs:
    query, key, value = (t.detach().double().requires_grad_() for t in inputs)
    return query, key, value


def attend_in_fp64(inputs: Inputs, **options: Any) -> list[Tensor]:
    wide = widen(inputs)
    mask = options.pop("attn_mask", None)
    mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    with sdpa_kernel(SDPBackend.MATH):
        return measure(F.scaled_dot_product_attention(*wide, attn_mask=mask, **options), wide)


@dtypes
@pytest.mark.parametrize(("queries", "keys"), [(33, 33), (16, 40), (40, 16), (1, 7), (7, 1), (64, 300)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.7}], ids=str)
def test_outputs_and_gradients(dtype: torch.dtype, queries: int, keys: int, options: dict[str, Any]) -> None:
    inputs = make_inputs(dtype, queries, keys)
    found = measure(scaled_dot_product_attention(*inputs, **options), inputs)
    truth = attend_in_fp64(inputs, **options)
    assert_near(found, truth, BOUNDS[dtype])


@dtypes
@pytest.mark.parametrize(("queries", "keys"), [(33, 33), (20, 50)])
@pytest.mark.parametrize(
    "kind", ["padding", "bool", "one for all", "of a query", "added", "added bf16", "turned", "-inf", "lowest"]
)
def test_masks(dtype: torch.dtype, queries: int, keys: int, kind: str) -> None:
    inputs, mask = make_inputs(dtype, queries, keys), make_mask(kind, queries, keys)
    assert explain_attention(*inputs, mask) == ""
    found = measure(scaled_dot_product_attention(*inputs, mask), inputs)
    assert_near(found, attend_in_fp64(inputs, attn_mask=mask), BOUNDS[dtype])


@dtypes
def test_one_batch_dimension_and_inputs_that_lie_as_a_transformers_do(dtype: torch.dtype) -> None:
    flat = make_inputs(dtype, batch=(4,))
    assert_near(
        measure(scaled_dot_product_attention(*flat, is_causal=True), flat),
        attend_in_fp64(flat, is_causal=True),
        BOUNDS[dtype],
    )
    inputs = make_inputs(dtype)
    q, k, v = (t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in inputs)
    assert torch.equal(scaled_dot_product_attention(q, k, v), scaled_dot_product_attention(*inputs))


@dtypes
def test_a_query_that_may_see_nothing_gets_zeros_and_gives_none(dtype: torch.dtype) -> None:
    inputs, mask = make_inputs(dtype), torch.ones(33, 33, dtype=torch.bool)
    mask[5] = False
    out, grad_query, *others = measure(scaled_dot_product_attention(*inputs, mask), inputs)
    assert not out[:, :, 5].any() and not grad_query[:, :, 5].any() and bool(out[:, :, 4].any())
    assert_near([out, grad_query, *others], attend_in_fp64(inputs, attn_mask=mask), BOUNDS[dtype])


@dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_seen(dtype: torch.dtype, bad: float) -> None:
    inputs = make_inputs(dtype, 33, 40)  # torch's bf16 product on AMX multiplies the next row by 0 where keys are odd
    with torch.no_grad():
        inputs[0][0, 0, 3] = bad
    out = scaled_dot_product_attention(*inputs)
    assert bool(out[0, 0, 3].isnan().all()) and int(out.isnan().sum()) == 24
    with torch.no_grad():
        inputs[1][1, 2] = math.nan
    assert bool(scaled_dot_product_attention(*inputs)[1, 2].isnan().all())


@dtypes
@pytest.mark.parametrize("keys", [33, 40])
@pytest.mark.parametrize("kind", ["none", "padding", "added"])
def test_dropout_is_that_of_the_truth(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, keys: int, kind: str
) -> None:
    monkeypatch.setattr(scaled_attention, "draw_keys", lambda: (7, 2**32 - 5))
    inputs, mask = make_inputs(dtype, 33, keys), make_mask(kind, 33, keys)
    found = measure(scaled_dot_product_attention(*inputs, mask, 0.3), inputs)
    wide = widen(inputs)
    rule = Rule(0.25, False, Drop(0.3, (7, 2**32 - 5)))
    assert_near(found, measure(attend_slowly(*wide, mask, rule), wide), BOUNDS[dtype])


def test_rate_and_mean_of_dropout() -> None:
    count, p = 256, 0.2
    q, unit = torch.zeros(16, count, 8), torch.eye(count).expand(16, count, count)
    with seeded(0):
        weights = scaled_dot_product_attention(q, q, unit, dropout_p=p)  # all equal but for dropout
    sigma = (p * (1 - p) / weights.numel()) ** 0.5
    assert abs(float((weights == 0).double().mean()) - p) < 4 * sigma
    assert abs(float(weights.double().sum(-1).mean()) - 1) < 4 * sigma / (1 - p)


def test_the_seed_governs_dropout_and_checkpointing_repeats_it() -> None:
    inputs = make_inputs(torch.float32)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, dropout_p=0.5)

    with seeded(1):
        plain = attend(*inputs)
    with seeded(1):
        again = checkpoint(attend, *inputs, use_reentrant=False)
    assert torch.equal(plain, again)
    for one, other in zip(measure(plain, inputs), measure(again, inputs), strict=True):
        assert torch.equal(one, other)


def test_under_autocast_inputs_are_cast_as_by_torch() -> None:
    inputs = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = scaled_dot_product_attention(*inputs), F.scaled_dot_product_attention(*inputs)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert_near(measure(found, inputs), attend_in_fp64(inputs), 2 * BOUNDS[torch.bfloat16])


def test_second_derivatives_are_refused() -> None:
    inputs = make_inputs(torch.float32)
    out = scaled_dot_product_attention(*inputs)
    with pytest.raises(UnsupportedError, match=r"no second derivatives.*got create_graph=True.*SDPBackend.MATH"):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


def test_what_is_left_to_torch() -> None:
    q, k, v = make_inputs(torch.float32)
    causal = torch.ones(33, 33).tril()
    assert explain_attention(q, k, v) == ""
    assert explain_attention(q, k, v, enable_gqa=True) == "grouped queries"
    assert explain_attention(q, k, v, causal.requires_grad_()) == "mask: needs a gradient"
    assert explain_attention(q, k, v, causal, is_causal=True) == "a mask beside is_causal"
    assert explain_attention(q, k, v, torch.ones(2, 3)) == "mask of shape (2, 3)"
    assert explain_attention(q, k, v, dropout_p=1.0) == "dropout_p = 1.0"
    assert explain_attention(q, k.bfloat16(), v) == "dtype bfloat16 beside float32"
    assert explain_attention(q.double(), k, v) == "dtype float64"
    assert explain_attention(q, k[:1], v).startswith("shapes [(2, 3, 33, 16), (1, 3, 33, 16)")
    assert explain_attention(q[0, 0], k[0, 0], v[0, 0]).startswith("shapes")
    with torch.no_grad():
        assert explain_attention(q, k, v) == "no gradient and no dropout"
        assert torch.equal(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    half = q.detach().half()
    assert explain_attention(half, half, half) == "dtype float16"
    assert torch.equal(scaled_dot_product_attention(half, half, half), F.scaled_dot_product_attention(half, half, half))
    with pytest.raises(RuntimeError):
        scaled_dot_product_attention(q, k, v[..., :5, :])


def test_many_weights_are_left_to_torch_unless_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(torch.float32)
    monkeypatch.setattr(scaled_attention, "MOST_BYTES", 1000)
    assert explain_attention(*inputs) == "0 MiB of weights"
    assert explain_attention(*inputs, dropout_p=0.5) == ""


class TestRoutes:
    @pytest.fixture(autouse=True)
    def measured(self, monkeypatch: pytest.MonkeyPatch, by_kernel: None) -> None:
        monkeypatch.undo()
        ROUTES.clear()

    @pytest.mark.parametrize("slow", ["kernel", "torch"])
    def test_the_faster_way_is_taken_and_timed_once(self, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
        inputs, clock = make_inputs(torch.float32), iter(range(1000))
        durations: list[float] = []

        def tick() -> float:  # start, end, start, end, ...: the kernel's way first
            number = next(clock)
            durations.append(0.0 if number % 2 == 0 else (number % 4 == 1) == (slow == "kernel"))
            return durations[-1]

        monkeypatch.setattr(routes.time, "perf_counter", tick)
        out = scaled_dot_product_attention(*inputs)
        fast = "torch" if slow == "kernel" else "kernel"
        assert list(ROUTES.values()) == [fast]
        assert ("_Attention" in type(out.grad_fn).__name__) == (fast == "kernel")
        calls = len(durations)
        scaled_dot_product_attention(*inputs)
        assert len(durations) == calls
        scaled_dot_product_attention(*inputs, is_causal=True)
        assert len(durations) == 2 * calls and len(ROUTES) == 2

    def test_timing_leaves_no_trace(self) -> None:
        inputs = make_inputs(torch.float32)
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        state = torch.get_rng_state()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            scaled_dot_product_attention(*inputs)
            once = len(kept)
            scaled_dot_product_attention(*inputs)
        assert len(kept) == 2 * once
        assert torch.equal(torch.get_rng_state(), state)
        assert all(t.grad is None for t in inputs)

    def test_a_route_that_was_put_back_is_taken(self) -> None:
        inputs = make_inputs(torch.float32)
        ROUTES[describe_shape(*inputs, None, False)] = "torch"
        assert torch.equal(scaled_dot_product_attention(*inputs), F.scaled_dot_product_attention(*inputs))

    def test_nothing_is_timed_in_a_run_that_is_to_repeat_itself(self) -> None:
        inputs = make_inputs(torch.float32)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.equal(scaled_dot_product_attention(*inputs), F.scaled_dot_product_attention(*inputs))
        finally:
            torch.use_deterministic_algorithms(False)
        assert not ROUTES

    def test_dropout_is_never_timed(self) -> None:
        out = scaled_dot_product_attention(*make_inputs(torch.float32), dropout_p=0.1)
        assert not ROUTES and "_Attention" in type(out.grad_fn).__name__
