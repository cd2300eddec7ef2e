"""`megatron-lfr doctor`: its verdict on four ranks of a node each, with faults planted, and on a single process."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from megatron_lfr.cli import main
from megatron_lfr.doctor.findings import rank_problems
from megatron_lfr.doctor.local import RankFacts, meeting_problems
from megatron_lfr.doctor.network import Pair, find_slow
from support import doctor_cases
from support.ports import free_port

VERDICTS: dict[str, list[str]] = {
    "nothing": [],
    "ranks": [
        r"its code of rank 3 \(node3\) is 0123456789ab, and [0-9a-f]{12} elsewhere",
        r"torch of rank 2 \(node2\) is 1\.13\.1, and 2\.\S+ elsewhere",
        r"rank 1 \(node1\): NCCL_SOCKET_IFNAME=no_such,\^no names no interface of this machine, .*",
        r"the clock of node1 is \d\d\.\d s behind that of node0: .*",
        r"node2 is slow with every other node: 0\.01 GB/s with \w+, .*0\.01 GB/s with \w+; 0\.52 are expected",
    ],
    "abilities": [
        r".*/run on node0 \(.*\): rename: planted in rename; a kill could leave half of a file .*",
        r".*/run on node1 \(.*\): rename: planted in fsync; .*",
        r".*/run on node1 \(.*\): fsync: planted in fsync; a checkpoint would not survive a power cut",
        r".*/run on node2 \(.*\): locks: No locks available; two runs in one folder .*",
        r".*/run on node3 \(.*\): mmap: planted in mmap; .*",
    ],
    "locks": [
        r"the path between node0 and node1 is slow: 0\.01 GB/s, 0\.52 are expected",
        r".*/run: node3 could lock what node0 had locked: .*",
    ],
    "folders": [
        r"numpy of rank 0 \(node0\) is 1\.0, and not installed elsewhere",
        r".*/run0 is not the same folder on node1, node2, node3 as on node0, which alone would have the run: .*",
    ],
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, what each case printed."""
    folder = tmp_path_factory.mktemp("doctor")
    port = free_port()
    given = (port, str(folder))
    mp.start_processes(doctor_cases.main, given, nprocs=doctor_cases.NODES, start_method="forkserver")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(doctor_cases.NODES)]


@pytest.mark.parametrize("name", VERDICTS)
def test_a_planted_fault_is_the_verdict(name: str, printed: list[dict[str, Any]]) -> None:
    said, problems = printed[0][name]["said"], VERDICTS[name]
    assert [rank[name]["code"] for rank in printed] == [1 if problems else 0] * doctor_cases.NODES
    _, verdict, listed = said.rpartition("verdict: ")
    assert verdict, said
    first, *lines = listed.splitlines()
    expected = (
        f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "nothing is wrong with 4 ranks"
    )
    assert re.fullmatch(rf"{expected}, after \d+ s", first), first
    assert len(lines) == len(problems), lines
    for number, (line, problem) in enumerate(zip(lines, problems, strict=True), start=1):
        assert re.fullmatch(rf"{number}\. {problem}", line), line
    assert [rank[name]["said"] for rank in printed[1:]] == [""] * (doctor_cases.NODES - 1)
    assert [rank[name]["left"] for rank in printed] == [[]] * doctor_cases.NODES


