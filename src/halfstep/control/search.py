"""From measured costs to a plan: for every layer the format in which it is fastest, if that is worth it.

A layer leaves fp32 only where 16 bits were timed to be faster with the casts counted, and by more than timing noise.
Everything between the layers follows the majority: where no layer leaves fp32, the plan is plain fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from halfstep.plan import Plan, Rule

NOISE = 1.05  # a gain must exceed this: medians of a few repetitions repeat to about 3 %


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one layer takes in one training step, in milliseconds: its three products, and the casts around them."""

    path: str
    shape: tuple[int, ...]
    products: dict[str, float]  # format -> ms
    casts: dict[str, float]  # format -> ms for inputs and results of the layer, forward and backward

    def total(self, format: str) -> float:
        return self.products[format] + self.casts.get(format, 0.0)


def choose_formats(costs: Sequence[LayerCost], *, master: str = "split") -> Plan:
    """One rule a layer, each with its reason, then a rule for the rest.

    Examples:
        >>> cost = LayerCost(path="fc", shape=(8, 8, 8), products={"fp32": 2.0, "bf16": 0.5}, casts={"bf16": 0.1})
        >>> choose_formats([cost]).rules[0].compute
        'bf16'
    """
    rules, chosen = [], set()
    for cost in costs:
        best = min(cost.products, key=cost.total)
        gain = cost.total("fp32") / cost.total(best)
        if gain < NOISE:
            best = "fp32"
        chosen.add(best)
        rules.append(_rule(cost, best, gain, master))
    wide = chosen <= {"fp32"}
    if wide:
        return Plan(rules=(*rules, Rule(compute="fp32", why="no layer gains from 16 bits")), name="auto")
    most = max(
        chosen - {"fp32"},
        key=lambda f: sum(c.products["fp32"] for c, r in zip(costs, rules, strict=True) if r.compute == f),
    )
    rest = Rule(compute=most, cast="op", why="operations between the layers follow them")
    embeddings = Rule(
        kind="embedding", compute=most, storage=most, master=_master(most, master), why="feeds 16-bit layers"
    )
    return Plan(rules=(*rules, embeddings, rest), loss_scale="dynamic" if "fp16" in chosen else "none", name="auto")


def _master(format: str, master: str) -> str:
    return "fp32" if format == "fp16" else master


def _rule(cost: LayerCost, format: str, gain: float, master: str) -> Rule:
    shape = "x".join(map(str, cost.shape))
    others = [f for f in cost.products if f != "fp32"]
    if format == "fp32":
        timed = ", ".join(f"{f} {cost.total(f):.3g} ms" for f in others) or "no 16-bit format is fast here"
        return Rule(path=cost.path, compute="fp32", storage="fp32", master="none",
                    why=f"{shape}: fp32 {cost.total('fp32'):.3g} ms, {timed} with casts: no gain")  # fmt: skip
    why = f"{shape}: {format} {cost.total(format):.3g} ms with casts, fp32 {cost.total('fp32'):.3g} ms: {gain:.1f}x"
    return Rule(path=cost.path, compute=format, storage=format, master=_master(format, master), why=why)
