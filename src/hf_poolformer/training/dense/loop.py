"""Training of segmenters and detectors: `train(settings)` from the first image to the published model.

Steps, checkpoints, signals and the log are those of `training.loop`; here is what a step is, and what is measured.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import set_seed
from torch import nn

from ...data.dense.datasets import make_dense_loader, numbered, open_dense_datasets
from ...data.dense.plausibility import check_annotations
from ...data.description import describe_data
from ...evaluation.dense import DIVISOR, EvaluatedImage, evaluate, named_results
from ...evaluation.dense_metrics import pycocotools
from ...evaluation.dense_pictures import write_curves, write_predictions
from ...foundation.files import best_effort, write_json
from ...foundation.processes import Agreement, alone_in_its_folder
from ...foundation.tasks import TASKS
from ..checkpoints import Progress, TrainingState
from ..emissions import EmissionsMeter
from ..initialisation import label_order
from ..loop import (
    Run,
    finish,
    keep_if_best,
    leave_model,
    leaving_the_model,
    record,
    running,
    save_and_leave,
    train_epochs,
    training_figures,
    write_card,
)
from ..optimisation import WeightAverage, make_optimizer, scaled_learning_rate
from ..preparation import begin, make_accelerator, plan, prepare_output
from .arguments import DenseSettings
from .augmentation import collate, collate_maps
from .initialisation import initial_dense_model
from .optimisation import make_dense_schedule


logger = logging.getLogger(__name__)

PICTURES = 8  # predictions in the picture


@alone_in_its_folder
def train(settings: DenseSettings) -> dict[str, Any]:
    """Trains a segmenter or detector as the settings say and leaves everything about it in `settings.output_dir`.

    Every process of a run calls it. Leaves by `Stopped` (a SystemExit) after SIGTERM or Ctrl-C, with a checkpoint.

    Returns:
        what `all_results.json` holds: the `eval_*` figures of `evaluation.evaluate`, `train_loss` (mean of the last
        epoch), `train_runtime` in seconds, `train_samples_per_second`, `train_data_wait_share`, `epoch`, `step`,
        `skipped_images`.

    Raises:
        UserError: what was asked for cannot be done; the message says why.
        hf_poolformer.hub.publishing.PublishError: trained and saved, but not published.
    """
    if TASKS[settings.task].gives == "objects":
        pycocotools()  # missing, it would be missed only after an epoch
    accelerator = make_accelerator(settings)
    output_dir, resume_from = prepare_output(settings, accelerator)
    # Of a resumed run only a part could be measured, which tells nothing.
    measured = settings.emissions_country and accelerator.is_main_process and resume_from is None
    meter = EmissionsMeter(settings.emissions_country) if measured else None

    # Data: opened undecoded; the classes decide the model's head.
    datasets = open_dense_datasets(settings)
    label_names = label_order(settings, datasets["train"].label_names)
    datasets = {split: numbered(dataset, label_names) for split, dataset in datasets.items()}
    datasets, report = check_annotations(datasets, settings, accelerator)
    accelerator.print(describe_data({split: dataset.images for split, dataset in datasets.items()}))
    accelerator.print("\n".join(report.lines))

    # Model: equal on all processes, then every process goes its own random way.
    set_seed(settings.seed)
    model, processor = initial_dense_model(settings, datasets["train"].classes)
    if accelerator.distributed_type == DistributedType.MULTI_GPU:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    set_seed(settings.seed + 1 + accelerator.process_index)
    channels_last = settings.memory_format in ("auto", "channels_last")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model.to(accelerator.device, memory_format=memory_format)
    ema = WeightAverage(model, settings.ema_decay) if settings.ema_decay else None

    loaders = {
        split: make_dense_loader(dataset, settings, accelerator, processor, training=split == "train")
        for split, dataset in datasets.items()
    }
    accumulation = accelerator.gradient_accumulation_steps
    global_batch = settings.per_device_train_batch_size * accelerator.num_processes * accumulation
    total_steps, epochs = plan(settings, datasets["train"].images.num_examples, global_batch)

    learning_rate = scaled_learning_rate(settings, global_batch)
    optimizer = make_optimizer(model, settings, learning_rate)
    scheduler = make_dense_schedule(optimizer, settings, learning_rate, total_steps, epochs)
    # The loaders are not prepared: they are sharded already, and batches go to the device below.
    wrapped, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    progress = Progress(num_processes=accelerator.num_processes, global_batch=global_batch, label_names=label_names)
    state = TrainingState(accelerator, model, optimizer, scheduler, ema, progress)
    log = begin(settings, state, output_dir, resume_from, total_steps)
    accelerator.print(
        f"{settings.task}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(label_names)} "
        f"classes, {datasets['train'].images.num_examples or 'unknown number of'} training images, {total_steps} "
        f"steps of {global_batch} images, learning rate {learning_rate:.2e}, "
        f"{accelerator.num_processes} x {accelerator.device.type}."
    )

    with running(state, total_steps) as (stop, bar):
        run = Run(
            settings=settings,
            accelerator=accelerator,
            agreement=Agreement(accelerator),
            stop=stop,
            state=state,
            model=wrapped,
            train_loader=loaders["train"],
            eval_loader=loaders.get("validation"),
            mixer=None,
            memory_format=memory_format,
            log=log,
            bar=bar,
            total_steps=total_steps,
            accumulation=accumulation,
            global_batch=global_batch,
            compute_losses=dense_losses,
            processor=processor,
        )
        train_epochs(run, epochs, evaluate_now)
        leave_model(run)
        evaluation, examples = evaluate_now(run, keep=PICTURES) if run.eval_loader is not None else ({}, [])
        run.saver.finish()

    results = {**named_results(evaluation, label_names), **training_figures(run)}
    if meter is not None:
        with best_effort("measuring the emissions"):
            results.update(meter.stop())
    if accelerator.is_main_process:
        save_results(run, output_dir, results, examples)
    finish(run, lambda: summary(output_dir, results, settings.task))
    return results


def dense_losses(run: Run, batch: dict[str, Any]) -> list[torch.Tensor]:
    """The loss of a micro-batch, as the model computes it."""
    return [run.model(**model_inputs(batch, run.accelerator.device, run.memory_format)).loss]


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


def evaluate_now(run: Run, keep: int = 0) -> tuple[dict[str, Any], list[EvaluatedImage]]:
    """Evaluates what would be saved now: the moving average if there is one."""
    with leaving_the_model(run):
        results, examples = evaluate(
            run.model if run.state.ema is None else run.state.ema.module,
            run.eval_loader,
            task=run.settings.task,
            processor=run.processor,
            accelerator=run.accelerator,
            num_labels=len(run.progress.label_names),
            keep=keep if run.accelerator.is_main_process else 0,
            progress=run.accelerator.is_main_process and sys.stderr.isatty(),
            should_stop=run.stop.check,
        )
    if not results:
        save_and_leave(run, -run.agreement.minimum(-run.stop.check())[0])
    named = named_results(results, run.progress.label_names)
    figures = {name: value for name, value in named.items() if isinstance(value, (int, float))}
    record(run, {"step": run.progress.step, "epoch": run.progress.epoch, **figures})
    if run.accelerator.is_main_process:
        run.bar.write(f"epoch {run.progress.epoch}: {describe(named, run.settings.task)}", file=sys.stderr)
    if run.settings.keep_best:
        keep_if_best(run, figures)
    return results, examples


def describe(results: dict[str, Any], task: str) -> str:
    """The results of an evaluation in one line."""
    shown = [figure for figure in TASKS[task].shown if results.get(figure.key) is not None]
    parts = [f"{figure.short} {results[figure.key]:.3f}" for figure in shown]
    return (
        f"{', '.join(parts) or 'nothing to find'}, {results['eval_samples']} images at "
        f"{results['eval_samples_per_second']:.1f} images/s"
        + (f", {results['eval_skipped_images']} broken images left out" if results["eval_skipped_images"] else "")
    )


def summary(output_dir: Path, results: dict[str, Any], task: str) -> str:
    """What a finished run did and where everything is."""
    result = f"Result: {describe(results, task)}.\n" if "eval_samples" in results else ""
    return (
        f"{result}Trained {results['step']} steps in {results['train_runtime']:.0f} s, "
        f"{results['train_samples_per_second']:.1f} images/s, {results['train_data_wait_share']:.0%} of the time "
        f"waiting for data, {results['skipped_images']} broken images skipped.\n"
        f"In {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir() if path.name[0] != '.'))}.\n"
        f'Use it: pipeline("{TASKS[task].pipeline_tag}", "{output_dir}")'
    )


def save_results(run: Run, output_dir: Path, results: dict[str, Any], examples: Sequence[EvaluatedImage]) -> None:
    """What a finished run leaves beside its model. A picture that cannot be drawn is missing, no more."""
    write_json(output_dir / "all_results.json", results)
    with best_effort("drawing the curves"):
        write_curves(output_dir / "curves.png", run.log.rows, run.settings.task)
    if examples:
        colours = run.processor.image_mean, run.processor.image_std
        with best_effort("drawing the predictions"):
            write_predictions(output_dir / "predictions.png", examples, run.progress.label_names, *colours)
    write_card(run, output_dir, results)
