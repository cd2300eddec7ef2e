"""Tokens in an order are told from tokens in none, and are no junk, whatever kind of text they are."""

from __future__ import annotations

import base64
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.commonness.items import SECTION
from megatron_lfr.commonness.order import LEAST_DISPERSION, dispersion, in_order
from support.commonness_samples import JUNK, VOCAB_SIZE, documents, judged, junk, opened, tokenizer

BLOCKS = range(0x400, 0x900, 0x100)


def by_brute_force(text: list[int]) -> float:
    pairs = [(i, j) for j in range(len(text)) for i in range(j)]
    share = sum(text[i] == text[j] for i, j in pairs) / max(1, len(pairs))
    total, equals, runs = 0.0, 0, 0
    for lag in range(16, 65):
        expected = share * max(0, len(text) - lag)
        equal = [text[i] == text[i + lag] for i in range(len(text) - lag)]
        total += (sum(equal) - expected) ** 2 / expected if expected else 0
        equals += sum(equal)
        runs += sum(one and not before for one, before in zip(equal, [False, *equal], strict=False))
    return total / 49 / (equals / runs if runs else 1)


@given(st.lists(st.lists(st.integers(0, 3), max_size=90), min_size=1, max_size=4))
def test_the_dispersion_is_that_of_brute_force(texts: list[list[int]]) -> None:
    tokens = np.array([token for text in texts for token in text], np.int64)
    measured = dispersion(tokens, np.array([len(text) for text in texts]))
    np.testing.assert_allclose(measured, [by_brute_force(text) for text in texts], atol=1e-9)


def test_tokens_in_no_order_vary_by_chance(rng: np.random.Generator) -> None:
    """As chi-square by its 49 degrees of freedom: standard deviation 0.2 and mean 1, or less where equal tokens meet by
    chance in a row."""
    for kinds, length in ((100, 200), (300, 1000), (VOCAB_SIZE, 5000)):
        tokens = (kinds * rng.random(200 * length) ** 2).astype(np.int64)  # some are more frequent
        of_documents = dispersion(tokens, np.full(200, length))
        assert 0.85 < of_documents.mean() < 1.05
        assert of_documents.std() < 0.3
        assert of_documents.max() < LEAST_DISPERSION


def characters() -> list[list[int]]:
    """Return five tables of characters and their names, some 4,000 tokens each: no text like Python's reference."""
    lines = [[f"{chr(c)} {c:04X} {unicodedata.name(chr(c), '')}" for c in range(i, i + 120)] for i in BLOCKS]
    return [tokenizer().encode("\n".join(table)).ids for table in lines]


def test_text_shows_its_order_and_junk_does_not(tmp_path: Path, rng: np.random.Generator) -> None:
    """Of two prefixes, for chosen documents alone; of a long document by its beginning; not of a short one."""
    text = characters()[0]
    words = "\n".join(tokenizer().decode(table) for table in characters()).split()
    mixed = tokenizer().encode(" ".join(rng.permutation(words))).ids
    coded = [[token for seed in range(9) for token in junk(kind, seed)] for kind in ("base64", "hex", "digits")]
    coded.append(tokenizer().encode(base64.encodebytes(rng.bytes(20_000)).decode()).ids)  # in lines
    noise = rng.integers(VOCAB_SIZE, size=SECTION).tolist()
    lines = [token for number in range(30) for token in [7, *noise[20 * number :][:19]]]
    files = [[text, text, mixed, []], [*coded, text[:128], lines, noise + text, text]]
    prefixes = [prefix for i, file in enumerate(files) for prefix in opened(tmp_path / str(i), file)]
    chosen = np.ones(12, bool)
    chosen[1] = False
    assert np.flatnonzero(in_order(prefixes, chosen)).tolist() == [0, 9, 11]
    assert not in_order(prefixes, np.zeros(12, bool)).any()


@pytest.mark.parametrize("trusted", [50, 150])
def test_a_kind_of_text_that_the_trusted_text_lacks_is_no_junk(tmp_path: Path, trusted: int) -> None:
    """By ratio and order it is as unlike trusted text as junk is, and is told from it by the order that its own tokens
    show; where the trusted text is too small to compare orders, too."""
    kinds = JUNK if trusted == 150 else ("base64", "hex", "digits")
    texts, tables = documents(), characters()
    planted = [junk(kinds[seed % len(kinds)], seed) for seed in range(12)]
    trust = judged(tmp_path, [*tables, *planted, *texts[trusted:]], texts[:trusted])
    assert (trust.documents[:5] < trust.ratio_below).all()
    if trusted == 50:
        assert trust.beyond_below is None
    else:
        assert trust.beyond_below is not None
        assert (trust.likelihoods.documents_beyond[:5] < trust.beyond_below).all()
    assert trust.junk[:17].tolist() == [False] * 5 + [True] * 12
    assert trust.junk[17:].mean() < 0.03
