"""A toy model, its optimizers, the layouts that it is trained in, and batches: what the engine's tests are made of."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine import build_stages, shard_stages
from megatron_lfr.engine.native import NativeEngine
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.model import ModelConfig
from megatron_lfr.model.dropout import DropoutConfig
from megatron_lfr.model.lora import LoRAConfig
from megatron_lfr.model.loss import LossConfig
from megatron_lfr.parallel import ParallelConfig, ParallelState, initialize
from support.engine_oracle import GlobalBatch

ROWS, LENGTH, SEED = 8, 16, 3


RATES = (1e-2, 5e-3, 1e-2)


TOY = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=46,  # does not divide evenly over four ranks, nor its half over two
    vocab_size=50,
    make_vocab_size_divisible_by=8,
    max_position_embeddings=LENGTH,
    init_method_std=0.1,
)


# With a large epsilon, a wrong scale of the gradients shows in the weights.
ADAMW = OptimizerConfig(weight_decay=0.1, adam_beta2=0.95, adam_eps=1e-3)


ADAPTERS = LoRAConfig(lora_rank=3, lora_alpha=6.0)


PARTLY = dataclasses.replace(ADAPTERS, lora_target="v,down")


RITE = dataclasses.replace(ADAMW, optimizer="lora-rite", clip_grad=0.0, rite_clip=0.05)


CAPPED = dataclasses.replace(TOY, final_logit_softcapping=1.0)


LOSS = LossConfig(z_loss_coeff=0.02, label_smoothing=0.1)


DROPOUT = DropoutConfig(attention_dropout=0.2, hidden_dropout=0.1)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Ranks, rows of a micro-batch, and the layout's flags."""

    ranks: int
    micro_batch: int
    flags: dict[str, Any]

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(**self.flags)


TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"


SHARDING, COPIES = "data_parallel_sharding_strategy", "num_distributed_optimizer_instances"


TP2_SP: dict[str, Any] = {TP: 2, "sequence_parallel": True}


LAYOUTS = {
    **{f"one rank, micro-batch {rows}": Layout(1, rows, {}) for rows in (1, 2, 8)},
    "DP2": Layout(2, 2, {}),
    "DP2 optim": Layout(2, 1, {SHARDING: "optim"}),
    "DP2 optim_grads": Layout(2, 2, {SHARDING: "optim_grads"}),
    "DP2 optim_grads_params": Layout(2, 4, {SHARDING: "optim_grads_params"}),
    "DP2 optim_grads_params, micro-batch 1": Layout(2, 1, {SHARDING: "optim_grads_params"}),
    "TP2": Layout(2, 4, {TP: 2}),
    "TP2 SP": Layout(2, 2, TP2_SP),
    "PP2 1f1b": Layout(2, 2, {PP: 2}),
    "PP2 gpipe": Layout(2, 4, {PP: 2, "pipeline_schedule": "gpipe"}),
    "PP2 interleaved": Layout(2, 2, {PP: 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "CP2": Layout(2, 2, {CP: 2}),
    "TP2 PP2": Layout(4, 2, {TP: 2, PP: 2}),
    "TP2 PP2 SP": Layout(4, 1, {**TP2_SP, PP: 2}),
    "DP2 CP2": Layout(4, 2, {CP: 2}),
    "DP2 CP2 optim": Layout(4, 4, {CP: 2, SHARDING: "optim"}),
    "PP2 DP2": Layout(4, 2, {PP: 2}),
    "PP2 DP2 optim": Layout(4, 1, {PP: 2, SHARDING: "optim"}),
    "TP2 DP2 SP optim_grads_params": Layout(4, 2, {**TP2_SP, SHARDING: "optim_grads_params"}),
    "DP4 in two copies": Layout(4, 2, {SHARDING: "optim_grads_params", COPIES: 2}),
}


@functools.cache
def make_batches(documents: bool = False) -> tuple[GlobalBatch, ...]:
    """Make three steps: rows of padding here and there; the second half of the rows masked; the first half masked."""
    generator = torch.Generator().manual_seed(4)
    batches = []
    for number, masked in enumerate(([2, 7], [4, 5, 6, 7], [0, 1, 2, 3])):
        tokens = torch.randint(0, 50, (ROWS, LENGTH + 1), generator=generator)
        mask = (torch.rand(ROWS, LENGTH, generator=generator) < torch.linspace(0.3, 1.0, ROWS)[:, None]).float()
        mask[masked] = 0
        # The last step's masked rows are blocks of which no token counts, the others' padding.
        padding = masked if number < 2 else []
        ids = [-1 if row in padding else 10 * number + row for row in range(ROWS)]
        lengths = None
        if documents:
            cuts = [torch.randint(1, LENGTH, (3,), generator=generator).unique().tolist() for _ in range(ROWS)]
            lengths = [[b - a for a, b in zip([0, *c], [*c, LENGTH], strict=True)] for c in cuts]
        batches.append(GlobalBatch(tokens[:, :-1], tokens[:, 1:], mask, ids, lengths, step=number))
    return tuple(batches)


def share_of(batch: GlobalBatch, parallel: ParallelState, length: int | None = None) -> Batch:
    """Return this rank's share, as the loader would make it, of the first `length` rows."""
    share = (length or ROWS) // parallel.data_parallel_size
    rows = slice(parallel.data_rank * share, (parallel.data_rank + 1) * share)
    position_ids = document_ids = None
    if batch.documents is not None:
        mine = batch.documents[rows]
        position_ids = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in mine])
        document_ids = torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in mine])
    return Batch(
        step=batch.step,
        block_ids=np.array(batch.block_ids[:length]),
        rows=rows,
        tokens=batch.tokens[rows],
        labels=batch.labels[rows],
        loss_mask=batch.mask[rows].clone(),
        position_ids=position_ids,
        document_ids=document_ids,
        valid_tokens=int(batch.mask[rows].sum()),
    )


@functools.cache
def parallel_state(config: ParallelConfig) -> ParallelState:
    """Make the groups of a layout once: each group of gloo keeps a thread that wakes up a hundred times a second."""
    return initialize(config)


def make_engine(
    layout: Layout, adamw: OptimizerConfig = ADAMW, seed: int | None = SEED, **options: Any
) -> NativeEngine:
    parallel = parallel_state(layout.config)
    config = options.pop("config", TOY)
    layout.config.check_batches(
        config.num_layers, LENGTH, layout.micro_batch, ROWS // parallel.data_parallel_size // layout.micro_batch
    )
    return NativeEngine(
        shard_stages(build_stages(config, parallel, dropout_seed=SEED, **options), parallel, seed),
        adamw,
        parallel,
        seq_length=LENGTH,
        micro_batch_size=layout.micro_batch,
        global_batch_size=ROWS,
    )
