"""The short table at the end of a run, read back from what the run wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_lfr.lfr import UNRECORDED, Journal
from megatron_lfr.training.callbacks import Callback
from megatron_lfr.training.trainer import Trainer


class Summary(Callback):
    """Prints, for each phase, what it trained on, what it left out, and the losses."""

    def __init__(self, run_folder: Path, journal: Journal) -> None:
        self.run_folder = run_folder
        self.journal = journal

    def on_end(self, trainer: Trainer) -> None:
        events = read_metrics(self.run_folder / "metrics.jsonl")
        console = Console(width=None if Console().is_terminal else 120)
        console.print(_phase_table(trainer, self.journal, events))
        if any(event["event"] == "evaluation" for event in events):
            console.print(_domain_table(events))
        cost = trainer.curriculum.cost
        console.print(
            f"Learn-Focus-Review itself took {cost.record + cost.order:.2f} s of this process "
            f"(recording {cost.record:.2f}, orders {cost.order:.2f}), rescoring {cost.rescore:.2f} s, "
            f"waiting for data {trainer.train_loader.wait_seconds:.2f} s.",
            highlight=False,
        )
        console.print(f"Where to look next, in {self.run_folder}:", highlight=False)
        for name, what in _PLACES.items():
            console.print(f"  {name:21s} {what}", highlight=False)


_PLACES = {
    "metrics.jsonl": "losses, gradient norms, times: one JSON object a line",
    "journal/phase_*.npy": "the loss of every block at every visit, in the order of training (numpy.load)",
    "checkpoints/": "weights and optimizer; the same command continues or repeats the run from here",
    "tensorboard/": "tensorboard --logdir on it",
    "config.yaml": "every setting of the run",
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a run."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _phase_table(trainer: Trainer, journal: Journal, events: list[dict[str, Any]]) -> Table:
    domains = trainer.train_source.domains
    table = Table(title="Phases", title_justify="left")
    for name in ("phase", "blocks", "distinct", "tokens", "train loss", "val. loss"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for domain in domains:
        table.add_column(f"left out:\n{domain}", justify="right")
    for start in (event for event in events if event["event"] == "phase"):
        index = start["phase"]
        recorded = journal.read(index)
        recorded = recorded[recorded != UNRECORDED]
        train_loss = math.fsum(recorded.tolist()) / len(recorded) if len(recorded) else float("nan")
        validation = last_evaluation(events, index)
        left_out = start.get("left_out_by_domain", {})
        table.add_row(
            f"{index} {start['kind']}",
            f"{len(recorded):,}",
            f"{start['distinct']:,}",
            f"{len(recorded) * trainer.plan.seq_length:,}",
            f"{train_loss:.4f}",
            "-" if validation is None else f"{validation['loss']:.4f}",
            *(f"{100 * left_out[d]:.0f} %" if d in left_out else "-" for d in domains),
        )
    return table


def _domain_table(events: list[dict[str, Any]]) -> Table:
    table = Table(title="Validation loss on held-out documents, after each phase", title_justify="left")
    table.add_column("after")
    starts = [event for event in events if event["event"] == "phase"]
    rows = [(start, last_evaluation(events, start["phase"])) for start in starts]
    names = next((list(row["domains"]) for _, row in rows if row), [])
    for name in ["all", *names]:
        table.add_column(name, justify="right")
    for start, row in rows:
        if row is not None:
            losses = [row["loss"], *(row["domains"][name] for name in names)]
            table.add_row(f"{start['phase']} {start['kind']}", *(f"{loss:.4f}" for loss in losses))
    return table


def last_evaluation(events: list[dict[str, Any]], phase: int) -> dict[str, Any] | None:
    """The evaluation at a phase's end; None where the corpus has no validation blocks."""
    return next((e for e in reversed(events) if e["event"] == "evaluation" and e["phase"] == phase), None)
