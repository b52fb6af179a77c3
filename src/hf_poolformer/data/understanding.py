"""What the labels of a split are: found from the types of its columns, from known classes, or by a pass over it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from datasets import ClassLabel, Value

from ..foundation.errors import UserError, one_line
from ..foundation.tasks import TASKS
from .classes import Classes, class_key, is_number, marks_nothing
from .columns import (
    ImageDataset,
    element_of,
    feature_of,
    few,
    field_of,
    find_label_columns,
    holds_fractions,
    holds_numbers,
    is_plain,
    kind_of,
    refuse_columns,
)
from .contents import Counts, Moments, count_one, count_several, looks_divided, read_numbers, short_names
from .labels import Flags, Numbers, One, Texts, Vector
from .sources import Source


logger = logging.getLogger(__name__)

# In so many labels a column whose values hardly ever occur twice is none of classes; with fewer they may.
_MANY, _SOME = 100, 10
# So many rows without a label, and a split counts as unlabelled.
_FIRST_ROWS = 100

PROBLEM_TYPES = _SINGLE, _MULTI, _REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
_NEEDS = {
    _SINGLE: "one class for each image",
    _MULTI: "a list of classes for each image, or a column of true and false for each class",
    _REGRESSION: "numbers that are stored as numbers",
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a caller wants to know of labels, and knows already: see `open_datasets`.

    Attributes:
        given: what a model answers.
        told: what the user says the classes are.
    """

    problem_type: str
    given: Classes | None = None
    separator: str | None = None
    told: Classes | None = None
    counted: bool = False
    cache_dir: str | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        return () if self.given is None else self.given.names


def with_labels(dataset: ImageDataset, source: Source, split: str, wanted: Wanted) -> ImageDataset:
    """The split with what its labels are.

    Raises:
        UserError: there are none, or of another kind, or what they are cannot be told.
    """
    return _KINDS[wanted.problem_type](dataset, source, split, wanted, None)


def with_labels_of(
    dataset: ImageDataset, source: Source, split: str, wanted: Wanted, train: ImageDataset
) -> ImageDataset:
    """The validation split with what its labels are, in the sense of the training split's."""
    return _KINDS[wanted.problem_type](dataset, source, split, wanted, train)


def begins_labelled(dataset: ImageDataset) -> bool:
    """Whether the first rows have labels."""
    if not dataset.label_columns:
        return False
    rows = [first_row(dataset)]
    if dataset.problem_type != _SINGLE:
        rows = itertools.islice(dataset.stream, _FIRST_ROWS)
    values = (field_of(row, column) for row in rows for column in dataset.label_columns)
    return any(_tells(value, dataset.problem_type) for value in values)


def _tells(value: Any, problem_type: str) -> bool:
    if isinstance(value, list):
        return any(_tells(item, problem_type) for item in value)
    key = class_key(value)
    return key is not None and (problem_type == _REGRESSION or not marks_nothing(key))


def _single(
    dataset: ImageDataset, source: Source, split: str, wanted: Wanted, train: ImageDataset | None
) -> ImageDataset:
    """One class per image: from ClassLabel, from the classes given, or by one pass over the column."""
    (column,) = _label_columns(dataset, source)
    feature = feature_of(dataset.stream.features, column)
    if not isinstance(feature, Value | ClassLabel):
        raise _wrong_kind(dataset, column)
    classes = Classes.numbered(feature.names) if isinstance(feature, ClassLabel) else wanted.given
    if train is not None and not isinstance(feature, ClassLabel):
        typed = isinstance(feature_of(train.stream.features, train.label_column), ClassLabel)
        classes = Classes.named(train.label_names) if typed else train.classes
    elif holds_fractions(feature) and classes is not None and _is_fraction(first := _first_label(dataset)):
        raise _wrong_kind(dataset, column, f"fractions, {first} for one", _REGRESSION)
    whole = classes is None or source.reads_columns or wanted.counted
    found = count_one(dataset, source, split, wanted.cache_dir) if whole else None
    if classes is None:
        fraction = next(filter(_is_fraction, found.keys), None) if holds_fractions(feature) else None
        if fraction is not None:
            raise _wrong_kind(dataset, column, f"fractions, {fraction} for one", _REGRESSION)
        classes = _classes_found(dataset, found.keys)
    _refuse_unlabelled(dataset, classes, None if found is None else found.keys)
    if train is None and wanted.given is None and (divided := looks_divided(classes.names)):
        separator, parts = divided
        logger.warning(
            "%s: its %d class names are made of %d, with %r between them, and each is learned as a class of its own; "
            "if an image can have several labels, --task multi-label-classification",
            dataset.name,
            len(classes.names),
            parts,
            separator,
        )
    if len(classes.names) < 2 and wanted.given is None and train is None:
        raise _nothing_to_tell_apart(dataset, classes)
    dataset = dataclasses.replace(dataset, storage=One(), classes=classes)
    return dataset if found is None else _counted(dataset, found)


