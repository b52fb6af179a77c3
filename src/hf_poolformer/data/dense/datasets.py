"""Streams of images with annotation maps or objects, on `data.datasets` and `data.loader`.

What those do stays theirs: opening, splitting, sharding, decoding in the workers, counting what is broken, resuming.
Here is what the columns mean and how a row becomes an example.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Image
from PIL import Image as PILImage

from ...foundation.errors import UserError
from ...foundation.names import first_few
from ...foundation.tasks import TASKS
from ...settings.data import AnnotationSettings
from ..classes import Classes, class_key
from ..columns import ImageDataset, columns_of
from ..decoding import BrokenImage, EncodedImage, describe_source
from ..loader import DecodedBatches
from ..opening import open_splits
from ..sources import content_key
from .annotations import (
    BOX_FIELDS,
    CLASS_FIELDS,
    MASK_FIELDS,
    SIZE_FIELDS,
    Frame,
    ObjectFields,
    Objects,
    as_list,
    decode_map,
    decode_objects,
    read_map,
    said_size,
    value_table,
)
from .naming import known_classes, unknown_classes


MAP_NAMES = ("annotation", "label", "labels", "mask", "segmentation_map", "semantic_map", "seg", "map", "target")
OBJECT_NAMES = ("objects", "annotations", "annotation", "instances", "labels")


@dataclass(frozen=True)
class DenseDataset:
    """One split.

    Attributes:
        images: its stream; its label column holds the annotation maps or the objects, `label_names` the classes.
        fields: of the objects; None for annotation maps.
        classes: stored value -> class of the model; with `reduce_labels`, of values less one.
        void: 255 is said to be no class.
        with_masks: masks of objects are read, too.
        reduced: annotation maps hold values larger by one than those in `classes`, and 0 for no class.
        pixels: what annotations of images that EXIF turns count, as `--annotation_pixels` says.
        in_stored: with `auto`, these are the pixels of stored images, before EXIF turns them, unless the annotations'
            size tells otherwise.
    """

    images: ImageDataset
    fields: ObjectFields | None
    classes: Classes
    void: bool = False
    with_masks: bool = False
    reduced: bool = False
    pixels: str = "auto"
    in_stored: bool = True

    @property
    def label_names(self) -> list[str]:
        return self.images.label_names

    def with_classes(self, classes: Classes) -> DenseDataset:
        """The same with other classes."""
        images = dataclasses.replace(self.images, classes=classes)
        fields = None if self.fields is None else dataclasses.replace(self.fields, classes=classes)
        return dataclasses.replace(self, images=images, fields=fields, classes=classes)

    def with_class_order(self, names: Sequence[str]) -> DenseDataset:
        """The same with its classes in the order of `names`.

        Raises:
            UserError: it has a class that is not among them.
        """
        own = self.label_names
        if own == list(names):
            return self
        keys = {class_key(name) for name in names}
        missing = [name for name in own if class_key(name) not in keys]
        if missing:
            raise UserError(
                f"{self.images.name} has the class {missing[0]!r} ({len(missing)} such), which the model or the "
                f"training split does not know: {first_few(names)}."
            )
        return self.with_classes(self.classes.renumbered(names))

    @property
    def value_table(self) -> np.ndarray:
        """Of annotation maps, see `annotations.value_table`."""
        return value_table(self.classes, self.reduced)

    def frame(self, image: EncodedImage, row: Mapping[str, Any]) -> Frame:
        """The pixels of a row's image, and how its annotations belong to them."""
        size = image.height, image.width
        if image.orientation == 1:
            return Frame(size)
        told_by_size = self.pixels == "auto"
        in_stored = self.in_stored if told_by_size else self.pixels == "stored"
        return Frame(size, image.orientation, said_size(row), in_stored, told_by_size)


@dataclass(frozen=True)
class Truth:
    """What evaluation compares with: annotations in the pixels of the stored image.

    Attributes:
        key: tells images apart and orders them, the same in every process.
        size: (height, width).
        map: annotation map (height, width), or None.
        objects: or these; their masks are in the image's own size.
    """

    key: bytes
    size: tuple[int, int]
    map: Any | None = None
    objects: Objects | None = None


def open_dense_datasets(settings: AnnotationSettings) -> dict[str, DenseDataset]:
    """The splits `train` and, unless there is none, `validation`.

    Raises:
        UserError: as `open_datasets`, and where annotations or the names of the classes cannot be found.
    """
    opened = open_splits(settings, labelled=False)
    dense = {split: with_annotations(images, settings) for split, images in opened.items()}
    if "validation" in dense:
        dense["validation"] = dense["validation"].with_class_order(dense["train"].label_names)
    return dense


