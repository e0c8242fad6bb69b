"""Which of two ways to compute the same is faster here: timed once, and remembered by whoever asks."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

ROUNDS = 3
Route = TypeVar("Route", bound=str)


def measure_route(ways: Mapping[Route, Callable[[], object]]) -> dict[Route, float]:
    """Seconds of the fastest of a few rounds, by turns; what is saved meanwhile is no business of the caller's hooks.

    Examples:
        >>> sorted(measure_route({"one": lambda: 1, "two": lambda: 2}))
        ['one', 'two']
    """
    seconds: dict[Route, list[float]] = {name: [] for name in ways}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with hooks, torch.enable_grad(), torch.autocast("cpu", enabled=False), torch._C.DisableTorchFunction():
        for _ in range(ROUNDS + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    return {name: min(found[1:]) for name, found in seconds.items()}
