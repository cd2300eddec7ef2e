"""Scores by a function of the user's: score: call:PACKAGE.MODULE:FUNCTION.

The function is called on each node's leader when the phase begins, and its result is kept in the journal: whoever makes
the order again, a resume, a report or a branch, reads it there and runs nothing of the user's.
"""

from __future__ import annotations

import hashlib
import importlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lfr.lfr.ledger import Ledger
from megatron_lfr.lfr.plan import Plan, PlannedPhase

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Records:
    """What is known of the blocks of a segment when one of its phases begins. None of it can be written to.

    losses: fp32 [n_blocks], mean NLL a token (nats) when the block was last trained on, NaN if it never was. steps:
    int32 [n_blocks], the optimizer step, from 0, of that loss; -1 without one. visits: uint16 [n_blocks], how often the
    block was trained on. starts: the first block of each prefix of --data-path, and the number of blocks. step: the
    first one of the phase.
    """

    losses: npt.NDArray[np.float32]
    steps: npt.NDArray[np.int32]
    visits: npt.NDArray[np.uint16]
    starts: Sequence[int]
    step: int

    @property
    def domains(self) -> npt.NDArray[np.uint32]:
        """The number of each block's prefix, from 0: uint32 [n_blocks], made at each access."""
        return np.repeat(np.arange(len(self.starts) - 1, dtype=np.uint32), np.diff(self.starts))


ScoreFunction = Callable[[Records], npt.ArrayLike]
"""Returns a number for each block, fp32 or fp64 [n_blocks]: higher is harder, NaN for a block without a score. It must
depend on its argument alone, so that all nodes get the same."""


def find_function(name: str) -> ScoreFunction:
    """Import PACKAGE.MODULE:FUNCTION; ValueError says what is missing."""
    module, _, attribute = name.partition(":")
    try:
        value = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # a module of the user's may raise anything
        raise ValueError(f"score call:{name}: importing {module} fails: {type(error).__name__}: {error}") from error
    if not callable(value):
        raise ValueError(f"score call:{name}: {module} has no function {attribute}")
    function: ScoreFunction = value
    return function


def check_functions(plan: Plan, step: int = 0) -> None:
    """Import the functions of phases that begin at `step` or later; ValueError names the phase. What a phase that has
    begun was made from is in the journal."""
    for planned in plan.phases:
        if (name := planned.phase.scored_by_function) is not None and planned.first_step >= step:
            try:
                find_function(name)
            except ValueError as error:
                raise ValueError(f"phase {planned.index}: {error}") from None


def call_function(name: str, planned: PlannedPhase, ledger: Ledger, starts: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return the scores fp32 [n_blocks] of a phase's segment, whose prefixes begin at the blocks `starts`. ValueError
    names the function for a result of another shape or type, for an infinite score, and where no block has one."""
    n_blocks = ledger.n_blocks(planned.segment)
    losses, steps, visits = ledger.nll[:n_blocks], ledger.step[:n_blocks], ledger.visits[:n_blocks]
    for view in (losses, steps, visits):
        view.flags.writeable = False  # not that of the ledger
    function, what = find_function(name), f"phase {planned.index}: score call:{name}: "
    try:
        result = np.asarray(function(Records(losses, steps, visits, tuple(starts), planned.first_step)))
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"{what}{type(error).__name__}: {error} ({line.filename}, line {line.lineno})") from error
    if result.shape != (n_blocks,) or result.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"{what}returned {result.dtype} {list(result.shape)}, must be float32 or float64 [{n_blocks}], a number "
            "for each block"
        )
    with np.errstate(over="ignore"):
        scores = result.astype(np.float32)
    for first in range(0, n_blocks, _CHUNK):
        infinite = np.isinf(scores[first : first + _CHUNK])
        if infinite.any():
            block = first + int(infinite.argmax())
            raise ValueError(f"{what}block {block} has the score {result[block]}: finite in float32, or NaN for none")
    if np.isnan(scores).all():
        raise ValueError(f"{what}no block has a score")
    return scores


def digest_of(scores: npt.NDArray[np.float32]) -> int:
    """Return a 64-bit digest of scores."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(scores).data, digest_size=8).digest(), "little")
