"""The laws of the house: who may import whom, what a name may be, what the face shows."""

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import halfstep

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
PACKAGE = SRC / "halfstep"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = [path for path in FILES if path.name == "__init__.py" and path.parent != PACKAGE]

SPINE = [
    "errors",
    "nests",
    "records",
    "numerics.formats",
    "plan",
    "rehearsals",
    "control.search",
    "control.controller",
    "numerics.operations",
    "numerics.rounding",
    "numerics.noise",
    "numerics.words",
    "numerics.kernels",
    "numerics.packing",
    "numerics.norms",
    "numerics.dropouts",
    "numerics.gelus",
    "numerics.codebooks",
    "numerics.updates",
    "numerics.rows",
    "numerics.losses",
    "numerics.native_steps",
    "numerics.native_rows",
    "numerics.routes",
    "numerics.patches",
    "numerics.routed_convolutions",
    "numerics.scaled_attention",
    "numerics.traced",
    "numerics.movement",
    "numerics.truths",
    "numerics.repeated_steps",
    "numerics.openings",
    "numerics.amax",
    "numerics.casting",
    "numerics.products",
    "numerics.multiplication",
    "numerics.convolution",
    "numerics.attention",
    "numerics.lookup",
    "numerics.recurrence",
    "machine.timing",
    "machine.hardware",
    "machine.profiles",
    "machine.pool",
    "machine.runtime",
    "snapshot",
    "distributed",
    "insides",
    "mechanisms.layers",
    "mechanisms.operators",
    "mechanisms.functions",
    "mechanisms.replacements",
    "mechanisms.activations",
    "mechanisms.gradients",
    "mechanisms.loss_scale",
    "mechanisms.scaler_memory",
    "mechanisms.grad_scaler",
    "mechanisms.master_weights",
    "mechanisms.optimizer_states",
    "mechanisms.memory_formats",
    "control.monitor",
    "feasibility",
    "conversion",
    "control.memory_formats",
    "control.trials",
    "control.sensitivity",
    "window",
    "stepping.optimizers",
    "stepping.agreement",
    "stepping.closures",
    "stepping.copies",
    "stepping.gradient_release",
    "stepping.options",
    "stepping.plan_in_force",
    "stepping.rescue",
    "stepping.stalls",
    "stepper",
    "checkpoint",
    "training",
    "arms",
    "comparison",
    "tasks",
    "report",
    "runs",
    "cli",
]
PURE = [
    "errors",
    "records",
    "numerics.formats",
    "plan",
    "rehearsals",
    "control.search",
    "control.controller",
    "numerics.operations",
]
OPTIONAL = {"sklearn", "pyarrow", "PIL", "datasets", "torchvision", "tensorboard"}
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}  # where the two names differ by more than a dash
PROCESS_SWITCHES = re.compile(
    r"torch\.(set_(?!rng_state)\w+|use_deterministic_algorithms|backends\.\S+ =|autograd\.set_\w+)|os\.environ\[\S+\] ="
)


def load_layering_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layering_check", ROOT / "tools" / "layering_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Dotted names that a tree imports, outside functions or everywhere; TYPE_CHECKING blocks are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imports_of(ast.Module(node.orelse, []), inside_functions=inside_functions)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports_of(node, inside_functions=inside_functions)


def top(name: str) -> str:
    return name.split(".")[0]


def is_third_party(name: str) -> bool:
    return top(name) not in sys.stdlib_module_names and top(name) != "halfstep"


def distribution(package: str) -> str:
    return DISTRIBUTIONS.get(package, package).replace("_", "-").lower()


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", requirement)[0].replace("_", "-").lower() for requirement in requirements}


def project() -> dict[str, object]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    values: dict[str, object] = tomllib.loads(text)["project"]
    return values


def dependencies() -> set[str]:
    required = project()["dependencies"]
    assert isinstance(required, list)
    return declared(required)


def extras() -> set[str]:
    optional = project()["optional-dependencies"]
    assert isinstance(optional, dict)
    return declared([requirement for group in optional.values() for requirement in group])


