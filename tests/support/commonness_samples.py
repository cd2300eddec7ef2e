"""Makes text, copies of it and junk, as tokens: what commonness is to find."""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_lfr.commonness.copies import find_copies
from megatron_lfr.commonness.items import Prefix, reference_prefixes
from megatron_lfr.commonness.likelihood import count_ngrams, score
from megatron_lfr.commonness.trust import Trust, compare
from megatron_lfr.data.corpus.indexed import IndexedDataset

VOCAB_SIZE = 1024
TOKENS = 300
"""Of a document."""


@cache
def tokenizer() -> Tokenizer:
    """Return a byte-level BPE of Python's language reference."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator([topics[name] for name in sorted(topics)], trainer)
    return bpe


@cache
def documents() -> list[list[int]]:
    """Return documents of real text, TOKENS long, in a fixed order: Python's language reference, which help() shows."""
    chunks = []
    for name in sorted(topics):
        ids = tokenizer().encode(topics[name]).ids
        chunks += [ids[i : i + TOKENS] for i in range(0, len(ids) - TOKENS + 1, TOKENS)]
    random.Random(7).shuffle(chunks)
    return chunks


def edited(tokens: Sequence[int], share: float, rng: np.random.Generator) -> list[int]:
    """Return a copy in which a share of the tokens is replaced, removed or followed by another one, a third each."""
    edits = set(rng.choice(len(tokens), round(share * len(tokens)), replace=False).tolist())
    copy: list[int] = []
    for i, token in enumerate(tokens):
        kind = int(rng.integers(3)) if i in edits else -1
        if kind != 1:
            copy.append(token if kind != 0 else int(rng.integers(VOCAB_SIZE)))
        if kind == 2:
            copy.append(int(rng.integers(VOCAB_SIZE)))
    return copy


JUNK = ("base64", "hex", "digits", "shuffled")


def junk(kind: str, seed: int) -> list[int]:
    """Return a document that is no text, TOKENS long."""
    choose = random.Random(f"{kind} {seed}")
    if kind == "shuffled":
        ids = list(documents()[seed % len(documents())])
        choose.shuffle(ids)
        return ids
    raw = choose.randbytes(TOKENS * 6)
    digits = "".join(choose.choices("0123456789", k=TOKENS * 6))
    made = {"base64": base64.b64encode(raw).decode(), "hex": raw.hex(), "digits": digits}
    return tokenizer().encode(made[kind][: TOKENS * 6]).ids[:TOKENS]


def area_under_curve(low: np.ndarray, high: np.ndarray) -> float:  # type: ignore[type-arg]
    """Return the chance that one of `low` lies below one of `high`."""
    return float((low[:, None] < high[None]).mean() + (low[:, None] == high[None]).mean() / 2)


def write(prefix: Path, of_documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> str:
    """Write an indexed dataset; return its prefix."""
    from support.indexed_samples import write_by_hand

    return str(write_by_hand(prefix, of_documents, dtype))


def opened(prefix: Path, texts: list[list[int]]) -> list[Prefix]:
    """Return all documents of an indexed dataset that holds these."""
    return reference_prefixes([IndexedDataset(write(prefix, texts))])


def judged(folder: Path, corpus: list[list[int]], trusted: list[list[int]]) -> Trust:
    """Return what the trusted text says of the corpus."""
    prefixes, reference = opened(folder / "corpus", corpus), opened(folder / "trusted", trusted)
    model = count_ngrams(prefixes, 22, VOCAB_SIZE, 2)
    by_corpus, of_trusted = score(model, prefixes, True, 2), score(model, reference, False, 2)
    firsts = find_copies([prefix.documents() for prefix in prefixes], 4, 0.5, 2, folder / "signatures").firsts
    return compare(prefixes, firsts, by_corpus, reference, of_trusted, (22, VOCAB_SIZE, 2), "auto")
