"""`hf-poolformer compare`: from two models, or two evaluations, to a report."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from evaluation_rows import answers, rows_of, write_rows

import hf_poolformer_cli
from hf_poolformer import PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.evaluation.classification import evaluate_checkpoint
from hf_poolformer.evaluation.settings import parse_evaluation
from hf_poolformer.foundation.tasks import CLASSIFICATION


def compare(capfd, *words, status=0):
    capfd.readouterr()
    assert hf_poolformer_cli.main(["compare", *map(str, words)]) == status
    return capfd.readouterr()


def compare_models(capfd, a, b, things, out, *words, status=0):
    words = ["--dataset_name", things.photos, "--num_workers", 0, "--output", out, "--json", *words]
    return json.loads(compare(capfd, a, b, *words, status=status).out)


@pytest.fixture(scope="module")
def swapped(things, tmp_path_factory):
    """The model of `things` with its two classes in the other order."""
    model = PoolFormerForImageClassification.from_pretrained(things.model)
    with torch.no_grad():
        for parameter in (model.classifier.weight, model.classifier.bias):
            parameter.copy_(parameter.flip(0))
    model.config.id2label, model.config.label2id = {0: "up", 1: "down"}, {"up": 0, "down": 1}
    folder = tmp_path_factory.mktemp("swapped")
    model.save_pretrained(folder)
    PoolFormerImageProcessor.from_pretrained(things.model).save_pretrained(folder)
    return folder


def test_two_models_of_ours(things, swapped, tmp_path, capfd):
    """The same model with its classes in another order: the same answers, and a speed for each."""
    out = tmp_path / "out"
    found = compare_models(capfd, things.model, swapped, things, out, "--speed_seconds", 0, "--batch_size", 5)
    assert not found["speed_note"]
    assert found["images"] == 24 and found["label_names"] == ["down", "up"]
    assert found["agreement"] == 1 and found["p"] == 1 and found["better"] is None
    main = found["figures"]["eval_accuracy"]
    assert (main["difference"], main["interval"]) == (0, [0, 0])
    assert found["table"]["only_a"] == found["table"]["only_b"] == 0 and found["mcnemar"]["exact"]
    for side, name in (("a", things.model), ("b", swapped)):
        facts = found[side]
        assert facts["model"] == str(name) and facts["image_size"] == [32, 32] and facts["batch_size"] == 5
        assert facts["bytes"] == (name / "model.safetensors").stat().st_size and facts["seconds"] > 0
        assert facts["bytes"] == pytest.approx(4 * facts["parameters"], rel=0.5)  # and a header
    assert found["speed_ratio"] == pytest.approx(found["a"]["seconds"] / found["b"]["seconds"])
    assert sorted(path.name for path in out.iterdir()) == ["images.parquet", "report.html", "report.json"]
    assert json.loads((out / "report.json").read_text()) == {key: found[key] for key in found if key != "report"}
    assert found["report"] == str(out / "report.html")
    table = pq.read_table(out / "images.parquet")
    assert table["a_prediction"] == table["b_prediction"] and len(table) == 24
    said = compare(capfd, things.model, swapped, "--dataset_name", things.photos, "--output", out, status=2)
    assert "holds report.html already" in said.err and "--overwrite" in said.err


def test_models_of_timm_and_of_transformers(things, tmp_path, capfd):
    """Each with its own image processor; the one of timm takes images of another size."""
    pytest.importorskip("timm")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    normal = {"input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.95}
    config = {"architecture": "test_vit", "num_classes": 2, "label_names": ["up", "down"], "pretrained_cfg": normal}
    TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(config)).save_pretrained(tmp_path / "timm")
    found = compare_models(
        capfd, things.model, tmp_path / "timm", things, tmp_path / "out", "--speed_seconds", 0, "--batch_size", 4
    )
    assert not found["speed_note"]
    assert found["images"] == 24 and [found[side]["image_size"] for side in "ab"] == [[32, 32], [160, 160]]
    assert found["speed_ratio"] > 0 and "<img" in (tmp_path / "out" / "report.html").read_text()


def test_evaluations_are_read_and_nothing_is_computed_again(things, swapped, tmp_path, capfd):
    folders = [tmp_path / "a", tmp_path / "b"]
    for model, folder in zip((things.model, swapped), folders, strict=True):
        words = ["--dataset_name", things.photos, "--report", folder, "--num_workers", 0]
        evaluate_checkpoint(parse_evaluation([str(model), *map(str, words)]))
    said = compare(capfd, *folders, "--output", tmp_path / "out")
    assert "Both give the same answer to 100.00 % of the images." in said.out
    assert "no model was run" in said.out and f"Report: {tmp_path / 'out' / 'report.html'}" in said.out
    assert "data:image" not in (tmp_path / "out" / "report.html").read_text()
    # With the dataset, its images are shown; and one of both may be a model.
    compare(
        capfd, folders[0], swapped, "--dataset_name", things.photos, "--output", tmp_path / "two", "--num_workers", 0
    )
    assert json.loads((tmp_path / "two" / "report.json").read_text())["agreement"] == 1


def test_broken_images_and_hostile_names(things, tmp_path, capfd):
    """One image that nobody can read is counted, and no name does anything."""
    photos = tmp_path / "photos"
    shutil.copytree(things.photos, photos)
    (photos / "up" / "0.png").write_bytes(b"no image")
    (photos / "up" / "1.png").rename(photos / "up" / "<script>alert(1)</script>\n.png".replace("/", "_"))
    said = compare(
        capfd, things.model, things.model, "--dataset_name", photos, "--output", tmp_path / "o", "--num_workers", 0,
        "--speed", "false",
    )  # fmt: skip
    assert "Left out: 1 image that cannot be read." in said.out and "not measured (--speed)" in said.out
    data = json.loads((tmp_path / "o" / "report.json").read_text())
    assert data["images"] == 23 and data["broken"][0]["path"].endswith("up/0.png")
    assert "<script>alert" not in (tmp_path / "o" / "report.html").read_text()


def test_a_worse_model_can_fail_a_pipeline(tmp_path, capfd):
    labels, good, middling = answers(CLASSIFICATION, 200)
    names = ["cat", "dog", "bird", "fish"]
    better, worse = (
        write_rows(tmp_path / name, rows_of(labels, logits, names, model=name))
        for name, logits in (("good", good), ("middling", middling))
    )
    said = compare(capfd, better, worse, "--output", tmp_path / "1", "--fail_on", "worse", status=4)
    assert "A is better: its top-1 accuracy is" in said.out
    compare(capfd, worse, better, "--output", tmp_path / "2", "--fail_on", "worse")
    compare(capfd, better, worse, "--output", tmp_path / "3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "{missing}", "--dataset_name", "{photos}"], "nowhere"),
        (["{model}", "{text}", "--dataset_name", "{photos}"], "cannot be an image classifier"),
        (["{model}", "{model}"], "give the images by --dataset_name or --validation_dir"),
        (["{model}", "{model}", "--dataset_name", "x", "--validation_dir", "y"], "either --dataset_name or"),
        (["{model}", "--dataset_name", "{photos}"], "required: B"),
        (["{model}", "{model}", "--dataset_name", "{photos}", "--fail_on", "slower"], "invalid choice: 'slower'"),
        (["{model}", "{model}", "--dataset_name", "{photos}", "--output", "{image}"], "is no folder"),
    ],
)
def test_mistakes_are_explained(things, capfd, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    words = [word.format(**vars(things)) for word in words]
    said = compare(capfd, *words, status=2).err.splitlines()[-1]
    assert said.startswith("error: ") and message in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_model_and_its_export_in_8_bits(things, tmp_path, capfd):
    export = tmp_path / "int8"
    words = ["--precision", "int8", "--calibration_dataset", things.photos]
    assert hf_poolformer_cli.main(["export", str(things.model), str(export), *map(str, words)]) == 0
    found = compare_models(capfd, things.model, export, things, tmp_path / "out", "--speed_seconds", 0)
    assert found["b"]["runtime"] == "onnx, int8" and found["b"]["parameters"] is None
    assert found["b"]["bytes"] == (export / "model.onnx").stat().st_size
    assert found["agreement"] > 0.8 and found["speed_ratio"] > 0
