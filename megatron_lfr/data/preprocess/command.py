"""`megatron-lfr preprocess`: text in many forms to an indexed corpus, one prefix for each domain.

The main process cuts the input into chunks of whole documents, workers parse and tokenize them, and the main process
writes the results in the input's order: the output does not depend on the number of workers. Memory is bounded by the
chunks in flight, a few MiB for each worker (or by the longest document, where that is more). Every few seconds, what
was written is brought to the disk and noted (workspace.py): after a kill, the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tokenizers
import tyro

from megatron_lfr.data.corpus.gpt2_files import name_both
from megatron_lfr.data.corpus.indexed import token_dtype
from megatron_lfr.data.corpus.sidecar import Sidecar
from megatron_lfr.data.corpus.tokenizer import load_tokenizer
from megatron_lfr.data.preprocess import inputs
from megatron_lfr.data.preprocess.chat import template_digest
from megatron_lfr.data.preprocess.encoding import Encoder
from megatron_lfr.data.preprocess.inputs import Position, open_inputs
from megatron_lfr.data.preprocess.output import (
    Output,
    PrefixSummary,
    domain_prefix,
    publish,
    refuse_replacing,
    stale_corpora,
)
from megatron_lfr.data.preprocess.pool import encode_all
from megatron_lfr.data.preprocess.progress import Progress
from megatron_lfr.data.preprocess.readers import Columns, Reader
from megatron_lfr.data.preprocess.supervised import RecordKeys
from megatron_lfr.data.preprocess.workspace import Workspace, damaged
from megatron_lfr.fileio import check_writable

_SECONDS_BETWEEN_NOTES = 10.0
"""Least time between two durable points."""
_PAUSE = 50.0
"""Least multiple of the time that the last durable point took: a slow disk costs no more than two per cent."""
_NAMED = 10
"""How many broken documents are named on stderr."""


@dataclass(frozen=True)
class PreprocessConfig:
    """Turn text into an indexed corpus (.bin/.idx), one prefix for each domain.

    After a kill, the same command goes on.
    """

    input: list[Path]
    """What to read, in order: JSONL (.jsonl, .json, .ndjson; each line is a document), text (.txt; each file is a
    document), both also compressed (.gz, .bz2, .xz, .zst), Parquet (.parquet; each row is a document), folders (all
    such files in them and behind links, sorted, without hidden ones), and datasets of the Hugging Face hub (hf:NAME,
    hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT). A file that is reached twice is read once."""
    output_prefix: Path
    """Where the corpus goes: <output-prefix>_text_document.bin and .idx, or, with --domain-key,
    <output-prefix>_<domain>_text_document for each domain. Work under way is in <output-prefix>.partial."""
    tokenizer: str | None = None
    """The tokenizer: a `tokenizers` JSON file, a folder that holds tokenizer.json, or `bytes`. Required, unless
    --vocab-file and --merge-file give it."""
    vocab_file: str | None = None
    """With --merge-file: the vocabulary of a GPT-2 tokenizer, vocab.json."""
    merge_file: str | None = None
    """With --vocab-file: the merges of a GPT-2 tokenizer, merges.txt."""
    tokenizer_type: Literal["HuggingFaceTokenizer", "GPT2BPETokenizer"] | None = None
    """Megatron's name of what the files say anyway: GPT2BPETokenizer for --vocab-file and --merge-file,
    HuggingFaceTokenizer for --tokenizer."""
    json_key: str = "text"
    """Key of the text in a JSONL line, or name of its column in a table."""
    domain_key: str | None = None
    """Key of the domain in a JSONL line, or name of its column in a table; one prefix is written for each domain."""
    eod_token: str | None = None
    """The tokenizer's end-of-document token; needed only where neither the files beside tokenizer.json nor the names
    of its special tokens show which it is."""
    append_eod: bool = True
    """End every document with the end-of-document token."""
    bos: tyro.conf.FlagCreatePairsOff[bool] = False
    """Start every document with the tokenizer's start-of-document token. By default, documents start with it if the
    tokenizer itself (its post-processor) starts texts with it."""
    no_bos: tyro.conf.FlagCreatePairsOff[bool] = False
    """Start no document with a start-of-document token, even if the tokenizer itself does."""
    sft: bool = False
    """Read supervised records, one a line of JSONL: {"prompt": ..., "response": ...}, or {"messages": [{"role": ...,
    "content": ...}, ...]}, which the chat template beside tokenizer.json writes as text (this needs the package
    transformers). Training then counts the responses alone: a loss mask is written beside the .bin, PREFIX.mask."""
    prompt_key: str = "prompt"
    """With --sft: key of the text before the response."""
    response_key: str = "response"
    """With --sft: key of the response."""
    messages_key: str = "messages"
    """With --sft: key of the messages of a chat."""
    skip_broken: bool = False
    """Leave out and count lines, rows and text files that are not documents (not UTF-8, not JSON, no text), instead of
    stopping at the first one."""
    restart: bool = False
    """Discard what an unfinished run with the same output prefix has done."""
    overwrite: bool = False
    """Replace finished corpora under the output prefix."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Number of workers that tokenize: threads up to 4, processes for more. The output is the same for any number."""
    progress: bool = True
    """Show the progress of the work."""

    def validate(self) -> None:
        """Check what can be checked without opening an input; errors name the flag and the legal values."""
        if not self.input:
            raise ValueError("--input: give at least one file")
        if self.bos and self.no_bos:
            raise ValueError("give --bos or --no-bos, not both")
        self.tokenizer_files()
        keys = [self.prompt_key, self.response_key, self.messages_key]
        if self.sft and len(set(keys)) < len(keys):
            raise ValueError(f"--prompt-key, --response-key and --messages-key must differ: {', '.join(keys)}")
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers}: must be at least 1")
        _check_writable(self.output_prefix)

    def tokenizer_files(self) -> str:
        """Return what load_tokenizer takes; ValueError where the flags do not name one tokenizer."""
        files = name_both(self.vocab_file, self.merge_file)
        name = self.tokenizer or files
        if name is None or (self.tokenizer and files):
            raise ValueError("give --tokenizer, or --vocab-file and --merge-file")
        kind = "GPT2BPETokenizer" if files else "HuggingFaceTokenizer"
        if self.tokenizer_type not in (None, kind):
            raise ValueError(
                f"--tokenizer-type {self.tokenizer_type}: the flags name a {kind}; GPT2BPETokenizer goes with "
                "--vocab-file and --merge-file, HuggingFaceTokenizer with --tokenizer"
            )
        return name


