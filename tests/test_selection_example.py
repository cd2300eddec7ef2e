"""The example of docs/selection.md, from commonness to a run and its report, on a tiny corpus."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_lfr.analysis import open_run
from megatron_lfr.cli import main
from megatron_lfr.run_folder import open_corpus
from support.script import run_script

JUNK = ("shuffled", "base64", "hex", "digits")
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "selection.md").read_text()


def code(language: str) -> list[str]:
    """Return the blocks of a language in the section of the example."""
    section = PAGE[PAGE.index("## An example") : PAGE.index("## Limits")]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def run_commands(block: str, demo_size: int) -> None:
    """Run the page's commands, on less text and for less long."""
    for line in block.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        if program == "megatron-lfr":
            assert main([*words, *(["--train-epochs", "0.6"] if words[0] == "train" else [])]) == 0, line
        else:
            assert program == "python"
            script = words[0].replace("$MEGATRON_LFR", str(ROOT))
            more = ["--kilobytes-per-domain", str(demo_size)] if "demo" in script else []
            run_script(script, *words[1:], *more)


def test_the_example_leads_from_commonness_to_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before, after = code("bash")
    run_commands(before, demo_size=200)
    (weigh,) = code("python")
    exec(compile(weigh, "selection.md", "exec"), {})
    (schedule,) = code("yaml")
    Path("schedule.yaml").write_text(schedule)
    run_commands(after, demo_size=0)
    assert "weight.npy.json says of which corpus" in capsys.readouterr().out

    weight = np.load("weight.npy")
    labels = [json.loads(line)["kind"] for line in Path("data/labels.jsonl").read_text().splitlines()]
    assert (weight == 0).mean() == pytest.approx(0.12, abs=0.01)
    documents = open_corpus(open_run("run").folder).documents
    is_junk = [labels[documents(block)[1]] in JUNK for block in range(len(weight))]
    share = float(np.mean([is_junk[block] for block in np.flatnonzero(weight == 0)]))
    assert share > 2.5 * np.mean(is_junk)
    assert {"unique", "copy", "copy edited", "boilerplate", "shuffled"} <= set(labels)
    learn, focus, review = open_run("run").phases()
    for phase in (learn, focus, review):
        assert weight[phase.order].min() > 0  # the junk is never trained on
    visits = np.bincount(np.concatenate((learn.order, review.order)), minlength=len(weight))
    copied = (weight > 0) & (weight < 0.4)
    assert 0 < visits[copied].mean() < 0.7 * visits[weight == 1].mean()
    assert focus.selection is not None
    scored = int((~np.isnan(focus.scores_at_start)).sum())
    assert focus.selection.dropped_hardest == pytest.approx(0.15 * scored, abs=1)
    left_out = focus.selection.left_out(focus.scores_at_start)
    assert 0 < left_out[focus.order].mean() < 0.1  # those that are explored
    page = Path("run/report.html").read_text()
    assert "dropped as hard" in page
    assert "Blocks count by file:weight. 10.0 % drawn at random from all blocks." in page


def test_what_the_page_lists_is_what_phases_take() -> None:
    keys = set(re.findall(r"^\| `(\w+)`(?:, `(\w+)`)?", PAGE, re.MULTILINE))
    named = {key for pair in keys for key in pair if key}
    (schedule,) = code("yaml")
    used = {key for row in yaml.safe_load(schedule) for key in row}
    assert used - named == {"kind", "duration", "unit", "unseen"}
