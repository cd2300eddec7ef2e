"""Section on the losses of all blocks at each phase boundary."""

from __future__ import annotations

import math

import numpy as np

from megatron_lfr.analysis.overview import BIN, Counts, PhaseView, RunView, quantile
from megatron_lfr.output import number
from megatron_lfr.report.bars import ridges
from megatron_lfr.report.domains import groups
from megatron_lfr.report.frame import figure, legend
from megatron_lfr.report.markup import Html, element, join
from megatron_lfr.report.scale import Doubles
from megatron_lfr.report.tables import NONE, table

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_DRAWN_BINS = 150
"""Largest number of bins that are drawn; fewer for few blocks, so that no noise is shown."""
_MOST_ROWS = 24
_TAIL = 0.0005
"""Share of the blocks that may be beyond each end of the x axis."""


def distribution_section(view: RunView) -> Html:
    """Show the distribution of the blocks' losses at the end of each phase, stacked by domain."""
    ended = [(phase, phase.losses) for phase in view.phases if phase.losses is not None and phase.losses.any()]
    if not ended:
        return element("p", "No phase has ended yet.", class_="note")
    shown = ended[-_MOST_ROWS:]
    grouped = groups(view.corpus)
    first, width, bins = _window([losses.sum(axis=0) for _, losses in shown])
    edges: Doubles = (first + width * np.arange(bins + 1)) * np.float64(BIN)
    rows = []
    for phase, losses in shown:
        parts = [losses[group.members].sum(axis=0) for group in grouped]
        rows.append((f"after {phase.name}", [_rebin(part, first, width, bins) for part in parts]))
    marks = [_marks(losses.sum(axis=0)) for _, losses in shown]
    plot = ridges(
        rows, edges, [group.kind for group in grouped], marks, "Distribution of block loss after each phase",
        "loss of a block when it was last trained on (nats a token)",
    )  # fmt: skip
    note = "Blocks by the loss recorded at their last visit; unseen blocks are left out. Ticks: 5, 25, 50, 75 and 95 %."
    colours = [(group.kind, group.name) for group in grouped] if len(grouped) > 1 else []
    plot = join([legend(colours) if colours else None, plot])
    return figure("Block losses at each phase boundary", plot, note, _numbers(view, shown), "mid")


def _numbers(view: RunView, shown: list[tuple[PhaseView, Counts]]) -> Html:
    domains = view.corpus.domains if len(view.corpus.domains) > 1 else []
    head = ["after", *(f"{100 * q:.0f} % below" for q in _QUANTILES), *(f"median {name}" for name in domains)]
    rows = []
    for phase, losses in shown:
        values = [quantile(losses.sum(axis=0), q) for q in _QUANTILES]
        medians = [quantile(part, 0.5) for part in losses] if domains else []
        rows.append([phase.name, *(number(value, 2, NONE) for value in [*values, *medians])])
    return table(head, rows)


def _marks(counts: Counts) -> list[tuple[float, str]]:
    values = [(q, quantile(counts, q)) for q in _QUANTILES]
    return [(value, f"{100 * q:.0f} % of the blocks are below {value:.2f}") for q, value in values]


def _window(histograms: list[Counts]) -> tuple[int, int, int]:
    """Return (first bin, bins to join into one, number of joined bins), which hold nearly all blocks of all rows."""
    first = min(int(np.searchsorted(np.cumsum(one), _TAIL * one.sum())) for one in histograms)
    last = max(int(np.searchsorted(np.cumsum(one), (1 - _TAIL) * one.sum())) for one in histograms)
    drawn = max(20, min(_DRAWN_BINS, round(1.5 * math.sqrt(histograms[-1].sum()))))
    width = -(-(last + 1 - first) // drawn)
    return first, width, -(-(last + 1 - first) // width)


def _rebin(counts: Counts, first: int, width: int, bins: int) -> Doubles:
    padded: Doubles = np.zeros(width * bins)
    part = counts[first : first + width * bins]
    padded[: len(part)] = part
    joined: Doubles = padded.reshape(bins, width).sum(axis=1)
    return joined
