"""`megatron-lfr doctor`: prints and checks, on an allocation, what a run needs of it; ends with a verdict."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import tyro

from megatron_lfr.doctor import findings
from megatron_lfr.doctor.clock import clock_offsets
from megatron_lfr.doctor.file_system import FolderFacts, check_folder, nodes_that_share
from megatron_lfr.doctor.local import RankFacts, meeting_problems, rank_facts
from megatron_lfr.doctor.network import Links, measure_links
from megatron_lfr.output import print_table, visible
from megatron_lfr.parallel import ParallelConfig, ParallelState, initialize, ranks, session
from megatron_lfr.parallel.groups import Backend, choose_device
from megatron_lfr.parallel.launchers import Launch, adopt_launcher
from megatron_lfr.parallel.watch import RankFailureError, watching
from megatron_lfr.training.nodes import find_nodes


@dataclass(frozen=True)
class DoctorConfig:
    """Check the ranks of an allocation, and end with a verdict: exit code 0 where nothing is wrong, else 1.

    Start it as the training is to be started, on the same machines; without a launcher it checks this process.
    """

    save: Annotated[Path | None, tyro.conf.arg(aliases=["--load"])] = None
    """The run folder, whose file system is tried. A folder that is not there yet is looked for one above."""
    distributed_backend: Backend = "auto"
    """As for train: nccl, gloo, or nccl where there is a GPU (auto)."""
    min_gigabytes_per_second: float | None = None
    """An all-reduce of two nodes below this is slow; by default, below half of the fastest pair of neighbours."""
    timeout_seconds: float = 30.0
    """How long ranks wait for each other."""


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code."""
    started = time.monotonic()
    launch = adopt_launcher()
    config = tyro.cli(DoctorConfig, args=list(argv), prog="megatron-lfr doctor")
    problems = check(config, launch)
    if launch.rank == 0:
        seconds = f"after {time.monotonic() - started:.0f} s"
        if problems:
            print(f"verdict: {len(problems)} problem{'s' if len(problems) > 1 else ''}, {seconds}")
        for number, problem in enumerate(problems, start=1):
            print(f"{number}. {visible(problem)}")
        if not problems:
            print(f"verdict: nothing is wrong with {_count(launch.world_size, 'rank')}, {seconds}")
    return 1 if problems else 0


def check(config: DoctorConfig, launch: Launch) -> list[str]:
    """Print on rank 0 what there is, and return on every rank what is wrong with it."""
    timeout = timedelta(seconds=config.timeout_seconds)
    local = rank_facts(choose_device(config.distributed_backend, launch))
    folder = None if config.save is None else _existing(config.save)
    if launch.rank == 0:
        print(f"{_count(launch.world_size, 'rank')}, started by {launch.launcher or 'no launcher'}", flush=True)
    parallel = None
    try:
        with session():
            parallel = initialize(ParallelConfig(distributed_backend=config.distributed_backend), timeout)
            with watching(config.timeout_seconds / 2):
                return _check_together(config, parallel, local, folder)
    except (TimeoutError, ConnectionError, RuntimeError) as error:
        if isinstance(error, RankFailureError):
            raise
        hints = [f"rank {launch.rank}: {problem}" for problem in meeting_problems(local)]
        what = "the ranks do not meet" if parallel is None else "the ranks cannot go on"
        raise ConnectionError("\n".join([f"{what}: {error}", *(hints if launch.world_size > 1 else [])])) from error


def _check_together(config: DoctorConfig, parallel: ParallelState, local: RankFacts, folder: Path | None) -> list[str]:
    nodes, group = find_nodes(parallel), parallel.control_group
    facts = ranks.gather(local, group)
    hosts = [facts[leader].host for leader in nodes.leaders]
    if len(set(hosts)) < len(hosts):
        hosts = [findings.name_rank(leader, facts) for leader in nodes.leaders]
    _print_ranks(facts)
    problems = findings.rank_problems(facts)

    if len(nodes.leaders) > 1:
        offsets = clock_offsets(nodes.leaders, group)
        problems += findings.clock_problems(offsets, hosts)
        _print_clocks(offsets, hosts)
        links = measure_links(parallel, nodes.leaders, config.min_gigabytes_per_second)
        problems += findings.link_problems(links, hosts)
        _print_links(links, hosts)

    if folder is not None:
        with ranks.failing_together(group):
            tried = check_folder(folder) if nodes.is_leader else None
        folders = [node for node in ranks.gather(tried, group) if node is not None]
        problems += findings.folder_problems(folder, folders, hosts)
        _print_folders(folder, folders, hosts)
        if len(nodes.leaders) > 1:
            problems += findings.sharing_problems(folder, *nodes_that_share(folder, nodes.leaders, group), hosts)
    dist.barrier(group=group)
    return problems


def _existing(save: Path) -> Path:
    folder = next(path for path in (save.absolute(), *save.absolute().parents) if path.exists())
    if not folder.is_dir():
        raise ValueError(f"--save {save}: {folder} is no folder")
    return folder


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _print_ranks(facts: list[RankFacts]) -> None:
    if ranks.rank() != 0:
        return
    print("versions of rank 0: " + ", ".join(f"{name} {version}" for name, version in facts[0].versions.items()))
    rows = [
        [str(rank), f.host, f.device, _join(f.interfaces, " "), f.name_address or "-", _join(f.variables, "=")]
        for rank, f in enumerate(facts)
    ]
    head = ["rank", "host", "device", "interfaces", "address of the name", "variables"]
    print_table(head, rows, "ranks", left=head[1:])


def _join(values: dict[str, str], between: str) -> str:
    return ", ".join(f"{name}{between}{value}" if value else name for name, value in values.items()) or "-"


def _print_clocks(offsets: list[tuple[float, float]], hosts: list[str]) -> None:
    if ranks.rank() == 0:
        rows = [[host, f"{1e3 * off:+.1f}", f"{1e3 * by:.1f}"] for host, (off, by) in zip(hosts, offsets, strict=True)]
        print_table(["node", "ms ahead", "uncertain by"], rows, f"clocks, against {hosts[0]}")


def _print_links(links: Links, hosts: list[str]) -> None:
    if ranks.rank() == 0:
        rows = [[f"{hosts[a]} - {hosts[b]}", f"{speed:.2f}"] for (a, b), speed in links.speeds.items()]
        print_table(["nodes", "GB/s"], rows, "all-reduce of two nodes, neighbours in a ring")


def _print_folders(folder: Path, folders: list[FolderFacts], hosts: list[str]) -> None:
    if ranks.rank() == 0:
        rows = [
            [
                *(host, node.kind, f"{node.free_gb:.1f}", f"{node.write_mb_per_s:.0f}"),
                "yes" if node.hard_links else "no, branches copy",
                ", ".join(node.failures) or "nothing",
            ]
            for node, host in zip(folders, hosts, strict=True)
        ]
        head = ["node", "file system", "GB free", "MB/s to disk", "hard links", "lacks"]
        print_table(head, rows, f"run folder {folder}", left=(*head[:2], *head[4:]))
