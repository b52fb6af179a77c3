"""What a run does for rare classes: how much their images count in the loss, and how often they come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..data.classes import class_key
from ..data.columns import ImageDataset
from ..data.datasets import align_labels
from ..data.sampling import repeat_factors
from ..foundation.errors import UserError
from ..foundation.names import printable
from ..foundation.settings import check_names
from ..settings.classification import RareClassSettings
from .objectives import TINY


# Classes on a line of the log.
_SHOWN = 8


@dataclass(frozen=True)
class RareClasses:
    """By class, in the model's order.

    Attributes:
        counts: images.
        repeats: how often an image comes in an epoch, on average; None: once.
        weights: how much an image counts in the loss; None: 1.
    """

    names: Sequence[str] = ()
    counts: Sequence[int] = ()
    repeats: Sequence[float] | None = None
    weights: Sequence[float] | None = None

    def __str__(self) -> str:
        """The rarest and the most frequent classes, in lines for the log."""
        order = sorted((index for index, count in enumerate(self.counts) if count), key=lambda i: self.counts[i])
        half = _SHOWN // 2
        parts = [order] if len(order) <= _SHOWN else [order[:half], order[-half:]]
        lines = []
        for title, values, unit in (("per epoch", self.repeats, " x"), ("weights", self.weights, "")):
            if values is not None:
                shown = [", ".join(f"{self.names[i]} {values[i]:.3g}{unit}" for i in part) for part in parts]
                lines.append(f"  {title:<11} {printable(', ... '.join(shown), 116)}")
        return "\n".join(lines)


def rare_classes(settings: RareClassSettings, dataset: ImageDataset, label_names: Sequence[str]) -> RareClasses:
    """What the settings make of the images that there are.

    Args:
        label_names: in the model's order.

    Raises:
        UserError: it is not known how many images each class has; a class that is given a weight does not exist.
    """
    if not settings.asks_for_counts:
        return RareClasses()
    dataset = align_labels(dataset, {name: index for index, name in enumerate(label_names)})
    counts, several = dataset.counts, dataset.per_image
    if counts is None:
        flag = "--class_weights" if settings.class_weights != "none" else "--sampling"
        raise UserError(
            f"{flag} needs to know how many images each class has, and those of {dataset.name} are not counted."
        )
    repeats = weights = None
    if settings.sampling == "balanced":
        images = None if several is None else dataset.labelled - several.none
        repeats = repeat_factors(counts, settings.sampling_power, images)
    if settings.class_weights != "none":
        # What sampling does is not done a second time.
        seen = counts if repeats is None else [n * times for n, times in zip(counts, repeats, strict=True)]
        weights = class_weights(settings, label_names, seen, several=several is not None)
    return RareClasses(tuple(label_names), counts, repeats, weights)


def class_weights(
    settings: RareClassSettings, names: Sequence[str], seen: Sequence[float], several: bool = False
) -> tuple[float, ...]:
    """Weights of the classes, 1 on the average: over the images of an epoch; of several labels, over the classes.

    A class without images has the weight 1.

    Args:
        seen: images of each class in an epoch, on average.
        several: an image can have several classes, each of which is learnt for itself.
    """
    given, total = settings.given_weights(), sum(seen)
    if given is not None:
        raw = by_name(given, names, "--class_weights")
    elif settings.class_weights == "auto":
        raw = [1 / n if n else 0.0 for n in seen]
    else:
        beta = settings.class_weights_beta
        raw = [1 / effective_number(n, 1 - 1 / total if beta is None else beta) if n else 0.0 for n in seen]
    shares = [bool(n) / sum(map(bool, seen)) if several else n / total for n in seen]
    mean = sum(weight * share for weight, share in zip(raw, shares, strict=True))
    if mean == 0:
        raise UserError("--class_weights: no image would count, since each class that has images has the weight 0.")
    return tuple(weight / mean if n else 1.0 for weight, n in zip(raw, seen, strict=True))


def effective_number(images: float, beta: float) -> float:
    """`(1 - beta ** n) / (1 - beta)`: 1 for beta = 0, n for beta -> 1. arXiv 1901.05555, proposition 1."""
    return -math.expm1(images * math.log1p(beta - 1)) / (1 - beta) if beta else 1.0


def by_name(given: Mapping[str, float], names: Sequence[str], flag: str) -> list[float]:
    """What a flag gives by name, in the order of the names; 1 for those that it does not name.

    Raises:
        UserError: it names a class that does not exist.
    """
    keys = {class_key(name): float(weight) for name, weight in given.items()}
    unknown = [name for name in given if class_key(name) not in map(class_key, names)]
    check_names(unknown, names, f"class in {flag}")
    return [keys.get(class_key(name), 1.0) for name in names]


class RareClassLoss:
    """Cross entropy with weights of the classes, or focal (arXiv 1708.02002), or both. Of an image with the target t:

        loss = -(sum_c w_c s_c) sum_c t_c (1 - p_c)^gamma log p_c

    s is the target before label smoothing: the label, or what mixup and CutMix have made of two. So an image counts
    as its labels do, the smoothed target is learnt as it is, and the mean weight of the images stays 1. (Weights
    inside of the sum, as torch has them, would move every target towards the classes with large weights.)

    Calling it with logits (batch, classes) and targets (batch, classes) that sum to 1 returns the mean over the
    images, not over their weights, so that micro-batches and processes of equal size add up to one.

    Args:
        weights: w (classes,) on the device; None for 1.
        gamma: 0: not focal.
        label_smoothing: part of the targets that is spread over all classes.
    """

    def __init__(self, weights: torch.Tensor | None = None, gamma: float = 0.0, label_smoothing: float = 0.0):
        self.gamma = gamma
        # t = (1 - e) s + e / C for each class, so that these weights make of t what w makes of s.
        self.weights = (
            None if weights is None else (weights - label_smoothing * weights.mean()) / (1 - label_smoothing)
        )

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        costs = logits.log_softmax(-1)
        if self.gamma:
            # Not 0, where a power below 1 has no derivative.
            costs = (-costs.expm1()).clamp(min=TINY) ** self.gamma * costs
        losses = -(targets * costs).sum(-1)
        if self.weights is not None:
            losses = losses * (targets * self.weights).sum(-1)
        return losses.mean()
