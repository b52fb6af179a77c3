"""What is said and judged before the first step."""

import subprocess

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from warm import warm_python

from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.data.description import describe_data
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.training import classification
from hf_poolformer.training.loop import train


def picture(path, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(abs(hash(path.name)) % 1000).integers(0, 60, (16, 16, 3))
    pixels[..., kind] += 180
    PILImage.fromarray(pixels.astype(np.uint8)).save(path)


def folder(root, counts, suffix="png"):
    for kind, (name, count) in enumerate(counts.items()):
        for index in range(count):
            picture(root / name / f"{index:03d}.{suffix}", kind % 3)
    return root


def test_a_folder_is_described_on_one_screen(tmp_path):
    folder(tmp_path / "train", {f"kind {number:02d}": 4 + number for number in range(30)})
    folder(tmp_path / "val", {f"kind {number:02d}": 2 for number in range(29)})
    lines = describe_data(open_datasets(dataset_name=tmp_path)).splitlines()
    text = "\n".join(lines)
    assert len(lines) <= 10 and max(map(len, lines)) <= 132
    assert "555 images" in text and "58 images" in text
    assert "30 classes" in text and "kind 29 33" in text and "kind 00 4" in text
    assert "no image" in text and "in validation of 1 of the classes: kind 29" in text


def test_columns_that_are_not_read_are_named(tmp_path):
    features = Features(
        {"photo": Image(), "label": Value("int64"), "coarse": ClassLabel(names=["a", "b"]), "note": Value("string")}
    )
    picture(tmp_path / "one.png", 0)
    data = (tmp_path / "one.png").read_bytes()
    rows = [
        {"photo": {"bytes": data, "path": None}, "label": index % 3 - 1, "coarse": index % 2, "note": f"n{index}"}
        for index in range(30)
    ]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    opened = open_datasets(dataset_name=tmp_path / "data", train_val_split=0)
    # A column called label wins over a ClassLabel of another name, and -1 stands for none.
    assert opened["train"].label_names == ["0", "1"]
    text = describe_data(opened)
    assert "image 'photo', label 'label' (int64)" in text and "coarse, note" in text
    assert "10 rows of" in text


def test_classes_that_nobody_counted_are_named_without_numbers(tmp_path):
    import dataclasses

    opened = open_datasets(dataset_name=folder(tmp_path, {"a": 3, "b": 3}), train_val_split=0)
    uncounted = {"train": dataclasses.replace(opened["train"], counts=None, num_examples=None)}
    assert "a, b (not counted)" in describe_data(uncounted)
    assert "unknown number of images" in describe_data(uncounted)


def run_of(make_settings, data, **changes):
    changes = {"num_train_epochs": 1, "num_warmup_epochs": 0, "per_device_train_batch_size": 8, **changes}
    return make_settings(dataset_name=None, train_dir=str(data), **changes)


def test_a_small_split_of_broken_images_is_refused_before_training(make_settings, tmp_path):
    data = tmp_path / "data"
    folder(data / "train", {"a": 20, "b": 20})
    folder(data / "val", {"a": 5, "b": 5})
    for index in range(2):
        (data / "val" / "a" / f"{index:03d}.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"2 of the first 10 images of .*validation.* --max_skipped"):
        train(run_of(make_settings, data))
    assert not (tmp_path / "run" / "training_log.jsonl").is_file()
    results = train(run_of(make_settings, data, max_skipped=0.3, overwrite_output_dir=True))
    assert results["eval_samples"] == 8 and results["eval_skipped_images"] == 2


def test_a_small_training_set_is_judged_at_the_end_of_its_epoch(make_settings, tmp_path, monkeypatch):
    data = folder(tmp_path / "data" / "train", {"a": 10, "b": 10}).parent
    for index in range(4):
        (data / "train" / "a" / f"{index:03d}.png").write_bytes(b"not a picture")
    monkeypatch.setattr(classification, "judge", lambda *_: None)  # images that break later
    with pytest.raises(UserError, match=r"4 of the 20 images .* --max_skipped allows \(1.0%\)"):
        train(run_of(make_settings, data, train_val_split=0))


def test_rows_without_label_beyond_the_limit_are_refused(make_settings, tmp_path):
    features = Features({"image": Image(), "label": Value("int64")})
    picture(tmp_path / "one.png", 0)
    data = (tmp_path / "one.png").read_bytes()
    rows = [{"image": {"bytes": data, "path": None}, "label": index % 4 - 1} for index in range(100)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(UserError, match=r"25 of 100 rows .* no label.*--max_skipped 0\.25"):
        train(run_of(make_settings, tmp_path / "data", train_val_split=0))
    results = train(run_of(make_settings, tmp_path / "data", train_val_split=0, max_skipped=0.25))
    assert results["skipped_images"] == 0 and results["step"] == 75 // 8


def test_a_single_class_with_folders_in_it_is_refused_with_a_hint(tmp_path):
    folder(tmp_path / "animals", {"cat": 3})
    with pytest.raises(UserError, match=r"single class, cat.*give that folder instead"):
        open_datasets(dataset_name=tmp_path / "animals", train_val_split=0)


def test_the_command_says_it_before_it_trains(tmp_path):
    folder(tmp_path / "data", {"cat": 20, "dog": 12})
    command = [warm_python(), "-m", "hf_poolformer_cli", "train", "--recipe", "demo", "--max_train_steps", "1"]
    command += ["--train_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"), "--num_workers", "0"]
    command += ["--per_device_train_batch_size", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = done.stdout.partition("parameters")[0]
    assert "cat 20, dog 12" in said and "held-out" in said
