"""What stands before the first step: accelerate, the output folder, and where the run goes on."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from accelerate import Accelerator, DistributedType
from accelerate.utils import ProjectConfiguration

from ..foundation.errors import UserError
from ..foundation.files import make_folder
from ..foundation.processes import found_by_main, machines_without, processes
from ..settings.training import TrainingSettings
from . import checkpoints
from .trackers import names_of_trackers


logger = logging.getLogger(__name__)


def in_micro_batches(settings: TrainingSettings) -> TrainingSettings:
    """The settings with the micro-batches that make up `total_train_batch_size` on the processes there are.

    Raises:
        UserError: it does not divide among the processes.
    """
    total, count = settings.total_train_batch_size, processes().num_processes
    if total is None:
        return settings
    if total % count:
        fewer = total // count * count
        raise UserError(
            f"--total_train_batch_size {total} does not divide among {count} processes: {fewer or count} or "
            f"{(total // count + 1) * count} would."
        )
    if settings.per_device_train_batch_size == "auto":
        return settings  # what it is comes out when there is a model to try with
    share = total // count
    size = next(size for size in range(min(settings.per_device_train_batch_size, share), 0, -1) if share % size == 0)
    return dataclasses.replace(settings, per_device_train_batch_size=size, gradient_accumulation_steps=share // size)


def training_accelerator(settings: TrainingSettings, fsdp: bool) -> Accelerator:
    """Accelerate with the settings' precision, compilation and accumulation, or its own where they say nothing.

    Args:
        fsdp: a model that is distributed over the processes can be evaluated and saved.

    Raises:
        UserError: a tracker that is not installed, a precision that the device lacks, a way to distribute the model
            that this loop does not know.
    """
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            dynamo_backend=settings.dynamo_backend,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            log_with=names_of_trackers(settings) or None,
            project_config=ProjectConfiguration(
                project_dir=settings.output_dir, logging_dir=str(Path(settings.output_dir) / "logs")
            ),
            # The schedule counts optimiser steps; accelerate would advance it once per process.
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, KeyError) as error:
        raise UserError(f"accelerate refuses these settings: {error}") from error
    if (
        settings.total_train_batch_size
        and accelerator.gradient_accumulation_steps != settings.gradient_accumulation_steps
    ):
        raise UserError(
            "accelerate was told how many micro-batches make a step, and --total_train_batch_size says it, too: leave "
            "out one of the two."
        )
    way = accelerator.distributed_type
    if way in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (way == DistributedType.FSDP and not fsdp):
        raise UserError(
            f"{way.value} is not supported here: the largest model has 100M parameters and fits every GPU whole. "
            "Launch with --multi_gpu instead."
        )
    if way == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("FSDP is supported in its second version: launch with --fsdp_version 2.")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("fp16 needs a GPU; on the CPU use --mixed_precision bf16 or no.")
    return accelerator


def prepare_output(settings: TrainingSettings, accelerator: Accelerator) -> Path | None:
    """Makes the output folder if need be, and finds the checkpoint to go on from, if any.

    `latest` in a folder without a usable checkpoint starts from the beginning, so that a job that is started again
    and again needs one command only.

    Raises:
        UserError: the folder holds another run.
    """
    output_dir = Path(settings.output_dir)
    root = output_dir / "checkpoints"
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file.")
    # The main process looks, and checks every byte, for all.
    found = found_by_main(lambda: checkpoints.find(settings.resume_from_checkpoint, root))
    blind = [] if found is None else machines_without(found)
    if blind:
        raise UserError(
            f"{found} is not there on {', '.join(blind)}: all machines read the checkpoint that one of them wrote, so "
            "--output_dir must be a folder that they share, given by its whole path."
        )
    same_run = found is not None and root.resolve() in found.resolve().parents
    if settings.resume_from_checkpoint == "latest" and found is None:
        # Killed before its first checkpoint or after its last step: its settings are there, its results are not.
        same_run = (output_dir / "training_settings.yaml").is_file() and not (
            output_dir / "all_results.json"
        ).is_file()
        accelerator.print(f"No complete checkpoint in {root}: starting from the beginning.")
    held = [path for path in output_dir.iterdir() if path.name[0] != "."] if output_dir.is_dir() else []
    if held and not same_run and not settings.overwrite_output_dir:
        raise UserError(
            f"{output_dir} holds another run ({', '.join(sorted(path.name for path in held)[:4])}, ...). Give another "
            "--output_dir, or --resume_from_checkpoint latest to go on with it, or --overwrite_output_dir."
        )
    # Everybody has looked before anybody writes.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        make_folder(output_dir)
        if not same_run or found is None:
            checkpoints.set_aside(root)
        elif settings.resume_from_checkpoint != "latest":
            # Later ones belong to what that run did next; this one may do something else.
            checkpoints.set_aside(root, after=checkpoints.step_of(found))
    accelerator.wait_for_everyone()
    blind = machines_without(output_dir)
    if blind and settings.load_best_model_at_end:
        raise UserError(
            f"--load_best_model_at_end: {output_dir} is not there on {', '.join(blind)}, and all machines read the "
            "best checkpoint. Give a folder that they share, by its whole path."
        )
    if blind and accelerator.is_main_process:
        logger.warning(
            "%s is not there on %s: this run can go on from a checkpoint only if all machines share --output_dir, "
            "given by its whole path.",
            output_dir,
            ", ".join(blind),
        )
    return found


def resume(state: checkpoints.TrainingState, resume_from: Path, total_steps: int) -> None:
    """Brings a run to where its checkpoint was, and says what will be otherwise.

    Raises:
        UserError: the checkpoint does not fit.
    """
    say, progress, global_batch = state.accelerator.print, state.progress, state.progress.global_batch
    saved = checkpoints.load(resume_from, state)
    say(f"Going on from {resume_from}: step {progress.step}, epoch {progress.epoch + 1}.")
    if saved.global_batch != global_batch:
        say(
            f"It was made with {saved.global_batch} images per step, this run has {global_batch}: learning rate "
            f"and length follow this run's settings, {total_steps} steps in all, counted on from {progress.step}. "
            f"--total_train_batch_size {saved.global_batch} keeps to what it was made with."
        )
