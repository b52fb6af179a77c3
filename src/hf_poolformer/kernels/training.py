"""All blocks of a stage in training as one function of autograd, by Triton's kernels, recorded (`recordings.py`).

A step of two operations for each block and direction is bound by Python and by autograd's nodes, not by the GPU. Here
a stage is one node, and its forward and its backward are loops over launches. What is kept for backward, and all
gradients, are those of the operations one by one.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from .launch import float32, precision
from .mlp_backward import mlp_gradients
from .mlp_forward import mlp_from_partials
from .mlp_parts import Parameters
from .pool_mixer import PARAMETERS, mix_backward, mix_partially
from .recordings import Recorded
from .statistics import sample_statistics


# Of an operation's tensors, in this order.
MIXER = (*PARAMETERS, "mask")
MLP = (*Parameters._fields, "mask")


class Branch(NamedTuple):
    """A branch: "pool_mixer" or "channel_mlp", its numbers, and how many tensors it has."""

    name: str
    settings: tuple[Any, ...]  # pool_size and eps, or activation and eps

    @property
    def tensors(self) -> int:
        return len(MIXER if self.name == "pool_mixer" else MLP)


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
    x (B, C, H, W) in channels_last memory through branches "pool_mixer" and "channel_mlp", in turns, with norms of
    samples.

    Args:
        stage: whose branches they are.
        branches: names and arguments, the tensors contiguous; with "mask" (B,) or None, and of mixers "norm_bias".
        dtype: of products.
        statistics: (B, 2) of x, where they are known.
    """
    if stage not in _stages:
        _stages[stage] = Stage()
    tensors: list[torch.Tensor | None] = []
    found = []
    for name, arguments in branches:
        names, settings = (MIXER, "pool_size") if name == "pool_mixer" else (MLP, "activation")
        tensors += [arguments[each] for each in names]
        found.append(Branch(name, (arguments[settings], arguments["eps"])))
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
    """y and, of each branch, three tensors for `backward`, of which mixers have two."""
    x, statistics, *tensors = given
    kept: list[torch.Tensor | None] = []
    partials: torch.Tensor | None = None  # of which statistics are to be made
    for place, (name, settings) in enumerate(branches):
        size = branches[place].tensors
        *parameters, mask = tensors[:size]
        tensors = tensors[size:]
        with_statistics = place + 1 < len(branches)
        if statistics is None:
            statistics = sample_statistics(x)
        if name == "pool_mixer":
            *scales, _ = parameters  # norm_bias cancels
            y, partials = mix_partially(x, statistics, *scales, mask, *settings, with_statistics)
            kept += [x, statistics, None]
            after = None if partials is None else float32(x, x.shape[0], 2)
        else:
            y, after, preactivation, normed = mlp_from_partials(
                x, statistics, partials, Parameters(*parameters), mask, *settings, dtype, True, with_statistics
            )
            kept += [x if normed is None else normed, statistics, preactivation]
            partials = None
        x, statistics = y, after
    return [x, *kept]


def backward(
    given: list[torch.Tensor | None], branches: tuple[Branch, ...], wanted: tuple[bool, ...]
) -> list[torch.Tensor | None]:
    """Gradients of x and of all tensors of the branches, None for those not `wanted`."""
    g, *rest = given
    end = sum(branch.tensors for branch in branches)
    tensors, kept = rest[:end], rest[end:]
    grads: list[torch.Tensor | None] = [None] * end
    for place in reversed(range(len(branches))):
        branch, (source, statistics, preactivation) = branches[place], kept[3 * place : 3 * place + 3]
        start = end - branch.tensors
        *parameters, mask = tensors[start:end]
        wants = list(wanted[start : end - 1])
        if branch.name == "pool_mixer":
            found = mix_backward(g, source, statistics, *parameters, mask, *branch.settings, wants)
        else:
            parameters = Parameters(*parameters)
            found = mlp_gradients(g, source, statistics, preactivation, parameters, mask, *branch.settings, wants)
        g, *grads[start : end - 1] = found
        end = start
    return [g, *grads]
