"""The rows of two evaluations brought together: the same images in the same order, and the same labels by name."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath

import numpy as np

from ..data.classes import are_placeholders, class_key
from ..evaluation.metrics import RANKED, AnswerJudge, Columns
from ..evaluation.rows import Rows
from ..foundation.errors import UserError
from ..foundation.names import first_few, printable
from ..foundation.tasks import TASKS, Task


@dataclass(frozen=True)
class Answers:
    """What a model has said of the images, its labels in the common order.

    Attributes:
        values: float32 (images, labels): probabilities, or the numbers of a regression.
        predicted: int32 (images,), uint8 (images, labels) or float32 (images, targets), as `Rows.predictions`.
        losses: float32 (images,).
    """

    values: np.ndarray
    predicted: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Pairs:
    """Images that two models have answered.

    Attributes:
        label_names: A's, in its order; B's where A has no names.
        rows: A's, of these images.
        labels: the truth, as `Rows.labels`.
        missing_a, missing_b: images that only the other model has answered.
    """

    task: Task
    label_names: list[str]
    rows: Rows
    labels: np.ndarray
    a: Answers
    b: Answers
    missing_a: int
    missing_b: int

    def __len__(self) -> int:
        return len(self.labels)

    def new_judge(self) -> AnswerJudge:
        return self.task.new_judge(len(self.label_names))

    def columns(self, answers: Answers) -> Columns:
        """What a judge keeps of the images, see `AnswerJudge.of_batch`."""
        if self.task.reads == "numbers":
            return {"labels": self.labels, "predicted": answers.predicted}
        columns = {"losses": answers.losses, "scores": answers.values}
        if self.task.reads == "classes":
            return {**columns, "labels": self.labels > 0, "predicted": answers.predicted > 0}
        own = np.take_along_axis(answers.values, self.labels[:, None], axis=1)
        return {
            **columns,
            "labels": self.labels,
            "predicted": answers.predicted,
            "confidence": np.take_along_axis(answers.values, answers.predicted[:, None], axis=1)[:, 0],
            "in_top5": (answers.values > own).sum(1) < RANKED,
        }

    def merits(self, answers: Answers) -> np.ndarray:
        """How right a model is about each image (images,), more is better: whether it is, how many labels are, or how
        far the numbers are from the true ones, on average and below zero."""
        if self.task.reads == "class":
            return (answers.predicted == self.labels).astype(np.int64)
        if self.task.reads == "classes":
            return (answers.predicted == self.labels).sum(1)
        return -np.abs(answers.predicted.astype(np.float64) - self.labels).mean(1)

    @cached_property
    def gains(self) -> np.ndarray:
        """By how much B is more right than A (images,)."""
        return self.merits(self.b) - self.merits(self.a)

    def right(self, answers: Answers) -> np.ndarray:
        """Which images a model gets right, every label of them; not for numbers."""
        return self.merits(answers) == (1 if self.task.reads == "class" else len(self.label_names))

    @cached_property
    def agreeing(self) -> np.ndarray:
        """On which images both models say the same (images,)."""
        same = self.a.predicted == self.b.predicted
        return same if same.ndim == 1 else same.all(1)

    @cached_property
    def changes(self) -> np.ndarray:
        """The largest difference between both models' values for an image (images,)."""
        return np.abs(self.b.values - self.a.values).max(1)


def pair(a: Rows, b: Rows) -> Pairs:
    """
    Raises:
        UserError: A and B answer other questions, know other classes, or were shown other images.
    """
    if a.task != b.task:
        raise UserError(f"A and B answer other questions: A is for {a.task}, B for {b.task}.")
    task = TASKS[a.task]
    order = places_of(a.label_names, b.label_names)
    of_a, of_b = common_images(a, b)
    if not len(of_a):
        raise UserError(
            f"A and B were shown other images: of {len(a)} of A and {len(b)} of B none is the same. The first are "
            f"{first_path(a)} and {first_path(b)}; evaluate both on the same dataset and split."
        )
    labels, others = a.labels[of_a], _in_order(b.labels, order, task)[of_b]
    differ = labels != others if labels.ndim == 1 else (labels != others).any(1)
    if differ.any():
        path = printable(a.table["path"][int(of_a[differ.argmax()])].as_py(), 100)
        raise UserError(
            f"A and B were measured against other labels: those of {differ.sum()} of {len(differ)} images differ, of "
            f"{path} for example. Evaluate both on the same data."
        )
    return Pairs(
        task,
        [b.label_names[place] for place in order] if are_placeholders(a.label_names) else a.label_names,
        Rows(a.table.take(of_a), a.task, a.label_names, a.about),
        labels,
        Answers(a.answers[of_a], a.predictions[of_a], a.losses[of_a]),
        Answers(b.answers[of_b][:, order], _in_order(b.predictions, order, task)[of_b], b.losses[of_b]),
        missing_a=len(b) - len(of_b),
        missing_b=len(a) - len(of_a),
    )


def first_path(rows: Rows) -> str:
    return printable(rows.table["path"][0].as_py(), 100) if len(rows) else "none"


def places_of(own: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """For each of A's labels its place among B's, which may have them in another order.

    Single targets of a regression, and names that are mere numbers (`LABEL_0`), are taken for each other.

    Raises:
        UserError: one of them knows labels that the other does not.
    """
    if len(own) == len(others) and (len(own) == 1 or are_placeholders(own) or are_placeholders(others)):
        return np.arange(len(own))
    ours, theirs = ({class_key(name): place for place, name in enumerate(names)} for names in (own, others))
    only_a = [printable(name, 40) for name in own if class_key(name) not in theirs]
    only_b = [printable(name, 40) for name in others if class_key(name) not in ours]
    if only_a or only_b:
        differ = [f"only {side} knows {first_few(names)}" for side, names in (("A", only_a), ("B", only_b)) if names]
        raise UserError(f"A and B know other labels, {len(own)} and {len(others)}: {'; '.join(differ)}.")
    return np.array([theirs[class_key(name)] for name in own])


def _in_order(values: np.ndarray, order: np.ndarray, task: Task) -> np.ndarray:
    """Labels or predictions of B by A's indices."""
    return np.argsort(order)[values].astype(values.dtype) if task.reads == "class" else values[:, order]


def common_images(a: Rows, b: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The rows of A and of B that are of the same images, both (images,), in A's order.

    Images are known by their paths. Where none is the same, the data may have moved between two evaluations: they are
    then known by their positions and the last part of their paths.
    """
    for keys in (_paths, _positions):
        known = {key: row for row, key in enumerate(keys(b))}
        found = [(row, known[key]) for row, key in enumerate(keys(a)) if key in known]
        if found:
            break
    of_a, of_b = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return of_a, of_b


def _paths(rows: Rows) -> list[Hashable]:
    paths = rows.table["path"].to_pylist()
    # Names in tars may come several times.
    return paths if len(set(paths)) == len(paths) else [*zip(rows.table["position"].to_pylist(), paths, strict=True)]


def _positions(rows: Rows) -> list[Hashable]:
    names = [PurePath(path).name for path in rows.table["path"].to_pylist()]
    return [*zip(rows.table["position"].to_pylist(), names, strict=True)]
