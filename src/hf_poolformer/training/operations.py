"""RandAugment: which operations there are, how they are drawn, and who applies them.

The data workers apply them to one image at a time, which stays in the cache (`apply_each`); a device to a whole batch
(`apply_together`), in a number of launches that does not grow with the batch: 143 for two operations an image, with
every kind of operation at either turn. The results are the same but for the arithmetic of the device. They are
Pillow's up to rounding, and up to the kernel of bicubic interpolation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from . import colours
from .movements import Affine, Movement, is_rgb, move_channels, move_image, move_together, normalised_matrix


def chance(probability: float) -> bool:
    """From Python's generator, as all that is drawn: torch's takes ten times as long for a single number. The data
    workers seed both for each image."""
    return random.random() < probability


def draw_sign(value: float) -> float:
    return value if chance(0.5) else -value


class Operation(NamedTuple):
    """An operation of RandAugment: how its amount comes from a strength of 0 to 1, and what it does.

    Attributes:
        draw: strength to amount; draws a sign where the operation has one. None: it has no amount.
        apply: on one image, uint8 (H, W, 3), and an amount. None: it moves the image.
        table: whether `apply` is the same for each channel and needs to know nothing of the image but the level.
        affine: amount, width and height to that movement.
    """

    draw: Callable[[float], float] | None = None
    apply: Callable[[np.ndarray, float], np.ndarray] | None = None
    table: bool = False
    affine: Callable[[float, int, int], Affine] | None = None


def draw_rotation(strength: float) -> float:
    return draw_sign(30 * strength)


def draw_enhancement(strength: float) -> float:
    return max(0.1, 1 + draw_sign(0.9 * strength))


def draw_shear(strength: float) -> float:
    return math.degrees(math.atan(draw_sign(0.3 * strength)))


def draw_shift(strength: float) -> float:
    return draw_sign(0.45 * strength)


# timm's `rand-...-inc1`, in its order.
OPERATIONS: dict[str, Operation] = {
    "autocontrast": Operation(apply=colours.autocontrast),
    "equalize": Operation(apply=colours.equalize),
    "invert": Operation(apply=lambda levels, amount: ~levels, table=True),
    "rotate": Operation(draw_rotation, affine=lambda amount, width, height: Affine(angle=amount)),
    "posterize": Operation(lambda strength: max(4 - int(4 * strength), 1), colours.posterize, table=True),
    "solarize": Operation(lambda strength: 256 - min(256, int(256 * strength)), colours.solarize, table=True),
    "solarize_add": Operation(lambda strength: min(128, int(110 * strength)), colours.solarize_add, table=True),
    "saturation": Operation(draw_enhancement, colours.saturation),
    "contrast": Operation(draw_enhancement, colours.contrast),
    "brightness": Operation(draw_enhancement, colours.brightness, table=True),
    "sharpness": Operation(draw_enhancement, colours.sharpness),
    "shear_x": Operation(draw_shear, affine=lambda amount, *size: Affine(shear=(amount, 0.0), center=(0.0, 0.0))),
    "shear_y": Operation(draw_shear, affine=lambda amount, *size: Affine(shear=(0.0, amount), center=(0.0, 0.0))),
    "shift_x": Operation(
        draw_shift, affine=lambda amount, width, height: Affine(translate=(round(amount * width), 0.0))
    ),
    "shift_y": Operation(
        draw_shift, affine=lambda amount, width, height: Affine(translate=(0.0, round(amount * height)))
    ),
}


# Those that move an image and leave its colours alone, whatever its channels are.
MOVEMENTS = tuple(name for name, operation in OPERATIONS.items() if operation.affine is not None)


class DrawnOperation(NamedTuple):
    """One operation, ready to be applied to one image."""

    name: str
    amount: float
    bicubic: bool  # or bilinear, where the image moves


class RandAugment:
    """RandAugment as the paper's recipe means it: `rand-m9-mstd0.5-inc1` in timm's notation.

    torchvision's `RandAugment` is another policy: one fixed magnitude on a scale of 31 bins, every operation always
    applied, enhancements that grow weaker or stronger at will, no Invert and SolarizeAdd. Here each of `num_ops`
    operations is drawn from 15, applied with probability 0.5, and its magnitude is drawn from N(magnitude, std)
    cut off to [0, 10]; all operations grow stronger with the magnitude. Shears are about the image's origin, as in
    timm. Sources: arXiv 1909.13719; timm, `data/auto_augment.py`.

    Args:
        magnitude: mean strength, 0 to 10.
        std: its standard deviation.
        num_ops: operations per image.
        fill: colour (R, G, B), or a level for each channel, 0 to 255, of what is uncovered.
        names: the operations to draw from.
    """

    def __init__(
        self,
        magnitude: float = 9.0,
        std: float = 0.5,
        num_ops: int = 2,
        fill: tuple[int, ...] = (128,) * 3,
        names: Iterable[str] = OPERATIONS,
    ):
        self.magnitude, self.std, self.num_ops, self.fill = magnitude, std, num_ops, fill
        self.names = tuple(names)

    def draw(self) -> list[DrawnOperation]:
        """At most `num_ops` operations for one image."""
        drawn = []
        for name in random.choices(self.names, k=self.num_ops):
            strength = min(max(random.gauss(self.magnitude, self.std), 0.0), 10.0) / 10
            if not chance(0.5):
                continue
            operation = OPERATIONS[name]
            amount = operation.draw(strength) if operation.draw is not None else 0.0
            drawn.append(DrawnOperation(name, amount, operation.affine is not None and chance(0.5)))
        return drawn

    def steps(self, drawn: Sequence[DrawnOperation], height: int, width: int) -> list[Step]:
        """What was drawn for an image of this size."""
        steps: list[Step] = []
        for name, amount, bicubic in drawn:
            affine = OPERATIONS[name].affine
            if affine is None:
                steps.append((name, amount))
            else:
                steps.append(Movement(affine(amount, width, height), bicubic, self.fill))
        return steps


# What happens to one image at one time: an operation and its amount, or a movement.
Step = tuple[str, float] | Movement
MEASURED = ("contrast", "autocontrast", "equalize")


def apply_each(pixels: np.ndarray, steps: Sequence[Step]) -> np.ndarray:
    """One image, uint8 (H, W, 3), on the CPU; or (H, W, C), uint8 or float32 between 0 and 255.

    Of other images than RGB only grey ones of 8 bits have colours to change, as if these were RGB.
    """
    for step in steps:
        if isinstance(step, Movement):
            pixels = move_image(pixels, step) if is_rgb(pixels) else move_channels(pixels, step)
        elif not is_rgb(pixels):
            if pixels.dtype == np.uint8 and pixels.shape[2] == 1:
                name, amount = step
                pixels = OPERATIONS[name].apply(np.repeat(pixels, 3, axis=2), amount)[..., :1]
        else:
            name, amount = step
            pixels = OPERATIONS[name].apply(pixels, amount)
    return pixels


def apply_together(
    pixels: torch.Tensor,
    steps: Sequence[Sequence[Step]],
    flipped: Sequence[bool] = (),
    upside_down: Sequence[bool] = (),
) -> torch.Tensor:
    """A batch, uint8 (B, H, W, 3), on any device: all first steps, then all second ones, each kind of them at once.

    Args:
        flipped, upside_down: which images are mirrored before, left to right and top to bottom; none if empty.
    """
    height, width = pixels.shape[1:3]
    turns = []
    for index in range(max(map(len, steps), default=0)):
        turns.append(Turn([one[index] if index < len(one) else None for one in steps], height, width))
    mirrored = {axis: np.asarray(which, dtype=bool) for axis, which in ((2, flipped), (1, upside_down)) if any(which)}
    arrays = [*mirrored.values(), *(array for turn in turns for array in turn.arrays())]
    tensors = iter(upload(arrays, pixels.device))
    for axis in mirrored:
        pixels = torch.where(next(tensors).view(-1, 1, 1, 1), pixels.flip(axis), pixels)
    for turn in turns:
        pixels = turn.apply(pixels, tensors)
    return pixels


class Turn:
    """One step of each image of a batch, sorted by how it is done.

    Args:
        steps: for each image; None: nothing is done to it.
        height, width: of the images.
    """

    def __init__(self, steps: Sequence[Step | None], height: int, width: int):
        self.number, self.tables = len(steps), {}
        measured, enhanced, moved = [], [], []
        for index, step in enumerate(steps):
            if isinstance(step, Movement):
                matrix = normalised_matrix(step.affine, height, width)
                moved.append((step.bicubic, index, matrix, step.fill))
            elif step is not None:
                name, amount = step
                if OPERATIONS[name].table:
                    self.tables[index] = OPERATIONS[name].apply(colours.LEVELS, amount)
                elif name in MEASURED:
                    measured.append((MEASURED.index(name), index, amount))
                else:
                    enhanced.append((name != "saturation", index, amount))
        self.measured, self.enhanced, self.moved = sorted(measured), sorted(enhanced), sorted(moved)

    def arrays(self) -> list[np.ndarray]:
        """What the device must know, in the order in which `apply` asks for it."""
        arrays = []
        if self.tables or self.measured:
            tables = np.tile(colours.LEVELS, (self.number, 3, 1))
            for index, table in self.tables.items():
                tables[index] = table
            arrays.append(tables)
        if self.measured:
            _, members, amounts = zip(*self.measured, strict=True)
            arrays += [np.array(members), np.array(amounts, dtype=np.float32)]
        if self.enhanced:
            _, members, amounts = zip(*self.enhanced, strict=True)
            arrays += [np.array(members), np.array(amounts, dtype=np.float32)]
        if self.moved:
            _, members, matrices, fills = zip(*self.moved, strict=True)
            arrays += [np.array(members), np.array(matrices, dtype=np.float32), np.array(fills, dtype=np.uint8)]
        return arrays

    def apply(self, pixels: torch.Tensor, tensors: Any) -> torch.Tensor:
        if self.tables or self.measured:
            tables = next(tensors)
            if self.measured:
                members, amounts = next(tensors), next(tensors)
                those = pixels.index_select(0, members)
                kinds = np.bincount([kind for kind, _, _ in self.measured], minlength=len(MEASURED)).tolist()
                made = colours.measured_tables(those, kinds, amounts.view(-1, 1, 1))
                tables.index_copy_(0, members, made)
            pixels = colours.look_up(pixels, tables)
        if self.enhanced:
            members, amounts = next(tensors), next(tensors)
            saturated = sum(not sharpened for sharpened, _, _ in self.enhanced)
            those = pixels.index_select(0, members)
            those = colours.enhance_together(those, saturated, amounts.view(-1, 1, 1, 1))
            pixels = pixels.index_copy(0, members, those)
        if self.moved:
            members, matrices, fills = next(tensors), next(tensors), next(tensors)
            bilinear = sum(not bicubic for bicubic, _, _, _ in self.moved)
            those = move_together(pixels.index_select(0, members), matrices, bilinear, fills)
            pixels = pixels.index_copy(0, members, those)
        return pixels


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Arrays as tensors on a device, in one copy that nobody waits for."""
    if not arrays:
        return []
    lengths = [-(-array.nbytes // 8) * 8 for array in arrays]  # each begins where any type may begin
    host = torch.empty(sum(lengths), dtype=torch.uint8, pin_memory=device.type == "cuda")
    parts = host.split(lengths)
    for part, array in zip(parts, arrays, strict=True):
        part.numpy()[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    sent = host.to(device, non_blocking=True).split(lengths)
    return [
        part[: array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for part, array in zip(sent, arrays, strict=True)
    ]
