"""Complete runs through the command line, judged by the files that they write."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.checkpoint import store as store_module
from megatron_lfr.cli import main
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.data.corpus.indexed import IndexedDataset
from megatron_lfr.data.corpus.loader import Loader
from megatron_lfr.data.corpus.sidecar import Sidecar
from megatron_lfr.parallel.groups import shutdown
from megatron_lfr.training import opening
from support.tiny_run import STOPPED
from support.waiting import LIMIT


def run(args: list[str]) -> int:
    return main(["train", *args])


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_start_prints_once_what_computes_the_layers(
    tiny_args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*tiny_args, "--train-epochs", "1", "--lfr-schedule", "uniform"]
    monkeypatch.setattr(opening, "describe_layers", lambda *settings: f"layers: {settings}")
    assert run(flags) == 0
    assert capsys.readouterr().out.count("layers: ('cpu', False, 'torch')\n") == 1


def test_a_run_learns_and_leaves_its_folder(
    tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*tiny_args, "--train-epochs", "3"]) == 0
    folder = tmp_path / "run"
    events = metrics(folder)
    phases = [event for event in events if event["event"] == "phase"]
    assert [event["kind"] for event in phases] == ["learn", "focus", "review", "focus", "review"]
    evaluations = [event for event in events if event["event"] == "evaluation"]
    assert [event["phase"] for event in evaluations] == [0, 1, 2, 3, 4]
    final = evaluations[-1]["domains"]
    assert final["easy"] < 2.0 < 3.5 < final["hard"]  # counting is learned, noise stays near log(60) = 4.09
    # Focus leaves out the easy domain.
    assert phases[1]["left_out_by_domain"]["easy"] > 0.8 > 0.3 > phases[1]["left_out_by_domain"]["hard"]
    train = [event for event in events if event["event"] == "train"]
    assert [event["step"] for event in train[:-1]] == [4 * (i + 1) for i in range(len(train) - 1)]
    assert train[-1]["consumed_samples"] == sum(event["draws"] for event in phases)
    assert (folder / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == str(train[-1]["step"])
    assert any((folder / "tensorboard").iterdir())
    assert yaml.safe_load((folder / "config.yaml").read_text())["hidden_size"] == 32
    out = capsys.readouterr().out
    assert "Phases" in out
    assert "Where to look next" in out


def test_the_attention_is_named_at_the_start(tiny_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*tiny_args, "--exit-interval", "1", "--attention-backend", "fused"]) == STOPPED
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--attention-backend fused: accepted as auto"
    named = [
        number for number, line in enumerate(lines) if line.startswith("attention: scaled_dot_product_attention, ")
    ]
    assert len(named) == 1
    assert named[0] < next(number for number, line in enumerate(lines) if line.startswith(" phase 0"))


@pytest.mark.parametrize("more", [[], ["--reset-attention-mask"]])
def test_flex_attention_is_refused_on_a_cpu(
    more: list[str], tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*tiny_args, *more, "--attention-backend", "flex", "--distributed-backend", "gloo"]) == 2
    assert "--attention-backend flex: has no backward pass on a CPU; choose from auto, sdpa" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_logged_loss_is_the_mean_of_the_journal(tiny_args: list[str], tmp_path: Path) -> None:
    assert run(tiny_args) == 0
    entries = np.load(tmp_path / "run/journal/phase_000.npy")
    first = next(event for event in metrics(tmp_path / "run") if event["event"] == "train")
    assert first["step"] == 4
    assert first["loss"] == pytest.approx(entries[: 4 * 8].astype(np.float64).mean(), abs=1e-6)


def test_z_loss_and_smoothing_are_in_the_last_loss_alone(tiny_args: list[str], tmp_path: Path) -> None:
    """Of the first step, whose weights both runs share: the journal, and all that is logged but last_loss."""
    shaped = ["--z-loss-coeff", "0.01", "--label-smoothing", "0.2"]
    events, entries = [], []
    for name, flags in (("plain", []), ("shaped", shaped)):
        save = ["--save", str(tmp_path / name), "--log-interval", "1", "--exit-interval", "1"]
        assert run([*tiny_args, *flags, *save]) == STOPPED
        events.append(next(event for event in metrics(tmp_path / name) if event["event"] == "train"))
        entries.append(np.load(tmp_path / name / "journal/phase_000.npy"))
    assert entries[0].tobytes() == entries[1].tobytes()
    assert events[0]["loss"] == events[1]["loss"] == pytest.approx(events[0]["last_loss"], rel=1e-6)
    # About ln 64 squared, times 0.01; with logits near 0, smoothing changes next to nothing.
    assert events[1]["last_loss"] - events[1]["loss"] == pytest.approx(0.01 * math.log(64) ** 2, rel=0.1)
    assert events[0]["grad_norm"] > 1.1 * events[1]["grad_norm"]  # a smoothed target is nearer to what is expected


def test_a_finished_run_repeats_its_table_and_changes_nothing(
    tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_args) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run/journal").iterdir()}
    before[tmp_path / "run/metrics.jsonl"] = (tmp_path / "run/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run(tiny_args) == 0
    assert "Phases" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_corpus_of_another_tokenizer_is_refused_before_anything_is_written(
    tiny_args: list[str], corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny_args, "--vocab-size", "257", "--tokenizer-model", "bytes"]
    assert run([*words, "--eod-mask-loss"]) == 2
    expected = f"--eod-mask-loss: would do nothing: the documents of {corpus[0]} do not end with 256"
    assert expected in capsys.readouterr().err
    copies = [str(tmp_path / Path(prefix).name) for prefix in corpus]
    for prefix, copy in zip(corpus, copies, strict=True):
        for suffix in (".bin", ".idx"):
            shutil.copyfile(prefix + suffix, copy + suffix)
        tokens = IndexedDataset(prefix).num_tokens
        made = Sidecar("t.json", "sha256 123", 64, 63, None, "toy", documents=40, tokens=tokens)
        Path(copy + ".meta").write_text(made.to_json())
    assert run([*words, "--data-path", *copies]) == 2
    assert "--tokenizer-model bytes: the corpus was made with t.json (sha256 123)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_ends_when_its_last_asynchronous_checkpoint_is_complete(
    tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint becomes complete when the run waits for it, and not before."""
    write_manifest, wait = store_module.write_manifest, CheckpointStore.wait
    is_awaited = threading.Event()

    def held(*arguments: Any) -> None:
        assert is_awaited.wait(LIMIT)
        write_manifest(*arguments)

    def announced(store: CheckpointStore) -> None:
        if store._in_flight is not None:
            is_awaited.set()
        wait(store)

    monkeypatch.setattr(store_module, "write_manifest", held)
    monkeypatch.setattr(CheckpointStore, "wait", announced)
    try:
        assert run([*tiny_args, "--train-epochs", "0.5", "--lfr-schedule", "uniform", "--async-save"]) == 0
        assert (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").exists()
    finally:
        is_awaited.set()


def test_a_full_disk_is_reported_once(
    tiny_args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")

    monkeypatch.setattr(store_module, "write_manifest", full)
    assert run([*tiny_args, "--save-interval", "1"]) == 2
    err = capsys.readouterr().err
    assert err.endswith(f"could not be written in {tiny_args[-1]}/checkpoints: /disk/file: No space left on device\n")
    assert err.count("No space left") == 1
    assert "Errno" not in err


class Spy:
    """Wraps the loader of the loop, and keeps the ids of what was really read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.served: list[tuple[int, list[int]]] = []
        original = Loader.iterate

        def iterate(loader: Loader, steps: Any) -> Any:
            for batch in original(loader, steps):
                if loader.source.num_blocks == self.train_blocks:
                    self.served.append((batch.step, [int(i) for i in batch.block_ids if i >= 0]))
                yield batch

        self.train_blocks = -1
        monkeypatch.setattr(Loader, "iterate", iterate)

    def phases(self, bounds: list[int]) -> list[Counter[int]]:
        return [
            Counter(i for step, ids in self.served if first <= step < last for i in ids)
            for first, last in itertools.pairwise(bounds)
        ]


def without(args: list[str], flag: str) -> list[str]:
    at = args.index(flag)
    return args[:at] + args[at + 2 :]


@pytest.mark.parametrize("name", ["lfr-v1", "lfr-clusters"])
def test_what_the_loader_served(
    name: str, tiny_args: list[str], corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recount of the blocks that the loader handed to the model, against the losses in the journal."""
    n = BlockDataset(corpus, 16, "90,10,0").train.num_blocks
    spy = Spy(monkeypatch)
    spy.train_blocks = n
    assert run([*without(tiny_args, "--train-epochs"), "--lfr-schedule", name]) == 0
    bounds = [e["step"] for e in metrics(tmp_path / "run") if e["event"] == "phase"]
    bounds.append(spy.served[-1][0] + 1)
    learn, focus, review, last = spy.phases(bounds)
    assert learn == review == Counter(range(n))
    halves, hardest = harder(spy, tmp_path, bounds, 0, 0.5), harder(spy, tmp_path, bounds, 2, 0.7)
    if name == "lfr-v1":
        assert focus == Counter(halves)
        assert last == Counter(dict.fromkeys(hardest, 5))
    else:
        assert focus.total() == len(halves)
        assert last.total() == 5 * len(hardest)
        assert focus != Counter(halves)
        assert len(set(last.values())) > 1


@pytest.mark.parametrize("scope", ["global", "per-corpus"])
@pytest.mark.parametrize("in_file", [False, True], ids=["flag", "file"])
def test_weights_of_corpora(
    scope: str, in_file: bool, tiny_args: list[str], corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the loader served of each prefix is its quota, and metrics.jsonl says so."""
    train = BlockDataset(corpus, 16, "90,10,0").train
    spy = Spy(monkeypatch)
    spy.train_blocks = train.num_blocks
    easy = int(train.domain_starts[1])
    words = ["3", corpus[0], "1.0", corpus[1]]
    (tmp_path / "blend.txt").write_text(" ".join(words[:2]) + "\n" + " ".join(words[2:]))
    flags = ["--data-args-path", str(tmp_path / "blend.txt")] if in_file else ["--data-path", *words]
    args = [*flags, *tiny_args[len(corpus) + 1 :], "--lfr-focus-scope", scope]
    assert run(args) == 0
    events = [event for event in metrics(tmp_path / "run") if event["event"] == "phase"]
    served = spy.phases([*(event["step"] for event in events), spy.served[-1][0] + 1])
    assert [event["kind"] for event in events] == ["learn", "review", "review", "focus", "review"]
    assert [event["guard"]["accepted"] for event in events if "guard" in event] == [False, True]
    for event, counts in zip(events, served, strict=True):
        of_easy = sum(count for block, count in counts.items() if block < easy)
        assert event["draws_by_domain"] == {"easy": of_easy, "hard": counts.total() - of_easy}
        if event["kind"] != "focus" or scope == "per-corpus":
            assert abs(of_easy - 0.75 * event["draws"]) <= 0.5
        else:
            assert of_easy < 0.3 * event["draws"]  # what is hard decides
    assert max(served[0].values()) >= 2  # the corpus with the larger weight is passed more than once


def harder(spy: Spy, tmp_path: Path, bounds: list[int], phase: int, drop: float) -> list[int]:
    """Return the ids of the blocks that remain without the easiest, by the journal of a phase over all blocks."""
    served = [i for step, ids in spy.served if bounds[phase] <= step < bounds[phase + 1] for i in ids]
    losses = dict(zip(served, np.load(tmp_path / f"run/journal/phase_{phase:03d}.npy").tolist(), strict=True))
    return sorted(losses, key=lambda i: losses[i])[math.floor(drop * len(losses) + 1e-9) :]


def test_micro_batches_do_not_change_the_run(tiny_args: list[str], tmp_path: Path) -> None:
    shutdown()  # what another test has started here would be left alone
    assert run(tiny_args) == 0
    other = [*tiny_args, "--micro-batch-size", "8", "--deterministic", "--save", str(tmp_path / "other")]
    assert run(other) == 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.distributed.is_initialized()
    losses = [[e["loss"] for e in metrics(tmp_path / f) if e["event"] == "train"] for f in ("run", "other")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)


@pytest.mark.parametrize("score", ["detrended", "rescored"])
def test_score_modes_train(score: str, tiny_args: list[str], tmp_path: Path) -> None:
    schedule = [
        {"kind": "learn", "duration": 0.6},
        {"kind": "focus", "duration": 0.3, "drop": 0.5, "score": score, "sampling": "visits"},
        {"kind": "review", "duration": 0.2},
    ]
    assert run([*without(tiny_args, "--train-epochs"), "--lfr-schedule", yaml.safe_dump(schedule)[:-1]]) == 2
    text = yaml.safe_dump(schedule, default_flow_style=True, width=10**6)
    assert run([*without(tiny_args, "--train-epochs"), "--lfr-schedule", text]) == 0
    focus = [e for e in metrics(tmp_path / "run") if e["event"] == "phase"][1]
    assert (focus["unseen"] == 0) == (score == "rescored")
    assert focus["left_out_by_domain"]["easy"] > focus["left_out_by_domain"]["hard"]


def test_bf16_and_recomputation_train_alike(tiny_args: list[str], tmp_path: Path) -> None:
    finals = {}
    for name, flags in {
        "plain": [],
        "full": ["--recompute-granularity", "full"],
        "selective": ["--recompute-granularity", "selective"],
        "bf16": ["--bf16"],
    }.items():
        assert run([*tiny_args, *flags, "--train-epochs", "0.5", "--save", str(tmp_path / name)]) == 0
        finals[name] = [e for e in metrics(tmp_path / name) if e["event"] == "evaluation"][-1]["loss"]
    assert finals["full"] == finals["selective"] == finals["plain"]
    assert finals["bf16"] == pytest.approx(finals["plain"], abs=0.1)


def test_seeds_change_weights_and_order(tiny_args: list[str], tmp_path: Path) -> None:
    for seed in ("1", "2"):
        assert run([*tiny_args, "--train-epochs", "0.5", "--seed", seed, "--save", str(tmp_path / seed)]) == 0
    one, two = ([e for e in metrics(tmp_path / s) if e["event"] == "phase"] for s in ("1", "2"))
    assert one[0]["order_hash"] != two[0]["order_hash"]


def test_a_resumed_run_draws_no_weights(
    tiny_args: list[str], tmp_path: Path, forbid_drawing: Callable[[], None]
) -> None:
    short = [*without(tiny_args, "--train-epochs"), "--train-epochs", "0.5", "--lfr-schedule", "uniform"]
    assert run(short) == 0
    stopped = [*short, "--save", str(tmp_path / "stopped")]
    assert run([*stopped, "--exit-interval", "3"]) == STOPPED
    forbid_drawing()
    assert run(stopped) == 0
    journals = [(tmp_path / name / "journal/phase_000.npy").read_bytes() for name in ("run", "stopped")]
    assert journals[0] == journals[1]
    with pytest.raises(AssertionError, match="initial weights are drawn"):
        run([*short, "--save", str(tmp_path / "new")])


def test_finetune_starts_from_other_weights(
    tiny_args: list[str], tmp_path: Path, forbid_drawing: Callable[[], None]
) -> None:
    assert run(tiny_args) == 0
    forbid_drawing()
    end = [e for e in metrics(tmp_path / "run") if e["event"] == "evaluation"][-1]["loss"]
    flags = ["--finetune", "--load", str(tmp_path / "run"), "--save", str(tmp_path / "tuned"), "--lr", "1e-9"]
    assert run([*tiny_args, *flags]) == 0
    tuned = [e for e in metrics(tmp_path / "tuned") if e["event"] == "evaluation"][-1]["loss"]
    assert tuned == pytest.approx(end, abs=1e-4)


def test_exploding_steps_stop_the_run_with_the_blocks_named(
    tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_lfr.engine import NativeEngine

    original = NativeEngine.train_step

    def poisoned(engine: NativeEngine, batch: Any, lr: float) -> Any:
        if batch.step >= 6:
            for parameter in engine.parameters:
                parameter.local().fill_(float("inf"))
        return original(engine, batch, lr)

    monkeypatch.setattr(NativeEngine, "train_step", poisoned)
    assert run([*tiny_args, "--max-skipped-steps", "3"]) == 2
    message = capsys.readouterr().err
    assert "not finite in 3 consecutive steps up to step 9" in message
    assert "their blocks: " in message
    assert (np.load(tmp_path / "run/journal/phase_000.npy") >= 0).all()  # what was synced holds no skipped step


def test_nothing_of_a_skipped_step_counts(
    tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An infinite gradient with a finite loss, and a loss that is not finite: the weights stay, the journal, the logged
    loss and the summary leave the step out, and a run that resumes after it goes on as if it had not stopped."""
    from megatron_lfr.engine import NativeEngine

    original = NativeEngine.train_step

    def poisoned(engine: NativeEngine, batch: Any, lr: float) -> Any:
        if batch.step not in (2, 5):
            return original(engine, batch, lr)
        saved = [parameter.local().clone() for parameter in engine.parameters]
        finish = engine.gradients.finish

        def finish_with_infinity() -> None:
            finish()
            engine.parameters[0].local_grad()[0, 0] = math.inf

        if batch.step == 2:
            engine.gradients.finish = finish_with_infinity  # type: ignore[method-assign]
        else:
            engine.parameters[0].local().fill_(math.nan)
        output = original(engine, batch, lr)
        engine.gradients.finish = finish  # type: ignore[method-assign]
        assert output.skipped
        assert math.isfinite(output.loss) == (batch.step == 2)
        for parameter, value in zip(engine.parameters[1:], saved[1:], strict=True):
            assert parameter.local().equal(value)
        engine.parameters[0].local().copy_(saved[0])
        return output

    monkeypatch.setattr(NativeEngine, "train_step", poisoned)
    short = [*without(tiny_args, "--train-epochs"), "--train-iters", "9", "--lfr-schedule", "uniform"]
    logged = [*short, "--log-interval", "3"]
    assert run(logged) == 0
    out = capsys.readouterr().out
    assert f"{(9 - 2) * 8 * 16}" in out.replace(",", "")  # tokens
    entries = np.load(tmp_path / "run/journal/phase_000.npy").reshape(9, 8)
    assert [(row == -1).all() for row in entries] == [step in (2, 5) for step in range(9)]
    assert (np.delete(entries, (2, 5), 0) > 0).all()
    rows = [event for event in metrics(tmp_path / "run") if event["event"] == "train"]
    assert [event["skipped"] for event in rows] == [1, 2, 2]
    assert [event["last_loss"] is None for event in rows] == [event["grad_norm"] is None for event in rows]
    assert [event["last_loss"] is None for event in rows] == [True, True, False]
    for row, steps in zip(rows, ((0, 1), (3, 4), (6, 7, 8)), strict=True):
        assert row["loss"] == pytest.approx(entries[list(steps)].astype(np.float64).mean(), abs=1e-6)
    resumed = [*logged, "--save", str(tmp_path / "resumed")]
    assert run([*resumed, "--exit-interval", "3"]) == STOPPED
    assert run(resumed) == 0
    assert (np.load(tmp_path / "resumed/journal/phase_000.npy") == entries.ravel()).all()
