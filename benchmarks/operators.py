"""What torch's function mode costs where torch.autocast costs nothing: a small transformer, forward and backward, by turns.

python benchmarks/operators.py
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from halfstep.mechanisms.operators import OperatorMode

ROUNDS = 40


def build(width: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(8, 64, width)


def time_step(
    model: nn.Module, x: torch.Tensor, around: Callable[[], AbstractContextManager[Any]]
) -> tuple[float, float]:
    """Seconds of this process in the forward pass, and in both passes; on one thread, other processes do not count."""
    start = time.process_time()
    with around():
        loss = model(x).float().square().mean()
    middle = time.process_time()
    loss.backward()
    return middle - start, time.process_time() - start


def measure(width: int) -> dict[str, Any]:
    model, x = build(width)
    mode = OperatorMode("bf16", "cpu")
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "mode": lambda: mode,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(ROUNDS + 5):
        for name, around in ways.items():
            model.zero_grad()
            seconds = time_step(model, x, around)
            if number >= 5:
                times[name].append(seconds)
    forward, both = ([statistics.median(t[i] for t in times[name]) for name in ways] for i in (0, 1))
    pairs = [m[1] / a[1] for a, m in zip(times["autocast"], times["mode"], strict=True)]
    return {
        "width": width,
        "autocast_ms": 1e3 * both[0], "mode_ms": 1e3 * both[1],
        "ratio": statistics.median(pairs), "quarters": statistics.quantiles(pairs, n=4)[::2],
        "extra_us_forward": 1e6 * (forward[1] - forward[0]),
    }  # fmt: skip


def time_call(function: Callable[[], Any], around: AbstractContextManager[Any]) -> float:
    """Microseconds of one call, the fastest of ten times a thousand."""
    times = []
    with around, torch.no_grad():
        for _ in range(10):
            start = time.process_time()
            for _ in range(1000):
                function()
            times.append(time.process_time() - start)
    return 1e3 * min(times)


def measure_calls() -> dict[str, Any]:
    """What one call costs, of an operation that is cast, that is in the table and not cast, that is not in the table."""
    x, w = torch.ones(4, 4), torch.ones(4, 4, requires_grad=True)
    narrow = x.bfloat16()
    calls: dict[str, Callable[[], Any]] = {
        "linear, weight cast": lambda: nn.functional.linear(narrow, w),
        "matmul, both cast": lambda: x @ x,
        "softmax": lambda: narrow.softmax(-1),
        "view": lambda: x.view(16),
    }
    return {
        name: {
            "autocast": time_call(call, torch.autocast("cpu", dtype=torch.bfloat16)),
            "mode": time_call(call, OperatorMode("bf16", "cpu")),
        }
        for name, call in calls.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(platform.processor() or platform.machine(), torch.__version__)
    print(json.dumps(measure_calls()))
    for width in (16, 64, 256):
        print(json.dumps(measure(width)))
