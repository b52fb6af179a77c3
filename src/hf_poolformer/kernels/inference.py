"""Branches in sequence without gradients, by Triton's kernels: from launch to launch without PyTorch's dispatcher.

A GPU computes an operation on a few images in a fraction of the time that it takes to get there: the dispatcher,
custom operations in Python, devices and autocast looked at each time. Here all that happens once for a stage; and what
one branch knows of the statistics of its result, the next one need not read the result for.
"""

from typing import Any

import torch

from .channel_mlp import mlp
from .launch import on
from .pool_mixer import mix
from .separable_conv import separate
from .statistics import of_samples, of_tokens


# Of a branch: the name of its operation, and that operation's arguments beside x, as in `backends.py`.
Branch = tuple[str, dict[str, Any]]


def infer(x: torch.Tensor, branches: list[Branch], dtype: torch.dtype) -> torch.Tensor:
    """
    x (B, C, H, W) in channels_last memory, through "pool_mixer", "channel_mlp" and "separable_conv".

    Args:
        dtype: of products.
    """
    statistics = None
    with on(x):
        for place, (name, arguments) in enumerate(branches):
            following = branches[place + 1] if place + 1 < len(branches) else None
            x, statistics = BRANCHES[name](x, statistics, takes_samples(following), dtype, **arguments)
    return x


def takes_samples(branch: Branch | None) -> bool:
    """Whether a branch begins with the statistics of samples."""
    return branch is not None and (branch[0] == "pool_mixer" or branch[1].get("norm") == "group")


def _pool_mixer(x, statistics, with_statistics, dtype, *, pool_size, eps, weight, layer_scale, res_scale):
    if statistics is None:
        statistics = of_samples(x)
    scales = _contiguous(weight, layer_scale, res_scale)
    y, statistics = mix(x, statistics, *scales, None, pool_size, eps, with_statistics)
    return y, statistics if with_statistics else None


def _channel_mlp(
    x,
    statistics,
    with_statistics,
    dtype,
    *,
    norm,
    activation,
    eps,
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
):
    if norm == "channel":
        statistics, with_statistics = of_tokens(x), False
    elif statistics is None:
        statistics = of_samples(x)
    tensors = (norm_weight, norm_bias, weight1.flatten(1), bias1, weight2.flatten(1), bias2, act_scale, act_bias)
    tensors = _contiguous(*tensors, layer_scale, res_scale)
    y, statistics, _, _ = mlp(x, statistics, *tensors, None, activation, eps, dtype, False, with_statistics)
    return y, statistics if with_statistics else None


def _separable_conv(
    x,
    statistics,
    with_statistics,
    dtype,
    *,
    eps,
    norm_weight,
    weight1,
    act_scale,
    act_bias,
    depthwise_weight,
    weight2,
    layer_scale,
    res_scale,
):
    tensors = (norm_weight, weight1.flatten(1), act_scale, act_bias, depthwise_weight, weight2.flatten(1))
    y, _ = separate(x, *_contiguous(*tensors, layer_scale, res_scale), None, eps, dtype, False)
    return y, None


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


# Each takes x, its statistics of samples if they are known, whether those of the result are wanted, the dtype of
# products, and the branch's arguments; it returns the result and its statistics, or None.
BRANCHES = {"pool_mixer": _pool_mixer, "channel_mlp": _channel_mlp, "separable_conv": _separable_conv}
