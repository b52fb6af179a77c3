"""Forward of the MLP: the formulas are those of channel_mlp.py."""

import torch
import triton.language as tl

from .activations import activate, activation_of, affine
from .folding import fold
from .launch import (
    FUSION,
    INTERPRETED,
    Tiles,
    bucket,
    cdiv,
    empty_nhwc,
    float32,
    kernel,
    next_power_of_2,
    on,
    operand,
    tuned,
)
from .mlp_parts import Parameters, norm_of, normalise, store_normed, stride_of
from .parts import tile_of, vector
from .products import TILES, candidates, contract, finish, options, product, programs
from .statistics import combine, standardised


# In one kernel: all channels of some rows, and so many hidden columns at a time; there is no depth.
TILES_WHOLE = [Tiles(64, 64, 0, 4, 2), Tiles(64, 64, 0, 4, 3), Tiles(128, 64, 0, 8, 3)]
if INTERPRETED:
    TILES_WHOLE = [Tiles(16, 16, 0, 1, 1)]
WHOLE_CHANNELS = 128


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
    first, start, row, row_inside, _, channel = tile_of(M, C, ROWS, WIDTH)
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
        store_normed(normed, value, first, row, row_inside, channel, C, STRIDE)
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
        h = activate(z, ACT)[0]
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
    first, start, row, row_inside, _, column = tile_of(M, N, ROWS, COLUMNS)
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
    h = activate(z, ACT)[0]
    h = affine(h, act_scale, act_bias)
    tl.store(hidden + place, h.to(hidden.dtype.element_ty), mask=inside)


def is_whole(channels: int, dtype: torch.dtype) -> bool:
    """Whether one kernel computes the branch. float32 is bound by arithmetic, and its tiles would not fit."""
    return channels <= WHOLE_CHANNELS and dtype != torch.float32


def keeps_normed(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the forward operation makes x^ anyway, so that it is kept in the place of x."""
    return dtype != x.dtype or is_whole(x.shape[1], dtype)


def mlp_from_partials(
    x: torch.Tensor,
    statistics: torch.Tensor | None,
    partials: torch.Tensor | None,
    parameters: Parameters,
    mask: torch.Tensor | None,
    activation: str,
    eps: float,
    dtype: torch.dtype,
    save: bool,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """
    `channel_mlp.mlp`, where the statistics of x are memory to be filled, of partials (3, any, any), if these are
    given: in the launch that folds the weights, if there is one.

    Without statistics the norm is over channels, and tokens make their own, which only one kernel for all can
    (`is_whole`), where nothing is saved.
    """
    compute = in_one_kernel if is_whole(x.shape[1], dtype) else in_two_products
    act = activation_of(activation, dtype, x.device)
    with on(x):
        y, moments, preactivation, normed = compute(
            x, statistics, partials, parameters, mask, act, eps, dtype, save, with_statistics
        )
        return y, combine(moments, statistics.shape[0]) if with_statistics else None, preactivation, normed


def in_one_kernel(
    x: torch.Tensor,
    statistics: torch.Tensor | None,
    partials: torch.Tensor | None,
    parameters: Parameters,
    mask: torch.Tensor | None,
    act: str,
    eps: float,
    dtype: torch.dtype,
    save: bool,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """y, what its statistics are to be combined of, if wanted, and z and x^, if they are to be saved."""
    batch, channels, height, width = x.shape
    rows, inner, stride = batch * height * width, parameters.weight1.shape[0], stride_of(channels)
    weight1, weight2, *_ = fold(
        parameters.weight1, None, parameters.weight2, None, dtype, statistics=statistics, partials=partials
    )
    parameters = parameters._replace(weight1=weight1, weight2=weight2)

    def launch(tiles):
        y = empty_nhwc(x)
        moments = float32(x, 3, 1, rows) if with_statistics else None
        preactivation = torch.empty((rows, inner), dtype=dtype, device=x.device) if save else None
        normed = torch.empty((rows, stride), dtype=dtype, device=x.device) if save else None
        mlp_kernel[(cdiv(rows, tiles.rows),)](
            x,
            statistics,
            *parameters,
            mask,
            y,
            moments,
            preactivation,
            normed,
            rows,
            height * width,
            1 if statistics is None else rows // statistics.shape[0],
            eps,
            C=channels,
            R=inner,
            STRIDE=stride,
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

    name = "channel_mlp_saving" if save else "channel_mlp"
    key = (name, x.dtype, dtype, bucket(rows), channels, inner, act, with_statistics)
    return tuned(key, TILES_WHOLE, launch)


def in_two_products(
    x: torch.Tensor,
    statistics: torch.Tensor,
    partials: torch.Tensor | None,
    parameters: Parameters,
    mask: torch.Tensor | None,
    act: str,
    eps: float,
    dtype: torch.dtype,
    save: bool,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """`in_one_kernel` for more channels; x^ is there where the first product takes it."""
    batch, channels, height, width = x.shape
    rows, inner = batch * height * width, parameters.weight1.shape[0]
    norm_weight, norm_bias, weight1, bias1, weight2, bias2, act_scale, act_bias, *scales = parameters
    weight1, weight2, sums, offset = fold(
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
    normed = normalise(x, statistics, eps, dtype) if keeps_normed(x, dtype) else None

    def expand(tiles):
        hidden = torch.empty((rows, inner), dtype=dtype, device=x.device)
        preactivation = torch.empty_like(hidden) if save else None
        expand_kernel[(programs(rows, inner, tiles),)](
            x if normed is None else normed,
            statistics,
            weight1,
            sums,
            offset,
            act_scale,
            act_bias,
            preactivation,
            hidden,
            rows,
            rows // statistics.shape[0],
            eps,
            N=inner,
            K=channels,
            STRIDE=channels if normed is None else normed.shape[1],
            ACT=act,
            NORMED=normed is not None,
            **options(tiles, dtype),
        )
        return hidden, preactivation

    key = (x.dtype, dtype, bucket(rows), channels, inner)
    tiles = candidates(dtype, TILES)
    hidden, preactivation = tuned(("expand_saving" if save else "expand", *key, act), tiles, expand)
    y, moments = tuned(
        ("contract", *key, with_statistics),
        tiles,
        lambda tile: contract(hidden, weight2, bias2, x, *scales, mask, tile, with_statistics),
    )
    return y, moments, preactivation, normed if save else None
