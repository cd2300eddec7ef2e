"""Fixtures shared by all tests."""

from __future__ import annotations

import multiprocessing
import os

# Before anything imports torch, for this process and those it starts: tiny matrices gain nothing from a second thread,
# and lose much where the machine is busy.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Without a GPU, Triton's kernels run in its interpreter. It must be chosen before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Ranks that are started by "forkserver" come from one process, which has imported what each of them would.
multiprocessing.set_forkserver_preload(["megatron_lfr.training.run"])

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("repeatable")


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers with a fixed seed."""
    return np.random.default_rng(20240913)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file of minutes, which would come among the last and leave one of two processes without work, comes first."""
    items.sort(key=lambda item: item.path.name != "test_resume.py")
