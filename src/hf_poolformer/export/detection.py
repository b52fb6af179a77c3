"""Detectors as graphs: RetinaNet and Mask R-CNN with what follows their networks, suppression included.

It is what `modeling_detection.py` computes for one image, in operations whose results' sizes a graph can leave open:
the best candidates are chosen first and those with low scores left out afterwards, boxes are clipped to a size that is
a tensor, and the parts of a batch are left away. Everything from the logits on is float32, as there.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ..modeling_detection import (
    Anchors,
    Detections,
    MetaFormerForInstanceSegmentation,
    MetaFormerForObjectDetection,
    MetaFormerInstanceSegmentationOutput,
    MetaFormerObjectDetectionOutput,
    apply_deltas,
    image_sizes,
    make_anchors,
    pack,
)
from .photographs import Photographs, as_tensor


if TYPE_CHECKING:
    from .runtime import ExportedModel


# The logit of an anchor that lies beyond the image: the lowest number, since not every runtime sorts infinities.
OUTSIDE = torch.finfo(torch.float32).min


class DetectorDeployable(nn.Module):
    """
    A detector with what surrounds it in the graph: one image in, what was found in it out.

    Args:
        model: as `graph.fold` returns it.
        dtype: of weights and arithmetic up to the logits.
        processor: its resizing, normalisation and padding become part of the graph, which then takes a photograph,
            uint8 (1, height, width, channels), and gives boxes in its pixels; None for none of it.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, processor: Any = None):
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype
        is_retinanet = isinstance(model, MetaFormerForObjectDetection)
        self.detector = (RetinaNetGraph if is_retinanet else MaskRCNNGraph)(model)
        self.output_name, *self.further_outputs = self.detector.outputs
        self.further_inputs = ["pixel_mask"] if processor is None else []
        self.photographs = None if processor is None else Photographs(processor, model.config.num_channels)

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """
        Args:
            pixel_values: (1, channels, H, W), or with preprocessing the photograph.
            pixel_mask: int64 (1, H, W), 1 on the image, 0 on its padding; not with preprocessing.
        """
        if self.photographs is None:
            size = torch.stack([pixel_mask[0].amax(1).sum(), pixel_mask[0].amax(0).sum()])
            return self.detector(pixel_values.to(self.dtype), size)
        x, (height, width) = self.photographs(pixel_values)
        size = as_tensor(height, width)
        boxes, *rest = self.detector(x.to(self.dtype), size)
        whole = [torch.scalar_tensor(edge, dtype=torch.float32) for edge in pixel_values.shape[1:3]]
        scale = (torch.stack(whole) / size).flip(0).repeat(2)
        return boxes * scale, *rest


def answer_each(
    exported: ExportedModel, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None
) -> MetaFormerObjectDetectionOutput:
    """
    The answer to a batch, one image after the other, in the form of the model's own.

    Args:
        pixel_values: (B, C, H, W) on the CPU; of an export with preprocessing also uint8 (B, H, W, C).
        pixel_mask: (B, H, W), 1 on the images and 0 on the padding; None where there is no padding.
    """
    manifest, config = exported.manifest, exported.config
    raw = pixel_values.dtype == torch.uint8
    seen = pixel_values.permute(0, 3, 1, 2) if raw else pixel_values
    sizes = image_sizes(seen, None if pixel_mask is None else pixel_mask.cpu())
    results, masks = [], []
    for image, (height, width) in zip(pixel_values, sizes, strict=True):
        if manifest.preprocessing:
            part = image[:height, :width] if raw else image[:, :height, :width]
            found = exported.run(exported.prepare(part[None].contiguous()))
        else:
            mask = torch.zeros(1, *image.shape[1:], dtype=torch.int64)
            mask[:, :height, :width] = 1
            found = exported.run(exported.prepare(image[None]), mask)
        boxes, scores, labels, *of_objects = found
        eps = torch.finfo(scores.dtype).eps
        results.append(Detections(boxes, scores.logit(eps), labels))
        masks += of_objects
    logits, pred_boxes = pack(results, sizes, config.max_detections, config.num_labels)
    if not masks:
        return MetaFormerObjectDetectionOutput(logits=logits, pred_boxes=pred_boxes)
    packed = logits.new_zeros(len(results), config.max_detections, *masks[0].shape[1:])
    for index, part in enumerate(masks):
        packed[index, : len(part)] = part.logit(torch.finfo(part.dtype).eps)
    return MetaFormerInstanceSegmentationOutput(logits=logits, pred_boxes=pred_boxes, pred_masks=packed)


