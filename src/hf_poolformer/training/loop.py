"""The training loop: `train(settings)` from the first image to the published model."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast, broadcast_object_list, gather_object, set_seed
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..foundation.errors import Diverged, UserError, one_line
from ..foundation.files import best_effort, let_others_read
from ..foundation.memory import is_out_of_memory
from ..foundation.processes import (
    Agreement,
    Stopped,
    StopSignal,
    alone_in_its_folder,
    found_by_main,
    telling_of_lost_processes,
)
from ..foundation.tasks import TASKS
from ..settings.training import TrainingSettings
from . import checkpoints
from .adaptation import describe_parameters
from .batch_size import with_fitting_batches
from .checkpoints import Progress, Saver, TrainingState, whole
from .emissions import EmissionsMeter, device_name
from .optimisation import WeightAverage, length_of_training, make_optimizer, make_schedule, scaled_learning_rate
from .preparation import in_micro_batches, prepare_output, resume, training_accelerator
from .range_test import LOWEST, choose_learning_rate, set_learning_rate
from .reports import Reports, note_skipped, resume_command, summary
from .task import TaskTraining, training_of


@dataclass
class Run:
    """What the parts of the loop share."""

    settings: TrainingSettings
    task: TaskTraining
    accelerator: Accelerator
    agreement: Agreement
    stop: StopSignal
    state: TrainingState
    model: Any  # wrapped
    train_loader: Any
    eval_loader: Any
    memory_format: torch.memory_format
    saver: Saver
    reports: Reports
    bar: tqdm
    total_steps: int
    epochs: float  # that these are, as planned
    learning_rate: float  # at its peak
    replica: nn.Module | None  # of a model that is distributed, to be filled when it is needed
    processor: Any  # saved beside the model
    after_evaluation: Callable[[Run, dict[str, float]], None] | None = None
    losses: list[torch.Tensor] = field(default_factory=list)  # since the last point of the curve, on the device
    images: int = 0  # of this process since the last point
    seconds: float = 0.0
    waited: float = 0.0
    skipped: int = 0  # of this process since the processes last added them up

    @property
    def progress(self) -> Progress:
        return self.state.progress

    @property
    def accumulation(self) -> int:
        return self.accelerator.gradient_accumulation_steps

    @property
    def complete(self) -> bool:
        """Whether it has gone as far as was planned, but for an epoch to be closed."""
        return self.progress.step >= self.total_steps or (
            not (self.settings.max_train_steps or self.task.epochs_vary) and self.progress.epoch >= self.epochs
        )

    @property
    def out_of_patience(self) -> bool:
        patience = self.settings.early_stopping_patience
        return bool(patience) and self.progress.evaluations_without_improvement >= patience


@alone_in_its_folder
def train(
    settings: TrainingSettings,
    task: TaskTraining | None = None,
    after_evaluation: Callable[[Run, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Trains what the settings say and leaves everything about it in `settings.output_dir`.

    Every process of a run calls it. Leaves by `Stopped` (a SystemExit) after SIGTERM or Ctrl-C, with a checkpoint.

    Args:
        settings: of a task; `TrainingSettings.from_recipe` makes them.
        task: in the place of the settings' own, to measure the loop without its data.
        after_evaluation: called by every process with the figures of each evaluation but the last; what it raises
            ends the run.

    Returns:
        what `all_results.json` holds: `eval_*` figures of the model that is saved, `train_loss` (mean of the last
        epoch), `train_runtime` in seconds, `train_samples_per_second`, `train_data_wait_share`, `epoch`, `step`,
        `skipped_images`, `learning_rate` at its peak, `per_device_train_batch_size`; and, where a figure says which
        evaluation was the best, its `best_metric`, `best_value`, `best_step`, `best_epoch`.

    Raises:
        UserError: what was asked for cannot be done; the message says why.
        hf_poolformer.hub.publishing.PublishError: trained and saved, but not published.
    """
    settings = in_micro_batches(settings)
    task = task or training_of(settings)
    accelerator = training_accelerator(settings, fsdp=task.may_be_distributed)
    resume_from = prepare_output(settings, accelerator)
    # Of a resumed run only a part could be measured, which tells nothing.
    measured = settings.emissions_country and accelerator.is_main_process and resume_from is None
    meter = EmissionsMeter(settings.emissions_country) if measured else None
    if resume_from is not None:
        task.choices = checkpoints.choices_of(resume_from)
        if settings.learning_rate == "auto" and "learning_rate" not in task.choices:
            raise UserError(
                f"--learning_rate auto chooses before the first step, and {resume_from} was made with a number: go on "
                "with that."
            )

    # The data's classes decide the model's head.
    label_names = task.open_data(accelerator)

    # Model: equal on all processes, then every process goes its own random way.
    channels_last = settings.memory_format in ("auto", "channels_last")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    set_seed(settings.seed)
    model, processor = task.make_model(accelerator, memory_format)
    set_seed(settings.seed + 1 + accelerator.process_index)
    # FSDP takes the model apart, which works for contiguous weights; evaluating and saving it needs it whole.
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    model.to(accelerator.device, memory_format=torch.contiguous_format if fsdp else memory_format)
    replica = copy.deepcopy(model).requires_grad_(False) if fsdp and not settings.ema_decay else None
    asked = settings  # as they go into the folder: what `auto` means here is a choice, kept by checkpoints
    if settings.per_device_train_batch_size == "auto":
        settings = with_fitting_batches(settings, task, model, processor, accelerator, memory_format)
        task.settings = settings
    train_loader, eval_loader = task.make_loaders(accelerator, model, processor)
    if hasattr(train_loader, "dealing"):  # a loader of made-up images has none
        accelerator.print(f"Reading: {train_loader.dealing}.")
    if settings.best_by and eval_loader is None:
        raise UserError(f"nothing says which model is the best by {settings.best_by}: there are no validation images.")

    # Optimiser, and how far it goes.
    global_batch = (
        settings.per_device_train_batch_size * accelerator.num_processes * accelerator.gradient_accumulation_steps
    )
    total_steps, epochs = length_of_training(settings, task.num_examples, global_batch)
    to_be_found = settings.learning_rate == "auto" and resume_from is None
    if settings.learning_rate != "auto":
        learning_rate = scaled_learning_rate(settings, global_batch)
    else:  # which is not scaled; before a range test any will do
        learning_rate = LOWEST if to_be_found else task.choices["learning_rate"]
    optimizer = make_optimizer(model, settings, learning_rate)
    scheduler = make_schedule(optimizer, settings, learning_rate, total_steps, epochs)
    ema = WeightAverage(model, settings.ema_decay, settings.ema_warmup) if settings.ema_decay else None
    # The loaders are not prepared: they are sharded already, and batches go to the device below.
    wrapped, optimizer, scheduler = accelerator.prepare(task.trained_module(model), optimizer, scheduler)

    # Checkpoints, and what is told.
    progress = Progress(
        num_processes=accelerator.num_processes,
        global_batch=global_batch,
        label_names=label_names,
        method={"optimizer": settings.optimizer, **task.method()},
        choices=task.choices,
    )
    state = TrainingState(accelerator, model, optimizer, scheduler, ema, progress)
    if resume_from is not None:
        resume(state, resume_from, total_steps)
    background = settings.async_checkpointing
    saver = Saver(
        Path(settings.output_dir) / "checkpoints",
        accelerator,
        keep=settings.save_total_limit,
        background=accelerator.device.type != "cpu" if background is None else background,
        carry_on=settings.checkpoint_failure == "continue",
    )
    reports = Reports(asked, accelerator, None if resume_from is None else progress.step)
    task.keeps_examples = reports.trackers.show_pictures
    noun = TASKS[settings.task].outputs[len(label_names) != 1]
    answers = f"{len(label_names)} {noun}, " if label_names else ""
    rate = "to be found" if to_be_found else f"{learning_rate:.2e}"
    accelerator.print(
        f"{settings.task}: {describe_parameters(model)}, {answers}"
        f"{task.num_examples or 'unknown number of'} training images {task.describe_images(processor)}, "
        f"{total_steps} steps of {global_batch} images, learning rate {rate}, "
        f"{accelerator.num_processes} x {accelerator.device.type}."
    )

    with running(state, total_steps, reports) as (stop, bar):
        run = Run(
            settings=settings,
            task=task,
            accelerator=accelerator,
            agreement=Agreement(accelerator),
            stop=stop,
            state=state,
            model=wrapped,
            train_loader=train_loader,
            eval_loader=eval_loader,
            memory_format=memory_format,
            saver=saver,
            reports=reports,
            bar=bar,
            total_steps=total_steps,
            epochs=epochs,
            learning_rate=learning_rate,
            replica=replica,
            processor=processor,
            after_evaluation=after_evaluation,
        )
        if to_be_found:
            find_learning_rate(run)
        train_epochs(run)
        leave_model(run)
        evaluation, shown = evaluate_at_end(run) if run.eval_loader is not None else ({}, None)
        if task.saves_again and run.eval_loader is not None:
            leave_model(run, evaluated=True)
        saver.finish()

    results = {**evaluation, **training_figures(run), **task.figures()}
    if meter is not None:
        with best_effort("measuring the emissions"):
            results.update(meter.stop())
    finish(run, results, shown)
    return results


