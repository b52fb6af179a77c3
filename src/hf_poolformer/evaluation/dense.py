"""Evaluation of segmenters and detectors, exact for any number of processes and any division of images among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..data.dense.batches import collate
from ..data.dense.datasets import Truth
from ..foundation.finite import check_finite, check_weights
from ..foundation.tasks import task_named
from .dense_metrics import DetectionMetric, SegmentationMetric
from .processes import Judge, measure


DIVISOR = 32  # of the sides of a batch; the stride of the last stage


@dataclass
class EvaluatedImage:
    """An evaluated image with what is in it and what was found, for a picture.

    Attributes:
        pixel_values: (3, h, w) as the model saw it, normalised.
        found: annotation map (height, width), or `boxes`, `scores`, `labels` and perhaps `masks`, as arrays.
    """

    pixel_values: torch.Tensor
    truth: Truth
    found: Any


class DenseJudge(Judge, Protocol):
    """
    Attributes:
        divisor: what sides of a batch are padded to a multiple of.
    """

    divisor: int

    def found(self, outputs: Any, processor: Any, sizes: list[tuple[int, int]]) -> list[Any]:
        """What the model found in each image, in the pixels of images of `sizes` (height, width)."""

    def add(self, truth: Truth, found: Any) -> None:
        """Counts one image."""


class MapJudge(SegmentationMetric):
    """Of maps of classes."""

    divisor = 1

    def found(self, outputs: Any, processor: Any, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return [values.cpu().numpy() for values in maps]

    def add(self, truth: Truth, found: np.ndarray) -> None:
        self.update(found, truth.map)


class BoxJudge(DetectionMetric):
    """Of boxes."""

    divisor = DIVISOR
    with_masks = False

    def __init__(self, num_labels: int):
        super().__init__(num_labels, self.with_masks)

    def found(self, outputs: Any, processor: Any, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
        found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        return [
            {
                "boxes": part["boxes"].float().cpu().numpy(),
                "scores": part["scores"].float().cpu().numpy(),
                "labels": part["labels"].cpu().numpy(),
                "masks": None,
            }
            for part in found
        ]

    def add(self, truth: Truth, found: dict[str, Any]) -> None:
        values = (found[name] for name in ("boxes", "scores", "labels", "masks"))
        self.update(truth.key, truth.size, *values, truth.objects)


class MaskJudge(BoxJudge):
    """Of boxes and masks."""

    with_masks = True

    def found(self, outputs: Any, processor: Any, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
        segments = processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True
        )
        return [
            {**found, "masks": part["segmentation"].cpu().numpy()}
            for found, part in zip(super().found(outputs, processor, sizes), segments, strict=True)
        ]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    *,
    task: str,
    processor: Any,
    accelerator: Accelerator,
    num_labels: int,
    keep: int = 0,
    progress: bool = False,
    should_stop: Callable[[], int] = lambda: 0,
) -> tuple[dict[str, Any], list[EvaluatedImage]]:
    """Metrics over all images that the processes' loaders yield together, in the pixels of the stored images.

    What an image gives does not depend on those beside it: only images of one size share a batch.

    Args:
        model: bare or wrapped by accelerate; its mode is restored.
        loader: yields lists `pixel_values` and `labels` (`Truth`), and `skipped`.
        processor: its `post_process_*` make predictions of the model's outputs.
        keep: how many examples to return for pictures, of this process.
        should_stop: asked after each batch; when it says so on any process, the results are empty.

    Returns:
        what `measure` returns, with the figures of the task's metric; and the examples.

    Raises:
        UserError: there is no image to evaluate on, or outputs are not finite.
    """
    bare = accelerator.unwrap_model(model)
    check_weights(bare, "the model")  # a detector finds nothing where its scores are NaN, and says no more
    judge = task_named(task).new_judge(num_labels)
    examples: list[EvaluatedImage] = []

    def look(batch: dict[str, Any]) -> int:
        for pixel_values, truths in alike(batch["pixel_values"], batch["labels"]):
            found = predict(bare, pixel_values, truths, judge, processor, accelerator)
            for image, truth, prediction in zip(pixel_values, truths, found, strict=True):
                judge.add(truth, prediction)
                if len(examples) < keep:
                    examples.append(EvaluatedImage(image, truth, prediction))
        return len(batch["labels"])

    results = measure(bare, loader, look, judge, accelerator=accelerator, progress=progress, should_stop=should_stop)
    return results, examples if results else []


def alike(images: list[torch.Tensor], truths: list[Truth]) -> Iterator[tuple[list[torch.Tensor], list[Truth]]]:
    """The images of a batch in groups of one size each."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(index)
    for members in groups.values():
        yield [images[index] for index in members], [truths[index] for index in members]


def predict(
    model: nn.Module,
    images: list[torch.Tensor],
    truths: list[Truth],
    judge: DenseJudge,
    processor: Any,
    accelerator: Accelerator,
) -> list[Any]:
    """Predictions for images of one size, as `EvaluatedImage.found`."""
    pixel_values, pixel_mask = collate(images, judge.divisor)
    inputs = {"pixel_values": pixel_values.to(accelerator.device, memory_format=torch.channels_last)}
    if pixel_mask is not None:
        inputs["pixel_mask"] = pixel_mask.to(accelerator.device)
    with accelerator.autocast():
        outputs = model(**inputs)
    check_finite(outputs.logits, "the model")
    return judge.found(outputs, processor, [truth.size for truth in truths])
