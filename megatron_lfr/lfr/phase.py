"""A phase of Learn-Focus-Review, as a schedule gives it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_lfr.lfr.scores import BY_SCORE, CALL, COPIES, FROM_ARRAYS, check_score, is_file, split_score
from megatron_lfr.lfr.weights import NO_WEIGHT, CountedCopies, Weights, check_weighting
from megatron_lfr.output import exponent_hint

Kind = Literal["learn", "focus", "review"]
Unit = Literal["epochs", "passes", "steps", "tokens", "share"]
SelectionMode = Literal["threshold", "clusters"]
Sampling = Literal["passes", "visits", "choice"]
Unseen = Literal["auto", "keep", "exclude"]
Passes = Literal["anew", "continued"]

SCOPES = ("auto", "all", "new")
"""Scopes of a phase that are no lists of prefixes."""
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
    "passes": get_args(Passes),
}
_NUMBERS = (
    "duration",
    "drop",
    "clusters",
    "drop_hardest",
    "explore",
    "weight_power",
    "weight_cap",
    "replay",
    "guard_gain",
    "least_scored",
)


@dataclass(frozen=True)
class Phase:
    """A phase of Learn-Focus-Review. Learn and Review train on every block in their scope, in a random order.

    The fields from `drop` to `explore` shape a Focus and are ignored by the other kinds; `weight` and its two numbers
    are for all kinds, `copies`, `replay` and `passes` are for Learn and Review; `guard` and `least_scored` decide
    whether a Focus takes place.
    """

    kind: Kind
    duration: float
    unit: Unit = "epochs"
    """epochs: of all blocks in the scope. passes: over what the phase keeps, unseen blocks too where it keeps them.
    steps: optimizer steps. tokens. share: of the segment's total, which is then given by --train-iters,
    --train-samples or --train-epochs."""
    drop: float = 0.0
    """Share of the scored blocks that Focus leaves out, the easiest first; in [0, 1)."""
    selection: SelectionMode = "threshold"
    """threshold: drop that share (LFR v1); exactly, in passes without a weight, while otherwise blocks whose score
    equals the cut stay. clusters: drop whole clusters of a 1-D k-means on the score while at most that share is dropped
    (LFR v2; k-means on the score is our choice)."""
    sampling: Sampling = "passes"
    """passes: each kept block once a pass (v1). visits: block i floor(e_i) or ceil(e_i) times, e_i proportional to
    its weight. choice: weighted without replacement."""
    score: str = "recorded"
    """recorded: loss when last trained on (the paper). detrended: what that amounts to now, when the model has
    changed since (ours; see `Ledger.detrended_scores`). rescored: loss in a forward-only pass over the corpus before
    the phase (ours). shuffled: the detrended ones, dealt to the scored blocks at random: a control that drops and
    repeats as often, but not by difficulty. improvement: how much a block's detrended loss has fallen between its last
    two visits, none for a block with fewer (ours; see `Ledger.improvement_scores`). file:NAME: the numbers of an array
    from outside of the run, higher is harder. excess:NAME: the detrended score less that number, where the array holds
    a reference model's losses. call:PACKAGE.MODULE:FUNCTION: what that function makes of the ledger (see
    `functions.Records`)."""
    unseen: Unseen = "auto"
    """What Focus does with blocks that have no score yet. auto: threshold keeps them, clusters excludes them."""
    clusters: int = 8
    """Number of clusters of the k-means."""
    cluster_by: str = BY_SCORE
    """With selection clusters: score, the k-means; or file:NAME, the clusters that the array NAME numbers, of which the
    easiest and hardest are dropped by their mean scores."""
    drop_hardest: float = 0.0
    """Share of the scored blocks that Focus leaves out, the hardest first, beside `drop`; both together below 1."""
    weights: Weights = "auto"
    """How much a kept block weighs in visits and choice. uniform: all the same. capped: 1 up to the score that 5 % of
    the kept are below, 3 from that of 95 % on, linear between; all the same where these two are. perplexity:
    exp(score), up to the 99.9 % quantile. auto: capped; uniform where sampling is passes."""
    explore: float = 0.0
    """Share of the samples, in [0, 1), that give their places, evenly spaced, to blocks drawn at random from all."""
    weight: str = NO_WEIGHT
    """file:NAME: blocks count in proportion to the numbers of that array; 0 leaves a block out. In Learn and Review,
    the heaviest come once in each pass, and one that weighs 1/n as much in every n-th of them."""
    weight_power: float = 1.0
    """Power to which `weight` is raised, before it is capped; below 1, weights are more alike."""
    weight_cap: float = 4.0
    """Most that a weight counts for, in multiples of the mean weight."""
    copies: CountedCopies = "all"
    """How often a block that there are n of counts in a pass of Learn and Review: once, 1 + floor(log2 n) times, or n
    times (all); each copy has its turn. The array named copies says which blocks are copies of each other."""
    scope: str | tuple[str, ...] = "auto"
    """Which blocks the phase is about. all. new: those that no segment before had. A list of prefixes, by the names of
    their domains. auto: new for a Learn that begins a segment with new blocks, else all."""
    replay: float = 0.0
    """Share of the samples of Learn or Review that come from the segment's other blocks, uniformly; in [0, 1)."""
    guard: str = NO_WEIGHT
    """file:NAME: the Focus is a Review instead, of as many samples, unless the numbers of that array are higher on
    average over its samples than over the Review's (ours; see `guard`)."""
    guard_gain: float = 0.05
    """By which share of the Review's mean the Focus' must be higher."""
    least_scored: float = 0.0
    """The Focus is a Review instead, of as many samples, unless at least that share of the Review's samples are blocks
    that have a score; in [0, 1] (ours). A Review that would go on with the first pass over the blocks has none."""
    passes: Passes = "anew"
    """Of Learn and Review, and of the Review in the place of a Focus that may be declined. anew: the phase begins with
    a new pass over all blocks. continued: it goes on with the passes of the Learn and Review phases before it in its
    segment, where the last one stopped, so that none of them trains on a block again before they have trained on all
    others, if all count the same (ours). Phases that count `copies` are each drawn anew."""

    @property
    def score_mode(self) -> str:
        """What the score is made of, without the name of an array."""
        return split_score(self.score)[0]

    @property
    def scored_by(self) -> str | None:
        """The name of the array that the score needs; None without one."""
        mode, name = split_score(self.score)
        return name if self.kind == "focus" and mode in FROM_ARRAYS else None

    @property
    def scored_by_function(self) -> str | None:
        """PACKAGE.MODULE:FUNCTION where a function makes the score; None where none does."""
        mode, name = split_score(self.score)
        return name if self.kind == "focus" and mode == CALL else None

    @property
    def weighted_by(self) -> str | None:
        """The name of the array of `weight`; None without one."""
        return split_score(self.weight)[1]

    @property
    def guarded_by(self) -> str | None:
        """The name of the array that says whether the Focus is worth it; None without a guard."""
        return split_score(self.guard)[1]

    @property
    def may_be_declined(self) -> bool:
        """Whether a Review may take the place of the Focus, which is decided when it begins."""
        return self.guarded_by is not None or self.least_scored > 0

    @property
    def clustered_by(self) -> str | None:
        """The name of the array that numbers clusters of content; None where clusters are of the score."""
        uses = self.kind == "focus" and self.selection == "clusters"
        return split_score(self.cluster_by)[1] if uses else None

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
    def counting(self) -> str:
        """Say how much blocks count whatever their score; empty where all count the same."""
        parts = []
        if self.weighted_by is not None:
            power = "" if self.weight_power == Phase.weight_power else f" to the power of {self.weight_power:g}"
            cap = "" if self.weight_cap == Phase.weight_cap else f" (at most {self.weight_cap:g} times the mean)"
            parts.append(f"blocks count by {self.weight}{power}{cap}")
        if self.grouped_by is not None:
            parts.append(f"copies count {self.copies}")
        return ", ".join(parts)

    @property
    def counts_equally(self) -> bool:
        """Whether every block counts the same, but for its score."""
        return self.weighted_by is None and self.grouped_by is None

    @property
    def is_rescored(self) -> bool:
        """Whether every block is rescored before the phase."""
        return self.kind == "focus" and self.score == "rescored"

    @property
    def keeps_scores(self) -> bool:
        """Whether the scores are kept in the journal, since they do not follow from its losses."""
        return self.is_rescored or self.scored_by_function is not None

    @property
    def may_fail(self) -> bool:
        """Whether the phase may fail to begin: its blocks are scored anew first, all that a Focus keeps has the weight
        0, or none of the blocks in its scope has come yet."""
        is_part = self.scope not in ("auto", "all")
        return self.keeps_scores or (self.kind == "focus" and (self.weighted_by is not None or is_part))

    @property
    def scores_all(self) -> bool:
        """Whether every block has a score, whether it has been trained on or not."""
        return self.is_rescored or (self.kind == "focus" and self.score_mode == "file")

    @property
    def needs_two_visits(self) -> bool:
        """Whether only blocks that have been trained on twice have a score."""
        return self.kind == "focus" and self.score == "improvement"

    @property
    def may_score_unseen(self) -> bool:
        """Whether blocks may have a score that have not been trained on."""
        return self.scores_all or self.scored_by_function is not None

    @property
    def scores_seen(self) -> bool:
        """Whether those blocks have a score that have been trained on."""
        return not (self.may_score_unseen or self.needs_two_visits)

    def __post_init__(self) -> None:
        for name, legal in _CHOICES.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"phase {name} {getattr(self, name)!r}: choose from {', '.join(legal)}")
        check_score(self.score)
        if self.cluster_by != BY_SCORE and not is_file(self.cluster_by):
            raise ValueError(f"phase cluster_by {self.cluster_by!r}: choose from {BY_SCORE}, file:NAME")
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if name == "clusters" else (int, float)):
                kind = "whole number" if name == "clusters" else "number"
                raise ValueError(f"phase {name} {value!r}: must be a {kind}{exponent_hint(value)}")
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                raise ValueError(f"phase {name}: is too large")
        if not (math.isfinite(self.duration) and self.duration > 0):
            raise ValueError(f"phase duration {self.duration}: must be a positive number of {self.unit}")
        if self.unit in ("steps", "tokens") and self.duration != int(self.duration):
            raise ValueError(f"phase duration {self.duration}: must be a whole number of {self.unit}")
        if not 0.0 <= self.drop < 1.0:
            raise ValueError(f"phase drop {self.drop}: must be at least 0 and below 1")
        check_weighting(self)
        self._check_guard()
        if self.kind != "focus" and self.drop:
            raise ValueError(f"phase drop {self.drop}: only a focus phase drops blocks, but this one is {self.kind}")
        self._check_scope()
        if not CLUSTERS[0] <= self.clusters <= CLUSTERS[1]:
            raise ValueError(f"phase clusters {self.clusters}: must lie between {CLUSTERS[0]} and {CLUSTERS[1]}")

    def _check_guard(self) -> None:
        if self.guard != NO_WEIGHT and not is_file(self.guard):
            raise ValueError(f"phase guard {self.guard!r}: choose from {NO_WEIGHT}, file:NAME")
        if self.guard != NO_WEIGHT and self.kind != "focus":
            raise ValueError(f"phase guard {self.guard}: only a focus phase has one, but this one is {self.kind}")
        if self.least_scored and self.kind != "focus":
            raise ValueError(
                f"phase least_scored {self.least_scored}: only a focus phase has it, but this one is {self.kind}"
            )
        if not 0 <= self.least_scored <= 1:
            raise ValueError(f"phase least_scored {self.least_scored}: must be at least 0 and at most 1")
        if self.passes != "anew" and self.kind == "focus" and not self.may_be_declined:
            raise ValueError(
                f"phase passes {self.passes}: only a learn or review phase has them, or a focus that has a guard or "
                "least_scored"
            )
        if not 0 <= self.guard_gain < math.inf:
            raise ValueError(f"phase guard_gain {self.guard_gain}: must be at least 0 and finite")

    def _check_scope(self) -> None:
        if isinstance(self.scope, list):  # as YAML and JSON have it
            object.__setattr__(self, "scope", tuple(self.scope))
        names = self.scope if isinstance(self.scope, tuple) else ()
        if self.scope not in SCOPES and not (names and all(isinstance(name, str) for name in names)):
            raise ValueError(f"phase scope {self.scope!r}: choose from {', '.join(SCOPES)}, or give a list of prefixes")
        if not 0.0 <= self.replay < 1.0:
            raise ValueError(f"phase replay {self.replay}: must be at least 0 and below 1")
        if self.kind == "focus" and self.replay:
            raise ValueError(f"phase replay {self.replay}: only learn and review phases replay, but this one is focus")

    @property
    def keeps_unseen(self) -> bool:
        return self.unseen == "keep" or (self.unseen == "auto" and self.selection == "threshold")

    def samples(self, n_blocks: int, seq_length: int, global_batch_size: int, kept: int) -> int:
        """Return the number of samples of the phase over `n_blocks` blocks. kept: how many of them a drop of exactly
        `drop` leaves; a pass visits each of them once. The selection may keep a few more or fewer, but the number of
        samples stays. ValueError for more than MOST_SAMPLES."""
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

    def replayed(self, samples: int) -> int:
        """Return how many of `samples` samples come from outside of the phase's scope."""
        return round(self.replay * samples)


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
