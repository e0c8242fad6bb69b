"""Cross entropy on the processor from 16-bit logits, without an fp32 copy of them.

    loss_row = log sum_c exp(x_c) - (1 - s) x_target - s mean_c x_c            s: label smoothing
    grad_x   = (softmax(x) - (1 - s) [c = target] - s / classes) * grad / count

torch's function takes 16-bit logits under autocast, makes fp32 ones, fp32 log-probabilities and an fp32 gradient of them: for
a vocabulary of thousands of words these are the largest tensors of a training step. Here a row is read once forward and once
backward, computed in fp32, and its gradient is written in the logits' own dtype, rounded once. Of a row there stay the highest
logit and the sum of exponentials below it: as one number, their logsumexp, they would lose what separates 1000 from 1000.00003.

Losses of rows are taken and summed in fp64. There is no other truth than torch's own function in fp64; the exponential is good to
2 units in the last place, sums of a row to about log(classes) of them. A row that is ignored gets zeros, also where it holds NaN.

Second derivatives are torch's own, of fp32 logits.

Sources: Milakov and Gimelshein 2018 (arXiv 1805.02867): the maximum and the sum in one read of memory, here because the
second read of a row finds it in the cache; Szegedy et al. 2015 (arXiv 1512.00567), section 7: label smoothing.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.numerics.kernels import COUNT, DOUBLE, FLOAT, INT, POINTER, Kernels, find_obstacle

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Rule:
    """How rows become one loss.

    Examples:
        >>> Rule(-100, 0.1, "mean").reduction
        'mean'
    """

    ignored: int
    smoothing: float
    reduction: str

    def apply_slowly(self, logits: Tensor, target: Tensor) -> Tensor:
        """[n, classes], [n] -> [], by torch's function in fp32 at least."""
        wide = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
        return F.cross_entropy(
            wide, target, ignore_index=self.ignored, reduction=self.reduction, label_smoothing=self.smoothing
        )


