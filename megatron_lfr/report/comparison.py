"""Section that compares several runs: validation loss at equal tokens, overall and by domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_lfr.analysis.metrics import domain_names, evaluations
from megatron_lfr.analysis.overview import RunView
from megatron_lfr.output import number
from megatron_lfr.report.bars import signed_bars
from megatron_lfr.report.frame import colour, figure, legend
from megatron_lfr.report.lines import Series, line_plot
from megatron_lfr.report.losses import LOSS, TOKENS, curve
from megatron_lfr.report.markup import Content, Html, element, join
from megatron_lfr.report.tables import NONE, table

_MOST_DOMAINS = 24
_SETTINGS_LEFT_OUT = ("save", "load", "tensorboard_dir", "wandb_exp_name", "lfr_scratch_dir", "print_config")


def comparison_section(views: Sequence[RunView]) -> Html:
    """Compare the runs with the first one at equal tokens."""
    evaluated = [evaluations(view) for view in views]
    domains = list(dict.fromkeys(name for rows in evaluated for name in domain_names(rows)))
    curves = {
        domain: [
            curve(view, rows, domain, i, view.name) for i, (view, rows) in enumerate(zip(views, evaluated, strict=True))
        ]
        for domain in [None, *domains]
    }
    key = legend([(colour(i), view.name) for i, view in enumerate(views)], of_lines=True)
    warnings = [element("p", text, class_="note warn") for text in _warnings(views, evaluated)]
    settings = element("details", element("summary", "Settings that differ"), _settings(views))
    if not all(len(one.xs) for one in curves[None]):
        return join([key, *warnings, settings])
    last = max(float(one.xs[-1]) for one in curves[None])
    plots = []
    for domain in domains[:_MOST_DOMAINS]:
        plot = line_plot(
            curves[domain], f"Validation loss on {domain}", TOKENS, LOSS, size=(370, 230), named=False, last_x=last
        )
        plots.append(figure(domain, plot))
    overall = line_plot(curves[None], "Validation loss of all runs", TOKENS, LOSS, named=False)
    return join(
        [
            key,
            *warnings,
            element(
                "div",
                figure("Validation loss, overall", overall),
                _at_equal_tokens(views, curves) if _one_corpus(views) else None,
                class_="pair",
            ),
            element("div", *plots, class_="trio"),
            settings,
        ]
    )


def _one_corpus(views: Sequence[RunView]) -> bool:
    return len({view.run.corpus for view in views}) == 1


def _warnings(views: Sequence[RunView], evaluated: Sequence[list[dict[str, Any]]]) -> list[str]:
    warnings = []
    if not _one_corpus(views):
        warnings.append(
            "These runs were trained on different corpora: differences between losses on different texts are not shown."
        )
    without = [view.name for view, rows in zip(views, evaluated, strict=True) if not rows]
    if without:
        warnings.append(f"No validation loss to compare in {', '.join(without)}.")
    return warnings


def _at_equal_tokens(views: Sequence[RunView], curves: dict[str | None, list[Series]]) -> Html:
    """Show all losses, as a table and as bars, at the number of tokens that every run has reached."""
    tokens = min(float(one.xs[-1]) for one in curves[None])
    losses = {domain: [loss_at(one, tokens) for one in series] for domain, series in curves.items()}
    differences = ["difference"] if len(views) == 2 else [f"difference, {view.name}" for view in views[1:]]
    head: list[Content] = ["", *(view.name for view in views), *differences]
    rows: list[list[Content]] = []
    for domain, by_run in losses.items():
        shown = [number(value, missing=NONE) + ("" if exact or np.isnan(value) else " ≈") for value, exact in by_run]
        rows.append([domain or "all", *shown, *(_signed(value - by_run[0][0]) for value, _ in by_run[1:])])
    bars = [
        (domain or "all", [(colour(i), value - by_run[0][0]) for i, (value, _) in enumerate(by_run) if i])
        for domain, by_run in losses.items()
    ]
    plot = signed_bars(
        bars, f"Difference in validation loss from {views[0].name}", f"loss − loss of {views[0].name} (nats a token)"
    )
    note = (
        f"At {tokens:,.0f} tokens, which every run has reached. Differences are from {views[0].name}, whose loss is "
        "lower where they are above zero."
    )
    if any(not exact for by_run in losses.values() for _, exact in by_run):
        note += " ≈: interpolated on the straight line between two evaluations."
    return figure("At equal tokens", join([table(head, rows), plot]), note)


def loss_at(one: Series, tokens: float) -> tuple[float, bool]:
    """Return the loss at a number of tokens, and whether it was evaluated there. Between two evaluations, it is
    interpolated; outside of them, it is NaN."""
    if not len(one.xs) or not one.xs[0] <= tokens <= one.xs[-1]:
        return float("nan"), False
    return float(np.interp(tokens, one.xs, one.ys)), bool((one.xs == tokens).any())


def _signed(value: float) -> str:
    return NONE if np.isnan(value) else f"{value:+.4f}".replace("-", "−")


def _settings(views: Sequence[RunView]) -> Html:
    keys = sorted({key for view in views for key in view.run.config} - set(_SETTINGS_LEFT_OUT))
    rows: list[list[Content]] = []
    for key in keys:
        values = [str(view.run.config.get(key, NONE)) for view in views]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if not rows:
        return element("p", "None in config.yaml.", class_="note")
    return table(["setting", *(view.name for view in views)], rows)