class RetinaNetGraph(nn.Module):
    """
    A RetinaNet's answer to one image.

    Args:
        model: in inference mode.
    """

    outputs = ("boxes", "scores", "labels")

    def __init__(self, model: MetaFormerForObjectDetection):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Args:
            pixel_values: (1, channels, H, W), padded at the bottom and on the right.
            size: height and width without the padding, int64 (2,).

        Returns:
            `boxes` (D, 4), (left, top, right, bottom) in pixels, `scores` (D,) and `labels` (D,), the surest first.
        """
        model, config = self.model, self.model.config
        feature_maps, _ = model.pyramid(pixel_values)
        predictions = model.bbox_head(feature_maps)
        logits, deltas = predictions["cls_logits"][0].float(), predictions["bbox_regression"][0].float()
        anchors = make_anchors(feature_maps, model.strides, model.anchor_scales, config.anchor_ratios)
        within = within_image(anchors, size, model.padding_multiple)
        # By logits, which still tell apart what is 1 after the sigmoid.
        logits = logits.masked_fill(~within[:, None], OUTSIDE)
        logit, chosen, _ = best_of_levels(logits, anchors.per_level, model.candidates_per_level)
        score = logit.sigmoid()
        sure = (score > config.score_threshold).nonzero()[:, 0]
        score, chosen = score[sure], chosen[sure]
        anchor, label = chosen // model.num_labels, chosen % model.num_labels
        boxes = clip(apply_deltas(deltas[anchor], anchors.boxes[anchor], model.box_stds), size)
        kept = suppress(boxes, score, label, size, config.nms_threshold, config.max_detections)
        return boxes[kept], score[kept], label[kept]


class MaskRCNNGraph(nn.Module):
    """
    A Mask R-CNN's answer to one image; as `RetinaNetGraph`, and `masks` (D, 28, 28), probabilities over the boxes.
    """

    outputs = ("boxes", "scores", "labels", "masks")

    def __init__(self, model: MetaFormerForInstanceSegmentation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model, config = self.model, self.model.config
        feature_maps, _ = model.pyramid(pixel_values)
        anchors = make_anchors(feature_maps, model.strides, model.anchor_scales, config.anchor_ratios)
        levels = zip(*model.rpn_head(feature_maps), strict=True)
        flat = [(x[0].movedim(0, -1).flatten(), d[0].movedim(0, -1).reshape(-1, 4)) for x, d in levels]
        objectness, deltas = (torch.cat(parts).float() for parts in zip(*flat, strict=True))
        regions = self.propose(objectness, deltas, anchors, size)

        feature_maps = feature_maps[: len(model.region_strides)]
        pooled = pool_regions(feature_maps, model.region_strides, regions, model.box_resolution)
        scores, deltas = model.box_predictor(model.box_head(pooled))
        scores, deltas = scores.float().softmax(-1)[:, :-1], deltas.float().unflatten(1, (-1, 4))
        region, label = (scores > config.score_threshold).nonzero().unbind(1)
        score = scores[region, label]
        boxes = clip(apply_deltas(deltas[region, label], regions[region], model.region_stds), size)
        kept = suppress(boxes, score, label, size, config.nms_threshold, config.max_detections)
        boxes, score, label = boxes[kept], score[kept], label[kept]

        pooled = pool_regions(feature_maps, model.region_strides, boxes, model.mask_resolution)
        masks = model.mask_predictor(model.mask_head(pooled)).float()
        masks = masks[torch.arange(masks.shape[0]), label].sigmoid()
        return boxes, score, label, masks

    def propose(
        self, objectness: torch.Tensor, deltas: torch.Tensor, anchors: Anchors, size: torch.Tensor
    ) -> torch.Tensor:
        """Regions (R, 4) of `objectness` (N,) and `deltas` (N, 4)."""
        model, config = self.model, self.model.config
        within = within_image(anchors, size, model.padding_multiple)
        objectness = objectness.masked_fill(~within, OUTSIDE)
        logit, chosen, group = best_of_levels(objectness, anchors.per_level, model.candidates_per_level)
        boxes = clip(apply_deltas(deltas[chosen], anchors.boxes[chosen], model.box_stds), size)
        kept = ((boxes[:, 2:] > boxes[:, :2]).all(dim=1) & (logit > OUTSIDE)).nonzero()[:, 0]
        boxes, logit, group = boxes[kept], logit[kept], group[kept]
        kept = suppress(boxes, logit.sigmoid(), group, size, config.rpn_nms_threshold, config.rpn_num_proposals)
        return boxes[kept]


def within_image(anchors: Anchors, size: torch.Tensor, multiple: int) -> torch.Tensor:
    """As `Anchors.within`, of a size that is a tensor."""
    padded = (size + (multiple - 1)) // multiple * multiple
    return (anchors.centres < padded.flip(0)).all(dim=1)


def best_of_levels(
    scores: torch.Tensor, per_level: list[int], number: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best `number` of each level of `scores` (N,) or (N, classes): scores, indices into all, and levels, (M,)."""
    found, chosen, group = [], [], []
    width = scores.shape[1] if scores.ndim == 2 else 1
    for index, (level, start) in enumerate(
        zip(scores.split(per_level), accumulate(per_level, initial=0), strict=False)
    ):
        level = level.flatten()
        best = level.topk(torch.sym_min(number, level.shape[0]))
        found.append(best.values)
        chosen.append(best.indices + start * width)
        group.append(torch.full_like(best.indices, index))
    return torch.cat(found), torch.cat(chosen), torch.cat(group)


