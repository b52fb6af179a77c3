"""Embeddings: their convolutions and norms, by whom it is faster, and the statistics that they hand on to a stage."""

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from .backends import (
    DECISION,
    Decision,
    computes_token_norm,
    decided,
    holds,
    is_autocast,
    is_transformed,
    is_watched,
    product_dtype,
    takes,
    triton_kernels,
)
from .fused_operations import contiguous, patch_embedding
from .plain_modules import fit, formula, is_plain, norm_kind


# Channels of images whose patches Triton embeds; cuDNN widens so few to eight, in a pass of its own.
MOST_CHANNELS = 4
# While an embedding is on its way into a stage: what it gives, and the statistics of that, where kernels made them.
ENTERING: ContextVar[list[tuple[torch.Tensor, torch.Tensor]] | None] = ContextVar("entering", default=None)


def enter_stage(embedding: nn.Module, stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """stage(embedding(x)); where nobody can come between, the first block takes the statistics of its input from the
    kernels of the embedding."""
    if not _hands_over(embedding, stage):
        return stage(embedding(x))
    token = ENTERING.set([])
    try:
        return stage(embedding(x))
    finally:
        ENTERING.reset(token)


def entering_statistics(x: torch.Tensor) -> torch.Tensor | None:
    """Statistics (B, 2) of x, the input of a stage, if the embedding made them; they are given once."""
    entering = None if torch.compiler.is_compiling() else ENTERING.get()
    if not entering:
        return None
    made, statistics = entering.pop()
    return statistics if made is x else None


def _hands_over(embedding: nn.Module, stage: nn.Module) -> bool:
    """Whether the first block of a stage wants statistics, and gets the very result of a convolution."""
    decision = None if torch.compiler.is_compiling() else DECISION.get()
    if decision is None or decision.backend != "triton" or not holds(decision):
        return False
    if not (is_plain(stage) and isinstance(stage, nn.ModuleList) and len(stage) and formula(stage[0]) == "block"):
        return False
    block, last = stage[0], getattr(embedding, "post_norm", None)
    return (
        # What its branch will ask for; statistics that it does not take after all are made in vain.
        isinstance(block.before_norm, nn.GroupNorm)
        and hasattr(type(block.token_mixer), "fused_pool_size")
        # It would compute itself again without them.
        and not (block.gradient_checkpointing and block.training)
        and is_plain(embedding)
        and embedding.position_embeddings is None
        and isinstance(last, nn.Identity)
        and is_plain(last)
    )


def convolve(conv: nn.Module, x: torch.Tensor, preferred: str | None = None) -> torch.Tensor:
    """
    conv(x) of an embedding, by whom it is faster, and in the memory format of x, (B, C, H, W) both.

    PyTorch on the CPU reorders a contiguous weight in every call for a channels_last input, which for one image takes
    longer than the convolution where the weight is the larger of the two.
    """
    decision = decided(x, preferred)
    result = _convolved(conv, x, decision) if decision.backend == "triton" else None
    if result is not None:
        return result
    if (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and not is_watched()
        and isinstance(conv, nn.Conv2d)
        and is_plain(conv)
        and not x.is_contiguous()
        and conv.weight.is_contiguous()
        and conv.weight.numel() > x.numel()
    ):
        return conv(x.contiguous()).contiguous(memory_format=torch.channels_last)
    return conv(x)


def _convolved(conv: nn.Module, x: torch.Tensor, decision: Decision) -> torch.Tensor | None:
    """conv(x) (B, C, H, W) with Triton's kernels, in whole or for its bias; None if plain PyTorch is to compute."""
    if not (isinstance(conv, nn.Conv2d) and is_plain(conv)) or is_transformed():
        return None
    compiling = torch.compiler.is_compiling()
    entering = None if compiling else ENTERING.get()
    arguments = embedding_arguments(conv, x, decision)
    if arguments is not None:
        y, statistics = patch_embedding(x, **arguments, with_statistics=entering is not None)
    elif not compiling and not torch.is_grad_enabled() and _has_plain_bias(conv, x, decision):
        y = conv._conv_forward(x, conv.weight, None)
        if not y.is_contiguous(memory_format=torch.channels_last):
            return y + conv.bias.to(y.dtype)[:, None, None]
        kernels = triton_kernels().patch_embedding
        statistics = kernels.add_bias(y, conv.bias.contiguous(), entering is not None)
    else:
        return None
    if entering is not None:
        entering.append((y, statistics))
    return y


def embedding_arguments(conv: nn.Conv2d, x: torch.Tensor, decision: Decision) -> dict[str, Any] | None:
    """Of `patch_embedding`, for the convolution of an embedding; None where that would compute another function, or
    cannot, or is not faster."""
    if product_dtype(x) == torch.float32 or x.ndim != 4 or x.shape[1] > MOST_CHANNELS or conv.weight.ndim != 4:
        return None
    outputs, _, *window = conv.weight.shape
    if not (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and all(type(pad) is int for pad in conv.padding)  # and not "same"
        and all(size + 2 * pad >= side for size, pad, side in zip(x.shape[2:], conv.padding, window, strict=True))
        and fit(x, [(conv.weight, (outputs, x.shape[1], *window)), (conv.bias, (outputs,))])
        and takes(decision, x, conv.weight, conv.bias)
    ):
        return None
    arguments = {"weight": conv.weight, "stride": list(conv.stride), "padding": list(conv.padding)}
    if not triton_kernels().patch_embedding.fits(**arguments):
        return None
    return {**arguments, "bias": conv.bias}


def _has_plain_bias(conv: nn.Conv2d, x: torch.Tensor, decision: Decision) -> bool:
    """Whether a convolution may compute its product, and a kernel add its bias."""
    bias = conv.bias
    shapes = [(conv.weight, conv.weight.shape), (bias, conv.weight.shape[:1])]
    return bias is not None and fit(x, shapes) and takes(decision, x, conv.weight, bias)


def normalise(
    norm: nn.Module, x: torch.Tensor, preferred: str | None, reader: nn.Module | None = None
) -> torch.Tensor:
    """
    norm(x), by a kernel where that is a LayerNorm over the channels of x and Triton's kernels compute.

    Args:
        x: (B, C, H, W), and so is the result.
        preferred: one of `BACKENDS`, for a norm that is called outside of a model.
        reader: what alone reads the result. If that is a convolution, the result has autocast's dtype.
    """
    # In this order, because most embeddings have no norm, and nobody should wait for that to be found out.
    if not isinstance(norm, nn.LayerNorm) or torch.compiler.is_compiling():
        return norm(x)
    decision, parameters = decided(x, preferred), (norm.weight, norm.bias)
    if not (
        computes_token_norm(decision)
        and norm_kind(norm, x.shape[1]) == "channel"
        and fit(x, ((vector, x.shape[1:2]) for vector in parameters))
        and takes(decision, x, *parameters)
    ):
        return norm(x)
    multiplied = reader is not None and is_plain(reader, nn.Conv2d)
    dtype = product_dtype(x) if multiplied else torch.float32 if is_autocast(x) else x.dtype
    x = x.contiguous(memory_format=torch.channels_last)
    return triton_kernels().token_norm.token_norm(x, *contiguous(*parameters), norm.eps, dtype)
