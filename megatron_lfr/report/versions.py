"""Section on versions: a main path and its branches side by side. And the figure of a run's learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_lfr.analysis.metrics import domain_losses, domain_names, evaluations
from megatron_lfr.analysis.overview import RunView
from megatron_lfr.analysis.rates import Rates, rates
from megatron_lfr.output import number
from megatron_lfr.report.frame import colour, figure, legend
from megatron_lfr.report.lines import Series, line_plot
from megatron_lfr.report.markup import Content, Html, element, join
from megatron_lfr.report.scale import Doubles, spanning
from megatron_lfr.report.tables import NONE, table

_TOKENS, _RATE = "tokens trained on", "learning rate"


def has_versions(views: Sequence[RunView]) -> bool:
    """Return whether one of the runs is a branch."""
    return any(view.run.folder.parent is not None for view in views)


def versions_section(views: Sequence[RunView]) -> Html:
    """Show the learning rates of all runs, and the losses that each ended with, so far, by domain."""
    lines = [series for i, view in enumerate(views) for series in _lines(view, i, view.name)]
    key = legend([(colour(i), view.name) for i, view in enumerate(views)], of_lines=True)
    note = "A branch has its parent's steps up to where it leaves. Steps to come are drawn as they are planned."
    plot = figure("Learning rate", join([key, _plot(lines)]), note)
    return join([plot, figure("Versions side by side", _versions(views), "Losses of each run's last evaluation.")])


def rate_figure(view: RunView) -> Html | None:
    """Draw the learning rate of one run; None where none is recorded or planned."""
    try:
        lines = _lines(view, 0, "trained", "planned")
    except (ValueError, TypeError) as error:
        return element("p", "The learning rate cannot be shown: ", str(error), class_="note warn")
    return figure("Learning rate", _plot(lines)) if lines else None


def _lines(view: RunView, index: int, name: str, planned: str | None = None) -> list[Series]:
    """Return the lines of a run's learning rate over tokens. planned: the name of a line of its own for the steps to
    come, which are else a part of the first."""
    of_run = rates(view)
    if planned is None:
        steps = np.concatenate((of_run.trained_steps, of_run.planned_steps))
        return _line(view, name, steps, np.concatenate((of_run.trained, of_run.planned)), index)
    ahead = _from_last(of_run)
    return [
        *_line(view, name, of_run.trained_steps, of_run.trained, index),
        *_line(view, planned, ahead.planned_steps, ahead.planned, None),
    ]


def _from_last(of_run: Rates) -> Rates:
    """Return the rates with the last trained step among the planned ones, so that the lines meet."""
    if not len(of_run.planned_steps):
        return of_run
    steps = np.concatenate((of_run.trained_steps[-1:], of_run.planned_steps))
    return Rates(of_run.trained_steps, of_run.trained, steps, np.concatenate((of_run.trained[-1:], of_run.planned)))


def _line(view: RunView, name: str, steps: npt.NDArray[np.int64], ys: Doubles, index: int | None) -> list[Series]:
    xs = np.array([view.tokens_at(step) for step in steps.tolist()], np.float64)
    return [Series(name, xs, ys, index)] if len(steps) else []


def _plot(lines: Sequence[Series]) -> Html:
    ys = np.concatenate([np.empty(0), *(one.ys for one in lines)])
    return line_plot(
        lines,
        "Learning rate over tokens",
        _TOKENS,
        _RATE,
        named=False,
        y_scale=lambda start, end: spanning(ys, start, end, from_zero=True),
    )


def _versions(views: Sequence[RunView]) -> Html:
    evaluated = [evaluations(view) for view in views]
    domains = list(dict.fromkeys(name for rows in evaluated for name in domain_names(rows)))
    rows: list[list[Content]] = []
    for i, (view, of_run) in enumerate(zip(views, evaluated, strict=True)):
        parent, last = view.run.folder.parent, of_run[-1] if of_run else {}
        trained = rates(view)
        rows.append(
            [
                join([element("i", class_=f"swatch {colour(i)}"), view.name]),
                NONE if parent is None else f"step {parent.step:,} of {parent.folder}",
                NONE if parent is None or parent.version is None else str(parent.version),
                f"{last['step']:,}" if last else NONE,
                f"{trained.trained[-1]:.3g}" if len(trained.trained) else NONE,
                number(last.get("loss"), missing=NONE),
                *(number(domain_losses(last).get(name), missing=NONE) for name in domains),
            ]
        )
    return table(["run", "leaves at", "version", "evaluated at step", "last rate", "all", *domains], rows)
