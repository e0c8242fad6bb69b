"""Formats of the three products, the kernels that multiply them, and what calls share."""

import gc
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from halfstep.errors import FormatError, PlanError
from halfstep.numerics.casting import ScaledTensor, Scaling, quantize
from halfstep.numerics.products import (
    KERNELS,
    Copies,
    Operand,
    Products,
    ProductState,
    QuantizedWeights,
    choose_kernel,
    expand_operands,
    multiply,
    multiply_slowly,
    quantize_operand,
)
from helpers import seeded

CASES = [
    ("fp8_e4m3", "tensor"), ("fp8_e4m3", "tensor:fp32"), ("fp8_e5m2", "row"), ("fp8_e4m3", "1x8"), ("fp8_e4m3", "8x8"),
    ("int8", "tensor"), ("int8", "row"), ("int8", "row:e8m0"), ("int4", "1x8"), ("fp6_e2m3", "row"), ("mxfp8_e4m3", ""),
    ("mxfp4", ""), ("nvfp4", ""),
]  # fmt: skip


def make_pair(name: str, word: str, batch: tuple[int, ...] = ()) -> tuple[ScaledTensor, ScaledTensor]:
    """[*batch, 24, 80] and [*batch, 80, 17], quantized along the 80."""
    with seeded(0):
        left, right = torch.randn(*batch, 24, 80), torch.randn(*batch, 80, 17)
    return quantize(left, name, word, dim=-1), quantize(right, name, word, dim=-2)


def assert_summed_in_fp32(actual: Tensor, left: ScaledTensor | Tensor, right: ScaledTensor | Tensor) -> None:
    """Within what fp32 sums of K terms may be off, and one rounding to the result's dtype.

    K roundings of 2^-24 of the largest partial sum, which is at most the sum of magnitudes; free scales add two.
    """
    a, b = expand_operands(left, right, torch.float64)
    exact, sizes = a @ b, a.abs() @ b.abs()
    bound = (a.shape[-1] + 3) * 2.0**-24 * sizes
    if actual.dtype == torch.bfloat16:
        bound = bound + 2.0**-8 * exact.abs()
    assert ((actual.to(torch.float64) - exact).abs() <= bound).all()


