"""Measures the orders of phases in time and memory, against Megatron-core's index builder and plain NumPy, in one run.

    python tools/benchmark_index.py [--documents 1e8 (0: without)] [--blocks 1e8] [--repeats 3] [--json OUT.json]

Learn and review: the order of all blocks of `documents` documents (lognormal lengths, mean 608 tokens, sequence length
2048), until the last id is there, against Megatron-core's document shuffle, sample index, shuffle index and save of the
same documents (its compiled helper, `pip install --no-deps megatron-core==0.16.1`; without it that row is missing).
Focus: orders over `blocks` blocks with normal scores, half kept or a tenth drawn; a weighted choice without replacement
also by exponential keys and a partition in NumPy, and by such keys in numba (numba_choice.py) where that is installed.

Medians of `repeats`, with two threads and with one; "floor" is the time of a copy of the bytes that a step must at
least read and write, at the bandwidth of a copy in this run; "bytes a block" is the memory that the call took beyond
its inputs, per block of the corpus. Needs about 40 bytes a block and 100 a document.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from process_memory import peak_beyond

from megatron_lfr import _C
from megatron_lfr.lfr import Blend, Phase

SEQ_LENGTH, MEAN_LENGTH = 2048, 608


def measure(call: Callable[[], object], repeats: int) -> tuple[float, int]:
    """Return (median seconds, peak bytes beyond those in use before)."""
    seconds: list[float] = []

    def timed() -> object:
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
        return result

    most = max(peak_beyond(timed) for _ in range(repeats))
    return statistics.median(seconds), most


def copy_bandwidth() -> float:
    """Return the bytes that a copy into allocated memory reads and writes a second."""
    source, target = np.ones(2**27, np.uint8), np.ones(2**27, np.uint8)
    return 2 * source.nbytes / min(measure(lambda: np.copyto(target, source), 1)[0] for _ in range(7))


def document_lengths(documents: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    sigma = 1.0
    lengths = np.random.default_rng(0).lognormal(np.log(MEAN_LENGTH) - sigma**2 / 2, sigma, documents)
    return np.maximum(lengths, 1).astype(np.int32)


def megatron_helper() -> Any:
    """Return Megatron-core's compiled module without its package, which imports much else; None if it is missing."""
    spec = importlib.util.find_spec("megatron")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in Path(folder).glob("core/datasets/helpers_cpp*.so"):
            loader = importlib.machinery.ExtensionFileLoader("helpers_cpp", str(path))
            spec = importlib.util.spec_from_file_location("helpers_cpp", path, loader=loader)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
            return module
    return None


def megatron_index(helper: Any, lengths: np.ndarray[Any, np.dtype[np.int32]], folder: str) -> None:
    """Run the steps of Megatron-core's GPTDataset for one epoch."""
    random = np.random.RandomState(1)
    documents = np.arange(len(lengths), dtype=np.int32)
    random.shuffle(documents)
    tokens = int(lengths.sum(dtype=np.int64))
    samples = helper.build_sample_idx_int32(lengths, documents, SEQ_LENGTH, 1, tokens, True, 1)
    order = np.arange(len(samples) - 1, dtype=np.uint32)
    random.shuffle(order)
    for name, array in (("documents", documents), ("samples", samples), ("order", order)):
        np.save(f"{folder}/{name}.npy", array, allow_pickle=False)


def numpy_choice(scores: np.ndarray[Any, np.dtype[np.float32]], samples: int) -> np.ndarray[Any, Any]:
    """Choose by exponential keys in fp32 and a partition, and shuffle the choice."""
    random = np.random.default_rng(1)
    keys = random.standard_exponential(len(scores), np.float32)
    keys /= np.exp(scores)
    chosen = np.argpartition(keys, samples)[:samples]
    random.shuffle(chosen)
    return chosen


Row = dict[str, Any]


def row(name: str, blocks: int, moved: float, bandwidth: float, call: Callable[[int], object], repeats: int) -> Row:
    """Time a call with one thread and with two. moved: bytes that must at least be read and written."""
    one, _ = measure(lambda: call(1), repeats)
    two, memory = measure(lambda: call(2), repeats)
    figures = {"seconds": two, "one_thread": one, "floor": moved / bandwidth, "bytes_a_block": memory / blocks}
    print(
        f"{name:44s} {two:8.3f} {one / two:6.2f}x {moved / bandwidth:8.3f} {two * bandwidth / moved:7.1f}x "
        f"{memory / blocks:9.2f}",
        flush=True,
    )
    return figures


def learn(documents: int, bandwidth: float, repeats: int) -> dict[str, Row]:
    lengths = document_lengths(documents)
    blocks = (int(lengths.sum(dtype=np.int64)) - 1) // SEQ_LENGTH
    name = f"learn: {blocks:,} blocks"
    rows = {name: row(name, blocks, 4 * blocks, bandwidth, lambda threads: _C.permutation(blocks, 1, threads), repeats)}
    rows["numpy"] = peer(
        "  numpy permutation", lambda: np.random.default_rng(1).permutation(blocks), rows[name], blocks
    )
    helper = megatron_helper()
    if helper is None:
        print("  Megatron-core: not installed")
        return rows
    with tempfile.TemporaryDirectory() as folder:
        call = lambda: megatron_index(helper, lengths, folder)  # noqa: E731
        rows["megatron"] = peer(f"  Megatron-core, {documents:,} documents", call, rows[name], blocks)
    return rows


