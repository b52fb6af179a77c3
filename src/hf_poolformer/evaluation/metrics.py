"""What is measured of answers: of one class per image, of several labels, and of numbers.

The figures are those of scikit-learn, with two conventions where classes are missing. Macro averages are over the
classes that occur in the labels or in the predictions, and a share of nothing (the precision of a class that is never
predicted, say) counts as 0 in them; by itself it is not a number. AUROC and average precision are averaged over the
classes of which there are images with and, for AUROC, without.

What is counted becomes shares in float64 here, and not by torchmetrics, which divides in float32 and takes classes
that do not occur for failures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.nn import functional as F

from ..foundation.finite import finite_answers, refuse_not_finite
from .intervals import Ranking, middle, resamples, summed, wilson
from .pictures import write_confusion_matrix, write_label_figures, write_scatter
from .thresholds import HALF, choose_shift, choose_thresholds, shift_for_recall


# Beyond this a confusion matrix (int64, classes squared) costs more memory than anyone will look at.
MAX_CONFUSION_CLASSES = 5000
# Images times classes, of which the scores (float32, 17 MB) are brought together for AUROC and average precision: a
# second of sorting.
MAX_SCORES = 2**22
# The same, of which AUROC and average precision are computed a thousand times for their intervals: some seconds.
MAX_RESAMPLED_SCORES = 1_000_000
# Images from which on intervals say nothing that matters.
SMALL_TEST_SET = 20_000
BINS = 15  # of the calibration error
RANKED = 5  # best classes, one of which may be the right one

Columns = dict[str, np.ndarray]


class AnswerJudge(ABC):
    """Gathers what a model answers to labelled images, a row of numbers each; see `processes.Judge`.

    Args:
        num_labels: how many numbers.
        thresholds: of several labels per image, the probability from which on each is predicted; None: 0.5; "f1":
            `choose_thresholds` of these images, which `compute` gives, too, as `label_thresholds`.
        operating_point: of one class per image, a figure (`f1_macro`, say) for which `choose_shift` moves the answers
            to these images before they are judged, or a class and its recall, for `shift_for_recall`; `compute` gives
            their choice as `class_shifts` and, of a figure, `shift_strength`.
        intervals: compute confidence intervals, too, of less than SMALL_TEST_SET images.
        keep_answers: `compute` gives `answers` and `references` as well, whatever memory they take.
    """

    answers: ClassVar[str]  # the column that `keep_answers` is about
    picture: ClassVar[str]  # name of the file that `draw` writes

    def __init__(
        self,
        num_labels: int,
        *,
        thresholds: Sequence[float] | Literal["f1"] | None = None,
        operating_point: str | tuple[int, float] | None = None,
        intervals: bool = False,
        keep_answers: bool = False,
    ):
        self.num_labels, self.intervals, self.keep_answers = num_labels, intervals, keep_answers
        self.operating_point = operating_point
        self.chooses = thresholds == "f1" or operating_point is not None
        self.thresholds = torch.tensor([HALF] * num_labels if thresholds in (None, "f1") else list(thresholds))
        self.columns: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self.seen: int = 0
        self.unusable: torch.Tensor | int = 0

    def add(self, labels: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """A batch; the labels, on the host, are known to fit. Gives `of_batch` back.

        Nobody waits for the device here.

        Args:
            logits: (B, num_labels).
        """
        logits = logits.float()
        self.unusable += (~finite_answers(logits)).sum()
        self.seen += len(labels)
        batch = self.of_batch(labels.to(logits.device, non_blocking=True), logits)
        for name, values in batch.items():
            self.columns[name].append(values)
        if self.has_too_many_scores(self.seen):
            self.columns["scores"].clear()
        return batch

    def has_too_many_scores(self, images: int) -> bool:
        return images * self.num_labels > MAX_SCORES and not (self.keep_answers or self.chooses)

    @abstractmethod
    def of_batch(self, labels: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is kept of each image: `labels`, and (images, ...) under other names."""

    def state(self) -> dict[str, Any]:
        return {
            "unusable": int(self.unusable),
            "columns": {name: torch.cat(parts).cpu().numpy() for name, parts in self.columns.items() if parts},
        }

    def compute(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The figures, plain numbers, or lists with one for each label.

        With them: arrays that end up in no JSON, and, where there are too many scores, `eval_left_out`, which names
        what is missing.

        Raises:
            UserError: answers are not finite.
        """
        parts = [state["columns"] for state in states if state["columns"]]
        images = sum(len(part["labels"]) for part in parts)
        refuse_not_finite(sum(state["unusable"] for state in states), images, "the model")
        left_out = self.has_too_many_scores(images)
        columns = {
            name: np.concatenate([part[name] for part in parts])
            for name in parts[0]
            if not (left_out and name == "scores")
        }
        chosen = self.choose(columns) if self.chooses else {}
        results = {name: plain(value) for name, value in self.figures(columns).items()} | chosen
        if left_out:
            results["eval_left_out"] = f"AUROC and average precision (of more than {MAX_SCORES:,} scores)"
        if self.intervals and images < SMALL_TEST_SET:
            results["eval_confidence_intervals"] = self.confidence_intervals(columns)
        if self.keep_answers:
            results |= {"answers": columns[self.answers], "references": columns["labels"]}
        return results

    def choose(self, columns: Columns) -> dict[str, Any]:
        """Chooses by looking at all images how answers are read, and reads them so: `columns` change."""
        return {}

    @abstractmethod
    def figures(self, columns: Columns) -> dict[str, Any]:
        """Of all images."""

    def confidence_intervals(self, columns: Columns) -> dict[str, Any]:
        """Of each figure (low, high), or a list with one for each label; without what has none."""
        # Whichever process saw an image: the same resamples.
        order = np.lexsort([values.reshape(len(values), -1)[:, 0] for values in columns.values()])
        columns = {name: values[order] for name, values in columns.items()}
        return self.bounds(columns, self.draw_figures(columns))

    def draw_figures(self, columns: Columns) -> dict[str, np.ndarray]:
        """Figures of the resamples: (resamples,), or (resamples, labels).

        Of the answers of two models to the same images in the same order, the same images are drawn.
        """
        drawn = defaultdict(list)
        rankings = []
        if columns.get("scores", np.zeros(0)).size <= MAX_RESAMPLED_SCORES:
            rankings = [Ranking(scores, truth) for scores, truth in self.rankable(columns)]
        for weights in resamples(len(columns["labels"])):
            figures = self.resampled(columns, weights)
            if rankings:
                ranked = zip(*(part.figures(weights) for part in rankings), strict=True)
                figures |= self.of_rankings(*map(np.stack, ranked))
            for name, values in figures.items():
                drawn[name].append(values)
        return {name: np.concatenate(parts) for name, parts in drawn.items()}

    def bounds(self, columns: Columns, drawn: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """As `confidence_intervals`, of what `draw_figures` has given."""
        bounds = {name: middle(values) for name, values in drawn.items()} | self.shares(columns)
        return {name: found for name, (low, high) in bounds.items() if (found := pairs(low, high)) is not None}

    def rankable(self, columns: Columns) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each class that is ranked: scores, and whether an image has it, both (images,)."""
        return iter(())

    def of_rankings(self, auroc: np.ndarray, precision: np.ndarray) -> dict[str, np.ndarray]:
        """Figures of the AUROC and average precision of each class, both (classes,) or (classes, resamples)."""
        return {"eval_auroc": mean(auroc.T), "eval_average_precision": mean(precision.T)}

    @abstractmethod
    def resampled(self, columns: Columns, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Figures of resamples, but those of rankings: (resamples,), or (resamples, labels).

        Args:
            weights: how often each image was drawn (images, resamples).
        """

    def shares(self, columns: Columns) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Wilson's interval of the figures that are shares of images."""
        return {}

    @classmethod
    @abstractmethod
    def draw(cls, path: Path, results: dict[str, Any], label_names: Sequence[str]) -> None:
        """Writes a picture of results."""


class ClassJudge(AnswerJudge):
    """Of images with one class each; labels int64 (B,).

    `eval_accuracy`, `eval_balanced_accuracy` (the mean recall of the classes that have images), precision, recall and
    F1, `_macro` and `_weighted` (by images of the class), `eval_mcc` (Matthews' correlation), `eval_top5_accuracy`
    (of more than five classes), `eval_auroc` and `eval_average_precision` (of two classes those of the second,
    otherwise the mean of each class against the rest), `eval_calibration_error`, `eval_loss` (cross-entropy), and
    `confusion_matrix` (int64 array, true by predicted; None beyond 5000 classes). Of each class the share of its
    images that are recognised (`eval_per_class_accuracy` and, the same, `eval_per_class_recall`),
    `eval_per_class_precision`, `eval_per_class_f1` and the number of its images, `eval_per_class_samples`.

    The calibration error is the expected one: between the share that is right and the mean probability of the
    predicted class, on average over 15 bins of that probability, of equal width (Guo et al., arXiv 1706.04599).
    """

    answers = "scores"
    picture = "confusion_matrix.png"

    def of_batch(self, labels: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        probabilities = logits.softmax(1)
        ranked = logits.topk(RANKED if self.num_labels > RANKED else 1).indices
        return {
            "labels": labels,
            "predicted": ranked[:, 0],
            "in_top5": (ranked == labels[:, None]).any(1),
            "confidence": probabilities.gather(1, ranked[:, :1])[:, 0],
            "losses": F.cross_entropy(logits, labels, reduction="none"),
            "scores": probabilities,
        }

    def choose(self, columns: Columns) -> dict[str, Any]:
        labels = columns["labels"]
        # What is as good as impossible has no logarithm in float32.
        logits = np.log(np.maximum(columns["scores"].astype(np.float64), 1e-45))

        def judge(predicted: np.ndarray) -> float:
            figures = self.resampled({**columns, "predicted": predicted}, np.ones((len(labels), 1)))
            return float(figures[f"eval_{self.operating_point}"][0])

        if isinstance(self.operating_point, tuple):
            shift, strength = shift_for_recall(logits, labels, *self.operating_point), None
        else:
            shift, strength = choose_shift(logits, labels, judge)
        moved = self.of_batch(torch.from_numpy(labels), torch.from_numpy(logits + shift).float())
        columns |= {name: values.numpy() for name, values in moved.items()}
        return {"class_shifts": shift.tolist()} | ({} if strength is None else {"shift_strength": strength})

    def figures(self, columns: Columns) -> dict[str, Any]:
        labels, predicted = columns["labels"], columns["predicted"]
        results = self.resampled(columns, np.ones((len(labels), 1)))
        results = {name: values[0] for name, values in results.items()}
        results |= self.of_rankings(*ranked_by_torchmetrics(self.rankable(columns)))
        results["eval_per_class_samples"] = np.bincount(labels, minlength=self.num_labels)
        results["confusion_matrix"] = None
        if (size := self.num_labels) <= MAX_CONFUSION_CLASSES:
            counts = np.bincount(labels * size + predicted, minlength=size**2)
            results["confusion_matrix"] = counts.reshape(size, size)
        return results

    def rankable(self, columns: Columns) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if "scores" in columns:
            for index in [1] if self.num_labels == 2 else range(self.num_labels):
                yield np.ascontiguousarray(columns["scores"][:, index]), columns["labels"] == index

    def resampled(self, columns: Columns, weights: np.ndarray) -> dict[str, np.ndarray]:
        labels, predicted = columns["labels"], columns["predicted"]
        hit = labels == predicted
        true, guessed = (summed(weights, values, self.num_labels) for values in (labels, predicted))
        correct = summed(weights[hit], labels[hit], self.num_labels)
        count = true.sum(-1)
        shares = of_counts(correct, guessed, true)
        results = {
            "eval_accuracy": correct.sum(-1) / count,
            "eval_balanced_accuracy": mean(shares["recall"]),
            "eval_mcc": matthews(correct, guessed, true),
            "eval_calibration_error": calibration_error(columns["confidence"], hit, weights),
            "eval_loss": columns["losses"].astype(np.float64) @ weights / count,
            "eval_per_class_accuracy": shares["recall"],
        }
        if self.num_labels > RANKED:
            results["eval_top5_accuracy"] = columns["in_top5"] @ weights / count
        for name, values in shares.items():
            results[f"eval_{name}_macro"] = macro(values, guessed, true)
            results[f"eval_{name}_weighted"] = (np.nan_to_num(values) * true).sum(-1) / count
            results[f"eval_per_class_{name}"] = values
        return results

    def shares(self, columns: Columns) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        labels, predicted = columns["labels"], columns["predicted"]
        hit = labels == predicted
        correct, true, guessed = (
            np.bincount(values, minlength=self.num_labels) for values in (labels[hit], labels, predicted)
        )
        of_class = wilson(correct, true)
        bounds = {
            "eval_accuracy": wilson(hit.sum(), len(hit)),
            "eval_recall_weighted": wilson(hit.sum(), len(hit)),  # the same figure
            "eval_per_class_accuracy": of_class,
            "eval_per_class_recall": of_class,
            "eval_per_class_precision": wilson(correct, guessed),
        }
        if self.num_labels > RANKED:
            bounds["eval_top5_accuracy"] = wilson(columns["in_top5"].sum(), len(hit))
        return bounds

    @classmethod
    def draw(cls, path: Path, results: dict[str, Any], label_names: Sequence[str]) -> None:
        if results["confusion_matrix"] is not None:
            write_confusion_matrix(path, results["confusion_matrix"], label_names)


class LabelsJudge(AnswerJudge):
    """Of images with any number of labels; these are 0 or 1 (B, num_labels).

    Of the sigmoid of the logits `eval_average_precision` (its mean over the labels, mAP) and `eval_auroc`; of the
    labels that reach their threshold precision, recall and F1 (`_macro`, and of all labels together `eval_f1_micro`),
    `eval_exact_match` (share of the images of which every label is right) and `eval_hamming_accuracy` (share of all
    labels that are). `eval_loss` is the mean binary cross-entropy. Of each label `eval_per_class_precision`,
    `_recall`, `_f1`, `_average_precision` and the images that have it, `_samples`.
    """

    answers = "scores"
    picture = "label_figures.png"

    def of_batch(self, labels: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        probabilities = logits.sigmoid()
        return {
            "labels": labels > 0.5,
            "predicted": probabilities >= self.thresholds.to(logits.device, non_blocking=True),
            "losses": F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(1),
            "scores": probabilities,
        }

    def choose(self, columns: Columns) -> dict[str, Any]:
        chosen = choose_thresholds(columns["scores"], columns["labels"])
        columns["predicted"] = columns["scores"] >= np.array(chosen, dtype=np.float32)
        return {"label_thresholds": chosen}

    def figures(self, columns: Columns) -> dict[str, Any]:
        labels = columns["labels"]
        results = self.resampled(columns, np.ones((len(labels), 1)))
        results = {name: values[0] for name, values in results.items()}
        results |= self.of_rankings(*ranked_by_torchmetrics(self.rankable(columns)))
        results["eval_per_class_samples"] = labels.sum(0)
        return results

    def of_rankings(self, auroc: np.ndarray, precision: np.ndarray) -> dict[str, np.ndarray]:
        results = super().of_rankings(auroc, precision)
        return results | {"eval_per_class_average_precision": precision.T} if len(precision) else results

    def rankable(self, columns: Columns) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if "scores" in columns:
            for index in range(self.num_labels):
                yield np.ascontiguousarray(columns["scores"][:, index]), columns["labels"][:, index]

    def resampled(self, columns: Columns, weights: np.ndarray) -> dict[str, np.ndarray]:
        labels, predicted = columns["labels"], columns["predicted"]
        correct, guessed, true = (
            (weights.T @ values.astype(np.float32)).astype(np.float64)
            for values in (labels & predicted, predicted, labels)
        )
        right = labels == predicted
        count = weights.sum(0, dtype=np.float64)
        shares = of_counts(correct, guessed, true)
        together = of_counts(*(values.sum(-1) for values in (correct, guessed, true)))
        results = {
            "eval_f1_micro": together["f1"],
            "eval_exact_match": right.all(1) @ weights / count,
            "eval_hamming_accuracy": right.mean(1) @ weights / count,
            "eval_loss": columns["losses"].astype(np.float64) @ weights / count,
        }
        for name, values in shares.items():
            results[f"eval_{name}_macro"] = macro(values, guessed, true)
            results[f"eval_per_class_{name}"] = values
        return results

    def shares(self, columns: Columns) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        labels, predicted = columns["labels"], columns["predicted"]
        correct, exact = (labels & predicted).sum(0), (labels == predicted).all(1)
        return {
            "eval_exact_match": wilson(exact.sum(), len(exact)),
            "eval_per_class_precision": wilson(correct, predicted.sum(0)),
            "eval_per_class_recall": wilson(correct, labels.sum(0)),
        }

    @classmethod
    def draw(cls, path: Path, results: dict[str, Any], label_names: Sequence[str]) -> None:
        figures = {name: results[f"eval_per_class_{name}"] for name in ("precision", "recall", "f1")}
        write_label_figures(path, figures, label_names)


class NumbersJudge(AnswerJudge):
    """Of images with numbers, float32 (B, num_labels), in the units in which the model answers.

    `eval_mae`, `eval_rmse` and `eval_r2`, means over the targets, and of each of them `eval_per_target_mae`, ...;
    `eval_loss` is the mean square error. A target that is the same for all images has no R2.
    """

    answers = "predicted"
    picture = "scatter.png"

    def __init__(self, num_labels: int, **options: Any):
        super().__init__(num_labels, **options)
        self.keep_answers = True  # a picture is made of them, and they are small

    def of_batch(self, labels: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"labels": labels, "predicted": logits}

    def figures(self, columns: Columns) -> dict[str, Any]:
        from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error

        answers, truth = (torch.from_numpy(columns[name]).double() for name in ("predicted", "labels"))
        absolute = mean_absolute_error(answers, truth, num_outputs=self.num_labels).reshape(-1)
        squared = mean_squared_error(answers, truth, num_outputs=self.num_labels).reshape(-1)
        # torchmetrics takes what is small for zero, whatever the unit: it calls R2 then 1.
        everyone = np.ones((len(truth), 1))
        return of_targets(absolute.numpy(), squared.numpy(), variances(truth.numpy(), everyone)[0])

    def resampled(self, columns: Columns, weights: np.ndarray) -> dict[str, np.ndarray]:
        truth, weights = columns["labels"].astype(np.float64), weights.astype(np.float64)
        errors = columns["predicted"] - truth
        absolute, squared = (weights.T @ values / len(truth) for values in (np.abs(errors), errors**2))
        return of_targets(absolute, squared, variances(truth, weights))

    @classmethod
    def draw(cls, path: Path, results: dict[str, Any], label_names: Sequence[str]) -> None:
        write_scatter(path, results["answers"], results["references"], label_names)


def of_counts(correct: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 by the images that have a class, are given it, and both; NaN where it is of nothing."""
    with np.errstate(invalid="ignore"):
        return {
            "precision": correct / predicted,
            "recall": correct / true,
            "f1": 2 * correct / (predicted + true),
        }


def macro(shares: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The mean of (..., classes) over those classes that occur; see above."""
    return mean(np.where(predicted + true > 0, np.nan_to_num(shares), np.nan))


def mean(values: np.ndarray) -> Any:
    """Over the last axis, of those that are numbers; NaN where there are none."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(-1) / known.sum(-1)


def matthews(correct: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Matthews' correlation of counts (..., classes) (Gorodkin's for many classes); 0 where one side is constant."""
    count = true.sum(-1)
    agreement = count * correct.sum(-1) - (true * predicted).sum(-1)
    spread = np.sqrt((count**2 - (predicted**2).sum(-1)) * (count**2 - (true**2).sum(-1)))
    return np.divide(agreement, spread, out=np.zeros_like(spread), where=spread > 0)


def calibration_error(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The expected one of resamples, (resamples,); see `ClassJudge`."""
    confidence = confidence.astype(np.float64)
    bins = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1)
    members = bins == np.arange(BINS)[:, None]
    return np.abs((members * (right - confidence)) @ weights).sum(0) / weights.sum(0)


def variances(truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of targets (images, targets) in resamples: (resamples, targets); NaN where one is constant but for rounding."""
    centred = truth - truth.mean(0)
    second = weights.T @ centred**2 / len(truth)
    values = second - (weights.T @ centred / len(truth)) ** 2
    return np.where((values > 1e-12 * second) & (np.ptp(truth, axis=0) > 0), values, np.nan)


def of_targets(absolute: np.ndarray, squared: np.ndarray, variance: np.ndarray) -> dict[str, np.ndarray]:
    """The figures of numbers by the mean errors (..., targets)."""
    figures = {"mae": absolute, "rmse": np.sqrt(squared), "r2": 1 - squared / variance}
    return {
        **{f"eval_{name}": mean(values) for name, values in figures.items()},
        "eval_loss": mean(squared),
        **{f"eval_per_target_{name}": values for name, values in figures.items()},
    }


def ranked_by_torchmetrics(classes: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision of each class, NaN where there is none, of scores and truths (images,)."""
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    auroc, precision = [], []
    for scores, truth in classes:
        both = torch.from_numpy(scores), torch.from_numpy(truth.astype(np.int64))
        images, some = len(truth), truth.sum()
        auroc.append(binary_auroc(*both, validate_args=False).item() if 0 < some < images else np.nan)
        precision.append(binary_average_precision(*both, validate_args=False).item() if some else np.nan)
    return np.array(auroc), np.array(precision)


def plain(value: Any) -> Any:
    """A number or list of an array of figures; tables stay."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


def pairs(low: np.ndarray, high: np.ndarray) -> Any:
    """Bounds as `confidence_intervals` gives them; None where there are none."""
    if low.ndim:
        found = [pairs(*bounds) for bounds in zip(low, high, strict=True)]
        return found if any(found) else None
    return None if np.isnan(low) else (float(low), float(high))
