"""Several labels per image, and numbers: as people store them, read as they are meant or refused with what would work."""

import csv
import io
import json
import os
import statistics
import tarfile
import time
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, LargeList, List, Value
from PIL import Image as PILImage

from hf_poolformer.data import contents
from hf_poolformer.data.classes import Classes
from hf_poolformer.data.datasets import align_labels, open_datasets
from hf_poolformer.data.description import describe_data, judge
from hf_poolformer.data.loader import make_loader
from hf_poolformer.foundation.errors import UserError


COUNT = 24
NAMES = ("cat", "dog", "eel")
MULTI, NUMBERS = "multi_label_classification", "regression"


def encode(value: int) -> bytes:
    """An image whose first pixel tells which one it is."""
    pixels = np.random.default_rng(value).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels[0, 0] = value
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [encode(value) for value in range(COUNT)]


def has(value: int) -> list[int]:
    """The classes of an image: of the first none, of the last all."""
    return [int(value % number == number - 1) for number in (2, 3, 4)]


TRUTH = torch.tensor([has(value) for value in range(COUNT)], dtype=torch.float32)
OF = [[index for index, flag in enumerate(has(value)) if flag] for value in range(COUNT)]
NAMED = [[NAMES[index] for index in own] for own in OF]


def parquet(root, columns):
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": IMAGES[: len(next(iter(columns.values())))], **columns}), root / "data.parquet")
    return root


def saved(root, columns):
    features = Features({"image": Image()})
    features.update(Features.from_arrow_schema(pa.table(columns).schema))
    images = [{"bytes": data, "path": None} for data in IMAGES]
    rows = {name: column.to_pylist() for name, column in columns.items()}
    Dataset.from_dict({"image": images, **rows}, features=features).save_to_disk(root)
    return root


def folder(root, columns, kind):
    """Images beside a metadata file."""
    root.mkdir(parents=True, exist_ok=True)
    table = pa.table({"file_name": [f"{value}.png" for value in range(COUNT)], **columns})
    for value, data in enumerate(IMAGES):
        (root / f"{value}.png").write_bytes(data)
    if kind == "parquet":
        pq.write_table(table, root / "metadata.parquet")
    elif kind == "jsonl":
        (root / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()))
    else:
        with open(root / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, table.column_names)
            writer.writeheader()
            writer.writerows(table.to_pylist())
    return root


def tars(root, columns):
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "00000.tar", "w") as tar:
        for value, row in enumerate(pa.table(columns).to_pylist()):
            for suffix, data in (("png", IMAGES[value]), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{value:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return root


LAYOUTS = {
    "parquet": parquet,
    "saved": saved,
    "metadata.csv": lambda root, columns: folder(root, columns, "csv"),
    "metadata.jsonl": lambda root, columns: folder(root, columns, "jsonl"),
    "metadata.parquet": lambda root, columns: folder(root, columns, "parquet"),
    "tar": tars,
}
# How labels are stored: columns, names that the classes have then, and arguments.
STORED = {
    "lists of names": ({"tags": pa.array(NAMED)}, NAMES, {}),
    "large lists": ({"tags": pa.array(NAMED, pa.large_list(pa.string()))}, NAMES, {}),
    "lists of numbers from 10": ({"labels": pa.array([[10 * n + 10 for n in o] for o in OF])}, ("10", "20", "30"), {}),
    "numbers with names": ({"labels": pa.array(OF)}, NAMES, {"label_names": ",".join(NAMES)}),
    "padded lists": ({"labels": pa.array([(o + [-1] * 3)[:3] if o else [] for o in OF])}, ("0", "1", "2"), {}),
    "vectors": ({"label": pa.array([has(v) for v in range(COUNT)], pa.list_(pa.int64(), 3))}, ("0", "1", "2"), {}),
    "vectors with names": (
        {"label": pa.array([[bool(f) for f in has(v)] for v in range(COUNT)])},
        NAMES,
        {"label_names": ",".join(NAMES)},
    ),
    "vectors of floats": ({"label": pa.array(TRUTH.tolist())}, ("0", "1", "2"), {}),
    "a column of truths each": ({n: pa.array(TRUTH[:, i].bool().tolist()) for i, n in enumerate(NAMES)}, NAMES, {}),
    "a column of ones and zeros each": (
        {f"has_{n}": pa.array([has(v)[i] for v in range(COUNT)]) for i, n in enumerate(NAMES)},
        ("has_cat", "has_dog", "has_eel"),
        {"label_column_name": "has_*"},
    ),
    "JSON": ({"tags": pa.array([json.dumps(own) for own in NAMED])}, NAMES, {}),
    "Python": ({"label": pa.array([repr(own) for own in NAMED])}, NAMES, {}),
}
IN_TEXT = {"a column of truths each", "a column of ones and zeros each", "JSON", "Python"}


def batches(dataset, **arguments):
    pixels = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)  # noqa: E731
    return list(make_loader(dataset, pixels, **{"batch_size": 5, "training": False, **arguments}))


def labels_by_image(found):
    """Labels in the order of the images' first pixels."""
    values = torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in found])
    return torch.cat([batch["labels"] for batch in found])[values.argsort()]


def opened(root, **arguments):
    return open_datasets(**{"dataset_name": root, "train_val_split": 0, "problem_type": MULTI, **arguments})["train"]


@pytest.mark.parametrize(
    ("stored", "layout"),
    [(stored, "parquet") for stored in STORED]
    + [
        (stored, layout)
        for layout in LAYOUTS
        for stored in ("lists of names", "vectors", "a column of ones and zeros each", "JSON")
        if layout != "parquet"
    ],
)
def test_several_labels_are_read_as_they_are_stored(tmp_path, stored, layout):
    columns, names, arguments = STORED[stored]
    if layout == "metadata.csv":
        if stored not in IN_TEXT:
            pytest.skip("no cell holds a list")
        arguments = {"label_column_name": ",".join(columns), **arguments}  # truths are texts there
    dataset = opened(LAYOUTS[layout](tmp_path / "data", columns), counted=True, **arguments)
    assert dataset.label_names == list(names) and dataset.problem_type == MULTI
    found = batches(dataset)
    assert found[0]["labels"].dtype == torch.float32 and found[0]["labels"].shape == (5, 3)
    expected = TRUTH
    if stored == "padded lists":  # nothing but fillers: nobody has looked
        assert dataset.unlabelled == 0
    assert torch.equal(labels_by_image(found), expected)
    assert dataset.counts == tuple(TRUTH.sum(0).int().tolist())
    assert (dataset.labelled, dataset.unlabelled, dataset.num_examples) == (COUNT, 0, COUNT)
    assert dataset.per_image == (pytest.approx(TRUTH.sum(1).mean().item()), 0, 3, int((TRUTH.sum(1) == 0).sum()))
