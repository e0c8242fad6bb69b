"""LSTM and GRU by scaled products: torch's with plain operands, in every arrangement; quantized in both products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from halfstep.errors import UnsupportedError
from halfstep.numerics import recurrence
from halfstep.numerics.casting import measure_error
from halfstep.numerics.products import Operand, Product, Products, ProductState
from helpers import seeded

FP32 = Product(left=Operand(format="fp32"), right=Operand(format="fp32"))
PLAIN = Products(output=FP32, grad_input=FP32, grad_weight=FP32)
KINDS: list[tuple[type[nn.RNNBase], str]] = [(nn.LSTM, "lstm"), (nn.GRU, "gru")]


def make_layer(kind: Callable[..., Any], **options: Any) -> tuple[Any, Tensor, Any]:
    """The layer, x of 7 steps of 4 sequences, first states that are not zero."""
    with seeded(0):
        layer = kind(5, 6, **options)
        x = torch.randn((4, 7, 5) if options.get("batch_first") else (7, 4, 5)).requires_grad_()
        states = torch.randn(2, layer.num_layers * (2 if layer.bidirectional else 1), 4, 6).unbind()
    return layer, x, states if kind is nn.LSTM else states[0]


def flatten(result: Any) -> list[Tensor]:
    y, states = result
    return [y, *states] if isinstance(states, tuple) else [y, states]


def differentiate(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    return [*results, *torch.autograd.grad(torch.stack([r.square().sum() for r in results]).sum(), leaves)]


def assert_alike(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str
)
def test_with_plain_operands_it_is_the_layer_of_torch(
    kind: type[nn.RNNBase], name: str, options: dict[str, Any]
) -> None:
    layer, x, hx = make_layer(kind, **options)
    leaves = [x, *layer._flat_weights]
    actual = getattr(recurrence, name)(
        x, hx, layer._flat_weights, layer.bias, layer.num_layers, 0.0, True, layer.bidirectional, layer.batch_first,
        products=PLAIN,
    )  # fmt: skip
    assert_alike(differentiate(list(actual), leaves), differentiate(flatten(layer(x, hx)), leaves))


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_packed_sequences_are_those_of_torch(kind: type[nn.RNNBase], name: str) -> None:
    layer, x, hx = make_layer(kind, num_layers=2, bidirectional=True)
    packed = pack_padded_sequence(x, [7, 5, 5, 2])
    leaves = [x, *layer._flat_weights]
    actual = getattr(recurrence, f"{name}_packed")(
        packed.data, packed.batch_sizes, hx, layer._flat_weights, True, 2, 0.0, True, True, products=PLAIN
    )
    ours = differentiate(list(actual), leaves)
    y, *states = flatten(layer(pack_padded_sequence(x, [7, 5, 5, 2]), hx))
    assert_alike(ours, differentiate([y.data, *states], leaves))


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_one_sequence_without_a_batch_is_that_of_torch(kind: type[nn.RNNBase], name: str) -> None:
    for batch_first in (False, True):
        layer, x, hx = make_layer(kind, batch_first=batch_first)
        x = (x[0] if batch_first else x[:, 0]).detach()
        hx = tuple(h[:, 0] for h in hx) if kind is nn.LSTM else hx[:, 0]
        actual = getattr(recurrence, name)(
            x, hx, layer._flat_weights, True, 1, 0.0, False, False, batch_first, products=PLAIN
        )
        assert_alike(list(actual), flatten(layer(x, hx)))


@pytest.mark.parametrize(("kind", "name"), KINDS)
@pytest.mark.parametrize(("products", "least"), [(Products.of("fp8_e4m3"), 20.0), (Products.of("int8"), 35.0)])
def test_both_products_are_quantized(kind: type[nn.RNNBase], name: str, products: Products, least: float) -> None:
    """The noise of gates is at most that of a product, 21 dB for e4m3, and gates squash it."""
    layer, x, hx = make_layer(kind)
    function = getattr(recurrence, name)
    options = (True, 1, 0.0, True, False, False)
    y = function(x, hx, layer._flat_weights, *options, products=products)[0]
    assert least < measure_error(layer(x, hx)[0], y, "fp32").sqnr < 60
    for silent in (0, 1):  # without one of the two weights the other product is still rounded
        weights = [w.detach() for w in layer._flat_weights]
        weights[silent] = torch.zeros_like(weights[silent])
        plain, rounded = (function(x, hx, weights, *options, products=p)[0] for p in (PLAIN, products))
        assert measure_error(plain, rounded, "fp32").sqnr < 70


def test_states_are_those_of_each_layer_direction_and_product() -> None:
    layer, x, hx = make_layer(nn.GRU, num_layers=2, bidirectional=True)
    states = [(ProductState(), ProductState()) for _ in range(4)]
    recurrence.gru(
        x, hx, layer._flat_weights, True, 2, 0.0, True, True, False,
        products=Products.of("fp8_e4m3", scaling="delayed"), states=states,
    )  # fmt: skip
    for pair in states:
        assert [state.histories["left"].amaxes.count_nonzero().item() for state in pair] == [1, 7], (
            "one product a sequence, one a step"
        )


def test_results_under_autocast_are_bf16_and_dropout_is_between_layers() -> None:
    layer, x, hx = make_layer(nn.LSTM, num_layers=2)
    function: Callable[..., Any] = recurrence.lstm
    with torch.autocast("cpu", torch.bfloat16):
        y, h, c = function(x, hx, layer._flat_weights, True, 2, 0.0, True, False, False, products=PLAIN)
    assert {t.dtype for t in (y, h, c)} == {torch.bfloat16}
    torch.testing.assert_close(y.to(torch.float32), layer(x, hx)[0], rtol=5e-2, atol=2e-2)
    evaluated, trained = (
        function(x, hx, layer._flat_weights, True, 2, p, training, False, False, products=PLAIN)
        for p, training in ((0.9, False), (0.0, True))
    )
    assert torch.equal(evaluated[0], trained[0])
    with seeded(0):
        dropped = function(x, hx, layer._flat_weights, True, 2, 0.9, True, False, False, products=PLAIN)
    assert not torch.equal(dropped[0], trained[0])
    assert torch.equal(dropped[1][0], trained[1][0]), "the first layer sees no dropout"


def test_projections_are_refused() -> None:
    layer: Any = nn.LSTM(5, 6, proj_size=3)
    hx = torch.zeros(1, 4, 3), torch.zeros(1, 4, 6)
    with pytest.raises(UnsupportedError, match="no proj_size"):
        recurrence.lstm(torch.ones(7, 4, 5), hx, layer._flat_weights, True, 1, 0.0, True, False, False, products=PLAIN)
