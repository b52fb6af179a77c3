# ruff: noqa: RUF005 Triton knows no unpacking into tuples.
"""Depthwise convolution D of an activation, m D a(z), and its backward.

a(z) = s relu(z)^2 + b with learned scalars, m the mask, one number per sample. The window is odd, its stride 1, and
its padding zeros in place of a(z), so b cannot be moved behind it. Rows are tokens, M = B H W of them with R channels.

D computes a(z) as it reads z, so that a(z) is never stored. It is bound by arithmetic on a GPU: 49 multiply-adds for
an entry of 4 bytes, read and written. So there should be little else. A thread has one channel of a strip of 7 or 8
neighbouring tokens, and rows stream past it: it reads the 13 entries around its strip once per row, and adds them to
the sums of the 7 output rows that see this row. Its weights stay in registers. Compiled for sm_90 that is 343
multiply-adds in about 580 instructions.

The formulas of its backward are in separable_conv.py.
"""

import math

import torch
import triton
import triton.language as tl

from .launch import FUSION, INTERPRETED, cdiv, float32, kernel
from .parts import PROGRAMS, scalar, vector


# Strips of tokens and channels of a program of D: one channel of one strip for each thread of 4 warps, and 64 bytes of
# bfloat16 side by side.
STRIPS, CHANNELS = (4, 16) if INTERPRETED else (4, 32)
# Tokens of a strip: more would not fit into the registers beside 49 weights, fewer load more than they compute.
STRIP = range(2, 4) if INTERPRETED else range(4, 9)
# So that three programs fit a multiprocessor of 65536 registers. A strip of 8 would take 180 to 200 of them, and does
# with as many as one of 7 needs; nothing spills.
REGISTERS = {} if torch.version.hip else {"maxnreg": 168}
# Tile of the weight's transposition.
TURNED_ROWS, TURNED_COLUMNS = (16, 16) if INTERPRETED else (64, 32)


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
        self.grid = (self.groups, self.blocks, self.bands)
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
    depthwise_kernel[strips.grid](
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
    sums = float32(z, math.prod(strips.grid), 2)
    depthwise_kernel[strips.grid](
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
    blocks = cdiv(inner, TURNED_ROWS)
    window_first_kernel[(blocks, cdiv(taps, TURNED_COLUMNS))](
        weight, turned, inner, taps, ROWS=TURNED_ROWS, COLUMNS=TURNED_COLUMNS, **FUSION
    )
    return turned
