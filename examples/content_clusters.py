"""Clusters of content for `megatron-lfr train --lfr-clusters`: k-means over hashed n-grams of each training block.

    python examples/content_clusters.py --data-path data/web_text_document data/code_text_document \\
        --seq-length 2048 --clusters 32 --output clusters.npy

A block's features are the counts of its tokens and pairs of tokens, hashed into as many bins as --features says, as
square roots and of length 1, so that the few most frequent do not decide. Centres are found on a sample of the blocks.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lfr.data.corpus.block_values import write_description
from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource
from megatron_lfr.fileio import write_atomic

Floats = npt.NDArray[np.float32]

BATCH = 1024


def features(tokens: npt.NDArray[np.int64], size: int) -> Floats:
    """Return hashed counts of tokens and pairs of tokens fp32 [rows, size], for tokens [rows, length]."""
    pairs = (tokens[:, :-1] * 1_000_003 + tokens[:, 1:]) * 0x9E3779B1 + 1
    hashes = np.concatenate((tokens * 0x9E3779B1, pairs), 1) % 2_147_483_647 % size
    rows = np.arange(len(tokens))[:, None]
    counts = np.bincount((rows * size + hashes).ravel(), minlength=len(tokens) * size).reshape(-1, size)
    roots = np.sqrt(counts)
    return (roots / np.linalg.norm(roots, axis=1, keepdims=True)).astype(np.float32)


def batches(source: BlockSource, ids: npt.NDArray[np.int64], size: int) -> Iterator[Floats]:
    """Yield the features of blocks, BATCH at a time."""
    for first in range(0, len(ids), BATCH):
        yield features(source.read(ids[first : first + BATCH]), size)


def nearest(points: Floats, centres: Floats) -> npt.NDArray[np.int64]:
    """Return the nearest centre of each point."""
    return np.argmax(points @ centres.T - (centres**2).sum(1) / 2, axis=1)


def k_means(points: Floats, k: int, rng: np.random.Generator, rounds: int = 30) -> Floats:
    """Return k centres of points [n, size]: k-means++ (Arthur & Vassilvitskii 2007), then Lloyd's iterations."""
    centres = points[rng.integers(len(points))][None]
    for _ in range(k - 1):
        distance = np.maximum(1 + (centres**2).sum(1) - 2 * points @ centres.T, 0).min(1).astype(np.float64)
        chosen = rng.choice(len(points), p=distance / distance.sum()) if distance.any() else rng.integers(len(points))
        centres = np.vstack((centres, points[chosen]))
    for _ in range(rounds):
        cluster = nearest(points, centres)
        occupied = [c for c in range(k) if (cluster == c).any()]  # an empty cluster keeps its centre
        moved = centres.copy()
        moved[occupied] = [points[cluster == c].mean(0) for c in occupied]
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", nargs="+", required=True, metavar="PREFIX", help="as for train, without weights")
    parser.add_argument("--seq-length", type=int, required=True, help="as for train")
    parser.add_argument("--split", default="99,1,0", help="as for train (default: %(default)s)")
    parser.add_argument("--clusters", type=int, default=32, help="number of clusters (default: %(default)s)")
    parser.add_argument("--features", type=int, default=512, help="bins of n-grams (default: %(default)s)")
    parser.add_argument(
        "--sample", type=int, default=20_000, help="blocks that give the centres (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="FILE.npy, uint32 [training blocks]")
    options = parser.parse_args()
    for flag, value in (("clusters", options.clusters), ("features", options.features), ("sample", options.sample)):
        if value < 1:
            parser.error(f"--{flag} {value}: must be at least 1")
    if options.output.suffix != ".npy" or not options.output.absolute().parent.is_dir():
        parser.error(f"--output {options.output}: must end in .npy, in a folder that there is")
    corpus = BlockDataset(options.data_path, options.seq_length, options.split)
    source, rng = corpus.train, np.random.default_rng(options.seed)
    everything = np.arange(source.num_blocks)
    sample = np.sort(rng.permutation(everything)[: options.sample])
    points = np.concatenate(list(batches(source, sample, options.features)))
    centres = k_means(points, options.clusters, rng)
    clusters = np.concatenate([nearest(one, centres) for one in batches(source, everything, options.features)])
    numbers = io.BytesIO()
    np.save(numbers, clusters.astype(np.uint32))
    write_atomic(options.output, numbers.getvalue())
    write_description(options.output, corpus.digests(), "the cluster of each block, by content")
    sizes = np.bincount(clusters)
    print(f"{options.output}: {len(clusters)} blocks, {np.count_nonzero(sizes)} clusters of at most {sizes.max()}")


if __name__ == "__main__":
    main()
