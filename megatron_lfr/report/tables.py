"""Makes HTML tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from megatron_lfr.report.markup import Content, Html, element

NONE = "–"
"""What is shown in place of a missing number."""


def table(head: Sequence[Content], rows: Sequence[Sequence[Content]], kind: str = "") -> Html:
    """Make a table whose first column names the rows."""
    columns = element("tr", *(element("th", name, scope="col") for name in head))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    content = element("table", element("thead", columns), element("tbody", *body), class_=kind or None)
    return element("div", content, class_="scroll")


def heat_table(
    names: Sequence[str],
    value: Callable[[int, int], float],
    text: Callable[[int, int], str],
    tip: Callable[[int, int], str],
) -> Html:
    """Make a square table in which each cell is shaded by its value, from 0 to 1."""
    head = element("tr", element("td", ""), *(element("th", name, scope="col") for name in names))
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j in range(len(names)):
            shade = value(i, j)
            kind = f"heat h{round(10 * min(1.0, max(0.0, shade)))}" if math.isfinite(shade) else "heat"
            cells.append(element("td", text(i, j), class_=kind, data_tip=tip(i, j)))
        rows.append(element("tr", element("th", name, scope="row"), *cells))
    content = element("table", element("thead", head), element("tbody", *rows), class_="heat-table")
    return element("div", content, class_="scroll")
