"""Makes the order of a phase from the scores of the blocks at its start."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.lfr.chain import Chain
from megatron_lfr.lfr.left_out import Scores, Selection, drop_content_clusters, droppable
from megatron_lfr.lfr.phase import Phase
from megatron_lfr.lfr.weights import EQUAL, Counting

Order = npt.NDArray[np.unsignedinteger]
Doubles = npt.NDArray[np.float64]
Groups = npt.NDArray[np.uint32]

# Weights are clipped at this quantile of the scores (ours): the extreme tail of the perplexity is noise.
CLIP_QUANTILE = 0.999
CAPPED_QUANTILES = (0.05, 0.95)
"""Between these quantiles of the kept scores, capped weights rise (ours)."""

_NO_SCORE = "focus: no block has a score yet"


def has_score(scores: Scores) -> bool:
    """Whether any block has a score. Stops looking soon after the first that has one."""
    chunk = 1 << 20
    return not all(np.isnan(scores[first : first + chunk]).all() for first in range(0, len(scores), chunk))


def id_type(n_blocks: int) -> type[np.uint32] | type[np.uint64]:
    """Return the type of block ids in an order of `n_blocks` blocks."""
    return np.uint32 if n_blocks <= np.iinfo(np.uint32).max else np.uint64


def phase_seed(seed: int, phase_index: int) -> int:
    """Derive the 64-bit seed of a phase from the run's seed."""
    digest = hashlib.blake2b(f"megatron_lfr order {seed} {phase_index}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def make_order(
    phase: Phase, scores: Scores, samples: int, seed: int, phase_index: int, counting: Counting = EQUAL
) -> tuple[Order, Selection | None]:
    """Return the block ids [samples] of a phase, in the order in which they are trained on, and what a Focus left out.

    scores: fp32 [n_blocks], higher is harder, NaN where a block was never scored. The result depends on the arguments
    alone: it is the same on every machine, for any number of threads. The selection of Learn and Review is None.
    """
    run_seed, seed = seed, phase_seed(seed, phase_index)
    factors = None
    if phase.weighted_by is not None:
        assert counting.weights is not None
        factors = _C.temper_weights(counting.weights, phase.weight_power, phase.weight_cap)
    if phase.kind != "focus":
        if phase.copies != "all":
            assert counting.groups is not None
            return _in_turns(counting.groups, phase.copies == "log", counting.earlier, factors, samples, seed), None
        chain = counting.chain or Chain(phase_index)
        return _everything(len(scores), factors, samples, phase_seed(run_seed, chain.first), sum(chain.taken)), None
    explored = int(phase.explore * samples)
    if phase.clustered_by is None:
        order, selection = _focus(phase, scores, factors, samples, seed)
    else:
        assert counting.clusters is not None
        order, selection = _focus_on_content(phase, scores, counting.clusters, factors, samples, seed)
    if explored:  # the order is random, so evenly spaced positions are those of random samples
        _C.place_evenly(_explored(len(scores), factors, explored, seed), order)
    return order, selection


_EXPLORED = -1
"""The number of a seed that no pass has."""
_SHORTEST_PASS = 8
"""Passes by factors with fewer than one in so many of the blocks are shuffled together."""


def _explored(n_blocks: int, factors: Scores | None, samples: int, seed: int) -> Order:
    """Sample from all blocks, without repetition up to a complete pass, or in passes by `factors`."""
    seed = phase_seed(seed, _EXPLORED)
    if factors is None and samples <= n_blocks:
        return _C.draw_distinct(n_blocks, samples, seed)
    return _everything(n_blocks, factors, samples, seed)


def _everything(n_blocks: int, factors: Scores | None, samples: int, seed: int, taken: int = 0) -> Order:
    """Sample from all blocks, in passes: what comes after the first `taken` samples of them. Without factors, every
    block comes in each pass."""
    if factors is not None:
        return _passes_by(factors, samples, seed, taken)
    skipped, rest = divmod(taken, n_blocks)
    seeds = _pass_seeds(seed, taken + samples, n_blocks)[skipped:]
    order: Order = _C.permutation(n_blocks, seeds, samples=rest + samples)
    return order[rest:]


