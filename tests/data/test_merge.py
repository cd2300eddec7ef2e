"""Merging follows the format's description, computed with NumPy over whole arrays."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.cli import main
from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.data.corpus.sidecar import Sidecar, read_sidecar
from megatron_lfr.data.preprocess import writer
from megatron_lfr.data.preprocess.merge import MergeConfig, merge
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter

WriteCorpus = Callable[..., Path]
Corpus = list[list[list[int]]]
"""Documents of sequences of ids."""


def write(prefix: Path, corpus: Corpus, dtype: type = np.uint16) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in corpus:
            writer.add_document([np.array(sequence, dtype) for sequence in document])
    return prefix


def merged_by_numpy(prefixes: list[Path], item_size: int, code: int) -> tuple[bytes, bytes]:
    """Do what Megatron's add_index does: join lengths, shift document bounds, recompute pointers, join .bin."""
    lengths, bounds = np.zeros(0, "<i4"), np.zeros(1, "<i8")
    for prefix in prefixes:
        data = prefix.with_name(prefix.name + ".idx").read_bytes()
        sequences, documents = struct.unpack_from("<QQ", data, 18)
        theirs = np.frombuffer(data, "<i8", documents, 34 + 12 * sequences)
        bounds = np.concatenate([bounds, (len(lengths) + theirs)[1:]])
        lengths = np.concatenate([lengths, np.frombuffer(data, "<i4", sequences, 34)])
    ends = np.cumsum(lengths.astype("<i8") * item_size)
    pointers = (ends - lengths.astype("<i8") * item_size).astype("<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(bounds))
    index = header + lengths.tobytes() + pointers.tobytes() + bounds.astype("<i8").tobytes()
    return index, b"".join(prefix.with_name(prefix.name + ".bin").read_bytes() for prefix in prefixes)


@pytest.mark.parametrize(("dtype", "item_size", "code"), [(np.uint16, 2, 8), (np.int32, 4, 4)])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_merged_bytes(
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    dtype: type,
    item_size: int,
    code: int,
    chunk: int,
) -> None:
    prefixes = []
    for i in range(4):
        corpus = [
            [rng.integers(0, 500, rng.integers(0, 9)).tolist() for _ in range(rng.integers(1, 4))]
            for _ in range(rng.integers(1, 12))
        ]
        prefixes.append(write(tmp_path / f"p.{i}", corpus, dtype))
    prefixes.insert(1, write(tmp_path / "empty", [], dtype))
    prefixes.append(prefixes[0])  # twice is fine
    monkeypatch.setattr(writer, "_CHUNK", chunk)
    summary = merge(MergeConfig(prefixes, tmp_path / "out.x"))
    index, tokens = merged_by_numpy(prefixes, item_size, code)
    assert (tmp_path / "out.x.idx").read_bytes() == index
    assert (tmp_path / "out.x.bin").read_bytes() == tokens
    dataset = IndexedDataset(tmp_path / "out.x")
    assert (summary.documents, summary.tokens) == (dataset.num_documents, dataset.num_tokens)
    assert summary.tokens == len(tokens) // item_size


def test_one_after_another_is_one_preprocessed_whole(tmp_path: Path, write_corpus: WriteCorpus) -> None:
    documents = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    parts = [write_corpus("a", documents[:1]), write_corpus("b", documents[1:3]), write_corpus("c", documents[3:])]
    expected = write_corpus("whole", documents)
    merge(MergeConfig(parts, tmp_path / "out"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out{suffix}").read_bytes() == expected.with_suffix(suffix).read_bytes()


def test_bad_inputs_are_named_and_nothing_is_left(tmp_path: Path, write_corpus: WriteCorpus) -> None:
    good, wide = write_corpus("good", [[1, 2]]), write_corpus("wide", [[1, 2]], np.int32)
    short = write_corpus("short", [[1, 2]])
    short.with_suffix(".bin").write_bytes(b"\1\0")
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "m"
    cases: list[tuple[list[Path], Path, type[Exception], str]] = [
        ([], output, ValueError, "--input: give at least one"),
        ([good, tmp_path / "none"], output, FileNotFoundError, r"none\.idx: no such file"),
        ([good, wide], output, ValueError, r"wide: holds int32, but .*good holds uint16; only datasets of one"),
        ([good, short], output, ValueError, r"short\.bin: holds 2 bytes"),
        ([good], short, ValueError, "--output-prefix .*short: already exists.*--overwrite"),
        ([good], tmp_path / "no" / "m", ValueError, "--output-prefix .*a folder that exists"),
        ([good, short.with_name("good")], good, ValueError, "--output-prefix .*good: is also an --input"),
    ]
    for inputs, prefix, kind, message in cases:
        with pytest.raises(kind, match=message):
            merge(MergeConfig(inputs, prefix))
    assert list((tmp_path / "out").iterdir()) == []


def test_an_older_output_stays_until_the_new_one_is_whole(
    tmp_path: Path, write_corpus: WriteCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = write_corpus("old", [[9]]), write_corpus("new", [[1, 2]])
    merge(MergeConfig([old], tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(IndexedDatasetWriter, "seal", fail)
    with pytest.raises(KeyboardInterrupt):
        merge(MergeConfig([new], tmp_path / "out", overwrite=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_made_the_inputs_is_known_of_the_output(
    tmp_path: Path, write_corpus: WriteCorpus, with_sidecar: WriteCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [with_sidecar(write_corpus(name, [[1, 0]] * n)) for name, n in (("a", 1), ("b", 2))]
    assert main(["merge", "--input", *map(str, parts), "--output-prefix", str(tmp_path / "ab")]) == 0
    sidecar = read_sidecar(IndexedDataset(tmp_path / "ab"))
    assert sidecar == Sidecar("t.json", "sha256 1", 9, 0, None, "ab", 3, 6)
    assert capsys.readouterr().err == ""
    unknown = write_corpus("megatrons", [[1]])
    words = ["merge", "--input", str(parts[0]), str(unknown), "--output-prefix", str(tmp_path / "ab"), "--overwrite"]
    assert main(words) == 0
    assert "not every input says which tokenizer made it" in capsys.readouterr().err
    assert read_sidecar(IndexedDataset(tmp_path / "ab")) is None  # the older output's is gone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fingerprint": "sha256 2", "tokenizer": "other.json"},
            r"b: was made with the tokenizer other\.json \(sha256 2\), .*a with t\.json \(sha256 1\)",
        ),
        ({"eod": 3}, r"b: its documents end with id 3, those of .*a end with id 0"),
        ({"eod": None}, r"b: its documents end with no token of their own"),
        ({"bos": 1}, r"b: its documents start with id 1, those of .*a start with no token"),
        ({"tokens": 7}, r"b\.meta: is of another corpus: it counts 1 documents and 7 tokens"),
        ({"format": 3}, r"b\.meta: is of format 3; this version reads 1 and 2"),
        ({"format": 2}, r"b\.meta: damaged: mask is None"),
        ({"eod": -1}, r"b\.meta: damaged: a vocabulary of \d+ tokens has no id -1"),
        ({"bos": 1 << 70}, r"b\.meta: damaged: a vocabulary of \d+ tokens has no id 1"),
        ({"vocab_size": "9"}, r"b\.meta: damaged: vocab_size is '9'"),
    ],
)
def test_inputs_that_do_not_belong_together_are_refused(
    tmp_path: Path, write_corpus: WriteCorpus, with_sidecar: WriteCorpus, changes: dict[str, object], message: str
) -> None:
    parts = [with_sidecar(write_corpus("a", [[1, 0]])), with_sidecar(write_corpus("b", [[1, 0]]), **changes)]
    with pytest.raises(ValueError, match=message):
        merge(MergeConfig(parts, tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"format": 1}', " " * 2_000_000])
def test_damaged_sidecars_are_named(tmp_path: Path, write_corpus: WriteCorpus, content: str) -> None:
    prefix = write_corpus("a", [[1, 0]])
    prefix.with_suffix(".meta").write_text(content)
    with pytest.raises(ValueError, match=r"a\.meta: damaged"):
        merge(MergeConfig([prefix], tmp_path / "out"))
    prefix.with_suffix(".meta").unlink()
    os.mkfifo(prefix.with_suffix(".meta"))  # nobody writes into it: reading would wait for ever
    with pytest.raises(ValueError, match=r"a\.meta: is not a regular file"):
        merge(MergeConfig([prefix], tmp_path / "out"))


def test_more_inputs_than_files_may_be_open(tmp_path: Path, write_corpus: WriteCorpus) -> None:
    prefixes = [write_corpus(f"p{i}", [[i]]) for i in range(80)]
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from megatron_lfr.cli import main
raise SystemExit(main(["merge", "--input", *{[str(p) for p in prefixes]}, "--output-prefix", {str(tmp_path / "o")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/o: 80 documents, 80 tokens\n", done.stderr
    assert [IndexedDataset(tmp_path / "o").document(i).tolist() for i in range(80)] == [[i] for i in range(80)]
