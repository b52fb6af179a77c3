"""Evaluation of segmenters and detectors, exact for any number of processes and any division of images among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm import tqdm

from ..data.dense.datasets import Truth
from ..foundation.errors import UserError
from ..foundation.finite import check_finite, check_weights
from ..training.dense.augmentation import collate
from .dense_metrics import DetectionMetric, SegmentationMetric


DIVISOR = 32  # of the sides of a batch; the stride of the last stage


@dataclass
class Example:
    """An evaluated image with what is in it and what was found, for a picture.

    Attributes:
        pixel_values: (3, h, w) as the model saw it, normalised.
        found: annotation map (height, width), or `boxes`, `scores`, `labels` and perhaps `masks`, as arrays.
    """

    pixel_values: torch.Tensor
    truth: Truth
    found: Any


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
) -> tuple[dict[str, Any], list[Example]]:
    """Metrics over all images that the processes' loaders yield together, in the pixels of the stored images.

    What an image gives does not depend on those beside it: only images of one size share a batch. No process waits for
    another before its own images are through; their counts or detections are then brought together, once.

    Args:
        model: bare or wrapped by accelerate; its mode is restored.
        loader: yields lists `pixel_values` and `labels` (`Truth`), and `skipped`.
        processor: its `post_process_*` make predictions of the model's outputs.
        keep: how many examples to return for pictures, of this process.
        should_stop: asked after each batch; when it says so on any process, the results are empty.

    Returns:
        Results, the same on every process: those of the task's metric, `eval_samples`, `eval_skipped_images`,
        `eval_runtime` in seconds, `eval_samples_per_second`; and the examples.

    Raises:
        UserError: there is no image to evaluate on, or outputs are not finite.
    """
    # The bare model: DistributedDataParallel would wait for the others in every forward pass.
    bare = accelerator.unwrap_model(model)
    check_weights(bare, "the model")  # a detector finds nothing where its scores are NaN, and says no more
    was_training = bare.training
    bare.eval()
    if task == "semantic-segmentation":
        metric = SegmentationMetric(num_labels)
    else:
        metric = DetectionMetric(num_labels, with_masks=task == "instance-segmentation")
    examples: list[Example] = []
    skipped, count, stopped, fault = 0, 0, False, None
    start = time.perf_counter()
    try:
        for batch in tqdm(loader, desc="evaluating", unit="batch", disable=not progress, leave=False):
            skipped += len(batch["skipped"])
            for pixel_values, truths in alike(batch["pixel_values"], batch["labels"]):
                found = predict(bare, pixel_values, truths, task, processor, accelerator)
                for image, truth, prediction in zip(pixel_values, truths, found, strict=True):
                    count += 1
                    if isinstance(metric, SegmentationMetric):
                        metric.update(prediction, truth.map)
                    else:
                        values = (prediction[name] for name in ("boxes", "scores", "labels", "masks"))
                        metric.update(truth.key, truth.size, *values, truth.objects)
                    if len(examples) < keep:
                        examples.append(Example(image, truth, prediction))
            if stopped := bool(should_stop()):
                break
    except UserError as error:  # the others would wait for this process
        fault = str(error)
    mine = {"fault": fault, "stopped": stopped, "skipped": skipped, "count": count, "state": metric.state()}
    parts = gather_object([mine])
    bare.train(was_training)
    for part in parts:
        if part["fault"]:
            raise UserError(part["fault"])
    if any(part["stopped"] for part in parts):
        return {}, []
    samples = sum(part["count"] for part in parts)
    if not samples:
        raise UserError("there is no image to evaluate on: the split is empty, or every image in it is broken.")
    missed = sum(part["skipped"] for part in parts)
    if hasattr(loader, "judge"):  # a list of batches has none
        loader.judge(samples + missed, missed)
    # Once, not in every process: COCO's evaluation of a large split takes its time and memory.
    results = [type(metric).compute([part["state"] for part in parts]) if accelerator.is_main_process else None]
    broadcast_object_list(results)
    seconds = time.perf_counter() - start
    return {
        **results[0],
        "eval_samples": samples,
        "eval_skipped_images": missed,
        "eval_runtime": seconds,
        "eval_samples_per_second": samples / seconds,
    }, examples


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
    task: str,
    processor: Any,
    accelerator: Accelerator,
) -> list[Any]:
    """Predictions for images of one size, as `Example.found`."""
    device = accelerator.device
    sizes = [truth.size for truth in truths]
    if task == "semantic-segmentation":
        pixel_values, _ = collate(images, 1)
        with accelerator.autocast():
            outputs = model(pixel_values=pixel_values.to(device, memory_format=torch.channels_last))
        check_finite(outputs.logits, "the model")
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return [values.cpu().numpy() for values in maps]
    pixel_values, pixel_mask = collate(images, DIVISOR)
    inputs = {"pixel_values": pixel_values.to(device, memory_format=torch.channels_last)}
    if pixel_mask is not None:
        inputs["pixel_mask"] = pixel_mask.to(device)
    with accelerator.autocast():
        outputs = model(**inputs)
    check_finite(outputs.logits, "the model")
    found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    masks: list[Any] = [None] * len(found)
    if task == "instance-segmentation":
        segments = processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True
        )
        masks = [part["segmentation"].cpu().numpy() for part in segments]
    return [
        {
            "boxes": part["boxes"].float().cpu().numpy(),
            "scores": part["scores"].float().cpu().numpy(),
            "labels": part["labels"].cpu().numpy(),
            "masks": mask,
        }
        for part, mask in zip(found, masks, strict=True)
    ]


def named_results(results: dict[str, Any], label_names: list[str]) -> dict[str, Any]:
    """Results fit for JSON: figures of single classes under the classes' names, and None for what is not a number."""
    plain = {}
    for name, value in results.items():
        if isinstance(value, list):
            value = {label: known(number) for label, number in zip(label_names, value, strict=True)}
        plain[name] = known(value) if isinstance(value, float) else value
    return plain


def known(value: float) -> float | None:
    return None if np.isnan(value) else value
