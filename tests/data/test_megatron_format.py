"""Files of Megatron-core 0.16.1's IndexedDatasetBuilder are read, and written byte for byte.

The samples were made by `python tests/data/test_megatron_format.py` where megatron-core is installed; there, the last
test also lets Megatron read what is written here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from support.peers import peer

SAMPLES = Path(__file__).parent / "megatron_samples"
TYPES = ["uint8", "int8", "int16", "uint16", "int32", "int64"]


def documents(name: str) -> list[list[npt.NDArray[Any]]]:
    """Return a corpus with empty sequences and documents of several: for each document, its sequences."""
    rng = np.random.default_rng(7)
    limits = np.iinfo(np.dtype(name))
    shape = [[5], [1, 0, 3], [0], [2, 2], [7]]
    return [[rng.integers(0, limits.max, n, name, endpoint=True) for n in lengths] for lengths in shape]


@pytest.mark.parametrize("name", TYPES)
def test_megatrons_files_are_read(name: str) -> None:
    dataset = IndexedDataset(SAMPLES / name)
    expected = documents(name)
    assert dataset.dtype == np.dtype(name)
    assert dataset.num_documents == len(expected)
    for i, sequences in enumerate(expected):
        assert np.array_equal(dataset.document(i), np.concatenate(sequences))
    lengths = dataset.index.sequence_lengths(0, dataset.index.num_sequences).tolist()
    assert lengths == [len(sequence) for sequences in expected for sequence in sequences]


@pytest.mark.parametrize("name", TYPES)
def test_the_same_bytes_are_written(name: str, tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / name, name) as writer:
        for sequences in documents(name):
            writer.add_document(sequences)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / name).with_suffix(suffix).read_bytes() == (SAMPLES / name).with_suffix(suffix).read_bytes()


@pytest.mark.parametrize("name", TYPES)
def test_megatron_reads_our_files(name: str, tmp_path: Path) -> None:
    indexed_dataset = peer("megatron.core.datasets.indexed_dataset")
    with IndexedDatasetWriter(tmp_path / name, name) as writer:
        for sequences in documents(name):
            writer.add_document(sequences)
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / name))
    flat = [sequence for sequences in documents(name) for sequence in sequences]
    assert len(theirs) == len(flat)
    assert all(np.array_equal(theirs[i], sequence) for i, sequence in enumerate(flat))
    assert theirs.document_indices.tolist() == np.cumsum([0, *map(len, documents(name))]).tolist()


def write_samples() -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # type: ignore[import-not-found]

    for name in TYPES:
        builder = IndexedDatasetBuilder(str((SAMPLES / name).with_suffix(".bin")), dtype=np.dtype(name).type)
        for sequences in documents(name):
            tokens = np.concatenate(sequences).astype(np.int64)  # torch has not all of the types
            builder.add_document(torch.from_numpy(tokens), [len(sequence) for sequence in sequences])
        builder.finalize(str((SAMPLES / name).with_suffix(".idx")))


if __name__ == "__main__":
    write_samples()
