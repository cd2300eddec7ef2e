"""Inputs of preprocessing: files of lines, text files, tables. Each is read in parts, from the end of any part on.

A reader keeps no more than a part in memory (for Parquet, what pyarrow needs for the columns of a row group).
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from megatron_lfr.data.preprocess.documents import Lines, Part, Rows, TextFile

_SKIP_BYTES = 1 << 20
_PARQUET_ROWS = 1024
"""How many rows pyarrow reads at a time."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read."""

    text: str
    domain: str | None
    records: bool = False
    """Whether documents are supervised records, which no table has."""


@dataclass(frozen=True)
class Progressed:
    """A part, and where its input continues after it."""

    part: Part
    offset: int
    """Bytes of the (uncompressed) text, or rows, up to the end of the part."""
    lines: int
    """Lines up to the end of the part."""
    stored: int
    """Bytes of the file up to the end of the part; an estimate for compressed files and tables."""


class Reader(Protocol):
    """One input. Errors: ValueError naming it when it is damaged; OSError."""

    @property
    def name(self) -> str: ...

    @property
    def stored_bytes(self) -> int | None:
        """Size of the file; None if the input is not a file."""

    def parts(self, offset: int, lines: int, part_bytes: int) -> Iterator[Progressed]:
        """Read the input from `offset` on, which comes after `lines` lines, in parts of about `part_bytes` bytes."""


@dataclass(frozen=True)
class LineReader:
    """Reads a JSONL file, compressed or not."""

    path: Path
    stored_bytes: int

    @property
    def name(self) -> str:
        return str(self.path)

    def parts(self, offset: int, lines: int, part_bytes: int) -> Iterator[Progressed]:
        with self.path.open("rb") as stored, _damage_named(self.path):
            file = _decompressed(stored, self.path)
            _skip(file, offset, self.path)
            while data := file.read(part_bytes) + file.readline():
                offset += len(data)
                part = Lines(self.name, lines + 1, data)
                lines += data.count(b"\n")
                yield Progressed(part, offset, lines, stored.tell())


@dataclass(frozen=True)
class TextReader:
    """Reads a text file, compressed or not, as one document."""

    path: Path
    stored_bytes: int

    @property
    def name(self) -> str:
        return str(self.path)

    def parts(self, offset: int, lines: int, part_bytes: int) -> Iterator[Progressed]:
        if offset:
            return
        with self.path.open("rb") as stored, _damage_named(self.path):
            data = _decompressed(stored, self.path).read()
        yield Progressed(TextFile(self.name, data), 1, 0, self.stored_bytes)


@dataclass(frozen=True)
class ParquetReader:
    """Reads a Parquet file, but only the columns that are needed."""

    path: Path
    stored_bytes: int
    columns: Columns

    @property
    def name(self) -> str:
        return str(self.path)

    def check(self) -> None:
        """Raise a ValueError if the file is not a Parquet file or lacks a column."""
        with self._open() as file:
            for column in (self.columns.text, self.columns.domain):
                if column is not None and column not in file.schema_arrow.names:
                    names = ", ".join(map(repr, file.schema_arrow.names[:8]))
                    raise ValueError(f"--input {self.path}: no column {column!r}; its columns are {names}")

    def parts(self, offset: int, lines: int, part_bytes: int) -> Iterator[Progressed]:
        with self._open() as file, _damage_named(self.path):
            total = max(1, file.metadata.num_rows)
            for part in cut_rows(self.name, self._rows(file, offset), offset, part_bytes):
                rows = part.first - 1 + len(part.texts)
                yield Progressed(part, rows, 0, self.stored_bytes * rows // total)

    def _rows(self, file: Any, skip: int) -> Iterator[tuple[Any, Any]]:
        groups = list(range(file.num_row_groups))
        while groups and skip >= file.metadata.row_group(groups[0]).num_rows:
            skip -= file.metadata.row_group(groups.pop(0)).num_rows
        text, domain = self.columns.text, self.columns.domain
        columns = list(dict.fromkeys(column for column in (text, domain) if column is not None))
        for batch in file.iter_batches(_PARQUET_ROWS, groups, columns):
            kept = batch.slice(skip)
            skip = max(0, skip - len(batch))
            texts = _cells(kept.column(text))
            yield from zip(texts, texts if domain is None else _cells(kept.column(domain)), strict=True)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(self.path)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self.path}: not a Parquet file: {error}") from None
        with file:
            yield file


