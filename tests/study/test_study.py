"""A complete study of a tiny model, killed in the middle and gone on with."""

from __future__ import annotations

import json
import os
import shutil
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

COMPUTE = 16_000
PARTS = ("training", "rescoring", "preparation")
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
    """Return the folder of a study that was killed while its second run trained, then run to its end. An arm of it
    fails, another one prepares a reference model's losses."""
    folder = tmp_path_factory.mktemp("study")
    np.save(folder / "labels.npy", np.repeat([0, 1], 40))
    content = tiny_study(corpus)
    content["corpora"]["toy"]["labels"] = {"file": str(folder / "labels.npy"), "kinds": ["counting", "noise"]}
    content["compute"] = COMPUTE
    content["train"]["save_interval"] = 20
    content["arms"]["broken"] = {"settings": {"lfr_schedule": "uniform", "callback": ["nowhere:Nothing"]}}
    steps = {"reference": {"train": {"data_path": [corpus[0]], "train_iters": 5}}, "losses": {"evaluate": "reference"}}
    content["arms"]["prepared"] = {"prepare": steps, "settings": {"lfr_schedule": "lfr"}}
    content["grid"] = [{"arms": ["uniform", "lfr"]}, {"arms": ["broken", "prepared"], "seeds": [1]}]
    content["contrasts"] = {"primary": ["lfr"]}
    write_study(folder / "study.yaml", content)
    first, second = (f"toy.S.cosine.uniform.s{seed}" for seed in (1, 2))
    checkpoint = folder / "out" / "runs" / second / "run" / "checkpoints" / "iter_0000020"
    killed = start(folder, "--only", "*.uniform.*")
    assert wait_until(checkpoint.exists, lambda: killed.poll() is None), finish(killed)
    killed.kill()
    finish(killed)
    assert (folder / "out" / "results" / f"{first}.json").exists()
    assert not (folder / "out" / "results" / f"{second}.json").exists()
    code, printed = finish(start(folder))
    assert code == 1, printed
    assert "6 runs: 1 are done" in printed
    assert "toy.S.cosine.broken.s1: failed with code 2" in printed
    assert printed.count("failed") == 1
    return folder / "out"


def results(study: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_bytes()) for path in (study / "results").glob("*.json")}


def test_nothing_is_run_twice_and_what_was_killed_goes_on(study: Path) -> None:
    logs = {path.name: (path / "log.txt").read_text() for path in (study / "runs").iterdir()}
    killed, broken = "toy.S.cosine.uniform.s2", "toy.S.cosine.broken.s1"
    started = {name: log.count(JOB) for name, log in logs.items() if name != broken}
    assert started == {name: 1 + (name == killed) for name in results(study)}
    assert "continuing" in (study / "runs" / killed / "log.txt").read_text()


