"""What a model's answers cost, as criteria: `criterion(logits, targets)` is a mean over the images of a batch.

Of images with several labels or numbers it is a mean over these as well, so that a learning rate that suits one
dataset suits one with more classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F


# Of float32 logits and targets, each (batch, labels), a scalar.
Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Smallest probability that is raised to a power: the derivative of a power below 1 is infinite at 0.
TINY = 1e-8


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of probabilities that sum to 1 for each image, among which one label or a mixture of some is right."""
    return F.cross_entropy(logits, targets)


@dataclass
class BinaryCrossEntropy:
    """Of each class for itself: `-w y log p - (1 - y) log(1 - p)`, p the sigmoid of its logit.

    Attributes:
        pos_weight: w of each class (labels,), None for 1.
        weight: how much each class counts beside the others (labels,), None for 1.
    """

    pos_weight: torch.Tensor | None = None
    weight: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, self.weight, pos_weight=self.pos_weight)


@dataclass
class AsymmetricLoss:
    """The same with less weight on what is easy, above all on the many classes that an image does not have.

        -w y (1 - p)^g+ log p - (1 - y) q^g- log(1 - q),  q = max(p - clip, 0)

    arXiv 2009.14119, equations 3 to 6. A target between 0 and 1 mixes the two terms.

    Attributes:
        gamma_negative, gamma_positive: g- and g+.
        clip: a class that an image does not have costs nothing below this probability.
        pos_weight: w of each class (labels,), None for 1.
        weight: how much each class counts beside the others (labels,), None for 1.
    """

    gamma_negative: float = 4.0
    gamma_positive: float = 1.0
    clip: float = 0.05
    pos_weight: torch.Tensor | None = None
    weight: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # log p and log(1 - p), and powers of 1 - p through its logarithm: p itself is soon 1 in float32.
        present, absent = F.logsigmoid(logits), F.logsigmoid(-logits)
        positive = (self.gamma_positive * absent).exp() * present
        if self.pos_weight is not None:
            positive = self.pos_weight * positive
        shifted = (present.exp() - self.clip).clamp(min=TINY)
        if self.clip:
            absent = (-shifted).log1p()
        negative = shifted**self.gamma_negative * absent
        losses = -(targets * positive + (1 - targets) * negative)
        return (losses if self.weight is None else losses * self.weight).mean()


@dataclass
class NumericLoss:
    """The distance of numbers.

    Attributes:
        kind: `mse`, `l1`, or `huber`: half the square up to `delta`, then linear.
    """

    kind: str = "mse"
    delta: float = 1.0

    def __call__(self, numbers: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.kind == "huber":
            return F.huber_loss(numbers, targets, delta=self.delta)
        return {"mse": F.mse_loss, "l1": F.l1_loss}[self.kind](numbers, targets)
