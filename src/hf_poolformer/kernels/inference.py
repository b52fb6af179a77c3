"""Branches in sequence without gradients, by Triton's kernels, recorded (`recordings.py`).

They are plain functions, so that PyTorch's dispatcher does not come between; and what one branch knows of the
statistics of its result, the next one need not read the result for.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .channel_mlp import mlp
from .launch import precision
from .pool_mixer import mix
from .recordings import Recorded
from .separable_conv import separate
from .statistics import sample_statistics, token_statistics


# Of a branch: the name of its operation, and that operation's arguments beside x, as in `backends.py`.
Branch = tuple[str, dict[str, Any]]
_recorded: WeakKeyDictionary[nn.Module, Recorded] = WeakKeyDictionary()


def infer(
    stage: nn.Module,
    x: torch.Tensor,
    branches: list[Branch],
    dtype: torch.dtype,
    statistics: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    x (B, C, H, W) in channels_last memory, through "pool_mixer", "channel_mlp" and "separable_conv".

    Args:
        stage: whose branches they are.
        dtype: of products.
        statistics: (B, 2) of x, where they are known.
    """
    if stage not in _recorded:
        _recorded[stage] = Recorded(run)
    weights, kind = split(branches)
    kind = dtype, precision(dtype), *kind
    return _recorded[stage]([x, statistics, *weights], branches, dtype, kind=kind)[0]


def split(branches: list[Branch]) -> tuple[list[torch.Tensor], list[Any]]:
    """The tensors among the arguments of branches, and everything else that there is."""
    values = [value for _, arguments in branches for value in arguments.values()]
    rest = [None if isinstance(value, torch.Tensor) else value for value in values]
    return [value for value in values if isinstance(value, torch.Tensor)], [name for name, _ in branches] + rest


def run(given: list[torch.Tensor | None], branches: list[Branch], dtype: torch.dtype) -> list[torch.Tensor]:
    x, statistics, *_ = given  # the others are those of the branches
    for place, (name, arguments) in enumerate(branches):
        following = branches[place + 1] if place + 1 < len(branches) else None
        x, statistics = BRANCHES[name](x, statistics, takes_samples(following), dtype, **arguments)
    return [x]


def takes_samples(branch: Branch | None) -> bool:
    """Whether a branch begins with the statistics of samples."""
    return branch is not None and (branch[0] == "pool_mixer" or branch[1].get("norm") == "group")


def _pool_mixer(x, statistics, with_statistics, dtype, *, pool_size, eps, weight, layer_scale, res_scale):
    if statistics is None:
        statistics = sample_statistics(x)
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
        statistics, with_statistics = token_statistics(x), False
    elif statistics is None:
        statistics = sample_statistics(x)
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
