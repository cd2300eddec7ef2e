"""`megatron-lfr commonness` writes the same results from a shell, refuses bad flags, and stays within its memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.cli import main
from megatron_lfr.commonness import command, results
from megatron_lfr.commonness.command import CommonnessConfig
from megatron_lfr.commonness.folder import results_folder
from megatron_lfr.commonness.results import array_file, block_arrays
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.fileio import lock_file
from support.commonness_samples import documents, edited, junk, tokenizer, write
from support.tiny_corpus import linked
from support.waiting import LIMIT

ARRAYS = {"copies": "<u4", "near_copies": "<u4", "representative": "<u4", "log_likelihood": "<f4", "weight": "<f4"}
WITH_REFERENCE = {"reference_log_likelihood": "<f4", "ratio": "<f4"}


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Write two prefixes: the second holds copies of the first, and junk."""
    texts = documents()
    first = write(tmp_path / "corpus_web", texts[:60])
    return [first, write(tmp_path / "corpus_code", [*texts[40:100], *[junk("hex", i) for i in range(10)]])]


@pytest.fixture
def trusted(tmp_path: Path) -> str:
    return write(tmp_path / "trusted", documents()[100:160])


def flags(tmp_path: Path, corpus: list[str]) -> list[str]:
    return ["commonness", "--data-path", *corpus, "--output", str(tmp_path / "out"), "--seq-length", "128"]


def arrays_of_blocks(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("block_*.npy")}


