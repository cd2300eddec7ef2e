"""Opens what a run reads before its ranks meet: tokenizer and corpus, and what follows from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_lfr.build import make_arrays, make_blend, make_corpus, make_model_config, make_plan, make_tokenizer
from megatron_lfr.config import RunConfig
from megatron_lfr.config.main_path import check_main_path
from megatron_lfr.data.corpus.block_values import BlockValues
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.corpus.documents import settle_documents
from megatron_lfr.data.corpus.tokenizer import Tokenizer
from megatron_lfr.identity import run_identity
from megatron_lfr.learning_rate import LearningRate
from megatron_lfr.lfr import Blend, Plan
from megatron_lfr.lfr.main_path import MainPath
from megatron_lfr.model import ModelConfig
from megatron_lfr.parallel.launchers import adopt_launcher


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked, and what it is by that."""

    config: RunConfig
    """The configuration, with `bos` as the corpus has it, and the branch points of a main path among the steps to
    retain."""
    tokenizer: Tokenizer | None
    model: ModelConfig
    corpus: BlockDataset
    blend: Blend
    plan: Plan
    learning_rate: LearningRate
    main_path: MainPath | None
    """Where versions leave the run and end; None for a run that is no main path."""
    arrays: dict[str, BlockValues]
    """The files of --lfr-scores that phases use, by name."""
    facts: dict[str, Any]
    """The identity of the run, as from `run_identity`."""

    @property
    def end_step(self) -> int:
        """The run's last step: where the last version leaves a main path, else the plan's end."""
        return self.plan.total_steps if self.main_path is None else self.main_path.end


def open_inputs(config: RunConfig) -> Inputs:
    """Open the tokenizer and the corpus of a valid configuration, and lay out its schedule.

    ValueError or OSError where they cannot be read, or do not fit each other or the configuration.
    """
    tokenizer = make_tokenizer(config.data)
    model = make_model_config(config, tokenizer)
    corpus = make_corpus(config.data)
    assert model.vocab_size is not None
    data = settle_documents(config.data, tokenizer, model.vocab_size, corpus.datasets)
    if data.bos and not config.data.bos and adopt_launcher().rank == 0:
        print("the documents of the corpus begin with the tokenizer's start-of-document token: --bos is on", flush=True)
    config = dataclasses.replace(config, data=data)
    blend = make_blend(config, corpus)
    plan = make_plan(config, corpus.train.num_blocks, blend=blend)
    rate = LearningRate(config.optimizer, plan.total_steps, plan.global_batch_size)
    main_path = config.main_path.lay_out(plan.total_steps)
    if main_path is not None:
        check_main_path(main_path, plan, blend, rate)
        retained = config.checkpoint.retaining(main_path.branch_points)
        config = dataclasses.replace(config, checkpoint=retained)
    config.checkpoint.check_retained(plan.total_steps)
    arrays = make_arrays(config, corpus, plan)
    facts = run_identity(config, model, tokenizer, corpus, plan, blend, arrays)
    return Inputs(config, tokenizer, model, corpus, blend, plan, rate, main_path, arrays, facts)
