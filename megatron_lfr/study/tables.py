"""The tables of a study's report, once for Markdown and the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lfr.commonness.junk import RULE
from megatron_lfr.output import is_number, number, visible
from megatron_lfr.study.between import LEARNED

NONE = "–"
_BETWEEN = {"seeds": "between seeds", "sizes": "between sizes", "both": "between sizes and seeds"}


@dataclass(frozen=True)
class Table:
    """A table of texts, whose first column names the rows."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """Return the table as Markdown, with its title and note."""
        lines = [f"### {self.title}", "", *([self.note, ""] if self.note else [])]
        lines += [_row(self.head), _row(["---", *["---:"] * (len(self.head) - 1)]), *map(_row, self.rows)]
        return "\n".join(lines) + "\n"


def cell_tables(summary: dict[str, Any], cell: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables of a cell: losses, contrasts, domains, phases, forgetting, tasks; those without rows are left
    out."""
    arms = cell["arms"]
    tables = [
        _losses(summary, cell),
        _contrasts(summary, cell),
        by_name("Held-out loss by domain, nats a token", arms, lambda arm: arm["domains"], _loss),
        by_name("Log-likelihood of the answer by task, nats", arms, lambda arm: arm["tasks"], _loss),
        phase_table("What each phase trained on, by domain (share of the samples)", arms, "domains"),
        phase_table("What each phase trained on, by planted kind (share of the tokens)", arms, "planted"),
        by_name("Blocks learned and forgotten during the run", arms, lambda arm: arm["forgetting"], share),
    ]
    yield from (table for table in tables if table.rows and len(table.head) > 1)


