"""The report's sections for models that give numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..evaluation.pictures import draw_scatter
from . import analysis
from .charts import FAINT
from .material import Material, Told
from .page import Chart, Gallery, Section, Table


LOSSES, DRAWN_TARGETS, LISTED_TARGETS, MOST_DOTS = 24, 3, 200, 1000
# An answer is systematically off in a range of the target where the mean error is so many times as large as chance
# would have it.
BEYOND_CHANCE = 3.0


class Numbers:
    """What an evaluation says of a regressor; see `one_label.OneLabel`.

    Attributes:
        faults: (images,), the absolute error; of several targets its mean, each in units of the target's spread, since
            metres and degrees cannot be added.
    """

    first_figure = None

    def __init__(self, material: Material):
        self.material, rows = material, material.rows
        self.names, self.count = material.names, len(rows.label_names)
        self.targets, self.answers, self.losses = rows.labels, rows.answers, rows.losses
        self.errors = self.answers.astype(np.float64) - self.targets
        spread = self.targets.astype(np.float64).std(0)
        self.relative = np.abs(self.errors) / (np.where(spread > 0, spread, 1) if self.count > 1 else 1)
        self.faults = self.relative.mean(1)
        self.worst = np.argsort(-self.faults, kind="stable")[:LOSSES].tolist()
        self.shown = self.worst
        self.explained = {row: [self.worst_target(row)] for row in self.worst}
        self.tables: dict[str, Any] = {}
        self.ranges = [analysis.target_ranges(self.targets[:, target]) for target in range(self.count)]

    @property
    def slice_intro(self) -> str:
        unit = "in the unit of the target" if self.count == 1 else "of each target in units of its spread"
        return f"The test is on the absolute error, {unit}; bias is by how much answers are too large."

    def worst_target(self, row: int) -> int:
        return int(self.relative[row].argmax())

    # Data

    def data(self) -> dict[str, Any]:
        return {
            "targets": [
                {
                    "target": self.names[target],
                    **analysis.number_figures(self.answers[:, target], self.targets[:, target]),
                    "intervals": {
                        key: self.material.intervals_of_each(f"eval_per_target_{key}")[target]
                        for key in ("mae", "rmse", "r2")
                    },
                    "ranges": self.range_rows(target),
                }
                for target in range(self.count)
            ],
            "largest_errors": [
                self.material.place(row)
                | {
                    "targets": self.targets[row].tolist(),
                    "answers": self.answers[row].tolist(),
                    "explained": self.names[self.worst_target(row)],
                    "loss": float(self.losses[row]),
                }
                for row in self.worst
            ],
        }

    def range_rows(self, target: int) -> list[dict[str, Any]]:
        rows = []
        for members in self.ranges[target]:
            truth, errors = self.targets[members, target], self.errors[members, target]
            figures = analysis.number_figures(self.answers[members, target], truth)
            figures.pop("r2")  # of a narrow range it says how narrow it is
            chance = float(errors.std()) / np.sqrt(len(members))
            rows.append(
                {
                    "from": float(truth.min()),
                    "to": float(truth.max()),
                    "images": len(members),
                    **figures,
                    "biased": bool(abs(figures["bias"]) > BEYOND_CHANCE * chance and abs(figures["bias"]) > 0),
                }
            )
        return rows

    # Slices

    def slice_figures(self, members: np.ndarray) -> dict[str, Any]:
        """Of one target in its unit; of several the means over the targets, errors in units of their spread."""
        errors = self.relative[members].mean(1)
        half = 1.96 * float(errors.std(ddof=1)) / np.sqrt(len(errors)) if len(errors) > 1 else np.nan
        mean = float(errors.mean())
        figures = {"mae": (mean, max(mean - half, 0.0), mean + half)}
        if self.count > 1:
            return figures
        of_slice = analysis.number_figures(self.answers[members, 0], self.targets[members, 0])
        return figures | {key: of_slice[key] for key in ("rmse", "bias", "r2")}

    # What stands out, and sections

    def findings(self) -> list[str]:
        found = []
        for target in range(min(self.count, DRAWN_TARGETS)):
            name = f"“{self.names[target]}”"
            figures = analysis.number_figures(self.answers[:, target], self.targets[:, target])
            constant = float(np.abs(self.targets[:, target] - np.median(self.targets[:, target])).mean())
            if np.isfinite(figures["r2"]):
                found.append(
                    f"Of {name}, always answering the median would be off by {constant:.4g} on average; the model is "
                    f"by {figures['mae']:.4g}."
                )
            rows = self.range_rows(target)
            for row, end in ((rows[0], "small"), (rows[-1], "large")) if len(rows) > 1 else ():
                if row["biased"]:
                    way = "large" if row["bias"] > 0 else "small"
                    found.append(
                        f"Of {end} {name} ({row['from']:.4g} to {row['to']:.4g}) the answers are too {way}, by "
                        f"{abs(row['bias']):.4g} on average."
                    )
        return found

    def commands(self, told: Told) -> list[str]:
        path = self.material.rows.table["path"][self.worst[0]].as_py()
        if "#" in path:  # a row of a table, and no file
            return []
        return ["# where the model looked in the image with the largest error", told.line("explain", told.model, path)]

    def sections(self) -> list[Section]:
        return [self.chart_section(), self.error_section(), self.target_section()]

    def chart_section(self) -> Section:
        taken = np.linspace(0, len(self.targets) - 1, min(len(self.targets), MOST_DOTS)).astype(int)
        parts: list[Any] = []
        for target in range(min(self.count, DRAWN_TARGETS)):
            name, truth = self.names[target], self.targets[taken, target]
            answers, errors = self.answers[taken, target], self.errors[taken, target]

            def draw(axes: Any, truth: np.ndarray = truth, answers: np.ndarray = answers) -> None:
                draw_scatter(axes, truth, answers)

            def draw_errors(axes: Any, truth: np.ndarray = truth, errors: np.ndarray = errors) -> None:
                axes.axhline(0, color=FAINT, linewidth=1)
                axes.scatter(truth, errors, s=12, alpha=0.4, linewidths=0)
                axes.set(xlabel="true", ylabel="predicted less true")
                axes.grid()

            parts += [
                Chart(
                    draw,
                    f"Predicted {name} by the true one",
                    f"{name}: predicted by true; the line is where both are equal.",
                    (4.4, 3.8),
                ),
                Chart(
                    draw_errors,
                    f"Error of {name} by the true one",
                    f"{name}: errors by true; a slope means that "
                    "small ones are answered too large and large ones too small.",
                    (4.4, 3.8),
                ),
            ]
        few = f" {MOST_DOTS:,} of the {len(self.targets):,} images are drawn." if len(self.targets) > MOST_DOTS else ""
        more = f" Of the {self.count} targets the first {DRAWN_TARGETS}." if self.count > DRAWN_TARGETS else ""
        return Section("Predicted and true", parts, f"{few}{more}".strip())

    def error_section(self) -> Section:
        tiles = []
        for row in self.worst:
            target = self.worst_target(row)
            lines = [f"true {self.targets[row, target]:.4g}, predicted {self.answers[row, target]:.4g}"]
            if self.count > 1:
                lines.insert(0, self.names[target])
            tiles.append(self.material.tile(row, lines, heats=True))
        evidence = self.material.unexplained or "Beside each, Grad-CAM: what makes the number larger."
        return Section(
            "Largest errors",
            [Gallery(tiles)],
            f"A number that is wrong in the data is often among them. {evidence}",
        )

    def target_section(self) -> Section:
        parts: list[Any] = []
        if self.count > 1:
            rows = [
                [self.names[target], *(figures[key] for key in ("mae", "rmse", "r2", "bias"))]
                for target in range(min(self.count, LISTED_TARGETS))
                for figures in [analysis.number_figures(self.answers[:, target], self.targets[:, target])]
            ]
            parts.append(Table(["target", "MAE", "RMSE", "R²", "bias"], rows))
        for target in range(min(self.count, DRAWN_TARGETS)):
            rows = [
                [
                    f"{row['from']:.4g} to {row['to']:.4g}",
                    row["images"],
                    row["mae"],
                    row["rmse"],
                    row["bias"],
                    "beyond chance" if row["biased"] else "within chance",
                ]
                for row in self.range_rows(target)
            ]
            parts.append(Table([self.names[target], "images", "MAE", "RMSE", "bias", "the bias is"], rows))
        return Section(
            "By the size of the target",
            parts,
            "Bias is by how much answers are too large on average. It is beyond chance where it is more than "
            f"{BEYOND_CHANCE:g} times its standard error.",
        )
