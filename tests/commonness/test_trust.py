"""How much of a corpus is junk is found without being told."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lfr.commonness.items import Prefix
from megatron_lfr.commonness.junk import effective_number, excess, token_quantile
from megatron_lfr.commonness.likelihood import count_ngrams, score
from megatron_lfr.commonness.usual import Usual
from support.commonness_samples import JUNK, VOCAB_SIZE, documents, edited, judged, junk, opened


def found_share(folder: Path, corpus: list[list[int]], trusted: list[list[int]]) -> float:
    """Return the share of the corpus' tokens that is taken for junk."""
    lengths = np.array([len(text) for text in corpus])
    return float(lengths[judged(folder, corpus, trusted).junk].sum() / lengths.sum())


@pytest.mark.parametrize("share", [0.0, 0.05, 0.12, 0.25])
@pytest.mark.parametrize("kind", ["shuffled", "coded"])
def test_the_share_of_junk_is_found(tmp_path: Path, kind: str, share: float) -> None:
    texts = documents()
    trusted, clean = texts[: len(texts) // 3], texts[len(texts) // 3 :]
    kinds = [kind] if kind == "shuffled" else [name for name in JUNK if name != "shuffled"]
    planted = [junk(kinds[seed % len(kinds)], 1000 + seed) for seed in range(round(share / (1 - share) * len(clean)))]
    assert found_share(tmp_path, clean + planted, trusted) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_copies_are_no_junk(tmp_path: Path, share: float, rng: np.random.Generator) -> None:
    texts = documents()
    trusted, clean = texts[: len(texts) // 3], texts[len(texts) // 3 :]
    copied = rng.integers(len(clean) // 5, size=round(share / (1 - share) * len(clean)))
    copies = [edited(clean[index], 0.02 * (number % 2), rng) for number, index in enumerate(copied)]
    assert found_share(tmp_path, clean + copies, trusted) <= 0.05


def test_what_tokens_usually_have(tmp_path: Path) -> None:
    """Against plain means: by token, and of what is left by the token before, where 20 values of the mean of all count
    beside a token's own; of trusted text, each token without itself."""
    texts = [text[: 20 + 5 * number] for number, text in enumerate(documents()[:30])]
    trusted, other = opened(tmp_path / "trusted", texts[:20]), opened(tmp_path / "other", texts[20:])
    model = count_ngrams(trusted, 22, VOCAB_SIZE, 1)
    usual = Usual(model, trusted, VOCAB_SIZE, 1)

    def scored(prefixes: list[Prefix], texts: list[list[int]], leave_out: bool) -> list[tuple[int, int, float]]:
        logs = model.score(*prefixes[0].documents().arguments(), leave_out, 1)[0]
        pairs = [pair for text in texts for pair in zip(text, [VOCAB_SIZE, *text], strict=False)]
        return [(token, before, float(log)) for (token, before), log in zip(pairs, logs, strict=True)]

    def mean(values: list[float], of_all: float) -> float:
        return (sum(values) + 20 * of_all) / (len(values) + 20)

    def beyond(rows: list[tuple[int, int, float]], is_trusted: bool) -> list[float]:
        """Subtract the means of the trusted rows by the first number of each."""
        known = scored(trusted, texts[:20], True)
        for key in (0, 1):
            of_all = sum(row[2] for row in known) / len(known)
            by_key: dict[int, list[float]] = {}
            for row in known:
                by_key.setdefault(row[key], []).append(row[2])

            def less(row: tuple[int, int, float], itself: bool, key: int, by_key: Any, of_all: float) -> Any:
                values = list(by_key.get(row[key], []))
                if itself:
                    values.remove(row[2])
                return (*row[:2], row[2] - mean(values, of_all))

            rows = [less(row, is_trusted, key, by_key, of_all) for row in rows]
            known = [less(row, True, key, by_key, of_all) for row in known]
        return [row[2] for row in rows]

    spans = trusted[0].documents()
    logs = model.score(*spans.arguments(), True, 1)[0]
    expected = beyond(scored(trusted, texts[:20], True), True)
    np.testing.assert_allclose(usual.less_without(spans, logs), expected, atol=2e-4)
    spans = other[0].documents()
    logs = model.score(*spans.arguments(), False, 1)[0]
    expected = beyond(scored(other, texts[20:], False), False)
    np.testing.assert_allclose(usual.less(spans, logs), expected, atol=2e-4)
    of_documents = score(model, other, False, 2, usual).documents_beyond
    ends = np.cumsum([0, *map(len, texts[20:])])
    means = [np.mean(expected[first:last]) for first, last in itertools.pairwise(ends)]
    np.testing.assert_allclose(of_documents, means, atol=2e-4)


def test_the_excess_over_trusted_text(rng: np.random.Generator) -> None:
    """By brute force. Of two parts that lie apart it is the share of the lower one; without one, nothing."""
    trusted = rng.normal(size=4000).astype(np.float32)
    lengths = rng.integers(1, 50, size=4000)
    number = lengths.sum() ** 2 / (lengths**2).sum()
    for share in (0.0, 0.1, 0.4):
        junk = rng.random(3000) < share
        for apart in (20.0, 2.0):
            values = (rng.normal(size=3000) - apart * junk).astype(np.float32)
            tokens = rng.integers(1, 50, size=3000)
            documents = 1 / (1 / number + (tokens**2).sum() / tokens.sum() ** 2)
            expected = 0.0
            for at in values:
                f, t = tokens[values < at].sum() / tokens.sum(), lengths[trusted < at].sum() / lengths.sum()
                if t <= 0.15 and f - t > 3 * (t * (1 - t) / documents) ** 0.5:
                    expected = max(expected, (f - t) / (1 - t))
            share_of_junk = excess(values, tokens, trusted, lengths)
            assert share_of_junk == pytest.approx(expected, abs=1e-9)
            if apart == 20:
                assert share_of_junk == pytest.approx(tokens[junk].sum() / tokens.sum(), abs=0.02)
    assert excess(np.append(trusted[:10], np.float32(np.nan)), np.append(lengths[:10], 0), trusted, lengths) == 0


def test_few_documents_do_not_tell_what_is_out_of_order(tmp_path: Path) -> None:
    """A hundred of like length do; as many tokens in fewer documents do not. A long one among many changes nothing."""
    assert effective_number(np.full(100, 7)) == pytest.approx(100)
    assert effective_number(np.array([10_000, *[1] * 99])) < 2
    texts = documents()
    joined = [list(itertools.chain(*texts[first : first + 5])) for first in range(0, 150, 5)]
    and_a_long_one = [*texts[:120], list(itertools.chain(*texts[120:150]))]
    assert effective_number(np.array([len(text) for text in and_a_long_one])) < 100
    for name, trusted, is_enough in (
        ("few", joined, False),
        ("many", texts[:150], True),
        ("long", and_a_long_one, True),
    ):
        (tmp_path / name).mkdir()
        trust = judged(tmp_path / name, texts[150:], trusted)
        assert (trust.beyond_below is not None) == is_enough


def test_the_quantile_counts_tokens() -> None:
    ratio = np.array([3.0, 1.0, np.nan, 2.0], np.float32)
    lengths = np.array([10, 30, 0, 60])
    below = [token_quantile(ratio, lengths, share) for share in (0.0, 0.29, 0.3, 0.89, 0.9, 0.99)]
    assert below == [1, 1, 2, 2, 3, 3]
