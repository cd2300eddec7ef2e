"""DeepSpeed's configuration: what of it counts, what must agree with flags, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")

from megatron_lfr.config import RunConfig, deepspeed_settings, fill_batch, parse_run_config
from megatron_lfr.config.deepspeed_keys import KEYS, OFFLOAD_KEYS, ZERO_KEYS
from megatron_lfr.engine.deepspeed_package import import_deepspeed

AUTO = "auto"
RUN = ["--model-preset", "demo", "--data-path", "x", "--train-iters", "4", "--seq-length", "64", "--save", "x"]
MEGATRON_GPT: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 1, "elastic_checkpoint": True},
    "gradient_clipping": 1.0,
    "prescale_gradients": True,
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 11},
    "bf16": {"enabled": True},
}
BF16 = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}


def write(folder: Path, values: dict[str, Any] | str) -> str:
    path = folder / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def parse(folder: Path, values: dict[str, Any] | str, *flags: str) -> tuple[RunConfig, list[str]]:
    return parse_run_config([*RUN, "--deepspeed", "--deepspeed_config", write(folder, values), *flags])


def given(folder: Path, values: dict[str, Any] | str, *flags: str, ranks: int = 2) -> dict[str, Any]:
    """Return what DeepSpeed is given."""
    config = fill_batch(parse(folder, values, *flags)[0], ranks)
    config.validate(ranks)
    return deepspeed_settings(config, ranks)


def refusal(folder: Path, values: dict[str, Any] | str, *flags: str, ranks: int = 2) -> list[str]:
    """Return the lines of the error, without the name of the file."""
    with pytest.raises(ValueError) as error:
        given(folder, values, *flags, ranks=ranks)
    return [line.removeprefix(f"--deepspeed-config {folder / 'ds.json'}: ") for line in str(error.value).split("\n")]


def zero(stage: int, **section: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **section}}


def test_megatron_deepspeeds_fill_the_run(tmp_path: Path) -> None:
    config, notes = parse(tmp_path, MEGATRON_GPT)
    assert config.training.global_batch_size == 8
    assert config.training.micro_batch_size == 2
    assert config.training.bf16
    assert config.parallel.sharding == "optim"
    assert len([note for note in notes if "no effect" in note]) == 2  # prescale_gradients, elastic_checkpoint
    assert given(tmp_path, MEGATRON_GPT)["gradient_clipping"] == 1.0
    # DeepSpeed would clip at 1.0 by itself; at stage 0, the engine does it.
    assert given(tmp_path, zero(0), "--clip-grad", "0.3")["gradient_clipping"] == 0.0
    assert given(tmp_path, {"zero_optimization": {"stage": 1}}, "--clip-grad", "0")["gradient_clipping"] == 0.0


@pytest.mark.parametrize("flag", ["--deepspeed_config={}", "--deepspeed-config={}"])
def test_comments_and_trailing_commas(flag: str, tmp_path: Path) -> None:
    path = write(tmp_path, '{// a comment\n "zero_optimization": {"stage": 3,}, # another\n}')
    config, _ = parse_run_config(["--deepspeed", flag.format(path)])
    assert config.parallel.sharding == "optim_grads_params"


def test_the_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hjson

    loads, texts = hjson.loads, []
    monkeypatch.setattr(hjson, "loads", lambda text, **options: texts.append(text) or loads(text, **options))
    given(tmp_path, {"gradient_accumulation_steps": 3, **zero(1)})
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("values", "flags", "line"),
    [
        ({"zero_optimisation": {}}, [], "unknown key zero_optimisation; did you mean zero_optimization?"),
        ({"gradient_cliping": 1}, [], "unknown key gradient_cliping; did you mean gradient_clipping"),
        ({"zero_optimization": {"stag": 1}}, [], "unknown key zero_optimization.stag; did you mean stage?"),
        ('{"bf16": {"enabled": true, "enabled": false}}', [], "key enabled is there twice"),
        ('{"bf16": ', [], "Expecting"),
        ("[1]", [], "expected an object"),
        ({"zero_optimization": [1]}, [], "zero_optimization: expected an object of keys and values"),
        (zero(1, reduce_bucket_size="big"), [], "reduce_bucket_size 'big': must be a number of at least 0"),
        (zero(1, overlap_comm="yes"), [], "overlap_comm 'yes': must be true or false"),
        ({"flops_profiler": True}, [], "flops_profiler True: must be an object of keys and values"),
        (zero(1, offload_optimizer="cpu"), [], "offload_optimizer 'cpu': must be an object of keys and values"),
        (zero(1, offload_optimizer={"device": "nvme"}), [], "device 'nvme': must be none or cpu; NVMe is not"),
        (zero(1, offload_optimizer={"device": "cpu", "ratio": 0.5}), [], "offload_optimizer.ratio: refused"),
        (zero(1, offload_optimizer={"device": "cpu", "pin_memroy": True}), [], "pin_memroy; did you mean pin_memory?"),
        (zero(0, offload_optimizer={"device": "cpu"}), [], "offload_optimizer: needs ZeRO-1 or higher"),
        (zero(2, offload_param={"device": "cpu"}), [], "offload_param: needs ZeRO-3"),
        (zero(2, cpu_offload=True), [], 'an old name of "offload_optimizer": {"device": "cpu"}'),
        (zero(2, compute_grad_norm=False), [], "compute_grad_norm: refused"),
        (zero(2, zero_hpz_partition_size=2), [], "zero_hpz_partition_size 2: needs ZeRO-3"),
        (zero(3, zero_hpz_partition_size=3), [], "zero_hpz_partition_size 3: must divide the 2 ranks"),
        (zero(3, zero_quantized_weights=True), [], "zero_quantized_weights: refused: not supported here yet"),
        ({}, ["--cpu-optimizer"], "--cpu-optimizer needs ZeRO-1 or higher"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, [], "bf16.bf16_optimizer_states: refused"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, [], "bf16.check_grad_overflow: refused"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, [], "grad_accum_dtype 'fp16': must be fp32, bf16 or auto"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["--bf16"], "needs --bf16 and ZeRO-1 or higher"),
        ({"data_types": {"param_dtype": "bf16"}}, [], "data_types.param_dtype: refused: --bf16 alone says"),
        ({"managed_gradient_accumulation": False}, [], "managed_gradient_accumulation: refused"),
        ({"gradient_allreduce_op": "sum"}, [], "gradient_allreduce_op: refused"),
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
        (zero(3), ["--compile"], "--compile is refused with ZeRO-3"),
        (zero(3), ["--num-distributed-optimizer-instances", "2"], "instances 2 is not supported with it yet"),
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
        "managed_gradient_accumulation": True,
        "data_types": {"grad_accum_dtype": "fp32", "param_dtype": "auto"},
        **zero(1, zero_hpz_partition_size=1, offload_param={"device": "none", "ratio": 0.5}, compute_grad_norm=True),
    }
    assert given(tmp_path, off)["zero_optimization"] == {"stage": 1}


def test_compiling_goes_with_stages_that_keep_weights_whole(tmp_path: Path) -> None:
    for stage in (0, 1, 2):
        assert given(tmp_path, zero(stage), "--compile")["zero_optimization"]["stage"] == stage


def test_bf16_is_deepspeeds_but_at_stage_0(tmp_path: Path) -> None:
    """There it would sum gradients in bf16, and the layers alone compute in it."""
    for stage in (1, 2, 3):
        made = given(tmp_path, zero(stage), "--bf16")
        assert {key: made[key] for key in BF16} == BF16
    assert not BF16.keys() & given(tmp_path, zero(0), "--bf16").keys()
    assert not BF16.keys() & given(tmp_path, zero(3)).keys()
    made = given(tmp_path, {**zero(2), "bf16": {"enabled": True}, "communication_data_type": "bf16"})
    assert made["communication_data_type"] == "bf16"
    config, notes = parse(tmp_path, {**zero(2), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}})
    assert deepspeed_settings(config, 2)["data_types"] == {"grad_accum_dtype": "bf16"}
    assert any("sums of many micro-batches' gradients lose digits" in note for note in notes)


def test_offloading_is_handed_on(tmp_path: Path) -> None:
    cpu = {"device": "cpu", "pin_memory": True}
    made = given(tmp_path, zero(3, offload_optimizer={**cpu, "ratio": 1.0, "buffer_count": 4}, offload_param=cpu))
    assert made["zero_optimization"] == {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}
    assert made["zero_force_ds_cpu_optimizer"] is False  # DeepSpeed's own wants a compiler
    assert given(tmp_path, zero(2), "--cpu-optimizer")["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    both = given(tmp_path, zero(2, offload_optimizer=cpu), "--cpu-optimizer")
    assert both["zero_optimization"]["offload_optimizer"] == cpu


def test_second_copies_are_of_data_and_context_parallel_ranks(tmp_path: Path) -> None:
    values = zero(3, zero_hpz_partition_size=4)
    made = given(tmp_path, values, "--tensor-model-parallel-size", "2", "--context-parallel-size", "2", ranks=8)
    assert made["zero_optimization"]["zero_hpz_partition_size"] == 4
    assert "must divide the 2 ranks" in refusal(tmp_path, values, "--tensor-model-parallel-size", "2", ranks=4)[0]


def test_one_message_for_the_three_batch_numbers(tmp_path: Path) -> None:
    numbers = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    (line,) = refusal(tmp_path, numbers, ranks=2)
    for part in ("train_batch_size 32", "train_micro_batch_size_per_gpu 4", "gradient_accumulation_steps 2"):
        assert part in line
    assert "--global-batch-size 32 = --micro-batch-size 4 x 4 x 2 ranks" in line
    given(tmp_path, numbers, ranks=4)
    given(tmp_path, numbers, "--tensor-model-parallel-size", "2", ranks=8)
    assert re.search(r"--micro-batch-size 1 x", refusal(tmp_path, numbers, "--micro-batch-size", "1")[0])
    # A batch that grows: the numbers are those of its end.
    given(tmp_path, numbers, "--rampup-batch-size", "16", "16", "64", ranks=4)
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
    with pytest.raises(ValueError, match="--deepspeed-activation-checkpointing: needs --recompute-granularity"):
        parse(tmp_path, MEGATRON_GPT, "--deepspeed-activation-checkpointing")


def test_the_two_flags_go_together() -> None:
    for flags, message in (
        (["--deepspeed"], "--deepspeed: give DeepSpeed's configuration with --deepspeed-config"),
        (["--deepspeed-config", "x.json"], "--deepspeed-config .*x.json: goes with --deepspeed"),
        (["--cpu-optimizer"], "--cpu-optimizer: goes with --deepspeed"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_run_config([*RUN, *flags])[0].validate(1)


def test_a_stored_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be continued from another folder with its config.yaml."""
    write(tmp_path, zero(2))
    monkeypatch.chdir(tmp_path)
    config, _ = parse_run_config([*RUN, "--deepspeed", "--deepspeed_config", "ds.json"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again, _ = parse_run_config(["--config", "../config.yaml"])
    assert again.parallel.sharding == "optim_grads"
    (tmp_path / "ds.json").unlink()
    with pytest.raises(ValueError, match=r"ds\.json: .*keeps a copy of what its run was given: deepspeed_config\.json"):
        parse_run_config(["--config", "../config.yaml"])


def test_every_key_of_deepspeed_has_a_verdict() -> None:
    import_deepspeed(on_cpu=True)
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    asked: set[str] = set()

    class Recorder(dict[str, Any]):
        """Notes which keys it is asked for."""

        def __contains__(self, name: object) -> bool:
            asked.add(str(name))
            return super().__contains__(name)

        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return super().get(name, default)

        def keys(self) -> Any:
            return self

    DeepSpeedConfig(Recorder(train_micro_batch_size_per_gpu=1))
    assert len(asked) > 40
    assert asked - KEYS.keys() == set()
    for model, keys in (
        (DeepSpeedZeroConfig, ZERO_KEYS),
        (DeepSpeedZeroOffloadOptimizerConfig, OFFLOAD_KEYS),
        (DeepSpeedZeroOffloadParamConfig, OFFLOAD_KEYS),
    ):
        fields = set(model.model_fields) | {f.alias for f in model.model_fields.values() if f.alias}
        assert fields - keys.keys() == set()
