"""Evaluation of segmenters and detectors, exact for any number of processes and any division of images among them."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..data.classes import Classes
from ..data.dense.batches import DenseEvalTransform, collate
from ..data.dense.datasets import DenseBatches, DenseDataset, Truth, with_annotations
from ..data.dense.plausibility import check_annotations
from ..data.loader import make_loader
from ..data.opening import loader_arguments, open_splits
from ..foundation.errors import UserError
from ..foundation.exported import is_exported
from ..foundation.files import best_effort, write_json
from ..foundation.finite import check_finite, check_weights
from ..foundation.loading import load_trained, task_of_checkpoint
from ..foundation.processes import found_by_main
from ..foundation.report_folder import report_folder
from ..foundation.tasks import Task, task_named
from .classification import accelerator_on_device, held_out_fraction, tell_data
from .dense_metrics import DetectionMetric, SegmentationMetric
from .dense_pictures import write_predictions
from .dense_rows import WORST, DenseRows, MapRows, ObjectRows, Shown, joined, mean_iou_intervals
from .processes import Judge, measure, named_results
from .rows import named_rows
from .settings import EvaluationSettings


DIVISOR = 32  # of the sides of a batch; the stride of the last stage
BATCH_SIZE = 1
PICTURE, PICTURES = "predictions.png", 8  # the picture of predictions, and how many are in it


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
        picture: name of the file with a picture of predictions.
    """

    divisor: int
    picture: str

    def found(self, outputs: Any, processor: Any, sizes: list[tuple[int, int]]) -> list[Any]:
        """What the model found in each image, in the pixels of images of `sizes` (height, width)."""

    def add(self, truth: Truth, found: Any) -> Any:
        """Counts one image, and returns what it counted of it."""


