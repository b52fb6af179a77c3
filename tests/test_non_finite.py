"""Scores and weights that are NaN or infinite are errors, whoever meets them; and JSON is what every reader takes."""

import ast
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

import hf_poolformer
import hf_poolformer_cli
from hf_poolformer import (
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerForSemanticSegmentation,
    PoolFormerImageProcessor,
)
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.files import write_json
from hf_poolformer.foundation.finite import all_finite, check_finite, check_weights
from hf_poolformer.foundation.strict_json import to_json
from hf_poolformer.prediction.inference import Predictor
from hf_poolformer.prediction.pixels import decode
from hf_poolformer.prediction.run import predict
from hf_poolformer.training.reports import RunLog


SMALL = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 8, 16, 16), "layer_scale_init_value": 0.1}
SIZE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "crop_pct": 1.0}
CLASSES = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
NAN, INF = float("nan"), float("inf")


def strict(text: str):
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """`dark` and `light`, six images each."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 180)):
        (root / name).mkdir()
        for index in range(6):
            values = level + random.integers(-40, 40, (32, 32, 3))
            Image.fromarray(values.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    torch.manual_seed(0)
    PoolFormerForImageClassification(PoolFormerConfig(**SMALL, **CLASSES)).save_pretrained(folder)
    PoolFormerImageProcessor(**SIZE).save_pretrained(folder)
    return folder


@pytest.fixture
def change(model, tmp_path):
    """A copy of the model, one number of one weight being `value`."""

    def run(key: str, value: float, everywhere: bool = False) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(model, folder)
        weights = load_file(folder / "model.safetensors")
        weights[key].flatten()[: None if everywhere else 1] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return run


def command(capfd, *words) -> str:
    """What a command that is refused says."""
    capfd.readouterr()
    assert hf_poolformer_cli.main([*map(str, words)]) == 2
    output, errors = capfd.readouterr()
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in errors and "nan" not in output.lower()
    return line


BROKEN = [("classifier.weight", NAN), ("norm.weight", INF), ("poolformer.encoder.block.2.0.output.conv1.bias", -INF)]


@pytest.mark.parametrize(("key", "value"), BROKEN, ids=[key for key, _ in BROKEN])
def test_every_command_refuses_broken_weights(key, value, change, photos, tmp_path, capfd):
    broken = change(key, value)
    image, out = photos / "dark" / "0.png", tmp_path / "out"
    for words in (
        ["predict", broken, image, "--output", f"{out}.jsonl"],
        ["predict", broken, photos, "--output", out],
        ["predict", broken, image, "--output", f"{out}.parquet", "--embeddings"],
        ["evaluate", broken, "--dataset_name", photos],
        ["explain", broken, image, "--output", f"{out}.png"],
        ["export", broken, out],
        ["train", "--recipe", "demo", "--model_name_or_path", broken, "--train_dir", photos, "--output_dir", out],
        ["app", broken],
        ["publish", broken, "--repo_id", "user/name", "--dry_run"],
        ["publish", broken, "--repo_id", "user/name", "--dry_run", "--json"],
    ):
        line = command(capfd, *words)
        if words[0] in ("export", "app") and f"hf-poolformer[{words[0]}]" in line:
            continue  # a missing library is said first
        assert "NaN or infinity" in line and key in line and "earlier checkpoint" in line, words
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("out.")]


def test_sharded_weights_are_looked_at_before_publishing(change, tmp_path, capfd):
    broken = change("norm.bias", NAN)
    model = PoolFormerForImageClassification.from_pretrained(broken)
    model.save_pretrained(broken, max_shard_size="5KB")
    (broken / "model.safetensors").unlink(missing_ok=True)
    assert len(list(broken.glob("*.safetensors"))) > 1
    assert "norm.bias" in command(capfd, "publish", broken, "--repo_id", "user/name", "--dry_run")


def test_whole_weights_pass(model, capfd):
    assert hf_poolformer_cli.main(["publish", str(model), "--repo_id", "user/name", "--dry_run"]) == 0


@pytest.fixture
def overflowing(change):
    """Every weight is a number, every score is not."""
    return change("classifier.weight", 3e38, everywhere=True)


def test_every_command_refuses_scores_that_overflow(overflowing, photos, tmp_path, capfd):
    image, out = photos / "dark" / "0.png", tmp_path / "out"
    for words, whose in (
        (["predict", overflowing, image, "--output", f"{out}.jsonl"], overflowing.name),
        (["predict", overflowing, photos, "--output", f"{out}.csv"], overflowing.name),
        (["explain", overflowing, image, "--output", f"{out}.png"], overflowing.name),
        (["explain", overflowing, image, "--output", f"{out}.png", "--classes", "dark"], overflowing.name),
        (["evaluate", overflowing, "--dataset_name", photos, "--num_workers", "0"], "12 of 12 images"),
        (["evaluate", overflowing, "--dataset_name", photos, "--output_dir", out], "12 of 12 images"),
    ):
        line = command(capfd, *words)
        assert f"{whose} gives no" in line or f"for {whose}" in line, words
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".jsonl", ".csv") or path.name == "out.png"]
    assert not (out / "all_results.json").exists()


def test_half_precision_is_named_where_it_overflows(change, photos, tmp_path, capfd):
    large = change("classifier.weight", 1e6, everywhere=True)
    image = photos / "dark" / "0.png"
    assert hf_poolformer_cli.main(["predict", str(large), str(image), "--output", str(tmp_path / "a.jsonl")]) == 0
    words = ["predict", large, image, "--output", tmp_path / "b.jsonl", "--dtype", "float16"]
    assert "bfloat16 or float32" in command(capfd, *words)


def test_pipelines_and_the_app_refuse_such_scores(overflowing, photos):
    from hf_poolformer.app.answers import answer

    image = Image.open(photos / "light" / "1.png")
    with pytest.raises(ValueError, match="no finite scores"):
        pipeline("image-classification", model=str(overflowing))(image)
    with pytest.raises(UserError, match="no finite scores"):
        answer(Predictor(str(overflowing), device="cpu"), image)


def test_the_app_refuses_broken_dense_models(tmp_path, photos):
    from hf_poolformer.app.answers import answer
    from hf_poolformer.app.models import Models

    torch.manual_seed(0)
    config = PoolFormerConfig(**SMALL, **CLASSES, fpn_feature_size=16, decoder_hidden_size=8)
    segmenter = PoolFormerForSemanticSegmentation(config)
    PoolFormerImageProcessor.for_segmentation().save_pretrained(tmp_path / "whole")
    segmenter.save_pretrained(tmp_path / "whole")
    shown = Models([str(tmp_path / "whole")], device="cpu").get(None)
    with torch.no_grad():
        next(reversed(list(shown.model.parameters()))).fill_(NAN)
    with pytest.raises(UserError, match="no finite scores"):
        answer(shown, Image.open(photos / "light" / "1.png"))
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shown.model.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="NaN or infinity in its weights"):
        Models([str(tmp_path / "broken")], device="cpu")


# Some images only ---------------------------------------------------------------------------------------------------


def spoil_light_images(model: torch.nn.Module, value: float) -> None:
    """Of images above middle grey the model makes `value`."""

    def hook(module, arguments, keywords, outputs):
        light = keywords["pixel_values"].mean((1, 2, 3)) > 0.2
        outputs.logits[light, 0] = value
        return outputs

    model.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    ("value", "batch_size", "suffix"),
    [(NAN, 1, "jsonl"), (INF, 5, "jsonl"), (-INF, 32, "jsonl"), (NAN, 5, "csv"), (INF, 1, "parquet"), (NAN, 5, None)],
)
def test_one_bad_answer_does_not_cost_the_others(value, batch_size, suffix, model, photos, tmp_path, monkeypatch):
    begin = Predictor.__init__

    def spoilt(self, *arguments, **options):
        begin(self, *arguments, **options)
        spoil_light_images(self.model, value)

    whole = tmp_path / "whole.jsonl"
    predict(model, [photos], whole, progress=False, device="cpu", num_workers=0)
    monkeypatch.setattr(Predictor, "__init__", spoilt)
    output = tmp_path / ("out" if suffix is None else f"out.{suffix}")
    summary = predict(
        model, [photos], output, batch_size=batch_size, progress=False, device="cpu", num_workers=0, part_size=5
    )
    assert (summary.predicted, summary.broken) == (6, 6)
    assert "no finite scores" in summary.examples[0] and "light" in summary.examples[0]
    if suffix == "jsonl":
        rows = [strict(line) for line in output.read_text().splitlines()]
        before = [strict(line) for line in whole.read_text().splitlines()]
        for row, good in zip(rows, before, strict=True):
            if "light" in row["path"]:
                assert row["label"] is None and row["scores"] is None and "no finite scores" in row["error"]
            else:
                assert row["label"] == good["label"] and row["score"] == pytest.approx(good["score"], rel=1e-5)


def test_embeddings_that_are_not_finite(model, photos):
    predictor = Predictor(str(model), embeddings=True, device="cpu")
    batch = decode([(name, photos / name / "0.png") for name in ("dark", "light")], predictor.processor)
    assert [row["error"] for row in predictor.rows(batch)] == [None, None]

    def spoil(module, inputs):
        inputs[0][1] = INF

    predictor._head.register_forward_pre_hook(spoil)
    rows = predictor.rows(batch)
    assert rows[0]["error"] is None and len(rows[0]["embedding"]) == 16
    assert rows[1]["embedding"] is None and "no finite" in rows[1]["error"]


def test_an_evaluation_counts_them(model, photos):
    from accelerate import Accelerator

    from hf_poolformer.evaluation.classification import evaluate

    classifier = PoolFormerForImageClassification.from_pretrained(model)
    images = torch.cat([torch.full((7, 3, 32, 32), -1.0), torch.full((2, 3, 32, 32), 1.0)])
    batches = [
        {"pixel_values": part, "labels": torch.zeros(len(part), dtype=torch.int64), "skipped": []}
        for part in images.split(4)
    ]
    assert evaluate(classifier, batches, accelerator=Accelerator(), num_labels=2)["eval_samples"] == 9
    spoil_light_images(classifier, NAN)
    classifier.train()
    with pytest.raises(UserError, match=r"no finite scores .* for 2 of 9 images"):
        evaluate(classifier, batches, accelerator=Accelerator(), num_labels=2)
    assert classifier.training


@pytest.mark.parametrize("task", ["semantic-segmentation", "object-detection"])
def test_dense_evaluations_refuse_such_models(task):
    from accelerate import Accelerator

    from hf_poolformer.data.dense.datasets import Truth
    from hf_poolformer.evaluation.dense import evaluate

    options = {"fpn_feature_size": 16, "decoder_hidden_size": 8, "max_detections": 3}
    segments = task == "semantic-segmentation"
    kind = PoolFormerForSemanticSegmentation if segments else hf_poolformer.PoolFormerForObjectDetection
    model = kind(PoolFormerConfig(**SMALL, **CLASSES, **options))
    processor = getattr(PoolFormerImageProcessor, "for_segmentation" if segments else "for_detection")()
    settings = {"task": task, "processor": processor, "accelerator": Accelerator(), "num_labels": 2}
    if segments:  # finite weights, and scores that are not

        def spoil(module, inputs, outputs):
            outputs.logits[:] = NAN

        model.register_forward_hook(spoil)
        truth = Truth(key=0, size=(64, 64), map=np.zeros((64, 64), dtype=np.int64), objects=None)
        batch = {"pixel_values": [torch.zeros(3, 64, 64)], "labels": [truth], "skipped": []}
        with pytest.raises(UserError, match=r"no finite scores .* for 1 of 1 images"):
            evaluate(model, [batch], **settings)
    with torch.no_grad():
        next(model.parameters())[0] = NAN
    with pytest.raises(UserError, match="NaN or infinity in its weights"):
        evaluate(model, [], **settings)


# The functions -------------------------------------------------------------------------------------------------------


def test_what_is_finite():
    check_finite(torch.zeros(3, 2), "x")
    check_finite(torch.full((3, 2), torch.finfo(torch.float32).min), "x")
    for value in (NAN, INF, -INF):
        outputs = torch.zeros(3, 2, 4)
        outputs[1, 0, 3] = value
        with pytest.raises(UserError, match=r"x gives no finite scores .* for 1 of 3 images"):
            check_finite(outputs, "x")
    assert all_finite(torch.tensor([1, 2])) and all_finite(torch.empty(2, device="meta"))
    assert not all_finite(torch.tensor([1.0, NAN], dtype=torch.bfloat16))
    assert not all_finite(torch.tensor([1.0, NAN]).to(torch.float8_e4m3fn))
    layer = torch.nn.BatchNorm2d(3)
    check_weights(layer, "x")
    layer.running_var[1] = INF  # a buffer is as good as a weight
    with pytest.raises(UserError, match="x is damaged: NaN or infinity in its weights running_var"):
        check_weights(layer, "x")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (NAN, None),
        ({"a": [1.5, -INF, {"b": (NAN, 2)}]}, {"a": [1.5, None, {"b": [None, 2]}]}),
        (np.float64(INF), None),
        ({3: "ü", "x": True, "n": None}, {"3": "ü", "x": True, "n": None}),
        (math.pi, math.pi),
    ],
)
def test_json_is_strict(value, written):
    assert strict(to_json(value)) == written == strict(to_json(value, indent=2, ensure_ascii=False))


def test_results_and_logs_are_strict_json(tmp_path):
    write_json(tmp_path / "all_results.json", {"eval_loss": INF, "eval_mean_iou": NAN, "step": 3})
    assert strict((tmp_path / "all_results.json").read_text()) == {"eval_loss": None, "eval_mean_iou": None, "step": 3}
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 0.5}\n')  # as an earlier version wrote it
    log = RunLog(path, resume_step=1)
    log.add({"step": 3, "loss": -INF})
    assert [strict(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": None},
        {"step": 3, "loss": None},
    ]


# What is no file: keys of hashes and of a process's own messages, words within a sentence, settings that are checked.
ELSEWHERE = {
    "strict_json.py",
    "classification.py",
    "contents.py",
    "loader.py",
    "training.py",
    "settings.py",
    "initialisation.py",
    "architecture.py",
    "inference.py",
}


def test_json_is_written_in_one_place():
    root = Path(hf_poolformer.__file__).parent
    calls = {
        path.name
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and ast.unparse(node.value) == "json"
    }
    assert calls == ELSEWHERE
