"""`--per_device_train_batch_size auto`: how many images a device has memory for, found by training on so many."""

from __future__ import annotations

import bisect
import contextlib
import copy
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel

from ..foundation.errors import UserError
from ..foundation.machine import memory_left_in_group
from ..foundation.memory import is_out_of_memory
from ..settings.training import TrainingSettings
from .checkpoints import Progress, random_states, set_random_states
from .optimisation import WeightAverage, make_optimizer
from .task import TaskTraining


NAME = "per_device_train_batch_size"
EXAMPLES = 8  # images that the batches to try are made of
# Part of the memory that is left for what a trial does not see: fragments, the buffers of several processes.
MARGIN = 0.1
# Of main memory, which other programs want as well, and which nobody hands back in time.
CPU_MARGIN = 0.3
# On the CPU a micro-batch that is so much slower than the fastest is good enough if it is smaller.
GOOD_ENOUGH = 0.95
# What else the machine does disturbs the measurement of that: the fastest of so many steps counts, if they are short.
MEASURED_SECONDS = 0.3
MEASURED_STEPS = 6


@dataclass
class Trial:
    """What `TaskTraining.losses` asks of a `Run`, with a model that is in no wrapper yet."""

    settings: TrainingSettings
    accelerator: Accelerator
    model: nn.Module
    memory_format: torch.memory_format
    progress: Progress


def with_fitting_batches(
    settings: TrainingSettings,
    task: TaskTraining,
    model: PreTrainedModel,
    processor: Any,
    accelerator: Accelerator,
    memory_format: torch.memory_format,
) -> TrainingSettings:
    """The settings with the largest micro-batches that fit, as many as make up a step; every process must call it.

    A step is of as many images as it would be without `auto`, so the micro-batch divides each process's share of them.
    A run that goes on keeps to what it chose before. A copy of the model is tried, and the random generators are as
    they were.

    Raises:
        UserError: in every process: not one image fits, or there is none.
    """
    sizes = divisors(images_per_step(settings, accelerator))
    size, why = task.choices.get(NAME), "as before"
    if size not in sizes:
        found: tuple[int, str, str | None]
        try:
            found = *largest(settings, task, model, processor, accelerator, memory_format, sizes), None
        except UserError as error:  # the others would wait for this process
            found = 0, "", str(error)
        release(accelerator.device)
        everybody = gather_object([found])
        fault = next((theirs for *_, theirs in everybody if theirs), None)
        if fault:
            raise UserError(fault)
        size, why, _ = min(everybody)
    task.choices[NAME] = size
    accelerator.gradient_accumulation_steps = count = sizes[-1] // size
    accelerator.print(f"{NAME} auto: {size}, {count} of them to a step in each process ({why}).")
    return dataclasses.replace(settings, **{NAME: size}, gradient_accumulation_steps=count)


def images_per_step(settings: TrainingSettings, accelerator: Accelerator) -> int:
    """Of one process, as they would be without `auto`."""
    if settings.total_train_batch_size is not None:
        return settings.total_train_batch_size // accelerator.num_processes
    return settings.batch_size_of_recipe * accelerator.gradient_accumulation_steps


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def largest(
    settings: TrainingSettings,
    task: TaskTraining,
    model: PreTrainedModel,
    processor: Any,
    accelerator: Accelerator,
    memory_format: torch.memory_format,
    sizes: Sequence[int],
) -> tuple[int, str]:
    """Which of these sizes this process takes, and why not a larger one.

    Raises:
        UserError: not one image fits, or there is none.
    """
    generators = random_states()
    batch = first_batch(settings, task, model, processor, accelerator, min(EXAMPLES, sizes[-1]))
    model = copy.deepcopy(model)
    trained = task.trained_module(model).train()
    trials = Trials(Trial(settings, accelerator, trained, memory_format, Progress()), task, model, batch)
    try:
        with on_its_own(model):
            size, refused = search(sizes, trials.fits, trials.helped)
    finally:
        set_random_states(generators)
    if not size:
        raise UserError(
            "not one image fits into the device's memory. What helps: --gradient_checkpointing, --mixed_precision "
            "bf16, a smaller --image_size or a smaller model."
        )
    if refused:
        return size, f"{refused} would not fit"
    size = trials.good_enough(size)
    return size, "all that a step has" if size == sizes[-1] else "more at once are no faster"


def first_batch(
    settings: TrainingSettings,
    task: TaskTraining,
    model: PreTrainedModel,
    processor: Any,
    accelerator: Accelerator,
    size: int,
) -> dict[str, Any]:
    """Real images of this process, by loaders of their own, of the last epoch: what grows in a run has grown by then.

    Raises:
        UserError: there are none.
    """
    own, choices = task.settings, dict(task.choices)
    task.settings = dataclasses.replace(settings, **{NAME: size})
    try:
        loader, _ = task.make_loaders(accelerator, model, processor)
        loader.set_epoch(settings.num_train_epochs + settings.num_cooldown_epochs - 1)
        with contextlib.closing(iter(loader)) as batches:
            batch = next(batches, None)
    finally:
        # What was measured on batches of another size is measured again.
        task.settings, task.choices = own, choices
    if batch is None:
        raise UserError("some process has no training images: use fewer processes.")
    return batch


