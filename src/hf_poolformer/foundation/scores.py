"""What the logits of a classifier mean, by its configuration: one class, several labels, or numbers; and the answer.

Whoever answers for a model reads its logits here: prediction, the pipeline, exports, the app and the server.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .errors import UserError


MULTI_LABEL, REGRESSION = "multi_label_classification", "regression"
# Classes of an image that are told where nobody says how many, and the probability from which an image has a label
# where its model does not say.
TOP_K = 5
THRESHOLD = 0.5


def activation_of(config: Any) -> str | None:
    """What makes scores of logits, as transformers' pipelines choose it."""
    if config.problem_type == REGRESSION or not config.num_labels:
        return None
    return "sigmoid" if config.problem_type == MULTI_LABEL or config.num_labels == 1 else "softmax"


def activated(logits: torch.Tensor, activation: str | None) -> torch.Tensor:
    """Logits (B, classes, ...) as scores."""
    if activation == "softmax":
        return logits.softmax(1)
    return logits.sigmoid() if activation == "sigmoid" else logits


def class_scores(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Logits (B, classes) as what transformers' pipeline calls scores: probabilities, of a regression the values."""
    return activated(logits, activation_of(config))


def thresholds_of(config: Any, threshold: float | None = None) -> list[float]:
    """The probability of each label from which an image has it.

    Args:
        config: of a multi-label model; its `label_thresholds`, one number or None for 0.5.
        threshold: one for all labels, in the place of the model's own.

    Raises:
        UserError: there is not one for each label, or one is no probability.
    """
    if threshold is not None:
        _check_probability(threshold, "a threshold")
        return [float(threshold)] * config.num_labels
    own = getattr(config, "label_thresholds", None)
    if own is None:
        return [THRESHOLD] * config.num_labels
    if not isinstance(own, list | tuple) or len(own) != config.num_labels:
        given = f"{len(own)} numbers" if isinstance(own, list | tuple) else repr(own)
        raise UserError(f"label_thresholds of the model are {given}, and it has {config.num_labels} labels")
    for value in own:
        _check_probability(value, "each of the model's label_thresholds")
    return [float(value) for value in own]


def _check_probability(value: Any, what: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or not 0 <= value <= 1:
        raise UserError(f"{what} must be between 0 and 1, not {value!r}")


def check_choice(config: Any, top_k: int | None = None, threshold: float | None = None) -> None:
    """
    Raises:
        UserError: a model of this configuration cannot be asked for `choose` with these arguments.
    """
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, not {top_k}")
    if config.problem_type == MULTI_LABEL:
        thresholds_of(config, threshold)
    elif threshold is not None:
        raise UserError("a threshold is for models that give an image several labels, which this one does not")
    if config.problem_type == REGRESSION and top_k is not None:
        raise UserError("top_k is for models with classes; this one gives numbers, always all of them")


def choose(
    scores: torch.Tensor, config: Any, top_k: int | None = None, threshold: float | None = None
) -> list[tuple[list[int], list[float]]]:
    """The answer about each image: which outputs of the model, and their scores.

    - One class of many: the best `top_k`, 5 if None.
    - Several labels: those whose probability reaches their threshold, best first, of which there may be none. With
      `top_k` and no `threshold` the best `top_k`, whatever their thresholds; with both, at most so many.
    - Numbers: all of them, in the model's order.

    Args:
        scores: (B, outputs), as `class_scores` gives them.
        threshold: in the place of the model's `label_thresholds`.
    """
    if config.problem_type == REGRESSION:
        return [(list(range(len(values))), values) for values in scores.tolist()]
    if config.problem_type == MULTI_LABEL and (top_k is None or threshold is not None):
        values, order = scores.sort(dim=1, descending=True, stable=True)
        reached = values >= scores.new_tensor(thresholds_of(config, threshold))[order]
        return [
            (order[mine][:top_k].tolist(), values[mine][:top_k].tolist())
            for order, values, mine in zip(order.cpu(), values.cpu(), reached.cpu(), strict=True)
        ]
    best = scores.topk(min(top_k or TOP_K, scores.shape[1]), dim=1)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
