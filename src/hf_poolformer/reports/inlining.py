"""Images small enough that a page can hold hundreds: as `data:` addresses."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image, features

from ..image_pixels import pil_to_rgb


__all__ = ["Inlined", "shrink"]

# Of JPEG and WebP: the first whose file is small enough, or the last.
QUALITIES = (72, 50, 30)
# Bytes that an image may have, by its pixels and at least: photographs need less, noise and gravel more.
PER_PIXEL, AT_LEAST = 0.2, 2000


@dataclass
class Inlined:
    """
    Attributes:
        address: `data:image/...`.
        width, height: on the page, in CSS pixels.
        pixelated: it is smaller than it is shown, and its pixels are to be seen.
    """

    address: str
    width: int
    height: int
    pixelated: bool


def shrink(image: Image.Image, side: int) -> Inlined:
    """An image of any mode, its longest side at most twice `side`, in whichever format is the smallest.

    Args:
        side: the longest on the page, in CSS pixels.
    """
    longest = max(image.size)
    width, height = (max(round(length * side / longest), 1) for length in image.size)
    small = pil_to_rgb(image).copy()
    small.thumbnail((2 * side, 2 * side), Image.Resampling.LANCZOS)
    for quality in QUALITIES:
        name, data = min(encoded(small, quality), key=lambda pair: len(pair[1]))
        if len(data) <= max(PER_PIXEL * small.width * small.height, AT_LEAST):
            break
    address = f"data:image/{name};base64,{base64.b64encode(data).decode()}"
    return Inlined(address, width, height, pixelated=longest < side)


def encoded(image: Image.Image, quality: int) -> list[tuple[str, bytes]]:
    """The file in each format that may be the smallest: (format, bytes)."""
    options = {"jpeg": {"quality": quality, "optimize": True}}
    if features.check("webp"):
        options["webp"] = {"quality": quality}
    if image.getcolors(256):  # a drawing
        options["png"] = {"optimize": True}
    found = []
    for name, option in options.items():
        file = io.BytesIO()
        image.save(file, name, **option)
        found.append((name, file.getvalue()))
    return found
