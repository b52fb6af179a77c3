"""`--device_preprocessing auto`: a short measurement on the run's own images says what the device should do.

It takes over no more than helps: where the model keeps the device busy anyway and the workers keep up with that, each
image that the device preprocesses, too, is time that the model lacks. `predict` chooses by the same rules.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, gather_object
from torch import nn

from ..data.columns import ImageDataset, columns_needed
from ..data.transforms import channels_of, input_size
from ..foundation.errors import UserError, one_line
from ..foundation.machine import cores
from ..foundation.processes import found_by_main
from ..settings.classification import ClassificationSettings
from .channels import check_rgb
from .device_pipeline import Preprocessing, make_pipeline
from .jpeg_decoders import working_decoders


logger = logging.getLogger(__name__)

MODES = ("no", "augment", "decode")  # the simplest first
# A way so much slower than the fastest is good enough if it is simpler.
GOOD_ENOUGH = 0.8
# Images on which the workers' part is measured, most of which the device's part gets at once, and rounds of both, of
# which the first only warms up.
MEASURED_IMAGES = 48
MEASURED_BATCH = 256
ROUNDS = 4


class Rates(NamedTuple):
    """Images per second of one worker that has a core for itself, of the device's part, and of the model on the same
    device, where that is known."""

    worker: float
    device: float
    model: float = math.inf

    def expected(self, workers: int) -> float:
        """Of all together: the device does one thing after the other, and so does a process without workers."""
        device = 1 / (1 / self.device + 1 / self.model)
        return min(workers * self.worker, device) if workers else 1 / (1 / self.worker + 1 / device)


def choose_preprocessing(
    settings: ClassificationSettings,
    dataset: ImageDataset,
    processor: Any,
    accelerator: Accelerator,
    num_workers: int,
    kept: Sequence[str] | None = None,
    model: nn.Module | None = None,
) -> Preprocessing:
    """What `settings.device_preprocessing` means for all processes of this run; each must call it.

    Where that leaves a choice, the main process measures, which takes seconds, and all are told. A measurement that
    fails is a warning, and the simplest way is taken.

    Args:
        dataset: the training images.
        num_workers: of each process.
        kept: the `Preprocessing` of the run that is continued, which is kept where the settings do not say otherwise.
        model: what is trained, on the device. None: any speed is thought possible.

    Raises:
        UserError: the device cannot decode JPEGs, and shall.
    """
    mode, device, say = settings.device_preprocessing, accelerator.device, accelerator.print
    if channels_of(processor) != 3:
        if mode in ("augment", "decode"):
            check_rgb(processor, f"--device_preprocessing {mode}")
        return Preprocessing()
    ways, fault = possible_ways(mode, device)
    if device.type != "cpu":  # the devices need not be alike
        everybody = gather_object([(ways, fault)])
        ways = [way for way in ways if all(way in theirs for theirs, _ in everybody)]
        fault = next((theirs for _, theirs in everybody if theirs), "")
    if not ways:
        raise UserError(f"--device_preprocessing decode: {fault}. Choose auto, augment or no.")
    if kept is not None:
        before = Preprocessing(*kept)
        if before in ways:
            return before
        why = f"this start of it says {mode}" if mode not in ("auto", before.mode) else "which is not possible here"
        say(f"Not quite as before: the run had --device_preprocessing {name_of(before)}, {why}.")
    if len(ways) == 1:
        return ways[0]
    workers = min(num_workers, max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1))

    def measure() -> tuple[Preprocessing, str]:
        try:
            rates = measured_rates(ways, settings, dataset, processor, device)
            trained = math.inf if model is None else training_rate(model, settings, processor, accelerator)
        except Exception as error:  # of libraries, drivers, images: none of it is worth a run that could go on
            logger.warning(
                "--device_preprocessing %s: measuring failed (%s), so it is %s.",
                mode,
                one_line(error),
                name_of(ways[0]),
            )
            return ways[0], ""
        expected = {way: rate._replace(model=trained).expected(workers) for way, rate in rates.items()}
        chosen = choose(expected)
        return chosen, describe(mode, chosen, expected, workers, fault, trained)

    chosen, statement = found_by_main(measure)
    if statement:
        say(statement)
    return chosen


def possible_ways(mode: str, device: torch.device) -> tuple[list[Preprocessing], str]:
    """The ways to do what `--device_preprocessing` says on this device, the simplest first.

    Returns:
        them, and why it does not decode, if that was asked for.
    """
    if mode in ("no", "augment"):
        return [Preprocessing(mode)], ""
    if mode == "auto" and device.type == "cpu":
        return [Preprocessing("no")], ""
    if device.type == "cuda":
        decoders, fault = working_decoders(device)
    else:
        decoders, fault = [], f"it needs a CUDA GPU, and this run is on {device.type}"
    ways = [Preprocessing("decode", decoder) for decoder in decoders]
    if mode == "auto":
        ways = [Preprocessing("no"), Preprocessing("augment"), *ways]
    return ways, "" if decoders else fault


def choose(expected: Mapping[Preprocessing, float]) -> Preprocessing:
    """The simplest of the ways that are fast enough; of two decoders the faster."""
    best = max(expected.values())
    fast = [way for way, rate in expected.items() if rate >= GOOD_ENOUGH * best]
    return min(fast, key=lambda way: (MODES.index(way.mode), -expected[way]))


def describe(
    mode: str,
    chosen: Preprocessing,
    expected: Mapping[Preprocessing, float],
    workers: int,
    fault: str,
    trained: float = math.inf,
) -> str:
    """In one line.

    Args:
        expected: images per second.
        fault: why there is no decoder, if so.
        trained: images per second of training alone, where that is known.
    """
    rates = ", ".join(f"{name_of(way)} {rate:.0f}" for way, rate in expected.items())
    missing = f"; no decode: {fault}" if fault else ""
    if trained < math.inf:
        missing = f", which trains {trained:.0f} without them{missing}"
    return (
        f"device_preprocessing {mode}: {name_of(chosen)} ({rates} images/s expected of {workers} workers and this "
        f"device{missing})"
    )


def name_of(way: Preprocessing) -> str:
    return way.mode if way.decoder is None else f"{way.mode} by {way.decoder}"


def measured_rates(
    ways: Sequence[Preprocessing],
    settings: ClassificationSettings,
    dataset: ImageDataset,
    processor: Any,
    device: torch.device,
) -> dict[Preprocessing, Rates]:
    """On the first images of a dataset. Leaves the random generators as they are."""
    rows = list(itertools.islice(dataset.stream.select_columns(columns_needed(dataset)), MEASURED_IMAGES))
    batch = list(itertools.islice(itertools.cycle(rows), min(settings.per_device_train_batch_size, MEASURED_BATCH)))
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            rates = {}
            for way in ways:
                torch.default_generator.manual_seed(settings.seed)  # the same draws for all
                parts = make_pipeline(settings, processor, device, way)
                batches = parts["batches"](dataset, None, parts["transform"], len(batch), True)
                torch.set_num_threads(1)  # as a worker
                worker = worker_rate(batches, rows)
                message = batches.message_of(batch)
                torch.set_num_threads(threads)
                rates[way] = Rates(worker, device_rate(parts["finish"], message, device))
    finally:
        torch.set_num_threads(threads)
    return rates


def training_rate(
    model: nn.Module, settings: ClassificationSettings, processor: Any, accelerator: Accelerator
) -> float:
    """Images per second of forward and backward passes of a copy of the model, on made-up images; leaves the random
    generators as they are. Infinity where that would not say how fast the run will be: of a model that is compiled, or
    whose norms wait for other processes, or that could not be measured.

    The optimiser, mixup and a teacher come in addition, so it is rather too much.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin is not None and plugin.backend != DynamoBackend.NO:
        return math.inf
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return math.inf
    device, count = accelerator.device, min(settings.per_device_train_batch_size, MEASURED_BATCH)
    seconds = []
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            copied = copy.deepcopy(model).train()
            pixels = torch.randn(count, channels_of(processor), *input_size(processor), device=device)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            for _ in range(ROUNDS):
                synchronize(device)
                start = time.perf_counter()
                with accelerator.autocast():
                    answers = copied(pixel_values=pixels)[0]
                if answers.requires_grad:
                    answers.float().square().mean().backward()
                synchronize(device)
                seconds.append(time.perf_counter() - start)
    except Exception as error:  # no memory for a copy, or a model of another kind: it is one figure less
        logger.info("How fast the model trains could not be measured: %s", one_line(error))
        return math.inf
    return count / min(seconds[1:])


def worker_rate(batches: Any, rows: Sequence[Mapping[str, Any]]) -> float:
    """Images per second of this thread's own time, from rows to a batch; reading the rows is not part of it."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        message = batches.message_of(rows)
        seconds.append(time.thread_time() - start)
    return len(message["labels"]) / max(min(seconds[1:]), 1e-9)


def device_rate(finish: Any, message: dict[str, Any], device: torch.device) -> float:
    """Images per second from a worker's message to examples on the device, one batch at a time."""
    if device.type == "cuda":
        message = {**message, "content": message["content"].pin_memory()}
    seconds = []
    for _ in range(ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        finish({**message, "skipped": []})
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return len(message["labels"]) / min(seconds[1:])


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
