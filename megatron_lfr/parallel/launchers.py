"""Which rank this process is: the one place where the variables of launchers are read.

torchrun, DeepSpeed's launcher and Kubernetes' training operator set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. srun
and mpirun have names of their own, and leave the first rank's address to be found. `adopt_launcher` sets torchrun's
names for all of them, so that everything else, DeepSpeed and users' callbacks included, knows only those.
docs/launch.md has the table.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import torch.distributed as dist

from megatron_lfr.parallel.host_list import expand_hosts

LAUNCHERS = "torchrun, deepspeed, srun, mpirun or `megatron-lfr train --nproc-per-node`"
"""What starts ranks, for messages."""

_FIRST_PORT, _PORTS = 16384, 16384
"""Ports that are derived from a job's id: below those that Linux gives to connections (from 32768)."""
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm's numbers for what is no step of srun's begin here: the batch script, the shell of an allocation."""
_STEP_NODES, _JOB_NODES = "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"
_JOBS = ("PMIX_NAMESPACE", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
"""Any of these is the same on all ranks, and another one in another job."""


@dataclass(frozen=True)
class Launch:
    """One process as a launcher has started it; by default without one, which is a run of one rank."""

    launcher: str | None = None
    """The launcher whose variables say so."""
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0
    """Number of the rank on its node; None where the launcher does not say."""
    node: str | None = None
    """What ranks of one node have in common; None where the launcher does not say."""
    address: str = ""
    """Host of rank 0."""
    port: int = 0


@dataclass(frozen=True)
class _Names:
    """The variables of one launcher."""

    launcher: str
    rank: str
    world_size: str
    local_ranks: tuple[str, ...]
    """Any of these is the rank's number on its node."""
    local_size: str = ""
    """Ranks of this node."""
    nodes: tuple[str, ...] = ()
    """Any of these numbers the nodes."""


