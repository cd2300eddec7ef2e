"""A complete study of a tiny model, killed in the middle and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lfr.analysis import open_run
from megatron_lfr.study.command import main
from support.study_samples import tiny_study, write_study
from support.waiting import finish, wait_until

JOB = "attention: "
"""A line that a run prints once each time it is started."""


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "megatron_lfr", "study", "study.yaml", "--output", "out", "--jobs", "1", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def study(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a study that was killed while its second run trained, then run to its end."""
    folder = tmp_path_factory.mktemp("study")
    documents = 40
    np.save(folder / "labels.npy", np.repeat([0, 1], documents))
    content = tiny_study(corpus)
    content["corpora"]["toy"]["labels"] = {"file": str(folder / "labels.npy"), "kinds": ["counting", "noise"]}
    content["compute"] = 40_000
    content["train"]["save_interval"] = 20
    content["contrasts"] = {"primary": ["lfr"]}
    write_study(folder / "study.yaml", content)
    first, second = (folder / "out" / "runs" / f"toy.S.cosine.uniform.s{seed}" for seed in (1, 2))
    killed = start(folder)
    assert wait_until(lambda: (second / "run" / "checkpoints" / "iter_0000020").exists(), lambda: killed.poll() is None)
    killed.kill()
    finish(killed)
    assert (folder / "out" / "results" / f"{first.name}.json").exists()
    assert not (folder / "out" / "results" / f"{second.name}.json").exists()
    code, printed = finish(start(folder))
    assert code == 0, printed
    assert "4 runs: 1 are done" in printed
    return folder / "out"


def results(study: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_bytes()) for path in (study / "results").glob("*.json")}


def test_nothing_is_run_twice_and_what_was_killed_goes_on(study: Path) -> None:
    started = {path.name: (path / "log.txt").read_text().count(JOB) for path in (study / "runs").iterdir()}
    killed = "toy.S.cosine.uniform.s2"
    assert started == {name: 1 + (name == killed) for name in results(study)}
    assert "continuing" in (study / "runs" / killed / "log.txt").read_text()


def test_a_finished_study_runs_nothing(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (study / "results").iterdir()}
    monkeypatch.chdir(study.parent)
    assert main(["study.yaml", "--output", "out", "--jobs", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (study / "results").iterdir()} == before


def test_results_hold_what_the_run_did(study: Path) -> None:
    for name, result in results(study).items():
        run = open_run(study / "runs" / name / "run")
        visits = [history.block_ids for history in run.phases()]
        assert result["compute"]["training"] == 16 * sum(map(len, visits)) == 128 * (40_000 // 128)
        for phase, ids in zip(result["phases"], visits, strict=True):
            assert phase["samples"] == len(ids)
            assert sum(phase["planted"].values()) == pytest.approx(16 * len(ids))
            assert phase["planted"]["noise"] == pytest.approx(16 * phase["domains"]["hard"])
        with np.load(study / "results" / result["arrays"], allow_pickle=False) as arrays:
            half = len(arrays["held_out"]) // 2
            assert np.isfinite(arrays["held_out"]).all()
        assert result["held_out"]["macro"] == pytest.approx(np.mean(list(result["held_out"]["domains"].values())))
        assert half


def test_the_report_compares_pairs(study: Path) -> None:
    report = json.loads((study / "report.json").read_bytes())
    losses = {name: result["held_out"]["macro"] for name, result in results(study).items()}
    (cell,) = report["cells"]
    (contrast,) = cell["contrasts"]
    pairs = [losses[f"toy.S.cosine.lfr.s{seed}"] - losses[f"toy.S.cosine.uniform.s{seed}"] for seed in (1, 2)]
    assert contrast["by_seeds"]["mean"] == pytest.approx(np.mean(pairs))
    assert contrast["by_documents"]["mean"] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert report["open_runs"] == []
    assert {row["arm"] for row in report["similarity"]} == {"lfr"}


def test_the_page_needs_nothing_else_and_shows_every_arm(study: Path) -> None:
    page = (study / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    text = (study / "report.md").read_text()
    for part in ("uniform", "lfr", "noise", "Held-out loss at equal compute"):
        assert part in page
        assert part in text


def test_results_of_other_settings_are_refused(
    study: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = tiny_study(corpus)
    content["compute"] = 41_000
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / "study.yaml", content)
    with pytest.raises(ValueError, match=r"was made of something else .*train_iters: 312 -> 320"):
        main(["study.yaml", "--output", str(study)])


def test_a_failed_run_stops_no_other(corpus: list[str], tmp_path: Path) -> None:
    content = tiny_study(corpus)
    content["seeds"] = [1]
    content["arms"]["uniform"]["settings"]["callback"] = ["nowhere:Nothing"]
    write_study(tmp_path / "study.yaml", content)
    code, printed = finish(start(tmp_path))
    assert code == 1
    assert "toy.S.cosine.uniform.s1: failed with code 2" in printed
    assert "toy.S.cosine.lfr.s1: done" in printed
    assert not list((tmp_path / "out" / "results").glob("*uniform*"))


def test_sigterm_lets_a_run_save(corpus: list[str], tmp_path: Path) -> None:
    content = tiny_study(corpus)
    content["compute"] = 1_000_000
    write_study(tmp_path / "study.yaml", content)
    process = start(tmp_path, "--only", "*.uniform.s1")
    run = tmp_path / "out" / "runs" / "toy.S.cosine.uniform.s1" / "run"
    trains = wait_until(lambda: (run / "metrics.jsonl").exists() and bool((run / "metrics.jsonl").stat().st_size),
                        lambda: process.poll() is None)  # fmt: skip
    assert trains
    process.send_signal(signal.SIGTERM)
    code, _ = finish(process)
    assert code != 0
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").exists()
