"""The folded graph: a model with everything computed beforehand that does not depend on the image.

A norm is a standardisation, `n(x) = (x - mu) * r`, and an affine per channel, `gamma * n + beta`. The standardisation
stays; the affine goes into the product behind it, and layer scale into the product before it:

    W1 (gamma n + beta) + b1 = (W1 gamma) n + (b1 + W1 beta)          ls * (W2 h + b2) = (ls W2) h + ls b2

Pooling leaves a constant as it is, so that of GroupNorm in front of it only r is left, one number per image:

    x + ls * (pool(gamma n + beta) - (gamma n + beta)) = x + (ls * gamma) * r * (pool(x) - x)

StarReLU's scale and bias go into the second product of the MLP, BatchNorm altogether into its neighbours. What is not
known here (mixers of one's own, adapters, hooks) stays as it is, and the rest is folded around it.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from ..foundation.errors import UserError
from ..modeling_poolformer import (
    DropPath,
    MetaFormerBatchNorm,
    MetaFormerBlock,
    MetaFormerEmbeddings,
    MetaFormerForImageClassification,
    MetaFormerGroupNorm,
    MetaFormerLayerNorm,
    MetaFormerMLP,
    MLPHead,
    NoNorm,
)
from ..modeling_segmentation import ConvNormReLU, MetaFormerForSemanticSegmentation
from ..plain_modules import is_plain, is_pointwise
from ..token_mixers import (
    Attention,
    DepthwiseConv,
    FixedTokens,
    IdentityMixer,
    Pooling,
    RandomMixing,
    SeparableConv,
    SpatialMLP,
    SquaredReLU,
    StarReLU,
)


__all__ = ["fold"]

Scale = torch.Tensor | None


def fold(model: nn.Module) -> nn.Module:
    """
    A copy of a model that computes the same logits with fewer operations; in float32, for inference only.

    Args:
        model: an image classifier, a semantic segmenter or a detector of this package; it is left as it is.

    Returns:
        a model with the same `forward(pixel_values)`; its parameters have other names and values.

    Raises:
        UserError: a model of another kind.
    """
    from ..modeling_detection import MetaFormerDetector  # here, since it brings torchvision's detectors

    if not isinstance(
        model, MetaFormerForImageClassification | MetaFormerForSemanticSegmentation | MetaFormerDetector
    ):
        raise UserError(
            f"{type(model).__name__} cannot be exported: image classifiers, semantic segmenters and detectors can."
        )
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    encoder = model.base_model.encoder
    for embedding in encoder.patch_embeddings:
        fold_embedding(embedding)
    encoder.block = nn.ModuleList(nn.Sequential(*map(fold_block, stage)) for stage in encoder.block)
    if isinstance(model, MetaFormerForImageClassification):
        fold_classifier(model)
    elif isinstance(model, MetaFormerForSemanticSegmentation):
        fold_segmenter(model)
    return model


class Standardise(nn.Module):
    """`(x - mean) / sqrt(variance + eps)` over each sample of (B, C, H, W) ("group"), each token of it ("layer"), or
    each row of features (B, C) ("features")."""

    def __init__(self, over: str, eps: float):
        super().__init__()
        self.over, self.eps = over, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.over == "group":
            return F.group_norm(x, 1, eps=self.eps)
        if self.over == "features":
            return F.layer_norm(x, x.shape[1:], eps=self.eps)
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=self.eps).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.over}, eps={self.eps}"


class ChannelAffine(nn.Module):
    """`scale * x + shift`, each None or broadcast to (C, H, W)."""

    def __init__(self, scale: Scale, shift: Scale):
        super().__init__()
        self.scale = None if scale is None else constant(scale)
        self.shift = None if shift is None else constant(shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is not None:
            x = x * self.scale
        return x if self.shift is None else x + self.shift


class Branch(nn.Module):
    """`res_scale * x + body(norm(x))`, or without the shortcut."""

    def __init__(self, norm: nn.Module, body: nn.Module, block: MetaFormerBlock, number: int):
        super().__init__()
        self.norm, self.body = norm, body
        self.use_residual = block.use_residual
        res_scale = getattr(block, f"res_scale_{number}")
        self.res_scale = None if res_scale is None else constant(per_channel(res_scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The sum last: runtimes compute it in the product's epilogue.
        return self.join(x, self.body(self.norm(x)))

    def join(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        if not self.use_residual:
            return branch
        return branch + (x if self.res_scale is None else x * self.res_scale)


class PoolingBranch(Branch):
    """The pooling mixer behind GroupNorm: of the norm, one factor per image is left."""

    def __init__(self, norm: Standardise, pool: nn.AvgPool2d, scale: torch.Tensor, block: MetaFormerBlock):
        super().__init__(norm, pool, block, 1)
        self.scale = constant(per_channel(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = torch.rsqrt(variance(x) + self.norm.eps).to(x.dtype)
        return self.join(x, (self.scale * factor) * (self.body(x) - x))


def variance(x: torch.Tensor) -> torch.Tensor:
    """
    Of each sample, (B, 1, 1, 1), from the sum and the root of the sum of squares: two reductions, and nothing written.

    The difference cancels where the mean is far larger than the deviation, which over all channels together it is
    not; a constant image may give less than zero, hence the clamp. In float32, which float16 squares overflow.
    """
    x = x.float()
    count = x.shape[1] * x.shape[2] * x.shape[3]
    dims = (1, 2, 3)
    mean = x.mean(dims, keepdim=True)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return (norm * norm / count - mean * mean).clamp(min=0)


class PoolingDifference(nn.Module):
    """`scale * (pool(x) - x)` behind any other norm."""

    def __init__(self, pool: nn.AvgPool2d, scale: Scale):
        super().__init__()
        self.pool = pool
        self.scale = None if scale is None else constant(per_channel(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.pool(x) - x
        return mixed if self.scale is None else mixed * self.scale


class Kept(nn.Module):
    """A branch of a block as it was: its method `mix_tokens` or `mix_channels`."""

    def __init__(self, block: MetaFormerBlock, branch: str):
        super().__init__()
        self.block, self.branch = block, branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.block, self.branch)(x)


def fold_block(block: nn.Module) -> nn.Module:
    """A block with both branches folded as far as they are known; anything else as it is."""
    if not (is_plain(block, MetaFormerBlock) and is_plain(block.drop_path, DropPath)):
        return block
    branches = [fold_mixer(block)]
    if block.use_mlp:
        branches.append(fold_mlp(block))
    return nn.Sequential(*branches)


def fold_mixer(block: MetaFormerBlock) -> nn.Module:
    mixer, parts = block.token_mixer, split(block.before_norm)
    if parts is None or not all(map(is_plain, mixer.modules())):
        return Kept(block, "mix_tokens")
    norm, gamma, beta = parts
    scale = block.layer_scale_1
    shift = None if beta is None else product(beta, scale)
    kind = type(mixer)
    if kind is Pooling:
        if mixer.fused_pool_size is None:  # another window than the formula's, which would not leave beta as it is
            return Kept(block, "mix_tokens")
        # beta cancels, and so does the mean.
        factor = product(gamma, scale)
        if isinstance(norm, Standardise) and norm.over == "group":
            ones = torch.ones(block.before_norm.num_channels)
            return PoolingBranch(norm, mixer.pool, ones if factor is None else factor, block)
        body = PoolingDifference(mixer.pool, factor)
    elif kind is IdentityMixer:
        body = ChannelAffine(per_channel(product(gamma, scale)), per_channel(shift))
    elif kind is SeparableConv and is_pointwise(mixer.pwconv1) and type(mixer.pwconv2) is nn.Conv2d:
        conv1, conv2 = folded(mixer.pwconv1, gamma, beta), folded(mixer.pwconv2, scale=scale)
        body = nn.Sequential(conv1, mixer.act, mixer.dwconv, conv2)
    elif kind is DepthwiseConv:
        if beta is not None:  # of which the zeros around the image have none
            norm, gamma = nn.Sequential(norm, ChannelAffine(per_channel(gamma), per_channel(beta))), None
        body = folded(mixer, scale=scale)
        if gamma is not None:
            body.weight = constant(body.weight * gamma[:, None, None, None])
    elif kind is Attention and type(mixer.qkv) is nn.Linear and type(mixer.proj) is nn.Linear:
        mixer.qkv, mixer.proj = folded(mixer.qkv, gamma, beta), folded(mixer.proj, scale=scale)
        body = mixer
    elif kind in (SpatialMLP, RandomMixing):
        affine = ChannelAffine(per_channel(product(gamma, scale)), token_shift(mixer, shift))
        body = nn.Sequential(mixer, affine)
    else:
        return Kept(block, "mix_tokens")
    return Branch(norm, body, block, 1)


def token_shift(mixer: FixedTokens, shift: Scale) -> Scale:
    """What a matrix over tokens makes of a constant per channel (C,): (C, H, W)."""
    if shift is None:
        return None
    matrix = mixer.fc.weight if isinstance(mixer, SpatialMLP) else mixer.random_matrix
    return shift[:, None, None] * matrix.double().sum(1).view(mixer.resolution).to(shift)


def fold_mlp(block: MetaFormerBlock) -> nn.Module:
    mlp, parts = block.output, split(block.after_norm)
    if parts is None or not is_plain(mlp, MetaFormerMLP) or not (is_pointwise(mlp.conv1) and is_pointwise(mlp.conv2)):
        return Kept(block, "mix_channels")
    norm, gamma, beta = parts
    act, conv2 = mlp.act_fn, mlp.conv2
    if is_plain(act, StarReLU) and act.scale.shape == act.bias.shape == (1,):
        hidden = conv2.in_channels
        conv2 = folded(conv2, act.scale.expand(hidden), act.bias.expand(hidden))
        act = SquaredReLU()
    body = nn.Sequential(folded(mlp.conv1, gamma, beta), act, folded(conv2, scale=block.layer_scale_2))
    return Branch(norm, body, block, 2)


def fold_embedding(embedding: MetaFormerEmbeddings) -> None:
    """The scale of the norm in front goes into the convolution; its shift, of which the padding has none, does not."""
    parts, conv = split(embedding.pre_norm), embedding.projection
    if parts is None or not is_plain(conv) or not isinstance(conv, nn.Conv2d):
        return
    norm, gamma, beta = parts
    if beta is None and gamma is not None:
        embedding.pre_norm, embedding.projection = norm, folded(conv, gamma)


def fold_classifier(model: MetaFormerForImageClassification) -> None:
    """The last norm's affine goes into the classifier; the mean over positions lies between and changes nothing."""
    head = model.classifier
    first = head.fc1 if type(head) is MLPHead else head
    if type(first) is not nn.Linear or not all(map(is_plain, (first, head, model.norm))):
        return
    if type(model.norm) is nn.LayerNorm:
        norm, gamma, beta = Standardise("features", model.norm.eps), model.norm.weight, model.norm.bias
    else:
        parts = split(model.norm)
        if parts is None:
            return
        norm, gamma, beta = parts
    model.norm = norm
    if first is head:
        model.classifier = folded(head, gamma, beta)
    else:
        head.fc1 = folded(first, gamma, beta)


