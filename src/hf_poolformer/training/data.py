"""Images and labels as streams: opened undecoded, split, sharded once, decoded in the workers, batched.

`open_datasets` finds what there is and what its columns mean; `make_loader` turns one split into batches. Nothing is
decoded before a worker does it, so that one broken image costs one image.
"""

import contextlib
import dataclasses
import inspect
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Image, IterableDataset, Value
from datasets.distributed import split_dataset_by_node
from PIL import Image as PILImage
from torch.utils.data import DataLoader, default_collate, get_worker_info

from .decoding import BrokenImage, decode_image, describe_source, read_bytes
from .errors import UserError
from .files import one_line
from .sources import FolderSource, Source, content_key, is_held_out, open_source
from .workers import prepare_worker


logger = logging.getLogger(__name__)

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
_LABEL_NAMES = ("label", "labels", "cls", "class", "target", "category", "fine_label", "class_label", "label_name")
_CAPTION_NAMES = ("cls.txt", "txt")  # a tar without .cls may keep the class name in .txt
# Counting after a split by content means reading everything once; worth it up to this size.
_CHEAP_TO_READ = 1 << 30
# A share of broken images says nothing before this many were seen.
_MIN_SEEN = 64


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """One split: a stream of undecoded images, and what its columns mean.

    Attributes:
        stream: rows; the image column holds `{"bytes", "path"}`.
        label_column: None if unlabelled; `json.label` means the field `label` of the column `json`.
        label_names: class names by index; None for unlabelled images and for regression.
        label_ids: stored label -> class index; None where the stored integers are the indices.
        problem_type: as in a model's config; None if unlabelled.
        num_examples: exact if known, else None.
        name: what messages call it.
        token: Hub token, for rows that name remote files.
    """

    stream: IterableDataset
    image_column: str
    label_column: str | None
    label_names: list[str] | None
    num_examples: int | None
    label_ids: Mapping[Any, int] | None = None
    problem_type: str | None = None
    name: str = "dataset"
    token: str | bool | None = None

    @property
    def num_labels(self) -> int | None:
        """Outputs a model needs for these labels: classes, or 1 for regression."""
        if self.label_names is not None:
            return len(self.label_names)
        return 1 if self.problem_type == "regression" else None


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
    label_names: list[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    streaming: bool = True,
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
        label_names: names of the classes where the dataset stores bare integers or strings; spares the pass over
            the label column that finds them otherwise. Usually those of a checkpoint.
        streaming: False downloads a Hub dataset first; local data is always read where it lies.

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
        validation = _validation_split(source, validation_split, train, image_column_name, label_column_name)
    if validation is None:
        base = train or (source, _named_split(source, "train", "--validation_split"))
        if fraction > 0.0:
            held_out_from = base
        elif train is None:
            validation = base

    columns = {"image_column_name": image_column_name, "label_column_name": label_column_name, "token": token}
    opened: dict[str, ImageDataset] = {}
    if held_out_from is not None:
        whole = _open_split(*held_out_from, **columns)
        whole = _with_labels(whole, *held_out_from, label_names)
        parts = _divide(whole, *held_out_from, fraction)
        opened = dict(zip(("train", "validation"), parts, strict=True))
        if train is None:
            del opened["train"]
        return opened
    if train is not None:
        opened["train"] = _with_labels(_open_split(*train, **columns), *train, label_names)
    if validation is not None:
        dataset = _open_split(*validation, **columns)
        if "train" in opened:
            opened["validation"] = _with_labels_of(dataset, opened["train"])
        else:
            opened["validation"] = _with_labels(dataset, *validation, label_names)
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
    return _open_split(source, name, image_column_name=image_column_name, label_column_name=None, token=token)


def align_labels(dataset: ImageDataset, label2id: Mapping[str, int], *, subset: bool = False) -> ImageDataset:
    """Renumbers a dataset's labels to the indices of a checkpoint that knows the same names in another order.

    A checkpoint whose names are the placeholders `LABEL_0`, `LABEL_1`, ... is taken by position.

    Args:
        label2id: a model config's.
        subset: the dataset may lack some of the checkpoint's classes.

    Raises:
        UserError: the label sets differ.
    """
    if dataset.label_names is None:
        return dataset
    names = [name for name, _ in sorted(label2id.items(), key=lambda item: int(item[1]))]
    indices = {name: int(index) for name, index in label2id.items()}
    if dataset.label_names == names:
        return dataset
    if len(names) == len(dataset.label_names) and set(names) == {f"LABEL_{index}" for index in range(len(names))}:
        logger.info("the checkpoint has no class names: those of %s are taken in their order", dataset.name)
        return dataset
    ours = set(dataset.label_names)
    if ours - indices.keys() or (indices.keys() - ours and not subset):
        raise UserError(
            f"{dataset.name} has other labels than the checkpoint: {_some(dataset.label_names)} "
            f"against {_some(names)}; only in the dataset: {_some(sorted(ours - indices.keys()))}, only in the "
            f"checkpoint: {_some(sorted(indices.keys() - ours))}"
        )
    stored = dataset.label_ids or {index: index for index in range(len(dataset.label_names))}
    return dataclasses.replace(
        dataset,
        label_names=names,
        label_ids={value: indices[dataset.label_names[index]] for value, index in stored.items()},
    )


def make_loader(
    dataset: ImageDataset,
    transform: Callable[[PILImage.Image], torch.Tensor],
    *,
    batch_size: int,
    training: bool,
    num_workers: int = 0,
    seed: int = 0,
    epoch: int = 0,
    shuffle_buffer_size: int = 1000,
    process_index: int = 0,
    num_processes: int = 1,
    max_skipped: float | int = 0.05,
    drop_last: bool | None = None,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
) -> "ImageLoader":
    """Batches of one process's share of a labelled dataset.

    Yields `{"pixel_values": (B, C, H, W), "labels": (B,), "skipped": [str, ...]}`: labels are int64 class indices, or
    float32 for regression; `skipped` describes the broken images met since the batch before. When training, the
    stream is shuffled, anew at each `set_epoch`, and an incomplete last batch is dropped unless it is the only one.

    The shares of the processes are disjoint and complete but not always equally long: whoever reduces gradients over
    processes must stop all of them when the first runs out. They are made here, once: do not pass the loader through
    `accelerator.prepare`.

    Args:
        transform: RGB image to a tensor (C, H, W) of fixed size; runs in the workers. When training, torch's, numpy's
            and Python's global generators are seeded for each image from `seed`, epoch and position.
        num_workers: upper limit; no more are started than this process has shards.
        shuffle_buffer_size: undecoded images held by each worker.
        max_skipped: the run stops when more than this fraction (float) or number (int) of an epoch's images is
            broken. 1.0 never stops it, 0 does at the first.
        drop_last: overrides the rule above.

    Raises:
        UserError: from the loader's iteration too: too many broken images, a label outside the range, nothing to read.
    """
    if dataset.label_column is None:
        raise UserError(f"{dataset.name} has no labels")
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"a batch needs at least one image and zero workers, not {batch_size} and {num_workers}")
    stream = dataset.stream.select_columns(_columns_needed(dataset))
    if stream.num_shards < max(num_workers, 1) * num_processes and hasattr(stream, "reshard"):
        stream = stream.reshard()  # Parquet: by row group instead of by file
    if training:
        # Newer releases of datasets read ten shards at once, in threads, and sleep for five seconds at the end of each
        # epoch until Arrow lets go of them: an epoch of a small dataset takes less. Shards are shuffled either way.
        one_by_one = "max_buffer_input_shards" in inspect.signature(stream.shuffle).parameters
        stream = stream.shuffle(
            seed=seed,
            buffer_size=max(1, shuffle_buffer_size),
            **({"max_buffer_input_shards": 1} if one_by_one else {}),
        )
    num_shards = stream.num_shards
    stream = split_dataset_by_node(stream, rank=process_index, world_size=num_processes)
    usable = min(num_workers, stream.num_shards)
    if process_index == 0 and num_processes > 1 and num_shards % num_processes:
        logger.info(
            "%s: %d shards do not divide among %d processes, so each reads all of them and keeps every %dth image",
            dataset.name,
            num_shards,
            num_processes,
            num_processes,
        )
    if process_index == 0 and usable < num_workers:
        logger.info(
            "%s: %d data workers per process instead of %d, one for each of its %d shards",
            dataset.name,
            usable,
            num_workers,
            stream.num_shards,
        )
    images = _DecodedBatches(dataset, stream, transform, batch_size, training, seed, process_index)
    loader = ImageLoader(
        images,
        max_skipped=max_skipped,
        drop_last=training if drop_last is None else drop_last,
        num_workers=usable,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),  # else every epoch draws from the model's
        **({"prefetch_factor": prefetch_factor, "persistent_workers": True} if usable else {}),
    )
    loader.set_epoch(epoch)
    return loader


