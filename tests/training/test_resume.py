"""Runs that are killed without warning and resumed are the runs that nobody killed, bit by bit."""

import dataclasses
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from digits import NAMES
from killed import assert_same, losses, run
from multispectral import multispectral
from safetensors.torch import load_file

from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.processes import Stopped
from hf_poolformer.foundation.tasks import MULTI_LABEL, REGRESSION
from hf_poolformer.training import checkpoints, loop
from hf_poolformer.training.classification import ClassificationTraining
from hf_poolformer.training.loop import train


FIGURES = {"label_thresholds", "eval_f1_macro", "eval_mae", "eval_r2"}
# Everything random that there is, checkpoints between and within epochs, windows that epochs do not end with.
SETTINGS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 3,
    "checkpointing_steps": "2",
    "logging_steps": 1,
    "shuffle_buffer_size": 40,
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "crop_min_scale": 0.5,
    "rand_augment_magnitude": 9.0,
    "random_erasing": 0.5,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "drop_path_rate": 0.2,
    "sampling": "balanced",
    "class_weights": "effective",
    "focal_gamma": 1.0,
    "operating_point": "f1_macro",
    "ema_decay": 0.9,
    "resume_from_checkpoint": "latest",
}


@pytest.mark.parametrize(("num_workers", "count", "kills"), [(2, 1, [3, 11]), (0, 2, [3])])
def test_killed_and_resumed_is_the_same_run(make_settings, tmp_path, num_workers, count, kills):
    changes = {**SETTINGS, "num_workers": num_workers}
    whole = make_settings(**changes, output_dir=str(tmp_path / "whole"))
    assert run(whole, count)
    parts = make_settings(**changes, output_dir=str(tmp_path / "parts"))
    for step in kills:
        assert not run(parts, count, kill_at=step)
    assert run(parts, count)
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_the_same_after_a_kill(make_settings_from, make_checkpoint, tmp_path, channels):
    """From a checkpoint for colours, whose stem is adapted, and with statistics that the run counts itself."""
    changes = {**SETTINGS, "num_workers": 0, "num_channels": channels, "max_train_steps": 4, "drop_path_rate": None}
    if channels == 4:
        multispectral(tmp_path / "data", count=72)
        changes |= {"dataset_name": None, "train_dir": str(tmp_path / "data"), "train_val_split": 0.25}
    start = make_checkpoint(drop_path_rate=0.2)
    assert run(make_settings_from(start, **changes, output_dir=str(tmp_path / "whole")))
    parts = make_settings_from(start, **changes, output_dir=str(tmp_path / "parts"))
    assert not run(parts, kill_at=3)
    assert run(parts)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    processors = [(tmp_path / name / "preprocessor_config.json").read_bytes() for name in ("parts", "whole")]
    assert processors[0] == processors[1] and len(json.loads(processors[0])["image_mean"]) == channels


@pytest.mark.slow
@pytest.mark.parametrize(("ema_decay", "optimizer"), [(0.0, "adamw"), (0.9, "adamw"), (0.0, "lamb")])
def test_fully_sharded(make_settings, tmp_path, monkeypatch, ema_decay, optimizer):
    """accelerate gives FSDP to accelerators only; told that it has it, it works on the CPU as well."""
    make = loop.training_accelerator

    def distributed(settings, fsdp):
        accelerator = make(settings, fsdp)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=False,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["MetaFormerBlock"],
        )
        return accelerator

    changes = {**SETTINGS, "num_workers": 0, "ema_decay": ema_decay, "optimizer": optimizer, "eval_epochs": 1}
    changes["load_best_model_at_end"] = True
    copies = make_settings(**changes, output_dir=str(tmp_path / "copies"))
    assert run(copies, 2)
    monkeypatch.setattr(loop, "training_accelerator", distributed)
    whole = make_settings(**changes, output_dir=str(tmp_path / "whole"))
    assert run(whole, 2)
    # Gradients are added up in another order than by DistributedDataParallel.
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "copies"), rel=1e-5)
    parts = make_settings(**changes, output_dir=str(tmp_path / "parts"))
    assert not run(parts, 2, kill_at=4)
    assert run(parts, 2)
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_resumed_on_another_number_of_processes(make_settings, tmp_path, capfd):
    changes = {**SETTINGS, "num_workers": 2, "num_train_epochs": 1, "max_train_steps": 6, "eval_epochs": 1}
    parts = make_settings(**changes, output_dir=str(tmp_path / "parts"))
    assert not run(parts, 2, kill_at=3)
    assert run(parts, 1)
    told = capfd.readouterr()
    assert "Not quite as before: the checkpoint is of 2 processes with 2 data workers each" in told.err
    assert "made with 96 images per step, this run has 48" in told.out


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "count"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_killed_at_any_moment(make_settings, tmp_path, num_workers, count):
    changes = {**SETTINGS, "num_workers": num_workers}
    whole = make_settings(**changes, output_dir=str(tmp_path / "whole"))
    start = time.monotonic()
    assert run(whole, count)
    length = time.monotonic() - start
    for number in range(5):
        folder = tmp_path / f"parts-{number}"
        parts = make_settings(**changes, output_dir=str(folder))
        moments = random.Random(number)
        for _ in range(3):
            if run(parts, count, kill_after=moments.uniform(0.1, 1.0) * length):
                break
        assert (folder / "model.safetensors").is_file() or run(parts, count)
        assert_same(folder, tmp_path / "whole")


