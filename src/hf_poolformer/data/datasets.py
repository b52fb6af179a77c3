"""Images and labels as streams: opened undecoded, their labels understood, and split.

`open_datasets` finds what there is and what its columns mean; `make_loader` (see `loader.py`) turns one split into
batches. Nothing is decoded before a worker does it, so that one broken image costs one image.
"""

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Image, Value

from ..foundation.errors import UserError, one_line
from .classes import Classes, class_key, is_number, marks_nothing
from .columns import (
    ImageDataset,
    feature_of,
    few,
    field_of,
    find_image_column,
    find_label_column,
    kind_of,
    refuse_columns,
)
from .layouts import open_source
from .sources import Source


logger = logging.getLogger(__name__)

# Ends the name of what was divided off.
HELD_OUT = "(held-out part)"
# In so many rows a column whose values hardly ever occur twice is none of classes; with fewer they may.
_MANY, _SOME = 100, 10


def open_datasets(
    *,
    dataset_name: str | os.PathLike | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | os.PathLike | None = None,
    validation_dir: str | os.PathLike | None = None,
    train_split: str | None = "train",
    validation_split: str | None = None,
    train_val_split: float | None = 0.15,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    classes: Classes | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    streaming: bool = True,
    labelled: bool = True,
) -> dict[str, ImageDataset]:
    """Opens a labelled dataset as `{"train": ..., "validation": ...}`.

    Args:
        dataset_name: Hub id, or a local directory, file or glob: image folder, Parquet, WebDataset tars, or what
            `save_to_disk` wrote; told by content.
        train_dir, validation_dir: local data in the place of `dataset_name`.
        train_split: None for evaluation only: the result then has no "train".
        validation_split: by default `validation` or one of its aliases, otherwise a labelled `test`; if there is
            neither, `train_val_split` of the training split is held out by a hash of each image's encoded bytes: the
            same images whatever the order, the shards and the number of workers and processes.
        train_val_split: fraction held out then; 0 or None holds nothing out.
        classes: what bare integers or texts mean where the dataset does not name its classes; spares the pass over
            the label column that finds them otherwise. Usually those of a checkpoint.
        streaming: False downloads a Hub dataset first; local data is always read where it lies.
        labelled: False opens and splits the same way, and leaves it to the caller what the columns beside the image
            mean: annotation maps, boxes.

    Raises:
        UserError: nothing there, no images, no labels, an empty split, columns or splits that cannot be told.
    """
    fraction = float(train_val_split or 0.0)
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"--train_val_split must lie in [0, 1), not {train_val_split}")
    if (dataset_name is None) == (train_dir is None and validation_dir is None):
        raise UserError("name the data by either --dataset_name or --train_dir / --validation_dir")
    where = {"extra_splits": tuple(filter(None, (train_split, validation_split))), "cache_dir": cache_dir}
    source = train = validation = held_out_from = None
    if dataset_name is not None:
        remote = {"revision": revision, "token": token, "streaming": streaming}
        source = open_source(dataset_name, config_name=dataset_config_name, **remote, **where)
    elif train_dir is not None:
        source = open_source(train_dir, **where)
    if source is not None and train_split:
        train = (source, _named_split(source, train_split, "--train_split"))
    if validation_dir is not None:
        validation = (open_source(validation_dir, whole=True, **where), "train")
    elif source is not None:
        validation = _validation_split(source, validation_split, train, image_column_name, label_column_name, labelled)
    if validation is None:
        base = train or (source, _named_split(source, "train", "--validation_split"))
        if fraction > 0.0:
            held_out_from = base
        elif train is None:
            validation = base

    columns = {"image_column_name": image_column_name, "label_column_name": label_column_name, "token": token}
    columns["labelled"] = labelled
    if held_out_from is not None:
        whole = _open_split(*held_out_from, **columns)
        if labelled:
            whole = _with_labels(whole, *held_out_from, classes)
        parts = dict(zip(("train", "validation"), _divide(whole, *held_out_from, fraction), strict=True))
        return parts if train is not None else {"validation": parts["validation"]}
    parts = {name: part for name, part in (("train", train), ("validation", validation)) if part is not None}
    opened = {name: _open_split(*part, **columns) for name, part in parts.items()}
    if not labelled:
        return opened
    for name, dataset in opened.items():
        if name == "validation" and train is not None:
            opened[name] = _with_labels_of(dataset, *validation, opened["train"])
        else:
            opened[name] = _with_labels(dataset, *parts[name], classes)
    return opened


