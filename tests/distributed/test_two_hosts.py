"""Whole runs over two hosts, by the launchers that people have there."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import parity_matrix as matrix
import pytest

from support.close_runs import assert_close
from support.hosts import Host, skip_without_namespaces, ssh_servers, torchrun, two_hosts
from support.launcher_environments import task
from support.waiting import LIMIT, wait_until

pytestmark = pytest.mark.slow

Process = subprocess.Popen[str]


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return matrix.write_corpus(tmp_path_factory.mktemp("corpus"))


def flags(prefixes: list[str], folder: Path) -> list[str]:
    return [
        *matrix.run_flags(prefixes, folder),
        *("--lfr-schedule", "lfr", "--train-epochs", "6", "--save-interval", "5", "--distributed-timeout-minutes", "2"),
    ]


@pytest.fixture(scope="module")
def reference(prefixes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run in one process."""
    folder = tmp_path_factory.mktemp("reference")
    case = matrix.Case("run", 1, flags(prefixes, folder / "run")[len(matrix.run_flags(prefixes, folder)) :])
    matrix.run_cases([case], folder, prefixes)
    return folder / "run"


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    skip_without_namespaces()
    with two_hosts() as both:
        yield both


def finish(processes: list[Process]) -> list[int]:
    try:
        return [process.wait(LIMIT) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_a_host_is_cut_off_and_a_new_one_takes_its_place(
    hosts: tuple[Host, Host], prefixes: list[str], tmp_path: Path, reference: Path
) -> None:
    """No file system is shared: each host sees a disk of its own under one path. torchrun starts the run, srun goes on
    with it, on a host that has nothing yet."""
    disk = tmp_path / "disk"
    disks = [tmp_path / name for name in ("disk 1", "disk 2", "new disk")]
    for folder in (disk, *disks):
        folder.mkdir()
    one, two, new = (
        dataclasses.replace(host, disks={disk: its}) for host, its in zip((*hosts, hosts[1]), disks, strict=True)
    )
    arguments = ["train", *flags(prefixes, disk / "run")]
    said = [tmp_path / f"said {number}" for number in range(4)]
    metrics = disks[0] / "run" / "metrics.jsonl"

    processes = [
        host.start(torchrun((one, two), index, arguments), said[index]) for index, host in enumerate((one, two))
    ]
    reached = wait_until(
        lambda: metrics.exists() and "focus" in metrics.read_text(),
        lambda: all(process.poll() is None for process in processes),
    )
    assert reached, said[0].read_text()
    two.cut_off()
    codes = finish(processes)
    two.connect()
    assert 0 not in codes
    first, second = (path.read_text() for path in said[:2])
    assert re.search(r"\[rank 0\] rank 1 \(lfr-2, pid \d+\) stopped answering", first), first
    assert "the launcher's store on lfr-1 is gone" in second, second
    assert not list((disks[1] / "run" / "checkpoints").glob("iter_*"))  # rank 0's host has them

    new = dataclasses.replace(new, name="lfr-new")
    command = [sys.executable, "-m", "megatron_lfr", *arguments]
    variables = {"SLURM_STEP_NODELIST": "lfr-[1-2]"}
    processes = [
        host.start(command, said[2 + rank], **{**task(rank), **variables}) for rank, host in enumerate((one, new))
    ]
    assert finish(processes) == [0, 0], said[2].read_text() + said[3].read_text()
    assert "continuing" in said[2].read_text()
    assert_close(disks[0] / "run", reference)
    journals = [disks[0] / "run" / "journal", disks[2] / "run" / "scratch" / "node_1" / "journal"]
    names = [sorted(path.name for path in journal.glob("phase_*")) for journal in journals]
    assert names[0] == names[1]
    for name in names[0]:
        assert (journals[0] / name).read_bytes() == (journals[1] / name).read_bytes()


def test_one_folder_for_both_hosts(
    hosts: tuple[Host, Host], prefixes: list[str], tmp_path: Path, reference: Path
) -> None:
    """Both hosts see the run folder. torchrun begins the run; deepspeed's launcher, started on each host without ssh,
    ends it."""
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    (tmp_path / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh"]
    folder = tmp_path / "run"
    arguments, said = ["train", *flags(prefixes, folder)], [tmp_path / f"said {number}" for number in range(4)]

    begun = [*arguments, "--exit-interval", "10"]
    codes = finish([host.start(torchrun(hosts, index, begun), said[index]) for index, host in enumerate(hosts)])
    assert 0 not in codes  # as the run has not ended
    assert len(matrix.read_steps(folder)) == 10, said[0].read_text()

    address = ["--master_addr", hosts[0].name, "--module", "megatron_lfr", *arguments]
    processes = [
        host.start([*launcher, "--node_rank", str(index), *address], said[2 + index], DS_ACCELERATOR="cpu")
        for index, host in enumerate(hosts)
    ]
    assert finish(processes) == [0, 0], said[2].read_text() + said[3].read_text()
    assert "continuing" in said[2].read_text()
    assert "--local_rank=0" in said[3].read_text()
    assert_close(folder, reference)


def test_deepspeeds_launcher_reaches_both_hosts(
    hosts: tuple[Host, Host], prefixes: list[str], tmp_path: Path, reference: Path
) -> None:
    """By pdsh and ssh, into one folder that both see. The launcher puts --local_rank in front of the command."""
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    missing = [name for name in ("pdsh", "ssh", "ssh-keygen") if shutil.which(name) is None]
    missing += [] if shutil.which("sshd") or Path("/usr/sbin/sshd").exists() else ["sshd"]
    if missing:
        pytest.skip(f"not here: {', '.join(missing)} (Debian: pdsh, openssh-client, openssh-server)")
    (tmp_path / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hostfile", "--no_ssh_check"]
    command = [*launcher, "--master_addr", hosts[0].name, "--module", "megatron_lfr", "train"]
    folder, said = tmp_path / "run", tmp_path / "said"
    with ssh_servers(hosts, tmp_path) as client:
        pdsh = {"PDSH_SSH_ARGS_APPEND": f"-F {client}", "PDSH_RCMD_TYPE": "ssh", "DS_ACCELERATOR": "cpu"}
        words = ["sh", "-c", f'cd {tmp_path} && exec "$@"', "sh", *command, *flags(prefixes, folder)]
        codes = finish([hosts[0].start(words, said, **pdsh)])
    assert codes == [0], said.read_text()
    assert "lfr-2: " in said.read_text()
    assert "--local_rank=0" in said.read_text()
    assert_close(folder, reference)