class ImageLoader(DataLoader):
    """What `make_loader` returns: a DataLoader that counts broken images and reports errors without a traceback.

    Attributes:
        seen: images met by this process in the current epoch, broken ones included.
        skipped: how many of them were broken.
    """

    def __init__(self, images: "_DecodedBatches", *, max_skipped: float | int, drop_last: bool, **arguments: Any):
        # Workers put batches together themselves: batch_size None, and nothing left to collate here.
        super().__init__(images, batch_size=None, collate_fn=_as_is, worker_init_fn=prepare_worker, **arguments)
        self._images = images
        self._max_skipped = max_skipped
        self._drop_incomplete = drop_last
        self.seen = 0
        self.skipped = 0
        self._examples: list[str] = []

    def set_epoch(self, epoch: int) -> None:
        """Chooses the shuffle order and the augmentations of the next iteration."""
        self._images.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.seen = self.skipped = 0
        self._examples = []
        held: dict[str, Any] | None = None  # one batch behind, so that late broken images still find one to go with
        pending: list[str] = []
        incomplete: list[dict[str, Any]] = []  # each worker ends with one; together they may fill batches
        for message in super().__iter__():
            self._account(message)
            pending += message["skipped"]
            if "pixel_values" not in message:
                continue
            if len(message["labels"]) < self._images.batch_size:
                incomplete.append(message)
                continue
            if held is not None:
                yield held
            held, pending = {**message, "skipped": pending}, []
            del held["seen"]
        for batch in self._complete(incomplete, only=held is None):
            if held is not None:
                yield held
            held, pending = {**batch, "skipped": pending}, []
        if held is None:
            self._explain_nothing()
            return
        held["skipped"] = held["skipped"] + pending
        yield held

    def _complete(self, incomplete: list[dict[str, Any]], only: bool) -> Iterator[dict[str, torch.Tensor]]:
        if not incomplete:
            return
        size = self._images.batch_size
        pixel_values = torch.cat([message["pixel_values"] for message in incomplete])
        labels = torch.cat([message["labels"] for message in incomplete])
        for start in range(0, len(labels), size):
            if len(labels) - start < size and self._drop_incomplete and not (only and start == 0):
                return
            yield {"pixel_values": pixel_values[start : start + size], "labels": labels[start : start + size]}

    def _account(self, message: dict[str, Any]) -> None:
        if "error" in message:
            raise UserError(message["error"])
        self.seen += message["seen"]
        self.skipped += len(message["skipped"])
        self._examples += message["skipped"][: 5 - len(self._examples)]
        counted = isinstance(self._max_skipped, int)
        limit = self._max_skipped if counted else self._max_skipped * self.seen
        if self.skipped > limit and (counted or self.seen >= _MIN_SEEN):
            raise UserError(
                f"{self.skipped} of the first {self.seen} images of {self._images.name} are broken, more than "
                f"{self._max_skipped if counted else format(self._max_skipped, '.1%')} is allowed: "
                f"{'; '.join(self._examples)}"
            )

    def _explain_nothing(self) -> None:
        if self.skipped:
            raise UserError(
                f"none of the {self.seen} images of {self._images.name} can be read: {'; '.join(self._examples)}"
            )
        # A process may be left without a share; the only process is not.
        if self._images.num_processes == 1:
            raise UserError(f"{self._images.name} is empty")


