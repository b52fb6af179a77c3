"""Pooling branch of the block: y = res_scale * x + mask * scale * rstd * (pool(x) - x).

scale = layer_scale * gamma, where gamma is the norm's weight, and rstd = (var + eps)^-1/2 over C, H, W of the sample.
The norm's mean and bias cancel, because an average over valid tokens of a constant is that constant. With P the
pooling matrix (P = D^-1 A: A sums the window, D counts its valid tokens), d = P x - x, g = dL/dy, r = rstd, m = mask
and N = C H W:

    dL/dscale = sum_b m r sum_hw g d         dL/dres_scale = sum_b,hw g x
    dL/dr     = m sum_c scale sum_hw g d     dr/dx = -r^3 (x - mean) / N
    dL/dx     = res_scale g + m r scale (P^T g - g) - r^3 (dL/dr) (x - mean) / N,    P^T = A D^-1

One pass reads x and g for the sums over tokens, one reads both and writes dL/dx. Between them one small launch makes
of the sums what the second pass needs of each sample, and the parameters' gradients.

A window is separable, so is the number of its valid tokens. A program takes a band of rows and lets them stream by: of
each it loads every token and its neighbours to the left and right, and keeps the sums of the last two rows, so that a
3x3 window costs three loads in place of nine. Other windows load all of their rows.
"""

import torch
import triton
import triton.language as tl

from .launch import (
    FUSION,
    INTERPRETED,
    bucket,
    cdiv,
    empty_like_each,
    empty_nhwc,
    float32,
    kernel,
    next_power_of_2,
    on,
    tuned,
)
from .parts import PROGRAMS, store_if_wanted, vector
from .registration import differentiable
from .statistics import combine, store_moments


# What gets gradients beside x.
PARAMETERS = ("weight", "layer_scale", "res_scale", "norm_bias")
# Tiles of (rows of a band, columns, channels) and warps, by columns. Eight values per thread are a 16-byte load of
# half precision; short bands read their neighbours' rows more often, long ones leave too few programs. The first of
# each was the fastest on an H200 in the forward of PoolFormer S12's stages, statistics included.
TILES = {
    64: [(14, 64, 64, 8), (14, 64, 32, 8), (8, 64, 32, 8), (28, 64, 16, 4)],
    32: [(28, 32, 32, 4), (14, 32, 64, 8), (7, 32, 64, 8)],
    16: [(14, 16, 64, 4), (7, 16, 128, 8), (14, 16, 32, 2)],
    8: [(7, 8, 64, 4), (7, 8, 32, 1), (7, 8, 128, 4)],
}
if INTERPRETED:
    TILES = {columns: [(2, 4, 32, 1)] for columns in TILES}
# Of the sums of all samples: rows, and few channels at a time, which makes more programs.
SUM_ROWS, SUM_CHANNELS = (16, 16) if INTERPRETED else (128, 16)