def explain_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean", label_smoothing: float = 0.0
) -> str:
    """Why `cross_entropy` leaves this call to torch's own function; "" where it does not.

    Examples:
        >>> explain_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), reduction="none")
        'reduction none'
    """
    obstacle = find_obstacle(input, dtypes=DTYPES) or find_obstacle(target, dtypes=[torch.int64])
    if obstacle:
        return obstacle
    if weight is not None:
        return "class weights"
    if reduction not in ("mean", "sum"):
        return f"reduction {reduction}"
    if input.ndim != 2 or target.shape != input.shape[:1] or not input.numel() or not 0.0 <= label_smoothing <= 1.0:
        return f"logits {tuple(input.shape)}, targets {tuple(target.shape)}, label smoothing {label_smoothing}"
    return "" if KERNELS.library.functions is not None else KERNELS.describe()


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.cross_entropy`, with a loss in fp32 whatever the logits are.

    Args:
        input: [n, classes] logits, fp32 or bf16 on the processor. Others are left to torch.
        target: [n] int64 classes. Probabilities of classes are left to torch.
        weight: left to torch, as are size_average, reduce and the reduction "none".
        ignore_index: rows with this target count for nothing; if all do, the mean is NaN.
        reduction: "mean" over the rows that count, or "sum".
        label_smoothing: the share of the target that is spread evenly over all classes.

    Examples:
        >>> logits = torch.tensor([[1.0, 2.0], [3.0, 3.0]], dtype=torch.bfloat16)
        >>> loss = cross_entropy(logits, torch.tensor([1, 0]))
        >>> loss.dtype, round(float(loss), 4)
        (torch.float32, 0.5032)

    Raises IndexError for a target that is no class, as torch does.
    """
    if (
        torch.compiler.is_compiling()
        or explain_cross_entropy(input, target, weight, reduction, label_smoothing)
        or size_average is not None
        or reduce is not None
    ):
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )  # fmt: skip
    rule = Rule(ignore_index, label_smoothing, reduction)
    result: Tensor = _CrossEntropy.apply(input, target.contiguous(), rule)
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, rule: Rule) -> Tensor:
        loss, rows, ctx.share = measure(logits, target, rule)
        ctx.save_for_backward(logits, target, rows)
        ctx.rule = rule
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (logits, target, rows) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled() or find_obstacle(gradient, dtypes=[torch.float32]):
            wanted = torch.is_grad_enabled()
            # without a mode, which would put this function in torch's place again
            with torch.enable_grad(), torch._C.DisableTorchFunction():
                loss = ctx.rule.apply_slowly(logits, target)
                (result,) = torch.autograd.grad(loss, logits, gradient, create_graph=wanted)
            return result, None, None
        return write_gradients(logits, target, rows, float(gradient) * ctx.share, ctx.rule), None, None


def measure(logits: Tensor, target: Tensor, rule: Rule) -> tuple[Tensor, Tensor, float]:
    """By kernel, without a graph: [n, classes], [n] -> the loss [] fp32, what each row keeps [n, 2] fp32, and the share of a
    row in the loss.

    Examples:
        >>> rule, target = Rule(-100, 0.0, "mean"), torch.tensor([1, 0])
        >>> KERNELS.library.functions is None or measure(torch.zeros(2, 4), target, rule)[2] == 0.5
        True

    Raises IndexError for a target that is no class, as torch does.
    """
    rows = logits.new_empty(len(logits), 2, dtype=torch.float32)
    losses, totals = (logits.new_empty(count, dtype=torch.float64) for count in (len(logits), 3))
    _call("measure_losses", logits, target, rule, rows.data_ptr(), losses.data_ptr(), totals.data_ptr())
    total, count, wrong = totals.tolist()
    if wrong:
        return rule.apply_slowly(logits, target), rows, torch.nan  # raises torch's own error
    share = 1.0 if rule.reduction == "sum" else 1 / count if count else torch.nan
    return rows.new_tensor(total * share), rows, share


def write_gradients(logits: Tensor, target: Tensor, rows: Tensor, scale: float, rule: Rule) -> Tensor:
    """The gradient of the logits times a scale, in their dtype, from what `measure` kept.

    Examples:
        >>> logits, target, rule = torch.zeros(1, 2), torch.tensor([1]), Rule(-100, 0.0, "sum")
        >>> rows = torch.tensor([[0.0, 2.0]])
        >>> KERNELS.library.functions is None or write_gradients(logits, target, rows, 1.0, rule).tolist() == [[0.5, -0.5]]
        True
    """
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _call("write_gradients", logits, target, rule, rows.data_ptr(), scale, result.data_ptr())
    return result


def _call(name: str, logits: Tensor, target: Tensor, rule: Rule, *others: Any) -> None:
    """A kernel over rows that lie apart by any stride; a row itself lies in one stretch."""
    x = logits if logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1] else logits.contiguous()
    shape = (int(x.dtype is torch.float32), *x.shape, max(x.stride(0), x.shape[1]))
    function = getattr(KERNELS.library.functions, name)
    function(x.data_ptr(), *shape, target.data_ptr(), rule.ignored, rule.smoothing, *others)


def _agrees(functions: ctypes.CDLL) -> bool:
    """Whether the kernels compute what torch does, tried on three rows, the middle one ignored."""
    x = torch.linspace(-4.0, 9.0, 201, dtype=torch.float32, device="cpu").view(3, 67)
    target, rule = torch.tensor([5, -100, 66], device="cpu"), Rule(-100, 0.1, "sum")
    rows, (losses, totals), result = x.new_empty(3, 2), x.new_empty(2, 3, dtype=torch.float64), torch.empty_like(x)
    shape = (x.data_ptr(), 1, 3, 67, 67, target.data_ptr(), rule.ignored, rule.smoothing, rows.data_ptr())
    functions.measure_losses(*shape, losses.data_ptr(), totals.data_ptr())
    functions.write_gradients(*shape, 1.0, result.data_ptr())
    loss, expected = rule.apply_slowly(x, target).item(), torch.softmax(x, 1) - 0.1 / 67
    expected[0, 5] -= 0.9
    expected[1] = 0.0
    expected[2, 66] -= 0.9
    return abs(float(totals[0]) - loss) < 1e-5 * loss and torch.allclose(result, expected, atol=1e-6)


_ROWS = [POINTER, INT, COUNT, COUNT, COUNT, POINTER, COUNT, DOUBLE, POINTER]
KERNELS = Kernels(
    "losses.c", {"measure_losses": [*_ROWS, POINTER, POINTER], "write_gradients": [*_ROWS, FLOAT, POINTER]}, _agrees
)
