"""What the runs of a study read, opened once each and checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from megatron_lfr.build import check_groups, make_model_config, make_tokenizer, make_validation
from megatron_lfr.commonness.command import CommonnessConfig, check_disjoint
from megatron_lfr.commonness.items import reference_digests
from megatron_lfr.config import RunConfig, run_schedule
from megatron_lfr.config.keys import parse_flags, to_flags
from megatron_lfr.config.run import parse_settings
from megatron_lfr.data.config import DataConfig
from megatron_lfr.data.corpus.block_values import BlockValues, numbers, open_values, parse_names
from megatron_lfr.data.corpus.blocks import BlockDataset, open_prefixes
from megatron_lfr.data.corpus.documents import settle_documents
from megatron_lfr.data.corpus.tokenizer import Tokenizer
from megatron_lfr.evaluation.tasks import encode_task, read_task
from megatron_lfr.lfr import Plan
from megatron_lfr.lfr.functions import check_functions
from megatron_lfr.lfr.scores import check_arrays, used_arrays
from megatron_lfr.planning import fit_to_plan
from megatron_lfr.study.definition import Corpus, Settings, Study
from megatron_lfr.study.fields import Fields
from megatron_lfr.study.labels import kinds_of_blocks

_OF_COMMONNESS = ("output", "cleaned_output", "data_path", "seq_length", "split")
"""Flags of commonness that a study sets itself: its blocks are those of the run."""


class Inputs:
    """Opens configurations, corpora and tokenizers, and keeps them. ValueError begins with the `where` of a call."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._open_corpus = cache(_open_corpus)
        self._open_tokenizer = cache(_open_tokenizer)
        self._open_values = cache(open_values)
        self._digest_trusted = cache(_digest_trusted)
        self._check_labels = cache(self._check_labels_once)
        self._configs: dict[str, RunConfig] = {}
        self._validated: set[str] = set()
        self._check_tasks = cache(self._check_tasks_once)
        if twice := [path for path in study.tasks if study.tasks.count(path) > 1]:
            raise ValueError(f"{study.file}: tasks: {twice[0]} is given twice")
        self._tasks = [read_task(path) for path in study.tasks]

    def config(self, settings: Settings, where: str) -> RunConfig:
        """Make and check a configuration; those that differ in their seed alone are made once."""
        key = json.dumps({**settings, "seed": 0, "save": "-"}, default=str)
        if key not in self._configs:
            config = parse_settings(settings, where)
            try:
                config.validate(1)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            self._configs[key] = config
        return self._configs[key]

    def blocks(self, data: DataConfig, prefixes: Sequence[str], where: str) -> BlockDataset:
        """Open prefixes as the blocks of a run."""
        try:
            return self._open_corpus(tuple(prefixes), data.seq_length, data.split, "--data-path")
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from None

    def held_out(self, config: RunConfig) -> BlockDataset:
        """Open the held-out text in blocks of a run's length."""
        return self._open_corpus(self.study.held_out, config.data.seq_length, "1", "held_out")

    def check(self, config: RunConfig, corpus: Corpus, where: str) -> BlockDataset:
        """Open the corpus of a run; ValueError where it, its labels or the held-out text do not fit the run."""
        data = config.data
        blocks = self.blocks(data, corpus.data_path, where)
        self.check_held_out(corpus.data_path, where)
        try:
            tokenizer = self._open_tokenizer(data.tokenizer_model, data.eod_token)
            vocab_size = make_model_config(config, tokenizer).vocab_size
            assert vocab_size is not None
            settle_documents(data, tokenizer, vocab_size, self.held_out(config).datasets)
            settled = settle_documents(data, tokenizer, vocab_size, blocks.datasets)
            if (key := f"{vocab_size} {settled}") not in self._validated:
                make_validation(settled, tokenizer, vocab_size)
                self._validated.add(key)
            if self._tasks:
                self._check_tasks(data.tokenizer_model, data.eod_token, settled.bos, data.seq_length)
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from None
        if corpus.labels is not None:
            self._check_labels(corpus, data.seq_length, data.split)
        return blocks

    def scores(
        self,
        config: RunConfig,
        blocks: BlockDataset | None,
        made: Mapping[str, tuple[Path, Sequence[Path]]],
        where: str,
    ) -> dict[str, BlockValues]:
        """Open the files of numbers that a run's phases use, but for those that a step makes. ValueError where they are
        not of its blocks. blocks: None of a corpus that is yet to be cleaned. made: by the names of steps, what each
        makes, and the files of numbers in it.
        """
        flag, opened = f"{where}: lfr_scores", {}
        files = parse_names(config.lfr.lfr_scores, flag)
        for name in used_arrays(run_schedule(config.lfr).phases):
            if name not in files:
                raise ValueError(f"{flag}: a phase needs the array {name!r}; given: {', '.join(files) or 'none'}")
            if blocks is None:
                raise ValueError(f"{flag} {name}: is of the corpus before cleaning, which has other blocks")
            if step := next((one for one in made.values() if files[name].is_relative_to(one[0])), None):
                output, arrays = step
                if files[name] not in arrays:
                    legal = ", ".join(str(file.relative_to(output.parent)) for file in arrays)
                    raise ValueError(f"{flag} {name}={files[name]}: of this step, choose from {legal or 'none'}")
                continue
            if "{" in str(files[name]):
                raise ValueError(
                    f"{flag} {name}={files[name]}: the steps to choose from are {', '.join(made) or 'none'}"
                )
            try:
                opened[name] = self._open_values(name, files[name], flag)
            except OSError as error:
                raise ValueError(f"{flag} {name}: {error}") from None
            opened[name].check_corpus(blocks.digests(), flag)
        return opened

    def check_plan(self, config: RunConfig, plan: Plan, where: str) -> None:
        """Check that the settings of a run fit its plan; ValueError names the flag."""
        try:
            fit_to_plan(config, plan)
            check_functions(plan)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def check_scores(self, plan: Plan, scores: dict[str, BlockValues], where: str) -> None:
        """Check that the phases of a run can use the files that `scores` has opened; those that a step makes are not
        there yet."""
        flag = f"{where}: lfr_scores"
        check_groups(plan.segments[0], scores, flag)
        unmade = set(used_arrays(planned.phase for planned in plan.phases)) - scores.keys()
        try:
            check_arrays(plan, numbers([scores]), unmade)
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from None

    def check_held_out(self, prefixes: Sequence[str], where: str) -> None:
        """Check that a text which models learn from is not the one that decides; ValueError names the prefix."""
        try:
            check_disjoint(self.study.held_out, prefixes, "held_out", "data_path")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def check_commonness(self, flags: Settings, settings: Settings, where: str) -> list[str]:
        """Check the flags of a step's commonness, and the settings that they are a part of; return the digests of its
        trusted text."""
        legal = [field.name for field in dataclasses.fields(CommonnessConfig)]
        Fields(flags, where, [name for name in legal if name not in _OF_COMMONNESS])
        argv = to_flags({**settings, "output": "-"}, CommonnessConfig, where)
        config = parse_flags(CommonnessConfig, argv, where)
        flag = "--reference-data-path"
        try:
            config.check_values()
            check_disjoint(config.reference_data_path, config.data_path, flag)
            check_disjoint(self.study.held_out, config.reference_data_path, "held_out", flag)
            return self._digest_trusted(tuple(config.reference_data_path))
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from None

    def _check_labels_once(self, corpus: Corpus, seq_length: int, split: str) -> None:
        assert corpus.labels is not None
        source = self._open_corpus(corpus.data_path, seq_length, split, "--data-path").train
        try:
            kinds_of_blocks(dataclasses.asdict(corpus.labels), corpus.data_path, source, split)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.study.file}: corpora: {corpus.name}: labels: {error}") from None

    def _check_tasks_once(self, model: str | None, eod_token: str | None, bos: bool, seq_length: int) -> None:
        tokenizer = self._open_tokenizer(model, eod_token)
        if tokenizer is None:
            raise ValueError("tasks are text, and need a tokenizer_model")
        for task in self._tasks:
            encode_task(task, tokenizer, seq_length, tokenizer.bos(bos))

    def token_flops(self, config: RunConfig) -> float:
        """Return the FLOPs of a forward_backward token of a run's model."""
        tokenizer = self._open_tokenizer(config.data.tokenizer_model, config.data.eod_token)
        return make_model_config(config, tokenizer).flops_per_token(config.data.seq_length)


def _open_corpus(prefixes: Sequence[str], seq_length: int, split: str, flag: str) -> BlockDataset:
    return BlockDataset(prefixes, seq_length, split, flag)


def _digest_trusted(prefixes: Sequence[str]) -> list[str]:
    return reference_digests(open_prefixes(prefixes, "--reference-data-path"))


def _open_tokenizer(model: str | None, eod_token: str | None) -> Tokenizer | None:
    return make_tokenizer(DataConfig(tokenizer_model=model, eod_token=eod_token))
