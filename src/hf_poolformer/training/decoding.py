"""Bytes to pixels, for images that nobody has vouched for."""

import io
import os
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..image_processing_poolformer import pil_to_rgb
from .files import one_line


# Pillow's own limit for refusing an image outright: 179 megapixels, half a gigabyte once decoded.
MAX_PIXELS = 2 * 89_478_485
# Evaluation resizes the short side to a fixed length, so a line of 60 000 x 1 pixels would grow to gigabytes.
MAX_ASPECT_RATIO = 500

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImage(Exception):
    """This image cannot be used, and the message says why; the images beside it may be fine."""


def decode_image(
    source: bytes | str | os.PathLike | Mapping[str, Any] | Image.Image | None,
    *,
    max_pixels: int = MAX_PIXELS,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
    token: str | bool | None = None,
) -> Image.Image:
    """Decodes one image to RGB, upright, first frame.

    Args:
        source: encoded bytes, a path, the `{"bytes", "path"}` of an undecoded `datasets.Image`, whose path may be
            remote (`hf://`, `https://`, `zip://...::`), or a `PIL.Image.Image`.
        max_pixels: images of more pixels are refused before they are decoded.
        max_aspect_ratio: images longer than this many times their width (or the reverse) are refused.
        token: Hub token for a remote path.

    Raises:
        BrokenImage: for anything that does not decode, whatever the reason.
    """
    try:
        if isinstance(source, Image.Image):
            return _decode(source, max_pixels, max_aspect_ratio)
        with _open_source(source, token) as file, warnings.catch_warnings():
            # Corrupt EXIF, sizes between Pillow's two limits: judged below, and not worth a line per image.
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                return _decode(image, max_pixels, max_aspect_ratio)
    except BrokenImage:
        raise
    except Image.DecompressionBombError:
        raise BrokenImage(f"more than {max_pixels} pixels, refused as a decompression bomb") from None
    except Image.UnidentifiedImageError:
        raise BrokenImage("not an image in a format that Pillow knows") from None
    except FileNotFoundError:
        raise BrokenImage("no such file") from None
    except MemoryError:
        raise BrokenImage("not enough memory to decode it") from None
    except Exception as error:
        # Parsers of foreign bytes raise anything at all: struct.error, SyntaxError, IndexError, zlib.error ...
        raise BrokenImage(getattr(error, "strerror", None) or one_line(error)) from None


def describe_source(source: Any) -> str | None:
    """The path by which a person would look for this image, or None if it has none."""
    if isinstance(source, Mapping):
        source = source.get("path")
    return os.fspath(source) if isinstance(source, str | os.PathLike) and os.fspath(source) else None


def read_bytes(path: str, token: str | bool | None = None) -> bytes:
    """Encoded bytes from a local or remote path."""
    with _open_source(path, token) as file:
        return file.read()


def _decode(image: Image.Image, max_pixels: int, max_aspect_ratio: float) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise BrokenImage(f"{width}x{height} pixels, more than the limit of {max_pixels}")
    if width * height == 0:
        raise BrokenImage(f"{width}x{height} pixels")
    if max(width, height) > max_aspect_ratio * min(width, height):
        raise BrokenImage(f"{width}x{height} pixels, beyond an aspect ratio of {max_aspect_ratio:g}")
    image.load()  # of an animation, the first frame
    rgb = pil_to_rgb(image)
    transpose = _ORIENTATIONS.get(_orientation(image))
    return rgb.transpose(transpose) if transpose is not None else rgb


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # EXIF is a format of its own to be broken in; the pixels are fine
        return None


def _open_source(source: Any, token: str | bool | None) -> Any:
    if isinstance(source, Mapping):
        data = source.get("bytes")
        source = source.get("path") if data is None else data
    if source is None:
        raise BrokenImage("there is no image in this row")
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) == 0:
            raise BrokenImage("empty (0 bytes)")
        return io.BytesIO(source)
    if "://" in str(source):
        from datasets import DownloadConfig
        from datasets.utils.file_utils import xopen

        return xopen(str(source), "rb", download_config=DownloadConfig(token=token))
    status = Path(source).stat()
    if not stat.S_ISREG(status.st_mode):
        raise BrokenImage("not a file")
    if status.st_size == 0:
        raise BrokenImage("empty file (0 bytes)")
    return open(source, "rb")
