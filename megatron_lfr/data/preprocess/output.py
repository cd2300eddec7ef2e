"""Writes the output of preprocessing: an indexed dataset for each domain. They grow together in the run's folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lfr.data.corpus.indexed import with_suffix
from megatron_lfr.data.corpus.sidecar import output_prefix_of
from megatron_lfr.data.preprocess.encoding import EncodedChunk
from megatron_lfr.data.preprocess.workspace import damaged
from megatron_lfr.data.preprocess.writer import SUFFIXES, Extent, IndexedDatasetWriter, publish_pair


@dataclass(frozen=True)
class PrefixSummary:
    """The content of one prefix of the corpus."""

    prefix: Path
    domain: str | None
    """The domain's name as the input spells it; None without --domain-key."""
    documents: int
    tokens: int
    skipped_documents: int
    """Number of documents without a token, which are left out."""


class Output:
    """The writers of all domains, by the domain's name in the input.

    state: what `durable` returned in a run that was killed; the writers continue from there. masked: whether documents
    have loss masks.
    Errors: ValueError for domains that would share a file name, a corpus that already exists without `overwrite`, a
    `state` that does not fit the folder, an input without a token; OSError.
    """

    def __init__(
        self,
        prefix: Path,
        dtype: np.dtype[Any],
        work: Path,
        state: list[dict[str, Any]],
        overwrite: bool,
        masked: bool = False,
    ) -> None:
        self._prefix = prefix
        self._overwrite = overwrite
        self._dtype = dtype
        self._work = work
        self._masked = masked
        self._writers: dict[str | None, IndexedDatasetWriter] = {}
        self._paths: dict[Path, str | None] = {}
        self._skipped: dict[str | None, int] = {}
        try:
            for entry in state:
                self._open(entry["domain"], "the unfinished run", Extent(**entry["extent"]))
                self._skipped[entry["domain"]] = int(entry["skipped"])
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            self.close()
            raise damaged(work, error) from None

    def add(self, encoded: EncodedChunk) -> None:
        for group in encoded.groups:
            if group.domain not in self._writers:
                self._open(group.domain, group.first_seen, None)
            self._writers[group.domain].add_documents(group.tokens, group.lengths, group.mask)
            self._skipped[group.domain] += group.skipped

    def durable(self) -> list[dict[str, Any]]:
        """Bring everything to the disk, and return the state from which a run can continue here after a kill."""
        return [
            {"domain": domain, "extent": asdict(writer.durable()), "skipped": self._skipped[domain]}
            for domain, writer in self._writers.items()
        ]

    def seal(self, meta: Callable[[int, int], str]) -> list[PrefixSummary]:
        """Finish all files in the folder; meta(documents, tokens) gives the content of each sidecar. Domains without
        a token are left out."""
        if not any(writer.num_tokens for writer in self._writers.values()):
            raise ValueError("--input: no document with a token in it")
        for name in [name for name, writer in self._writers.items() if not writer.num_tokens]:
            self._writers.pop(name).discard()
        for writer in self._writers.values():
            writer.meta = meta(writer.num_documents, writer.num_tokens)
            writer.seal()
        return [
            PrefixSummary(writer.prefix, name, writer.num_documents, writer.num_tokens, self._skipped[name])
            for name, writer in self._writers.items()
        ]

    def close(self) -> None:
        """Close all files, and leave them in the folder."""
        for writer in self._writers.values():
            writer.close()

    def _open(self, domain: str | None, first_seen: str, extent: Extent | None) -> None:
        path = self._path(domain, first_seen)
        if extent is None and exists(path):
            owner = output_prefix_of(path)
            if domain is not None and owner not in (None, self._prefix.name):
                raise ValueError(f"{first_seen}: the corpus {path} already exists, of --output-prefix {owner!r}")
            if not self._overwrite:
                raise ValueError(f"{first_seen}: the corpus {path} already exists; --overwrite replaces it")
        self._writers[domain] = IndexedDatasetWriter(path, self._dtype, self._work, extent, masked=self._masked)
        self._skipped[domain] = 0

    def _path(self, domain: str | None, first_seen: str) -> Path:
        path = domain_prefix(self._prefix, domain)
        other = self._paths.setdefault(path, domain)
        if other != domain:
            raise ValueError(f"{first_seen}: domains {other!r} and {domain!r} would share the file name {path.name!r}")
        return path


def domain_prefix(prefix: Path, domain: str | None) -> Path:
    """Return the prefix of a domain's corpus."""
    safe = "" if domain is None else "_" + re.sub(r"[^A-Za-z0-9._-]", "_", domain)
    return prefix.with_name(f"{prefix.name}{safe}_text_document")


def corpora_of(prefix: Path, by_domain: bool) -> list[Path]:
    """Return the corpora that exist under an --output-prefix: that of a run without domains, or those of all domains.

    Another --output-prefix that begins with this one may give names that look like domains of this one; they are left
    out if their sidecars say so.
    """
    if not by_domain:
        path = domain_prefix(prefix, None)
        return [path] if exists(path) else []
    files = prefix.parent.glob(f"{escape(prefix.name)}_*_text_document.*")
    paths = sorted({path.with_suffix("") for path in files if path.suffix in (".bin", ".idx")})
    return [path for path in paths if output_prefix_of(path) in (None, prefix.name)]


def refuse_replacing(prefix: Path, by_domain: bool) -> None:
    """Raise a ValueError for a finished corpus that a run under this --output-prefix would replace."""
    finished = corpora_of(prefix, by_domain)
    if finished:
        more = f" (and {len(finished) - 1} more)" if len(finished) > 1 else ""
        raise ValueError(
            f"--output-prefix {prefix}: the corpus {finished[0]}{more} already exists; give another name, or "
            "--overwrite to replace it"
        )


def stale_corpora(prefix: Path, written: list[PrefixSummary]) -> list[Path]:
    """Return the corpora under an --output-prefix that a run has not written."""
    finished = [path for by_domain in (False, True) for path in corpora_of(prefix, by_domain)]
    return [path for path in finished if path not in [summary.prefix for summary in written]]


def exists(path: Path) -> bool:
    """Whether a prefix has a .bin or an .idx file."""
    return any(with_suffix(path, suffix).exists() for suffix in (".bin", ".idx"))


def publish(summaries: list[PrefixSummary], work: Path) -> None:
    """Give sealed files their final names. After a kill, the same call does the rest."""
    for summary in summaries:
        name = work / summary.prefix.name
        publish_pair(summary.prefix, {suffix: with_suffix(name, suffix) for suffix in SUFFIXES})
