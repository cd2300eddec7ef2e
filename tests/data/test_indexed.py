"""The indexed dataset follows the format's description, parsed and laid out here by hand."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.data.corpus.indexed import DTYPES, IndexedDataset, token_dtype
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter

GOLDEN_IDX = bytes.fromhex(
    "4d4d494449445800" "00"  # magic
    "0100000000000000"  # version
    "08"  # uint16
    "0400000000000000"  # sequences
    "0400000000000000"  # document entries
    "03000000" "01000000" "00000000" "02000000"  # lengths
    "0000000000000000" "0600000000000000" "0800000000000000" "0800000000000000"  # pointers
    "0000000000000000" "0100000000000000" "0300000000000000" "0400000000000000"  # documents
)  # fmt: skip
GOLDEN_BIN = bytes.fromhex("0100" "0200" "ffff" "0400" "0500" "0600")  # fmt: skip

INTEGERS = [np.dtype(name) for name in ("uint8", "int8", "int16", "uint16", "int32", "int64")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_bytes_are_the_format(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a.b", np.uint16) as writer:
        writer.add_document([1, 2, 65535])
        writer.add_document([np.array([4]), np.array([], np.int64)])  # a document of two sequences, one empty
        writer.add_document(np.array([5, 6], np.int64))
    assert (tmp_path / "a.b.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "a.b.bin").read_bytes() == GOLDEN_BIN
    assert names(tmp_path) == ["a.b.bin", "a.b.idx"]


def test_golden_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(GOLDEN_IDX)
    (tmp_path / "a.bin").write_bytes(GOLDEN_BIN)
    dataset = IndexedDataset(tmp_path / "a")
    assert (dataset.num_documents, dataset.num_tokens, dataset.dtype.name) == (3, 6, "uint16")
    assert [dataset.document(i).tolist() for i in range(3)] == [[1, 2, 65535], [4], [5, 6]]
    assert [dataset.document_offset(i) for i in range(4)] == [0, 3, 4, 6]
    assert dataset.document(0).dtype == np.uint16


@given(
    data=st.data(),
    dtype=st.sampled_from(INTEGERS),
    shape=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), max_size=8),
    bulk=st.booleans(),
)
def test_round_trip(
    tmp_path: Path, data: st.DataObject, dtype: np.dtype[np.int64], shape: list[list[int]], bulk: bool
) -> None:
    limits = np.iinfo(dtype)
    token = st.integers(int(limits.min), int(limits.max))
    if bulk:
        shape = [sequences[:1] for sequences in shape]
    corpus = [[data.draw(st.lists(token, min_size=n, max_size=n)) for n in sequences] for sequences in shape]
    flat = [token for document in corpus for sequence in document for token in sequence]
    with IndexedDatasetWriter(tmp_path / "p", dtype) as writer:
        if bulk:
            writer.add_documents(np.array(flat, np.int64), np.array([n for (n,) in shape], np.int64))
        else:
            for document in corpus:
                writer.add_document([np.array(sequence, np.int64) for sequence in document])

    raw = (tmp_path / "p.idx").read_bytes()
    version, code, sequences, entries = struct.unpack("<QBQQ", raw[9:34])
    lengths = np.frombuffer(raw, "<i4", sequences, 34)
    pointers = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
    documents = np.frombuffer(raw, "<i8", entries, 34 + 12 * sequences)
    assert (raw[:9], version, DTYPES[code]) == (b"MMIDIDX\0\0", 1, dtype)
    assert len(raw) == 34 + 12 * sequences + 8 * entries
    assert lengths.tolist() == [n for document in shape for n in document]
    assert pointers.tolist() == [int(lengths[:i].sum()) * dtype.itemsize for i in range(sequences)]
    assert documents.tolist() == [sum(map(len, shape[:i])) for i in range(len(shape) + 1)]
    assert np.frombuffer((tmp_path / "p.bin").read_bytes(), dtype).tolist() == flat

    dataset = IndexedDataset(tmp_path / "p")
    assert dataset.num_documents == len(corpus)
    for i, document in enumerate(corpus):
        assert dataset.document(i).tolist() == [token for sequence in document for token in sequence]


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(257, "uint16"), (65499, "uint16"), (65500, "int32"), (128256, "int32")]
)
def test_type_by_vocabulary(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([70000], "70000 do not fit into uint16"), ([-1], "uint16"), ([1.5], "integers"), ([[1]], "dimension")],
)
def test_ids_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path: Path, tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message), IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document(np.array(tokens))
    assert names(tmp_path) == []


def test_lengths_that_do_not_match_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add up to 3"), IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_documents(np.array([1, 2]), np.array([3]))
    with pytest.raises(ValueError, match="negative"), IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_documents(np.array([1, 2]), np.array([3, -1]))


def test_types_that_hold_no_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float32"):
        IndexedDatasetWriter(tmp_path / "p", np.float32)


def test_an_error_keeps_the_older_pair(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document([1, 2])
    with pytest.raises(ValueError), IndexedDatasetWriter(tmp_path / "p", np.int32) as writer:
        writer.add_documents(np.array([7]), np.array([2]))
    assert IndexedDataset(tmp_path / "p").document(0).tolist() == [1, 2]
    assert names(tmp_path) == ["p.bin", "p.idx"]


def test_a_new_bin_never_stands_beside_an_old_idx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document([1, 2])
    rename = Path.replace

    def stop_at_index(path: Path, target: Path) -> Path:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", stop_at_index)
    with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document([3, 4])  # of the same size, so that a mixed pair would look whole
    assert names(tmp_path) == ["p.bin"]


def test_a_writer_goes_on_from_what_was_durable(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    killed = IndexedDatasetWriter(tmp_path / "p", np.uint16, work)
    killed.add_document([1, 2])
    killed.add_document([np.array([3]), np.array([4, 5])])
    extent = killed.durable()
    killed.add_document([7] * 100)  # longer than what comes instead
    killed.durable()
    killed.close()
    assert names(tmp_path) == ["work"]
    writer = IndexedDatasetWriter(tmp_path / "p", np.uint16, work, extent)
    writer.add_document([6])
    writer.seal()
    writer.publish()
    with IndexedDatasetWriter(tmp_path / "q", np.uint16) as at_once:
        at_once.add_document([1, 2])
        at_once.add_document([np.array([3]), np.array([4, 5])])
        at_once.add_document([6])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"p{suffix}").read_bytes() == (tmp_path / f"q{suffix}").read_bytes()
    (work / "p.bin").write_bytes(b"\1\0")
    with pytest.raises(ValueError, match=r"p\.bin: shorter than the 5 tokens"):
        IndexedDatasetWriter(tmp_path / "p", np.uint16, work, extent)


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/p\.bin"):
        IndexedDatasetWriter(tmp_path / "nowhere" / "p", np.uint16)


@pytest.mark.parametrize("documents", [1, 60_000])
def test_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path, documents: int) -> None:
    """A limit on file sizes stands in for the full disk: 1 document overflows the .bin, many the .idx."""
    program = f"""
