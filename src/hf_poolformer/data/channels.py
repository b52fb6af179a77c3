"""Batches of images that are not RGB, and their mean and standard deviation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from ..foundation.errors import UserError
from .columns import ImageDataset
from .decoding import BrokenImage, EncodedImage
from .loader import DecodedBatches


# Images whose pixels are measured, and rows that are looked through for each: a dataset that is sorted by class shows
# its first classes only.
MEASURED = 500
WINDOW = 10


class ChannelBatches(DecodedBatches):
    """Decodes images to the `num_channels` of the transform, whose `load_example` gets them still encoded."""

    def _read(self, row: Mapping[str, Any]) -> tuple[EncodedImage, Any]:
        label = self._dataset.label(row)
        image = EncodedImage(
            row[self._dataset.image_column], num_channels=self._transform.num_channels, token=self._dataset.token
        )
        return image, label

    def _example(self, image: EncodedImage, label: Any) -> tuple[torch.Tensor, Any]:
        with image:
            return self._transform.load_example(image), label


def batches_of(transform: Any) -> type[DecodedBatches] | None:
    """What makes batches with this transform, as `make_loader` takes it; None for RGB."""
    return None if transform.num_channels == 3 else ChannelBatches


def measure_channels(dataset: ImageDataset, num_channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, white being 1, over the pixels of up to `MEASURED` images.

    Each image counts as much as any other, and the same are taken at each start: they are spread evenly over the rows,
    or over the first `MEASURED * WINDOW` where nobody knows how many there are. A channel that is the same everywhere
    gets 1 for its deviation.

    Raises:
        UserError: none of them can be read.
    """
    rows = dataset.num_examples or MEASURED * WINDOW
    step = max(1, min(rows, MEASURED * WINDOW) // MEASURED)
    total, squares = torch.zeros(2, num_channels, dtype=torch.float64)
    count, problem = 0, "it is empty"
    stream = dataset.stream.select_columns([dataset.image_column])
    for row in itertools.islice(stream, 0, step * MEASURED, step):
        try:
            with EncodedImage(row[dataset.image_column], num_channels=num_channels, token=dataset.token) as image:
                pixels = image.pixels()[0]
        except BrokenImage as error:
            problem = str(error)
            continue
        values = torch.tensor(pixels.reshape(-1, num_channels)).double() / 255
        total += values.mean(0)
        squares += values.square().mean(0)
        count += 1
    if not count:
        raise UserError(f"none of the first images of {dataset.name} can be read: {problem}")
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    deviation[deviation < 1e-6] = 1.0
    return mean.tolist(), deviation.tolist()
