"""The flags that `megatron-lfr benchmark` has beside those of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_lfr.config import take_option

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Options:
    """The flags that `benchmark` has in addition to those of a run."""

    steps: int = 20
    warmup: int = 5
    traced_steps: int = 5
    blocks: int | None = None
    json: Path | None = None
    against: Path | None = None
    sweep: str | None = None

    @property
    def all_steps(self) -> int:
        """Number of steps that are trained: one more counts the collectives."""
        return self.warmup + self.steps + self.traced_steps + 1


def take_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Split the command line into our own flags and those of a run. ValueError names a flag and what is legal."""
    rest = list(argv)

    def take(flag: str, parse: Callable[[str], Number | Path | str]) -> Number | Path | str | None:
        nonlocal rest
        text, rest = take_option(rest, flag)
        return None if text is None else parse(text)

    defaults = Options()
    given = {
        "steps": take("--steps", _number("--steps", 2)),
        "warmup": take("--warmup", _number("--warmup", 0)),
        "traced_steps": take("--traced-steps", _number("--traced-steps", 1)),
        "blocks": take("--blocks", _number("--blocks", 1)),
        "json": take("--json", Path),
        "against": take("--against", Path),
        "sweep": take("--sweep", str),
    }
    return Options(**{**vars(defaults), **{k: v for k, v in given.items() if v is not None}}), rest


def _number(flag: str, smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise ValueError(f"{flag} {text}: must be a number of at least {smallest}")
        return int(text)

    return parse
