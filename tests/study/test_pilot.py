"""`megatron-lfr study --pilot`: the sample, the study that is made of it, and the sentence at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lfr.cli import main
from megatron_lfr.commonness.clean import KEPT
from megatron_lfr.commonness.command import CommonnessConfig
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.lfr import preset
from megatron_lfr.study import pilot
from megatron_lfr.study.definition import read_study
from megatron_lfr.study.layout import lay_out_study
from megatron_lfr.study.pilot import PilotConfig, advice, definition, prepare
from megatron_lfr.study.sample import ALL, Sample, first_clusters, make_sample
from support.commonness_samples import documents, write


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write two prefixes of 60 documents each, of which the second has 30 of the first once more."""
    folder, texts = tmp_path_factory.mktemp("pilot"), documents()
    return [write(folder / "mine_web", texts[:60]), write(folder / "mine_code", texts[30:90])]


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("pilot_trusted") / "trusted", documents()[100:160])


def look(corpus: list[str], folder: Path) -> CommonnessConfig:
    return CommonnessConfig(corpus, folder / "commonness", seq_length=128, split=ALL)


def read(prefixes: list[str]) -> list[bytes]:
    datasets = BlockDataset(prefixes, 1, "1").datasets
    return [bytes(one.document(i)) for one in datasets for i in range(one.num_documents)]


@pytest.mark.parametrize("tokens", [0, 1, 500, 10**9])
def test_clusters_are_taken_whole_until_there_is_enough(tokens: int, rng: np.random.Generator) -> None:
    cluster = np.minimum(np.arange(300), rng.integers(0, 300, 300))
    cluster = np.array([cluster[c] if cluster[c] == c else c for c in cluster])  # every number is one of its members
    lengths = rng.integers(1, 20, 300)
    chosen = first_clusters(cluster, lengths, tokens)
    assert set(cluster[chosen]).isdisjoint(cluster[~chosen])
    held = int(lengths[chosen].sum())
    largest = max(int(lengths[cluster == c].sum()) for c in cluster)
    assert min(tokens, int(lengths.sum())) <= held < max(1, tokens + largest)
    assert (first_clusters(cluster, lengths, tokens) == chosen).all()
    others = first_clusters(cluster, lengths, 10**9, without=chosen)
    assert (others == ~chosen).all()


def test_copies_stay_together_and_are_not_held_out(corpus: list[str], tmp_path: Path) -> None:
    every = read(corpus)
    total = sum(len(one) // 2 for one in every)
    sample = make_sample(look(corpus, tmp_path), [], total // 2, tmp_path)
    sampled, held_out = read(sample.data_path), read(sample.held_out)
    assert sample.trusted == []
    assert held_out
    assert not set(sampled) & set(held_out)
    assert len(set(held_out)) == len(held_out)
    assert all(sampled.count(one) == every.count(one) for one in sampled)
    assert total // 2 <= sample.tokens < total // 2 + 2 * max(map(len, every))
    assert sample.tokens == sum(len(one) // 2 for one in sampled)
    assert (tmp_path / "sample" / KEPT).exists()


def test_trusted_text_is_held_out_or_a_reference(corpus: list[str], trusted: str, tmp_path: Path) -> None:
    sample = make_sample(look(corpus, tmp_path), [trusted], 10**9, tmp_path)
    assert sorted(read(sample.data_path)) == sorted(read(corpus))
    held_out, left = read(sample.held_out), read(sample.trusted)
    assert sorted([*held_out, *left]) == sorted(read([trusted]))
    assert 0 < len(held_out) < len(left)


def test_its_study_is_one_that_the_study_command_takes(corpus: list[str], trusted: str, tmp_path: Path) -> None:
    config = PilotConfig(corpus, tmp_path / "out", vocab_size=1024, reference_data_path=[trusted], epochs=4)
    file = prepare(config)
    study = read_study(file)
    layout = lay_out_study(study, config.output)
    assert {run.arm for run in layout.runs.values()} == {"uniform", "cleaned", "weight", "cleaned-focus", "lfr"}
    assert len(layout.runs) == config.seeds * 6
    flags = {step.settings["memory_gb"] for step in layout.steps.values() if step.step.kind == "commonness"}
    assert flags == {config.memory_gb}
    assert all(abs(run.compute.total - run.compute.budget) < 16 * 128 for run in layout.runs.values())
    before = file.read_bytes()
    assert prepare(config) == file
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match="holds the pilot of another command"):
        prepare(PilotConfig(corpus, config.output, vocab_size=1024, minutes=6))


def test_it_does_not_train_uniform_twice() -> None:
    for epochs, has_focus in ((1.0, False), (1.3, False), (1.4, True)):
        config = PilotConfig(["a"], Path("out"), vocab_size=1024, epochs=epochs)
        assert ("lfr" in definition(config, Sample([], [], [], 10**6), 1e6)["arms"]) == has_focus
        plan = preset("lfr").plan(1000, 8, 4, train_epochs=epochs)
        second = plan.phases[3]
        assert (second.first_step * 4 >= 1000) == has_focus


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --tokenizer-model and --vocab-size"),
        (["--vocab-size", "100", "--minutes", "nan"], "--minutes nan: must be at least 0.1"),
        (["--vocab-size", "100", "--data-path", "nothing"], "--data-path nothing: nothing.idx: no such file"),
        (["--vocab-size", "100", "--output", __file__], f"--output {__file__}: {__file__} is no folder"),
        (["--vocab-size", "100", "--seeds", "1"], "--seeds 1: must be at least 2"),
        (["--vocab-size", "100", "--data-path", "0.5", "a", "0.5", "b"], "--data-path: a pilot takes prefixes without"),
        (["--vocab-size", "100", "--data-path", "x/a", "y/a"], "--data-path: prefixes that are cleaned need different"),
        (
            ["--vocab-size", "100", "--data-path", "a", "b", "--reference-data-path", "b"],
            "--reference-data-path b: is in --data-path",
        ),
    ],
)
def test_wrong_flags_are_named(
    flags: list[str], message: str, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "--pilot", "--data-path", *corpus, "--output", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "arm", "expected"),
    [
        ("nothing pays", None, "uniform: nothing pays here"),
        ("not decided", None, "nothing is shown to pay; the intervals leave room for a gain of 0.030 nats"),
        (
            "pays",
            "weight",
            "--lfr-schedule uniform --lfr-scores weight=FOLDER/block_weight.npy; at this size, a token so chosen was "
            "worth 1.30",
        ),
        ("pays", "cleaned", "`megatron-lfr commonness --cleaned-output`"),
    ],
)
def test_the_sentence_says_what_to_do(kind: str, arm: str | None, expected: str) -> None:
    row: dict[str, Any] = {"token_equivalent": {"mean": 1.3, "low": 1.2, "high": 1.4}, "token_equivalent_beyond": False}
    arms = [{"arm": name, **row} for name in ("uniform", "weight", "cleaned")]
    contrasts = [{"by_seeds": {"low": low}} for low in (-0.03, -0.01)]
    cell = {"verdict": {"kind": kind, "arm": arm}, "arms": arms, "contrasts": contrasts}
    assert expected in advice({"cells": [cell], "reference": "uniform"})


