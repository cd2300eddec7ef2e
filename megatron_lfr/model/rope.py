"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864), halves rotated as in Hugging Face's Llama."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_lfr.model.config import ModelConfig


def rope_frequencies(config: ModelConfig, length: int = 0) -> Tensor:
    """Return the angle per position, in radians, of each pair of channels: fp32 [head_dim / 2].

    length: of the sequence, in tokens; it matters to dynamic scaling alone.
    """
    base, size = config.rotary_base, config.head_dim
    if grows(config, length):
        stretch = config.rope_scaling_factor * (length / config.rope_original_max_position_embeddings - 1) + 1
        base *= stretch ** (size / (size - 2))
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequencies = 1.0 / base**exponents
    if not config.use_rope_scaling or config.rope_scaling_type == "dynamic":
        return frequencies
    if config.rope_scaling_type == "linear":
        return frequencies / config.rope_scaling_factor
    kept = _kept_by_yarn(config) if config.rope_scaling_type == "yarn" else _kept_by_llama3(frequencies, config)
    return kept * frequencies + (1.0 - kept) * frequencies / config.rope_scaling_factor


def grows(config: ModelConfig, length: int) -> bool:
    """Return whether dynamic scaling stretches the positions of a sequence of `length` tokens (NTK-aware, as in
    transformers' modeling_rope_utils.py)."""
    is_dynamic = config.use_rope_scaling and config.rope_scaling_type == "dynamic"
    return is_dynamic and length > config.rope_original_max_position_embeddings


def _kept_by_llama3(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Return the share of each frequency that Llama 3.1's scaling keeps: short wavelengths stay, long ones are
    multiplied by the factor, those between blend linearly.

    Source: https://github.com/meta-llama/llama-models, models/llama3/model.py, apply_scaling.
    """
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_max_position_embeddings * frequencies / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0.0, 1.0)


def _kept_by_yarn(config: ModelConfig) -> Tensor:
    """Return the share of each frequency that YaRN keeps (Peng et al. 2023, https://arxiv.org/abs/2309.00071, section
    3.2): pairs of channels between those that turn beta_fast and beta_slow times blend linearly, by their numbers."""
    size, original = config.head_dim, config.rope_original_max_position_embeddings

    def pair(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))

    first, last = pair(config.yarn_beta_fast), pair(config.yarn_beta_slow)
    if config.yarn_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = last - first or 0.001
    return 1.0 - ((torch.arange(size // 2, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)


def _attention_factor(config: ModelConfig) -> float:
    """Return the factor on rotated queries and keys, which is 1 but for YaRN."""
    if not config.use_rope_scaling or config.rope_scaling_type != "yarn":
        return 1.0
    return config.yarn_attention_factor or 0.1 * math.log(max(config.rope_scaling_factor, 1.0)) + 1.0


def rope_tables(config: ModelConfig, length: int = 0) -> tuple[Tensor, Tensor]:
    """Return (cos, signed sin) of every position's angles: fp32 [max_position_embeddings, head_dim].

    Channels i and i + head_dim / 2 are a pair and share an angle; the first of the two has −sin, so that
    rotated = x · cos + (x with its halves swapped) · sin. length: as of rope_frequencies.
    """
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, rope_frequencies(config, length))
    cos, sin, factor = angles.cos(), angles.sin(), _attention_factor(config)
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries [B, S, G, heads, D], rotated keys [B, S, G, D] and values [B, S, G, D].

    qkv [B, S, G, heads + 2, D] holds, for each of G query groups, its query heads, its key and its value. cos and sin
    are fp32 [B or 1, S, 1, 1, D], from rope_tables.
    """
    if torch.compiler.is_compiling():  # the compiler fuses plain operations, and cannot trace writes into slices
        rotated = _rotated(qkv[..., : heads + 1, :].float(), cos, sin).to(qkv.dtype)
        return rotated[..., :heads, :], rotated[..., heads, :], qkv[..., heads + 1, :]
    return _SplitAndRotate.apply(qkv, cos, sin, heads)  # type: ignore[no-any-return,no-untyped-call]


class _SplitAndRotate(torch.autograd.Function):
    """Splits and rotates in one pass over each half, forward and backward; slicing would add a zero-filled copy for the
    gradient of each slice."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.shape = qkv.shape
        rotated = torch.empty_like(qkv[..., : heads + 1, :])
        _rotate(qkv[..., : heads + 1, :], cos, sin, out=rotated)
        return rotated[..., :heads, :], rotated[..., heads, :], qkv[..., heads + 1, :].clone()

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        heads = d_q.shape[-2]
        d_qkv = d_q.new_empty(ctx.shape)
        # The transpose of a rotation is the rotation by the opposite angle.
        _rotate(d_q, cos, -sin, out=d_qkv[..., :heads, :])
        _rotate(d_k.unsqueeze(-2), cos, -sin, out=d_qkv[..., heads : heads + 1, :])
        d_qkv[..., heads + 1, :] = d_v
        return d_qkv, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate the last dimension of x by the angles of the tables, in fp32, into `out`.

    GPU operations read and write mixed dtypes and round once, so no separate passes cast or swap anything.
    """
    half = x.shape[-1] // 2
    product = torch.mul(x, cos, out=out if out.dtype == torch.float32 else None)
    for to, partner in ((slice(None, half), slice(half, None)), (slice(half, None), slice(None, half))):
        torch.addcmul(product[..., to], x[..., partner], sin[..., to], out=out[..., to])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((second, first), -1), sin)
