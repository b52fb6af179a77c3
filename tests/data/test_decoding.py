"""Every image that can be broken, in every way that is cheap to make."""

import io
import math
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from hf_poolformer.data import decoding
from hf_poolformer.data.decoding import BrokenImage, EncodedImage, decode_image, describe_source


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


SMOOTH = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((203, 157), 3)


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


WHOLE = SMOOTH.crop((0, 0, 200, 152))  # turned, incomplete pixels come first, and others are not where they were
JPEGS = {
    "baseline": encode(SMOOTH, "JPEG", quality=95),
    "progressive": encode(SMOOTH, "JPEG", quality=95, progressive=True),
    "grey": encode(SMOOTH.convert("L"), "JPEG", quality=95),
    "CMYK": encode(SMOOTH.convert("CMYK"), "JPEG", quality=95),
    "on its side": encode(WHOLE, "JPEG", quality=95, exif=with_orientation(6)),
    "upside down": encode(WHOLE, "JPEG", quality=95, exif=with_orientation(3)),
    "several pictures": encode(SMOOTH, "MPO", quality=95, save_all=True, append_images=[SMOOTH.rotate(180)]),
}


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_are_decoded_at_a_reduced_size(kind, reduction):
    whole = decode_image(JPEGS[kind])
    with EncodedImage(JPEGS[kind]) as encoded:
        assert (encoded.width, encoded.height) == whole.size
        small, by = encoded.decode(reduction)
    assert by == reduction and small.mode == "RGB"
    assert small.size == (math.ceil(whole.width / reduction), math.ceil(whole.height / reduction))
    # Pixel k of the reduced image is about the mean of pixels kr to kr + r - 1 of the other.
    rows, columns = whole.height // reduction, whole.width // reduction
    means = np.asarray(whole, dtype=float)[: rows * reduction, : columns * reduction]
    means = means.reshape(rows, reduction, columns, reduction, 3).mean((1, 3))
    assert np.abs(means - np.asarray(small)[:rows, :columns]).mean() < 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_keep_their_size(kind):
    with EncodedImage(encode(SMOOTH, kind)) as encoded:
        image, by = encoded.decode(8)
    assert by == 1 and image.size == SMOOTH.size and encoded.plain_jpeg() is None


def test_an_image_that_is_open_already_keeps_its_size():
    opened = Image.open(io.BytesIO(JPEGS["baseline"]))
    with EncodedImage(opened) as encoded:
        assert encoded.decode(4)[1] == 1
    assert opened.getpixel((0, 0))  # and stays open


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 5), (9, 17)])
def test_the_smallest_jpegs(size):
    for reduction in (2, 4, 8):
        with EncodedImage(encode(photograph(*size), "JPEG")) as encoded:
            image, by = encoded.decode(reduction)
        assert image.size == (math.ceil(size[1] / by), math.ceil(size[0] / by))


def test_a_header_may_be_fine_and_the_pixels_not(tmp_path):
    file = tmp_path / "torn.jpg"
    file.write_bytes(JPEGS["baseline"][:-500])
    with EncodedImage(str(file)) as encoded:
        assert (encoded.width, encoded.height) == SMOOTH.size and encoded.name == str(file)
        assert encoded.plain_jpeg() is None  # no end: the device's decoder might make grey of it
        with pytest.raises(BrokenImage, match=r"(?i)truncated|broken"):
            encoded.decode(2)


def test_what_is_a_plain_jpeg():
    plain = {}
    for kind, data in JPEGS.items():
        with EncodedImage(data) as encoded:
            content = encoded.plain_jpeg()
            plain[kind] = content is not None
            assert content in (None, data)
            assert encoded.decode()[0].size == (encoded.width, encoded.height)  # afterwards, too
    assert plain == {kind: kind not in ("CMYK", "several pictures") for kind in JPEGS}
    # Notes behind the end do no harm; an Adobe marker that says "RGB as it is" is for Pillow.
    with EncodedImage(JPEGS["baseline"] + b"\0" * 100) as encoded:
        assert encoded.plain_jpeg()
    with EncodedImage(encode(SMOOTH, "JPEG", keep_rgb=True)) as encoded:
        assert encoded.plain_jpeg() is None
        assert np.abs(np.asarray(encoded.decode()[0], float) - np.asarray(SMOOTH, float)).mean() < 10


def test_damaged_bytes_raise_nothing_else_at_a_reduced_size():
    random = np.random.default_rng(1)
    for _ in range(200):
        data = bytearray(JPEGS["baseline"])
        for position in random.integers(0, len(data), 8):
            data[position] = random.integers(256)
        try:
            with EncodedImage(bytes(data)) as encoded:
                encoded.plain_jpeg()
                assert encoded.decode(4)[0].mode == "RGB"
        except BrokenImage as reason:
            assert str(reason)


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(decoding, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")


SAMPLED = {
    f"{mode} {sampling} {kind}": encode(SMOOTH.convert(mode), "JPEG", quality=85, subsampling=sampling, **options)
    for mode, sampling in [("RGB", "4:4:4"), ("RGB", "4:2:2"), ("RGB", "4:2:0"), ("L", "4:4:4")]
    for kind, options in [
        ("baseline", {}),
        ("progressive", {"progressive": True}),
        ("restarts", {"restart_marker_blocks": 3}),
    ]
}


@pytest.mark.parametrize("kind", [*JPEGS, *SAMPLED])
def test_the_upper_rows_are_those_of_the_whole_image(kind, decoder):
    """To the bit, wherever decoding ends; what is no plain JPEG comes whole."""
    data = {**JPEGS, **SAMPLED}[kind]
    whole = np.asarray(decode_image(data))
    for rows in (1, 15, 16, 33, 100, len(whole) - 1, len(whole), None):
        with EncodedImage(data) as encoded:
            pixels, reduced = encoded.pixels(rows=rows)
        assert reduced == 1 and pixels.dtype == np.uint8 and pixels.shape[1:] == whole.shape[1:]
        wanted = len(whole) if rows is None else rows
        assert np.array_equal(pixels[:wanted], whole[:wanted]), rows
        early = kind in ("baseline", "grey") or (kind in SAMPLED and "progressive" not in kind)
        assert len(pixels) == (min(wanted + 16, len(whole)) if early else len(whole))


def test_a_torn_file_is_refused_whatever_is_wanted_of_it(decoder):
    for data in (JPEGS["baseline"][:-500], JPEGS["baseline"][:-2]):
        with EncodedImage(data) as encoded:
            try:
                expected = np.asarray(decode_image(data))
            except BrokenImage:
                with pytest.raises(BrokenImage, match=r"(?i)truncated|broken"):
                    encoded.pixels(rows=8)
            else:
                assert np.array_equal(encoded.pixels(rows=8)[0], expected)


def test_damaged_bytes_give_the_same_verdict(decoder):
    """Images that decode whole are those that decode in part, but for damage below the part."""
    random = np.random.default_rng(2)
    for _ in range(200):
        data = bytearray(JPEGS["baseline"])
        for position in random.integers(0, len(data), 4):
            data[position] = random.integers(256)
        try:
            expected = np.asarray(decode_image(bytes(data)))
        except BrokenImage:
            expected = None
        try:
            with EncodedImage(bytes(data)) as encoded:
                pixels = encoded.pixels()[0]
                part = encoded.pixels(rows=40)[0]
        except BrokenImage:
            assert expected is None
        else:
            assert expected is not None and np.array_equal(pixels, expected)
            assert len(part) >= min(40, len(expected))
