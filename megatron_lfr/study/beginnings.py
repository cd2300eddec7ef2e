"""Beginnings that runs of a study have in common: each is trained once, and the runs fork from it.

Runs that agree in all but their schedules have the same weights and losses until these part. What follows a fork is bit
for bit what each run would have trained by itself, and counts so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lfr.data.corpus.block_values import parse_names
from megatron_lfr.lfr import Phase, PlannedPhase
from megatron_lfr.lfr.identity import OF_LENGTH, describe_phase
from megatron_lfr.lfr.scores import used_arrays
from megatron_lfr.study.budget import plain_phase
from megatron_lfr.study.definition import Settings
from megatron_lfr.study.layout import PlannedRun
from megatron_lfr.study.steps import digest_of

_MAY_DIFFER = ("save", "lfr_schedule", "lfr_scores")
"""Settings that runs with one beginning need not have in common."""


@dataclass(frozen=True)
class Beginning:
    """The first `steps` steps of several runs. key: names it. flops: of a step. after: the key of the shorter
    beginning, of these runs and others, that it goes on from; None: step 0. settings: those of the run that trains it,
    whose last phase is a Learn to the runs' end, since a learning rate follows a run's length. needs: keys of the steps
    before it."""

    key: str
    steps: int
    runs: tuple[str, ...]
    flops: float
    after: str | None
    settings: Settings
    needs: tuple[str, ...]
    folder: Path

    @property
    def result(self) -> Path:
        """The JSON that says that it is trained."""
        return self.folder / "beginning.json"

    @property
    def run(self) -> Path:
        """The folder of the run that trains it."""
        return self.folder / "run"


@dataclass(frozen=True)
class Forks:
    """Which runs fork, and from what.

    runs: the beginning of each, by its name. shorter: that which a beginning goes on from, by its key; None: step 0.
    beginnings: all that may be forked from, by key.
    """

    runs: Mapping[str, Beginning]
    shorter: Mapping[str, Beginning | None]
    beginnings: Mapping[str, Beginning]

    def open(self) -> list[Beginning]:
        """Return the beginnings that are yet to be trained, each after the shorter one that it goes on from."""
        needed: dict[str, Beginning] = {}
        for beginning in self.runs.values():
            while beginning.key not in needed and not beginning.result.exists():
                needed[beginning.key] = beginning
                shorter = self.shorter[beginning.key]
                if shorter is None:
                    break
                beginning = shorter
        return sorted(needed.values(), key=lambda one: one.steps)

    def savings(self) -> list[tuple[Beginning, int, int, float]]:
        """Return, for each beginning in use, (itself, its first step, runs that fork there or later, FLOPs saved)."""
        rows, open_keys = [], {one.key for one in self.open()}
        for key, beginning in self.beginnings.items():
            runs = [name for name in beginning.runs if name in self.runs and self._passes(name, key)]
            if runs:
                shorter = self.shorter[key]
                first = 0 if shorter is None else shorter.steps
                times = len(runs) - (key in open_keys)
                rows.append((beginning, first, len(runs), times * (beginning.steps - first) * beginning.flops))
        return rows

    def _passes(self, run: str, key: str) -> bool:
        """Whether a run forks from this beginning, or from one that goes on from it."""
        at: Beginning | None = self.runs[run]
        while at is not None and at.key != key:
            at = self.shorter[at.key]
        return at is not None


def find_beginnings(runs: Iterable[PlannedRun], output: Path) -> dict[str, Beginning]:
    """Return all beginnings that two or more of these runs have in common, by key, shorter ones first."""
    alike: dict[str, list[PlannedRun]] = {}
    for run in runs:
        alike.setdefault(digest_of(_common(run)), []).append(run)
    return {key: one for group in alike.values() for key, one in _of_group(group, output).items()}


def choose_forks(beginnings: Mapping[str, Beginning], runs: Iterable[PlannedRun]) -> Forks:
    """Choose where these runs, of which nothing is trained yet, fork: each from the longest of its beginnings that is
    trained already, at least in part, or that another one of them needs as well."""
    names, parting = {run.name for run in runs}, list[set[str]]()
    usable: dict[str, Beginning] = {}
    for key, one in reversed(list(beginnings.items())):
        forking = names.intersection(one.runs)
        if one.run.exists() or (len(forking) > 1 and forking not in parting):
            parting.append(forking)
            usable[key] = one
    usable = dict(reversed(list(usable.items())))
    forks = {name: one for one in usable.values() for name in one.runs if name in names}  # the longest is the last
    return Forks(forks, {key: _usable(one.after, beginnings, usable) for key, one in usable.items()}, usable)


def _usable(key: str | None, beginnings: Mapping[str, Beginning], usable: Mapping[str, Beginning]) -> Beginning | None:
    """Return the beginning `key`, or the longest shorter one, that is to be used."""
    while key is not None and key not in usable:
        key = beginnings[key].after
    return None if key is None else usable[key]


def _of_group(runs: Sequence[PlannedRun], output: Path) -> dict[str, Beginning]:
    """Return the beginnings of runs that agree in all but their schedules."""
    shared: list[tuple[int, list[PlannedRun]]] = []
    for cut in sorted({planned.end_step for run in runs for planned in run.plan.phases}, reverse=True):
        alike: dict[str, list[PlannedRun]] = {}
        for run in runs:
            if (phases := _until(run, cut)) is not None:
                alike.setdefault(digest_of(phases), []).append(run)
        known = [members for _, members in shared]  # those that part later
        shared += [(cut, members) for members in alike.values() if len(members) > 1 and members not in known]
    beginnings: dict[str, Beginning] = {}
    for cut, members in reversed(shared):
        names = tuple(run.name for run in members)
        shorter = [key for key, one in beginnings.items() if set(names) <= set(one.runs)]
        beginning = _beginning(members, cut, shorter[-1] if shorter else None, output)
        beginnings[beginning.key] = beginning
    return beginnings


def _common(run: PlannedRun) -> list[Any]:
    """Return what runs that fork from each other have in common."""
    settings = {name: value for name, value in run.settings.items() if name not in _MAY_DIFFER}
    blend = run.plan.segments[0].blend
    return [settings, run.corpus_digests, run.plan.total_steps, dataclasses.asdict(blend)]


def _until(run: PlannedRun, cut: int) -> list[Any] | None:
    """Return what the first `cut` steps of a run are, but for what runs with one beginning have in common; None where
    the run does not go on after them, or its orders there hang on what comes after."""
    if cut >= run.plan.total_steps:
        return None
    phases = [planned for planned in run.plan.phases if planned.first_step < cut]
    facts = []
    for planned in phases:
        steps = min(cut, planned.end_step) - planned.first_step
        if min(planned.samples, steps * planned.global_batch_size) != steps * planned.global_batch_size:
            return None
        if planned.end_step > cut and not _may_end_anywhere(run, planned):
            return None
        described = {name: value for name, value in describe_phase(planned.phase).items() if name not in OF_LENGTH}
        facts.append([described, planned.corpora, steps])
    return [facts, {name: [file, run.file_digests.get(name)] for name, file in _arrays(run, phases).items()}]


def _may_end_anywhere(run: PlannedRun, planned: PlannedPhase) -> bool:
    """Whether a phase has the same order whatever its length, as far as that goes: passes over all blocks."""
    return (
        planned.phase.kind == "learn"
        and planned.phase.counts_equally
        and planned.corpora is None
        and run.plan.segments[0].blend.weights is None
    )


def _arrays(run: PlannedRun, phases: Sequence[PlannedPhase]) -> dict[str, str]:
    """Return the files of the arrays that these phases use, by name."""
    words = run.settings.get("lfr_scores") or []
    files = parse_names([words] if isinstance(words, str) else words, "lfr_scores")
    return {name: str(files[name]) for name in used_arrays(planned.phase for planned in phases)}


def _beginning(members: Sequence[PlannedRun], cut: int, after: str | None, output: Path) -> Beginning:
    first = members[0]
    phases = [planned for planned in first.plan.phases if planned.first_step < cut]
    trained = [
        dataclasses.replace(planned.phase, duration=min(cut, planned.end_step) - planned.first_step, unit="steps")
        for planned in phases
    ]
    rest = Phase("learn", first.plan.total_steps - cut, "steps")
    settings = {
        **first.settings,
        "lfr_schedule": [plain_phase(phase) for phase in (*trained, rest)],
        "lfr_scores": [f"{name}={file}" for name, file in _arrays(first, phases).items()],
        "exit_interval": cut,
    }
    digest = digest_of([_common(first), _until(first, cut)])[:12]
    key = ".".join([first.corpus, first.size, first.rate, f"s{first.seed}", digest])
    folder = output / "beginnings" / key
    return Beginning(
        key=key,
        steps=cut,
        runs=tuple(run.name for run in members),
        flops=first.step_tokens * first.token_flops,
        after=after,
        settings={**settings, "save": str(folder / "run")},
        needs=tuple(need for need in first.needs if all(need in run.needs for run in members)),
        folder=folder,
    )