def _multi(
    dataset: ImageDataset, source: Source, split: str, wanted: Wanted, train: ImageDataset | None
) -> ImageDataset:
    """Any number of classes per image. How they are stored takes a look at the rows even where they are known."""
    columns = _label_columns(dataset, source)
    like = None if train is None else train.storage
    features = dataset.stream.features
    feature = feature_of(features, columns[0])
    element = element_of(feature)
    if len(columns) > 1:
        odd = next((column for column in columns if not is_plain(feature_of(features, column))), None)
        if odd is not None:
            raise UserError(
                f"of several label columns each is for one class, and {odd!r} of {dataset.name} holds "
                f"{kind_of(feature_of(features, odd))}"
            )
    elif not (_is_label(element) or _is_text_or_truth(feature) or isinstance(like, Texts)):
        raise _wrong_kind(dataset, columns[0])
    typed = Classes.numbered(element.names) if isinstance(element, ClassLabel) else None
    known = typed or wanted.given or wanted.told
    if train is not None and typed is None:
        known = Classes.named(train.label_names) if _is_typed(train) else train.classes
    whole = known is None or source.reads_columns or wanted.counted
    found = count_several(
        dataset, source, split, wanted.cache_dir, separator=wanted.separator, known=known, like=like, whole=whole
    )
    if isinstance(found.storage, Vector):
        names = [str(index) for index in range(found.storage.length)] if known is None else known.names
        classes = Classes.numbered(names)
    elif isinstance(found.storage, Flags) and known is None:
        classes = Classes.named(found.storage.names)
    else:
        classes = known or _classes_found(dataset, found.keys)
    if isinstance(found.storage, Flags) and (absent := set(classes.names).difference(found.storage.names)):
        raise UserError(
            f"{dataset.name} has no column for {few(sorted(absent))}, only for {few(found.storage.names)}: whether "
            "its images have these classes cannot be told"
        )
    if whole or not found.labelled:
        _refuse_unlabelled(dataset, classes, found.keys)
    dataset = dataclasses.replace(dataset, storage=found.storage, classes=classes)
    if not whole:
        return dataset
    dataset = _counted(dataset, found)
    if len(classes.names) == 1 and train is None and wanted.given is None and dataset.counts[0] == found.labelled:
        raise _nothing_to_tell_apart(dataset, classes)
    return dataset


