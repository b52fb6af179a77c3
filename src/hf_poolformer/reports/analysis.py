"""What an evaluation's rows say besides its figures: calibration, confusions, doubtful images, thresholds.

Numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.intervals import wilson


BINS = 15  # of the reliability diagram, those of the calibration error
# Between two classes: what both have together at least, and by how much one may be ahead.
TORN_TOGETHER, TORN_MARGIN = 0.8, 0.1
THRESHOLDS = np.linspace(0, 1, 101)
# Numbers that are looked at for a temperature: it does not change behind its second digit with more.
MOST_FITTED = 2**20
# Labels among which confusions are counted: a matrix of 2 MB.
MOST_CONFUSED_LABELS = 512
RANGES = 5  # of a target, with as many images each


def confused_pairs(labels: np.ndarray, predicted: np.ndarray, classes: int) -> list[tuple[int, int, int]]:
    """(label, prediction, images) of every pair that was confused, the most frequent first; no matrix is needed."""
    wrong = labels != predicted
    pairs, counts = np.unique(labels[wrong].astype(np.int64) * classes + predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(*divmod(int(pairs[index]), classes), int(counts[index])) for index in order]


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Images, (classes, classes): labels by predictions."""
    counts = np.bincount(labels.astype(np.int64) * classes + predicted, minlength=classes**2)
    return counts.reshape(classes, classes)


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """How many are right of the images of which the model says so many are: a row for each bin with images in it.

    Args:
        confidence: (images,), the probability of the prediction.
        right: bool (images,), whether it is the label.
    """
    confidence = confidence.astype(np.float64)
    bins = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(int)
    counts, hits, sums = (np.bincount(bins, weights, minlength=BINS) for weights in (None, right, confidence))
    low, high = wilson(hits, counts)
    return [
        {
            "from": index / BINS,
            "to": (index + 1) / BINS,
            "images": int(counts[index]),
            "confidence": float(sums[index] / counts[index]),
            "right": float(hits[index] / counts[index]),
            "right_interval": [float(low[index]), float(high[index])],
        }
        for index in np.flatnonzero(counts)
    ]


def calibration_error(rows: Sequence[dict[str, Any]]) -> float:
    """The expected one, of `reliability`: as the evaluation gives it."""
    images = sum(row["images"] for row in rows)
    return sum(abs(row["right"] - row["confidence"]) * row["images"] for row in rows) / images


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities.astype(np.float64), 1e-12))


