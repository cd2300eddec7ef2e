"""Host lists as Slurm compresses them: `node[01-03,7],gpu5`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

_PART = re.compile(r"[^\[\],\s]+|\[[^\[\]\s]*\]")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")


def expand_hosts(text: str) -> Iterator[str]:
    """Yield the names of a compressed host list, in its order. A name may have several brackets, each of numbers and
    ranges; of two brackets, the last one changes fastest. Numbers are padded with zeros to the width of a range's first
    one. Raises ValueError where the text is no such list, when the iterator gets there."""
    for name in _split(text):
        parts = _PART.findall(name)
        if not parts or "".join(parts) != name:
            raise ValueError(f"{text!r}: no list of hosts such as node[01-03,7],gpu5")
        choices = [_numbers(text, part[1:-1]) if part.startswith("[") else [part] for part in parts]
        yield from map("".join, itertools.product(*choices))


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    return re.split(r",(?![^\[]*\])", text)


def _numbers(text: str, ranges: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{text!r}: {part!r} in brackets is neither a number nor a range such as 01-03")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise ValueError(f"{text!r}: the range {part} ends before it begins")
        numbers += (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return numbers
