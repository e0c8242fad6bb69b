"""Packing: one body over the truth and the kernels; what is promised about error, bias and numbers that are not finite."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from halfstep.numerics import packing
from halfstep.numerics.noise import derive_keys
from halfstep.numerics.packing import GROUP, Groups
from helpers import bits, seeded

KEYS = (2**32 - 3, 12345)  # the pair counter wraps within the first group


class Packer(NamedTuple):
    pack_groups: Callable[[Tensor, int, tuple[int, int]], Groups]
    unpack_groups: Callable[[Groups, torch.dtype], Tensor]
    pack_bits: Callable[[Tensor], Tensor]
    unpack_bits: Callable[[Tensor, int], Tensor]


TRUTH = Packer(
    packing.pack_groups_slowly, packing.unpack_groups_slowly, packing.pack_bits_slowly, packing.unpack_bits_slowly
)
KERNELS = Packer(packing.pack_groups, packing.unpack_groups, packing.pack_bits, packing.unpack_bits)
both = pytest.mark.parametrize("packer", [TRUTH, KERNELS], ids=["truth", "kernels"])
widths = pytest.mark.parametrize("width", [8, 4])


def make_numbers(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    with seeded(seed):
        return torch.randn(count).to(dtype)


def measure_steps(x: Tensor, width: int) -> Tensor:
    """The step that each number is rounded with, after the definition."""
    return torch.cat([(g.max() - g.min()).expand(len(g)) / (2**width - 1) for g in x.float().split(GROUP)])


@both
@widths
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 5000])
def test_numbers_come_back_within_a_step_and_the_ends_of_a_group_exactly(
    packer: Packer, width: int, count: int
) -> None:
    x = make_numbers(count)
    back = packer.unpack_groups(packer.pack_groups(x, width, KEYS), x.dtype)
    assert back.shape == x.shape
    assert bool(((back - x).abs() <= measure_steps(x, width) * 1.0001).all())
    for group, packed in zip(x.split(GROUP), back.split(GROUP), strict=True):
        assert packed.min() == group.min()
        torch.testing.assert_close(packed.max(), group.max(), rtol=1e-6, atol=0)


@both
@widths
def test_rounding_is_without_bias_and_as_noisy_as_theory_says(packer: Packer, width: int) -> None:
    x, draws = make_numbers(GROUP), 2000
    back = torch.stack(
        [packer.unpack_groups(packer.pack_groups(x, width, derive_keys(0, 0, i)), x.dtype) for i in range(draws)]
    )
    step = measure_steps(x, width).double()
    share = ((x.double() - x.min()) / step) % 1
    sigma = (share * (1 - share)).sqrt() * step
    error = back.double().mean(0) - x.double()
    assert bool((error.abs() <= 4 * sigma / draws**0.5 + 1e-3 * step).all())
    assert abs(error.sum()) <= 4 * (sigma.square().sum() / draws).sqrt()
    assert float(back.double().var(0).mean() / sigma.square().mean()) == pytest.approx(1.0, rel=0.02)


@both
@widths
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_group_with_a_number_that_is_not_finite_comes_back_as_nan_and_no_other(
    packer: Packer, width: int, bad: float
) -> None:
    x = make_numbers(3 * GROUP)
    x[GROUP + 7] = bad
    back = packer.unpack_groups(packer.pack_groups(x, width, KEYS), x.dtype)
    assert back.isnan().view(3, GROUP).all(1).tolist() == [False, True, False]
    assert not back.isnan().view(3, GROUP)[::2].any()


@both
@widths
@pytest.mark.parametrize("value", [0.0, -0.0, 2.5, -3e38, 1e-42])
def test_equal_numbers_come_back_exactly(packer: Packer, width: int, value: float) -> None:
    x = torch.full((GROUP + 1,), value)
    assert torch.equal(packer.unpack_groups(packer.pack_groups(x, width, KEYS), x.dtype), x)


@both
@widths
def test_ranges_at_the_ends_of_fp32(packer: Packer, width: int) -> None:
    near, far = torch.linspace(0, 1e-40, GROUP), torch.tensor([-3e38, 3e38]).repeat(GROUP // 2)
    assert bool((packer.unpack_groups(packer.pack_groups(near, width, KEYS), near.dtype) - near).abs().max() <= 1e-40)
    assert bool(packer.unpack_groups(packer.pack_groups(far, width, KEYS), far.dtype).isnan().all())


@both
@widths
def test_relu_keeps_its_zeros(packer: Packer, width: int) -> None:
    x = make_numbers(4 * GROUP).relu()
    assert bool((packer.unpack_groups(packer.pack_groups(x, width, KEYS), x.dtype)[x == 0] == 0).all())


@widths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_give_the_bits_of_the_truth(width: int, dtype: torch.dtype) -> None:
    x = 3 * make_numbers(100_001).to(dtype)
    x[GROUP], x[2 * GROUP + 1] = torch.nan, torch.inf
    x[3 * GROUP : 4 * GROUP] = 2.5
    x[4 * GROUP : 5 * GROUP] *= 1e-40
    x[6 * GROUP : 7 * GROUP].relu_()
    truth, fast = TRUTH.pack_groups(x, width, KEYS), KERNELS.pack_groups(x, width, KEYS)
    assert torch.equal(truth.codes, fast.codes)
    assert torch.equal(truth.scales.nan_to_num(7.0), fast.scales.nan_to_num(7.0))
    one, other = TRUTH.unpack_groups(truth, dtype), KERNELS.unpack_groups(truth, dtype)
    assert torch.equal(one.isnan(), other.isnan())  # torch gives NaN in bf16 no fixed pattern
    assert torch.equal(bits(one.nan_to_num(7.0)), bits(other.nan_to_num(7.0)))


@pytest.mark.parametrize(("width", "bytes_a_number"), [(8, 8.25 / 8), (4, 4.25 / 8)])
def test_size(width: int, bytes_a_number: float) -> None:
    assert packing.pack_groups(make_numbers(10 * GROUP), width, KEYS).nbytes == 10 * GROUP * bytes_a_number


@both
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_bits_come_back(packer: Packer, count: int) -> None:
    mask = make_numbers(count) > 0
    codes = packer.pack_bits(mask)
    assert (codes.dtype, codes.numel()) == (torch.uint8, -(-count // 8))
    assert torch.equal(packer.unpack_bits(codes, count), mask)
    assert torch.equal(codes, TRUTH.pack_bits(mask))
