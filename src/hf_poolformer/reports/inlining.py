"""Images small enough that a page can hold hundreds: as `data:` addresses."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from ..image_pixels import pil_to_rgb


__all__ = ["Inlined", "shrink"]

# Of JPEG and WebP, for images as small as these.
QUALITY = 72


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
    image = pil_to_rgb(image)
    longest = max(image.size)
    width, height = (max(round(length * side / longest), 1) for length in image.size)
    small = image.copy()
    small.thumbnail((2 * side, 2 * side), Image.Resampling.LANCZOS)
    name, data = min(encoded(small), key=lambda pair: len(pair[1]))
    address = f"data:image/{name};base64,{base64.b64encode(data).decode()}"
    return Inlined(address, width, height, pixelated=longest < side)


def encoded(image: Image.Image) -> list[tuple[str, bytes]]:
    options = {"jpeg": {"quality": QUALITY, "optimize": True}, "webp": {"quality": QUALITY}, "png": {"optimize": True}}
    found = []
    for name, option in options.items():
        file = io.BytesIO()
        image.save(file, name, **option)
        found.append((name, file.getvalue()))
    return found
