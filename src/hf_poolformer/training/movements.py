"""Images that are moved: rotated, zoomed, sheared, shifted. One on the CPU, or many on a device at once.

Both round as Pillow does, and differ from each other by the arithmetic of float32.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import grid_sample


# What is an integer but for float32's rounding stays that integer when it is cut off.
SLACK = 1e-3


class Affine(NamedTuple):
    """A rotation by `angle` degrees with a zoom and shears (degrees), about `center`, then a shift in pixels; as
    torchvision's `affine`. No centre means the middle of the image."""

    angle: float = 0.0
    translate: tuple[float, float] = (0.0, 0.0)  # x, y
    scale: float = 1.0
    shear: tuple[float, float] = (0.0, 0.0)
    center: tuple[float, float] | None = None


class Movement(NamedTuple):
    """How one image moves; what lies outside of it gets the colour `fill`, without a soft edge."""

    affine: Affine
    bicubic: bool
    fill: tuple[int, ...]


def sampling_matrix(affine: Affine, height: int, width: int) -> tuple[float, ...]:
    """(xx, xy, x1, yx, yy, y1): from (x, y, 1) in the moved image to (x, y) in the original, in pixels.

    The inverse of shears, rotation and zoom about the centre, followed by the shift; as torchvision's `affine`.
    """
    angle, shear_x, shear_y = (math.radians(degrees) for degrees in (affine.angle, *affine.shear))
    # Rotation and shears: a determinant of 1.
    a, c = math.cos(angle - shear_y) / math.cos(shear_y), math.sin(angle - shear_y) / math.cos(shear_y)
    b, d = -a * math.tan(shear_x) - math.sin(angle), -c * math.tan(shear_x) + math.cos(angle)
    xx, xy, yx, yy = d / affine.scale, -b / affine.scale, -c / affine.scale, a / affine.scale
    centre_x, centre_y = (width / 2, height / 2) if affine.center is None else affine.center
    shift_x, shift_y = centre_x + affine.translate[0], centre_y + affine.translate[1]
    x1, y1 = centre_x - xx * shift_x - xy * shift_y, centre_y - yx * shift_x - yy * shift_y
    return xx, xy, x1, yx, yy, y1


def normalised_matrix(affine: Affine, height: int, width: int) -> tuple[float, ...]:
    """The same between -1 and 1 across the image."""
    xx, xy, x1, yx, yy, y1 = sampling_matrix(affine, height, width)
    # From -1..1 to pixels and back: x = (u + 1) * width / 2.
    xy, yx = xy * height / width, yx * width / height
    return xx, xy, 2 * x1 / width + xx + xy - 1, yx, yy, 2 * y1 / height + yy + yx - 1


def move_image(pixels: np.ndarray, movement: Movement) -> np.ndarray:
    """One image, uint8 (H, W, 3), by the cheapest way to its pixels."""
    height, width = pixels.shape[:2]
    affine, bicubic, fill = movement
    xx, xy, x1, yx, yy, y1 = sampling_matrix(affine, height, width)
    if (xx, xy, yx, yy) == (1, 0, 0, 1) and x1 == int(x1) and y1 == int(y1):
        return shift(pixels, int(x1), int(y1), fill)
    if (xx, yx, yy, y1) == (1, 0, 1, 0):
        return slide(pixels, xy * (np.arange(height) + 0.5) + x1, bicubic, fill)
    if (xx, xy, x1, yy) == (1, 0, 0, 1):
        turned = slide(transposed(pixels), yx * (np.arange(width) + 0.5) + y1, bicubic, fill)
        return transposed(turned)
    return sample(pixels, normalised_matrix(affine, height, width), bicubic, fill)


def is_rgb(pixels: np.ndarray) -> bool:
    """Whether the fast ways, which count on three bytes for a pixel, can be taken."""
    return pixels.dtype == np.uint8 and pixels.shape[2] == 3


