"""halfstep.GradScaler where frameworks keep theirs. Each test skips where its framework is missing (`--group frameworks`)."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from halfstep import GradScaler
from helpers import copy_weights, make_mlp, make_regression_batches, seeded

pytestmark = pytest.mark.filterwarnings("ignore")  # frameworks warn of their own and each other's matters
BAD, STEPS = 3, 8


def make_scaler() -> GradScaler:
    return GradScaler("cpu", 2.0**10, growth_interval=1000)


def make_batches() -> list[tuple[Tensor, Tensor]]:
    """One of them overflows."""
    batches = make_regression_batches(STEPS)
    x, y = batches[BAD]
    batches[BAD] = x, y * 1e38
    return batches


def train_plainly(batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What each of them has to come to: the weights of a loop in fp32 that never saw the bad batch."""
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches[:BAD] + batches[BAD + 1 :]:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return copy_weights(model)


def assert_close(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


def test_accelerate_takes_the_scaler_and_sees_the_skip() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = scaler = make_scaler()
    model = make_mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    skipped = []
    for x, y in make_batches():
        optimizer.zero_grad()
        accelerator.backward(F.mse_loss(model(x), y))
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
    assert [i for i, was in enumerate(skipped) if was] == [BAD]
    assert scaler.get_scale() == 2.0**9
    assert scaler.get_outcome().applied
    assert_close(copy_weights(accelerator.unwrap_model(model)), train_plainly(make_batches()))


def test_lightning_takes_the_scaler_and_steps_through_its_closure(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.plugins import MixedPrecision

    class Module(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_mlp()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            x, y = batch
            with torch.autocast("cpu", enabled=False):
                return F.mse_loss(self.inner(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    scaler, module = make_scaler(), Module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(make_batches(), batch_size=None))  # type: ignore[arg-type]
    assert scaler.get_scale() == 2.0**9
    assert scaler.get_outcome().step == STEPS - 1
    assert_close(copy_weights(module.inner), train_plainly(make_batches()))


def test_transformers_trainer_takes_the_scaler(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    with seeded(0):
        model = transformers.GPT2LMHeadModel(config)
        ids = torch.randint(32, (4 * STEPS, 8))
    spoiled: list[int] = []

    class Trainer(transformers.Trainer):  # type: ignore[name-defined]
        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(*arguments, **options)
            spoiled.append(len(spoiled))
            return loss * math.inf if spoiled[-1] == BAD else loss

    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.accelerator.scaler = scaler = make_scaler()
    before = copy_weights(model)
    trainer.train()
    assert len(spoiled) == STEPS
    assert scaler.get_scale() == 2.0**9
    assert scaler.get_outcome().step == STEPS - 1
    weights = copy_weights(model)
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    assert any(not torch.equal(weights[name], before[name]) for name in weights)
