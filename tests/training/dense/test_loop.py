import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shapes import COUNTS, NAMES, TINY_MODEL
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.evaluation import dense as evaluation
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.processes import Stopped
from hf_poolformer.foundation.tasks import dense_tasks
from hf_poolformer.settings.command_line import parse
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training import loop
from hf_poolformer.training.dense import task as dense_task
from hf_poolformer.training.optimisation import make_schedule


TASKS = ["semantic-segmentation", "object-detection", "instance-segmentation"]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_everything_and_the_pipeline_reads_it(make_settings, tmp_path, task, capsys):
    main = {"semantic-segmentation": "eval_miou", "object-detection": "eval_map"}.get(task, "eval_mask_map")
    settings = make_settings(task, num_train_epochs=2, eval_epochs=1, metric_for_best_model=main)
    results = loop.train(settings)
    run = tmp_path / "run"
    assert results["step"] == 12 and results["epoch"] == 2 and results["eval_samples"] == COUNTS["validation"]
    assert json.loads((run / "all_results.json").read_text()) == results
    assert 0 <= results[main] <= 1
    per_class = results[f"{main[:4]}_per_class_iou" if "iou" in main else main.replace("map", "per_class_map")]
    assert set(per_class) == set(NAMES) | ({"ground"} if "iou" in main else set())
    for name in ("config.json", "preprocessor_config.json", "README.md", "training_settings.yaml"):
        assert (run / name).is_file(), name
    for name in ("curves.png", "predictions.png"):
        assert (run / name).read_bytes()[:4] == b"\x89PNG", name
    assert str(run) in capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if main in row] == [1, 2]
    assert results["best_value"] == max(row[main] for row in rows if main in row)
    assert len([row for row in rows if "loss" in row]) == 6

    card = (run / "README.md").read_text()
    tag = "object-detection" if task == "object-detection" else "image-segmentation"
    assert f"pipeline_tag: {tag}" in card and "predictions.png" in card and "| square |" in card
    name = "object-detection" if task == "object-detection" else "image-segmentation"
    predict = pipeline(name, str(run), device="cpu")
    found = predict(Image.new("RGB", (70, 60), (90, 20, 20)), threshold=0.0)
    assert isinstance(found, list)


