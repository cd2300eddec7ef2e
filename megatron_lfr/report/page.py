"""Makes the page: its sections in their order."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lfr.analysis.overview import RunView
from megatron_lfr.report.blocks import blocks_section
from megatron_lfr.report.comparison import comparison_section
from megatron_lfr.report.cost import cost_section
from megatron_lfr.report.distribution import distribution_section
from megatron_lfr.report.document import document
from megatron_lfr.report.focus import focus_section, similarity_section
from megatron_lfr.report.forgetting import forgetting_section
from megatron_lfr.report.losses import losses_section
from megatron_lfr.report.markup import Content, Html, element, join
from megatron_lfr.report.summary import lineage, phase_table, run_table, tiles
from megatron_lfr.report.versions import has_versions, versions_section

_SECTIONS = (
    ("losses", "Losses", losses_section),
    ("distribution", "How hard the blocks are", distribution_section),
    ("focus", "What each Focus dropped and kept", focus_section),
    ("forgetting", "Learned, forgotten, relearned", forgetting_section),
    ("blocks", "Single blocks", blocks_section),
    ("cost", "What Learn-Focus-Review costs", cost_section),
)


def make_page(views: Sequence[RunView]) -> str:
    """Return the report on one or several runs, as one HTML file that needs no other."""
    title = " and ".join(view.name for view in views)
    links: list[tuple[str, str]] = []
    parts: list[Content] = []
    if len(views) > 1:
        parts += [
            element("section", element("h2", "The runs"), run_table(views)),
            _section(links, "versions", "Versions", versions_section(views)) if has_versions(views) else None,
            _section(links, "comparison", "The runs at equal tokens", comparison_section(views)),
        ]
    several = len(views) > 1
    for number, view in enumerate(views):
        parts.append(_run(view, f"run{number}-", links, several))
        if not several:
            parts.append(_similarity(views, links))
    if several:
        parts.append(_similarity(views, links))
    navigation = element("nav", *(element("a", name, href=f"#{key}") for key, name in links), aria_label="Sections")
    head = element("header", element("p", "Learn-Focus-Review"), element("h1", title), class_="top")
    tip = element("div", id="tip", role="status", hidden="")
    body = join([head, navigation, element("main", *parts), tip])
    return document(f"{title}: Learn-Focus-Review report", body)


def _similarity(views: Sequence[RunView], links: list[tuple[str, str]]) -> Html:
    return _section(links, "similarity", "How alike the dropped sets are", similarity_section(views))


def _section(links: list[tuple[str, str]], key: str, name: str, content: Html) -> Html:
    links.append((key, name))
    return element("section", element("h2", name), content, id=key)


def _run(view: RunView, prefix: str, links: list[tuple[str, str]], several: bool) -> Html:
    """Make all sections on one run; where there are several runs, they are one level lower."""
    missing = view.corpus.missing
    warning = None if missing is None else element("p", "Nothing is shown by domain: ", missing, class_="note warn")
    start = join([lineage(view), tiles(view), warning, phase_table(view)])
    if not several:
        parts = [_section(links, key, name, section(view)) for key, name, section in _SECTIONS]
        return join([element("section", start, id="phases"), *parts])
    links.append((prefix + "run", view.name))
    inner = [element("div", element("h3", name), section(view), id=prefix + key) for key, name, section in _SECTIONS]
    return element("section", element("h2", view.name), start, *inner, id=prefix + "run")
