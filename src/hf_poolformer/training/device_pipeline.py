"""The part of the image pipeline that a run may give to its device: augmentation, or decoding and augmentation.

    no       the workers do everything and deliver normalised examples, float32
    augment  the workers decode, crop and resize, and deliver 8-bit crops with what was drawn for each
    decode   the workers read, judge headers and draw, and deliver JPEGs as they are; other images as in `augment`

In all three the workers draw what happens to which image (`TrainTransform.draw`), and the same code does it, so they
differ by no more than the arithmetic of the two devices, and the decoder's. Nothing here is random but the noise of
random erasing, and its seed is drawn with the rest: there is no state for a checkpoint to keep.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.decoding import BrokenImage, EncodedImage, decode_image
from ..data.loader import DecodedBatches
from ..foundation.errors import UserError, one_line
from ..settings.classification import ClassificationSettings
from .augmentation import Draws, ExampleHeader, TrainTransform


# As many pixels as are decoded at once: 200 MB of RGB.
MAX_DECODED_PIXELS = 1 << 26
# As many bytes of crops as a worker augments at once: one of 224 pixels, 42 of 32.
AUGMENTED_AT_ONCE = 1 << 17


class EncodedTransform(TrainTransform):
    """The worker's part of `decode`: `load` gives JPEGs as they are, and what is no plain JPEG as a crop."""

    def load(self, image: EncodedImage) -> tuple[ExampleHeader, torch.Tensor | bytes]:
        data = image.plain_jpeg()
        if data is None:
            return super().load(image)
        draws = self.draw(image.height, image.width)
        return ExampleHeader(draws, len(data), image.orientation, image.height * image.width, image.name), data


class CropBatches(DecodedBatches):
    """Batches of crops and JPEGs, with what was drawn for them, for a `DevicePipeline`.

    Their images are decoded no further than the `TrainTransform` needs; `pixel_values` are crops, `encoded` holds the
    bytes of all JPEGs, one behind the other.
    """

    def _read(self, row: Mapping[str, Any]) -> tuple[EncodedImage, Any]:
        label = self._label(row)
        return EncodedImage(row[self._dataset.image_column], token=self._dataset.token), label

    def _example(self, image: EncodedImage, label: Any) -> tuple[Any, Any]:
        with image:
            return self._transform.load(image), label

    def _batch(self, loaded: list[Any], labels: list[Any]) -> dict[str, Any]:
        examples, contents = zip(*loaded, strict=True)
        encoded = b"".join(content for content in contents if isinstance(content, bytes))
        crops = [content for content in contents if isinstance(content, torch.Tensor)]
        batch = self._images(crops or [torch.empty(3, 0, 0, dtype=torch.uint8)], labels)
        if encoded:
            # One tensor: each takes a file descriptor on its way to the main process.
            batch["encoded"] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        return {**batch, "examples": examples}

    def _images(self, images: Sequence[torch.Tensor], labels: list[Any]) -> dict[str, Any]:
        # Stacked with the channels last, as they come and as the model wants them.
        batch = super()._batch([image.permute(1, 2, 0) for image in images], labels)
        return {**batch, "pixel_values": batch["pixel_values"].permute(0, 3, 1, 2)}


