"""Token mixers: the exchangeable part of a MetaFormer block.

A mixer is any module built as `Mixer(config, stage)` that maps (batch, channels, height, width) to the same shape;
`stage` counts from 0. `TOKEN_MIXERS` is open: `TOKEN_MIXERS["mine"] = Mine` makes `token_mixers=["mine", ...]` work.

A mixer that computes what pooling does says so by `fused_pool_size`, and kernels compute it, too (`branches.py`).

A module that defines `initialize(std)` initialises itself there, through `transformers.initialization` (which leaves
loaded weights alone); convolutions and linear layers within are initialised by the model.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_poolformer import MetaFormerConfig, check_name
from .ops import activate, squared_relu
from .plain_modules import computes, fusible, is_plain, is_valid_average


@computes("star_relu")
class StarReLU(nn.Module):
    """`scale * relu(x)**2 + bias` with learned scalars (arXiv 2210.13452, section 3.1)."""

    # Mean 0 and variance 1 for a standard normal input: E[relu(x)^2] = 1/2, Var = 5/4.
    scale_init, bias_init = 0.8944, -0.4472

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), self.scale_init))
        self.bias = nn.Parameter(torch.full((1,), self.bias_init))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return activate(hidden_states, "star_relu", self.scale, self.bias)

    def initialize(self, std: float):
        init.constant_(self.scale, self.scale_init)
        init.constant_(self.bias, self.bias_init)


@computes("squared_relu")
class SquaredReLU(nn.Module):
    """`relu(x)**2`, of the MLP head (arXiv 2210.13452)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return squared_relu(hidden_states)


ACTIVATIONS = {"star_relu": StarReLU, "squared_relu": SquaredReLU}


def activation(name: str) -> nn.Module:
    """A new activation module by its name in `ACTIVATIONS` or transformers' `ACT2FN`."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]()
    check_name("hidden_act", name, [*ACTIVATIONS, *ACT2FN])
    return ACT2FN[name]


@fusible
class DefaultInitConv2d(nn.Conv2d):
    """A convolution that keeps PyTorch's initialisation, as the first paper's stem and downsampling do."""

    def initialize(self, std: float):
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            init.uniform_(self.bias, -bound, bound)


@fusible
class Pooling(nn.Module):
    """`avgpool(x) - x` over valid tokens only (arXiv 2111.11418, section 3.2). Parameter-free."""

    def __init__(self, config: MetaFormerConfig, stage: int):
        super().__init__()
        self.pool = nn.AvgPool2d(config.pool_size, stride=1, padding=config.pool_size // 2, count_include_pad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.pool(hidden_states) - hidden_states

    @property
    def fused_pool_size(self) -> int | None:
        """The window of `ops.pool_mixer` where that is what this module computes, else None."""
        return self.pool.kernel_size if is_plain(self, Pooling) and is_valid_average(self.pool) else None


@computes("identity")
class IdentityMixer(nn.Identity):
    """No mixing at all (IdentityFormer)."""

    def __init__(self, config: MetaFormerConfig, stage: int):
        super().__init__()


@fusible
class AttentionWeights(nn.Identity):
    """Of eager attention, (batch, heads, tokens, tokens): a place to look at them."""


def eager_attention_forward(
    module: "Attention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' "eager": as two products. (batch, heads, tokens, head_dim) to (batch, tokens, heads, head_dim)."""
    scores = query @ key.transpose(2, 3) * scaling
    weights = module.weights(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype))
    return (weights @ value).transpose(1, 2), weights


@computes("attention")
class Attention(nn.Module):
    """
    Multi-head self-attention over all tokens, heads of `attention_head_dim` channels.

    `attn_implementation` of transformers says how it is computed: "sdpa" unless told otherwise.
    """

    is_causal = False

    def __init__(self, config: MetaFormerConfig, stage: int):
        super().__init__()
        self.config = config
        dim = config.hidden_sizes[stage]
        self.head_dim = config.attention_head_dim
        self.num_heads = max(dim // self.head_dim, 1)
        inner = self.num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.weights = AttentionWeights()
        self.proj = nn.Linear(inner, dim, bias=config.use_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        height, width = hidden_states.shape[-2:]
        tokens = hidden_states.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, self.head_dim))
        # Each (B, heads, N, head_dim). Taken apart before they are transposed: so their gradients are put together in
        # the order of qkv, and not copied once more.
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = self.proj(self.attend(query, key, value).flatten(2))
        return mixed.transpose(1, 2).unflatten(-1, (height, width))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """From (B, heads, N, head_dim) each to (B, N, heads, head_dim)."""
        if self.is_sdpa:
            # transformers' asks whether there are several tokens, to mask what causal models must not see: a question
            # that an exported graph for all sizes cannot answer, and there is no such mask here.
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return self.function(self, query, key, value, None, scaling=self.head_dim**-0.5)[0]

    @property
    def function(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
        """What computes it, of transformers' functions."""
        name = self.config._attn_implementation or "sdpa"
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)

    @property
    def is_sdpa(self) -> bool:
        """Whether that is `scaled_dot_product_attention`."""
        return self.function is sdpa_attention_forward


