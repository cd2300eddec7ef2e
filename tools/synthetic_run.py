#!/usr/bin/env python3
"""Makes a run folder with a real journal and corpus, without training: the curriculum is given made-up losses.

For trying `megatron-lfr report` on many blocks:

    python tools/synthetic_run.py FOLDER --blocks 10000000
    megatron-lfr report FOLDER/run

Losses fall with every visit towards a level of the block's own, and rise again while it is not trained on.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from megatron_lfr.lfr import Curriculum, Journal, Plan, Schedule, preset
from megatron_lfr.lfr.identity import FORMAT, describe_segments
from megatron_lfr.lfr.start import PhaseStart

DOMAINS = {"web": (0.55, 3.2, 0.5), "code": (0.25, 2.1, 0.8), "books": (0.15, 3.6, 0.3), "lists": (0.05, 1.0, 0.4)}
"""Share of the corpus, mean and spread of the levels (nats)."""
SEQ_LENGTH = 16
SPLIT = "98,2,0"


def make_run(
    folder: Path, blocks: int, schedule: str | Schedule = "lfr", epochs: float = 3.0, batch: int = 4096
) -> Path:
    """Write `folder`/data and `folder`/run; about `blocks` blocks of SEQ_LENGTH tokens. Returns the run's folder."""
    rng = np.random.default_rng(7)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    prefixes = [folder / "data" / f"synthetic_{name}_text_document" for name in DOMAINS]
    for prefix, (share, _, _) in zip(prefixes, DOMAINS.values(), strict=True):
        _write_corpus(prefix, int(share * blocks), rng)
    dataset = BlockDataset(prefixes, SEQ_LENGTH, SPLIT)
    chosen = preset(schedule) if isinstance(schedule, str) else schedule
    plan = chosen.plan(dataset.train.num_blocks, SEQ_LENGTH, batch, train_epochs=epochs if chosen.in_shares else None)
    run = folder / "run"
    identity = {
        "format": FORMAT,
        "seed": 3,
        "seq_length": SEQ_LENGTH,
        "corpus": dataset.digests(),
        "segments": describe_segments(plan),
    }
    config = {
        "data_path": [str(prefix) for prefix in prefixes],
        "split": SPLIT,
        "seq_length": SEQ_LENGTH,
        "tokenizer_model": "bytes",
        "lfr_schedule": schedule if isinstance(schedule, str) else chosen.to_dicts(),
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    levels = _levels(dataset.train.domain_starts, rng)
    journal = Journal(run / "journal", identity)
    _drive(Curriculum(plan, journal, seed=3), levels, list(dataset.train.domain_starts), rng, run / "metrics.jsonl")
    journal.close()
    return run


def _write_corpus(prefix: Path, blocks: int, rng: np.random.Generator) -> None:
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        lengths = np.full(max(10, blocks // 64), 64 * SEQ_LENGTH, np.int64)
        for part in np.array_split(lengths, max(1, len(lengths) // 20_000)):
            writer.add_documents(rng.integers(32, 127, int(part.sum()), np.uint16), part)


def _levels(starts: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    parts = [
        rng.normal(mean, spread, last - first).clip(0.05)
        for (_, mean, spread), first, last in zip(DOMAINS.values(), starts, starts[1:], strict=False)
    ]
    return np.concatenate(parts).astype(np.float32)


def _drive(
    curriculum: Curriculum,
    levels: npt.NDArray[np.float32],
    starts: list[int],
    rng: np.random.Generator,
    metrics: Path,
) -> None:
    plan = curriculum.plan
    last_step = np.zeros(plan.n_blocks, np.float32)
    total = plan.total_steps
    samples = 0
    with metrics.open("w") as file:
        phase = -1
        for step, ids in curriculum.steps():
            assert curriculum.current is not None
            if curriculum.current.planned.index != phase:
                phase = curriculum.current.planned.index
                file.write(json.dumps(_phase_event(curriculum.current)) + "\n")
            real = ids[ids >= 0]
            away = (step - last_step[real]) / total
            loss = levels[real] + 5 * np.exp(-12 * step / total) + 0.8 * away * levels[real]
            loss = np.abs(loss + rng.normal(0, 0.05, len(real)))
            last_step[real] = step
            padded = np.zeros(len(ids))
            padded[: len(real)] = loss
            curriculum.record(step, padded, np.ones(len(ids)))
            samples += len(real)
            ends = step + 1 == curriculum.current.planned.end_step
            for event in _step_events(plan, step, phase, samples, loss, levels, starts, ends):
                file.write(json.dumps(event) + "\n")


def _phase_event(start: PhaseStart) -> dict[str, object]:
    return {
        "event": "phase",
        "step": start.planned.first_step,
        "phase": start.planned.index,
        "kind": start.kind,
        "order_hash": f"{start.order_hash:016x}",
        "time": _parts(start.planned.first_step, start.planned.index),
    }


def _parts(steps: int, phase: int) -> dict[str, object]:
    """Return the seconds of a process that has taken so many steps."""
    parts = {"training steps": 0.2482, "waiting for data": 0.001, "recording losses": 0.0008}
    return {"started": 0.0, "parts": {n: s * steps for n, s in parts.items()} | {"making orders": 0.5 * (1 + phase)}}


def _step_events(
    plan: Plan,
    step: int,
    phase: int,
    samples: int,
    loss: npt.NDArray[np.floating],
    levels: npt.NDArray[np.float32],
    starts: list[int],
    ends: bool,
) -> list[dict[str, object]]:
    head = {"step": step + 1, "phase": phase}
    times = {"step_ms": 250.0, "loader_wait_ms": 1.0, "lfr_record_ms": 0.8, **_parts(step + 1, phase)}
    events: list[dict[str, object]] = [
        {
            "event": "train",
            **head,
            "consumed_tokens": samples * plan.seq_length,
            "loss": float(loss.mean()),
            "time": times,
        }
    ]
    if ends:
        rest = 5 * np.exp(-12 * step / plan.total_steps)
        means = [float(levels[a:b].mean() + rest) for a, b in itertools.pairwise(starts)]
        domains = dict(zip(DOMAINS, means, strict=True))
        time = {"seconds": 12.0}
        events.append(
            {"event": "evaluation", **head, "loss": float(levels.mean() + rest), "domains": domains, "time": time}
        )
    return events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--schedule", default="lfr", help="name of the preset that is the schedule")
    parser.add_argument("--epochs", type=float, default=3.0, help="length of a schedule given in shares")
    args = parser.parse_args()
    print(make_run(args.folder, args.blocks, args.schedule, args.epochs))


if __name__ == "__main__":
    main()
