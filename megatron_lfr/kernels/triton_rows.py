"""The passes over a chunk's logits by Triton kernels: on GPUs, or on CPU tensors in Triton's interpreter
(TRITON_INTERPRET=1)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_lfr.kernels import triton_kernels as kernels
from megatron_lfr.kernels.softmax import Coefficients, Problem, merge

INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class RowConfig:
    """Launch parameters of a kernel that reads numbers in order. They are fixed, as the bits of a sum depend on
    them."""

    block: int = 4096
    num_warps: int = 8

    def constants(self) -> dict[str, int]:
        return {"BLOCK": self.block}


@dataclass(frozen=True)
class ScoreConfig:
    """Tiles and launch parameters of the fused matrix product. They are fixed, as the bits of a sum depend on them."""

    tokens: int
    columns: int
    width: int
    num_warps: int
    num_stages: int
    group_tiles: int = 16
    slices: int = 32

    def constants(self) -> dict[str, int]:
        return {
            "BLOCK_TOKENS": self.tokens,
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_WIDTH": self.width,
            "GROUP_TILES": self.group_tiles,
        }


ROW = RowConfig()
SCALE = RowConfig(block=8192)
SCORE_HOPPER = ScoreConfig(128, 256, 64, num_warps=8, num_stages=3)
SCORE_HALF = ScoreConfig(128, 64, 64, num_warps=8, num_stages=3)
"""For sm_80, 89, 100 and 120, where Hopper's tiles would spill registers."""
SCORE_FLOAT = ScoreConfig(64, 64, 16, num_warps=8, num_stages=2)


def score_config(hidden: Tensor) -> ScoreConfig:
    """Choose the tiles by dtype and architecture."""
    if hidden.dtype == torch.float32:
        return SCORE_FLOAT
    is_hopper = hidden.is_cuda and torch.cuda.get_device_capability(hidden.device)[0] == 9
    return SCORE_HOPPER if is_hopper else SCORE_HALF


class TritonRows:
    """Passes over the logits [C, V_l] of C tokens, given before the cap in fp32 and contiguous. The gradient, of
    `dtype`, overwrites them."""

    def __init__(self, logits: Tensor, labels: Tensor, problem: Problem, dtype: torch.dtype) -> None:
        self._logits, self._labels, self._problem, self._dtype = logits, labels.contiguous(), problem, dtype

    def statistics(self) -> Tensor:
        """Compute the statistics [3 or 4, C] that softmax.py defines."""
        rows = len(self._logits)
        out = self._logits.new_empty(4 if self._problem.smoothing else 3, rows)
        self._launch(kernels.row_statistics, self._labels, out, rows, self._problem.first_column, self._problem.columns)
        return out

    def gradient(self, coefficients: Coefficients) -> Tensor:
        """Compute the logits' gradient [C, V_l] in `dtype`, at the start of each row of the logits."""
        logits, problem = self._logits, self._problem
        out = logits.view(self._dtype)[:, : logits.shape[1]]
        packed = torch.stack(coefficients)
        self._launch(
            kernels.row_gradient,
            out,
            out.stride(0),
            self._labels,
            packed,
            packed.stride(0),
            problem.first_column,
            problem.columns,
            logits.shape[1],
        )
        return out

    def _launch(self, kernel: Any, *arguments: Any) -> None:
        logits, problem = self._logits, self._problem
        if not len(logits):
            return
        with _device(logits):
            kernel[(len(logits),)](
                logits,
                logits.stride(0),
                *arguments,
                problem.softcap,
                CAPPED=problem.softcap != 0,
                SMOOTHED=problem.smoothing != 0,
                **ROW.constants(),
                num_warps=ROW.num_warps,
                num_stages=1,
            )


def scale_in_place(values: Tensor, scale: Tensor) -> Tensor:
    """Multiply contiguous `values` by `scale` [] in place; the host does not wait for the scale."""
    count = values.numel()
    if count:
        with _device(values):
            kernels.scale_in_place[(triton.cdiv(count, SCALE.block),)](
                values, scale, count, **SCALE.constants(), num_warps=SCALE.num_warps
            )
    return values


def score_fused(hidden: Tensor, weight: Tensor, labels: Tensor, problem: Problem) -> Tensor:
    """Compute the statistics [3 or 4, N] over this rank's columns, from hidden [N, H] and weight [V_l, H] of one dtype,
    without storing any logits."""
    config = score_config(hidden)
    hidden, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, weight))
    tokens = len(hidden)
    tiles_of_columns = max(triton.cdiv(problem.columns, config.columns), 1)
    slice_columns = triton.cdiv(tiles_of_columns, config.slices) * config.columns
    slices = max(triton.cdiv(problem.columns, slice_columns), 1)
    out = hidden.new_empty(slices, 4 if problem.smoothing else 3, tokens, dtype=torch.float32)
    tiles = triton.cdiv(tokens, config.tokens)
    if tiles:
        with _device(hidden):
            kernels.score_slices[(tiles * slices,)](
                hidden,
                hidden.stride(0),
                weight,
                weight.stride(0),
                labels.contiguous(),
                out,
                tokens,
                hidden.shape[1],
                problem.first_column,
                problem.columns,
                slices,
                slice_columns,
                problem.softcap,
                CAPPED=problem.softcap != 0,
                SMOOTHED=problem.smoothing != 0,
                # fp32 products for fp32 operands, and in the interpreter, whose product of bf16 operands is wrong.
                FP32_DOT=hidden.dtype == torch.float32 or INTERPRETED,
                **config.constants(),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
    return merge(out, slice_columns, problem.columns)


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
