"""The Triton kernels of the cross-entropy. Every sum has a fixed order: no atomics, no tuning at run time."""

# Triton reads annotations and accepts only its own, so the kernels have none.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

_MIN = tl.constexpr(-3.4028234663852886e38)
"""Initial value of a maximum: finite, so that a row that is all padding does not compute −inf − (−inf)."""


@triton.jit
def _tanh(x):
    """tanh(x) = 1 − 2 / (1 + e^2x), or its series near 0, where the difference would lose digits."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(square < 0.01, series, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))


@triton.jit
def _local_column(label, first_column, columns):
    """Return the label's column among this rank's, or −1. It has 32 bits, as it is compared with every column."""
    column = label - first_column
    return tl.where((column >= 0) & (column < columns), column, -1).to(tl.int32)


@triton.jit
def row_statistics(
    logits,
    row_stride,
    labels,
    out,
    out_stride,
    first_column,
    columns,
    softcap,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the statistics [3 or 4, rows] of logits [rows, columns] in fp32; each program handles one row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    column = _local_column(tl.load(labels + row), first_column, columns)
    is_local = column >= 0
    target = tl.load(logits + column, mask=is_local, other=0.0)
    if CAPPED:
        target = softcap * _tanh(target / softcap)

    top = tl.full((), _MIN, tl.float32)
    total = tl.zeros((), tl.float32)
    remainder = tl.zeros((), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=at < columns, other=0.0)
        if CAPPED:
            z = softcap * _tanh(z / softcap)
        z = tl.where(at < columns, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        if SMOOTHED:
            remainder += start * (top - new_top) + tl.sum(tl.where(at < columns, z - new_top, 0.0), 0)
        top = new_top

    out += row
    tl.store(out, top)
    tl.store(out + out_stride, tl.where(is_local, target, -float("inf")))
    tl.store(out + 2 * out_stride, total)
    if SMOOTHED:
        tl.store(out + 3 * out_stride, remainder)


@triton.jit
def row_gradient(
    logits,
    row_stride,
    out,
    out_row_stride,
    labels,
    coefficients,
    coefficient_stride,
    first_column,
    columns,
    width,
    softcap,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the logits' gradient [rows, width] into `out`; each program handles one row. `out` may be a narrower dtype
    in the memory of the logits, each row at the start of its logits: every number is read before it is overwritten."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    out += row * out_row_stride
    coefficients += row
    scale = tl.load(coefficients)
    top = tl.load(coefficients + coefficient_stride)
    uniform = tl.load(coefficients + 2 * coefficient_stride)
    at_label = tl.load(coefficients + 3 * coefficient_stride)
    column = _local_column(tl.load(labels + row), first_column, columns)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=at < columns, other=-float("inf"))
        tl.debug_barrier()  # this thread writes over numbers that other threads have yet to read
        slope = 1.0
        if CAPPED:
            capped = _tanh(z / softcap)
            slope = 1.0 - capped * capped
            z = softcap * capped
        gradient = scale * tl.exp(z - top)
        if SMOOTHED:
            gradient -= uniform
        gradient = tl.where(at == column, at_label, gradient) * slope
        gradient = tl.where(at < columns, gradient, 0.0)
        # A scale of 0 marks a token that does not count; its logits may be anything.
        gradient = tl.where(scale != 0.0, gradient, 0.0)
        tl.store(out + at, gradient.to(out.dtype.element_ty), mask=at < width)


@triton.jit
def scale_in_place(values, scale, count, BLOCK: tl.constexpr):
    """Multiply values [count] by scale [1] in fp32. Where the scale is 1, as it mostly is, nothing is read or
    written."""
    factor = tl.load(scale)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(values + at, mask=at < count, other=0.0).to(tl.float32) * factor
        tl.store(values + at, scaled.to(values.dtype.element_ty), mask=at < count)


@triton.jit
def score_slices(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    labels,
    out,
    tokens,
    width,
    first_column,
    columns,
    slices,
    slice_columns,
    softcap,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    FP32_DOT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    GROUP_TILES: tl.constexpr,
):
    """Compute statistics [slices, 3 or 4, tokens] of the logits hidden [tokens, width] · weightᵀ [width, columns],
    which are never stored. One program a tile of tokens and slice of the vocabulary. Programs that run together share
    tiles of both (GROUP_TILES), so that the L2 cache serves them. FP32_DOT: products of operands turned to fp32."""
    tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    program = tl.program_id(0)
    first_tile = program // (GROUP_TILES * slices) * GROUP_TILES
    group = tl.minimum(tiles - first_tile, GROUP_TILES)
    within = program % (GROUP_TILES * slices)
    tile, piece = first_tile + within % group, within // group

    token = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    exists = token < tokens
    hidden += token.to(tl.int64)[:, None] * hidden_stride
    column = _local_column(tl.load(labels + token, mask=exists, other=-1), first_column, columns)
    top = tl.full((BLOCK_TOKENS,), _MIN, tl.float32)
    target = tl.full((BLOCK_TOKENS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_TOKENS,), tl.float32)
    remainder = tl.zeros((BLOCK_TOKENS,), tl.float32)

    begin = piece * slice_columns
    end = tl.minimum(begin + slice_columns, columns)
    for start in range(begin, end, BLOCK_COLUMNS):
        at = start + tl.arange(0, BLOCK_COLUMNS)
        row = weight + at.to(tl.int64)[None, :] * weight_stride
        z = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), tl.float32)
        for channel in range(0, width, BLOCK_WIDTH):
            k = channel + tl.arange(0, BLOCK_WIDTH)
            a = tl.load(hidden + k[None, :], mask=exists[:, None] & (k[None, :] < width), other=0.0)
            b = tl.load(row + k[:, None], mask=(at[None, :] < end) & (k[:, None] < width), other=0.0)
            if FP32_DOT:  # noqa: SIM108  # Triton decides an if while it compiles
                z = tl.dot(a.to(tl.float32), b.to(tl.float32), z, input_precision="ieee")
            else:
                z = tl.dot(a, b, z)
        if CAPPED:
            z = softcap * _tanh(z / softcap)
        z = tl.where(at[None, :] < end, z, -float("inf"))
        target = tl.maximum(target, tl.max(tl.where(at[None, :] == column[:, None], z, -float("inf")), 1))
        new_top = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top[:, None]), 1)
        if SMOOTHED:
            shifted = tl.where(at[None, :] < end, z - new_top[:, None], 0.0)
            remainder += (start - begin) * (top - new_top) + tl.sum(shifted, 1)
        top = new_top

    parts: tl.constexpr = 4 if SMOOTHED else 3
    out += piece.to(tl.int64) * parts * tokens + token
    tl.store(out, top, mask=exists)
    tl.store(out + tokens, target, mask=exists)
    tl.store(out + 2 * tokens, total, mask=exists)
    if SMOOTHED:
        tl.store(out + 3 * tokens, remainder, mask=exists)