def peer(name: str, call: Callable[[], object], ours: Row, blocks: int, repeats: int = 1) -> Row:
    seconds, memory = measure(call, repeats)
    ratio = ours["seconds"] / seconds
    print(f"{name:44s} {seconds:8.3f}   ours / this: {ratio:.4f}   {memory / blocks:9.2f} bytes a block", flush=True)
    return {"seconds": seconds, "ours_over_this": ratio, "bytes_a_block": memory / blocks}


def learn_blocks(blocks: int, bandwidth: float, repeats: int) -> dict[str, Row]:
    """Time an order of `blocks` blocks, and one of the same blocks as ten corpora with weights."""
    name = f"learn: {blocks:,} blocks"
    rows = {name: row(name, blocks, 4 * blocks, bandwidth, lambda threads: _C.permutation(blocks, 1, threads), repeats)}
    corpora = Blend([blocks * c // 10 for c in range(11)], list(range(1, 11)))
    scores = np.broadcast_to(np.float32(0), (blocks,))  # learn does not use them
    started = time.perf_counter()
    memory = peak_beyond(lambda: corpora.make_order(Phase("learn", 1), scores, blocks, 1, 0))
    seconds = time.perf_counter() - started
    rows["weights"] = {"seconds": seconds, "bytes_a_block": memory / blocks}
    print(f"{'  ten corpora with weights':44s} {seconds:8.3f} {memory / blocks:35.2f}", flush=True)
    return rows


def focus(blocks: int, bandwidth: float, repeats: int) -> dict[str, Row]:
    scores = np.random.default_rng(0).normal(3.5, 0.8, blocks).astype(np.float32)
    kept, samples = blocks // 2, blocks // 10
    rows: dict[str, Row] = {}

    def visits(threads: int) -> Any:
        """Run k-means with 8 clusters, then make visits in which each has the mass of its perplexities."""
        weights = _C.BlockWeights(scores, _C.cluster(scores, 8, num_threads=threads), 6.0, threads)
        mass = weights.counts * weights.mean_weights(threads)[:-1]
        return _C.order_visits(weights, mass, 0.0, samples, 1, threads)

    def choice(threads: int) -> Any:
        return _C.order_choice(_C.BlockWeights(scores, [], 6.0, threads), [1.0], 0.0, samples, 1, threads)

    factors = np.clip(scores / 8, 0, 1)

    def capped(threads: int) -> Any:
        low, high = _C.percentiles(scores, (0.05, 0.95), threads).tolist()
        weights = _C.BlockWeights(scores, [], 0.0, threads, "capped", low, high)
        return _C.order_choice(weights, [1.0], 0.0, samples, 1, threads)

    def explored(threads: int) -> Any:
        order = _C.order_threshold(scores, 0.5, True, kept, 1, threads)
        _C.place_evenly(_C.draw_distinct(blocks, kept // 10, 3, threads), order, threads)
        return order

    def weighted(threads: int) -> Any:
        return _C.shuffle_visits(_C.visits_in_passes(factors, 0, 1, 1, threads), 1, threads)

    for name, moved, call in (
        ("focus by threshold, half kept", 4 * blocks + 4 * kept,
         lambda threads: _C.order_threshold(scores, 0.5, True, kept, 1, threads)),
        ("k-means, 8 clusters", 4 * blocks, lambda threads: _C.cluster(scores, 8, num_threads=threads)),
        ("k-means + weighted visits + shuffle", 4 * blocks + 4 * samples,
         visits),
        ("weighted choice without replacement", 4 * blocks + 4 * samples, choice),
        ("focus by threshold, both tails", 4 * blocks + 4 * kept,
         lambda threads: _C.order_threshold(scores, 0.3, True, kept, 1, threads, 0.2)),
        ("focus by threshold, a tenth at random", 4 * blocks + 4 * kept, explored),
        ("choice by capped weights", 4 * blocks + 4 * samples, capped),
        ("a pass by weights from outside", 12 * blocks + 4 * int(factors.sum(dtype=np.float64)), weighted),
        ("weights from outside, square roots", 8 * blocks, lambda threads: _C.temper_weights(factors, 0.5, 4, threads)),
        ("turns of copies", 8 * blocks, lambda threads: _C.take_turns(np.arange(blocks, dtype=np.uint32), 0, False)),
    ):  # fmt: skip
        rows[name] = row(f"{name} ({blocks:,})", blocks, moved, bandwidth, call, repeats)
    ours = rows["weighted choice without replacement"]
    if blocks <= 200_000_000:
        rows["numpy choice"] = peer("  numpy keys and partition", lambda: numpy_choice(scores, samples), ours, blocks)
        if importlib.util.find_spec("numba") is None:
            print("  numba: not installed")
        else:
            rows["numba choice"] = numba_choice(scores, samples, ours, repeats)
    return rows


def numba_choice(scores: np.ndarray[Any, np.dtype[np.float32]], samples: int, ours: Row, repeats: int) -> Row:
    import numba_choice

    weights = np.exp(np.minimum(scores, 6))
    numba_choice.choice(weights[:100_000], 1000)  # compiles
    return peer(
        "  numba keys and bit histogram", lambda: numba_choice.choice(weights, samples), ours, len(scores), repeats
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=float, default=1e7)
    parser.add_argument("--blocks", type=float, default=1e7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, copy {bandwidth / 1e9:.1f} GB/s (read + write)"
    )
    print(f"{'':44s} {'seconds':>8s} {'2 / 1':>7s} {'floor':>8s} {'':>8s} {'bytes a block':>14s}")
    rows: dict[str, Any] = {"copy_bytes_a_second": bandwidth}
    if args.documents:
        rows |= learn(int(args.documents), bandwidth, args.repeats)
    rows |= learn_blocks(int(args.blocks), bandwidth, args.repeats)
    rows |= focus(int(args.blocks), bandwidth, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
