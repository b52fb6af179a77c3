# ruff: noqa: RUF005 Triton knows no unpacking into tuples.
"""Branch with a separable convolution: y = res_scale * x + mask * layer_scale * (W2 D a(W1 n(x))).

n is LayerNorm over the channels of each token, without bias; a(z) = s relu(z)^2 + b with learned scalars; D is a
depthwise convolution with an odd window and stride 1. Its padding is zeros in place of a(z), so b cannot be moved
behind it. C channels outside, R = 2 C inside; rows are tokens, M = B H W of them.

Forward. Up to 128 channels a program holds whole rows: it normalises them and multiplies them by W1. Above, the
normalised rows are written down for cuBLAS, which is faster by as much. D computes a(z) as it reads z, so that a(z) is
never stored. The last product adds the shortcut as it writes.

D is bound by arithmetic on a GPU: 49 multiply-adds for an entry of 4 bytes, read and written. So there should be
little else. A thread has one channel of a strip of 7 or 8 neighbouring tokens, and rows stream past it: it reads the
13 entries around its strip once per row, and adds them to the sums of the 7 output rows that see this row. Its weights
stay in registers. Compiled for sm_90 that is 343 multiply-adds in about 580 instructions.

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

import torch
import triton
import triton.language as tl

from .channel_mlp import contract_kernel, fold, scalar, store_activation_gradients, vector
from .flops import count_products
from .launch import (
    FUSION,
    INTERPRETED,
    Tiles,
    by_library,
    cdiv,
    empty_like_each,
    empty_nhwc,
    float32,
    kernel,
    next_power_of_2,
    on,
    operand,
    precision,
    transposed_product,
)
from .registration import differentiable
from .statistics import standardised
from .token_norm import normalise, normalise_backward, token_rows


# Rows of at most so many channels are normalised in the kernel that multiplies them.
WHOLE = 16 if INTERPRETED else 128
# Strips of tokens and channels of a program of D: one channel of one strip for each thread of 4 warps, and 64 bytes of
# bfloat16 side by side.
STRIPS, CHANNELS = (4, 16) if INTERPRETED else (4, 32)
# Tokens of a strip: more would not fit into the registers beside 49 weights, fewer load more than they compute.
STRIP = range(2, 4) if INTERPRETED else range(4, 9)
# So that three programs fit a multiprocessor of 65536 registers. A strip of 8 would take 180 to 200 of them, and does
# with as many as one of 7 needs; nothing spills.
REGISTERS = {} if torch.version.hip else {"maxnreg": 168}
# Programs wanted, several per multiprocessor; a constant, so that sums do not depend on the device.
PROGRAMS = 4 if INTERPRETED else 1056
# Of what makes gradients of sums: entries of a row of weights, and a tile of parts of sums.
FINISH, FINISH_ROWS, FINISH_COLUMNS = (64, 16, 16) if INTERPRETED else (1024, 64, 32)


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
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """COUNT tensors."""
    made = ()
    for _ in tl.static_range(COUNT):
        made = made + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return made


@triton.jit
def positive(z):
    """relu(z) in one instruction; as torch's, it keeps NaN."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def strips_at(
    group, channels, count, strips, width, height, C: tl.constexpr, LENGTH: tl.constexpr, STRIPS: tl.constexpr
):
    """
    Of the strips of a group: the offset of their first token in row 0, (STRIPS, CHANNELS), the first column, which of
    the strips there are, and their samples.
    """
    strip = group * STRIPS + tl.arange(0, STRIPS)
    sample = strip // strips
    left = (strip % strips) * LENGTH
    start = sample.to(tl.int64) * height * width * C + left * C
    return start[:, None] + channels[None, :], left, strip < count, sample


@triton.jit
def present(column, width, there, channels, C: tl.constexpr, CHANNELS: tl.constexpr):
    """Which entries of a column of tokens, one in each strip, exist: (STRIPS, CHANNELS)."""
    inside = (there & (column >= 0) & (column < width))[:, None]
    if C % CHANNELS != 0:
        inside = inside & (channels < C)[None, :]
    return inside


