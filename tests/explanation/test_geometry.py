"""Where a map lies on an image: what the processor shows, laid on the image, must be the image."""

import numpy as np
import pytest
from PIL import Image

from hf_poolformer import PoolFormerImageProcessor, PoolFormerImageProcessorPil
from hf_poolformer.explanation.geometry import lay_on_image, visible_region
from hf_poolformer.foundation.errors import UserError


def smooth(width, height):
    """Grey values that tell every place from every other, and survive resampling."""
    y, x = np.mgrid[:height, :width]
    return (90 * (x / width) + 90 * np.sin(3 * y / height) + 40).astype(np.float32)


PROCESSORS = {
    "v1": {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "crop_pct": 0.9},
    "no margin": {"size": {"shortest_edge": 96}, "crop_size": {"height": 96, "width": 96}, "crop_pct": 1.0},
    "squeezed": {"size": {"height": 96, "width": 128}, "crop_size": {"height": 96, "width": 128}, "crop_pct": None},
    "no crop": {"size": {"shortest_edge": 96}, "do_center_crop": False},
    "padded": {"size": {"shortest_edge": 64}, "crop_size": {"height": 96, "width": 96}, "crop_pct": 1.0},
    "crop only": {"do_resize": False, "crop_size": {"height": 64, "width": 64}},
}


@pytest.mark.parametrize("size", [(160, 160), (300, 120), (90, 250), (640, 427)])
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("kind", [PoolFormerImageProcessor, PoolFormerImageProcessorPil])
def test_what_the_model_saw_lies_where_it_is(kind, name, size):
    width, height = size
    values = smooth(width, height)
    processor = kind(**PROCESSORS[name], do_normalize=False, do_rescale=False)
    pixels = processor(Image.fromarray(values.astype(np.uint8)).convert("RGB"), return_tensors="np")["pixel_values"]
    region = visible_region(processor, height, width)
    laid = lay_on_image(np.asarray(pixels)[0, 0], region, height, width)
    assert laid.shape == (height, width)
    seen = ~np.isnan(laid)
    # Resampled twice and rounded to 8 bits; the edges of the region lie on whole pixels here and not in the processor.
    assert np.abs(laid[seen] - values[seen]).mean() < 1.5
    assert np.abs(laid[seen] - values[seen]).max() < 8
    expected = (region.right - region.left) * (region.bottom - region.top)
    assert seen.sum() == pytest.approx(expected, rel=0.03)


def test_the_region_of_the_centre_crop():
    processor = PoolFormerImageProcessor(crop_pct=0.875)
    region = visible_region(processor, 256, 512)  # shortest edge to 256: nothing is resized, and 224 are left
    assert region[:4] == (144, 16, 368, 240)
    assert region.scaled(0.5, 0.5)[:4] == (72, 8, 184, 120)


def test_a_processor_of_another_kind_is_refused():
    with pytest.raises(UserError, match="what object shows of an image is not known"):
        visible_region(object(), 10, 10)
