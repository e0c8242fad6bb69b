"""What one process found in its window -> what all of them do about it.

    one tiny reduction a window:  did anybody find a cause;  the largest and the smallest norm
    somebody did                  everybody reports the finding of the one where it began, and skips
    nobody did                    the norms are those of the same averaged gradients, so they are equal

Weights stay equal only if all apply the same gradients, so norms that differ are an error: they were not averaged. Equal
gradients have norms that agree to the rounding of one sum, whose order a processor may choose; those of different batches
hardly ever agree as `EQUAL` says, and not step after step.
"""

from dataclasses import replace

import torch

from halfstep.distributed import Ranks
from halfstep.errors import ModelError
from halfstep.window import Finding

EQUAL = 2.0**-10  # relative difference: far above the rounding of an fp32 sum, far below what a batch makes


def agree_on_finding(finding: Finding, ranks: Ranks, device: torch.device) -> Finding:
    """What all ranks hold for true, the same on each of them. Raises ModelError when their gradients are different ones.

    Examples:
        >>> from halfstep.distributed import Alone
        >>> agree_on_finding(Finding(cause="the loss is nan"), Alone(), torch.device("cpu")).cause
        'the loss is nan'
    """
    if ranks.size == 1:
        return finding
    seen = torch.tensor([float(bool(finding.cause)), finding.norm, -finding.norm], dtype=torch.float64, device=device)
    failed, largest, negated = ranks.maximize(seen).tolist()
    if failed:
        return _find_origin(ranks.gather(finding))
    if largest + negated > EQUAL * largest:
        raise ModelError(
            f"the gradients of the ranks differ: their norm is {finding.norm:.6g} here and goes from {-negated:.6g} to "
            f"{largest:.6g}; average them in every backward pass (DistributedDataParallel does, without no_sync(), and wrapped "
            "after the last change of plan), or give prepare(..., ranks=halfstep.distributed.Alone()) to train apart"
        )
    return replace(finding, norm=largest)


def _find_origin(findings: list[Finding]) -> Finding:
    """The finding nearest to where it began: a bad loss makes every rank's gradients bad."""
    rank = max(range(len(findings)), key=lambda i: (_grade(findings[i]), -i))
    return replace(findings[rank], cause=f"rank {rank}: {findings[rank].cause}")


def _grade(finding: Finding) -> int:
    return bool(finding.cause) + finding.nonfinite + finding.forward_nonfinite
