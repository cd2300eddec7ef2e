"""How much of a corpus is junk is found without being told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.commonness.items import Prefix, reference_prefixes
from megatron_lfr.commonness.likelihood import count_ngrams, score
from megatron_lfr.commonness.trust import compare, token_quantile
from megatron_lfr.data.corpus.indexed import IndexedDataset
from support.commonness_samples import JUNK, VOCAB_SIZE, documents, edited, junk, write


def opened(prefix: Path, texts: list[list[int]]) -> list[Prefix]:
    return reference_prefixes([IndexedDataset(write(prefix, texts))])


def found_share(folder: Path, corpus: list[list[int]], trusted: list[list[int]]) -> float:
    """Return the share of the corpus' tokens that is taken for junk."""
    prefixes, reference = opened(folder / "corpus", corpus), opened(folder / "trusted", trusted)
    model = count_ngrams(prefixes, 22, VOCAB_SIZE, 2)
    own, of_trusted = score(model, prefixes, True, 2), score(model, reference, False, 2)
    trust = compare(prefixes, own, reference, of_trusted, (22, VOCAB_SIZE, 2), "auto")
    lengths = np.array([len(text) for text in corpus])
    return float(lengths[trust.documents < trust.junk_below].sum() / lengths.sum())


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


def test_the_quantile_counts_tokens() -> None:
    ratio = np.array([3.0, 1.0, np.nan, 2.0], np.float32)
    lengths = np.array([10, 30, 0, 60])
    below = [token_quantile(ratio, lengths, share) for share in (0.0, 0.29, 0.3, 0.89, 0.9, 0.99)]
    assert below == [1, 1, 2, 2, 3, 3]
