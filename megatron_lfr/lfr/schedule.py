"""The schedule of a run: a list of phases, and the plan that it becomes for one corpus and batch size."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from megatron_lfr.lfr.coverage import Coverage
from megatron_lfr.lfr.scores import COPIES, check_score, split_score
from megatron_lfr.lfr.weights import NO_WEIGHT, CountedCopies, Weights, check_weighting

if TYPE_CHECKING:
    from megatron_lfr.lfr.blend import Blend

Kind = Literal["learn", "focus", "review"]
Unit = Literal["epochs", "passes", "steps", "tokens", "share"]
SelectionMode = Literal["threshold", "clusters"]
Sampling = Literal["passes", "visits", "choice"]
Unseen = Literal["auto", "keep", "exclude"]

CLUSTERS = (2, 63)
"""Fewest and most clusters of a k-means; csrc accepts no more."""
MOST_SAMPLES = 2**40 - 1
"""Most samples of a phase; csrc makes no longer orders."""
MOST_STEPS = 2**31 - 1
"""Most steps of a run: the ledger counts them in 32 bits."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "kind": get_args(Kind),
    "unit": get_args(Unit),
    "selection": get_args(SelectionMode),
    "sampling": get_args(Sampling),
    "unseen": get_args(Unseen),
    "weights": get_args(Weights),
    "copies": get_args(CountedCopies),
}
_NUMBERS = ("duration", "drop", "clusters", "drop_hardest", "explore", "weight_power", "weight_cap")


