"""Optimizer states in 8 bits between the steps of an optimizer: a quarter of their memory.

`numerics.codebooks` says what the 8 bits mean. For a step of torch's own a chunk of states is widened to fp32 and narrowed again,
which costs many passes over memory. Where AdamW and Adam are stepped in one pass, their states are decoded, updated and encoded
on the way, and fp32 states never exist (`numerics.native_steps` says where); both give the same bits.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep.numerics.codebooks import SMALLEST, Quantized, dequantize, quantize


class NarrowStates:
    """Keeps the states of an optimizer in 8 bits between its steps. `state_dict()` still holds fp32.

    Examples:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = torch.optim.Adam(layer.parameters())
        >>> states = NarrowStates(optimizer)
        >>> layer(torch.ones(1, 64)).sum().backward()
        >>> with states.widened(layer.parameters()):
        ...     _ = optimizer.step()
        >>> type(optimizer.state[layer.weight]["exp_avg"]).__name__
        'Quantized'
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._hooks = ExitStack()
        self._hooks.callback(optimizer.register_state_dict_pre_hook(lambda _: self.widen(optimizer.state)).remove)
        self._hooks.callback(optimizer.register_state_dict_post_hook(lambda *_: self.narrow(optimizer.state)).remove)
        self.narrow(optimizer.state)

    def narrow(self, parameters: Iterable[Tensor]) -> None:
        """Quantize the large fp32 states of some parameters. A state that holds a NaN or an infinity stays as it is."""
        for parameter in list(parameters):
            state = self.optimizer.state.get(parameter, {})
            large = {key: value for key, value in state.items() if _is_large(value, parameter)}
            if large:  # in a new dict: a state_dict() taken before holds the old one
                self.optimizer.state[parameter] = state | {key: quantize(value) for key, value in large.items()}

    def widen(self, parameters: Iterable[Tensor]) -> None:
        """Give some parameters their states in fp32."""
        for parameter in list(parameters):
            state = self.optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Quantized):  # with the parameter's strides: fused kernels walk through memory
                    state[key] = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False).copy_(
                        dequantize(value)
                    )

    @contextmanager
    def widened(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """The states of some parameters in fp32 inside the block."""
        parameters = list(parameters)
        self.widen(parameters)
        try:
            yield
        finally:
            self.narrow(parameters)

    def undo(self) -> None:
        """Give the optimizer back as a plain one."""
        self._hooks.close()
        self.widen(self.optimizer.state)


def _is_large(value: object, parameter: Tensor) -> bool:
    """Whether a state is worth narrowing, and can be."""
    if not isinstance(value, Tensor) or value.dtype is not torch.float32 or value.shape != parameter.shape:
        return False
    return value.numel() >= SMALLEST and bool(torch.isfinite(value).all())
