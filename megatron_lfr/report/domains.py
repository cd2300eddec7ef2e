"""Says which domains share a colour in plots."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lfr.report.frame import COLOURS, colour
from megatron_lfr.run_folder import Corpus


@dataclass(frozen=True)
class Group:
    """Domains that are drawn as one: their indices in the corpus, with the name and the class of what is drawn."""

    members: list[int]
    name: str
    kind: str


def groups(corpus: Corpus) -> list[Group]:
    """Group the domains: the first ones are alone; if there are more than colours, the rest are together in grey."""
    names = corpus.domains
    alone = len(names) if len(names) <= COLOURS else COLOURS - 1
    groups = [Group([i], names[i], colour(i)) for i in range(alone)]
    rest = list(range(alone, len(names)))
    return [*groups, Group(rest, f"{len(rest)} more domains", colour(None))] if rest else groups
