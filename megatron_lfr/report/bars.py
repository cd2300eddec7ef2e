"""Draws stacked horizontal bars, bars to both sides of zero, and distributions one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lfr.report.frame import LETTER, SIZE, Frame, label, line, rectangle, shorten, svg, x_axis
from megatron_lfr.report.markup import Content, Html, element
from megatron_lfr.report.scale import Doubles, Scale, percent, si

_NAME_LETTERS = 22
_BAR, _ROW = 20.0, 30.0
_RIDGE, _RIDGE_STEP = 74.0, 58.0


@dataclass(frozen=True)
class Bar:
    """One bar: its name and the size of each of its parts."""

    name: str
    parts: Sequence[float]


def stacked_bars(
    bars: Sequence[Bar], parts: Sequence[tuple[str, str]], description: str, width: float = SIZE[0]
) -> Html:
    """Draw each bar's parts as shares of their sum. parts: (class, name) of each part."""
    left = LETTER * min(_NAME_LETTERS, max((len(bar.name) for bar in bars), default=0)) + 16
    frame = Frame(width, _ROW * len(bars) + 40, left=left, top=4, bottom=36)
    x = Scale(0.0, 100.0, *frame.x_range)
    drawn: list[Content] = []
    for row, bar in enumerate(bars):
        top, total, before = frame.top + row * _ROW, sum(bar.parts), 0.0
        drawn.append(label(left - 8, top + _BAR - 5, shorten(bar.name, _NAME_LETTERS), "tick", "end"))
        for (kind, name), size in zip(parts, bar.parts, strict=True):
            if total and size:
                share = size / total
                tip = f"{bar.name}, {name}: {percent(share, 1)} ({si(size)})"
                start, stop = x(100 * before), x(100 * (before + share))
                drawn.append(rectangle(start, top, stop - start, _BAR, f"part {kind}", tip))
                if stop - start > 40:
                    drawn.append(label((start + stop) / 2, top + _BAR - 6, percent(share), f"inside {kind}", "middle"))
                before += share
        if not total:
            drawn.append(label(left + 6, top + _BAR - 5, "none", "tick"))
    return svg(frame, description, x_axis(frame, x, "%", 5), *drawn, class_="plot")


def ridges(
    rows: Sequence[tuple[str, Sequence[Doubles]]],
    edges: Doubles,
    kinds: Sequence[str],
    marks: Sequence[Sequence[tuple[float, str]]],
    description: str,
    x_title: str,
    width: float = 800,
) -> Html:
    """Draw distributions one below the other, over one x axis, all of equal area.

    rows: (name, counts [bins] of each part) of each distribution; parts are stacked. edges [bins + 1]: bounds of the
    bins. kinds: the parts' classes. marks: for each row, (value, tip) of ticks on its base line.
    """
    left = LETTER * max((len(name) for name, _ in rows), default=0) + 16
    frame = Frame(width, _RIDGE_STEP * (len(rows) - 1) + _RIDGE + 60, left=left, top=8)
    x = Scale(float(edges[0]), float(edges[-1]), *frame.x_range)
    steps = np.repeat(x.array(edges), 2)[1:-1]
    shares = [np.stack(parts) / max(1.0, float(np.sum(parts))) for _, parts in rows]
    highest = max((float(share.sum(axis=0).max()) for share in shares), default=0.0) or 1.0
    drawn: list[Content] = [line(x(tick), frame.top, x(tick), frame.y_range[0], "grid") for tick in x.ticks(8)]
    for row, ((name, _), share, ticks) in enumerate(zip(rows, shares, marks, strict=True)):
        base = frame.top + _RIDGE + row * _RIDGE_STEP
        heights = np.concatenate((np.zeros((1, share.shape[1])), np.cumsum(share, axis=0))) / highest * (_RIDGE - 8)
        for kind, low, high in zip(kinds, heights, heights[1:], strict=False):
            drawn.append(_step_area(steps, base - np.repeat(low, 2), base - np.repeat(high, 2), f"part {kind}"))
        drawn.append(line(frame.left, base, frame.x_range[1], base, "base"))
        drawn.append(label(left - 8, base - 3, name, "tick", "end"))
        for value, tip in ticks:
            drawn.append(rectangle(x(value) - 1, base - 5, 2, 10, "quantile", tip))
    return svg(frame, description, x_axis(frame, x, x_title, 8), *drawn, class_="plot")


def _step_area(xs: Doubles, low: Doubles, high: Doubles, kind: str) -> Html:
    upper = [f"{a:.1f},{b:.1f}" for a, b in zip(xs.tolist(), high.tolist(), strict=True)]
    lower = [f"{a:.1f},{b:.1f}" for a, b in zip(xs[::-1].tolist(), low[::-1].tolist(), strict=True)]
    return element("polygon", points=" ".join([*upper, *lower]), class_=kind)


def signed_bars(
    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], description: str, x_title: str, width: float = SIZE[0]
) -> Html:
    """Draw bars to both sides of zero. rows: (name, (class, value) of each bar); a NaN has no bar."""
    left = LETTER * min(_NAME_LETTERS, max((len(name) for name, _ in rows), default=0)) + 16
    thick = 16.0
    heights = [max(1, len(bars)) * thick + 10 for _, bars in rows]
    frame = Frame(width, sum(heights) + 48, left=left, top=4)
    values = [value for _, bars in rows for _, value in bars if np.isfinite(value)]
    reach = 1.5 * max((abs(value) for value in values), default=1.0) or 1.0
    x = Scale(-reach, reach, *frame.x_range)
    drawn: list[Content] = [line(x(0), frame.top, x(0), frame.y_range[0], "base")]
    top = frame.top + 4
    for (name, bars), height in zip(rows, heights, strict=True):
        drawn.append(label(left - 8, top + height / 2, shorten(name, _NAME_LETTERS), "tick", "end"))
        for i, (kind, value) in enumerate(bars):
            if np.isfinite(value):
                y, start, stop = top + i * thick, min(x(0), x(value)), max(x(0), x(value))
                text = f"{value:+.4f}".replace("-", "−")
                drawn.append(rectangle(start, y, stop - start, thick - 3, f"part {kind}", f"{name}: {text}"))
                beside = (stop + 5, "start") if value >= 0 else (start - 5, "end")
                drawn.append(label(beside[0], y + thick - 6, text, "tick", beside[1]))
        top += height
    return svg(frame, description, x_axis(frame, x, x_title, 6), *drawn, class_="plot")
