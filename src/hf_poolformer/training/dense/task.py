"""What training a segmenter or detector does its own way: see `training.task.TaskTraining`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from transformers import PreTrainedModel

from ...data.columns import ImageDataset
from ...data.dense.batches import DenseEvalTransform, collate, collate_maps
from ...data.dense.datasets import DenseBatches, DenseDataset, open_dense_datasets
from ...data.dense.plausibility import check_annotations
from ...data.description import describe_data
from ...data.loader import ImageLoader, make_loader
from ...data.opening import loader_arguments
from ...evaluation.dense import DIVISOR, PICTURE, PICTURES, EvaluatedImage, evaluate
from ...evaluation.dense_metrics import pycocotools
from ...evaluation.dense_pictures import draw_predictions, write_predictions
from ...evaluation.processes import describe_results, named_results
from ...foundation.files import best_effort
from ...foundation.tasks import TASKS
from ...settings.dense import DenseSettings
from ..initialisation import labels_in_model_order
from ..task import TaskTraining
from .augmentation import DenseTrainTransform
from .initialisation import initial_dense_model


if TYPE_CHECKING:
    from ..loop import Run


class DenseTraining(TaskTraining):
    examples: Sequence[EvaluatedImage] = ()  # of the last evaluation, if it kept some

    def __init__(self, settings: DenseSettings):
        super().__init__(settings)
        self.task = TASKS[settings.task]
        if self.task.gives == "objects":
            pycocotools()  # missing, it would be missed only after an epoch

    def open_data(self, accelerator: Accelerator) -> list[str]:
        datasets = open_dense_datasets(self.settings)
        self.label_names = labels_in_model_order(self.settings, datasets["train"].label_names)
        datasets = {split: dataset.with_class_order(self.label_names) for split, dataset in datasets.items()}
        self.datasets, seen = check_annotations(datasets, self.settings)
        accelerator.print(describe_data({split: dataset.images for split, dataset in datasets.items()}))
        accelerator.print("\n".join(seen))
        return self.label_names

    @property
    def num_examples(self) -> int | None:
        return self.datasets["train"].images.num_examples

    @property
    def evaluated(self) -> ImageDataset | None:
        dataset = self.datasets.get("validation")
        return None if dataset is None else dataset.images

    def make_model(self, accelerator: Accelerator, memory_format: torch.memory_format) -> tuple[PreTrainedModel, Any]:
        model, processor = initial_dense_model(self.settings, self.datasets["train"].classes)
        if accelerator.distributed_type == DistributedType.MULTI_GPU:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model, processor

    def make_loaders(self, accelerator: Accelerator, model: PreTrainedModel, processor: Any) -> tuple[Any, Any | None]:
        loaders = {
            split: make_dense_loader(dataset, self.settings, accelerator, processor, training=split == "train")
            for split, dataset in self.datasets.items()
        }
        return loaders["train"], loaders.get("validation")

    def describe_images(self, processor: Any) -> str:
        return f"of at most {self.settings.crop_size or self.settings.longest_edge} pixels a side"

    def losses(self, run: Run, batch: dict[str, Any]) -> list[torch.Tensor]:
        """What the model computes itself, without parts."""
        return [run.model(**model_inputs(batch, run.accelerator.device, run.memory_format)).loss]

    def tiled(self, batch: dict[str, Any], size: int) -> dict[str, Any]:
        """As `TaskTraining.tiled`: without crops, wide images among tall ones are padded to their longest edges."""
        batch, settings = super().tiled(batch, size), self.settings
        if settings.crop_size:
            return batch
        edge = round(settings.longest_edge * settings.scale_max)
        labels = [
            {**label, "masks": padded(label["masks"], edge)} if isinstance(label, dict) and "masks" in label else label
            for label in batch["labels"]
        ]
        return {**batch, "pixel_values": [padded(image, edge) for image in batch["pixel_values"]], "labels": labels}

    def evaluate(self, run: Run, model: nn.Module, final: bool) -> tuple[dict[str, Any], Any]:
        main = run.accelerator.is_main_process
        results, examples = evaluate(
            model,
            run.eval_loader,
            task=self.task.name,
            processor=run.processor,
            accelerator=run.accelerator,
            num_labels=len(self.label_names),
            keep=PICTURES if (final or self.keeps_examples) and main else 0,
            progress=main and sys.stderr.isatty(),
            should_stop=run.stop.check,
        )
        self.examples = examples
        return named_results(results, self.label_names), (examples or None) if final else None

    def describe(self, results: dict[str, Any]) -> str:
        return describe_results(results, self.task, self.settings.metric_for_best_model)

    def draw_predictions(self, processor: Any) -> Any | None:
        if not (self.keeps_examples and self.examples):
            return None
        return draw_predictions(self.examples, self.label_names, processor.image_mean, processor.image_std)

    def write_pictures(self, folder: Path, shown: Any, processor: Any) -> None:
        colours = processor.image_mean, processor.image_std
        with best_effort("drawing the predictions"):
            write_predictions(folder / PICTURE, shown, self.label_names, *colours)


def make_dense_loader(
    dataset: DenseDataset,
    settings: DenseSettings,
    accelerator: Accelerator,
    processor: Any,
    *,
    training: bool,
) -> ImageLoader:
    """Batches of this process's share: `pixel_values`, a list of (C, H, W), and `labels`, a list of what the model is
    trained with, or of `Truth`.

    Raises:
        UserError: as `make_loader`.
    """
    common = loader_arguments(settings, accelerator)
    return make_loader(
        dataset.images,
        DenseTrainTransform(settings, processor) if training else DenseEvalTransform(processor),
        batch_size=settings.per_device_train_batch_size if training else settings.per_device_eval_batch_size,
        training=training,
        seed=settings.seed,
        max_skipped_shards=settings.max_skipped_shards,
        shuffle_buffer_size=settings.shuffle_buffer_size,
        batches=functools.partial(DenseBatches, dense=dataset),
        **{**common, "pin_memory": training and common["pin_memory"]},
    )


def padded(image: torch.Tensor, edge: int) -> torch.Tensor:
    """A tensor (N, height, width) with zeros at the bottom and on the right up to this edge."""
    height, width = image.shape[-2:]
    return nn.functional.pad(image, (0, max(edge - width, 0), 0, max(edge - height, 0)))


def model_inputs(batch: dict[str, Any], device: torch.device, memory_format: torch.memory_format) -> dict[str, Any]:
    """A batch of the loader as arguments of the model, on its device."""
    labels = batch["labels"]
    of_objects = isinstance(labels[0], dict)
    pixel_values, pixel_mask = collate(batch["pixel_values"], DIVISOR if of_objects else 1)
    inputs: dict[str, Any] = {"pixel_values": pixel_values.to(device, memory_format=memory_format, non_blocking=True)}
    if of_objects:
        if pixel_mask is not None:
            inputs["pixel_mask"] = pixel_mask.to(device, non_blocking=True)
        moved = [{name: value.to(device, non_blocking=True) for name, value in label.items()} for label in labels]
        return {**inputs, "labels": moved}
    return {**inputs, "labels": collate_maps(labels, pixel_values.shape[-2:]).to(device, non_blocking=True)}
