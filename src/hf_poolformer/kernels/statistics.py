"""Mean and variance of each sample, without E[x^2] - mean^2.

Each tile yields (count, mean, M2), where M2 is the sum of squared deviations from the tile's own mean, taken in
registers. Tiles combine by Chan's formula: mean = sum(n_i mean_i) / N, M2 = sum(M2_i + n_i (mean_i - mean)^2). So the
relative error of the variance is about 2^-24 |mean| / std, where that of E[x^2] - mean^2 grows with the square.
"""

import torch
import triton
import triton.language as tl

from .launch import FUSION, INTERPRETED, float32, on


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
def chunk_kernel(x, partials, size, plane, CHUNK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    inside = offsets < size
    values = tl.load(x + sample * size + offsets, mask=inside, other=0.0).to(tl.float32)
    count, mean, m2 = moments(values, inside)
    index = sample * tl.num_programs(1) + chunk
    tl.store(partials + index, count)
    tl.store(partials + plane + index, mean)
    tl.store(partials + 2 * plane + index, m2)


@triton.jit
def combine_kernel(partials, statistics, groups, rows, stride_group, stride_sample, plane, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
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


def combine(partials: torch.Tensor, samples: int) -> torch.Tensor:
    """
    Statistics (samples, 2) of partials (3, groups, samples * rows): counts, means and M2.

    A sample owns `rows` neighbouring entries of every group.
    """
    _, groups, entries = partials.shape
    statistics = float32(partials, samples, 2)
    rows = entries // samples
    combine_kernel[(samples,)](
        partials, statistics, groups, rows, entries, rows, groups * entries, BLOCK=COMBINE, **FUSION
    )
    return statistics


@torch.library.custom_op("hf_poolformer::sample_statistics", mutates_args=())
def sample_statistics(x: torch.Tensor) -> torch.Tensor:
    """Mean and biased variance of each sample of x (B, C, H, W), channels_last: (B, 2) float32. No gradient."""
    with on(x):
        samples, size = x.shape[0], x[0].numel()
        chunks = triton.cdiv(size, CHUNK)
        partials = float32(x, 3, 1, samples * chunks)
        chunk_kernel[(samples, chunks)](x, partials, size, samples * chunks, CHUNK=CHUNK, num_warps=8, **FUSION)
        return combine(partials, samples)


@sample_statistics.register_fake
def _(x):
    return x.new_empty((x.shape[0], 2), dtype=torch.float32)
