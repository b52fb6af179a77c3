"""The fused operations on the CPU: NHWC, oneDNN's products with their epilogues, hidden activations in blocks.

Formulas as in pool_mixer.py and channel_mlp.py. Two things make a difference here: the product's bias and activation
run in oneDNN while a tile is in registers, and the hidden activation, four times as large as its input, is made and
used up for a few samples at a time. Whole, it is new memory in every block, and its page faults cost as much as its
arithmetic.

Inference is a list of branches, of all mixers, that a few samples pass through together. Depthwise convolutions and
attention are PyTorch's own, on views: in NHWC oneDNN's convolution gains nothing from a weight that is packed before.

Training keeps the first product's result, which costs a third of the time again to compute anew; the rest is cheap and
computed again. Sums run in a fixed order, so that results do not change from run to run.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from . import NAMESPACE
from .flops import count_products


# Bytes of hidden activation per block, near the size of the caches that two cores have to themselves. Backward holds
# three such tensors.
FORWARD_BLOCK = 5 << 20
BACKWARD_BLOCK = 8 << 20
# Post-operations of oneDNN by activation. star_relu's square follows in place.
EPILOGUES = {
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "squared_relu": ("relu", ""),
    "star_relu": ("relu", ""),
}
Optional = torch.Tensor | None


class Hidden(NamedTuple):
    """The activation between both products: its name, and what star_relu learns, (1,) each."""

    name: str
    scale: Optional
    bias: Optional


@functools.cache
def settle_allocator() -> None:
    """
    Maps and frees one large block, once per process, before the first operation.

    From then on glibc serves activations from its heap and keeps 64 MiB of it: its thresholds follow the largest block
    freed so far, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). Before, it maps and unmaps every activation, whose page
    faults took 5 to 15 % of inference. Another C library just frees the block.
    """
    torch.empty((32 << 20) - 8192, dtype=torch.uint8)


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this dtype at full speed here."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) in NHWC memory as a matrix (B H W, C), without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def packed(weight: torch.Tensor, parts: list[slice], tokens: int) -> torch.Tensor:
    """weight (R, C) as oneDNN wants it, if it serves several blocks: for one block the product packs it as fast."""
    if len(parts) == 1:
        return weight
    return pack(weight, (parts[0].stop - parts[0].start) * tokens)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional, epilogue: tuple[str, str] = ("none", "")):
    """epilogue(x weight^T + bias): x (M, C), weight (R, C), which may be packed."""
    name, algorithm = epilogue
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


def activate(z: torch.Tensor, hidden: Hidden, rectified: bool = False) -> torch.Tensor:
    """act(z); of the squared activations, in place and from relu(z) if `rectified`."""
    if hidden.name == "gelu":
        return F.gelu(z)
    if hidden.name == "silu":
        return F.silu(z)
    z = z if rectified else F.relu(z)
    if hidden.name == "relu":
        return z
    if hidden.scale is None and hidden.bias is None:
        return z.square_()
    scale = 1.0 if hidden.scale is None else hidden.scale.item()
    if hidden.bias is None:
        return z.square_().mul_(scale)
    return torch.addcmul(hidden.bias.to(z.dtype), z, z, value=scale, out=z)


def differentiate(da: torch.Tensor, z: torch.Tensor, hidden: Hidden) -> torch.Tensor:
    """dL/dz from dL/da, in the memory of da."""
    if hidden.name == "gelu":
        return torch.ops.aten.gelu_backward.grad_input(da, z, grad_input=da)
    if hidden.name == "silu":
        return torch.ops.aten.silu_backward.grad_input(da, z, grad_input=da)
    if hidden.name == "relu":
        return torch.ops.aten.threshold_backward.grad_input(da, z, 0, grad_input=da)
    scale = 2.0 if hidden.scale is None else 2.0 * hidden.scale.item()
    return da.mul_(F.relu(z)).mul_(scale)


def blocks(x: torch.Tensor, width: int, size: int) -> list[slice]:
    """
    Samples of x (B, ...) by blocks of at most `size` bytes at `width` values per token, one sample at least.

    They are as even as can be: for a small rest, oneDNN would bring packed weights into another format.
    """
    batch, _, height, wide = x.shape
    most = max(1, size // (height * wide * width * x.element_size()))
    step = math.ceil(batch / math.ceil(batch / most))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def group_norm(x: torch.Tensor, weight: Optional, bias: Optional, eps: float) -> tuple[torch.Tensor, ...]:
    """Normalised x, and mean and 1 / standard deviation (B, 1) of each sample, float32."""
    batch, channels, height, width = x.shape
    if batch == 1:
        # Of one image the first stride may be anything, and then PyTorch 2.11 does not see that it is channels_last.
        x = as_map(rows(x), x)
    if x.dtype != torch.float32:
        # With float32 parameters PyTorch also returns the statistics in float32.
        weight = torch.ones(channels) if weight is None else weight.float()
        bias = torch.zeros(channels) if bias is None else bias.float()
    return torch.native_group_norm(x, weight, bias, batch, channels, height * width, 1, eps)


def product(*factors: Optional) -> Optional:
    """Of those that are there, in float32; None if none is."""
    result = None
    for factor in factors:
        if factor is not None:
            result = factor.float() if result is None else result * factor.float()
    return result


def add_branch(x: torch.Tensor, branch: torch.Tensor, factor: Optional, res_scale: Optional, out: torch.Tensor):
    """out = res_scale x + factor branch, all (B, C, H, W); factor (B, C), (1, C) or (B, 1), res_scale (C,)."""
    x, branch, out = as_tokens(x), as_tokens(branch), as_tokens(out)
    if res_scale is not None:
        x = x * res_scale.to(x.dtype)
    if factor is None:
        torch.add(x, branch, out=out)
    else:
        torch.addcmul(x, branch, factor[:, None].to(x.dtype), out=out)


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) in NHWC memory as (B, H W, C): PyTorch broadcasts slowly over one image's map, whose strides are
    ambiguous."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def mix(
    x: torch.Tensor, scale: Optional, res_scale: Optional, mask: Optional, pool_size: int, eps: float, out: Optional
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """res_scale x + mask scale rstd (pool(x) - x), into `out` if given, and mean and rstd (B, 1); scale (C,)."""
    _, mean, rstd = group_norm(x, None, None, eps)
    factor = product(rstd, scale, None if mask is None else mask[:, None])[:, None].to(x.dtype)
    y = pool(x, pool_size)
    tokens, pooled = as_tokens(x), as_tokens(y)
    result = pooled if out is None else as_tokens(out)
    if res_scale is None:
        torch.lerp(tokens, pooled, factor, out=result)
    else:
        torch.addcmul(tokens * res_scale.to(x.dtype), pooled.sub_(tokens), factor, out=result)
    return y if out is None else out, mean, rstd


def pool(x: torch.Tensor, size: int) -> torch.Tensor:
    return F.avg_pool2d(x, size, stride=1, padding=size // 2, count_include_pad=False)


def pool_transposed(g: torch.Tensor, size: int) -> torch.Tensor:
    """P^T g: the sum over the window of g / (number of valid tokens of that window)."""
    height, width = g.shape[-2:]
    reach = size // 2
    across, down = (
        torch.tensor([min(i + reach, n - 1) - max(i - reach, 0) + 1 for i in range(n)], dtype=torch.float32)
        for n in (width, height)
    )
    shares = (1.0 / (down[:, None] * across)).to(g.dtype)
    return F.avg_pool2d(g * shares, size, stride=1, padding=reach, divisor_override=1)


def as_map(matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B H W, R) as (B, R, H, W) in NHWC memory; of `like`, the other sizes count."""
    batch, _, height, width = like.shape
    return matrix.view(batch, height, width, matrix.shape[1]).permute(0, 3, 1, 2)


