"""RetinaNet and Mask R-CNN on a MetaFormer, as in arXiv 2111.11418 (section 4.2, tables 3 and 4).

The networks are torchvision's: feature pyramid, RetinaNet head, RPN head, box and mask heads of Mask R-CNN. What
happens between them (anchors, assignment, sampling, decoding, suppression, losses) is mmdetection 2.19's under its
`retinanet_r50_fpn` and `mask_rcnn_r50_fpn` configurations, with which the paper's models were trained, so that
official checkpoints give the official detections. torchvision does the following differently, which is why it is
computed here:

| | torchvision | mmdetection, and here |
|---|---|---|
| anchor edges | rounded to whole pixels | exact |
| anchor strides | image size // size of the feature map | 4, 8, 16, ... whatever the padding |
| P6 of RetinaNet | from P5 if that has as many channels | from the last feature map of the backbone, always |
| P7 of RetinaNet | of ReLU(P6) | of P6 |
| anchors beyond an image's own padding | like any other | not trained |
| anchors that fit a box best, though badly | go to the box they overlap most | go to that box, the last of several |
| such anchors of RetinaNet | none are assigned | assigned, however small the overlap |
| the same for the regions of Mask R-CNN | none | from an IoU of 0.5 |
| boxes added to the regions | matched like regions | each to itself |
| width and height deltas | limited from above | limited to log(1000 / 16) on both sides |
| background of Mask R-CNN | class 0, with box deltas of its own | the last class, without |
| box loss of RPN and Mask R-CNN | smooth L1, beta 1/9 | L1 |
| RetinaNet's losses | mean over images of sum / positives of that image | sum / positives of the batch |
| RPN's regions in training | 2000 per image after suppression | 1000 |
| regions left out | edge below 0.001 (RPN), 0.01 (boxes) | only empty ones, RPN only |
| RoIAlign | half a pixel off, 2 x 2 samples per bin | `aligned=True`, as many samples as a bin has pixels |
| scale of the levels for RoIAlign | guessed from the first batch | the strides |
| level of a region | `floor(4 + log2(s / 224) + 1e-6)` | `floor(log2(s / 56 + 1e-6))` of stride 4 and up |
| mask targets | RoIAlign, not aligned, grey | aligned, then `>= 0.5` |
| masks in the image | pasted at rounded boxes | sampled at pixel centres (in the image processor) |
| classes and boxes | classes count from 1 | from 0 |

One thing is as in neither: anchors beyond an image's own padding (to a multiple of 32) find nothing, while mmdetection
lets them if larger images in the batch leave room. With one image at a time, as it evaluates, there are none.

Pixels are those of `pixel_values`; boxes are (left, top, right, bottom) in pixels unless said otherwise, and as in
mmdetection a box's edge is `right - left`, without the additional pixel of old. Losses, decoding and suppression are
computed in float32, whatever the model's type.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, batched_nms, box_convert, box_iou, roi_align, sigmoid_focal_loss
from torchvision.ops.boxes import clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple

from .configuration_poolformer import MetaFormerConfig
from .modeling_poolformer import (
    MetaFormerBackbone,
    MetaFormerPreTrainedModel,
    PoolFormerBackbone,
    PoolFormerPreTrainedModel,
    check_pixel_values,
    dense_backbone,
    register_model_classes,
)


BACKGROUND, IGNORED = -1, -2

# Width and height deltas beyond this are cut off, so that exp() stays finite.
MAX_LOG_RATIO = math.log(1000 / 16)

Size = tuple[int, int]  # height, width in pixels


# ---------------------------------------------------------------------------------------------------------------------
# Boxes


def encode_boxes(boxes: torch.Tensor, references: torch.Tensor, stds: tuple[float, ...]) -> torch.Tensor:
    """Deltas (N, 4) that lead from `references` (N, 4) to `boxes` (N, 4): centre, in reference edges; log of edges."""
    boxes, references = (box_convert(side, "xyxy", "cxcywh") for side in (boxes, references))
    edges = references[:, 2:]
    deltas = torch.cat([(boxes[:, :2] - references[:, :2]) / edges, (boxes[:, 2:] / edges).log()], dim=1)
    return deltas / deltas.new_tensor(stds)


def decode_boxes(deltas: torch.Tensor, references: torch.Tensor, stds: tuple[float, ...], size: Size) -> torch.Tensor:
    """Boxes (..., 4) that `deltas` (..., 4) make of `references` (broadcast against them), clipped to the image."""
    return clip_boxes_to_image(apply_deltas(deltas, references, stds), size)


def apply_deltas(deltas: torch.Tensor, references: torch.Tensor, stds: tuple[float, ...]) -> torch.Tensor:
    """`decode_boxes` of an image without an end."""
    deltas = deltas * deltas.new_tensor(stds)
    references = box_convert(references, "xyxy", "cxcywh")
    edges = references[..., 2:]
    centres = references[..., :2] + deltas[..., :2] * edges
    halves = edges * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    return torch.cat([centres - halves, centres + halves], dim=-1)


def pairwise_iou(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """IoU (G, N), a few boxes at a time: torchvision's intermediate results are several times as large."""
    iou = anchors.new_empty(len(boxes), len(anchors))
    for rows, part in zip(iou.split(16), boxes.split(16), strict=True):
        rows.copy_(box_iou(part, anchors))
    return iou


