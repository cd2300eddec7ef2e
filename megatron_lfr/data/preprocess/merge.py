"""`megatron-lfr merge` joins indexed datasets into one; its memory does not grow with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lfr.data.corpus.indexed import IndexedDataset, files_of, with_suffix
from megatron_lfr.data.corpus.mask import MASK
from megatron_lfr.data.corpus.sidecar import common_sidecar
from megatron_lfr.data.preprocess.output import exists
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter


@dataclass(frozen=True)
class MergeConfig:
    """Join indexed datasets (.bin/.idx) of one token type into one that holds their documents in the order given."""

    input: list[Path]
    """Prefixes of the datasets, in order."""
    output_prefix: Path
    """Where the result goes: <output-prefix>.bin and .idx."""
    overwrite: bool = False
    """Replace a corpus that already exists under the output prefix."""


@dataclass(frozen=True)
class MergeSummary:
    prefix: Path
    documents: int
    tokens: int
    has_sidecar: bool
    """Whether all inputs have a sidecar (.meta), so that the output has one."""


def merge(config: MergeConfig) -> MergeSummary:
    """Write the joined dataset, byte for byte as Megatron's `IndexedDatasetBuilder.add_index` does.

    Every input is checked completely before anything is written, and the output gets its name when it is complete.
    It has a sidecar if all inputs have one, and a loss mask if any has one: of the others, all tokens count. Errors:
    ValueError for damaged inputs, inputs of different types or tokenizers, and an output that is an input or (without
    --overwrite) already exists; OSError for files that are missing or cannot be written.
    """
    if not config.input:
        raise ValueError("--input: give at least one prefix")
    output = config.output_prefix
    if not output.name or not output.parent.is_dir():
        raise ValueError(f"--output-prefix {output}: must name a file in a folder that exists")
    dtype = IndexedDataset(config.input[0]).dtype
    sidecar, everywhere = common_sidecar(_checked(config, dtype), "--input")
    masked = any(with_suffix(prefix, MASK).exists() for prefix in config.input)
    if exists(output) and not config.overwrite:
        raise ValueError(f"--output-prefix {output}: already exists; give another name, or --overwrite to replace it")
    with IndexedDatasetWriter(output, dtype, masked=masked) as writer:
        for prefix in config.input:
            writer.add_dataset(IndexedDataset(prefix))
        if sidecar is not None and everywhere:
            merged = dataclasses.replace(
                sidecar,
                output_prefix=output.name,
                documents=writer.num_documents,
                tokens=writer.num_tokens,
                mask=masked,
            )
            writer.meta = merged.to_json()
    return MergeSummary(output, writer.num_documents, writer.num_tokens, writer.meta is not None)


def _checked(config: MergeConfig, dtype: np.dtype[Any]) -> Iterator[IndexedDataset]:
    """Open every input, but one at a time: thousands would be more files than a process may hold open."""
    for prefix in config.input:
        dataset = IndexedDataset(prefix)
        if files_of(prefix) == files_of(config.output_prefix):
            raise ValueError(f"--output-prefix {config.output_prefix}: is also an --input; give another name")
        if dataset.dtype != dtype:
            raise ValueError(
                f"--input {prefix}: holds {dataset.dtype.name}, but {config.input[0]} holds {dtype.name}; "
                "only datasets of one token type can be merged"
            )
        yield dataset
