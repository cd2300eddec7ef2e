"""Measures reads of blocks: against a copy from memory, through the loader, and from a thousand prefixes, in one run.

    python tools/benchmark_reads.py [--tokens 5e8] [--repeats 9] [--json OUT.json]

The corpus is written into a temporary folder and then lies in the page cache. Block reads: 1024 random blocks of 2048
tokens (uint16) at a time, as they are stored, by one thread, against `numpy.take` of the same rows from an array in
memory (a memcpy a row). Loader: batches of int64 tensors, from random ids, with document ends found or not; then a
consumer that takes 20 million tokens a second, and how long it waits for them. Prefixes: the same tokens and
documents in one prefix and in a thousand, opened (checked) and fingerprinted.

Medians, and the range that half of the repeats lie in.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource
from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.data.corpus.loader import Loader
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter

SEQ_LENGTH, DOCUMENT_LENGTH, VOCABULARY = 2048, 608, 50_000
ROWS = 1024
REQUIRED = 20e6
"""Tokens a second that one process must supply."""


def write_corpus(folder: Path, tokens: int, prefixes: int) -> list[Path]:
    """Write random tokens, the same for any number of prefixes."""
    documents = tokens // DOCUMENT_LENGTH // prefixes
    paths = []
    for number in range(prefixes):
        path = folder / f"part_{number:04d}_of_{prefixes}_text_document"
        with IndexedDatasetWriter(path, np.uint16) as writer:
            rng = np.random.default_rng(number)
            for first in range(0, documents, 100_000):
                count = min(100_000, documents - first)
                ids = rng.integers(0, VOCABULARY, count * DOCUMENT_LENGTH).astype(np.uint16)
                writer.add_documents(ids, np.full(count, DOCUMENT_LENGTH))
        paths.append(path)
    return paths


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "from": low, "to": high}


def block_reads(prefix: Path, repeats: int) -> dict[str, Any]:
    """Measure the microseconds for a block, and the ratio to a copy, in pairs."""
    dataset = IndexedDataset(prefix)
    blocks = dataset.num_tokens // SEQ_LENGTH
    memory = np.fromfile(f"{prefix}.bin", np.uint16)[: blocks * SEQ_LENGTH].reshape(blocks, SEQ_LENGTH)
    out = np.empty((ROWS, SEQ_LENGTH), np.uint16)
    rng = np.random.default_rng(1)
    ours, copies = [], []
    for _ in range(repeats * 20):
        ids = rng.integers(0, blocks, ROWS)
        copies.append(timed(lambda ids=ids: np.take(memory, ids, axis=0, out=out, mode="clip")))  # type: ignore[misc]
        ids = rng.integers(0, blocks, ROWS)
        ours.append(timed(lambda ids=ids: dataset.read(ids * SEQ_LENGTH, SEQ_LENGTH)))  # type: ignore[misc]
    ratios = [copy / read for copy, read in zip(copies, ours, strict=True)]
    return {
        "read_us": statistics.median(ours) / ROWS * 1e6,
        "copy_us": statistics.median(copies) / ROWS * 1e6,
        "speed_over_copy": spread(ratios),
    }


def random_steps(source: BlockSource, steps: int, rows: int) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(2)
    for step in range(steps):
        yield step, rng.integers(0, source.num_blocks, rows)


def loader_speed(source: BlockSource, repeats: int, **options: Any) -> dict[str, float]:
    """Measure the tokens a second of batches of 64 blocks, while nothing else is done."""
    speeds = []
    for _ in range(repeats):
        steps, rows = 200, 64
        loader = Loader(source, **options)
        seconds = timed(lambda: [None for _ in loader.iterate(random_steps(source, steps, rows))])  # noqa: B023
        speeds.append(steps * rows * SEQ_LENGTH / seconds)
    return spread(speeds)


def waiting(source: BlockSource, steps: int = 100, rows: int = 256) -> dict[str, float]:
    """Measure the milliseconds of a step, and of its wait for data, for a consumer that takes `REQUIRED` tokens/s."""
    loader = Loader(source)
    seconds = rows * SEQ_LENGTH / REQUIRED
    waits = []
    before = 0.0
    for _ in loader.iterate(random_steps(source, steps, rows)):
        waits.append(loader.wait_seconds - before)
        before = loader.wait_seconds
        time.sleep(seconds)
    later = waits[1:]  # nothing can be read ahead of the first
    return {
        "step_ms": seconds * 1e3,
        "first_wait_ms": waits[0] * 1e3,
        "median_wait_ms": statistics.median(later) * 1e3,
        "longest_wait_ms": max(later) * 1e3,
    }


def opening(paths: list[Path], repeats: int) -> dict[str, Any]:
    opened = [timed(lambda: BlockDataset(paths, SEQ_LENGTH)) for _ in range(repeats)]
    dataset = BlockDataset(paths, SEQ_LENGTH)
    return {
        "open_s": spread(opened),
        "fingerprint_s": timed(dataset.fingerprint),
        "loader_tokens_a_second": loader_speed(dataset.train, max(2, repeats // 3)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=5e8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores")
    results: dict[str, Any] = {}

    def show(name: str, result: dict[str, Any]) -> None:
        results[name] = result
        print(f"{name}: {json.dumps(result, default=float)}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        one = write_corpus(Path(folder), int(args.tokens), 1)
        show("block reads", block_reads(one[0], args.repeats))
        source = BlockDataset(one, SEQ_LENGTH).train
        show("loader, tokens a second", loader_speed(source, args.repeats))
        show(
            "loader with documents apart, tokens a second",
            loader_speed(source, args.repeats, eod=0, reset_attention_mask=True, reset_position_ids=True),
        )
        show("a consumer of 20M tokens a second", waiting(source))
        show("one prefix", opening(one, args.repeats))
        show("a thousand prefixes", opening(write_corpus(Path(folder), int(args.tokens), 1000), args.repeats))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
