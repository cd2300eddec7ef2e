"""The steps before a study's runs: models that are trained, their losses, commonness, cleaned corpora."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lfr.commonness.junk import RULE
from megatron_lfr.commonness.results import array_file, block_arrays
from megatron_lfr.data.corpus.block_values import BlockValues
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.lfr import Plan
from megatron_lfr.lfr.identity import describe_phase
from megatron_lfr.study.budget import FORWARD, plan_run, rescored_blocks
from megatron_lfr.study.definition import Arm, Corpus, Settings, Step, Study
from megatron_lfr.study.inputs import Inputs

DEFAULTS: Settings = {"keep_last": 1}
"""Settings of every run that are not given: a study holds many folders."""


@dataclass(frozen=True)
class Costs:
    """token_flops: FLOPs of a forward_backward token of the step's model. flops: all that the step computes. given:
    those of the files of scores that its model is trained with, by the SHA-256 of each."""

    token_flops: float = 0.0
    flops: float = 0.0
    given: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedStep:
    """A step before runs, which all runs share that need the same one. key: its name and digest. output: what its name
    in braces stands for in settings. settings: those of its run, or flags of its command. needs: keys of the steps
    before it."""

    key: str
    step: Step
    folder: Path
    output: Path
    settings: Settings
    corpus: Corpus
    needs: tuple[str, ...]
    costs: Costs
    seq_length: int

    def arrays(self) -> list[Path]:
        """Return the files with a number for each block of the corpus that the step makes."""
        if self.step.kind == "evaluate":
            return [self.output]
        if self.step.kind == "commonness":
            names = block_arrays(bool(self.settings.get("reference_data_path")))
            return [self.output / array_file("block", name) for name in names]
        return []


class Steps:
    """Lays out the steps of arms, of which each is done once for all runs that need the same one. planned: by key."""

    def __init__(self, study: Study, output: Path, inputs: Inputs) -> None:
        self.study, self.output, self.inputs = study, output, inputs
        self.planned: dict[str, PlannedStep] = {}

    def of_arm(self, arm: Arm, corpus: Corpus, size: str, rate: str) -> dict[str, PlannedStep]:
        """Lay out the steps of an arm, by name. size, rate: those of its runs."""
        steps: dict[str, PlannedStep] = {}
        for step in arm.prepare:
            where = f"{self.study.file}: arms: {arm.name}: prepare: {step.name}"
            planned = self._step(step, corpus, step.size or size, step.rate or rate, steps, where)
            steps[step.name] = self.planned.setdefault(planned.key, planned)
        return steps

    def _step(
        self, step: Step, corpus: Corpus, size: str, rate: str, before: dict[str, PlannedStep], where: str
    ) -> PlannedStep:
        settings = self.study.settings_of(size, rate)
        source = before[step.of] if step.of else None
        data = self.inputs.config({**settings, "data_path": list(corpus.data_path), "save": "-"}, where).data
        opened = self.inputs.blocks(data, corpus.data_path, where)
        costs = Costs()
        made_of: list[Any] = []
        if step.kind == "train":
            settings = {**DEFAULTS, "lfr_schedule": "uniform", "data_path": list(corpus.data_path), **settings}
            settings |= step.settings
            opened, costs, made_of = self._training(step.name, settings, where)
        elif step.kind == "evaluate":
            assert source is not None
            reference = self.inputs.config({**source.settings, "save": "-"}, where)
            if (reference.data.seq_length, reference.data.split) != (data.seq_length, data.split):
                raise ValueError(f"{where}: its model must have the run's seq_length and split, so that blocks agree")
            token_flops = self.inputs.token_flops(reference)
            costs = Costs(token_flops, FORWARD * opened.train.num_blocks * data.seq_length * token_flops)
            settings = {"data_path": list(corpus.data_path), "split": "train"}
        else:
            settings = {"data_path": list(corpus.data_path), "seq_length": data.seq_length, "split": data.split}
            settings |= {"tokenizer_model": data.tokenizer_model} if data.tokenizer_model else {}
            settings |= step.settings
            if step.kind == "commonness":
                made_of = self.inputs.check_commonness(step.settings, settings, where)
        needs = () if source is None else (source.key,)
        key = f"{step.name}-{digest_of([step.kind, settings, needs, opened.digests() + made_of])[:12]}"
        folder = self.output / "prepared" / (f"{key}-rule{RULE}" if step.kind in ("commonness", "clean") else key)
        result = {"train": "run", "evaluate": "losses.npy", "commonness": "commonness", "clean": "corpus"}[step.kind]
        return PlannedStep(key, step, folder, folder / result, settings, corpus, needs, costs, data.seq_length)

    def _training(self, name: str, settings: Settings, where: str) -> tuple[BlockDataset, Costs, list[Any]]:
        """Check the training of a model as that of a run; return its corpus, what it costs, and what it is made of."""
        config = self.inputs.config({**settings, "save": "-"}, where)
        blocks = self.inputs.check(config, Corpus(name, tuple(config.data.corpora()[0]), None), where)
        scores = self.inputs.scores(config, blocks, {}, where)
        plan = plan_run(config, blocks, where)
        self.inputs.check_plan(config, plan, where)
        self.inputs.check_scores(plan, scores, where)
        token_flops = self.inputs.token_flops(config)
        tokens = (plan.total_samples + FORWARD * rescored_blocks(plan)) * plan.seq_length
        costs = Costs(token_flops, tokens * token_flops, flops_of(scores, where))
        return blocks, costs, [*describe_phases(plan), *(values.sha256 for values in scores.values())]


def describe_phases(plan: Plan) -> list[dict[str, Any]]:
    """Return what a schedule amounts to, as a part of an identity: a preset may mean something else in another version,
    and a file be changed."""
    return [describe_phase(planned.phase) for planned in plan.phases]


def digest_of(value: Any) -> str:
    """Return the SHA-256 of lists and mappings of numbers and texts."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def flops_of(scores: dict[str, BlockValues], where: str) -> dict[str, float]:
    """Return the FLOPs that files of scores took, by the SHA-256 of each: one under several names counts once."""
    return {values.sha256: values.flops(f"{where}: lfr_scores") for values in scores.values()}