def test_a_finished_study_runs_nothing(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (study / "results").iterdir()}
    monkeypatch.chdir(study.parent)
    assert main(["study.yaml", "--output", "out", "--jobs", "1", "--only", "*uniform*", "*lfr*"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (study / "results").iterdir()} == before


def test_results_hold_what_the_run_did(study: Path) -> None:
    for name, result in results(study).items():
        run = open_run(study / "runs" / name / "run")
        visits = [history.block_ids for history in run.phases()]
        compute = result["compute"]
        assert compute["training"] == 16 * sum(map(len, visits))
        assert COMPUTE - 128 < compute["total"] == sum(compute[part] for part in PARTS) <= COMPUTE
        for phase, ids in zip(result["phases"], visits, strict=True):
            assert phase["samples"] == len(ids)
            assert sum(phase["planted"].values()) == pytest.approx(16 * len(ids))
            assert phase["planted"]["noise"] == pytest.approx(16 * phase["domains"]["hard"])
        with np.load(study / "results" / result["arrays"], allow_pickle=False) as arrays:
            assert np.isfinite(arrays["held_out"]).all()
        assert result["held_out"]["macro"] == pytest.approx(np.mean(list(result["held_out"]["domains"].values())))


def test_the_report_compares_pairs(study: Path) -> None:
    report = json.loads((study / "report.json").read_bytes())
    losses = {name: result["held_out"]["macro"] for name, result in results(study).items()}
    (cell,) = report["cells"]
    (contrast,) = (row for row in cell["contrasts"] if row["name"] == "lfr - uniform")
    pairs = [losses[f"toy.S.cosine.lfr.s{seed}"] - losses[f"toy.S.cosine.uniform.s{seed}"] for seed in (1, 2)]
    assert contrast["by_seeds"]["mean"] == pytest.approx(np.mean(pairs))
    assert contrast["by_documents"]["mean"] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert report["open_runs"] == ["toy.S.cosine.broken.s1"]
    assert {row["arm"] for row in report["similarity"]} == {"lfr", "prepared"}


def test_the_page_needs_nothing_else_and_shows_every_arm(study: Path) -> None:
    page = (study / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    text = (study / "report.md").read_text()
    for part in ("uniform", "lfr", "noise", "Held-out loss at equal compute"):
        assert part in page
        assert part in text


def test_damaged_arrays_of_a_result_are_named(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study.parent)
    shutil.copytree(study / "results", tmp_path / "out/results")
    arrays = tmp_path / "out/results/toy.S.cosine.lfr.s1.npz"
    for damage in (lambda: arrays.write_bytes(arrays.read_bytes()[:200]), arrays.unlink):
        damage()
        with pytest.raises(ValueError, match=r"lfr.s1.json: its arrays, .*s1.npz, are not there or damaged"):
            main(["study.yaml", "--output", str(tmp_path / "out"), "--report-only"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": None}, "TypeError"),
        ({"held_out": {"macro": 3.0, "domains": {}}}, "a loss or its compute is no number"),
        ({"held_out": {"macro": "3", "domains": {"easy": 3.0}}}, "a loss or its compute is no number"),
        ({"compute": {}}, "KeyError..total"),
        ({"seed": "a"}, "its seed is 'a'"),
    ],
)
def test_a_damaged_result_is_named(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(study.parent)
    shutil.copytree(study / "results", tmp_path / "out/results")
    path = tmp_path / "out/results/toy.S.cosine.lfr.s1.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(
        ValueError, match=f"lfr.s1.json: no result of toy.S.cosine.lfr.s1, or damaged .*{message}.*; remove it"
    ):
        main(["study.yaml", "--output", str(tmp_path / "out"), "--report-only"])


def test_losses_of_other_held_out_blocks_are_named(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.parent)
    shutil.copytree(study / "results", tmp_path / "out/results")
    np.savez(tmp_path / "out/results/toy.S.cosine.lfr.s1.npz", held_out=np.zeros(7, np.float32))
    with pytest.raises(
        ValueError, match=r"no result of toy.S.cosine.lfr.s1, or damaged .*it has losses \[7\] of \d+ held-out blocks"
    ):
        main(["study.yaml", "--output", str(tmp_path / "out"), "--report-only"])


def test_results_of_other_settings_are_refused(
    study: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = tiny_study(corpus)
    content["compute"] = COMPUTE + 1024
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / "study.yaml", content)
    with pytest.raises(ValueError, match=r"was made of something else .*train_iters: 125 -> 133"):
        main(["study.yaml", "--output", str(study)])


def test_what_is_prepared_is_done_once_and_counted(study: Path) -> None:
    (losses,) = (study / "prepared").glob("losses-*/losses.npy")
    (reference,) = (study / "prepared").glob("reference-*/step.json")
    result = results(study)["toy.S.cosine.prepared.s1"]
    blocks = result["blocks"]
    assert np.load(losses, allow_pickle=False).shape == (blocks,)
    assert result["compute"]["preparation"] == pytest.approx(5 * 128 + blocks * 16 / 3)
    assert json.loads(reference.read_bytes())["flops"] == 5 * 128 * result["token_flops"]
    assert result["compute"]["preparation_cpu_seconds"] > 0
