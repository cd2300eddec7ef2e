"""What happens between steps: stops in evaluation and rescoring, checkpoints by the clock, the parts of the time."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_lfr.analysis.metrics import lfr_seconds, seconds_spent
from megatron_lfr.analysis.overview import view_run
from megatron_lfr.checkpoint import CheckpointStore
from megatron_lfr.cli import main
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.engine import NativeEngine
from megatron_lfr.lfr.blend import Blend
from megatron_lfr.training import run as run_module
from megatron_lfr.training.logging import MegatronLines
from megatron_lfr.training.times import PARTS, Stopwatch
from support.same_run import assert_same_last_checkpoint, assert_same_run
from support.tiny_run import STOPPED

SCHEDULE = (
    "[{kind: learn, duration: 6, unit: steps}, {kind: focus, duration: 2, unit: steps, drop: 0.5, score: rescored}]"
)


@pytest.fixture
def args(tiny_args: list[str]) -> list[str]:
    """Return the flags of a Learn of 6 steps and a rescored Focus of 2."""
    at = tiny_args.index("--train-epochs")
    return [*tiny_args[:at], *tiny_args[at + 2 :], "--lfr-schedule", SCHEDULE, "--log-interval", "2"]


class Clock:
    """A clock that only moves when a test moves it."""

    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now

    def charge(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, seconds: float) -> None:
        """Let every call of a method take `seconds`."""
        original = getattr(owner, name)

        def charged(*arguments: Any, **more: Any) -> Any:
            self.now += seconds
            return original(*arguments, **more)

        monkeypatch.setattr(owner, name, charged)


def test_a_stopwatch_attributes_every_moment_once() -> None:
    clock = Clock()
    times = Stopwatch(clock)
    clock.now += 1
    with times.part("making orders") as outer:
        clock.now += 2
        with suppress(KeyError), times.part("rescoring") as inner:
            clock.now += 4
            raise KeyError
        clock.now += 8
    for item, seconds in times.each("waiting for data", (clock.__setattr__("now", clock.now + 16) for _ in "ab")):
        assert (item, seconds) == (None, 16)
        clock.now += 32
    assert (outer.seconds, inner.seconds) == (10, 4)
    expected = {"rest": 65, "making orders": 10, "rescoring": 4, "waiting for data": 32}
    assert times.totals() == dict.fromkeys(PARTS, 0) | expected
    assert sum(times.totals().values()) == clock.now - 5


class FakeWandb(types.ModuleType):
    """The part of wandb 0.2x that a run uses, with the signature of the real `init`."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}

    def init(
        self, entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,  # type: ignore[no-untyped-def]
        config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None,
        mode=None, force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None,
        tensorboard=None, sync_tensorboard=None, monitor_gym=None, settings=None,
    ) -> Any:  # fmt: skip
        assert resume == "allow"
        assert allow_val_change
        assert isinstance(config, dict)
        run = id or f"run{len(self.runs)}"
        logged = self.runs.setdefault(run, [])
        return types.SimpleNamespace(
            id=run, log=lambda scalars, step: logged.append((step, scalars)), finish=lambda: None
        )