def _passes_by(factors: Scores, samples: int, seed: int, taken: int) -> Order:
    """Sample in passes by factors, the largest of which is 1: a block comes in that share of the passes, as evenly as
    can be (ours; benchmarks/2026-11-28-even-passes.md). Where most blocks weigh next to nothing beside the heaviest,
    passes are so short that several are shuffled together."""
    ids = id_type(len(factors))
    weighed = int(np.count_nonzero(factors))
    if 2 * weighed < len(factors):  # each pass looks at every block
        blocks: Order = np.flatnonzero(factors).astype(ids)
        return blocks[_passes_by(factors[blocks], samples, seed, taken)]
    visits = _C.visits_in_passes(factors, 0, 1, seed)
    together = max(1, weighed // (_SHORTEST_PASS * int(np.count_nonzero(visits))))
    order: Order = np.empty(samples, ids)
    filled, number = 0, 0
    while filled < samples:
        if number or together > 1:
            visits = _C.visits_in_passes(factors, number * together, together, seed)
        size = int(visits.sum(dtype=np.int64))
        skipped = min(taken, size)
        count = min(samples - filled, size - skipped)
        if count:
            part = _C.shuffle_visits(visits, phase_seed(seed, number), samples=skipped + count)
            order[filled : filled + count] = part[skipped:]
        taken, filled, number = taken - skipped, filled + count, number + 1
    return order


def _in_turns(
    groups: Groups, logarithmic: bool, earlier: Sequence[int], factors: Scores | None, samples: int, seed: int
) -> Order:
    """Sample in passes in which of each group of copies only some count: each one has its turn. earlier: the samples of
    the phases that have used up turns before."""
    visits = _C.take_turns(groups, 0, logarithmic, factors)
    size = int(visits.sum(dtype=np.int64))
    turn = sum(-(-count // size) for count in earlier)
    passes = []
    for number, first in enumerate(range(0, samples, size)):
        visits = _C.take_turns(groups, turn + number, logarithmic, factors)
        count, pass_seed = min(size, samples - first), phase_seed(seed, number)
        if factors is None:
            passes.append(_C.shuffle_visits(visits, pass_seed, samples=count))
        else:
            counted = factors * visits.astype(np.float32)
            passes.append(_everything(len(groups), counted / counted.max(), count, pass_seed))
    return np.concatenate(passes)


def _focus(phase: Phase, scores: Scores, factors: Scores | None, samples: int, seed: int) -> tuple[Order, Selection]:
    if phase.selection == "threshold" and phase.sampling == "passes" and factors is None:
        selection = _threshold(phase, scores, split_ties=True)
        order = _C.order_threshold(
            scores, phase.drop, phase.keeps_unseen, samples, seed, drop_hardest=phase.drop_hardest
        )
        return order, selection
    if not has_score(scores):
        raise ValueError(_NO_SCORE)
    selection, weights, mass, unseen_mass = _select(phase, scores, factors)
    if phase.sampling == "passes" and factors is None:
        return _passes_over(~selection.left_out(scores), samples, seed), selection
    if factors is not None and not mass.any() and not unseen_mass:
        raise ValueError(f"focus: all that it keeps has the weight 0 ({phase.weight})")
    weigh = _C.order_choice if phase.sampling == "choice" else _C.order_visits
    return weigh(weights, mass, unseen_mass, samples, seed), selection


def _focus_on_content(
    phase: Phase, scores: Scores, clusters: Groups, factors: Scores | None, samples: int, seed: int
) -> tuple[Order, Selection]:
    """Sample from what remains when complete clusters, as numbered from outside, are dropped by their mean scores. With
    visits, each cluster gets its share of the samples, rounded up or down."""
    if not has_score(scores):
        raise ValueError(_NO_SCORE)
    selection = drop_content_clusters(phase, scores, clusters)
    kept = ~selection.left_out(scores)
    if phase.sampling == "passes" and factors is None:
        return _passes_over(kept, samples, seed), selection
    counted = kept.astype(np.float32) if factors is None else np.where(kept, factors, np.float32(0))
    if phase.sampling == "choice":
        return _C.order_choice(*_weigh_kept(phase, scores, kept, counted), samples, seed), selection
    by_cluster = np.argsort(clusters, kind="stable")  # visits are systematic: each stretch of blocks gets its share
    weighed = _weigh_kept(phase, scores[by_cluster], kept[by_cluster], counted[by_cluster])
    order = _C.order_visits(*weighed, samples, seed)
    return by_cluster[order].astype(order.dtype), selection


def _weigh_kept(
    phase: Phase, scores: Scores, kept: npt.NDArray[np.bool_], counted: Scores
) -> tuple[_C.BlockWeights, Doubles, float]:
    """Weigh the kept blocks as one cluster. counted: their factors, 0 for the others."""
    none = np.empty(0)
    if phase.weighting == "capped":
        low, high = _C.percentiles(np.where(kept, scores, np.float32(np.nan)), CAPPED_QUANTILES).tolist()
        weights = _C.BlockWeights(scores, none, np.inf, rule="capped", low=low, high=high, factors=counted)
    elif phase.weighting == "uniform":
        weights = _C.BlockWeights(scores, none, np.inf, rule="uniform", factors=counted)
    else:
        weights = _C.BlockWeights(scores, none, float(_C.percentiles(scores, [CLIP_QUANTILE])[0]), factors=counted)
    return weights, *_masses_of_factors(phase, scores, none, slice(0, 1), weights, counted, np.zeros(1))


def _passes_over(kept: npt.NDArray[np.bool_], samples: int, seed: int) -> Order:
    """Visit every kept block once a pass, each pass shuffled anew."""
    return _C.shuffle_visits(kept.astype(np.uint32), _pass_seeds(seed, samples, int(kept.sum())), samples=samples)


def _pass_seeds(seed: int, samples: int, size: int) -> list[int]:
    """Return a seed for each of the passes over `size` blocks that `samples` samples take, a partial one included."""
    return [phase_seed(seed, number) for number in range(-(-samples // size))]


def _select(phase: Phase, scores: Scores, factors: Scores | None) -> tuple[Selection, _C.BlockWeights, Doubles, float]:
    """Decide what to drop, and give the clusters that remain their masses, for weighted sampling.

    Returns (selection, weights of k clusters, mass [k], mass of the unseen). The mass of a cluster is its share of the
    samples: the sum of the weights of its blocks. Unseen blocks that are kept weigh as much as the kept ones do on
    average (both ours).
    """
    if phase.selection == "threshold":
        selection = _threshold(phase, scores, split_ties=False)
        cuts = np.array([selection.cut])
        if selection.dropped_hardest:
            cuts = np.append(cuts, np.nextafter(np.float32(selection.cut_hardest), np.float32(np.inf)))
        kept = slice(1, 2)
    else:
        cuts = _C.cluster(scores, phase.clusters)
        selection, kept = _drop_clusters(phase, scores, cuts)
    weights = _weigh(phase.weighting, scores, cuts, selection, factors)
    mass = np.zeros(len(cuts) + 1)
    if factors is not None:
        return selection, weights, *_masses_of_factors(phase, scores, cuts, kept, weights, factors, mass)
    counts = weights.counts[kept]
    if phase.selection == "threshold":  # one cluster: its mean weight is the unit
        mass[kept], kept_weight = counts, 1.0
    else:
        mean = weights.mean_weights()[:-1]
        if mean.max() > 2.0**512:  # only shares of it count, and the sum must be finite
            mean = mean * 2.0**-512
        mass[kept] = counts * mean[kept]
        kept_weight = float(mass.sum() / counts.sum())
    return selection, weights, mass, selection.unseen * kept_weight if phase.keeps_unseen else 0.0


def _masses_of_factors(
    phase: Phase,
    scores: Scores,
    cuts: Doubles,
    kept: slice,
    weights: _C.BlockWeights,
    factors: Scores,
    mass: Doubles,
) -> tuple[Doubles, float]:
    """Fill in the masses [k] of the clusters in `kept`, given weights that are multiplied by factors. Returns them, and
    the mass of the unseen."""
    counts = np.append(weights.counts, weights.unseen)
    mean = weights.mean_weights()
    if mean.max() > 2.0**512:
        mean = mean * 2.0**-512
    mass[kept] = (counts * mean)[kept]
    if not phase.keeps_unseen or not weights.unseen:
        return mass, 0.0
    by_factor = counts * _C.BlockWeights(scores, cuts, np.inf, rule="uniform", factors=factors).mean_weights()
    known = by_factor[kept].sum()
    return mass, float(by_factor[-1] * (mass.sum() / known if known else 1.0))


def _weigh(rule: str, scores: Scores, cuts: Doubles, selection: Selection, factors: Scores | None) -> _C.BlockWeights:
    """Weigh the blocks by a rule of `Phase.weights`."""
    if rule == "perplexity":
        return _C.BlockWeights(scores, cuts, float(_C.percentiles(scores, [CLIP_QUANTILE])[0]), factors=factors)
    if rule == "uniform":
        return _C.BlockWeights(scores, cuts, np.inf, rule=rule, factors=factors)
    scored = selection.n_blocks - selection.unseen
    lowest, kept = selection.dropped - selection.dropped_hardest, scored - selection.dropped
    shares = [min(1.0, (lowest + share * kept) / scored) for share in CAPPED_QUANTILES]
    low, high = _C.percentiles(scores, shares).tolist()
    return _C.BlockWeights(scores, cuts, np.inf, rule=rule, low=low, high=high, factors=factors)


def _threshold(phase: Phase, scores: Scores, split_ties: bool) -> Selection:
    """Decide what a drop by threshold leaves out. Without `split_ties`, blocks whose scores equal a cut all stay."""
    lowest, highest, seen = _C.threshold(scores, phase.drop, drop_hardest=phase.drop_hardest)
    if seen == 0:
        raise ValueError(_NO_SCORE)
    (cut, tie_quota, easiest), (cut_hardest, hard_quota, hardest) = lowest, highest
    if not split_ties:  # clusters cannot split a tie
        easiest, tie_quota, hardest, hard_quota = easiest - tie_quota, 0, hardest - hard_quota, 0
    dropped, unseen = easiest + hardest, len(scores) - seen
    excludes = not phase.keeps_unseen
    return Selection(
        float(cut), tie_quota, excludes, dropped, unseen, len(scores), float(cut_hardest), hard_quota, hardest
    )


def _drop_clusters(phase: Phase, scores: Scores, cuts: Doubles) -> tuple[Selection, slice]:
    """Decide which complete clusters to drop at both ends; returns the clusters that stay, too."""
    sizes = _C.BlockWeights(scores, cuts, np.inf, rule="uniform")
    counts = sizes.counts
    easy = droppable(counts, phase.drop)
    hard = min(droppable(counts[::-1], phase.drop_hardest), len(counts) - easy - 1)
    kept = slice(easy, len(counts) - hard)
    hardest = int(counts[kept.stop :].sum())
    selection = Selection(
        float(cuts[easy - 1]) if easy else -np.inf,
        0,
        not phase.keeps_unseen,
        int(counts[:easy].sum()) + hardest,
        sizes.unseen,
        len(scores),
        float(np.nextafter(np.float32(cuts[kept.stop - 1]), np.float32(-np.inf))) if hard else np.inf,
        0,
        hardest,
    )
    return selection, kept
