"""What becomes of the pixels of a file, the same on every way to a model."""

import base64
import io
import logging
import struct
import sys
import threading
import types
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from transformers import pipeline

from hf_poolformer import (
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerImageProcessor,
    PoolFormerImageProcessorPil,
)
from hf_poolformer.data.decoding import BrokenImage, EncodedImage, decode_image
from hf_poolformer.image_pixels import pil_to_rgb
from hf_poolformer.prediction.pixels import decode


PROCESSORS = [PoolFormerImageProcessor, PoolFormerImageProcessorPil]
AS_IT_IS = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(seed: int = 0, height: int = 24, width: int = 18, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels(source) -> np.ndarray:
    return np.asarray(decode_image(source)).astype(int)


def composited(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """On white, in float64."""
    share = alpha.astype(float)[..., None] / 255
    return colours * share + 255 * (1 - share)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """Behind the header, where PNG wants what is about colours."""
    return png[:33] + b"".join(chunks) + png[33:]


# Alpha ---------------------------------------------------------------------------------------------------------------


def few_bits(bits: int) -> bytes:
    """A PNG whose rows run through all levels, of which 1 is transparent."""
    row = b"\0" + {2: b"\x1b" * 4, 4: bytes.fromhex("0123456789abcdef")}[bits]
    header = struct.pack(">IIBBBBB", 16, 16, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", 1)) + chunk(b"IDAT", zlib.compress(row * 16))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def shades(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Colours and alpha of `few_bits`."""
    level = np.arange(16) % 2**bits
    level = np.tile(level, (16, 1))
    return np.repeat((level * (255 // (2**bits - 1)))[..., None], 3, axis=2), np.where(level == 1, 0, 255)


def transparent_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """Encoded images with alpha of every kind, and what they look like on white."""
    colours, alpha = noise(1), noise(2)[..., 0]
    grey = colours[..., 0]
    levels = np.repeat(grey[..., None], 3, axis=2)
    rgba = Image.fromarray(np.dstack([colours, alpha]))
    palette = Image.fromarray(colours).quantize(16)
    painted = np.asarray(palette.convert("RGB"))
    entries = np.arange(0, 256, 16, dtype=np.uint8)[np.asarray(palette)]
    one = np.where(np.asarray(palette) == 3, 0, 255)
    first = tuple(map(int, colours[0, 0]))
    key = np.where((colours == colours[0, 0]).all(-1), 0, 255)
    deep = grey.astype(np.uint16) * 257
    return {
        "RGBA": (encode(rgba), composited(colours, alpha)),
        "RGBA in WebP": (encode(rgba, "WEBP", lossless=True, exact=True), composited(colours, alpha)),
        "RGBA in TIFF": (encode(rgba, "TIFF"), composited(colours, alpha)),
        "LA": (encode(Image.fromarray(np.dstack([grey, alpha]))), composited(levels, alpha)),
        "palette": (encode(palette, transparency=bytes(range(0, 256, 16))), composited(painted, entries)),
        "palette, one entry": (encode(palette, transparency=3), composited(painted, one)),
        "GIF": (encode(palette, "GIF", transparency=3), composited(painted, one)),
        "one colour": (encode(Image.fromarray(colours), transparency=first), composited(colours, key)),
        "one level": (
            encode(Image.fromarray(grey), transparency=int(grey[0, 0])),
            composited(levels, np.where(grey == grey[0, 0], 0, 255)),
        ),
        "one level of 2 bits": (few_bits(2), composited(*shades(2))),
        "one level of 4 bits": (few_bits(4), composited(*shades(4))),
        "one level of 16 bits": (
            with_chunks(encode(Image.fromarray(deep)), chunk(b"tRNS", struct.pack(">H", deep[0, 0]))),
            composited(levels, np.where(deep == deep[0, 0], 0, 255)),
        ),
    }


TRANSPARENT = transparent_files()


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_alpha_is_composited_on_white(kind):
    data, expected = TRANSPARENT[kind]
    assert (expected == 255).all(-1).any() or "RGBA" in kind or kind == "LA"
    assert np.abs(pixels(data) - expected).max() <= 1  # rounding


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_alpha_of_images_in_memory(mode):
    image = Image.fromarray(np.dstack([noise(1), np.full((24, 18), 128, dtype=np.uint8)]))
    image = {
        "RGBa": lambda: image.convert("RGBa"),
        "LA": lambda: image.convert("LA"),
        "La": lambda: image.convert("LA").convert("La"),
        "PA": lambda: image.convert("RGB").quantize(8).convert("PA"),
    }.get(mode, lambda: image)()
    if mode == "PA":
        image.putalpha(128)
    assert image.mode == mode
    colours = np.asarray(image.convert("LA" if mode == "La" else "RGBA").convert("RGBA").convert("RGB"))
    expected = composited(colours, np.full((24, 18), 128))
    assert np.abs(np.asarray(pil_to_rgb(image)) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["RGBA", "LA", "PA", "P"])
def test_opaque_images_keep_their_colours(kind):
    image = Image.fromarray(noise())
    image = {"RGBA": image.convert("RGBA"), "LA": image.convert("LA")}.get(kind, image.quantize(256).convert(kind))
    assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_what_needs_nothing_is_not_copied():
    image = Image.fromarray(noise())
    assert pil_to_rgb(image) is image
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert pil_to_rgb(image) is image


@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_way_to_a_model_sees_the_same(processor, tmp_path):
    """Training and prediction decode, a user opens with Pillow, gives a path, an array, or text in base64."""
    process = processor(**AS_IT_IS)
    for kind, (data, _) in TRANSPARENT.items():
        file = tmp_path / "image"
        file.write_bytes(data)
        expected = np.asarray(decode_image(data)).transpose(2, 0, 1)
        ways = [Image.open(file), str(file), file, base64.b64encode(data).decode(), decode_image(file)]
        for way in ways:
            (seen,) = process(way, return_tensors="np")["pixel_values"]
            assert np.array_equal(seen, expected), (kind, type(way))
        if kind.startswith("RGBA"):
            for array in (np.asarray(Image.open(file)), torch.from_numpy(np.array(Image.open(file)))):
                (seen,) = process(array, return_tensors="np")["pixel_values"]
                assert np.array_equal(seen, expected), kind
    batch = decode([("a", TRANSPARENT["RGBA"][0])], process)
    assert np.array_equal(
        batch["groups"][0][1][0].numpy(), np.asarray(decode_image(TRANSPARENT["RGBA"][0])).T.swapaxes(1, 2)
    )


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("rescale", [True, False])
def test_alpha_of_float_arrays(processor, rescale):
    rgba = np.dstack([noise(1), noise(2)[..., :1]])
    values = rgba.astype(np.float32) / (1 if rescale else 255)
    settings = {**AS_IT_IS, "do_rescale": rescale, "data_format": "channels_last"}
    (seen,) = processor(**settings)(values, return_tensors="np")["pixel_values"]
    assert np.abs(seen * 255 - composited(rgba[..., :3], rgba[..., 3])).max() < 1e-3


@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_pipelines_see_alpha(task, tmp_path):
    """transformers' own convert to RGB, and drop it, before the image processor is asked."""
    torch.manual_seed(0)
    config = PoolFormerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_labels=3)
    model = PoolFormerForImageClassification(config).eval()
    run = pipeline(task, model=model, image_processor=PoolFormerImageProcessor())
    data, _ = TRANSPARENT["RGBA"]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(Image.open(io.BytesIO(data)), exif=exif)
    for content in (data, turned):
        (tmp_path / "image.png").write_bytes(content)
        expected = run(decode_image(content))
        assert run(str(tmp_path / "image.png")) == expected == run(Image.open(tmp_path / "image.png"))
        assert expected != run(ImageOps.exif_transpose(Image.open(tmp_path / "image.png")).convert("RGB"))


def test_alpha_over_http():
    data, expected = TRANSPARENT["RGBA"]

    class Files(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        (seen,) = PoolFormerImageProcessor(**AS_IT_IS)(
            f"http://127.0.0.1:{server.server_port}/a.png", return_tensors="np"
        )["pixel_values"]
        server.shutdown()
    assert np.abs(seen.transpose(1, 2, 0) - expected).max() <= 1


# 16 bits and floats --------------------------------------------------------------------------------------------------


def tiff(values: np.ndarray, bits: int = 16, kind: int = 1, photometric: int = 1, **tags: int) -> bytes:
    """Grey, uncompressed, one strip; `kind` is the SampleFormat, and 12 bits are packed."""
    height, width = values.shape
    if bits == 12:
        pairs = values.astype(np.uint16).reshape(-1, 2)
        data = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        data = data.astype(np.uint8).tobytes()
    else:
        data = values.tobytes()
    fields = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height, 339: kind}
    fields |= {int(tag[1:]): value for tag, value in tags.items()}
    fields[279], fields[273] = len(data), 8 + 2 + 12 * (len(fields) + 2) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(fields.items()))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(fields)) + entries + b"\0" * 4 + data


def pgm(values: np.ndarray, largest: int) -> bytes:
    height, width = values.shape
    return b"P5 %d %d %d\n" % (width, height, largest) + values.astype(">u2").tobytes()


RAMP = np.linspace(0, 1, 24 * 18).reshape(24, 18)


def deep(white: int, brightest: float = 1.0) -> np.ndarray:
    return np.rint(RAMP * white * brightest).astype("<u2")


@pytest.mark.parametrize(
    ("data", "brightest"),
    [
        (encode(Image.fromarray(deep(65535))), 255),
        (tiff(deep(65535)), 255),
        (tiff(deep(65535, 0.1)), 25.5),  # dark, and 16 bits all the same: some are above 4095
        (encode(Image.fromarray(deep(4095))), 255),
        (encode(Image.fromarray(deep(4095, 0.25))), 63.75),
        (tiff(deep(4095)), 255),
        (tiff(deep(4095), bits=12), 255),
        (tiff(deep(4095, 0.02), bits=12), 5.1),
        (tiff(deep(1023), T281=1023), 255),
        (tiff(deep(1023, 0.5), T281=1023), 127.5),
        (tiff(deep(16383, 0.5), T281=16383), 127.5),
        (tiff(deep(4095, 0.5), T281=2048), 127.5),  # the brightest pixel, not what is white
        (pgm(deep(4095, 0.1), 4095), 25.5),
        (pgm(deep(65535, 0.003), 65535), 0.765),
        (encode(Image.fromarray(deep(65535).astype(">u2").astype("<u2")), "TIFF"), 255),
    ],
    ids=[
        "png",
        "tiff",
        "dark tiff",
        "12 in 16 png",
        "dark 12 in 16",
        "12 in 16 tiff",
        "12 bits",
        "dark 12 bits",
        "10 declared",
        "dark 10 declared",
        "dark 14 declared",
        "a maximum is no declaration",
        "dark 12-bit pgm",
        "dark 16-bit pgm",
        "tiff by Pillow",
    ],
)
def test_deep_images_are_scaled_by_a_stated_rule(data, brightest):
    assert np.abs(pixels(data)[..., 0] - RAMP * brightest).max() < 1


@pytest.mark.parametrize(("bits", "white"), [(16, 65535), (12, 4095)])
def test_white_is_zero_where_the_file_says_so(bits, white):
    data = tiff(deep(white), bits=16, photometric=0, **({"T281": white} if bits == 12 else {}))
    assert np.abs(pixels(data)[..., 0] - (255 - RAMP * 255)).max() < 1


def test_twelve_bits_are_said_once(caplog):
    logging.Logger.warning_once.cache_clear()
    for brightest in (1.0, 0.5, 0.0):
        decode_image(encode(Image.fromarray(deep(4095, brightest))))
    assert len([message for message in caplog.messages if "12 bits" in message]) == 1


@pytest.mark.parametrize("depth", ["PNG", "TIFF"])
def test_colours_of_twelve_bits_in_sixteen_are_refused(depth):
    """Pillow keeps the upper 8 of 16 bits: 4 of the 12 would be left, almost black."""

    def data(white: int) -> bytes:
        values = np.repeat(deep(white)[..., None], 3, axis=2)
        if depth == "PNG":
            rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
            header = struct.pack(">IIBBBBB", 18, 24, 16, 2, 0, 0, 0)
            parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
            return b"\x89PNG\r\n\x1a\n" + parts
        entry = {256: 18, 257: 24, 259: 1, 262: 2, 277: 3, 278: 24}
        offset = 8 + 2 + 12 * (len(entry) + 3) + 4
        fields = [(tag, 4, 1, value) for tag, value in entry.items()]
        fields += [(258, 3, 3, offset), (273, 4, 1, offset + 6), (279, 4, 1, values.nbytes)]
        packed = b"".join(struct.pack("<HHII", *field) for field in sorted(fields))
        head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(fields)) + packed + b"\0" * 4
        return head + struct.pack("<HHH", 16, 16, 16) + values.tobytes()

    assert np.abs(pixels(data(65535))[..., 1] - RAMP * 255).max() <= 1
    with pytest.raises(BrokenImage, match="12 bits, or almost black"):
        decode_image(data(4095))
    assert pixels(data(0)).max() == 0


def floats(values: np.ndarray) -> bytes:
    return encode(Image.fromarray(values.astype(np.float32)), "TIFF")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP, RAMP * 255),
        (RAMP * 0.1, RAMP * 25.5),
        (RAMP * 1.02, (RAMP * 1.02).clip(0, 1) * 255),  # one pixel above 1 must not make the rest black
        (RAMP * 1.2 - 0.1, (RAMP * 1.2 - 0.1).clip(0, 1) * 255),
        (RAMP * 255, RAMP * 255),
        (RAMP * 100, RAMP * 100),
        (RAMP * 0, RAMP * 0),
    ],
    ids=["unit", "dark unit", "overshoot", "overshoot both", "8 bits", "dark 8 bits", "black"],
)
def test_float_images(values, expected):
    assert np.abs(pixels(floats(values))[..., 0] - expected).max() < 1
    assert np.abs(pixels(tiff((values).astype("<f4"), 32, 3))[..., 0] - expected).max() < 1


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (RAMP * 2000, "between 0 and 2000"),
        (RAMP * 65535, "cannot tell what is white"),
        (RAMP * 10, "between 0 and 10"),
        (RAMP * 200 - 100, "between -100 and 100"),
        (np.where(RAMP == 1, np.nan, RAMP), "not finite"),
        (np.where(RAMP == 0, -np.inf, RAMP), "not finite"),
    ],
    ids=["large", "16 bits", "neither", "negative", "nan", "inf"],
)
def test_float_images_that_nobody_can_read(values, reason):
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode_image(floats(values))
    assert "\n" not in str(caught.value)


