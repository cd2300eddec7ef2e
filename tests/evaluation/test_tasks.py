"""Multiple choice and cloze: tokens, likelihoods, measures."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from megatron_lfr.build import make_tokenizer
from megatron_lfr.cli import main
from megatron_lfr.evaluation.continuations import Continuation, Continuations, Score, encode_pairs
from megatron_lfr.evaluation.tasks import read_task, score_task
from megatron_lfr.evaluation.trained import TrainedModel, load_trained
from support.continuation_samples import PAIRS, Merging
from support.text_run_oracle import SEQ, Oracle


def random_items(rng: np.random.Generator, count: int) -> list[Continuation]:
    """Contexts up to twice as long as the model's, targets up to as long as it may be; some of them greedy."""
    items = []
    for _ in range(count):
        context, target = rng.integers(1, 2 * SEQ), rng.integers(1, SEQ + 1)
        items.append(Continuation(rng.integers(0, 256, context).tolist(), rng.integers(0, 256, target).tolist()))
    return items


@pytest.mark.parametrize("batch_size", [1, 5])
def test_likelihoods_are_those_of_transformers(
    run: Path, oracle: Oracle, rng: np.random.Generator, batch_size: int
) -> None:
    model = Continuations(load_trained(run, batch_size=batch_size))
    items = [
        *random_items(rng, 14),
        Continuation([256], [1]),
        Continuation([5] * SEQ, [7]),
        Continuation([5], [7] * SEQ),
    ]
    for i, item in enumerate(items[:6]):  # what greedy decoding gives
        tokens = list(item.context)
        for _ in range(3):
            tokens.append(int(oracle.logprobs(tokens[-SEQ:])[-1].argmax()))
        target = tokens[-3:] if i % 2 else [tokens[-3], tokens[-2], (tokens[-1] + 1) % 257]
        items.append(Continuation(item.context[-SEQ + 3 :], target))
    greedy = []
    for item, score in zip(items, model.score(items), strict=True):
        row = [*item.context, *item.target]
        seen = row[-(SEQ + 1) :]
        logprobs = oracle.logprobs(seen[:-1])[-len(item.target) :]
        expected = sum(float(row[token]) for row, token in zip(logprobs, item.target, strict=True))
        assert score.logprob == pytest.approx(expected, abs=2e-5 * len(item.target))
        assert score.is_greedy == all(int(o.argmax()) == t for o, t in zip(logprobs, item.target, strict=True))
        assert score.is_cut == (len(seen) < len(row))
        greedy.append(score.is_greedy)
    assert {True, False} == set(greedy[-6:])
    assert {True, False} == {score.is_cut for score in model.score(items)}


def test_targets_that_cannot_be_scored(trained: TrainedModel) -> None:
    model = Continuations(trained)
    with pytest.raises(ValueError, match="no token of its own"):
        model.score([Continuation([1], [])])
    with pytest.raises(ValueError, match=f"33 tokens; --seq-length of the run is {SEQ}"):
        model.score([Continuation([1], [1] * 33)])


def test_a_model_that_computes_no_numbers_is_not_scored(run: Path) -> None:
    trained = load_trained(run)
    model = Continuations(trained)
    with torch.no_grad():
        next(trained.model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="log-probabilities are not finite"):
        model.score([Continuation([1], [2])])
    with pytest.raises(ValueError, match="log-probabilities are not finite"):
        model.likeliest_next([[1]])


def test_contexts_and_continuations_are_cut_as_lm_eval_cuts_them() -> None:
    pairs = [(list(i.context), list(i.target)) for i in encode_pairs(Merging(), PAIRS)]
    x, y, space, line, c = map(ord, "xy \nc")
    assert pairs == [
        ([x], [y]),
        ([x], [space, space, y]),
        ([x], [line, space, y]),
        ([256], [y]),
        ([256], [space, y]),
        ([ord("a")], [c]),  # "abc" is two tokens, the first of them the context's
        ([0], [0]),
        ([256], [space, space, y]),
    ]


