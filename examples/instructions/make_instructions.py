"""Make supervised records of four small tasks from a seed: most of them easy and nearly the same, some hard.

    python examples/instructions/make_instructions.py FOLDER [--records N] [--seed S]

repeat: a word of a dozen, asked for in few ways, so that most records are near copies; lookup: a value in a short
table; reverse: random letters backwards; add: two numbers of two digits. FOLDER/train.jsonl holds six tenths repeat, a
fifth lookup, and a tenth each of the others; FOLDER/held_out.jsonl some of each task, none of which (but repeat's) is
asked in train.jsonl. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Callable
from pathlib import Path

from megatron_lfr.fileio import write_atomic

WORDS = ("river", "stone", "cloud", "apple", "green", "night", "paper", "music", "horse", "bread", "light", "seven")
WAYS = ("Repeat the word {}.", "Please repeat the word {}.", "Repeat the word {}, please.", "Say {}.")
HELD_OUT = 100
"""Records of each task that are held out, of which each prompt is kept once."""

Record = tuple[str, str]
"""Prompt and response."""


def repeat(choose: random.Random) -> Record:
    word = choose.choice(WORDS)
    return choose.choice(WAYS).format(word), word


def lookup(choose: random.Random) -> Record:
    names, values = choose.sample(string.ascii_lowercase, 3), choose.sample(range(10, 100), 3)
    wanted = choose.randrange(3)
    table = ", ".join(f"{name} is {value}" for name, value in zip(names, values, strict=True))
    return f"If {table}, what is {names[wanted]}?", str(values[wanted])


def reverse(choose: random.Random) -> Record:
    letters = "".join(choose.choices(string.ascii_lowercase, k=choose.randint(3, 5)))
    return f"Write {letters} backwards.", letters[::-1]


def add(choose: random.Random) -> Record:
    one, other = choose.randint(10, 99), choose.randint(10, 99)
    return f"What is {one} + {other}?", str(one + other)


TASKS: dict[str, tuple[Callable[[random.Random], Record], int]] = {
    "repeat": (repeat, 6),
    "lookup": (lookup, 2),
    "reverse": (reverse, 1),
    "add": (add, 1),
}
"""The tasks, and how many tenths of the records they are."""


def make(folder: Path, records: int, seed: int) -> None:
    """Write train.jsonl, of so many records, and held_out.jsonl into a folder."""
    choose = random.Random(seed)
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for task, (make_record, tenths) in TASKS.items():
        apart = dict(make_record(choose) for _ in range(HELD_OUT))
        held_out += [as_line(task, record) for record in apart.items()]
        kept = 0
        while kept < records * tenths // 10:
            record = make_record(choose)
            if task == "repeat" or record[0] not in apart:
                train.append(as_line(task, record))
                kept += 1
    choose.shuffle(train)
    for name, lines in (("train", train), ("held_out", held_out)):
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def as_line(task: str, record: Record) -> dict[str, str]:
    """Return what a line of the files says of a record."""
    prompt, response = record
    return {"task": task, "prompt": f"{prompt}\n", "response": response}


def main() -> None:
    """Write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where train.jsonl and held_out.jsonl go")
    parser.add_argument("--records", type=int, default=4000, help="records to train on (default: 4000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of all records (default: 1)")
    args = parser.parse_args()
    make(args.folder, args.records, args.seed)


if __name__ == "__main__":
    main()
