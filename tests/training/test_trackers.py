"""What trackers get of a run, as they keep it."""

import json
import logging
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from digits import TINY_MODEL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm import warm_python

from hf_poolformer.evaluation.examples import Example, Examples
from hf_poolformer.evaluation.pictures import answer_text, draw_answers
from hf_poolformer.foundation.processes import Stopped
from hf_poolformer.foundation.tasks import MULTI_LABEL, REGRESSION
from hf_poolformer.training import trackers
from hf_poolformer.training.loop import train


@pytest.fixture(scope="module")
def trackio():
    """trackio, which reads where its store is when it is imported."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", folder)
        yield pytest.importorskip("trackio")


def rows(trackio, project, run):
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs(project, run)


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def test_curves_and_predictions_arrive(trackio, make_settings, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.whoami", lambda *_, **__: pytest.fail("the Hub was asked"))
    secret = "hf_" + "s" * 34
    settings = {"report_to": "trackio,tensorboard", "project": "digits", "hub_token": secret}
    settings = make_settings(**settings, eval_epochs=1, num_train_epochs=3, checkpointing_steps="epoch")

    def stop(run, figures):
        if run.progress.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(settings, after_evaluation=stop)
    before = rows(trackio, "digits", "run")
    settings.resume_from_checkpoint = "latest"
    train(settings)
    said = capfd.readouterr()
    assert "trackio show --project digits (run run)" in said.out and f"--logdir {tmp_path}/run/logs" in said.out

    # One run, which went on.
    assert [run.name for run in trackio.Api().runs("digits")] == ["run"]
    logged = rows(trackio, "digits", "run")
    assert logged[: len(before)] == before and len(logged) > len(before) > 5
    for name in ("loss", "learning_rate", "images_per_second"):
        steps = [row["step"] for row in logged if name in row]
        assert steps == sorted(set(steps)) and steps[-1] == 30
    written = [json.loads(line) for line in (tmp_path / "run/training_log.jsonl").read_text().splitlines()]
    accuracies = [row["eval_accuracy"] for row in written if "eval_accuracy" in row]
    assert [row["eval_accuracy"] for row in logged if "eval_accuracy" in row] == accuracies and len(accuracies) == 3
    pictures = [row["predictions"] for row in logged if "predictions" in row]
    assert [row["step"] for row in logged if "predictions" in row] == [10, 20, 30]
    for picture in pictures:
        file = Path(os.environ["TRACKIO_DIR"]) / "media" / picture["file_path"]
        assert file.read_bytes().startswith(b"\x89PNG")
    config = trackio.Api().runs("digits")[0].config
    assert config["per_device_train_batch_size"] == 32 and secret not in str(config)

    # The same for TensorBoard.
    found = events(tmp_path / "run/logs/hf-poolformer")
    assert [event.step for event in found.Images("predictions")] == [10, 20, 30]
    assert [event.value for event in found.Scalars("eval_accuracy")] == pytest.approx(accuracies)
    losses = [row["loss"] for row in written if "loss" in row]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(losses)


def test_another_run_of_that_name_gets_a_number(trackio, make_settings, tmp_path):
    for folder in ("first", "second"):
        output = {"output_dir": str(tmp_path / folder / "same"), "report_to": "trackio", "project": "names"}
        train(make_settings(**output, max_train_steps=2, checkpointing_steps="no"))
    assert sorted(run.name for run in trackio.Api().runs("names")) == ["same", "same-2"]


@pytest.mark.parametrize("at", ["start", "log", "log_images"])
def test_a_tracker_that_fails_is_told_of_once(make_settings, monkeypatch, caplog, at):
    class Fails(LOGGER_TYPE_TO_CLASS["tensorboard"]):
        pass

    def fail(*_, **__):
        raise ConnectionError("nobody answers")

    setattr(Fails, at, fail)
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "tensorboard", Fails)
    with caplog.at_level(logging.WARNING):
        results = train(make_settings(report_to="tensorboard", max_train_steps=3, checkpointing_steps="no"))
    assert results["step"] == 3
    told = [record.getMessage() for record in caplog.records if "nobody answers" in record.getMessage()]
    assert told == ["The run goes on without tensorboard: nobody answers"]


@pytest.mark.parametrize("task", [MULTI_LABEL, REGRESSION])
def test_predictions_of_other_tasks_are_shown(make_settings_of, tmp_path, task):
    train(make_settings_of(task, report_to="tensorboard", max_train_steps=2, checkpointing_steps="no"))
    [event] = events(tmp_path / "run/logs/hf-poolformer").Images("predictions")
    assert (event.step, event.width > 400) == (2, True)


NAMES = ["cat", "dog", "bird"]


@pytest.mark.parametrize(
    ("reads", "answers", "text", "right"),
    [
        ("class", {"labels": 1, "predicted": 1, "confidence": 0.914}, "dog 91%", True),
        ("class", {"labels": 2, "predicted": 0, "confidence": 0.5}, "cat 50%\nis bird", False),
        (
            "classes",
            {"labels": [1, 0, 1], "predicted": [1, 1, 0], "scores": [0.9, 0.6, 0.2]},
            "cat 90%, dog 60%\nis cat, bird",
            False,
        ),
        ("classes", {"labels": [0, 0, 0], "predicted": [0, 0, 0], "scores": [0.1, 0.1, 0.1]}, "nothing", True),
        (
            "numbers",
            {"labels": [1990.0, 2.5], "predicted": [1991.5, 2.0]},
            "cat 1992 (true 1990)\ndog 2 (true 2.5)",
            None,
        ),
    ],
)
def test_what_stands_above_an_image(reads, answers, text, right):
    example = Example(torch.zeros(3, 4, 4), {name: np.array(value) for name, value in answers.items()})
    assert answer_text(example, reads, NAMES) == (text, right)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images_of_any_channels_are_drawn(channels):
    answers = {"labels": np.array(0), "predicted": np.array(0), "confidence": np.array(1.0)}
    examples = [Example(torch.ones(channels, 4, 4), answers)] * 5
    figure = draw_answers(examples, "class", ["$x_1"], [0.5] * channels, [0.5] * channels)
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 5 and shown[0].get_title() == "$x_1 100%"
    assert np.asarray(shown[0].images[0].get_array()).max() == 1


def test_examples_are_the_same_ones_each_time_and_from_everywhere():
    def sample(batch):
        examples = Examples(4)
        for start in range(0, 1000, batch):
            numbers = torch.arange(start, min(start + batch, 1000))
            examples.add(numbers[:, None, None, None].float(), {"labels": numbers})
        return [int(example.answers["labels"]) for example in examples.chosen()]

    chosen = sample(64)
    assert chosen == sorted(chosen) == sample(7) and len(set(chosen)) == 4 and chosen[-1] > 500 > chosen[0]
    assert [int(example.pixel_values) for example in Examples(4).chosen()] == []


def flags(digits, folder):
    return [
        *("--recipe", "demo", "--dataset_name", str(digits), "--output_dir", str(folder), "--num_workers", "0"),
        *("--config_overrides", json.dumps(TINY_MODEL), "--num_train_epochs", "40", "--logging_steps", "2"),
        *("--report_to", "trackio", "--eval_epochs", "1"),
    ]


@pytest.mark.slow
def test_a_killed_run_keeps_what_was_logged_and_goes_on(trackio, digits, tmp_path):
    start = [warm_python(), "-m", "hf_poolformer", "train", *flags(digits, tmp_path / "killed")]
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "killed/training_log.jsonl", time.monotonic() + 300
    while not (log.is_file() and log.read_text().count("eval_loss") >= 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = rows(trackio, "hf-poolformer", "killed")
    assert sum("eval_accuracy" in row for row in kept) >= 2 and any("predictions" in row for row in kept)
    again = [*start, "--resume_from_checkpoint", "latest", "--num_train_epochs", "8"]
    done = subprocess.run(again, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [run.name for run in trackio.Api().runs("hf-poolformer") if "killed" in run.name] == ["killed"]
    assert len(rows(trackio, "hf-poolformer", "killed")) > len(kept)


@pytest.mark.slow
def test_several_processes_log_once(trackio, digits, tmp_path):
    launch = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*flags(digits, tmp_path / "together"), "--max_train_steps", "6"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "hf_poolformer", "train", *words], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert [run.name for run in trackio.Api().runs("hf-poolformer") if "together" in run.name] == ["together"]
    steps = [row["step"] for row in rows(trackio, "hf-poolformer", "together") if "loss" in row]
    assert steps == [2, 4, 6]
