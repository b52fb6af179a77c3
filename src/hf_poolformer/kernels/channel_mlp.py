"""MLP branch of the block: y = res_scale * x + mask * layer_scale * (W2 act(W1 n(x) + b1) + b2).

Rows are tokens, M = B H W of them. n is a GroupNorm(1), with one mean mu and r = rstd per sample, or a LayerNorm over
channels, with one per token: `span` tokens share them, H W or 1. Below, N is span * C, what a mean is taken over.

    x^ = (x - mu) r,  n(x) = gamma x^ + beta,  z = W1 n(x) + b1 = x^ F^T + v,  F = W1 gamma,  v = b1 + W1 beta

Up to 128 channels one kernel does it all: a tile's tokens are read once, normalised in registers, and the hidden
activation never leaves the chip; an H100 takes 0.4 to 0.6 of the time of two kernels. Beyond, every program would
read all weights from L2 for few tokens, and two products win. There the norm is folded into the first one, so that
tokens go from memory to the matrix units as they are,

    z = r (x F^T) - r mu u + v,    u = F 1

where u sums F as rounded for the product, so that a mean far from zero cancels to float32 accuracy. F, u and v are
made anew in every call: weights may change in ways that nothing tells (see fused_operations.py). In whole stages that
takes no launch of its own, but some programs of the one that combines the statistics of x.

Backward. z and x^ are kept, in the precision of the products: 5 elements per channel and token. (With one kernel x^
takes the place of x; with two it is made from x when it is needed.) act(z) is recomputed from z; recomputing z as well
would cost a sixth of the step's arithmetic and as many bytes as writing it. With g = dL/dy, m = mask:

    dz = m (g layer_scale W2) act'(z)      q = dz F       dx = res_scale g + r (q - sum q / N - x^ sum(q x^) / N)
    dF = dz^T x^         dW1 = dF gamma + dv beta^T       db1 = dv = dz^T 1
    dgamma = sum_k dF W1         dbeta = W1^T dv          G = g^T (m act(z)),   sum m g = g^T m
    dW2 = layer_scale G          db2 = layer_scale sum m g           dlayer_scale = sum_k W2 G + b2 sum m g

No kernel sums over tokens: such sums in the epilogue of the first product (64 by 64 entries of dz) take as long as all
the rest of it. x^ and act(z) have more columns than entries instead, of ones and of m: dv and sum m g are the last
columns of dF and G. The sums over a sample are taken of q, which is a quarter as large as dz. For star_relu,
act(z) = a p + b with p = relu(z)^2, the columns are those of p, and G = a g^T (m p) + b sum m g; the gradients of a
and b follow from sums over weights. dF and G reduce over all tokens: those two products are cuBLAS's, which splits
them; the other four are Triton's. What makes the parameters' gradients of dF and G is one launch, which also finishes
all sums that an earlier one began; what it begins itself is left to the last, which makes dx.
"""

import torch

from .flops import count_products
from .launch import empty_nhwc, float32
from .mlp_backward import mlp_gradients
from .mlp_forward import keeps_normed, mlp_from_partials
from .mlp_parts import Parameters, stride_of
from .registration import differentiable


def mlp(
    x: torch.Tensor,
    statistics: torch.Tensor,
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
    save: bool,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """
    y (B, C, H, W), its statistics, if wanted, and for backward (`save`) z (M, R) and x^; None for what is not there.

    x (B, C, H, W) channels_last, statistics float32 of x: (B, 2) of its samples, or (B H W, 2) of its tokens, which
    says what the norm is; those of y are of the same kind. weight1 (R, C) and weight2 (C, R), which may have further
    dimensions of size 1, act_scale and act_bias (1,) of star_relu, mask (B,), all other vectors (C,) but bias1 (R,).
    `dtype` is that of the products; x^, (M, more than C), is kept where it was made anyway. Without `save` there is no
    backward.
    """
    parameters = Parameters(
        norm_weight, norm_bias, weight1, bias1, weight2, bias2, act_scale, act_bias, layer_scale, res_scale
    )  # fmt: skip
    return mlp_from_partials(x, statistics, None, parameters, mask, activation, eps, dtype, save, with_statistics)


def mlp_backward(
    g: torch.Tensor,
    source: torch.Tensor,
    statistics: torch.Tensor,
    preactivation: torch.Tensor,
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
    wanted: list[bool],
) -> list[torch.Tensor | None]:
    """
    The gradients of x and of the ten parameters, norm_weight to res_scale; None for those not `wanted`, ten flags.

    `source` is x (B, C, H, W) or x^ (M, more than C), whichever the forward operation left.
    """
    parameters = Parameters(
        norm_weight, norm_bias, weight1, bias1, weight2, bias2, act_scale, act_bias, layer_scale, res_scale
    )  # fmt: skip
    return mlp_gradients(g, source, statistics, preactivation, parameters, mask, activation, eps, wanted)


def _fake(x, statistics, norm_weight, norm_bias, weight1, *rest):
    *_, dtype, save, with_statistics = rest
    batch, channels, height, width = x.shape
    rows = batch * height * width
    keeps = save and keeps_normed(x, dtype)
    return (
        empty_nhwc(x),
        float32(x, statistics.shape[0], 2) if with_statistics else None,
        x.new_empty((rows, weight1.shape[0]), dtype=dtype) if save else None,
        x.new_empty((rows, stride_of(channels)), dtype=dtype) if keeps else None,
    )


def _keep(inputs, results):
    x, statistics, *parameters, mask, activation, eps, dtype, _, _ = inputs
    _, _, preactivation, normed = results
    source = normed if keeps_normed(x, dtype) else x
    return (source, statistics, preactivation, *parameters, mask), (activation, eps)


channel_mlp = differentiable(
    "channel_mlp", mlp, mlp_backward, fake=_fake, keep=_keep, parameters=Parameters._fields, flag="save"
)
count_products("channel_mlp", 2, x=0, weight1=4)
count_products("channel_mlp_backward", 4, x=0, weight1=6)
