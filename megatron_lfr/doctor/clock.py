"""How far the clocks of nodes are apart."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

_ROUNDS = 8


def clock_offsets(leaders: list[int], group: ProcessGroup) -> list[tuple[float, float]]:
    """Return (offset, uncertainty) in seconds of each leader's clock against that of the first, which is rank 0, on
    every rank. group: all ranks, over gloo. Collective.

    Rank 0 asks for the time and takes the middle of question and answer for the moment of the answer; of several
    rounds the fastest counts, whose half is the uncertainty.
    """
    rank = dist.get_rank()
    offsets = [(0.0, 0.0)] * len(leaders)
    for index, leader in enumerate(leaders[1:], start=1):
        if rank == 0:
            offsets[index] = _ask(leader, group)
        elif rank == leader:
            _answer(group)
    dist.broadcast_object_list(offsets, src=0, group=group)
    return offsets


def _ask(leader: int, group: ProcessGroup) -> tuple[float, float]:
    rounds = []
    answer = torch.zeros(1, dtype=torch.float64)
    for _ in range(_ROUNDS):
        asked = time.time()
        dist.send(answer, leader, group=group)
        dist.recv(answer, leader, group=group)
        answered = time.time()
        rounds.append((answered - asked, answer.item() - (asked + answered) / 2))
    duration, offset = min(rounds)
    return offset, duration / 2


def _answer(group: ProcessGroup) -> None:
    message = torch.zeros(1, dtype=torch.float64)
    for _ in range(_ROUNDS):
        dist.recv(message, 0, group=group)
        message[0] = time.time()
        dist.send(message, 0, group=group)
