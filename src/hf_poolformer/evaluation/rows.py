"""The rows of an evaluation: of each image where it came from, what it is, what the model said of it, and the loss.

`images.parquet` of a report has a row for each image that was evaluated, sorted by `position`:

    path, split, position    a file's path, or the dataset's, `#` and the row's position (of a tar: its name in there);
                             the split; where in it the row is: see `data/pictures_again.py`
    one label                label, label_index, prediction, prediction_index, probability (of the prediction),
                             probabilities (num_labels), loss (cross-entropy)
    several labels           labels, predicted (lists of names), targets (0 or 1), probabilities, loss (mean binary
                             cross-entropy)
    numbers                  targets, answers (in units), loss (mean square error)
    and behind them          the columns of the dataset that `--slice_by` names

What all rows share (model, data, task, names of the labels, thresholds) is in the file's metadata, as JSON.

While a model is evaluated, each process holds of an image what is small: the path, the numbers of the row, one of each
kind, and the dataset's own columns. Of what has a number for each label, 16 MB are held and the rest is in a file; the
main process brings all together a row group at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel

from ..data.columns import ImageDataset, feature_of
from ..data.loader import ImageLoader, Origin
from ..data.pictures_again import first_positions
from ..foundation.errors import UserError, one_line
from ..foundation.names import numbered, undecodable_escaped
from ..foundation.processes import found_by_main, machines_without
from ..foundation.report_folder import ROWS
from ..foundation.strict_json import to_json
from ..foundation.tasks import TASKS
from .processes import gather


KEY = "hf_poolformer"
# Held before they go to a file, and in a row group: so many rows at most, and so many bytes of the longest columns.
_MOST_ROWS, _MOST_BYTES = 8192, 1 << 24
# By what an image's label is: columns of one number and of one for each label -> what a judge's `of_batch` calls it.
_NUMBERS = {
    "class": {
        "label_index": "labels",
        "prediction_index": "predicted",
        "probability": "confidence",
        "loss": "losses",
    },
    "classes": {"loss": "losses"},
    "numbers": {},
}
_LISTS = {
    "class": {"probabilities": "scores"},
    "classes": {"targets": "labels", "probabilities": "scores"},
    "numbers": {"targets": "labels", "answers": "predicted"},
}


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


def schema_of(task: str, num_labels: int) -> dict[str, pa.DataType]:
    """The columns of a task, without those of the dataset; see above."""
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
    return {"path": text, "split": text, "position": pa.int64(), **own, "loss": number}


class Column:
    """A column of the dataset, as it is kept: names of classes, truths, numbers, or texts.

    Attributes:
        kind: of its values in a table.
    """

    def __init__(self, feature: Any):
        self._names = (
            [undecodable_escaped(name) for name in feature.names] if isinstance(feature, ClassLabel) else None
        )
        dtype = "string" if self._names is not None else feature.dtype
        self.kind: pa.DataType = pa.string()
        if dtype == "bool":
            self.kind = pa.bool_()
        elif dtype.startswith(("int", "uint")):
            self.kind = pa.uint64() if dtype == "uint64" else pa.int64()
        elif dtype.startswith(("float", "double", "decimal")):
            self.kind = pa.float64()

    def array(self, values: Sequence[Any]) -> pa.Array:
        return pa.array([None if value is None else self._plain(value) for value in values], self.kind)

    def _plain(self, value: Any) -> Any:
        if self._names is not None:
            return self._names[value] if 0 <= value < len(self._names) else None
        if pa.types.is_string(self.kind):
            return undecodable_escaped(str(value))
        return float(value) if pa.types.is_floating(self.kind) else value


class RowKeeper:
    """The rows of this process, until `write` brings those of all together.

    Args:
        folder: of the report, the same for all processes; hidden files in it are this keeper's.
        where: what the user calls the dataset.
        dataset: the split, read by a loader with `tell_origins`.
        process_index: this process's among all.

    Raises:
        UserError: from any method: the disk is full, say.
    """

    def __init__(
        self,
        folder: Path,
        dataset: ImageDataset,
        *,
        where: str,
        task: str,
        label_names: Sequence[str],
        process_index: int,
    ):
        self._folder, self._where, self._task, self._index = folder, where, task, process_index
        self._label_names = [undecodable_escaped(name) for name in label_names]
        self._reads = TASKS[task].reads
        self._schema = schema_of(task, len(label_names))
        # A tar's rows are known by their names, as `predict` has it.
        self._by_name = named_rows(dataset)
        features = dataset.stream.features
        names = numbered(list(map(undecodable_escaped, dataset.other_columns)), self._schema)
        self._columns = {
            name: Column(feature_of(features, column))
            for name, column in zip(names, dataset.other_columns, strict=True)
        }
        self._most = max(min(_MOST_ROWS, _MOST_BYTES // (4 * len(label_names))), 1)
        # Used over and over: where large arrays come and go between small ones that stay, memory falls to pieces.
        self._buffers: dict[str, np.ndarray] = {}
        self._origins: list[Origin] = []
        self._batches: list[Mapping[str, torch.Tensor]] = []
        self._parts: list[pa.Table] = []

    def add(self, origins: Sequence[Origin], answers: Mapping[str, torch.Tensor]) -> None:
        """A batch.

        Args:
            answers: what the judge of the task makes of it, on any device; nobody waits for the device here, but once
                in a while.
        """
        self._origins += origins
        kept = (*_NUMBERS[self._reads].values(), *_LISTS[self._reads].values())
        self._batches.append({name: answers[name] for name in kept})
        if len(self._origins) >= self._most:
            self._put_away()

    def write(self, loader: ImageLoader, about: Mapping[str, Any]) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
        """Writes the rows of all processes to `images.parquet`; every process must call it.

        Args:
            loader: that gave the batches.
            about: what all rows share; see `Rows`.

        Returns:
            on the main process, `path`, `split`, `position` and `error` of the images that are broken, and how many
            rows each shard has (`ImageDataset.shard_rows`).
        """
        if missing := machines_without(self._folder):
            raise UserError(f"{self._folder.parent} is not the same folder on all machines: {', '.join(missing)}")
        own = {"fault": None, "stopped": False, "broken": loader.broken, "ends": loader.ends}
        try:
            self._put_away()
            own["rows"] = pa.concat_tables(self._parts)
        except UserError as error:
            own["fault"] = str(error)
        parts = gather(own)
        self._parts.clear()
        self._buffers.clear()
        starts = first_positions(loader.num_shards, [part["ends"] for part in parts])
        about = {**about, "task": self._task, "label_names": self._label_names, "slice_by": list(self._columns)}
        found_by_main(lambda: self._join([part["rows"] for part in parts], starts, about))
        broken = sorted((starts[row.shard] + row.index, row) for part in parts for row in part["broken"])
        listed = [
            {
                "path": self._path(row.name, row.is_file, position),
                "split": about["split"],
                "position": position,
                "error": undecodable_escaped(row.error),
            }
            for position, row in broken
        ]
        return listed, tuple(np.diff(starts).tolist())

    def _put_away(self) -> None:
        """What was added since the last time: what is small becomes a table, the rest goes to files."""
        if not self._origins and self._parts:
            return
        origins, numbers = self._origins, {}
        for name, source in _NUMBERS[self._reads].items():
            parts = [batch[source] for batch in self._batches]
            values = torch.cat(parts).cpu().numpy() if parts else np.zeros(0)
            numbers[name] = pa.array(values.astype(self._schema[name].to_pandas_dtype()))
        lists = {name: self._together(name, source) for name, source in _LISTS[self._reads].items()}
        if self._reads == "numbers":
            errors = lists["answers"].astype(np.float64) - lists["targets"]
            numbers["loss"] = pa.array(np.square(errors).mean(1).astype(np.float32))
        try:
            for name, values in lists.items():
                with self._file(name, self._index).open("ab") as file:
                    values.tofile(file)
        except OSError as error:
            raise UserError(f"the rows cannot be written to {self._folder.parent}: {one_line(error)}") from error
        values = list(zip(*(origin.values for origin in origins), strict=True)) or [()] * len(self._columns)
        own = (column.array(values[place]) for place, column in enumerate(self._columns.values()))
        names = [None if origin.name is None else undecodable_escaped(origin.name) for origin in origins]
        told = {
            "path": pa.array(names, pa.string()),
            "is_file": pa.array([origin.is_file for origin in origins], pa.bool_()),
            "shard": pa.array([origin.shard for origin in origins], pa.int64()),
            "position": pa.array([origin.index for origin in origins], pa.int64()),
        }
        self._parts.append(pa.table({**told, **numbers, **dict(zip(self._columns, own, strict=True))}))
        self._origins, self._batches = [], []

    def _together(self, name: str, source: str) -> np.ndarray:
        """What the batches have under `source` as one array (images, labels), which the next call overwrites."""
        rows, count = len(self._origins), 0
        if name not in self._buffers or len(self._buffers[name]) < rows:
            # Of NumPy: one of torch could be filled either in inference mode or outside of it, and both happens here.
            kind = np.uint8 if self._schema[name].value_type == pa.uint8() else np.float32
            self._buffers[name] = np.empty((rows, len(self._label_names)), dtype=kind)
        buffer = self._buffers[name]
        for batch in self._batches:
            values = batch[source]
            buffer[count : count + len(values)] = values.cpu().numpy()
            count += len(values)
        return buffer[:rows]

    def _file(self, column: str, process_index: int) -> Path:
        return self._folder / f".{column}-{process_index}"

    def _join(self, parts: Sequence[pa.Table], starts: Sequence[int], about: Mapping[str, Any]) -> None:
        rows = pa.concat_tables(parts)
        positions = np.array(starts)[rows["shard"].to_numpy()] + rows["position"].to_numpy()
        order = np.argsort(positions)
        part_of = np.repeat(np.arange(len(parts)), list(map(len, parts)))[order]
        place = np.concatenate([np.arange(len(part)) for part in parts])[order]
        rows, positions = rows.take(order), positions[order]
        told = zip(rows["path"].to_pylist(), rows["is_file"].to_pylist(), positions.tolist(), strict=True)
        rows = rows.set_column(0, "path", pa.array([self._path(*one) for one in told], pa.string()))
        rows = rows.set_column(rows.schema.get_field_index("position"), "position", pa.array(positions))
        rows = rows.append_column("split", pa.repeat(pa.scalar(undecodable_escaped(about["split"])), len(rows)))
        kinds = self._schema | {name: column.kind for name, column in self._columns.items()}
        schema = pa.schema(list(kinds.items()), {KEY: to_json(about)})
        texts = [name for name, kind in kinds.items() if pa.types.is_string(kind) and name != "path"]
        texts += [f"{name}.list.element" for name, kind in kinds.items() if kind == pa.list_(pa.string())]
        try:
            with pq.ParquetWriter(self._folder / ROWS, schema, use_dictionary=texts) as writer:
                for start in range(0, len(rows), self._most):
                    some = slice(start, start + self._most)
                    own = {}
                    for name in _LISTS[self._reads]:  # mapped anew, so that what was read is let go
                        files = [self._mapped(name, *each) for each in enumerate(parts)]
                        own[name] = _taken(files, part_of[some], place[some])
                    table = self._named(rows.slice(start, self._most), own, about["thresholds"])
                    writer.write_table(table.select(schema.names).cast(schema))
        except OSError as error:
            raise UserError(f"the rows cannot be written to {self._folder.parent}: {one_line(error)}") from error
        for file in self._folder.glob(".*-*"):
            file.unlink()

    def _mapped(self, name: str, process_index: int, rows: pa.Table) -> np.ndarray:
        kind, shape = self._schema[name].value_type.to_pandas_dtype(), (len(rows), len(self._label_names))
        return (
            np.memmap(self._file(name, process_index), kind, "r", shape=shape) if len(rows) else np.zeros(shape, kind)
        )

    def _named(self, rows: pa.Table, lists: Mapping[str, np.ndarray], thresholds: Sequence[float] | None) -> pa.Table:
        """Some rows, with what has a number for each label, and with names."""
        names, size = pa.array(self._label_names, pa.string()), len(self._label_names)
        if self._reads == "class":
            for name in ("label", "prediction"):
                rows = rows.append_column(name, names.take(rows[f"{name}_index"].combine_chunks()))
        if self._reads == "classes":
            rows = rows.append_column("labels", _names_of(lists["targets"] > 0, names))
            chosen = lists["probabilities"] >= np.array(thresholds, dtype=np.float32)
            rows = rows.append_column("predicted", _names_of(chosen, names))
        for name, values in lists.items():
            rows = rows.append_column(name, pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), size))
        return rows

    def _path(self, name: str | None, is_file: bool, position: int) -> str:
        return path_of(self._where, name, is_file, position, self._by_name)


def named_rows(dataset: ImageDataset) -> bool:
    """Whether rows are known by names, as in a tar."""
    return "__key__" in {*dataset.stream.features, *dataset.unread_columns}


def path_of(where: str, name: str | None, is_file: bool, position: int, by_name: bool) -> str:
    """The `path` of a row; the first three of its `Origin` and place in the dataset that is called `where`."""
    if name is not None and is_file:
        return undecodable_escaped(name)
    inside = name if name is not None and by_name else position
    return undecodable_escaped(f"{where}#{inside}")


def _taken(files: Sequence[np.ndarray], part_of: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Of each row, what the file of its process has in its place."""
    values = np.empty((len(place), files[0].shape[1]), files[0].dtype)
    for number, file in enumerate(files):
        mine = part_of == number
        values[mine] = file[place[mine]]
    return values


def _names_of(chosen: np.ndarray, names: pa.Array) -> pa.Array:
    """Lists of the names that are chosen, (images, labels), in each row."""
    offsets = np.concatenate([[0], chosen.sum(1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, names.take(pa.array(np.nonzero(chosen)[1])))
