"""Lays a study out: its runs, with the steps before them, and what each of them computes."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lfr.commonness.clean import cleaned_prefixes
from megatron_lfr.lfr import Plan
from megatron_lfr.study.budget import Compute, fit_budget
from megatron_lfr.study.definition import Arm, Corpus, Settings, Study
from megatron_lfr.study.inputs import Inputs
from megatron_lfr.study.steps import DEFAULTS, PlannedStep, Steps, describe_phases, digest_of, flops_of


@dataclass(frozen=True)
class PlannedRun:
    """A run: an arm at a seed, in a cell (corpus, size, rate). compute_point: the budget as a share of the usual one.
    token_flops: FLOPs of a forward_backward token. given_flops: of the files of scores that no step makes, its own and
    those of its steps. corpus_digests: one for each prefix. file_digests: of these files, by name. digest, training: of
    all that its result depends on, and its weights, but the code."""

    name: str
    arm: str
    corpus: str
    size: str
    rate: str
    seed: int
    compute_point: float
    trained_on: Corpus
    settings: Settings
    corpus_digests: tuple[str, ...]
    file_digests: dict[str, str]
    digest: str
    training: str
    steps: int
    plan: Plan
    step_tokens: int
    token_flops: float
    compute: Compute
    given_flops: float
    needs: tuple[str, ...]
    folder: Path

    @property
    def flops(self) -> float:
        return self.compute.total * self.token_flops


@dataclass(frozen=True)
class Layout:
    """All steps by key, in an order in which each follows those it needs, and all runs by name."""

    steps: dict[str, PlannedStep]
    runs: dict[str, PlannedRun]

    @property
    def seq_length(self) -> int:
        """Tokens in a block, of all runs."""
        return next(iter(self.runs.values())).plan.seq_length


def lay_out_study(study: Study, output: Path) -> Layout:
    """Lay out a study whose results go to the folder `output`, and check all that can be checked before it runs.

    ValueError or OSError names the arm and what `train` would refuse, or a budget that is too small.
    """
    bench = _Bench(study, output)
    for block in study.grid:
        for corpus in block.corpora:
            for size in block.sizes:
                for rate in block.rates:
                    for arm in block.arms:
                        points = {1.0, *block.compute_points} if arm == study.reference else {1.0}
                        for seed in block.seeds:
                            for point in sorted(points):
                                bench.add_run(_Cell(study.corpora[corpus], size, rate), study.arms[arm], seed, point)
    _check(study, bench.runs)
    return Layout(bench.steps.planned, bench.runs)


def _check(study: Study, runs: dict[str, PlannedRun]) -> None:
    """Check that runs can be compared, and that the candidate's rule has those that it needs."""
    first = next(iter(runs.values()))
    for run in runs.values():
        if run.plan.seq_length != first.plan.seq_length:
            raise ValueError(
                f"{study.file}: {run.name}: its seq_length is {run.plan.seq_length}, that of {first.name} "
                f"{first.plan.seq_length}; held-out losses are compared block by block, so it must be the same for all"
            )
    if rule := study.candidate:
        for arm, seed in itertools.product(rule.among, rule.seeds):
            name = _run_name(rule.corpus, rule.size, rule.rate, arm, seed)
            if name not in runs:
                raise ValueError(f"{study.file}: candidate: needs the run {name}, which is not in the grid")


def _run_name(corpus: str, size: str, rate: str, arm: str, seed: int) -> str:
    return ".".join([corpus, size, rate, arm, f"s{seed}"])


@dataclass(frozen=True)
class _Cell:
    corpus: Corpus
    size: str
    rate: str


