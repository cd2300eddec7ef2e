"""The keys of a DeepSpeed configuration, and what becomes of each.

passed: handed on to DeepSpeed; "auto" leaves its default. compared: a setting of ours, with which it must agree.
ignored: without effect here, with a note. refused: unless it is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Key:
    """What becomes of a key, and for all but those that are passed or compared: why."""

    verdict: Literal["passed", "compared", "ignored", "refused"]
    reason: str = ""


def _keys(verdict: Literal["passed", "compared", "ignored", "refused"], names: str, reason: str = "") -> dict[str, Key]:
    return {name: Key(verdict, reason) for name in names.split()}


_OWN_LOGS = "the run's own logs have it: --tensorboard-dir, --wandb-project, metrics.jsonl"
_OWN_ORDER = "Learn-Focus-Review orders the data"
_GONE = "this version of DeepSpeed has it no longer"
_NOT_YET = "not supported here yet"

KEYS: dict[str, Key] = {
    **_keys("compared", "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"),
    **_keys("compared", "gradient_clipping bf16 bfloat16 optimizer zero_optimization"),
    **_keys("passed", "steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level comms_logger"),
    **_keys("passed", "flops_profiler timers communication_data_type seed"),
    **_keys("ignored", "checkpoint datastates_ckpt", "checkpoints are the run folder's"),
    **_keys(
        "ignored",
        "prescale_gradients gradient_predivide_factor",
        "the gradient is the sum over the ranks, whenever it is divided",
    ),
    **_keys("ignored", "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer", "the optimizer is PyTorch's AdamW"),
    **_keys("refused", "fp16", "computes in fp32, or in bf16 with --bf16"),
    **_keys("refused", "torch_autocast amp", "computes in fp32, or in bf16 with --bf16"),
    **_keys("refused", "scheduler", "the learning rate is that of --lr, --lr-decay-style and --lr-warmup-iters"),
    **_keys("refused", "activation_checkpointing", "use --recompute-granularity full or selective"),
    **_keys("refused", "tensorboard csv_monitor wandb comet", _OWN_LOGS),
    **_keys("refused", "aio", "nothing is moved to NVMe here"),
    **_keys("refused", "compile", "use --compile without --deepspeed"),
    **_keys("refused", "tensor_parallel sequence_parallel_size expert_parallel pipeline", _NOT_YET),
    **_keys("refused", "hybrid_engine autotuning weight_quantization", "it is not for pretraining a Llama"),
    **_keys("refused", "data_efficiency curriculum_learning", _OWN_ORDER),
    **_keys("refused", "data_types", "gradients are summed, and the optimizer's state is kept, in fp32"),
    **_keys("refused", "gradient_allreduce_op managed_gradient_accumulation", "the engine sums gradients itself"),
    **_keys("refused", "elasticity nebula compression_training sparse_attention sparse_gradients", _GONE),
    **_keys("refused", "progressive_layer_drop eigenvalue quantize_training", _GONE),
}
"""At the top level."""

ZERO_KEYS: dict[str, Key] = {
    **_keys("compared", "stage"),
    **_keys(
        "passed",
        "contiguous_gradients reduce_scatter overlap_comm allgather_partitions use_multi_rank_bucket_allreduce",
    ),
    **_keys("passed", "reduce_bucket_size allgather_bucket_size sub_group_size ignore_unused_parameters"),
    **_keys("passed", "stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size"),
    **_keys("passed", "stage3_param_persistence_threshold stage3_model_persistence_threshold"),
    **_keys("ignored", "stage3_gather_16bit_weights_on_model_save", "checkpoints are the run folder's, in fp32"),
    **_keys("ignored", "stage3_gather_fp16_weights_on_model_save", "checkpoints are the run folder's, in fp32"),
    **_keys("ignored", "elastic_checkpoint load_from_fp32_weights", "every checkpoint loads on any number of ranks"),
    **_keys("refused", "round_robin_gradients", "DeepSpeed then misplaces weights in what it gives for checkpoints"),
    **_keys("refused", "offload_optimizer offload_param cpu_offload cpu_offload_params", _NOT_YET),
    **_keys("refused", "zero_quantized_weights zero_quantized_gradients zero_quantized_nontrainable_weights", _NOT_YET),
    **_keys("refused", "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param", _NOT_YET),
    **_keys("refused", "legacy_stage1 zenflow super_offload", _NOT_YET),
    **_keys("refused", "zero_hpz_partition_size", _NOT_YET),
}
"""In zero_optimization."""

OFF: dict[str, tuple[object, ...]] = {
    "gradient_allreduce_op": ("mean",),
    "managed_gradient_accumulation": (True,),
    "zero_hpz_partition_size": (1,),
    "sequence_parallel_size": (1,),
    "mics_shard_size": (-1,),
    "grad_accum_dtype": ("fp32",),
    "autotp_size": (0, 1),
    "device": ("none",),
}
"""By key, values that ask for nothing, besides null, false, 0, "auto" and an empty section."""


def is_off(name: str, value: object) -> bool:
    """Whether a key that is refused asks for nothing: a section that is not enabled, or whose keys all are off."""
    if isinstance(value, dict):
        switch = next((key for key in ("enabled", "device") if key in value), None)
        if switch is not None:
            return is_off(switch, value[switch])
        return all(is_off(key, entry) for key, entry in value.items())
    return value in (None, "auto") or value is False or value == 0 or value in OFF.get(name, ())