@contextlib.contextmanager
def running(state: TrainingState, total_steps: int, reports: Reports) -> Iterator[tuple[StopSignal, tqdm]]:
    """While a run goes on: signals are noted, lost processes told of, its steps shown; trackers learn of its end."""
    with (
        reports.trackers,
        telling_of_lost_processes(),
        StopSignal() as stop,
        tqdm(
            total=total_steps,
            initial=state.progress.step,
            unit="step",
            disable=not state.accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        ) as bar,
    ):
        yield stop, bar


def find_learning_rate(run: Run) -> None:
    """Chooses by a range test, and sets everything back to where the run begins."""
    with telling_of_memory(run, training=True):
        rate = choose_learning_rate(run, optimiser_step)
    set_learning_rate(run, rate)
    run.task.choices["learning_rate"] = rate
    run.train_loader, run.eval_loader = run.task.make_loaders(run.accelerator, run.state.model, run.processor)


def train_epochs(run: Run) -> None:
    """All that is left of a run, with the evaluations (but the last) and checkpoints between its epochs."""
    progress = run.progress
    evaluate_if_due(run)  # a run that was told to stop while it evaluated
    # Resumed behind its last step, a run has still an epoch to close.
    while not run.out_of_patience and (not run.complete or progress.batches):
        with telling_of_memory(run, training=True):
            train_epoch(run)
        evaluate_if_due(run)
        if run.settings.checkpointing_steps == "epoch":
            save_checkpoint(run)
    if run.out_of_patience and not run.complete:
        count = progress.evaluations_without_improvement
        told = f"{count} evaluations" if count > 1 else "one evaluation"
        say(
            run,
            f"stopped early at epoch {progress.epoch} of {math.ceil(run.epochs)}: {run.settings.best_by} has not "
            f"improved for {told}.",
        )


