import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
SHARDS = {f"train-{k:05d}-of-00004.parquet" for k in range(4)} | {f"test-{k:05d}-of-00002.parquet" for k in range(2)}


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")  # as when it is run
        spec.loader.exec_module(module)
    return module


def test_digits_are_written_once_and_stream(demo, tmp_path, capsys):
    folder = tmp_path / "data" / "digits"
    demo.write_digits(folder)
    assert {path.name for path in folder.iterdir()} == SHARDS
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    demo.write_digits(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "already there" in capsys.readouterr().out

    splits = datasets.load_dataset(str(folder), streaming=True)
    rows = {split: list(stream) for split, stream in splits.items()}
    assert {split: len(found) for split, found in rows.items()} == {"train": 1437, "test": 360}
    assert splits["test"].features["label"].names == [str(digit) for digit in range(10)]
    counts = np.bincount([row["label"] for row in rows["test"]])
    assert counts.min() >= 34
    assert counts.max() <= 37
    image = rows["test"][0]["image"]
    assert (image.size, image.mode) == ((8, 8), "L")
    assert max(np.asarray(row["image"]).max() for row in rows["test"]) == 255


def test_a_missing_shard_is_written_again_and_strangers_are_left_alone(demo, tmp_path):
    demo.write_digits(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "train-00002-of-00004.parquet").unlink()
    demo.write_digits(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == SHARDS | {"notes.txt"}


@pytest.mark.parametrize("mistakes", [0, 3, 60])
def test_the_picture(demo, tmp_path, mistakes):
    images = [Image.fromarray(np.full((8, 8), index, np.uint8)) for index in range(60)]
    labels = ["1"] * 60
    predictions = [[{"label": "7" if index < mistakes else "1", "score": 0.9}] for index in range(60)]
    demo.draw(tmp_path / "picture.png", images, labels, predictions)
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).astype(int)
    assert pixels.shape[0] > 500
    red = (pixels[..., 0] > pixels[..., 1] + 100).sum()
    assert (red > 0) == (mistakes > 0)


@pytest.mark.slow
def test_the_whole_way_twice(tmp_path):
    """One epoch only: that the parts fit together, and that a second run replaces the first."""
    command = [
        sys.executable,
        str(ROOT / "scripts" / "demo.py"),
        "--num_train_epochs",
        "1",
        "--num_warmup_epochs",
        "0",
    ]
    command += ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    for minimum, status in (("0", 0), ("1.1", 1)):
        done = subprocess.run(
            [*command, "--min_accuracy", minimum],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == status, done.stdout + done.stderr
        results = json.loads((tmp_path / "run" / "all_results.json").read_text())
        assert results["eval_samples"] == 360
        for name in ("model.safetensors", "README.md", "predictions.png", "curves.png", "confusion_matrix.png"):
            assert (tmp_path / "run" / name).is_file()
    assert "error: the accuracy" in done.stderr
