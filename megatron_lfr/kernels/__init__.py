"""Kernels, each beside a plain PyTorch implementation of the same contract."""

from megatron_lfr.kernels.block_cross_entropy import BlockStats, block_cross_entropy

__all__ = ["BlockStats", "block_cross_entropy"]