@torch.library.custom_op(f"{NAMESPACE}::cpu_pool_mixer", mutates_args=())
def cpu_pool_mixer(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    pool_size: int,
    eps: float,
    norm_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, C, H, W), and mean and 1 / standard deviation of each sample of x, (2, B); x is channels_last.

    norm_bias (C,) cancels; its gradient is zero.
    """
    settle_allocator()
    y, statistics = torch.empty_like(x), x.new_empty(2, x.shape[0], dtype=torch.float32)
    scale = product(weight, layer_scale)
    for part in blocks(x, x.shape[1], FORWARD_BLOCK // 4):
        weights = None if mask is None else mask[part]
        _, mean, rstd = mix(x[part], scale, res_scale, weights, pool_size, eps, y[part])
        statistics[0, part], statistics[1, part] = mean[:, 0], rstd[:, 0]
    return y, statistics


@cpu_pool_mixer.register_fake
def _(x, weight, layer_scale, res_scale, mask, pool_size, eps, norm_bias):
    return torch.empty_like(x), x.new_empty(2, x.shape[0], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::cpu_pool_mixer_backward", mutates_args=())
def cpu_pool_mixer_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    pool_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (B, C, H, W), of layer_scale * weight (C,), and of res_scale (C,), or (0,) if there is none."""
    dx = torch.empty_like(x)
    _, channels, height, width = x.shape
    scale = product(weight, layer_scale)
    dscale = x.new_zeros(channels, dtype=torch.float32)
    dres = x.new_zeros(0 if res_scale is None else channels, dtype=torch.float32)
    for part in blocks(x, channels, BACKWARD_BLOCK // 4):
        xs, gs = x[part], g[part]
        mean, rstd = statistics[:, part, None]  # (S, 1)
        factor = rstd if mask is None else rstd * mask[part, None]
        sums = (pool(xs, pool_size).sub_(xs)).mul_(gs).sum((2, 3), dtype=torch.float32)  # (S, C)
        dscale += (factor * sums).sum(0)
        variance = factor * rstd.square() / (channels * height * width)
        variance = variance * (sums if scale is None else sums * scale).sum(1, keepdim=True)  # (S, 1)
        if res_scale is not None:
            dres += (gs * xs).sum((0, 2, 3), dtype=torch.float32)
        scaled = gs * (factor.expand(-1, channels) if scale is None else factor * scale)[..., None, None].to(g.dtype)
        result = pool_transposed(scaled, pool_size).sub_(scaled)
        result.sub_((xs - mean[..., None, None].to(x.dtype)).mul_(variance[..., None, None].to(x.dtype)))
        torch.add(result, gs if res_scale is None else gs * res_scale[:, None, None].to(g.dtype), out=dx[part])
    return dx, dscale, dres


@cpu_pool_mixer_backward.register_fake
def _(g, x, statistics, weight, layer_scale, res_scale, mask, pool_size):
    channels = x.shape[1]
    dres = x.new_empty(0 if res_scale is None else channels, dtype=torch.float32)
    return torch.empty_like(x), x.new_empty(channels, dtype=torch.float32), dres


def _pool_mixer_context(ctx, inputs, output):
    x, *parameters, ctx.pool_size, _, norm_bias = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], *parameters, norm_bias)


