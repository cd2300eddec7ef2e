"""What a benchmark trains on: the corpus of a run, or random tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr.benchmark.options import Options
from megatron_lfr.build import make_arrays, make_corpus, make_model_config, make_tokenizer
from megatron_lfr.config import RunConfig, resolve_schedule
from megatron_lfr.data.corpus.block_values import BlockValues
from megatron_lfr.data.corpus.blocks import BlockSource
from megatron_lfr.data.corpus.tokenizer import Tokenizer
from megatron_lfr.lfr import Plan
from megatron_lfr.model import ModelConfig
from megatron_lfr.planning import make_blend, make_new_plan

NO_CORPUS = "random tokens"


class RandomBlocks(BlockSource):
    """Blocks of random tokens, each a function of its id."""

    def __init__(self, num_blocks: int, seq_length: int, vocab_size: int) -> None:
        super().__init__([], [NO_CORPUS], seq_length)
        self.num_blocks, self._vocab_size = num_blocks, vocab_size
        self.domain_starts = np.array([0, num_blocks], np.int64)

    def read(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        rows = np.zeros((len(np.asarray(ids)), self.seq_length + 1), np.int64)
        for row, block in zip(rows, np.asarray(ids).tolist(), strict=True):
            if block >= 0:
                row[:] = np.random.default_rng(block).integers(0, self._vocab_size, self.seq_length + 1)
        return rows


@dataclass(frozen=True)
class Inputs:
    """What a benchmark reads."""

    tokenizer: Tokenizer | None
    model: ModelConfig
    source: BlockSource
    plan: Plan
    arrays: list[Mapping[str, BlockValues]]


def complete(config: RunConfig, options: Options) -> RunConfig:
    """Fill in what a benchmark does not need of a run: a run folder, in which it writes nothing, a corpus, and the
    run's length where no flag says it."""
    checkpoint = dataclasses.replace(config.checkpoint, save="-", load=None, finetune=False)
    data, lfr = config.data, config.lfr
    if not (data.data_path or data.data_args_path):
        data = dataclasses.replace(data, data_path=[NO_CORPUS], split="1,0,0")
    has_length = any((lfr.train_iters, lfr.train_samples, lfr.train_epochs))
    if not has_length and resolve_schedule(lfr.lfr_schedule).in_shares:
        lfr = dataclasses.replace(lfr, train_iters=3 * options.all_steps)
    return dataclasses.replace(config, checkpoint=checkpoint, data=data, lfr=lfr)


def open_inputs(config: RunConfig, options: Options, world_size: int) -> Inputs:
    """Open the corpus of a valid configuration, or make a random one. ValueError where the run that is configured has
    fewer steps than the benchmark needs."""
    tokenizer = make_tokenizer(config.data)
    model = make_model_config(config, tokenizer)
    if config.data.data_path == [NO_CORPUS]:
        assert model.vocab_size is not None
        batch = config.training.blocks_per_step(config.parallel.data_parallel_size(world_size))
        source: BlockSource = RandomBlocks(
            options.blocks or 3 * options.all_steps * batch, config.data.seq_length, model.vocab_size
        )
        plan = make_new_plan(config, source.num_blocks, world_size)
        arrays: list[Mapping[str, BlockValues]] = [{} for _ in plan.segments]
    elif options.blocks:
        raise ValueError(f"--blocks {options.blocks}: the number of random blocks; --data-path has its own")
    else:
        corpus = make_corpus(config.data)
        source = corpus.train
        plan = make_new_plan(config, source.num_blocks, world_size, make_blend(config, corpus), source.domains)
        arrays = make_arrays(config, corpus.digests, plan)
    if plan.total_steps < options.all_steps:
        raise ValueError(
            f"the run has {plan.total_steps} steps, of which the benchmark needs {options.all_steps}: fewer --steps, "
            "--warmup or --traced-steps, or a longer run"
        )
    return Inputs(tokenizer, model, source, plan, arrays)