@triton.jit
def activated(z, inside, act_scale, act_bias):
    """a(z), and zero outside of the image."""
    p = positive(z)
    return tl.where(inside, act_scale * p * p + act_bias, 0.0)


@triton.jit
def store_row(
    values,
    row,
    keep,
    out,
    z,
    start,
    left,
    there,
    channels,
    act_scale,
    factor,
    scale_sum,
    bias_sum,
    width,
    C: tl.constexpr,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """One row of the strips. BACKWARD has da: it writes dz, and adds to the sums of da relu(z)^2 and of da."""
    offsets = start + row * width * C
    for k in tl.static_range(LENGTH):
        inside = present(left + k, width, there, channels, C, CHANNELS) & keep
        value = values[k] * factor[:, None]
        if BACKWARD:
            p = positive(tl.load(z + offsets + k * C, mask=inside, other=0.0).to(tl.float32))
            scale_sum += value * p * p
            bias_sum += tl.where(inside, value, 0.0)
            value *= 2.0 * act_scale * p
        tl.store(out + offsets + k * C, value.to(out.dtype.element_ty), mask=inside)
    return scale_sum, bias_sum


@kernel(do_not_specialize=["count", "strips", "height", "width", "band"])
def depthwise_kernel(
    source,
    z,
    weight,
    act_scale,
    act_bias,
    mask,
    out,
    sums,
    count,
    strips,
    height,
    width,
    band,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    BACKWARD: tl.constexpr,
    LENGTH: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """
    out = m D a(z), of source = z; with BACKWARD dz, of source = dd, and sums (programs, 2) of da relu(z)^2 and of da.

    weight (WINDOW^2, C). `count` strips in all, `strips` of a row, each LENGTH tokens long; a program has a band of
    rows.
    """
    REACH: tl.constexpr = WINDOW // 2
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start, left, there, sample = strips_at(tl.program_id(0), channels, count, strips, width, height, C, LENGTH, STRIPS)
    factor = vector(mask, sample, there, 1.0)
    scale, bias = scalar(act_scale, 1.0), scalar(act_bias, 0.0)
    taps = ()
    for tap in tl.static_range(WINDOW * WINDOW):
        # The adjoint of a correlation is the correlation with the window turned by 180 degrees.
        index = WINDOW * WINDOW - 1 - tap if BACKWARD else tap
        taps = taps + (vector(weight + index * C, channels, channels < C, 0.0)[None, :],)
    # Of the output rows that the current row reaches, the first first.
    rows = zeros(WINDOW * LENGTH, STRIPS, CHANNELS)
    scale_sum = tl.zeros((STRIPS, CHANNELS), tl.float32)
    bias_sum = tl.zeros((STRIPS, CHANNELS), tl.float32)

    top = tl.program_id(2) * band
    bottom = tl.minimum(top + band, height)
    last = tl.minimum(bottom + REACH, height)
    for row in range(tl.maximum(top - REACH, 0), last):
        offsets = start + row * width * C
        values = ()
        for j in tl.static_range(LENGTH + 2 * REACH):
            inside = present(left + (j - REACH), width, there, channels, C, CHANNELS)
            value = tl.load(source + offsets + (j - REACH) * C, mask=inside, other=0.0).to(tl.float32)
            if not BACKWARD:
                value = activated(value, inside, scale, bias)
            values = values + (value,)
        updated = ()
        for i in tl.static_range(WINDOW):
            for k in tl.static_range(LENGTH):
                total = rows[i * LENGTH + k]
                for j in tl.static_range(WINDOW):
                    total += values[k + j] * taps[(WINDOW - 1 - i) * WINDOW + j]
                updated = updated + (total,)
        scale_sum, bias_sum = store_row(
            updated,
            row - REACH,
            row - REACH >= top,
            out,
            z,
            start,
            left,
            there,
            channels,
            scale,
            factor,
            scale_sum,
            bias_sum,
            width,
            C,
            LENGTH,
            CHANNELS,
            BACKWARD,
        )
        rows = updated[LENGTH:] + zeros(LENGTH, STRIPS, CHANNELS)
    # Below the image there is nothing to wait for.
    for i in tl.static_range(REACH):
        row = last - REACH + i
        scale_sum, bias_sum = store_row(
            rows[i * LENGTH :],
            row,
            (row >= top) & (row < bottom),
            out,
            z,
            start,
            left,
            there,
            channels,
            scale,
            factor,
            scale_sum,
            bias_sum,
            width,
            C,
            LENGTH,
            CHANNELS,
            BACKWARD,
        )
    if BACKWARD:
        program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
        tl.store(sums + 2 * program, tl.sum(tl.sum(scale_sum, 1), 0))
        tl.store(sums + 2 * program + 1, tl.sum(tl.sum(bias_sum, 1), 0))


@triton.jit
def gradient_row(
    g,
    row,
    keep,
    start,
    left,
    there,
    channels,
    factor,
    width,
    C: tl.constexpr,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """m dd of one row of the strips, LENGTH tensors; zeros where not `keep`."""
    values = ()
    for k in tl.static_range(LENGTH):
        inside = present(left + k, width, there, channels, C, CHANNELS) & keep
        value = tl.load(g + start + (row * width + k) * C, mask=inside, other=0.0).to(tl.float32)
        values = values + (value * factor[:, None],)
    return values


@kernel(do_not_specialize=["count", "strips", "height", "width", "band", "bands"])
def depthwise_weight_kernel(
    z,
    g,
    act_scale,
    act_bias,
    mask,
    sums,
    count,
    strips,
    height,
    width,
    band,
    bands,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    LENGTH: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """sums (programs, WINDOW^2, C) over tokens of m dd a(z), of g = dd."""
    REACH: tl.constexpr = WINDOW // 2
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    scale, bias = scalar(act_scale, 1.0), scalar(act_bias, 0.0)
    totals = zeros(WINDOW * WINDOW, STRIPS, CHANNELS)
    for piece in range(tl.program_id(0), tl.cdiv(count, STRIPS) * bands, tl.num_programs(0)):
        start, left, there, sample = strips_at(
            piece // bands, channels, count, strips, width, height, C, LENGTH, STRIPS
        )
        factor = vector(mask, sample, there, 1.0)
        top = (piece % bands) * band
        bottom = tl.minimum(top + band, height)
        first = tl.maximum(top - REACH, 0)
        # Of the rows of dd that the current row reaches, all but the last.
        held = ()
        for i in tl.static_range(2 * REACH):
            row = first - REACH + i
            keep = (row >= top) & (row < bottom)
            held = held + gradient_row(g, row, keep, start, left, there, channels, factor, width, C, LENGTH, CHANNELS)
        for row in range(first, tl.minimum(bottom + REACH, height)):
            keep = (row + REACH >= top) & (row + REACH < bottom)
            held = held + gradient_row(
                g, row + REACH, keep, start, left, there, channels, factor, width, C, LENGTH, CHANNELS
            )
            values = ()
            for j in tl.static_range(LENGTH + 2 * REACH):
                inside = present(left + (j - REACH), width, there, channels, C, CHANNELS)
                value = tl.load(z + start + (row * width + (j - REACH)) * C, mask=inside, other=0.0).to(tl.float32)
                values = values + (activated(value, inside, scale, bias),)
            updated = ()
            for i in tl.static_range(WINDOW):
                for j in tl.static_range(WINDOW):
                    total = totals[i * WINDOW + j]
                    for k in tl.static_range(LENGTH):
                        total += values[k + j] * held[(WINDOW - 1 - i) * LENGTH + k]
                    updated = updated + (total,)
            totals = updated
            held = held[LENGTH:]
    target = sums + tl.program_id(0).to(tl.int64) * WINDOW * WINDOW * C + channels
    for tap in tl.static_range(WINDOW * WINDOW):
        tl.store(target + tap * C, tl.sum(totals[tap], 0), mask=channels < C)


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


@triton.jit
def store_if_wanted(target, place, values, inside):
    if target is not None:
        tl.store(target + place, values.to(target.dtype.element_ty), mask=inside)


@kernel
def window_first_kernel(
    weight,  # (R, taps)
    turned,  # (taps, R)
    R,
    taps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """turned = weight^T."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    tap = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < R) & (tap < taps)
    tl.store(turned + tap * R + row, tl.load(weight + row * taps + tap, mask=inside, other=0.0), mask=inside)


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
        PRECISION=precision(dtype),
        OPERAND=operand(dtype),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=max(next_power_of_2(channels), 16),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **FUSION,
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


def contract(
    mixed: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y (B, C, H, W) from D a(z), (M, R), and the shortcut x; and if wanted, what the statistics of its tokens are to
    be combined of, (3, any, M). The weight is in the dtype of D a(z)."""
    dtype, (count, inner), (_, channels, height, width) = mixed.dtype, mixed.shape, x.shape
    y = empty_nhwc(x)
    tiles = contract_tiles(dtype, channels)
    blocks = cdiv(channels, tiles.columns)
    partials = float32(x, 3, blocks, count) if with_statistics else None
    contract_kernel[(cdiv(count, tiles.rows) * blocks,)](
        mixed,
        weight,
        None,
        x,
        layer_scale,
        res_scale,
        mask,
        y,
        partials,
        count,
        height * width,
        blocks * count,
        N=channels,
        K=inner,
        PRECISION=precision(dtype),
        OPERAND=operand(dtype),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **FUSION,
    )
    return y, partials


class Strips:
    """How the kernels of D share out (B, H, W) tokens with `inner` channels."""

    def __init__(self, batch: int, height: int, width: int, inner: int, window: int):
        def work(length):  # of one row: the multiply-adds, and a dozen instructions for each entry that is loaded
            return cdiv(width, length) * (window * window * length + 12 * (length + window - 1))

        self.length = min(STRIP, key=work)
        self.per_row = cdiv(width, self.length)
        self.count = batch * self.per_row
        self.groups = cdiv(self.count, STRIPS)
        self.blocks = cdiv(inner, CHANNELS)
        # A band reads the rows around it once more: there are as many as it takes to have enough programs, and none
        # that would read more than it computes.
        bands = min(cdiv(PROGRAMS, self.groups * self.blocks), cdiv(height, window))
        self.band = cdiv(height, bands)
        self.bands = cdiv(height, self.band)
        self.sizes = (self.count, self.per_row, height, width, self.band)
        self.options = {
            "C": inner,
            "WINDOW": window,
            "LENGTH": self.length,
            "STRIPS": STRIPS,
            "CHANNELS": CHANNELS,
            "num_warps": 1 if INTERPRETED else STRIPS * CHANNELS // 32,
            **REGISTERS,
            **FUSION,
        }


def convolve(
    strips: Strips,
    z: torch.Tensor,
    taps: torch.Tensor,
    act_scale: torch.Tensor,
    act_bias: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """m D a(z) of z (M, R); taps (window^2, R)."""
    out = torch.empty_like(z)
    depthwise_kernel[(strips.groups, strips.blocks, strips.bands)](
        z, None, taps, act_scale, act_bias, mask, out, None, *strips.sizes, BACKWARD=False, **strips.options
    )
    return out


def convolve_backward(
    strips: Strips,
    grad: torch.Tensor,
    z: torch.Tensor,
    taps: torch.Tensor,
    act_scale: torch.Tensor,
    act_bias: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz (M, R), and parts (any, 2) of the gradients of act_scale and act_bias, from grad = dd (M, R)."""
    out = torch.empty_like(z)
    grid = (strips.groups, strips.blocks, strips.bands)
    sums = float32(z, strips.groups * strips.blocks * strips.bands, 2)
    depthwise_kernel[grid](
        grad, z, taps, act_scale, act_bias, mask, out, sums, *strips.sizes, BACKWARD=True, **strips.options
    )
    return out, sums


def convolve_weight_backward(
    strips: Strips,
    grad: torch.Tensor,
    z: torch.Tensor,
    act_scale: torch.Tensor,
    act_bias: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Parts of dD, (any, window^2, R), in float32."""
    programs = min(strips.groups * strips.bands, cdiv(PROGRAMS, strips.blocks))
    sums = float32(z, programs, strips.options["WINDOW"] ** 2, z.shape[1])
    depthwise_weight_kernel[(programs, strips.blocks)](
        z, grad, act_scale, act_bias, mask, sums, *strips.sizes, strips.bands, **strips.options
    )
    return sums


def window_first(weight: torch.Tensor) -> torch.Tensor:
    """The depthwise weight (R, 1, window, window) as (window^2, R), so that neighbouring threads read side by side."""
    inner, taps = weight.shape[0], weight.shape[-1] ** 2
    turned = torch.empty((taps, inner), dtype=weight.dtype, device=weight.device)
    blocks = cdiv(inner, FINISH_ROWS)
    window_first_kernel[(blocks, cdiv(taps, FINISH_COLUMNS))](
        weight, turned, inner, taps, ROWS=FINISH_ROWS, COLUMNS=FINISH_COLUMNS, **FUSION
    )
    return turned


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
    tensors = norm_weight, weight1, act_scale, act_bias, depthwise_weight, weight2, layer_scale, res_scale
    y, z, _ = separate_partially(x, *tensors, mask, eps, dtype, False)
    return y, z if needs_gradient else None


def separate_partially(
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
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y and z of `separate` and, if wanted, what the statistics of y's tokens are to be combined of, (3, any, M)."""
    batch, _, height, width = x.shape
    with on(x):
        operand1, operand2, *_ = fold(weight1, None, weight2, None, dtype)
        z = expand(token_rows(x), norm_weight, operand1, eps, dtype)
        strips = Strips(batch, height, width, z.shape[1], depthwise_weight.shape[-1])
        mixed = convolve(strips, z, window_first(depthwise_weight), act_scale, act_bias, None)
        y, partials = contract(mixed, operand2, x, layer_scale, res_scale, mask, with_statistics)
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
        rows, grad = token_rows(x), token_rows(g).to(dtype)
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
    return empty_nhwc(x), x.new_empty(
        (batch * height * width, weight1.shape[0]), dtype=dtype
    ) if needs_gradient else None


def _fake_backward(g, x, z, *rest):
    return [empty_nhwc(g), *empty_like_each(rest[:8], rest[-1])]


def _keep(ctx, inputs, results):
    *tensors, ctx.eps, _, ctx.saved = inputs
    if results[1] is not None:
        ctx.mark_non_differentiable(results[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(results[1], *tensors)


def _differentiate(ctx, backward, g, _):
    grads: list[torch.Tensor | None] = [None] * 13
    if g is None:
        return tuple(grads)
    if not ctx.saved:
        raise RuntimeError("separable_conv was called with needs_gradient=False, so it has no backward")
    z, x, *rest = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[1:9])
    g = g.contiguous(memory_format=torch.channels_last)
    grads[0], *found = backward(g, x, z, *rest, ctx.eps, wanted)
    grads[1:9] = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
    return tuple(grads)


separable_conv = differentiable(
    "separable_conv",
    separate,
    separate_backward,
    fakes=(_fake, _fake_backward),
    keep=_keep,
    differentiate=_differentiate,
)
count_products("separable_conv", 2, x=0, weight1=2, convolutions=1, depthwise=5)
count_products("separable_conv_backward", 4, x=0, weight1=4, convolutions=3, depthwise=7)
