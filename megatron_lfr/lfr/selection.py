"""Makes the order of a phase from the scores of the blocks at its start."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.lfr.phase import Phase

Scores = npt.NDArray[np.float32]
Order = npt.NDArray[np.unsignedinteger]
Doubles = npt.NDArray[np.float64]

# Weights are clipped at this quantile of the scores (ours): the extreme tail of the perplexity is noise.
CLIP_QUANTILE = 0.999

_NO_SCORE = "focus: no block has a score yet"


@dataclass(frozen=True)
class Selection:
    """What a Focus left out: the scored blocks below `cut`, and the unscored ones if `excludes_unseen`.

    The first `tie_quota` blocks, by id, whose score equals `cut` are dropped too, so that a threshold drops an exact
    share.
    """

    cut: float
    tie_quota: int
    excludes_unseen: bool
    dropped: int
    unseen: int
    n_blocks: int

    @property
    def dropped_share(self) -> float:
        """Share of the scored blocks that were dropped."""
        return self.dropped / max(1, self.n_blocks - self.unseen)

    def left_out(self, scores: Scores) -> npt.NDArray[np.bool_]:
        """Return a mask of the blocks that the phase leaves out, given the scores that it was made from."""
        mask: npt.NDArray[np.bool_] = scores < self.cut
        mask[np.flatnonzero(scores == np.float32(self.cut))[: self.tie_quota]] = True
        if self.excludes_unseen:
            mask |= np.isnan(scores)
        return mask


def has_score(scores: Scores) -> bool:
    """Whether any block has a score. Stops looking soon after the first that has one."""
    chunk = 1 << 20
    return not all(np.isnan(scores[first : first + chunk]).all() for first in range(0, len(scores), chunk))


def phase_seed(seed: int, phase_index: int) -> int:
    """Derive the 64-bit seed of a phase from the run's seed."""
    digest = hashlib.blake2b(f"megatron_lfr order {seed} {phase_index}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def make_order(
    phase: Phase, scores: Scores, samples: int, seed: int, phase_index: int
) -> tuple[Order, Selection | None]:
    """Return the block ids [samples] of a phase, in the order in which they are trained on, and what a Focus left out.

    scores: fp32 [n_blocks], higher is harder, NaN where a block was never scored. The result depends on the arguments
    alone: it is the same on every machine, for any number of threads. The selection of Learn and Review is None.
    """
    seed = phase_seed(seed, phase_index)
    if phase.kind != "focus":
        return _C.permutation(len(scores), _pass_seeds(seed, samples, len(scores)), samples=samples), None
    if phase.selection == "threshold" and phase.sampling == "passes":
        selection = _threshold(phase, scores)
        return _C.order_threshold(scores, phase.drop, phase.keeps_unseen, samples, seed), selection
    if not has_score(scores):
        raise ValueError(_NO_SCORE)
    selection, weights, mass, unseen_mass = _select(phase, scores)
    if phase.sampling == "passes":
        kept = (~selection.left_out(scores)).astype(np.uint32)
        return _C.shuffle_visits(kept, _pass_seeds(seed, samples, int(kept.sum())), samples=samples), selection
    weigh = _C.order_visits if phase.sampling == "visits" else _C.order_choice
    return weigh(weights, mass, unseen_mass, samples, seed), selection


def continue_passes(n_blocks: int, earlier: int, samples: int, seed: int, phase_index: int) -> Order:
    """Return what `make_order` of a Learn over `n_blocks` blocks would give after the first `earlier` samples."""
    skipped = earlier // n_blocks
    rest = earlier - skipped * n_blocks
    seeds = _pass_seeds(phase_seed(seed, phase_index), earlier + samples, n_blocks)[skipped:]
    order: Order = _C.permutation(n_blocks, seeds, samples=rest + samples)
    return order[rest:]


def _pass_seeds(seed: int, samples: int, size: int) -> list[int]:
    """Return a seed for each of the passes over `size` blocks that `samples` samples take, a partial one included."""
    return [phase_seed(seed, number) for number in range(-(-samples // size))]


def _select(phase: Phase, scores: Scores) -> tuple[Selection, _C.BlockWeights, Doubles, float]:
    """Decide what to drop, and give the clusters that remain their masses, for weighted sampling.

    Returns (selection, weights of k clusters, mass [k], mass of the unseen). The mass of a cluster is its share of the
    samples: its size x its mean perplexity (clipped, as weights are). Unseen blocks that are kept count as blocks of
    mean perplexity (both ours).
    """
    cap = _C.percentile(scores, CLIP_QUANTILE)
    if phase.selection == "threshold":
        selection = _threshold(phase, scores)
        weights = _C.BlockWeights(scores, [selection.cut], cap)
        mass, kept_perplexity = np.array([0.0, float(len(scores) - selection.unseen - selection.dropped)]), 1.0
    else:
        cuts = _C.cluster(scores, phase.clusters)
        weights = _C.BlockWeights(scores, cuts, cap)
        counts = weights.counts
        removed = _easy_clusters(counts, phase.drop)
        cut = float(cuts[removed - 1]) if removed else -np.inf
        dropped = int(counts[:removed].sum())
        selection = Selection(cut, 0, not phase.keeps_unseen, dropped, weights.unseen, len(scores))
        perplexity = weights.mean_perplexity()
        if perplexity.max() > 2.0**512:  # only shares of it count, and the sum must be finite
            perplexity = perplexity * 2.0**-512
        mass = counts * perplexity
        mass[:removed] = 0.0
        kept_perplexity = float(mass.sum() / counts[removed:].sum())
    unseen_mass = selection.unseen * kept_perplexity if phase.keeps_unseen else 0.0
    return selection, weights, mass, unseen_mass


def _threshold(phase: Phase, scores: Scores) -> Selection:
    """Decide what a drop by threshold leaves out."""
    cut, tie_quota, dropped, seen = _C.threshold(scores, phase.drop)
    if seen == 0:
        raise ValueError(_NO_SCORE)
    if phase.sampling != "passes":  # clusters cannot split a tie: blocks with equal scores all stay
        dropped, tie_quota = dropped - tie_quota, 0
    return Selection(float(cut), tie_quota, not phase.keeps_unseen, dropped, len(scores) - seen, len(scores))


def _easy_clusters(counts: npt.NDArray[np.int64], drop: float) -> int:
    """Return how many of the easiest clusters to drop: as many as make up at most `drop` of the blocks, never all."""
    share = np.cumsum(counts) / counts.sum()
    return min(int((share <= drop + 1e-9).sum()), len(counts) - 1)
