"""What was planted in a corpus, as shares of each block's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.commonness.items import reference_prefixes
from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource, split_documents
from megatron_lfr.fileio import map_array

Shares = npt.NDArray[np.float64]


def read_labels(file: Path, kinds: Sequence[str]) -> npt.NDArray[np.int64]:
    """Read labels as indices of `kinds` [n]: an .npy of integers, or a name a line. ValueError names what is none."""
    if file.suffix == ".npy":
        try:
            labels = map_array(file)
        except ValueError as error:
            raise ValueError(f"{file}: is no .npy, cut short, damaged or of objects ({error}); make it again") from None
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"{file}: expected integers in one dimension, not {labels.dtype} {list(labels.shape)}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(kinds):
            raise ValueError(f"{file}: labels go from {labels.min()} to {labels.max()}; there are {len(kinds)} kinds")
        return np.asarray(labels, np.int64)
    numbers = {name: number for number, name in enumerate(kinds)}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 ({error})") from None
    unknown = next((line for line in lines if line not in numbers), None)
    if unknown is not None:
        raise ValueError(f"{file}: unknown kind {unknown!r}; the study names {', '.join(kinds)}")
    return np.array([numbers[line] for line in lines], np.int64)


def kinds_of_blocks(labels: Mapping[str, Any], data_path: Sequence[str], source: BlockSource, split: str) -> Shares:
    """Return the share of each block's labels that are of each kind, [num_blocks, kinds].

    labels: file, of and kinds, as in STUDY.yaml; optionally `kept`, .npy with the documents that a cleaned corpus keeps
    of those that are labelled. source: the training blocks of the corpus `data_path`. ValueError where the labels are
    not as many as the documents, over all prefixes, or as the training blocks.
    """
    kinds, file = list(labels["kinds"]), Path(labels["file"])
    given = read_labels(file, kinds)
    if labels["of"] == "blocks":
        _check_count(file, given, source.num_blocks, "training blocks")
        return np.eye(len(kinds))[given]
    if "kept" in labels:
        given = given[map_array(Path(labels["kept"]))]
    corpus = BlockDataset(data_path, source.seq_length, split)
    counts = [dataset.num_documents for dataset in corpus.datasets]
    _check_count(file, given, sum(counts), f"documents in {' '.join(data_path)}")
    shares, first = [np.zeros((0, len(kinds)))], 0
    for number, (dataset, prefix) in enumerate(zip(corpus.datasets, reference_prefixes(corpus.datasets), strict=True)):
        documents = split_documents(dataset.num_documents, corpus.split)[1]
        offsets = prefix.offsets[: documents + 1]
        firsts = source.token_starts(number) + 1
        one_hot = np.eye(len(kinds))[given[first : first + documents]] * np.diff(offsets)[:, None]
        running = np.concatenate((np.zeros((1, len(kinds))), np.cumsum(one_hot, axis=0)))
        before, after = (
            np.stack([_at(offsets, running[:, kind], edges) for kind in range(len(kinds))], axis=1)
            for edges in (firsts, firsts + source.seq_length)
        )
        shares.append((after - before) / source.seq_length)
        first += counts[number]
    return np.concatenate(shares)


def _at(offsets: npt.NDArray[np.int64], running: Shares, edges: npt.NDArray[np.int64]) -> Shares:
    """Return the tokens of a kind before each edge, given those before each document."""
    return np.interp(edges, offsets, running)


def _check_count(file: Path, labels: npt.NDArray[np.int64], expected: int, what: str) -> None:
    if len(labels) != expected:
        raise ValueError(f"{file}: holds {len(labels)} labels, but there are {expected} {what}")
