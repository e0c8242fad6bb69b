"""Scaled dot-product attention whose two products take scaled numbers.

    scores  = Q(q) Q(k)^T / sqrt(E)         a product, quantized along E
    weights = softmax(scores + mask)        in fp32
    out     = Q(dropout(weights)) Q(v)      a product, quantized along the keys

In both products the right operand, k and v, has the part of a layer's weight, so its gradient is that of grad_weight. The
matrix of weights is held whole, as in torch's unfused way: nothing here is a fused kernel.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.errors import UnsupportedError
from halfstep.numerics.multiplication import matmul
from halfstep.numerics.products import Products, ProductState


def scaled_dot_product_attention(  # noqa: PLR0913 - torch's arguments
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, products: Products,
    states: tuple[ProductState, ProductState] | None = None,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention`: [..., L, E], [..., S, E], [..., S, V] -> [..., L, V].

    states: of the products of scores and of values, where `products` need them.

    A query that may look at no key gets zeros, as in torch.

    Examples:
        >>> q = torch.eye(2)[None]
        >>> scaled_dot_product_attention(q, q, q, is_causal=True, products=Products.of("fp8_e4m3"))[0, 0].tolist()
        [1.0, 0.0]

    Raises UnsupportedError for a mask beside is_causal.
    """
    if is_causal and attn_mask is not None:
        raise UnsupportedError("attention takes attn_mask or is_causal, not both; put the causal part into the mask")
    first, second = states or (None, None)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    scores = matmul(query, key.mT, products=products, state=first)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        scaled = scores.to(wide) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scaled.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if attn_mask is None:
            weights = torch.softmax(scaled, dim=-1)
        elif attn_mask.dtype == torch.bool:
            weights = _softmax_masked(scaled.masked_fill(~attn_mask, -math.inf))
        else:
            weights = _softmax_masked(scaled + attn_mask)
        weights = F.dropout(weights, dropout_p) if dropout_p else weights
    return matmul(weights.to(scores.dtype), value, products=products, state=second)


def _softmax_masked(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; zeros where all scores are -inf, and no NaN in their gradient."""
    blind = (scores == -math.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
