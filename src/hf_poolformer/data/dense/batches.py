"""Images as a model sees them in evaluation; images and annotation maps of any sizes as one batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image

from ...image_processing_dense import IGNORE_INDEX


class DenseEvalTransform:
    """The image processor's view of an image, without the padding of a batch; the annotations stay as they are."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, image: Image.Image, target: Any) -> tuple[torch.Tensor, Any]:
        features = self.processor(images=image, do_pad=False, return_tensors="pt")
        return features["pixel_values"][0], target


def collate(pixel_values: list[torch.Tensor] | torch.Tensor, divisor: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images of any sizes as one batch, padded with zeros at the bottom and on the right to a multiple of `divisor`.

    Returns:
        (B, C, H, W), and (B, H, W) with 1 on the images and 0 on the padding; None if there is no padding.
    """
    sizes = [tuple(image.shape[-2:]) for image in pixel_values]
    height, width = (math.ceil(max(edges) / divisor) * divisor for edges in zip(*sizes, strict=True))
    if set(sizes) == {(height, width)}:
        return torch.stack(list(pixel_values)), None
    batch = pixel_values[0].new_zeros(len(sizes), pixel_values[0].shape[0], height, width)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.int64)
    for index, (image, (rows, columns)) in enumerate(zip(pixel_values, sizes, strict=True)):
        batch[index, :, :rows, :columns] = image
        mask[index, :rows, :columns] = 1
    return batch, mask


def collate_maps(maps: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Annotation maps as one batch (B, height, width); what is beyond an image has no class."""
    batch = torch.full((len(maps), *size), IGNORE_INDEX, dtype=torch.int64)
    for index, values in enumerate(maps):
        batch[index, : values.shape[0], : values.shape[1]] = values
    return batch
