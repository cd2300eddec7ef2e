"""Process groups of a single rank, and layers that see no other rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from megatron_lfr.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    initialize,
    shutdown,
)
from megatron_lfr.parallel.layers import init_normal


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    shutdown()
    yield
    shutdown()


def test_one_rank_needs_no_launcher_and_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    state = initialize("gloo")
    assert dist.get_world_size() == dist.get_world_size(state.tensor_group) == 1
    assert dist.get_world_size(state.data_group) == 1
    assert state.device == torch.device("cpu")
    assert initialize("gloo") is state
    total = torch.ones(3)
    dist.all_reduce(total, group=state.tensor_group)
    assert total.tolist() == [1.0, 1.0, 1.0]
    shutdown()
    assert not dist.is_initialized()
    assert initialize("gloo") is not state


def test_the_launcher_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match="MASTER_PORT"):
        initialize("gloo")


def test_sizes_that_do_not_exist_are_refused() -> None:
    for size in (0, 2):
        with pytest.raises(ValueError, match=f"--tensor-model-parallel-size {size}: must divide the 1 ranks"):
            initialize("gloo", tensor_model_parallel_size=size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_nccl_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="--distributed-backend nccl"):
        initialize("nccl")


def test_layers_on_one_rank_are_plain_layers() -> None:
    group = initialize("gloo").tensor_group
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    for own_group in (group, None):
        column, row = ColumnParallelLinear(8, 6, own_group, stack=2), RowParallelLinear(8, 5, own_group)
        column.init_normal("column", 1, 1.0)
        row.init_normal("row", 1, 1.0)
        y = column(x)
        torch.testing.assert_close(y[..., :6], F.linear(x, column.weight[0]))
        torch.testing.assert_close(y[..., 6:], F.linear(x, column.weight[1]))
        assert torch.equal(row(x), F.linear(x, row.weight))
        embedding = VocabParallelEmbedding(5, 8, own_group, padded_size=8)
        embedding.init_normal("embedding", 1, 1.0)
        assert torch.equal(embedding(torch.tensor([[4, 0]])), embedding.weight[[4, 0]][None])


def test_weights_are_cast_where_they_are_used() -> None:
    layer = ColumnParallelLinear(8, 6, None)
    layer.init_normal("layer", 1, 1.0)
    y = layer(torch.randn(4, 8).bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32


def test_full_weights_are_checked_and_padded() -> None:
    embedding = VocabParallelEmbedding(5, 8, None, padded_size=8)
    with torch.no_grad():
        embedding.weight.fill_(7.0)
    embedding.load_full(torch.ones(5, 8))
    assert embedding.weight.sum(1).tolist() == [8.0] * 5 + [0.0] * 3
    with pytest.raises(ValueError, match=r"expected a weight of shape \(5, 8\), got \(8, 8\)"):
        embedding.load_full(torch.ones(8, 8))
    with pytest.raises(ValueError, match="does not spread"):
        VocabParallelEmbedding(5, 8, None, padded_size=4)


def test_initial_values_depend_on_seed_and_name() -> None:
    one = init_normal("a", (64, 64), 1, 0.5)
    assert torch.equal(one, init_normal("a", (64, 64), 1, 0.5))
    assert not torch.equal(one, init_normal("b", (64, 64), 1, 0.5))
    assert not torch.equal(one, init_normal("a", (64, 64), 2, 0.5))
    assert one.std().item() == pytest.approx(0.5, rel=0.05)
