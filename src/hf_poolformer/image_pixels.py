"""What becomes of the pixels of a file: one set of rules for training, prediction, servers, exports and pipelines.

Everything ends as 8-bit RGB in the colours of sRGB; what cannot be understood is refused with a reason.

    alpha       composited on white, wherever it is: RGBA, LA, PA, transparent entries of a palette, one transparent
                colour
    profiles    colours of an ICC profile are converted to sRGB; a profile that says sRGB, that is for other channels
                than the image has, or that cannot be read changes nothing
    16 bits     0 is black; white is what a TIFF or PGM file declares, else 4095 where no pixel is above it, else 65535
    floats      0..1 (what overshoots it by up to a half is clipped) or 0..255 (then something is above 32)
    CMYK, YCbCr, HSV, LAB, 1 bit    as Pillow converts them
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, PngImagePlugin, features
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What is behind a transparent pixel: the paper on which it is shown, in browsers and in print.
BACKGROUND = 255

# Of images of floats: how far 0..1 may be overshot, as filters do, and what 0..255 has to exceed. In between, an image
# may be a bright one of the first kind or a black one of the second.
OVERSHOOT = 0.5
LEAST_WHITE = 32

TWELVE_BITS = 4095
SIXTEEN_BITS = 65535
# Pillow refuses a PNG with more of compressed metadata than 1 MB, which profiles of printers and histories of editors
# exceed.
MAX_METADATA = 1 << 26

# Largest difference, in levels of 255, that a profile makes and yet says sRGB: rounding, and black points.
SAME_COLOURS = 3
PROFILE_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
GREY_MODES = ("1", "L", "LA", "La")

# In the bytes 4 to 32 of the files that hold them.
HEIF_BRANDS = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"])
AVIF_BRANDS = frozenset([b"avif", b"avis"])

# Notes in `Image.info`, which copies and turned images keep: (what is black, what is white), that Pillow has left
# 8 of 16 bits per colour, and that there are notes.
RANGE = "pixel_range"
SHORTENED = "shortened_pixels"
NOTED = "noted_pixels"


def open_encoded(file: BinaryIO, formats: Sequence[str] | None = None) -> Image.Image:
    """
    `Image.open` of a file object, also for HEIC (if pillow-heif is installed) and with metadata of any size; what the
    file declares about its pixels is noted in the image's `info`.

    Raises:
        ValueError: a format that another library or a newer Pillow reads; whatever Pillow raises.
    """
    PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, MAX_METADATA)
    try:
        image = Image.open(file, formats=formats)
    except Image.UnidentifiedImageError:
        if formats is not None:
            raise
        register_reader(file)
        image = Image.open(file)
    note_pixels(image)
    return image


def register_reader(file: BinaryIO) -> None:
    """Teaches Pillow the format of a file that it does not know, or says what would; does nothing for no image."""
    file.seek(0)
    head = file.read(32)
    file.seek(0)
    if head[4:8] != b"ftyp":
        return
    brands = {head[8:12], *(head[start : start + 4] for start in range(16, len(head), 4))}
    if brands & AVIF_BRANDS and not features.check("avif"):
        raise ValueError("an AVIF image, which Pillow reads from release 11.3 on: pip install --upgrade pillow")
    if brands & HEIF_BRANDS:
        try:
            import pillow_heif
        except ImportError:
            raise ValueError("a HEIC image, which needs another library: pip install pillow-heif") from None
        pillow_heif.register_heif_opener()


def note_pixels(image: Image.Image) -> None:
    """Puts into `image.info`, once, what is known only of an image just opened."""
    if image.format not in ("PNG", "TIFF", "PPM") or NOTED in image.info:
        return
    image.info[NOTED] = True
    span = declared_range(image)
    if span is not None:
        image.info[RANGE] = span
    layout = "".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    if len(image.getbands()) > 1 and ";16" in layout:
        image.info[SHORTENED] = True
    if image.mode == "L" and isinstance(image.info.get("transparency"), int):
        # Of 2 and 4 bits Pillow scales the pixels, and not the level that is transparent.
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(layout, 1)


def declared_range(image: Image.Image) -> tuple[int | None, int | None] | None:
    """(what is black, what is white) of a file of 16 bits or floats, as far as it says; None where it is the usual."""
    if RANGE in image.info:
        return image.info[RANGE]
    if not is_wide(image):
        return None
    if image.format == "PPM" and image.mode == "I":
        return 0, SIXTEEN_BITS  # Pillow has scaled the file's own range to that
    tags = getattr(image, "tag_v2", {})
    white = None
    if tuple(tags.get(258, ())) == (12,):  # BitsPerSample
        white = TWELVE_BITS
    # MaxSampleValue is the brightest pixel, or what the camera can give: only the latter is of this form.
    largest = tags.get(281)
    largest = largest[0] if isinstance(largest, tuple) and largest else largest
    if isinstance(largest, int) and largest in (1023, TWELVE_BITS, 16383):
        white = largest
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero. Pillow inverts 8 bits, and nothing wider.
        return white, 0
    return None if white is None else (0, white)


def is_wide(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def pil_to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, by the rules above; one that needs nothing is returned as it is.

    Raises:
        ValueError: pixels that are not finite, or of which nobody can tell what is white.
    """
    if getattr(image, "tile", None):  # not loaded yet, and opened by somebody else
        note_pixels(image)
    info = image.info
    if image.mode == "RGB" and not ("icc_profile" in info or "transparency" in info or SHORTENED in info):
        return image
    if SHORTENED in info:
        check_shortened(image)
    profile, alpha, colours = info.get("icc_profile"), None, image
    if is_wide(image):
        colours = wide_to_grey(image)
        if isinstance(info.get("transparency"), int):
            opaque = np.asarray(image).astype(np.int64) != info["transparency"]
            alpha = Image.fromarray(opaque.astype(np.uint8) * 255)
    elif has_alpha(image):
        alpha, colours = split_alpha(image)
    colours = to_srgb(colours, profile)
    if alpha is None or alpha.getextrema()[0] == 255:
        return colours
    canvas = Image.new("RGB", image.size, (BACKGROUND,) * 3)
    canvas.paste(colours, mask=alpha)
    return canvas


