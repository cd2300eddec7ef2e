"""Line plots."""

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
"""Pixels above the lines for the names of the phases."""
_KEPT_POINTS = 2000
"""Points of a line that the page holds, more than it shows before one zooms in."""


@dataclass(frozen=True)
class Series:
    """One line: values `ys` over `xs`, ascending. `colour` is its place in the palette, None for grey."""

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
    """Lines over one x axis. More points than pixels are averaged, with their range shaded behind.

    y_scale: given the pixels of the bottom and the top; by default spans all values. named: names at the lines' ends.
    last_x: where the x axis ends at the earliest. The script of the page zooms in, down to _KEPT_POINTS of each line.
    """
    width, height = size
    room = LETTER * min(_NAME_LETTERS, max((len(one.name) for one in series), default=0)) + 14 if named else 16
    frame = Frame(width, height, right=room)
    drawn = [(one, *decimate(one.xs, one.ys, int(frame.x_range[1] - frame.x_range[0]) // 2)) for one in series]
    bottom, top = frame.y_range
    top += _PHASE_NAMES if phases else 0
    y = y_scale(bottom, top) if y_scale else _spanning_all([mean for _, _, mean, _, _ in drawn], bottom, top)
    x = _x_scale([last_x, *(band.end for band in phases), *(float(xs[-1]) for _, xs, *_ in drawn if len(xs))], frame)
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


def _spanning_all(arrays: Sequence[Doubles], start: float, end: float) -> Scale:
    return spanning(np.concatenate(arrays) if arrays else np.empty(0), start, end)


def _x_scale(ends: Sequence[float], frame: Frame) -> Scale:
    return Scale(0.0, max(ends) or 1.0, *frame.x_range)


def _points(x: Scale, y: Scale, xs: Doubles, ys: Doubles) -> str:
    low, high = sorted((y.start, y.end))
    places = np.clip(y.array(ys), low, high)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.array(xs).tolist(), places.tolist(), strict=True))


def _range(x: Scale, y: Scale, xs: Doubles, low: Doubles, high: Doubles) -> Html:
    there = _points(x, y, xs, low)
    back = _points(x, y, xs[::-1], high[::-1])
    return element("polygon", points=f"{there} {back}", class_="range")


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
    """What belongs to a line, with the numbers that the script shows and zooms into."""
    xs, mean, low, high = decimate(one.xs, one.ys, _KEPT_POINTS)
    numbers = {"data_xs": _numerals(xs, 7), "data_ys": _numerals(mean, 5)}
    if mean is not low:
        numbers |= {"data_lows": _numerals(low, 5), "data_highs": _numerals(high, 5)}
    return element("g", *parts, class_=f"series {colour(one.colour)}", data_name=one.name, **numbers)


def _numerals(values: Doubles, digits: int) -> str:
    return " ".join(f"{value:.{digits}g}" for value in values.tolist())


def _names(frame: Frame, y: Scale, ends: Sequence[tuple[Series, Doubles]]) -> dict[int, Html]:
    """The names at the lines' right ends, by the series' `id`; pushed apart where they would overlap."""
    by_height = sorted(ends, key=lambda end: y(float(end[1][-1])))
    places: list[float] = []
    for _, values in by_height:
        wanted = y(float(values[-1])) + 4
        places.append(max(wanted, places[-1] + _LABEL_HEIGHT) if places else wanted)
    beyond = max(0.0, places[-1] - frame.y_range[0]) if places else 0.0
    for i in range(len(places) - 1, -1, -1):  # push back up what the last labels would put below the axis
        limit = places[i + 1] - _LABEL_HEIGHT if i + 1 < len(places) else frame.y_range[0]
        places[i] = min(places[i], limit) if beyond else places[i]
    return {
        id(one): label(frame.x_range[1] + 6, place, shorten(one.name, _NAME_LETTERS), "end")
        for place, (one, _) in zip(places, by_height, strict=True)
    }
