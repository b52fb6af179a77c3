"""All blocks of a stage in training as one function of autograd, by Triton's kernels, recorded (`recordings.py`).

A step of two operations for each block and direction is bound by Python and by autograd's nodes, not by the GPU. Here
a stage is one node, and its forward and its backward are loops over launches. What is kept for backward, and all
gradients, are those of the operations one by one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from . import separable_conv
from .channel_mlp import mlp_backward
from .inference import Known, known_samples, statistics_for
from .launch import precision
from .mlp_forward import mlp_from_partials
from .mlp_parts import Parameters
from .pool_mixer import PARAMETERS, mix_backward, mix_partially
from .recordings import Recorded


class Operation(NamedTuple):
    """What a branch may be."""

    tensors: tuple[str, ...]  # of its arguments, all but the mask of those with gradients
    settings: tuple[str, ...]  # the other arguments that both directions take
    kept: int  # how many tensors for backward
    # (x, what is known of its statistics, norm of the next branch, dtype of products, own norm, tensors, mask,
    # *settings) to y, what is known of its statistics, and what is kept
    forward: Callable[..., tuple[torch.Tensor, Known, list[torch.Tensor]]]
    # (g, *kept, *tensors, mask, *settings, which gradients are wanted) to those of x and of the tensors
    backward: Callable[..., list[torch.Tensor | None]]


class Branch(NamedTuple):
    """A branch as recordings know it, without its tensors."""

    name: str  # of its operation
    norm: str | None  # whose statistics must be known before: of samples ("group") or of tokens ("channel")
    settings: tuple[Any, ...]

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.name]


class Stage:
    """The recordings of a stage."""

    def __init__(self):
        self.forward = Recorded(forward)
        self.backward = Recorded(backward)


_stages: WeakKeyDictionary[nn.Module, Stage] = WeakKeyDictionary()


def train(
    stage: nn.Module,
    x: torch.Tensor,
    branches: list[tuple[str, dict[str, Any]]],
    dtype: torch.dtype,
    statistics: torch.Tensor | None,
) -> torch.Tensor:
    """
    x (B, C, H, W) in channels_last memory through branches "pool_mixer", "separable_conv" and "channel_mlp".

    Args:
        stage: whose branches they are.
        branches: names and arguments, the tensors contiguous; with "mask" (B,) or None, and of "pool_mixer"
            "norm_bias".
        dtype: of products.
        statistics: (B, 2) of x, where they are known.
    """
    if stage not in _stages:
        _stages[stage] = Stage()
    tensors: list[torch.Tensor | None] = []
    found = []
    for name, arguments in branches:
        operation = OPERATIONS[name]
        tensors += [arguments[each] for each in (*operation.tensors, "mask")]
        norm = "group" if name == "pool_mixer" else arguments.get("norm")
        found.append(Branch(name, norm, tuple(arguments[each] for each in operation.settings)))
    return _Stage.apply(_stages[stage], tuple(found), dtype, x, statistics, *tensors)


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        stage: Stage,
        branches: tuple[Branch, ...],
        dtype: torch.dtype,
        x: torch.Tensor,
        statistics: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        kind = branches, dtype, precision(dtype)
        y, *kept = stage.forward([x, statistics, *tensors], branches, dtype, kind=kind)
        ctx.set_materialize_grads(False)
        ctx.stage, ctx.branches, ctx.dtype = stage, branches, dtype
        ctx.save_for_backward(*tensors, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        wanted = ctx.needs_input_grad[5:]
        g = g.contiguous(memory_format=torch.channels_last)
        kind = ctx.branches, wanted, precision(ctx.dtype)
        dx, *grads = ctx.stage.backward([g, *ctx.saved_tensors], ctx.branches, wanted, kind=kind)
        return None, None, None, dx, None, *grads


def forward(
    given: list[torch.Tensor | None], branches: tuple[Branch, ...], dtype: torch.dtype
) -> list[torch.Tensor | None]:
    """y, and what each branch keeps for `backward`."""
    x, statistics, *tensors = given
    known = Known(statistics)
    kept: list[torch.Tensor | None] = []
    norms = [branch.norm for branch in branches[1:]] + [None]
    for branch, next_norm in zip(branches, norms, strict=True):
        count = len(branch.operation.tensors)
        own, mask, tensors = tensors[:count], tensors[count], tensors[count + 1 :]
        x, known, more = branch.operation.forward(x, known, next_norm, dtype, branch.norm, own, mask, *branch.settings)
        kept += more
    return [x, *kept]


def backward(
    given: list[torch.Tensor | None], branches: tuple[Branch, ...], wanted: tuple[bool, ...]
) -> list[torch.Tensor | None]:
    """Gradients of x and of all tensors of the branches, None for those not `wanted`."""
    g, *rest = given
    end = sum(len(branch.operation.tensors) + 1 for branch in branches)
    tensors, kept = rest[:end], rest[end:]
    grads: list[torch.Tensor | None] = [None] * end
    for branch in reversed(branches):
        operation = branch.operation
        mask = end - 1
        start = mask - len(operation.tensors)
        kept, own = kept[: -operation.kept], kept[-operation.kept :]
        g, *grads[start:mask] = operation.backward(
            g, *own, *tensors[start:end], *branch.settings, list(wanted[start:mask])
        )
        end = start
    return [g, *grads]


def _pool_mixer(x, known, next_norm, dtype, norm, tensors, mask, pool_size, eps):
    statistics = known_samples(x, known)
    *scales, _ = tensors  # the norm's bias cancels
    y, partials = mix_partially(x, statistics, *scales, mask, pool_size, eps, next_norm == "group")
    return y, Known(partials=partials), [x, statistics]


def _separable_conv(x, known, next_norm, dtype, norm, tensors, mask, eps):
    parameters = separable_conv.Parameters(*tensors)
    y, z, partials = separable_conv.separate_partially(x, parameters, mask, eps, dtype, next_norm == "channel")
    return y, Known(partials=partials), [x, z]


def _channel_mlp(x, known, next_norm, dtype, norm, tensors, mask, activation, eps):
    statistics, partials = statistics_for(x, known, norm)
    with_statistics = next_norm == norm == "group"
    y, after, preactivation, normed = mlp_from_partials(
        x, statistics, partials, Parameters(*tensors), mask, activation, eps, dtype, True, with_statistics
    )
    return y, Known(after), [x if normed is None else normed, statistics, preactivation]


OPERATIONS = {
    "pool_mixer": Operation(PARAMETERS, ("pool_size", "eps"), 2, _pool_mixer, mix_backward),
    "separable_conv": Operation(
        separable_conv.Parameters._fields, ("eps",), 2, _separable_conv, separable_conv.separate_backward
    ),
    "channel_mlp": Operation(Parameters._fields, ("activation", "eps"), 3, _channel_mlp, mlp_backward),
}
