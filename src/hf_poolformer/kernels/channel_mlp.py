"""MLP branch of the block: y = res_scale * x + mask * layer_scale * (W2 act(W1 n(x) + b1) + b2).

Rows are tokens, M = B H W of them. n is a GroupNorm(1), with one mean mu and r = rstd per sample, or a LayerNorm over
channels, with one per token: `span` tokens share them, H W or 1. Below, N is span * C, what a mean is taken over.

    x^ = (x - mu) r,  n(x) = gamma x^ + beta,  z = W1 n(x) + b1 = x^ F^T + v,  F = W1 gamma,  v = b1 + W1 beta

Up to 128 channels one kernel does it all: a tile's tokens are read once, normalised in registers, and the hidden
activation never leaves the chip; an H100 takes 0.4 to 0.6 of the time of two kernels. Beyond, every program would
read all weights from L2 for few tokens, and two products win. There the norm is folded into the first one, so that
tokens go from memory to the matrix units as they are,

    z = r (x F^T) - r mu u + v,    u = F 1

where u sums F as rounded for the product, so that a mean far from zero cancels to float32 accuracy. F, u and v are
made anew in every call: weights may change in ways that nothing tells (see backends.py). In whole stages that takes
no launch of its own, but some programs of the one that combines the statistics of x.

Backward. z and x^ are kept, in the precision of the products: 5 elements per channel and token. (With one kernel x^
takes the place of x; with two it is made from x when it is needed.) act(z) is recomputed from z; recomputing z as well
would cost a sixth of the step's arithmetic and as many bytes as writing it. With g = dL/dy, m = mask:

    dz = m (g layer_scale W2) act'(z)      q = dz F       dx = res_scale g + r (q - sum q / N - x^ sum(q x^) / N)
    dF = dz^T x^         dW1 = dF gamma + dv beta^T       db1 = dv = dz^T 1
    dgamma = sum_k dF W1         dbeta = W1^T dv          G = g^T (m act(z)),   sum m g = g^T m
    dW2 = layer_scale G          db2 = layer_scale sum m g           dlayer_scale = sum_k W2 G + b2 sum m g

No kernel sums over tokens: such sums in the epilogue of the first product (64 by 64 entries of dz) take as long as all
the rest of it. x^ and act(z) have more columns than entries instead, of ones and of m: dv and sum m g are the last
columns of dF and G. The sums over a sample are taken of q, which is a quarter as large as dz. For star_relu,
act(z) = a p + b with p = relu(z)^2, the columns are those of p, and G = a g^T (m p) + b sum m g; the gradients of a
and b follow from sums over weights. dF and G reduce over all tokens: those two products are cuBLAS's, which splits
them; the other four are Triton's. What makes the parameters' gradients of dF and G is one launch, which also finishes
all sums that an earlier one began; what it begins itself is left to the last, which makes dx.

GELU. float32 takes the exact distribution of the normal, by erf. Half precision takes 1/2 + tanh(f(z)) / 2, where f is
the odd polynomial nearest to atanh(erf(z / sqrt 2)) for |z| <= 4.5: off by 4e-5, and one instruction on NVIDIA's GPUs
(off by 2^-11), where erf costs more than the product around it.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .flops import count_products
from .launch import (
    FUSION,
    INTERPRETED,
    Tiles,
    bucket,
    cdiv,
    empty_like_each,
    empty_nhwc,
    float32,
    kernel,
    next_power_of_2,
    on,
    operand,
    precision,
    transposed_product,
    tuned,
)
from .registration import differentiable
from .statistics import (
    COMBINE,
    combine,
    combine_into,
    combine_rows,
    combine_sample,
    standardised,
    store_row_moments,
    whole_rows,
)


# From the H100's balance, 800 TFLOP/s of bfloat16 to 3 TB/s: a product with N columns does N FLOP per byte of its left
# operand, if that is read once. So C = 64 and 128 are bound by bytes and want small tiles, many in flight; C = 320 and
# 512 by arithmetic and want 128 x 128 with 8 warps. 64 deep is one 128-byte line of bfloat16. Column tiles of the same
# tokens are neighbouring programs, so they share the tokens through L2, where the weights (2 MB at most) stay anyway.
# Compiled for sm_90, each of these keeps its tiles in registers; 128 x 256 spills them.
TILES = [
    Tiles(128, 128, 64, 8, 3),
    Tiles(128, 128, 32, 8, 4),
    Tiles(128, 64, 64, 8, 3),
    Tiles(128, 64, 64, 4, 3),
    Tiles(64, 128, 64, 8, 3),
    Tiles(64, 64, 64, 4, 4),
]
# float32 tiles are twice as large in shared memory, and FMA units want smaller ones.
TILES_FLOAT32 = [Tiles(64, 64, 32, 4, 3), Tiles(128, 64, 32, 8, 3), Tiles(64, 64, 16, 8, 3)]
# The epilogue of the backward expansion keeps three tiles alive.
TILES_BACKWARD = [
    Tiles(64, 64, 64, 4, 3),
    Tiles(128, 64, 64, 8, 3),
    Tiles(64, 128, 64, 8, 3),
    Tiles(64, 64, 32, 4, 4),
]
# In one kernel: all channels of some rows, and so many hidden columns at a time; there is no depth.
TILES_WHOLE = [Tiles(64, 64, 0, 4, 2), Tiles(64, 64, 0, 4, 3), Tiles(128, 64, 0, 8, 3)]
WHOLE_CHANNELS = 128
FOLD_ROWS, FOLD_COLUMNS = (16, 16) if INTERPRETED else (16, 128)
REDUCE_ROWS, REDUCE_COLUMNS = (16, 16) if INTERPRETED else (64, 64)
# Of weights: narrow where rows are summed, which makes more programs.
GRADIENT_LONG, GRADIENT_SHORT = (16, 16) if INTERPRETED else (128, 16)
SAMPLE_ROWS = 16 if INTERPRETED else 1024
PROGRAMS = 4 if INTERPRETED else 1056
if INTERPRETED:
    TILES = TILES_FLOAT32 = TILES_BACKWARD = TILES_WHOLE = [Tiles(16, 16, 16, 1, 1)]

ACTIVATIONS = ("gelu", "relu", "silu", "squared_relu", "star_relu")


# ---------------------------------------------------------------------------------------------------------------------
# Parts of kernels. Shapes of pointers: M tokens, C channels, R hidden channels, S = M / span statistics, B samples.


@triton.jit
def vector(pointer, index, inside, default: tl.constexpr):
    """Entries of an optional vector as float32."""
    if pointer is None:
        values = tl.full(index.shape, default, tl.float32)
    else:
        values = tl.load(pointer + index, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def scalar(pointer, default: tl.constexpr):
    """A learned scalar, or the constant that stands for it."""
    return default if pointer is None else tl.load(pointer).to(tl.float32)


@triton.jit
def positive(z):
    """relu(z); as torch's, it keeps NaN."""
    return tl.where(z < 0.0, 0.0, z)


