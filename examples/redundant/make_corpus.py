"""Plant copies and junk in clean text, to see what scores and schedules make of them.

    python examples/redundant/make_corpus.py clean.jsonl FOLDER [--megabytes 4]

clean.jsonl holds {"text": ...} a line, as examples/demo/make_corpus.py writes it. Of the bytes of FOLDER/corpus.jsonl,
60 % are documents that are there once; 28 % are copies, with multiplicities by Zipf's law, half of them with a few
words replaced, boilerplate among them; 12 % are junk: half of it shuffled words, half base64, hex and digits. Beside
it:

    labels.jsonl     {"kind": ..., "of": ...} for each document of the corpus, in its order: what was planted, and of
                     which text it is a copy
    unique.jsonl     the corpus without junk, one of each group of copies: what a perfect cleaning would leave
    trusted.jsonl    clean text that is not in the corpus
    heldout.jsonl    clean text that is in neither, to evaluate on

The same input gives the same files.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lfr.fileio import write_atomic

SEED = 2024
SHARES = {"unique": 0.60, "copies": 0.28, "junk": 0.12}
BOILERPLATE = 0.1
"""Share of the bytes of copies that are boilerplate."""
_BOILERPLATE_LETTERS = 300
HELD_OUT, TRUSTED = 0.1, 0.15
"""Shares of the clean documents."""
MOST_COPIES = 40
EDITED_WORDS = (0.02, 0.10)
"""Fewest and most words that are replaced in an edited copy, as shares."""


@dataclass(frozen=True)
class Document:
    """A document of the corpus. kind: what it was planted as. of: the number of the text that it is a copy of."""

    text: str
    kind: str
    of: int | None = None

    @property
    def size(self) -> int:
        return len(self.text.encode())


def multiplicity(draw: random.Random) -> int:
    """How often a text is there: k with a chance in proportion to 1 / k^2, from 2 to MOST_COPIES."""
    counts = range(2, MOST_COPIES + 1)
    return draw.choices(counts, [1 / k**2 for k in counts])[0]


def edited(text: str, words: list[str], draw: random.Random) -> str:
    """Return a copy in which a few words are others."""
    parts = text.split(" ")
    for index in draw.sample(range(len(parts)), max(1, round(draw.uniform(*EDITED_WORDS) * len(parts)))):
        parts[index] = draw.choice(words)
    return " ".join(parts)


def copies(texts: Iterator[str], n_bytes: float, words: list[str], draw: random.Random) -> Iterator[Document]:
    """Return groups of copies, of `n_bytes` together: boilerplate first, then documents."""
    size, number = 0, 0
    while size < n_bytes:
        is_boilerplate = size < BOILERPLATE * n_bytes
        text = next(texts)[: _BOILERPLATE_LETTERS if is_boilerplate else None]
        times = MOST_COPIES if is_boilerplate else multiplicity(draw)
        for k in range(times):
            is_edited = k > 0 and draw.random() < 0.5
            kind = ("boilerplate" if is_boilerplate else "copy") + (" edited" if is_edited else "")
            document = Document(edited(text, words, draw) if is_edited else text, kind, number)
            size += document.size
            yield document
        number += 1


def junk(texts: Iterator[str], n_bytes: float, draw: random.Random) -> Iterator[Document]:
    """Documents that are no text, as long as some that are, of `n_bytes` together."""
    shuffled = other = 0
    while shuffled + other < n_bytes:
        text = next(texts)
        if shuffled <= other:
            kind, words = "shuffled", text.split()
            draw.shuffle(words)
            made = " ".join(words)
        else:
            kind, length = draw.choice(("base64", "hex", "digits")), len(text)
            content = draw.randbytes(length)
            made = {
                "base64": base64.b64encode(content).decode(),
                "hex": content.hex(),
                "digits": " ".join(str(draw.randrange(10**6)) for _ in range(length // 6 + 1)),
            }[kind][:length]
        document = Document(made, kind)
        shuffled += document.size * (kind == "shuffled")
        other += document.size * (kind != "shuffled")
        yield document


def make(clean: list[str], n_bytes: float | None) -> tuple[list[Document], list[str], list[str]]:
    """(documents of the corpus, trusted texts, held-out texts). ValueError where there is too little clean text."""
    draw = random.Random(SEED)
    texts = sorted(set(clean))
    draw.shuffle(texts)
    held_out, trusted = (int(share * len(texts)) for share in (HELD_OUT, TRUSTED))
    pool = texts[held_out + trusted :]
    available = sum(len(text.encode()) for text in pool)
    # Copies need a part of their bytes in clean text, shuffled words all of theirs.
    most = available / (SHARES["unique"] + SHARES["copies"] / 2 + SHARES["junk"])
    total = most if n_bytes is None else n_bytes
    if not 0 < total <= most:
        raise ValueError(f"--megabytes {total / 1e6:g}: this text makes at most {most / 1e6:.2f}")
    words = sorted({word for text in texts[:200] for word in text.split()})
    rest = iter(pool)
    documents = [*copies(rest, SHARES["copies"] * total, words, draw), *junk(rest, SHARES["junk"] * total, draw)]
    size = 0
    for text in rest:
        if size >= SHARES["unique"] * total:
            break
        documents.append(Document(text, "unique"))
        size += len(text.encode())
    draw.shuffle(documents)
    return documents, texts[held_out : held_out + trusted], texts[:held_out]


def unique_part(documents: list[Document]) -> list[str]:
    """Return the corpus without junk, and with the first of each group of copies."""
    groups: set[int] = set()
    kept = []
    for document in documents:
        if document.kind == "unique" or (document.of is not None and document.of not in groups):
            kept.append(document.text)
        if document.of is not None:
            groups.add(document.of)
    return kept


def write_texts(path: Path, texts: list[str]) -> None:
    write_atomic(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clean", type=Path, help='a JSONL file of clean text, {"text": ...} a line')
    parser.add_argument("folder", type=Path, help="where the files are written; made where it is missing")
    parser.add_argument("--megabytes", type=float, help="size of the corpus (default: all that the text is enough for)")
    args = parser.parse_args()
    clean = [json.loads(line)["text"] for line in args.clean.read_text(encoding="utf-8").splitlines()]
    try:
        documents, trusted, held_out = make(clean, None if args.megabytes is None else 1e6 * args.megabytes)
    except (ValueError, StopIteration) as error:
        parser.error(str(error) or "too little clean text")
    args.folder.mkdir(parents=True, exist_ok=True)
    write_texts(args.folder / "corpus.jsonl", [document.text for document in documents])
    labels = [{name: value for name, value in asdict(document).items() if name != "text"} for document in documents]
    write_atomic(args.folder / "labels.jsonl", "".join(json.dumps(label) + "\n" for label in labels))
    write_texts(args.folder / "unique.jsonl", unique_part(documents))
    write_texts(args.folder / "trusted.jsonl", trusted)
    write_texts(args.folder / "heldout.jsonl", held_out)
    total = sum(document.size for document in documents)
    print(f"{'kind':<20}{'documents':>10}{'kB':>8}{'%':>7}")
    for kind in sorted({document.kind for document in documents}):
        sizes = [document.size for document in documents if document.kind == kind]
        print(f"{kind:<20}{len(sizes):>10}{sum(sizes) / 1000:>8.0f}{100 * sum(sizes) / total:>7.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
