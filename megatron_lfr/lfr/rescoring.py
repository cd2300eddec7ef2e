"""Scoring every block with the present weights, before a phase whose score mode is `rescored`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from megatron_lfr.fileio import fsync_directory
from megatron_lfr.lfr.journal import Journal, JournalFiles
from megatron_lfr.lfr.selection import Scores

Rescore = Callable[[npt.NDArray[np.int64]], Scores]
"""Given block ids [n], the mean NLL of each under the present weights, fp32 [n], without training."""

_CHUNK = 1024


def rescore_blocks(
    journal: Journal | None, phase: int, n_blocks: int, rescore: Rescore, agree: Callable[[bool], bool]
) -> None:
    """Run the pass, if `journal` does not have its scores yet; one that was interrupted goes on where it stopped.

    `agree` gives all processes the first one's answer, as `rescore` may need all of them; without a journal, a process
    only takes part.
    """
    if not agree(journal is None or not journal.scores_path(phase).exists()):
        return
    scores = None if journal is None else _open_partial(journal, phase, n_blocks)
    for first in range(0, n_blocks, _CHUNK):
        chunk = slice(first, min(first + _CHUNK, n_blocks))
        if agree(scores is None or bool(np.isnan(scores[chunk]).any())):
            found = rescore(np.arange(chunk.start, chunk.stop, dtype=np.int64))
            if not np.isfinite(found).all():
                raise ValueError(f"rescoring: blocks {chunk.start}..{chunk.stop - 1} have a loss that is not finite")
            if scores is not None:
                scores[chunk] = found
    if journal is not None and scores is not None:
        scores.flush()
        journal.partial_scores_path(phase).replace(journal.scores_path(phase))
        fsync_directory(journal.folder)


def read_scores(journal: JournalFiles, phase: int, n_blocks: int) -> Scores:
    """What the pass before `phase` found: fp32 [n_blocks]."""
    path = journal.scores_path(phase)
    scores: Scores = np.load(path, allow_pickle=False)
    if scores.shape != (n_blocks,) or scores.dtype != np.float32:
        raise ValueError(f"{path}: expected fp32 [{n_blocks}], got {scores.dtype} {list(scores.shape)}")
    return scores


def _open_partial(journal: Journal, phase: int, n_blocks: int) -> np.memmap[tuple[int], np.dtype[np.float32]]:
    """The scores so far, NaN where there are none, on disk."""
    path = journal.partial_scores_path(phase)
    if not path.exists() or path.stat().st_size != 128 + 4 * n_blocks:
        aside = path.with_suffix(".new")
        fresh = np.lib.format.open_memmap(aside, "w+", np.float32, (n_blocks,))
        fresh[:] = np.nan
        fresh.flush()
        aside.replace(path)
    return np.lib.format.open_memmap(path, "r+")
