"""Convolutions that go by patches or torch's way: beside fp64, beside torch's own, and where which way is taken."""

import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from halfstep.mechanisms.functions import FunctionMode, get_routes, put_back_routes
from halfstep.numerics import patches, routed_convolutions
from halfstep.numerics.patches import Window
from halfstep.numerics.routed_convolutions import ROUTES, conv2d, conv_transpose2d, explain_conv2d, find_route
from helpers import seeded
from images import TOLERANCE, make_inputs, require_close

pytestmark = pytest.mark.usefixtures("fresh_routes")


@pytest.fixture
def fresh_routes() -> Iterator[None]:
    ROUTES.clear()
    yield
    ROUTES.clear()


@pytest.fixture
def by_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape, however small, takes patches."""
    monkeypatch.setattr(patches, "LEAST_WORK", 0)
    monkeypatch.setattr(routed_convolutions, "measure_route", lambda _: {"patches": 0.0, "torch": 1.0})


def differentiate(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    out = function(*inputs, **options)
    with seeded(1):
        gradient = torch.randn(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], gradient)]


@pytest.mark.usefixtures("by_patches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1}, {"stride": 2, "padding": (1, 0)}, {"dilation": (2, 1)}, {"stride": [2], "padding": [1]}],
)
def test_output_and_gradients_are_those_of_torch(
    dtype: torch.dtype, order: torch.memory_format, options: dict[str, Any]
) -> None:
    inputs = make_inputs(dtype, order=order)
    found, right = differentiate(conv2d, inputs, **options), differentiate(F.conv2d, inputs, **options)
    assert [t.stride() for t in found] == [t.stride() for t in right]
    assert "_Convolution" in type(found[0].grad_fn).__name__
    wide = differentiate(F.conv2d, tuple(t.detach().double().requires_grad_() for t in inputs), **options)
    for mine, exact in zip(found, wide, strict=True):
        require_close(mine, exact)
    if dtype == torch.float32:
        assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])


@pytest.mark.usefixtures("by_patches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1}, {"stride": 2, "padding": (1, 0), "output_padding": (1, 0)}, {"stride": (1, 2), "dilation": 2}],
)
def test_transposed_convolutions_have_the_gradients_of_torch(
    dtype: torch.dtype, order: torch.memory_format, options: dict[str, Any]
) -> None:
    x, w, b = make_inputs(dtype, channels=5, outputs=5, order=order)  # its weight is [C, O, kernel, kernel]
    w, b = w[:, :3].detach().contiguous(memory_format=order).requires_grad_(), b[:3].detach().requires_grad_()
    inputs = (x, w, b)
    found, right = (differentiate(f, inputs, **options) for f in (conv_transpose2d, F.conv_transpose2d))
    assert "_Convolution" in type(found[0].grad_fn).__name__ and "_Convolution" not in type(right[0].grad_fn).__name__
    assert [t.stride() for t in found] == [t.stride() for t in right]
    wide = differentiate(F.conv_transpose2d, tuple(t.detach().double().requires_grad_() for t in inputs), **options)
    for mine, exact in zip(found, wide, strict=True):
        require_close(mine, exact)
    if dtype == torch.float32:
        assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])


@pytest.mark.parametrize("routed", [set(c) for n in (1, 2, 3) for c in itertools.combinations(patches.PRODUCTS, n)])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_each_product_goes_its_own_way(monkeypatch: pytest.MonkeyPatch, routed: set[str], name: str) -> None:
    asked: list[str] = []

    def compute(product: Any, *arguments: Any) -> Tensor:
        asked.append(product)
        return computed(product, *arguments)

    computed = routed_convolutions.compute_by_patches
    monkeypatch.setattr(routed_convolutions, "compute_by_patches", compute)
    monkeypatch.setattr(routed_convolutions, "find_route", lambda *a: "patches" if a[-1] in routed else "torch")
    inputs = make_inputs(torch.bfloat16, channels=5, order=torch.channels_last)
    found = differentiate(getattr(routed_convolutions, name), inputs, padding=1, dilation=2)
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    for mine, exact in zip(found, differentiate(getattr(F, name), wide, padding=1, dilation=2), strict=True):
        require_close(mine, exact)
    assert set(asked) == routed and len(asked) == len(routed)


@pytest.mark.parametrize(
    ("window", "route"),
    [
        (Window((1, 1), (1, 1), (1, 1)), "patches"),
        (Window((2, 1), (1, 1), (1, 1)), "torch"),  # a stride
        (Window((1, 1), (3, 1), (1, 1)), "torch"),  # more around the images than the kernel reaches
        (Window((1, 1), (3, 1), (2, 2)), "patches"),
    ],
)
@pytest.mark.usefixtures("by_patches")
def test_larger_images_are_made_by_patches_where_the_stride_is_1(window: Window, route: str) -> None:
    x, w, _ = make_inputs(torch.bfloat16, channels=5)
    assert find_route(x, w, window, torch.bfloat16, "grad_input") == route
    assert find_route(x, w, window, torch.bfloat16, "output") == "patches"
    turned = window._replace(output_padding=(0, 0))
    assert find_route(x, w, turned, torch.bfloat16, "output") == route
    assert find_route(x, w, turned, torch.bfloat16, "grad_input") == "patches"
    assert find_route(x, w, window._replace(output_padding=(1, 0)), torch.bfloat16, "output") == "torch"


@pytest.mark.usefixtures("by_patches")
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [3, 7])
def test_an_output_may_be_written_to(name: str, order: torch.memory_format, size: int) -> None:
    x, w, b = make_inputs(torch.bfloat16, size=size, channels=5, order=order)
    x = x[..., :size].detach().contiguous(memory_format=order).requires_grad_()  # 1 x 1 places of the smaller size
    found, right = (
        differentiate(lambda *a, f=f: f(*a).relu_(), (x, w, b))
        for f in (getattr(routed_convolutions, name), getattr(F, name))
    )
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
        assert one.stride() == other.stride()


LAST = torch.channels_last


@pytest.mark.usefixtures("by_patches")
@pytest.mark.parametrize(
    ("cut", "kernel", "weight_order"),
    [
        (lambda x: x[:, :4], 3, torch.contiguous_format),
        (lambda x: x[:, :4, 1:-1, 1:-1], 3, LAST),
        (lambda x: x[::2, :4], 3, torch.contiguous_format),
        (lambda x: x[:, 1:5], 1, LAST),
        (lambda x: x[:, :4].contiguous(), 3, LAST),
        (lambda x: x[:, :4].contiguous()[..., 1:], 3, torch.contiguous_format),
    ],
)
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_orders_of_memory_are_those_of_torch(
    cut: Callable[[Tensor], Tensor], kernel: int, weight_order: torch.memory_format, name: str
) -> None:
    x = cut(make_inputs(torch.bfloat16, channels=8, order=LAST)[0].detach()).requires_grad_()
    w = make_inputs(torch.bfloat16, channels=4, outputs=4, kernel=kernel, order=weight_order)[1]
    found, right = (f(x, w) for f in (getattr(routed_convolutions, name), getattr(F, name)))
    assert "_Convolution" in type(found.grad_fn).__name__ and found.stride() == right.stride()
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in (found, right)]  # an expanded gradient
    assert grads[0].stride() == grads[1].stride()


@pytest.mark.usefixtures("by_patches")
@pytest.mark.parametrize("options", [{"dilation": 2}, {"stride": 2, "dilation": 3}])
def test_an_output_padding_of_a_stride_or_more_is_torchs(options: dict[str, Any]) -> None:
    x, w, _ = make_inputs(torch.bfloat16, channels=5)
    added = options.get("stride", 1)
    found, right = (
        differentiate(f, (x, w), output_padding=added, **options) for f in (conv_transpose2d, F.conv_transpose2d)
    )
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


@pytest.mark.usefixtures("by_patches")
def test_batched_gradients_are_torchs() -> None:
    x, w, _ = make_inputs(torch.bfloat16)
    out = conv2d(x, w)
    batch = torch.ones(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, (x, w), batch, is_grads_batched=True, retain_graph=True)
    for found, right in zip(batched, torch.autograd.grad(out, (x, w), batch[0]), strict=True):
        require_close(found[2], right)


@pytest.mark.usefixtures("by_patches")
def test_a_batch_or_a_bias_without_a_gradient_gets_none() -> None:
    x, w, b = make_inputs()
    out, grad = differentiate(conv2d, (x.detach(), w, b.detach()))
    assert "_Convolution" in type(out.grad_fn).__name__
    require_close(grad, differentiate(F.conv2d, (x.detach(), w, b.detach()))[1])


@pytest.mark.usefixtures("by_patches")
def test_under_autocast_all_are_cast_and_weights_keep_their_gradient() -> None:
    inputs = make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = conv2d(*inputs)
    assert out.dtype == torch.bfloat16 and "_Convolution" in type(out.grad_fn).__name__
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    assert all(g.dtype == torch.float32 for g in grads)
    with torch.autocast("cpu", torch.float16):
        assert "_Convolution" not in type(conv2d(*inputs).grad_fn).__name__


@pytest.mark.usefixtures("by_patches")
def test_a_backward_pass_inside_of_autocast_keeps_the_dtype_of_the_forward_pass() -> None:
    x, w, b = make_inputs()
    out, right = (function(x, w, b).square().sum() for function in (conv2d, F.conv2d))
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(out, w)
    require_close(found, torch.autograd.grad(right, w)[0])


@pytest.mark.usefixtures("by_patches")
def test_second_derivatives_are_torchs() -> None:
    inputs = make_inputs(torch.float32)

    def penalise(function: Callable[..., Tensor]) -> list[Tensor]:
        (first,) = torch.autograd.grad(function(*inputs, padding=1).square().sum(), inputs[0], create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), inputs[:2]))

    for found, right in zip(penalise(conv2d), penalise(F.conv2d), strict=True):
        require_close(found, right)


@pytest.mark.usefixtures("by_patches")
def test_a_layer_in_the_block_goes_by_patches_and_a_checkpointed_one_too() -> None:
    layer, x = nn.Conv2d(3, 5, 3), make_inputs()[0]
    with FunctionMode() as mode:
        out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        assert list(mode.called) == [F.conv2d]
        out.sum().backward()
    by_mode, layer.weight.grad = layer.weight.grad, None
    layer(x).sum().backward()
    assert by_mode is not None and layer.weight.grad is not None
    require_close(by_mode, layer.weight.grad)


@pytest.mark.usefixtures("by_patches")
def test_what_is_left_to_torch_says_why() -> None:
    x, w, b = make_inputs()
    assert explain_conv2d(x, w) == ""
    assert explain_conv2d(x, w.detach()) == "no gradient of the weight"
    assert explain_conv2d(x.double(), w) == "dtype float64"
    assert explain_conv2d(x[0], w) == explain_conv2d(x, w, groups=3) == "groups, or images without a batch"
    left: list[tuple[tuple[Tensor, Tensor], dict[str, Any]]] = [((x[0], w), {}), ((x, w[:3, :1]), {"groups": 3})]
    for args, options in left:
        out = conv2d(*args, **options)
        assert torch.equal(out, F.conv2d(*args, **options)) and "_Convolution" not in type(out.grad_fn).__name__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of even kernels, once a process
        assert "_Convolution" not in type(conv2d(x, w[..., :2], padding="same").grad_fn).__name__
    with pytest.raises(RuntimeError, match="strided"):
        conv2d(x, w, padding="same", stride=2)
    assert torch.equal(conv_transpose2d(x, w[:3, :1], groups=3), F.conv_transpose2d(x, w[:3, :1], groups=3))
    with torch.no_grad():
        assert torch.equal(conv2d(x, w, b), F.conv2d(x, w, b))
    with pytest.raises(RuntimeError, match="same"):
        conv2d(x, w.to(torch.bfloat16))


@pytest.mark.usefixtures("by_patches")
@pytest.mark.parametrize(
    "options",
    [
        {"stride": np.int64(2)}, {"stride": torch.tensor(2)}, {"stride": 0}, {"stride": -1}, {"stride": (1, 2, 3)},
        {"stride": 1.5}, {"stride": (1.5, 1)}, {"stride": ()}, {"stride": None}, {"stride": "2"}, {"stride": True},
        {"dilation": 0},
        {"padding": "foo"}, {"padding": None}, {"padding": -1}, {"padding": "same", "stride": 0}, {"bias": 3},
        {"bias": torch.ones(5).double()}, {"bias": torch.ones(5).bfloat16()}, {"bias": torch.ones(4)}, {"dilation": 9},
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_cast", [False, True])
@pytest.mark.parametrize("names", ["conv2d", "conv_transpose2d"])
def test_torch_reads_or_refuses_what_is_unusual(options: dict[str, Any], is_cast: bool, names: str) -> None:
    x, w, _ = make_inputs(channels=5)

    def call(function: Callable[..., Tensor]) -> tuple[type, str] | Tensor:
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
                return function(x, w, **options)
        except Exception as error:
            return type(error), re.sub(r" \(position \d+\)", "", str(error))[:40]

    found, right = call(getattr(routed_convolutions, names)), call(getattr(F, names))
    if isinstance(right, Tensor):
        assert isinstance(found, Tensor) and torch.equal(found, right)
    else:
        assert found == right


@pytest.mark.usefixtures("by_patches")
def test_a_first_layer_asks_torch_for_no_gradient_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = make_inputs()
    out = conv2d(x.detach(), w, b)
    monkeypatch.delattr(routed_convolutions, "_convolve_backward")
    out.sum().backward()
    assert w.grad is not None and b.grad is not None


class TestRoutes:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(patches, "LEAST_WORK", 0)

    @pytest.mark.parametrize(("ratio", "route"), [(0.5, "patches"), (0.95, "torch"), (2.0, "torch")])
    def test_patches_are_taken_where_they_win_clearly(
        self, monkeypatch: pytest.MonkeyPatch, ratio: float, route: str
    ) -> None:
        calls = itertools.count()

        def measure(ways: Any) -> dict[str, float]:
            next(calls)
            for way in ways.values():
                way()
            return {"patches": ratio, "torch": 1.0}

        monkeypatch.setattr(routed_convolutions, "measure_route", measure)
        for _ in range(2):
            out = conv2d(*make_inputs())
        assert list(ROUTES.values()) == [route] and next(calls) == 1
        assert ("_Convolution" in type(out.grad_fn).__name__) == (route == "patches")

    def test_timing_is_real_and_leaves_no_trace(self) -> None:
        inputs = make_inputs()
        conv2d(*inputs)
        assert len(ROUTES) == 1 and all(t.grad is None for t in inputs)

    def test_little_work_and_large_patches_are_torchs_untimed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, w, _ = make_inputs()
        window = Window((1, 1), (0, 0), (1, 1))
        monkeypatch.setattr(patches, "MOST_BYTES", 2 * 5 * 6 * 27 * 4 - 1)
        assert find_route(x, w, window, torch.float32) == "torch" and not ROUTES
        monkeypatch.setattr(patches, "MOST_BYTES", 2 * 5 * 6 * 27 * 4)
        monkeypatch.setattr(patches, "LEAST_WORK", 2 * 2 * 5 * 6 * 27 * 5 + 1)
        assert find_route(x, w, window, torch.float32) == "torch" and not ROUTES
        monkeypatch.setattr(patches, "LEAST_WORK", 2 * 2 * 5 * 6 * 27 * 5)
        find_route(x, w, window, torch.float32)
        assert len(ROUTES) == 1

    def test_ever_new_sizes_are_timed_a_few_times_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(routed_convolutions, "MOST_SIZES", 2)
        for size in (5, 6, 7, 8, 5):
            conv2d(*make_inputs(size=size))
        assert [shape.images for shape in ROUTES] == ["2x3x5x6", "2x3x6x7"]
        conv2d(*make_inputs(size=8), padding=1)
        assert len(ROUTES) == 3

    def test_a_run_that_is_to_repeat_itself_takes_what_it_was_given_and_times_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(routed_convolutions, "measure_route", lambda _: {"patches": 0.0, "torch": 1.0})
        torch.use_deterministic_algorithms(True)
        try:
            assert "_Convolution" not in type(conv2d(*make_inputs()).grad_fn).__name__ and not ROUTES
            torch.use_deterministic_algorithms(False)
            conv2d(*make_inputs())
            torch.use_deterministic_algorithms(True)
            assert "_Convolution" in type(conv2d(*make_inputs()).grad_fn).__name__
        finally:
            torch.use_deterministic_algorithms(False)

    def test_products_that_may_be_rounded_are_not_taken_for_convolutions_in_fp32(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(routed_convolutions, "measure_route", lambda _: {"patches": 0.0, "torch": 1.0})
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            assert "_Convolution" not in type(conv2d(*make_inputs()).grad_fn).__name__ and not ROUTES
        finally:
            torch.set_float32_matmul_precision(before)
        assert "_Convolution" in type(conv2d(*make_inputs()).grad_fn).__name__

    def test_precision_that_torch_keeps_backend_by_backend_may_round_products(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]  # torch builds its modules as classes
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
        try:
            with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
                torch.get_float32_matmul_precision()
            assert "_Convolution" not in type(conv2d(*make_inputs()).grad_fn).__name__ and not ROUTES
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before  # type: ignore[attr-defined]

    def test_routes_are_saved_and_put_back(self) -> None:
        conv2d(*make_inputs())
        saved, before = get_routes(), dict(ROUTES)
        ROUTES.clear()
        put_back_routes(saved)
        assert before == ROUTES


@pytest.mark.usefixtures("by_patches")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # both of torch's own while it compiles
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self) -> None:
        torch._dynamo.reset()

    @staticmethod
    def list_operators(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[str]:
        """The names of the operators in the graph of the backward pass, which runs once."""
        seen: list[str] = []

        def record(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Any:
            seen[:] = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        compiled: Any = torch.compile(
            function, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True
        )
        with FunctionMode():
            compiled(*inputs).sum().backward()
        return seen

    @pytest.mark.parametrize("function", [F.conv2d, F.conv_transpose2d])
    @pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("cast", [None, torch.bfloat16])
    def test_output_and_gradients_are_those_of_torch(
        self, function: Callable[..., Tensor], order: torch.memory_format, cast: torch.dtype | None
    ) -> None:
        x, w, b = make_inputs(channels=5, order=order)

        def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            with torch.autocast("cpu", cast, enabled=cast is not None):
                return function(x.relu(), w, b, stride=2, padding=1)

        compiled: Any = torch.compile(run, fullgraph=True)
        with FunctionMode():
            found = differentiate(compiled, (x, w, b))
        for one, right in zip(found, differentiate(run, (x, w, b)), strict=True):
            assert one.dtype == right.dtype
            error = (one.double() - right.double()).abs().max() / right.double().abs().max()
            assert error <= TOLERANCE[cast or one.dtype]
        assert set(ROUTES.values()) == {"patches"}

    def test_the_gradient_of_a_weight_is_a_product(self) -> None:
        x, w, b = make_inputs()
        names = self.list_operators(lambda x, w, b: F.conv2d(x, w, b), (x.detach(), w, b))
        assert "aten.mm.default" in names and "aten.convolution_backward.default" not in names

    def test_only_the_gradient_of_a_weight_goes_by_patches(self) -> None:
        """The compiler would keep the patches of the output for those of the weight's gradient."""
        x, w, b = make_inputs(torch.bfloat16)

        def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.relu_(F.conv2d(x, w, b))

        compiled: Any = torch.compile(run, backend="aot_eager", fullgraph=True)
        with FunctionMode():
            found = differentiate(compiled, (x, w, b))
        assert [shape.product for shape in ROUTES] == ["grad_weight"]
        for one, right in zip(found, differentiate(conv2d, (x, w, b)), strict=True):
            assert one.shape == right.shape

    def test_a_size_that_is_kept_open_is_left_to_torch(self) -> None:
        _, w, b = make_inputs()

        def run(x: Tensor) -> Tensor:
            return F.conv2d(x, w, b)

        compiled: Any = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
        for size in (6, 9):
            x = make_inputs(size=size)[0]
            with FunctionMode():
                out = compiled(x)
            assert torch.equal(out, F.conv2d(x, w, b))
        assert not ROUTES

    @pytest.mark.parametrize("function", [F.conv2d, F.conv_transpose2d])
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_in_fp32_inside_of_autocast_the_gradient_is_fp32(
        self, function: Callable[..., Tensor], backend: str
    ) -> None:
        x, w, b = make_inputs(channels=5)

        def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return function(x, w, b)

        compiled: Any = torch.compile(run, backend=backend, fullgraph=True)
        with FunctionMode(), torch.autocast("cpu", torch.bfloat16):
            found = differentiate(compiled, (x, w, b))
        for one, right in zip(found, differentiate(run, (x, w, b)), strict=True):
            require_close(one, right)

    def test_a_padding_that_is_kept_open_is_left_to_torch(self) -> None:
        x, w, b = make_inputs()

        def run(x: Tensor, w: Tensor, b: Tensor, padding: int) -> Tensor:
            return F.conv2d(x, w, b, padding=padding)

        compiled: Any = torch.compile(run, backend="aot_eager", fullgraph=True)
        for padding in (1, 2, 3):
            with FunctionMode():
                out = compiled(x, w, b, padding)
            assert torch.equal(out, run(x, w, b, padding))