def say(run: Run, text: str) -> None:
    if run.accelerator.is_main_process:
        run.bar.write(text)


def evaluate_if_due(run: Run) -> None:
    """An evaluation between two epochs, unless it was made before a checkpoint from which the run goes on."""
    progress, every = run.progress, run.settings.eval_epochs
    due = bool(every) and progress.epoch % every == 0 and progress.epoch > progress.evaluated_epochs
    if due and run.eval_loader is not None and not progress.batches and not run.complete:
        evaluate_now(run)


def evaluate_at_end(run: Run) -> tuple[dict[str, Any], Any]:
    """Evaluates the model that is saved: the last one or, if that is wanted, the best, which then takes its place."""
    progress, wanted = run.progress, run.settings.load_best_model_at_end
    results: tuple[dict[str, Any], Any] = {}, None
    # What has ended the run early need not be looked at again to know that it is not the best.
    if not (wanted and progress.evaluated_epochs == progress.epoch and has_better(progress)):
        results = evaluate_now(run, final=True)
    if not (wanted and has_better(progress)):
        return results
    run.saver.finish()
    with leaving_the_model(run):
        checkpoints.load_best(run.saver.root, run.state)
    leave_model(run)
    best = progress.best
    say(run, f"The model of epoch {best['epoch']} is saved, the best by {best['metric']} ({best['value']:.4g}).")
    return evaluate_now(run, final=True, step=best["step"], epoch=best["epoch"])


def finish(run: Run, results: dict[str, Any], shown: Any) -> None:
    """The end of a run whose model is saved: the files beside it, where everything is, and the Hub if that is wanted.

    Args:
        shown: what `task.write_pictures` draws, if there is anything.

    Raises:
        hf_poolformer.hub.publishing.PublishError: it could not be published.
    """
    reports = run.reports
    if run.accelerator.is_main_process:
        reports.write_results(results)
        if shown is not None:
            run.task.write_pictures(reports.folder, shown, run.processor)
        reports.write_card()
    run.accelerator.wait_for_everyone()
    if not run.accelerator.is_main_process:
        return
    evaluation = run.task.describe(results) if "eval_samples" in results else ""
    print(summary(reports.folder, results, run.settings, evaluation))
    for line in reports.trackers.how_to_look():
        print(line)
    if run.settings.push_to_hub:
        print(f"Published to {reports.publish()}")


