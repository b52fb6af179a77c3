"""Backward of the MLP: the formulas are those of channel_mlp.py."""

import torch
import triton.language as tl

from .activations import activate, activation_of, store_activation_gradients
from .folding import fold
from .launch import FUSION, INTERPRETED, Tiles, bucket, cdiv, empty_nhwc, float32, kernel, on, tuned
from .mlp_parameters import parameter_gradients
from .mlp_parts import Parameters, norm_of, normalise, store_tail, stride_of
from .parts import PROGRAMS, scalar, tile_of, vector
from .products import TILES, candidates, options, product, programs
from .statistics import whole_rows


# The epilogue of the expansion keeps three tiles alive.
TILES_BACKWARD = [
    Tiles(64, 64, 64, 4, 3),
    Tiles(128, 64, 64, 8, 3),
    Tiles(64, 128, 64, 8, 3),
    Tiles(64, 64, 32, 4, 4),
]
if INTERPRETED:
    TILES_BACKWARD = TILES
# Of the pass over the shortcut's gradient.
SHORTCUT_ROWS, SHORTCUT_COLUMNS = (16, 16) if INTERPRETED else (64, 64)


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
    first, start, row, row_inside, block, column = tile_of(M, N, ROWS, COLUMNS)
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
    first, start, row, row_inside, block, column = tile_of(M, N, ROWS, COLUMNS)
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
        blocks: tl.constexpr = tl.cdiv(N, COLUMNS)
        tl.store(target + blocks * tl.cast(M, tl.int64), tl.sum(out * hat, 1), mask=row_inside)


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
    first, start, row, row_inside, _, channel = tile_of(M, C, ROWS, WIDTH)
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


def mlp_gradients(
    g: torch.Tensor,
    source: torch.Tensor,
    statistics: torch.Tensor,
    preactivation: torch.Tensor,
    parameters: Parameters,
    mask: torch.Tensor | None,
    activation: str,
    eps: float,
    wanted: list[bool],
) -> list[torch.Tensor | None]:
    """`channel_mlp.mlp_backward`."""
    _, channels, height, width = g.shape
    rows, inner = preactivation.shape
    groups, dtype = statistics.shape[0], preactivation.dtype
    of_tokens = groups == rows
    act = activation_of(activation, dtype, g.device)
    weight1, weight2, scale = parameters.weight1, parameters.weight2, parameters.layer_scale
    with on(g):
        weight1, weight2, *_ = fold(weight1, parameters.norm_weight, weight2, scale, dtype)
        normed = source if source.ndim == 2 else normalise(source, statistics, eps, dtype)
        with_sums = parameters.res_scale is not None and wanted[-1]
        rounded, shortcut_sums = shortcut(g, normed, statistics, eps, dtype, with_sums)

        def expand(tiles):
            dz = torch.empty_like(preactivation)
            hidden = torch.empty((rows, stride_of(inner)), dtype=dtype, device=g.device)
            expand_backward_kernel[(programs(rows, inner, tiles),)](
                rounded,
                weight2,
                preactivation,
                parameters.act_scale,
                mask,
                dz,
                hidden,
                rows,
                height * width,
                N=inner,
                K=channels,
                STRIDE=hidden.shape[1],
                ACT=act,
                **options(tiles, dtype),
            )
            return dz, hidden

        key = (g.dtype, dtype, bucket(rows), channels, inner)
        dz, hidden = tuned(("expand_backward", *key, act), candidates(dtype, TILES_BACKWARD), expand)

        def contract(tiles):
            q = torch.empty((rows, channels), dtype=dtype, device=g.device)
            row_sums = None if of_tokens else float32(g, 2, cdiv(channels, tiles.columns), rows)
            contract_backward_kernel[(programs(rows, channels, tiles),)](
                dz,
                weight1,
                normed,
                q,
                row_sums,
                rows,
                N=channels,
                K=inner,
                STRIDE=normed.shape[1],
                **options(tiles, dtype),
            )
            return q, row_sums

        q, row_sums = tuned(("contract_backward", *key, of_tokens), candidates(dtype, TILES), contract)
        rounded = rounded.permute(0, 2, 3, 1).reshape(rows, channels)
        grads, sample_sums, act_sums = parameter_gradients(
            dz, normed, rounded, hidden, parameters, wanted, shortcut_sums, row_sums, groups
        )
        dx, tile = empty_nhwc(g), whole_rows(channels)
        norm_backward_kernel[(cdiv(rows, tile["ROWS"]),)](
            q,
            normed,
            g,
            statistics,
            sample_sums,
            parameters.res_scale,
            dx,
            act_sums,
            grads.act_scale,
            grads.act_bias,
            rows,
            rows // groups,
            0 if act_sums is None else act_sums.shape[0],
            eps,
            STRIDE=normed.shape[1],
            **tile,
        )
    return [dx, *grads]


def shortcut(
    g: torch.Tensor, normed: torch.Tensor, statistics: torch.Tensor, eps: float, dtype: torch.dtype, with_sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """g (B, C, H, W) in `dtype`, and parts of the gradient of res_scale (any, C), if wanted."""
    rounds, sums = dtype != g.dtype, None
    rounded = empty_nhwc(g, dtype) if rounds else g
    if rounds or with_sums:
        batch, channels, height, width = g.shape
        rows = batch * height * width
        blocks = cdiv(channels, SHORTCUT_COLUMNS)
        splits = min(cdiv(rows, SHORTCUT_ROWS), cdiv(PROGRAMS, blocks))
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
            ROWS=SHORTCUT_ROWS,
            COLUMNS=SHORTCUT_COLUMNS,
            **FUSION,
        )
    return rounded, sums
