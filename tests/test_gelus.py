"""GELU in bf16: every number beside fp64, in value and derivative; layouts, edges, and what is left to torch."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from halfstep.mechanisms.functions import FunctionMode
from halfstep.numerics import gelus as module
from halfstep.numerics.gelus import KERNELS, explain_gelu, gelu
from helpers import seeded

pytestmark = pytest.mark.skipif(KERNELS.library.functions is None, reason=KERNELS.library.why)
BF16 = torch.bfloat16
NUMBERS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of any size go by kernel."""
    monkeypatch.setattr(module, "LEAST_NUMBERS", 0)


def differentiate(x: Tensor, gradient: Tensor, approximate: str = "none") -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = gelu(x, approximate=approximate)
    assert "_Gelu" in type(y.grad_fn).__name__
    return y.detach(), torch.autograd.grad(y, x, gradient)[0]


def find_truth(x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative in fp64, without a difference of large numbers."""
    wide = x.double()
    below = torch.tensor([math.erfc(-number / math.sqrt(2)) / 2 for number in wide.tolist()], dtype=torch.float64)
    return wide * below, below + wide * torch.exp(-(wide**2) / 2) / math.sqrt(2 * math.pi)


def test_every_value_is_the_nearest_and_every_slope_is_rounded_once() -> None:
    x = NUMBERS[NUMBERS.isfinite()]
    found, truth = differentiate(x, torch.ones_like(x)), find_truth(x)
    unit = torch.exp2(truth[0].abs().clamp_min(2.0**-126).log2().floor() - 7)
    assert bool(((found[0].double() - truth[0]).abs() <= unit / 2).all())
    assert torch.equal(found[1], truth[1].float().to(BF16))
    assert not torch.equal(F.gelu(x), truth[0].to(BF16))


def test_the_approximation_by_tanh_is_torchs_in_fp64() -> None:
    x = NUMBERS[NUMBERS.isfinite()]
    wide = x.double().requires_grad_()
    truth = F.gelu(wide, approximate="tanh")
    (slope,) = torch.autograd.grad(truth.sum(), wide)
    values, slopes = differentiate(x, torch.ones_like(x), "tanh")
    assert torch.equal(values, truth.detach().to(BF16)) and torch.equal(slopes, slope.float().to(BF16))


def test_a_gradient_is_multiplied_before_it_is_rounded() -> None:
    with seeded(0):
        x, gradient = (torch.randn(5000).to(BF16) for _ in range(2))
    slopes = differentiate(x, gradient)[1]
    assert torch.equal(slopes, (find_truth(x)[1].float() * gradient.float()).to(BF16))


def test_numbers_that_are_not_finite() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=BF16)
    values, slopes = differentiate(x, torch.ones_like(x))
    assert torch.equal(values.nan_to_num(7.0, posinf=8.0), torch.tensor([7.0, 8.0, 7.0, 0.0], dtype=BF16))
    assert torch.equal(slopes.nan_to_num(7.0), torch.tensor([7.0, 7.0, 7.0, 0.5], dtype=BF16))
    assert math.copysign(1.0, values[3].item()) == -1.0


def arrange(x: Tensor, order: str) -> Tensor:
    """The same numbers in another order of memory, where their shape allows it."""
    match order:
        case "transposed" if x.ndim > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        case "strided" if x.ndim:
            return torch.stack([x, x], -1)[..., 0]
        case "expanded" if x.numel() > 1:
            return x[:1].expand_as(x)
        case "channels_last" if x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
    return x


@pytest.mark.parametrize("shape", [(), (0,), (3, 5, 2, 7), (2, 3, 4, 5000)])
@pytest.mark.parametrize("order", ["contiguous", "transposed", "strided", "expanded", "channels_last"])
@pytest.mark.parametrize("order_of_gradient", ["contiguous", "expanded", "channels_last"])
def test_any_layout(shape: tuple[int, ...], order: str, order_of_gradient: str) -> None:
    with seeded(0):
        x, gradient = torch.randn(shape).to(BF16), torch.randn(shape).to(BF16)
    x, gradient = arrange(x, order), arrange(gradient, order_of_gradient)
    values, slopes = differentiate(x, gradient)
    plain, plain_slopes = differentiate(x.clone(memory_format=torch.contiguous_format), gradient.contiguous())
    assert torch.equal(values, plain) and torch.equal(slopes, plain_slopes)
    assert values.stride() == F.gelu(x).stride() or not values.numel()


def test_second_derivatives_are_torchs() -> None:
    with seeded(0):
        x = torch.randn(50).to(BF16).requires_grad_()
    found = []
    for function in (gelu, F.gelu):
        (slope,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x)[0])
    torch.testing.assert_close(*found)


def test_what_is_left_to_torch_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8).to(BF16)
    assert explain_gelu(x) == ""
    assert explain_gelu(x.float()) == "dtype float32"
    monkeypatch.setattr(module, "LEAST_NUMBERS", 9)
    assert explain_gelu(x) == "approximate none, 8 numbers"
    assert torch.equal(gelu(x), F.gelu(x))
    with pytest.raises(RuntimeError, match="approximate"):
        gelu(x, approximate="erf")


def test_modules_in_the_block_use_it() -> None:
    x = NUMBERS[NUMBERS.isfinite()]
    with FunctionMode() as mode:
        ours = nn.GELU()(x)
    assert list(mode.called) == [F.gelu]
    assert torch.equal(ours, gelu(x)) and not torch.equal(ours, F.gelu(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own while it compiles
@pytest.mark.parametrize(
    ("backend", "approximate"), [("aot_eager", "none"), ("aot_eager", "tanh"), ("inductor", "none")]
)
def test_compiled_code_looks_up_too(backend: str, approximate: Literal["none", "tanh"]) -> None:
    torch._dynamo.reset()
    x, gradient = NUMBERS[NUMBERS.isfinite()].view(-1, 2), torch.tensor([1.0, -3.0], dtype=BF16)
    compiled: Any = torch.compile(nn.GELU(approximate), backend=backend, fullgraph=True)
    leaf = x.clone().requires_grad_()
    with FunctionMode():
        values = compiled(leaf)
    (slopes,) = torch.autograd.grad(values, leaf, gradient.expand_as(x))
    right = differentiate(x, gradient.expand_as(x), approximate)
    assert torch.equal(values, right[0]) and torch.equal(slopes, right[1])


def test_compiled_code_leaves_to_torch_what_eager_code_does(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    x, out = torch.randn(8).to(BF16), torch.empty(8, dtype=BF16)
    compiled: Any = torch.compile(F.gelu, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(module, "LEAST_NUMBERS", 9)
    with FunctionMode():
        assert torch.equal(compiled(x), F.gelu(x))
        assert torch.equal(compiled(x.float()), F.gelu(x.float()))
        assert torch.equal(compiled(x, out=out), F.gelu(x)) and torch.equal(out, F.gelu(x))


def test_sizes_that_depend_on_data_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(module, "LEAST_NUMBERS", 1 << 16)

    def run(x: Tensor, chosen: Tensor) -> Tensor:
        return F.gelu(x[chosen])

    compiled: Any = torch.compile(run, backend="aot_eager", fullgraph=True)
    x, chosen = torch.randn(1 << 15, 4).to(BF16), torch.arange(1 << 15) % 2 == 0
    with FunctionMode(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = compiled(x, chosen)
    assert torch.equal(found, F.gelu(x[chosen]))


def test_without_a_compiled_backward_pass_hooks_and_second_derivatives_are_torchs() -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(F.gelu, backend="eager", fullgraph=True)
    x = torch.linspace(-3, 3, 64).to(BF16).requires_grad_()
    with FunctionMode(), torch.autograd.graph.saved_tensors_hooks(lambda t: t.float(), lambda t: t):
        y = compiled(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], differentiate(x, torch.ones_like(x))[1])
    found = []
    for function in (compiled, F.gelu):
        with FunctionMode() if function is compiled else nullcontext():
            y = function(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_tables_are_made_wherever_it_is_called_first(approximate: str) -> None:
    x = torch.randn(8).to(BF16).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return gelu(x * 2, approximate=approximate)

    module.make_tables.cache_clear()
    with torch.inference_mode():
        out = run(x)
    module.make_tables.cache_clear()
    kept: Any = checkpoint(run, x, use_reentrant=False)
    assert torch.equal(kept, out)
    assert torch.equal(torch.autograd.grad(kept.sum(), x)[0], torch.autograd.grad(run(x).sum(), x)[0])


def test_kernels_are_tried_in_inference_mode_too(tmp_path: Path) -> None:
    module.make_tables.cache_clear()
    with torch.inference_mode():
        assert KERNELS.find(tmp_path).functions is not None


def test_what_hooks_have_unpacked_in_another_dtype_is_torchs() -> None:
    x = torch.linspace(-3, 3, 64).to(BF16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
        y = gelu(x)
    (slopes,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slopes, differentiate(x, torch.ones_like(x))[1])


def test_batched_gradients() -> None:
    x = torch.linspace(-3, 3, 8).to(BF16).requires_grad_()
    (jacobian,) = torch.autograd.grad(gelu(x), x, torch.eye(8, dtype=BF16), is_grads_batched=True)
    torch.testing.assert_close(jacobian.diagonal(), differentiate(x, torch.ones_like(x))[1])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_backward_pass_is_torchs() -> None:
    x = torch.linspace(-3, 3, 64).to(BF16).requires_grad_()
    y = gelu(x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, differentiate(x, torch.ones_like(x))[1])


def test_a_given_output_is_written_by_torch() -> None:
    x, out = torch.randn(8).to(BF16), torch.empty(8, dtype=BF16)
    with FunctionMode():
        F.gelu(x, out=out)  # type: ignore[call-arg]  # which torch takes, and hides
    assert torch.equal(out, F.gelu(x))