def has_alpha(image: Image.Image) -> bool:
    if image.mode in ("1", "L", "RGB"):
        # Of other modes it is a left-over.
        kind = tuple if image.mode == "RGB" else int
        return isinstance(image.info.get("transparency"), kind)
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa", "P") and image.has_transparency_data


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Alpha, and the colours without it: L or RGB."""
    grey = image.mode in GREY_MODES
    if image.mode == "RGB" and max(image.info["transparency"]) > 255:
        # A colour in 16 bits, of which Pillow has kept the upper 8.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    return image.getchannel("A"), image.getchannel("R") if grey else image.convert("RGB")


def check_shortened(image: Image.Image) -> None:
    """ValueError for colours of 12 bits in 16, of which Pillow has kept no more than four."""
    colours = zip(image.getbands(), image.getextrema(), strict=True)
    brightest = max((high for name, (_, high) in colours if name in "RGBL"), default=0)
    if 0 < brightest <= TWELVE_BITS >> 8:
        raise ValueError(
            f"colours of 16 bits, none above {TWELVE_BITS}: 12 bits, or almost black. Save it with 8 bits per colour"
        )


def wide_to_grey(image: Image.Image) -> Image.Image:
    """16-bit and float images as mode L."""
    black, white = declared_range(image) or (0, None)
    inverted = white == 0
    if inverted:
        white = black
    values = pil_to_tensor(image)
    values = floats_to_eight_bits(values) if image.mode == "F" else to_eight_bits(values, white)
    return Image.fromarray((255 - values if inverted else values).numpy())


def to_eight_bits(values: torch.Tensor, white: int | None = None) -> torch.Tensor:
    """Integer pixels as uint8, scaled and not clipped.

    bool is 0 or 255. Of 16 bits `white` says what is white, where something does. Else the largest value does: up to
    4095 is 12 bits, up to 65535 is 16 bits; in other types than uint16, up to 255 is 8 bits. Anything else is a
    ValueError.
    """
    if values.dtype == torch.uint8:
        return values
    if values.dtype == torch.bool:
        return values.to(torch.uint8) * 255
    sixteen_bits = values.dtype == torch.uint16
    if sixteen_bits or values.dtype in (torch.uint32, torch.uint64):  # torch computes little on these
        values = values.to(torch.int64)
    low, high = (bound.item() for bound in values.aminmax())
    if not (low >= 0 and high <= SIXTEEN_BITS):
        raise ValueError(
            f"The pixel values lie between {low} and {high}: cannot tell what is white. Give 8-bit values (0 to 255) "
            "or 16-bit values (0 to 65535)."
        )
    if white is None or high > white:
        white = SIXTEEN_BITS if high > TWELVE_BITS else TWELVE_BITS if sixteen_bits or high > 255 else 255
        if white == TWELVE_BITS and high > 0:
            logger.warning_once(
                "An image of 16 bits has no pixel above 4095 and is taken for one of 12 bits, 4095 being white. If "
                "it is a dark one of 16 bits, save it with 8. (Said once.)"
            )
    return (values / (white / 255)).round().to(torch.uint8)


def floats_to_eight_bits(values: torch.Tensor) -> torch.Tensor:
    """As `floats_to_levels`, uint8."""
    return floats_to_levels(values).round().to(torch.uint8)


def floats_to_levels(values: torch.Tensor) -> torch.Tensor:
    """Float pixels of a file, which does not say what is white, between 0 and 255.

    Raises:
        ValueError: not finite, or neither 0..1 nor 0..255.
    """
    low, high = (bound.item() for bound in values.aminmax())
    if not np.isfinite([low, high]).all():
        raise ValueError("pixels that are not finite (NaN or infinity)")
    if low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        if low < 0 or high > 1:
            logger.warning_once(
                "An image of floats between 0 and 1 overshoots that; what is below is black, and above white. (Said "
                "once.)"
            )
        values = values * 255
    elif not (low >= -0.5 and LEAST_WHITE < high < 255.5):
        raise ValueError(
            f"float pixels between {low:.4g} and {high:.4g}: cannot tell what is white. Save them as 0..1 or 0..255"
        )
    return values.clamp(0, 255)


def upright(planes: torch.Tensor, orientation: int) -> torch.Tensor:
    """(C, H, W), stored as EXIF's `orientation` says, 1 to 8, turned so that it is upright."""
    if orientation >= 5:
        planes = planes.mT
    # What is left to mirror: left to right in 2, 3, 6, 7; top to bottom in 3, 4, 7, 8.
    axes = [axis for axis, which in ((-1, (2, 3, 6, 7)), (-2, (3, 4, 7, 8))) if orientation in which]
    return planes.flip(axes) if axes else planes


