"""Files that travel between hosts which do not share a file system, over a group whose backend takes host memory."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lfr.parallel import ranks

_CHUNK_BYTES = 64 * 2**20


def broadcast_file(path: Path, size: int, writes: bool, group: ProcessGroup | None) -> None:
    """Write rank 0's file of `size` bytes under the same path on the ranks with `writes`. Collective; raises OSError on
    all ranks where one cannot read or write it."""
    is_source = ranks.rank(group) == 0
    with ranks.failing_together(group):
        file = FileIO(path, "rb" if is_source else "wb") if is_source or writes else None
    with ranks.failing_together(group):
        failure: OSError | None = None
        for chunk in _chunks(size):
            if is_source and file is not None and failure is None:
                failure = _try_read(file, chunk)
            dist.broadcast(chunk, group_src=0, group=group)
            if file is not None and not is_source and failure is None:
                failure = _try_write(file, chunk)
        if file is not None:
            file.close()
        if failure is not None:
            raise failure


def send_to_first_rank(path: Path, source: int, group: ProcessGroup | None) -> None:
    """Write the file that rank `source` has under `path` on rank 0. Collective; errors as for `broadcast_file`."""
    rank = ranks.rank(group)
    # A network's file system may show rank 0 a file of another host late: writing in its place would cut that short.
    aside = path.with_name(f"{path.name}.part")
    with ranks.failing_together(group):
        file = None
        if rank in (0, source):
            file = FileIO(path, "rb") if rank == source else FileIO(aside, "wb")
    with ranks.failing_together(group):
        if file is None:
            return
        failure: OSError | None = None
        size = torch.tensor([path.stat().st_size if rank == source else 0])
        _pass_on(size, rank, source, group)
        for chunk in _chunks(int(size.item())):
            if rank == source and failure is None:
                failure = _try_read(file, chunk)
            _pass_on(chunk, rank, source, group)
            if rank == 0 and failure is None:
                failure = _try_write(file, chunk)
        if rank == 0 and failure is None:
            os.fsync(file.fileno())
            aside.replace(path)
        file.close()
        if failure is not None:
            raise failure


def _chunks(size: int) -> list[Tensor]:
    """Return one buffer again and again, cut for the last chunk."""
    buffer = torch.empty(min(_CHUNK_BYTES, size), dtype=torch.uint8)
    return [buffer[: min(_CHUNK_BYTES, size - first)] for first in range(0, size, _CHUNK_BYTES)]


def _pass_on(tensor: Tensor, rank: int, source: int, group: ProcessGroup | None) -> None:
    if rank == source:
        dist.send(tensor, group_dst=0, group=group)
    else:
        dist.recv(tensor, group_src=source, group=group)


def _try_read(file: FileIO, chunk: Tensor) -> OSError | None:
    """Read a chunk. An error is returned, as the other chunks have to be sent before it can be raised."""
    rest = memoryview(chunk.numpy().data)
    try:
        while rest:
            count = file.readinto(rest)
            if not count:
                return OSError(f"{file.name!s}: has become shorter while it was read")
            rest = rest[count:]
    except OSError as error:
        return error
    return None


def _try_write(file: FileIO, chunk: Tensor) -> OSError | None:
    """Write a chunk. An error is returned, as the other chunks have to be taken before it can be raised."""
    rest = memoryview(chunk.numpy().data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        return error
    return None
