"""Gradients of the MLP's parameters from the products over tokens: the formulas are those of channel_mlp.py."""

from collections.abc import Sequence

import torch
import triton.language as tl

from .launch import FUSION, INTERPRETED, cdiv, empty_like_each, float32, kernel, transposed_product
from .mlp_parts import Parameters
from .parts import scalar, store_if_wanted, vector


# Of weights: narrow where rows are summed, which makes more programs.
LONG, SHORT = (16, 16) if INTERPRETED else (128, 16)
# Of a sample's sums.
SAMPLE_ROWS = 16 if INTERPRETED else 1024


@kernel
def parameters_kernel(
    first,  # (R, width1 + 2 or more): dF if width1 = C, dv, and what its rounding left over
    second,  # (C, width2 + 2 or more): g^T (m act(z)) if width2 = R, sum m g, and what its rounding left over
    norm_weight,  # (C,)
    norm_bias,  # (C,)
    weight1,  # (R, C)
    weight2,  # (C, R)
    bias2,  # (C,)
    act_scale,  # (1,)
    act_bias,  # (1,)
    layer_scale,  # (C,)
    shortcut_sums,  # (splits, C): parts of the gradient of res_scale
    row_sums,  # (2, column_parts, M) of q and q x^
    dnorm_weight,  # (C,)
    dnorm_bias,  # (C,)
    dweight1,  # (R, C)
    dbias1,  # (R,)
    dweight2,  # (C, R)
    dbias2,  # (C,)
    act_sums,  # (blocks, 2): parts of the gradients of act_scale and act_bias
    dlayer_scale,  # (C,)
    dres_scale,  # (C,)
    sample_sums,  # (2, S) of q and q x^
    R,
    C,
    M,
    span,
    stride1,
    stride2,
    width1,
    width2,
    splits,
    column_parts,
    blocks1,
    blocks2,
    LONG: tl.constexpr,
    SHORT: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """
    Gradients of parameters from the products over tokens, those there is room for, and sums over samples.

    The first blocks1 programs take columns of weight1, then blocks2 take rows of weight2, the others a sample each.
    """
    if tl.program_id(0) < blocks1:
        column = tl.program_id(0) * SHORT + tl.arange(0, SHORT)
        column_inside = column < C
        gamma = vector(norm_weight, column, column_inside, 1.0)
        beta = vector(norm_bias, column, column_inside, 0.0)
        for_gamma = tl.zeros((SHORT,), tl.float32)
        for_beta = tl.zeros((SHORT,), tl.float32)
        for start in range(0, R, LONG):
            row = start + tl.arange(0, LONG)
            inside = (row < R)[:, None] & column_inside[None, :]
            dv = tl.load(first + row * stride1 + width1, mask=row < R, other=0.0)
            store_if_wanted(dbias1, row, dv, (row < R) & (tl.program_id(0) == 0))
            if dnorm_weight is not None or dnorm_bias is not None:
                weight = tl.load(weight1 + row[:, None] * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
                for_beta += tl.sum(weight * dv[:, None], 0)
            if dnorm_weight is not None or dweight1 is not None:
                grad = tl.load(first + row[:, None] * stride1 + column[None, :], mask=inside, other=0.0)
                if dnorm_weight is not None:
                    for_gamma += tl.sum(weight * grad, 0)
                grad = grad * gamma[None, :] + dv[:, None] * beta[None, :]
                store_if_wanted(dweight1, row[:, None] * C + column[None, :], grad, inside)
        store_if_wanted(dnorm_weight, column, for_gamma, column_inside)
        store_if_wanted(dnorm_bias, column, for_beta, column_inside)
    elif tl.program_id(0) < blocks1 + blocks2:
        block = tl.program_id(0) - blocks1
        row = block * SHORT + tl.arange(0, SHORT)
        row_inside = row < C
        if dres_scale is not None:
            for_res_scale = tl.zeros((SHORT,), tl.float32)
            for start in range(0, splits, LONG):
                split = start + tl.arange(0, LONG)
                inside = (split < splits)[:, None] & row_inside[None, :]
                part = tl.load(shortcut_sums + split[:, None] * C + row[None, :], mask=inside, other=0.0)
                for_res_scale += tl.sum(part, 0)
            tl.store(dres_scale + row, for_res_scale.to(dres_scale.dtype.element_ty), mask=row_inside)
        scale = vector(layer_scale, row, row_inside, 1.0)
        if dbias2 is not None or dweight2 is not None or act_sums is not None or dlayer_scale is not None:
            tail = second + row * stride2 + width2
            total = tl.load(tail, mask=row_inside, other=0.0) + tl.load(tail + 1, mask=row_inside, other=0.0)
            store_if_wanted(dbias2, row, scale * total, row_inside)
        if dweight2 is not None or act_sums is not None or dlayer_scale is not None:
            for_layer_scale = vector(bias2, row, row_inside, 0.0) * total
            for_act_scale = tl.zeros((SHORT,), tl.float32)
            for_act_bias = tl.zeros((SHORT,), tl.float32)
            for start in range(0, R, LONG):
                column = start + tl.arange(0, LONG)
                inside = row_inside[:, None] & (column < R)[None, :]
                place = row[:, None] * R + column[None, :]
                plain = tl.load(second + row[:, None] * stride2 + column[None, :], mask=inside, other=0.0)
                grad = plain * scalar(act_scale, 1.0) + total[:, None] * scalar(act_bias, 0.0)
                if dlayer_scale is not None or act_sums is not None:
                    weight = tl.load(weight2 + place, mask=inside, other=0.0).to(tl.float32)
                    for_layer_scale += tl.sum(weight * grad, 1)
                    for_act_scale += tl.sum(weight * plain, 1)
                    for_act_bias += tl.sum(weight, 1)
                store_if_wanted(dweight2, place, grad * scale[:, None], inside)
            store_if_wanted(dlayer_scale, row, for_layer_scale, row_inside)
            if act_sums is not None:
                tl.store(act_sums + 2 * block, tl.sum(tl.where(row_inside, scale * for_act_scale, 0.0), 0))
                tl.store(act_sums + 2 * block + 1, tl.sum(tl.where(row_inside, scale * total * for_act_bias, 0.0), 0))
    elif row_sums is not None:
        sample = tl.program_id(0) - blocks1 - blocks2
        lanes = tl.arange(0, SAMPLE)
        plain_sum = tl.zeros((SAMPLE,), tl.float32)
        hat_sum = tl.zeros((SAMPLE,), tl.float32)
        entries = row_sums + sample.to(tl.int64) * span
        plane = column_parts * tl.cast(M, tl.int64)
        for _ in range(0, column_parts):
            for start in range(0, span, SAMPLE):
                inside = start + lanes < span
                plain_sum += tl.load(entries + start + lanes, mask=inside, other=0.0)
                hat_sum += tl.load(entries + plane + start + lanes, mask=inside, other=0.0)
            entries += M
        tl.store(sample_sums + sample, tl.sum(plain_sum, 0))
        tl.store(sample_sums + M // span + sample, tl.sum(hat_sum, 0))


def parameter_gradients(
    dz: torch.Tensor,
    normed: torch.Tensor,
    g: torch.Tensor,
    hidden: torch.Tensor,
    parameters: Parameters,
    wanted: Sequence[bool],
    shortcut_sums: torch.Tensor | None,
    row_sums: torch.Tensor | None,
    groups: int,
) -> tuple[Parameters, torch.Tensor | None, torch.Tensor | None]:
    """
    Gradients of the parameters, None for those not `wanted`; g (M, C) in the precision of products.

    Those of the activation are only allocated here, and are sums of the last of the results (any, 2). The other
    result: of row_sums (2, any, M), if given, the sums over the rows of each of `groups` samples, (2, groups).
    """
    grads = Parameters(*empty_like_each(parameters, wanted))

    def is_any(*found):
        return any(grad is not None for grad in found)

    inner, channels = parameters.weight1.shape[:2]
    rows = dz.shape[0]
    blocks = cdiv(channels, SHORT)
    learns = is_any(grads.act_scale, grads.act_bias)
    # The whole products, or of frozen weights the last columns alone.
    width1 = channels if is_any(grads.norm_weight, grads.weight1) else 0
    width2 = inner if learns or is_any(grads.weight2, grads.layer_scale) else 0
    first = second = None
    if width1 or is_any(grads.norm_bias, grads.bias1):
        first = transposed_product(dz, normed if width1 else normed[:, channels:])
    if width2 or is_any(grads.bias2):
        second = transposed_product(g, hidden if width2 else hidden[:, inner:])
    act_sums = float32(g, blocks, 2) if learns else None
    sample_sums = None if row_sums is None else float32(g, 2, groups)
    blocks1 = 0 if first is None else blocks
    blocks2 = 0 if second is None and grads.res_scale is None else blocks
    programs = blocks1 + blocks2 + (0 if row_sums is None else groups)
    if programs == 0:
        return grads, sample_sums, act_sums
    parameters_kernel[(programs,)](
        hidden if first is None else first,  # a pointer that no program follows
        hidden if second is None else second,
        parameters.norm_weight,
        parameters.norm_bias,
        parameters.weight1,
        parameters.weight2,
        parameters.bias2,
        parameters.act_scale,
        parameters.act_bias,
        parameters.layer_scale,
        shortcut_sums,
        row_sums,
        *grads[: Parameters._fields.index("act_scale")],
        act_sums,
        grads.layer_scale,
        grads.res_scale,
        sample_sums,
        inner,
        channels,
        rows,
        rows // groups,
        0 if first is None else first.shape[1],
        0 if second is None else second.shape[1],
        width1,
        width2,
        0 if shortcut_sums is None else shortcut_sums.shape[0],
        0 if row_sums is None else row_sums.shape[1],
        blocks1,
        blocks2,
        LONG=LONG,
        SHORT=SHORT,
        SAMPLE=SAMPLE_ROWS,
        num_warps=8,
        **FUSION,
    )
    return grads, sample_sums, act_sums
