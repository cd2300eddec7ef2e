"""How much a block counts in a phase: by its score, by a weight from outside of the run, as one of several copies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr.scores import COPIES, Arrays, is_name, split_score

if TYPE_CHECKING:
    from megatron_lfr.lfr.schedule import Phase, Plan, PlannedPhase

Weights = Literal["auto", "uniform", "capped", "perplexity"]
CountedCopies = Literal["once", "log", "all"]
NO_WEIGHT = "none"

_LARGEST_POWER = 16.0
_ADDED: dict[str, Any] = {
    "drop_hardest": 0.0,
    "explore": 0.0,
    "weight": NO_WEIGHT,
    "weight_power": 1.0,
    "weight_cap": 4.0,
    "copies": "all",
}
"""Fields that the first runs' phases did not have, with the values that mean what those did."""


def check_weighting(phase: Phase) -> None:
    """Raise ValueError for a phase whose tails, weights, exploration or copies are illegal, or do not go together."""
    if not (math.isfinite(phase.drop_hardest) and phase.drop_hardest >= 0 and phase.drop + phase.drop_hardest < 1):
        raise ValueError(
            f"phase drop_hardest {phase.drop_hardest}: must be at least 0, and below 1 together with drop {phase.drop}"
        )
    if not 0 <= phase.explore < 1:
        raise ValueError(f"phase explore {phase.explore}: must be at least 0 and below 1")
    if not 0 < phase.weight_power <= _LARGEST_POWER:
        raise ValueError(f"phase weight_power {phase.weight_power}: must be above 0, and at most {_LARGEST_POWER:g}")
    if not 1 <= phase.weight_cap < math.inf:
        raise ValueError(f"phase weight_cap {phase.weight_cap}: must be at least 1 and finite")
    mode, name = split_score(phase.weight)
    if phase.weight != NO_WEIGHT and (mode != "file" or name is None or not is_name(name)):
        raise ValueError(f"phase weight {phase.weight!r}: choose from {NO_WEIGHT}, file:NAME")
    if phase.kind == "focus":
        if phase.copies != "all":
            raise ValueError(f"phase copies {phase.copies}: only a learn or review phase counts copies; use weight")
        if phase.sampling == "passes" and phase.weights in ("capped", "perplexity"):
            raise ValueError(
                f"phase weights {phase.weights}: a pass visits every kept block once; use sampling visits or choice"
            )
    else:
        for field in ("drop_hardest", "explore"):
            if value := getattr(phase, field):
                raise ValueError(f"phase {field} {value}: only a focus phase has it, but this one is {phase.kind}")
    if phase.unit == "passes" and (phase.weight != NO_WEIGHT or phase.copies != "all"):
        raise ValueError("phase unit passes: a pass has no length with weight or copies; use epochs, steps or share")


def phase_facts(phase: Phase) -> dict[str, Any]:
    """Return what a run remembers of a phase, so that the phases of runs that use none of the added fields stay as they
    were."""
    facts = asdict(phase) | {"weights": phase.weighting}
    if phase.kind != "focus" or phase.sampling == "passes" or phase.weighting == _first_weights(phase.sampling):
        del facts["weights"]
    return {name: value for name, value in facts.items() if name not in _ADDED or value != _ADDED[name]}


def remembered_phase(facts: Any) -> Any:
    """Return the fields of a phase from what a run remembers; what is no mapping stays, for others to refuse."""
    if not isinstance(facts, Mapping):
        return facts
    return {"weights": _first_weights(facts.get("sampling", "passes")), **facts}


def as_begun(phases: Sequence[Phase], remembered: Sequence[Any]) -> tuple[Phase, ...]:
    """Return phases with the weights of a run that was begun with them before weights could be chosen. remembered: what
    that run remembers of its phases; none before it has begun."""
    if len(phases) != len(remembered):
        return tuple(phases)
    return tuple(
        replace(phase, weights=_first_weights(phase.sampling))
        if phase.weights == "auto" and isinstance(facts, Mapping) and "weights" not in facts
        else phase
        for phase, facts in zip(phases, remembered, strict=True)
    )


def _first_weights(sampling: str) -> Weights:
    """The weights that `sampling` had before they could be chosen."""
    return "auto" if sampling == "passes" else "perplexity"


@dataclass(frozen=True)
class Counting:
    """What makes blocks count differently in a phase, whatever their scores. None of it: every block counts the same.

    weights: fp32 [n_blocks], as they are in the file. groups: uint32 [n_blocks], the same number for copies of each
    other. earlier: the samples of each Learn and Review before the phase, which have used up turns of the copies.
    """

    weights: npt.NDArray[np.float32] | None = None
    groups: npt.NDArray[np.uint32] | None = None
    earlier: tuple[int, ...] = ()

    def part(self, first: int, last: int, earlier: Iterable[int]) -> Counting:
        """Return the same for the blocks from `first` to before `last`."""
        weights = None if self.weights is None else self.weights[first:last]
        groups = None if self.groups is None else self.groups[first:last]
        return Counting(weights, groups, tuple(earlier))


EQUAL = Counting()


def count_in(planned: PlannedPhase, plan: Plan, arrays: Arrays) -> Counting:
    """Return what makes blocks count differently in a phase of a plan, given the arrays that its phases name."""
    phase = planned.phase
    weights = None if phase.weighted_by is None else arrays[phase.weighted_by].view(np.float32)
    groups = None if phase.copies == "all" else arrays[COPIES].view(np.uint32)
    earlier = [p.samples for p in plan.phases[: planned.index] if p.phase.kind != "focus"]
    return Counting(weights, groups, tuple(earlier))
