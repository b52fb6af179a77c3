"""What an image processor makes of one image."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from .decoding import EncodedImage


class EvalTransform:
    """The model's own image processor as a function of one image; returns a float32 tensor (channels, height, width).

    Attributes:
        num_channels: what images are decoded to.
    """

    def __init__(self, processor: Any):
        self.processor, self.num_channels = processor, channels_of(processor)

    def __call__(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        return prepare(self.processor, image)

    def load_example(self, image: EncodedImage) -> torch.Tensor:
        return self(image.decode()[0])


def channels_of(processor: Any) -> int:
    """Channels of the images that an image processor takes: what they are decoded to, RGB unless it says otherwise."""
    return getattr(processor, "num_channels", None) or 3


def prepare(processor: Any, image: Image.Image | torch.Tensor, **options: Any) -> torch.Tensor:
    """What an image processor makes of one image, decoded to the channels that it takes: (channels, height, width).

    Args:
        options: for the processor.
    """
    if isinstance(image, torch.Tensor):
        options["input_data_format"] = "channels_first"
    return processor(image, return_tensors="pt", **options)["pixel_values"][0]


def blank_image(processor: Any, side: int = 64) -> Image.Image | torch.Tensor:
    """A black image in the channels that an image processor takes."""
    number = channels_of(processor)
    return Image.new("RGB", (side, side)) if number == 3 else torch.zeros(number, side, side, dtype=torch.uint8)


def input_size(processor: Any) -> tuple[int, int]:
    """(height, width) of what an image processor makes."""
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = size or processor.size
    get = size.get if isinstance(size, dict) else lambda name: getattr(size, name, None)
    side = get("shortest_edge")
    return int(get("height") or side), int(get("width") or side)
