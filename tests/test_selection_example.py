"""The example of docs/selection.md, from commonness to a run and its report, on a tiny corpus."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_lfr.analysis import open_run
from megatron_lfr.cli import main
from megatron_lfr.data.corpus.blocks import BlockDataset

JUNK = ("shuffled", "coded")
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "selection.md").read_text()


def code(language: str) -> list[str]:
    """Return the blocks of a language in the section of the example."""
    section = PAGE[PAGE.index("## An example") : PAGE.index("## Limits")]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def run_commands(block: str) -> None:
    """Run the page's commands, on less text and for less long."""
    for line in block.replace("\\\n", " ").splitlines():
        program, *words = (expanded for word in shlex.split(line) for expanded in expand_braces(word))
        if program == "megatron-lfr":
            assert main([*words, *(["--train-epochs", "0.6"] if words[0] == "train" else [])]) == 0, line
        else:
            script = program.replace("$MEGATRON_LFR", str(ROOT))
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            subprocess.run([script, *words, "--megabytes", "0.8"], env={**os.environ, "PATH": path}, check=True)


def expand_braces(word: str) -> list[str]:
    """Expand a{b,c}d as a shell does."""
    before, opening, rest = word.partition("{")
    inner, _, after = rest.partition("}")
    return [before + part + after for part in inner.split(",")] if opening else [word]


def test_the_example_leads_from_commonness_to_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before, after = code("bash")
    run_commands(before)
    (schedule,) = code("yaml")
    Path("schedule.yaml").write_text(schedule)
    run_commands(after)

    weight = np.load("commonness/block_weight.npy")
    labels = Path("redundant.labels").read_text().splitlines()
    prefixes = expand_braces("data/redundant_{code,docstrings,reference,unicode}_text_document")
    corpus = BlockDataset(prefixes, 128, "99,1,0")
    starts = np.cumsum([0, *(prefix.num_documents for prefix in corpus.datasets)])
    domains = np.searchsorted(corpus.train.domain_starts, np.arange(len(weight)), side="right") - 1
    last = [starts[domain] + corpus.train.documents_of(block)[-1] for block, domain in enumerate(domains)]
    is_junk = np.array([labels[document] in JUNK for document in last])
    assert is_junk[weight == 0].mean() > 0.7
    assert is_junk.mean() < 0.3
    learn, focus, review = open_run("run").phases()
    for phase in (learn, focus, review):
        assert weight[phase.order].min() > 0  # what is junk alone is never trained on
    visits = np.bincount(np.concatenate((learn.order, review.order)), minlength=len(weight))
    copied = (weight > 0) & (weight < 0.4)
    assert 0 < visits[copied].mean() < 0.7 * visits[weight == 1].mean()
    assert focus.selection is not None
    scored = int((~np.isnan(focus.scores)).sum())
    assert focus.selection.dropped_hardest == pytest.approx(0.15 * scored, abs=1)
    left_out = focus.selection.left_out(focus.scores)
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
