"""Graphs that take photographs of any size: the image processor's resizing inside, and answers in their pixels.

Resizing is two matrix products with the weights of Pillow's filters, each rounded to 8 bits as Pillow does it, so that
every runtime computes it alike. What differs from the processor is single levels of pixels whose sum lies between two.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ..foundation.errors import UserError
from ..image_processing_dense import DensePrediction
from ..image_processing_poolformer import as_filter
from .deployable import pixel_affine
from .graph import constant


Filter = Image.Resampling
Edges = tuple[Any, Any]  # height, width in pixels: numbers, or symbols while a graph is written


@dataclass
class ClassMaps(ModelOutput):
    """
    Attributes:
        segmentation: (batch, height, width), int64: the class of each pixel, -1 where the network's numbers are not
            finite.
    """

    segmentation: torch.Tensor | None = None


def check_processor(name: str, processor: Any) -> None:
    """
    Raises:
        UserError: a graph cannot do what this image processor does.
    """
    if not isinstance(processor, DensePrediction):
        raise UserError(
            f"{name} has the image processor {type(processor).__name__}, whose resizing is not known here: leave "
            "--preprocessing out"
        )
    if processor.do_center_crop:
        raise UserError(f"the image processor of {name} crops, so that the answer would not be of the whole image")
    resample = as_filter(processor.resample)
    if processor.do_resize and resample not in (Filter.BILINEAR, Filter.BICUBIC):
        raise UserError(
            f"the image processor of {name} resizes by {resample.name.lower()}, and a graph can do so by bilinear and "
            "bicubic only: leave --preprocessing out"
        )
    # Files say 1.0 for None where only the shortest edge is given; elsewhere it means another size.
    size, share = processor.size, processor.crop_pct
    plain = share is None or (share == 1.0 and size.shortest_edge and not size.longest_edge)
    if processor.do_resize and not plain:
        raise UserError(
            f"the image processor of {name} has crop_pct {share:g} and does not crop, which no graph does: leave "
            "--preprocessing out"
        )
    if processor.do_pad and processor.pad_size:
        raise UserError(
            f"the image processor of {name} pads to a fixed size, which no graph does: leave --preprocessing out"
        )


def fixed_size(processor: Any) -> tuple[int, int] | None:
    """Height and width of what the image processor makes of every image; None where they depend on it."""
    size = processor.size
    if processor.do_resize and size.height and size.width:
        return size.height, size.width
    return None


def unprocessed(processor: Any) -> Any:
    """A copy that leaves pixels as they are, 0 to 255 as floats, for graphs that do the rest; it still decodes."""
    processor = copy.deepcopy(processor)
    white = processor.rescale_factor if processor.do_rescale else 1.0
    channels = len(processor.image_mean) if isinstance(processor.image_mean, list | tuple) else 1
    # Rescaled and scaled back, so that whoever shows `pixel_values` by mean and deviation shows the image.
    processor.do_normalize, processor.image_mean, processor.image_std = True, [0.0] * channels, [white] * channels
    processor.do_resize = processor.do_pad = False
    return processor


class Photographs(nn.Module):
    """
    What an image processor makes of photographs, (batch, height, width, channels) uint8 of one size.

    Args:
        processor: as `check_processor` lets through.
    """

    def __init__(self, processor: Any, num_channels: int):
        super().__init__()
        scale, shift = pixel_affine(processor, num_channels)
        self.scale, self.shift = (constant(value[:, None, None]) for value in (scale, shift))
        self.resizes, self.size = processor.do_resize, processor.size
        self.cubic = as_filter(processor.resample) == Filter.BICUBIC
        self.divisor = processor.size_divisor if processor.do_pad else None

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, Edges]:
        """(batch, channels, height, width), resized, normalised and padded, and the size without the padding."""
        x = pixels.permute(0, 3, 1, 2).float()
        size = tuple(x.shape[-2:])
        if self.resizes:
            height, width = size
            size = self.resized(height, width)
            # The rows first, as Pillow does it; their weights are (size before, size after).
            x = rounded(x @ filter_weights(width, size[1], self.cubic).T)
            x = rounded(filter_weights(height, size[0], self.cubic) @ x)
        x = x * self.scale + self.shift
        if self.divisor:
            height, width = as_edges((as_tensor(*size) + self.divisor - 1) // self.divisor * self.divisor)
            x = F.pad(x, (0, width - size[1], 0, height - size[0]))
        return x, size

    def resized(self, height: Any, width: Any) -> Edges:
        """As `resized_size` of the image processors, in whole numbers; a half is rounded up."""
        size = self.size
        if size.height and size.width:
            return size.height, size.width
        edges = as_tensor(height, width)
        short, long = edges.amin(0), edges.amax(0)
        shortest = size.shortest_edge or size.height
        if not size.longest_edge:
            return as_edges(edges * shortest // short)
        by_short = (2 * edges * shortest + short) // (2 * short)
        by_long = (2 * edges * size.longest_edge + long) // (2 * long)
        return as_edges(torch.minimum(by_short, by_long).clamp(min=1))


def as_tensor(height: Any, width: Any) -> torch.Tensor:
    """int64 (2,)"""
    return torch.stack([torch.scalar_tensor(edge, dtype=torch.int64) for edge in (height, width)])


def as_edges(size: torch.Tensor) -> Edges:
    """
    Of a tensor (2,); while a graph is written, symbols of their own.

    As expressions of the photograph's size, every size in the network would be one of those, and whoever writes the
    graph would reason about them for minutes.
    """
    height, width = size.tolist()
    for edge in (height, width):
        torch._check(edge >= 1)
    return height, width


def filter_weights(before: Any, after: Any, cubic: bool) -> torch.Tensor:
    """(after, before): what each pixel of a line gets of each, as Pillow resamples, with antialiasing."""
    old, new = torch.arange(before)[None], torch.arange(after)[:, None]
    # The distance of the centres in units of the filter. Up to the division these are whole numbers: of thousands of
    # pixels float32 would leave little of a fraction.
    distance = ((2 * old + 1) * after - (2 * new + 1) * before).float()
    distance = (distance / (2 * torch.sym_max(before, after))).abs()
    if cubic:  # Keys' with a = -1/2
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, far) * (distance < 2)
    else:
        weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def rounded(pixels: torch.Tensor) -> torch.Tensor:
    # Halves are frequent, and go up in every runtime, whatever its sums have lost.
    return (pixels + (0.5 + 2**-10)).floor().clamp(0, 255)


class MapDeployable(nn.Module):
    """
    A segmenter with what surrounds it in the graph: photographs in, the class of each of their pixels out.

    Args:
        model: as `graph.fold` returns it.
        dtype: of weights and arithmetic; resizing and what follows the network are float32.
    """

    output_name = "classes"

    def __init__(self, model: nn.Module, dtype: torch.dtype, processor: Any):
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype
        self.photographs = Photographs(processor, model.config.num_channels)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """uint8 (batch, height, width, channels) to int32 (batch, height, width)."""
        x, _ = self.photographs(pixel_values)
        logits = self.model(x.to(self.dtype)).logits.float()
        scores = F.interpolate(logits, size=pixel_values.shape[1:3], mode="bilinear", align_corners=False)
        finite = logits.isfinite().flatten(1).all(1)[:, None, None]
        return torch.where(finite, scores.argmax(1).int(), -1)
