"""LayerNorm over the channels of each token, and the shortcut around a mixer that runs as a module of its own.

    n(x) = gamma v + beta,  v = (x - mu) r,  r = rstd of the token        y = res_scale x + layer_scale m branch

Rows are tokens, M = B H W of them with C channels; m is a number per sample. What is summed over channels is summed in
registers, and the variance from deviations, so that each pass reads and writes an entry once. With e = dL/dn and
g = dL/dy:

    dbranch = layer_scale m g        dlayer_scale = sum m g branch        dres_scale = sum g x
    dgamma = sum e v                 dbeta = sum e                        q = gamma e
    dx = res_scale g + r (q - mean_c q - v mean_c(q v))

x is what both read, and so one pass makes all of dx, and the sum for res_scale with it: the norm hands on its input as
the shortcut, whose gradient that `merge` returns is g, before res_scale. Where there is neither a layer scale nor a
mask, g is also the gradient of the branch, and `merge` has no backward pass at all.

Programs write sums of their own, and one launch adds these up in a fixed order, into gradients in the parameters'
dtypes.

These are functions of autograd and not registered operations, which take the CPU three times as long to call as all
the rest. torch.compile, which would need those, makes a norm and an addition as fast itself (see backends.py).
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

from .launch import FUSION, INTERPRETED, cdiv, empty_nhwc, float32, kernel, next_power_of_2, on
from .parts import store_if_wanted, vector
from .statistics import row_moments, standardised


# Entries of a tile: 16 in each thread of 8 warps, which are two loads of 16 bytes of half precision. Where sums are
# held as well, half of that: a multiprocessor's registers are then enough for three programs and not for one.
ENTRIES, ENTRIES_WITH_SUMS = (256, 256) if INTERPRETED else (4096, 2048)
# Programs wanted where each has sums of its own, three for each of a Hopper's multiprocessors, and the tiles that make
# a program worth it. Constants, so that sums do not depend on the device.
PROGRAMS = 4 if INTERPRETED else 396
FEWEST_TILES = 1 if INTERPRETED else 4
# Tile of the sum over programs.
SUM_ROWS, SUM_COLUMNS = (16, 16) if INTERPRETED else (128, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@kernel(do_not_specialize=["M"])
def token_norm_kernel(x, weight, bias, normed, M, eps, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """n(x) (M, C) in the dtype of `normed`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < C)[None, :]
    place = row.to(tl.int64)[:, None] * C + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value, _ = standardised(value, inside, eps, C)
    value = value * vector(weight, column, column < C, 1.0)[None, :]
    value += vector(bias, column, column < C, 0.0)[None, :]
    tl.store(normed + place, value.to(normed.dtype.element_ty), mask=inside)


