"""Evaluation of a classifier, exact for any number of processes and any division of the images among them."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from ..data.channels import batches_of
from ..data.classes import Classes
from ..data.columns import ImageDataset
from ..data.datasets import HELD_OUT, align_labels
from ..data.description import describe_data
from ..data.loader import make_loader
from ..data.opening import loader_arguments, open_splits
from ..data.transforms import EvalTransform
from ..foundation.errors import UserError, one_line
from ..foundation.exported import is_exported
from ..foundation.files import best_effort, write_json
from ..foundation.finite import finite_answers, refuse_not_finite
from ..foundation.graphs import graphed
from ..foundation.loading import load_checkpoint
from ..foundation.settings import read_yaml
from .metrics import Accuracy, ConfusionMatrix, PerClassAccuracy, TopKAccuracy
from .pictures import write_confusion_matrix
from .processes import count_images, gather, named_results
from .settings import EvaluationSettings


logger = logging.getLogger(__name__)

# Beyond this a confusion matrix (int64, classes squared) costs more memory than anyone will look at.
MAX_CONFUSION_CLASSES = 5000


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    *,
    accelerator: Accelerator,
    num_labels: int,
    topk: Sequence[int] = (1, 5),
    memory_format: torch.memory_format = torch.contiguous_format,
    progress: bool = False,
    should_stop: Callable[[], int] = lambda: 0,
) -> dict[str, Any]:
    """Metrics of a classifier over all images that the processes' loaders yield together.

    No process waits for another before its own images are through, so their numbers may differ at will; rankings
    and labels are then brought together, once, and every process returns the same results.

    Args:
        model: bare or wrapped by accelerate; its mode is restored.
        loader: yields `pixel_values` (batch, channels, height, width), `labels` (batch,) and `skipped`.
        topk: the k of the top-k accuracies; with fewer classes than k, all of them count.
        should_stop: asked after each batch; when it says so on any process, the result is empty.

    Returns:
        `eval_accuracy`, `eval_top5_accuracy` (for each k > 1), `eval_loss` (cross-entropy), `eval_samples`,
        `eval_skipped_images`, `eval_runtime` in seconds, `eval_samples_per_second`, `eval_per_class_accuracy` (a list;
        NaN for classes without images), `confusion_matrix` (int64 array, true by predicted; None beyond 5000 classes).

    Raises:
        UserError: no image at all, labels that the model does not have, or outputs that are not finite.
    """
    # The bare model: DistributedDataParallel would wait for the others in every forward pass.
    bare = accelerator.unwrap_model(model)
    was_training = bare.training
    bare.eval()
    classify = graphed(bare)
    device, depth = accelerator.device, min(max(topk), num_labels)
    loss_sum = torch.zeros((), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    unusable = torch.zeros((), device=device, dtype=torch.int64)
    rankings, references, skipped, stopped, fault = [], [], 0, False, None
    start = time.perf_counter()
    try:
        for batch in tqdm(loader, desc="evaluating", unit="batch", disable=not progress, leave=False):
            skipped += len(batch.get("skipped", ()))
            labels = batch["labels"]
            if not len(labels):
                continue
            check_labels(labels, num_labels)
            pixel_values = batch["pixel_values"].to(device, memory_format=memory_format, non_blocking=True)
            with accelerator.autocast():
                logits = classify(pixel_values=pixel_values).logits.float()
            unusable += (~finite_answers(logits)).sum()  # counted on the device, which nobody waits for
            loss_sum += nn.functional.cross_entropy(logits, labels.to(device, non_blocking=True), reduction="sum")
            rankings.append(logits.topk(depth).indices)
            references.append(labels)
            if stopped := bool(should_stop()):
                break
    except UserError as error:  # the others would wait for this process
        fault = str(error)
    mine = {
        "fault": fault,
        "stopped": stopped,
        "ranked": torch.cat(rankings).cpu().numpy() if rankings else np.zeros((0, depth), dtype=np.int64),
        "labels": torch.cat(references).numpy() if references else np.zeros(0, dtype=np.int64),
        "loss": loss_sum.item(),
        "unusable": unusable.item(),
        "count": sum(map(len, references)),
        "skipped": skipped,
    }
    bare.train(was_training)
    parts = gather(mine)
    seconds = time.perf_counter() - start
    if not parts:
        return {}
    count, missed = count_images(parts, loader)
    ranked = np.concatenate([part["ranked"] for part in parts])
    labels = np.concatenate([part["labels"] for part in parts])
    refuse_not_finite(sum(part["unusable"] for part in parts), count, "the model")
    best = {"predictions": ranked[:, 0], "references": labels}
    results = {
        "eval_accuracy": metric(Accuracy).compute(**best)["accuracy"],
        "eval_loss": sum(part["loss"] for part in parts) / count,
        "eval_samples": count,
        "eval_skipped_images": missed,
        "eval_runtime": seconds,
        "eval_samples_per_second": count / seconds,
    }
    for k in sorted(set(topk) - {1}):
        top = metric(TopKAccuracy).compute(predictions=ranked, references=labels, k=k)
        results[f"eval_top{k}_accuracy"] = top[f"top{k}_accuracy"]
    per_class = metric(PerClassAccuracy).compute(**best, num_labels=num_labels)
    results["eval_per_class_accuracy"] = per_class["per_class_accuracy"]
    results["confusion_matrix"] = None
    if num_labels <= MAX_CONFUSION_CLASSES:
        results |= metric(ConfusionMatrix).compute(**best, num_labels=num_labels)
    return results


def metric(kind: type) -> Any:
    """In memory: the default writes Arrow files into the user's cache."""
    return kind(keep_in_memory=True)


