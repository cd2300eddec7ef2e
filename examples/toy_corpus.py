"""A small corpus for the other examples: half of its documents count up (easy), half are noise (hard)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter

VOCAB_SIZE = 64
EOD = 63


def write_toy_corpus(folder: Path, documents: int = 256, length: int = 64) -> Path:
    """Write `<prefix>.bin` and `<prefix>.idx` into `folder`, unless they are there; returns the prefix.

    Easy and hard documents take turns; each has `length` tokens, the last of them EOD.
    """
    prefix = folder / "toy_text_document"
    if prefix.with_name(prefix.name + ".idx").exists():
        return prefix
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in range(documents):
            counting = (rng.integers(EOD) + np.arange(length - 1)) % EOD
            noise = rng.integers(EOD, size=length - 1)
            writer.add_document(np.append(noise if document % 2 else counting, EOD))
    return prefix