def test_the_most_copied_document_is_shown_though_an_edited_copy_comes_first(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Of each cluster of near copies, the document of which there are most."""
    texts = documents()
    corpus = write(tmp_path / "corpus", [edited(texts[0], 0.02, rng), texts[1], *[texts[0]] * 6, *[texts[1]] * 2])
    assert main(flags(tmp_path, [corpus])) == 0
    page = (tmp_path / "out" / "commonness.html").read_text("utf-8")
    table = page.split("<h3>Most copied</h3>")[1].split("<h3>")[0]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("<tr>")[2:]]
    assert [(row[0], row[3], row[4]) for row in rows] == [("2", "6", "7"), ("1", "3", "3")]


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_cleaned_corpus_in_the_same_command(
    tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of near copies one each: what the arrays say; never over what is there."""
    cleaned = tmp_path / "cleaned"
    assert main([*flags(tmp_path, corpus), "--split", "9,1", "--cleaned-output", str(cleaned)]) == 0
    assert "--split 100,0,0" in capsys.readouterr().out
    assert arrays_of_blocks(tmp_path / "out") == {array_file("block", name) for name in block_arrays(False)}
    representative = np.load(tmp_path / "out" / "document_representative.npy")
    first, second = BlockDataset([str(cleaned / Path(prefix).name) for prefix in corpus], 1, "1").datasets
    before_cleaning = BlockDataset(corpus, 1, "1").datasets
    kept = [i for i, cluster in enumerate(representative) if cluster == i]
    expected = [before_cleaning[i >= 54].document(i - 54 * (i >= 54)).tolist() for i in kept]
    texts = [part.document(i).tolist() for part in (first, second) for i in range(part.num_documents)]
    assert texts == expected
    assert len(kept) < len(representative)
    before = files(cleaned)
    assert main([*flags(tmp_path, corpus), "--cleaned-output", str(cleaned)]) == 2
    assert "--cleaned-output" in capsys.readouterr().err
    assert files(cleaned) == before
    inside = str(tmp_path / "out" / "cleaned")
    assert main([*flags(tmp_path, corpus), "--cleaned-output", inside]) == 2
    assert f"--cleaned-output {inside}: is in --output" in capsys.readouterr().err
    same = tmp_path / "other" / "corpus_web"
    assert main([*flags(tmp_path, [*corpus, str(same)]), "--cleaned-output", str(tmp_path / "new")]) == 2
    assert "need different names" in capsys.readouterr().err


def test_arrays_json_and_page(
    tmp_path: Path, corpus: list[str], trusted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    extra = ["--reference-data-path", trusted, "--tokenizer-model", str(tmp_path / "tokenizer.json"), "--split", "9,1"]
    assert main([*flags(tmp_path, corpus), *extra]) == 0
    assert "exact" in capsys.readouterr().out
    folder, dataset = tmp_path / "out", BlockDataset(corpus, 128, "9,1")
    summary = json.loads((folder / "commonness.json").read_text())
    assert summary["corpus"] == dataset.digests()
    assert summary["block_starts"] == dataset.train.domain_starts.tolist()
    assert summary["document_starts"] == [0, 54, 54 + 63]
    assert summary["domains"] == ["web", "code"]
    sizes = {"document": 117, "block": dataset.train.num_blocks}
    stored = {
        (kind, name): np.load(folder / f"{kind}_{name}.npy", allow_pickle=False)
        for kind in sizes
        for name in (*ARRAYS, *WITH_REFERENCE)
    }
    for (kind, name), array in stored.items():
        assert array.dtype == (ARRAYS | WITH_REFERENCE)[name]
        assert array.shape == (sizes[kind],)
    copied = list(range(40, 54))
    assert (stored["document", "copies"][copied] == 2).all()
    assert stored["document", "representative"][54 : 54 + 14].tolist() == copied
    likely = stored["document", "log_likelihood"]
    assert np.median(likely[copied]) > np.median(likely[:40]) + 2, "one is likely by its copy, not by itself"
    lowest = np.argsort(stored["document", "ratio"])[:3]
    assert (lowest >= 54 + 60).all(), "the junk, of which the split keeps three"
    assert summary["documents"]["share_exact_copies"] == pytest.approx(14 * 300 / (117 * 300))
    assert summary["documents"]["domains"]["web"]["with_exact_copies"] == 14
    assert arrays_of_blocks(folder) == {array_file("block", name) for name in block_arrays(True)}
    shares = np.load(folder / "block_unique_share.npy")
    weights = np.repeat(1 / stored["document", "near_copies"][:54].astype(float), 300)
    first = summary["block_starts"][1]
    expected = [weights[1 + 128 * i : 129 + 128 * i].mean() for i in range(first)]
    np.testing.assert_allclose(shares[:first], expected, rtol=1e-6)
    page = (folder / "commonness.html").read_text("utf-8")
    assert "Most unlike trusted text" in page
    assert not any(path.name.startswith(".out") for path in tmp_path.iterdir())


def test_what_is_least_like_trusted_text_weighs_nothing(tmp_path: Path, corpus: list[str], trusted: str) -> None:
    share = 0.08
    words = [*flags(tmp_path, corpus), "--split", "1", "--reference-data-path", trusted, "--junk-share", str(share)]
    assert main(words) == 0
    array = {path.stem: np.load(path) for path in (tmp_path / "out").glob("*.npy")}
    weight, near = array["document_weight"], array["document_near_copies"]
    datasets = BlockDataset(corpus, 128, "1").datasets
    lengths = np.array([len(each.document(i)) for each in datasets for i in range(each.num_documents)])
    order = np.argsort(array["document_ratio"])
    junk = order[np.cumsum(lengths[order]) <= share * lengths.sum()]
    assert set(range(60, 60 + 60)).isdisjoint(junk)
    assert len(junk) >= 8
    expected = 1 / near
    expected[junk] = 0
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    of_labels = np.repeat(weight.astype(float), lengths)
    first = int(lengths[:60].sum())
    blocks = json.loads((tmp_path / "out" / "commonness.json").read_text())["block_starts"]
    for base, start, end in ((0, 0, blocks[1]), (first, blocks[1], blocks[2])):
        means = [of_labels[base + 1 + 128 * i : base + 129 + 128 * i].mean() for i in range(end - start)]
        np.testing.assert_allclose(array["block_weight"][start:end], means, rtol=1e-6)


def test_a_prefix_that_is_all_junk(
    tmp_path: Path, corpus: list[str], trusted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not in the cleaned corpus, which can be read; its share is in the summary and on the page."""
    bad = write(tmp_path / "corpus_dump", [junk("hex", i) for i in range(12)])
    cleaned = tmp_path / "cleaned"
    words = ["--split", "1", "--reference-data-path", trusted, "--cleaned-output", str(cleaned)]
    assert main([*flags(tmp_path, [*corpus, bad]), *words]) == 0
    printed = capsys.readouterr().out
    assert f"not there, since less than a block is left of them: {bad}" in printed
    assert "--reference-data-path has 60 documents; of text like theirs, some 2 % is taken for junk" in printed
    left = sorted(str(path).removesuffix(".idx") for path in cleaned.glob("*.idx"))
    assert [Path(prefix).name for prefix in left] == ["corpus_code", "corpus_web"]
    assert BlockDataset(left, 128, "1").train.num_blocks > 0
    summary = json.loads((tmp_path / "out/commonness.json").read_text())["documents"]
    taken = np.load(tmp_path / "out/document_weight.npy") == 0
    assert summary["share_junk"] == pytest.approx(taken.mean())
    assert [part["share_junk"] for part in summary["domains"].values()] == pytest.approx(
        [taken[:60].mean(), taken[60:130].mean(), 1]
    )
    page = (tmp_path / "out/commonness.html").read_text("utf-8")
    assert "taken for junk" in page
    assert "Taken for junk, the most like trusted text" in page


def test_copied_junk_counts_once(tmp_path: Path, trusted: str) -> None:
    copied = [junk("hex", seed) for seed in range(10)]
    prefix = write(tmp_path / "copied", [*documents()[:100], *copied, *copied])
    assert main([*flags(tmp_path, [prefix]), "--split", "1", "--reference-data-path", trusted]) == 0
    assert np.flatnonzero(np.load(tmp_path / "out/document_weight.npy") == 0).tolist()[-20:] == list(range(100, 120))
    taken = np.load(tmp_path / "out/document_weight.npy")[:110] == 0
    summary = json.loads((tmp_path / "out/commonness.json").read_text())
    assert summary["junk"]["share"] == pytest.approx(taken.sum() / 120)


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = [*b"<script>alert(1)</script>&\x1b[31m"] * 9
    prefix = write(tmp_path / "bytes", [evil, evil, [*b"plain text, of which there is little"] * 4])
    assert main([*flags(tmp_path, [prefix]), "--tokenizer-model", "bytes", "--split", "1"]) == 0
    page = (tmp_path / "out" / "commonness.html").read_text("utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;\\x1b[31m" in page
    assert "<script>alert" not in page


@pytest.mark.parametrize("with_reference", [False, True])
def test_results_are_the_same_again_with_any_number_of_threads(
    tmp_path: Path, corpus: list[str], trusted: str, with_reference: bool
) -> None:
    reference = ["--reference-data-path", trusted] if with_reference else []
    written = []
    for threads in ("1", "3"):  # the second replaces the first
        assert main([*flags(tmp_path, corpus), *reference, "--threads", threads]) == 0
        written.append(files(tmp_path / "out"))
        written[-1].pop("commonness.json")
    assert len(written[0]) == (25 if with_reference else 18)
    assert written[0] == written[1]


def test_weights_of_prefixes_are_ignored(tmp_path: Path, corpus: list[str]) -> None:
    assert main(flags(tmp_path, ["0.3", corpus[0], "0.7", corpus[1]])) == 0
    assert json.loads((tmp_path / "out" / "commonness.json").read_text())["domains"] == ["web", "code"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data-path", "nowhere"], "--data-path nowhere: nowhere.idx: no such file"),
        (["--reference-data-path", "nowhere"], "--reference-data-path nowhere: nowhere.idx: no such file"),
        (["--memory-gb", "0.1"], "--memory-gb 0.1: this corpus needs at least 0."),
        (["--memory-gb", "nan"], "--memory-gb nan: must be positive"),
        (["--shingle-tokens", "0"], "--shingle-tokens 0: must be from 1 to 1024"),
        (["--near-threshold", "0.1"], "--near-threshold 0.1: must be from 0.4"),
        (["--junk-share", "1"], "--junk-share 1.0: must be auto, or at least 0 and below 1"),
        (["--junk-share", "0.1"], "--junk-share 0.1: needs --reference-data-path"),
        (["--threads", "-1"], "--threads -1: must be from 0 to 4096"),
        (["--seq-length", "1000000"], "fewer than the 1000001"),
        (["--output", "no/where"], "no/where: the folder"),
        (["--cleaned-output", f"{__file__}/x"], f"--cleaned-output {__file__}/x: {__file__} is no folder"),
        (["--data-path", "bad\udcff"], "bad\\udcff: is not UTF-8; the names of all files must be"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, corpus: list[str], extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(tmp_path, corpus), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_corpora_of_different_tokenizers_are_refused(
    tmp_path: Path, corpus: list[str], trusted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"tokenizer": "t.json", "vocab_size": 1024, "eod": None, "bos": None, "format": 1, "output_prefix": "c"}
    for prefix, count, print_ in ((corpus[0], 60, "one"), (trusted, 60, "two")):
        content = made | {"fingerprint": f"sha256 {print_}", "documents": count, "tokens": count * 300}
        Path(f"{prefix}.meta").write_text(json.dumps(content))
    assert main([*flags(tmp_path, corpus), "--reference-data-path", trusted]) == 2
    assert "their ids mean different tokens" in capsys.readouterr().err
    assert main([*flags(tmp_path, corpus), "--reference-data-path", corpus[0]]) == 2
    assert "is in --data-path" in capsys.readouterr().err
    assert main([*flags(tmp_path, corpus), "--reference-data-path", linked(corpus[0], tmp_path / "links")]) == 2
    assert "links/other: is in --data-path" in capsys.readouterr().err


def test_memory_for_the_largest_token_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One damaged id, as it would take gigabytes."""
    with IndexedDatasetWriter(tmp_path / "damaged", np.dtype(np.int32)) as writer:
        writer.add_document(np.full(3000, 7, np.int32))
        writer.add_document(np.array([1, 2, 1 << 28], np.int32))
    assert main([*flags(tmp_path, [str(tmp_path / "damaged")]), "--memory-gb", "1", "--threads", "1"]) == 2
    message = r"--memory-gb 1\.0: this corpus needs at least 1\.4\d, most of it for tokens up to 268435456\n"
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_in_use_is_refused(tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(flags(tmp_path, corpus)) == 2
    assert "is in use: holds notes.txt" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").rename(out / "block_copies.npy")
    assert main(flags(tmp_path, corpus)) == 2
    assert "holds no commonness.json of this command" in capsys.readouterr().err
    (out / "block_copies.npy").unlink()
    with lock_file(tmp_path / ".out.lock", ""):
        assert main(flags(tmp_path, corpus)) == 2
    assert "another process is making it" in capsys.readouterr().err
    assert main(flags(tmp_path, corpus)) == 0
    (out / "block_my_quality.npy").write_text("mine")
    assert main(flags(tmp_path, corpus)) == 2
    assert "is in use: holds block_my_quality.npy" in capsys.readouterr().err
    assert (out / "block_my_quality.npy").read_text() == "mine"


def test_a_folder_that_cannot_be_replaced_is_refused_before_any_work(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for name in (".", "..", "/proc"):
        assert main([*flags(tmp_path, corpus), "--output", name]) == 2
        assert f"--output {name}: " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path.name == "out")
        assert main(flags(tmp_path, corpus)) == 2
    assert "out: cannot be replaced by the results; name a folder in it" in capsys.readouterr().err


def test_a_kill_between_two_renames_loses_no_results(tmp_path: Path, corpus: list[str]) -> None:
    assert main(flags(tmp_path, corpus)) == 0
    before = files(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    shutil.copytree(tmp_path / ".out.replaced", tmp_path / ".out.made")
    with pytest.raises(ZeroDivisionError), results_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert files(tmp_path / "out") == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_the_table_does_not_depend_on_the_number_of_threads(corpus: list[str], tmp_path: Path) -> None:
    """Nor do the results: with little memory, there are fewer threads, and not a smaller table."""
    sizes = set()
    for threads in (1, 2, 8, 64):
        config = CommonnessConfig(corpus, tmp_path / "out", seq_length=128, memory_gb=0.3762, threads=threads)
        inputs = command._open(config)
        log2_slots, used = command._divide_memory(config, inputs)
        sizes.add(log2_slots)
        assert 1 <= used <= min(threads, 3)
    assert len(sizes) == 1


def test_a_failure_leaves_the_earlier_results(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tmp_path, corpus)) == 0
    before = files(tmp_path / "out")

    def fails(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(results.Items, "save", fails)
    assert main(flags(tmp_path, corpus)) == 2
    assert "disk full" in capsys.readouterr().err
    assert files(tmp_path / "out") == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


@pytest.mark.parametrize("with_reference", [False, True])
def test_memory_stays_within_the_flag(tmp_path: Path, with_reference: bool) -> None:
    """The peak is that of a separate process, with a table that the flag makes small."""
    rng = np.random.default_rng(3)
    prefix = write(tmp_path / "large", rng.integers(0, 60_000, (8000, 250)).tolist())
    trusted = [write(tmp_path / "trusted", rng.integers(0, 60_000, (4000, 250)).tolist())] if with_reference else []
    code = (
        "import sys; from process_memory import peak; from megatron_lfr.cli import main;"
        "code = main(sys.argv[1:]); print(peak()); sys.exit(code)"
    )
    words = [*flags(tmp_path, [prefix]), "--memory-gb", "0.42", "--threads", "2"]
    words += ["--reference-data-path", *trusted] if trusted else []
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=LIMIT, env=paths
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 0.42e9
    settings = json.loads((tmp_path / "out" / "commonness.json").read_text())["settings"]
    assert settings["table_slots"] == 2**23, "half of what the tokens would have been given"
