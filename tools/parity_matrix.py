"""Trains one run in every parallel layout, and says how far its losses, weights and orders are from one process.

    python tools/parity_matrix.py [--engine deepspeed] [--json OUT.json] [--only TP2,PP2] [--variants all|families]

Each layout trains a toy model through the whole product, on gloo and a CPU: 25 steps of Learn, Focus (a threshold on
recorded losses), Review, Focus (on rescored losses), Review. By default it is a Llama; --variants families trains one
of each other family, and one with dropout. The corpus is half easy, half hard, so that the losses on both sides of each
threshold are far apart. Ranks are started once for each number of them. With --engine deepspeed, the layouts are those
of DeepSpeed's stages, and the one process is the native engine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

from megatron_lfr.build import make_corpus
from megatron_lfr.config import parse_run_config
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.lfr import Curriculum, Journal, PlannedPhase
from megatron_lfr.lfr.journal import JournalReader
from megatron_lfr.parallel import shutdown
from megatron_lfr.planning import make_plan
from megatron_lfr.training.run import train

SEQ_LENGTH = 16
BLOCKS_PER_DOMAIN = 20
HEADS, GROUPS = 8, 4
SCHEDULE = [
    {"kind": "learn", "duration": 9, "unit": "steps"},
    {"kind": "focus", "duration": 2, "unit": "passes", "drop": 0.5},
    {"kind": "review", "duration": 1},
    {"kind": "focus", "duration": 1, "unit": "passes", "drop": 0.5, "score": "rescored"},
    {"kind": "review", "duration": 0.5},
]
TP, SP, PP, CP = (
    "--tensor-model-parallel-size",
    "--sequence-parallel",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
)
SHARDING, VIRTUAL = "--data-parallel-sharding-strategy", "--num-layers-per-virtual-pipeline-stage"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "TP2": (2, [TP, "2"]),
    "TP2 SP": (2, [TP, "2", SP]),
    "PP2 1f1b": (2, [PP, "2"]),
    "PP2 gpipe": (2, [PP, "2", "--pipeline-schedule", "gpipe"]),
    "PP2 interleaved": (2, [PP, "2", VIRTUAL, "1"]),
    "CP2": (2, [CP, "2"]),
    "DP2": (2, []),
    "DP2 optim": (2, [SHARDING, "optim"]),
    "DP2 optim_grads": (2, [SHARDING, "optim_grads"]),
    "DP2 optim_grads_params": (2, [SHARDING, "optim_grads_params"]),
    "TP4 SP": (4, [TP, "4", SP]),
    "PP4": (4, [PP, "4"]),
    "TP2 PP2": (4, [TP, "2", PP, "2"]),
    "TP2 PP2 SP": (4, [TP, "2", PP, "2", SP]),
    "TP2 CP2 SP": (4, [TP, "2", CP, "2", SP]),
    "TP2 DP2": (4, [TP, "2"]),
    "PP2 DP2": (4, [PP, "2"]),
    "PP2 CP2": (4, [PP, "2", CP, "2"]),
    "DP4 hybrid": (4, [SHARDING, "optim_grads_params", "--num-distributed-optimizer-instances", "2"]),
    "TP2 PP2 DP2": (8, [TP, "2", PP, "2"]),
    "TP2 PP2 DP2 SP optim": (8, [TP, "2", PP, "2", SP, "--use-distributed-optimizer"]),
}
"""Name → (ranks, flags)."""
FAMILIES: dict[str, list[str]] = {
    "gpt2": ["--model-preset", "gpt2"],
    "mistral, window": ["--model-preset", "mistral", "--sliding-window", "7"],
    "qwen2": ["--model-preset", "qwen2"],
    "qwen3": ["--model-preset", "qwen3"],
    # No norm comes before its first products: with embeddings as small as the others', rounding grows more.
    # Some of its first gradients are as small as AdamW's usual term, and their rounding would decide a step.
    "olmo2": ["--model-preset", "olmo2", "--init-method-std", "0.3", "--adam-eps", "1e-6"],
    "dropout": ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"],
}
VARIANTS: dict[str, list[str]] = {
    "tied": [],
    "untied": ["--untie-embeddings-and-output-weights"],
    "tied, full recomputation": ["--recompute-granularity", "full"],
    "untied, selective recomputation": [
        "--untie-embeddings-and-output-weights",
        "--recompute-granularity",
        "selective",
    ],
}
"""Name → flags."""
RESUMED: dict[str, tuple[int, list[str]]] = {
    "1": (1, []),
    "TP4": (4, [TP, "4"]),
    "PP4": (4, [PP, "4"]),
    "PP2 interleaved": (2, [PP, "2", VIRTUAL, "1"]),
    "DP4 optim_grads_params": (4, [SHARDING, "optim_grads_params"]),
    "TP2 DP2": (4, [TP, "2"]),
}


def _deepspeed_layouts() -> dict[str, tuple[int, list[str], str, dict[str, Any]]]:
    """Name → (ranks, flags, variant, zero_optimization)."""
    cpu = {"device": "cpu"}
    offload = {"offload_optimizer": cpu, "offload_param": cpu}
    tp, sp = [TP, "2"], [TP, "2", SP]
    full, selective = "tied, full recomputation", "untied, selective recomputation"
    rows: list[tuple[str, int, list[str], dict[str, tuple[int, ...]]]] = [
        ("DP2", 2, [], {"tied": (0, 1, 2, 3), "untied": (1, 3), full: (1, 2, 3), selective: (3,)}),
        ("DP2", 2, [], {"gpt2": (2, 3), "mistral, window": (1,), "qwen2": (0,), "qwen3": (3,), "dropout": (2, 3)}),
        ("TP2", 2, tp, {"tied": (0, 1, 2, 3)}),
        ("TP2 SP", 2, sp, {"tied": (0, 1, 3), full: (3,)}),
        ("CP2", 2, [CP, "2"], {"tied": (1, 3)}),
        ("TP2 DP2", 4, tp, {"tied": (1, 2, 3), "olmo2": (2, 3)}),
        ("TP2 DP2 SP", 4, sp, {"tied": (1, 2), full: (3,), "gpt2": (3,), "dropout": (2,)}),
    ]
    layouts = {
        f"{name}, ZeRO-{stage} ({variant})": (ranks, flags, variant, {"stage": stage})
        for name, ranks, flags, variants in rows
        for variant, stages in variants.items()
        for stage in stages
    }
    for stage in (1, 2, 3):
        zero = {"stage": stage, "offload_optimizer": cpu}
        layouts[f"DP2, ZeRO-{stage}, optimizer offloaded (tied)"] = (2, [], "tied", zero)
    layouts["DP2, ZeRO-3, all offloaded (tied)"] = (2, [], "tied", {"stage": 3, **offload})
    layouts["TP2 DP2, ZeRO-3, all offloaded (tied)"] = (4, tp, "tied", {"stage": 3, **offload})
    for name, flags in (("DP4", []), ("TP2 DP2", tp)):
        zero = {"stage": 3, "zero_hpz_partition_size": 2}
        layouts[f"{name}, ZeRO-3, hpZ of 2 (tied)"] = (4, flags, "tied", zero)
    return layouts


DEEPSPEED = _deepspeed_layouts()
SAVED_IN = (8, [TP, "2", PP, "2", "--exit-interval", "10"])
"""TP2 PP2 DP2, stopped inside the first Focus, which begins after 9 steps."""


@dataclass(frozen=True)
class Case:
    """One run: its name, which is also that of its folder, ranks, and flags."""

    name: str
    ranks: int
    flags: list[str]


def write_corpus(folder: Path) -> list[str]:
    """Write prefixes of two domains of BLOCKS_PER_DOMAIN blocks: one token again and again, and noise."""
    rng = np.random.default_rng(5)
    prefixes = []
    for domain in ("easy", "hard"):
        prefix = folder / f"{domain}_text_document"
        with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
            for i in range(4):
                length = BLOCKS_PER_DOMAIN * SEQ_LENGTH // 4 + (i == 3)
                writer.add_document(
                    (np.full(length, 7) if domain == "easy" else rng.integers(8, 61, length)).astype("u2")
                )
        prefixes.append(str(prefix))
    return prefixes


def run_flags(prefixes: list[str], folder: Path) -> list[str]:
    """Return the flags that all runs share."""
    schedule = yaml.safe_dump(SCHEDULE, default_flow_style=True, width=10**6).strip()
    return [
        *("--data-path", *prefixes, "--split", "100,0,0", "--seq-length", str(SEQ_LENGTH)),
        *("--vocab-size", "61", "--make-vocab-size-divisible-by", "8", "--max-position-embeddings", "16"),
        *("--num-layers", "6", "--hidden-size", "32", "--num-attention-heads", str(HEADS)),
        *("--num-query-groups", str(GROUPS)),
        *("--ffn-hidden-size", "48", "--init-method-std", "0.1"),
        *("--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "4e-3"),
        *("--lfr-schedule", schedule, "--log-interval", "1", "--save", str(folder)),
    ]


def run_cases(cases: Sequence[Case], folder: Path, prefixes: list[str]) -> None:
    """Run every case into `folder`/name, starting ranks once for each number of them; RuntimeError where one fails."""
    for world_size in sorted({case.ranks for case in cases}, reverse=True):
        mine = [case for case in cases if case.ranks == world_size]
        store = tempfile.mktemp(dir=folder)  # gloo's FileStore wants a name that does not exist
        mp.start_processes(
            _rank_main, (world_size, store, mine, str(folder), prefixes), nprocs=world_size, start_method="forkserver"
        )


def _rank_main(rank: int, world_size: int, store: str, cases: list[Case], folder: str, prefixes: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    files, timeout = dist.FileStore(store, world_size), timedelta(minutes=30)
    for case in cases:  # each with groups of its own: each that gloo has made keeps a thread that wakes up every 10 ms
        prefix = dist.PrefixStore(case.name, files)
        dist.init_process_group("gloo", store=prefix, rank=rank, world_size=world_size, timeout=timeout)
        run_here([case], Path(folder), prefixes)
        shutdown()


def run_here(cases: Sequence[Case], folder: Path, prefixes: list[str]) -> None:
    """Run every case into `folder`/name on the ranks of this process' group; without one, on this process alone."""
    for case in cases:
        config, _ = parse_run_config([*run_flags(prefixes, folder / case.name), *case.flags])
        with contextlib.redirect_stdout(io.StringIO()):
            train(config)