def train_epoch(run: Run) -> None:
    """One pass over the stream, or the rest of it; ends on all processes when the first has no batch left."""
    progress, settings = run.progress, run.settings
    run.model.train()
    run.train_loader.set_epoch(progress.epoch)
    if run.state.streams is not None:
        statement = run.train_loader.load_state_dict(run.state.streams)
        run.state.streams = None
        if statement and run.accelerator.is_main_process:
            run.bar.write(f"Not quite as before: {statement}.", file=sys.stderr)
    batches = iter(run.train_loader)
    first_step, clock = progress.step, time.perf_counter()
    while progress.step < run.total_steps:
        asked = time.perf_counter()  # since `clock` the curve may have waited for the device, which is not for data
        window = list(itertools.islice(batches, run.accumulation))
        waited = time.perf_counter() - asked
        skipped = [description for batch in window for description in batch["skipped"]]
        run.skipped += len(skipped)
        note_skipped(run.reports.folder, progress.epoch + 1, skipped)
        # The one exchange of a step: how many micro-batches everybody has, and whether anybody was told to stop.
        count, stop = run.agreement.minimum(len(window), -run.stop.check())
        if count:
            run.losses.append(optimiser_step(run, window[:count]))
            progress.step += 1
            progress.batches += count
            run.images += sum(len(batch["labels"]) for batch in window[:count])
            now = time.perf_counter()
            run.seconds, run.waited, clock = run.seconds + now - clock, run.waited + waited, now
            run.bar.update()
            if progress.step % settings.logging_steps == 0:
                log_point(run)
        if stop:
            save_and_leave(run, -stop)
        every = settings.checkpointing_steps
        if count and every.isdigit() and progress.step % int(every) == 0:
            save_checkpoint(run)
            clock = time.perf_counter()
        if count < run.accumulation:
            break
    judge_skipped(run)
    if progress.step == first_step and not progress.batches:
        raise UserError("some process has no full batch of training images: use fewer processes or smaller batches.")
    log_point(run)
    damaged = gather_object(list(getattr(run.train_loader, "damaged", ())))
    progress.damaged_shards = sorted({*progress.damaged_shards, *damaged})
    if progress.epoch_steps:
        progress.train_loss = progress.epoch_loss / progress.epoch_steps
    progress.epoch, progress.batches, progress.epoch_loss, progress.epoch_steps = progress.epoch + 1, 0, 0.0, 0


def judge_skipped(run: Run) -> None:
    """Ends the run if more images of the epoch were broken than is allowed, on all processes together.

    Within the epoch the loader judges for its process, and not before it has seen some.
    """
    loader = run.train_loader
    if hasattr(loader, "judge"):  # a loader of made-up images has none
        loader.judge(*run.agreement.total(loader.seen, loader.skipped))


def optimiser_step(run: Run, window: list[dict[str, Any]]) -> torch.Tensor:
    """Gradients over a window of micro-batches and one step.

    Returns:
        the mean of what the task's `losses` are for each, still on the device.
    """
    accelerator, state = run.accelerator, run.state
    losses = []
    for index, batch in enumerate(window):
        last = index == len(window) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(run.model):
            parts = torch.stack(run.task.losses(run, batch))
            # accelerate divides by the size of a full window; the last one of an epoch may be shorter.
            accelerator.backward(parts[0] * (run.accumulation / len(window)))
        losses.append(parts.detach())
    if run.settings.max_grad_norm:
        accelerator.clip_grad_norm_(run.model.parameters(), run.settings.max_grad_norm)
    state.optimizer.step()
    if not accelerator.optimizer_step_was_skipped:
        state.scheduler.step()
    state.optimizer.zero_grad()
    if state.ema is not None:
        state.ema.update(state.model)
    return torch.stack(losses).mean(0)