# Colours -------------------------------------------------------------------------------------------------------------


def matrix_profile(gamma: float, primaries: list[tuple[float, float, float]], size: int = 0) -> bytes:
    """An ICC profile, version 2, of three primaries (XYZ under D50) and a gamma; padded to `size` bytes."""

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": xyz((0.9642, 1.0, 0.8249)), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    tags |= {name: xyz(values) for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 81 + b"\0" * 3
    tags[b"cprt"] = b"text\0\0\0\0none\0\0\0\0"
    if size:
        tags[b"pads"] = b"data\0\0\0\0" + np.random.default_rng(0).bytes(size // 4 * 4)
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", place + len(body), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    head += b"".join(struct.pack(">i", round(value * 65536)) for value in (0.9642, 1.0, 0.8249))
    return head + b"\0" * (128 - len(head)) + struct.pack(">I", len(tags)) + table + body


WIDE = [(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)]  # Display P3
SRGB = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def smooth() -> Image.Image:
    return Image.fromarray(noise(3, 6, 8)).resize((96, 72), Image.Resampling.BICUBIC)


def as_srgb(image: Image.Image, profile: bytes) -> np.ndarray:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return np.asarray(converted).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("size", [0, 3_000_000], ids=["small", "megabytes"])
def test_colours_of_a_profile_become_srgb(kind, size):
    profile = matrix_profile(2.2, WIDE, size)
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encode(smooth(), kind, icc_profile=profile, **options)
    stored = Image.open(io.BytesIO(encode(smooth(), kind, **options))).convert("RGB")
    expected = as_srgb(stored, profile)
    assert np.abs(expected - np.asarray(stored)).max() > 20  # there is something to convert
    decoded = decode_image(data)
    assert np.array_equal(np.asarray(decoded), expected)
    # Converted once, whoever looks at it again.
    assert np.array_equal(np.asarray(pil_to_rgb(decoded)), expected)
    if size == 0:
        for processor in PROCESSORS:
            for way in (Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data)).convert("RGB"), decoded):
                (seen,) = processor(**AS_IT_IS)(way, return_tensors="np")["pixel_values"]
                assert np.array_equal(seen.transpose(1, 2, 0), expected)


