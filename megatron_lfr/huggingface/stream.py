"""Writing a safetensors file one tensor at a time: its header, which comes first, needs only shapes and types.

The format is described in https://github.com/huggingface/safetensors#format. The library itself needs all tensors of a
file at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Entry:
    """Name, shape and type of a tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def into_shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Divide `entries`, in their order, into the fewest files of at most `max_bytes` of tensors each; a larger tensor
    gets a file of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


class SafetensorsStream:
    """A new file of `entries`, which are written in their order. The caller must sync it to the disk."""

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self._pending = list(reversed(entries))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for entry in entries:
            offsets = [position, position + entry.nbytes]
            header[entry.name] = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
            position = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors begin at a multiple of 8
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the tensor of the next entry, which must have its name, shape and type."""
        entry = self._pending.pop()
        if (entry.name, entry.shape, entry.dtype) != (name, tuple(tensor.shape), tensor.dtype):
            raise AssertionError(f"{entry} is next, not {name} {list(tensor.shape)} {tensor.dtype}")
        self._file.write(tensor.detach().contiguous().view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        if error is None and self._pending:
            raise AssertionError(f"{self._pending[-1].name} was not written")
