"""docs/architecture.md: what imports what, and the functions that a block id and a step pass."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_lfr"
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
ROWS = re.findall(r"^\| `([\w.]+)` \| [^|]+ \| ([^|]*) \|$", PAGE, re.MULTILINE)
ALLOWED = {room: re.findall(r"`([\w.]+)`", imported) for room, imported in ROWS}


def room_of(module: str) -> str | None:
    """Return the narrowest room that holds a module; None for the package itself and its start, `__main__`."""
    parts = module.split(".")[1:]
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in ALLOWED), None)


def imports() -> dict[str, dict[str, str]]:
    """By room, the rooms that it imports, each with a line that does; imports inside of functions, and those for types
    alone, as well."""
    imported: dict[str, dict[str, str]] = defaultdict(dict)
    for path in PACKAGE.rglob("*.py"):
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: a relative import"
                modules = [f"{node.module}.{name.name}" for name in node.names]
            for module in modules:
                other = room_of(module) if module.startswith("megatron_lfr.") else None
                if room is not None and other not in (None, room):
                    imported[room][str(other)] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return imported


def test_every_module_has_a_room() -> None:
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    without = {module for module in modules if room_of(f"megatron_lfr.{module}") is None}
    assert without == {"__init__", "__main__", "data.__init__"}


def test_imports_go_down() -> None:
    rooms = list(ALLOWED)
    assert len(rooms) == len(ROWS) > 20
    assert [(room, other) for room in rooms for other in ALLOWED[room] if rooms.index(other) <= rooms.index(room)] == []


def test_every_import_is_in_the_table() -> None:
    imported = imports()
    beyond = {
        f"{room} imports {other}": line
        for room, others in imported.items()
        for other, line in others.items()
        if other not in ALLOWED[room]
    }
    assert beyond == {}
    unused = [(room, other) for room, others in ALLOWED.items() for other in others if other not in imported[room]]
    assert unused == [], "the table allows what nothing does any more"


@pytest.mark.parametrize(("path", "name"), re.findall(r"`(megatron_lfr/[\w/]+\.py)::([\w.]+)`", PAGE))
def test_functions_that_the_page_names_exist(path: str, name: str) -> None:
    nodes: list[ast.stmt] = ast.parse((ROOT / path).read_text("utf-8")).body
    for part in name.split("."):
        (node,) = (n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part)
        nodes = node.body
