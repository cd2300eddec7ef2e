"""Reading valid and hostile .idx files, against a reader in NumPy."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr._C import IndexFile

ITEM_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
MAGIC = b"MMIDIDX\0\0"


@dataclass
class Index:
    """The fields of an .idx file; `data` writes them, valid or not."""

    lengths: list[int]
    documents: list[int]
    code: int = 8
    pointers: list[int] | None = None
    magic: bytes = MAGIC
    version: int = 1
    counts: tuple[int, int] | None = None

    def data(self) -> bytes:
        pointers = self.pointers
        if pointers is None:
            ends = np.cumsum(self.lengths, dtype=np.int64) * ITEM_SIZES.get(self.code, 1)
            pointers = [0, *ends.tolist()][: len(self.lengths)]
        sequences, entries = self.counts or (len(self.lengths), len(self.documents))
        return b"".join(
            [
                self.magic,
                struct.pack("<QBQQ", self.version, self.code, sequences, entries),
                np.array(self.lengths, "<i4").tobytes(),
                np.array(pointers, "<i8").tobytes(),
                np.array(self.documents, "<i8").tobytes(),
            ]
        )


def read_index(data: bytes) -> tuple[int, list[int], list[int]] | None:
    """Return (type code, lengths, token offset of every document and the end), or None if it must be refused."""
    if len(data) < 34 or data[:9] != MAGIC:
        return None
    version, code, sequences, entries = struct.unpack("<QBQQ", data[9:34])
    if version != 1 or code not in ITEM_SIZES or entries == 0 or len(data) != 34 + 12 * sequences + 8 * entries:
        return None
    lengths = [int(v) for v in np.frombuffer(data, "<i4", sequences, 34)]
    pointers = [int(v) for v in np.frombuffer(data, "<i8", sequences, 34 + 4 * sequences)]
    documents = [int(v) for v in np.frombuffer(data, "<i8", entries, 34 + 12 * sequences)]
    starts = [sum(lengths[:i]) for i in range(sequences + 1)]
    if min(lengths, default=0) < 0 or pointers != [start * ITEM_SIZES[code] for start in starts[:-1]]:
        return None
    if documents[0] != 0 or documents[-1] != sequences or documents != sorted(documents):
        return None
    return code, lengths, [starts[d] for d in documents]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "toy_text_document.idx"


def assert_read_like_oracle(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    expected = read_index(data)
    if expected is None:
        with pytest.raises(ValueError, match=path.name):
            IndexFile(str(path))
        return
    code, lengths, offsets = expected
    index = IndexFile(str(path))
    assert (index.dtype_code, index.item_size) == (code, ITEM_SIZES[code])
    assert (index.num_sequences, index.num_documents) == (len(lengths), len(offsets) - 1)
    assert index.num_tokens == sum(lengths)
    assert index.sequence_lengths(0, len(lengths)).tolist() == lengths
    assert [index.token_offset(d) for d in range(len(offsets))] == offsets


@given(
    lengths=st.lists(st.integers(0, 2**31 - 1), max_size=20),
    breaks=st.lists(st.integers(0, 20), max_size=8),
    code=st.sampled_from(sorted(ITEM_SIZES)),
)
def test_whole_files(path: Path, lengths: list[int], breaks: list[int], code: int) -> None:
    documents = [0, *sorted(min(b, len(lengths)) for b in breaks), len(lengths)]
    data = Index(lengths, documents, code).data()
    assert read_index(data) is not None
    assert_read_like_oracle(path, data)


def test_sequences_beyond_the_pieces_in_which_they_are_read(path: Path) -> None:
    lengths = np.random.default_rng(0).integers(0, 50, 150_000).astype(np.int32)
    path.write_bytes(Index(lengths.tolist(), list(range(150_001)), 4).data())
    index = IndexFile(str(path))
    assert index.num_tokens == lengths.sum()
    assert [index.token_offset(d) for d in (0, 65_536, 131_073, 150_000)] == [
        int(lengths[:d].sum()) for d in (0, 65_536, 131_073, 150_000)
    ]
    assert np.array_equal(index.sequence_lengths(65_530, 65_550), lengths[65_530:65_550])


LEGAL = Index([3, 0, 5], [0, 1, 3])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (Index([3], [0, 1], magic=b"MMIDIDX\0\1"), "magic"),
        (Index([3], [0, 1], version=2), "version 2"),
        (Index([3], [0, 1], code=0), "type code 0"),
        (Index([3], [0, 1], code=9), "type code 9"),
        (Index([3], [0, 1], code=6), "type code 6"),
        (Index([3], [0, 1], code=7), "type code 7"),
        (Index([3], [0, 1], counts=(2, 2)), "bytes"),
        (Index([3], [0, 1], counts=(2**64 - 1, 2)), "bytes"),
        (Index([3], [0, 1], counts=(1, 2**64 - 1)), "bytes"),
        (Index([3], [0, 1], counts=(2**62 + 1, 2)), "bytes"),  # 12 x this is 12 modulo 2^64
        (Index([3], [0, 1], counts=(1, 2**61 + 2)), "bytes"),  # 8 x this is 16 modulo 2^64
        (Index([3], []), "no document entry"),
        (Index([3, -1], [0, 2], pointers=[0, 6]), "sequence 1 has a negative length"),
        (Index([3, 1], [0, 2], pointers=[0, 8]), "sequence 1 lies at byte 8"),
        (Index([3, 1], [0, 2], pointers=[-2, 6]), "sequence 0 lies at byte -2"),
        (Index([3, 1], [0, 2], pointers=[2, 8]), "sequence 0 lies at byte 2"),
        (Index([3, 1], [1, 2]), "document entry 0"),
        (Index([3, 1], [0, 2, 1, 2]), "document entry 2"),
        (Index([3, 1], [0, -1, 2]), "document entry 1"),
        (Index([3, 1], [0, 1]), "last document entry"),
        (Index([3, 1], [0, 3]), "last document entry"),
    ],
)
def test_corrupt_fields(path: Path, index: Index, message: str) -> None:
    path.write_bytes(index.data())
    with pytest.raises(ValueError, match=f"{path.name}: .*{message}"):
        IndexFile(str(path))


def test_every_truncation_and_any_trailing_byte(path: Path) -> None:
    data = LEGAL.data()
    for cut in [*(data[:size] for size in range(len(data))), data + b"\0"]:
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=path.name):
            IndexFile(str(path))


@given(changes=st.lists(st.tuples(st.integers(0, 94), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_changed_bytes(path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(LEGAL.data())
    for position, value in changes:
        data[position % len(data)] = value
    assert_read_like_oracle(path, bytes(data))


def test_documents_and_sequences_outside(path: Path) -> None:
    path.write_bytes(LEGAL.data())
    index = IndexFile(str(path))
    for document in (-1, 3, 2**64):
        with pytest.raises(ValueError, match="document"):
            index.token_offset(document)
    for first, last in ((0, 4), (2, 1), (-1, 1)):
        with pytest.raises(ValueError, match=r"sequences|first"):
            index.sequence_lengths(first, last)
