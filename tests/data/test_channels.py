"""NPY files, TIFFs of many channels and grey images as tensors; every file that is none of these, with the reason."""

import io
import tarfile

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features
from datasets import Image as ImageColumn
from PIL import Image
from shards import write_shards

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.data.channels import batches_of, measure_channels
from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.data.decoding import BrokenImage, EncodedImage, decode_image
from hf_poolformer.data.loader import make_loader
from hf_poolformer.data.transforms import EvalTransform


tifffile = pytest.importorskip("tifffile")


def noise(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def npy(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def png(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PLANES = {np.uint8: noise(5, 20, 30), np.uint16: noise(5, 20, 30, dtype=np.uint16)}


@pytest.mark.parametrize(
    "encode",
    [
        lambda planes: npy(planes),
        lambda planes: npy(planes.transpose(1, 2, 0)),
        lambda planes: npy(np.asfortranarray(planes)),
        lambda planes: npy(planes.astype(planes.dtype.newbyteorder(">"))),
        lambda planes: tiff(planes.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig"),
        lambda planes: tiff(planes, photometric="minisblack", planarconfig="separate"),
        lambda planes: tiff(planes, photometric="minisblack"),  # a page for each channel
        lambda planes: tiff(planes, imagej=True),
        lambda planes: tiff(planes, photometric="minisblack", bigtiff=True, compression="zlib", byteorder=">"),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_five_channels(encode, dtype, tmp_path):
    planes, data = PLANES[dtype], encode(PLANES[dtype])
    (tmp_path / "image").write_bytes(data)
    for source in (data, tmp_path / "image"):
        decoded = decode_image(source, num_channels=5)
        assert decoded.shape == (5, 20, 30)
        if dtype == np.uint8:
            assert decoded.dtype == torch.uint8 and np.array_equal(decoded, planes)
        else:
            assert np.allclose(decoded, planes / 257, rtol=1e-6)


def test_tiff_says_which_axis_holds_the_channels():
    values = noise(5, 20, 5)
    contiguous = tiff(values, photometric="minisblack", planarconfig="contig")
    separate = tiff(values, photometric="minisblack", planarconfig="separate")
    assert np.array_equal(decode_image(contiguous, num_channels=5), values.transpose(2, 0, 1))
    assert np.array_equal(decode_image(separate, num_channels=5), values)


def test_what_a_tiff_says_of_its_pixels():
    planes = noise(20, 30, 4)
    inverted = tiff(planes, photometric="miniswhite", planarconfig="contig")
    assert np.array_equal(decode_image(inverted, num_channels=4), 255 - planes.transpose(2, 0, 1))
    turned = tiff(planes, photometric="minisblack", planarconfig="contig", extratags=[(274, 3, 1, 6, True)])
    with EncodedImage(turned, num_channels=4) as image:
        assert (image.height, image.width) == (30, 20)
        assert np.array_equal(image.pixels()[0], np.rot90(planes, -1))


def test_floats():
    values = np.linspace(-0.2, 1.2, 2 * 20 * 30, dtype=np.float64).reshape(2, 20, 30)
    assert np.allclose(decode_image(npy(values), num_channels=2), values.clip(0, 1) * 255, atol=1e-3)
    assert np.allclose(decode_image(npy(values.clip(0, 1) * 200), num_channels=2), values.clip(0, 1) * 200, atol=1e-3)


def test_grey():
    """JPEGs are decoded at a reduced size; 16 bits keep what they have, in files of every kind."""
    photograph = Image.fromarray(noise(64, 64, 3)).resize((256, 256))
    with EncodedImage(png(photograph, "JPEG"), num_channels=1) as image:
        pixels, reduction = image.pixels(4)
        assert reduction == 4 and pixels.shape == (64, 64, 1)
    wide = noise(20, 30, dtype=np.uint16)
    for data in (png(Image.fromarray(wide)), tiff(wide), npy(wide)):
        assert np.allclose(decode_image(data, num_channels=1)[0], wide / 257, rtol=1e-6)


def test_arrays_as_rgb():
    pixels = noise(20, 30, 3)
    for values in (pixels, pixels.transpose(2, 0, 1)):
        assert np.array_equal(np.asarray(decode_image(npy(values))), pixels)
    assert np.array_equal(np.asarray(decode_image(npy(pixels[..., 0]))), np.repeat(pixels[..., :1], 3, 2))


@pytest.mark.parametrize(
    ("data", "number", "reason"),
    [
        (npy(noise(20, 30, 4)), 5, r"shape \(20, 30, 4\), in which no axis is one of 5 channels"),
        (npy(noise(4, 30, 4)), 4, "first and the last axis may be the 4 channels"),
        (npy(noise(2, 4, 20, 30)), 4, "not one image"),
        (npy(noise(20)), 4, "no image"),
        (npy(np.zeros((4, 0, 30))), 4, "no image"),
        (npy(np.full((4, 20, 30), np.nan)), 4, "not finite"),
        (npy(np.full((4, 20, 30), 3000.0)), 4, "cannot tell what is white"),
        (npy(np.zeros((4, 20, 30), np.int32)), 4, "int32, of which nobody can tell what is white"),
        (npy(np.array([{}, {}])), 4, "not of numbers"),
        (npy(np.zeros((4, 20, 30), "c16")), 4, "not of numbers"),
        (npy(noise(4, 20, 30))[:-1], 4, "ends early"),
        (npy(noise(4, 20, 30))[:20], 4, "EOF"),
        (npy(np.zeros((1,), np.uint8)).replace(b"(1,), }", b"(70000, 70000, 4), }")[:200], 4, "decompression bomb"),
        (tiff(noise(20, 30, 4), photometric="minisblack", planarconfig="contig"), 5, "takes 5"),
        (tiff(noise(3, 20, 30, 4), photometric="minisblack", planarconfig="contig"), 4, "not one image"),
        (tiff(noise(20, 30, 4), photometric="separated"), 4, "CMYK"),
        (tiff(noise(20, 30, 5), photometric="minisblack", planarconfig="contig")[:200], 5, "corrupted"),
        (png(Image.new("RGB", (30, 20))), 4, r"3 channels \(RGB\), and the model takes 4"),
        (png(Image.new("CMYK", (30, 20)), "JPEG"), 4, "CMYK"),
        (b"II*\0" + bytes(50), 4, "x"),
        (b"text", 4, "not an image"),
        (npy(noise(5, 20, 30)), 3, "neither grey nor RGB nor RGBA"),
    ],
)
def test_broken(data, number, reason):
    with pytest.raises(BrokenImage, match=reason):
        decode_image(data, num_channels=number)


def test_limits():
    planes = noise(4, 20, 30)
    with pytest.raises(BrokenImage, match="decompression bomb"):
        decode_image(npy(planes), num_channels=4, max_pixels=400)
    with pytest.raises(BrokenImage, match="decompression bomb"):
        decode_image(tiff(planes, photometric="minisblack"), num_channels=4, max_pixels=400)


def test_without_tifffile_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(BrokenImage, match=r"hf-poolformer\[multispectral\]"):
        decode_image(tiff(noise(20, 30, 4), photometric="minisblack", planarconfig="contig"), num_channels=4)


@pytest.fixture
def arrays(tmp_path):
    """Two classes of ten NPY files each, of two channels that differ."""
    for label in ("dark", "bright"):
        (tmp_path / label).mkdir()
        for index in range(10):
            values = np.random.default_rng(index).random((2, 20, 30 + index)) * [[[0.2]], [[0.8]]]
            np.save(tmp_path / label / f"{index}.npy", values.astype(np.float32))
    return tmp_path


def test_a_folder_of_arrays(arrays):
    dataset = open_datasets(train_dir=str(arrays), train_val_split=0.0)["train"]
    assert dataset.num_examples == 20 and dataset.label_names == ["bright", "dark"]
    mean, std = measure_channels(dataset, 2)
    images = [np.load(file).astype(np.float64).reshape(2, -1) for file in sorted(arrays.glob("*/*.npy"))]
    means, squares = (np.mean([(values**power).mean(1) for values in images], 0) for power in (1, 2))
    assert np.allclose(mean, means, rtol=1e-5)  # of float32
    assert np.allclose(std, np.sqrt(squares - means**2), rtol=1e-5)


def test_arrays_beside_images_are_none(arrays):
    Image.new("RGB", (30, 20)).save(arrays / "dark" / "image.png")
    Image.new("RGB", (30, 20)).save(arrays / "bright" / "image.png")
    dataset = open_datasets(train_dir=str(arrays), train_val_split=0.0)["train"]
    assert dataset.num_examples == 2 and dataset.left_out[".npy"] == 20


@pytest.mark.parametrize("storage", ["parquet", "tar"])
def test_shards_and_what_is_broken_in_them(storage, tmp_path):
    """Every image as the image processor makes it; one of other channels is left out, counted and named."""
    images = [noise(20 + index, 30, 5, dtype=np.uint16) for index in range(6)]
    broken = noise(20, 30, 4, dtype=np.uint16)
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    if storage == "parquet":
        encoded = [npy(image) if index % 2 else tiff(image, **options) for index, image in enumerate(images)]
        rows = [{"image": {"bytes": data, "path": None}, "label": 0} for data in [*encoded, npy(broken)]]
        features = Features({"image": ImageColumn(), "label": ClassLabel(names=["a", "b"])})
        write_shards(tmp_path, "train", rows, features, 2)
    else:
        with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
            for index, image in enumerate([*images, broken]):
                for suffix, data in (("tif", tiff(image, **options)), ("cls", b"%d" % (index % 2))):
                    member = tarfile.TarInfo(f"{index}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    dataset = open_datasets(dataset_name=str(tmp_path), train_val_split=0.0)["train"]
    processor = PoolFormerImageProcessor(
        num_channels=5, size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    transform = EvalTransform(processor)
    loader = make_loader(
        dataset, transform, batch_size=3, training=False, max_skipped=1, batches=batches_of(transform)
    )
    batches = list(loader)
    made = torch.cat([batch["pixel_values"] for batch in batches])
    right = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.allclose(made, right, atol=1e-5)
    (told,) = [text for batch in batches for text in batch["skipped"]]
    assert loader.skipped == 1 and ("no axis is one of 5 channels" in told or "4 channels" in told)
