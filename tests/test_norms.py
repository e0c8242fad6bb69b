"""Squares of many tensors in one pass: against fp64, over blocks and chunks, and where numbers are not finite."""

import math

import pytest
import torch
from torch import Tensor

from halfstep.mechanisms.gradients import measure_norm
from halfstep.numerics.norms import BLOCK, DTYPES, KERNELS, can_measure, sum_squares
from helpers import seeded

pytestmark = pytest.mark.skipif(KERNELS.library.functions is None, reason="no C compiler")


def draw(*counts: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    with seeded(sum(counts)):
        return [torch.randn(count).to(dtype) for count in counts]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [(1,), (63, 64, 65), (4095, 4097), (BLOCK, 1, BLOCK + 1), (3 * BLOCK + 17, 0, 5)])
def test_sums_are_those_of_fp64(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = draw(*counts, dtype=dtype)
    right = sum(float(t.double().square().sum()) for t in tensors)
    assert sum_squares(tensors) == pytest.approx(right, rel=1e-6)


def test_formats_may_be_mixed_and_channels_last() -> None:
    image = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    tensors = [image, *draw(100, dtype=torch.bfloat16), torch.zeros(0)]
    assert all(map(can_measure, tensors))
    assert sum_squares(tensors) == pytest.approx(sum(float(t.double().square().sum()) for t in tensors), rel=1e-6)


def test_threads_do_not_show() -> None:
    tensors, threads = draw(5 * BLOCK + 3, 70), torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(sum_squares(tensors))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 64, 4096, BLOCK, BLOCK + 99])
def test_one_number_that_is_not_finite_is_seen(bad: float, dtype: torch.dtype, place: int) -> None:
    (tensor,) = draw(BLOCK + 100, dtype=dtype)
    tensor[place] = bad
    assert not math.isfinite(sum_squares([tensor]))
    assert not math.isfinite(measure_norm([tensor])[0])


def test_others_are_left_to_torch() -> None:
    wide, strided = torch.tensor([3.0], dtype=torch.float64), torch.full((4, 2), 2.0)[:, :1]
    half = torch.tensor([12.0], dtype=torch.float16)
    assert not any(map(can_measure, (wide, half, strided, torch._neg_view(wide.float()))))
    assert measure_norm([wide, strided, half])[0] == 13.0
    assert measure_norm([wide, half[:0]], [torch.tensor(2.0)]) == (3.0, [2.0])


def test_for_clipping_the_norm_has_torchs_bits() -> None:
    tensors = draw(5000, 70001, 33)
    total = float(torch.nn.utils.get_total_norm(tensors))
    assert measure_norm(tensors, like_torch=True)[0] == total
    assert measure_norm(tensors)[0] == pytest.approx(total, rel=1e-5)