@dataclass(frozen=True)
class HubReader:
    """Streams a dataset of the Hugging Face hub, or a folder of one, by the `datasets` package."""

    name: str
    dataset: str
    config: str | None
    split: str
    columns: Columns
    stored_bytes: None = None

    def parts(self, offset: int, lines: int, part_bytes: int) -> Iterator[Progressed]:
        import datasets

        rows = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
        text, domain = self.columns.text, self.columns.domain
        cells = ((self._cell(row, text), self._cell(row, domain or text)) for row in rows.skip(offset))
        for part in cut_rows(self.name, cells, offset, part_bytes):
            yield Progressed(part, part.first - 1 + len(part.texts), 0, 0)

    def _cell(self, row: dict[str, Any], column: str) -> Any:
        if column not in row:
            raise ValueError(f"--input {self.name}: no column {column!r}; its columns are {', '.join(map(repr, row))}")
        return row[column]


def cut_rows(name: str, rows: Iterable[tuple[Any, Any]], before: int, part_bytes: int) -> Iterator[Rows]:
    """Cut rows of (text, domain) into parts of about `part_bytes` bytes; `before` rows come before the first."""
    texts: list[Any] = []
    domains: list[Any] = []
    size = 0
    for text, domain in rows:
        texts.append(text)
        domains.append(domain)
        size += 1 + (len(text) if isinstance(text, (str, bytes)) else 0)
        if size >= part_bytes:
            yield Rows(name, before + 1, texts, domains, size)
            before, texts, domains, size = before + len(texts), [], [], 0
    if texts:
        yield Rows(name, before + 1, texts, domains, size)


def _cells(column: Any) -> list[Any]:
    """Return a column as Python values; text as bytes, since workers report documents that are not UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    values: list[Any] = column.to_pylist()
    return values


def _decompressed(stored: BinaryIO, path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=stored)  # type: ignore[return-value]
    if suffix in _DECOMPRESSORS:
        return io.BufferedReader(_FramedFile(stored, _DECOMPRESSORS[suffix]()), 1 << 17)
    return stored


def _bzip2() -> Callable[[], Any]:
    import bz2

    return bz2.BZ2Decompressor


def _xz() -> Callable[[], Any]:
    import lzma

    return lzma.LZMADecompressor


def _zstandard() -> Callable[[], Any]:
    import zstandard

    new: Callable[[], Any] = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    return new


_DECOMPRESSORS = {".bz2": _bzip2, ".xz": _xz, ".zst": _zstandard}
"""Their modules are imported only when needed: not every Python installation has all of them."""


class _FramedFile(io.RawIOBase):
    """Reads the text of a file of successive compressed frames; `new` makes a decompressor for one of them.

    The readers of the packages accept a truncated file as complete (zstandard), or stop silently before a frame whose
    beginning is damaged (bz2).
    """

    def __init__(self, stored: BinaryIO, new: Callable[[], Any]) -> None:
        self._stored = stored
        self._new = new
        self._frame: Any = None
        self._compressed = self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._compressed = self._compressed or self._stored.read(1 << 15)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends inside a compressed frame")
                return 0
            self._frame = self._frame or self._new()
            self._text = self._frame.decompress(self._compressed)
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._text))
        buffer[:n], self._text = self._text[:n], self._text[n:]
        return n


def _skip(file: BinaryIO, offset: int, path: Path) -> None:
    if path.suffix.lower() not in (".gz", *_DECOMPRESSORS):
        file.seek(offset)
        return
    while offset > 0:
        skipped = len(file.read(min(offset, _SKIP_BYTES)))
        if not skipped:
            raise EOFError("it is shorter than what was read of it before")
        offset -= skipped


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn the errors of decompressors and pyarrow about a damaged file into a ValueError that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    except Exception as error:
        is_bzip2s = isinstance(error, OSError) and error.errno is None
        if is_bzip2s or type(error).__module__.startswith(("zstd", "zstandard", "pyarrow", "_lzma")):
            raise ValueError(f"{path}: damaged: {error}") from None
        raise
