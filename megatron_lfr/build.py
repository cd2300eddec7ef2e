"""Makes the parts of a run from its configuration. Each function makes one part of those before it, and writes nothing.

tokenizer -> model's sizes;  corpus, blend -> plan;  ranks -> stages, engine, loader;  plan, journal -> curriculum
"""

from __future__ import annotations

import dataclasses
import os
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
from megatron_lfr.lfr import BaseCurriculum, Blend, Curriculum, CurriculumFollower, Journal, Plan, Schedule, Sharing
from megatron_lfr.lfr.rescoring import Rescore
from megatron_lfr.lfr.scores import check_arrays, used_arrays
from megatron_lfr.lfr.weights import as_begun
from megatron_lfr.model import Llama, ModelConfig
from megatron_lfr.parallel import ParallelState


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


def make_corpus(data: DataConfig) -> BlockDataset:
    """Open the blocks of --data-path."""
    return BlockDataset(data.corpora()[0], data.seq_length, data.split)


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
    for values in arrays.values():
        values.check_corpus(digests, flag)
    try:
        check_arrays(phases, {name: values.values for name, values in arrays.items()}, plan.n_blocks)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    return arrays


def make_plan(
    config: RunConfig,
    n_blocks: int,
    world_size: int | None = None,
    blend: Blend | None = None,
    remembered: Sequence[Any] = (),
) -> Plan:
    """Lay out the schedule over the corpus for `world_size` ranks (by default as many as have been started).
    remembered: the facts of its phases in a run that has begun."""
    lfr = config.lfr
    data_parallel_size = config.parallel.data_parallel_size(world_size or int(os.environ.get("WORLD_SIZE", "1")))
    try:
        phases = as_begun(resolve_schedule(lfr.lfr_schedule).phases, remembered)
        return Schedule(phases).plan(
            n_blocks,
            config.data.seq_length,
            config.training.blocks_per_step(data_parallel_size),
            train_iters=lfr.train_iters,
            train_samples=lfr.train_samples,
            train_epochs=lfr.train_epochs,
            blend=blend,
        )
    except ValueError as error:
        if "--" in str(error):  # names the flag already
            raise
        raise ValueError(f"--lfr-schedule {lfr.lfr_schedule}: {error}") from None


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
    stage.empty_on(parallel.device)
    if initialize_weights:
        stage.init_weights(config.training.seed)
    return DeepSpeedEngine(
        stage,
        config.optimizer,
        parallel,
        settings,
        micro_batch_size=config.training.micro_batch_size,
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
    blend: Blend,
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
        return Curriculum(plan, journal, config.training.seed, rescore, sharing, blend, values)
    assert sharing is not None
    return CurriculumFollower(plan, sharing, rescore)
