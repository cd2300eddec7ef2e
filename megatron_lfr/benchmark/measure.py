"""Runs a benchmark on the ranks that have been started, and puts what they found together."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_lfr.benchmark.collectives import describe, total_seconds
from megatron_lfr.benchmark.inputs import Inputs, complete, open_inputs
from megatron_lfr.benchmark.lfr_cost import lfr_cost, time_orders
from megatron_lfr.benchmark.options import Options
from megatron_lfr.benchmark.parts import seconds_of
from megatron_lfr.benchmark.result import Measured, make_result
from megatron_lfr.benchmark.steps import Steps
from megatron_lfr.build import make_curriculum, make_engine, make_loader
from megatron_lfr.config import RunConfig, deepspeed_settings, fill_batch
from megatron_lfr.data.corpus.loader import Loader
from megatron_lfr.engine import Engine
from megatron_lfr.engine.determinism import deterministic
from megatron_lfr.learning_rate import make_learning_rate
from megatron_lfr.lfr import Journal
from megatron_lfr.parallel import initialize, ranks, session
from megatron_lfr.parallel.launchers import adopt_launcher
from megatron_lfr.parallel.watch import watching
from megatron_lfr.training.evaluation import make_rescore
from megatron_lfr.training.metrics import peak_memory
from megatron_lfr.training.nodes import Nodes, find_nodes, share_orders
from megatron_lfr.training.stopping import Stopping
from megatron_lfr.training.times import Stopwatch
from megatron_lfr.training.upkeep import collecting_together


def measure(config: RunConfig, options: Options) -> dict[str, Any]:
    """Benchmark a configuration; returns what docs/benchmark.md describes, on every rank. Writes nothing that stays.

    ValueError or OSError before the first step, for what `train` would refuse.
    """
    world_size = adopt_launcher().world_size
    config = complete(fill_batch(config, world_size), options)
    config.validate(world_size)
    inputs = open_inputs(config, options, world_size)
    timeout = timedelta(minutes=config.training.distributed_timeout_minutes)
    with ExitStack() as stack:
        stack.enter_context(session())
        parallel = initialize(config.parallel, timeout)
        stack.enter_context(watching(timeout.total_seconds() / 2))
        stack.enter_context(deterministic(config.training.deterministic))
        nodes = find_nodes(parallel)
        scratch = stack.enter_context(_scratch(config, nodes))
        deepspeed = deepspeed_settings(config, world_size) if config.deepspeed.deepspeed else None
        engine = make_engine(config, inputs.model, inputs.plan, parallel, True, deepspeed)
        loader = make_loader(config, inputs.source, inputs.tokenizer, parallel)
        journal = Journal(scratch / "journal", {}) if nodes.is_leader else None
        rescore = make_rescore(engine, loader, Stopping(config.training, parallel.control_group), Stopwatch())
        curriculum = make_curriculum(config, inputs.plan, journal, share_orders(nodes, scratch), rescore, inputs.arrays)
        rate = make_learning_rate(config.optimizer, inputs.plan)
        collecting = stack.enter_context(collecting_together(config.training))
        steps = Steps(config, engine, loader, curriculum, rate, [collecting])
        try:
            measured = _measure(steps, engine, options, config.training.bf16)
        finally:
            steps.close()
        orders = []
        with ranks.failing_together(parallel.control_group):
            if ranks.rank() == 0:
                scratch_journal = Journal(scratch / "timing", {})
                orders = time_orders(inputs.plan, scratch_journal, config.training.seed, inputs.arrays)
        orders = ranks.from_first_rank(orders, parallel.control_group)
        measured.lfr = lfr_cost(
            inputs.plan,
            orders,
            measured.recording,
            measured.step["median"],
            total_seconds(measured.collectives, "losses"),
            _seconds_per_block(engine, loader, inputs),
        )
        return make_result(config, options, inputs, parallel, measured)


def _measure(steps: Steps, engine: Engine, options: Options, is_bf16: bool) -> Measured:
    parallel = engine.parallel
    if options.warmup:
        steps.train(options.warmup)
    if parallel.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(parallel.device)
    reports, seconds = steps.train(options.steps)
    memory = peak_memory(parallel.device)
    traced, parts = steps.trace(options.traced_steps)
    counter = steps.count_collectives()
    if parallel.device.type == "cuda":
        torch.cuda.empty_cache()  # what follows allocates tensors of other sizes
    local = {
        "host": adopt_launcher().node or "",
        "step_seconds": [report.seconds for report in reports],
        "wait_seconds": float(np.median([report.wait_seconds for report in reports])),
        "record_seconds": float(np.median([report.record_seconds for report in reports])),
        "traced_step_seconds": float(np.median([report.seconds for report in traced])),
        "parts": {name: float(np.median([one[name] for one in parts])) for name in parts[0]},
        "peak_memory_bytes": memory,
        "matmul_tflops": matmul_tflops(parallel.device, torch.bfloat16 if is_bf16 else torch.float32),
    }
    by_rank = ranks.gather(local, parallel.control_group)
    return Measured(by_rank, max(ranks.gather(seconds, parallel.control_group)), describe(counter, parallel))


def matmul_tflops(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Return the speed of this rank's device in 10^12 operations a second, of one matrix product, to find slow ones."""
    size = size or (8192 if device.type == "cuda" else 512)
    one: Tensor = torch.ones(size, size, dtype=dtype, device=device)
    seconds = [seconds_of(lambda: one @ one, device) for _ in range(12)]
    return 2 * size**3 / float(np.median(seconds[2:])) / 1e12


def _seconds_per_block(engine: Engine, loader: Loader, inputs: Inputs) -> float | None:
    """Return how long a rescoring takes for a block, over all ranks; None where no phase has one."""
    if not any(planned.phase.is_rescored for planned in inputs.plan.phases):
        return None
    rows, seconds = engine.eval_rows, []
    batch = loader.load(0, np.resize(np.arange(inputs.plan.n_blocks), rows))
    for _ in range(3):
        started = time.perf_counter()
        engine.eval_step(batch).wait()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)) / rows


@contextmanager
def _scratch(config: RunConfig, nodes: Nodes) -> Iterator[Path]:
    """Make a folder on each node that its ranks share, and remove it in the end."""
    with ExitStack() as stack:
        name = ""
        with ranks.failing_together(nodes.group):
            if nodes.is_leader:
                name = stack.enter_context(tempfile.TemporaryDirectory(dir=config.lfr.lfr_scratch_dir))
        names = ranks.gather((nodes.index, name), nodes.group)
        yield Path(next(path for index, path in names if index == nodes.index and path))
        ranks.gather(None, nodes.group)  # until no rank needs it
