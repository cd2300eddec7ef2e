"""Kills and signals: whatever happens to a run, the same command ends with the same bits."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.run_process import Run
from support.same_run import assert_same_run
from support.tiny_run import STOPPED, tiny_flags
from support.waiting import wait_until


def finish(args: list[str], code: int = 0) -> str:
    exit_code, out = Run(args).end()
    assert exit_code == code, out
    return out


def run_args(tiny_args: list[str], folder: Path) -> list[str]:
    # Long enough that a kill lands in the middle, with a checkpoint every other step.
    return [
        *tiny_args,
        "--train-epochs",
        "3",
        "--save-interval",
        "2",
        "--keep-last",
        "2",
        "--save",
        str(folder),
    ]


@pytest.fixture(scope="module")
def reference(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("reference")
    finish(run_args(tiny_flags(corpus), folder))
    return folder


def wait_stopped(condition: Callable[[], bool], process: Run) -> bool:
    """Whether `condition` came true while the process lived, which is then stopped, so that it stays true."""
    while wait_until(condition, process.is_running):
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: state(process.pid) in "TZ", process.is_running)
        if condition():
            return process.is_running()
        process.send_signal(signal.SIGCONT)
    return False


def state(pid: int) -> str:
    """Return the state of the process as in /proc: T is stopped, Z dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def newest(folder: Path) -> int:
    latest = folder / "checkpoints/latest_checkpointed_iteration.txt"
    return int(latest.read_text()) if latest.exists() else 0


def inside_a_save(folder: Path) -> Callable[[], bool]:
    """Return a function that is true while there is a half-written checkpoint beside the complete ones."""
    return lambda: any((folder / "checkpoints").glob(".tmp-*"))


def kill_moments(folder: Path, seed: int) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Ten moments, five of them inside a save, the others at random places of the run."""
    chance = random.Random(seed)
    for number in range(5):
        target = newest(folder) + chance.randrange(2, 8)
        yield f"save {number}", lambda t=target: newest(folder) >= t and inside_a_save(folder)()  # type: ignore[misc]
        deadline = [0.0]
        delay = chance.uniform(0.0, 0.15)
        at = newest(folder) + chance.randrange(1, 5)

        def later(at: int = at, delay: float = delay, deadline: list[float] = deadline) -> bool:
            if not deadline[0] and newest(folder) >= at:
                deadline[0] = time.monotonic() + delay
            return bool(deadline[0]) and time.monotonic() >= deadline[0]

        yield f"random {number}", later


@pytest.mark.slow
def test_ten_kills_end_with_the_same_bits(tiny_args: list[str], tmp_path: Path, reference: Path) -> None:
    folder = tmp_path / "killed"
    args = run_args(tiny_args, folder)
    half_written = 0
    for number, (name, moment) in enumerate(kill_moments(folder, seed=4)):
        by_clock = ["--save-interval", "None", "--save-interval-mins", "1e-9"] if number < 4 else []
        asynchronous = ["--async-save"] if number // 2 % 2 else []  # with and without, for both kinds
        process = Run([*args, *by_clock, *asynchronous])
        came = wait_stopped(moment, process)
        process.send_signal(signal.SIGKILL)
        code, out = process.end()
        assert came, f"{name}: the run ended before it could be killed: {out}"
        assert code == -signal.SIGKILL
        half_written += inside_a_save(folder)()
    assert half_written >= 5
    assert f"continuing {folder} at step" in finish(args)
    assert_same_run(reference, folder)


@pytest.mark.parametrize(("number", "flags"), [(signal.SIGINT, []), (signal.SIGUSR1, ["--async-save"])])
def test_signals_save_and_exit_cleanly(
    number: signal.Signals, flags: list[str], tiny_args: list[str], tmp_path: Path, reference: Path
) -> None:
    folder = tmp_path / "signalled"
    args = [*run_args(tiny_args, folder), *flags]
    process = Run(args)
    assert wait_until(lambda: newest(folder) >= 4, process.is_running)
    process.send_signal(number)
    code, out = process.end()
    assert code == STOPPED, out
    assert f"{number.name}: saving at step" in out
    assert "Traceback" not in out
    stopped = int(out.split("saving at step ")[1].split()[0])
    assert newest(folder) == stopped
    assert f"continuing {folder} at step {stopped}" in finish(args)
    assert_same_run(reference, folder)


def test_a_kill_before_the_first_checkpoint_starts_anew(tiny_args: list[str], tmp_path: Path, reference: Path) -> None:
    folder = tmp_path / "early"
    args = run_args(tiny_args, folder)
    process = Run(args)
    assert wait_until((folder / "journal/phase_000.npy").exists, process.is_running)
    process.send_signal(signal.SIGKILL)
    assert process.end()[0] == -signal.SIGKILL
    finish(args)
    assert_same_run(reference, folder)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tiny_args: list[str], tmp_path: Path, reference: Path
) -> None:
    folder = tmp_path / "damaged"
    args = run_args(tiny_args, folder)
    finish([*args, "--exit-interval", "6"], STOPPED)
    assert newest(folder) == 6
    shard = next((folder / "checkpoints/iter_0000006").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(bytes(content))
    out = finish(args)
    assert "iter_0000006" in out
    assert f"continuing {folder} at step 4" in out
    assert_same_run(reference, folder)


def test_exit_interval_saves_and_continues(tiny_args: list[str], tmp_path: Path, reference: Path) -> None:
    folder = tmp_path / "stepwise"
    args = [*run_args(tiny_args, folder), "--exit-interval", "25"]
    rounds = 0
    while newest(folder) != newest(reference):
        last = newest(folder) + 25 >= newest(reference)
        out = finish(args, 0 if last else STOPPED)
        rounds += 1
        assert rounds < 30, out
    assert rounds == -(-newest(reference) // 25)
    assert_same_run(reference, folder)