def log_point(run: Run) -> None:
    """Brings the figures since the last point together, and shows and keeps them; every process calls it."""
    if not run.losses:
        return
    progress, count = run.progress, len(run.losses)
    loss, *parts = run.accelerator.reduce(torch.stack(run.losses).mean(0), "mean").reshape(-1).tolist()
    images, skipped = run.agreement.total(run.images, run.skipped)
    if not math.isfinite(loss):
        raise Diverged(
            f"the loss is {loss} at step {progress.step}. Try a lower --learning_rate, a longer warm-up, "
            "--max_grad_norm 1 or --mixed_precision bf16; the last checkpoint is from before."
        )
    progress.images += images
    progress.skipped_images += skipped
    progress.train_seconds += run.seconds
    progress.wait_seconds += run.waited
    progress.epoch_loss += loss * count
    progress.epoch_steps += count
    row = {
        "step": progress.step,
        "epoch": progress.epoch + 1,
        "loss": loss,
        **dict(zip(run.task.loss_parts, parts, strict=False)),
        "learning_rate": max(run.state.scheduler.get_last_lr()),
        "images_per_second": images / run.seconds,
        "data_wait_share": run.waited / run.seconds,
    }
    run.reports.add(row)
    run.bar.set_postfix_str(
        f"loss {loss:.3f}, lr {row['learning_rate']:.1e}, {row['images_per_second']:.0f} images/s, "
        f"waiting for data {row['data_wait_share']:.0%}" + (f", {progress.skipped_images} skipped" if skipped else ""),
        refresh=False,
    )
    run.losses, run.images, run.skipped, run.seconds, run.waited = [], 0, 0, 0.0, 0.0


def has_better(progress: Progress) -> bool:
    """Whether a model of some steps ago was better than the last one."""
    return progress.best.get("step", progress.step) != progress.step


def evaluate_now(
    run: Run, final: bool = False, step: int | None = None, epoch: int | None = None
) -> tuple[dict[str, Any], Any]:
    """Evaluates what would be saved now, as the task's `evaluate` says.

    Args:
        step, epoch: of the model where it is not the last one, and its evaluation no news.
    """
    task, progress = run.task, run.progress
    with telling_of_memory(run, training=False), leaving_the_model(run):
        results, shown = task.evaluate(run, evaluated_model(run), final)
    if not results:
        save_and_leave(run, -run.agreement.minimum(-run.stop.check())[0])
    if run.accelerator.is_main_process:
        run.bar.write(f"epoch {epoch or progress.epoch}: {task.describe(results)}", file=sys.stderr)
    if step is None and progress.evaluated_epochs < progress.epoch:
        figures = {name: value for name, value in results.items() if isinstance(value, (int, float))}
        run.reports.add({"step": progress.step, "epoch": progress.epoch, **figures})
        progress.evaluated_epochs = progress.epoch
        with best_effort("showing predictions to the trackers"):
            run.reports.trackers.show(lambda: task.draw_predictions(run.processor), progress.step)
        if run.settings.best_by:
            judge_evaluation(run, figures)
        if run.after_evaluation is not None and not final:
            run.after_evaluation(run, figures)
    return results, shown


def judge_evaluation(run: Run, figures: dict[str, float]) -> None:
    """Counts an evaluation without improvement, or saves a checkpoint that stays; every process must call it."""
    progress, metric = run.progress, run.settings.best_by
    [value] = broadcast_object_list([figures.get(metric)])
    if value is None:  # there was nothing to measure it on
        return
    former = progress.best if progress.best.get("metric") == metric else {}
    gain = math.inf
    if former:
        gain = former["value"] - value if TASKS[run.settings.task].is_error(metric) else value - former["value"]
    improved = gain > run.settings.early_stopping_threshold
    progress.evaluations_without_improvement = 0 if improved else progress.evaluations_without_improvement + 1
    if gain <= 0:
        return
    progress.best = {"metric": metric, "value": value, "step": progress.step, "epoch": progress.epoch}
    save_checkpoint(run)
    saver = run.saver
    if saver.finish() is None:  # it could not be written, and the run goes on
        kept = former and found_by_main((saver.root / f"step-{former['step']}").is_dir)
        progress.best = former if kept else {}
    elif run.accelerator.is_main_process:
        checkpoints.prune(saver.root, saver.keep, progress.step)  # the former best, perhaps


def save_checkpoint(run: Run) -> None:
    log_point(run)  # a loss that is not finite ends the run before it is saved
    run.state.stream = run.train_loader.state_dict() if run.progress.batches else None
    run.saver.save(run.state)


def save_and_leave(run: Run, number: int) -> None:
    save_checkpoint(run)
    run.saver.finish()
    run.bar.close()
    accelerator = run.accelerator
    command = resume_command(run.reports.folder, accelerator.num_processes, accelerator.device.type == "cpu")
    accelerator.print(
        f"Stopped by signal {number} and saved at step {run.progress.step} of {run.total_steps} in {run.saver.root}. "
        f"To go on:\n  {command}",
        flush=True,
    )
    accelerator.end_training()
    raise Stopped(number)


