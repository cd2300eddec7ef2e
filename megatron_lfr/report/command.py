"""`megatron-lfr report` makes one HTML page of run folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_lfr.analysis.forgetting import MARGIN
from megatron_lfr.analysis.overview import RunView, view_run
from megatron_lfr.fileio import check_replaces, write_atomic
from megatron_lfr.report.document import BEGINS
from megatron_lfr.report.page import make_page
from megatron_lfr.report.summary import schedule_name


@dataclass(frozen=True)
class ReportConfig:
    """Show one or several runs on one HTML page that needs no network. The runs may still be training."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders (what --save of megatron-lfr train names). If there are several, the others are compared with the
    first one at equal tokens."""
    output: Path | None = None
    """Write the page to this file. By default, it is report.html in the first run's folder."""
    margin: float = MARGIN
    """A block's loss must change by more than this many nats per token to count as learned or forgotten."""

    def validate(self) -> None:
        """Check the settings. ValueError names the flag or folder and what is wrong."""
        if not self.runs:
            raise ValueError("give at least one run folder")
        if not 0 <= self.margin < float("inf"):
            raise ValueError(f"--margin {self.margin}: must be a number of nats, at least 0")
        for folder in self.runs:
            if not folder.is_dir():
                raise ValueError(f"{folder}: no such folder; give the folder that megatron-lfr train wrote (--save)")
        for i, folder in enumerate(self.runs):
            if folder.resolve() in [other.resolve() for other in self.runs[:i]]:
                raise ValueError(f"{folder}: given twice")
        check_replaces("--output", self.page, BEGINS)

    @property
    def page(self) -> Path:
        """The file that the page is written to."""
        return self.output or self.runs[0] / "report.html"


def write_report(config: ReportConfig) -> Path:
    """Write the page and return its path. ValueError or OSError names what is wrong with a run."""
    config.validate()
    names = run_names(config.runs)
    views = [view_run(folder, name, config.margin) for folder, name in zip(config.runs, names, strict=True)]
    page = make_page(_with_schedules(views))
    write_atomic(config.page, page)
    return config.page


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each folder: the last two parts of its path, or as many as tell the folders apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(2, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _with_schedules(views: list[RunView]) -> list[RunView]:
    """Add the schedules to the runs' names where they differ; returns the same views."""
    schedules = [schedule_name(view) for view in views]
    if len(set(schedules)) > 1:
        for view, schedule in zip(views, schedules, strict=True):
            view.name = f"{view.name} ({schedule})"
    return views