@pytest.mark.parametrize(
    "task", [TASKS[0], pytest.param(TASKS[1], marks=pytest.mark.slow), pytest.param(TASKS[2], marks=pytest.mark.slow)]
)
def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(make_settings, tmp_path, task):
    changes = {"ema_decay": 0.9} if task == "semantic-segmentation" else {"gradient_accumulation_steps": 2}
    settings = make_settings(task, output_dir=str(tmp_path / "whole"), num_train_epochs=2, **changes)
    settings = dataclasses.replace(settings, checkpointing_steps="2", save_total_limit=0)
    loop.train(settings)
    parts = dataclasses.replace(settings, output_dir=str(tmp_path / "parts"))
    loop.train(parts)
    for path in (tmp_path / "parts").iterdir():
        if path.is_file() and path.name not in ("training_settings.yaml", "training_log.jsonl"):
            path.unlink()
    steps = sorted((tmp_path / "parts/checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    for path in steps[1:]:  # back to step 2, in the first epoch
        path.rename(tmp_path / path.name)
    loop.train(dataclasses.replace(parts, resume_from_checkpoint="latest"))
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == again.keys()
    for name in whole:
        assert torch.equal(whole[name], again[name]), name


def test_a_signal_saves_and_leaves(make_settings, monkeypatch, capsys):
    step = loop.optimiser_step
    count = iter(range(100))

    def interrupted(run, window):
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, window)

    monkeypatch.setattr(loop, "optimiser_step", interrupted)
    with pytest.raises(Stopped):
        loop.train(make_settings("object-detection"))
    assert "To go on:" in capsys.readouterr().out


@pytest.mark.parametrize("eval_epochs", [0, 1])
@pytest.mark.parametrize("task", TASKS[:2])
def test_a_failing_evaluation_leaves_the_model(make_settings, tmp_path, monkeypatch, task, eval_epochs):
    def fails(*_args, **_keywords):
        raise UserError("the metric has no answer.")

    monkeypatch.setattr(evaluation, "predict", fails)
    settings = make_settings(task, num_train_epochs=2, eval_epochs=eval_epochs, checkpointing_steps="no")
    with pytest.raises(UserError, match=r"has no answer\. The model as it was trained so far is in .*run$"):
        loop.train(settings)
    run = tmp_path / "run"
    assert weights(run) and (run / "preprocessor_config.json").is_file() and (run / "config.json").is_file()
    assert not (run / "all_results.json").exists()


def test_images_that_break_after_the_first_look_are_judged(make_settings, late_damage, tmp_path, monkeypatch):
    """However small the split is."""
    monkeypatch.setattr(dense_task, "check_annotations", lambda datasets, *_: (datasets, []))
    with pytest.raises(UserError, match=r"2 of the 11 images .* are broken, more than --max_skipped .* so far is in"):
        loop.train(make_settings("semantic-segmentation", dataset_name=str(late_damage), max_skipped=0.1))
    assert weights(tmp_path / "run")


def test_a_classifier_gives_its_backbone_and_its_colours(make_settings, tmp_path, caplog):
    body = {name: value for name, value in TINY_MODEL.items() if name in ("depths", "hidden_sizes")}
    classifier = PoolFormerForImageClassification(PoolFormerConfig(**body, num_labels=5))
    classifier.save_pretrained(tmp_path / "base")
    PoolFormerImageProcessor(image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "base")
    settings = make_settings(
        "object-detection",
        config_name=None,
        model_name_or_path=str(tmp_path / "base"),
        learning_rate=0.0,
        warmup_learning_rate=0.0,
        max_train_steps=1,
    )
    loop.train(settings)
    assert "bbox_head, neck starts afresh" in caplog.text
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "run")
    assert model.config.fpn_feature_size == 16 and list(model.config.id2label.values()) == NAMES
    for name, tensor in classifier.state_dict().items():
        if name.startswith("poolformer.encoder"):
            assert torch.equal(model.state_dict()[name], tensor), name
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert list(processor.image_mean) == [0.4, 0.5, 0.6] and dict(processor.size)["longest_edge"] == 72

    other = json.dumps({**TINY_MODEL, "hidden_sizes": [8, 8, 16, 16]})
    with pytest.raises(UserError, match="another backbone"):
        changes = {"config_overrides": other, "output_dir": str(tmp_path / "other")}
        loop.train(dataclasses.replace(settings, **changes))
    with pytest.raises(UserError, match="is not a model"):
        changes = {"model_name_or_path": str(tmp_path), "output_dir": str(tmp_path / "other")}
        loop.train(dataclasses.replace(settings, **changes))


def test_the_course_of_the_learning_rate():
    def course(steps, epochs, **changes):
        settings = TrainingSettings.from_recipe(
            task=changes.pop("task"), dataset_name="x", output_dir="y", **{"num_warmup_steps": 10, **changes}
        )
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
        schedule = make_schedule(optimizer, settings, settings.learning_rate, steps, epochs)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return np.array(rates)

    rates = course(120, 12, task="object-detection")
    assert rates[0] == pytest.approx(1e-7) and rates[5] == pytest.approx((1e-4 + 1e-7) / 2)
    assert rates[10] == rates[79] == pytest.approx(1e-4)
    assert rates[80] == rates[109] == pytest.approx(1e-5) and rates[110] == rates[119] == pytest.approx(1e-6)
    rates = course(100, 1, task="semantic-segmentation", num_warmup_steps=0)
    np.testing.assert_allclose(rates, 2e-4 * (1 - np.arange(100) / 100) ** 0.9, rtol=1e-9)
    rates = course(100, 1, task="object-detection", lr_scheduler_type="cosine", num_warmup_steps=0)
    np.testing.assert_allclose(rates, 1e-4 * (1 + np.cos(np.pi * np.arange(100) / 100)) / 2, rtol=1e-9)


