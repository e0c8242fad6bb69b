"""Packing: one body over the truth and the kernels; what is promised about error, bias and numbers that are not finite."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from halfstep.numerics import kernels, packing
from halfstep.numerics.noise import derive_keys
from halfstep.numerics.packing import GROUP, Groups
from helpers import bits, seeded

KEYS = (2**32 - 3, 12345)  # the pair counter wraps within the first group


class Packer(NamedTuple):
    pack_groups: Callable[[Tensor, int, tuple[int, int]], Groups]
    unpack_groups: Callable[[Groups, torch.dtype], Tensor]
    pack_bits: Callable[[Tensor], Tensor]
    unpack_bits: Callable[[Tensor, int], Tensor]


TRUTH = Packer(
    packing.pack_groups_slowly, packing.unpack_groups_slowly, packing.pack_bits_slowly, packing.unpack_bits_slowly
)
KERNELS = Packer(kernels.pack_groups, kernels.unpack_groups, kernels.pack_bits, kernels.unpack_bits)
both = pytest.mark.parametrize("packer", [TRUTH, KERNELS], ids=["truth", "kernels"])
widths = pytest.mark.parametrize("width", [8, 4])


def make_numbers(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    with seeded(seed):
        return torch.randn(count).to(dtype)


def measure_steps(x: Tensor, width: int) -> Tensor:
    """The step that each number is rounded with, after the definition."""
    return torch.cat([(g.max() - g.min()).expand(len(g)) / (2**width - 1) for g in x.float().split(GROUP)])


def test_the_kernels_of_this_machine_run_natively_where_it_has_a_compiler() -> None:
    has_compiler = any(map(kernels.shutil.which, kernels.COMPILERS))
    assert kernels.describe_kernels().startswith("native: " if has_compiler else "torch: no C compiler")


@both
@widths
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 5000])
def test_numbers_come_back_within_a_step_and_the_ends_of_a_group_exactly(
    packer: Packer, width: int, count: int
) -> None:
    x = make_numbers(count)
    back = packer.unpack_groups(packer.pack_groups(x, width, KEYS), x.dtype)
    assert back.shape == x.shape
    assert bool(((back - x).abs() <= measure_steps(x, width) * 1.0001).all())
    for group, packed in zip(x.split(GROUP), back.split(GROUP), strict=True):
        assert packed.min() == group.min()
        torch.testing.assert_close(packed.max(), group.max(), rtol=1e-6, atol=0)


@both
@widths
def test_rounding_is_without_bias_and_as_noisy_as_theory_says(packer: Packer, width: int) -> None:
    x, draws = make_numbers(GROUP), 2000
    back = torch.stack(
        [packer.unpack_groups(packer.pack_groups(x, width, derive_keys(0, 0, i)), x.dtype) for i in range(draws)]
    )
    step = measure_steps(x, width).double()
    share = ((x.double() - x.min()) / step) % 1
    sigma = (share * (1 - share)).sqrt() * step
    error = back.double().mean(0) - x.double()
    assert bool((error.abs() <= 4 * sigma / draws**0.5 + 1e-3 * step).all())
    assert abs(error.sum()) <= 4 * (sigma.square().sum() / draws).sqrt()
    assert float(back.double().var(0).mean() / sigma.square().mean()) == pytest.approx(1.0, rel=0.02)


@both
@widths
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_group_with_a_number_that_is_not_finite_comes_back_as_nan_and_no_other(
    packer: Packer, width: int, bad: float
) -> None:
    x = make_numbers(3 * GROUP)
    x[GROUP + 7] = bad
    back = packer.unpack_groups(packer.pack_groups(x, width, KEYS), x.dtype)
    assert back.isnan().view(3, GROUP).all(1).tolist() == [False, True, False]
    assert not back.isnan().view(3, GROUP)[::2].any()


@both
@widths
@pytest.mark.parametrize("value", [0.0, -0.0, 2.5, -3e38, 1e-42])
def test_equal_numbers_come_back_exactly(packer: Packer, width: int, value: float) -> None:
    x = torch.full((GROUP + 1,), value)
    assert torch.equal(packer.unpack_groups(packer.pack_groups(x, width, KEYS), x.dtype), x)


@both
@widths
def test_ranges_at_the_ends_of_fp32(packer: Packer, width: int) -> None:
    near, far = torch.linspace(0, 1e-40, GROUP), torch.tensor([-3e38, 3e38]).repeat(GROUP // 2)
    assert bool((packer.unpack_groups(packer.pack_groups(near, width, KEYS), near.dtype) - near).abs().max() <= 1e-40)
    assert bool(packer.unpack_groups(packer.pack_groups(far, width, KEYS), far.dtype).isnan().all())


@both
@widths
def test_relu_keeps_its_zeros(packer: Packer, width: int) -> None:
    x = make_numbers(4 * GROUP).relu()
    assert bool((packer.unpack_groups(packer.pack_groups(x, width, KEYS), x.dtype)[x == 0] == 0).all())


@widths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_give_the_bits_of_the_truth(width: int, dtype: torch.dtype) -> None:
    x = 3 * make_numbers(100_001).to(dtype)
    x[GROUP], x[2 * GROUP + 1] = torch.nan, torch.inf
    x[3 * GROUP : 4 * GROUP] = 2.5
    x[4 * GROUP : 5 * GROUP] *= 1e-40
    x[6 * GROUP : 7 * GROUP].relu_()
    truth, fast = TRUTH.pack_groups(x, width, KEYS), KERNELS.pack_groups(x, width, KEYS)
    assert torch.equal(truth.codes, fast.codes)
    assert torch.equal(truth.scales.nan_to_num(7.0), fast.scales.nan_to_num(7.0))
    one, other = TRUTH.unpack_groups(truth, dtype), KERNELS.unpack_groups(truth, dtype)
    assert torch.equal(one.isnan(), other.isnan())  # torch gives NaN in bf16 no fixed pattern
    assert torch.equal(bits(one.nan_to_num(7.0)), bits(other.nan_to_num(7.0)))


@pytest.mark.parametrize(("width", "bytes_a_number"), [(8, 8.25 / 8), (4, 4.25 / 8)])
def test_size(width: int, bytes_a_number: float) -> None:
    assert kernels.pack_groups(make_numbers(10 * GROUP), width, KEYS).nbytes == 10 * GROUP * bytes_a_number


@both
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_bits_come_back(packer: Packer, count: int) -> None:
    mask = make_numbers(count) > 0
    codes = packer.pack_bits(mask)
    assert (codes.dtype, codes.numel()) == (torch.uint8, -(-count // 8))
    assert torch.equal(packer.unpack_bits(codes, count), mask)
    assert torch.equal(codes, TRUTH.pack_bits(mask))


def test_without_a_compiler_the_truth_runs_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "COMPILERS", ("no-such-compiler",))
    library = kernels.find_library(tmp_path)
    assert library.functions is None
    assert library.why == "no C compiler was found (looked for no-such-compiler)"
    monkeypatch.setattr(kernels, "load_library", lambda: library)
    x = make_numbers(300)
    assert torch.equal(kernels.pack_groups(x, 8, KEYS).codes, TRUTH.pack_groups(x, 8, KEYS).codes)
    assert kernels.describe_kernels().startswith("torch: no C compiler")


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    if not any(map(kernels.shutil.which, kernels.COMPILERS)):
        pytest.skip("no C compiler")
    monkeypatch.setattr(kernels, "FLAGS", ("-std=c11", "-O0", "-ffp-contract=off", "-fPIC", "-shared"))
    monkeypatch.setattr(kernels, "TRIES", ((),))


@pytest.mark.usefixtures("quick_compiler")
def test_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert kernels.find_library(tmp_path / "new" / "folder").functions is not None

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert kernels.find_library(tmp_path / "new" / "folder").functions is not None


@pytest.mark.usefixtures("quick_compiler")
def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "kernels.c"
    source.write_text(kernels.SOURCE.read_text("utf-8").replace("(0.5f + 0x1p-17f)", "0.25f"), "utf-8")
    monkeypatch.setattr(kernels, "SOURCE", source)
    library = kernels.find_library(tmp_path)
    assert library.functions is None
    assert "does not compute what numerics/packing.py says" in library.why


@pytest.mark.usefixtures("quick_compiler")
def test_a_compiler_that_fails_is_named_with_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "kernels.c"
    source.write_text("this is no C;", "utf-8")
    monkeypatch.setattr(kernels, "SOURCE", source)
    library = kernels.find_library(tmp_path)
    assert library.functions is None
    assert "failed: " in library.why and "kernels.c" in library.why


def test_a_folder_that_cannot_be_written_leaves_the_truth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert kernels.find_library(tmp_path / "file").functions is None
