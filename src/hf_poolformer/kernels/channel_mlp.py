"""MLP branch of the block: y = res_scale * x + mask * layer_scale * (W2 act(W1 n(x) + b1) + b2), n a GroupNorm(1).

Rows are tokens, M = B H W of them, t = H W per sample; r = rstd and mu are per sample. The norm folds into the first
product, n(x) = gamma (x - mu) r + beta:

    z = r (x F^T) - r mu u + v,    F = W1 gamma,  u = F 1,  v = b1 + W1 beta

u sums F as rounded for the product, so that a mean far from zero cancels to float32 accuracy. If products run in a
lower precision than x is stored in (autocast), x - mu is rounded instead and mu disappears from the formulas.

Backward. z is saved in the precision of the products and act(z) is recomputed from it: per activation and block that
keeps 4 elements besides x, where keeping act(z) as well would double it and recomputing z would cost a sixth of the
step's arithmetic and as many bytes as writing it. With g = dL/dy, G = (m g)^T act(z), s = m g layer_scale:

    dz = (s W2) act'(z)                dF = (r dz)^T x - (sum mu r dz) 1^T       dv = sum dz
    dW2 = layer_scale G                dlayer_scale = sum_k W2 G + b2 sum m g    db2 = layer_scale sum m g
    dW1 = dF gamma + dv beta^T         dgamma = sum_k dF W1     dbeta = W1^T dv  db1 = dv
    q = (r dz) F,  N = C H W:          dx = res_scale g + q - sum q / N - (x - mu) r^2 sum(q (x - mu)) / N

where both sums over the sample come from dz before q exists: sum_c q = (r dz) u, sum_c q (x - mu) = dz (z - v). So dx
needs no pass of its own, and dlayer_scale neither the branch's output nor a division by a layer_scale near zero.
(r dz)^T x and G reduce over all tokens: those two products are cuBLAS's, which splits them; the other four, with
epilogues, are Triton's.
"""

import torch
import triton
import triton.language as tl

from .flops import count_products
from .launch import (
    FUSION,
    INTERPRETED,
    Tiles,
    bucket,
    empty_nhwc,
    float32,
    on,
    operand,
    precision,
    transposed_product,
    tuned,
)
from .statistics import combine, row_moments


# From the H100's balance, 800 TFLOP/s of bfloat16 to 3 TB/s: a product with N columns does N FLOP per byte of its left
# operand, if that is read once. So C = 64 and 128 are bound by bytes and want small tiles, many in flight; C = 320 and
# 512 by arithmetic and want 128 x 128 with 8 warps. 64 deep is one 128-byte line of bfloat16. Column tiles of the same
# tokens are neighbouring programs, so they share the tokens through L2, where the weights (2 MB at most) stay anyway.
# Compiled for sm_90, each of these keeps its tiles in registers; 128 x 256 spills them.
TILES = [
    Tiles(128, 128, 64, 8, 3),
    Tiles(128, 128, 32, 8, 4),
    Tiles(128, 64, 64, 8, 3),
    Tiles(64, 128, 64, 8, 3),
    Tiles(64, 64, 64, 4, 4),
]
# float32 tiles are twice as large in shared memory, and FMA units want smaller ones.
TILES_FLOAT32 = [Tiles(64, 64, 32, 4, 3), Tiles(128, 64, 32, 8, 3), Tiles(64, 64, 16, 8, 3)]
# The epilogue of the backward expansion keeps four tiles alive: 128 x 128 spills.
TILES_BACKWARD = [
    Tiles(128, 64, 64, 8, 3),
    Tiles(64, 128, 64, 8, 3),
    Tiles(64, 64, 64, 4, 3),
    Tiles(64, 64, 32, 4, 4),
]
FOLD_ROWS, FOLD_COLUMNS = (16, 16) if INTERPRETED else (16, 128)
REDUCE_ROWS, REDUCE_COLUMNS = (16, 16) if INTERPRETED else (64, 64)
PROGRAMS = 4 if INTERPRETED else 1056
if INTERPRETED:
    TILES = TILES_FLOAT32 = TILES_BACKWARD = [Tiles(16, 16, 16, 1, 1)]

ACTIVATIONS = ("gelu", "relu", "silu", "squared_relu", "star_relu")