def run_tables(summary: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables over all cells: likeness of dropped sets, order of domains, held-out loss against tasks, runs
    that are not done."""
    tables = (_dropped(summary["similarity"]), *_orders(summary["order"]))
    yield from (table for table in tables if table.rows)
    if tasks := summary["tasks"]:
        rows = [[row["task"], str(row["runs"]), number(row["tau"], 2, NONE)] for row in tasks]
        note = "Kendall's tau of the runs' orders by held-out loss and by the log-likelihood of the answer."
        yield Table("Held-out loss against tasks, over all runs", ["task", "runs", "tau"], rows, note)
    if summary["open_runs"]:
        yield Table("Runs without a result", ["run"], [[name] for name in summary["open_runs"]])


def _losses(summary: dict[str, Any], cell: dict[str, Any]) -> Table:
    losses: dict[str, dict[Any, float]] = {arm["arm"]: arm["losses"] for arm in cell["arms"]}
    reference = losses.get(summary["reference"], {})
    head = ["arm", "seeds", "held-out loss", f"minus {summary['reference']}", "token equivalent", "95 %"]
    head += [f"share of the way to {summary['upper_reference']}"] if summary["upper_reference"] else []
    head += ["computed", "of it prepared and rescored", "CPU s of preparation", "training s"]
    rows = []
    for arm in cell["arms"]:
        compute, equivalent = arm["compute"], arm["token_equivalent"]
        common = [loss - reference[seed] for seed, loss in arm["losses"].items() if seed in reference]
        difference = sum(common) / len(common) if common else None
        row = [
            arm["arm"] + _length(arm["compute_share"]),
            " ".join(map(str, arm["seeds"])),
            number(arm["loss"], missing=NONE),
            signed(difference),
            _times(equivalent, arm["token_equivalent_beyond"]) + _of_seeds(arm),
            span(equivalent, 2).replace("+", ""),
        ]
        if summary["upper_reference"]:
            row.append(_interval(arm["share_of_distance"], 2))
        extra = compute["preparation"] + compute["rescoring"] if compute else None
        row += [f"{compute['total']:,.0f}" if compute else NONE, NONE if extra is None else f"{extra:,.0f}"]
        rows.append([*row, number(compute.get("preparation_cpu_seconds"), 0, NONE), number(arm["seconds"], 0, NONE)])
    note = (
        "Held-out loss: mean of the domains' losses, nats a token; means over seeds. Computed: forward_backward tokens "
        f"of the model. Token equivalent: how many times the arm's compute {summary['reference']} needs for the arm's "
        "loss, by its own runs, each with a complete decay (* beyond them: prolonged), of seeds where that can be said."
    ) + _rules(cell["arms"])
    return Table("Held-out loss at equal compute", head, rows, note)


def _length(share: float | None) -> str:
    """Say what is unusual of an arm's share of the budget."""
    if share is None:
        return " (as long as its schedule)"
    return "" if share == 1 else f" ({share:g} of the compute)"


def _dropped(likenesses: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [
            f"{row['arm']}, {row['corpus']} {row['rate']}",
            str(row["phase"]),
            *(text for name in _BETWEEN for text in _likeness(row[name])),
        ]
        for row in likenesses
    ]
    head = ["arm", "Focus phase", *(text for what in _BETWEEN.values() for text in (what, "by chance", "pairs"))]
    note = (
        "Cosine of the sets of blocks that were dropped. What differs between seeds is noise. Two sizes at one seed "
        "meet the same blocks in the same order, as long as their schedules agree; pairs that differ in both do not."
    )
    return Table("How alike the dropped sets are", head, rows, note)


def _orders(order: dict[str, Any]) -> tuple[Table, Table]:
    names = list(order["runs"][0]["learned_at"]) if order["runs"] else []
    times = [[run["run"], *(number(run["learned_at"].get(name), 3, NONE) for name in names)] for run in order["runs"]]
    note = (
        f"Where in the first phase a domain's training loss has come down by {LEARNED:g} of what it comes down there, "
        "as a share of the phase."
    )
    taus = [
        [
            f"{row['corpus']} {row['rate']}",
            *(f"{number(row[name]['tau'], 2, NONE)} ({row[name]['pairs']} pairs)" for name in _BETWEEN),
        ]
        for row in order["tau"]
        if any(row[name]["pairs"] for name in _BETWEEN)
    ]
    return (
        Table("When each domain is learned", ["run", *names], times, note),
        Table("Kendall's tau of these orders", ["runs", *_BETWEEN.values()], taus),
    )


def _rules(arms: Sequence[dict[str, Any]]) -> str:
    """Say by which rules junk was found, where there is more than one or another than today's: such arms differ in more
    than their names say."""
    by_rule: dict[int, list[str]] = {}
    for arm in arms:
        for rule in arm["junk_rules"]:
            by_rule.setdefault(rule, []).append(arm["arm"])
    if by_rule.keys() <= {RULE}:
        return ""
    said = "; ".join(f"rule {rule}: {', '.join(names)}" for rule, names in sorted(by_rule.items()))
    return f" Not all junk was found by today's rule, {RULE}: {said}."


def _of_seeds(arm: dict[str, Any]) -> str:
    missing, n = arm["token_equivalent_missing"], len(arm["seeds"])
    return f" ({n - missing} of {n} seeds)" if 0 < missing < n else ""


def _contrasts(summary: dict[str, Any], cell: dict[str, Any]) -> Table:
    rows = [
        [
            row["name"],
            "primary" if row["is_primary"] else "secondary",
            signed(row["by_seeds"]["mean"]),
            span(row["by_seeds"]),
            str(row["by_seeds"]["n"]),
            number(row["by_seeds"]["p"], missing=NONE),
            number(row["adjusted_p"], missing=NONE),
            span(row["by_documents"]),
        ]
        for row in cell["contrasts"]
    ]
    head = ["contrast", "", "difference", "95 % over seeds", "seeds", "p", "p (Holm)", "95 % over documents"]
    note = (
        "Difference in held-out loss; below 0, the first is better. Over seeds: paired t. Over documents: bootstrap of "
        "the held-out documents within domains, of the mean over seeds. Holm: over secondary ones of equal compute."
    )
    return Table("Contrasts", head, rows, note)


def by_name(title: str, arms: Sequence[dict[str, Any]], values: Any, write: Any) -> Table:
    """Make a table of the arms' figures under their names, one arm a row."""
    names = list(dict.fromkeys(name for arm in arms for name in values(arm)))
    return Table(
        title, ["arm", *names], [[arm["arm"], *(write(values(arm).get(name)) for name in names)] for arm in arms]
    )


def phase_table(title: str, arms: Sequence[dict[str, Any]], key: str) -> Table:
    """Make a table of what the phases of all arms trained on, one phase a row."""
    phases = [(arm["arm"], phase) for arm in arms for phase in arm["phases"] if phase[key]]
    names = list(dict.fromkeys(name for _, phase in phases for name in phase[key]))
    rows = [
        [f"{arm}, {phase['phase']}", f"{phase['samples']:,.0f}", *(share(phase[key].get(name)) for name in names)]
        for arm, phase in phases
    ]
    return Table(title, ["phase", "samples", *names], rows)


def share(value: Any) -> str:
    """Write a share as a percentage."""
    return f"{100 * value:.1f} %" if is_number(value) else NONE


def signed(value: Any) -> str:
    """Write a difference with its sign."""
    return f"{value:+.4f}".replace("-", "−") if is_number(value) else NONE


def span(interval: dict[str, Any] | None, digits: int = 4) -> str:
    """Write the two ends of an interval."""
    if interval is None or interval["low"] is None:
        return NONE
    return f"{interval['low']:+.{digits}f} to {interval['high']:+.{digits}f}".replace("-", "−")


def _interval(interval: dict[str, Any] | None, digits: int) -> str:
    if interval is None:
        return NONE
    ends = "" if interval["low"] is None else f" ({span(interval, digits)})"
    return number(interval["mean"], digits, NONE).replace("-", "−") + ends


def _times(interval: dict[str, Any] | None, is_beyond: bool) -> str:
    return NONE if interval is None else f"{number(interval['mean'], 2, NONE)}{' *' * is_beyond}"


def _likeness(row: dict[str, Any]) -> list[str]:
    return [number(row["cosine"], 3, NONE), number(row["by_chance"], 3, NONE), str(row["pairs"])]


def _loss(value: Any) -> str:
    return number(value, missing=NONE)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(visible(cell).replace('|', chr(92) + '|') for cell in cells)} |"
