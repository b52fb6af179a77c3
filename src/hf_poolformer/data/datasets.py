"""Images and labels as streams: opened undecoded, their labels understood, and split.

`open_datasets` finds what there is and what its columns mean; `make_loader` (see `loader.py`) turns one split into
batches. Nothing is decoded before a worker does it, so that one broken image costs one image.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Image
from transformers import PretrainedConfig

from ..foundation.errors import UserError
from .class_names import told_classes
from .classes import Classes, are_placeholders, class_key
from .columns import ImageDataset, few, find_image_column, find_label_columns, find_other_columns, root_of
from .labels import Numbers
from .layouts import open_source
from .sources import Source
from .understanding import PROBLEM_TYPES, Wanted, begins_labelled, first_row, with_labels, with_labels_of


logger = logging.getLogger(__name__)

# Ends the name of what was divided off.
HELD_OUT = "(held-out part)"


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
    problem_type: str = "single_label_classification",
    label_separator: str | None = None,
    label_names: str | None = None,
    counted: bool = False,
    labelled: bool = True,
    other_columns: str | None = None,
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
        label_column_name: of several labels per image, and of numbers, also several columns: names with commas between
            them, or a pattern such as `has_*`.
        classes: what bare integers or texts mean where the dataset does not name its classes; spares the pass over
            the label column that finds them otherwise. Usually those of a checkpoint; of one that answers numbers, the
            names of its targets.
        streaming: False downloads a Hub dataset first; local data is always read where it lies.
        problem_type: what is learned, as a model's config says it: `single_label_classification`,
            `multi_label_classification` or `regression`.
        label_separator: what stands between several names in a text; found where only one of | ; , can be meant.
        label_names: of several labels per image, names of the classes, with commas between them, or a JSON file: what
            integers or places in a vector of zeros and ones mean.
        counted: read the label columns even where the classes are known and that takes reading the whole dataset.
        labelled: False opens and splits the same way, and leaves it to the caller what the columns beside the image
            mean: annotation maps, boxes.
        other_columns: names of columns that are read besides, as `find_other_columns` takes them.

    Raises:
        UserError: nothing there, no images, no labels, an empty split, columns or splits that cannot be told; labels
            of another kind, with the `--task` that learns them.
    """
    fraction = float(train_val_split or 0.0)
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"--train_val_split must lie in [0, 1), not {train_val_split}")
    if (dataset_name is None) == (train_dir is None and validation_dir is None):
        raise UserError("name the data by either --dataset_name or --train_dir / --validation_dir")
    wanted = Wanted(problem_type, classes, label_separator, told_classes(label_names), counted, cache_dir)
    columns = {"image_column_name": image_column_name, "label_column_name": label_column_name, "token": token}
    columns |= {"wanted": wanted if labelled else None, "other_columns": other_columns}
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
        validation = _validation_split(source, validation_split, train, columns)
    if validation is None:
        base = train or (source, _named_split(source, "train", "--validation_split"))
        if fraction > 0.0:
            held_out_from = base
        elif train is None:
            validation = base

    if held_out_from is not None:
        whole = _open_split(*held_out_from, **columns)
        if labelled:
            whole = with_labels(whole, *held_out_from, wanted)
        parts = dict(zip(("train", "validation"), _divide(whole, *held_out_from, fraction), strict=True))
        return parts if train is not None else {"validation": parts["validation"]}
    parts = {name: part for name, part in (("train", train), ("validation", validation)) if part is not None}
    opened = {name: _open_split(*part, **columns) for name, part in parts.items()}
    if not labelled:
        return opened
    for name, dataset in opened.items():
        if name == "validation" and train is not None:
            understood = with_labels_of(dataset, *validation, wanted, opened["train"])
            numbers = {label: index for index, label in enumerate(opened["train"].label_names)}
            opened[name] = align_labels(understood, numbers, subset=True, whose=opened["train"].name)
        else:
            opened[name] = with_labels(dataset, *parts[name], wanted)
    return opened


class OpenedSplit(NamedTuple):
    """A split with where it comes from.

    Attributes:
        source, name: what opened it, and what it is called there.
        remarks: why it has no labels, or others than training would take, in words.
    """

    dataset: ImageDataset
    source: Source
    name: str
    remarks: tuple[str, ...] = ()


