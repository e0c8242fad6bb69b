"""From measured costs to a plan: for every layer fp32 or the 16-bit format that serves the model best.

A layer leaves fp32 only where 16 bits were timed to be faster with the casts counted, and by more than timing noise.
Everything between the layers follows the 16-bit format: where no layer leaves fp32, the plan is plain fp32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from halfstep.errors import PlanError
from halfstep.numerics.formats import find_format
from halfstep.plan import Plan, Rule
from halfstep.records import HarmRecord

FP32: dict[str, str] = {"compute": "fp32", "storage": "fp32", "master": "none"}  # whatever later rules say of weights
NOISE = 1.05  # a gain must exceed this: medians of a few repetitions repeat to about 3 %


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one layer takes in one training step, in milliseconds: its three products, and the casts around them."""

    path: str
    shape: tuple[int, ...]
    products: dict[str, float]  # format -> ms, of convolutions in the memory format that is fastest for it
    casts: dict[str, float]  # format -> ms for inputs and results of the layer, forward and backward
    orders: dict[str, dict[str, float]] = field(default_factory=dict)  # format -> memory format -> ms, of convolutions

    def total(self, format: str) -> float:
        return self.products[format] + self.casts.get(format, 0.0)

    def gains(self, format: str) -> bool:
        """Whether a 16-bit format takes less time than fp32, and by more than noise."""
        return format in self.products and self.total("fp32") >= NOISE * self.total(format)


UNTIMED = ("conv", "attention", "recurrent")  # kinds with members that multiply weights in ways that are not timed


def choose_formats(costs: Sequence[LayerCost], *, master: str = "split", untimed: str = "") -> Plan:
    """One rule a layer, each with its reason, then rules for the rest.

    untimed: a format to try where other layers multiply weights too and were not timed, as recurrent ones; "" where there are
        none, or no format is fast.

    Examples:
        >>> cost = LayerCost(path="fc", shape=(8, 8, 8), products={"fp32": 2.0, "bf16": 0.5}, casts={"bf16": 0.1})
        >>> choose_formats([cost]).rules[0].compute
        'bf16'
        >>> choose_formats([], untimed="bf16").rules[-1].compute
        'bf16'
    """
    narrow = _choose_narrow(costs)
    rules = [_rule(cost, narrow, master) for cost in costs]
    if all(rule.compute == "fp32" for rule in rules):
        if not untimed:
            return Plan(rules=(*rules, Rule(compute="fp32", why="no layer gains from 16 bits")), name="auto")
        narrow = untimed
    stored: dict[str, str] = {"compute": narrow, "storage": narrow, "master": _master(narrow, master)}
    embeddings = Rule(kind="embedding", why="feeds 16-bit layers", **stored)
    # torch's recurrent layers are slower from 16-bit weights than under autocast (docs/experiments.md)
    others = [
        Rule(kind=kind, why="not timed: as the layers around it", **stored) for kind in UNTIMED if kind != "recurrent"
    ]
    rest = Rule(compute=narrow, cast="op", why="operations between the layers follow them")
    scale = "dynamic" if narrow == "fp16" else "none"
    return Plan(rules=(*rules, embeddings, *others, rest), loss_scale=scale, name="auto")


def _choose_narrow(costs: Sequence[LayerCost]) -> str:
    """The one 16-bit format that serves the whole model best; bf16 unless another one is clearly faster, since it needs no
    loss scale and has an exact master in no more memory."""
    formats = {f for cost in costs for f in cost.products} - {"fp32"}
    times = {f: sum(min(c.total("fp32"), c.total(f)) for c in costs if f in c.products) for f in sorted(formats)}
    if not times:
        return "fp32"
    best = min(times, key=times.__getitem__)
    return "bf16" if "bf16" in times and times["bf16"] < NOISE * times[best] else best


def describe_shape(shape: Sequence[int]) -> str:
    """The shape of a timed product, as `records.Measurement` has it, in words.

    Examples:
        >>> describe_shape((256, 512, 10))
        '256 rows, 512 -> 10'
        >>> describe_shape((16, 64, 128, 32, 32, 3, 2, 1))
        '16 images of 64x32x32 -> 128, kernel 3, stride 2'
        >>> describe_shape((16, 1, 8, 22, 256, 1, 64, 1, 1, 0, 0, 1, 1, 1))
        '16 images of 1x22x256 -> 8, kernel 1x64, padding 0x0'
    """
    match shape:
        case rows, inputs, outputs:
            return f"{rows} rows, {inputs} -> {outputs}"
    batch, inputs, outputs, height, width, *window, groups = shape
    said = [f"{batch} images of {inputs}x{height}x{width} -> {outputs}"]
    if len(window) == 2:  # padded by half of a square kernel
        said += [f"kernel {window[0]}", f"stride {window[1]}" if window[1] > 1 else ""]
    else:
        kernel, stride, padding, dilation = (
            f"{down}x{across}" for down, across in zip(window[::2], window[1::2], strict=True)
        )
        said += [f"kernel {kernel}", f"stride {stride}" if stride != "1x1" else "", f"padding {padding}"]
        said += [f"dilation {dilation}" if dilation != "1x1" else ""]
    said += [f"{groups} groups" if groups > 1 else ""]
    return ", ".join(filter(None, said))


