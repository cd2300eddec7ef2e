"""What launchers put into the environment of each rank, as they were seen to do or as their manuals say."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Environment = dict[str, str]
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "127.0.0.[1-2]", "SLURM_NNODES": "2", "SLURM_NTASKS": "2"}
"""What every process of an allocation of two nodes has."""
BATCH = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0"}
"""The script of sbatch."""
SHELL = {
    **BATCH,
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_PTY_PORT": "40001",
}
"""A shell of salloc on the first node (LaunchParameters=use_interactive_step)."""


def task(rank: int, ranks: int = 2, nodes: int = 2, step: int = 0) -> Environment:
    """Return the variables of a task of srun."""
    return {
        **BATCH,
        "SLURM_STEP_ID": str(step),
        "SLURM_STEPID": str(step),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank // nodes),
        "SLURM_NODEID": str(rank % nodes),
        "SLURM_NTASKS": str(ranks),
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NODELIST": f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1",
    }


def torchrun(rank: int, port: int) -> Environment:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "GROUP_RANK": str(rank),
        "GROUP_WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
    }


def torchrun_in_srun(rank: int, port: int) -> Environment:
    """One task a node, with two ranks of torchrun in the first: Slurm's numbers are others."""
    return {**task(0), **torchrun(rank, port)}


def deepspeed(rank: int, port: int) -> Environment:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "CROSS_RANK": str(rank),
        "CROSS_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def srun(rank: int, port: int) -> Environment:
    return task(rank, step=port)


def srun_pmi2(rank: int, port: int) -> Environment:
    return {**task(rank, step=port), "PMI_RANK": str(rank), "PMI_SIZE": "2", "PMI_JOBID": "4711.0"}


def open_mpi(rank: int, port: int) -> Environment:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_NODE_RANK": str(rank),
        "PMIX_NAMESPACE": str(port),
    }


def open_mpi_in_slurm(rank: int, port: int) -> Environment:
    """mpirun has started a daemon on the second node, in a step of one task; rank 0 is a child of the script."""
    daemon = BATCH if rank == 0 else {**task(0, ranks=1, nodes=1), "SLURM_STEP_NODELIST": "127.0.0.2"}
    return {
        **daemon,
        **open_mpi(0, port),
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    }


def hydra(rank: int, port: int) -> Environment:
    return {
        "PMI_RANK": str(rank),
        "PMI_SIZE": "2",
        "PMI_FD": "9",
        "MPI_LOCALRANKID": str(rank),
        "MPI_LOCALNRANKS": "2",
        "MASTER_PORT": str(port),
    }


LAUNCHERS: Mapping[str, Callable[[int, int], Environment]] = {
    function.__name__: function
    for function in (torchrun, torchrun_in_srun, deepspeed, srun, srun_pmi2, open_mpi, open_mpi_in_slurm, hydra)
}
"""Name → the environment of one of two ranks, given its number and a free port (or, where a port follows from a job's
id, a number for that)."""
EXPECTED = {
    "torchrun": ("torchrun", [0, 0], ["0", "1"]),
    "torchrun_in_srun": ("torchrun", [0, 0], ["0", "1"]),
    "deepspeed": ("deepspeed", [0, 0], ["0", "1"]),
    "srun": ("srun", [0, 0], ["0", "1"]),
    "srun_pmi2": ("srun", [0, 0], ["0", "1"]),
    "open_mpi": ("mpirun (Open MPI)", [0, 1], [None, None]),
    "open_mpi_in_slurm": ("mpirun (Open MPI)", [0, 0], [None, None]),
    "hydra": ("mpirun (MPICH, Intel MPI)", [0, 1], [None, None]),
}
"""Name → (launcher, local ranks, nodes)."""
