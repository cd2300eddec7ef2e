"""The report of a study: one HTML page, its tables as Markdown, and all figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lfr.fileio import write_atomic
from megatron_lfr.output import visible
from megatron_lfr.report.bars import Bar, stacked_bars
from megatron_lfr.report.document import document
from megatron_lfr.report.frame import LETTER, SIZE, Frame, colour, figure, label, legend, line, rectangle, svg, x_axis
from megatron_lfr.report.lines import Series, line_plot
from megatron_lfr.report.markup import Content, Html, element, join
from megatron_lfr.report.scale import spanning
from megatron_lfr.report.tables import table
from megatron_lfr.study.tables import Table, cell_tables, run_tables, signed, span

_ROW = 26.0


def write_report(summary: dict[str, Any], output: Path) -> Path:
    """Write report.html, report.md and report.json into `output`. Returns the path of the page."""
    write_atomic(output / "report.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_atomic(output / "report.md", make_markdown(summary))
    write_atomic(output / "report.html", make_page(summary))
    return output / "report.html"


def make_markdown(summary: dict[str, Any]) -> str:
    """Return the sentences and tables as Markdown."""
    parts = [f"# {visible(summary['title'])}\n", *(f"{sentence}\n" for sentence in sentences(summary))]
    parts += [f"{text}\n" for text in _facts(summary)]
    for cell in summary["cells"]:
        parts.append(f"## {_name(cell)}\n")
        parts += [part.markdown() for part in cell_tables(summary, cell)]
    parts += ["## All cells\n", *(part.markdown() for part in run_tables(summary))]
    return "\n".join(parts)


def make_page(summary: dict[str, Any]) -> str:
    """Return the report as one HTML file that needs no other."""
    links, sections = [("verdict", "What the figures support")], []
    verdict: list[Content] = [element("p", sentence) for sentence in sentences(summary)]
    facts: list[Content] = [element("p", text, class_="note") for text in _facts(summary)]
    sections.append(element("section", element("h2", links[0][1]), *verdict, *facts, id="verdict"))
    for number, cell in enumerate(summary["cells"]):
        links.append((f"cell{number}", _name(cell)))
        sections.append(element("section", element("h2", _name(cell)), _cell(summary, cell), id=f"cell{number}"))
    links.append(("all", "All cells"))
    sections.append(element("section", element("h2", "All cells"), *map(_table, run_tables(summary)), id="all"))
    body = join(
        [
            element("header", element("p", "Learn-Focus-Review"), element("h1", summary["title"]), class_="top"),
            element("nav", *(element("a", name, href=f"#{key}") for key, name in links), aria_label="Sections"),
            element("main", *sections),
            element("div", id="tip", role="status", hidden=""),
        ]
    )
    return document(f"{summary['title']}: a study of data selection", body)


def sentences(summary: dict[str, Any]) -> list[str]:
    """Return what the figures say of each cell, and what to do, where that is known."""
    to_do = [] if summary["to_do"] is None else [f"To do: {summary['to_do']}."]
    return [cell["verdict"]["sentence"] for cell in summary["cells"]] + to_do


def _facts(summary: dict[str, Any]) -> list[str]:
    done, open_ = summary["runs_done"], len(summary["open_runs"])
    facts = [f"{done} runs are done, {open_} are not. Code: {', '.join(summary['commits']) or 'unknown'}."]
    if rule := summary["candidate_rule"]:
        picked = summary["candidate"] or "none yet: not all of its runs are done"
        facts.append(
            f"Candidate: {picked}; the lowest held-out loss among {', '.join(rule['among'])} at seed "
            f"{', '.join(map(str, rule['seeds']))} on corpus {rule['corpus']}, size {rule['size']}, rate {rule['rate']}"
            ". These seeds are in no contrast."
        )
    return facts


def _name(cell: dict[str, Any]) -> str:
    return f"Corpus {cell['corpus']}, size {cell['size']}, rate {cell['rate']}"


def _cell(summary: dict[str, Any], cell: dict[str, Any]) -> Html:
    parts: list[Content] = [_contrast_figure(cell), _curve(summary, cell)]
    parts += [_phase_figure(cell, key, title) for key, title in _PHASES]
    return join([*parts, *map(_table, cell_tables(summary, cell))])


_PHASES = (("domains", "Samples of each phase by domain"), ("planted", "Tokens of each phase by planted kind"))


def _table(content: Table) -> Html:
    note = element("p", content.note, class_="note") if content.note else None
    return join([element("h3", content.title), note, table(content.head, content.rows)])


def _contrast_figure(cell: dict[str, Any]) -> Html | None:
    rows = cell["contrasts"]
    if not rows:
        return None
    note = (
        "Difference in held-out loss, nats a token. Thick: 95 % over seeds; thin: over documents. Left of 0 is better."
    )
    return figure("Contrasts", _intervals(rows), note)


def _intervals(rows: Sequence[dict[str, Any]]) -> Html:
    """Draw the difference of each contrast with its two intervals."""
    left = LETTER * max(len(row["name"]) for row in rows) + 16
    frame = Frame(SIZE[0] + left, _ROW * len(rows) + 56, left=left, top=6)
    ends = [row[key][end] for row in rows for key in ("by_seeds", "by_documents") for end in ("mean", "low", "high")]
    x = spanning([0.0, *(end for end in ends if end is not None)], *frame.x_range)
    drawn: list[Content] = [line(x(0), frame.top, x(0), frame.y_range[0], "base")]
    for number, row in enumerate(rows):
        y = frame.top + _ROW * (number + 0.5)
        drawn.append(label(left - 8, y + 4, row["name"], "tick", "end"))
        for key, height in (("by_documents", 2.0), ("by_seeds", 7.0)):
            low, high = row[key]["low"], row[key]["high"]
            if low is not None:
                tip = f"{row['name']}, {key.replace('_', ' ')}: {span(row[key])}"
                drawn.append(rectangle(x(low), y - height / 2, x(high) - x(low), height, f"part {colour(0)}", tip))
        mean = row["by_seeds"]["mean"]
        drawn.append(rectangle(x(mean) - 2, y - 8, 4, 16, f"part {colour(1)}", f"{row['name']}: {signed(mean)}"))
    description = "; ".join(f"{row['name']} {signed(row['by_seeds']['mean'])}" for row in rows)
    return svg(frame, description, x_axis(frame, x, "nats a token", 6), *drawn, class_="plot")


def _curve(summary: dict[str, Any], cell: dict[str, Any]) -> Html | None:
    """Draw the reference's loss over compute, and the other arms as points."""
    curves = [row for row in cell["curve"] if len(row["compute"]) > 1]
    if not curves:
        return None
    points = [row for row in curves if row["compute"] == curves[0]["compute"]]
    loss = np.mean([row["loss"] for row in points], axis=0)
    series = [Series(summary["reference"], np.array(curves[0]["compute"]), loss, 0, markers=True)]
    others = [arm for arm in cell["arms"] if arm["arm"] != summary["reference"] and arm["seeds"]]
    for number, arm in enumerate(others, 1):
        at, value = np.array([arm["compute"]["total"]]), np.array([arm["loss"]])
        series.append(Series(arm["arm"], at, value, number, markers=True))
    plot = line_plot(
        series, "Held-out loss over compute", "forward_backward tokens", "nats a token", size=(760.0, 340.0)
    )
    note = f"The line: {summary['reference']} at several budgets, each with a complete decay. Means over seeds."
    return figure("Loss over compute", plot, note)


def _phase_figure(cell: dict[str, Any], key: str, title: str) -> Html | None:
    phases = [(arm["arm"], phase) for arm in cell["arms"] for phase in arm["phases"] if phase[key]]
    names = list(dict.fromkeys(name for _, phase in phases for name in phase[key]))
    if not names:
        return None
    parts = [(colour(number), name) for number, name in enumerate(names)]
    bars = [Bar(f"{arm}: {phase['phase']}", [phase[key].get(name, 0.0) for name in names]) for arm, phase in phases]
    return figure(title, join([legend(parts), stacked_bars(bars, parts, title, 760.0)]))
