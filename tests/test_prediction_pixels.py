"""How pixels get to the model: as 8 bits from the workers, or as JPEGs that the device decodes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from hf_poolformer import PoolFormerImageProcessor, PoolFormerImageProcessorPil
from hf_poolformer.data.decoding import decode_image
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.prediction.pixels import Preprocessing, decode
from hf_poolformer.training import jpeg_decoders, resampling


CPU = torch.device("cpu")


def encode(seed: int, kind: str = "JPEG", size: tuple[int, int] = (60, 44), **options) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def by_index(groups) -> dict[int, torch.Tensor]:
    return {index: image for indices, images in groups for index, image in zip(indices, images, strict=True)}


@pytest.mark.parametrize("kind", [PoolFormerImageProcessor, PoolFormerImageProcessorPil])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"crop_size": {"height": 80, "width": 80}},  # larger than the image: padded with black
        {"do_resize": False, "do_center_crop": False},
        {"image_mean": 0.4, "image_std": [0.1, 0.2, 0.3]},
    ],
)
def test_8_bits_end_as_what_the_processor_gives(kind, changes):
    """Bit for bit, on the CPU: two operations in float32, in the same order."""
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = kind(**{**sizes, **changes})
    items = [("a", encode(0)), ("broken", b"junk"), ("b", encode(1, size=(44, 60))), ("c", encode(2, "PNG"))]
    preprocessing = Preprocessing(processor, CPU)
    loaded = preprocessing.load(items)
    assert all(pixels.dtype == torch.uint8 for _, pixels in loaded["groups"])
    expected = decode(items, processor)
    assert loaded["errors"] == expected["errors"] and loaded["errors"][1]
    found, wanted = by_index(preprocessing.finish(loaded)), by_index(expected["groups"])
    assert found.keys() == wanted.keys() == {0, 2, 3}
    for index, pixels in wanted.items():
        assert found[index].dtype == pixels.dtype and torch.equal(found[index], pixels)


def test_jpegs_are_left_to_the_device(monkeypatch):
    """The device is the CPU here, whose decoder is Pillow's libjpeg, too: a level or two of 255 at most."""
    monkeypatch.setattr("hf_poolformer.prediction.pixels._decoder", lambda *_: "torchvision")
    cut = encode(3)[:-200]
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    items = [
        ("plain", encode(0)),
        ("png", encode(1, "PNG")),
        ("broken", b"junk"),
        ("turned", encode(2, exif=exif)),
        ("refused", encode(4, size=(52, 52))),
        ("cut", cut),
    ]

    def refuse(encoded, orientations, device):
        if any(bytes(data.numpy().tobytes()) == items[4][1] for data in encoded):
            raise RuntimeError("nvjpeg: not supported")
        return jpeg_decoders.by_torchvision(encoded, orientations, device)

    monkeypatch.setitem(jpeg_decoders.DECODERS, "torchvision", refuse)
    processor = PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    preprocessing = Preprocessing(processor, CPU, "decode")
    loaded = preprocessing.load(items)
    assert [jpeg.index for jpeg in loaded["jpegs"]] == [0, 3, 4]
    expected = decode(items, processor)
    found = by_index(preprocessing.finish(loaded))
    assert loaded["errors"] == expected["errors"] and loaded["errors"][2]
    wanted = by_index(expected["groups"])
    assert found.keys() == wanted.keys()
    for index, pixels in wanted.items():
        levels = (found[index] - pixels).abs() * 255 * torch.tensor(processor.image_std)[:, None, None]
        assert levels.max() <= 2.01
    # By the CPU: what was read and is no plain JPEG, and the one that the device refuses.
    assert preprocessing.decoded == 2 and preprocessing.held_back == len(wanted) - 2


