"""The files of --lfr-scores of a run, each segment of which keeps those that it was begun with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_lfr.data.corpus.block_values import BlockValues, open_values, parse_names
from megatron_lfr.fileio import describe


class ScoreFiles:
    """Finds files by their SHA-256 among all that their names have had in a run. Each file is read once.

    run: its folder, for messages. words: those of --lfr-scores, the newest last.
    """

    def __init__(self, run: Path, words: Sequence[str]) -> None:
        self._flag = f"{run}: --lfr-scores"
        self._files: dict[str, list[Path]] = {}
        self._opened: dict[Path, BlockValues] = {}
        for word in reversed(words):
            for name, path in parse_names([word], self._flag).items():
                files = self._files.setdefault(name, [])
                if path not in files:
                    files.append(path)

    def find(self, name: str, sha256: str) -> BlockValues:
        """Map the file of a name whose numbers have this SHA-256. ValueError or OSError where there is none."""
        files, tried = self._files.get(name, []), []
        for path in files:
            problem: ValueError | OSError | None = None
            try:
                if path not in self._opened:
                    self._opened[path] = open_values(name, path, self._flag)
                if self._opened[path].sha256 == sha256:
                    return self._opened[path]
            except (ValueError, OSError) as error:
                problem = error
            if len(files) == 1:
                raise problem or ValueError(f"{self._flag} {name}={path}: has changed since the run began")
            tried.append(f"{path} ({'other numbers' if problem is None else describe(problem)})")
        raise ValueError(
            f"{self._flag} {name}: a segment of the run was begun with a file that is none of those that are known: "
            f"{', '.join(tried) or 'no file'}. Say where it is with one more --lfr-scores {name}=FILE, before that of "
            "the last segment"
        )
