"""`megatron-lfr preprocess`: JSONL or text to an indexed corpus, one prefix for each domain.

The main process cuts the input into chunks of whole lines, workers parse and tokenize them, and the main process
writes the results in the input's order: the output does not depend on the number of workers. Memory is bounded by the
chunks in flight, a few MiB for each worker (or by the longest line, where that is more).
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lfr.data.encoding import EncodedChunk, Encoder, Part
from megatron_lfr.data.indexed import IndexedDatasetWriter, token_dtype
from megatron_lfr.data.progress import Progress
from megatron_lfr.data.tokenizer import load_tokenizer

JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt",)

_CHUNK_BYTES = 1 << 19


@dataclass(frozen=True)
class PreprocessConfig:
    """Turn JSONL or text into an indexed corpus (.bin/.idx), one prefix for each domain."""

    input: list[Path]
    """Files to read, in order: JSONL (.jsonl, .json, .ndjson; a line is a document) or text (.txt; a file is one)."""
    output_prefix: Path
    """Where the corpus goes: <output-prefix>_text_document.bin and .idx, or, with --domain-key,
    <output-prefix>_<domain>_text_document for each domain."""
    tokenizer: str
    """A `tokenizers` JSON file, a folder that holds tokenizer.json, or `bytes`."""
    json_key: str = "text"
    """Key of a JSONL line's text."""
    domain_key: str | None = None
    """Key of a JSONL line's domain: one prefix is written for each."""
    eod_token: str | None = None
    """The tokenizer's end-of-document token, where its name is not one of the usual ones."""
    append_eod: bool = True
    """End every document with the end-of-document token."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that tokenize; 1 works in this process. The output is the same for any number."""
    progress: bool = True
    """Show how far the work is."""

    def validate(self) -> None:
        """Check everything that can be checked before reading; errors name the flag and the legal values."""
        if not self.input:
            raise ValueError("--input: give at least one file")
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers}: must be at least 1")
        for path in self.input:
            if not path.is_file():
                reason = "is a folder; give the files in it" if path.is_dir() else "no such file"
                raise ValueError(f"--input {path}: {reason}")
            if path.suffix not in (*JSONL_SUFFIXES, *TEXT_SUFFIXES):
                legal = ", ".join((*JSONL_SUFFIXES, *TEXT_SUFFIXES))
                raise ValueError(f"--input {path}: unknown kind of file; known are {legal}")
            if self.domain_key is not None and path.suffix in TEXT_SUFFIXES:
                raise ValueError(f"--domain-key {self.domain_key}: {path} is a text file, which has no keys")
        _check_writable(self.output_prefix)


@dataclass(frozen=True)
class PrefixSummary:
    """What one prefix of the corpus holds."""

    prefix: Path
    domain: str | None
    """The domain's name as the input spells it; None without --domain-key."""
    documents: int
    tokens: int
    skipped_documents: int
    """Documents without a token, which are left out."""


def run(config: PreprocessConfig) -> list[PrefixSummary]:
    """Preprocess a corpus; its prefixes in the order in which the input first names their domains.

    Blank lines are passed over, and documents without a token are left out and counted. Nothing is written under its
    final name before everything has been read. Errors: ValueError for bad flags, a bad tokenizer, a line that is no
    document ("file:line: reason"), an input without documents; OSError for files that cannot be read or written.
    """
    config.validate()
    tokenizer = load_tokenizer(config.tokenizer, config.eod_token)
    encoder = Encoder(
        tokenizer=tokenizer,
        json_key=config.json_key,
        domain_key=config.domain_key,
        eod=tokenizer.eod if config.append_eod else None,
        dtype=token_dtype(tokenizer.vocab_size),
    )
    total_bytes = sum(path.stat().st_size for path in config.input)
    output = _Output(config.output_prefix, encoder)
    with Progress(total_bytes, enabled=config.progress) as progress:
        try:
            for encoded in _encode_all(config, encoder):
                output.add(encoded)
                progress.advance(encoded.bytes_read, encoded.documents, encoded.tokens)
            summaries = output.publish()
        finally:
            output.discard()
    if config.progress:
        _print_summaries(summaries)
    return summaries


