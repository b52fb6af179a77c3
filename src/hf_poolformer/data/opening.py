"""From settings to data: the one place where these are spelled out as arguments."""

from __future__ import annotations

import inspect
from typing import Any

from accelerate import Accelerator

from ..foundation.tasks import TASKS
from ..settings.data import ReadingSettings
from .columns import ImageDataset
from .datasets import open_datasets
from .loader import data_workers, skip_limit


def open_splits(settings: ReadingSettings, **changes: Any) -> dict[str, ImageDataset]:
    """`open_datasets` with what the settings say and the task needs; its arguments are called as they are.

    Args:
        changes: arguments that are not as the settings say.
    """
    named = {
        name: getattr(settings, name) for name in inspect.signature(open_datasets).parameters.keys() & vars(settings)
    }
    task = TASKS.get(getattr(settings, "task", ""))
    if task is not None and task.problem_type is not None:
        named["problem_type"] = task.problem_type
    return open_datasets(**{**named, "revision": settings.dataset_revision, "token": settings.hub_token, **changes})


def loader_arguments(settings: ReadingSettings, accelerator: Accelerator) -> dict[str, Any]:
    """What `make_loader` is told alike for all loaders of this process."""
    return {
        "num_workers": data_workers(settings.num_workers, accelerator),
        "max_skipped": skip_limit(settings.max_skipped),
        "process_index": accelerator.process_index,
        "num_processes": accelerator.num_processes,
        "pin_memory": accelerator.device.type == "cuda",
    }
