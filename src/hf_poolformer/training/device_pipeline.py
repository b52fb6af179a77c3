"""The part of the image pipeline that a run may give to its device: augmentation, or decoding and augmentation.

    no       the workers decode, crop, resize and augment
    augment  the workers decode, crop and resize
    decode   the workers read, judge headers and draw, and deliver JPEGs as they are; other images as in `augment`

In all three the workers draw what happens to which image (`TrainTransform.draw`), and the same code does it, so they
differ by no more than the arithmetic of the two devices, the decoder's, and the noise of random erasing, which the
device makes from a seed that is drawn with the rest: there is no state for a checkpoint to keep. What crosses from one
process to another is 8 bits per value, in one tensor per batch; the device normalises. `device_choice` chooses.
"""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ..data.channels import ChannelBatches
from ..data.decoding import BrokenImage, EncodedImage
from ..data.loader import DecodedBatches
from ..data.transforms import channels_of
from ..settings.classification import ClassificationSettings
from .augmentation import ExampleHeader, TrainTransform
from .jpeg_decoders import decode_upright
from .resampling import portions


logger = logging.getLogger(__name__)

# As many pixels as are decoded at once: 200 MB of RGB.
MAX_DECODED_PIXELS = 1 << 26
# As many bytes of crops as a worker augments at once: one of 224 pixels, 42 of 32.
AUGMENTED_AT_ONCE = 1 << 17
# Batches in memory that is used again: the one in training, the one that the loader holds back, the one in the making.
KEPT_BATCHES = 4


class Preprocessing(NamedTuple):
    """Who does what.

    Attributes:
        mode: as `--device_preprocessing`, but for `auto`.
        decoder: name of what decodes on the device, see `jpeg_decoders`; None where the workers do.
    """

    mode: str = "no"
    decoder: str | None = None


class BatchMemory:
    """Memory on the CPU for one batch after the other, used again as soon as nobody holds a batch that was in it.

    New memory of 77 MB, a batch of 128 images of 224 pixels in float32, costs more than what is written into it: the
    system fills it with zeros page by page, and takes it back when the batch is gone.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[torch.Tensor, weakref.ref[np.ndarray]]] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Of any values."""
        size = math.prod(shape) * dtype.itemsize
        # A tensor made of an array keeps it alive, and so does whatever shares the tensor's memory.
        free = [index for index, (_, user) in enumerate(self._pieces) if user() is None]
        fit = [index for index in free if size <= len(self._pieces[index][0]) <= 2 * size]
        if fit:
            whole = self._pieces.pop(fit[0])[0]
        else:
            whole = torch.empty(size, dtype=torch.uint8)
            for index in reversed(free):  # other batches are made now
                del self._pieces[index]
        array = whole.numpy()[:size]
        # Whoever holds many batches at once does without.
        if len(self._pieces) < KEPT_BATCHES:
            self._pieces.append((whole, weakref.ref(array)))
        return torch.from_numpy(array).view(dtype).view(shape)


class EncodedTransform(TrainTransform):
    """The worker's part of `decode`: `load` gives JPEGs as they are, and what is no plain JPEG as a crop."""

    def load(self, image: EncodedImage) -> tuple[ExampleHeader, torch.Tensor | bytes]:
        data = image.plain_jpeg()
        if data is None:
            return super().load(image)
        draws = self.draw(image.height, image.width)
        return ExampleHeader(draws, len(data), image.orientation, image.height, image.width, image.name), data


