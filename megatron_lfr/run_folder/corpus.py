"""The corpus of a run: the domains of its blocks, and the documents and text in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.config import recorded_prefixes
from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource
from megatron_lfr.data.corpus.documents import check_tokenizer
from megatron_lfr.data.corpus.tokenizer import Tokenizer, recorded_tokenizer
from megatron_lfr.fileio import describe
from megatron_lfr.run_folder.folder import RunFolder


@dataclass(frozen=True)
class Corpus:
    """What is known about a run's training blocks.

    domains, starts [len(domains) + 1]: as in BlockSource; there is one domain, "all blocks", where the corpus is not
    available. missing: why it is not, else None. no_text: why its blocks cannot be decoded, else None.
    """

    domains: list[str]
    starts: npt.NDArray[np.int64]
    source: BlockSource | None
    tokenizer: Tokenizer | None
    missing: str | None = None
    no_text: str | None = None

    def domain(self, block: int) -> str:
        """Return the domain of a block."""
        return self.domains[int(np.searchsorted(self.starts, block, side="right")) - 1]

    def documents(self, block: int) -> tuple[int, int]:
        """Return (first, last) of the documents in a block, as numbered within its prefix."""
        assert self.source is not None
        documents = self.source.documents_of(block)
        return documents[0], documents[-1]

    def tokens(self, block: int) -> list[int]:
        """Read the tokens of a block and the label of its last one [seq_length + 1]; OSError where they cannot be
        read."""
        assert self.source is not None
        tokens: list[int] = self.source.read([block])[0].tolist()
        return tokens

    def trained_tokens(self, block: int) -> int | None:
        """Return how many of a block's labels the loss mask trains on; None where no corpus has a mask."""
        assert self.source is not None
        mask = self.source.read_loss_mask([block])
        return None if mask is None else int(mask.sum())

    def text(self, block: int) -> str:
        """Decode a block's tokens. The text is not made safe for printing (see `output.visible`)."""
        assert self.tokenizer is not None
        return self.tokenizer.decode(self.tokens(block))


def open_corpus(folder: RunFolder, data_path: Sequence[str] = (), tokenizer_model: str | None = None) -> Corpus:
    """Open the corpus and the tokenizer of a run from the paths in its settings, or where they were moved, from
    `data_path` (in the run's order) and `tokenizer_model`. `no_text` is set only where the run has no tokenizer.

    Raises ValueError where the corpus is not the one that the run was trained on, or was made with another tokenizer,
    and OSError where either is missing.
    """
    dataset = _open_dataset(folder, data_path)
    return _corpus(dataset.train, _open_tokenizer(folder, dataset, tokenizer_model))


def find_corpus(folder: RunFolder) -> Corpus:
    """Open as much of a run's corpus and tokenizer as still exists, with the reasons for what is missing. Raises
    ValueError where there is no run."""
    try:
        dataset = _open_dataset(folder)
    except (ValueError, OSError) as error:
        plan, _ = folder.plan()
        starts, reason = np.array([0, plan.n_blocks], np.int64), describe(error)
        return Corpus(["all blocks"], starts, None, None, reason, f"the corpus is not at hand: {reason}")
    try:
        return _corpus(dataset.train, _open_tokenizer(folder, dataset))
    except (ValueError, OSError) as error:
        return _corpus(dataset.train, None, describe(error))


def _corpus(source: BlockSource, tokenizer: Tokenizer | None, no_text: str | None = None) -> Corpus:
    if tokenizer is None and no_text is None:
        no_text = "the run's config.yaml names no tokenizer (tokenizer_model)"
    return Corpus(source.domains, source.domain_starts, source, tokenizer, no_text=no_text)


def _open_dataset(folder: RunFolder, data_path: Sequence[str] = ()) -> BlockDataset:
    plan, _ = folder.plan()
    try:
        settings = folder.settings()
        paths, split = list(data_path) or recorded_prefixes(settings), settings.get("split")
        if split is None:
            raise ValueError("its config.yaml names no split")
    except ValueError as error:
        raise ValueError(f"{folder.path}: no corpus is known ({error})") from None
    named = [len(segment.blend.sizes) for segment in plan.segments[:-1]]
    dataset = BlockDataset(paths, plan.seq_length, str(split), named=named)
    if dataset.digests() != folder.identity().get("corpus") or dataset.train.num_blocks != plan.n_blocks:
        raise ValueError(f"--data-path {' '.join(map(str, paths))}: not the corpus that {folder.path} trained on")
    return dataset


def _open_tokenizer(folder: RunFolder, dataset: BlockDataset, moved_to: str | None = None) -> Tokenizer | None:
    tokenizer = recorded_tokenizer(folder.settings(), moved_to)
    check_tokenizer(tokenizer, dataset.datasets)
    return tokenizer
