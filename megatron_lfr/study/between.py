"""What runs of a study have in common: blocks that they drop, the order in which they learn domains, and how they rank
by loss and by tasks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from megatron_lfr.analysis.similarity import BlockSet, compare
from megatron_lfr.study.results import Result, Results
from megatron_lfr.study.statistics import kendall_tau

T = TypeVar("T")

LEARNED = 0.75
"""A domain counts as learned once its loss has come down by this share of all that it comes down in the first phase.
With a half, all are learned in the first two of its 24 windows, when a model knows little but how frequent tokens are.
"""
_ANSWER = ("answer_logprob", "target_logprob")
_PAIRS: dict[str, Callable[[Result, Result], bool]] = {
    "seeds": lambda a, b: a.size == b.size and a.seed != b.seed,
    "sizes": lambda a, b: a.size != b.size and a.seed == b.seed,
    "both": lambda a, b: a.size != b.size and a.seed != b.seed,
}
"""Which pairs of runs differ in their seed, their size, or both. Runs of one seed meet the same blocks in the same
order as long as their schedules agree: what two sizes then have in common is in part that order, which pairs that
differ in both do not share."""


def dropped_sets(results: Results) -> list[dict[str, Any]]:
    """Return how alike the sets are that an arm's Focus phases drop, for each corpus and rate: `_PAIRS`, of which those
    of seeds are the noise."""
    rows = []
    for arm, (corpus, rate) in itertools.product(results.study.arms, _groups(results)):
        sets = [(run, run.dropped()) for run in _runs(results, arm, corpus, rate)]
        for number in sorted({number for _, dropped in sets for number in dropped}, key=int):
            members = [(run, dropped[number]) for run, dropped in sets if number in dropped]
            pairs = {name: _likeness(_pairs(members, name)) for name in _PAIRS}
            rows.append({"arm": arm, "corpus": corpus, "rate": rate, "phase": int(number), **pairs})
    return rows


def _likeness(pairs: Iterable[tuple[BlockSet, BlockSet]]) -> dict[str, Any]:
    compared = [compare(a, b) for a, b in pairs if a.n_blocks == b.n_blocks]
    return {
        "pairs": len(compared),
        "cosine": mean_of(pair.cosine for pair in compared),
        "by_chance": mean_of(pair.by_chance for pair in compared),
    }


def orders_of_domains(results: Results) -> dict[str, Any]:
    """Return when the reference's runs have learned each domain, and for each corpus and rate Kendall's tau of these
    orders, between runs as in `_PAIRS`."""
    rows, taus = [], []
    for corpus, rate in _groups(results):
        times = [
            (run, learned_at(run.json["learning"])) for run in _runs(results, results.study.reference, corpus, rate)
        ]
        rows += [{"run": run.json["name"], "learned_at": at} for run, at in times]
        taus.append({"corpus": corpus, "rate": rate, **{name: _tau(_pairs(times, name)) for name in _PAIRS}})
    return {"tau": taus, "runs": rows}


def _tau(pairs: Iterable[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    taus = [kendall_tau([a[name] for name in a], [b[name] for name in a]) for a, b in pairs if a.keys() == b.keys()]
    known = [tau for tau in taus if math.isfinite(tau)]
    return {"pairs": len(known), "tau": mean_of(known)}


def learned_at(learning: dict[str, list[float | None]]) -> dict[str, float]:
    """Return when each domain is learned, as a share of the first phase: where its mean loss has come down by LEARNED
    of the way from its first to its lowest window, by straight lines between windows."""
    times = {}
    for domain, windows in learning.items():
        known = [(number, loss) for number, loss in enumerate(windows) if loss is not None]
        losses = [loss for _, loss in known]
        if len(losses) < 2 or min(losses) == losses[0]:
            times[domain] = math.inf
            continue
        level = losses[0] - LEARNED * (losses[0] - min(losses))
        after = next(i for i, loss in enumerate(losses) if loss <= level)
        (a, before), (b, behind) = known[after - 1], known[after]
        times[domain] = (a + (b - a) * (before - level) / (before - behind) + 0.5) / len(windows)
    return times


def task_orders(results: Results) -> list[dict[str, Any]]:
    """Return Kendall's tau of all runs' orders by held-out loss and by each task, from the best on: 1 where they are
    the same."""
    by_run = [(run.loss, answers(run)) for run in results.runs]
    rows = []
    for task in dict.fromkeys(name for _, known in by_run for name in known):
        pairs = [(loss, -known[task]) for loss, known in by_run if task in known]
        losses, misses = zip(*pairs, strict=True)
        rows.append({"task": task, "runs": len(pairs), "tau": kendall_tau(losses, misses)})
    return rows


def answers(run: Result) -> dict[str, float]:
    """Return the mean log-likelihood of the answer in each task of a run, nats."""
    return {task: measures[key] for task, measures in run.json["tasks"].items() for key in _ANSWER if key in measures}


def mean_of(values: Iterable[float]) -> float:
    """Return the mean of some numbers; NaN of none."""
    numbers = [float(value) for value in values]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _groups(results: Results) -> list[tuple[str, str]]:
    """Return the corpora and rates that have a result."""
    return list(dict.fromkeys((corpus, rate) for corpus, _, rate in results.cells()))


def _runs(results: Results, arm: str, corpus: str, rate: str) -> list[Result]:
    """Return an arm's runs on a corpus at a rate, of all sizes and seeds, at the usual compute."""
    cells = [cell for cell in results.cells() if (cell[0], cell[2]) == (corpus, rate)]
    return [run for cell in cells for run in results.of(cell, arm).values()]


def _pairs(members: Sequence[tuple[Result, T]], name: str) -> list[tuple[T, T]]:
    """Return what pairs of runs hold that differ as `_PAIRS[name]` says."""
    return [(a, b) for (run, a), (other, b) in itertools.combinations(members, 2) if _PAIRS[name](run, other)]
