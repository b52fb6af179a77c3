"""The rows of an evaluation of a segmenter or detector: of each image how well it went, and which errors it has.

`images.parquet` of a report has a row for each image, as that of classifiers does (`rows.py`): `path`, `split` and
`position`, `width` and `height`; then

    maps      iou (mean over the classes that occur in the image or are found in it), pixel_accuracy, and of each of
              these classes: classes (index), true_pixels, predicted_pixels, correct_pixels
    objects   how many there are (objects) and were found (detections, those with a score of at least `threshold`); of
              these how many are right, and how many of each kind of ERRORS; missed; f1; cost; of each object
              true_labels, true_areas; of each detection, whatever its score: scores, labels, boxes (left, top, width,
              height), kinds

Errors of detectors are told apart as TIDE does (arXiv 2008.08115): by the IoU with the objects of the same class and
of the others. Objects are matched as COCO does at an IoU of 0.5, the detections of the highest scores first.
"""

from __future__ import annotations

import abc
import heapq
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.loader import ImageLoader, Origin
from ..data.pictures_again import first_positions
from ..foundation.errors import UserError, one_line
from ..foundation.names import undecodable_escaped
from ..foundation.strict_json import finite_or_none, to_json
from .dense_metrics import pycocotools
from .dense_pictures import as_seen, nearest
from .intervals import middle, resamples
from .metrics import SMALL_TEST_SET, mean
from .rows import KEY, path_of


if TYPE_CHECKING:
    from .dense import EvaluatedImage


WORST = 16  # images that are kept for pictures
SIDE = 320  # longest side of such a picture, in pixels

# From this IoU on a detection is right; below that one it is beside every object.
RIGHT_IOU, BESIDE_IOU = 0.5, 0.1
# What a detection can be; IGNORED: of a crowd.
RIGHT, IGNORED = "right", "ignored"
PLACE, CLASS, BOTH, TWICE, BACKGROUND = ERRORS = (
    "badly_placed",
    "wrong_class",
    "wrong_class_and_place",
    "duplicate",
    "background",
)


@dataclass
class Shown:
    """An image among the worst, small, for a picture.

    Attributes:
        badness: how bad; the larger the worse.
        place: of its row, shard and number in it: of those that are equally bad, the first comes first.
        picture: uint8 (h, w, 3).
        truth, found: class indices (h, w), or objects as `dense_metrics.described` has them, in the pixels of the
            image of `size` (height, width).
    """

    badness: float
    place: tuple[int, int]
    picture: np.ndarray
    size: tuple[int, int]
    truth: Any
    found: Any

    def __lt__(self, other: Shown) -> bool:
        return (self.badness, *(-number for number in self.place)) < (
            other.badness,
            *(-number for number in other.place),
        )


class DenseRows(abc.ABC):
    """The rows of one process, and its worst images.

    Args:
        processor: what made the images that the model saw.
        keep: how many of the worst images to keep.
    """

    def __init__(self, processor: Any, keep: int = WORST):
        self.colours = processor.image_mean, processor.image_std
        self.keep = keep
        self.rows: list[dict[str, Any]] = []
        self.worst: list[Shown] = []  # a heap, the least bad first

    def add(self, origin: Origin, example: EvaluatedImage, counted: Any) -> None:
        """One image.

        Args:
            origin: of its row.
            counted: what the judge counted of it: see `SegmentationMetric.update` and `DetectionMetric.update`.
        """
        height, width = example.truth.size
        row, badness = self.row(counted)
        self.rows.append({"origin": origin, "width": width, "height": height, **row})
        full = len(self.worst) == self.keep
        if not badness > 0 or not self.keep or (full and badness < self.worst[0].badness):
            return
        picture = as_seen(example, *self.colours, longest=SIDE)
        place, size = (origin.shard, origin.index), example.truth.size
        shown = Shown(badness, place, picture, size, *self.parts(example, counted, picture.shape[:2]))
        (heapq.heappushpop if full else heapq.heappush)(self.worst, shown)

    @abc.abstractmethod
    def row(self, counted: Any) -> tuple[dict[str, Any], float]:
        """The columns of an image, and how bad it is."""

    @abc.abstractmethod
    def parts(self, example: EvaluatedImage, counted: Any, size: tuple[int, int]) -> tuple[Any, Any]:
        """Truth and what was found, for a picture of this size."""

    def state(self, loader: ImageLoader) -> dict[str, Any]:
        """What `joined` takes of each process, after it has read the loader; can be pickled."""
        return {"rows": self.rows, "worst": self.worst, "broken": loader.broken, "ends": loader.ends}


