"""Preprocessing against the `tokenizers` library alone, on the same text and cores, in one run.

    python tools/benchmark_preprocess.py corpus.jsonl tokenizer.json [--megabytes 60] [--cores 2] [--repeats 5]

Ours is a whole process from its start to its end: reads JSONL, writes the .bin and .idx. The peer has the texts in
memory already and only encodes them, in batches, with its own threads; nothing is read from the results. Only its
encoding is timed, not its start. Several ways to call it run in turn with ours; the ratio that counts is that to the
one with the best median. Then: the same text in a thousand files against one file, and peak memory for one and four
times the text (main process, and the largest worker).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEERS = [("encode_batch", 1000), ("encode_batch_fast", 1000), ("encode_batch_fast", 10_000)]

OURS = """
import resource, sys
from pathlib import Path
from megatron_lfr.data.preprocess import PreprocessConfig, run
if __name__ == "__main__":
    source, prefix, tokenizer, workers = sys.argv[1:]
    run(PreprocessConfig([Path(source)], Path(prefix), tokenizer, workers=int(workers), progress=False))
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print(resource.getrusage(who).ru_maxrss)
"""

PEER = """
import json, sys, time
from tokenizers import Tokenizer
source, tokenizer, method, batch = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
with open(source, encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]
batches = [texts[i : i + batch] for i in range(0, len(texts), batch)]
encode = getattr(Tokenizer.from_file(tokenizer), method)
started = time.perf_counter()
for texts in batches:
    encode(texts, add_special_tokens=False)
print(time.perf_counter() - started)
"""


def ours(source: Path, tokenizer: Path, cores: int) -> tuple[float, int, int]:
    """(seconds, peak KiB of the main process, of the largest worker)."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, "-c", OURS, str(source), f"{folder}/c", str(tokenizer), str(cores)]
        started = time.perf_counter()
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds = time.perf_counter() - started
    main, worker = map(int, printed.split())
    return seconds, main, worker


def peer(source: Path, tokenizer: Path, cores: int, method: str, batch: int) -> float:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(cores)}
    command = [sys.executable, "-c", PEER, str(source), str(tokenizer), method, str(batch)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def prepare(corpus: Path, folder: Path, n_bytes: int) -> tuple[Path, Path, Path, int]:
    """The start of the corpus as one file, four times over, and in a thousand files; the bytes of its text."""
    one, four, many = folder / "one.jsonl", folder / "four.jsonl", folder / "many"
    with corpus.open("rb") as file:
        lines = file.read(n_bytes).splitlines(keepends=True)
        lines[-1] += file.readline()
    one.write_bytes(b"".join(lines))
    four.write_bytes(one.read_bytes() * 4)
    many.mkdir()
    for i in range(1000):
        first, last = (len(lines) * k // 1000 for k in (i, i + 1))
        (many / f"{i:04}.jsonl").write_bytes(b"".join(lines[first:last]))
    return one, four, many, sum(len(json.loads(line)["text"].encode()) for line in lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="documents, one JSON object a line with the key `text`")
    parser.add_argument("tokenizer", type=Path, help="a `tokenizers` JSON file")
    parser.add_argument("--megabytes", type=float, default=60, help="how much of the corpus (default: 60)")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    with tempfile.TemporaryDirectory() as folder:
        one, four, many, n_bytes = prepare(args.corpus, Path(folder), int(args.megabytes * 1e6))
        print(f"{n_bytes / 1e6:.1f} MB of text, {args.cores} cores, {args.repeats} repeats")
        seconds: list[float] = []
        in_many: list[float] = []
        of_peers: dict[tuple[str, int], list[float]] = {name: [] for name in PEERS}
        memory = (0, 0)
        for _ in range(args.repeats):
            elapsed, *peaks = ours(one, args.tokenizer, args.cores)
            seconds.append(elapsed)
            memory = (max(memory[0], peaks[0]), max(memory[1], peaks[1]))
            for name in PEERS:
                of_peers[name].append(peer(one, args.tokenizer, args.cores, *name))
            in_many.append(ours(many, args.tokenizer, args.cores)[0])
        print(f"ours: {n_bytes / 1e6 / statistics.median(seconds):.2f} MB/s, seconds {spread(seconds)}")
        for (method, batch), times in of_peers.items():
            ratios = [theirs / mine for theirs, mine in zip(times, seconds, strict=True)]
            rate = n_bytes / 1e6 / statistics.median(times)
            print(f"{method}, batches of {batch}: {rate:.2f} MB/s, seconds {spread(times)}, ours / its {spread(ratios)}")
        best = min(of_peers, key=lambda name: statistics.median(of_peers[name]))
        ratios = [theirs / mine for theirs, mine in zip(of_peers[best], seconds, strict=True)]
        print(f"throughput against the best of them ({best[0]}, {best[1]}): {spread(ratios)}")
        files = [many / one for many, one in zip(in_many, seconds, strict=True)]
        print(f"time of a thousand files / one file: {spread(files)}")
        _, *of_four = ours(four, args.tokenizer, args.cores)
        for who, at_one, at_four in zip(("main process", "largest worker"), memory, of_four, strict=True):
            print(f"peak memory, {who}: {at_one / 1024:.0f} MiB, with four times the text {at_four / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
