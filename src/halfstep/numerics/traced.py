"""The fast functions in compiled code: kernels as operators of torch's, which torch.compile writes into its graph unseen.

    torch.nn.functional's function  ->  the same signature here, traced  ->  halfstep::draw_drop, drop, attend, ...

A compiler cannot look into a kernel, and need not where the kernel is the faster of the two: it fuses torch's dropout with what
stands around it, and still draws a number an element; it leaves torch's attention as it is; it computes a cross entropy of
16-bit logits in three passes, and the derivative of a GELU again wherever that is read. Around the operators everything is
fused as before.

What each operator computes, and for what, stands in `dropouts`, `losses`, `scaled_attention` and `gelus`. Keys of noise come
from torch's default generator by an operator that is tagged as random, so that the compiler puts the generator back where
activation checkpointing runs code again. It merges equal calls all the same, where there is a backward pass: so every call has
a number.

Which way attention goes is timed while the code is traced, with tensors made for that, where its shape is fixed; where the
compiler keeps a size open, calls without dropout are left to torch. So is GELU of open sizes.

The compiler cannot always take the gradient of a table with sparse gradients, so look-ups in those are left out of its graph.

Convolutions need nothing here: the functions of `routed_convolutions` are made of torch's own, which the compiler traces and
fuses.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from halfstep.numerics import dropouts, gelus, losses, scaled_attention
from halfstep.numerics.dropouts import LEVELS, Drop, draw_keys
from halfstep.numerics.kernels import are_fixed, hold_constant
from halfstep.numerics.scaled_attention import Route, Rule

_numbers = itertools.count()


@hold_constant
def number_call() -> int:
    """A number that no other call has which is traced in this process."""
    return next(_numbers)


@custom_op("halfstep::draw_drop", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_drop(like: Tensor, p: float, number: int) -> Tensor:
    """[3] int64: p in steps of 2^-16 and two keys from torch's default generator; the tensor says that this is the processor."""
    return torch.tensor([round(p * LEVELS), *draw_keys()], dtype=torch.int64)


@draw_drop.register_fake
def _(like: Tensor, p: float, number: int) -> Tensor:
    return like.new_empty(3, dtype=torch.int64)


def _read_drop(words: Tensor) -> Drop:
    levels, first, second = words.tolist()
    return Drop(levels / LEVELS, (first, second))


@custom_op("halfstep::drop", mutates_args=())
def drop(x: Tensor, words: Tensor) -> Tensor:
    """x * factor, with the words of `draw_drop`."""
    return dropouts.drop(x, _read_drop(words))


