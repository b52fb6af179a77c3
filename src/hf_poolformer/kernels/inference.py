"""Branches in sequence without gradients, by Triton's kernels, recorded (`recordings.py`).

They are plain functions, so that PyTorch's dispatcher does not come between; and what one branch knows of the
statistics of its result, the next one need not read the result for.
"""

import functools
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from . import separable_conv
from .launch import by_library, cast, float32, on, precision
from .mlp_forward import is_whole, mlp_from_partials
from .mlp_parts import Parameters
from .pool_mixer import mix_partially
from .recordings import Recorded
from .statistics import combine, sample_statistics, token_statistics
from .token_norm import add_to_shortcut, normalise, token_rows


# Of a branch: the name of its operation, and that operation's arguments beside x, as in `branches.py`.
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
    x (B, C, H, W) in channels_last memory, through "pool_mixer", "separable_conv", "attention" and "channel_mlp".

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


class Known(NamedTuple):
    """What is known of the statistics of x: nothing, or one of these."""

    statistics: torch.Tensor | None = None
    partials: torch.Tensor | None = None  # (3, any, any), of which they are to be combined


def run(given: list[torch.Tensor | None], branches: list[Branch], dtype: torch.dtype) -> list[torch.Tensor]:
    x, statistics, *_ = given  # the others are those of the branches
    known = Known(statistics)
    for place, (name, arguments) in enumerate(branches):
        wanted = wanted_statistics(branches[place + 1], x, dtype) if place + 1 < len(branches) else None
        x, known = BRANCHES[name](x, known, wanted, dtype, **arguments)
    return [x]


def wanted_statistics(branch: Branch, x: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Of what a branch on what is like x needs statistics first: "samples", "tokens", or of nothing."""
    name, arguments = branch
    if name == "pool_mixer" or arguments.get("norm") == "group":
        return "samples"
    return "tokens" if name == "channel_mlp" and not is_whole(x.shape[1], dtype) else None


def known_samples(x: torch.Tensor, known: Known) -> torch.Tensor:
    """Statistics (B, 2) of the samples of x."""
    if known.partials is not None:
        return combine(known.partials, x.shape[0])
    return sample_statistics(x) if known.statistics is None else known.statistics


def statistics_for(x: torch.Tensor, known: Known, norm: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Statistics of x for a norm, "group" (B, 2) or "channel" (B H W, 2); or memory for them, and partials of which it
    is to be filled."""
    if known.partials is not None:
        return float32(x, x.shape[0] if norm == "group" else x.numel() // x.shape[1], 2), known.partials
    if known.statistics is not None:
        return known.statistics, None
    return sample_statistics(x) if norm == "group" else token_statistics(x), None


def _pool_mixer(x, known, wanted, dtype, *, pool_size, eps, weight, layer_scale, res_scale):
    scales = _contiguous(weight, layer_scale, res_scale)
    y, partials = mix_partially(x, known_samples(x, known), *scales, None, pool_size, eps, wanted == "samples")
    return y, Known(partials=partials)


def _channel_mlp(x, known, wanted, dtype, *, norm, activation, eps, **parameters):
    if norm == "channel" and is_whole(x.shape[1], dtype):
        statistics = partials = None
    else:
        statistics, partials = statistics_for(x, known, norm)
    parameters = Parameters(*_contiguous(*Parameters(**parameters)))
    with_statistics = wanted == "samples" and norm == "group"
    y, after, _, _ = mlp_from_partials(
        x, statistics, partials, parameters, None, activation, eps, dtype, False, with_statistics
    )
    return y, Known(after)


def _separable_conv(x, known, wanted, dtype, *, eps, **parameters):
    parameters = separable_conv.Parameters(*_contiguous(*separable_conv.Parameters(**parameters)))
    y, _, partials = separable_conv.separate_partially(x, parameters, None, eps, dtype, wanted == "tokens")
    return y, Known(partials=partials)


def _attention(
    x,
    known,
    wanted,
    dtype,
    *,
    norm,
    heads,
    eps,
    norm_weight,
    norm_bias,
    qkv_weight,
    qkv_bias,
    weight,
    bias,
    layer_scale,
    res_scale,
):
    norm_weight, norm_bias, layer_scale, res_scale = _contiguous(norm_weight, norm_bias, layer_scale, res_scale)
    with on(x):
        rows = token_rows(normalise(x, norm_weight, norm_bias, eps, dtype))
        qkv = by_library(F.linear, rows, *_cast(dtype, qkv_weight, qkv_bias))
        mixed = by_library(functools.partial(attend, batch=x.shape[0], heads=heads), qkv)
        branch = by_library(F.linear, mixed, *_cast(dtype, weight, bias))
        y, statistics = add_to_shortcut(x, branch, layer_scale, res_scale, None, x.dtype, wanted == "tokens")
        return y, Known(statistics)


def attend(qkv: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """Attention between the tokens of each sample, (M, inner); qkv (M, 3 inner)."""
    query, key, value = (
        part.transpose(1, 2) for part in qkv.view(batch, -1, 3, heads, qkv.shape[1] // 3 // heads).unbind(2)
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    return mixed.transpose(1, 2).reshape(qkv.shape[0], -1).contiguous()


def _cast(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else cast(tensor, dtype) for tensor in tensors]


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


# Each takes x, what is known of its statistics, of what those of the result are wanted ("samples", "tokens" or None),
# the dtype of products, and the branch's arguments; it returns the result, and what is known of its statistics.
BRANCHES = {
    "pool_mixer": _pool_mixer,
    "channel_mlp": _channel_mlp,
    "separable_conv": _separable_conv,
    "attention": _attention,
}
