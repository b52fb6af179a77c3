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

from ..data.datasets import align_labels
from ..foundation.errors import UserError
from .adaptation import head_name
from .classification import ClassificationTraining
from .heads import last_layer
from .objectives import Criterion, NumericLoss


class RegressionTraining(ClassificationTraining):
    """
    Attributes:
        mean, std: of each number over the training images, float64 (numbers,); a resumed run keeps those of its
            checkpoint.
    """

    def open_data(self, accelerator: Accelerator) -> list[str]:
        names = super().open_data(accelerator)
        if "target_mean" not in self.choices:
            dataset = align_labels(self.datasets["train"], {name: index for index, name in enumerate(names)})
            self.choices |= {"target_mean": list(dataset.target_mean), "target_std": list(dataset.target_std)}
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
        layer = layer_of_numbers(model)
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
        # accelerate's, which computes in half precision: that has three digits, of a year say.
        vars(model).pop("forward", None)
        rescale(layer_of_numbers(model), self.std, self.mean)
        return model


def layer_of_numbers(model: PreTrainedModel) -> nn.Linear:
    """The layer that gives a model's numbers.

    Raises:
        UserError: it does not end with a linear layer that has a bias and an output for each number.
    """
    head_name(model, "--task image-regression")
    layer = last_layer(model)
    if layer is None or layer.out_features != model.config.num_labels or layer.bias is None:
        raise UserError(
            f"--task image-regression needs a model that ends with a linear layer with a bias, and the head of a "
            f"{type(model).__name__} does not."
        )
    return layer


@torch.no_grad()
def rescale(layer: nn.Linear, factor: torch.Tensor, offset: torch.Tensor) -> None:
    """Makes a layer answer with `factor * y + offset` where it answered with y; computed in float64.

    Args:
        factor, offset: float64 (numbers,).
    """
    factor, offset = (values.to(layer.weight.device) for values in (factor, offset))
    layer.weight.copy_(layer.weight.double() * factor[:, None])
    layer.bias.copy_(layer.bias.double() * factor + offset)
