"""What training a classifier does its own way: see `task.TaskTraining`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..data.description import describe_data, judge
from ..data.loader import skip_limit
from ..data.opening import open_splits
from ..evaluation.classification import check_labels, draw_results, evaluate
from ..evaluation.examples import Examples
from ..evaluation.pictures import draw_answers
from ..evaluation.processes import named_results
from ..foundation.errors import UserError
from ..foundation.names import printable
from ..foundation.settings import check_names
from ..foundation.tasks import TASKS
from ..settings.classification import ClassificationSettings
from .adaptation import LinearProbe, adapt, merged
from .augmentation import BatchMixer
from .channels import channels_of_run, check_rgb, choose_statistics
from .distillation import distillation_loss, load_teacher
from .images import ImageTraining
from .initialisation import initial_model, labels_in_model_order
from .objectives import Criterion, cross_entropy
from .rare_classes import RareClassLoss, rare_classes


if TYPE_CHECKING:
    from .loop import Run


class ClassificationTraining(ImageTraining):
    loss_parts = ("label_loss", "distillation_loss")
    thresholds: Literal["f1"] | None = None  # as `evaluate` takes them
    examples: Examples | None = None  # of the last evaluation

    def __init__(self, settings: ClassificationSettings):
        super().__init__(settings)
        # Where hardly anything is trained there is nothing worth distributing.
        self.may_be_distributed = not (settings.lora or settings.freeze_backbone)
        # As `evaluate` takes it; of a class by its name until the classes are known.
        self.operating_point = None if settings.operating_point == "none" else settings.operating_point
        self.saves_again = self.operating_point is not None
        self.class_shifts: list[float] | None = None  # until they are chosen

    def open_data(self, accelerator: Accelerator) -> list[str]:
        settings = self.settings
        self.datasets = open_splits(settings, counted=settings.asks_for_counts)
        if self.operating_point and "validation" not in self.datasets:
            raise UserError(
                f"--operating_point {self.operating_point} is chosen on validation images, and there are none: give "
                "--train_val_split 0.1, for example."
            )
        accelerator.print(describe_data(self.datasets))
        judge(self.datasets, skip_limit(settings.max_skipped), channels_of_run(settings))
        self.label_names = labels_in_model_order(settings, self.datasets["train"].label_names)
        self.rare = rare_classes(settings, self.datasets["train"], self.label_names)
        self.repeats = self.rare.repeats
        self.epochs_vary = self.repeats is not None
        if text := str(self.rare):
            accelerator.print(text)
        if asked := settings.recall_asked_for():
            name, recall = asked
            check_names([name], self.label_names, "class in --operating_point")
            self.operating_point = self.label_names.index(name), recall
        return self.label_names

    def make_model(self, accelerator: Accelerator, memory_format: torch.memory_format) -> tuple[PreTrainedModel, Any]:
        settings = self.settings
        model, processor, self.head_is_trained = initial_model(settings, self.label_names)
        choose_statistics(processor, settings, self.datasets["train"], self.choices)
        adapt(model, settings)
        self.teacher = None
        if settings.teacher:
            check_rgb(processor, "--teacher")
            self.teacher = load_teacher(settings, self.label_names, processor, accelerator, memory_format)
        self.mixer = BatchMixer(
            len(self.label_names),
            settings.mixup_alpha,
            settings.cutmix_alpha,
            settings.mixup_switch_prob,
            settings.label_smoothing,
        )
        self.criterion = self.make_criterion(accelerator.device)
        return model, processor

    def make_criterion(self, device: torch.device) -> Criterion:
        """What answers cost; whatever it holds of the data is on the device."""
        settings, weights = self.settings, self.rare.weights
        if weights is None and not settings.focal_gamma:
            return cross_entropy
        weights = None if weights is None else torch.tensor(weights, device=device)
        return RareClassLoss(weights, settings.focal_gamma, settings.label_smoothing)

    def trained_module(self, model: PreTrainedModel) -> nn.Module:
        return LinearProbe(model) if self.settings.freeze_backbone else model

    def method(self) -> dict[str, Any]:
        """How a run distils and adapts, and what it does for rare classes."""
        names: list[str] = []
        if self.settings.teacher:
            names += ["distillation", "distillation_alpha", "distillation_temperature"]
        if self.settings.lora:
            names += ["lora", "lora_alpha", "lora_dropout"]
        if self.settings.freeze_backbone:
            names.append("freeze_backbone")
        teacher = {"teacher": self.teacher.fingerprint()} if self.teacher else {}
        chosen = {name: getattr(self.settings, name) for name in names}
        return {**teacher, **chosen, **self.settings.rare_class_choices()}

    def losses(self, run: Run, batch: dict[str, Any]) -> list[torch.Tensor]:
        """With a teacher the parts are the labels' loss and the teacher's."""
        device = run.accelerator.device
        targets = self.targets(batch["labels"])
        pixel_values = batch["pixel_values"].to(device, memory_format=run.memory_format, non_blocking=True)
        pixel_values, targets = self.mixer(pixel_values, targets.to(device, non_blocking=True))
        logits = run.model(pixel_values=pixel_values).logits.float()
        labels = self.criterion(logits, targets)
        if self.teacher is None:
            return [labels]
        teachers, part = self.distil(logits, self.teacher(pixel_values)), self.settings.distillation_alpha
        return [(1 - part) * labels + part * teachers, labels, teachers]

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """The labels of a batch, on the host, as they are mixed and compared.

        Raises:
            UserError: there are none like these.
        """
        check_labels(labels, self.mixer.num_labels)
        return labels

    def distil(self, logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        """What the teacher's answers cost a model that gives others."""
        settings = self.settings
        return distillation_loss(logits, teacher_logits, settings.distillation, settings.distillation_temperature)

    def finished(self, model: PreTrainedModel) -> PreTrainedModel:
        return merged(model) if self.settings.lora else model

    def decided(self, model: PreTrainedModel) -> PreTrainedModel:
        return model if self.class_shifts is None else shifted(model, self.class_shifts)

    def evaluate(self, run: Run, model: nn.Module, final: bool) -> tuple[dict[str, Any], Any]:
        main = run.accelerator.is_main_process
        self.examples = Examples() if self.keeps_examples and main else None
        results = evaluate(
            model,
            run.eval_loader,
            accelerator=run.accelerator,
            num_labels=len(self.label_names),
            task=self.settings.task,
            thresholds=self.thresholds,
            operating_point=self.operating_point,
            intervals=final,
            memory_format=run.memory_format,
            progress=main and sys.stderr.isatty(),
            should_stop=run.stop.check,
            examples=self.examples,
        )
        self.class_shifts = results.get("class_shifts")
        return named_results(results, self.label_names), results if final else None

    def describe(self, results: dict[str, Any]) -> str:
        shifts, strength = results.get("class_shifts"), results.get("shift_strength")
        if not shifts:
            return super().describe(results)
        if strength is not None:
            return super().describe(results) + f", moved by {strength:.2f} log n"
        name, _ = self.settings.recall_asked_for()
        return super().describe(results) + f", moved by {shifts[name]:.2f} towards {printable(name, 40)}"

    def draw_predictions(self, processor: Any) -> Any | None:
        if self.examples is None:
            return None
        colours = processor.image_mean, processor.image_std
        return draw_answers(self.examples.chosen(), TASKS[self.settings.task].reads, self.label_names, *colours)

    def write_pictures(self, folder: Path, shown: Any, processor: Any) -> None:
        draw_results(folder, TASKS[self.settings.task], shown, self.label_names)


def shifted(model: PreTrainedModel, shifts: Sequence[float]) -> PreTrainedModel:
    """A copy whose logits are higher by `shifts` (classes,), by the biases of its last layer."""
    model = copy.deepcopy(model)
    last = [layer for layer in model.classifier.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.bias += torch.tensor(shifts, dtype=last.bias.dtype, device=last.bias.device)
    return model
