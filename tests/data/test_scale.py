"""Corpora may have a size that no test could write: ten trillion tokens in a hole, and a thousand prefixes."""

from __future__ import annotations

import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.lfr import preset

SEQ = 2047
LONGEST = 2**31 - 1
"""Tokens of a sequence that the format can hold."""


def write_holes(prefix: Path, lengths: list[int]) -> None:
    """Write one byte a token and one sequence a document; all tokens are 0, in a .bin that takes no space."""
    ends = np.cumsum(lengths, dtype=np.int64)
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 1, len(lengths), len(lengths) + 1)
        + np.array(lengths, "<i4").tobytes()
        + np.concatenate(([0], ends[:-1])).astype("<i8").tobytes()
        + np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    )
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(int(ends[-1]))


def test_ten_trillion_tokens(tmp_path: Path) -> None:
    """Block ids go beyond 2^32 and positions beyond 10^13, across two prefixes."""
    lengths = [LONGEST] * 2500
    for name in ("a", "b"):
        try:
            write_holes(tmp_path / name, lengths)
        except OSError as error:
            pytest.skip(f"this file system has no files of 5 TB: {error}")
    tokens = 2 * sum(lengths)
    assert tokens > 10**13
    last = (sum(lengths) - 1) // SEQ - 1  # the last block of a prefix
    with (tmp_path / "b.bin").open("r+b") as file:
        file.seek(last * SEQ)
        file.write(bytes(range(1, 250)))
    source = BlockDataset([tmp_path / "a", tmp_path / "b"], SEQ, "1").train
    per_prefix = (sum(lengths) - 1) // SEQ
    assert source.num_blocks == 2 * per_prefix > 2**32
    rows = source.read([source.num_blocks - 1, per_prefix - 1, per_prefix, -1])
    assert rows[0, :250].tolist() == [*range(1, 250), 0]
    assert not rows[1:].any()
    assert source.domain_of([per_prefix - 1, per_prefix, source.num_blocks - 1]).tolist() == [0, 1, 1]
    assert source.documents_of(source.num_blocks - 1) == [2499]
    assert source.documents_of(per_prefix + LONGEST // SEQ) == [0, 1]  # the block that crosses into the next one
    plan = preset("lfr-v1").plan(source.num_blocks, SEQ, 1024)
    assert plan.total_samples == pytest.approx(4 * source.num_blocks, abs=4)
    assert plan.total_samples * SEQ > 2 * 10**13


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """Let the process open only some files more than it has open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 256
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_thousand_prefixes(tmp_path: Path, few_descriptors: int) -> None:
    """More prefixes than files that may be open: every block is there, whichever prefix it comes from."""
    prefixes = [tmp_path / f"part_{number:04d}_text_document" for number in range(1000)]
    for number, prefix in enumerate(prefixes):
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document(np.arange(number, number + 25))
    assert len(prefixes) > few_descriptors
    source = BlockDataset(prefixes, 8, "1").train
    assert (source.num_blocks, len(source.domains)) == (3000, 1000)
    ids = np.random.default_rng(0).permutation(3000)
    assert source.read(ids)[:, 0].tolist() == [block // 3 + block % 3 * 8 for block in ids]