def _master(format: str, master: str) -> str:
    return "fp32" if format == "fp16" else master


def _rule(cost: LayerCost, narrow: str, master: str) -> Rule:
    shape, fp32 = describe_shape(cost.shape), cost.total("fp32")
    if not cost.gains(narrow):
        timed = [f"{f} {cost.total(f):.3g} ms" for f in cost.products if f != "fp32"]
        others = ", ".join(timed) or "no 16-bit format is fast here"
        why = f"{shape}: fp32 {fp32:.3g} ms, {others} with casts: no gain"
        return Rule(path=cost.path, **FP32, why=why)
    ms = cost.total(narrow)
    why = f"{shape}: {narrow} {ms:.3g} ms with casts, fp32 {fp32:.3g} ms: {fp32 / ms:.1f}x"
    return Rule(path=cost.path, compute=narrow, storage=narrow, master=_master(narrow, master), why=why)


def repair_plan(plan: Plan, harms: Sequence[HarmRecord], *, share: float = 0.1) -> Plan:
    """The plan with the most harmful layers in bf16 (in fp32, where they take 16 bits or more already).

    Layers are taken in the order of their harm until the errors of the others, added up as those of independent
    roundings, are at most `share` of the noise between batches: quantization that is small beside the noise of the
    gradients themselves does not change how training goes (Chen et al. 2020, "A Statistical Framework for Low-bitwidth
    Training", arXiv 2010.14298, section 3.2: it adds to the gradient's variance, and that is all). A layer whose error is
    not finite is always taken. The result is the plan itself where nothing is to be repaired.

    Examples:
        >>> harms = [HarmRecord(path=p, compute="fp8_e4m3", error=e, noise=0.5) for p, e in (("a", 0.2), ("b", 0.01))]
        >>> repair_plan(Plan.preset("fp8-mixed"), harms).rules[0].path
        'a'
    """
    left = sorted(harms, key=lambda harm: harm.error if math.isfinite(harm.error) else math.inf, reverse=True)
    rules = []
    while left and not sum(harm.error for harm in left) <= share * left[0].noise:
        worst = left.pop(0)
        wide = {"compute": "bf16"} if find_format(worst.compute).storage_bits < 16 else FP32
        why = f"in {worst.compute} it changes the gradient by {worst.error:.2g} of itself; batches do by {worst.noise:.2g}"
        rules.append(Rule(path=worst.path, **wide, why=why))
    return replace(plan, rules=(*rules, *plan.rules), name=f"{plan.name}-repaired") if rules else plan


@dataclass(frozen=True, kw_only=True)
class SavedCost:
    """What one module saves for the backward pass, by format; "" is as it is."""

    path: str
    bytes: dict[str, int]
    harm: dict[str, float]  # squared error of the model's gradient, as a share of its square


def choose_saved_formats(costs: Sequence[SavedCost], budget: int) -> dict[str, str]:
    """Module path -> the format it saves in, so that all fit into `budget` bytes with little harm to the gradient.

    Everything starts as it is. While it does not fit, the step is taken that adds the least harm for each byte it frees, and
    of equal ones the one that frees most. Harms add up, because modules are rounded independently and without bias. Liu et
    al. 2022, "GACT" (arXiv 2206.11357), section 5.

    Examples:
        >>> first = SavedCost(path="a", bytes={"": 80, "int8": 20}, harm={"": 0.0, "int8": 0.5})
        >>> second = SavedCost(path="b", bytes={"": 80, "int8": 20}, harm={"": 0.0, "int8": 0.1})
        >>> choose_saved_formats([first, second], 100)
        {'a': '', 'b': 'int8'}

    Raises PlanError where the narrowest formats of all do not fit.
    """
    smallest = sum(min(cost.bytes.values()) for cost in costs)
    if smallest > budget:
        raise PlanError(
            f"a budget of {budget} bytes for saved activations cannot be met: in the narrowest formats they take {smallest}; "
            "give more, or a smaller batch"
        )
    chosen = {cost.path: "" for cost in costs}
    while sum(cost.bytes[chosen[cost.path]] for cost in costs) > budget:
        steps = [
            (*_weigh(cost, chosen[cost.path], format), cost.path, format) for cost in costs for format in cost.bytes
        ]
        _, _, path, format = min(step for step in steps if step[1] < 0)
        chosen[path] = format
    return chosen


def _weigh(cost: SavedCost, now: str, then: str) -> tuple[float, int]:
    """Harm for each byte that a step frees, and the bytes it adds."""
    more = cost.bytes[then] - cost.bytes[now]
    return (cost.harm[then] - cost.harm[now]) / -more if more else 0.0, more
