"""Images and annotation maps of any sizes as one batch."""

from __future__ import annotations

import math

import torch

from ...image_processing_dense import IGNORE_INDEX


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