@computes("separable_conv")
class SeparableConv(nn.Module):
    """MobileNetV2's inverted separable convolution: 1x1 to 2C, StarReLU, depthwise 7x7, 1x1 back (ConvFormer)."""

    expansion, kernel_size = 2, 7

    def __init__(self, config: MetaFormerConfig, stage: int):
        super().__init__()
        dim = config.hidden_sizes[stage]
        inner = self.expansion * dim
        self.pwconv1 = nn.Conv2d(dim, inner, 1, bias=False)
        self.act = StarReLU()
        self.dwconv = nn.Conv2d(
            inner, inner, self.kernel_size, padding=self.kernel_size // 2, groups=inner, bias=False
        )
        self.pwconv2 = nn.Conv2d(inner, dim, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.pwconv2(self.dwconv(self.act(self.pwconv1(hidden_states))))


@fusible
class DepthwiseConv(DefaultInitConv2d):
    """Depthwise 3x3 convolution (arXiv 2111.11418, table 5)."""

    def __init__(self, config: MetaFormerConfig, stage: int):
        dim = config.hidden_sizes[stage]
        super().__init__(dim, dim, 3, padding=1, groups=dim)


class FixedTokens(nn.Module):
    """Base of mixers whose weight is a (tokens, tokens) matrix: they work at one resolution only."""

    def __init__(self, config: MetaFormerConfig, stage: int):
        super().__init__()
        self.resolution = config.stage_resolution(stage)
        self.num_tokens = self.resolution[0] * self.resolution[1]

    def tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, N), after checking that H, W are what the matrix was made for."""
        if tuple(hidden_states.shape[-2:]) != self.resolution:
            (height, width), got = self.resolution, hidden_states.shape[-2:]
            raise ValueError(
                f"{type(self).__name__} mixes exactly {height}x{width} tokens but got {got[0]}x{got[1]}: resize the "
                "images to config.image_size, or build the model with another image_size."
            )
        if torch.compiler.is_compiling():
            # What follows are views for contiguous memory. PyTorch 2.14 takes the result of group_norm for contiguous
            # in its graphs also where it is channels_last.
            hidden_states = hidden_states.clone(memory_format=torch.contiguous_format)
        return hidden_states.flatten(2)


@fusible
class SpatialMLP(FixedTokens):
    """One linear layer over the tokens, shared by all channels, no bias (PPPF, PPFF)."""

    def __init__(self, config: MetaFormerConfig, stage: int):
        super().__init__(config, stage)
        self.fc = nn.Linear(self.num_tokens, self.num_tokens, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc(self.tokens(hidden_states)).unflatten(-1, self.resolution)


@computes("random")
class RandomMixing(FixedTokens):
    """A frozen random matrix with rows that sum to one (RandFormer)."""

    def __init__(self, config: MetaFormerConfig, stage: int):
        super().__init__(config, stage)
        self.random_matrix = nn.Parameter(torch.empty(self.num_tokens, self.num_tokens), requires_grad=False)

    def register_parameter(self, name: str, param: nn.Parameter | None):
        # Loading replaces parameters by trainable ones: whoever puts the matrix in, it stays frozen.
        super().register_parameter(name, param if param is None else param.requires_grad_(False))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(self.tokens(hidden_states), self.random_matrix).unflatten(-1, self.resolution)

    def initialize(self, std: float):
        init.copy_(self.random_matrix, torch.rand_like(self.random_matrix).softmax(dim=-1))


TOKEN_MIXERS: dict[str, type[nn.Module]] = {
    "pooling": Pooling,
    "identity": IdentityMixer,
    "attention": Attention,
    "separable_conv": SeparableConv,
    "depthwise_conv": DepthwiseConv,
    "spatial_mlp": SpatialMLP,
    "random": RandomMixing,
}
"""The mixers by the names that `MetaFormerConfig.token_mixers` gives them. It is open: enter your own."""


__all__ = ["TOKEN_MIXERS"]
