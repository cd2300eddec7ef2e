"""Which rank the variables of each launcher make of a process, and what is said of variables that make none."""

from __future__ import annotations

import json
import os
import re
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_lfr.parallel import shutdown
from megatron_lfr.parallel.launchers import Launch, adopt_launcher, read_launch, torchrun_variables
from megatron_lfr.parallel.rendezvous import connect
from support import launcher_cases
from support.launcher_environments import BATCH, EXPECTED, JOB, LAUNCHERS, SHELL, Environment, srun, task, torchrun
from support.ports import free_port


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("rank", [0, 1])
def test_each_launcher(name: str, rank: int) -> None:
    launcher, local_ranks, nodes = EXPECTED[name]
    environment = LAUNCHERS[name](rank, 29_511)
    launch = read_launch(environment)
    assert (launch.launcher, launch.rank, launch.world_size) == (launcher, rank, 2)
    assert (launch.local_rank, launch.node) == (local_ranks[rank], nodes[rank])
    assert launch.address == "127.0.0.1"
    assert launch.port == 29_511 or "MASTER_PORT" not in environment
    environment |= torchrun_variables(launch)
    again = read_launch(environment)
    assert (again.rank, again.world_size, again.local_rank, again.node, again.address, again.port) == (
        (rank, 2, launch.local_rank, launch.node, launch.address, launch.port)
    )
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [environment[name] for name in names] == [
        *(str(number) for number in (rank, 2, launch.local_rank)),
        *("127.0.0.1", str(launch.port)),
    ]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LOCAL_RANK": "0"},
        {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
        JOB,
        BATCH,
        SHELL,
        {name: value for name, value in SHELL.items() if name != "SLURM_STEP_NUM_TASKS"},
        {**SHELL, "SLURM_STEP_NUM_TASKS": "2"},
        task(0, ranks=1, nodes=1),
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        {"RANK": "", "WORLD_SIZE": ""},
    ],
    ids=["nothing", "device", "address", "job", "script", "shell", "older", "of two", "one task", "one rank", "empty"],
)
def test_what_is_no_launch(environment: Environment) -> None:
    assert read_launch(environment) == Launch()


def test_a_node_list_gives_the_address_and_the_job_a_port() -> None:
    first = {**srun(0, 0), "SLURM_STEP_NODELIST": "node[07-09],gpu1"}
    launch = read_launch(first)
    assert launch.address == "node07"
    other_rank = read_launch({**first, "SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_TASK_PID": "99"})
    assert (other_rank.address, other_rank.port) == (launch.address, launch.port)
    ports = {read_launch({**first, "SLURM_JOB_ID": str(job)}).port for job in range(200)}
    assert len(ports) > 190
    assert min(ports) >= 16384
    assert max(ports) < 32768
    assert read_launch({**first, "SLURM_STEP_ID": "1"}).port != launch.port
    given = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    launch = read_launch(first | given)
    assert (launch.address, launch.port) == ("head", 1234)
    launch = read_launch(task(3, ranks=4, nodes=1))
    assert (launch.address, launch.local_rank, launch.node) == ("127.0.0.1", 3, "0")
    without_step = {name: value for name, value in first.items() if name != "SLURM_STEP_NODELIST"}
    assert read_launch({**without_step, "SLURM_JOB_NODELIST": "a[3-4]"}).address == "a3"


def test_other_launchers_that_speak_pmi() -> None:
    meeting = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    launch = read_launch({"PMI_RANK": "1", "PMI_SIZE": "2", **meeting})
    assert launch == Launch("mpirun (PMI)", 1, 2, None, None, "head", 1234)


def test_a_world_size_that_users_export_beside_srun_is_compared() -> None:
    assert read_launch({**srun(1, 0), "WORLD_SIZE": "2"}).rank == 1
    by_hand = read_launch({**srun(1, 0), "WORLD_SIZE": "2", "RANK": "1"})
    assert (by_hand.launcher, by_hand.rank, by_hand.local_rank) == ("RANK and WORLD_SIZE", 1, 0)


def without(environment: Environment, *names: str) -> Environment:
    return {name: value for name, value in environment.items() if name not in names}


