"""What forward and backward of the MLP (channel_mlp.py) share: its parameters, and x^ with columns of ones."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, kernel
from .parts import tile_of
from .statistics import whole_rows


class Parameters(NamedTuple):
    """Of the MLP, or gradients of them. The weights may have further dimensions of size 1."""

    norm_weight: torch.Tensor | None  # (C,)
    norm_bias: torch.Tensor | None  # (C,)
    weight1: torch.Tensor  # (R, C)
    bias1: torch.Tensor | None  # (R,)
    weight2: torch.Tensor  # (C, R)
    bias2: torch.Tensor | None  # (C,)
    act_scale: torch.Tensor | None  # (1,)
    act_bias: torch.Tensor | None  # (1,)
    layer_scale: torch.Tensor | None  # (C,)
    res_scale: torch.Tensor | None  # (C,)


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
def store_normed(normed, value, first, row, row_inside, channel, C: tl.constexpr, STRIDE: tl.constexpr):
    """Rows of x^ in the precision of products, then a column of ones."""
    target = normed + first.to(tl.int64) * STRIDE
    inside = row_inside[:, None] & (channel < C)[None, :]
    tl.store(target + row[:, None] * STRIDE + channel[None, :], value.to(normed.dtype.element_ty), mask=inside)
    store_tail(target, row, row_inside, tl.full(row.shape, 1.0, tl.float32), C, STRIDE)


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
    first, start, row, row_inside, _, channel = tile_of(M, C, ROWS, WIDTH)
    inside = row_inside[:, None] & (channel < C)[None, :]
    mean, rstd = norm_of(statistics, first + row, row_inside, span, eps)
    value = tl.load(x + start * C + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    value = (value - mean[:, None]) * rstd[:, None]
    store_normed(normed, value, first, row, row_inside, channel, C, STRIDE)


def stride_of(columns: int) -> int:
    """Columns of a matrix with at least two more than that, whose rows begin at multiples of 16 bytes."""
    return cdiv(columns + 2, 8) * 8


def normalise(x: torch.Tensor, statistics: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """x^ (M, C), with the columns that sums are made of: (M, `stride_of(C)`)."""
    batch, channels, height, width = x.shape
    tokens = batch * height * width
    stride, tile = stride_of(channels), whole_rows(channels)
    normed = torch.empty((tokens, stride), dtype=dtype, device=x.device)
    normalise_kernel[(cdiv(tokens, tile["ROWS"]),)](
        x, statistics, normed, tokens, tokens // statistics.shape[0], eps, STRIDE=stride, **tile
    )
    return normed
