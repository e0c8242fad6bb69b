"""The stopwatch, and the products of a layer that are timed."""

import pytest
import torch
from torch import Tensor

from halfstep.machine.timing import DTYPES, PRODUCTS, Stopwatch, count_operations, time_products


@pytest.mark.parametrize(
    ("operation", "shape"),
    [("matmul", (4, 5, 6)), ("conv2d", (2, 4, 8, 6, 6, 3, 1, 1)), ("conv2d", (2, 4, 8, 6, 6, 3, 2, 2))],
)
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
def test_three_products_of_a_layer_are_timed(operation: str, shape: tuple[int, ...], format: str) -> None:
    measured = time_products(operation, shape, format, Stopwatch(seconds=0.001))
    assert [m.product for m in measured] == ["output", "grad_input", "grad_weight"]
    assert all(m.milliseconds > 0 and m.rate > 0 and m.shape == shape and m.format == format for m in measured)


@pytest.mark.parametrize(
    ("shape", "format", "ways"),
    [
        ((8, 64, 64, 8, 8, 3, 1, 1), "bf16", (2, 2, 2)),
        ((32, 64, 64, 8, 8, 3, 2, 1), "bf16", (2, 1, 2)),  # a stride
        ((8, 64, 64, 8, 8, 3, 1, 1), "fp32", (1, 1, 2)),
        ((8, 64, 64, 8, 8, 3, 1, 2), "bf16", (1, 1, 1)),  # groups
        ((8, 64, 64, 8, 8, 3, 1, 1), "fp16", (1, 1, 1)),
        ((1, 4, 8, 6, 6, 3, 1, 1), "bf16", (1, 1, 1)),  # too little to compute
        ((64, 256, 4, 22, 22, 3, 1, 1), "bf16", (1, 2, 1)),  # too much to keep
    ],
)
def test_products_are_timed_by_patches_where_training_would_take_them(
    shape: tuple[int, ...], format: str, ways: tuple[int, ...]
) -> None:
    calls = PRODUCTS["conv2d"](shape, DTYPES[format], "cpu")
    assert tuple(len(calls[product]) for product in ("output", "grad_input", "grad_weight")) == ways
    for product in calls.values():
        first, *others = (call() for call in product)
        right = next(t for t in first if t is not None) if isinstance(first, tuple) else first
        for found in others:
            assert isinstance(found, Tensor) and isinstance(right, Tensor) and found.stride() == right.stride()
            torch.testing.assert_close(found, right, rtol=0.02, atol=0.02 * float(right.abs().max()))


def test_operations_are_counted_as_two_for_a_multiply_add() -> None:
    assert count_operations("matmul", (2, 3, 4)) == 48
    assert count_operations("conv2d", (1, 4, 8, 6, 6, 3, 2, 2)) == 2 * 2 * 8 * 3 * 3 * 9


def test_stopwatch_calls_at_least_five_times_and_a_slow_call_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for ms, expected in ((1.0, 5), (1e6, 1), (1e-6, 52)):
        calls: list[int] = []

        def time_once(self: Stopwatch, call: object, ms: float = ms, calls: list[int] = calls) -> float:
            calls.append(1)
            return ms

        monkeypatch.setattr(Stopwatch, "time_once", time_once)
        assert Stopwatch(seconds=0.003).time(lambda: None) == ms
        assert len(calls) == expected