def _pool_mixer_backward(ctx, g, _):
    if g is None:
        return (None,) * 8
    x, statistics, weight, layer_scale, res_scale, mask, norm_bias = ctx.saved_tensors
    dx, dscale, dres = getattr(torch.ops, NAMESPACE).cpu_pool_mixer_backward(
        g.contiguous(memory_format=torch.channels_last),
        x,
        statistics,
        weight,
        layer_scale,
        res_scale,
        mask,
        ctx.pool_size,
    )
    dweight = None if weight is None else product(dscale, layer_scale).to(weight.dtype)
    dlayer = None if layer_scale is None else product(dscale, weight).to(layer_scale.dtype)
    dres = None if res_scale is None else dres.to(res_scale.dtype)
    dnorm_bias = torch.zeros_like(norm_bias) if ctx.needs_input_grad[7] else None
    return dx, dweight, dlayer, dres, None, None, None, dnorm_bias


cpu_pool_mixer.register_autograd(_pool_mixer_backward, setup_context=_pool_mixer_context)


@torch.library.custom_op(f"{NAMESPACE}::cpu_channel_mlp", mutates_args=())
def cpu_channel_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    act_scale: torch.Tensor | None,
    act_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: str,
    eps: float,
    dtype: torch.dtype,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    y (B, C, H, W), W1 n(x) + b1 (B H W, R), or (0, R) unless training, and mean and 1 / standard deviation (2, B).

    x is channels_last; products run in `dtype`.
    """
    inner = weight1.shape[0]
    settle_allocator()
    y, statistics = torch.empty_like(x), x.new_empty(2, x.shape[0], dtype=torch.float32)
    weight1, bias1, weight2, bias2 = cast(dtype, weight1, bias1, weight2, bias2)
    hidden = Hidden(activation, act_scale, act_bias)
    layer = None if layer_scale is None else layer_scale[None]
    parts = blocks(x, inner, BACKWARD_BLOCK if training else FORWARD_BLOCK)
    tokens = x[0, 0].numel()
    product2 = packed(weight2, parts, tokens)
    if training:
        # In one piece, since all of it is kept.
        normed, statistics[0], statistics[1] = _normalised(x, norm_weight, norm_bias, eps, dtype)
        z = linear(normed, weight1, bias1)
    else:
        z = x.new_empty(0, inner, dtype=dtype)
        product1 = packed(weight1, parts, tokens)
    for part in parts:
        if training:
            a = activate(z[part.start * tokens : part.stop * tokens], hidden)
        else:
            normed, statistics[0, part], statistics[1, part] = _normalised(x[part], norm_weight, norm_bias, eps, dtype)
            a = linear(normed, product1, bias1, EPILOGUES[activation])
            if "relu" in activation:
                a = activate(a, hidden, rectified=True)
        factor = product(layer, None if mask is None else mask[part, None])
        branch = as_map(linear(a, product2, bias2).to(x.dtype), x[part])
        add_branch(x[part], branch, factor, res_scale, y[part])
    return y, z, statistics


@cpu_channel_mlp.register_fake
def _(
    x,
    norm_weight,
    norm_bias,
    weight1,
    bias1,
    weight2,
    bias2,
    act_scale,
    act_bias,
    layer_scale,
    res_scale,
    mask,
    activation,
    eps,
    dtype,
    training,
):
    batch, _, height, width = x.shape
    z = x.new_empty(batch * height * width if training else 0, weight1.shape[0], dtype=dtype)
    return torch.empty_like(x), z, x.new_empty(2, batch, dtype=torch.float32)


def _normalised(
    x: torch.Tensor, weight: Optional, bias: Optional, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n(x) as a matrix (B H W, C), and mean and 1 / standard deviation (B,)."""
    normed, mean, rstd = group_norm(x, weight, bias, eps)
    return rows(normed.to(dtype)), mean[:, 0], rstd[:, 0]


