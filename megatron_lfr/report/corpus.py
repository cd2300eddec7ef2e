"""The corpus of a run, as far as it is still there: its domains, and the text of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.config import recorded_prefixes
from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource
from megatron_lfr.data.corpus.documents import check_tokenizer
from megatron_lfr.data.corpus.tokenizer import Tokenizer, recorded_tokenizer
from megatron_lfr.lfr.analysis import Run


@dataclass(frozen=True)
class Corpus:
    """What can be said of a run's blocks.

    domains, starts [len(domains) + 1]: as in BlockSource; one domain, "all blocks", where the corpus is not at hand.
    missing: why there are no domains, else None. no_text: why there is no text, else None.
    """

    domains: list[str]
    starts: npt.NDArray[np.int64]
    missing: str | None
    no_text: str | None
    source: BlockSource | None = None
    tokenizer: Tokenizer | None = None

    def domain_of(self, block: int) -> str:
        return self.domains[int(np.searchsorted(self.starts, block, side="right")) - 1]

    def text(self, block: int) -> str:
        """The text of a block's inputs; ValueError or OSError where it cannot be read."""
        assert self.source is not None
        assert self.tokenizer is not None
        tokens = self.source.read(np.array([block]))[0][:-1]
        return self.tokenizer.decode(tokens.tolist())


def open_corpus(run: Run) -> Corpus:
    """The corpus that a run's config.yaml names, if it is still the one that was trained on."""
    try:
        dataset = _open_dataset(run)
    except (ValueError, OSError) as error:
        whole = np.array([0, run.plan.n_blocks], np.int64)
        return Corpus(["all blocks"], whole, str(error), f"the corpus is not at hand: {error}")
    source = dataset.train
    try:
        tokenizer = _open_tokenizer(run.config)
        check_tokenizer(tokenizer, dataset.datasets)
    except (ValueError, OSError) as error:
        return Corpus(source.domains, source.domain_starts, None, str(error), source)
    return Corpus(source.domains, source.domain_starts, None, None, source, tokenizer)


def _open_dataset(run: Run) -> BlockDataset:
    prefixes, split = recorded_prefixes(run.config), run.config.get("split")
    if not isinstance(split, str):
        raise ValueError("the run's config.yaml names no split of the corpus (split)")
    dataset = BlockDataset(prefixes, run.plan.seq_length, split)
    if tuple(dataset.digests()) != run.corpus or dataset.train.num_blocks != run.plan.n_blocks:
        raise ValueError("what the run's config.yaml names is not the corpus that it was trained on (any more)")
    return dataset


def _open_tokenizer(config: dict[str, Any]) -> Tokenizer:
    tokenizer = recorded_tokenizer(config)
    if tokenizer is None:
        raise ValueError("the run's config.yaml names no tokenizer (tokenizer_model)")
    return tokenizer
