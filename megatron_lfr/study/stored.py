"""The results of a study's runs, as they are stored: a JSON and its arrays each."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lfr.fileio import write_atomic
from megatron_lfr.study.layout import Layout, PlannedRun

JOB = "job.json"
"""The file in the folder of a run that says what its process does, and of which settings."""


def result_file(output: Path, name: str) -> Path:
    """Return the JSON of a run, which exists when the run is done."""
    return output / "results" / f"{name}.json"


def arrays_file(result: Path, content: dict[str, Any]) -> Path:
    """Return the file beside a result that its arrays are in; ValueError where it is not there, or damaged."""
    name = content.get("arrays")
    if not isinstance(name, str) or not zipfile.is_zipfile(result.with_name(name)):
        raise ValueError(
            f"{result}: its arrays, {name}, are not there or damaged; remove both, and run the study again"
        )
    return result.with_name(name)


def names_of(run: PlannedRun) -> dict[str, Any]:
    """Return what a result says of its place in the study."""
    return {key: getattr(run, key) for key in ("name", "arm", "corpus", "size", "rate", "seed", "compute_point")}


def read_result(output: Path, run: PlannedRun) -> dict[str, Any] | None:
    """Return a run's result; None where it is not done. ValueError where it was made with other settings."""
    path = result_file(output, run.name)
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
        digest = result["digest"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: no result of a study ({error!r})") from None
    if digest != run.digest:
        raise ValueError(
            f"{path}: was made of something else ({_differing(run, result.get('settings'))}); remove it and"
            f" {run.folder}, or give another --output"
        )
    return result


def read_results(layout: Layout, output: Path) -> dict[str, dict[str, Any]]:
    """Return the results that there are, by digest; errors as of `read_result`."""
    return {run.digest: result for run in layout.runs.values() if (result := read_result(output, run)) is not None}


def share_results(layout: Layout, output: Path) -> dict[str, dict[str, Any]]:
    """Give each run without a result that of one which is the same but for its name, as the reference on one corpus and
    an arm that trains on this corpus whatever the grid says. Returns the results of all that are done, by digest.
    ValueError for a result of other settings, and for one to be shared whose arrays are damaged."""
    known = read_results(layout, output)
    done = {run.digest: path for run in layout.runs.values() if (path := result_file(output, run.name)).exists()}
    for run in layout.runs.values():
        path = result_file(output, run.name)
        if run.digest in known and not path.exists():
            result = known[run.digest]
            arrays = path.with_suffix(".npz")
            write_atomic(arrays, arrays_file(done[run.digest], result).read_bytes())
            shared = {**result, **names_of(run), "arrays": arrays.name}
            write_atomic(path, json.dumps(shared, indent=1, allow_nan=False) + "\n")
    return known


def check_begun(runs: Sequence[PlannedRun]) -> None:
    """Check that what is trained of runs, which have no result, was trained with their settings: `train` would go on
    with another learning rate. What a run is evaluated on may be something else by now. ValueError names the folder of
    each run of which that is not so."""
    if wrong := [said for run in runs if (run.folder / "run").exists() and (said := _begun_otherwise(run))]:
        raise ValueError("\n".join(wrong))


def _begun_otherwise(run: PlannedRun) -> str | None:
    """Say what is wrong with a run that was begun; None where nothing is."""
    try:
        described = json.loads((run.folder / JOB).read_bytes())["describes"]
        digests = {described["digest"], described.get("training")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{run.folder / JOB}: does not say what was begun ({error!r}); remove {run.folder}"
    if digests & {run.digest, run.training}:
        return None
    return (
        f"{run.folder}: was begun with something else ({_differing(run, described.get('settings'))}); remove it, or"
        " give another --output"
    )


def _differing(run: PlannedRun, before: Any) -> str:
    """Say which settings of a run differ from those before."""
    known = before if isinstance(before, dict) else {}
    differing = [
        f"{key}: {known.get(key)!r} -> {value!r}" for key, value in run.settings.items() if known.get(key) != value
    ]
    return ", ".join(differing) or "a corpus, a step before it, the held-out text, a task, or what a preset was"
