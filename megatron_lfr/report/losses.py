"""Section on training and validation loss."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_lfr.analysis.metrics import domain_losses, domain_names, evaluations
from megatron_lfr.analysis.overview import Counts, PhaseView, RunView
from megatron_lfr.output import is_number, number
from megatron_lfr.report.bars import Bar, stacked_bars
from megatron_lfr.report.domains import groups
from megatron_lfr.report.frame import SIZE, Band, colour, figure, legend
from megatron_lfr.report.lines import Series, line_plot
from megatron_lfr.report.markup import Html, element, join
from megatron_lfr.report.scale import Doubles, si, spanning
from megatron_lfr.report.tables import NONE, table
from megatron_lfr.report.versions import rate_figure

TOKENS, LOSS = "tokens trained on", "loss (nats a token)"
_TABLE_ROWS = 40


def losses_section(view: RunView) -> Html:
    """Show training loss, validation loss overall and by domain, what each phase trained on, and the learning rate."""
    if not view.visits.any():
        return element("p", "Nothing has been trained on yet.", class_="note")
    return element("div", _training(view), *_validation(view), _trained_on(view), rate_figure(view), class_="pair")


def _training(view: RunView) -> Html:
    xs = np.concatenate([_middles_of_steps(view, phase) for phase in view.phases])
    ys = np.concatenate([phase.step_losses for phase in view.phases])
    series = [Series("each step", xs, ys, None)]
    rows = [row for row in view.event_rows("train") if is_number(row.get("loss"))]
    if rows:
        steps = np.array([row["step"] for row in rows], np.int64)
        ends = np.array([view.tokens_at(step) for step in steps.tolist()], np.float64)
        middles = (ends + np.concatenate(([0.0], ends[:-1]))) / 2
        series.append(Series("mean between log lines", middles, np.array([row["loss"] for row in rows], np.float64), 0))
    high = _high_after_start(xs, ys)
    plot = line_plot(
        series,
        "Training loss over tokens",
        TOKENS,
        LOSS,
        phase_bands(view),
        named=False,
        y_scale=lambda start, end: spanning(np.minimum(ys, high), start, end),
    )
    note = "A Focus trains on hard blocks, so its training loss is higher; compare phases by the validation loss."
    if high < float("inf"):
        note += " The axis leaves out the peak of the first steps."
    key = legend([(colour(one.colour), one.name) for one in series], of_lines=True) if rows else None
    return figure("Training loss", join([key, plot]), note)


def phase_bands(view: RunView) -> list[Band]:
    """Return the phases that have begun, as stretches of tokens to shade."""
    starts = [view.tokens_at(phase.planned.first_step) for phase in view.phases]
    return [
        Band(start, start + phase.samples_so_far * view.seq_length, phase.kind, phase.name)
        for start, phase in zip(starts, view.phases, strict=True)
    ]


def _middles_of_steps(view: RunView, phase: PhaseView) -> Doubles:
    """Return how many tokens had been trained on in the middle of each step of a phase."""
    size = phase.planned.global_batch_size
    ends = np.minimum(np.arange(1, len(phase.step_losses) + 1) * size, phase.samples_so_far)
    middles = (ends + np.arange(len(ends)) * size) / 2
    return np.asarray(view.tokens_at(phase.planned.first_step) + middles * view.seq_length)


def _validation(view: RunView) -> list[Html]:
    rows = evaluations(view)
    if not rows:
        none = "This run has no validation loss: no evaluation yet, or no held-out documents."
        return [element("p", none, class_="note")]
    names = domain_names(rows)
    overall = line_plot(
        [curve(view, rows, None, 0)], "Validation loss over tokens", TOKENS, LOSS, phase_bands(view), named=False
    )
    held_out = rows[-1].get("tokens")
    note = f"On {si(float(held_out or 0))} held-out tokens." if is_number(held_out) else "On held-out documents."
    figures = [figure("Validation loss", overall, note, _validation_table(view, rows, names))]
    if len(names) > 1:
        series = [curve(view, rows, name, i) for i, name in enumerate(names)]
        by_domain = line_plot(series, "Validation loss by domain over tokens", TOKENS, LOSS, phase_bands(view))
        key = legend([(colour(one.colour), one.name) for one in series], of_lines=True)
        note = "Each domain is a prefix of the corpus."
        figures.append(figure("Validation loss by domain", join([key, by_domain]), note))
    return figures


def _validation_table(view: RunView, rows: list[dict[str, Any]], names: list[str]) -> Html:
    kept = rows[:: -(-len(rows) // _TABLE_ROWS)]
    shown = kept if kept[-1] is rows[-1] else [*kept, rows[-1]]
    return table(
        ["tokens", "in phase", "all", *names],
        [
            [
                f"{view.tokens_at(row['step']):,}",
                str(row.get("phase", "")),
                number(row.get("loss"), missing=NONE),
                *(number(domain_losses(row).get(name), missing=NONE) for name in names),
            ]
            for row in shown
        ],
    )


def _trained_on(view: RunView) -> Html | None:
    """Show the domains' shares of each phase's visits; None where there is only one domain."""
    if len(view.corpus.domains) < 2:
        return None
    grouped = groups(view.corpus)

    def bar(name: str, counts: Counts) -> Bar:
        return Bar(name, [int(counts[group.members].sum()) for group in grouped])

    bars = [bar("the corpus", np.diff(view.corpus.starts))]
    bars += [bar(phase.name, phase.visits_by_domain) for phase in view.phases]
    parts = [(f"part {group.kind}", group.name) for group in grouped]
    plot = stacked_bars(bars, parts, "Share of each domain in what each phase trained on", SIZE[0])
    note = "The domains' shares of the blocks of the corpus, and of those that each phase trained on."
    numbers = table(
        ["", *(group.name for group in grouped)],
        [[one.name, *(f"{int(size):,}" for size in one.parts)] for one in bars],
    )
    return figure("What each phase trained on", join([legend(parts), plot]), note, numbers)


def curve(
    view: RunView, rows: list[dict[str, Any]], domain: str | None, colour: int, name: str | None = None
) -> Series:
    """Return the validation loss over tokens, overall or of a domain."""
    values = [row["loss"] if domain is None else domain_losses(row).get(domain) for row in rows]
    known = [(view.tokens_at(row["step"]), value) for row, value in zip(rows, values, strict=True) if is_number(value)]
    xs, ys = (np.array([pair[i] for pair in known], np.float64) for i in (0, 1))
    return Series(name or domain or "all", xs, ys, colour, markers=len(xs) <= 40)


def _high_after_start(xs: Doubles, ys: Doubles) -> float:
    """Return where the axis may end: at the largest loss after the first 4 % of the tokens, if the steep fall before
    that would take much of the plot; infinity otherwise."""
    known = ys[np.isfinite(ys)]
    later = ys[(xs >= 0.04 * xs[-1]) & np.isfinite(ys)]
    if not len(later) or known.max() - later.max() < 0.2 * (later.max() - known.min()):
        return float("inf")
    return float(later.max())
