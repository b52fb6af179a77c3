"""What an image processor makes of one image."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image


class EvalTransform:
    """The model's own image processor as a function of one image; returns a float32 tensor (3, height, width)."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


def input_size(processor: Any) -> tuple[int, int]:
    """(height, width) of what an image processor makes."""
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = size or processor.size
    get = size.get if isinstance(size, dict) else lambda name: getattr(size, name, None)
    side = get("shortest_edge")
    return int(get("height") or side), int(get("width") or side)
