"""Fast functions in compiled code: the same bits as beside it, in one graph, with the same noise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from halfstep.mechanisms.functions import FunctionMode
from halfstep.numerics import dropouts, losses, scaled_attention, traced
from helpers import seeded

NATIVE = all(m.KERNELS.library.functions is not None for m in (dropouts, losses, scaled_attention))
pytestmark = pytest.mark.skipif(not NATIVE, reason="no C compiler")
Compute = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def attend(x: Tensor, weight: Tensor, p: float) -> Tensor:
    q, k, v = (x @ weight).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    return F.dropout(mixed.transpose(1, 2).flatten(-2), p, p > 0)


def compute(x: Tensor, weight: Tensor, target: Tensor, p: float) -> Tensor:
    """[4, length, 16], [16, 48], [4 * length], by every function that has a fast equal."""
    return F.cross_entropy(attend(x, weight, p).flatten(0, 1), target, label_smoothing=0.1)


def compute_checkpointed(x: Tensor, weight: Tensor, target: Tensor, p: float) -> Tensor:
    mixed: Any = checkpoint(attend, x, weight, p, use_reentrant=False)
    return F.cross_entropy(mixed.flatten(0, 1), target, label_smoothing=0.1)


def take(function: Compute, p: float, dtype: torch.dtype, length: int = 12) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the weight), always with the same numbers and the same noise."""
    with seeded(0):
        x, weight = torch.randn(4, length, 16), torch.randn(16, 48, requires_grad=True)
        target = torch.randint(16, (4 * length,))
    with seeded(1), FunctionMode():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = function(x, weight, target, p)
        loss.backward()
    assert weight.grad is not None
    return loss.detach(), weight.grad


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Attention goes by kernel, whatever is faster today; counts how often that was asked."""
    asked = []

    def measure_route(*_: Any) -> dict[str, float]:
        asked.append(1)
        return {"kernel": 0.0, "torch": 1.0}

    monkeypatch.setattr(scaled_attention, "ROUTES", {})
    monkeypatch.setattr(scaled_attention, "measure_route", measure_route)
    return asked


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_computes_the_same(p: float, dtype: torch.dtype, routed: list[int]) -> None:
    compiled: Any = torch.compile(compute, backend="aot_eager", fullgraph=True)
    wide = dtype == torch.float32  # products around the kernels are taken in another order
    for found, right in zip(take(compiled, p, dtype), take(compute, p, dtype), strict=True):
        assert torch.allclose(found, right, rtol=1e-5 if wide else 0.02, atol=1e-6 if wide else 1e-4)
    assert len(routed) == (p == 0.0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own while it compiles
def test_inductor_computes_the_same(routed: list[int]) -> None:
    compiled: Any = torch.compile(compute, fullgraph=True)
    for found, right in zip(take(compiled, 0.2, torch.bfloat16), take(compute, 0.2, torch.bfloat16), strict=True):
        assert torch.allclose(found, right, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("function", [compute, compute_checkpointed])
def test_the_backward_pass_has_the_noise_of_the_forward_pass(function: Compute) -> None:
    """Along its gradient a loss must grow by the square of it, which it does not with other noise."""
    compiled: Any = torch.compile(function, backend="aot_eager", fullgraph=True)
    gradient, step = take(compiled, 0.4, torch.float32)[1], 1e-3

    def measure(sign: float) -> Tensor:
        def move(x: Tensor, weight: Tensor, target: Tensor, p: float) -> Tensor:
            loss: Tensor = compiled(x, weight + sign * step * gradient, target, p)
            return loss

        return take(move, 0.4, torch.float32)[0]

    ahead, behind = measure(1.0), measure(-1.0)
    assert float(ahead - behind) / (2 * step) == pytest.approx(float(gradient.square().sum()), rel=0.002)


def list_calls(function: Compute, *lengths: int, p: float) -> list[str]:
    """The names that the compiler has written into its last graph."""
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        seen[:] = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return graph

    compiled: Any = torch.compile(function, backend=record, fullgraph=True)
    for length in lengths:
        take(compiled, p, torch.bfloat16, length)
    return seen


def test_kernels_are_operators_of_the_graph(routed: list[int]) -> None:
    names = " ".join(list_calls(compute, 12, p=0.2))
    assert all(f"halfstep.{name}" in names for name in ("drop", "attend", "measure_losses"))
    assert names.count("halfstep.draw_drop") == 2


def test_where_sizes_are_open_attention_without_dropout_is_torchs(routed: list[int]) -> None:
    fixed = " ".join(list_calls(compute, 12, p=0.0))
    assert "halfstep.attend" in fixed and "scaled_dot_product_attention" not in fixed
    torch._dynamo.reset()
    opened = " ".join(list_calls(compute, 13, 14, 15, p=0.0))
    assert "halfstep.attend" not in opened and "scaled_dot_product_attention" in opened
    assert "halfstep.measure_losses" in opened
    torch._dynamo.reset()
    assert "halfstep.attend" in " ".join(list_calls(compute, 13, 14, p=0.2))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_two_calls_draw_two_noises() -> None:
    def drop_twice(x: Tensor) -> tuple[Tensor, Tensor]:
        return F.dropout(x), F.dropout(x)

    compiled: Any = torch.compile(drop_twice, fullgraph=True)
    with FunctionMode(), seeded(3):
        first, second = compiled(torch.ones(1000))
    with FunctionMode(), seeded(3):
        beside = drop_twice(torch.ones(1000))
    assert not torch.equal(first, second)
    assert torch.equal(first, beside[0]) and torch.equal(second, beside[1])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_calls_on_one_tensor_draw_two_noises_in_training(backend: str) -> None:
    def differ(x: Tensor) -> Tensor:
        return F.dropout(x) - F.dropout(x)

    compiled: Any = torch.compile(differ, backend=backend, fullgraph=True)
    with FunctionMode(), seeded(3):
        assert compiled(torch.ones(1000, requires_grad=True)).count_nonzero() > 300


def test_transforms_inside_of_compiled_code_are_left_to_torch() -> None:
    def measure(weight: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight, target)

    def run(weight: Tensor, x: Tensor, target: Tensor) -> Tensor:
        found: Tensor = torch.func.vmap(torch.func.grad(measure), (None, 0, 0))(weight, x, target)
        return found

    with seeded(0):
        weight, x, target = torch.randn(5, 4), torch.randn(3, 6, 5), torch.randint(4, (3, 6))
    compiled: Any = torch.compile(run, backend="aot_eager")
    with FunctionMode():
        torch.testing.assert_close(compiled(weight, x, target), run(weight, x, target))


def measure_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def test_a_wrong_class_is_torchs_own_error(routed: list[int]) -> None:
    compiled: Any = torch.compile(measure_loss, backend="aot_eager", fullgraph=True)
    with FunctionMode(), pytest.raises(IndexError, match="out of bounds"):
        compiled(torch.randn(3, 4), torch.tensor([0, 4, 1]))


def test_operators_are_what_torch_asks_of_operators() -> None:
    with seeded(0):
        x, words, target = torch.randn(6, 8, requires_grad=True), torch.tensor([19000, 5, 6]), torch.randint(8, (6,))
        q = torch.randn(2, 3, 8, requires_grad=True)
        gradient, weights, mask = torch.randn(2, 3, 8), torch.rand(2, 3, 3), torch.ones(3, 3).tril().bool()
    loss, rows, share = traced.measure_losses(x.detach(), target, -100, 0.1, "mean")
    for operator, arguments in (
        (traced.drop, (x, words)),
        (traced.measure_losses, (x, target, -100, 0.1, "mean")),
        (traced.write_gradients, (loss, x.detach(), target, rows, share, -100, 0.1)),
        (traced.attend, (q, q, q, mask, words, 0.5, False)),
        (traced.attend, (q, q, q, None, None, 0.5, True)),
        (traced.attend_backward, (gradient, *[q.detach()] * 3, weights, words, 0.5, False)),
        (traced.look_up_gelu, (x.detach().bfloat16().requires_grad_(), "none")),
        (traced.look_up_gelu_gradient, (x.detach().bfloat16(), x.detach().bfloat16().t().contiguous().t(), "tanh")),
    ):  # fmt: skip
        torch.library.opcheck(operator, arguments)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler hides it
def test_look_ups_with_sparse_gradients_are_made_beside_the_graphs() -> None:
    """With them in it, torch's compiler may fail in the backward pass."""
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def look_up(rows: Tensor, table: Tensor, bag: Tensor, weight: Tensor) -> Tensor:
        one = F.embedding(rows, table, sparse=True)
        several = F.embedding_bag(rows, bag, None, None, 2.0, False, "sum", True)
        return ((one.sum(1) + several) @ weight).tanh()

    with seeded(0):
        rows, weights = torch.randint(7, (5, 3)), [torch.randn(7, 4), torch.randn(7, 4), torch.randn(4, 2)]
    compiled: Any = torch.compile(look_up, backend=record)
    gradients: list[list[Any]] = []
    for function in (compiled, look_up):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        with FunctionMode():
            function(rows, *leaves).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert [gradient.is_sparse for gradient in gradients[0]] == [True, True, False]
    for found, right in zip(*gradients, strict=True):
        torch.testing.assert_close(found.to_dense(), right.to_dense())
    names = " ".join(seen)
    assert "tanh" in names and "embedding" not in names
    with torch.no_grad(), FunctionMode():
        compiled(rows, *weights)
    assert "embedding" in " ".join(seen)
