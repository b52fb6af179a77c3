"""What learning from a teacher without labels does its own way: see `task.TaskTraining`.

A teacher, any vision model, gives each image a feature z, of which each number is standardised over some of the
training images. The student's pooled features f, without their mean and divided by their standard deviation (a layer
norm without weights), go through one linear layer, the projection, which is trained with the student and left behind.
What is minimised is

    1 - cos(W norm(f) + b, (z - mean) / std)

so the student learns what tells images apart, whatever the size and number of the teacher's features. The projection
is that of FitNets (arXiv 1412.6550), the cosine that of AM-RADIO for features of whole images (arXiv 2312.06709);
PHI-S (arXiv 2410.01680) compares ways to standardise a teacher's features.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data.columns import ImageDataset
from ..data.description import describe_data, judge
from ..data.labels import Nothing
from ..data.loader import make_loader, skip_limit
from ..data.opening import open_splits
from ..data.transforms import EvalTransform, input_size
from ..evaluation.processes import measure
from ..foundation.errors import UserError, one_line
from ..foundation.loading import is_pooler, load_encoder
from ..foundation.processes import found_by_main
from ..settings.classification import FeatureDistillationSettings
from .channels import check_rgb
from .distillation import Teacher
from .images import ImageTraining
from .initialisation import initial_encoder


if TYPE_CHECKING:
    from .loop import Run


# Training images over which the teacher's features are standardised, and how many it sees at once.
MEASURED, AT_ONCE = 256, 32
# Of the deviation that the channels have on average, what a channel has at least: one that was seen once would
# otherwise drown all others where it is seen again.
LEAST_DEVIATION = 0.1


def similarity(features: torch.Tensor, teachers: torch.Tensor) -> torch.Tensor:
    """The cosine between what the student and what the teacher says of each image, (batch,).

    Args:
        features, teachers: (batch, channels), of floating point.
    """
    return F.cosine_similarity(features, teachers, dim=-1)


class FeatureDistillationTraining(ImageTraining):
    def open_data(self, accelerator: Accelerator) -> list[str]:
        settings = self.settings
        opened = open_splits(settings, labelled=False)
        self.datasets = {split: without_labels(dataset) for split, dataset in opened.items()}
        accelerator.print(describe_data(self.datasets))
        judge(self.datasets, skip_limit(settings.max_skipped))
        return []

    def make_model(self, accelerator: Accelerator, memory_format: torch.memory_format) -> tuple[PreTrainedModel, Any]:
        """The model has its projection among its weights, so that it is trained, averaged and kept by checkpoints; it
        is not saved with the model."""
        settings = self.settings
        model, processor = initial_encoder(settings)
        check_rgb(processor, "--teacher")
        self.teacher = load_feature_teacher(settings, processor, accelerator, memory_format)
        size = input_size(processor)
        with torch.no_grad():
            width = pooled(model.eval()(pixel_values=torch.zeros(1, 3, *size))).shape[1]
        model.train()
        model.projection = nn.Linear(width, self.teacher.width(size))
        names = {f"projection.{name}" for name in model.projection.state_dict()}
        model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *names}
        if "teacher_mean" not in self.choices:
            mean, std = found_by_main(lambda: self.measure_teacher(processor))
            self.choices |= {"teacher_mean": mean, "teacher_std": std}
        self.teacher.standardise(self.choices["teacher_mean"], self.choices["teacher_std"])
        return model, processor

    def measure_teacher(self, processor: Any) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each of the teacher's features over some training images, as they are seen in
        evaluation.

        Raises:
            UserError: as `make_loader`; or the features are not finite, or the same for all images.
        """
        images = make_loader(
            self.datasets["train"],
            EvalTransform(processor),
            batch_size=AT_ONCE,
            training=True,  # in random order: a dataset that is sorted by class shows its first classes only
            seed=self.settings.seed,
            shuffle_buffer_size=self.settings.shuffle_buffer_size,
            max_skipped=1.0,
            max_skipped_shards=self.settings.max_skipped_shards,
        )
        batches = itertools.islice(images, MEASURED // AT_ONCE)
        device = self.teacher.accelerator.device
        features = torch.cat([self.teacher(batch["pixel_values"].to(device)).double().cpu() for batch in batches])
        name = self.settings.teacher
        if not features.isfinite().all():
            raise UserError(f"the teacher {name} gives features that are not finite (NaN or infinity).")
        deviation = features.std(0, correction=0)
        if len(features) < 2 or deviation.max() <= 1e-6 * features.abs().max():
            raise UserError(f"the teacher {name} gives the same features for each of {len(features)} images.")
        return features.mean(0).tolist(), deviation.clamp(min=LEAST_DEVIATION * deviation.mean().item()).tolist()

    def trained_module(self, model: PreTrainedModel) -> nn.Module:
        return Student(model)

    def method(self) -> dict[str, Any]:
        return {"teacher": self.teacher.fingerprint(), "distillation": self.settings.distillation}

    def losses(self, run: Run, batch: dict[str, Any]) -> list[torch.Tensor]:
        device = run.accelerator.device
        pixel_values = batch["pixel_values"].to(device, memory_format=run.memory_format, non_blocking=True)
        return [1 - similarity(run.model(pixel_values).float(), self.teacher(pixel_values)).mean()]

    @torch.inference_mode()
    def evaluate(self, run: Run, model: nn.Module, final: bool) -> tuple[dict[str, Any], Any]:
        accelerator, judge = run.accelerator, SimilarityJudge()
        bare = accelerator.unwrap_model(model)
        student = bare if isinstance(bare, Student) else Student(bare)

        def look(batch: dict[str, Any]) -> int:
            if not len(batch["labels"]):
                return 0
            pixel_values = batch["pixel_values"].to(
                accelerator.device, memory_format=run.memory_format, non_blocking=True
            )
            with accelerator.autocast():
                features = student(pixel_values)
            judge.add(similarity(features.float(), self.teacher(pixel_values)))
            return len(pixel_values)

        results = measure(
            student,
            run.eval_loader,
            look,
            judge,
            accelerator=accelerator,
            progress=accelerator.is_main_process and sys.stderr.isatty(),
            should_stop=run.stop.check,
        )
        return results, None

    def write_pictures(self, folder: Path, shown: Any, processor: Any) -> None:
        """There are none."""


class Student(nn.Module):
    """A model with a projection, which says of an image what a teacher says.

    Calling it with pixel values (batch, 3, height, width) returns (batch, width of the teacher's features).
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = pooled(self.model(pixel_values=pixel_values))
        return self.model.projection(F.layer_norm(features, features.shape[1:]))


class FeatureTeacher(Teacher):
    """A trained vision model that says what is in a batch which was prepared for another model.

    Args:
        pooler: whether its own `pooler_output` was trained.

    Calling it with pixel values (batch, 3, height, width) returns float32 features (batch, width), standardised once
    `standardise` was called.
    """

    def __init__(self, *args: Any, pooler: bool):
        super().__init__(*args)
        self.pooler = pooler
        self.mean = self.std = None

    def standardise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        device = self.accelerator.device
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))

    def width(self, size: tuple[int, int]) -> int:
        """How many numbers its features have.

        Args:
            size: height and width of the student's images.

        Raises:
            UserError: it gives no features of an image.
        """
        try:
            return self(torch.zeros(1, 3, *size, device=self.accelerator.device)).shape[1]
        except Exception as error:  # whatever a foreign model raises
            raise UserError(
                f"a {type(self.model).__name__} gives no features of an image: {one_line(error)}"
            ) from error

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with self.accelerator.autocast():
            features = pooled(self.model(pixel_values=self.adapt(pixel_values)), self.pooler, self.class_token)
        features = features.float()
        return features if self.mean is None else (features - self.mean) / self.std

    @property
    def class_token(self) -> bool:
        return any(name.endswith(("cls_token", "class_embedding")) for name, _ in self.model.named_parameters())


def pooled(outputs: Any, pooler: bool = True, class_token: bool = False) -> torch.Tensor:
    """One vector per image, (batch, channels), out of what an encoder answers.

    That is its `pooler_output`; without one the mean of a feature map over its places, the class token, or the mean of
    all tokens.

    Args:
        pooler: whether there is a `pooler_output` that means something.
        class_token: whether the first token stands for the image.
    """
    given = getattr(outputs, "pooler_output", None) if pooler else None
    if given is not None:
        return given.flatten(1)
    hidden = outputs.last_hidden_state
    if hidden.ndim == 4:
        return hidden.mean((-2, -1))
    if hidden.ndim == 3:
        return hidden[:, 0] if class_token else hidden.mean(1)
    return hidden


def load_feature_teacher(
    settings: FeatureDistillationSettings,
    student_processor: Any,
    accelerator: Accelerator,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> FeatureTeacher:
    """The teacher of a run; every process loads it for itself.

    Raises:
        UserError: there is no such vision model, or it is not trained.
    """
    name = settings.teacher
    model, processor, fresh = load_encoder(name, settings.origin_of_others())
    lacking = [weight for weight in fresh if not is_pooler(weight)]
    if lacking:
        raise UserError(f"the teacher {name} is not a trained vision model of its own shape: it lacks {lacking[0]}.")
    model = getattr(model, "vision_model", model)  # of two that compare images and texts
    return FeatureTeacher(
        model, processor, student_processor, accelerator, memory_format, pooler=len(lacking) == len(fresh)
    )


def without_labels(dataset: ImageDataset) -> ImageDataset:
    """The same images, each with a label that says nothing, whatever columns are beside it."""
    return dataclasses.replace(dataset, storage=Nothing())


class SimilarityJudge:
    """Gathers how similar the student's features of each image are to the teacher's."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, similarities: torch.Tensor) -> None:
        """
        Args:
            similarities: (batch,).
        """
        self.total += similarities.double().sum().item()
        self.count += len(similarities)

    def state(self) -> tuple[float, int]:
        return self.total, self.count

    def compute(self, states: Sequence[tuple[float, int]]) -> dict[str, float]:
        """
        Raises:
            UserError: what was gathered is not finite.
        """
        total, count = map(sum, zip(*states, strict=True))
        mean = total / count
        if not math.isfinite(mean):
            raise UserError("the model's features are not finite (NaN or infinity).")
        return {"eval_similarity": mean, "eval_loss": 1 - mean}
