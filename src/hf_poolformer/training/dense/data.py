"""Streams of images with annotation maps or objects, on `training.data` and `training.loader`.

What those do stays theirs: opening, splitting, sharding, decoding in the workers, counting what is broken, resuming.
Here is what the columns mean and how a row becomes an example.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import ClassLabel, Image
from huggingface_hub import hf_hub_download
from PIL import Image as PILImage

from .. import data
from ..columns import ImageDataset, columns_of
from ..decoding import decode_image, describe_source
from ..errors import UserError
from ..evaluation import data_workers, skip_limit
from ..files import one_line
from ..loader import DecodedBatches, ImageLoader, make_loader
from ..sources import content_key
from .annotations import BOX_FIELDS, CLASS_FIELDS, MASK_FIELDS, ObjectFields, Objects, decode_map, decode_objects
from .arguments import DenseSettings
from .augmentation import EvalTransform, TrainTransform


MAP_NAMES = ("annotation", "label", "labels", "mask", "segmentation_map", "semantic_map", "seg", "map", "target")
OBJECT_NAMES = ("objects", "annotations", "annotation", "instances", "labels")


@dataclass(frozen=True)
class DenseDataset:
    """One split.

    Attributes:
        images: its stream; `label_column` holds the annotation maps or the objects, `label_names` the classes.
        fields: of the objects; None for annotation maps.
        class_ids: class of the dataset -> class of the model, where these differ.
    """

    images: ImageDataset
    fields: ObjectFields | None
    class_ids: dict[int, int] | None = None

    @property
    def label_names(self) -> list[str]:
        return self.images.label_names


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


def open_dense_datasets(settings: DenseSettings) -> dict[str, DenseDataset]:
    """The splits `train` and, unless there is none, `validation`.

    Raises:
        UserError: as `open_datasets`, and where annotations or the names of the classes cannot be found.
    """
    opened = data.open_datasets(
        dataset_name=settings.dataset_name,
        dataset_config_name=settings.dataset_config_name,
        train_split=settings.train_split,
        validation_split=settings.validation_split,
        train_val_split=settings.train_val_split,
        image_column_name=settings.image_column_name,
        revision=settings.dataset_revision,
        token=settings.hub_token,
        cache_dir=settings.cache_dir,
        streaming=settings.streaming,
        labelled=False,
    )
    dense = {split: understood(images, settings) for split, images in opened.items()}
    if "validation" in dense:
        dense["validation"] = numbered(dense["validation"], dense["train"].label_names)
    return dense


def understood(images: ImageDataset, settings: DenseSettings) -> DenseDataset:
    """Finds the annotations and their classes."""
    features = images.stream.features
    if settings.task == "semantic-segmentation":
        column = map_column(images, settings.annotation_column_name)
        stream = images.stream.cast_column(column, Image(decode=False))
        names = class_names(settings, None, images.name)
        return DenseDataset(dataclasses.replace(images, stream=stream, label_column=column, label_names=names), None)
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
    if mask is None and settings.task == "instance-segmentation":
        raise UserError(
            f"the column {column!r} of {images.name} has no masks, only {', '.join(inside)}: instance segmentation "
            "needs a field 'segmentation' with polygons or run lengths."
        )
    names = class_names(settings, inside[label], images.name)
    stored_as_text = getattr(inside[label], "dtype", None) in ("string", "large_string")
    fields = ObjectFields(
        box=box,
        label=label,
        mask=mask,
        num_labels=len(names),
        bbox_format=settings.bbox_format,
        class_ids={name: index for index, name in enumerate(names)} if stored_as_text else None,
    )
    stream = images.stream
    return DenseDataset(dataclasses.replace(images, stream=stream, label_column=column, label_names=names), fields)


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


def class_names(settings: DenseSettings, feature: Any, name: str) -> list[str]:
    """Names of the classes: as told, from the dataset's ClassLabel, or from the id2label.json beside it."""
    if settings.label_names:
        if settings.label_names.endswith(".json"):
            path = Path(settings.label_names)
            try:
                return names_in(path.read_text(encoding="utf-8"), str(path))
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read the names of the classes in {path}: {one_line(error)}.") from error
        names = [part.strip() for part in settings.label_names.split(",") if part.strip()]
    elif isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        text = id2label(settings)
        if text is None:
            raise UserError(
                f"{name} does not name its classes: give them with --label_names background,road,... or as a JSON "
                "file with id2label."
            )
        return names_in(text, "id2label.json")
    return checked_names(names, "--label_names" if settings.label_names else name)


