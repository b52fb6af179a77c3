"""What was understood of the data, said and judged before the first step.

A wrong guess that is printed costs a minute, one that is not costs a run.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from typing import Any

from ..foundation.errors import UserError
from ..foundation.names import printable
from ..foundation.processes import found_by_main
from .columns import ImageDataset, columns_needed, feature_of, kind_of
from .decoding import BrokenImage, decode_image, describe_source
from .loader import MIN_SEEN, too_many_broken


# Looking into the data may take so long, per split.
SECONDS = 0.8
# Names of classes on a line.
_SHOWN = 8
_WIDTH = 116


def judge(datasets: Mapping[str, ImageDataset], max_skipped: float | int, num_channels: int = 3) -> None:
    """Ends a run that its data would end later: too many rows without label, too many broken images.

    The main process looks, for all, at the labels that were counted and at the first images of each split.

    Args:
        max_skipped: as `make_loader` takes it.
        num_channels: of the images, as `EncodedImage` takes it.

    Raises:
        UserError: on every process.
    """

    def look() -> None:
        for dataset in datasets.values():
            judge_labels(dataset, max_skipped)
            judge_images(dataset, max_skipped, num_channels)

    found_by_main(look)


def judge_labels(dataset: ImageDataset, max_skipped: float | int) -> None:
    if dataset.labelled is None or not dataset.unlabelled:
        return
    rows = dataset.unlabelled + dataset.labelled
    several = dataset.problem_type == "multi_label_classification"
    none = ". An image that has none of the classes is told by an empty list, in a text by []" if several else ""
    what = "NaN or infinity" if dataset.problem_type == "regression" else "a negative number"
    if too_many_broken(dataset.unlabelled, rows, max_skipped):
        raise UserError(
            f"{dataset.unlabelled} of {rows} rows of {dataset.name} have no label: nothing, or {what} that stands for "
            f"it. To train on the others: --max_skipped {_fraction(dataset.unlabelled, rows)}{none}"
        )


def judge_images(dataset: ImageDataset, max_skipped: float | int, num_channels: int) -> None:
    """Decodes the first images, as many as the loader lets pass before it judges, where they are on this machine."""
    if not dataset.local:
        return
    until, seen, broken = time.monotonic() + SECONDS, 0, []
    stream = dataset.stream.select_columns([dataset.image_column])
    try:
        for row in itertools.islice(stream, MIN_SEEN):
            seen += 1
            source = row[dataset.image_column]
            try:
                decode_image(source, num_channels=num_channels, token=dataset.token)
            except BrokenImage as error:
                broken.append(f"{describe_source(source) or f'image {seen - 1}'}: {error}")
            if time.monotonic() > until:
                return  # too few for a judgement
    except UserError:
        raise
    except Exception:  # a damaged shard, of which the loader has its own account
        return
    if too_many_broken(len(broken), seen, max_skipped):
        raise UserError(
            f"{len(broken)} of the first {seen} images of {dataset.name} are broken, more than --max_skipped allows: "
            f"{'; '.join(broken[:5])}"
        )


def describe_data(datasets: Mapping[str, ImageDataset]) -> str:
    """Some lines for a screen: where the splits come from, columns, classes with counts, and what is left out."""
    lines = []
    for split, dataset in datasets.items():
        number = "unknown number of images" if dataset.num_examples is None else f"{dataset.num_examples} images"
        lines.append((split, f"{number}, {dataset.name}" + (f": {dataset.origin}" if dataset.origin else "")))
    first = next(iter(datasets.values()))
    features = first.stream.features
    columns = f"image {first.image_column!r}"
    if first.label_columns:
        kinds = dict.fromkeys(kind_of(feature_of(features, column)) for column in first.label_columns)
        how = ": ".join(filter(None, [", ".join(kinds), first.storage.described() if first.storage else ""]))
        what = "label " if len(first.label_columns) == 1 else "labels "
        columns += f", {what}{_short(list(map(repr, first.label_columns)))} ({how})"
    lines.append(("columns", columns))
    used = {*columns_needed(first), *first.label_columns}
    others = [name for name in (*features, *first.unread_columns) if name not in used and not name.startswith("__")]
    if others:
        lines.append(("not read", _short(others)))
    if first.classes is not None:
        lines += _class_lines(datasets)
    lines += _label_lines(datasets)
    for dataset in datasets.values():
        if dataset.unlabelled:
            lines.append(("no label", f"{dataset.unlabelled} rows of {dataset.name}, left out"))
    for file in dict.fromkeys(dataset.counts_from for dataset in datasets.values() if dataset.counts_from):
        lines.append(("counted", f"in an earlier run: {os.path.basename(file)} in the cache"))
    left_out = {kind: count for dataset in datasets.values() for kind, count in dataset.left_out.items()}
    if left_out:
        kinds = sorted(left_out, key=lambda kind: -left_out[kind])
        lines.append(("left out", _short([f"{left_out[kind]} {kind}" for kind in kinds])))
    return "\n".join(f"  {title:<11} {printable(text, _WIDTH)}" for title, text in lines)


def _class_lines(datasets: Mapping[str, ImageDataset]) -> list[tuple[str, str]]:
    dataset = next(iter(datasets.values()))
    names, lines = dataset.classes.names, []
    title = f"{len(names)} classes" if len(names) > 1 else "1 class"
    if dataset.counts is None:
        return [(title, f"{_short(names)} (not counted)")]
    counts = dict(enumerate(dataset.counts))
    by_count = sorted(counts, key=lambda index: (-counts[index], index))
    if len(names) <= _SHOWN:
        lines.append((title, ", ".join(f"{names[index]} {count}" for index, count in counts.items())))
    else:
        half = _SHOWN // 2
        largest = ", ".join(f"{names[index]} {counts[index]}" for index in by_count[:half])
        smallest = ", ".join(f"{names[index]} {counts[index]}" for index in by_count[-half:])
        lines.append((title, f"{largest}, ... {smallest}"))
    lonely = sum(count == 1 for count in dataset.counts)
    if lonely > len(names) / 2:
        lines.append(("one image", f"is all that {lonely} of the classes have: are these classes?"))
    for split, other in datasets.items():
        absent = [name for name, count in zip(other.label_names, other.counts or (), strict=False) if not count]
        if absent:
            lines.append(("no image", f"in {split} of {len(absent)} of the classes: {_short(absent)}"))
    return lines


def _label_lines(datasets: Mapping[str, ImageDataset]) -> list[tuple[str, str]]:
    """Of several labels per image, how many they are; of numbers, where they lie."""
    lines, said = [], []
    for split, dataset in datasets.items():
        figures = dataset.per_image or dataset.target_range
        if figures is None or any(figures is known for known in said):
            continue  # of parts that were divided, those of the whole
        said.append(figures)
        where = f" ({split})" if len(datasets) > 1 else ""
        if dataset.per_image is not None:
            mean, least, most, none = dataset.per_image
            without = f"; {none} images have none of the classes" if none else ""
            lines.append(("per image", f"{mean:.3g} labels on average, {least} to {most}{without}{where}"))
            continue
        targets = zip(dataset.target_names, dataset.target_mean, dataset.target_std, figures, strict=True)
        for name, mean, std, (least, most) in itertools.islice(targets, _SHOWN):
            lines.append(("target", f"{name}: mean {mean:.4g}, std {std:.4g}, {least:.4g} to {most:.4g}{where}"))
        if len(figures) > _SHOWN:
            lines.append(("target", f"... ({len(figures)} in all)"))
    return lines


def _short(items: Any) -> str:
    shown = ", ".join(map(str, items[:_SHOWN]))
    return shown if len(items) <= _SHOWN else f"{shown}, ... ({len(items)} in all)"


def _fraction(part: int, whole: int) -> str:
    """The share, rounded up to a hundredth, as a flag takes it."""
    return f"{min(-(-100 * part // whole), 99) / 100:.2f}"
