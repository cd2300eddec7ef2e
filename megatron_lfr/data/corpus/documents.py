"""Checks that a corpus fits the tokenizer of a run, and the tokens that end and start documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from megatron_lfr.data.config import DataConfig
from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.data.corpus.sidecar import Sidecar, common_sidecar, tokenizer_name
from megatron_lfr.data.corpus.tokenizer import Tokenizer

_EXAMINED = 16
"""How many documents of each prefix are examined, evenly spread."""


def settle_documents(
    data: DataConfig, tokenizer: Tokenizer | None, vocab_size: int, datasets: Sequence[IndexedDataset]
) -> DataConfig:
    """Return the configuration with `bos` as the corpus has it. tokenizer: that of --tokenizer-model.

    ValueError names the flag where the sidecars show another tokenizer, vocabulary, end or start of documents than the
    configuration, or where, for --eod-mask-loss and the resets, the documents themselves do. For a corpus without
    sidecars, only its documents are examined.
    """
    sidecar, _ = common_sidecar(datasets, "--data-path")
    if tokenizer is None:
        if data.bos:
            raise ValueError("--bos: needs --tokenizer-model, which knows the start-of-document token")
        if sidecar is not None and sidecar.vocab_size > vocab_size:
            raise ValueError(
                f"--vocab-size {vocab_size}: the corpus was made with {sidecar.made_by}, of {sidecar.vocab_size} tokens"
            )
        return data
    if sidecar is not None:
        _check_tokenizer(tokenizer, sidecar)
        _check_marks(tokenizer, sidecar)
    flags = [name for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask") if getattr(data, name)]
    if flags:
        _check_documents_end(datasets, tokenizer, f"--{flags[0].replace('_', '-')}")
    bos = _starts(tokenizer, datasets) if sidecar is None else sidecar.bos is not None
    if data.bos and not bos:
        raise ValueError(
            "--bos: the documents of --data-path do not start with the start-of-document token; give --no-bos"
        )
    return dataclasses.replace(data, bos=bos)


def check_tokenizer(tokenizer: Tokenizer | None, datasets: Sequence[IndexedDataset]) -> None:
    """Raise a ValueError where a sidecar says that the corpus was made with another tokenizer."""
    sidecar, _ = common_sidecar(datasets, "--data-path")
    if tokenizer is not None and sidecar is not None:
        _check_tokenizer(tokenizer, sidecar)


def _check_tokenizer(tokenizer: Tokenizer, sidecar: Sidecar) -> None:
    if tokenizer.fingerprint != sidecar.fingerprint:
        raise ValueError(
            f"--tokenizer-model {tokenizer_name(tokenizer.name, tokenizer.fingerprint)}: the corpus was made with "
            f"{sidecar.made_by}. Give that one; where both give the same ids, remove the corpus' .meta files"
        )


def _check_marks(tokenizer: Tokenizer, sidecar: Sidecar) -> None:
    """Raise a ValueError where the documents of the corpus end or start with other tokens than the tokenizer's."""
    if sidecar.eod is not None and sidecar.eod != tokenizer.eod:
        made, ours = tokenizer.token(sidecar.eod), tokenizer.token(tokenizer.eod)
        raise ValueError(
            f"--eod-token {ours} (id {tokenizer.eod}): the documents of the corpus end with {made} (id {sidecar.eod}); "
            f"give --eod-token '{made}'"
        )
    if sidecar.bos is not None and sidecar.bos != tokenizer.bos(True):
        raise ValueError(
            f"--tokenizer-model {tokenizer.name}: starts documents with id {tokenizer.bos(True)}, but those of the "
            f"corpus start with id {sidecar.bos}"
        )


def _check_documents_end(datasets: Sequence[IndexedDataset], tokenizer: Tokenizer, flag: str) -> None:
    """Raise a ValueError for a prefix if no examined document of it ends with the end-of-document token."""
    for dataset in datasets:
        ends = _tokens_of(dataset, lambda first, last: last - 1)
        if ends and tokenizer.eod not in ends:
            ids = ", ".join(str(number) for number in sorted(set(ends))[:4])
            raise ValueError(
                f"{flag}: would do nothing: the documents of {dataset.prefix} do not end with {tokenizer.eod} "
                f"({tokenizer.token(tokenizer.eod)}); the last ids of some are {ids}. Preprocess with --append-eod, or "
                "name their end with --eod-token"
            )


def _starts(tokenizer: Tokenizer, datasets: Sequence[IndexedDataset]) -> bool:
    """Whether all examined documents start with the token that --bos would put there."""
    try:
        bos = tokenizer.bos(True)
    except ValueError:
        return False
    starts = [token for dataset in datasets for token in _tokens_of(dataset, lambda first, last: first)]
    return bool(starts) and set(starts) == {bos}


def _tokens_of(dataset: IndexedDataset, where: Callable[[int, int], int]) -> list[int]:
    """Return a token of each examined document that has any: the one at position `where(first, last)` of its tokens
    [first, last)."""
    count = dataset.num_documents
    numbers = sorted({i * (count - 1) // (_EXAMINED - 1) for i in range(_EXAMINED)}) if count else []
    bounds = [(dataset.document_offset(number), dataset.document_offset(number + 1)) for number in numbers]
    positions = np.array([where(first, last) for first, last in bounds if first < last], np.int64)
    tokens: list[int] = dataset.read(positions, 1)[:, 0].tolist()
    return tokens
