"""The check of a step against fp64, and what it finds."""

import math

import pytest
import torch
from torch import Tensor, nn

from halfstep.mechanisms.gradients import find_nonfinite, measure_norm, measure_norm_slowly, take_values
from helpers import seeded


def make_gradients() -> list[Tensor]:
    with seeded(0):
        sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1, 3]]), torch.randn(3, 4), (8, 4), check_invariants=True)
        return [
            torch.randn(64, 8),
            torch.randn(5).bfloat16(),
            torch.randn(7).half(),
            torch.randn(3, 3) + 1j * torch.randn(3, 3),
            sparse,
        ]


def test_norm_is_that_of_all_numbers_together() -> None:
    gradients = make_gradients()
    dense = [g.to_dense() if g.is_sparse else g for g in gradients]
    expected = math.sqrt(sum(float((g.abs().double() if g.is_complex() else g.double()).square().sum()) for g in dense))
    assert measure_norm(gradients)[0] == pytest.approx(expected, rel=1e-6)
    assert measure_norm_slowly(gradients) == pytest.approx(expected, rel=1e-7)


def test_norm_of_fp64_is_measured_in_fp64() -> None:
    assert measure_norm([torch.full((4,), 1e100, dtype=torch.float64)])[0] == pytest.approx(2e100)


def test_losses_come_back_with_the_norm() -> None:
    losses = [torch.tensor(1.5), torch.tensor([2.5], dtype=torch.bfloat16), torch.tensor(math.nan)]
    norm, values = measure_norm([torch.tensor([3.0, 4.0])], losses)
    assert norm == 5.0
    assert values[:2] == [1.5, 2.5]
    assert math.isnan(values[2])
    assert measure_norm([], losses[:1]) == (0.0, [1.5])
    assert measure_norm([]) == (0.0, [])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(5))
def test_one_number_anywhere_makes_the_norm_not_finite_and_is_found(value: float, which: int) -> None:
    gradients = make_gradients()
    take_values(gradients[which]).view(-1)[-1] = value
    if gradients[which].is_sparse:
        gradients[which] = torch.sparse_coo_tensor(
            torch.tensor([[1]]), torch.tensor([[0.0, 0.0, value, 0.0]]), (8, 4), check_invariants=True
        )
    assert not math.isfinite(measure_norm(gradients)[0])
    parameters = {nn.Parameter(torch.zeros(1)): gradient for gradient in gradients}
    assert find_nonfinite(parameters) == [list(parameters)[which]]
