"""Fast functions: where they are put in place, where torch's own stay, and that a step computes the same with them."""

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import halfstep
from halfstep.conversion import convert
from halfstep.errors import PrecisionWarning
from halfstep.mechanisms.functions import FunctionMode, describe_functions, get_routes, put_back_routes
from halfstep.mechanisms.operators import OperatorMode
from halfstep.numerics import scaled_attention
from halfstep.plan import Plan, Rule
from helpers import seeded

FAST_FP32 = Plan(rules=(Rule(compute="fp32"),), functions="fast")
FAST_FP16 = Plan.parse("functions=fast\ncompute=fp16")
FAST_BF16 = Plan(rules=(Rule(compute="bf16", storage="bf16", master="split"),), functions="fast")


def count_calls(*functions: Callable[..., Any]) -> tuple[FunctionMode, list[str]]:
    """A mode that notes which of these are called, and calls them."""
    seen: list[str] = []

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(function.__name__)
            return function(*args, **kwargs)

        return call

    return FunctionMode({function: note(function) for function in functions}), seen


def test_functions_are_replaced_inside_the_block_alone_also_after_an_error() -> None:
    mode, seen = count_calls(F.dropout)
    with pytest.raises(ZeroDivisionError), mode:
        nn.Dropout()(torch.ones(3))
        raise ZeroDivisionError
    F.dropout(torch.ones(3))
    assert seen == ["dropout"]


@pytest.mark.parametrize(
    "module", [nn.MultiheadAttention(8, 2, 0.1, batch_first=True), nn.TransformerEncoderLayer(8, 2, 8)]
)
def test_functions_inside_of_attention_modules_are_seen(module: nn.Module) -> None:
    mode, seen = count_calls(F.scaled_dot_product_attention, F.dropout)
    x = torch.randn(2, 3, 8)
    with mode:
        _ = module(x, x, x, need_weights=False) if isinstance(module, nn.MultiheadAttention) else module(x)
    assert seen.count("scaled_dot_product_attention") == 1
    assert seen.count("dropout") == (0 if isinstance(module, nn.MultiheadAttention) else 3)


def test_other_threads_see_nothing_of_it() -> None:
    mode, seen = count_calls(F.dropout)
    with mode:
        thread = threading.Thread(target=lambda: F.dropout(torch.ones(3)))
        thread.start()
        thread.join()
    assert not seen


def test_subclasses_of_tensor_keep_torchs_own() -> None:
    class Other(Tensor):
        pass

    mode, seen = count_calls(F.dropout)
    with mode:
        F.dropout(torch.ones(3).as_subclass(Other))
    assert not seen


def test_compiled_code_has_no_replacements_but_those_it_can_trace() -> None:
    mode, seen = count_calls(F.cross_entropy)
    compiled = torch.compile(lambda x, y: F.cross_entropy(x, y), backend="aot_eager", fullgraph=True)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with mode:
        assert torch.allclose(compiled(x, y), F.cross_entropy(x, y))
    assert seen == ["cross_entropy"]  # the one beside


class Model(nn.Module):
    """Every function that has a fast equal, checkpointed or not."""

    def __init__(self, *, saves: bool) -> None:
        super().__init__()
        self.saves = saves
        self.token, self.qkv, self.head = nn.Embedding(11, 32), nn.Linear(32, 96), nn.Linear(32, 11)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2 if self.training else 0.0, is_causal=True)
        return x + F.dropout(mixed.transpose(1, 2).flatten(-2), 0.3, self.training)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.token(x)
        stream = checkpoint(self.attend, stream, use_reentrant=False) if self.saves else self.attend(stream)
        logits: Tensor = self.head(stream)
        return logits


def take_gradients(plan: Plan, *, saves: bool) -> list[Tensor]:
    with seeded(0):
        model, x, y = Model(saves=saves), torch.randint(11, (4, 9)), torch.randint(11, (36,))
    stepper = halfstep.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), plan)
    before = [p.detach().float().clone() for p in model.parameters()]
    with seeded(1):
        with stepper.autocast():
            loss = F.cross_entropy(stepper.model(x).flatten(0, 1), y)
        stepper.step(loss)
    stepper.restore()
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize("plan", [FAST_FP32, FAST_BF16], ids=["fp32", "bf16"])
def test_a_checkpointed_backward_pass_draws_what_the_forward_pass_drew(plan: Plan) -> None:
    saved, plain = take_gradients(plan, saves=True), take_gradients(plan, saves=False)
    assert all(torch.equal(a, b) for a, b in zip(saved, plain, strict=True))


