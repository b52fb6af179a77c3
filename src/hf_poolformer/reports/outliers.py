"""Images that look more like another class than like their own, by the features of a model.

Each class has a centre, the mean direction of the features of its training images. An image's margin is how much more
alike it is to its own class's centre than to that of any other. Images count as outliers where that margin is negative
and far below what is usual in their class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from .measures import Extremes, Place, by_split, class_indices, lists


# How many times the usual spread (1.4826 median absolute deviations) a margin lies below the class's median.
FAR = 3.5
# Fewer images of a class in a split say nothing of the class.
_ENOUGH = 5
# Classes beyond which pairs of them are not compared.
_MOST_CLASSES = 2000
SHOWN = 24
# Images at once times classes.
_COSINES = 1 << 22
COLUMNS = ("path", "split", "position", "label", "embedding")


@dataclass
class Outliers:
    """
    Attributes:
        count: images that count as outliers.
        worst: the farthest of them: (how much more alike to the other class, image, "labelled A, looks like B").
        strangers: (split, class, the class of the training split that its images look like instead, how many).
        twins: (class, class, cosine of their centres), the most alike first.
    """

    count: int = 0
    worst: Extremes = field(default_factory=lambda: Extremes(SHOWN))
    strangers: list[tuple[str, str, str, int]] = field(default_factory=list)
    twins: list[tuple[str, str, float]] = field(default_factory=list)


def find_outliers(
    batches: Callable[[Sequence[str]], Iterator[pa.RecordBatch]], names: Sequence[str], train: str, size: int
) -> Outliers:
    """
    Args:
        batches: rows of a scan with some columns, as often as it is called.
        names: of the classes.
        train: the split whose images say what a class looks like.
        size: of an embedding.
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for split, vectors, labels, _ in _vectors(batches, names, size):
        if split not in sums:
            sums[split], counts[split] = np.zeros((len(names), size), np.float32), np.zeros(len(names), np.int64)
        np.add.at(sums[split], labels, vectors)
        counts[split] += np.bincount(labels, minlength=len(names))
    found = Outliers()
    if train not in sums or (counts[train] > 0).sum() < 2:
        return found
    centres = _unit(sums[train])
    there = np.flatnonzero(counts[train])
    margins: list[np.ndarray] = []
    classes: list[np.ndarray] = []
    for split, vectors, labels, _ in _vectors(batches, names, size):
        if split == train:
            margins.append(_margins(vectors, labels, centres, there)[0])
            classes.append(labels)
    limits = _limits(np.concatenate(margins), np.concatenate(classes), len(names))
    for _, vectors, labels, rows in _vectors(batches, names, size):
        margin, other = _margins(vectors, labels, centres, there)
        far = margin < limits[labels]
        found.count += int(far.sum())

        def image(index: int, rows=rows, labels=labels, other=other) -> tuple[Place, str]:
            place = Place(*(rows[name][index].as_py() for name in ("split", "position", "path")))
            return place, f"labelled {names[labels[index]]}, looks like {names[other[index]]}"

        found.worst.add(np.where(far, -margin, np.nan), image)
    for split, total in sums.items():
        if split == train:
            continue
        enough = np.flatnonzero(counts[split] >= _ENOUGH)
        nearest = there[(_unit(total[enough]) @ centres[there].T).argmax(1)] if len(enough) else enough
        found.strangers += [
            (split, names[index], names[near], int(counts[split][index]))
            for index, near in zip(enough, nearest, strict=True)
            if near != index and counts[train][index] >= _ENOUGH
        ]
    if len(there) <= _MOST_CLASSES:
        alike = np.triu(centres[there] @ centres[there].T, 1)
        best = np.argsort(-alike, axis=None)[: min(10, len(there) * (len(there) - 1) // 2)]
        for first, second in zip(*np.unravel_index(best, alike.shape), strict=True):
            found.twins.append((names[there[first]], names[there[second]], float(alike[first, second])))
    return found


def _vectors(
    batches: Callable[[Sequence[str]], Iterator[pa.RecordBatch]], names: Sequence[str], size: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray, pa.RecordBatch]]:
    """Split, features of length 1 (rows, size), classes (rows,), and the rows; of images with a label."""
    rows = max(_COSINES // len(names), 1)
    for batch in batches(COLUMNS):
        pieces = (batch.slice(first, rows) for first in range(0, len(batch), rows))
        for part in (part for piece in pieces for part in by_split(piece)):
            labels = class_indices(part, names)
            usable = (labels >= 0) & part["embedding"].is_valid().to_numpy(zero_copy_only=False)
            if usable.any():
                part = part.filter(pa.array(usable))
                vectors = _unit(lists(part["embedding"], size).astype(np.float32))
                yield part["split"][0].as_py(), vectors, labels[usable], part


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _margins(
    vectors: np.ndarray, labels: np.ndarray, centres: np.ndarray, there: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each image how much more alike it is to its own class than to the most alike other one, and which that is."""
    alike = vectors @ centres.T
    own = alike[np.arange(len(labels)), labels]
    others = np.full_like(alike, -np.inf)
    others[:, there] = alike[:, there]
    others[np.arange(len(labels)), labels] = -np.inf
    return own - others.max(1), others.argmax(1)


def _limits(margins: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Of each class the margin below which an image is an outlier; never above 0."""
    limits = np.zeros(classes)
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(classes + 1))
    for index in range(classes):
        own = margins[order[starts[index] : starts[index + 1]]]
        if len(own):
            median = np.median(own)
            limits[index] = min(0.0, median - FAR * 1.4826 * np.median(np.abs(own - median)))
    return limits