def assign(
    boxes: torch.Tensor,
    anchors: torch.Tensor,
    positive: float,
    negative: float,
    low_quality: float,
) -> torch.Tensor:
    """
    For each anchor (N, 4) the index of its box (G, 4), `BACKGROUND` or `IGNORED`; mmdetection's MaxIoUAssigner.

    An anchor belongs to the box that it overlaps most if that IoU is at least `positive`, to the background if it is
    below `negative`. In any case a box gets the anchors that fit it best, all of them if there are several, if their
    IoU is at least `low_quality` (and not zero).
    """
    if len(boxes) == 0 or len(anchors) == 0:
        return torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    iou = pairwise_iou(boxes, anchors)
    overlap, nearest = iou.max(dim=0)
    assigned = torch.full_like(nearest, IGNORED)
    assigned[overlap < negative] = BACKGROUND
    assigned = torch.where(overlap >= positive, nearest, assigned)

    best = iou.amax(dim=1, keepdim=True)
    box, anchor = ((iou == best) & (best >= low_quality) & (best > 0)).nonzero(as_tuple=True)
    last = torch.full_like(assigned, -1).scatter_reduce(0, anchor, box, "amax")
    return torch.where(last >= 0, last, assigned)


def sample(assigned: torch.Tensor, number: int, positive_fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of randomly chosen positives, at most that share of `number`, and of background to fill it up."""
    positives, negatives = (assigned >= 0).nonzero()[:, 0], (assigned == BACKGROUND).nonzero()[:, 0]
    positives = choose(positives, int(number * positive_fraction))
    return positives, choose(negatives, number - len(positives))


def choose(indices: torch.Tensor, number: int) -> torch.Tensor:
    if len(indices) <= number:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:number]]


class Anchors(NamedTuple):
    """Anchors of all levels, one after the other; within a level by row, column, ratio and scale."""

    boxes: torch.Tensor  # (N, 4)
    centres: torch.Tensor  # (N, 2): x, y
    per_level: list[int]

    def within(self, size: Size, multiple: int) -> torch.Tensor:
        """(N,), whether the anchor's cell is in an image of `size` padded to `multiple`, and not beyond."""
        height, width = (math.ceil(edge / multiple) * multiple for edge in size)
        return (self.centres < self.centres.new_tensor([width, height])).all(dim=1)


def make_anchors(
    feature_maps: list[torch.Tensor], strides: list[int], scales: list[float], ratios: list[float]
) -> Anchors:
    """Anchors at each cell of each feature map, centred on the corners of the cells; ratios are height / width."""
    device = feature_maps[0].device
    roots = torch.tensor(ratios, dtype=torch.float32, device=device).sqrt()[:, None]
    scale = torch.tensor(scales, dtype=torch.float32, device=device)
    halves = torch.stack([(scale / roots).flatten(), (scale * roots).flatten()], dim=1) / 2  # (A, 2), in strides
    boxes, centres = [], []
    for feature_map, stride in zip(feature_maps, strides, strict=True):
        y, x = (torch.arange(edge, dtype=torch.float32, device=device) * stride for edge in feature_map.shape[-2:])
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 1, 2)
        boxes.append(torch.cat([grid - halves * stride, grid + halves * stride], dim=-1).reshape(-1, 4))
        centres.append(grid.expand(-1, len(halves), -1).reshape(-1, 2))
    return Anchors(torch.cat(boxes), torch.cat(centres), [level.shape[0] for level in boxes])


# ---------------------------------------------------------------------------------------------------------------------
# Input and output


class Targets(NamedTuple):
    """The objects of one image."""

    boxes: torch.Tensor  # (G, 4), float32
    labels: torch.Tensor  # (G,), from 0
    masks: torch.Tensor | None  # (G, H, W), of the padded image or only of its real part


class Detections(NamedTuple):
    """What was found in one image, the surest first."""

    boxes: torch.Tensor  # (D, 4)
    logits: torch.Tensor  # (D,): sigmoid gives the score
    labels: torch.Tensor  # (D,)