class _Bench:
    """Opens what runs read, once each, and collects what is laid out."""

    def __init__(self, study: Study, output: Path) -> None:
        self.study, self.output = study, output
        self.runs: dict[str, PlannedRun] = {}
        self.inputs = Inputs(study)
        self.steps = Steps(study, output, self.inputs)

    def add_run(self, cell: _Cell, arm: Arm, seed: int, point: float) -> None:
        name = _run_name(cell.corpus.name, cell.size, cell.rate, arm.name, seed)
        name += "" if point == 1 else f".x{point:g}"
        if name in self.runs:
            if self.runs[name].compute_point != point:
                other = self.runs[name].compute_point
                raise ValueError(f"{self.study.file}: compute_points: {point} and {other} are one to six digits")
            return
        where = f"{self.study.file}: arms: {arm.name} (size {cell.size}, rate {cell.rate})"
        corpus = self.study.corpora[arm.corpus] if arm.corpus else cell.corpus
        steps = self.steps.of_arm(arm, corpus, cell.size, cell.rate)
        paths = {name: str(step.output) for name, step in steps.items()}
        settings = self.study.settings_of(cell.size, cell.rate, {"data_path": list(corpus.data_path)}, arm.settings)
        settings = {**DEFAULTS, **settings, "seed": seed}
        folder = self.output / "runs" / name
        given = {**_substituted(settings, paths), "save": str(folder / "run")}
        if cleaned := [step for step in steps.values() if step.step.kind == "clean"]:
            given["data_path"] = [str(prefix) for prefix in cleaned_prefixes(corpus.data_path, cleaned[-1].output)]
            if corpus.labels is not None and corpus.labels.of == "blocks":
                raise ValueError(f"{where}: labels of blocks do not say what a cleaned corpus holds; label documents")
        config = self.inputs.config(given, where)
        if given.pop("lfr_clusters", None) is not None:  # has become one of these
            given["lfr_scores"] = config.lfr.lfr_scores
        blocks = self.inputs.check(config, corpus, where)
        made = {name: (step.output, step.arrays()) for name, step in steps.items()}
        scores = self.inputs.scores(config, None if cleaned else blocks, made, where)
        by_file = flops_of(scores, where)
        for step in steps.values():
            by_file |= step.costs.given
        given_flops = sum(by_file.values())
        token_flops = self.inputs.token_flops(config)
        budget = self.study.compute[cell.size] * arm.compute * point
        prepared = (sum(step.costs.flops for step in steps.values()) + given_flops) / token_flops
        compute, length, plan = fit_budget(arm, config, blocks, budget, prepared, where, bool(cleaned))
        self.inputs.check_plan(config, plan, where)
        self.inputs.check_scores(plan, scores, where)
        file_digests = {name: values.sha256 for name, values in scores.items()}
        training = {
            "settings": {key: value for key, value in {**settings, **length}.items() if key != "lfr_schedule"},
            "schedule": describe_phases(plan),
            "steps": [step.key for step in steps.values()],
            "corpus": blocks.digests(),
        }
        identity = {
            **training,
            **_files(corpus, file_digests),
            "held_out": self.inputs.held_out(config).digests(),
            "tasks": [_file_digest(path) for path in self.study.tasks],
        }
        self.runs[name] = PlannedRun(
            name=name,
            arm=arm.name,
            corpus=cell.corpus.name,
            size=cell.size,
            rate=cell.rate,
            seed=seed,
            compute_point=point,
            trained_on=corpus,
            settings={**given, **length},
            corpus_digests=tuple(blocks.digests()),
            file_digests=file_digests,
            digest=digest_of(identity),
            training=digest_of([training, file_digests]),
            steps=length["train_iters"],
            plan=plan,
            step_tokens=config.training.blocks_per_step(1) * config.data.seq_length,
            token_flops=token_flops,
            compute=compute,
            given_flops=given_flops,
            needs=tuple(step.key for step in steps.values()),
            folder=folder,
        )


def _substituted(value: Any, paths: dict[str, str]) -> Any:
    """Put the outputs of steps in the places of their names in braces, in texts, lists and mappings."""
    if isinstance(value, dict):
        return {key: _substituted(entry, paths) for key, entry in value.items()}
    if isinstance(value, list):
        return [_substituted(entry, paths) for entry in value]
    if isinstance(value, str):
        for name, path in paths.items():
            value = value.replace(f"{{{name}}}", path)
    return value


def _files(corpus: Corpus, scores: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return the digests of the files beside a run's corpus and steps, as a part of its identity, given those of files
    of scores by name."""
    files = {f"lfr_scores {name}": digest for name, digest in scores.items()}
    if corpus.labels is not None:
        files["labels"] = _file_digest(corpus.labels.file)
    return {"files": files} if files else {}


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
