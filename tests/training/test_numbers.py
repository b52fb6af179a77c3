"""Runs that learn numbers: standardised in training, in units in everything that leaves it."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.processes import Stopped
from hf_poolformer.foundation.tasks import REGRESSION
from hf_poolformer.training import classification, loop
from hf_poolformer.training.loop import train


NAMES = ["year", "width"]


def rows_of(dataset, split):
    return load_dataset("parquet", data_files=str(dataset / f"{split}*.parquet"), split="train")


def moments(dataset):
    rows = rows_of(dataset, "train")
    numbers = np.stack([np.array(rows[name], dtype=np.float64) for name in NAMES])
    return numbers.mean(1), numbers.std(1)


def answers(run, dataset):
    """Numbers and truth of the test split, by the saved model and nothing else of this package."""
    rows = rows_of(dataset, "test")
    model, processor = AutoModelForImageClassification.from_pretrained(run), AutoImageProcessor.from_pretrained(run)
    images = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")
    with torch.no_grad():
        return model, model(**images).logits.double().numpy(), np.array([rows[name] for name in NAMES]).T


def log_of(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss": "l1", "ema_decay": 0.9, "mixup_alpha": 0.2}, {"mixed_precision": "bf16", "loss": "huber"}],
)
def test_what_is_saved_gives_units(make_settings_of, digits_of_kinds, tmp_path, own_precision, changes):
    results = train(make_settings_of(REGRESSION, num_train_epochs=4, eval_epochs=2, **changes))
    model, numbers, truth = answers(tmp_path / "run", digits_of_kinds)
    assert model.config.problem_type == "regression" and model.config.id2label == dict(enumerate(NAMES))
    mean, std = moments(digits_of_kinds)
    errors = np.abs(numbers - truth).mean(0)
    assert (errors < std).all()  # better than guessing the mean, and in units
    per_target = [results["eval_per_target_mae"][name] for name in NAMES]
    # Nor in half precision, in which 1990 is 1992.
    assert per_target == pytest.approx(errors.tolist(), rel=1e-3)
    assert results["eval_mae"] == pytest.approx(errors.mean(), rel=1e-3)
    # So were the evaluations during the training; the loss is of standardised numbers.
    rows = log_of(tmp_path / "run")
    assert all(row["eval_mae"] < std.mean() + 1 for row in rows if "eval_mae" in row)
    assert all(row["loss"] < 3 for row in rows if "loss" in row)
    # A checkpoint holds the model as it is trained.
    last = tmp_path / f"run/checkpoints/step-{results['step']}"
    saved = load_file(tmp_path / "run/model.safetensors")
    if "ema_decay" in changes:
        trained = torch.load(last / "state.pt", weights_only=True)["ema"]["weights"]
    else:
        trained = load_file(last / "model.safetensors")
    mean, std = torch.from_numpy(mean), torch.from_numpy(std)
    weight, bias = trained["classifier.weight"].double(), trained["classifier.bias"].double()
    torch.testing.assert_close(saved["classifier.weight"].double(), weight * std[:, None], rtol=1e-6, atol=0)
    torch.testing.assert_close(saved["classifier.bias"].double(), bias * std + mean, rtol=1e-6, atol=1e-12)
    for name in saved.keys() - {"classifier.weight", "classifier.bias"}:
        assert torch.equal(saved[name], trained[name]), name


@pytest.mark.parametrize(
    "method", [{}, {"freeze_backbone": True}, {"lora": 2}, {"teacher": "start", "distillation_alpha": 0.5}]
)
def test_a_regressor_goes_on_where_it_was(make_settings_of, make_checkpoint, digits_of_kinds, tmp_path, method):
    """Whatever it was standardised with before: without learning anything it answers as it did."""
    for_numbers = {"labels": NAMES[::-1], "problem_type": "regression"}
    start = make_checkpoint("start", **for_numbers)  # knows them in another order
    if "teacher" in method:
        method = {**method, "teacher": start}
    scratch = {"config_name": None, "config_overrides": None, "image_size": None, "model_name_or_path": start}
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "warmup_learning_rate": 0.0, "min_learning_rate": 0.0}
    train(make_settings_of(REGRESSION, max_train_steps=1, **scratch, **still, **method))
    before, after = (answers(path, digits_of_kinds)[:2] for path in (start, tmp_path / "run"))
    assert after[0].config.id2label == dict(enumerate(NAMES[::-1]))
    # Width is 0.03 give or take as much, year 1994 give or take 3.
    np.testing.assert_allclose(after[1], before[1], rtol=1e-4, atol=1e-4)
    head = after[0].classifier.weight.detach()
    np.testing.assert_allclose(head, before[0].classifier.weight.detach(), rtol=1e-5)
    if "teacher" in method:  # it is its own teacher
        assert all(row["distillation_loss"] < 1e-6 for row in log_of(tmp_path / "run") if "loss" in row)


def test_half_precision_neither_of_the_checkpoint_nor_of_its_teacher(
    make_settings_of, make_checkpoint, digits_of_kinds, tmp_path, own_precision
):
    """In bfloat16 a year would be known to within four."""
    start = make_checkpoint("start", labels=NAMES, problem_type="regression")
    with torch.no_grad():
        model = AutoModelForImageClassification.from_pretrained(start)
        model.classifier.weight[1] *= 0.001
        model.classifier.bias.copy_(torch.tensor([1992.0, 0.03125]))  # which bfloat16 can hold
        model.save_pretrained(start)
        half = str(tmp_path / "half")
        model.to(torch.bfloat16).save_pretrained(half)
    AutoImageProcessor.from_pretrained(start).save_pretrained(half)
    scratch = {"config_name": None, "config_overrides": None, "image_size": None, "model_name_or_path": half}
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "warmup_learning_rate": 0.0, "min_learning_rate": 0.0}
    changes = {"teacher": start, "mixed_precision": "bf16", "max_train_steps": 1, "logging_steps": 1}
    train(make_settings_of(REGRESSION, **scratch, **still, **changes))
    saved = load_file(tmp_path / "run/model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    [row] = [row for row in log_of(tmp_path / "run") if "loss" in row]
    assert row["distillation_loss"] < 0.005  # of numbers in standard deviations


@pytest.mark.parametrize("metaformer", ["caformer_s18", "convformer_s18"])
def test_an_mlp_for_a_head(make_settings_of, make_checkpoint, digits_of_kinds, tmp_path, metaformer):
    start = make_checkpoint(metaformer=metaformer, attention_head_dim=8)
    scratch = {"config_name": None, "config_overrides": None, "image_size": None, "model_name_or_path": start}
    results = train(make_settings_of(REGRESSION, max_train_steps=1, **scratch))
    _, numbers, truth = answers(tmp_path / "run", digits_of_kinds)
    assert results["eval_mae"] == pytest.approx(np.abs(numbers - truth).mean(), rel=1e-3)


@pytest.mark.parametrize(("loss", "delta"), [("mse", 1.0), ("l1", 1.0), ("huber", 0.3)])
def test_a_loss_is_the_formula(make_settings_of, digits_of_kinds, monkeypatch, loss, delta):
    mean, std = moments(digits_of_kinds)
    step, seen = loop.optimiser_step, []

    def checked(run, window):
        model = copy.deepcopy(run.state.model).double()
        numbers = np.concatenate([model(batch["pixel_values"].double()).logits.detach() for batch in window])
        truth = torch.cat([batch["labels"] for batch in window]).double().numpy()
        assert truth[:, 0].min() >= 1990  # units
        d = np.abs(numbers - (truth - mean) / std)
        huber = np.where(d <= delta, d**2 / 2, delta * (d - delta / 2))
        value = step(run, window)
        assert value.item() == pytest.approx({"mse": d**2, "l1": d, "huber": huber}[loss].mean(), rel=1e-4)
        seen.append(value)
        return value

    monkeypatch.setattr(loop, "optimiser_step", checked)
    train(make_settings_of(REGRESSION, max_train_steps=2, loss=loss, huber_delta=delta))
    assert len(seen) == 2


def test_a_resumed_run_keeps_to_the_numbers_it_began_with(make_settings_of, tmp_path, monkeypatch):
    settings = make_settings_of(REGRESSION, num_train_epochs=2, checkpointing_steps="3")
    whole = dataclasses.replace(settings, output_dir=str(tmp_path / "whole"))
    train(whole)
    step = loop.optimiser_step

    def stopped(run, window):
        if run.progress.step == 4:
            raise Stopped(15)
        return step(run, window)

    monkeypatch.setattr(loop, "optimiser_step", stopped)
    with pytest.raises(Stopped):
        train(settings)
    monkeypatch.setattr(loop, "optimiser_step", step)
    open_splits = classification.open_splits

    def others(*args, **kwargs):
        splits = open_splits(*args, **kwargs)
        return {name: dataclasses.replace(one, target_mean=(0.0, 0.0)) for name, one in splits.items()}

    monkeypatch.setattr(classification, "open_splits", others)
    train(dataclasses.replace(settings, resume_from_checkpoint="latest"))
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_run_with_another_loss_is_not_resumed(make_settings_of):
    train(make_settings_of(REGRESSION, max_train_steps=1))
    with pytest.raises(UserError, match="was made with --loss mse; go on with the same setting"):
        train(make_settings_of(REGRESSION, max_train_steps=2, loss="l1", resume_from_checkpoint="latest"))


def test_a_teacher_of_classes_is_refused(make_settings_of, make_checkpoint):
    teacher = make_checkpoint("teacher", labels=NAMES)
    with pytest.raises(UserError, match="trained for image-classification"):
        train(make_settings_of(REGRESSION, teacher=teacher))
