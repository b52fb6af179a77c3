"""The report's sections for images with any number of labels each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ..evaluation.intervals import wilson
from ..evaluation.thresholds import choose_thresholds
from ..foundation.names import undecodable_escaped
from . import analysis
from .charts import FAINT
from .label_errors import confident_learning_of_each
from .material import Material, Told, bounds_text, percent, plural
from .page import Chart, Gallery, Section, Table, Text


LOSSES, ERRORS, LISTED_LABELS, LISTED_PAIRS = 24, 24, 200, 30
# Curves that are drawn: of all labels together, and of those with the worst F1.
CURVES = 5
# So many labels have their curves in the JSON.
LABELS_WITH_CURVES = 200
WEAK = 0.5


class SeveralLabels:
    """What an evaluation says of a classifier with several labels per image; see `one_label.OneLabel`.

    Attributes:
        faults: (images,), how many labels are wrong.
    """

    first_figure = None
    slice_intro = "Wrong labels are those missed and those too many, per image; the test is on them."

    def __init__(self, material: Material):
        self.material, rows = material, material.rows
        self.names, self.count = material.names, len(rows.label_names)
        self.targets, self.predicted = rows.labels, rows.predictions
        self.probabilities, self.losses = rows.probabilities, rows.losses
        self.thresholds = rows.about.get("thresholds") or [0.5] * self.count
        wrong = self.targets != self.predicted
        self.faults = wrong.sum(1).astype(np.float64)
        self.curves = analysis.threshold_curves(self.probabilities, self.targets)
        self.best = choose_thresholds(self.probabilities, self.targets)
        self.pairs = analysis.confused_labels(self.targets, self.predicted)
        self.errors = confident_learning_of_each(self.probabilities, self.targets)
        self.worst = np.argsort(-self.losses, kind="stable")[:LOSSES].tolist()
        # A tile for each image, whose labels may be doubted several times.
        self.doubted = list(dict.fromkeys(self.errors.images.tolist()))[:ERRORS]
        self.shown = [*self.worst, *self.doubted]
        self.explained = {row: [self.worst_label(row)] for row in self.worst}
        self.tables = {"label_errors.parquet": self.error_table()}

    def worst_label(self, row: int) -> int:
        """The label whose answer is the furthest from the truth."""
        return int(np.abs(self.targets[row] - self.probabilities[row]).argmax())

    # Tables and data

    def error_table(self) -> dict[str, Any]:
        errors = self.errors
        table = self.material.rows.table.select(["path", "split", "position"]).take(
            pa.array(errors.images, pa.int64())
        )
        names = [undecodable_escaped(name) for name in self.material.rows.label_names]
        return {name: table[name] for name in table.column_names} | {
            "rank": np.arange(1, len(errors.images) + 1),
            "label": [names[index] for index in errors.labels],
            "error": np.where(errors.missing, "missing", "extra").tolist(),
            "probability": self.probabilities[errors.images, errors.labels],
            "score": errors.scores,
        }

    def data(self) -> dict[str, Any]:
        curves = {
            self.names[index]: {
                name: self.curves[name][index].tolist() for name in ("precision", "recall", "f1", "predicted")
            }
            for index in range(min(self.count, LABELS_WITH_CURVES))
        }
        place = self.material.place
        return {
            "classes": self.label_rows(),
            "threshold_curves": {
                "thresholds": analysis.THRESHOLDS.tolist(),
                "labels": curves,
                "together": {name: values.tolist() for name, values in self.together().items()},
            },
            "confused_labels": [
                {"missed": self.names[a], "given": self.names[b], "images": count, "expected": expected}
                for a, b, count, expected in self.pairs[:LISTED_PAIRS]
            ],
            "label_errors": {
                "errors": len(self.errors.images),
                "missing": int(self.errors.missing.sum()),
                "extra": int((~self.errors.missing).sum()),
                "shown": [place(row) | {"labels": self.doubts(row)} for row in self.doubted],
                "all": "label_errors.parquet",
            },
            "highest_losses": [
                place(row)
                | {
                    "missed": self.missed(row),
                    "extra": self.extra(row),
                    "explained": self.names[self.worst_label(row)],
                    "loss": float(self.losses[row]),
                }
                for row in self.worst
            ],
        }

    def together(self) -> dict[str, np.ndarray]:
        """Precision, recall and F1 of all labels with one threshold for all."""
        hits = np.nansum(self.curves["precision"] * self.curves["predicted"], axis=0)
        predicted, have = self.curves["predicted"].sum(0), int(self.targets.sum())
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"precision": hits / predicted, "recall": hits / have, "f1": 2 * hits / (predicted + have)}

    def label_rows(self) -> list[dict[str, Any]]:
        """The figures of each label, the worst F1 first; last those that no image has."""
        material = self.material
        keys = ("precision", "recall", "f1")
        figures = {key: material.of_each(f"eval_per_class_{key}") for key in keys}
        bounds = {key: material.intervals_of_each(f"eval_per_class_{key}") for key in keys}
        precision = material.of_each("eval_per_class_average_precision")
        missing, extra = (
            np.bincount(self.errors.labels[kind], minlength=self.count)
            for kind in (self.errors.missing, ~self.errors.missing)
        )
        rows = [
            {"label": self.names[index], "images": int(self.targets[:, index].sum())}
            | {key: figures[key][index] for key in keys}
            | {f"{key}_interval": bounds[key][index] for key in keys}
            | {
                "average_precision": precision[index],
                "threshold": float(self.thresholds[index]),
                "best_threshold": float(self.best[index]),
                "f1_at_best": self.f1_at(index, self.best[index]),
                "missing": int(missing[index]),
                "extra": int(extra[index]),
            }
            for index in range(self.count)
        ]
        return sorted(rows, key=lambda row: (row["images"] == 0, row["f1"] or 0.0))

    def f1_at(self, label: int, threshold: float) -> float:
        has, given = self.targets[:, label] > 0, self.probabilities[:, label] >= np.float32(threshold)
        both = int(has.sum() + given.sum())
        return 2 * int((has & given).sum()) / both if both else float("nan")

    def doubts(self, row: int) -> list[dict[str, Any]]:
        return [
            {
                "label": self.names[label],
                "error": "missing" if missing else "extra",
                "probability": float(self.probabilities[row, label]),
                "score": float(score),
            }
            for label, missing, score in zip(
                *(values[self.errors.images == row] for values in (self.errors.labels, self.errors.missing)),
                self.errors.scores[self.errors.images == row],
                strict=True,
            )
        ]

    def missed(self, row: int) -> list[str]:
        return [self.names[label] for label in np.flatnonzero((self.targets[row] > 0) & (self.predicted[row] == 0))]

    def extra(self, row: int) -> list[str]:
        return [self.names[label] for label in np.flatnonzero((self.targets[row] == 0) & (self.predicted[row] > 0))]

    # Slices

    def slice_figures(self, members: np.ndarray) -> dict[str, Any]:
        targets, predicted = self.targets[members], self.predicted[members]
        exact = int((self.faults[members] == 0).sum())
        low, high = wilson(exact, len(members))
        both = int(targets.sum(dtype=np.int64) + predicted.sum(dtype=np.int64))
        return {
            "wrong_labels": float(self.faults[members].mean()),
            "exact_match": (exact / len(members), float(low), float(high)),
            "f1_micro": 2 * int((targets & predicted).sum(dtype=np.int64)) / both if both else float("nan"),
        }

    # What stands out, and sections

    def findings(self) -> list[str]:
        found = []
        rows = [row for row in self.label_rows() if row["images"]]
        weak = [row for row in rows if (row["f1"] or 0) < WEAK]
        if weak:
            shown = ", ".join(f"“{row['label']}” ({row['f1'] or 0:.2f})" for row in weak[:3])
            found.append(f"{plural(len(weak), 'label has', 'labels have')} an F1 below {WEAK}: {shown}.")
        elif rows:
            found.append(f"The label found worst is “{rows[0]['label']}”, with an F1 of {rows[0]['f1'] or 0:.2f}.")
        if self.gain() >= 0.01:
            found.append(f"Other thresholds would raise the macro F1 by {self.gain():.3f} on these very images.")
        if self.pairs:
            missed, given, count, expected = self.pairs[0]
            found.append(
                f"“{self.names[given]}” is most often given in the place of “{self.names[missed]}”: "
                f"{plural(count, 'image')}, where {expected:.1f} would be chance."
            )
        if len(self.errors.images):
            missing = int(self.errors.missing.sum())
            found.append(
                f"The model doubts {plural(len(self.errors.images), 'label')}: {missing:,} that should be there, "
                f"{len(self.errors.images) - missing:,} that should not."
            )
        return found

    def gain(self) -> float:
        """By how much the thresholds that are best on these images raise the macro F1."""
        rows = [row for row in self.label_rows() if row["images"]]
        return float(np.mean([np.nan_to_num(row["f1_at_best"]) - (row["f1"] or 0) for row in rows])) if rows else 0.0

    def commands(self, told: Told) -> list[str]:
        found = []
        if len(self.errors.images):
            found += ["# every doubted label, the likeliest errors first", told.show("label_errors.parquet")]
        if self.gain() >= 0.01:
            found += [
                "# train on, and choose the thresholds on held-out images",
                told.train("--label_thresholds", "f1"),
            ]
        return found

    def sections(self) -> list[Section]:
        return [
            self.error_section(),
            self.loss_section(),
            self.label_section(),
            self.threshold_section(),
            self.confusion_section(),
        ]

    def error_section(self) -> Section:
        count = len(self.errors.images)
        if not count:
            return Section("Likely label errors", [Text("The model doubts no label.")], level="good")
        tiles = []
        for row in self.doubted:
            doubts = self.doubts(row)
            lines = [f"{doubt['error']}: {doubt['label']} ({percent(doubt['probability'])})" for doubt in doubts[:3]]
            tiles.append(self.material.tile(row, lines, f"{len(doubts) - 3} more" if len(doubts) > 3 else ""))
        images = len(set(self.errors.images.tolist()))
        return Section(
            "Likely label errors",
            [Gallery(tiles, f"The first {len(tiles)} of {plural(images, 'image')}; all are in label_errors.parquet.")],
            f"{plural(count, 'label')} of {plural(images, 'image')}, by confident learning (arXiv 1911.00068) of each "
            "label by itself: missing, where the model is as sure of a label as it usually is of images that have it, "
            "and extra, where it is as sure that there is none. The surest come first. Further down, it is the model "
            "that errs.",
            "warning",
        )

    def loss_section(self) -> Section:
        tiles = []
        for row in self.worst:
            missed, extra = self.missed(row), self.extra(row)
            lines = [
                *([f"missed: {', '.join(missed[:4])}{', …' if len(missed) > 4 else ''}"] if missed else []),
                *([f"extra: {', '.join(extra[:4])}{', …' if len(extra) > 4 else ''}"] if extra else []),
                f"loss {self.losses[row]:.3f}",
            ]
            if row in self.material.heats:
                lines.append(f"Grad-CAM: {self.names[self.worst_label(row)]}")
            tiles.append(self.material.tile(row, lines, heats=True))
        evidence = (
            self.material.unexplained
            or "Beside each, Grad-CAM: where it speaks for the label whose answer is furthest from the truth."
        )
        return Section("Highest losses", [Gallery(tiles)], f"The images whose labels the model got worst. {evidence}")

    def label_section(self) -> Section:
        rows = self.label_rows()
        shown = []
        for row in rows[:LISTED_LABELS]:
            cells = [row["label"], row["images"]]
            for key in ("recall", "precision", "f1"):
                cells += [row[key], bounds_text(row[f"{key}_interval"])]
            shown.append([*cells, row["average_precision"], row["missing"], row["extra"]])
        headings = ["label", "images"]
        for key in ("recall", "precision", "F1"):
            headings += [key, "95 % interval"]
        caption = (
            ""
            if len(rows) <= LISTED_LABELS
            else f"The worst {LISTED_LABELS} of {len(rows):,}; all are in report.json."
        )
        return Section(
            "Labels",
            [
                Table(
                    [*headings, "AP", "doubted: missing", "doubted: extra"],
                    shown,
                    caption,
                    ["", ",", ".3f", "", ".3f", "", ".3f", "", ".3f", ",", ","],
                )
            ],
            "The worst first. Intervals of recall and precision are Wilson's, those of F1 the bootstrap's.",
        )

    def threshold_section(self) -> Section:
        rows = {row["label"]: row for row in self.label_rows()}
        together = self.together()

        def draw_together(axes: Any) -> None:
            for name, values in together.items():
                axes.plot(analysis.THRESHOLDS, values, label="F1" if name == "f1" else name)
            alike = set(self.thresholds)
            for threshold in alike if len(alike) == 1 else ():
                axes.axvline(threshold, color=FAINT, linestyle="--", linewidth=1)
            axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="threshold of all labels")
            axes.grid()
            axes.legend(fontsize=8)

        worst = [self.names.index(name) for name, row in rows.items() if row["images"]][:CURVES]

        def draw_labels(axes: Any) -> None:
            for place, label in enumerate(worst):
                axes.plot(
                    analysis.THRESHOLDS, self.curves["f1"][label], color=f"C{place}", label=self.names[label][:24]
                )
                chosen = self.thresholds[label]
                axes.plot([chosen], [self.f1_at(label, chosen)], "o", color=f"C{place}", markersize=5)
            axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="threshold", ylabel="F1")
            axes.grid()
            axes.legend(fontsize=8)

        return Section(
            "Thresholds",
            [
                Chart(
                    draw_together,
                    "Precision, recall and F1 of all labels over one threshold",
                    "All labels together, with one threshold for all"
                    + (" (dashed: the one in use)." if len(set(self.thresholds)) == 1 else "."),
                ),
                Chart(
                    draw_labels,
                    f"F1 over the threshold, of the {len(worst)} labels with the worst F1",
                    f"F1 of the {plural(len(worst), 'label')} found worst; the dots are the thresholds in use.",
                ),
                Table(
                    ["label", "threshold", "F1", "best here", "F1 there"],
                    [
                        [row["label"], row["threshold"], row["f1"], row["best_threshold"], row["f1_at_best"]]
                        for row in list(rows.values())[:LISTED_LABELS]
                    ],
                    formats=["", ".3f", ".3f", ".3f", ".3f"],
                ),
            ],
            "From which probability on an image has a label. What is best here was chosen on these very images, and "
            "promises too much for others: choose thresholds on a validation split. The curves of every label are in "
            "report.json.",
        )

    def confusion_section(self) -> Section:
        intro = (
            "An image had the one label, which was missed, and was given the other, which it had not. Expected is how "
            "many images that would be if the two mistakes had nothing to do with each other."
        )
        if not self.pairs:
            return Section("Labels confused with each other", [Text("There are none beyond chance.")], intro)
        return Section(
            "Labels confused with each other",
            [
                Table(
                    ["missed", "given", "images", "expected"],
                    [
                        [self.names[a], self.names[b], count, expected]
                        for a, b, count, expected in self.pairs[:LISTED_PAIRS]
                    ],
                    f"The first {min(len(self.pairs), LISTED_PAIRS)} of {len(self.pairs):,}.",
                    ["", "", ",", ".1f"],
                )
            ],
            intro,
        )
