"""JPEGs decoded on the device, by whatever is installed that can; what it cannot read, Pillow reads."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from ..data.decoding import BrokenImage, decode_image
from ..foundation.errors import one_line
from ..image_pixels import upright


class JpegHeader(Protocol):
    """EXIF's orientation, and the size of the upright image."""

    orientation: int
    height: int
    width: int


def by_torchcodec(
    encoded: Sequence[torch.Tensor], orientations: Sequence[int], device: torch.device
) -> list[torch.Tensor]:
    # It turns images as EXIF says by itself.
    from torchcodec.decoders import decode_jpeg

    return decode_jpeg(list(encoded), mode="RGB", device=device)


def by_torchvision(
    encoded: Sequence[torch.Tensor], orientations: Sequence[int], device: torch.device
) -> list[torch.Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        # torchvision 0.29 says that TorchCodec will take over, which not everybody has installed.
        warnings.simplefilter("ignore")
        images = decode_jpeg(list(encoded), mode=ImageReadMode.RGB, device=device)
    return [upright(image, orientation) for image, orientation in zip(images, orientations, strict=True)]


# From JPEGs, 1-D uint8 on the CPU, with EXIF's orientations, to upright images, uint8 (3, H, W), on a device; on a GPU
# by nvJPEG. A RuntimeError says that one of them cannot be read.
DECODERS: dict[str, Callable[[Sequence[torch.Tensor], Sequence[int], torch.device], list[torch.Tensor]]] = {
    "torchcodec": by_torchcodec,
    "torchvision": by_torchvision,
}


def working_decoders(device: torch.device) -> tuple[list[str], str]:
    """Names of those that decode a JPEG on this device, and why the others do not."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    jpeg = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    names, faults = [], []
    for name, decode in DECODERS.items():
        try:
            decode([jpeg], [1], device)
        except ModuleNotFoundError:
            faults.append(f"{name}: not installed")
        except Exception as error:  # a library built for another CUDA fails in any way it likes
            faults.append(f"{name}: {one_line(error)}")
        else:
            names.append(name)
    return names, "; ".join(faults)


def decode_upright(
    decoder: str, encoded: Sequence[torch.Tensor], headers: Sequence[JpegHeader], device: torch.device
) -> tuple[list[torch.Tensor | BrokenImage], int]:
    """JPEGs decoded on the device, uint8 (3, H, W), turned as EXIF says; Pillow reads those that the device cannot.

    One JPEG that the device cannot read spoils its batch, and is looked for by halving.

    Args:
        decoder: its name in `DECODERS`.

    Returns:
        the images, and how many of them had to be read by Pillow.
    """
    try:
        images = DECODERS[decoder](encoded, [header.orientation for header in headers], device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        middle = len(encoded) // 2
        if middle:
            first, second = (
                decode_upright(decoder, encoded[part], headers[part], device)
                for part in (slice(middle), slice(middle, None))
            )
            return first[0] + second[0], first[1] + second[1]
        return [decoded_by_pillow(encoded[0], device)], 1
    # Where a decoder makes something else of a file than its header said, what was drawn would not fit.
    odd = [
        index
        for index, (image, header) in enumerate(zip(images, headers, strict=True))
        if image.shape[1:] != (header.height, header.width)
    ]
    for index in odd:
        images[index] = decoded_by_pillow(encoded[index], device)
    return images, len(odd)


def decoded_by_pillow(encoded: torch.Tensor, device: torch.device) -> torch.Tensor | BrokenImage:
    try:
        image = decode_image(encoded.numpy().tobytes())
    except BrokenImage as reason:
        return reason
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)
