"""A dataset looked at before anything is trained on it: report.html, report.json and images.parquet in a folder."""

from __future__ import annotations

import heapq
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.columns import ImageDataset
from ..data.datasets import OpenedSplit, open_every_split
from ..data.pictures_again import pictures_of
from ..data.transforms import input_size
from ..foundation.errors import UserError
from ..foundation.files import best_effort, write_json
from ..foundation.loading import load_processor
from ..foundation.names import first_few, printable
from ..foundation.tasks import task_of_problem
from ..settings.command_line import parse
from . import duplicates
from .inspection_page import GROUPS, OF_A_GROUP, Copies, Findings, Group, Member, build_page, in_training
from .inspection_settings import InspectionSettings
from .measures import (
    LABELS,
    Measures,
    Place,
    SplitMeasures,
    by_split,
    class_indices,
    measure,
    number_edges,
    quantile,
    several_indices,
)
from .outliers import Outliers, find_outliers
from .page import write_page
from .previews import examples, processor_of_run
from .scan import PARTS, Scan, scan
from .suggestions import Suggestion, Traits, suggest, training_words


REPORT, DATA = "report.html", "report.json"
# Classes that are shown, images of each, and images that are augmented, so many times.
_SHEETS, _OF_A_CLASS, _PREVIEWS, _TIMES = 24, 8, 10, 3
# Longest side of a picture in the file, in pixels; of one that is augmented, before it is.
_SIDE, _WHOLE = 192, 640
# Groups of copies in report.json.
_GROUPS_TOLD = 10_000


@dataclass(frozen=True)
class Inspection:
    """What was found in a dataset.

    Attributes:
        found: fault of `FAULTS` -> how many images or, of contradictions, pictures.
        summary: in lines, for a screen.
        data: what report.json holds.
    """

    folder: Path
    found: dict[str, int]
    summary: list[str]
    data: dict[str, Any]

    @property
    def report(self) -> Path:
        return self.folder / REPORT


def scan_dataset(
    settings: InspectionSettings, *, progress: bool = True, should_stop: Callable[[], object] = lambda: False
) -> Scan:
    """Looks at every image, and keeps what it finds in the folder of the report.

    Args:
        should_stop: as `scan` takes it.

    Raises:
        UserError: nothing there, no images, a folder that holds another report, a model that cannot be loaded.
        KeyboardInterrupt: it was stopped. The next call with the same settings goes on.
    """
    folder = settings.folder
    refuse_other_report(folder, settings.overwrite)
    return scan(
        folder,
        open_every_split(**settings.opening),
        num_channels=settings.num_channels or 3,
        model=settings.model,
        origin=settings.origin(),
        device=settings.device,
        max_images=settings.max_images,
        batch_size=settings.per_device_eval_batch_size,
        num_workers=settings.num_workers,
        overwrite=settings.overwrite,
        progress=progress,
        should_stop=should_stop,
    )


def write_inspection(settings: InspectionSettings, seen: Scan) -> Inspection:
    """Writes report.json and report.html of a scan, each as a whole or not at all."""
    return Inspector(settings, seen).write(settings.folder)


