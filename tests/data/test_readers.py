"""Inputs of all kinds become the documents that were put into them, whole and from every place in between."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.data.corpus.tokenizer import load_tokenizer
from megatron_lfr.data.preprocess import inputs
from megatron_lfr.data.preprocess.command import PreprocessConfig, Summary, run
from megatron_lfr.data.preprocess.encoding import Encoder
from megatron_lfr.data.preprocess.inputs import Position, chunks, open_inputs
from megatron_lfr.data.preprocess.readers import Columns
from support.peers import peer

ROWS = [{"text": f"{i} höchst 東京 " + "x" * (i * 7 % 40), "domain": "ab"[i % 3 == 0]} for i in range(60)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def zstd(data: bytes) -> bytes:
    zstandard = peer("zstandard")
    return zstandard.ZstdCompressor().compress(data)


def jsonl(path: Path) -> None:
    path.write_bytes(LINES)


def gz(path: Path) -> None:
    path.write_bytes(gzip.compress(LINES[:1001]) + gzip.compress(LINES[1001:]))  # two members, as `cat` makes them


def zst(path: Path) -> None:
    path.write_bytes(zstd(LINES[:1001]) + zstd(LINES[1001:]))


def parquet(path: Path) -> None:
    pyarrow = peer("pyarrow")
    peer("pyarrow.parquet")
    columns = {name: [row[name] for row in ROWS] for name in ("domain", "text")}
    table = pyarrow.table({"unused": list(range(60)), **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=23)


def parquet_dictionary(path: Path) -> None:
    pyarrow = peer("pyarrow")
    peer("pyarrow.parquet")
    columns = {name: pyarrow.array([row[name] for row in ROWS]).dictionary_encode() for name in ("domain", "text")}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)


def bz2_frames(path: Path) -> None:
    path.write_bytes(bz2.compress(LINES[:1001]) + bz2.compress(LINES[1001:]))


def xz(path: Path) -> None:
    path.write_bytes(lzma.compress(LINES[:1001]) + lzma.compress(LINES[1001:]))


KINDS: list[tuple[str, Callable[[Path], None]]] = [
    ("a.jsonl", jsonl),
    ("a.json.gz", gz),
    ("a.ndjson.zst", zst),
    ("a.JSONL.Bz2", bz2_frames),
    ("a.jsonl.XZ", xz),
    ("A.JSON.GZ", gz),
    ("a.parquet", parquet),
    ("b.parquet", parquet_dictionary),
]


def prepare(files: Sequence[Path], out: Path, **options: Any) -> Summary:
    return run(PreprocessConfig(list(files), out / "c", "bytes", **{"workers": 1, "progress": False, **options}))


def texts(prefix: Path) -> list[str]:
    dataset = IndexedDataset(prefix)
    return [bytes(dataset.document(i)[:-1].tolist()).decode() for i in range(dataset.num_documents)]


@pytest.mark.parametrize(("name", "write"), KINDS)
@pytest.mark.parametrize("chunk_bytes", [100, 1 << 19])
def test_every_kind(
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path], None],
    chunk_bytes: int,
) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", chunk_bytes)
    write(tmp_path / name)
    prepare([tmp_path / name], out)
    assert texts(out / "c_text_document") == [row["text"] for row in ROWS]
    prepare([tmp_path / name], out, domain_key="domain")
    for domain in ("a", "b"):
        assert texts(out / f"c_{domain}_text_document") == [row["text"] for row in ROWS if row["domain"] == domain]


@pytest.mark.parametrize(("name", "write"), KINDS)
def test_reading_goes_on_from_every_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[[Path], None]
) -> None:
    """The progress ends at the size of the files."""
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 100)
    write(tmp_path / name)
    (tmp_path / "t.txt").write_text("a text")
    (tmp_path / "z.jsonl").write_text('{"text": "last"}\n' * 9)
    paths = [tmp_path / name, tmp_path / "t.txt", tmp_path / "z.jsonl"]
    encoder = Encoder(load_tokenizer("bytes"), "text", None, None, np.dtype(np.uint16), False)

    def encoded(start: Position) -> list[tuple[list[int], Position, int]]:
        pieces = chunks(open_inputs(paths, Columns("text", None)), start)
        return [
            ([t for g in encoder.encode(c.parts).groups for t in g.tokens.tolist()], c.end, c.stored) for c in pieces
        ]

    complete = encoded(Position())
    assert bytes(t for ids, _, _ in complete for t in ids).decode() == "".join(
        [*(row["text"] for row in ROWS), "a text", *["last"] * 9]
    )
    assert len(complete) > 10
    assert complete[-1][2] == sum(path.stat().st_size for path in paths)
    assert [stored for _, _, stored in complete] == sorted(stored for _, _, stored in complete)
    for i, (_, end, _) in enumerate(complete):
        rest = [t for ids, _, _ in encoded(end) for t in ids]
        assert rest == [t for ids, _, _ in complete[i + 1 :] for t in ids]


def test_a_folder_stands_for_its_known_files(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    for name, text in [("b/2.jsonl", "two"), ("a.jsonl", "one"), ("c.json", "three"), (".hidden.jsonl", "no")]:
        (folder / name).write_text(json.dumps({"text": text}))
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"four"))
    (folder / "notes.md").write_text("no")
    (folder / "e.parquet.gz").write_text("no")
    (folder / ".git").mkdir()
    (folder / ".git" / "g.json").write_text("no")
    (folder / "lost.jsonl").symlink_to("nowhere")
    (folder / "lost").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    prepare([folder], out)
    assert texts(out / "c_text_document") == ["one", "two", "three", "four"]
    (line,) = capsys.readouterr().err.splitlines()
    counted, reasons = line.split("; left out: ")
    assert counted == "inputs: 4"
    expected = ["1 hidden", "1 hidden folders", "2 links that lead nowhere", "1 not a regular file"]
    unknown = ["1 of unknown kind (.gz)", "1 of unknown kind (.md)"]
    assert sorted(reasons.split(", ")) == sorted([*expected, *unknown])
    with pytest.raises(ValueError, match=r"pipe\.txt: is not a regular file"):
        prepare([folder / "pipe.txt"], out)


def test_links_are_followed_once(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links lead to a folder, a file and the folder itself; an ending is in capitals, and a file is named again."""
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for path in (folder, elsewhere):
        path.mkdir()
    for path, text in [(folder / "A.JSONL", "one"), (elsewhere / "b.jsonl", "two"), (tmp_path / "c.Json", "three")]:
        path.write_text(json.dumps({"text": text}))
    (folder / "b").symlink_to(elsewhere)
    (folder / "c.json").symlink_to(tmp_path / "c.Json")
    (folder / "d").symlink_to(elsewhere)
    (elsewhere / "e").symlink_to(folder)
    (elsewhere / "loop.jsonl").symlink_to("loop.jsonl")
    prepare([folder, folder / "A.JSONL", elsewhere], out)
    assert texts(out / "c_text_document") == ["one", "two", "three"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "4 folders reached twice" in line  # b/e, d; of the other input e/b, e/d
    assert "4 reached twice" in line  # A.JSONL by its name; of the other input all three
    with pytest.raises(ValueError, match=r"loop\.jsonl: no such file"):
        prepare([elsewhere / "loop.jsonl"], out, overwrite=True)


def test_small_files_share_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(300):
        (tmp_path / f"{i:03}.jsonl").write_text(json.dumps({"text": str(i)}) + "\n")
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1000)
    pieces = list(chunks(open_inputs([tmp_path], Columns("text", None)), Position()))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert len(pieces) <= size / 1000 + 1
    assert sum(len(piece.parts) for piece in pieces) == 300


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "second"])
def test_damaged_files_are_named(tmp_path: Path, out: Path, suffix: str, damage: str) -> None:
    """Files are cut short, have a wrong byte, are not compressed, or hold something else behind a complete frame."""
    compress = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    data = compress(LINES)
    flipped = data[:30] + bytes([data[30] ^ 255]) + data[31:]
    content = {"cut": data[:-9], "flipped": flipped, "other": LINES, "second": data + b"no frame"}[damage]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl\{suffix}(: damaged|:\d+: not)"):
        prepare([path], out)
    assert list(out.iterdir()) == []


