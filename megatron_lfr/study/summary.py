"""All figures of a study's report, as plain values for JSON, Markdown and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_lfr.fileio import json_value
from megatron_lfr.study.between import answers, dropped_sets, mean_of, orders_of_domains, task_orders
from megatron_lfr.study.definition import CANDIDATE, Contrast, Study
from megatron_lfr.study.results import Cell, HeldOut, Result, Results, held_out_blocks, pick_candidate, resolve
from megatron_lfr.study.statistics import (
    document_bootstrap,
    equivalent_compute,
    holm,
    log_interval,
    paired_t,
)
from megatron_lfr.study.verdict import Evidence, decide


def summarize(results: Results) -> dict[str, Any]:
    """Return all figures: those of each cell, likeness and orders between runs, and what is not done."""
    study = results.study
    candidate = None if study.candidate is None else pick_candidate(results, study.candidate)
    held_out = held_out_blocks(study.held_out, results.seq_length) if results.runs else None
    cells = [_cell(results, cell, candidate, held_out) for cell in results.cells() if held_out is not None]
    summary = {
        "title": study.title,
        "reference": study.reference,
        "upper_reference": study.upper_reference,
        "candidate": candidate,
        "candidate_rule": None if study.candidate is None else asdict(study.candidate),
        "smallest_difference": study.smallest_difference,
        "commits": sorted({str(run.json["commit"]) for run in results.runs}),
        "cells": cells,
        "to_do": None,
        "similarity": dropped_sets(results),
        "order": orders_of_domains(results),
        "tasks": task_orders(results),
        "runs_done": len(results.runs),
        "open_runs": [run["name"] for run in results.open_runs],
    }
    plain: dict[str, Any] = json_value(summary)
    return plain


def _cell(results: Results, cell: Cell, candidate: str | None, held_out: HeldOut) -> dict[str, Any]:
    study = results.study
    seeds = {run.seed for run in results.runs if run.cell == cell}
    fresh = seeds - set(study.candidate.seeds) if study.candidate else seeds
    contrasts = _contrasts(results, cell, candidate, held_out, fresh)
    seeds = fresh or seeds  # losses are shown before there is a seed to compare them by
    evidence = [
        Evidence(row["arm"], row["by_seeds"], row["by_documents"], row["is_primary"], row["adjusted_p"])
        for row in contrasts
        if row["against"] == study.reference and _may_pay(study, row["arm"])
    ]
    missing = _missing(results, cell, candidate, {one.arm for one in evidence})
    name = " ".join(("corpus", cell[0] + ",", "size", cell[1] + ",", "rate", cell[2]))
    verdict = decide(name, study.reference, evidence, study.smallest_difference, sorted(missing))
    return {
        "corpus": cell[0],
        "size": cell[1],
        "rate": cell[2],
        "seeds": sorted(seeds),
        "verdict": asdict(verdict),
        "arms": [_arm(results, cell, arm, seeds) for arm in results.arms(cell)],
        "contrasts": [{**row, **{key: asdict(row[key]) for key in ("by_seeds", "by_documents")}} for row in contrasts],
        "curve": [
            {"seed": seed, "compute": [r.compute for r in curve], "loss": [r.loss for r in curve]}
            for seed in sorted(seeds)
            if (curve := results.curve(cell, seed))
        ],
    }


def _missing(results: Results, cell: Cell, candidate: str | None, shown: set[str]) -> set[str]:
    """Return the arms that are to be compared with the reference in a cell, and are not yet; `shown` are."""
    study, open_arms = results.study, results.open_arms(cell)
    contrasts = resolve([*study.primary, *study.secondary], candidate or CANDIDATE)
    compared = {one.arm for one in contrasts if one.against == study.reference}
    missing = {arm for arm in compared & open_arms if _may_pay(study, arm)} - shown
    if CANDIDATE in compared and study.candidate and {*results.arms(cell), *open_arms} & {*study.candidate.among}:
        missing.add("the candidate, which is not picked yet")
    return missing


def _may_pay(study: Study, arm: str) -> bool:
    """Whether the sentence may be about an arm: it computes as much as the reference, and knows no planted labels."""
    return study.arms[arm].share == 1 and arm != study.upper_reference


def _arm(results: Results, cell: Cell, arm: str, seeds: set[int]) -> dict[str, Any]:
    """Return all figures of an arm in a cell, over its fresh seeds."""
    study = results.study
    runs = results.of(cell, arm, seeds)
    reference = results.of(cell, study.reference, seeds)
    upper = results.of(cell, study.upper_reference, seeds) if study.upper_reference else {}
    done = list(runs.values())
    shares = [
        (reference[seed].loss - run.loss) / (reference[seed].loss - upper[seed].loss)
        for seed, run in runs.items()
        if seed in reference and seed in upper and reference[seed].loss != upper[seed].loss
    ]
    equivalents = {seed: _equivalent(results, cell, run) for seed, run in runs.items()}
    known = [pair for pair in equivalents.values() if pair is not None]
    return {
        "arm": arm,
        "seeds": sorted(runs),
        "loss": mean_of(run.loss for run in done),
        "compute_share": study.arms[arm].share,
        "losses": {seed: run.loss for seed, run in sorted(runs.items())},
        "domains": _means([run.json["held_out"]["domains"] for run in done]),
        "compute": _means([run.json["compute"] for run in done]),
        "seconds": mean_of(run.json["train_seconds"] for run in done),
        "token_equivalent": asdict(log_interval([ratio for ratio, _ in known])) if known else None,
        "token_equivalent_beyond": any(beyond for _, beyond in known),
        "token_equivalent_missing": len(equivalents) - len(known),
        "share_of_distance": asdict(paired_t(shares)) if shares else None,
        "junk_rules": sorted({run.junk_rule for run in done if run.junk_rule is not None}),
        "phases": _phases(done),
        "forgetting": _shares(_means([run.json["forgetting"] for run in done])),
        "tasks": _means([answers(run) for run in done]),
    }


def _equivalent(results: Results, cell: Cell, run: Result) -> tuple[float, bool] | None:
    """Return how many times the run's compute the reference of its seed needs for the run's loss, and whether that
    lies beyond its points."""
    curve = results.curve(cell, run.seed)
    point = equivalent_compute([r.compute for r in curve], [r.loss for r in curve], run.loss)
    return None if point is None else (point.compute / run.compute, point.beyond)


def _contrasts(
    results: Results, cell: Cell, candidate: str | None, held_out: HeldOut, seeds: set[int]
) -> list[dict[str, Any]]:
    study = results.study
    primary = resolve(study.primary, candidate)
    secondary = [one for one in resolve(study.secondary, candidate) if one not in primary]
    rows = [
        row
        for is_primary, contrasts in ((True, primary), (False, secondary))
        for contrast in contrasts
        if (row := _contrast(results, cell, contrast, held_out, seeds, is_primary)) is not None
    ]
    tested = [
        row
        for row in rows
        if not row["is_primary"]
        and row["by_seeds"].p is not None
        and study.arms[row["arm"]].share is not None
        and study.arms[row["arm"]].share == study.arms[row["against"]].share
    ]
    for row, adjusted in zip(tested, holm([row["by_seeds"].p for row in tested]), strict=True):
        row["adjusted_p"] = adjusted
    return rows


def _contrast(
    results: Results, cell: Cell, contrast: Contrast, held_out: HeldOut, seeds: set[int], is_primary: bool
) -> dict[str, Any] | None:
    """Return the difference of two arms over the seeds that both have; None where there is none."""
    arm, against = (results.of(cell, name, seeds) for name in (contrast.arm, contrast.against))
    common = sorted(arm.keys() & against.keys())
    if not common:
        return None
    blocks = np.mean([arm[seed].held_out() - against[seed].held_out() for seed in common], axis=0)
    domains = [_difference(arm[s].json["held_out"]["domains"], against[s].json["held_out"]["domains"]) for s in common]
    return {
        "name": contrast.name,
        "arm": contrast.arm,
        "against": contrast.against,
        "is_primary": is_primary,
        "by_seeds": paired_t([arm[seed].loss - against[seed].loss for seed in common]),
        "by_documents": document_bootstrap(blocks, held_out.documents, held_out.domains),
        "adjusted_p": None,
        "domains": _means(domains),
    }


def _phases(runs: Sequence[Result]) -> list[dict[str, Any]]:
    """Return what each phase trained on: samples by domain, tokens by planted kind, as shares; means over seeds."""
    if not runs:
        return []
    rows = []
    for number, first in enumerate(runs[0].json["phases"]):
        phases = [run.json["phases"][number] for run in runs]
        planted = [phase["planted"] for phase in phases if phase["planted"] is not None]
        rows.append(
            {
                "phase": first["phase"],
                "kind": first["kind"],
                "samples": mean_of(phase["samples"] for phase in phases),
                "domains": _shares(_means([phase["domains"] for phase in phases])),
                "planted": _shares(_means(planted)) if planted else None,
            }
        )
    return rows


def _difference(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {name: a[name] - b[name] for name in a}


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each key over mappings, of those that have it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: mean_of(row[name] for row in rows if name in row) for name in names}


def _shares(counts: dict[str, float]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total if total else math.nan for name, count in counts.items()}
