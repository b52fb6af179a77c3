"""What training for numbers does its own way.

While it is trained the model answers with standardised numbers: mean 0 and standard deviation 1 over the training
images, so that a loss and a learning rate suit years and millimetres alike. What is evaluated and saved is a copy
whose last layer gives the numbers in their units, and nobody who uses it knows of the rest.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..foundation.errors import UserError
from .adaptation import head_name
from .classification import ClassificationTraining
from .objectives import Criterion, NumericLoss


class RegressionTraining(ClassificationTraining):
    """
    Attributes:
        mean, std: of each number over the training images, float64 (numbers,); a resumed run keeps those of its
            checkpoint.
    """

    answers = "numbers"

    def open_data(self, accelerator: Accelerator) -> list[str]:
        names, dataset = super().open_data(accelerator), self.datasets["train"]
        if "target_mean" not in self.choices:
            places = [dataset.label_names.index(name) for name in names]
            for choice in ("target_mean", "target_std"):
                self.choices[choice] = [getattr(dataset, choice)[place] for place in places]
        self.mean, self.std = (
            torch.tensor(self.choices[choice], dtype=torch.float64) for choice in ("target_mean", "target_std")
        )
        return names

    def make_model(self, accelerator: Accelerator, memory_format: torch.memory_format) -> tuple[PreTrainedModel, Any]:
        """
        Raises:
            UserError: as `ClassificationTraining.make_model`; or the model has no last layer that could give units.
        """
        model, processor = super().make_model(accelerator, memory_format)
        layer = last_layer(model)
        if self.head_is_trained:  # to give units
            rescale(layer, 1 / self.std, -self.mean / self.std)
        return model, processor

    def make_criterion(self, device: torch.device) -> Criterion:
        return NumericLoss(self.settings.loss, self.settings.huber_delta)

    def method(self) -> dict[str, Any]:
        """How a run distils and adapts, and what it minimises."""
        names = ["loss", "huber_delta"] if self.settings.loss == "huber" else ["loss"]
        return {**super().method(), **{name: getattr(self.settings, name) for name in names}}

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            UserError: these are not as many finite numbers as the model gives.
        """
        if labels.shape[1:] != (len(self.label_names),) or not labels.isfinite().all():
            raise UserError(
                f"the dataset has an image without {len(self.label_names)} finite numbers. Is --label_column_name the "
                "right column?"
            )
        return ((labels.double() - self.mean) / self.std).float()

    def distil(self, logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        """The loss, with the teacher's numbers, which are in units, in the place of the images' own."""
        mean, std = (values.float().to(logits.device) for values in (self.mean, self.std))
        return self.criterion(logits, (teacher_logits - mean) / std)

    def finished(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy that gives units."""
        adapted = super().finished(model)
        model = copy.deepcopy(model) if adapted is model else adapted
        rescale(last_layer(model), self.std, self.mean)
        return model


def last_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer that gives a model's numbers.

    Raises:
        UserError: it does not end with a linear layer that has a bias and an output for each number.
    """
    head = model.get_submodule(head_name(model, "--task image-regression"))
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    if not layers or layers[-1].out_features != model.config.num_labels or layers[-1].bias is None:
        raise UserError(
            f"--task image-regression needs a model that ends with a linear layer with a bias, and the head of a "
            f"{type(model).__name__} does not."
        )
    return layers[-1]


@torch.no_grad()
def rescale(layer: nn.Linear, factor: torch.Tensor, offset: torch.Tensor) -> None:
    """Makes a layer answer with `factor * y + offset` where it answered with y; computed in float64.

    Args:
        factor, offset: float64 (numbers,).
    """
    factor, offset = (values.to(layer.weight.device) for values in (factor, offset))
    layer.weight.copy_(layer.weight.double() * factor[:, None])
    layer.bias.copy_(layer.bias.double() * factor + offset)
