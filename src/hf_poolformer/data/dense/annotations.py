"""What a row says about its image: an annotation map, or objects with boxes and masks. Broken ones say so.

Everything here comes from foreign files, so all of it is checked, and what is wrong raises `BrokenImage`: the image is
then counted and left out like one that does not decode.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
from PIL import Image

from ...foundation.errors import one_line
from ...image_processing_dense import IGNORE_INDEX, decode_segmentation
from ..classes import Classes, UnknownClass, is_number
from ..decoding import MAX_PIXELS, TURNS, BrokenImage, orientation_of, read_bytes


BOX_FIELDS = ("bbox", "box", "bboxes", "boxes")
CLASS_FIELDS = ("category", "category_id", "label", "labels", "class", "class_label", "categories")
MASK_FIELDS = ("segmentation", "mask", "masks", "segmentations")
CROWD_FIELD = "iscrowd"
# (height, width) of the image, as its row may give them.
SIZE_FIELDS = (("height", "width"), ("image_height", "image_width"), ("img_height", "img_width"))

# pycocotools turns coordinates into 32-bit integers, unchecked.
MAX_COORDINATE = 1e6

# Why objects are left out, as `decode_objects` counts them.
EMPTY_BOX, NO_CLASS, EMPTY_MASK = "without area within the image", "without a class", "with a mask of no pixel"

# EXIF's orientations: after rows and columns are exchanged (from 5 on), whether left and right, top and bottom are.
_FLIPS = {1: "", 2: "x", 3: "xy", 4: "y", 5: "", 6: "x", 7: "xy", 8: "y"}
_WORDS = {"": False, "nan": False, "false": False, "no": False, "true": True, "yes": True}


@dataclass(frozen=True)
class ObjectFields:
    """Which fields of an object mean what, and how to read them.

    Attributes:
        bbox_format: `xywh` or `cxcywh` (from its centre) or `xyxy`, in pixels.
    """

    box: str
    label: str
    mask: str | None
    classes: Classes
    bbox_format: str = "xywh"


@dataclass(frozen=True)
class Frame:
    """The pixels of an image, and which of them annotations count: those of the upright image, or those of the image
    as it is stored, before EXIF turns it.

    Attributes:
        size: (height, width) of the upright image.
        orientation: EXIF's, 1 to 8.
        said: (height, width) that the row gives for its image, if it does.
        in_stored: what annotations count where their size does not tell; see `told_by_size`.
        told_by_size: whether their size decides where it can.
    """

    size: tuple[int, int]
    orientation: int = 1
    said: tuple[int, int] | None = None
    in_stored: bool = True
    told_by_size: bool = True

    @property
    def stored_size(self) -> tuple[int, int]:
        height, width = self.size
        return (width, height) if self.orientation >= 5 else (height, width)

    def told(self, size: tuple[int, int] | None) -> bool | None:
        """Whether annotations for an image of this size count stored pixels; None if that cannot be told."""
        if self.orientation == 1 or size is None or self.size == self.stored_size:
            return None
        return {self.stored_size: True, self.size: False}.get(size)

    def turn(self, size: tuple[int, int] | None) -> int:
        """The orientation by which annotations for an image of this size have to be turned; 1 for not at all."""
        told = self.told(size) if self.told_by_size else None
        return self.orientation if (self.in_stored if told is None else told) else 1


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


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (..., height, width) of a stored image, upright."""
    if orientation >= 5:
        values = values.swapaxes(-1, -2)
    if "x" in _FLIPS[orientation]:
        values = values[..., ::-1]
    if "y" in _FLIPS[orientation]:
        values = values[..., ::-1, :]
    return np.ascontiguousarray(values)


