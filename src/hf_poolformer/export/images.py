"""Images to calibrate on and to compare with: a dataset's, or photographs that are at hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..data.decoding import BrokenImage, decode_image
from ..data.photographs import resized
from ..data.transforms import channels_of, prepare
from ..foundation.errors import UserError, one_line
from ..foundation.scores import MULTI_LABEL, REGRESSION


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..data.columns import ImageDataset


def cropping(processor: Any) -> Any:
    """A processor whose images are all of one size, as a batch needs them: one that keeps proportions gets a crop."""
    if processor.do_center_crop or not processor.do_resize or (processor.size.height and processor.size.width):
        return processor
    side = processor.size.shortest_edge
    square = {"height": side, "width": side}
    settings = {"do_center_crop": True, "crop_size": square, "size": {"shortest_edge": side}, "do_pad": False}
    # 1.0 says what None says; saved files have one or the other.
    return type(processor)(**{**processor.to_dict(), **settings, "crop_pct": 1.0})


@dataclass
class Sample:
    """
    Images as the image processor makes them, (N, C, H, W), and their labels, None where not known.

    Those are class indices, (N,); of several labels zeros and ones, and of a regression numbers, (N, outputs).
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor | None
    name: str


def read_samples(
    location: str,
    processor: Any,
    config: Any,
    counts: tuple[int, int],
    **how: Any,
) -> tuple[Sample, Sample]:
    """
    Images to calibrate on and further ones to compare on, from a dataset that is streamed.

    They are drawn at random, always the same ones. Where there are fewer than asked for, both get their share of what
    there is; of a single image, the same.

    Args:
        location: folder of images, Parquet files or tars, or a Hub id.
        counts: how many of each.
        how: `split`, `config_name`, `image_column_name`, `token`, `cache_dir`.

    Raises:
        UserError: nothing there, no image, or not one that can be read.
    """
    channels, taken = config.num_channels, channels_of(processor)
    if taken != channels and channels != 1:
        raise UserError(
            f"the images of a dataset are read in colour or in grey, and the model takes {channels} channels: export "
            "it without --calibration_dataset"
        )
    dataset, label_of = open_labelled(location, config, **how)
    pixels, labels, problem = [], [], "it is empty"
    for row in draw(dataset.stream, sum(counts)):
        try:
            image = decode_image(row[dataset.image_column], num_channels=taken)
            pixels.append(prepare(processor, image if taken == channels else in_channels(image, channels)))
        except (BrokenImage, ValueError) as error:
            problem = one_line(error)
            continue
        labels.append(label_of(row))
    if not pixels:
        raise UserError(f"{dataset.name} has no image to calibrate on: {problem}")
    if len({tuple(image.shape) for image in pixels}) > 1:
        raise UserError("the image processor gives images of several sizes; calibration needs one that crops")
    first = min(len(pixels), max(1, round(len(pixels) * counts[0] / sum(counts))))
    order = np.random.default_rng(0).permutation(len(pixels))
    parts = (order[:first], order[first:]) if first < len(pixels) else (order, order)
    samples = []
    for part in parts:
        mine = [labels[index] for index in part]
        truth = None if any(label is None for label in mine) else torch.from_numpy(np.stack(mine))
        name = Path(location).resolve().name if Path(location).exists() else location  # not this machine's folders
        samples.append(Sample(torch.stack([pixels[index] for index in part]), truth, f"images of {name}"))
    return samples[0], samples[1]


# Rows that are looked through for each that is taken: a dataset sorted by class shows its first classes only.
WINDOW = 10


