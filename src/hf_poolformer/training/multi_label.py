"""What training for several labels per image does its own way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..data.columns import ImageDataset
from ..data.datasets import align_labels
from ..evaluation.thresholds import choose_thresholds
from ..foundation.errors import UserError
from ..foundation.names import first_few
from ..foundation.settings import check_names
from ..settings.classification import MultiLabelSettings
from .classification import ClassificationTraining
from .distillation import binary_distillation_loss
from .objectives import AsymmetricLoss, BinaryCrossEntropy, Criterion


if TYPE_CHECKING:
    from .loop import Run


# A class that one image in a thousand has would count a thousand times, and a handful of images decide every step.
MOST = 20.0


class MultiLabelTraining(ClassificationTraining):
    def __init__(self, settings: MultiLabelSettings):
        super().__init__(settings)
        self.saves_again = settings.label_thresholds == "f1"
        self.label_thresholds: list[float] | None = None  # until they are chosen

    def open_data(self, accelerator: Accelerator) -> list[str]:
        names, settings = super().open_data(accelerator), self.settings
        if settings.pos_weight == "none":
            return names
        if "pos_weight" not in self.choices:
            self.choices["pos_weight"] = positive_weights(settings, self.datasets["train"], names)
        weights = self.choices["pos_weight"]
        shown = [f"{name} {weight:.3g}" for name, weight in zip(names, weights, strict=True)]
        accelerator.print(f"  pos_weight  {first_few(shown, 8)}")
        return names

    def make_criterion(self, device: torch.device) -> Criterion:
        settings, weights = self.settings, self.choices.get("pos_weight")
        pos_weight = None if weights is None else torch.tensor(weights, device=device)
        if settings.loss == "bce":
            return BinaryCrossEntropy(pos_weight)
        return AsymmetricLoss(
            settings.asymmetric_gamma_negative, settings.asymmetric_gamma_positive, settings.asymmetric_clip, pos_weight
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

    def finished(self, model: PreTrainedModel) -> PreTrainedModel:
        model = super().finished(model)
        if self.label_thresholds is not None:
            model.config.label_thresholds = self.label_thresholds
        return model
