"""Semantic segmentation: a MetaFormer backbone with Semantic FPN, as in arXiv 2111.11418, section 4.3.

The head is the Panoptic Feature Pyramid's semantic branch (arXiv 1901.02446), here with the layers, the initialisation
and the interpolation of mmsegmentation's `FPN` and `FPNHead`, which the paper used.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple

from .backends import is_exporting
from .configuration_poolformer import MetaFormerConfig
from .modeling_poolformer import (
    MetaFormerBackbone,
    MetaFormerPreTrainedModel,
    PoolFormerBackbone,
    PoolFormerPreTrainedModel,
    dense_backbone,
    register_model_classes,
)
from .plain_modules import fusible


def resize(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Bilinear, `align_corners=False`; to the own size it is the identity, which costs nothing."""
    # An exported graph serves all sizes.
    if not is_exporting() and x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@fusible
class XavierConv2d(nn.Conv2d):
    """Of the pyramid: uniform, by the sum of inputs and outputs."""

    def initialize(self, std: float):
        init.xavier_uniform_(self.weight)
        init.zeros_(self.bias)


@fusible
class KaimingConv2d(nn.Conv2d):
    """Before a ReLU: normal, by the outputs."""

    def initialize(self, std: float):
        init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class ScoreConv2d(nn.Conv2d):
    """The last one: all classes begin nearly equal."""

    def initialize(self, std: float):
        init.normal_(self.weight, std=0.01)
        init.zeros_(self.bias)


