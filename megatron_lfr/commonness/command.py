"""`megatron-lfr commonness` looks for exact and near copies in a corpus, and computes likelihoods of its documents and
blocks."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from megatron_lfr import _C
from megatron_lfr.commonness.clean import clean, cleaned_prefixes
from megatron_lfr.commonness.copies import Copies, find_copies
from megatron_lfr.commonness.folder import FORMAT, KIND, PAGE, SUMMARY, check_folder, results_folder
from megatron_lfr.commonness.items import Int64s, Prefix, reference_digests, reference_prefixes, training_prefixes
from megatron_lfr.commonness.junk import RULE
from megatron_lfr.commonness.likelihood import Likelihoods, count_ngrams, score, vocabulary_of
from megatron_lfr.commonness.page import make_page
from megatron_lfr.commonness.results import Items, block_means, summarize
from megatron_lfr.commonness.trust import Trust, compare, lengths_of, weights
from megatron_lfr.data.config import parse_blend
from megatron_lfr.data.corpus.blocks import BlockDataset, open_prefixes
from megatron_lfr.data.corpus.documents import check_tokenizer
from megatron_lfr.data.corpus.indexed import IndexedDataset, first_shared, with_suffix
from megatron_lfr.data.corpus.sidecar import common_sidecar
from megatron_lfr.data.corpus.tokenizer import Tokenizer, load_tokenizer
from megatron_lfr.fileio import check_can_be_folder, check_space, json_value

_ENOUGH_TRUSTED = 100
"""Documents of trusted text, from which on the least likely of them need not say by itself what is junk."""
_FIXED_BYTES = 320 << 20
"""Python, NumPy, and what is read at a time."""
_THREAD_BYTES = 16 << 20
_FEWEST_THREADS = 2
"""Threads that there is always memory for; how many more there are must not decide how large the table is."""
_ITEM_BYTES = 104
"""Of each document and each block: where it begins, and what is known of it while it is scored and in the end."""
_JUNK_BYTES = 64
"""Of each document more, while it is decided which of them are junk."""
_TOKEN_BYTES, _TRUSTED_TOKEN_BYTES = 4, 48
"""Of each token id up to the largest: how often it is there; more with trusted text: what it usually has there."""
_DISK_BYTES = 2 * _C.SIGNATURE_BINS + 32
"""Of each document or block: its signature, and what is known of it in the end."""
_SMALLEST_TABLE, _LARGEST_TABLE = 20, 31


@dataclass(frozen=True)
class CommonnessConfig:
    """Find what a corpus holds more than once, and what in it is unlike text, before training.

    Looks at the training documents and blocks that `megatron-lfr train` would have with the same --data-path, --split
    and --seq-length, and writes, for each document and each block, how many exact copies and near copies it has, the
    representative of its near copies, and its mean log-likelihood under a 4-gram model of all other documents.
    """

    data_path: list[str]
    """Prefixes of the preprocessed corpus, in the order of the run; weights before them are ignored."""
    output: Path
    """Folder for the results. One that holds results of this command is replaced, any other is refused."""
    reference_data_path: list[str] = field(default_factory=list)
    """Prefixes of text that is trusted, made with the same tokenizer and disjoint from the corpus. With it, a ratio
    says how unlike trusted text a document or block is: low is junk."""
    seq_length: int = 2048
    """Tokens in a block."""
    split: str = "99,1,0"
    """Shares of each prefix's documents for training, validation and test; only those for training are looked at."""
    tokenizer_model: str | None = None
    """The tokenizer of the corpus, to show text on the page; without it, token ids are shown."""
    shingle_tokens: int = 4
    """Near copies are those that share runs of so many consecutive tokens."""
    near_threshold: float = 0.5
    """The share of these runs, of all that either has (the Jaccard similarity), from which on two are near copies."""
    cleaned_output: Path | None = None
    """New folder for the cleaned corpus: the same prefixes, with the training documents alone, of near copies one each,
    and without junk."""
    junk_share: float | Literal["auto"] = "auto"
    """The share of the corpus' tokens to take for junk, those in documents of lowest ratio: their weight is 0. Needs
    --reference-data-path. auto: documents of lower ratio than 99 % of the trusted text has itself, and those whose
    tokens are in less order than in it, but for those that show an order themselves."""
    memory_gb: float = 4.0
    """Memory that may be used, in GB (10^9 bytes). What copies do not need goes to the 4-gram model's table."""
    threads: int = 0
    """Number of threads, 0: one for each core. The results do not depend on it."""

    def validate(self) -> None:
        """Check what can be checked before anything is read; errors name the flag and the legal values."""
        self.check_values()
        check_folder(self.output)
        if self.cleaned_output is not None:
            if self.cleaned_output.exists() or self.cleaned_output.is_symlink():
                raise ValueError(f"--cleaned-output {self.cleaned_output}: exists already; name a new folder")
            if self.cleaned_output.resolve().is_relative_to(self.output.resolve()):
                raise ValueError(f"--cleaned-output {self.cleaned_output}: is in --output; name a folder beside it")
            check_can_be_folder("--cleaned-output", self.cleaned_output)
            cleaned_prefixes(parse_blend(self.data_path, "--data-path")[0], self.cleaned_output)

    def check_values(self) -> None:
        """Check all but folders; errors as of `validate`."""
        if not 1 <= self.shingle_tokens <= 1024:
            raise ValueError(f"--shingle-tokens {self.shingle_tokens}: must be from 1 to 1024")
        if not 0.4 <= self.near_threshold <= 1:
            raise ValueError(
                f"--near-threshold {self.near_threshold}: must be from 0.4, below which most pairs are missed, to 1"
            )
        if self.junk_share != "auto" and not 0 <= self.junk_share < 1:
            raise ValueError(f"--junk-share {self.junk_share}: must be auto, or at least 0 and below 1")
        if self.junk_share not in ("auto", 0) and not self.reference_data_path:
            raise ValueError(f"--junk-share {self.junk_share}: needs --reference-data-path, trusted text")
        if not 0 < self.memory_gb < math.inf:
            raise ValueError(f"--memory-gb {self.memory_gb}: must be positive and finite")
        if not 0 <= self.threads <= 4096:
            raise ValueError(f"--threads {self.threads}: must be from 0 to 4096")