def test_without_dropout_gradients_are_those_of_torch() -> None:
    with seeded(0):
        model, x, y = Model(saves=False).eval(), torch.randint(11, (4, 9)), torch.randint(11, (36,))

    def differentiate(plan: Plan | None) -> list[Tensor]:
        with convert(model, plan) if plan else nullcontext() as conversion:
            with conversion.autocast() if conversion else nullcontext():
                loss = F.cross_entropy(model(x).flatten(0, 1), y)
            return list(torch.autograd.grad(loss, list(model.parameters())))

    for ours, theirs in zip(differentiate(FAST_FP32), differentiate(None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_attention_under_autocast_takes_its_format() -> None:
    q = torch.randn(1, 2, 5, 16)
    with convert(nn.Linear(1, 1), FAST_BF16) as conversion, conversion.autocast():
        assert F.scaled_dot_product_attention(q, q, q).dtype is torch.bfloat16


@pytest.mark.parametrize("plan", [FAST_BF16, FAST_FP16], ids=["bf16", "fp16"])
def test_the_record_names_the_functions_that_were_called_and_each_command_once(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan
    models = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)) for _ in range(2)]
    stepper, resumed = (halfstep.prepare(m, torch.optim.SGD(m.parameters(), lr=0.1), plan) for m in models)
    assert stepper.plan_record is not None and stepper.plan_record.functions == ()
    with stepper.autocast():
        loss = F.cross_entropy(stepper.model(torch.ones(2, 4)), torch.zeros(2, dtype=torch.int64))
    stepper.step(loss)
    record = stepper.plan_record
    assert record.functions[:1] == describe_functions([F.dropout, F.cross_entropy])
    assert "scaled_dot_product_attention" not in " ".join(record.functions)
    assert len(record.kernels) == len(set(record.kernels))
    assert not any(command in said for command in record.kernels for said in (*record.functions, *record.updates))
    resumed.load_state_dict(stepper.state_dict())
    assert resumed.plan_record is not None and resumed.plan_record.functions == record.functions


def test_a_plan_with_the_functions_of_torch_names_none() -> None:
    with convert(nn.Linear(2, 2), Plan.preset("bf16-mixed")) as conversion, conversion.autocast():
        F.dropout(torch.ones(2, 2))
    assert conversion.make_record().functions == ()


def test_auto_takes_fast_functions_on_a_processor() -> None:
    model = nn.Linear(4, 4)
    stepper = halfstep.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    stepper.model(torch.ones(2, 4))
    assert stepper.plan.functions == "fast"


def test_a_state_holds_the_ways_that_were_timed() -> None:
    with seeded(0):
        model, x = Model(saves=False).eval(), torch.randint(11, (4, 9))
    stepper = halfstep.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), FAST_FP32)
    with stepper.autocast():
        stepper.model(x)
    state, found = stepper.state_dict(), dict(scaled_attention.ROUTES)
    assert found
    scaled_attention.ROUTES.clear()
    stepper.load_state_dict(state)
    assert found == scaled_attention.ROUTES


def test_second_derivatives_of_the_loss_are_torchs_inside_the_block_too() -> None:
    x, y = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 0])

    def differentiate() -> Tensor:
        (first,) = torch.autograd.grad(F.cross_entropy(x, y), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    with FunctionMode():
        ours = differentiate()
    torch.testing.assert_close(ours, differentiate(), rtol=1e-5, atol=1e-7)


def test_attention_is_left_to_the_way_that_was_asked_for() -> None:
    q = torch.randn(2, 7, 8, requires_grad=True)
    with FunctionMode(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (first,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).square().sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), q)
    assert bool(torch.isfinite(second).all())


# --- where operations are cast by OperatorMode


def note_inputs(
    *functions: Callable[..., Any],
) -> tuple[dict[Callable[..., Any], Callable[..., Any]], list[tuple[str, str]]]:
    """Equals of these functions that note the format of what they are given."""
    seen: list[tuple[str, str]] = []

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((function.__name__, str(x.dtype).removeprefix("torch.")))
            return function(x, *args, **kwargs)

        return call

    return {function: note(function) for function in functions}, seen


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_equals_are_given_what_the_table_says(compute: str) -> None:
    equals, seen = note_inputs(F.dropout, F.cross_entropy, F.scaled_dot_product_attention)
    narrow = {"bf16": "bfloat16", "fp16": "float16"}[compute]
    q, y = torch.randn(1, 5, 8), torch.tensor([0, 1])
    with OperatorMode(compute, "cpu", equals=equals):
        assert F.scaled_dot_product_attention(q, q, q).dtype is getattr(torch, narrow)
        assert F.cross_entropy(torch.randn(2, 3).to(getattr(torch, narrow)), y).dtype is torch.float32
        F.dropout(torch.ones(3))
        nn.Dropout()(torch.ones(3, dtype=getattr(torch, narrow)))
        (torch.ones(2, 2) @ torch.ones(2, 2)).exp()
    assert seen == [
        ("scaled_dot_product_attention", narrow),
        ("cross_entropy", "float32"),
        ("dropout", "float32"),
        ("dropout", narrow),
    ]


