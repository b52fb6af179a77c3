"""Patch embeddings: a convolution of few channels as one product, and the bias of any other.

In NHWC memory a row of a window, its KW pixels of C channels each, is one run of KW C numbers. So a convolution of few
channels is y = W x over all rows of a window at once, where each run is widened to a power of two, and begins so early
that loads are aligned:

    y[token] = bias + sum_ky sum_j  W'[ky, j] x[row(token) + ky, column(token) C - LEAD + j]

W' has zeros where j is outside of the window. There x is read nevertheless, of the same row of the same image only: up
to seven numbers on each side, so that infinities and NaN reach that much farther than by definition.

A program loads W' once and takes every so many tiles of tokens of a sample. For other convolutions cuDNN has the
product, but adds a bias at a third of the memory's bandwidth; `add_bias` does it in one pass, in place. Both also give
the statistics of what they write.
"""

import torch
import triton.language as tl
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import NAMESPACE
from .launch import FUSION, INTERPRETED, bucket, cdiv, float32, kernel, next_power_of_2, on, operand, precision, tuned
from .parts import PROGRAMS
from .statistics import CHUNK, combine, moments, store_moments


# Rows and columns of a tile of tokens, warps, and depth of the load pipeline, by columns of the product: the first of
# each leaves room for two programs on a Hopper multiprocessor. 8 x 8 divides the 56 x 56 tokens of 224 x 224 pixels.
TILES = {
    64: [(8, 8, 4, 2), (8, 8, 4, 1), (16, 8, 8, 2), (8, 8, 4, 3)],
    128: [(8, 8, 4, 1), (16, 8, 8, 2), (8, 8, 4, 2)],
}
if INTERPRETED:
    TILES = {16: [(4, 4, 1, 1)]}
# Numbers of a window, rows widened to powers of two: of more, tiles do not fit into shared memory.
LARGEST_WINDOW = 256