class TrainingBatches(CropBatches):
    """Batches of normalised training examples, float32."""

    def _batch(self, loaded: list[Any], labels: list[Any]) -> dict[str, Any]:
        examples, crops = zip(*loaded, strict=True)
        # Small images many at a time, since a call costs more than they do; of large ones what fits the cache.
        size = max(AUGMENTED_AT_ONCE // crops[0].numel(), 1)
        images: list[torch.Tensor] = []
        for start in range(0, len(crops), size):
            draws = [example.draws for example in examples[start : start + size]]
            augmented = self._transform.augment(torch.stack(crops[start : start + size]), draws)
            images += self._transform.normalise(augmented, draws)
        return self._images(images, labels)


def make_pipeline(settings: ClassificationSettings, processor: Any, device: torch.device) -> dict[str, Any]:
    """What `--device_preprocessing` asks for, as arguments of `make_loader`: `transform`, `batches` and `finish`.

    Raises:
        UserError: the device cannot decode JPEGs.
    """
    where = settings.device_preprocessing
    if where == "no":
        return {"transform": TrainTransform(settings, processor), "batches": TrainingBatches, "finish": None}
    if where == "decode":
        if device.type != "cuda":
            raise UserError(
                f"--device_preprocessing decode needs a CUDA GPU, and this run is on {device.type}: choose no or "
                "augment."
            )
        check_decoder(device)
    transform = (EncodedTransform if where == "decode" else TrainTransform)(settings, processor)
    return {"transform": transform, "batches": CropBatches, "finish": DevicePipeline(transform, device)}


def check_decoder(device: torch.device) -> None:
    """Raises a UserError unless torchvision decodes JPEGs on this device."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    try:
        decode_jpegs([torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)], device)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"this torchvision cannot decode JPEGs on {device} ({one_line(error)}): choose --device_preprocessing "
            "augment or no."
        ) from error


class DevicePipeline:
    """The device's part: from what the workers deliver to normalised training examples.

    Args:
        transform: as in the workers.
        device: where it is done; the CPU, too, unless there are JPEGs to decode for speed's sake.

    Calling it with a message of `CropBatches` returns one with `pixel_values`, float32 (B, 3, height, width) on
    the device, in place of crops and JPEGs. Images that turn out to be broken are left out, with their labels, and
    added to `skipped`. A message without labels had nothing but broken images.
    """

    def __init__(self, transform: TrainTransform, device: torch.device):
        self.transform, self.device = transform.to(device), device

    @torch.no_grad()
    def __call__(self, message: dict[str, Any]) -> dict[str, Any]:
        if "examples" not in message:
            return message  # an error, or no image
        message = dict(message)
        examples, labels = message.pop("examples"), message["labels"]
        pixels = message.pop("pixel_values").to(self.device, non_blocking=True)
        encoded = message.pop("encoded", None)
        if encoded is not None:
            results = self.crops(examples, pixels, encoded)
            kept = [index for index, result in enumerate(results) if not isinstance(result, BrokenImage)]
            if len(kept) < len(results):
                broken = [
                    f"{example.name or 'an image without a name'}: {result}"
                    for example, result in zip(examples, results, strict=True)
                    if isinstance(result, BrokenImage)
                ]
                message["skipped"] = [*message["skipped"], *broken]
                examples, labels = [examples[index] for index in kept], labels[kept]
            if not kept:
                del message["labels"]
                return message
            pixels = torch.stack([results[index] for index in kept])
        draws = [example.draws for example in examples]
        examples = self.transform.normalise(self.transform.augment(pixels, draws), draws)
        return {**message, "pixel_values": examples, "labels": labels}

    def crops(
        self, examples: Sequence[ExampleHeader], pixels: torch.Tensor, encoded: torch.Tensor
    ) -> list[torch.Tensor | BrokenImage]:
        """The crop of each example, uint8 (3, height, width): those that came as such and those decoded here."""
        ready = iter(pixels)
        lengths = [example.bytes for example in examples if example.bytes]
        jpegs = iter(self.decode([e for e in examples if e.bytes], encoded.split(lengths)))
        return [next(jpegs) if example.bytes else next(ready) for example in examples]

    def decode(
        self, examples: Sequence[ExampleHeader], encoded: Sequence[torch.Tensor]
    ) -> Iterator[torch.Tensor | BrokenImage]:
        for start, end in portions([example.pixels for example in examples], MAX_DECODED_PIXELS):
            part = examples[start:end]
            images = decode_upright(encoded[start:end], [example.orientation for example in part], self.device)
            for example, image in zip(part, images, strict=True):
                yield image if isinstance(image, BrokenImage) else self.crop(image, example.draws)

    def crop(self, image: torch.Tensor, draws: Draws) -> torch.Tensor:
        if draws.crop is not None:
            top, left, height, width = draws.crop
            image = image[:, top : top + height, left : left + width]
        return self.transform.resize(image, draws)


def portions(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges that add up to at most `limit`, or consist of one element."""
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit:
            yield start, index
            start, total = index, 0
        total += size
    if sizes:
        yield start, len(sizes)


def decode_upright(
    encoded: Sequence[torch.Tensor], orientations: Sequence[int], device: torch.device
) -> list[torch.Tensor | BrokenImage]:
    """Decoded JPEGs, uint8 (3, H, W), turned as EXIF says; Pillow reads those that the device cannot.

    One JPEG that the device cannot read spoils its batch, and is looked for by halving.
    """
    try:
        images = decode_jpegs(encoded, device)
        return [upright(image, orientation) for image, orientation in zip(images, orientations, strict=True)]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        middle = len(encoded) // 2
        if middle:
            return decode_upright(encoded[:middle], orientations[:middle], device) + decode_upright(
                encoded[middle:], orientations[middle:], device
            )
    try:
        image = decode_image(encoded[0].numpy().tobytes())
    except BrokenImage as reason:
        return [reason]
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)]


def decode_jpegs(encoded: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Decodes JPEGs, 1-D uint8 on the CPU, to uint8 (3, H, W) on the device; on a GPU by nvJPEG.

    Raises:
        RuntimeError: one of them cannot be read.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        # torchvision 0.29 says that TorchCodec will take over; it still is what both have in common.
        warnings.simplefilter("ignore")
        return decode_jpeg(list(encoded), mode=ImageReadMode.RGB, device=device)


def upright(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """(C, H, W) turned as EXIF says, 1 to 8."""
    if orientation >= 5:
        image = image.transpose(-1, -2)
    # What is left to mirror: left to right in 2, 3, 6, 7; top to bottom in 3, 4, 7, 8.
    axes = [axis for axis, which in ((-1, (2, 3, 6, 7)), (-2, (3, 4, 7, 8))) if orientation in which]
    return image.flip(axes) if axes else image