def move_channels(pixels: np.ndarray, movement: Movement) -> np.ndarray:
    """One image, (H, W, C), uint8 or float32 between 0 and 255, whatever its channels are."""
    matrices = torch.tensor([normalised_matrix(movement.affine, *pixels.shape[:2])])
    fill = torch.tensor([movement.fill], dtype=torch.uint8)
    return move_together(torch.from_numpy(pixels)[None], matrices, int(not movement.bicubic), fill)[0].numpy()


def transposed(pixels: np.ndarray) -> np.ndarray:
    """Rows as columns: a third of numpy's time."""
    return np.array(Image.fromarray(pixels).transpose(Image.Transpose.TRANSPOSE))


def shift(pixels: np.ndarray, x: int, y: int, fill: tuple[int, ...]) -> np.ndarray:
    """By whole pixels: at each place what was so far to the right and below."""
    height, width = pixels.shape[:2]
    (top, bottom), (left, right) = (
        (min(max(-by, 0), side), max(min(side - by, side), 0)) for by, side in ((y, height), (x, width))
    )
    moved = np.empty_like(pixels)
    colour = np.tile(np.asarray(fill, dtype=np.uint8), width).reshape(width, 3)
    moved[:top], moved[bottom:] = colour, colour
    moved[top:bottom, :left], moved[top:bottom, right:] = colour[:left], colour[right:]
    moved[top:bottom, left:right] = pixels[top + y : bottom + y, left + x : right + x]
    return moved


def slide(pixels: np.ndarray, offsets: np.ndarray, bicubic: bool, fill: tuple[int, ...]) -> np.ndarray:
    """Each row along itself: at x what was at x + offset. A sixth of the time of sampling in two dimensions."""
    height, width = pixels.shape[:2]
    offsets = offsets.clip(-width - 2, width + 2)  # nothing of the image is left to see
    whole = np.floor(offsets)
    part = (offsets - whole).astype(np.float32)[:, None]
    whole = whole.astype(np.int64)
    # Rows with two more pixels on either side; further out is what lies outside, so whatever is there is overwritten.
    guard, stride = 3 * (width + 8), 3 * (width + 4)
    flat = np.zeros(2 * guard + height * stride, dtype=np.uint8)
    padded = flat[guard : guard + height * stride].reshape(height, width + 4, 3)
    padded[:, 2:-2], padded[:, :2], padded[:, -2:] = pixels, pixels[:, :1], pixels[:, -1:]
    start = guard + np.arange(height) * stride + 3 * (whole + 2)
    if not part.any():
        rows = windows(flat, start, 3 * width)
    elif bicubic:
        weights = cubic(part)
        taps = windows(flat, start - 3, 3 * (width + 3)).astype(np.float32)
        total = taps[:, :-9] * weights[0]
        for index, weight in enumerate(weights[1:], 1):
            total += taps[:, 3 * index : 3 * (index + width)] * weight
        total += SLACK
        rows = np.clip(total, 0, 255, out=total).astype(np.uint8)
    else:
        taps = windows(flat, start, 3 * (width + 1)).astype(np.float32)
        total = taps[:, 3:] - taps[:, :-3]
        total *= part
        total += taps[:, :-3]
        total += SLACK
        rows = total.astype(np.uint8)
    # Where a row begins and ends, by windows on one long row.
    first = np.ceil(-offsets - 0.5).astype(np.int64)
    start = 3 * (width + 4 - first)
    outside = np.tile(np.asarray(fill, dtype=np.uint8), 3 * (width + 4))
    outside[3 * (width + 4) : 3 * (2 * width + 4)] = 0
    inside = np.zeros_like(outside)
    inside[3 * (width + 4) : 3 * (2 * width + 4)] = 255
    rows &= windows(inside, start, 3 * width)
    rows |= windows(outside, start, 3 * width)
    return rows.reshape(height, width, 3)