class _Output:
    """The writers of all domains, by the name that the input gives them."""

    def __init__(self, prefix: Path, encoder: Encoder) -> None:
        self._prefix = prefix
        self._dtype = encoder.dtype
        self._writers: dict[str | None, IndexedDatasetWriter] = {}
        self._names: dict[str, str] = {}
        self._skipped: dict[str | None, int] = {}

    def add(self, encoded: EncodedChunk) -> None:
        for group in encoded.groups:
            if group.domain not in self._writers:
                path = self._path(group.domain, group.first_seen)
                self._writers[group.domain] = IndexedDatasetWriter(path, self._dtype)
                self._skipped[group.domain] = 0
            self._writers[group.domain].add_documents(group.tokens, group.lengths)
            self._skipped[group.domain] += group.skipped

    def publish(self) -> list[PrefixSummary]:
        if not any(writer.num_tokens for writer in self._writers.values()):
            raise ValueError("--input: no document with a token in it")
        for name in [name for name, writer in self._writers.items() if not writer.num_tokens]:
            self._writers.pop(name).discard()
        for writer in self._writers.values():
            writer.seal()
        for writer in self._writers.values():
            writer.publish()
        return [
            PrefixSummary(writer.prefix, name, writer.num_documents, writer.num_tokens, self._skipped[name])
            for name, writer in self._writers.items()
        ]

    def discard(self) -> None:
        for writer in self._writers.values():
            writer.discard()

    def _path(self, domain: str | None, first_seen: str) -> Path:
        if domain is None:
            return self._prefix.with_name(f"{self._prefix.name}_text_document")
        safe = re.sub(r"[^A-Za-z0-9._-]", "_", domain)
        other = self._names.setdefault(safe, domain)
        if other != domain:
            raise ValueError(f"{first_seen}: domains {other!r} and {domain!r} would share the file name {safe!r}")
        return self._prefix.with_name(f"{self._prefix.name}_{safe}_text_document")


def _encode_all(config: PreprocessConfig, encoder: Encoder) -> Iterator[EncodedChunk]:
    """The encoded chunks of the input, in its order."""
    chunks = _chunks(config.input)
    total_bytes = sum(path.stat().st_size for path in config.input)
    workers = min(config.workers, -(-total_bytes // _CHUNK_BYTES))
    if workers <= 1:
        with _tokenizers_parallelism_off():
            yield from map(encoder.encode, chunks)
        return
    with _tokenizers_parallelism_off():
        pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(config.tokenizer, config.eod_token, encoder.without_tokenizer()),
        )
        try:
            yield from _in_order(pool, chunks, in_flight=2 * workers + 1)
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process died, perhaps for lack of memory; fewer --workers need less of it"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterator[list[Part]], in_flight: int) -> Iterator[EncodedChunk]:
    pending: deque[Future[EncodedChunk]] = deque()
    for chunk in chunks:
        pending.append(pool.submit(_encode_in_worker, chunk))
        if len(pending) >= in_flight:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


_worker_encode: Callable[[list[Part]], EncodedChunk]


def _start_worker(tokenizer: str, eod_token: str | None, make_encoder: Callable[..., Encoder]) -> None:
    global _worker_encode
    _worker_encode = make_encoder(load_tokenizer(tokenizer, eod_token)).encode


def _encode_in_worker(chunk: list[Part]) -> EncodedChunk:
    return _worker_encode(chunk)


@contextmanager
def _tokenizers_parallelism_off() -> Iterator[None]:
    """Each process tokenizes in one thread: `workers` is the number of cores in use. Inherited by workers."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _chunks(paths: list[Path]) -> Iterator[list[Part]]:
    """The input in pieces of about `_CHUNK_BYTES`: whole lines of one JSONL file, or one or more text files."""
    texts: list[Part] = []
    size = 0
    for path in paths:
        if path.suffix in TEXT_SUFFIXES:
            texts.append(Part(path, None, path.read_bytes()))
            size += len(texts[-1].data)
        if texts and (path.suffix not in TEXT_SUFFIXES or size >= _CHUNK_BYTES):
            yield texts
            texts, size = [], 0
        if path.suffix not in TEXT_SUFFIXES:
            yield from _line_chunks(path)
    if texts:
        yield texts


def _line_chunks(path: Path) -> Iterator[list[Part]]:
    line = 1
    with path.open("rb") as file:
        while data := file.read(_CHUNK_BYTES) + file.readline():
            yield [Part(path, line, data)]
            line += data.count(b"\n")


def _check_writable(prefix: Path) -> None:
    if not prefix.name:
        raise ValueError(f"--output-prefix {prefix}: must end in a name")
    if not prefix.parent.is_dir():
        raise ValueError(f"--output-prefix {prefix}: the folder {prefix.parent} does not exist")
    try:
        tempfile.TemporaryFile(dir=prefix.parent).close()
    except OSError as error:
        raise OSError(
            error.errno, f"--output-prefix {prefix}: cannot write into its folder: {error.strerror}"
        ) from None


def _print_summaries(summaries: list[PrefixSummary]) -> None:
    for summary in summaries:
        skipped = f", {summary.skipped_documents} without a token left out" if summary.skipped_documents else ""
        print(f"{summary.prefix}: {summary.documents} documents, {summary.tokens} tokens{skipped}")
