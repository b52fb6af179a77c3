"""The operations of `ops.py` by kernels, for what these can take (`backends.takes`).

No weight is kept in another form from one call to the next: it may change in between in ways that nothing tells (fused
optimisers, `.data`, merged adapters).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .backends import (
    cpu_kernels,
    is_transformed,
    is_watched,
    namespace,
    product_dtype,
    triton_kernels,
    under_autocast,
)


# Side of the depthwise window that Triton's kernel holds in registers.
LARGEST_WINDOW = 7
# Of an operation that a branch is: its name, and its arguments beside x.
Branch = tuple[str, dict[str, Any]]


def pool_mixer(
    x: torch.Tensor,
    *,
    backend: str,
    pool_size: int,
    eps: float,
    weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    res_scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    with_statistics: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    `ops.pool_mixer` by kernels, for what they can take (`takes`).

    Args:
        x: (B, C, H, W). Kernels work in channels_last memory, to which they bring it.
        backend: "cpu" or "triton".
        norm_bias: (C,), cancels; but it gets the gradient zero, because DistributedDataParallel waits for one.
        mask: gets no gradient.
        statistics: (B, 2) of x as an operation before this one returned them, which saves a pass. The gradient
            accounts for their dependence on x; they themselves get none.
        with_statistics: also return the statistics of the result, where that costs no pass of its own.

    Returns:
        The result, like x, and its statistics (B, 2), or None.
    """
    x = under_autocast(x)[0].contiguous(memory_format=torch.channels_last)
    parameters = contiguous(weight, layer_scale, res_scale, mask)
    if backend == "cpu":
        return getattr(torch.ops, namespace("cpu")).cpu_pool_mixer(x, *parameters, pool_size, eps, norm_bias)[0], None
    statistics = _known_statistics(x, statistics)
    run = _operation("pool_mixer", "pool_mixer")
    y, statistics = run(x, statistics, *parameters, pool_size, eps, with_statistics, norm_bias)
    return y, statistics if with_statistics else None


def channel_mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    *,
    backend: str,
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
    statistics: torch.Tensor | None = None,
    with_statistics: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    `ops.channel_mlp` by kernels; what is not said there, and the result, as in `pool_mixer`.

    Args:
        norm: "group", or (Triton only) "channel" for a LayerNorm over channels, whose statistics are (B H W, 2), of
            tokens.
    """
    x, dtype = under_autocast(x)
    if backend == "cpu":
        weight1, weight2 = weight1.flatten(1), weight2.flatten(1)
    vectors = (norm_weight, norm_bias, weight1, bias1, weight2, bias2, act_scale, act_bias)
    vectors = (*vectors, layer_scale, res_scale, mask)
    needs_gradient = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *vectors))
    x, vectors = x.contiguous(memory_format=torch.channels_last), contiguous(*vectors)
    if backend == "cpu":
        arguments = (x, *vectors, activation, eps, dtype, needs_gradient)
        return getattr(torch.ops, namespace("cpu")).cpu_channel_mlp(*arguments)[0], None
    arguments = (x, _known_statistics(x, statistics, norm), *vectors, activation, eps, dtype, needs_gradient)
    y, statistics, _, _ = _operation("channel_mlp", "channel_mlp")(*arguments, with_statistics)
    return y, statistics if with_statistics else None


def separable_conv(
    x: torch.Tensor,
    weight1: torch.Tensor,
    depthwise_weight: torch.Tensor,
    weight2: torch.Tensor,
    *,
    act_scale: torch.Tensor,
    act_bias: torch.Tensor,
    eps: float,
    norm_weight: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    res_scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.separable_conv` by Triton's kernels, for a window of at most `LARGEST_WINDOW` tokens; the rest as in
    `pool_mixer`."""
    x, dtype = under_autocast(x)
    vectors = (norm_weight, weight1, act_scale, act_bias, depthwise_weight, weight2)
    vectors = (*vectors, layer_scale, res_scale, mask)
    needs_gradient = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *vectors))
    x, vectors = x.contiguous(memory_format=torch.channels_last), contiguous(*vectors)
    return _operation("separable_conv", "separable_conv")(x, *vectors, eps, dtype, needs_gradient)[0]


def patch_embedding(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: list[int],
    padding: list[int],
    with_statistics: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The convolution of x (B, C, H, W) by Triton's kernel, in x's dtype or, as PyTorch has it, autocast's.

    Args:
        weight: (out, C, KH, KW), small enough for `patch_embedding.fits`; bias (out,).
        stride, padding: of height and width, padding with zeros.
        with_statistics: also return those of the result, (B, 2), else None.
    """
    x = x.to(product_dtype(x)).contiguous(memory_format=torch.channels_last)
    arguments = (x, weight, None if bias is None else bias.contiguous(), stride, padding, with_statistics)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y, statistics = getattr(torch.ops, namespace("triton")).patch_embedding(*arguments)
    else:
        y, statistics = triton_kernels().patch_embedding.convolve(*arguments)
    return y, statistics if with_statistics else None


def infer_branches(
    owner: nn.Module,
    x: torch.Tensor,
    branches: list[Branch],
    backend: str,
    statistics: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Branches in sequence, without gradients.

    Args:
        owner: the stage or the block whose branches they are.
        x: (B, C, H, W), and so is the result, in channels_last memory.
        branches: of each the name of its operation, and its arguments: "pool_mixer", "channel_mlp" and
            "separable_conv" with those of `ops`, all of them, but mask; "attention", and on the CPU "mixing", with
            those of `attention_arguments` and `mixing_arguments`.
        backend: "cpu" or "triton".
        statistics: (B, 2) of x, where they are known; the CPU makes its own.
    """
    x, dtype = under_autocast(x)
    if backend == "triton":
        x = x.contiguous(memory_format=torch.channels_last)
        return triton_kernels().inference.infer(owner, x, branches, dtype, statistics)
    cpu = cpu_kernels()
    return cpu.infer(x, [cpu.BRANCHES[name].prepare(dtype, **arguments) for name, arguments in branches])


def _operation(module: str, name: str) -> Callable[..., Any]:
    """An operation of Triton's: where graphs are made the registered one, else without PyTorch's dispatcher, which
    would take longer than launching the kernels."""
    if torch.compiler.is_compiling() or is_transformed() or is_watched():
        return getattr(getattr(torch.ops, namespace("triton")), name)
    return getattr(getattr(triton_kernels(), module), name)


def _known_statistics(x: torch.Tensor, statistics: torch.Tensor | None, norm: str = "group") -> torch.Tensor:
    if statistics is not None:
        return statistics.detach()
    if norm == "channel":
        return _operation("statistics", "token_statistics")(x.detach())
    return _operation("statistics", "sample_statistics")(x.detach())


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
