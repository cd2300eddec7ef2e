"""Errors name paths that are no files, files that lie about large numbers, and files that change while open."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from megatron_lfr._C import IndexFile, TokenFile
from megatron_lfr.data.corpus.indexed import IndexedDataset
from support.indexed_samples import WriteCorpus
from support.waiting import LIMIT

LENGTHS_AT = 34
NOT_FILES: dict[str, Callable[[Path], None]] = {
    "directory": lambda path: path.mkdir(),
    "pipe without a writer": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.fixture
def corpus(write_corpus: WriteCorpus) -> Path:
    """Write documents of 3, 1 and 2 tokens."""
    return write_corpus("toy", [[1, 2, 3], [4], [5, 6]])


def replace_bytes(path: Path, at: int, form: str, *values: int) -> None:
    """Overwrite fields of a file, which stays the same file for those that have it open."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(form, *values))


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_file_is_named(corpus: Path, suffix: str, kind: str) -> None:
    path = corpus.with_suffix(suffix)
    path.unlink()
    NOT_FILES[kind](path)
    with pytest.raises(ValueError, match=rf"toy\{suffix}: not a regular file"):
        IndexedDataset(corpus)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_links_in_a_circle(corpus: Path, suffix: str) -> None:
    path, other = corpus.with_suffix(suffix), corpus.with_name("other")
    path.unlink()
    path.symlink_to(other)
    other.symlink_to(path)
    with pytest.raises(OSError, match=rf"toy\{suffix}"):
        IndexedDataset(corpus)
    for open_file in (IndexFile, lambda name: TokenFile(name, 2, 6)):
        with pytest.raises(OSError, match="Too many levels of symbolic links") as caught:
            open_file(str(path))
        assert caught.value.filename == str(path)


def test_a_name_that_the_system_would_cut_short(corpus: Path) -> None:
    for open_file in (IndexFile, lambda name: TokenFile(name, 2, 6)):
        with pytest.raises(ValueError, match="NUL"):
            open_file(f"{corpus}.idx\0.txt")


def test_a_type_of_another_size(write_corpus: WriteCorpus) -> None:
    """The .bin file alone tells it of one sequence; the positions of several tell it, too."""
    for name, documents, suffix in (("one", [[1, 2]], "bin"), ("two", [[1], [2]], "idx")):
        prefix = write_corpus(name, documents)
        replace_bytes(prefix.with_suffix(".idx"), 17, "B", 4)
        with pytest.raises(ValueError, match=rf"{name}\.{suffix}"):
            IndexedDataset(prefix)


COUNT = 80_000  # more sequences and documents than are read at a time, 2^16
POINTERS_AT, DOCUMENTS_AT = LENGTHS_AT + 4 * COUNT, LENGTHS_AT + 12 * COUNT


@pytest.mark.parametrize(
    ("at", "form", "value", "message"),
    [
        (LENGTHS_AT + 4 * 65_536, "<i", -1, "sequence 65536 has a negative length"),
        (POINTERS_AT + 8 * 65_536, "<q", 2 * 65_535, "sequence 65536 lies at byte 131070"),
        (POINTERS_AT + 8 * 70_000, "<q", -(2**63), "sequence 70000 lies at byte -9223372036854775808"),
        (DOCUMENTS_AT + 8 * 65_536, "<q", 65_534, "document entry 65536 is 65534"),
        (DOCUMENTS_AT + 8 * 65_535, "<q", 65_537, "document entry 65536 is 65536"),
    ],
)
def test_faults_beyond_the_first_piece(tmp_path: Path, at: int, form: str, value: int, message: str) -> None:
    numbers = np.arange(COUNT + 1)
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, COUNT, COUNT + 1)
    body = [np.ones(COUNT, "<i4"), (2 * numbers[:-1]).astype("<i8"), numbers.astype("<i8")]
    path = tmp_path / "long.idx"
    path.write_bytes(header + b"".join(part.tobytes() for part in body))
    assert IndexFile(str(path)).num_tokens == COUNT
    replace_bytes(path, at, form, value)
    with pytest.raises(ValueError, match=rf"long\.idx: {message}"):
        IndexFile(str(path))


PROGRAM = """
import resource, sys
import numpy as np
from megatron_lfr._C import IndexFile, TokenFile
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (16 << 20),) * 2)
folder, out = sys.argv[1], np.empty((1, 4), np.int32)
for name in ("sequences", "entries", "both"):
    try:
        IndexFile(f"{folder}/{name}.idx")
    except ValueError as error:
        print(error)
index = IndexFile(f"{folder}/large.idx")
tokens = TokenFile(f"{folder}/large.bin", index.item_size, index.num_tokens)
tokens.read(np.array([index.token_offset(1) - 3]), out)
print(index.num_tokens, out.tolist())
"""


def test_gigantic_numbers_take_no_memory(tmp_path: Path) -> None:
    """A process may take 16 MiB more: counts lie, and a .bin file of 16 GiB, a hole, is as large as is said."""
    for name, counts in {"sequences": (2**40, 2), "entries": (0, 2**40), "both": (2**60, 2**61 + 1)}.items():
        header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, *counts)
        (tmp_path / f"{name}.idx").write_bytes(header + bytes(8))
    length = 2**31 - 1
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 2, 3)
    (tmp_path / "large.idx").write_bytes(header + struct.pack("<iiqqqqq", length, length, 0, 4 * length, 0, 1, 2))
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(8 * length)
    replace_bytes(tmp_path / "large.bin", 4 * length - 4, "<ii", 8, 9)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        f"{tmp_path}/{n}.idx" for n in ("sequences", "entries", "both")
    ]
    assert all("do not fit its counts" in line for line in lines[:3])
    assert lines[3] == f"{2 * length} [[0, 0, 8, 9]]"


def test_an_index_that_is_cut_off_while_open(corpus: Path) -> None:
    dataset = IndexedDataset(corpus)
    os.truncate(corpus.with_suffix(".idx"), LENGTHS_AT + 8)
    for read in (
        lambda: dataset.index.sequence_lengths(0, 2),
        lambda: dataset.document(0),
        lambda: list(dataset.sequences_of_documents(1)),
    ):
        with pytest.raises(OSError, match="ends early") as caught:
            read()
        assert caught.value.filename == f"{corpus}.idx"


def test_tokens_that_are_cut_off_while_open(corpus: Path) -> None:
    dataset = IndexedDataset(corpus)
    os.truncate(corpus.with_suffix(".bin"), 6)
    with pytest.raises(OSError, match="ends early") as caught:
        dataset.document(0)
    assert caught.value.filename == f"{corpus}.bin"


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (LENGTHS_AT + 12 + 8, 13),  # a pointer beyond the 12 bytes of the tokens
        (LENGTHS_AT + 12 + 8, -2),
        (LENGTHS_AT + 36 + 8, 4),  # a document that begins at a sequence that is not there
        (LENGTHS_AT + 36 + 8, -1),
        (LENGTHS_AT + 36 + 16, 0),  # a document that ends before it begins
    ],
)
def test_an_index_that_changes_while_open(corpus: Path, at: int, value: int) -> None:
    dataset = IndexedDataset(corpus)
    before: npt.NDArray[np.uint16] = dataset.document(1)
    assert before.tolist() == [4]
    replace_bytes(corpus.with_suffix(".idx"), at, "<q", value)
    with pytest.raises(ValueError, match=r"toy\.idx: changed while it was in use"):
        dataset.document(1)
