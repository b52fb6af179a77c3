"""Runs with several labels per image, from the first loss to the thresholds in what is saved."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import load_dataset
from digits import TRAITS
from sklearn.metrics import f1_score
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_poolformer.evaluation.thresholds import choose_thresholds
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.tasks import MULTI_LABEL
from hf_poolformer.training import loop
from hf_poolformer.training.loop import train
from hf_poolformer.training.multi_label import MultiLabelTraining, positive_weights


def answers(run, dataset, split="test"):
    """Probabilities and labels of a split, by the saved model and nothing else of this package."""
    rows = load_dataset("parquet", data_files=str(dataset / f"{split}*.parquet"), split="train")
    model, processor = AutoModelForImageClassification.from_pretrained(run), AutoImageProcessor.from_pretrained(run)
    images = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**images).logits.sigmoid().numpy()
    labels = np.array([[index in found for index in range(len(TRAITS))] for found in rows["traits"]])
    return model.config, probabilities, labels


@pytest.mark.parametrize(
    "changes",
    [{"pos_weight": "auto"}, {"loss": "asymmetric", "ema_decay": 0.9, "mixup_alpha": 0.2, "cutmix_alpha": 1.0}],
)
def test_thresholds_are_chosen_at_the_end_and_saved(make_settings_of, digits_of_kinds, tmp_path, capsys, changes):
    results = train(make_settings_of(MULTI_LABEL, num_train_epochs=4, eval_epochs=2, **changes))
    config, probabilities, labels = answers(tmp_path / "run", digits_of_kinds)
    assert config.problem_type == "multi_label_classification"
    assert config.id2label == dict(enumerate(TRAITS))
    # The saved model is what was evaluated, up to kernels and the batches.
    assert config.label_thresholds == pytest.approx(choose_thresholds(probabilities, labels), rel=1e-4)
    assert results["label_thresholds"] == dict(zip(TRAITS, config.label_thresholds, strict=True))
    predicted = probabilities >= config.label_thresholds
    assert results["eval_f1_macro"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=0.01)
    assert results["eval_f1_macro"] > f1_score(labels, probabilities >= 0.5, average="macro") - 0.01
    told = capsys.readouterr().out
    low, high = min(config.label_thresholds), max(config.label_thresholds)
    assert f"thresholds {low:.2f} to {high:.2f}" in told
    assert ("pos_weight  even " in told) == ("pos_weight" in changes)
    # The earlier evaluation, too, says what thresholds of its own make of the model.
    rows = [json.loads(line) for line in (tmp_path / "run/training_log.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "eval_f1_macro" in row]) == 2


def test_one_half_stays_one_half(make_settings_of, tmp_path):
    results = train(make_settings_of(MULTI_LABEL, max_train_steps=2, label_thresholds="0.5"))
    assert "label_thresholds" not in results
    assert "label_thresholds" not in json.loads((tmp_path / "run/config.json").read_text())


def test_without_validation_images_nothing_is_chosen(make_settings_of, tmp_path, digits_of_kinds):
    settings = make_settings_of(
        MULTI_LABEL,
        max_train_steps=2,
        dataset_name=str(digits_of_kinds / "train-00000-of-00003.parquet"),
        train_val_split=0,
    )
    train(settings)
    assert "label_thresholds" not in json.loads((tmp_path / "run/config.json").read_text())


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        ({"pos_weight": "auto", "label_smoothing": 0.2}, None),
        ({"pos_weight": '{"small": 5}', "loss": "asymmetric", "asymmetric_gamma_negative": 2.0}, [1, 5, 1]),
        ({"pos_weight": "3"}, [3, 3, 3]),
        ({"loss": "asymmetric"}, [1, 1, 1]),
    ],
)
def test_a_loss_is_the_formula(make_settings_of, digits_of_kinds, monkeypatch, changes, weights):
    if weights is None:
        rows = load_dataset("parquet", data_files=str(digits_of_kinds / "train*.parquet"), split="train")["traits"]
        counts = np.array([sum(index in found for found in rows) for index in range(3)])
        weights = (len(rows) - counts) / counts
    step, seen = loop.optimiser_step, []

    def checked(run, window):
        model = copy.deepcopy(run.state.model).double()
        logits = np.concatenate([model(batch["pixel_values"].double()).logits.detach() for batch in window])
        labels = torch.cat([batch["labels"] for batch in window]).double().numpy()
        smoothing = changes.get("label_smoothing", 0)
        y, p, w = labels * (1 - smoothing) + smoothing / 2, sigmoid(logits), np.array(weights)
        if changes.get("loss") == "asymmetric":
            q = np.maximum(p - 0.05, 0)
            g = changes.get("asymmetric_gamma_negative", 4.0)
            expected = -(w * y * (1 - p) * np.log(p) + (1 - y) * q**g * np.log(1 - q)).mean()
        else:
            expected = -(w * y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
        loss = step(run, window)
        assert loss.item() == pytest.approx(expected, rel=1e-4)  # float32, through the whole model
        seen.append(loss)
        return loss

    monkeypatch.setattr(loop, "optimiser_step", checked)
    train(make_settings_of(MULTI_LABEL, max_train_steps=2, **changes))
    assert len(seen) == 2


def test_weights_are_kept_within_bounds():
    assert positive_weights([1, 50, 100, 0, 90], 100) == [20.0, 1.0, 1 / 20, 1.0, pytest.approx(1 / 9)]


def test_a_weight_of_a_class_that_is_not_there(make_settings_of):
    with pytest.raises(UserError, match=r"unknown class in --pos_weight: smal; did you mean small\?"):
        train(make_settings_of(MULTI_LABEL, pos_weight='{"smal": 2}'))


def test_labels_of_another_kind_are_refused(make_settings_of):
    task = MultiLabelTraining(make_settings_of(MULTI_LABEL))
    task.label_names = list(TRAITS)
    for labels in (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([1, 2])):
        with pytest.raises(UserError, match="labels are not 3 zeros and ones"):
            task.targets(labels)


def test_a_teacher_of_several_labels_and_no_other(make_settings_of, make_checkpoint, tmp_path):
    teacher = make_checkpoint("teacher", labels=list(TRAITS), problem_type="multi_label_classification")
    changes = {"teacher": teacher, "max_train_steps": 2, "logging_steps": 1}
    for kind in ("soft", "hard"):
        train(make_settings_of(MULTI_LABEL, distillation=kind, output_dir=str(tmp_path / kind), **changes))
        rows = [json.loads(line) for line in (tmp_path / kind / "training_log.jsonl").read_text().splitlines()]
        for row in [row for row in rows if "label_loss" in row]:
            assert row["loss"] == pytest.approx((row["label_loss"] + row["distillation_loss"]) / 2, rel=1e-5)
    other = make_checkpoint("other", labels=list(TRAITS))
    with pytest.raises(UserError, match="trained for image-classification, and what it answers is nothing to learn"):
        train(make_settings_of(MULTI_LABEL, teacher=other, output_dir=str(tmp_path / "refused")))