@kernel(do_not_specialize=["M"])
def token_norm_backward_kernel(
    e,  # (M, C)
    x,  # (M, C)
    g,  # (M, C), without which there is no shortcut
    weight,  # (C,)
    res_scale,  # (C,)
    dx,  # (M, C)
    sums,  # (programs, 2 or 3 with BIAS, C) over tokens of e v, of g x and of e
    M,
    eps,
    BIAS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx of e = dL/dn(x) and g, and the sums, if there is room for them."""
    column = tl.arange(0, COLUMNS)
    gamma = vector(weight, column, column < C, 1.0)[None, :]
    shortcut = vector(res_scale, column, column < C, 1.0)[None, :]
    norm_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    shortcut_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (column < C)[None, :]
        place = row.to(tl.int64)[:, None] * C + column[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        branch = tl.load(e + place, mask=inside, other=0.0).to(tl.float32)
        if g is not None:
            grad = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
            if res_scale is not None and sums is not None:
                shortcut_sum += grad * value
        normed, rstd = standardised(value, inside, eps, C)
        if sums is not None:
            norm_sum += branch * normed
            if BIAS:
                bias_sum += branch
        branch *= gamma
        mean = tl.sum(branch, 1) / C
        correlation = tl.sum(branch * normed, 1) / C
        out = rstd[:, None] * (branch - mean[:, None] - normed * correlation[:, None])
        if g is not None:
            out += shortcut * grad
        tl.store(dx + place, out.to(dx.dtype.element_ty), mask=inside)
    if sums is not None:
        KINDS: tl.constexpr = 3 if BIAS else 2
        target = sums + tl.program_id(0).to(tl.int64) * KINDS * C + column
        tl.store(target, tl.sum(norm_sum, 0), mask=column < C)
        tl.store(target + C, tl.sum(shortcut_sum, 0), mask=column < C)
        if BIAS:
            tl.store(target + 2 * C, tl.sum(bias_sum, 0), mask=column < C)


@kernel(do_not_specialize=["M", "tokens"])
def merge_kernel(
    x,  # (M, C)
    branch,  # (M, C)
    layer_scale,  # (C,)
    res_scale,  # (C,)
    mask,  # (B,)
    y,  # (M, C)
    statistics,  # (M, 2)
    M,
    tokens,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y, and mean and variance of its rows, if there is room for them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < C)[None, :]
    place = row.to(tl.int64)[:, None] * C + column[None, :]
    out = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
    out = out * vector(layer_scale, column, column < C, 1.0)[None, :]
    out *= vector(mask, row // tokens, row < M, 1.0)[:, None]
    shortcut = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    out += shortcut * vector(res_scale, column, column < C, 1.0)[None, :]
    out = out.to(y.dtype.element_ty)
    tl.store(y + place, out, mask=inside)
    if statistics is not None:
        # Of what was stored.
        _, mean, m2 = row_moments(out.to(tl.float32), inside)
        target = statistics + 2 * row.to(tl.int64)
        tl.store(target, mean, mask=row < M)
        tl.store(target + 1, m2 / C, mask=row < M)


@kernel(do_not_specialize=["M", "tokens"])
def merge_backward_kernel(
    g,  # (M, C)
    branch,  # (M, C)
    layer_scale,  # (C,)
    mask,  # (B,)
    dbranch,  # (M, C)
    sums,  # (programs, 1, C) over tokens of m g branch
    M,
    tokens,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dbranch, and the sums, if there is room for them."""
    column = tl.arange(0, COLUMNS)
    scale = vector(layer_scale, column, column < C, 1.0)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (column < C)[None, :]
        place = row.to(tl.int64)[:, None] * C + column[None, :]
        grad = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
        grad *= vector(mask, row // tokens, row < M, 1.0)[:, None]
        if sums is not None:
            total += grad * tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dbranch + place, (grad * scale).to(dbranch.dtype.element_ty), mask=inside)
    if sums is not None:
        tl.store(sums + tl.program_id(0).to(tl.int64) * C + column, tl.sum(total, 0), mask=column < C)


@kernel(do_not_specialize=["programs"])
def add_up_kernel(
    sums,  # (programs, kinds, C)
    first,  # (C,)
    second,
    third,
    programs,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over programs, of the kinds there is room for; a program per block of columns and kind."""
    kind, kinds = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        place = (row[:, None] * kinds + kind) * C + column[None, :]
        total += tl.load(sums + place, mask=(row < programs)[:, None] & (column < C)[None, :], other=0.0)
    result = tl.sum(total, 0)
    store_if_wanted(first, column, result, (column < C) & (kind == 0))
    store_if_wanted(second, column, result, (column < C) & (kind == 1))
    store_if_wanted(third, column, result, (column < C) & (kind == 2))


# ---------------------------------------------------------------------------------------------------------------------
# Launches. x and whatever is like it are (B, C, H, W) in channels_last memory, or (M, C).


def token_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) in channels_last memory as (M, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


@functools.cache
def row_tile(channels: int, entries: int = ENTRIES) -> dict[str, Any]:
    """Tile of a pass over whole rows, as arguments of a kernel."""
    columns = next_power_of_2(channels)
    return {"C": channels, "ROWS": max(entries // columns, 1), "COLUMNS": columns, "num_warps": 8, **FUSION}


def tile_with_sums(rows: int, channels: int) -> tuple[int, dict[str, Any]]:
    """How many programs take the rows, and their tile."""
    tile = row_tile(channels, ENTRIES_WITH_SUMS)
    return min(cdiv(rows, FEWEST_TILES * tile["ROWS"]), PROGRAMS), tile


def normalise(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """n(x), like x, in `dtype`; weight and bias (C,), or None for 1 and 0."""
    normed = torch.empty_like(x, dtype=dtype)
    channels = x.shape[1]
    rows, tile = x.numel() // channels, row_tile(channels)
    token_norm_kernel[(cdiv(rows, tile["ROWS"]),)](x, weight, bias, normed, rows, eps, **tile)
    return normed


def normalise_backward(
    e: torch.Tensor,
    x: torch.Tensor,
    g: torch.Tensor | None,
    weight: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    eps: float,
    *,
    with_sums: bool = True,
    with_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    dx, like x, and for `add_up` sums (programs, 2, C) of e v and of g x, or (programs, 3, C) with those of e.

    Args:
        e: dL/dn(x), g: dL/dy of y = res_scale x + ..., or None where there is no shortcut; each in any dtype.
        with_sums: else there are none (None).
    """
    dx, channels = torch.empty_like(x), x.shape[1]
    rows = x.numel() // channels
    programs, tile = tile_with_sums(rows, channels)
    sums = float32(x, programs, 3 if with_bias else 2, channels) if with_sums else None
    token_norm_backward_kernel[(programs,)](
        e, x, g, weight, res_scale, dx, sums, rows, eps, BIAS=with_sums and with_bias, **tile
    )
    return dx, sums


def add_up(sums: torch.Tensor, parameters: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Sums (programs, kinds, C) over programs: of each kind in the dtype of its parameter (C,), or None for None.
    There may be more parameters than kinds, and at most three."""
    programs, kinds, channels = sums.shape
    grads = [None if parameter is None else torch.empty_like(parameter) for parameter in parameters]
    add_up_kernel[(cdiv(channels, SUM_COLUMNS), kinds)](
        sums, *grads, *[None] * (3 - len(grads)), programs, C=channels, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, **FUSION
    )
    return grads


def add_to_shortcut(
    x: torch.Tensor,
    branch: torch.Tensor,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    dtype: torch.dtype,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y (B, C, H, W) in `dtype` and, if wanted, mean and biased variance of its tokens (M, 2); scales (C,), mask
    (B,)."""
    batch, channels, height, width = x.shape
    rows, tile = batch * height * width, row_tile(channels)
    y, statistics = empty_nhwc(x, dtype), float32(x, rows, 2) if with_statistics else None
    merge_kernel[(cdiv(rows, tile["ROWS"]),)](
        x, branch, layer_scale, res_scale, mask, y, statistics, rows, height * width, **tile
    )
    return y, statistics


# ---------------------------------------------------------------------------------------------------------------------
# Functions of autograd


class _TokenNorm(torch.autograd.Function):
    """n(x), and x itself, the shortcut, to whose gradient res_scale is still to be applied."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        res_scale: torch.Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, res_scale, bias)
        with on(x):
            return normalise(x, weight, bias, eps, dtype), x

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, e: torch.Tensor | None, g: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if e is None and g is None:
            return (None,) * 6
        x, *parameters = ctx.saved_tensors
        weight, res_scale, _ = parameters
        need_x, need_weight, need_bias, need_res_scale, *_ = ctx.needs_input_grad
        needed = need_weight, need_res_scale and g is not None, need_bias
        e = torch.zeros_like(x) if e is None else e.contiguous(memory_format=torch.channels_last)
        g = None if g is None else g.contiguous(memory_format=torch.channels_last)
        grads = [None] * 3
        with on(x):
            dx, sums = normalise_backward(
                e, x, g, weight, res_scale, ctx.eps, with_sums=any(needed), with_bias=need_bias
            )
            if sums is not None:
                grads = add_up(sums, [each if need else None for each, need in zip(parameters, needed, strict=True)])
        dweight, dres_scale, dbias = grads
        return dx if need_x else None, dweight, dbias, dres_scale, None, None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        shortcut: torch.Tensor,
        branch: torch.Tensor,
        layer_scale: torch.Tensor | None,
        res_scale: torch.Tensor | None,
        mask: torch.Tensor | None,
        dtype: torch.dtype,
        with_statistics: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.dtype = branch.dtype
        ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, layer_scale, mask)
        with on(shortcut):
            y, statistics = add_to_shortcut(shortcut, branch, layer_scale, res_scale, mask, dtype, with_statistics)
        if statistics is not None:
            ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        branch, layer_scale, mask = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        dbranch = dlayer_scale = None
        if layer_scale is None and mask is None:
            dbranch = g.to(ctx.dtype)
        elif ctx.needs_input_grad[1] or branch is not None:
            batch, channels, height, width = g.shape
            rows = batch * height * width
            programs, tile = tile_with_sums(rows, channels)
            with on(g):
                dbranch = empty_nhwc(g, ctx.dtype)
                sums = None if branch is None else float32(g, programs, 1, channels)
                merge_backward_kernel[(programs,)](
                    g, branch, layer_scale, mask, dbranch, sums, rows, height * width, **tile
                )
                if sums is not None:
                    dlayer_scale = add_up(sums, (layer_scale,))[0]
        return g, dbranch, dlayer_scale, None, None, None, None


def token_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """
    LayerNorm over the channels of each token.

    Args:
        x: (B, C, H, W) in channels_last memory; so is the result.
        weight, bias: (C,), or None for 1 and 0.
        dtype: of the result; all is computed in float32. Gradients have the dtypes of what they are of.
    """
    return norm_and_shortcut(x, weight, bias, None, eps, dtype)[0]


def norm_and_shortcut(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_norm`, and x as the shortcut that only `merge` may read, with this very res_scale (C,), which gets its
    gradient here."""
    if torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (x, weight, bias, res_scale)
    ):
        return _TokenNorm.apply(x, weight, bias, res_scale, eps, dtype)
    with on(x):
        return normalise(x, weight, bias, eps, dtype), x


def merge(
    shortcut: torch.Tensor,
    branch: torch.Tensor,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    dtype: torch.dtype,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    y = res_scale * shortcut + layer_scale * mask * branch and, if wanted, the statistics of its tokens.

    Args:
        shortcut: (B, C, H, W) of `norm_and_shortcut`; branch is like it. Both are in channels_last memory.
        layer_scale, res_scale: (C,), or None for 1. The gradient of res_scale is made where the shortcut comes from.
        mask: (B,), or None for 1; gets no gradient.
        dtype: of y.

    Returns:
        y (B, C, H, W), and mean and biased variance (B H W, 2) over its channels, or None; these get no gradient.
    """
    if torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (shortcut, branch, layer_scale)
    ):
        res_scale = None if res_scale is None else res_scale.detach()
        return _Merge.apply(shortcut, branch, layer_scale, res_scale, mask, dtype, with_statistics)
    with on(shortcut):
        return add_to_shortcut(shortcut, branch, layer_scale, res_scale, mask, dtype, with_statistics)
