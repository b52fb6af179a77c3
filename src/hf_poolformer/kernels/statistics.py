"""Mean and variance of each sample (GroupNorm with one group) or token (LayerNorm), without E[x^2] - mean^2.

Each tile yields (count, mean, M2), where M2 is the sum of squared deviations from the tile's own mean, taken in
registers. Tiles combine by Chan's formula: mean = sum(n_i mean_i) / N, M2 = sum(M2_i + n_i (mean_i - mean)^2). So the
relative error of the variance is about 2^-24 |mean| / std, where that of E[x^2] - mean^2 grows with the square.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import FUSION, INTERPRETED, cdiv, float32, kernel, next_power_of_2, on
from .registration import register


CHUNK = 256 if INTERPRETED else 8192
COMBINE = 64 if INTERPRETED else 1024


@triton.jit
def moments(values, inside):
    """Count, mean and M2 of the entries of a float32 tile for which `inside` holds, at least one."""
    count = tl.sum(tl.sum(inside.to(tl.float32), 1), 0)
    mean = tl.sum(tl.sum(tl.where(inside, values, 0.0), 1), 0) / count
    deviation = tl.where(inside, values - mean, 0.0)
    return count, mean, tl.sum(tl.sum(deviation * deviation, 1), 0)


@triton.jit
def row_moments(values, inside):
    """The same for each row of the tile. A row without entries yields zeros."""
    count = tl.sum(inside.to(tl.float32), 1)
    mean = tl.sum(tl.where(inside, values, 0.0), 1) / tl.maximum(count, 1.0)
    deviation = tl.where(inside, values - mean[:, None], 0.0)
    return count, mean, tl.sum(deviation * deviation, 1)


@triton.jit
def standardised(value, inside, eps, C: tl.constexpr):
    """(x - mu) r of float32 rows, zeros outside, and r."""
    mean = tl.sum(value, 1) / C
    deviation = tl.where(inside, value - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(deviation * deviation, 1) / C + eps)
    return deviation * rstd[:, None], rstd


@triton.jit
def store_moments(partials, plane, index, count, mean, m2, inside=None):
    """Moments into partials, three planes of `plane` entries, at `index`."""
    tl.store(partials + index, count, mask=inside)
    tl.store(partials + plane + index, mean, mask=inside)
    tl.store(partials + 2 * plane + index, m2, mask=inside)


@kernel
def chunk_kernel(x, partials, size, plane, CHUNK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    inside = offsets < size
    values = tl.load(x + sample * size + offsets, mask=inside, other=0.0).to(tl.float32)
    count, mean, m2 = moments(values, inside)
    store_moments(partials, plane, sample * tl.num_programs(1) + chunk, count, mean, m2)


@triton.jit
def combine_sample(
    sample, partials, statistics, groups, rows, stride_group, stride_sample, plane, BLOCK: tl.constexpr
):
    """Statistics of one sample, which owns `rows` neighbouring entries of every group."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    entries = partials + sample * stride_sample
    for _ in range(0, groups):
        for start in range(0, rows, BLOCK):
            inside = start + lanes < rows
            n = tl.load(entries + start + lanes, mask=inside, other=0.0)
            count += n
            total += n * tl.load(entries + plane + start + lanes, mask=inside, other=0.0)
        entries += stride_group
    size = tl.sum(count, 0)
    mean = tl.sum(total, 0) / size
    m2 = tl.zeros((BLOCK,), tl.float32)
    entries = partials + sample * stride_sample
    for _ in range(0, groups):
        for start in range(0, rows, BLOCK):
            inside = start + lanes < rows
            n = tl.load(entries + start + lanes, mask=inside, other=0.0)
            shift = tl.load(entries + plane + start + lanes, mask=inside, other=0.0) - mean
            m2 += n * shift * shift + tl.load(entries + 2 * plane + start + lanes, mask=inside, other=0.0)
        entries += stride_group
    tl.store(statistics + 2 * sample, mean)
    tl.store(statistics + 2 * sample + 1, tl.sum(m2, 0) / size)


