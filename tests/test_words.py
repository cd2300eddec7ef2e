"""The names that CONTRIBUTING.md forbids are used nowhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
GLOSSARY = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
STORED = {("megatron_lfr/data/preprocess/command.py", "place")}
"""Names that are keys of files on disk, which stay."""


def forbidden() -> set[str]:
    """Return the names of the glossary's last sentence, up to "are not names"."""
    (sentence,) = re.findall(r"named after what they hold or do\. (.*?) are not names", GLOSSARY, re.DOTALL)
    return set(re.findall(r"`(\w+)`", sentence))


def bound_names(path: Path) -> set[str]:
    """Return what a file calls its variables, attributes, arguments, functions and classes."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return {name.strip("_") for name in names}


def test_no_name_is_a_forbidden_word() -> None:
    words = forbidden()
    assert {"found", "own", "whole"} <= words
    folders = ("megatron_lfr", "tools", "examples", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 300
    used = {(str(path.relative_to(ROOT)), name) for path in files for name in bound_names(path) & words}
    assert used - STORED == set()