class Launches(TorchDispatchMode):
    """Counts what would be kernels on a device: all but views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "view" not in func.name()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_a_device(monkeypatch):
    """A CPU that decodes and resizes as a GPU would."""
    monkeypatch.setattr("hf_poolformer.prediction.pixels._decoder", lambda *_: "torchvision")
    monkeypatch.setattr("hf_poolformer.prediction.pixels._resizes_floats", lambda _: True)


SMALL = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


@pytest.mark.parametrize(
    ("changes", "together"),
    [
        ({}, True),
        ({"resample": 2}, True),
        ({"crop_pct": 0.9, "do_normalize": False}, True),
        ({"size": {"height": 24, "width": 40}, "do_center_crop": False}, True),
        ({"do_resize": False}, True),
        ({"crop_size": {"height": 40, "width": 32}}, False),  # padded
        ({"resample": 1}, False),
        ({"do_rescale": False, "do_normalize": False}, False),
    ],
)
def test_images_of_many_sizes_are_resized_together(on_a_device, monkeypatch, changes, together):
    """By the processor's rules, up to a rounding: a level of 255."""
    processor = PoolFormerImageProcessor(**{**SMALL, **changes})
    sizes = [(60, 44), (44, 60), (33, 90), (47, 32), (61, 75), (60, 44), (32, 32), (300, 200)]
    items = [(f"{seed}", encode(seed, size=size, quality=95)) for seed, size in enumerate(sizes)]
    items.insert(3, ("broken", b"junk"))
    preprocessing = Preprocessing(processor, CPU, "decode")
    asked = []
    by_size = preprocessing._by_size
    monkeypatch.setattr(
        preprocessing, "_by_size", lambda images, errors: asked.append(len(images)) or by_size(images, errors)
    )
    loaded = preprocessing.load(items)
    found = by_index(preprocessing.finish(loaded))
    assert asked == [0 if together else 8] and preprocessing.decoded == 8
    monkeypatch.setattr("hf_poolformer.prediction.pixels._resizes_floats", lambda _: False)
    expected = by_index(preprocessing.finish(preprocessing.load(items)))
    assert found.keys() == expected.keys() == {*range(9)} - {3}
    assert [bool(error) for error in loaded["errors"]] == [index == 3 for index in range(9)]
    for index, wanted in expected.items():
        assert found[index].dtype == wanted.dtype and found[index].shape == wanted.shape
        scale = torch.tensor(processor.image_std)[:, None, None] if processor.do_normalize else 1
        levels = (found[index].float() - wanted).abs() * scale * 255
        assert levels.max() <= 1.01 and levels.mean() < 0.05


def test_launches_do_not_grow_with_the_sizes(on_a_device, monkeypatch):
    """What does not fit into the limit is done in pieces."""
    processor = PoolFormerImageProcessor(**SMALL)
    items = [(f"{index}", encode(index, size=(40 + index, 90 - index))) for index in range(40)]
    images = [torch.from_numpy(np.array(decode_image(data))).permute(2, 0, 1).contiguous() for _, data in items]
    monkeypatch.setitem(jpeg_decoders.DECODERS, "torchvision", lambda encoded, *_: images[: len(encoded)])

    def launches(number):
        preprocessing = Preprocessing(processor, CPU, "decode")
        loaded = preprocessing.load(items[:number])
        with Launches() as launched:
            found = preprocessing.finish(loaded)
        return launched.count, by_index(found)

    counts, results = zip(*map(launches, (8, 40)), strict=True)
    assert counts[0] == counts[1] <= 75
    monkeypatch.setattr(resampling, "MAX_PIXELS", 1 << 16)
    count, pieces = launches(40)
    assert count > counts[1]
    torch.testing.assert_close(pieces, results[1])


@pytest.mark.gpu
def test_on_a_gpu_pixels_are_nearly_those_of_the_cpu():
    """nvJPEG enlarges colours in another way than libjpeg, which shows at coloured edges."""
    device = torch.device("cuda")
    processor = PoolFormerImageProcessor()
    items = [(f"{seed}", encode(seed, size=(500, 375), quality=90)) for seed in range(8)]
    preprocessing = Preprocessing(processor, device, "decode")
    loaded = preprocessing.load(items)
    found, wanted = by_index(preprocessing.finish(loaded)), by_index(decode(items, processor)["groups"])
    assert preprocessing.decoded == 8 and found.keys() == wanted.keys()
    for index, pixels in wanted.items():
        levels = (found[index].cpu() - pixels).abs() * 255 * torch.tensor(processor.image_std)[:, None, None]
        assert levels.mean() <= 1 and levels.max() <= 16


def test_what_cannot_be_done_is_said():
    with pytest.raises(UserError, match="needs a CUDA GPU, and the model is on cpu"):
        Preprocessing(PoolFormerImageProcessor(), CPU, "decode")
    with pytest.raises(UserError, match="no or decode, not gpu"):
        Preprocessing(PoolFormerImageProcessor(), CPU, "gpu")
    with pytest.raises(UserError, match="needs a PoolFormerImageProcessor"):
        Preprocessing(PoolFormerImageProcessorPil(), torch.device("cuda"), "decode")
