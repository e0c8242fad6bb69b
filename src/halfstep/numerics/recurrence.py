"""LSTM and GRU whose products take scaled numbers.

    gates = Q(x) Q(w_ih)^T + b_ih  +  Q(h) Q(w_hh)^T + b_hh

The first product is one for the whole sequence, the second one a step. Gates, cell and hidden state are fp32 between the
products (fp64 for fp64). The recurrent weight is quantized once a call. Sequences are packed as in torch: the longest first,
all first steps, then all second steps of those that have one, and so on; a padded batch is one where all go on to the end.

    LSTM   i, f, g, o = gates;    c' = sigmoid(f) c + sigmoid(i) tanh(g);    h' = sigmoid(o) tanh(c')
    GRU    r, z, n = gates;       n = tanh(n_x + sigmoid(r) n_h);            h' = (1 - sigmoid(z)) n + sigmoid(z) h

Arguments are those of torch.lstm and torch.gru, so that weights come flat, as nn.LSTM hands them over: w_ih, w_hh and, with
biases, b_ih, b_hh of each layer and direction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.errors import UnsupportedError
from halfstep.numerics.multiplication import find_result_dtype, multiply_by_weight
from halfstep.numerics.products import Products, ProductState, QuantizedWeights

States = tuple[ProductState, ProductState]  # of the products with w_ih and with w_hh
Step = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _step_lstm(from_x: Tensor, from_h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (from_x + from_h).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _step_gru(from_x: Tensor, from_h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3, dim=-1), from_h.chunk(3, dim=-1)
    z = (z_x + z_h).sigmoid()
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (n + z * (state[0] - n),)


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A kind of recurrent layer: how it steps, how many gates it has, how many tensors it carries from step to step."""

    name: str
    step: Step
    gates: int
    carried: int


LSTM = _Cell(name="lstm", step=_step_lstm, gates=4, carried=2)
GRU = _Cell(name="gru", step=_step_gru, gates=3, carried=1)


@dataclass(frozen=True, kw_only=True)
class _Way:
    """How the products of one call are computed."""

    products: Products
    states: Sequence[States] | None  # one for each layer and direction
    weights: QuantizedWeights

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None, number: int, place: int) -> Tensor:
        """A product with one weight of layer and direction `number`: 0 of the input, 1 of the hidden state."""
        state = self.states[number][place] if self.states else None
        return multiply_by_weight(x, weight, bias, self.products, state, self.weights)


