"""What the losses of a journal mean: the facts in its meta.json, from which plan, seed and blend are restored.

    {"format": 2, "seed": 1, "seq_length": 128, "corpus": [a digest for each prefix], ..., "segments": [{
        "blocks": 1457, "global_batch_size": 16, "schedule": [a phase each], "samples": [of each phase],
        "blend": {"starts": [0, 1457], "weights": null, "focus_scope": "global"},
        "arrays": {the name of an array that phases use: its SHA-256}}]}

A segment is a stretch of training with one set of blocks, phases and batch size; runs have one. Without such arrays it
has no "arrays". A training loop that is not this package's may store other facts beside these, or none of these: then
its journal cannot be replayed from the folder alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_lfr.lfr.blend import Blend
from megatron_lfr.lfr.schedule import Plan, Schedule, lay_out
from megatron_lfr.lfr.scores import used_arrays
from megatron_lfr.lfr.weights import phase_facts, remembered_phase

FORMAT = 2
"""Version of these facts. Version 1 had no segments."""
_NONE: Mapping[str, str] = {}


def describe_segment(plan: Plan, blend: Blend | None = None, arrays: Mapping[str, str] = _NONE) -> dict[str, Any]:
    """Return the facts of a segment that is trained by `plan`; without a blend, every block counts the same. arrays:
    the digest of each array that there is, of which those count that phases use."""
    used = used_arrays(planned.phase for planned in plan.phases)
    facts = {
        "blocks": plan.n_blocks,
        "global_batch_size": plan.global_batch_size,
        "schedule": [phase_facts(planned.phase) for planned in plan.phases],
        "samples": [planned.samples for planned in plan.phases],
        "blend": dataclasses.asdict(blend or Blend([0, plan.n_blocks])),
    }
    return facts | ({"arrays": {name: arrays[name] for name in used}} if used else {})


def read_arrays(identity: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of each array that the run's phases use, by name; ValueError for facts of none."""
    stored = identity["segments"][0].get("arrays", {})
    if not isinstance(stored, dict) or not all(isinstance(digest, str) for digest in stored.values()):
        raise ValueError("arrays: expected a digest by each name")
    return dict(stored)


def check_format(identity: Mapping[str, Any]) -> None:
    """Raise a ValueError for facts of another version."""
    version = identity.get("format", 1)
    if version != FORMAT:
        raise ValueError(f"format {version!r}: this version of megatron_lfr reads format {FORMAT}")


def read_plan(identity: Mapping[str, Any]) -> tuple[Plan, int, Blend]:
    """Restore (plan, seed, blend) from the facts. ValueError names what is missing or wrong."""
    check_format(identity)
    try:
        segments = identity["segments"]
        if not isinstance(segments, list) or len(segments) != 1:
            raise ValueError("segments: this version of megatron_lfr reads runs of one segment")
        segment = segments[0]
        phases = Schedule.from_dicts([remembered_phase(facts) for facts in segment["schedule"]]).phases
        samples = [int(count) for count in segment["samples"]]
        if len(samples) != len(phases) or min(samples) < 1:
            raise ValueError(f"samples {samples}: expected a number for each of {len(phases)} phases")
        sizes = [
            _positive(segment, "blocks"),
            _positive(identity, "seq_length"),
            _positive(segment, "global_batch_size"),
        ]
        plan, blend = lay_out(phases, samples, *sizes), Blend(**segment["blend"])
        if blend.starts[-1] != plan.n_blocks:
            raise ValueError(f"blend: expected {plan.n_blocks} blocks, not {blend.starts[-1]}")
        return plan, int(identity["seed"]), blend
    except KeyError as error:
        raise ValueError(f"{error} is missing; was it written by another training loop?") from None
    except TypeError as error:
        raise ValueError(str(error)) from None


def _positive(facts: Mapping[str, Any], key: str) -> int:
    value = facts[key]
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} {value!r}: expected a positive number")
    return value
