import base64
import copy
import io
import itertools
import json
import logging
import math
import os
import pathlib
import pickle
import socket
import subprocess

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.poolformer.image_processing_pil_poolformer import (
    PoolFormerImageProcessorPil as BuiltinImageProcessorPil,
)
from transformers.models.poolformer.image_processing_poolformer import (
    PoolFormerImageProcessor as BuiltinImageProcessor,
)
from warm import warm_python

from hf_poolformer.image_processing_poolformer import PoolFormerImageProcessor, PoolFormerImageProcessorPil


BACKENDS = [PoolFormerImageProcessor, PoolFormerImageProcessorPil]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(375, 500), (500, 375), (333, 517), (224, 224), (97, 61), (30, 19), (2, 3), (801, 1200), (700, 217)]

both = pytest.mark.parametrize("backend", BACKENDS, ids=["torchvision", "pil"])


def picture(height, width, noise=20.0, seed=0):
    """A smooth pattern with noise: edges would hide a shift, and noise alone would be all clipping."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack(
        [128 + 90 * np.sin(x / 17 + y / 31), 128 + 90 * np.cos(x / 9), 128 + 90 * np.sin(y / 7)], axis=-1
    )
    noisy = smooth + np.random.default_rng(seed).normal(0, noise, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def official(image, size=224, crop_pct=0.9):
    transform = T.Compose(
        [
            T.Resize(math.floor(size / crop_pct), T.InterpolationMode.BICUBIC),
            T.CenterCrop(size),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )
    return transform(image)


def levels(a, b):
    """Largest difference of two normalised images, in levels of 255."""
    return ((a - b).abs() * torch.tensor(STD)[:, None, None] * 255).max().item()


def process(backend, image, **kwargs):
    return backend()(image, return_tensors="pt", **kwargs)["pixel_values"]


@both
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_equals_official_transform(backend, shape):
    image = picture(*shape)
    result = process(backend, image)
    assert result.shape == (1, 3, 224, 224) and result.dtype == torch.float32
    assert levels(result[0], official(image)) < 2.01


@both
@pytest.mark.parametrize("size, crop_pct", [(224, 0.95), (384, 1.0), (224, 0.875), (256, 0.9), (63, 0.7), (32, 1.1)])
def test_equals_official_transform_at_other_crops(backend, size, crop_pct):
    image = picture(211, 307)
    result = process(backend, image, size=size, crop_size=size, crop_pct=crop_pct)
    assert levels(result[0], official(image, size, crop_pct)) < 2.01


@both
def test_most_pixels_are_exact(backend):
    image = picture(375, 500)
    difference = (process(backend, image)[0] - official(image)).abs() * torch.tensor(STD)[:, None, None] * 255
    assert (difference > 0.01).float().mean() < 0.01


@pytest.mark.parametrize("crop_pct", [0.9, 0.95, 1.0, 0.7, 0.35])
def test_resized_edge_is_timms(crop_pct):
    timm_data = pytest.importorskip("timm.data")
    from hf_poolformer.image_processing_poolformer import resized_size

    for size in range(32, 513, 7):
        transform = timm_data.create_transform(size, crop_pct=crop_pct, interpolation="bicubic")
        processor = PoolFormerImageProcessor(size=size, crop_size=size, crop_pct=crop_pct)
        assert resized_size(900, 900, processor.size, crop_pct) == (transform.transforms[0].size,) * 2


@both
def test_pillow_13_does_not_change_tall_images(backend):
    """Pillow 13 resamples columns first where an image is tall; the numbers stay those of rows first."""
    image = picture(2000, 300, noise=60)
    height = int(248 * 2000 / 300)
    resized = image.resize((248, 2000), Image.Resampling.BICUBIC).resize((248, height), Image.Resampling.BICUBIC)
    assert levels(process(backend, image)[0], official(resized, 224, 224 / 248)) < 2.01


@pytest.mark.parametrize("shape", [*SIZES, (1, 1), (1, 900), (2000, 300)], ids=str)
def test_backends_agree(shape):
    image = picture(*shape, noise=60)
    results = [process(backend, image)[0] for backend in BACKENDS]
    assert levels(*results) < 2.01


@pytest.mark.parametrize("resample", Image.Resampling, ids=lambda resample: resample.name)
@pytest.mark.parametrize(
    "shape, size", [((143, 201), 224), ((61, 84), 60), ((84, 61), 150), ((256, 300), 32)], ids=str
)
def test_every_filter_is_pillows(resample, shape, size):
    """61 and 84 to 66 and 90 pixels: NEAREST meets pixels that lie exactly between two."""
    image = picture(*shape)
    edge = math.floor(size / 0.9)
    resized = (
        (edge, int(edge * shape[1] / shape[0])) if shape[0] < shape[1] else (int(edge * shape[0] / shape[1]), edge)
    )
    # Rows first in every release of Pillow
    expected = image.resize((resized[1], shape[0]), resample).resize((resized[1], resized[0]), resample)
    expected = T.Compose([T.CenterCrop(size), T.ToTensor(), T.Normalize(MEAN, STD)])(expected)
    # What torch has is torch's, and what it has not is Pillow's
    exact = resample in (Image.Resampling.NEAREST, Image.Resampling.BOX, Image.Resampling.HAMMING)
    settings = {"size": size, "crop_size": size, "resample": resample}
    values = np.array(image)
    for backend in BACKENDS:
        for given in (image, values, torch.from_numpy(values)):
            assert levels(process(backend, given, **settings)[0], expected) < (0.01 if exact else 2.01)
        # Floats are not rounded between the two directions
        for given in (values.astype(np.float32), torch.from_numpy(values).float()):
            assert levels(process(backend, given, **settings)[0], expected) < 2.01


@both
@pytest.mark.parametrize("resample", Image.Resampling, ids=lambda resample: resample.name)
@pytest.mark.parametrize("shape", [(5, 200), (200, 5), (700, 31)], ids=str)
def test_what_nobody_sees_of_a_strip_has_no_part_in_it(backend, resample, shape):
    """Of more than 16 times the window, only the window is resampled, with all that the filter reaches."""
    image = picture(*shape, noise=60)
    short, long = 10, 10 * max(shape) // min(shape)
    resized = (long, short) if shape[0] > shape[1] else (short, long)
    expected = image.resize((resized[1], shape[0]), resample).resize((resized[1], resized[0]), resample)
    expected = T.Compose([T.CenterCrop(10), T.ToTensor(), T.Normalize(MEAN, STD)])(expected)
    result = process(backend, image, size=10, crop_size=10, crop_pct=None, resample=resample)
    assert levels(result[0], expected) < 2.01


@both
@pytest.mark.parametrize("name", ["NEAREST_EXACT", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS"])
def test_a_filter_has_many_names(backend, name, tmp_path):
    image = picture(61, 84)
    filter_ = getattr(Image.Resampling, name.removesuffix("_EXACT"))
    expected = process(backend, image, size=60, crop_size=60, resample=filter_)
    for given in (int(filter_), getattr(T.InterpolationMode, name), filter_.name, filter_.name.lower()):
        assert torch.equal(process(backend, image, size=60, crop_size=60, resample=given), expected)
        processor = backend(size=60, crop_size=60, resample=given)
        processor.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "preprocessor_config.json").read_text())["resample"] == int(filter_)
        assert torch.equal(backend.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values, expected)


@both
@pytest.mark.parametrize("resample", [99, -1, True, "cubic", 1.5, [3], T.InterpolationMode.NEAREST], ids=str)
def test_no_filter_is_guessed(backend, resample):
    with pytest.raises(ValueError, match="resample must be one of Pillow's filters, nearest"):
        backend(resample=resample)
    with pytest.raises(ValueError, match="resample must be one of Pillow's filters, nearest"):
        process(backend, picture(20, 20), resample=resample)


@pytest.mark.parametrize(
    "resample", [Image.Resampling.BOX, Image.Resampling.HAMMING, Image.Resampling.LANCZOS], ids=str
)
def test_filters_on_an_accelerator_are_pillows(resample):
    """A device that torch cannot resample on for these: the pixels take the way through Pillow and come back."""
    image = picture(61, 84)
    processor = PoolFormerImageProcessor()
    geometry = processor._geometry(61, 84, True, SizeDict(shortest_edge=60), 0.9, True, SizeDict(height=60, width=60))
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    result = processor._window(PretendsToBeElsewhere(planes[None]), geometry, resample, 255.0)
    resized = image.resize((90, 61), resample).resize((90, 66), resample)
    assert torch.equal(result[0], T.CenterCrop(60)(torch.from_numpy(np.array(resized)).permute(2, 0, 1)))


@both
def test_floats_follow_the_eight_bit_transform(backend):
    image = picture(97, 61, noise=60)
    values = np.asarray(image, dtype=np.float32)
    for result in (process(backend, values), process(backend, values / 255, do_rescale=False)):
        assert levels(result[0], official(image)) < 2.01


@both
def test_a_strip_does_not_explode(backend):
    """1 x 30000 pixels would be 248 x 7.4 million after the official resize."""
    image = Image.fromarray(np.tile(np.array([[[10, 120, 250]]], dtype=np.uint8), (1, 30000, 1)))
    result = process(backend, image)
    assert result.shape == (1, 3, 224, 224)
    assert levels(result[0], official(Image.new("RGB", (9, 9), (10, 120, 250)))) < 1.01


# Modes and layouts ---------------------------------------------------------------------------------------------------


def as_mode(image, mode):
    if mode == "P with transparency":
        palette = image.quantize(64)
        palette.info["transparency"] = bytes(range(64))
        return palette
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(
            Image.fromarray(
                np.linspace(0, 255, image.width * image.height).astype(np.uint8).reshape(image.height, image.width)
            )
        )
        return image
    return image.convert(mode)


@both
@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_modes_are_converted_as_the_official_code_does(backend, mode):
    image = as_mode(picture(61, 83), mode)
    assert levels(process(backend, image)[0], official(image.convert("RGB"))) < 2.01


@both
@pytest.mark.parametrize("mode", ["LA", "P with transparency", "RGBA"])
def test_alpha_is_composited_where_the_official_code_drops_it(backend, mode):
    image = as_mode(picture(61, 83), mode)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    on_white = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    assert levels(process(backend, image)[0], official(on_white)) < 2.01


@both
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F", "F unit"])
def test_sixteen_bits_are_scaled_not_clipped(backend, mode):
    gray = np.asarray(picture(61, 83).convert("L"))
    scale, dtype = {
        "I;16": (257, "<u2"),
        "I;16B": (257, ">u2"),
        "I": (257, np.int32),
        "F": (1, np.float32),
        "F unit": (1 / 255, np.float32),
    }[mode]
    values = (gray.astype(np.float64) * scale).astype(dtype)
    image = Image.frombytes("I;16B", (83, 61), values.tobytes()) if mode == "I;16B" else Image.fromarray(values)
    assert image.mode == mode.split()[0]
    assert levels(process(backend, image)[0], official(Image.fromarray(gray).convert("RGB"))) < 2.01


@both
@pytest.mark.parametrize("mode", ["I", "F"])
def test_eight_bits_in_wide_modes_stay(backend, mode):
    image = picture(61, 83).convert("L")
    assert levels(process(backend, image.convert(mode))[0], official(image.convert("RGB"))) < 2.01


@both
def test_pixels_of_unknown_range_are_refused(backend):
    with pytest.raises(ValueError, match="cannot tell what is white"):
        backend()(Image.fromarray(np.full((8, 8), -5, dtype=np.int32)))
    with pytest.raises(ValueError, match="cannot tell what is white"):
        backend()(np.full((8, 8, 3), 100_000))
    with pytest.raises(ValueError, match="not finite"):
        backend()(np.full((8, 8, 3), np.nan))


@both
def test_arrays_and_tensors_of_any_layout(backend):
    image = picture(61, 83)
    expected = process(backend, image)
    last = np.array(image)
    first = np.ascontiguousarray(last.transpose(2, 0, 1))
    alpha = np.concatenate([last, np.full_like(last[..., :1], 255)], axis=-1)
    read_only = last.copy()
    read_only.flags.writeable = False
    for array in (
        last,
        first,
        alpha,
        read_only,
        torch.from_numpy(last),
        torch.from_numpy(first),
        last.astype(np.int64),
        last.astype(np.uint16) * 257,
        last.astype(">u2") * 257,
        np.ascontiguousarray(last[::-1, :, ::-1])[::-1, :, ::-1],
        torch.from_numpy(first).float(),
        torch.from_numpy(first).double(),
        torch.from_numpy(first).half(),
    ):
        assert levels(process(backend, array)[0], expected[0]) < 1.1


@both
def test_gray_arrays(backend):
    gray = picture(61, 83).convert("L")
    expected = official(gray.convert("RGB"))
    array = np.array(gray)
    for values in (array, array[..., None], array[None], torch.from_numpy(array)):
        assert levels(process(backend, values)[0], expected) < 2.01
    mask = np.asarray(gray) > 128
    assert levels(process(backend, mask)[0], official(Image.fromarray(mask).convert("RGB"))) < 2.01


@both
def test_ambiguous_layout(backend):
    """One row of RGB pixels is no gray image of width 3, unless the caller says so."""
    row = np.random.default_rng(0).integers(0, 256, (1, 7, 3), dtype=np.uint8)
    expected = process(backend, Image.fromarray(row))
    torch.testing.assert_close(process(backend, row), expected)
    gray = process(backend, row, input_data_format="channels_first")
    torch.testing.assert_close(gray, process(backend, row[0]))


@both
def test_keeps_channels_on_demand(backend):
    image = picture(61, 83)
    kwargs = {"do_convert_rgb": False, "image_mean": 0.5, "image_std": 0.5}
    assert process(backend, image.convert("L"), **kwargs).shape == (1, 1, 224, 224)
    assert process(backend, image.convert("RGBA"), **kwargs).shape == (1, 4, 224, 224)
    with pytest.raises(ValueError, match="image_mean has 3 values, but the image has 1 channels"):
        process(backend, image.convert("L"), do_convert_rgb=False)


@both
def test_paths(backend, tmp_path):
    gray = np.asarray(picture(61, 83).convert("L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    upright = picture(61, 83)
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer has to turn it by 90 degrees to the right
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for kind in (str, pathlib.Path, os.scandir):
        paths = [tmp_path / "deep.png", tmp_path / "turned.png"]
        if kind is os.scandir:  # entries of a folder are paths, too
            paths = sorted(os.scandir(tmp_path), key=lambda entry: entry.name)
        else:
            paths = [kind(path) for path in paths]
        result = process(backend, paths)
        assert levels(result[0], official(Image.fromarray(gray).convert("RGB"))) < 2.01
        assert levels(result[1], official(upright)) < 2.01
        assert torch.equal(process(backend, paths[1]), result[1:])
        assert torch.equal(process(backend, [paths, [upright]])[:2], result)


@both
def test_base64_text(backend):
    image = picture(61, 83)
    file = io.BytesIO()
    image.save(file, format="PNG")
    text = base64.b64encode(file.getvalue()).decode()
    expected = process(backend, image)
    for given in (text, f"data:image/png;base64,{text}"):
        assert torch.equal(process(backend, given), expected)
    with pytest.raises(OSError, match="Cannot read the image data:image/png;base64,"):
        process(backend, "data:image/png;base64,aGVsbG8=")


@both
def test_an_address_that_holds_no_image_is_named(backend):
    with socket.socket() as listening:  # bound, and nobody listens
        listening.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/cat.png"
        with pytest.raises(OSError, match=f"Cannot read the image {address}: "):
            process(backend, address)


def spoil(folder, kind):
    path = folder / "picture.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no picture at all")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        picture(61, 83).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    elif kind == "not a PNG inside":
        picture(61, 83).save(path)
        path.write_bytes(path.read_bytes()[:60] + bytes(4000))
    return path


@both
@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "truncated", "not a PNG inside"])
@pytest.mark.parametrize("as_map", [False, True], ids=["image", "map"])
def test_a_file_that_holds_no_image_is_named(backend, kind, as_map, tmp_path):
    path = spoil(tmp_path, kind)
    for given in (path, str(path), [path]):
        with pytest.raises((ValueError, OSError)) as caught:
            if as_map:
                backend()(picture(8, 8), segmentation_maps=given)
            else:
                backend()(given)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message and type(caught.value) in (ValueError, OSError)


# Gradients -----------------------------------------------------------------------------------------------------------


def gradients(backend, images, **settings):
    images = [image.clone().requires_grad_() for image in images]
    values = backend(size=60, crop_size=60)(images, return_tensors="pt", **settings)["pixel_values"]
    weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(0))
    (values * weights).sum().backward()
    return values.detach(), [image.grad for image in images]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_rescale": False},
        {"do_resize": False, "do_rescale": False},
        {"do_normalize": False, "do_rescale": False},
        {"crop_size": 100, "do_rescale": False},
        {"crop_size": 100, "do_resize": False},
        {"resample": 2, "do_rescale": False},
        {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["one", "two", "two sizes", "double", "grouped"])
def test_gradients_are_the_builtin_ones(settings, kind):
    """Between 0.2 and 0.8, so that nothing is clipped, which the built-in processor does not do with floats."""
    smooth = torch.rand((1, 3, 5, 7), generator=torch.Generator().manual_seed(1)) * 0.6 + 0.2
    image = torch.nn.functional.interpolate(smooth, size=(61, 84), mode="bilinear")[0]
    if settings.get("do_rescale", True):
        image = image * 255
    images = {
        "one": [image],
        "two": [image, image.flip(2)],
        "two sizes": [image, image[:, :50, :70]],
        "double": [image.double()],
        "grouped": [image, image[:, 1:], image.flip(1)],
    }[kind]
    if settings.get("do_center_crop") is False and len(images) > 1:
        images = images[:1] * 2
    settings = {**settings, "disable_grouping": kind != "grouped"}
    values, found = gradients(PoolFormerImageProcessor, images, **settings)
    expected_values, expected = gradients(BuiltinImageProcessor, images, **settings)
    # Two passes of float32 over rows and columns, in another order
    torch.testing.assert_close(values, expected_values.to(values.dtype), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_a_clipped_pixel_has_no_gradient():
    """Floats are clipped as Pillow clips 8 bits; values with and without gradients are the same."""
    step = torch.zeros(3, 40, 40)
    step[..., 20:] = 1.0
    settings = {"size": 60, "crop_size": 60, "do_rescale": False}
    with torch.no_grad():
        expected = process(PoolFormerImageProcessor, step, **settings)
    values, (grad,) = gradients(PoolFormerImageProcessor, [step], do_rescale=False)
    assert torch.equal(values, expected)
    small = 1e-2 * torch.randn(step.shape, generator=torch.Generator().manual_seed(2))
    weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(0))
    inside = torch.zeros_like(step)
    inside[..., 2:17] = inside[..., 24:38] = 1.0
    flat = step * 0.5 + 0.25  # nothing to clip away from the edge
    moved = process(PoolFormerImageProcessor, flat + small * inside, **settings)
    change = ((moved - process(PoolFormerImageProcessor, flat, **settings)) * weights).sum()
    _, (slope,) = gradients(PoolFormerImageProcessor, [flat], do_rescale=False)
    torch.testing.assert_close(change, (slope * small * inside).sum(), rtol=1e-3, atol=1e-3)
    assert grad.abs().sum() < slope.abs().sum()


def test_gradients_through_a_strip():
    strip = torch.full((3, 1, 300), 100.0, requires_grad=True)
    process(PoolFormerImageProcessor, strip, size=20, crop_size=20).sum().backward()
    assert (strip.grad[..., 149:151] > 1).all() and (strip.grad[..., :100] == 0).all()


def test_gradients_that_cannot_be_are_refused():
    image = (torch.rand(3, 61, 84) * 255).requires_grad_()
    for resample in (Image.Resampling.BOX, Image.Resampling.HAMMING):
        with pytest.raises(ValueError, match=f"resample=.*{resample.name}.* cannot be differentiated"):
            process(PoolFormerImageProcessor, image, resample=resample)
        with torch.no_grad():
            assert not process(PoolFormerImageProcessor, image, resample=resample).requires_grad
    with pytest.raises(ValueError, match="Pillow computes no gradients"):
        process(PoolFormerImageProcessorPil, image)
    with torch.no_grad():
        result = process(PoolFormerImageProcessorPil, image)
    assert levels(result[0], process(PoolFormerImageProcessor, image.detach())[0]) < 2.01


# Against the built-in processors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ours, theirs",
    [(PoolFormerImageProcessor, BuiltinImageProcessor), (PoolFormerImageProcessorPil, BuiltinImageProcessorPil)],
    ids=["torchvision", "pil"],
)
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_combination_of_steps_is_the_builtin_one(ours, theirs, flags):
    # 66 - 60 is even: the built-in processor rounds the offset of an odd crop another way than torchvision
    settings = dict(zip(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), flags, strict=True))
    settings |= {"size": 60, "crop_size": {"height": 60, "width": 90}, "rescale_factor": 1 / 127.5}
    for image in (picture(61, 84), np.array(picture(60, 90))):
        result, expected = (process(backend, image, **settings) for backend in (ours, theirs))
        assert result.shape == expected.shape and result.dtype == expected.dtype
        # One level of 255, in the units of the output
        level = (2 / 255 if flags[2] else 1.0) / (min(STD) if flags[3] else 1.0)
        assert (result.double() - expected.double()).abs().max() <= 1.01 * level


@pytest.mark.parametrize(
    "size",
    [50, (50, 60), [40, 70], {"shortest_edge": 50}, {"height": 50, "width": 50}, {"height": 40, "width": 70}],
    ids=str,
)
@pytest.mark.parametrize("crop_size", [None, 36, (20, 30), {"height": 30, "width": 200}, {"height": 100, "width": 30}])
def test_sizes_are_the_builtin_ones(size, crop_size):
    settings = {"size": size, "do_center_crop": crop_size is not None, "crop_pct": 1.0}
    settings |= {} if crop_size is None else {"crop_size": crop_size}
    image = picture(60, 84)
    expected = BuiltinImageProcessor(**settings)(image, return_tensors="pt")["pixel_values"]
    for backend in BACKENDS:
        processor = backend(**settings)
        result = processor(image, return_tensors="pt")["pixel_values"]
        assert result.shape == expected.shape
        if all((a - b) % 2 == 0 for a, b in zip(resized(size), result.shape[2:], strict=True)):
            assert levels(result[0], expected[0]) < 2.01
        same = backend(do_center_crop=settings["do_center_crop"], crop_pct=1.0)(
            image, return_tensors="pt", size=processor.size, crop_size=processor.crop_size
        )
        assert torch.equal(same["pixel_values"], result)


def resized(size):
    """Of 60 x 84 pixels."""
    edges = list(size.values()) if isinstance(size, dict) else [size] if isinstance(size, int) else list(size)
    return (edges[0], int(edges[0] * 84 / 60)) if len(set(edges)) == 1 else tuple(edges)


@both
def test_gray_with_alpha_stays_so_on_demand(backend):
    image = as_mode(picture(61, 83), "LA")
    settings = {"do_convert_rgb": False, "image_mean": [0.5, 0.1], "image_std": 0.5}
    result = process(backend, image, **settings)
    assert result.shape == (1, 2, 224, 224)
    for channel, mean in zip((0, 1), (0.5, 0.1), strict=True):
        alone = process(backend, image.getchannel(channel), do_convert_rgb=False, image_mean=mean, image_std=0.5)
        torch.testing.assert_close(result[:, channel], alone[:, 0])
    array = np.array(image)
    torch.testing.assert_close(process(backend, array, input_data_format="channels_last", **settings), result)
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        process(backend, array, input_data_format="channels_last")


@both
def test_images_that_do_not_fit_together(backend):
    images = [picture(61, 83), picture(61, 120)]
    with pytest.raises(ValueError, match=r"\(3, 61, 83\), \(3, 61, 120\) do not fit into one tensor"):
        process(backend, images, do_resize=False, do_center_crop=False)
    as_they_are = backend()(images, do_resize=False, do_center_crop=False)["pixel_values"]
    assert [values.shape for values in as_they_are] == [(3, 61, 83), (3, 61, 120)]


@both
def test_copies_and_workers_answer_alike(backend):
    processor = backend(size=60, crop_size=60, resample="hamming", crop_pct=None)
    images = [picture(61, 84, seed=seed) for seed in range(4)]
    expected = processor(images, return_tensors="pt").pixel_values
    for other in (copy.copy(processor), copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert other.to_dict() == processor.to_dict()
        assert torch.equal(other(images, return_tensors="pt").pixel_values, expected)
    loader = torch.utils.data.DataLoader(
        images, batch_size=2, num_workers=1, collate_fn=Collate(processor), multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat(list(loader)), expected)


class Collate:
    def __init__(self, processor):
        self.processor = processor

    def __call__(self, images):
        return self.processor(images, return_tensors="pt").pixel_values


# Calls ---------------------------------------------------------------------------------------------------------------


@both
def test_batches_keep_their_order(backend):
    images = [picture(40 + 13 * (i % 3), 50, seed=i) for i in range(7)]
    expected = torch.cat([process(backend, image) for image in images])
    for batch in (images, tuple(images), [images[:3], images[3:]]):
        torch.testing.assert_close(process(backend, batch), expected)
    # the grouping of equal shapes is the default on accelerators only
    torch.testing.assert_close(process(backend, images, disable_grouping=False), expected)
    stacked = torch.stack([torch.from_numpy(np.array(image.resize((50, 40)))) for image in images])
    assert process(backend, stacked).shape == (7, 3, 224, 224)


@both
def test_return_types(backend):
    image = picture(61, 83)
    expected = process(backend, image)
    as_list = backend()(image)["pixel_values"]
    assert isinstance(as_list, list) and len(as_list) == 1
    torch.testing.assert_close(torch.as_tensor(as_list[0]), expected[0])
    as_numpy = backend()([image, image], return_tensors="np")["pixel_values"]
    assert isinstance(as_numpy, np.ndarray) and as_numpy.shape == (2, 3, 224, 224)
    last = process(backend, image, data_format="channels_last")
    torch.testing.assert_close(last.permute(0, 3, 1, 2), expected)


@both
def test_each_step_can_be_left_out(backend):
    image = picture(300, 260)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    plain = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    result = process(backend, image, **plain)
    assert result.dtype == torch.uint8 and torch.equal(result[0], pixels)
    torch.testing.assert_close(process(backend, image, **{**plain, "do_rescale": True})[0], pixels / 255)
    cropped = process(backend, image, **{**plain, "do_center_crop": True})
    assert torch.equal(cropped[0], T.CenterCrop(224)(pixels))
    resized = process(backend, image, **{**plain, "do_resize": True})
    assert resized.shape == (1, 3, int(248 * 300 / 260), 248)
    normalised = process(backend, image, **{**plain, "do_normalize": True})
    torch.testing.assert_close(normalised[0], T.Normalize(MEAN, STD)(pixels.float()))


@both
def test_small_images_are_padded_as_torchvision_does(backend):
    image = picture(61, 300)
    result = process(backend, image, do_resize=False)
    pixels = T.Compose([T.CenterCrop(224), T.ToTensor(), T.Normalize(MEAN, STD)])(image)
    torch.testing.assert_close(result[0], pixels, atol=1e-5, rtol=0)


@both
def test_crop_pct_none_is_a_plain_resize(backend):
    image = picture(300, 260)
    torch.testing.assert_close(process(backend, image, crop_pct=None), process(backend, image, crop_pct=1.0))
    squashed = process(
        backend, image, crop_pct=None, size={"height": 100, "width": 90}, crop_size={"height": 100, "width": 90}
    )
    expected = T.Compose([T.Resize((100, 90), T.InterpolationMode.BICUBIC), T.ToTensor(), T.Normalize(MEAN, STD)])
    assert levels(squashed[0], expected(image)) < 2.01


@both
def test_pads_to_the_largest(backend):
    images = [picture(61, 83), picture(90, 40)]
    result = process(backend, images, do_resize=False, do_center_crop=False, do_pad=True)
    assert result.shape == (2, 3, 90, 83)


@both
@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros(5, dtype=np.uint8), r"rank 2 .* got shape \(5,\)"),
        (np.zeros((1, 1, 8, 8, 3), dtype=np.uint8), r"rank 2 .* got shape \(1, 1, 8, 8, 3\)"),
        (np.zeros((8, 9, 2), dtype=np.uint8), r"1, 3 or 4 channels.*\(8, 9, 2\)"),
        (np.zeros((0, 9, 3), dtype=np.uint8), r"must not be empty, got shape \(0, 9, 3\)"),
        (torch.zeros(3, 9, 0), r"must not be empty, got shape \(3, 9, 0\)"),
        (np.zeros((8, 9, 3), dtype=complex), "numeric"),
        ([], "no image"),
        ("no such file.jpg", "no such file.jpg"),
    ],
    ids=["rank 1", "rank 5", "2 channels", "no rows", "no columns", "complex", "empty list", "no file"],
)
def test_bad_images(backend, image, message):
    with pytest.raises(ValueError, match=message):
        backend()(image)


@both
def test_bad_type(backend):
    with pytest.raises(TypeError, match="path or a URL"):
        backend()([None])


@both
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"crop_pct": 0.0}, "crop_pct must be a positive number"),
        ({"crop_pct": -0.9}, "crop_pct must be a positive number"),
        ({"crop_pct": math.nan}, "crop_pct must be a positive number"),
        ({"crop_pct": math.inf}, "crop_pct must be a positive number"),
        ({"rescale_factor": 0.0}, "rescale_factor must be a positive number"),
        ({"rescale_factor": math.nan}, "rescale_factor must be a positive number"),
        ({"size": {"longest_edge": 9}}, "size must have 'shortest_edge'"),
        ({"size": 0}, "size must be made of whole, positive numbers"),
        ({"size": (9, -9)}, "size must be made of whole, positive numbers"),
        ({"size": [9]}, r"size must be a number of pixels, \(height, width\)"),
        ({"size": [9, 9, 9]}, r"size must be a number of pixels, \(height, width\)"),
        ({"size": {"height": 9}}, "size must have one of"),
        ({"crop_size": -3}, "crop_size must be made of whole, positive numbers"),
        ({"crop_size": {"height": 0, "width": 9}}, "crop_size must be made of whole, positive numbers"),
        ({"crop_size": {"shortest_edge": 3}}, "crop_size must have 'height' and 'width'"),
        ({"pad_size": {"height": 9, "width": -9}}, "pad_size must be made of whole, positive numbers"),
        ({"image_std": [1.0, 0.0, 1.0]}, "image_std must not contain zeros"),
        ({"image_std": -1.0}, "image_std must not contain zeros or negative"),
        ({"image_std": [0.5, math.nan, 0.5]}, "image_std must be a number, or one for each channel"),
        ({"image_mean": math.inf}, "image_mean must be a number, or one for each channel"),
        ({"image_mean": [0.5, 0.5]}, "image_mean has 2 values"),
        ({"image_mean": [0.5] * 4, "image_std": [0.5] * 4}, "image_mean has 4 values"),
        ({"image_mean": [0.5] * 4, "do_convert_rgb": False}, "image_mean has 4 values, but image_std has 3"),
        ({"data_format": "last"}, "data_format must be 'channels_first' or"),
        ({"input_data_format": "HWC"}, "input_data_format must be 'channels_first' or"),
        ({"size_divisor": 0}, "size_divisor must be a positive number"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(backend, kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        backend(**kwargs)
    with pytest.raises(ValueError, match=message):
        backend()(picture(20, 20), **kwargs)
    saved = {**backend().to_dict(), **kwargs}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        backend.from_pretrained(tmp_path)
    processor = backend()
    for name, value in kwargs.items():
        setattr(processor, name, value)
    with pytest.raises(ValueError, match=message):
        processor(picture(20, 20))


@both
@pytest.mark.parametrize(
    "kwargs",
    # transformers checks the types of an argument, but not those of a configuration
    [
        {"do_resize": "false"},
        {"do_normalize": "no"},
        {"crop_pct": "0.9"},
        {"crop_pct": True},
        {"rescale_factor": "1/255"},
        {"size": "224"},
        {"size": 224.0},
        {"size": {"shortest_edge": "224"}},
        {"crop_size": {"height": 22.5, "width": 9}},
        {"size": True},
        {"image_mean": "imagenet"},
        {"image_std": [None, None, None]},
        {"image_mean": []},
        {"image_mean": [[0.5, 0.5, 0.5]]},
    ],
    ids=str,
)
def test_settings_of_a_wrong_type(backend, kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"^{name} must"):
        backend(**kwargs)
    with pytest.raises(Exception, match=name):
        backend()(picture(20, 20), **kwargs)


@both
def test_nothing_may_remain(backend):
    with pytest.raises(ValueError, match="leaves nothing"):
        backend(size=1, crop_pct=2.0)(picture(20, 20))


@both
def test_a_slip_of_the_pen_is_named(backend, tmp_path, caplog):
    backend().save_pretrained(tmp_path)
    logger = logging.getLogger(backend.__module__)
    logger.addHandler(caplog.handler)
    try:
        for make in (lambda: backend(crop_pctt=0.5), lambda: backend.from_pretrained(tmp_path, crop_pctt=0.5)):
            caplog.clear()
            assert make().crop_pct == 0.9
            assert "no setting 'crop_pctt'" in caplog.text and "'crop_pct'" in caplog.text
        caplog.clear()
        backend(image_processor_type="PoolFormerImageProcessor", feature_extractor_type="x", num_labels=3, auto_map={})
        backend.from_pretrained(tmp_path, trust_remote_code=True)
        assert "no setting" not in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    with pytest.raises(TypeError, match="crop_pctt"):
        backend()(picture(20, 20), crop_pctt=0.5)


# Files ---------------------------------------------------------------------------------------------------------------


@both
def test_round_trip(backend, tmp_path):
    processor = backend(size=96, crop_size=88, crop_pct=0.8, image_mean=[0.1, 0.2, 0.3], do_convert_rgb=False)
    processor.save_pretrained(tmp_path)
    loaded = backend.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    image = picture(61, 83)
    assert torch.equal(
        loaded(image, return_tensors="pt").pixel_values, processor(image, return_tensors="pt").pixel_values
    )
    assert backend.from_pretrained(tmp_path, crop_pct=0.5).crop_pct == 0.5


@both
@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},
        {"do_center_crop": False, "size": {"shortest_edge": 30, "longest_edge": 45}, "crop_pct": None},
        {"do_rescale": False, "do_normalize": False},
        {"do_convert_rgb": None, "image_mean": 0.5, "image_std": 0.25},
        {"size": (40, 50), "crop_size": (20, 31), "crop_pct": 1},
        {"default_to_square": True, "size": 40},
        {"rescale_factor": np.float32(1 / 128), "crop_pct": np.float32(0.5)},
        {"image_mean": np.array([0.1, 0.2, 0.3]), "image_std": torch.tensor([0.25, 0.5, 0.75])},
        {"size": np.int64(40), "crop_size": {"height": np.int32(30), "width": 20}},
        {"size": SizeDict(shortest_edge=40), "pad_size": [300, 310], "do_pad": True},
        {"do_pad": True, "size_divisor": 50},
        {"data_format": "channels_last", "resample": "lanczos"},
        {"do_reduce_labels": True, "disable_grouping": False},
    ],
    ids=str,
)
def test_every_setting_survives_saving(backend, settings, tmp_path):
    processor = backend(**settings)
    processor.save_pretrained(tmp_path)
    image = picture(61, 83)
    expected = processor(image, return_tensors="pt").pixel_values
    assert torch.equal(backend()(image, return_tensors="pt", **settings).pixel_values, expected)
    for loaded in (backend.from_pretrained(tmp_path), backend.from_dict(processor.to_dict())):
        assert loaded.to_dict() == processor.to_dict()
        assert torch.equal(loaded(image, return_tensors="pt").pixel_values, expected)


@both
def test_crop_pct_none_survives_saving(backend, tmp_path):
    """The built-in processor reads null as 0.9: it has to find the equivalent 1.0."""
    processor = backend(crop_pct=None)
    processor.save_pretrained(tmp_path)
    image = picture(300, 260)
    expected = processor(image, return_tensors="pt").pixel_values
    for other in (backend, BuiltinImageProcessor):
        result = other.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
        assert levels(result[0], expected[0]) < 2.01
    square = {"height": 64, "width": 64}
    backend(crop_pct=None, size=square).save_pretrained(tmp_path)
    assert backend.from_pretrained(tmp_path).crop_pct is None


@both
def test_interchange_with_the_builtin_processor(backend, tmp_path):
    # 88 - 80 is even: the built-in processor rounds the offset of an odd crop another way than torchvision
    settings = {"size": 80, "crop_size": 80, "crop_pct": 0.9, "do_convert_rgb": True}
    ours, theirs = backend(**settings), BuiltinImageProcessor(**settings)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    saved = [json.loads((tmp_path / name / "preprocessor_config.json").read_text()) for name in ("ours", "theirs")]
    saved[0].pop("auto_map")
    assert saved[0] == saved[1]
    image = picture(96, 96)
    expected = official(image, 80, 0.9)
    for processor in (
        BuiltinImageProcessor.from_pretrained(tmp_path / "ours"),
        backend.from_pretrained(tmp_path / "theirs"),
    ):
        assert levels(processor(image, return_tensors="pt").pixel_values[0], expected) < 2.01


@both
def test_defaults_are_the_builtin_ones(backend):
    ours, theirs = backend().to_dict(), BuiltinImageProcessor().to_dict()
    assert ours.pop("do_convert_rgb") is True
    assert ours == theirs


@both
def test_loads_old_feature_extractors(backend, tmp_path):
    config = {
        "crop_pct": 0.95,
        "do_normalize": True,
        "do_resize_and_center_crop": True,
        "feature_extractor_type": "PoolFormerFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 64,
    }
    path = tmp_path / "preprocessor_config.json"
    image = picture(61, 83)
    path.write_text(json.dumps(config))
    result = backend.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
    assert levels(result[0], official(image, 64, 0.95)) < 2.01
    path.write_text(json.dumps({**config, "crop_size": 32}))
    assert backend.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    path.write_text(json.dumps({**config, "do_resize_and_center_crop": False}))
    processor = backend.from_pretrained(tmp_path)
    assert processor(image, return_tensors="pt").pixel_values.shape == (1, 3, 61, 83)
    assert "do_resize_and_center_crop" not in processor.to_dict()


REMOTE = """
import json, sys
sys.modules["hf_poolformer"] = None
import numpy as np
from transformers import AutoImageProcessor

