"""Opens what a run reads before its ranks meet: tokenizer and corpus, and what follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lfr.build import (
    make_arrays,
    make_corpus,
    make_model_config,
    make_tokenizer,
    make_validation,
)
from megatron_lfr.config import RunConfig
from megatron_lfr.data.corpus.block_values import BlockValues
from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource
from megatron_lfr.data.corpus.documents import settle_documents
from megatron_lfr.data.corpus.tokenizer import Tokenizer
from megatron_lfr.identity import run_identity
from megatron_lfr.learning_rate import LearningRate
from megatron_lfr.lfr import Plan
from megatron_lfr.lfr.main_path import MainPath
from megatron_lfr.model import ModelConfig
from megatron_lfr.parallel.launchers import adopt_launcher
from megatron_lfr.planning import fit_to_plan, make_run_plan
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.training.lengthening import check_frozen


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked, and what it is by that."""

    config: RunConfig
    """The configuration, with `bos` as the corpus has it."""
    tokenizer: Tokenizer | None
    model: ModelConfig
    corpus: BlockDataset
    validation: BlockSource
    """The blocks of --valid-data-path, or of the corpus' share for validation."""
    plan: Plan
    learning_rate: LearningRate
    main_path: MainPath | None
    """Where versions branch off, for a run of --branch-share."""
    arrays: list[Mapping[str, BlockValues]]
    """For each segment, the files of --lfr-scores that its phases use, by name."""
    facts: dict[str, Any]
    """The identity of the run, as from `run_identity`."""

    @property
    def end_step(self) -> int:
        """Number of steps after which the run ends: a main path of --versions ends before its plan does."""
        has_last = self.main_path is not None and self.config.main_path.versions is not None
        return self.main_path.end if self.main_path is not None and has_last else self.plan.total_steps


def open_inputs(config: RunConfig, folder: RunFolder, stored: Plan | None) -> Inputs:
    """Open the tokenizer and the corpus of a valid configuration, and lay out its schedule.

    stored: the plan of the run that is in `folder` so far; None for a new run.

    ValueError or OSError where they cannot be read, or do not fit each other or the configuration.
    """
    tokenizer = make_tokenizer(config.data)
    model = make_model_config(config, tokenizer)
    corpus = make_corpus(config.data, stored)
    assert model.vocab_size is not None
    data = settle_documents(config.data, tokenizer, model.vocab_size, corpus.datasets)
    if data.bos and not config.data.bos and adopt_launcher().rank == 0:
        print("the documents of the corpus begin with the tokenizer's start-of-document token: --bos is on", flush=True)
    config = dataclasses.replace(config, data=data)
    validation = make_validation(data, tokenizer, model.vocab_size) or corpus.valid
    check_frozen(config, folder, stored, corpus)
    plan = make_run_plan(config, corpus, stored)
    config, learning_rate, main_path = fit_to_plan(config, plan)
    begun = [] if stored is None else folder.score_files(len(plan.segments) - 1, config.lfr.lfr_scores)
    arrays = make_arrays(config, corpus.digests, plan, begun)
    facts = run_identity(config, model, tokenizer, corpus, plan, arrays)
    return Inputs(config, tokenizer, model, corpus, validation, plan, learning_rate, main_path, arrays, facts)
