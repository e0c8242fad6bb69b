"""A first loss that was computed outside the autocast that its plan needs."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halfstep.errors import PrecisionWarning
from halfstep.plan import Plan
from halfstep.stepper import Stepper, prepare
from helpers import PRESET_NAMES, SPLIT, make_cnn, make_mlp

NEEDING = ("bf16-mixed", "16-mixed", "path=0 compute=fp32\ncompute=bf16")


def make_stepper(plan: str, model: nn.Module | None = None, **options: bool) -> Stepper:
    model = model or make_mlp()
    return prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3), Plan.parse(plan), **options)  # type: ignore[arg-type]


def count_warnings(stepper: Stepper, compute_loss: Callable[[Stepper], Tensor], steps: int = 2) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            stepper.step(compute_loss(stepper))
    return sum(issubclass(one.category, PrecisionWarning) and one.filename == __file__ for one in caught)


def forget(stepper: Stepper) -> Tensor:
    return stepper.model(torch.ones(4, 8)).square().mean()  # type: ignore[no-any-return]


def remember(stepper: Stepper) -> Tensor:
    with stepper.autocast():
        return forget(stepper)


def open_own(stepper: Stepper) -> Tensor:
    """The model alone under an autocast of the user's; the loss promotes by itself."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = stepper.model(torch.ones(4, 8))
    loss: Tensor = (y - torch.ones(4, 3)).pow(2).mean()
    return loss


@pytest.mark.parametrize("plan", NEEDING)
def test_a_first_loss_outside_autocast_is_warned_of_once(plan: str) -> None:
    assert count_warnings(make_stepper(plan), forget) == 1


def test_the_warning_says_what_to_do() -> None:
    stepper = make_stepper("bf16-mixed")
    with pytest.warns(PrecisionWarning, match="inside `with stepper.autocast"):
        stepper.step(forget(stepper))


@pytest.mark.parametrize("compute_loss", [remember, open_own])
@pytest.mark.parametrize("plan", [*PRESET_NAMES, *NEEDING, SPLIT, "compute=bf16 cast=unit"])
def test_no_one_is_warned_who_has_an_autocast_open(plan: str, compute_loss: Callable[[Stepper], Tensor]) -> None:
    assert count_warnings(make_stepper(plan), compute_loss) == 0


@pytest.mark.parametrize("plan", ["32-true", "bf16-true", "compute=bf16 cast=unit", "path=0 compute=bf16"])
def test_no_one_is_warned_whose_plan_needs_no_autocast(plan: str) -> None:
    assert count_warnings(make_stepper(plan), forget) == 0


def test_no_one_is_warned_whose_model_opens_autocast_by_itself() -> None:
    """As accelerate makes it."""
    model = make_mlp()
    forward = model.forward

    def forward_in_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(x).float()  # type: ignore[no-any-return]

    model.forward = forward_in_autocast  # type: ignore[method-assign]
    assert count_warnings(make_stepper("bf16-mixed", model), forget) == 0


def test_evaluation_outside_is_no_loss() -> None:
    stepper = make_stepper("bf16-mixed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepper.model.eval()
        forget(stepper)
        stepper.model.train()
        stepper.step(remember(stepper))


def test_a_loss_of_weights_that_the_plan_leaves_in_fp32_is_left_alone() -> None:
    def compute_loss(stepper: Stepper) -> Tensor:
        return stepper.model[0](torch.ones(4, 8)).square().mean()  # type: ignore[no-any-return,index]

    assert count_warnings(make_stepper("path=0 compute=fp32\ncompute=bf16"), compute_loss) == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_graph_that_hides_its_products_is_left_alone(reentrant: bool) -> None:
    def compute_loss(stepper: Stepper) -> Tensor:
        y = checkpoint(stepper.model, torch.ones(4, 8, requires_grad=True), use_reentrant=reentrant)
        return y.square().mean()  # type: ignore[no-any-return]

    assert count_warnings(make_stepper("bf16-mixed"), compute_loss) == (0 if reentrant else 1)


class Hidden(torch.autograd.Function):
    """A product in 16 bits that its graph does not show."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        return (x.bfloat16() @ weight.bfloat16().mT).float()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, torch.ones(16, 8)


def test_a_function_in_python_may_have_cast() -> None:
    head = torch.ones(16, 1, requires_grad=True)

    def compute_loss(stepper: Stepper) -> Tensor:
        with stepper.autocast():
            y = Hidden.apply(torch.ones(4, 8), stepper.model[0].weight)  # type: ignore[index]
            with torch.autocast("cpu", enabled=False):
                return (y @ head).mean()  # type: ignore[no-any-return]

    assert count_warnings(make_stepper("bf16-mixed"), compute_loss) == 0


def test_a_loss_without_products_is_left_alone() -> None:
    def compute_loss(stepper: Stepper) -> Tensor:
        return sum(p.square().sum() for p in stepper.model.parameters())  # type: ignore[return-value]

    assert count_warnings(make_stepper("bf16-mixed"), compute_loss) == 0


def test_convolutions_are_seen_too_and_gradients_that_are_released() -> None:
    stepper = make_stepper("bf16-mixed", make_cnn())
    with pytest.warns(PrecisionWarning):
        stepper.step(stepper.model(torch.ones(4, 3, 8, 8)).mean())
    stepper = make_stepper("bf16-mixed", release=True)
    with pytest.warns(PrecisionWarning):
        stepper.step(forget(stepper))