def test_the_best_checkpoint_is_kept_beyond_the_limit(make_settings, tmp_path):
    folder = tmp_path / "kept"
    changes = {"num_train_epochs": 3, "eval_epochs": 1, "metric_for_best_model": "accuracy", "save_total_limit": 1}
    results = train(make_settings(output_dir=str(folder), **changes))
    rows = [row for row in map(json.loads, (folder / "training_log.jsonl").open()) if "eval_accuracy" in row]
    best = max(rows, key=lambda row: row["eval_accuracy"])
    found = [results[f"best_{name}"] for name in ("metric", "value", "step", "epoch")]
    assert found == ["eval_accuracy", best["eval_accuracy"], best["step"], best["epoch"]]
    steps = {checkpoints.step_of(path) for path in checkpoints.all_steps(folder / "checkpoints")}
    assert steps == {best["step"], rows[-1]["step"]}


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ({"lora": 2, "lora_dropout": 0.2, "teacher": "teacher"}, 1),
        ({"freeze_backbone": True}, 1),
        pytest.param({"lora": 2, "lora_dropout": 0.2, "teacher": "teacher"}, 2, marks=pytest.mark.slow),
        pytest.param({"freeze_backbone": True, "teacher": "teacher"}, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_while_it_adapts_or_distils(make_settings_from, make_checkpoint, tmp_path, method, count):
    start = make_checkpoint(drop_path_rate=0.2)
    if "teacher" in method:
        method = {**method, "teacher": make_checkpoint("teacher")}
    changes = {**SETTINGS, **method, "drop_path_rate": None, "num_workers": 0, "max_train_steps": 6}
    whole = make_settings_from(start, **changes, output_dir=str(tmp_path / "whole"))
    assert run(whole, count)
    parts = make_settings_from(start, **changes, output_dir=str(tmp_path / "parts"))
    assert not run(parts, count, kill_at=4)
    assert run(parts, count)
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    ("task", "changes", "count"),
    [
        (MULTI_LABEL, {"loss": "asymmetric", "pos_weight": "auto"}, 1),
        (REGRESSION, {"loss": "huber", "cutmix_alpha": 0.0}, 1),
        pytest.param(MULTI_LABEL, {"pos_weight": "auto"}, 2, marks=pytest.mark.slow),
        pytest.param(REGRESSION, {"cutmix_alpha": 0.0}, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_with_several_labels_or_numbers(make_settings_of, tmp_path, task, changes, count):
    rare = {"sampling": "shuffle", "class_weights": "none", "focal_gamma": 0.0, "operating_point": "none"}
    changes = {**SETTINGS, **rare, "num_workers": 0, "max_train_steps": 6, **changes}
    whole = make_settings_of(task, **changes, output_dir=str(tmp_path / "whole"))
    assert run(whole, count)
    parts = make_settings_of(task, **changes, output_dir=str(tmp_path / "parts"))
    assert not run(parts, count, kill_at=4)
    assert run(parts, count)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    # Thresholds and figures as well: every process looked at its share of the images, and one at all.
    mine, theirs = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("parts", "whole"))
    assert {name: value for name, value in mine.items() if name in FIGURES} == {
        name: value for name, value in theirs.items() if name in FIGURES
    }
    assert (FIGURES & mine.keys()) >= ({"label_thresholds"} if task == MULTI_LABEL else {"eval_mae"})
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("parts", "whole")]
    assert configs[0] == configs[1] and ("label_thresholds" in configs[0]) == (task == MULTI_LABEL)


@pytest.fixture
def accuracies(monkeypatch):
    """Makes evaluations find these accuracies, by epoch; the rest of what they give is as it is."""
    evaluate = ClassificationTraining.evaluate

    def script(*values):
        def found(task, run, model, final):
            results, shown = evaluate(task, run, model, final)
            return results and {**results, "eval_accuracy": values[run.progress.epoch - 1]}, shown

        monkeypatch.setattr(ClassificationTraining, "evaluate", found)

    return script


def evaluations(folder):
    return [row for row in map(json.loads, (folder / "training_log.jsonl").open()) if "eval_accuracy" in row]


@pytest.mark.parametrize(
    ("changes", "lora"), [({}, False), ({"ema_decay": 0.9, "async_checkpointing": True}, False), ({}, True)]
)
def test_the_best_model_is_saved_and_evaluated(
    make_settings, make_settings_from, make_checkpoint, tmp_path, accuracies, changes, lora
):
    accuracies(0.1, 0.9, 0.9, 0.2)
    changes = {**changes, "num_train_epochs": 4, "eval_epochs": 1, "load_best_model_at_end": True}
    changes |= {"save_total_limit": 1}
    settings = make_settings_from(make_checkpoint(), lora=2, **changes) if lora else make_settings(**changes)
    results = train(settings)
    rows, folder = evaluations(tmp_path / "run"), tmp_path / "run"
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert results["best_epoch"] == 2 and results["step"] == rows[-1]["step"]
    assert results["eval_loss"] == rows[1]["eval_loss"] != rows[-1]["eval_loss"]
    assert json.loads((folder / "all_results.json").read_text())["eval_loss"] == rows[1]["eval_loss"]
    assert "epoch of the best evaluation | 2" in (folder / "README.md").read_text()
    best = folder / f"checkpoints/step-{rows[1]['step']}"
    expected = load_file(best / "model.safetensors")
    if "ema_decay" in changes:
        expected = torch.load(best / "state.pt", weights_only=True)["ema"]["weights"]
    saved = load_file(folder / "model.safetensors")
    if not lora:  # whose adapters are merged: the loss above says that they are the right ones
        assert all(torch.equal(saved[name], expected[name]) for name in saved)


@pytest.mark.parametrize(("load_best", "count"), [(True, 1), pytest.param(False, 2, marks=pytest.mark.slow)])
def test_killed_it_stops_early_where_it_would_have(make_settings, tmp_path, accuracies, capfd, load_best, count):
    accuracies(0.1, 0.5, 0.4, 0.5, 0.505, 0.9, 0.9, 0.9)
    changes = {**SETTINGS, "num_train_epochs": 8, "eval_epochs": 1, "num_workers": 0, "save_total_limit": 1}
    changes |= {"early_stopping_patience": 3, "early_stopping_threshold": 0.01, "load_best_model_at_end": load_best}
    changes |= {"ema_decay": 0.0}
    whole = make_settings(**changes, output_dir=str(tmp_path / "whole"))
    assert run(whole, count)
    assert "stopped early at epoch 5 of 8: eval_accuracy has not improved for 3 evaluations." in capfd.readouterr().out
    rows = evaluations(tmp_path / "whole")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    parts = make_settings(**changes, output_dir=str(tmp_path / "parts"))
    for step in (rows[2]["step"] + 1, rows[3]["step"] + 2):  # with one, then two evaluations to count
        assert not run(parts, count, kill_at=step)
    assert run(parts, count)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    assert [row["eval_loss"] for row in evaluations(tmp_path / "parts")] == [row["eval_loss"] for row in rows]
    results, same = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("whole", "parts"))
    for name in ("best_metric", "best_value", "best_step", "best_epoch", "step", "epoch", "eval_loss"):
        assert results[name] == same[name], name
    # Better by less than the threshold is still better: it is the best, and counts as no improvement.
    assert results["best_epoch"] == 5 and results["best_value"] == 0.505


