"""What the columns of a dataset mean: which holds the images, which the labels, and what a row's label is."""

import dataclasses
import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import datasets
from datasets import ClassLabel, Image, IterableDataset, LargeList, List, Value

from ..foundation.errors import UserError
from ..foundation.names import first_few
from .classes import Classes
from .labels import Storage


logger = logging.getLogger(__name__)

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
_LABEL_NAMES = ("label", "labels", "cls", "class", "target", "category", "fine_label", "class_label", "label_name")
_CAPTION_NAMES = ("cls.txt", "txt")  # a tar without .cls may keep the class name in .txt
_SEVERAL_NAMES = (*_LABEL_NAMES, "classes", "targets", "categories", "tags", "attributes", "keywords")
_NUMBER_NAMES = ("label", "labels", "target", "targets", "value", "values", "score", "scores")


class PerImage(NamedTuple):
    """How many labels the labelled images have.

    Attributes:
        none: images without any.
    """

    mean: float
    least: int
    most: int
    none: int


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """One split: a stream of undecoded images, and what its columns mean.

    Attributes:
        stream: rows; the image column holds `{"bytes", "path"}`.
        label_columns: none if unlabelled; `json.label` means the field `label` of the column `json`.
        storage: what the values of these columns are in a batch; None if unlabelled, and for dense tasks; `Nothing`
            where images are learned from without labels.
        problem_type: as in a model's config; None if unlabelled.
        classes: None for unlabelled images and for regression.
        target_names: of regression.
        labelled: rows with a label, where they were counted; None otherwise. This and all figures below are those of
            the whole where a part was divided off.
        unlabelled: rows without a label, where they were counted.
        counts: images that have each class, by index, where they were counted; None otherwise.
        per_image: of several labels per image, how many these are, where they were counted.
        target_mean, target_std: of each target, over the rows with a label (population), in units; None where they
            were not read.
        target_range: least and most of each target.
        counts_from: the file that knew all this from an earlier run; empty where the columns were read.
        num_examples: exact if known, else None.
        name: what messages call it.
        other_columns: read besides image and label; named as label columns are.
        split: its name at its source.
        shard_rows: how many rows lie in each shard of `stream` (or, in the same order, in each of the shards that
            `stream.Shards` finds when it divides them), where that is known: who wants few rows finds them by it.
        unread_columns: there are these, too.
        class_names: stored class -> name, where the source has them beside its rows (COCO's categories).
        token: Hub token, for rows that name remote files.
        origin: what made these rows a split.
        left_out: files beside the images that nobody reads: kind -> how many.
        local: its bytes are on this machine.
    """

    stream: IterableDataset
    image_column: str
    label_columns: tuple[str, ...]
    num_examples: int | None
    storage: Storage | None = None
    problem_type: str | None = None
    classes: Classes | None = None
    target_names: tuple[str, ...] = ()
    labelled: int | None = None
    unlabelled: int = 0
    counts: tuple[int, ...] | None = None
    per_image: PerImage | None = None
    target_mean: tuple[float, ...] | None = None
    target_std: tuple[float, ...] | None = None
    target_range: tuple[tuple[float, float], ...] | None = None
    counts_from: str = ""
    name: str = "dataset"
    token: str | bool | None = None
    other_columns: tuple[str, ...] = ()
    split: str = ""
    shard_rows: tuple[int, ...] | None = None
    unread_columns: tuple[str, ...] = ()
    class_names: Mapping[int, str] | None = None
    origin: str = ""
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    local: bool = True

    @property
    def label_names(self) -> list[str] | None:
        """What a model for it answers, by index: names of the classes, or of the targets; None if unlabelled."""
        if self.classes is not None:
            return list(self.classes.names)
        return list(self.target_names) or None

    @property
    def label_column(self) -> str | None:
        """The only column with labels."""
        return self.label_columns[0] if len(self.label_columns) == 1 else None

    def label(self, row: Mapping[str, Any]) -> Any:
        """The label of a row, as it goes into a batch: see `Storage.label`."""
        return self.storage.label([field_of(row, column) for column in self.label_columns], self.classes)


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