def on_white(planes: torch.Tensor, white: float) -> torch.Tensor:
    """(4, H, W), colours and alpha, composited on white: (3, H, W). uint8, or floats up to `white`."""
    colours, alpha = planes[:3], planes[3:]
    if planes.dtype == torch.uint8:
        opacity = alpha.to(torch.int32)
        return ((colours * opacity + 255 * (255 - opacity) + 127) // 255).to(torch.uint8)
    share = alpha / white
    return colours * share + white * (1 - share)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in the colours of sRGB; an image that is that already is returned as it is."""
    if image.mode not in (*PROFILE_SPACES, "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = None
    if profile and image.mode in PROFILE_SPACES:
        transform = profile_transform(profile, image.mode)
    elif image.mode == "LAB":
        transform = lab_transform()
    if transform is not None:
        image = ImageCms.applyTransform(image, transform)
        image.info = {}  # so that nobody converts it twice
        return image
    return image if image.mode == "RGB" else image.convert("RGB")


def changes_colours(image: Image.Image) -> bool:
    """Whether the ICC profile of an image, L, RGB or CMYK, says other colours than sRGB."""
    profile = image.info.get("icc_profile")
    return bool(profile) and image.mode in PROFILE_SPACES and profile_transform(profile, image.mode) is not None


@lru_cache(maxsize=32)
def profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the colours of a profile to sRGB; None where that changes nothing or the profile cannot be meant."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != PROFILE_SPACES[mode]:
            return None  # left over from before a conversion
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        levels = np.arange(0, 256, 15 if mode == "RGB" else 1, dtype=np.uint8)
        if mode == "RGB":
            levels = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        sample = Image.fromarray(levels if mode == "RGB" else levels[None])
        converted = np.asarray(ImageCms.applyTransform(sample, transform), dtype=np.int16)
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning_once(f"An ICC profile cannot be used ({error}); its image is taken for sRGB.")
        return None
    difference = np.abs(converted - np.asarray(sample.convert("RGB"), dtype=np.int16)).max()
    return transform if difference > SAME_COLOURS else None


@lru_cache(maxsize=1)
def lab_transform() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def pil_to_tensor(image: Image.Image) -> torch.Tensor:
    values = np.array(image)
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))
