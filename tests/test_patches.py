"""Products of convolutions by patches, beside torch's own."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.numerics import patches
from halfstep.numerics.patches import (
    PRODUCTS,
    Window,
    compute_by_patches,
    find_order,
    find_weight_gradient,
    make_patches,
    may_pay,
)
from helpers import seeded
from images import make_inputs, require_close


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(4, 8), channels=st.integers(1, 4), outputs=st.integers(1, 4), kernel=st.integers(1, 3),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 2), order=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)  # fmt: skip
def test_the_gradient_of_a_weight_is_that_of_autograd(
    size: int,
    channels: int,
    outputs: int,
    kernel: int,
    stride: Any,
    padding: Any,
    dilation: int,
    order: torch.memory_format,
) -> None:
    if dilation * (kernel - 1) + 1 > size:
        return
    x, w, _ = make_inputs(torch.float64, size=size, channels=channels, outputs=outputs, kernel=kernel, order=order)
    options = {"stride": stride, "padding": padding, "dilation": (dilation, dilation)}
    out = F.conv2d(x, w, None, **options)
    with seeded(2):
        g = torch.randn(out.shape, dtype=out.dtype)
    (right,) = torch.autograd.grad(out, w, g)
    found = find_weight_gradient(g, x.detach(), w.detach(), Window(stride, padding, (dilation, dilation)))
    require_close(found, right)
    assert found.is_contiguous() or not w.is_contiguous()


def test_patches_are_those_of_unfold() -> None:
    x = make_inputs()[0].detach()
    window = Window((2, 1), (1, 2), (1, 2))
    right = F.unfold(x, 3, dilation=(1, 2), padding=(1, 2), stride=(2, 1))  # [N, C * kernel, places]
    found = make_patches(x, (3, 3), window).view(2, -1, 9, 3)
    assert torch.equal(found, right.view(2, 3, 9, -1).permute(0, 3, 2, 1))


@pytest.mark.parametrize(
    ("padding", "dilation", "kernel"),
    [((0, 0), (1, 1), 3), ((2, 1), (1, 2), 3), ((1, 1), (1, 1), 2), ((0, 0), (1, 1), 1)],
)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_every_product_is_that_of_autograd(
    padding: tuple[int, int], dilation: tuple[int, int], kernel: int, is_transposed: bool
) -> None:
    x, w, b = make_inputs(torch.float64, channels=5, kernel=kernel)
    out = (F.conv_transpose2d if is_transposed else F.conv2d)(x, w, b, padding=padding, dilation=dilation)
    with seeded(2):
        gradient = torch.randn(out.shape, dtype=out.dtype)
    right = [out, *torch.autograd.grad(out, (x, w), gradient)]
    window = Window((1, 1), padding, dilation, (0, 0) if is_transposed else None)
    for product, exact in zip(PRODUCTS, right, strict=True):
        require_close(compute_by_patches(product, gradient, x.detach(), w.detach(), b.detach(), window), exact)


@pytest.mark.parametrize("shape", [(2, 8, 4, 5), (1, 8, 1, 1), (3, 1, 4, 4), (2, 8, 1, 4)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_order_of_memory_is_what_torchs_convolution_takes_it_for(
    shape: tuple[int, ...], order: torch.memory_format
) -> None:
    x = torch.ones(shape, dtype=torch.bfloat16).contiguous(memory_format=order)
    for view in (x, x[:, : math.ceil(shape[1] / 2)], x[..., 1:] if shape[-1] > 1 else x, x.expand(shape)):
        weight = torch.ones(3, view.shape[1], 1, 1, dtype=torch.bfloat16)
        right = torch.ones(view.shape[0], 3, *view.shape[2:]).contiguous(memory_format=find_order(view, weight))
        assert F.conv2d(view, weight).stride() == right.stride()


def test_what_cannot_pay_is_known_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, plain, half = ((2, 5, 7, 8), (5, 5, 3, 3)), Window((1, 1), (0, 0), (1, 1)), torch.bfloat16
    assert not any(may_pay(*shapes, plain, half, product) for product in PRODUCTS)
    monkeypatch.setattr(patches, "LEAST_WORK", 0)
    assert [may_pay(*shapes, plain, half, product) for product in PRODUCTS] == [True, True, True]
    assert [may_pay(*shapes, plain, torch.float32, product) for product in PRODUCTS] == [False, False, True]
    assert [may_pay(*shapes, plain._replace(stride=(1, 2)), half, product) for product in PRODUCTS] == [
        True,
        False,
        True,
    ]
    monkeypatch.setattr(
        patches, "MOST_BYTES", 2 * 5 * 6 * 45 * 2
    )  # of the patches of the larger images, 7 by 8 of the others
    assert [may_pay(*shapes, plain, half, product) for product in PRODUCTS] == [True, False, True]
