"""MetaFormer for transformers, and PoolFormer as its special case with pooling.

One block serves every family of *MetaFormer Is Actually What You Need for Vision* (arXiv 2111.11418) and *MetaFormer
Baselines for Vision* (arXiv 2210.13452); what differs between them is the configuration. Tensors are (batch, channels,
height, width) throughout.
"""

import copy
import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import CONFIG_NAME, TransformersKwargs, auto_docstring, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backends import decides, is_exporting
from .configuration_poolformer import MetaFormerConfig, PoolFormerConfig
from .fused_blocks import fused_block, fused_stage, unless_fused
from .fused_embeddings import convolve, enter_stage, normalise
from .ops import drop, residual
from .plain_modules import computes, fusible
from .token_mixers import TOKEN_MIXERS, AttentionWeights, DefaultInitConv2d, SquaredReLU, activation


logger = logging.get_logger(__name__)


@computes("group_norm")
class MetaFormerGroupNorm(nn.GroupNorm):
    """GroupNorm with one group: statistics over C, H, W of each sample, affine per channel."""

    def __init__(self, dim: int, eps: float, bias: bool):
        super().__init__(1, dim, eps=eps)
        if not bias:
            self.bias = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # In channels_last, where only the norm's own parameters learn, as behind a frozen body, PyTorch 2.11 writes
        # gradients of its input on the CPU that nobody has asked for, and nobody has memory for.
        learns = any(each is not None and each.requires_grad for each in (self.weight, self.bias))
        frozen = torch.is_grad_enabled() and not hidden_states.requires_grad
        if learns and frozen and hidden_states.device.type == "cpu":
            # Not contiguous(): an image of one position counts as contiguous, whatever its strides say.
            hidden_states = hidden_states.clone(memory_format=torch.contiguous_format)
        return super().forward(hidden_states)


@computes("layer_norm")
class MetaFormerLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each token, input (B, C, H, W)."""

    def __init__(self, dim: int, eps: float, bias: bool):
        super().__init__(dim, eps=eps, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@fusible
class MetaFormerBatchNorm(nn.BatchNorm2d):
    """BatchNorm, of the ablation only."""

    def __init__(self, dim: int, eps: float, bias: bool):
        super().__init__(dim, eps=eps)
        if not bias:
            self.bias = None


@fusible
class NoNorm(nn.Identity):
    """In place of a norm."""


NORMS = {
    "group_norm": MetaFormerGroupNorm,
    "layer_norm": MetaFormerLayerNorm,
    "batch_norm": MetaFormerBatchNorm,
    "none": NoNorm,
}


def make_norm(name: str, dim: int, config: MetaFormerConfig) -> nn.Module:
    return NORMS[name](dim, eps=config.norm_eps, bias=config.norm_bias)


@computes("drop_path")
class DropPath(nn.Module):
    """
    Stochastic depth (arXiv 1603.09382): drops a residual branch for whole samples, and scales up the kept ones.

    Once per branch, as in the official code. transformers' built-in PoolFormer drops two times more inside the MLP.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    @property
    def drops(self) -> bool:
        return self.training and self.rate != 0.0

    def mask(self, branch: torch.Tensor) -> torch.Tensor | None:
        """A factor per sample, (B,): 0 or 1 / (1 - rate); None where nothing is dropped."""
        if not self.drops:
            return None
        keep = 1.0 - self.rate
        return branch.new_empty(branch.shape[0]).bernoulli_(keep).div_(keep)

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        return drop(branch, self.mask(branch))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