class _DecodedBatches(torch.utils.data.IterableDataset):
    """Runs in the workers: takes rows from the stream, which shards itself there, and yields messages.

    A message holds `skipped` and `seen` since the one before, and a batch if there is one; or an `error`. All that
    decides what comes next is the stream's state, `position` and the examples in the making, so that a saved
    state of these resumes exactly.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        stream: IterableDataset,
        transform: Callable[[PILImage.Image], torch.Tensor],
        batch_size: int,
        training: bool,
        seed: int,
        process_index: int,
    ):
        self.name = dataset.name
        self.batch_size = batch_size
        distributed = stream._distributed
        self.num_processes = distributed.world_size if distributed else 1
        self._dataset = dataclasses.replace(dataset, stream=stream)
        self._transform = transform
        self._training = training
        self._seed = seed
        self._process_index = process_index
        # Shared memory: workers that outlive an epoch see the next one's number.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        self._dataset.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_id = worker.id if worker is not None else 0
        pixels: list[torch.Tensor] = []
        labels: list[int | float] = []
        skipped: list[str] = []
        seen = 0
        rows = iter(self._dataset.stream)
        position = -1
        while True:
            position += 1
            try:
                row = next(rows, None)
            except Exception as error:
                # Whatever the storage raises: said in one line by the loader, not as a worker's traceback.
                yield {"error": f"reading {self.name} failed after {position} images: {one_line(error)}"}
                return
            if row is None:
                break
            seen += 1
            try:
                label = self._label(row)
                image = decode_image(row[self._dataset.image_column], token=self._dataset.token)
            except BrokenImage as reason:
                skipped.append(f"{self._describe(row, worker_id, position)}: {reason}")
                continue
            except UserError as error:
                yield {"error": f"{self._describe(row, worker_id, position)} of {self.name}: {error}"}
                return
            if self._training:
                seed = (self._seed, int(self._epoch), self._process_index, worker_id, position)
                with _seeded(seed, restore=worker is None):
                    pixels.append(self._transform(image))
            else:
                pixels.append(self._transform(image))
            labels.append(label)
            if len(labels) == self.batch_size:
                yield {**self._batch(pixels, labels), "skipped": skipped, "seen": seen}
                pixels, labels, skipped, seen = [], [], [], 0
        if seen:
            batch = self._batch(pixels, labels) if labels else {}
            yield {**batch, "skipped": skipped, "seen": seen}

    def _batch(self, pixels: list[torch.Tensor], labels: list[int | float]) -> dict[str, torch.Tensor]:
        dtype = torch.float32 if self._dataset.problem_type == "regression" else torch.int64
        # default_collate stacks straight into shared memory when it runs in a worker.
        return {"pixel_values": default_collate(pixels), "labels": torch.tensor(labels, dtype=dtype)}

    def _label(self, row: Mapping[str, Any]) -> int | float:
        dataset = self._dataset
        value = _field(row, dataset.label_column)
        if value is None:
            raise BrokenImage("it has no label")
        if dataset.problem_type == "regression":
            if not math.isfinite(value):
                raise BrokenImage(f"its label is {value}")
            return float(value)
        value = _label_key(value)
        if dataset.label_ids is not None:
            index = dataset.label_ids.get(value)
            if index is None:
                raise UserError(_unlabelled() if value == -1 else f"label {value!r} is none of the known ones")
            return index
        if value == -1:
            raise UserError(_unlabelled())
        num_labels = len(dataset.label_names)
        if not 0 <= value < num_labels:
            raise UserError(f"label {value} lies outside 0..{num_labels - 1}")
        return value

    def _describe(self, row: Mapping[str, Any], worker_id: int, position: int) -> str:
        path = describe_source(row[self._dataset.image_column])
        return path or f"image {position} of worker {worker_id} in process {self._process_index}"


def _named_split(source: Source, wanted: str, flag: str) -> str:
    found = source.split_named(wanted)
    if found is None:
        raise UserError(
            f"{source.name} has no split {wanted!r}, only {_some(source.splits)}: choose one of these with {flag}"
        )
    return found


def _only_split(source: Source, flag: str) -> str:
    if len(source.splits) != 1:
        raise UserError(f"{source.name} has several splits, {_some(source.splits)}: choose one with {flag}")
    return source.splits[0]


def _validation_split(
    source: Source,
    wanted: str | None,
    train: tuple[Source, str] | None,
    image_column_name: str | None,
    label_column_name: str | None,
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
    # Public test splits often come without labels, or with -1 in their place.
    dataset = _open_split(
        source, test, image_column_name=image_column_name, label_column_name=label_column_name, token=None
    )
    label = _field(_first_row(dataset), dataset.label_column) if dataset.label_column else None
    if label is None or label == -1:
        logger.info("%s is unlabelled and not used for validation", dataset.name)
        return None
    logger.info("%s has no validation split: evaluating on %r", source.name, test)
    return source, test


def _open_split(
    source: Source,
    split: str,
    *,
    image_column_name: str | None,
    label_column_name: str | None,
    token: str | bool | None,
) -> ImageDataset:
    """A split with its columns found; labels not looked at yet."""
    name = f"{source.name} ({split})" if len(source.splits) > 1 else source.name
    opened = source.open(split)
    stream = opened.stream
    if stream.features is None:
        stream = stream._resolve_features()
    if not stream.features:
        raise UserError(f"{name} is empty")
    image_column = _image_column(stream.features, image_column_name, name)
    dataset = ImageDataset(
        stream=stream.cast_column(image_column, Image(decode=False)),
        image_column=image_column,
        label_column=_label_column(stream.features, label_column_name, name),
        label_names=None,
        num_examples=opened.num_examples,
        name=name,
        token=token,
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


def _image_column(features: datasets.Features, wanted: str | None, name: str) -> str:
    if wanted is not None:
        if wanted not in features:
            raise UserError(f"{name} has no column {wanted!r} (--image_column_name), only {_columns(features)}")
        return wanted
    by_type = [column for column, feature in features.items() if isinstance(feature, Image)]
    if not by_type:  # Parquet written without datasets: plain bytes, or a struct of bytes and path
        by_type = [
            column
            for column, feature in features.items()
            if (isinstance(feature, dict) and "bytes" in feature)
            or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"))
        ]
    return _choose(by_type, _IMAGE_NAMES[:1], "image", features, name) or _missing("image", features, name)


def _label_column(features: datasets.Features, wanted: str | None, name: str) -> str | None:
    if wanted is not None:
        if wanted not in features and _feature(features, wanted) is None:
            raise UserError(f"{name} has no column {wanted!r} (--label_column_name), only {_columns(features)}")
        return wanted
    typed = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    if typed:
        return _choose(typed, _LABEL_NAMES[:2], "label", features, name)
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
                and isinstance(_feature(features, column), Value)
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
            logger.info("%s has several %s columns, %s: using %r", name, kind, _some(candidates), column)
            return column
    raise UserError(
        f"{name} has several {kind} columns, {_some(candidates)}: choose one with --{kind}_column_name "
        f"(columns: {_columns(features)})"
    )


def _missing(kind: str, features: datasets.Features, name: str) -> Any:
    raise UserError(
        f"{name} has no {kind} column that could be told by its type; its columns are {_columns(features)}: "
        f"name one with --{kind}_column_name"
    )


def _feature(features: Mapping[str, Any], column: str) -> Any:
    if column in features:
        return features[column]
    parent, _, field = column.partition(".")
    inside = features.get(parent)
    return inside.get(field) if isinstance(inside, dict) else None


def _field(row: Mapping[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    parent, _, field = column.partition(".")
    return (row.get(parent) or {}).get(field)


def _columns_needed(dataset: ImageDataset) -> list[str]:
    label_column = dataset.label_column
    if label_column not in dataset.stream.features:
        label_column = label_column.partition(".")[0]
    return [dataset.image_column, label_column]


def _label_key(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip()
    return int(value) if isinstance(value, bool | np.integer) else value


def _with_labels(dataset: ImageDataset, source: Source, split: str, label_names: list[str] | None) -> ImageDataset:
    """Finds out what the labels are: from ClassLabel, from the names given, or by one pass over the column."""
    column = dataset.label_column
    if column is None:
        _missing("label", dataset.stream.features, dataset.name)
    feature = _feature(dataset.stream.features, column)
    if isinstance(feature, ClassLabel):
        names, label_ids = list(feature.names), None
    elif not isinstance(feature, Value):
        raise UserError(
            f"the label column {column!r} of {dataset.name} holds {_kind(feature)}; a class index, a class name or a "
            "number for regression is needed"
        )
    elif feature.dtype.startswith("float"):
        return dataclasses.replace(dataset, problem_type="regression")
    elif label_names is not None:
        names = list(label_names)
        label_ids = {name: index for index, name in enumerate(names)} if "string" in feature.dtype else None
    else:
        names, label_ids = _labels_by_pass(dataset, source, split)
    first = _field(_first_row(dataset), column)
    if first == -1:
        raise UserError(f"{dataset.name}: {_unlabelled()}")
    if len(names) < 2 and label_names is None:
        raise UserError(f"{dataset.name} has a single class, {_some(names)}: there is nothing to tell apart")
    return dataclasses.replace(
        dataset, label_names=names, label_ids=label_ids, problem_type="single_label_classification"
    )


def _labels_by_pass(dataset: ImageDataset, source: Source, split: str) -> tuple[list[str], dict[Any, int] | None]:
    column = dataset.label_column
    logger.info("%s: reading the column %r once to find the classes", dataset.name, column)
    root = column if column in dataset.stream.features else column.partition(".")[0]
    values, count = set(), 0
    try:
        for value in source.column(split, root):
            count += 1
            value = _label_key(_field({root: value}, column))
            if value is not None:
                values.add(value)
    except Exception as error:
        raise UserError(f"the label column of {dataset.name} cannot be read: {one_line(error)}") from error
    if not values:
        raise UserError(f"the label column {column!r} of {dataset.name} is empty")
    if -1 in values:
        raise UserError(f"{dataset.name}: {_unlabelled()}")
    if count >= 100 and len(values) > count / 2:
        raise UserError(
            f"the column {column!r} of {dataset.name} has {len(values)} different values in {count} rows, so it is no "
            "class label: name the right one with --label_column_name"
        )
    ordered = sorted(values)
    label_ids = {value: index for index, value in enumerate(ordered)}
    identity = all(value == index for value, index in label_ids.items())
    return [str(value) for value in ordered], None if identity else label_ids


def _with_labels_of(dataset: ImageDataset, train: ImageDataset) -> ImageDataset:
    """Gives the validation split the numbering of the training split, by name."""
    if dataset.label_column is None:
        _missing("label", dataset.stream.features, dataset.name)
    known = dataclasses.replace(dataset, problem_type=train.problem_type)
    feature = _feature(dataset.stream.features, dataset.label_column)
    if train.problem_type != "regression" and isinstance(feature, ClassLabel):
        label2id = {name: index for index, name in enumerate(train.label_names)}
        known = align_labels(dataclasses.replace(known, label_names=list(feature.names)), label2id, subset=True)
    else:
        known = dataclasses.replace(known, label_names=train.label_names, label_ids=train.label_ids)
    if _field(_first_row(dataset), dataset.label_column) == -1 and train.problem_type != "regression":
        raise UserError(f"{dataset.name}: {_unlabelled()}")
    return known


def _divide(dataset: ImageDataset, source: Source, split: str, fraction: float) -> tuple[ImageDataset, ImageDataset]:
    """Training and held-out part of a split, by content hash."""
    logger.info("%s has no validation split: holding out %.0f %% of it", dataset.name, 100 * fraction)
    names = (f"{dataset.name} (training part)", f"{dataset.name} (held-out part)")
    if isinstance(source, FolderSource):
        streams, counts = zip(
            *((part.stream, part.num_examples) for part in source.divide(split, fraction)), strict=True
        )
    else:
        stream = dataset.stream
        image = _first_row(dataset)[dataset.image_column]
        if image is not None and image["bytes"] is None:
            stream = stream.map(_Fetch(dataset.image_column, dataset.token), features=stream.features)
        choose = [_InPart(fraction, held_out) for held_out in (False, True)]
        streams = [stream.filter(part, input_columns=[dataset.image_column]) for part in choose]
        counts = (None, None)
        if source.local_bytes is not None and source.local_bytes <= _CHEAP_TO_READ:
            images = stream.select_columns([dataset.image_column])
            verdicts = [choose[1](row[dataset.image_column]) for row in images]
            counts = (len(verdicts) - sum(verdicts), sum(verdicts))
    if 0 in counts:
        raise UserError(
            f"{dataset.name} has {sum(counts)} images, too few to hold out {fraction:.0%} of them: give validation "
            "data (--validation_dir, --validation_split), another --train_val_split, or 0 for no validation"
        )
    train, held_out = (
        dataclasses.replace(dataset, stream=stream, num_examples=count, name=name)
        for stream, count, name in zip(streams, counts, names, strict=True)
    )
    return train, held_out


class _InPart:
    """Filter: the rows that belong to the held-out part, or to the rest."""

    def __init__(self, fraction: float, held_out: bool):
        self._fraction = fraction
        self._held_out = held_out

    def __call__(self, image: Mapping[str, Any] | None) -> bool:
        data = (image or {}).get("bytes")
        if data is None:
            data = (describe_source(image) or "").encode(errors="surrogateescape")
        return is_held_out(content_key(data), self._fraction) is self._held_out


class _Fetch:
    """Map: puts the bytes of a file into the row that names it, so that hashing and decoding read it once."""

    def __init__(self, image_column: str, token: str | bool | None):
        self._image_column = image_column
        self._token = token

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        image = row[self._image_column]
        if image is None or image["bytes"] is not None or image["path"] is None:
            return row
        with contextlib.suppress(Exception):  # left as it is, the decoder will meet the same error and report it
            row[self._image_column] = {**image, "bytes": read_bytes(image["path"], self._token)}
        return row


@contextlib.contextmanager
def _seeded(seed: tuple[int, ...], restore: bool) -> Iterator[None]:
    """Global generators of the CPU seeded for one image. `restore` gives the main process its own state back."""
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate()) if restore else None
    first, second = np.random.SeedSequence(seed).generate_state(2, np.uint64)
    torch.default_generator.manual_seed(int(first >> np.uint64(1)))  # not torch.manual_seed: that reseeds the GPU too
    np.random.seed(int(second) & 0xFFFFFFFF)
    random.seed(int(second))
    try:
        yield
    finally:
        if states is not None:
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])


def _as_is(message: Any) -> Any:
    return message


def _unlabelled() -> str:
    return "label -1, which stands for `no label` in test splits: choose another split"


def _kind(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def _columns(features: Mapping[str, Any]) -> str:
    return _some([f"{column} ({_kind(feature)})" for column, feature in features.items()], limit=20)


def _some(items: list[str], limit: int = 5) -> str:
    shown = ", ".join(map(str, items[:limit])) or "none"
    return shown if len(items) <= limit else f"{shown}, ... ({len(items)} in all)"
