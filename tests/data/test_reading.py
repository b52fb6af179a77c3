"""What is read of a Parquet file: the columns that are needed; and how files that are hard to share are shared."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image as PILImage

from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.data.parquet import ParquetRows
from hf_poolformer.data.stream import Order
from hf_poolformer.foundation.errors import UserError


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


def test_columns_that_nobody_needs_are_not_read(wide):
    def read(**how):
        return list(ParquetRows(data_files={"data": [str(wide)]}, **how).as_streaming_dataset("data"))

    rows = read()
    assert rows == list(load_dataset("parquet", data_files=str(wide), split="train", streaming=True))
    metadata = pq.read_metadata(wide)
    with open(wide, "r+b") as file:  # whoever reads the other column now, fails
        for group in range(metadata.num_row_groups):
            chunk = metadata.row_group(group).column(0)
            file.seek(min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset))))
            file.write(b"\xff" * chunk.total_compressed_size)
    assert read(columns=["image", "label"]) == [{"image": row["image"], "label": row["label"]} for row in rows]
    with pytest.raises(OSError):
        read()


def test_a_labelled_dataset_asks_for_two_columns(wide):
    dataset = open_datasets(dataset_name=wide, train_val_split=0)["train"]
    assert set(dataset.stream.features) == {"image", "label"}
    parts = open_datasets(dataset_name=wide, train_val_split=0.4)
    rows = [row for part in parts.values() for row in part.stream]
    assert len(rows) == ROWS and all(set(row) == {"image", "label"} for row in rows)


@pytest.fixture
def single(tmp_path):
    """A Parquet file with one row group of 36 MB."""
    generator = np.random.default_rng(0)
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8)).save(buffer, "PNG")
    encoded = [{"bytes": buffer.getvalue() + generator.bytes(1_000_000), "path": None} for _ in range(36)]
    path = tmp_path / "single.parquet"
    pq.write_table(pa.table({"image": encoded, "label": [f"class {row % 2}" for row in range(36)]}), path)
    return path


def opened(path):
    return open_datasets(dataset_name=path, train_val_split=0, cache_dir=str(path.parent / "cache"))["train"]


def copies(path):
    return {file: file.stat().st_mtime_ns for file in path.parent.rglob("*.arrow")}


def test_one_large_row_group_goes_round_to_many_workers(single):
    dataset = opened(single)
    order = Order(
        dataset.stream, shuffle=True, buffer_size=4, seed=0, process_index=0, num_processes=1, num_workers=16
    )
    assert str(order) == "36 shards for 16 data workers, which read 2 whole and 1 row in 4 of 1 more"
    rows = [row.values for worker in range(16) for row in order.lane(0, worker)[1]]
    known = {row["image"]["bytes"]: row["label"] for row in pq.read_table(single).to_pylist()}
    assert len(rows) == 36 and {row["image"]["bytes"]: row["label"] for row in rows} == known
    written = copies(single)
    assert len(written) == 1
    opened(single)
    assert copies(single) == written  # once
    single.write_bytes(single.read_bytes())
    os.utime(single, (0, 0))
    opened(single)
    assert len(copies(single)) == 2  # another file by the same name


def test_without_room_for_a_copy(single, monkeypatch, caplog):
    monkeypatch.setattr("datasets.builder.has_sufficient_disk_space", lambda needed, directory: needed < 1_000_000)
    dataset = opened(single)
    assert dataset.stream.num_shards == 1 and len(list(dataset.stream)) == 36 and not copies(single)
    assert "read without a copy" in caplog.text and "disk space" in caplog.text
    # Another process might have room, and each would deal by what it has.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--cache_dir"):
        opened(single)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs POSIX signals")
@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_an_interruption_ends_all_processes(wide, num_workers):
    script = textwrap.dedent("""
        import signal, sys, torch
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
        from hf_poolformer.data.datasets import open_datasets
        from hf_poolformer.data.loader import make_loader
        dataset = open_datasets(dataset_name=sys.argv[1], train_val_split=0)["train"]
        loader = make_loader(
            dataset, lambda image: torch.zeros(1), batch_size=2, training=True, num_workers=int(sys.argv[2])
        )
        for epoch in range(10**9):
            loader.set_epoch(epoch)
            for batch in loader:
                print("batch", flush=True)
    """)
    command = [sys.executable, "-c", script, str(wide), str(num_workers)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert run.stdout.readline() == "batch\n"
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        _, errors = run.communicate(timeout=60)
        assert run.returncode != 0 and "KeyboardInterrupt" in errors
        # Python's own helper, which forkserver brings, ends a moment later.
        with pytest.raises(ProcessLookupError):
            for _ in range(300):
                os.killpg(run.pid, 0)
                time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def test_a_disk_that_fills_while_copying_is_no_damage(single, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", full)
    assert opened(single).stream.num_shards == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"--cache_dir"):
        opened(single)
