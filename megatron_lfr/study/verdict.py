"""The one sentence that a study's figures support in a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_lfr.study.statistics import Interval

Kind = Literal["pays", "nothing pays", "not decided"]
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Evidence:
    """A contrast with the reference: the difference in macro held-out loss, arm minus reference, by seeds and by
    documents. adjusted_p: Holm's, of secondary contrasts; None of primary ones, and where there is one seed."""

    arm: str
    by_seeds: Interval
    by_documents: Interval
    is_primary: bool
    adjusted_p: float | None = None

    @property
    def is_better(self) -> bool:
        """Whether the arm is better for other seeds and for other documents: both intervals lie below 0, and of
        secondary contrasts, Holm's p is below 0.05."""
        ends = self.by_seeds.high, self.by_documents.high
        below = all(end is not None and end < 0 for end in ends)
        return below and (self.is_primary or (self.adjusted_p is not None and self.adjusted_p < SIGNIFICANT))

    def excludes_gain(self, smallest: float) -> bool:
        """Whether the interval over seeds leaves no room for an arm that is better by more than `smallest` nats."""
        return self.by_seeds.low is not None and self.by_seeds.low > -smallest


@dataclass(frozen=True)
class Verdict:
    """What the figures say of a cell. arm: the one that pays."""

    kind: Kind
    sentence: str
    arm: str | None = None


def decide(
    cell: str, reference: str, evidence: Sequence[Evidence], smallest: float, missing: Sequence[str] = ()
) -> Verdict:
    """Return what the contrasts with the reference say. Arms that use planted labels must not be among them. missing:
    arms to be compared that have no result yet.

    The rule (ours), in this order:

    - *pays*: an arm is better than the reference (`Evidence.is_better`: the 95 % intervals over seeds and over
      documents both lie below 0; secondary contrasts also after Holm), and by at least `smallest` nats in the mean. If
      several are, the primary ones come first, then the lowest mean.
    - *nothing pays*: each arm's interval over seeds lies above -`smallest`: a gain worth having is excluded for all,
      and none is missing.
    - *not decided*: anything else; also with one seed, which has no interval.
    """
    better = [one for one in evidence if one.is_better and one.by_seeds.mean <= -smallest]
    if better:
        best = min(better, key=lambda one: (not one.is_primary, one.by_seeds.mean))
        kind = "primary" if best.is_primary else "secondary, after Holm"
        return Verdict(
            "pays",
            f"{cell}: {best.arm} pays: its held-out loss is {-best.by_seeds.mean:.3f} nats below that of {reference} at"
            f" equal compute ({_interval(best.by_seeds)} over {best.by_seeds.n} seeds; {kind}).",
            best.arm,
        )
    if evidence and not missing and all(one.excludes_gain(smallest) for one in evidence):
        lowest = min(one.by_seeds.low for one in evidence if one.by_seeds.low is not None)
        return Verdict(
            "nothing pays",
            f"{cell}: nothing pays: no arm is better than {reference} at equal compute by {smallest:g} nats or more "
            f"(the best end of any interval is {lowest:+.3f}).",
        )
    return Verdict("not decided", f"{cell}: not decided: {_why(evidence, smallest, missing)}.")


def _why(evidence: Sequence[Evidence], smallest: float, missing: Sequence[str]) -> str:
    if not evidence:
        return "no arm has been compared with the reference yet"
    fewest = min(one.by_seeds.n for one in evidence)
    if fewest < 2:
        return f"with {fewest} seed{'s' * (fewest != 1)} there is no interval"
    open_ = [one.arm for one in evidence if not one.excludes_gain(smallest)]
    if not open_:
        return f"no result yet of {', '.join(missing)}; of the others, a gain of {smallest:g} nats is excluded"
    return f"the intervals of {', '.join(open_)} leave room for a gain of {smallest:g} nats, and none is shown"


def _interval(interval: Interval) -> str:
    return f"95 % {interval.low:+.3f} to {interval.high:+.3f}"
