"""How likely a model finds one text after another. Texts are cut into tokens as lm-eval's causal models do it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lfr.data.corpus.tokenizer import Tokenizer
from megatron_lfr.evaluation.trained import TrainedModel


@dataclass(frozen=True)
class Continuation:
    """Tokens whose likelihood is asked for, after those of `context`, of which there is at least one."""

    context: Sequence[int]
    target: Sequence[int]


@dataclass(frozen=True)
class Score:
    logprob: float
    """Of the whole target: the sum over its tokens (nats)."""
    is_greedy: bool
    """Whether greedy decoding gives the target: each of its tokens is the likeliest."""
    is_cut: bool
    """Whether the context was too long and lost its beginning."""


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], bos: int | None = None) -> list[Continuation]:
    """(context, continuation) texts as tokens.

    White space at a context's end belongs to the continuation. Both are encoded together and cut where the context
    alone ends. Contexts start with `bos`, as the documents of training do; where those start with no token, an empty
    context is an end-of-document token. ValueError where the tokenizer has none.
    """
    start = [] if bos is None else [bos]
    contexts = [context.rstrip() for context, _ in pairs]
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    found = []
    for context, ids, whole in zip(contexts, tokenizer.encode_batch(contexts), wholes, strict=True):
        own = ids if context else []
        found.append(Continuation([*start, *own] or [tokenizer.eod], whole[len(own) :]))
    return found


def check_length(item: Continuation, max_length: int) -> None:
    """ValueError for a target without a token, or too long to be predicted at once."""
    if not item.target:
        raise ValueError("the continuation has no token of its own after this context")
    if len(item.target) > max_length:
        raise ValueError(f"a continuation of {len(item.target)} tokens; --seq-length of the run is {max_length}")


class Continuations:
    """Scores and generates with a trained model, `batch_size` texts at a time.

    max_length: tokens that the model is given at most, its --seq-length, as it has seen no position beyond. Longer
    contexts lose their beginning.
    """

    def __init__(self, trained: TrainedModel) -> None:
        self._trained = trained
        self.max_length = trained.config.data.seq_length
        self._batch_size = trained.config.training.micro_batch_size

    def score(self, items: Sequence[Continuation]) -> list[Score]:
        """The likelihood of each. ValueError as `check_length` says, and where the model computes no numbers."""
        for item in items:
            check_length(item, self.max_length)
        scores: dict[int, Score] = {}
        lengths = [len(item.context) + len(item.target) for item in items]
        for members in self._batches(lengths):
            batch = [items[i] for i in members]
            scores |= zip(members, self._score_batch(batch), strict=True)
        return [scores[i] for i in range(len(items))]

    def likeliest_next(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The token that greedy decoding puts after each prompt of at least one token."""
        found: dict[int, int] = {}
        for members in self._batches([len(prompt) for prompt in prompts]):
            rows = [prompts[i][-self.max_length :] for i in members]
            where = _marks([(len(row) - 1, len(row)) for row in rows])
            tokens = _padded(rows)
            _, likeliest = self._score_next(tokens, torch.zeros_like(tokens), where)
            found |= zip(members, likeliest.tolist(), strict=True)
        return [found[i] for i in range(len(prompts))]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices in groups of like lengths, the longest first: what does not fit into memory fails at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for first in range(0, len(order), self._batch_size):
            yield order[first : first + self._batch_size]

    def _score_next(self, tokens: Tensor, labels: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """As the model's. ValueError where it gives NaN, of which a highest one would be taken nevertheless."""
        logprobs, likeliest = self._trained.score_next(tokens, labels, where)
        if not torch.isfinite(logprobs).all():
            raise ValueError("the model's log-probabilities are not finite: a diverged run cannot be compared on tasks")
        return logprobs, likeliest

    def _score_batch(self, batch: Sequence[Continuation]) -> list[Score]:
        rows = [[*item.context, *item.target][-(self.max_length + 1) :] for item in batch]
        where = _marks([(len(row) - 1 - len(item.target), len(row) - 1) for row, item in zip(rows, batch, strict=True)])
        labels = _padded([row[1:] for row in rows])
        logprobs, likeliest = self._score_next(_padded([row[:-1] for row in rows]), labels, where)
        sizes = [len(item.target) for item in batch]
        right = torch.split(likeliest == labels[where], sizes)
        return [
            Score(
                float(own.double().sum()), bool(hits.all()), len(item.context) + len(item.target) > self.max_length + 1
            )
            for item, own, hits in zip(batch, torch.split(logprobs, sizes), right, strict=True)
        ]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [B, longest]; what stands behind a row's end is never looked at, as attention is causal."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def _marks(spans: Sequence[tuple[int, int]]) -> Tensor:
    """bool [B, longest]: positions first to before last of each row."""
    where = torch.zeros(len(spans), max(last for _, last in spans), dtype=torch.bool)
    for row, (first, last) in zip(where, spans, strict=True):
        row[first:last] = True
    return where
