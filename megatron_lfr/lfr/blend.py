"""Corpora with weights: how many samples of a phase each one gets, and the order that results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.lfr.guard import as_review
from megatron_lfr.lfr.left_out import Scores, Selection
from megatron_lfr.lfr.phase import Phase, largest_remainder
from megatron_lfr.lfr.selection import Order, has_score, id_type, make_order, phase_seed
from megatron_lfr.lfr.weights import EQUAL, Counting

FocusScope = Literal["global", "per-corpus"]


@dataclass(frozen=True)
class Blend:
    """How the corpora of a run share its samples.

    starts [corpora + 1]: corpus c holds the blocks from `starts[c]` to before `starts[c + 1]`. weights [corpora]:
    positive, of any sum; None: every block counts the same.

    A phase of n samples gives corpus c its quota, n x weights[c] / sum(weights), rounded so that the quotas sum to n.
    Learn and Review fill it by complete passes over the corpus and a part of one, each shuffled anew, and then mix the
    samples of the corpora at random. Without weights, all corpora count as one. focus_scope "global": Focus ranks all
    blocks together and samples from them, with or without weights, since difficulty decides. "per-corpus": Focus ranks
    each corpus by itself and gives it its quota, or, without weights, its share of the blocks; it samples uniformly
    from a corpus that has no score at all.
    """

    starts: Sequence[int]
    weights: Sequence[float] | None = None
    focus_scope: FocusScope = "global"

    def __post_init__(self) -> None:
        if self.focus_scope not in get_args(FocusScope):
            raise ValueError(f"focus scope {self.focus_scope!r}: choose from {', '.join(get_args(FocusScope))}")
        if len(self.starts) < 2 or any(a >= b for a, b in pairwise(self.starts)):
            raise ValueError("a blend needs at least one corpus, and no corpus without a block")
        if self.weights is not None:
            if len(self.weights) != len(self.starts) - 1:
                raise ValueError(f"{len(self.weights)} weights for {len(self.starts) - 1} corpora")
            if not all(0 < weight < float("inf") for weight in self.weights):
                raise ValueError("the weights of corpora must be positive numbers")

    @property
    def sizes(self) -> list[int]:
        """Number of blocks of each corpus."""
        return [last - first for first, last in pairwise(self.starts)]

    def quotas(self, samples: int) -> list[int]:
        """Return how many of a phase's samples each corpus gets, where each is sampled by itself."""
        weights = self.sizes if self.weights is None else list(self.weights)
        total = float(sum(weights))
        return largest_remainder([weight / total for weight in weights], samples)

    def _quota(self, corpus: int, samples: int) -> int:
        return self.quotas(samples)[corpus]

    def is_sampled_apart(self, phase: Phase) -> bool:
        """Whether a phase samples from each corpus by itself."""
        return self.focus_scope == "per-corpus" if phase.kind == "focus" else self.weights is not None

    def make_order(
        self,
        phase: Phase,
        scores: Scores,
        samples: int,
        seed: int,
        phase_index: int,
        counting: Counting = EQUAL,
    ) -> tuple[Order, Selection | BlendSelection | None]:
        """Make a phase's order as `selection.make_order` does, for each corpus where these are sampled separately."""
        if not self.is_sampled_apart(phase):
            return make_order(phase, scores, samples, seed, phase_index, counting)
        quotas = self.quotas(samples)
        order: Order = np.empty(samples, id_type(len(scores)))
        selections: list[Selection | None] = []
        filled = 0
        for corpus, quota in enumerate(quotas):
            first, last = self.starts[corpus], self.starts[corpus + 1]
            local = counting.part([(first, last)], partial(self._quota, corpus))
            corpus_seed = _corpus_seed(seed, corpus)
            part, selection = _corpus_order(phase, scores[first:last], quota, corpus_seed, phase_index, local)
            place_ids(part, first, order[filled : filled + quota])
            selections.append(selection)
            filled += quota
        merged = _C.interleave(order, quotas, _corpus_seed(phase_seed(seed, phase_index), len(quotas)))
        return merged, BlendSelection(tuple(self.starts), tuple(selections)) if phase.kind == "focus" else None


@dataclass(frozen=True)
class BlendSelection:
    """What a Focus left out of each corpus: None for a corpus without scores. Has the properties of a `Selection`."""

    starts: tuple[int, ...]
    parts: tuple[Selection | None, ...]

    @property
    def n_blocks(self) -> int:
        return self.starts[-1]

    @property
    def dropped(self) -> int:
        return sum(part.dropped for part in self.parts if part is not None)

    @property
    def dropped_hardest(self) -> int:
        return sum(part.dropped_hardest for part in self.parts if part is not None)

    @property
    def unseen(self) -> int:
        sizes = np.diff(self.starts)
        return sum(int(size) if part is None else part.unseen for size, part in zip(sizes, self.parts, strict=True))

    @property
    def excludes_unseen(self) -> bool:
        """Whether unscored blocks of a corpus that has scores were left out."""
        return any(part.excludes_unseen for part in self.parts if part is not None)

    @property
    def dropped_share(self) -> float:
        """Share of the scored blocks that were dropped."""
        return self.dropped / max(1, self.n_blocks - self.unseen)

    def easiest(self, scores: Scores) -> npt.NDArray[np.bool_]:
        """Return a mask of the blocks that are left out as easy, given the scores that the phase was made from."""
        return self._masks(scores, lambda part, corpus: part.easiest(corpus))

    def left_out(self, scores: Scores) -> npt.NDArray[np.bool_]:
        """Return a mask of the blocks that the phase leaves out, given the scores that it was made from."""
        return self._masks(scores, lambda part, corpus: part.left_out(corpus))

    def _masks(
        self, scores: Scores, mask: Callable[[Selection, Scores], npt.NDArray[np.bool_]]
    ) -> npt.NDArray[np.bool_]:
        corpora = [scores[first:last] for first, last in pairwise(self.starts)]
        return np.concatenate(
            [
                np.zeros(len(corpus), np.bool_) if part is None else mask(part, corpus)
                for corpus, part in zip(corpora, self.parts, strict=True)
            ]
        )


def place_ids(part: Order, first: int, out: Order) -> None:
    """Write the ids of an order of one corpus, whose first block has the id `first`, into `out`, which may be of a
    larger type: the sum is made in that."""
    np.add(part, first, out=out, dtype=out.dtype)


def _corpus_order(
    phase: Phase, scores: Scores, samples: int, seed: int, phase_index: int, counting: Counting
) -> tuple[Order, Selection | None]:
    if phase.kind == "focus" and not has_score(scores):
        phase = as_review(phase)
    order, selection = make_order(phase, scores, max(samples, 1), seed, phase_index, counting)
    return order[:samples], selection


def _corpus_seed(seed: int, corpus: int) -> int:
    """Derive the 64-bit seed of a corpus' orders from the run's seed."""
    digest = hashlib.blake2b(f"megatron_lfr corpus {seed} {corpus}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