def windows(flat: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """(len(starts), length): pieces of a long row, copied as such."""
    return torch.from_numpy(flat).unfold(0, length, 1).index_select(0, torch.from_numpy(starts)).numpy()


def cubic(part: np.ndarray) -> list[np.ndarray]:
    """Weights of the pixels at -1, 0, 1, 2 for a place between 0 and 1: torch's kernel, a = -0.75."""
    a, near, far = np.float32(-0.75), part, 1 - part

    def outer(x: np.ndarray) -> np.ndarray:  # at a distance of 1 to 2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    def inner(x: np.ndarray) -> np.ndarray:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    return [outer(near + 1), inner(near), inner(far), outer(far + 1)]


def sample(pixels: np.ndarray, matrix: tuple[float, ...], bicubic: bool, fill: tuple[int, ...]) -> np.ndarray:
    """By torch's interpolation, with numpy around it, whose comparisons and casts take a tenth of torch's time."""
    height, width = pixels.shape[:2]
    matrix = np.asarray(matrix, dtype=np.float32)
    x = ((np.arange(width) * 2 + 1) / width - 1).astype(np.float32)
    y = ((np.arange(height) * 2 + 1) / height - 1).astype(np.float32)[:, None]
    grid = np.empty((2, height, width), dtype=np.float32)
    for axis, (by_x, by_y, shift) in enumerate(matrix.reshape(2, 3)):
        np.add(by_x * x, by_y * y + shift, out=grid[axis])
    source = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    places = torch.from_numpy(grid).permute(1, 2, 0)[None]
    mode = "bicubic" if bicubic else "bilinear"
    moved = grid_sample(source, places, mode, padding_mode="border", align_corners=False)[0].numpy()
    moved += SLACK
    if bicubic:
        np.clip(moved, 0, 255, out=moved)
    planes = moved.astype(np.uint8)
    np.abs(grid, out=grid)
    inside = ((grid[0] <= 1) & (grid[1] <= 1)).view(np.uint8)
    result = np.empty_like(pixels)
    for channel, colour in enumerate(fill):
        plane = planes[channel]
        # 8 bits wrap around there and back.
        plane -= np.uint8(colour)
        plane *= inside
        plane += np.uint8(colour)
        result[..., channel] = plane
    return result


def move_together(pixels: torch.Tensor, matrices: torch.Tensor, bilinear: int, fill: torch.Tensor) -> torch.Tensor:
    """Many images, uint8 (B, H, W, 3), each in its own way, in as many launches as one; or (B, H, W, C) of float32.

    Args:
        matrices: normalised, float32 (B, 6).
        bilinear: so many images at the beginning are interpolated bilinearly, the others bicubically.
        fill: uint8, a level for each channel, (B, 3).
    """
    height, width = pixels.shape[1:3]
    by_x, by_y, shift = matrices.view(-1, 2, 3, 1, 1).unbind(2)  # each (B, 2, 1, 1)
    x, y = centres(width, pixels.device), centres(height, pixels.device)[:, None]
    grid = torch.addcmul(torch.addcmul(shift, by_y, y), by_x, x)  # (B, 2, H, W)
    source, places = pixels.permute(0, 3, 1, 2).float(), grid.permute(0, 2, 3, 1)
    parts = [
        grid_sample(source[part], places[part], mode, padding_mode="border", align_corners=False)
        for part, mode in ((slice(bilinear), "bilinear"), (slice(bilinear, None), "bicubic"))
        if len(source[part])
    ]
    moved = parts[0] if len(parts) == 1 else torch.cat(parts)
    if pixels.dtype == torch.uint8:
        moved = moved.add_(SLACK)
    moved = moved.clamp_(0, 255).to(pixels.dtype)
    outside = grid.abs().amax(1) > 1
    return torch.where(outside[..., None], fill[:, None, None], moved.permute(0, 2, 3, 1))


@functools.lru_cache(maxsize=16)
def centres(number: int, device: torch.device) -> torch.Tensor:
    """Where the pixels of a row are, from -1 to 1 across it."""
    return torch.linspace(1 / number - 1, 1 - 1 / number, number).to(device)
