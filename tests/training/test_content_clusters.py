"""--lfr-clusters, from the example that makes the file to order, resume and report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_lfr.analysis import open_run
from megatron_lfr.cli import main
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.preprocess.writer import IndexedDatasetWriter
from support.tiny_run import STOPPED, tiny_flags

EXAMPLE = Path(__file__).parents[2] / "examples" / "content_clusters.py"


def make_clusters(data_path: list[str], output: Path, split: str, clusters: int) -> None:
    flags = ["--data-path", *data_path, "--seq-length", "16", "--split", split, "--clusters", str(clusters)]
    done = subprocess.run([sys.executable, EXAMPLE, *flags, "--output", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_blocks_of_the_same_words_are_a_cluster(tmp_path: Path) -> None:
    rng, topics = np.random.default_rng(0), 5
    prefix = tmp_path / "topics_text_document"
    truth = rng.integers(0, topics, 300)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for topic in truth:
            writer.add_document(np.where(rng.random(16) < 0.8, 40 * topic, 0) + rng.integers(0, 40, 16))
    make_clusters([str(prefix)], tmp_path / "clusters.npy", "100,0,0", topics)
    clusters = np.load(tmp_path / "clusters.npy")
    assert clusters.dtype == np.uint32
    assert len(clusters) == BlockDataset([str(prefix)], 16, "100,0,0").train.num_blocks
    table = np.zeros((topics, topics), int)
    np.add.at(table, (truth[: len(clusters)], clusters), 1)
    assert table.max(1).sum() > 0.95 * len(clusters)
    assert len(set(table.argmax(1).tolist())) == topics


def test_a_run_drops_clusters_of_content(corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, save = tmp_path / "clusters.npy", tmp_path / "run"
    make_clusters(corpus, path, "90,10,0", 6)
    schedule = "[{kind: learn, duration: 1}, {kind: focus, duration: 0.4, drop: 0.5, selection: clusters}]"
    flags = [*tiny_flags(corpus), "--lfr-schedule", schedule, "--save", str(save), "--lfr-clusters", str(path)]
    del flags[flags.index("--train-epochs") : flags.index("--train-epochs") + 2]
    assert main(["train", *flags, "--exit-interval", "4"]) == STOPPED
    without = flags[: flags.index("--lfr-clusters")]
    capsys.readouterr()
    assert main(["train", *without]) == 2
    assert "--lfr-schedule" in capsys.readouterr().err
    assert main(["train", *flags]) == 0
    run = open_run(save)
    assert run.plan.phases[1].phase.cluster_by == "file:clusters"
    clusters = np.load(path)
    _, focus = run.phases()
    means = {c: focus.scores[clusters == c].mean(dtype=np.float64) for c in set(clusters.tolist())}
    visited = {int(c) for c in clusters[focus.order]}
    assert visited == set(sorted(means, key=lambda c: means[c])[-len(visited) :])
    assert 0.5 <= np.isin(clusters, [*visited]).mean() < 1
    assert main(["report", str(save)]) == 0
    other = clusters.copy()
    other[0] += 1
    np.save(path, other)
    capsys.readouterr()
    assert main(["report", str(save)]) == 2
    assert "is not the file that clusters.npy.json beside it describes" in capsys.readouterr().err