def with_annotations(images: ImageDataset, settings: AnnotationSettings, known: Classes | None = None) -> DenseDataset:
    """A split with its annotations, and their classes, found.

    Args:
        known: what classes are stored as where the data does not name them: a trained model's.

    Raises:
        UserError: annotations or the names of the classes cannot be found.
    """
    features, reads = images.stream.features, TASKS[settings.task].reads
    read_as = {"with_masks": reads == "masks", "reduced": settings.reduce_labels, "pixels": settings.annotation_pixels}
    if reads == "map":
        column = map_column(images, settings.annotation_column_name)
        stream = images.stream.cast_column(column, Image(decode=False))
        images = dataclasses.replace(images, stream=stream, label_columns=(column,))
        classes, void = known_classes(settings, None, images.name, images.class_names)
        classes = classes or known
        if classes is None:
            raise unknown_classes(images.name, stored_classes(images))
        return DenseDataset(images, None, classes, void, **read_as).with_classes(classes)
    column = object_column(images, settings.annotation_column_name)
    inside = fields_of(features[column])
    box, label, mask = (
        next((name for name in names if name in inside), None) for names in (BOX_FIELDS, CLASS_FIELDS, MASK_FIELDS)
    )
    for name, what in ((box, "boxes"), (label, "classes")):
        if name is None:
            raise UserError(
                f"the column {column!r} of {images.name} has no field for {what}, only {', '.join(inside)}."
            )
    if mask is None and reads == "masks":
        raise UserError(
            f"the column {column!r} of {images.name} has no masks, only {', '.join(inside)}: {settings.task} "
            "needs a field 'segmentation' with polygons or run lengths."
        )
    sizes = tuple(name for names in SIZE_FIELDS for name in names if name in features)
    images = dataclasses.replace(images, label_columns=(column,), other_columns=sizes)
    classes = known_classes(settings, inside[label], images.name, images.class_names)[0] or known
    if classes is None:
        raise unknown_classes(images.name, stored_classes(images, label))
    fields = ObjectFields(box=box, label=label, mask=mask, classes=classes, bbox_format=settings.bbox_format)
    return DenseDataset(images, fields, classes, **read_as).with_classes(classes)


def stored_classes(images: ImageDataset, label: str | None = None) -> set[str]:
    """Keys of the classes in the first annotations, which nobody has named; `label`: the field of objects."""
    seen: set[str | None] = set()
    with contextlib.suppress(Exception):  # a message is short of an example, no more
        for row in itertools.islice(images.stream.select_columns([images.label_column]), 20):
            value = row[images.label_column]
            if label is not None:
                seen |= {class_key(entry.get(label)) for entry in as_list(value)}
            else:
                with contextlib.suppress(BrokenImage):
                    seen |= {str(number) for number in np.unique(read_map(value)[0])}
    return seen - {None}


def map_column(images: ImageDataset, wanted: str | None) -> str:
    features = images.stream.features
    if wanted is not None:
        if wanted not in features:
            raise UserError(
                f"{images.name} has no column {wanted!r} (--annotation_column_name), only {columns_of(features)}."
            )
        return wanted
    pictures = [
        name for name, feature in features.items() if isinstance(feature, Image) and name != images.image_column
    ]
    if len(pictures) == 1:
        return pictures[0]
    named = [name for name in MAP_NAMES if name in pictures]
    if not named:
        raise UserError(
            f"{images.name} has no column of annotation maps that could be told; its columns are "
            f"{columns_of(features)}: name one with --annotation_column_name."
        )
    return named[0]


def object_column(images: ImageDataset, wanted: str | None) -> str:
    features = images.stream.features
    candidates = [name for name, feature in features.items() if set(BOX_FIELDS) & set(fields_of(feature))]
    if wanted is not None:
        if wanted not in features or not fields_of(features[wanted]):
            raise UserError(
                f"{images.name} has no objects in a column {wanted!r} (--annotation_column_name); its columns are "
                f"{columns_of(features)}."
            )
        return wanted
    named = [name for name in OBJECT_NAMES if name in candidates] or candidates
    if not named:
        raise UserError(
            f"{images.name} has no column of objects with boxes (objects: bbox, category); its columns are "
            f"{columns_of(features)}: name one with --annotation_column_name."
        )
    return named[0]


def fields_of(feature: Any) -> dict[str, Any]:
    """Fields of objects: a list of dictionaries, or a dictionary of lists."""
    if isinstance(feature, list) and feature:
        feature = feature[0]
    inside = getattr(feature, "feature", None)  # of List and LargeList
    if isinstance(inside, dict):
        return inside
    if isinstance(feature, dict):
        return {name: getattr(inner, "feature", inner) for name, inner in feature.items()}
    return {}


class DenseBatches(DecodedBatches):
    """Rows with annotations instead of labels; batches are lists, since images may differ in size.

    The transform is called with the image and an annotation map or `Objects`. In evaluation the label of an image is
    its `Truth`.
    """

    def __init__(self, *arguments: Any, dense: DenseDataset):
        super().__init__(*arguments)
        self._dense = dense
        self._table = dense.value_table if dense.fields is None else None

    def _read(self, row: Mapping[str, Any]) -> tuple[PILImage.Image, Any]:
        source, token = row[self._dataset.image_column], self._dataset.token
        with EncodedImage(source, token=token) as encoded:
            frame = self._dense.frame(encoded, row)
            image = encoded.decode()[0]
        size, value = frame.size, row[self._dataset.label_column]
        fields = self._dense.fields
        if fields is None:
            target = decode_map(value, frame, self._table, token=token)
        else:
            target = decode_objects(value, frame, fields, with_masks=self._dense.with_masks)
        if self._training:
            return image, target
        encoded = source.get("bytes") if isinstance(source, Mapping) else None
        key = content_key(encoded if encoded is not None else (describe_source(source) or "").encode())
        return image, Truth(key, size, **{"map" if fields is None else "objects": target})

    def _example(self, image: PILImage.Image, label: Any) -> tuple[Any, Any]:
        return self._transform(image, label)

    def _batch(self, pixels: list[Any], labels: list[Any]) -> dict[str, Any]:
        return {"pixel_values": pixels, "labels": labels}