def clip(boxes: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Boxes (N, 4) clipped to an image of `size` (2,): height, width."""
    edges = size.flip(0).repeat(2).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), edges)


def suppress(
    boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, size: torch.Tensor, threshold: float, number: int
) -> torch.Tensor:
    """Indices of at most `number` boxes, the best first, of which no two of a group have a larger IoU."""
    # Each group in a place of its own, since there is one list of boxes; as torchvision does it.
    places = (groups * (size.max() + 1)).to(boxes.dtype)[:, None]
    return torch.ops.torchvision.nms(boxes + places, scores, threshold)[:number]


def pool_regions(
    feature_maps: list[torch.Tensor], strides: list[int], regions: torch.Tensor, output_size: int
) -> torch.Tensor:
    """Features (R, C, output_size, output_size) of the regions (R, 4) of one image, as the model pools them."""
    rois = F.pad(regions, (1, 0))
    edge = ((regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1])).sqrt()
    level = (edge / (14 * strides[0]) + 1e-6).log2().floor().clamp(0, len(strides) - 1)
    parts, order = [], []
    for index, (feature_map, stride) in enumerate(zip(feature_maps, strides, strict=True)):
        here = (level == index).nonzero()[:, 0]
        pooled = torch.ops.torchvision.roi_align(
            feature_map.float(), rois[here], 1 / stride, output_size, output_size, -1, True
        )
        parts.append(pooled.to(feature_map.dtype))
        order.append(here)
    return torch.cat(parts)[torch.cat(order).argsort()]
