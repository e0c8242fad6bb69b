"""Data made by a fixed hidden model, so that a loss falls within a few steps and nothing has to be downloaded.

    MarkovText     tokens of a random Markov chain: every token has four successors, drawn by Zipf's law, so that frequencies are
                   learned in a few steps and successors in many
    Prototypes     samples of classes: a fixed pattern for each, and noise
    SourceText     bytes of Python source
    ClickLog       clicks of a hidden logistic model over dense features and categories, which follow a power law

The hidden model is drawn from a seed of its own: rounds differ in weights and batches, never in what there is to learn.
"""

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from halfstep.tasks.text_generation import read_corpus

HIDDEN_SEED = 20_240_229


def make_hidden_noise() -> torch.Generator:
    return torch.Generator().manual_seed(HIDDEN_SEED)


class MarkovText:
    """Token sequences, each [batch, length] int64."""

    SHARES = torch.tensor([0.5, 0.25, 0.15, 0.1])  # of the four successors

    def __init__(self, vocabulary: int) -> None:
        noise = make_hidden_noise()
        zipf = 1.0 / torch.arange(1.0, vocabulary + 1)
        self.frequencies = zipf[torch.randperm(vocabulary, generator=noise)]
        drawn = torch.multinomial(self.frequencies, vocabulary * len(self.SHARES), replacement=True, generator=noise)
        self.successors = drawn.view(vocabulary, len(self.SHARES))

    def draw(self, batch: int, length: int, noise: torch.Generator) -> Tensor:
        choices = torch.multinomial(self.SHARES, batch * length, replacement=True, generator=noise).view(length, batch)
        token = torch.multinomial(self.frequencies, batch, replacement=True, generator=noise)
        tokens = []
        for choice in choices:
            token = self.successors[token, choice]
            tokens.append(token)
        return torch.stack(tokens, 1)


class SourceText:
    """Bytes of a module of the running interpreter's standard library, cut at random places; its last tenth is held out."""

    def __init__(self, module: str = "_pydecimal.py") -> None:
        self.train, self.held_out = read_corpus(str(Path(sysconfig.get_paths()["stdlib"]) / module))

    def draw(self, batch: int, length: int, noise: torch.Generator, *, held_out: bool = False) -> Tensor:
        text = self.held_out if held_out else self.train
        starts = torch.randint(len(text) - length, (batch,), generator=noise)
        return text[starts[:, None] + torch.arange(length)].long()


class Prototypes:
    """(samples, classes): [batch, *shape] and [batch]."""

    def __init__(self, shape: tuple[int, ...], classes: int = 10, *, signal: float = 1.0) -> None:
        noise = make_hidden_noise()
        self.signal = signal
        if len(shape) == 3:  # images are smooth
            coarse = torch.randn(classes, shape[0], 4, 4, generator=noise)
            self.patterns = F.interpolate(coarse, size=shape[1:], mode="bilinear", align_corners=False)
        else:
            self.patterns = torch.randn(classes, *shape, generator=noise)

    def draw(self, batch: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        classes = torch.randint(len(self.patterns), (batch,), generator=noise)
        clean = self.signal * self.patterns[classes]
        return clean + torch.randn(clean.shape, generator=noise), classes


class ClickLog:
    """(dense features, categories, clicks): [batch, dense], [batch, tables] int64, [batch]."""

    def __init__(self, rows: int, tables: int, dense: int) -> None:
        noise = make_hidden_noise()
        self.rows, self.tables, self.dense = rows, tables, dense
        self.weights = torch.randn(dense, generator=noise)
        self.effects = torch.randn(tables, rows, generator=noise) / tables**0.5

    def draw(self, batch: int, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        features = torch.randn(batch, self.dense, generator=noise)
        places = torch.rand(batch, self.tables, generator=noise) ** 4  # few rows are frequent
        categories = (places * self.rows).long()
        effects = self.effects[torch.arange(self.tables), categories].sum(1)
        chance = torch.sigmoid(features @ self.weights + 2 * effects)
        return features, categories, torch.bernoulli(chance, generator=noise)
