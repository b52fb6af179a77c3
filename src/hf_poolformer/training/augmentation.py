"""Augmentation: what happens to one image in the data workers, and to a batch of them on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from .arguments import TrainingSettings


def draw(low: float, high: float) -> float:
    """Uniform; from torch's generator, the only one that data workers seed and checkpoints keep."""
    return torch.empty(()).uniform_(low, high).item()


def draw_sign(value: float) -> float:
    return value if torch.rand(()).item() < 0.5 else -value


def solarize_add(image: Image.Image, amount: int) -> Image.Image:
    """Brightens the dark half of the scale; torchvision has no such operation."""
    return image.point([min(255, level + amount) if level < 128 else level for level in range(256)] * 3)


class RandAugment(v2.Transform):
    """RandAugment as the paper's recipe means it: `rand-m9-mstd0.5-inc1` in timm's notation.

    torchvision's `RandAugment` is another policy: one fixed magnitude on a scale of 31 bins, every operation always
    applied, enhancements that grow weaker or stronger at will, no Invert and SolarizeAdd. Here each of `num_ops`
    operations is drawn from 15, applied with probability 0.5, and its magnitude is drawn from N(magnitude, std)
    cut off to [0, 10]; all operations grow stronger with the magnitude. Pixels are moved by torchvision's functions,
    so results agree with timm's up to interpolation; shears are about the image's origin as there.

    Takes and returns an RGB `PIL.Image`. Sources: arXiv 1909.13719; timm, `data/auto_augment.py`.

    Args:
        magnitude: mean strength, 0 to 10.
        std: its standard deviation.
        num_ops: operations per image.
        fill: colour (R, G, B), 0 to 255, of what is uncovered.
    """

    def __init__(self, magnitude: float = 9.0, std: float = 0.5, num_ops: int = 2, fill: tuple[int, ...] = (128,) * 3):
        super().__init__()
        self.magnitude, self.std, self.num_ops, self.fill = magnitude, std, num_ops, list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        operations = []
        for index in torch.randint(len(OPERATIONS), (self.num_ops,)).tolist():
            strength = min(max(torch.normal(self.magnitude, self.std, ()).item(), 0.0), 10.0) / 10
            if torch.rand(()).item() < 0.5:
                operations.append((index, strength))
        return {"operations": operations}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        for index, strength in params["operations"]:
            inpt = OPERATIONS[index](inpt, strength, self.fill)
        return inpt


def affine(image: Image.Image, fill: list[int], *, angle=0.0, translate=(0, 0), shear=(0.0, 0.0), center=None):
    interpolation = InterpolationMode.BILINEAR if torch.rand(()).item() < 0.5 else InterpolationMode.BICUBIC
    return F.affine(
        image,
        angle=angle,
        translate=list(translate),
        scale=1.0,
        shear=list(shear),
        interpolation=interpolation,
        fill=fill,
        center=center,
    )


def shear_degrees(strength: float) -> float:
    return math.degrees(math.atan(draw_sign(0.3 * strength)))


def enhancement(strength: float) -> float:
    return max(0.1, 1 + draw_sign(0.9 * strength))


# Each takes an image, a strength from 0 to 1 and the fill colour.
OPERATIONS: tuple[Callable[[Image.Image, float, list[int]], Image.Image], ...] = (
    lambda image, strength, fill: F.autocontrast(image),
    lambda image, strength, fill: F.equalize(image),
    lambda image, strength, fill: F.invert(image),
    lambda image, strength, fill: affine(image, fill, angle=draw_sign(30 * strength)),
    lambda image, strength, fill: F.posterize(image, max(4 - int(4 * strength), 1)),
    lambda image, strength, fill: F.solarize(image, 256 - min(256, int(256 * strength))),
    lambda image, strength, fill: solarize_add(image, min(128, int(110 * strength))),
    lambda image, strength, fill: F.adjust_saturation(image, enhancement(strength)),
    lambda image, strength, fill: F.adjust_contrast(image, enhancement(strength)),
    lambda image, strength, fill: F.adjust_brightness(image, enhancement(strength)),
    lambda image, strength, fill: F.adjust_sharpness(image, enhancement(strength)),
    lambda image, strength, fill: affine(image, fill, shear=(shear_degrees(strength), 0.0), center=[0, 0]),
    lambda image, strength, fill: affine(image, fill, shear=(0.0, shear_degrees(strength)), center=[0, 0]),
    lambda image, strength, fill: affine(image, fill, translate=(round(draw_sign(0.45 * strength) * image.width), 0)),
    lambda image, strength, fill: affine(image, fill, translate=(0, round(draw_sign(0.45 * strength) * image.height))),
)


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, with bilinear or bicubic interpolation at random: timm's `interpolation="random"`."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        self.interpolation = InterpolationMode.BILINEAR if torch.rand(()).item() < 0.5 else InterpolationMode.BICUBIC
        return super().transform(inpt, params)