def test_contexts_start_as_documents_do(trained: TrainedModel, tmp_path: Path) -> None:
    """With a start-of-document token where those of the run have one: before the whole context, which it is alone
    where the text is empty."""
    plain, started = encode_pairs(Merging(), PAIRS), encode_pairs(Merging(), PAIRS, bos=300)
    for (context, _), one, other in zip(PAIRS, plain, started, strict=True):
        assert list(other.context) == [300, *(one.context if context.strip() else [])]
        assert other.target == one.target
    vocabulary = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<s>": 2}, unk_token="a"))
    vocabulary.add_special_tokens(["</s>", "<s>"])
    vocabulary.save(str(tmp_path / "t.json"))
    for bos, expected in ((True, 2), (False, None)):
        data = replace(trained.config.data, tokenizer_model=str(tmp_path / "t.json"), bos=bos)
        with_tokens = replace(trained, config=replace(trained.config, data=data), tokenizer=make_tokenizer(data))
        assert with_tokens.bos == expected


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows))
    return path


class Dealt:
    """Gives out log-probabilities in order."""

    def __init__(self, logprobs: list[float], greedy: list[bool] | None = None) -> None:
        self._scores = [Score(x, g, False) for x, g in zip(logprobs, greedy or [False] * len(logprobs), strict=True)]

    def score(self, items: list[Any]) -> list[Score]:
        assert len(items) == len(self._scores)
        return self._scores


def test_measures_of_multiple_choice(tmp_path: Path) -> None:
    choices = ["no", "maybe", "éé€"]  # 2, 5, 3 characters; 2, 5, 7 bytes
    rows = [{"context": "", "choices": choices, "answer": answer} for answer in (0, 1, 2, 0, 1)]
    task = read_task(write(tmp_path / "t.jsonl", rows))
    # Highest: sum -4 (0); a character: -4/2, -5/5 (1), -6/3; a byte: -4/2, -5/5, -6/7 (2).
    model = Dealt([-4.0, -5.0, -6.0] * 5)
    result = score_task(task, [None] * 15, model)  # type: ignore[arg-type, list-item]
    for name, hits in (("acc", [1, 0, 0, 1, 0]), ("acc_norm", [0, 1, 0, 0, 1]), ("acc_bytes", [0, 0, 1, 0, 0])):
        assert result[name] == pytest.approx(statistics.mean(hits))
        assert result[f"{name}_stderr"] == pytest.approx(statistics.stdev(hits) / math.sqrt(5))
    assert result["answer_logprob"] == pytest.approx(statistics.mean([-4, -5, -6, -4, -5]))
    assert (result["kind"], result["items"], result["cut_contexts"]) == ("multiple_choice", 5, 0)


@pytest.mark.parametrize(
    ("row", "lengths"),
    [
        ({"choices": [" a", " bcd"]}, (1, 3)),  # lm-eval's default: a space between, which is not the choice's
        ({"choices": ["a", "bcd"], "target_delimiter": " "}, (1, 3)),
        ({"choices": ["\n a", "bcd"]}, (1, 3)),
        ({"choices": [" a", " bcd"], "target_delimiter": ""}, (2, 4)),  # as lm-eval with the space in its choices
        ({"choices": ["a", "bcd"], "target_delimiter": " -> "}, (1, 3)),
        ({"choices": [" ", " bcd"], "target_delimiter": "\n"}, (1, 4)),
        ({"choices": [" a b ", " bcd"]}, (4, 3)),
    ],
)
def test_what_delimits_a_choice_is_scored_and_not_counted(
    row: dict[str, Any], lengths: tuple[int, int], tmp_path: Path
) -> None:
    delimiter = row.get("target_delimiter", "")
    task = read_task(write(tmp_path / "t.jsonl", [{"context": "x", "answer": 0, **row}]))
    assert task.items[0].continuations == tuple(delimiter + choice for choice in row["choices"])
    for shift in (-1e-6, 1e-6):  # on either side of the sums that would be equal, measured by these lengths
        model = Dealt([float(-lengths[0]) + shift, float(-lengths[1])])
        result = score_task(task, [None] * 2, model)  # type: ignore[arg-type, list-item]
        assert result["acc_norm"] == result["acc_bytes"] == float(shift > 0)


