"""A look at the first annotations of a split before anything is trained on them.

What is wrong with all of them breaks none: masks of 0 and 255, boxes in other units, masks without a pixel train, and
only the result says nothing. Here is what gives them away.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...foundation.errors import UserError, one_line
from ...foundation.names import first_few
from ...foundation.processes import found_by_main
from ...image_processing_dense import IGNORE_INDEX
from ...settings.data import AnnotationSettings
from ..classes import Classes, UnknownClass, class_key, is_number
from ..columns import ImageDataset, columns_needed
from ..decoding import BrokenImage, EncodedImage
from ..loader import skip_limit
from .annotations import (
    EMPTY_MASK,
    NO_CLASS,
    Frame,
    Objects,
    annotated_size,
    as_list,
    classes_of,
    corners_of,
    decode_objects,
    fitted_map,
    polygons_in,
    read_map,
    said_size,
)
from .datasets import DenseDataset


ROWS = 300
# For each split; what is being read is read to its end.
SECONDS = {"train": 1.2, "validation": 0.7}
# Shards that are looked into; of a remote dataset one, since each costs a download.
SHARDS = 8
# Images whose pixels are decoded as well.
DECODED = 4
# More than this part of the annotations is no accident.
MANY = 0.1
# What a box may stick out of its image, as a part of the image's side: rounding, drawing by hand.
MARGIN = 0.05
# How many boxes may do so: if another format fits them all, and if none does, since objects may be cut by the edge.
FEW_OUT, MANY_OUT = 0.05, 0.25


def check_annotations(
    datasets: Mapping[str, DenseDataset], settings: AnnotationSettings
) -> tuple[dict[str, DenseDataset], list[str]]:
    """Looks at annotations of each split; every process calls it, the main process looks for all.

    Returns:
        the datasets, with what only the annotations tell: whether 255 is a class, and which pixels they count; and
        what was seen, in lines for a person.

    Raises:
        UserError: annotations that cannot be meant as they are read.
    """

    def look_at_all() -> tuple[dict[str, tuple[Classes, bool]], list[str]]:
        found, lines, trained = {}, [], None
        for split, dataset in datasets.items():
            looked = look(dataset, settings, SECONDS[split])
            first, *more = looked.judge(trained)
            trained = trained or looked
            found[split] = looked.dataset.classes, looked.dataset.in_stored
            lines += [f"{dataset.images.name}: {first}", *(f"  {line}" for line in more)]
        return found, lines

    found, lines = found_by_main(look_at_all)
    changed = {
        split: dataclasses.replace(dataset.with_classes(found[split][0]), in_stored=found[split][1])
        for split, dataset in datasets.items()
    }
    return changed, lines


def look(dataset: DenseDataset, settings: AnnotationSettings, seconds: float) -> Seen:
    """Reads annotations for a while, from when the first of them is there."""
    seen = (MapsSeen if dataset.fields is None else ObjectsSeen)(dataset, settings)
    deadline = math.inf
    rows = sample(dataset.images)
    while seen.rows < ROWS and time.monotonic() < deadline:
        try:
            row = next(rows, None)
        except Exception as error:  # storage and network: what to do about those, training knows
            seen.trouble = one_line(error)
            break
        if row is None:
            break
        if not seen.rows:
            deadline = time.monotonic() + seconds
        seen.add(row)
    return seen


def sample(images: ImageDataset) -> Iterator[dict[str, Any]]:
    """Rows from several shards, if these are at hand: what belongs together often lies together."""
    stream = images.stream.select_columns(columns_needed(images))
    count = stream.num_shards
    if not images.local or count == 1:
        yield from stream
        return
    spread = [place * count // SHARDS for place in range(SHARDS)]
    for place in dict.fromkeys([*spread, *range(count)]):  # then the others, if these are short
        yield from itertools.islice(stream.shard(num_shards=count, index=place), math.ceil(ROWS / min(count, SHARDS)))


class Seen(abc.ABC):
    """What the annotations of a split look like, counted.

    Attributes:
        rows: annotations looked at.
        broken: what was wrong with those that cannot be used.
    """

    def __init__(self, dataset: DenseDataset, settings: AnnotationSettings):
        self.dataset, self.settings = dataset, settings
        self.name = dataset.images.name
        self.rows = 0
        self.shown_by = "since nothing tells; --annotation_pixels says otherwise"
        self.trouble: str | None = None
        self.broken: list[str] = []
        self.warnings: list[str] = []
        self.turned = 0  # images that EXIF turns
        self.in_stored: Counter[bool] = Counter()  # of these, how many of the annotations tell what they count
        self.images: Counter[int] = Counter()  # by class
        self.nulls = 0

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        images = self.dataset.images
        try:
            with EncodedImage(row[images.image_column], token=images.token) as image:
                if self.rows <= DECODED:
                    image.decode()
                frame = self.dataset.frame(image, row)
            frame = dataclasses.replace(frame, said=said_size(row))
            if self.in_stored and frame.told_by_size:
                frame = dataclasses.replace(frame, in_stored=self.counts_stored_pixels())
            self.turned += frame.orientation > 1
            self.look_at(row[images.label_column], frame)
        except BrokenImage as reason:
            self.broken.append(str(reason))

    @abc.abstractmethod
    def look_at(self, value: Any, frame: Frame) -> None:
        """Counts one annotation."""

    @abc.abstractmethod
    def judge(self, trained: Seen | None) -> list[str]:
        """Completes `dataset` by what its annotations show of their meaning.

        Args:
            trained: what was seen in the training split, if this is another.

        Returns:
            what to say about them.

        Raises:
            UserError: they cannot be meant as they are read.
        """

    def counts_stored_pixels(self, trained: Seen | None = None) -> bool:
        if self.in_stored:
            return self.in_stored[True] >= self.in_stored[False]
        if trained is not None and trained.in_stored:
            self.shown_by = "as in the training split"
            return trained.dataset.in_stored
        return True

    def refuse(self, fault: str) -> None:
        """An error, or a line where the check is to judge nothing."""
        if self.settings.check_annotations:
            raise UserError(f"{fault} (--check_annotations false goes on nevertheless.)")
        self.warnings.append(fault)

    def refuse_broken(self) -> None:
        limit = skip_limit(self.settings.max_skipped)
        allowed = limit * self.rows if isinstance(limit, float) else limit
        # Of a sample more may be broken than of the whole, by chance.
        if len(self.broken) > allowed + (0 if isinstance(limit, int) else 3 * math.sqrt(allowed)):
            reasons = "; ".join(reason for reason, _ in Counter(self.broken).most_common(3))
            self.refuse(
                f"{len(self.broken)} of {self.rows} rows of {self.name} that were looked at cannot be used, more than "
                f"--max_skipped {self.settings.max_skipped:g} allows: {reasons}."
            )

    def turning(self) -> list[str]:
        """What is said about EXIF."""
        if not self.turned:
            return []
        stored = self.dataset.in_stored
        if self.dataset.pixels != "auto":
            stored, why = self.dataset.pixels == "stored", "as --annotation_pixels says"
        elif self.in_stored[stored]:
            why = f"as {self.in_stored[stored]} of them show by size or place"
        else:
            why = self.shown_by
        what = "stored pixels, and turned" if stored else "upright pixels"
        lines = [
            f"{self.turned} of {self.rows} images are turned by EXIF: their annotations are taken in {what}, {why}"
        ]
        if min(self.in_stored[True], self.in_stored[False]):
            lines.append(
                f"of the annotations of turned images {self.in_stored[True]} count stored pixels and "
                f"{self.in_stored[False]} upright ones: where a size tells, it is followed"
            )
        return lines

    def common(self) -> list[str]:
        """What is said about annotations of both kinds."""
        lines = [*self.warnings, *self.turning()]
        names = self.dataset.label_names
        if len(names) > 1 and len(self.images) == 1:
            lines.append(f"only one class of {len(names)} occurs: {names[next(iter(self.images))]}")
        elif self.images:
            absent = [name for index, name in enumerate(names) if index not in self.images]
            if absent:
                lines.append(f"{counted(len(absent), 'class', 'classes')} not seen among them: {first_few(absent)}")
        if self.broken:
            lines.append(f"{counted(len(self.broken), 'row')} that cannot be used: {self.broken[0]}")
        if self.trouble:
            lines.append(f"reading stopped: {self.trouble}")
        return lines


class MapsSeen(Seen):
    """Annotation maps.

    Attributes:
        pixels: by stored value.
        maps: how many hold a value.
    """

    def __init__(self, dataset: DenseDataset, settings: AnnotationSettings):
        super().__init__(dataset, settings)
        self.table = dataset.value_table
        self.pixels: Counter[int] = Counter()
        self.maps: Counter[int] = Counter()
        self.unknown = 0  # maps with a value that no class has
        self.lossy = 0  # saved as JPEG

    def look_at(self, value: Any, frame: Frame) -> None:
        data = value.get("bytes") if isinstance(value, Mapping) else None
        if value is None or (isinstance(value, Mapping) and data is None and value.get("path") is None):
            self.nulls += 1
        values, upright = read_map(value, token=self.dataset.images.token)
        self.lossy += bool(data) and data[:2] == b"\xff\xd8"
        told = None if upright else frame.told(values.shape)
        if told is not None:
            self.in_stored[told] += 1
        if values.dtype == np.uint8:
            counts = np.bincount(values.ravel(), minlength=256)
            held = np.flatnonzero(counts)
            counts = counts[held]
        else:
            held, counts = np.unique(values, return_counts=True)
        for number, count in zip(held.tolist(), counts.tolist(), strict=True):
            self.pixels[number] += count
            self.maps[number] += 1
        classes = classes_of(held, self.table)
        self.images.update(set(classes.tolist()) - {-1, IGNORE_INDEX})
        if classes.min() < 0:
            self.unknown += 1
            raise BrokenImage(f"its annotation map has the value {held[classes < 0][0]}, which no class has")
        fitted_map(values, upright, frame)

    def judge(self, trained: Seen | None) -> list[str]:
        self.dataset = dataclasses.replace(self.dataset, in_stored=self.counts_stored_pixels(trained))
        lines = self.read_as_binary() if self.is_binary(trained) else []
        dataset = self.dataset
        self.refuse_values(trained)
        self.refuse_broken()
        ignored = sum(n for v, n in self.pixels.items() if classes_of(np.array([v]), self.table)[0] == IGNORE_INDEX)
        total = max(sum(self.pixels.values()), 1)
        seen = ", ".join(f"{name} in {self.images[index]}" for index, name in listed(dataset.label_names, self.images))
        first = f"{counted(self.rows, 'annotation map')} looked at: {seen or 'no class'}"
        if ignored:
            first += f"; {ignored / total:.1%} of the pixels have no class"
        if self.nulls:
            first += f"; {counted(self.nulls, 'row')} without a map"
        if self.dataset.reduced:
            stored_as = {index: int(key) + 1 for key, index in dataset.classes.table.items() if is_number(key)}
            stands = [f"{stored_as[index]} is {name}" for index, name in enumerate(dataset.label_names[:3])]
            lines.append(f"0 is ignored, {', '.join(stands)}{', ...' if len(dataset.label_names) > 3 else ''}")
        if len(dataset.label_names) > IGNORE_INDEX:
            lines.append(
                f"the class {dataset.label_names[IGNORE_INDEX]} has the index 255, which stands for no class: it is "
                "never learnt"
            )
        return [first, *lines, *self.common()]

    def is_binary(self, trained: Seen | None) -> bool:
        """Whether 255 has to be the second of two classes: no map holds 1, and nobody has said otherwise."""
        classes, values = self.dataset.classes, set(self.pixels)
        if keys(classes) != {0, 1} or len(classes.names) != 2 or self.dataset.void or self.dataset.reduced:
            return False
        # The splits of a dataset are stored alike, and in the smaller one a class may not occur.
        if trained is not None:
            return keys(trained.dataset.classes) == {0, IGNORE_INDEX} and values <= {0, IGNORE_INDEX}
        return values == {0, IGNORE_INDEX}

    def read_as_binary(self) -> list[str]:
        names, table = self.dataset.label_names, dict(self.dataset.classes.table)
        first, second = table.pop("0"), table.pop("1")
        classes = Classes(self.dataset.classes.names, {**table, "0": first, str(IGNORE_INDEX): second})
        self.dataset = self.dataset.with_classes(classes)
        self.table = self.dataset.value_table
        self.images = +Counter({first: self.maps[0], second: self.maps[IGNORE_INDEX]})
        return [f"the maps hold 0 and 255 only: 255 is taken for {names[second]}, 0 for {names[first]}"]

    def refuse_values(self, trained: Seen | None) -> None:
        """
        Raises:
            UserError: values that no class has, in more maps than --max_skipped allows, or nothing but ignored ones.
        """
        if not self.pixels:
            return
        names, values = self.dataset.label_names, sorted(self.pixels)
        classes = dict(zip(values, classes_of(np.array(values), self.table).tolist(), strict=True))
        unknown = [value for value in values if classes[value] == -1]
        hint = ""
        if self.lossy:
            hint = f" {self.lossy} of them are JPEGs, which change values: save maps as PNG."
        elif unknown and len(values) == len(names) and len(values) > 1:
            pairs = ", ".join(f'"{value}": "{name}"' for value, name in zip(values, names, strict=True))
            hint = f" If these stand for the classes in order, give their names as a JSON file: {{{pairs}}}."
        elif unknown == [0]:
            hint = " If 0 is no class, say so with --reduce_labels."
        elif unknown and len(unknown) == 1 and unknown[0] == len(names) and not self.dataset.reduced:
            hint = " Do the classes count from 1? Then --reduce_labels ignores 0, or id2label names the stored values."
        if self.unknown > MANY * self.rows:
            self.refuse(
                f"{self.unknown} of {self.rows} annotation maps of {self.name} hold values that belong to none of the "
                f"{len(names)} classes ({self.dataset.classes.shown()}): {shown(unknown)}, beside "
                f"{shown([value for value in values if value not in unknown]) or 'nothing else'}.{hint}"
            )
        elif all(index == IGNORE_INDEX for index in classes.values()):
            self.refuse(
                f"annotation maps of {self.name} hold {shown(values)} only, which stands for pixels without a class: "
                "there is nothing to learn."
            )
        elif len(names) == 1:
            self.refuse(
                f"{self.name} has a single class, {names[0]}: there is nothing to tell it apart from. Name what "
                "surrounds it, too."
            )
        elif (
            set(values) == {0, IGNORE_INDEX}
            and classes[IGNORE_INDEX] == IGNORE_INDEX
            and not (isinstance(trained, MapsSeen) and IGNORE_INDEX in trained.pixels)
        ):
            self.refuse(
                f"annotation maps of {self.name} hold 0 and 255 only, and 255 stands for pixels without a class: "
                f"{names[classes[0]]} would be all there is to learn. If 255 is a class, store its index instead, or "
                'name both by their stored values, in a JSON file for --label_names: {"0": "...", "255": "..."}.'
            )


class ObjectsSeen(Seen):
    """Boxes and masks.

    Attributes:
        objects: in all rows.
        boxes: as they are stored, (4,), with the (height, width) that they belong to and their row.
    """

    def __init__(self, dataset: DenseDataset, settings: AnnotationSettings):
        super().__init__(dataset, settings)
        self.objects = self.empty = 0
        self.boxes: list[tuple[np.ndarray, Frame, int]] = []
        self.left_out: Counter[str] = Counter()
        self.found: Counter[int] = Counter()  # objects by class
        self.unknown: Counter[str] = Counter()
        self.polygons: Counter[str] = Counter()  # what is odd about masks
        self.apart = 0  # masks that lie elsewhere than their boxes
        self.contradicted: list[str] = []

    def look_at(self, value: Any, frame: Frame) -> None:
        fields = self.dataset.fields
        entries = as_list(value)
        self.empty += not entries
        self.objects += len(entries)
        size = annotated_size(value, entries, frame, fields)
        if size is not None and size not in (frame.size, frame.stored_size):
            self.contradicted.append(f"{size[1]}x{size[0]} instead of {frame.size[1]}x{frame.size[0]}")
        frame = dataclasses.replace(frame, said=size)
        boxes = [box for box in (numbers(entry.get(fields.box)) for entry in entries) if box is not None]
        boxes = [box for box in boxes if len(box) == 4]
        self.boxes += [(box, frame, self.rows) for box in boxes]
        told = frame.told(size)
        if told is None and boxes:
            told = self.told_by_place(np.stack(boxes), frame)
        if told is not None:
            self.in_stored[told] += 1
        for entry in entries:
            self.nulls += entry.get(fields.box) is None
            try:
                self.dataset.classes.index(entry.get(fields.label))
            except UnknownClass:
                self.unknown[shown_key(entry.get(fields.label))] += 1
            if self.dataset.with_masks:
                self.look_at_mask(entry.get(fields.mask))
        left_out: Counter[str] = Counter()
        objects = decode_objects(value, frame, fields, with_masks=self.dataset.with_masks, left_out=left_out)
        self.left_out += left_out
        self.found.update(objects.labels.tolist())
        self.images.update(set(objects.labels.tolist()))
        self.apart += count_apart(objects)

    def told_by_place(self, boxes: np.ndarray, frame: Frame) -> bool | None:
        """Whether boxes fit the stored image, if they fit only one of it and the upright image."""
        if frame.size == frame.stored_size:
            return None
        stored, upright = (
            not misfits(boxes, np.array([size] * len(boxes)), self.dataset.fields.bbox_format).any()
            for size in (frame.stored_size, frame.size)
        )
        return None if stored == upright else stored

    def look_at_mask(self, value: Any) -> None:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return
        if not isinstance(value, (list, tuple)):
            return
        known = [polygon for polygon in map(numbers, polygons_in(value)) if polygon is not None]
        if known and all(len(polygon) == 4 for polygon in known):
            self.polygons["polygons of four numbers, boxes in the place of masks"] += 1
        elif any(len(polygon) >= 6 for polygon in known) and max(polygon.max(initial=0) for polygon in known) <= 1:
            self.polygons["polygons in parts of the image's size, which has to be multiplied in"] += 1
        elif all(len(polygon) < 6 for polygon in known):
            self.polygons["polygons of fewer than three corners"] += 1

    def judge(self, trained: Seen | None) -> list[str]:
        dataset = self.dataset = dataclasses.replace(self.dataset, in_stored=self.counts_stored_pixels(trained))
        lines: list[str] = []
        if self.boxes:
            lines += self.judge_boxes()
        self.refuse_unknown()
        self.refuse_masks()
        if len(self.contradicted) > self.rows / 2 and self.dataset.pixels == "auto":
            self.refuse(
                f"{len(self.contradicted)} of {self.rows} rows of {self.name} give other widths and heights than the "
                f"images have ({self.contradicted[0]}): scale boxes and masks to the images, or say with "
                "--annotation_pixels stored that they fit these."
            )
        elif self.contradicted:
            lines.append(
                f"{counted(len(self.contradicted), 'row')} with another width and height than the image: "
                f"{self.contradicted[0]}"
            )
        self.refuse_broken()
        if not self.found and self.rows == dataset.images.num_examples:
            self.refuse(f"none of the {self.rows} rows of {self.name} has an object with a class and a box.")
        listing = ", ".join(f"{name} {self.found[index]}" for index, name in listed(dataset.label_names, self.found))
        first = f"{counted(self.rows, 'annotation')} looked at: {counted(self.objects, 'object')}"
        first += f", {listing}" if listing else ""
        remarks = [
            *([f"{counted(self.empty, 'row')} without objects"] if self.empty else []),
            *([f"{counted(self.nulls, 'null box', 'null boxes')}"] if self.nulls else []),
            *(f"{counted(count, 'object')} {reason}, left out" for reason, count in self.left_out.items()),
        ]
        return ["; ".join([first, *remarks]), *lines, *self.common()]

    def judge_boxes(self) -> list[str]:
        """
        Raises:
            UserError: boxes in other units or another format.
        """
        raw = np.stack([box for box, _, _ in self.boxes])
        frames = [
            dataclasses.replace(frame, in_stored=self.dataset.in_stored if frame.told_by_size else frame.in_stored)
            for _, frame, _ in self.boxes
        ]
        sizes = np.array([frame.size if frame.turn(frame.said) == 1 else frame.stored_size for frame in frames])
        if raw.max() <= 1 and sizes.min() > 2 and raw.any():
            self.refuse(
                f"all {len(raw)} boxes of {self.name} that were looked at are at most 1: they are given in parts of "
                "the image's size (normalised). Multiply them by width and height, to have pixels."
            )
        used = self.dataset.fields.bbox_format
        wrong = {name: misfits(raw, sizes, name) for name in ("xywh", "xyxy", "cxcywh")}
        share = wrong[used].mean()
        others = [name for name in wrong if name != used and wrong[name].mean() <= min(0.005, share / 20)]
        rows = len({row for (_, _, row), misfit in zip(self.boxes, wrong[used], strict=True) if misfit})
        if share > (FEW_OUT if others else MANY_OUT):
            fits = (
                f"As --bbox_format {others[0]} they all fit."
                if others
                else ("Which pixels do they count, and in which order: see --bbox_format.")
            )
            self.refuse(
                f"{int(wrong[used].sum())} of {len(raw)} boxes of {self.name}, in {rows} of {self.rows} rows, stick "
                f"out of their images or have a negative size, read as {used}. {fits}"
            )
        lines = []
        if wrong[used].any():
            lines.append(f"boxes that stick out of their images, and are cut: {int(wrong[used].sum())}")
        if raw.max() <= 100 and sizes.min() > 200 and len(raw) >= 20:
            lines.append("all boxes lie within the first 100 pixels: are they in per cent of the image's size?")
        return lines

    def refuse_unknown(self) -> None:
        count = sum(self.unknown.values())
        if count > MANY * self.objects:
            classes = self.dataset.classes
            values = [value for value, _ in self.unknown.most_common(10)]
            self.refuse(
                f"{count} of {self.objects} objects of {self.name} that were looked at have a class that is none of "
                f"the {len(classes.names)} known ones, {classes.shown()}: {', '.join(values)}. Give --label_names as "
                "id2label, whose keys are the stored values."
            )
        if self.left_out[NO_CLASS] > self.objects / 2:
            self.refuse(
                f"{self.left_out[NO_CLASS]} of {self.objects} objects of {self.name} that were looked at have no "
                "class (null, or a negative number)."
            )

    def refuse_masks(self) -> None:
        count = self.left_out[EMPTY_MASK]
        if count > MANY * self.objects:
            reason = self.polygons.most_common(1)
            why = f" {reason[0][1]} are {reason[0][0]}." if reason else ""
            self.refuse(
                f"{count} of {self.objects} objects of {self.name} that were looked at have a mask without any pixel "
                f"in the image.{why} Masks are polygons [[x1, y1, x2, y2, x3, y3, ...]] in pixels, run lengths, or "
                "pictures; boxes alone train --task object-detection."
            )
        elif self.apart > sum(self.found.values()) / 2:
            self.refuse(
                f"{self.apart} of {sum(self.found.values())} masks of {self.name} that were looked at lie elsewhere "
                "than their boxes: do both count the same pixels, and is --bbox_format right?"
            )


def keys(classes: Classes) -> set[int]:
    """The numbers that stand for classes."""
    return {int(key) for key in classes.table if is_number(key)}


def numbers(value: Any) -> np.ndarray | None:
    """The numbers of a box or polygon; None unless it is made of finite ones."""
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return found if found.ndim == 1 and np.isfinite(found).all() else None


def misfits(raw: np.ndarray, sizes: np.ndarray, bbox_format: str) -> np.ndarray:
    """Which boxes (N, 4) do not fit into images of sizes (N, 2), (height, width), read in this way; bool (N,)."""
    corners = corners_of(raw, bbox_format)
    limits = np.stack([sizes[:, 1], sizes[:, 0]] * 2, axis=1)
    beyond = np.maximum(corners - limits, -corners) > np.maximum(MARGIN * limits, 2)
    return beyond.any(axis=1) | (corners[:, 2:] < corners[:, :2]).any(axis=1)


def count_apart(objects: Objects) -> int:
    """How many masks have less than a fifth of their pixels within their boxes."""
    if objects.masks is None:
        return 0
    apart = 0
    for mask, (left, top, right, bottom) in zip(objects.masks, objects.boxes, strict=True):
        inside = mask[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)].sum()
        apart += bool(inside < 0.2 * mask.sum())
    return apart


def listed(names: list[str], counts: Counter[int]) -> list[tuple[int, str]]:
    """The classes that were seen, at most ten, the most frequent ones, in their order."""
    chosen = sorted(index for index, _ in counts.most_common(10))
    return [(index, names[index]) for index in chosen]


def shown(values: list[int]) -> str:
    return ", ".join(map(str, values[:10])) + (f", ... ({len(values)} values)" if len(values) > 10 else "")


def shown_key(value: Any) -> str:
    try:
        return class_key(value) or "none"
    except UnknownClass:
        return type(value).__name__


def counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