def fold_segmenter(model: MetaFormerForSemanticSegmentation) -> None:
    """Norms of the feature maps go into the pyramid's first convolutions, BatchNorm into the one in front of it."""
    norms = model.base_model.hidden_states_norms
    for index, (name, conv) in enumerate(zip(list(norms), list(model.neck.lateral_convs), strict=True)):
        parts = split(norms[name])
        if parts is not None and is_plain(conv):
            norm, gamma, beta = parts
            norms[name] = norm
            model.neck.lateral_convs[index] = folded(conv, gamma, beta)
    for layer in model.decode_head.modules():
        if is_plain(layer, ConvNormReLU) and is_plain(layer.norm, nn.BatchNorm2d) and is_plain(layer.conv):
            scale, shift = batch_norm_affine(layer.norm)
            conv = folded(layer.conv, scale=scale)
            conv.bias = constant(shift if layer.conv.bias is None else shift + layer.conv.bias * scale)
            layer.conv, layer.norm = conv, nn.Identity()


def split(norm: nn.Module) -> tuple[nn.Module, Scale, Scale] | None:
    """A norm as standardisation, gamma and beta; None for one that is not known here or is not to be passed by."""
    if not is_plain(norm):
        return None
    if type(norm) is MetaFormerGroupNorm and norm.num_groups == 1:
        return Standardise("group", norm.eps), norm.weight, norm.bias
    if type(norm) is MetaFormerLayerNorm:
        return Standardise("layer", norm.eps), norm.weight, norm.bias
    if type(norm) is MetaFormerBatchNorm:
        return nn.Identity(), *batch_norm_affine(norm)
    if type(norm) is NoNorm:
        return nn.Identity(), None, None
    return None