def draw(rows: Iterable[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` rows, each as likely as any other of the first `WINDOW` times that number; always the same ones."""
    generator = random.Random(0)
    kept: list[Mapping[str, Any]] = []
    for index, row in enumerate(itertools.islice(rows, count * WINDOW)):
        if index < count:
            kept.append(row)
        elif (place := generator.randrange(index + 1)) < count:
            kept[place] = row
    return kept


def open_labelled(
    location: str, config: PretrainedConfig, **how: Any
) -> tuple[ImageDataset, Callable[[Mapping[str, Any]], Any]]:
    """
    A dataset, and a function that gives the label of a row as the model numbers it; None where that cannot be told.
    """
    from ..data.datasets import open_images

    if config.problem_type not in (MULTI_LABEL, REGRESSION):
        dataset = open_images(location, **how)
        return dataset, class_reader(dataset, config)
    try:
        dataset = open_images(location, **how, answered_by=config)
    except UserError:  # no labels, or others; whether there are images is seen next
        return open_images(location, **how), lambda row: None

    def read(row: Mapping[str, Any]) -> np.ndarray | None:
        try:
            return dataset.label(row)
        except (BrokenImage, UserError):
            return None

    return dataset, read


def class_reader(dataset: ImageDataset, config: PretrainedConfig) -> Callable[[Mapping[str, Any]], int | None]:
    """A function that gives the class of a row as the model numbers it; None where that cannot be told."""
    from datasets import ClassLabel

    from ..data.classes import Classes, UnknownClass
    from ..data.columns import feature_of, field_of, find_label_column

    features = dataset.stream.features
    try:
        column = find_label_column(features, None, dataset.name)
        classes = Classes.of_config(config)
        if column is not None and isinstance(feature := feature_of(features, column), ClassLabel):
            classes = Classes.numbered(feature.names).renumbered(classes.names)
    except (UserError, KeyError):  # several columns, other names: there is nothing to compare with
        column = None

    def read(row: Mapping[str, Any]) -> int | None:
        try:
            return None if column is None else classes.index(field_of(row, column))
        except UnknownClass:
            return None

    return read


def sample_photographs(processor: Any, count: int, num_channels: int = 3) -> Sample:
    """
    Photographs that scikit-learn and scikit-image bring, if they are installed; else pictures with a photograph's
    spectrum, whose amplitude falls with the frequency.
    """
    try:
        images, name = resized((320, 256), count), "photographs of scikit-learn and scikit-image"
    except Exception:  # not installed, or without its data: a comparison on made-up pictures is still one
        images, name = [made_up(seed) for seed in range(count)], "made-up pictures with the spectrum of photographs"
    pixels = [prepare(processor, in_channels(image, num_channels)) for image in images]
    return Sample(torch.stack(pixels), None, name)


# Widths and heights of images that have to be resized and cropped: tiny, strips, tall, wide, large.
ODD_SIZES = ((320, 256), (37, 91), (249, 248), (640, 427), (300, 1000), (1501, 1000), (17, 16), (100, 100), (223, 225))
STRIPS = ((1, 1), (500, 1), (1, 500), (9, 3000))


def odd_images(strips: bool) -> list[Image.Image]:
    """RGB images of ODD_SIZES, and with `strips` of STRIPS: photographs, or what `made_up` gives."""
    sizes = ODD_SIZES + STRIPS * strips
    try:
        images = resized((640, 512), len(sizes))
    except Exception:  # as in `sample_photographs`
        images = [made_up(seed) for seed in range(len(sizes))]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(images, sizes, strict=True)]


def in_channels(image: Image.Image, number: int) -> Image.Image | torch.Tensor:
    """An RGB image in so many channels; the fourth shows the image upside down, so that it says something else.

    Of two or more than four channels each shows the image shifted further, as a tensor (number, height, width).
    """
    if number not in (1, 3, 4):
        planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return torch.stack([planes[index % 3].roll(8 * index, -1) for index in range(number)])
    if number == 1:
        return ImageOps.grayscale(image)
    if number == 4:
        image = image.copy()
        image.putalpha(ImageOps.flip(ImageOps.grayscale(image)))
    return image


def check_channels(name: str, processor: Any, number: int) -> None:
    """
    Raises:
        UserError: the image processor does not make the channels that the model `name` takes.
    """
    advice = (
        f"its preprocessor_config.json needs num_channels {number}, and as many values of image_mean and image_std"
    )
    if number not in (1, 3, 4) and channels_of(processor) != number:
        raise UserError(f"{name} takes images of {number} channels, which its image processor does not make: {advice}")
    try:
        pixels = prepare(processor, in_channels(made_up(0), number))
    except Exception as error:  # whatever a foreign processor may raise
        raise UserError(
            f"the image processor of {name} cannot prepare an image of {number} channels: {one_line(error)} ({advice})"
        ) from error
    if len(pixels) != number:
        raise UserError(
            f"{name} takes images of {number} channels, but its image processor makes {len(pixels)} of them: {advice}"
        )


def made_up(seed: int, height: int = 256, width: int = 320) -> Image.Image:
    """Noise whose amplitude is one over its frequency, in colour."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    planes = []
    for _ in range(3):
        noise = np.fft.rfft2(generator.standard_normal((height, width))) / frequency
        plane = np.fft.irfft2(noise, (height, width))
        planes.append(128 + 50 * (plane - plane.mean()) / plane.std())
    return Image.fromarray(np.stack(planes, 2).clip(0, 255).astype(np.uint8))
