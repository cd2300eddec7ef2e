"""Section on what Learn-Focus-Review costs on top of training."""

from __future__ import annotations

from itertools import chain, repeat

from megatron_lfr.analysis.metrics import lfr_seconds, seconds_spent
from megatron_lfr.analysis.overview import RunView
from megatron_lfr.report.bars import Bar, stacked_bars
from megatron_lfr.report.frame import figure, legend
from megatron_lfr.report.markup import Html, element, join
from megatron_lfr.report.scale import percent, si
from megatron_lfr.report.tables import table

_KINDS = ("s5", "s0", "s4", "s1", "s3", "s2", "s6", "s7", "other")


def cost_section(view: RunView) -> Html:
    """Show where the time went, and how many bytes the journal takes."""
    spent = seconds_spent(view)
    if not any(spent.values()):
        return element("p", "metrics.jsonl holds no times yet.", class_="note")
    total = sum(spent.values())
    parts = [(kind, name) for kind, name in zip(chain(_KINDS, repeat("other")), spent, strict=False) if spent[name]]
    plot = stacked_bars(
        [Bar("time", [spent[name] for _, name in parts])],
        [(f"part {kind}", name) for kind, name in parts],
        "Where the time went",
        width=800,
    )
    rows = [[name, f"{seconds:,.2f} s", percent(seconds / total, 2)] for name, seconds in spent.items()]
    numbers = table(["what", "time", "share"], rows)
    lfr = lfr_seconds(spent)
    note = (
        f"Learn-Focus-Review itself took {lfr:,.2f} s, {percent(lfr / total, 2)} of {total:,.1f} s (of the process "
        "that logs, from the start of training to its last entry in metrics.jsonl)."
    )
    return join(
        [
            figure("Time", join([legend([(f"part {k}", n) for k, n in parts]), plot]), note, numbers, "mid"),
            _storage(view),
        ]
    )


def _storage(view: RunView) -> Html:
    samples = int(view.visits.sum())
    rescored = sum(phase.planned.phase.is_rescored for phase in view.phases)
    scores = view.run.ledger_bytes
    words = f"Journal: {si(4 * samples)}B on disk, four bytes for each visit. Scores in memory: {si(scores)}B."
    if rescored:
        tokens = rescored * view.run.plan.n_blocks * view.seq_length
        words += f" Rescoring read {si(tokens)} tokens forward-only; the token counts of this page do not include them."
    return element("p", words, class_="note")
