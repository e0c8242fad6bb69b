"""Attention on the processor as two batched products with one pass between them, where that is faster than torch's function.

    scores  = q k^T                                          a product; rounded to the inputs' dtype
    weights = softmax(scale * scores + mask)                 one pass in fp32, in place, written in the inputs' dtype
    out     = (weights * factor) v                           a product; factor: 0 with probability p, else 1 / (1 - p)

    grad_v  = (weights * factor)^T grad_out
    g       = factor * (grad_out v^T)                        one pass over both:
    grad_s  = scale * weights * (g - sum_keys weights * g)   the rows' sum is that of grad_out * out
    grad_q  = grad_s k;   grad_k = grad_s^T q

As in torch, a query that may see no key gets zeros; causal counts from the first key, also where queries and keys are
unequally many; dropout comes after the softmax. The factors are those of `dropouts`: two keys, drawn from
torch's generator once a call, and noise computed again in the backward pass. What is kept is the inputs and the weights, in fewer
bits where activations are saved so.

torch's fused kernel keeps no weights and wins for long sequences; for short ones two large products beat it, and with dropout it
leaves its fast path. So with dropout this way is taken always; without it both are timed, once for every shape and with the
tensors of the first call, and ROUTES remembers which was faster. Results of the two ways differ by rounding: put back ROUTES
of a run (`ROUTES.update`) to repeat it bit for bit, or let none be timed, by torch.use_deterministic_algorithms(True).

There are no second derivatives, as in torch's fused kernel.

Sources: Vaswani et al. 2017 (arXiv 1706.03762); Dao et al. 2022, "FlashAttention" (arXiv 2205.14135), appendix B.2: the backward
pass; Milakov and Gimelshein 2018 (arXiv 1805.02867): a softmax in few reads.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.errors import UnsupportedError
from halfstep.numerics.dropouts import LEVELS, Drop, draw_keys
from halfstep.numerics.kernels import COUNT, FLOAT, INT, PLAIN, POINTER, WORD, Kernels, find_obstacle, hold_constant
from halfstep.numerics.noise import draw_noise
from halfstep.numerics.packing import mark_activations
from halfstep.numerics.routes import measure_route

DTYPES = (torch.float32, torch.bfloat16)
KINDS = {None: 0, torch.bool: 1, torch.float32: 2, torch.bfloat16: 3}  # of masks, as in scaled_attention.c
MOST_KEYS = 16384
MOST_BYTES = 1 << 30  # of weights that are kept where torch would keep none

Route = Literal["kernel", "torch"]


@dataclass(frozen=True)
class Shape:
    """What the time of one call depends on.

    Examples:
        >>> Shape(64, 256, 256, 64, 64, "bfloat16", True, "", 2).batches
        64
    """

    batches: int
    queries: int
    keys: int
    features: int
    value_features: int
    dtype: str
    causal: bool
    mask: str
    threads: int


ROUTES: dict[Shape, Route] = {}


@dataclass(frozen=True)
class Rule:
    """How scores become weights."""

    scale: float
    causal: bool
    drop: Drop | None


def attend_slowly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """[..., L, E], [..., S, E], [..., S, V] -> [..., L, V]: the readable truth, in any dtype.

    Examples:
        >>> q = torch.eye(2)[None]
        >>> attend_slowly(q, q, q, None, Rule(1.0, True, None))[0, 0].tolist()
        [1.0, 0.0]
    """
    scores = query @ key.mT
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)) * rule.scale
    if rule.causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        wide = wide.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else wide + mask
    blind = (wide == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(wide.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0).to(scores.dtype)
    if rule.drop is not None:
        weights = (weights.to(wide.dtype) * _make_factors(rule.drop, weights)).to(scores.dtype)
    return weights @ value


def _make_factors(drop: Drop, weights: Tensor) -> Tensor:
    """Rows start at even numbers of the noise, so that a kernel may draw them one by one."""
    keys, even = weights.shape[-1], weights.shape[-1] + weights.shape[-1] % 2
    count = weights.numel() // keys * even
    noise = draw_noise(drop.keys, 0, count, weights.device).view(*weights.shape[:-1], even)[..., :keys]
    return torch.full_like(noise, drop.scale, dtype=torch.float32).masked_fill_(noise < drop.threshold, 0.0)


def explain_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, enable_gqa: bool = False,
) -> str:  # fmt: skip
    """Why `scaled_dot_product_attention` leaves such calls to torch's own function; "" where it does not, or times both.

    Examples:
        >>> q = torch.ones(2, 8, 4)
        >>> explain_attention(q, q, q)
        'no gradient and no dropout'
    """
    obstacle = find_obstacle(query, key, value, dtypes=DTYPES) or _find_fault(query, key, value)
    if obstacle:
        return obstacle
    if not _may_choose():
        return "another way was asked for"
    if enable_gqa or (is_causal and attn_mask is not None):
        return "grouped queries" if enable_gqa else "a mask beside is_causal"
    if attn_mask is not None and (fault := _find_fault_of_mask(attn_mask, query, key)):
        return fault
    if dropout_p and not (isinstance(dropout_p, float) and 0.5 <= dropout_p * LEVELS < LEVELS - 0.5):
        return f"dropout_p = {dropout_p}"
    if not dropout_p and not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))):
        return "no gradient and no dropout"
    weights_bytes = query[..., 0].numel() * key.shape[-2] * query.dtype.itemsize
    if not dropout_p and weights_bytes > MOST_BYTES:
        return f"{weights_bytes >> 20} MiB of weights"
    return "" if KERNELS.library.functions is not None else KERNELS.describe()


@hold_constant
def _may_choose() -> bool:
    """As torch.nn.attention.sdpa_kernel sets it, on a processor too."""
    return bool(torch.backends.cuda.flash_sdp_enabled())


def _find_fault(query: Tensor, key: Tensor, value: Tensor) -> str:
    shapes = [tuple(t.shape) for t in (query, key, value)]
    if min(map(len, shapes)) < 2:
        return f"shapes {shapes}"
    (*batch, _, features), (*key_batch, keys, key_features), (*value_batch, values, _) = shapes
    if not batch == key_batch == value_batch or len(batch) not in (1, 2) or features != key_features or keys != values:
        return f"shapes {shapes}"
    if other := next((t.dtype for t in (key, value) if t.dtype != query.dtype), None):
        return f"dtype {other} beside {query.dtype}".replace("torch.", "")
    if not all(t.numel() for t in (query, key, value)) or keys > MOST_KEYS:
        return f"shapes {shapes}"
    return ""


def _find_fault_of_mask(mask: Tensor, query: Tensor, key: Tensor) -> str:
    obstacle = find_obstacle(mask, dtypes=[torch.bool, *DTYPES])
    if obstacle or mask.requires_grad:
        return f"mask: {obstacle or 'needs a gradient'}"
    full = (*query.shape[:-1], key.shape[-2])
    fits = mask.ndim <= len(full) and all(
        m in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    return "" if fits else f"mask of shape {tuple(mask.shape)}"


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention`: [..., L, E], [..., S, E], [..., S, V] -> [..., L, V].

    Args:
        query, key, value: one or two batch dimensions, the same in all three; fp32 or bf16 on the processor. Under autocast
            they are cast to its dtype. Others are left to torch.
        attn_mask: bool (True: may be seen) or added to the scores; broadcast to [..., L, S]. One that needs a gradient is
            left to torch.
        dropout_p: share of the weights that is dropped, rounded to a multiple of 2^-16.
        is_causal: query i sees keys 0 ... i.
        scale: 1 / sqrt(E) unless given.
        enable_gqa: left to torch.

    Examples:
        >>> q = torch.eye(2)[None].requires_grad_()
        >>> scaled_dot_product_attention(q, q, q, is_causal=True)[0, 0].tolist()
        [1.0, 0.0]

    Raises UnsupportedError where a second derivative is asked for.
    """
    if torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value = (cast(t) for t in (query, key, value))
    if explain_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    drop = Drop(dropout_p, draw_keys()) if dropout_p else None
    rule = Rule(1 / math.sqrt(query.shape[-1]) if scale is None else scale, is_causal, drop)
    if drop is None and find_route(query, key, value, attn_mask, rule) == "torch":
        return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale)
    result: Tensor = _Attention.apply(query, key, value, attn_mask, rule)
    return result


