"""What training for several labels per image does its own way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..data.datasets import align_labels
from ..foundation.errors import UserError
from ..foundation.names import first_few, printable
from ..settings.classification import MultiLabelSettings
from .classification import ClassificationTraining
from .distillation import binary_distillation_loss
from .objectives import AsymmetricLoss, BinaryCrossEntropy, Criterion
from .rare_classes import by_name


if TYPE_CHECKING:
    from .loop import Run


# The most that `--pos_weight auto` gives. A class that one image in a thousand has would weigh 999, and the few images
# that have it would drown all others.
MOST_WEIGHT = 20.0


def positive_weights(counts: Sequence[int], images: int) -> list[float]:
    """For each class, how many times as many images lack it as have it, from 1 / `MOST_WEIGHT` to `MOST_WEIGHT`.

    Args:
        counts: images that have each class. A class without any weighs 1.
        images: in all, those without any class included.
    """
    ratios = [(images - count) / count if count else 1.0 for count in counts]
    return [min(max(ratio, 1 / MOST_WEIGHT), MOST_WEIGHT) for ratio in ratios]


class MultiLabelTraining(ClassificationTraining):
    def __init__(self, settings: MultiLabelSettings):
        super().__init__(settings)
        self.saves_again = settings.label_thresholds == "f1"
        self.thresholds = "f1" if self.saves_again else None
        self.label_thresholds: list[float] | None = None  # until they are chosen

    def open_data(self, accelerator: Accelerator) -> list[str]:
        names = super().open_data(accelerator)
        if self.settings.pos_weight != "none" and "pos_weight" not in self.choices:
            self.choices["pos_weight"] = self.weights_asked_for()
        if weights := self.choices.get("pos_weight"):
            shown = [f"{name} {weight:.3g}" for name, weight in zip(names, weights, strict=True)]
            accelerator.print(f"  pos_weight  {printable(first_few(shown, 8), 116)}")
        return names

    def weights_asked_for(self) -> list[float]:
        """`--pos_weight` by class, in the model's order."""
        names, given = self.label_names, self.settings.given_pos_weight()
        if given is None:
            images = align_labels(self.datasets["train"], {name: index for index, name in enumerate(names)})
            return positive_weights(images.counts, images.labelled)
        if not isinstance(given, dict):
            return [float(given)] * len(names)
        return by_name(given, names, "--pos_weight")

    def make_criterion(self, device: torch.device) -> Criterion:
        settings, gamma = self.settings, self.settings.focal_gamma
        pos_weight, weight = (
            None if weights is None else torch.tensor(weights, device=device)
            for weights in (self.choices.get("pos_weight"), self.rare.weights)
        )
        if settings.loss == "bce" and not gamma:
            return BinaryCrossEntropy(pos_weight, weight)
        if settings.loss == "bce":  # focal
            return AsymmetricLoss(gamma, gamma, 0.0, pos_weight, weight)
        return AsymmetricLoss(
            settings.asymmetric_gamma_negative,
            settings.asymmetric_gamma_positive,
            settings.asymmetric_clip,
            pos_weight,
            weight,
        )

    def method(self) -> dict[str, Any]:
        """How a run distils and adapts, and what it minimises."""
        names = ["loss", "pos_weight"]
        if self.settings.loss == "asymmetric":
            names += ["asymmetric_gamma_negative", "asymmetric_gamma_positive", "asymmetric_clip"]
        return {**super().method(), **{name: getattr(self.settings, name) for name in names}}

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            UserError: these are not as many zeros and ones as there are classes.
        """
        if labels.shape[1:] != (len(self.label_names),) or not ((labels == 0) | (labels == 1)).all():
            raise UserError(
                f"the dataset has an image whose labels are not {len(self.label_names)} zeros and ones, one for each "
                "class. Is --label_column_name the right column?"
            )
        return labels

    def distil(self, logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        settings = self.settings
        return binary_distillation_loss(
            logits, teacher_logits, settings.distillation, settings.distillation_temperature
        )

    def decided(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.label_thresholds is not None:
            model.config.label_thresholds = self.label_thresholds
        return model

    def evaluate(self, run: Run, model: nn.Module, final: bool) -> tuple[dict[str, Any], Any]:
        """As `TaskTraining.evaluate`, by thresholds that suit the model as it is now."""
        results, shown = super().evaluate(run, model, final)
        if "label_thresholds" in results:
            self.label_thresholds = [results["label_thresholds"][name] for name in self.label_names]
        return results, shown

    def describe(self, results: dict[str, Any]) -> str:
        chosen = results.get("label_thresholds", {}).values()
        return super().describe(results) + (f", thresholds {min(chosen):.2f} to {max(chosen):.2f}" if chosen else "")