@dataclass(frozen=True)
class Phase:
    """A phase of Learn-Focus-Review. Learn and Review train on every block, in a new random order.

    The fields from `drop` to `explore` shape a Focus and are ignored by the other kinds; `weight` and its two numbers
    are for all kinds, `copies` is for Learn and Review.
    """

    kind: Kind
    duration: float
    unit: Unit = "epochs"
    """epochs: of the whole corpus. passes: over what the phase keeps, unseen blocks too where it keeps them. steps:
    optimizer steps. tokens. share: of the run's total, which is then given by --train-iters, --train-samples or
    --train-epochs."""
    drop: float = 0.0
    """Share of the scored blocks that Focus leaves out, the easiest first; in [0, 1)."""
    selection: SelectionMode = "threshold"
    """threshold: drop exactly that share (LFR v1). clusters: drop whole clusters of a 1-D k-means on the score while
    at most that share is dropped (LFR v2; k-means on the score is our choice)."""
    sampling: Sampling = "passes"
    """passes: each kept block once a pass (v1). visits: block i floor(e_i) or ceil(e_i) times, e_i proportional to
    its weight. choice: weighted without replacement."""
    score: str = "recorded"
    """recorded: loss when last trained on (the paper). detrended: what that amounts to now, when the model has
    changed since (ours; see `Ledger.detrended_scores`). rescored: loss in a forward-only pass over the corpus before
    the phase (ours). shuffled: the detrended ones, dealt to the scored blocks at random: a control that drops and
    repeats as often, but not by difficulty. file:NAME: the numbers of an array from outside of the run, higher is
    harder. excess:NAME: the detrended score less that number, where the array holds a reference model's losses."""
    unseen: Unseen = "auto"
    """What Focus does with blocks that have no score yet. auto: threshold keeps them, clusters excludes them."""
    clusters: int = 8
    """Number of clusters of the k-means."""
    drop_hardest: float = 0.0
    """Share of the scored blocks that Focus leaves out, the hardest first, beside `drop`; both together below 1."""
    weights: Weights = "auto"
    """How much a kept block weighs in visits and choice. uniform: all the same. capped: 1 up to the score that 5 % of
    the kept are below, 3 from that of 95 % on, linear between. perplexity: exp(score), up to the 99.9 % quantile. auto:
    capped; uniform where sampling is passes."""
    explore: float = 0.0
    """Share of the samples, in [0, 1), that give their positions to blocks drawn at random from all."""
    weight: str = NO_WEIGHT
    """file:NAME: blocks count in proportion to the numbers of that array, also in Learn and Review, where each is
    visited floor(e_i) or ceil(e_i) times; 0 leaves a block out."""
    weight_power: float = 1.0
    """Power to which `weight` is raised, before it is capped; below 1, weights are more alike."""
    weight_cap: float = 4.0
    """Most that a weight counts for, in multiples of the mean weight."""
    copies: CountedCopies = "all"
    """How often a block that there are n of counts in a pass of Learn and Review: once, 1 + floor(log2 n) times, or n
    times (all); each copy has its turn. The array named copies says which blocks are copies of each other."""

    @property
    def score_mode(self) -> str:
        """What the score is made of, without the name of an array."""
        return split_score(self.score)[0]

    @property
    def scored_by(self) -> str | None:
        """The name of the array that the score needs; None without one."""
        return split_score(self.score)[1] if self.kind == "focus" else None

    @property
    def weighted_by(self) -> str | None:
        """The name of the array of `weight`; None without one."""
        return split_score(self.weight)[1]

    @property
    def grouped_by(self) -> str | None:
        """The name of the array that says which blocks are copies; None where the phase does not need it."""
        return None if self.copies == "all" else COPIES

    @property
    def weighting(self) -> str:
        """What `weights` means with this sampling."""
        if self.weights != "auto":
            return self.weights
        return "uniform" if self.sampling == "passes" else "capped"

    @property
    def counts_equally(self) -> bool:
        """Whether every block counts the same, but for its score."""
        return self.weighted_by is None and self.grouped_by is None

    @property
    def is_rescored(self) -> bool:
        """Whether every block is rescored before the phase."""
        return self.kind == "focus" and self.score == "rescored"

    @property
    def scores_all(self) -> bool:
        """Whether every block has a score, whether it has been trained on or not."""
        return self.is_rescored or (self.kind == "focus" and self.score_mode == "file")

    def __post_init__(self) -> None:
        for name, legal in _CHOICES.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"phase {name} {getattr(self, name)!r}: choose from {', '.join(legal)}")
        check_score(self.score)
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if name == "clusters" else (int, float)):
                raise ValueError(f"phase {name} {value!r}: must be a {'whole ' * (name == 'clusters')}number")
        if not (math.isfinite(self.duration) and self.duration > 0):
            raise ValueError(f"phase duration {self.duration}: must be a positive number of {self.unit}")
        if self.unit in ("steps", "tokens") and self.duration != int(self.duration):
            raise ValueError(f"phase duration {self.duration}: must be a whole number of {self.unit}")
        if not 0.0 <= self.drop < 1.0:
            raise ValueError(f"phase drop {self.drop}: must be at least 0 and below 1")
        check_weighting(self)
        if self.kind != "focus" and self.drop:
            raise ValueError(f"phase drop {self.drop}: only a focus phase drops blocks, but this one is {self.kind}")
        if not CLUSTERS[0] <= self.clusters <= CLUSTERS[1]:
            raise ValueError(f"phase clusters {self.clusters}: must lie between {CLUSTERS[0]} and {CLUSTERS[1]}")

    @property
    def keeps_unseen(self) -> bool:
        return self.unseen == "keep" or (self.unseen == "auto" and self.selection == "threshold")

    def samples(self, n_blocks: int, seq_length: int, global_batch_size: int, kept: int) -> int:
        """Return the number of samples of the phase. kept: how many blocks a drop of exactly `drop` leaves; a pass
        visits each of them once. The selection may keep a few more or fewer, but the number of samples stays.
        ValueError for more than MOST_SAMPLES."""
        match self.unit:
            case "epochs":
                exact = self.duration * n_blocks
            case "passes":
                exact = self.duration * kept
            case "steps":
                exact = self.duration * global_batch_size
            case "tokens":
                exact = math.ceil(self.duration / seq_length)
            case "share":
                raise ValueError("a phase given as a share has no absolute length")
        if exact > MOST_SAMPLES:
            raise ValueError(f"duration {self.duration:g} {self.unit}: {exact:g} blocks, more than {MOST_SAMPLES}")
        return max(1, round(exact))


@dataclass(frozen=True)
class PlannedPhase:
    """A phase laid out in its run: `samples` samples in `steps` optimizer steps from `first_step` on."""

    index: int
    phase: Phase
    samples: int
    first_step: int
    steps: int

    @property
    def end_step(self) -> int:
        return self.first_step + self.steps


