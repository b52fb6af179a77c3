"""What augmentation does to pixels: operations on a batch of 8-bit images, each with an amount of its own.

The data workers use them on one image, the device on a whole batch, with the same results but for the arithmetic of
the device. Results are Pillow's up to rounding, and up to the kernel of bicubic interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import grid_sample
from torchvision.transforms.v2 import functional as F


def uniform(low: float, high: float) -> float:
    """From torch's generator, the only one that data workers seed and checkpoints keep."""
    return torch.empty(()).uniform_(low, high).item()


def chance(probability: float) -> bool:
    return torch.rand(()).item() < probability


def draw_sign(value: float) -> float:
    return value if chance(0.5) else -value


def tensor_like(values: Any, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that go with a batch, on its device."""
    return torch.as_tensor(np.asarray(values), dtype=dtype).to(images.device, non_blocking=True)


def change(
    images: torch.Tensor, members: Sequence[int], function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The batch with `function` applied to the images of these numbers, together."""
    if not members:
        return images
    if len(members) == len(images):
        return function(images)
    index = tensor_like(members, images, torch.int64)
    return images.index_copy(0, index, function(images.index_select(0, index)))


class Affine(NamedTuple):
    """A rotation by `angle` degrees with a zoom and shears (degrees), about `center`, then a shift in pixels; as
    torchvision's `affine`. No centre means the middle of the image."""

    angle: float = 0.0
    translate: tuple[float, float] = (0.0, 0.0)  # x, y
    scale: float = 1.0
    shear: tuple[float, float] = (0.0, 0.0)
    center: tuple[float, float] | None = None


def move(images: torch.Tensor, affines: Sequence[Affine], bicubic: bool, fill: Sequence[int]) -> torch.Tensor:
    """Moves each image in its own way; what lies outside of it gets the colour `fill`, without a soft edge.

    Args:
        images: uint8 (B, 3, H, W).
    """
    height, width = images.shape[-2:]
    # Places in the original, from -1 to 1, for each place in the result. torch's affine_grid takes ten times as long.
    theta = tensor_like([sampling_matrix(a, height, width) for a in affines], images, torch.float32)
    x_x, x_y, x_1, y_x, y_y, y_1 = theta.view(-1, 6, 1, 1).unbind(1)  # each (B, 1, 1)
    x = (torch.arange(width, device=images.device) * 2 + 1) / width - 1
    y = ((torch.arange(height, device=images.device) * 2 + 1) / height - 1)[:, None]
    grid = images.new_empty((len(images), height, width, 2), dtype=torch.float32)
    torch.add(x_x * x, x_y * y + x_1, out=grid[..., 0])
    torch.add(y_x * x, y_y * y + y_1, out=grid[..., 1])
    mode = "bicubic" if bicubic else "bilinear"
    moved = grid_sample(images.float(), grid, mode, padding_mode="border", align_corners=False)
    # Rounded down, as Pillow does; what is an integer but for float32's rounding stays that integer.
    moved = to_uint8(moved.add_(1e-3))
    inside = (grid[..., 0].abs() <= 1).logical_and_(grid[..., 1].abs() <= 1)[:, None].to(torch.uint8)
    colour = tensor_like(fill, images, torch.uint8).view(1, 3, 1, 1)
    return colour + (moved - colour) * inside  # 8 bits wrap around there and back; faster than torch.where


def sampling_matrix(affine: Affine, height: int, width: int) -> tuple[float, ...]:
    """(xx, xy, x1, yx, yy, y1): from (x, y, 1) in the moved image to (x, y) in the original, between -1 and 1.

    The inverse of shears, rotation and zoom about the centre, followed by the shift; as torchvision's `affine`.
    """
    angle, shear_x, shear_y = (math.radians(degrees) for degrees in (affine.angle, *affine.shear))
    # In pixels, rotation and shears: a determinant of 1.
    a, c = math.cos(angle - shear_y) / math.cos(shear_y), math.sin(angle - shear_y) / math.cos(shear_y)
    b, d = -a * math.tan(shear_x) - math.sin(angle), -c * math.tan(shear_x) + math.cos(angle)
    xx, xy, yx, yy = d / affine.scale, -b / affine.scale, -c / affine.scale, a / affine.scale
    centre_x, centre_y = (width / 2, height / 2) if affine.center is None else affine.center
    shift_x, shift_y = centre_x + affine.translate[0], centre_y + affine.translate[1]
    x1, y1 = centre_x - xx * shift_x - xy * shift_y, centre_y - yx * shift_x - yy * shift_y
    # From -1..1 to pixels and back: x = (u + 1) * width / 2.
    xy, yx = xy * height / width, yx * width / height
    x1, y1 = 2 * x1 / width + xx + xy - 1, 2 * y1 / height + yy + yx - 1
    return xx, xy, x1, yx, yy, y1


def to_uint8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp_(0, 255).to(torch.uint8)


def posterize(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Keeps so many of the upper bits."""
    return images & (256 - 2 ** (8 - amounts.to(torch.int32))).to(torch.uint8)


def solarize(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Inverts what is at least so bright."""
    bright = images.to(torch.int16) >= amounts.to(torch.int16)
    return images ^ bright.to(torch.uint8).mul_(255)


def solarize_add(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Brightens the dark half of the scale, by 128 at most."""
    return images + (images < 128).to(torch.uint8).mul_(amounts.to(torch.uint8))


def blend(images: torch.Tensor, other: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """`other` + amount * (images - other), cut off and rounded down, as in Pillow's enhancements."""
    return to_uint8(torch.addcmul(other * (1 - amounts), images, amounts))


def grey(images: torch.Tensor) -> torch.Tensor:
    """Luminance (B, 1, H, W) in whole levels, float32."""
    red, green, blue = images.float().unbind(1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).round_()[:, None]


def saturation(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    return blend(images, grey(images), amounts)


def contrast(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    return blend(images, grey(images).mean((1, 2, 3), keepdim=True).round_(), amounts)


def brightness(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    return to_uint8(images * amounts)


def sharpness(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    smooth = images.float()
    if min(images.shape[-2:]) >= 3:
        # 1 1 1, 1 5 1, 1 1 1 in thirteenths. The outermost pixels lack neighbours and stay.
        inner = smooth[..., 1:-1, 1:-1]
        rows = smooth[..., :-2, :] + smooth[..., 1:-1, :] + smooth[..., 2:, :]
        sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        inner.copy_(sums.add_(inner, alpha=4).div_(13).round_())
    return blend(images, smooth, amounts)


class Operation(NamedTuple):
    """An operation of RandAugment: how its amount comes from a strength of 0 to 1, and what it does.

    Attributes:
        draw: strength to amount; draws a sign where the operation has one. None: it has no amount.
        apply: on images, uint8 (B, 3, H, W), and amounts, float32 (B, 1, 1, 1). None: it moves the image.
        affine: amount, width and height to that movement.
    """

    draw: Callable[[float], float] | None = None
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
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
    "autocontrast": Operation(apply=lambda images, amounts: F.autocontrast(images)),
    "equalize": Operation(apply=lambda images, amounts: F.equalize(images)),
    "invert": Operation(apply=lambda images, amounts: 255 - images),
    "rotate": Operation(draw_rotation, affine=lambda amount, width, height: Affine(angle=amount)),
    "posterize": Operation(lambda strength: max(4 - int(4 * strength), 1), posterize),
    "solarize": Operation(lambda strength: 256 - min(256, int(256 * strength)), solarize),
    "solarize_add": Operation(lambda strength: min(128, int(110 * strength)), solarize_add),
    "saturation": Operation(draw_enhancement, saturation),
    "contrast": Operation(draw_enhancement, contrast),
    "brightness": Operation(draw_enhancement, brightness),
    "sharpness": Operation(draw_enhancement, sharpness),
    "shear_x": Operation(draw_shear, affine=lambda amount, *size: Affine(shear=(amount, 0.0), center=(0.0, 0.0))),
    "shear_y": Operation(draw_shear, affine=lambda amount, *size: Affine(shear=(0.0, amount), center=(0.0, 0.0))),
    "shift_x": Operation(
        draw_shift, affine=lambda amount, width, height: Affine(translate=(round(amount * width), 0.0))
    ),
    "shift_y": Operation(
        draw_shift, affine=lambda amount, width, height: Affine(translate=(0.0, round(amount * height)))
    ),
}


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
        fill: colour (R, G, B), 0 to 255, of what is uncovered.
    """

    def __init__(self, magnitude: float = 9.0, std: float = 0.5, num_ops: int = 2, fill: tuple[int, ...] = (128,) * 3):
        self.magnitude, self.std, self.num_ops, self.fill = magnitude, std, num_ops, fill

    def draw(self) -> list[DrawnOperation]:
        """At most `num_ops` operations for one image."""
        names, drawn = tuple(OPERATIONS), []
        for index in torch.randint(len(names), (self.num_ops,)).tolist():
            strength = min(max(torch.normal(self.magnitude, self.std, ()).item(), 0.0), 10.0) / 10
            if not chance(0.5):
                continue
            operation = OPERATIONS[names[index]]
            amount = operation.draw(strength) if operation.draw is not None else 0.0
            drawn.append(DrawnOperation(names[index], amount, operation.affine is not None and chance(0.5)))
        return drawn

    def apply(self, images: torch.Tensor, drawn: Sequence[Sequence[DrawnOperation]]) -> torch.Tensor:
        """Images, uint8 (B, 3, H, W), after the operations drawn for each."""
        for turn in range(max(map(len, drawn), default=0)):
            # Of all first operations those that are alike at once, then of all second ones.
            groups: dict[str | bool, list[int]] = {}
            for index, operations in enumerate(drawn):
                if turn < len(operations):
                    name, _, bicubic = operations[turn]
                    groups.setdefault(name if OPERATIONS[name].affine is None else bicubic, []).append(index)
            for kind, members in groups.items():
                alike = [drawn[index][turn] for index in members]
                images = change(images, members, lambda these, a=alike, k=kind: self._apply_alike(these, k, a))
        return images

    def _apply_alike(self, images: torch.Tensor, kind: str | bool, drawn: Sequence[DrawnOperation]) -> torch.Tensor:
        if isinstance(kind, str):
            amounts = tensor_like([amount for _, amount, _ in drawn], images, torch.float32)
            return OPERATIONS[kind].apply(images, amounts.view(-1, 1, 1, 1))
        height, width = images.shape[-2:]
        affines = [OPERATIONS[name].affine(amount, width, height) for name, amount, _ in drawn]
        return move(images, affines, kind, self.fill)
