"""The keys of a DeepSpeed configuration, and what becomes of each.

passed: it is handed on to DeepSpeed; "auto" leaves its default. compared: it is a setting of ours, too, and must agree.
ignored: it has no effect here, and a note says so. refused: it is an error unless it is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["passed", "compared", "ignored", "refused"]
Kind = Literal["any", "flag", "number", "section"]
"""What a value must be, where DeepSpeed would fail on others without naming the file."""


@dataclass(frozen=True)
class Key:
    """What becomes of a key, and why; no reason is given for those that are passed or compared."""

    verdict: Verdict
    reason: str = ""
    kind: Kind = "any"


def _keys(verdict: Verdict, names: str, reason: str = "", kind: Kind = "any") -> dict[str, Key]:
    return {name: Key(verdict, reason, kind) for name in names.split()}


_OWN_LOGS = "the run's own logs have it: --tensorboard-dir, --wandb-project, metrics.jsonl"
_OWN_ORDER = "Learn-Focus-Review orders the data"
_GONE = "this version of DeepSpeed has it no longer"
_NOT_YET = "not supported here yet"
_OWN_CHECKPOINTS = "checkpoints are the run folder's, in fp32"

KEYS: dict[str, Key] = {
    **_keys("compared", "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"),
    **_keys("compared", "gradient_clipping bf16 bfloat16 data_types optimizer zero_optimization"),
    **_keys("passed", "steps_per_print seed", kind="number"),
    **_keys("passed", "wall_clock_breakdown memory_breakdown dump_state", kind="flag"),
    **_keys("passed", "comms_logger flops_profiler timers", kind="section"),
    **_keys("passed", "log_level communication_data_type"),
    **_keys("ignored", "checkpoint datastates_ckpt", "checkpoints are the run folder's"),
    **_keys(
        "ignored",
        "prescale_gradients gradient_predivide_factor",
        "the gradient is the sum over the ranks, whenever it is divided",
    ),
    **_keys("ignored", "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer", "the optimizer is PyTorch's AdamW"),
    **_keys("ignored", "aio", "nothing is moved to NVMe here"),
    **_keys("ignored", "vocabulary_size", "--vocab-size and the tokenizer say it"),
    **_keys("ignored", "dataloader_drop_last", "the run's own loader reads the data"),
    **_keys("ignored", "seq_parallel_communication_data_type", "ranks share sequences by --context-parallel-size"),
    **_keys("refused", "fp16", "computes in fp32, or in bf16 with --bf16"),
    **_keys("refused", "torch_autocast amp", "computes in fp32, or in bf16 with --bf16"),
    **_keys("refused", "scheduler", "the learning rate is that of --lr, --lr-decay-style and --lr-warmup-iters"),
    **_keys("refused", "activation_checkpointing", "use --recompute-granularity full or selective"),
    **_keys("refused", "tensorboard csv_monitor wandb comet", _OWN_LOGS),
    **_keys("refused", "compile", "use --compile"),
    **_keys("refused", "tensor_parallel", "use --tensor-model-parallel-size"),
    **_keys("refused", "sequence_parallel_size", "use --context-parallel-size"),
    **_keys("refused", "pipeline", "use --pipeline-model-parallel-size without --deepspeed"),
    **_keys("refused", "expert_parallel use_data_before_expert_parallelism", "the model has no experts"),
    **_keys("refused", "hybrid_engine autotuning weight_quantization", "it is not for pretraining a decoder"),
    **_keys("refused", "disable_python_gc", "nothing would free Python's cycles"),
    **_keys("refused", "disable_allgather", "ranks would train on weights that differ"),
    **_keys("refused", "data_efficiency curriculum_learning", _OWN_ORDER),
    **_keys("refused", "gradient_allreduce_op managed_gradient_accumulation", "the engine sums gradients itself"),
    **_keys("refused", "elasticity nebula compression_training sparse_attention sparse_gradients", _GONE),
    **_keys("refused", "progressive_layer_drop eigenvalue quantize_training graph_harvesting", _GONE),
}
"""Verdicts on keys at the top level."""

ZERO_KEYS: dict[str, Key] = {
    **_keys("compared", "stage"),
    **_keys("passed", "offload_optimizer offload_param", kind="section"),
    **_keys("passed", "contiguous_gradients reduce_scatter overlap_comm allgather_partitions", kind="flag"),
    **_keys("passed", "use_multi_rank_bucket_allreduce ignore_unused_parameters", kind="flag"),
    **_keys("passed", "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential", kind="flag"),
    **_keys("passed", "memory_efficient_linear log_trace_cache_warnings enable_sanity_checks", kind="flag"),
    **_keys("passed", "reduce_bucket_size allgather_bucket_size sub_group_size", kind="number"),
    **_keys("passed", "stage3_max_live_parameters stage3_max_reuse_distance", kind="number"),
    **_keys("passed", "stage3_prefetch_bucket_size stage3_param_persistence_threshold", kind="number"),
    **_keys("passed", "stage3_model_persistence_threshold stage3_module_granularity_threshold", kind="number"),
    **_keys("passed", "zero_hpz_partition_size", kind="number"),
    **_keys("ignored", "stage3_gather_16bit_weights_on_model_save", _OWN_CHECKPOINTS),
    **_keys("ignored", "stage3_gather_fp16_weights_on_model_save", _OWN_CHECKPOINTS),
    **_keys("ignored", "elastic_checkpoint load_from_fp32_weights", "every checkpoint loads on any number of ranks"),
    **_keys("ignored", "pipeline_loading_checkpoint", "checkpoints are the run folder's"),
    **_keys("ignored", "override_module_apply", "weights are drawn where they are kept"),
    **_keys("ignored", "save_muon_momentum_buffer_in_memory", "the optimizer is PyTorch's AdamW"),
    **_keys("refused", "cpu_offload", 'an old name of "offload_optimizer": {"device": "cpu"}'),
    **_keys("refused", "cpu_offload_param cpu_offload_params", 'an old name of "offload_param": {"device": "cpu"}'),
    **_keys("refused", "cpu_offload_use_pin_memory", "an old name of pin_memory in offload_optimizer, offload_param"),
    **_keys("refused", "round_robin_gradients", "DeepSpeed then misplaces weights in what it gives for checkpoints"),
    **_keys("refused", "compute_grad_norm", "the run logs the norm, and clips by it"),
    **_keys("refused", "zero_quantized_weights zero_quantized_gradients zero_quantized_nontrainable_weights", _NOT_YET),
    **_keys("refused", "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param", _GONE),
    **_keys("refused", "legacy_stage1 zenflow super_offload parameter_alignment leaf_module", _NOT_YET),
}
"""Verdicts on keys in zero_optimization."""

ZERO_ALIASES = {
    name.removeprefix("stage3_"): name
    for name in ZERO_KEYS
    if name.startswith("stage3_") and name != "stage3_gather_fp16_weights_on_model_save"
}
"""Second names that DeepSpeed accepts, and the first ones."""
ZERO_KEYS |= {alias: ZERO_KEYS[name] for alias, name in ZERO_ALIASES.items()}

OFFLOAD_KEYS: dict[str, Key] = {
    **_keys("passed", "device"),
    **_keys("passed", "pin_memory", kind="flag"),
    **_keys("ignored", "nvme_path buffer_count buffer_size max_in_cpu fast_init", "nothing is moved to NVMe here"),
    **_keys("ignored", "pipeline_read pipeline_write", "nothing is moved to NVMe here"),
    **_keys("ignored", "cpuadam_cores_perc", "the optimizer is PyTorch's AdamW"),
    **_keys("refused", "ratio super_offload", "the optimizer is PyTorch's AdamW, and is offloaded completely"),
}
"""Verdicts on keys in zero_optimization.offload_optimizer and offload_param."""

OFF: dict[str, tuple[object, ...]] = {
    "gradient_allreduce_op": ("mean",),
    "managed_gradient_accumulation": (True,),
    "compute_grad_norm": (True,),
    "check_grad_overflow": (True,),
    "sequence_parallel_size": (1,),
    "mics_shard_size": (-1,),
    "autotp_size": (0, 1),
    "ratio": (1,),
    "keep_in_fp32_modules": ("auto",),
    "device": ("none",),
}
"""Values that ask for nothing, by key, besides null, false, 0, "auto" and an empty section."""


def is_off(name: str, value: object) -> bool:
    """Return whether a key that is refused asks for nothing: a section that is not enabled, or whose keys all are
    off."""
    if name in ("compute_grad_norm", "check_grad_overflow", "managed_gradient_accumulation", "ratio"):
        return value is None or value == "auto" or value in OFF[name]  # false and 0 ask for something
    if isinstance(value, dict):
        switch = next((key for key in ("enabled", "device") if key in value), None)
        if switch is not None:
            return is_off(switch, value[switch])
        return all(is_off(key, entry) for key, entry in value.items())
    return value in (None, "auto") or value is False or value == 0 or value in OFF.get(name, ())