def test_recipes_are_the_paper_s():
    """DESIGN 5, and the official configurations."""
    paper = {task: TrainingSettings.from_recipe(task=task, dataset_name="x", output_dir="y") for task in TASKS}
    for settings in paper.values():
        assert settings.weight_decay == 1e-4 and settings.model_name_or_path == "sail/poolformer_s12"
        assert settings.horizontal_flip == 0.5 and settings.max_grad_norm == 0 and settings.layer_decay == 1
    segmentation = paper["semantic-segmentation"]
    assert (segmentation.learning_rate, segmentation.max_train_steps) == (2e-4, 40_000)
    assert (segmentation.lr_scheduler_type, segmentation.lr_power) == ("poly", 0.9)
    assert (segmentation.per_device_train_batch_size, segmentation.crop_size) == (32, 512)
    assert (segmentation.scale_min, segmentation.scale_max) == (0.5, 2.0)
    for task, rate in (("object-detection", 1e-4), ("instance-segmentation", 2e-4)):
        settings = paper[task]
        assert (settings.learning_rate, settings.num_train_epochs, settings.num_warmup_steps) == (rate, 12, 500)
        assert (settings.image_size, settings.longest_edge, settings.per_device_train_batch_size) == (800, 1333, 16)
        assert settings.lr_scheduler_type == "step" and settings.step_epochs() == [8, 11]
        assert settings.crop_size is None and settings.scale_min == settings.scale_max == 1


GIVEN = ["--task", TASKS[1], "--dataset_name", "x", "--output_dir", "y"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--task semantic-segmentation, object-detection or instance-segmentation"),
        (["--task", "panoptic"], "unknown task: panoptic"),
        (["--task", TASKS[0], "--recipe", "papre"], "did you mean paper"),
        (["--task", TASKS[0], "--output_dir", "x"], "--dataset_name"),
        (["--task", TASKS[0], "--dataset_name", "x"], "--output_dir"),
        ([*GIVEN, "--crop_size", "5"], "between 32 and"),
        (
            ["--task", TASKS[1], "--dataset_name", "x", "--output_dir", "y", "--scale_min", "3"],
            "larger than --scale_max",
        ),
        (
            ["--task", TASKS[1], "--dataset_name", "x", "--output_dir", "y", "--lr_steps", "8;11"],
            "separated by commas",
        ),
        ([*GIVEN, "--reduce_labels"], "annotation maps"),
        (
            ["--task", TASKS[1], "--dataset_name", "x", "--output_dir", "y", "--crop_sise", "64"],
            "did you mean --crop_size",
        ),
        ([*GIVEN, "--longest_edge", "64"], "smaller than"),
    ],
)
def test_mistakes_in_flags(flags, message):
    with pytest.raises(UserError, match=message):
        parse(flags, tasks=dense_tasks())


@pytest.mark.parametrize("task", TASKS)
def test_train_with_a_task_is_train_dense(task):
    flags = ["--task", task, "--dataset_name", "x", "--output_dir", "y", "--crop_size", "64"]
    assert parse(flags) == parse(flags, tasks=dense_tasks())
    with pytest.raises(UserError, match="unknown flag: --train_dir"):
        parse([*flags, "--train_dir", "z"])
    with pytest.raises(UserError, match="unknown task: image-classification"):
        parse(["--task", "image-classification", "--train_dir", "x", "--output_dir", "y"], tasks=dense_tasks())


def test_settings_survive_their_file(make_settings, tmp_path):
    settings = make_settings("instance-segmentation", lr_steps="3,4", hub_token="hf_secret")
    settings.save(tmp_path / "settings.yaml")
    assert "hf_secret" not in (tmp_path / "settings.yaml").read_text()
    again = parse(["--config_file", str(tmp_path / "settings.yaml"), "--learning_rate", "0.5"])
    assert dataclasses.replace(
        again, learning_rate=settings.learning_rate, hub_token="hf_secret"
    ) == dataclasses.replace(settings, config_file=again.config_file)


def test_a_picture_that_cannot_be_drawn_is_missing(make_settings, tmp_path, monkeypatch, caplog):
    def broken(*arguments, **keywords):
        raise ValueError("no such glyph")

    monkeypatch.setattr(dense_task, "write_predictions", broken)
    names = r"ground,a$_1$_2$,x$\foo$"
    loop.train(make_settings("semantic-segmentation", max_train_steps=1, label_names=names))
    assert "drawing the predictions failed, and the run goes on without: no such glyph" in caplog.text
    assert (tmp_path / "run/README.md").is_file() and (tmp_path / "run/curves.png").is_file()
