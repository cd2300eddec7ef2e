"""Compares preprocessing with the `tokenizers` library alone, on the same text and cores, in one run.

    python tools/benchmark_preprocess.py corpus.jsonl tokenizer.json [--megabytes 60] [--cores 2] [--repeats 5]

Ours is a whole process from its start to its end: reads JSONL, writes the .bin and .idx. The peer has the texts in
memory already and only encodes them, in batches, with its own threads; nothing is read from the results. Only its
encoding is timed, not its start. Several ways to call it run in turn with ours; the ratio that counts is that to the
one with the best median. Then: the same text in a thousand files against one file, and peak memory for one and four
times the documents of up to 40 kB (main process, and the largest worker process, where there are any): a long document
is encoded as one, and takes more than all else.
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
from dataclasses import dataclass
from pathlib import Path

PEERS = [("encode_batch", 1000), ("encode_batch_fast", 1000), ("encode_batch_fast", 10_000)]
"""Method of the library, and number of texts in a batch."""

OURS = """
import resource, sys
from pathlib import Path
from megatron_lfr.data.preprocess.command import PreprocessConfig, run
if __name__ == "__main__":
    source, prefix, tokenizer, workers = sys.argv[1:]
    run(PreprocessConfig([Path(source)], Path(prefix), tokenizer, workers=int(workers), progress=False, overwrite=True))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    status = Path("/proc/self/status").read_text()  # ru_maxrss of this process would count the one that started it
    main = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(sum(each.ru_utime + each.ru_stime for each in used), main, used[1].ru_maxrss)
"""

PEER = """
import json, sys, time
from tokenizers import Tokenizer
source, name, method, batch = *sys.argv[1:4], int(sys.argv[4])
with open(source, encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]
batches = [texts[i : i + batch] for i in range(0, len(texts), batch)]
encode = getattr(Tokenizer.from_file(name), method)
started, cpu = time.perf_counter(), time.process_time()
for texts in batches:
    encode(texts, add_special_tokens=False)
print(time.perf_counter() - started, time.process_time() - cpu)
"""


@dataclass(frozen=True)
class Cost:
    seconds: float
    cpu: float
    """CPU seconds of all cores, which count where others use the cores too."""
    peaks: tuple[int, ...] = ()
    """KiB of the main process, and of the largest worker."""


def ours(source: Path, tokenizer: Path, cores: int) -> Cost:
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, "-c", OURS, str(source), f"{folder}/c", str(tokenizer), str(cores)]
        started = time.perf_counter()
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds = time.perf_counter() - started
    cpu, *peaks = printed.split()
    return Cost(seconds, float(cpu), tuple(map(int, peaks)))


def peer(source: Path, tokenizer: Path, cores: int, method: str, batch: int) -> Cost:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(cores)}
    command = [sys.executable, "-c", PEER, str(source), str(tokenizer), method, str(batch)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return Cost(*map(float, printed.split()))


LONG = 40_000
"""Bytes of a document's line that the measurement of memory leaves out."""


@dataclass(frozen=True)
class Inputs:
    """The start of a corpus."""

    one: Path
    """All documents in one file."""
    many: Path
    """The same in a thousand files."""
    short: Path
    """The documents that are not long."""
    four_short: Path
    """The same, four times."""
    n_bytes: int
    """Size of the text in bytes."""


def prepare(corpus: Path, folder: Path, n_bytes: int) -> Inputs:
    one, many, short, four_short = (folder / name for name in ("one.jsonl", "many", "short.jsonl", "four_short.jsonl"))
    with corpus.open("rb") as file:
        lines = file.read(n_bytes).splitlines(keepends=True)
        lines[-1] += file.readline()
    one.write_bytes(b"".join(lines))
    short.write_bytes(b"".join(line for line in lines if len(line) <= LONG))
    four_short.write_bytes(short.read_bytes() * 4)
    many.mkdir()
    for i in range(1000):
        first, last = (len(lines) * k // 1000 for k in (i, i + 1))
        (many / f"{i:04}.jsonl").write_bytes(b"".join(lines[first:last]))
    return Inputs(one, many, short, four_short, sum(len(json.loads(line)["text"].encode()) for line in lines))


def rate(n_bytes: int, costs: list[Cost]) -> float:
    return n_bytes / 1e6 / statistics.median(cost.seconds for cost in costs)


def ratios(above: list[Cost], below: list[Cost]) -> str:
    """Return medians and spread of the paired ratios, in seconds and in CPU seconds."""
    pairs = list(zip(above, below, strict=True))
    seconds = sorted(one.seconds / other.seconds for one, other in pairs)
    cpu = sorted(one.cpu / other.cpu for one, other in pairs)
    words = [f"{statistics.median(values):.3f} ({values[0]:.3f} to {values[-1]:.3f})" for values in (seconds, cpu)]
    return f"{words[0]}, in CPU seconds {words[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="file of documents, one JSON object a line with the key `text`")
    parser.add_argument("tokenizer", type=Path, help="tokenizer, as a JSON file of the library `tokenizers`")
    parser.add_argument(
        "--megabytes", type=float, default=60, help="megabytes of the corpus that are used (default: 60)"
    )
    parser.add_argument(
        "--cores", type=int, default=len(os.sched_getaffinity(0)), help="number of cores to use (default: all)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="number of runs of each, in turn (default: 5)")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    with tempfile.TemporaryDirectory() as folder:
        inputs = prepare(args.corpus, Path(folder), int(args.megabytes * 1e6))
        one, n_bytes = inputs.one, inputs.n_bytes
        print(f"{n_bytes / 1e6:.1f} MB of text, {args.cores} cores, {args.repeats} repeats")
        single: list[Cost] = []
        in_many: list[Cost] = []
        of_peers: dict[tuple[str, int], list[Cost]] = {name: [] for name in PEERS}
        for _ in range(args.repeats):
            single.append(ours(one, args.tokenizer, args.cores))
            for name in of_peers:
                of_peers[name].append(peer(one, args.tokenizer, args.cores, *name))
            in_many.append(ours(inputs.many, args.tokenizer, args.cores))
        print(f"ours: {rate(n_bytes, single):.2f} MB/s")
        for (method, batch), costs in of_peers.items():
            print(f"{method}, batches of {batch}: {rate(n_bytes, costs):.2f} MB/s; ours / its {ratios(costs, single)}")
        best = min(PEERS, key=lambda name: statistics.median(cost.seconds for cost in of_peers[name]))
        print(f"throughput, ours / the best of them ({best[0]}, {best[1]}): {ratios(of_peers[best], single)}")
        print(f"time, a thousand files / one file: {ratios(in_many, single)}")
        peaks = [ours(path, args.tokenizer, args.cores).peaks for path in (one, inputs.short, inputs.four_short)]
        for who, at_all, at_one, at_four in zip(("main process", "largest worker"), *peaks, strict=True):
            print(
                f"peak memory, {who}: {at_all / 1024:.0f} MiB; without documents beyond {LONG // 1000} kB "
                f"{at_one / 1024:.0f} MiB, with four times the text {at_four / 1024:.0f} MiB"
            )


if __name__ == "__main__":
    main()
