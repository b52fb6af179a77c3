"""Rows of evaluations, made of logits."""

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hf_poolformer.evaluation.rows import Rows, schema_of
from hf_poolformer.foundation.tasks import CLASSIFICATION, TASKS


def rows_of(labels, logits, names, task=CLASSIFICATION, paths=None, thresholds=None, model="a"):
    """As an evaluation has them: labels (images,) or (images, labels), logits (images, labels)."""
    count = len(labels)
    judge = TASKS[task].new_judge(len(names), thresholds=thresholds)
    kept = judge.of_batch(labels, logits)
    paths = paths or [f"photos/{place}.png" for place in range(count)]
    columns = {"path": paths, "split": ["test"] * count, "position": list(range(count))}
    reads = TASKS[task].reads
    if reads == "numbers":
        loss = (logits - labels).square().mean(1)
        columns |= {"targets": labels.tolist(), "answers": logits.tolist(), "loss": loss.tolist()}
    elif reads == "classes":
        named = {
            name: [[names[place] for place in row.nonzero().ravel().tolist()] for row in kept[kind]]
            for name, kind in (("labels", "labels"), ("predicted", "predicted"))
        }
        columns |= {**named, "targets": kept["labels"].int().tolist(), "probabilities": kept["scores"].tolist()}
        columns["loss"] = kept["losses"].tolist()
    else:
        columns |= {
            "label": [names[place] for place in labels.tolist()],
            "label_index": labels.tolist(),
            "prediction": [names[place] for place in kept["predicted"].tolist()],
            "prediction_index": kept["predicted"].tolist(),
            "probability": kept["confidence"].tolist(),
            "probabilities": kept["scores"].tolist(),
            "loss": kept["losses"].tolist(),
        }
    about = {"model": model, "dataset": "photos", "split": "test", "task": task}
    about |= {"label_names": list(names), "thresholds": thresholds, "slice_by": []}
    table = pa.table(columns, schema_of(task, len(names), {}, about))
    return Rows(table, task, list(names), about)


def write_rows(folder, rows):
    """The folder of a report of `evaluate`."""
    folder.mkdir()
    pq.write_table(rows.table, folder / "images.parquet")
    return folder


def answers(task, count=400, num_labels=4):
    """Labels, and what a good and a middling model say."""
    noise = torch.randn(2, count, num_labels)
    if task == CLASSIFICATION:
        labels = torch.randint(num_labels, (count,))
        signal = torch.nn.functional.one_hot(labels, num_labels).float()
    else:
        signal = torch.randn(count, num_labels)
        signal = signal if TASKS[task].reads == "numbers" else (signal > 0).float()
        labels = signal
    good = signal + 0.1 * noise[0] if TASKS[task].reads == "numbers" else 4 * signal + noise[0]
    return labels, good, signal + noise[1]
