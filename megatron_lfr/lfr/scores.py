"""What a phase ranks blocks by, and the arrays from outside of the run that it needs.

A score is one of the run's losses, or from an array with a number for each block, which has a name: `file:NAME` is the
array itself, `excess:NAME` the present loss minus it (the array then holds a reference model's losses). Or it is what a
function of the user's makes of the ledger: `call:PACKAGE.MODULE:FUNCTION`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from megatron_lfr.lfr.phase import Phase
    from megatron_lfr.lfr.plan import Plan

Arrays = Mapping[str, npt.NDArray[np.number]]
"""A number for each block of a segment, by name: fp32 [n_blocks], or uint32 [n_blocks] for the groups of copies."""
NO_ARRAYS: Arrays = {}

LossScore = Literal["recorded", "detrended", "rescored", "shuffled", "improvement"]
LOSS_SCORES: tuple[str, ...] = get_args(LossScore)
FROM_ARRAYS = ("file", "excess")
CALL = "call"
COPIES = "copies"
"""The name of the array that says which blocks are copies of each other."""
CLUSTERS = "clusters"
"""The name of the array of --lfr-clusters."""
BY_SCORE = "score"
WEIGHT = "weight"
"""The name of the array that weighs every phase of a preset."""

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_CHUNK = 1 << 20

Test = Callable[[npt.NDArray[np.number]], npt.NDArray[np.bool_]]


def split_score(score: str) -> tuple[str, str | None]:
    """Return (mode, name of the array or function it needs) of a score; None for a score from losses alone."""
    mode, colon, name = score.partition(":")
    return mode, name if colon else None


def check_score(score: object) -> None:
    """Raise ValueError for what is no score."""
    if isinstance(score, str):
        mode, name = split_score(score)
        if mode in LOSS_SCORES if name is None else mode in FROM_ARRAYS and is_name(name):
            return
        if mode == CALL and name is not None and _FUNCTION.fullmatch(name):
            return
    legal = ", ".join((*LOSS_SCORES, "file:NAME", "excess:NAME", "call:PACKAGE.MODULE:FUNCTION"))
    raise ValueError(f"phase score {score!r}: choose from {legal}")


def is_name(text: str) -> bool:
    """Whether a text can name an array: letters, digits, and _ . - alone."""
    return _NAME.fullmatch(text) is not None


def is_file(text: object) -> bool:
    """Whether a text is file:NAME."""
    mode, name = split_score(text) if isinstance(text, str) else ("", None)
    return mode == "file" and name is not None and is_name(name)


def used_arrays(phases: Iterable[Phase]) -> list[str]:
    """Return the names of the arrays that phases use, sorted."""
    names = {name for phase in phases for name, _ in _arrays_of(phase)}
    return sorted(names)


def by_segment(plan: Plan, arrays: Arrays | Sequence[Arrays]) -> Sequence[Arrays]:
    """Return the arrays of each segment of a plan, given these or those that all segments have."""
    return [arrays] * len(plan.segments) if isinstance(arrays, Mapping) else arrays


def check_arrays(plan: Plan, arrays: Sequence[Arrays], unmade: Collection[str] = ()) -> None:
    """Check that there is a legal array for all that phases use, with a number for each block of their segment;
    ValueError names phase, array and the first block that is wrong. arrays: those of each segment. unmade: names of
    those that are yet to be made, and are not checked."""
    for planned in plan.phases:
        segment = plan.segments[planned.segment]
        try:
            for name, check in _arrays_of(planned.phase):
                if name in unmade:
                    continue
                array = _array(arrays[planned.segment], name, segment.n_blocks)
                check(name, array)
                if name == planned.phase.weighted_by:
                    _check_parts(name, array, segment.sampled_apart(planned))
        except ValueError as error:
            raise ValueError(f"phase {planned.index}: {error}") from None


def _arrays_of(phase: Phase) -> list[tuple[str, Callable[[str, npt.NDArray[np.number]], None]]]:
    """Return the names of the arrays that a phase uses, and what checks each."""
    uses = (
        (phase.scored_by, _check_finite),
        (phase.weighted_by, _check_weights),
        (phase.guarded_by, _check_weights),
        (phase.grouped_by, _check_groups),
        (phase.clustered_by, _check_groups),
    )
    return [(name, check) for name, check in uses if name is not None]


def _array(arrays: Arrays, name: str, n_blocks: int) -> npt.NDArray[np.number]:
    if name not in arrays:
        raise ValueError(f"there is no array {name!r}; there are: {', '.join(sorted(arrays)) or 'none'}")
    array = arrays[name]
    if array.shape != (n_blocks,):
        raise ValueError(f"array {name}: has the shape {list(array.shape)}, but there are {n_blocks} blocks")
    return array


def _check_finite(name: str, array: npt.NDArray[np.number]) -> None:
    if array.dtype != np.float32:
        raise ValueError(f"array {name}: is of type {array.dtype}, must be float32")
    _check_each(name, array, np.isfinite, "a finite number")


def _check_weights(name: str, array: npt.NDArray[np.number]) -> None:
    _check_finite(name, array)
    _check_each(name, array, lambda part: part >= 0, "0 or more, as a weight")
    if not _has_weight(array):
        raise ValueError(f"array {name}: every block has the weight 0")


def _check_parts(name: str, array: npt.NDArray[np.number], parts: Sequence[Sequence[tuple[int, int]]]) -> None:
    for part in parts:
        if not any(_has_weight(array[first:last]) for first, last in part):
            blocks = ", ".join(f"{first} to {last - 1}" for first, last in part)
            raise ValueError(
                f"array {name}: blocks {blocks}, from which the phase samples apart, all have the weight 0"
            )


def _has_weight(array: npt.NDArray[np.number]) -> bool:
    return any(array[first : first + _CHUNK].any() for first in range(0, len(array), _CHUNK))


def _check_groups(name: str, array: npt.NDArray[np.number]) -> None:
    if array.dtype != np.uint32:
        raise ValueError(f"array {name}: is of type {array.dtype}, must be uint32, the number of each block's group")
    _check_each(name, array, lambda part: part < len(array), f"below the number of blocks, {len(array)}")


def _check_each(name: str, array: npt.NDArray[np.number], is_legal: Test, legal: str) -> None:
    for first in range(0, len(array), _CHUNK):
        part = array[first : first + _CHUNK]
        wrong = ~is_legal(part)
        if wrong.any():
            block = first + int(wrong.argmax())
            raise ValueError(f"array {name}: block {block} has {array[block]}, must be {legal}")
