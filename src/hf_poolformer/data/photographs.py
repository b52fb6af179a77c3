"""Real photographs that come with scikit-learn and scikit-image: nothing is downloaded."""

from __future__ import annotations

import functools
import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..foundation.errors import UserError


# In colour, of people, animals, things and places; both packages bring more, in grey or from a microscope.
NAMES = (
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "skimage/data/astronaut.png",
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/rocket.jpg",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/motorcycle_left.png",
)


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    """All that are installed, RGB, in the order of NAMES.

    Raises:
        UserError: neither package is there.
    """
    found = []
    for name in NAMES:
        package, _, path = name.partition("/")
        spec = importlib.util.find_spec(package)
        file = Path(spec.origin).parent / path if spec and spec.origin else None
        if file is not None and file.is_file():
            with Image.open(file) as image:
                photograph = image.convert("RGB")
            # Others ignore it, and conversions from camera colours are not what is measured.
            photograph.info.pop("icc_profile", None)
            found.append(photograph)
    if not found:
        raise UserError("no photographs: pip install 'hf-poolformer[benchmark]'")
    return tuple(found)


def resized(size: tuple[int, int], count: int) -> list[Image.Image]:
    """`count` photographs of `size` (width, height), repeated as often as need be, the later ones mirrored."""
    fitted = [ImageOps.fit(image, size, Image.Resampling.BICUBIC) for image in photographs()]
    return [
        ImageOps.mirror(fitted[i % len(fitted)]) if i // len(fitted) % 2 else fitted[i % len(fitted)]
        for i in range(count)
    ]


def jpegs(size: tuple[int, int], count: int, seed: int = 0) -> list[bytes]:
    """`count` different JPEG files of `size`: random crops of the photographs, at the quality of most of ImageNet."""
    generator = np.random.default_rng(seed)
    files = []
    for index in range(count):
        image = photographs()[index % len(photographs())]
        part = generator.uniform(0.6, 1.0)
        width, height = round(image.width * part), round(image.height * part)
        left, top = generator.integers(image.width - width + 1), generator.integers(image.height - height + 1)
        crop = image.crop((int(left), int(top), int(left) + width, int(top) + height))
        buffer = io.BytesIO()
        ImageOps.fit(crop, size, Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=90)
        files.append(buffer.getvalue())
    return files
