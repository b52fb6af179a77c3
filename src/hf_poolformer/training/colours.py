"""Colours that are changed, as Pillow does it: on one image on the CPU in numpy, on many on a device at once in torch.

Whatever maps each level of a channel to another one is a function of an array of levels: on the CPU it gets the image,
and for a device 0 to 255, which makes a table to look up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import avg_pool2d


LEVELS = np.arange(256, dtype=np.uint8)
# Pillow's luminance in 65536ths: products and sums of whole levels are exact in float32, in whatever order.
LUMINANCE = np.array([19595, 38470, 7471], dtype=np.float32) / 65536


def cut_off(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def posterize(levels: np.ndarray, bits: float) -> np.ndarray:
    """Keeps so many of the upper bits."""
    return levels & np.uint8(256 - 2 ** (8 - int(bits)))


def solarize(levels: np.ndarray, threshold: float) -> np.ndarray:
    """Inverts what is at least so bright."""
    if threshold > 255:
        return levels
    return levels ^ -(levels >= np.uint8(threshold)).view(np.uint8)


def solarize_add(levels: np.ndarray, amount: float) -> np.ndarray:
    """Brightens the dark half of the scale, by 128 at most."""
    return levels + (levels < 128).view(np.uint8) * np.uint8(amount)


def brightness(levels: np.ndarray, amount: float) -> np.ndarray:
    return cut_off(levels * np.float32(amount))


def contrast(pixels: np.ndarray, amount: float) -> np.ndarray:
    """One image, uint8 (H, W, 3), towards or away from its mean luminance."""
    height, width = pixels.shape[:2]
    values = pixels.reshape(height, -1).astype(np.float32)
    # Column by column whole numbers below 2**24: exact.
    sums = (np.ones(height, dtype=np.float32) @ values).reshape(width, 3).sum(0, dtype=np.float64)
    mean = np.float32(np.floor(sums @ LUMINANCE.astype(np.float64) / (height * width) + 0.5))
    values -= mean
    values *= np.float32(amount)
    values += mean
    return cut_off(values).reshape(pixels.shape)


def autocontrast(pixels: np.ndarray, amount: float = 0.0) -> np.ndarray:
    """Each channel stretched to 0 to 255."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    low = rows.min(0).reshape(width, 3).min(0).astype(np.float32)
    high = rows.max(0).reshape(width, 3).max(0).astype(np.float32)
    span = high - low
    flat = span == 0
    low[flat], span[flat] = 0, 255
    # Whole numbers divided once: cut off right.
    values = rows - np.tile(low, width)
    values *= np.float32(255)
    values /= np.tile(span, width)
    return values.astype(np.uint8).reshape(pixels.shape)


def equalize(pixels: np.ndarray, amount: float = 0.0) -> np.ndarray:
    return np.array(ImageOps.equalize(Image.fromarray(pixels)))


def blend(values: np.ndarray, other: np.ndarray, amount: float) -> np.ndarray:
    """`other` + amount * (values - other), cut off and rounded down, as in Pillow's enhancements; changes `values`."""
    values -= other
    values *= np.float32(amount)
    values += other
    return cut_off(values)


def saturation(pixels: np.ndarray, amount: float) -> np.ndarray:
    values = pixels.astype(np.float32)
    grey = values.reshape(-1, 3) @ np.tile(LUMINANCE[:, None], 3)  # three times, for each channel
    grey += np.float32(0.5)
    return blend(values, np.floor(grey, out=grey).reshape(pixels.shape), amount)


def sharpness(pixels: np.ndarray, amount: float) -> np.ndarray:
    height, width = pixels.shape[:2]
    values = pixels.reshape(height, -1).astype(np.float32)
    smooth = values.copy()
    if min(height, width) >= 3:
        # 1 1 1, 1 5 1, 1 1 1 in thirteenths, rounded. The outermost pixels lack neighbours and stay.
        whole = pixels.reshape(height, -1).astype(np.uint16)
        rows = whole[:-2] + whole[1:-1]
        rows += whole[2:]
        sums = rows[:, :-6] + rows[:, 3:-3]
        sums += rows[:, 6:]
        sums += 4 * whole[1:-1, 3:-3]
        sums += 6
        sums //= 13
        smooth[1:-1, 3:-3] = sums
    return blend(values, smooth, amount).reshape(pixels.shape)


