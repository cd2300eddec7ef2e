"""A weight of which this rank holds a range of a flat buffer, as rectangles of the weight.

An optimizer that cuts all weights of a group into one flat buffer leaves a rank with a range of a matrix, which begins
and ends anywhere in a row. Such a range is at most three rectangles: the rest of a row, whole rows, the beginning of a
row. torch.distributed.checkpoint writes and reads rectangles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


def rectangles(start: int, length: int, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offsets, sizes) of the rectangles that elements start ... start + length of a row-major tensor of `shape`
    (one or two dimensions) consist of, in their order."""
    if len(shape) == 1:
        if length:
            yield (start,), (length,)
        return
    columns, end = shape[1], start + length
    while start < end:
        row, column = divmod(start, columns)
        rows = (end - start) // columns if column == 0 else 0
        size = (rows, columns) if rows else (1, min(columns - column, end - start))
        yield (row, column), size
        start += math.prod(size)


class FlatShard(torch.Tensor):
    """A tensor of the weight's full shape; its values are those of `flat`, which it shares memory with, and other ranks
    hold the rest. It is written to and read from checkpoints, and computes nothing.

    flat: elements start ... start + len(flat) of this rank's slice of the weight, in row-major order: 1-D.
    local_shape: the slice's shape, of one or two dimensions. full_shape: the weight's. origin: where the slice begins
    in it, by default in its corner.
    """

    flat: Tensor
    pieces: dict[tuple[int, ...], Tensor]
    """Views of `flat`, by their offsets in the weight."""

    @staticmethod
    def __new__(
        cls,
        flat: Tensor,
        start: int,
        local_shape: Sequence[int],
        full_shape: Sequence[int] | None = None,
        origin: Sequence[int] | None = None,
    ) -> FlatShard:
        full_shape, origin = tuple(full_shape or local_shape), tuple(origin or (0,) * len(local_shape))
        shard: FlatShard = torch.Tensor._make_wrapper_subclass(cls, full_shape, dtype=flat.dtype, device=flat.device)
        shard.flat, shard.pieces, used = flat, {}, 0
        for offsets, sizes in rectangles(start, flat.numel(), local_shape):
            count = math.prod(sizes)
            where = tuple(first + offset for first, offset in zip(origin, offsets, strict=True))
            shard.pieces[where] = flat[used : used + count].view(sizes)
            used += count
        shard._arguments = (start, tuple(local_shape), full_shape, origin)
        return shard

    _arguments: tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    def copied(self) -> FlatShard:
        """Return the same part in new host memory."""
        return FlatShard(self.flat.to("cpu", copy=True), *self._arguments)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            shard = args[0]
            return FlatShard(shard.flat, *shard._arguments)
        raise TypeError(f"{func}: a FlatShard holds a part of a tensor, and computes nothing")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FlatShard(of {tuple(self.shape)}: {[(at, tuple(p.shape)) for at, p in self.pieces.items()]})"

    # What torch.distributed.checkpoint asks of a tensor that ranks hold parts of.

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.flat)
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(chunk.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), piece.shape) for at, piece in self.pieces.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.pieces[tuple(index.offset)]