image = np.load(sys.argv[1])
found = {}
for folder in sys.argv[2:]:
    for kwargs in ({}, {"trust_remote_code": True}, {"trust_remote_code": True, "backend": "pil"}):
        processor = AutoImageProcessor.from_pretrained(folder, **kwargs)
        values = processor(image, return_tensors="np").pixel_values
        name = type(processor).__module__.split(".")[0] + "." + type(processor).__name__
        found.setdefault(folder, []).append([name, processor.crop_pct, float(values.mean())])
print(json.dumps(found))
"""


def test_saved_processors_carry_their_code(tmp_path):
    """Without the package: the built-in class by default, ours (either backend) with trust_remote_code."""
    folders = [tmp_path / "torchvision", tmp_path / "pil"]
    for backend, folder in zip(BACKENDS, folders, strict=True):
        backend(crop_pct=0.8).save_pretrained(folder)
    image = picture(61, 83)
    np.save(tmp_path / "image.npy", np.array(image))
    run = subprocess.run(
        [warm_python(), "-c", REMOTE, str(tmp_path / "image.npy"), *map(str, folders)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    expected = official(image, 224, 0.8).mean().item()
    for rows in json.loads(run.stdout).values():
        assert [name for name, _, _ in rows] == [
            "transformers.PoolFormerImageProcessor",
            "transformers_modules.PoolFormerImageProcessor",
            "transformers_modules.PoolFormerImageProcessorPil",
        ]
        for _, crop_pct, mean in rows:
            assert crop_pct == 0.8 and abs(mean - expected) < 0.02


# Devices -------------------------------------------------------------------------------------------------------------


def test_device_argument():
    assert process(PoolFormerImageProcessor, picture(61, 83), device="cpu").device.type == "cpu"


@pytest.mark.parametrize("shape", [(375, 500), (97, 61), (700, 217)], ids=str)
def test_accelerator_arithmetic(shape, monkeypatch):
    """What runs off the CPU, run on the CPU: 8 bits resampled in float, rounded after each axis."""
    image = picture(*shape, noise=60)
    processor = PoolFormerImageProcessor()
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    stand_in = Elsewhere(planes)
    resized = processor._resize_planes(stand_in, (248, 300), 3, 255.0)
    expected = processor._resize_planes(planes, (248, 300), 3, 255.0)
    assert (resized.as_subclass(torch.Tensor) - expected.float()).abs().max() < 2.01


class Nowhere(str):
    """What `Tensor.to` takes for the CPU and `device.type` tells apart from it."""

    type = "cuda"


class PretendsToBeElsewhere(torch.Tensor):
    device = Nowhere("cpu")


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that says it is not."""

    @property
    def device(self):
        return torch.device("meta")


@pytest.mark.gpu
def test_on_a_gpu():
    images = [picture(375, 500, noise=60, seed=i) for i in range(3)] + [picture(97, 61), picture(3000, 4000)]
    expected = process(PoolFormerImageProcessor, images)
    for batch in (images, [torch.from_numpy(np.array(image)).cuda() for image in images]):
        result = process(PoolFormerImageProcessor, batch, device="cuda")
        assert result.device.type == "cuda"
        for a, b in zip(result.cpu(), expected, strict=True):
            assert levels(a, b) < 2.01
    strip = Image.new("RGB", (30000, 1), (10, 120, 250))
    assert process(PoolFormerImageProcessor, strip, device="cuda").shape == (1, 3, 224, 224)
