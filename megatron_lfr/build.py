"""Makes the parts of a run from its configuration. Each function makes one part of those before it, and writes nothing.

tokenizer -> model's sizes;  ranks -> stages, engine, loader;  plan (planning.py), journal -> curriculum
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron_lfr.config import RunConfig
from megatron_lfr.data.config import DataConfig, parse_blend
from megatron_lfr.data.corpus.block_values import BlockValues, numbers, open_values, parse_names
from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource, parse_split
from megatron_lfr.data.corpus.documents import settle_documents
from megatron_lfr.data.corpus.indexed import first_shared
from megatron_lfr.data.corpus.loader import Loader
from megatron_lfr.data.corpus.tokenizer import Tokenizer, end_of_document, load_tokenizer
from megatron_lfr.engine import Engine, NativeEngine, build_stages, shard_stages
from megatron_lfr.lfr import (
    BaseCurriculum,
    Curriculum,
    CurriculumFollower,
    Journal,
    Plan,
    Sharing,
)
from megatron_lfr.lfr.plan import Segment
from megatron_lfr.lfr.rescoring import Rescore
from megatron_lfr.lfr.scores import check_arrays, used_arrays
from megatron_lfr.model import Decoder, ModelConfig
from megatron_lfr.model.lora import init_adapters
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


def make_corpus(data: DataConfig, stored: Plan | None = None) -> BlockDataset:
    """Open the blocks of --data-path. stored: the plan of the run so far, whose prefixes keep the names of their
    domains."""
    named = [len(segment.blend.sizes) for segment in stored.segments] if stored else []
    return BlockDataset(data.corpora()[0], data.seq_length, data.split, named=named)


def open_validation(data: DataConfig) -> BlockDataset | None:
    """Open the corpus of --valid-data-path, all of which is its training part; None where there is none. ValueError
    where --split holds documents out as well, and for prefixes that are trained on."""
    flag = "--valid-data-path"
    prefixes, weights = parse_blend(data.valid_data_path, flag)
    if not prefixes:
        return None
    if weights is not None:
        raise ValueError(f"{flag}: give prefixes without weights: in validation, every block counts the same")
    if parse_split(data.split)[0] != 1:
        raise ValueError(f"{flag}: --split {data.split} holds a part of --data-path out as well; give --split 100,0,0")
    if (trained := first_shared(prefixes, data.corpora()[0])) is not None:
        raise ValueError(f"{flag} {trained}: is in --data-path, too; its documents would be trained on")
    return BlockDataset(prefixes, data.seq_length, "1", flag)


def make_validation(data: DataConfig, tokenizer: Tokenizer | None, vocab_size: int) -> BlockSource | None:
    """Return the blocks of --valid-data-path, None where that is not given. data: with `bos` as --data-path has it.
    ValueError where its documents differ from those of --data-path in tokenizer, end or start."""
    corpus = open_validation(data)
    if corpus is None:
        return None
    flag = "--valid-data-path"
    try:
        settled = settle_documents(dataclasses.replace(data, bos=False), tokenizer, vocab_size, corpus.datasets)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    if settled.bos != data.bos:
        raise ValueError(
            f"{flag}: either its documents or those of --data-path begin with a start-of-document token, not both"
        )
    return corpus.train


def make_arrays(
    config: RunConfig,
    corpus: Callable[[], Sequence[str]],
    plan: Plan,
    begun: Sequence[Mapping[str, BlockValues]] = (),
) -> list[Mapping[str, BlockValues]]:
    """Map for each segment the files of --lfr-scores that its phases use. corpus: returns the digests of its prefixes.
    begun: the files of the first segments, which keep those. ValueError names the flag for a file of another corpus,
    and for numbers that a phase cannot use."""
    flag = "--lfr-scores"
    files = parse_names(config.lfr.lfr_scores, flag)
    segments = plan.segments[len(begun) :]
    for planned in (planned for segment in segments for planned in segment.phases):
        for name in used_arrays([planned.phase]):
            if name not in files:
                given = ", ".join(files) or "none"
                raise ValueError(f"{flag}: phase {planned.index}: there is no array {name!r}; given: {given}")
    used = [used_arrays(planned.phase for planned in segment.phases) for segment in segments]
    opened = {name: open_values(name, files[name], flag) for name in sorted(set().union(*used))}
    digests = corpus() if opened else []
    for segment, names in zip(segments, used, strict=True):
        for name in names:
            opened[name].check_corpus(digests[: len(segment.blend.sizes)], flag)
        check_groups(segment, opened, flag)
    arrays = [*begun, *({name: opened[name] for name in names} for names in used)]
    try:
        check_arrays(plan, numbers(arrays))
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    return arrays


def check_groups(segment: Segment, opened: Mapping[str, BlockValues], flag: str) -> None:
    """Check that files by which a segment's phases group blocks can say which belong together; ValueError begins with
    `flag`."""
    grouping = {name for p in segment.phases for name in (p.phase.grouped_by, p.phase.clustered_by)}
    for name in sorted(opened.keys() & grouping):
        opened[name].check_groups(flag)


def make_stages(
    config: RunConfig, model: ModelConfig, parallel: ParallelState, initialize_weights: bool
) -> list[Decoder]:
    """Build this rank's part of the model, with its initial weights, or with undefined ones for a checkpoint to
    replace; adapters have their initial weights anyway."""
    stages = _build_stages(config, model, parallel)
    shard_stages(stages, parallel, config.training.seed if initialize_weights else None)
    for stage in stages:
        init_adapters(stage, config.training.seed)
    return stages


def _build_stages(config: RunConfig, model: ModelConfig, parallel: ParallelState) -> list[Decoder]:
    training = config.training
    return build_stages(
        model,
        parallel,
        compute_dtype=torch.bfloat16 if training.bf16 else torch.float32,
        recompute_granularity=training.recompute_granularity,
        compile_layers=training.compile,
        kernels=training.layer_kernels,
        loss=config.loss,
        dropout=config.dropout,
        dropout_seed=training.seed,
        attention_backend=config.attention_backend(parallel.device.type == "cuda"),
        lora=config.lora,
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
        seed=config.training.seed if initialize_weights or config.lora.lora_rank is not None else None,
        draws_base=initialize_weights,
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
    arrays: Sequence[Mapping[str, BlockValues]],
) -> BaseCurriculum:
    """Make the curriculum of a rank that keeps a journal, or a follower for the other ranks.

    sharing: how the ranks agree on one order; None where there is only one rank.
    """
    if journal is not None:
        return Curriculum(plan, journal, config.training.seed, rescore, sharing, numbers(arrays))
    assert sharing is not None
    return CurriculumFollower(plan, sharing, rescore)