def open_every_split(
    *,
    dataset_name: str | os.PathLike | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | os.PathLike | None = None,
    validation_dir: str | os.PathLike | None = None,
    train_split: str | None = "train",
    validation_split: str | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    streaming: bool = True,
    problem_type: str | None = None,
    label_separator: str | None = None,
    label_names: str | None = None,
) -> dict[str, OpenedSplit]:
    """Opens all that is there, to be looked at: every split in stored order, for one reader.

    What training refuses is no error here: a split whose labels are missing, or cannot be understood, is opened
    without them, and its remarks say why. The classes are those of the training split, as far as it knows them.

    Args:
        problem_type: as `open_datasets` takes it; None for the first of one class, several and numbers that the
            columns allow.
        others: as of `open_datasets`.

    Raises:
        UserError: nothing there, no images, all splits empty.
    """
    if (dataset_name, train_dir, validation_dir) == (None, None, None) or None not in (dataset_name, train_dir):
        raise UserError("name the data by either --dataset_name or --train_dir, or --validation_dir alone")
    where = {"extra_splits": tuple(filter(None, (train_split, validation_split))), "cache_dir": cache_dir}
    places: dict[str, tuple[Source, str]] = {}
    main = None
    if dataset_name is not None or train_dir is not None:
        remote = {"config_name": dataset_config_name, "revision": revision, "token": token, "streaming": streaming}
        source = open_source(dataset_name, **remote, **where) if train_dir is None else open_source(train_dir, **where)
        places = {split: (source, split) for split in source.splits}
        main = source.split_named(train_split or "train")
    if validation_dir is not None:
        places["validation"] = (open_source(validation_dir, whole=True, **where), "train")
    names = sorted(places, key=lambda split: split != main)  # what the classes are, training data says first
    columns = {"image_column_name": image_column_name, "token": token, "shared": False}
    kinds = PROBLEM_TYPES if problem_type is None else (problem_type,)
    told = told_classes(label_names)
    opened: dict[str, OpenedSplit] = {}
    empty: list[str] = []
    train: ImageDataset | None = None
    for split in names:
        source, name = places[split]
        try:
            plain = _open_split(source, name, **columns)
        except UserError as error:
            if len(names) == 1 or not str(error).endswith("is empty"):
                raise
            empty.append(split)
            continue
        remarks = []
        if train is not None:
            kinds = (train.problem_type,)
        for kind in kinds:
            wanted = Wanted(kind, separator=label_separator, told=told, cache_dir=cache_dir)
            try:
                named = _open_split(source, name, **columns, label_column_name=label_column_name, wanted=wanted)
                if train is not None:
                    with contextlib.suppress(UserError):
                        opened[split] = OpenedSplit(with_labels_of(named, source, name, wanted, train), source, name)
                        break
                opened[split] = OpenedSplit(with_labels(named, source, name, wanted), source, name)
                break
            except UserError as error:
                remarks.append(str(error))
        else:
            opened[split] = OpenedSplit(plain, source, name, (f"read without labels: {remarks[0]}",))
        if train is None and opened[split].dataset.storage is not None:
            train = opened[split].dataset
    if not opened:
        raise UserError(f"{few(sorted(empty))}: every split is empty")
    return {split: opened[split] for split in places if split in opened}


