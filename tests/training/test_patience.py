"""Whether a launcher that stops a run gives it the time to save."""

from __future__ import annotations

import os

import pytest

from megatron_lfr.training import patience
from megatron_lfr.training.patience import Patience, seconds_to_leave

NAMES = ("TORCHELASTIC_RUN_ID", "PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Set the environment of torchrun, of a PyTorch whose launcher accepts another timeout."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setattr(patience, "_timeout_is_adjustable", lambda: True)
    return monkeypatch


def test_how_long_a_launcher_waits(launcher: pytest.MonkeyPatch) -> None:
    assert seconds_to_leave() == 30
    launcher.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "100")
    assert seconds_to_leave() == 100
    launcher.setenv("PET_SHUTDOWN_TIMEOUT", "200")
    assert seconds_to_leave() == 200
    launcher.setattr(patience, "_timeout_is_adjustable", lambda: False)
    assert seconds_to_leave() == 30
    launcher.delenv("TORCHELASTIC_RUN_ID")
    assert seconds_to_leave() is None


@pytest.mark.usefixtures("launcher")
def test_a_checkpoint_that_takes_too_long_is_warned_of_before_the_first_step() -> None:
    fits, too_large = 29 * 10**9, 31 * 10**9  # 2 ranks write 1e9 a second
    assert Patience(asynchronous=False).expect(fits, 2) is None
    note = Patience(asynchronous=False).expect(too_large, 2)
    assert note is not None
    for part in ("takes 31 s", "30 s after", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=62", f"kill -USR1 {os.getpid()}"):
        assert part in note, note
    assert "in flight" not in note
    # One may be in flight, and is written first.
    assert Patience(asynchronous=True).expect(14 * 10**9, 2) is None
    note = Patience(asynchronous=True).expect(16 * 10**9, 2)
    assert note is not None
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=64" in note
    assert "in flight (--async-save)" in note


@pytest.mark.usefixtures("launcher")
def test_a_measured_checkpoint_is_warned_of_once() -> None:
    patience = Patience(asynchronous=False)
    assert patience.expect(10**9, 1) is None
    assert patience.measured(29.0) is None
    assert "takes 40 s (as measured)" in (patience.measured(40.0) or "")
    assert patience.measured(50.0) is None


def test_a_timeout_that_cannot_be_set_is_not_proposed(launcher: pytest.MonkeyPatch) -> None:
    launcher.setattr(patience, "_timeout_is_adjustable", lambda: False)
    note = Patience(asynchronous=False).measured(40.0)
    assert note is not None
    assert "TORCH_ELASTIC" not in note
    assert "kill -USR1" in note


def test_without_a_launcher_nobody_kills(launcher: pytest.MonkeyPatch) -> None:
    launcher.delenv("TORCHELASTIC_RUN_ID")
    assert Patience(asynchronous=False).expect(10**15, 1) is None
