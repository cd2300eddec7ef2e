"""Runs of two ranks that lose one, are asked to stop, or fail on one: real processes, through the command line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import parity_matrix as matrix
import pytest

from megatron_lfr.checkpoint import CheckpointStore
from support.ports import free_port
from support.same_run import assert_same_bits
from support.two_ranks import train_two_ranks
from support.waiting import LIMIT, finish, wait_until

Process = subprocess.Popen[str]
LAYOUT = [
    "--tensor-model-parallel-size",
    "2",
    "--save-interval",
    "2",
    "--lfr-schedule",
    "lfr",
    "--train-epochs",
    "6",
    "--distributed-timeout-minutes",
    str(round(LIMIT / 60)),
]


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return matrix.write_corpus(tmp_path_factory.mktemp("corpus"))


def flags(prefixes: list[str], folder: Path) -> list[str]:
    return [*matrix.run_flags(prefixes, folder), *LAYOUT]


def torchrun(arguments: list[str], *options: str) -> Process:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    return start([*command, "-m", "megatron_lfr", "train", *arguments], {})


def start(command: list[str], environment: dict[str, str]) -> Process:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )


def workers(process: Process) -> list[int]:
    """Process ids of a launcher's ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    is_rank = [b"megatron_lfr" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children]
    return [int(pid) for pid, mine in zip(children, is_rank, strict=True) if mine]


def wait_for_checkpoint(folder: Path, process: Process) -> None:
    latest = folder / "checkpoints/latest_checkpointed_iteration.txt"
    assert wait_until(latest.exists, lambda: process.poll() is None), process.communicate()[0]


@pytest.fixture(scope="module")
def reference(prefixes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train_two_ranks(flags(prefixes, folder), folder.with_name("said"))
    return folder


def test_a_killed_rank_is_named_and_torchrun_starts_it_again(
    prefixes: list[str], tmp_path: Path, reference: Path
) -> None:
    folder = tmp_path / "run"
    process = torchrun(flags(prefixes, folder), "--max-restarts=1")
    wait_for_checkpoint(folder, process)
    killed = workers(process)[1]
    os.kill(killed, signal.SIGKILL)
    code, out = finish(process)
    assert code == 0, out
    assert re.search(rf"\[rank 0\] rank 1 \(.*, pid {killed}\) stopped answering", out), out
    assert "continuing" in out
    assert_same_bits(folder, reference)


@pytest.mark.parametrize("to", ["one rank", "torchrun", "our launcher"])
def test_a_signal_leaves_one_checkpoint_that_goes_on(
    to: str, prefixes: list[str], tmp_path: Path, reference: Path
) -> None:
    folder = tmp_path / "run"
    arguments = [*flags(prefixes, folder), "--save-interval", "1000", "--exit-duration-in-mins", "10"]
    if to == "our launcher":
        process = start([sys.executable, "-m", "megatron_lfr", "train", "--nproc-per-node", "2", *arguments], {})
    else:
        process = torchrun(arguments)
    metrics = folder / "metrics.jsonl"
    assert wait_until(lambda: metrics.exists() and metrics.stat().st_size > 600, lambda: process.poll() is None)
    if to == "one rank":
        os.kill(workers(process)[1], signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM if to == "torchrun" else signal.SIGINT)
    code, out = finish(process)
    other = "another rank was asked to stop"  # where all are asked, one may know first, and the others leave with it
    reason = {"one rank": other, "torchrun": f"(SIGTERM|{other})", "our launcher": f"(SIGINT|{other})"}[to]
    assert re.search(rf"^{reason}: saving at step", out, re.MULTILINE), out
    assert "Traceback" not in out or to == "torchrun", out  # which itself ends with an error when it is told to stop
    if to == "our launcher":
        assert code == 75, out
        assert "death signal" not in out, out
    elif to == "one rank":
        assert code == 0, out  # or torchrun would start the run again
    store = CheckpointStore(folder / "checkpoints", keep=None)
    checkpoint = store.newest_complete()
    assert checkpoint is not None
    assert store.iterations() == [checkpoint.iteration]
    if to == "one rank":  # whoever asked, a complete checkpoint goes on in one way
        assert "continuing" in train_two_ranks(flags(prefixes, folder), tmp_path / "said")
        assert_same_bits(folder, reference)


@pytest.fixture
def machines(prefixes: list[str], tmp_path: Path) -> Iterator[list[Process]]:
    """Two ranks of one machine each, started without torchrun: rank 0 keeps the store."""
    port = free_port()
    processes = start_machines(prefixes, tmp_path / "run", port)
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start_machines(prefixes: list[str], folder: Path, port: int) -> list[Process]:
    command = [sys.executable, "-m", "megatron_lfr", "train", *flags(prefixes, folder)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    return [start(command, {**shared, "RANK": str(rank), "GROUP_RANK": str(rank)}) for rank in range(2)]


def test_every_machine_has_the_journal_and_loses_a_rank(
    machines: list[Process], prefixes: list[str], tmp_path: Path, reference: Path
) -> None:
    """Rank 1 is killed; rank 0, which no launcher stops, ends by itself and names it. A machine that comes back with an
    empty disk is given the journal."""
    folder = tmp_path / "run"
    wait_for_checkpoint(folder, machines[0])
    machines[1].kill()
    code, out = finish(machines[0])
    assert code == 2
    assert f"[rank 0] rank 1 ({socket.gethostname()}, pid {machines[1].pid}) stopped answering" in out
    for path in (folder / "scratch/node_1").rglob("*"):
        if path.is_file():
            path.unlink()
    train_two_ranks(flags(prefixes, folder), tmp_path / "said", machines=2)
    assert_same_bits(folder, reference)
    journals = [folder / "journal", folder / "scratch/node_1/journal"]
    names = [sorted(path.name for path in journal.iterdir()) for journal in journals]
    assert names[0] == names[1]
    assert len(names[0]) > 4
    for name in names[0]:
        assert (journals[0] / name).read_bytes() == (journals[1] / name).read_bytes()


def test_a_rank_that_fails_tells_the_others(prefixes: list[str], tmp_path: Path) -> None:
    """A folder is in the place of the order in the scratch folder, where only leaders write."""
    folder = tmp_path / "run"
    (folder / "scratch/node_0/order_000.tmp").mkdir(parents=True)
    code, out = finish(torchrun(flags(prefixes, folder)))
    assert code != 0
    assert "[rank 0]" in out
    assert "order_000.tmp" in out
