"""Process groups of a single rank, and layers that see no other rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.parallel import (
    ColumnParallelLinear,
    ParallelConfig,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
    groups,
    initialize,
    session,
    shutdown,
)
from megatron_lfr.parallel.collectives import all_gather_rows, all_gather_stacked, all_reduce_sum, reduce_scatter_rows
from megatron_lfr.parallel.config import ShardingStrategy
from megatron_lfr.parallel.counter_random import fill_normal
from megatron_lfr.parallel.launchers import read_launch
from megatron_lfr.parallel.layers import ShardedWeight
from megatron_lfr.parallel.mesh import make_mesh, rank_grid
from support import session_cases
from support.ports import free_port

GLOO = ParallelConfig(distributed_backend="gloo")
STRATEGIES: tuple[ShardingStrategy, ...] = ("no_shard", "optim", "optim_grads", "optim_grads_params")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    shutdown()
    yield
    shutdown()


@pytest.fixture
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_launcher")
def test_one_rank_needs_no_launcher_and_no_port() -> None:
    state = initialize(GLOO)
    assert dist.get_world_size() == 1
    assert state.device == torch.device("cpu")
    assert initialize(GLOO) is state
    total = torch.ones(3)
    for group in (state.tensor_group, state.pipeline_group, state.control_group, state.losses_group):
        assert group.size() == 1
        dist.all_reduce(total, group=group)
    assert total.tolist() == [1.0, 1.0, 1.0]
    shutdown()
    assert not dist.is_initialized()
    assert initialize(GLOO) is not state


@pytest.mark.usefixtures("_no_launcher")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_mesh_of_one_rank(strategy: ShardingStrategy) -> None:
    state = initialize(ParallelConfig(distributed_backend="gloo", data_parallel_sharding_strategy=strategy))
    assert state.mesh.mesh_dim_names == ("pipeline", "replicate", "tensor", "shard")
    assert state.mesh.mesh.tolist() == [[[[0]]]]
    assert state.storage_mesh.mesh_dim_names == ("tensor", "shard")
    assert state.sharding_mesh.mesh_dim_names == ("shard",)
    assert state.context_group is None
    assert (state.data_parallel_size, state.data_rank) == (1, 0)
    assert state.reports_losses


@pytest.mark.usefixtures("_no_launcher")
def test_another_layout_makes_other_groups_of_the_same_ranks() -> None:
    state = initialize(GLOO)
    everyone = dist.group.WORLD
    other = initialize(ParallelConfig(distributed_backend="gloo", sequence_parallel=True))
    assert other is not state
    assert other.config.sequence_parallel
    assert dist.group.WORLD is everyone


def layouts(world_size: int) -> list[ParallelConfig]:
    """Every layout of `world_size` ranks that is legal."""
    configs = []
    sizes = itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2))
    for (tensor, pipeline, context, copies), strategy in itertools.product(sizes, STRATEGIES):
        config = ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
            num_distributed_optimizer_instances=copies,
            data_parallel_sharding_strategy=strategy,
        )
        try:
            config.validate(world_size)
        except ValueError:
            continue
        configs.append(config)
    return configs


def test_the_mesh_of_every_layout() -> None:
    """The groups and submeshes of one of 8 ranks, whose numbers follow from Megatron's order of ranks."""
    rank, world_size = 5, 8
    configs = layouts(world_size)
    assert len(configs) > 50
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    for config in configs:
        tensor, stages = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
        stage = world_size // stages  # ranks of one
        # Of the ranks of a stage that hold the same rows of a matrix, `shard` have different parts, in order.
        copies = stage // tensor if config.sharding == "no_shard" else config.num_distributed_optimizer_instances
        shard = stage // tensor // copies
        first = rank // stage * stage
        across = [first + rank % tensor + tensor * i for i in range(stage // tensor)]
        mine = across.index(rank)
        expected = {
            "tensor": list(range(rank // tensor * tensor, rank // tensor * tensor + tensor)),
            "pipeline": list(range(rank % stage, world_size, stage)),
            "shard": across[mine // shard * shard : mine // shard * shard + shard],
            "replicate": across[mine % shard :: shard],
        }
        mesh = make_mesh("cpu", rank_grid(config, world_size), timedelta(minutes=3))
        for name, ranks in expected.items():
            assert dist.get_process_group_ranks(mesh.get_group(name)) == ranks, (config, name)
            assert mesh[name].mesh.tolist() == ranks, (config, name)
        for outer, inner in (("tensor", "shard"), ("replicate", "shard")):
            both = mesh[outer, inner]
            assert both.shape == (len(expected[outer]), len(expected[inner])), (config, outer)
            assert both.get_group(inner) == mesh.get_group(inner)
            row = both.mesh[expected[outer].index(rank)]
            assert row.tolist() == expected[inner], (config, outer)


@pytest.mark.usefixtures("_no_launcher")
def test_every_group_has_the_timeout_that_is_asked_for(tmp_path: Path) -> None:
    timeout = timedelta(minutes=7)
    state = initialize(GLOO, timeout)
    CheckpointStore(tmp_path, keep=None, group=state.control_group, asynchronous=True, timeout=timeout)
    made = dist.distributed_c10d._world.pg_map
    assert len(made) == 4  # of one rank: the default group is the mesh's
    assert {group._get_backend(torch.device("cpu")).options._timeout for group in made} == {timeout}
    assert initialize(GLOO, timedelta(minutes=8)).timeout == timedelta(minutes=8)


@pytest.mark.usefixtures("_no_launcher")
def test_a_session_ends_what_it_started() -> None:
    with session():
        initialize(GLOO)
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=r"1 ranks \(WORLD_SIZE\) were started"), session():
        initialize(ParallelConfig(distributed_backend="gloo", tensor_model_parallel_size=2))
    assert not dist.is_initialized()
    state = initialize(GLOO)
    with session():
        assert initialize(GLOO) is state
    assert initialize(GLOO) is state  # someone else's


def test_sessions_follow_each_other_and_a_rank_that_fails_waits_for_none() -> None:
    port = free_port()
    mp.start_processes(session_cases.main, (port,), nprocs=2, start_method="forkserver")


@pytest.mark.usefixtures("_no_launcher")
def test_each_rank_of_a_machine_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    visible, chosen = 4, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("before the device is known"))

    def device(**environment: str) -> torch.device:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        return groups.choose_device("auto", read_launch({**meeting, **environment}))

    eight = {"RANK": "5", "WORLD_SIZE": "8"}
    assert device() == torch.device("cuda", 0)
    assert device(**eight, LOCAL_RANK="3", SLURM_LOCALID="1") == torch.device("cuda", 3)
    assert device(**eight, SLURM_LOCALID="2") == torch.device("cuda", 2)
    visible = 1  # srun --gpus-per-task=1: each rank sees its own device alone
    assert device(**eight, SLURM_LOCALID="2") == torch.device("cuda", 0)
    assert [entry.index for entry in chosen] == [0, 3, 2, 0]
    with pytest.raises(ValueError, match="LOCAL_RANK is not set"):
        device(**eight)


def test_the_launcher_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match="MASTER_PORT"):
        initialize(GLOO)


@pytest.mark.usefixtures("_no_launcher")
@pytest.mark.parametrize(
    ("size", "message"),
    [(0, "--tensor-model-parallel-size 0: must be at least 1"), (2, r"1 ranks \(WORLD_SIZE\) were started")],
)
def test_sizes_that_do_not_exist_are_refused(size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        initialize(ParallelConfig(distributed_backend="gloo", tensor_model_parallel_size=size))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_nccl_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="--distributed-backend nccl"):
        initialize(ParallelConfig(distributed_backend="nccl"))


def test_one_rank_communicates_nothing() -> None:
    x = torch.randn(4, 3)
    for group in (initialize(GLOO).tensor_group, None):
        assert all_gather_rows(x, group) is all_reduce_sum(x, group) is reduce_scatter_rows(x, group) is x
        assert torch.equal(all_gather_stacked(x, group), x[None])


def test_layers_on_one_rank_are_plain_layers() -> None:
    group = initialize(GLOO).tensor_group
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for tp in (TensorParallel(), TensorParallel(group), TensorParallel(group, sequence=True)):
        assert (tp.size, tp.rank) == (1, 0)
        column, row = ColumnParallelLinear(8, 6, tp), RowParallelLinear(8, 5, tp)
        column.init_normal("column", 1, 1.0)
        row.init_normal("row", 1, 1.0)
        assert torch.equal(column(tp.enter(x)), F.linear(x, column.weight))
        assert torch.equal(row(x), F.linear(x, row.weight))
        embedding = VocabParallelEmbedding(5, 8, tp, padded_size=8)
        embedding.init_normal("embedding", 1, 1.0)
        assert torch.equal(embedding(torch.tensor([4, 0])), embedding.weight[[4, 0]])


def test_weights_are_cast_where_they_are_used() -> None:
    layer = ColumnParallelLinear(8, 6, TensorParallel())
    layer.init_normal("layer", 1, 1.0)
    y = layer(torch.randn(4, 8).bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shard_dim", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_rank_draws_its_slice_of_the_initial_weight(ranks: int, shard_dim: int) -> None:
    shape = (13, 9)
    padded = -(-shape[shard_dim] // ranks) * ranks + 2 * ranks  # the last ranks hold nothing but padding
    parts = []
    for rank in range(ranks):
        tp: Any = SimpleNamespace(size=ranks, rank=rank)
        layer = ShardedWeight(shape, shard_dim, tp, padded)
        with torch.no_grad():
            layer.weight.fill_(7.0)
        layer.init_normal("layer.weight", 1, 0.5)
        parts.append(layer.weight.detach())
    joined = torch.cat(parts, shard_dim)
    expected = torch.empty(shape)
    fill_normal(expected, 0.5, seed=1, name="layer.weight")
    assert torch.equal(joined[:13, :9], expected)
    assert joined[13:].count_nonzero() == joined[:, 9:].count_nonzero() == 0
    assert joined.shape[shard_dim] == padded


def test_a_vocabulary_must_spread_over_the_ranks() -> None:
    with pytest.raises(ValueError, match="does not spread"):
        VocabParallelEmbedding(5, 8, TensorParallel(), padded_size=4)


def test_initial_weights_are_drawn_into_what_fsdp_holds() -> None:
    state = initialize(GLOO)
    layer = RowParallelLinear(8, 5, TensorParallel(state.tensor_group))
    fully_shard(layer, mesh=state.sharding_mesh)
    layer.init_normal("layer.weight", 1, 1.0)
    expected = torch.empty(5, 8)
    fill_normal(expected, 1.0, seed=1, name="layer.weight")
    assert isinstance(layer.weight, DTensor)
    assert torch.equal(layer.weight.full_tensor(), expected)
