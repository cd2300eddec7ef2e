"""Multiple-choice and cloze tasks from JSONL files, one item a line.

    {"context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}
    {"context": "The capital of France is", "target": " Paris"}

Nothing is put between context and continuation: the space is the item's, and white space before a choice is not
counted as part of it. Or a multiple-choice item says what stands between them, as an lm-eval task does:

    {"context": "The capital of France is", "choices": ["Paris", "Rome"], "target_delimiter": " ", "answer": 0}

and then its choices are counted whole. Other keys are ignored. The measures have lm-eval's names and definitions:

    acc        the answer has the highest log-probability (multiple choice); greedy decoding gives the target (cloze)
    acc_norm   ... the highest log-probability a character of the choice
    acc_bytes  ... a byte of its UTF-8
    answer_logprob, target_logprob   the log-probability of the answer, of the target, nats (ours): they tell apart
               models whose accuracy is at chance
    *_stderr   standard error of the mean: sample standard deviation / sqrt(items); None for a single item
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_lfr.data.corpus.tokenizer import Tokenizer
from megatron_lfr.evaluation.continuations import Continuation, Continuations, Score, check_length, encode_pairs
from megatron_lfr.parallel import ranks

Kind = Literal["multiple_choice", "cloze"]
Result = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """A line of a task: a context, its continuations (only one for a cloze item), and the index of the right one."""

    line: int
    context: str
    continuations: tuple[str, ...]
    """The texts whose likelihood is scored."""
    counted: tuple[str, ...]
    """The texts whose length acc_norm and acc_bytes take: the continuations without their delimiter from the
    context."""
    answer: int


@dataclass(frozen=True)
class Task:
    path: Path
    kind: Kind
    items: list[Item]


def read_task(path: Path) -> Task:
    """Read the items of a task. Raises ValueError "file:line: reason" for a line that is not an item, and ValueError
    for a file without items."""
    items: list[Item] = []
    kind: Kind | None = None
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"--tasks {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                row_kind = _kind_of(row)
                if kind not in (None, row_kind):
                    raise ValueError(f"a {row_kind} item in a file of {kind} items")
                kind = row_kind
                items.append(_parse(number, row, row_kind))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if kind is None:
        raise ValueError(f"--tasks {path}: holds no item")
    return Task(path, kind, items)


def encode_task(task: Task, tokenizer: Tokenizer, max_length: int, bos: int | None = None) -> list[Continuation]:
    """Encode the continuations of all items, one after the other; contexts start with `bos`.

    Raises ValueError "file:line: reason" for one that cannot be scored.
    """
    pairs = [(item.context, continuation) for item in task.items for continuation in item.continuations]
    encoded = encode_pairs(tokenizer, pairs, bos)
    lines = (item.line for item in task.items for _ in item.continuations)
    for line, continuation in zip(lines, encoded, strict=True):
        try:
            check_length(continuation, max_length)
        except ValueError as error:
            raise ValueError(f"{task.path}:{line}: {error}") from None
    return encoded


def score_task(task: Task, encoded: Sequence[Continuation], model: Continuations) -> Result:
    """Compute the measures of a task, on every rank; each rank scores its share of the continuations."""
    rank, size = ranks.rank(), ranks.world_size()
    with ranks.failing_together():
        local_scores = model.score(encoded[rank::size])
    shares = ranks.gather(local_scores)
    scores: list[Score] = [None] * len(encoded)  # type: ignore[list-item]
    for first, share in enumerate(shares):
        scores[first::size] = share
    measures = _measure_choices if task.kind == "multiple_choice" else _measure_cloze
    return {
        "kind": task.kind,
        "items": len(task.items),
        **measures(list(_by_item(task, scores))),
        "cut_contexts": sum(any(score.is_cut for score in item_scores) for _, item_scores in _by_item(task, scores)),
    }


def _by_item(task: Task, scores: Sequence[Score]) -> Iterator[tuple[Item, Sequence[Score]]]:
    first = 0
    for item in task.items:
        yield item, scores[first : first + len(item.continuations)]
        first += len(item.continuations)


def _measure_choices(scored: list[tuple[Item, Sequence[Score]]]) -> Result:
    hits: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    answers: list[float] = []
    for item, item_scores in scored:
        logprobs = np.array([score.logprob for score in item_scores])
        characters = np.array([len(choice) for choice in item.counted])
        size = np.array([len(choice.encode()) for choice in item.counted])
        for name, values in (("acc", logprobs), ("acc_norm", logprobs / characters), ("acc_bytes", logprobs / size)):
            hits[name].append(float(np.argmax(values) == item.answer))
        answers.append(item_scores[item.answer].logprob)
    hits["answer_logprob"] = answers
    return {key: value for name, values in hits.items() for key, value in _mean(name, values).items()}


def _measure_cloze(scored: list[tuple[Item, Sequence[Score]]]) -> Result:
    hits = [float(score.is_greedy) for _, [score] in scored]
    return {**_mean("acc", hits), **_mean("target_logprob", [score.logprob for _, [score] in scored])}


def _mean(name: str, values: Sequence[float]) -> Result:
    """Return the mean and its standard error."""
    n = len(values)
    error = None if n < 2 else float(np.std(values, ddof=1)) / math.sqrt(n)
    return {name: math.fsum(values) / n, f"{name}_stderr": error}


def _kind_of(row: Any) -> Kind:
    if not isinstance(row, dict):
        raise ValueError("expected an object with context and choices (or target)")
    if ("choices" in row) == ("target" in row):
        raise ValueError("expected either choices and answer, or target")
    return "multiple_choice" if "choices" in row else "cloze"


def _parse(line: int, row: dict[str, Any], kind: Kind) -> Item:
    context = _text(row.get("context"), "context", may_be_empty=True)
    if kind == "cloze":
        if "target_delimiter" in row:
            raise ValueError("target_delimiter: goes with choices; a target begins with its own space")
        target = _text(row["target"], "target")
        return Item(line, context, (target,), (target,), 0)
    choices, answer = row["choices"], row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("choices: expected a list of two or more texts")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer!r}: expected the number of a choice, 0 to {len(choices) - 1}")
    texts = tuple(_text(choice, f"choice {i}") for i, choice in enumerate(choices))
    if "target_delimiter" in row:
        delimiter = _text(row["target_delimiter"], "target_delimiter", may_be_empty=True)
        return Item(line, context, tuple(delimiter + text for text in texts), texts, answer)
    counted = tuple(text.lstrip() for text in texts)
    if "" in counted:
        blank = counted.index("")
        raise ValueError(f"choice {blank}: is white space alone, of which none is counted; give target_delimiter")
    return Item(line, context, texts, counted, answer)


def _text(value: Any, name: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, got {json.dumps(value)[:40]}")
    if not value and not may_be_empty:
        raise ValueError(f"{name}: is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: holds half of a surrogate pair, which is no character") from None
    return value
