"""Cross entropy: as near to fp64 as torch's fp32 path or nearer, in value and gradient; and torch's answers at the edges."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.numerics.losses import DTYPES, KERNELS, cross_entropy, explain_cross_entropy
from helpers import seeded

dtypes = pytest.mark.parametrize("dtype", DTYPES)
native = pytest.mark.skipif(KERNELS.library.functions is None, reason="no C compiler")
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # half a unit in the last place, relative


def make_logits(rows: int, classes: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    with seeded(0):
        return (spread * torch.randn(rows, classes)).to(dtype), torch.randint(0, classes, (rows,))


def measure(function: Callable[..., Tensor], logits: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient in fp64."""
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, *arguments, **options)
    (gradient,) = torch.autograd.grad(3 * loss, leaf)
    assert gradient.dtype == logits.dtype
    return loss.detach().double(), gradient.double()


def apply_wide(logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """What torch.autocast makes of it."""
    return F.cross_entropy(logits.float(), *arguments, **options)


@dtypes
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (5, 2), (33, 15), (64, 1000), (16, 8192)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_as_near_to_fp64_as_torchs_fp32(
    dtype: torch.dtype, rows: int, classes: int, reduction: str, smoothing: float
) -> None:
    logits, target = make_logits(rows, classes, dtype)
    target[rows // 2] = -100 if rows > 1 else 0
    options = {"reduction": reduction, "label_smoothing": smoothing}
    (loss, gradient), (torchs, torchs_gradient), (truth, true_gradient) = (
        measure(function, x, target, **options)
        for function, x in ((cross_entropy, logits), (apply_wide, logits), (F.cross_entropy, logits.double()))
    )
    assert abs(loss - truth) <= 1.01 * abs(torchs - truth) + 2**-22 * abs(truth) + 1e-7
    error, torchs_error = ((g - true_gradient).norm() for g in (gradient, torchs_gradient))
    scale = 3 / (int((target != -100).sum()) if reduction == "mean" else 1)
    assert error <= 1.05 * torchs_error + 1e-7 * (true_gradient.norm() + scale)
    bound = (
        ROUNDING[dtype] * true_gradient.abs() * 1.01 + 2e-6 * scale * torch.softmax(logits.double(), 1) + 1e-7 * scale
    )
    assert bool(((gradient - true_gradient).abs() <= bound).all())


@dtypes
@pytest.mark.parametrize("offset", [0.0, 1000.0, -30000.0])
def test_large_logits_lose_nothing(dtype: torch.dtype, offset: float) -> None:
    logits = (make_logits(20, 300, torch.float32)[0] * 4).to(dtype) + offset
    target = make_logits(20, 300, dtype)[1]
    (loss, gradient), (truth, true_gradient) = (
        measure(f, x, target) for f, x in ((cross_entropy, logits), (F.cross_entropy, logits.double()))
    )
    assert abs(loss - truth) <= 2**-22 * truth
    assert bool(((gradient - true_gradient).abs() <= 1.01 * ROUNDING[dtype] * true_gradient.abs() + 1e-6).all())


@dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whole_row", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_numbers_that_are_not_finite_come_out_where_torch_has_them(
    dtype: torch.dtype, bad: float, whole_row: bool, smoothing: float
) -> None:
    logits, target = make_logits(4, 40, dtype)
    logits[1, 0 if whole_row else 3 : 40 if whole_row else 4] = bad
    for mine in (target, target.index_fill(0, torch.tensor(1), 3)):
        found, expected = (measure(f, logits, mine, label_smoothing=smoothing) for f in (cross_entropy, apply_wide))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True, rtol=2**-8, atol=1e-6)


def test_rows_that_are_ignored() -> None:
    logits, target = make_logits(6, 9, torch.float32)
    target[1::2] = 4
    loss, gradient = measure(cross_entropy, logits, target, ignore_index=4)
    truth, true_gradient = measure(F.cross_entropy, logits, target, ignore_index=4)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(gradient, true_gradient)
    assert not gradient[1::2].any()
    nothing = torch.full_like(target, -100)
    assert bool(cross_entropy(logits, nothing).isnan())
    assert float(cross_entropy(logits, nothing, reduction="sum")) == 0.0
    assert not measure(cross_entropy, logits, nothing)[1].any()


@dtypes
def test_views_of_logits_and_targets(dtype: torch.dtype) -> None:
    wide, target = make_logits(12, 64, dtype)
    far = torch.stack([target % 30, target], 1)[:, 0]
    for view in (wide[:, :30], wide[::2, 5:35].repeat(2, 1), wide.T[:30].T, wide[:1, :30].expand(12, 30)):
        found, expected = measure(cross_entropy, view, far), measure(apply_wide, view, far)
        assert float(cross_entropy(view, far)) == float(cross_entropy(view.contiguous(), far.contiguous()))
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=2**-7, atol=1e-7)


def test_second_derivatives_are_torchs() -> None:
    logits, target = make_logits(3, 5, torch.float32)
    found, expected = (
        torch.autograd.functional.hessian(lambda x, f=f: f(x.view(3, 5), target, label_smoothing=0.2), logits.flatten())
        for f in (cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(found, expected)
    assert bool(found.any())


@dtypes
@pytest.mark.parametrize("wrong", [5, -1])
def test_a_target_that_is_no_class_is_torchs_error(dtype: torch.dtype, wrong: int) -> None:
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
        cross_entropy(torch.zeros(2, 5, dtype=dtype), torch.tensor([1, wrong]))


@native
def test_what_is_left_to_torch() -> None:
    logits, target = make_logits(4, 5, torch.float32)
    left: list[tuple[tuple[Tensor, Tensor], dict[str, Any], str]] = [
        ((logits, target), {"weight": torch.arange(5.0)}, "class weights"),
        ((logits, target), {"reduction": "none"}, "reduction none"),
        ((logits.double(), target), {}, "dtype float64"),
        ((logits, logits.softmax(1)), {}, "dtype float32"),
        ((logits[0], target[0]), {}, "logits (5,), targets (), label smoothing 0.0"),
        ((logits[None].mT, target[None]), {}, "logits (1, 5, 4), targets (1, 4), label smoothing 0.0"),
        ((logits[:0], target[:0]), {}, "logits (0, 5), targets (0,), label smoothing 0.0"),
    ]
    for tensors, options, why in left:
        assert explain_cross_entropy(*tensors, **options) == why
        assert torch.equal(
            cross_entropy(*tensors, **options).nan_to_num(7), F.cross_entropy(*tensors, **options).nan_to_num(7)
        )
    assert explain_cross_entropy(logits, target) == ""


@native
def test_no_copy_of_the_logits_is_kept() -> None:
    logits, target = make_logits(64, 512, torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        cross_entropy(logits.requires_grad_(), target)
    assert sum(t.nbytes for t in kept) == logits.nbytes + target.nbytes + 64 * 8
    assert any(t.data_ptr() == logits.data_ptr() for t in kept)
