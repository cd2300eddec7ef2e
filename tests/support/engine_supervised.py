"""Training on supervised records, whose prompts the loader masks, against the oracle."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.corpus.loader import Loader
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from support.engine_adapters import make_adapted
from support.engine_errors import Errors, block_error, merge, step_errors, weight_error
from support.engine_layouts import ADAMW, ADAPTERS, LENGTH, RATES, ROWS, SEED, TOY, Layout, make_engine
from support.engine_oracle import GlobalBatch, Oracle
from support.lora_oracle import LoRAOracle, random_b


def supervised(layout: Layout, adapters: bool = False) -> Errors:
    """Train and evaluate on blocks of records, of which the loader masks the prompts; one prompt fills a block, which
    is left out."""
    rng = np.random.default_rng(5)
    lengths = [(int(rng.integers(1, 20)), int(rng.integers(1, 9))) for _ in range(30)]
    lengths[4] = (3 * LENGTH, 1)
    records = [(rng.integers(0, 49, prompt + answer), [0] * prompt + [1] * (answer + 1)) for prompt, answer in lengths]
    flat = torch.tensor([token for tokens, _ in records for token in [*tokens.tolist(), 49]])
    mask = torch.tensor([float(counts) for _, counts in records for counts in counts])
    starts = [s for s in range(0, len(flat) - LENGTH, LENGTH) if mask[s + 1 : s + LENGTH + 1].any()]
    rows = [(flat[s : s + LENGTH], flat[s + 1 : s + LENGTH + 1], mask[s + 1 : s + LENGTH + 1]) for s in starts]
    with TemporaryDirectory() as folder, random_b():
        with IndexedDatasetWriter(Path(folder, "c"), np.uint16, masked=True) as writer:
            for tokens, counts in records:
                writer.add_document(np.append(tokens, 49), np.array(counts))
        source = BlockDataset([Path(folder, "c")], LENGTH, "1").train
        engine = make_adapted(layout, ADAPTERS, ADAMW) if adapters else make_engine(layout)
        oracle = LoRAOracle(TOY, SEED, ADAMW, ADAPTERS) if adapters else Oracle(TOY, SEED, ADAMW)
        parallel = engine.parallel
        loader = Loader(source, rank=parallel.data_rank, ranks=parallel.data_parallel_size)
        errors = {"other blocks": float(source.num_blocks != len(rows) or source.left_out == [0])}
        for step, lr in enumerate(RATES[:2]):
            ids = [*range(step * ROWS, (step + 1) * ROWS - 1), -1]
            tokens, labels, counted = (torch.stack([rows[i][part] for i in ids]) for part in range(3))
            counted[-1] = 0
            batch = GlobalBatch(tokens, labels, counted, ids, step=step)
            output = engine.train_step(loader.load(step, ids), lr)
            merge(errors, step_errors(output, oracle.step(batch, lr)))
            evaluated = engine.eval_step(loader.load(step, ids[: engine.eval_rows])).wait()
            expected = [values[: engine.eval_rows] for values in oracle.evaluate(batch)]
            nll, count = block_error(evaluated, expected[0], expected[1])
            merge(errors, {"eval": nll, "eval count": count})
    return errors | {"weights": weight_error(engine, oracle)}
