"""Augmentation: what is drawn for one image, what happens to it in the data workers, and to a batch on the device.

Everything random about a training example is drawn in the worker that reads its image, `TrainTransform.draw`, from
generators that are seeded for that image. Who then computes it, the worker or the device (`device_pipeline`), makes no
difference to what happens to which image, nor to what a checkpoint has to remember.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from ..data.decoding import EncodedImage
from ..data.transforms import channels_of, input_size
from ..settings.classification import ClassificationSettings
from .movements import Affine, Movement
from .operations import (
    MOVEMENTS,
    OPERATIONS,
    DrawnOperation,
    RandAugment,
    Step,
    apply_each,
    apply_together,
    chance,
    upload,
)
from .resampling import MAX_PIXELS, Part, portions, resize_parts


# A crop decoded at a reduced size stays this many times finer than the example made of it. On photographs the example
# then differs from the exact one by 0.8 (half size) to 1.5 (an eighth) of 255 levels in the mean, which is less than
# bilinear and bicubic interpolation, drawn at random, differ from each other (1.5 to 2.2).
OVERSAMPLING = 1.5
# Fewer crops than that take fewer launches one by one than together.
FEW = 32
# Where PyTorch resizes 8 bits as such, in all modes; elsewhere torchvision takes a detour by floats.
FAST_RESIZING = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
# Numbers in the table from which random erasing takes its noise, a power of two: 4 MB. A slice of it costs a tenth of
# drawing; two images meet in the same slice once in a million times.
NOISE = 1 << 20


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Draws:
    """Everything that is random about one training example.

    Attributes:
        crop: in the upright image; None: the centre.
        bicubic: how the crop is resized; otherwise bilinear.
        flip, upside_down: mirrored left to right, top to bottom.
        affine: the random affine movement.
        operations: those of RandAugment.
        erased: rectangle of noise in the example, None for none.
        noise: seed of that noise.
    """

    crop: Box | None = None
    bicubic: bool = True
    flip: bool = False
    upside_down: bool = False
    affine: Affine | None = None
    operations: Sequence[DrawnOperation] = ()
    erased: Box | None = None
    noise: int = 0


@dataclass(frozen=True)
class ExampleHeader:
    """What must be known about a training example beside its pixels.

    Attributes:
        bytes: length of its JPEG; 0: it comes as a crop.
        orientation: how the decoded JPEG must be turned, as in EXIF.
        height, width: of the whole image when it is upright, in pixels.
        name: the path by which a person would look for the image, or None.
    """

    draws: Draws
    bytes: int = 0
    orientation: int = 1
    height: int = 0
    width: int = 0
    name: str | None = None


def part_of(image: torch.Tensor, draws: Draws) -> torch.Tensor:
    """What was drawn of an image (3, H, W); all of it where nothing was."""
    if draws.crop is None:
        return image
    top, left, height, width = draws.crop
    return image[:, top : top + height, left : left + width]


def draw_crop(height: int, width: int, min_scale: float) -> Box:
    """The crop of torchvision's `RandomResizedCrop`: `min_scale` to all of the area, sides in a ratio of 3/4 to 4/3.

    Where ten do not fit, the largest in the centre whose ratio is allowed.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * random.uniform(min_scale, 1)
        ratio = math.exp(random.uniform(math.log(low), math.log(high)))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            return Box(random.randint(0, height - rows), random.randint(0, width - columns), rows, columns)
    rows, columns = min(height, round(width / low)), min(width, round(height * high))
    return Box((height - rows) // 2, (width - columns) // 2, rows, columns)


def draw_erased(height: int, width: int) -> Box | None:
    """A rectangle of random erasing: 2 to 33 % of the area, sides in a ratio of 0.3 to 3.3; None if ten do not fit."""
    for _ in range(10):
        area = height * width * random.uniform(0.02, 1 / 3)
        ratio = math.exp(random.uniform(math.log(0.3), math.log(3.3)))
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < rows < height and 0 < columns < width:
            return Box(random.randint(0, height - rows), random.randint(0, width - columns), rows, columns)
    return None


@functools.cache
def noise_table(device: torch.device) -> torch.Tensor:
    """Standard normal numbers, float32 (NOISE,), the same on each device and in each process."""
    return torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).to(device)