@triton.jit
def normal_distribution(z, GELU: tl.constexpr):
    if GELU == "gelu":
        p = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        near = tl.minimum(tl.maximum(z, -4.5), 4.5)
        square = near * near
        odd = near * (0.797703686 + square * (0.0368205252 + square * -0.000320909514))
        if GELU == "gelu_tanh":
            p = 0.5 + 0.5 * tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [odd], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            p = tl.sigmoid(2.0 * odd)
    return p


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z) before its scale and shift, and its derivative, which costs nothing where nobody takes it."""
    if ACT == "silu":
        gate = tl.sigmoid(z)
        h = z * gate
        d = gate * (1.0 + z * (1.0 - gate))
    elif ACT == "relu":
        h = positive(z)
        d = tl.where(z > 0.0, 1.0, 0.0)
    elif ACT == "squared_relu" or ACT == "star_relu":
        h = positive(z) * positive(z)
        d = 2.0 * positive(z)
    else:
        p = normal_distribution(z, ACT)
        h = z * p
        d = p + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    return h, d


@triton.jit
def affine(h, act_scale, act_bias):
    """Learned scale and shift of an activation."""
    if act_scale is not None:
        h *= scalar(act_scale, 1.0)
    if act_bias is not None:
        h += scalar(act_bias, 0.0)
    return h


@triton.jit
def norm_of(statistics, row, row_inside, span, eps):
    """Mean and rstd of each row; statistics (S, 2)."""
    entry = statistics + 2 * (row // span)
    mean = tl.load(entry, mask=row_inside, other=0.0)
    return mean, tl.rsqrt(tl.load(entry + 1, mask=row_inside, other=1.0) + eps)


@triton.jit
def store_tail(target, row, row_inside, values, N: tl.constexpr, STRIDE: tl.constexpr):
    """Columns N to STRIDE of rows from `target` on: `values` (rows,), what their rounding leaves over, and zeros."""
    TAIL: tl.constexpr = 16
    column = tl.arange(0, TAIL)[None, :]
    kept = values.to(target.dtype.element_ty)
    rest = values - kept.to(tl.float32)
    tail = tl.where(column == 0, kept.to(tl.float32)[:, None], tl.where(column == 1, rest[:, None], 0.0))
    place = row[:, None] * STRIDE + N + column
    tl.store(target + place, tail.to(target.dtype.element_ty), mask=row_inside[:, None] & (N + column < STRIDE))


@triton.jit
def product(
    a,  # points to the tile's first row of (M, A_STRIDE), of which K columns count
    b,  # (N, K) by these strides
    row,
    column,
    row_inside,
    stride_column,
    stride_depth,
    N: tl.constexpr,
    K: tl.constexpr,
    A_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Rows of A times columns of B^T, float32."""
    accumulator = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, K, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        a_inside = row_inside[:, None]
        b_inside = (column < N)[None, :]
        if K % DEPTH != 0:
            a_inside = a_inside & (depth < K)[None, :]
            b_inside = b_inside & (depth < K)[:, None]
        left = tl.load(a + row[:, None] * A_STRIDE + depth[None, :], mask=a_inside, other=0.0)
        right = tl.load(b + column[None, :] * stride_column + depth[:, None] * stride_depth, mask=b_inside, other=0.0)
        accumulator = tl.dot(left.to(OPERAND), right.to(OPERAND), accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def finish(
    out,  # W2 act(z) of the rows from `first` on
    x,  # (M, C)
    bias,  # (C,)
    layer_scale,  # (C,)
    res_scale,  # (C,)
    mask,  # (B,)
    y,  # (M, C)
    partials,  # (3, column blocks, M): counts, means and M2 of rows, if there is room for them
    first,
    index,  # of each row in a plane of partials
    row,
    column,
    M,
    tokens,
    plane,
    N: tl.constexpr,
):
    """Bias, scales, shortcut and statistics of a tile of y; `block` of columns."""
    row_inside = first + row < M
    column_inside = column < N
    inside = row_inside[:, None] & column_inside[None, :]
    out += vector(bias, column, column_inside, 0.0)[None, :]
    out *= vector(layer_scale, column, column_inside, 1.0)[None, :]
    out *= vector(mask, (first + row) // tokens, row_inside, 1.0)[:, None]
    place = first.to(tl.int64) * N + row[:, None] * N + column[None, :]
    shortcut = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    out += shortcut * vector(res_scale, column, column_inside, 1.0)[None, :]
    out = out.to(y.dtype.element_ty)
    tl.store(y + place, out, mask=inside)
    if partials is not None:
        store_row_moments(out.to(tl.float32), inside, row_inside, partials, plane, index)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@kernel
def fold_kernel(
    weight1,  # (R, C)
    norm_weight,  # (C,)
    norm_bias,  # (C,)
    bias1,  # (R,)
    weight2,  # (C, R)
    layer_scale,  # (C,)
    folded1,  # (R, C)
    sums,  # (R,)
    offset,  # (R,)
    folded2,  # (C, R)
    partials,  # (3, groups, samples entries)
    statistics,  # (samples, 2)
    R,
    C,
    combining,
    groups,
    samples,
    entries,
    plane,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMBINE: tl.constexpr,
):
    """
    F = weight1 gamma and layer_scale weight2 in the precision of products; u = F 1, v = bias1 + weight1 beta.

    The first `combining` programs make statistics of partials, of which a sample has `entries` in every group.
    """
    program = tl.program_id(0) - combining
    blocks = tl.cdiv(R, ROWS)
    if program < 0:
        if partials is not None:
            if entries == 1:
                token = tl.program_id(0) * COMBINE + tl.arange(0, COMBINE)
                combine_rows(token, partials, statistics, groups, samples, plane)
            else:
                sample = tl.program_id(0).to(tl.int64)
                combine_sample(
                    sample, partials, statistics, groups, entries, samples * entries, entries, plane, COMBINE
                )
    elif program < blocks:
        row = program * ROWS + tl.arange(0, ROWS)
        total = tl.zeros((ROWS,), tl.float32)
        shift = vector(bias1, row, row < R, 0.0)
        for start in range(0, C, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = (row < R)[:, None] & (column < C)[None, :]
            place = row[:, None] * C + column[None, :]
            value = tl.load(weight1 + place, mask=inside, other=0.0).to(tl.float32)
            shift += tl.sum(value * vector(norm_bias, column, column < C, 0.0)[None, :], 1)
            scaled = (value * vector(norm_weight, column, column < C, 1.0)[None, :]).to(folded1.dtype.element_ty)
            tl.store(folded1 + place, scaled, mask=inside)
            total += tl.sum(tl.where(inside, scaled.to(tl.float32), 0.0), 1)
        if sums is not None:
            tl.store(sums + row, total, mask=row < R)
        if offset is not None:
            tl.store(offset + row, shift, mask=row < R)
    elif folded2 is not None:
        row = (program - blocks) * ROWS + tl.arange(0, ROWS)
        scale = vector(layer_scale, row, row < C, 1.0)[:, None]
        for start in range(0, R, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = (row < C)[:, None] & (column < R)[None, :]
            place = row[:, None] * R + column[None, :]
            value = tl.load(weight2 + place, mask=inside, other=0.0).to(tl.float32) * scale
            tl.store(folded2 + place, value.to(folded2.dtype.element_ty), mask=inside)


@kernel
def normalise_kernel(
    x,  # (M, C)
    statistics,  # (S, 2)
    normed,  # (M, STRIDE)
    M,
    span,
    eps,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """normed = x^ in the precision of products, then a column of ones."""
    first = tl.program_id(0) * ROWS
    start = first.to(tl.int64)
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    row_inside = first + row < M
    inside = row_inside[:, None] & (channel < C)[None, :]
    mean, rstd = norm_of(statistics, first + row, row_inside, span, eps)
    value = tl.load(x + start * C + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    value = (value - mean[:, None]) * rstd[:, None]
    target = normed + start * STRIDE
    tl.store(target + row[:, None] * STRIDE + channel[None, :], value.to(normed.dtype.element_ty), mask=inside)
    store_tail(target, row, row_inside, tl.full((ROWS,), 1.0, tl.float32), C, STRIDE)


@kernel
def mlp_kernel(
    x,  # (M, C)
    statistics,  # (S, 2)
    norm_weight,  # (C,)
    norm_bias,  # (C,)
    weight1,  # (R, C)
    bias1,  # (R,)
    weight2,  # (C, R)
    bias2,  # (C,)
    act_scale,  # (1,)
    act_bias,  # (1,)
    layer_scale,  # (C,)
    res_scale,  # (C,)
    mask,  # (B,)
    y,  # (M, C)
    partials,  # (3, 1, M)
    preactivation,  # (M, R)
    normed,  # (M, STRIDE)
    M,
    tokens,
    span,
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    ACT: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The whole branch; z and x^ with its ones as well, if there is room for them. Without statistics each row makes
    its own."""
    first = tl.program_id(0) * ROWS
    start = first.to(tl.int64)
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    row_inside = first + row < M
    channel_inside = channel < C
    inside = row_inside[:, None] & channel_inside[None, :]
    place = start * C + row[:, None] * C + channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if statistics is None:
        value, rstd = standardised(value, inside, eps, C)
    else:
        mean, rstd = norm_of(statistics, first + row, row_inside, span, eps)
        value = (value - mean[:, None]) * rstd[:, None]
    if normed is not None:
        target = normed + start * STRIDE
        tl.store(target + row[:, None] * STRIDE + channel[None, :], value.to(normed.dtype.element_ty), mask=inside)
        store_tail(target, row, row_inside, tl.full((ROWS,), 1.0, tl.float32), C, STRIDE)
    value = value * vector(norm_weight, channel, channel_inside, 1.0)[None, :]
    value = value + vector(norm_bias, channel, channel_inside, 0.0)[None, :]
    if WIDTH != C:
        value = tl.where(inside, value, 0.0)
    value = value.to(OPERAND)
    out = tl.zeros((ROWS, WIDTH), tl.float32)
    for base in range(0, R, COLUMNS):
        column = base + tl.arange(0, COLUMNS)
        column_inside = column < R
        weight_inside = channel_inside[:, None] & column_inside[None, :]
        right = tl.load(weight1 + column[None, :] * C + channel[:, None], mask=weight_inside, other=0.0)
        z = tl.dot(value, right.to(OPERAND)) + vector(bias1, column, column_inside, 0.0)[None, :]
        if preactivation is not None:
            z_place = start * R + row[:, None] * R + column[None, :]
            z_inside = row_inside[:, None] & column_inside[None, :]
            tl.store(preactivation + z_place, z.to(preactivation.dtype.element_ty), mask=z_inside)
        h, _ = activate(z, ACT)
        h = affine(h, act_scale, act_bias)
        weight_inside = column_inside[:, None] & channel_inside[None, :]
        right = tl.load(weight2 + channel[None, :] * R + column[:, None], mask=weight_inside, other=0.0)
        out = tl.dot(h.to(OPERAND), right.to(OPERAND), out)
    finish(out, x, bias2, layer_scale, res_scale, mask, y, partials, first, start + row, row, channel, M, tokens, M, C)


@kernel
def expand_kernel(
    source,  # (M, C), or x^ (M, C) of (M, STRIDE) if NORMED
    statistics,  # (S, 2)
    folded,  # (R, C)
    sums,  # (R,)
    offset,  # (R,)
    act_scale,  # (1,)
    act_bias,  # (1,)
    preactivation,  # (M, R)
    hidden,  # (M, R)
    M,
    span,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    ACT: tl.constexpr,
    NORMED: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """hidden = act(z), and z if there is room for it: K = C, N = R."""
    blocks: tl.constexpr = tl.cdiv(N, COLUMNS)
    first = (tl.program_id(0) // blocks) * ROWS
    start = first.to(tl.int64)
    row = tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = first + row < M
    a = source + start * STRIDE
    z = product(a, folded, row, column, row_inside, K, 1, N, K, STRIDE, PRECISION, OPERAND, DEPTH)
    shift = tl.load(offset + column, mask=column < N, other=0.0)[None, :]
    if NORMED:
        z += shift
    else:
        mean, rstd = norm_of(statistics, first + row, row_inside, span, eps)
        z = z * rstd[:, None] + shift
        z -= (rstd * mean)[:, None] * tl.load(sums + column, mask=column < N, other=0.0)[None, :]
    place = start * N + row[:, None] * N + column[None, :]
    inside = row_inside[:, None] & (column < N)[None, :]
    if preactivation is not None:
        tl.store(preactivation + place, z.to(preactivation.dtype.element_ty), mask=inside)
    h, _ = activate(z, ACT)
    h = affine(h, act_scale, act_bias)
    tl.store(hidden + place, h.to(hidden.dtype.element_ty), mask=inside)


@kernel
def contract_kernel(
    hidden,  # (M, R)
    weight,  # (C, R)
    bias,  # (C,)
    x,  # (M, C)
    layer_scale,  # (C,)
    res_scale,  # (C,)
    mask,  # (B,)
    y,  # (M, C)
    partials,  # (3, column blocks, M)
    M,
    tokens,
    plane,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """y from the hidden activation and the shortcut x: K = R, N = C."""
    blocks: tl.constexpr = tl.cdiv(N, COLUMNS)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks) * ROWS
    start = first.to(tl.int64)
    row = tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = first + row < M
    out = product(hidden + start * K, weight, row, column, row_inside, K, 1, N, K, K, PRECISION, OPERAND, DEPTH)
    index = block.to(tl.int64) * M + first + row
    finish(out, x, bias, layer_scale, res_scale, mask, y, partials, first, index, row, column, M, tokens, plane, N)


@kernel
def shortcut_kernel(
    g,  # (M, C)
    normed,  # x^ (M, C) of (M, STRIDE)
    statistics,  # (S, 2)
    rounded,  # (M, C)
    sums,  # (splits, C)
    M,
    span,
    eps,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """rounded = g in the precision of products, and sums over tokens of g x; each if there is room for it."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        long_row = row.to(tl.int64)[:, None]
        inside = (row < M)[:, None] & (column < C)[None, :]
        grad = tl.load(g + long_row * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if rounded is not None:
            tl.store(rounded + long_row * C + column[None, :], grad.to(rounded.dtype.element_ty), mask=inside)
        if sums is not None:
            mean, rstd = norm_of(statistics, row, row < M, span, eps)
            x = tl.load(normed + long_row * STRIDE + column[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(grad * (x / rstd[:, None] + mean[:, None]), 0)
    if sums is not None:
        tl.store(sums + tl.program_id(0).to(tl.int64) * C + column, total, mask=column < C)


@kernel
def expand_backward_kernel(
    g,  # (M, C)
    weight,  # layer_scale W2, (C, R)
    preactivation,  # (M, R)
    act_scale,  # (1,)
    mask,  # (B,)
    dz,  # (M, R)
    hidden,  # (M, STRIDE)
    M,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dz, and hidden = mask act(z) before its scale and shift, with the mask in the columns after it: K = C, N = R."""
    blocks: tl.constexpr = tl.cdiv(N, COLUMNS)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks) * ROWS
    start = first.to(tl.int64)
    row = tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = first + row < M
    grad = product(g + start * K, weight, row, column, row_inside, 1, N, N, K, K, PRECISION, OPERAND, DEPTH)
    inside = row_inside[:, None] & (column < N)[None, :]
    place = start * N + row[:, None] * N + column[None, :]
    z = tl.load(preactivation + place, mask=inside, other=0.0).to(tl.float32)
    h, d = activate(z, ACT)
    factor = vector(mask, (first + row) // tokens, row_inside, 1.0)
    grad *= d * scalar(act_scale, 1.0)
    if mask is not None:
        h *= factor[:, None]
        grad *= factor[:, None]
    tl.store(dz + place, grad.to(dz.dtype.element_ty), mask=inside)
    target = hidden + start * STRIDE
    tl.store(target + row[:, None] * STRIDE + column[None, :], h.to(hidden.dtype.element_ty), mask=inside)
    if block == 0:
        store_tail(target, row, row_inside, factor, N, STRIDE)


@kernel
def contract_backward_kernel(
    dz,  # (M, R)
    folded,  # (R, C)
    normed,  # x^ (M, C) of (M, STRIDE)
    q,  # (M, C)
    row_sums,  # (2, column blocks, M)
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """q, and if there is room for them sums over the block's columns of q and of q x^: K = R, N = C."""
    blocks: tl.constexpr = tl.cdiv(N, COLUMNS)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks) * ROWS
    start = first.to(tl.int64)
    row = tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = first + row < M
    out = product(dz + start * K, folded, row, column, row_inside, 1, N, N, K, K, PRECISION, OPERAND, DEPTH)
    inside = row_inside[:, None] & (column < N)[None, :]
    # Sums are of what is stored, so that it cancels.
    out = out.to(q.dtype.element_ty)
    tl.store(q + start * N + row[:, None] * N + column[None, :], out, mask=inside)
    if row_sums is not None:
        place = start * STRIDE + row[:, None] * STRIDE + column[None, :]
        hat = tl.load(normed + place, mask=inside, other=0.0).to(tl.float32)
        out = out.to(tl.float32)
        target = row_sums + block.to(tl.int64) * M + first + row
        tl.store(target, tl.sum(out, 1), mask=row_inside)
        tl.store(target + blocks * tl.cast(M, tl.int64), tl.sum(out * hat, 1), mask=row_inside)


@triton.jit
def store_activation_gradients(parts, count, dact_scale, dact_bias, BLOCK: tl.constexpr):
    """Sums of parts (count, 2), where there is room for them; of no parts nothing."""
    lanes = tl.arange(0, BLOCK)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        inside = start + lanes < count
        scale_sum += tl.load(parts + 2 * (start + lanes), mask=inside, other=0.0)
        bias_sum += tl.load(parts + 2 * (start + lanes) + 1, mask=inside, other=0.0)
    if dact_scale is not None:
        tl.store(dact_scale, tl.sum(scale_sum, 0).to(dact_scale.dtype.element_ty), mask=count > 0)
    if dact_bias is not None:
        tl.store(dact_bias, tl.sum(bias_sum, 0).to(dact_bias.dtype.element_ty), mask=count > 0)


@kernel
def norm_backward_kernel(
    q,  # (M, C)
    normed,  # x^ (M, C) of (M, STRIDE)
    g,  # (M, C)
    statistics,  # (S, 2)
    sums,  # (2, S) of q and q x^; without them each row is a sample, and makes its own
    res_scale,  # (C,)
    dx,  # (M, C)
    act_sums,  # (act_parts, 2)
    dact_scale,  # (1,)
    dact_bias,  # (1,)
    M,
    span,
    act_parts,
    eps,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dx, and sums of act_sums where there is room for them."""
    first = tl.program_id(0) * ROWS
    start = first.to(tl.int64)
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    row_inside = first + row < M
    inside = row_inside[:, None] & (channel < C)[None, :]
    place = start * C + row[:, None] * C + channel[None, :]
    out = tl.load(q + place, mask=inside, other=0.0).to(tl.float32)
    hat_place = start * STRIDE + row[:, None] * STRIDE + channel[None, :]
    hat = tl.load(normed + hat_place, mask=inside, other=0.0).to(tl.float32)
    if sums is None:
        mean_q = tl.sum(out, 1) / C
        correlation = tl.sum(out * hat, 1) / C
    else:
        entry = sums + (first + row) // span
        size = (C * span).to(tl.float32)
        mean_q = tl.load(entry, mask=row_inside, other=0.0) / size
        correlation = tl.load(entry + M // span, mask=row_inside, other=0.0) / size
    _, rstd = norm_of(statistics, first + row, row_inside, span, eps)
    out = (out - mean_q[:, None] - hat * correlation[:, None]) * rstd[:, None]
    shortcut = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    out += shortcut * vector(res_scale, channel, channel < C, 1.0)[None, :]
    tl.store(dx + place, out.to(dx.dtype.element_ty), mask=inside)
    if act_sums is not None:
        store_activation_gradients(act_sums, act_parts if first == 0 else 0, dact_scale, dact_bias, WIDTH)


@kernel
def parameters_kernel(
    first,  # (R, width1 + 2 or more): dF if width1 = C, dv, and what its rounding left over
    second,  # (C, width2 + 2 or more): g^T (m act(z)) if width2 = R, sum m g, and what its rounding left over
    norm_weight,  # (C,)
    norm_bias,  # (C,)
    weight1,  # (R, C)
    weight2,  # (C, R)
    bias2,  # (C,)
    act_scale,  # (1,)
    act_bias,  # (1,)
    layer_scale,  # (C,)
    shortcut_sums,  # (splits, C): parts of the gradient of res_scale
    row_sums,  # (2, column_parts, M) of q and q x^
    dnorm_weight,  # (C,)
    dnorm_bias,  # (C,)
    dweight1,  # (R, C)
    dbias1,  # (R,)
    dweight2,  # (C, R)
    dbias2,  # (C,)
    act_sums,  # (blocks, 2): parts of the gradients of act_scale and act_bias
    dlayer_scale,  # (C,)
    dres_scale,  # (C,)
    sample_sums,  # (2, S) of q and q x^
    R,
    C,
    M,
    span,
    stride1,
    stride2,
    width1,
    width2,
    splits,
    column_parts,
    blocks1,
    blocks2,
    LONG: tl.constexpr,
    SHORT: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """
    Gradients of parameters from the products over tokens, those there is room for, and sums over samples.

    The first blocks1 programs take columns of weight1, then blocks2 take rows of weight2, the others a sample each.
    """
    if tl.program_id(0) < blocks1:
        column = tl.program_id(0) * SHORT + tl.arange(0, SHORT)
        column_inside = column < C
        gamma = vector(norm_weight, column, column_inside, 1.0)
        beta = vector(norm_bias, column, column_inside, 0.0)
        for_gamma = tl.zeros((SHORT,), tl.float32)
        for_beta = tl.zeros((SHORT,), tl.float32)
        for start in range(0, R, LONG):
            row = start + tl.arange(0, LONG)
            inside = (row < R)[:, None] & column_inside[None, :]
            dv = tl.load(first + row * stride1 + width1, mask=row < R, other=0.0)
            if dbias1 is not None:
                mine = (row < R) & (tl.program_id(0) == 0)
                tl.store(dbias1 + row, dv.to(dbias1.dtype.element_ty), mask=mine)
            if dnorm_weight is not None or dnorm_bias is not None:
                weight = tl.load(weight1 + row[:, None] * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
                for_beta += tl.sum(weight * dv[:, None], 0)
            if dnorm_weight is not None or dweight1 is not None:
                grad = tl.load(first + row[:, None] * stride1 + column[None, :], mask=inside, other=0.0)
                if dnorm_weight is not None:
                    for_gamma += tl.sum(weight * grad, 0)
                if dweight1 is not None:
                    grad = grad * gamma[None, :] + dv[:, None] * beta[None, :]
                    place = row[:, None] * C + column[None, :]
                    tl.store(dweight1 + place, grad.to(dweight1.dtype.element_ty), mask=inside)
        if dnorm_weight is not None:
            tl.store(dnorm_weight + column, for_gamma.to(dnorm_weight.dtype.element_ty), mask=column_inside)
        if dnorm_bias is not None:
            tl.store(dnorm_bias + column, for_beta.to(dnorm_bias.dtype.element_ty), mask=column_inside)
    elif tl.program_id(0) < blocks1 + blocks2:
        block = tl.program_id(0) - blocks1
        row = block * SHORT + tl.arange(0, SHORT)
        row_inside = row < C
        if dres_scale is not None:
            for_res_scale = tl.zeros((SHORT,), tl.float32)
            for start in range(0, splits, LONG):
                split = start + tl.arange(0, LONG)
                inside = (split < splits)[:, None] & row_inside[None, :]
                part = tl.load(shortcut_sums + split[:, None] * C + row[None, :], mask=inside, other=0.0)
                for_res_scale += tl.sum(part, 0)
            tl.store(dres_scale + row, for_res_scale.to(dres_scale.dtype.element_ty), mask=row_inside)
        scale = vector(layer_scale, row, row_inside, 1.0)
        if dbias2 is not None or dweight2 is not None or act_sums is not None or dlayer_scale is not None:
            tail = second + row * stride2 + width2
            total = tl.load(tail, mask=row_inside, other=0.0) + tl.load(tail + 1, mask=row_inside, other=0.0)
        if dbias2 is not None:
            tl.store(dbias2 + row, (scale * total).to(dbias2.dtype.element_ty), mask=row_inside)
        if dweight2 is not None or act_sums is not None or dlayer_scale is not None:
            for_layer_scale = vector(bias2, row, row_inside, 0.0) * total
            for_act_scale = tl.zeros((SHORT,), tl.float32)
            for_act_bias = tl.zeros((SHORT,), tl.float32)
            for start in range(0, R, LONG):
                column = start + tl.arange(0, LONG)
                inside = row_inside[:, None] & (column < R)[None, :]
                place = row[:, None] * R + column[None, :]
                plain = tl.load(second + row[:, None] * stride2 + column[None, :], mask=inside, other=0.0)
                grad = plain * scalar(act_scale, 1.0) + total[:, None] * scalar(act_bias, 0.0)
                if dlayer_scale is not None or act_sums is not None:
                    weight = tl.load(weight2 + place, mask=inside, other=0.0).to(tl.float32)
                    for_layer_scale += tl.sum(weight * grad, 1)
                    for_act_scale += tl.sum(weight * plain, 1)
                    for_act_bias += tl.sum(weight, 1)
                if dweight2 is not None:
                    grad *= scale[:, None]
                    tl.store(dweight2 + place, grad.to(dweight2.dtype.element_ty), mask=inside)
            if dlayer_scale is not None:
                tl.store(dlayer_scale + row, for_layer_scale.to(dlayer_scale.dtype.element_ty), mask=row_inside)
            if act_sums is not None:
                tl.store(act_sums + 2 * block, tl.sum(tl.where(row_inside, scale * for_act_scale, 0.0), 0))
                tl.store(act_sums + 2 * block + 1, tl.sum(tl.where(row_inside, scale * total * for_act_bias, 0.0), 0))
    elif row_sums is not None:
        sample = tl.program_id(0) - blocks1 - blocks2
        lanes = tl.arange(0, SAMPLE)
        plain_sum = tl.zeros((SAMPLE,), tl.float32)
        hat_sum = tl.zeros((SAMPLE,), tl.float32)
        entries = row_sums + sample.to(tl.int64) * span
        plane = column_parts * tl.cast(M, tl.int64)
        for _ in range(0, column_parts):
            for start in range(0, span, SAMPLE):
                inside = start + lanes < span
                plain_sum += tl.load(entries + start + lanes, mask=inside, other=0.0)
                hat_sum += tl.load(entries + plane + start + lanes, mask=inside, other=0.0)
            entries += M
        tl.store(sample_sums + sample, tl.sum(plain_sum, 0))
        tl.store(sample_sums + M // span + sample, tl.sum(hat_sum, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def fold(
    weight1: torch.Tensor,
    norm_weight: torch.Tensor | None,
    weight2: torch.Tensor,
    layer_scale: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    norm_bias: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    with_sums: bool = False,
    statistics: torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    W1 norm_weight (R, C) and layer_scale W2 (C, R) in `dtype`, then u and v (R,) float32 or None, in one launch.

    With partials it also fills the statistics, as `combine_into` does: neither waits for the other.
    """
    inner, channels = weight1.shape[:2]
    same1 = norm_weight is None and weight1.dtype == dtype and not with_sums
    same2 = layer_scale is None and weight2.dtype == dtype
    if same1 and same2:
        if partials is not None:
            combine_into(statistics, partials)
        return weight1, weight2, None, None
    folded1 = torch.empty(weight1.shape, dtype=dtype, device=weight1.device)
    folded2 = None if same2 else torch.empty(weight2.shape, dtype=dtype, device=weight2.device)
    sums, offset = (float32(weight1, inner), float32(weight1, inner)) if with_sums else (None, None)
    programs = cdiv(inner, FOLD_ROWS) + (0 if same2 else cdiv(channels, FOLD_ROWS))
    combining = groups = samples = entries = 0
    if partials is not None:
        groups, samples = partials.shape[1], statistics.shape[0]
        entries = partials.shape[2] // samples
        combining = cdiv(samples, COMBINE) if entries == 1 else samples
    fold_kernel[(combining + programs,)](
        weight1,
        norm_weight,
        norm_bias,
        bias1,
        weight2,
        layer_scale,
        folded1,
        sums,
        offset,
        folded2,
        partials,
        statistics,
        inner,
        channels,
        combining,
        groups,
        samples,
        entries,
        groups * samples * entries,
        ROWS=FOLD_ROWS,
        COLUMNS=FOLD_COLUMNS,
        COMBINE=COMBINE,
        **FUSION,
    )
    return folded1, weight2 if same2 else folded2, sums, offset


def _options(tiles: Tiles, dtype: torch.dtype) -> dict:
    return {
        "PRECISION": precision(dtype),
        "OPERAND": operand(dtype),
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        **FUSION,
    }


def _candidates(dtype: torch.dtype, tiles: list[Tiles]) -> list[Tiles]:
    return TILES_FLOAT32 if dtype == torch.float32 else tiles


def _programs(rows: int, columns: int, tiles: Tiles) -> int:
    return cdiv(rows, tiles.rows) * cdiv(columns, tiles.columns)


def is_whole(channels: int, dtype: torch.dtype) -> bool:
    """Whether one kernel computes the branch. float32 is bound by arithmetic, and its tiles would not fit."""
    return channels <= WHOLE_CHANNELS and dtype != torch.float32


def _keeps_normed(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the forward operation makes x^ anyway, so that it is kept in the place of x."""
    return dtype != x.dtype or is_whole(x.shape[1], dtype)


def _stride(columns: int) -> int:
    """Columns of a matrix with at least two more than that, whose rows begin at multiples of 16 bytes."""
    return cdiv(columns + 2, 8) * 8


def _activation(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """The kernels' name of an activation: GELU as the precision and the device have it."""
    if name != "gelu" or dtype == torch.float32:
        return name
    return "gelu_tanh" if _has_tanh(device) else "gelu_sigmoid"


@functools.cache
def _has_tanh(device: torch.device) -> bool:
    """Whether there is an instruction for it: from compute capability 7.5 on."""
    if INTERPRETED or torch.version.hip is not None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (7, 5)


def _normalise(x: torch.Tensor, statistics: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """x^ (M, C), with the columns that sums are made of: (M, `_stride(C)`)."""
    batch, channels, height, width = x.shape
    tokens = batch * height * width
    stride = _stride(channels)
    normed = torch.empty((tokens, stride), dtype=dtype, device=x.device)
    rows, columns = whole_rows(channels)
    normalise_kernel[(cdiv(tokens, rows),)](
        x,
        statistics,
        normed,
        tokens,
        tokens // statistics.shape[0],
        eps,
        C=channels,
        STRIDE=stride,
        ROWS=rows,
        WIDTH=columns,
        num_warps=8,
        **FUSION,
    )
    return normed


def mlp(
    x: torch.Tensor,
    statistics: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    act_scale: torch.Tensor | None,
    act_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: str,
    eps: float,
    dtype: torch.dtype,
    save: bool,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """
    y (B, C, H, W), its statistics, if wanted, and for backward (`save`) z (M, R) and x^; None for what is not there.

    x (B, C, H, W) channels_last, statistics float32 of x: (B, 2) of its samples, or (B H W, 2) of its tokens, which
    says what the norm is; those of y are of the same kind. weight1 (R, C) and weight2 (C, R), which may have further
    dimensions of size 1, act_scale and act_bias (1,) of star_relu, mask (B,), all other vectors (C,) but bias1 (R,).
    `dtype` is that of the products; x^, (M, more than C), is kept where it was made anyway. Without `save` there is no
    backward.
    """
    tensors = (norm_weight, norm_bias, weight1, bias1, weight2, bias2, act_scale, act_bias, layer_scale, res_scale)
    return mlp_from_partials(x, statistics, None, *tensors, mask, activation, eps, dtype, save, with_statistics)


def mlp_from_partials(
    x: torch.Tensor,
    statistics: torch.Tensor | None,
    partials: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    act_scale: torch.Tensor | None,
    act_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: str,
    eps: float,
    dtype: torch.dtype,
    save: bool,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """
    `mlp`, where the statistics of x are memory to be filled, of partials (3, any, any), if these are given: in the
    launch that folds the weights, if there is one.

    Without statistics the norm is over channels, and tokens make their own, which only one kernel for all can
    (`is_whole`), where nothing is saved.
    """
    batch, channels, height, width = x.shape
    inner, tokens = weight1.shape[0], height * width
    rows = batch * tokens
    span = 1 if statistics is None else rows // statistics.shape[0]
    act = _activation(activation, dtype, x.device)
    key = (x.dtype, dtype, bucket(rows), channels, inner)

    def whole(tiles):
        y = empty_nhwc(x)
        moments = float32(x, 3, 1, rows) if with_statistics else None
        preactivation = torch.empty((rows, inner), dtype=dtype, device=x.device) if save else None
        normed = torch.empty((rows, _stride(channels)), dtype=dtype, device=x.device) if save else None
        mlp_kernel[(cdiv(rows, tiles.rows),)](
            x,
            statistics,
            norm_weight,
            norm_bias,
            operand1,
            bias1,
            operand2,
            bias2,
            act_scale,
            act_bias,
            layer_scale,
            res_scale,
            mask,
            y,
            moments,
            preactivation,
            normed,
            rows,
            tokens,
            span,
            eps,
            C=channels,
            R=inner,
            STRIDE=_stride(channels),
            ACT=act,
            OPERAND=operand(dtype),
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            WIDTH=max(next_power_of_2(channels), 16),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **FUSION,
        )
        return y, moments, preactivation, normed

    def expand(tiles):
        hidden = torch.empty((rows, inner), dtype=dtype, device=x.device)
        preactivation = torch.empty_like(hidden) if save else None
        expand_kernel[(_programs(rows, inner, tiles),)](
            x if normed is None else normed,
            statistics,
            operand1,
            sums,
            offset,
            act_scale,
            act_bias,
            preactivation,
            hidden,
            rows,
            span,
            eps,
            N=inner,
            K=channels,
            STRIDE=channels if normed is None else normed.shape[1],
            ACT=act,
            NORMED=normed is not None,
            **_options(tiles, dtype),
        )
        return hidden, preactivation

    def contract(tiles):
        y = empty_nhwc(x)
        blocks = cdiv(channels, tiles.columns)
        moments = float32(x, 3, blocks, rows) if with_statistics else None
        contract_kernel[(_programs(rows, channels, tiles),)](
            hidden,
            operand2,
            bias2,
            x,
            layer_scale,
            res_scale,
            mask,
            y,
            moments,
            rows,
            tokens,
            blocks * rows,
            N=channels,
            K=inner,
            **_options(tiles, dtype),
        )
        return y, moments

    with on(x):
        if is_whole(channels, dtype):
            operand1, operand2, *_ = fold(
                weight1, None, weight2, None, dtype, statistics=statistics, partials=partials
            )
            key = ("channel_mlp_saving" if save else "channel_mlp", *key, act, with_statistics)
            y, moments, preactivation, normed = tuned(key, TILES_WHOLE, whole)
        else:
            operand1, operand2, sums, offset = fold(
                weight1,
                norm_weight,
                weight2,
                None,
                dtype,
                norm_bias=norm_bias,
                bias1=bias1,
                with_sums=True,
                statistics=statistics,
                partials=partials,
            )
            normed = _normalise(x, statistics, eps, dtype) if _keeps_normed(x, dtype) else None
            tiles = _candidates(dtype, TILES)
            hidden, preactivation = tuned(("expand_saving" if save else "expand", *key, act), tiles, expand)
            y, moments = tuned(("contract", *key, with_statistics), tiles, contract)
        statistics = combine(moments, statistics.shape[0]) if with_statistics else None
        return y, statistics, preactivation, normed if save else None


def mlp_backward(
    g: torch.Tensor,
    source: torch.Tensor,
    statistics: torch.Tensor,
    preactivation: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    act_scale: torch.Tensor | None,
    act_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: str,
    eps: float,
    wanted: list[bool],
) -> list[torch.Tensor | None]:
    """
    The gradients of x and of the ten parameters, norm_weight to res_scale; None for those not `wanted`, ten flags.

    `source` is x (B, C, H, W) or x^ (M, more than C), whichever the forward operation left.
    """
    batch, channels, height, width = g.shape
    inner, tokens = weight1.shape[0], height * width
    rows, groups = batch * tokens, statistics.shape[0]
    span = rows // groups
    dtype = preactivation.dtype
    act = _activation(activation, dtype, g.device)
    parameters = (
        norm_weight, norm_bias, weight1, bias1, weight2, bias2, act_scale, act_bias, layer_scale, res_scale
    )  # fmt: skip

    def expand(tiles):
        dz = torch.empty_like(preactivation)
        hidden = torch.empty((rows, _stride(inner)), dtype=dtype, device=g.device)
        expand_backward_kernel[(_programs(rows, inner, tiles),)](
            rounded,
            operand2,
            preactivation,
            act_scale,
            mask,
            dz,
            hidden,
            rows,
            tokens,
            N=inner,
            K=channels,
            STRIDE=hidden.shape[1],
            ACT=act,
            **_options(tiles, dtype),
        )
        return dz, hidden

    def contract(tiles):
        q = torch.empty((rows, channels), dtype=dtype, device=g.device)
        row_sums = None if span == 1 else float32(g, 2, cdiv(channels, tiles.columns), rows)
        contract_backward_kernel[(_programs(rows, channels, tiles),)](
            dz,
            operand1,
            normed,
            q,
            row_sums,
            rows,
            N=channels,
            K=inner,
            STRIDE=normed.shape[1],
            **_options(tiles, dtype),
        )
        return q, row_sums

    with on(g):
        operand1, operand2, *_ = fold(weight1, norm_weight, weight2, layer_scale, dtype)
        normed = source if source.ndim == 2 else _normalise(source, statistics, eps, dtype)
        rounded, shortcut_sums = _shortcut(g, normed, statistics, eps, dtype, res_scale is not None and wanted[-1])
        key = (g.dtype, dtype, bucket(rows), channels, inner)
        dz, hidden = tuned(("expand_backward", *key, act), _candidates(dtype, TILES_BACKWARD), expand)
        q, row_sums = tuned(("contract_backward", *key, span == 1), _candidates(dtype, TILES), contract)
        rounded = rounded.permute(0, 2, 3, 1).reshape(rows, channels)
        grads, sample_sums, act_sums = _parameter_gradients(
            dz, normed, rounded, hidden, parameters, wanted, shortcut_sums, row_sums, groups
        )
        dx = empty_nhwc(g)
        tile_rows, tile_columns = whole_rows(channels)
        norm_backward_kernel[(cdiv(rows, tile_rows),)](
            q,
            normed,
            g,
            statistics,
            sample_sums,
            res_scale,
            dx,
            act_sums,
            *grads[6:8],
            rows,
            span,
            0 if act_sums is None else act_sums.shape[0],
            eps,
            C=channels,
            STRIDE=normed.shape[1],
            ROWS=tile_rows,
            WIDTH=tile_columns,
            num_warps=8,
            **FUSION,
        )
    return [dx, *grads]


def _shortcut(
    g: torch.Tensor, normed: torch.Tensor, statistics: torch.Tensor, eps: float, dtype: torch.dtype, with_sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """g (B, C, H, W) in `dtype`, and parts of the gradient of res_scale (any, C), if wanted."""
    rounds, sums = dtype != g.dtype, None
    rounded = empty_nhwc(g, dtype) if rounds else g
    if rounds or with_sums:
        batch, channels, height, width = g.shape
        rows = batch * height * width
        blocks = cdiv(channels, REDUCE_COLUMNS)
        splits = min(cdiv(rows, REDUCE_ROWS), cdiv(PROGRAMS, blocks))
        sums = float32(g, splits, channels) if with_sums else None
        shortcut_kernel[(splits, blocks)](
            g,
            normed,
            statistics,
            rounded if rounds else None,
            sums,
            rows,
            rows // statistics.shape[0],
            eps,
            C=channels,
            STRIDE=normed.shape[1],
            ROWS=REDUCE_ROWS,
            COLUMNS=REDUCE_COLUMNS,
            **FUSION,
        )
    return rounded, sums


def _parameter_gradients(
    dz: torch.Tensor,
    normed: torch.Tensor,
    g: torch.Tensor,
    hidden: torch.Tensor,
    parameters: Sequence[torch.Tensor | None],
    wanted: Sequence[bool],
    shortcut_sums: torch.Tensor | None,
    row_sums: torch.Tensor | None,
    groups: int,
) -> tuple[list[torch.Tensor | None], torch.Tensor | None, torch.Tensor | None]:
    """
    Gradients of the ten parameters norm_weight to res_scale, or None; g (M, C) in the precision of products.

    Those of the activation are only allocated here, and are sums of the last of the results (any, 2). The other
    result: of row_sums (2, any, M), if given, the sums over the rows of each of `groups` samples, (2, groups).
    """
    norm_weight, norm_bias, weight1, _, weight2, bias2, act_scale, act_bias, layer_scale, _ = parameters
    grads = empty_like_each(parameters, wanted)
    (
        dnorm_weight, dnorm_bias, dweight1, dbias1, dweight2, dbias2, dact_scale, dact_bias, dlayer_scale, dres_scale
    ) = grads  # fmt: skip

    def is_any(*found):
        return any(grad is not None for grad in found)

    inner, channels = weight1.shape[:2]
    rows = dz.shape[0]
    blocks = cdiv(channels, GRADIENT_SHORT)
    # The whole products, or of frozen weights the last columns alone.
    width1 = channels if is_any(dnorm_weight, dweight1) else 0
    width2 = inner if is_any(dweight2, dact_scale, dact_bias, dlayer_scale) else 0
    first = second = None
    if is_any(dnorm_weight, dnorm_bias, dweight1, dbias1):
        first = transposed_product(dz, normed if width1 else normed[:, channels:])
    if is_any(dbias2) or width2:
        second = transposed_product(g, hidden if width2 else hidden[:, inner:])
    act_sums = float32(g, blocks, 2) if is_any(dact_scale, dact_bias) else None
    sample_sums = None if row_sums is None else float32(g, 2, groups)
    blocks1 = 0 if first is None else blocks
    blocks2 = 0 if second is None and dres_scale is None else blocks
    programs = blocks1 + blocks2 + (0 if row_sums is None else groups)
    if programs == 0:
        return grads, sample_sums, act_sums
    parameters_kernel[(programs,)](
        hidden if first is None else first,  # a pointer that no program follows
        hidden if second is None else second,
        norm_weight,
        norm_bias,
        weight1,
        weight2,
        bias2,
        act_scale,
        act_bias,
        layer_scale,
        shortcut_sums,
        row_sums,
        dnorm_weight,
        dnorm_bias,
        dweight1,
        dbias1,
        dweight2,
        dbias2,
        act_sums,
        dlayer_scale,
        dres_scale,
        sample_sums,
        inner,
        channels,
        rows,
        rows // groups,
        0 if first is None else first.shape[1],
        0 if second is None else second.shape[1],
        width1,
        width2,
        0 if shortcut_sums is None else shortcut_sums.shape[0],
        0 if row_sums is None else row_sums.shape[1],
        blocks1,
        blocks2,
        LONG=GRADIENT_LONG,
        SHORT=GRADIENT_SHORT,
        SAMPLE=SAMPLE_ROWS,
        num_warps=8,
        **FUSION,
    )
    return grads, sample_sums, act_sums


def _fake(x, statistics, norm_weight, norm_bias, weight1, *rest):
    *_, dtype, save, with_statistics = rest
    batch, channels, height, width = x.shape
    rows = batch * height * width
    keeps = save and _keeps_normed(x, dtype)
    return (
        empty_nhwc(x),
        float32(x, statistics.shape[0], 2) if with_statistics else None,
        x.new_empty((rows, weight1.shape[0]), dtype=dtype) if save else None,
        x.new_empty((rows, _stride(channels)), dtype=dtype) if keeps else None,
    )


def _fake_backward(g, source, statistics, preactivation, *rest):
    return [empty_nhwc(g), *empty_like_each(rest[:10], rest[-1])]


def _keep(ctx, inputs, results):
    x, statistics, *parameters, mask, ctx.activation, ctx.eps, dtype, ctx.saved, _ = inputs
    _, _, preactivation, normed = results
    ctx.mark_non_differentiable(*(result for result in results[1:] if result is not None))
    ctx.set_materialize_grads(False)
    source = normed if _keeps_normed(x, dtype) else x
    ctx.save_for_backward(source, statistics, preactivation, *parameters, mask)


def _differentiate(ctx, backward, g, *_):
    grads: list[torch.Tensor | None] = [None] * 18
    if g is None:
        return tuple(grads)
    if not ctx.saved:
        raise RuntimeError("channel_mlp was called with save=False, so it has no backward")
    wanted = list(ctx.needs_input_grad[2:12])
    g = g.contiguous(memory_format=torch.channels_last)
    grads[0], *found = backward(g, *ctx.saved_tensors, ctx.activation, ctx.eps, wanted)
    grads[2:12] = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
    return tuple(grads)


channel_mlp = differentiable(
    "channel_mlp", mlp, mlp_backward, fakes=(_fake, _fake_backward), keep=_keep, differentiate=_differentiate
)
count_products("channel_mlp", 2, x=0, weight1=4)
count_products("channel_mlp_backward", 4, x=0, weight1=6)