@dataclass(frozen=True)
class Summary:
    """The result of a preprocessing run."""

    prefixes: list[PrefixSummary]
    """Prefixes in the order in which the input first names their domains."""
    broken: dict[str, int]
    """Number of documents left out by --skip-broken, by reason."""
    stale: list[Path]
    """Corpora of earlier runs under the same output prefix, which this one has not written."""


def run(config: PreprocessConfig) -> Summary:
    """Preprocess a corpus, or continue a run of the same configuration that was interrupted.

    Blank lines are passed over, and documents without a token are left out and counted. Nothing is written under its
    final name before everything has been read. Errors: ValueError for bad flags, a bad tokenizer, a line that is no
    document ("file:line: reason"), an input without documents, an unfinished run of another configuration, a finished
    corpus in the way (without --overwrite); OSError for files that cannot be read or written.
    """
    config.validate()
    readers = open_inputs(config.input, Columns(config.json_key, config.domain_key, config.sft))
    tokenizer = load_tokenizer(config.tokenizer_files(), config.eod_token)
    encoder = Encoder(
        tokenizer=tokenizer,
        json_key=config.json_key,
        domain_key=config.domain_key,
        eod=tokenizer.eod if config.append_eod else None,
        bos=tokenizer.bos(True if config.bos else False if config.no_bos else None),
        dtype=token_dtype(tokenizer.vocab_size),
        skip_broken=config.skip_broken,
        records=RecordKeys(config.prompt_key, config.response_key, config.messages_key) if config.sft else None,
    )
    workspace = Workspace(config.output_prefix, _settings(config, encoder), _identities(readers), config.restart)
    try:
        if workspace.progress is None:
            if not config.overwrite:
                refuse_replacing(config.output_prefix, config.domain_key is not None)
            workspace.begin()
        state = _loaded_state(config, workspace, len(readers))
        if state.sealed is None:
            state = _encode(config, readers, encoder, workspace, state)
        assert state.sealed is not None
        publish(state.sealed, workspace.path)
    except BaseException as error:
        workspace.leave(error)
        raise
    workspace.remove()
    summary = Summary(state.sealed, state.broken, stale_corpora(config.output_prefix, state.sealed))
    if summary.stale:
        names = ", ".join(path.name for path in summary.stale)
        print(f"preprocess: not made from this input, and left as they are: {names}", file=sys.stderr)
    _print_summary(summary, config.progress)
    return summary


@dataclass
class _State:
    """How far a run is, as it is saved in progress.state."""

    place: Position = field(default_factory=Position)
    """Where reading continues. The name is a key of progress.state, and stays."""
    stored: int = 0
    """Bytes of all input files up to `place`."""
    broken: dict[str, int] = field(default_factory=dict)
    domains: list[dict[str, Any]] = field(default_factory=list)
    """The state from which `Output` continues."""
    sealed: list[PrefixSummary] | None = None
    """Set when all is encoded and the files only need their final names."""


