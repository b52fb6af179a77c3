"""Images for models that take another number of channels than RGB's three: N of them, as a tensor (N, height, width).

    which       of an array the axis of length N holds the channels, first or last; TIFF says which it is
    one         grey; of colours, their luma (ITU-R 601), with alpha on white and profiles as `image_pixels` has it
    two         grey and alpha, as PNG has them, or any two
    four        red, green, blue and alpha (RGBA), or any four; alpha is a channel like the others, and CMYK is refused
    8 bits      stay what they are, 0..255
    16 bits     65535 is white, or what a TIFF declares; never guessed from the image, whose bands would change scale
    floats      0..1 (what overshoots it by up to a half is clipped) or 0..255 (then something is above 32)

16 bits and floats become float32 between 0 and 255 and keep what 8 bits would lose. An image with another number of
channels is refused, and so is any other type of number, which does not say what is white.
"""

import io
import math
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

from .image_pixels import (
    SHORTENED,
    SIXTEEN_BITS,
    check_shortened,
    declared_range,
    floats_to_levels,
    is_wide,
    pil_to_rgb,
    pil_to_tensor,
    upright,
)


NPY = b"\x93NUMPY"
# Classic TIFF and BigTIFF, little and big endian.
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Colours of TIFF files that are for printing, not for channels: PhotometricInterpretation.
SEPARATED = 5
# Values of one image that are read at once: half a gigabyte of 8 bits, as Pillow's own limit.
MAX_VALUES = 3 * 2 * 89_478_485


class ArrayFile(NamedTuple):
    """The pixels of a file that holds an array, not yet known to be an image of so many channels.

    Attributes:
        channels_first: whether the channels are known to be first, or last; None where the shape must tell.
        white: of integers, what is white where the file says it; None: what the type holds.
        inverted: zero is white.
        orientation: as in EXIF, 1 to 8.
    """

    values: np.ndarray
    channels_first: bool | None = None
    white: int | None = None
    inverted: bool = False
    orientation: int = 1

    def planes(self, number: int) -> torch.Tensor:
        """(number, height, width), upright, uint8 or float32 between 0 and 255. Errors as of `to_channels`."""
        values = torch.from_numpy(self.values)
        if values.is_floating_point():
            values = floats_to_levels(values.float())
        planes = to_channels(values, number, self.channels_first, self.white)
        return upright(255 - planes if self.inverted else planes, self.orientation)


def read_array(file: BinaryIO, tiff: bool = True, max_values: int = MAX_VALUES) -> ArrayFile | None:
    """What an NPY file or, if `tiff`, a TIFF file holds; None for other files, of which nothing is consumed.

    Raises:
        ValueError: Python objects, more values than the limit, a file that ends early, or no TIFF reader (tifffile).
    """
    head = file.read(len(NPY))
    file.seek(0)
    if head == NPY:
        return read_npy(file, max_values)
    return read_tiff(file, max_values) if tiff and head.startswith(TIFF) else None


def read_npy(file: BinaryIO, max_values: int = MAX_VALUES) -> ArrayFile:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError("an NPY file with names of fields, not with pixels")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read_header(file)
    check_array(shape, kind, max_values)
    # The header is believed only as far as there are bytes: else memory for all that it claims would be taken first.
    start = file.tell()
    if file.seek(0, io.SEEK_END) - start < math.prod(shape) * kind.itemsize:
        raise ValueError("an NPY file that ends early")
    file.seek(0)
    return ArrayFile(native(np.load(file, allow_pickle=False)))


def read_tiff(file: BinaryIO, max_values: int = MAX_VALUES) -> ArrayFile:
    """The first image of a TIFF; pages of one channel each that belong together are its channels."""
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            "a TIFF of several channels, which needs another library: pip install 'hf-poolformer[multispectral]'"
        ) from None
    with tifffile.TiffFile(file) as tiff:
        pages = tiff.pages
        series = tiff.series[0]
        page = pages[0]
        if page.photometric == SEPARATED:
            raise ValueError("colours for printing (CMYK), which are no channels")
        check_array(series.shape, series.dtype, max_values)
        values = native(series.asarray(maxworkers=1))
        axes, tags = series.get_axes(True), page.tags
        bits = page.bitspersample if isinstance(page.bitspersample, int) else page.bitspersample[0]
        orientation = tags["Orientation"].value if "Orientation" in tags else 1
    values = values.reshape([length for length in values.shape if length != 1] if values.ndim > 3 else values.shape)
    wide = values.dtype.kind == "u" and bits < 8 * values.dtype.itemsize
    return ArrayFile(
        np.ascontiguousarray(values),
        None if values.ndim < 3 else axes[-1] != "S",
        (1 << bits) - 1 if wide else None,
        page.photometric == 0,  # MINISWHITE
        orientation if orientation in range(1, 9) else 1,
    )


