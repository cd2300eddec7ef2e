"""Prints short tables at the end of a run, from what the run wrote."""

from __future__ import annotations

import math
from typing import Any

from megatron_lfr.lfr import UNRECORDED, Journal
from megatron_lfr.output import number, print_table
from megatron_lfr.run_folder import RunFolder
from megatron_lfr.training.callbacks import Callback, Training


class Summary(Callback):
    """Prints, for each phase, what it trained on, what it left out, and the losses."""

    def __init__(self, folder: RunFolder, journal: Journal) -> None:
        self.folder = folder
        self.journal = journal

    def on_train_end(self, trainer: Training) -> None:
        if not trainer.is_complete:
            return
        events = self.folder.events()
        _print_phases(trainer, self.journal, events)
        _print_domains(trainer, events)
        parts = trainer.times.totals()
        spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items() if seconds >= 0.005)
        print(f"{sum(parts.values()):.2f} s since training began in this process: {spent}.")
        print(f"Where to look next, in {self.folder.path}:")
        for name, what in _CONTENTS.items():
            print(f"  {name:21s} {what}")


_CONTENTS = {
    "metrics.jsonl": "losses, gradient norms, times: one JSON object a line",
    "journal/phase_*.npy": "the loss of every block at every visit, in the order of training (numpy.load)",
    "checkpoints/": "weights and optimizer; the same command continues or repeats the run from here",
    "tensorboard/": "tensorboard --logdir on it",
    "config.yaml": "every setting of the run",
}


def _print_phases(trainer: Training, journal: Journal, events: list[dict[str, Any]]) -> None:
    rows = []
    for start in (event for event in events if event["event"] == "phase"):
        recorded = journal.read(start["phase"])
        recorded = recorded[recorded != UNRECORDED]
        train_loss = math.fsum(recorded.tolist()) / len(recorded) if len(recorded) else float("nan")
        validation = last_evaluation(events, start["phase"])
        rows.append(
            [
                _phase(start),
                f"{len(recorded):,}",
                f"{start['distinct']:,}",
                f"{len(recorded) * trainer.plan.seq_length:,}",
                f"{train_loss:.4f}",
                "-" if validation is None else number(validation["loss"]),
            ]
        )
    print_table(["phase", "blocks", "distinct", "tokens", "train loss", "val. loss"], rows, "Phases")


def _print_domains(trainer: Training, events: list[dict[str, Any]]) -> None:
    """Print what Focus left out of each domain, and the domain's loss on held-out documents after each phase."""
    starts = [event for event in events if event["event"] == "phase"]
    focus = [start for start in starts if "left_out_by_domain" in start]
    if focus:
        shares = [[start["left_out_by_domain"].get(name) for start in focus] for name in trainer.train_source.domains]
        rows = [
            [name, *("-" if share is None else f"{100 * share:.0f} %" for share in by_phase)]
            for name, by_phase in zip(trainer.train_source.domains, shares, strict=True)
        ]
        print_table(["domain", *map(_phase, focus)], rows, "Left out by Focus")
    evaluated = [
        (start, evaluation) for start in starts if (evaluation := last_evaluation(events, start["phase"])) is not None
    ]
    if evaluated:
        names = list(dict.fromkeys(name for _, evaluation in evaluated for name in evaluation["domains"]))
        rows = [["all", *(number(evaluation["loss"]) for _, evaluation in evaluated)]]
        rows += [[name, *(number(evaluation["domains"].get(name)) for _, evaluation in evaluated)] for name in names]
        head = ["domain", *(f"after {_phase(start)}" for start, _ in evaluated)]
        print_table(head, rows, "Validation loss on held-out documents")


def _phase(start: dict[str, Any]) -> str:
    return f"{start['phase']} {start['kind']}"


def last_evaluation(events: list[dict[str, Any]], phase: int) -> dict[str, Any] | None:
    """Return the evaluation at a phase's end; None where the corpus has no validation blocks."""
    return next((e for e in reversed(events) if e["event"] == "evaluation" and e["phase"] == phase), None)
