"""A folder's content, to see that nothing has touched it."""

from __future__ import annotations

from pathlib import Path


def folder_bytes(folder: Path) -> dict[str, tuple[int, bytes]]:
    """By the path in `folder` of each file: when it was last written, and its bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
