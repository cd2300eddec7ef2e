"""Preprocessing gives the documents as the library tokenizes them one by one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2TokenizerFast

from megatron_lfr.cli import main
from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.data.corpus.tokenizer import load_tokenizer
from megatron_lfr.data.preprocess import command as preprocess
from megatron_lfr.data.preprocess import inputs as inputs_module
from megatron_lfr.data.preprocess import pool
from megatron_lfr.data.preprocess.command import PreprocessConfig, run
from megatron_lfr.data.preprocess.encoding import Encoder
from support.gpt2_tokenizer import write_gpt2_files

WriteJsonl = Callable[[str, Sequence[object]], Path]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "CHUNK_BYTES", 200)


def preprocess_quietly(inputs: list[Path], out: Path, tokenizer: object, **options: Any) -> list[Any]:
    options.setdefault("workers", 1)
    return run(PreprocessConfig(inputs, out / "c", str(tokenizer), progress=False, **options)).prefixes


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def records(rng: np.random.Generator, n: int) -> list[dict[str, str]]:
    words = ["the", "cat", "sat", "on", "höchst", "東京", "\u2028", "🙂", "a\nb", "x" * 50]
    return [
        {"text": " ".join(rng.choice(words, rng.integers(1, 30))), "domain": str(rng.choice(["web", "wiki", "b"]))}
        for _ in range(n)
    ]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("append_eod", [True, False])
def test_one_prefix(
    write_jsonl: WriteJsonl, bpe_file: Path, out: Path, rng: np.random.Generator, append_eod: bool
) -> None:
    rows = records(rng, 40)
    inputs = [write_jsonl("a.jsonl", rows[:25]), write_jsonl("b.jsonl", rows[25:])]
    (summary,) = preprocess_quietly(inputs, out, bpe_file, append_eod=append_eod)
    tokenizer = Tokenizer.from_file(str(bpe_file))
    expected = [tokenizer.encode(row["text"]).ids + [0] * append_eod for row in rows]
    assert documents(out / "c_text_document") == expected
    assert names(out) == ["c_text_document.bin", "c_text_document.idx", "c_text_document.meta"]
    sidecar = json.loads((out / "c_text_document.meta").read_text())
    digest = hashlib.sha256(bpe_file.read_bytes()).hexdigest()
    assert sidecar == {
        "format": 1,
        "tokenizer": str(bpe_file),
        "fingerprint": f"sha256 {digest}",
        "vocab_size": tokenizer.get_vocab_size(),
        "eod": 0 if append_eod else None,
        "bos": None,
        "output_prefix": "c",
        "documents": 40,
        "tokens": sum(map(len, expected)),
    }
    assert (summary.prefix, summary.domain) == (out / "c_text_document", None)
    assert (summary.documents, summary.tokens, summary.skipped_documents) == (40, sum(map(len, expected)), 0)


def test_gpt2s_files_by_megatrons_flags(tmp_path: Path, out: Path, write_jsonl: WriteJsonl) -> None:
    vocabulary, merges = write_gpt2_files(tmp_path)
    texts = ["the cat sat at the mat", "  spaces,\n\ttabs; it's 123", "Grüße, 日本語 🙂"]
    path = write_jsonl("a.jsonl", [{"text": text} for text in texts])
    flags = ["--input", path, "--output-prefix", out / "c", "--vocab-file", vocabulary, "--merge-file", merges]
    flags += ["--tokenizer-type", "GPT2BPETokenizer", "--append-eod", "--workers", "1", "--no-progress"]
    assert main(["preprocess", *map(str, flags)]) == 0
    theirs = GPT2TokenizerFast(str(vocabulary), str(merges))
    assert documents(out / "c_text_document") == [[*theirs(text).input_ids, theirs.eos_token_id] for text in texts]
    assert documents(out / "c_text_document")[0][:2] == [theirs.get_vocab()["the"], theirs.get_vocab()["Ġcat"]]


@pytest.mark.usefixtures("small_chunks")
def test_one_prefix_for_each_domain(
    write_jsonl: WriteJsonl, bpe_file: Path, out: Path, rng: np.random.Generator
) -> None:
    rows = records(rng, 40)
    summaries = preprocess_quietly([write_jsonl("a.jsonl", rows)], out, bpe_file, domain_key="domain")
    tokenizer = Tokenizer.from_file(str(bpe_file))
    assert [summary.domain for summary in summaries] == list(dict.fromkeys(row["domain"] for row in rows))
    for domain in ("web", "wiki", "b"):
        expected = [[*tokenizer.encode(row["text"]).ids, 0] for row in rows if row["domain"] == domain]
        assert documents(out / f"c_{domain}_text_document") == expected


@pytest.mark.usefixtures("small_chunks")
def test_workers_do_not_change_a_byte(
    write_jsonl: WriteJsonl, bpe_file: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = write_jsonl("a.jsonl", records(rng, 200))
    for workers in (1, 3, 5):  # this thread, threads, processes
        folder = tmp_path / str(workers)
        folder.mkdir()
        preprocess_quietly([path], folder, bpe_file, workers=workers, domain_key="domain")
    assert len(names(tmp_path / "1")) == 9
    for name in names(tmp_path / "1"):
        for workers in ("3", "5"):
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / workers / name).read_bytes()
    assert names(tmp_path / "1") == names(tmp_path / "3") == names(tmp_path / "5")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_text_files_are_documents(tmp_path: Path, out: Path, write_jsonl: WriteJsonl, workers: int) -> None:
    texts = ["one\ntwo\n", "", "three" * 60, "vier \u00fc"]
    inputs = []
    for i, text in enumerate(texts):
        inputs.append(tmp_path / f"{i}.txt")
        inputs[-1].write_text(text, "utf-8")
    inputs.insert(2, write_jsonl("a.jsonl", [{"text": "json"}]))
    (summary,) = preprocess_quietly(inputs, out, "bytes", workers=workers)
    expected = [[*text.encode(), 256] for text in ["one\ntwo\n", "json", "three" * 60, "vier \u00fc"]]
    assert documents(out / "c_text_document") == expected
    assert summary.skipped_documents == 1


def test_blank_lines_bom_and_line_ends(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": ""}\n{"text": "b"}')
    (summary,) = preprocess_quietly([path], out, "bytes")
    assert documents(out / "c_text_document") == [[97, 256], [98, 256]]
    assert summary.skipped_documents == 1


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8: byte 11"),
        (b'{"text": "\\ud800"}', "not Unicode"),
        (b'{"title": "a"}', "no key 'text'; its keys are 'title'"),
        (b'{"text": 1}', "'text' is not a string but int"),
        (b'["text"]', "not a JSON object but list"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, out: Path, line: bytes, reason: str, workers: int) -> None:
    good = b'{"text": "fine"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 30)
    (tmp_path / "b.jsonl").write_bytes(good * 57 + b"\n" + line + b"\n" + b"also broken\n" + good * 50)
    with pytest.raises(ValueError) as caught:
        preprocess_quietly([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], out, "bytes", workers=workers)
    assert str(caught.value).startswith(f"{tmp_path}/b.jsonl:59: ")
    assert reason in str(caught.value)
    assert names(out) == []


def test_broken_text_file_is_named(tmp_path: Path, out: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8: byte 4"):
        preprocess_quietly([tmp_path / "a.txt"], out, "bytes")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a", "domain": "x y"}, {"text": "a", "domain": "x/y"}],
            r"a\.jsonl:2: .*'x y' and 'x/y'.*'c_x_y_text_document'",
        ),
        ([{"text": "a", "domain": ""}], r"a\.jsonl:1: key 'domain' names no domain"),
        ([{"text": "a"}], r"a\.jsonl:1: no key 'domain'"),
        ([{"text": "a", "domain": 3}], r"a\.jsonl:1: key 'domain' is not a string but int"),
    ],
)
def test_bad_domains(write_jsonl: WriteJsonl, out: Path, rows: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocess_quietly([write_jsonl("a.jsonl", rows)], out, "bytes", domain_key="domain")
    assert names(out) == []


def test_domain_names_become_file_names(write_jsonl: WriteJsonl, out: Path) -> None:
    path = write_jsonl("a.jsonl", [{"text": "a", "domain": "../ü x"}, {"text": "", "domain": "empty"}])
    (summary,) = preprocess_quietly([path], out, "bytes", domain_key="domain")
    assert summary.domain == "../ü x"
    assert names(out) == [f"c_..___x_text_document{suffix}" for suffix in (".bin", ".idx", ".meta")]


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_input_without_documents(tmp_path: Path, out: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match="no document"):
        preprocess_quietly([tmp_path / "a.jsonl"], out, "bytes")
    assert names(out) == []


def test_bad_flags(tmp_path: Path, out: Path, write_jsonl: WriteJsonl, bpe_file: Path) -> None:
    good = write_jsonl("a.jsonl", [{"text": "a"}])
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.txt").touch()
    (tmp_path / "broken.json").write_text("{")
    cases: list[tuple[list[Path], Path, object, dict[str, Any], str]] = [
        ([], out, "bytes", {}, "--input: give at least one"),
        ([tmp_path / "none.jsonl"], out, "bytes", {}, r"--input .*none\.jsonl: no such file"),
        ([out], out, "bytes", {}, r"--input .*out: no file of a known kind in this folder"),
        ([tmp_path / "a.csv"], out, "bytes", {}, r"unknown kind of file; known are \.jsonl"),
        ([good], out, "bytes", {"workers": 0}, "--workers 0"),
        ([good], out / "nowhere", "bytes", {}, r"--output-prefix .*nowhere does not exist"),
        ([good], out, tmp_path / "none.json", {}, r"none\.json: no such file"),
        ([good], out, tmp_path / "broken.json", {}, r"broken\.json: not a tokenizer file"),
        ([good], out, bpe_file, {"eod_token": "<stop>"}, "--eod-token <stop>"),
        ([tmp_path / "a.txt"], out, "bytes", {"domain_key": "d"}, "--domain-key d"),
        ([good], out, "bytes", {"bos": True}, "--bos: the bytes tokenizer has no token"),
        ([good], out, "bytes", {"bos": True, "no_bos": True}, "--bos or --no-bos, not both"),
    ]
    for inputs, folder, tokenizer, options, message in cases:
        with pytest.raises(ValueError, match=message):
            preprocess_quietly(inputs, folder, tokenizer, **options)
    assert names(out) == []


def test_unwritable_folder(write_jsonl: WriteJsonl) -> None:
    with pytest.raises(OSError, match="--output-prefix /proc/c: cannot write"):
        preprocess_quietly([write_jsonl("a.jsonl", [{"text": "a"}])], Path("/proc"), "bytes")


def test_tokenizer_without_eod_is_enough_when_none_is_appended(
    tmp_path: Path, bpe_file: Path, out: Path, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl("a.jsonl", [{"text": "the cat"}])
    description = json.loads(bpe_file.read_text())
    description["added_tokens"] = []
    description["model"]["vocab"]["<none>"] = description["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "t.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="--eod-token"):
        preprocess_quietly([path], out, tmp_path / "t.json")
    assert preprocess_quietly([path], out, tmp_path / "t.json", append_eod=False)[0].documents == 1


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", [{}, {"bos": True}, {"no_bos": True}, {"append_eod": False}])
def test_start_and_end_of_documents(
    tmp_path: Path, out: Path, write_jsonl: WriteJsonl, options: dict[str, bool]
) -> None:
    """Documents start by default as the tokenizer's post-processor starts a text; each has a token of its own."""
    theirs = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs.add_special_tokens(["<s>", "</s>"])
    theirs.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    theirs.save(str(tmp_path / "t.json"))
    rows = [{"text": text} for text in ["a a", "", "a </s> <s> a", "</s>"] * 20]
    preprocess_quietly([write_jsonl("a.jsonl", rows)], out, tmp_path / "t.json", **options)
    start, end = [1] * (not options.get("no_bos")), [2] * options.get("append_eod", True)
    expected = [[*start, *text, *end] for text in ([3, 3], [3, 0, 0, 3], [0])] * 20
    assert documents(out / "c_text_document") == expected
    sidecar = json.loads((out / "c_text_document.meta").read_text())
    assert (sidecar["bos"], sidecar["eod"]) == (1 if start else None, 2 if end else None)