class FeaturePyramid(nn.Module):
    """
    Feature pyramid network (arXiv 1612.03144): maps of all levels get the same channels and the coarser ones' content.

    Per level a 1x1 convolution, plus the next coarser result (nearest neighbour), then a 3x3 convolution; no norm.
    """

    def __init__(self, dims: list[int], dim: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(XavierConv2d(dim_in, dim, 1) for dim_in in dims)
        self.fpn_convs = nn.ModuleList(XavierConv2d(dim, dim, 3, padding=1) for _ in dims)

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """From fine to coarse, (B, C_i, H_i, W_i) to (B, dim, H_i, W_i)."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, feature_maps, strict=True)]
        for i in reversed(range(len(laterals) - 1)):
            size = laterals[i].shape[-2:]
            laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], size=size, mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)]


@fusible
class ConvNormReLU(nn.Module):
    """3x3 convolution, BatchNorm (to be synchronised in training on several devices), ReLU."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.conv = KaimingConv2d(dim_in, dim, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)))


class SemanticFPNHead(nn.Module):
    """
    Semantic FPN: every level to the finest resolution by convolutions and doublings, then their sum is classified.

    Level i, counted from 0, has i convolutions, each followed by a doubling; the finest has one without.
    """

    def __init__(self, config: MetaFormerConfig):
        super().__init__()
        dim_in, dim = config.fpn_feature_size, config.decoder_hidden_size
        self.scale_heads = nn.ModuleList(
            nn.ModuleList(ConvNormReLU(dim if k else dim_in, dim) for k in range(max(level, 1)))
            for level in range(config.num_encoder_blocks)
        )
        self.dropout = nn.Dropout2d(config.classifier_dropout_prob)
        self.classifier = ScoreConv2d(dim, config.num_labels, 1)

    def forward(self, pyramid: list[torch.Tensor]) -> torch.Tensor:
        """Maps of the pyramid, from fine to coarse, to logits (B, num_labels, H_0, W_0)."""
        size = pyramid[0].shape[-2:]
        total = None
        for level, (convs, x) in enumerate(zip(self.scale_heads, pyramid, strict=True)):
            for conv in convs:
                x = conv(x)
                if level:
                    x = F.interpolate(x, size=(2 * x.shape[-2], 2 * x.shape[-1]), mode="bilinear", align_corners=False)
            # Doubling does not give the finest map's size where that is odd.
            total = resize(x, size) if total is None else total + resize(x, size)
        return self.classifier(self.dropout(total))


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """
    Mean cross-entropy over the pixels that are not ignored, at the resolution of the labels; 0 if all are ignored.

    Args:
        logits: (B, num_labels, h, w), of any resolution.
        labels: (B, H, W), class indices.
        ignore_index: label of the pixels to leave out.

    Raises:
        ValueError: labels of another shape, or class indices that do not fit the logits.
    """
    if labels.ndim != 3 or len(labels) != len(logits):
        raise ValueError(
            f"labels must be (batch, height, width), with {len(logits)} images, but have shape {tuple(labels.shape)}"
        )
    check_segmentation_labels(labels, logits.shape[1], ignore_index)
    upsampled = resize(logits.float(), labels.shape[-2:])
    total = F.cross_entropy(upsampled, labels.long(), ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def check_segmentation_labels(labels: torch.Tensor, num_labels: int, ignore_index: int):
    """
    Raises ValueError if class indices do not fit the head.

    Only where looking is free: on an accelerator it would wait for the device, and a compiled graph would break.
    """
    if torch.compiler.is_compiling() or labels.device.type != "cpu":
        return
    outside = ((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)
    if outside.any():
        raise ValueError(
            f"labels must be in 0..{num_labels - 1} (config.num_labels={num_labels}) or {ignore_index} "
            f"(config.semantic_loss_ignore_index) but contain {labels[outside].unique().tolist()}"
        )


@auto_docstring(custom_intro="A MetaFormer with Semantic FPN, for semantic segmentation.")
class MetaFormerForSemanticSegmentation(MetaFormerPreTrainedModel):
    accepts_loss_kwargs = False
    backbone_class = MetaFormerBackbone

    def __init__(self, config: MetaFormerConfig):
        super().__init__(config)
        if config.num_labels < 2:
            raise ValueError(
                f"semantic segmentation needs two classes at least, background among them, but num_labels is "
                f"{config.num_labels}"
            )
        # `self.poolformer` or `self.metaformer`: takes the weights of a classifier's checkpoint.
        self.add_module(self.base_model_prefix, dense_backbone(config, self.backbone_class))
        self.neck = FeaturePyramid(self.base_model.channels, config.fpn_feature_size)
        self.decode_head = SemanticFPNHead(config)
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
    ) -> SemanticSegmenterOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
            Images as the image processor makes them.
        labels (`torch.Tensor` of shape `(batch, height, width)`, *optional*):
            Class of each pixel, or `config.semantic_loss_ignore_index`. The loss is the mean cross-entropy over the
            pixels that are not ignored, of the logits interpolated to the size of the labels.

        `logits` are (batch, num_labels, height / 4, width / 4), the resolution of the first stage;
        `post_process_semantic_segmentation` of the image processor brings them to the size of the image.
        `hidden_states` are those of the backbone: the stem's, then one per stage.

        Example:

        ```python
        >>> import torch
        >>> from hf_poolformer import PoolFormerConfig, PoolFormerForSemanticSegmentation

        >>> model = PoolFormerForSemanticSegmentation(PoolFormerConfig.from_variant("poolformer_s12", num_labels=150))
        >>> list(model(torch.zeros(1, 3, 512, 512)).logits.shape)
        [1, 150, 128, 128]
        ```"""
        outputs = self.base_model(pixel_values, return_dict=True, **kwargs)
        logits = self.decode_head(self.neck(outputs.feature_maps))
        loss = None
        if labels is not None:
            loss = segmentation_loss(logits, labels, self.config.semantic_loss_ignore_index)
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


@auto_docstring(custom_intro="A PoolFormer v1 with Semantic FPN, for semantic segmentation.")
class PoolFormerForSemanticSegmentation(PoolFormerPreTrainedModel, MetaFormerForSemanticSegmentation):
    backbone_class = PoolFormerBackbone


register_model_classes(
    "AutoModelForSemanticSegmentation", MetaFormerForSemanticSegmentation, PoolFormerForSemanticSegmentation
)


__all__ = ["MetaFormerForSemanticSegmentation", "PoolFormerForSemanticSegmentation"]
