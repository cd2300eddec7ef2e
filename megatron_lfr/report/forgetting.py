"""Section on how many blocks were learned, unlearned, forgotten and relearned."""

from __future__ import annotations

from megatron_lfr.analysis.forgetting import CLASSES, EVENTS
from megatron_lfr.analysis.overview import RunView
from megatron_lfr.report.bars import Bar, stacked_bars
from megatron_lfr.report.frame import figure, legend
from megatron_lfr.report.markup import Content, Html, element, join
from megatron_lfr.report.scale import percent
from megatron_lfr.report.tables import table

_CLASS_KINDS = ("unseen", "steady", "learned", "unlearned", "late", "forgotten", "relearned", "often")
_EVENT_KINDS = ("unseen", "steady", "learned", "relearned", "forgotten", "unlearned")


def forgetting_section(view: RunView) -> Html:
    """Show how many blocks were learned and forgotten, by domain, by phase, and by margin."""
    if not view.visits.any():
        return element("p", "Nothing has been trained on yet.", class_="note")
    return join(
        [
            element("p", *_in_words(view), class_="note"),
            element("div", _by_domain(view), _by_phase(view), class_="pair"),
            element("details", element("summary", "What these words mean"), _definitions(view.margin)),
            element("details", element("summary", "How much depends on the margin"), _sensitivity(view)),
        ]
    )


def _in_words(view: RunView) -> list[Content]:
    counts = view.classes.sum(axis=0)
    twice = int(counts[1:].sum())
    again = int(counts[6:].sum())
    several = f", {percent(counts[7] / again)} of them several times" if again else ""
    per_block = view.visits.sum() / view.run.plan.n_blocks
    return [
        f"Of the {twice:,} blocks that were trained on at least twice, {percent(counts[2] / max(1, twice), 1)} were "
        f"learned without a setback, {percent(counts[5:].sum() / max(1, twice), 1)} were forgotten at least once, and "
        f"{percent(again / max(1, twice), 1)} forgotten and relearned{several}. ",
        "The paper reports that 25 to 78 % were forgotten and relearned at least once, 82 % of those several times. ",
        f"A block can be relearned at its fourth visit at the earliest; here, blocks had {per_block:.1f} on average.",
    ]


def _by_domain(view: RunView) -> Html:
    parts = list(zip(_CLASS_KINDS, CLASSES, strict=True))
    names = view.corpus.domains
    bars = [Bar(name, row.tolist()) for name, row in zip(names, view.classes, strict=True)]
    if len(names) > 1:
        bars.insert(0, Bar("all", view.classes.sum(axis=0).tolist()))
    numbers = table(["blocks", *CLASSES], [[bar.name, *(f"{int(size):,}" for size in bar.parts)] for bar in bars])
    used = [part for part, size in zip(parts, view.classes.sum(axis=0), strict=True) if size]
    plot = stacked_bars(
        bars, [(f"part {kind}", name) for kind, name in parts], "Blocks by how their loss went, by domain"
    )
    return figure("Blocks by how their loss went", join([_key(used), plot]), "Over the whole run so far.", numbers)


def _by_phase(view: RunView) -> Html:
    parts = list(zip(_EVENT_KINDS, EVENTS, strict=True))
    bars = [Bar(phase.name, phase.visits_by_event.tolist()) for phase in view.phases]
    numbers = table(
        ["visits in phase", *EVENTS], [[bar.name, *(f"{int(size):,}" for size in bar.parts)] for bar in bars]
    )
    totals = [sum(bar.parts[i] for bar in bars) for i in range(len(EVENTS))]
    used = [part for part, size in zip(parts, totals, strict=True) if size]
    plot = stacked_bars(bars, [(f"part {kind}", name) for kind, name in parts], "Visits by what they showed, by phase")
    return figure(
        "Visits by what they showed",
        join([_key(used), plot]),
        "Each visit of a block compared with those before.",
        numbers,
    )


def _key(parts: list[tuple[str, str]]) -> Html:
    return legend([(f"part {kind}", name) for kind, name in parts])


def _definitions(margin: float) -> Html:
    rows: list[list[Content]] = [
        [
            "fall, rise",
            f"the loss falls when it is more than {margin:g} nats below its last peak, and rises when it is more than "
            "that above its last trough",
        ],
        ["learned", "fell, and never rose (the paper: a loss that falls monotonically)"],
        ["unlearned", "rose, and never fell (the paper: a loss that rises)"],
        ["forgotten", "rose after a fall (the paper: falls, then rises, possibly repeatedly)"],
        ["relearned", "fell again after it was forgotten"],
        ["no change", "the loss went on in its direction, or changed by less than the margin"],
        ["steady", "neither fell nor rose in the entire run (ours)"],
        ["rose, then learned", "rose at first, then fell for good (ours)"],
    ]
    source = (
        "The paper takes the recorded loss as it is. Losses are noisy, and without a margin almost any block has "
        "been forgotten at least once: the margin is ours (--margin)."
    )
    return join([element("p", source), table(["word", "meaning"], rows, "prose")])


def _sensitivity(view: RunView) -> Html:
    rows = [
        [f"{margin:g}", percent(forgotten, 1), percent(relearned, 1)]
        for margin, forgotten, relearned in view.sensitivity
    ]
    note = "Of blocks trained on at least twice, from evenly spaced blocks (all of them in corpora of up to 200,000)."
    return join(
        [element("p", note), table(["margin (nats)", "forgotten at least once", "forgotten and relearned"], rows)]
    )
