"""Kernels: compiled once, checked against the truth, and left out without a word where that cannot be done."""

import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from halfstep.numerics import dropouts, gelus, kernels, losses, packing, scaled_attention


@pytest.mark.parametrize("module", [packing, dropouts, gelus, losses, scaled_attention])
def test_the_kernels_of_this_machine_run_natively_where_it_has_a_compiler(module: ModuleType) -> None:
    has_compiler = any(map(kernels.shutil.which, kernels.COMPILERS))
    assert module.KERNELS.describe().startswith("native: " if has_compiler else "torch: no C compiler")


@pytest.mark.parametrize("module", [dropouts, gelus, losses, scaled_attention])
def test_without_a_compiler_torchs_functions_run(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.setitem(module.KERNELS.__dict__, "library", kernels.Library(None, "no C compiler was found"))
    x, target = torch.ones(3, 8, 8, requires_grad=True), torch.arange(8)
    wide = torch.ones(1 << 16, dtype=torch.bfloat16, requires_grad=True)
    why, out = {
        dropouts: lambda: (dropouts.explain_dropout(x), dropouts.dropout(x)),
        gelus: lambda: (gelus.explain_gelu(wide), gelus.gelu(wide)),
        losses: lambda: (losses.explain_cross_entropy(x[0], target), losses.cross_entropy(x[0], target)),
        scaled_attention: lambda: (
            scaled_attention.explain_attention(x, x, x),
            scaled_attention.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        ),
    }[module]()
    assert why == "torch: no C compiler was found"
    assert type(out.grad_fn).__name__.endswith("Backward0")  # torch's own nodes are numbered


def test_torch_compile_gets_torchs_functions_outside_of_the_mode() -> None:
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def compute(x: Tensor, target: Tensor) -> Tensor:
        x = dropouts.dropout(x, 0.1)
        return losses.cross_entropy(scaled_attention.scaled_dot_product_attention(x, x, x)[0], target)

    x = torch.randn(2, 8, 16, requires_grad=True)
    torch.compile(compute, backend=record, fullgraph=True)(x, torch.zeros(8, dtype=torch.long)).backward()
    assert len([name for name in seen if any(w in name for w in ("dropout", "attention", "cross_entropy"))]) == 3


def test_without_a_compiler_the_truth_runs_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "COMPILERS", ("no-such-compiler",))
    library = packing.KERNELS.find(tmp_path)
    assert library.functions is None
    assert library.why == "no C compiler was found (looked for no-such-compiler)"
    monkeypatch.setitem(packing.KERNELS.__dict__, "library", library)
    x = torch.linspace(0, 1, 300)
    truth = packing.pack_groups_slowly(x, 8, (1, 2))
    assert torch.equal(packing.pack_groups(x, 8, (1, 2)).codes, truth.codes)
    assert packing.KERNELS.describe().startswith("torch: no C compiler")


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    if not any(map(kernels.shutil.which, kernels.COMPILERS)):
        pytest.skip("no C compiler")
    monkeypatch.setattr(kernels, "FLAGS", ("-std=c11", "-O0", "-ffp-contract=off", "-fPIC", "-shared"))
    monkeypatch.setattr(kernels, "TRIES", ((),))


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("module", [packing, dropouts, gelus, losses, scaled_attention])
def test_kernels_are_tried_alike_wherever_they_are_first_needed(module: ModuleType, tmp_path: Path) -> None:
    """As in a loop that keeps an autocast of its own around the model."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert module.KERNELS.find(tmp_path).functions is not None
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("quick_compiler")
def test_kernels_that_cannot_be_tried_are_left_out(tmp_path: Path) -> None:
    def fail(_: object) -> bool:
        raise RuntimeError("no memory\nat all")

    library = kernels.Kernels("packing.c", packing.KERNELS.signatures, fail).find(tmp_path)
    assert library.functions is None and library.why.endswith("could not be tried: no memory")


@pytest.mark.usefixtures("quick_compiler")
def test_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert packing.KERNELS.find(tmp_path / "new" / "folder").functions is not None

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert packing.KERNELS.find(tmp_path / "new" / "folder").functions is not None


@pytest.mark.usefixtures("quick_compiler")
def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "packing.c"
    source.write_text(packing.KERNELS.source.read_text("utf-8").replace("(0.5f + 0x1p-17f)", "0.25f"), "utf-8")
    monkeypatch.setattr(packing.KERNELS, "source", source)
    library = packing.KERNELS.find(tmp_path)
    assert library.functions is None
    assert "does not compute what packing.py says" in library.why


@pytest.mark.usefixtures("quick_compiler")
def test_a_compiler_that_fails_is_named_with_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "packing.c"
    source.write_text("this is no C;", "utf-8")
    monkeypatch.setattr(packing.KERNELS, "source", source)
    library = packing.KERNELS.find(tmp_path)
    assert library.functions is None
    assert "failed: " in library.why and "packing.c" in library.why


def test_a_folder_that_cannot_be_written_leaves_the_truth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert packing.KERNELS.find(tmp_path / "file").functions is None


@pytest.mark.parametrize("module", [packing, dropouts, gelus, losses, scaled_attention])
def test_kernels_are_tried_beside_modes_that_hand_out_tensors_without_memory(
    module: ModuleType, tmp_path: Path
) -> None:
    with FakeTensorMode(), torch.device("meta"):
        assert (module.KERNELS.find(tmp_path).functions is None) == (module.KERNELS.library.functions is None)
