"""Detrended scores in simulated runs, where it is known how hard each block is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from megatron_lfr.lfr import PRESETS, UNRECORDED, Blend, Ledger, Phase, Plan, Schedule, preset
from megatron_lfr.lfr.journal import JournalFiles
from megatron_lfr.lfr.start import start_phase

Doubles = npt.NDArray[np.float64]
Curve = Callable[[Doubles], Doubles]

NO_JOURNAL = JournalFiles(Path("/nowhere"))
"""None of these phases is rescored."""


def power_law(progress: Doubles) -> Doubles:
    return 4 + 6 * (1 + 2000 * progress) ** -0.35


def plateau(progress: Doubles) -> Doubles:
    return 5 + 5 / (1 + np.exp((progress - 0.08) / 0.02)) - 0.5 * progress


def growing(progress: Doubles) -> Doubles:
    return 0.2 + 0.4 * progress


def constant(progress: Doubles) -> Doubles:
    return np.full(len(progress), 0.5)


def shrinking(progress: Doubles) -> Doubles:
    return 0.8 - 0.5 * progress


@dataclass(frozen=True)
class World:
    """A model with a loss for each block, given how often the block was seen before.

    level(progress) + spread(progress) * (difficulty + noise * normal) - by_visit * visits.
    """

    n_blocks: int = 60_000
    batch: int = 64
    epochs: float = 2.5
    level: Curve = power_law
    spread: Curve = growing
    noise: float = 0.6
    by_visit: float = 0.05
    skewness: float = 0.0
    skipped: float = 0.0
    """Share of the steps without a loss."""

    def difficulties(self, rng: np.random.Generator) -> Doubles:
        values = rng.normal(size=self.n_blocks) if not self.skewness else rng.gamma(2, 1, self.n_blocks) * self.skewness
        return (values - values.mean()) / values.std()


@dataclass(frozen=True)
class Boundary:
    """What is known when a Focus begins: the scores, what they drop, and each block's last visit."""

    phase: Phase
    scores: npt.NDArray[np.float32]
    recorded: npt.NDArray[np.float32]
    dropped: npt.NDArray[np.bool_]
    step: npt.NDArray[np.int32]
    last_in_focus: npt.NDArray[np.bool_]
    learn_steps: int
    difficulty: Doubles

    def share_dropped(self, blocks: npt.NDArray[np.bool_]) -> float:
        """In percent."""
        return 100 * float(self.dropped[blocks].mean())

    def by_sixth_of_learn(self) -> list[float]:
        """Share dropped of the blocks last seen in each sixth of Learn that any is left of."""
        edges = [self.learn_steps * k // 6 for k in range(7)]
        sixths = [(self.step >= a) & (self.step < b) for a, b in itertools.pairwise(edges)]
        return [self.share_dropped(sixth) for sixth in sixths if sixth.sum() > 50]

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        return self.step >= 0

    def truly_hard(self) -> npt.NDArray[np.bool_]:
        """Return the hardest 30 % of the blocks that have a score."""
        return self.seen & (self.difficulty >= np.quantile(self.difficulty[self.seen], 0.7))

    def ranks_alike(self, scores: npt.NDArray[np.float32]) -> float:
        """Spearman correlation of scores with the true difficulties."""
        ranks = [np.argsort(np.argsort(values[self.seen])) for values in (scores, self.difficulty)]
        return float(np.corrcoef(*ranks)[0, 1])


@dataclass(frozen=True)
class Run:
    plan: Plan
    ledger: Ledger
    """At the end."""
    boundaries: list[Boundary]
    """Of each Focus."""


def visits_before(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each sample, how often its block was drawn before."""
    by_block = np.argsort(ids, kind="stable")
    new = np.diff(ids[by_block], prepend=-1) != 0
    count = np.empty(len(ids), np.int64)
    count[by_block] = np.arange(len(ids)) - np.maximum.accumulate(np.where(new, np.arange(len(ids)), 0))
    return count


@functools.cache
def simulate(schedule: Schedule, world: World, seed: int = 1) -> Run:
    """Simulate a run of the schedule."""
    rng = np.random.default_rng(seed)
    n, difficulty = world.n_blocks, world.difficulties(rng)
    plan = schedule.plan(n, 8, world.batch, train_epochs=world.epochs if schedule.in_shares else None)
    ledger, visits, last_in_focus = Ledger(n, plan.total_steps), np.zeros(n, np.int64), np.zeros(n, np.bool_)
    boundaries: list[Boundary] = []
    for planned in plan.phases:
        recorded = ledger.recorded_scores()
        started = start_phase(plan, planned, ledger, seed, NO_JOURNAL)
        scores, selection = started.scores, started.selection
        if selection is not None:
            dropped = selection.left_out(scores)
            last = (ledger.step.copy(), last_in_focus.copy())
            learn_steps = plan.phases[0].end_step
            boundaries.append(Boundary(planned.phase, scores, recorded, dropped, *last, learn_steps, difficulty))
        ids = started.order.astype(np.int64)
        at = planned.first_step + np.arange(len(ids)) // world.batch
        progress = at / plan.total_steps
        standing = difficulty[ids] + world.noise * rng.normal(size=len(ids))
        nll = world.level(progress) + world.spread(progress) * standing
        nll = np.maximum(nll - world.by_visit * (visits[ids] + visits_before(ids)), 0.0).astype(np.float32)
        nll[(rng.random(plan.total_steps) < world.skipped)[at]] = UNRECORDED
        ledger.record_phase(planned.first_step, world.batch, ids, nll)
        counted = ids[nll != UNRECORDED]
        visits += np.bincount(counted, minlength=n)
        last_in_focus[counted] = planned.phase.kind == "focus"
    return Run(plan, ledger, boundaries)


def detrended(schedule: Schedule) -> list[int]:
    """Which of a schedule's Focus phases drop by detrended scores."""
    return [k for k, p in enumerate([p for p in schedule.phases if p.kind == "focus"]) if p.score == "detrended"]


PHASES = [(name, number) for name in PRESETS for number in detrended(preset(name))]


def check(boundary: Boundary, margin: float = 0.03) -> None:
    """Check that Focus drops blocks whenever they were seen, and that the score knows more than the recorded loss, by
    `margin` at least."""
    sixths = boundary.by_sixth_of_learn()
    assert max(sixths) - min(sixths) < 5, sixths
    hard, in_focus = boundary.truly_hard(), boundary.last_in_focus
    if in_focus.any():
        assert boundary.share_dropped(hard & in_focus) < boundary.share_dropped(hard & ~in_focus) + 3
    assert boundary.ranks_alike(boundary.scores) > boundary.ranks_alike(boundary.recorded) + margin


def test_presets_use_detrended_scores() -> None:
    assert {name for name, _ in PHASES} == {"lfr", "static", "focus-only"}


@pytest.mark.parametrize(("name", "number"), PHASES)
def test_what_a_focus_drops_does_not_depend_on_when_it_was_seen(name: str, number: int) -> None:
    check(simulate(preset(name), World()).boundaries[number])


def by_perplexity(schedule: Schedule) -> Schedule:
    """Return a schedule whose blocks weigh exp(loss) in each Focus, as they did in the first presets."""
    phases = schedule.phases
    return Schedule(tuple(replace(one, weights="perplexity") if one.kind == "focus" else one for one in phases))


EAGER = Schedule(
    tuple(
        replace(phase, least_scored=0.0, passes="anew") if phase.kind == "focus" else phase
        for phase in preset("lfr").phases
    )
)
"""`lfr` whose Focus phases do not wait for the end of the first pass."""
NEW_PASSES = Schedule(tuple(replace(phase, passes="anew") for phase in EAGER.phases))
"""And whose Reviews begin new passes, as they did before they could go on."""
WORLDS = {
    "large batches": World(level=plateau, spread=constant, batch=512),
    "much noise": World(spread=shrinking, noise=1.2),
    "unseen blocks": World(skewness=1.0, epochs=1.0, by_visit=0.15),
    "skewed to the easy side": World(skewness=-1.0, skipped=0.05),
    "small batches": World(level=plateau, batch=8, n_blocks=20_000),
}


@pytest.mark.parametrize("name", WORLDS)
def test_other_curves_and_difficulties(name: str) -> None:
    for boundary in simulate(NEW_PASSES, WORLDS[name]).boundaries:
        check(boundary)
    for boundary in simulate(EAGER, WORLDS[name]).boundaries:
        check(boundary, 0.025 if name == "much noise" else 0.03)


def test_a_focus_of_many_passes() -> None:
    """Repeated visits in one phase, and a Focus after a Focus."""
    schedule = Schedule(
        (
            Phase("learn", 1),
            Phase("focus", 2.5, "passes", drop=0.7, sampling="choice", score="detrended"),
            Phase("focus", 3, "passes", drop=0.5, selection="clusters", sampling="visits", score="detrended"),
            Phase("focus", 1, "passes", drop=0.5, score="detrended"),
        )
    )
    for boundary in simulate(schedule, World()).boundaries:
        check(boundary)


@pytest.mark.parametrize(
    ("schedule", "world", "tolerance"),
    [
        (preset("lfr"), World(by_visit=0.0), 0.1),
        (preset("lfr"), World(by_visit=0.0, noise=1.2), 0.1),
        (by_perplexity(NEW_PASSES), World(by_visit=0.0, skewness=1.0), 0.25),  # the regression is not quite a line
        (NEW_PASSES, World(by_visit=0.0, skewness=1.0), 0.27),
        (preset("lfr"), World(by_visit=0.0, skewness=1.0), 0.27),
        (preset("focus-only"), World(by_visit=0.0), 0.25),  # what the first Focus did not draw again has another luck
    ],
)
def test_a_focus_is_measured_against_the_losses_of_all_blocks(
    schedule: Schedule, world: World, tolerance: float
) -> None:
    """Its blocks are harder than all, and less so than their scores said: they were chosen for their luck too."""
    run = simulate(schedule, world)
    curves, progress = run.ledger.references[0].curves(), np.arange(run.plan.total_steps) / run.plan.total_steps
    spread = world.spread(progress) * np.hypot(1, world.noise)
    error, ratio = (curves.location - world.level(progress)) / spread, curves.spread / spread
    for planned in run.plan.phases:
        steps = slice(planned.first_step, planned.end_step)
        assert abs(float(error[steps].mean())) < tolerance, planned
        assert abs(float(ratio[steps].mean()) - 1) < tolerance, planned


@pytest.mark.parametrize("batch", [1, 8])
def test_a_run_of_few_blocks(batch: int) -> None:
    """A small run with a steep start, over many seeds: its windows hold several steps each."""
    world = World(n_blocks=2914, batch=batch, epochs=1.0, level=plateau)
    runs = [simulate(EAGER, world, seed) for seed in range(12)]
    for number in (0, 1):
        sixths = np.mean([run.boundaries[number].by_sixth_of_learn() for run in runs], axis=0)
        assert np.ptp(sixths) < 5, sixths


def test_the_scale_is_that_of_the_loss_now() -> None:
    """Detrended scores are the losses that the model would have at the end of Learn."""
    world = World(noise=0.0, by_visit=0.0)
    boundary = simulate(preset("lfr"), world).boundaries[0]
    now = np.array([0.4])
    expected = world.level(now) + world.spread(now) * boundary.difficulty[boundary.seen]
    error = boundary.scores[boundary.seen] - expected
    assert abs(float(error.mean())) < 0.02
    assert float(error.std()) < 0.2 * float(expected.std())


def test_unseen_blocks_have_no_score() -> None:
    boundary = simulate(EAGER, World(epochs=1.0, n_blocks=5000)).boundaries[0]
    np.testing.assert_array_equal(np.isnan(boundary.scores), ~boundary.seen)
    assert 0.5 < float((~boundary.seen).mean()) < 0.7


def plain_losses(n: int, salt: int) -> npt.NDArray[np.float32]:
    """Losses made of integers alone, the same on every machine."""
    return ((np.arange(1, n + 1, dtype=np.int64) * 2654435761 + salt) % 65521 / 8192 + 1).astype(np.float32)


def test_scores_are_the_same_bits_everywhere() -> None:
    plan = by_perplexity(preset("focus-only")).plan(3000, 8, 16, train_epochs=2.5)
    ledger, digest = Ledger(3000, plan.total_steps), hashlib.sha256()
    for planned in plan.phases:
        order = start_phase(plan, planned, ledger, 1, NO_JOURNAL).order
        digest.update(ledger.detrended_scores().astype("<f4").tobytes())
        ledger.record_phase(planned.first_step, 16, order, plain_losses(planned.samples, planned.index))
    assert digest.hexdigest()[:16] == "e48f682a47982710"


def test_a_focus_by_rescored_losses_is_accounted_for() -> None:
    """Standings in a Focus that was drawn by scores from elsewhere, which the records do not know."""
    rng = np.random.default_rng(2)
    n, batch = 20_000, 64
    difficulty = rng.normal(size=n)

    def nll(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return (4 + 0.5 * (difficulty[ids] + 0.6 * rng.normal(size=len(ids)))).astype(np.float32)

    ledger, everything = Ledger(n, 1000), rng.permutation(n)
    ledger.record_phase(0, batch, everything, nll(everything))
    rescored = nll(np.arange(n))
    first_step = -(-n // batch)
    ledger.begin_phase(first_step, focus=True, scores=rescored)
    hard = rng.permutation(np.flatnonzero(rescored > np.quantile(rescored, 0.7)))
    ledger.record_phase(first_step, batch, hard, nll(hard))
    location, spread = ledger.references[0].curves().level
    assert location == pytest.approx(4, abs=0.08)
    assert spread == pytest.approx(0.5 * np.hypot(1, 0.6), rel=0.08)


@pytest.mark.parametrize("turns", [0.0, 2.0], ids=["difficulties that stay", "difficulties that change"])
def test_a_focus_by_improvement_is_accounted_for(turns: float) -> None:
    """It selects blocks that stand lower now than before, by luck or since the model has learned them: the mean of all
    blocks is not theirs."""
    rng, n, batch = np.random.default_rng(0), 20_000, 64
    schedule = Schedule((Phase("learn", 2.3), Phase("focus", 0.6, drop=0.5, score="improvement")))
    plan = schedule.plan(n, 8, batch)
    steps = np.arange(plan.total_steps)
    mean = 4 + 2 * np.exp(-steps / 300)
    ledger, first, second = Ledger.of(plan), rng.normal(size=n), rng.normal(size=n)
    for planned in plan.phases:
        ids = start_phase(plan, planned, ledger, 1, NO_JOURNAL).order
        at = planned.first_step + np.arange(planned.samples) // batch
        angle = turns * at / plan.total_steps
        difficulty = np.cos(angle) * first[ids] + np.sin(angle) * second[ids]
        nll = mean[at] + 0.5 * (difficulty + 0.6 * rng.normal(size=len(ids)))
        ledger.record_phase(planned.first_step, batch, ids, nll.astype(np.float32))
    curves, focus = ledger.references[0].curves(), slice(plan.phases[1].first_step, None)
    assert float((curves.location - mean)[focus].mean()) == pytest.approx(0, abs=0.03)
    assert float(curves.spread[focus].mean()) == pytest.approx(0.5 * np.hypot(1, 0.6), rel=0.04)


def test_a_focus_after_a_blend_is_measured_against_the_blend() -> None:
    """A small hard corpus makes half of what Learn draws, and a tenth of the blocks that Focus chooses from."""
    rng, blend, batch = np.random.default_rng(3), Blend([0, 2000, 20_000], [1.0, 1.0]), 64
    difficulty = rng.normal(size=20_000) + np.where(np.arange(20_000) < 2000, 2.0, 0.0)
    schedule = Schedule((Phase("learn", 0.8), Phase("focus", 0.5, drop=0.5, score="detrended")))
    plan = schedule.plan(20_000, 8, batch, blend=blend)
    ledger = Ledger.of(plan)
    for planned in plan.phases:
        order = start_phase(plan, planned, ledger, 1, NO_JOURNAL).order
        nll = 4 + 0.5 * (difficulty[order] + 0.6 * rng.normal(size=len(order)))
        ledger.record_phase(planned.first_step, batch, order, nll.astype(np.float32))
    steps = ledger.references[0].curves().location[plan.phases[1].first_step :]
    assert float(steps.mean()) == pytest.approx(4 + 0.5 * 1.0, abs=0.1)


@pytest.mark.parametrize("focus", [False, True])
def test_degenerate_records_give_finite_scores(focus: bool) -> None:
    for losses in ([3.0], [3.0] * 40, [0.0, 1e30, 3e38, 5.0]):
        ledger = Ledger(64, 100)
        ids = np.arange(len(losses))
        ledger.record(0, ids, np.float32(losses))
        ledger.begin_phase(1, focus)
        assert np.isfinite(ledger.detrended_scores()[ids]).all()
        ledger.record(1, ids[::2], np.float32(losses)[::2])
        ledger.record(2, ids[:1], np.float32([UNRECORDED]))
        ledger.begin_phase(3, focus)
        ledger.record(3, np.array([63]), np.float32([2.0]))  # without a record before
        scores = ledger.detrended_scores()
        assert np.isfinite(scores[ids]).all()
        assert np.isfinite(scores[63])
        assert np.isnan(scores[62])


def test_worlds_differ() -> None:
    """The simulation itself: what is asserted above fails for the recorded loss."""
    boundary = simulate(preset("lfr"), World()).boundaries[0]
    recorded = dataclasses.replace(boundary, dropped=boundary.recorded < np.nanmedian(boundary.recorded))
    sixths = recorded.by_sixth_of_learn()
    assert max(sixths) - min(sixths) > 40
