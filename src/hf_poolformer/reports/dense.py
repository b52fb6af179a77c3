"""The report on an evaluation of a segmenter or detector: `report.html`, `report.json`, and `images.parquet`.

Everything on the page is in `report.json` or, image by image, in `images.parquet` (`evaluation.dense_rows`).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..evaluation.dense import DenseFindings
from ..evaluation.dense_metrics import mask_of
from ..evaluation.dense_pictures import (
    SHOWN_SCORE,
    colours,
    draw_errors,
    draw_map,
    draw_objects,
    drawn,
    nearest,
)
from ..evaluation.dense_rows import (
    BACKGROUND,
    BOTH,
    CLASS,
    ERRORS,
    PLACE,
    RIGHT,
    RIGHT_IOU,
    TWICE,
    Shown,
    at_threshold,
    curve_of,
    write_rows,
)
from ..foundation.files import write_json
from ..foundation.names import printable
from ..foundation.report_folder import FIGURES, PAGE, ROWS
from .page import Bars, Chart, Facts, Gallery, Page, Part, Section, Table, Text, Tile, write_page


PICTURE = 320  # longest side of a picture, in pixels
SIDES = {2: 160, 3: 112}  # and on the page, by how many stand side by side
WHERE = ("path", "split", "position")
PAIRS = 20  # pairs of classes
BROKEN = 50  # broken images
NAMED = 30  # classes in a bar chart, and in the legend of the pictures
LONGEST_NAME = 40
# COCO's limits of size, in pixels of area: small, medium, large.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
# What each kind of error is called.
KINDS = {
    "missed": ("missed", "an object that no detection is near"),
    CLASS: ("wrong class", f"at the right place (IoU of at least {RIGHT_IOU}), with the name of another class"),
    PLACE: ("badly placed", f"of the right class, with an IoU of 0.1 to {RIGHT_IOU}"),
    BOTH: ("wrong class and badly placed", f"an IoU of 0.1 to {RIGHT_IOU} with an object of another class only"),
    TWICE: ("found twice", "right, but of an object that a surer detection has"),
    BACKGROUND: ("background", "where there is no object"),
}


def write_dense_report(folder: Path, found: DenseFindings) -> None:
    """Writes the three files; what `evaluation.dense.evaluate_dense_checkpoint` takes.

    Raises:
        UserError: a file cannot be written.
    """
    report = (MapReport if found.task.gives == "map" else ObjectReport)(found)
    about = {**found.about, **report.choices()}
    write_rows(folder / ROWS, report.rows, found.task.gives, about)
    write_json(
        folder / FIGURES,
        {"about": about, "results": found.results, **report.data(), "broken": found.broken},
    )
    page = Page(
        title=f"{found.task.title}: {found.about['model']}",
        subtitle=f"Measured on {found.dataset}, {len(found.rows)} images.",
        sections=list(report.sections()),
    )
    write_page(folder / PAGE, page)


class DenseReport(ABC):
    """What the reports of segmenters and detectors share."""

    def __init__(self, found: DenseFindings):
        self.results, self.figures, self.broken = found.results, found.figures, found.broken
        self.task, self.names, self.rows, self.worst = found.task, found.label_names, found.rows, found.worst
        self.by_place = {row["place"]: row for row in self.rows}
        self.palette = colours(len(self.names))
        self.used: set[int] = set()  # classes in the pictures

    def choices(self) -> dict[str, Any]:
        """What was decided beside the settings."""
        return {}

    def figure(self, key: str) -> float | None:
        value = self.results.get(key)
        return None if value is None else float(value)

    def interval(self, key: str) -> str:
        known = (self.results.get("eval_confidence_intervals") or {}).get(key)
        return f", 95 %: {known[0]:.3f} to {known[1]:.3f}" if known else ""

    def facts(self, *more: tuple[str, str]) -> Facts:
        """The figures of the task, and how many images they are of."""
        pairs = [
            (figure.name + self.interval(figure.key), figure.text(self.results[figure.key]))
            for figure in self.task.figures
            if self.results.get(figure.key) is not None
        ]
        skipped = self.results["eval_skipped_images"]
        images = [("Images", f"{self.results['eval_samples']:,}")]
        broken = [("Broken images, left out", f"{skipped:,}")] if skipped else []
        return Facts([*pairs, *images, *broken, *more])

    def legend(self) -> list[Part]:
        """Which colour is which class, of those in the pictures."""
        swatches = [
            Tile([Image.new("RGB", (48, 24), colour_of(self.palette[index]))], [self.names[index]])
            for index in sorted(self.used)[:NAMED]
        ]
        return [Gallery(swatches, "The colours of the classes", side=32)] if swatches else []

    def worst_section(self, intro: str) -> Section:
        tiles = [self.tile(shown, self.by_place[shown.place]) for shown in self.worst]
        if not tiles:
            return Section("The worst images", [Text("No image has an error.")])
        gallery = Gallery(tiles, side=SIDES[len(tiles[0].pictures)])
        return Section("The worst images", [*self.legend(), gallery], intro)

    def broken_section(self) -> list[Section]:
        if not self.broken:
            return []
        rows = [[row["path"], row["error"]] for row in self.broken[:BROKEN]]
        more = f" The first {BROKEN} of them:" if len(self.broken) > BROKEN else ""
        return [
            Section(
                "Broken images",
                [Table(["image", "what is wrong"], rows)],
                f"{len(self.broken):,} images have broken pixels or annotations, and count nowhere.{more}",
                level="warning",
            )
        ]

    def files_section(self) -> Section:
        return Section(
            "The figures as data",
            [
                Table(
                    ["file", "what it holds"],
                    [
                        [FIGURES, "every figure on this page"],
                        [ROWS, f"a row for each of the {len(self.rows):,} images: pandas.read_parquet reads it"],
                    ],
                )
            ],
        )

    @abstractmethod
    def tile(self, shown: Shown, row: Mapping[str, Any]) -> Tile:
        """An image of those with most errors."""


class MapReport(DenseReport):
    """Of annotation maps."""

    def __init__(self, found: DenseFindings):
        super().__init__(found)
        self.matrix = self.figures["confusion_matrix"]  # pixels, true by predicted
        self.classes = list(self.of_classes())
        self.pairs = confused(self.matrix, self.names)

    def of_classes(self) -> Iterator[dict[str, Any]]:
        true, predicted, correct = self.matrix.sum(axis=1), self.matrix.sum(axis=0), self.matrix.diagonal()
        images = Counter(
            index
            for row in self.rows
            for index, pixels in zip(row["classes"].tolist(), row["true_pixels"].tolist(), strict=True)
            if pixels
        )
        ious = self.figures["eval_per_class_iou"]
        intervals = (self.figures.get("eval_confidence_intervals") or {}).get("eval_per_class_iou")
        for index, name in enumerate(self.names):
            low, high = intervals[index] if intervals else (None, None)
            yield {
                "class": name,
                "iou": number(ious[index]),
                "iou_low": number(low),
                "iou_high": number(high),
                "precision": share(correct[index], predicted[index]),
                "recall": share(correct[index], true[index]),
                "images": images[index],
                "true_pixels": int(true[index]),
                "predicted_pixels": int(predicted[index]),
                "correct_pixels": int(correct[index]),
            }

    def data(self) -> dict[str, Any]:
        return {
            "classes": self.classes,
            "confused": self.pairs,
            "confusion_matrix": self.matrix.tolist(),
            "worst": [
                {
                    name: self.by_place[shown.place][name]
                    for name in ("path", "split", "position", "iou", "pixel_accuracy")
                }
                for shown in self.worst
            ],
        }

    def sections(self) -> Iterator[Section]:
        nothing = not self.matrix.sum()
        yield Section(
            "At a glance",
            [self.facts(("Classes", f"{len(self.names)}"), ("Pixels with a class", f"{int(self.matrix.sum()):,}"))],
            "No pixel of these images has a class: there is nothing to measure." if nothing else "",
            level="warning" if nothing else "plain",
        )
        yield Section(
            "Classes",
            [*self.bars(), self.table()],
            "The intersection over union (IoU) of a class is over the pixels of all images together. From and to is "
            "its 95 % interval by a bootstrap over the images: how much chance is in a test set of this size. A class "
            "that neither is there nor was found has no IoU.",
        )
        yield self.pairs_section()
        if not nothing:
            yield Section("Images", [self.histogram()], "How many images have which IoU, mean over their classes.")
        yield self.worst_section(
            "The images with the lowest IoU: the truth, what the model found, and in red the pixels that are wrong. "
            "What has no class in the truth is grey, and counts nowhere."
        )
        yield from self.broken_section()
        yield self.files_section()

    def bars(self) -> list[Part]:
        known = sorted((row for row in self.classes if row["iou"] is not None), key=lambda row: row["iou"])
        rows = [(row["class"], row["iou"], f"{row['iou']:.3f}") for row in known[:NAMED]]
        caption = "IoU, the worst first" + (f": {NAMED} of {len(known)} classes" if len(known) > NAMED else "")
        return [Bars(rows, caption)] if rows else []

    def table(self) -> Table:
        formats = {"iou": ".3f", "iou_low": ".3f", "iou_high": ".3f", "precision": ".3f", "recall": ".3f"}
        columns = {
            "class": "class",
            "iou": "IoU",
            "iou_low": "from",
            "iou_high": "to",
            "precision": "precision",
            "recall": "recall",
            "images": "images",
            "true_pixels": "pixels",
            "predicted_pixels": "found pixels",
        }
        return Table(
            list(columns.values()),
            [[row[name] for name in columns] for row in self.classes],
            formats=[formats.get(name, "") for name in columns],
        )

    def pairs_section(self) -> Section:
        rows = [[pair["true"], pair["predicted"], pair["pixels"], pair["share"]] for pair in self.pairs[:PAIRS]]
        table = Table(
            ["true class", "taken for", "pixels", "share of the true class"], rows, formats=["", "", "", ".1%"]
        )
        return Section("Confused classes", [table] if rows else [Text("No pixel was taken for another class.")])

    def histogram(self) -> Chart:
        values = np.array([row["iou"] for row in self.rows])
        values = values[~np.isnan(values)]

        def draw(axes: Any) -> None:
            axes.hist(values, bins=20, range=(0, 1))
            axes.set_xlabel("IoU of an image")
            axes.set_ylabel("images")

        return Chart(draw, f"IoU of single images; half of them have {np.median(values):.3f} or more", size=(5.0, 2.6))

    def tile(self, shown: Shown, row: Mapping[str, Any]) -> Tile:
        truth, found, image = shown.truth, shown.found, shown.picture

        def paint(classes: np.ndarray, axes: Any, image: np.ndarray) -> None:
            self.used |= draw_map(axes, image, classes, self.palette)

        pictures = [
            drawn(image, functools.partial(paint, truth), PICTURE),
            drawn(image, functools.partial(paint, found), PICTURE),
            drawn(image, functools.partial(draw_errors, found=found, truth=truth), PICTURE),
        ]
        lost = np.maximum(row["true_pixels"] + row["predicted_pixels"] - 2 * row["correct_pixels"], 0)
        worst = [self.names[row["classes"][place]] for place in np.argsort(-lost, kind="stable")[:3] if lost[place]]
        lines = [
            row["path"],
            f"IoU {row['iou']:.3f}, {row['pixel_accuracy']:.1%} of the pixels right",
            f"most wrong: {', '.join(printable(name, LONGEST_NAME) for name in worst)}",
        ]
        return Tile(pictures, lines)


class ObjectReport(DenseReport):
    """Of boxes, and of masks."""

    def __init__(self, found: DenseFindings):
        super().__init__(found)
        self.curve = curve_of(self.rows)
        self.threshold = SHOWN_SCORE if self.curve.best is None else self.curve.best
        for row in self.rows:
            row |= at_threshold(row, self.threshold)
        self.totals = {name: sum(row[name] for row in self.rows) for name in ("objects", "detections", RIGHT, *KINDS)}
        self.masks = self.task.reads == "masks"
        self.prefix = "eval_mask_" if self.masks else "eval_"
        self.classes = list(self.of_classes())
        self.pairs = self.of_pairs()
        self.sizes = list(self.of_sizes())

    def choices(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def of_classes(self) -> Iterator[dict[str, Any]]:
        objects, taken, right = Counter(), Counter(), Counter()
        for row in self.rows:
            objects.update(row["true_labels"].tolist())
            for label, score, kind in zip(row["labels"].tolist(), row["scores"], row["kinds"], strict=True):
                if score >= self.threshold and kind in (RIGHT, *ERRORS):
                    taken[label] += 1
                    right[label] += kind == RIGHT
        for index, name in enumerate(self.names):
            both = objects[index] + taken[index]
            averages = {
                "ap": self.figures[f"{self.prefix}per_class_map"][index],
                "ap_50": self.figures[f"{self.prefix}per_class_map_50"][index],
                "ap_75": self.figures[f"{self.prefix}per_class_map_75"][index],
                **({"box_ap": self.figures["eval_per_class_map"][index]} if self.masks else {}),
            }
            yield {
                "class": name,
                "objects": objects[index],
                **{key: number(value) for key, value in averages.items()},
                "found": taken[index],
                "precision": share(right[index], taken[index]),
                "recall": share(right[index], objects[index]),
                "f1": 2 * right[index] / both if both else None,
            }

    def of_pairs(self) -> list[dict[str, Any]]:
        """Classes that were taken for each other at the right place."""
        counts = Counter(
            (int(row["true_labels"][of]), int(label))
            for row in self.rows
            for label, score, kind, of in zip(row["labels"], row["scores"], row["kinds"], row["of"], strict=True)
            if kind == CLASS and of >= 0 and score >= self.threshold
        )
        pairs = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return [
            {"true": self.names[true], "predicted": self.names[predicted], "detections": count}
            for (true, predicted), count in pairs
        ]

    def of_sizes(self) -> Iterator[dict[str, Any]]:
        areas = np.concatenate([row["true_areas"] for row in self.rows] or [np.zeros(0)])
        for name, (low, high) in SIZES.items():
            yield {
                "size": name,
                "from_area": low,
                "to_area": None if high == float("inf") else high,
                "objects": int(((areas >= low) & (areas < high)).sum()),
                "ap": self.figure(f"{self.prefix}map_{name}"),
            }

    def data(self) -> dict[str, Any]:
        columns = (*WHERE, "cost", "f1", "objects", "detections", RIGHT, *KINDS)
        return {
            "threshold": self.threshold,
            "errors": self.totals,
            "f1": self.f1(),
            "classes": self.classes,
            "sizes": self.sizes,
            "confused": self.pairs,
            "curve": {name: values[self.steps()].tolist() for name, values in vars(self.curve).items()},
            "worst": [{name: self.by_place[shown.place][name] for name in columns} for shown in self.worst],
        }

    def f1(self) -> float | None:
        both = self.totals["objects"] + self.totals["detections"]
        return 2 * self.totals[RIGHT] / both if both else None

    def steps(self) -> np.ndarray:
        """A few hundred places along the curve."""
        count = len(self.curve.thresholds)
        return np.unique(np.linspace(0, max(count - 1, 0), min(count, 400)).astype(int))

    def sections(self) -> Iterator[Section]:
        nothing = not self.totals["objects"]
        shape = "masks" if self.masks else "boxes"
        f1 = self.f1()
        yield Section(
            "At a glance",
            [
                self.facts(
                    ("Objects", f"{self.totals['objects']:,}"),
                    ("Best threshold", f"{self.threshold:.3f}"),
                    (f"F1 there, of {shape} at IoU {RIGHT_IOU}", "—" if f1 is None else f"{f1:.3f}"),
                )
            ],
            "These images have no annotated object: there is nothing to measure." if nothing else "",
            level="warning" if nothing else "plain",
        )
        yield Section(
            "Classes",
            [*self.bars(), self.table()],
            f"The average precision (AP) of {shape}, as COCO defines it: over IoUs of 0.50 to 0.95, at 0.50 and at "
            f"0.75. Precision, recall and F1 are those at IoU {RIGHT_IOU} of detections with a score of at least "
            f"{self.threshold:.3f}.",
        )
        yield self.sizes_section()
        yield self.errors_section()
        if self.pairs:
            rows = [[pair["true"], pair["predicted"], pair["detections"]] for pair in self.pairs[:PAIRS]]
            yield Section("Confused classes", [Table(["true class", "taken for", "detections"], rows)])
        if len(self.curve.thresholds):
            yield Section(
                "Which threshold",
                [self.curve_chart(), self.score_chart()],
                "The F1 of all classes together is best where detections with a score of at least "
                f"{self.threshold:.3f} count. For fewer false alarms take a higher threshold, to miss less a lower "
                "one. It was chosen on these images: on others it is a little less good.",
            )
        yield self.worst_section(
            "Each wrong detection costs its score, and each object what its detection's score lacks to 1. The images "
            "that cost most: the truth, and what the model found, with a score of at least "
            f"{self.threshold:.3f}."
        )
        yield from self.broken_section()
        yield self.files_section()

    def bars(self) -> list[Part]:
        known = sorted((row for row in self.classes if row["ap"] is not None), key=lambda row: row["ap"])
        rows = [(row["class"], row["ap"], f"{row['ap']:.3f}") for row in known[:NAMED]]
        caption = "AP, the worst first" + (f": {NAMED} of {len(known)} classes" if len(known) > NAMED else "")
        return [Bars(rows, caption)] if rows else []

    def table(self) -> Table:
        columns = {"class": "class", "objects": "objects", "ap": "AP", "ap_50": "AP 0.50", "ap_75": "AP 0.75"}
        if self.masks:
            columns |= {"ap": "mask AP", "box_ap": "box AP"}
        columns |= {"found": "found", "precision": "precision", "recall": "recall", "f1": "F1"}
        whole = ("class", "objects", "found")
        return Table(
            list(columns.values()),
            [[row[name] for name in columns] for row in self.classes],
            formats=["" if name in whole else ".3f" for name in columns],
        )

    def sizes_section(self) -> Section:
        limits = ["below 32 x 32", "32 x 32 to 96 x 96", "from 96 x 96"]
        rows = [[row["size"], limit, row["objects"], row["ap"]] for row, limit in zip(self.sizes, limits, strict=True)]
        parts: list[Part] = [Table(["size", "area in pixels", "objects", "AP"], rows, formats=["", "", "", ".3f"])]
        longest = max((max(row["width"], row["height"]) for row in self.rows), default=0)
        if longest < 2 * 96:
            parts.append(
                Text(
                    f"COCO's limits are for photographs of about 640 x 480 pixels. No side of these images has more "
                    f"than {longest}, so that few objects, if any, can be large: do not compare these figures with "
                    "those of other data."
                )
            )
        return Section("Sizes", parts, "An object's size is the area of its mask, or of its box, in the stored image.")

    def errors_section(self) -> Section:
        kinds = [(name, what, self.totals[key]) for key, (name, what) in KINDS.items()]
        wrong = sum(count for *_, count in kinds)
        bars = Bars([(name, count, f"{count:,}") for name, _, count in kinds])
        table = Table(["error", "what it is", "how many"], [list(kind) for kind in kinds])
        return Section(
            "Errors by kind",
            [bars, table],
            f"Of {self.totals['objects']:,} objects {self.totals[RIGHT]:,} were found, at IoU {RIGHT_IOU} and with a "
            f"score of at least {self.threshold:.3f}; {wrong:,} errors, told apart as TIDE does (arXiv 2008.08115).",
        )

    def curve_chart(self) -> Chart:
        places = self.steps()

        def draw(axes: Any) -> None:
            for name in ("precision", "recall", "f1"):
                values = getattr(self.curve, name)[places]
                axes.plot(self.curve.thresholds[places], values, label=name.replace("f1", "F1"))
            axes.axvline(self.threshold, color="C3", linestyle=":")
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1.02)
            axes.set_xlabel("threshold")
            axes.legend()

        return Chart(
            draw, f"Precision, recall and F1 by threshold; F1 is best at {self.threshold:.3f}", size=(5.0, 3.0)
        )

    def score_chart(self) -> Chart:
        kinds = np.array([kind for row in self.rows for kind in row["kinds"]], dtype=object)
        scores = np.concatenate([row["scores"] for row in self.rows])
        right, wrong = scores[kinds == RIGHT], scores[np.isin(kinds, ERRORS)]

        def draw(axes: Any) -> None:
            axes.hist([right, wrong], bins=20, range=(0, 1), stacked=True, label=["right", "wrong"])
            axes.axvline(self.threshold, color="C3", linestyle=":")
            axes.set_yscale("symlog", linthresh=10)
            axes.set_xlabel("score")
            axes.set_ylabel("detections")
            axes.legend()

        return Chart(draw, "Scores of right and of wrong detections", size=(5.0, 3.0))

    def tile(self, shown: Shown, row: Mapping[str, Any]) -> Tile:
        found = [part for part in shown.found if part["scores"] >= self.threshold]
        pictures = [
            drawn(shown.picture, functools.partial(self.paint, shown, parts, scores), PICTURE)
            for parts, scores in ((shown.truth, False), (found, True))
        ]
        counts = [f"{row[key]} {name}" for key, (name, _) in KINDS.items() if row[key]]
        f1 = "" if np.isnan(row["f1"]) else f", F1 {row['f1']:.2f}"
        lines = [
            row["path"],
            f"{row['objects']} objects, {row[RIGHT]} found{f1}",
            ", ".join(counts) or f"right, but with low scores (costs {row['cost']:.2f})",
        ]
        return Tile(pictures, lines)

    def paint(self, shown: Shown, parts: Sequence[Mapping], with_scores: bool, axes: Any, image: np.ndarray) -> None:
        """Objects of the image in a picture of it."""
        size = image.shape[:2]
        factor = np.array([*size[::-1], *size[::-1]]) / np.array([*shown.size[::-1], *shown.size[::-1]])
        boxes = np.array([part["bbox"] for part in parts], dtype=np.float64).reshape(-1, 4) * factor
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([part["category_id"] for part in parts], dtype=np.int64)
        masks = None
        if self.masks and parts:
            masks = [nearest(mask_of(part), size) for part in parts]
        scores = np.array([part["scores"] for part in parts]) if with_scores else None
        self.used |= draw_objects(axes, image, boxes, labels, masks, scores, self.palette)


def confused(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs of classes by the number of pixels of the first that were taken for the second, the most first."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    true = matrix.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[: (wrong > 0).sum()]
    return [
        {
            "true": names[first],
            "predicted": names[second],
            "pixels": int(wrong[first, second]),
            "share": share(wrong[first, second], true[first]),
        }
        for first, second in zip(*map(list, np.unravel_index(order, wrong.shape)), strict=True)
    ]


def number(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def colour_of(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(np.rint(255 * np.asarray(colour)[:3]).astype(int).tolist())
