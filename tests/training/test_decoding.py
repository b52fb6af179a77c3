"""Every image that can be broken, in every way that is cheap to make."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from hf_poolformer.training.decoding import BrokenImage, decode_image, describe_source


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(height: int = 40, width: int = 30) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["bytes", "path", "row with bytes", "row with path", "PIL"])
def test_every_form_of_source(tmp_path, form):
    image = photograph()
    file = tmp_path / "image.png"
    file.write_bytes(encode(image))
    source = {
        "bytes": encode(image),
        "path": str(file),
        "row with bytes": {"bytes": encode(image), "path": "elsewhere.png"},
        "row with path": {"bytes": None, "path": str(file)},
        "PIL": image,
    }[form]
    assert np.array_equal(decode_image(source), image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = photograph()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "PA":
        image = image.convert("P").convert("PA")
    else:
        image = image.convert("L" if mode in ("I", "F") else "RGB").convert(mode)
    decoded = decode_image(image)
    assert decoded.mode == "RGB" and decoded.size == (30, 40)
    assert 60 < np.asarray(decoded).mean() < 200


def test_sixteen_bit_png_keeps_its_shades():
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    decoded = np.asarray(decode_image(encode(Image.fromarray(ramp))))[..., 0]
    assert np.abs(decoded - ramp / 257).max() <= 0.5
    assert len(np.unique(decoded)) == 64


def test_palette_with_transparency_decodes_without_warning():
    image = photograph().convert("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(encode(image, transparency=bytes(range(256)))).mode == "RGB"


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(data), expected)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0"])
def test_broken_exif_is_ignored(exif):
    image = photograph()
    data = encode(image, "JPEG", quality=95, exif=exif)
    assert decode_image(data).size == image.size


def test_limits_are_those_given():
    with pytest.raises(BrokenImage, match="30x40 pixels, more than the limit of 1000"):
        decode_image(encode(photograph()), max_pixels=1000)
    with pytest.raises(BrokenImage, match="aspect ratio of 500"):
        decode_image(encode(Image.new("RGB", (2000, 2))))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"not an image", "not an image in a format"),
        (encode(photograph())[:-400], "(?i)truncated|broken"),
        (encode(photograph(), "JPEG")[:300], "(?i)truncated|broken"),
        (huge_png(60_000, 60_000), "pixels"),
        (huge_png(10_000_000, 1), "aspect ratio"),
        (huge_png(8, 8), "truncated|broken|incomplete"),
        ({"bytes": None, "path": None}, "no image"),
        (None, "no image"),
        ("/nowhere/at/all.png", "no such file"),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "bomb", "strip", "no pixels", "no row", "nothing", "no file"],
)
def test_broken_images_say_why(data, reason):
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


def test_directories_and_empty_files(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(BrokenImage, match="empty file"):
        decode_image(str(tmp_path / "empty.jpg"))
    with pytest.raises(BrokenImage, match="not a file"):
        decode_image(str(tmp_path))


def test_damaged_bytes_raise_nothing_else():
    random = np.random.default_rng(0)
    whole = [encode(photograph(), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")]
    for _ in range(300):
        data = bytearray(whole[random.integers(len(whole))])
        for position in random.integers(0, len(data), 8):
            data[position] = random.integers(256)
        try:
            assert decode_image(bytes(data)).mode == "RGB"
        except BrokenImage as reason:
            assert str(reason)


def test_describe_source():
    assert describe_source({"bytes": b"", "path": "a/b.png"}) == "a/b.png"
    assert describe_source({"bytes": b"", "path": None}) is None
    assert describe_source("a.png") == "a.png"
