"""The schedule of a run: a list of phases, and the plan that it becomes for one corpus and batch size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lfr.lfr.blend import Blend
from megatron_lfr.lfr.coverage import Coverage
from megatron_lfr.lfr.phase import MOST_SAMPLES, MOST_STEPS, Phase, largest_remainder
from megatron_lfr.lfr.plan import Plan, append_segment
from megatron_lfr.lfr.scope import Scope
from megatron_lfr.lfr.second_visits import check_second_visits

_BUDGETS = ("--train-iters", "--train-samples", "--train-epochs")


@dataclass(frozen=True)
class Schedule:
    """An ordered list of phases."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("a schedule needs at least one phase")
        shares = [phase.duration for phase in self.phases if phase.unit == "share"]
        if shares and len(shares) != len(self.phases):
            raise ValueError("either every phase of a schedule is a share, or none is")
        if shares and not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError(f"the shares of the phases must sum to 1, not {sum(shares):g}")
        first = self.phases[0]
        if first.kind == "focus" and not first.scores_all:
            raise ValueError(
                "phase 0: a schedule cannot begin with focus: no block has a score yet (or use score: rescored or "
                "file:NAME)"
            )

    @property
    def in_shares(self) -> bool:
        return self.phases[0].unit == "share"

    @staticmethod
    def from_dicts(rows: Sequence[Mapping[str, Any]]) -> Schedule:
        """Build a schedule from plain mappings, as a YAML file holds them; unknown keys are refused."""
        legal = [field.name for field in dataclasses.fields(Phase)]
        phases = []
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(f"phase {number}: expected a mapping with keys {', '.join(legal)}, got {row!r}")
            unknown = [key for key in row if key not in legal]
            if unknown:
                raise ValueError(f"phase {number}: unknown key {unknown[0]!r}; legal keys: {', '.join(legal)}")
            missing = [key for key in ("kind", "duration") if key not in row]
            if missing:
                raise ValueError(f"phase {number}: {missing[0]} is missing")
            try:
                phases.append(Phase(**row))
            except (TypeError, ValueError) as error:
                raise ValueError(f"phase {number}: {error}") from None
        return Schedule(tuple(phases))

    def to_dicts(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(phase) for phase in self.phases]

    def plan(
        self,
        n_blocks: int,
        seq_length: int,
        global_batch_size: int,
        *,
        train_iters: int | None = None,
        train_samples: int | None = None,
        train_epochs: float | None = None,
        blend: Blend | None = None,
        past: Plan | None = None,
        names: Sequence[str] = (),
        at_most: bool = False,
    ) -> Plan:
        """Lay the schedule out over a corpus of `n_blocks` blocks.

        At most one budget may be given. It is required where durations are shares; otherwise `train_iters` or
        `train_samples` must agree with the sum of the phases. blend: how corpora share the samples; by default, every
        block counts the same. past: the segments before, whose blocks are the first of the corpus; the schedule and the
        budget are then those of one more segment. names: those of the corpora, for scopes. at_most: the corpus may turn
        out to have fewer blocks, so that nothing is refused because blocks come too seldom. ValueError names a phase
        whose order could not be made.
        """
        if n_blocks < 1:
            raise ValueError("the corpus has no block to train on")
        blend = blend or Blend([0, n_blocks])
        if blend.starts[-1] != n_blocks:
            raise ValueError(f"the blend has {blend.starts[-1]} blocks, but the corpus has {n_blocks}")
        budgets = dict(zip(_BUDGETS, (train_iters, train_samples, train_epochs), strict=True))
        given = [flag for flag, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(budgets)}, not {' and '.join(given)}")
        corpora = self._corpora(blend, past, names)
        if self.in_shares:
            if not given:
                raise ValueError(f"the schedule's phases are shares of the run: give one of {', '.join(budgets)}")
            samples = self._samples_of_total(n_blocks, global_batch_size, train_iters, train_samples, train_epochs)
        else:
            samples = self._samples_of_durations(seq_length, global_batch_size, blend, past, corpora)
        plan = append_segment(past, self.phases, samples, corpora, blend, seq_length, global_batch_size)
        _check_scored(plan, past)
        if not at_most:
            check_second_visits(plan)
        if not self.in_shares:
            _check_budget(plan, train_iters, train_samples, train_epochs)
        if max(samples) > MOST_SAMPLES:
            most = max(samples)
            raise ValueError(f"phase {samples.index(most)}: trains on {most} blocks, more than {MOST_SAMPLES}")
        if plan.total_steps > MOST_STEPS:
            raise ValueError(f"a run of {plan.total_steps} steps: at most {MOST_STEPS}")
        return plan

    def _corpora(self, blend: Blend, past: Plan | None, names: Sequence[str]) -> list[tuple[int, ...] | None]:
        """Return the numbers of the corpora that each phase is about; None for all of them."""
        old = 0 if past is None else len(past.segments[-1].blend.sizes)
        corpora = []
        for index, phase in enumerate(self.phases):
            try:
                corpora.append(_in_scope(phase, index == 0, len(blend.sizes), old, names))
            except ValueError as error:
                raise ValueError(f"phase {index}: {error}") from None
        return corpora

    def _samples_of_durations(
        self,
        seq_length: int,
        global_batch_size: int,
        blend: Blend,
        past: Plan | None,
        corpora: Sequence[tuple[int, ...] | None],
    ) -> list[int]:
        coverage = _coverage_of(past)
        coverage.begin_segment(blend)
        samples = []
        for index, (phase, chosen) in enumerate(zip(self.phases, corpora, strict=True)):
            n_blocks = blend.starts[-1] if chosen is None else Scope(blend, chosen).n_blocks
            try:
                kept = coverage.kept(phase, chosen) if phase.kind == "focus" and phase.unit == "passes" else n_blocks
                samples.append(phase.samples(n_blocks, seq_length, global_batch_size, kept))
            except ValueError as error:
                raise ValueError(f"phase {index}: {error}") from None
            coverage.add(phase, samples[-1], chosen)
        return samples

    def _samples_of_total(
        self,
        n_blocks: int,
        global_batch_size: int,
        train_iters: int | None,
        train_samples: int | None,
        train_epochs: float | None,
    ) -> list[int]:
        if train_iters is not None:  # full steps, so that the total is exactly what was asked for
            flag, total, unit = f"--train-iters {train_iters}", train_iters, global_batch_size
        elif train_samples is not None:
            flag, total, unit = f"--train-samples {train_samples}", train_samples, 1
        else:
            assert train_epochs is not None
            if not 0 < train_epochs * n_blocks <= MOST_SAMPLES:
                raise ValueError(
                    f"--train-epochs {train_epochs:g}: must be positive, and at most {MOST_SAMPLES} blocks"
                )
            flag, total, unit = f"--train-epochs {train_epochs:g}", round(train_epochs * n_blocks), 1
        if total < len(self.phases):
            raise ValueError(f"{flag}: too short for the schedule's {len(self.phases)} phases")
        return [part * unit for part in largest_remainder([p.duration for p in self.phases], total, at_least=1)]


