"""Puts together what the report needs of one run, from its folder and its evaluation, when it has ended."""

from __future__ import annotations

import io
import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lfr.analysis.forgetting import CLASSES, MARGIN
from megatron_lfr.analysis.metrics import seconds_spent
from megatron_lfr.analysis.overview import RunView, view_run
from megatron_lfr.analysis.replay import PhaseHistory, Run, open_run
from megatron_lfr.fileio import json_value, write_atomic
from megatron_lfr.run_folder.corpus import Corpus
from megatron_lfr.study.budget import FORWARD
from megatron_lfr.study.labels import kinds_of_blocks

WINDOWS = 24
"""Stretches of the first phase, of each of which the mean loss by domain is kept."""


def collect(job: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's JSON holds beside its description, and write the arrays that it names.

    The arrays (.npz beside the JSON) are: held_out, the losses of the held-out blocks (fp32, nats a token); dropped_N,
    candidates_N and starts_N, what Focus phase N dropped, as in `BlockSet`.
    """
    folder = Path(job["folder"])
    view = view_run(folder / "run", job["describes"]["name"], MARGIN)
    if missing := view.corpus.missing:
        raise ValueError(f"{folder / 'run'}: its corpus cannot be read any more: {missing}")
    evaluation = json.loads((folder / "held_out.json").read_bytes())
    arrays = {"held_out": np.load(folder / "held_out.npy", allow_pickle=False)}
    for phase in view.phases:
        if phase.focus is not None:
            arrays[f"dropped_{phase.planned.index}"] = phase.focus.dropped.bits
            arrays[f"candidates_{phase.planned.index}"] = phase.focus.dropped.candidates
            arrays[f"starts_{phase.planned.index}"] = np.array(phase.focus.dropped.starts, np.int64)
    target = Path(job["result"]).with_suffix(".npz")
    _save_arrays(target, arrays)
    domains = {name: row["loss"] for name, row in evaluation["corpus"]["domains"].items()}
    kinds, learning = _replay(view, job)
    result = {
        "arrays": target.name,
        "held_out": {"macro": float(np.mean(list(domains.values()))), "domains": domains},
        "tasks": evaluation.get("tasks", {}),
        "compute": _compute(view.run, job),
        "blocks": view.run.plan.n_blocks,
        "phases": [
            {
                "phase": phase.name,
                "kind": phase.kind,
                "samples": phase.samples_so_far,
                "distinct": phase.distinct,
                "domains": dict(zip(view.corpus.domains, phase.visits_by_domain.tolist(), strict=True)),
                "planted": planted,
                "guard": None if phase.verdict is None else phase.verdict.as_dict(),
            }
            for phase, planted in zip(view.phases, kinds, strict=True)
        ],
        "forgetting": dict(zip(CLASSES, view.classes.sum(axis=0).tolist(), strict=True)),
        "learning": learning,
        "train_seconds": sum(seconds_spent(view).values()),
        "version": version("megatron_lfr"),
        "commit": commit(),
    }
    clean: dict[str, Any] = json_value(result)
    return clean


def collect_step(job: dict[str, Any]) -> dict[str, Any]:
    """Return what the JSON of a step before runs holds: the FLOPs of its model, training and passes over the corpus."""
    folder, token_flops = Path(job["folder"]), job["describes"]["token_flops"]
    tokens = 0.0
    if job["kind"] == "train":
        tokens = sum(_trained(open_run(folder / "run")))
    elif job["kind"] == "evaluate":
        blocks = json.loads((folder / "evaluation.json").read_bytes())["corpus"]["blocks"]
        tokens = FORWARD * blocks * job["seq_length"]
    return {"flops": tokens * token_flops, "version": version("megatron_lfr"), "commit": commit()}


def _trained(run: Run) -> tuple[float, float]:
    """Return (training, rescoring) of a run so far, in forward_backward tokens: samples, and passes over its blocks."""
    losses = [run.journal.read(planned.index) for planned in run.plan.phases]
    samples = sum(len(nll) for nll in losses if nll is not None)
    passes = sum(p.phase.is_rescored for p, nll in zip(run.plan.phases, losses, strict=True) if nll is not None)
    return float(samples * run.plan.seq_length), FORWARD * passes * run.plan.n_blocks * run.plan.seq_length


def _compute(run: Run, job: dict[str, Any]) -> dict[str, float]:
    """Count what a run computed, in forward_backward tokens of its model, with all of what was prepared for it."""
    training, rescoring = _trained(run)
    steps = [json.loads(Path(path).read_bytes()) for path in job["steps"]]
    flops = job["describes"]["given_flops"] + sum(step["flops"] for step in steps)
    preparation = flops / job["describes"]["token_flops"]
    return {
        "budget": job["describes"]["budget"],
        "training": training,
        "rescoring": rescoring,
        "preparation": preparation,
        "total": training + rescoring + preparation,
        "preparation_cpu_seconds": sum(step["cpu_seconds"] for step in steps),
    }


def _replay(view: RunView, job: dict[str, Any]) -> tuple[list[dict[str, float] | None], dict[str, list[float | None]]]:
    """Return, for each phase, the tokens that it trained on by planted kind (None where no labels are known), and the
    mean training loss of each domain in the WINDOWS of the first phase, in which all arms take blocks at random."""
    corpus, labels = view.corpus, job.get("labels")
    assert corpus.source is not None
    kinds = None if labels is None else kinds_of_blocks(labels, job["train"]["data_path"], corpus.source, _split(view))
    planted: list[dict[str, float] | None] = []
    learning: dict[str, list[float | None]] = {}
    for history in view.run.phases():
        if kinds is None or labels is None:
            planted.append(None)
        else:
            visits = np.bincount(history.block_ids, minlength=view.run.plan.n_blocks)
            tokens = view.seq_length * (visits @ kinds)
            planted.append(dict(zip(labels["kinds"], tokens.tolist(), strict=True)))
        if not history.planned.index:
            learning = _learning(history, corpus)
    return planted, learning


def _split(view: RunView) -> str:
    return str(view.run.config["split"])


def _learning(history: PhaseHistory, corpus: Corpus) -> dict[str, list[float | None]]:
    domain = np.searchsorted(corpus.starts, history.block_ids, side="right") - 1
    window = np.arange(len(history.nll)) * WINDOWS // max(1, history.planned.samples)
    cells = domain * WINDOWS + window
    cells, nll = cells[history.recorded], history.nll[history.recorded].astype(np.float64)
    size = len(corpus.domains) * WINDOWS
    with np.errstate(invalid="ignore"):
        means = np.bincount(cells, nll, minlength=size) / np.bincount(cells, minlength=size)
    rows = means.reshape(-1, WINDOWS).tolist()
    return {name: json_value(row) for name, row in zip(corpus.domains, rows, strict=True)}


def _save_arrays(target: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(target, buffer.getvalue())


def commit() -> str | None:
    """Return the commit of the source tree that this package is imported from, with + where it has changes; None where
    it is in no repository."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
