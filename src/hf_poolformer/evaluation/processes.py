"""What the processes of an evaluation find apart, brought together once, and put into words."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm import tqdm

from ..foundation.errors import UserError
from ..foundation.tasks import Task


class Judge(Protocol):
    """What is measured for one task; `Task.evaluation` names the class. Made with the number of labels."""

    def state(self) -> Any:
        """What was counted in this process; can be pickled."""

    def compute(self, states: Sequence[Any]) -> dict[str, Any]:
        """The figures, named `eval_*`, of the states of all processes."""


def measure(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    look: Callable[[dict[str, Any]], int],
    judge: Judge,
    *,
    accelerator: Accelerator,
    progress: bool,
    should_stop: Callable[[], int],
) -> dict[str, Any]:
    """The figures of all images that the processes' loaders yield together.

    No process waits for another before its own images are through, so their numbers may differ at will; what they have
    counted is then brought together, once.

    Args:
        model: bare, since DistributedDataParallel would wait for the others in every forward pass; its mode is
            restored.
        look: shows a batch to the model and what it answers to the judge, and returns the number of images.
        should_stop: asked after each batch; when it says so on any process, there are no figures.

    Returns:
        the same on every process: what the judge computes, `eval_samples`, `eval_skipped_images`, `eval_runtime` in
        seconds (without the time in which the figures are computed) and `eval_samples_per_second`.

    Raises:
        UserError: what `look` or the judge raises on any process; there is no image to evaluate on.
    """
    was_training = model.training
    model.eval()
    skipped, count, stopped, fault = 0, 0, False, None
    start = time.perf_counter()
    try:
        for batch in tqdm(loader, desc="evaluating", unit="batch", disable=not progress, leave=False):
            skipped += len(batch.get("skipped", ()))
            count += look(batch)
            if stopped := bool(should_stop()):
                break
    except UserError as error:  # the others would wait for this process
        fault = str(error)
    state = judge.state()
    model.train(was_training)
    parts = gather({"fault": fault, "stopped": stopped, "skipped": skipped, "count": count, "state": state})
    seconds = time.perf_counter() - start
    if not parts:
        return {}
    samples, missed = count_images(parts, loader)
    return {
        **computed_once(judge, [part["state"] for part in parts], accelerator),
        "eval_samples": samples,
        "eval_skipped_images": missed,
        "eval_runtime": seconds,
        "eval_samples_per_second": samples / seconds,
    }


def computed_once(judge: Judge, states: Sequence[Any], accelerator: Accelerator) -> dict[str, Any]:
    """What the judge computes, by one process for all: average precision and intervals take their time and memory."""
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = judge.compute(states)
        except UserError as error:
            told[1] = str(error)
    broadcast_object_list(told)
    results, fault = told
    if fault:
        raise UserError(fault)
    return results


def gather(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process has to say; nothing if any was asked to stop.

    Args:
        mine: with `fault`, the message of a UserError or None, and `stopped`.

    Raises:
        UserError: that of a process that has failed, in all of them: none is left waiting for another.
    """
    parts = gather_object([mine])
    for part in parts:
        if part["fault"]:
            raise UserError(part["fault"])
    return [] if any(part["stopped"] for part in parts) else parts


def count_images(parts: Sequence[dict[str, Any]], loader: Iterable[Any]) -> tuple[int, int]:
    """Images that were evaluated and that were skipped, by the `count` and `skipped` of each process.

    Raises:
        UserError: there are none, or too many were skipped.
    """
    count, skipped = (sum(part[name] for part in parts) for name in ("count", "skipped"))
    if not count:
        raise UserError("there is no image to evaluate on: the split is empty, or every image in it is broken.")
    if hasattr(loader, "judge"):  # a list of batches has none
        loader.judge(count + skipped, skipped)
    return count, skipped


def named_results(results: dict[str, Any], label_names: Sequence[str]) -> dict[str, Any]:
    """Results fit for JSON: lists, the figures of single labels, under the labels' names; None for what is not a
    number; without arrays, which are for pictures and thresholds."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return {label: plain(item) for label, item in zip(label_names, value, strict=True)}
        if isinstance(value, tuple):
            return list(value)
        return None if isinstance(value, float) and math.isnan(value) else value

    return {name: plain(value) for name, value in results.items() if not isinstance(value, np.ndarray)}


def describe_results(results: dict[str, Any], task: Task, first: str | None = None) -> str:
    """The results of an evaluation in one line, with the interval of the figure that matters most.

    Args:
        first: its key, if not as the row of the task says.
    """
    intervals = results.get("eval_confidence_intervals") or {}
    figures = [figure for figure in task.figures_of(math.inf, first) if results.get(figure.key) is not None]
    parts = []
    for place, figure in enumerate(figures):
        if figure.short or (first and not place):
            interval = None if place else intervals.get(figure.key)
            parts.append(f"{figure.short or figure.name} {figure.text(results[figure.key], interval)}")
    skipped = results["eval_skipped_images"]
    return (
        f"{', '.join(parts) or 'nothing to find'}, {results['eval_samples']} images at "
        f"{results['eval_samples_per_second']:.1f} images/s"
        + (f", {skipped} broken images left out" if skipped else "")
        + (f", without {results['eval_left_out']}" if "eval_left_out" in results else "")
    )
