"""The DeepSpeed package, which is imported where it is used, and checked to be the version that the engine is for."""

from __future__ import annotations

import logging
import os
import warnings
from types import ModuleType

VERSION = "0.19.8"
"""Version of DeepSpeed, as in setup.py."""


def import_deepspeed(on_cpu: bool) -> ModuleType:
    """Import DeepSpeed; ValueError where it is missing or another version than VERSION."""
    os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed wants of one rank without a launcher, too
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else a GPU that is there counts for more than gloo
        # Where it is missing, ZeRO-3 starts a process to count the cores whenever it sums gradients.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"--deepspeed: needs DeepSpeed ({error}): pip install 'megatron-lfr[deepspeed]'") from error
    version = getattr(deepspeed, "__version__", "of no version")
    if version.partition("+")[0] != VERSION:
        raise ValueError(
            f"--deepspeed: needs DeepSpeed {VERSION}, of which it reads the partitions, not {version}: "
            "pip install 'megatron-lfr[deepspeed]'"
        )
    # It would compile, for minutes, a kernel of inference on a CPU, which training does not call.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Newer versions of PyTorch warn of them at each call, and call them all the same.
    deprecated = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", deprecated, FutureWarning)
    _import_muon()
    return deepspeed  # type: ignore[no-any-return]


def _import_muon() -> None:
    """Import Muon, which DeepSpeed imports with any optimizer, without preparing to compile it: for that, it would
    import PyTorch's compiler, which takes longer than all else."""
    from deepspeed.runtime import compiler

    original = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = original
