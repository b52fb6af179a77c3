"""The branches of a MetaFormer block as formulas: what its modules compute, and what kernels are held against.

    pool_mixer      res_scale * x + layer_scale * mask * (pool(n(x)) - n(x))
    channel_mlp     res_scale * x + layer_scale * mask * (W2 act(W1 n(x) + b1) + b2)
    separable_conv  res_scale * x + layer_scale * mask * (W2 depthwise(star_relu(W1 n(x))))

n is GroupNorm with one group, whose mean and variance are the `statistics` of each sample; of the second paper's MLPs
and separable convolutions it is LayerNorm over the channels of each token. `backends.py` says who computes them.
"""

import torch
from torch.nn import functional as F


def sample_statistics(x: torch.Tensor) -> torch.Tensor:
    """Mean and biased variance (B, 2) of each sample of x (B, C, H, W), in float32 (float64 for float64)."""
    x = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(x, dim=(1, 2, 3), correction=0)
    return torch.stack((mean, variance), dim=1)


def pool_mixer(
    x: torch.Tensor,
    *,
    pool_size: int,
    eps: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    res_scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The first branch with pooling as the token mixer, and its shortcut.

    Args:
        x: (B, C, H, W), and so is the result.
        pool_size: odd; the average is over the tokens of the window that lie in the image.
        weight, bias: (C,), the norm's. The bias cancels: the average of a constant is that constant.
        layer_scale, res_scale: (C,), or None for 1.
        mask: (B,), a factor of each sample's branch: 0 or 1 / (1 - rate) for DropPath.
    """
    if pool_size < 1 or pool_size % 2 == 0:
        raise ValueError(f"pool_size must be odd and positive but is {pool_size}")
    normed = F.group_norm(x, 1, weight, bias, eps)
    branch = F.avg_pool2d(normed, pool_size, stride=1, padding=pool_size // 2, count_include_pad=False) - normed
    return residual(x, drop(branch, mask), layer_scale, res_scale)


def channel_mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    *,
    activation: str,
    eps: float,
    norm: str = "group",
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    act_scale: torch.Tensor | None = None,
    act_bias: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    res_scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The second branch, and its shortcut.

    Args:
        x: (B, C, H, W), and so is the result.
        weight1, weight2: (R, C) and (C, R), or as 1x1 convolutions have them, (R, C, 1, 1) and (C, R, 1, 1).
        activation: one of `ACTIVATIONS`; act_scale and act_bias, (1,), are what star_relu learns.
        norm: "group" or "channel", as in `normalise`.
        norm_weight, norm_bias, bias2: (C,), bias1 (R,), or None for 1 or 0.
        layer_scale, res_scale, mask: as in `pool_mixer`.
    """
    hidden = pointwise(normalise(x, norm, norm_weight, norm_bias, eps), weight1, bias1)
    hidden = activate(hidden, activation, act_scale, act_bias)
    return residual(x, drop(pointwise(hidden, weight2, bias2), mask), layer_scale, res_scale)


def separable_conv(
    x: torch.Tensor,
    weight1: torch.Tensor,
    depthwise_weight: torch.Tensor,
    weight2: torch.Tensor,
    *,
    eps: float,
    norm_weight: torch.Tensor | None = None,
    act_scale: torch.Tensor | None = None,
    act_bias: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    res_scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The first branch with a separable convolution as the token mixer, and its shortcut; n is over the channels.

    Args:
        x: (B, C, H, W), and so is the result.
        weight1, weight2: (R, C) and (C, R), or as 1x1 convolutions have them.
        depthwise_weight: (R, 1, K, K), K odd; around the image there are zeros.
        norm_weight, layer_scale, res_scale: (C,), or None for 1.
        act_scale, act_bias: (1,), what star_relu learns.
        mask: as in `pool_mixer`.
    """
    hidden = pointwise(normalise(x, "channel", norm_weight, None, eps), weight1)
    hidden = activate(hidden, "star_relu", act_scale, act_bias)
    padding = depthwise_weight.shape[-1] // 2
    hidden = F.conv2d(hidden, depthwise_weight, padding=padding, groups=hidden.shape[1])
    return residual(x, drop(pointwise(hidden, weight2), mask), layer_scale, res_scale)


def normalise(
    x: torch.Tensor, norm: str, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """n(x) of x (B, C, H, W), with statistics over all of a sample ("group") or over the channels of each token
    ("channel"); weight and bias (C,), or None for 1 and 0."""
    if norm == "group":
        return F.group_norm(x, 1, weight, bias, eps)
    if norm == "channel":
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)
    raise ValueError(f"Unknown norm {norm!r}: neither group nor channel")


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A product over the channels of x (B, C, H, W); weight (R, C) or (R, C, 1, 1), bias (R,)."""
    return F.conv2d(x, weight.view(*weight.shape[:2], 1, 1), bias)


def drop(branch: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Each sample of `branch` (B, C, H, W) times its entry of `mask` (B,); None drops nothing."""
    return branch if mask is None else branch * mask[:, None, None, None]


def residual(
    shortcut: torch.Tensor, branch: torch.Tensor, layer_scale: torch.Tensor | None, res_scale: torch.Tensor | None
) -> torch.Tensor:
    """`res_scale * shortcut + layer_scale * branch`; scales (C,) or None for 1, the rest (B, C, H, W)."""
    if res_scale is not None:
        shortcut = shortcut * res_scale[:, None, None]
    if layer_scale is None:
        return shortcut + branch
    # Into the product, which is made here and nobody else holds: a fresh result would cost more than the addition.
    return (branch * layer_scale[:, None, None]).add_(shortcut)


def squared_relu(z: torch.Tensor) -> torch.Tensor:
    """`relu(z)**2`, of any shape."""
    return F.relu(z).square()


# star_relu is the square with a scale and a shift, which `activate` adds.
ACTIVATIONS = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": squared_relu,
    "star_relu": squared_relu,
}


def activate(
    z: torch.Tensor, activation: str, act_scale: torch.Tensor | None = None, act_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The activations of `ACTIVATIONS`; act_scale and act_bias (1,) are star_relu's."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}: not one of {', '.join(ACTIVATIONS)}")
    result = ACTIVATIONS[activation](z)
    if act_scale is not None:
        result = act_scale * result
    if act_bias is not None:
        result = result + act_bias
    return result


__all__ = [
    "ACTIVATIONS",
    "activate",
    "channel_mlp",
    "drop",
    "normalise",
    "pool_mixer",
    "residual",
    "sample_statistics",
    "separable_conv",
]
