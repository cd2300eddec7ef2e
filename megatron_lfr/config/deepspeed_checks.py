"""Whether a DeepSpeed configuration and a run's own settings fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_lfr.config.deepspeed_stated import BATCH, STRATEGIES, Stated, given

if TYPE_CHECKING:
    from megatron_lfr.config.run import RunConfig


def disagreements(config: RunConfig, stated: Sequence[Stated]) -> list[str]:
    """Return a line for each setting of which the file says something else than the run."""
    problems = []
    for setting in stated:
        if setting.key in BATCH:
            continue  # batch_problems names all three of them at once
        sharding = setting.field == "data_parallel_sharding_strategy"
        ours = config.parallel.sharding if sharding else getattr(getattr(config, setting.section), setting.field)
        if ours != setting.value:
            flag = f"--{setting.field.replace('_', '-')}"
            problems.append(f"{setting.key} stands for {flag} {setting.value}, and the run has {flag} {ours}")
    return problems


def batch_problems(values: Mapping[str, Any], config: RunConfig, ranks: int) -> list[str]:
    """Return one message on all three numbers where any of them disagrees."""
    micro, data_parallel_size = config.training.micro_batch_size, config.parallel.data_parallel_size(ranks)
    total = config.training.blocks_per_step(data_parallel_size)
    ours = dict(zip(BATCH, (total, micro, total / (micro * data_parallel_size)), strict=True))
    numbers = {name: size for name in BATCH if (size := given(values, name)) is not None}
    if all(size == ours[name] for name, size in numbers.items()):
        return []
    listed = ", ".join(f"{name} {size}" for name, size in numbers.items())
    return [
        f"{listed}: do not fit. train_batch_size must be train_micro_batch_size_per_gpu x gradient_accumulation_steps "
        f"x data-parallel ranks, and the run has --global-batch-size {total} = --micro-batch-size {micro} x "
        f"{ours[BATCH[2]]:g} x {data_parallel_size} ranks; correct one of them, or write auto"
    ]


def memory_problems(values: Mapping[str, Any], config: RunConfig, ranks: int) -> list[str]:
    """Return what does not fit of offloading, of second copies of the weights, and of the dtype of gradients."""
    zero, stage, problems = values.get("zero_optimization", {}), STRATEGIES.index(config.parallel.sharding), []
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = given(zero.get(name) or {}, "device")
        if device not in (None, "none", "cpu"):
            problems.append(f"zero_optimization.{name}.device {device!r}: must be none or cpu; NVMe is not supported")
        elif device == "cpu" and stage < lowest:
            problems.append(f"zero_optimization.{name}: needs ZeRO-{lowest}{' or higher' if lowest == 1 else ''}")
    size, shards = given(zero, "zero_hpz_partition_size"), ranks // config.parallel.model_parallel_size
    shards *= config.parallel.context_parallel_size
    if size not in (None, 0, 1) and stage < 3:
        problems.append(f"zero_optimization.zero_hpz_partition_size {size}: needs ZeRO-3")
    elif size not in (None, 0, 1) and (size != int(size) or shards % size):
        problems.append(
            f"zero_optimization.zero_hpz_partition_size {size}: must divide the {shards} ranks that share the weights"
        )
    return problems + _dtype_problems(values, config, stage)


def _dtype_problems(values: Mapping[str, Any], config: RunConfig, stage: int) -> list[str]:
    dtypes, problems = values.get("data_types") or {}, []
    if not isinstance(dtypes, dict):
        return ["data_types: expected an object of keys and values"]
    for name, dtype in dtypes.items():
        if name != "grad_accum_dtype" and dtype not in (None, "auto"):
            problems.append(f"data_types.{name}: refused: --bf16 alone says what is computed in which dtype")
    dtype = given(dtypes, "grad_accum_dtype")
    if dtype not in (None, "fp32", "bf16"):
        problems.append(f"data_types.grad_accum_dtype {dtype!r}: must be fp32, bf16 or auto")
    if dtype == "bf16" and not (config.training.bf16 and stage):
        problems.append("data_types.grad_accum_dtype 'bf16': needs --bf16 and ZeRO-1 or higher")
    return problems


def scope_problems(config: RunConfig) -> list[str]:
    """Return what DeepSpeed's engine does not do."""
    layout, problems = config.parallel, []
    if layout.pipeline_model_parallel_size > 1:
        problems.append(
            f"--pipeline-model-parallel-size {layout.pipeline_model_parallel_size} is refused; the native engine runs "
            "pipelines with ZeRO-1: drop --deepspeed, add --data-parallel-sharding-strategy optim"
        )
    if config.deepspeed.cpu_optimizer and layout.sharding == "no_shard":
        problems.append("--cpu-optimizer needs ZeRO-1 or higher: zero_optimization.stage, or --zero-stage")
    if config.training.compile and layout.sharding == "optim_grads_params":
        problems.append(
            "--compile is refused with ZeRO-3, which gathers weights inside of what is compiled; take ZeRO-2, or drop "
            "--deepspeed"
        )
    for flag, value, legal in (
        ("--num-distributed-optimizer-instances", layout.num_distributed_optimizer_instances, 1),
        ("--layer-kernels", config.training.layer_kernels, "torch"),
        ("--adam-kernel", config.optimizer.adam_kernel, "torch"),
    ):
        if value != legal:
            problems.append(f"{flag} {value} is not supported with it yet; the native engine has it: drop --deepspeed")
    return problems
