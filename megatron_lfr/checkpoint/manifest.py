"""A checkpoint's manifest: the size and hash of each of its files, so that a damaged one is noticed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Describe every file of `folder` in its manifest.json; all of it is on the disk when this returns."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    with (folder / NAME).open("w") as file:
        json.dump({"version": 1, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None for a whole one."""
    if (folder / NAME).is_symlink():
        return f"{NAME} is a link"
    try:
        files = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            if damage := _file_damage(folder / name, expected):
                return f"{name}: {damage}"
        extra = {path.name for path in folder.iterdir()} - {NAME, *files}
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} is not readable ({error!r})"
    return f"{min(extra)} does not belong to it" if extra else None


def _file_damage(path: Path, expected: dict[str, Any]) -> str | None:
    if path.parent / path.name != path or path.is_symlink():
        return "not a file of this folder"
    if not path.is_file():
        return "missing"
    if path.stat().st_size != expected["bytes"]:
        return f"holds {path.stat().st_size} bytes instead of {expected['bytes']}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == expected["sha256"] else "its content has changed"
