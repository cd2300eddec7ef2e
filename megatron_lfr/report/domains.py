"""Which domains share a colour in plots."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lfr.report.frame import COLOURS, colour
from megatron_lfr.run_folder import Corpus


@dataclass(frozen=True)
class Group:
    """Domains (their numbers) that are drawn as one, with its class."""

    members: list[int]
    name: str
    kind: str


def groups(corpus: Corpus) -> list[Group]:
    """The first domains each alone; where there are more than colours, the rest together in grey."""
    names = corpus.domains
    alone = len(names) if len(names) <= COLOURS else COLOURS - 1
    found = [Group([i], names[i], colour(i)) for i in range(alone)]
    rest = list(range(alone, len(names)))
    return [*found, Group(rest, f"{len(rest)} more domains", colour(None))] if rest else found
