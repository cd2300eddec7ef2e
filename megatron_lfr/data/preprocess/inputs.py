"""Opens what `--input` names (files by their suffixes, folders, datasets of the hub) and cuts it into chunks."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lfr.data.preprocess.documents import Part
from megatron_lfr.data.preprocess.readers import Columns, HubReader, LineReader, ParquetReader, Reader, TextReader
from megatron_lfr.output import visible

JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt",)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
TABLE_SUFFIXES = (".parquet",)
HUB = "hf:"

CHUNK_BYTES = 1 << 19
"""How much text a worker gets at a time, in bytes."""
_REASONS = 8
"""How many reasons for leaving files out are listed."""


@dataclass(frozen=True)
class Position:
    """Where reading continues."""

    input: int = 0
    """Index of the input."""
    offset: int = 0
    """How much of it has been read: bytes of its text, or rows."""
    lines: int = 0
    """How many of its lines have been read."""


@dataclass(frozen=True)
class Chunk:
    """Work for a worker: parts of one or more inputs."""

    parts: list[Part]
    end: Position
    """Where the input continues after the chunk."""
    stored: int
    """Bytes of all files up to `end`."""


def open_inputs(paths: Sequence[Path], columns: Columns) -> list[Reader]:
    """Return a reader for each input; a folder gives all files of a known kind in it, at any depth, sorted by name.

    Links are followed, and a file that is reached twice, in folders or by its name, is read once. Files that are left
    out are counted on stderr. ValueError names an input that is missing, is of an unknown kind, has no keys although
    `columns` has a domain, or needs a package that is not installed.
    """
    readers: list[Reader] = []
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    for path in paths:
        if str(path).startswith(HUB):
            readers.append(_hub(str(path), columns))
            continue
        files = sorted(_files_in(path, left_out)) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"--input {path}: no file of a known kind in this folder; known are {_LEGAL}")
        for file in files:
            target = os.path.realpath(file)
            if target in seen:
                left_out["reached twice"] += 1
                continue
            seen.add(target)
            readers.append(_file(file, columns))
    if left_out:
        reasons = [f"{count} {reason}" for reason, count in left_out.most_common(_REASONS)]
        if more := left_out.total() - sum(count for _, count in left_out.most_common(_REASONS)):
            reasons.append(f"{more} for other reasons")
        print(f"inputs: {len(readers)}; left out: {', '.join(reasons)}", file=sys.stderr)
    return readers


def chunks(readers: Sequence[Reader], start: Position) -> Iterator[Chunk]:
    """Cut the inputs, from a position on, into chunks of about `CHUNK_BYTES`; small files share a chunk."""
    parts: list[Part] = []
    size = 0
    before = sum(reader.stored_bytes or 0 for reader in readers[: start.input])
    for number, reader in enumerate(readers[start.input :], start.input):
        offset, lines = (start.offset, start.lines) if number == start.input else (0, 0)
        for progressed in reader.parts(offset, lines, CHUNK_BYTES):
            parts.append(progressed.part)
            size += progressed.part.size
            end = Position(number, progressed.offset, progressed.lines)
            stored = before + progressed.stored
            if size >= CHUNK_BYTES:
                yield Chunk(parts, end, stored)
                parts, size = [], 0
        before += reader.stored_bytes or 0
    if parts:
        yield Chunk(parts, end, stored)


_LEGAL = (
    f"{', '.join((*JSONL_SUFFIXES, *TEXT_SUFFIXES))} (each also with {', '.join(COMPRESSIONS)}), "
    f"{', '.join(TABLE_SUFFIXES)}"
)


def _files_in(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Yield the files of a known kind in a folder, and behind its links; enter each folder once, so that loops end.
    Other files are counted by the reason why they are left out. OSError for a folder that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    entered = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        entering = []
        for name in sorted(folders):
            real = os.path.realpath(Path(parent, name))
            if name.startswith("."):
                left_out["hidden folders"] += 1
            elif real in entered:
                left_out["folders reached twice"] += 1
            else:
                entered.add(real)
                entering.append(name)
        folders[:] = entering
        for path in (Path(parent, name) for name in names):
            reason = _why_not(path)
            if reason is None:
                yield path
            else:
                left_out[reason] += 1


def _why_not(path: Path) -> str | None:
    """Return why a file of a folder is left out; None if it is not."""
    if path.name.startswith("."):
        return "hidden"
    if not path.exists():
        return "links that lead nowhere"
    if _kind(path) not in (*JSONL_SUFFIXES, *TEXT_SUFFIXES) and path.suffix.lower() not in TABLE_SUFFIXES:
        return f"of unknown kind ({visible(path.suffix) or 'no ending'})"
    return None if path.is_file() else "not a regular file"


def _kind(path: Path) -> str:
    """Return a file's suffix without that of its compression, in lower case."""
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path.name).suffix.lower()


def _file(path: Path, columns: Columns) -> Reader:
    if not path.is_file():
        reason = "is not a regular file, and could not be read again after a kill" if path.exists() else "no such file"
        raise ValueError(f"--input {path}: {reason}")
    kind, size = _kind(path), path.stat().st_size
    if columns.records and kind not in JSONL_SUFFIXES:
        raise ValueError(f"--sft: reads JSON lines ({', '.join(JSONL_SUFFIXES)}), not {path}")
    if path.suffix.lower() == ".zst":
        _require("zstandard", str(path))
    if kind in JSONL_SUFFIXES:
        return LineReader(path, size)
    if kind in TEXT_SUFFIXES:
        if columns.domain is not None:
            raise ValueError(f"--domain-key {columns.domain}: {path} is a text file, which has no keys")
        return TextReader(path, size)
    if path.suffix.lower() in TABLE_SUFFIXES:
        _require("pyarrow", str(path))
        reader = ParquetReader(path, size, columns)
        reader.check()
        return reader
    raise ValueError(f"--input {path}: unknown kind of file; known are {_LEGAL}, and {HUB}NAME for a hub's dataset")


def _hub(name: str, columns: Columns) -> HubReader:
    words = name.removeprefix(HUB).split(":")
    if not words[0] or len(words) > 3 or not all(words):
        raise ValueError(f"--input {name}: must be {HUB}NAME, {HUB}NAME:SPLIT or {HUB}NAME:CONFIG:SPLIT")
    if columns.records:
        raise ValueError(f"--sft: reads JSON lines, not {name}")
    _require("datasets", name)
    split = words[-1] if len(words) > 1 else "train"
    return HubReader(name, words[0], words[1] if len(words) == 3 else None, split, columns)


def _require(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"--input {name}: needs the package {package!r}, which is not installed; it comes with "
            "pip install 'megatron_lfr[corpora]'"
        )
