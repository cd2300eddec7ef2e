"""Ranges of flat buffers: as rectangles of a weight, and in checkpoints."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lfr.checkpoint.tensors import prepare_tensors, read_tensors, write_tensors
from megatron_lfr.parallel.flat_shard import FlatShard, rectangles

SHAPES = [(5, 4), (1, 7), (7, 1), (3, 3), (6,), (1,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rectangles_are_the_range_in_its_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(numbers.numel() + 1):
        for length in range(numbers.numel() - start + 1):
            parts = list(rectangles(start, length, shape))
            assert len(parts) <= 3
            parts = [
                numbers[tuple(slice(at, at + size) for at, size in zip(*rectangle, strict=True))].flatten()
                for rectangle in parts
            ]
            assert torch.cat([*parts, torch.empty(0, dtype=torch.int64)]).tolist() == [*range(start, start + length)]


def test_pieces_share_the_memory_of_the_range() -> None:
    flat = torch.arange(9.0)
    shard = FlatShard(flat, 3, (4, 4), (4, 8), (0, 4))
    assert shard.shape == (4, 8)
    assert [(at, piece.tolist()) for at, piece in shard.pieces.items()] == [
        ((0, 7), [[0.0]]),
        ((1, 4), [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]),
    ]
    shard.pieces[0, 7].fill_(-1)
    assert flat[0] == -1
    copied = shard.detach().copied()
    shard.pieces[0, 7].fill_(-2)
    assert copied.pieces[0, 7] == -1
    with pytest.raises(TypeError, match="computes nothing"):
        torch.neg(shard)


def write_as_ranks(folder: Path, shards: list[dict[str, Tensor]], copied: bool) -> None:
    """Write what several ranks hold, one after the other, into one folder."""
    folder.mkdir()
    for rank, tensors in enumerate(shards):
        mine = folder.with_name(f"of rank {rank}")
        mine.mkdir()
        for name in write_tensors(mine, prepare_tensors(tensors, copied=copied), None):
            (mine / name).rename(folder / f"{rank}-{name}")


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(("shape", "cuts"), [((5, 4), (0, 3, 14, 20)), ((3, 7), (0, 1, 20, 21)), ((7,), (0, 2, 7))])
def test_a_checkpoint_of_ranges_is_read_as_a_whole_and_in_other_ranges(
    shape: tuple[int, ...], cuts: tuple[int, ...], copied: bool, tmp_path: Path
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    flat = weight.flatten()
    shards: list[dict[str, Tensor]] = [
        {"w": FlatShard(flat[start:end].clone(), start, shape)} for start, end in pairwise(cuts)
    ]
    write_as_ranks(tmp_path / "checkpoint", shards, copied)
    full = torch.zeros(shape)
    read_tensors(tmp_path / "checkpoint", {"w": full}, allow_extra=False, group=None)
    assert full.equal(weight)
    for start, end in ((0, len(flat)), (2, len(flat) - 1), (3, 3)):
        part = torch.zeros(end - start)
        read_tensors(tmp_path / "checkpoint", {"w": FlatShard(part, start, shape)}, allow_extra=False, group=None)
        assert part.equal(flat[start:end])


def test_a_range_that_is_missing_is_noticed(tmp_path: Path) -> None:
    write_as_ranks(tmp_path / "checkpoint", [{"w": FlatShard(torch.ones(5), 3, (4, 4))}], copied=False)
    with pytest.raises(ValueError, match="of tensor w, 5 of 8 elements are there"):
        read_tensors(tmp_path / "checkpoint", {"w": torch.zeros(4, 4)}, allow_extra=False, group=None)