def test_a_steps_time_is_its_own_and_the_parts_make_the_wall(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process that stops, and one that goes on, with a clock that only some calls move."""
    clock, wandb = Clock(), FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(run_module, "Stopwatch", functools.partial(Stopwatch, clock))
    for owner, name, seconds in (
        (NativeEngine, "train_step", 1.0),
        (NativeEngine, "eval_step", 100.0),
        (CheckpointStore, "save", 1e4),
        (Blend, "make_order", 1e6),
        (MegatronLines, "on_evaluation", 1e8),
    ):
        clock.charge(monkeypatch, owner, name, seconds)
    flags = [*args, "--wandb-project", "p", "--eval-iters", "1", "--save-interval", "2"]
    assert main(["train", *flags, "--exit-interval", "5"]) == STOPPED
    out = capsys.readouterr().out
    assert "evaluations use 8 of the" in out
    assert "(--eval-iters 1; None uses all)" in out
    assert main(["train", *flags]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert sum(row["time"]["parts"].values()) < clock.now
        if row["event"] == "train":
            assert row["time"]["step_ms"] == 1000.0
            assert row["time"]["loader_wait_ms"] == row["time"]["lfr_record_ms"] == 0.0
            assert row["time"]["tokens_per_second"] == 8 * 16
    assert "elapsed time per iteration (ms): 1000.0 |" in out
    n_blocks = view_run(tmp_path / "run", "run", 0.1).run.plan.n_blocks
    last = rows[-1]["time"]["parts"]  # of the process that went on from step 5
    expected = {
        "training steps": 3.0,
        "evaluation": 2 * 2 * 100.0,  # two phases' ends, batches of 4 of 8 blocks
        "rescoring": 100.0 * -(-n_blocks // 4),
        "saving": 1e4,  # at step 6; that at the end comes after the last row
        "making orders": 1e6,  # the Focus; that of Learn was made before the start
        "logging": 1e8,  # of one evaluation; metrics.jsonl has the other before the console
    }
    assert last == {**dict.fromkeys(PARTS, 0.0), **expected}
    spent = seconds_spent(view_run(tmp_path / "run", "run", 0.1))
    first = [row["time"]["parts"] for row in rows if row["time"]["started"] != rows[-1]["time"]["started"]][-1]
    assert spent == {name: first[name] + last[name] for name in PARTS}
    assert spent["training steps"] == 7.0  # that of step 5 was told of after the stop; it is in no row
    assert lfr_seconds(spent) == 2e6
    total = sum(expected.values()) + 1e8 + 1e4
    assert f"{total:.2f} s since training began in this process: training steps 3.00, making orders 1000000.00" in out
    assert list(wandb.runs) == ["run0"]
    assert [step for step, _ in wandb.runs["run0"]] == [2, 4, 6, 6, 8, 8]
    assert {scalars["time/step_ms"] for _, scalars in wandb.runs["run0"] if "time/step_ms" in scalars} == {1000.0}


def test_a_stop_inside_an_evaluation_or_a_rescoring_loses_nothing(
    args: list[str],
    corpus: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The process is asked to stop in the evaluation after Learn; in the rescoring, behind the evaluation that was
    owed; in the last evaluation. It leaves at the next batch each time, and ends as if nobody had asked."""
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    assert main(["train", *args, "--save", str(alone)]) == 0
    dataset = BlockDataset(corpus, 16, "90,10,0")
    evaluated, rescored = (-(-source.num_blocks // 4) for source in (dataset.valid, dataset.train))
    original, calls = NativeEngine.eval_step, 0
    at, number = 0, signal.SIGTERM

    def counted(engine: NativeEngine, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
        return original(engine, batch)

    monkeypatch.setattr(NativeEngine, "eval_step", counted)
    for chosen, call, message in (
        (signal.SIGTERM, 2, "SIGTERM: saving at step 6 and leaving"),
        (signal.SIGINT, evaluated + 3, "SIGINT: leaving before step 7"),
        (signal.SIGUSR1, rescored + 2, "SIGUSR1: saving at step 8 and leaving"),
    ):
        calls, at, number = 0, call, chosen
        capsys.readouterr()
        assert main(["train", *args, "--save", str(stopped)]) == STOPPED
        assert calls == at
        assert f"{message}; the same command continues" in capsys.readouterr().out
    at = 0
    assert main(["train", *args, "--save", str(stopped)]) == 0
    assert "Phases" in capsys.readouterr().out
    assert_same_run(alone, stopped)


@pytest.mark.parametrize("minutes", ["0", "None", "1e-9"])
def test_checkpoints_by_the_clock_change_nothing_else(minutes: str, args: list[str], tmp_path: Path) -> None:
    assert main(["train", *args, "--keep-last", "None", "--save-interval-mins", minutes]) == 0
    made = sorted(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("iter_*"))
    assert made == (
        [6, 8] if minutes != "1e-9" else [1, 2, 3, 4, 5, 6, 7, 8]
    )  # one before the rescoring, one at the end
    if minutes == "1e-9":
        assert main(["train", *args, "--save", str(tmp_path / "other")]) == 0
        assert_same_run(tmp_path / "run", tmp_path / "other")


def test_dropout_goes_on_where_a_run_was_stopped(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The masks are those of a run that was not stopped; a size of micro-batches changes them no more than rounding."""
    words = args[: args.index("--save")] + args[args.index("--save") + 2 :]
    dropping = [*words, "--attention-dropout", "0.2", "--hidden-dropout", "0.1", "--eval-interval", "100"]

    def train(folder: str, *more: str) -> list[float]:
        save = ["--save", str(tmp_path / folder)]
        assert main(["train", *dropping, *more, *save]) in (0, STOPPED)
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [row["last_loss"] for row in rows if row["event"] == "train"]

    complete = train("complete")
    assert "attention: with dropout, by matrix products that keep 36,864 bytes of scores" in capsys.readouterr().out
    train("stopped", "--exit-interval", "4")
    assert train("stopped") == complete
    assert_same_last_checkpoint(tmp_path / "stopped", tmp_path / "complete")
    assert train("one at a time", "--micro-batch-size", "1") == pytest.approx(complete, abs=1e-5)
    assert train("another rate", "--hidden-dropout", "0.11") != pytest.approx(complete, abs=1e-4)