@dataclass(frozen=True)
class Run:
    """What a run left in its folder."""

    steps: npt.NDArray[np.float64]
    """[steps, 2]: loss and gradient norm."""
    journal: npt.NDArray[np.float32]
    """All block losses, in the order of training."""
    orders: list[str]
    """The phases' order hashes."""
    weights: dict[str, torch.Tensor]


def read_run(folder: Path) -> Run:
    """Read a finished run's metrics, journal and last checkpoint."""
    journal = np.concatenate([np.load(path) for path in sorted((folder / "journal").glob("phase_???.npy"))])
    last = int((folder / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    weights = read_weights(folder / f"checkpoints/iter_{last:07d}")
    orders = [event["order_hash"] for event in _events(folder) if event["event"] == "phase"]
    return Run(read_steps(folder), journal, orders, weights)


def read_steps(folder: Path) -> npt.NDArray[np.float64]:
    """Return the loss and gradient norm of each step so far, [steps, 2]."""
    return np.array([(e["last_loss"], e["grad_norm"]) for e in _events(folder) if e["event"] == "train"])


def _events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, put together from the shards of all ranks."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    weights = {name: torch.empty(entry.size) for name, entry in stored.items() if name.startswith("model.")}
    load(dict(weights), storage_reader=reader, no_dist=True)
    return weights


def compare(run: Run, reference: Run) -> dict[str, Any]:
    """Return the largest differences: absolute of losses, relative of gradient norms, L2 of the worst weight."""
    losses = np.abs(run.steps[:, 0] - reference.steps[:, 0])
    norms = np.abs(run.steps[:, 1] / reference.steps[:, 1] - 1)
    assert run.weights.keys() == reference.weights.keys()
    ours, theirs = _determined(run.weights), _determined(reference.weights)
    return {
        "loss": float(losses.max()),
        "growth": [float(losses[: n + 1].max()) for n in (0, 4, 9, 19)],
        "blocks": float(np.abs(run.journal - reference.journal).max()),
        "grad_norm": float(norms.max()),
        "weights": max(float((weight - theirs[name]).norm() / theirs[name].norm()) for name, weight in ours.items()),
        "same_orders": run.orders == reference.orders,
    }


def _determined(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights without the biases of keys where positions are learned: each moves all scores of a query
    alike, so that its gradient is rounding alone, and AdamW makes steps of that. Rotary positions turn them."""
    if "model.position_embedding.weight" not in weights:
        return weights
    return {
        name: weight.view(GROUPS, HEADS // GROUPS + 2, -1)[:, [*range(HEADS // GROUPS), -1]]
        if name.endswith("attention.qkv.bias")
        else weight
        for name, weight in weights.items()
    }


def threshold_gaps(folder: Path, prefixes: list[str], flags: list[str]) -> list[float]:
    """Return, for each Focus of a run, how far the hardest block that it dropped is from the easiest that it kept."""
    config, _ = parse_run_config([*run_flags(prefixes, folder), *flags])
    dataset = make_corpus(config.data)
    plan = make_plan(config, dataset.train.num_blocks)
    gaps: list[float] = []

    class Replay(Curriculum):
        def _begin(self, planned: PlannedPhase) -> None:
            super()._begin(planned)
            assert self.current is not None
            if self.current.selection is not None:
                dropped = self.current.selection.left_out(self.current.scores)
                gaps.append(float(self.current.scores[~dropped].min() - self.current.scores[dropped].max()))

    state = json.loads(next((folder / "checkpoints").glob("iter_*/state.json")).read_text())["curriculum"]
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder / "journal", copy, dirs_exist_ok=True)
        journal = Journal(Path(copy), JournalReader(Path(copy)).read_identity())
        Replay(plan, journal, config.training.seed, rescore=lambda ids: [ids.astype(np.float32)]).load_state_dict(state)
    return gaps


def resume_elsewhere(
    folder: Path,
    prefixes: list[str],
    layouts: dict[str, tuple[int, list[str]]],
    copy: Callable[[Path, Path], object] = shutil.copytree,
) -> None:
    """Continue the run in `folder`/saved in each of `layouts`, in folders of their own, which `copy` makes of it."""
    cases = [Case(f"resumed in {name}", *layout) for name, layout in layouts.items()]
    for case in cases:
        copy(folder / "saved", folder / case.name)
    run_cases(cases, folder, prefixes)


def _print_row(name: str, row: dict[str, Any]) -> None:
    growth = " ".join(f"{value:.0e}" for value in row["growth"])
    print(
        f"{name:56s} {row['loss']:.1e} ({growth})  {row['blocks']:.1e}  {row['grad_norm']:.1e}  "
        f"{row['weights']:.1e}  {'same' if row['same_orders'] else 'OTHER'}",
        flush=True,
    )


def deepspeed_cases(folder: Path, variants: Collection[str], only: Sequence[str] = ()) -> list[Case]:
    """Return the runs of DEEPSPEED of some variants, or those whose names begin with one of `only`, with their
    configurations in `folder`. Everything is sharded at stage 3, however small."""
    cases = []
    for number, (name, (ranks, flags, variant, zero)) in enumerate(DEEPSPEED.items()):
        if variant not in variants or (only and not name.startswith(tuple(only))):
            continue
        persistent = {"stage3_param_persistence_threshold": 0} if zero["stage"] == 3 else {}
        path = folder / f"deepspeed_{number}.json"
        path.write_text(json.dumps({"zero_optimization": {**zero, **persistent}}))
        more = (VARIANTS | FAMILIES)[variant]
        cases.append(Case(name, ranks, ["--deepspeed", "--deepspeed-config", str(path), *flags, *more]))
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["native", "deepspeed"], default="native")
    parser.add_argument(
        "--only", help="names of the layouts, separated by commas; of DeepSpeed's, how they begin, by ;"
    )
    parser.add_argument("--variants", choices=["all", "tied", "families"], default="all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    is_native = args.engine == "native"
    only = args.only.split("," if is_native else ";") if args.only else []
    layouts = {name: LAYOUTS[name] for name in only or LAYOUTS} if is_native else {}
    chosen = {"all": VARIANTS | FAMILIES, "tied": {"tied": []}, "families": FAMILIES}
    variants = chosen[args.variants]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prefixes = write_corpus(folder)
        references = [Case(variant, 1, flags) for variant, flags in variants.items()]
        cases = [
            Case(f"{name} ({variant})", ranks, [*flags, *more])
            for name, (ranks, flags) in layouts.items()
            for variant, more in variants.items()
        ]
        cases += [] if is_native else deepspeed_cases(folder, variants, only)
        saved = [Case("saved", *SAVED_IN)] if is_native and not only and "tied" in variants else []
        run_cases([*references, *cases, *saved], folder, prefixes)
        gaps = {name: threshold_gaps(folder / name, prefixes, flags) for name, flags in variants.items()}
        for name, some in gaps.items():
            print(f"gaps at the thresholds, {name}: {', '.join(f'{gap:.3f}' for gap in some)}")
        print(f"{'layout':56s} loss (in 1, 5, 10, 20 steps)          blocks   |grad|   weights  orders")
        for case in cases:
            variant = case.name.partition(" (")[2].removesuffix(")")
            results[case.name] = compare(read_run(folder / case.name), read_run(folder / variant))
            _print_row(case.name, results[case.name])
        if saved:
            resume_elsewhere(folder, prefixes, RESUMED)
            for name in RESUMED:
                run = read_run(folder / f"resumed in {name}")
                results[f"resumed in {name}"] = compare(run, read_run(folder / "tied"))
                _print_row(f"TP2 PP2 DP2 to step 10, then {name}", results[f"resumed in {name}"])
    if args.json:
        args.json.write_text(json.dumps({"gaps": gaps, "layouts": results}, indent=1) + "\n")
    held = all(
        row["loss"] <= 1e-5 and row["blocks"] <= 1e-5 and row["weights"] <= 1e-4 and row["same_orders"]
        for row in results.values()
    )
    print(
        "all within the bars: losses and blocks 1e-5, weights 1e-4, orders the same" if held else "NOT within the bars"
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
