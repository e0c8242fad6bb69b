"""Networks for images: shapes, sizes, what their stems and norms compute."""

import pytest
import torch
from torch import nn

from halfstep.tasks.image_networks import MODELS, PatchWhitening, ShiftNorm
from helpers import seeded


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(("channels", "size", "classes"), [(3, 32, 10), (1, 28, 7)])
def test_give_a_logit_for_each_class(name: str, channels: int, size: int, classes: int) -> None:
    model = MODELS[name](channels, size, classes, 4).eval()
    with torch.no_grad():
        assert model(torch.randn(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cnn", 72_906), ("resnet9", 2_563_128), ("airbench", 1_972_792), ("resnet18", 11_173_962)],
)
def test_have_the_known_number_of_parameters_on_cifar(name: str, expected: int) -> None:
    with torch.device("meta"):
        model = MODELS[name](3, 32, 10, 64)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_whitening_makes_patches_uncorrelated_and_of_unit_variance() -> None:
    with seeded(0):
        images = torch.randn(50, 3, 12, 12).cumsum(3) @ torch.randn(12, 12)
        stem = PatchWhitening(3, 32)
    stem.fit(images)
    with torch.no_grad():
        y = stem(images)[:, :12].permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(y @ y.T / y.shape[1], torch.eye(12), rtol=0, atol=2e-2)
    assert not stem.weight.requires_grad


def test_resnet18_halves_the_image_three_times() -> None:
    model = MODELS["resnet18"](3, 32, 10, 4).eval()
    assert isinstance(model, nn.Sequential)
    with torch.no_grad():
        features = model[:9](torch.randn(1, 3, 32, 32))  # the stem and eight blocks
    assert features.shape == (1, 32, 4, 4)


def test_airbench_begins_as_the_identity_on_the_channels_it_has() -> None:
    model = MODELS["airbench"](3, 32, 10, 64)
    assert isinstance(model, nn.Sequential)
    x = torch.randn(2, 24, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(model[2](x)[:, :24], x)


def test_shift_norm_is_batch_norm_whose_shift_learns_64_times_as_fast() -> None:
    ours, theirs, x = ShiftNorm(3), nn.BatchNorm2d(3, momentum=0.4), torch.randn(5, 3, 4, 4)
    for norm, lr in ((ours, 1.0), (theirs, 64.0)):
        (norm(x) * torch.linspace(-1, 1, 4)[None, :3, None, None]).sum().backward()
        torch.optim.SGD([norm.bias], lr).step()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert ours.weight.grad is None
    assert int(ours.num_batches_tracked or 0) == int(theirs.num_batches_tracked or 0) == 2
