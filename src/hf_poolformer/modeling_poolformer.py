"""MetaFormer for transformers, and PoolFormer as its special case with pooling.

One block serves every family of *MetaFormer Is Actually What You Need for Vision* (arXiv 2111.11418) and *MetaFormer
Baselines for Vision* (arXiv 2210.13452); what differs between them is the configuration. Tensors are (batch, channels,
height, width) throughout.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithNoAttention,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_poolformer import MetaFormerConfig, PoolFormerConfig
from .ops import ACTIVATIONS, channel_mlp, choose_backend, infer_blocks, lay_out, pool_mixer
from .token_mixers import TOKEN_MIXERS, DefaultInitConv2d, Pooling, SquaredReLU, activation


class MetaFormerGroupNorm(nn.GroupNorm):
    """GroupNorm with one group: statistics over C, H, W of each sample, affine per channel."""

    def __init__(self, dim: int, eps: float, bias: bool):
        super().__init__(1, dim, eps=eps)
        if not bias:
            self.bias = None


class MetaFormerLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each token, input (B, C, H, W)."""

    def __init__(self, dim: int, eps: float, bias: bool):
        super().__init__(dim, eps=eps, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MetaFormerBatchNorm(nn.BatchNorm2d):
    """BatchNorm, of the ablation only."""

    def __init__(self, dim: int, eps: float, bias: bool):
        super().__init__(dim, eps=eps)
        if not bias:
            self.bias = None


class NoNorm(nn.Identity):
    """In place of a norm."""


NORMS = {
    "group_norm": MetaFormerGroupNorm,
    "layer_norm": MetaFormerLayerNorm,
    "batch_norm": MetaFormerBatchNorm,
    "none": NoNorm,
}


def make_norm(name: str, dim: int, config: MetaFormerConfig) -> nn.Module:
    if name not in NORMS:
        raise ValueError(f"Unknown norm {name!r}: not one of {', '.join(NORMS)}")
    return NORMS[name](dim, eps=config.norm_eps, bias=config.norm_bias)


class DropPath(nn.Module):
    """
    Stochastic depth (arXiv 1603.09382): drops a residual branch for whole samples, and scales up the kept ones.

    Once per branch, as in the official code. transformers' built-in PoolFormer drops two times more inside the MLP.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def mask(self, branch: torch.Tensor) -> torch.Tensor | None:
        """A factor per sample, (B,): 0 or 1 / (1 - rate); None where nothing is dropped."""
        if self.rate == 0.0 or not self.training:
            return None
        keep = 1.0 - self.rate
        return branch.new_empty(branch.shape[0]).bernoulli_(keep).div_(keep)

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        mask = self.mask(branch)
        return branch if mask is None else branch * mask[:, None, None, None]

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class MetaFormerEmbeddings(nn.Module):
    """Overlapping patch embedding that opens a stage: [norm] conv [norm] [position embedding]."""

    def __init__(self, config: MetaFormerConfig, stage: int):
        super().__init__()
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
        hidden_states = self.post_norm(self.project(self.pre_norm(hidden_states)))
        if self.position_embeddings is not None:
            hidden_states = hidden_states + self.resize_positions(hidden_states.shape[-2:])
        return hidden_states

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.projection.weight
        if (
            hidden_states.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not hidden_states.is_contiguous()
            and weight.is_contiguous()
            and weight.numel() > hidden_states.numel()
        ):
            # For a channels_last input PyTorch reorders a contiguous weight in every call, which for one image takes
            # longer than the convolution; the input is the smaller one here.
            return self.projection(hidden_states.contiguous()).contiguous(memory_format=torch.channels_last)
        return self.projection(hidden_states)

    def initialize(self, std: float):
        if self.position_embeddings is not None:
            init.zeros_(self.position_embeddings)

    def resize_positions(self, size: torch.Size) -> torch.Tensor:
        """Position embeddings for `size` tokens, interpolated if the model was built for another size."""
        # An exported graph serves all sizes; there interpolation to the own size is the identity, exactly.
        if not torch.compiler.is_exporting() and size == self.position_embeddings.shape[-2:]:
            return self.position_embeddings
        # In float32: bicubic has no low-precision kernel everywhere.
        resized = F.interpolate(self.position_embeddings.float(), size=size, mode="bicubic", align_corners=False)
        return resized.to(self.position_embeddings.dtype)


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


def are_plain(parts: dict[nn.Module, type | None]) -> bool:
    """
    Whether modules are of these very classes (None: any), with no hooks and no forward of their own.

    A fused operation would pass these by, and with them adapters, quantised layers, and accelerate's offloading.
    """
    return all(
        (kind is None or type(part) is kind)
        and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
        for part, kind in parts.items()
    )


class MetaFormerBlock(GradientCheckpointingLayer):
    """
    The MetaFormer block: `x + mixer(norm(x))`, then `x + mlp(norm(x))`, for any token mixer.

    Each branch may be scaled per channel (layer scale), and so may each shortcut (residual scale).
    """

    def __init__(self, config: MetaFormerConfig, stage: int, token_mixer: nn.Module, drop_path_rate: float = 0.0):
        super().__init__()
        dim = config.hidden_sizes[stage]
        self.use_residual = config.use_residual
        self.before_norm = make_norm(config.norm_layer, dim, config)
        self.token_mixer = token_mixer
        self.drop_path = DropPath(drop_path_rate)
        self.use_mlp = config.use_mlp
        self.activation = config.hidden_act
        self.kernels = config.kernels
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

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        fused = choose_backend(hidden_states, preferred=self.kernels) != "reference"
        mixer = self.mixer_arguments() if fused else None
        mlp = self.mlp_arguments() if fused and self.use_mlp else None
        statistics = None
        if mixer is not None:
            mask = self.drop_path.mask(hidden_states)
            hidden_states, statistics = pool_mixer(
                hidden_states, mask=mask, with_statistics=mlp is not None, preferred=self.kernels, **mixer
            )
        else:
            branch = self.token_mixer(self.before_norm(hidden_states))
            hidden_states = self.merge(hidden_states, branch, self.layer_scale_1, self.res_scale_1)
        if mlp is not None:
            mask = self.drop_path.mask(hidden_states)
            hidden_states, _ = channel_mlp(
                hidden_states, mask=mask, statistics=statistics, preferred=self.kernels, **mlp
            )
        elif self.use_mlp:
            branch = self.output(self.after_norm(hidden_states))
            hidden_states = self.merge(hidden_states, branch, self.layer_scale_2, self.res_scale_2)
        return hidden_states

    def mixer_arguments(self) -> dict | None:
        """What `pool_mixer` needs to compute the first branch and its shortcut; None where it cannot."""
        norm, mixer = self.before_norm, self.token_mixer
        if not (self.use_residual and type(mixer) is Pooling):
            return None
        parts = {norm: MetaFormerGroupNorm, mixer: Pooling, mixer.pool: nn.AvgPool2d, self.drop_path: DropPath}
        if not are_plain(parts):
            return None
        weight = norm.weight
        if norm.bias is not None and norm.bias.requires_grad and torch.is_grad_enabled():
            # The bias cancels, but DistributedDataParallel waits for its gradient: zero.
            weight = weight + 0.0 * norm.bias
        scales = {"layer_scale": self.layer_scale_1, "res_scale": self.res_scale_1}
        return {"pool_size": mixer.pool.kernel_size, "eps": norm.eps, "weight": weight, **scales}

    def mlp_arguments(self) -> dict | None:
        """What `channel_mlp` needs to compute the second branch and its shortcut; None where it cannot."""
        norm, mlp = self.after_norm, self.output
        if not (self.use_residual and self.activation in ACTIVATIONS and type(mlp) is MetaFormerMLP):
            return None
        parts = {norm: MetaFormerGroupNorm, self.drop_path: DropPath, mlp: None, mlp.act_fn: None}
        if not are_plain(parts | {mlp.conv1: nn.Conv2d, mlp.conv2: nn.Conv2d}):
            return None
        return {
            "weight1": mlp.conv1.weight,
            "weight2": mlp.conv2.weight,
            "activation": self.activation,
            "eps": norm.eps,
            "norm_weight": norm.weight,
            "norm_bias": norm.bias,
            "bias1": mlp.conv1.bias,
            "bias2": mlp.conv2.bias,
            "act_scale": getattr(mlp.act_fn, "scale", None),
            "act_bias": getattr(mlp.act_fn, "bias", None),
            "layer_scale": self.layer_scale_2,
            "res_scale": self.res_scale_2,
        }

    def merge(
        self,
        shortcut: torch.Tensor,
        branch: torch.Tensor,
        layer_scale: torch.Tensor | None,
        res_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """`res_scale * shortcut + layer_scale * drop_path(branch)`; scales (C,), the rest (B, C, H, W)."""
        branch = self.drop_path(branch)
        if not self.use_residual:
            return branch if layer_scale is None else branch * layer_scale[:, None, None]
        if res_scale is not None:
            shortcut = shortcut * res_scale[:, None, None]
        if layer_scale is None:
            return shortcut + branch
        # Into the product, which nothing else holds: a fresh result would cost more than the addition.
        return (branch * layer_scale[:, None, None]).add_(shortcut)


class MetaFormerStage(nn.ModuleList):
    """The blocks of one stage, in sequence."""

    def __init__(self, config: MetaFormerConfig, stage: int):
        name = config.token_mixers[stage]
        if name not in TOKEN_MIXERS:
            raise ValueError(f"Unknown token mixer {name!r}: not one of {', '.join(TOKEN_MIXERS)}")
        super().__init__(
            MetaFormerBlock(config, stage, token_mixer=TOKEN_MIXERS[name](config, stage), drop_path_rate=rate)
            for rate in config.drop_path_rates[stage]
        )
        self.kernels = config.kernels

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            fused = infer_blocks(hidden_states, self.fused_arguments(), owner=self, preferred=self.kernels)
            if fused is not None:
                return fused
        for block in self:
            hidden_states = block(hidden_states)
        return hidden_states

    def fused_arguments(self) -> list[tuple[dict, dict]]:
        """Of all blocks, for `infer_blocks`; empty if one is not fused or drops paths."""
        arguments = []
        for block in self:
            drops = block.training and block.drop_path.rate > 0
            mixer = block.mixer_arguments() if block.use_mlp and not drops and are_plain({block: None}) else None
            mlp = None if mixer is None else block.mlp_arguments()
            if mlp is None:
                return []
            arguments.append((mixer, mlp))
        return arguments


@auto_docstring
class MetaFormerPreTrainedModel(PreTrainedModel):
    config: MetaFormerConfig
    base_model_prefix = "metaformer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["MetaFormerEmbeddings", "MetaFormerBlock"]  # noqa: RUF012 transformers' own convention

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

    def save_pretrained(self, save_directory, **kwargs):
        """As transformers', with every Auto class that the saved code serves in `auto_map`, not only this model's."""
        saved = {parent.__module__ for parent in type(self).__mro__}
        self.config.auto_map = {
            auto_class: f"{model_class.__module__.split('.')[-1]}.{model_class.__name__}"
            for auto_class, model_classes in AUTO_CLASSES.items()
            for model_class in model_classes
            if model_class.config_class.model_type == self.config.model_type and model_class.__module__ in saved
        }
        super().save_pretrained(save_directory, **kwargs)


class PoolFormerPreTrainedModel(MetaFormerPreTrainedModel):
    config: PoolFormerConfig
    base_model_prefix = "poolformer"


class MetaFormerEncoder(MetaFormerPreTrainedModel):
    """Embeddings and stages. Hidden states are recorded per stage, after its last block."""

    _can_record_outputs = {  # noqa: RUF012 transformers' own convention
        "hidden_states": OutputRecorder(MetaFormerStage, capture_initial_hidden_state=False)
    }

    def __init__(self, config: MetaFormerConfig):
        super().__init__(config)
        stages = range(len(config.depths))
        self.patch_embeddings = nn.ModuleList(MetaFormerEmbeddings(config, stage) for stage in stages)
        self.block = nn.ModuleList(MetaFormerStage(config, stage) for stage in stages)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithNoAttention:
        hidden_states = lay_out(pixel_values, preferred=self.config.kernels)
        for embed, stage in zip(self.patch_embeddings, self.block, strict=True):
            hidden_states = stage(embed(hidden_states))
        return BaseModelOutputWithNoAttention(last_hidden_state=hidden_states)


class MetaFormerBackboneEncoder(MetaFormerEncoder):
    """The encoder of a backbone: gives the output of the stem, then of each stage."""

    # Nothing is recorded by hooks: a model around the backbone that records its own layers would get these, too.
    _can_record_outputs = {}  # noqa: RUF012

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixel_values = lay_out(pixel_values, preferred=self.config.kernels)
        hidden_states = [self.patch_embeddings[0](pixel_values)]
        hidden_states.append(self.block[0](hidden_states[0]))
        for embed, stage in zip(self.patch_embeddings[1:], self.block[1:], strict=True):
            hidden_states.append(stage(embed(hidden_states[-1])))
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
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        r"""
        `pooler_output` is the mean of `last_hidden_state` over height and width. The final norm belongs to the
        classifier: for normalised features load `ForImageClassification` with `num_labels=0` and take its `logits`.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        outputs = self.encoder(pixel_values, **kwargs)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.last_hidden_state.mean([-2, -1]),
            hidden_states=outputs.hidden_states,
        )