class Trials:
    """Steps of training with micro-batches of several sizes: forward, backward, and the optimiser's step.

    Args:
        batch: images that theirs are made of.
    """

    def __init__(self, trial: Trial, task: TaskTraining, model: PreTrainedModel, batch: dict[str, Any]):
        self.trial, self.task, self.model, self.batch = trial, task, model, batch
        self.device = trial.accelerator.device
        self.on_cpu = self.device.type == "cpu"
        self.before, self.most = memory_of_process(), 0  # bytes of main memory, the latter of the step's worst moment
        self.allowed = (1 - CPU_MARGIN) * main_memory_left()
        self.rates: dict[int, float] = {}  # images per second by size
        self.optimizer = make_optimizer(model, trial.settings, 1e-6)
        self.average = WeightAverage(model, trial.settings.ema_decay) if trial.settings.ema_decay else None

    def fits(self, size: int) -> bool:
        """Whether there is memory for a step with so many images, and some to spare."""
        if self.on_cpu and self.rates:
            # Not tried where it may not: the system ends a process that takes more than there is, without a word.
            largest = max(self.rates)
            if (self.most - self.before) * size / largest > self.allowed:
                return False
        release(self.device)
        try:
            seconds = self.fastest(self.task.tiled(self.batch, size))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self.optimizer.zero_grad()
        self.rates[size] = size / seconds
        if self.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        reachable = free + torch.cuda.memory_reserved(self.device)
        return torch.cuda.max_memory_reserved(self.device) <= (1 - MARGIN) * reachable

    def fastest(self, batch: dict[str, Any]) -> float:
        """Seconds of a step; the first makes the optimiser's state, and warms up."""
        self.step(batch)
        seconds = [self.step(batch)]
        while self.on_cpu and sum(seconds) < MEASURED_SECONDS and len(seconds) < MEASURED_STEPS:
            seconds.append(self.step(batch))
        return min(seconds)

    def step(self, batch: dict[str, Any]) -> float:
        trial, start = self.trial, time.perf_counter()
        with trial.accelerator.autocast():
            loss = self.task.losses(trial, batch)[0]
        self.most = max(self.most, memory_of_process())
        loss.backward()
        self.optimizer.step()
        self.most = max(self.most, memory_of_process())
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.model)
        if not self.on_cpu:
            torch.accelerator.synchronize(self.device)
        return time.perf_counter() - start

    def helped(self, size: int) -> bool:
        """Whether it was worth it: on the CPU more images at once are no faster beyond some number.

        Of two sizes in a row that were not, the first may have been disturbed.
        """
        *before, former, latest = [0.0, 0.0, *self.rates.values()]
        return not self.on_cpu or max(former, latest) * GOOD_ENOUGH >= max(before)

    def good_enough(self, size: int) -> int:
        """The smallest that is about as fast as the fastest; elsewhere than on the CPU the one that is given."""
        if not self.on_cpu:
            return size
        best = max(self.rates.values())
        return min(size for size, rate in self.rates.items() if rate >= GOOD_ENOUGH * best)


def search(sizes: Sequence[int], fits: Callable[[int], bool], helped: Callable[[int], bool]) -> tuple[int, int]:
    """The largest of some rising sizes that fits: each about twice the one before, then between the last two.

    Args:
        helped: whether a size that fits is a reason to try larger ones.

    Returns:
        it, 0 if the smallest does not fit, and the smallest that was seen not to fit, 0 if none was.
    """
    good, bad = -1, len(sizes)
    while bad - good > 1:
        if bad < len(sizes):
            index = (good + bad) // 2
        else:
            index = max(bisect.bisect_right(sizes, 2 * sizes[good]) - 1, good + 1) if good >= 0 else 0
        if not fits(sizes[index]):
            bad = index
            continue
        good = index
        if bad == len(sizes) and not helped(sizes[index]):
            break
    return sizes[good] if good >= 0 else 0, sizes[bad] if bad < len(sizes) else 0


@contextlib.contextmanager
def on_its_own(model: nn.Module) -> Iterator[None]:
    """Within it the model's norms wait for no other process, which may have no memory for the same batch."""
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    groups = [norm.process_group for norm in norms]
    alone = dist.new_subgroups(1)[0] if norms else None
    for norm in norms:
        norm.process_group = alone
    try:
        yield
    finally:
        for norm, group in zip(norms, groups, strict=True):
            norm.process_group = group


def release(device: torch.device) -> None:
    """Hands back what a failed or finished step held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_of_process() -> int:
    """Bytes of main memory."""
    return psutil.Process().memory_info().rss


def main_memory_left() -> int:
    """Bytes for this process, if those of this run on this machine take equal parts."""
    left = psutil.virtual_memory().available
    limit = memory_left_in_group()
    return (left if limit is None else min(left, limit)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