def _numbers(
    dataset: ImageDataset, source: Source, split: str, wanted: Wanted, train: ImageDataset | None
) -> ImageDataset:
    """Numbers. Of known targets there is nothing to find out that would be worth reading the whole dataset."""
    columns = _label_columns(dataset, source)
    odd = next((name for name in columns if not holds_numbers(feature_of(dataset.stream.features, name))), None)
    if odd is not None:
        raise _wrong_kind(dataset, odd)
    known = wanted.given is not None or train is not None
    whole = not known or source.reads_columns or wanted.counted
    moments = read_numbers(dataset, source, split, wanted.cache_dir, whole=whole)
    names = _target_names(dataset, moments)
    for name, (least, most) in zip(names, moments.range, strict=True):
        if least == most and not known:
            raise UserError(
                f"the target {name!r} of {dataset.name} is {least:g} in all {moments.labelled} rows: there is nothing "
                "to learn"
            )
    dataset = dataclasses.replace(dataset, storage=Numbers(tuple(range(len(names)))), target_names=names)
    if not whole:
        return dataset
    return dataclasses.replace(
        dataset,
        labelled=moments.labelled,
        unlabelled=moments.unlabelled,
        target_mean=moments.mean,
        target_std=moments.std,
        target_range=moments.range,
        counts_from=moments.file,
        num_examples=None if dataset.num_examples is None else moments.labelled,
    )


_KINDS: dict[str, Callable[..., ImageDataset]] = {_SINGLE: _single, _MULTI: _multi, _REGRESSION: _numbers}


def _target_names(dataset: ImageDataset, moments: Moments) -> tuple[str, ...]:
    short = short_names(dataset.stream.features, dataset.label_columns)
    of_lists = [element_of(feature_of(dataset.stream.features, column)) for column in dataset.label_columns]
    names: list[str] = []
    for name, element, length in zip(short, of_lists, moments.lengths, strict=True):
        names += [f"{name}_{index}" for index in range(length)] if element is not None and length > 1 else [name]
    return tuple(names)


def _label_columns(dataset: ImageDataset, source: Source) -> tuple[str, ...]:
    """
    Raises:
        UserError: there are none; where there are some for another task, with that.
    """
    if dataset.label_columns:
        return dataset.label_columns
    if source.unlabelled and dataset.problem_type == _SINGLE:
        raise UserError(source.unlabelled)
    features = dataset.stream.features
    # Of numbers a dataset has many that nobody means to learn.
    others = [_MULTI] if dataset.problem_type == _SINGLE else [_SINGLE, _MULTI]
    for problem in others:
        found: tuple[str, ...] = ()
        with contextlib.suppress(UserError):
            found = find_label_columns(features, None, dataset.name, problem)
        right = _learned_by(feature_of(features, found[0])) if len(found) == 1 else problem
        if found and right != dataset.problem_type:
            columns = few([f"{column} ({kind_of(feature_of(features, column))})" for column in found])
            raise UserError(
                f"{dataset.name} has no labels that could be told for {_task(dataset.problem_type)}, which needs "
                f"{_NEEDS[dataset.problem_type]}. --task {_task(right)} would learn {columns}; if another column is "
                "meant, name it with --label_column_name"
            )
    if source.unlabelled:
        raise UserError(source.unlabelled)
    refuse_columns("label", features, dataset.name)


def first_row(dataset: ImageDataset) -> dict[str, Any]:
    try:
        row = next(iter(dataset.stream), None)
    except Exception as error:
        raise UserError(f"{dataset.name} cannot be read: {one_line(error)}") from error
    if row is None:
        raise UserError(f"{dataset.name} is empty")
    return row


def _first_label(dataset: ImageDataset) -> Any:
    return field_of(first_row(dataset), dataset.label_column)


def _is_fraction(value: Any) -> bool:
    key = class_key(value)
    return key is not None and not is_number(key)


def _is_label(element: Any) -> bool:
    return isinstance(element, ClassLabel) or is_plain(element)