def joined(
    states: Sequence[Mapping[str, Any]], num_shards: int, *, where: str, split: str, by_name: bool, keep: int = WORST
) -> tuple[list[dict[str, Any]], list[Shown], list[dict[str, Any]]]:
    """The rows of all processes by position, the worst images among theirs, the worst first, and those that are broken
    (`path`, `split`, `position`, `error`); the same whoever saw which.

    Args:
        num_shards: of the dataset.
        where, by_name: as `rows.path_of` takes them.
    """
    starts = first_positions(num_shards, [state["ends"] for state in states] or [{}])

    def placed(origin: Origin) -> dict[str, Any]:
        position = starts[origin.shard] + origin.index
        return {
            "path": path_of(where, origin.name, origin.is_file, position, by_name),
            "split": split,
            "position": position,
        }

    rows = [{**placed(row["origin"]), "place": row["origin"][:2], **row} for state in states for row in state["rows"]]
    broken = [
        {**placed(origin), "error": undecodable_escaped(origin.error)}
        for state in states
        for origin in state["broken"]
    ]
    worst = heapq.nlargest(keep, (shown for state in states for shown in state["worst"]))
    position = operator.itemgetter("position")
    return sorted(rows, key=position), worst, sorted(broken, key=position)


class MapRows(DenseRows):
    """Of annotation maps. Bad is what the IoU lacks to 1."""

    def row(self, counted: np.ndarray) -> tuple[dict[str, Any], float]:
        correct, true, predicted = counted.diagonal(), counted.sum(axis=1), counted.sum(axis=0)
        present = np.flatnonzero(true + predicted)
        correct, true, predicted = correct[present], true[present], predicted[present]
        iou = mean(correct / (true + predicted - correct)) if len(present) else float("nan")
        row = {
            "iou": float(iou),
            "pixel_accuracy": float(correct.sum() / true.sum()) if len(present) else float("nan"),
            "classes": present.astype(np.int32),
            "true_pixels": true,
            "predicted_pixels": predicted,
            "correct_pixels": correct,
        }
        return row, 1 - row["iou"]

    def parts(self, example: EvaluatedImage, counted: Any, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        return nearest(example.truth.map, size), nearest(example.found, size)


class ObjectRows(DenseRows):
    """Of boxes, or of masks where the judge has counted masks.

    How bad an image is, its `cost`, does not depend on a threshold: each wrong detection costs its score, and each
    object what its detection's score lacks to 1.
    """

    def row(self, counted: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        found, truth = counted["found"], counted["truth"]
        kinds, objects = kinds_of(truth, found)
        scores = np.array([part["scores"] for part in found], dtype=np.float32)
        single = [index for index, part in enumerate(truth) if not part["iscrowd"]]
        places = {index: place for place, index in enumerate(single)}
        got = sum(float(score) for score, kind in zip(scores, kinds, strict=True) if kind == RIGHT)
        wrong = sum(float(score) for score, kind in zip(scores, kinds, strict=True) if kind in ERRORS)
        row = {
            "objects": len(single),
            "true_labels": np.array([truth[index]["category_id"] for index in single], dtype=np.int32),
            "true_areas": np.array([truth[index]["area"] for index in single], dtype=np.float64),
            "scores": scores,
            "labels": np.array([part["category_id"] for part in found], dtype=np.int32),
            "boxes": [part["bbox"] for part in found],
            "kinds": kinds,
            "of": np.array([places.get(index, -1) for index in objects], dtype=np.int32),
            "cost": len(single) - got + wrong,
        }
        return row, row["cost"]

    def parts(self, example: EvaluatedImage, counted: Any, size: tuple[int, int]) -> tuple[list, list]:
        return counted["truth"], counted["found"]


def kinds_of(truth: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[int]]:
    """What each detection is, and the object that it is about, -1 for none; no threshold changes either.

    Args:
        truth, found: as `dense_metrics.described` has them; with masks their IoU counts, else that of the boxes.
    """
    scores = np.array([part["scores"] for part in found])
    kinds, objects = [BACKGROUND] * len(found), [-1] * len(found)
    if not truth or not found:
        return kinds, objects
    crowd = np.array([bool(part["iscrowd"]) for part in truth])
    shape = "segmentation" if "segmentation" in found[0] else "bbox"
    # Of a crowd it is the part of the detection that lies in it.
    overlaps = pycocotools().mask.iou(
        *([part[shape] for part in parts] for parts in (found, truth)), crowd.astype(int).tolist()
    )
    same = np.array([[a["category_id"] == b["category_id"] for b in truth] for a in found])
    free = ~crowd
    for index in np.argsort(-scores, kind="stable").tolist():
        iou, own, others = overlaps[index], same[index] & ~crowd, ~same[index] & ~crowd
        best = best_of(iou, own & free)
        if best >= 0 and iou[best] >= RIGHT_IOU:
            kinds[index], objects[index] = RIGHT, best
            free[best] = False
            continue
        if (iou[same[index] & crowd] >= RIGHT_IOU).any():
            kinds[index] = IGNORED
            continue
        near, other = best_of(iou, own), best_of(iou, others)
        of_own, of_other = (iou[place] if place >= 0 else 0.0 for place in (near, other))
        if BESIDE_IOU <= of_own < RIGHT_IOU:
            kinds[index], objects[index] = PLACE, near
        elif of_other >= RIGHT_IOU:
            kinds[index], objects[index] = CLASS, other
        elif of_own >= RIGHT_IOU:
            kinds[index], objects[index] = TWICE, near
        elif of_other >= BESIDE_IOU:
            kinds[index], objects[index] = BOTH, other
    return kinds, objects


def best_of(iou: np.ndarray, which: np.ndarray) -> int:
    """The place of the largest among some, of equal ones the last, as in COCO; -1 if there is none."""
    places = np.flatnonzero(which)
    return int(places[len(places) - 1 - iou[places][::-1].argmax()]) if len(places) else -1


@dataclass(frozen=True)
class Curve:
    """Precision, recall and F1 of all classes together at each score as the threshold, the highest score first.

    Attributes:
        thresholds, precision, recall, f1: (scores,); empty where nothing was found, or there is nothing to find.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray

    @property
    def best(self) -> float | None:
        """The threshold with the best F1, of several the highest; None where there is none."""
        return float(self.thresholds[self.f1.argmax()]) if len(self.thresholds) else None


def curve_of(rows: Sequence[Mapping[str, Any]]) -> Curve:
    objects = sum(row["objects"] for row in rows)
    scores = np.concatenate([row["scores"] for row in rows] or [np.zeros(0, np.float32)])
    kinds = np.array([kind for row in rows for kind in row["kinds"]], dtype=object)
    counted = kinds != IGNORED
    scores, right = scores[counted], kinds[counted] == RIGHT
    if not objects or not len(scores):
        return Curve(*np.zeros((4, 0)))
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(right[order])
    last = np.append(scores[:-1] != scores[1:], True)  # equal scores cannot be told apart
    hits, taken = hits[last], np.flatnonzero(last) + 1
    return Curve(scores[last].astype(np.float64), hits / taken, hits / objects, 2 * hits / (taken + objects))


def at_threshold(row: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The numbers of an image whose detections from a score on count.

    An object is missed where no detection is right, badly placed or only of the wrong class for it.
    """
    kinds = [kind if score >= threshold else None for kind, score in zip(row["kinds"], row["scores"], strict=True)]
    counts = {kind: kinds.count(kind) for kind in (RIGHT, *ERRORS)}
    near = {int(of) for kind, of in zip(kinds, row["of"], strict=True) if kind in (RIGHT, PLACE, CLASS)}
    total = sum(counts.values())
    both = row["objects"] + total
    return {
        "detections": total,
        **counts,
        "missed": row["objects"] - len(near),
        "f1": 2 * counts[RIGHT] / both if both else float("nan"),
    }


def mean_iou_intervals(rows: Sequence[Mapping[str, Any]], num_labels: int) -> dict[str, Any]:
    """95 % intervals of the mean IoU, of the pixel accuracy and of each class's IoU: a bootstrap over the images.

    Returns:
        `eval_miou` and `eval_pixel_accuracy` -> (low, high), and `eval_per_class_iou`, a list of those; nothing where
        there are many images, for which they would say little.
    """
    if not 0 < len(rows) < SMALL_TEST_SET:
        return {}
    correct, true, predicted = (np.zeros((len(rows), num_labels)) for _ in range(3))
    for index, row in enumerate(rows):
        correct[index, row["classes"]] = row["correct_pixels"]
        true[index, row["classes"]] = row["true_pixels"]
        predicted[index, row["classes"]] = row["predicted_pixels"]
    ious, accuracies = [], []
    for weights in resamples(len(rows)):
        hits, truth, found = (weights.T @ pixels for pixels in (correct, true, predicted))
        with np.errstate(invalid="ignore"):
            ious.append(hits / (truth + found - hits))
            accuracies.append(hits.sum(-1) / truth.sum(-1))
    iou = np.concatenate(ious)

    def pairs(values: np.ndarray) -> list[tuple[float, float]]:
        return [(float(low), float(high)) for low, high in zip(*map(np.atleast_1d, middle(values)), strict=True)]

    return {
        "eval_miou": pairs(mean(iou))[0],
        "eval_pixel_accuracy": pairs(np.concatenate(accuracies))[0],
        "eval_per_class_iou": pairs(iou),
    }


PLACES = {
    "path": pa.string(),
    "split": pa.string(),
    "position": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
}
COUNTS = ("objects", "detections", RIGHT, *ERRORS, "missed")
COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "map": {
        "iou": pa.float64(),
        "pixel_accuracy": pa.float64(),
        "classes": pa.list_(pa.int32()),
        "true_pixels": pa.list_(pa.int64()),
        "predicted_pixels": pa.list_(pa.int64()),
        "correct_pixels": pa.list_(pa.int64()),
    },
    "objects": {
        **dict.fromkeys(COUNTS, pa.int32()),
        "f1": pa.float64(),
        "cost": pa.float64(),
        "true_labels": pa.list_(pa.int32()),
        "true_areas": pa.list_(pa.float64()),
        "scores": pa.list_(pa.float32()),
        "labels": pa.list_(pa.int32()),
        "boxes": pa.list_(pa.list_(pa.float32(), 4)),
        "kinds": pa.list_(pa.string()),
    },
}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], gives: str, about: Mapping[str, Any]) -> None:
    """Writes the Parquet file.

    Args:
        gives: as the row of the task says: `map` or `objects`.
        about: what all rows share, written into the file's metadata as JSON.

    Raises:
        UserError: it cannot be written.
    """
    columns = {**PLACES, **COLUMNS[gives]}
    schema = pa.schema(list(columns.items()), {KEY: to_json(about)})
    # What there is nothing to tell of is null.
    values = {name: [finite_or_none(row[name]) for row in rows] for name in columns}
    try:
        pq.write_table(pa.table(values, schema=schema), path)
    except OSError as error:
        raise UserError(f"the rows cannot be written to {path.parent}: {one_line(error)}") from error