@dataclass(frozen=True)
class Plan:
    """A schedule laid out for one corpus and batch size, so that the length of every phase is known at start."""

    phases: tuple[PlannedPhase, ...]
    n_blocks: int
    seq_length: int
    global_batch_size: int

    @property
    def total_steps(self) -> int:
        return self.phases[-1].end_step

    @property
    def total_samples(self) -> int:
        return sum(planned.samples for planned in self.phases)

    def samples_before(self, step: int) -> int:
        """Return how many samples the first `step` optimizer steps train on."""
        size = self.global_batch_size
        return sum(min(phase.samples, max(0, step - phase.first_step) * size) for phase in self.phases)

    def at_step(self, step: int) -> PlannedPhase:
        """Return the phase that optimizer step `step` (from 0) belongs to."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside the plan's {self.total_steps} steps")
        return self.phases[bisect.bisect_right([p.first_step for p in self.phases], step) - 1]


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
    ) -> Plan:
        """Lay the schedule out over a corpus of `n_blocks` blocks.

        At most one budget may be given. It is required where durations are shares; otherwise `train_iters` or
        `train_samples` must agree with the sum of the phases. blend: the curriculum's blend, needed where its corpora
        have weights and a duration is given in passes. ValueError names a phase whose order could not be made.
        """
        if n_blocks < 1:
            raise ValueError("the corpus has no block to train on")
        budgets = {
            "--train-iters": train_iters,
            "--train-samples": train_samples,
            "--train-epochs": train_epochs,
        }
        given = [flag for flag, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(budgets)}, not {' and '.join(given)}")
        if self.in_shares:
            if not given:
                raise ValueError(f"the schedule's phases are shares of the run: give one of {', '.join(budgets)}")
            samples = self._samples_of_total(n_blocks, global_batch_size, train_iters, train_samples, train_epochs)
        else:
            samples = self._samples_of_durations(n_blocks, seq_length, global_batch_size, blend)
        plan = lay_out(self.phases, samples, n_blocks, seq_length, global_batch_size)
        if not self.in_shares:
            _check_budget(plan, train_iters, train_samples, train_epochs)
        if max(samples) > MOST_SAMPLES:
            most = max(samples)
            raise ValueError(f"phase {samples.index(most)}: trains on {most} blocks, more than {MOST_SAMPLES}")
        if plan.total_steps > MOST_STEPS:
            raise ValueError(f"a run of {plan.total_steps} steps: at most {MOST_STEPS}")
        return plan

    def _samples_of_durations(
        self, n_blocks: int, seq_length: int, global_batch_size: int, blend: Blend | None
    ) -> list[int]:
        coverage = Coverage(n_blocks, blend)
        samples = []
        for index, phase in enumerate(self.phases):
            try:
                kept = coverage.kept(phase) if phase.kind == "focus" and phase.unit == "passes" else n_blocks
                samples.append(phase.samples(n_blocks, seq_length, global_batch_size, kept))
            except ValueError as error:
                raise ValueError(f"phase {index}: {error}") from None
            coverage.add(phase, samples[-1])
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


def lay_out(
    phases: Sequence[Phase], samples: Sequence[int], n_blocks: int, seq_length: int, global_batch_size: int
) -> Plan:
    """Lay out phases one after another, given the samples of each."""
    planned, first_step = [], 0
    for index, (phase, count) in enumerate(zip(phases, samples, strict=True)):
        steps = -(-count // global_batch_size)
        planned.append(PlannedPhase(index, phase, count, first_step, steps))
        first_step += steps
    return Plan(tuple(planned), n_blocks, seq_length, global_batch_size)


def _check_budget(plan: Plan, train_iters: int | None, train_samples: int | None, train_epochs: float | None) -> None:
    if train_epochs is not None:
        raise ValueError("--train-epochs scales a schedule given in shares; this one gives absolute lengths")
    if train_iters is not None and train_iters != plan.total_steps:
        raise ValueError(f"--train-iters {train_iters}: differs from the schedule's total of {plan.total_steps} steps")
    if train_samples is not None and train_samples != plan.total_samples:
        raise ValueError(f"--train-samples {train_samples}: differs from the schedule's total of {plan.total_samples}")


def largest_remainder(shares: Sequence[float], total: int, at_least: int = 0) -> list[int]:
    """Divide `total` into integers of `at_least` each, in proportion to `shares`, which sum to 1."""
    exact = [share * total for share in shares]
    parts = [max(at_least, math.floor(value)) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in range(total - sum(parts)):
        parts[by_remainder[i % len(parts)]] += 1
    while sum(parts) > total:  # only where `at_least` has raised a small part
        parts[parts.index(max(parts))] -= 1
    return parts
