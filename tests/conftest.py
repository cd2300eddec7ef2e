"""Fixtures shared by all tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

# Before anything imports torch, for this process and those it starts: tiny matrices gain nothing from a second thread,
# and lose much where the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("COLUMNS", None)  # pytest-xdist gives its workers a terminal's width; tables are to be whole

import torch

# Without a GPU, Triton's kernels run in its interpreter. It must be chosen before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, settings

from megatron_lfr.parallel import session
from megatron_lfr.parallel.launchers import ALL_VARIABLES

# A shell that runs the tests in the background has it ignored, and so would be the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ranks that are started by "forkserver" come from one process, which has imported what each of them would.
multiprocessing.set_forkserver_preload(["megatron_lfr.training.run"])

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def _no_ranks_are_left() -> Iterator[None]:
    """Fail the file whose tests leave ranks behind, and not another one, later, that happens to share its process."""
    before = {name: os.environ.get(name) for name in ALL_VARIABLES}
    yield
    for name, value in before.items():  # DeepSpeed sets LOCAL_RANK where it is imported
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    is_left = dist.is_initialized()
    if is_left:
        dist.destroy_process_group()
    assert not is_left, "a process group is left: use megatron_lfr.parallel.session"


@pytest.fixture(scope="module")
def ranks_of_a_file() -> Iterator[None]:
    """Let the tests of a file start ranks, which end with it."""
    with session():
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers with a fixed seed."""
    return np.random.default_rng(20240913)


@pytest.fixture
def forbid_drawing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, drawing an initial weight is an error, and a weight that nothing is loaded into is NaN."""
    from megatron_lfr.model import Decoder
    from megatron_lfr.parallel import layers

    empty_on = Decoder.empty_on

    def fails(*arguments: Any, **options: Any) -> None:
        raise AssertionError("initial weights are drawn, and a checkpoint is to be loaded")

    def empty_with_nan(model: Decoder, device: torch.device) -> None:
        empty_on(model, device)
        for parameter in model.parameters():
            layers.local_rows(parameter.detach())[0].fill_(float("nan"))

    def forbid() -> None:
        monkeypatch.setattr(layers, "fill_normal", fails)
        monkeypatch.setattr(Decoder, "empty_on", empty_with_nan)

    return forbid


LONGEST = [
    "distributed/test_engine.py",
    "distributed/test_deepspeed.py",
    "distributed/test_faults.py",
    "distributed/test_parity.py",
    "distributed/test_two_hosts.py",
    "huggingface/test_families.py",
    "tests/test_launch_examples.py",
    "study/test_study.py",
    "tests/test_examples.py",
    "training/test_resume.py",
    "distributed/test_tensor_parallel.py",
    "csrc/test_fuzz.py",
    "tests/test_selection_example.py",
]
"""Files of about a minute or more each, as --durations says of the whole suite."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files come first: among the last, one would leave the other of two processes without work."""
    order = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get("/".join(item.path.parts[-2:]), len(LONGEST)))
