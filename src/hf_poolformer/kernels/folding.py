"""Weights as products take them: rounded, with the norm before and the scale behind them multiplied in."""

import torch
import triton.language as tl

from .launch import FUSION, INTERPRETED, cdiv, float32, kernel
from .parts import vector
from .statistics import COMBINE, combine_into, combine_rows, combine_sample


FOLD_ROWS, FOLD_COLUMNS = (16, 16) if INTERPRETED else (16, 128)


@kernel
def fold_kernel(
    weight1,  # (R, C)
    norm_weight,  # (C,)
    norm_bias,  # (C,)
    bias1,  # (R,)
    weight2,  # (C, R)
    layer_scale,  # (C,)
    folded1,  # (R, C)
    sums,  # (R,)
    offset,  # (R,)
    folded2,  # (C, R)
    partials,  # (3, groups, samples entries)
    statistics,  # (samples, 2)
    R,
    C,
    combining,
    groups,
    samples,
    entries,
    plane,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMBINE: tl.constexpr,
):
    """
    F = weight1 gamma and layer_scale weight2 in the precision of products; u = F 1, v = bias1 + weight1 beta.

    The first `combining` programs make statistics of partials, of which a sample has `entries` in every group.
    """
    program = tl.program_id(0) - combining
    blocks = tl.cdiv(R, ROWS)
    if program < 0:
        if partials is not None:
            if entries == 1:
                token = tl.program_id(0) * COMBINE + tl.arange(0, COMBINE)
                combine_rows(token, partials, statistics, groups, samples, plane)
            else:
                sample = tl.program_id(0).to(tl.int64)
                combine_sample(
                    sample, partials, statistics, groups, entries, samples * entries, entries, plane, COMBINE
                )
    elif program < blocks:
        row = program * ROWS + tl.arange(0, ROWS)
        total = tl.zeros((ROWS,), tl.float32)
        shift = vector(bias1, row, row < R, 0.0)
        for start in range(0, C, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = (row < R)[:, None] & (column < C)[None, :]
            place = row[:, None] * C + column[None, :]
            value = tl.load(weight1 + place, mask=inside, other=0.0).to(tl.float32)
            shift += tl.sum(value * vector(norm_bias, column, column < C, 0.0)[None, :], 1)
            scaled = (value * vector(norm_weight, column, column < C, 1.0)[None, :]).to(folded1.dtype.element_ty)
            tl.store(folded1 + place, scaled, mask=inside)
            total += tl.sum(tl.where(inside, scaled.to(tl.float32), 0.0), 1)
        if sums is not None:
            tl.store(sums + row, total, mask=row < R)
        if offset is not None:
            tl.store(offset + row, shift, mask=row < R)
    elif folded2 is not None:
        row = (program - blocks) * ROWS + tl.arange(0, ROWS)
        scale = vector(layer_scale, row, row < C, 1.0)[:, None]
        for start in range(0, R, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = (row < C)[:, None] & (column < R)[None, :]
            place = row[:, None] * R + column[None, :]
            value = tl.load(weight2 + place, mask=inside, other=0.0).to(tl.float32) * scale
            tl.store(folded2 + place, value.to(folded2.dtype.element_ty), mask=inside)


def fold(
    weight1: torch.Tensor,
    norm_weight: torch.Tensor | None,
    weight2: torch.Tensor,
    layer_scale: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    norm_bias: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    with_sums: bool = False,
    statistics: torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    W1 norm_weight (R, C) and layer_scale W2 (C, R) in `dtype`, then u and v (R,) float32 or None, in one launch.

    With partials it also fills the statistics, as `combine_into` does: neither waits for the other.
    """
    inner, channels = weight1.shape[:2]
    same1 = norm_weight is None and weight1.dtype == dtype and not with_sums
    same2 = layer_scale is None and weight2.dtype == dtype
    if same1 and same2:
        if partials is not None:
            combine_into(statistics, partials)
        return weight1, weight2, None, None
    folded1 = torch.empty(weight1.shape, dtype=dtype, device=weight1.device)
    folded2 = None if same2 else torch.empty(weight2.shape, dtype=dtype, device=weight2.device)
    sums, offset = (float32(weight1, inner), float32(weight1, inner)) if with_sums else (None, None)
    programs = cdiv(inner, FOLD_ROWS) + (0 if same2 else cdiv(channels, FOLD_ROWS))
    combining = groups = samples = entries = 0
    if partials is not None:
        groups, samples = partials.shape[1], statistics.shape[0]
        entries = partials.shape[2] // samples
        combining = cdiv(samples, COMBINE) if entries == 1 else samples
    fold_kernel[(combining + programs,)](
        weight1,
        norm_weight,
        norm_bias,
        bias1,
        weight2,
        layer_scale,
        folded1,
        sums,
        offset,
        folded2,
        partials,
        statistics,
        inner,
        channels,
        combining,
        groups,
        samples,
        entries,
        groups * samples * entries,
        ROWS=FOLD_ROWS,
        COLUMNS=FOLD_COLUMNS,
        COMBINE=COMBINE,
        **FUSION,
    )
    return folded1, weight2 if same2 else folded2, sums, offset
