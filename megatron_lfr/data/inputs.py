"""What `--input` names: files by their suffixes, folders of them, datasets of the hub; and their chunks, in order."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lfr.data.encoding import Part
from megatron_lfr.data.readers import Columns, HubReader, LineReader, ParquetReader, Reader, TextReader

JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt",)
COMPRESSIONS = (".gz", ".zst")
TABLE_SUFFIXES = (".parquet",)
HUB = "hf:"

CHUNK_BYTES = 1 << 19
"""How much text a worker gets at a time."""


@dataclass(frozen=True)
class Place:
    """Where reading goes on."""

    input: int = 0
    """Number of the input."""
    offset: int = 0
    """What was read of it: bytes of its text, or rows."""
    lines: int = 0
    """What was read of it in lines."""


@dataclass(frozen=True)
class Chunk:
    """Work for a worker: pieces of one or more inputs."""

    parts: list[Part]
    end: Place
    """Where the input goes on behind it."""
    stored: int
    """Bytes of all files up to there."""


def open_inputs(paths: Sequence[Path], columns: Columns) -> list[Reader]:
    """A reader for each input; a folder stands for all known files in it, at any depth, sorted by name.

    ValueError names the input that is missing, of no known kind, without keys when `columns` asks for a domain, or in
    need of a package that is not installed.
    """
    readers: list[Reader] = []
    for path in paths:
        if str(path).startswith(HUB):
            readers.append(_hub(str(path), columns))
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if _is_known(file) and file.is_file())
            if not files:
                raise ValueError(f"--input {path}: no file of a known kind in this folder; known are {_LEGAL}")
            readers.extend(_file(file, columns) for file in files)
        else:
            readers.append(_file(path, columns))
    return readers


def chunks(readers: Sequence[Reader], start: Place) -> Iterator[Chunk]:
    """The inputs from a place on, in chunks of about `CHUNK_BYTES`: small files share one."""
    parts: list[Part] = []
    size = 0
    before = sum(reader.stored_bytes or 0 for reader in readers[: start.input])
    for number, reader in enumerate(readers[start.input :], start.input):
        offset, lines = (start.offset, start.lines) if number == start.input else (0, 0)
        for progressed in reader.parts(offset, lines, CHUNK_BYTES):
            parts.append(progressed.part)
            size += progressed.part.size
            end = Place(number, progressed.offset, progressed.lines)
            stored = before + progressed.stored
            if size >= CHUNK_BYTES:
                yield Chunk(parts, end, stored)
                parts, size = [], 0
        before += reader.stored_bytes or 0
    if parts:
        yield Chunk(parts, end, stored)


_LEGAL = (
    f"{', '.join((*JSONL_SUFFIXES, *TEXT_SUFFIXES))} (each also with {' or '.join(COMPRESSIONS)}), "
    f"{', '.join(TABLE_SUFFIXES)}"
)


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _is_known(path: Path) -> bool:
    return not path.name.startswith(".") and (
        _kind(path) in (*JSONL_SUFFIXES, *TEXT_SUFFIXES) or path.suffix in TABLE_SUFFIXES
    )


def _file(path: Path, columns: Columns) -> Reader:
    if not path.is_file():
        raise ValueError(f"--input {path}: no such file")
    kind, size = _kind(path), path.stat().st_size
    if path.suffix == ".zst":
        _require("zstandard", str(path))
    if kind in JSONL_SUFFIXES:
        return LineReader(path, size)
    if kind in TEXT_SUFFIXES:
        if columns.domain is not None:
            raise ValueError(f"--domain-key {columns.domain}: {path} is a text file, which has no keys")
        return TextReader(path, size)
    if path.suffix in TABLE_SUFFIXES:
        _require("pyarrow", str(path))
        reader = ParquetReader(path, size, columns)
        reader.check()
        return reader
    raise ValueError(f"--input {path}: unknown kind of file; known are {_LEGAL}, and {HUB}NAME for a hub's dataset")


def _hub(name: str, columns: Columns) -> HubReader:
    words = name.removeprefix(HUB).split(":")
    if not words[0] or len(words) > 3 or not all(words):
        raise ValueError(f"--input {name}: must be {HUB}NAME, {HUB}NAME:SPLIT or {HUB}NAME:CONFIG:SPLIT")
    _require("datasets", name)
    split = words[-1] if len(words) > 1 else "train"
    return HubReader(name, words[0], words[1] if len(words) == 3 else None, split, columns)


def _require(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"--input {name}: needs the package {package!r}, which is not installed; it comes with "
            "pip install 'megatron_lfr[corpora]'"
        )
