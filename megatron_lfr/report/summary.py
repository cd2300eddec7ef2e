"""Makes the head of the page: the run in numbers, and its phases."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lfr.analysis.metrics import evaluations, lfr_seconds, seconds_spent
from megatron_lfr.analysis.overview import PhaseView, RunView
from megatron_lfr.output import number
from megatron_lfr.report.markup import Content, Html, element, join
from megatron_lfr.report.scale import percent, si
from megatron_lfr.report.tables import NONE, table


def tiles(view: RunView) -> Html:
    """Show the few numbers that one looks for first."""
    rows = evaluations(view)
    plan = view.run.plan
    samples = sum(phase.samples_so_far for phase in view.phases)
    spent = seconds_spent(view)
    total = sum(spent.values())
    seen = 1 - view.unseen / plan.n_blocks
    facts = [
        (
            "tokens",
            si(samples * view.seq_length),
            "complete" if samples == plan.total_samples else f"{percent(samples / plan.total_samples)} of the run",
        ),
        (
            "validation loss",
            number(rows[-1]["loss"], 3) if rows else NONE,
            "at the last evaluation" if rows else "none yet",
        ),
        ("blocks", si(plan.n_blocks), f"of {view.seq_length:,} tokens; {percent(seen)} seen"),
        ("schedule", schedule_name(view), f"{len(view.phases)} of {len(plan.phases)} phases begun"),
        (
            "LFR's own time",
            percent(lfr_seconds(spent) / total, 2) if total else NONE,
            "recording losses, making orders",
        ),
    ]
    items = [
        element("li", element("span", name), element("b", value), element("small", note)) for name, value, note in facts
    ]
    return element("ul", *items, class_="tiles")


def lineage(view: RunView) -> Html | None:
    """Return the run that this one is a branch of; None where it is none."""
    parent = view.run.folder.parent
    if parent is None:
        return None
    name = "A branch" if parent.version is None else f"Version {parent.version}, a branch"
    return element("p", f"{name} of {parent.folder} from step {parent.step:,} on.", class_="note")


def schedule_name(view: RunView) -> str:
    """Return the preset or file that the run's schedule came from, or "custom"."""
    given = view.run.config.get("lfr_schedule")
    short = isinstance(given, str) and len(given) <= 40 and not given.lstrip().startswith("[")
    return str(given) if short else "custom"


def phase_table(view: RunView) -> Html:
    """Show the phases that have begun."""
    if not view.phases:
        return element("p", "No phase has begun yet.", class_="note")
    after = {row.get("phase"): row["loss"] for row in evaluations(view)}
    head: list[Content] = ["phase", "steps", "blocks", "distinct", "tokens", "training loss", "validation loss after"]
    if len(view.run.plan.segments) > 1:
        head.insert(1, "segment, about")
    return table(head, [_phase_row(view, phase, after.get(phase.planned.index)) for phase in view.phases])


def _phase_row(view: RunView, phase: PhaseView, after: float | None) -> list[Content]:
    steps = -(-phase.samples_so_far // phase.planned.global_batch_size)
    mark = element("i", class_=f"swatch band {phase.kind}")
    complete = phase.samples_so_far == phase.planned.samples
    segments = view.run.plan.segments
    about = [_about(view, phase)] if len(segments) > 1 else []
    return [
        join([mark, phase.name, f" ({phase.planned.phase.counting})" if phase.planned.phase.counting else ""]),
        *about,
        f"{steps:,}" if complete else f"{steps:,} of {phase.planned.steps:,}",
        f"{phase.samples_so_far:,}",
        f"{phase.distinct:,}",
        f"{phase.samples_so_far * view.seq_length:,}",
        number(phase.mean_loss, missing=NONE),
        number(after, missing=NONE) if complete else NONE,
    ]


def _about(view: RunView, phase: PhaseView) -> str:
    """Return the number of a phase's segment, from 1, and the domains that the phase is about."""
    planned, domains = phase.planned, view.corpus.domains
    segment = f"{planned.segment + 1}"
    if planned.corpora is None or len(domains) <= max(planned.corpora):  # the corpus is not at hand
        return f"{segment}, all" if planned.corpora is None else f"{segment}, some prefixes"
    replay = f" and {100 * planned.phase.replay:g} % others" if planned.phase.replay else ""
    return f"{segment}, {', '.join(domains[corpus] for corpus in planned.corpora)}{replay}"


def run_table(views: Sequence[RunView]) -> Html:
    """Show several runs, one in each row."""
    rows: list[list[Content]] = []
    for i, view in enumerate(views):
        evaluated = evaluations(view)
        samples = sum(phase.samples_so_far for phase in view.phases)
        rows.append(
            [
                join([element("i", class_=f"swatch s{i}" if i < 8 else "swatch other"), view.name]),
                schedule_name(view),
                f"{samples * view.seq_length:,}",
                f"{sum(phase.kind == 'focus' for phase in view.phases)}",
                number(evaluated[-1]["loss"]) if evaluated else NONE,
            ]
        )
    return table(["run", "schedule", "tokens", "Focus phases", "last validation loss"], rows)
