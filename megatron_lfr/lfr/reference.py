"""What losses of different optimizer steps are measured against, so that they can be compared (ours).

The *standing* of a loss is how many spreads it lies above the mean of the losses that all blocks would have had at its
step; the spread is the standard deviation of those losses. In Learn and Review, every window of steps is a random
sample of the corpus, so mean and spread are those of the window.

A Focus selects blocks by their earlier standing, or by a score that follows from it. Its windows are harder than the
corpus, but less so than those standings say, since blocks were also selected for their noise (regression to the mean).
Let the *prior* of a block be its standing at the start of the Focus. However blocks were selected by their prior, a new
loss of a block is on average

    location + spread * slope * (prior - mean prior of all blocks)

The slope, the share of a standing that persists, is estimated by regression of the losses of the Focus on the priors.
The spread follows from it: of the variance of all blocks' new standings, which is 1, the prior predicts slope^2 times
the variance of all priors, and the rest is the variance around the regression, which can be measured in the Focus.

Blocks that a Focus selects without a record are measured by those with one. How often a block was trained on does not
enter: what the model has learned of a block makes it easier.

Sums are exact, mostly of integers, and all else is single IEEE operations, so the result is the same on every machine.
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
# samples is known to 4 %. LEAST_SAMPLES: the size of a window at a phase's ends, and of those for deviations.
LOCATION_SAMPLES = 64
SPREAD_SAMPLES = 256
LEAST_SAMPLES = 8

LARGEST = 64.0
"""Losses (nats) and priors are clipped to this."""
_UNIT = 65536.0  # losses and priors are summed as integers, in units of 1 / 65536
_LEAST_VARIANCE = 1 / 16  # of the standings in a Focus
_CHUNK = 1 << 16

Window = tuple[Integers, Integers]


@dataclass(frozen=True)
class Population:
    """Mean and variance of a value over all blocks that have one, weighted as Learn and Review sample them."""

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
        """Summarize values [n_blocks], NaN where a block has none, clipped to LARGEST. None if no block has one."""
        count, total, squares = 0, 0, 0
        for first in range(0, len(values), _CHUNK):
            part = values[first : first + _CHUNK]
            integers = _integers(part[~np.isnan(part)])
            count += len(integers)
            total += int(integers.sum())
            squares += int((integers * integers).sum())
        if not count:
            return None
        return Population(total / count / _UNIT, (count * squares - total * total) / count**2 / _UNIT**2)


@dataclass(frozen=True)
class Curves:
    """The mean and spread of all blocks' losses, at every step so far.

    location, spread: fp64 [steps], mean and standard deviation (nats) of what the losses of all blocks would have been.
    level: both at the end, averaged over the last SPREAD_SAMPLES samples; 0 and 1 before the first step.
    """

    location: Doubles
    spread: Doubles
    level: tuple[float, float]


class Reference:
    """Collects the losses of a run, step by step, and makes the `Curves` from them; 64 bytes a step."""

    def __init__(self, total_steps: int) -> None:
        empty = np.empty(0)
        self.moments = np.zeros((6, total_steps), np.int64)
        """For each step: the number of losses; the sums of losses and of their squares, of priors and of their squares,
        and of the products of both."""
        self._past = Curves(empty, empty, (0.0, 1.0))
        self._prior: Population | None = None
        self._end = 0

    def begin_phase(self, first_step: int, prior: Population | None) -> None:
        """Begin a phase. prior: that of all blocks, if the phase selects by it; None if it samples at random."""
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
        """Enter losses [n] of steps from `first_step` on, `batch_size` each, in order. priors: those of their blocks,
        NaN where a block has none, in a phase that selects by them. Entries that are not `counted` are ignored."""
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
        """Return mean and spread at all steps so far; those of the present phase rest on its steps so far."""
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
    """The windows of a phase: arrays fp64 [steps].

    location, spread: mean and standard deviation of the losses in the window around each step. prior, prior_variance:
    mean and variance of their blocks' priors. wide: how many steps have SPREAD_SAMPLES samples.
    """

    def __init__(self, moments: Integers, spread_before: float) -> None:
        count, loss, squares, prior, prior_squares, products = moments
        steps = len(count)
        size = max(1, int(count.sum()) // steps)
        self.wide = -(-SPREAD_SAMPLES // size)
        narrow = _window(steps, size, LEAST_SAMPLES, LEAST_SAMPLES, 0)
        # A trend shifts the mean of a window that is not centred, so windows shrink towards the end too.
        near = _window(steps, size, LOCATION_SAMPLES, LEAST_SAMPLES, np.arange(steps)[::-1])
        far = _window(steps, size, SPREAD_SAMPLES, LOCATION_SAMPLES, steps)
        self._count = count.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.location, self.prior = _smooth(near, loss, count), _smooth(near, prior, count)
            drawn = _over(narrow, count)
            mean_loss, mean_prior = _over(narrow, loss) / drawn / _UNIT, _over(narrow, prior) / drawn / _UNIT
            freedom = np.where(drawn > 1, 1 - 1 / drawn, 1.0)  # a mean is nearer to its own samples than to others
            self._losses = self._around(squares, loss, mean_loss, loss, mean_loss) / freedom
            self._priors = self._around(prior_squares, prior, mean_prior, prior, mean_prior) / freedom
            self._products = self._around(products, loss, mean_loss, prior, mean_prior) / freedom
            drawn = _over(far, count)
            deviation = np.sqrt(np.maximum(_over(far, self._losses), 0.0) / drawn)
            self.spread = _filled(np.where(deviation > 0, deviation, np.nan), spread_before)
            self.prior_variance = _filled(np.maximum(_over(far, self._priors), 0.0) / drawn, 0.0)

    def _around(self, products: Integers, a: Integers, mean_a: Doubles, b: Integers, mean_b: Doubles) -> Doubles:
        """Return the sums, for each step, of products of the deviations from two means."""
        cross = mean_a * (b / _UNIT) + mean_b * (a / _UNIT) - self._count * mean_a * mean_b
        return np.where(self._count > 0, products / _UNIT**2 - cross, 0.0)

    def slope(self, prior: Population) -> float:
        """Return by how much a new standing rises with the prior: 1 where the phase does not show it, and never so much
        that the priors of all blocks would predict more than the variance of 1."""
        most = 1.0 / math.sqrt(prior.variance)
        squares = math.fsum(self._priors.tolist())
        if squares <= 0:
            return min(1.0, most)
        # The regression is in units of the spread of the Focus, which is that of the corpus divided by sqrt(share).
        regression = max(0.0, math.fsum((self._products / self.spread).tolist())) / squares
        drawn = squares / math.fsum(self._count.tolist())
        share = 1.0 + regression * regression * (prior.variance - drawn)
        return min(most, regression / math.sqrt(share)) if share > 0 else most


def _variance(slope: float, drawn: Doubles, prior: Population) -> Doubles:
    """Return the variance of the new standings of blocks whose priors have the variance `drawn`; for all it is 1."""
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
    """Return the mean in the window around each step, plus the mean of the residuals: alone, it flattens the bends of a
    curve."""
    drawn = _over(window, count)
    mean = _over(window, sums) / _UNIT / drawn
    left = np.where(count > 0, sums / _UNIT - count * mean, 0.0)
    return mean + _over(window, left) / drawn


def _window(steps: int, size: int, most: int, least: int, to_end: Integers | int) -> Window:
    """Return the first and last (exclusive) step of the window of `most` samples around each step, of `size` samples
    each.

    A window reaches back at most half way to the start, where the loss bends most, and at most `to_end` steps to either
    side, but has at least `least` samples.
    """
    at = np.arange(steps)
    half = np.minimum(-(-most // size) // 2, np.minimum(at // 2, to_end))
    half = np.maximum(half, -(-least // size) - 1)
    return np.maximum(0, at - half), np.minimum(steps, at + half + 1)


def _over(window: Window, values: npt.NDArray[np.float64] | Integers) -> npt.NDArray[np.float64]:
    """Return the sums over windows of steps."""
    total = np.zeros(len(values) + 1, values.dtype)
    np.cumsum(values, out=total[1:])
    return (total[window[1]] - total[window[0]]).astype(np.float64)


def _mean(values: Doubles) -> float:
    return math.fsum(values.tolist()) / len(values)


def _filled(values: Doubles, otherwise: float) -> Doubles:
    """Replace NaN by the last value before it, else by the first value after it; by `otherwise` if all are NaN."""
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return np.full(len(values), otherwise)
    return values[known[np.maximum(0, np.searchsorted(known, np.arange(len(values)), side="right") - 1)]]