class Constants(NamedTuple):
    """What `apply_together` needs on a device each time, so that nobody computes it anew.

    Attributes:
        starts: where the tables of each image's channels begin, int32 (N, 1, 1, 3), and int64 the same.
        levels: 0 to 255, float32.
        one: float64 (1,).
        sums: float64 (256, 513): counts of levels times this are how many pixels are at most as bright as each level,
            how many are darker, and the sum of all.
        luminance: of red, green and blue, float32 (3,), and float64 the same.
    """

    starts: torch.Tensor
    long_starts: torch.Tensor
    levels: torch.Tensor
    one: torch.Tensor
    sums: torch.Tensor
    luminance: torch.Tensor
    long_luminance: torch.Tensor

    @classmethod
    def of(cls, pixels: torch.Tensor) -> Constants:
        """For at least so many images, on their device."""
        return make_constants(1 << (len(pixels) - 1).bit_length(), pixels.device)


@functools.lru_cache(maxsize=8)
def make_constants(number: int, device: torch.device) -> Constants:
    starts = torch.arange(0, 768 * number, 256, dtype=torch.int64).view(-1, 1, 1, 3)
    levels, ones = torch.arange(256, dtype=torch.float64), torch.ones(256, 256, dtype=torch.float64)
    sums = torch.cat([ones.triu(), ones.triu(1), levels[:, None]], 1)
    luminance = torch.from_numpy(LUMINANCE)
    values = (starts.int(), starts, levels.float(), ones[0, :1].clone(), sums, luminance, luminance.double())
    return Constants(*(value.to(device) for value in values))


def look_up(pixels: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) by a table for each image and channel, uint8 (B, 3, 256)."""
    index = pixels + Constants.of(pixels).starts[: len(pixels)]
    return tables.view(-1).index_select(0, index.view(-1)).view(pixels.shape)


def measured_tables(pixels: torch.Tensor, kinds: Sequence[int], amounts: torch.Tensor) -> torch.Tensor:
    """Tables (B, 3, 256) that depend on the image, uint8 (B, H, W, 3).

    Args:
        kinds: how many images get contrast, how many behind them autocontrast, and the rest equalize.
        amounts: those of contrast at the beginning, float32 (B, 1, 1).
    """
    contrasted, stretched, equalized = kinds
    number, total = len(pixels), pixels.shape[1] * pixels.shape[2]
    constants = Constants.of(pixels)
    levels, tables = constants.levels, []
    if contrasted or equalized:
        index = (pixels + constants.long_starts[:number]).view(-1)
        counts = torch.zeros(768 * number, dtype=torch.float64, device=pixels.device)
        counts = counts.scatter_add_(0, index, constants.one.expand(index.shape)).view(number, 3, 256)
        # Whole numbers below 2**53, and no other kind of product than of doubles: exact.
        running, darker, sums = (counts @ constants.sums).split([256, 256, 1], -1)
    if contrasted:
        # v -> (v - mean) * amount + mean.
        mean = (
            (sums[:contrasted, :, 0] @ constants.long_luminance).div_(total).add_(0.5).floor_().float()[:, None, None]
        )
        tables.append((levels - mean).mul_(amounts[:contrasted]).add_(mean).expand(-1, 3, -1))
    if stretched:
        # v -> (v - low) * 255 / span.
        low, high = pixels[contrasted : contrasted + stretched].view(stretched, total, 3).aminmax(dim=1)
        span = high - low
        flat = span == 0
        low.masked_fill_(flat, 0)
        span.masked_fill_(flat, 255)
        tables.append((levels - low[..., None]).mul_(255).div_(span[..., None]))
    if equalized:
        # As in Pillow: a step is what a level would hold if all but the brightest were spread evenly.
        running, darker = running[-equalized:], darker[-equalized:]
        step = (running * (running < total)).amax(-1, keepdim=True).div_(255, rounding_mode="floor")
        even = step.div(2, rounding_mode="floor").add(darker).div_(step)
        tables.append(torch.where(step == 0, levels, even.float()))
    return torch.cat(tables).clamp_(0, 255).to(torch.uint8)


def enhance_together(pixels: torch.Tensor, saturated: int, amounts: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3): saturation of so many images at the beginning, sharpness of the others.

    Args:
        amounts: float32 (B, 1, 1, 1).
    """
    values = pixels.float()
    other = values.clone()
    if saturated:
        # Exact, in whatever order; no product of matrices, which GPUs may round.
        grey = (values[:saturated] * Constants.of(pixels).luminance).sum(-1, keepdim=True)
        other[:saturated] = grey.add_(0.5).floor_()
    if saturated < len(values) and min(values.shape[1:3]) >= 3:
        whole = values[saturated:]
        # 1 1 1, 1 5 1, 1 1 1 in thirteenths.
        sums = avg_pool2d(whole.permute(0, 3, 1, 2), 3, stride=1, divisor_override=1).permute(0, 2, 3, 1)
        sums.add_(whole[:, 1:-1, 1:-1], alpha=4)
        other[saturated:, 1:-1, 1:-1] = sums.div_(13).round_()
    return torch.addcmul(other, values.sub_(other), amounts).clamp_(0, 255).to(torch.uint8)
