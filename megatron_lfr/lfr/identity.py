"""What the losses of a journal mean: the facts in its meta.json, from which plan, seed and blend are restored.

    {"format": 2, "seed": 1, "seq_length": 128, "corpus": [a digest for each prefix], ..., "segments": [{
        "blocks": 1457, "global_batch_size": 16, "schedule": [a phase each], "samples": [of each phase],
        "blend": {"starts": [0, 1457], "weights": null, "focus_scope": "global"},
        "arrays": {the name of an array that phases use: its SHA-256}}]}

Segments follow one another; the first blocks of each are those of the one before. A segment with phases that are about
some of its corpora alone has "scopes": for each phase, their numbers, or null. Without such arrays it has no "arrays".
Where a phase samples by a weight, "orders_by_weight" says by which rule.
A training loop that is not this package's may store other facts beside these, or none of these: then its journal cannot
be replayed from the folder alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lfr.lfr.blend import Blend
from megatron_lfr.lfr.phase import Phase
from megatron_lfr.lfr.plan import Plan, PlannedPhase, Segment, append_segment
from megatron_lfr.lfr.schedule import Schedule
from megatron_lfr.lfr.scores import used_arrays
from megatron_lfr.lfr.weights import first_weights

FORMAT = 2
"""Version of these facts. Version 1 had no segments."""
ORDERS_BY_WEIGHT = 2
"""The rule by which a Learn or Review with a weight samples. 1, which the facts did not name: by one random draw."""
_ADDED = {
    name: getattr(Phase, name)
    for name in (
        *("drop_hardest", "explore", "weight", "weight_power", "weight_cap", "copies", "scope", "replay"),
        *("cluster_by", "guard", "guard_gain", "passes", "least_scored"),
    )
}
"""Fields of phases that the first runs did not have, with the values that mean what those did: they are stored only
where they have another value, so that the facts of a run that does not use them stay the same."""


OF_LENGTH = ("duration", "unit", "scope")
"""Fields of a phase that say how long it is, and of which blocks: its steps and its corpora say what they amount to."""


def describe_segments(plan: Plan, arrays: Sequence[Mapping[str, str]] = ()) -> list[dict[str, Any]]:
    """Return the facts of each segment of a plan. arrays: for each segment, the digest of each array that there is, of
    which those count that its phases use."""
    given = arrays or [{}] * len(plan.segments)
    return [_describe_segment(segment, given[number]) for number, segment in enumerate(plan.segments)]


def _describe_segment(segment: Segment, arrays: Mapping[str, str]) -> dict[str, Any]:
    scopes = [None if planned.corpora is None else list(planned.corpora) for planned in segment.phases]
    used = used_arrays(planned.phase for planned in segment.phases)
    facts = {
        "blocks": segment.n_blocks,
        "global_batch_size": segment.global_batch_size,
        "schedule": [describe_phase(planned.phase) for planned in segment.phases],
        "samples": [planned.samples for planned in segment.phases],
        "blend": dataclasses.asdict(segment.blend),
        **({"scopes": scopes} if any(scopes) else {}),
        **({"orders_by_weight": ORDERS_BY_WEIGHT} if _samples_by_weight(segment.phases) else {}),
    }
    return facts | ({"arrays": {name: arrays[name] for name in used}} if used else {})


def _samples_by_weight(phases: Sequence[PlannedPhase]) -> bool:
    """Whether a phase samples from all blocks by a weight, or may."""
    return any(
        phase.weighted_by is not None and (phase.kind != "focus" or phase.explore > 0 or phase.may_be_declined)
        for phase in (planned.phase for planned in phases)
    )


def read_arrays(identity: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return for each segment the digest of each array that its phases use, by name; ValueError for facts of none."""
    arrays = [segment.get("arrays", {}) for segment in identity["segments"]]
    for stored in arrays:
        if not isinstance(stored, dict) or not all(isinstance(digest, str) for digest in stored.values()):
            raise ValueError("arrays: expected a digest by each name")
    return arrays


def describe_phase(phase: Phase) -> dict[str, Any]:
    """Return the facts of a phase."""
    facts = dataclasses.asdict(phase) | {"weights": phase.weighting}
    if phase.kind != "focus" or phase.sampling == "passes" or phase.weighting == first_weights(phase.sampling):
        del facts["weights"]  # as in the first runs, which could not choose them
    return {name: value for name, value in facts.items() if name not in _ADDED or value != _ADDED[name]}


def check_format(identity: Mapping[str, Any]) -> None:
    """Raise a ValueError for facts of another version."""
    version = identity.get("format", 1)
    if version != FORMAT:
        raise ValueError(f"format {version!r}: this version of megatron_lfr reads format {FORMAT}")


def read_plan(identity: Mapping[str, Any]) -> tuple[Plan, int]:
    """Restore (plan, seed) from the facts. ValueError names what is missing or wrong."""
    check_format(identity)
    try:
        segments = identity["segments"]
        if not isinstance(segments, list) or not segments:
            raise ValueError("segments: expected a list of one or more")
        plan = None
        for segment in segments:
            plan = _read_segment(segment, plan, _positive(identity, "seq_length"))
        assert plan is not None
        return plan, int(identity["seed"])
    except KeyError as error:
        raise ValueError(f"{error} is missing; was it written by another training loop?") from None
    except TypeError as error:
        raise ValueError(str(error)) from None


def read_phase(facts: Any) -> Any:
    """Return the fields of a phase from its facts; what is no mapping stays, for `Schedule` to refuse."""
    if not isinstance(facts, Mapping):
        return facts
    return {"weights": first_weights(facts.get("sampling", "passes")), **facts}


def _read_segment(segment: Mapping[str, Any], past: Plan | None, seq_length: int) -> Plan:
    """Return the plan of a segment and of those before it."""
    phases = Schedule.from_dicts([read_phase(facts) for facts in segment["schedule"]]).phases
    samples = [int(count) for count in segment["samples"]]
    if len(samples) != len(phases) or min(samples) < 1:
        raise ValueError(f"samples {samples}: expected a number for each of {len(phases)} phases")
    blend, n_blocks = Blend(**segment["blend"]), _positive(segment, "blocks")
    if blend.starts[-1] != n_blocks:
        raise ValueError(f"blend: expected {n_blocks} blocks, not {blend.starts[-1]}")
    scopes = segment.get("scopes", [None] * len(phases))
    if len(scopes) != len(phases):
        raise ValueError(f"scopes {scopes}: expected one for each of {len(phases)} phases")
    corpora = [None if scope is None else tuple(_corpus(number, blend) for number in scope) for scope in scopes]
    plan = append_segment(past, phases, samples, corpora, blend, seq_length, _positive(segment, "global_batch_size"))
    if _samples_by_weight(plan.segments[-1].phases) and segment.get("orders_by_weight") != ORDERS_BY_WEIGHT:
        raise ValueError(
            "a phase samples by a weight, and did so by another rule in the version of megatron_lfr that began the "
            "run: its orders cannot be made again"
        )
    return plan


def _corpus(number: Any, blend: Blend) -> int:
    if not isinstance(number, int) or not 0 <= number < len(blend.sizes):
        raise ValueError(f"scopes: {number!r} is none of the {len(blend.sizes)} corpora")
    return number


def _positive(facts: Mapping[str, Any], key: str) -> int:
    value = facts[key]
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} {value!r}: expected a positive number")
    return value
