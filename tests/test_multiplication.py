"""Products of matrices, forward and backward: against fp64 with the same operands, theory, torch and torchao."""

import math
import runpy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.errors import ModelError, PlanError, UnsupportedError
from halfstep.numerics.casting import ScaledTensor, measure_error
from halfstep.numerics.multiplication import addmm, baddbmm, bmm, linear, matmul, mm
from halfstep.numerics.products import (
    Operand,
    Product,
    Products,
    ProductState,
    QuantizedWeights,
    multiply_slowly,
    quantize_operand,
)
from helpers import seeded

SQNR = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "sqnr.py"))
FP32 = Product(left=Operand(format="fp32"), right=Operand(format="fp32"))
PLAIN = Products(output=FP32, grad_input=FP32, grad_weight=FP32)
RECIPES = {
    "fp8": Products.of("fp8_e4m3"),
    "fp8, any scale": Products.of("fp8_e4m3", scaling="tensor:fp32"),
    "fp8, rows": Products.of("fp8_e4m3", scaling="row"),
    "fp8, blocks": Products.of("fp8_e4m3", scaling="1x128", weight_scaling="128x128"),
    "int8": Products.of("int8"),
    "SwitchBack": Products.of("int8", grad_weight="bf16"),
    "mxfp8": Products.of("mxfp8_e4m3"),
    "mxfp6": Products.of("mxfp6_e2m3"),
    "nvfp4": Products.of("nvfp4"),
}


def make_layer(rows: int = 48, inputs: int = 80, outputs: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the gradient of the output."""
    with seeded(0):
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs) / inputs**0.5
        return x, weight, torch.randn(outputs), torch.randn(rows, outputs)


def run(function: Callable[..., Tensor], g: Tensor, *tensors: Tensor, **options: Any) -> list[Tensor]:
    """The result and the gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))]


def compute_slowly(products: Products, x: Tensor, weight: Tensor, bias: Tensor, g: Tensor) -> list[Tensor]:
    """The three products of a linear layer in fp64, each from operands quantized for it."""

    def take(operand: Operand, tensor: Tensor, dim: int) -> ScaledTensor | Tensor:
        return quantize_operand(tensor, operand, dim)

    out, gi, gw = products.output, products.grad_input, products.grad_weight
    return [
        multiply_slowly(take(out.left, x, -1), take(out.right, weight, -1).mT) + bias,
        multiply_slowly(take(gi.left, g, -1), take(gi.right, weight, -2)),
        multiply_slowly(take(gw.left, g, -2).mT, take(gw.right, x, -2)),
        g.to(torch.float64).sum(0),
    ]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_its_slow_truth(name: str, dtype: torch.dtype) -> None:
    x, weight, bias, g = (t.to(dtype) for t in make_layer())
    actual = run(linear, g, x, weight, bias, products=RECIPES[name])
    tolerance = (
        80 * 2**-24 if dtype == torch.float32 else 2**-8
    )  # sums of up to 80 terms; the result's rounding, twice with a bias
    for a, expected in zip(actual, compute_slowly(RECIPES[name], x, weight, bias, g), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a.to(torch.float64), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
        )


@pytest.mark.parametrize(
    ("layer", "recipe"),
    [(name, recipe) for name, layer in SQNR["BILINEAR"].items() for recipe, products in SQNR["RECIPES"].items()
     if layer.takes_blocks or products.output.left.scaling.kind != "block"],
)  # fmt: skip
def test_noise_of_the_three_products_is_what_theory_says(layer: str, recipe: str) -> None:
    """For linear layers, batches of matrices and convolutions: errors of operands are even over a quantum and independent.

    10^4 errors and more make each result: 0.3 dB, which is 7 %, is 5 times what their mean square varies by. The largest
    number of a block of NVFP4 is always at the end of the grid and loses nothing, so there is less noise than that.
    """
    products = SQNR["RECIPES"][recipe]
    for measured, theory in SQNR["compare_bilinear"](SQNR["BILINEAR"][layer], products):
        assert measured > theory - 0.3
        assert measured < theory + 0.3 or recipe == "nvfp4"


