"""Build two tasks from held-out text, for models whose accuracy on public ones is at chance.

    python studies/make_tasks.py HELD_OUT.jsonl OUT [--items N]

OUT gets, in the format of `megatron-lfr evaluate --tasks`, --items items (60) of each domain that has documents of 30
words or more:

    next_words.jsonl    24 words of a document, and which 6 words follow: those that do, or what stands at that place in
                        three other documents of the domain
    last_word.jsonl     24 words of a document, and the next one

The same text gives the same files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_lfr.fileio import write_atomic

SEED = 2026
CONTEXT, CONTINUATION, OTHERS = 24, 6, 3
TRIES = 100
"""Most spans that are looked at for the wrong choices of an item."""
WORD = re.compile(r"\s*\S+")

Item = dict[str, Any]


def read_words(path: Path) -> dict[str, list[list[str]]]:
    """Return the documents of each domain that are long enough, as words with the white space before them."""
    domains: dict[str, list[list[str]]] = {}
    with path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            words = WORD.findall(row["text"])
            if len(words) >= CONTEXT + CONTINUATION:
                domains.setdefault(row["domain"], []).append(words)
    return {domain: domains[domain] for domain in sorted(domains)}


def spans(documents: Sequence[list[str]], choose: random.Random) -> Iterator[tuple[str, str]]:
    """Yield a context and what follows it, of one document after another, without end."""
    while True:
        for words in choose.sample(documents, len(documents)):
            first = choose.randrange(len(words) - CONTEXT - CONTINUATION + 1)
            middle = first + CONTEXT
            yield "".join(words[first:middle]).lstrip(), "".join(words[middle : middle + CONTINUATION])


def items_of(documents: Sequence[list[str]], count: int, choose: random.Random) -> Iterator[tuple[Item, Item]]:
    """Yield an item of each task, `count` times. A document gives several only where there are too few. ValueError
    where other documents give no wrong choices."""
    source, others = spans(documents, choose), spans(documents, choose)
    for context, follows in itertools.islice(source, count):
        choices = {follows.strip(): follows}
        for _, other in itertools.islice(others, TRIES):
            choices.setdefault(other.strip(), other)
            if len(choices) > OTHERS:
                break
        else:
            raise ValueError(f"too few documents that differ: {len(documents)}")
        offered = list(choices.values())
        choose.shuffle(offered)
        word = WORD.match(follows)
        assert word is not None
        yield (
            {"context": context, "choices": offered, "answer": offered.index(follows)},
            {"context": context, "target": word.group()},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--items", type=int, default=60)
    args = parser.parse_args()
    pairs = [
        pair
        for domain, documents in read_words(args.held_out).items()
        for pair in items_of(documents, args.items, random.Random(f"{SEED} {domain}"))
    ]
    for name, items in zip(("next_words", "last_word"), zip(*pairs, strict=True), strict=True):
        write_atomic(args.output / f"{name}.jsonl", "".join(json.dumps(item) + "\n" for item in items))
        print(f"{args.output / name}.jsonl: {len(items)} items")


if __name__ == "__main__":
    main()
