"""Scopes: some of a blend's corpora, as a blend of their own, and orders of blocks inside and outside of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_lfr import _C
from megatron_lfr.lfr.blend import Blend, BlendSelection
from megatron_lfr.lfr.left_out import Scores, Selection
from megatron_lfr.lfr.phase import Phase
from megatron_lfr.lfr.selection import Order, id_type, phase_seed
from megatron_lfr.lfr.weights import EQUAL, Counting, join_ranges

_CHUNK = 1 << 20


class Scope:
    """Some corpora of a blend. `blend` has them alone, with blocks numbered from 0; `ranges` are their blocks' ids."""

    def __init__(self, of: Blend, corpora: Sequence[int]) -> None:
        self.ranges = [(of.starts[corpus], of.starts[corpus + 1]) for corpus in corpora]
        sizes = [last - first for first, last in self.ranges]
        starts = [0, *np.cumsum(sizes).tolist()]
        weights = None if of.weights is None else [of.weights[corpus] for corpus in corpora]
        self.blend = Blend(starts, weights, of.focus_scope)

    @property
    def n_blocks(self) -> int:
        return self.blend.starts[-1]

    def take(self, scores: Scores) -> Scores:
        """Return those of the scope's blocks, given the scores of all blocks."""
        return join_ranges(scores, self.ranges)

    def ids(self, order: Order, of: int) -> Order:
        """Return an order of the scope's blocks as ids among `of` blocks."""
        ids: Order = order.astype(id_type(of))
        starts = np.array(self.blend.starts[:-1])
        shifts = (np.array([first for first, _ in self.ranges]) - starts).astype(ids.dtype)
        for first in range(0, len(ids), _CHUNK):
            part = ids[first : first + _CHUNK]
            part += shifts[np.searchsorted(starts, part, side="right") - 1]
        return ids

    def contains(self, n_blocks: int) -> npt.NDArray[np.bool_]:
        """Return a mask [n_blocks] of the scope's blocks."""
        mask = np.zeros(n_blocks, np.bool_)
        for first, last in self.ranges:
            mask[first:last] = True
        return mask


@dataclass(frozen=True)
class ScopedSelection:
    """What a Focus left out of its scope. Has the properties of a `Selection`; blocks outside are left out, too."""

    selection: Selection | BlendSelection
    scope: Scope
    of_blocks: int

    @property
    def starts(self) -> tuple[int, ...] | None:
        """The stretches of the run's `of_blocks` blocks that were each chosen from by themselves, as their first blocks
        and the end; None where there was one."""
        if not isinstance(self.selection, BlendSelection):
            return None
        return tuple(sorted({0, self.of_blocks, *(edge for one in self.scope.ranges for edge in one)}))

    @property
    def n_blocks(self) -> int:
        return self.scope.n_blocks

    @property
    def dropped(self) -> int:
        return self.selection.dropped

    @property
    def dropped_hardest(self) -> int:
        return self.selection.dropped_hardest

    @property
    def unseen(self) -> int:
        return self.selection.unseen

    @property
    def excludes_unseen(self) -> bool:
        return self.selection.excludes_unseen

    @property
    def dropped_share(self) -> float:
        """Share of the scope's scored blocks that were dropped."""
        return self.selection.dropped_share

    def easiest(self, scores: Scores) -> npt.NDArray[np.bool_]:
        """Return a mask of the scope's blocks that are left out as easy, given the scores that the phase was made
        from."""
        return self._mask(self.selection.easiest(self.scope.take(scores)), len(scores), outside=False)

    def left_out(self, scores: Scores) -> npt.NDArray[np.bool_]:
        """Return a mask of the blocks that the phase leaves out, given the scores that it was made from."""
        return self._mask(self.selection.left_out(self.scope.take(scores)), len(scores), outside=True)

    def _mask(self, inside: npt.NDArray[np.bool_], n_blocks: int, outside: bool) -> npt.NDArray[np.bool_]:
        mask = np.full(n_blocks, outside)
        for (first, last), start in zip(self.scope.ranges, self.scope.blend.starts, strict=False):
            mask[first:last] = inside[start : start + last - first]
        return mask


def make_scoped_order(
    scope: Scope,
    rest: Scope | None,
    phase: Phase,
    scores: Scores,
    samples: int,
    seed: int,
    phase_index: int,
    counting: Counting = EQUAL,
) -> tuple[Order, ScopedSelection | None]:
    """Make the order of a phase as `Blend.make_order` does, of the blocks in `scope`, and of the share `phase.replay`
    of the samples from those in `rest`, all of them mixed at random.

    scores: fp32 [n_blocks], those of all blocks; counting: of all blocks, too.
    """
    others = phase.replayed(samples)
    local = counting.part(scope.ranges, int)
    inside, selection = scope.blend.make_order(
        phase, scope.take(scores), max(1, samples - others), seed, phase_index, local
    )
    order = scope.ids(inside[: samples - others], len(scores))
    if others:
        assert rest is not None
        local = replace(counting, earlier=(), chain=None).part(rest.ranges, int)
        old, _ = rest.blend.make_order(phase, rest.take(scores), others, _replay_seed(seed), phase_index, local)
        quotas = [len(order), others]
        order = np.concatenate((order, rest.ids(old, len(scores))))
        order = _C.interleave(order, quotas, _replay_seed(phase_seed(seed, phase_index)))
    return order, None if selection is None else ScopedSelection(selection, scope, len(scores))


def outside(corpora: Sequence[int], of: Blend) -> list[int]:
    """Return the other corpora of a blend."""
    return [corpus for corpus, _ in enumerate(pairwise(of.starts)) if corpus not in corpora]


def _replay_seed(seed: int) -> int:
    """Derive the 64-bit seed of replayed samples."""
    digest = hashlib.blake2b(f"megatron_lfr replay {seed}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
