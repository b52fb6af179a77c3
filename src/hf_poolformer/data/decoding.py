"""Bytes to pixels, for images that nobody has vouched for."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from ..foundation.errors import one_line
from ..image_channels import TIFF, ArrayFile, pil_to_channels, read_array, read_tiff
from ..image_pixels import changes_colours, on_white, open_encoded, pil_to_rgb, upright


try:
    import simplejpeg
except ImportError:
    simplejpeg = None


# Pillow's own limit for refusing an image outright: 179 megapixels, half a gigabyte once decoded.
MAX_PIXELS = 2 * 89_478_485
# Evaluation resizes the short side to a fixed length, so a line of 60 000 x 1 pixels would grow to gigabytes.
MAX_ASPECT_RATIO = 500

# End of image, and how far from the end of the file it is looked for: some programs write notes behind it.
_JPEG_END = b"\xff\xd9"
_JPEG_TAIL = 4096
# What does not belong between coded pixels, where FF is followed by 00 or starts a restart marker.
_STRAY_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
# Rows decoded beyond those that are wanted: colours are interpolated from the rows beside.
_MARGIN = 16
# Local files up to this size, in bytes, are read at once.
_READ_AT_ONCE = 1 << 26
# EXIF's orientations that are not upright already, and how Pillow turns the image.
TURNS = {
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


class EncodedImage:
    """One image whose header has been read and judged; its pixels are still encoded where that can be of use.

    A JPEG's size is known from its first bytes, and libjpeg can decode it at a half, a quarter or an eighth of it, for
    less work. So whoever needs a part of an image decides here which part and how fine, and then decodes. All other
    formats are decoded at once. A context manager, which closes the file.

    Args:
        source: encoded bytes, a path, the `{"bytes", "path"}` of an undecoded `datasets.Image`, whose path may be
            remote (`hf://`, `https://`, `zip://...::`), or a `PIL.Image.Image`.
        num_channels: what the image is wanted as: 3 is RGB, and with any other number `image_channels` has the rules.
        max_pixels: images of more pixels are refused before they are decoded.
        token: Hub token for a remote path.

    Attributes:
        height, width: of the image when it is upright, in pixels.
        orientation: as in EXIF, 1 to 8: how the stored image must be turned to be upright.
        name: the path by which a person would look for it, or None.
        format, mode: how it is stored, in the words of Pillow ("JPEG", "RGB"); of an array "array" and its type of
            numbers.

    Raises:
        BrokenImage: for anything that does not decode, whatever the reason.
    """

    def __init__(
        self,
        source: bytes | str | os.PathLike | Mapping[str, Any] | Image.Image | None,
        *,
        num_channels: int = 3,
        max_pixels: int = MAX_PIXELS,
        token: str | bool | None = None,
    ):
        self.name, self._num_channels = describe_source(source), num_channels
        self._files = contextlib.ExitStack()
        self._planes: torch.Tensor | None = None
        try:
            with broken_if_it_fails(max_pixels):
                if isinstance(source, Image.Image):
                    self._file, image = None, source
                else:
                    self._file = self._files.enter_context(_open_source(source, token))
                    array, image = self._open(3 * max_pixels)
                    if array is not None:
                        self.format, self.mode = "array", str(array.values.dtype)
                        self._planes = _planes_of(array, num_channels)
                        self._image, self._scalable, self.orientation = None, False, 1
                        self.height, self.width = self._planes.shape[1:]
                        _judge_size(self.width, self.height, max_pixels)
                        return
                _judge_size(*image.size, max_pixels)
                self._image, self.format, self.mode = image, image.format, image.mode
                self._scalable = self._file is not None and image.format in ("JPEG", "MPO")
                if not self._scalable:
                    image.load()  # of an animation, the first frame; some formats tell their orientation only now
                self.orientation = orientation_of(image)
                width, height = image.size
                self.height, self.width = (width, height) if self.orientation >= 5 else (height, width)
        except BaseException:
            self.close()
            raise

    def _open(self, max_values: int) -> tuple[ArrayFile | None, Image.Image | None]:
        """A file that holds an array, or an image that Pillow opens."""
        # Of several channels Pillow reads few TIFFs, and of these some as something else.
        array = read_array(self._file, self._num_channels not in (1, 3), max_values)
        if array is not None:
            return array, None
        try:
            return None, self._files.enter_context(open_encoded(self._file))
        except Image.UnidentifiedImageError:
            self._file.seek(0)
            if self._num_channels != 1 or not self._file.read(4).startswith(TIFF):
                raise
        self._file.seek(0)
        return read_tiff(self._file, max_values), None

    def __enter__(self) -> EncodedImage:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()

    def decode(self, reduction: int = 1) -> tuple[Image.Image | torch.Tensor, int]:
        """The image, RGB in the colours of sRGB and upright, and how many times smaller it is than it was stored.

        Of another number of channels a tensor (channels, height, width), uint8 or float32 between 0 and 255.

        Args:
            reduction: 1, 2, 4 or 8. JPEGs shrink by it, the incomplete pixels at the right and bottom edge of the
                stored image included; other images keep their size.

        Raises:
            BrokenImage: the pixels cannot be read.
        """
        with broken_if_it_fails():
            if self._planes is not None:
                return (self._planes if self._num_channels != 3 else _as_rgb(self._planes)), 1
            image, reduced = self._image, 1
            if reduction > 1 and self._scalable:
                width, height = image.size
                scaled = image.draft(None, (max(width // reduction, 1), max(height // reduction, 1)))
                reduced = 1 if scaled is None else round(width / scaled[1][2])
            image.load()
            if self._num_channels != 3:
                return upright(pil_to_channels(image, self._num_channels), self.orientation), reduced
            rgb = pil_to_rgb(image)
            transpose = TURNS.get(self.orientation)
            return (rgb if transpose is None else rgb.transpose(transpose)), reduced

    def pixels(self, reduction: int = 1, rows: int | None = None) -> tuple[np.ndarray, int]:
        """As `decode`, (height, width, channels), which may be read-only; of a JPEG perhaps not all of it.

        Args:
            rows: so many from the top are wanted, and those below may be missing. What is broken there is not noticed,
                but a file without its end is.
        """
        if reduction == 1 and self.orientation == 1 and self._num_channels == 3:
            data = self.plain_jpeg()
            if data is not None and data.endswith(_JPEG_END):
                early = rows is not None and rows + _MARGIN < self.height
                with contextlib.suppress(Exception):  # `decode` will say what is wrong, if anything is
                    return _decode_plain(data, rows + _MARGIN if early else None), 1
        image, reduced = self.decode(reduction)
        return (image.permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) else np.asarray(image)), reduced

    def plain_jpeg(self) -> bytes | None:
        """The encoded bytes if they are a JPEG such as every decoder reads: whole, grey or YCbCr. None otherwise.

        Not plain are CMYK, RGB stored as such, colours of another profile than sRGB, several pictures in one file, and
        a file without its end, of which decoders make different things. Arithmetic coding is not looked for: a decoder
        that lacks it says so.
        """
        image = self._image
        if not self._scalable or image.format != "JPEG" or image.mode not in ("L", "RGB"):
            return None
        if (image.mode == "RGB" and image.info.get("adobe_transform") == 0) or changes_colours(image):
            return None
        with broken_if_it_fails():
            self._file.seek(0)
            data = self._file.read()
        return data if _JPEG_END in data[-_JPEG_TAIL:] else None


def _shortened(data: bytes, rows: int) -> bytearray | None:
    """A JPEG whose header says that it has no more than so many rows, at which decoders stop.

    None unless it has all colours in one scan, from top to bottom, in which no marker stands where none belongs: those
    stop Pillow's decoding.
    """
    position, height_at, components = 2, 0, 0
    while position + 9 < len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in (0xC0, 0xC1):  # start of a frame, coded sequentially
            height_at, components = position + 5, data[position + 9]
        elif marker == 0xDA:  # start of a scan
            if not height_at or data[position + 4] != components:
                return None
            if _STRAY_MARKER.search(data, position + 2).start() != len(data) - len(_JPEG_END):
                return None
            shortened = bytearray(data)
            shortened[height_at : height_at + 2] = rows.to_bytes(2, "big")
            return shortened
        position += 2 + length
    return None


def _decode_plain(data: bytes, rows: int | None) -> np.ndarray:
    """Pixels of a plain JPEG, uint8 (height, width, 3): those of Pillow, by simplejpeg in less time where it is.

    Raises:
        Exception: anything, where something is wrong with it or only seems to be.
    """
    shortened = None if rows is None else _shortened(data, rows)
    content = data if shortened is None else shortened
    if simplejpeg is not None:
        # Of a shortened one it would complain about what is left over.
        return simplejpeg.decode_jpeg(content, "RGB", strict=shortened is None)
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def decode_image(
    source: bytes | str | os.PathLike | Mapping[str, Any] | Image.Image | None,
    *,
    num_channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    token: str | bool | None = None,
) -> Image.Image | torch.Tensor:
    """Decodes one image to RGB, upright, first frame; arguments and errors as of `EncodedImage`.

    With another number of channels, a tensor as of `EncodedImage.decode`.

    What becomes of alpha, profiles, 16 bits and floats is in `image_pixels.py`, and of other channels in
    `image_channels.py`."""
    with EncodedImage(source, num_channels=num_channels, max_pixels=max_pixels, token=token) as encoded:
        return encoded.decode()[0]


def _planes_of(array: ArrayFile, num_channels: int) -> torch.Tensor:
    """The pixels of a file that holds an array; of what is to be RGB, the channels that it has."""
    if num_channels != 3:
        return array.planes(num_channels)
    shape = array.values.shape
    for number in (3, 4, 1):
        if len(shape) == 2 or (len(shape) == 3 and number in (shape[0], shape[2])):
            return array.planes(1 if len(shape) == 2 else number)
    raise BrokenImage(f"an array of shape {tuple(shape)}, which is neither grey nor RGB nor RGBA")


def _as_rgb(planes: torch.Tensor) -> Image.Image:
    """(1, 3 or 4, H, W), grey, RGB or RGBA, as an image."""
    eight_bits = planes if planes.dtype == torch.uint8 else planes.round().to(torch.uint8)
    rgb = on_white(eight_bits, 255.0) if len(planes) == 4 else eight_bits.expand(3, -1, -1)
    return Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy())


@contextlib.contextmanager
def broken_if_it_fails(max_pixels: int = MAX_PIXELS) -> Iterator[None]:
    """Whatever is raised within the block becomes a BrokenImage that says it in words."""
    try:
        with warnings.catch_warnings():
            # Corrupt EXIF, sizes between Pillow's two limits: judged here, and not worth a line per image.
            warnings.simplefilter("ignore")
            yield
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


def _judge_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BrokenImage(f"{width}x{height} pixels, more than the limit of {max_pixels}")
    if width * height == 0:
        raise BrokenImage(f"{width}x{height} pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BrokenImage(f"{width}x{height} pixels, beyond an aspect ratio of {MAX_ASPECT_RATIO}")


def orientation_of(image: Image.Image) -> int:
    """EXIF's, 1 to 8: how the stored image must be turned to be upright. Some formats tell it only when loaded."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if orientation in TURNS else 1
    except Exception:  # EXIF is a format of its own to be broken in; the pixels are fine
        return 1


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
    status = os.stat(source)
    if not stat.S_ISREG(status.st_mode):
        raise BrokenImage("not a file")
    if status.st_size == 0:
        raise BrokenImage("empty file (0 bytes)")
    if status.st_size > _READ_AT_ONCE:
        return open(source, "rb")
    with open(source, "rb", buffering=0) as file:
        return io.BytesIO(file.readall())
