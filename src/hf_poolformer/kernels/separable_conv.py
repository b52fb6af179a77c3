"""Branch with a separable convolution: y = res_scale * x + mask * layer_scale * (W2 D a(W1 n(x))).

n is LayerNorm over the channels of each token, without bias; D a(z) is the depthwise convolution of depthwise.py, of
the activation a(z) = s relu(z)^2 + b. C channels outside, R = 2 C inside; rows are tokens, M = B H W of them.

Forward. Up to 128 channels a program holds whole rows: it normalises them and multiplies them by W1. Above, the
normalised rows are written down for cuBLAS, which is faster by as much. The last product adds the shortcut as it
writes.

Backward. Besides x only z is kept, 2 elements per activation: n(x), a(z) and D a(z) are computed again. To keep D a(z)
as well would double that, and save one of the four times that a step computes a convolution. With g = dL/dy, m the
mask, r = rstd and v = (x - mu) r of the token:

    dd = g (layer_scale W2)      G = g^T (m D a(z))      dW2 = layer_scale G      dlayer_scale = sum_k W2 G
    da = m D^T dd                dz = 2 s relu(z) da     dD = sum m dd a(z)       ds = sum da relu(z)^2, db = sum da
    e = dz W1, q = gamma e       dW1 = dz^T n(x)         dgamma = sum e v         dres_scale = sum g x
    dx = res_scale g + r (q - mean_c q - v mean_c(q v))

m is a number per sample, so the kernels of D apply it, and m g need not be written down. The products are cuBLAS's:
none has an epilogue that would save a pass.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .activations import store_activation_gradients
from .depthwise import Strips, convolve, convolve_backward, convolve_weight_backward, window_first
from .flops import count_products
from .folding import fold
from .launch import (
    FUSION,
    INTERPRETED,
    Tiles,
    by_library,
    cast,
    cdiv,
    empty_like_each,
    empty_nhwc,
    kernel,
    next_power_of_2,
    on,
    transposed_product,
)
from .parts import scalar, store_if_wanted, vector
from .products import contract, options
from .registration import differentiable
from .statistics import standardised
from .token_norm import normalise, normalise_backward, token_rows


# Rows of at most so many channels are normalised in the kernel that multiplies them.
WHOLE = 16 if INTERPRETED else 128
# Of what makes gradients of sums: entries of a row of weights, and a tile of parts of sums.
FINISH, FINISH_ROWS, FINISH_COLUMNS = (64, 16, 16) if INTERPRETED else (1024, 64, 32)


class Parameters(NamedTuple):
    """Of the branch, or gradients of them. The weights may have further dimensions of size 1."""

    norm_weight: torch.Tensor | None  # (C,)
    weight1: torch.Tensor  # (R, C)
    act_scale: torch.Tensor  # (1,)
    act_bias: torch.Tensor  # (1,)
    depthwise_weight: torch.Tensor  # (R, 1, window, window)
    weight2: torch.Tensor  # (C, R)
    layer_scale: torch.Tensor | None  # (C,)
    res_scale: torch.Tensor | None  # (C,)


@kernel
def norm_product_kernel(
    weight,
    x,
    norm_weight,
    z,
    M,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """z (M, N) = n(x) weight^T, x (M, K), weight (N, K), DEPTH >= K."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    inside = (row < M)[:, None] & (depth < K)[None, :]
    row = row.to(tl.int64)
    value = tl.load(x + row[:, None] * K + depth[None, :], mask=inside, other=0.0).to(tl.float32)
    value, _ = standardised(value, inside, eps, K)
    value *= vector(norm_weight, depth, depth < K, 1.0)[None, :]
    left = value.to(z.dtype.element_ty).to(OPERAND)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = (depth < K)[:, None] & (column < N)[None, :]
        right = tl.load(weight + column[None, :] * K + depth[:, None], mask=there, other=0.0)
        out = tl.dot(left, right.to(OPERAND), input_precision=PRECISION)
        there = (row < M)[:, None] & (column < N)[None, :]
        tl.store(z + row[:, None] * N + column[None, :], out.to(z.dtype.element_ty), mask=there)


@triton.jit
def column_sum(parts, count, stride, column, inside, ROWS: tl.constexpr):
    """Sums over `count` rows of `parts`, which lie `stride` apart, for each column."""
    total = tl.zeros((column.shape[0],), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < count)[:, None] & inside[None, :]
        total += tl.sum(
            tl.load(parts + row.to(tl.int64)[:, None] * stride + column[None, :], mask=there, other=0.0), 0
        )
    return total


