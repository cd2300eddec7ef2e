"""Scoring every block with the present weights, before a phase whose score mode is `rescored`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.fileio import fsync_directory, map_array
from megatron_lfr.lfr.journal import Journal, JournalFiles
from megatron_lfr.lfr.left_out import Scores

Rescore = Callable[[npt.NDArray[np.int64]], Iterable[Scores]]
"""Takes block ids [n] and yields the mean NLL of each under the present weights, without training: fp32 arrays that
together are [n], in the order of the ids. The losses yielded so far are kept if the pass is interrupted."""


def rescore_blocks(
    journal: Journal | None, phase: int, n_blocks: int, rescore: Rescore, broadcast: Callable[[int], int]
) -> None:
    """Rescore all blocks before `phase`, unless `journal` has the scores already; continue a pass that was interrupted.

    `broadcast` returns the first process' value on all processes, so that all of them score the same blocks. A process
    without a journal takes part, but keeps nothing. ValueError where a loss is not finite, or losses are missing.
    """
    if not broadcast(journal is None or not journal.scores_path(phase).exists()):
        return
    scores = None if journal is None else _open_partial(journal, phase, n_blocks)
    done = broadcast(0 if scores is None else _count_scored(scores))
    for losses in rescore(np.arange(done, n_blocks, dtype=np.int64)):
        part = slice(done, done + len(losses))
        if not np.isfinite(losses).all():
            raise ValueError(f"rescoring: blocks {part.start}..{part.stop - 1} have a loss that is not finite")
        if scores is not None:
            scores[part] = losses
        done = part.stop
    if done != n_blocks:
        raise ValueError(f"rescoring: the callback gave the losses of {done} blocks, but there are {n_blocks}")
    if journal is not None and scores is not None:
        _publish(journal, phase, scores)


def write_scores(journal: Journal, phase: int, scores: Scores) -> None:
    """Keep the scores of a phase: fp32 [n_blocks]."""
    kept = np.lib.format.open_memmap(journal.partial_scores_path(phase), "w+", np.float32, scores.shape)
    kept[:] = scores
    _publish(journal, phase, kept)


def _publish(journal: Journal, phase: int, partial: np.memmap[Any, Any]) -> None:
    """Give the scores that are complete their name."""
    partial.flush()
    journal.partial_scores_path(phase).replace(journal.scores_path(phase))
    fsync_directory(journal.folder)


def read_scores(journal: JournalFiles, phase: int, n_blocks: int) -> Scores:
    """Read the kept scores of a phase: fp32 [n_blocks]."""
    path = journal.scores_path(phase)
    scores: Scores = np.array(map_array(path))
    if scores.shape != (n_blocks,) or scores.dtype != np.float32:
        raise ValueError(f"{path}: expected fp32 [{n_blocks}], got {scores.dtype} {list(scores.shape)}")
    return scores


def _count_scored(scores: Scores) -> int:
    """Count the blocks before the first one that has no score."""
    missing = np.isnan(scores)
    return int(missing.argmax()) if missing.any() else len(scores)


def _open_partial(journal: Journal, phase: int, n_blocks: int) -> np.memmap[tuple[int], np.dtype[np.float32]]:
    """Map the file of the scores so far, NaN where there are none yet; create it where it is missing."""
    path = journal.partial_scores_path(phase)
    if not path.exists() or path.stat().st_size != 128 + 4 * n_blocks:
        new = path.with_suffix(".new")
        fresh = np.lib.format.open_memmap(new, "w+", np.float32, (n_blocks,))
        fresh[:] = np.nan
        fresh.flush()
        new.replace(path)
    return np.lib.format.open_memmap(path, "r+")
