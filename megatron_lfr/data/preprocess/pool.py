"""Turns chunks into token ids by several workers, in the order of the input."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager

from megatron_lfr import interrupt
from megatron_lfr.data.corpus.tokenizer import load_tokenizer
from megatron_lfr.data.preprocess.documents import Part
from megatron_lfr.data.preprocess.encoding import EncodedChunk, Encoder
from megatron_lfr.data.preprocess.inputs import Chunk

_MOST_THREADS = 4
"""Up to this number, workers are threads: they start at once and share the tokenizer's cache of words. The library
releases the GIL while it tokenizes, but about a twentieth of the work holds it; so more workers are processes."""

Encode = Callable[[list[Part]], EncodedChunk]


def encode_all(
    chunks: Iterator[Chunk], encoder: Encoder, tokenizer: str, eod_token: str | None, workers: int
) -> Iterator[tuple[Chunk, EncodedChunk]]:
    """Yield every chunk with its token ids. One worker is this thread. ChildProcessError if a worker process dies."""
    with _tokenizers_parallelism_off():
        if workers <= 1:
            for chunk in chunks:
                yield chunk, encoder.encode(chunk.parts)
            return
        pool, encode = _pool(encoder, tokenizer, eod_token, workers)
        try:
            yield from _in_order(pool, encode, chunks, in_flight=2 * workers + 1)
        except BrokenExecutor:
            raise ChildProcessError(
                "a worker process died, perhaps for lack of memory; fewer --workers need less of it"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pool(encoder: Encoder, tokenizer: str, eod_token: str | None, workers: int) -> tuple[Executor, Encode]:
    if workers <= _MOST_THREADS:
        return ThreadPoolExecutor(workers), encoder.encode
    import multiprocessing  # not at the top, for threads do not need it and it takes a while
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # now, since its start lets this process be interrupted again

    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, eod_token, encoder.without_tokenizer()),
    )
    return pool, _encode_in_worker


def _in_order(
    pool: Executor, encode: Encode, chunks: Iterator[Chunk], in_flight: int
) -> Iterator[tuple[Chunk, EncodedChunk]]:
    pending: deque[tuple[Chunk, Future[EncodedChunk]]] = deque()
    for chunk in chunks:
        with interrupt.not_inherited():  # workers start when they get work
            pending.append((chunk, pool.submit(encode, chunk.parts)))
        if len(pending) >= in_flight:
            done, future = pending.popleft()
            yield done, future.result()
    while pending:
        done, future = pending.popleft()
        yield done, future.result()


_worker_encode: Encode


def _start_worker(tokenizer: str, eod_token: str | None, make_encoder: Callable[..., Encoder]) -> None:
    global _worker_encode
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker_encode = make_encoder(load_tokenizer(tokenizer, eod_token)).encode


def _encode_in_worker(parts: list[Part]) -> EncodedChunk:
    return _worker_encode(parts)


def _die_with_parent() -> None:
    """Let this worker die with its parent: it would wait for work for ever."""
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _tokenizers_parallelism_off() -> Iterator[None]:
    """Let each worker tokenize in one thread, so that `workers` cores are in use. Processes inherit the setting."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