class MapJudge(SegmentationMetric):
    """Of maps of classes."""

    divisor = 1
    picture = PICTURE

    def found(self, outputs: Any, processor: Any, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return [values.cpu().numpy() for values in maps]

    def add(self, truth: Truth, found: np.ndarray) -> np.ndarray:
        return self.update(found, truth.map)


class BoxJudge(DetectionMetric):
    """Of boxes."""

    divisor = DIVISOR
    picture = PICTURE
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

    def add(self, truth: Truth, found: dict[str, Any]) -> dict[str, Any]:
        values = (found[name] for name in ("boxes", "scores", "labels", "masks"))
        return self.update(truth.key, truth.size, *values, truth.objects)


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
    rows: DenseRows | None = None,
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
        rows: gets what was found in each image; the loader then tells `origins`.
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
        images, truths = batch["pixel_values"], batch["labels"]
        for members in alike(images):
            some = [images[index] for index in members], [truths[index] for index in members]
            found = predict(bare, *some, judge, processor, accelerator)
            for index, prediction in zip(members, found, strict=True):
                counted = judge.add(truths[index], prediction)
                example = EvaluatedImage(images[index], truths[index], prediction)
                if rows is not None:
                    rows.add(batch["origins"][index], example, counted)
                if len(examples) < keep:
                    examples.append(example)
        return len(batch["labels"])

    results = measure(bare, loader, look, judge, accelerator=accelerator, progress=progress, should_stop=should_stop)
    return results, examples if results else []


def alike(images: list[torch.Tensor]) -> Iterable[list[int]]:
    """The images of a batch in groups of one size each: their places."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(index)
    return groups.values()


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
    maps = outputs.get("segmentation")  # of an export, which says -1 where numbers are not finite
    check_finite(outputs.logits if maps is None else torch.where(maps < 0, torch.nan, 0.0), "the model")
    return judge.found(outputs, processor, [truth.size for truth in truths])


@dataclass
class DenseFindings:
    """An evaluation image by image, in the main process.

    Attributes:
        task: of the model.
        label_names: its classes, by index.
        dataset: what messages call the split.
        about: what all rows share: `model`, `dataset`, `split`, `task`, `label_names`.
        results: what `all_results.json` holds.
        figures: the same and arrays, as `evaluate` gives them.
        rows: of every image, by position; see `dense_rows`.
        worst: the worst images, the worst first.
        broken: `path`, `split`, `position` and `error` of each image that could not be used.
    """

    task: Task
    label_names: list[str]
    dataset: str
    about: dict[str, Any]
    results: dict[str, Any]
    figures: dict[str, Any]
    rows: list[dict[str, Any]]
    worst: list[Shown]
    broken: list[dict[str, Any]]


def evaluate_dense_checkpoint(
    settings: EvaluationSettings, report: Callable[[Path, DenseFindings], Any] | None = None
) -> dict[str, Any]:
    """Loads a segmenter or detector and annotated images, evaluates, and writes the results if there is an
    `output_dir`.

    Args:
        settings: model, data, and where results go.
        report: where `settings` name a folder for a report, writes the files into the folder that it gets, on the main
            process. This becomes the named one when it returns.

    Returns:
        what `all_results.json` holds: figures, and under `task` what the model does.

    Raises:
        UserError: not a trained model, no annotations of its kind, classes that it does not know; a folder that holds
            another report.
    """
    accelerator = accelerator_on_device(settings)
    with contextlib.ExitStack() as stack:
        folder = None
        if settings.report is not None:
            claimed = report_folder(Path(settings.report), settings.overwrite)
            folder = found_by_main(lambda: stack.enter_context(claimed))
        results, findings = find_out(settings, accelerator)
        if folder is not None and report is not None:
            found_by_main(lambda: report(folder, findings) and None)
    accelerator.end_training()
    return results


def find_out(settings: EvaluationSettings, accelerator: Accelerator) -> tuple[dict[str, Any], DenseFindings | None]:
    """`evaluate_dense_checkpoint` without the report; on the main process what it is about, if there is to be one."""
    main = accelerator.is_main_process
    task = task_of_checkpoint(settings.model, settings.origin())
    settings.task = task.name
    model, processor = load_dense(settings, task)
    label_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if settings.reduce_labels is None:
        settings.reduce_labels = task.reads == "map" and bool(getattr(processor, "do_reduce_labels", False))
    dataset = open_annotated(settings, task, model.config, label_names)
    if main:
        tell_data(settings, dataset.images)
    checked, seen = check_annotations({"validation": dataset}, settings)
    dataset = checked["validation"]
    if main:
        print("\n".join(seen), file=sys.stderr)
    rows: DenseRows | None = None
    if task.gives == "map":  # they tell how sure the mean IoU is, too
        rows = MapRows(processor, keep=WORST if settings.report else 0)
    elif settings.report:
        rows = ObjectRows(processor)
    loader = make_loader(
        dataset.images,
        DenseEvalTransform(processor),
        batch_size=settings.per_device_eval_batch_size or BATCH_SIZE,
        training=False,
        batches=functools.partial(DenseBatches, dense=dataset),
        tell_origins=rows is not None,
        **{**loader_arguments(settings, accelerator), "pin_memory": False},
    )
    model.to(accelerator.device, memory_format=torch.channels_last)
    figures, examples = evaluate(
        model,
        loader,
        task=task.name,
        processor=processor,
        accelerator=accelerator,
        num_labels=len(label_names),
        keep=PICTURES if settings.output_dir and main else 0,
        rows=rows,
        progress=main,
    )
    every = gather_object([rows.state(loader)]) if rows is not None else []
    if not main:
        return figures, None
    place = {"where": settings.dataset_name, "split": dataset.images.split, "by_name": named_rows(dataset.images)}
    told, worst, broken = joined(every, loader.num_shards, **place)
    if task.gives == "map":
        figures["eval_confidence_intervals"] = mean_iou_intervals(told, len(label_names))
    results = {"task": task.name, **named_results(figures, label_names)}
    if settings.output_dir:
        folder = Path(settings.output_dir)
        write_json(folder / "all_results.json", {"model": settings.model, **results})
        with best_effort(f"drawing {PICTURE}"):
            write_predictions(folder / PICTURE, examples, label_names, processor.image_mean, processor.image_std)
    about = {
        "model": settings.model,
        "dataset": settings.dataset_name,
        "split": dataset.images.split,
        "task": task.name,
        "label_names": label_names,
    }
    name = dataset.images.name
    return results, DenseFindings(task, label_names, name, about, results, figures, told, worst, broken)


def load_dense(settings: EvaluationSettings, task: Task) -> tuple[Any, Any]:
    """The model, or export of one, and its image processor."""
    if is_exported(settings.model):
        from ..export.runtime import load

        model = load(settings.model, trust_remote_code=settings.trust_remote_code)
        return model, model.image_processor
    return load_trained(settings.model, settings.origin(), task)


def open_annotated(settings: EvaluationSettings, task: Task, config: Any, label_names: list[str]) -> DenseDataset:
    """The split to measure on, with its classes as the model numbers them.

    Raises:
        UserError: its annotations are not of the kind that the model gives, or of other classes.
    """
    if settings.dataset_name is None:
        raise UserError(f"{settings.model}, {task.noun}: give annotated images by --dataset_name.")
    images = open_splits(
        settings,
        train_split=None,
        validation_split=settings.split,
        train_val_split=held_out_fraction(settings),
        labelled=False,
    )["validation"]
    try:
        dataset = with_annotations(images, settings, Classes.of_config(config))
        own = dataset.label_names
        if len(own) == len(label_names) and set(label_names) == {f"LABEL_{index}" for index in range(len(own))}:
            return dataset  # a model that does not name its classes is taken by position
        return dataset.with_class_order(label_names)
    except UserError as error:
        raise UserError(f"{settings.model}, {task.noun}: {error}") from error
