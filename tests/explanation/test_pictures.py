"""Pictures, as far as they can be judged by numbers; the rest is for the eyes."""

import numpy as np
import pytest
from PIL import Image

from hf_poolformer.explanation.pictures import overlay


def test_heat_covers_and_the_unseen_is_dark():
    image = Image.new("RGB", (40, 20), (120, 120, 120))
    heat = np.full((20, 40), np.nan, dtype=np.float32)
    heat[:, 10:30] = np.linspace(0, 1, 20)
    pixels = np.asarray(overlay(image, heat)).astype(int)
    assert pixels.shape == (20, 40, 3)
    assert (pixels[:, 10] == 120).all(), "no heat leaves the image"
    assert (pixels[:, :10] < 50).all()
    assert (pixels[:, 30:] < 50).all()
    red, _, blue = pixels[10, 29]
    assert red > blue + 30, "the hottest is red"
    strength = np.abs(pixels[10, 10:30] - 120).sum(axis=-1)
    assert strength[5] > 20
    assert strength.argmin() == 0


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_images_of_other_modes(mode):
    assert overlay(Image.new(mode, (8, 8)), np.zeros((8, 8), dtype=np.float32)).mode == "RGB"
