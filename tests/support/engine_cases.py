"""What the ranks of the engine's tests run: each case compares with the oracle and returns its errors by name."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lfr.engine.optimizer import OptimizerConfig
from megatron_lfr.parallel import shutdown
from support.engine_adapters import adapted, adapted_in_bf16
from support.engine_costs import host_waits, memory
from support.engine_errors import Errors
from support.engine_faults import not_finite, stop
from support.engine_layouts import DROPOUT, LAYOUTS, PARTLY, RITE, TOY, parallel_state
from support.engine_steps import bf16, clipping, compiled, dropped, evaluate, flex, follow, load, minimised, undisturbed
from support.engine_supervised import supervised
from support.waiting import LIMIT

Case = tuple[int, Callable[[], Errors]]


def _cases() -> dict[str, Case]:
    """Name → (ranks, case)."""
    cases: dict[str, Case] = {}

    def add(kind: str, name: str, case: Callable[..., Errors], *more: Any, **options: Any) -> None:
        layout = LAYOUTS[name]
        cases[f"{kind}: {name}"] = layout.ranks, lambda: case(layout, *more, **options)

    untied = dataclasses.replace(TOY, untie_embeddings_and_output_weights=True)
    for name in LAYOUTS:
        add("steps and evaluations", name, evaluate)
    for name in ("one rank, micro-batch 2", "DP2 optim_grads_params", "TP2 SP", "PP2 interleaved", "CP2"):
        add("steps with and without evaluations", name, undisturbed)
    # One layout for each way in which tokens, vocabulary and layers are spread, and two of several; how often gradients
    # are exchanged, and what is sharded, does not meet these options.
    for name in ("one rank, micro-batch 2", "DP2 optim_grads_params", "TP2", "TP2 SP", "PP2 1f1b", "CP2"):
        add("z-loss, smoothing and a cap", name, minimised)
    for name in ("PP2 interleaved", "TP2 PP2 SP", "DP2 CP2 optim"):
        add("z-loss, smoothing and a cap", name, minimised)
    for name in ("one rank, micro-batch 8", "DP2", "DP2 optim_grads_params", "TP2 SP", "PP2 1f1b", "TP2 PP2"):
        add("loading", name, load)
    add("steps with AdamW's defaults", "one rank, micro-batch 8", follow, adamw=OptimizerConfig())
    add("steps, untied", "PP2 1f1b", follow, config=untied)
    add("steps, untied", "TP2 SP", follow, config=untied)
    for name in ("one rank, micro-batch 2", "CP2", "PP2 1f1b", "PP2 interleaved", "TP2 SP", "DP2 CP2", "TP2 PP2 SP"):
        add("documents", name, follow, documents=True)
    for name in ("DP2 optim_grads_params", "CP2", "PP2 interleaved", "TP2 SP"):
        add("documents without a dense mask", name, flex)
    for name in (
        "one rank, micro-batch 2",
        "DP2 optim_grads_params, micro-batch 1",
        "TP2 SP",
        "PP2 interleaved",
        "CP2",
    ):
        add("dropout", name, dropped)
    for name in ("TP2 PP2 SP", "DP2 CP2 optim"):
        add("dropout", name, dropped)
    add("dropout, selective recomputation", "CP2", dropped, recompute_granularity="selective")
    add("dropout, full recomputation", "TP2 SP", dropped, recompute_granularity="full")
    add("dropout within documents", "one rank, micro-batch 2", follow, documents=True, dropout=DROPOUT)
    add("dropout within documents", "DP2 CP2", follow, documents=True, dropout=DROPOUT)
    add("a context-parallel rank's chunks in one", "CP2", flex, documents=False, recompute_granularity="selective")
    for name in ("DP2", "DP2 optim_grads_params", "TP2 SP", "CP2", "PP2 1f1b", "TP2 PP2", "DP2 CP2 optim"):
        last = LAYOUTS[name].ranks - 1
        add("NaN in a weight of the last rank", name, not_finite, last, "weight")
        add("stop", name, stop)
    add("NaN in a weight of the first rank", "PP2 1f1b", not_finite, 0, "weight")
    for name in ("DP2 optim", "PP2 DP2"):
        add("NaN in a mask", name, not_finite, LAYOUTS[name].ranks - 1, "mask")
    for name in ("DP2 optim", "TP2", "PP2 1f1b"):
        add("infinite gradient", name, not_finite, 1, "gradient")
    for name in ("one rank, micro-batch 8", "TP2 SP", "PP2 1f1b", "DP2 CP2 optim"):
        add("clipped at 0.05", name, clipping, 0.05)
    for name in ("one rank, micro-batch 8", "DP2 optim"):
        add("not clipped", name, clipping, 0.0)
    for name in ("DP2 optim", "TP2 SP"):
        add("bf16", name, bf16)
    for name in ("one rank, micro-batch 2", "DP2 optim_grads_params", "TP2 SP", "PP2 1f1b", "CP2"):
        add("waits of the host", name, host_waits)
    # Layouts in which a factor's gradient, or its optimizer's step, is put together in another way.
    for name in ("one rank, micro-batch 2", "DP2 optim", "DP2 optim_grads_params", "TP2 SP", "PP2 interleaved", "CP2"):
        add("adapters", name, adapted)
    for name in ("TP2 PP2 SP", "TP2 DP2 SP optim_grads_params"):
        add("adapters", name, adapted)
    for name in ("one rank, micro-batch 2", "DP2 optim_grads_params", "TP2 SP", "PP2 1f1b", "CP2"):
        add("adapters by LoRA-RITE", name, adapted, adamw=RITE)
    for name in ("TP2 PP2 SP", "TP2 DP2 SP optim_grads_params"):
        add("adapters by LoRA-RITE", name, adapted, adamw=RITE)
    for name in ("TP2 SP", "PP2 1f1b"):
        add("adapters of some modules, recomputed", name, adapted, lora=PARTLY, recompute_granularity="full")
    for name in ("one rank, micro-batch 2", "DP2", "DP2 optim_grads_params", "CP2", "TP2 PP2"):
        add("supervised", name, supervised)
    add("supervised, adapters", "TP2 PP2 SP", supervised, adapters=True)
    for name in ("DP2 optim_grads_params", "TP2 SP"):
        add("adapters in bf16", name, adapted_in_bf16)
    add("waits of the host, dropout", "TP2 SP", host_waits, dropout=DROPOUT)
    for name, share in (("DP2", 1.0), ("DP2 optim", 0.5), ("DP2 optim_grads_params", 0.5), ("DP4 in two copies", 0.5)):
        add("memory", name, memory, share)
    return cases


CASES = _cases()


COMPILED: dict[str, Case] = {
    "compiled: TP2 SP": (2, lambda: compiled(LAYOUTS["TP2 SP"], follow, "inductor", dropout=DROPOUT)),
    # What Inductor makes of a graph, the case before looks at, and it takes a minute of a C++ compiler.
    "compiled adapters: TP2 SP": (2, lambda: compiled(LAYOUTS["TP2 SP"], adapted, "aot_eager")),
}


def main(rank: int, ranks: int, folder: str, names: list[str]) -> None:
    """Run cases and write their errors into `folder`/rank.json."""
    torch.set_num_threads(1)
    store, cases, errors = dist.FileStore(f"{folder}/store", ranks), CASES | COMPILED, {}
    for layout, of_layout in itertools.groupby(sorted(names, key=_layout_of), _layout_of):
        prefix, timeout = dist.PrefixStore(layout, store), timedelta(seconds=LIMIT)
        dist.init_process_group("gloo", store=prefix, rank=rank, world_size=ranks, timeout=timeout)
        errors |= {name: cases[name][1]() for name in of_layout}
        parallel_state.cache_clear()
        shutdown()
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))


def _layout_of(name: str) -> str:
    return name.partition(": ")[2]
