"""Section on single blocks: the hardest, easiest and most forgotten, with their text and how their loss went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_lfr.analysis.overview import RunView
from megatron_lfr.analysis.single_blocks import Block
from megatron_lfr.report.frame import Frame, bands, label, line, svg
from megatron_lfr.report.losses import phase_bands
from megatron_lfr.report.markup import Content, Html, element, join
from megatron_lfr.report.scale import Scale, spanning

_LETTERS, _MORE_LETTERS = 320, 3000


def blocks_section(view: RunView) -> Html:
    """Show the hardest, easiest and most forgotten blocks with their text."""
    if not view.visits.any():
        return element("p", "Nothing has been trained on yet.", class_="note")
    reason = view.corpus.no_text
    parts: list[Content] = []
    if reason is not None:
        parts.append(element("p", "The blocks' text cannot be shown: ", reason, class_="note"))
    for name, how, chosen in _kinds(view):
        cards = element("div", *(_card(view, block) for block in chosen), class_="cards")
        parts += [element("h4", name), element("p", how if chosen else "None so far.", class_="note"), cards]
    return join(parts)


def _kinds(view: RunView) -> list[tuple[str, str, list[Block]]]:
    """Return (name, how they were chosen, blocks) of each kind."""
    picks = view.picks
    if any(block.forgotten for block in picks.most_forgotten):
        name = "Most forgotten"
        how = "By how often the loss rose after a fall; among equals, by the most that it has been above its lowest."
    else:
        name = "Closest to forgotten"
        how = f"No loss rose by more than {view.margin:g} nats after a fall. These rose the most above their lowest."
    return [
        (
            "Hardest",
            "By what the last loss amounts to now (in brackets), given how it compared with all losses at that time: a "
            "block that was last seen early met a worse model.",
            picks.hardest,
        ),
        ("Easiest", "Measured in the same way.", picks.easiest),
        (name, how, picks.most_forgotten),
    ]


def _card(view: RunView, block: Block) -> Html:
    visits = "1 visit" if len(block.nll) == 1 else f"{len(block.nll)} visits"
    times = {0: "", 1: ", forgotten once"}.get(block.forgotten, f", forgotten {block.forgotten} times")
    head = element(
        "header",
        element("b", view.corpus.domain(block.id)),
        element("span", f"block {block.id:,}"),
        element("span", f"loss {float(block.nll[-1]):.2f} (now {block.present:.2f})".replace("-", "−")),
        element("span", visits + times),
    )
    return element("article", head, _losses(view, block), _text(view, block.id), class_="card")


def _text(view: RunView, block: int) -> Html | None:
    if view.corpus.no_text is not None:
        return None
    try:
        text = view.corpus.text(block)
    except (ValueError, OSError) as error:
        return element("p", f"cannot be read: {error}", class_="note")
    if len(text) <= _LETTERS:
        return element("pre", text)
    cut = "" if len(text) <= _MORE_LETTERS else f"… ({len(text) - _MORE_LETTERS:,} more characters)"
    rest = element("details", element("summary", "all of it"), element("pre", text[:_MORE_LETTERS], cut))
    return join([element("pre", text[:_LETTERS], "…"), rest])


def _losses(view: RunView, block: Block) -> Html:
    """Plot the loss at each visit, in a small plot, over the tokens of the run."""
    frame = Frame(360, 72, left=38, right=8, top=8, bottom=10)
    xs = np.array([view.tokens_at(int(step) - 1) for step in block.steps], np.float64)
    ys = block.nll.astype(np.float64)
    shaded = phase_bands(view)
    x = Scale(0.0, max([band.end for band in shaded] + [1.0]), *frame.x_range)
    y = spanning(ys, frame.y_range[0] - 6, frame.y_range[1] + 6)
    points = [(round(x(a), 1), round(y(b), 1)) for a, b in zip(xs.tolist(), ys.tolist(), strict=True)]
    unnamed = bands(frame, x, [replace(band, label="") for band in shaded])
    parts: list[Content] = [
        unnamed,
        line(frame.left, frame.y_range[0], frame.x_range[1], frame.y_range[0], "base"),
        element("polyline", points=" ".join(f"{a},{b}" for a, b in points), class_="line s0"),
    ]
    parts += [
        element("circle", cx=a, cy=b, r=3, class_="mark s0", data_tip=f"step {int(step):,}: loss {loss:.3f}")
        for (a, b), step, loss in zip(points, block.steps, ys.tolist(), strict=True)
    ]
    for value in sorted({float(ys.min()), float(ys.max())}):
        parts.append(label(frame.left - 5, y(value) + 4, f"{value:.2f}", "tick", "end"))
    return svg(frame, f"loss at each visit: {_spoken(ys.tolist())}", *parts, class_="plot")


def _spoken(losses: Sequence[float]) -> str:
    return ", ".join(f"{loss:.2f}" for loss in losses[:12]) + (" and on" if len(losses) > 12 else "")
