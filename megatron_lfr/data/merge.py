"""`megatron-lfr merge`: several indexed datasets one after the other as one, in flat memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lfr.data.indexed import IndexedDataset, IndexedDatasetWriter


@dataclass(frozen=True)
class MergeConfig:
    """Join indexed datasets (.bin/.idx) of one token type to one that holds their documents in the order given."""

    input: list[Path]
    """Prefixes of the datasets, in order."""
    output_prefix: Path
    """Where the result goes: <output-prefix>.bin and .idx."""


@dataclass(frozen=True)
class MergeSummary:
    prefix: Path
    documents: int
    tokens: int


def merge(config: MergeConfig) -> MergeSummary:
    """Write the joined dataset, byte for byte what Megatron's `IndexedDatasetBuilder.add_index` makes.

    Every input is checked whole before anything is written, and the output takes its name when it is complete.
    Errors: ValueError for damaged inputs, inputs of different types and an output that is an input; OSError for files
    that are missing or cannot be written.
    """
    if not config.input:
        raise ValueError("--input: give at least one prefix")
    output = config.output_prefix
    if not output.name or not output.parent.is_dir():
        raise ValueError(f"--output-prefix {output}: must name a file in a folder that exists")
    dtype = _checked_type(config)
    with IndexedDatasetWriter(output, dtype) as writer:
        for prefix in config.input:
            writer.add_dataset(IndexedDataset(prefix))
    return MergeSummary(output, writer.num_documents, writer.num_tokens)


def _checked_type(config: MergeConfig) -> np.dtype[Any]:
    """Open every input, one at a time: thousands would be more files than a process may hold open."""
    first: IndexedDataset | None = None
    for prefix in config.input:
        dataset = IndexedDataset(prefix)
        if prefix.resolve() == config.output_prefix.resolve():
            raise ValueError(f"--output-prefix {config.output_prefix}: is also an --input; give another name")
        first = first or dataset
        if dataset.dtype != first.dtype:
            raise ValueError(
                f"--input {prefix}: holds {dataset.dtype.name}, but {first.prefix} holds {first.dtype.name}; "
                "only datasets of one token type can be merged"
            )
    assert first is not None
    return first.dtype