@kernel
def convolution_kernel(
    x,
    weight,
    bias,
    y,
    partials,
    height,
    width,
    out_height,
    out_width,
    tiles,
    splits,
    plane,
    stride_out,
    stride_in,
    stride_row,
    stride_column,
    C: tl.constexpr,
    OUT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    LEAD: tl.constexpr,
    READ: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    STATISTICS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of each window RUNS rows of RUN numbers, of which KERNEL_H and READ are read; y is channels_last."""
    sample = (tl.program_id(0) // splits).to(tl.int64)
    place = tl.arange(0, RUNS * RUN)
    kernel_row = place // RUN
    j = place % RUN
    wanted = (kernel_row < KERNEL_H) & (j < READ)

    entry = j - LEAD
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = entry % C * stride_in + kernel_row * stride_row + entry // C * stride_column
    known = wanted & (entry >= 0) & (entry < KERNEL_W * C)
    # Channels first: neighbouring lanes then load neighbouring numbers of the weight.
    matrix = tl.load(
        weight + channel[:, None] * stride_out + source[None, :],
        mask=(channel < OUT)[:, None] & known[None, :],
        other=0.0,
    )
    matrix = tl.trans(matrix.to(OPERAND))

    x += sample * height * width * C
    token = tl.arange(0, TILE_H * TILE_W)
    across = tl.cdiv(out_width, TILE_W)
    out_channels = tl.minimum(OUT - tl.program_id(1) * COLUMNS, COLUMNS)
    for tile in range(tl.program_id(0) % splits, tiles, splits):
        first_row, first_column = tile // across * TILE_H, tile % across * TILE_W
        out_row, out_column = first_row + token // TILE_W, first_column + token % TILE_W
        row = (out_row * STRIDE_H - PAD_H)[:, None] + kernel_row[None, :]
        position = (out_column * (STRIDE_W * C) - (PAD_W * C + LEAD))[:, None] + j[None, :]
        # Bounds of columns are multiples of what is loaded at once. Tokens that are none read, but are not kept.
        inside = (row >= 0) & (row < height) & (position >= 0) & (position < width * C) & wanted[None, :]
        windows = tl.load(x + (row * (width * C) + position), mask=inside, other=0.0)
        out = tl.dot(windows.to(OPERAND), matrix, input_precision=PRECISION)
        if bias is not None:
            out += tl.load(bias + channel, mask=channel < OUT, other=0.0).to(tl.float32)[None, :]
        rounded = out.to(y.dtype.element_ty)
        keep = ((out_row < out_height) & (out_column < out_width))[:, None] & (channel < OUT)[None, :]
        target = (sample * out_height + out_row) * out_width + out_column
        tl.store(y + target[:, None] * OUT + channel[None, :], rounded, mask=keep)
        if STATISTICS:
            tokens = tl.minimum(TILE_H, out_height - first_row) * tl.minimum(TILE_W, out_width - first_column)
            count = (tokens * out_channels).to(tl.float32)
            values = tl.where(keep, rounded.to(tl.float32), 0.0)
            mean = tl.sum(tl.sum(values, 1), 0) / count
            deviation = tl.where(keep, values - mean, 0.0)
            index = (sample * tiles + tile) * tl.num_programs(1) + tl.program_id(1)
            tl.store(partials + index, count)
            tl.store(partials + plane + index, mean)
            tl.store(partials + 2 * plane + index, tl.sum(tl.sum(deviation * deviation, 1), 0))


@kernel
def bias_kernel(y, bias, partials, size, plane, C: tl.constexpr, STATISTICS: tl.constexpr, CHUNK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)[None, :]
    inside = offsets < size
    target = y + sample * size + offsets
    shift = tl.load(bias + offsets % C, mask=inside, other=0.0).to(y.dtype.element_ty)
    values = tl.load(target, mask=inside, other=0.0).to(tl.float32) + shift.to(tl.float32)
    rounded = values.to(y.dtype.element_ty)
    tl.store(target, rounded, mask=inside)
    if STATISTICS:
        count, mean, m2 = moments(rounded.to(tl.float32), inside)
        store_moments(partials, plane, sample * tl.num_programs(1) + tl.program_id(1), count, mean, m2)


def out_size(x: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int]) -> tuple[int, ...]:
    """(B, out channels, height, width) of the convolution of x (B, C, H, W)."""
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    return x.shape[0], weight.shape[0], *((size + 2 * pad - kernel) // step + 1 for size, kernel, step, pad in sizes)


def runs(weight: torch.Tensor, stride: list[int], padding: list[int]) -> dict[str, int]:
    """How a convolution reads the rows of its windows: LEAD, READ, RUN and RUNS of the kernel."""
    _, channels, rows, columns = weight.shape
    step = stride[1] * channels
    # Numbers in an aligned load, at most the eight that are 16 bytes of half precision.
    together = min(step & -step, 8)
    lead = -padding[1] * channels % together
    read = -(-(lead + columns * channels) // together) * together
    # No product is less deep than 16.
    run = max(next_power_of_2(read), 16)
    return {"LEAD": lead, "READ": read, "RUN": run, "RUNS": next_power_of_2(rows)}


def fits(weight: torch.Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether a convolution with this weight (out, C, KH, KW) has windows small enough for its kernel."""
    layout = runs(weight, stride, padding)
    return layout["RUN"] * layout["RUNS"] <= LARGEST_WINDOW


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `patch_embedding` computes, without its registration, which costs more time of the CPU than a launch."""
    batch, channels, height, width = x.shape
    size = out_size(x, weight, stride, padding)
    _, out_channels, out_height, out_width = size
    columns = min(max(next_power_of_2(out_channels), min(TILES)), max(TILES))
    blocks = cdiv(out_channels, columns)

    def launch(tile):
        tile_h, tile_w, warps, stages = tile
        tiles = cdiv(out_height, tile_h) * cdiv(out_width, tile_w)
        splits = min(tiles, cdiv(PROGRAMS, batch * blocks))
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        partials = float32(x, 3, 1, batch * tiles * blocks) if with_statistics else None
        convolution_kernel[(batch * splits, blocks)](
            x,
            weight,
            bias,
            y,
            partials,
            height,
            width,
            out_height,
            out_width,
            tiles,
            splits,
            batch * tiles * blocks,
            *weight.stride(),
            C=channels,
            OUT=out_channels,
            KERNEL_H=weight.shape[2],
            KERNEL_W=weight.shape[3],
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            PAD_H=padding[0],
            PAD_W=padding[1],
            **runs(weight, stride, padding),
            STATISTICS=with_statistics,
            TILE_H=tile_h,
            TILE_W=tile_w,
            COLUMNS=columns,
            OPERAND=operand(x.dtype),
            PRECISION=precision(x.dtype),
            num_warps=warps,
            num_stages=stages,
            **FUSION,
        )
        return y, partials

    with on(x):
        key = ("patch_embedding", x.dtype, bucket(batch * out_height * out_width), out_channels, channels)
        y, partials = tuned((*key, *weight.shape[2:], with_statistics), TILES[columns], launch)
        return y, combine(partials, batch) if with_statistics else float32(x, 0, 2)


def add_bias(y: torch.Tensor, bias: torch.Tensor, with_statistics: bool) -> torch.Tensor | None:
    """Adds bias (C,) in place to y (B, C, H, W) in channels_last memory; its statistics then, (B, 2), or None."""
    samples, size = y.shape[0], y[0].numel()
    chunks = cdiv(size, CHUNK)
    with on(y):
        partials = float32(y, 3, 1, samples * chunks) if with_statistics else None
        bias_kernel[(samples, chunks)](
            y,
            bias,
            partials,
            size,
            samples * chunks,
            C=y.shape[1],
            STATISTICS=with_statistics,
            CHUNK=CHUNK,
            num_warps=8,
            **FUSION,
        )
        return combine(partials, samples) if with_statistics else None


@torch.library.custom_op(f"{NAMESPACE}::patch_embedding", mutates_args=())
def patch_embedding(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The convolution y of x (B, C, H, W), channels_last, and its statistics (B, 2), or (0, 2) if not wanted.

    weight (out, C, KH, KW) may lie in memory in any way; it is rounded to x's dtype, as y is. stride and padding, with
    zeros, are of height and width. The window must have at most `LARGEST_WINDOW` numbers (`fits`). The statistics have
    no gradient.
    """
    return convolve(x, weight, bias, stride, padding, with_statistics)


@patch_embedding.register_fake
def _(x, weight, bias, stride, padding, with_statistics):
    size = out_size(x, weight, stride, padding)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, float32(x, x.shape[0] if with_statistics else 0, 2)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.stride, ctx.padding, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _backward(ctx, g, _):
    if g is None:
        return (None,) * 6
    x, weight = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        g.contiguous(memory_format=torch.channels_last),
        x,
        weight.to(x.dtype),
        [weight.shape[0]],
        ctx.stride,
        ctx.padding,
        [1, 1],
        False,
        [0, 0],
        1,
        needed,
    )
    dweight = dweight.to(weight.dtype) if needed[1] else None
    return dx, dweight, dbias.to(ctx.bias_dtype) if needed[2] else None, None, None, None


patch_embedding.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(getattr(torch.ops, NAMESPACE).patch_embedding)
def _(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return conv_flop_count(x_shape, weight_shape, out_shape[0])
