"""The process groups of a run, of the ranks that a launcher has started or of this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from megatron_lfr.parallel.config import ParallelConfig
from megatron_lfr.parallel.launchers import LAUNCHERS, Launch, adopt_launcher
from megatron_lfr.parallel.mesh import make_mesh, make_subgroup, rank_grid
from megatron_lfr.parallel.rendezvous import agree_on_session, connect

Backend = Literal["auto", "nccl", "gloo"]


@dataclass(frozen=True)
class ParallelState:
    """The process groups of this rank, and its position in them.

    Ranks are numbered as in Megatron: tensor-parallel ranks are neighbours, then come context, data and pipeline ranks.
    The mesh has the dimensions pipeline, replicate, tensor and shard: data-parallel ranks hold `replicate` copies of
    what is sharded over `shard` ranks. Context-parallel ranks are among the latter, as they hold the same weights and
    see other tokens.
    """

    config: ParallelConfig
    mesh: DeviceMesh
    device: torch.device
    """Device of this rank."""
    context_group: ProcessGroup | None
    """Ranks that share each sequence; None without context parallelism."""
    control_group: ProcessGroup
    """All ranks over gloo, for what is sent between the memories of hosts."""
    losses_group: ProcessGroup
    """All ranks, for the losses of blocks, which are sent while the next step computes."""
    timeout: timedelta
    """How long a rank waits for the others."""

    @property
    def tensor_group(self) -> ProcessGroup:
        """Ranks that share each layer's matrices."""
        return self.mesh.get_group("tensor")

    @property
    def pipeline_group(self) -> ProcessGroup:
        """Ranks that share the layers."""
        return self.mesh.get_group("pipeline")

    @property
    def data_parallel_size(self) -> int:
        """Number of shares that a step's blocks are divided into."""
        return self.config.data_parallel_size(dist.get_world_size())

    @property
    def data_rank(self) -> int:
        """Index of the share of a step's blocks that this rank sees."""
        inner = self.config.tensor_model_parallel_size * self.config.context_parallel_size
        return dist.get_rank() // inner % self.data_parallel_size

    @cached_property
    def storage_mesh(self) -> DeviceMesh:
        """Mesh (tensor, shard) of the ranks over which a weight of this pipeline stage is spread."""
        return self.mesh["tensor", "shard"]

    @cached_property
    def sharding_mesh(self) -> DeviceMesh:
        """Mesh for FSDP2: (replicate, shard), or only (shard) where there is one copy."""
        return self.mesh["replicate", "shard"] if self.mesh["replicate"].size() > 1 else self.mesh["shard"]

    @cached_property
    def reports_losses(self) -> bool:
        """Whether this rank reports the losses of its blocks: of all ranks that compute the same ones, only the
        first."""
        last = self.mesh.get_local_rank("pipeline") == self.mesh["pipeline"].size() - 1
        return last and self.mesh.get_local_rank("tensor") == 0


_state: ParallelState | None = None
_session = ""
_shared: Store | None = None
"""The store through which the ranks of a launcher meet. Rank 0 may host it for ranks that end later, so it is kept
until the process ends."""


def session_store(timeout: timedelta) -> Store | None:
    """Open a new connection to the store of the running ranks; None where no launcher started them."""
    return PrefixStore(_session, connect(timeout)) if _session else None


def initialize(
    config: ParallelConfig | None = None,
    timeout: timedelta = timedelta(minutes=10),
) -> ParallelState:
    """Start torch.distributed with the ranks of the launcher, or with one rank where there is no launcher.

    A single rank keeps its store in memory, so that runs side by side never collide on a port. If torch.distributed is
    already running in this process, it is used, with the timeout of its default group. Raises ValueError where the
    backend or the sizes do not fit.
    """
    global _session, _shared, _state
    config, launch = config or ParallelConfig(), adopt_launcher()
    device = choose_device(config.distributed_backend, launch)
    if not dist.is_initialized():
        _state = None
        name = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        rank, world_size = launch.rank, launch.world_size
        store: Store = HashStore()
        if launch.launcher is not None:
            _shared = connect(timeout)
            _session = agree_on_session(_shared, rank, world_size, timeout)
            store = PrefixStore(_session, _shared)
        dist.init_process_group(name, store=store, rank=rank, world_size=world_size, timeout=timeout)
    config.validate(dist.get_world_size())
    if _state is None or (_state.config, _state.device, _state.timeout) != (config, device, timeout):
        _state = _make_state(config, device, timeout)
    return _state


def choose_device(backend: Backend, launch: Launch) -> torch.device:
    """Return the device of a rank, and make it PyTorch's current one. ValueError where there is none for the backend,
    or several ranks of a machine would get the same one."""
    use_cuda = torch.cuda.is_available() if backend == "auto" else backend == "nccl"
    if not use_cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--distributed-backend nccl: no CUDA device is here; choose gloo or auto")
    if launch.local_rank is None and launch.world_size > 1:  # else all ranks would take the first device
        raise ValueError(
            "LOCAL_RANK is not set, nor SLURM_LOCALID: which GPU is this rank's? Start ranks with "
            f"{LAUNCHERS}, or set LOCAL_RANK to the rank's number on its machine, from 0"
        )
    # A launcher may let each rank see only one device, whatever the rank's number.
    device = torch.device("cuda", (launch.local_rank or 0) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _make_state(config: ParallelConfig, device: torch.device, timeout: timedelta) -> ParallelState:
    world_size = dist.get_world_size()
    # The mesh comes before all other groups, so that the next run in this process has groups of the same names in it.
    mesh = make_mesh(device.type, rank_grid(config, world_size), timeout)
    context, tensor = config.context_parallel_size, config.tensor_model_parallel_size
    context_group = None
    if context > 1:
        rows = torch.arange(world_size).view(-1, context, tensor).transpose(1, 2).reshape(-1, context)
        context_group = make_subgroup(rows, timeout)
    control_group = dist.new_group(backend="gloo", timeout=timeout)
    losses_group = dist.new_group(timeout=timeout)
    return ParallelState(config, mesh, device, context_group, control_group, losses_group, timeout)


@contextmanager
def session() -> Iterator[None]:
    """Stop torch.distributed at the end of the block, if `initialize` starts it there.

    After an error, this rank aborts its groups without telling the others, which may be gone or wait for something
    else: an orderly shutdown takes all ranks.
    """
    if dist.is_initialized():  # whoever started it stops it
        yield
        return
    try:
        yield
    except BaseException:
        if dist.is_initialized():
            with suppress(RuntimeError):  # the first error is the one to report
                dist.distributed_c10d._abort_process_group()
        _forget()
        raise
    shutdown()


def shutdown() -> None:
    """Stop torch.distributed, if it runs. On a GPU this is collective, and waits for the work under way."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _forget()


def _forget() -> None:
    global _session, _state
    _session, _state = "", None
