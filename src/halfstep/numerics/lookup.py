"""Embeddings whose vectors are rounded to a scaled format.

A lookup multiplies nothing; what a narrow format does to it is that each vector comes out as the format's numbers. Only the
vectors that a batch looks at are rounded. The gradient passes straight through to the weights, also a sparse one.

The operand is that of a weight: `products.output.right`. Its rows are the vectors, so "row" is a scale a vector; "tensor" takes
the amax of the whole table.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.errors import UnsupportedError
from halfstep.numerics.amax import find_amax
from halfstep.numerics.casting import quantize
from halfstep.numerics.products import Operand, Products, ProductState, quantize_operand


class _Round(torch.autograd.Function):
    """The numbers of a format nearest to x [rows, numbers]; the identity for the gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, operand: Operand, amax: Tensor | None) -> Tensor:
        if not operand.is_scaled:
            return quantize_operand(x, operand, -1).to(x.dtype)  # type: ignore[union-attr]
        return quantize(x, operand.format, operand.scaling, dim=-1, amax=amax).dequantize(x.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def _round_vectors(vectors: Tensor, weight: Tensor, products: Products, state: ProductState | None) -> Tensor:
    operand = products.output.right
    if operand.scaling.kind == "block" and operand.scaling.rows > 1:
        raise UnsupportedError(
            f"embeddings take a scale a tensor, row or block of one row; got {operand.scaling}, whose blocks span vectors"
        )
    amax = None
    if operand.is_scaled and operand.scaling.kind == "delayed" and state is not None:
        amax = state.histories["right"].follow(weight, join=state.is_training)
    elif operand.is_scaled and operand.scaling.kind in ("tensor", "delayed"):
        amax = find_amax(weight, state.reduce if state else None)
    flat = vectors.reshape(-1, vectors.shape[-1])
    rounded: Tensor = _Round.apply(flat, operand, amax)
    return rounded.reshape(vectors.shape)


def embedding(  # noqa: PLR0913 - torch's arguments
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False, *, products: Products, state: ProductState | None = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.embedding`: numbers [...] and a table [V, D] -> vectors [..., D], rounded.

    Examples:
        >>> embedding(torch.tensor([1]), torch.tensor([[0.0, 9.0], [1.0, 17.0]]), products=Products.of("fp8_e4m3")).tolist()
        [[1.0, 16.0]]

    Raises UnsupportedError for blocks that span vectors, here and in embedding_bag.
    """
    vectors = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return _round_vectors(vectors, weight, products, state)


def embedding_bag(  # noqa: PLR0913 - torch's arguments
    input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False, padding_idx: int | None = None, *, products: Products,
    state: ProductState | None = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.embedding_bag` of rounded vectors: sums, means or maxima of bags -> [bags, D].

    Examples:
        >>> table = torch.tensor([[0.0, 9.0], [1.0, 17.0]])
        >>> bags = embedding_bag(torch.tensor([[0, 1]]), table, mode="sum", products=Products.of("fp8_e4m3"))
        >>> bags.tolist()
        [[1.0, 25.0]]
    """
    numbers, places = torch.unique(input, return_inverse=True)
    vectors = F.embedding(numbers, weight, None, max_norm, norm_type, sparse=sparse)
    rounded = _round_vectors(vectors, weight, products, state)
    skipped = None
    if padding_idx is not None:
        found = (numbers == padding_idx % weight.shape[0]).nonzero()
        skipped = int(found) if found.numel() else None
    return F.embedding_bag(
        places, rounded, offsets, None, norm_type, scale_grad_by_freq, mode, False, per_sample_weights,
        include_last_offset, skipped,
    )  # fmt: skip