def refuse_other_report(folder: Path, overwrite: bool) -> None:
    """Raises a UserError for a folder with what no inspection has written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file")
    names = [path.name for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []
    if names and not (folder / PARTS).is_dir() and not overwrite:
        raise UserError(
            f"{folder} holds something else ({first_few(sorted(names), 3)}): give another --output_dir, or --overwrite"
        )


class Inspector:
    """A scan, and what follows from it, each found when it is asked for."""

    def __init__(self, settings: InspectionSettings, seen: Scan):
        self.settings, self.seen = settings, seen
        self.opened = seen.opened

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return self.seen.table.to_batches(columns=list(columns), batch_size=10_000)

    @cached_property
    def train(self) -> str | None:
        """Name of the training split, or of the only one."""
        return self._named(self.settings.train_split) or (next(iter(self.opened)) if len(self.opened) == 1 else None)

    @cached_property
    def validation(self) -> str | None:
        """Name of the split that training would measure on, as `open_datasets` chooses it."""
        for name in filter(None, (self.settings.validation_split, "validation", "test")):
            found = self._named(name)
            if found not in (None, self.train):
                return found
        return None

    @cached_property
    def order(self) -> list[str]:
        """Names of the splits, what is learned from first."""
        roles = (self.train, self.validation)
        return sorted(self.opened, key=lambda name: (roles.index(name) if name in roles else 2, name))

    def _named(self, wanted: str) -> str | None:
        if wanted in self.opened:
            return wanted
        sources = {id(split.source): split.source for split in self.opened.values()}
        names = (source.split_named(wanted) for source in sources.values())
        return next((name for name in names if name in self.opened), None)

    @cached_property
    def measures(self) -> Measures:
        seen = self.seen
        kind = "nothing" if seen.problem_type is None else task_of_problem(seen.problem_type).reads
        known = Measures(
            kind,
            list(seen.label_names or ()),
            {name: SplitMeasures(name) for name in self.order},
            channels=self.settings.num_channels or 3,
        )
        return measure(self.batches, known)

    @cached_property
    def outliers(self) -> Outliers | None:
        if not self.seen.embedded or self.measures.kind != "class" or self.train is None:
            return None
        size = self.seen.table.schema.field("embedding").type.list_size
        return find_outliers(self.batches, self.measures.label_names, self.train, size)

    @cached_property
    def copies(self) -> Copies:
        return find_copies(self.seen, self.order)

    @cached_property
    def traits(self) -> Traits:
        settings, measures, seen = self.settings, self.measures, self.seen
        training = in_training(measures, self.train)
        dataset = self.opened[training.name].dataset
        images, counts = training.labelled, training.counts.tolist()
        if not seen.complete and dataset.num_examples:
            images, counts = dataset.num_examples, list(dataset.counts or counts)
        used = [split for split in measures.splits.values() if split.name in (training.name, self.validation)]
        model_side = 224
        if settings.model:
            model_side = min(input_size(load_processor(settings.model, settings.origin())))
        far = {}
        if measures.kind == "numbers" and training.labelled:
            reach = np.maximum(training.most - training.mean, training.mean - training.least)
            far = dict(zip(measures.label_names, (reach / np.maximum(training.std, 1e-12)).tolist(), strict=True))
        return Traits(
            task=None if seen.problem_type is None else task_of_problem(seen.problem_type).name,
            why_none="" if seen.problem_type else next(iter(seen.remarks), ""),
            images=images,
            train_split=self.train,
            validation_split=self.validation,
            validation_images=measures.splits[self.validation].labelled if self.validation else 0,
            counts=dict(zip(measures.label_names, counts, strict=False)) if measures.kind != "numbers" else {},
            labels_per_image=sum(counts) / max(images, 1),
            far=far,
            side=quantile(measures.shorter, 0.5),
            model_side=model_side,
            readable=measures.readable,
            grey=measures.grey if measures.channels == 3 else 0,
            grey_as_rgb=measures.grey_as_rgb,
            broken={
                split.name: (split.broken + split.unlabelled, split.images, split.unusable_first) for split in used
            },
            complete=seen.complete,
            leaks=self.copies.leaks,
            near=self.copies.near.get(training.name, 0),
            contradictions=self.copies.contradictions,
            outliers=None if self.outliers is None else self.outliers.count,
            recipe=settings.recipe,
            model=settings.model,
            data_flags=settings.data_flags,
        )

    @cached_property
    def suggestions(self) -> list[Suggestion]:
        return suggest(self.traits)

    @cached_property
    def training(self) -> list[str]:
        """Words behind `train`; none where nothing could be trained."""
        if not self.traits.images:
            return []
        return training_words(self.traits, self.suggestions, f"outputs/{self.settings.name}")

    def sheets(self) -> dict[str, list[Place]]:
        """Some images of the commonest and the rarest classes, or of all; chosen by the seed and the place alone."""
        names, readable = self.measures.label_names, in_training(self.measures, self.train)
        kind = self.measures.kind
        if kind in ("class", "classes"):
            there = [int(index) for index in np.argsort(-readable.counts, kind="stable") if readable.counts[index]]
            half = _SHEETS // 2
            chosen = there if len(there) <= _SHEETS else [*there[:half], *there[-half:]]
        else:
            names, chosen = [""], [0]
        wanted = {index: Drawn(_OF_A_CLASS) for index in chosen}
        for part, order in self._readable(readable.name, LABELS.get(kind)):
            if kind == "class":
                pairs: Iterable[tuple[int, int]] = enumerate(class_indices(part, names))
            elif kind == "classes":
                offsets, labels, _ = several_indices(part, names)
                pairs = zip(np.repeat(np.arange(len(part)), np.diff(offsets)), labels, strict=True)
            else:
                pairs = ((row, 0) for row in range(len(part)))
            for row, label in pairs:
                if (drawn := wanted.get(int(label))) is not None:
                    drawn.add(int(order[row]), part, int(row))
        return {names[index]: drawn.places for index, drawn in wanted.items()}

    def to_augment(self) -> list[Place]:
        drawn = Drawn(_PREVIEWS)
        for part, order in self._readable(in_training(self.measures, self.train).name):
            for row in np.argsort(order)[:_PREVIEWS]:
                drawn.add(int(order[row]), part, int(row))
        return drawn.places

    def _readable(self, split: str, *columns: str | None) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        """Rows of a split that can be read, and a random number for each."""
        names = ["path", "split", "position", "error", *filter(None, columns)]
        for batch in self.batches(names):
            for part in by_split(batch.filter(batch["error"].is_null())):
                if part["split"][0].as_py() == split:
                    yield part, shuffled(part["position"].to_numpy(zero_copy_only=False), self.settings.seed)

    def findings(self) -> Findings:
        measures, seen = self.measures, self.seen
        total = [split.dataset.num_examples for split in self.opened.values()]
        found = Findings(
            name=self.settings.dataset_name,
            measures=measures,
            origins={name: split.dataset.origin for name, split in self.opened.items()},
            remarks=seen.remarks,
            sample=None if seen.complete or None in total else sum(total),
            train=self.train,
            validation=self.validation,
            copies=self.copies,
            outliers=self.outliers,
            suggestions=self.suggestions,
            command=shlex.join(["hf-poolformer", "train", *self.training]) if self.training else "",
            sheets=self.sheets(),
        )
        with best_effort("showing what augmentation does"):
            found.previews, found.preview_note = self.previews()
        found.pictures = self.pictures(found)
        return found

    def previews(self) -> tuple[list[Any], str]:
        """Images with what training makes of them, and by which settings."""
        if not self.training or (self.settings.num_channels or 3) != 3:
            return [], ""
        settings = parse(self.training)
        processor = processor_of_run(settings, named=self.settings.model is not None)
        places = self.to_augment()
        pictures = self._read(places, _WHOLE)
        shown = [place for place in places if (place.split, place.position) in pictures]
        images = [pictures[place.split, place.position] for place in shown]
        made = examples(images, settings, processor, _TIMES)
        note = f"Recipe {settings.recipe}, {' x '.join(map(str, input_size(processor)))} pixels."
        if getattr(settings, "mixup_alpha", 0) or getattr(settings, "cutmix_alpha", 0):
            note += " Mixup and CutMix then mix pairs of them."
        return list(zip(shown, images, made, strict=True)), note

    def pictures(self, found: Findings) -> dict[tuple[str, int], Any]:
        """All that the page shows, read once more."""
        measures, copies = found.measures, found.copies
        wanted = [place for places in found.sheets.values() for place in places]
        groups = [*copies.leak_groups, *copies.duplicate_groups, *copies.contradiction_groups]
        wanted += [member.place for group in groups for member in group.members]
        extremes = [measures.smallest, measures.largest, measures.longest, measures.blanks]
        extremes += [found.outliers.worst] if found.outliers else []
        wanted += [place for kind in extremes for _, place, _ in kind.found]
        return self._read(wanted, _SIDE)

    def _read(self, places: Iterable[Place], side: int) -> dict[tuple[str, int], Any]:
        positions: dict[str, set[int]] = {}
        for place in places:
            positions.setdefault(place.split, set()).add(place.position)
        found = {}
        for split, wanted in positions.items():
            with best_effort(f"reading images of {split} again"):
                pictures = pictures_of(divided(self.opened[split]), wanted, side)
                found |= {(split, position): picture for position, picture in pictures.items()}
        return found

    def write(self, folder: Path) -> Inspection:
        found = self.findings()
        data = report_data(found, self.training)
        write_json(folder / DATA, data)
        write_page(folder / REPORT, build_page(found))
        return Inspection(folder, found.found, summary_of(found, folder), data)


def divided(split: OpenedSplit) -> ImageDataset:
    """A split that knows, where its source does, how many rows each of its shards has: single rows are soon found."""
    units = split.source.units(split.name)
    return split.dataset if units is None else replace(split.dataset, shard_rows=[unit.rows for unit in units])


class Drawn:
    """The images with the smallest of some random numbers."""

    def __init__(self, most: int):
        self.most = most
        self._heap: list[tuple[int, int, Place]] = []

    def add(self, number: int, rows: pa.RecordBatch, row: int) -> None:
        if len(self._heap) == self.most and -self._heap[0][0] <= number:
            return
        place = Place(*(rows[name][row].as_py() for name in ("split", "position", "path")))
        entry = (-number, place.position, place)
        (heapq.heappush if len(self._heap) < self.most else heapq.heappushpop)(self._heap, entry)

    @property
    def places(self) -> list[Place]:
        return [place for *_, place in sorted(self._heap, reverse=True)]


def shuffled(positions: np.ndarray, seed: int) -> np.ndarray:
    """A random number for each position, always the same: the last steps of splitmix64."""
    mixed = positions.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed >> np.uint64(1)


def find_copies(seen: Scan, order: Sequence[str]) -> Copies:
    """The groups of a scan as a page shows them.

    Pictures of one colour are told elsewhere: that they are alike says nothing of leaks and labels.

    Args:
        order: of the splits, what is learned from first.
    """
    found = seen.duplicates()
    copies, near, data = Copies(), Counter(), []
    pixels = seen.table.to_table(columns=["pixel_digest"])["pixel_digest"]
    for group in found.groups:
        same = pixels.take(pa.array(group.rows)).to_pylist()
        texts = [label_text(label) for label in group.labels]
        first = min(group.splits, key=order.index)
        leaked = [] if group.flat else [index for index, split in enumerate(group.splits) if split != first]
        learned = {one for one, split in zip(same, group.splits, strict=True) if split == first}
        copies.leaks += len(leaked)
        copies.exact_leaks += sum(same[index] in learned for index in leaked)
        times = Counter(group.splits)
        copies.duplicates += len(group) - len(times)
        copies.exact_duplicates += len(group) - len(set(zip(same, group.splits, strict=True)))
        near.update(group.splits if group.kind == "near" else ())
        contradicts = group.contradicts and not group.flat
        copies.contradictions += contradicts
        labelled = {
            (one, text) for one, text, label in zip(same, texts, group.labels, strict=True) if label is not None
        }
        copies.exact_contradictions += contradicts and len({one for one, _ in labelled}) < len(labelled)
        everything = range(len(group))
        again = [index for index in everything if times[group.splits[index]] > 1]
        for chosen, shown, differing in (
            (everything if leaked else (), copies.leak_groups, group.splits),
            (again, copies.duplicate_groups, [""] * len(group)),
            (everything if contradicts else (), copies.contradiction_groups, texts),
        ):
            if chosen and len(shown) < GROUPS:
                shown.append(as_shown(group, chosen, differing))
        if len(data) < _GROUPS_TOLD:
            members = zip(group.splits, group.positions, group.paths, group.labels, strict=True)
            names = ("split", "position", "path", "label")
            told = {name: getattr(group, name) for name in ("kind", "score", "mirrored", "flat")}
            told |= {"leaks": bool(leaked), "contradicts": contradicts}
            data.append({**told, "images": [dict(zip(names, member, strict=True)) for member in members]})
    copies.near = near
    copies.data = {
        "leaks": {"images": copies.leaks, "exact": copies.exact_leaks},
        "duplicates": {"images": copies.duplicates, "exact": copies.exact_duplicates},
        "contradictions": {"pictures": copies.contradictions, "exact": copies.exact_contradictions},
        "number_of_groups": len(found.groups),
        "groups": data,
    }
    return copies


def as_shown(group: duplicates.Group, chosen: Sequence[int], differing: Sequence[str]) -> Group:
    """A few of the `chosen` images of a group, of each kind one before there is a second.

    Args:
        differing: what kind each image of the group is.
    """
    turns = {index: sum(differing[other] == differing[index] for other in chosen if other < index) for index in chosen}
    first = sorted(sorted(chosen, key=turns.get)[:OF_A_GROUP])
    members = [
        Member(Place(group.splits[i], group.positions[i], group.paths[i]), label_text(group.labels[i])) for i in first
    ]
    return Group(members, len(chosen), group.kind != "near", group.mirrored)


def label_text(label: Any) -> str:
    """A label as a scan has it, in words."""
    if label is None:
        return ""
    if isinstance(label, list):
        return ", ".join(one if isinstance(one, str) else f"{one:.4g}" for one in label) or "none"
    return str(label)


def report_data(found: Findings, training: Sequence[str]) -> dict[str, Any]:
    """All figures of the page, as report.json has them."""
    measures, copies = found.measures, found.copies
    names = measures.label_names
    data: dict[str, Any] = {
        "dataset": found.name,
        "images": measures.images,
        "complete": found.sample is None,
        "found": found.found,
        "splits": {},
        "train_split": found.train,
        "validation_split": found.validation,
        "remarks": list(found.remarks),
        "labels": measures.kind,
        "label_names": names,
    }
    for name, split in measures.splits.items():
        entry: dict[str, Any] = {"images": split.images, "broken": split.broken, "origin": found.origins.get(name, "")}
        if measures.kind != "nothing":
            entry["unlabelled"] = split.unlabelled
        if measures.kind in ("class", "classes"):
            entry["counts"] = split.counts.tolist()
        if measures.kind == "classes":
            entry["labels_per_image"] = {str(key): count for key, count in sorted(split.per_image.items())}
        if split.sums is not None and split.labelled:
            entry |= {key: getattr(split, key).tolist() for key in ("mean", "std", "least", "most")}
            entry["histogram"] = split.histogram.tolist()
        data["splits"][name] = entry
    if any(split.histogram is not None for split in measures.splits.values()):
        data["histogram_edges"] = [edges.tolist() for edges in number_edges(measures)]
    if measures.together is not None:
        data["together"] = {"classes": [names[i] for i in measures.common], "images": measures.together.tolist()}
    if measures.readable:
        data["sizes"] = {
            side: {f"{share:g}": quantile(counts, share) for share in (0.05, 0.25, 0.5, 0.75, 0.95, 1)}
            for side, counts in (("shorter", measures.shorter), ("longer", measures.longer))
        }
        common = measures.sizes.most_common(100)
        data["sizes"]["common"] = [[width, height, count] for (width, height), count in common]
        data["sizes"]["oblong"] = measures.oblong
    for name in ("smallest", "largest", "longest", "blanks"):
        data[name] = [{**vars(place), "what": what} for _, place, what in getattr(measures, name).found]
    data |= {
        "formats": dict(measures.formats),
        "modes": dict(measures.modes),
        "bytes": measures.bytes,
        "channel_mean": measures.channel_mean.tolist() if measures.measured else None,
        "channel_std": measures.channel_std.tolist() if measures.measured else None,
        "grey": measures.grey,
        "grey_as_rgb": measures.grey_as_rgb,
        "blank": measures.blank,
    }
    for name, reasons in (("broken", measures.reasons), ("label_errors", measures.label_errors)):
        data[name] = [
            {"reason": reason, "images": count, "examples": [list(one) for one in reasons.examples[reason]]}
            for reason, count in reasons.counts.most_common()
        ]
    data["copies"] = copies.data
    if found.outliers is not None:
        worst = found.outliers.worst.found
        data["outliers"] = {
            "images": found.outliers.count,
            "worst": [{**vars(place), "what": what, "margin": -value} for value, place, what in worst],
            "strangers": [list(row) for row in found.outliers.strangers],
            "alike": [list(row) for row in found.outliers.twins],
        }
    data["suggestions"] = [{"why": one.reason, "flags": dict(one.flags)} for one in found.suggestions]
    data["command"] = {"line": found.command, "words": list(training)}
    return data


def summary_of(found: Findings, folder: Path) -> list[str]:
    """What was found, in a few lines."""
    measures = found.measures
    what = ", ".join(f"{split.images} in {name}" for name, split in measures.splits.items())
    lines = [f"{found.name}: {measures.images} images ({what})"]
    faults = [f"{fault} {count}" for fault, count in found.found.items() if count]
    lines.append(f"Found: {', '.join(faults)}." if faults else "No leaks, no copies, nothing broken.")
    lines += [f"Suggested: {found.command}"] if found.command else []
    lines.append(f"Written to {folder / REPORT}")
    return [printable(line) for line in lines]
