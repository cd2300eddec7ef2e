"""Sections on what each Focus left out, and on how alike the dropped sets are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lfr.analysis.overview import FocusView, PhaseView, RunView
from megatron_lfr.analysis.similarity import BlockSet, compare
from megatron_lfr.report.bars import Bar, stacked_bars
from megatron_lfr.report.frame import figure, legend
from megatron_lfr.report.markup import Content, Html, element, join
from megatron_lfr.report.scale import percent
from megatron_lfr.report.tables import NONE, heat_table, table

_PARTS = (
    ("kept", "kept"),
    ("dropped", "dropped as easy"),
    ("hardest", "dropped as hard"),
    ("unseen", "never seen, kept"),
    ("excluded", "never seen, left out"),
)


def focus_section(view: RunView) -> Html:
    """Show what each Focus dropped and kept by domain, with the unseen share."""
    focused = [(phase, phase.focus) for phase in view.phases if phase.focus is not None]
    verdicts = [
        element("p", f"Phase {phase.planned.index}, a Focus of the schedule: {phase.verdict}.", class_="note")
        for phase in view.phases
        if phase.verdict is not None
    ]
    if not focused:
        nothing = "No Focus has been trained in this run: nothing was left out."
        return join([element("p", nothing, class_="note"), *verdicts])
    figures = [_focus_figure(view, phase, focus) for phase, focus in focused]
    used = [
        part for part in _PARTS if part[0] in ("kept", "dropped") or any(_has(part[0], focus) for _, focus in focused)
    ]
    return join(
        [legend([(f"part {kind}", name) for kind, name in used]), element("div", *figures, class_="pair"), *verdicts]
    )


def _has(kind: str, focus: FocusView) -> bool:
    """Return whether a Focus has unseen blocks that are drawn as `kind`."""
    if kind == "hardest":
        return bool(focus.hardest_by_domain.any())
    excluded = focus.excluded_by_domain
    return bool((excluded if kind == "excluded" else focus.unseen_by_domain - excluded).any())


def _focus_figure(view: RunView, phase: PhaseView, focus: FocusView) -> Html:
    sizes = focus.sizes
    unseen, dropped, excluded = focus.unseen_by_domain, focus.dropped_by_domain, focus.excluded_by_domain
    hardest = focus.hardest_by_domain
    counts = np.stack([sizes - dropped - unseen, dropped - hardest, hardest, unseen - excluded, excluded], axis=1)
    shown = [(name, row) for name, row, size in zip(view.corpus.domains, counts, sizes, strict=True) if size]
    names = [name for name, _ in shown]
    bars = [Bar(name, row.tolist()) for name, row in shown]
    if len(names) > 1:
        bars.insert(0, Bar("all", counts.sum(axis=0).tolist()))
    planned = phase.planned.phase
    scored = int(sizes.sum() - unseen.sum())
    whose = "all blocks" if sizes.sum() == view.corpus.starts[-1] else "the blocks in its scope"
    clusters = f"of {planned.clusters}" if planned.clustered_by is None else f"of {planned.cluster_by}"
    how = {"threshold": "a threshold", "clusters": f"complete clusters, {clusters}"}[planned.selection]
    twice = planned.needs_two_visits
    score = planned.score if ":" in planned.score else "improvement of the loss" if twice else f"{planned.score} loss"
    without = "seen less than twice" if twice else "unseen"
    ends = f", {percent(hardest.sum() / max(1, scored), 1)} of them as the hardest" if hardest.any() else ""
    note = (
        f"Dropped {percent(focus.dropped.size / max(1, scored), 1)} of the scored blocks{ends}, by {how} on the "
        f"{score}; {without}: {percent(unseen.sum() / sizes.sum(), 1)} of {whose}.{_weighting(phase)}"
    )
    plot = stacked_bars(bars, _PARTS, f"What phase {phase.name} kept and dropped, by domain")
    return figure(f"Phase {phase.name}", plot, note, _numbers(view, phase, focus))


def _weighting(view: PhaseView) -> str:
    """Describe how a Focus samples, as far as it is more than passes over what it keeps."""
    phase = view.planned.phase
    how = "" if phase.sampling == "passes" else f" Drawn by {phase.sampling}, weights {phase.weighting}."
    if phase.counting:
        how += f" {phase.counting[0].upper()}{phase.counting[1:]}."
    return how + (f" {percent(phase.explore, 1)} drawn at random from all blocks." if phase.explore else "")


def _numbers(view: RunView, phase: PhaseView, focus: FocusView) -> Html:
    sizes, visits = focus.sizes, phase.visits_by_domain
    rows: list[list[Content]] = [
        [
            name,
            f"{size:,}",
            percent(size / sizes.sum(), 1),
            percent(dropped / max(1, size), 1),
            percent(unseen / max(1, size), 1),
            percent(trained / max(1, visits.sum()), 1),
        ]
        for name, size, dropped, unseen, trained in zip(
            view.corpus.domains, sizes.tolist(), focus.dropped_by_domain.tolist(), focus.unseen_by_domain.tolist(),
            visits.tolist(), strict=True,
        )
    ]  # fmt: skip
    return table(["domain", "blocks", "of the corpus", "dropped", "unseen", "of the phase's blocks"], rows)


@dataclass(frozen=True)
class _Named:
    name: str
    blocks: BlockSet
    corpus: object


def similarity_section(views: Sequence[RunView]) -> Html:
    """Show overlap and cosine similarity of the dropped sets, between phases and between runs."""
    sets = [
        _Named(
            phase.name if len(views) == 1 else f"{view.name}: {phase.name}",
            phase.focus.dropped,
            view.run.corpus,
        )
        for view in views
        for phase in view.phases
        if phase.focus is not None
    ]
    if len(sets) < 2:
        return element(
            "p", "Fewer than two Focus phases have begun: there are no dropped sets to compare.", class_="note"
        )
    likeness = {
        (i, j): compare(a.blocks, b.blocks) if (a.corpus, a.blocks.n_blocks) == (b.corpus, b.blocks.n_blocks) else None
        for i, a in enumerate(sets)
        for j, b in enumerate(sets)
    }
    names = [one.name for one in sets]

    def tip(i: int, j: int) -> str:
        alike = likeness[i, j]
        if alike is None:
            return "different corpora: their blocks cannot be compared"
        return (
            f"{names[i]} and {names[j]}: overlap {alike.overlap:.3f}, cosine {alike.cosine:.3f}, "
            f"{alike.by_chance:.3f} by chance"
        )

    def heat(measure: str) -> Html:
        values = {pair: float("nan") if alike is None else getattr(alike, measure) for pair, alike in likeness.items()}
        return heat_table(
            names, lambda i, j: values[i, j], lambda i, j: f"{values[i, j]:.2f}" if values[i, j] >= 0 else NONE, tip
        )

    cosine = figure("Cosine similarity", heat("cosine"), "|A∩B| / √(|A||B|), the paper's measure; 1 is the same set.")
    overlap = figure("Overlap", heat("overlap"), "|A∩B| / |A∪B| (Jaccard).")
    chance = figure(
        "By chance", heat("by_chance"), "The expected cosine of random sets of these sizes among the scored blocks."
    )
    return element("div", cosine, overlap, chance, class_="pair")