def test_profiles_with_alpha_palettes_and_grey():
    profile = matrix_profile(2.2, WIDE)
    alpha = noise(5, 72, 96)[..., 0]
    rgba = smooth().copy()
    rgba.putalpha(Image.fromarray(alpha))
    expected = composited(as_srgb(smooth(), profile), alpha)
    assert np.abs(pixels(encode(rgba, icc_profile=profile)) - expected).max() <= 1
    palette = smooth().quantize(32)
    expected = as_srgb(palette.convert("RGB"), profile)
    assert np.array_equal(pixels(encode(palette, icc_profile=profile)), expected)


@pytest.mark.parametrize(
    "profile",
    [SRGB_PROFILE, b"", b"nonsense", SRGB_PROFILE[:200], SRGB_PROFILE[:-40], matrix_profile(2.2, WIDE)[:300]],
    ids=["sRGB", "empty", "nonsense", "cut", "a little cut", "cut wide"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_profiles_that_change_nothing(profile, kind):
    data = encode(smooth(), kind, icc_profile=profile)
    assert np.array_equal(pixels(data), pixels(encode(smooth(), kind)))


def test_a_profile_left_over_from_another_mode_is_ignored():
    image = smooth()
    image.info["icc_profile"] = matrix_profile(2.2, WIDE)
    grey = image.convert("L")
    assert "icc_profile" in grey.info
    assert np.array_equal(np.asarray(pil_to_rgb(grey))[..., 0], np.asarray(grey))


def test_plain_jpegs_are_those_in_srgb():
    """The device's decoder knows no profiles."""
    for profile, plain in ((None, True), (SRGB_PROFILE, True), (matrix_profile(2.2, WIDE), False)):
        with EncodedImage(encode(smooth(), "JPEG", icc_profile=profile)) as encoded:
            assert (encoded.plain_jpeg() is not None) == plain
    with EncodedImage(encode(smooth().convert("L"), "JPEG", icc_profile=matrix_profile(2.2, WIDE))) as encoded:
        assert encoded.plain_jpeg() is not None  # of three channels, and the image has one


def test_reduced_jpegs_are_converted_alike():
    profile = matrix_profile(2.2, WIDE)
    with EncodedImage(encode(smooth(), "JPEG", quality=95, icc_profile=profile)) as encoded:
        small, by = encoded.decode(4)
    whole = decode_image(encode(smooth(), "JPEG", quality=95, icc_profile=profile))
    means = np.asarray(whole, dtype=float).reshape(18, 4, 24, 4, 3).mean((1, 3))
    assert by == 4 and np.abs(means - np.asarray(small)).mean() < 2


def test_lab_and_inverted_cmyk():
    lab = ImageCms.profileToProfile(
        smooth(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.abs(pixels(encode(lab, "TIFF")) - np.asarray(smooth())).mean() < 4  # 8 bits of LAB are coarse
    cmyk = encode(smooth().convert("CMYK"), "JPEG", quality=95)  # as Adobe's, with inverted inks
    assert np.abs(pixels(cmyk) - np.asarray(smooth())).mean() < 4


@pytest.mark.parametrize("kind", [b"iTXt", b"zTXt"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_metadata_of_megabytes(kind, place):
    """Editors write their history into it; Pillow refuses more than one megabyte."""
    text = b"XML:com.adobe.xmp\0" + (b"\1\0\0\0" if kind == b"iTXt" else b"\0") + zlib.compress(b"a" * 3_000_000)
    png = encode(smooth())
    part = chunk(kind, text)
    data = with_chunks(png, part) if place == "before" else png[:-12] + part + png[-12:]
    assert np.array_equal(pixels(data), np.asarray(smooth()))


# Formats -------------------------------------------------------------------------------------------------------------

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64
AVIF_SEQUENCE = b"\0\0\0\x18ftypavis\0\0\0\0avisxxxx" + b"\0" * 64


def test_heic_without_its_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BrokenImage, match=r"HEIC.*pip install pillow-heif"):
        decode_image(HEIC)
    file = tmp_path / "IMG_0001.HEIC"
    file.write_bytes(HEIC)
    with pytest.raises(OSError, match=r"HEIC.*pip install pillow-heif"):
        PoolFormerImageProcessor()(str(file))


def test_heic_with_its_library(monkeypatch):
    """The library is imported when the first such file is met, and asked for nothing else."""
    calls = []
    library = types.ModuleType("pillow_heif")
    library.register_heif_opener = lambda: calls.append(1)
    monkeypatch.setitem(sys.modules, "pillow_heif", library)
    decode_image(encode(smooth()))
    assert not calls
    with pytest.raises(BrokenImage):
        decode_image(HEIC)  # no pixels in it
    assert calls


def test_heic_photographs():
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(smooth()).save(file, quality=95)
    assert np.abs(pixels(file.getvalue()) - np.asarray(smooth())).mean() < 4


def test_avif_without_a_decoder(monkeypatch):
    from PIL import features

    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(BrokenImage, match=r"AVIF.*Pillow"):
        decode_image(AVIF_SEQUENCE)


def test_other_files_are_still_no_images():
    from PIL import features

    sequences = [AVIF_SEQUENCE] if features.check("avif") else []  # older than that, Pillow reads none of its kind
    for data in (*sequences, b"ftyp" * 20, b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + b"\0" * 64, b"abc"):
        with pytest.raises(BrokenImage, match="not an image in a format"):
            decode_image(data)
