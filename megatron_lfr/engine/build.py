"""Builds this rank's part of a model without memory. How it is sharded and filled is left to the engine."""

from __future__ import annotations

import torch

from megatron_lfr.kernels.block_cross_entropy import Mode
from megatron_lfr.model import Decoder, ModelConfig
from megatron_lfr.model.attention import AttentionBackend
from megatron_lfr.model.dropout import DropoutConfig
from megatron_lfr.model.fused import KernelPackage, layer_kernels
from megatron_lfr.model.layers import RecomputeGranularity
from megatron_lfr.model.lora import LoRAConfig, add_adapters
from megatron_lfr.model.loss import LossConfig
from megatron_lfr.parallel import ParallelState
from megatron_lfr.parallel.layers import TensorParallel
from megatron_lfr.parallel.pipeline import local_stages


def build_stages(
    config: ModelConfig,
    parallel: ParallelState,
    *,
    compute_dtype: torch.dtype = torch.float32,
    recompute_granularity: RecomputeGranularity | None = None,
    compile_layers: bool = False,
    kernels: KernelPackage = "torch",
    loss: LossConfig | None = None,
    dropout: DropoutConfig | None = None,
    dropout_seed: int = 0,
    attention_backend: AttentionBackend = "sdpa",
    lora: LoRAConfig | None = None,
) -> list[Decoder]:
    """Build the pipeline stages of this rank on the meta device. lora: makes adapters of which everything else is the
    frozen base, in compute_dtype, in which it would be used anyway."""
    layout = parallel.config
    tp = TensorParallel(parallel.tensor_group, layout.sequence_parallel and layout.tensor_model_parallel_size > 1)
    # Under GPipe, all micro-batches wait for their backward: gradients of the output embedding must not.
    loss_mode: Mode = "save" if layout.schedule == "gpipe" else "auto"
    ranks = layout.pipeline_model_parallel_size
    rank = parallel.mesh.get_local_rank("pipeline")
    stages = []
    for stage in local_stages(config.num_layers, layout.num_stages(config.num_layers), rank, ranks):
        with torch.device("meta"):
            model = Decoder(
                config,
                None,
                tp=tp,
                context_group=parallel.context_group,
                stage=stage,
                compute_dtype=compute_dtype,
                recompute_granularity=recompute_granularity,
                kernels=layer_kernels(kernels),
                loss=loss,
                dropout=dropout,
                dropout_seed=dropout_seed,
                attention_backend=attention_backend,
                loss_mode=loss_mode,
            )
            if lora is not None and lora.lora_rank is not None:
                add_adapters(model, lora, compute_dtype)
        if compile_layers:
            for layer in model.layers.values():
                layer.compile(fullgraph=True)
        stages.append(model)
    return stages
