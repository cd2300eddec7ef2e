"""DeepSpeed's configuration: what of it counts, what must agree with flags, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")

from megatron_lfr.config import RunConfig, deepspeed_settings, fill_batch, parse_run_config

AUTO = "auto"
RUN = ["--model-preset", "demo", "--data-path", "x", "--train-iters", "4", "--seq-length", "64", "--save", "x"]
HF_ZERO2: dict[str, Any] = {
    "fp16": {
        "enabled": AUTO,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": AUTO},
    "optimizer": {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": AUTO, "warmup_max_lr": AUTO, "warmup_num_steps": AUTO},
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "steps_per_print": 2000,
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "wall_clock_breakdown": False,
}
HF_ZERO3: dict[str, Any] = {
    **HF_ZERO2,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": AUTO,
        "stage3_prefetch_bucket_size": AUTO,
        "stage3_param_persistence_threshold": AUTO,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
MEGATRON_GPT: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "steps_per_print": 10,
    "zero_optimization": {"stage": 1, "elastic_checkpoint": True},
    "gradient_clipping": 1.0,
    "prescale_gradients": True,
    "fp16": {
        "enabled": False,
        "loss_scale": 0,
        "loss_scale_window": 500,
        "hysteresis": 2,
        "min_loss_scale": 1,
        "initial_scale_power": 11,
    },
    "bf16": {"enabled": True},
    "wall_clock_breakdown": False,
}
MEGATRON_LLAMA: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "steps_per_print": 1,
    "zero_optimization": {"stage": 0},
    "bf16": {"enabled": True},
}
MEGATRON_CURRICULUM: dict[str, Any] = {
    **MEGATRON_GPT,
    "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True}},
    "curriculum_learning": {"enabled": True, "curriculum_type": "seqlen"},
}
SCHEDULER = "scheduler: refused: the learning rate is that of --lr, --lr-decay-style and --lr-warmup-iters"


def write(folder: Path, values: dict[str, Any] | str) -> str:
    path = folder / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def parse(folder: Path, values: dict[str, Any] | str, *flags: str) -> tuple[RunConfig, list[str]]:
    return parse_run_config([*RUN, "--deepspeed", "--deepspeed_config", write(folder, values), *flags])


def given(folder: Path, values: dict[str, Any] | str, *flags: str, ranks: int = 2) -> dict[str, Any]:
    """What DeepSpeed is given."""
    config = fill_batch(parse(folder, values, *flags)[0], ranks)
    config.validate(ranks)
    return deepspeed_settings(config, ranks)


def refusal(folder: Path, values: dict[str, Any] | str, *flags: str, ranks: int = 2) -> list[str]:
    """The lines of the error, without the name of the file."""
    with pytest.raises(ValueError) as error:
        given(folder, values, *flags, ranks=ranks)
    return [line.removeprefix(f"--deepspeed-config {folder / 'ds.json'}: ") for line in str(error.value).split("\n")]


def without(values: dict[str, Any], *paths: str) -> dict[str, Any]:
    values = copy.deepcopy(values)
    for path in paths:
        *sections, name = path.split(".")
        section = values
        for part in sections:
            section = section[part]
        del section[name]
    return values


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        (HF_ZERO2, [SCHEDULER, "zero_optimization.offload_optimizer: refused: not supported here yet"]),
        (HF_ZERO3, [SCHEDULER, "zero_optimization.offload_param: refused: not supported here yet"]),
        (
            MEGATRON_CURRICULUM,
            [
                "data_efficiency: refused: Learn-Focus-Review orders the data",
                "curriculum_learning: refused: Learn-Focus-Review orders the data",
            ],
        ),
    ],
)
def test_documented_configurations_that_ask_for_more_are_refused_key_by_key(
    values: dict[str, Any], lines: list[str], tmp_path: Path
) -> None:
    assert refusal(tmp_path, values) == lines


def test_hugging_faces_zero_2(tmp_path: Path) -> None:
    values = without(HF_ZERO2, "scheduler", "zero_optimization.offload_optimizer")
    assert given(tmp_path, values, "--micro-batch-size", "4", "--clip-grad", "0.5") == {
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {
            "stage": 2,
            "allgather_partitions": True,
            "allgather_bucket_size": 200_000_000,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 200_000_000,
            "contiguous_gradients": True,
        },
    }


def test_hugging_faces_zero_3_is_filled_as_its_trainer_does(tmp_path: Path) -> None:
    values = without(HF_ZERO3, "scheduler", "zero_optimization.offload_param")
    zero = given(tmp_path, values, "--hidden-size", "64", "--num-attention-heads", "4")["zero_optimization"]
    assert zero["reduce_bucket_size"] == 64 * 64
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 64 * 64)
    assert zero["stage3_param_persistence_threshold"] == 640
    assert "stage3_gather_16bit_weights_on_model_save" not in zero
    assert "offload_optimizer" not in zero


def test_megatron_deepspeeds_fill_the_run(tmp_path: Path) -> None:
    config, notes = parse(tmp_path, MEGATRON_GPT)
    assert config.training.global_batch_size == 8
    assert config.training.micro_batch_size == 2
    assert config.training.bf16
    assert config.parallel.sharding == "optim"
    assert len([note for note in notes if "no effect" in note]) == 2  # prescale_gradients, elastic_checkpoint
    assert given(tmp_path, MEGATRON_GPT)["gradient_clipping"] == 1.0
    # DeepSpeed would clip at 1.0 by itself; at stage 0, the engine does it.
    assert given(tmp_path, MEGATRON_LLAMA, "--clip-grad", "0.3")["gradient_clipping"] == 0.0
    assert given(tmp_path, {"zero_optimization": {"stage": 1}}, "--clip-grad", "0")["gradient_clipping"] == 0.0


@pytest.mark.parametrize("flag", ["--deepspeed_config={}", "--deepspeed-config={}"])
def test_comments_and_trailing_commas(flag: str, tmp_path: Path) -> None:
    path = write(tmp_path, '{// a comment\n "zero_optimization": {"stage": 3,}, # another\n}')
    config, _ = parse_run_config(["--deepspeed", flag.format(path)])
    assert config.parallel.sharding == "optim_grads_params"


@pytest.mark.parametrize(
    ("values", "flags", "line"),
    [
        ({"zero_optimisation": {}}, [], "unknown key zero_optimisation; did you mean zero_optimization?"),
        ({"gradient_cliping": 1}, [], "unknown key gradient_cliping; did you mean gradient_clipping"),
        ({"zero_optimization": {"stag": 1}}, [], "unknown key zero_optimization.stag; did you mean stage?"),
        ('{"bf16": {"enabled": true, "enabled": false}}', [], "key enabled is there twice"),
        ('{"bf16": ', [], "Expecting"),
        ("[1]", [], "expected an object"),
        ({"zero_optimization": {"stage": 4}}, [], "zero_optimization.stage 4: must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}, [], "round_robin_gradients: refused"),
        ({"fp16": {"enabled": True}}, [], "fp16: refused: computes in fp32, or in bf16 with --bf16"),
        ({"bf16": {"enabled": True}}, ["--no-bf16"], "bf16.enabled stands for --bf16 True, and the run has"),
        ({"gradient_clipping": 0.5}, ["--clip-grad", "2"], "gradient_clipping stands for --clip-grad 0.5"),
        ({"zero_optimization": {"stage": 2}}, ["--data-parallel-sharding-strategy", "optim"], "stage"),
        ({"optimizer": {"type": "Lamb"}}, [], "optimizer.type 'Lamb': must be Adam or AdamW"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.9}}}, ["--lr", "1e-3"], "params.lr stands for --lr 0.9"),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95]}}}, ["--adam-beta2", "0.9"], "beta2 0.95"),
        ({"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, [], "optimizer.params.amsgrad True: refused"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, [], "optimizer.params.adam_w_mode False"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, [], "--recompute-granularity full or selective"),
        ({"wandb": {"enabled": True}}, [], "--wandb-project"),
        ({"train_batch_size": 0}, [], "train_batch_size 0: must be a number of at least 1"),
        ({}, ["--pipeline-model-parallel-size", "2", "--global-batch-size", "8"], "drop --deepspeed, add"),
        ({}, ["--compile"], "--compile is not supported with it yet"),
    ],
)  # fmt: skip
def test_bad_configurations_name_the_key(
    values: dict[str, Any] | str, flags: list[str], line: str, tmp_path: Path
) -> None:
    lines = refusal(tmp_path, values, *flags)
    assert len(lines) == 1
    assert line in lines[0]


def test_what_is_off_is_accepted(tmp_path: Path) -> None:
    off = {
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None, "profile": False},
        "tensorboard": {"enabled": False, "output_path": "x"},
        "gradient_allreduce_op": "mean",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1, "zero_hpz_partition_size": 1, "offload_param": {"device": "none"}},
    }
    assert given(tmp_path, off)["zero_optimization"] == {"stage": 1}


def test_one_message_for_the_three_batch_numbers(tmp_path: Path) -> None:
    numbers = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    (line,) = refusal(tmp_path, numbers, ranks=2)
    for part in ("train_batch_size 32", "train_micro_batch_size_per_gpu 4", "gradient_accumulation_steps 2"):
        assert part in line
    assert "--global-batch-size 32 = --micro-batch-size 4 x 4 x 2 ranks" in line
    given(tmp_path, numbers, ranks=4)
    given(tmp_path, numbers, "--tensor-model-parallel-size", "2", ranks=8)
    assert re.search(r"--micro-batch-size 1 x", refusal(tmp_path, numbers, "--micro-batch-size", "1")[0])
    (line,) = refusal(tmp_path, {"train_batch_size": 6}, "--micro-batch-size", "4", ranks=1)
    assert "must be a multiple of --micro-batch-size 4" in line


def test_the_accumulation_steps_fill_the_global_batch(tmp_path: Path) -> None:
    config, _ = parse(tmp_path, {"gradient_accumulation_steps": 3}, "--micro-batch-size", "2")
    assert fill_batch(config, 4).training.global_batch_size == 24
    other, _ = parse(tmp_path, {"gradient_accumulation_steps": 3}, "--global-batch-size", "8")
    assert fill_batch(other, 4).training.global_batch_size == 8


def test_megatron_deepspeeds_flags(tmp_path: Path) -> None:
    flags = ["--no-pipeline-parallel", "--local_rank=0", "--zero-contigious-gradients", "--zero-reduce-bucket-size=5e8"]
    config, notes = parse(tmp_path, MEGATRON_GPT, "--zero-stage=1", *flags)
    config.validate(2)
    assert "--zero-stage 1: accepted as --data-parallel-sharding-strategy optim" in notes
    (line,) = refusal(tmp_path, MEGATRON_GPT, "--zero-stage", "3")
    assert "zero_optimization.stage stands for --data-parallel-sharding-strategy optim" in line
    with pytest.raises(ValueError, match="instead: --recompute-granularity full"):
        parse(tmp_path, MEGATRON_GPT, "--deepspeed-activation-checkpointing")


def test_the_two_flags_go_together() -> None:
    for flags, message in (
        (["--deepspeed"], "--deepspeed: give DeepSpeed's configuration with --deepspeed-config"),
        (["--deepspeed-config", "x.json"], "--deepspeed-config x.json: goes with --deepspeed"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_run_config([*RUN, *flags])[0].validate(1)