def training_figures(run: Run) -> dict[str, Any]:
    """What a run tells of itself in `all_results.json`."""
    progress, best = run.progress, run.progress.best
    judged = {f"best_{name}": best[name] for name in ("metric", "value", "step", "epoch")} if best else {}
    return {
        "train_loss": progress.train_loss,
        "train_runtime": progress.train_seconds,
        "train_samples_per_second": progress.images / max(progress.train_seconds, 1e-9),
        "train_data_wait_share": progress.wait_seconds / max(progress.train_seconds, 1e-9),
        "epoch": progress.epoch,
        "step": progress.step,
        **judged,
        "learning_rate": run.learning_rate,
        "per_device_train_batch_size": run.settings.per_device_train_batch_size,
        "skipped_images": progress.skipped_images,
        "skipped_shards": progress.damaged_shards,
        "device": device_name(run.accelerator.device),
        "num_processes": run.accelerator.num_processes,
        "trained_parameters": sum(p.numel() for p in run.state.model.parameters() if p.requires_grad),
    }


def finished_model(run: Run) -> PreTrainedModel:
    """What is saved: the moving average if there is one, whole, and without adapters. Every process must call it."""
    model = run.state.model if run.state.ema is None else run.state.ema.module
    if run.replica is not None:
        model = run.replica
        model.load_state_dict({name: whole(value) for name, value in run.state.model.state_dict().items()})
    agree_on_statistics(model, run.accelerator)
    return run.task.finished(model)


def agree_on_statistics(model: nn.Module, accelerator: Accelerator) -> None:
    """Gives all processes the first one's buffers: the statistics of batch norms, which each gathered for itself.

    Those of the first are the ones that are saved, and with which a step begins on all. Without this, each process
    would evaluate with its own.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer))


def evaluated_model(run: Run) -> nn.Module:
    """The same as it is trained, which may be compiled, where that is what is saved."""
    finished = finished_model(run)
    return run.model if finished is run.state.model else finished


def leave_model(run: Run, evaluated: bool = False) -> None:
    """Saves the model and its processor: before anything else, so that nothing further down can cost them.

    Every process must call it.

    Args:
        evaluated: for the last time, as it is now.
    """
    model = finished_model(run)
    if evaluated:
        model = run.task.decided(model)
    if run.accelerator.is_main_process:
        model.save_pretrained(run.reports.folder)
        run.processor.save_pretrained(run.reports.folder)
        let_others_read(run.reports.folder)


@contextlib.contextmanager
def telling_of_memory(run: Run, training: bool) -> Iterator[None]:
    """Turns what is said where memory runs out into what helps, and how the run goes on.

    Args:
        training: or evaluating, which leaves everything as it was trained: a run of one process saves it.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fault = one_line(error).rstrip(".")
    else:
        return
    settings, accelerator = run.settings, run.accelerator
    kind = "train" if training else "eval"
    size = getattr(settings, f"per_device_{kind}_batch_size")
    smaller = [f"--per_device_{kind}_batch_size", str(max(size // 2, 1))]
    if training and settings.total_train_batch_size is None:
        smaller += ["--total_train_batch_size", str(run.progress.global_batch)]  # a step stays what it was
    helps = ["--per_device_train_batch_size auto or a smaller one" if training else smaller[0] + " with a smaller one"]
    helps += ["--gradient_checkpointing"] if training and not settings.gradient_checkpointing else []
    helps += ["--mixed_precision bf16"] if accelerator.mixed_precision == "no" else []
    if not training and accelerator.num_processes == 1:
        save_checkpoint(run)
        run.saver.finish()
    last = run.saver.newest()
    command = resume_command(run.reports.folder, accelerator.num_processes, accelerator.device.type == "cpu", smaller)
    raise UserError(
        f"out of memory {'in step' if training else 'evaluating after step'} {run.progress.step + training}, with "
        f"{size} images per device ({fault}). What helps: {', '.join(helps)}. "
        + (f"The last checkpoint is {last}. To go on from it: {command}" if last else "There is no checkpoint yet.")
    )


@contextlib.contextmanager
def leaving_the_model(run: Run) -> Iterator[None]:
    """Around an evaluation: if that fails, on all processes, what was trained so far is saved nevertheless."""
    try:
        yield
    except UserError as error:
        leave_model(run)
        raise UserError(
            f"{str(error).rstrip('.')}. The model as it was trained so far is in {run.reports.folder}"
        ) from error
