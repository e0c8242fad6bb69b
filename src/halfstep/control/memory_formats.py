"""Which memory format each convolution gets: measured costs -> plans that are worth a trial.

    time      control/sensitivity: the three products of each Conv2d at its own shape, in every number format and both memory
              formats, because the two hang together: 16-bit kernels for one of the orders may be missing
    chain     convolutions in the order in which they ran; one that differs from the one before has to bring its input into its
              own format, and the gradient back: that was timed too
    choose    the cheapest way through the chain (Viterbi 1967), and the cheapest format for all

What lies between convolutions also depends on the order, as pooling and normalisation, and is not timed here. So both plans
are only proposed: the trial of the whole model decides between them and what is there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from halfstep.control.monitor import LayerShape
from halfstep.control.search import LayerCost
from halfstep.machine.timing import DTYPES, Stopwatch
from halfstep.mechanisms.layers import find_kind
from halfstep.mechanisms.memory_formats import MEMORY_FORMATS, find_memory_format
from halfstep.plan import Plan, Rule

Formats = Mapping[str, str]  # module path -> memory format


@dataclass(frozen=True, kw_only=True)
class ConvolutionCost:
    """What one convolution takes in one training step, in milliseconds."""

    path: str
    products: dict[str, float]  # memory format -> ms
    conversion: float  # of its input into the other memory format, and of the gradient back

    def describe(self, memory_format: str) -> str:
        """
        >>> ConvolutionCost(path="", products={"contiguous": 1.5, "channels_last": 2.0}, conversion=0.5).describe("contiguous")
        'contiguous 1.5 ms, channels_last 2 ms, 0.5 ms to change'
        """
        other = next(name for name in self.products if name != memory_format)
        times = [f"{name} {self.products[name]:.3g} ms" for name in (memory_format, other)]
        return f"{', '.join(times)}, {self.conversion:.2g} ms to change"


def measure_convolutions(
    model: nn.Module, shapes: Mapping[str, LayerShape], costs: Sequence[LayerCost], plan: Plan, watch: Stopwatch
) -> list[ConvolutionCost]:
    """Costs of the convolutions in the order in which they ran, in the number formats that the plan gives them."""
    table = plan.resolve({path: find_kind(module) for path, module in model.named_modules()}).table
    conversions: dict[tuple[tuple[int, ...], str], float] = {}
    found = []
    for cost in costs:
        format, layer = table[cost.path].compute, shapes[cost.path]
        if format in cost.orders:
            images = (layer.shape[:2] + layer.shape[3:5], format)
            if images not in conversions:
                conversions[images] = _time_conversion(*images, watch)
            change = layer.calls * conversions[images]
            found.append(ConvolutionCost(path=cost.path, products=cost.orders[format], conversion=change))
    return found


def _time_conversion(shape: tuple[int, ...], format: str, watch: Stopwatch) -> float:
    """[batch, channels, height, width] into the one order and back, as gradients go back."""
    there = torch.zeros(shape, device=watch.device, dtype=DTYPES[format])
    back = there.to(memory_format=torch.channels_last)
    calls = ((there, torch.channels_last), (back, torch.contiguous_format))
    return sum(watch.time(lambda x=x, order=order: x.contiguous(memory_format=order)) for x, order in calls)  # type: ignore[misc]


def propose_memory_formats(costs: Sequence[ConvolutionCost]) -> tuple[Formats, ...]:
    """The cheapest formats one by one and, where that is another answer, the cheapest for all.

    Examples:
        >>> early = ConvolutionCost(path="a", products={"contiguous": 3.0, "channels_last": 1.0}, conversion=0.1)
        >>> late = ConvolutionCost(path="b", products={"contiguous": 1.0, "channels_last": 2.0}, conversion=0.5)
        >>> propose_memory_formats([early, late])
        ({'a': 'channels_last', 'b': 'contiguous'}, {'a': 'channels_last', 'b': 'channels_last'})
    """
    if not costs:
        return ()
    best = min(MEMORY_FORMATS, key=lambda name: sum(cost.products[name] for cost in costs))
    apart, same = _find_cheapest_way(costs), {cost.path: best for cost in costs}
    return (apart,) if apart == same else (apart, same)


def _find_cheapest_way(costs: Sequence[ConvolutionCost]) -> dict[str, str]:
    """A batch comes in contiguous."""
    ways: dict[str, tuple[float, list[str]]] = {"contiguous": (0.0, [])}  # last format -> cost, and all formats
    for cost in costs:
        ways = {
            name: min(
                (ms + cost.products[name] + (cost.conversion if name != before else 0.0), [*way, name])
                for before, (ms, way) in ways.items()
            )
            for name in MEMORY_FORMATS
        }
    return dict(zip((cost.path for cost in costs), min(ways.values())[1], strict=True))


def is_there_already(model: nn.Module, formats: Formats) -> bool:
    """Whether all convolutions have these formats already; a kernel of 1x1 goes by its neighbours.

    Examples:
        >>> is_there_already(nn.Sequential(nn.Conv2d(1, 1, 3)), {"0": "contiguous"})
        True
    """
    return all(find_memory_format(model.get_submodule(path)) in ("", name) for path, name in formats.items())


def state_memory_formats(plan: Plan, model: nn.Module, formats: Formats, costs: Sequence[ConvolutionCost]) -> Plan:
    """The plan with a rule for each convolution, whose reason stands after that of its other settings."""
    table = plan.resolve({path: find_kind(module) for path, module in model.named_modules()}).table
    rules = [
        Rule(
            path=cost.path,
            memory_format=formats[cost.path],
            why="; ".join(filter(None, [table[cost.path].why, cost.describe(formats[cost.path])])),
        )
        for cost in costs
    ]
    return replace(plan, rules=(*rules, *plan.rules))
