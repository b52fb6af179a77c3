"""Evaluation of classifiers, of one label or several, and of regressors: exact for any number of processes and any
division of the images among them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

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
from ..foundation.graphs import graphed
from ..foundation.loading import load_checkpoint
from ..foundation.processes import found_by_main
from ..foundation.report_folder import report_folder
from ..foundation.settings import read_yaml
from ..foundation.tasks import CLASSIFICATION, TASKS, Task, task_of_config
from .examples import Examples
from .processes import measure, named_results
from .rows import RowKeeper
from .settings import EvaluationSettings
from .thresholds import HALF


logger = logging.getLogger(__name__)

BATCH_SIZE = 64


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    *,
    accelerator: Accelerator,
    num_labels: int,
    task: str = CLASSIFICATION,
    thresholds: Sequence[float] | Literal["f1"] | None = None,
    operating_point: str | tuple[int, float] | None = None,
    intervals: bool = False,
    keep_answers: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
    progress: bool = False,
    should_stop: Callable[[], int] = lambda: 0,
    rows: RowKeeper | None = None,
    examples: Examples | None = None,
) -> dict[str, Any]:
    """Metrics over all images that the processes' loaders yield together: see `processes.measure`.

    Args:
        model: bare or wrapped by accelerate; its mode is restored.
        loader: yields `pixel_values` (batch, channels, height, width), `labels` as the task has them, and `skipped`.
        accelerator: says where this runs, and with which other processes.
        num_labels: what the model answers, classes or targets.
        task: as `train --task` names it.
        thresholds: of several labels per image, the probability from which on each is predicted; None: 0.5; "f1":
            chosen on these images and given back as `label_thresholds`, see `thresholds.choose_thresholds`.
        operating_point: of one class per image, for what the answers are moved, see `metrics.AnswerJudge`.
        intervals: add `eval_confidence_intervals`, if there are few images.
        keep_answers: add `answers` (images, num_labels), float32: probabilities, or numbers in units; and the labels
            as `references`, in the same order.
        memory_format: of the images.
        progress: shows a bar.
        should_stop: asked after each batch; when it says so on any process, the result is empty.
        rows: gets what was found of each image; the loader then tells `origins`.
        examples: keeps some of the images, and what was found of them.

    Returns:
        what `measure` returns, with the figures of `metrics.ClassJudge`, `LabelsJudge` or `NumbersJudge`.

    Raises:
        UserError: no image at all, labels that the model does not have, or outputs that are not finite.
    """
    bare = accelerator.unwrap_model(model)
    answer = graphed(bare)
    judge = TASKS[task].new_judge(
        num_labels,
        thresholds=thresholds,
        operating_point=operating_point,
        intervals=intervals,
        keep_answers=keep_answers,
    )

    def look(batch: dict[str, Any]) -> int:
        labels = batch["labels"]
        if len(labels):
            check_labels(labels, num_labels)
            pixel_values = batch["pixel_values"].to(accelerator.device, memory_format=memory_format, non_blocking=True)
            # A number in its unit may have more digits than half precision.
            with contextlib.nullcontext() if TASKS[task].reads == "numbers" else accelerator.autocast():
                logits = answer(pixel_values=pixel_values).logits
            answers = judge.add(labels, logits)
            if rows is not None:
                rows.add(batch["origins"], answers)
            if examples is not None:
                examples.add(batch["pixel_values"], answers)
        return len(labels)

    return measure(bare, loader, look, judge, accelerator=accelerator, progress=progress, should_stop=should_stop)


def check_labels(labels: torch.Tensor, num_labels: int) -> None:
    """Raises a UserError unless labels, on the host, fit the model: classes (B,), or numbers (B, num_labels)."""
    if labels.ndim == 2:
        if labels.shape[1] != num_labels:
            raise UserError(f"the dataset has {labels.shape[1]} numbers per image, but the model gives {num_labels}.")
        if not labels.isfinite().all():
            raise UserError("the dataset has an image with a label that is no number (NaN or infinity).")
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_labels:
        wrong = low if low < 0 else high
        raise UserError(
            f"the dataset has an image with label {wrong}, but labels go from 0 to {num_labels - 1}. "
            "Is --label_column_name the right column?"
        )


def draw_results(folder: Path, task: Task, results: dict[str, Any], label_names: Sequence[str]) -> None:
    """The picture of what `evaluate` returned; one that cannot be drawn is missing, no more."""
    judge = task.judge
    with best_effort(f"drawing {judge.picture}"):
        judge.draw(folder / judge.picture, results, label_names)


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


def tell_data(settings: EvaluationSettings, dataset: ImageDataset) -> None:
    """Says on stderr what is measured on."""
    print(describe_data({"evaluation": dataset}), file=sys.stderr)
    if settings.train_val_split is None and dataset.name.endswith(HELD_OUT):
        logger.warning(
            "%s was trained on the other images of %s: --train_val_split 0 would take all.",
            settings.model,
            dataset.name,
        )


# folder, settings, model, image processor, dataset, results -> what the caller wants; it writes files into the folder.
Report = Callable[[Path, EvaluationSettings, nn.Module, Any, ImageDataset, dict[str, Any]], Any]


def evaluate_checkpoint(
    settings: EvaluationSettings, report: Report | None = None, accelerator: Accelerator | None = None
) -> dict[str, Any]:
    """Loads a checkpoint and a labelled dataset, evaluates, and writes the results if there is an `output_dir`.

    Where `settings` name a folder for a report, the rows of all images are written there, too.

    Args:
        settings: model, data, and where results go.
        report: writes what a report has besides its rows, called on the main process. The folder that it gets becomes
            the named one when it returns; the rows are there already (`rows.read_rows`). The model is on its device,
            `pictures_of` finds the images of the dataset, and the results are those of `all_results.json` and, under
            `broken`, `path`, `split`, `position` and `error` of each image that could not be used.
        accelerator: of a caller who goes on with it; else its own, which ends here.

    Returns:
        what `all_results.json` holds: figures, and under `task` what the model does.

    Raises:
        UserError: not a model, not a labelled dataset, or labels that do not belong together; a folder that holds
            another report.
    """
    caller, accelerator = accelerator, accelerator or accelerator_on_device(settings)
    with contextlib.ExitStack() as stack:
        folder = None
        if settings.report is not None:
            claimed = report_folder(Path(settings.report), settings.overwrite)
            folder = found_by_main(lambda: stack.enter_context(claimed))
        results = _evaluate_into(folder, settings, report, accelerator)
    if caller is None:
        accelerator.end_training()
    return results


def _evaluate_into(
    folder: Path | None, settings: EvaluationSettings, report: Report | None, accelerator: Accelerator
) -> dict[str, Any]:
    """`evaluate_checkpoint` with a folder for what makes a report."""
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
    task = task_of_config(model.config) or TASKS[CLASSIFICATION]
    label_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    place = {"train_dir": None, "validation_dir": settings.validation_dir}
    if fraction:  # what is divided is a training folder; a validation folder is one as a whole
        place = {"train_dir": settings.validation_dir, "validation_dir": None}
    dataset = open_splits(
        settings,
        **place,
        train_split=None,
        validation_split=settings.split,
        train_val_split=fraction,
        classes=Classes.of_config(model.config),
        problem_type=task.problem_type,
        other_columns=settings.slice_by,
    )["validation"]
    if accelerator.is_main_process:
        tell_data(settings, dataset)
    dataset = align_labels(dataset, model.config.label2id, subset=True)
    loader = make_loader(
        dataset,
        transform := EvalTransform(processor),
        batch_size=settings.per_device_eval_batch_size or BATCH_SIZE,
        training=False,
        batches=batches_of(transform),
        tell_origins=folder is not None,
        **loader_arguments(settings, accelerator),
    )
    memory_format = torch.channels_last
    model.to(accelerator.device, memory_format=memory_format)
    thresholds = getattr(model.config, "label_thresholds", None)
    rows = None
    if folder is not None:
        where = settings.dataset_name or settings.validation_dir
        kept = {"where": where, "task": task.name, "label_names": label_names}
        rows = RowKeeper(folder, dataset, **kept, process_index=accelerator.process_index)
    results = evaluate(
        model,
        loader,
        accelerator=accelerator,
        num_labels=len(label_names),
        task=task.name,
        thresholds=thresholds,
        intervals=True,
        memory_format=memory_format,
        progress=accelerator.is_main_process,
        rows=rows,
    )
    named = {"task": task.name, **named_results(results, label_names)}
    if settings.output_dir and accelerator.is_main_process:
        output = Path(settings.output_dir)
        write_json(output / "all_results.json", {"model": settings.model, **named})
        draw_results(output, task, results, label_names)
    if rows is not None:
        about = {"model": settings.model, "dataset": where, "train_val_split": fraction, "thresholds": None}
        about["split"] = dataset.split if settings.dataset_name or fraction else "validation"
        if task.reads == "classes":
            about["thresholds"] = list(thresholds or [HALF] * len(label_names))
        broken, shard_rows = rows.write(loader, about)
        if report is not None:
            dataset = dataclasses.replace(dataset, shard_rows=shard_rows)
            found = {"model": settings.model, **named, "broken": broken}

            def tell() -> None:
                report(folder, settings, model, processor, dataset, found)

            found_by_main(tell)
    return named