@triton.jit
def combine_rows(row, partials, statistics, groups, M, plane):
    """Statistics of rows that have one entry in every group."""
    inside = row < M
    size = tl.zeros(row.shape, tl.float32)
    mean = tl.zeros(row.shape, tl.float32)
    m2 = tl.zeros(row.shape, tl.float32)
    entries = partials + row.to(tl.int64)
    for _ in range(0, groups):
        count = tl.load(entries, mask=inside, other=0.0)
        shift = tl.load(entries + plane, mask=inside, other=0.0) - mean
        before = size
        size += count
        share = count / tl.maximum(size, 1.0)
        mean += shift * share
        m2 += tl.load(entries + 2 * plane, mask=inside, other=0.0) + shift * shift * before * share
        entries += M
    target = statistics + 2 * row.to(tl.int64)
    tl.store(target, mean, mask=inside)
    tl.store(target + 1, m2 / tl.maximum(size, 1.0), mask=inside)


@kernel
def combine_kernel(partials, statistics, groups, rows, stride_group, stride_sample, plane, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    combine_sample(sample, partials, statistics, groups, rows, stride_group, stride_sample, plane, BLOCK)


@kernel
def combine_rows_kernel(partials, statistics, groups, M, plane, ROWS: tl.constexpr):
    """`combine_kernel` where each row has one entry per group."""
    combine_rows(tl.program_id(0) * ROWS + tl.arange(0, ROWS), partials, statistics, groups, M, plane)


@kernel
def token_kernel(x, statistics, M, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (channel < C)[None, :]
    place = row.to(tl.int64)[:, None] * C + channel[None, :]
    _, mean, m2 = row_moments(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), inside)
    target = statistics + 2 * row.to(tl.int64)
    tl.store(target, mean, mask=row < M)
    tl.store(target + 1, m2 / C, mask=row < M)


def whole_rows(channels: int) -> dict[str, Any]:
    """A tile of whole rows, as arguments of a kernel: a power of two of columns, and about as many entries as pay."""
    width = max(next_power_of_2(channels), 16)
    rows = 4 if INTERPRETED else max(4096 // width, 1)
    return {"C": channels, "ROWS": rows, "WIDTH": width, "num_warps": 8, **FUSION}


def combine(partials: torch.Tensor, samples: int) -> torch.Tensor:
    """
    Statistics (samples, 2) of partials (3, groups, samples * rows): counts, means and M2.

    A sample owns `rows` neighbouring entries of every group.
    """
    statistics = float32(partials, samples, 2)
    combine_into(statistics, partials)
    return statistics


def combine_into(statistics: torch.Tensor, partials: torch.Tensor) -> None:
    """`combine`, into memory that is there."""
    _, groups, entries = partials.shape
    samples = statistics.shape[0]
    rows = entries // samples
    plane = groups * entries
    if rows == 1:
        combine_rows_kernel[(cdiv(samples, COMBINE),)](
            partials, statistics, groups, samples, plane, ROWS=COMBINE, **FUSION
        )
    else:
        combine_kernel[(samples,)](partials, statistics, groups, rows, entries, rows, plane, BLOCK=COMBINE, **FUSION)


def sample_statistics(x: torch.Tensor) -> torch.Tensor:
    """Mean and biased variance of each sample of x (B, C, H, W), channels_last: (B, 2) float32. No gradient."""
    with on(x):
        samples, size = x.shape[0], x.numel() // x.shape[0]
        chunks = cdiv(size, CHUNK)
        partials = float32(x, 3, 1, samples * chunks)
        chunk_kernel[(samples, chunks)](x, partials, size, samples * chunks, CHUNK=CHUNK, num_warps=8, **FUSION)
        return combine(partials, samples)


def token_statistics(x: torch.Tensor) -> torch.Tensor:
    """
    Mean and biased variance over the channels of each token of x (B, C, H, W), channels_last: (B H W, 2) float32.

    Tokens are in the order of memory. No gradient.
    """
    batch, channels, height, width = x.shape
    tokens = batch * height * width
    tile = whole_rows(channels)
    with on(x):
        statistics = float32(x, tokens, 2)
        token_kernel[(cdiv(tokens, tile["ROWS"]),)](x, statistics, tokens, **tile)
        return statistics


register("sample_statistics", sample_statistics, lambda x: float32(x, x.shape[0], 2))
register("token_statistics", token_statistics, lambda x: float32(x, x.numel() // x.shape[1], 2))