def test_worker_processes_encode_alike() -> None:
    tokenizer = load_tokenizer("bytes")
    encoder = Encoder(tokenizer, "text", "domain", 256, np.dtype(np.uint16), True, bos=7)
    assert encoder.without_tokenizer()(tokenizer) == encoder


def test_a_finished_corpus_is_replaced_when_asked_alone(
    write_jsonl: WriteJsonl, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of the same name is refused before it reads, and changes no byte; domains that it lacks are named."""
    rows = [{"text": "old", "d": "x"}, {"text": "older", "d": "y"}]
    old, new = write_jsonl("old.jsonl", rows), write_jsonl("new.jsonl", [{"text": "new", "d": "y"}])
    run(PreprocessConfig([old], out / "c_longer", "bytes", progress=False))  # looks like a domain of c, and is none
    late = write_jsonl("late.jsonl", [{"text": "a", "d": "longer"}])
    for options in ({}, {"overwrite": True}):  # --overwrite is for this prefix' own
        with pytest.raises(ValueError, match=r"late\.jsonl:1: .*c_longer_text_document already exists, of"):
            preprocess_quietly([late], out, "bytes", domain_key="d", restart=True, **options)
    preprocess_quietly([old], out, "bytes", domain_key="d")
    before = {path: path.read_bytes() for path in out.iterdir()}
    for options in ({}, {"restart": True}):
        with pytest.raises(ValueError, match=r"--output-prefix .*c_x_text_document \(and 1 more\) already exists"):
            preprocess_quietly([new], out, "bytes", domain_key="d", **options)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert capsys.readouterr().err == ""
    preprocess_quietly([new], out, "bytes", domain_key="d", overwrite=True)
    assert capsys.readouterr().err == "preprocess: not made from this input, and left as they are: c_x_text_document\n"
    assert [documents(out / f"c_{d}_text_document") for d in "xy"] == [[[*b"old", 256]], [[*b"new", 256]]]
    (out / "c_y_text_document.meta").unlink()  # as other programs write them
    with pytest.raises(ValueError, match=r"c_x_text_document \(and 1 more\) already exists"):
        preprocess_quietly([new], out, "bytes", domain_key="d")


@pytest.mark.parametrize(("size", "name"), [(65499, "uint16"), (65500, "int32")])
def test_type_of_the_ids(tmp_path: Path, out: Path, write_jsonl: WriteJsonl, size: int, name: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "last": size - 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "t.json"))
    preprocess_quietly([write_jsonl("a.jsonl", [{"text": "last words"}])], out, tmp_path / "t.json")
    assert IndexedDataset(out / "c_text_document").dtype.name == name
    assert documents(out / "c_text_document") == [[size - 1, 0, 1]]


@pytest.mark.usefixtures("small_chunks")
def test_a_worker_that_dies(write_jsonl: WriteJsonl, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill_workers(*_: object) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    monkeypatch.setattr(preprocess.Output, "add", kill_workers)
    monkeypatch.setattr(pool, "_MOST_THREADS", 1)
    path = write_jsonl("a.jsonl", [{"text": "x" * 1000}] * 100)
    with pytest.raises(ChildProcessError, match="fewer --workers"):
        preprocess_quietly([path], out, "bytes", workers=2)
    assert names(out) == []


def test_full_disk_leaves_nothing(write_jsonl: WriteJsonl, out: Path) -> None:
    """A limit on file sizes stands in for the full disk."""
    rows = [{"text": "x" * 1000, "domain": f"d{i % 2}"} for i in range(900)]
    path = write_jsonl("a.jsonl", rows)
    program = f"""
from pathlib import Path
from megatron_lfr.data.preprocess.command import PreprocessConfig, run
from megatron_lfr.data.corpus.tokenizer import load_tokenizer
run(PreprocessConfig([Path({str(path)!r})], Path({str(out / "c")!r}), "bytes", domain_key="domain", workers=1))
"""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1
    assert f"OSError: [Errno 27] File too large: '{out}/c_d" in done.stderr
    assert names(out) == []


def test_caller_keeps_its_environment(write_jsonl: WriteJsonl, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl("a.jsonl", [{"text": "a"}])
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    preprocess_quietly([path], out, "bytes")
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    preprocess_quietly([path], out, "bytes", overwrite=True)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_progress_and_summary_are_printed(
    write_jsonl: WriteJsonl, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl("a.jsonl", [{"text": "ab"}, {"text": ""}])
    run(PreprocessConfig([path], out / "c", "bytes", workers=1))
    printed = capsys.readouterr()
    assert printed.out == f"{out}/c_text_document: 1 documents, 3 tokens, 1 without a token left out\n"
    assert "preprocess: 100% | 1 documents | 3 tokens | " in printed.err
    assert "MB/s" in printed.err
    run(PreprocessConfig([path], out / "c", "bytes", workers=1, progress=False, overwrite=True))
    assert capsys.readouterr().out == printed.out, "what was left out is told without progress too"
