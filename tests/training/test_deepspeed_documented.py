"""Configurations as the documentation of Hugging Face's Trainer, Megatron-DeepSpeed and DeepSpeed gives them: the keys
and values of each, and what becomes of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")

from megatron_lfr.config import deepspeed_settings, fill_batch, parse_run_config

AUTO = "auto"
RUN = ["--model-preset", "demo", "--data-path", "x", "--train-iters", "4", "--seq-length", "64", "--save", "x"]
CPU = {"device": "cpu", "pin_memory": True}
NVME = {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True, "buffer_count": 4, "fast_init": False}
FP16 = {
    "enabled": AUTO,
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
TRAINER: dict[str, Any] = {
    "fp16": FP16,
    "bf16": {"enabled": AUTO},
    "optimizer": {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}},
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "steps_per_print": 2000,
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "wall_clock_breakdown": False,
}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": AUTO, "warmup_max_lr": AUTO, "warmup_num_steps": AUTO}}
ZERO2: dict[str, Any] = {
    "stage": 2,
    "offload_optimizer": CPU,
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
}
ZERO3: dict[str, Any] = {
    "stage": 3,
    "offload_optimizer": CPU,
    "offload_param": CPU,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": AUTO,
    "stage3_prefetch_bucket_size": AUTO,
    "stage3_param_persistence_threshold": AUTO,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
GPT: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "steps_per_print": 10,
    "zero_optimization": {"stage": 1, "elastic_checkpoint": True},
    "gradient_clipping": 1.0,
    "prescale_gradients": True,
    "fp16": {**FP16, "enabled": False, "loss_scale_window": 500, "initial_scale_power": 11},
    "bf16": {"enabled": True},
    "wall_clock_breakdown": False,
}
TWIN_FLOW = {**CPU, "buffer_count": 4, "pipeline_read": False, "pipeline_write": False}
SCHEDULER = "scheduler: refused: the learning rate is that of --lr, --lr-decay-style and --lr-warmup-iters"
TRAINED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "Hugging Face, ZeRO-1": ({"zero_optimization": {"stage": 1}}, {"stage": 1}, []),
    "Hugging Face, ZeRO-2": (
        {**TRAINER, "zero_optimization": ZERO2},
        {**ZERO2, "allgather_bucket_size": 200_000_000, "reduce_bucket_size": 200_000_000},
        [],
    ),
    "Hugging Face, ZeRO-3": (
        {**TRAINER, "zero_optimization": ZERO3},
        {
            **{name: value for name, value in ZERO3.items() if not name.startswith("stage3_gather")},
            "sub_group_size": 1_000_000_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "reduce_bucket_size": 64 * 64,
            "stage3_prefetch_bucket_size": int(0.9 * 64 * 64),
            "stage3_param_persistence_threshold": 640,
        },
        ["stage3_gather_16bit_weights_on_model_save"],
    ),
    "Hugging Face, what Accelerate's questions make": (
        {
            "train_batch_size": AUTO,
            "train_micro_batch_size_per_gpu": AUTO,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "none", "nvme_path": None},
                "offload_param": {"device": "none", "nvme_path": None},
                "stage3_gather_16bit_weights_on_model_save": False,
            },
            "gradient_clipping": 1.0,
            "fp16": {"enabled": False},
            "bf16": {"enabled": False},
        },
        {"stage": 2},
        ["stage3_gather_16bit_weights_on_model_save"],
    ),
    "Megatron-DeepSpeed, GPT": (GPT, {"stage": 1}, ["prescale_gradients", "zero_optimization.elastic_checkpoint"]),
    "Megatron-DeepSpeed, Llama": (
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "steps_per_print": 1,
            "zero_optimization": {"stage": 0},
            "bf16": {"enabled": True},
        },
        {"stage": 0},
        [],
    ),
    "Megatron-DeepSpeed, universal checkpoints": (
        {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 8,
            "steps_per_print": 1,
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "wall_clock_breakdown": False,
        },
        {"stage": 1},
        [],
    ),
    "Megatron-DeepSpeed, offloaded completely": (
        {**GPT, "zero_optimization": {"stage": 3, "offload_optimizer": {**TWIN_FLOW, "ratio": 1.0}}},
        {"stage": 3, "offload_optimizer": CPU},
        [
            "prescale_gradients",
            *(f"zero_optimization.offload_optimizer.{name}" for name in TWIN_FLOW if name not in CPU),
        ],
    ),
    "DeepSpeed, hpZ of ZeRO++": (
        {
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": 10000000,
                "zero_hpz_partition_size": 2,
                "contiguous_gradients": True,
                "overlap_comm": True,
            }
        },
        {
            "stage": 3,
            "reduce_bucket_size": 10000000,
            "zero_hpz_partition_size": 2,
            "contiguous_gradients": True,
            "overlap_comm": True,
        },
        [],
    ),
}
"""Configurations with which a run trains: what DeepSpeed is given in zero_optimization, and the keys that a note says
are of no effect."""
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Hugging Face, its schedule of the learning rate": (
        {**TRAINER, "scheduler": WARMUP, "zero_optimization": ZERO2},
        [SCHEDULER],
    ),
    "Hugging Face, ZeRO-2 as the guide tunes it": (
        {"zero_optimization": {**ZERO2, "round_robin_gradients": True}},
        ["zero_optimization.round_robin_gradients: refused: DeepSpeed then misplaces weights"],
    ),
    "Hugging Face, NVMe": (
        {
            **TRAINER,
            "zero_optimization": {**ZERO3, "offload_optimizer": NVME, "offload_param": {**NVME, "max_in_cpu": 1e9}},
            "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False},
        },
        [
            "zero_optimization.offload_optimizer.device 'nvme': must be none or cpu",
            "zero_optimization.offload_param.device 'nvme': must be none or cpu",
        ],
    ),
    "Hugging Face, fp16": (
        {**TRAINER, "fp16": {**FP16, "enabled": True}, "zero_optimization": ZERO2},
        ["fp16: refused: computes in fp32, or in bf16 with --bf16"],
    ),
    "Hugging Face, recomputation": (
        {
            "zero_optimization": ZERO3,
            "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True},
        },
        ["activation_checkpointing: refused: use --recompute-granularity full or selective"],
    ),
    "Megatron-DeepSpeed, offloaded in part": (
        {**GPT, "zero_optimization": {"stage": 3, "offload_optimizer": {**TWIN_FLOW, "ratio": 0.8}}},
        ["zero_optimization.offload_optimizer.ratio: refused: the optimizer is PyTorch's AdamW"],
    ),
    "Megatron-DeepSpeed, two curricula": (
        {
            **GPT,
            "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True}},
            "curriculum_learning": {"enabled": True, "curriculum_type": "seqlen"},
        },
        [
            "data_efficiency: refused: Learn-Focus-Review orders the data",
            "curriculum_learning: refused: Learn-Focus-Review orders the data",
        ],
    ),
    "DeepSpeed, quantized ZeRO++": (
        {
            "zero_optimization": {
                "stage": 3,
                "zero_quantized_weights": True,
                "zero_hpz_partition_size": 2,
                "zero_quantized_gradients": True,
            }
        },
        [
            "zero_optimization.zero_quantized_weights: refused: not supported here yet",
            "zero_optimization.zero_quantized_gradients: refused: not supported here yet",
        ],
    ),
}
"""Configurations that are refused, and how the lines of the error begin."""


def given(folder: Path, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what DeepSpeed is given on two ranks, and the notes."""
    path = folder / "ds.json"
    path.write_text(json.dumps(values))
    flags = ["--deepspeed", "--deepspeed_config", str(path), "--hidden-size", "64", "--num-attention-heads", "4"]
    config, notes = parse_run_config([*RUN, *flags])
    config = fill_batch(config, 2)
    config.validate(2)
    return deepspeed_settings(config, 2), notes


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains(name: str, tmp_path: Path) -> None:
    values, zero, without_effect = TRAINED[name]
    made, notes = given(tmp_path, copy.deepcopy(values))
    assert made["zero_optimization"] == zero
    assert sorted(note.removeprefix("--deepspeed-config: ").partition(": no effect")[0] for note in notes) == sorted(
        key if "." in key or key in values else f"zero_optimization.{key}" for key in without_effect
    )
    size = values.get("train_micro_batch_size_per_gpu", AUTO)
    assert made["train_micro_batch_size_per_gpu"] == (1 if size == AUTO else size)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_key_by_key(name: str, tmp_path: Path) -> None:
    values, lines = REFUSED[name]
    with pytest.raises(ValueError) as error:
        given(tmp_path, values)
    said = [line.removeprefix(f"--deepspeed-config {tmp_path / 'ds.json'}: ") for line in str(error.value).split("\n")]
    assert len(said) == len(lines)
    for line, beginning in zip(said, lines, strict=True):
        assert line.startswith(beginning)
