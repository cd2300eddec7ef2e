"""What is wrong with an allocation, in sentences, from what its ranks have found out."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from megatron_lfr.doctor.file_system import NEEDED, FolderFacts
from megatron_lfr.doctor.local import RankFacts
from megatron_lfr.doctor.network import Links

CLOCK_BOUND = 1.0
"""Seconds that clocks may be apart."""


def name_rank(rank: int, facts: list[RankFacts]) -> str:
    """Name a rank with its machine."""
    return f"rank {rank} ({facts[rank].host})"


def rank_problems(facts: list[RankFacts]) -> list[str]:
    """Compare the ranks: their versions, devices and interfaces."""
    problems = []
    for package in dict.fromkeys(name for fact in facts for name in fact.versions):
        problems += _differences(package, [fact.versions.get(package, "not installed") for fact in facts], facts)
    problems += _differences("the device", [fact.device for fact in facts], facts)
    users = defaultdict(list)
    for rank, fact in enumerate(facts):
        if fact.device_id:
            users[fact.host, fact.device_id].append(rank)
    for (host, _), sharing in users.items():
        if len(sharing) > 1:
            problems.append(f"ranks {', '.join(map(str, sharing))} compute on one device of {host}: see LOCAL_RANK")
    wrong: dict[tuple[str, str], int] = {}
    for rank, fact in enumerate(facts):
        for sentence in fact.wrong_interfaces:
            wrong.setdefault((fact.host, sentence), rank)
    return problems + [f"{name_rank(rank, facts)}: {sentence}" for (_, sentence), rank in wrong.items()]


def _differences(what: str, values: list[str], facts: list[RankFacts]) -> list[str]:
    """Name the ranks whose value is not that of most."""
    if len(set(values)) == 1:
        return []
    usual = Counter(values).most_common(1)[0][0]
    others: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, value in enumerate(values):
        if value != usual:
            others[facts[rank].host, value].append(rank)
    return [
        f"{what} of {name_rank(with_it[0], facts)}{f' and {len(with_it) - 1} more there' if len(with_it) > 1 else ''} "
        f"is {value}, and {usual} elsewhere"
        for (_, value), with_it in others.items()
    ]


def clock_problems(offsets: list[tuple[float, float]], hosts: list[str]) -> list[str]:
    """Name nodes whose clock is off by more than is uncertain. offsets: as of `clock_offsets`."""
    return [
        f"the clock of {host} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} that of {hosts[0]}: "
        "times in logs cannot be compared"
        for (offset, uncertainty), host in zip(offsets, hosts, strict=True)
        if abs(offset) - uncertainty > CLOCK_BOUND
    ]


def link_problems(links: Links, hosts: list[str]) -> list[str]:
    """Name what is slow between nodes."""
    problems = []
    for node in links.slow_nodes:
        speeds = ", ".join(
            f"{speed:.2f} GB/s with {hosts[a if b == node else b]}"
            for (a, b), speed in links.speeds.items()
            if node in (a, b)
        )
        problems.append(f"{hosts[node]} is slow with every other node: {speeds}; {links.bound:.2f} are expected")
    for a, b in links.slow_pairs:
        problems.append(
            f"the path between {hosts[a]} and {hosts[b]} is slow: {links.speeds[a, b]:.2f} GB/s, {links.bound:.2f} are "
            "expected"
        )
    return problems


def folder_problems(folder: Path, nodes: list[FolderFacts], hosts: list[str]) -> list[str]:
    """Name what a run folder's file system cannot do."""
    return [
        f"{folder} on {host} ({node.kind}): {name}: {error}; {NEEDED[name]}"
        for node, host in zip(nodes, hosts, strict=True)
        for name, error in node.failures.items()
    ]


def sharing_problems(folder: Path, sees: list[bool], is_kept_out: list[bool], hosts: list[str]) -> list[str]:
    """Say whether nodes see the same folder, and respect each other's locks."""
    problems = []
    if not all(sees):
        others = ", ".join(host for host, sees_it in zip(hosts, sees, strict=True) if not sees_it)
        problems.append(
            f"{folder} is not the same folder on {others} as on {hosts[0]}, which alone would have the run: "
            "checkpoints are sent there, and back at a resume. Is something not mounted?"
        )
    unlocked = [host for host, sees_it, out in zip(hosts, sees, is_kept_out, strict=True) if sees_it and not out]
    if unlocked:
        problems.append(
            f"{folder}: {', '.join(unlocked)} could lock what {hosts[0]} had locked: two runs on different machines "
            "would not be kept apart (mount options nolock, local_lock, localflock?)"
        )
    return problems
