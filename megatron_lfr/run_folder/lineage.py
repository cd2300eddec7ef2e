"""Where a run comes from: the parent that a branch left, as run.json names it.

    {"format": 1, "parent": {"folder": "/data/runs/main", "step": 4000,
                             "manifest_sha256": "...", "journal_sha256": "..."}}

Versions that know of no parents read the format alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parent:
    """The run that a branch left.

    folder: its run folder, absolute. step: the number of steps that both have in common. manifest_sha256: SHA-256 of
    manifest.json of the parent's checkpoint of that step, which names the hash of each of its files. journal_sha256:
    SHA-256 of all losses until then, fp32, little-endian, in the order of training. version: which version of the main
    path the branch is; None where it was given by its step.
    """

    folder: str
    step: int
    manifest_sha256: str
    journal_sha256: str
    version: int | None = None


def parse_parent(description: Mapping[str, Any]) -> Parent | None:
    """Return the parent that a run's description names; None where it is no branch. ValueError says what is wrong."""
    facts = description.get("parent")
    if facts is None:
        return None
    try:
        parent = Parent(**facts)
    except TypeError as error:
        raise ValueError(f"parent: {error}") from None
    digests = (parent.manifest_sha256, parent.journal_sha256)
    if not all(isinstance(text, str) for text in (parent.folder, *digests)) or not (
        isinstance(parent.step, int) and isinstance(parent.version, int | None)
    ):
        raise ValueError(f"parent: expected a folder, a step and two digests, not {facts}")
    return parent
