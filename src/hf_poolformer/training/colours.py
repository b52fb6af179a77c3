"""Colours that are changed, as Pillow does it: on one image on the CPU in numpy, on many on a device at once in torch.

Whatever maps each level of a channel to another one is a function of an array of levels: on the CPU it gets the image,
and for a device 0 to 255, which makes a table to look up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps


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


def look_up(pixels: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) by a table for each image and channel, uint8 (B, 3, 256)."""
    index = pixels + table_starts(pixels)
    return tables.flatten().index_select(0, index.flatten()).view(pixels.shape)


def table_starts(pixels: torch.Tensor) -> torch.Tensor:
    """Where the tables of each image's channels begin, int32 (B, 1, 1, 3)."""
    end = 768 * len(pixels)
    return torch.arange(0, end, 256, dtype=torch.int32, device=pixels.device).view(-1, 1, 1, 3)


def measured_tables(pixels: torch.Tensor, kinds: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Tables (B, 3, 256) that depend on the image, uint8 (B, H, W, 3).

    Args:
        kinds: (B, 1, 1) 0: contrast, 1: autocontrast, 2: equalize.
        amounts: those of contrast, float32 (B, 1, 1).
    """
    number, total = len(pixels), pixels.shape[1] * pixels.shape[2]
    index = (pixels + table_starts(pixels)).flatten().long()
    counts = torch.zeros(768 * number, dtype=torch.int64, device=pixels.device)
    counts = counts.scatter_add_(0, index, torch.ones_like(counts[:1]).expand(index.shape)).view(number, 3, 256)
    levels = torch.arange(256, device=pixels.device)
    running = counts.cumsum(-1)
    low = (running == 0).sum(-1, keepdim=True)
    high = (running < total).sum(-1, keepdim=True)
    # Equalize, as in Pillow: a step is what a level would hold if all but the brightest were spread evenly.
    step = (total - counts.gather(-1, high)).div_(255, rounding_mode="floor")
    even = running.sub_(counts).add_(step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    even = torch.where(step == 0, levels, even)
    # Contrast: v -> (v - mean) * amount + mean; autocontrast: v -> (v - low) * 255 / span.
    sums = (counts * levels).sum(-1, keepdim=True).double()
    weights = LUMINANCE.astype(np.float64) / total
    red, green, blue = sums.unbind(1)
    mean = (red * weights[0]).add_(green, alpha=weights[1]).add_(blue, alpha=weights[2])
    mean = mean.add_(0.5).floor_().float()[:, None]
    stretched = kinds == 1
    flat = high == low
    pivot = torch.where(stretched, torch.where(flat, 0, low), mean)
    divisor = torch.where(stretched & ~flat, high - low, torch.where(stretched, 255, 1))
    linear = (levels - pivot) * torch.where(stretched, 255, amounts) / divisor
    linear = linear.add_(torch.where(stretched, 0, mean)).clamp_(0, 255)
    return torch.where(kinds == 2, even.to(torch.uint8), linear.to(torch.uint8))


def enhance_together(pixels: torch.Tensor, saturated: int, amounts: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3): saturation of so many images at the beginning, sharpness of the others.

    Args:
        amounts: float32 (B, 1, 1, 1).
    """
    values = pixels.float()
    others: list[Any] = []
    if saturated:
        red, green, blue = values[:saturated].unbind(-1)
        weights = LUMINANCE.tolist()
        grey = (red * weights[0]).add_(green, alpha=weights[1]).add_(blue, alpha=weights[2]).add_(0.5).floor_()
        others.append(grey[..., None].expand(values[:saturated].shape))
    if saturated < len(values):
        whole = values[saturated:]
        smooth = whole.clone()
        if min(whole.shape[1:3]) >= 3:
            inner = whole[:, 1:-1, 1:-1]
            rows = whole[:, :-2] + whole[:, 1:-1] + whole[:, 2:]
            sums = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]).add_(inner, alpha=4)
            smooth[:, 1:-1, 1:-1] = sums.div_(13).round_()
        others.append(smooth)
    other = torch.cat(others)
    return torch.addcmul(other, values.sub_(other), amounts).clamp_(0, 255).to(torch.uint8)
