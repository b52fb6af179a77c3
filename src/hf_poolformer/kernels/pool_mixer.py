"""Pooling branch of the block: y = res_scale * x + mask * scale * rstd * (pool(x) - x).

scale = layer_scale * gamma, where gamma is the norm's weight, and rstd = (var + eps)^-1/2 over C, H, W of the sample.
The norm's mean and bias cancel, because an average over valid tokens of a constant is that constant. With P the
pooling matrix (P = D^-1 A: A sums the window, D counts its valid tokens), d = P x - x, g = dL/dy, r = rstd, m = mask
and N = C H W:

    dL/dscale = sum_b m r sum_hw g d         dL/dres_scale = sum_b,hw g x
    dL/dr     = m sum_c scale sum_hw g d     dr/dx = -r^3 (x - mean) / N
    dL/dx     = res_scale g + m r scale (P^T g - g) - r^3 (dL/dr) (x - mean) / N,    P^T = A D^-1

One pass reads x and g for the sums over tokens, one reads both and writes dL/dx.
"""

import torch
import triton
import triton.language as tl

from .launch import FUSION, INTERPRETED, bucket, empty_nhwc, float32, on, tuned
from .statistics import combine, moments


# Tiles of (height, width, channels) and warps. Square in the image, since neighbours are re-read from L1: a 3x3
# window of an 8x8 tile fetches 100 tokens for 64. 64 channels of bfloat16 are one 128-byte line; 32 to 64 values per
# thread keep nine independent 16-byte loads in flight.
TILES = [(8, 8, 64, 8), (8, 8, 32, 4), (4, 8, 64, 4), (4, 4, 128, 4), (16, 4, 64, 8), (4, 4, 64, 4)]
if INTERPRETED:
    TILES = [(4, 4, 32, 1)]
# Programs wanted of the reduction, several per multiprocessor; a constant, so that sums do not depend on the device.
PROGRAMS = 4 if INTERPRETED else 1056


