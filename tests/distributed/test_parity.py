"""Runs in many layouts equal the run of one process: a part of tools/parity_matrix.py, with variants in turn."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import parity_matrix as matrix
import pytest

from megatron_lfr.cli import main
from support.close_runs import assert_close
from support.folder_bytes import folder_bytes

# Without gpipe and optim_grads, which differ from others of these inside of the engine alone: test_engine.py has them.
LAYOUTS = {
    "TP2 SP": "tied, full recomputation",
    "PP2 1f1b": "tied",
    "PP2 interleaved": "tied",
    "CP2": "untied",
    "DP2": "tied",
    "DP2 optim": "untied, selective recomputation",
    "DP2 optim_grads_params": "tied, full recomputation",
    "TP4 SP": "untied",
    "PP4": "tied",
    "TP2 PP2": "dropout",
    "DP4 hybrid": "untied",
    "TP2 PP2 DP2 SP optim": "tied",
}
VARIANTS = matrix.VARIANTS | {"dropout": matrix.FAMILIES["dropout"]}
# Two micro-batches in a step, not four: layers talk most here, and a call of gloo takes milliseconds.
TWO_MICRO_BATCHES = ("TP2 SP", "TP4 SP", "CP2", "PP2 interleaved", "TP2 PP2")
ONE_MICRO_BATCH = ["--micro-batch-size", "8"]
"""Of the references: they are sums over all rows at once."""
RESUMED = ("1", "PP2 interleaved", "DP4 optim_grads_params", "CP2")
BRANCHED = "CP2"
"""Of these, the one that is a branch: it goes on in a folder of its own, and its parent stays as it is."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folders of all runs, by name; of the references by variant."""
    folder = tmp_path_factory.mktemp("parity")
    prefixes = matrix.write_corpus(folder)
    references = [matrix.Case(v, 1, [*flags, *ONE_MICRO_BATCH]) for v, flags in VARIANTS.items()]
    cases = []
    for name, variant in LAYOUTS.items():
        ranks, flags = matrix.LAYOUTS[name]
        size = ["--micro-batch-size", "4"] if name in TWO_MICRO_BATCHES else []
        cases.append(matrix.Case(name, ranks, [*flags, *VARIANTS[variant], *size]))
    matrix.run_cases([*references, *cases, matrix.Case("saved", *matrix.SAVED_IN)], folder, prefixes)
    before = folder_bytes(folder / "saved")
    layouts = matrix.LAYOUTS | matrix.RESUMED
    matrix.resume_elsewhere(folder, prefixes, {name: layouts[name] for name in RESUMED}, copy_or_branch)
    assert folder_bytes(folder / "saved") == before
    return folder


def copy_or_branch(run: Path, to: Path) -> None:
    if to.name.endswith(BRANCHED):
        how = ["--at-step", "10", "--lr-schedule", "inherit"]
        assert main(["branch", "--from", str(run), *how, "--save", str(to)]) == 0
    else:
        shutil.copytree(run, to)


def test_losses_are_far_apart_at_every_threshold(runs: Path) -> None:
    """Else two layouts could order their blocks differently, both rightly."""
    for variant, flags in VARIANTS.items():
        gaps = matrix.threshold_gaps(
            runs / variant, [str(runs / f"{d}_text_document") for d in ("easy", "hard")], flags
        )
        assert len(gaps) == 2
        assert min(gaps) >= 100 * 1e-5


def test_the_reference_learns(runs: Path) -> None:
    steps = matrix.read_run(runs / "tied").steps
    assert len(steps) >= 20
    assert steps[-3:, 0].mean() < 0.8 * steps[:3, 0].mean()
    assert not np.array_equal(steps, matrix.read_run(runs / "untied").steps)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_equals_one_process(name: str, runs: Path) -> None:
    assert_close(runs / name, runs / LAYOUTS[name])


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_in_another_layout(name: str, runs: Path) -> None:
    """TP2 PP2 DP2 saves the checkpoint in the middle of a Focus."""
    saved = matrix.read_steps(runs / "saved")
    assert len(saved) == 10
    assert_close(runs / f"resumed in {name}", runs / "tied")