def check_effect(phases: Sequence[Phase]) -> None:
    """Raise ValueError for a phase with a value that has no effect. Those of runs that have begun may have some."""
    for number, phase in enumerate(phases):
        is_focus = phase.kind == "focus"
        for needed, is_given, keys in (
            ("kind focus", is_focus, ("selection", "sampling", "score", "unseen", "weights")),
            ("selection clusters", is_focus and phase.selection == "clusters", ("clusters", "cluster_by")),
            ("guard", phase.guarded_by is not None, ("guard_gain",)),
            ("weight", phase.weighted_by is not None, ("weight_power", "weight_cap")),
        ):
            for key in () if is_given else keys:
                value = getattr(phase, key)
                if value != getattr(Phase, key):
                    raise ValueError(f"phase {number}: {key} {value}: has no effect without {needed}")


def _in_scope(phase: Phase, is_first: bool, corpora: int, old: int, names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the numbers of the corpora in a phase's scope, of which the first `old` are not new; None for all."""
    chosen: tuple[int, ...] | None = None
    if phase.scope == "new" or (phase.scope == "auto" and is_first and phase.kind == "learn" and old < corpora):
        if old == corpora:
            raise ValueError("scope new: the segment has no new blocks")
        chosen = tuple(range(old, corpora))
    elif isinstance(phase.scope, tuple):
        if unknown := [name for name in phase.scope if name not in names]:
            raise ValueError(f"scope {unknown[0]!r}: choose from {', '.join(map(repr, names)) or 'all, new'}")
        chosen = tuple(sorted({names.index(name) for name in phase.scope}))
    if chosen is not None and len(chosen) == corpora:
        chosen = None
    if phase.replay and chosen is None:
        raise ValueError(f"replay {phase.replay:g}: the phase is about all blocks, so that there are no others")
    return chosen


def _coverage_of(past: Plan | None) -> Coverage:
    coverage = Coverage()
    for segment in past.segments if past else ():
        coverage.begin_segment(segment.blend)
        for planned in segment.phases:
            coverage.add(planned.phase, planned.samples, planned.corpora)
    return coverage


def _check_scored(plan: Plan, past: Plan | None) -> None:
    """Raise ValueError for a Focus in the last segment before which no block of its scope has been trained on. Where
    each corpus is ranked by itself, one without a score is sampled uniformly, and by `least_scored` a Review is."""
    coverage, segment = _coverage_of(past), plan.segments[-1]
    coverage.begin_segment(segment.blend)
    for planned in segment.phases:
        phase = planned.phase
        needs_score = phase.kind == "focus" and phase.scores_seen and not phase.least_scored
        if needs_score and segment.blend.focus_scope == "global" and not coverage.most_scored(planned.corpora):
            raise ValueError(
                f"phase {planned.index}: no block in its scope has a score yet, as no phase before it trains on them: "
                "begin with a learn phase over them, or use score: rescored or file:NAME"
            )
        coverage.add(phase, planned.samples, planned.corpora)


def with_length(plan: Plan, train_iters: int) -> Plan:
    """Return a plan that ends at step `train_iters`: the segment that has this step, or the last one, gets another
    length, and none comes after it. ValueError where its phases have a length of their own."""
    index = plan.at_step(min(train_iters, plan.total_steps) - 1).segment
    segment, past = plan.segments[index], plan.first(index) if index else None
    schedule = Schedule(tuple(planned.phase for planned in segment.phases))
    steps, batch = train_iters - segment.phases[0].first_step, segment.global_batch_size
    samples = [planned.samples for planned in segment.phases]
    if schedule.in_shares:
        samples = schedule._samples_of_total(segment.n_blocks, batch, steps, None, None)
    corpora = [planned.corpora for planned in segment.phases]
    new = append_segment(past, schedule.phases, samples, corpora, segment.blend, plan.seq_length, batch)
    _check_scored(new, past)
    check_second_visits(new)
    if not schedule.in_shares:
        _check_budget(new, steps, None, None)
    return new


def _check_budget(plan: Plan, train_iters: int | None, train_samples: int | None, train_epochs: float | None) -> None:
    phases = plan.segments[-1].phases
    steps, samples = sum(planned.steps for planned in phases), sum(planned.samples for planned in phases)
    if train_epochs is not None:
        raise ValueError("--train-epochs scales a schedule given in shares; this one gives absolute lengths")
    if train_iters is not None and train_iters != steps:
        raise ValueError(f"--train-iters {train_iters}: differs from the schedule's total of {steps} steps")
    if train_samples is not None and train_samples != samples:
        raise ValueError(f"--train-samples {train_samples}: differs from the schedule's total of {samples}")
