"""What a row says about its image: an annotation map, or objects with boxes and masks. Broken ones say so.

Everything here comes from foreign files, so all of it is checked, and what is wrong raises `BrokenImage`: the image is
then counted and left out like one that does not decode.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ...image_processing_dense import IGNORE_INDEX, decode_segmentation
from ..decoding import MAX_PIXELS, BrokenImage, read_bytes
from ..files import one_line


BOX_FIELDS = ("bbox", "box", "bboxes", "boxes")
CLASS_FIELDS = ("category", "category_id", "label", "labels", "class", "class_label", "categories")
MASK_FIELDS = ("segmentation", "mask", "masks", "segmentations")


# pycocotools turns coordinates into 32-bit integers, unchecked.
MAX_COORDINATE = 1e6


@dataclass(frozen=True)
class ObjectFields:
    """Which fields of an object mean what, and how to read them.

    Attributes:
        bbox_format: `xywh` or `xyxy`, in pixels.
        class_ids: stored class -> index of the model; None where the stored numbers are the indices.
    """

    box: str
    label: str
    mask: str | None
    num_labels: int
    bbox_format: str = "xywh"
    class_ids: Mapping[Any, int] | None = None


@dataclass
class Objects:
    """The objects of one image, in its pixels.

    Attributes:
        boxes: float32 (N, 4): left, top, right, bottom, within the image.
        labels: int64 (N,).
        masks: bool (N, H, W), or None where they are not asked for.
        crowd: bool (N,): boxes around many objects, which neither training nor evaluation tells apart.
        areas: float64 (N,): as annotated, else of the mask, else of the box; COCO's small, medium and large.
    """

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    crowd: np.ndarray
    areas: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    def chosen(self, which: np.ndarray) -> Objects:
        masks = None if self.masks is None else self.masks[which]
        return Objects(self.boxes[which], self.labels[which], masks, self.crowd[which], self.areas[which])


def decode_map(
    source: bytes | str | Mapping[str, Any] | Image.Image | None,
    size: tuple[int, int],
    num_labels: int,
    *,
    reduce_labels: bool = False,
    class_ids: Mapping[int, int] | None = None,
    token: str | bool | None = None,
) -> np.ndarray:
    """An annotation map, uint8 or int32 (height, width) of class indices; 255 belongs to no class.

    Args:
        source: a picture whose values are class indices (grey, 16 bits, or a palette's indices), as the row has it.
        size: (height, width) of the image it belongs to.
        reduce_labels: 0 is no class, the others count from 1.
        class_ids: stored class -> index of the model, after `reduce_labels`; None where these are the same.

    Raises:
        BrokenImage: it does not decode, has another size or more than one channel, or a class outside the range.
    """
    values = _pixels(source, token)
    if values.ndim == 3 and values.shape[2] >= 3 and (values[..., :3] == values[..., :1]).all():
        values = values[..., 0]  # grey, saved as colours
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise BrokenImage("its annotation map has colours or fractions for values, not class indices")
    if values.shape != size:
        raise BrokenImage(
            f"its annotation map is {values.shape[1]}x{values.shape[0]} pixels, but the image {size[1]}x{size[0]}"
        )
    values = values.astype(np.int32)
    ignored = values == IGNORE_INDEX
    if reduce_labels:
        ignored |= values == 0
        values = values - 1
    outside = ~ignored & ((values < 0) | (values >= num_labels))
    if outside.any():
        wrong = int(values[outside][0]) + reduce_labels
        raise BrokenImage(f"its annotation map has the class {wrong}, and there are only {num_labels}")
    if class_ids is not None:
        table = np.array([class_ids[index] for index in range(num_labels)], dtype=np.int32)
        values = table[np.where(ignored, 0, values)]
    values[ignored] = IGNORE_INDEX
    return values


def _pixels(source: Any, token: str | bool | None) -> np.ndarray:
    if isinstance(source, Image.Image):
        return np.asarray(source)
    if isinstance(source, Mapping):
        data = source.get("bytes")
        source = source.get("path") if data is None else data
    if source is None:
        raise BrokenImage("it has no annotation map")
    try:
        data = source if isinstance(source, bytes) else read_bytes(source, token)
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"its annotation map has more than {MAX_PIXELS} pixels")
            return np.asarray(image)
    except BrokenImage:
        raise
    except Exception as error:  # parsers of foreign bytes raise anything at all
        raise BrokenImage(f"its annotation map cannot be read: {one_line(error)}") from None


def decode_objects(value: Any, size: tuple[int, int], fields: ObjectFields, *, with_masks: bool) -> Objects:
    """The objects of a row; those whose box is empty within the image are left out, an image without any is fine.

    Args:
        value: a list of dictionaries, or a dictionary of lists, with the fields of COCO. Masks are polygons, run
            lengths (compressed or not), either of them as JSON text, or pictures.
        size: (height, width) of the image.

    Raises:
        BrokenImage: fields are missing or do not fit each other or the image.
    """
    objects = _as_list(value)
    height, width = size
    boxes, labels, crowd, areas, masks = [], [], [], [], []
    for index, entry in enumerate(objects):
        box = _box(entry.get(fields.box), index, fields.bbox_format)
        box[0::2], box[1::2] = box[0::2].clip(0, width), box[1::2].clip(0, height)
        if not (box[2] > box[0] and box[3] > box[1]):
            continue
        crowd.append(bool(entry.get("iscrowd") or False))
        labels.append(_label(entry.get(fields.label), index, fields))
        boxes.append(box)
        area = (box[2] - box[0]) * (box[3] - box[1])
        if with_masks:
            masks.append(_mask(entry.get(fields.mask), index, size))
            area = masks[-1].sum()
        areas.append(_number(entry.get("area"), area))
    return Objects(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        masks=np.array(masks, dtype=bool).reshape(-1, height, width) if with_masks else None,
        crowd=np.array(crowd, dtype=bool),
        areas=np.array(areas, dtype=np.float64),
    )


def _as_list(value: Any) -> Sequence[Mapping[str, Any]]:
    if value is None:
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BrokenImage("its objects are a text that is not JSON") from None
    if isinstance(value, Mapping):
        columns = {name: column for name, column in value.items() if isinstance(column, (list, tuple, np.ndarray))}
        if len({len(column) for column in columns.values()}) > 1:
            counts = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
            raise BrokenImage(f"the fields of its objects are not equally long: {counts}")
        value = [dict(zip(columns, entry, strict=True)) for entry in zip(*columns.values(), strict=True)]
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in value):
        raise BrokenImage("its objects are not a list of dictionaries")
    return value


def _box(value: Any, index: int, bbox_format: str) -> np.ndarray:
    try:
        box = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise BrokenImage(f"the box of its object {index} is not made of numbers") from None
    if box.shape != (4,) or not np.isfinite(box).all():
        raise BrokenImage(f"the box of its object {index} is not four finite numbers")
    if bbox_format == "xywh":
        box[2:] += box[:2]
    if box[2] < box[0] or box[3] < box[1]:
        raise BrokenImage(f"the box of its object {index} has a negative size: is --bbox_format right?")
    return box


def _label(value: Any, index: int, fields: ObjectFields) -> int:
    if fields.class_ids is not None:
        label = fields.class_ids.get(value.strip() if isinstance(value, str) else value)
    else:
        label = value if isinstance(value, (int, np.integer)) and 0 <= value < fields.num_labels else None
    if label is None:
        raise BrokenImage(f"the class of its object {index}, {value!r}, is none of the {fields.num_labels} known ones")
    return int(label)


def _number(value: Any, default: float) -> float:
    usable = isinstance(value, (int, float)) and np.isfinite(value) and value > 0
    return float(value if usable else default)


def _mask(value: Any, index: int, size: tuple[int, int]) -> np.ndarray:
    try:
        if isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, Mapping) and ("path" in value or "bytes" in value):
            value = _pixels(value, None)
        if isinstance(value, Mapping):
            check_runs(value, size)
        elif isinstance(value, (list, tuple)):
            # A polygon of fewer than three corners encloses nothing; COCO has a few of them among good ones.
            value = [polygon for polygon in value if len(polygon) >= 6]
            if not value:
                return np.zeros(size, dtype=bool)
            corners = np.concatenate([np.asarray(polygon, dtype=np.float64) for polygon in value])
            if not (np.abs(corners) <= MAX_COORDINATE).all():
                raise BrokenImage(f"the mask of its object {index} has a corner far outside the image")
        return decode_segmentation(value, *size)
    except (BrokenImage, ImportError):
        raise
    except Exception as error:  # whatever run lengths and polygons out of a foreign file provoke
        raise BrokenImage(f"the mask of its object {index} cannot be read: {one_line(error)}") from None


def check_runs(value: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Raises BrokenImage unless run lengths cover an image of this size exactly.

    pycocotools does not check: what they leave uncovered would be whatever the memory held.
    """
    if list(value["size"]) != list(size):
        raise BrokenImage(f"a mask of an object is for another size, {list(value['size'])} instead of {list(size)}")
    counts = value["counts"]
    runs = uncompressed(counts) if isinstance(counts, (str, bytes)) else [int(run) for run in counts]
    if any(run < 0 for run in runs) or sum(runs) != size[0] * size[1]:
        raise BrokenImage("the run lengths of an object's mask do not cover its image")


def uncompressed(counts: str | bytes) -> list[int]:
    """COCO's compressed run lengths as numbers: five bits to a character, the lowest first; from the fourth on, each
    number is the difference to the one two before it."""
    runs: list[int] = []
    number = shift = 0
    for character in counts.encode() if isinstance(counts, str) else counts:
        bits = character - 48
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                number -= 1 << shift
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    return runs