class MLPHead(nn.Module):
    """Classifier of ConvFormer and CAFormer: fc to 4C, squared ReLU, LayerNorm (eps 1e-5), fc."""

    expansion = 4

    def __init__(self, dim: int, num_labels: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, self.expansion * dim)
        self.act = SquaredReLU()
        self.norm = nn.LayerNorm(self.expansion * dim)
        self.fc2 = nn.Linear(self.expansion * dim, num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(self.act(self.fc1(features))))


HEADS = {"linear": nn.Linear, "mlp": MLPHead}


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
        self.classifier = HEADS[config.head_type](dim, config.num_labels) if config.num_labels else nn.Identity()
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
    ) -> ImageClassifierOutputWithNoAttention:
        r"""
        labels (`torch.Tensor`, *optional*):
            Class indices (batch,), or targets (batch, num_labels) for regression and multi-label classification;
            `config.problem_type` says which, and is inferred from the first labels if unset.
        """
        outputs = self.base_model(pixel_values, **kwargs)
        hidden_states = outputs.last_hidden_state
        if self.config.head_norm_first:
            features = self.norm(hidden_states).mean([-2, -1])
        else:
            features = self.norm(outputs.pooler_output)
        logits = self.classifier(features)

        loss = None
        if labels is not None:
            if self.num_labels == 0:
                raise ValueError("labels were given to a feature extractor: num_labels is 0")
            if self.config.problem_type in (None, "single_label_classification"):
                check_labels(labels, self.num_labels)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)

        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def check_labels(labels: torch.Tensor, num_labels: int):
    """
    Raises ValueError if class indices do not fit the head.

    Only where looking is free: on an accelerator it would wait for the device, and a compiled graph would break.
    """
    if torch.compiler.is_compiling() or labels.device.type != "cpu" or labels.is_floating_point():
        return
    outside = (labels < 0) | (labels >= num_labels)
    # -100 is what the loss ignores.
    if num_labels > 1 and (outside & (labels != -100)).any():
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
