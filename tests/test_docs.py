"""What the documentation says is so: its code runs, its figures and files and tests are there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from megatron_lfr.kernels import block_cross_entropy
from megatron_lfr.parallel import launchers

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """(line of its first statement, code) of each block of Python on a page."""
    text = page.read_text()
    matches = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in matches]


def test_the_librarys_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = DOCS / "library.md"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "library"}
    blocks = python_blocks(page)
    assert len(blocks) >= 8
    for line, code in blocks:
        tree = ast.increment_lineno(ast.parse(code), line)  # so that a failure shows the page's line
        exec(compile(tree, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", ["megatron_lfr.lfr", "megatron_lfr.analysis", "megatron_lfr.kernels"])
def test_the_librarys_names_are_those_of_its_table(name: str) -> None:
    row = next(line for line in (DOCS / "library.md").read_text().splitlines() if line.startswith(f"| `{name}`"))
    assert set(re.findall(r"`(\w+)`", row.split("|")[2])) == set(importlib.import_module(name).__all__)


def test_the_options_of_the_cross_entropy_are_all_documented() -> None:
    page = (DOCS / "library.md").read_text()
    section = page[page.index("## The cross-entropy") : page.index("## Stopping and going on")]
    signature = inspect.signature(block_cross_entropy)
    documented = set(re.findall(r"`(\w+)(?:=.)?`", section))
    assert {n for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY} <= documented


def test_the_librarys_figures_are_those_of_the_record() -> None:
    page, record = (DOCS / "library.md").read_text(), (ROOT / "benchmarks/2026-11-21-phase-orders.md").read_text()
    measured = re.findall(r"^\| .* \| ([\d.]+) \| .* \| .* \| ([\d.]+) \|$", record, re.MULTILINE)
    documented = re.findall(r"^\| .* \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(documented) == 4
    for seconds, bytes_a_block in documented:
        assert any(abs(float(seconds) - float(s)) < 0.0051 and bytes_a_block == b for s, b in measured)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_exist(page: Path) -> None:
    named = set(re.findall(r"`((?:examples|benchmarks|docs|studies|tests|tools)/[\w./-]+)", page.read_text()))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_pages_name_exist(page: Path) -> None:
    for path, name in re.findall(r"`(tests/[\w./-]+\.py)::(\w+)", page.read_text()):
        tree = ast.parse((ROOT / path).read_text())
        assert name in [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)], f"{path}::{name}"


def test_every_complaint_has_a_link_and_a_test() -> None:
    lines = (DOCS / "data_plane.md").read_text().partition("\n## ")[0].splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert len(rows) == 9
    for _, threads, _, tests in rows:
        assert re.fullmatch(r"(\[[\w -]+ \d+\]\(https://github\.com/[\w./-]+/(issues|pull)/\d+\)(, )?)+", threads)
        assert re.fullmatch(r"(`tests/[\w/]+\.py::test_\w+`(, )?)+", tests.strip())


def test_the_launchers_variables_are_those_that_are_read() -> None:
    page = (DOCS / "launch.md").read_text()
    section = page[page.index("## Launchers") : page.index("## File systems")]
    documented = set(re.findall(r"`((?:[A-Z]+_)*(?:RANK|SIZE|RANKID|LOCALNRANKS|[A-Z]+))`", section))
    read = set(launchers.ALL_VARIABLES) - {"", "SLURM_NTASKS"}  # which errors alone list
    assert read == {name for name in documented if name.isupper()}


def test_the_table_of_measurements_is_made_from_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import readme_tables

    readme = (ROOT / "README.md").read_text("utf-8")
    assert readme == readme_tables.with_table(readme, readme_tables.table()), "run tools/readme_tables.py"


def test_the_keys_of_a_benchmarks_result_are_documented() -> None:
    source = (ROOT / "megatron_lfr" / "benchmark" / "result.py").read_text("utf-8")
    (function,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "make_result")
    (result,) = (n for n in ast.walk(function) if isinstance(n, ast.Return))
    assert isinstance(result.value, ast.Dict)
    keys = [key.value for key in result.value.keys if isinstance(key, ast.Constant)]
    assert len(keys) > 20
    page = (DOCS / "benchmark.md").read_text("utf-8")
    assert [key for key in keys if f"`{key}`" not in page] == []
