"""Image processors, ours against the built-in ones of the same backend, on decoded photographs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers.models.poolformer.image_processing_pil_poolformer import PoolFormerImageProcessorPil as BuiltInPil
from transformers.models.poolformer.image_processing_poolformer import PoolFormerImageProcessor as BuiltIn

from hf_poolformer import PoolFormerImageProcessor, PoolFormerImageProcessorPil

from ..data.photographs import resized
from ..foundation.timing import take_turns


# What most of ImageNet measures, and what a video camera gives.
SIZES = ((500, 375), (1920, 1080))
# Mean and largest difference from the built-in processor of the same backend, in levels of 255: what is resampled in
# another order is rounded otherwise.
TOLERANCE = (0.5, 4.0)


@dataclass
class ProcessorResult:
    """One processor on one kind of input; `error` is the largest difference from the built-in one, of 255."""

    name: str
    library: str
    backend: str
    status: str = "skipped"
    note: str = ""
    error: float | None = None
    seconds: float | None = None
    spread: float | None = None
    images_per_second: float | None = None
    times_built_in: float | None = None
    rounds: list[float] = field(default_factory=list)


@dataclass
class Processing:
    """Results for one size of photograph."""

    size: tuple[int, int]  # width, height
    batch_size: int
    device: str
    results: list[ProcessorResult]

    @property
    def title(self) -> str:
        where = "" if self.device == "cpu" else f", {self.device}"
        return f"process, {self.size[0]}x{self.size[1]}, batch {self.batch_size}{where}"


def measure_processors(
    size: tuple[int, int], *, device: str = "cpu", batch_size: int = 8, rounds: int = 15, seconds: float = 15.0
) -> Processing:
    """
    Images per second of both processors in both backends, torchvision from PIL images and from uint8 tensors.

    Decoding is not timed. On a GPU only tensors that are there already go in, since PIL images cannot.

    Args:
        size: (width, height) of the photographs.
        seconds: of timing.
    """
    images = resized(size, batch_size)
    tensors = [pil_to_tensor(image).to(device) for image in images]
    kinds: dict[str, tuple[type, type, Sequence[Image.Image | torch.Tensor]]] = {
        "torchvision, tensors": (PoolFormerImageProcessor, BuiltIn, tensors)
    }
    if device == "cpu":
        kinds["torchvision, PIL images"] = (PoolFormerImageProcessor, BuiltIn, images)
        kinds["PIL"] = (PoolFormerImageProcessorPil, BuiltInPil, images)

    results, steps = [], {}
    for kind, (ours, theirs, batch) in kinds.items():
        expected = None
        for library, processor in (("built-in", theirs()), ("ours", ours())):
            result = ProcessorResult(f"{library} {kind}", library, kind)
            results.append(result)

            def step(processor=processor, batch=batch) -> torch.Tensor:
                return processor(batch, return_tensors="pt")["pixel_values"]

            pixels = step()
            expected = pixels if expected is None else expected
            judge(result, pixels, expected, processor.image_std)
            if result.status == "passed":
                steps[result.name] = step
    timings = take_turns(steps, device=device, rounds=rounds, seconds=seconds, turn=0.1, label="process: timing")
    by_kind = {}
    for result in results:
        if result.name not in timings:
            continue
        timing = timings[result.name]
        result.seconds, result.spread, result.rounds = timing.median, timing.spread, timing.seconds
        result.images_per_second = batch_size / timing.median
        by_kind.setdefault(result.backend, result.seconds)  # the built-in one comes first
        result.times_built_in = by_kind[result.backend] / result.seconds
    return Processing(size, batch_size, device, results)


def judge(result: ProcessorResult, pixels: torch.Tensor, expected: torch.Tensor, image_std: Sequence[float]) -> None:
    """Sets status, error and note: pixel values (B, 3, H, W) against those of the built-in processor."""
    if pixels.shape != expected.shape or pixels.dtype != expected.dtype:
        result.status, result.note = "failed", f"{tuple(pixels.shape)}, not {tuple(expected.shape)}"
        return
    levels = (pixels - expected).abs().cpu() * torch.from_numpy(255 * np.asarray(image_std))[:, None, None]
    mean, result.error = levels.mean().item(), levels.max().item()
    if mean <= TOLERANCE[0] and result.error <= TOLERANCE[1]:
        result.status = "passed"
    else:
        result.status = "failed"
        result.note = f"off by {mean:.2f} levels in the mean, {result.error:.1f} at most"