@fusible
class MetaFormerEmbeddings(nn.Module):
    """Overlapping patch embedding that opens a stage: [norm] conv [norm] [position embedding]."""

    def __init__(self, config: MetaFormerConfig, stage: int):
        super().__init__()
        self.config = config
        dim = config.hidden_sizes[stage]
        dim_in = config.hidden_sizes[stage - 1] if stage else config.num_channels
        # The second paper normalises after the stem convolution, but before the others.
        self.pre_norm = make_norm(config.embedding_norm, dim_in, config) if stage else NoNorm()
        # Only the second paper, whose embeddings have norms, initialises these convolutions like all other products.
        conv_class = DefaultInitConv2d if config.embedding_norm == "none" else nn.Conv2d
        self.projection = conv_class(
            dim_in, dim, config.patch_sizes[stage], stride=config.strides[stage], padding=config.padding[stage]
        )
        self.post_norm = NoNorm() if stage else make_norm(config.embedding_norm, dim, config)
        self.position_embeddings = None
        if config.position_embeddings[stage]:
            self.position_embeddings = nn.Parameter(torch.zeros(1, dim, *config.stage_resolution(stage)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = normalise(self.pre_norm, hidden_states, self.config.kernels, reader=self.projection)
        hidden_states = convolve(self.projection, hidden_states, self.config.kernels)
        hidden_states = normalise(self.post_norm, hidden_states, self.config.kernels)
        if self.position_embeddings is not None:
            hidden_states = hidden_states + self.resize_positions(hidden_states.shape[-2:])
        return hidden_states

    def initialize(self, std: float):
        if self.position_embeddings is not None:
            init.zeros_(self.position_embeddings)

    def resize_positions(self, size: torch.Size) -> torch.Tensor:
        """Position embeddings for `size` tokens, interpolated if the model was built for another size."""
        # An exported graph serves all sizes; there interpolation to the own size is the identity, exactly.
        if not is_exporting() and size == self.position_embeddings.shape[-2:]:
            return self.position_embeddings
        # In float32: bicubic has no low-precision kernel everywhere.
        resized = F.interpolate(self.position_embeddings.float(), size=size, mode="bicubic", align_corners=False)
        return resized.to(self.position_embeddings.dtype)


@computes("channel_mlp")
class MetaFormerMLP(nn.Module):
    """Channel MLP: two 1x1 convolutions, which are matrix products over channels."""

    def __init__(self, config: MetaFormerConfig, dim: int):
        super().__init__()
        inner = int(dim * config.mlp_ratio)
        self.conv1 = nn.Conv2d(dim, inner, 1, bias=config.use_bias)
        self.act_fn = activation(config.hidden_act)
        self.conv2 = nn.Conv2d(inner, dim, 1, bias=config.use_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.act_fn(self.conv1(hidden_states)))


@computes("block")
class MetaFormerBlock(GradientCheckpointingLayer):
    """
    The MetaFormer block: `x + mixer(norm(x))`, then `x + mlp(norm(x))`, for any token mixer.

    Each branch may be scaled per channel (layer scale), and so may each shortcut (residual scale). Kernels may compute
    the same (`fused_blocks.py`).
    """

    def __init__(self, config: MetaFormerConfig, stage: int, token_mixer: nn.Module, drop_path_rate: float = 0.0):
        super().__init__()
        self.config = config
        dim = config.hidden_sizes[stage]
        self.use_residual = config.use_residual
        self.before_norm = make_norm(config.norm_layer, dim, config)
        self.token_mixer = token_mixer
        self.drop_path = DropPath(drop_path_rate)
        self.use_mlp = config.use_mlp
        if self.use_mlp:
            self.after_norm = make_norm(config.norm_layer, dim, config)
            self.output = MetaFormerMLP(config, dim)
        self.scale_init_values = {
            "layer_scale": config.layer_scale_init_value if config.use_layer_scale else None,
            "res_scale": config.res_scale_init_values[stage],
        }
        for kind, value in self.scale_init_values.items():
            for branch in (1, 2) if self.use_mlp else (1,):
                scale = None if value is None else nn.Parameter(torch.full((dim,), float(value)))
                self.register_parameter(f"{kind}_{branch}", scale)

    def initialize(self, std: float):
        for name, scale in self.named_parameters(recurse=False):
            init.constant_(scale, self.scale_init_values[name[:-2]])

    @unless_fused(fused_block)
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mix_channels(self.mix_tokens(hidden_states))

    def mix_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Norm, token mixer, residual."""
        branch = self.token_mixer(self.before_norm(hidden_states))
        return self.merge(hidden_states, branch, self.layer_scale_1, self.res_scale_1)

    def mix_channels(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Norm, MLP, residual."""
        if not self.use_mlp:
            return hidden_states
        branch = self.output(self.after_norm(hidden_states))
        return self.merge(hidden_states, branch, self.layer_scale_2, self.res_scale_2)

    def merge(
        self,
        shortcut: torch.Tensor,
        branch: torch.Tensor,
        layer_scale: torch.Tensor | None,
        res_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """`res_scale * shortcut + layer_scale * drop_path(branch)`; scales (C,), the rest (B, C, H, W)."""
        branch = self.drop_path(branch)
        if self.use_residual:
            return residual(shortcut, branch, layer_scale, res_scale)
        return branch if layer_scale is None else branch * layer_scale[:, None, None]


@fusible
class MetaFormerStage(nn.ModuleList):
    """The blocks of one stage, in sequence; slices of a stage are stages."""

    @classmethod
    def from_config(cls, config: MetaFormerConfig, stage: int) -> "MetaFormerStage":
        name = config.token_mixers[stage]
        if name not in TOKEN_MIXERS:
            raise ValueError(f"Unknown token mixer {name!r}: not one of {', '.join(TOKEN_MIXERS)}")
        return cls(
            MetaFormerBlock(config, stage, token_mixer=TOKEN_MIXERS[name](config, stage), drop_path_rate=rate)
            for rate in config.drop_path_rates[stage]
        )

    @unless_fused(fused_stage)
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self:
            hidden_states = block(hidden_states)
        return hidden_states


@auto_docstring
class MetaFormerPreTrainedModel(PreTrainedModel):
    """What all models here share: how they are initialised, loaded and saved."""

    config: MetaFormerConfig
    base_model_prefix = "metaformer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["MetaFormerEmbeddings", "MetaFormerBlock"]  # noqa: RUF012 transformers' own convention
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Code of a subclass is saved if it was registered itself.
        cls._auto_class = None

    def __init__(self, config: MetaFormerConfig, *args, **kwargs):
        if not isinstance(self, MetaFormerEncoder):  # the same of both model types
            check_config(type(self), config)
        super().__init__(config, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for the attention in the text of the class's own file.
        return cls._supports_attention_backend

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """
        As transformers', also in a backbone within, whose configuration is a copy.

        Args:
            attn_implementation: `"sdpa"`, `"eager"`, or another of transformers' names.
            kwargs: as transformers'.
        """
        super().set_attn_implementation(attn_implementation, **kwargs)
        for module in self.modules():
            if isinstance(module, MetaFormerPreTrainedModel):
                module.config._attn_implementation_internal = self.config._attn_implementation

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: Any = None,
        key_mapping: dict[str, str] | None = None,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """
        As transformers', and a PoolFormer v1 loads as a MetaFormer and the other way round.

        Args:
            pretrained_model_name_or_path: folder or Hub id; None for a `state_dict` in `kwargs`.
            model_args: as transformers'.
            config: in the place of the checkpoint's own.
            key_mapping: patterns of names in the checkpoint to names here; None: between the two model types.
            output_loading_info: also return what was missing, left over, or of another shape.
            kwargs: as transformers'; fields of the configuration among them.

        Raises:
            ValueError: the checkpoint is another architecture's, of which no weight fits.
        """
        own = cls.config_class.state_prefix
        if isinstance(config, PreTrainedConfig):
            config = own_config(cls, config, pretrained_model_name_or_path)
        translated = key_mapping is None
        if translated:
            other = {"metaformer": "poolformer", "poolformer": "metaformer"}[own]
            key_mapping = {rf"^{other}\.": f"{own}."}
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            key_mapping=key_mapping,
            output_loading_info=True,
            **kwargs,
        )
        if translated:
            # Or it would be saved under the names of the other class.
            model._weight_conversions = None
        # Who gives no weights asks for new ones, and who asks for the list of what is missing is told.
        if not output_loading_info and kwargs.get("state_dict") != {}:
            check_loaded(model, info, pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Truncated normal for convolutions and linear layers, as in the official code; modules may know better."""
        if hasattr(module, "initialize"):
            module.initialize(self.config.initializer_range)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """
        As transformers', with every Auto class that the saved code serves in `auto_map`, not only this model's.

        A subclass of somebody else is saved with its code where it was registered, by `register_for_auto_class`.

        Args:
            save_directory: gets weights, configuration and code.
            kwargs: as transformers'.
        """
        self.config.auto_map = {}
        if any(type(self) in model_classes for model_classes in AUTO_CLASSES.values()):
            saved = {parent.__module__ for parent in type(self).__mro__}
            self.config.auto_map = {
                auto_class: f"{model_class.__module__.split('.')[-1]}.{model_class.__name__}"
                for auto_class, model_classes in AUTO_CLASSES.items()
                for model_class in model_classes
                if model_class.config_class.model_type == self.config.model_type and model_class.__module__ in saved
            }
        super().save_pretrained(save_directory, **kwargs)


def check_config(model_class: type[MetaFormerPreTrainedModel], config: PreTrainedConfig):
    """Raises an error for a configuration of the other model type, or one whose fields were set to what is none."""
    wanted = model_class.config_class
    if getattr(type(config), "state_prefix", None) != wanted.state_prefix:
        raise TypeError(
            f"{model_class.__name__} is built from a {wanted.__name__} of its own package, but got a "
            f"{type(config).__module__}.{type(config).__name__}: {wanted.__name__}.from_dict(config.to_dict()) makes "
            "one of it, or says why there is none."
        )
    config.validate()


def own_config(
    model_class: type[MetaFormerPreTrainedModel], config: PreTrainedConfig, path: str | os.PathLike | None
) -> PreTrainedConfig:
    """`config`, given for the weights at `path`, as one of `model_class`; ValueError if either is something else."""
    wanted = model_class.config_class
    if getattr(type(config), "state_prefix", None) != wanted.state_prefix:
        attention = config._attn_implementation
        config = wanted.from_dict(config.to_dict(), name_or_path=config.name_or_path)
        config._attn_implementation = attention
    if path is not None and os.path.isfile(os.path.join(path, CONFIG_NAME)) and config.name_or_path != str(path):
        # Its own configuration says whether the weights can be this class's.
        wanted.from_pretrained(path)
    return config


def check_loaded(model: MetaFormerPreTrainedModel, info: dict[str, Any], path: str | os.PathLike | None):
    """Raises ValueError if not one tensor of the model without its head came from the checkpoint."""
    body = model.base_model
    prefix = "" if body is model else f"{model.base_model_prefix}."
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if fresh.issuperset(f"{prefix}{name}" for name in body.state_dict()):
        unread = sorted(info["unexpected_keys"])
        wrong = f"the shapes are not those of {type(model).__name__} with its configuration"
        if not info["mismatched_keys"]:
            wanted, found = f"{prefix}{next(iter(body.state_dict()))}", unread[0] if unread else "none"
            wrong = f"the names of {type(model).__name__} are like {wanted}, those found like {found}"
        raise ValueError(f"no weight of {path or 'the given state_dict'} fits, and all would be random: {wrong}")


class PoolFormerPreTrainedModel(MetaFormerPreTrainedModel):
    config: PoolFormerConfig
    base_model_prefix = "poolformer"
    # No attention, so that there is nothing to choose.
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False


class MetaFormerEncoder(MetaFormerPreTrainedModel):
    """Embeddings and stages. Hidden states are recorded per stage, after its last block."""

    kernel_layer_name = "MetaFormerEncoder"  # by which `from_pretrained(use_kernels=True)` finds kernels for it

    _can_record_outputs = {  # noqa: RUF012 transformers' own convention
        "hidden_states": OutputRecorder(MetaFormerStage, capture_initial_hidden_state=False),
        "attentions": OutputRecorder(AttentionWeights),
    }

    def __init__(self, config: MetaFormerConfig):
        super().__init__(config)
        stages = range(len(config.depths))
        self.patch_embeddings = nn.ModuleList(MetaFormerEmbeddings(config, stage) for stage in stages)
        self.block = nn.ModuleList(MetaFormerStage.from_config(config, stage) for stage in stages)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @decides
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        if kwargs.get("output_attentions") and self.config._attn_implementation not in ("eager", None):
            logger.warning_once(
                'Only attn_implementation="eager" has attention weights to give with output_attentions.'
            )
        hidden_states = pixel_values
        for embed, stage in zip(self.patch_embeddings, self.block, strict=True):
            hidden_states = enter_stage(embed, stage, hidden_states)
        return BaseModelOutput(last_hidden_state=hidden_states)


class MetaFormerBackboneEncoder(MetaFormerEncoder):
    """The encoder of a backbone: gives the output of the stem, then of each stage."""

    kernel_layer_name = "MetaFormerBackboneEncoder"

    # Nothing is recorded by hooks: a model around the backbone that records its own layers would get these, too.
    _can_record_outputs = {}  # noqa: RUF012

    @decides
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden_states = [self.patch_embeddings[0](pixel_values)]
        hidden_states.append(self.block[0](hidden_states[0]))
        for embed, stage in zip(self.patch_embeddings[1:], self.block[1:], strict=True):
            hidden_states.append(enter_stage(embed, stage, hidden_states[-1]))
        return tuple(hidden_states)


def check_pixel_values(pixel_values: torch.Tensor | None, num_channels: int):
    """Raises ValueError unless `pixel_values` is (batch, num_channels, height, width)."""
    if pixel_values is None:
        raise ValueError("You have to specify pixel_values")
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values must be (batch, {num_channels}, height, width) but has shape {tuple(pixel_values.shape)}. "
            "The image processor makes such a batch; config.num_channels sets the number of channels."
        )


@auto_docstring(custom_intro="A MetaFormer without a head: stages of blocks that mix tokens by whatever mixer.")
class MetaFormerModel(MetaFormerPreTrainedModel):
    def __init__(self, config: MetaFormerConfig):
        super().__init__(config)
        self.encoder = MetaFormerEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.patch_embeddings[0]

    def set_input_embeddings(self, value: nn.Module):
        self.encoder.patch_embeddings[0] = value

    @can_return_tuple
    @auto_docstring
    def forward(
        self, pixel_values: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
            Images as the image processor makes them.

        `pooler_output` is the mean of `last_hidden_state` over height and width. The final norm belongs to the
        classifier: for normalised features load `ForImageClassification` with `num_labels=0` and take its `logits`.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        outputs = self.encoder(pixel_values, return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.last_hidden_state.mean([-2, -1]),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def make_dropout(rate: float) -> nn.Module:
    """Dropout, and nothing at all, in exported graphs either, where there is none."""
    return nn.Dropout(rate) if rate else nn.Identity()


@fusible
class MLPHead(nn.Module):
    """Classifier of ConvFormer and CAFormer: fc to 4C, squared ReLU, LayerNorm (eps 1e-5), dropout, fc."""

    expansion = 4

    def __init__(self, dim: int, num_labels: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, self.expansion * dim)
        self.act = SquaredReLU()
        self.norm = nn.LayerNorm(self.expansion * dim)
        self.dropout = make_dropout(dropout)
        self.fc2 = nn.Linear(self.expansion * dim, num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.norm(self.act(self.fc1(features)))))


def make_head(config: MetaFormerConfig) -> nn.Module:
    dim = config.hidden_sizes[-1]
    if config.num_labels == 0:
        return nn.Identity()
    if config.head_type == "mlp":
        return MLPHead(dim, config.num_labels, config.head_dropout)
    return nn.Linear(dim, config.num_labels)


@auto_docstring(custom_intro="A MetaFormer with an image classification head on the globally averaged features.")
class MetaFormerForImageClassification(MetaFormerPreTrainedModel):
    accepts_loss_kwargs = False
    base_model_class = MetaFormerModel

    def __init__(self, config: MetaFormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        # `self.poolformer` or `self.metaformer`: the wire format of state dicts.
        self.add_module(self.base_model_prefix, self.base_model_class(config))
        dim = config.hidden_sizes[-1]
        if config.head_norm_first:
            self.norm = make_norm(config.norm_layer, dim, config)
        else:
            self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        # Before a linear head; an MLP head has its own before its last layer.
        self.dropout = make_dropout(config.head_dropout if config.head_type == "linear" else 0.0)
        self.classifier = make_head(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_input_embeddings()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
            Images as the image processor makes them.
        labels (`torch.Tensor`, *optional*):
            Class indices (batch,), or targets (batch, num_labels) for regression and multi-label classification;
            `config.problem_type` says which, and is inferred from the first labels if unset.
        """
        outputs = self.base_model(pixel_values, return_dict=True, **kwargs)
        hidden_states = outputs.last_hidden_state
        if self.config.head_norm_first:
            features = self.norm(hidden_states).mean([-2, -1])
        else:
            features = self.norm(outputs.pooler_output)
        logits = self.classifier(self.dropout(features))

        loss = None
        if labels is not None:
            if self.num_labels == 0:
                raise ValueError("labels were given to a feature extractor: num_labels is 0")
            check_labels(labels, logits, self.config.problem_type)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)

        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def check_labels(labels: torch.Tensor, logits: torch.Tensor, problem_type: str | None):
    """
    Raises ValueError if labels are not one per image, or per logit, or if class indices do not fit the head.

    The loss would spread a target of another shape over the logits. Indices are looked at where that is free: on an
    accelerator it would wait for the device, and a compiled graph would break.
    """
    batch, num_labels = logits.shape
    integers = labels.dtype in (torch.long, torch.int)
    single = problem_type == "single_label_classification" or (problem_type is None and integers and num_labels > 1)
    wanted = (batch,) if single or num_labels == 1 else (batch, num_labels)
    if labels.shape not in (wanted, (batch, 1) if len(wanted) == 1 else wanted):
        kind = "class indices" if single else problem_type or "numbers"
        raise ValueError(
            f"labels must have shape {wanted} for {kind} (config.num_labels={num_labels}), but have "
            f"{tuple(labels.shape)}, {labels.dtype}"
        )
    if not single or torch.compiler.is_compiling() or labels.device.type != "cpu" or labels.is_floating_point():
        return
    # -100 is what the loss ignores.
    outside = ((labels < 0) | (labels >= num_labels)) & (labels != -100)
    if outside.any():
        wrong = labels[outside].unique().tolist()
        raise ValueError(f"labels must be in 0..{num_labels - 1} (config.num_labels={num_labels}) but contain {wrong}")


@auto_docstring(custom_intro="A MetaFormer backbone, for detection and segmentation heads.")
class MetaFormerBackbone(BackboneMixin, MetaFormerPreTrainedModel):
    has_attentions = False

    def __init__(self, config: MetaFormerConfig):
        super().__init__(config)
        self.encoder = MetaFormerBackboneEncoder(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        # One norm per feature map, as the paper has for dense tasks (official norm0, norm2, norm4, norm6).
        self.hidden_states_norms = nn.ModuleDict(
            {
                name: make_norm(config.norm_layer, dim, config)
                for name, dim in zip(self.out_features, self.channels, strict=True)
            }
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.patch_embeddings[0]

    def set_input_embeddings(self, value: nn.Module):
        self.encoder.patch_embeddings[0] = value

    @can_return_tuple
    @filter_output_hidden_states
    @auto_docstring
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
            Images as the image processor makes them.

        `feature_maps` are normed, (batch, channels, height, width) at strides 4, 8, 16, 32 for stage 1 to 4;
        `hidden_states` are the same before the norm, the stem's first, one for each of `stage_names`.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        hidden_states = self.encoder(pixel_values)
        feature_maps = tuple(
            self.hidden_states_norms[name](hidden_state)
            for name, hidden_state in zip(self.stage_names, hidden_states, strict=True)
            if name in self.out_features
        )
        return BackboneOutput(feature_maps=feature_maps, hidden_states=hidden_states)


@auto_docstring(custom_intro="PoolFormer v1 without a head: MetaFormer with average pooling as the token mixer.")
class PoolFormerModel(PoolFormerPreTrainedModel, MetaFormerModel):
    pass


@auto_docstring(custom_intro="PoolFormer v1 with an image classification head (norm, global mean, linear).")
class PoolFormerForImageClassification(PoolFormerPreTrainedModel, MetaFormerForImageClassification):
    base_model_class = PoolFormerModel


@auto_docstring(custom_intro="A PoolFormer v1 backbone, for detection and segmentation heads.")
class PoolFormerBackbone(PoolFormerPreTrainedModel, MetaFormerBackbone):
    pass


def dense_backbone(
    config: MetaFormerConfig, backbone_class: type[MetaFormerBackbone], first_stage: int = 1
) -> MetaFormerBackbone:
    """A backbone that gives all feature maps from `first_stage` on, whichever `config` names; `config` is copied."""
    config = copy.deepcopy(config)
    config.out_features = config.stage_names[first_stage:]
    return backbone_class(config)


AUTO_CLASSES: dict[str, tuple[type[MetaFormerPreTrainedModel], ...]] = {}


def register_model_classes(auto_class: str, *model_classes: type[MetaFormerPreTrainedModel]):
    """
    Enter `model_classes` as those of transformers' `auto_class`.

    Saved models then carry their code, so that they load with trust_remote_code=True without this package.
    """
    AUTO_CLASSES[auto_class] = model_classes
    for model_class in model_classes:
        model_class.register_for_auto_class(auto_class)


for config_class in (MetaFormerConfig, PoolFormerConfig):
    config_class.register_for_auto_class()
register_model_classes("AutoModel", MetaFormerModel, PoolFormerModel)
register_model_classes(
    "AutoModelForImageClassification", MetaFormerForImageClassification, PoolFormerForImageClassification
)
register_model_classes("AutoBackbone", MetaFormerBackbone, PoolFormerBackbone)


__all__ = [
    "MetaFormerBackbone",
    "MetaFormerForImageClassification",
    "MetaFormerModel",
    "PoolFormerBackbone",
    "PoolFormerForImageClassification",
    "PoolFormerModel",
]
