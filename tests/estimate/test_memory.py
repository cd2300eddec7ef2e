"""The estimate of memory against what torch measures of the engine on the CPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

from megatron_lfr.estimate.activations import MicroBatch, logits_kept, stage_bytes
from megatron_lfr.estimate.memory import held_weights, micro_batches_in_flight, rank_memory
from megatron_lfr.model import Decoder, ModelConfig
from megatron_lfr.model.dropout import DropoutConfig
from megatron_lfr.model.lora import LoRAConfig, adapter_parameters
from megatron_lfr.model.presets import FAMILIES
from megatron_lfr.parallel import ParallelConfig
from megatron_lfr.parallel.pipeline import local_stages, make_stage
from support import rank_memory_cases
from support.measured import make_engine, sample, saved_bytes, step_peak
from support.ports import free_port

pytestmark = pytest.mark.usefixtures("ranks_of_a_file")
BASE = ModelConfig(
    num_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=160,
    vocab_size=500,
    max_position_embeddings=256,
)
SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one key a query": {"num_query_groups": 4},
    "one key for all": {"num_query_groups": 1},
    "heads wider than the model": {"kv_channels": 48, "ffn_hidden_size": 64},
    "untied": {"untie_embeddings_and_output_weights": True, "vocab_size": 1000},
    "deep": {"num_layers": 6, "vocab_size": 100},
    "capped logits": {"final_logit_softcapping": 30.0, "vocab_size": 2000},
}
FAMILY_SIZES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 500,
    "max_position_embeddings": 256,
}
DROPOUTS = [DropoutConfig(0.1, 0.0), DropoutConfig(0.0, 0.1), DropoutConfig(0.1, 0.1)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_ranks_weights_are_counted_for_every_family(family: str, ranks: int) -> None:
    sizes = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 500}
    model = dataclasses.replace(FAMILIES[family], **sizes)
    tp: Any = SimpleNamespace(size=ranks, rank=0, sequence=False, group=None)
    for stage in (make_stage(3), make_stage(3, 2, 0), make_stage(3, 2, 1)):
        with torch.device("meta"):
            decoder = Decoder(model, None, tp=tp, stage=stage)
        assert held_weights(model, [stage], ranks).total == sum(p.numel() for p in decoder.parameters())


def batch_of(shape: str, **settings: Any) -> MicroBatch:
    return MicroBatch(dataclasses.replace(BASE, **SHAPES[shape]), 2, 128, on_gpu=False, **settings)


@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize(
    ("shape", "recompute"),
    [*((shape, None) for shape in SHAPES), ("grouped queries", "selective"), ("untied", "full"), ("deep", "full")],
)
def test_activations(shape: str, recompute: Any, itemsize: int) -> None:
    batch = batch_of(shape, recompute=recompute, itemsize=itemsize)
    measured = saved_bytes(make_engine(batch, ParallelConfig(), 1), sample(batch, 1))
    expected = stage_bytes(batch, make_stage(batch.model.num_layers)) + logits_kept(batch)
    if recompute == "full":  # a checkpoint holds cosines and sines where autograd's hooks do not see them
        expected -= 2 * 4 * batch.seq_length * batch.model.head_dim
    assert measured == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_every_family(family: str, itemsize: int) -> None:
    model = dataclasses.replace(FAMILIES[family], **FAMILY_SIZES, sliding_window=50 if family == "mistral" else None)
    batch = MicroBatch(model, 2, 128, on_gpu=False, itemsize=itemsize)
    measured = saved_bytes(make_engine(batch, ParallelConfig(), 1), sample(batch, 1))
    assert measured == pytest.approx(stage_bytes(batch, make_stage(3)) + logits_kept(batch), rel=0.02)


@pytest.mark.parametrize("recompute", [None, "selective"])
@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("shape", ["grouped queries", "one key a query"])
def test_activations_with_dropout(shape: str, dropout: DropoutConfig, itemsize: int, recompute: Any) -> None:
    batch = batch_of(shape, dropout=dropout, itemsize=itemsize, recompute=recompute)
    measured = saved_bytes(make_engine(batch, ParallelConfig(), 1), sample(batch, 1))
    assert measured == pytest.approx(stage_bytes(batch, make_stage(3)) + logits_kept(batch), rel=0.02)


@pytest.mark.parametrize(
    ("family", "targets", "recompute", "itemsize"),
    [
        ("llama", "all", None, 4),
        ("llama", "all", None, 2),
        ("llama", "q,v", None, 2),
        ("llama", "q,k,o,down", "selective", 4),
        ("llama", "v,gate", "full", 2),
        ("gpt2", "all", None, 4),
        ("qwen3", "q,down", None, 2),
        ("olmo2", "all", None, 4),
    ],
)
def test_activations_with_adapters(family: str, targets: str, recompute: Any, itemsize: int) -> None:
    model = dataclasses.replace(FAMILIES[family], **FAMILY_SIZES)
    lora = LoRAConfig(lora_rank=12, lora_target=targets)
    batch = MicroBatch(model, 2, 128, on_gpu=False, itemsize=itemsize, recompute=recompute, lora=lora)
    measured = saved_bytes(make_engine(batch, ParallelConfig(), 1), sample(batch, 1))
    expected = stage_bytes(batch, make_stage(3)) + logits_kept(batch)
    if recompute == "full":
        expected -= 2 * 4 * batch.seq_length * model.head_dim
    assert measured == pytest.approx(expected, rel=0.02)
    assert measured != pytest.approx(
        stage_bytes(dataclasses.replace(batch, lora=LoRAConfig()), make_stage(3)), rel=0.05
    )


@pytest.mark.parametrize("itemsize", [4, 2])
def test_activations_with_documents_kept_apart(itemsize: int) -> None:
    batch = batch_of("grouped queries", has_mask=True, has_positions=True, itemsize=itemsize)
    measured = saved_bytes(make_engine(batch, ParallelConfig(), 1), sample(batch, 1))
    expected = stage_bytes(batch, make_stage(batch.model.num_layers)) + logits_kept(batch)
    assert measured == pytest.approx(expected, rel=0.1)


def test_activations_where_the_logits_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("kernels.block_cross_entropy", "estimate.activations"):
        monkeypatch.setattr(sys.modules[f"megatron_lfr.{module}"], "SAVE_BUDGET_BYTES", 0)
    for itemsize in (4, 2):
        batch = batch_of("untied", itemsize=itemsize)
        measured = saved_bytes(make_engine(batch, ParallelConfig(), 1), sample(batch, 1))
        expected = stage_bytes(batch, make_stage(batch.model.num_layers)) + logits_kept(batch)
        assert measured == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("strategy", "micro_batches"), [("no_shard", 1), ("no_shard", 2), ("optim_grads_params", 2)])
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ("grouped queries", {}),
        ("untied", {"itemsize": 2}),
        ("capped logits", {"rows": 4}),  # most of it are logits and the slope of their cap
        ("deep", {"recompute": "selective"}),
        ("deep", {"recompute": "full", "itemsize": 2}),
        ("untied", {"rows": 1, "seq_length": 8}),  # weights and gradients are most of it
        ("grouped queries", {"rows": 1, "seq_length": 8, "itemsize": 2}),
        ("grouped queries", {"dropout": DROPOUTS[2]}),
        ("one key a query", {"dropout": DROPOUTS[2], "itemsize": 2, "seq_length": 256}),
    ],
)
def test_parts_and_peak(shape: str, settings: dict[str, Any], micro_batches: int, strategy: Any) -> None:
    batch = dataclasses.replace(batch_of(shape), **settings)
    layout = ParallelConfig(data_parallel_sharding_strategy=strategy)
    engine, estimated = make_engine(batch, layout, micro_batches), rank_memory(batch, layout, micro_batches, 1, 0)
    weights = sum(parameter.local().nbytes for parameter in engine.parameters)
    tables = sum(stage.rope_cos.nbytes + stage.rope_sin.nbytes for stage in engine.stages)
    assert estimated.weights == weights + tables
    moments = sum(v.nbytes for state in engine.optimizer.state.values() for v in state.values() if v.ndim)
    assert estimated.optimizer == moments
    assert estimated.gradients >= weights
    before = estimated.weights + estimated.optimizer
    measured = before + step_peak(engine, sample(batch, micro_batches))
    assert measured == pytest.approx(estimated.peak, rel=0.1)


@pytest.mark.parametrize(
    ("shape", "settings", "strategy", "micro_batches"),
    [
        ("grouped queries", {}, "no_shard", 1),
        ("untied", {"itemsize": 2}, "optim_grads_params", 2),
        ("deep", {"recompute": "full", "itemsize": 2}, "no_shard", 2),
        ("untied", {"rows": 1, "seq_length": 8}, "no_shard", 2),
        ("untied", {"rows": 1, "seq_length": 8}, "optim_grads_params", 2),
        ("untied", {"rows": 1, "seq_length": 8, "itemsize": 2}, "no_shard", 1),
    ],
)
def test_parts_and_peak_with_adapters(shape: str, settings: dict[str, Any], micro_batches: int, strategy: Any) -> None:
    """The model has neither gradients nor moments, and is held as it is computed with."""
    batch = dataclasses.replace(batch_of(shape, lora=LoRAConfig(lora_rank=4)), **settings)
    layout = ParallelConfig(data_parallel_sharding_strategy=strategy)
    engine, estimated = make_engine(batch, layout, micro_batches), rank_memory(batch, layout, micro_batches, 1, 0)
    adapters = adapter_parameters(batch.model, batch.lora)
    tables = sum(stage.rope_cos.nbytes + stage.rope_sin.nbytes for stage in engine.stages)
    local = [parameter.to_local() for stage in engine.stages for parameter in stage.parameters()]
    assert estimated.weights == sum(part.nbytes for part in local) + tables
    assert (
        estimated.weights - tables
        == batch.itemsize * held_weights(batch.model, [make_stage(batch.model.num_layers)], 1).total + 4 * adapters
    )
    assert estimated.optimizer == 8 * adapters
    assert estimated.optimizer == sum(
        v.nbytes for state in engine.optimizer.state.values() for v in state.values() if v.ndim
    )
    measured = estimated.weights + estimated.optimizer + step_peak(engine, sample(batch, micro_batches))
    assert measured == pytest.approx(estimated.peak, rel=0.1)
    complete = rank_memory(dataclasses.replace(batch, lora=LoRAConfig()), layout, micro_batches, 1, 0)
    assert measured < 0.85 * complete.peak


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    port = free_port()
    mp.start_processes(rank_memory_cases.measure, (str(tmp_path), port), nprocs=2, start_method="forkserver")
    for name, case in rank_memory_cases.CASES.items():
        for rank in range(2):
            measured = json.loads((tmp_path / f"{rank}.json").read_text())[name]
            assert measured == pytest.approx(case.expected(rank), rel=0.1), (name, rank)


@pytest.mark.parametrize(
    ("ranks", "virtual", "micro_batches"), [(2, 2, 4), (2, 4, 2), (4, 2, 16), (4, 3, 4), (4, 2, 7)]
)
def test_interleaved_micro_batches_in_flight(ranks: int, virtual: int, micro_batches: int) -> None:
    """PyTorch's own order of a rank's passes, counted through."""
    rounds = max(1, micro_batches // ranks)
    schedule = SimpleNamespace(
        n_local_stages=virtual,
        microbatches_per_round=micro_batches // rounds,
        pp_group_size=ranks,
        _n_microbatches=micro_batches,
    )
    layout = ParallelConfig(pipeline_model_parallel_size=ranks, num_layers_per_virtual_pipeline_stage=1)
    for rank in range(ranks):
        alive = most = 0
        for action in ScheduleInterleaved1F1B._calculate_single_rank_operations(schedule, rank):  # type: ignore[arg-type]
            if action is not None:
                alive += 1 if action.computation_type.name == "FORWARD" else -1
                most = max(most, alive)
        stages = local_stages(ranks * virtual, ranks * virtual, rank, ranks)
        assert sum(micro_batches_in_flight(layout, micro_batches, stages, rank)) == most


def test_other_micro_batches_in_flight() -> None:
    for schedule, expected in (("1f1b", [4, 3, 2, 1]), ("gpipe", [16] * 4)):
        layout = ParallelConfig(pipeline_model_parallel_size=4, pipeline_schedule=schedule)  # type: ignore[arg-type]
        in_flight = [micro_batches_in_flight(layout, 16, local_stages(8, 4, rank, 4), rank) for rank in range(4)]
        assert in_flight == [[number] for number in expected]