def test_a_target_has_its_own_space(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"context": "a", "target": "b", "target_delimiter": " "}])
    with pytest.raises(ValueError, match=r"t.jsonl:1: target_delimiter: goes with choices"):
        read_task(path)


def test_measures_of_cloze(tmp_path: Path) -> None:
    rows = [{"context": "a", "target": "b"}] * 3
    task = read_task(write(tmp_path / "t.jsonl", rows))
    result = score_task(task, [None] * 3, Dealt([-1.0, -2.0, -6.0], [True, False, False]))  # type: ignore[arg-type, list-item]
    assert (result["acc"], result["target_logprob"]) == (pytest.approx(1 / 3), -3.0)
    assert result["target_logprob_stderr"] == pytest.approx(statistics.stdev([1, 2, 6]) / math.sqrt(3))
    single = score_task(read_task(write(tmp_path / "s.jsonl", rows[:1])), [None], Dealt([-1.0]))  # type: ignore[arg-type, list-item]
    assert single["acc_stderr"] is None


def test_a_task_through_the_command(run: Path, oracle: Oracle, tmp_path: Path) -> None:
    contexts = ["the sun ", "rain falls on the hills again and again and again", ""]
    choices = ["shines", "é", "falls"]
    rows = [{"context": context, "choices": choices, "answer": 2} for context in contexts]
    path = write(tmp_path / "t.jsonl", rows)
    words = ["--tasks", str(path), "--split", "none", "--json", str(tmp_path / "o.json")]
    assert main(["evaluate", "--run", str(run), *words]) == 0
    results = json.loads((tmp_path / "o.json").read_text())["tasks"][str(path)]
    best = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for context in contexts:
        sums = []
        for choice in choices:
            start = [*context.rstrip().encode()] or [256]
            row = [*start, *(context[len(context.rstrip()) :] + choice).encode()]
            seen = row[-(SEQ + 1) :]
            size = len(row) - len(start)
            last = oracle.logprobs(seen[:-1])[-size:]
            sums.append(sum(float(o[t]) for o, t in zip(last, row[-size:], strict=True)))
        for name, divisor in (("acc", lambda c: 1), ("acc_norm", len), ("acc_bytes", lambda c: len(c.encode()))):
            values = [x / divisor(c) for x, c in zip(sums, choices, strict=True)]
            best[name].append(values.index(max(values)) == 2)
    for name, hits in best.items():
        assert results[name] == pytest.approx(statistics.mean(hits))
    assert results["cut_contexts"] == 1
    assert "corpus" not in json.loads((tmp_path / "o.json").read_text())


GOOD = '{"context": "a", "choices": ["b", "c"], "answer": 0}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected an object with context and choices"),
        ('{"context": "a"}', "expected either choices and answer, or target"),
        ('{"context": "a", "target": "b"}', "a cloze item in a file of multiple_choice items"),
        ('{"choices": ["b", "c"], "answer": 0}', "context: expected a text, got null"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "a list of two or more"),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', "choice 1: is empty"),
        ('{"context": "a", "choices": ["b", 3], "answer": 0}', "choice 1: expected a text, got 3"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "answer 2: expected the number of a choice, 0 to 1"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "answer True"),
        ('{"context": "a", "choices": ["b", " "], "answer": 0}', "choice 1: is white space alone"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 0, "target_delimiter": 1}', "target_delimiter: expected"),
        ('{"context": "\\ud800", "choices": ["b", "c"], "answer": 0}', "half of a surrogate pair"),
        ("[" * 100000, "recursion"),
        ('{"context": "a", "choices": ["b", "' + "c" * 40 + '"], "answer": 0}', "a continuation of 40 tokens"),
    ],
)
def test_broken_lines_are_named(
    run: Path, tmp_path: Path, line: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    assert main(["evaluate", "--run", str(run), "--split", "none", "--tasks", str(path)]) == 2
    err = capsys.readouterr().err
    assert f"{path}:3: " in err
    assert reason in err
