"""Mean IoU of annotation maps and COCO's average precision, from figures that processes collect apart and then join.

Both metrics are `update`d image by image, wherever that is, and computed once from the `state`s of all processes. The
result depends on neither the number of processes nor the order of the images.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data.dense.annotations import Objects
from ..foundation.errors import UserError
from ..image_processing_dense import IGNORE_INDEX
from .metrics import mean


class SegmentationMetric:
    """Intersection over union per class, as mmsegmentation counts it: over the pixels of all images together.

    Pixels whose true class is 255 are left out. Classes that occur neither in the truth nor in the predictions have no
    IoU (NaN), and the mean leaves them out.
    """

    def __init__(self, num_labels: int):
        self.num_labels = num_labels
        self.counts = np.zeros((num_labels, num_labels), dtype=np.int64)  # true class by predicted class

    def update(self, predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Counts one image: class indices, both (height, width). Returns its own pixels, as `counts` has them."""
        counted = truth != IGNORE_INDEX
        pairs = truth[counted].astype(np.int64) * self.num_labels + predicted[counted]
        counts = np.bincount(pairs, minlength=self.num_labels**2).reshape(self.counts.shape)
        self.counts += counts
        return counts

    def state(self) -> np.ndarray:
        return self.counts

    @staticmethod
    def compute(states: Sequence[np.ndarray]) -> dict[str, Any]:
        """`eval_miou`, `eval_mean_accuracy`, `eval_pixel_accuracy` and `eval_per_class_iou` (a list); and
        `confusion_matrix`, int64 array of pixels, true by predicted class."""
        counts = sum(states)
        correct, true, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
        with np.errstate(invalid="ignore"):
            iou = correct / (true + predicted - correct)
            accuracy = correct / true
        return {
            "eval_miou": mean(iou),
            "eval_mean_accuracy": mean(accuracy),
            "eval_pixel_accuracy": float(correct.sum() / max(counts.sum(), 1)),
            "eval_per_class_iou": iou.tolist(),
            "confusion_matrix": counts,
        }


# Rows of COCOeval's summary that are kept -> the end of their names.
SUMMARY = {0: "map", 1: "map_50", 2: "map_75", 3: "map_small", 4: "map_medium", 5: "map_large", 8: "mar_100"}
# Averages of single classes -> which of COCO's ten IoUs, .50 to .95, they are over.
PER_CLASS = {"per_class_map": slice(None), "per_class_map_50": slice(0, 1), "per_class_map_75": slice(5, 6)}


