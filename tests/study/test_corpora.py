"""Planted kinds by block, corpora that are cleaned, and the corpora of the studies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.commonness.clean import KEPT, clean, write_documents
from megatron_lfr.commonness.items import training_prefixes
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.data.corpus.sidecar import Sidecar, read_sidecar
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.study.labels import kinds_of_blocks, read_labels
from megatron_lfr.study.results import held_out_blocks

ROOT = Path(__file__).parents[2]
SEQ = 16


@pytest.mark.parametrize("split", ["1", "70,30,0"])
def test_kinds_of_blocks_are_counted_token_by_token(corpus: list[str], tmp_path: Path, split: str) -> None:
    dataset = BlockDataset(corpus, SEQ, split)
    counts = [d.num_documents for d in dataset.datasets]
    labels = np.random.default_rng(7).integers(0, 3, sum(counts))
    np.save(tmp_path / "labels.npy", labels)
    given = {"file": str(tmp_path / "labels.npy"), "of": "documents", "kinds": ["a", "b", "c"]}
    shares = kinds_of_blocks(given, corpus, dataset.train, split)

    expected = np.zeros((dataset.train.num_blocks, 3))
    first = block = 0
    for number, d in enumerate(dataset.datasets):
        lengths = [d.document_offset(i + 1) - d.document_offset(i) for i in range(d.num_documents)]
        of_token = np.repeat(labels[first : first + d.num_documents], lengths)
        blocks = int(np.diff(dataset.train.domain_starts)[number])
        for i in range(blocks):  # the labels of a block are its tokens but the first, and the one behind it
            expected[block] = np.bincount(of_token[1 + i * SEQ : 1 + (i + 1) * SEQ], minlength=3) / SEQ
            block += 1
        first += d.num_documents
    np.testing.assert_allclose(shares, expected, atol=1e-12)


def test_labels_that_do_not_fit_are_refused(corpus: list[str], tmp_path: Path) -> None:
    source = BlockDataset(corpus, SEQ, "1").train
    given = {"file": str(tmp_path / "labels.txt"), "of": "documents", "kinds": ["a", "b"]}
    (tmp_path / "labels.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"labels.txt: holds 2 labels, but there are 80 documents"):
        kinds_of_blocks(given, corpus, source, "1")
    (tmp_path / "labels.txt").write_text("a\nd\n")
    with pytest.raises(ValueError, match=r"labels.txt: unknown kind 'd'; the study names a, b"):
        kinds_of_blocks(given, corpus, source, "1")
    cut = tmp_path / "cut.npy"
    np.save(cut, np.zeros(80, np.int64))
    cut.write_bytes(cut.read_bytes()[:-1])
    unclosed = tmp_path / "unclosed.npy"
    np.save(unclosed, np.zeros(80, np.int64))
    unclosed.write_bytes(unclosed.read_bytes().replace(b"(80,)", b"(80,]"))
    with pytest.raises(ValueError, match=r"unclosed.npy: is no .npy, cut short, damaged or of objects"):
        read_labels(unclosed, ["a"])
    with pytest.raises(ValueError, match=r"cut.npy: is no .npy, cut short, damaged or of objects"):
        kinds_of_blocks({**given, "file": str(cut)}, corpus, BlockDataset(corpus, SEQ, "1").train, "1")


def test_held_out_blocks_belong_to_the_document_of_their_middle(corpus: list[str]) -> None:
    clusters = held_out_blocks(corpus, SEQ)
    source = BlockDataset(corpus, SEQ, "1").train
    for block in range(source.num_blocks):
        assert clusters.documents[block] in source.documents_of(block)
    assert (clusters.domains == source.domain_of(np.arange(source.num_blocks))).all()


@pytest.fixture
def masked(corpus: list[str], tmp_path: Path) -> list[str]:
    """Write the corpus again, with a mask that leaves out some blocks."""
    prefixes = [str(tmp_path / Path(prefix).name) for prefix in corpus]
    for prefix, plain in zip(prefixes, map(IndexedDataset, corpus), strict=True):
        with IndexedDatasetWriter(prefix, plain.dtype, masked=True) as writer:
            for number in range(plain.num_documents):
                tokens = plain.document(number)
                writer.add_document(tokens, np.arange(len(tokens)) >= (len(tokens) - 1) * (number % 3 > 0))
    return prefixes


def test_left_out_blocks_are_in_no_count(corpus: list[str], masked: list[str], tmp_path: Path) -> None:
    """Kinds and documents of the blocks that a mask leaves are those that the same tokens have without a mask."""
    plain, source = (BlockDataset(prefixes, SEQ, "1").train for prefixes in (corpus, masked))
    assert min(source.left_out) > 5
    kept = np.concatenate([source.token_starts(d) // SEQ + plain.domain_starts[d] for d in range(2)])
    np.save(tmp_path / "labels.npy", np.random.default_rng(7).integers(0, 3, 80))
    given = {"file": str(tmp_path / "labels.npy"), "of": "documents", "kinds": ["a", "b", "c"]}
    shares = kinds_of_blocks(given, corpus, plain, "1")
    np.testing.assert_array_equal(kinds_of_blocks(given, masked, source, "1"), shares[kept])
    with_mask, without = (held_out_blocks(prefixes, SEQ) for prefixes in (masked, corpus))
    assert with_mask.documents.tolist() == without.documents[kept].tolist()
    assert with_mask.domains.tolist() == without.domains[kept].tolist()


def test_commonness_needs_all_blocks_and_cleaning_keeps_masks(masked: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data-path .*toy_easy.*: its loss mask leaves out \d+ blocks"):
        training_prefixes(BlockDataset(masked, SEQ, "1"))
    assert len(training_prefixes(BlockDataset(masked, 64, "1"))) == 2  # every longer block has a label that counts
    chosen = [np.array([1, 3, 4]), np.array([0, 2])]
    write_documents(masked, chosen, tmp_path / "cleaned")
    for prefix, numbers in zip(masked, chosen, strict=True):
        before, after = IndexedDataset(prefix), IndexedDataset(tmp_path / "cleaned" / Path(prefix).name)
        for new, old in enumerate(numbers.tolist()):
            assert after.document(new).tolist() == before.document(old).tolist()
            assert after.mask_of(new).tolist() == before.mask_of(old).tolist()  # type: ignore[union-attr]


def test_a_cleaned_corpus_keeps_one_of_near_copies_and_drops_junk(tmp_path: Path) -> None:
    prefixes = [str(tmp_path / name) for name in ("a", "b")]
    for number, prefix in enumerate(prefixes):
        with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
            for document in range(4):
                writer.add_document(np.full(3, 10 * number + document, np.uint16))
            writer.meta = Sidecar("bytes", "0", 64, None, None, "ab", 4, 12).to_json()
    common = tmp_path / "common"
    common.mkdir()
    np.save(common / "document_representative.npy", np.array([0, 1, 0, 3, 4, 1, 6, 7], np.uint32))
    np.save(common / "document_weight.npy", np.array([0.5, 0.5, 0.5, 0, 1, 0.5, 1, 1], np.float32))
    (common / "commonness.json").write_text(json.dumps({"document_starts": [0, 4, 8], "settings": {"seq_length": 5}}))
    counts = clean(common, prefixes, tmp_path / "cleaned", {})
    kept = [[0, 1], [10, 12, 13]]
    for prefix, tokens in zip(("a", "b"), kept, strict=True):
        dataset = IndexedDataset(tmp_path / "cleaned" / prefix)
        assert [int(dataset.document(i)[0]) for i in range(dataset.num_documents)] == tokens
        sidecar = read_sidecar(dataset)
        assert sidecar is not None
        assert (sidecar.vocab_size, sidecar.documents, sidecar.tokens) == (64, len(tokens), 3 * len(tokens))
    assert np.load(tmp_path / "cleaned" / KEPT).tolist() == [0, 1, 4, 6, 7]
    assert (counts["documents"], counts["kept_documents"], counts["kept_tokens"]) == (8, 5, 15)
    (common / "commonness.json").write_text(json.dumps({"document_starts": [0, 4, 8], "settings": {"seq_length": 6}}))
    counts = clean(common, prefixes, tmp_path / "longer", {})
    assert counts["left_out"] == [prefixes[0]], "its 6 tokens are no block of 6, which has 6 labels"
    assert (counts["kept_documents"], counts["kept_tokens"]) == (3, 9)
    assert np.load(tmp_path / "longer" / KEPT).tolist() == [4, 6, 7]
    assert sorted(path.name for path in (tmp_path / "longer").iterdir() if path.suffix == ".idx") == ["b.idx"]
    (common / "commonness.json").write_text(json.dumps({"document_starts": [0, 4, 8], "settings": {"seq_length": 9}}))
    with pytest.raises(ValueError, match="cleaning leaves less than a block of 9 tokens of each prefix"):
        clean(common, prefixes, tmp_path / "none", {})
    assert not (tmp_path / "none").exists()


def test_the_corpora_of_the_studies_have_the_planted_shares_and_are_the_same_each_time(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    words = np.array([f"word{i}" for i in range(500)])
    generator = np.random.default_rng(3)
    rows = [
        {
            "domain": ("web", "web2")[i % 2],  # the prefixes' files are in another order
            "text": " ".join(["\u2028", *generator.choice(words, int(generator.integers(50, 300)))]),
        }
        for i in range(400)
    ]
    text.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for name in ("one", "two"):
        words_ = [sys.executable, str(ROOT / "studies" / "make_corpora.py"), str(tmp_path / name), "--text", str(text)]
        subprocess.run(words_, check=True, capture_output=True)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    parts = {
        name: [json.loads(line) for line in (tmp_path / "one" / f"{name}.jsonl").read_text().split("\n")[:-1]]
        for name in ("clean", "held_out", "trusted", "redundant")
    }
    texts = {name: {row["text"] for row in part} for name, part in parts.items()}
    assert not texts["held_out"] & (texts["clean"] | texts["redundant"] | texts["trusted"])
    assert not texts["trusted"] & (texts["clean"] | texts["redundant"])
    kinds = (tmp_path / "one" / "redundant.labels").read_text().splitlines()
    sizes: Counter[str] = Counter()
    for kind, row in zip(kinds, parts["redundant"], strict=True):
        sizes[kind] += len(row["text"])
        if kind in ("unique", "copy"):
            assert row["text"] in texts["clean"]
        elif kind != "boilerplate":
            assert row["text"] not in texts["clean"]
    total = sizes.total()
    shares = {kind: size / total for kind, size in sizes.items()}
    expected = {"unique": 0.6, "copy": 0.12, "edited copy": 0.12, "boilerplate": 0.04, "shuffled": 0.06, "coded": 0.06}
    assert shares == pytest.approx(expected, abs=0.02)
    domains = [row["domain"] for row in parts["redundant"]]
    assert domains == sorted(domains, key=lambda domain: f"redundant_{domain}_text_document.idx")
    assert domains[0] == "web2"


def test_documents_of_no_word_are_left_out_of_the_corpora(tmp_path: Path) -> None:
    """They would be no documents of the indexed datasets, and the labels those of others."""
    rows = [{"domain": "a", "text": f"word{i} and more"} for i in range(200)] + [{"domain": "a", "text": " \n"}]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(ROOT / "studies/make_corpora.py"), str(tmp_path / "out"), "--text", str(text)]
    subprocess.run(command, check=True, capture_output=True)
    texts = [json.loads(line)["text"] for line in (tmp_path / "out/redundant.jsonl").read_text().splitlines()]
    assert all(text.strip() for text in texts)
    assert len(texts) == len((tmp_path / "out/redundant.labels").read_text().splitlines())


def test_tasks_are_spans_of_the_held_out_text(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    texts = {
        (domain, " ".join(rng.choice(["red", "green\n", "blue", "white", "dark"], length)).strip())
        for domain, length in (*[("long", 60)] * 9, *[("short", 20)] * 9, *[("other", 40)] * 5)
    }
    rows = [json.dumps({"domain": domain, "text": text}) + "\n" for domain, text in sorted(texts)]
    (tmp_path / "held_out.jsonl").write_text("".join(rows))
    command = [sys.executable, str(ROOT / "studies/make_tasks.py"), str(tmp_path / "held_out.jsonl"), str(tmp_path)]
    subprocess.run([*command, "--items", "12"], check=True)
    choices, words = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("next_words", "last_word")
    )
    assert len(choices) == len(words) == 24  # of two domains: documents of 20 words are too short
    documents = ["".join(text.split()) for _, text in texts]
    for choice, word in zip(choices, words, strict=True):
        assert len(choice["context"].split()) == 24
        assert len({text.strip() for text in choice["choices"]}) == 4
        follows = choice["choices"][choice["answer"]]
        assert any("".join((choice["context"] + follows).split()) in text for text in documents)
        assert word["context"] == choice["context"]
        assert (follows.split()[0], len(follows.split())) == (word["target"].strip(), 6)
    assert len({choice["answer"] for choice in choices}) == 4

    (tmp_path / "held_out.jsonl").write_text(json.dumps({"domain": "same", "text": "red " * 40}))
    failed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "too few documents that differ: 1" in failed.stderr