def test_damaged_parquet_files_and_missing_columns_are_named(tmp_path: Path, out: Path) -> None:
    parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-5])
    cases = [
        ("b.parquet", {}, r"b\.parquet: not a Parquet file"),
        (
            "a.parquet",
            {"json_key": "body"},
            r"a\.parquet: no column 'body'; its columns are 'unused', 'domain', 'text'",
        ),
        ("a.parquet", {"domain_key": "source"}, "no column 'source'"),
        ("a.parquet", {"json_key": "unused"}, r"a\.parquet:1: key 'unused' is not a string but int"),
    ]
    for name, options, message in cases:
        with pytest.raises(ValueError, match=message):
            prepare([tmp_path / name], out, **options)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet"), ("datasets", "hf:some/set")]
)
def test_a_missing_package_names_the_extra(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    path = Path(name) if name.startswith("hf:") else tmp_path / name
    if not name.startswith("hf:"):
        path.touch()
    with pytest.raises(ValueError, match=rf"--input .*{name}: needs the package '{package}'.*megatron_lfr\[corpora\]"):
        prepare([path], out)


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_documents_are_counted(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 300)
    good = [b'{"text": "fine", "d": "x"}'] * 40
    bad = [
        (b'{"text": "a"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "\xff", "d": "x"}', "not UTF-8"),
        (b'{"text": "\\ud800", "d": "x"}', "not Unicode"),
        (b'{"title": "a", "d": "x"}', "no key 'text'"),
        (b'{"text": 1, "d": "x"}', "key 'text' is not a string"),
        (b'["text"]', "not a JSON object"),
        (b'{"text": "a", "d": ""}', "key 'd' names no domain (it is empty)"),
        *[(b"{", "not JSON")] * 20,
    ]
    lines = list(good)
    for i, (line, _) in enumerate(bad):
        lines.insert(5 + 2 * i, line)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    config = PreprocessConfig(
        [tmp_path / "a.jsonl"], out / "c", "bytes", domain_key="d", skip_broken=True, workers=workers
    )
    summary = run(config)
    assert texts(out / "c_x_text_document") == ["fine"] * 40
    assert summary.broken == {kind: sum(k == kind for _, k in bad) for _, kind in bad}
    printed = capfd.readouterr()
    assert "broken, left out: 22 (not JSON)\n" in printed.out
    named = [line for line in printed.err.splitlines() if "left out: " in line]
    assert len(named) == 10
    assert named[0].startswith(f"preprocess: left out: {tmp_path}/a.jsonl:6: not JSON: ")
    assert named[2].startswith(f"preprocess: left out: {tmp_path}/a.jsonl:10: not UTF-8: byte 11")


def test_broken_text_files_and_rows_are_counted(tmp_path: Path, out: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    (tmp_path / "b.txt").write_bytes(b"fine")
    pyarrow = peer("pyarrow")
    peer("pyarrow.parquet")
    column = pyarrow.array([b"row", None, b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "c.parquet")
    summary = prepare([tmp_path], out, skip_broken=True)
    assert texts(out / "c_text_document") == ["fine", "row"]
    assert summary.broken == {"not UTF-8": 2, "key 'text' is not a string": 1}


class HubRows:
    """Stands in for what `datasets.load_dataset(streaming=True)` returns."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def skip(self, n: int) -> HubRows:
        return HubRows(self._rows[n:])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace `load_dataset`, and return the list of its calls."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> HubRows:
        calls.append((name, config, split, streaming))
        return HubRows(ROWS)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: module)
    return calls


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hf:org/set", ("org/set", None, "train", True)),
        ("hf:org/set:test", ("org/set", None, "test", True)),
        ("hf:set:en:test", ("set", "en", "test", True)),
    ],
)
def test_datasets_of_the_hub(
    out: Path, hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, name: str, call: tuple[Any, ...]
) -> None:
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 100)
    prepare([Path(name)], out, domain_key="domain")
    assert hub == [call]
    assert texts(out / "c_b_text_document") == [row["text"] for row in ROWS if row["domain"] == "b"]
    (reader,) = open_inputs([Path(name)], Columns("text", None))
    pieces = list(chunks([reader], Position()))
    rest = list(chunks([reader], pieces[2].end))
    assert [piece.parts for piece in rest] == [piece.parts for piece in pieces[3:]]


@pytest.mark.usefixtures("hub")
def test_bad_names_and_columns_of_the_hub(out: Path) -> None:
    for name in ("hf:", "hf:a::b", "hf:a:b:c:d"):
        with pytest.raises(ValueError, match="must be hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
            prepare([Path(name)], out)
    with pytest.raises(ValueError, match="--input hf:a: no column 'body'; its columns are 'text', 'domain'"):
        prepare([Path("hf:a")], out, json_key="body")
