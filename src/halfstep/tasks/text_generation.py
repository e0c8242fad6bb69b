"""Text generation: a small decoder-only transformer that predicts the next byte.

data    bytes of a file, a folder of text, or by default the source of the running interpreter's standard library;
        split by file into train and held-out (a single file: its last tenth)
model   pre-norm transformer: embeddings, blocks of attention and MLP, norm, output layer
loss    cross-entropy of the next byte
metric  bits per byte on held-out text, lower is better
"""

import hashlib
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfstep.errors import DataError, RecipeError
from halfstep.training import Count, Metric, Positive, TrainSettings

VOCABULARY = 256
HELD_OUT = 10  # one file in ten
FAR = 3.0  # times more or less than that: the text is cut by position, not by file


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the recipe's [options] table holds."""

    data: str = ""  # a text file or a folder; "" is the standard library's source
    layers: Count = 4
    width: Count = 256
    heads: Count = 4
    context: Count = 128  # bytes
    held_out_sequences: Count = 128  # how much held-out text the metric is taken on
    margin: Positive = 0.03  # bits per byte


class Block(nn.Module):
    """Attention, then a two-layer MLP, each on the normalised stream and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        stepped: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return stepped


class Transformer(nn.Module):
    """[batch, length] bytes -> [batch, length, 256] logits."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:  # GPT-2, section 2.3: branches that add up are scaled down by their number
            for branch in (block.get_submodule("project"), block.get_submodule("down")):
                nn.init.normal_(branch.get_parameter("weight"), std=0.02 / math.sqrt(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        stream = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream))
        return logits


def find_corpus() -> list[Path]:
    """The .py files of the running interpreter's standard library, tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    return [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]


def _is_held_out(name: str) -> bool:
    """By a hash of the file's name, so that adding a file moves no other."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0


def read_corpus(data: str) -> tuple[Tensor, Tensor]:
    """(train, held-out) as one-dimensional uint8 tensors. Raises DataError for what cannot be read or is too short."""
    root = Path(data) if data else Path(sysconfig.get_paths()["stdlib"])
    if not root.exists():
        raise DataError(f"there is no text at '{data}'; give a file or a folder of text as data")
    files = (
        find_corpus() if not data else sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    )
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    texts = []
    for path in files:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"'{path}' cannot be read: {error.strerror}") from None
        if b"\0" in text[:4096]:
            raise DataError(f"'{path}' is not text (it holds zero bytes); give plain text files")
        parts[_is_held_out(path.relative_to(root).as_posix())].append(text)
        texts.append(text)
    train, held_out = (b"\n".join(part) for part in parts)
    share = HELD_OUT * len(held_out) / max(1, len(train) + len(held_out))  # of what is to be held out
    if not 1 / FAR <= share <= FAR:  # too few files to split by name, or one that is nearly all of the text
        whole = b"\n".join(texts)
        cut = len(whole) - len(whole) // HELD_OUT
        train, held_out = whole[:cut], whole[cut:]
    if not train or not held_out:
        raise DataError(
            f"'{data}' gives {len(train)} bytes to train on and {len(held_out)} held out; both are needed: give more text"
        )
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, held_out))  # type: ignore[return-value]


class TextGeneration:
    """The task; see the head of this module."""

    def __init__(self, options: Options, settings: TrainSettings, device: str = "cpu") -> None:
        if options.width % options.heads:
            raise RecipeError(f"width must be a multiple of heads; got width={options.width}, heads={options.heads}")
        self.options, self.settings, self.device = options, settings, device
        self.metric = Metric(name="bits per byte", unit="bit", higher_is_better=False, margin=options.margin)
        self.train, self.held_out = read_corpus(options.data)
        shortest = min(len(self.train), len(self.held_out))
        if shortest <= options.context + 1:
            raise DataError(
                f"the text is too short: {shortest} bytes for a context of {options.context}; give more text"
            )

    def build_model(self) -> nn.Module:
        torch.manual_seed(self.settings.seed)
        o = self.options
        return Transformer(o.layers, o.width, o.heads, o.context).to(self.device)

    def make_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and next bytes, each [batch, context], at random places that depend on seed and step alone."""
        noise = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - self.options.context, (self.settings.batch_size,), generator=noise)
        return self._cut(self.train, starts)

    def _cut(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        windows = text[starts[:, None] + torch.arange(self.options.context + 1)].to(self.device, torch.int64)
        return windows[:, :-1], windows[:, 1:]

    def measure_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    def evaluate(self, model: nn.Module) -> float:
        count = self.options.held_out_sequences
        starts = torch.arange(count) * (len(self.held_out) - self.options.context - 1) // max(1, count - 1)
        pieces = starts.split(self.settings.batch_size)
        total = sum(len(p) * float(self.measure_loss(model, self._cut(self.held_out, p))) for p in pieces)
        return total / count / math.log(2)
