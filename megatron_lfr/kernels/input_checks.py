"""Checks of what block_cross_entropy accepts: anything else is a ValueError before any work."""

from __future__ import annotations

import math
import os
from typing import Literal

import torch
from torch import Tensor

from megatron_lfr.kernels.matmul import compute_dtype

CHECK_LABELS_VARIABLE = "MEGATRON_LFR_CHECK_LABELS"
"""Environment variable that, set to 1, has labels on a GPU checked too, by an assertion on the device: the host does
not wait, but a bad label ends the process."""


def check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, token_shards: int) -> None:
    if labels.ndim != 2 or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 [B, S], got {labels.dtype} {tuple(labels.shape)}")
    if labels.numel() % token_shards:
        raise ValueError(f"labels: {labels.numel()} tokens do not spread over {token_shards} sequence-parallel ranks")
    rows = labels.numel() // token_shards
    has_label_shape = token_shards == 1 and hidden.shape[:-1] == labels.shape
    if not hidden.is_floating_point() or not (has_label_shape or (hidden.ndim == 2 and hidden.shape[0] == rows)):
        in_rows = "" if token_shards > 1 else f"[{labels.shape[0]}, {labels.shape[1]}, H] or "
        raise ValueError(
            f"hidden: expected floating-point {in_rows}[{rows}, H] for labels {tuple(labels.shape)}, "
            f"got {hidden.dtype} {tuple(hidden.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight: expected [vocabulary shard, {hidden.shape[-1]}], at least one row, got {tuple(weight.shape)}"
        )
    if weight.dtype not in (hidden.dtype, torch.float32):
        raise ValueError(f"weight: expected {hidden.dtype} as hidden or float32, got {weight.dtype}")
    if hidden.dtype == torch.float64 != weight.dtype:
        raise ValueError(f"weight: expected float64 as hidden, got {weight.dtype}")
    if token_weight.shape != labels.shape or token_weight.dtype not in (torch.float32, compute_dtype(hidden)):
        raise ValueError(
            f"token_weight: expected float32 {tuple(labels.shape)}, got {token_weight.dtype} "
            f"{tuple(token_weight.shape)}"
        )
    if token_weight.requires_grad:
        raise ValueError("token_weight: must not require a gradient; none is computed")
    if len({t.device for t in (hidden, weight, labels, token_weight)}) > 1:
        raise ValueError("hidden, weight, labels and token_weight must be on one device")


def choose_backend(hidden: Tensor, backend: str) -> Literal["torch", "triton"]:
    """Choose Triton's implementation where it can run and knows the dtype; ValueError where `backend` cannot run."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend {backend!r}: choose from auto, torch, triton")
    is_known = hidden.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if backend == "auto":
        return "triton" if hidden.is_cuda and is_known else "torch"
    if backend == "torch":
        return "torch"
    if not is_known:
        raise ValueError(f"backend 'triton': hidden must be bfloat16, float16 or float32, not {hidden.dtype}")
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend 'triton': needs a GPU or TRITON_INTERPRET=1, hidden is on {hidden.device}")
    return "triton"


def check_options(vocab_size: int, padded: int, z_loss: float, smoothing: float, softcap: float) -> None:
    if not 1 <= vocab_size <= padded:
        raise ValueError(f"vocab_size {vocab_size}: must lie between 1 and the {padded} rows of all weights")
    if not (0 <= z_loss < math.inf and 0 <= softcap < math.inf):
        raise ValueError(f"z_loss {z_loss} and logit_softcap {softcap}: must be finite and not negative")
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing {smoothing}: must be at least 0 and below 1")


def check_working(mode: str, chunk_rows: int, score_buffer_bytes: int) -> None:
    if mode not in ("auto", "save", "chunk", "score"):
        raise ValueError(f"mode {mode!r}: choose from auto, save, chunk, score")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows {chunk_rows}: must be at least 1")
    if score_buffer_bytes < 0:
        raise ValueError(f"score_buffer_bytes {score_buffer_bytes}: must not be negative")


def check_labels(labels: Tensor, ignore_index: int, vocab_size: int) -> None:
    if labels.is_cpu:
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
        if bool(bad.any()):
            raise ValueError(f"labels: {int(labels[bad][0])} is outside the vocabulary of {vocab_size}")
    elif os.environ.get(CHECK_LABELS_VARIABLE) == "1":
        good = (labels == ignore_index) | ((labels >= 0) & (labels < vocab_size))
        torch._assert_async(good.all(), f"a label is outside the vocabulary of {vocab_size}")
