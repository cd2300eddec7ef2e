"""Measures commonness: copies and likelihoods, in tokens a second, beside datasketch's MinHashLSH in one run.

    python tools/benchmark_commonness.py [--megabytes 60] [--peer-documents 1000] [--threads 2] [--repeats 5]
        [--json OUT.json]

The text is Python source of this interpreter's library and packages, as ids of a byte-level BPE of 8192 tokens that is
trained on the first 4 MB; every tenth file is trusted text, the others are the corpus. The command is all of it:
copies, likelihoods, with trusted text the ratio and what is junk, and the page. Near copies have half of their runs of
4 tokens in common for both. datasketch (`pip install datasketch`) is given the runs of the first documents as bytes,
makes signatures of 128 permutations, and puts them into its index, which is asked for each document; it is much slower,
so that it gets fewer documents.

Printed are medians over the repeats with the least and the most, of tokens a second by the clock and by the processor
time of all threads; the latter is what a machine without other work gives each core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_lfr.commonness.command import CommonnessConfig, run
from megatron_lfr.commonness.copies import Copies, find_copies
from megatron_lfr.commonness.items import Prefix, training_prefixes
from megatron_lfr.commonness.likelihood import count_ngrams, score
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter

SHINGLE, THRESHOLD, VOCAB_SIZE, SEQ_LENGTH = 4, 0.5, 8192, 2048
TABLE_TOKENS = 8


def sources(megabytes: float) -> Iterator[str]:
    """Yield Python files, in the order of their names, until there is as much."""
    left = megabytes * 1e6
    for name in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(name)).rglob("*.py")):
            if left <= 0:
                return
            text = path.read_text("utf-8", errors="replace")
            left -= len(text)
            yield text


def make_corpora(corpus: Path, trusted: Path, megabytes: float) -> None:
    """Write the text: every tenth document as trusted, the others as the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sources(min(4, megabytes)), trainer)
    texts = sources(megabytes)
    with IndexedDatasetWriter(corpus, np.uint16) as writer, IndexedDatasetWriter(trusted, np.uint16) as other:
        while batch := list(islice(texts, 250)):
            for number, encoding in enumerate(tokenizer.encode_batch(batch)):
                (writer if number % 10 else other).add_document([np.array(encoding.ids, np.uint16)])


def rates(call: Callable[[], object], tokens: int) -> tuple[float, float]:
    """Return the tokens a second by the clock, and by processor time."""
    clock, cpu = time.perf_counter(), time.process_time()
    call()
    return tokens / (time.perf_counter() - clock), tokens / (time.process_time() - cpu)


def peer(prefix: Prefix, documents: int) -> Callable[[], int] | None:
    """Run datasketch on the first documents; return how many of them have a near copy, or None without it."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        print("datasketch is not installed (pip install datasketch): our times alone")
        return None

    def find() -> int:
        index = MinHashLSH(threshold=THRESHOLD, num_perm=128)
        signatures: list[Any] = []
        for document in range(documents):
            tokens = prefix.dataset.document(document)
            size = SHINGLE * tokens.itemsize
            raw = tokens.tobytes()
            signature = MinHash(num_perm=128)
            signature.update_batch({raw[i : i + size] for i in range(0, len(raw) - size + 1, tokens.itemsize)})
            signatures.append(signature)
            index.insert(document, signature)
        near = 0
        for document, signature in enumerate(signatures):
            others = [other for other in index.query(signature) if other != document]
            near += any(signature.jaccard(signatures[other]) >= THRESHOLD for other in others)
        return near

    return find


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--peer-documents", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_corpora(Path(folder, "corpus"), Path(folder, "trusted"), args.megabytes)
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    prefixes = training_prefixes(BlockDataset([folder / "corpus"], SEQ_LENGTH, "1"))
    (prefix,) = prefixes
    tokens, documents = prefix.num_tokens, len(prefix.offsets) - 1
    first = min(args.peer_documents, documents)
    few = Prefix(prefix.dataset, prefix.offsets[: first + 1])
    slots = int(np.ceil(np.log2(TABLE_TOKENS * tokens)))
    kept: dict[str, Any] = {}

    def copies(part: Prefix, of_blocks: bool, name: str) -> Copies:
        spans = part.training_blocks() if of_blocks else part.documents()
        kept[name] = find_copies([spans], SHINGLE, THRESHOLD, args.threads, folder / "signatures")
        return kept[name]

    def both() -> None:
        copies(prefix, False, "documents")
        copies(prefix, True, "blocks")

    def likelihoods() -> None:
        score(count_ngrams(prefixes, slots, VOCAB_SIZE, args.threads), prefixes, True, args.threads)

    def command(*trusted: str) -> None:
        run(
            CommonnessConfig(
                [str(folder / "corpus")],
                folder / "out",
                reference_data_path=list(trusted),
                seq_length=SEQ_LENGTH,
                split="1",
                threads=args.threads,
            )
        )

    tasks: dict[str, tuple[Callable[[], object], int]] = {
        "copies of documents and of blocks": (both, tokens),
        "likelihoods": (likelihoods, tokens),
        "the command": (command, tokens),
        "the command, with trusted text": (lambda: command(str(folder / "trusted")), tokens),
        "documents' copies, the first": (lambda: copies(few, False, "few"), few.num_tokens),
    }
    find = peer(few, first)
    if find is not None:
        tasks["datasketch, the same documents"] = (lambda: kept.update(peer=find()), few.num_tokens)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for _ in range(args.repeats):
        for name, (call, size) in tasks.items():
            measured[name].append(rates(call, size))
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, load {load:.1f}, {date.today()}")
    print(f"{tokens:,} tokens, {documents:,} documents, {prefix.blocks:,} blocks; few: {few.num_tokens:,}, {first:,}")
    print("\nmillion tokens a second | by the clock | by processor time")
    for name, pairs in measured.items():
        print(f"{name} | {spread([p[0] / 1e6 for p in pairs])} | {spread([p[1] / 1e6 for p in pairs])}")
    if find is not None:
        ours, theirs = measured["documents' copies, the first"], measured["datasketch, the same documents"]
        ratios = [[a[i] / b[i] for a, b in zip(ours, theirs, strict=True)] for i in (0, 1)]
        print(f"ours / datasketch, pairs | {spread(ratios[0])} | {spread(ratios[1])}")
        near = int((kept["few"].near_copies > 1).sum())
        print(f"documents with near copies: {near} by ours, {kept['peer']} by datasketch")
    if args.json is not None:
        args.json.write_text(json.dumps({"tokens": tokens, "load": load, "rates": measured}, indent=1) + "\n")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
