"""Products of tokens and weights: their tiles, the loop over depth, and the one that ends a branch."""

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import FUSION, INTERPRETED, Tiles, cdiv, empty_nhwc, float32, kernel, operand, precision
from .parts import tile_of, vector
from .statistics import row_moments, store_moments


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
if INTERPRETED:
    TILES = TILES_FLOAT32 = [Tiles(16, 16, 16, 1, 1)]


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
    """Bias, scales, shortcut and statistics of a tile of y."""
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
        count, mean, m2 = row_moments(out.to(tl.float32), inside)
        store_moments(partials, plane, index, count, mean, m2, row_inside)


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
    first, start, row, row_inside, block, column = tile_of(M, N, ROWS, COLUMNS)
    out = product(hidden + start * K, weight, row, column, row_inside, K, 1, N, K, K, PRECISION, OPERAND, DEPTH)
    index = block.to(tl.int64) * M + first + row
    finish(out, x, bias, layer_scale, res_scale, mask, y, partials, first, index, row, column, M, tokens, plane, N)


def contract(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    tiles: Tiles,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    y (B, C, H, W) from hidden (M, R) and the shortcut x; and if wanted, what the statistics of its rows are to be
    combined of, (3, any, M). The weight (C, R) is in the dtype of hidden; bias and scales (C,), mask (B,).
    """
    (rows, inner), (_, channels, height, width) = hidden.shape, x.shape
    blocks = cdiv(channels, tiles.columns)
    y, partials = empty_nhwc(x), float32(x, 3, blocks, rows) if with_statistics else None
    contract_kernel[(programs(rows, channels, tiles),)](
        hidden,
        weight,
        bias,
        x,
        layer_scale,
        res_scale,
        mask,
        y,
        partials,
        rows,
        height * width,
        blocks * rows,
        N=channels,
        K=inner,
        **options(tiles, hidden.dtype),
    )
    return y, partials


def candidates(dtype: torch.dtype, tiles: list[Tiles]) -> list[Tiles]:
    """Tiles for products in `dtype`, of which these are for half precision."""
    return TILES_FLOAT32 if dtype == torch.float32 else tiles


def programs(rows: int, columns: int, tiles: Tiles) -> int:
    """How many it takes for a result (rows, columns)."""
    return cdiv(rows, tiles.rows) * cdiv(columns, tiles.columns)


def options(tiles: Tiles, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a kernel with such a tile, for products in `dtype`."""
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