class TrainTransform:
    """From a decoded RGB image to a normalised training example, by the recipe.

    Args:
        settings: the augmentation settings.
        processor: image processor of the model; its size, mean and standard deviation are used.

    Calling it with a `PIL.Image` returns a float32 tensor (3, height, width).
    """

    def __init__(self, settings: TrainingSettings, processor: Any):
        height, width = input_size(processor)
        mean, std = list(processor.image_mean), list(processor.image_std)
        fill = tuple(round(255 * value) for value in mean)
        steps: list[Any] = []
        if settings.crop_min_scale < 1:
            steps.append(RandomResizedCrop((height, width), scale=(settings.crop_min_scale, 1.0)))
        else:
            steps.append(v2.Resize(max(height, width), interpolation=InterpolationMode.BICUBIC))
            steps.append(v2.CenterCrop((height, width)))
        if settings.horizontal_flip:
            steps.append(v2.RandomHorizontalFlip(settings.horizontal_flip))
        if settings.affine_degrees or settings.affine_translate or settings.affine_scale:
            steps.append(
                v2.RandomAffine(
                    degrees=settings.affine_degrees,
                    translate=(settings.affine_translate,) * 2,
                    scale=(1 - settings.affine_scale, 1 + settings.affine_scale),
                    interpolation=InterpolationMode.BILINEAR,
                )
            )
        if settings.rand_augment_magnitude:
            steps.append(
                RandAugment(
                    settings.rand_augment_magnitude, settings.rand_augment_std, settings.rand_augment_ops, fill
                )
            )
        steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        if settings.random_erasing:
            # After normalisation: noise of the data's own scale, one value per pixel (timm's mode "pixel").
            steps.append(v2.RandomErasing(settings.random_erasing, scale=(0.02, 1 / 3), value="random"))
        self.steps = v2.Compose(steps)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.steps(image)


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


class BatchMixer:
    """Mixup and CutMix on a batch, with label smoothing: hard labels become soft targets.

    Args:
        num_labels: number of classes.
        mixup_alpha: parameter of mixup's Beta distribution; 0: no mixup.
        cutmix_alpha: the same for CutMix.
        switch_prob: probability of CutMix rather than mixup where both are on.
        label_smoothing: part of the target spread evenly over all classes.

    Calling it with pixel values (batch, 3, height, width) and labels (batch,) returns the pixel values and float32
    targets (batch, num_labels) that sum to 1. Sources: arXiv 1710.09412, 1905.04899; timm, `data/mixup.py`.
    """

    def __init__(
        self,
        num_labels: int,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.0,
    ):
        self.num_labels, self.label_smoothing = num_labels, label_smoothing
        choices = []
        if mixup_alpha:
            choices.append((v2.MixUp(alpha=mixup_alpha, num_classes=num_labels), 1 - switch_prob))
        if cutmix_alpha:
            choices.append((v2.CutMix(alpha=cutmix_alpha, num_classes=num_labels), switch_prob))
        if len(choices) == 2:
            transforms, weights = zip(*choices, strict=True)
            self.mix: Any = v2.RandomChoice(list(transforms), p=list(weights))
        else:
            self.mix = choices[0][0] if choices else None

    def __call__(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mix is None:
            targets = torch.nn.functional.one_hot(labels, self.num_labels).float()
        else:
            pixel_values, targets = self.mix(pixel_values, labels)
        return pixel_values, targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_labels