TORCH = without(torchrun(1, 29_500), "TORCHELASTIC_RUN_ID")
MPI = LAUNCHERS["open_mpi"](1, 5)
HYDRA = LAUNCHERS["hydra"](1, 5)
ERRORS: list[tuple[Environment, str]] = [
    (without(TORCH, "RANK"), "WORLD_SIZE is set, and RANK is not"),
    (without(TORCH, "WORLD_SIZE"), "RANK is set, and WORLD_SIZE is not"),
    (TORCH | {"WORLD_SIZE": ""}, "RANK is set, and WORLD_SIZE is not"),
    (
        without(TORCH, "MASTER_ADDR"),
        "MASTER_ADDR, the host of rank 0, is not set, and there is no SLURM_JOB_NODELIST",
    ),
    (without(TORCH, "MASTER_PORT"), "MASTER_PORT, a free port on the host of rank 0, is not set"),
    (TORCH | {"MASTER_PORT": "http"}, "MASTER_PORT http: must be a whole number of at least 1"),
    (TORCH | {"MASTER_PORT": "65536"}, "MASTER_PORT 65536: must be at most 65535"),
    (TORCH | {"RANK": "2"}, "RANK 2: must be below WORLD_SIZE, 2"),
    (TORCH | {"RANK": "-1"}, "RANK -1: must be a whole number of at least 0"),
    (TORCH | {"WORLD_SIZE": "0"}, "WORLD_SIZE 0: must be a whole number of at least 1"),
    (TORCH | {"LOCAL_RANK": "two"}, "LOCAL_RANK two: must be a whole number of at least 0"),
    ({"LOCAL_RANK": "two"}, "LOCAL_RANK two: must be a whole number of at least 0"),
    (without(task(1), "SLURM_STEP_NUM_TASKS"), "SLURM_STEP_NUM_TASKS is not set, though other variables of srun are"),
    (without(task(1), "SLURM_PROCID"), "SLURM_PROCID is not set, though other variables of srun are"),
    (without(BATCH, "SLURM_PROCID") | {"SLURM_PROCID": "1"}, "SLURM_STEP_NUM_TASKS is not set"),
    (task(1) | {"SLURM_PROCID": "7"}, "SLURM_PROCID 7: must be below SLURM_STEP_NUM_TASKS, 2"),
    (without(task(1), "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "there is no SLURM_STEP_NODELIST to find it in"),
    (task(1) | {"SLURM_STEP_NODELIST": "node[1-"}, "SLURM_STEP_NODELIST cannot be read: 'node[1-'"),
    (task(1) | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but srun says 2"),
    (task(1) | {"RANK": "0"}, "RANK is 0, but srun says 1"),
    (without(MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set, though other variables of mpirun (Open"),
    (without(MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK is not set, though other variables of mpirun (Open"),
    (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "MASTER_ADDR, the host of rank 0, is not set"),
    (without(MPI, "PMIX_NAMESPACE"), "MASTER_PORT, a free port on the host of rank 0, is not set"),
    (without(MPI, "OMPI_COMM_WORLD_SIZE") | {"RANK": "1"}, "OMPI_COMM_WORLD_SIZE is not set"),
    ({"PMI_SIZE": "2"}, "PMI_RANK is not set, though other variables of mpirun (PMI) are"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MASTER_ADDR, the host of rank 0, is not set"),
    (without(HYDRA, "PMI_SIZE"), "PMI_SIZE is not set, though other variables of mpirun (MPICH, Intel MPI) are"),
]


@pytest.mark.parametrize(("environment", "problem"), ERRORS)
def test_one_error_lists_what_was_found(environment: Environment, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as error:
        read_launch({**environment, "HOME": "/home/me"})
    names = [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLURM_PROCID",
        "SLURM_STEP_NODELIST",
        "PMI_SIZE",
    ]
    for name in names:
        assert (f"{name}={environment.get(name)}" in str(error.value)) == bool(environment.get(name)), name
    assert "HOME" not in str(error.value)
    assert "start ranks with torchrun" in str(error.value)


def test_a_process_group_that_runs_already_says_which_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():  # of whoever made the group
        monkeypatch.setenv(name, value)
    shutdown()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert adopt_launcher() == Launch("torch.distributed", 0, 1, 1)
        monkeypatch.delenv("LOCAL_RANK")
        assert adopt_launcher().local_rank is None
        monkeypatch.setenv("SLURM_LOCALID", "3")
        assert adopt_launcher().local_rank == 3
        assert "MASTER_ADDR" not in os.environ
    finally:
        dist.destroy_process_group()


def test_two_ranks_of_each_launcher_meet(tmp_path: Path) -> None:
    ports = {name: free_port() for name in LAUNCHERS}
    mp.start_processes(launcher_cases.main, (ports, str(tmp_path)), nprocs=2, start_method="forkserver")
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert list(results) == list(LAUNCHERS)
        for name, result in results.items():
            _, local_ranks, nodes = EXPECTED[name]
            assert result == {
                "ranks": [0, 1],
                "sum": 3,
                "exported": [str(rank), "2", str(local_ranks[rank]), "127.0.0.1"],
                "again": [rank, 2, local_ranks[rank], nodes[rank]],
            }, name


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in torchrun(0, port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConnectionError, match=rf"rank 0 on .* cannot open .*MASTER_PORT {port}: .*in use"):
            connect(timedelta(seconds=5))


def test_a_store_that_nobody_hosts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in torchrun(1, port).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError, match=rf"rank 1 on .* cannot reach .* 127.0.0.1, MASTER_PORT {port}: .*time"):
        connect(timedelta(seconds=1))
