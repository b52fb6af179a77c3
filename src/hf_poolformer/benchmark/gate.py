"""The gate: nobody is timed who does not compute the right thing.

The standard is the PoolFormer built into transformers, eager and in float32, from the same weights and images; of
families that are not built in, our model in plain PyTorch, which conversion's tests hold against the authors'. timm's
PoolFormer
averages over the positions before its last norm; for timm the standard does the same, from the built-in model's
feature maps. The weights are random throughout, so that every layer scale, norm and bias shows in the result.

    logits      largest difference, relative to the largest logit
    gradients   of the cross-entropy: the largest, over all parameters, of |g - standard| / |standard| as vectors. What
                is below a hundredth of the largest gradient is held against that hundredth: the mixer's norm bias, for
                one, has a gradient of exactly zero, of which everybody computes nothing but rounding errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .case import Case
from .rows import Weights, transformers_model


# What rounding explains, with room for another order of summation. On a GPU PyTorch's float32 convolutions are TF32.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (5e-2, 1e-1), "float16": (1e-2, 2e-2)}
TF32_TOLERANCES = (5e-3, 2e-2)
# Images at a time, so that the standard fits where the contestants fit.
CHUNK = 16


@dataclass
class Standard:
    """What is right for one case: logits (B, labels) and, for training, gradients by our names, in float32."""

    logits: torch.Tensor
    gradients: dict[str, torch.Tensor] | None


def standard(case: Case, weights: Weights, images: torch.Tensor, labels: torch.Tensor, pools_first: bool) -> Standard:
    """
    Logits and gradients of the built-in model, or of ours in plain PyTorch where there is none; with `pools_first`,
    those of timm's order of the head.
    """
    training = case.mode == "train"
    library = "built-in" if case.is_poolformer else "ours"
    model = transformers_model(library, case, weights).to(case.device).train(training)
    model.config.kernels = "reference"
    logits = []
    with torch.set_grad_enabled(training), torch.backends.cudnn.flags(allow_tf32=False):
        for chunk, targets in zip(images.float().split(CHUNK), labels.split(CHUNK), strict=True):
            logits.append(_pool_first(model, chunk) if pools_first else model(chunk).logits)
            if training:
                (F.cross_entropy(logits[-1], targets, reduction="sum") / len(labels)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()} if training else None
    return Standard(torch.cat(logits).detach(), gradients)


def _pool_first(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    features = model.poolformer(images).last_hidden_state.mean((2, 3))
    return model.classifier(F.layer_norm(features, features.shape[1:], model.norm.weight, model.norm.bias, 1e-6))


def tolerances(case: Case) -> tuple[float, float]:
    """Largest errors of logits and gradients."""
    if case.device != "cpu" and case.dtype == "float32":
        return TF32_TOLERANCES
    return TOLERANCES[case.dtype]


def logits_error(logits: torch.Tensor, right: torch.Tensor) -> float:
    return ((logits.float() - right).abs().max() / right.abs().max()).item()


def gradient_error(gradients: Mapping[str, torch.Tensor | None], right: Mapping[str, torch.Tensor]) -> float:
    """Infinite where a gradient is missing."""
    if any(gradients.get(name) is None for name in right):
        return float("inf")
    norms = {name: gradient.norm() for name, gradient in right.items()}
    floor = 1e-2 * max(norms.values())
    # A matrix of one may be a 1x1 convolution of another.
    errors = [
        (gradients[name].float().reshape(right[name].shape) - right[name]).norm() / max(norms[name], floor)
        for name in right
    ]
    # torch.stack keeps a NaN, which max() may lose.
    return torch.stack(errors).max().item()
