"""What the rows of two evaluations say of their models: figures, tests, and what became better and worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from ..evaluation.rows import KEY, Rows
from ..foundation.strict_json import to_json
from ..foundation.tasks import Figure
from .paired import SIGNIFICANT, McNemar, Paired, mcnemar, newcombe, paired_figures
from .pairing import Answers, Pairs, pair
from .speed import Cost


# Mistakes that are told, those whose number changed most.
MOST_MISTAKES = 30


@dataclass(frozen=True)
class Mistake:
    """Images of one class that a model takes for another."""

    label: str
    prediction: str
    a: int
    b: int


@dataclass(frozen=True)
class Table:
    """How many images both models get right, one of them, and neither."""

    both: int
    only_a: int
    only_b: int
    neither: int


class Comparison:
    """
    Two models on the same images. All differences are B's figure less A's.

    Attributes:
        names: of A and of B.
        figures: those of the task, by their keys; of single labels a list with one for each.
        costs: of A and of B; None where they are not known.
        note: on the speed; empty if there is nothing to say.
        broken: images that a model could not be shown: `path`, `split`, `position` and `error` of each.
    """

    def __init__(
        self,
        a: Rows,
        b: Rows,
        names: tuple[str, str],
        costs: tuple[Cost | None, Cost | None] = (None, None),
        note: str = "",
        broken: Sequence[Mapping[str, Any]] = (),
    ):
        self.names, self.costs, self.note, self.broken = names, costs, note, broken
        self.pairs: Pairs = pair(a, b)
        judge = self.pairs.new_judge()
        self.figures: dict[str, Paired | list[Paired]] = paired_figures(
            judge, self.pairs.columns(self.pairs.a), self.pairs.columns(self.pairs.b)
        )

    @cached_property
    def main_figure(self) -> Figure:
        """The one that says which model is better."""
        return self.shown_figures[0]

    @cached_property
    def shown_figures(self) -> list[Figure]:
        figures = self.pairs.task.figures_of(len(self.pairs.label_names))
        return [figure for figure in figures if figure.key in self.figures]

    @property
    def main(self) -> Paired:
        return self.figures[self.main_figure.key]

    @cached_property
    def table(self) -> Table | None:
        """None for numbers, which are not right or wrong."""
        if self.pairs.task.reads == "numbers":
            return None
        right_a, right_b = self.pairs.right(self.pairs.a), self.pairs.right(self.pairs.b)
        cells = (right_a & right_b, right_a & ~right_b, ~right_a & right_b, ~(right_a | right_b))
        return Table(*(int(cell.sum()) for cell in cells))

    @cached_property
    def test(self) -> McNemar | None:
        return None if self.table is None else mcnemar(self.table.only_a, self.table.only_b)

    @property
    def p(self) -> float | None:
        """Of the main figure: McNemar's for the accuracy, else the bootstrap's."""
        return self.test.p if self.pairs.task.reads == "class" else self.main.p

    @property
    def better(self) -> str | None:
        """The model that is significantly better, "A" or "B"."""
        if self.p is None or self.p >= SIGNIFICANT:
            return None
        return self.main.ahead(self.main_figure)

    @property
    def agreement(self) -> float:
        """Share of the images on which both say the same."""
        return float(self.pairs.agreeing.mean())

    @cached_property
    def mistakes(self) -> list[Mistake]:
        """Of classes: which mistakes came and which went, the largest changes first."""
        if self.pairs.task.reads != "class":
            return []
        counts_a, counts_b = map(self._wrong, (self.pairs.a, self.pairs.b))
        names = self.pairs.label_names
        changed = sorted(counts_a.keys() | counts_b.keys(), key=lambda kind: -abs(counts_b[kind] - counts_a[kind]))
        found = [Mistake(names[kind[0]], names[kind[1]], counts_a[kind], counts_b[kind]) for kind in changed]
        return [mistake for mistake in found if mistake.a != mistake.b][:MOST_MISTAKES]

    def _wrong(self, answers: Answers) -> Counter[tuple[int, int]]:
        wrong = answers.predicted != self.pairs.labels
        return Counter(zip(self.pairs.labels[wrong].tolist(), answers.predicted[wrong].tolist(), strict=True))

    def better_on(self, side: str) -> np.ndarray:
        """Images on which one model is more right than the other, the clearest first; of equally clear ones those
        whose loss differs most."""
        sign = 1 if side == "B" else -1
        gains, losses = sign * self.pairs.gains, sign * (self.pairs.b.losses - self.pairs.a.losses)
        order = np.lexsort([losses, -gains])
        return order[gains[order] > 0]

    @cached_property
    def apart(self) -> np.ndarray:
        """Images on which both models are equally right and say something else, the largest differences first."""
        order = np.argsort(-self.pairs.changes, kind="stable")
        return order[(self.pairs.changes[order] > 0) & (self.pairs.gains[order] == 0)]

    @cached_property
    def samples(self) -> list[int]:
        """Images of each label; of numbers, all of them have each."""
        labels, count = self.pairs.labels, len(self.pairs.label_names)
        if self.pairs.task.reads == "class":
            return np.bincount(labels, minlength=count).tolist()
        return labels.sum(0, dtype=np.int64).tolist() if self.pairs.task.reads == "classes" else [len(labels)] * count

    @cached_property
    def label_figures(self) -> list[Figure]:
        """The figures of single labels, those that say most first."""
        figures = [figure for figure in self.pairs.task.per_class if figure.key in self.figures]
        return sorted(figures, key=lambda figure: figure.metric not in ("average_precision", "recall", "mae"))

    def data(self) -> dict[str, Any]:
        """Everything that is found, for `report.json`."""
        pairs, about = self.pairs, self.pairs.rows.about
        sides = [
            {"model": name, "missing_images": missing, **(asdict(cost) if cost else {})}
            for name, missing, cost in zip(self.names, (pairs.missing_a, pairs.missing_b), self.costs, strict=True)
        ]
        return {
            "a": sides[0],
            "b": sides[1],
            "dataset": about.get("dataset"),
            "split": about.get("split"),
            "task": pairs.task.name,
            "label_names": pairs.label_names,
            "images": len(pairs),
            "broken": list(self.broken),
            "better": self.better,
            "main_figure": self.main_figure.key,
            "p": self.p,
            "agreement": self.agreement,
            "table": asdict(self.table) if self.table else None,
            "mcnemar": {**asdict(self.test), "method": self.test.method} if self.test else None,
            "newcombe_interval": newcombe(*asdict(self.table).values()) if self.table else None,
            "figures": {figure.key: figure_data(self.figures[figure.key]) for figure in self.shown_figures},
            "per_label": [
                {
                    "label": name,
                    "images": self.samples[place],
                    **{figure.key: figure_data(self.figures[figure.key][place]) for figure in self.label_figures},
                }
                for place, name in enumerate(pairs.label_names)
            ],
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
            "better_on": {side: self.places(self.better_on(side)) for side in "AB"},
            "speed_ratio": speed_ratio(self.costs),
            "speed_note": self.note,
        }

    def places(self, rows: np.ndarray) -> list[int]:
        """Positions of these images in their split."""
        return self.pairs.rows.table["position"].to_numpy()[rows].tolist()

    def images(self) -> pa.Table:
        """A row per image, for `images.parquet`: what it is, and what A (`a_...`) and B say, in the order of labels
        that the metadata has as `label_names`."""
        pairs, table = self.pairs, self.pairs.rows.table
        columns = {
            name: table[name]
            for name in ("path", "split", "position", "label", "labels", "targets")
            if name in table.column_names
        }
        for side, answers in (("a", pairs.a), ("b", pairs.b)):
            columns |= {f"{side}_{name}": values for name, values in self._answers(answers).items()}
        about = {"models": self.names, "task": pairs.task.name, "label_names": pairs.label_names}
        return pa.table(columns).replace_schema_metadata({KEY: to_json(about)})

    def _answers(self, answers: Answers) -> dict[str, pa.Array]:
        names, reads = self.pairs.label_names, self.pairs.task.reads
        values = pa.FixedSizeListArray.from_arrays(pa.array(answers.values.ravel()), len(names))
        losses = pa.array(answers.losses)
        if reads == "numbers":
            return {"answers": values, "loss": losses}
        if reads == "classes":
            predicted = [[names[place] for place in np.flatnonzero(row)] for row in answers.predicted]
            return {"predicted": pa.array(predicted, pa.list_(pa.string())), "probabilities": values, "loss": losses}
        return {
            "prediction": pa.array([names[place] for place in answers.predicted], pa.string()),
            "probability": pa.array(np.take_along_axis(answers.values, answers.predicted[:, None], 1)[:, 0]),
            "probabilities": values,
            "loss": losses,
        }


def figure_data(paired: Paired) -> dict[str, Any]:
    return {**asdict(paired), "difference": paired.difference}


def speed_ratio(costs: tuple[Cost | None, Cost | None]) -> float | None:
    """How many times as fast B is."""
    speeds = [cost and cost.images_per_second for cost in costs]
    return speeds[1] / speeds[0] if all(speeds) else None
