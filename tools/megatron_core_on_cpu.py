"""Megatron-core's GPT on a CPU: the few places that ask for CUDA are given the CPU, and fused kernels are turned off.

Except for the device of new tensors, what is replaced runs once a step at most: the time is Megatron-core's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.model import ModelConfig
from megatron_lfr.parallel import ParallelConfig


def replace_cuda() -> None:
    """Give Megatron-core the CPU where it asks for the current CUDA device. Must come before it is imported."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *arguments: None  # type: ignore[assignment]
    Tensor.cuda = lambda tensor, *arguments, **options: tensor  # type: ignore[method-assign, assignment]
    for name in ("zeros", "ones", "tensor", "empty", "full"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make_on_cpu(*arguments: Any, **options: Any) -> Tensor:
        if "device" in options and str(options["device"]).startswith("cuda"):
            options["device"] = "cpu"
        return make(*arguments, **options)

    return make_on_cpu


def _clip(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
    """Do what clip_grad_by_total_norm_fp32 does, which insists on CUDA tensors."""
    coefficient = max_norm / (total_norm + 1.0e-6)
    if coefficient < 1.0:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(grads, coefficient)


class _NoDropout:
    """Stands for the states of CUDA's random generators, which only dropout reads."""

    def is_initialized(self) -> bool:
        return True

    def fork(self, name: str = "") -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class MegatronCore:
    """Trains Megatron-core's GPT, as a Llama of our sizes, with its DDP, schedules and optimizer."""

    def __init__(self, sizes: ModelConfig, layout: ParallelConfig, seq_length: int, rows: int) -> None:
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, optimizer
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer import TransformerConfig

        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        )
        optimizer.clip_grad_by_total_norm_fp32 = _clip
        tensor_parallel.random._CUDA_RNG_STATE_TRACKER = _NoDropout()
        tensor_parallel.random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
        torch.manual_seed(1)
        config = TransformerConfig(
            num_layers=sizes.num_layers,
            hidden_size=sizes.hidden_size,
            num_attention_heads=sizes.num_attention_heads,
            num_query_groups=sizes.query_groups,
            ffn_hidden_size=sizes.ffn_size,
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            sequence_parallel=layout.sequence_parallel,
            pipeline_dtype=torch.float32,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            normalization="RMSNorm",
            layernorm_epsilon=sizes.norm_epsilon,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
            persist_layer_norm=False,
        )
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=sizes.padded_vocab_size,
            max_sequence_length=seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=not sizes.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
        )
        ddp = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
        self._model = DistributedDataParallel(config, ddp, model)
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = self._model.no_sync
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=1e-4, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0), [self._model]
        )
        self._run = get_forward_backward_func()
        self._seq_length, self._rows = seq_length, rows
        self._positions = torch.arange(seq_length).expand(rows, -1)

    def train_step(self, batch: Batch) -> float | None:
        """Take a step on this data-parallel rank's rows; returns the mean loss on the last pipeline stage."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        micro_batches = len(batch.tokens) // self._rows
        losses = self._run(
            forward_step_func=self._forward,
            data_iterator=self._parts(batch),
            model=self._model,
            num_microbatches=micro_batches,
            seq_length=self._seq_length,
            micro_batch_size=self._rows,
            forward_only=False,
        )
        self._optimizer.step()
        return sum(float(one["loss"]) for one in losses) / micro_batches if losses else None

    def _parts(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(batch.tokens), self._rows):
            rows = slice(first, first + self._rows)
            yield batch.tokens[rows], batch.labels[rows]

    def _forward(self, parts: Iterator[tuple[Tensor, Tensor]], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        tokens, labels = next(parts)
        return model(tokens, self._positions, None, labels=labels), partial(_mean)


def _mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = losses.mean()
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss itself in place
