"""The rows of an evaluation: of each image where it came from, what it is, what the model said of it, and the loss.

`images.parquet` of a report has a row for each image that was evaluated, sorted by `position`:

    path, split, position    a file's path, or the dataset's, `#` and the row's position (in a tar, the row's name); the
                             name of the split; the place of the row in the stream of the split (`data/places.py`)
    one label                label, label_index, prediction, prediction_index, probability (of the prediction),
                             probabilities (num_labels), loss (cross-entropy)
    several labels           labels, predicted (lists of names), targets (0 or 1), probabilities, loss (mean binary
                             cross-entropy)
    numbers                  targets, answers (in units), loss (mean square error)
    and behind them          the columns of the dataset that `--slice_by` names

What all rows share (model, data, task, names of the labels, thresholds) is in the file's metadata, as JSON.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..foundation.errors import UserError, one_line
from ..foundation.tasks import TASKS


ROWS = "images.parquet"
KEY = "hf_poolformer"


@dataclass(frozen=True)
class Rows:
    """The rows of one evaluation.

    Attributes:
        table: as above.
        task: key of `TASKS`.
        label_names: of the classes, or of the targets of a regression, by index.
        about: `model`, `dataset`, `split`, `task`, `label_names`, `thresholds` (of several labels, by index; else
            None) and `slice_by`, the names in `table` of the dataset's own columns.
    """

    table: pa.Table
    task: str
    label_names: list[str]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.table)

    @property
    def reads(self) -> str:
        """What an image's label is: `class`, `classes` or `numbers`."""
        return TASKS[self.task].reads

    @property
    def probabilities(self) -> np.ndarray:
        """float32 (images, classes); a regression has none."""
        return self._lists("probabilities")

    @property
    def answers(self) -> np.ndarray:
        """Probabilities, or the numbers of a regression in their units: float32 (images, num_labels)."""
        return self._lists("answers" if self.reads == "numbers" else "probabilities")

    @property
    def labels(self) -> np.ndarray:
        """The truth: index of the class, int32 (images,); of several labels uint8 (images, classes), 0 or 1; of a
        regression float32 (images, targets)."""
        if self.reads == "class":
            return self.table["label_index"].to_numpy()
        return self._lists("targets")

    @property
    def predictions(self) -> np.ndarray:
        """What the model says, as `labels` has it; of several labels by `about["thresholds"]`, or 0.5."""
        if self.reads == "class":
            return self.table["prediction_index"].to_numpy()
        if self.reads == "numbers":
            return self.answers
        thresholds = np.array(self.about["thresholds"] or [0.5] * len(self.label_names), dtype=np.float32)
        return (self.probabilities >= thresholds).astype(np.uint8)

    @property
    def losses(self) -> np.ndarray:
        """float32 (images,)."""
        return self.table["loss"].to_numpy()

    def _lists(self, name: str) -> np.ndarray:
        column = self.table[name]
        parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        flat = np.concatenate(parts) if parts else np.zeros(0, column.type.value_type.to_pandas_dtype())
        return flat.reshape(len(column), len(self.label_names))


def read_rows(path: str | os.PathLike) -> Rows:
    """The rows of a file, or of a report's folder.

    Raises:
        UserError: there are none, or they are no rows of an evaluation of classifiers or regressors.
    """
    path = Path(path)
    path = path / ROWS if path.is_dir() else path
    try:
        about = json.loads(pq.read_schema(path).metadata[KEY.encode()])
        table = pq.read_table(path, partitioning=None)
        return Rows(table, about["task"], about["label_names"], about)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} has no rows of an evaluation: {one_line(error)}") from error


def schema_of(task: str, num_labels: int, kept: dict[str, pa.DataType], about: dict[str, Any]) -> pa.Schema:
    """The columns of a task, and behind them `kept`, in their order; see above."""
    text, number = pa.string(), pa.float32()
    scores, bits = pa.list_(number, num_labels), pa.list_(pa.uint8(), num_labels)
    own = {
        "class": {
            "label": text,
            "label_index": pa.int32(),
            "prediction": text,
            "prediction_index": pa.int32(),
            "probability": number,
            "probabilities": scores,
        },
        "classes": {
            "labels": pa.list_(text),
            "predicted": pa.list_(text),
            "targets": bits,
            "probabilities": scores,
        },
        "numbers": {"targets": scores, "answers": scores},
    }[TASKS[task].reads]
    columns = {"path": text, "split": text, "position": pa.int64(), **own, "loss": number, **kept}
    return pa.schema(list(columns.items()), {KEY: json.dumps(about)})
