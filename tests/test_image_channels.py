"""The image processors for one, two, four and more channels, against the formula of bicubic resampling."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from hf_poolformer import PoolFormerImageProcessor, PoolFormerImageProcessorPil


BOTH = pytest.mark.parametrize("kind", [PoolFormerImageProcessor, PoolFormerImageProcessorPil])
SIZE = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "crop_pct": 0.9}
RESIZED, CROP = 26, 24  # floor(24 / 0.9)


def noise(*shape: int, dtype=np.uint8) -> np.ndarray:
    generator = np.random.default_rng(0)
    if dtype == np.float32:
        return generator.random(shape, dtype=np.float32)
    return generator.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def bicubic(length: int, resized: int) -> np.ndarray:
    """(resized, length): the weights of Keys' kernel (a = -0.5), widened where the image shrinks."""
    scale = length / resized
    width = max(scale, 1.0)
    centres = (np.arange(resized)[:, None] + 0.5) * scale
    x = np.abs(np.arange(length) + 0.5 - centres) / width
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


def expected(planes: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
    """Each channel (H, W), with white at 255, resized along one axis and the other, cropped and normalised."""
    height, width = planes.shape[1:]
    rows, columns = bicubic(height, RESIZED), bicubic(width, int(RESIZED * width / height))
    made = []
    for plane, m, s in zip(planes, mean, std, strict=True):
        resized = (rows @ (plane @ columns.T).clip(0, 255)).clip(0, 255)
        top, left = (round((side - CROP) / 2) for side in resized.shape)
        made.append((resized[top : top + CROP, left : left + CROP] / 255 - m) / s)
    return np.stack(made)


@BOTH
@pytest.mark.parametrize("number", [1, 2, 4, 5, 12])
@pytest.mark.parametrize(("dtype", "levels"), [(np.uint8, 1.5), (np.uint16, 0.01)])
def test_every_channel_by_itself(kind, number, dtype, levels):
    """8 bits are rounded after each of two passes, which costs up to a level and a half; wider pixels keep all."""
    mean, std = np.linspace(0.2, 0.6, number).tolist(), np.linspace(0.1, 0.3, number).tolist()
    pixels = noise(50, 70, number, dtype=dtype)
    processor = kind(num_channels=number, image_mean=mean, image_std=std, **SIZE)
    planes = pixels.transpose(2, 0, 1).astype(np.float64) * (255 / np.iinfo(dtype).max)
    right = expected(planes, mean, std)
    for given in (pixels, np.ascontiguousarray(pixels.transpose(2, 0, 1)), torch.from_numpy(pixels)):
        made = processor(given, return_tensors="pt")["pixel_values"][0].numpy()
        error = np.abs(made - right) * np.array(std)[:, None, None] * 255
        assert error.max() < levels


@BOTH
def test_saved_and_loaded(kind, tmp_path):
    kind(num_channels=5, image_mean=[0.1] * 5, image_std=[0.2] * 5, **SIZE).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert loaded.num_channels == 5 and list(loaded.image_mean) == [0.1] * 5
    assert loaded(noise(40, 30, 5), return_tensors="pt")["pixel_values"].shape == (1, 5, 24, 24)
    assert "num_channels" not in PoolFormerImageProcessor().to_dict()  # that of RGB is transformers' own


def test_statistics_are_imagenets_average():
    processor = PoolFormerImageProcessor(num_channels=2)
    assert np.allclose(processor.image_mean, [0.449] * 2) and np.allclose(processor.image_std, [0.226] * 2)
    with pytest.raises(ValueError, match="image_mean has 3 values, but num_channels is 4"):
        PoolFormerImageProcessor(num_channels=4, image_mean=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="whole, positive"):
        PoolFormerImageProcessor(num_channels=0)


@BOTH
def test_grey_of_colours_is_their_luma(kind):
    processor = kind(num_channels=1, do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    colours = noise(20, 30, 3)
    luma = np.asarray(Image.fromarray(colours).convert("L"))
    for given in (Image.fromarray(colours), colours, colours.transpose(2, 0, 1)):
        assert np.array_equal(processor(given, return_tensors="np")["pixel_values"][0, 0], luma)
    wide = noise(20, 30, dtype=np.uint16)
    made = processor(Image.fromarray(wide), return_tensors="np")["pixel_values"][0, 0]
    assert np.allclose(made, wide / 257, rtol=1e-6)  # not rounded to 8 bits
    inverted = ImageOps.invert(Image.fromarray(luma))
    assert np.array_equal(processor(inverted, return_tensors="np")["pixel_values"][0, 0], 255 - luma)


@BOTH
def test_alpha_is_a_channel(kind):
    processor = kind(num_channels=4, do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    pixels = noise(20, 30, 4)
    made = processor(Image.fromarray(pixels, "RGBA"), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(made, pixels.transpose(2, 0, 1))


@BOTH
@pytest.mark.parametrize(
    ("number", "image", "message"),
    [
        (4, Image.new("RGB", (30, 30)), r"3 channels \(RGB\), and the model takes 4"),
        (4, Image.new("CMYK", (30, 30)), r"4 channels \(CMYK\)"),
        (2, Image.new("L", (30, 30)), r"1 channel \(L\)"),
        (4, np.zeros((30, 20, 5), np.uint8), "no axis is one of 4 channels"),
        (4, np.zeros((4, 20, 4), np.uint8), "the first and the last axis may be the 4 channels"),
        (4, np.zeros((30, 30), np.uint8), "1 channels"),
        (2, np.zeros((2, 30, 30), np.int16), "int16, of which nobody can tell what is white"),
        (2, np.full((2, 30, 30), np.nan, np.float32), "not finite"),
    ],
)
def test_refused(kind, number, image, message):
    with pytest.raises(ValueError, match=message):
        kind(num_channels=number, **SIZE)(image, return_tensors="pt")


def test_the_axis_may_be_said():
    processor = PoolFormerImageProcessor(num_channels=4, do_resize=False, do_center_crop=False, do_normalize=False)
    pixels = noise(4, 20, 4)
    first = processor(pixels, input_data_format="channels_first", return_tensors="np")["pixel_values"][0]
    last = processor(pixels, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    assert np.allclose(first * 255, pixels) and np.allclose(last * 255, pixels.transpose(2, 0, 1))
