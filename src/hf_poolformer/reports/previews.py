"""What a training run makes of images: augmented examples, as pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.transforms import channels_of
from ..foundation.loading import load_processor
from ..image_processing_poolformer import PoolFormerImageProcessor
from ..settings.classification import ClassificationSettings, FeatureDistillationSettings
from ..training.augmentation import TrainTransform
from ..training.channels import in_channels
from ..training.initialisation import processor_of_architecture, set_image_size


def processor_of_run(settings: ClassificationSettings | FeatureDistillationSettings, named: bool) -> Any:
    """The image processor of a run.

    Args:
        named: the user has named the checkpoint; that of a recipe is not asked for, which might be a download.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    if settings.config_name:
        processor = processor_of_architecture(settings)
    elif named:
        processor = load_processor(settings.model_name_or_path, settings.origin())
    else:
        processor = PoolFormerImageProcessor()
    if number := getattr(settings, "num_channels", None):
        processor = in_channels(processor, number)
    if settings.image_size:
        set_image_size(processor, settings.image_size)
    return processor


def examples(
    images: Sequence[Image.Image],
    settings: ClassificationSettings | FeatureDistillationSettings,
    processor: Any,
    times: int = 3,
) -> list[list[Image.Image]]:
    """Of each image so many training examples, as a model would see them.

    They are drawn with the settings' seed, from generators whose state is left as it was.
    """
    transform = TrainTransform(settings, processor)
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        random.seed(settings.seed)
        try:
            return [[example(transform, processor, image) for _ in range(times)] for image in images]
        finally:
            random.setstate(state)


def example(transform: TrainTransform, processor: Any, image: Image.Image) -> Image.Image:
    number = channels_of(processor)
    pixels = np.asarray(image.convert("L" if number == 1 else "RGB"))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    draws = transform.draw(image.height, image.width)
    made = transform.normalise(transform.augment(transform.crop(pixels, draws)[None], [draws]), [draws])[0]
    mean, std = (
        np.broadcast_to(np.asarray(values, dtype=np.float64), number)
        for values in (processor.image_mean, processor.image_std)
    )
    levels = (made.permute(1, 2, 0).double().numpy() * std + mean) * 255
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8).squeeze(-1 if number == 1 else ()))
