"""Checkpoints where hosts do not share a file system: rank 0's folder has all files of one, and others get copies.

Where all ranks see rank 0's folder, nothing here moves a byte.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path

from torch.distributed import ProcessGroup

from megatron_lfr.checkpoint import manifest
from megatron_lfr.fileio import fsync_directory, fsync_file
from megatron_lfr.parallel import ranks
from megatron_lfr.parallel.files import broadcast_file, send_to_first_rank


def collect_files(folder: Path, names: list[str], group: ProcessGroup | None) -> bool:
    """Send to rank 0 what other ranks have written and rank 0 does not see. Collective.

    names: the files in `folder` that this rank has written. Returns whether this rank's folder is another one than
    rank 0's. Raises OSError on all ranks where a file cannot be sent.
    """
    written = ranks.gather(names, group)
    unseen: list[tuple[int, str]] = []
    if ranks.rank(group) == 0:
        unseen = [
            (rank, name) for rank, theirs in enumerate(written) for name in theirs if not (folder / name).exists()
        ]
    unseen = ranks.from_first_rank(unseen, group)
    for source, name in unseen:
        send_to_first_rank(folder / name, source, group)
    return any(source == ranks.rank(group) for source, _ in unseen)


def bring_checkpoint(folder: Path, aside: Path, group: ProcessGroup | None) -> None:
    """Copy rank 0's checkpoint to hosts that do not see it: to `aside`, which then gets the name `folder`. Collective.

    A damaged one is left alone. Raises ValueError where a host has another checkpoint under this name.
    """
    if ranks.world_size(group) == 1:
        return
    content = ranks.from_first_rank(_manifest(folder) if ranks.rank(group) == 0 else b"", group)
    sees = bool(content) and _manifest(folder) == content
    reports = ranks.gather((socket.gethostname(), sees), group)
    if not content or all(report[1] for report in reports):
        return
    receivers = {host: rank for rank, (host, its) in reversed(list(enumerate(reports))) if not its}
    receives = ranks.rank(group) in receivers.values()
    with ranks.failing_together(group):
        if receives and folder.exists():
            raise ValueError(
                f"{folder}: on {socket.gethostname()} this is another checkpoint than on {reports[0][0]}; remove it"
            )
        if receives:
            aside.mkdir(parents=True, exist_ok=True)
    for name, size in _sizes(folder, content, group):
        path = (aside if receives else folder) / name
        broadcast_file(path, size, receives, group)
        if receives:
            fsync_file(path)
    with ranks.failing_together(group):  # no rank opens it before it is there
        if receives:
            aside.rename(folder)
            fsync_directory(folder.parent)


def _manifest(folder: Path) -> bytes:
    try:
        return (folder / manifest.NAME).read_bytes()
    except OSError:
        return b""


def _sizes(folder: Path, content: bytes, group: ProcessGroup | None) -> list[tuple[str, int]]:
    """Return the names and sizes of rank 0's files, as they are; the manifest comes last."""
    sizes: list[tuple[str, int]] = []
    if ranks.rank(group) == 0:
        files = [folder / name for name in json.loads(content)["files"]]
        sizes = [(path.name, path.stat().st_size) for path in files if path.is_file()]
        sizes.append((manifest.NAME, len(content)))
    return ranks.from_first_rank(sizes, group)
