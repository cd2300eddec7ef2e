"""Documents that repeat themselves are found, and are no junk, whatever kind of text they are."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.commonness.items import SECTION
from megatron_lfr.commonness.repeats import equal_pairs, repeats
from support.commonness_samples import JUNK, VOCAB_SIZE, documents, judged, junk, opened, tokenizer

BLOCKS = range(0x400, 0x900, 0x100)


@given(st.lists(st.lists(st.integers(0, 3), max_size=40), min_size=1, max_size=5))
def test_equal_pairs_are_those_of_brute_force(texts: list[list[int]]) -> None:
    def pairs(text: list[int], n: int) -> int:
        counts = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
        return sum(count * (count - 1) // 2 for count in counts.values())

    tokens = np.array([token for text in texts for token in text], np.int64)
    counted = equal_pairs(tokens, np.array([len(text) for text in texts]))
    assert counted.tolist() == [[pairs(text, n) for n in (1, 2, 4, 8)] for text in texts]


def characters() -> list[list[int]]:
    """Return five tables of characters and their names, some 4,000 tokens each: no text like Python's reference."""
    lines = [[f"{chr(c)} {c:04X} {unicodedata.name(chr(c), '')}" for c in range(i, i + 120)] for i in BLOCKS]
    return [tokenizer().encode("\n".join(table)).ids for table in lines]


def test_text_repeats_itself_and_junk_does_not(tmp_path: Path, rng: np.random.Generator) -> None:
    """Of two prefixes, for chosen documents alone; of a long document by its beginning."""
    text, mixed = characters()[0], rng.permutation(characters()[0]).tolist()
    coded = [[token for seed in range(9) for token in junk(kind, seed)] for kind in ("base64", "hex", "digits")]
    noise = rng.integers(VOCAB_SIZE, size=SECTION).tolist()
    files = [[text, text, mixed, []], [*coded, [5] * 2000, noise + text, text]]
    prefixes = [prefix for i, file in enumerate(files) for prefix in opened(tmp_path / str(i), file)]
    chosen = np.ones(10, bool)
    chosen[1] = False
    repeating = repeats(prefixes, chosen)
    assert np.flatnonzero(repeating.bigrams).tolist() == [0, 9]
    assert np.flatnonzero(repeating.phrases).tolist() == [0, 7, 9]  # one token alone has no bigrams beyond chance


@pytest.mark.parametrize("trusted", [50, 150])
def test_a_kind_of_text_that_the_trusted_text_lacks_is_no_junk(tmp_path: Path, trusted: int) -> None:
    """By ratio and order it is as unlike trusted text as junk is, and is told from it by what it repeats; where the
    trusted text is too small for the order, too."""
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
