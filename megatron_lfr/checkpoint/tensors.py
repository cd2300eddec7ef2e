"""A checkpoint's tensors, written and read by torch.distributed.checkpoint as safetensors.

Each rank writes the shards it holds. A run of any number of ranks can read them: each rank takes the parts it needs.
Only tensors are ever written or read, as DCP pickles anything else.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from megatron_lfr.fileio import describe
from megatron_lfr.parallel import ranks
from megatron_lfr.parallel.flat_shard import FlatShard


class _Writer(HuggingFaceStorageWriter):
    """A writer that remembers which files this rank has written, as the listing of a folder can lag behind on a network
    file system."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.file_names: set[str] = set()

    def _split_by_storage_plan(
        self, storage_plan: dict[str, int] | None, items: list[WriteItem]
    ) -> dict[int, list[WriteItem]]:
        """Spread the pieces of a tensor on this rank over files, as a file holds a name once."""
        files: dict[int, list[WriteItem]] = {1: []}
        seen: Counter[str] = Counter()
        for item in items:
            seen[item.index.fqn] += 1
            files.setdefault(seen[item.index.fqn], []).append(item)
        return files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = super().write_data(plan, planner)
        self.file_names |= {result.storage_data.relative_path for result in written.value()}
        return written


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Check that all entries are tensors with values; ValueError names the first that is not."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; only tensors are stored here")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: it has no values")
        if name in ("", "__metadata__"):
            raise ValueError(f"{name!r} is not a name that a tensor can have in a safetensors file")


def prepare_tensors(tensors: Mapping[str, Tensor], *, copied: bool) -> dict[str, Tensor]:
    """Return `tensors` as safetensors requires them: contiguous, and no two share memory, so tied weights are written
    twice.

    `copied`: copy all of them into new host memory. DTensors stay DTensors.
    """
    seen: set[int] = set()
    prepared: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, FlatShard):  # the writer copies its pieces one by one
            prepared[name] = tensor.copied() if copied else tensor
            continue
        ready = _at_least_1d(tensor)
        if copied:
            ready = ready.to("cpu", copy=True, memory_format=torch.contiguous_format)
        ready = ready.contiguous()
        local = ready.to_local() if isinstance(ready, DTensor) else ready
        if local.device.type == "cpu":  # elsewhere, DCP copies each tensor to the host on its own
            memory = local.untyped_storage().data_ptr()
            if memory in seen and local.numel() > 0:
                ready = ready.clone()
            seen.add(memory)
        prepared[name] = ready
    return prepared


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: ProcessGroup | None) -> list[str]:
    """Write what `prepare_tensors` returned into `folder`. Collective over `group`; returns the names of the files that
    this rank has written.

    A plain tensor that several ranks hold is written by one of them; a DTensor is written in shards. Raises OSError
    where a file cannot be written.
    """
    writer = _Writer(folder)
    no_dist = not torch.distributed.is_initialized()
    try:
        save(tensors, storage_writer=writer, process_group=group, no_dist=no_dist)
    except CheckpointException as error:
        raise _cause(error, ranks.world_size(group)) from error
    return sorted(writer.file_names)


def read_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    allow_extra: bool,
    group: ProcessGroup | None,
    rounds: bool = False,
) -> None:
    """Overwrite `tensors` in place with those stored under their names. Collective over `group`.

    Raises ValueError that names the first tensor that is missing on either side, or differs in shape or type, or a file
    that is not valid. `allow_extra`: the folder may hold tensors that no rank needs. `rounds`: tensors in bf16 may be
    stored in fp32.
    """
    reader = HuggingFaceStorageReader(str(folder))
    with ranks.failing_together(group):
        check_tensors(tensors)
        targets = {name: _at_least_1d(tensor) for name, tensor in tensors.items()}
        stored = _read_shapes(folder, reader)
        for name, tensor in targets.items():
            is_rounded = rounds and tensor.dtype == torch.bfloat16
            expected = torch.empty(tensor.shape, dtype=torch.float32, device="meta") if is_rounded else tensor
            _check_match(folder, name, expected, stored.get(name))
    needed: set[str] = set().union(*ranks.gather(set(targets), group))
    if not allow_extra and (extra := sorted(set(stored) - needed)):
        raise ValueError(f"{folder}: holds the tensor {extra[0]}, which is unknown here")
    no_dist = not torch.distributed.is_initialized()
    try:
        load(dict(targets), storage_reader=reader, process_group=group, no_dist=no_dist)
    except CheckpointException as error:
        raise _cause(error, ranks.world_size(group)) from error


class StoredTensors:
    """The tensors in a checkpoint's folder, which one process reads unsharded and one at a time.

    Raises ValueError for files that are not valid.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._reader = folder, _Reader(str(folder))
        self._stored = _read_shapes(folder, self._reader)

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Read the tensor `name`; ValueError where it is missing, or is not of this shape and type."""
        self.check(name, shape, dtype)
        tensor = torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            try:
                load({name: _at_least_1d(tensor)}, storage_reader=self._reader, no_dist=True)
            except CheckpointException as error:
                raise _cause(error, world_size=1) from error
        return tensor

    def check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        """Raise the ValueError that `read` would raise, without reading the tensor."""
        _check_match(self._folder, name, torch.empty(shape, dtype=dtype, device="meta"), self._stored.get(name))


class _Reader(HuggingFaceStorageReader):
    """A reader that reads the headers of the files once, not again for every tensor."""

    _metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        self._metadata = self._metadata or super().read_metadata()
        return self._metadata


def _read_shapes(folder: Path, reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    """Read the names, types and shapes of the stored tensors from the headers of the files."""
    try:
        metadata: Metadata = reader.read_metadata()
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{folder}: not a checkpoint's safetensors ({error!r})") from error
    shapes = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)  # the reader makes no other
        held = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
        if held != math.prod(tensor.size):  # DCP would leave the rest as it was
            raise ValueError(
                f"{folder}: of tensor {name}, {held} of {math.prod(tensor.size)} elements are there; a shard is missing"
            )
        shapes[name] = tensor
    return shapes


def _check_match(folder: Path, name: str, tensor: Tensor, stored: TensorStorageMetadata | None) -> None:
    if stored is None:
        raise ValueError(f"{folder}: holds no tensor {name}; another model, or another optimizer?")
    if stored.size != tensor.shape or stored.properties.dtype != tensor.dtype:
        raise ValueError(
            f"{folder}: tensor {name} is {stored.properties.dtype} {list(stored.size)}, "
            f"here it is {tensor.dtype} {list(tensor.shape)}"
        )


def _at_least_1d(tensor: Tensor) -> Tensor:
    """Return a view with at least one dimension, which the safetensors reader needs to slice it."""
    return tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()


def _cause(failure: CheckpointException, world_size: int) -> Exception:
    """Turn DCP's error, which is not an Exception, into that of the lowest rank that failed."""
    at_rank, (cause, _) = min(failure.failures.items(), key=lambda item: item[0])
    text = f"rank {at_rank}: {describe(cause)}" if world_size > 1 else describe(cause)
    if isinstance(cause, OSError):
        return OSError(cause.errno, text)
    return ValueError(text) if isinstance(cause, ValueError | SafetensorError) else RuntimeError(text)