def check_array(shape: tuple[int, ...], kind: np.dtype | None, max_values: int) -> None:
    """ValueError for what is no image, before it is read."""
    if kind is None or kind.kind not in "buif":
        raise ValueError(f"an array of {kind}, not of numbers")
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"an array of shape {tuple(shape)}, which is no image")
    if math.prod(shape) * kind.itemsize > max_values:
        raise ValueError(
            f"an array of shape {tuple(shape)}, {kind}, more than the limit of {max_values} bytes, refused as a "
            "decompression bomb"
        )


def native(values: np.ndarray) -> np.ndarray:
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def pil_to_channels(image: Image.Image, number: int) -> torch.Tensor:
    """A PIL image as (number, height, width), uint8 or float32 between 0 and 255.

    Raises:
        ValueError: it has other channels.
    """
    if number == 1:
        if is_wide(image):
            return wide_to_levels(image)[None]
        return pil_to_tensor(pil_to_rgb(image).convert("L"))[None]
    bands = len(image.getbands())
    if (image.mode, number) not in (("LA", 2), ("RGBA", 4)):
        raise ValueError(
            f"an image of {bands} channel{'s' if bands > 1 else ''} ({image.mode}), and the model takes {number}"
        )
    if SHORTENED in image.info:
        check_shortened(image)
    return pil_to_tensor(image).permute(2, 0, 1)


def wide_to_levels(image: Image.Image) -> torch.Tensor:
    """16-bit and float images, (height, width), as float32 between 0 and 255; what is transparent is white."""
    values = pil_to_tensor(image)
    if values.is_floating_point():
        levels = floats_to_levels(values)
    else:
        values = values.to(torch.int64)
        low, high = (bound.item() for bound in values.aminmax())
        if low < 0 or high > SIXTEEN_BITS:
            raise ValueError(f"pixels between {low} and {high}: cannot tell what is white. Save them as 16 bits")
        black, white = declared_range(image) or (0, SIXTEEN_BITS)
        scale = (black if white == 0 else white) or SIXTEEN_BITS
        levels = (values * (255 / scale)).float().clamp(max=255)
    inverted = (declared_range(image) or (0, None))[1] == 0
    levels = 255 - levels if inverted else levels
    if isinstance(image.info.get("transparency"), int):
        levels = torch.where(values == image.info["transparency"], 255.0, levels)
    return levels


def to_channels(
    values: torch.Tensor, number: int, first: bool | None = None, white: int | None = None
) -> torch.Tensor:
    """Any (H, W), (C, H, W) or (H, W, C) tensor as (number, H, W), uint8 or float32; floats stay as they are.

    Args:
        first: whether the channels are the first axis; None: the one of that length is.
        white: of 16 bits; None: 65535.

    Raises:
        ValueError: no axis or two are of that length, or a type of integers that does not say what is white.
    """
    shape = tuple(values.shape)
    if values.ndim == 2:
        values, first = values[None], True
    elif values.ndim != 3:
        raise ValueError(f"an array of shape {shape}, and not one image")
    elif first is None:
        # Of colours one channel can be made, if nothing else fits.
        wanted = number if number != 1 or 1 in (shape[0], shape[2]) else 3
        ends = [axis for axis in (0, 2) if shape[axis] == wanted]
        if len(ends) == 2:
            raise ValueError(f"shape {shape}, of which the first and the last axis may be the {wanted} channels")
        if not ends:
            raise ValueError(f"shape {shape}, in which no axis is one of {number} channels")
        first = ends[0] == 0
    planes = values if first else values.permute(2, 0, 1)
    if len(planes) != number and (number, len(planes)) != (1, 3):
        raise ValueError(f"{len(planes)} channels (shape {shape}), and the model takes {number}")
    planes = integers_to_levels(planes, white)
    if len(planes) == number:
        return planes
    return grey(planes)


def grey(planes: torch.Tensor) -> torch.Tensor:
    """(3, H, W) to (1, H, W): luma, of 8 bits with Pillow's rounding."""
    weights = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)
    if planes.dtype == torch.uint8:
        return ((planes.to(torch.int64) * weights).sum(0, keepdim=True) + 0x8000 >> 16).to(torch.uint8)
    return (planes * (weights / 65536)).sum(0, keepdim=True)


def integers_to_levels(values: torch.Tensor, white: int | None = None) -> torch.Tensor:
    if values.dtype == torch.uint8 and white is None:
        return values
    if values.is_floating_point():
        return values.float()
    if values.dtype == torch.bool:
        return values.to(torch.uint8) * 255
    if values.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(
            f"pixels of {str(values.dtype).removeprefix('torch.')}, of which nobody can tell what is white: save them "
            "as uint8, as uint16 or as floats from 0 to 1"
        )
    return (values.to(torch.int32) * (255 / (white or SIXTEEN_BITS))).float()
