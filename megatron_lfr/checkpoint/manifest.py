"""A checkpoint's manifest: the size and hash of each of its files, so that a damaged one is noticed.

{"version": 1, "files": {"state.json": {"bytes": 812, "sha256": "..."}, ...}}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from megatron_lfr.fileio import write_atomic
from megatron_lfr.parallel import ranks

NAME = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes of a file and the SHA-256 of its content in hexadecimal."""

    bytes: int
    sha256: str


def record_file(path: Path) -> FileRecord:
    """Describe a file; reads it once."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Write `folder`'s manifest; it is on the disk when this returns."""
    files = {name: asdict(records[name]) for name in sorted(records)}
    write_atomic(folder / NAME, json.dumps({"version": 1, "files": files}, indent=1))


def find_damage(folder: Path, required: str, group: ProcessGroup | None) -> str | None:
    """Return what is wrong with a checkpoint folder, which must hold the file `required`; None for a complete one.

    Collective over `group`: each rank hashes its share of the files, and all get the same answer.
    """
    rank = ranks.rank(group)
    records, damage = ranks.from_first_rank(read_manifest(folder, required) if rank == 0 else ({}, None), group)
    if damage is not None:
        return damage
    share = list(records.items())[rank :: ranks.world_size(group)]
    damages = (f"{name}: {reason}" for name, record in share if (reason := _file_damage(folder / name, record)))
    return next((reason for reason in ranks.gather(next(damages, None), group) if reason is not None), None)


def read_manifest(folder: Path, required: str) -> tuple[dict[str, FileRecord], str | None]:
    """Return the records of the files, and what is wrong with the manifest or with the names in the folder."""
    path = folder / NAME
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):  # reading a pipe would never end
            return {}, f"{NAME} is not a plain file"
        records = _parse(json.loads(path.read_text(encoding="utf-8")))
        present = {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return {}, f"{NAME} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{NAME} is not readable ({error})"
    if required not in records:
        return {}, f"{NAME} does not list {required}"
    extra = present - {NAME, *records}
    return records, f"{min(extra)} does not belong to it" if extra else None


def tensors_digest(folder: Path, state_file: str) -> str:
    """Return a SHA-256, in hexadecimal, of the files of a checkpoint's tensors, as its manifest names them; ValueError
    where that is damaged."""
    records, damage = read_manifest(folder, state_file)
    if damage is not None:
        raise ValueError(f"{folder}: the checkpoint is damaged: {damage}")
    hashes = [f"{name} {record.sha256}\n" for name, record in sorted(records.items()) if name != state_file]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _parse(manifest: Any) -> dict[str, FileRecord]:
    if not isinstance(manifest, dict) or manifest.get("version") != 1 or not isinstance(manifest.get("files"), dict):
        raise ValueError("it is not a manifest of version 1")
    records = {}
    for name, entry in manifest["files"].items():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"{name!r} is not the name of a file in the folder")
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("bytes"), int)
            or not isinstance(entry.get("sha256"), str)
            or not re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        ):
            raise ValueError(f"{name!r} has no size and SHA-256")
        records[name] = FileRecord(entry["bytes"], entry["sha256"])
    return records


def _file_damage(path: Path, expected: FileRecord) -> str | None:
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            return "not a plain file"
        size = path.stat().st_size
        if size != expected.bytes:
            return f"holds {size} bytes instead of {expected.bytes}"
        return None if record_file(path) == expected else "its content has changed"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"not readable ({error})"