@given(st.integers(2, 9), st.sets(st.integers(0, 8)), st.data())
def test_slow_nodes_and_paths(count: int, slow: set[int], data: st.DataObject) -> None:
    """Nodes that are slow, and paths between two others that are: all of the first are found while two neighbours are
    not slow, and all of the second that the ring goes over."""
    slow &= set(range(count))
    ring = {(min(a, b), max(a, b)) for a, b in ((n, (n + 1) % count) for n in range(count))}
    sound = sorted(pair for pair in ring if not slow & set(pair))
    paths = set(data.draw(st.lists(st.sampled_from(sound), max_size=1)) if len(sound) > 2 and count > 5 else [])

    def measure(pairs: list[Pair]) -> dict[Pair, float]:
        assert all(0 <= a < b < count for a, b in pairs)
        return {pair: 0.1 if slow & set(pair) or pair in paths else 1.0 for pair in pairs}

    links = find_slow(count, 0.5, measure)
    if sound:
        assert links.slow_nodes == sorted(slow)
        assert links.slow_pairs == sorted(paths)
    else:
        assert not links.slow_nodes
        assert links.slow_pairs == sorted(ring)
    if not paths and sound:
        by_default = find_slow(count, None, measure)
        assert (by_default.slow_nodes, by_default.slow_pairs) == (sorted(slow), [])
    assert set(links.speeds) >= ring
    assert len(links.speeds) <= 2 * count


def test_everything_is_shown(printed: list[dict[str, Any]]) -> None:
    said = printed[0]["measured"]["said"]
    assert "4 ranks, started by RANK and WORLD_SIZE" in said
    for rank in range(4):
        assert re.search(rf"│ +{rank} │ node{rank} │ cpu ", said), said
        assert re.search(rf"│ node{rank} │ +[+-]\d+\.\d │ +\d+\.\d │", said), said
        assert re.search(rf"│ node{rank} │ \w+.* │ yes +│ nothing │", said), said
    for pair in ("node0 - node1", "node1 - node2", "node2 - node3", "node0 - node3"):
        assert re.search(rf"│ {pair} │ +\d+\.\d\d │", said), said
    assert "GLOO_SOCKET_IFNAME=lo" in said
    assert re.search(r"versions of rank 0: Python 3\.\d+\.\d+, megatron-lfr \S+, its code \w{12}, torch 2\.", said)


def test_a_single_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--save", str(tmp_path / "run" / "new")]) == 0
    out = capsys.readouterr().out
    assert f"run folder {tmp_path}" in out
    assert "verdict: nothing is wrong with 1 rank" in out
    assert not list(tmp_path.iterdir())
    assert main(["doctor", "--save", str(Path(__file__) / "run")]) == 2
    assert "test_doctor.py is no folder" in capsys.readouterr().err


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launch = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {**launch, "GLOO_SOCKET_IFNAME": "no_such"}.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--timeout-seconds", "0.5", "--distributed-backend", "gloo"]) == 2
    error = capsys.readouterr().err
    assert "the ranks do not meet: rank 0: no answer from ranks [1, 2]" in error
    assert "rank 0: GLOO_SOCKET_IFNAME=no_such names no interface of this machine, which has lo" in error


def facts(**changes: Any) -> RankFacts:
    values: dict[str, Any] = {
        "host": "node0",
        "versions": {"torch": "2.13.0"},
        "device": "H100, 80 GiB",
        "device_id": "GPU-1",
        "interfaces": {"eth0": "10.0.0.1"},
        "variables": {},
        "name_address": "10.0.0.1",
        "wrong_interfaces": [],
    }
    return RankFacts(**values | changes)


def test_devices() -> None:
    other = facts(host="node1")
    assert rank_problems([facts(), facts(device_id="GPU-2"), other]) == []
    assert rank_problems([facts(), other, facts()]) == ["ranks 0, 2 compute on one device of node0: see LOCAL_RANK"]
    cpu = facts(host="node1", device="cpu", device_id="")
    assert rank_problems([facts(), facts(device_id="GPU-2"), cpu, cpu]) == [
        "the device of rank 2 (node1) and 1 more there is cpu, and H100, 80 GiB elsewhere"
    ]


def test_where_gloo_listens() -> None:
    assert meeting_problems(facts()) == []
    assert (
        "leads to 127.0.1.1, which other machines cannot reach" in meeting_problems(facts(name_address="127.0.1.1"))[0]
    )
    assert "the name node0 has no address" in meeting_problems(facts(name_address=""))[0]
    chosen = {"GLOO_SOCKET_IFNAME": "eth0"}
    assert meeting_problems(facts(name_address="127.0.1.1", variables=chosen)) == []