@dataclass
@auto_docstring(custom_intro="Detections of RetinaNet, `max_detections` for each image.")
class MetaFormerObjectDetectionOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` are given):
        Sum of the losses in `loss_dict`.
    loss_dict (`dict[str, torch.Tensor]`, *optional*, returned when `labels` are given):
        The losses under mmdetection's names: `loss_cls`, `loss_bbox` and, with Mask R-CNN, `loss_rpn_cls`,
        `loss_rpn_bbox`, `loss_mask`.
    logits (`torch.FloatTensor` of shape `(batch_size, max_detections, num_labels)`, *optional*):
        Of each detection, the surest first, the logit of its class; all others, and those of places that are left
        over, are the lowest number there is. `sigmoid` gives scores. Absent in training mode with `labels`.
    pred_boxes (`torch.FloatTensor` of shape `(batch_size, max_detections, 4)`, *optional*):
        Boxes (centre x, centre y, width, height), in 0..1 of the image without its padding.
    hidden_states (`tuple(torch.FloatTensor)`, *optional*):
        Of the stem and the stages of the backbone.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.FloatTensor | None = None
    pred_boxes: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
@auto_docstring(custom_intro="Detections of Mask R-CNN with their masks, `max_detections` for each image.")
class MetaFormerInstanceSegmentationOutput(MetaFormerObjectDetectionOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` are given):
        Sum of the losses in `loss_dict`.
    loss_dict (`dict[str, torch.Tensor]`, *optional*, returned when `labels` are given):
        The losses under mmdetection's names.
    logits (`torch.FloatTensor` of shape `(batch_size, max_detections, num_labels)`, *optional*):
        As of [`MetaFormerObjectDetectionOutput`].
    pred_boxes (`torch.FloatTensor` of shape `(batch_size, max_detections, 4)`, *optional*):
        As of [`MetaFormerObjectDetectionOutput`].
    hidden_states (`tuple(torch.FloatTensor)`, *optional*):
        Of the stem and the stages of the backbone.
    pred_masks (`torch.FloatTensor` of shape `(batch_size, max_detections, 28, 28)`, *optional*):
        Logits of the mask of each detection's class, over its box. The image processor's
        `post_process_instance_segmentation` puts them into the image.
    """

    pred_masks: torch.FloatTensor | None = None


def image_sizes(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> list[Size]:
    """(height, width) of each image without its padding, which is at the bottom and on the right."""
    if pixel_mask is None:
        return [tuple(pixel_values.shape[-2:])] * len(pixel_values)
    if pixel_mask.shape != (len(pixel_values), *pixel_values.shape[-2:]):
        raise ValueError(
            f"pixel_mask must be (batch, height, width) of pixel_values, {tuple(pixel_values.shape)}, but has shape "
            f"{tuple(pixel_mask.shape)}."
        )
    pixel_mask = pixel_mask.bool()
    sizes = torch.stack([pixel_mask.any(dim=2).sum(dim=1), pixel_mask.any(dim=1).sum(dim=1)], dim=1).tolist()
    if any(0 in size for size in sizes):
        raise ValueError("pixel_mask must be 1 on the pixels of the image, but is 0 everywhere for one of the images.")
    return [tuple(size) for size in sizes]


def make_targets(
    labels: list[dict[str, torch.Tensor]], sizes: list[Size], num_labels: int, with_masks: bool, device: torch.device
) -> list[Targets]:
    """Targets in pixels of `labels` in DETR's form; empty boxes are left out. Raises ValueError where keys are missing
    or do not fit."""
    if len(labels) != len(sizes):
        raise ValueError(f"labels must have one dictionary per image, {len(sizes)}, but has {len(labels)}.")
    wanted = ("class_labels", "boxes", "masks") if with_masks else ("class_labels", "boxes")
    targets = []
    for target, (height, width) in zip(labels, sizes, strict=True):
        missing = [key for key in wanted if key not in target]
        if missing:
            raise ValueError(f"Each of labels must have {', '.join(wanted)}, but one lacks {', '.join(missing)}.")
        values = [torch.as_tensor(target[key], device=device) for key in wanted]
        classes, boxes = values[0].long(), values[1].float().reshape(-1, 4)
        if any(len(value) != len(classes) for value in (boxes, *values[2:])):
            raise ValueError(f"{', '.join(wanted)} must have as many entries each, got {[len(v) for v in values]}.")
        # Only where looking is free: on an accelerator it would wait for the device.
        if device.type == "cpu" and len(classes) and not (classes.min() >= 0 and classes.max() < num_labels):
            wrong = classes[(classes < 0) | (classes >= num_labels)].unique().tolist()
            raise ValueError(f"class_labels must be in 0..{num_labels - 1} (config.num_labels) but contain {wrong}.")
        boxes = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([width, height, width, height])
        boxes = clip_boxes_to_image(boxes, (height, width))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        masks = values[2] if with_masks else None
        if masks is not None and masks.ndim != 3:
            raise ValueError(f"masks must be (objects, height, width), but have shape {tuple(masks.shape)}.")
        targets.append(Targets(boxes[kept], classes[kept], None if masks is None else masks[kept]))
    return targets


def pack(
    detections: list[Detections], sizes: list[Size], number: int, num_labels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits` (B, number, num_labels) and `pred_boxes` (B, number, 4) of the output."""
    boxes = detections[0].boxes
    logits = boxes.new_full((len(detections), number, num_labels), torch.finfo(boxes.dtype).min)
    pred_boxes = boxes.new_zeros(len(detections), number, 4)
    for index, (found, (height, width)) in enumerate(zip(detections, sizes, strict=True)):
        places = torch.arange(len(found.boxes), device=boxes.device)
        logits[index, places, found.labels] = found.logits
        scaled = found.boxes / boxes.new_tensor([width, height, width, height])
        pred_boxes[index, places] = box_convert(scaled, "xyxy", "cxcywh")
    return logits, pred_boxes