def open_images(
    location: str | os.PathLike,
    *,
    split: str | None = None,
    image_column_name: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    answered_by: PretrainedConfig | None = None,
) -> ImageDataset:
    """Opens the images of one split, labels or not, in stored order: for prediction.

    Args:
        location: as `dataset_name` of `open_datasets`.
        split: by default everything there is of local data, and the only split of a Hub dataset.
        answered_by: of a model whose `problem_type` says what it answers: the same images with such labels, in its
            numbering.

    Raises:
        UserError: nothing there, or no image; with `answered_by`, no such labels.
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
    if answered_by is None:
        return _open_split(source, name, image_column_name=image_column_name, token=token)
    wanted = Wanted(answered_by.problem_type, Classes.of_config(answered_by), cache_dir=cache_dir)
    dataset = _open_split(source, name, image_column_name=image_column_name, token=token, wanted=wanted)
    return align_labels(with_labels(dataset, source, name, wanted), answered_by.label2id, subset=True)


def align_labels(
    dataset: ImageDataset, label2id: Mapping[str, int], *, subset: bool = False, whose: str = "the checkpoint"
) -> ImageDataset:
    """Renumbers a dataset's labels to the indices of a checkpoint that knows the same names in another order.

    Targets of regression are brought into the checkpoint's order. Single targets are taken for each other, whatever
    their names.

    A checkpoint whose names are the placeholders `LABEL_0`, `LABEL_1`, ... is taken by position.

    Args:
        label2id: a model config's.
        subset: the dataset may lack some of the checkpoint's classes.
        whose: what messages call the owner of `label2id`.

    Raises:
        UserError: the label sets differ.
    """
    names = [name for name, _ in sorted(label2id.items(), key=lambda item: int(item[1]))]
    own = dataset.label_names
    if own is None or own == names:
        return dataset
    if len(names) == len(own) and are_placeholders(names):
        logger.info("the checkpoint has no class names: those of %s are taken in their order", dataset.name)
        return dataset
    ours, theirs = ({class_key(name): name for name in group} for group in (own, names))
    foreign = [name for key, name in ours.items() if key not in theirs]
    absent = [name for key, name in theirs.items() if key not in ours]
    if dataset.classes is None and len(names) == len(own) == 1:
        logger.warning("%s: the column %r is taken for %s's %r", dataset.name, own[0], whose, names[0])
        return dataclasses.replace(dataset, target_names=tuple(names))
    if dataset.counts is not None:  # a name that no image has does no harm
        foreign = [name for name in foreign if dataset.counts[dataset.classes.names.index(name)]]
    if foreign or (absent and not (subset and dataset.classes is not None)):
        raise UserError(
            f"{dataset.name} has other labels than {whose}: {few(dataset.label_names)} against {few(names)}; only "
            f"in the dataset: {few(sorted(foreign))}, only in {whose}: {few(sorted(absent))}"
        )
    if absent and dataset.problem_type == "multi_label_classification":
        logger.warning("%s says nothing of %s: its images count as having none of them", dataset.name, few(absent))
    return _reordered(dataset, names) if dataset.classes is None else _renumbered(dataset, names)


def _reordered(dataset: ImageDataset, names: Sequence[str]) -> ImageDataset:
    """With its targets in the order of `names`."""
    keys = [class_key(name) for name in dataset.target_names]
    places = [keys.index(class_key(name)) for name in names]

    def moved(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return None if values is None else tuple(values[place] for place in places)

    return dataclasses.replace(
        dataset,
        storage=Numbers(moved(dataset.storage.order)),
        target_names=tuple(names),
        target_mean=moved(dataset.target_mean),
        target_std=moved(dataset.target_std),
        target_range=moved(dataset.target_range),
    )


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
    source: Source, name: str | None, train: tuple[Source, str] | None, columns: Mapping[str, Any]
) -> tuple[Source, str] | None:
    if name:
        return source, _named_split(source, name, "--validation_split")
    used = train[1] if train is not None else None
    validation = source.split_named("validation")
    if validation is not None and validation != used:
        return source, validation
    test = source.split_named("test")
    if test is None or test == used:
        return None
    if columns["wanted"] is None:
        return source, test
    # Public test splits often come without labels, or with -1 in their place.
    dataset = _open_split(source, test, **columns)
    if not begins_labelled(dataset):
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
    wanted: Wanted | None = None,
    shared: bool = True,
    other_columns: str | None = None,
) -> ImageDataset:
    """A split with its columns found; labels not looked at yet, and their columns not looked for unless `wanted`.

    Args:
        shared: as of `Source.columns`.
    """
    name = f"{source.name} ({split})" if len(source.splits) > 1 else source.name
    opened = source.open(split)
    stream = opened.stream
    if stream.features is None:
        stream = stream._resolve_features()
    if not stream.features:
        raise UserError(f"{name} is empty")
    image_column = find_image_column(stream.features, image_column_name, name)
    labels, unread = (), ()
    if wanted is not None:
        named = label_column_name or source.label_column
        labels = find_label_columns(stream.features, named, name, wanted.problem_type, wanted.answers)
    others = () if other_columns is None else find_other_columns(stream.features, other_columns, name)
    if labels:
        roots = (root_of(stream.features, column) for column in (*labels, *others))
        read = list(dict.fromkeys([image_column, *roots]))
        unread = tuple(column for column in stream.features if column not in read)
        stream = source.columns(split, read, shared)
    # Annotation maps as well: a broken one would end its shard where a filter decodes it.
    pictures = [column for column, feature in stream.features.items() if isinstance(feature, Image)]
    for column in {image_column, *pictures}:
        stream = stream.cast_column(column, Image(decode=False))
    dataset = ImageDataset(
        stream=stream,
        image_column=image_column,
        label_columns=labels,
        problem_type=None if wanted is None else wanted.problem_type,
        num_examples=opened.num_examples,
        name=name,
        token=token,
        other_columns=others,
        unread_columns=unread,
        split=split,
        origin=source.split_origin(split),
        left_out=dict(source.left_out),  # which goes to data workers
        class_names=source.class_names,
        local=source.local,
    )
    first_row(dataset)
    return dataset


def whole_split(dataset: ImageDataset) -> str | None:
    """The name at its source of the split that a dataset is; None if it is what was held out of one."""
    return None if dataset.name.endswith(HELD_OUT) else dataset.split


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