def id2label(settings: DenseSettings) -> str | None:
    """The dataset's id2label.json, where transformers' examples keep the names of segmentation classes."""
    folder = Path(settings.dataset_name).expanduser()
    if folder.exists():
        path = (folder if folder.is_dir() else folder.parent) / "id2label.json"
        return path.read_text(encoding="utf-8") if path.is_file() else None
    try:
        path = hf_hub_download(
            settings.dataset_name,
            "id2label.json",
            repo_type="dataset",
            revision=settings.dataset_revision,
            token=settings.hub_token,
            cache_dir=settings.cache_dir,
        )
    except Exception:  # not there, whatever the reason: the names are then asked for
        return None
    return Path(path).read_text(encoding="utf-8")


def names_in(text: str, where: str) -> list[str]:
    try:
        values = json.loads(text)
        if isinstance(values, dict):
            values = values.get("id2label", values)
            values = [values[key] for key in sorted(values, key=int)]
        return checked_names(values, where)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where} holds neither a list of names nor id2label: {one_line(error)}.") from error


def checked_names(names: Any, where: str) -> list[str]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"the names of the classes in {where} are not a list of texts.")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{where} names the class {twice[0]!r} twice.")
    return names


def numbered(dataset: DenseDataset, names: Sequence[str]) -> DenseDataset:
    """The dataset with its classes in the order of `names`.

    Raises:
        UserError: it has a class that is not among them.
    """
    own = dataset.label_names
    if own == list(names):
        return dataset
    missing = [name for name in own if name not in names]
    if missing:
        raise UserError(
            f"{dataset.images.name} has the class {missing[0]!r} ({len(missing)} such), which the model or the "
            f"training split does not know: {', '.join(list(names)[:5])}{', ...' if len(names) > 5 else ''}."
        )
    order = {index: list(names).index(name) for index, name in enumerate(own)}
    images = dataclasses.replace(dataset.images, label_names=list(names))
    if dataset.fields is None:
        return DenseDataset(images, None, order)
    stored = dataset.fields.class_ids or {index: index for index in range(len(own))}
    class_ids = {value: order[index] for value, index in stored.items()}
    return DenseDataset(images, dataclasses.replace(dataset.fields, num_labels=len(names), class_ids=class_ids))


class DenseBatches(DecodedBatches):
    """Rows with annotations instead of labels; batches are lists, since images may differ in size.

    The transform is called with the image and an annotation map or `Objects`. In evaluation the label of an image is
    its `Truth`.
    """

    def __init__(self, *arguments: Any, dense: DenseDataset, settings: DenseSettings):
        super().__init__(*arguments)
        self._dense = dense
        self._reduce_labels = settings.reduce_labels
        self._with_masks = settings.task == "instance-segmentation"

    def _read(self, row: Mapping[str, Any]) -> tuple[PILImage.Image, Any]:
        source = row[self._dataset.image_column]
        image = decode_image(source, token=self._dataset.token)
        size, value = (image.height, image.width), row[self._dataset.label_column]
        fields = self._dense.fields
        if fields is None:
            target = decode_map(
                value,
                size,
                len(self._dense.class_ids or self._dense.label_names),
                reduce_labels=self._reduce_labels,
                class_ids=self._dense.class_ids,
                token=self._dataset.token,
            )
        else:
            target = decode_objects(value, size, fields, with_masks=self._with_masks)
        if self._training:
            return image, target
        encoded = source.get("bytes") if isinstance(source, Mapping) else None
        key = content_key(encoded if encoded is not None else (describe_source(source) or "").encode())
        return image, Truth(key, size, **{"map" if fields is None else "objects": target})

    def _example(self, image: PILImage.Image, label: Any) -> tuple[Any, Any]:
        return self._transform(image, label)

    def _batch(self, pixels: list[Any], labels: list[Any]) -> dict[str, Any]:
        return {"pixel_values": pixels, "labels": labels}


def make_dense_loader(
    dataset: DenseDataset,
    settings: DenseSettings,
    accelerator: Accelerator,
    processor: Any,
    *,
    training: bool,
) -> ImageLoader:
    """Batches of this process's share: `pixel_values`, a list of (C, H, W), and `labels`, a list of what the model is
    trained with, or of `Truth`.

    Raises:
        UserError: as `make_loader`.
    """

    return make_loader(
        dataset.images,
        TrainTransform(settings, processor) if training else EvalTransform(processor),
        batch_size=settings.per_device_train_batch_size if training else settings.per_device_eval_batch_size,
        training=training,
        num_workers=data_workers(settings.num_workers, accelerator),
        seed=settings.seed,
        max_skipped=skip_limit(settings.max_skipped),
        max_skipped_shards=settings.max_skipped_shards,
        shuffle_buffer_size=settings.shuffle_buffer_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        pin_memory=training and accelerator.device.type == "cuda",
        batches=functools.partial(DenseBatches, dense=dataset, settings=settings),
    )
