"""The score function of the examples, from the command line to order, resume and report."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.analysis import open_run
from megatron_lfr.cli import main
from support.tiny_run import STOPPED, tiny_flags

EXAMPLES = Path(__file__).parents[2] / "examples"


def flags_of(corpus: list[str], save: Path, function: str) -> list[str]:
    schedule = f"[{{kind: learn, duration: 0.6}}, {{kind: focus, duration: 0.4, drop: 0.5, score: 'call:{function}'}}]"
    flags = [*tiny_flags(corpus), "--lfr-schedule", schedule, "--save", str(save)]
    del flags[flags.index("--train-epochs") : flags.index("--train-epochs") + 2]
    return flags


def test_the_example_ranks_within_domains(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "run"
    monkeypatch.delitem(sys.modules, "score_function", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != EXAMPLES])
    flags = flags_of(corpus, save, "score_function:rank_within_domain")
    assert main(["train", *flags]) == 2
    assert "phase 1: score call:score_function:rank_within_domain: importing score_function" in capsys.readouterr().err
    assert not save.exists()
    with monkeypatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        assert main(["train", *flags]) == 0
        stopped = flags_of(corpus, tmp_path / "stopped", "score_function:rank_within_domain")
        assert (
            main(["train", *stopped, "--exit-interval", str(open_run(save).plan.phases[1].first_step + 1)]) == STOPPED
        )
        sys.modules.pop("score_function")
    assert main(["train", *stopped]) == 0  # its scores are in the journal
    for name in ("phase_001.npy", "phase_001.scores.npy"):
        assert (save / "journal" / name).read_bytes() == (tmp_path / "stopped/journal" / name).read_bytes()
    run = open_run(save)  # without the function, which is not on the path any more
    ledger = run.empty_ledger()
    _, focus = run.phases(ledger)
    losses = run.empty_ledger()
    for history in run.phases(losses):
        if history.planned.index == 1:
            break
    starts = run.plan.segments[0].blend.starts
    left_out = focus.selection.left_out(focus.scores) if focus.selection else np.empty(0)
    for first, last in pairwise(starts):
        known = losses.nll[first:last][~np.isnan(losses.nll[first:last])]
        scores = focus.scores[first:last]
        part = losses.nll[first:last]
        below = [((part < loss).sum() + (part[:block] == loss).sum()) / len(known) for block, loss in enumerate(part)]
        np.testing.assert_allclose(scores[~np.isnan(scores)], np.array(below)[~np.isnan(scores)], rtol=1e-6)
        assert abs(left_out[first:last].sum() - len(known) / 2) <= 1  # half of each domain
    assert main(["report", str(save)]) == 0
    assert "on the call:score_function:rank_within_domain" in (save / "report.html").read_text()
    assert main(["inspect", str(save), "--hardest", "1", "--chars", "0"]) == 0
