"""Language models.

gpt             pre-norm transformer, 6 x 512, 8 heads, vocabulary 8192, 8 x 256 tokens
nanogpt-char    nanoGPT's character model: 6 x 384, 6 heads, dropout 0.2 at three places, 12 x 256 bytes
nanogpt-tiny    nanoGPT's setting for a CPU: 4 x 128, 4 heads, 12 x 64 bytes
bert            encoder over padded sentences, 6 x 384, dropout 0.1, masked tokens, 16 x 128 tokens
lstm            two layers of 256, vocabulary 2000, 32 x 64 tokens
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from workloads.synthetic import MarkovText, SourceText
from workloads.template import Models, Workload, ask_fused

MASK, IGNORED = 0, -100


class Block(nn.Module):
    """Attention and a two-layer MLP, each on the normalised stream and added to it; dropout as in nanoGPT."""

    def __init__(self, width: int, heads: int, dropout: float, *, is_causal: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.is_causal = heads, dropout, is_causal
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop_attention, self.drop_mlp = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).split(width, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=self.is_causal
        )
        x = x + self.drop_attention(self.project(mixed.transpose(1, 2).reshape(batch, length, width)))
        stepped: Tensor = x + self.drop_mlp(self.down(F.gelu(self.up(self.mlp_norm(x)))))
        return stepped


class Transformer(nn.Module):
    """[batch, length] tokens, perhaps with a mask that may be added to [batch, heads, length, length] -> logits."""

    def __init__(
        self, vocabulary: int, layers: int, width: int, heads: int, context: int, *,
        dropout: float = 0.0, tied: bool = False, is_causal: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, is_causal=is_causal) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if tied:
            self.token.weight = self.head.weight

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.drop(self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device)))
        for block in self.blocks:
            x = block(x, mask)
        logits: Tensor = self.head(self.norm(x))
        return logits


def shift(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, length + 1] -> inputs and what comes next, each [batch, length]."""
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Gpt(Workload):
    name = "gpt"
    about = "GPT, 6 layers of 512, 8 heads, vocabulary 8192, 8 x 256 tokens, AdamW"
    batch_size, context, vocabulary = 8, 256, 8192
    layers, width, heads, dropout, tied, lr = 6, 512, 8, 0.0, False, 6e-4

    def shrink(self) -> None:
        self.batch_size, self.context, self.vocabulary = 2, 16, 64
        self.layers, self.width, self.heads = 1, 32, 2

    def prepare_data(self) -> None:
        self.data = MarkovText(self.vocabulary)

    def build_model(self) -> nn.Module:
        return Transformer(self.vocabulary, self.layers, self.width, self.heads, self.context,
                           dropout=self.dropout, tied=self.tied)  # fmt: skip

    def build_optimizers(self, models: Models, *, fused: bool) -> dict[str, list[Optimizer]]:
        return {"model": [AdamW(models["model"].parameters(), lr=self.lr, **ask_fused(fused))]}

    def draw_batch(self, noise: torch.Generator) -> tuple[Tensor, ...]:
        return shift(self.data.draw(self.batch_size, self.context + 1, noise))

    def measure_loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


class NanoGptChar(Gpt):
    name = "nanogpt-char"
    about = "nanoGPT on bytes, 6 layers of 384, 6 heads, dropout 0.2, 12 x 256 bytes, AdamW"
    batch_size, context, vocabulary = 12, 256, 256
    layers, width, heads, dropout, tied, lr = 6, 384, 6, 0.2, True, 1e-3

    def shrink(self) -> None:
        self.batch_size, self.context, self.layers, self.width, self.heads = 2, 16, 1, 32, 2

    def prepare_data(self) -> None:
        self.source = SourceText()

    def draw_batch(self, noise: torch.Generator) -> tuple[Tensor, ...]:
        return shift(self.source.draw(self.batch_size, self.context + 1, noise))

    def make_held_out(self, number: int) -> tuple[Tensor, Tensor]:
        noise = torch.Generator().manual_seed(self.seed * 10_000_019 + number)
        return shift(self.source.draw(self.batch_size, self.context + 1, noise, held_out=True))


class NanoGptTiny(NanoGptChar):
    name = "nanogpt-tiny"
    about = "nanoGPT on bytes in its setting for a CPU, 4 layers of 128, 4 heads, 12 x 64 bytes, AdamW"
    batch_size, context, held_out_batches = 12, 64, 16
    layers, width, heads, dropout = 4, 128, 4, 0.0


class Bert(Gpt):
    name = "bert"
    about = "BERT-like encoder, 6 layers of 384, dropout 0.1, padded sentences of at most 128 tokens, batch 16, AdamW"
    batch_size, context, width, heads, dropout = 16, 128, 384, 6, 0.1
    masked_share = 0.15

    def build_model(self) -> nn.Module:
        return Transformer(self.vocabulary, self.layers, self.width, self.heads, self.context,
                           dropout=self.dropout, is_causal=False)  # fmt: skip

    def draw_batch(self, noise: torch.Generator) -> tuple[Tensor, ...]:
        """Tokens with some masked, the mask of attention [batch, 1, 1, length], and what was under the masks."""
        tokens = self.data.draw(self.batch_size, self.context, noise)
        lengths = torch.randint(self.context // 2, self.context + 1, (self.batch_size, 1), generator=noise)
        is_there = torch.arange(self.context) < lengths
        is_masked = (torch.rand(tokens.shape, generator=noise) < self.masked_share) & is_there
        inputs = tokens.masked_fill(is_masked | ~is_there, MASK)
        return inputs, is_there[:, None, None, :], tokens.masked_fill(~is_masked, IGNORED)

    def measure_loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, mask, targets = batch
        return F.cross_entropy(model(inputs, mask).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


class LstmModel(nn.Module):
    """[batch, length] tokens -> [batch, length, vocabulary] logits."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.token(tokens))
        logits: Tensor = self.head(hidden)
        return logits


class Lstm(Gpt):
    name = "lstm"
    about = "LSTM language model, 2 layers of 256, vocabulary 2000, 32 x 64 tokens, AdamW"
    batch_size, context, vocabulary, layers, width, lr = 32, 64, 2000, 2, 256, 3e-3

    def build_model(self) -> nn.Module:
        return LstmModel(self.vocabulary, self.width, self.layers)
