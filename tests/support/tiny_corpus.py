"""A small corpus on disk, as a fixture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter


def linked(prefix: Path | str, folder: Path) -> str:
    """Return a prefix of another name in a new folder, whose files are links to those of `prefix`."""
    folder.mkdir()
    for end in (".bin", ".idx"):
        (folder / f"other{end}").symlink_to(Path(f"{prefix}{end}").resolve())
    return str(folder / "other")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Prefixes of two domains: counting up (easy) and noise (hard), EOD = 63."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(11)
    prefixes = []
    for domain in ("easy", "hard"):
        prefix = folder / f"toy_{domain}_text_document"
        with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
            for _ in range(40):
                length = int(rng.integers(20, 60))
                start = rng.integers(0, 60)
                tokens = (start + np.arange(length)) % 60 if domain == "easy" else rng.integers(0, 60, length)
                writer.add_document(np.append(tokens, 63).astype(np.uint16))
        prefixes.append(str(prefix))
    return prefixes