@triton.jit
def place(tile, height, width, C: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILE_C: tl.constexpr):
    """Coordinates of a tile's tokens, its channels, and which entries of it exist."""
    tokens = tl.arange(0, TILE_H * TILE_W)
    across = tl.cdiv(width, TILE_W)
    h = (tile // across) * TILE_H + tokens // TILE_W
    w = (tile % across) * TILE_W + tokens % TILE_W
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    inside = ((h < height) & (w < width))[:, None] & (channels < C)[None, :]
    return h, w, channels, inside


@triton.jit
def valid(h, w, height, width, REACH: tl.constexpr):
    """Number of tokens in the window around (h, w) that lie in the image."""
    rows = tl.minimum(h + REACH, height - 1) - tl.maximum(h - REACH, 0) + 1
    columns = tl.minimum(w + REACH, width - 1) - tl.maximum(w - REACH, 0) + 1
    return (rows * columns).to(tl.float32)


@triton.jit
def window(x, h, w, channels, inside, height, width, C: tl.constexpr, POOL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """P x, or P^T x if TRANSPOSED, at (h, w): x points to a sample, the result is float32."""
    REACH: tl.constexpr = POOL // 2
    total = tl.zeros(inside.shape, tl.float32)
    for i in range(POOL):
        for j in tl.static_range(POOL):
            row = h + (i - REACH)
            column = w + (j - REACH)
            there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            offsets = (row * width + column)[:, None] * C + channels[None, :]
            value = tl.load(x + offsets, mask=inside & there[:, None], other=0.0).to(tl.float32)
            if TRANSPOSED:
                # Where there is no token the value is zero, and the count only must not be.
                value *= (1.0 / tl.maximum(valid(row, column, height, width, REACH), 1.0))[:, None]
            total += value
    if not TRANSPOSED:
        total *= (1.0 / tl.maximum(valid(h, w, height, width, REACH), 1.0))[:, None]
    return total


@triton.jit
def branch_factor(statistics, mask, sample, eps):
    """mask * rstd of a sample."""
    factor = tl.rsqrt(tl.load(statistics + 2 * sample + 1) + eps)
    if mask is not None:
        factor *= tl.load(mask + sample).to(tl.float32)
    return factor


@triton.jit
def channel_factor(weight, layer_scale, channels, C: tl.constexpr):
    """layer_scale * gamma of each channel; either may be missing."""
    factor = tl.full(channels.shape, 1.0, tl.float32)
    if weight is not None:
        factor *= tl.load(weight + channels, mask=channels < C, other=0.0).to(tl.float32)
    if layer_scale is not None:
        factor *= tl.load(layer_scale + channels, mask=channels < C, other=0.0).to(tl.float32)
    return factor


@triton.jit
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
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_C: tl.constexpr,
):
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    h, w, channels, inside = place(tile, height, width, C, TILE_H, TILE_W, TILE_C)
    start = sample * height * width * C
    offsets = (h * width + w)[:, None] * C + channels[None, :]
    pooled = window(x + start, h, w, channels, inside, height, width, C, POOL, False)
    value = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)

    factor = channel_factor(weight, layer_scale, channels, C) * branch_factor(statistics, mask, sample, eps)
    out = factor[None, :] * (pooled - value)
    if res_scale is not None:
        value *= tl.load(res_scale + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    out = (out + value).to(y.dtype.element_ty)
    tl.store(y + start + offsets, out, mask=inside)

    if STATISTICS:
        count, mean, m2 = moments(out.to(tl.float32), inside)
        index = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(partials + index, count)
        tl.store(partials + plane + index, mean)
        tl.store(partials + 2 * plane + index, m2)


@triton.jit
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
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """sums (B, splits, 1 or 2, C): over tokens, of g d and (RES) of g x."""
    KINDS: tl.constexpr = 2 if RES else 1
    sample = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    start = sample * height * width * C
    branch = tl.zeros((TILE_C,), tl.float32)
    shortcut = tl.zeros((TILE_C,), tl.float32)
    for tile in range(split, tiles, splits):
        h, w, channels, inside = place(tile, height, width, C, TILE_H, TILE_W, TILE_C)
        offsets = (h * width + w)[:, None] * C + channels[None, :]
        pooled = window(x + start, h, w, channels, inside, height, width, C, POOL, False)
        value = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(g + start + offsets, mask=inside, other=0.0).to(tl.float32)
        branch += tl.sum(grad * (pooled - value), 0)
        if RES:
            shortcut += tl.sum(grad * value, 0)
    columns = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    target = sums + tl.program_id(0).to(tl.int64) * KINDS * C + columns
    tl.store(target, branch, mask=columns < C)
    if RES:
        tl.store(target + C, shortcut, mask=columns < C)


@triton.jit
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
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """dL/dx; variance_grad (B,) holds r^3 (dL/dr) / N."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    h, w, channels, inside = place(tile, height, width, C, TILE_H, TILE_W, TILE_C)
    start = sample * height * width * C
    offsets = (h * width + w)[:, None] * C + channels[None, :]
    pooled = window(g + start, h, w, channels, inside, height, width, C, POOL, True)
    grad = tl.load(g + start + offsets, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)

    factor = channel_factor(weight, layer_scale, channels, C) * branch_factor(statistics, mask, sample, eps)
    out = factor[None, :] * (pooled - grad)
    out -= tl.load(variance_grad + sample) * (value - tl.load(statistics + 2 * sample))
    if res_scale is not None:
        grad *= tl.load(res_scale + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    tl.store(dx + start + offsets, (out + grad).to(dx.dtype.element_ty), mask=inside)


def _grid(x: torch.Tensor, tile: tuple[int, int, int, int]) -> tuple[int, int, dict]:
    """Tiles per image, blocks of channels, and the tile as arguments of a kernel."""
    tile_h, tile_w, tile_c, warps = tile
    _, channels, height, width = x.shape
    tiles = triton.cdiv(height, tile_h) * triton.cdiv(width, tile_w)
    options = {"TILE_H": tile_h, "TILE_W": tile_w, "TILE_C": tile_c, "num_warps": warps, **FUSION}
    return tiles, triton.cdiv(channels, tile_c), options


def _key(name: str, x: torch.Tensor, *rest) -> tuple:
    batch, channels, height, width = x.shape
    return (name, x.dtype, bucket(batch * height * width), bucket(height), bucket(width), channels, *rest)


@torch.library.custom_op("hf_poolformer::pool_mixer", mutates_args=())
def pool_mixer(
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    pool_size: int,
    eps: float,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    y (B, C, H, W) and its statistics (B, 2), or (0, 2) if not wanted.

    x (B, C, H, W) channels_last, statistics (B, 2) float32 of x, weight, layer_scale and res_scale (C,), mask (B,).
    The derivative with respect to x is total: it includes that of the statistics, which themselves have none.
    """
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
        y, partials = tuned(_key("pool_mixer", x, pool_size, with_statistics), TILES, launch)
        return y, combine(partials, batch) if with_statistics else float32(x, 0, 2)


@pool_mixer.register_fake
def _(x, statistics, weight, layer_scale, res_scale, mask, pool_size, eps, with_statistics):
    return empty_nhwc(x), float32(x, x.shape[0] if with_statistics else 0, 2)


@torch.library.custom_op("hf_poolformer::pool_mixer_backward", mutates_args=())
def pool_mixer_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    pool_size: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (B, C, H, W), of layer_scale * weight (C,), and of res_scale (C,), or (0,) if there is none."""
    batch, channels, height, width = x.shape
    has_res = res_scale is not None

    def reduce(tile):
        tiles, blocks, options = _grid(x, tile)
        splits = min(tiles, triton.cdiv(PROGRAMS, batch * blocks))
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
        sums = tuned(_key("pool_mixer_reduction", x, pool_size, has_res), TILES, reduce).sum(1)  # (B, 1 or 2, C)
        branch = sums[:, 0]
        scale = 1.0
        for factor in (weight, layer_scale):
            scale = scale if factor is None else scale * factor.float()
        rstd = torch.rsqrt(statistics[:, 1] + eps)
        factor = rstd if mask is None else rstd * mask
        dscale = (factor[:, None] * branch).sum(0)
        # m (dL/dr) r^3 / N, a float32 sum rather than a product that might run in TF32
        variance_grad = factor * rstd.square() * (branch * scale).sum(1) / (channels * height * width)
        dx = tuned(_key("pool_mixer_backward", x, pool_size), TILES, differentiate)
        return dx, dscale, sums[:, 1].sum(0) if has_res else float32(x, 0)


@pool_mixer_backward.register_fake
def _(g, x, statistics, weight, layer_scale, res_scale, mask, pool_size, eps):
    return empty_nhwc(x), float32(x, x.shape[1]), float32(x, 0 if res_scale is None else res_scale.shape[0])


def _setup_context(ctx, inputs, output):
    x, statistics, weight, layer_scale, res_scale, mask, ctx.pool_size, ctx.eps, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, statistics, weight, layer_scale, res_scale, mask)


def _backward(ctx, g, _):
    if g is None:
        return (None,) * 9
    x, statistics, weight, layer_scale, res_scale, mask = ctx.saved_tensors
    g = g.contiguous(memory_format=torch.channels_last)
    dx, dscale, dres = torch.ops.hf_poolformer.pool_mixer_backward(
        g, x, statistics, weight, layer_scale, res_scale, mask, ctx.pool_size, ctx.eps
    )
    dweight = dlayer = None
    if weight is not None:
        dweight = (dscale if layer_scale is None else dscale * layer_scale).to(weight.dtype)
    if layer_scale is not None:
        dlayer = (dscale if weight is None else dscale * weight).to(layer_scale.dtype)
    dres = None if res_scale is None else dres.to(res_scale.dtype)
    return dx, None, dweight, dlayer, dres, None, None, None, None


pool_mixer.register_autograd(_backward, setup_context=_setup_context)