@drop.register_fake
def _(x: Tensor, words: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_drop(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _drop_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return drop(gradient, *ctx.saved_tensors), None


drop.register_autograd(_drop_gradient, setup_context=_keep_drop)


@custom_op("halfstep::measure_losses", mutates_args=())
def measure_losses(
    logits: Tensor, target: Tensor, ignored: int, smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """[n, classes], [n] -> the loss [] fp32, what each row keeps [n, 2] fp32, and the share of a row in it [] fp64."""
    loss, rows, share = losses.measure(logits, target, losses.Rule(ignored, smoothing, reduction))
    return loss, rows, torch.tensor(share, dtype=torch.float64)


@measure_losses.register_fake
def _(logits: Tensor, target: Tensor, ignored: int, smoothing: float, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.new_empty(logits.shape[0], 2, dtype=torch.float32)
    return rows.new_empty(()), rows, rows.new_empty((), dtype=torch.float64)


@custom_op("halfstep::write_gradients", mutates_args=())
def write_gradients(
    gradient: Tensor, logits: Tensor, target: Tensor, rows: Tensor, share: Tensor, ignored: int, smoothing: float
) -> Tensor:
    """The gradient of the logits in their dtype."""
    rule = losses.Rule(ignored, smoothing, "sum")
    return losses.write_gradients(logits, target, rows, float(gradient) * float(share), rule)


@write_gradients.register_fake
def _(
    gradient: Tensor, logits: Tensor, target: Tensor, rows: Tensor, share: Tensor, ignored: int, smoothing: float
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep_losses(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, ctx.ignored, ctx.smoothing, _ = inputs
    ctx.save_for_backward(logits, target, *output[1:])


def _losses_gradient(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return write_gradients(gradients[0], *ctx.saved_tensors, ctx.ignored, ctx.smoothing), None, None, None, None


measure_losses.register_autograd(_losses_gradient, setup_context=_keep_losses)


@custom_op("halfstep::look_up_gelu", mutates_args=())
def look_up_gelu(x: Tensor, approximate: str) -> Tensor:
    """gelu(x), of bf16."""
    return gelus.look_up(x, approximate)


@look_up_gelu.register_fake
def _(x: Tensor, approximate: str) -> Tensor:
    return torch.empty_like(x)


@custom_op("halfstep::look_up_gelu_gradient", mutates_args=())
def look_up_gelu_gradient(gradient: Tensor, x: Tensor, approximate: str) -> Tensor:
    """gradient * gelu'(x)."""
    return gelus.multiply(gradient, x, approximate)


@look_up_gelu_gradient.register_fake
def _(gradient: Tensor, x: Tensor, approximate: str) -> Tensor:
    return torch.empty_like(x)


def _keep_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _gelu_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    # second derivatives are torch's, as is what hooks have unpacked in another dtype
    if torch.is_grad_enabled() or gradient.dtype != x.dtype or x.dtype not in gelus.DTYPES:
        return torch.ops.aten.gelu_backward(gradient, x, approximate=ctx.approximate), None
    return look_up_gelu_gradient(gradient, x, ctx.approximate), None


look_up_gelu.register_autograd(_gelu_gradient, setup_context=_keep_gelu)


def _make_rule(words: Tensor | None, scale: float, causal: bool) -> Rule:
    return Rule(scale, causal, None if words is None else _read_drop(words))


@custom_op("halfstep::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, words: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """[..., L, E], [..., S, E], [..., S, V] -> out [..., L, V] and the weights [b, L, S] before dropout."""
    return scaled_attention.attend(q, k, v, mask, _make_rule(words, scale, causal))


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, words: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    batches, queries = q.shape[:-2].numel(), q.shape[-2]
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(batches, queries, k.shape[-2])


@custom_op("halfstep::attend_backward", mutates_args=())
def attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, words: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    return scaled_attention.attend_backward(gradient, q, k, v, weights, _make_rule(words, scale, causal))


@attend_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, words: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return q, k, v


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _, words, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, output[1], words)


def _attention_gradient(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.causal), None, None, None, None


attend.register_autograd(_attention_gradient, setup_context=_keep_attention)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`dropouts.dropout` in compiled code.

    Examples:
        >>> x = torch.ones(100_000, dtype=torch.bfloat16)
        >>> abs(float((dropout(x, 0.25) == 0).float().mean()) - 0.25) < 0.01
        True
    """
    if dropouts.explain_dropout(input, p, training, inplace):
        return F.dropout(input, p, training, inplace)
    dropped: Tensor = drop(input, draw_drop(input, p, number_call()))
    return dropped


def gelu(input: Tensor, *, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """`gelus.gelu` in compiled code.

    Examples:
        >>> x = torch.full((1 << 16,), -1.0, dtype=torch.bfloat16)
        >>> gelu(x)[0].item()
        -0.158203125
    """
    if out is not None:
        return F.gelu(input, approximate=approximate, out=out)  # type: ignore[call-arg]  # which torch takes, and hides
    if not are_fixed(input.shape) or gelus.explain_gelu(input, approximate):
        return F.gelu(input, approximate=approximate)
    result: Tensor = look_up_gelu(input, approximate)
    return result


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """`losses.cross_entropy` in compiled code.

    Examples:
        >>> logits = torch.tensor([[1.0, 2.0], [3.0, 3.0]], dtype=torch.bfloat16)
        >>> round(float(cross_entropy(logits, torch.tensor([1, 0]))), 4)
        0.5032
    """
    is_old = size_average is not None or reduce is not None
    if is_old or losses.explain_cross_entropy(input, target, weight, reduction, label_smoothing):
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )  # fmt: skip
    loss: Tensor = measure_losses(input, target.contiguous(), ignore_index, label_smoothing, reduction)[0]
    return loss


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`scaled_attention.scaled_dot_product_attention` in compiled code.

    Examples:
        >>> q = torch.eye(2)[None].requires_grad_()
        >>> scaled_dot_product_attention(q, q, q, is_causal=True)[0, 0].tolist()
        [1.0, 0.0]
    """
    query, key, value = (scaled_attention.cast(t) for t in (query, key, value))
    fault = scaled_attention.explain_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if fault or not (dropout_p or _is_faster(query, key, value, attn_mask, factor, is_causal)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    words = draw_drop(query, dropout_p, number_call()) if dropout_p else None
    q, k, v = (t.contiguous() for t in (query, key, value))
    mixed: Tensor = attend(q, k, v, attn_mask, words, factor, is_causal)[0]
    return mixed


def _is_faster(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> bool:
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if not are_fixed(size for tensor in tensors for size in tensor.shape):
        return False
    shapes = [tuple(t.shape) for t in tensors]
    route = _time_route(shapes, query.dtype, None if mask is None else mask.dtype, scale, causal)
    return bool(route == "kernel")


@hold_constant
def _time_route(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, mask_dtype: torch.dtype | None, scale: float, causal: bool
) -> Route:
    q, k, v = (torch.zeros(shape, dtype=dtype) for shape in shapes[:3])
    mask = None if mask_dtype is None else torch.ones(shapes[3], dtype=mask_dtype)
    return scaled_attention.find_route(q, k, v, mask, Rule(scale, causal, None))


def _leave_out_sparse(look_up: Callable[..., Tensor], place: int) -> Callable[..., Tensor]:
    """place: of the argument `sparse` among those of the function."""
    apart = torch.compiler.disable(look_up, reason="the compiler cannot always take sparse gradients")

    def look_up_traced(*args: Any, **kwargs: Any) -> Tensor:
        is_sparse = torch.is_grad_enabled() and kwargs.get("sparse", len(args) > place and args[place])
        return (apart if is_sparse else look_up)(*args, **kwargs)

    return look_up_traced


embedding = _leave_out_sparse(F.embedding, 6)
embedding_bag = _leave_out_sparse(F.embedding_bag, 7)
