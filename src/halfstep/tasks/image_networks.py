"""Networks for images: [batch, channels, height, width] -> [batch, classes].

cnn        a convolution, a pool, a linear layer: what tutorials start with
resnet9    nine layers after a whitening stem
airbench   six convolutions after a whitening stem: of these the one that learns most in a minute
resnet18   He et al. 2015
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build_cnn(channels: int, size: int, classes: int, _: int) -> nn.Module:
    """The convolution-pool-linear network that tutorials start with."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * ((size - 2) // 2) ** 2, classes),
    )


def _conv(inputs: int, outputs: int, stride: int = 1, *, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(outputs), nn.GELU())


class Residual(nn.Module):
    """after(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.after = body, shortcut, after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.body(x) + self.shortcut(x))
        return y


class PatchWhitening(nn.Conv2d):
    """A 2x2 convolution that makes the numbers of a patch uncorrelated and of unit variance; its filters are not trained.

    The filters are the eigenvectors of the patches' covariance, each over the root of its eigenvalue, and their negatives.
    Page 2019, "How to train your ResNet 8: bag of tricks"; Jordan 2024 (arXiv 2404.00498), section 3.2.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(channels, 8 * channels, 2, padding=int(size < 16))
        self.weight.requires_grad_(False)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def fit(self, images: Tensor, eps: float = 5e-4) -> None:
        """Take the filters from [count, channels, height, width] images."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4 * images.shape[1])
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + eps).sqrt()).T.reshape(-1, images.shape[1], 2, 2)
        self.weight.copy_(torch.cat([filters, -filters]))


class Scale(nn.Module):
    """A constant factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def build_resnet9(channels: int, size: int, classes: int, width: int) -> nn.Module:
    """Nine layers: a whitening stem, then three stages that convolve, pool at once and end in a residual block.

    Pooling right after the first convolution of a stage costs a third of what Page's ResNet-9 of the same width costs. The
    logits are scaled down, so that a large learning rate does not saturate the softmax.
    """

    def block(channels: int, layers: int) -> Residual:
        return Residual(
            nn.Sequential(*[_conv(channels, channels) for _ in range(layers)]), nn.Identity(), nn.Identity()
        )

    w = width
    return nn.Sequential(
        PatchWhitening(channels, size),
        nn.GELU(),
        *(_conv(8 * channels, w, pool=True), block(w, 1)),
        *(_conv(w, 4 * w, pool=True), block(4 * w, 1)),
        *(_conv(4 * w, 4 * w, pool=True), block(4 * w, 2)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * w, classes, bias=False),
        Scale(1 / 8),
    )


class ShiftNorm(nn.BatchNorm2d):
    """Batch norm that has no factor, and a shift that learns 64 times as fast as other weights.

    The shift is 8 times a parameter: under SGD that makes its steps 64 times as long. Jordan 2024, section 3.4, does it by a
    learning rate of its own. Statistics follow the last few batches, for a short training.
    """

    SPEED = 64.0

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.4)
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        shift = self.bias * self.SPEED**0.5
        share = self.momentum or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, shift, self.training, share, self.eps)


def build_airbench(channels: int, size: int, classes: int, width: int) -> nn.Module:
    """Jordan 2024 (arXiv 2404.00498), airbench94: three stages of two convolutions, the first of each followed by a pool.

    New convolutions begin as the identity on as many channels as they have inputs (section 3.3).
    """

    def convolve(inputs: int, outputs: int, *, pool: bool) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        nn.init.dirac_(layer.weight[:inputs])
        return [layer, *([nn.MaxPool2d(2)] if pool else []), ShiftNorm(outputs), nn.GELU()]

    w = width
    layers: list[nn.Module] = [PatchWhitening(channels, size), nn.GELU()]
    for inputs, outputs in pairwise((8 * channels, w, 4 * w, 4 * w)):
        layers += [*convolve(inputs, outputs, pool=True), *convolve(outputs, outputs, pool=False)]
    return nn.Sequential(
        *layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4 * w, classes, bias=False), Scale(1 / 9)
    )


def build_resnet18(channels: int, _size: int, classes: int, width: int) -> nn.Module:
    """He et al. 2015, with the 3x3 stem that 32x32 images ask for (section 4.2)."""

    def block(inputs: int, outputs: int, stride: int) -> Residual:
        body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        cut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return Residual(body, nn.Identity() if same else cut, nn.ReLU())

    w = width
    stages = [block(w, w, 1), block(w, w, 1)]
    for narrow in (w, 2 * w, 4 * w):
        stages += [block(narrow, 2 * narrow, 2), block(2 * narrow, 2 * narrow, 1)]
    stem = nn.Sequential(nn.Conv2d(channels, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU())
    return nn.Sequential(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * w, classes))


MODELS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "cnn": build_cnn, "resnet9": build_resnet9, "airbench": build_airbench, "resnet18": build_resnet18,
}  # fmt: skip