def _run_direction(
    cell: _Cell, way: _Way, number: int, x: Tensor, sizes: list[int], state: tuple[Tensor, ...],
    weights: Sequence[Tensor], backward: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """One layer in one direction over packed x [sum of sizes, inputs] -> hidden states as packed, last states."""
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    wide = state[0].dtype
    from_x = way.project(x, w_ih, b_ih, number, 0).to(wide).split(sizes)
    order = range(len(sizes) - 1, -1, -1) if backward else range(len(sizes))
    begin, outputs, ended = state, {}, []
    state = tuple(s[: sizes[order[0]]] for s in state)
    for t in order:
        running, size = state[0].shape[0], sizes[t]
        if size > running:  # backward, shorter sequences begin later
            state = tuple(torch.cat([s, first[running:size]]) for s, first in zip(state, begin, strict=True))
        elif size < running:  # forward, they end earlier
            ended.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        hidden = state[0].to(x.dtype)
        from_h = way.project(hidden, w_hh, b_hh, number, 1).to(wide)
        with torch.autocast(x.device.type, enabled=False):
            state = cell.step(from_x[t], from_h, state)
        outputs[t] = state[0]
    last = tuple(torch.cat([s, *rest]) for s, *rest in zip(state, *reversed(ended), strict=True))
    return torch.cat([outputs[t] for t in range(len(sizes))]), last


def _run(  # noqa: PLR0913 - torch's arguments
    cell: _Cell, data: Tensor, sizes: list[int], hx: tuple[Tensor, ...], params: Sequence[Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool, way: _Way,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All layers over packed data -> packed output and last states [layers * directions, batch, hidden]."""
    directions, each = 2 if bidirectional else 1, 4 if has_biases else 2
    hidden = hx[0].shape[-1]
    if len(params) != num_layers * directions * each or any(s.shape[-1] != hidden for s in hx):
        raise UnsupportedError(
            f"{cell.name} in scaled formats takes {each} weights a layer and direction and no proj_size; got {len(params)} "
            f"for {num_layers} layers in {directions} directions; make the layer without proj_size"
        )
    dtype = find_result_dtype(data)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, last = data, []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            state = tuple(s[number].to(wide) for s in hx)
            weights = params[number * each : (number + 1) * each]
            output, state = _run_direction(cell, way, number, x, sizes, state, weights, direction == 1)
            outputs.append(output)
            last.append(state)
        x = torch.cat(outputs, dim=-1).to(dtype)
        x = F.dropout(x, dropout) if train and dropout and layer < num_layers - 1 else x
    return x, *(torch.stack(s).to(dtype) for s in zip(*last, strict=True))


def _run_padded(  # noqa: PLR0913 - torch's arguments
    cell: _Cell, x: Tensor, hx: tuple[Tensor, ...], params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool, way: _Way,
) -> tuple[Tensor, ...]:  # fmt: skip
    if x.dim() == 2:
        first, hx = x.unsqueeze(0 if batch_first else 1), tuple(s.unsqueeze(1) for s in hx)
        y, *states = _run_padded(
            cell, first, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first, way
        )
        return y.squeeze(0 if batch_first else 1), *(s.squeeze(1) for s in states)
    x = x.transpose(0, 1) if batch_first else x
    steps, batch = x.shape[:2]
    y, *states = _run(
        cell, x.reshape(steps * batch, -1), [batch] * steps, hx, params, has_biases, num_layers, dropout, train,
        bidirectional, way,
    )  # fmt: skip
    y = y.reshape(steps, batch, -1)
    return y.transpose(0, 1) if batch_first else y, *states


def lstm(  # noqa: PLR0913 - torch's arguments
    x: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool, *, products: Products, states: Sequence[States] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`torch.lstm` of a padded batch: x [steps, batch, inputs], hx two of [layers, batch, hidden] -> output, h, c.

    states: for each layer and direction, those of its two products.

    Examples:
        >>> layer, x, zeros = torch.nn.LSTM(2, 3), torch.ones(4, 1, 2), torch.zeros(1, 1, 3)
        >>> params = [w.detach() for w in layer.parameters()]
        >>> y, h, c = lstm(x, (zeros, zeros), params, True, 1, 0.0, False, False, False, products=Products.of("int8"))
        >>> y.shape, torch.equal(y[-1], h[0])
        (torch.Size([4, 1, 3]), True)

    Raises UnsupportedError for layers with proj_size, here and in the other functions of this module.
    """
    way = _Way(products=products, states=states, weights=QuantizedWeights())
    y, h, c = _run_padded(
        LSTM, x, tuple(hx), params, has_biases, num_layers, dropout, train, bidirectional, batch_first, way
    )
    return y, h, c


def gru(  # noqa: PLR0913 - torch's arguments
    x: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool, *, products: Products, states: Sequence[States] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`torch.gru` of a padded batch: x [steps, batch, inputs], hx [layers, batch, hidden] -> output, h.

    Examples:
        >>> params = [w.detach() for w in torch.nn.GRU(2, 3).parameters()]
        >>> x, zeros = torch.ones(4, 1, 2), torch.zeros(1, 1, 3)
        >>> gru(x, zeros, params, True, 1, 0.0, False, False, False, products=Products.of("int8"))[0].shape
        torch.Size([4, 1, 3])
    """
    way = _Way(products=products, states=states, weights=QuantizedWeights())
    y, h = _run_padded(GRU, x, (hx,), params, has_biases, num_layers, dropout, train, bidirectional, batch_first, way)
    return y, h


def lstm_packed(  # noqa: PLR0913 - torch's arguments
    data: Tensor, batch_sizes: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, *, products: Products, states: Sequence[States] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`torch.lstm` of packed sequences: data and batch_sizes of a PackedSequence -> packed output, h, c.

    Examples:
        >>> params, zeros = [w.detach() for w in torch.nn.LSTM(2, 3).parameters()], torch.zeros(1, 2, 3)
        >>> packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
        >>> y, h, c = lstm_packed(packed.data, packed.batch_sizes, (zeros, zeros), params, True, 1, 0.0, False, False,
        ...                       products=Products.of("int8"))
        >>> y.shape, h.shape
        (torch.Size([4, 3]), torch.Size([1, 2, 3]))
    """
    way = _Way(products=products, states=states, weights=QuantizedWeights())
    y, h, c = _run(
        LSTM, data, batch_sizes.tolist(), tuple(hx), params, has_biases, num_layers, dropout, train, bidirectional, way
    )
    return y, h, c


def gru_packed(  # noqa: PLR0913 - torch's arguments
    data: Tensor, batch_sizes: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, *, products: Products, states: Sequence[States] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`torch.gru` of packed sequences: data and batch_sizes of a PackedSequence -> packed output, h.

    Examples:
        >>> params, zeros = [w.detach() for w in torch.nn.GRU(2, 3).parameters()], torch.zeros(1, 2, 3)
        >>> packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
        >>> y, h = gru_packed(packed.data, packed.batch_sizes, zeros, params, True, 1, 0.0, False, False,
        ...                   products=Products.of("int8"))
        >>> y.shape
        torch.Size([4, 3])
    """
    way = _Way(products=products, states=states, weights=QuantizedWeights())
    y, h = _run(
        GRU, data, batch_sizes.tolist(), (hx,), params, has_biases, num_layers, dropout, train, bidirectional, way
    )
    return y, h
