"""Draws line plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lfr.report.frame import (
    LETTER,
    SIZE,
    Band,
    Frame,
    bands,
    colour,
    label,
    line,
    rectangle,
    shorten,
    svg,
    x_axis,
    y_axis,
)
from megatron_lfr.report.markup import Content, Html, element, join
from megatron_lfr.report.scale import Doubles, Scale, decimate, si_unit, spanning

_NAME_LETTERS = 20
_LABEL_HEIGHT = 14
_PHASE_NAMES = 14
"""Height of the names of the phases above the lines, pixels."""
_KEPT_POINTS = 2000
"""Number of points of a line that the page holds; it shows them all only when one zooms in."""


@dataclass(frozen=True)
class Series:
    """One line: values `ys` over ascending `xs`. `colour` is an index into the palette, or None for grey."""

    name: str
    xs: Doubles
    ys: Doubles
    colour: int | None
    markers: bool = False


def line_plot(
    series: Sequence[Series],
    description: str,
    x_title: str,
    y_title: str,
    phases: Sequence[Band] = (),
    size: tuple[float, float] = SIZE,
    y_scale: Callable[[float, float], Scale] | None = None,
    named: bool = True,
    last_x: float = 0.0,
) -> Html:
    """Draw lines over one x axis. Where there are more points than pixels, they are averaged, with their range shaded.

    y_scale: makes the y axis from the pixels of its bottom and top; by default, it spans all values. named: draw the
    names at the lines' ends. last_x: the smallest value at which the x axis may end. The script of the page zooms in,
    until it shows each of the _KEPT_POINTS of a line.
    """
    width, height = size
    room = LETTER * min(_NAME_LETTERS, max((len(one.name) for one in series), default=0)) + 14 if named else 16
    frame = Frame(width, height, right=room)
    drawn = [(one, *decimate(one.xs, one.ys, int(frame.x_range[1] - frame.x_range[0]) // 2)) for one in series]
    bottom, top = frame.y_range
    top += _PHASE_NAMES if phases else 0
    y = (
        y_scale(bottom, top)
        if y_scale
        else spanning(np.concatenate([[], *(mean for _, _, mean, _, _ in drawn)]), bottom, top)
    )
    ends = [last_x, *(band.end for band in phases), *(float(xs[-1]) for _, xs, *_ in drawn if len(xs))]
    x = Scale(0.0, max(ends) or 1.0, *frame.x_range)
    ticks = 5 if height > 250 else 4
    parts: list[Content] = [bands(frame, x, phases), y_axis(frame, y, y_title, ticks), x_axis(frame, x, x_title, 6)]
    names = _names(frame, y, [(one, mean) for one, _, mean, _, _ in drawn if len(mean)]) if named else {}
    for one, xs, mean, low, high in drawn:
        shade = _range(x, y, xs, low, high) if len(xs) < len(one.xs[np.isfinite(one.ys)]) else None
        parts.append(_group(one, [shade, _line(x, y, xs, mean, one), names.get(id(one))]))
    parts.append(rectangle(0, frame.top, 0, frame.y_range[0] - frame.top, "chosen"))
    parts.append(line(0, frame.top, 0, frame.y_range[0], "guide"))
    frame_data = f"{x.low:.10g} {x.high:.10g} {x.start:g} {x.end:g} {y.low:.10g} {y.high:.10g} {y.start:g} {y.end:g}"
    return svg(
        frame,
        description,
        *parts,
        class_="plot lines",
        data_frame=frame_data,
        data_base=f"{bottom:g}",
        data_ticks=ticks,
        data_unit=f"{si_unit(x.ticks(6))[0]:g}",
        data_x=x_title,
        tabindex=0,
    )


def _points(x: Scale, y: Scale, xs: Doubles, ys: Doubles) -> str:
    low, high = sorted((y.start, y.end))
    heights = np.clip(y.array(ys), low, high)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.array(xs).tolist(), heights.tolist(), strict=True))


def _range(x: Scale, y: Scale, xs: Doubles, low: Doubles, high: Doubles) -> Html:
    lower = _points(x, y, xs, low)
    upper = _points(x, y, xs[::-1], high[::-1])
    return element("polygon", points=f"{lower} {upper}", class_="range")


def _line(x: Scale, y: Scale, xs: Doubles, ys: Doubles, one: Series) -> Html:
    path = element("polyline", points=_points(x, y, xs, ys), class_="line")
    if not one.markers and len(xs) > 1:
        return path
    dots = [
        element("circle", cx=round(x(a), 1), cy=round(y(b), 1), r=3.5, class_="mark")
        for a, b in zip(xs.tolist(), ys.tolist(), strict=True)
    ]
    return join([path, *dots])


def _group(one: Series, parts: Sequence[Html | None]) -> Html:
    """Group the parts of a line, with the numbers that the script shows and zooms into."""
    xs, mean, low, high = decimate(one.xs, one.ys, _KEPT_POINTS)
    numbers = {"data_xs": _numerals(xs, 7), "data_ys": _numerals(mean, 5)}
    if mean is not low:
        numbers |= {"data_lows": _numerals(low, 5), "data_highs": _numerals(high, 5)}
    return element("g", *parts, class_=f"series {colour(one.colour)}", data_name=one.name, **numbers)


def _numerals(values: Doubles, digits: int) -> str:
    return " ".join(f"{value:.{digits}g}" for value in values.tolist())


def _names(frame: Frame, y: Scale, ends: Sequence[tuple[Series, Doubles]]) -> dict[int, Html]:
    """Draw the names at the lines' right ends, pushed apart where they would overlap; by the `id` of their series."""
    by_height = sorted(ends, key=lambda end: y(float(end[1][-1])))
    heights: list[float] = []
    for _, values in by_height:
        beside_line = y(float(values[-1])) + 4
        heights.append(max(beside_line, heights[-1] + _LABEL_HEIGHT) if heights else beside_line)
    beyond = max(0.0, heights[-1] - frame.y_range[0]) if heights else 0.0
    for i in range(len(heights) - 1, -1, -1):  # push back up the labels that would be below the axis
        limit = heights[i + 1] - _LABEL_HEIGHT if i + 1 < len(heights) else frame.y_range[0]
        heights[i] = min(heights[i], limit) if beyond else heights[i]
    return {
        id(one): label(frame.x_range[1] + 6, height, shorten(one.name, _NAME_LETTERS), "end")
        for height, (one, _) in zip(heights, by_height, strict=True)
    }
