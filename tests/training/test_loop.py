import dataclasses
import json
import os
import signal
import threading
import types

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageClassification, pipeline

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.evaluation import classification as evaluation
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.processes import Stopped
from hf_poolformer.training import classification, loop, preparation
from hf_poolformer.training.loop import train


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def differ(mine, theirs):
    return any(not torch.equal(mine[name], theirs[name]) for name in mine)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("drawn")
def test_a_run_learns_and_leaves_everything(make_settings, tmp_path, capsys):
    settings = make_settings(num_train_epochs=14, eval_epochs=7, learning_rate=8e-3, label_smoothing=0.0)
    results = train(settings)
    run = tmp_path / "run"
    assert results["eval_accuracy"] > 0.6 and results["eval_samples"] == 75
    assert results["step"] == 140 and results["epoch"] == 14 and results["skipped_images"] == 0
    assert 0 <= results["train_data_wait_share"] <= 1
    stored = json.loads((run / "all_results.json").read_text())
    assert stored == results
    assert {
        "eval_accuracy",
        "eval_top5_accuracy",
        "eval_loss",
        "eval_samples",
        "train_loss",
        "train_runtime",
        "train_samples_per_second",
    } <= stored.keys()
    for name in ("config.json", "preprocessor_config.json", "README.md", "training_settings.yaml"):
        assert (run / name).is_file(), name
    for name in ("curves.png", "confusion_matrix.png"):
        assert (run / name).read_bytes()[:4] == b"\x89PNG", name
    assert not [path.name for path in run.iterdir() if path.name.startswith(".") or path.suffix == ".tmp"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-130", "step-140"]
    (tmp_path / "file").touch()
    # Who may read any new file may read the model: a server under another user, a colleague.
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "file").stat().st_mode}

    log = rows_of(run)
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 70 and losses[-1] < 0.7 * losses[0]
    assert [row["epoch"] for row in log if "eval_accuracy" in row] == [7, 14]
    said = capsys.readouterr().out
    assert str(run) in said and "for 1 data worker, which reads " in said

    config = AutoConfig.from_pretrained(run)
    assert config.id2label[3] == "digit 3" and config.problem_type == "single_label_classification"
    classify = pipeline("image-classification", str(run), device="cpu")
    from datasets import load_dataset

    test = load_dataset(settings.dataset_name, split="test", cache_dir=str(tmp_path / "cache"))
    best = classify([row["image"].convert("RGB") for row in test], top_k=1)
    right = sum(guess[0]["label"] == f"digit {row['label']}" for guess, row in zip(best, test, strict=True))
    assert right / 75 == pytest.approx(results["eval_accuracy"])


def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(make_settings, tmp_path):
    settings = make_settings(output_dir=str(tmp_path / "whole"), ema_decay=0.9, gradient_accumulation_steps=2)
    train(settings)
    # The schedule of a run of 12 steps, left after 7 of them.
    parts = dataclasses.replace(settings, output_dir=str(tmp_path / "parts"), checkpointing_steps="7")
    train(parts)
    for name in ("model.safetensors", "all_results.json", "config.json"):
        (tmp_path / "parts" / name).unlink()
    assert (tmp_path / "parts/checkpoints/step-7").is_dir()
    train(dataclasses.replace(parts, resume_from_checkpoint="latest", checkpointing_steps="no"))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, resumed = rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts")
    assert [row["step"] for row in resumed] == sorted(row["step"] for row in resumed)
    assert [row["loss"] for row in whole if "loss" in row][-1] == [row["loss"] for row in resumed if "loss" in row][-1]


def test_accumulated_micro_batches_equal_one_batch(make_settings, tmp_path):
    # 320 images in micro-batches of 32, four to a step: the third step of each epoch has two.
    changes = {"learning_rate": 1e-3, "max_grad_norm": 0.0, "num_train_epochs": 1, "max_train_steps": 2}
    train(make_settings(output_dir=str(tmp_path / "whole"), per_device_train_batch_size=128, **changes))
    split = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 4}
    train(make_settings(output_dir=str(tmp_path / "split"), **split, **changes))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "split")
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-4, rtol=1e-3)


def test_the_total_batch_is_made_of_micro_batches(make_settings, tmp_path):
    changes = {"learning_rate": 1e-3, "num_train_epochs": 1, "max_train_steps": 2}
    split = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 4}
    train(make_settings(output_dir=str(tmp_path / "split"), **split, **changes))
    # 128 images are four batches of at most 40 of one size: of 32.
    total = {"per_device_train_batch_size": 40, "total_train_batch_size": 128}
    train(make_settings(output_dir=str(tmp_path / "total"), **total, **changes))
    assert_equal(weights(tmp_path / "split"), weights(tmp_path / "total"))


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(1, 96, (32, 3)), (2, 96, (24, 2)), (3, 96, (32, 1)), (4, 20, (5, 1)), (7, 77, (11, 1))],
)
def test_micro_batches_by_number_of_processes(make_settings, monkeypatch, count, total, expected):
    monkeypatch.setattr(preparation, "processes", lambda: types.SimpleNamespace(num_processes=count))
    settings = make_settings(per_device_train_batch_size=32, total_train_batch_size=total)
    settings = preparation.in_micro_batches(settings)
    assert (settings.per_device_train_batch_size, settings.gradient_accumulation_steps) == expected


