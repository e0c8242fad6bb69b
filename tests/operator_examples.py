"""A call of every operation that torch.autocast has a policy for, on any device.

Most come from torch's own tests of autocast; the rest are written here. `torch.testing._internal` is not stable, and needs
packages that only torch's developers have: what the lists do not need of it is left out.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

KEYS = ("AutocastCPU", "AutocastCUDA")
_CORE: Any = torch._C
HOMES = (torch, _CORE._nn, _CORE._linalg, _CORE._fft, Tensor)


class Example(NamedTuple):
    """One call; `name` is the operation's in the table."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def list_operations(key: str) -> set[str]:
    """The operations that torch has registered for a dispatch key, without their overloads."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name.removeprefix("aten::").partition(".")[0] for name in registered}


def list_examples(device: str = "cpu") -> Iterator[Example]:
    """Torch's examples, with every spelling of each operation, and ours."""
    lists = _import_lists()
    for kind in (lists.AutocastCPUTestLists(device), lists.AutocastTestLists(device)):
        for attribute, entries in vars(kind).items():
            if "promote" in attribute and "need" not in attribute:
                continue  # what promotes by itself has no policy
            for name, args, *rest in entries:
                if isinstance(args, tuple):
                    kwargs = next((word for word in rest if isinstance(word, dict)), {})
                    for function in {getattr(home, name) for home in HOMES if hasattr(home, name)}:
                        yield Example(name.strip("_") if name.startswith("__") else name, function, args, kwargs)
    for name, (args, kwargs) in _make_arguments(device).items():
        for function in [getattr(home, name) for home in HOMES if hasattr(home, name)][:1]:
            yield Example(name, function, args, kwargs)
    yield from _call_by_other_names(device)


def _import_lists() -> Any:
    stub: Any = types.ModuleType("torch.testing._internal.common_utils")
    stub.TEST_WITH_ROCM, stub.TestCase = False, object
    with mock.patch.dict(sys.modules, {stub.__name__: stub}):
        return importlib.import_module("torch.testing._internal.autocast_test_lists")