def _is_text_or_truth(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.endswith(("string", "bool"))


def _is_typed(dataset: ImageDataset) -> bool:
    """Whether a ClassLabel names the classes."""
    features = [feature_of(dataset.stream.features, column) for column in dataset.label_columns]
    return any(isinstance(feature, ClassLabel) or isinstance(element_of(feature), ClassLabel) for feature in features)


def _task(problem_type: str) -> str:
    return next(name for name, task in TASKS.items() if task.problem_type == problem_type)


def _learned_by(feature: Any) -> str | None:
    """The kind of problem that a column is the labels of, by its type."""
    element = element_of(feature)
    if holds_fractions(feature if element is None else element):
        return _REGRESSION
    if _is_label(element):
        return _MULTI
    return _SINGLE if _is_label(feature) else None


def _wrong_kind(dataset: ImageDataset, column: str, what: str = "", right: str | None = None) -> UserError:
    """What to say of a column whose labels are not what the task needs, with the task that they are for."""
    feature = feature_of(dataset.stream.features, column)
    right = right or _learned_by(feature)
    own, learns = dataset.problem_type, ""
    if right not in (None, own):
        learns = f", which --task {_task(right)} learns"
    return UserError(
        f"the label column {column!r} of {dataset.name} holds {what or kind_of(feature)}{learns}; {_task(own)} needs "
        f"{_NEEDS[own]}"
    )


def _nothing_to_tell_apart(dataset: ImageDataset, classes: Classes) -> UserError:
    return UserError(
        f"{dataset.name} has a single class, {few(classes.names)}: there is nothing to tell apart. If the classes are "
        "the folders below it, give that folder instead"
    )


def _classes_found(dataset: ImageDataset, counted: Counter[str | None]) -> Classes:
    keys, count = {key for key in counted if key is not None}, counted.total()
    column, what = dataset.label_column, "rows" if dataset.problem_type == _SINGLE else "labels"
    if not keys:
        raise UserError(f"the label column {column!r} of {dataset.name} is empty")
    if len(keys) > count * (1 / 2 if count >= _MANY else 9 / 10) and count >= _SOME:
        raise UserError(
            f"the column {column!r} of {dataset.name} has {len(keys)} different values in {count} {what}, so it is no "
            "class label: name the right one with --label_column_name"
        )
    markers = {key for key in keys if marks_nothing(key)}
    if markers == keys:
        raise UserError(f"{dataset.name}: {_unlabelled(markers)}")
    # One negative number among others means that there is no label; but -1 and 1 alone are two classes.
    if len(markers) == 1 and keys != {"-1", "1"}:
        keys -= markers
    return Classes.stored(keys)


def _refuse_unlabelled(dataset: ImageDataset, classes: Classes, counted: Counter[str | None] | None) -> None:
    """Raises a UserError for a split without labels, or with labels that no class has."""
    if counted is None:
        key = class_key(_first_label(dataset))
        if key is not None and key not in classes.table and marks_nothing(key):
            raise UserError(f"{dataset.name}: {_unlabelled([key])}")
        return
    unknown = {key: count for key, count in counted.items() if key is not None and key not in classes.table}
    markers = [key for key in unknown if marks_nothing(key)]
    if not any(key in classes.table for key in counted) and (markers or not unknown):
        raise UserError(f"{dataset.name}: {_unlabelled(markers)}")
    strange = {key: count for key, count in unknown.items() if key not in markers}
    if strange:
        shown = few([f"{key!r} ({count} rows)" for key, count in sorted(strange.items())])
        raise UserError(f"{dataset.name} has labels that are none of the classes {classes.shown()}: {shown}")


def _unlabelled(markers: Collection[str]) -> str:
    if not markers:
        return "no row has a label: choose another split, or the column with --label_column_name"
    return f"label {few(sorted(markers))}, which stands for `no label` in test splits: choose another split"


def _counted(dataset: ImageDataset, found: Counts) -> ImageDataset:
    """The dataset with the images of its classes."""
    classes = dataset.classes
    counts = [0] * len(classes.names)
    for key, count in found.keys.items():
        if key in classes.table:
            counts[classes.table[key]] += count
    labelled, unlabelled = sum(counts), found.keys.total() - sum(counts)
    if found.storage is not None:
        labelled, unlabelled = found.labelled, found.keys[None]
    return dataclasses.replace(
        dataset,
        labelled=labelled,
        unlabelled=unlabelled,
        counts=tuple(counts),
        per_image=found.per_image,
        counts_from=found.file,
        num_examples=None if dataset.num_examples is None else labelled,
    )
