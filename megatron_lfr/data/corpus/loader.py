"""Batches: the blocks of each step as tensors, read ahead by a background thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from megatron_lfr.data.corpus.blocks import PADDING, BlockSource

BlockIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One global step, and this data-parallel rank's share of its rows: B blocks of S tokens."""

    step: int
    block_ids: BlockIds
    """int64 [global batch]: those of the step, over all ranks; -1 marks a padded row."""
    rows: slice
    """This rank's part of `block_ids`."""
    tokens: torch.Tensor
    """int64 [B, S]."""
    labels: torch.Tensor
    """int64 [B, S]: the next token of each."""
    loss_mask: torch.Tensor
    """float32 [B, S]: 1 where the loss counts, 0 on padded rows, by the corpus' loss mask, and on end-of-document
    tokens if asked for."""
    position_ids: torch.Tensor | None
    """int64 [B, S], counted anew after each end-of-document token; None when positions are 0..S-1."""
    document_ids: torch.Tensor | None
    """int64 [B, S]: a token attends only to earlier tokens with the same id; None when it attends to all of them."""
    valid_tokens: int
    """Number of tokens of this rank's rows whose loss counts."""

    def pinned(self) -> Batch:
        """Return a copy in page-locked memory, which is transferred to a GPU while the host goes on."""
        return replace(
            self,
            tokens=self.tokens.pin_memory(),
            labels=self.labels.pin_memory(),
            loss_mask=self.loss_mask.pin_memory(),
            position_ids=None if self.position_ids is None else self.position_ids.pin_memory(),
            document_ids=None if self.document_ids is None else self.document_ids.pin_memory(),
        )


class Loader:
    """Turns lists of block ids into batches, in the order given, up to `prefetch` steps ahead.

    Data-parallel rank `rank` of `ranks` reads its contiguous share of each step. eod: the end-of-document token, which
    the three options about documents need. pin_memory: whether the thread that reads ahead copies batches to
    page-locked memory, for a GPU. wait_seconds: the total time that the consumer has waited for batches.
    """

    def __init__(
        self,
        source: BlockSource,
        *,
        eod: int | None = None,
        eod_mask_loss: bool = False,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        prefetch: int = 2,
        rank: int = 0,
        ranks: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if eod is None and (eod_mask_loss or reset_position_ids or reset_attention_mask):
            raise ValueError(
                "--eod-mask-loss, --reset-position-ids and --reset-attention-mask need the end-of-document token"
            )
        if prefetch < 1:
            raise ValueError(f"--prefetch {prefetch}: must be at least 1")
        self.source = source
        self.prefetch = prefetch
        self.wait_seconds = 0.0
        self._rank, self._ranks = rank, ranks
        self._pin_memory = pin_memory
        self._eod = eod
        self._eod_mask_loss = eod_mask_loss
        self._reset_position_ids = reset_position_ids
        self._reset_attention_mask = reset_attention_mask

    def iterate(self, steps: Iterable[tuple[int, npt.ArrayLike]]) -> Generator[Batch, None, None]:
        """Yield the batches of `steps`, given as (step, block ids [global batch]).

        An error while reading is raised here, after the batches before it. Closing the generator stops the thread.
        That thread iterates over `steps`, at most `prefetch` steps ahead of the consumer.
        """
        reader = _ReadAhead(self, steps)
        try:
            while True:
                started = time.perf_counter()
                batch = reader.next()
                self.wait_seconds += time.perf_counter() - started
                if batch is None:
                    return
                yield batch
        finally:
            reader.stop()

    def load(self, step: int, ids: npt.ArrayLike) -> Batch:
        """Read one batch now, in this thread. ValueError where its rows do not divide evenly over the ranks."""
        block_ids = np.array(ids, np.int64)
        if len(block_ids) % self._ranks:
            raise ValueError(f"{len(block_ids)} blocks of a step do not divide over {self._ranks} data-parallel ranks")
        share = len(block_ids) // self._ranks
        local = slice(self._rank * share, (self._rank + 1) * share)
        rows = self.source.read(block_ids[local])
        tokens = rows[:, :-1]
        trained = self.source.read_loss_mask(block_ids[local])
        loss_mask = np.ones(tokens.shape, np.float32) if trained is None else trained.astype(np.float32)
        loss_mask[block_ids[local] == PADDING] = 0
        position_ids = document_ids = None
        if self._eod is not None:
            is_eod = tokens == self._eod
            if self._eod_mask_loss:
                loss_mask[is_eod] = 0
            if self._reset_position_ids:
                position_ids = torch.from_numpy(positions_in_documents(is_eod))
            if self._reset_attention_mask:
                document_ids = torch.from_numpy(documents_in_row(is_eod))
        batch = Batch(
            step=step,
            block_ids=block_ids,
            rows=local,
            tokens=torch.from_numpy(np.ascontiguousarray(tokens)),
            labels=torch.from_numpy(np.ascontiguousarray(rows[:, 1:])),
            loss_mask=torch.from_numpy(loss_mask),
            position_ids=position_ids,
            document_ids=document_ids,
            valid_tokens=int(np.count_nonzero(loss_mask)),
        )
        return batch.pinned() if self._pin_memory else batch


def check_vocabulary(batch: Batch, vocab_size: int) -> None:
    """Raise a ValueError for the first block with a token outside the model's vocabulary."""
    if int(batch.tokens.max()) >= vocab_size or int(batch.labels.max()) >= vocab_size:
        bad = batch.block_ids[batch.rows][((batch.tokens >= vocab_size) | (batch.labels >= vocab_size)).any(1).numpy()]
        raise ValueError(
            f"--data-path: block {bad[0]} holds a token id outside the model's vocabulary of {vocab_size}; was "
            "the corpus made with another tokenizer?"
        )


def documents_in_row(is_eod: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return how many documents of the row end before each token [B, S]. An end token belongs to its document."""
    return np.cumsum(is_eod, axis=1, dtype=np.int64) - is_eod


def positions_in_documents(is_eod: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the distance of each token from its document's first token in the row [B, S]."""
    position = np.arange(is_eod.shape[1], dtype=np.int64)
    starts = np.zeros(is_eod.shape, np.int64)
    starts[:, 1:] = np.where(is_eod[:, :-1], position[1:], 0)
    positions: npt.NDArray[np.int64] = position - np.maximum.accumulate(starts, axis=1)
    return positions


class _ReadAhead:
    """Loads batches into a queue in a thread, never more than `prefetch` ahead of the consumer."""

    def __init__(self, loader: Loader, steps: Iterable[tuple[int, npt.ArrayLike]]) -> None:
        self._loader = loader
        self._steps = steps
        self._done: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()
        self._slots = threading.Semaphore(loader.prefetch)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="megatron_lfr loader", daemon=True)
        self._thread.start()

    def next(self) -> Batch | None:
        """Return the next batch, None after the last."""
        item = self._done.get()
        self._slots.release()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """End the thread, at the latest after the batch that it is reading, and wait for it."""
        self._stopping = True
        self._slots.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            steps = iter(self._steps)
            while True:
                self._slots.acquire()
                if self._stopping:
                    return
                try:
                    step, ids = next(steps)
                except StopIteration:
                    break
                self._done.put(self._loader.load(step, ids))
        except BaseException as error:
            self._done.put(error)
        else:
            self._done.put(None)
