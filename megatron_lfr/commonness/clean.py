"""Cleans a corpus by what `megatron-lfr commonness` knows of it: near copies but one, and what is least like text."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.commonness.items import reference_prefixes
from megatron_lfr.data.corpus.blocks import open_prefixes
from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.data.corpus.sidecar import read_sidecar
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.fileio import new_folder

KEPT = "kept_documents.npy"
"""In the folder of the cleaned corpus: numbers of the documents that it keeps, counted over all documents of all
prefixes."""


def cleaned_prefixes(data_path: Sequence[str], folder: Path, flag: str = "--data-path") -> list[Path]:
    """Return the prefixes that the cleaned corpus in `folder` has. ValueError where two have one name."""
    names = [Path(prefix).name for prefix in data_path]
    if len(set(names)) < len(names):
        raise ValueError(f"{flag}: prefixes that are cleaned need different names, not {', '.join(names)}")
    return [folder / name for name in names]


def clean(commonness: Path, data_path: Sequence[str], folder: Path, rules: Mapping[str, Any]) -> dict[str, Any]:
    """Write the training documents that the rules keep as a corpus into `folder`, all at once. A prefix of which less
    than a block is left is not there, since no run could train on it.

    rules: near_copies: keep the first of each cluster of near copies (by default); junk: drop what commonness gives no
    weight (by default), and by both its near copies. Returns counts for the JSON. ValueError where no prefix is left.
    """
    representative = np.load(commonness / "document_representative.npy", allow_pickle=False)
    keep: npt.NDArray[np.bool_] = np.ones(len(representative), np.bool_)
    if rules.get("near_copies", True):
        keep &= representative == np.arange(len(representative))
    if rules.get("junk", True):
        keep &= np.load(commonness / "document_weight.npy", allow_pickle=False) > 0
    summary = json.loads((commonness / "commonness.json").read_bytes())
    starts, seq_length = summary["document_starts"], summary["settings"]["seq_length"]
    chosen = [np.flatnonzero(keep[first:last]) for first, last in itertools.pairwise(starts)]
    written = write_documents(data_path, chosen, folder, seq_length + 1)
    if not written:
        raise ValueError(f"{commonness}: cleaning leaves less than a block of {seq_length} tokens of each prefix")
    is_written = [str(prefix) in written for prefix in cleaned_prefixes(data_path, folder)]
    return {
        "flops": 0.0,
        "documents": len(keep),
        "kept_documents": sum(len(part) for part in itertools.compress(chosen, is_written)),
        "kept_tokens": sum(written.values()),
        "left_out": [prefix for prefix, has_text in zip(data_path, is_written, strict=True) if not has_text],
    }


def write_documents(
    data_path: Sequence[str], chosen: Sequence[npt.NDArray[np.int64]], folder: Path, least_tokens: int = 1
) -> dict[str, int]:
    """Write documents as a corpus of the same prefixes into a new folder, all at once, with their numbers in KEPT.

    chosen: of each prefix, the numbers of its documents, in order. least_tokens: a prefix that would have fewer is left
    out. Returns the tokens of each new prefix. Where there is none, there is no folder.
    """
    prefixes, kept, before, written = cleaned_prefixes(data_path, folder), [], 0, {}
    datasets = open_prefixes(data_path)
    lengths = [np.diff(prefix.offsets) for prefix in reference_prefixes(datasets)]
    large_enough = [of[part].sum() >= least_tokens for of, part in zip(lengths, chosen, strict=True)]
    if not any(large_enough):
        return {}
    with new_folder(folder) as aside:
        for prefix, dataset, documents, is_written in zip(prefixes, datasets, chosen, large_enough, strict=True):
            if is_written:
                written[str(prefix)] = _write_prefix(aside / prefix.name, dataset, documents)
                kept.append(before + documents)
            before += dataset.num_documents
        np.save(aside / KEPT, np.concatenate(kept), allow_pickle=False)
    return written


def _write_prefix(prefix: Path, dataset: IndexedDataset, documents: npt.NDArray[np.int64]) -> int:
    """Write some documents of a dataset as a new one, and return its tokens."""
    with IndexedDatasetWriter(prefix, dataset.dtype, masked=dataset.mask is not None) as writer:
        for document in documents.tolist():
            writer.add_document(dataset.document(document), dataset.mask_of(document))
        if sidecar := read_sidecar(dataset):
            size, length = writer.num_documents, writer.num_tokens
            writer.meta = dataclasses.replace(sidecar, documents=size, tokens=length).to_json()
        return writer.num_tokens
