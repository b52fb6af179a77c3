"""Our figures as a metric of the library evaluate, for transformers' Trainer and whoever else takes one."""

from __future__ import annotations

from functools import partial
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from ..foundation.tasks import CLASSIFICATION, TASKS
from .metrics import AnswerJudge


class TaskFigures(evaluate.Metric):
    """The figures of a classifier, of one label per image or of several, or of a regression.

    `compute(predictions=logits, references=labels)`, or `add_batch` and then `compute()`. Predictions are a model's
    logits (images, num_labels); references (images,) of one label per image, else (images, num_labels).

    Args:
        num_labels: of the model.
        task: as `train --task` names it.
        options: of `metrics.AnswerJudge`: `thresholds`, `intervals`.

    Raises:
        UserError: answers are not finite.
    """

    def __init__(self, num_labels: int, task: str = CLASSIFICATION, **options: Any):
        self.new_judge = partial(TASKS[task].new_judge, num_labels, **options)
        self.single = TASKS[task].reads == "class"
        # In memory: the default writes Arrow files into the user's cache.
        super().__init__(config_name=task, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        numbers = datasets.List(datasets.Value("float32"))
        labels = datasets.Value("int64") if self.single else numbers
        return evaluate.MetricInfo(
            description="The figures of hf-poolformer's evaluations.",
            citation="",
            inputs_description="Logits, and labels.",
            features=datasets.Features({"predictions": numbers, "references": labels}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        judge: AnswerJudge = self.new_judge()
        judge.add(torch.as_tensor(np.asarray(references)), torch.as_tensor(np.asarray(predictions)))
        return judge.compute([judge.state()])