def at_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of the logits divided by a temperature (Guo et al., arXiv 1706.04599)."""
    logits = log_probabilities(probabilities) / temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def best_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the least cross-entropy on these images, from 0.05 to 20: above 1 the model is too sure.

    Of more than MOST_FITTED probabilities, evenly taken images are looked at.
    """
    images, classes = probabilities.shape
    taken = np.linspace(0, images - 1, min(images, max(MOST_FITTED // classes, 1))).astype(int)
    logits = log_probabilities(probabilities[taken])
    logits -= logits.max(1, keepdims=True)
    own = logits[np.arange(len(taken)), labels[taken]]

    def loss(log_beta: float) -> float:
        beta = np.exp(log_beta)
        return float((np.log(np.exp(beta * logits).sum(1)) - beta * own).mean())

    # Golden section: convex in the reciprocal temperature, hence with one minimum in its logarithm.
    low, high = -np.log(20), np.log(20)
    ratio = (np.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(20):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    return float(np.exp(-(low + high) / 2))


@dataclass(frozen=True)
class Ambiguous:
    """Images between two classes, those first that are the most so.

    Attributes:
        images: numbers of the images.
        first, second: their classes, the more probable first.
        shares: (images, 2), the probabilities of both.
    """

    images: np.ndarray
    first: np.ndarray
    second: np.ndarray
    shares: np.ndarray


def ambiguous_images(probabilities: np.ndarray, labels: np.ndarray) -> Ambiguous:
    """Images of which the model says: one of these two, and I cannot tell which; and the label is one of them.

    Two classes have TORN_TOGETHER of the probability between them, and neither leads by more than TORN_MARGIN. An
    image whose label is a third class is no image between two, but a matter for the label errors. First comes the one
    whose second class is the most probable.
    """
    classes = probabilities.shape[1]
    if classes < 2:
        nothing = np.zeros(0, dtype=int)
        return Ambiguous(nothing, nothing, nothing, np.zeros((0, 2)))
    best = np.argpartition(probabilities, classes - 2, axis=1)[:, -2:]
    shares = np.take_along_axis(probabilities, best, axis=1).astype(np.float64)
    swapped = shares[:, 0] < shares[:, 1]
    best[swapped], shares[swapped] = best[swapped][:, ::-1], shares[swapped][:, ::-1]
    torn = (shares.sum(1) >= TORN_TOGETHER) & (shares[:, 0] - shares[:, 1] <= TORN_MARGIN)
    torn &= (best == labels[:, None]).any(1)
    found = np.flatnonzero(torn)
    found = found[np.argsort(-shares[found, 1], kind="stable")]
    return Ambiguous(found, best[found, 0], best[found, 1], shares[found])


def threshold_curves(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each label at THRESHOLDS: (labels, thresholds); NaN where they are of nothing.

    Also `predicted`, how many images reach each threshold.
    """
    labels = probabilities.shape[1]
    predicted, hits = np.zeros((2, labels, len(THRESHOLDS)))
    for label in range(labels):
        scores, has = probabilities[:, label], targets[:, label].astype(bool)
        # A probability that is the threshold reaches it, though it be stored in half as many digits.
        thresholds = THRESHOLDS.astype(scores.dtype)
        predicted[label] = len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")
        hits[label] = has.sum() - np.searchsorted(np.sort(scores[has]), thresholds, side="left")
    have = targets.sum(0, dtype=np.int64)[:, None]
    with np.errstate(invalid="ignore"):
        return {
            "precision": hits / predicted,
            "recall": hits / have,
            "f1": 2 * hits / (predicted + have),
            "predicted": predicted,
        }


def confused_labels(targets: np.ndarray, predicted: np.ndarray) -> list[tuple[int, int, int, float]]:
    """(missed, extra, images, expected) of pairs of labels: an image had the one and was given the other.

    Expected is how many images that would be if the two mistakes had nothing to do with each other. The most frequent
    first, those with more images than expected; of many labels those with the most mistakes.
    """
    missed = (targets > 0) & (predicted == 0)
    extra = (targets == 0) & (predicted > 0)
    mistakes = missed.sum(0) + extra.sum(0)
    kept = np.argsort(-mistakes, kind="stable")[:MOST_CONFUSED_LABELS]
    missed, extra = missed[:, kept].astype(np.float32), extra[:, kept].astype(np.float32)
    together = missed.T @ extra
    expected = np.outer(missed.sum(0), extra.sum(0)) / max(len(targets), 1)
    rows, columns = np.nonzero((together > 0) & (together > expected))
    found = [
        (int(kept[row]), int(kept[column]), int(together[row, column]), float(expected[row, column]))
        for row, column in zip(rows, columns, strict=True)
    ]
    return sorted(found, key=lambda pair: (-pair[2], pair[3]))


def number_figures(answers: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Of one target (images,): `mae`, `rmse`, `bias` (by how much answers are too large) and `r2`, NaN where the
    target is constant."""
    errors = answers.astype(np.float64) - targets
    spread = float(np.var(targets.astype(np.float64))) if np.ptp(targets) > 0 else np.nan
    squared = float((errors**2).mean())
    return {
        "mae": float(np.abs(errors).mean()),
        "rmse": float(np.sqrt(squared)),
        "bias": float(errors.mean()),
        "r2": 1 - squared / spread,
    }


def target_ranges(targets: np.ndarray) -> list[np.ndarray]:
    """The images (their numbers) of each of RANGES ranges of a target, with as many in each, equal ones together."""
    bounds = np.unique(np.quantile(targets, np.arange(1, RANGES) / RANGES, method="lower"))
    codes = np.searchsorted(bounds, targets, side="left")
    return [np.flatnonzero(codes == code) for code in np.unique(codes)]
