"""What is chosen on labelled images and not learnt: the probability from which on an image has a label, and how much
rare classes are favoured."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


# Where nothing says better.
HALF = 0.5
# How much of the logarithm of a class's frequency is taken off its logit. 1 turns the answers of a model that learnt
# the classes as often as they come into those for classes that come equally often (arXiv 2007.07314).
STRENGTHS = np.linspace(-1, 2, 61)
# What is best for one strength by a few images is chance: the mean of so many neighbours is what counts.
NEIGHBOURS = 7
# So many images count for the threshold of all labels together beside a label's own. In simulations with 100 to 1000
# images, 2 was best or near it: a label with few images takes the common threshold, one with many its own.
PRIOR_IMAGES = 2


def choose_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """Thresholds with a good F1 of each label, on these images and on others.

    The threshold with the best F1 of a label that few images have is mostly chance. So it is averaged with the one
    that is best for all labels together, the images that have the label counting against `PRIOR_IMAGES`. A label that
    no image has keeps one half. The order of the images does not matter.

    Args:
        probabilities: (images, labels), 0 to 1.
        labels: (images, labels), 1 for each that an image has, else 0.

    Returns:
        for each label the probability from which an image has it.
    """
    present = np.asarray(labels) > 0
    counts = present.sum(axis=0)
    if not counts.any():
        return [HALF] * len(counts)
    some = counts > 0
    common = best_threshold(probabilities[:, some].ravel(), present[:, some].ravel())
    return [
        (count * best_threshold(probabilities[:, index], present[:, index]) + PRIOR_IMAGES * common)
        / (count + PRIOR_IMAGES)
        if count
        else HALF
        for index, count in enumerate(counts.tolist())
    ]


def best_threshold(probabilities: np.ndarray, present: np.ndarray) -> float:
    """The threshold with the best F1, halfway between the probabilities that it divides; of several the highest.

    Args:
        probabilities, present: (images,), with one image that has the label at least.
    """
    order = np.argsort(probabilities)[::-1]
    falling = probabilities[order].astype(np.float64)
    hits, taken = np.cumsum(present[order]), np.arange(1, len(order) + 1)
    f1 = 2 * hits / (taken + present.sum())
    f1[:-1][falling[:-1] == falling[1:]] = -1  # what is equally probable cannot be told apart
    last = int(f1.argmax())
    below = falling[last + 1] if last + 1 < len(falling) else 0.0
    return float((falling[last] + below) / 2)


def choose_shift(
    log_probabilities: np.ndarray, labels: np.ndarray, judge: Callable[[np.ndarray], float]
) -> tuple[np.ndarray, float]:
    """What to add to the logits of each class so that a figure is good, on these images and on others.

    One number is chosen for all classes: the share of the logarithm of a class's frequency that is taken off. A class
    without images stays as it is; so do all if they are equally frequent.

    Args:
        log_probabilities: (images, classes), or logits.
        labels: (images,), classes.
        judge: the figure, the higher the better, of predicted classes (images,).

    Returns:
        (classes,), with mean 0 over the classes that have images, and the share.
    """
    counts = np.bincount(labels, minlength=log_probabilities.shape[1]).astype(np.float64)
    frequency = np.log(np.maximum(counts, 1))
    direction = np.where(counts > 0, frequency[counts > 0].mean() - frequency, 0.0)
    if np.ptp(direction) == 0:
        return direction, 0.0
    figures = np.array([judge((log_probabilities + share * direction).argmax(1)) for share in STRENGTHS])
    padded = np.pad(figures, NEIGHBOURS // 2, mode="edge")
    around = np.convolve(padded, np.full(NEIGHBOURS, 1 / NEIGHBOURS), mode="valid").round(9)
    best = np.flatnonzero(around == around.max())
    share = float(STRENGTHS[best[np.abs(STRENGTHS[best]).argmin()]])
    return share * direction, share


def shift_for_recall(log_probabilities: np.ndarray, labels: np.ndarray, index: int, recall: float) -> np.ndarray:
    """What to add to the logits of each class so that this share of the images of one of them is predicted as it.

    Args:
        log_probabilities: (images, classes), or logits.
        labels: (images,), classes.
        index: the class; if no image has it, nothing is added.
        recall: from 0 to 1; of so many images, rounded up.

    Returns:
        (classes,), zeros but for this class.
    """
    answers = log_probabilities[labels == index]
    shift = np.zeros(log_probabilities.shape[1])
    if len(answers):
        behind = np.sort(np.delete(answers, index, axis=1).max(axis=1) - answers[:, index])
        found = min(max(math.ceil(recall * len(behind) - 1e-9), 1), len(behind))
        # Halfway to the next one, which is not to be found.
        after = behind[found] if found < len(behind) else behind[-1] + 1e-3
        shift[index] = (behind[found - 1] + after) / 2
    return shift
