"""`megatron-lfr inspect` shows the blocks, documents and text of a step, and how the loss of a block or domain went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from megatron_lfr.analysis.replay import open_run
from megatron_lfr.inspection.records import check_output, write_records
from megatron_lfr.inspection.views import View
from megatron_lfr.run_folder import open_corpus


@dataclass(frozen=True)
class InspectConfig:
    """Show the steps, blocks, documents and text of a run. It also works while the run trains, and changes nothing.

    Steps are counted from 1, as in metrics.jsonl. Losses are means over tokens in nats, before the step's update.
    """

    run: tyro.conf.Positional[Path]
    """The run folder (what --save was)."""
    step: int | None = None
    """Show the blocks of this step, the hardest first, with their loss at this step and at their previous visit."""
    spikes: bool = False
    """List the steps whose loss or gradient norm is far above a running median, and show the blocks of the worst."""
    block: int | None = None
    """Show every visit of this block, and its text."""
    hardest: int | None = None
    """Show this many of the hardest blocks: those whose last loss is furthest above the mean training loss of its time
    (raw losses would select the blocks that were seen early)."""
    easiest: int | None = None
    """Show this many of the easiest blocks: those whose last loss is furthest below the mean training loss of its
    time."""
    domain: str | None = None
    """Show the mean loss of a domain in each phase."""
    output: Path | None = None
    """Also write the records to this file, .npy (a structured array) or .json; with --hardest and --easiest, these are
    all visits of the blocks."""
    limit: int = 16
    """Largest number of blocks of a step, or of spikes, to show."""
    chars: int = 200
    """Number of characters of each block's text to show; 0 shows none and does not need the corpus."""
    deviations: float = 6.0
    """How far above the running median a step must be for --spikes, in (robust) standard deviations."""
    data_path: list[str] = field(default_factory=list)
    """Where the run's corpus is now, if it was moved: all its prefixes, in the run's order."""
    tokenizer_model: str | None = None
    """Where the run's tokenizer is now, if it was moved."""

    def validate(self) -> None:
        """Check the settings. ValueError names the flag and the legal values."""
        given = [
            f"--{name}" for name in _QUESTIONS if (value := getattr(self, name)) is not None and value is not False
        ]
        if len(given) != 1:
            legal = ", ".join(f"--{name}" for name in _QUESTIONS)
            raise ValueError(f"give one of {legal}" + (f", not {' and '.join(given)}" if given else ""))
        for name, least in (("step", 1), ("hardest", 1), ("easiest", 1), ("limit", 1), ("chars", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} {value}: must be at least {least}")
        if not 0 < self.deviations < float("inf"):
            raise ValueError(f"--deviations {self.deviations}: must be positive and finite")
        if self.domain is not None and self.chars == 0:
            raise ValueError("--domain: needs the corpus, which --chars 0 does not open")
        if self.output is not None:
            check_output(self.output)


_QUESTIONS = ("step", "spikes", "block", "hardest", "easiest", "domain")


def main(argv: Sequence[str]) -> int:
    """Run `megatron-lfr inspect`."""
    config = tyro.cli(InspectConfig, args=list(argv), prog="megatron-lfr inspect")
    config.validate()
    run = open_run(config.run)
    try:
        corpus = open_corpus(run.folder, config.data_path, config.tokenizer_model) if config.chars else None
    except (ValueError, OSError) as error:
        error.add_note("--chars 0 does not need the corpus")
        raise
    view = View(run, corpus, config.limit, config.chars)
    if config.step is not None:
        records = view.step(config.step)
    elif config.spikes:
        records = view.spikes(config.deviations)
    elif config.block is not None:
        records = view.block(config.block)
    elif config.domain is not None:
        records = view.domain(config.domain)
    else:
        records = view.extremes(config.hardest or config.easiest or 0, hardest=config.hardest is not None)
    if config.output is not None:
        write_records(config.output, records)
    return 0
