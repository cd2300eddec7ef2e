"""`--deterministic` makes the same command give the same bits again, also on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LEGAL = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"),
}
"""Environment variables and the values under which cuBLAS and NCCL add in a fixed order; the first is the default."""


def check_environment() -> None:
    """Check the environment. ValueError where a variable does not go with --deterministic."""
    for name, legal in _LEGAL.items():
        if os.environ.get(name, legal[0]) not in legal:
            raise ValueError(
                f"--deterministic: goes with {name} {', '.join(legal)} (by default {legal[0]}), not {os.environ[name]}"
            )


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Apply the settings of PyTorch, cuBLAS and NCCL for repeatable results while the block runs, if `enabled`.

    Must be entered before the process computes on a GPU. ValueError where an operation has no deterministic form.
    """
    if not enabled:
        yield
        return
    check_environment()
    added = {name: legal[0] for name, legal in _LEGAL.items() if name not in os.environ}
    os.environ.update(added)
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    filled, cudnn = memory.fill_uninitialized_memory, torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.use_deterministic_algorithms(True)  # attention's fused backward passes then add in order, too
    memory.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention has no such form
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        raise ValueError(f"--deterministic: {error}") from error
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for name in added:
            del os.environ[name]
