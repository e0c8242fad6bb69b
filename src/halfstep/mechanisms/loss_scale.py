"""Loss scaling: lift small gradients above fp16's floor, and take the factor out again before the update.

    scaled = loss * scale;  backward;  gradients /= scale
    non-finite gradient     ->  no update, scale *= backoff (after `hysteresis` of them in a row)
    `interval` clean steps  ->  scale *= growth

Micikevicius et al. 2018, section 3.2. Constants as in torch.amp; floor, ceiling and hysteresis because a scale
that reaches 0 turns the next clean step into NaN weights.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossScaleRule:
    """How the scale moves. With growth and backoff 1 it stays where it is: that is no scaling, or a static one."""

    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000  # clean steps before growth
    hysteresis: int = 1  # overflows in a row before backoff
    floor: float = 1.0
    ceiling: float = 2.0**24


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """Where the scale is."""

    scale: float = 2.0**16
    clean: int = 0  # steps since the last overflow or growth
    overflows: int = 0  # overflows in a row


DYNAMIC = LossScaleRule()
UNSCALED = LossScaleRule(growth=1.0, backoff=1.0)


def adjust(state: LossScale, rule: LossScaleRule, *, found_nonfinite: bool) -> LossScale:
    """The scale for the next step.

    Examples:
        >>> adjust(LossScale(scale=8.0), LossScaleRule(), found_nonfinite=True).scale
        4.0
    """
    if found_nonfinite:
        backs_off = state.overflows + 1 >= rule.hysteresis
        scale = max(state.scale * rule.backoff, rule.floor) if backs_off else state.scale
        return LossScale(scale=scale, clean=0, overflows=0 if backs_off else state.overflows + 1)
    if state.clean + 1 < rule.interval:
        return replace(state, clean=state.clean + 1, overflows=0)
    return LossScale(scale=min(state.scale * rule.growth, rule.ceiling))


def adjust_tensors(
    scale: Tensor, clean: Tensor, overflows: Tensor, rule: LossScaleRule, *, found_nonfinite: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`adjust` on one-element tensors (fp32, int32, int32; bool) of one device; reads nothing back from it.

    Examples:
        >>> zero = torch.tensor(0, dtype=torch.int32)
        >>> adjust_tensors(torch.tensor(8.0), zero, zero, LossScaleRule(), found_nonfinite=torch.tensor(True))[0].item()
        4.0
    """
    backs_off = found_nonfinite & (overflows + 1 >= rule.hysteresis)
    grows = ~found_nonfinite & (clean + 1 >= rule.interval)
    lower = (scale * rule.backoff).clamp(min=rule.floor)
    higher = (scale * rule.growth).clamp(max=rule.ceiling)
    return (
        torch.where(backs_off, lower, torch.where(grows, higher, scale)),
        torch.where(found_nonfinite | grows, 0, clean + 1),
        torch.where(found_nonfinite & ~backs_off, overflows + 1, 0),
    )
