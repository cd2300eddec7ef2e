"""Megatron-LM's flags that are not settings here: accepted because they ask for what is done anyway, or refused.

The argument list of a Megatron script is read in two steps: `strip_megatron_flags` takes out the flags of
megatron_flags.csv; what is left are settings of the run's configuration, which have Megatron's names too. Names
and numbers of values follow Megatron-LM's megatron/training/arguments.py and the dataclasses behind it.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Arity = Literal[0, 1, "+"]
"""Number of values that a flag takes: none, one, or all words up to the next flag."""


@dataclass(frozen=True)
class AcceptedFlag:
    """A flag that asks for what is done anyway, or that cannot change a result."""

    arity: Arity
    legal: tuple[str, ...] | None
    """The values that are accepted; None accepts any. Numbers compare by value, so that 1 is 1.0."""
    reason: str


@dataclass(frozen=True)
class RefusedFlag:
    """A flag that asks for something this package does not do."""

    arity: Arity
    reason: str
    instead: str
    """What to give instead."""


TABLE = Path(__file__).with_name("megatron_flags.csv")
"""A table with a row for each group of flags that are treated alike. Its columns are: accepted or refused, the part of
a run that the flags are about, the flags, their number of values, the legal values (empty for any), the reason, and
what to give instead; words are separated by spaces. tools/megatron_flags_page.py makes docs/megatron_flags.md from
it."""


def read_table() -> list[dict[str, str]]:
    """Read the rows of TABLE."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _arity(values: str) -> Arity:
    return {"0": 0, "1": 1, "+": "+"}[values]  # type: ignore[return-value]


_ROWS = [(flag, row) for row in read_table() for flag in row["flags"].split()]

ACCEPTED: dict[str, AcceptedFlag] = {
    flag: AcceptedFlag(_arity(row["values"]), tuple(row["legal"].split()) or None, row["reason"])
    for flag, row in _ROWS
    if row["verdict"] == "accepted"
}
"""Flags that are taken out of an argument list with a note."""

REFUSED: dict[str, RefusedFlag] = {
    flag: RefusedFlag(_arity(row["values"]), row["reason"], row["instead"])
    for flag, row in _ROWS
    if row["verdict"] == "refused"
}
"""Flags that end the program, with the reason and what to give instead."""

TRANSLATED: dict[str, dict[str, str]] = {
    "--attention-backend": {"flash": "auto", "fused": "auto"},
    "--zero-stage": {"0": "no_shard", "1": "optim", "2": "optim_grads", "3": "optim_grads_params"},
    "--num-key-value-heads": {},
    "--normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"},
    "--use-rotary-position-embeddings": {"": "rope"},
    "--no-position-embedding": {"": "rope"},
    "--checkpoint-activations": {"": "full"},
}
"""Flags with Megatron's values, and those of ours that they amount to; "" is a flag without a value."""

RENAMED = {
    "--zero-stage": "--data-parallel-sharding-strategy",
    "--num-key-value-heads": "--num-query-groups",
    "--checkpoint-activations": "--recompute-granularity",
    "--use-rotary-position-embeddings": "--position-embedding-type",
    "--no-position-embedding": "--position-embedding-type",
}
"""Those of TRANSLATED whose setting has another name."""

NEEDS = {"--deepspeed-activation-checkpointing": "--recompute-granularity"}
"""Accepted flags that ask for something only together with another one, which must be in the argument list."""


def strip_megatron_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (`argv` without the flags of the two tables and with our values of settings, a note on each of these).

    Reads `--flag value`, `--flag=value`, `--flag a b` (lists), and underscores for hyphens in names of flags. All other
    words are kept unchanged and in order. Raises one ValueError that names every refused flag and every value that is
    not accepted, with a line for each that gives the reason and the legal values.
    """
    rest: list[str] = []
    notes: list[str] = []
    problems: list[str] = []
    accepted: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        name, equals, value = word.partition("=")
        flag = name.replace("_", "-")
        spec = ACCEPTED.get(flag) or REFUSED.get(flag)
        if flag in TRANSLATED:
            takes_none = "" in TRANSLATED[flag]
            translated, note = _translate(flag, [value] if equals else [""] if takes_none else _take_values(words, 1))
            rest += translated
            notes += note
            continue
        if spec is None:
            rest.append(word)
            continue
        values = [value] if equals else _take_values(words, spec.arity)
        problem = _problem(flag, spec, values)
        if problem is not None:
            problems.append(problem)
        else:
            notes.append(f"{' '.join([flag, *values])}: accepted, {spec.reason}")
            accepted.append(flag)
    given = {word.partition("=")[0].replace("_", "-") for word in rest}
    problems += [f"{flag}: needs {NEEDS[flag]}" for flag in accepted if flag in NEEDS and NEEDS[flag] not in given]
    if problems:
        raise ValueError("\n".join(problems))
    return rest, notes


def _translate(flag: str, values: list[str]) -> tuple[list[str], list[str]]:
    """Return (words of our setting, a note if the value was Megatron's)."""
    ours = [TRANSLATED[flag].get(value, value) for value in values]
    setting = RENAMED.get(flag, flag)
    shown = "" if setting == flag else f"{setting} "
    notes = [
        f"{flag} {value}".rstrip() + f": accepted as {shown}{our}"
        for value, our in zip(values, ours, strict=True)
        if value != our or shown
    ]
    return [setting, *ours], notes


def _take_values(words: deque[str], arity: Arity) -> list[str]:
    """Take the values that `arity` allows from the head of `words`; a word that begins with `--` is not a value."""
    limit = len(words) if arity == "+" else arity
    values: list[str] = []
    while words and len(values) < limit and not words[0].startswith("--"):
        values.append(words.popleft())
    return values


def _problem(flag: str, spec: AcceptedFlag | RefusedFlag, values: list[str]) -> str | None:
    """Return why a flag with these values ends the program; None if it does not."""
    if isinstance(spec, RefusedFlag):
        return f"{flag}: refused: {spec.reason}; instead: {spec.instead}"
    if spec.arity == 0:
        return f"{flag}: takes no value, got {' '.join(values)!r}" if values else None
    legal = "any" if spec.legal is None else ", ".join(spec.legal)
    if not values:
        return f"{flag}: needs a value; legal: {legal}"
    for value in values:
        if spec.legal is not None and not any(_equal(value, choice) for choice in spec.legal):
            return f"{flag} {value}: refused: {spec.reason}; legal: {legal}"
    return None


def _equal(value: str, choice: str) -> bool:
    """Return whether two values are the same word or the same number."""
    try:
        return float(value) == float(choice)
    except ValueError:
        return value == choice
