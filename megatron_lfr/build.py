"""Makes the parts of a run from its configuration. Each function makes one part of those before it, and writes nothing.

tokenizer -> model's sizes;  corpus, blend -> plan;  ranks -> stages, engine, loader;  plan, journal -> curriculum
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_lfr.config import RunConfig, resolve_schedule
from megatron_lfr.data.config import DataConfig
from megatron_lfr.data.corpus.block_values import BlockValues, open_values, parse_names
from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource
from megatron_lfr.data.corpus.loader import Loader
from megatron_lfr.data.corpus.tokenizer import Tokenizer, end_of_document, load_tokenizer
from megatron_lfr.engine import Engine, NativeEngine, build_stages, shard_stages
from megatron_lfr.learning_rate import LearningRate, LearningRateConfig, first_difference
from megatron_lfr.lfr import (
    BaseCurriculum,
    Blend,
    Curriculum,
    CurriculumFollower,
    Journal,
    Phase,
    Plan,
    Schedule,
    Sharing,
)
from megatron_lfr.lfr.rescoring import Rescore
from megatron_lfr.lfr.scores import check_arrays, used_arrays
from megatron_lfr.lfr.weights import as_begun
from megatron_lfr.model import Llama, ModelConfig
from megatron_lfr.parallel import ParallelState
from megatron_lfr.parallel.launchers import adopt_launcher


def make_tokenizer(data: DataConfig) -> Tokenizer | None:
    """Load the tokenizer of --tokenizer-model; None without the flag. ValueError where a setting needs the
    end-of-document token, and there is none."""
    if data.tokenizer_model is not None:
        tokenizer = load_tokenizer(data.tokenizer_model, data.eod_token)
        end_of_document(tokenizer)
        return tokenizer
    for flag, used in (
        ("--eod-mask-loss", data.eod_mask_loss),
        ("--reset-position-ids", data.reset_position_ids),
        ("--reset-attention-mask", data.reset_attention_mask),
    ):
        if used:
            raise ValueError(f"{flag}: needs --tokenizer-model, which knows the end-of-document token")
    return None


def make_model_config(config: RunConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """Return the sizes of the model. Its vocabulary is as large as the tokenizer's where --vocab-size is not given;
    ValueError where --vocab-size is smaller than that."""
    vocab_size = config.model.vocab_size
    if tokenizer is None:
        if vocab_size is None:
            raise ValueError("give --tokenizer-model or --vocab-size")
        return config.model
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"--tokenizer-model {config.data.tokenizer_model}: its {tokenizer.vocab_size} tokens do not fit into "
            f"--vocab-size {vocab_size}"
        )
    return dataclasses.replace(config.model, vocab_size=vocab_size or tokenizer.vocab_size)


def make_corpus(data: DataConfig, stored: Plan | None = None) -> BlockDataset:
    """Open the blocks of --data-path. stored: the plan of the run so far, whose prefixes keep the names of their
    domains."""
    named = [len(segment.blend.sizes) for segment in stored.segments] if stored else []
    return BlockDataset(data.corpora()[0], data.seq_length, data.split, named=named)


def make_blend(config: RunConfig, corpus: BlockDataset) -> Blend:
    """Return how the prefixes share the samples."""
    return Blend(corpus.train.domain_starts.tolist(), config.data.corpora()[1], config.lfr.lfr_focus_scope)


def make_arrays(config: RunConfig, corpus: BlockDataset, plan: Plan) -> dict[str, BlockValues]:
    """Map the files of --lfr-scores that phases use. ValueError names the flag for a file of another corpus, and for
    numbers that a phase cannot use."""
    flag = "--lfr-scores"
    files, phases = parse_names(config.lfr.lfr_scores, flag), [planned.phase for planned in plan.phases]
    arrays = {name: open_values(name, files[name], flag) for name in used_arrays(phases) if name in files}
    digests = corpus.digests() if arrays else []
    for segment in plan.segments:
        for name in used_arrays(planned.phase for planned in segment.phases):
            if name in arrays:
                arrays[name].check_corpus(digests[: len(segment.blend.sizes)], flag)
    try:
        check_arrays(plan, {name: values.values for name, values in arrays.items()})
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    return arrays


def make_plan(
    config: RunConfig,
    n_blocks: int,
    world_size: int | None = None,
    blend: Blend | None = None,
    past: Plan | None = None,
    names: Sequence[str] = (),
    begun: Sequence[Phase] = (),
) -> Plan:
    """Lay out the schedule over the corpus for `world_size` ranks (by default as many as have been started).

    past: the segments before. The schedule is then that of one more, and lengths are those of the run to its end.
    names: the domains of the corpus. begun: the phases of this segment in a run that has begun.
    """
    lfr = config.lfr
    budgets = _budgets(config, past)
    data_parallel_size = config.parallel.data_parallel_size(world_size or adopt_launcher().world_size)
    try:
        phases = as_begun(resolve_schedule(lfr.lfr_schedule).phases, begun)
        return with_replay(Schedule(phases), lfr.replay).plan(
            n_blocks,
            config.data.seq_length,
            config.training.blocks_per_step(data_parallel_size),
            **budgets,
            blend=blend,
            past=past,
            names=names,
        )
    except ValueError as error:
        if "--" in str(error):  # names the flag already
            raise
        raise ValueError(f"--lfr-schedule {lfr.lfr_schedule}: {error}") from None


def make_run_plan(config: RunConfig, corpus: BlockDataset, stored: Plan | None) -> Plan:
    """Lay out a run. stored: its plan so far, None for a new run. What comes before the last segment stays as it is;
    the flags describe the last one, or one more where they make a run longer that may just go on."""
    blend = make_blend(config, corpus)
    past: Plan | None = None
    begun: tuple[Phase, ...] = ()
    if stored is not None:
        goes_on = _just_goes_on(config, blend, stored)
        segments = len(stored.segments) - (0 if goes_on else 1)
        past = stored.first(segments) if segments else None
        begun = () if goes_on else tuple(planned.phase for planned in stored.segments[-1].phases)
    return make_plan(config, corpus.train.num_blocks, None, blend, past, corpus.train.domains, begun)


def _just_goes_on(config: RunConfig, blend: Blend, stored: Plan) -> bool:
    """Whether a longer --train-iters lengthens a run by a segment: where it ends in one Learn from all blocks, as with
    `uniform`, there is nothing that would have been laid out over the length."""
    steps, last = config.lfr.train_iters, stored.segments[-1]
    phases = tuple(planned.phase for planned in last.phases)
    is_learn = len(phases) == 1 and phases[0].kind == "learn" and last.phases[0].corpora is None
    return (
        steps is not None
        and steps > stored.total_steps
        and config.main_path.versions is None
        and is_learn
        and resolve_schedule(config.lfr.lfr_schedule) == Schedule(phases)
        and Schedule(phases).in_shares
        and list(blend.starts) == list(last.blend.starts)
        and (blend.weights, blend.focus_scope) == (last.blend.weights, last.blend.focus_scope)
    )


def make_learning_rate(config: LearningRateConfig, plan: Plan) -> LearningRate:
    """Return the learning rate of each step. ValueError where a length in samples goes with several batch sizes."""
    sizes = {segment.global_batch_size for segment in plan.segments}
    lengths = {
        name: getattr(config, name) for name in ("lr_warmup_samples", "lr_decay_samples", "lr_wsd_decay_samples")
    }
    if len(sizes) > 1 and (given := [name for name, value in lengths.items() if value]):
        flag = "--" + given[0].replace("_", "-")
        raise ValueError(
            f"{flag} {lengths[given[0]]}: the run has several batch sizes ({', '.join(map(str, sorted(sizes)))}); give "
            f"{flag.replace('samples', 'iters')}"
        )
    return LearningRate(config, plan.total_steps, plan.global_batch_size)


def describe_rate_change(config: LearningRateConfig, before: Plan, after: Plan, step: int) -> str | None:
    """Say how the learning rate goes on at `step` where the plan `after` gives the steps before another one than the
    plan `before`; None where it does not."""
    old, new = make_learning_rate(config, before), make_learning_rate(config, after)
    past = first_difference(old, new, step)
    if past is None:
        return None
    return (
        f"the learning rate follows the run's length: step {past + 1}, which is trained, would have had {new(past):g} "
        f"instead of {old(past):g}; it would go on at {new(step):g} after {old(step - 1):g}"
    )


def with_replay(schedule: Schedule, replay: float) -> Schedule:
    """Return a schedule whose first phase replays this share. ValueError where that is a Focus."""
    if not replay:
        return schedule
    first, *others = schedule.phases
    if first.kind == "focus":
        raise ValueError(f"--replay {replay:g}: the schedule begins with a focus phase, which does not replay")
    return Schedule((dataclasses.replace(first, replay=replay), *others))


def _budgets(config: RunConfig, past: Plan | None) -> dict[str, Any]:
    """Return the lengths that are given, less those of the segments before."""
    lfr = config.lfr
    budgets = {"train_iters": lfr.train_iters, "train_samples": lfr.train_samples, "train_epochs": lfr.train_epochs}
    if past is None:
        return budgets
    if lfr.train_epochs is not None:
        raise ValueError(f"--train-epochs {lfr.train_epochs:g}: give --train-iters, as the run has several segments")
    before = {"train_iters": past.total_steps, "train_samples": past.total_samples}
    for name, length in before.items():
        if (given := budgets[name]) is not None:
            if given <= length:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {given}: must be more than the {length} of the segments before the last one")
            budgets[name] = given - length
    return budgets


def make_stages(
    config: RunConfig, model: ModelConfig, parallel: ParallelState, initialize_weights: bool
) -> list[Llama]:
    """Build this rank's part of the model, with its initial weights, or with undefined ones for a checkpoint to
    replace."""
    stages = _build_stages(config, model, parallel)
    return shard_stages(stages, parallel, config.training.seed if initialize_weights else None)


def _build_stages(config: RunConfig, model: ModelConfig, parallel: ParallelState) -> list[Llama]:
    training = config.training
    return build_stages(
        model,
        parallel,
        compute_dtype=torch.bfloat16 if training.bf16 else torch.float32,
        recompute_granularity=training.recompute_granularity,
        compile_layers=training.compile,
        kernels=training.layer_kernels,
        loss=config.loss,
        attention_backend=config.attention_backend(parallel.device.type == "cuda"),
    )


def make_engine(
    config: RunConfig,
    model: ModelConfig,
    plan: Plan,
    parallel: ParallelState,
    initialize_weights: bool,
    deepspeed: Mapping[str, Any] | None = None,
) -> Engine:
    """Build what trains the model: the native engine, with this rank's part as from `make_stages`, or DeepSpeed's.

    deepspeed: what DeepSpeed is given, from `deepspeed_settings`; None for the native engine.
    """
    if deepspeed is not None:
        return _make_deepspeed_engine(config, model, parallel, initialize_weights, deepspeed)
    return NativeEngine(
        make_stages(config, model, parallel, initialize_weights),
        config.optimizer,
        parallel,
        seq_length=plan.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=plan.global_batch_size,
    )


def _make_deepspeed_engine(
    config: RunConfig,
    model: ModelConfig,
    parallel: ParallelState,
    initialize_weights: bool,
    settings: Mapping[str, Any],
) -> Engine:
    from megatron_lfr.engine.deepspeed import DeepSpeedEngine

    (stage,) = _build_stages(config, model, parallel)
    return DeepSpeedEngine(
        stage,
        config.optimizer,
        parallel,
        settings,
        micro_batch_size=config.training.micro_batch_size,
        seed=config.training.seed if initialize_weights else None,
    )


def make_loader(config: RunConfig, source: BlockSource, tokenizer: Tokenizer | None, parallel: ParallelState) -> Loader:
    """Make the loader that reads this rank's share of each batch, by the run's rules for documents."""
    data = config.data
    return Loader(
        source,
        eod=end_of_document(tokenizer),
        eod_mask_loss=data.eod_mask_loss,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        prefetch=data.prefetch,
        rank=parallel.data_rank,
        ranks=parallel.data_parallel_size,
        pin_memory=parallel.device.type == "cuda",
    )


def make_curriculum(
    config: RunConfig,
    plan: Plan,
    journal: Journal | None,
    sharing: Sharing | None,
    rescore: Rescore,
    arrays: Mapping[str, BlockValues],
) -> BaseCurriculum:
    """Make the curriculum of a rank that keeps a journal, or a follower for the other ranks.

    sharing: how the ranks agree on one order; None where there is only one rank.
    """
    if journal is not None:
        values = {name: named.values for name, named in arrays.items()}
        return Curriculum(plan, journal, config.training.seed, rescore, sharing, values)
    assert sharing is not None
    return CurriculumFollower(plan, sharing, rescore)