def open_images(
    location: str | os.PathLike,
    *,
    split: str | None = None,
    image_column_name: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> ImageDataset:
    """Opens the images of one split, labels or not, in stored order: for prediction.

    Args:
        location: as `dataset_name` of `open_datasets`.
        split: by default everything there is of local data, and the only split of a Hub dataset.
    """
    source = open_source(
        location,
        config_name=config_name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        extra_splits=(split,) if split else (),
        whole=split is None,
    )
    name = _named_split(source, split, "--split") if split else _only_split(source, "--split")
    return _open_split(source, name, image_column_name=image_column_name, token=token, labelled=False)


def align_labels(
    dataset: ImageDataset, label2id: Mapping[str, int], *, subset: bool = False, whose: str = "the checkpoint"
) -> ImageDataset:
    """Renumbers a dataset's labels to the indices of a checkpoint that knows the same names in another order.

    A checkpoint whose names are the placeholders `LABEL_0`, `LABEL_1`, ... is taken by position.

    Args:
        label2id: a model config's.
        subset: the dataset may lack some of the checkpoint's classes.
        whose: what messages call the owner of `label2id`.

    Raises:
        UserError: the label sets differ.
    """
    classes = dataset.classes
    if classes is None:
        return dataset
    names = [name for name, _ in sorted(label2id.items(), key=lambda item: int(item[1]))]
    if list(classes.names) == names:
        return dataset
    if len(names) == len(classes.names) and set(names) == {f"LABEL_{index}" for index in range(len(names))}:
        logger.info("the checkpoint has no class names: those of %s are taken in their order", dataset.name)
        return dataset
    ours, theirs = ({class_key(name): name for name in group} for group in (classes.names, names))
    foreign = [name for key, name in ours.items() if key not in theirs]
    absent = [name for key, name in theirs.items() if key not in ours]
    if dataset.counts is not None:  # a name that no image has does no harm
        foreign = [name for name in foreign if dataset.counts[classes.names.index(name)]]
    if foreign or (absent and not subset):
        raise UserError(
            f"{dataset.name} has other labels than {whose}: {few(dataset.label_names)} against {few(names)}; only "
            f"in the dataset: {few(sorted(foreign))}, only in {whose}: {few(sorted(absent))}"
        )
    return _renumbered(dataset, names)


def _renumbered(dataset: ImageDataset, names: Sequence[str]) -> ImageDataset:
    """With the indices of `names`; classes that are not among them have no images."""
    known = {class_key(name) for name in names}
    kept = [index for index, name in enumerate(dataset.classes.names) if class_key(name) in known]
    place = {index: new for new, index in enumerate(kept)}
    table = {key: place[index] for key, index in dataset.classes.table.items() if index in place}
    classes = Classes(tuple(dataset.classes.names[index] for index in kept), table).renumbered(names)
    counts = None
    if dataset.counts is not None:
        by_key = {class_key(name): count for name, count in zip(dataset.classes.names, dataset.counts, strict=True)}
        counts = tuple(by_key.get(class_key(name), 0) for name in names)
    return dataclasses.replace(dataset, classes=classes, counts=counts)


def _named_split(source: Source, wanted: str, flag: str) -> str:
    found = source.split_named(wanted)
    if found is None:
        raise UserError(
            f"{source.name} has no split {wanted!r}, only {few(source.splits)}: choose one of these with {flag}"
        )
    return found


def _only_split(source: Source, flag: str) -> str:
    if len(source.splits) != 1:
        raise UserError(f"{source.name} has several splits, {few(source.splits)}: choose one with {flag}")
    return source.splits[0]


def _validation_split(
    source: Source,
    wanted: str | None,
    train: tuple[Source, str] | None,
    image_column_name: str | None,
    label_column_name: str | None,
    labelled: bool,
) -> tuple[Source, str] | None:
    if wanted:
        return source, _named_split(source, wanted, "--validation_split")
    used = train[1] if train is not None else None
    validation = source.split_named("validation")
    if validation is not None and validation != used:
        return source, validation
    test = source.split_named("test")
    if test is None or test == used:
        return None
    if not labelled:
        return source, test
    # Public test splits often come without labels, or with -1 in their place.
    dataset = _open_split(
        source, test, image_column_name=image_column_name, label_column_name=label_column_name, token=None
    )
    label = class_key(field_of(_first_row(dataset), dataset.label_column)) if dataset.label_column else None
    if label is None or marks_nothing(label):
        logger.info("%s is unlabelled and not used for validation", dataset.name)
        return None
    logger.info("%s has no validation split: evaluating on %r", source.name, test)
    return source, test


def _open_split(
    source: Source,
    split: str,
    *,
    image_column_name: str | None,
    label_column_name: str | None = None,
    token: str | bool | None,
    labelled: bool = True,
) -> ImageDataset:
    """A split with its columns found; labels not looked at yet, and their column not looked for unless `labelled`."""
    name = f"{source.name} ({split})" if len(source.splits) > 1 else source.name
    opened = source.open(split)
    stream = opened.stream
    if stream.features is None:
        stream = stream._resolve_features()
    if not stream.features:
        raise UserError(f"{name} is empty")
    image_column = find_image_column(stream.features, image_column_name, name)
    label_column, unread = None, ()
    if labelled:
        label_column = find_label_column(stream.features, label_column_name or source.label_column, name)
    if label_column is not None:
        root = label_column if label_column in stream.features else label_column.partition(".")[0]
        unread = tuple(column for column in stream.features if column not in (image_column, root))
        stream = source.columns(split, list(dict.fromkeys((image_column, root))))
    # Annotation maps as well: a broken one would end its shard where a filter decodes it.
    pictures = [column for column, feature in stream.features.items() if isinstance(feature, Image)]
    for column in {image_column, *pictures}:
        stream = stream.cast_column(column, Image(decode=False))
    dataset = ImageDataset(
        stream=stream,
        image_column=image_column,
        label_column=label_column,
        num_examples=opened.num_examples,
        name=name,
        token=token,
        unread_columns=unread,
        origin=source.split_origin(split),
        left_out=source.left_out,
        class_names=source.class_names,
        local=source.local,
    )
    _first_row(dataset)
    return dataset


def _first_row(dataset: ImageDataset) -> dict[str, Any]:
    try:
        row = next(iter(dataset.stream), None)
    except Exception as error:
        raise UserError(f"{dataset.name} cannot be read: {one_line(error)}") from error
    if row is None:
        raise UserError(f"{dataset.name} is empty")
    return row


def _with_labels(dataset: ImageDataset, source: Source, split: str, given: Classes | None) -> ImageDataset:
    """Finds out what the labels are: from ClassLabel, from the classes given, or by one pass over the column."""
    feature = _label_feature(dataset, source)
    if isinstance(feature, ClassLabel):
        classes = Classes.numbered(feature.names)
    elif given is not None and not (_holds_fractions(feature) and _is_fraction(_first_label(dataset))):
        classes = given
    else:
        classes = None
    counted = _counted(dataset, source, split) if classes is None or source.reads_columns else None
    if classes is None:
        if _holds_fractions(feature) and any(map(_is_fraction, counted)):
            return dataclasses.replace(dataset, problem_type="regression")
        classes = _classes_found(dataset, counted)
    _refuse_unlabelled(dataset, classes, counted)
    if len(classes.names) < 2 and given is None:
        raise UserError(
            f"{dataset.name} has a single class, {few(classes.names)}: there is nothing to tell apart. If the "
            "classes are the folders below it, give that folder instead"
        )
    return _counting(dataset, classes, counted)


def _with_labels_of(dataset: ImageDataset, source: Source, split: str, train: ImageDataset) -> ImageDataset:
    """Gives the validation split the classes of the training split, by name."""
    feature = _label_feature(dataset, source)
    if train.classes is None:
        return dataclasses.replace(dataset, problem_type=train.problem_type)
    counted = _counted(dataset, source, split) if source.reads_columns else None
    if isinstance(feature, ClassLabel):
        own = Classes.numbered(feature.names)
        _refuse_unlabelled(dataset, own, counted)
        label2id = {name: index for index, name in enumerate(train.label_names)}
        return align_labels(_counting(dataset, own, counted), label2id, subset=True, whose=train.name)
    typed = isinstance(feature_of(train.stream.features, train.label_column), ClassLabel)
    classes = Classes.named(train.label_names) if typed else train.classes
    _refuse_unlabelled(dataset, classes, counted)
    return _counting(dataset, classes, counted)


def _label_feature(dataset: ImageDataset, source: Source) -> Any:
    column = dataset.label_column
    if column is None:
        if source.unlabelled:
            raise UserError(source.unlabelled)
        refuse_columns("label", dataset.stream.features, dataset.name)
    feature = feature_of(dataset.stream.features, column)
    if not isinstance(feature, Value | ClassLabel):
        raise UserError(
            f"the label column {column!r} of {dataset.name} holds {kind_of(feature)}; a class index, a class name or "
            "a number for regression is needed"
        )
    return feature


def _holds_fractions(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("float", "double", "decimal"))


def _is_fraction(value: Any) -> bool:
    key = class_key(value)
    return key is not None and not is_number(key)


def _first_label(dataset: ImageDataset) -> Any:
    return field_of(_first_row(dataset), dataset.label_column)


def _counted(dataset: ImageDataset, source: Source, split: str) -> Counter[str | None]:
    """How many rows have which key, by one pass over the label column; None stands for no label."""
    column = dataset.label_column
    root = column if column in dataset.stream.features else column.partition(".")[0]
    if not source.reads_columns:
        logger.info("%s: reading the column %r once to find the classes", dataset.name, column)
    try:
        stored = Counter(field_of({root: value}, column) for value in source.column(split, root))
    except Exception as error:
        raise UserError(f"the label column of {dataset.name} cannot be read: {one_line(error)}") from error
    counted: Counter[str | None] = Counter()
    for value, count in stored.items():
        counted[class_key(value)] += count
    return counted


def _classes_found(dataset: ImageDataset, counted: Counter[str | None]) -> Classes:
    column, keys, count = dataset.label_column, {key for key in counted if key is not None}, counted.total()
    if not keys:
        raise UserError(f"the label column {column!r} of {dataset.name} is empty")
    if len(keys) > count * (1 / 2 if count >= _MANY else 9 / 10) and count >= _SOME:
        raise UserError(
            f"the column {column!r} of {dataset.name} has {len(keys)} different values in {count} rows, so it is no "
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


def _counting(dataset: ImageDataset, classes: Classes, counted: Counter[str | None] | None) -> ImageDataset:
    """The dataset with its classes and, if they were counted, their images."""
    found = dataclasses.replace(dataset, classes=classes, problem_type="single_label_classification")
    if counted is None:
        return found
    counts = [0] * len(classes.names)
    for key, count in counted.items():
        if key in classes.table:
            counts[classes.table[key]] += count
    number = None if dataset.num_examples is None else sum(counts)
    return dataclasses.replace(
        found, counts=tuple(counts), unlabelled=counted.total() - sum(counts), num_examples=number
    )


def _divide(dataset: ImageDataset, source: Source, split: str, fraction: float) -> tuple[ImageDataset, ImageDataset]:
    """Training and held-out part of a split, by content hash."""
    logger.info("%s has no validation split: holding out %.0f %% of it", dataset.name, 100 * fraction)
    names = (f"{dataset.name} (training part)", f"{dataset.name} {HELD_OUT}")
    parts = source.divide(split, dataset, fraction)
    counts = [part.num_examples for part in parts]
    if 0 in counts:
        raise UserError(
            f"{dataset.name} has {sum(counts)} images, too few to hold out {fraction:.0%} of them: give validation "
            "data (--validation_dir, --validation_split), another --train_val_split, or 0 for no validation"
        )
    train, held_out = (
        dataclasses.replace(dataset, stream=part.stream, num_examples=part.num_examples, name=name)
        for part, name in zip(parts, names, strict=True)
    )
    return train, dataclasses.replace(held_out, unlabelled=0)  # those of the whole are said once
