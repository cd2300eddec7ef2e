"""The 4-gram model follows its formula, in dictionaries; junk is told from trusted text."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr import _C
from megatron_lfr.commonness import items
from megatron_lfr.commonness.items import Prefix, reference_prefixes, training_prefixes
from megatron_lfr.commonness.likelihood import count_ngrams, score, vocabulary_of
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.corpus.indexed import IndexedDataset
from support.commonness_samples import JUNK, VOCAB_SIZE, area_under_curve, documents, junk, write

Documents = list[list[int]]
PSEUDO = (VOCAB_SIZE / 10, 100.0, 20.0, 10.0)


def prefixes_of(tmp_path: Path, corpus: Documents, name: str = "prefix", dtype: type = np.uint16) -> list[Prefix]:
    return reference_prefixes([IndexedDataset(write(tmp_path / name, corpus, dtype))])


def ngrams(tokens: list[int]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1))


def log_probabilities(tokens: list[int], counts: Counter[tuple[int, ...]], total: int) -> list[float]:
    """Compute the formula from exact counts."""
    result = []
    for i in range(len(tokens)):
        probability = 1 / VOCAB_SIZE
        for n in range(1, min(4, i + 1) + 1):
            gram = tuple(tokens[i - n + 1 : i + 1])
            context = counts[gram[:-1]] if n > 1 else total
            count = min(counts[gram], context)
            probability = (count + PSEUDO[n - 1] * probability) / (context + PSEUDO[n - 1])
        result.append(math.log(probability))
    return result


@pytest.mark.parametrize("leave_out", [True, False])
def test_likelihoods_are_those_of_the_formula(tmp_path: Path, leave_out: bool) -> None:
    corpus = [*documents()[:40], documents()[0], [], [3], [4, 5]]
    prefixes = prefixes_of(tmp_path, corpus)
    model = count_ngrams(prefixes, 26, VOCAB_SIZE, 2)
    assert model.tokens == sum(map(len, corpus))
    full, unigram = model.score(*prefixes[0].documents().arguments(), leave_out)
    every: Counter[tuple[int, ...]] = Counter()
    for tokens in corpus:
        every.update(ngrams(tokens))
    expected = []
    for tokens in corpus:
        counts = every - ngrams(tokens) if leave_out else every
        total = sum(map(len, corpus)) - (len(tokens) if leave_out else 0)
        expected += log_probabilities(tokens, counts, total)
    differ = np.abs(full - np.array(expected)) > 1e-4
    assert differ.mean() < 0.002, "few n-grams share one of 2^26 counters"
    result = score(model, prefixes, leave_out, 2)
    bounds = prefixes[0].offsets.tolist()
    for document, (first, last) in enumerate(itertools.pairwise(bounds)):
        part = slice(first, last)
        if first == last:
            assert np.isnan(result.documents[document])
        else:
            assert result.documents[document] == pytest.approx(full[part].mean(), rel=1e-5)
            assert result.documents_unigram[document] == pytest.approx(unigram[part].mean(), rel=1e-5)


def test_nothing_makes_itself_likely(tmp_path: Path) -> None:
    """What a document says to itself again and again, and nobody else, is as unlikely as what it says once."""
    texts, words = documents()[:30], list(range(900, 930))
    prefixes = prefixes_of(tmp_path, [*texts, words * 10, words])
    without = score(count_ngrams(prefixes, 24, VOCAB_SIZE, 1), prefixes, True, 1).documents
    alone = prefixes_of(tmp_path, [*texts, words * 10], "alone")
    repeated = score(count_ngrams(alone, 24, VOCAB_SIZE, 1), alone, True, 1).documents
    by_itself = score(count_ngrams(alone, 24, VOCAB_SIZE, 1), alone, False, 1).documents
    assert repeated[-1] < repeated[:-1].min()
    assert by_itself[-1] > by_itself[:-1].max(), "without leaving out, it would be the most likely of all"
    assert without[-2] > repeated[-1] + 1, "another document that says it makes it likely"


def test_long_documents_are_cut_and_blocks_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = [documents()[0] + documents()[1] + documents()[2], documents()[3], [], documents()[4]]
    corpus *= 4
    prefix = write(tmp_path / "prefix", corpus)
    dataset = BlockDataset([prefix], 64, "3,1")
    monkeypatch.setattr(items, "SECTION", 256)
    (one,) = training_prefixes(dataset)
    assert len(one.offsets) == 13
    spans = one.sections()
    assert spans.lengths.max() == 256
    assert np.array_equal(np.concatenate(([0], np.cumsum(spans.lengths)))[:-1], spans.starts)
    model = count_ngrams([one], 24, VOCAB_SIZE, 1)
    full, unigram = model.score(*spans.arguments(), True)
    result = score(model, [one], True, 2)
    monkeypatch.setattr(items, "_BATCH_SPANS", 3)  # blocks across batches
    parts = score(model, [one], True, 1)
    expected = [full[1 + 64 * i : 65 + 64 * i].astype(np.float64).mean() for i in range(dataset.train.num_blocks)]
    np.testing.assert_allclose(result.blocks, expected, rtol=1e-6)
    np.testing.assert_allclose(parts.blocks, expected, rtol=1e-6)
    bounds = one.offsets.tolist()
    for document, (first, last) in enumerate(itertools.pairwise(bounds)):
        if first < last:
            assert parts.documents_unigram[document] == pytest.approx(unigram[first:last].mean(), rel=1e-5)


def test_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    prefixes = prefixes_of(tmp_path, documents())
    one, three = (score(count_ngrams(prefixes, 16, VOCAB_SIZE, t), prefixes, True, t) for t in (1, 3))
    assert one.documents.tobytes() == three.documents.tobytes()


def test_types_and_tokens_outside(tmp_path: Path) -> None:
    corpus = documents()[:10]
    expected = None
    for dtype in (np.uint16, np.int32, np.int64):
        prefixes = prefixes_of(tmp_path, corpus, dtype.__name__, dtype)
        assert vocabulary_of(prefixes, 1) == 1 + max(map(max, corpus))
        result = score(count_ngrams(prefixes, 22, VOCAB_SIZE, 1), prefixes, True, 1).documents
        assert expected is None or result.tobytes() == expected.tobytes()
        expected = result
    with pytest.raises(ValueError, match="token 1000 is not in a vocabulary of 999"):
        count_ngrams(prefixes_of(tmp_path, [[1, 1000]]), 10, 999, 1)
    with pytest.raises(ValueError, match="negative token id"):
        vocabulary_of(prefixes_of(tmp_path, [[1, -1]], "negative", np.int32), 1)
    with pytest.raises(ValueError, match="log2_slots"):
        _C.NgramModel(32, 10)


@pytest.mark.parametrize("each", [3, 60])
def test_junk_has_the_lowest_ratio(tmp_path: Path, each: int) -> None:
    """Junk is rare, or the corpus is full of it."""
    texts = documents()
    trusted, clean = texts[: len(texts) // 3], texts[len(texts) // 3 :]
    kinds = ["clean"] * len(clean) + [kind for kind in JUNK for _ in range(each)]
    corpus = clean + [junk(kind, seed) for kind in JUNK for seed in range(each)]
    prefixes, reference = prefixes_of(tmp_path, corpus), prefixes_of(tmp_path, trusted, "trusted")
    likely = score(count_ngrams(prefixes, 22, VOCAB_SIZE, 2), prefixes, True, 2)
    trust = score(count_ngrams(reference, 22, VOCAB_SIZE, 2), prefixes, False, 2)
    ratio = trust.documents - likely.documents_unigram
    of = {kind: ratio[[k == kind for k in kinds]] for kind in ("clean", *JUNK)}
    assert {kind: area_under_curve(of[kind], of["clean"]) >= 0.95 for kind in JUNK} == dict.fromkeys(JUNK, True)
