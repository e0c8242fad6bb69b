"""Products of matrices whose operands are scaled numbers, forward and backward: linear, matmul and their relatives.

    forward      y  = Q(x) Q(w)^T + b            each Q along the dimension that its product sums over
    backward     dx = Q(g) Q(w)                  of the numbers, not of the copies that forward made
                 dw = Q(g)^T Q(x)                as `Products` says for each of the three
                 db = sum of g, in fp32

Quantization counts as the identity for the gradient (straight through), which is what the three products are: with the
operands unrounded they are the gradient of the product. What backward needs of x and w is kept as the narrow copies it will
take, one byte a number.

Dtypes are as torch's: all three products return the dtype of an active autocast, else that of the left operand, and gradients
are then converted to the dtypes of what they are gradients of. Gradients that are to be differentiated again are refused:
rounding has no second derivative that would mean something.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfstep.errors import ModelError, UnsupportedError
from halfstep.numerics.casting import ScaledTensor
from halfstep.numerics.products import Copies, Products, ProductState, QuantizedWeights, multiply

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def differentiate_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `backward` that refuses create_graph=True with an UnsupportedError, and runs without a graph.

    torch's once_differentiable lets it pass where the incoming gradient is a constant, and the gradient of a gradient
    penalty is then silently zero.
    """

    @functools.wraps(backward)
    def run(context: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "gradients of products in scaled formats cannot be differentiated again (create_graph=True); give the layers "
                "under a gradient penalty or a Hessian compute=bf16 or fp32"
            )
        return backward(context, *gradients)

    return run


