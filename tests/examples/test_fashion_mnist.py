import gzip
import struct
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pytest
from warm import warm_python


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist.py"


def idx(values, dtype=8):
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, dtype, values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, count in (("train", 83), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def convert(source, target, *flags):
    command = [warm_python(), str(SCRIPT), str(target), "--source", str(source), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_image_and_label_arrives(source, tmp_path):
    done = convert(source, tmp_path / "parquet")
    assert done.returncode == 0, done.stderr
    assert "83 train images, 20 test images" in done.stdout
    stream = datasets.load_dataset(str(tmp_path / "parquet"), split="train", streaming=True)
    rows = list(stream)
    raw = gzip.decompress((source / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    assert b"".join(np.asarray(row["image"]).tobytes() for row in rows) == raw
    assert [row["label"] for row in rows] == [index % 10 for index in range(83)]
    assert stream.features["label"].names[9] == "Ankle boot"


def test_an_outfit_has_the_labels_of_its_items(source, tmp_path):
    labels = (np.arange(83) % 10).astype(np.uint8)
    images = np.broadcast_to(10 * labels[:, None, None] + 10, (83, 28, 28)).astype(np.uint8)  # a shade per class
    (source / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    done = convert(source, tmp_path / "outfits", "--outfits")
    assert done.returncode == 0, done.stderr
    rows = list(datasets.load_dataset(str(tmp_path / "outfits"), split="train"))
    shades = [np.unique(np.asarray(row["image"])).tolist() for row in rows]
    assert [[0] + [10 * label + 10 for label in row["labels"]] for row in rows] == shades
    items = [(np.asarray(row["image"]) > 0).sum() / 28**2 for row in rows]
    assert set(items) == {2, 3, 4} and sum(items) <= 83, "whole, side by side, and none of them twice"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"", "is not an idx file"),
        (b"\x89PNG....", "is not an idx file"),
        (idx(np.zeros((83, 28, 28), np.uint8))[:-1], "announces (83, 28, 28)"),
        (gzip.compress(b"x" * 1000, mtime=0)[:20], "is damaged"),
    ],
    # gzip writes the time: an identifier made from its bytes would differ from one process to the next.
    ids=["missing", "empty", "png", "short", "cut"],
)
def test_bad_files(source, tmp_path, content, message):
    path = source / "train-images-idx3-ubyte.gz"
    path.unlink() if content is None else path.write_bytes(content)
    done = convert(source, tmp_path / "parquet")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