def check_labels(labels: torch.Tensor, num_labels: int) -> None:
    """Raises a UserError for labels outside 0..num_labels-1; `labels` are on the host."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_labels:
        wrong = low if low < 0 else high
        raise UserError(
            f"the dataset has an image with label {wrong}, but labels go from 0 to {num_labels - 1}. "
            "Is --label_column_name the right column?"
        )


def check_classification(dataset: ImageDataset) -> None:
    """Raises a UserError unless the dataset has one class per image."""
    if dataset.classes is None:
        kind = "numbers, for regression" if dataset.problem_type == "regression" else "none"
        raise UserError(
            f"{dataset.name} is no classification dataset: its labels are {kind}. "
            "Choose the column with --label_column_name."
        )


def describe_results(results: dict[str, Any]) -> str:
    """The results of an evaluation in one line."""
    return (
        f"top-1 {results['eval_accuracy']:.2%}, top-5 {results['eval_top5_accuracy']:.2%}, "
        f"loss {results['eval_loss']:.4f}, {results['eval_samples']} images at "
        f"{results['eval_samples_per_second']:.0f} images/s"
        + (f", {results['eval_skipped_images']} broken images left out" if results["eval_skipped_images"] else "")
    )


def accelerator_on_device(settings: EvaluationSettings) -> Accelerator:
    """An Accelerator on the device that was asked for.

    Raises:
        UserError: there is no such device, or a launcher has chosen devices already.
    """
    if settings.device != "auto":
        if "LOCAL_RANK" in os.environ:
            raise UserError("--device is for one process; accelerate launch chooses by --cpu and --gpu_ids.")
        try:
            device = torch.empty(0, device=settings.device).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {settings.device} cannot be used: {one_line(error)}") from error
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index or 0)
    return Accelerator(mixed_precision=settings.mixed_precision, cpu=settings.device == "cpu")


def held_out_fraction(settings: EvaluationSettings) -> float:
    """Which part of the images to measure on, as `open_datasets` takes it; 0 for all.

    A model that is measured on images it was trained on looks better than it is: where its run's settings name these
    very images, the part that the run held out is meant, unless `train_val_split` says otherwise.
    """
    if settings.train_val_split is not None:
        return settings.train_val_split
    written = Path(settings.model) / "training_settings.yaml"
    if settings.split is not None or not written.is_file():
        return 0.0
    run = read_yaml(str(written))
    if run.get("validation_dir") or run.get("validation_split"):
        return 0.0
    name, trained = settings.dataset_name or settings.validation_dir, run.get("dataset_name") or run.get("train_dir")
    if trained is None or Path(name).resolve() != Path(trained).resolve():
        return 0.0
    return float(run.get("train_val_split") or 0.0)


def evaluate_checkpoint(settings: EvaluationSettings) -> dict[str, Any]:
    """Loads a checkpoint and a labelled dataset, evaluates, and writes the results if there is an `output_dir`.

    Returns:
        what `all_results.json` holds.

    Raises:
        UserError: not a model, not a labelled dataset, or labels that do not belong together.
    """
    accelerator = accelerator_on_device(settings)
    fraction = held_out_fraction(settings)
    if is_exported(settings.model):
        from ..export.runtime import load_classifier

        model, processor, fresh = *load_classifier(settings.model, settings.trust_remote_code), []
    else:
        model, processor, fresh = load_checkpoint(settings.model, settings.origin())
    if fresh:
        raise UserError(f"{settings.model} is not a trained classifier of its own shape: it lacks {fresh[0]}.")
    if not model.config.num_labels:
        raise UserError(f"{settings.model} has no classes: it is a feature extractor (num_labels is 0).")
    label_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    folder = {"train_dir": None, "validation_dir": settings.validation_dir}
    if fraction:  # what is divided is a training folder; a validation folder is one as a whole
        folder = {"train_dir": settings.validation_dir, "validation_dir": None}
    dataset = open_splits(
        settings,
        **folder,
        train_split=None,
        validation_split=settings.split,
        train_val_split=fraction,
        classes=Classes.of_config(model.config),
    )["validation"]
    check_classification(dataset)
    if accelerator.is_main_process:
        print(describe_data({"evaluation": dataset}), file=sys.stderr)
    if settings.train_val_split is None and dataset.name.endswith(HELD_OUT) and accelerator.is_main_process:
        logger.warning(
            "%s was trained on the other images of %s: --train_val_split 0 would take all.",
            settings.model,
            dataset.name,
        )
    loader = make_loader(
        align_labels(dataset, model.config.label2id, subset=True),
        transform := EvalTransform(processor),
        batch_size=settings.per_device_eval_batch_size,
        training=False,
        batches=batches_of(transform),
        **loader_arguments(settings, accelerator),
    )
    memory_format = torch.channels_last
    model.to(accelerator.device, memory_format=memory_format)
    results = evaluate(
        model,
        loader,
        accelerator=accelerator,
        num_labels=len(label_names),
        memory_format=memory_format,
        progress=accelerator.is_main_process,
    )
    named = named_results(results, label_names)
    if settings.output_dir and accelerator.is_main_process:
        folder = Path(settings.output_dir)
        write_json(folder / "all_results.json", {"model": settings.model, **named})
        if results["confusion_matrix"] is not None:
            with best_effort("drawing the confusion matrix"):
                write_confusion_matrix(folder / "confusion_matrix.png", results["confusion_matrix"], label_names)
    accelerator.end_training()
    return named
