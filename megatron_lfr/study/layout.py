"""Lays a study out: its runs, the steps before them, and what each of them computes.

Compute is counted in FLOPs and given in *forward_backward tokens*: tokens that a run's model is trained on. A forward
pass of a token is a third of one. What an arm prepares (a reference model's training, its pass over the corpus) and the
passes of `score: rescored` are taken off its budget, and the steps that remain are trained: the arms of a cell then
have computed the same, up to a step. Evaluations are the same for all arms, and not counted; nor is what no model
computes, such as commonness, whose seconds of CPU are reported beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_lfr.build import make_blend, make_model_config, make_plan, make_tokenizer
from megatron_lfr.commonness.command import CommonnessConfig
from megatron_lfr.config import RunConfig, resolve_schedule
from megatron_lfr.config.run import parse_settings
from megatron_lfr.data.config import DataConfig
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.corpus.documents import settle_documents
from megatron_lfr.data.corpus.tokenizer import Tokenizer
from megatron_lfr.evaluation.tasks import read_task
from megatron_lfr.lfr import Plan
from megatron_lfr.lfr.phase import Phase, largest_remainder
from megatron_lfr.study.clean import cleaned_prefixes
from megatron_lfr.study.definition import Arm, Corpus, Settings, Step, Study
from megatron_lfr.study.fields import Fields
from megatron_lfr.study.labels import kinds_of_blocks

FORWARD = 1 / 3
"""What a forward pass computes of a forward and a backward one, whose backward has two products for each of its own."""

_DEFAULTS: Settings = {"keep_last": 1}
"""Settings of every run that are not given: a study holds many folders."""


@dataclass(frozen=True)
class PlannedStep:
    """A step before runs, which all runs share that need the same one. key: its name and digest. output: what its name
    in braces stands for in settings. settings: those of its run, or flags of its command. needs: keys of the steps
    before it. flops: what a model computes."""

    key: str
    step: Step
    folder: Path
    output: Path
    settings: Settings
    corpus: Corpus
    needs: tuple[str, ...]
    flops: float
    token_flops: float
    seq_length: int


@dataclass(frozen=True)
class Compute:
    """What a run computes, in forward_backward tokens of its model. budget: what it was given."""

    budget: float
    training: float
    rescoring: float
    preparation: float

    @property
    def total(self) -> float:
        return self.training + self.rescoring + self.preparation


@dataclass(frozen=True)
class PlannedRun:
    """A run: an arm at a seed, in a cell (corpus, size, rate). compute_point: the budget as a share of the usual one.
    step_flops: FLOPs of a forward_backward token. digest: of all that its result depends on but the code."""

    name: str
    arm: str
    corpus: str
    size: str
    rate: str
    seed: int
    compute_point: float
    trained_on: Corpus
    settings: Settings
    digest: str
    steps: int
    step_tokens: int
    token_flops: float
    compute: Compute
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
    return Layout(bench.steps, bench.runs)


@dataclass(frozen=True)
class _Cell:
    corpus: Corpus
    size: str
    rate: str


class _Bench:
    """Opens what runs read, once each, and collects what is laid out."""

    def __init__(self, study: Study, output: Path) -> None:
        self.study, self.output = study, output
        self.steps: dict[str, PlannedStep] = {}
        self.runs: dict[str, PlannedRun] = {}
        self.open_corpus = cache(_open_corpus)
        self.open_tokenizer = cache(_open_tokenizer)
        self.check_labels = cache(self._check_labels)
        self.configs: dict[str, RunConfig] = {}
        for path in study.tasks:
            read_task(path)

    def add_run(self, cell: _Cell, arm: Arm, seed: int, point: float) -> None:
        name = ".".join([cell.corpus.name, cell.size, cell.rate, arm.name, f"s{seed}"])
        name += "" if point == 1 else f".x{point:g}"
        if name in self.runs:
            return
        where = f"{self.study.file}: arms: {arm.name} (size {cell.size}, rate {cell.rate})"
        corpus = self.study.corpora[arm.corpus] if arm.corpus else cell.corpus
        outputs, preparation = self._prepare(cell, arm, corpus)
        paths = {step: str(self.steps[key].output) for step, key in outputs.items()}
        settings = self.study.settings_of(cell.size, cell.rate, {"data_path": list(corpus.data_path)}, arm.settings)
        settings = {**_DEFAULTS, **settings, "seed": seed}
        folder = self.output / "runs" / name
        given = {**_substituted(settings, paths), "save": str(folder / "run")}
        if cleaned := [self.steps[key] for key in outputs.values() if self.steps[key].step.kind == "clean"]:
            given["data_path"] = [str(prefix) for prefix in cleaned_prefixes(corpus.data_path, cleaned[-1].output)]
        config = self._config(given, where)
        blocks = self._check_inputs(config, corpus, where)
        token_flops = self._token_flops(config)
        budget = self.study.compute[cell.size] * point
        compute, length = _fit(arm, config, blocks, budget, preparation / token_flops, where)
        identity = {
            "settings": {**settings, **length},
            "steps": list(outputs.values()),
            "corpus": blocks.digests(),
            "held_out": self._held_out(config).digests(),
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
            digest=_digest(identity),
            steps=length["train_iters"],
            step_tokens=config.training.blocks_per_step(1) * config.data.seq_length,
            token_flops=token_flops,
            compute=compute,
            needs=tuple(outputs.values()),
            folder=folder,
        )

    def _prepare(self, cell: _Cell, arm: Arm, corpus: Corpus) -> tuple[dict[str, str], float]:
        """Lay out the steps of an arm. Returns the key of each by its name, and the FLOPs of all of them."""
        keys: dict[str, str] = {}
        for step in arm.prepare:
            where = f"{self.study.file}: arms: {arm.name}: prepare: {step.name}"
            planned = self._step(cell, step, corpus, keys, where)
            self.steps.setdefault(planned.key, planned)
            keys[step.name] = planned.key
        return keys, sum(self.steps[key].flops for key in keys.values())

    def _step(self, cell: _Cell, step: Step, corpus: Corpus, keys: dict[str, str], where: str) -> PlannedStep:
        size, rate = step.size or cell.size, step.rate or cell.rate
        settings = self.study.settings_of(size, rate)
        needs: tuple[str, ...] = (keys[step.of],) if step.of else ()
        data = self._config({**settings, "data_path": list(corpus.data_path), "save": "-"}, where).data
        flops = token_flops = 0.0
        if step.kind == "train":
            settings = {**_DEFAULTS, "lfr_schedule": "uniform", "data_path": list(corpus.data_path), **settings}
            settings |= {key.replace("-", "_"): value for key, value in step.settings.items()}
            config = self._config({**settings, "save": "-"}, where)
            plan = _plan(config, self._blocks(config.data, config.data.corpora()[0], where), where)
            token_flops = self._token_flops(config)
            flops = (plan.total_samples + FORWARD * _rescored(plan)) * plan.seq_length * token_flops
        elif step.kind == "evaluate":
            reference = self._config({**self.steps[needs[0]].settings, "save": "-"}, where)
            if (reference.data.seq_length, reference.data.split) != (data.seq_length, data.split):
                raise ValueError(f"{where}: its model must have the run's seq_length and split, so that blocks agree")
            blocks = self._blocks(data, corpus.data_path, where).train.num_blocks
            token_flops = self._token_flops(reference)
            flops = FORWARD * blocks * data.seq_length * token_flops
            settings = {"data_path": list(corpus.data_path), "split": "train"}
        else:
            settings = {"data_path": list(corpus.data_path), "seq_length": data.seq_length, "split": data.split}
            settings |= {"tokenizer_model": data.tokenizer_model} if data.tokenizer_model else {}
            given = {key.replace("-", "_"): value for key, value in step.settings.items()}
            if step.kind == "commonness":
                Fields(given, where, [field.name for field in dataclasses.fields(CommonnessConfig)])
            settings |= given
        digests = self._blocks(data, corpus.data_path, where).digests()
        seq_length = data.seq_length
        key = f"{step.name}-{_digest([step.kind, settings, needs, digests])[:12]}"
        folder = self.output / "prepared" / key
        result = {"train": "run", "evaluate": "losses.npy", "commonness": "commonness", "clean": "corpus"}[step.kind]
        return PlannedStep(key, step, folder, folder / result, settings, corpus, needs, flops, token_flops, seq_length)

    def _config(self, settings: Settings, where: str) -> RunConfig:
        """Make and check a configuration; those that differ in their seed alone are made once."""
        key = json.dumps({**settings, "seed": 0, "save": "-"}, default=str)
        if key not in self.configs:
            try:
                config = parse_settings(settings, where)
                config.validate(1)
            except ValueError as error:
                text = str(error)
                raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None
            self.configs[key] = config
        return self.configs[key]

    def _blocks(self, data: DataConfig, prefixes: Sequence[str], where: str) -> BlockDataset:
        try:
            return self.open_corpus(tuple(prefixes), data.seq_length, data.split, "--data-path")
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from None

    def _held_out(self, config: RunConfig) -> BlockDataset:
        return self.open_corpus(self.study.held_out, config.data.seq_length, "1", "held_out")

    def _check_inputs(self, config: RunConfig, corpus: Corpus, where: str) -> BlockDataset:
        """Open the corpus of a run; ValueError where it, its labels or the held-out text do not fit the run."""
        data = config.data
        blocks = self._blocks(data, corpus.data_path, where)
        tokenizer = self.open_tokenizer(data.tokenizer_model, data.eod_token)
        vocab_size = make_model_config(config, tokenizer).vocab_size
        assert vocab_size is not None
        try:
            for opened in (blocks, self._held_out(config)):
                settle_documents(data, tokenizer, vocab_size, opened.datasets)
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from None
        if corpus.labels is not None:
            self.check_labels(corpus, data.seq_length, data.split)
        return blocks

    def _check_labels(self, corpus: Corpus, seq_length: int, split: str) -> None:
        assert corpus.labels is not None
        source = self.open_corpus(corpus.data_path, seq_length, split, "--data-path").train
        try:
            kinds_of_blocks(dataclasses.asdict(corpus.labels), corpus.data_path, source, split)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.study.file}: corpora: {corpus.name}: labels: {error}") from None

    def _token_flops(self, config: RunConfig) -> float:
        tokenizer = self.open_tokenizer(config.data.tokenizer_model, config.data.eod_token)
        return make_model_config(config, tokenizer).flops_per_token(config.data.seq_length)


def _fit(
    arm: Arm, config: RunConfig, corpus: BlockDataset, budget: float, preparation: float, where: str
) -> tuple[Compute, Settings]:
    """Return what a run computes within `budget`, and the settings that give it that length."""
    schedule = resolve_schedule(config.lfr.lfr_schedule)
    step_tokens = config.training.blocks_per_step(1) * config.data.seq_length
    rescored = sum(phase.is_rescored for phase in schedule.phases) * corpus.train.num_blocks * corpus.seq_length
    rescoring = FORWARD * rescored
    if not schedule.in_shares and arm.length == "budget":
        plan = _plan(config, corpus, where)
        raise ValueError(
            f"{where}: its schedule has a length of its own ({plan.total_steps} steps), the budget another: say length:"
            " scaled (its phases in these proportions) or length: schedule (as it is, whatever it costs)"
        )
    if not schedule.in_shares and arm.length == "schedule":
        plan = _plan(config, corpus, where)
        steps, lfr = plan.total_steps, {}
        training = float(plan.total_samples * plan.seq_length)
    else:
        steps = int((budget - preparation - rescoring) // step_tokens)
        if steps < len(schedule.phases):
            raise ValueError(
                f"{where}: a budget of {budget:.4g} tokens leaves {steps} steps after {preparation:.4g} for what it "
                f"prepares and {rescoring:.4g} for rescoring; its schedule has {len(schedule.phases)} phases"
            )
        lfr = {} if schedule.in_shares else {"lfr_schedule": _scaled(_plan(config, corpus, where), steps)}
        training = float(steps * step_tokens)
    sized = {**lfr, "train_iters": steps}
    _plan(_with_length(config, lfr, steps), corpus, where)
    return Compute(budget, training, rescoring, preparation), sized


def _with_length(config: RunConfig, lfr: Settings, steps: int) -> RunConfig:
    schedule = json.dumps(lfr["lfr_schedule"]) if lfr else config.lfr.lfr_schedule
    return dataclasses.replace(config, lfr=dataclasses.replace(config.lfr, lfr_schedule=schedule, train_iters=steps))


def _scaled(plan: Plan, steps: int) -> list[dict[str, Any]]:
    """Return the phases of a plan in the same proportions over so many steps."""
    shares = [planned.samples / plan.total_samples for planned in plan.phases]
    lengths = largest_remainder(shares, steps, at_least=1)
    return [
        _short(dataclasses.replace(planned.phase, duration=length, unit="steps"))
        for planned, length in zip(plan.phases, lengths, strict=True)
    ]


def _short(phase: Phase) -> dict[str, Any]:
    """Return a phase as YAML gives it, without what is as by default."""
    plain = dataclasses.asdict(Phase(phase.kind, phase.duration))
    return {k: v for k, v in dataclasses.asdict(phase).items() if k in ("kind", "duration") or v != plain[k]}


def _rescored(plan: Plan) -> int:
    """Return how many blocks a run passes forward to rescore them."""
    return plan.n_blocks * sum(planned.phase.is_rescored for planned in plan.phases)


def _plan(config: RunConfig, corpus: BlockDataset, where: str) -> Plan:
    try:
        return make_plan(config, corpus.train.num_blocks, 1, make_blend(config, corpus))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _open_corpus(prefixes: Sequence[str], seq_length: int, split: str, flag: str) -> BlockDataset:
    return BlockDataset(prefixes, seq_length, split, flag)


def _open_tokenizer(model: str | None, eod_token: str | None) -> Tokenizer | None:
    return make_tokenizer(DataConfig(tokenizer_model=model, eod_token=eod_token))


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


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