@triton.jit
def scalar(pointer, default: tl.constexpr):
    """A learned scalar, or the constant that stands for it."""
    return default if pointer is None else tl.load(pointer).to(tl.float32)


@triton.jit
def positive(z):
    """relu(z); as torch's, it keeps NaN."""
    return tl.where(z < 0.0, 0.0, z)


@triton.jit
def activate(z, act_scale, act_bias, ACT: tl.constexpr):
    if ACT == "gelu":
        h = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "silu":
        h = z * tl.sigmoid(z)
    elif ACT == "relu":
        h = positive(z)
    else:
        h = positive(z)
        h = scalar(act_scale, 1.0) * h * h + scalar(act_bias, 0.0)
    return h


@triton.jit
def derivative(z, act_scale, ACT: tl.constexpr):
    if ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACT == "silu":
        gate = tl.sigmoid(z)
        d = gate * (1.0 + z * (1.0 - gate))
    elif ACT == "relu":
        d = tl.where(z > 0.0, 1.0, 0.0)
    else:
        d = 2.0 * scalar(act_scale, 1.0) * positive(z)
    return d


@triton.jit
def vector(pointer, index, inside, default: tl.constexpr):
    """Entries of an optional vector as float32."""
    if pointer is None:
        values = tl.full(index.shape, default, tl.float32)
    else:
        values = tl.load(pointer + index, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def product(
    a,
    b,
    row,
    column,
    row_inside,
    stride_column,
    stride_depth,
    depth_scale,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A (rows, K) times B, float32; `a` points to the tile's first row, depth_scale (K,) multiplies A's columns."""
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        a_inside = row_inside[:, None]
        b_inside = (column < N)[None, :]
        if K % DEPTH != 0:
            a_inside = a_inside & (depth < K)[None, :]
            b_inside = b_inside & (depth < K)[:, None]
        left = tl.load(a + row[:, None] * K + depth[None, :], mask=a_inside, other=0.0)
        right = tl.load(b + column[None, :] * stride_column + depth[:, None] * stride_depth, mask=b_inside, other=0.0)
        if depth_scale is not None:
            factor = tl.load(depth_scale + depth, mask=depth < K, other=0.0).to(tl.float32)
            left = (left.to(tl.float32) * factor[None, :]).to(right.dtype)
        accumulator = tl.dot(left.to(OPERAND), right.to(OPERAND), accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def rstd_of(statistics, sample, row_inside, eps):
    return tl.rsqrt(tl.load(statistics + 2 * sample + 1, mask=row_inside, other=1.0) + eps)


@triton.jit
def fold_kernel(
    weight, norm_weight, norm_bias, bias, folded, sums, offset, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """F = weight * gamma in the precision of products, u = F 1 and v = bias + weight beta; weight (N, K)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    shift = vector(bias, row, row < N, 0.0)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < N)[:, None] & (column < K)[None, :]
        place = row[:, None] * K + column[None, :]
        value = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        shift += tl.sum(value * vector(norm_bias, column, column < K, 0.0)[None, :], 1)
        scaled = (value * vector(norm_weight, column, column < K, 1.0)[None, :]).to(folded.dtype.element_ty)
        tl.store(folded + place, scaled, mask=inside)
        total += tl.sum(tl.where(inside, scaled.to(tl.float32), 0.0), 1)
    tl.store(sums + row, total, mask=row < N)
    tl.store(offset + row, shift, mask=row < N)


@triton.jit
def centre_kernel(x, statistics, centred, size, BLOCK: tl.constexpr):
    """x - mu of each sample, `size` entries, in the precision of products."""
    sample = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    value = tl.load(x + sample * size + offsets, mask=inside, other=0.0).to(tl.float32)
    value -= tl.load(statistics + 2 * sample)
    tl.store(centred + sample * size + offsets, value.to(centred.dtype.element_ty), mask=inside)


@triton.jit
def expand_kernel(
    source,
    statistics,
    folded,
    sums,
    offset,
    act_scale,
    act_bias,
    preactivation,
    hidden,
    M,
    tokens,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    ACT: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """hidden = act(z), and z if there is room for it: source (M, K) -> (M, N)."""
    blocks: tl.constexpr = tl.cdiv(N, COLUMNS)
    first = (tl.program_id(0) // blocks) * ROWS
    row = tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = first + row < M
    start = first.to(tl.int64)
    z = product(
        source + start * K,
        folded,
        row,
        column,
        row_inside,
        K,
        1,
        None,
        N,
        K,
        PRECISION,
        OPERAND,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    sample = (first + row) // tokens
    rstd = rstd_of(statistics, sample, row_inside, eps)
    z = z * rstd[:, None] + tl.load(offset + column, mask=column < N, other=0.0)[None, :]
    if not CENTRED:
        mean = tl.load(statistics + 2 * sample, mask=row_inside, other=0.0)
        z -= (rstd * mean)[:, None] * tl.load(sums + column, mask=column < N, other=0.0)[None, :]
    place = start * N + row[:, None] * N + column[None, :]
    inside = row_inside[:, None] & (column < N)[None, :]
    if preactivation is not None:
        tl.store(preactivation + place, z.to(preactivation.dtype.element_ty), mask=inside)
    h = activate(z, act_scale, act_bias, ACT)
    tl.store(hidden + place, h.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def contract_kernel(
    hidden,
    weight,
    bias,
    x,
    layer_scale,
    res_scale,
    mask,
    y,
    partials,
    M,
    tokens,
    plane,
    N: tl.constexpr,
    K: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """y (M, N) from hidden (M, K), weight (N, K) and the shortcut x (M, N)."""
    blocks: tl.constexpr = tl.cdiv(N, COLUMNS)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks) * ROWS
    row = tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = first + row < M
    start = first.to(tl.int64)
    out = product(
        hidden + start * K,
        weight,
        row,
        column,
        row_inside,
        K,
        1,
        None,
        N,
        K,
        PRECISION,
        OPERAND,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    column_inside = column < N
    inside = row_inside[:, None] & column_inside[None, :]
    place = start * N + row[:, None] * N + column[None, :]
    out += vector(bias, column, column_inside, 0.0)[None, :]
    out *= vector(layer_scale, column, column_inside, 1.0)[None, :]
    out *= vector(mask, (first + row) // tokens, row_inside, 1.0)[:, None]
    shortcut = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    out += shortcut * vector(res_scale, column, column_inside, 1.0)[None, :]
    out = out.to(y.dtype.element_ty)
    tl.store(y + place, out, mask=inside)
    if STATISTICS:
        count, mean, m2 = row_moments(out.to(tl.float32), inside)
        index = block.to(tl.int64) * M + first + row
        tl.store(partials + index, count, mask=row_inside)
        tl.store(partials + plane + index, mean, mask=row_inside)
        tl.store(partials + 2 * plane + index, m2, mask=row_inside)


@triton.jit
def shortcut_kernel(
    g,
    source,
    statistics,
    mask,
    masked,
    sums,
    M,
    tokens,
    N: tl.constexpr,
    CENTRED: tl.constexpr,
    BRANCH: tl.constexpr,
    RES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """masked = m g in the precision of products, if there is room for it; sums (splits, 2, N) of m g and of g x."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    branch = tl.zeros((COLUMNS,), tl.float32)
    shortcut = tl.zeros((COLUMNS,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (column < N)[None, :]
        place = row.to(tl.int64)[:, None] * N + column[None, :]
        grad = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
        if RES:
            x = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
            if CENTRED:
                x += tl.load(statistics + 2 * (row // tokens), mask=row < M, other=0.0)[:, None]
            shortcut += tl.sum(grad * x, 0)
        grad *= vector(mask, row // tokens, row < M, 1.0)[:, None]
        if masked is not None:
            tl.store(masked + place, grad.to(masked.dtype.element_ty), mask=inside)
        if BRANCH:
            branch += tl.sum(grad, 0)
    target = sums + tl.program_id(0).to(tl.int64) * 2 * N + column
    # Zeros where nobody asked: a sum of memory that nobody wrote might trap.
    tl.store(target, branch, mask=column < N)
    tl.store(target + N, shortcut, mask=column < N)


@triton.jit
def expand_backward_kernel(
    g,
    weight,
    layer_scale,
    statistics,
    preactivation,
    sums,
    offset,
    act_scale,
    act_bias,
    scaled,
    hidden,
    column_sums,
    row_sums,
    act_sums,
    M,
    tokens,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    ACT: tl.constexpr,
    ACT_GRAD: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """
    scaled = r dz and hidden = act(z), (M, N), from g (M, K), already masked, and weight (K, N).

    column_sums (row blocks, 2, N): sums over the block's rows of dz and of mu r dz. row_sums (2, column blocks, M):
    parts of (r dz) u and of dz (z - v). act_sums (programs, 2): sums of dL/dh relu(z)^2 and of dL/dh.
    """
    blocks: tl.constexpr = tl.cdiv(N, COLUMNS)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks) * ROWS
    row = tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = first + row < M
    start = first.to(tl.int64)
    dh = product(
        g + start * K,
        weight,
        row,
        column,
        row_inside,
        1,
        N,
        layer_scale,
        N,
        K,
        PRECISION,
        OPERAND,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    column_inside = column < N
    inside = row_inside[:, None] & column_inside[None, :]
    place = start * N + row[:, None] * N + column[None, :]
    z = tl.load(preactivation + place, mask=inside, other=0.0).to(tl.float32)
    h = activate(z, act_scale, act_bias, ACT)
    tl.store(hidden + place, h.to(hidden.dtype.element_ty), mask=inside)
    if ACT_GRAD:
        # Outside the tile dh is zero, since its rows or columns were.
        squared = positive(z) * positive(z)
        target = act_sums + tl.program_id(0).to(tl.int64) * 2
        tl.store(target, tl.sum(tl.sum(dh * squared, 1), 0))
        tl.store(target + 1, tl.sum(tl.sum(dh, 1), 0))

    dz = dh * derivative(z, act_scale, ACT)
    v = tl.load(offset + column, mask=column_inside, other=0.0)
    sample = (first + row) // tokens
    product_sum = tl.sum(dz * (z - v[None, :]), 1)
    dr = (dz * rstd_of(statistics, sample, row_inside, eps)[:, None]).to(scaled.dtype.element_ty)
    tl.store(scaled + place, dr, mask=inside)
    # As rounded, so that what the products make of it cancels.
    dr = dr.to(tl.float32)
    u = tl.load(sums + column, mask=column_inside, other=0.0)
    index = block.to(tl.int64) * M + first + row
    tl.store(row_sums + index, tl.sum(dr * u[None, :], 1), mask=row_inside)
    tl.store(row_sums + blocks * tl.cast(M, tl.int64) + index, product_sum, mask=row_inside)
    target = column_sums + (tl.program_id(0) // blocks).to(tl.int64) * 2 * N + column
    tl.store(target, tl.sum(dz, 0), mask=column_inside)
    if CENTRED:
        shift = tl.zeros((COLUMNS,), tl.float32)
    else:
        mean = tl.load(statistics + 2 * sample, mask=row_inside, other=0.0)
        shift = tl.sum(dr * mean[:, None], 0)
    tl.store(target + N, shift, mask=column_inside)


@triton.jit
def contract_backward_kernel(
    scaled,
    folded,
    g,
    source,
    statistics,
    moments,
    res_scale,
    dx,
    M,
    tokens,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dx (M, N) from scaled (M, K) and folded (K, N); moments (B, 2): means over the sample of q and q (x - mu)."""
    blocks: tl.constexpr = tl.cdiv(N, COLUMNS)
    first = (tl.program_id(0) // blocks) * ROWS
    row = tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = first + row < M
    start = first.to(tl.int64)
    out = product(
        scaled + start * K,
        folded,
        row,
        column,
        row_inside,
        1,
        N,
        None,
        N,
        K,
        PRECISION,
        OPERAND,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    column_inside = column < N
    inside = row_inside[:, None] & column_inside[None, :]
    place = start * N + row[:, None] * N + column[None, :]
    sample = (first + row) // tokens
    rstd = rstd_of(statistics, sample, row_inside, eps)
    deviation = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    if not CENTRED:
        deviation -= tl.load(statistics + 2 * sample, mask=row_inside, other=0.0)[:, None]
    out -= tl.load(moments + 2 * sample, mask=row_inside, other=0.0)[:, None]
    correlation = tl.load(moments + 2 * sample + 1, mask=row_inside, other=0.0)
    out -= deviation * (rstd * rstd * correlation)[:, None]
    shortcut = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    out += shortcut * vector(res_scale, column, column_inside, 1.0)[None, :]
    tl.store(dx + place, out.to(dx.dtype.element_ty), mask=inside)


def fold(
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """F (4C, C) in `dtype`, u and v (4C,) in float32."""
    rows, columns = weight.shape
    folded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    sums, offset = float32(weight, rows), float32(weight, rows)
    fold_kernel[(triton.cdiv(rows, FOLD_ROWS),)](
        weight,
        norm_weight,
        norm_bias,
        bias,
        folded,
        sums,
        offset,
        rows,
        columns,
        ROWS=FOLD_ROWS,
        COLUMNS=FOLD_COLUMNS,
        **FUSION,
    )
    return folded, sums, offset


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
    return triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns)


@torch.library.custom_op("hf_poolformer::channel_mlp", mutates_args=())
def channel_mlp(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    y (B, C, H, W), its statistics (B, 2), or (0, 2) if not wanted, and for backward (`save`) z (M, 4C) and x - mu.

    x (B, C, H, W) channels_last, statistics (B, 2) float32 of x, weight1 (4C, C), weight2 (C, 4C), act_scale and
    act_bias (1,) of star_relu, mask (B,), all other vectors (C,) but bias1 (4C,). `dtype` is that of the products;
    x - mu, (M, C), is only kept where it is another than x has. Without `save` there is no backward.
    """
    batch, channels, height, width = x.shape
    rows, inner, tokens = batch * height * width, weight1.shape[0], height * width
    centred = dtype != x.dtype

    with on(x):
        folded, sums, offset = fold(weight1, norm_weight, norm_bias, bias1, dtype)
        source = _centre(x, statistics, dtype) if centred else x
        weight2_operand = weight2.to(dtype)

        def expand(tiles):
            hidden = torch.empty((rows, inner), dtype=dtype, device=x.device)
            preactivation = torch.empty_like(hidden) if save else None
            expand_kernel[(_programs(rows, inner, tiles),)](
                source,
                statistics,
                folded,
                sums,
                offset,
                act_scale,
                act_bias,
                preactivation,
                hidden,
                rows,
                tokens,
                eps,
                N=inner,
                K=channels,
                ACT=activation,
                CENTRED=centred,
                **_options(tiles, dtype),
            )
            return hidden, preactivation

        def contract(tiles):
            y = empty_nhwc(x)
            blocks = triton.cdiv(channels, tiles.columns)
            partials = float32(x, 3, blocks, rows) if with_statistics else None
            contract_kernel[(_programs(rows, channels, tiles),)](
                hidden,
                weight2_operand,
                bias2,
                x,
                layer_scale,
                res_scale,
                mask,
                y,
                partials,
                rows,
                tokens,
                blocks * rows,
                N=channels,
                K=inner,
                STATISTICS=with_statistics,
                **_options(tiles, dtype),
            )
            return y, partials

        key = (x.dtype, dtype, bucket(rows), channels, inner)
        tiles = _candidates(dtype, TILES)
        hidden, preactivation = tuned(("expand", *key, activation, save), tiles, expand)
        y, partials = tuned(("contract", *key, with_statistics), tiles, contract)
        return (
            y,
            combine(partials, batch) if with_statistics else float32(x, 0, 2),
            preactivation if save else hidden.new_empty((0,)),
            source if save and centred else hidden.new_empty((0,)),
        )


def _centre(x: torch.Tensor, statistics: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    batch, channels, height, width = x.shape
    size = channels * height * width
    centred = torch.empty((batch * height * width, channels), dtype=dtype, device=x.device)
    block = 256 if INTERPRETED else 4096
    centre_kernel[(batch, triton.cdiv(size, block))](x, statistics, centred, size, BLOCK=block, num_warps=8, **FUSION)
    return centred


@channel_mlp.register_fake
def _(
    x,
    statistics,
    norm_weight,
    norm_bias,
    weight1,
    bias1,
    weight2,
    bias2,
    act_scale,
    act_bias,
    layer_scale,
    res_scale,
    mask,
    activation,
    eps,
    dtype,
    save,
    with_statistics,
):
    batch, channels, height, width = x.shape
    rows = batch * height * width
    return (
        empty_nhwc(x),
        float32(x, batch if with_statistics else 0, 2),
        x.new_empty((rows, weight1.shape[0]) if save else (0,), dtype=dtype),
        x.new_empty((rows, channels) if save and dtype != x.dtype else (0,), dtype=dtype),
    )


@torch.library.custom_op("hf_poolformer::channel_mlp_backward", mutates_args=())
def channel_mlp_backward(
    g: torch.Tensor,
    source: torch.Tensor,
    statistics: torch.Tensor,
    preactivation: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    act_scale: torch.Tensor | None,
    act_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: str,
    eps: float,
    with_bias2: bool,
    with_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    dx; then in float32 dF (4C, C), dv (4C,), G (C, 4C), sums (2, C) of m g and of g x, and (2,) the gradients of
    act_scale and act_bias.

    `source` is x, or x - mu where the products have another dtype than g. Without `with_weights`, dF and G are (0,).
    """
    batch, channels, height, width = g.shape
    rows, inner, tokens = batch * height * width, weight1.shape[0], height * width
    dtype = preactivation.dtype
    centred = dtype != g.dtype
    has_res = res_scale is not None
    act_grad = act_scale is not None or act_bias is not None

    def expand(tiles):
        scaled, hidden = torch.empty_like(preactivation), torch.empty_like(preactivation)
        row_blocks, column_blocks = triton.cdiv(rows, tiles.rows), triton.cdiv(inner, tiles.columns)
        column_sums = float32(g, row_blocks, 2, inner)
        row_sums = float32(g, 2, column_blocks, rows)
        act_sums = float32(g, row_blocks * column_blocks, 2) if act_grad else None
        expand_backward_kernel[(row_blocks * column_blocks,)](
            masked,
            weight2_operand,
            layer_scale,
            statistics,
            preactivation,
            sums,
            offset,
            act_scale,
            act_bias,
            scaled,
            hidden,
            column_sums,
            row_sums,
            act_sums,
            rows,
            tokens,
            eps,
            N=inner,
            K=channels,
            ACT=activation,
            ACT_GRAD=act_grad,
            CENTRED=centred,
            **_options(tiles, dtype),
        )
        return scaled, hidden, column_sums, row_sums, act_sums

    def contract(tiles):
        dx = empty_nhwc(g)
        contract_backward_kernel[(_programs(rows, channels, tiles),)](
            scaled,
            folded,
            g,
            source,
            statistics,
            moments,
            res_scale,
            dx,
            rows,
            tokens,
            eps,
            N=channels,
            K=inner,
            CENTRED=centred,
            **_options(tiles, dtype),
        )
        return dx

    with on(g):
        folded, sums, offset = fold(weight1, norm_weight, norm_bias, bias1, dtype)
        weight2_operand = weight2.to(dtype)
        masked, shortcut_sums = _shortcut(g, source, statistics, mask, dtype, with_bias2, has_res)
        key = (g.dtype, dtype, bucket(rows), channels, inner)
        scaled, hidden, column_sums, row_sums, act_sums = tuned(
            ("expand_backward", *key, activation), _candidates(dtype, TILES_BACKWARD), expand
        )
        moments = row_sums.view(2, -1, batch, tokens).sum((1, 3)).t().contiguous() / (channels * tokens)
        dx = tuned(("contract_backward", *key), _candidates(dtype, TILES), contract)
        dv, shift = column_sums.sum(0)
        if with_weights:
            token_rows = source if centred else source.permute(0, 2, 3, 1).reshape(rows, channels)
            dfolded = transposed_product(scaled, token_rows) - shift[:, None]
            mixed = transposed_product(masked.permute(0, 2, 3, 1).reshape(rows, channels), hidden)
        else:
            dfolded, mixed = float32(g, 0), float32(g, 0)
        dact = act_sums.sum(0) if act_grad else float32(g, 2).zero_()
        return dx, dfolded, dv, mixed, shortcut_sums, dact


def _shortcut(
    g: torch.Tensor,
    source: torch.Tensor,
    statistics: torch.Tensor,
    mask: torch.Tensor | None,
    dtype: torch.dtype,
    branch: bool,
    res: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """m g (B, C, H, W) in `dtype`, and sums (2, C) over tokens of m g (if `branch`) and of g x (if `res`)."""
    batch, channels, height, width = g.shape
    tokens = height * width
    copy = mask is not None or dtype != g.dtype
    masked = empty_nhwc(g, dtype) if copy else g
    if not (copy or branch or res):
        return masked, float32(g, 2, channels).zero_()
    blocks = triton.cdiv(channels, REDUCE_COLUMNS)
    splits = min(triton.cdiv(batch * tokens, REDUCE_ROWS), triton.cdiv(PROGRAMS, blocks))
    sums = float32(g, splits, 2, channels)
    shortcut_kernel[(splits, blocks)](
        g,
        source,
        statistics,
        mask,
        masked if copy else None,
        sums,
        batch * tokens,
        tokens,
        N=channels,
        CENTRED=dtype != g.dtype,
        BRANCH=branch,
        RES=res,
        ROWS=REDUCE_ROWS,
        COLUMNS=REDUCE_COLUMNS,
        **FUSION,
    )
    return masked, sums.sum(0)


@channel_mlp_backward.register_fake
def _(
    g,
    source,
    statistics,
    preactivation,
    norm_weight,
    norm_bias,
    weight1,
    bias1,
    weight2,
    act_scale,
    act_bias,
    layer_scale,
    res_scale,
    mask,
    activation,
    eps,
    with_bias2,
    with_weights,
):
    inner, channels = weight1.shape
    return (
        empty_nhwc(g),
        float32(g, *(weight1.shape if with_weights else (0,))),
        float32(g, inner),
        float32(g, *(weight2.shape if with_weights else (0,))),
        float32(g, 2, channels),
        float32(g, 2),
    )


def _setup_context(ctx, inputs, output):
    x, statistics, norm_weight, norm_bias, weight1, bias1, weight2, bias2, *rest = inputs
    act_scale, act_bias, layer_scale, res_scale, mask, ctx.activation, ctx.eps, dtype, ctx.saved, _ = rest
    _, _, preactivation, centred = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    source = x if dtype == x.dtype else centred
    ctx.save_for_backward(
        source,
        preactivation,
        statistics,
        norm_weight,
        norm_bias,
        weight1,
        bias1,
        weight2,
        bias2,
        act_scale,
        act_bias,
        layer_scale,
        res_scale,
        mask,
    )


def _backward(ctx, g, *_):
    grads: list[torch.Tensor | None] = [None] * 18
    if g is None:
        return tuple(grads)
    if not ctx.saved:
        raise RuntimeError("channel_mlp was called with save=False, so it has no backward")
    source, preactivation, statistics, *parameters, mask = ctx.saved_tensors
    norm_weight, norm_bias, weight1, bias1, weight2, bias2, act_scale, act_bias, layer_scale, res_scale = parameters
    g = g.contiguous(memory_format=torch.channels_last)
    _, _, need_norm, _, need1, _, need2, _, _, _, need_scale, *_ = ctx.needs_input_grad
    dx, dfolded, dv, mixed, sums, dact = torch.ops.hf_poolformer.channel_mlp_backward(
        g,
        source,
        statistics,
        preactivation,
        norm_weight,
        norm_bias,
        weight1,
        bias1,
        weight2,
        act_scale,
        act_bias,
        layer_scale,
        res_scale,
        mask,
        ctx.activation,
        ctx.eps,
        bias2 is not None,
        need_norm or need1 or need2 or need_scale,
    )
    # Tensors of the size of weights from here on, elementwise in float32: torch.compile fuses them.
    dnorm_weight = dnorm_bias = dweight1 = dweight2 = dlayer = None
    if need_norm:
        dnorm_weight = (dfolded * weight1).sum(0)
    if norm_bias is not None:
        dnorm_bias = (dv[:, None] * weight1).sum(0)
    if need1:
        dweight1 = dfolded if norm_weight is None else dfolded * norm_weight
        if norm_bias is not None:
            dweight1 = dweight1 + dv[:, None] * norm_bias
    if need2:
        dweight2 = mixed if layer_scale is None else layer_scale[:, None] * mixed
    if need_scale:
        dlayer = (mixed * weight2).sum(1)
        if bias2 is not None:
            dlayer = dlayer + bias2 * sums[0]
    dbias2 = sums[0] if layer_scale is None else layer_scale * sums[0]
    found = [dnorm_weight, dnorm_bias, dweight1, dv, dweight2, dbias2, dact[:1], dact[1:], dlayer, sums[1]]
    grads[0] = dx
    grads[2:12] = [
        None if parameter is None or grad is None else grad.to(parameter.dtype)
        for parameter, grad in zip(parameters, found, strict=True)
    ]
    return tuple(grads)


channel_mlp.register_autograd(_backward, setup_context=_setup_context)
count_products("channel_mlp", 2, x=0, weight1=4)
count_products("channel_mlp_backward", 4, x=0, weight1=6)
