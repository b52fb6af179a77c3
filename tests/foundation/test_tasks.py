"""A fifth task, added as a row with mathematics of its own: whoever asks the table takes it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from hf_poolformer import PoolFormerConfig, PoolFormerForSemanticSegmentation
from hf_poolformer.data.dense.datasets import Truth
from hf_poolformer.evaluation.dense import MapJudge, evaluate
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.tasks import (
    ENCODER,
    FEATURE_DISTILLATION,
    TASKS,
    Figure,
    dense_tasks,
    task_named,
    task_of_config,
    tasks_of_pipeline,
)
from hf_poolformer.hub.cards import folder_card
from hf_poolformer.settings.command_line import parse
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training.reports import summary, write_curves
from hf_poolformer.training.task import training_of


class MisfitJudge(MapJudge):
    """The share of pixels that are of another class."""

    def __init__(self, num_labels):
        super().__init__(num_labels)
        self.wrong = self.all = 0

    def add(self, truth, found):
        self.wrong += int((found != truth.map).sum())
        self.all += truth.map.size

    def state(self):
        return self.wrong, self.all

    @staticmethod
    def compute(states):
        wrong, count = (sum(part) for part in zip(*states, strict=True))
        return {"eval_fit": 1 - wrong / count, "eval_per_class_fit": [1.0, 0.0]}


@pytest.fixture
def toy(monkeypatch):
    row = replace(
        TASKS["semantic-segmentation"],
        name="tile-segmentation",
        title="Tile segmentation",
        noun="tile segmenter",
        auto_class="AutoModelForTileSegmentation",
        figures=(Figure("eval_fit", "fit", "Share of fitting tiles", "fit"),),
        kept_by=("eval_fit",),
        per_class=(Figure("eval_per_class_fit", "fit", "fit"),),
        evaluation=f"{__name__}:{MisfitJudge.__name__}",
        limits=("It sees tiles everywhere.",),
    )
    monkeypatch.setitem(TASKS, row.name, row)
    return row


def test_rows_are_found_by_name_by_configuration_and_by_pipeline():
    for name, task in TASKS.items():
        assert task_named(name) is task
        facts = {"problem_type": task.problem_type}
        # How an encoder was learned, its configuration does not tell.
        learned = None if name == FEATURE_DISTILLATION else task
        assert task_of_config({"architectures": [f"PoolFormer{task.head}"], **facts}) is learned
        assert task_of_config(PoolFormerConfig(architectures=[f"MetaFormer{task.head}"], **facts)) is learned
        assert task in tasks_of_pipeline(task.pipeline_tag)
    assert task_of_config({}) is task_of_config({"architectures": ["PoolFormerModel"]}) is None
    assert task_of_config(PoolFormerConfig()) is None
    assert task_of_config({"architectures": ["PoolFormerModel"]}, headless=True) is ENCODER
    with pytest.raises(UserError, match="Did you mean object-detection"):
        task_named("object_detecton")
    with pytest.raises(UserError, match="There are image-classification"):
        task_named("poetry")


def test_settings_take_it(toy, tmp_path, capsys):
    assert toy.name in dense_tasks()
    flags = [
        "--task",
        toy.name,
        "--dataset_name",
        "x",
        "--output_dir",
        str(tmp_path),
        "--config_name",
        "poolformer_s12",
    ]
    settings = parse([*flags, "--metric_for_best_model", "eval_fit", "--reduce_labels", "true"])
    assert settings == TrainingSettings.from_recipe(
        task=toy.name,
        dataset_name="x",
        output_dir=str(tmp_path),
        config_name="poolformer_s12",
        metric_for_best_model="eval_fit",
        reduce_labels=True,
    )
    with pytest.raises(UserError, match="an evaluation gives eval_fit"):
        parse([*flags, "--metric_for_best_model", "eval_miou"])
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert toy.name in capsys.readouterr().out


def test_it_is_evaluated_and_summed_up(toy, tmp_path):
    model = PoolFormerForSemanticSegmentation(
        PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 8, 8, 8), num_labels=2, fpn_feature_size=8)
    )
    truth = Truth(b"one", (40, 48), map=np.zeros((40, 48), np.int64))
    batch = {"pixel_values": [torch.rand(3, 64, 64)], "labels": [truth], "skipped": []}
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), is_main_process=True, autocast=torch.no_grad, unwrap_model=lambda model: model
    )
    results, _ = evaluate(
        model, [batch], task=toy.name, processor=toy.new_processor(), accelerator=accelerator, num_labels=2
    )
    assert 0 <= results["eval_fit"] <= 1 and results["eval_samples"] == 1
    figures = dict.fromkeys(("train_runtime", "train_samples_per_second", "train_data_wait_share"), 0.5)
    settings = TrainingSettings.from_recipe(
        task=toy.name, dataset_name="x", output_dir=str(tmp_path), config_name="poolformer_s12"
    )
    told = training_of(settings).describe(results)
    text = summary(tmp_path, {**results, **figures, "step": 1, "skipped_images": 0}, settings, told)
    assert f"Result: fit {results['eval_fit']:.3f}, 1 images" in text and 'pipeline("image-segmentation"' in text
    write_curves(tmp_path / "curves.png", [{"step": 1, "loss": 1.0}, {"step": 1, "eval_fit": 0.5}], toy.name)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_its_card(toy, tmp_path):
    config = {"model_type": "poolformer", "architectures": [f"PoolFormer{toy.head}"], "id2label": {"0": "a", "1": "b"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "training_settings.yaml").write_text("config_name: poolformer_s12\ntrain_dir: /data/tiles\n")
    results = {"eval_fit": 0.75, "eval_samples": 4, "eval_per_class_fit": {"a": 1.0, "b": 0.5}}
    (tmp_path / "all_results.json").write_text(json.dumps(results))
    text = folder_card(tmp_path, repo_id="me/tiles")
    data = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert data["pipeline_tag"] == "image-segmentation" and data["metrics"] == ["fit"]
    ((result,), (metric,)) = (data["model-index"][0]["results"], data["model-index"][0]["results"][0]["metrics"])
    assert result["task"] == {"type": "image-segmentation", "name": "Tile segmentation"}
    assert (metric["name"], metric["value"]) == ("Share of fitting tiles", 0.75)
    assert "tile segmenter with 2 classes" in text and "| Share of fitting tiles | 75.00 % |" in text
    assert "| class | fit |" in text and "| b | 50.00 % |" in text
    assert "It sees tiles everywhere." in text
