"""What a model's answers cost, as criteria: `criterion(logits, targets)` is a mean over the images of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F


# Of float32 logits and targets, each (batch, labels), a scalar.
Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of probabilities that sum to 1 for each image, among which one label or a mixture of some is right."""
    return F.cross_entropy(logits, targets)