def batch_norm_affine(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (C,) of BatchNorm in inference."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return scale, shift


def folded(
    layer: nn.Conv2d | nn.Linear,
    gamma: Scale = None,
    beta: Scale = None,
    *,
    scale: Scale = None,
) -> nn.Conv2d | nn.Linear:
    """
    `scale * layer(gamma * x + beta)` as one layer, computed in float64.

    Args:
        gamma, beta: per input channel. `beta` only for 1x1 convolutions and linear layers: where zeros surround the
            image, the sum would be another.
        scale: per output channel.
    """
    weight = layer.weight.double()
    bias = None if layer.bias is None else layer.bias.double()
    shape = [1] * (weight.ndim - 2)
    if beta is not None:
        shift = weight.flatten(1) @ beta.double()
        bias = shift if bias is None else bias + shift
    if gamma is not None:
        weight = weight * gamma.double().view(1, -1, *shape)
    if scale is not None:
        weight = weight * scale.double().view(-1, 1, *shape)
        bias = None if bias is None else bias * scale.double()
    layer = copy.copy(layer)  # the same kind, kernel, stride and padding, with parameters of its own
    layer._parameters = dict(layer._parameters)
    layer.weight = constant(weight)
    layer.bias = None if bias is None else constant(bias)
    return layer


def product(a: Scale, b: Scale) -> Scale:
    if a is None or b is None:
        return b if a is None else a
    return a * b


def per_channel(scale: Scale) -> Scale:
    return None if scale is None else scale[:, None, None]


def constant(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().float().clone(), requires_grad=False)
