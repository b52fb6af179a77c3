"""`hf-poolformer evaluate` of segmenters and detectors, and its report."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image
from shapes import COUNTS, MAP_FEATURES, NAMES, OBJECT_FEATURES, SIDE, TINY_MODEL, map_row, object_row, scene
from shards import encoded

import hf_poolformer_cli
from hf_poolformer import PoolFormerConfig
from hf_poolformer.foundation.tasks import CLASSIFICATION, TASKS
from hf_poolformer.training import loop


SEGMENTATION, DETECTION, INSTANCES = "semantic-segmentation", "object-detection", "instance-segmentation"
GROUND = ["ground", *NAMES]


def evaluate(capfd, *words, status=0):
    """What the command prints as JSON; of one that fails, its message."""
    capfd.readouterr()
    assert hf_poolformer_cli.main(["evaluate", *map(str, words), "--num_workers", "0", "--json"]) == status
    printed = capfd.readouterr()
    return json.loads(printed.out) if status == 0 else printed.err


def saved_model(folder, task, names, change=lambda model: None):
    """A tiny model with random weights, whose detections count however little it is sure of them."""
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model = TASKS[task].auto_model().from_config(PoolFormerConfig(**TINY_MODEL, score_threshold=0.001, **labels))
    change(model)
    model.save_pretrained(folder)
    TASKS[task].new_processor(size={"shortest_edge": SIDE, "longest_edge": SIDE + 8}).save_pretrained(folder)
    return folder


def write_maps(folder, scenes):
    folder.mkdir()
    Dataset.from_list([map_row(*one) for one in scenes], features=MAP_FEATURES).to_parquet(
        folder / "validation.parquet"
    )
    (folder / "id2label.json").write_text(json.dumps(dict(enumerate(GROUND))))
    return folder


def write_objects(folder, rows):
    folder.mkdir()
    Dataset.from_list(rows, features=OBJECT_FEATURES).to_parquet(folder / "validation.parquet")
    return folder


@pytest.mark.parametrize("task", [SEGMENTATION, DETECTION, INSTANCES])
def test_figures_are_those_of_training_and_rows_add_up_to_them(make_settings, shapes, tmp_path, capfd, task):
    overrides = json.dumps({**TINY_MODEL, "score_threshold": 0.001})
    settings = make_settings(task, max_train_steps=2, config_overrides=overrides)
    trained = loop.train(settings)
    report, output = tmp_path / "report", tmp_path / "output"
    words = ["--dataset_name", settings.dataset_name, "--batch_size", 3, "--report", report, "--output", output]
    results = evaluate(capfd, tmp_path / "run", *words)
    assert results.pop("model") == str(tmp_path / "run") and results["task"] == task
    figures = {name for name in trained if name.startswith("eval_") and "second" not in name and "runtime" not in name}
    assert {name: results[name] for name in figures} == {name: trained[name] for name in figures}
    written = json.loads((output / "all_results.json").read_text())
    assert {name: written[name] for name in results} == results
    assert (output / "predictions.png").read_bytes()[:4] == b"\x89PNG"

    rows, data = pq.read_table(report / "images.parquet"), json.loads((report / "report.json").read_text())
    assert rows["position"].to_pylist() == list(range(COUNTS["validation"]))
    assert rows["split"].to_pylist() == ["validation"] * COUNTS["validation"]
    assert rows["path"][4].as_py() == f"{settings.dataset_name}#4"
    assert json.loads(rows.schema.metadata[b"hf_poolformer"])["label_names"] == list(data["about"]["label_names"])
    assert data["results"] == results and [row["class"] for row in data["classes"]] == data["about"]["label_names"]
    page = (report / "report.html").read_text()
    assert page.count("<img") >= 2 * len(data["worst"]) > 0
    if task == SEGMENTATION:
        assert sum(map(sum, rows["true_pixels"].to_pylist())) == np.array(data["confusion_matrix"]).sum()
        assert {row["class"]: row["iou"] for row in data["classes"]} == pytest.approx(results["eval_per_class_iou"])
        assert [row["iou"] for row in data["worst"]] == sorted(rows["iou"].to_pylist())[: len(data["worst"])]
        low, high = results["eval_confidence_intervals"]["eval_miou"]
        assert low <= results["eval_miou"] <= high
        return
    for name, count in data["errors"].items():
        assert sum(rows[name].to_pylist()) == count, name
    assert sum(size["objects"] for size in data["sizes"]) == sum(row["objects"] for row in data["classes"])
    assert data["errors"]["objects"] == sum(row["objects"] for row in data["classes"]) > 0
    assert data["worst"] == sorted(data["worst"], key=lambda row: -row["cost"])


def test_a_segmenter_that_sees_one_class(tmp_path, capfd):
    def only_ground(model):
        with torch.no_grad():
            head = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)][-1]
            assert head.out_channels == len(GROUND)
            head.weight.zero_()
            head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))

    rng = np.random.default_rng(0)
    scenes = [scene(rng) for _ in range(9)]
    data = write_maps(tmp_path / "data", scenes)
    model = saved_model(tmp_path / "model", SEGMENTATION, GROUND, only_ground)
    results = evaluate(capfd, model, "--dataset_name", data, "--report", tmp_path / "report")
    covered = sum(mask.sum() for _, objects in scenes for _, mask in objects)
    ground = 1 - covered / sum(pixels.shape[0] * pixels.shape[1] for pixels, _ in scenes)
    assert results["eval_per_class_iou"] == pytest.approx({"ground": ground, "square": 0, "disc": 0}, rel=1e-12)
    assert results["eval_miou"] == pytest.approx(ground / 3, rel=1e-12)
    pairs = json.loads((tmp_path / "report/report.json").read_text())["confused"]
    assert {(pair["true"], pair["predicted"], pair["share"]) for pair in pairs} == {
        ("square", "ground", 1.0),
        ("disc", "ground", 1.0),
    }


@pytest.mark.parametrize("task", [SEGMENTATION, DETECTION])
def test_a_model_that_is_right_everywhere(tmp_path, capfd, task):
    """What it finds is the truth."""
    names = GROUND if task == SEGMENTATION else NAMES
    folder = saved_model(tmp_path / "model", task, names)
    model = TASKS[task].auto_model().from_pretrained(folder).to(memory_format=torch.channels_last).eval()
    processor = TASKS[task].new_processor(size={"shortest_edge": SIDE, "longest_edge": SIDE + 8})
    rng = np.random.default_rng(1)
    rows, boxes = [], 0
    for _ in range(4):
        pixels, _ = scene(rng)
        with torch.inference_mode():
            outputs = model(**processor(Image.fromarray(pixels), return_tensors="pt"))
        if task == SEGMENTATION:
            (classes,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[pixels.shape[:2]])
            rows.append({"image": encoded(pixels), "annotation": encoded(classes.numpy().astype(np.uint8))})
            continue
        (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[pixels.shape[:2]])
        boxes += len(found["labels"])
        corners = found["boxes"].numpy()
        described = [
            {"bbox": [*box[:2], *(box[2:] - box[:2])], "category": label, "segmentation": None}
            for box, label in zip(corners, found["labels"].tolist(), strict=True)
        ]
        rows.append({"image": encoded(pixels), "objects": described})
    if task == SEGMENTATION:
        data = tmp_path / "data"
        data.mkdir()
        Dataset.from_list(rows, features=MAP_FEATURES).to_parquet(data / "validation.parquet")
        (data / "id2label.json").write_text(json.dumps(dict(enumerate(GROUND))))
    else:
        assert boxes > 4
        data = write_objects(tmp_path / "data", rows)
    results = evaluate(
        capfd, folder, "--dataset_name", data, "--report", tmp_path / "report", "--no_check_annotations"
    )
    report = json.loads((tmp_path / "report/report.json").read_text())
    if task == SEGMENTATION:
        assert results["eval_miou"] == results["eval_pixel_accuracy"] == 1 and not report["confused"]
        assert results["eval_confidence_intervals"]["eval_miou"] == [1, 1]
        assert report["worst"] == [] and "No image has an error." in (tmp_path / "report/report.html").read_text()
    else:
        assert results["eval_map"] == results["eval_map_50"] == 1
        assert report["f1"] == 1 and report["errors"]["right"] == report["errors"]["objects"] == boxes
        assert sum(report["errors"][name] for name in ("missed", "background", "badly_placed", "wrong_class")) == 0


HOSTILE = ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(2)>\n\u202e", "x" * 10_000]


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.handlers = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attributes if name.startswith("on")]


def test_hostile_names_and_broken_images(tmp_path, capfd):
    data = tmp_path / "data"
    rng = np.random.default_rng(2)
    for name in ("images", "masks"):
        (data / "validation" / name).mkdir(parents=True)
    stems = ["<script>alert(3)<", "b", "c", "'\"&lt;\n"]
    for stem in stems:
        pixels, objects = scene(rng)
        row = map_row(pixels, objects)
        for name, column in (("images", "image"), ("masks", "annotation")):
            (data / "validation" / name / f"{stem}.png").write_bytes(row[column]["bytes"])
    (data / "validation/images/b.png").write_bytes(b"not a picture")
    names = tmp_path / "names.json"
    names.write_text(json.dumps(dict(enumerate(HOSTILE))))
    model = saved_model(tmp_path / "model", SEGMENTATION, HOSTILE)
    report = tmp_path / "report"
    words = ["--dataset_name", data, "--label_names", names, "--max_skipped", 1, "--report", report]
    results = evaluate(capfd, model, *words, "--no_check_annotations")
    assert results["eval_samples"] == 3 and results["eval_skipped_images"] == 1
    written = json.loads((report / "report.json").read_text())
    assert [Path(row["path"]).name for row in written["broken"]] == ["b.png"] and written["broken"][0]["error"]
    assert [row["class"] for row in written["classes"]] == HOSTILE
    rows = pq.read_table(report / "images.parquet")
    assert {Path(path).stem for path in rows["path"].to_pylist()} == {*stems} - {"b"}
    page = (report / "report.html").read_text()
    tags = Tags(page)
    assert tags.tags.count("script") == 1 and not tags.handlers  # the page's own
    assert "b.png" in page and "&lt;script&gt;alert(1)" in page and HOSTILE[2] not in page


def test_images_without_any_object(tmp_path, capfd):
    rng = np.random.default_rng(3)
    data = write_objects(tmp_path / "data", [object_row(scene(rng)[0], []) for _ in range(3)])
    model = saved_model(tmp_path / "model", DETECTION, NAMES)
    results = evaluate(capfd, model, "--dataset_name", data, "--report", tmp_path / "report", "--no_check_annotations")
    assert results["eval_map"] is None and results["eval_samples"] == 3
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["errors"]["objects"] == 0 and report["f1"] in (0, None)
    f1 = pq.read_table(tmp_path / "report/images.parquet")["f1"].to_pylist()
    assert len(f1) == 3 and set(f1) <= {0, None}
    assert "there is nothing to measure" in (tmp_path / "report/report.html").read_text()


def test_what_does_not_belong_together_is_told_in_one_line(shapes, tmp_path, capfd):
    segmenter = saved_model(tmp_path / "segmenter", SEGMENTATION, GROUND)
    detector = saved_model(tmp_path / "detector", DETECTION, NAMES)
    others = saved_model(tmp_path / "others", DETECTION, ["cat", "dog"])
    classifier = saved_model(tmp_path / "classifier", CLASSIFICATION, NAMES)
    maps, objects = shapes / "segmentation", shapes / "detection"
    cases = [
        ([segmenter, "--dataset_name", objects], "semantic segmenter .* has no column of annotation maps"),
        ([detector, "--dataset_name", maps], "object detector .* has no column of objects with boxes"),
        ([others, "--dataset_name", objects], "has the class 'square' .* does not know: cat, dog"),
        ([segmenter, "--dataset_name", maps, "--split", "nowhere"], "no split 'nowhere'"),
        (
            [classifier, "--dataset_name", maps, "--bbox_format", "xyxy"],
            "--bbox_format is for segmenters and detectors",
        ),
        ([segmenter, "--validation_dir", maps], "--validation_dir is for classifiers"),
        ([segmenter, "--dataset_name", maps, "--slice_by", "x", "--report", "r"], "--slice_by is for classifiers"),
    ]
    for words, expected in cases:
        message = evaluate(capfd, *words, status=2)
        (line,) = (line for line in message.splitlines() if line.startswith("error: "))
        assert re.search(expected, line), line


def test_a_report_is_replaced_only_when_told_to(tmp_path, capfd):
    data = write_maps(tmp_path / "data", [scene(np.random.default_rng(4)) for _ in range(2)])
    model = saved_model(tmp_path / "model", SEGMENTATION, GROUND)
    words = [model, "--dataset_name", data, "--report", tmp_path / "report"]
    evaluate(capfd, *words)
    (tmp_path / "report/mine.txt").write_text("notes")
    assert "--overwrite" in evaluate(capfd, *words, status=2)
    evaluate(capfd, *words, "--overwrite")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "mine.txt",
        "report.html",
        "report.json",
        "images.parquet",
    }


@pytest.mark.slow
@pytest.mark.parametrize("task", [SEGMENTATION, INSTANCES])
def test_two_processes_report_what_one_does(shapes, tmp_path, capfd, task):
    data = shapes / ("segmentation" if task == SEGMENTATION else "detection")
    model = saved_model(tmp_path / "model", task, GROUND if task == SEGMENTATION else NAMES)
    words = ["evaluate", str(model), "--dataset_name", str(data), "--num_workers", "0", "--split", "train"]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--cpu"]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "hf_poolformer"]
    done = subprocess.run([*launch, *words, "--report", str(tmp_path / "two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report: ") == 1
    assert hf_poolformer_cli.main([*words, "--report", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    for report in (one, two):
        for name in ("eval_runtime", "eval_samples_per_second"):
            del report["results"][name]
    assert one == two
    assert pq.read_table(tmp_path / "one/images.parquet").equals(pq.read_table(tmp_path / "two/images.parquet"))
    assert (tmp_path / "one/report.html").read_text() == (tmp_path / "two/report.html").read_text()
