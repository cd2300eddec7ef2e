"""The losses of many blocks, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from megatron_lfr.data.corpus.blocks import BlockDataset, BlockSource
from megatron_lfr.data.corpus.loader import Batch, Loader
from megatron_lfr.engine import BlockLosses
from megatron_lfr.training.evaluation import block_losses


@dataclass
class Engine:
    """A block's loss is its number; notes when a batch is launched and when its losses are read."""

    eval_rows: int
    vocab_size: int = 64
    events: list[tuple[str, int]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)

    def eval_step(self, batch: Batch) -> Pending:
        self.events.append(("launch", batch.step))
        self.ids.append(batch.block_ids.tolist())
        return Pending(self, batch)


@dataclass
class Pending:
    engine: Engine
    batch: Batch

    def wait(self) -> BlockLosses:
        self.engine.events.append(("read", self.batch.step))
        ids = self.batch.block_ids
        return np.stack((ids, np.where(ids >= 0, 16, 0))).astype(np.float32)


@pytest.fixture(scope="module")
def source(corpus: list[str]) -> BlockSource:
    return BlockDataset(corpus, 16, "90,10,0").train


@pytest.mark.parametrize("count", [1, 7, 8, 9, 50])
def test_every_block_once_and_the_last_batch_alone_is_padded(count: int, source: BlockSource) -> None:
    engine, ids = Engine(8), np.arange(100, 100 + count)
    batches = list(block_losses(engine, Loader(source), ids))
    assert [len(row) for row in engine.ids] == [8] * -(-count // 8)
    assert np.concatenate(engine.ids).tolist() == [*ids.tolist(), *[-1] * (-count % 8)]
    assert np.concatenate([np.arange(count)[part] for part, _ in batches]).tolist() == list(range(count))
    assert np.concatenate([losses[0] for _, losses in batches]).tolist() == ids.tolist()
    assert all((losses[1] == 16).all() for _, losses in batches)


def test_a_batch_computes_while_the_one_before_it_is_read(source: BlockSource) -> None:
    engine = Engine(4)
    assert len(list(block_losses(engine, Loader(source), np.arange(11)))) == 3
    assert engine.events == [
        ("launch", 0),
        ("launch", 1),
        ("read", 0),
        ("launch", 2),
        ("read", 1),
        ("read", 2),
    ]


def test_nothing_to_score(source: BlockSource) -> None:
    assert list(block_losses(Engine(4), Loader(source), np.empty(0, np.int64))) == []
