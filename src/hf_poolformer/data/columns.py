"""What the columns of a dataset mean: which holds the images, which the labels, and what a row's label is."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, NoReturn

import datasets
from datasets import ClassLabel, Image, IterableDataset, Value

from ..foundation.errors import UserError
from ..foundation.names import first_few
from .classes import Classes


logger = logging.getLogger(__name__)

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
_LABEL_NAMES = ("label", "labels", "cls", "class", "target", "category", "fine_label", "class_label", "label_name")
_CAPTION_NAMES = ("cls.txt", "txt")  # a tar without .cls may keep the class name in .txt


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """One split: a stream of undecoded images, and what its columns mean.

    Attributes:
        stream: rows; the image column holds `{"bytes", "path"}`.
        label_column: None if unlabelled; `json.label` means the field `label` of the column `json`.
        classes: None for unlabelled images and for regression.
        counts: images of each class, by index, where that could be had cheaply; None otherwise. Of a part that was
            divided off, those of the whole.
        unlabelled: rows without a label, where `counts` are known.
        problem_type: as in a model's config; None if unlabelled.
        num_examples: exact if known, else None.
        name: what messages call it.
        other_columns: read besides image and label.
        unread_columns: there are these, too.
        class_names: stored class -> name, where the source has them beside its rows (COCO's categories).
        token: Hub token, for rows that name remote files.
        origin: what made these rows a split.
        left_out: files beside the images that nobody reads: kind -> how many.
        local: its bytes are on this machine.
    """

    stream: IterableDataset
    image_column: str
    label_column: str | None
    num_examples: int | None
    classes: Classes | None = None
    counts: tuple[int, ...] | None = None
    unlabelled: int = 0
    problem_type: str | None = None
    name: str = "dataset"
    token: str | bool | None = None
    other_columns: tuple[str, ...] = ()
    unread_columns: tuple[str, ...] = ()
    class_names: Mapping[int, str] | None = None
    origin: str = ""
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    local: bool = True

    @property
    def label_names(self) -> list[str] | None:
        """Class names by index."""
        return None if self.classes is None else list(self.classes.names)


def find_image_column(features: datasets.Features, wanted: str | None, name: str) -> str:
    if wanted is not None:
        if wanted not in features:
            raise UserError(f"{name} has no column {wanted!r} (--image_column_name), only {columns_of(features)}")
        return wanted
    by_type = [column for column, feature in features.items() if isinstance(feature, Image)]
    if not by_type:  # Parquet written without datasets: plain bytes, or a struct of bytes and path
        by_type = [
            column
            for column, feature in features.items()
            if (isinstance(feature, dict) and "bytes" in feature)
            or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"))
        ]
    return _choose(by_type, _IMAGE_NAMES[:1], "image", features, name) or refuse_columns("image", features, name)


def find_label_column(features: datasets.Features, wanted: str | None, name: str) -> str | None:
    if wanted is not None:
        if wanted not in features and feature_of(features, wanted) is None:
            raise UserError(f"{name} has no column {wanted!r} (--label_column_name), only {columns_of(features)}")
        return wanted
    typed = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    if typed:
        # Beside columns of another name, numbers or texts in one that is called label are what is meant.
        plain = [
            column
            for column in _LABEL_NAMES[:2]
            if isinstance(features.get(column), Value) and not features[column].dtype.startswith("float")
        ]
        return _choose(typed + plain, _LABEL_NAMES[:2], "label", features, name)
    # A WebDataset's .json is a struct; its label is one level down.
    nested = [
        f"{column}.{field}" for column, feature in features.items() if isinstance(feature, dict) for field in feature
    ]
    for names in (_LABEL_NAMES, _CAPTION_NAMES):
        for candidates in (list(features), nested):
            named = [
                column
                for column in candidates
                if (column if column in features else column.split(".", 1)[1]).lower() in names
                and isinstance(feature_of(features, column), Value)
            ]
            if named:
                return _choose(named, _LABEL_NAMES[:3], "label", features, name)
    return None


def _choose(
    candidates: list[str], preferred: tuple[str, ...], kind: str, features: datasets.Features, name: str
) -> str | None:
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    for column in preferred:
        if column in candidates:
            logger.info("%s has several %s columns, %s: using %r", name, kind, few(candidates), column)
            return column
    raise UserError(
        f"{name} has several {kind} columns, {few(candidates)}: choose one with --{kind}_column_name "
        f"(columns: {columns_of(features)})"
    )


def refuse_columns(kind: str, features: datasets.Features, name: str) -> NoReturn:
    """
    Raises:
        UserError: no column can be told to be the `kind` that is needed.
    """
    raise UserError(
        f"{name} has no {kind} column that could be told by its type; its columns are {columns_of(features)}: "
        f"name one with --{kind}_column_name"
    )


def feature_of(features: Mapping[str, Any], column: str) -> Any:
    if column in features:
        return features[column]
    parent, _, field = column.partition(".")
    inside = features.get(parent)
    return inside.get(field) if isinstance(inside, dict) else None


def field_of(row: Mapping[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    parent, _, field = column.partition(".")
    return (row.get(parent) or {}).get(field)


def columns_needed(dataset: ImageDataset) -> list[str]:
    label_column = dataset.label_column
    if label_column not in dataset.stream.features:
        label_column = label_column.partition(".")[0]
    return [dataset.image_column, label_column, *dataset.other_columns]


def kind_of(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def columns_of(features: Mapping[str, Any]) -> str:
    return few([f"{column} ({kind_of(feature)})" for column, feature in features.items()], limit=20)


def few(items: list[str], limit: int = 5) -> str:
    """`first_few`, and how many there are in all."""
    return (first_few(items, limit) or "none") + (f" ({len(items)} in all)" if len(items) > limit else "")
