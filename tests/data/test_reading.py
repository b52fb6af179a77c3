"""What is read of a Parquet file: the columns that are needed."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image as PILImage

from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.data.parquet import ParquetRows


ROWS = 60


@pytest.fixture
def wide(tmp_path):
    """A Parquet file of six row groups with a column that is much larger than the images."""
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(ROWS):
        buffer = io.BytesIO()
        PILImage.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    ballast = [generator.bytes(20_000) for _ in range(ROWS)]
    labels = [f"class {number % 2}" for number in range(ROWS)]
    table = pa.table({"ballast": ballast, "image": encoded, "label": labels})
    path = tmp_path / "wide.parquet"
    pq.write_table(table, path, row_group_size=10)
    return path


class Noting(io.FileIO):
    """A file that counts what is read of it."""

    total = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        Noting.total += count
        return count

    def read(self, size=-1):
        data = super().read(size)
        Noting.total += len(data)
        return data


def test_columns_that_nobody_needs_are_not_read(wide, monkeypatch):
    def read(**how):
        Noting.total = 0
        built = ParquetRows(data_files={"data": [str(wide)]}, **how).as_streaming_dataset("data")
        monkeypatch.setattr("hf_poolformer.data.parquet.open", lambda path, mode: Noting(path), raising=False)
        return list(built), Noting.total

    rows, everything = read()
    some, less = read(columns=["image", "label"])
    assert everything > ROWS * 20_000 > 10 * less
    assert some == [{"image": row["image"], "label": row["label"]} for row in rows]
    assert rows == list(load_dataset("parquet", data_files=str(wide), split="train", streaming=True))


def test_a_labelled_dataset_asks_for_two_columns(wide):
    dataset = open_datasets(dataset_name=wide, train_val_split=0)["train"]
    assert set(dataset.stream.features) == {"image", "label"}
    parts = open_datasets(dataset_name=wide, train_val_split=0.4)
    rows = [row for part in parts.values() for row in part.stream]
    assert len(rows) == ROWS and all(set(row) == {"image", "label"} for row in rows)
