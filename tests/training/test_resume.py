"""Kills and signals: whatever happens to a run, the same command ends with the same bits."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_run import tiny_flags

STOPPED = 75
"""Exit code of a run that a signal or a limit stopped."""


def start(args: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_lfr", "train", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(args: list[str], code: int = 0) -> str:
    process = start(args)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code, out
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


def metrics_without_time(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def assert_same_run(one: Path, two: Path) -> None:
    assert metrics_without_time(one) == metrics_without_time(two)
    for path in sorted((one / "journal").iterdir()):
        assert path.read_bytes() == (two / "journal" / path.name).read_bytes(), path.name
    last = (one / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip()
    assert last == (two / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip()
    folder = f"checkpoints/iter_{int(last):07d}"
    shards = sorted((one / folder).glob("*.safetensors"))
    assert shards
    for path in shards:  # the order of the names in a file's header is random, the tensors are not
        tensors, others = load_file(path), load_file(two / folder / path.name)
        assert tensors.keys() == others.keys()
        assert any(name.startswith("optimizer.") for name in tensors)
        for name, tensor in tensors.items():
            assert tensor.numpy().tobytes() == others[name].numpy().tobytes(), name


@pytest.fixture(scope="module")
def reference(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    finish(run_args(tiny_flags(corpus), folder))
    return folder


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> bool:
    """Whether `condition` came true while the process lived."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def newest(folder: Path) -> int:
    latest = folder / "checkpoints/latest_checkpointed_iteration.txt"
    return int(latest.read_text()) if latest.exists() else 0


def inside_a_save(folder: Path) -> Callable[[], bool]:
    """True while a checkpoint stands half-written beside the whole ones."""
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
        process = start([*args, *by_clock, *asynchronous])
        came = wait_until(moment, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert came, f"{name}: the run ended before it could be killed: {process.communicate()[0]}"
        assert process.returncode == -signal.SIGKILL
        half_written += inside_a_save(folder)()
    assert half_written >= 4
    assert f"continuing {folder} at step" in finish(args)
    assert_same_run(reference, folder)


@pytest.mark.parametrize(("number", "flags"), [(signal.SIGINT, []), (signal.SIGUSR1, ["--async-save"])])
def test_signals_save_and_exit_cleanly(
    number: signal.Signals, flags: list[str], tiny_args: list[str], tmp_path: Path, reference: Path
) -> None:
    folder = tmp_path / "signalled"
    args = [*run_args(tiny_args, folder), *flags]
    process = start(args)
    assert wait_until(lambda: newest(folder) >= 4, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED, out
    assert f"{number.name}: saving at step" in out
    assert "Traceback" not in out
    stopped = int(out.split("saving at step ")[1].split()[0])
    assert newest(folder) == stopped
    assert f"continuing {folder} at step {stopped}" in finish(args)
    assert_same_run(reference, folder)


def test_a_kill_before_the_first_checkpoint_starts_anew(tiny_args: list[str], tmp_path: Path, reference: Path) -> None:
    folder = tmp_path / "early"
    args = run_args(tiny_args, folder)
    process = start(args)
    assert wait_until((folder / "journal/phase_000.npy").exists, process)
    process.kill()
    process.wait()
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
