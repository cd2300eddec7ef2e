"""The likelihood of one text after another. Texts become tokens as in lm-eval's causal models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lfr.data.corpus.tokenizer import Tokenizer
from megatron_lfr.evaluation.trained import TrainedModel


@dataclass(frozen=True)
class Continuation:
    """Tokens `target` whose likelihood after `context` is computed; the context has at least one token."""

    context: Sequence[int]
    target: Sequence[int]


@dataclass(frozen=True)
class Score:
    logprob: float
    """Log-probability of the target: the sum over its tokens (nats)."""
    is_greedy: bool
    """Whether greedy decoding gives the target, as each of its tokens is the likeliest."""
    is_cut: bool
    """Whether the context was too long and lost its beginning."""


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], bos: int | None = None) -> list[Continuation]:
    """Encode pairs of texts (context, continuation).

    White space at the end of a context belongs to the continuation. Both are encoded together, and split after as many
    tokens as the context alone has. Contexts start with `bos`, as the documents of training do. Where `bos` is None, an
    empty context becomes an end-of-document token; ValueError where the tokenizer has none.
    """
    start = [] if bos is None else [bos]
    contexts = [context.rstrip() for context, _ in pairs]
    joined = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    items = []
    for context, ids, joined_ids in zip(contexts, tokenizer.encode_batch(contexts), joined, strict=True):
        context_ids = ids if context else []
        items.append(Continuation([*start, *context_ids] or [tokenizer.eod], joined_ids[len(context_ids) :]))
    return items


def check_length(item: Continuation, max_length: int) -> None:
    """Raise ValueError for a target that has no token, or is too long to be predicted at once."""
    if not item.target:
        raise ValueError("the continuation has no token of its own after this context")
    if len(item.target) > max_length:
        raise ValueError(f"a continuation of {len(item.target)} tokens; --seq-length of the run is {max_length}")


class Continuations:
    """Scores and generates texts with a trained model, in batches.

    max_length: the most tokens that the model is given, its --seq-length, as it was trained on no position beyond.
    Longer contexts lose their beginning.
    """

    def __init__(self, trained: TrainedModel) -> None:
        self._trained = trained
        self.max_length = trained.config.data.seq_length
        self._batch_size = trained.config.training.micro_batch_size

    def score(self, items: Sequence[Continuation]) -> list[Score]:
        """Compute the likelihood of each item. Raises ValueError as `check_length` does, and where the model's
        log-probabilities are not finite."""
        for item in items:
            check_length(item, self.max_length)
        scores: dict[int, Score] = {}
        lengths = [len(item.context) + len(item.target) for item in items]
        for members in self._batches(lengths):
            batch = [items[i] for i in members]
            scores |= zip(members, self._score_batch(batch), strict=True)
        return [scores[i] for i in range(len(items))]

    def likeliest_next(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Return the token that greedy decoding appends to each prompt, which has at least one token."""
        tokens_after: dict[int, int] = {}
        for members in self._batches([len(prompt) for prompt in prompts]):
            rows = [prompts[i][-self.max_length :] for i in members]
            where = _marks([(len(row) - 1, len(row)) for row in rows])
            tokens = _padded(rows)
            _, likeliest = self._score_next(tokens, torch.zeros_like(tokens), where)
            tokens_after |= zip(members, likeliest.tolist(), strict=True)
        return [tokens_after[i] for i in range(len(prompts))]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield indices in groups of similar lengths, the longest first, so that lack of memory shows at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for first in range(0, len(order), self._batch_size):
            yield order[first : first + self._batch_size]

    def _score_next(self, tokens: Tensor, labels: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Call the model's score_next. Raises ValueError for log-probabilities that are not finite, as comparisons
        would silently choose among NaN."""
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
        matches = torch.split(likeliest == labels[where], sizes)
        return [
            Score(
                logprob=float(target_logprobs.double().sum()),
                is_greedy=bool(match.all()),
                is_cut=len(item.context) + len(item.target) > self.max_length + 1,
            )
            for item, target_logprobs, match in zip(batch, torch.split(logprobs, sizes), matches, strict=True)
        ]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Pad the rows to int64 [B, longest]. The padding at the end of a row has no effect, as attention is causal."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def _marks(spans: Sequence[tuple[int, int]]) -> Tensor:
    """Mark the positions from first to before last of each row: bool [B, longest]."""
    where = torch.zeros(len(spans), max(last for _, last in spans), dtype=torch.bool)
    for row, (first, last) in zip(where, spans, strict=True):
        row[first:last] = True
    return where