@kernel
def finish_kernel(
    first,  # (R, C): dW1
    second,  # (C, R): G
    tap_parts,  # (tap_count, taps, R)
    act_parts,  # (act_count, 2)
    norm_parts,  # (norm_count, 2, C)
    weight2,  # (C, R)
    layer_scale,  # (C,)
    dnorm_weight,  # (C,)
    dweight1,  # (R, C)
    dact_scale,  # (1,)
    dact_bias,  # (1,)
    ddepthwise,  # (R, taps)
    dweight2,  # (C, R)
    dlayer_scale,  # (C,)
    dres_scale,  # (C,)
    C,
    R,
    taps,
    tap_count,
    act_count,
    norm_count,
    end1,
    end2,
    end3,
    end4,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """
    Gradients of parameters, those there is room for, from products and from parts of sums.

    Programs up to end1 take entries of weight1, up to end2 a row of weight2, up to end3 some channels of a tap, up to
    end4 some channels of the norm, and the last the activation.
    """
    program = tl.program_id(0)
    entry = tl.arange(0, ENTRIES)
    column = tl.arange(0, COLUMNS)
    if program < end1:
        if first is not None:
            place = program * ENTRIES + entry
            value = tl.load(first + place, mask=place < R * C, other=0.0)
            store_if_wanted(dweight1, place, value, place < R * C)
    elif program < end2:
        if second is not None:
            row = program - end1
            scale = scalar(None if layer_scale is None else layer_scale + row, 1.0)
            for_scale = tl.zeros((ENTRIES,), tl.float32)
            for start in range(0, R, ENTRIES):
                inside = start + entry < R
                place = row * R + start + entry
                value = tl.load(second + place, mask=inside, other=0.0)
                for_scale += value * tl.load(weight2 + place, mask=inside, other=0.0).to(tl.float32)
                store_if_wanted(dweight2, place, value * scale, inside)
            store_if_wanted(dlayer_scale, row, tl.sum(for_scale, 0), True)
    elif program < end3:
        if tap_parts is not None:
            tap = (program - end2) % taps
            column = (program - end2) // taps * COLUMNS + column
            total = column_sum(tap_parts + tap * R, tap_count, taps * R, column, column < R, ROWS)
            store_if_wanted(ddepthwise, column * taps + tap, total, column < R)
    elif program < end4:
        column = (program - end3) * COLUMNS + column
        if dnorm_weight is not None:
            total = column_sum(norm_parts, norm_count, 2 * C, column, column < C, ROWS)
            store_if_wanted(dnorm_weight, column, total, column < C)
        if dres_scale is not None:
            total = column_sum(norm_parts + C, norm_count, 2 * C, column, column < C, ROWS)
            store_if_wanted(dres_scale, column, total, column < C)
    else:
        store_activation_gradients(act_parts, act_count, dact_scale, dact_bias, ENTRIES)


def expand(
    rows: torch.Tensor, norm_weight: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """z (M, R) in `dtype`, which is that of the weight."""
    (count, channels), inner = rows.shape, weight.shape[0]
    if channels > WHOLE:
        normed = normalise(rows, norm_weight, None, eps, dtype)
        return by_library(torch.mm, normed, weight.view(inner, channels).t())
    z = torch.empty((count, inner), dtype=dtype, device=rows.device)
    tiles = expand_tiles(dtype)
    norm_product_kernel[(cdiv(count, tiles.rows),)](
        weight,
        rows,
        norm_weight,
        z,
        count,
        eps,
        N=inner,
        K=channels,
        **options(tiles._replace(depth=max(next_power_of_2(channels), 16)), dtype),
    )
    return z


def expand_tiles(dtype: torch.dtype) -> Tiles:
    if INTERPRETED:
        return Tiles(16, 16, 0, 1, 1)
    return Tiles(32, 64, 0, 4, 2) if dtype == torch.float32 else Tiles(128, 64, 0, 8, 2)


def contract_tiles(dtype: torch.dtype, channels: int) -> Tiles:
    if INTERPRETED:
        return Tiles(16, 16, 16, 1, 1)
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 3)
    return Tiles(128, 64 if channels <= 64 else 128, 64, 8, 3)


def separate(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    weight1: torch.Tensor,
    act_scale: torch.Tensor,
    act_bias: torch.Tensor,
    depthwise_weight: torch.Tensor,
    weight2: torch.Tensor,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    y (B, C, H, W) and for backward (`needs_gradient`) z (M, R), else None.

    x (B, C, H, W) channels_last, weight1 (R, C) and weight2 (C, R), which may have further dimensions of size 1,
    depthwise_weight (R, 1, window, window) of an odd window, act_scale and act_bias (1,), mask (B,), all other vectors
    (C,). `dtype` is that of the products. Without `needs_gradient` there is no backward.
    """
    parameters = Parameters(
        norm_weight, weight1, act_scale, act_bias, depthwise_weight, weight2, layer_scale, res_scale
    )
    y, z, _ = separate_partially(x, parameters, mask, eps, dtype, False)
    return y, z if needs_gradient else None


def separate_partially(
    x: torch.Tensor,
    parameters: Parameters,
    mask: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y and z of `separate` and, if wanted, what the statistics of y's tokens are to be combined of, (3, any, M)."""
    batch, channels, height, width = x.shape
    norm_weight, weight1, act_scale, act_bias, depthwise_weight, weight2, layer_scale, res_scale = parameters
    with on(x):
        weight1, weight2, *_ = fold(weight1, None, weight2, None, dtype)
        z = expand(token_rows(x), norm_weight, weight1, eps, dtype)
        strips = Strips(batch, height, width, z.shape[1], depthwise_weight.shape[-1])
        mixed = convolve(strips, z, window_first(depthwise_weight), act_scale, act_bias, None)
        tiles = contract_tiles(dtype, channels)
        y, partials = contract(mixed, weight2, None, x, layer_scale, res_scale, mask, tiles, with_statistics)
        return y, z, partials


def separate_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    norm_weight: torch.Tensor | None,
    weight1: torch.Tensor,
    act_scale: torch.Tensor,
    act_bias: torch.Tensor,
    depthwise_weight: torch.Tensor,
    weight2: torch.Tensor,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    eps: float,
    wanted: list[bool],
) -> list[torch.Tensor | None]:
    """The gradients of x and of the eight parameters, norm_weight to res_scale; None for those not `wanted`, eight
    flags."""
    batch, channels, height, width = g.shape
    inner, dtype = weight1.shape[0], z.dtype
    _, need1, _, _, need_depthwise, need2, need_scale, _ = wanted
    parameters = norm_weight, weight1, act_scale, act_bias, depthwise_weight, weight2, layer_scale, res_scale
    with on(g):
        strips = Strips(batch, height, width, inner, depthwise_weight.shape[-1])
        taps, activation = window_first(depthwise_weight), (act_scale, act_bias, mask)
        rows, grad = token_rows(x), cast(token_rows(g), dtype)
        operand1, operand2, *_ = fold(weight1, None, weight2, layer_scale, dtype)
        dmixed = by_library(torch.mm, grad, operand2.view(channels, inner))
        parts = convolve_weight_backward(strips, dmixed, z, *activation) if need_depthwise else None
        dz, act_parts = convolve_backward(strips, dmixed, z, taps, *activation)
        first = second = None
        if need1:
            first = transposed_product(dz, normalise(rows, norm_weight, None, eps, dtype))
        if need2 or need_scale:
            second = transposed_product(grad, convolve(strips, z, taps, *activation))
        branch = by_library(torch.mm, dz, operand1.view(inner, channels))
        dx, sums = normalise_backward(branch, x, g, norm_weight, res_scale, eps)
        grads = empty_like_each(parameters, wanted)
        finish(first, second, parts, act_parts, sums, weight2, layer_scale, grads)
        return [dx, *grads]


def finish(
    first: torch.Tensor | None,
    second: torch.Tensor | None,
    tap_parts: torch.Tensor | None,
    act_parts: torch.Tensor,
    norm_parts: torch.Tensor,
    weight2: torch.Tensor,
    layer_scale: torch.Tensor | None,
    grads: list[torch.Tensor | None],
) -> None:
    """Fills the gradients of the eight parameters, from dW1 (R, C) and G (C, R), and from the sums as kernels left
    them."""
    if all(grad is None for grad in grads):
        return
    channels, inner = weight2.shape[:2]
    blocks1 = 0 if first is None else cdiv(inner * channels, FINISH)
    blocks2 = 0 if second is None else channels
    taps = 0 if tap_parts is None else tap_parts.shape[1]
    blocks3 = taps * cdiv(inner, FINISH_COLUMNS)
    blocks4 = cdiv(channels, FINISH_COLUMNS)
    finish_kernel[(blocks1 + blocks2 + blocks3 + blocks4 + 1,)](
        first,
        second,
        tap_parts,
        act_parts,
        norm_parts,
        weight2,
        layer_scale,
        *grads,
        channels,
        inner,
        taps,
        0 if tap_parts is None else tap_parts.shape[0],
        act_parts.shape[0],
        norm_parts.shape[0],
        blocks1,
        blocks1 + blocks2,
        blocks1 + blocks2 + blocks3,
        blocks1 + blocks2 + blocks3 + blocks4,
        ENTRIES=FINISH,
        ROWS=FINISH_ROWS,
        COLUMNS=FINISH_COLUMNS,
        **FUSION,
    )


def _fake(x, norm_weight, weight1, *rest):
    *_, dtype, needs_gradient = rest
    batch, _, height, width = x.shape
    z = x.new_empty((batch * height * width, weight1.shape[0]), dtype=dtype) if needs_gradient else None
    return empty_nhwc(x), z


def _keep(inputs, results):
    x, *tensors, eps, _, _ = inputs
    _, z = results
    return (x, z, *tensors), (eps,)


separable_conv = differentiable(
    "separable_conv",
    separate,
    separate_backward,
    fake=_fake,
    keep=_keep,
    parameters=Parameters._fields,
    flag="needs_gradient",
)
count_products("separable_conv", 2, x=0, weight1=2, convolutions=1, depthwise=5)
count_products("separable_conv_backward", 4, x=0, weight1=4, convolutions=3, depthwise=7)
