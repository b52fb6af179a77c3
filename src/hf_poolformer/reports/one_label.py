"""The report's sections for images with one class each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ..evaluation.intervals import wilson
from ..evaluation.pictures import draw_confusion_matrix
from ..foundation.names import undecodable_escaped
from . import analysis
from .charts import FAINT
from .label_errors import confident_learning
from .material import Material, Told, bounds_text, percent, plural
from .page import Chart, Gallery, Section, Table, Text


# How much is shown; the tables beside the report have all of it.
LOSSES, ERRORS, AMBIGUOUS, PAIRS, OF_PAIR, LISTED_PAIRS, LISTED_CLASSES = 24, 24, 12, 8, 4, 50, 200
# Up to so many classes the confusion matrix is drawn, and up to so many it is in the JSON.
DRAWN_CLASSES, MATRIX_CLASSES = 30, 100
# The commonest class has so many times the images of the rarest: the accuracy says little of the rare ones.
UNEVEN = 3
# A class is said to be weak below this F1, and a model to be too sure or not sure enough by this calibration error.
WEAK, MISCALIBRATED = 0.5, 0.05


class OneLabel:
    """What an evaluation says of a classifier.

    Attributes:
        shown, explained: for `Material.fetch`.
        tables: by the file's name, the columns of what stands beside the report.
        faults: (images,), whether the prediction is wrong.
    """

    def __init__(self, material: Material):
        self.material, rows = material, material.rows
        self.names, self.count = material.names, len(rows.label_names)
        self.labels, self.predicted = rows.labels.astype(np.int64), rows.predictions.astype(np.int64)
        self.probabilities, self.losses = rows.probabilities, rows.losses
        self.faults = self.labels != self.predicted
        self.class_counts = np.bincount(self.labels, minlength=self.count)
        self.recall = np.bincount(self.labels[~self.faults], minlength=self.count) / np.maximum(self.class_counts, 1)
        self.confidence = self.probabilities[np.arange(len(self.labels)), self.predicted]
        self.pairs = analysis.confused_pairs(self.labels, self.predicted, self.count)
        self.errors = confident_learning(self.probabilities, self.labels)
        self.systematic = self.errors.systematic()
        self.ambiguous = analysis.ambiguous_images(self.probabilities, self.labels)
        self.bins = analysis.reliability(self.confidence, ~self.faults)
        self.temperature = analysis.best_temperature(self.probabilities, self.labels) if self.count > 1 else 1.0
        self.worst = np.argsort(-self.losses, kind="stable")[:LOSSES].tolist()
        self.of_pairs = self.examples_of_pairs()
        examples = [row for rows in self.of_pairs.values() for row in rows]
        self.doubted = self.errors.found[:ERRORS].tolist()
        self.between = self.ambiguous.images[:AMBIGUOUS].tolist()
        self.shown = [*self.worst, *self.doubted, *self.between, *examples]
        self.explained = {
            row: list(dict.fromkeys([int(self.predicted[row]), int(self.labels[row])])) for row in self.worst
        }
        self.tables = {"label_errors.parquet": self.error_table(), "ambiguous.parquet": self.ambiguous_table()}

    def examples_of_pairs(self) -> dict[tuple[int, int], list[int]]:
        """Of the most confused pairs the images with the highest losses."""
        found = {}
        for label, prediction, _ in self.pairs[:PAIRS]:
            members = np.flatnonzero((self.labels == label) & (self.predicted == prediction))
            found[label, prediction] = members[np.argsort(-self.losses[members], kind="stable")][:OF_PAIR].tolist()
        return found

    @property
    def first_figure(self) -> str | None:
        """The figure that matters most, if not the one that usually does."""
        present = self.class_counts[self.class_counts > 0]
        return "eval_f1_macro" if present.max() >= UNEVEN * present.min() else None

    # Tables and data

    def error_table(self) -> dict[str, Any]:
        found, errors = self.errors.found, self.errors
        return self.placed(found) | {
            "rank": np.arange(1, len(found) + 1),
            "label": self.texts(self.labels[found]),
            "suggested": self.texts(errors.suggested[found]),
            "label_probability": self.probabilities[found, self.labels[found]],
            "suggested_probability": self.probabilities[found, errors.suggested[found]],
            "score": errors.scores[found],
        }

    def ambiguous_table(self) -> dict[str, Any]:
        found = self.ambiguous
        return self.placed(found.images) | {
            "label": self.texts(self.labels[found.images]),
            "first": self.texts(found.first),
            "second": self.texts(found.second),
            "first_probability": found.shares[:, 0],
            "second_probability": found.shares[:, 1],
        }

    def placed(self, images: np.ndarray) -> dict[str, Any]:
        table = self.material.rows.table.select(["path", "split", "position"]).take(pa.array(images, pa.int64()))
        return {name: table[name] for name in table.column_names}

    def texts(self, classes: np.ndarray) -> list[str]:
        names = [undecodable_escaped(name) for name in self.material.rows.label_names]
        return [names[index] for index in classes]

    def data(self) -> dict[str, Any]:
        matrix = None
        if self.count <= MATRIX_CLASSES:
            matrix = analysis.confusion_matrix(self.labels, self.predicted, self.count).tolist()
        of_row = self.material.place
        return {
            "classes": self.class_rows(),
            "confusion_matrix": matrix,
            "confused_pairs": [
                {"label": self.names[a], "prediction": self.names[b], "images": count, "share": self.share(a, count)}
                for a, b, count in self.pairs[:LISTED_PAIRS]
            ],
            "calibration": {
                "error": analysis.calibration_error(self.bins),
                "bins": self.bins,
                "temperature": self.temperature,
                "error_at_temperature": self.error_at_temperature(),
            },
            "label_errors": {
                "images": len(self.errors.found),
                "joint_estimate": self.errors.estimate,
                "thresholds": dict(zip(self.names, self.errors.thresholds.tolist(), strict=True)),
                "shown": [of_row(row) | self.doubt(row) for row in self.doubted],
                "all": "label_errors.parquet",
            },
            "mislabelled_classes": [
                {"label": self.names[a], "looks_like": self.names[b], "images": count, "of_confident": of}
                for a, b, count, of in self.systematic
            ],
            "ambiguous": {
                "images": len(self.ambiguous.images),
                "pairs": self.ambiguous_pairs(),
                "shown": [
                    of_row(row) | {"classes": [self.names[a], self.names[b]], "probabilities": shares.tolist()}
                    for row, a, b, shares in self.between_rows()
                ],
                "all": "ambiguous.parquet",
            },
            "highest_losses": [
                of_row(row)
                | {
                    "label": self.names[self.labels[row]],
                    "prediction": self.names[self.predicted[row]],
                    "probability": float(self.confidence[row]),
                    "loss": float(self.losses[row]),
                    "label_doubted": row in self.all_doubted,
                }
                for row in self.worst
            ],
        }

    @property
    def all_doubted(self) -> set[int]:
        return set(self.errors.found.tolist())

    def share(self, label: int, count: int) -> float:
        """Of the images of a class."""
        return count / int(self.class_counts[label])

    def class_rows(self) -> list[dict[str, Any]]:
        """The figures of each class, those first that are recognised worst; last those without images."""
        keys = ("precision", "recall", "f1")
        figures = {key: self.material.of_each(f"eval_per_class_{key}") for key in keys}
        bounds = {key: self.material.intervals_of_each(f"eval_per_class_{key}") for key in keys}
        rows = [
            {"label": self.names[index], "images": int(self.class_counts[index])}
            | {key: figures[key][index] for key in keys}
            | {f"{key}_interval": bounds[key][index] for key in keys}
            for index in range(self.count)
        ]
        return sorted(rows, key=lambda row: (row["images"] == 0, row["f1"] or 0.0))

    def error_at_temperature(self) -> float:
        tempered = analysis.at_temperature(self.probabilities, self.temperature).max(1)
        return analysis.calibration_error(analysis.reliability(tempered, ~self.faults))

    def doubt(self, row: int) -> dict[str, Any]:
        label, meant = int(self.labels[row]), int(self.errors.suggested[row])
        return {
            "label": self.names[label],
            "suggested": self.names[meant],
            "label_probability": float(self.probabilities[row, label]),
            "suggested_probability": float(self.probabilities[row, meant]),
            "score": float(self.errors.scores[row]),
        }

    def between_rows(self) -> list[tuple[int, int, int, np.ndarray]]:
        found = self.ambiguous
        return list(zip(self.between, found.first, found.second, found.shares, strict=False))

    def ambiguous_pairs(self) -> list[dict[str, Any]]:
        """Which two classes ambiguous images are between, the commonest first."""
        pair = np.sort(np.stack([self.ambiguous.first, self.ambiguous.second], axis=1), axis=1).reshape(-1, 2)
        pairs, counts = np.unique(pair, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:LISTED_PAIRS]
        return [
            {"classes": [self.names[index] for index in pairs[place]], "images": int(counts[place])} for place in order
        ]

    # Slices

    slice_intro = (
        "Expected is the accuracy if each class were recognised in the slice as it is everywhere: it is less in a "
        "slice of difficult classes."
    )

    def slice_figures(self, members: np.ndarray) -> dict[str, Any]:
        """The accuracy, and what it would be if each class were recognised in the slice as it is everywhere."""
        hits = int((~self.faults[members]).sum())
        low, high = wilson(hits, len(members))
        return {
            "accuracy": (hits / len(members), float(low), float(high)),
            "expected": float(self.recall[self.labels[members]].mean()),
        }

    # What stands out, and sections

    def findings(self) -> list[str]:
        present = np.flatnonzero(self.class_counts)
        most = int(self.class_counts.argmax())
        share = percent(int(self.class_counts[most]) / len(self.labels))
        found = [f"Always saying “{self.names[most]}” would be right for {share}."]
        found += [
            f"{plural(count, 'image')} labelled “{self.names[a]}” look like “{self.names[b]}”: "
            f"{percent(count / of)} of those that the model is confident about. Are the labels mixed up?"
            for a, b, count, of in self.systematic
        ]
        if self.pairs:
            label, prediction, count = self.pairs[0]
            found.append(
                f"The commonest mistake is to take “{self.names[label]}” for “{self.names[prediction]}”: "
                f"{plural(count, 'image')}, {percent(self.share(label, count))} of the class."
            )
        weak = [row for row in self.class_rows() if row["images"] and (row["f1"] or 0) < WEAK]
        if weak and len(present) > 1:
            shown = ", ".join(f"“{row['label']}” ({row['f1'] or 0:.2f})" for row in weak[:3])
            found.append(f"{plural(len(weak), 'class has', 'classes have')} an F1 below {WEAK}: {shown}.")
        if len(self.errors.found):
            found.append(f"The labels of {plural(len(self.errors.found), 'image')} are doubted by the model.")
        return found

    def commands(self, told: Told) -> list[str]:
        """
        Args:
            told: how model and data are named in commands.
        """
        found = []
        if len(self.errors.found):
            found += ["# every doubted label, the likeliest errors first", told.show("label_errors.parquet")]
            found += ["# duplicates and leaks are a common reason for wrong labels", told.inspect()]
        if self.first_figure or any(row["images"] and (row["f1"] or 0) < WEAK for row in self.class_rows()):
            found += ["# weak or rare classes: train on, every class as often", told.train("--sampling", "balanced")]
        return found

    def sections(self) -> list[Section]:
        sections = [self.mislabelled_section()] if self.systematic else []
        sections += [self.error_section(), self.loss_section()]
        if self.count > 1:
            sections.append(self.confusion_section())
        sections.append(self.class_section())
        if self.count > 1:
            sections += [self.calibration_section(), self.ambiguous_section()]
        return sections

    def mislabelled_section(self) -> Section:
        rows = [
            [self.names[a], self.names[b], count, count / of, int(self.class_counts[a])]
            for a, b, count, of in self.systematic
        ]
        return Section(
            "Classes that look mislabelled",
            [
                Table(
                    ["label", "looks like", "images", "of the confident", "images of the class"],
                    rows,
                    formats=["", "", ",", ".1%", ","],
                )
            ],
            "Most images with this label look like one other class. Either the images lie in the wrong folder, the "
            "names of two classes are exchanged, or the model has never learned this class. Look at the images first: "
            "all other figures of these classes mean nothing until this is known.",
            "bad",
        )

    def error_section(self) -> Section:
        count = len(self.errors.found)
        if not count:
            return Section(
                "Likely label errors",
                [
                    Text(
                        "The model doubts no label: of no image is it as sure of another class as of that class's own."
                    )
                ],
                level="good",
            )
        tiles = []
        for row in self.doubted:
            doubt = self.doubt(row)
            lines = [
                f"label: {doubt['label']} ({percent(doubt['label_probability'])})",
                f"rather: {doubt['suggested']} ({percent(doubt['suggested_probability'])})",
            ]
            tiles.append(self.material.tile(row, lines))
        return Section(
            "Likely label errors",
            [Gallery(tiles, f"The first {len(tiles)} of {count:,}; all are in label_errors.parquet.")],
            f"{plural(count, 'image')} of {len(self.labels):,}, by confident learning (arXiv 1911.00068): the model "
            "is as sure of another class as it usually is of that class, and surer than of the label. First come "
            "those where the other class is most times as probable. Go down until the labels are right: further "
            "down, it is the model that errs. It says nothing about images that the model has learned by heart, so "
            "evaluate on others.",
            "warning",
        )

    def loss_section(self) -> Section:
        doubted = self.all_doubted
        tiles = [
            self.material.tile(
                row,
                [
                    f"{self.names[self.labels[row]]} → {self.names[self.predicted[row]]} "
                    f"({percent(self.confidence[row])})",
                    f"loss {self.losses[row]:.2f}",
                ],
                "label doubted" if row in doubted else "",
                heats=True,
            )
            for row in self.worst
        ]
        evidence = (
            self.material.unexplained
            or "Beside each image, Grad-CAM: where it speaks for the prediction, then where for the label."
        )
        return Section(
            "Highest losses",
            [Gallery(tiles, "label → prediction (its probability)")],
            f"The images whose label the model found least probable. {evidence}",
        )

    def confusion_section(self) -> Section:
        if not self.pairs:
            return Section("Confusions", [Text("There are none: every image is recognised.")], level="good")
        tiles = []
        for (label, prediction), rows in self.of_pairs.items():
            pictures = [self.material.pictures[row] for row in rows if row in self.material.pictures]
            count = next(count for a, b, count in self.pairs if (a, b) == (label, prediction))
            tile = self.material.tile(rows[0], [])
            tile.pictures = pictures
            tile.lines = [
                f"{self.names[label]} → {self.names[prediction]}",
                f"{plural(count, 'image')}, {percent(self.share(label, count))} of the class",
            ]
            tiles.append(tile)
        shown = self.pairs[:LISTED_PAIRS]
        parts: list[Any] = [
            Gallery(tiles, "The most confused pairs, label → prediction, each with its worst images.", side=64),
            Table(
                ["label", "prediction", "images", "of the label"],
                [[self.names[a], self.names[b], count, self.share(a, count)] for a, b, count in shown],
                f"The first {len(shown)} of {plural(len(self.pairs), 'confused pair')}.",
                ["", "", ",", ".1%"],
            ),
        ]
        if self.count <= DRAWN_CLASSES:
            matrix = analysis.confusion_matrix(self.labels, self.predicted, self.count)
            side = 3.2 + 0.32 * self.count
            parts.append(
                Chart(
                    lambda axes: draw_confusion_matrix(axes, matrix, self.names),
                    "Confusion matrix: rows are labels, columns predictions",
                    "Confusion matrix: images by label (rows) and prediction (columns).",
                    (side + 0.8, side),
                )
            )
        return Section("Confusions", parts)

    def class_section(self) -> Section:
        rows = [
            [row["label"], row["images"]]
            + [
                value
                for key in ("recall", "precision", "f1")
                for value in (row[key], bounds_text(row[f"{key}_interval"]))
            ]
            for row in self.class_rows()
        ]
        headings = ["class", "images"] + [
            text for key in ("recall", "precision", "F1") for text in (key, "95 % interval")
        ]
        caption = (
            ""
            if len(rows) <= LISTED_CLASSES
            else f"The worst {LISTED_CLASSES} of {len(rows):,}; all are in report.json."
        )
        formats = ["", ",", ".3f", "", ".3f", "", ".3f", ""]
        return Section(
            "Classes",
            [Table(headings, rows[:LISTED_CLASSES], caption, formats)],
            "The worst first. Intervals of recall and precision are Wilson's, those of F1 the bootstrap's; where two "
            "overlap, the order may be chance.",
        )

    def calibration_section(self) -> Section:
        error = analysis.calibration_error(self.bins)
        sure = sum((row["confidence"] - row["right"]) * row["images"] for row in self.bins) > 0
        after = self.error_at_temperature()
        advice = "Its probabilities can be taken as they are."
        if error >= MISCALIBRATED:
            advice = (
                f"It is {'too sure of itself' if sure else 'not sure enough'}: a probability must not be read as a "
                f"chance of being right. Logits divided by {self.temperature:.2f} would bring the error to "
                f"{after:.3f}, on these very images."
            )

        def draw(axes: Any) -> None:
            axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--")
            where = [row["confidence"] for row in self.bins]
            right = [row["right"] for row in self.bins]
            ends = [
                [row["right"] - row["right_interval"][0] for row in self.bins],
                [row["right_interval"][1] - row["right"] for row in self.bins],
            ]
            axes.errorbar(where, right, yerr=np.maximum(ends, 0), fmt="o-", markersize=4, capsize=2, linewidth=1)
            axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="probability of the prediction", ylabel="share that is right")
            axes.grid()

        return Section(
            "Calibration",
            [
                Chart(
                    draw,
                    f"Reliability diagram; calibration error {error:.3f}",
                    "Reliability diagram, with 95 % intervals: below the dashed line the model is too sure.",
                    (4.6, 3.6),
                ),
                Table(
                    ["probability", "images", "said", "right", "95 % interval"],
                    [
                        [
                            f"{row['from']:.2f} to {row['to']:.2f}",
                            row["images"],
                            row["confidence"],
                            row["right"],
                            bounds_text(row["right_interval"]),
                        ]
                        for row in self.bins
                    ],
                    formats=["", ",", ".3f", ".3f", ""],
                ),
            ],
            f"The expected calibration error, over 15 bins of equal width, is {error:.3f}. {advice}",
            "warning" if error >= MISCALIBRATED else "plain",
        )

    def ambiguous_section(self) -> Section:
        together, margin = percent(analysis.TORN_TOGETHER), percent(analysis.TORN_MARGIN)
        intro = (
            f"Two classes have at least {together} of the probability between them, neither leads by more than "
            f"{margin}, and the label is one of the two. Such images may show both, or neither well enough: here the "
            "rule by which people label matters more than the model."
        )
        if not len(self.ambiguous.images):
            return Section("Ambiguous images", [Text("There are none.")], intro)
        tiles = [
            self.material.tile(
                row,
                [
                    f"{self.names[a]} {percent(shares[0])}, {self.names[b]} {percent(shares[1])}",
                    f"label: {self.names[self.labels[row]]}",
                ],
            )
            for row, a, b, shares in self.between_rows()
        ]
        pairs = self.ambiguous_pairs()[:12]
        return Section(
            "Ambiguous images",
            [
                Gallery(
                    tiles, f"The first {len(tiles)} of {len(self.ambiguous.images):,}; all are in ambiguous.parquet."
                ),
                Table(["between", "and", "images"], [[*row["classes"], row["images"]] for row in pairs]),
            ],
            intro,
        )
