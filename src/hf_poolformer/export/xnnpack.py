"""A folded model in operations that XNNPACK has, for ExecuTorch; one image at a time, which keeps all shapes known.

XNNPACK knows no norm but BatchNorm, no mean but that over positions, and no attention. Means over channels are
products with 1/C: a convolution 1x1 with one output channel. Average pooling that leaves padding out of its count is
an operation of XNNPACK's. What is not known here stays as it is; ExecuTorch's portable kernels compute it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..modeling_poolformer import (
    MetaFormerEmbeddings,
    MetaFormerForImageClassification,
    MetaFormerGroupNorm,
    MetaFormerLayerNorm,
    MLPHead,
)
from ..token_mixers import Attention
from .deployable import shapes_at
from .graph import ChannelAffine, PoolingBranch, Standardise, constant, split


# Ends the names of weights that average, which no quantisation is to touch.
AVERAGING = "averaging"


class MeanOverChannels(nn.Module):
    """Of (1, C, H, W): (1, 1, H, W); of (1, C): (1, 1)."""

    def __init__(self, channels: int, ndim: int):
        super().__init__()
        shape = (1, channels) + (1, 1) * (ndim == 4)
        self.averaging = constant(torch.full(shape, 1 / channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.averaging) if self.averaging.ndim == 4 else F.linear(x, self.averaging)


class StandardiseByProducts(nn.Module):
    """`Standardise`, of a known number of channels."""

    def __init__(self, over: str, eps: float, channels: int):
        super().__init__()
        self.over, self.eps = over, eps
        self.mean = MeanOverChannels(channels, 2 if over == "features" else 4)

    def average(self, x: torch.Tensor) -> torch.Tensor:
        return self.mean(x.mean((2, 3), keepdim=True) if self.over == "group" else x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        difference = x - self.average(x)
        return difference * torch.rsqrt(self.average(difference * difference) + self.eps)


class PoolingByProducts(nn.Module):
    """`PoolingBranch`, of a known number of channels."""

    def __init__(self, branch: PoolingBranch, channels: int):
        super().__init__()
        self.branch = branch
        self.mean = MeanOverChannels(channels, 4)
        self.scale = constant(branch.scale[None])

    def average(self, x: torch.Tensor) -> torch.Tensor:
        return self.mean(x.mean((2, 3), keepdim=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.average(x)
        # As in `graph.variance`: it cancels little, and may be less than zero for a constant image.
        variance = F.relu(self.average(x * x) - mean * mean)
        factor = torch.rsqrt(variance + self.branch.norm.eps)
        return self.branch.join(x, (self.scale * factor) * (self.branch.body(x) - x))


class AttentionByProducts(nn.Module):
    """
    `Attention` of one image, with matrices of its own for queries, keys and values: nothing has to be taken apart.

    PyTorch's own function asks whether a row of scores is masked altogether, which here none is.
    """

    def __init__(self, attention: Attention):
        super().__init__()
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        weights = attention.qkv.weight.chunk(3)
        biases = (None,) * 3 if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
        scales = (attention.head_dim**-0.5, 1.0, 1.0)
        self.query, self.key, self.value = (
            linear(weight * scale, None if bias is None else bias * scale)
            for weight, bias, scale in zip(weights, biases, scales, strict=True)
        )
        self.proj = attention.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)  # (1, N, C)
        query, key, value = (
            layer(tokens).view(height * width, self.heads, self.head_dim).transpose(0, 1)  # (heads, N, head_dim)
            for layer in (self.query, self.key, self.value)
        )
        mixed = torch.bmm(torch.bmm(query, key.transpose(1, 2)).softmax(-1), value)
        mixed = self.proj(mixed.transpose(0, 1).reshape(1, height * width, self.heads * self.head_dim))
        return mixed.transpose(1, 2).reshape(1, -1, height, width)


class LayerNormByProducts(nn.Module):
    """LayerNorm of features (1, C)."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.standardise = StandardiseByProducts("features", norm.eps, norm.normalized_shape[0])
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.standardise(x)
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias


class Apart(nn.Module):
    """
    A product whose 8 bits end with it: behind it stands a sum, which nobody quantises.

    torchao passes the 8 bits of a product on to the means and poolings that take it, and XNNPACK (in ExecuTorch 1.5.1)
    refuses some of these when it is told the sizes.
    """

    def __init__(self, product: nn.Module):
        super().__init__()
        self.product, self.nothing = product, constant(torch.zeros(1, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x) + self.nothing


class Classifier(nn.Module):
    """`MetaFormerForImageClassification` with a mean over positions that keeps its axes, as XNNPACK has it."""

    def __init__(self, model: MetaFormerForImageClassification):
        super().__init__()
        self.model, self.config = model, model.config

    @property
    def base_model(self) -> nn.Module:
        return self.model.base_model

    def forward(self, pixel_values: torch.Tensor) -> Logits:
        model = self.model
        tokens = model.base_model.encoder(pixel_values, return_dict=True).last_hidden_state
        if self.config.head_norm_first:
            features = model.norm(tokens).mean((2, 3), keepdim=True).flatten(1)
        else:
            features = model.norm(tokens.mean((2, 3), keepdim=True).flatten(1))
        return Logits(model.classifier(features))


class Logits:
    """What `Deployable` reads."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits


def for_xnnpack(module: nn.Module, example: torch.Tensor, quantised: bool = False) -> None:
    """
    Changes a `Deployable` with a folded model to what XNNPACK computes.

    Args:
        example: an input, to learn numbers of channels from.
        quantised: products will be in 8 bits.
    """
    model = module.model
    shapes = shapes_at(module, example, Standardise, PoolingBranch, MetaFormerLayerNorm, MetaFormerGroupNorm)
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            known = shapes[child][0][1] if child in shapes else 0
            if type(child) is Standardise and known:
                setattr(part, name, StandardiseByProducts(child.over, child.eps, known))
            elif type(child) in (MetaFormerLayerNorm, MetaFormerGroupNorm) and known and split(child) is not None:
                setattr(part, name, norm_by_products(child, known))
            elif type(child) is PoolingBranch and known:
                setattr(part, name, PoolingByProducts(child, known))
            elif type(child) is Attention and type(child.qkv) is nn.Linear and is_usual(child):
                setattr(part, name, AttentionByProducts(child))
            elif type(part) is MLPHead and type(child) is nn.LayerNorm:
                setattr(part, name, LayerNormByProducts(child))
            elif quantised and type(part) is MetaFormerEmbeddings and name == "projection":
                setattr(part, name, Apart(child))
    if type(model).forward is MetaFormerForImageClassification.forward:
        module.model = Classifier(model)


def norm_by_products(norm: nn.Module, channels: int) -> nn.Module:
    """A norm that `fold` could not pass on to its neighbours."""
    standardise, gamma, beta = split(norm)
    scale, shift = (None if value is None else value[None, :, None, None] for value in (gamma, beta))
    return nn.Sequential(
        StandardiseByProducts(standardise.over, standardise.eps, channels), ChannelAffine(scale, shift)
    )


def is_usual(attention: Attention) -> bool:
    """Whether it computes what `scaled_dot_product_attention` does: nobody has registered another function."""
    return attention.is_sdpa or attention.config._attn_implementation == "eager"


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = constant(weight)
    layer.bias = None if bias is None else constant(bias)
    return layer