def _make_arguments(device: str) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Operation -> arguments of one call."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, device=device)

    square = rand(4, 4)
    positive = square @ square.mT + 4 * torch.eye(4, device=device)
    line, image, volume = rand(2, 3, 8), rand(2, 3, 8, 8), rand(2, 3, 4, 4, 4)
    heads, places = rand(2, 2, 4, 8), torch.randint(0, 4, (4, 4), device=device)
    lu, pivots = rand(4, 4), torch.arange(1, 5, device=device, dtype=torch.int32)
    examples: dict[str, tuple[Any, ...]] = {
        "einsum": ("ij,jk->ik", square, square), "linalg_matmul": (square, square),
        "scaled_dot_product_attention": (heads, heads, heads),
        "cross_entropy_loss": (square, torch.arange(4, device=device)),
        "ctc_loss": (rand(8, 2, 5), torch.ones(2, 3, dtype=torch.long, device=device), (8, 8), (3, 3)),
        "linalg_vector_norm": (square,), "linalg_matrix_norm": (square,), "nuclear_norm": (square,),
        "frobenius_norm": (square, (0, 1)), "native_layer_norm": (square, (4,), rand(4), rand(4), 1e-5),
        "upsample_nearest1d": (line, (16,)), "_upsample_nearest_exact1d": (line, (16,)),
        "upsample_nearest2d": (image, (4, 4)), "_upsample_nearest_exact2d": (image, (4, 4)),
        "upsample_nearest3d": (volume, (2, 2, 2)), "_upsample_nearest_exact3d": (volume, (2, 2, 2)),
        "upsample_linear1d": (line, (16,), False), "upsample_bilinear2d": (image, (4, 4), False),
        "upsample_trilinear3d": (volume, (2, 2, 2), False), "upsample_bicubic2d": (image, (4, 4), False),
        "_upsample_bilinear2d_aa": (image, (4, 4), False), "_upsample_bicubic2d_aa": (image, (4, 4), False),
        "grid_sampler_2d": (image, rand(2, 4, 4, 2), 0, 0, False),
        "_grid_sampler_2d_cpu_fallback": (image, rand(2, 4, 4, 2), 0, 0, False),
        "grid_sampler_3d": (volume, rand(2, 4, 4, 4, 3), 0, 0, False),
        "cholesky": (positive,), "cholesky_inverse": (positive,), "cholesky_solve": (square, positive),
        "inverse": (positive,), "pinverse": (square,), "qr": (square,), "svd": (square,), "geqrf": (square,),
        "orgqr": (square, rand(4)), "ormqr": (square, rand(4), square), "trace": (square,),
        "triangular_solve": (square, positive), "lu_solve": (square, lu, pivots), "_lu_with_info": (positive,),
        "linalg_cholesky": (positive,), "linalg_cholesky_ex": (positive,), "linalg_cond": (positive,),
        "linalg_eig": (square,), "linalg_eigh": (positive,), "linalg_eigvals": (square,), "linalg_eigvalsh": (positive,),
        "linalg_householder_product": (square, rand(4)), "linalg_inv": (positive,), "linalg_inv_ex": (positive,),
        "linalg_lstsq": (positive, square), "linalg_matrix_rank": (square,), "linalg_qr": (square,),
        "linalg_solve": (positive, square), "linalg_svd": (square,), "linalg_svdvals": (square,),
        "linalg_tensorinv": (positive.reshape(2, 2, 4),), "linalg_tensorsolve": (positive, rand(4)),
        **{name: (square,) for name in (
            "fft_fft", "fft_fft2", "fft_fftn", "fft_hfft", "fft_ifft", "fft_ifft2", "fft_ifftn", "fft_ihfft",
            "fft_irfft", "fft_irfft2", "fft_irfftn", "fft_rfft", "fft_rfft2", "fft_rfftn")},
        "polar": (square, square), "view_as_complex": (rand(4, 2),),
        "adaptive_avg_pool3d": (volume, 2), "adaptive_max_pool3d": (volume, 2), "max_pool3d": (volume, 2),
        "fractional_max_pool2d": (image, (2, 2), (4, 4), rand(2, 3, 2)),
        "fractional_max_pool3d": (volume, (2, 2, 2), (2, 2, 2), rand(2, 3, 3)),
        "max_unpool2d": (rand(1, 4, 4), places[None], (8, 8)),
        "max_unpool3d": (rand(1, 4, 4, 4), places[None, None].expand(1, 4, 4, 4), (8, 8, 8), (2, 2, 2), (0, 0, 0)),
        "reflection_pad2d": (image, (1, 1, 1, 1)), "replication_pad1d": (line, (1, 1)),
        "replication_pad2d": (image, (1, 1, 1, 1)), "replication_pad3d": (volume, (1,) * 6),
        "quantile": (square, 0.5), "nanquantile": (square, 0.5),
        "fake_quantize_per_tensor_affine": (square, 0.1, 0, -128, 127),
        "index_copy": (square, 0, torch.tensor([0], device=device), rand(1, 4)),
    }  # fmt: skip
    return {name: (args, {}) for name, args in examples.items()} | {
        "stft": ((rand(64), 16), {"return_complex": True, "window": rand(16)}),
    }


def _call_by_other_names(device: str) -> Iterator[Example]:
    """What Python knows by another name only, and operations called through the dispatcher's."""
    x, weight = torch.rand(4, 4, device=device), torch.rand(4, 4, device=device)
    target = torch.arange(4, device=device)
    yield Example("cross_entropy_loss", F.cross_entropy, (x, target), {})
    yield Example("nll_loss", F.nll_loss, (x, target), {})
    yield Example(
        "multilabel_margin_loss_forward", torch.ops.aten.multilabel_margin_loss_forward, (x, target.expand(4, 4), 1), {}
    )
    yield Example("mm", torch.ops.aten.mm, (x, weight), {})
    yield Example("mm", torch.ops.aten.mm.default, (x, weight), {})
    yield Example("reciprocal", lambda x: 1 / x, (x,), {})
    yield Example("pow", lambda x: 2**x, (x,), {})
    yield Example("matmul", lambda x, y: x @ y, (x, weight), {})
    yield Example("layer_norm", F.layer_norm, (x, (4,), weight[0], weight[0]), {})
    yield Example("rms_norm", F.rms_norm, (x, (4,), weight[0]), {})
    yield Example("group_norm", F.group_norm, (x, 2, weight[0], weight[0]), {})
    yield Example("softmax", F.softmax, (x,), {"dim": -1})
    yield Example("log_softmax", F.log_softmax, (x,), {"dim": -1})
    yield Example(
        "grid_sampler", F.grid_sample, (x[None, None], torch.rand(1, 3, 3, 2, device=device)), {"align_corners": False}
    )
    yield Example("upsample_bilinear2d", F.interpolate, (x[None, None],), {"scale_factor": 2, "mode": "bilinear"})