def cast(tensor: Tensor) -> Tensor:
    """As torch.autocast does, for which attention is one of the functions in 16 bits.

    Examples:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     cast(torch.ones(1)).dtype
        torch.bfloat16
    """
    if isinstance(tensor, Tensor) and tensor.is_cpu and tensor.is_floating_point() and torch.is_autocast_enabled("cpu"):
        return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype("cpu"))
    return tensor


def describe_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Shape:
    """The key of ROUTES.

    Examples:
        >>> q = torch.ones(2, 8, 4)
        >>> describe_shape(q, q, q, None, True).queries
        8
    """
    batches, (queries, features), (keys, values) = math.prod(query.shape[:-2]), query.shape[-2:], value.shape[-2:]
    kind = "" if mask is None else f"{str(mask.dtype).removeprefix('torch.')}{[n > 1 for n in mask.shape]}"
    dtype = str(query.dtype).removeprefix("torch.")
    return Shape(batches, queries, keys, features, values, dtype, causal, kind, torch.get_num_threads())


def find_route(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> Route:
    """Which way was faster forward and backward when this shape was first seen; torch's, untimed, where deterministic
    algorithms are asked for.

    Examples:
        >>> q = torch.ones(2, 8, 4)
        >>> KERNELS.library.functions is None or find_route(q, q, q, None, Rule(0.5, True, None)) in ("kernel", "torch")
        True
    """
    shape = describe_shape(query, key, value, mask, rule.causal)
    if shape not in ROUTES and torch.are_deterministic_algorithms_enabled():
        return "torch"
    if shape not in ROUTES:
        q, k, v = (t.detach().requires_grad_() for t in (query, key, value))

        def go(way: Callable[[], Tensor]) -> None:
            out = way()
            torch.autograd.grad(out, (q, k, v), out.detach())

        ways: dict[Route, Callable[[], None]] = {
            "kernel": lambda: go(lambda: _Attention.apply(q, k, v, mask, rule)),
            "torch": lambda: go(
                lambda: F.scaled_dot_product_attention(q, k, v, mask, 0.0, rule.causal, scale=rule.scale)
            ),
        }
        seconds = measure_route(ways)
        ROUTES[shape] = min(ways, key=lambda way: seconds[way])
    return ROUTES[shape]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
        q, k, v = (t.contiguous() for t in (query, key, value))
        out, weights = attend(q, k, v, mask, rule)
        mark_activations(q, k, v, weights)
        ctx.save_for_backward(q, k, v, weights)
        ctx.rule = rule
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        is_plain = type(gradient) in PLAIN and gradient.dtype in DTYPES
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or not is_plain:
            raise UnsupportedError(
                "attention by kernel has no second derivatives and takes one gradient at a time; got create_graph=True or "
                "is_grads_batched=True; run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or give the "
                "plan functions=torch"
            )
        q, k, v, weights = ctx.saved_tensors
        return *attend_backward(gradient, q, k, v, weights, ctx.rule), None, None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """By kernel, without a graph: [..., L, E], [..., S, E], [..., S, V] -> out [..., L, V] and the weights [b, L, S] before
    dropout, for `attend_backward`.

    Examples:
        >>> q = torch.eye(2)[None]
        >>> KERNELS.library.functions is None or attend(q, q, q, None, Rule(1.0, True, None))[1][0, 0].tolist() == [1.0, 0.0]
        True
    """
    q, k, v = (_flatten(t) for t in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        weights = torch.bmm(q, k.mT)
        dropped = _weigh_keys(_take_functions(), weights, mask, rule, query.shape[:-2])
        out = torch.bmm(dropped, v)
    return out.view(*query.shape[:-1], value.shape[-1]), weights


def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, in their shapes.

    Examples:
        >>> q, rule = torch.eye(2)[None], Rule(1.0, True, None)
        >>> KERNELS.library.functions is None or attend_backward(q, q, q, q, q.clone(), rule)[0].shape == q.shape
        True
    """
    q, k, v, g = (_flatten(t) for t in (query, key, value, gradient))
    with torch.autocast("cpu", enabled=False):
        scores = torch.bmm(g, v.mT)
        dropped = _weigh_gradients(_take_functions(), weights, scores, rule)
        found = torch.bmm(scores, k), torch.bmm(scores.mT, q), torch.bmm(dropped.mT, g)
    grad_q, grad_k, grad_v = (f.view(t.shape) for f, t in zip(found, (query, key, value), strict=True))
    return grad_q, grad_k, grad_v


def _flatten(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, *tensor.shape[-2:]).contiguous()


def _take_functions() -> ctypes.CDLL:
    functions = KERNELS.library.functions
    assert functions is not None  # noqa: S101 - explain_attention asks
    return functions


def _weigh_keys(
    functions: ctypes.CDLL, scores: Tensor, mask: Tensor | None, rule: Rule, batch: torch.Size
) -> Tensor:  # fmt: skip
    """[b, L, S] scores become weights, in place; -> weights after dropout, the same tensor where there is none."""
    queries, keys = scores.shape[1:]
    strides = [0, 0, 0, 0]
    if mask is not None:
        strides = [*([0] * (2 - len(batch))), *mask.expand(*batch, queries, keys).stride()]
    shape = (COUNT * 7)(batch[-1], queries, keys, *strides)
    dropped = scores if rule.drop is None else torch.empty_like(scores)
    functions.weigh_keys(
        scores.data_ptr(), int(scores.dtype is torch.float32), scores.shape[0] * queries, ctypes.addressof(shape),
        rule.scale, int(rule.causal), *((None, 0) if mask is None else (mask.data_ptr(), KINDS[mask.dtype])),
        *_spread(rule.drop), None if rule.drop is None else dropped.data_ptr(),
    )  # fmt: skip
    return dropped


def _weigh_gradients(functions: ctypes.CDLL, weights: Tensor, gradients: Tensor, rule: Rule) -> Tensor:
    """[b, L, S] gradients of (dropped) weights become those of scores, in place; -> weights after dropout."""
    dropped, (batches, queries, keys) = weights if rule.drop is None else torch.empty_like(weights), weights.shape
    functions.weigh_gradients(
        weights.data_ptr(), gradients.data_ptr(), int(weights.dtype is torch.float32), batches * queries, queries, keys,
        rule.scale, int(rule.causal), *_spread(rule.drop), None if rule.drop is None else dropped.data_ptr(),
    )  # fmt: skip
    return dropped


def _spread(drop: Drop | None) -> tuple[float, ...]:
    return (0, 1.0, 0, 0) if drop is None else (drop.threshold, drop.scale, *drop.keys)


def _agrees(functions: ctypes.CDLL) -> bool:
    """Whether the kernels compute what the truth does, tried on a few rows with a mask and dropout."""
    scores = torch.linspace(-9.0, 9.0, 2 * 5 * 37, dtype=torch.float32, device="cpu").view(2, 5, 37)
    mask, drop = scores.cos() > -0.5, Drop(0.3, (12345, 678))
    rule, unit = Rule(0.7, False, drop), torch.eye(37, device="cpu", dtype=torch.float32).expand(2, 37, 37)
    weights, gradients = scores.clone(), scores.sin()
    expected, g = attend_slowly(scores, unit, unit, mask, rule), gradients * _make_factors(drop, scores)
    forward = _weigh_keys(functions, weights, mask, rule, scores.shape[:1])
    truth = rule.scale * weights * (g - (weights * g).sum(-1, keepdim=True))
    backward = _weigh_gradients(functions, weights, gradients, rule)
    return all(
        torch.allclose(found, right, rtol=1e-5, atol=1e-6)
        for found, right in ((forward, expected), (backward, expected), (gradients, truth))
    )


_NOISE = [INT, FLOAT, WORD, WORD, POINTER]
KERNELS = Kernels(
    "scaled_attention.c",
    {
        "weigh_keys": [POINTER, INT, COUNT, POINTER, FLOAT, INT, POINTER, INT, *_NOISE],
        "weigh_gradients": [POINTER, POINTER, INT, COUNT, COUNT, COUNT, FLOAT, INT, *_NOISE],
    },
    _agrees,
)