def cast(dtype: torch.dtype, *tensors: Optional) -> list[Optional]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


@torch.library.custom_op(f"{NAMESPACE}::cpu_channel_mlp_backward", mutates_args=())
def cpu_channel_mlp_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    statistics: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    act_scale: torch.Tensor | None,
    act_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: str,
    eps: float,
) -> list[torch.Tensor]:
    """
    Gradients of x, both of the norm, weight1, bias1, weight2, bias2, both of the activation, and of both scales.

    That of x is like x, the others are float32 and there whether or not the parameter is.
    """
    _, channels, height, width = x.shape
    inner, dtype, tokens = z.shape[1], z.dtype, height * width
    dx = torch.empty_like(x)
    hidden = Hidden(activation, act_scale, act_bias)
    w1, w2 = cast(dtype, weight1, weight2)
    parts = blocks(x, inner, BACKWARD_BLOCK)
    # Transposed, as oneDNN takes weights: its products are a quarter faster here than those of torch.mm. The layer
    # scale goes into the second.
    w2_scaled = (w2 if layer_scale is None else w2 * layer_scale[:, None].to(dtype)).t().contiguous()
    w2_scaled, w1_transposed = packed(w2_scaled, parts, tokens), packed(w1.t().contiguous(), parts, tokens)
    zeros = {"dtype": torch.float32}
    dw1, dw2 = x.new_zeros(inner, channels, **zeros), x.new_zeros(channels, inner, **zeros)
    db1, db2 = x.new_zeros(inner, **zeros), x.new_zeros(channels, **zeros)
    dgamma, dbeta, dres = (x.new_zeros(channels, **zeros) for _ in range(3))
    dscale, dshift = x.new_zeros(1, **zeros), x.new_zeros(1, **zeros)
    gamma = torch.ones(channels) if norm_weight is None else norm_weight.float()
    for part in parts:
        xs, gs, before = x[part], g[part], z[part.start * tokens : part.stop * tokens]
        size = part.stop - part.start
        normed = rows(group_norm(xs, norm_weight, norm_bias, eps)[0].to(dtype))
        branch = rows(gs if mask is None else gs * mask[part, None, None, None].to(g.dtype)).to(dtype)
        a = activate(before, hidden)
        _accumulate(dw2, branch, a)
        db2 += branch.sum(0, dtype=torch.float32)
        da = linear(branch, w2_scaled, None)
        if act_scale is not None:
            dscale += torch.dot(da.flatten().float(), F.relu(before).square_().flatten().float())
        if act_bias is not None:
            dshift += da.sum(dtype=torch.float32)
        dz = differentiate(da, before, hidden)
        _accumulate(dw1, dz, normed)
        db1 += dz.sum(0, dtype=torch.float32)
        dn = as_map(linear(dz, w1_transposed, None).to(x.dtype), xs)
        mean, rstd = statistics[:, part, None].contiguous()
        dxs, dg, db = torch.ops.aten.native_group_norm_backward(
            dn, xs, mean, rstd, gamma, size, channels, tokens, 1, [True, True, True]
        )
        dgamma += dg
        dbeta += db
        if res_scale is not None:
            dres += (gs * xs).sum((0, 2, 3), dtype=torch.float32)
        torch.add(dxs, gs if res_scale is None else gs * res_scale[:, None, None].to(g.dtype), out=dx[part])
    # sum over tokens of g (W2 a + b2), from sums that are there already
    dlayer = (weight2.float() * dw2).sum(1)
    if bias2 is not None:
        dlayer += bias2.float() * db2
    if layer_scale is not None:
        dw2 *= layer_scale.float()[:, None]
        db2 *= layer_scale.float()
    return [dx, dgamma, dbeta, dw1, db1, dw2, db2, dscale, dshift, dlayer, dres]