import numpy as np
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
with IndexedDatasetWriter({str(tmp_path / "p")!r}, np.uint16) as writer:
    for i in range({documents}):
        writer.add_document(np.zeros({800_000 if documents == 1 else 1}, np.uint16))
"""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1
    assert f"OSError: [Errno 27] File too large: '{tmp_path}/p" in done.stderr
    assert names(tmp_path) == []


def test_wrong_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"q\.idx: no such file"):
        IndexedDataset(tmp_path / "q")
    (tmp_path / "q.idx").write_bytes(GOLDEN_IDX)
    with pytest.raises(FileNotFoundError, match=r"q\.bin: no such file"):
        IndexedDataset(tmp_path / "q")
    with pytest.raises(ValueError, match="give the prefix"):
        IndexedDataset(tmp_path / "q.bin")
    for content in (GOLDEN_BIN[:-2], GOLDEN_BIN + b"\0\0"):
        (tmp_path / "q.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"q\.bin"):
            IndexedDataset(tmp_path / "q")
    (tmp_path / "q.bin").write_bytes(GOLDEN_BIN)
    (tmp_path / "q.idx").write_bytes(b"x" + GOLDEN_IDX[1:])
    with pytest.raises(ValueError, match=r"q\.idx"):
        IndexedDataset(tmp_path / "q")


def test_float_data_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "f.idx").write_bytes(
        GOLDEN_IDX[:17] + b"\x07" + GOLDEN_IDX[18:34] + bytes(4 * 4 + 4 * 8) + GOLDEN_IDX[-32:]
    )
    (tmp_path / "f.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"f\.idx: token type code 7"):
        IndexedDataset(tmp_path / "f")