SHAPES = [
    ((4,), (4,)), ((3, 4), (4,)), ((4,), (4, 5)), ((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)),
    ((3, 4), (2, 4, 5)), ((6, 1, 3, 4), (2, 4, 5)), ((2, 3, 4), (4,)), ((0, 4), (4, 5)), ((2, 3, 0), (2, 0, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_matmul_takes_the_shapes_that_torch_takes(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with seeded(0):
        a, b = torch.randn(left), torch.randn(right)
        g = torch.randn_like(a @ b)
    for actual, expected in zip(run(matmul, g, a, b, products=PLAIN), run(torch.matmul, g, a, b), strict=True):
        torch.testing.assert_close(actual, expected)
    assert matmul(a, b, products=RECIPES["int8"]).shape == g.shape


@pytest.mark.parametrize("name", ["fp8, rows", "fp8, blocks", "int8", "SwitchBack", "mxfp8"])
def test_batched_products_are_those_of_each_matrix(name: str) -> None:
    products = RECIPES[name]
    with seeded(0):
        a, b, g = torch.randn(3, 8, 64), torch.randn(3, 64, 16), torch.randn(3, 8, 16)
    together = run(matmul, g, a, b, products=products)
    for i in range(3):
        for whole, alone in zip(together, run(matmul, g[i], a[i], b[i], products=products), strict=True):
            torch.testing.assert_close(whole[i], alone, rtol=1e-5, atol=1e-5)


def test_relatives_of_matmul_are_those_of_torch() -> None:
    with seeded(0):
        a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)
    batch = a.expand(2, 3, 4), b.expand(2, 4, 5)
    torch.testing.assert_close(mm(a, b, products=PLAIN), torch.mm(a, b))
    torch.testing.assert_close(bmm(*batch, products=PLAIN), torch.bmm(*batch))
    torch.testing.assert_close(
        addmm(c, a, b, beta=0.5, alpha=2, products=PLAIN), torch.addmm(c, a, b, beta=0.5, alpha=2)
    )
    torch.testing.assert_close(baddbmm(c, *batch, products=PLAIN), torch.baddbmm(c, *batch))
    assert addmm(torch.full((5,), math.nan), a, b, beta=0, products=PLAIN).isfinite().all()
    with pytest.raises(UnsupportedError, match="mm takes tensors of 2 dimensions; got 3 and 3; use matmul"):
        mm(*batch, products=PLAIN)


def test_inputs_of_many_dimensions_are_rows() -> None:
    x, weight, bias, g = make_layer()
    flat = run(linear, g, x, weight, bias, products=RECIPES["int8"])
    deep = run(linear, g.reshape(4, 12, -1), x.reshape(4, 12, -1), weight, bias, products=RECIPES["int8"])
    for a, b in zip(deep, flat, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


def test_autocast_rounds_the_result_alone() -> None:
    x, weight, _, _ = make_layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, products=PLAIN)
    assert torch.equal(y, F.linear(x, weight).to(torch.bfloat16))


def test_dtypes_are_those_of_torch_under_autocast() -> None:
    x, weight, bias, g = make_layer()
    g = g.to(torch.bfloat16).to(torch.float32)
    for name in ("fp8", "int8", "fp8, any scale"):
        with torch.autocast("cpu", torch.bfloat16):
            inside = run(linear, g, x, weight, bias, products=RECIPES[name])
        assert [t.dtype for t in inside] == [torch.bfloat16, *[torch.float32] * 3]
        outside = run(linear, g, x, weight, bias, products=RECIPES[name])
        for a, b in zip(inside, outside, strict=True):  # the fp32 products inside are not cast down
            torch.testing.assert_close(a.to(torch.float32), b, rtol=2**-7, atol=2**-7 * b.abs().max().item())


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """The tensors that functions in the block keep for backward."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def test_backward_waits_with_one_byte_a_number() -> None:
    x, weight, bias, _ = make_layer()
    with saved_tensors() as kept:
        linear(x.requires_grad_(), weight.requires_grad_(), bias, products=RECIPES["fp8"])
    assert sum(t.numel() * t.element_size() for t in kept) == x.numel() + weight.numel() + 2 * 4
    with saved_tensors() as kept:
        linear(x.detach(), weight, bias, products=RECIPES["fp8"])
    assert sum(t.numel() for t in kept) == x.numel() + 1, "no gradient of x, so no weight is kept"


def test_differentiating_twice_is_refused() -> None:
    x, weight, _, _ = make_layer()
    y = linear(x.requires_grad_(), weight.requires_grad_(), products=RECIPES["fp8"])
    with pytest.raises(UnsupportedError, match="cannot be differentiated again"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_gradient_that_is_not_finite_stays_so(name: str) -> None:
    x, weight, bias, g = make_layer()
    g[3, 5] = math.inf
    y, grad_x, grad_w, grad_b = run(linear, g, x, weight, bias, products=RECIPES[name])
    assert y.isfinite().all()
    assert not grad_x[3].isfinite().any() and not grad_w[5].isfinite().any() and not grad_b[5].isfinite()


def test_a_state_follows_what_it_sees() -> None:
    x, weight, bias, g = make_layer()
    products, state = Products.of("fp8_e4m3", scaling="delayed"), ProductState()
    run(linear, g, x, weight, bias, products=products, state=state)
    amaxes = {role: history.amaxes[-2:].tolist() for role, history in state.histories.items()}
    assert amaxes == {"left": [0, x.abs().max()], "right": [0, weight.abs().max()], "gradient": [0, g.abs().max()]}
    with pytest.raises(PlanError, match="needs a state"):
        linear(x, weight, products=products)


def test_gradients_rounded_stochastically_are_right_in_the_mean() -> None:
    x, weight, bias, g = make_layer(rows=4, inputs=8, outputs=16)
    products = Products.of("fp8_e4m3", gradient_mode="stochastic")
    state = ProductState(seed=1)
    draws = torch.stack([run(linear, g, x, weight, bias, products=products, state=state)[1] for _ in range(400)])
    left = g.to(torch.float64)
    right = quantize_operand(weight, products.grad_input.right, -2)
    assert isinstance(right, ScaledTensor)
    error = draws.to(torch.float64).mean(0) - left @ right.dequantize(torch.float64)
    assert (error.abs() <= 5 * draws.std(0) / 20).all()


def test_micro_batches_share_quantized_weights() -> None:
    x, weight, bias, _ = make_layer()
    x.requires_grad_()
    state, parameter = ProductState(weights=QuantizedWeights()), nn.Parameter(weight)
    first = linear(x, parameter, bias, products=RECIPES["int8"], state=state)
    assert state.weights is not None and len(state.weights) == 2, "along inputs, and along outputs for backward"
    assert torch.equal(linear(x, parameter, bias, products=RECIPES["int8"], state=state), first)
    assert len(state.weights) == 2
    with torch.no_grad():
        parameter.mul_(2)
    torch.testing.assert_close(linear(x, parameter, products=RECIPES["int8"], state=state), 2 * (first - bias))


def test_tensors_that_are_not_floating_point_are_refused() -> None:
    with pytest.raises(ModelError, match=r"got torch\.int64; convert it"):
        linear(torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2), products=PLAIN)


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_training_in_fp8_is_that_of_torchao(powers_of_two: bool) -> None:
    """torchao 0.18, one scale a tensor, e4m3 forward and e5m2 for the gradient: the same operands, bit for bit, and sums in
    fp32 in another order. torchao undoes scales by dividing each operand, which for scales that are no powers of two is
    another rounding of 2^-24; halfstep's default is the other one, powers of two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.float8")
    x, weight, bias, g = make_layer()
    layer = nn.Linear(x.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight, bias
    config = torchao.Float8LinearConfig(emulate=True, round_scales_to_power_of_2=powers_of_two)
    model = torchao.convert_to_float8_training(nn.Sequential(layer), config=config)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(g)
    theirs = [y.detach(), leaf.grad, model[0].weight.grad, model[0].bias.grad]
    ours = run(linear, g, x, weight, bias, products=RECIPES["fp8" if powers_of_two else "fp8, any scale"])
    for a, b in zip(ours, theirs, strict=True):
        assert b is not None
        torch.testing.assert_close(a, b, rtol=80 * 2**-24, atol=80 * 2**-24 * b.abs().max().item())
    assert measure_error(F.linear(x, weight, bias), ours[0], "fp32").sqnr < 40, "both did round"