def _loaded_state(config: PreprocessConfig, workspace: Workspace, n_inputs: int) -> _State:
    saved = workspace.progress
    if saved is None:
        return _State()
    try:
        sealed = None
        if saved["sealed"] is not None:
            sealed = [
                PrefixSummary(**entry, prefix=domain_prefix(config.output_prefix, entry["domain"]))
                for entry in saved["sealed"]
            ]
        position = Position(**saved["place"])
        if not (0 <= position.input < n_inputs and position.offset >= 0 and position.lines >= 0):
            raise ValueError(f"no such position: {position}")
        state = _State(position, int(saved["stored"]), dict(saved["broken"]), saved["domains"], sealed)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(workspace.path, error) from None
    if state.broken and not config.skip_broken:
        raise ValueError(
            f"{workspace.path}: the unfinished run has left out broken documents; give --skip-broken to finish it, or "
            "--restart to discard it"
        )
    return state


def _encode(
    config: PreprocessConfig, readers: Sequence[Reader], encoder: Encoder, workspace: Workspace, state: _State
) -> _State:
    """Encode the rest of the input; return the state with all files sealed."""
    stored = [reader.stored_bytes for reader in readers]
    total = None if None in stored else sum(size or 0 for size in stored)
    workers = config.workers if total is None else min(config.workers, -(-total // inputs.CHUNK_BYTES))
    output = Output(
        config.output_prefix, encoder.dtype, workspace.path, state.domains, config.overwrite, masked=config.sft
    )
    chunks = inputs.chunks(readers, state.place)
    notes = _Notes(workspace, output)
    try:
        with Progress(total, state.stored, config.progress) as progress:
            for chunk, encoded in encode_all(chunks, encoder, config.tokenizer_files(), config.eod_token, workers):
                output.add(encoded)
                for message in encoded.named[: max(0, _NAMED - sum(state.broken.values()))]:
                    print(f"preprocess: left out: {message}", file=sys.stderr)
                state.broken = dict(encoded.broken + Counter(state.broken))
                state.place, state.stored = chunk.end, chunk.stored
                progress.advance(chunk.stored, encoded.documents, encoded.tokens)
                notes.take_when_due(state)
        state.sealed = output.seal(partial(_sidecar, config, encoder))
        notes.take(state)
    finally:
        output.close()
    return state


class _Notes:
    """Makes durable points: brings what was added to the disk, and then the state that refers to it."""

    def __init__(self, workspace: Workspace, output: Output) -> None:
        self._workspace, self._output = workspace, output
        self._due = time.monotonic() + _SECONDS_BETWEEN_NOTES

    def take_when_due(self, state: _State) -> None:
        started = time.monotonic()
        if started >= self._due:
            state.domains = self._output.durable()
            self.take(state)
            now = time.monotonic()
            self._due = now + max(_SECONDS_BETWEEN_NOTES, _PAUSE * (now - started))

    def take(self, state: _State) -> None:
        saved = asdict(state)
        for entry in saved["sealed"] or []:
            del entry["prefix"]  # it follows from the domain, and a file should not decide where to write
        self._workspace.save(saved)


def _settings(config: PreprocessConfig, encoder: Encoder) -> dict[str, Any]:
    """Return what the output depends on, apart from the input."""
    return {
        "--tokenizer": encoder.tokenizer.fingerprint,
        "version of tokenizers": tokenizers.__version__,
        "--json-key": config.json_key,
        "--domain-key": config.domain_key,
        "end-of-document token": encoder.eod,
        "start-of-document token": encoder.bos,
        "--sft": dataclasses.asdict(encoder.records) if encoder.records else None,
        "chat template": template_digest(encoder.tokenizer) if encoder.records else None,
    }


def _sidecar(config: PreprocessConfig, encoder: Encoder, documents: int, tokens: int) -> str:
    sidecar = Sidecar(
        tokenizer=encoder.tokenizer.name,
        fingerprint=encoder.tokenizer.fingerprint,
        vocab_size=encoder.tokenizer.vocab_size,
        eod=encoder.eod,
        bos=encoder.bos,
        output_prefix=config.output_prefix.name,
        documents=documents,
        tokens=tokens,
        mask=config.sft,
    )
    return sidecar.to_json()


def _identities(readers: Sequence[Reader]) -> list[list[Any]]:
    """Return name, size and modification time of every input."""
    return [
        [reader.name, None, None]
        if reader.stored_bytes is None
        else [str(Path(reader.name).resolve()), reader.stored_bytes, Path(reader.name).stat().st_mtime_ns]
        for reader in readers
    ]


def _check_writable(prefix: Path) -> None:
    if not prefix.name:
        raise ValueError(f"--output-prefix {prefix}: must end in a name")
    if not prefix.parent.is_dir():
        raise ValueError(f"--output-prefix {prefix}: the folder {prefix.parent} does not exist")
    check_writable("--output-prefix", prefix)


def _print_summary(summary: Summary, everything: bool) -> None:
    """Print what was made and what was left out, or only the latter without `everything`."""
    for prefix in summary.prefixes:
        skipped = f", {prefix.skipped_documents} without a token left out" if prefix.skipped_documents else ""
        if everything or skipped:
            print(f"{prefix.prefix}: {prefix.documents} documents, {prefix.tokens} tokens{skipped}")
    for reason, count in sorted(summary.broken.items()):
        print(f"broken, left out: {count} ({reason})")