def turned_boxes(boxes: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Boxes (N, 4), left, top, right, bottom, in the stored image, in the upright one of this size."""
    left, top, right, bottom = boxes.T
    if orientation >= 5:
        left, top, right, bottom = top, left, bottom, right
    height, width = size
    if "x" in _FLIPS[orientation]:
        left, right = width - right, width - left
    if "y" in _FLIPS[orientation]:
        top, bottom = height - bottom, height - top
    return np.stack([left, top, right, bottom], axis=1)


def value_table(classes: Classes, reduce_labels: bool = False) -> np.ndarray:
    """For annotation maps: the class of each stored value, int32 (N,); -1 where there is none.

    255 stands for pixels without a class unless a class is stored as that. The last but one element is for larger
    values, the last for negative ones.

    Args:
        reduce_labels: 0 is no class either, and what is stored is larger by one than the classes' table says.
    """
    values = {int(key) + reduce_labels: index for key, index in classes.table.items() if is_number(key)}
    table = np.full(max([257, *values]) + 3, -1, dtype=np.int32)
    table[-1] = table[IGNORE_INDEX] = IGNORE_INDEX
    if reduce_labels:
        table[0] = IGNORE_INDEX
    for value, index in values.items():
        if value >= 0:
            table[value] = index
    return table


def decode_map(
    source: bytes | str | Mapping[str, Any] | Image.Image | None,
    frame: Frame,
    table: np.ndarray,
    *,
    token: str | bool | None = None,
) -> np.ndarray:
    """An annotation map, int32 (height, width) of class indices, upright; 255 belongs to no class.

    Args:
        source: a picture of stored values (grey, 16 bits, or a palette's indices), as the row has it.
        frame: of the image it belongs to.
        table: see `value_table`.

    Raises:
        BrokenImage: it does not decode, has another size or more than one channel, or a value that no class has.
    """
    values, upright = read_map(source, token=token)
    values = fitted_map(values, upright, frame)
    classes = classes_of(values, table)
    if classes.size and classes.min() < 0:
        raise BrokenImage(f"its annotation map has the value {values[classes < 0][0]}, which no class has")
    return classes


def classes_of(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Class indices of the values in an annotation map; -1 where no class has the value."""
    return table[values if values.dtype == np.uint8 else values.astype(np.int64).clip(-1, len(table) - 2)]


def read_map(source: Any, *, token: str | bool | None = None) -> tuple[np.ndarray, bool]:
    """The values of an annotation map as they are stored, and whether EXIF of its own has turned it upright.

    Raises:
        BrokenImage: it does not decode, or is not made of single whole numbers.
    """
    values, upright = _pixels(source, token, "annotation map")
    if values.ndim == 3 and values.shape[2] >= 3 and (values[..., :3] == values[..., :1]).all():
        values = values[..., 0]  # grey, saved as colours
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise BrokenImage("its annotation map has colours or fractions for values, not class indices")
    return (values.astype(np.uint8) if values.dtype.kind == "b" else values), upright


def fitted_map(values: np.ndarray, upright: bool, frame: Frame) -> np.ndarray:
    """An annotation map turned like its image, unless it is upright already.

    Raises:
        BrokenImage: its size is another than the image's.
    """
    orientation = 1 if upright else frame.turn(values.shape)
    expected = frame.size if orientation == 1 else frame.stored_size
    if values.shape != expected:
        (height, width), (rows, columns) = values.shape, expected
        raise BrokenImage(
            f"its annotation map is {width}x{height} pixels, but the image {columns}x{rows}"
            + (f" (EXIF orientation {frame.orientation})" if frame.orientation > 1 else "")
        )
    return values if orientation == 1 else turned(values, orientation)


def _pixels(source: Any, token: str | bool | None, what: str) -> tuple[np.ndarray, bool]:
    """A picture that is an annotation, and whether it was turned upright by EXIF of its own."""
    if isinstance(source, Mapping):
        data = source.get("bytes")
        source = source.get("path") if data is None else data
    if source is None:
        raise BrokenImage(f"it has no {what}")
    try:
        with contextlib.ExitStack() as files:
            image = source
            if not isinstance(image, Image.Image):
                data = source if isinstance(source, bytes) else read_bytes(source, token)
                image = files.enter_context(Image.open(io.BytesIO(data)))
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"its {what} has more than {MAX_PIXELS} pixels")
            image.load()
            orientation = orientation_of(image)
            return np.array(image.transpose(TURNS[orientation]) if orientation > 1 else image), orientation > 1
    except BrokenImage:
        raise
    except Exception as error:  # parsers of foreign bytes raise anything at all
        raise BrokenImage(f"its {what} cannot be read: {one_line(error)}") from None


def said_size(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) as a row, or what it says about its objects, gives them for its image."""
    for names in SIZE_FIELDS:
        edges = [values.get(name) for name in names]
        if all(isinstance(edge, Number) and math.isfinite(edge) and edge > 0 for edge in edges):
            return int(edges[0]), int(edges[1])
    return None


def decode_objects(
    value: Any, frame: Frame, fields: ObjectFields, *, with_masks: bool, left_out: Counter[str] | None = None
) -> Objects:
    """The objects of a row, upright. Those without a class are left out, and those whose box, or mask, is empty within
    the image; an image without any is fine.

    Args:
        value: a list of dictionaries, or a dictionary of lists, with the fields of COCO. Masks are polygons, run
            lengths (compressed or not), either of them as JSON text, or pictures.
        frame: of the image.
        left_out: counts the objects left out, by reason.

    Raises:
        BrokenImage: fields are missing or do not fit each other or the image.
    """
    left_out = Counter() if left_out is None else left_out
    objects = as_list(value)
    orientation = 1 if frame.orientation == 1 else frame.turn(annotated_size(value, objects, frame, fields))
    size = frame.size if orientation == 1 else frame.stored_size
    boxes, labels, crowd, areas, masks = [], [], [], [], []
    for index, entry in enumerate(objects):
        box = read_box(entry.get(fields.box), index, fields.bbox_format)
        box[0::2], box[1::2] = box[0::2].clip(0, size[1]), box[1::2].clip(0, size[0])
        if not (box[2] > box[0] and box[3] > box[1]):
            left_out[EMPTY_BOX] += 1
            continue
        label = _label(entry.get(fields.label), index, fields.classes)
        if label is None:
            left_out[NO_CLASS] += 1
            continue
        area = (box[2] - box[0]) * (box[3] - box[1])
        if with_masks:
            mask = _mask(entry.get(fields.mask), index, size, frame, orientation)
            area = mask.sum()
            if not area:
                left_out[EMPTY_MASK] += 1
                continue
            masks.append(mask)
        labels.append(label)
        boxes.append(box)
        crowd.append(is_crowd(entry.get(CROWD_FIELD), index))
        areas.append(_number(entry.get("area"), area))
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Objects(
        boxes=turned_boxes(corners, frame.size, orientation).astype(np.float32),
        labels=np.array(labels, dtype=np.int64),
        masks=np.array(masks, dtype=bool).reshape(-1, *frame.size) if with_masks else None,
        crowd=np.array(crowd, dtype=bool),
        areas=np.array(areas, dtype=np.float64),
    )


def annotated_size(
    value: Any, objects: Sequence[Mapping[str, Any]], frame: Frame, fields: ObjectFields
) -> tuple[int, int] | None:
    """(height, width) of the image that objects were annotated on, as far as the row tells."""
    said = frame.said or (said_size(value) if isinstance(value, Mapping) else None)
    if said is not None:
        return said
    mask = objects[0].get(fields.mask) if objects else None
    size = mask.get("size") if isinstance(mask, Mapping) else None
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return said_size(dict(zip(SIZE_FIELDS[0], size, strict=True)))
    return None


def as_list(value: Any) -> Sequence[Mapping[str, Any]]:
    """What a row says about its objects as a list of dictionaries.

    Raises:
        BrokenImage: it is nothing of the kind.
    """
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


def read_box(value: Any, index: int, bbox_format: str) -> np.ndarray:
    """Left, top, right, bottom, float64, of a box as it is stored.

    Raises:
        BrokenImage: it is not four finite numbers, or has a negative size.
    """
    try:
        box = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise BrokenImage(f"the box of its object {index} is not made of numbers") from None
    if box.shape != (4,) or not np.isfinite(box).all():
        raise BrokenImage(f"the box of its object {index} is not four finite numbers")
    box = corners_of(box, bbox_format)
    if box[2] < box[0] or box[3] < box[1]:
        raise BrokenImage(f"the box of its object {index} has a negative size: is --bbox_format right?")
    return box


def corners_of(boxes: np.ndarray, bbox_format: str) -> np.ndarray:
    """Boxes (..., 4) as left, top, right, bottom."""
    if bbox_format == "xyxy":
        return boxes
    first, sizes = boxes[..., :2], boxes[..., 2:]
    if bbox_format == "cxcywh":
        first = first - sizes / 2
    return np.concatenate([first, first + sizes], axis=-1)


def is_crowd(value: Any, index: int) -> bool:
    """A crowd flag: yes or no, as a number or a text.

    Raises:
        BrokenImage: it is anything else.
    """
    text = "" if value is None else str(value).strip().lower()
    if text in _WORDS:
        return _WORDS[text]
    try:
        return bool((0.0, 1.0).index(float(text)))
    except ValueError:
        raise BrokenImage(f"the crowd flag of its object {index}, {value!r}, is neither 0 nor 1") from None


def _label(value: Any, index: int, classes: Classes) -> int | None:
    try:
        return classes.index(value)
    except UnknownClass:
        raise BrokenImage(
            f"the class of its object {index}, {value!r}, is none of the {len(classes.names)} known ones"
        ) from None


def _number(value: Any, default: float) -> float:
    usable = isinstance(value, (int, float)) and np.isfinite(value) and value > 0
    return float(value if usable else default)


def _mask(value: Any, index: int, size: tuple[int, int], frame: Frame, orientation: int) -> np.ndarray:
    """The mask of an object, upright, for an image that was annotated in this size."""
    upright = False
    try:
        if isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, Mapping) and ("path" in value or "bytes" in value):
            value, upright = _pixels(value, None, "mask")
        if isinstance(value, Mapping):
            check_runs(value, size)
        elif isinstance(value, (list, tuple)):
            # A polygon of fewer than three corners encloses nothing; COCO has a few of them among good ones.
            value = [polygon for polygon in polygons_in(value) if len(polygon) >= 6]
            if not value:
                return np.zeros(frame.size, dtype=bool)
            if any(len(polygon) % 2 for polygon in value):
                raise BrokenImage(f"the mask of its object {index} has a polygon of an odd number of coordinates")
            corners = np.concatenate([np.asarray(polygon, dtype=np.float64) for polygon in value])
            if not (np.abs(corners) <= MAX_COORDINATE).all():
                raise BrokenImage(f"the mask of its object {index} has a corner far outside the image")
        mask = decode_segmentation(value, *(frame.size if upright else size))
    except (BrokenImage, ImportError):
        raise
    except Exception as error:  # whatever run lengths and polygons out of a foreign file provoke
        raise BrokenImage(f"the mask of its object {index} cannot be read: {one_line(error)}") from None
    return mask if upright or orientation == 1 else turned(mask, orientation)


def polygons_in(value: Sequence[Any]) -> Sequence[Any]:
    """Polygons as COCO has them, flat lists of x and y, out of what else can only mean polygons: one flat list, a list
    of points, lists of points."""
    if value and all(isinstance(part, Number) for part in value):
        return [value]
    if len(value) > 2 and all(_is_point(part) for part in value):
        return [[number for point in value for number in point]]
    return [
        [number for point in part for number in point] if len(part) > 2 and all(map(_is_point, part)) else part
        for part in value
    ]


def _is_point(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(part, Number) for part in value)


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