@pytest.mark.parametrize(("name", "word"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_rounds_only_what_its_formats_round(name: str, word: str, dtype: torch.dtype) -> None:
    for batch in ((), (3,)):
        left, right = make_pair(name, word, batch)
        y = multiply(left, right, dtype)
        assert y.dtype == dtype
        assert_summed_in_fp32(y, left, right)


@pytest.mark.parametrize(("name", "word"), CASES)
def test_fp64_is_computed_in_fp64(name: str, word: str) -> None:
    left, right = make_pair(name, word, (3,))
    torch.testing.assert_close(
        multiply(left, right, torch.float64), multiply_slowly(left, right), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("name", "word"), CASES)
def test_bf16_is_taken_only_where_operands_are_exact_in_it(name: str, word: str) -> None:
    left, right = make_pair(name, word, (3,))
    a, b = expand_operands(left, right, torch.bfloat16)
    assert a.dtype == (torch.bfloat16 if left.is_exact_in_bf16 else torch.float32)
    if left.is_exact_in_bf16:
        assert torch.equal(a.to(torch.float64), left.dequantize(torch.float64))
        assert torch.equal(b.to(torch.float64), right.dequantize(torch.float64))


def test_bf16_products_of_this_machine_sum_in_fp32() -> None:
    """1 is lost beside 2^20 in a bf16 sum, and beside 2^25 in an fp32 one."""
    left = torch.ones(32, 1024, dtype=torch.bfloat16)
    left[:, 0], left[:, -1] = 2.0**20, -(2.0**20)
    y = multiply(left, torch.ones(1024, 32, dtype=torch.bfloat16), torch.bfloat16)
    assert (y == 1024).all(), "1022, rounded once"


def test_integer_products_are_exact() -> None:
    with seeded(0):
        left, right = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((5, 4096), (4096, 7)))
    one = (Scaling.parse("tensor"),)
    a, b = (quantize(x.to(torch.float32), "int8", *one) for x in (left, right))
    sums = left.to(torch.int64) @ right.to(torch.int64)
    assert a.scale.item() == b.scale.item() == 1
    assert torch.equal(KERNELS["int_mm"](a, b, torch.float64), sums.to(torch.float64))


@pytest.mark.parametrize("word", ["tensor", "tensor:fp32", "row", "row:fp32"])
def test_the_native_fp8_kernel_is_handed_what_it_takes(word: str) -> None:
    """torch has torch._scaled_mm also on CPU, so its call is checked here."""
    with seeded(0):
        x, w = torch.randn(32, 64), torch.randn(48, 64)
    left, right = quantize(x, "fp8_e4m3", word), quantize(w, "fp8_e4m3", word).mT
    assert_summed_in_fp32(KERNELS["scaled_mm"](left, right, torch.float32), left, right)


@pytest.mark.parametrize("name", ["fp8_e4m3", "int8"])
def test_a_product_of_nothing_is_zeros_or_empty(name: str) -> None:
    for m, k, n in ((0, 4, 5), (4, 0, 5), (4, 5, 0)):
        y = multiply(quantize(torch.ones(m, k), name), quantize(torch.ones(k, n), name, dim=-2), torch.float32)
        assert torch.equal(y, torch.zeros(m, n))


def test_kernels_say_why() -> None:
    left, right = make_pair("fp8_e4m3", "tensor")
    assert choose_kernel(left, right, torch.bfloat16).name == "bf16"
    assert choose_kernel(left, right, torch.float32).name == "fp32"
    assert "this is cpu" in choose_kernel(left, right, torch.float32).why
    assert "a scale a tensor or row; got 1x8" in choose_kernel(*make_pair("fp8_e4m3", "1x8"), torch.bfloat16).why
    assert "two matrices" in choose_kernel(*make_pair("int8", "row", (3,)), torch.bfloat16).why
    assert "without scales" in choose_kernel(torch.ones(24, 80), right, torch.bfloat16).why
    assert "no kernel multiplies fp6" in choose_kernel(*make_pair("fp6_e2m3", "row"), torch.bfloat16).why
    mixed = choose_kernel(quantize(torch.ones(2, 80), "int8"), right, torch.bfloat16)
    assert (mixed.name, mixed.is_native) == ("fp32", False)


def test_sums_that_may_not_fit_into_int32_are_not_made_there() -> None:
    terms = 133_145
    left, right = (
        quantize(torch.ones(shape), "int8", "row", dim=dim) for shape, dim in (((2, terms), 1), ((terms, 3), 0))
    )
    assert choose_kernel(left, right, torch.float32).name == "fp32"
    assert multiply(left, right, torch.float32).sub(terms).abs().max() < 1e-3 * terms


@pytest.mark.parametrize("has_vnni", [False, True])
def test_integers_are_native_where_the_processor_has_them(has_vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
    left, right = make_pair("int8", "row")
    kernel = choose_kernel(left, right, torch.float32)
    assert (kernel.name, kernel.is_native) == (("int_mm", True) if has_vnni else ("fp32", False))
    assert_summed_in_fp32(multiply(left, right, torch.float32), left, right)


def test_defaults_are_those_of_the_literature() -> None:
    fp8 = Products.of("fp8_e4m3")
    assert [p.left.format for p in (fp8.output, fp8.grad_input, fp8.grad_weight)] == [
        "fp8_e4m3",
        "fp8_e5m2",
        "fp8_e5m2",
    ]
    assert {str(o.scaling) for p in (fp8.output, fp8.grad_input, fp8.grad_weight) for o in (p.left, p.right)} == {
        "tensor"
    }
    blocks = Products.of("fp8_e4m3", scaling="1x128", weight_scaling="128x128")
    assert (blocks.grad_input.left.format, str(blocks.output.right.scaling)) == ("fp8_e4m3", "128x128")
    assert str(Products.of("int8").output.left.scaling) == "row"
    assert Products.of("mxfp8_e4m3").grad_weight.left == Operand(format="mxfp8_e4m3")
    switchback = Products.of("int8", grad_weight="bf16")
    assert (switchback.grad_weight.left.format, switchback.grad_input.left.format) == ("bf16", "int8")
    assert Products.of("nvfp4", gradient_mode="stochastic").grad_weight.left.mode == "stochastic"


def test_operands_that_cannot_be_are_refused() -> None:
    with pytest.raises(FormatError, match="products take bf16, fp16, tf32, fp32 and what quantize takes; got e8m0"):
        Operand(format="e8m0")
    with pytest.raises(FormatError, match="unknown scaling 'rows'"):
        Products.of("int8", scaling="rows")


def test_copies_along_two_dimensions_come_from_the_numbers_themselves() -> None:
    with seeded(0):
        x = torch.randn(40, 24)
    operand = Operand(format="fp8_e4m3", scaling=Scaling.parse("1x8:fp32"))
    copies = Copies(x, None, "left")
    along_rows, along_columns = copies.take(operand, -1), copies.take(operand, -2)
    assert isinstance(along_columns, ScaledTensor) and isinstance(along_rows, ScaledTensor)
    assert torch.equal(along_columns.dequantize(), quantize(x, "fp8_e4m3", "1x8:fp32", dim=-2).dequantize())
    again = quantize(along_rows.dequantize(), "fp8_e4m3", "1x8:fp32", dim=-2)
    assert not torch.equal(along_columns.dequantize(), again.dequantize())


@pytest.mark.parametrize("word", ["tensor", "8x8", "row", "8x16"])
def test_one_copy_serves_both_dimensions_where_it_is_the_same(word: str) -> None:
    copies, operand = Copies(torch.ones(16, 16), None, "left"), Operand(format="int8", scaling=Scaling.parse(word))
    assert (copies.take(operand, -1) is copies.take(operand, -2)) == (word in ("tensor", "8x8"))


def _write(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.add_(1.0)


def _swap(weight: nn.Parameter) -> None:
    weight.data = weight.data + 1.0


@pytest.mark.parametrize("change", [_write, _swap])
def test_weights_are_quantized_once_a_version(change: Callable[[nn.Parameter], None]) -> None:
    cache, weight, operand = QuantizedWeights(), nn.Parameter(torch.randn(4, 8)), Operand(format="int8")
    first = cache.find(weight, operand, -1)
    assert cache.find(weight, operand, -1) is first
    assert cache.find(weight, operand, -2) is not first
    change(weight)
    second = cache.find(weight, operand, -1)
    assert isinstance(second, ScaledTensor)
    assert torch.equal(second.dequantize(), quantize(weight, "int8").dequantize())
    assert len(cache) == 1, "copies of what the weight was are dropped"


def test_quantized_weights_end_with_the_weight_and_when_cleared() -> None:
    cache, weight, operand = QuantizedWeights(), nn.Parameter(torch.randn(4, 8)), Operand(format="int8")
    first = cache.find(weight, operand, -1)
    weight.data.mul_(3)  # seen by nobody
    assert cache.find(weight, operand, -1) is first
    cache.clear()
    assert cache.find(weight, operand, -1) is not first
    del weight
    gc.collect()
    assert len(cache) == 0


@pytest.mark.parametrize(
    ("operand", "text"),
    [
        (Operand(format="fp8_e4m3", scaling=Scaling.parse("delayed")), "delayed scaling"),
        (Operand(format="fp8_e4m3", mode="stochastic"), "stochastic rounding"),
    ],
)
def test_what_needs_a_state_says_so(operand: Operand, text: str) -> None:
    with pytest.raises(PlanError, match=f"{text} of a product's operand needs a state"):
        quantize_operand(torch.ones(2, 2), operand, -1)
    quantize_operand(torch.ones(2, 2), operand, -1, ProductState())


def test_a_state_goes_on_where_it_was_saved() -> None:
    operand = Operand(format="fp8_e4m3", mode="stochastic", scaling=Scaling.parse("delayed"))
    state, x = ProductState(seed=3, number=1), torch.linspace(-1, 1, 64).reshape(8, 8)
    quantize_operand(100 * x, operand, -1, state, "gradient")
    again = ProductState(seed=3, number=1)
    again.load_state_dict(state.state_dict())
    fresh = ProductState(seed=3, number=1)
    copies = [quantize_operand(x, operand, -1, s, "gradient") for s in (state, again, fresh)]
    numbers = [copy.dequantize() for copy in copies if isinstance(copy, ScaledTensor)]
    assert torch.equal(numbers[0], numbers[1])
    assert not torch.equal(numbers[0], numbers[2])


@pytest.mark.parametrize("word", ["tensor", "delayed"])
def test_scales_of_whole_tensors_are_agreed_on_across_ranks(word: str) -> None:
    state = ProductState(reduce=lambda amax: torch.maximum(amax, torch.tensor(448.0 * 4)))
    copy = quantize_operand(torch.ones(2, 2), Operand(format="fp8_e4m3", scaling=Scaling.parse(word)), -1, state)
    assert isinstance(copy, ScaledTensor)
    assert copy.scale.item() == 4


def test_what_is_not_finite_goes_through_a_product() -> None:
    for name, word in CASES:
        with seeded(0):
            x, w = torch.randn(24, 80), torch.randn(80, 16)
        x[5, 7] = math.inf
        y = multiply(quantize(x, name, word), quantize(w, name, word, dim=-2), torch.float32)
        assert not y[5].isfinite().any(), name
