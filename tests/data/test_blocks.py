"""Blocks are slices of the concatenated tokens."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource, domain_names
from support.tiny_corpus import linked

WriteCorpus = Callable[..., Path]
Documents = list[list[int]]

SPLITS = {"99,1,0": (99, 1, 0), "50,30,20": (50, 30, 20), "1": (1, 0, 0), "0.7, 0.2, 0.1": (7, 2, 1), "2,1": (2, 1, 0)}


def random_documents(rng: np.random.Generator, lengths: list[int]) -> Documents:
    return [rng.integers(0, 60000, n).tolist() for n in lengths]


def cut_by_hand(documents: Documents, weights: tuple[int, int, int]) -> list[list[int]]:
    """Return the tokens of each split: document d of n goes by where its number falls among the rounded bounds."""
    total, n = sum(weights), len(documents)
    first, second = round(n * weights[0] / total), round(n * (weights[0] + weights[1]) / total)
    parts = documents[:first], documents[first:second], documents[second:]
    return [[token for document in part for token in document] for part in parts]


def blocks_by_hand(tokens: list[int], seq_length: int) -> list[list[int]]:
    blocks = []
    while len(tokens) > seq_length:
        blocks.append(tokens[: seq_length + 1])
        tokens = tokens[seq_length:]
    return blocks


@given(
    lengths=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=4),
    seq_length=st.integers(1, 9),
    split=st.sampled_from(sorted(SPLITS)),
    seed=st.integers(0, 1000),
)
def test_blocks_are_slices_of_the_splits(
    write_corpus: WriteCorpus, lengths: list[list[int]], seq_length: int, split: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    corpora = [random_documents(rng, ns) for ns in lengths]
    expected = [[blocks_by_hand(part, seq_length) for part in cut_by_hand(c, SPLITS[split])] for c in corpora]
    prefixes = [write_corpus(f"c_{i}", c, np.int32 if i % 2 else np.uint16) for i, c in enumerate(corpora)]
    if not all(train for train, _, _ in expected):
        with pytest.raises(ValueError, match=r"--data-path .*c_\d"):
            BlockDataset(prefixes, seq_length, split)
        return
    dataset = BlockDataset(prefixes, seq_length, split)
    for source, parts in zip((dataset.train, dataset.valid, dataset.test), zip(*expected, strict=True), strict=True):
        flat = [(domain, block) for domain, blocks in enumerate(parts) for block in blocks]
        assert source.num_blocks == len(flat)
        assert source.domain_starts.tolist() == [sum(map(len, parts[:i])) for i in range(len(parts) + 1)]
        order = rng.permutation(len(flat))
        ids = np.insert(order, 0, -1)
        rows = source.read(ids)
        assert rows.dtype == np.int64
        assert rows.shape == (len(flat) + 1, seq_length + 1)
        assert rows.tolist() == [[0] * (seq_length + 1), *(flat[i][1] for i in order)]
        assert source.domain_of(order).tolist() == [flat[i][0] for i in order]


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=15), seq_length=st.integers(1, 7))
def test_documents_of_a_block(write_corpus: WriteCorpus, lengths: list[int], seq_length: int) -> None:
    documents = [[d] * n for d, n in enumerate(lengths)]
    prefix = write_corpus("c", documents)
    if sum(lengths) < seq_length + 1:
        return
    source = BlockDataset([prefix], seq_length, "1").train
    for block in range(source.num_blocks):
        assert source.documents_of(block) == sorted(set(source.read([block])[0].tolist()))


def test_documents_of_validation_blocks_count_from_the_prefix(write_corpus: WriteCorpus) -> None:
    prefixes = [write_corpus(name, [[d] * 5 for d in range(10)]) for name in ("a", "b")]
    valid = BlockDataset(prefixes, 4, "80,20").valid
    assert valid.num_blocks == 4
    assert [valid.documents_of(block) for block in range(4)] == [[8], [8, 9], [8], [8, 9]]


@pytest.fixture
def source(write_corpus: WriteCorpus, rng: np.random.Generator) -> BlockSource:
    return BlockDataset([write_corpus("c", random_documents(rng, [50]))], 4, "1").train


@pytest.mark.parametrize("ids", [[12], [-2], [0, 1, 99], [0.5], [[1]]])
def test_ids_that_do_not_exist(source: BlockSource, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="block id"):
        source.read(ids)


def test_reading_no_block(source: BlockSource) -> None:
    assert source.read([]).shape == (0, 5)


def test_uint32_ids_are_read(source: BlockSource) -> None:
    assert np.array_equal(source.read(np.array([3, 1], np.uint32)), source.read([3, 1]))


def test_negative_tokens_are_refused_with_the_block(write_corpus: WriteCorpus) -> None:
    prefix = write_corpus("c", [[1, 2, 3, 4, 5, -6, 7]], np.int32)
    source = BlockDataset([prefix], 2, "1").train
    assert source.read([0, 1]).tolist() == [[1, 2, 3], [3, 4, 5]]
    with pytest.raises(ValueError, match=r"c\.bin: block 2 holds the negative token id -6"):
        source.read([0, 2])


def test_a_file_cut_short_after_opening_is_an_error(write_corpus: WriteCorpus) -> None:
    prefix = write_corpus("c", [list(range(100))])
    source = BlockDataset([prefix], 9, "1").train
    os.truncate(f"{prefix}.bin", 50)
    with pytest.raises(OSError, match=r"c\.bin"):
        source.read([0])


@pytest.mark.parametrize("split", ["", "a,b", "0,1", "-1,2", "1,2,3,4", "nan", "1/0", "inf"])
def test_bad_splits(write_corpus: WriteCorpus, split: str) -> None:
    with pytest.raises(ValueError, match="--split"):
        BlockDataset([write_corpus("c", [[1] * 10])], 2, split)


def test_corpus_shorter_than_a_block(write_corpus: WriteCorpus) -> None:
    long, short = write_corpus("long", [[1] * 10]), write_corpus("short", [[1] * 4])
    assert BlockDataset([long, short], 3, "1").train.num_blocks == 3 + 1
    with pytest.raises(ValueError, match=r"short: its 1 training documents .* hold 4 tokens, fewer than the 5"):
        BlockDataset([long, short], 4, "1")
    with pytest.raises(ValueError, match="--seq-length 0"):
        BlockDataset([long], 0)
    with pytest.raises(ValueError, match="--data-path"):
        BlockDataset([], 4)


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        (["x/stdlib_code_text_document"], ["stdlib_code"]),
        (["x/stdlib_code_text_document", "x/stdlib_docs_text_document"], ["code", "docs"]),
        (["x/web_text_document", "x/web_news_text_document"], ["web", "web_news"]),
        (["a/run1_web_text_document", "a/run1_books_text_document", "a/run1_books_b"], ["web", "books", "books_b"]),
        (["x/code", "x/core"], ["code", "core"]),
        (["x/code_text_document", "y/code_text_document"], ["x/code", "y/code"]),
        (["d_x/c", "d_y/c", "d_y/e"], ["x/c", "y/c", "y/e"]),
    ],
)
def test_domain_names(prefixes: list[str], names: list[str]) -> None:
    assert domain_names([Path(prefix) for prefix in prefixes]) == names


def test_a_prefix_given_twice(write_corpus: WriteCorpus) -> None:
    prefix = write_corpus("c", [[1] * 10])
    with pytest.raises(ValueError, match="given twice"):
        BlockDataset([prefix, prefix.parent / "." / "c"], 2)
    with pytest.raises(ValueError, match="links/other: given twice"):
        BlockDataset([prefix, linked(prefix, prefix.parent / "links")], 2)


def test_a_name_that_is_not_utf8() -> None:
    with pytest.raises(ValueError, match="is not UTF-8; rename its files"):
        BlockDataset(["bad\udcff"], 2)


def test_fingerprint_stays_when_files_move(write_corpus: WriteCorpus, tmp_path: Path, rng: np.random.Generator) -> None:
    prefix = write_corpus("a/c", random_documents(rng, [3000, 2000]))
    before = BlockDataset([prefix], 8).fingerprint()
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
    assert BlockDataset([tmp_path / "elsewhere" / "c"], 8).fingerprint() == before
    assert len(bytes.fromhex(before)) == 32


def test_fingerprint_changes_with_any_token_or_length(write_corpus: WriteCorpus, rng: np.random.Generator) -> None:
    lengths = [30, 40, 50]
    documents = random_documents(rng, lengths)
    fingerprints = {BlockDataset([write_corpus("c", documents)], 8, "1").fingerprint()}
    tried = 1
    for d, t in [(d, t) for d, n in enumerate(lengths) for t in range(n)]:
        documents[d][t] += 1
        fingerprints.add(BlockDataset([write_corpus("c", documents)], 8, "1").fingerprint())
        documents[d][t] -= 1
        tried += 1
    moved = [documents[0], [*documents[1], documents[2][0]], documents[2][1:]]
    fingerprints.add(BlockDataset([write_corpus("c", moved)], 8, "1").fingerprint())
    prefix = write_corpus("c", documents)
    other = write_corpus("d", random_documents(rng, [60]))
    for prefixes, seq_length, split in (
        ([prefix], 9, "1"),
        ([prefix], 8, "2,1"),
        ([prefix, other], 8, "1"),
        ([other, prefix], 8, "1"),
        ([write_corpus("e", documents, np.int32)], 8, "1"),
    ):
        fingerprints.add(BlockDataset(prefixes, seq_length, split).fingerprint())
    assert len(fingerprints) == tried + 1 + 5


def test_fingerprint_samples_first_and_last_page_of_a_large_file(
    write_corpus: WriteCorpus, rng: np.random.Generator
) -> None:
    prefix = write_corpus("c", random_documents(rng, [400_000]))
    with open(f"{prefix}.bin", "r+b", buffering=0) as file:  # noqa: PTH123
        before = BlockDataset([prefix], 8, "1").fingerprint()
        for position in (0, 4095, 800_000 - 4096, 799_999):
            file.seek(position)
            old = file.read(1)
            file.seek(position)
            file.write(bytes([old[0] ^ 1]))
            assert BlockDataset([prefix], 8, "1").fingerprint() != before
            file.seek(position)
            file.write(old)
    assert BlockDataset([prefix], 8, "1").fingerprint() == before