def test_a_run_told_to_stop_while_it_evaluates_evaluates_when_it_goes_on(make_settings, tmp_path, monkeypatch):
    changes = {"num_train_epochs": 3, "eval_epochs": 1, "num_workers": 0, "load_best_model_at_end": True}
    train(make_settings(**changes, output_dir=str(tmp_path / "whole")))
    evaluate = ClassificationTraining.evaluate

    def interrupted(task, run, *arguments):
        if run.progress.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(task, run, *arguments)

    monkeypatch.setattr(ClassificationTraining, "evaluate", interrupted)
    parts = make_settings(**changes, output_dir=str(tmp_path / "parts"))
    with pytest.raises(Stopped):
        train(parts)
    monkeypatch.setattr(ClassificationTraining, "evaluate", evaluate)
    train(dataclasses.replace(parts, resume_from_checkpoint="latest"))
    assert_same(tmp_path / "parts", tmp_path / "whole")
    losses = [[row["eval_loss"] for row in evaluations(tmp_path / name)] for name in ("parts", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_the_best_by_loss_has_the_lowest(make_settings, tmp_path):
    results = train(make_settings(num_train_epochs=3, eval_epochs=1, metric_for_best_model="loss"))
    assert results["best_metric"] == "eval_loss"
    assert results["best_value"] == min(row["eval_loss"] for row in evaluations(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_stopping_patience": 2}, "--eval_epochs 0 leaves one"),
        ({"early_stopping_threshold": 0.1}, "says nothing without --early_stopping_patience"),
        ({"early_stopping_patience": 0, "eval_epochs": 1}, "--early_stopping_patience must be at least 1"),
        ({"metric_for_best_model": "accurate"}, "an evaluation gives .*; did you mean eval_accuracy"),
    ],
)
def test_what_cannot_say_which_model_is_best_is_refused(make_settings, changes, message):
    with pytest.raises(UserError, match=message):
        make_settings(**changes)


def test_without_validation_images_no_model_is_the_best(make_settings, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    for path in (tmp_path / "data").glob("test-*"):
        path.unlink()
    settings = make_settings(dataset_name=str(tmp_path / "data"), train_val_split=0, load_best_model_at_end=True)
    with pytest.raises(UserError, match="the best by eval_accuracy: there are no validation images"):
        train(settings)


def test_a_best_checkpoint_that_is_damaged_leaves_the_last_model(make_settings, tmp_path, accuracies, monkeypatch):
    accuracies(0.9, 0.1)
    load = checkpoints.load_best

    def damaged(root, state):
        (root / f"step-{state.progress.best['step']}/model.safetensors").write_bytes(b"")
        load(root, state)

    monkeypatch.setattr(checkpoints, "load_best", damaged)
    with pytest.raises(UserError, match=r"model.safetensors is damaged\. The model as it was trained so far is in"):
        train(make_settings(num_train_epochs=2, eval_epochs=1, load_best_model_at_end=True))
    assert (tmp_path / "run/model.safetensors").stat().st_size


def test_killed_while_sizes_change(make_settings_from, make_checkpoint, tmp_path):
    """In each phase, with the rest of what the second paper's recipes have."""
    start = make_checkpoint(labels=[*NAMES, "digit 10"], metaformer="caformer_s18")
    changes = {
        **SETTINGS,
        "size_schedule": {"0": 16, "1": 24},
        "optimizer": "lamb",
        "head_mapping": "names",
        "head_dropout": 0.4,
        "ema_warmup": False,
        "layer_decay": 0.8,
        "num_workers": 2,
    }
    whole = make_settings_from(start, **changes, output_dir=str(tmp_path / "whole"))
    assert run(whole)
    parts = make_settings_from(start, **changes, output_dir=str(tmp_path / "parts"))
    for step in (3, 11):
        assert not run(parts, kill_at=step)
    assert run(parts)
    assert_same(tmp_path / "parts", tmp_path / "whole")