def noise_starts(seeds: np.ndarray) -> np.ndarray:
    """Where in the table noise begins, int64, by its seed: Fibonacci hashing (Knuth, TAOCP 6.4)."""
    return (seeds.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - NOISE.bit_length() + 1)).astype(
        np.int64
    )


def noise_of(seed: int, count: int) -> torch.Tensor:
    """So many numbers of the noise of a seed, on the CPU."""
    table, start = noise_table(torch.device("cpu")), int(noise_starts(np.array([seed]))[0])
    if start + count <= NOISE:
        return table[start : start + count]
    return table[torch.arange(start, start + count) % NOISE]


def noisy_rectangles(
    rectangles: np.ndarray, height: int, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal noise for rectangles of a batch of images, all of them at once.

    Args:
        rectangles: int64 (N, 6): which image, top, left, height and width, and the seed of its noise.
        height, width: of the images.

    Returns:
        places: int64 (P,), of their pixels among all pixels of the batch.
        noise: float32 (P, 3), `noise_of` each seed.
    """
    images, tops, lefts, rows, columns, seeds = rectangles.T
    ends = (rows * columns).cumsum()
    starts = ends - rows * columns
    corners = (images * height + tops) * width + lefts
    table, ends = upload([np.stack([starts, columns, corners, noise_starts(seeds)]), ends], device)
    pixel = torch.arange(int(rows @ columns), device=device)
    start, column, corner, first = table.index_select(1, torch.searchsorted(ends, pixel, right=True))
    pixel -= start  # within its rectangle
    # A row further down: what is left of the image's width comes in addition.
    places = corner.add_(pixel).add_((pixel // column).mul_(width - column))
    numbers = first.add_(pixel, alpha=3)[:, None] + torch.arange(3, device=device)
    return places, noise_table(device)[numbers.remainder_(NOISE)]


class TrainTransform:
    """From an image to a normalised training example, by the recipe.

    Four steps, the first of which draws all that is random: `draw`; `crop`, for which less than the whole image may
    be enough; `augment` and `normalise`, for one image or many.

    Args:
        settings: the augmentation settings, and whether JPEGs may be decoded at a reduced size.
        processor: image processor of the model; its size, mean and standard deviation are used.

    Calling it with a `PIL.Image` does all four and returns a float32 tensor (3, height, width).

    Where the processor takes another number of channels, so has everything here, and the pixels may be float32
    between 0 and 255. RandAugment then leaves out the operations on colours, but for grey images of 8 bits.
    """

    def __init__(self, settings: ClassificationSettings, processor: Any):
        self.height, self.width = self.usual_size = input_size(processor)
        self.sides = settings.training_sides()
        self.num_channels = channels_of(processor)
        mean, std = (
            np.broadcast_to(np.asarray(values, dtype=np.float64), self.num_channels)
            for values in (processor.image_mean, processor.image_std)
        )
        # (x / 255 - mean) / std is one product and one sum. The same for every pixel, channels last as decoded images
        # are: multiplying three values at a time would take five times as long.
        self.factors, self.offsets = (
            torch.from_numpy(values).float().expand(self.height, self.width, -1).contiguous().permute(2, 0, 1)
            for values in (1 / (255 * std), -mean / std)
        )
        self.reduced_decoding = settings.reduced_decoding
        self.horizontal_flip, self.vertical_flip = settings.horizontal_flip, settings.vertical_flip
        self.random_erasing = settings.random_erasing
        self.crop_min_scale = settings.crop_min_scale
        self.random_affine = self.rand_augment = None
        if settings.affine_degrees or settings.affine_translate or settings.affine_scale:
            self.random_affine = v2.RandomAffine(
                degrees=settings.affine_degrees,
                translate=(settings.affine_translate,) * 2,
                scale=(1 - settings.affine_scale, 1 + settings.affine_scale),
            )
        if settings.rand_augment_magnitude:
            self.rand_augment = RandAugment(
                settings.rand_augment_magnitude,
                settings.rand_augment_std,
                settings.rand_augment_ops,
                tuple(round(255 * value) for value in mean),
                OPERATIONS if self.num_channels in (1, 3) else MOVEMENTS,
            )

    def at_epoch(self, epoch: int) -> TrainTransform:
        """The same with the size of an epoch's examples, the first being 0."""
        side = next((side for first, side in reversed(self.sides) if first <= epoch), None)
        return self.sized(*(self.usual_size if side is None else (side, side)))

    def sized(self, height: int, width: int) -> TrainTransform:
        """The same with examples of this size."""
        if (height, width) == (self.height, self.width):
            return self
        other = copy.copy(self)
        other.height, other.width = height, width
        other.factors, other.offsets = (
            values[:, 0, 0].expand(height, width, -1).contiguous().permute(2, 0, 1)
            for values in (self.factors, self.offsets)
        )
        return other

    def to(self, device: torch.device) -> TrainTransform:
        """The same for images on another device."""
        moved = copy.copy(self)
        moved.factors, moved.offsets = self.factors.to(device), self.offsets.to(device)
        return moved

    def __call__(self, image: Image.Image) -> torch.Tensor:
        draws = self.draw(image.height, image.width)
        return self.normalise(self.augment(self.crop(image, draws)[None], [draws]), [draws])[0]

    def load_example(self, image: EncodedImage) -> torch.Tensor:
        """All four steps for one image that is still encoded. Errors as of `load`."""
        draws = self.draw(image.height, image.width)
        return self.normalise(self.augment(self.decode_crop(image, draws)[None], [draws]), [draws])[0]

    def load(self, image: EncodedImage) -> tuple[ExampleHeader, torch.Tensor | bytes]:
        """The worker's part: an image, decoded no finer than its crop needs, as that crop, uint8 (3, height, width).

        Raises:
            BrokenImage: its pixels cannot be read.
        """
        draws = self.draw(image.height, image.width)
        return ExampleHeader(draws), self.decode_crop(image, draws)

    def draw(self, height: int, width: int) -> Draws:
        """What is to happen to an image of this size, from Python's generator, affine movements from torch's."""
        crop, bicubic = None, True
        if self.crop_min_scale < 1:
            crop = draw_crop(height, width, self.crop_min_scale)
            bicubic = chance(0.5)  # timm's `interpolation="random"`
        flip = bool(self.horizontal_flip) and chance(self.horizontal_flip)
        upside_down = bool(self.vertical_flip) and chance(self.vertical_flip)
        affine = None
        if self.random_affine is not None:
            affine = Affine(**self.random_affine.make_params([_sized(self.height, self.width)]))
        operations = self.rand_augment.draw() if self.rand_augment is not None else ()
        erased, noise = None, 0
        if self.random_erasing and chance(self.random_erasing):
            erased, noise = draw_erased(self.height, self.width), random.getrandbits(31)
        return Draws(crop, bicubic, flip, upside_down, affine, operations, erased, noise)

    def decode_crop(self, image: EncodedImage, draws: Draws) -> torch.Tensor:
        """As `crop`, of an image that is still encoded."""
        rows = None if draws.crop is None else draws.crop.top + draws.crop.height
        pixels, reduction = image.pixels(self.reduction(draws, image.height, image.width), rows)
        return self.crop(pixels, draws, reduction)

    def reduction(self, draws: Draws, height: int, width: int) -> int:
        """1, 2, 4 or 8: how many times smaller an image may be decoded, its crop still finer than the example."""
        if not self.reduced_decoding:
            return 1
        if draws.crop is None:
            spare = min(height, width) / max(self.height, self.width)
        else:
            spare = min(draws.crop.height / self.height, draws.crop.width / self.width)
        return next((times for times in (8, 4, 2) if spare >= times * OVERSAMPLING), 1)

    def crop(self, image: Image.Image | np.ndarray, draws: Draws, reduction: int = 1) -> torch.Tensor:
        """The part of an image that is used, uint8 (3, height, width).

        Args:
            image: RGB, or its pixels (height, width, 3). It may have been decoded smaller, and not below the part.
        """
        pixels = np.asarray(image)
        if draws.crop is not None:
            top, left, height, width = draws.crop
            # To whole pixels of the smaller image: nobody misses the fraction of a random crop.
            first, last, start, end = (round(edge / reduction) for edge in (top, top + height, left, left + width))
            pixels = pixels[first:last, start:end]
        # Copied: of pixels with gaps between their rows, resizing takes longer than that.
        return self.resize(torch.from_numpy(np.array(pixels)).permute(2, 0, 1), draws)

    def resize(self, pixels: torch.Tensor, draws: Draws) -> torch.Tensor:
        """From a crop to uint8 (3, height, width); where none was drawn, from an image to its centre.

        Floats between 0 and 255 stay floats, and what overshoots that is cut off.
        """
        resized = self.resample(pixels, draws)
        return resized if resized.dtype == torch.uint8 else resized.clamp_(0, 255)

    def resize_together(self, images: Sequence[torch.Tensor], draws: Sequence[Draws]) -> torch.Tensor:
        """The crops of many images, uint8 (3, H, W) of any sizes, resized: uint8 (B, 3, height, width).

        On a device that takes floats, in no more launches for many images than for a few, as long as they fit into
        `MAX_PIXELS`.
        """
        if images[0].device.type == "cpu":
            return torch.stack([self.resize(part_of(*pair), pair[1]) for pair in zip(images, draws, strict=True)])
        return self.resize_floats(images, draws)

    def resize_floats(self, images: Sequence[torch.Tensor], draws: Sequence[Draws]) -> torch.Tensor:
        parts = [self.part(*image.shape[1:], one) for image, one in zip(images, draws, strict=True)]
        results = []
        for start, end in portions([part.pixels(self.height, self.width) for part in parts], MAX_PIXELS):
            these = slice(start, end)
            if end - start < FEW:
                results.append(self.resize_few(images[these], draws[these]))
            else:
                results.append(resize_parts(images[these], parts[these], self.height, self.width))
        return results[0] if len(results) == 1 else torch.cat(results)

    def resize_few(self, images: Sequence[torch.Tensor], draws: Sequence[Draws]) -> torch.Tensor:
        """In two launches for each, or four where no crop was drawn, with the floats of one crop at a time."""
        pairs = zip(images, draws, strict=True)
        resized = torch.stack([self.resample(part_of(image, one).float(), one) for image, one in pairs])
        return resized.clamp_(0, 255).round_().to(torch.uint8)

    def part(self, height: int, width: int, draws: Draws) -> Part:
        """What `resample` makes of an image of this size."""
        size = self.height, self.width
        if draws.crop is not None:
            return Part(*draws.crop, size, bicubic=draws.bicubic)
        short = max(size)
        long = int(short * max(height, width) / min(height, width))
        resized = (short, long) if height <= width else (long, short)
        start = tuple(round((whole - side) / 2) for whole, side in zip(resized, size, strict=True))
        return Part(0, 0, height, width, resized, start, draws.bicubic)

    def resample(self, pixels: torch.Tensor, draws: Draws) -> torch.Tensor:
        """As `resize`; floats may overshoot."""
        # Antialiased, on 8 bits: on the CPU three times as fast as Pillow, equal up to rounding.
        size = [self.height, self.width]
        mode = InterpolationMode.BICUBIC if draws.bicubic else InterpolationMode.BILINEAR
        if draws.crop is not None and pixels.device.type == "cpu" and pixels.dtype == torch.uint8 and FAST_RESIZING:
            # What torchvision calls, without a tenth of its time. The batch's own stride says that channels are last.
            batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
            return interpolate(batch, size, mode=mode.value, antialias=True)[0]
        if draws.crop is not None:
            return F.resize(pixels, size, mode)
        return F.center_crop(F.resize(pixels, [max(size)], mode), size)

    def augment(self, images: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
        """Flips, moves and RandAugment's operations, each image by its own draws: uint8 (B, 3, height, width) to the
        same, with their channels last in memory."""
        pixels, steps = images.permute(0, 2, 3, 1).contiguous(), [self.steps(one) for one in draws]
        if images.device.type != "cpu":
            pixels = apply_together(pixels, steps, [one.flip for one in draws], [one.upside_down for one in draws])
        else:
            results = []
            for one, these, image in zip(draws, steps, pixels, strict=True):
                if axes := [-1] * one.flip + [-2] * one.upside_down:
                    image = image.permute(2, 0, 1).flip(axes).permute(1, 2, 0)
                results.append(torch.from_numpy(apply_each(image.numpy(), these)) if these else image)
            pixels = torch.stack(results)
        return pixels.permute(0, 3, 1, 2)

    def steps(self, draws: Draws) -> list[Step]:
        """What happens to the pixels of one example after its flip."""
        black = (0,) * self.num_channels
        steps: list[Step] = [] if draws.affine is None else [Movement(draws.affine, False, black)]
        if draws.operations:
            steps += self.rand_augment.steps(draws.operations, self.height, self.width)
        return steps

    def normalise(
        self, images: torch.Tensor, draws: Sequence[Draws], memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """From uint8 (B, 3, height, width) to examples, float32 with their channels last in memory, rectangles of
        noise in those that have them.

        Args:
            memory: on the CPU, where the examples are to be, float32 (B * 3 * height * width,).
        """
        erased = [(index, *one.erased, one.noise) for index, one in enumerate(draws) if one.erased is not None]
        # After normalisation: noise of the data's own scale, one value per pixel and channel (timm's mode "pixel").
        if images.device.type == "cpu":
            # One by one: a whole batch is converted to float first, which does not fit the cache.
            number, channels, height, width = images.shape
            if memory is None:
                memory = torch.empty(images.numel())
            examples = memory.view(number, height, width, channels).permute(0, 3, 1, 2)
            for image, example in zip(images, examples, strict=True):
                torch.addcmul(self.offsets, image, self.factors, out=example)
            for index, top, left, height, width, seed in erased:
                part = examples[index, :, top : top + height, left : left + width].permute(1, 2, 0)
                part.copy_(noise_of(seed, part.numel()).view(part.shape))
            return examples
        examples = torch.addcmul(self.offsets, images, self.factors)
        if erased:
            places, noise = noisy_rectangles(np.array(erased), self.height, self.width, images.device)
            values = examples.permute(0, 2, 3, 1).reshape(-1, 3).index_copy_(0, places, noise)
            examples = values.view(-1, self.height, self.width, 3).permute(0, 3, 1, 2)
        return examples


def _sized(height: int, width: int) -> torch.Tensor:
    """Stands for an image where torchvision asks for nothing but its size."""
    return torch.empty(()).expand(3, height, width)


class BatchMixer:
    """Mixup and CutMix on a batch, with label smoothing: hard labels become soft targets.

    Of two images, mixup and CutMix take the targets in the shares in which they take the pixels; where an image has
    several labels or numbers, each of them. CutMix goes by the area, as timm does: nobody looks whether what a label
    is about is in the part that was cut out.

    Args:
        num_labels: number of classes, or of numbers.
        mixup_alpha: parameter of mixup's Beta distribution; 0: no mixup.
        cutmix_alpha: the same for CutMix.
        switch_prob: probability of CutMix rather than mixup where both are on.
        label_smoothing: part of the target spread evenly over all classes; of several labels, each of which is
            there or not, over these two.

    Calling it with pixel values (batch, 3, height, width) and labels returns the pixel values and float32 targets
    (batch, num_labels), which sum to 1 for one label per image (batch,), and not for several labels or numbers
    (batch, num_labels). Sources: arXiv 1710.09412, 1905.04899; timm, `data/mixup.py`.
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
        choices = self.num_labels if labels.ndim == 1 else 2
        targets = torch.nn.functional.one_hot(labels, self.num_labels).float() if labels.ndim == 1 else labels
        if self.mix is not None:
            pixel_values, targets = self.mix(pixel_values, targets)
        return pixel_values, targets * (1 - self.label_smoothing) + self.label_smoothing / choices
