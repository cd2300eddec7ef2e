"""Draws what surrounds a plot: axes, grid, shaded phases, legend, and the figure around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lfr.report.markup import Content, Html, element, join
from megatron_lfr.report.scale import Scale, si_ticks, tick_labels

COLOURS = 8
"""Number of colours for series: classes s0 to s7 of report.css. Further series are grey (`other`)."""

SIZE = (540.0, 300.0)
"""Width and height of a plot, pixels; two of them fit side by side."""

LETTER = 6.6
"""Width of a letter in a label, pixels; labels are 12 pixels high."""


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the x axis: a phase."""

    start: float
    end: float
    kind: str
    label: str


@dataclass(frozen=True)
class Frame:
    """Size and margins of a plot, in pixels."""

    width: float
    height: float
    left: float = 58
    right: float = 16
    top: float = 24
    bottom: float = 44

    @property
    def x_range(self) -> tuple[float, float]:
        """Where the x axis begins and ends."""
        return self.left, self.width - self.right

    @property
    def y_range(self) -> tuple[float, float]:
        """Where the y axis begins and ends: the bottom comes first, as values grow upwards."""
        return self.height - self.bottom, self.top


def colour(index: int | None) -> str:
    """Return the class of a series' colour."""
    return f"s{index}" if index is not None and index < COLOURS else "other"


def shorten(text: str, letters: int) -> str:
    """Return the text, or its beginning if it has more letters."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def label(x: float, y: float, text: str, kind: str = "label", anchor: str = "start") -> Html:
    """Draw text in a plot."""
    return element("text", text, x=round(x, 1), y=round(y, 1), class_=kind, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    """Draw a straight line."""
    return element("line", x1=round(x1, 1), y1=round(y1, 1), x2=round(x2, 1), y2=round(y2, 1), class_=kind)


def rectangle(x: float, y: float, width: float, height: float, kind: str, tip: str | None = None) -> Html:
    """Draw a filled rectangle; `tip` is shown while the pointer is on it."""
    sizes = {"x": round(x, 2), "y": round(y, 2), "width": round(max(width, 0.0), 2), "height": round(height, 2)}
    return element("rect", class_=kind, data_tip=tip, **sizes)


def y_axis(frame: Frame, scale: Scale, title: str, ticks: int = 5) -> Html:
    """Draw the grid lines, with numerals and the title on the left."""
    values = scale.ticks(ticks)
    parts: list[Content] = []
    for value, text in zip(values, tick_labels(values), strict=True):
        parts.append(line(frame.x_range[0], scale(value), frame.x_range[1], scale(value), "grid"))
        parts.append(label(frame.left - 8, scale(value) + 4, text, "tick", "end"))
    return join([element("g", *parts, class_="y-ticks"), label(0, frame.top - 10, title, "axis")])


def x_axis(frame: Frame, scale: Scale, title: str, ticks: int = 6) -> Html:
    """Draw the base line, with numerals and the title below. If numbers are large, the title says that they count
    thousands, millions, ..."""
    values = scale.ticks(ticks)
    texts, prefix = si_ticks(values)
    base = frame.y_range[0]
    axis = line(frame.x_range[0], base, frame.x_range[1], base, "base")
    parts: list[Content] = []
    for value, text in zip(values, texts, strict=True):
        parts.append(line(scale(value), base, scale(value), base + 4, "base"))
        parts.append(label(scale(value), base + 18, text, "tick", "middle"))
    counted = {"": "", "k": " (thousands)", "M": " (millions)", "G": " (billions)", "T": " (trillions)"}[prefix]
    name = label(frame.x_range[1], base + 36, title + counted, "axis", "end")
    return join([axis, element("g", *parts, class_="x-ticks"), name])


def bands(frame: Frame, scale: Scale, phases: Sequence[Band]) -> Html:
    """Draw phases as shaded stretches, named where there is room."""
    parts = []
    for band in phases:
        first, last = max(scale(band.start), frame.left), min(scale(band.end), frame.x_range[1])
        fitting = [text for text in (band.label, band.label.split(" ")[0]) if last - first > LETTER * len(text) + 4]
        shade = rectangle(first, frame.top, last - first, frame.y_range[0] - frame.top, f"band {band.kind}")
        name = label((first + last) / 2, frame.top + 13, fitting[0] if fitting else "", "band-name", "middle")
        span = f"{band.start:.10g} {band.end:.10g}"
        parts.append(element("g", shade, name, class_="phase", data_span=span, data_name=band.label))
    return join(parts)


def svg(frame: Frame, description: str, *children: Content, **attributes: Content) -> Html:
    """Make a plot of `frame`'s size; screen readers read out `description`."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {frame.width:g} {frame.height:g}",
        width=f"{frame.width:g}",
        height=f"{frame.height:g}",
        role="img",
        aria_label=description,
        **attributes,
    )


def figure(title: str, plot: Html, note: Content = None, table: Html | None = None, kind: str = "") -> Html:
    """Make a figure: a plot with its title, a note on how to read it, and its numbers in a table that folds out."""
    return element(
        "figure",
        element("figcaption", element("strong", title), element("span", note) if note is not None else None),
        element("div", plot, class_="scroll"),
        None if table is None else element("details", element("summary", "Numbers"), table),
        class_=kind or None,
    )


def legend(entries: Sequence[tuple[str, str]], of_lines: bool = False) -> Html:
    """Make a legend. entries: (class, name) of each colour. of_lines: a click on a name turns its lines on and off."""
    items = [element("li", element("i", class_=f"swatch {kind}"), name) for kind, name in entries]
    return element("ul", *items, class_="legend of-lines" if of_lines else "legend")
