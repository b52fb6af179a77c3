"""Small grey pictures, and hashes of them that are alike for pictures that look alike."""

from __future__ import annotations

import numpy as np
from PIL import Image


SIDE = 32  # of a thumbnail
# Standard deviation, of 255 grey values, below which a picture shows nothing that could be compared.
FLAT = 2.0

_LOW = 8  # frequencies in each direction


def thumbnail_of(picture: Image.Image | np.ndarray) -> np.ndarray:
    """(SIDE, SIDE) uint8, grey, the whole picture.

    Args:
        picture: an image, or an array (height, width, channels) of values from 0 to 255.
    """
    if isinstance(picture, Image.Image):
        grey = picture.convert("L")
    else:
        grey = Image.fromarray(picture.mean(2, dtype=np.float32))
    small = grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(small) if grey.mode == "L" else np.asarray(small).round().clip(0, 255).astype(np.uint8)


def cosines(side: int, count: int) -> np.ndarray:
    """(count, side): the first basis vectors of the discrete cosine transform (type II), orthonormal."""
    basis = np.cos(np.pi * np.outer(np.arange(count), np.arange(side) + 0.5) / side) * np.sqrt(2 / side)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


_COSINES = cosines(SIDE, _LOW)


def perceptual_hash(thumbnail: np.ndarray) -> int | None:
    """64 bits: which of the lowest 8 x 8 frequencies are above their median, as the library ImageHash's `phash` does.

    None for a picture without contrast, whose frequencies are noise.
    """
    values = thumbnail.astype(np.float32)
    if values.std() < FLAT:
        return None
    low = _COSINES @ values @ _COSINES.T
    bits = low > np.median(low.ravel()[1:])  # the first is the brightness
    return int(np.packbits(bits).view(">u8")[0])
