"""Undecoded images to what the model takes: one part in worker processes, the other beside the model.

    no      the workers decode, resize and crop; 8-bit pixels cross to the main process, which normalises on the device
    decode  the workers read headers and hand JPEGs on as they are; a CUDA GPU decodes, resizes, crops and normalises

8-bit pixels take a quarter of the memory of normalised ones, and normalising them is the same two operations in
float32 wherever it happens, so the results are the same, bit for bit. `decode` differs by what two JPEG decoders and
the processor's arithmetic on two devices differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.image_utils import PILImageResampling

from ..data.decoding import BrokenImage, EncodedImage, decode_image
from ..data.transforms import channels_of, prepare
from ..foundation.errors import UserError, one_line
from ..image_processing_poolformer import EvaluationTransform, PoolFormerImageProcessor


Groups = list[tuple[list[int], torch.Tensor]]

# So many sizes among the JPEGs of a batch take no more launches, 17 or 18 each, than images of all sizes together, 75.
FEW_SIZES = 4

# What makes a processor of this package stop before it rescales and normalises.
_EIGHT_BITS = {"do_rescale": False, "do_normalize": False}


class Jpeg(NamedTuple):
    """What must be known of one that is decoded beside the model: its place in the batch, and its header."""

    index: int
    orientation: int
    height: int
    width: int
    bytes: int


def decode(items: Sequence[tuple[str, Any]], processor: Any, **options: Any) -> dict[str, Any]:
    """Names and undecoded sources to `names`, `errors` (None or a reason) and `groups`: (indices, pixel_values).

    A group holds the images of one size: a processor that does not crop leaves many.

    Args:
        options: for the processor.
    """
    groups: dict[tuple[int, ...], tuple[list[int], list[torch.Tensor]]] = {}
    errors: list[str | None] = []
    for index, (_, source) in enumerate(items):
        try:
            if isinstance(source, BrokenImage):
                raise source
            pixels = prepare(processor, decode_image(source, num_channels=channels_of(processor)), **options)
        except (BrokenImage, ValueError) as error:
            errors.append(one_line(error))
            continue
        errors.append(None)
        _add(groups, index, pixels)
    return {"names": [name for name, _ in items], "errors": errors, "groups": _stacked(groups)}


class Preprocessing:
    """Both parts of the way from an undecoded image to the model.

    Args:
        processor: of the model.
        device: of the model.
        where: "no" or "decode", as above.

    Attributes:
        where: as given.
        decoder: name of what decodes on the device, "" for nothing.
        decoded: images that the device was given as JPEGs.
        held_back: images that the CPU decoded, since they are no plain JPEGs or the device could not; 0 with "no".

    Raises:
        UserError: "decode" where the device, this torchvision or the processor cannot.
    """

    def __init__(self, processor: Any, device: torch.device, where: str = "no"):
        if where not in ("no", "decode"):
            raise UserError(f"--device_preprocessing is no or decode, not {where}")
        self.decoder = _decoder(processor, device) if where == "decode" else ""
        self.decoded = self.held_back = 0
        self._processor, self._device, self.where = processor, device, where
        self._affine = None
        if isinstance(processor, EvaluationTransform) and _normalises_last(processor):
            how = {name: getattr(processor, name) for name in ("do_rescale", "rescale_factor", "do_normalize")}
            self._affine = processor._affine(3, image_mean=processor.image_mean, image_std=processor.image_std, **how)

    def load(self, items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        """In a worker: what `decode` gives, its pixels 8-bit where the device can do the rest.

        With "decode", also `jpegs`, a `Jpeg` for each, and `encoded`, one uint8 tensor that holds them one behind the
        other.
        """
        options = {} if self._affine is None else _EIGHT_BITS
        if self.where == "no":
            return decode(items, self._processor, **options)
        jpegs: list[Jpeg] = []
        contents: list[bytes] = []
        others: list[tuple[str, Any]] = []
        for index, (name, source) in enumerate(items):
            data = None
            try:
                if not isinstance(source, BrokenImage):
                    with EncodedImage(source) as image:
                        data = image.plain_jpeg()
                        header = (index, image.orientation, image.height, image.width)
            except BrokenImage as error:
                source = error
            if data is None:
                others.append((name, source))
                continue
            jpegs.append(Jpeg(*header, len(data)))
            contents.append(data)
        taken = {jpeg.index for jpeg in jpegs}
        places = [index for index in range(len(items)) if index not in taken]
        rest = decode(others, self._processor, **options)
        errors: list[str | None] = [None] * len(items)
        for place, error in zip(places, rest["errors"], strict=True):
            errors[place] = error
        groups = [([places[index] for index in indices], pixels) for indices, pixels in rest["groups"]]
        batch = {"names": [name for name, _ in items], "errors": errors, "groups": groups, "jpegs": jpegs}
        if jpegs:
            batch["encoded"] = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
        return batch

    def finish(self, batch: dict[str, Any]) -> Groups:
        """Beside the model: (indices, pixel_values on the device) for each size of image; adds to `batch["errors"]`.

        Args:
            batch: what `load` or `decode` gave.
        """
        groups = [(indices, self._normalised(pixels)) for indices, pixels in batch["groups"]]
        if self.where == "decode":
            self.held_back += sum(len(indices) for indices, _ in groups)
        if not batch.get("jpegs"):
            return groups
        self.decoded += len(batch["jpegs"])
        by_size: dict[tuple[int, ...], tuple[list[int], list[torch.Tensor]]] = {}
        for indices, pixels in [*groups, *self._decoded(batch)]:
            for index, image in zip(indices, pixels, strict=True):
                _add(by_size, index, image)
        return _stacked(by_size)

    def _decoded(self, batch: dict[str, Any]) -> Groups:
        """What the processor makes of the JPEGs."""
        from ..training.device_pipeline import MAX_DECODED_PIXELS
        from ..training.jpeg_decoders import decode_upright
        from ..training.resampling import portions

        jpegs: list[Jpeg] = batch["jpegs"]
        encoded = batch["encoded"].split([jpeg.bytes for jpeg in jpegs])
        found: Groups = []
        for start, end in portions([jpeg.height * jpeg.width for jpeg in jpegs], MAX_DECODED_PIXELS):
            part = jpegs[start:end]
            images, by_cpu = decode_upright(self.decoder, encoded[start:end], part, self._device)
            self.held_back += by_cpu
            self.decoded -= by_cpu
            read = {}
            for jpeg, image in zip(part, images, strict=True):
                if isinstance(image, BrokenImage):
                    batch["errors"][jpeg.index] = one_line(image)
                else:
                    read[jpeg.index] = image
            if _resizes_floats(self._device) and len({image.shape for image in read.values()}) > FEW_SIZES:
                found += self._together(read)
            found += self._by_size(read, batch["errors"])
        return found

    def _by_size(self, images: dict[int, torch.Tensor], errors: list[str | None]) -> Groups:
        """By the processor; those of one size share their launches."""
        alike: dict[tuple[int, ...], tuple[list[int], list[torch.Tensor]]] = {}
        for index, image in images.items():
            _add(alike, index, image)
        found = []
        for indices, members in alike.values():
            try:
                pixels = self._processor(members, return_tensors="pt", device=self._device)["pixel_values"]
            except ValueError as error:  # of their size, which they share
                for index in indices:
                    errors[index] = one_line(error)
                continue
            found.append((indices, pixels))
        return found

    def _together(self, images: dict[int, torch.Tensor]) -> Groups:
        """All at once, whatever their sizes, with the processor's arithmetic. Takes out of `images` what it does, and
        leaves there what is padded, larger than all at once may be, or resized by another filter than most."""
        from ..training.resampling import MAX_PIXELS, portions, resize_parts

        parts: dict[tuple[int, int], list[tuple[int, Any]]] = {}
        for index, image in images.items():
            planned = self._part(*image.shape[1:])
            if planned is not None:
                part, output = planned
                parts.setdefault(output, []).append((index, part))
        found = []
        for output, members in parts.items():
            for start, end in portions([part.pixels(*output) for _, part in members], MAX_PIXELS):
                indices, plans = zip(*members[start:end], strict=True)
                if end - start > FEW_SIZES:
                    pixels = resize_parts([images.pop(index) for index in indices], plans, *output, stepwise=True)
                    found.append((list(indices), self._normalised(pixels)))
        return found

    def _part(self, height: int, width: int) -> tuple[Any, tuple[int, int]] | None:
        """What the processor resizes of an image of this size, and the size that it gives; None where `_together`
        cannot do the same."""
        from ..training.resampling import Part

        processor = self._processor
        filters = (PILImageResampling.BILINEAR, PILImageResampling.BICUBIC)
        if self._affine is None or processor.resample not in filters:
            return None
        settings = (
            getattr(processor, name) for name in ("do_resize", "size", "crop_pct", "do_center_crop", "crop_size")
        )
        try:
            geometry = processor._geometry(height, width, *settings)
        except ValueError:
            return None
        if geometry.window != geometry.output:
            return None
        bicubic = processor.resample == PILImageResampling.BICUBIC
        return Part(0, 0, height, width, geometry.resized, geometry.start, bicubic), geometry.output

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(self._device, non_blocking=True)
        if pixels.dtype != torch.uint8 or self._affine is None:
            return pixels
        scale, shift = (torch.from_numpy(values).to(self._device) for values in self._affine)
        return pixels.float().mul_(scale).add_(shift)  # as the processor does it


def _resizes_floats(device: torch.device) -> bool:
    """Whether it is no CPU, which is faster with one image of 8 bits after the other."""
    return device.type != "cpu"


def _decoder(processor: Any, device: torch.device) -> str:
    """What decodes JPEGs on this device. Raises a UserError unless they can be decoded and prepared there."""
    if device.type != "cuda":
        raise UserError(
            f"--device_preprocessing decode needs a CUDA GPU, and the model is on {device.type}: leave the flag out"
        )
    if (number := channels_of(processor)) != 3:
        raise UserError(
            f"--device_preprocessing decode is for RGB, and this model takes {number} channels: leave the flag out"
        )
    if not isinstance(processor, PoolFormerImageProcessor):
        raise UserError(
            f"--device_preprocessing decode needs a PoolFormerImageProcessor, and this model has a "
            f"{type(processor).__name__}: leave the flag out"
        )
    from ..training.jpeg_decoders import working_decoders

    names, fault = working_decoders(device)
    if not names:
        raise UserError(f"nothing here decodes JPEGs on {device} ({fault}): leave --device_preprocessing out")
    return names[0]


def _normalises_last(processor: EvaluationTransform) -> bool:
    """Whether the processor gives RGB, which has 8 bits, and rescaling and normalising come after all the rest."""
    plain = processor.data_format in (None, "channels_first")
    return bool(processor.do_convert_rgb) and channels_of(processor) == 3 and not processor.do_pad and plain


def _add(groups: dict[Any, tuple[list[int], list[torch.Tensor]]], index: int, image: torch.Tensor) -> None:
    indices, images = groups.setdefault(tuple(image.shape), ([], []))
    indices.append(index)
    images.append(image)


def _stacked(groups: dict[Any, tuple[list[int], list[torch.Tensor]]]) -> Groups:
    return [(indices, torch.stack(images)) for indices, images in groups.values()]
