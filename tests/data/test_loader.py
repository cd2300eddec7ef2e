"""Batches hold the rows that are computed token by token."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.data.corpus import loader as loader_module
from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource
from megatron_lfr.data.corpus.loader import Loader
from support.waiting import LIMIT

WriteCorpus = Callable[..., Path]
EOD = 9
SEQ = 8


@pytest.fixture
def source(write_corpus: WriteCorpus, rng: np.random.Generator) -> BlockSource:
    documents = [[*rng.integers(0, EOD, n).tolist(), EOD] for n in rng.integers(0, 12, 60)]
    return BlockDataset([write_corpus("c", documents)], SEQ, "1").train


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "megatron_lfr loader"]


@given(
    steps=st.lists(st.lists(st.integers(-1, 30), min_size=1, max_size=5), max_size=6),
    eod_mask_loss=st.booleans(),
    reset_position_ids=st.booleans(),
    reset_attention_mask=st.booleans(),
    prefetch=st.integers(1, 4),
)
def test_batches(
    source: BlockSource,
    steps: list[list[int]],
    eod_mask_loss: bool,
    reset_position_ids: bool,
    reset_attention_mask: bool,
    prefetch: int,
) -> None:
    loader = Loader(
        source,
        eod=EOD,
        eod_mask_loss=eod_mask_loss,
        reset_position_ids=reset_position_ids,
        reset_attention_mask=reset_attention_mask,
        prefetch=prefetch,
    )
    batches = list(loader.iterate((100 + i, np.array(ids)) for i, ids in enumerate(steps)))
    assert [batch.step for batch in batches] == [100 + i for i in range(len(steps))]
    for batch, ids in zip(batches, steps, strict=True):
        assert batch.block_ids.tolist() == ids
        assert batch.block_ids.dtype == np.int64
        tokens, labels, mask, positions, documents = [], [], [], [], []
        for block in ids:
            row = source.read([block])[0].tolist() if block >= 0 else [0] * (SEQ + 1)
            tokens.append(row[:-1])
            labels.append(row[1:])
            mask.append([float(block >= 0 and not (eod_mask_loss and token == EOD)) for token in row[:-1]])
            position, document = 0, 0
            for token in row[:-1]:
                positions.append(position)
                documents.append(document)
                position, document = (0, document + 1) if token == EOD else (position + 1, document)
        assert batch.tokens.tolist() == tokens
        assert batch.labels.tolist() == labels
        assert batch.loss_mask.tolist() == mask
        assert batch.valid_tokens == sum(map(sum, mask))
        assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (
            torch.int64,
            torch.int64,
            torch.float32,
        )
        for given_ids, asked, expected in (
            (batch.position_ids, reset_position_ids, positions),
            (batch.document_ids, reset_attention_mask, documents),
        ):
            if asked:
                assert given_ids is not None
                assert given_ids.flatten().tolist() == expected
            else:
                assert given_ids is None


def test_tensors_own_contiguous_memory(source: BlockSource) -> None:
    first, second = Loader(source).iterate([(0, np.array([0, 1])), (1, np.array([2, 3]))])
    before = first.labels.clone()
    second.tokens.fill_(0)
    assert torch.equal(first.labels, before)
    assert first.tokens.is_contiguous()
    assert first.labels.is_contiguous()


def test_ids_are_copied(source: BlockSource) -> None:
    """The curriculum may hand out views of one buffer."""
    buffer = np.array([0, 1])

    def steps() -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        for step in range(4):
            buffer[:] = 2 * step, 2 * step + 1
            yield step, buffer

    assert [batch.block_ids.tolist() for batch in Loader(source, prefetch=4).iterate(steps())] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_reads_ahead_by_prefetch_and_no_further(source: BlockSource, prefetch: int) -> None:
    drawn: list[int] = []
    reached = threading.Semaphore(0)

    def steps() -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        for step in range(10):
            drawn.append(step)
            reached.release()
            yield step, np.array([step])

    batches = Loader(source, prefetch=prefetch).iterate(steps())
    for consumed in range(1, 4):
        next(batches)
        while len(drawn) < consumed + prefetch:
            assert reached.acquire(timeout=LIMIT), "the loader does not read ahead"
        assert len(drawn) <= consumed + prefetch
    batches.close()
    assert len(drawn) == 3 + prefetch


def test_error_while_reading_comes_after_the_batches_before_it(source: BlockSource) -> None:
    batches = Loader(source).iterate([(0, [0]), (1, [1]), (2, [10_000]), (3, [2])])
    assert [next(batches).step, next(batches).step] == [0, 1]
    with pytest.raises(ValueError, match="block id 10000"):
        next(batches)
    assert loader_threads() == []


def test_error_of_the_steps_is_the_same_object(source: BlockSource) -> None:
    error = KeyError("from the curriculum")

    def steps() -> Iterator[tuple[int, list[int]]]:
        yield 0, [0]
        raise error

    batches = Loader(source).iterate(steps())
    next(batches)
    with pytest.raises(KeyError) as caught:
        next(batches)
    assert caught.value is error


def test_threads_stop(source: BlockSource) -> None:
    loader = Loader(source)
    endless = ((step, [step % 5]) for step in range(10**9))
    batches = loader.iterate(endless)
    next(batches)
    assert len(loader_threads()) == 1
    batches.close()
    assert loader_threads() == []

    for batch in loader.iterate(enumerate([[0], [1]])):
        assert batch.step < 2
    assert loader_threads() == []

    abandoned = loader.iterate((step, [0]) for step in range(10**9))
    next(abandoned)
    del abandoned
    gc.collect()
    assert loader_threads() == []

    loader.iterate(enumerate([[0]]))  # never started
    assert loader_threads() == []


def test_waiting_is_measured(source: BlockSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by one second whenever it is read: one second for each batch, one for the end."""
    ticks = itertools.count()
    monkeypatch.setattr(loader_module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    loader = Loader(source)
    list(loader.iterate(enumerate([[0], [1], [2]])))
    assert loader.wait_seconds == 4.0
    list(loader.iterate(enumerate([[0]])))
    assert loader.wait_seconds == 6.0


def test_options_without_an_end_of_document_token(source: BlockSource) -> None:
    for option in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
        with pytest.raises(ValueError, match="end-of-document"):
            Loader(source, **{option: True})
    with pytest.raises(ValueError, match="--prefetch 0"):
        Loader(source, prefetch=0)


def test_batches_for_a_gpu_are_pinned_where_they_are_read(source: BlockSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's thread pins every tensor of a batch; the values stay."""
    pinned: list[str] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(threading.current_thread().name)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    options = {"eod": EOD, "eod_mask_loss": True, "reset_position_ids": True, "reset_attention_mask": True}
    (plain,) = Loader(source, **options).iterate([(0, [0, 3, -1])])  # type: ignore[arg-type]
    assert not pinned
    (batch,) = Loader(source, pin_memory=True, **options).iterate([(0, [0, 3, -1])])  # type: ignore[arg-type]
    assert pinned == ["megatron_lfr loader"] * 5
    for name, value in vars(plain).items():
        other = getattr(batch, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else np.array_equal(value, other)
