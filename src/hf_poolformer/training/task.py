"""What the loop asks of a task: its data, its model, what is minimised, what is measured, and what is drawn."""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..data.columns import ImageDataset
from ..data.datasets import whole_split
from ..foundation.tasks import TASKS
from ..settings.training import TrainingSettings


if TYPE_CHECKING:
    from .loop import Run


class TaskTraining(ABC):
    """The training of one task. `training.loop.train` calls the methods in the order in which they stand here.

    Attributes:
        loss_parts: names of what `losses` gives beside what is minimised, for the log.
        may_be_distributed: whether each process may hold but a part of the model (FSDP).
        epochs_vary: whether chance decides how many images an epoch has, so that steps tell when a run is over.
        saves_again: whether the last evaluation decides something that is saved with the model.
        keeps_examples: whether an evaluation is to keep some images for `draw_predictions`.
        settings: what `auto` means is a number in them when the loaders are made.
        choices: what the run chose for itself by looking at the machine and the data, fit for JSON. Checkpoints keep
            it, and a run that goes on from one finds it here.
    """

    loss_parts: Sequence[str] = ()
    may_be_distributed = False
    epochs_vary = False
    saves_again = False
    keeps_examples = False

    def __init__(self, settings: TrainingSettings):
        self.settings = settings
        self.choices: dict[str, Any] = {}

    @abstractmethod
    def open_data(self, accelerator: Accelerator) -> list[str]:
        """Opens the data undecoded, says what was understood of it and refuses what cannot be meant.

        Returns:
            the names of the classes in the order of the model to be; none where images have no labels.
        """

    @property
    @abstractmethod
    def num_examples(self) -> int | None:
        """Training images, if their number is known."""

    @property
    @abstractmethod
    def evaluated(self) -> ImageDataset | None:
        """The images that are evaluated on, if there are any."""

    @abstractmethod
    def make_model(self, accelerator: Accelerator, memory_format: torch.memory_format) -> tuple[PreTrainedModel, Any]:
        """The model that the run starts with, the same in every process, and its image processor."""

    @abstractmethod
    def make_loaders(self, accelerator: Accelerator, model: PreTrainedModel, processor: Any) -> tuple[Any, Any | None]:
        """Loaders of this process's share of the training and, if there are any, of the evaluation images."""

    def trained_module(self, model: PreTrainedModel) -> nn.Module:
        """What computes the losses."""
        return model

    def method(self) -> dict[str, Any]:
        """Settings with which a run must go on as it began."""
        return {}

    def describe_images(self, processor: Any) -> str:
        """The size in which images are trained on."""
        return ""

    def figures(self) -> dict[str, Any]:
        """What training has come upon, for `all_results.json`; every process calls it."""
        evaluated = self.evaluated
        # One of another folder is none of the dataset; dense tasks take none.
        if evaluated is None or getattr(self.settings, "validation_dir", None) is not None:
            return {}
        split = whole_split(evaluated)
        return {"evaluated_split": split} if split else {}

    @abstractmethod
    def losses(self, run: Run, batch: dict[str, Any]) -> list[torch.Tensor]:
        """Of a micro-batch what is minimised, a mean over its images, then its parts.

        Args:
            run: only its `settings`, `accelerator`, `model`, `memory_format` and `progress` are there where batches
                are tried before the run begins.
        """

    def tiled(self, batch: dict[str, Any], size: int) -> dict[str, Any]:
        """A batch of `size` images made of a smaller one, none of which needs less memory than any of the run's."""
        places = [index % len(batch["labels"]) for index in range(size)]
        return {**batch, "skipped": [], **{name: chosen(batch[name], places) for name in ("pixel_values", "labels")}}

    def finished(self, model: PreTrainedModel) -> PreTrainedModel:
        """What is evaluated and saved of a model that was trained; a copy where it has to be changed."""
        return model

    def decided(self, model: PreTrainedModel) -> PreTrainedModel:
        """What is saved of a finished model when the last evaluation has decided; see `saves_again`."""
        return model

    @abstractmethod
    def evaluate(self, run: Run, model: nn.Module, final: bool) -> tuple[dict[str, Any], Any]:
        """Evaluates on what `run.eval_loader` gives; every process calls it.

        Args:
            final: nothing is trained after this.

        Returns:
            results fit for JSON, none if the run was told to stop; and, if `final`, what `write_pictures` draws.
        """

    @abstractmethod
    def describe(self, results: dict[str, Any]) -> str:
        """The results of an evaluation in one line."""

    def draw_predictions(self, processor: Any) -> Any | None:
        """A figure of matplotlib with some images of the last evaluation and what the model says of them.

        Returns:
            None where none were kept, or there is nothing to see.
        """
        return None

    @abstractmethod
    def write_pictures(self, folder: Path, shown: Any, processor: Any) -> None:
        """What the last evaluation leaves for the eyes. A picture that cannot be drawn is missing, no more."""


def chosen(values: Any, places: list[int]) -> Any:
    """Of a tensor or a list the elements at these places."""
    return values[places] if isinstance(values, torch.Tensor) else [values[place] for place in places]


def training_of(settings: TrainingSettings) -> TaskTraining:
    return pkgutil.resolve_name(TASKS[settings.task].training)(settings)
