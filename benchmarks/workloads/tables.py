"""Networks for rows of a table.

dlrm           Naumov et al. 2019: 26 embedding tables, two MLPs, dot products between all pairs of vectors
dlrm-sparse    the same with sparse gradients of the tables: SparseAdam for them, AdamW for the MLPs
mlp            three hidden layers of 2048
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, SparseAdam

from workloads.synthetic import ClickLog, Prototypes
from workloads.template import Models, Workload, ask_fused

Clicks = tuple[Tensor, Tensor, Tensor]


def build_mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DlrmModel(nn.Module):
    """[batch, dense] and [batch, tables] -> [batch] logits."""

    def __init__(self, log: ClickLog, width: int, hidden: int, *, sparse: bool) -> None:
        super().__init__()
        tables = [nn.Embedding(log.rows, width, sparse=sparse) for _ in range(log.tables)]
        for table in tables:
            nn.init.normal_(table.weight, std=0.05)
        self.tables = nn.ModuleList(tables)
        pairs = (log.tables + 1) * log.tables // 2
        self.bottom = nn.Sequential(build_mlp((log.dense, hidden, hidden // 2, width)), nn.ReLU())
        self.top = build_mlp((pairs + width, hidden, hidden // 2, 1))
        self.pairs: Tensor
        self.register_buffer("pairs", torch.tril_indices(log.tables + 1, log.tables + 1, -1), persistent=False)

    def forward(self, features: Tensor, categories: Tensor) -> Tensor:
        dense = self.bottom(features)
        rows = [table(column) for table, column in zip(self.tables, categories.unbind(1), strict=True)]
        vectors = torch.stack([dense, *(row.to(dense.dtype) for row in rows)], 1)
        products = vectors @ vectors.transpose(1, 2)
        logits: Tensor = self.top(torch.cat([dense, products[:, self.pairs[0], self.pairs[1]]], 1))
        return logits.squeeze(1)


class Dlrm(Workload):
    name = "dlrm"
    about = "DLRM, 26 tables of 20,000 x 64 with dense gradients, batch 2048, AdamW"
    batch_size, rows, tables, dense, width, hidden = 2048, 20_000, 26, 13, 64, 512
    sparse = False

    def shrink(self) -> None:
        self.batch_size, self.rows, self.tables, self.width, self.hidden = 128, 50, 3, 8, 16

    def prepare_data(self) -> None:
        self.data = ClickLog(self.rows, self.tables, self.dense)

    def build_model(self) -> nn.Module:
        return DlrmModel(self.data, self.width, self.hidden, sparse=self.sparse)

    def build_optimizers(self, models: Models, *, fused: bool) -> dict[str, list[Optimizer]]:
        return {"model": [AdamW(models["model"].parameters(), lr=2e-3, **ask_fused(fused))]}

    def draw_batch(self, noise: torch.Generator) -> Clicks:
        return self.data.draw(self.batch_size, noise)

    def measure_loss(self, model: nn.Module, batch: Clicks) -> Tensor:
        features, categories, clicks = batch
        return F.binary_cross_entropy_with_logits(model(features, categories).float(), clicks)


class DlrmSparse(Dlrm):
    name = "dlrm-sparse"
    about = "DLRM, 26 tables of 20,000 x 64 with sparse gradients, batch 2048, SparseAdam and AdamW"
    sparse = True

    def build_optimizers(self, models: Models, *, fused: bool) -> dict[str, list[Optimizer]]:
        named = list(models["model"].named_parameters())
        tables = [p for name, p in named if "tables." in name]
        others = [p for name, p in named if "tables." not in name]
        return {"model": [SparseAdam(tables, lr=2e-3), AdamW(others, lr=2e-3, **ask_fused(fused))]}


class Mlp(Workload):
    name = "mlp"
    about = "MLP, 1024-2048-2048-2048-10, batch 1024, AdamW"
    batch_size, sizes = 1024, (1024, 2048, 2048, 2048, 10)

    def shrink(self) -> None:
        self.batch_size, self.sizes = 8, (16, 32, 32, 32, 10)

    def prepare_data(self) -> None:
        self.data = Prototypes((self.sizes[0],), self.sizes[-1], signal=2.5 / self.sizes[0] ** 0.5)

    def build_model(self) -> nn.Module:
        return build_mlp(self.sizes)

    def build_optimizers(self, models: Models, *, fused: bool) -> dict[str, list[Optimizer]]:
        return {"model": [AdamW(models["model"].parameters(), lr=2e-4, weight_decay=0.1, **ask_fused(fused))]}

    def draw_batch(self, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.data.draw(self.batch_size, noise)

    def measure_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])
