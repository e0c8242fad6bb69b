"""Timing: a stopwatch, and the three products of a layer as the calls that are timed.

A matmul stands for the three products of a linear layer, y[m,n] = x[m,k] w[n,k]^T: `output`, `grad_input` = g w and
`grad_weight` = g^T x; a convolution likewise.

The shape of a convolution has 8 numbers where its kernel is square, padded by half of it, and strides are alike; else 14:

    batch, inputs, outputs, height, width, kernel, stride, groups
    batch, inputs, outputs, height, width, kernel (2), stride (2), padding (2), dilation (2), groups
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from halfstep.numerics.patches import Product, Window, compute_by_patches, may_pay
from halfstep.records import Measurement

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}


class Stopwatch:
    """Time of a call in milliseconds: warmed up, then the fastest of 3 to 50 repetitions, as `seconds` allow.

    The fastest, because whatever else the machine does can only add to the time.
    """

    def __init__(self, device: str = "cpu", seconds: float = 0.15) -> None:
        self.device, self.seconds = device, seconds

    def time(self, call: Callable[[], object]) -> float:
        first = self.time_once(call)
        if first > 1000 * self.seconds:
            return first
        self.time_once(call)
        count = max(3, min(50, int(1000 * self.seconds / max(first, 1e-3))))
        return min(self.time_once(call) for _ in range(count))

    def time_once(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call, waiting for the device before and after."""
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return 1000 * (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


# the ways to compute each product, of which a layer takes the fastest
Calls = dict[Product, list[Callable[[], object]]]


def _matmul_calls(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Calls:
    m, k, n = shape
    x, w, g = (torch.randn(*size, device=device).to(dtype) for size in ((m, k), (n, k), (m, n)))
    return {"output": [lambda: x @ w.t()], "grad_input": [lambda: g @ w], "grad_weight": [lambda: g.t() @ x]}


class Convolution(NamedTuple):
    """What the numbers of a shape say."""

    images: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int]
    window: Window
    groups: int

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return self.outputs, self.images[1] // self.groups, *self.kernel


def read_convolution(shape: tuple[int, ...]) -> Convolution:
    """A convolution by its shape, as the head of this module has it.

    Examples:
        >>> read_convolution((1, 4, 8, 6, 6, 3, 2, 1)).window
        Window(stride=(2, 2), padding=(1, 1), dilation=(1, 1), output_padding=None)
    """
    batch, inputs, outputs, height, width, *numbers, groups = shape
    if len(numbers) == 2:
        kernel, stride = numbers
        numbers = [kernel, kernel, stride, stride, kernel // 2, kernel // 2, 1, 1]
    edges, steps, padding, dilation = zip(numbers[::2], numbers[1::2], strict=True)
    return Convolution((batch, inputs, height, width), outputs, edges, Window(steps, padding, dilation), groups)


def describe_convolution(module: nn.Conv2d, images: Sequence[int]) -> tuple[int, ...]:
    """The shape of a layer's convolution of images [batch, channels, height, width] or [channels, height, width].

    Examples:
        >>> describe_convolution(nn.Conv2d(1, 8, (1, 64)), (16, 1, 22, 256))
        (16, 1, 8, 22, 256, 1, 64, 1, 1, 0, 0, 1, 1, 1)
    """
    batch = images[0] if len(images) == 4 else 1
    begin = (batch, module.in_channels, module.out_channels, *images[-2:])
    (down, across), stride, dilation = module.kernel_size, module.stride, module.dilation
    reach = tuple(step * (edge - 1) // 2 for step, edge in zip(dilation, module.kernel_size, strict=True))
    padding = {"same": reach, "valid": (0, 0)}[module.padding] if isinstance(module.padding, str) else module.padding
    is_plain = down == across and stride[0] == stride[1] and dilation == (1, 1) and padding == (down // 2, down // 2)
    numbers = (down, stride[0]) if is_plain else (down, across, *stride, *padding, *dilation)
    return (*begin, *numbers, module.groups)


def _conv_calls(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, order: torch.memory_format = torch.contiguous_format
) -> Calls:
    convolution = read_convolution(shape)
    window, groups = convolution.window, convolution.groups
    x = torch.randn(convolution.images, device=device).to(dtype, memory_format=order)
    w = torch.randn(convolution.weight, device=device).to(dtype, memory_format=order)
    stride, padding, dilation, _ = window

    def forward() -> torch.Tensor:
        return torch.nn.functional.conv2d(x, w, None, stride, padding, dilation, groups)

    g = torch.randn_like(forward())

    def backward(wanted: list[bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            g, x, w, None, stride, padding, dilation, False, [0, 0], groups, wanted
        )

    ways: Calls = {
        "output": [forward],
        "grad_input": [backward([True, False, False])],
        "grad_weight": [backward([False, True, False])],
    }
    for product, calls in ways.items():
        if device == "cpu" and groups == 1 and may_pay(x.shape, w.shape, window, dtype, product):
            calls.append(partial(compute_by_patches, product, g, x, w, None, window))
    return ways


PRODUCTS: dict[str, Callable[[tuple[int, ...], torch.dtype, str], Calls]] = {
    "matmul": _matmul_calls,
    "conv2d": _conv_calls,
    "conv2d, channels_last": partial(_conv_calls, order=torch.channels_last),
}


def count_operations(operation: str, shape: tuple[int, ...]) -> float:
    """Floating-point operations of one product (a multiply-add is two)."""
    if operation == "matmul":
        m, k, n = shape
        return 2.0 * m * k * n
    (batch, inputs, *sizes), outputs, kernel, window, groups = read_convolution(shape)
    places = [
        (size + 2 * padding - dilation * (edge - 1) - 1) // stride + 1
        for size, edge, stride, padding, dilation in zip(sizes, kernel, *window[:3], strict=True)
    ]
    return 2.0 * batch * inputs // groups * outputs * math.prod(places) * math.prod(kernel)


def time_products(operation: str, shape: tuple[int, ...], format: str, watch: Stopwatch) -> list[Measurement]:
    """The three products of a layer of that shape, timed in that format. Raises RuntimeError where torch cannot."""
    calls = PRODUCTS[operation](shape, DTYPES[format], watch.device)
    work = count_operations(operation, shape)
    measured = []
    for product, ways in calls.items():
        ms = min(watch.time(call) for call in ways)
        measured.append(
            Measurement(operation=operation, product=product, format=format, shape=shape,
                        milliseconds=ms, rate=work / ms / 1e6)
        )  # fmt: skip
    return measured