def test_equals_are_for_the_innermost_block_and_its_copies() -> None:
    equals, seen = note_inputs(F.dropout)
    mode = OperatorMode("bf16", "cpu", equals=equals)
    with mode, OperatorMode("fp16", "cpu"):
        F.dropout(torch.ones(3))
    with mode, torch.autocast("cpu", enabled=False):
        F.dropout(torch.ones(3))
    assert not seen
    with copy.copy(mode):
        F.dropout(torch.ones(3))
    assert len(seen) == 1


def test_subclasses_and_compiled_code_have_no_equals() -> None:
    class Other(Tensor):
        pass

    equals, seen = note_inputs(F.dropout)
    mode = OperatorMode("bf16", "cpu", equals=equals)
    with mode:
        F.dropout(torch.ones(3).as_subclass(Other))
        torch.compile(lambda x: F.dropout(x), backend="aot_eager", fullgraph=True)(torch.ones(3))
    assert not seen


def test_the_loss_of_a_model_in_fp16_is_taken_by_the_kernel() -> None:
    logits = torch.randn(6, 5, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    with convert(nn.Linear(2, 2), FAST_FP16) as conversion:
        assert conversion.twins["fp16"].name == "OperatorMode"
        with conversion.autocast():
            loss = F.cross_entropy(logits.half(), y)
        said = conversion.describe_functions()
    assert find_nodes(loss) & {"_CrossEntropyBackward"}
    assert said[-1] == "tensors in fp16: left to torch, the kernels take fp32 and bf16"
    torch.testing.assert_close(loss, F.cross_entropy(logits.half().float(), y))


def find_nodes(result: Tensor) -> set[str]:
    """Names of the nodes of a result's graph."""
    names, queue = set(), [result.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None:
            names.add(type(node).__name__)
            queue += [before for before, _ in node.next_functions]
    return names


def test_dropout_inside_of_a_module_with_scaled_products_is_the_fast_one() -> None:
    module, x = nn.MultiheadAttention(16, 2, 0.5), torch.randn(3, 2, 16)
    plan = Plan.parse("functions=fast\nkind=attention compute=int8\ncompute=bf16")
    with convert(module, plan) as conversion, conversion.autocast():
        result, _ = module(x, x, x, need_weights=True)
    assert "_DropoutBackward" in find_nodes(result)


def test_a_checkpointed_model_in_fp16_draws_what_it_drew() -> None:
    saved, plain = take_gradients(FAST_FP16, saves=True), take_gradients(FAST_FP16, saves=False)
    assert all(torch.equal(a, b) for a, b in zip(saved, plain, strict=True))
    assert any(bool(g.any()) for g in saved)


# --- what is refused or warned of


def test_ways_of_attention_in_other_words_are_warned_of_and_left_out() -> None:
    with FunctionMode():
        q = torch.randn(2, 7, 8, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q)
    saved, before = get_routes(), dict(scaled_attention.ROUTES)
    known, other = saved[0], saved[0] | {"queries": 7777}
    scaled_attention.ROUTES.clear()
    with pytest.warns(
        PrecisionWarning,
        match="3 of the ways of attention and convolutions .* timed again: load the state with that version",
    ):
        put_back_routes([known, other | {"heads": 2}, {"route": "torch"}, other | {"route": "abacus"}])
    assert len(scaled_attention.ROUTES) == 1
    put_back_routes(saved)
    assert before == scaled_attention.ROUTES


def test_logits_that_were_changed_in_place_are_torchs_own_error() -> None:
    logits = torch.randn(4, 3, requires_grad=True) * 1
    with FunctionMode():
        loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    assert "_CrossEntropyBackward" in find_nodes(loss)
    logits.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*is at version 1; expected version 0"):
        loss.backward()


@pytest.mark.parametrize("mode", [FunctionMode(), OperatorMode("bf16", "cpu")])
def test_what_a_compiler_cannot_trace_runs_beside_it(mode: Any) -> None:
    """nn.LSTM is left out of graphs, and what it calls is taken frame by frame, that of the mode too."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.lstm = nn.Embedding(5, 8), nn.LSTM(8, 8, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            hidden: Tensor = self.lstm(self.token(tokens))[0]
            return hidden

    with seeded(0):
        model = Recurrent()
    tokens = torch.arange(6).remainder(5).view(2, 3)
    compiled: Any = torch.compile(model, backend="aot_eager")
    with mode:
        torch.testing.assert_close(compiled(tokens), model(tokens))