def test_a_total_batch_that_does_not_divide_among_the_processes(make_settings, monkeypatch):
    monkeypatch.setattr(preparation, "processes", lambda: types.SimpleNamespace(num_processes=3))
    with pytest.raises(UserError, match="128 does not divide among 3 processes: 126 or 129 would"):
        train(make_settings(total_train_batch_size=128))


def test_accumulation_said_twice(make_settings, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(UserError, match="leave out one of the two"):
        train(make_settings(total_train_batch_size=96))


def test_the_last_window_of_an_epoch_may_be_short(make_settings, monkeypatch):
    windows = []
    step = loop.optimiser_step
    monkeypatch.setattr(loop, "optimiser_step", lambda run, window: windows.append(len(window)) or step(run, window))
    results = train(make_settings(gradient_accumulation_steps=4, num_train_epochs=2, checkpointing_steps="no"))
    assert windows == [4, 4, 2, 4][: len(windows)] and results["step"] == len(windows) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_leaves_and_can_be_resumed(make_settings, tmp_path, capsys, monkeypatch, number):
    settings = make_settings(num_train_epochs=3, logging_steps=100)
    step = loop.optimiser_step
    count = iter(range(100))

    def interrupted(run, window):
        if next(count) == 13:
            os.kill(os.getpid(), number)
        return step(run, window)

    monkeypatch.setattr(loop, "optimiser_step", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as left:
        train(settings)
    assert left.value.code == 128 + number and signal.getsignal(number) == before
    text = capsys.readouterr().out
    # The step it was in, and at most one more: the processes agree once per step.
    assert "saved at step 14 of 30" in text or "saved at step 15 of 30" in text
    assert f"--config_file {tmp_path}/run/training_settings.yaml --resume_from_checkpoint latest" in text
    results = train(dataclasses.replace(settings, resume_from_checkpoint="latest"))
    assert results["step"] == 30 and results["epoch"] == 3


def test_a_signal_while_evaluating(make_settings, monkeypatch):
    settings = make_settings(num_train_epochs=2, eval_epochs=1, checkpointing_steps="no")
    run_evaluation = classification.evaluate

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return run_evaluation(*args, **kwargs)

    monkeypatch.setattr(classification, "evaluate", interrupted)
    with pytest.raises(Stopped):
        train(settings)
    monkeypatch.setattr(classification, "evaluate", run_evaluation)
    assert train(dataclasses.replace(settings, resume_from_checkpoint="latest"))["step"] == 20


def test_training_works_outside_the_main_thread(make_settings):
    results = {}
    settings = make_settings(max_train_steps=1)
    thread = threading.Thread(target=lambda: results.update(train(settings)))
    thread.start()
    thread.join()
    assert results["step"] == 1


def test_another_runs_folder_is_left_alone(make_settings, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds another run"):
        train(make_settings())
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    train(make_settings(max_train_steps=3, overwrite_output_dir=True))
    first = weights(folder)
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        train(make_settings())
    # The checkpoints of the run before neither vanish nor pass for the new one's.
    train(make_settings(max_train_steps=2, overwrite_output_dir=True, seed=1))
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "checkpoints/previous-1/step-3").is_dir() and (folder / "checkpoints/step-2").is_dir()
    assert differ(first, weights(folder))


def test_latest_without_a_checkpoint_starts_from_the_beginning(make_settings, capsys):
    assert train(make_settings(max_train_steps=2, resume_from_checkpoint="latest"))["step"] == 2
    assert "starting from the beginning" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no checkpoint"):
        train(make_settings(resume_from_checkpoint="nowhere"))


def test_resuming_with_another_architecture_is_refused(make_settings, tmp_path):
    train(make_settings(max_train_steps=1))
    other = json.dumps({"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64]})
    with pytest.raises(UserError, match="another architecture"):
        train(make_settings(resume_from_checkpoint="latest", config_overrides=other))


def test_the_average_is_evaluated_and_saved(make_settings, tmp_path):
    train(make_settings(output_dir=str(tmp_path / "plain"), max_train_steps=4))
    train(make_settings(output_dir=str(tmp_path / "ema"), max_train_steps=4, ema_decay=0.99))
    checkpoint = load_file(tmp_path / "ema/checkpoints/step-4/model.safetensors")
    assert_equal(checkpoint, weights(tmp_path / "plain"))
    assert differ(checkpoint, weights(tmp_path / "ema"))


def test_a_loss_that_is_not_finite_ends_the_run(make_settings, tmp_path):
    with pytest.raises(UserError, match=r"the loss is (nan|inf)"):
        train(make_settings(learning_rate=1e30, num_warmup_epochs=0.0, max_grad_norm=0.0))
    assert not (tmp_path / "run/model.safetensors").exists()


@pytest.fixture
def checkpoint(tmp_path):
    def save(names):
        config = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 8, 16, 16), id2label=dict(enumerate(names)))
        config.label2id = {name: index for index, name in enumerate(names)}
        model = PoolFormerForImageClassification(config)
        torch.nn.init.constant_(model.classifier.weight, 0.5)
        model.save_pretrained(tmp_path / "base")
        square = {"height": 32, "width": 32}
        PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    return save


def start_from(checkpoint, **changes):
    once = {"config_name": None, "config_overrides": None, "image_size": None, "learning_rate": 0.0}
    return {"model_name_or_path": checkpoint, "max_train_steps": 1, "min_learning_rate": 0.0, **once, **changes}


def test_a_checkpoint_with_the_same_labels_keeps_its_head_and_order(make_settings, checkpoint, tmp_path):
    names = [f"digit {number}" for number in (3, 1, 2, 0, 4, 5, 6, 7, 8, 9)]
    train(make_settings(**start_from(checkpoint(names))))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert [model.config.id2label[index] for index in range(10)] == names
    assert (model.classifier.weight == 0.5).all()


@pytest.mark.parametrize("count", [10, 3])
def test_other_labels_get_a_new_head(make_settings, checkpoint, tmp_path, count, caplog):
    base = checkpoint([f"fruit {number}" for number in range(count)])
    train(make_settings(**start_from(base)))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label[9] == "digit 9"
    assert model.classifier.weight.shape[0] == 10 and not (model.classifier.weight == 0.5).any()
    assert "New head" in caplog.text
    start = weights(tmp_path / "base")
    name = "poolformer.encoder.block.0.0.output.conv1.weight"
    assert torch.equal(model.state_dict()[name], start[name])


def test_a_checkpoint_of_another_shape(make_settings, checkpoint, tmp_path):
    base = checkpoint([f"digit {number}" for number in range(10)])
    wider = json.dumps({"hidden_sizes": [8, 8, 16, 32]})
    with pytest.raises(UserError, match=r"another shape .*--ignore_mismatched_sizes"):
        train(make_settings(**start_from(base, config_overrides=wider)))
    train(make_settings(**start_from(base, config_overrides=wider, ignore_mismatched_sizes=True)))
    with pytest.raises(UserError, match="is not a model"):
        train(make_settings(**start_from(str(tmp_path), output_dir=str(tmp_path / "other"))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "/nowhere/at/all"}, "nowhere"),
        ({"config_name": "poolformer_s13"}, "neither a variant"),
        ({"config_overrides": '{"pool_size": 2}'}, "pool_size must be odd"),
        ({"report_to": "trackyo"}, "there are .*tensorboard"),
        ({"report_to": "aim"}, "not installed"),
        ({"label_column_name": "lable"}, "lable"),
    ],
)
def test_mistakes_are_reported(make_settings, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(make_settings(**changes))
    # A mistake does not make the folder look like a run.
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_half_precision_without_a_gpu(make_settings):
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(UserError, match="fp16 needs a GPU"):
            train(make_settings(mixed_precision="fp16"))
    finally:
        AcceleratorState._reset_state(True)


def test_every_augmentation_tracking_and_layer_decay_together(make_settings, tmp_path):
    results = train(
        make_settings(
            max_train_steps=3,
            crop_min_scale=0.5,
            horizontal_flip=0.5,
            rand_augment_magnitude=9.0,
            random_erasing=0.5,
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
            layer_decay=0.7,
            gradient_checkpointing=True,
            drop_path_rate=0.2,
            mixed_precision="no",
            report_to="tensorboard",
            memory_format="contiguous_format",
            num_workers=1,
        )
    )
    assert results["step"] == 3
    assert list((tmp_path / "run/logs").rglob("events.out.tfevents*"))


@pytest.mark.parametrize("eval_epochs", [0, 1])
def test_a_failing_evaluation_leaves_the_model(make_settings, tmp_path, monkeypatch, eval_epochs):
    def fails(*_):
        raise UserError("the metric has no answer")

    monkeypatch.setattr(evaluation, "check_labels", fails)
    with pytest.raises(UserError, match=r"has no answer\. The model as it was trained so far is in"):
        train(make_settings(eval_epochs=eval_epochs, checkpointing_steps="no"))
    run = tmp_path / "run"
    assert load_file(run / "model.safetensors") and (run / "preprocessor_config.json").is_file()
    assert json.loads((run / "config.json").read_text())["id2label"]["9"] == "digit 9"
    assert not (run / "all_results.json").exists()