def find_label_columns(
    features: datasets.Features, wanted: str | None, name: str, problem_type: str, known: Sequence[str] = ()
) -> tuple[str, ...]:
    """The columns that hold what is to be learned.

    Args:
        wanted: a column; of several labels per image and of numbers also several, separated by commas, or a pattern
            with `*`.
        known: what a model answers; columns of these names are what is meant, unless others are wanted.

    Returns:
        empty where no column can be told.

    Raises:
        UserError: there is no column that is wanted, or several might be meant.
    """
    if problem_type == "single_label_classification":
        found = find_label_column(features, wanted, name)
        return () if found is None else (found,)
    fields = _fields(features)
    if wanted is not None:
        return _wanted_columns(features, wanted, name, "--label_column_name", is_plain)
    if known and all(is_plain(feature_of(features, column)) for column in known):
        return tuple(known)
    if problem_type == "regression":
        numbers = [(column, short) for column, short, feature in fields if holds_numbers(feature)]
        named = [column for column, short in numbers if short in _NUMBER_NAMES]
        fractions = [column for column, _, feature in fields if _dtype(feature).startswith(_FRACTIONS)]
        found = _choose(
            named or (fractions if len(fractions) == 1 else []), _NUMBER_NAMES[:2], "label", features, name
        )
        return () if found is None else (found,)
    lists = [(column, short, element_of(feature)) for column, short, feature in fields if element_of(feature)]
    named = [column for column, short, element in lists if short in _SEVERAL_NAMES and _is_label(element)]
    typed = [column for column, _, element in lists if isinstance(element, ClassLabel)]
    texts = [column for column, _, element in lists if _dtype(element).endswith("string")]
    if found := _choose(named or typed or texts, _SEVERAL_NAMES[:2], "label", features, name):
        return (found,)
    texts = [
        column
        for column, short, feature in fields
        if short in (*_SEVERAL_NAMES, *_CAPTION_NAMES) and _dtype(feature).endswith("string")
    ]
    flags = [column for column, _, feature in fields if _dtype(feature) == "bool"]
    if len(flags) < 2:
        found = _choose(texts, _SEVERAL_NAMES[:2], "label", features, name)
        return () if found is None else (found,)
    if texts:
        raise UserError(
            f"{name} has labels in the column {texts[0]!r}, or in the columns {few(flags)}: say which with "
            f"--label_column_name {texts[0]} or --label_column_name {','.join(flags[:3])}{',...' * (len(flags) > 3)}"
        )
    return tuple(flags)


def find_other_columns(features: datasets.Features, wanted: str, name: str) -> tuple[str, ...]:
    """The columns that `--slice_by` names: with commas between them, or a pattern with `*`.

    Raises:
        UserError: there is none of that name, or it does not hold one text, class, number or truth in each row.
    """

    def can_be(feature: Any) -> bool:
        return isinstance(feature, ClassLabel) or is_plain(feature)

    found = _wanted_columns(features, wanted, name, "--slice_by", can_be)
    for column in found:
        if not can_be(feature := feature_of(features, column)):
            raise UserError(
                f"the column {column!r} of {name} holds {kind_of(feature)}: --slice_by takes columns with a text, a "
                "class, a number or a truth in each row"
            )
    return found


def _wanted_columns(
    features: datasets.Features, wanted: str, name: str, flag: str, fits: Callable[[Any], bool]
) -> tuple[str, ...]:
    """The columns that a flag names; fields of structures also without the name of the structure.

    Args:
        fits: whether a feature is one of those that a pattern means.
    """
    fields = [(column, fits(feature)) for column, _, feature in _fields(features)]
    found: list[str] = []
    for part in [wanted] if feature_of(features, wanted) is not None else wanted.split(","):
        column = part.strip()
        if feature_of(features, column) is not None:
            found.append(column)
            continue
        if "*" in column:
            matching = [
                known
                for known, meant in fields
                if meant and any(fnmatch.fnmatchcase(name, column) for name in (known, known.partition(".")[2]))
            ]
        else:
            matching = [known for known, _ in fields if known.partition(".")[2] == column]
        if not matching:
            raise UserError(f"{name} has no column {column!r} ({flag}), only {columns_of(features)}")
        found += matching
    return tuple(dict.fromkeys(found))


def _fields(features: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Columns and the fields of structures: full name, the last part of it in lower case, feature."""
    fields = [(column, column.lower(), feature) for column, feature in features.items()]
    for column, feature in features.items():
        if isinstance(feature, dict) and "bytes" not in feature:
            fields += [(f"{column}.{field}", field.lower(), inside) for field, inside in feature.items()]
    return [(column, short, feature) for column, short, feature in fields if not column.startswith("__")]


_FRACTIONS = ("float", "double", "decimal")


def element_of(feature: Any) -> Any:
    """What a list holds; None for what is no list."""
    if isinstance(feature, list):
        return feature[0] if feature else None
    return feature.feature if isinstance(feature, List | LargeList) else None


def holds_numbers(feature: Any) -> bool:
    """Whether a column, or the lists in it, are of numbers."""
    dtype = _dtype(element_of(feature) or feature)
    return dtype.startswith((*_FRACTIONS, "int", "uint"))


def holds_fractions(feature: Any) -> bool:
    return _dtype(feature).startswith(_FRACTIONS)


def _dtype(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else ""


def is_plain(feature: Any) -> bool:
    """Whether a column holds one number, truth or text in each row."""
    return _dtype(feature) != "" and not _dtype(feature).endswith("binary")


def _is_label(element: Any) -> bool:
    return isinstance(element, ClassLabel) or is_plain(element)


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
    columns = (*dataset.label_columns, *dataset.other_columns)
    return list(dict.fromkeys([dataset.image_column, *(root_of(dataset.stream.features, name) for name in columns)]))


def root_of(features: Mapping[str, Any], column: str) -> str:
    """The column of a dataset that holds a field."""
    return column if column in features else column.partition(".")[0]


def kind_of(feature: Any) -> str:
    if (element := element_of(feature)) is not None:
        return f"list of {kind_of(element)}"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def columns_of(features: Mapping[str, Any]) -> str:
    return few([f"{column} ({kind_of(feature)})" for column, feature in features.items()], limit=20)


def few(items: list[str], limit: int = 5) -> str:
    """`first_few`, and how many there are in all."""
    return (first_few(items, limit) or "none") + (f" ({len(items)} in all)" if len(items) > limit else "")
