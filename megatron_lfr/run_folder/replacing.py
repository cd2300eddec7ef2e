"""Replacing several files of a run folder as one: all of them are as before, or all of them are new.

    extension.json      {"config.yaml": its new text, ...}, only between a kill and the next command that writes

The new texts are written into one file, which is renamed: from then on they count, and readers take them from there.
Then each replaces its file, and extension.json goes. What a kill has left undone is done by the next process that
holds the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_lfr.fileio import fsync_directory, write_atomic

_LOG = "extension.json"
FILES = ("config.yaml", "config_history.yaml", "journal/meta.json")
"""The files that can be replaced."""


def replace_together(folder: Path, texts: Mapping[str, str]) -> None:
    """Replace some of FILES by new texts."""
    write_atomic(folder / _LOG, json.dumps(dict(texts), indent=1) + "\n")
    finish_replacing(folder)


def finish_replacing(folder: Path) -> None:
    """Finish what a kill has left undone. For the process that holds the folder."""
    for left in folder.glob(f".{_LOG}.tmp-*"):
        left.unlink()
    texts = _replaced(folder)
    for name, text in texts.items():
        write_atomic(folder / name, text)
    if texts:
        (folder / _LOG).unlink()
        fsync_directory(folder)


def current_bytes(folder: Path, name: str) -> bytes:
    """Return the content of a file of a run folder, also where it still is to be replaced."""
    text = _replaced(folder).get(name)
    return (folder / name).read_bytes() if text is None else text.encode()


def _replaced(folder: Path) -> dict[str, str]:
    """Return the new texts of files that still are to be replaced. ValueError for a damaged extension.json."""
    path = folder / _LOG
    try:
        texts = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(texts, dict) or not texts or not set(texts) <= set(FILES):
        raise ValueError(f"{path}: expected the texts of some of {', '.join(FILES)}")
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"{path}: expected the text of each file")
    return texts
