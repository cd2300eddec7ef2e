"""A gradient that is infinite on one rank: nothing of the step counts on any machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parity_matrix as matrix

from megatron_lfr.analysis.replay import open_run
from support import skipped_step_cases as cases
from support.two_ranks import train_two_ranks


def test_an_infinite_gradient_of_one_rank_counts_on_no_machine(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [
        *matrix.run_flags(matrix.write_corpus(tmp_path), folder),
        *("--tensor-model-parallel-size", "2", "--lfr-schedule", "uniform", "--train-iters", "5"),
    ]
    train_two_ranks(arguments, tmp_path / "said", machines=2, prepare=cases.overflow_on_rank_1)
    journals = [path / "journal/phase_000.npy" for path in (folder, folder / "scratch/node_1")]
    assert journals[0].read_bytes() == journals[1].read_bytes()
    losses = np.load(journals[0]).reshape(5, 8)
    assert [(row > 0).all() for row in losses] == [step != cases.SKIPPED for step in range(5)]
    assert (losses[cases.SKIPPED] == -1).all()
    (history,) = open_run(folder).phases()
    ledger = open_run(folder).ledger()
    taken = history.order[: losses.size][losses.ravel() != -1]
    assert ledger.visits.sum() == len(taken)
    assert set(np.flatnonzero(ledger.visits)) == set(taken.tolist())
