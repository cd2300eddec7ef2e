"""What only a GPU can show of a training step: that its host does not wait, and what it reads afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megatron_lfr.data.corpus.loader import Batch
from megatron_lfr.engine import NativeEngine, build_stages, shard_stages
from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.model import ModelConfig
from megatron_lfr.parallel import initialize
from megatron_lfr.parallel.groups import shutdown

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS, LENGTH, VOCAB = 8, 64, 512


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
    mask = torch.ones(ROWS, LENGTH)
    ids = np.arange(ROWS)
    rows = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Batch(step, ids, slice(0, ROWS), *rows, mask, None, None, ROWS * LENGTH).pinned()


@pytest.fixture
def engine() -> Iterator[NativeEngine]:
    shutdown()
    config = ModelConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=VOCAB, max_position_embeddings=LENGTH
    )
    parallel = initialize()
    stages = shard_stages(build_stages(config, parallel, compute_dtype=torch.bfloat16), parallel, 1)
    yield NativeEngine(
        stages, OptimizerConfig(), parallel, seq_length=LENGTH, micro_batch_size=4, global_batch_size=ROWS
    )
    shutdown()


def test_the_host_waits_in_no_step(engine: NativeEngine) -> None:
    engine.train_step(make_batch(0), 1e-3).wait()
    batches = [make_batch(step) for step in (1, 2)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [engine.train_step(batch, 1e-3) for batch in batches]
        losses = [step.wait() for step in launched]
        engine.eval_step(batches[0]).wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, (nll_sum, token_count) in zip(launched, losses, strict=True):
        assert step.loss == pytest.approx(float(nll_sum.sum() / token_count.sum()), rel=1e-5)
        assert math.isfinite(step.grad_norm)
        assert not step.skipped


def test_a_step_is_skipped_where_it_is_computed(engine: NativeEngine) -> None:
    engine.train_step(make_batch(0), 1e-3).wait()
    before = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    batch = make_batch(1)
    batch.loss_mask[0, 0] = math.nan
    assert engine.train_step(batch, 1e-3).skipped
    for name, tensor in engine.tensors().items():
        assert torch.equal(tensor, before[name]), name
    assert not engine.train_step(make_batch(2), 1e-3).skipped