@cpu_channel_mlp_backward.register_fake
def _(
    g,
    x,
    z,
    statistics,
    norm_weight,
    norm_bias,
    weight1,
    weight2,
    bias2,
    act_scale,
    act_bias,
    layer_scale,
    res_scale,
    mask,
    activation,
    eps,
):
    inner, channels = weight1.shape
    shapes = [(channels,), (channels,), (inner, channels), (inner,), (channels, inner), (channels,)]
    shapes += [(1,), (1,), (channels,), (channels,)]
    return [torch.empty_like(x), *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)]


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor):
    """total += left^T right; left (M, P), right (M, Q), total (P, Q) float32."""
    if left.dtype == torch.float32:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


def _channel_mlp_context(ctx, inputs, output):
    x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, *rest, ctx.activation, ctx.eps, _, _ = inputs
    _, z, statistics = output
    ctx.mark_non_differentiable(z, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, z, statistics, norm_weight, norm_bias, weight1, bias1, weight2, bias2, *rest)


def _channel_mlp_backward(ctx, g, *_):
    if g is None:
        return (None,) * 16
    x, z, statistics, norm_weight, norm_bias, weight1, bias1, weight2, *rest = ctx.saved_tensors
    g = g.contiguous(memory_format=torch.channels_last)
    dx, *gradients = getattr(torch.ops, NAMESPACE).cpu_channel_mlp_backward(
        g, x, z, statistics, norm_weight, norm_bias, weight1, weight2, *rest, ctx.activation, ctx.eps
    )
    parameters = (norm_weight, norm_bias, weight1, bias1, weight2, *rest[:-1])
    gradients = [
        None if parameter is None else gradient.to(parameter.dtype)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    return dx, *gradients, None, None, None, None, None


cpu_channel_mlp.register_autograd(_channel_mlp_backward, setup_context=_channel_mlp_context)
count_products("cpu_channel_mlp", 2, x=0, weight1=3)
count_products("cpu_channel_mlp_backward", 4, x=1, weight1=6)


# ---------------------------------------------------------------------------------------------------------------------
# Inference


class Norm(NamedTuple):
    """n(x), over all of a sample ("group") or over the channels of each token ("channel"); both vectors (C,)."""

    kind: str
    weight: Optional
    bias: Optional
    eps: float

    def rows(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """n(x) of x (B, C, H, W) as a matrix (B H W, C)."""
        if self.kind == "group":
            return rows(group_norm(x, self.weight, self.bias, self.eps)[0].to(dtype))
        weight, bias = cast(x.dtype, self.weight, self.bias)
        return F.layer_norm(rows(x), x.shape[1:2], weight, bias, self.eps).to(dtype)


class Residual(NamedTuple):
    """What adds a branch to its shortcut: both scales (C,), or None for 1."""

    layer_scale: Optional
    res_scale: Optional

    def add(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """res_scale x + layer_scale branch, (B, C, H, W), in the memory of branch (B H W, C)."""
        branch = as_map(branch.to(x.dtype), x)
        add_branch(x, branch, None if self.layer_scale is None else self.layer_scale[None], self.res_scale, out=branch)
        return branch

    def add_product(self, x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, bias: Optional) -> torch.Tensor:
        """The same for the branch a weight^T + bias: a (B H W, R), weight (C, R), which may be packed."""
        if self.layer_scale is not None or a.dtype != x.dtype:
            return self.add(x, linear(a, weight, bias))
        shortcut = rows(x) if self.res_scale is None else rows(x) * self.res_scale.to(x.dtype)
        return as_map(torch.ops.mkldnn._linear_pointwise.binary(a, shortcut, weight, bias, "add"), x)


class Pooling(NamedTuple):
    """The branch `ops.pool_mixer`; scale (C,) is the norm's weight times the layer scale."""

    scale: Optional
    res_scale: Optional
    pool_size: int
    eps: float

    @classmethod
    def prepare(cls, dtype: torch.dtype, weight, layer_scale, res_scale, pool_size, eps) -> "Pooling":
        return cls(product(weight, layer_scale), res_scale, pool_size, eps)

    def width(self, channels: int) -> int:
        return channels

    def pack(self, tokens: int) -> "Pooling":
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return mix(x, self.scale, self.res_scale, None, self.pool_size, self.eps, None)[0]


class MLP(NamedTuple):
    """The branch `ops.channel_mlp`."""

    norm: Norm
    weight1: torch.Tensor
    bias1: Optional
    weight2: torch.Tensor
    bias2: Optional
    hidden: Hidden
    residual: Residual

    @classmethod
    def prepare(
        cls,
        dtype: torch.dtype,
        norm,
        norm_weight,
        norm_bias,
        weight1,
        bias1,
        weight2,
        bias2,
        activation,
        act_scale,
        act_bias,
        layer_scale,
        res_scale,
        eps,
    ) -> "MLP":
        weights = cast(dtype, matrix(weight1), bias1, matrix(weight2), bias2)
        hidden, residual = Hidden(activation, act_scale, act_bias), Residual(layer_scale, res_scale)
        return cls(Norm(norm, norm_weight, norm_bias, eps), *weights, hidden, residual)

    def width(self, channels: int) -> int:
        return self.weight1.shape[0]

    def pack(self, tokens: int) -> "MLP":
        """With what scales and shifts the hidden activation, and the layer scale, in the second product."""
        weight2, bias2, hidden, layer_scale = self.weight2, self.bias2, self.hidden, self.residual.layer_scale
        if hidden.bias is not None:
            shift = weight2.sum(1, dtype=torch.float32) * hidden.bias.float()
            bias2 = (shift if bias2 is None else bias2 + shift).to(weight2.dtype)
        if layer_scale is not None and bias2 is not None:
            bias2 = bias2 * layer_scale.to(bias2.dtype)
        scale = product(layer_scale, hidden.scale)
        if scale is not None:
            weight2 = weight2 * scale.to(weight2.dtype)[:, None]
        return self._replace(
            weight1=pack(self.weight1, tokens),
            weight2=pack(weight2, tokens),
            bias2=bias2,
            hidden=Hidden(hidden.name, None, None),
            residual=self.residual._replace(layer_scale=None),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        a = linear(self.norm.rows(x, self.weight1.dtype), self.weight1, self.bias1, EPILOGUES[self.hidden.name])
        if "relu" in self.hidden.name:
            a = activate(a, self.hidden, rectified=True)
        return self.residual.add_product(x, a, self.weight2, self.bias2)


class SeparableConv(NamedTuple):
    """The branch `ops.separable_conv`."""

    norm: Norm
    weight1: torch.Tensor
    hidden: Hidden
    depthwise_weight: torch.Tensor
    weight2: torch.Tensor
    residual: Residual

    @classmethod
    def prepare(
        cls,
        dtype: torch.dtype,
        norm_weight,
        weight1,
        act_scale,
        act_bias,
        depthwise_weight,
        weight2,
        layer_scale,
        res_scale,
        eps,
    ) -> "SeparableConv":
        weight1, depthwise_weight, weight2 = cast(dtype, matrix(weight1), depthwise_weight, matrix(weight2))
        norm, hidden = Norm("channel", norm_weight, None, eps), Hidden("star_relu", act_scale, act_bias)
        return cls(norm, weight1, hidden, depthwise_weight, weight2, Residual(layer_scale, res_scale))

    def width(self, channels: int) -> int:
        return 2 * self.weight1.shape[0]

    def pack(self, tokens: int) -> "SeparableConv":
        return self._replace(weight1=pack(self.weight1, tokens), weight2=pack(self.weight2, tokens))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        a = linear(self.norm.rows(x, self.weight1.dtype), self.weight1, None, EPILOGUES[self.hidden.name])
        a = as_map(activate(a, self.hidden, rectified=True), x)
        padding = self.depthwise_weight.shape[-1] // 2
        a = F.conv2d(a, self.depthwise_weight, padding=padding, groups=a.shape[1])
        return self.residual.add_product(x, rows(a), self.weight2, None)


class Attention(NamedTuple):
    """Norm, attention over all tokens of a sample, shortcut; weights as those of linear layers."""

    norm: Norm
    qkv_weight: torch.Tensor
    qkv_bias: Optional
    weight: torch.Tensor
    bias: Optional
    heads: int
    residual: Residual

    @classmethod
    def prepare(
        cls,
        dtype: torch.dtype,
        norm,
        norm_weight,
        norm_bias,
        qkv_weight,
        qkv_bias,
        weight,
        bias,
        heads,
        layer_scale,
        res_scale,
        eps,
    ) -> "Attention":
        weights = cast(dtype, matrix(qkv_weight), qkv_bias, matrix(weight), bias)
        residual = Residual(layer_scale, res_scale)
        return cls(Norm(norm, norm_weight, norm_bias, eps), *weights, heads, residual)

    def width(self, channels: int) -> int:
        return self.qkv_weight.shape[0]

    def pack(self, tokens: int) -> "Attention":
        return self._replace(qkv_weight=pack(self.qkv_weight, tokens), weight=pack(self.weight, tokens))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        qkv = linear(self.norm.rows(x, self.qkv_weight.dtype), self.qkv_weight, self.qkv_bias)
        # Views (3, B, heads, N, head_dim), and what comes out has the heads of a token side by side.
        qkv = qkv.view(x.shape[0], -1, 3, self.heads, qkv.shape[1] // (3 * self.heads)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv).transpose(1, 2)
        return self.residual.add_product(x, mixed.flatten(2).flatten(0, 1), self.weight, self.bias)


class Mixing(NamedTuple):
    """Norm, a product over the tokens of a sample by matrix (N, N), None for the identity, shortcut."""

    norm: Norm
    matrix: Optional
    residual: Residual

    @classmethod
    def prepare(
        cls, dtype: torch.dtype, norm, norm_weight, norm_bias, matrix, layer_scale, res_scale, eps
    ) -> "Mixing":
        (matrix,) = cast(dtype, matrix)
        return cls(Norm(norm, norm_weight, norm_bias, eps), matrix, Residual(layer_scale, res_scale))

    def width(self, channels: int) -> int:
        return channels

    def pack(self, tokens: int) -> "Mixing":
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.matrix is None:
            return self.residual.add(x, self.norm.rows(x, x.dtype))
        normed = self.norm.rows(x, self.matrix.dtype).unflatten(0, (x.shape[0], -1))
        mixed = torch.bmm(self.matrix.expand(x.shape[0], -1, -1), normed)
        return self.residual.add(x, mixed.flatten(0, 1))


# By the names that branches.py gives them.
BRANCHES = {
    "pool_mixer": Pooling,
    "channel_mlp": MLP,
    "separable_conv": SeparableConv,
    "attention": Attention,
    "mixing": Mixing,
}
Branch = Pooling | MLP | SeparableConv | Attention | Mixing


def matrix(weight: torch.Tensor) -> torch.Tensor:
    """The weight of a linear layer or of a 1x1 convolution as (R, C)."""
    return weight.flatten(1).contiguous()


def pack(weight: torch.Tensor, tokens: int) -> torch.Tensor:
    """weight (R, C) as oneDNN wants it for products with `tokens` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, tokens)


def infer(x: torch.Tensor, branches: list[Branch]) -> torch.Tensor:
    """
    Branches in sequence without gradients, a few samples at a time through all of them: these stay in the caches.

    x is (B, C, H, W); the result is like x in channels_last memory.
    """
    settle_allocator()
    x = x.contiguous(memory_format=torch.channels_last)
    parts = blocks(x, max(branch.width(x.shape[1]) for branch in branches), FORWARD_BLOCK)
    if len(parts) == 1:
        return _infer_part(x, branches)
    tokens = x[parts[0], 0].numel()
    branches = [branch.pack(tokens) for branch in branches]
    y = torch.empty_like(x)
    for part in parts:
        y[part] = _infer_part(x[part], branches)
    return y


def _infer_part(x: torch.Tensor, branches: list[Branch]) -> torch.Tensor:
    for branch in branches:
        x = branch(x)
    return x
