"""Copies are those that brute force over the tokens finds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr import _C
from megatron_lfr.commonness.copies import Copies, find_copies
from megatron_lfr.commonness.items import reference_prefixes, training_prefixes
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.corpus.indexed import IndexedDataset
from support.commonness_samples import documents, edited, write

Documents = list[list[int]]


def copies_of(tmp_path: Path, *corpora: Documents, threshold: float = 0.5, threads: int = 2) -> Copies:
    prefixes = [write(tmp_path / f"prefix{i}", corpus) for i, corpus in enumerate(corpora)]
    spans = [prefix.documents() for prefix in reference_prefixes([IndexedDataset(prefix) for prefix in prefixes])]
    return find_copies(spans, 4, threshold, threads, tmp_path / "signatures")


def jaccard(one: list[int], two: list[int]) -> float:
    sets = [{tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)} for tokens in (one, two)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_exact_copies_are_those_of_equal_tokens(tmp_path: Path, rng: np.random.Generator) -> None:
    texts = documents()[:60]
    corpus = [texts[i] for i in rng.integers(60, size=150)] + [[], [5], [5, 5], [5], []]
    corpus += [[*texts[0][:-1], texts[0][-1] ^ 1], [texts[0][0] ^ 1, *texts[0][1:]], texts[0][:-1]]
    result = copies_of(tmp_path, corpus[:70], corpus[70:])
    counts = Counter(map(tuple, corpus))
    assert result.copies.tolist() == [counts[tuple(document)] for document in corpus]
    assert result.copies.dtype == result.representative.dtype == np.uint32
    assert not (tmp_path / "signatures").exists()


def test_exact_copies_of_blocks(tmp_path: Path, rng: np.random.Generator) -> None:
    texts = [text[:100] for text in documents()[:8]]  # blocks of 50 begin where documents do
    prefixes = [write(tmp_path / name, [texts[i] for i in rng.integers(8, size=40)]) for name in "ab"]
    corpus = BlockDataset(prefixes, 50, "3,1")
    spans = [prefix.training_blocks() for prefix in training_prefixes(corpus)]
    result = find_copies(spans, 4, 0.5, 2, tmp_path / "signatures")
    rows = [tuple(row) for row in corpus.train.read(np.arange(corpus.train.num_blocks)).tolist()]
    counts = Counter(rows)
    assert result.copies.tolist() == [counts[row] for row in rows]
    assert max(counts.values()) > 2


@pytest.mark.parametrize(("share", "least"), [(0.0, 0.99), (0.02, 0.95), (0.05, 0.85)])
def test_recall_and_precision_of_planted_copies(
    tmp_path: Path, rng: np.random.Generator, share: float, least: float
) -> None:
    texts = documents()
    planted = rng.choice(len(texts), 120, replace=False).tolist()
    corpus = texts + [edited(texts[i], share, rng) for i in planted]
    order = rng.permutation(len(corpus))
    result = copies_of(tmp_path, [corpus[i] for i in order])
    group = np.empty(len(corpus), np.int64)
    group[order] = result.representative
    recalled = [group[i] == group[len(texts) + n] for n, i in enumerate(planted)]
    assert np.mean(recalled) >= least
    if share == 0:
        counts = np.empty(len(corpus), np.int64)
        counts[order] = result.copies
        assert (counts[len(texts) :] >= 2).mean() >= 0.99
    source = [*range(len(texts)), *planted]
    pairs = [(i, j) for i in range(len(corpus)) for j in range(i) if group[i] == group[j]]
    right = [source[i] == source[j] or jaccard(corpus[i], corpus[j]) >= 0.4 for i, j in pairs]
    assert len(pairs) >= 100
    assert np.mean(right) >= 0.99


def test_signatures_estimate_the_jaccard_similarity(tmp_path: Path, rng: np.random.Generator) -> None:
    texts = documents()[:40]
    corpus: Documents = []
    for text in texts:  # of all lengths: short ones, too, take further rounds
        length = int(rng.integers(8, len(text)))
        corpus += [text[:length], edited(text[:length], float(rng.uniform(0, 0.2)), rng)]
    dataset = IndexedDataset(write(tmp_path / "prefix", corpus))
    (prefix,) = reference_prefixes([dataset])
    hashes, signatures = np.empty(len(corpus), np.uint64), np.empty((len(corpus), _C.SIGNATURE_BINS), np.uint16)
    _C.sketch_spans(*prefix.documents().arguments(), 4, hashes, signatures)
    agree = (signatures[::2] == signatures[1::2]).mean(axis=1)
    exact = np.array([jaccard(one, two) for one, two in zip(corpus[::2], corpus[1::2], strict=True)])
    deviation = np.sqrt(exact * (1 - exact) / _C.SIGNATURE_BINS)
    assert exact.min() < 0.4
    assert (np.abs(agree - exact) <= 4 * deviation + 1e-9).all()
    assert abs((agree - exact).mean()) < 0.02
    unrelated = (signatures[:-2:2] == signatures[2::2]).mean()
    assert unrelated < 0.05


def test_clusters_are_connected_components(tmp_path: Path, rng: np.random.Generator) -> None:
    apart: Documents = []
    for text in documents():
        if len(apart) < 12 and all(jaccard(text, other) < 0.1 for other in apart):
            apart.append(text)
    chains = []
    for text in apart:
        chain = [text]
        for _ in range(4):  # neighbours resemble each other, the ends less
            chain.append(edited(chain[-1], 0.04, rng))
        chains.append(chain)
    corpus = [chain[step] for step in range(5) for chain in chains]
    result = copies_of(tmp_path, corpus)
    assert result.representative.tolist() == [i % 12 for i in range(60)]
    assert (result.near_copies == 5).all()


def test_the_same_for_any_number_of_threads(tmp_path: Path, rng: np.random.Generator) -> None:
    texts = documents()
    corpus = texts + [edited(texts[i], 0.05, rng) for i in range(0, len(texts), 2)]
    one, three = (copies_of(tmp_path, corpus, threads=threads) for threads in (1, 3))
    for name in ("copies", "near_copies", "representative"):
        assert getattr(one, name).tobytes() == getattr(three, name).tobytes()


def test_a_long_monotonous_document(tmp_path: Path) -> None:
    result = copies_of(tmp_path, [[7] * 100_000, [7] * 99_000, [7, 8] * 50_000, list(range(1000)) * 100, [7, 7, 7]])
    assert result.copies.tolist() == [1] * 5
    assert result.representative.tolist() == [0, 0, 2, 3, 4]  # the same set of shingles, whatever their number