@triton.jit
def place(tile, width, C: tl.constexpr, BAND: tl.constexpr, TILE_W: tl.constexpr, TILE_C: tl.constexpr):
    """First row of a tile, its columns, its channels, and which (column, channel) exist."""
    across = tl.cdiv(width, TILE_W)
    columns = (tile % across) * TILE_W + tl.arange(0, TILE_W)
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    return (tile // across) * BAND, columns, channels, (columns < width)[:, None] & (channels < C)[None, :]


@triton.jit
def valid(index, size, REACH: tl.constexpr):
    """One over the number of rows (columns) in the window around `index` that lie in the image."""
    count = tl.minimum(index + REACH, size - 1) - tl.maximum(index - REACH, 0) + 1
    return 1.0 / tl.maximum(count, 1).to(tl.float32)


@triton.jit
def no_row(TILE_W: tl.constexpr, TILE_C: tl.constexpr):
    """
    What a loop over rows starts from, made for each variable of its own.

    Triton (up to 3.8 at least) takes `a` for constant in a loop with `a = b` if both began as the same tensor.
    """
    return tl.zeros((TILE_W, TILE_C), tl.float32)


@triton.jit
def row_sum(x, row, columns, channels, height, width, C: tl.constexpr, POOL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Sum over the window's columns in a row of the sample at x, and the row itself, float32; outside zeros. If
    TRANSPOSED, each token counts by one over the size of its own window."""
    REACH: tl.constexpr = POOL // 2
    there = ((row >= 0) & (row < height)) & (channels < C)
    total = tl.zeros((columns.shape[0], channels.shape[0]), tl.float32)
    middle = total
    for j in tl.static_range(POOL):
        column = columns + (j - REACH)
        inside = ((column >= 0) & (column < width))[:, None] & there[None, :]
        value = tl.load(x + (row * width + column)[:, None] * C + channels[None, :], mask=inside, other=0.0)
        value = value.to(tl.float32)
        if j == REACH:
            middle = value
        if TRANSPOSED:
            value *= valid(column, width, REACH)[:, None]
        total += value
    if TRANSPOSED:
        total *= valid(row, height, REACH)
    return total, middle


@triton.jit
def all_rows(x, row, columns, channels, height, width, C: tl.constexpr, POOL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The same of all rows of the window around `row`, and that row itself."""
    total, middle = row_sum(x, row, columns, channels, height, width, C, POOL, TRANSPOSED)
    for i in range(1, POOL // 2 + 1):
        above, _ = row_sum(x, row - i, columns, channels, height, width, C, POOL, TRANSPOSED)
        below, _ = row_sum(x, row + i, columns, channels, height, width, C, POOL, TRANSPOSED)
        total += above + below
    return total, middle


@triton.jit
def branch_factor(statistics, mask, sample, eps):
    """mask * rstd of a sample, or of several."""
    factor = tl.rsqrt(tl.load(statistics + 2 * sample + 1) + eps)
    if mask is not None:
        factor *= tl.load(mask + sample).to(tl.float32)
    return factor


@triton.jit
def channel_factor(weight, layer_scale, channels, C: tl.constexpr):
    """layer_scale * gamma of each channel; either may be missing."""
    return vector(weight, channels, channels < C, 1.0) * vector(layer_scale, channels, channels < C, 1.0)


@kernel
def forward_kernel(
    x,
    statistics,
    weight,
    layer_scale,
    res_scale,
    mask,
    y,
    partials,
    height,
    width,
    tiles,
    plane,
    eps,
    C: tl.constexpr,
    POOL: tl.constexpr,
    STATISTICS: tl.constexpr,
    BAND: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_C: tl.constexpr,
):
    REACH: tl.constexpr = POOL // 2
    LEAD: tl.constexpr = 2 if POOL == 3 else 0
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first, columns, channels, inside = place(tl.program_id(0) % tiles, width, C, BAND, TILE_W, TILE_C)
    start = sample * height * width * C
    factor = channel_factor(weight, layer_scale, channels, C) * branch_factor(statistics, mask, sample, eps)
    shortcut = vector(res_scale, channels, channels < C, 1.0)
    # Deviations are taken from where the channel's mean is about to be.
    centre = shortcut * tl.load(statistics + 2 * sample)
    across = valid(columns, width, REACH)

    above, here = no_row(TILE_W, TILE_C), no_row(TILE_W, TILE_C)
    value = no_row(TILE_W, TILE_C)
    deviations = no_row(TILE_W, TILE_C)
    squares = no_row(TILE_W, TILE_C)
    for i in range(BAND + LEAD):
        row = first + i - LEAD
        if POOL == 3:
            below, following = row_sum(x + start, row + 1, columns, channels, height, width, C, POOL, False)
            total = above + here + below
        else:
            total, value = all_rows(x + start, row, columns, channels, height, width, C, POOL, False)
        pooled = total * (across * valid(row, height, REACH))[:, None]
        out = (factor[None, :] * (pooled - value) + shortcut[None, :] * value).to(y.dtype.element_ty)
        keep = inside & ((row >= first) & (row < height))
        tl.store(y + start + (row * width + columns)[:, None] * C + channels[None, :], out, mask=keep)
        if STATISTICS:
            deviation = tl.where(keep, out.to(tl.float32) - centre[None, :], 0.0)
            deviations += deviation
            squares += deviation * deviation
        if POOL == 3:
            above = here
            here = below
            value = following

    if STATISTICS:
        rows = tl.minimum(BAND, height - first)
        count = (rows * tl.sum((columns < width).to(tl.int32), 0)).to(tl.float32)
        known = (channels < C).to(tl.float32)
        shift = tl.sum(deviations, 0) / count
        m2 = tl.sum(squares, 0) - count * shift * shift
        means = centre + shift
        number = tl.sum(known, 0)
        mean = tl.sum(known * means, 0) / number
        m2 = tl.sum(tl.maximum(m2, 0.0) + count * known * (means - mean) * (means - mean), 0)
        index = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        store_moments(partials, plane, index, count * number, mean, m2)


@kernel
def reduction_kernel(
    x,
    g,
    sums,
    height,
    width,
    tiles,
    splits,
    C: tl.constexpr,
    POOL: tl.constexpr,
    RES: tl.constexpr,
    BAND: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """sums (B, splits, 1 or 2, C): over tokens, of g d and (RES) of g x."""
    KINDS: tl.constexpr = 2 if RES else 1
    REACH: tl.constexpr = POOL // 2
    LEAD: tl.constexpr = 2 if POOL == 3 else 0
    sample = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    start = sample * height * width * C
    branch = no_row(TILE_W, TILE_C)
    shortcut = no_row(TILE_W, TILE_C)
    for tile in range(split, tiles, splits):
        first, columns, channels, inside = place(tile, width, C, BAND, TILE_W, TILE_C)
        across = valid(columns, width, REACH)
        above, here = no_row(TILE_W, TILE_C), no_row(TILE_W, TILE_C)
        value = no_row(TILE_W, TILE_C)
        for i in range(BAND + LEAD):
            row = first + i - LEAD
            if POOL == 3:
                below, following = row_sum(x + start, row + 1, columns, channels, height, width, C, POOL, False)
                total = above + here + below
            else:
                total, value = all_rows(x + start, row, columns, channels, height, width, C, POOL, False)
            pooled = total * (across * valid(row, height, REACH))[:, None]
            keep = inside & ((row >= first) & (row < height))
            offsets = (row * width + columns)[:, None] * C + channels[None, :]
            grad = tl.load(g + start + offsets, mask=keep, other=0.0).to(tl.float32)
            branch += grad * (pooled - value)
            if RES:
                shortcut += grad * value
            if POOL == 3:
                above = here
                here = below
                value = following
    block = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    target = sums + tl.program_id(0).to(tl.int64) * KINDS * C + block
    tl.store(target, tl.sum(branch, 0), mask=block < C)
    if RES:
        tl.store(target + C, tl.sum(shortcut, 0), mask=block < C)


@kernel
def scales_kernel(
    sums,  # (B, splits, 1 or 2, C), of `reduction_kernel`
    statistics,  # (B, 2)
    weight,  # (C,)
    layer_scale,  # (C,)
    mask,  # (B,)
    variance_grad,  # (B,): r^3 (dL/dr) / N
    dweight,  # (C,)
    dlayer_scale,  # (C,)
    dres_scale,  # (C,)
    dnorm_bias,  # (C,), zeros
    batch,
    splits,
    size,  # N
    eps,
    C: tl.constexpr,
    RES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The first `batch` programs take a sample each, the others channels; gradients that there is room for."""
    KINDS: tl.constexpr = 2 if RES else 1
    if tl.program_id(0) < batch:
        sample = tl.program_id(0)
        total = tl.zeros((ROWS,), tl.float32)
        entries = sums + sample.to(tl.int64) * splits * KINDS * C
        for _ in range(0, splits):
            for start in range(0, C, ROWS):
                channels = start + tl.arange(0, ROWS)
                value = tl.load(entries + channels, mask=channels < C, other=0.0)
                total += channel_factor(weight, layer_scale, channels, C) * value
            entries += KINDS * C
        rstd = branch_factor(statistics, None, sample, eps)
        share = branch_factor(statistics, mask, sample, eps) * rstd * rstd / size
        tl.store(variance_grad + sample, share * tl.sum(total, 0))
    else:
        channels = (tl.program_id(0) - batch) * COLUMNS + tl.arange(0, COLUMNS)
        for_scale = tl.zeros((COLUMNS,), tl.float32)
        for_res = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, batch * splits, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = (row < batch * splits)[:, None] & (channels < C)[None, :]
            place = sums + row.to(tl.int64)[:, None] * KINDS * C + channels[None, :]
            factor = branch_factor(statistics, mask, tl.minimum(row // splits, batch - 1), eps)
            for_scale += tl.sum(factor[:, None] * tl.load(place, mask=inside, other=0.0), 0)
            if RES:
                for_res += tl.sum(tl.load(place + C, mask=inside, other=0.0), 0)
        inside = channels < C
        store_if_wanted(dweight, channels, for_scale * vector(layer_scale, channels, inside, 1.0), inside)
        store_if_wanted(dlayer_scale, channels, for_scale * vector(weight, channels, inside, 1.0), inside)
        store_if_wanted(dres_scale, channels, for_res, inside)
        store_if_wanted(dnorm_bias, channels, tl.zeros((COLUMNS,), tl.float32), inside)


@kernel
def backward_kernel(
    x,
    g,
    statistics,
    weight,
    layer_scale,
    res_scale,
    mask,
    variance_grad,
    dx,
    height,
    width,
    tiles,
    eps,
    C: tl.constexpr,
    POOL: tl.constexpr,
    BAND: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """dL/dx; variance_grad (B,) holds r^3 (dL/dr) / N."""
    LEAD: tl.constexpr = 2 if POOL == 3 else 0
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first, columns, channels, inside = place(tl.program_id(0) % tiles, width, C, BAND, TILE_W, TILE_C)
    start = sample * height * width * C
    factor = channel_factor(weight, layer_scale, channels, C) * branch_factor(statistics, mask, sample, eps)
    shortcut = vector(res_scale, channels, channels < C, 1.0)
    mean = tl.load(statistics + 2 * sample)
    pull = tl.load(variance_grad + sample)

    above, here = no_row(TILE_W, TILE_C), no_row(TILE_W, TILE_C)
    grad = no_row(TILE_W, TILE_C)
    for i in range(BAND + LEAD):
        row = first + i - LEAD
        if POOL == 3:
            below, following = row_sum(g + start, row + 1, columns, channels, height, width, C, POOL, True)
            total = above + here + below
        else:
            total, grad = all_rows(g + start, row, columns, channels, height, width, C, POOL, True)
        keep = inside & ((row >= first) & (row < height))
        offsets = (row * width + columns)[:, None] * C + channels[None, :]
        value = tl.load(x + start + offsets, mask=keep, other=0.0).to(tl.float32)
        out = factor[None, :] * (total - grad) - pull * (value - mean) + shortcut[None, :] * grad
        tl.store(dx + start + offsets, out.to(dx.dtype.element_ty), mask=keep)
        if POOL == 3:
            above = here
            here = below
            grad = following


def _tiles(x: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """The candidates for images as wide as x."""
    return TILES[min(max(next_power_of_2(x.shape[3]), min(TILES)), max(TILES))]


def _grid(x: torch.Tensor, tile: tuple[int, int, int, int]) -> tuple[int, int, dict]:
    """Tiles per image, blocks of channels, and the tile as arguments of a kernel."""
    band, tile_w, tile_c, warps = tile
    _, channels, height, width = x.shape
    tiles = cdiv(height, band) * cdiv(width, tile_w)
    options = {"BAND": band, "TILE_W": tile_w, "TILE_C": tile_c, "num_warps": warps, **FUSION}
    return tiles, cdiv(channels, tile_c), options


def _key(name: str, x: torch.Tensor, *rest) -> tuple:
    batch, channels, height, width = x.shape
    return (name, x.dtype, bucket(batch * height * width), bucket(height), bucket(width), channels, *rest)


def mix(
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    pool_size: int,
    eps: float,
    with_statistics: bool,
    norm_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    y (B, C, H, W) and its statistics (B, 2), or None if not wanted.

    x (B, C, H, W) channels_last, statistics (B, 2) float32 of x, weight, layer_scale, res_scale and norm_bias (C,),
    mask (B,). The derivative with respect to x is total: it includes that of the statistics, which themselves have
    none. norm_bias cancels; its gradient is zero.
    """
    y, partials = mix_partially(x, statistics, weight, layer_scale, res_scale, mask, pool_size, eps, with_statistics)
    with on(x):
        return y, None if partials is None else combine(partials, x.shape[0])


def mix_partially(
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    pool_size: int,
    eps: float,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`mix`, with what its statistics are to be combined of, (3, 1, any)."""
    batch, channels, height, width = x.shape

    def launch(tile):
        y = empty_nhwc(x)
        tiles, blocks, options = _grid(x, tile)
        partials = float32(x, 3, 1, batch * tiles * blocks) if with_statistics else None
        forward_kernel[(batch * tiles, blocks)](
            x,
            statistics,
            weight,
            layer_scale,
            res_scale,
            mask,
            y,
            partials,
            height,
            width,
            tiles,
            batch * tiles * blocks,
            eps,
            C=channels,
            POOL=pool_size,
            STATISTICS=with_statistics,
            **options,
        )
        return y, partials

    with on(x):
        return tuned(_key("pool_mixer", x, pool_size, with_statistics), _tiles(x), launch)


def mix_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    pool_size: int,
    eps: float,
    wanted: list[bool],
) -> list[torch.Tensor | None]:
    """The gradients of x and of weight, layer_scale, res_scale and norm_bias; None for those not `wanted`, four
    flags."""
    batch, channels, height, width = x.shape
    has_res = res_scale is not None and wanted[2]

    def reduce(tile):
        tiles, blocks, options = _grid(x, tile)
        splits = min(tiles, cdiv(PROGRAMS, batch * blocks))
        sums = float32(x, batch, splits, 2 if has_res else 1, channels)
        reduction_kernel[(batch * splits, blocks)](
            x, g, sums, height, width, tiles, splits, C=channels, POOL=pool_size, RES=has_res, **options
        )
        return sums

    def differentiate(tile):
        dx = empty_nhwc(x)
        tiles, blocks, options = _grid(x, tile)
        backward_kernel[(batch * tiles, blocks)](
            x,
            g,
            statistics,
            weight,
            layer_scale,
            res_scale,
            mask,
            variance_grad,
            dx,
            height,
            width,
            tiles,
            eps,
            C=channels,
            POOL=pool_size,
            **options,
        )
        return dx

    with on(x):
        sums = tuned(_key("pool_mixer_reduction", x, pool_size, has_res), _tiles(x), reduce)
        variance_grad = float32(x, batch)
        grads = empty_like_each((weight, layer_scale, res_scale, norm_bias), wanted)
        blocks = cdiv(channels, SUM_CHANNELS) if any(grad is not None for grad in grads) else 0
        scales_kernel[(batch + blocks,)](
            sums,
            statistics,
            weight,
            layer_scale,
            mask,
            variance_grad,
            *grads,
            batch,
            sums.shape[1],
            float(channels * height * width),
            eps,
            C=channels,
            RES=has_res,
            ROWS=SUM_ROWS,
            COLUMNS=SUM_CHANNELS,
            **FUSION,
        )
        return [tuned(_key("pool_mixer_backward", x, pool_size), _tiles(x), differentiate), *grads]


def _fake(x, statistics, weight, layer_scale, res_scale, mask, pool_size, eps, with_statistics, norm_bias=None):
    return empty_nhwc(x), float32(x, x.shape[0], 2) if with_statistics else None


def _keep(inputs, results):
    x, statistics, weight, layer_scale, res_scale, mask, pool_size, eps, _, norm_bias = inputs
    return (x, statistics, weight, layer_scale, res_scale, norm_bias, mask), (pool_size, eps)


pool_mixer = differentiable("pool_mixer", mix, mix_backward, fake=_fake, keep=_keep, parameters=PARAMETERS)
