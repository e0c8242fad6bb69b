import ast
import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_the_python_in_the_documentation_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})


def test_the_command_line_page_is_what_the_commands_say() -> None:
    write = runpy.run_path(str(ROOT / "tools" / "write_cli_docs.py"))
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == write["describe_commands"](), "run: python tools/write_cli_docs.py"


def test_the_noise_table_is_what_was_measured() -> None:
    measure = runpy.run_path(str(ROOT / "benchmarks" / "sqnr.py"))
    rows = json.loads((ROOT / "benchmarks" / "results" / "sqnr.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs" / "eight-bits.md").read_text(encoding="utf-8")
    assert measure["write_table"]([measure["Row"](**row) for row in rows]).strip() in page


def test_the_formats_page_and_its_figures_are_what_the_table_says() -> None:
    write = runpy.run_path(str(ROOT / "tools" / "write_formats_docs.py"))
    for path, text in write["describe_formats"]().items():
        assert path.read_text(encoding="utf-8") == text, "run: python tools/write_formats_docs.py"


def test_the_operations_page_is_what_the_table_says() -> None:
    write = runpy.run_path(str(ROOT / "tools" / "write_operator_docs.py"))
    _, mark, tables = write["PAGE"].read_text(encoding="utf-8").partition(write["MARK"])
    assert mark and tables == write["describe_operations"](), "run: python tools/write_operator_docs.py"


def test_the_plan_in_the_documentation_reads(tmp_path: Path) -> None:
    from halfstep import Plan

    (toml,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "plans.md").read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "plan.toml"
    path.write_text(toml, encoding="utf-8")
    assert Plan.load(path).name == "mine"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_and_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def list_tests(path: Path) -> set[str]:
    """Names of a file's tests, as pytest writes them."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def test_every_row_of_the_reliability_page_names_tests_that_exist() -> None:
    rows = re.findall(r"^\| (?!fault|---)(.+) \|$", (ROOT / "docs" / "reliability.md").read_text("utf-8"), re.MULTILINE)
    assert rows
    for row in rows:
        named = re.findall(r"`(tests/\w+\.py)::([\w:]+)`", row.split(" | ")[-1])
        assert named, f"no test shows: {row}"
        for file, test in named:
            assert test in list_tests(ROOT / file), f"{file}::{test}"
