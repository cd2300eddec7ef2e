"""Measure how well `megatron-lfr commonness` finds the shares of copies and junk that were planted in real text.

    python studies/cuts.py OUT [--text FILE.jsonl] [--megabytes N] [--seeds 1 2 3]

For each seed, redundant corpora of make_corpora.py with 0, 5, 12 and 25 % of one kind of junk and without copies, and
with 0, 10 and 30 % of copies and without junk (shares of the bytes). Each is cut by the rules that need no share
(docs/commonness.md). The table has planted and found shares of the tokens, how much of the planted junk is found, and
how much of the rest is taken for junk; and the largest error. OUT keeps cuts.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from make_corpora import JUNK_KINDS, Document, apart, library_text, read_text, redundant, take, write_documents

from megatron_lfr.cli import main as megatron_lfr
from megatron_lfr.commonness.items import reference_prefixes
from megatron_lfr.commonness.trust import lengths_of
from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.fileio import write_atomic

JUNK_SHARES = (0.0, 0.05, 0.12, 0.25)
COPIED_SHARES = (0.0, 0.1, 0.3)
COPIES = ("copy", "edited copy", "boilerplate")
APART = 0.12
BOUND = 0.05
Mask = npt.NDArray[np.bool_]


def cases() -> list[dict[str, Any]]:
    """Return the flags of `redundant` for each case, with what is planted."""
    junk = [
        {"what": kind, "copied": 0.0, "junk": share, "junk_kinds": (kind,)}
        for kind in JUNK_KINDS
        for share in JUNK_SHARES
    ]
    return junk + [{"what": "copies", "copied": share, "junk": 0.0} for share in COPIED_SHARES]


def run(*argv: str) -> None:
    """Run a command of megatron-lfr; its output is shown only where it fails."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = megatron_lfr(list(argv))
    if code:
        raise SystemExit(f"megatron-lfr {argv[0]} failed:\n{output.getvalue()}")


def index(folder: Path, name: str, documents: list[Document], tokenizer: Path) -> list[str]:
    """Write documents as indexed datasets; returns their prefixes, in order of the domains."""
    write_documents(folder / f"{name}.jsonl", documents)
    flags = ("--tokenizer", str(tokenizer), "--domain-key", "domain", "--workers", "1", "--overwrite")
    run("preprocess", "--input", str(folder / f"{name}.jsonl"), "--output-prefix", str(folder / name), *flags)
    return [str(path.with_suffix("")) for path in sorted(folder.glob(f"{name}_*.idx"))]


def shares(folder: Path, corpus: list[str], trusted: list[str], documents: list[Document]) -> dict[str, float]:
    """Cut a corpus; returns the shares of its tokens that are planted and found, as junk and as copies, the share of
    the planted junk that is found, and the share of the rest that is taken for junk. What is a copy of another document
    is no junk here, boilerplate that is unlike the trusted text above all."""
    text = ("--data-path", *corpus, "--reference-data-path", *trusted, "--seq-length", "128", "--split", "100,0,0")
    flags = ("--tokenizer-model", str(folder / "tokenizer.json"), "--memory-gb", "1", "--threads", "1")
    run("commonness", *text, *flags, "--output", str(folder / "commonness"))
    lengths = lengths_of(reference_prefixes([IndexedDataset(prefix) for prefix in corpus]))
    kinds = np.array([kind for _, kind, _ in documents])
    weight = np.load(folder / "commonness/document_weight.npy", allow_pickle=False)
    representative = np.load(folder / "commonness/document_representative.npy", allow_pickle=False)
    copied = representative != np.arange(len(kinds))
    junk = ~copied & (weight == 0)
    planted, everything = np.isin(kinds, JUNK_KINDS), np.ones(len(kinds), bool)

    def share(part: Mask, of: Mask) -> float:
        return float(lengths[part & of].sum() / max(1, lengths[of].sum()))

    return {
        "junk planted": share(planted, everything),
        "junk found": share(junk, everything),
        "of it": share(junk, planted),
        "of the rest": share(junk, ~planted),
        "copies planted": share(np.isin(kinds, COPIES), everything),
        "copies found": share(copied, everything),
    }


def measure(texts: dict[str, list[str]], megabytes: float, seeds: list[int]) -> list[dict[str, Any]]:
    """Return a row for each case and seed."""
    rows = []
    for seed in seeds:
        parts = apart(take(texts, 1e6 * megabytes, seed), APART)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_documents(folder / "clean.jsonl", parts["clean"])
            tokenizer = folder / "tokenizer.json"
            run("tokenizer", "--input", str(folder / "clean.jsonl"), "--output", str(tokenizer), "--vocab-size", "2048")
            trusted = index(folder, "trusted", parts["trusted"], tokenizer)
            for case in cases():
                flags = {key: value for key, value in case.items() if key != "what"}
                documents = redundant(parts["clean"], **flags, seed=seed)
                corpus = index(folder, "redundant", documents, tokenizer)
                row = {"seed": seed, "what": case["what"], **shares(folder, corpus, trusted, documents)}
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print planted and found shares, and the largest error of each kind."""
    columns = [name for name in rows[0] if name not in ("what", "seed")]
    print(f"| planted | seed | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for row in rows:
        cells = [f"{100 * row[name]:.1f} %" for name in columns]
        print(f"| {row['what']} | {row['seed']} | {' | '.join(cells)} |")
    for what in ("junk", "copies"):
        errors = [abs(row[f"{what} found"] - row[f"{what} planted"]) for row in rows]
        within = sum(error <= BOUND for error in errors)
        print(f"\n{what}: {within} of {len(rows)} within {100 * BOUND:.0f} points, at most {100 * max(errors):.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder to write cuts.json to")
    parser.add_argument("--text", type=Path, help="JSONL with domain and text, in the place of the standard library")
    parser.add_argument("--megabytes", type=float, default=4.0, help="size of the text without what is planted")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    texts = read_text(args.text) if args.text else library_text()
    rows = measure(texts, args.megabytes, args.seeds)
    write_atomic(args.output / "cuts.json", json.dumps(rows, indent=1) + "\n")
    print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
