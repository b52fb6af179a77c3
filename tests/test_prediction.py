"""Prediction as a person runs it: a folder of anything in, a table out."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor, PoolFormerModel
from hf_poolformer.prediction import predict
from hf_poolformer.training.errors import UserError


SCRIPT = Path(__file__).parents[1] / "scripts" / "predict.py"
NAMES = ["cat", "dog", "eel", "fox", "gnu", "hen", "ibis"]


def photograph(seed: int, height: int = 40, width: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(seed: int) -> bytes:
    buffer = io.BytesIO()
    photograph(seed).save(buffer, "PNG")
    return buffer.getvalue()


def config(**changes) -> PoolFormerConfig:
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    return PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 32, 64), **{**labels, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    classifier = PoolFormerForImageClassification(config())
    with torch.no_grad():
        classifier.classifier.weight.normal_(std=0.5)
    classifier.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    PoolFormerImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    (root / "below").mkdir(parents=True)
    for seed in range(7):
        photograph(seed).save(root / ("below" if seed > 4 else "") / f"{seed}.png")
    (root / "empty.jpg").touch()
    (root / "page.jpeg").write_text("<html></html>")
    (root / "notes.txt").write_text("not an image, not listed")
    return root


def read(table: Path) -> list[dict]:
    if table.suffix == ".parquet":
        return pq.read_table(table).to_pylist()
    if table.suffix == ".jsonl":
        return [json.loads(line) for line in table.read_text().splitlines()]
    with open(table, newline="") as file:
        rows = [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]
    for row in rows:
        row["score"] = row["score"] and float(row["score"])
        for key in ("labels", "scores"):
            row[key] = row[key] and json.loads(row[key])
    return rows


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_folder_to_table(model, folder, tmp_path, suffix, num_workers):
    output = tmp_path / "new" / f"predictions.{suffix}"
    arguments = {"top_k": 3, "batch_size": 4, "num_workers": num_workers, "progress": False}
    summary = predict(model, [folder], output, **arguments)
    assert (summary.predicted, summary.broken) == (7, 2)
    assert "7 images predicted, 2 broken" in str(summary) and str(output) in str(summary)
    rows = read(output)
    assert list(rows[0]) == ["path", "label", "score", "labels", "scores", "error"]
    assert [Path(row["path"]).name for row in rows] == [
        *[f"{seed}.png" for seed in range(5)],
        "empty.jpg",
        "page.jpeg",
        "5.png",
        "6.png",
    ]
    errors = {Path(row["path"]).name: row["error"] for row in rows if row["error"]}
    assert errors == {"empty.jpg": "empty file (0 bytes)", "page.jpeg": "not an image in a format that Pillow knows"}
    classify = pipeline("image-classification", str(model))
    for row in rows:
        if row["error"]:
            assert row["label"] is row["score"] is row["labels"] is row["scores"] is None
            continue
        expected = classify(row["path"], top_k=3)
        assert row["labels"] == [entry["label"] for entry in expected] and row["label"] == row["labels"][0]
        np.testing.assert_allclose(row["scores"], [entry["score"] for entry in expected], rtol=1e-4)
        assert row["score"] == row["scores"][0]
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]


def test_every_kind_of_input(model, folder, tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    images = [{"bytes": encode(seed), "path": None} for seed in range(5)]
    dataset = Dataset.from_dict({"image": images, "label": [0, 1, 2, 3, 4]}, features=features)
    shards = tmp_path / "shards"
    shards.mkdir()
    dataset.to_parquet(shards / "test-0.parquet")
    (shards / "test-1.parquet").write_bytes(b"PAR1 damaged")
    dataset.save_to_disk(tmp_path / "saved")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for seed in range(3):
            member = tarfile.TarInfo(f"a/{seed}.png")
            member.size = len(encode(seed))
            tar.addfile(member, io.BytesIO(encode(seed)))
    odd = folder / "no suffix"
    photograph(0).save(odd, "PNG")
    inputs = [odd, folder / "*.png", folder / "0.png", shards, tmp_path / "saved", tmp_path / "images.tar"]
    summary = predict(model, inputs, tmp_path / "table.jsonl", batch_size=4, progress=False)
    rows = read(tmp_path / "table.jsonl")
    assert (summary.predicted, summary.broken) == (1 + 5 + 5 + 5 + 3, 1)
    assert [row["path"] for row in rows] == [
        *[str(path) for path in [odd, *sorted(folder.glob("*.png"))]],
        *[f"{shards}/test-0.parquet#{index}" for index in range(5)],
        f"{shards}/test-1.parquet",
        *[f"{tmp_path}/saved#{index}" for index in range(5)],
        *[f"{tmp_path}/images.tar#a/{seed}.png" for seed in range(3)],
    ]
    assert "parquet" in rows[11]["error"]
    by_seed = rows[1:6]
    for group in (rows[6:11], rows[12:17], rows[17:]):
        for row, same in zip(group, by_seed, strict=False):
            assert row["labels"] == same["labels"] and row["scores"] == pytest.approx(same["scores"], rel=1e-4)


@pytest.mark.parametrize(("problem_type", "total"), [("multi_label_classification", None), (None, 1.0)])
def test_scores_are_those_of_the_problem(tmp_path, folder, problem_type, total):
    torch.manual_seed(0)
    classifier = PoolFormerForImageClassification(config(problem_type=problem_type)).eval()
    classifier.save_pretrained(tmp_path / "model")
    PoolFormerImageProcessor().save_pretrained(tmp_path / "model")
    predict(tmp_path / "model", [folder / "0.png"], tmp_path / "t.jsonl", top_k=100, progress=False)
    (row,) = read(tmp_path / "t.jsonl")
    assert len(row["scores"]) == len(NAMES) and row["scores"] == sorted(row["scores"], reverse=True)
    if total is not None:
        assert sum(row["scores"]) == pytest.approx(total)
    else:
        assert sum(row["scores"]) == pytest.approx(len(NAMES) / 2, rel=0.2)


def test_images_of_many_sizes_without_a_crop(model, folder, tmp_path):
    classifier = PoolFormerForImageClassification.from_pretrained(model)
    classifier.save_pretrained(tmp_path / "uncropped")
    PoolFormerImageProcessor(do_resize=False, do_center_crop=False).save_pretrained(tmp_path / "uncropped")
    photograph(1, 64, 32).save(folder / "1.png")
    predict(tmp_path / "uncropped", [folder / "0.png", folder / "1.png"], tmp_path / "t.jsonl", progress=False)
    assert [row["error"] for row in read(tmp_path / "t.jsonl")] == [None, None]


def test_what_cannot_be_done_is_said_first(model, folder, tmp_path):
    table = tmp_path / "t.csv"
    for inputs, output, message in [
        ([folder], tmp_path / "t.xlsx", r"must end in .parquet, .csv, .jsonl"),
        ([folder], tmp_path / "t", r"must end in"),
        ([folder], folder, r"must end in"),
        ([], table, r"nothing to predict"),
        ([tmp_path / "absent"], table, r"absent: no such file"),
        ([tmp_path / "*.bmp"], table, r"no such file"),
        ([folder / "*.txt"], table, r"no images there"),
    ]:
        with pytest.raises(UserError, match=message):
            predict(model, inputs, output, progress=False)
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="no images there"):
        predict(model, [tmp_path / "void"], table, progress=False)
    with pytest.raises(UserError, match="is not a model"):
        predict(tmp_path / "void", [folder], table, progress=False)
    with pytest.raises(UserError, match="no device"):
        predict(model, [folder], table, device="toaster", progress=False)
    with pytest.raises(UserError, match="top_k"):
        predict(model, [folder], table, top_k=0, progress=False)
    assert not table.exists()


def test_a_model_without_a_trained_head_is_refused(folder, tmp_path):
    PoolFormerModel(config()).save_pretrained(tmp_path / "headless")
    PoolFormerImageProcessor().save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match="not a trained classifier"):
        predict(tmp_path / "headless", [folder], tmp_path / "t.csv", progress=False)


def test_existing_output_is_kept_unless_told(model, folder, tmp_path):
    table = folder / "t.parquet"
    table.write_bytes(b"precious")
    with pytest.raises(UserError, match="--overwrite"):
        predict(model, [folder], table, progress=False)
    assert table.read_bytes() == b"precious"
    # The old table lies among the inputs and is none of them.
    assert predict(model, [folder], table, overwrite=True, progress=False).broken == 2
    assert len(read(table)) == 9


def test_the_script(model, folder, tmp_path):
    table = tmp_path / "t.csv"
    done = run(model, folder, "--output", table, "--top_k", 2)
    assert done.returncode == 0, done.stderr
    assert "7 images predicted, 2 broken" in done.stdout and str(table) in done.stdout
    assert "empty.jpg: empty file" in done.stderr and "Traceback" not in done.stderr
    assert len(read(table)) == 9

    only_broken = run(model, folder / "empty.jpg", "--output", tmp_path / "u.csv")
    assert only_broken.returncode == 1 and read(tmp_path / "u.csv")[0]["error"]

    refused = run(model, folder, "--output", table)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_interrupted_it_leaves_nothing_behind(model, tmp_path, name):
    (tmp_path / "many").mkdir()
    for index in range(1500):
        (tmp_path / "many" / f"{index}.png").write_bytes(encode(index % 7))
    output = tmp_path / "out" / "t.jsonl"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, model, tmp_path / "many", "--output", output, "--batch_size", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in output.parent.glob(".*partial")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.Signals[name]
    assert errors.strip().splitlines()[-1] == f"stopped: {output} was not written" and "Traceback" not in errors
    assert list(output.parent.iterdir()) == []


def test_files_need_no_datasets(model, folder, tmp_path, run_python):
    code = """
import sys
sys.modules["datasets"] = None
from hf_poolformer.prediction import predict
from hf_poolformer.training.errors import UserError
model, folder, table = sys.argv[1:]
assert predict(model, [folder], table, progress=False).predicted == 7
open(folder + "/a.parquet", "wb").write(b"PAR1")
assert predict(model, [folder + "/0.png", folder], table, overwrite=True, progress=False).predicted == 7
assert "hf-poolformer[train]" in open(table).read()
"""
    run_python(code, model, folder, tmp_path / "t.csv")
