"""Callbacks of a user: which events call them and in which order, what they keep, and how they are named."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_lfr.cli import main
from megatron_lfr.config import RunConfig, parse_run_config
from megatron_lfr.engine import NativeEngine
from megatron_lfr.training.run import train
from support.own_callbacks import Events, FailsToClose
from support.tiny_run import STOPPED

SCHEDULE = "[{kind: learn, duration: 3, unit: steps}, {kind: review, duration: 3, unit: steps}]"


@pytest.fixture
def args(tiny_args: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two phases of 3 steps."""
    at = tiny_args.index("--train-epochs")
    monkeypatch.setattr(Events, "made", [])
    return [*tiny_args[:at], *tiny_args[at + 2 :], "--lfr-schedule", SCHEDULE]


def parsed(args: list[str]) -> RunConfig:
    return parse_run_config(args)[0]


FIRST_PHASE = [("train start", 0), ("phase start", 0), 1, 2, 3, ("evaluation", 3), ("phase end", 0), ("phase start", 1)]
LAST_STEPS = [5, 6, ("evaluation", 6), ("phase end", 1), ("save", 6), ("train end", True), "close"]


def test_every_event_in_order_and_states_that_survive_a_stop(args: list[str], tmp_path: Path) -> None:
    """Two callbacks of one class keep a state each."""
    stopped = Events(), Events(100)
    assert not train(parsed([*args, "--exit-interval", "4"]), callbacks=stopped)
    for callback in stopped:
        assert callback.events == [*FIRST_PHASE, 4, ("save", 4), ("train end", False), "close"]
    resumed = Events(), Events(100)
    assert train(parsed(args), callbacks=resumed)
    for callback in resumed:
        assert callback.events == [("train start", 4), *LAST_STEPS]
    assert [callback.steps for callback in resumed] == [6, 600]
    state = json.loads((tmp_path / "run/checkpoints/iter_0000006/state.json").read_text())
    states = state.get("state", state)["callbacks"]
    assert (states["Events"], states["Events 2"]) == ({"steps": 6}, {"steps": 600})
    assert "MetricsFile" in states


def test_callbacks_get_an_error_before_the_run_is_left(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = NativeEngine.train_step

    def failing(engine: NativeEngine, batch: Any, lr: float) -> Any:
        if batch.step == 2:
            raise RuntimeError("the step failed")
        return original(engine, batch, lr)

    monkeypatch.setattr(NativeEngine, "train_step", failing)
    callbacks = Events(), FailsToClose(), Events()  # each of which fails in on_error
    with pytest.raises(RuntimeError, match="the step failed"):
        train(parsed(args), callbacks=callbacks)
    for callback in callbacks:
        assert callback.events == [("train start", 0), ("phase start", 0), 1, ("error", "the step failed"), "close"]


def test_all_are_closed_and_an_error_in_it_is_told(args: list[str]) -> None:
    callbacks = Events(), FailsToClose(), Events()
    with pytest.raises(RuntimeError, match="cannot close"):
        train(parsed([*args, "--exit-interval", "1"]), callbacks=callbacks)
    assert [callback.events[-2:] for callback in callbacks] == [[("train end", False), "close"]] * 3


def test_a_phase_whose_evaluation_was_cut_short_ends_in_the_process_that_makes_up_for_it(
    args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, resumed, original = Events(), Events(), NativeEngine.eval_step

    def stopping(engine: NativeEngine, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(engine, batch)

    with monkeypatch.context() as patched:
        patched.setattr(NativeEngine, "eval_step", stopping)
        assert not train(parsed(args), callbacks=[stopped])
    assert stopped.events == [*FIRST_PHASE[:5], ("save", 3), ("train end", False), "close"]
    assert train(parsed(args), callbacks=[resumed])
    assert resumed.events == [("train start", 3), *FIRST_PHASE[5:], 4, *LAST_STEPS]


def test_by_flag(args: list[str], tmp_path: Path) -> None:
    flagged = [*args, "--callback", "support.own_callbacks:Events", "support.own_callbacks:Events"]
    assert main(["train", *flagged, "--exit-interval", "4"]) == STOPPED
    assert main(["train", *flagged]) == 0
    assert [callback.steps for callback in Events.made] == [4, 4, 6, 6]
    assert Events.made[-1].events == [("train start", 4), *LAST_STEPS]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("support.own_callbacks", "--callback support.own_callbacks: expected package.module:Name"),
        ("no_such_module:A", "--callback no_such_module:A: No module named 'no_such_module'; is its folder in PYTHON"),
        ("support.own_callbacks:Missing", "Missing: support.own_callbacks has no Missing"),
        (
            "support.own_callbacks:NoCallback",
            "NoCallback: must be a class derived from megatron_lfr.training.callbacks",
        ),
        (".own_callbacks:Events", "--callback .own_callbacks:Events: expected package.module:Name"),
        ("support.own_callbacks:NeedsArgument", "NeedsArgument: is made without arguments, but missing a required arg"),
        ("support.own_callbacks:FailsWhenMade", "no dashboard listens"),
    ],
)
def test_names_that_are_refused_before_anything_is_written(
    name: str, message: str, args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *args, "--callback", name]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
