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

from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.corpus.sidecar import read_sidecar
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.fileio import new_folder

KEPT = "kept_documents.npy"
"""In the folder of the cleaned corpus: numbers of the documents that it keeps, counted over all documents of all
prefixes."""


def cleaned_prefixes(data_path: Sequence[str], folder: Path) -> list[Path]:
    """Return the prefixes that the cleaned corpus in `folder` has. ValueError where two have one name."""
    names = [Path(prefix).name for prefix in data_path]
    if len(set(names)) < len(names):
        raise ValueError(f"--data-path: prefixes that are cleaned need different names, not {', '.join(names)}")
    return [folder / name for name in names]


def clean(
    commonness: Path, data_path: Sequence[str], split: str, folder: Path, rules: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the training documents that the rules keep as a corpus into `folder`, all at once.

    rules: near_copies: keep one of each cluster of near copies (by default); junk: drop what commonness gives no weight
    (by default). Returns counts for the JSON.
    """
    representative = np.load(commonness / "document_representative.npy", allow_pickle=False)
    keep: npt.NDArray[np.bool_] = np.ones(len(representative), np.bool_)
    if rules.get("near_copies", True):
        keep &= representative == np.arange(len(representative))
    if rules.get("junk", True):
        keep &= np.load(commonness / "document_weight.npy", allow_pickle=False) > 0
    starts = json.loads((commonness / "commonness.json").read_bytes())["document_starts"]
    chosen = [np.flatnonzero(keep[first:last]) for first, last in itertools.pairwise(starts)]
    tokens = write_documents(data_path, split, chosen, folder)
    return {"flops": 0.0, "documents": len(keep), "kept_documents": int(keep.sum()), "kept_tokens": tokens}


def write_documents(data_path: Sequence[str], split: str, chosen: Sequence[npt.NDArray[np.int64]], folder: Path) -> int:
    """Write documents as a corpus of the same prefixes into a new folder, all at once, with their numbers in KEPT.

    chosen: of each prefix, the numbers of its documents, in order. Returns the number of tokens.
    """
    prefixes, kept, before, tokens = cleaned_prefixes(data_path, folder), [], 0, 0
    with new_folder(folder) as aside:
        for prefix, dataset, documents in zip(
            prefixes, BlockDataset(data_path, 1, split).datasets, chosen, strict=True
        ):
            masked = dataset.mask is not None
            with IndexedDatasetWriter(aside / prefix.name, dataset.dtype, masked=masked) as writer:
                for document in documents.tolist():
                    writer.add_document(dataset.document(document), dataset.mask_of(document))
                if sidecar := read_sidecar(dataset):
                    size, length = writer.num_documents, writer.num_tokens
                    writer.meta = dataclasses.replace(sidecar, documents=size, tokens=length).to_json()
                tokens += writer.num_tokens
            kept.append(before + documents)
            before += dataset.num_documents
        np.save(aside / KEPT, np.concatenate(kept), allow_pickle=False)
    return tokens
