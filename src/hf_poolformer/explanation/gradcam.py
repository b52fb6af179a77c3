"""Grad-CAM (arXiv 1610.02391) and the class activation map (CAM, arXiv 1512.04150) of a MetaFormer classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from ..foundation.errors import UserError


METHODS = ("gradcam", "cam")
# Along the shorter side: a map of fewer says hardly more than that the image shows the class.
LEAST_POSITIONS = 4


@dataclass(frozen=True)
class ActivationMaps:
    """What `gradcam` returns, for B images and K classes each; all tensors are detached, on the model's device.

    Attributes:
        maps: (B, K, H, W) float32 in 0..1, of the size of `pixel_values`: the positive part of `raw`, divided by its
            largest value, interpolated bilinearly. All zero where nothing speaks for the class.
        raw: (B, K, h, w) float32 at the resolution of the stage; negative where the image speaks against the class.
        targets: (B, K) int64, the classes.
        logits: (B, num_labels) float32.
        stage: whose output was looked at, counted from 0.
    """

    maps: torch.Tensor
    raw: torch.Tensor
    targets: torch.Tensor
    logits: torch.Tensor
    stage: int


def gradcam(
    model: nn.Module,
    pixel_values: torch.Tensor,
    targets: int | Sequence[int] | Sequence[Sequence[int]] | torch.Tensor | None = None,
    *,
    method: Literal["gradcam", "cam"] = "gradcam",
    stage: int | None = None,
) -> ActivationMaps:
    """Which places of an image speak for a class.

    `"gradcam"` weighs the channels of a stage's output, before the final norm, by the mean over the positions of the
    gradient of the class's logit, and adds them up. It works for every family and stage; the map is a first-order
    estimate.

    `"cam"` takes the classifier apart where it is linear in the positions, so that `raw` adds up to the logit, less a
    constant:

    - Norm, then mean, then linear (PoolFormer v1): the logit of class k is the mean over the positions of
      `W[k] @ norm(x)[p] + b[k]`, so a position contributes `W[k] @ norm(x)[p] / positions`, and the sum is
      `logit - b[k]`.
    - Mean, then LayerNorm, then linear (the second paper's linear heads): with `r` the reciprocal standard deviation
      of the pooled features, a position contributes `W[k] @ (gamma * r * (x[p] - mean_c(x[p]))) / positions`, and
      the sum is `logit - b[k] - W[k] @ beta`.

    In both the statistics of the norm, to which all positions contribute, are taken as they are.

    The model and its gradients are left as they were, whatever mode autograd is in. This costs one forward pass and,
    for Grad-CAM, one backward pass per class through the layers behind `stage`.

    Args:
        model: an image classifier of this package, also wrapped (PEFT, `torch.compile`).
        pixel_values: (B, channels, H, W), as the image processor gives them; moved to the model's device and dtype.
        targets: None for the class that each image is predicted to have, K = 1. A number, or K numbers, for the same
            classes in every image. (B, K) numbers for each image its own.
        method: `"gradcam"` or `"cam"`, as above.
        stage: whose output is looked at, counted from 0, from the end if negative. Earlier stages are finer and tell
            less about the class. None takes the last one or, of images so small that it would have fewer than 4 x 4
            positions, the last that has them. CAM exists for the last stage only.

    Raises:
        UserError: not such a model, or no such class or stage; CAM of a head that is not linear (ConvFormer,
            CAFormer); the model is in training mode, in which the answer would depend on chance and on the batch.
    """
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}: {' or '.join(METHODS)}")
    classifier = find_classifier(model)
    if classifier.training:
        raise UserError("the model is in training mode; call model.eval() first")
    pixel_values = torch.as_tensor(pixel_values)
    stage = choose_stage(classifier.config, stage, pixel_values.shape[-2:], method)
    stages = classifier.base_model.encoder.block
    # Out of inference mode, whose tensors autograd refuses.
    with torch.inference_mode(False), torch.no_grad():
        parameter = next(classifier.parameters())
        pixel_values = pixel_values.clone().to(parameter.device, parameter.dtype)
        with watch(stages[stage], differentiate=method == "gradcam") as features:
            logits = classifier(pixel_values, return_dict=True).logits
        wanted = as_targets(targets, logits)
        if method == "gradcam":
            raw = weighted_features(logits, features[0], wanted)
        else:
            raw = position_contributions(classifier, features[0], wanted)
        raw = raw.detach().float()
        positive = raw.clamp(min=0)
        largest = positive.amax((-2, -1), keepdim=True)
        scaled = positive / torch.where(largest > 0, largest, 1)
        # Interpolation of values in 0..1 may round to a little more.
        maps = F.interpolate(scaled, size=pixel_values.shape[-2:], mode="bilinear", align_corners=False).clamp(0, 1)
        return ActivationMaps(maps=maps, raw=raw, targets=wanted, logits=logits.detach().float(), stage=stage)


def find_classifier(model: nn.Module) -> PreTrainedModel:
    """The image classifier in a model, which may be wrapped. By its parts: its code may have come with the weights."""
    for module in model.modules():
        if (
            isinstance(module, PreTrainedModel)
            and type(module).__name__.endswith("ForImageClassification")
            and hasattr(module.config, "head_norm_first")
        ):
            if not module.config.num_labels:
                raise UserError("the model has no classes: num_labels is 0")
            return module
    raise UserError(f"{type(model).__name__} is not an image classifier of the PoolFormer or MetaFormer family")


def choose_stage(config: PretrainedConfig, stage: int | None, size: tuple[int, int], method: str) -> int:
    """The stage meant, counted from 0, for an input of `size` (height, width).

    Raises:
        UserError: there is no such stage, or no class activation map of it.
    """
    count = len(config.depths)
    if stage is not None and not -count <= stage < count:
        raise UserError(f"there is no stage {stage}: the model has {count}, numbered from 0")
    if method == "cam":
        if config.head_type != "linear":
            raise UserError(
                f"a class activation map needs a linear head, and this model has an {config.head_type.upper()}, of "
                "which positions are no summands; method 'gradcam' works"
            )
        if stage not in (None, -1, count - 1):
            raise UserError("a class activation map exists for the last stage only; method 'gradcam' works for all")
        return count - 1
    if stage is not None:
        return stage % count
    chosen, shorter = 0, min(size)
    for index, (kernel, stride, padding) in enumerate(
        zip(config.patch_sizes[:count], config.strides, config.padding, strict=False)
    ):
        shorter = (shorter + 2 * padding - kernel) // stride + 1
        if shorter >= LEAST_POSITIONS:
            chosen = index
    return chosen


@contextmanager
def watch(stage: nn.Module, differentiate: bool) -> Iterator[list[torch.Tensor]]:
    """Collects the output of a stage; with `differentiate`, autograd starts there and not at the parameters before."""
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output.detach()
        if differentiate:
            output.requires_grad_()
            torch.set_grad_enabled(True)  # until the `no_grad` around the forward pass ends
        seen.append(output)
        return output

    handle = stage.register_forward_hook(hook)
    try:
        with torch.no_grad():
            yield seen
    finally:
        handle.remove()


def as_targets(targets: object, logits: torch.Tensor) -> torch.Tensor:
    """Classes (B, K), int64, from any of the forms that `gradcam` takes."""
    count, num_labels = logits.shape
    if targets is None:
        return logits.detach().argmax(dim=-1, keepdim=True)
    try:
        wanted = torch.as_tensor(targets, device=logits.device)
    except (TypeError, ValueError) as error:
        raise UserError(f"targets must be numbers of classes, as many for each image: {error}") from error
    if wanted.is_floating_point() or wanted.dtype == torch.bool or wanted.numel() == 0:
        raise UserError(f"targets must be numbers of classes, not {targets!r}")
    if wanted.ndim < 2:
        wanted = wanted.reshape(1, -1).expand(count, -1)
    if wanted.ndim != 2 or len(wanted) != count:
        raise UserError(
            f"targets of shape {tuple(wanted.shape)} do not fit {count} images: give one number, several for all "
            "images, or (images, classes)"
        )
    if wanted.min() < 0 or wanted.max() >= num_labels:
        raise UserError(f"targets must be in 0..{num_labels - 1}, the classes of the model")
    return wanted.long()


def weighted_features(logits: torch.Tensor, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Grad-CAM before the ReLU, (B, K, h, w): equations 1 and 2 of the paper."""
    maps = []
    for column in range(targets.shape[1]):
        # Images do not see each other in evaluation mode, so that one gradient of the sum holds those of all.
        chosen = torch.zeros_like(logits).scatter_(1, targets[:, column, None], 1.0)
        (gradient,) = torch.autograd.grad(logits, features, chosen, retain_graph=column + 1 < targets.shape[1])
        weights = gradient.float().mean((-2, -1), keepdim=True)
        maps.append((weights * features.detach().float()).sum(dim=1))
    return torch.stack(maps, dim=1)


def position_contributions(classifier: PreTrainedModel, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What each position adds to the logits of `targets`, (B, K, h, w); see `gradcam` for the formulas."""
    norm, head = classifier.norm, classifier.classifier
    if classifier.config.head_norm_first:
        tokens = norm(features).flatten(2).mT  # (B, C, h, w) -> (B, N, C)
    else:
        tokens = features.flatten(2).mT
        scale = (tokens.mean(dim=1, keepdim=True).var(dim=-1, keepdim=True, correction=0) + norm.eps).rsqrt()
        tokens = (tokens - tokens.mean(dim=-1, keepdim=True)) * scale * norm.weight
    # The layer itself rather than its weight: it may be wrapped by an adapter.
    contributions = (head(tokens) - head(torch.zeros_like(tokens[:1, :1]))) / tokens.shape[1]  # (B, N, num_labels)
    chosen = contributions.gather(2, targets[:, None, :].expand(-1, tokens.shape[1], -1))
    return chosen.mT.unflatten(-1, features.shape[-2:])
