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

from .channel_mlp import contract_kernel, scalar, vector
from .flops import count_products
from .launch import FUSION, INTERPRETED, Tiles, empty_nhwc, float32, on, operand, precision, transposed_product
from .token_norm import normalise, normalise_backward, standardised, token_rows


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


@triton.jit
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


@triton.jit(do_not_specialize=["count", "strips", "height", "width", "band"])
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


@triton.jit(do_not_specialize=["count", "strips", "height", "width", "band", "bands"])
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


def expand(
    rows: torch.Tensor, norm_weight: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """z (M, R) in `dtype`."""
    weight = weight.to(dtype)
    (count, channels), inner = rows.shape, weight.shape[0]
    if channels > WHOLE:
        return torch.mm(normalise(rows, norm_weight, None, eps, dtype), weight.t())
    z = torch.empty((count, inner), dtype=dtype, device=rows.device)
    tiles = expand_tiles(dtype)
    norm_product_kernel[(triton.cdiv(count, tiles.rows),)](
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
        DEPTH=max(triton.next_power_of_2(channels), 16),
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
) -> torch.Tensor:
    """y (B, C, H, W) from D a(z), (M, R), and the shortcut x."""
    dtype, (count, inner), (_, channels, height, width) = mixed.dtype, mixed.shape, x.shape
    y = empty_nhwc(x)
    tiles = contract_tiles(dtype, channels)
    contract_kernel[(triton.cdiv(count, tiles.rows) * triton.cdiv(channels, tiles.columns),)](
        mixed,
        weight.to(dtype),
        None,
        x,
        layer_scale,
        res_scale,
        mask,
        y,
        None,
        count,
        height * width,
        0,
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
    return y


class Strips:
    """How the kernels of D share out (B, H, W) tokens with `inner` channels."""

    def __init__(self, batch: int, height: int, width: int, inner: int, window: int):
        def work(length):  # of one row: the multiply-adds, and a dozen instructions for each entry that is loaded
            return triton.cdiv(width, length) * (window * window * length + 12 * (length + window - 1))

        self.length = min(STRIP, key=work)
        self.per_row = triton.cdiv(width, self.length)
        self.count = batch * self.per_row
        self.groups = triton.cdiv(self.count, STRIPS)
        self.blocks = triton.cdiv(inner, CHANNELS)
        # A band reads the rows around it once more: there are as many as it takes to have enough programs, and none
        # that would read more than it computes.
        bands = min(triton.cdiv(PROGRAMS, self.groups * self.blocks), triton.cdiv(height, window))
        self.band = triton.cdiv(height, bands)
        self.bands = triton.cdiv(height, self.band)
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
    """dz (M, R), and (2,) the gradients of act_scale and act_bias, from grad = dd (M, R)."""
    out = torch.empty_like(z)
    grid = (strips.groups, strips.blocks, strips.bands)
    sums = float32(z, strips.groups * strips.blocks * strips.bands, 2)
    depthwise_kernel[grid](
        grad, z, taps, act_scale, act_bias, mask, out, sums, *strips.sizes, BACKWARD=True, **strips.options
    )
    return out, sums.sum(0)


def convolve_weight_backward(
    strips: Strips,
    grad: torch.Tensor,
    z: torch.Tensor,
    act_scale: torch.Tensor,
    act_bias: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """dD (window^2, R) in float32."""
    programs = min(strips.groups * strips.bands, triton.cdiv(PROGRAMS, strips.blocks))
    sums = float32(z, programs, strips.options["WINDOW"] ** 2, z.shape[1])
    depthwise_weight_kernel[(programs, strips.blocks)](
        z, grad, act_scale, act_bias, mask, sums, *strips.sizes, strips.bands, **strips.options
    )
    return sums.sum(0)


def window_first(weight: torch.Tensor) -> torch.Tensor:
    """The depthwise weight (R, 1, window, window) as (window^2, R), so that neighbouring threads read side by side."""
    return weight.flatten(1).t().contiguous()


@torch.library.custom_op("hf_poolformer::separable_conv", mutates_args=())
def separable_conv(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    y (B, C, H, W) and for backward (`needs_gradient`) z (M, R), else (0,).

    x (B, C, H, W) channels_last, weight1 (R, C), depthwise_weight (R, 1, window, window) of an odd window, weight2
    (C, R), act_scale and act_bias (1,), mask (B,), all other vectors (C,). `dtype` is that of the products. Without
    `needs_gradient` there is no backward.
    """
    batch, _, height, width = x.shape
    with on(x):
        z = expand(token_rows(x), norm_weight, weight1, eps, dtype)
        strips = Strips(batch, height, width, z.shape[1], depthwise_weight.shape[-1])
        mixed = convolve(strips, z, window_first(depthwise_weight), act_scale, act_bias, None)
        y = contract(mixed, weight2, x, layer_scale, res_scale, mask)
        return y, z if needs_gradient else z.new_empty((0,))


@separable_conv.register_fake
def _(
    x,
    norm_weight,
    weight1,
    act_scale,
    act_bias,
    depthwise_weight,
    weight2,
    layer_scale,
    res_scale,
    mask,
    eps,
    dtype,
    needs_gradient,
):
    batch, _, height, width = x.shape
    kept = (batch * height * width, weight1.shape[0]) if needs_gradient else (0,)
    return empty_nhwc(x), x.new_empty(kept, dtype=dtype)


@torch.library.custom_op("hf_poolformer::separable_conv_backward", mutates_args=())
def separable_conv_backward(
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
    with_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    dx; then in float32 dW1 (R, C), dD (window^2, R), G (C, R), sums (2, C) of e (x - mu) r and of g x, and (2,) the
    gradients of act_scale and act_bias.

    Without `with_weights`, dW1, dD and G are (0,).
    """
    batch, _, height, width = g.shape
    dtype = z.dtype
    with on(g):
        strips = Strips(batch, height, width, z.shape[1], depthwise_weight.shape[-1])
        taps, activation = window_first(depthwise_weight), (act_scale, act_bias, mask)
        rows, grad = token_rows(x), token_rows(g).to(dtype)
        weight1, weight2 = weight1.to(dtype), weight2 if layer_scale is None else layer_scale[:, None] * weight2
        dmixed = torch.mm(grad, weight2.to(dtype))
        if with_weights:
            dtaps = convolve_weight_backward(strips, dmixed, z, *activation)
            contracted = transposed_product(grad, convolve(strips, z, taps, *activation))
        dz, dact = convolve_backward(strips, dmixed, z, taps, *activation)
        if with_weights:
            dweight1 = transposed_product(dz, normalise(rows, norm_weight, None, eps, dtype))
        else:
            dweight1, dtaps, contracted = (float32(g, 0) for _ in range(3))
        dx, sums = normalise_backward(torch.mm(dz, weight1), x, g, norm_weight, res_scale, eps)
        return dx, dweight1, dtaps, contracted, sums.sum(0), dact


@separable_conv_backward.register_fake
def _(
    g,
    x,
    z,
    norm_weight,
    weight1,
    act_scale,
    act_bias,
    depthwise_weight,
    weight2,
    layer_scale,
    res_scale,
    mask,
    eps,
    with_weights,
):
    inner, channels = weight1.shape
    shapes = [(inner, channels), (depthwise_weight[0].numel(), inner), (channels, inner)]
    return (
        empty_nhwc(g),
        *(float32(g, *(shape if with_weights else (0,))) for shape in shapes),
        float32(g, 2, channels),
        float32(g, 2),
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, _, ctx.saved = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, g, _):
    grads: list[torch.Tensor | None] = [None] * 13
    if g is None:
        return tuple(grads)
    if not ctx.saved:
        raise RuntimeError("separable_conv was called with needs_gradient=False, so it has no backward")
    z, x, *parameters, mask = ctx.saved_tensors
    *_, depthwise_weight, weight2, layer_scale, _ = parameters
    g = g.contiguous(memory_format=torch.channels_last)
    _, _, need1, _, _, need_depthwise, need2, need_scale, *_ = ctx.needs_input_grad
    with_weights = need1 or need_depthwise or need2 or need_scale
    dx, dweight1, dtaps, contracted, sums, dact = torch.ops.hf_poolformer.separable_conv_backward(
        g, x, z, *parameters, mask, ctx.eps, with_weights
    )
    # Tensors of the size of weights from here on.
    ddepthwise = dweight2 = dlayer = None
    if need_depthwise:
        ddepthwise = dtaps.t().reshape(depthwise_weight.shape)
    if need2:
        dweight2 = contracted if layer_scale is None else layer_scale[:, None] * contracted
    if need_scale:
        dlayer = (contracted * weight2).sum(1)
    found = [sums[0], dweight1, dact[:1], dact[1:], ddepthwise, dweight2, dlayer, sums[1]]
    grads[0] = dx
    grads[1:9] = [
        grad.to(parameter.dtype) if needed else None
        for parameter, grad, needed in zip(parameters, found, ctx.needs_input_grad[1:9], strict=True)
    ]
    return tuple(grads)


separable_conv.register_autograd(_backward, setup_context=_setup_context)
count_products("separable_conv", 2, x=0, weight1=2, convolutions=1, depthwise=5)
count_products("separable_conv_backward", 4, x=0, weight1=4, convolutions=3, depthwise=7)