@pytest.mark.parametrize("equivalent", [None, {"mean": 1.3, "low": None, "high": None}])
def test_the_sentence_where_it_cannot_be_said_what_a_token_is_worth(equivalent: dict[str, Any] | None) -> None:
    arms = [{"arm": "cleaned", "token_equivalent": equivalent, "token_equivalent_beyond": False}]
    contrasts = [{"arm": "cleaned", "by_seeds": {"mean": -0.1234}}]
    cell = {"verdict": {"kind": "pays", "arm": "cleaned"}, "arms": arms, "contrasts": contrasts}
    assert "its loss was 0.123 nats below that of uniform" in advice({"cells": [cell], "reference": "uniform"})


@pytest.mark.parametrize("kept", [1, 5])
def test_too_little_trusted_text_is_refused_before_the_corpus_is_read(
    corpus: list[str], tmp_path: Path, kept: int
) -> None:
    """Of a single document nothing would be left, and a tenth of a few is shorter than a block."""
    trusted = write(tmp_path / "trusted", [one[:100] for one in documents()[100 : 100 + kept]])
    with pytest.raises(
        ValueError, match=rf"--reference-data-path: too small \({kept * 100} tokens in {kept} documents"
    ):
        make_sample(look(corpus, tmp_path), [trusted], 10**9, tmp_path)
    assert not (tmp_path / "commonness").exists()


def test_too_little_time_is_refused_before_the_corpus_is_read(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PilotConfig(corpus, tmp_path / "out", vocab_size=1024, minutes=0.1, seq_length=16)
    monkeypatch.setattr(pilot, "_tokens_per_second", lambda config: 100.0)
    with pytest.raises(ValueError, match=r"--minutes 0.1 is enough for 0 steps a run; at least 20 are needed"):
        prepare(config)
    assert not (tmp_path / "out").exists()


def test_a_domain_that_is_smaller_than_a_block_is_left_out(corpus: list[str], tmp_path: Path) -> None:
    small = write(tmp_path / "mine_small", [one[:40] for one in documents()[120:126]])
    sample = make_sample(look([*corpus, small], tmp_path), [], 6000, tmp_path)
    assert [Path(prefix).name for prefix in sample.data_path] == ["mine_web", "mine_code"]
    assert BlockDataset(sample.data_path, 128, "1").train.num_blocks > 0
    assert BlockDataset(sample.held_out, 128, "1").train.num_blocks > 0
    assert sample.tokens == sum(len(one) // 2 for one in read(sample.data_path))
