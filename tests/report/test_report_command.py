"""`megatron-lfr report` as a shell sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lfr.cli import main
from megatron_lfr.report.command import run_names


def test_the_page_goes_into_the_run_or_into_the_given_file(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    assert main(["report", str(run_folder)]) == 0
    assert capsys.readouterr().out == f"report: {run_folder / 'report.html'}\n"
    elsewhere = tmp_path / "page.html"
    assert main(["report", str(run_folder), "--output", str(elsewhere), "--margin", "0.3"]) == 0
    assert "more than 0.3 nats" in elsewhere.read_text()
    (run_folder / "report.html").unlink()
    assert before == {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}


def test_the_same_run_gives_the_same_page(run_folder: Path, tmp_path: Path) -> None:
    pages = [tmp_path / name for name in ("a.html", "b.html")]
    pages[1].touch()
    for page in (*pages, pages[0]):  # the last time, it replaces its own
        assert main(["report", str(run_folder), "--output", str(page)]) == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}/nowhere"], "no such folder"),
        (["{run}/journal"], "no journal"),
        (["{run}", "{run}/../mine"], "given twice"),
        (["{run}", "--margin", "-1"], "--margin -1.0: must be"),
        (["{run}", "--output", "{run}/no/page.html"], "--output"),
        (["{run}", "--output", "{run}"], "is a folder"),
        (["{run}", "--output", "{run}/config.yaml"], "config.yaml: holds something else already"),
        (["{run}", "--output", "{run}/../pipe"], "pipe: is no regular file, and would be replaced"),
        (["{run}", "--output", "{run}/../link"], "link: is no regular file, and would be replaced"),
    ],
)
def test_bad_input_is_named(
    run_folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(run_folder.parent / "pipe")
    (run_folder.parent / "link").symlink_to(run_folder / "config.yaml")  # as /dev/stdout is one
    assert main(["report", *(word.format(run=run_folder) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-lfr report: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_page_of_somebody_elses_is_not_replaced(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "report.html").write_text("mine")
    assert main(["report", str(run_folder)]) == 2
    assert "report.html: holds something else already" in capsys.readouterr().err
    assert (run_folder / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    "line", ['{"event": "train", "step": "x"}', '{"event": "evaluation", "loss": 1.0}', "[1]", "{"]
)
def test_a_damaged_line_is_named(run_folder: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert main(["report", str(run_folder)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    assert not (run_folder / "report.html").exists()


def test_names_tell_runs_apart() -> None:
    assert run_names([Path("/a/b/run")]) == ["b/run"]
    assert run_names([Path("/a/b/run"), Path("/c/b/run")]) == ["a/b/run", "c/b/run"]


def test_it_needs_no_torch(run_folder: Path) -> None:
    program = """
import sys
sys.modules["torch"] = None  # any import of it fails
from pathlib import Path
import megatron_lfr.report.command as command
command.write_report(command.ReportConfig((Path(sys.argv[1]),)))
"""
    done = subprocess.run([sys.executable, "-c", program, str(run_folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (run_folder / "report.html").exists()
