"""Convolutions in scaled formats: against torch, and against fp64 with the same operands."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.errors import UnsupportedError
from halfstep.numerics import convolution
from halfstep.numerics.casting import ScaledTensor
from halfstep.numerics.products import Operand, Product, Products, ProductState, quantize_operand
from helpers import seeded

FP32 = Product(left=Operand(format="fp32"), right=Operand(format="fp32"))
PLAIN = Products(output=FP32, grad_input=FP32, grad_weight=FP32)
CASES: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("conv1d", (3, 4, 9), (6, 4, 3), {}),
    ("conv1d", (4, 9), (6, 4, 3), {"padding": 1}),
    ("conv2d", (3, 4, 9, 8), (6, 2, 3, 2), {"groups": 2, "stride": (2, 1), "padding": 1, "dilation": 2}),
    ("conv2d", (3, 4, 9, 8), (8, 1, 3, 3), {"groups": 4, "padding": "valid"}),
    ("conv2d", (3, 4, 9, 8), (6, 4, 3, 3), {"padding": "same", "dilation": (2, 1)}),
    ("conv3d", (2, 2, 4, 4, 4), (3, 2, 2, 2, 2), {"stride": 2}),
    ("conv_transpose1d", (3, 4, 5), (4, 6, 3), {"stride": 2, "output_padding": 1}),
    ("conv_transpose2d", (3, 4, 5, 6), (4, 3, 3, 2), {"groups": 2, "stride": 2, "padding": 1}),
    ("conv_transpose3d", (2, 2, 3, 3, 3), (2, 3, 2, 2, 2), {"dilation": 2}),
]


def make_case(x_shape: tuple[int, ...], w_shape: tuple[int, ...], name: str, options: dict[str, Any]) -> list[Tensor]:
    with seeded(0):
        x, weight = torch.randn(x_shape), torch.randn(w_shape)
        channels = w_shape[1] * options.get("groups", 1) if "transpose" in name else w_shape[0]
        return [x, weight, torch.randn(channels)]


def run(function: Callable[..., Tensor], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Result, and gradients of x, weight and bias for an incoming gradient that is always the same."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, **options)
    with seeded(1):
        g = torch.randn(y.shape).to(torch.bfloat16).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


@pytest.mark.parametrize(("name", "x_shape", "w_shape", "options"), CASES)
def test_with_plain_operands_it_is_the_convolution_of_torch(
    name: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    tensors = make_case(x_shape, w_shape, name, options)
    actual = run(getattr(convolution, name), tensors, products=PLAIN, **options)
    for a, e in zip(actual, run(getattr(F, name), tensors, **options), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("width", [2, 3, 4])
def test_same_padding_with_even_kernels_is_that_of_torch(width: int) -> None:
    tensors = make_case((2, 3, 6, 7), (4, 3, width, 3), "conv2d", {})
    actual = run(convolution.conv2d, tensors, products=PLAIN, padding="same")
    for a, e in zip(actual, run(F.conv2d, tensors, padding="same"), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def widen(tensor: Tensor, operand: Operand, dims: tuple[int, ...]) -> Tensor:
    copy = quantize_operand(tensor, operand, dims)
    return copy.dequantize(torch.float64) if isinstance(copy, ScaledTensor) else copy.to(torch.float64)


@pytest.mark.parametrize(
    "products",
    [Products.of("fp8_e4m3"), Products.of("fp8_e4m3", scaling="row:fp32"), Products.of("int8", grad_weight="bf16")],
    ids=["fp8", "fp8, rows", "SwitchBack"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "x_shape", "w_shape", "options"), [CASES[2], CASES[7]])
def test_a_convolution_is_its_slow_truth(
    products: Products, dtype: torch.dtype, name: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...],
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Three convolutions in fp64, each of operands quantized for it; torch differentiates each for the one gradient."""
    tensors = [t.to(dtype) for t in make_case(x_shape, w_shape, name, options)]
    y, grad_x, grad_w, grad_b = run(getattr(convolution, name), tensors, products=products, **options)
    x, weight, bias = tensors
    sample, channel = (1, 2, 3), (0, 2, 3)
    over_in, over_out = (channel, sample) if "transpose" in name else (sample, channel)
    with seeded(1):
        g = torch.randn(y.shape).to(torch.bfloat16)

    def compute(a: Tensor, w: Tensor) -> Tensor:
        result: Tensor = getattr(F, name)(a, w, **options)
        return result

    expected_y = compute(widen(x, products.output.left, sample), widen(weight, products.output.right, over_in))
    leaf = x.to(torch.float64).requires_grad_()
    result = compute(leaf, widen(weight, products.grad_input.right, over_out))
    expected_x = torch.autograd.grad(result, leaf, widen(g, products.grad_input.left, sample))[0]
    leaf = weight.to(torch.float64).requires_grad_()
    result = compute(widen(x, products.grad_weight.right, channel), leaf)
    expected_w = torch.autograd.grad(result, leaf, widen(g, products.grad_weight.left, channel))[0]
    tolerance = 256 * 2**-24 if dtype == torch.float32 else 2**-8
    for a, e in (
        (y, expected_y + bias.to(torch.float64).reshape(-1, 1, 1)), (grad_x, expected_x), (grad_w, expected_w),
        (grad_b, g.to(torch.float64).sum(channel)),
    ):  # fmt: skip
        torch.testing.assert_close(a.to(torch.float64), e, rtol=tolerance, atol=tolerance * e.abs().max().item())


def test_channels_last_stays_channels_last() -> None:
    x, weight, bias = make_case((2, 8, 6, 6), (4, 8, 3, 3), "conv2d", {})
    x = x.to(memory_format=torch.channels_last)
    y = convolution.conv2d(x, weight, bias, products=Products.of("fp8_e4m3"))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_blocks_are_refused() -> None:
    for products in (Products.of("mxfp8_e4m3"), Products.of("fp8_e4m3", scaling="1x128")):
        with pytest.raises(UnsupportedError, match="convolutions take scales a tensor or row"):
            convolution.conv1d(torch.ones(1, 2, 3), torch.ones(1, 2, 3), products=products)
    with pytest.raises(UnsupportedError, match="'same' with stride 1"):
        convolution.conv1d(torch.ones(1, 2, 3), torch.ones(1, 2, 3), None, 2, "same", products=PLAIN)
    with pytest.raises(UnsupportedError, match="conv2d takes a weight of 4 dimensions; got 3"):
        convolution.conv2d(torch.ones(1, 2, 3), torch.ones(1, 2, 3), products=PLAIN)


def test_frozen_inputs_get_no_gradient_and_delayed_scales_follow() -> None:
    x, weight, bias = make_case((2, 3, 6, 6), (4, 3, 3, 3), "conv2d", {})
    state = ProductState()
    y = convolution.conv2d(
        x, weight.requires_grad_(), bias, products=Products.of("fp8_e4m3", scaling="delayed"), state=state
    )
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert x.grad is None and weight.grad is not None and weight.grad.dtype == torch.float32
    assert state.histories["gradient"].amaxes[-2:].tolist() == [0.0, 1.0]
