"""Whether some block has been trained on twice when a Focus needs that, as far as it follows from the plan alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_lfr.lfr.plan import Plan, PlannedPhase
from megatron_lfr.lfr.scope import Scope, outside


def check_second_visits(plan: Plan) -> None:
    """Raise ValueError for a Focus by improvement in the last segment before which it is not certain that a block of
    its scope has been trained on twice, if no step is skipped. Where each corpus is ranked by itself, one without a
    score is sampled uniformly, and nothing is refused."""
    segment = plan.segments[-1]
    for planned in segment.phases:
        if not planned.phase.needs_two_visits or segment.blend.focus_scope == "per-corpus":
            continue
        corpora = _corpora(planned, plan)
        blocks = sum(segment.blend.sizes[corpus] for corpus in corpora)
        visits = sum(_visits(earlier, plan, corpora) for earlier in plan.phases[: planned.index])
        if visits <= blocks:
            raise ValueError(
                f"phase {planned.index}: score improvement needs blocks that have been trained on twice, and of its "
                f"{blocks} blocks none is certain to be: the phases before it train on them {visits} times at least. "
                "Begin with a learn phase of more than one epoch"
            )


def _corpora(planned: PlannedPhase, plan: Plan) -> Sequence[int]:
    blend = plan.segments[planned.segment].blend
    return range(len(blend.sizes)) if planned.corpora is None else planned.corpora


def _visits(planned: PlannedPhase, plan: Plan, wanted: Collection[int]) -> int:
    """Return how many samples of a phase are certain to be of the `wanted` corpora."""
    inside, others = _corpora(planned, plan), planned.phase.replayed(planned.samples)
    visits = _least(planned.samples - others, planned, plan, inside, wanted)
    if others:
        visits += _least(others, planned, plan, outside(inside, plan.segments[planned.segment].blend), wanted)
    return visits


def _least(samples: int, planned: PlannedPhase, plan: Plan, sampled: Sequence[int], wanted: Collection[int]) -> int:
    """Return how many of `samples` samples from the corpora `sampled` are certain to be of the `wanted` ones."""
    both = [corpus for corpus in sampled if corpus in wanted]
    if len(both) == len(sampled):
        return samples
    if planned.phase.kind == "focus" or planned.earlier or planned.phase.passes == "continued":
        return 0
    scope = Scope(plan.segments[planned.segment].blend, sampled)
    if scope.blend.weights is not None:
        return sum(quota for corpus, quota in zip(sampled, scope.blend.quotas(samples), strict=True) if corpus in both)
    passes = samples // scope.n_blocks if planned.phase.counts_equally else 0
    return passes * sum(size for corpus, size in zip(sampled, scope.blend.sizes, strict=True) if corpus in both)