def public_functions(path: Path) -> Iterator[str]:
    """Public functions of a module; commands of the command line are called by their users' words and left out."""
    for node in parse(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            is_command = any(ast.unparse(d).startswith("app.command") for d in node.decorator_list)
            yield from [] if is_command else [node.name]


def module_names() -> set[str]:
    files = {path.stem for path in FILES if not path.stem.startswith("__")}
    return files | {path.parent.name for path in ROOMS}


def imported_by(*arguments: str) -> set[str]:
    """Top-level packages that a Python process imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {top(line.split("|")[2].strip()) for line in lines}


def test_spine_order_holds() -> None:
    assert load_layering_check().violations(SRC, "halfstep", SPINE) == []


def test_spine_names_no_module_that_does_not_exist() -> None:
    for name in SPINE:
        path = PACKAGE.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file()


def test_a_wrong_order_would_be_seen() -> None:
    check = load_layering_check().violations
    assert "plan imports errors, which stands after it" in check(SRC, "halfstep", SPINE[::-1])
    swapped = ["errors", "nests", "records", "plan", "numerics.formats", *SPINE[5:]]
    assert check(SRC, "halfstep", swapped) == ["plan imports numerics.formats, which stands after it"]
    assert "stepper is not in SPINE" in check(SRC, "halfstep", [name for name in SPINE if name != "stepper"])


@pytest.mark.parametrize("module", ["halfstep", *(f"halfstep.{name}" for name in PURE)])
def test_pure_part_imports_no_torch(module: str) -> None:
    imported = imported_by("-c", f"import {module}")
    assert "halfstep" in imported
    assert "torch" not in imported


def test_help_of_the_command_line_imports_no_torch() -> None:
    imported = imported_by("-m", "halfstep", "--help")
    assert "typer" in imported
    assert "torch" not in imported


def test_an_import_of_torch_would_be_seen() -> None:
    assert "torch" in imported_by("-c", "import halfstep.mechanisms.master_weights")


def test_listing_the_face_imports_no_torch() -> None:
    assert "torch" not in imported_by("-c", "import halfstep; dir(halfstep); halfstep.Plan; halfstep.HalfstepError")


def test_mechanisms_do_not_import_each_other() -> None:
    # the scaler is the rule behind torch's interface, and a memory
    parts = {"grad_scaler": ("halfstep.mechanisms.loss_scale.", "halfstep.mechanisms.scaler_memory.")}
    for path in sorted((PACKAGE / "mechanisms").glob("*.py")):
        names = list(imports_of(parse(path), inside_functions=True))
        others = [name for name in names if name.startswith("halfstep.mechanisms")]
        assert [name for name in others if not name.startswith(parts.get(path.stem, ()))] == []


@pytest.mark.parametrize("room", ["numerics", "mechanisms"])
def test_numerics_and_mechanisms_leave_other_ranks_to_others(room: str) -> None:
    for path in sorted((PACKAGE / room).glob("*.py")):
        tree = parse(path)
        names = list(imports_of(tree, inside_functions=True))
        assert [name for name in names if name.startswith("torch.distributed")] == []
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert [name for name in used if name.startswith("torch.distributed")] == []


def test_no_name_is_both_a_module_and_a_function() -> None:
    functions = {name for path in FILES for name in public_functions(path)}
    assert {"adjust", "find_format", "convert"} <= functions
    assert functions & module_names() == set()


def test_no_module_is_called_by_a_verb() -> None:
    verbs = {name.split("_")[0] for path in FILES for name in public_functions(path)}
    assert {"find", "read", "choose"} <= verbs
    assert verbs & module_names() == set()


def test_face_is_small_and_sorted() -> None:
    assert halfstep.__all__ == sorted(halfstep.__all__)
    assert len(halfstep.__all__) == len(set(halfstep.__all__)) <= 16


@pytest.mark.parametrize("name", halfstep.__all__)
def test_name_of_the_face_is_documented_with_an_example(name: str) -> None:
    value = getattr(halfstep, name)
    assert inspect.isclass(value) or inspect.isfunction(value)
    assert value.__name__ == name
    assert ">>>" in (inspect.getdoc(value) or "")


def test_face_type_checkers_see_is_the_face_that_is_loaded() -> None:
    (block,) = [node for node in parse(PACKAGE / "__init__.py").body if isinstance(node, ast.If)]
    seen = {
        alias.asname: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(str(name) for name in seen) == halfstep.__all__
    for name, home in seen.items():
        assert getattr(halfstep, str(name)) is getattr(importlib.import_module(home), str(name))


def test_face_lists_its_names_and_refuses_others() -> None:
    assert set(halfstep.__all__) <= set(dir(halfstep))
    with pytest.raises(AttributeError, match="module 'halfstep' has no attribute 'prepair'"):
        _ = halfstep.prepair


def test_version_is_that_of_the_project() -> None:
    assert halfstep.__version__ == project()["version"]


def test_optional_packages_are_imported_only_inside_functions() -> None:
    for path in FILES:
        names = [top(name) for name in imports_of(parse(path), inside_functions=False)]
        assert OPTIONAL & set(names) == set(), name_of(path)
        assert "torch.utils.tensorboard" not in names


def test_optional_packages_are_imported_somewhere() -> None:
    names = {n for path in FILES for n in imports_of(parse(path), inside_functions=True)}
    assert {top(name) for name in names} >= OPTIONAL - {"tensorboard"}
    assert any(name.startswith("torch.utils.tensorboard") for name in names)


def test_an_import_within_any_statement_would_be_seen() -> None:
    code = "try:\n import a\nexcept E:\n import b\nelse:\n import c\nfor x in y:\n import d\nclass C:\n import e\n"
    code += (
        "def f():\n import g\nif TYPE_CHECKING:\n import h\nwith w:\n from i import j\nmatch m:\n case 1:\n  import k\n"
    )
    tree = ast.parse(code)
    assert set(imports_of(tree, inside_functions=False)) == {"a", "b", "c", "d", "e", "i.j", "k"}
    assert set(imports_of(tree, inside_functions=True)) == {"a", "b", "c", "d", "e", "g", "i.j", "k"}


def test_imports_at_module_level_are_declared_dependencies() -> None:
    needed = {
        distribution(top(name))
        for path in FILES
        for name in imports_of(parse(path), inside_functions=False)
        if is_third_party(name)
    }
    assert {"torch", "tomli-w", "pydantic"} <= needed
    assert needed - dependencies() == set()


def test_imports_inside_functions_are_declared_dependencies_or_extras() -> None:
    needed = {
        distribution(top(name))
        for path in FILES
        for name in imports_of(parse(path), inside_functions=True)
        if is_third_party(name)
    }
    needed.discard("torchvision")  # only offered where it is installed already
    assert needed - dependencies() - extras() == set()


def test_every_declared_dependency_is_imported() -> None:
    imported = {distribution(top(name)) for path in FILES for name in imports_of(parse(path), inside_functions=True)}
    assert dependencies() - imported == set()


def test_extras_that_messages_name_exist() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    named = set(re.findall(r'MissingExtraError\("[^"]+", "([^"]+)"', text)) | set(
        re.findall(r"pip install '\.\[(\w+)\]'", text)
    )
    optional = project()["optional-dependencies"]
    assert isinstance(optional, dict)
    assert {"images", "tensorboard"} <= named
    assert named <= set(optional)


def test_rooms_hold_only_a_docstring() -> None:
    assert len(ROOMS) >= 6
    for path in ROOMS:
        (only,) = parse(path).body
        assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant), name_of(path)
        assert isinstance(only.value.value, str)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parse(path))


def switches(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Functions that set a process-wide switch, and whether they restore one in a `finally` or an ExitStack's callback."""
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        statements = [ast.unparse(n) for n in ast.walk(function) if isinstance(n, ast.Expr | ast.Assign)]
        if any(PROCESS_SWITCHES.search(statement) for statement in statements):
            final = [s for n in ast.walk(function) if isinstance(n, ast.Try) for s in n.finalbody]
            calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
            callbacks = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "callback"]
            text = "\n".join(ast.unparse(node) for node in [*final, *callbacks])
            yield function.name, PROCESS_SWITCHES.search(text) is not None


def test_process_switches_are_restored_by_a_finally() -> None:
    found = {f"{dotted(path)}.{name}": back for path in FILES for name, back in switches(parse(path))}
    assert "machine.runtime.tune_process" in found
    assert [name for name, restored in found.items() if not restored] == []


def test_a_switch_that_is_not_restored_would_be_seen() -> None:
    code = "def f():\n torch.set_num_threads(1)\ndef g():\n torch.backends.cudnn.benchmark = True\n"
    code += (
        "def h():\n try:\n  torch.set_num_threads(1)\n finally:\n  torch.set_num_threads(2)\ndef i():\n torch.ones(1)\n"
    )
    assert dict(switches(ast.parse(code))) == {"f": False, "g": False, "h": True}
