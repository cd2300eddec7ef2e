"""The demo's corpus is balanced, and the same from the same Python."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def run_script(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    done = run_script("examples/demo/make_corpus.py", path, "--kilobytes-per-domain", 40)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def make_corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "demo"))
    return importlib.import_module("make_corpus")


def read(path: Path) -> dict[str, list[str]]:
    domains: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        domains.setdefault(record["domain"], []).append(record["text"])
    return domains


def test_domains_are_balanced_and_documents_moderate(corpus: Path) -> None:
    domains = read(corpus)
    assert sorted(domains) == ["code", "docstrings", "reference", "unicode"]
    for texts in domains.values():
        assert 40_000 <= sum(len(text.encode()) for text in texts) < 40_000 + 4 * 6500
        assert len(set(texts)) == len(texts)
        assert min(map(len, texts)) >= 600
        assert max(map(len, texts)) <= 6500


def test_the_same_python_makes_the_same_corpus(corpus: Path, tmp_path: Path) -> None:
    run_script("examples/demo/make_corpus.py", tmp_path / "again.jsonl", "--kilobytes-per-domain", 40)
    assert (tmp_path / "again.jsonl").read_bytes() == corpus.read_bytes()


SOURCE = '''"""Module."""
import os
# a comment
def f(): "one line"
def g():
    """g: ünï"""; return 1
class C:
    """Class.

    more
    """
    x = """not a docstring"""
    def m(self):
        """m"""

        async def inner():
            "inner"
            return "kept"
        return inner
'''


def test_docstrings_are_taken_out_and_nothing_else(make_corpus: ModuleType) -> None:
    code, texts = make_corpus.split_docstrings(SOURCE, "mod")
    assert texts == [
        "mod\nModule.",
        "mod.f\none line",
        "mod.g\ng: ünï",
        "mod.C\nClass.\n\nmore",
        "mod.C.m\nm",
        "mod.C.m.inner\ninner",
    ]
    tree = ast.parse(code)
    nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    assert len(nodes) == 6
    assert [ast.get_docstring(node) for node in nodes] == [None] * 6
    assert "# a comment" in code
    assert 'x = """not a docstring"""' in code


def test_real_modules_stay_the_same_programs(make_corpus: ModuleType) -> None:
    """Their syntax trees agree, but for docstrings and the `pass` that replaces a lone one."""

    def without_docstrings(tree: ast.AST) -> str:
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED):
                first = 0 if ast.get_docstring(node) is None else 1
                node.body = [statement for statement in node.body[first:] if not isinstance(statement, ast.Pass)]
        return ast.dump(tree)

    for _, path in make_corpus.library_modules()[:25]:
        source = path.read_text("utf-8")
        code, _ = make_corpus.split_docstrings(source, "m")
        assert without_docstrings(ast.parse(code)) == without_docstrings(ast.parse(source)), path
