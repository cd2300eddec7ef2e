"""What a run prints before its first step, and the settings that it puts in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_lfr.config import RunConfig
from megatron_lfr.data.corpus.block_values import BlockValues, describing, parse_names
from megatron_lfr.identity import describe_changes, recorded_settings
from megatron_lfr.lfr.main_path import MainPath
from megatron_lfr.model import ModelConfig
from megatron_lfr.model.attention import describe
from megatron_lfr.model.fused import describe_layers
from megatron_lfr.model.lora import adapter_parameters
from megatron_lfr.parallel import ParallelState, ranks
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.training.start import Start, checkpoint_bytes
from megatron_lfr.training.trainer import Trainer


def announce(
    config: RunConfig,
    folder: RunFolder,
    model: ModelConfig,
    parallel: ParallelState,
    start: Start,
    trainer: Trainer,
    arrays: Sequence[Mapping[str, BlockValues]],
) -> None:
    """Put the settings of a run that is about to train in force, and print what a user should know about it."""
    put_in_force(config, folder, start, trainer.end_step, len(trainer.plan.segments))
    training = config.training
    print(describe_layers(parallel.device.type, training.compile, training.layer_kernels), flush=True)
    print(describe_attention(config, parallel), flush=True)
    if config.lora.lora_rank is not None:
        origin = f"; they start as those of --lora-load {config.lora.lora_load}" if start.adapters else ""
        print(describe_adapters(config, model) + origin, flush=True)
    if left_out := sum(trainer.train_source.left_out):
        print(f"{left_out:,} blocks in which nothing is trained on, by the loss mask, are left out", flush=True)
    for line in notes_on_scores(config, arrays):
        print(line, flush=True)
    if note := trainer.patience.expect(checkpoint_bytes(model, config.lora), ranks.world_size()):
        print(note, flush=True)
    blocks = trainer.valid_source.num_blocks
    if trainer.validation.blocks < blocks:
        print(
            f"evaluations use {trainer.validation.blocks:,} of the {blocks:,} validation blocks "
            f"(--eval-iters {config.training.eval_iters}; None uses all)",
            flush=True,
        )


def put_in_force(config: RunConfig, folder: RunFolder, start: Start, end_step: int, segments: int) -> None:
    """Write the settings into the run folder, and print what changes for a run that was in it. Of a finished run, only
    where its files of scores are now is written."""
    settings, defaults = recorded_settings(config), RunConfig().to_flat()
    changes = folder.changes(settings, start.step, defaults) if start.checkpoint else {}
    if start.step >= end_step:
        if folder.move_scores(config.lfr.lfr_scores, start.step, defaults, segments):
            changes.pop("lfr_scores", None)
        note = f"; these settings have no effect any more: {describe_changes(changes)}" if changes else ""
        print(f"{folder.path} is finished at step {start.step}{note}", flush=True)
        return
    changed = describe_changes(changes)
    if start.checkpoint:
        is_used_up = config.checkpoint.finetune and config.lora.lora_rank is None
        origin = f" (--load {config.checkpoint.load} was only used at its start)" if is_used_up else ""
        print(f"continuing {folder.path} at step {start.step} of {end_step}{origin}", flush=True)
    if start.discarded:
        print(
            f"{folder.path}: its run was stopped before its first checkpoint and starts anew; the "
            f"{start.discarded} losses in its journal, and its metrics.jsonl, are discarded",
            flush=True,
        )
    if changed:
        print(f"settings that change from step {start.step} on: {changed}", flush=True)
    folder.write_settings(settings, start.step, defaults, segments)


def notes_on_scores(config: RunConfig, arrays: Sequence[Mapping[str, BlockValues]]) -> list[str]:
    """Describe what a user should know about the files of --lfr-scores, of which `arrays` are those that each segment
    uses."""
    unused = parse_names(config.lfr.lfr_scores, "--lfr-scores").keys() - set().union(*arrays)
    notes = [f"--lfr-scores {name}: no phase of the schedule uses it" for name in sorted(unused)]
    for name, values in arrays[-1].items():
        if values.description is None:
            notes.append(
                f"--lfr-scores {name}={values.path}: no {describing(values.path).name} says of which corpus; that its "
                "numbers are of these blocks, in this order, is taken on trust"
            )
    return notes


def describe_branches(path: MainPath, folder: Path) -> str:
    """Describe in one line where the versions of a finished main path leave it."""
    points, ends = (", ".join(map(str, steps)) for steps in (path.branch_points, path.ends))
    return (
        f"{folder}: versions 1 to {path.versions} leave after steps {points} and end after {ends}: "
        f"megatron-lfr branch --from {folder} --version I --lr-decay-style STYLE --save NEW"
    )


def describe_adapters(config: RunConfig, model: ModelConfig) -> str:
    """Describe the adapters of a run in one line."""
    count, targets = adapter_parameters(model, config.lora), " ".join(config.lora.targets(model))
    return (
        f"adapters of rank {config.lora.lora_rank} ({targets}): {count:,} weights are trained, the "
        f"{model.num_parameters():,} of --load {config.checkpoint.load} stay as they are"
    )


def describe_attention(config: RunConfig, parallel: ParallelState) -> str:
    """Describe the attention of a run in one line."""
    heads = config.model.num_attention_heads // config.parallel.tensor_model_parallel_size
    return describe(
        config.attention_backend(parallel.device.type == "cuda"),
        rows=config.training.micro_batch_size,
        seq_length=config.data.seq_length,
        context_ranks=config.parallel.context_parallel_size,
        has_documents=config.data.reset_attention_mask,
        has_window=config.model.window(config.data.seq_length) is not None,
        is_compiled=config.training.compile,
        itemsize=2 if config.training.bf16 else 4,
        dropout_heads=heads if config.dropout.attention_dropout else 0,
    )