@dataclass(frozen=True)
class _Inputs:
    """What a command reads, opened and checked."""

    corpus: BlockDataset
    prefixes: list[Prefix]
    reference: list[IndexedDataset]
    reference_prefixes: list[Prefix]
    tokenizer: Tokenizer | None
    vocab_size: int
    """One more than the largest token of all."""


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr commonness`."""
    config = tyro.cli(CommonnessConfig, args=list(argv), prog="megatron-lfr commonness")
    summary = run(config)
    for kind in ("documents", "blocks"):
        row = summary[kind]
        print(
            f"{row['items']} {kind}, {row['tokens']} tokens: {100 * (row['share_unique'] or 0):.1f} % unique, "
            f"{100 * (row['share_exact_copies'] or 0):.1f} % exact and "
            f"{100 * (row['share_near_copies'] or 0):.1f} % near copies"
        )
    if summary["junk"]:
        share, ratio, beyond = (summary["junk"][name] for name in ("share", "ratio_below", "beyond_below"))
        order = "" if beyond is None else f", or whose tokens are {-beyond:.2f} nats less likely than usual"
        spared = "; of both, not what shows an order itself" if config.junk_share == "auto" else ""
        size = f"{100 * share:.1f} % of the tokens, without copies of it"
        print(f"junk: {size}, in documents of a ratio below {ratio:.2f}{order}{spared}")
        if config.junk_share == "auto" and summary["junk"]["trusted_documents"] < _ENOUGH_TRUSTED:
            known = summary["junk"]["trusted_documents"]
            print(
                f"warning: --reference-data-path has {known} documents; of text like theirs, some "
                f"{100 / (known + 1):.0f} % is taken for junk, since it is less likely than all of them. Give "
                f"{_ENOUGH_TRUSTED} or more, or a --junk-share"
            )
    print(f"commonness: {config.output / PAGE}")
    if config.cleaned_output is not None:
        prefixes, _ = parse_blend(config.data_path, "--data-path")
        kept = clean(config.output, prefixes, config.cleaned_output, {})
        size = f"{kept['kept_documents']} documents, {kept['kept_tokens']} tokens"
        print(f"cleaned: {config.cleaned_output}: {size}")
        if kept["left_out"]:
            print(f"not there, since less than a block is left of them: {', '.join(kept['left_out'])}")
        print("train on all of them, with --split 100,0,0, and validate on other text, with --valid-data-path")
    return 0


def run(config: CommonnessConfig) -> dict[str, Any]:
    """Write the folder, and return the summary that stands in its JSON.

    Errors: ValueError for bad flags, a damaged corpus, corpora of different tokenizers, a folder in use and too little
    memory; OSError for files that cannot be read or written.
    """
    config.validate()
    inputs = _open(config)
    log2_slots, threads = _divide_memory(config, inputs)
    documents, blocks = _counts(inputs)
    check_space("--output", config.output, _DISK_BYTES * (documents + blocks), "signatures and results")
    if config.cleaned_output is not None:
        sizes = (
            with_suffix(each.prefix, end).stat().st_size for each in inputs.corpus.datasets for end in (".idx", ".bin")
        )
        check_space("--cleaned-output", config.cleaned_output, sum(sizes), "a corpus of which nothing goes")
    with results_folder(config.output) as folder:
        began = time.perf_counter()
        copied = [
            find_copies(spans, config.shingle_tokens, config.near_threshold, threads, folder / "signatures")
            for spans in (
                [prefix.documents() for prefix in inputs.prefixes],
                [prefix.training_blocks() for prefix in inputs.prefixes],
            )
        ]
        between = time.perf_counter()
        of_documents, of_blocks, trust = _items(
            replace(config, threads=threads), inputs, log2_slots, copied[0], copied[1]
        )
        seconds = {"copies": between - began, "likelihoods": time.perf_counter() - between}
        of_documents.save(folder, "document")
        of_blocks.save(folder, "block", inputs.corpus.digests())
        summary = _summary(config, inputs, log2_slots, of_documents, of_blocks, seconds)
        summary["junk"] = _junk(of_documents, trust, inputs.reference_prefixes)
        (folder / SUMMARY).write_text(json.dumps(json_value(summary), indent=1) + "\n", encoding="utf-8")
        page = make_page(inputs.corpus.train.domains, inputs.prefixes, of_documents, of_blocks, inputs.tokenizer)
        (folder / PAGE).write_text(page, encoding="utf-8")
    return summary


def _open(config: CommonnessConfig) -> _Inputs:
    prefixes, _ = parse_blend(config.data_path, "--data-path")
    corpus = BlockDataset(prefixes, config.seq_length, config.split)
    reference = []
    if config.reference_data_path:
        trusted, _ = parse_blend(config.reference_data_path, "--reference-data-path")
        reference = open_prefixes(trusted, "--reference-data-path")
        check_disjoint(trusted, prefixes, "--reference-data-path")
    common_sidecar(corpus.datasets, "--data-path")
    common_sidecar([*corpus.datasets, *reference], "--reference-data-path")
    tokenizer = None if config.tokenizer_model is None else load_tokenizer(config.tokenizer_model)
    check_tokenizer(tokenizer, corpus.datasets)
    trusted_prefixes = reference_prefixes(reference)
    if reference and not any(prefix.num_tokens for prefix in trusted_prefixes):
        raise ValueError("--reference-data-path: holds no token")
    training = training_prefixes(corpus)
    vocab_size = vocabulary_of([*training, *trusted_prefixes], config.threads)
    return _Inputs(corpus, training, reference, trusted_prefixes, tokenizer, vocab_size)


def check_disjoint(text: Sequence[str], corpus: Sequence[str], flag: str, of_corpus: str = "--data-path") -> None:
    """Raise ValueError for a prefix of a text, given by `flag`, that is one of the corpus, which `of_corpus` gives."""
    if (shared := first_shared(text, corpus)) is not None:
        raise ValueError(f"{flag} {shared}: is in {of_corpus}; give text that is not")


def _counts(inputs: _Inputs) -> tuple[int, int]:
    """Return the numbers of (documents, blocks) that are looked at."""
    return sum(len(prefix.offsets) - 1 for prefix in inputs.prefixes), inputs.corpus.train.num_blocks


def _divide_memory(config: CommonnessConfig, inputs: _Inputs) -> tuple[int, int]:
    """Return the size of the 4-gram model's table, as log2 of its counters, and the number of threads.

    The table is what the memory allows, at most some three counters for each n-gram, whatever the number of threads,
    since the results follow from it; there are then as many threads as fit beside it. ValueError where the memory does
    not suffice.
    """
    sizes = _counts(inputs)
    references = sum(len(prefix.offsets) for prefix in inputs.reference_prefixes)
    held = _FIXED_BYTES + _FEWEST_THREADS * _THREAD_BYTES + _ITEM_BYTES * (sum(sizes) + references)
    held += _JUNK_BYTES * (sizes[0] + references) if references else 0
    of_tokens = inputs.vocab_size * (_TOKEN_BYTES + (_TRUSTED_TOKEN_BYTES if references else 0))
    held += of_tokens
    copies = _C.NEAR_COPY_BYTES * max(sizes)
    left = int(config.memory_gb * 1e9) - held
    if left < max(copies, 4 << _SMALLEST_TABLE):
        needed = (held + max(copies, 4 << _SMALLEST_TABLE)) / 1e9
        why = f", most of it for tokens up to {inputs.vocab_size - 1}" if of_tokens > 0.5e9 * needed else ""
        raise ValueError(f"--memory-gb {config.memory_gb}: this corpus needs at least {needed + 0.005:.2f}{why}")
    tokens = max(sum(prefix.num_tokens for prefix in part) for part in (inputs.prefixes, inputs.reference_prefixes))
    useful = max(_SMALLEST_TABLE, math.ceil(math.log2(max(1, 8 * tokens))))
    log2_slots = min(useful, int(math.log2(left // 4)), _LARGEST_TABLE)
    beside = _FEWEST_THREADS + max(0, left - max(copies, 4 << log2_slots)) // _THREAD_BYTES
    return log2_slots, min(config.threads or os.cpu_count() or 1, beside)


def _items(
    config: CommonnessConfig, inputs: _Inputs, log2_slots: int, documents: Copies, blocks: Copies
) -> tuple[Items, Items, Trust | None]:
    """Add likelihoods to what was copied. Returns documents and blocks, and with trusted text what it says of them."""
    prefixes, trusted, threads = inputs.prefixes, inputs.reference_prefixes, config.threads
    size = log2_slots, inputs.vocab_size, threads
    likely, trusted_by_corpus = _score_by_corpus(prefixes, trusted, size)
    trust = None
    if trusted_by_corpus is not None:
        trust = compare(prefixes, documents.firsts, likely, trusted, trusted_by_corpus, size, config.junk_share)
    starts: Int64s = np.cumsum([0, *(len(prefix.offsets) - 1 for prefix in prefixes)], dtype=np.int64)
    block_starts = inputs.corpus.train.domain_starts
    of_blocks = np.full(inputs.corpus.train.num_blocks, config.seq_length, np.int64)
    weight = weights(documents.near_copies, trust)
    unique, block_weight = (block_means(prefixes, each, starts) for each in (1 / documents.near_copies, weight))
    by_trust = (None, None) if trust is None else (trust.likelihoods.documents, trust.likelihoods.blocks)
    beyond = None if trust is None else trust.likelihoods.documents_beyond
    ratios = (None, None) if trust is None else (trust.documents, trust.blocks)
    return (
        Items(starts, lengths_of(prefixes), documents, likely.documents, by_trust[0], ratios[0], weight, beyond=beyond),
        Items(block_starts, of_blocks, blocks, likely.blocks, by_trust[1], ratios[1], block_weight, unique),
        trust,
    )


def _junk(documents: Items, trust: Trust | None, trusted: list[Prefix]) -> dict[str, float | None] | None:
    """Return the share of the tokens that is taken for junk, of near copies one each, what puts a document there, and
    of how many trusted documents that is known; None without trusted text."""
    if trust is None:
        return None
    share = documents.lengths[trust.junk & documents.copies.firsts].sum() / max(1, documents.lengths.sum())
    known = sum(int((np.diff(prefix.offsets) > 0).sum()) for prefix in trusted)
    limits = {"ratio_below": trust.ratio_below, "beyond_below": trust.beyond_below}
    return {"rule": RULE, "share": float(share), **limits, "trusted_documents": known}


def _score_by_corpus(
    corpus: list[Prefix], trusted: list[Prefix], size: tuple[int, int, int]
) -> tuple[Likelihoods, Likelihoods | None]:
    """Score both texts by the corpus' own model. It is gone afterwards: the memory has room for one."""
    log2_slots, vocab_size, threads = size
    model = count_ngrams(corpus, log2_slots, vocab_size, threads)
    return score(model, corpus, True, threads), score(model, trusted, False, threads) if trusted else None


def _summary(
    config: CommonnessConfig,
    inputs: _Inputs,
    log2_slots: int,
    documents: Items,
    blocks: Items,
    seconds: dict[str, float],
) -> dict[str, Any]:
    domains = inputs.corpus.train.domains
    return {
        "kind": KIND,
        "format": FORMAT,
        "settings": {
            **{name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()},
            "table_slots": 1 << log2_slots,
        },
        "corpus": inputs.corpus.digests(),
        "reference": reference_digests(inputs.reference) or None,
        "domains": domains,
        "document_starts": documents.starts.tolist(),
        "block_starts": blocks.starts.tolist(),
        "seconds": seconds,
        "documents": summarize(documents, domains),
        "blocks": summarize(blocks, domains),
    }
