"""Small models, data and tolerances that several test files share."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.mechanisms.master_weights import MasterWeights
from halfstep.numerics import kernels
from halfstep.numerics.formats import FORMATS
from halfstep.records import Capability, HardwareProfile

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {  # dtype -> (relative, absolute)
    torch.float32: (1.3e-6, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float16: (1e-3, 1e-5),
}
PRESET_NAMES = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")
SPLIT = "compute=bf16 storage=bf16 master=split"
FP32_MASTER = "compute=bf16 storage=bf16 master=fp32"
NO_MASTER = "compute=bf16 storage=bf16 master=none"

Status = Literal["native", "emulated", "slower", "unsupported"]

TINY_RECIPE = """
task = "text-generation"
precision = "bf16-mixed"
[train]
steps = 12
batch_size = 8
lr = 1e-2
evaluations = 2
[options]
data = {data!r}
layers = 1
width = 32
heads = 2
context = 16
held_out_sequences = 16
"""
"""Text generation in a second; {data} is a file or folder of text."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside the block; the stream outside goes on as if the block were not there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make_mlp(seed: int = 0) -> nn.Sequential:
    """8 numbers in, 3 out."""
    with seeded(seed):
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def make_cnn(seed: int = 0) -> nn.Sequential:
    """Convolutions and batch normalisation: images of 3 x 8 x 8 in, 3 numbers out."""
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 3),
        )


def make_regression_batches(
    count: int, *, batch_size: int = 16, inputs: int = 8, outputs: int = 3, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Batches of a smooth function of the inputs, the same for the same arguments."""
    with seeded(seed):
        weight = torch.randn(inputs, outputs) / inputs**0.5
        batches = []
        for _ in range(count):
            x = torch.randn(batch_size, inputs)
            batches.append((x, torch.sin(x @ weight)))
        return batches


def make_class_batches(count: int, *, batch_size: int = 32, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of 8 numbers in 3 classes that a small network tells apart."""
    with seeded(seed):
        centres = 2 * torch.randn(3, 8)
        batches = []
        for _ in range(count):
            y = torch.randint(3, (batch_size,))
            batches.append((centres[y] + 0.5 * torch.randn(batch_size, 8), y))
        return batches


def make_profile(bf16: Status = "native", fp16: Status = "slower") -> HardwareProfile:
    """A machine on which all formats but bf16 and fp16 are slower than fp32."""
    statuses: dict[str, Status] = {"fp32": "native", "bf16": bf16, "fp16": fp16}
    capabilities = tuple(
        Capability(format=name, status=status, ratio=ratio, ratio_best=ratio, why=f"{name} by hand")
        for name in FORMATS
        for status in [statuses.get(name, "slower")]
        for ratio in [1.0 if status == "native" else 0.5]
    )
    return HardwareProfile(
        device="cpu", machine="by hand", unit="none", torch_version=torch.__version__, threads=1, date="2026-01-01",
        capabilities=capabilities,
    )  # fmt: skip


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """A snapshot of the state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit equal, names included."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, *, scale: float = 1.0) -> None:
    """Equal within what `dtype` can resolve, times `scale` where errors add up over several steps."""
    relative, absolute = TOLERANCES[dtype]
    torch.testing.assert_close(actual, expected, rtol=scale * relative, atol=scale * absolute, check_dtype=False)


def words(values: Any) -> Tensor:
    """fp32 tensor of given 32-bit patterns."""
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.float32).copy())


def bits(weight: Tensor) -> Tensor:
    """The patterns of a tensor's numbers, as integers as wide as they are."""
    return weight.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[weight.element_size()])


def has_hooks(model: nn.Module) -> bool:
    """Whether any forward hook or pre-hook is registered in the model."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def narrow_all(masters: MasterWeights, params: list[nn.Parameter], kind: str) -> MasterWeights:
    """Parameters in bf16 behind masters of a kind; as they are for "none"."""
    for parameter in params if kind != "none" else []:
        masters.narrow(parameter, torch.bfloat16, kind)
    return masters


def train_in_two_ways(
    build: Callable[[list[nn.Parameter]], Optimizer],
    straight: list[nn.Parameter],
    broken: list[nn.Parameter],
    gradients: Iterable[list[Tensor]],
    is_ours: Callable[[int], bool],
) -> tuple[Optimizer, Optimizer]:
    """One optimizer stepped by MasterWeights all along; the other by MasterWeights where `is_ours` says so of the step and by
    plain torch elsewhere, and loaded from its own state after four steps. The same gradients for both."""
    one, other, masters = build(straight), build(broken), MasterWeights()
    for i, fresh in enumerate(gradients):
        masters.step(one, {p: g.clone() for p, g in zip(straight, fresh, strict=True)})
        if i == 4:
            resumed = build(broken)
            resumed.load_state_dict(copy.deepcopy(other.state_dict()))
            other = resumed
        if is_ours(i):
            masters.step(other, dict(zip(broken, fresh, strict=True)))
        else:
            for parameter, gradient in zip(broken, fresh, strict=True):
                parameter.grad = gradient
            other.step()
            other.zero_grad()
    return one, other


def require_refusal(
    compiled: kernels.Kernels, changes: Iterable[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Each change of a kernel's source, (text, what it becomes), must make it disagree with its truth when it is compiled."""
    monkeypatch.setattr(
        kernels, "FLAGS", ("-std=c11", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
    )
    monkeypatch.setattr(kernels, "TRIES", (("-march=native",),))
    assert compiled.find(folder).functions is not None
    text, name = compiled.source.read_text("utf-8"), compiled.source.name
    for before, after in changes:
        assert text.count(before) == 1
        (folder / name).write_text(text.replace(before, after), "utf-8")
        monkeypatch.setattr(compiled, "source", folder / name)
        library = compiled.find(folder)
        assert library.functions is None and "does not compute what" in library.why