class _Multiply(torch.autograd.Function):
    """left [..., M, K] times right: [..., N, K] where `transposed`, as a weight is stored, else [..., K, N]."""

    @staticmethod
    def forward(  # noqa: PLR0913 - autograd passes arguments by place
        context: Any, left: Tensor, right: Tensor, bias: Tensor | None, transposed: bool, products: Products,
        state: ProductState | None, weights: QuantizedWeights | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        over_k, over_n = (-1, -2) if transposed else (-2, -1)
        lefts, rights = Copies(left, state, "left"), Copies(right, state, "right", weights)
        operands = lefts.take(products.output.left, -1), rights.take(products.output.right, over_k)
        with torch.autocast(left.device.type, enabled=False):
            y = multiply(operands[0], transpose(operands[1]) if transposed else operands[1], dtype)
        kept_left = lefts.take(products.grad_weight.right, -2) if context.needs_input_grad[1] else None
        kept_right = rights.take(products.grad_input.right, over_n) if context.needs_input_grad[0] else None
        context.take_apart = save(context, kept_left, kept_right)
        context.dtypes = dtype, left.dtype, right.dtype, bias.dtype if bias is not None else None
        context.transposed, context.products, context.state = transposed, products, state
        return y if bias is None else y.add_(bias)

    @staticmethod
    @differentiate_once
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        products, transposed = context.products, context.transposed
        dtype, left_dtype, right_dtype, bias_dtype = context.dtypes
        left, right = context.take_apart(context)
        copies = Copies(g, context.state, "gradient")
        grad_left = grad_right = grad_bias = None
        with torch.autocast(g.device.type, enabled=False):
            if right is not None:
                operand = copies.take(products.grad_input.left, -1)
                grad_left = multiply(operand, right if transposed else transpose(right), dtype).to(left_dtype)
            if left is not None:
                operand = copies.take(products.grad_weight.left, -2)
                if transposed:
                    grad_right = multiply(transpose(operand), left, dtype).to(right_dtype)
                else:
                    grad_right = multiply(transpose(left), operand, dtype).to(right_dtype)
            if bias_dtype is not None and context.needs_input_grad[2]:
                wide = torch.float64 if g.dtype == torch.float64 else torch.float32
                grad_bias = g.sum(dim=tuple(range(g.dim() - 1)), dtype=wide).to(bias_dtype)
        return grad_left, grad_right, grad_bias, None, None, None, None, None


def transpose(operand: ScaledTensor | Tensor) -> ScaledTensor | Tensor:
    """An operand with its last two dimensions exchanged."""
    return operand.mT


def save(context: Any, *operands: ScaledTensor | Tensor | None) -> Any:
    """Keep operands for backward as saved tensors; returns what gives them back, called with the context."""
    tensors: list[Tensor | None] = []
    for operand in operands:
        if isinstance(operand, ScaledTensor):
            tensors += [operand.values, operand.scale, operand.tensor_scale]
        else:
            tensors += [operand, None, None]
    context.save_for_backward(*tensors)
    shells = [(o.format, o.scaling, o.blocks) if isinstance(o, ScaledTensor) else None for o in operands]

    def take_apart(context: Any) -> tuple[ScaledTensor | Tensor | None, ...]:
        saved = context.saved_tensors
        triples = zip(saved[::3], saved[1::3], saved[2::3], strict=True)
        return tuple(
            values if shell is None else ScaledTensor(values, scale, *shell, tensor_scale)
            for shell, (values, scale, tensor_scale) in zip(shells, triples, strict=True)
        )

    return take_apart


def find_result_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product of `x` returns: that of an active autocast, else x's own.

    Raises ModelError for a tensor that is not floating point.
    """
    if x.dtype not in DTYPES:
        raise ModelError(
            f"products in scaled formats take fp32, bf16, fp16 and fp64 tensors; got {x.dtype}; convert it"
        )
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, products: Products, state: ProductState | None = None
) -> Tensor:
    """`torch.nn.functional.linear`, x [..., K], weight [N, K], bias [N] -> [..., N], by scaled products.

    Examples:
        >>> linear(torch.tensor([[1.0, 17.0]]), torch.tensor([[1.0, 1.0]]), products=Products.of("fp8_e4m3"))
        tensor([[17.]])

    Raises PlanError where `products` need a state and there is none, ModelError for tensors that are not floating point.
    """
    return multiply_by_weight(x, weight, bias, products, state, state.weights if state and state.is_training else None)


def multiply_by_weight(
    x: Tensor, weight: Tensor, bias: Tensor | None, products: Products, state: ProductState | None,
    weights: QuantizedWeights | None,
) -> Tensor:  # fmt: skip
    """`linear`, with the copies of the weight shared in `weights`, whatever the state shares."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y: Tensor = _Multiply.apply(flat, weight, bias, True, products, state, weights, find_result_dtype(x))
    return y.reshape(*x.shape[:-1], weight.shape[0])


def matmul(left: Tensor, right: Tensor, *, products: Products, state: ProductState | None = None) -> Tensor:
    """`torch.matmul` by scaled products: vectors, matrices and batches of matrices, which are broadcast.

    `right` takes the part of the weight, and its gradient that of grad_weight.

    Examples:
        >>> matmul(torch.ones(3, 2, 4), torch.ones(4, 5), products=Products.of("int8")).shape
        torch.Size([3, 2, 5])
    """
    if right.dim() == 1:
        return matmul(left, right[:, None], products=products, state=state).squeeze(-1)
    if left.dim() == 1:
        return matmul(left[None], right, products=products, state=state).squeeze(-2)
    dtype = find_result_dtype(left)
    if right.dim() == 2:
        flat = left.reshape(math.prod(left.shape[:-1]), left.shape[-1])
        y: Tensor = _Multiply.apply(flat, right, None, False, products, state, None, dtype)
        return y.reshape(*left.shape[:-1], right.shape[-1])
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    count = math.prod(batch)
    left, right = (x.expand(*batch, *x.shape[-2:]).reshape(count, *x.shape[-2:]) for x in (left, right))
    y = _Multiply.apply(left, right, None, False, products, state, None, dtype)
    return y.reshape(*batch, *y.shape[-2:])


def mm(left: Tensor, right: Tensor, *, products: Products, state: ProductState | None = None) -> Tensor:
    """`torch.mm`, two matrices, by scaled products.

    Examples:
        >>> mm(torch.ones(2, 3), torch.ones(3, 4), products=Products.of("int8")).shape
        torch.Size([2, 4])
    """
    _require_dimensions("mm", left, right, 2)
    return matmul(left, right, products=products, state=state)


def bmm(left: Tensor, right: Tensor, *, products: Products, state: ProductState | None = None) -> Tensor:
    """`torch.bmm`, two equal batches of matrices, by scaled products.

    Examples:
        >>> bmm(torch.ones(5, 2, 3), torch.ones(5, 3, 4), products=Products.of("int8")).shape
        torch.Size([5, 2, 4])
    """
    _require_dimensions("bmm", left, right, 3)
    return matmul(left, right, products=products, state=state)


def addmm(
    addend: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1, products: Products,
    state: ProductState | None = None,
) -> Tensor:  # fmt: skip
    """`torch.addmm`: beta * addend + alpha * left @ right, the product by scaled products.

    Examples:
        >>> addmm(torch.ones(4), torch.ones(2, 3), torch.ones(3, 4), beta=2, products=Products.of("int8")).unique()
        tensor([5.])
    """
    return _add(addend, mm(left, right, products=products, state=state), beta, alpha)


def baddbmm(
    addend: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1, products: Products,
    state: ProductState | None = None,
) -> Tensor:  # fmt: skip
    """`torch.baddbmm`: beta * addend + alpha * left @ right for batches, the product by scaled products.

    Examples:
        >>> baddbmm(torch.ones(4), torch.ones(5, 2, 3), torch.ones(5, 3, 4), products=Products.of("int8")).unique()
        tensor([4.])
    """
    return _add(addend, bmm(left, right, products=products, state=state), beta, alpha)


def _add(addend: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    """beta 0 leaves the addend out, NaN and all, as in torch."""
    scaled = product if alpha == 1 else alpha * product
    return scaled if beta == 0 else scaled + (beta * addend).to(scaled.dtype)


def _require_dimensions(name: str, left: Tensor, right: Tensor, dimensions: int) -> None:
    if left.dim() != dimensions or right.dim() != dimensions:
        raise UnsupportedError(
            f"{name} takes tensors of {dimensions} dimensions; got {left.dim()} and {right.dim()}; use matmul"
        )