class CropBatches(DecodedBatches):
    """Batches of 8-bit crops and JPEGs, with what was drawn for them, for a `DevicePipeline`.

    Their images are decoded no further than the `TrainTransform` needs. A message has:

        content   1-D uint8: all crops, channels last, then the bytes of all JPEGs
        examples  bytes, the pickled list of `ExampleHeader`: neither a queue nor a thread that pins memory looks into
                  them
        size      height and width of the crops
        labels    a numpy array: each tensor takes a file descriptor, and a question to the worker, on its way to the
                  main process
    """

    # Crops of the message in the making, uint8 (B, height, width, 3), and how many there are.
    _crops: torch.Tensor | None = None
    _made = 0
    _reused: BatchMemory | None = None

    def message_of(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these rows, without those that are broken.

        Raises:
            BrokenImage: all are.
        """
        self._begin(len(rows))
        examples = []
        for row in rows:
            with contextlib.suppress(BrokenImage):
                examples.append(self._example(*self._read(row)))
        if not examples:
            raise BrokenImage(f"none of {len(rows)} images can be read")
        return self._batch(*map(list, zip(*examples, strict=True)))

    def _messages(self, generators: Any) -> Iterator[Any]:
        self._crops = None  # of an epoch that was not read to its end
        yield from super()._messages(generators)

    def _begin(self, number: int) -> None:
        """Memory for so many crops; what is never written to takes none."""
        self._crops, self._made = self._memory((number, self._transform.height, self._transform.width, 3)), 0

    def _memory(self, shape: tuple[int, ...]) -> torch.Tensor:
        """For uint8 that goes to the main process: written once, and shared with it from the start."""
        if get_worker_info() is None:
            if self._reused is None:
                self._reused = BatchMemory()
            return self._reused.take(shape, torch.uint8)
        size = math.prod(shape)
        # What `default_collate` of PyTorch does; `share_memory_` would copy what is not there yet.
        storage = torch.UntypedStorage._new_shared(size, device="cpu")
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)

    def _read(self, row: Mapping[str, Any]) -> tuple[EncodedImage, Any]:
        label = self._dataset.label(row)
        return EncodedImage(row[self._dataset.image_column], token=self._dataset.token), label

    def _example(self, image: EncodedImage, label: Any) -> tuple[Any, Any]:
        with image:
            example, content = self._transform.load(image)
        return (example, content if isinstance(content, bytes) else self._keep(example, content)), label

    def _keep(self, example: ExampleHeader, crop: torch.Tensor) -> None:
        """Puts a crop into the message."""
        if self._crops is None:
            self._begin(self.batch_size)
        self._crops[self._made] = crop.permute(1, 2, 0)
        self._made += 1

    def _batch(self, loaded: list[Any], labels: list[Any]) -> dict[str, Any]:
        examples, contents = zip(*loaded, strict=True)
        parts = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in contents if data is not None]
        if self._crops is not None:
            parts.insert(0, self._crops[: self._made].view(-1))
            self._crops = None
        content = parts[0]
        if len(parts) > 1 or contents[0] is not None:
            content = torch.cat(parts, out=self._memory((sum(map(len, parts)),)))
        return {
            "content": content,
            "examples": pickle.dumps(examples, protocol=5),
            "size": (self._transform.height, self._transform.width),
            "labels": np.stack(labels),
        }


class AugmentedBatches(CropBatches):
    """The same where the workers augment, too: small images many at a time, since a call costs more than they do, and
    large ones as soon as they are decoded, while the cache holds them."""

    def _keep(self, example: ExampleHeader, crop: torch.Tensor) -> None:
        if crop.numel() * 2 > AUGMENTED_AT_ONCE:
            crop = self._transform.augment(crop[None], [example.draws])[0]
        super()._keep(example, crop)

    def _batch(self, loaded: list[Any], labels: list[Any]) -> dict[str, Any]:
        crops = self._crops[: self._made]
        if (number := AUGMENTED_AT_ONCE // crops[0].numel()) > 1:
            draws = [example.draws for (example, _), _ in zip(loaded, labels, strict=True)]
            for start in range(0, len(crops), number):
                part = slice(start, start + number)
                augmented = self._transform.augment(crops[part].permute(0, 3, 1, 2), draws[part])
                crops[part] = augmented.permute(0, 2, 3, 1)
        return super()._batch(loaded, labels)


def make_pipeline(
    settings: ClassificationSettings, processor: Any, device: torch.device, preprocessing: Preprocessing
) -> dict[str, Any]:
    """The two parts of a way to preprocess, as arguments of `make_loader`: `transform`, `batches` and `finish`.

    The workers do all of it for images that are not RGB.
    """
    mode = preprocessing.mode
    if channels_of(processor) != 3:
        transform = TrainTransform(settings, processor)
        if transform.num_channels != 1 and settings.rand_augment_magnitude:
            logger.warning(
                "Images of %d channels: of RandAugment's operations only those that move an image, not its colours.",
                transform.num_channels,
            )
        return {"transform": transform, "batches": ChannelBatches, "finish": None}
    transform = (EncodedTransform if mode == "decode" else TrainTransform)(settings, processor)
    return {
        "transform": transform,
        "batches": AugmentedBatches if mode == "no" else CropBatches,
        "finish": DevicePipeline(transform, device, preprocessing),
    }


class DevicePipeline:
    """The device's part: from what the workers deliver to normalised training examples.

    Args:
        transform: as in the workers.
        device: where it is done; the CPU, too, unless there are JPEGs to decode for speed's sake.
        preprocessing: what the workers have left to do.

    Calling it with a message of `CropBatches` returns one with `pixel_values`, float32 (B, 3, height, width) on
    the device, and `labels`, a tensor on the CPU, in place of `content`, `examples` and `size`. Images that turn out
    to be broken are left out, with their labels, and added to `skipped`. A message without labels had nothing but
    broken images.

    On a CUDA device it works on a stream of its own: decoders wait for the device, and need not wait for the training.

    Attributes:
        images: how many it was given.
        decoded_by_cpu: how many of these had to be decoded by the CPU although the device decodes: no plain JPEGs, and
            those that its decoder could not read.
    """

    def __init__(self, transform: TrainTransform, device: torch.device, preprocessing: Preprocessing):
        self.transform, self.device, self.preprocessing = transform.to(device), device, preprocessing
        self.stream = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # what `transform` needs there
        self.memory = BatchMemory()
        self.images = self.decoded_by_cpu = 0

    @torch.no_grad()
    def __call__(self, message: dict[str, Any]) -> dict[str, Any]:
        if "examples" not in message:
            return message  # an error, or no image
        message = dict(message)
        examples, content = pickle.loads(message.pop("examples")), message.pop("content")
        labels = torch.from_numpy(message.pop("labels"))
        size = message.pop("size")
        self.images += len(examples)
        with torch.cuda.stream(self.stream):
            self.transform = self.transform.sized(*size)
            crops = self.crops(examples, content)
            if isinstance(crops, list):
                kept = [index for index, crop in enumerate(crops) if not isinstance(crop, BrokenImage)]
                if len(kept) < len(crops):
                    broken = [
                        f"{example.name or 'an image without a name'}: {crop}"
                        for example, crop in zip(examples, crops, strict=True)
                        if isinstance(crop, BrokenImage)
                    ]
                    message["skipped"] = [*message["skipped"], *broken]
                    examples, labels = [examples[index] for index in kept], labels[kept]
                if not kept:
                    return message
                crops = torch.stack([crops[index] for index in kept])
            draws = [example.draws for example in examples]
            if self.preprocessing.mode != "no":
                crops = self.transform.augment(crops, draws)
            memory = None
            if self.device.type == "cpu":
                memory = self.memory.take((crops.numel(),), torch.float32)
            pixel_values = self.transform.normalise(crops, draws, memory)
        if self.stream is not None:
            training = torch.cuda.current_stream(self.device)
            training.wait_stream(self.stream)
            pixel_values.record_stream(training)  # its memory is not free before the training is done with it
        return {**message, "pixel_values": pixel_values, "labels": labels}

    def crops(
        self, examples: Sequence[ExampleHeader], content: torch.Tensor
    ) -> torch.Tensor | list[torch.Tensor | BrokenImage]:
        """The crop of each example, uint8 (3, height, width): those that came as such and those decoded here.

        Returns:
            one tensor where all came as crops.
        """
        encoded = [example for example in examples if example.bytes]
        lengths = [example.bytes for example in encoded]
        pixels = content[: len(content) - sum(lengths)].to(self.device, non_blocking=True)
        ready = pixels.view(-1, self.transform.height, self.transform.width, 3).permute(0, 3, 1, 2)
        if self.preprocessing.mode == "decode":
            self.decoded_by_cpu += len(ready)
        if not encoded:
            return ready
        came, jpegs = iter(ready), iter(self.decode(encoded, content[len(pixels) :].split(lengths)))
        return [next(jpegs) if example.bytes else next(came) for example in examples]

    def decode(
        self, examples: Sequence[ExampleHeader], encoded: Sequence[torch.Tensor]
    ) -> Iterator[torch.Tensor | BrokenImage]:
        for start, end in portions([example.height * example.width for example in examples], MAX_DECODED_PIXELS):
            part = examples[start:end]
            images, by_cpu = decode_upright(self.preprocessing.decoder, encoded[start:end], part, self.device)
            self.decoded_by_cpu += by_cpu
            read = [index for index, image in enumerate(images) if not isinstance(image, BrokenImage)]
            if read:
                draws = [part[index].draws for index in read]
                crops = self.transform.resize_together([images[index] for index in read], draws)
                for index, crop in zip(read, crops, strict=True):
                    images[index] = crop
            yield from images
