"""What losses of different optimizer steps are measured against, so that they can be compared (ours).

The *standing* of a loss is how many spreads it lies above the mean loss that all blocks would have had at that step,
the spread being the standard deviation of theirs. In Learn and Review every window of steps is a random sample of the
corpus: mean and spread are the window's own.

A Focus draws blocks for their earlier standing, or for a score that follows from it. Its windows are harder than the
corpus, but less so than those standings say, since blocks were chosen for their luck too (regression to the mean).
However blocks were chosen by their *prior*, the standing at the Focus' start, a new loss of one is on average

    location + spread * slope * (prior - mean prior of all blocks)

The slope, the share of a standing that repeats, is found by regression of the losses of the Focus on the priors. The
spread follows from it: of the variance of all blocks' new standings, which is 1, the prior predicts slope^2 times the
variance of all priors, and the rest is the variance around the regression, which the Focus shows.

Blocks that a Focus draws without a record are measured by those with one. How often a block was trained on is not
asked: what the model has learned of it counts as ease.

Sums are of integers, or exact, and the rest is single IEEE operations, so that all is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# Samples in the windows around a step (ours): a mean of 64 adds 1.6 % to the variance of a standing, a spread from 256
# samples is known to 4 %. LEAST_SAMPLES: what a window holds at a phase's ends, and what deviations are taken within.
LOCATION_SAMPLES = 64
SPREAD_SAMPLES = 256
LEAST_SAMPLES = 8

LARGEST = 64.0
"""Losses (nats) and priors count as no more than this."""
_UNIT = 65536.0  # losses and priors are summed as integers of this fineness
_LEAST_VARIANCE = 1 / 16  # of the standings that a Focus draws
_CHUNK = 1 << 16

Window = tuple[Integers, Integers]


@dataclass(frozen=True)
class Population:
    """Mean and variance of a value over all blocks that have it, as Learn and Review draw them."""

    mean: float
    variance: float

    @staticmethod
    def of_corpora(values: npt.NDArray[np.floating], starts: Sequence[int], weights: Sequence[float]) -> Population:
        """Like `of`, where the corpus of the blocks `starts[c]` to before `starts[c + 1]` gets a share of samples in
        proportion to `weights[c]`."""
        parts = [Population.of(values[first:last]) for first, last in pairwise(starts)]
        known = [(weight, part) for weight, part in zip(weights, parts, strict=True) if part is not None]
        total = math.fsum(weight for weight, _ in known)
        if not known:
            return Population(0.0, 0.0)
        mean = math.fsum(weight * part.mean for weight, part in known) / total
        squares = math.fsum(weight * (part.variance + (part.mean - mean) ** 2) for weight, part in known)
        return Population(mean, squares / total)

    @staticmethod
    def of(values: npt.NDArray[np.floating]) -> Population | None:
        """Of values [n_blocks], NaN where a block has none; none counts as more than LARGEST. None without any."""
        count, total, squares = 0, 0, 0
        for first in range(0, len(values), _CHUNK):
            part = values[first : first + _CHUNK]
            whole = _integers(part[~np.isnan(part)])
            count += len(whole)
            total += int(whole.sum())
            squares += int((whole * whole).sum())
        if not count:
            return None
        return Population(total / count / _UNIT, (count * squares - total * total) / count**2 / _UNIT**2)


@dataclass(frozen=True)
class Curves:
    """The reference of every step so far.

    location, spread: fp64 [steps], mean and standard deviation (nats) of what the losses of all blocks would have been.
    level: both at the end, averaged over the last SPREAD_SAMPLES samples; 0 and 1 before the first step.
    """

    location: Doubles
    spread: Doubles
    level: tuple[float, float]


class Reference:
    """Collects the losses of a run, step by step, and gives the `Curves`; 64 bytes a step."""

    def __init__(self, total_steps: int) -> None:
        empty = np.empty(0)
        self.moments = np.zeros((6, total_steps), np.int64)
        """Of each step: losses counted, their sum, their squares' sum; sum of priors, of their squares, of products."""
        self._past = Curves(empty, empty, (0.0, 1.0))
        self._prior: Population | None = None
        self._end = 0

    def begin_phase(self, first_step: int, prior: Population | None) -> None:
        """A phase begins. prior: of all blocks, where it draws blocks for theirs; None where it draws at random."""
        self._end = max(self._end, first_step)
        self._past = self.curves()
        self._prior = prior

    def add(
        self,
        first_step: int,
        batch_size: int,
        nll: npt.NDArray[np.float32],
        counted: npt.NDArray[np.bool_],
        priors: npt.NDArray[np.float16] | None,
    ) -> None:
        """Enter losses [n] of steps from `first_step` on, `batch_size` each, in their order; in a phase that draws for
        it, with their blocks' priors, NaN where a block has none. Entries that are not `counted` are ignored."""
        stride = batch_size * max(1, _CHUNK // batch_size)
        for first in range(0, len(nll), stride):
            part = slice(first, first + stride)
            rows = _moments(nll[part], counted[part], None if priors is None else priors[part])
            starts = np.arange(0, len(nll[part]), batch_size)
            step = first_step + first // batch_size
            for kept, values in zip(self.moments, rows, strict=False):
                kept[step : step + len(starts)] = np.add.reduceat(values, starts)
        self._end = max(self._end, first_step + -(-len(nll) // batch_size))

    def curves(self) -> Curves:
        """The reference of all steps so far, those of the present phase by what there is of it."""
        past, first = self._past, len(self._past.location)
        if first == self._end:
            return past
        phase = _Phase(self.moments[:, first : self._end], past.level[1])
        prior = self._prior or Population(0.0, 0.0)
        slope = phase.slope(prior) if prior.variance else 0.0
        spread = phase.spread / np.sqrt(_variance(slope, phase.prior_variance, prior))
        location = _filled(phase.location - slope * spread * (phase.prior - prior.mean), past.level[0])
        return Curves(
            np.concatenate((past.location, location)),
            np.concatenate((past.spread, spread)),
            (_mean(location[-phase.wide :]), _mean(spread[-phase.wide :])),
        )


class _Phase:
    """The windows of a phase: five arrays fp64 [steps].

    location, spread: mean and standard deviation of the losses drawn. prior, prior_variance: of their blocks' priors.
    wide: steps that hold SPREAD_SAMPLES.
    """

    def __init__(self, moments: Integers, spread_before: float) -> None:
        count, loss, squares, prior, prior_squares, products = moments
        steps = len(count)
        size = max(1, int(count.sum()) // steps)
        self.wide = -(-SPREAD_SAMPLES // size)
        own = _window(steps, size, LEAST_SAMPLES, LEAST_SAMPLES, 0)
        # A trend shifts the mean of a window that is not centred, so it shrinks towards the end too.
        near = _window(steps, size, LOCATION_SAMPLES, LEAST_SAMPLES, np.arange(steps)[::-1])
        far = _window(steps, size, SPREAD_SAMPLES, LOCATION_SAMPLES, steps)
        self._count = count.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.location, self.prior = _smooth(near, loss, count), _smooth(near, prior, count)
            drawn = _over(own, count)
            mean_loss, mean_prior = _over(own, loss) / drawn / _UNIT, _over(own, prior) / drawn / _UNIT
            freedom = np.where(drawn > 1, 1 - 1 / drawn, 1.0)  # a mean is nearer to what it is made of
            self._losses = self._around(squares, loss, mean_loss, loss, mean_loss) / freedom
            self._priors = self._around(prior_squares, prior, mean_prior, prior, mean_prior) / freedom
            self._products = self._around(products, loss, mean_loss, prior, mean_prior) / freedom
            drawn = _over(far, count)
            deviation = np.sqrt(np.maximum(_over(far, self._losses), 0.0) / drawn)
            self.spread = _filled(np.where(deviation > 0, deviation, np.nan), spread_before)
            self.prior_variance = _filled(np.maximum(_over(far, self._priors), 0.0) / drawn, 0.0)

    def _around(self, products: Integers, a: Integers, mean_a: Doubles, b: Integers, mean_b: Doubles) -> Doubles:
        """Sums of products of the deviations from two means, step by step."""
        cross = mean_a * (b / _UNIT) + mean_b * (a / _UNIT) - self._count * mean_a * mean_b
        return np.where(self._count > 0, products / _UNIT**2 - cross, 0.0)

    def slope(self, prior: Population) -> float:
        """By how much a new standing rises with the prior. 1 where the phase cannot tell, and never so much that the
        priors of all blocks predict more variance than the 1 that there is."""
        most = 1.0 / math.sqrt(prior.variance)
        squares = math.fsum(self._priors.tolist())
        if squares <= 0:
            return min(1.0, most)
        # In units of the spread of what was drawn, which is that of the corpus divided by sqrt(share).
        regression = max(0.0, math.fsum((self._products / self.spread).tolist())) / squares
        drawn = squares / math.fsum(self._count.tolist())
        share = 1.0 + regression * regression * (prior.variance - drawn)
        return min(most, regression / math.sqrt(share)) if share > 0 else most


def _variance(slope: float, drawn: Doubles, prior: Population) -> Doubles:
    """Variance of new standings of blocks whose priors have the variance `drawn`; all blocks' have 1."""
    return np.maximum(1.0 + slope * slope * (drawn - prior.variance), _LEAST_VARIANCE)


def _moments(
    nll: npt.NDArray[np.float32], counted: npt.NDArray[np.bool_], priors: npt.NDArray[np.float16] | None
) -> list[Integers]:
    if priors is not None:
        counted = counted & ~np.isnan(priors)
    loss = _integers(np.where(counted, nll, 0))
    rows = [counted.astype(np.int64), loss, loss * loss]
    if priors is not None:
        prior = _integers(np.where(counted, priors, 0))
        rows += [prior, prior * prior, loss * prior]
    return rows


def _integers(values: npt.NDArray[np.floating]) -> Integers:
    return np.rint(np.clip(values.astype(np.float64), -LARGEST, LARGEST) * _UNIT).astype(np.int64)


def _smooth(window: Window, sums: Integers, count: Integers) -> Doubles:
    """The mean in the window around each step, and that of what it leaves: alone, it cuts the bends of a curve."""
    drawn = _over(window, count)
    mean = _over(window, sums) / _UNIT / drawn
    left = np.where(count > 0, sums / _UNIT - count * mean, 0.0)
    return mean + _over(window, left) / drawn


def _window(steps: int, size: int, most: int, least: int, to_end: Integers | int) -> Window:
    """First and last (exclusive) step of the window of `most` samples around each step, of `size` samples each.

    It reaches at most half way back to the start, where the loss bends most, and at most `to_end` steps either way,
    but holds `least` samples at least.
    """
    at = np.arange(steps)
    half = np.minimum(-(-most // size) // 2, np.minimum(at // 2, to_end))
    half = np.maximum(half, -(-least // size) - 1)
    return np.maximum(0, at - half), np.minimum(steps, at + half + 1)


def _over(window: Window, values: npt.NDArray[np.float64] | Integers) -> npt.NDArray[np.float64]:
    """Sums over windows of steps."""
    total = np.zeros(len(values) + 1, values.dtype)
    np.cumsum(values, out=total[1:])
    return (total[window[1]] - total[window[0]]).astype(np.float64)


def _mean(values: Doubles) -> float:
    return math.fsum(values.tolist()) / len(values)


def _filled(values: Doubles, otherwise: float) -> Doubles:
    """NaN replaced by the last value before, else by the first value after; by `otherwise` where there is none."""
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return np.full(len(values), otherwise)
    return values[known[np.maximum(0, np.searchsorted(known, np.arange(len(values)), side="right") - 1)]]
