"""Geometry and colours: image, annotation map, boxes and masks go through torchvision.transforms.v2 together.

`DenseTrainTransform` is mmsegmentation's and mmdetection's pipeline under the paper's configurations: resize with the
aspect ratio kept, random crop, flip, photometric distortion, normalisation. What evaluation sees is
`data.dense.batches.DenseEvalTransform`.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ...data.dense.annotations import Objects
from ...image_processing_dense import IGNORE_INDEX, rescaled_size
from ...settings.dense import DenseSettings


Sample = dict[str, Any]


class DenseTrainTransform:
    """An image and what is annotated on it, as tensors for training.

    Args:
        settings: `image_size`, `longest_edge`, `scale_min`, `scale_max`, `crop_size`, `max_class_share`,
            `horizontal_flip`, `photometric_distortion`.
        processor: its mean, standard deviation and resampling are those of evaluation.
    """

    def __init__(self, settings: DenseSettings, processor: Any):
        self.short, self.long = settings.image_size, settings.longest_edge
        self.scales = settings.scale_min, settings.scale_max
        self.max_class_share = settings.max_class_share
        self.mean, self.std = list(processor.image_mean), list(processor.image_std)
        self.interpolation = F.InterpolationMode.BILINEAR
        self.crop = None
        if settings.crop_size:
            # What lies outside the image: the mean colour, which normalisation makes zero, and no class.
            grey = [round(255 * value) for value in self.mean]
            fill = {tv_tensors.Image: grey, SegmentationMap: IGNORE_INDEX, tv_tensors.Mask: 0, "others": 0}
            self.crop = v2.RandomCrop(settings.crop_size, pad_if_needed=True, fill=fill)
        self.flip = v2.RandomHorizontalFlip(settings.horizontal_flip)
        self.distortion = v2.Identity()
        if settings.photometric_distortion:
            # mmsegmentation's limits: brightness by 32 of 255, contrast and saturation by half, hue by 18 of 180.
            self.distortion = v2.RandomPhotometricDistort(
                brightness=(1 - 32 / 255, 1 + 32 / 255), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-0.1, 0.1)
            )

    def __call__(self, image: Image.Image, target: np.ndarray | Objects) -> tuple[torch.Tensor, Any]:
        """
        Args:
            image: RGB, height x width.
            target: annotation map (height, width), or objects in pixels.

        Returns:
            `pixel_values` (3, h, w), float32; and for a map `labels` (h, w), int64, for objects a dictionary as in
            DETR: `class_labels` (N,), `boxes` (N, 4), (centre x, centre y, width, height) in 0..1, and `masks`
            (N, h, w) if there were any.
        """
        sample: Sample = {"image": tv_tensors.Image(F.pil_to_tensor(image))}
        if isinstance(target, Objects):
            target = target.chosen(~target.crowd)
            size = (image.height, image.width)
            sample["boxes"] = tv_tensors.BoundingBoxes(torch.from_numpy(target.boxes), format="XYXY", canvas_size=size)
            sample["classes"] = torch.from_numpy(target.labels)
            if target.masks is not None:
                sample["masks"] = tv_tensors.Mask(torch.from_numpy(target.masks.astype(np.uint8)))
        else:
            sample["map"] = SegmentationMap(torch.from_numpy(target.astype(np.int32)))
        sample = self.distortion(self.flip(self.cropped(self.resized(sample))))
        pixel_values = F.normalize(F.to_dtype(sample["image"], torch.float32, scale=True), self.mean, self.std)
        pixel_values = pixel_values.as_subclass(torch.Tensor)
        if "map" in sample:
            return pixel_values, sample["map"].as_subclass(torch.Tensor).long()
        return pixel_values, object_labels(sample)

    def resized(self, sample: Sample) -> Sample:
        scale = self.scales[0] if self.scales[0] == self.scales[1] else random.uniform(*self.scales)
        height, width = sample["image"].shape[-2:]
        limits = max(round(self.short * scale), 1), max(round(self.long * scale), 1)
        size = [max(edge, 1) for edge in rescaled_size(height, width, *limits)]
        maps = {name: sample[name] for name in ("masks", "map") if name in sample}
        others = {name: value for name, value in sample.items() if name not in maps}
        # torchvision takes the pixel left above for the nearest one, which moves masks against image and boxes.
        for name, value in maps.items():
            planes = value.as_subclass(torch.Tensor).reshape(-1, height, width)
            exact = F.resize_image(planes, size, F.InterpolationMode.NEAREST_EXACT)
            maps[name] = type(value)(exact.reshape(*value.shape[:-2], *size))
        return {**v2.Resize(size, interpolation=self.interpolation, antialias=True)(others), **maps}

    def cropped(self, sample: Sample) -> Sample:
        if self.crop is None:
            return sample
        for _ in range(10):
            part = self.crop(sample)
            if "map" not in part or self.max_class_share >= 1 or largest_share(part["map"]) < self.max_class_share:
                break
        if "masks" in part:
            # The edge of a crop may cut an object where its box is only touched: what is left has a smaller box.
            seen = part["masks"].as_subclass(torch.Tensor).flatten(1).any(dim=1).bool()
            part = {**part, "masks": tv_tensors.Mask(part["masks"][seen]), "classes": part["classes"][seen]}
            boxes = masks_to_boxes(part["masks"])
            boxes[:, 2:] += 1  # of the last pixel, its far edge
            part["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=part["image"].shape[-2:])
        return part


class SegmentationMap(tv_tensors.Mask):
    """A map of class indices: resized and flipped like a mask, but what lies outside the image has no class."""


def largest_share(classes: torch.Tensor) -> float:
    """Of the pixels that have a class, the share of the most frequent one; 1 if there is only one class."""
    values = classes.as_subclass(torch.Tensor).flatten()
    counts = values[values != IGNORE_INDEX].unique(return_counts=True)[1]
    return 1.0 if len(counts) < 2 else (counts.max() / counts.sum()).item()


def object_labels(sample: Sample) -> dict[str, torch.Tensor]:
    """Objects in DETR's form; those of which less than a pixel's width or height is left are gone."""
    height, width = sample["image"].shape[-2:]
    boxes = F.clamp_bounding_boxes(sample["boxes"]).as_subclass(torch.Tensor)
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    labels = {
        "class_labels": sample["classes"][kept],
        "boxes": box_convert(boxes[kept] / scale, "xyxy", "cxcywh"),
    }
    if "masks" in sample:
        labels["masks"] = sample["masks"].as_subclass(torch.Tensor)[kept].bool()
    return labels
