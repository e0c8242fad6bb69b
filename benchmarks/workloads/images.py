"""Networks for images of 32x32 points.

resnet18    He et al. 2016 with the stem for CIFAR: one 3x3 convolution, no pooling
airbench    after Jordan 2024, "94% on CIFAR-10 in 3.29 seconds" (airbench94): a 2x2 convolution that whitens and is not
            trained, three groups of two convolutions with batch norm and GELU
dcgan       Radford et al. 2015 at 32x32: two networks, two optimizers, both steps in one training step
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from workloads.synthetic import Prototypes, make_hidden_noise
from workloads.template import Models, Trainer, Workload, ask_fused

Batch = tuple[Tensor, Tensor]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def build_resnet(widths: tuple[int, ...], blocks: int) -> nn.Sequential:
    """[batch, 3, 32, 32] -> [batch, 10]."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
    ]  # fmt: skip
    inputs = widths[0]
    for group, width in enumerate(widths):
        for block in range(blocks):
            layers.append(BasicBlock(inputs, width, 2 if group and not block else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class ResNet18(Workload):
    name = "resnet18"
    about = "ResNet-18 on 32x32 images, batch 64, SGD with momentum"
    batch_size, blocks = 64, 2
    widths: tuple[int, ...] = (64, 128, 256, 512)

    def shrink(self) -> None:
        self.batch_size, self.widths, self.blocks = 4, (8, 16), 1

    def prepare_data(self) -> None:
        self.data = Prototypes((3, 32, 32), signal=0.25)

    def build_model(self) -> nn.Module:
        return build_resnet(self.widths, self.blocks)

    def build_optimizers(self, models: Models, *, fused: bool) -> dict[str, list[Optimizer]]:
        parameters = models["model"].parameters()
        return {"model": [SGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4, **ask_fused(fused))]}

    def draw_batch(self, noise: torch.Generator) -> Batch:
        return self.data.draw(self.batch_size, noise)

    def measure_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


class ConvGroup(nn.Module):
    """conv, pool, norm, GELU, conv, norm, GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding="same", bias=False)
        self.norm1 = nn.BatchNorm2d(outputs, momentum=0.4)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding="same", bias=False)
        self.norm2 = nn.BatchNorm2d(outputs, momentum=0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class AirbenchNet(nn.Module):
    """[batch, 3, 32, 32] -> [batch, 10]."""

    def __init__(self, widths: tuple[int, ...], images: Tensor) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.groups = nn.Sequential(*(ConvGroup(a, b) for a, b in pairwise((24, *widths))))
        self.head = nn.Linear(widths[-1], 10, bias=False)
        self.whiten.weight.requires_grad_(False)
        patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.data = torch.cat([filters, -filters])

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(F.gelu(self.whiten(x)))
        logits: Tensor = self.head(F.max_pool2d(x, x.shape[-1]).flatten(1))
        return logits / 9


class Airbench(ResNet18):
    name = "airbench"
    about = "airbench94-like network on 32x32 images, batch 256, SGD with Nesterov momentum"
    batch_size, widths = 256, (64, 256, 256)

    def shrink(self) -> None:
        self.batch_size, self.widths = 4, (8, 16, 16)

    def build_model(self) -> nn.Module:
        return AirbenchNet(self.widths, self.data.draw(256, make_hidden_noise())[0])

    def build_optimizers(self, models: Models, *, fused: bool) -> dict[str, list[Optimizer]]:
        parameters = [p for p in models["model"].parameters() if p.requires_grad]
        return {"model": [SGD(parameters, lr=0.05, momentum=0.85, nesterov=True, **ask_fused(fused))]}

    def measure_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.2)


def build_generator(latent: int, width: int) -> nn.Sequential:
    """[batch, latent, 1, 1] -> [batch, 3, 32, 32]."""
    layers: list[nn.Module] = []
    sizes = [latent, 4 * width, 2 * width, width]
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        stride, padding = (2, 1) if number else (1, 0)
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False), nn.BatchNorm2d(outputs),
                   nn.ReLU(inplace=True)]  # fmt: skip
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())


def build_critic(width: int) -> nn.Sequential:
    """[batch, 3, 32, 32] -> [batch] logits."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for inputs in (width, 2 * width):
        layers += [nn.Conv2d(inputs, 2 * inputs, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * inputs),
                   nn.LeakyReLU(0.2, inplace=True)]  # fmt: skip
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4, 1, 0, bias=False), nn.Flatten(0))


class Dcgan(Workload):
    """The losses of the two networks do not fall, so what is judged is the distance between drawn and real images.

    That is the sliced Wasserstein distance (Rabin et al. 2011): both sets are projected on fixed random directions, and the
    sorted projections are subtracted.
    """

    name = "dcgan"
    about = "DCGAN for 32x32 images, batch 64, two networks, two Adams"
    batch_size, latent, width = 64, 100, 64
    held_out_batches = 8

    def shrink(self) -> None:
        self.batch_size, self.latent, self.width = 4, 8, 8

    def prepare_data(self) -> None:
        self.data = Prototypes((3, 32, 32), signal=0.5)
        self.directions = F.normalize(torch.randn(3 * 32 * 32, 128, generator=make_hidden_noise()), dim=0)

    def build_models(self) -> Models:
        torch.manual_seed(self.seed)
        models: Models = {
            "critic": build_critic(self.width),
            "generator": build_generator(self.latent, self.width),
        }
        for module in (m for model in models.values() for m in model.modules()):
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
        return models

    def build_optimizers(self, models: Models, *, fused: bool) -> dict[str, list[Optimizer]]:
        return {
            name: [Adam(model.parameters(), lr=2e-4, betas=(0.5, 0.999), **ask_fused(fused))]
            for name, model in models.items()
        }

    def draw_batch(self, noise: torch.Generator) -> Batch:
        images, _ = self.data.draw(self.batch_size, noise)
        return torch.tanh(0.5 * images + 0.5), torch.randn(self.batch_size, self.latent, 1, 1, generator=noise)

    def measure_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Binary cross-entropy of a critic: [batch] images or logits' inputs, and what they are said to be."""
        return F.binary_cross_entropy_with_logits(model(batch[0]).float(), batch[1])

    def take_step(self, trainers: dict[str, Trainer], batch: Any) -> Tensor:
        real, latents = batch
        critic, generator = trainers["critic"], trainers["generator"]
        ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
        with generator.autocast():
            fake = generator.model(latents)
        with critic.autocast():
            loss = self.measure_loss(critic.model, (real, ones))
            loss = loss + self.measure_loss(critic.model, (fake.detach().float(), zeros))
        critic.step(loss)
        with generator.autocast(), critic.autocast():
            lure = self.measure_loss(critic.model, (fake, ones))
        generator.step(lure)
        return (loss + lure).detach()

    def measure_held_out(self, trainers: dict[str, Trainer], batch: Batch) -> Tensor:
        real, latents = batch
        fake = trainers["generator"].model(latents).float()
        a, b = ((x.flatten(1) @ self.directions).sort(0).values for x in (real, fake))
        return (a - b).abs().mean()