def suppress(
    boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, threshold: float, number: int
) -> torch.Tensor:
    """Indices of at most `number` boxes, the best first, of which no two of a group have a larger IoU."""
    return batched_nms(boxes, scores, groups, threshold)[:number]


# ---------------------------------------------------------------------------------------------------------------------
# Parts


INITIALISERS = {
    "xavier": init.xavier_uniform_,
    "kaiming": lambda weight: init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu"),
    "normal": lambda weight: init.normal_(weight, std=0.01),
    "narrow": lambda weight: init.normal_(weight, std=0.001),
}


def set_initialiser(module: nn.Module, name: str, bias: float = 0.0):
    """Notes how mmdetection initialises the convolutions and linear layers in `module`."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            part.initialiser, part.initial_bias = name, bias


class LastLevelConvolutions(ExtraFPNBlock):
    """Two more levels of RetinaNet's pyramid: P6 from the backbone's last feature map, P7 from P6."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)

    def forward(
        self, results: list[torch.Tensor], feature_maps: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        p6 = self.p6(feature_maps[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


class BoxPredictor(nn.Module):
    """Logits (R, num_labels + 1), the background's last, and deltas (R, 4 * num_labels) of region features (R, C)."""

    def __init__(self, in_channels: int, num_labels: int):
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_labels + 1)
        self.bbox_pred = nn.Linear(in_channels, 4 * num_labels)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cls_score(features), self.bbox_pred(features)


def pool_regions(
    feature_maps: list[torch.Tensor], strides: list[int], regions: list[torch.Tensor], output_size: int
) -> torch.Tensor:
    """
    Features (R, C, output_size, output_size) of the regions of all images, each from the level that suits its size.

    Eq. 1 of the feature pyramid's paper (arXiv 1612.03144): regions of 112 pixels come from stride 8, twice as large
    ones from twice the stride. Interpolates in float32.
    """
    rois = torch.cat([F.pad(boxes, (1, 0), value=index) for index, boxes in enumerate(regions)])
    edge = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    level = (edge / (14 * strides[0]) + 1e-6).log2().floor().clamp(0, len(strides) - 1)
    pooled = feature_maps[0].new_empty(len(rois), feature_maps[0].shape[1], output_size, output_size)
    for index, (feature_map, stride) in enumerate(zip(feature_maps, strides, strict=True)):
        # A level without regions takes part all the same: in distributed training every parameter needs a gradient.
        here = (level == index).nonzero()[:, 0]
        part = roi_align(feature_map.float(), rois[here], output_size, 1 / stride, sampling_ratio=-1, aligned=True)
        pooled = pooled.index_copy(0, here, part.to(pooled.dtype))
    return pooled


def project_masks(masks: torch.Tensor, matched: torch.Tensor, boxes: torch.Tensor, output_size: int) -> torch.Tensor:
    """What `boxes` (P, 4) show of `masks[matched]`, 0 or 1, (P, output_size, output_size), float32."""
    targets = [boxes.new_zeros(0, output_size, output_size)]
    # A few at a time: masks are as large as images, and floats four times as large.
    for index, part in zip(matched.split(32), boxes.split(32), strict=True):
        rois = torch.cat([torch.arange(len(part), device=part.device)[:, None], part], dim=1)
        targets.append(roi_align(masks[index, None].float(), rois, output_size, aligned=True)[:, 0])
    return (torch.cat(targets) >= 0.5).float()


# ---------------------------------------------------------------------------------------------------------------------
# Models


class MetaFormerDetector(MetaFormerPreTrainedModel):
    """What the two detectors share: backbone, feature pyramid, and how the parts are initialised."""

    accepts_loss_kwargs = False
    backbone_class = MetaFormerBackbone
    first_stage = 1  # of those whose feature maps the pyramid takes

    box_stds = (1.0, 1.0, 1.0, 1.0)

    def __init__(self, config: MetaFormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        # `self.poolformer` or `self.metaformer`, as in the classifier, whose checkpoints load as they are.
        self.add_module(self.base_model_prefix, dense_backbone(config, self.backbone_class, self.first_stage))
        channels = list(config.hidden_sizes[self.first_stage - 1 :])
        self.neck = FeaturePyramidNetwork(channels, config.fpn_feature_size, self.make_extra_levels())
        set_initialiser(self.neck, "xavier")
        strides = list(accumulate(config.strides[: config.num_encoder_blocks], mul))
        self.padding_multiple = strides[-1]
        self.strides = strides[self.first_stage - 1 :]

    def make_extra_levels(self) -> ExtraFPNBlock:
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_input_embeddings()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if hasattr(module, "initialiser"):
            INITIALISERS[module.initialiser](module.weight)
            if module.bias is not None:
                init.constant_(module.bias, module.initial_bias)
        else:
            super()._init_weights(module)

    def pyramid(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...] | None]:
        """Feature maps of the pyramid, the finest first, and the backbone's hidden states if asked for."""
        outputs = self.base_model(pixel_values, return_dict=True, **kwargs)
        feature_maps = self.neck(OrderedDict((str(i), x) for i, x in enumerate(outputs.feature_maps)))
        return list(feature_maps.values()), outputs.hidden_states


@auto_docstring(
    custom_intro="""
    RetinaNet (arXiv 1708.02002) on a MetaFormer, with mmdetection's numerics and the paper's configuration.
    """
)
class MetaFormerForObjectDetection(MetaFormerDetector):
    first_stage = 2
    low_quality_iou = 0.0
    candidates_per_level = 1000
    prior_probability = 0.01

    def __init__(self, config: MetaFormerConfig):
        super().__init__(config)
        octave = config.retinanet_scales_per_octave
        self.anchor_scales = [config.retinanet_anchor_scale * 2 ** (part / octave) for part in range(octave)]
        num_anchors = octave * len(config.anchor_ratios)
        self.bbox_head = RetinaNetHead(config.fpn_feature_size, num_anchors, config.num_labels)
        set_initialiser(self.bbox_head, "normal")
        prior = -math.log((1 - self.prior_probability) / self.prior_probability)
        set_initialiser(self.bbox_head.classification_head.cls_logits, "normal", bias=prior)
        self.strides = [*self.strides, 2 * self.strides[-1], 4 * self.strides[-1]]
        self.post_init()

    def make_extra_levels(self) -> ExtraFPNBlock:
        return LastLevelConvolutions(self.config.hidden_sizes[-1], self.config.fpn_feature_size)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MetaFormerObjectDetectionOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
            Images as the image processor makes them.
        pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
            1 on the pixels of the image, 0 on the padding at the bottom and on the right.
        labels (`list[dict[str, torch.Tensor]]`, *optional*):
            For each image its objects: `class_labels` (objects,) from 0, and `boxes` (objects, 4), (centre x, centre
            y, width, height) in 0..1 of the image without its padding. There may be none.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        sizes = image_sizes(pixel_values, pixel_mask)
        feature_maps, hidden_states = self.pyramid(pixel_values, **kwargs)
        predictions = self.bbox_head(feature_maps)
        logits, deltas = predictions["cls_logits"].float(), predictions["bbox_regression"].float()
        anchors = make_anchors(feature_maps, self.strides, self.anchor_scales, self.config.anchor_ratios)

        found = {}
        if labels is not None:
            targets = make_targets(labels, sizes, self.num_labels, with_masks=False, device=logits.device)
            found["loss_dict"] = self.losses(logits, deltas, anchors, targets, sizes)
            found["loss"] = sum(found["loss_dict"].values())
        if labels is None or not self.training:
            with torch.no_grad():
                images = zip(logits, deltas, sizes, strict=True)
                objects = [self.detect(*predicted, anchors, size) for *predicted, size in images]
                packed = pack(objects, sizes, self.config.max_detections, self.num_labels)
                found["logits"], found["pred_boxes"] = packed
        return MetaFormerObjectDetectionOutput(**found, hidden_states=hidden_states)

    def losses(
        self,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        anchors: Anchors,
        targets: list[Targets],
        sizes: list[Size],
    ) -> dict[str, torch.Tensor]:
        """Focal loss over all anchors but the ignored, L1 over the positive; both per positive anchor of the batch."""
        classes, counted = torch.zeros_like(logits), torch.zeros_like(logits[..., 0])
        box_loss, positives = deltas.new_zeros(()), 0
        for index, (target, size) in enumerate(zip(targets, sizes, strict=True)):
            valid = anchors.within(size, self.padding_multiple).nonzero()[:, 0]
            assigned = assign(
                target.boxes,
                anchors.boxes[valid],
                self.config.retinanet_positive_iou,
                self.config.retinanet_negative_iou,
                self.low_quality_iou,
            )
            counted[index, valid] = (assigned != IGNORED).to(counted.dtype)
            positive = assigned >= 0
            chosen, box = valid[positive], assigned[positive]
            classes[index, chosen, target.labels[box]] = 1.0
            wanted = encode_boxes(target.boxes[box], anchors.boxes[chosen], self.box_stds)
            box_loss = box_loss + F.l1_loss(deltas[index, chosen], wanted, reduction="sum")
            positives += max(len(chosen), 1)
        focal = sigmoid_focal_loss(logits, classes, self.config.focal_alpha, self.config.focal_gamma)
        return {"loss_cls": (focal.sum(dim=-1) * counted).sum() / positives, "loss_bbox": box_loss / positives}

    def detect(self, logits: torch.Tensor, deltas: torch.Tensor, anchors: Anchors, size: Size) -> Detections:
        """From `logits` (N, num_labels) and `deltas` (N, 4) of one image; an anchor may find several classes."""
        logits = logits.masked_fill(~anchors.within(size, self.padding_multiple)[:, None], -math.inf)
        chosen = []
        ends = list(accumulate(anchors.per_level, initial=0))
        for start, end in pairwise(ends):
            level = logits[start:end].flatten()
            candidates = (level.sigmoid() > self.config.score_threshold).nonzero()[:, 0]
            best = level[candidates].topk(min(self.candidates_per_level, len(candidates))).indices
            chosen.append(candidates[best] + start * self.num_labels)
        chosen = torch.cat(chosen)
        anchor, label = chosen // self.num_labels, chosen % self.num_labels
        boxes = decode_boxes(deltas[anchor], anchors.boxes[anchor], self.box_stds, size)
        scores = logits[anchor, label]
        kept = suppress(boxes, scores.sigmoid(), label, self.config.nms_threshold, self.config.max_detections)
        return Detections(boxes[kept], scores[kept], label[kept])


@auto_docstring(
    custom_intro="""
    Mask R-CNN (arXiv 1703.06870) on a MetaFormer, with mmdetection's numerics and the paper's configuration.
    """
)
class MetaFormerForInstanceSegmentation(MetaFormerDetector):
    low_quality_iou = 0.3  # of the RPN
    candidates_per_level, candidates_per_level_in_training = 1000, 2000
    region_stds = (0.1, 0.1, 0.2, 0.2)
    box_resolution, mask_resolution = 7, 14

    def __init__(self, config: MetaFormerConfig):
        super().__init__(config)
        width = config.fpn_feature_size
        self.anchor_scales = [config.rpn_anchor_scale]
        self.rpn_head = RPNHead(width, len(config.anchor_ratios))
        set_initialiser(self.rpn_head, "normal")
        self.box_head = TwoMLPHead(width * self.box_resolution**2, config.box_head_hidden_size)
        set_initialiser(self.box_head, "xavier")
        self.box_predictor = BoxPredictor(config.box_head_hidden_size, config.num_labels)
        set_initialiser(self.box_predictor.cls_score, "normal")
        set_initialiser(self.box_predictor.bbox_pred, "narrow")
        self.mask_head = MaskRCNNHeads(width, [width] * config.mask_head_num_convs, 1)
        self.mask_predictor = MaskRCNNPredictor(width, width, config.num_labels)
        for part in (self.mask_head, self.mask_predictor):
            set_initialiser(part, "kaiming")
        self.region_strides = self.strides
        self.strides = [*self.strides, 2 * self.strides[-1]]
        self.post_init()

    def make_extra_levels(self) -> ExtraFPNBlock:
        return LastLevelMaxPool()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MetaFormerInstanceSegmentationOutput:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`):
            Images as the image processor makes them.
        pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
            1 on the pixels of the image, 0 on the padding at the bottom and on the right.
        labels (`list[dict[str, torch.Tensor]]`, *optional*):
            For each image its objects: `class_labels` (objects,) from 0, `boxes` (objects, 4), (centre x, centre y,
            width, height) in 0..1 of the image without its padding, and `masks` (objects, height, width), with the
            padding or without. There may be none.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        sizes = image_sizes(pixel_values, pixel_mask)
        feature_maps, hidden_states = self.pyramid(pixel_values, **kwargs)
        anchors = make_anchors(feature_maps, self.strides, self.anchor_scales, self.config.anchor_ratios)
        # (B, A, H, W) -> (B, N), and (B, 4A, H, W) -> (B, N, 4)
        levels = zip(*self.rpn_head(feature_maps), strict=True)
        flat = [(x.movedim(1, -1).flatten(1), d.movedim(1, -1).flatten(1)) for x, d in levels]
        objectness, deltas = (torch.cat(parts, dim=1).float() for parts in zip(*flat, strict=True))
        deltas = deltas.unflatten(1, (-1, 4))
        with torch.no_grad():
            images = zip(objectness, deltas, sizes, strict=True)
            regions = [self.propose(*predicted, anchors, size) for *predicted, size in images]
        pooled_maps = feature_maps[: len(self.region_strides)]

        found = {}
        if labels is not None:
            targets = make_targets(labels, sizes, self.num_labels, with_masks=True, device=objectness.device)
            found["loss_dict"] = {
                **self.rpn_losses(objectness, deltas, anchors, targets, sizes),
                **self.region_losses(pooled_maps, regions, targets),
            }
            found["loss"] = sum(found["loss_dict"].values())
        if labels is None or not self.training:
            with torch.no_grad():
                objects = self.detect(pooled_maps, regions, sizes)
                packed = pack(objects, sizes, self.config.max_detections, self.num_labels)
                found["logits"], found["pred_boxes"] = packed
                found["pred_masks"] = self.predict_masks(pooled_maps, objects)
        return MetaFormerInstanceSegmentationOutput(**found, hidden_states=hidden_states)

    def propose(self, objectness: torch.Tensor, deltas: torch.Tensor, anchors: Anchors, size: Size) -> torch.Tensor:
        """Regions (at most `rpn_num_proposals`, 4) of `objectness` (N,) and `deltas` (N, 4) of one image."""
        number = self.candidates_per_level_in_training if self.training else self.candidates_per_level
        objectness = objectness.masked_fill(~anchors.within(size, self.padding_multiple), -math.inf)
        best = [level.topk(min(number, len(level))) for level in objectness.split(anchors.per_level)]
        starts = accumulate(anchors.per_level, initial=0)
        chosen = torch.cat([level.indices + start for level, start in zip(best, starts, strict=False)])
        scores = torch.cat([level.values for level in best])
        group = torch.cat([torch.full_like(level.indices, index) for index, level in enumerate(best)])
        boxes = decode_boxes(deltas[chosen], anchors.boxes[chosen], self.box_stds, size)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & scores.isfinite()
        boxes, scores, group = boxes[kept], scores[kept], group[kept]
        kept = suppress(boxes, scores.sigmoid(), group, self.config.rpn_nms_threshold, self.config.rpn_num_proposals)
        return boxes[kept]

    def rpn_losses(
        self,
        objectness: torch.Tensor,
        deltas: torch.Tensor,
        anchors: Anchors,
        targets: list[Targets],
        sizes: list[Size],
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy and L1 of sampled anchors, both per sampled anchor of the batch."""
        class_loss, box_loss, sampled = objectness.new_zeros(()), deltas.new_zeros(()), 0
        for scores, image_deltas, target, size in zip(objectness, deltas, targets, sizes, strict=True):
            valid = anchors.within(size, self.padding_multiple).nonzero()[:, 0]
            assigned = assign(
                target.boxes,
                anchors.boxes[valid],
                self.config.rpn_positive_iou,
                self.config.rpn_negative_iou,
                self.low_quality_iou,
            )
            positive, negative = sample(assigned, self.config.rpn_batch_size, self.config.rpn_positive_fraction)
            box, positive, negative = assigned[positive], valid[positive], valid[negative]
            # Cross-entropy of a logit x: softplus(-x) for an object, softplus(x) for background.
            class_loss = class_loss + F.softplus(-scores[positive]).sum() + F.softplus(scores[negative]).sum()
            wanted = encode_boxes(target.boxes[box], anchors.boxes[positive], self.box_stds)
            box_loss = box_loss + F.l1_loss(image_deltas[positive], wanted, reduction="sum")
            sampled += max(len(positive), 1) + max(len(negative), 1)
        return {"loss_rpn_cls": class_loss / sampled, "loss_rpn_bbox": box_loss / sampled}

    def region_losses(
        self, feature_maps: list[torch.Tensor], regions: list[torch.Tensor], targets: list[Targets]
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy and L1 per sampled region of the batch, binary cross-entropy per pixel of positive regions."""
        sampled, matched, classes = [], [], []
        for boxes, target in zip(regions, targets, strict=True):
            itself = torch.arange(len(target.boxes), device=boxes.device)
            # One threshold for all: regions are objects or background, and the best ones need not be good enough.
            assigned = assign(target.boxes, boxes, *[self.config.roi_positive_iou] * 3)
            boxes, assigned = torch.cat([target.boxes, boxes]), torch.cat([itself, assigned])
            positive, negative = sample(assigned, self.config.roi_batch_size, self.config.roi_positive_fraction)
            chosen = torch.cat([positive, negative])
            sampled.append(boxes[chosen])
            matched.append(assigned[positive])
            background = torch.full_like(negative, self.num_labels)
            classes.append(torch.cat([target.labels[assigned[positive]], background]))
        positive_boxes = [boxes[: len(box)] for boxes, box in zip(sampled, matched, strict=True)]

        scores, deltas = self.predict_boxes(feature_maps, sampled)
        label = torch.cat(classes)
        class_loss = F.cross_entropy(scores, label, reduction="sum") / max(len(label), 1)
        positive = (label < self.num_labels).nonzero()[:, 0]
        pairs = zip(targets, matched, strict=True)
        boxes = torch.cat([target.boxes[box] for target, box in pairs])
        wanted = encode_boxes(boxes, torch.cat(positive_boxes), self.region_stds)
        box_loss = F.l1_loss(deltas[positive, label[positive]], wanted, reduction="sum") / max(len(label), 1)

        logits = self.mask_logits(feature_maps, positive_boxes)
        rows = torch.arange(len(positive), device=label.device)
        pairs = zip(targets, matched, positive_boxes, strict=True)
        masks = torch.cat([project_masks(target.masks, box, part, logits.shape[-1]) for target, box, part in pairs])
        mask_loss = F.binary_cross_entropy_with_logits(logits[rows, label[positive]], masks, reduction="sum")
        return {"loss_cls": class_loss, "loss_bbox": box_loss, "loss_mask": mask_loss / max(masks.numel(), 1)}

    def predict_boxes(
        self, feature_maps: list[torch.Tensor], regions: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (R, num_labels + 1) and deltas (R, num_labels, 4) of the regions of all images, float32."""
        pooled = pool_regions(feature_maps, self.region_strides, regions, self.box_resolution)
        scores, deltas = self.box_predictor(self.box_head(pooled))
        return scores.float(), deltas.float().unflatten(1, (-1, 4))

    def mask_logits(self, feature_maps: list[torch.Tensor], boxes: list[torch.Tensor]) -> torch.Tensor:
        """(R, num_labels, 28, 28) of the boxes of all images, float32."""
        pooled = pool_regions(feature_maps, self.region_strides, boxes, self.mask_resolution)
        return self.mask_predictor(self.mask_head(pooled)).float()

    def detect(
        self, feature_maps: list[torch.Tensor], regions: list[torch.Tensor], sizes: list[Size]
    ) -> list[Detections]:
        """What each image shows; a region may hold objects of several classes, each with a box of its own."""
        numbers = [len(boxes) for boxes in regions]
        scores, deltas = self.predict_boxes(feature_maps, regions)
        results = []
        for boxes, image_scores, image_deltas, size in zip(
            regions, scores.softmax(dim=-1).split(numbers), deltas.split(numbers), sizes, strict=True
        ):
            image_scores = image_scores[:, :-1]
            region, label = (image_scores > self.config.score_threshold).nonzero(as_tuple=True)
            found = decode_boxes(image_deltas[region, label], boxes[region], self.region_stds, size)
            score = image_scores[region, label]
            kept = suppress(found, score, label, self.config.nms_threshold, self.config.max_detections)
            eps = torch.finfo(score.dtype).eps
            results.append(Detections(found[kept], score[kept].logit(eps), label[kept]))
        return results

    def predict_masks(self, feature_maps: list[torch.Tensor], detections: list[Detections]) -> torch.Tensor:
        """`pred_masks` (B, max_detections, 28, 28) of the output."""
        logits = self.mask_logits(feature_maps, [found.boxes for found in detections])
        label = torch.cat([found.labels for found in detections])
        logits = logits[torch.arange(len(label), device=label.device), label]
        edge = logits.shape[-1]
        masks = logits.new_zeros(len(detections), self.config.max_detections, edge, edge)
        for index, part in enumerate(logits.split([len(found.boxes) for found in detections])):
            masks[index, : len(part)] = part
        return masks


@auto_docstring(custom_intro="RetinaNet on a PoolFormer v1, table 3 of arXiv 2111.11418.")
class PoolFormerForObjectDetection(PoolFormerPreTrainedModel, MetaFormerForObjectDetection):
    backbone_class = PoolFormerBackbone


@auto_docstring(custom_intro="Mask R-CNN on a PoolFormer v1, table 4 of arXiv 2111.11418.")
class PoolFormerForInstanceSegmentation(PoolFormerPreTrainedModel, MetaFormerForInstanceSegmentation):
    backbone_class = PoolFormerBackbone


register_model_classes("AutoModelForObjectDetection", MetaFormerForObjectDetection, PoolFormerForObjectDetection)
# The image-segmentation pipeline asks for the first of these, users for the second.
register_model_classes(
    "AutoModelForImageSegmentation", MetaFormerForInstanceSegmentation, PoolFormerForInstanceSegmentation
)
register_model_classes(
    "AutoModelForInstanceSegmentation", MetaFormerForInstanceSegmentation, PoolFormerForInstanceSegmentation
)

__all__ = [
    "MetaFormerForInstanceSegmentation",
    "MetaFormerForObjectDetection",
    "PoolFormerForInstanceSegmentation",
    "PoolFormerForObjectDetection",
]