class DetectionMetric:
    """Average precision as COCO defines and pycocotools computes it, of boxes and, if there are any, of masks.

    Crowds count as in COCO: detections inside them are neither right nor wrong.
    """

    def __init__(self, num_labels: int, with_masks: bool):
        self.num_labels, self.with_masks = num_labels, with_masks
        self.images: list[dict[str, Any]] = []

    def update(
        self,
        key: bytes,
        size: tuple[int, int],
        boxes: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        masks: np.ndarray | None,
        truth: Objects,
    ) -> dict[str, Any]:
        """Counts one image, and returns what it keeps of it.

        Args:
            key: tells it from the others.
            size: (height, width).
            boxes: (D, 4): left, top, right, bottom in pixels.
            scores, labels: (D,).
            masks: bool (D, height, width).
        """
        image = {
            "key": key,
            "size": size,
            "found": described(boxes, labels, masks if self.with_masks else None, scores=scores),
            "truth": described(
                truth.boxes,
                truth.labels,
                truth.masks if self.with_masks else None,
                iscrowd=truth.crowd.astype(int),
                area=truth.areas,
            ),
        }
        self.images.append(image)
        return image

    def state(self) -> dict[str, Any]:
        return {"num_labels": self.num_labels, "with_masks": self.with_masks, "images": self.images}

    @staticmethod
    def compute(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`eval_map` (mean over IoU .50 to .95), `eval_map_50`, `eval_map_75`, `eval_map_small`, `_medium`, `_large`,
        `eval_mar_100`, and `eval_per_class_map`, `_map_50` and `_map_75` (lists); and the same of masks,
        `eval_mask_map`, ... What there is no object for is NaN.

        Raises:
            UserError: pycocotools is missing.
        """
        # Ties between equal scores fall by the order of the images: it must not depend on who saw them first.
        images = sorted((image for state in states for image in state["images"]), key=lambda image: image["key"])
        results = {}
        for kind in ("bbox", "segm") if states[0]["with_masks"] else ("bbox",):
            prefix = "eval_" if kind == "bbox" else "eval_mask_"
            results |= {prefix + name: value for name, value in coco(images, kind, states[0]["num_labels"]).items()}
        return results


def described(
    boxes: np.ndarray, labels: np.ndarray, masks: np.ndarray | None, **columns: np.ndarray
) -> list[dict[str, Any]]:
    """Objects as plain values, masks as run lengths: small enough to be sent between processes."""
    rows = []
    for index, ((left, top, right, bottom), label) in enumerate(
        zip(np.asarray(boxes, dtype=np.float64).tolist(), np.asarray(labels).tolist(), strict=True)
    ):
        row = {"bbox": [left, top, right - left, bottom - top], "category_id": label}
        row |= {name: column[index].item() for name, column in columns.items()}
        if masks is not None:
            row["segmentation"] = pycocotools().mask.encode(np.asfortranarray(masks[index], dtype=np.uint8))
        rows.append(row)
    return rows


def mask_of(row: Mapping[str, Any]) -> np.ndarray:
    """The mask, bool (height, width), of an object as `described` has it."""
    return pycocotools().mask.decode(row["segmentation"]).astype(bool)


def coco(images: Sequence[dict[str, Any]], kind: str, num_labels: int) -> dict[str, Any]:
    """COCOeval over these images; `kind` is `bbox` or `segm`."""
    tools = pycocotools()
    truth, found = [], []
    for number, image in enumerate(images):
        for row in image["truth"]:
            truth.append({**row, "id": len(truth) + 1, "image_id": number})
        for row in image["found"]:
            # With a box beside it, COCO would measure a mask's size by the box.
            kept = {name: value for name, value in row.items() if kind == "bbox" or name != "bbox"}
            kept["score"] = kept.pop("scores")
            found.append({**kept, "image_id": number})
    names = SUMMARY.values()
    if not truth or not found:
        value = float("nan") if not truth else 0.0
        present = {row["category_id"] for row in truth}
        per_class = [0.0 if index in present else float("nan") for index in range(num_labels)]
        return {**dict.fromkeys(names, value), **dict.fromkeys(PER_CLASS, per_class)}
    with contextlib.redirect_stdout(io.StringIO()):  # it tells about its progress
        known = tools.coco.COCO()
        known.dataset = {
            "images": [
                {"id": number, "height": image["size"][0], "width": image["size"][1]}
                for number, image in enumerate(images)
            ],
            "annotations": truth,
            "categories": [{"id": index, "name": str(index)} for index in range(num_labels)],
        }
        known.createIndex()
        evaluation = tools.cocoeval.COCOeval(known, known.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # (IoU, recall, class, size of the objects, number of detections); -1 where a class has no object.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    precision = np.moveaxis(np.where(precision > -1, precision, np.nan), 2, 0)
    values = {name: float(evaluation.stats[row]) for row, name in SUMMARY.items()}
    return {
        **{name: value if value > -1 else float("nan") for name, value in values.items()},
        **{name: [mean(part[which].ravel()) for part in precision] for name, which in PER_CLASS.items()},
    }


def pycocotools() -> Any:
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError as error:
        raise UserError("boxes and masks need pycocotools: pip install 'hf-poolformer[dense]'.") from error
    return pycocotools