_TORCH = _Names(
    "RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", ("LOCAL_RANK", "SLURM_LOCALID"), nodes=("GROUP_RANK", "CROSS_RANK")
)
_SRUN = _Names("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",), nodes=("SLURM_NODEID",))
_OPEN_MPI = _Names(
    "mpirun (Open MPI)",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_HYDRA = _Names("mpirun (MPICH, Intel MPI)", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID",), "MPI_LOCALNRANKS")
_PMI = replace(_HYDRA, launcher="mpirun (PMI)")
"""As of other launchers; but srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE, too."""
_OTHERS = (_OPEN_MPI, _HYDRA, _SRUN, _PMI)
"""In this order: in an allocation of Slurm, mpirun may start its ranks in a step, with one task for each node."""
_OF_A_LAUNCHER = (
    name
    for names in (_TORCH, *_OTHERS)
    for name in (names.rank, names.world_size, *names.local_ranks, names.local_size, *names.nodes)
)
_OF_A_JOB = ("SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_STEP_NUM_NODES", _STEP_NODES, _JOB_NODES, *_JOBS)
ALL_VARIABLES = tuple(dict.fromkeys((*_OF_A_LAUNCHER, "MASTER_ADDR", "MASTER_PORT", *_OF_A_JOB)))
"""All that is read here. What an error lists."""


def adopt_launcher() -> Launch:
    """Find out which rank this process is, and set the environment's variables as torchrun does. May be called again.

    Where torch.distributed runs already, it says so. Raises ValueError, which lists the variables, where they are
    incomplete, no numbers or contradict each other.
    """
    if dist.is_initialized():
        numbers = (os.environ.get(name, "") for name in _TORCH.local_ranks)
        local_rank = next((int(number) for number in numbers if number.isdecimal()), None)
        node = os.environ.get("GROUP_RANK")
        return Launch("torch.distributed", dist.get_rank(), dist.get_world_size(), local_rank, node)
    launch = read_launch(os.environ)
    if launch.launcher is not None:
        os.environ.update(torchrun_variables(launch))
    return launch


def torchrun_variables(launch: Launch) -> dict[str, str]:
    """Return the environment variables that torchrun sets for such a rank."""
    values = {
        "RANK": launch.rank,
        "WORLD_SIZE": launch.world_size,
        "LOCAL_RANK": launch.local_rank,
        "GROUP_RANK": launch.node,
        "MASTER_ADDR": launch.address,
        "MASTER_PORT": launch.port,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Find out which rank this process is; errors as for `adopt_launcher`.

    RANK and WORLD_SIZE count before all others: torchrun may run inside of srun or mpirun.
    """
    given = {name: value for name, value in environment.items() if value != ""}
    reader = _Reader(given)
    torch = [name for name in (_TORCH.rank, _TORCH.world_size) if name in given]
    if len(torch) == 2:
        return reader.read(_TORCH)
    others = [names for names in _OTHERS if _is_started_by(names, given)]
    if not others:
        if torch:
            reader.fail(f"{torch[0]} is set, and {'WORLD_SIZE' if torch == ['RANK'] else 'RANK'} is not")
        return Launch(local_rank=reader.number("LOCAL_RANK") if "LOCAL_RANK" in given else 0)
    launch = reader.read(others[0])
    for name, value in (("RANK", launch.rank), ("WORLD_SIZE", launch.world_size)):
        if name in given and reader.number(name) != value:
            reader.fail(f"{name} is {given[name]}, but {launch.launcher or others[0].launcher} says {value}")
    return launch


def _is_started_by(names: _Names, given: Mapping[str, str]) -> bool:
    if names is not _SRUN:
        is_there = names.rank in given or names.world_size in given
        return is_there and (names is not _HYDRA or "MPI_LOCALRANKID" in given)
    # The script of sbatch has SLURM_PROCID, SLURM_NTASKS and more, as a shell of salloc may have: only srun has a step.
    step = given.get("SLURM_STEP_ID", given.get("SLURM_STEPID", ""))
    is_step = step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP
    return is_step or given.get("SLURM_PROCID", "0") != "0"


class _Reader:
    """Reads variables, and lists all that were set when one is wrong."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given

    def read(self, names: _Names) -> Launch:
        """Return what one launcher's variables say."""
        given = self._given
        for name in (names.rank, names.world_size):
            if name not in given:
                self.fail(f"{name} is not set, though other variables of {names.launcher} are")
        rank, world_size = self.number(names.rank), self.number(names.world_size, least=1)
        if rank >= world_size:
            self.fail(f"{names.rank} {rank}: must be below {names.world_size}, {world_size}")
        if world_size == 1 and names is not _TORCH:
            return Launch()
        local_rank = next((self.number(name) for name in names.local_ranks if name in given), None)
        node = next((given[name] for name in names.nodes if name in given), None)
        address, port = self._address(names, world_size), self._port(names)
        return Launch(self._launcher(names), rank, world_size, local_rank, node, address, port)

    def number(self, name: str, least: int = 0) -> int:
        """Return the whole number that a variable holds."""
        value = self._given[name]
        if not (value.isascii() and value.isdecimal()) or int(value) < least:
            self.fail(f"{name} {value}: must be a whole number of at least {least}")
        return int(value)

    def fail(self, problem: str) -> NoReturn:
        """Raise the error."""
        variables = ", ".join(f"{name}={self._given[name]}" for name in ALL_VARIABLES if name in self._given)
        raise ValueError(
            f"the launcher's variables: {problem}; set are {variables}; start ranks with {LAUNCHERS}, or unset these "
            "variables for a run of one process"
        )

    def _launcher(self, names: _Names) -> str:
        if names is not _TORCH:
            return names.launcher
        if "TORCHELASTIC_RUN_ID" in self._given:
            return "torchrun"
        return "deepspeed" if "CROSS_RANK" in self._given else names.launcher

    def _address(self, names: _Names, world_size: int) -> str:
        given = self._given
        if "MASTER_ADDR" in given:
            return given["MASTER_ADDR"]
        one_node = names is _SRUN and given.get("SLURM_STEP_NUM_NODES") == "1"
        if one_node or given.get(names.local_size) == str(world_size):
            return "127.0.0.1"
        # A rank of mpirun may be in the step of a daemon, which has not all nodes.
        variables = (_STEP_NODES, _JOB_NODES) if names is _SRUN else (_JOB_NODES,)
        variable = next((name for name in variables if name in given), None)
        if variable is None:
            self.fail(f"MASTER_ADDR, the host of rank 0, is not set, and there is no {variables[0]} to find it in")
        try:
            return next(expand_hosts(given[variable]))
        except ValueError as error:
            self.fail(f"MASTER_ADDR, the host of rank 0, is not set, and {variable} cannot be read: {error}")

    def _port(self, names: _Names) -> int:
        given = self._given
        if "MASTER_PORT" in given:
            port = self.number("MASTER_PORT", least=1)
            if port > 65535:
                self.fail(f"MASTER_PORT {port}: must be at most 65535")
            return port
        job = next((given[name] for name in _JOBS if name in given), None)
        if job is None:
            self.fail("MASTER_PORT, a free port on the host of rank 0, is not set, nor a job's id to derive it from")
        if names is _SRUN:
            job += f".{given.get('SLURM_STEP_ID')}"
        return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
