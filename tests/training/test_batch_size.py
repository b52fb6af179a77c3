"""As many images at once as there is memory for, and what is said where there is none."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from killed import assert_same, run
from safetensors.torch import load_file
from shapes import make_settings as make_dense_settings  # noqa: F401
from shapes import shapes  # noqa: F401

from hf_poolformer.foundation.errors import UserError
from hf_poolformer.settings.command_line import parse
from hf_poolformer.training.batch_size import search
from hf_poolformer.training.classification import ClassificationTraining
from hf_poolformer.training.dense.task import DenseTraining
from hf_poolformer.training.loop import train


@pytest.fixture
def memory(monkeypatch):
    """A device with memory for so many images, whose steps take the same time however many there are."""

    def limit(images: int, evaluating: int = 1000, kind: type = ClassificationTraining):
        make_model = kind.make_model

        def full(model, arguments, named):
            if model.training:
                time.sleep(0.03)
            pixel_values = named["pixel_values"] if named else arguments[0]
            if len(pixel_values) > (images if model.training else evaluating):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        def made(task, *arguments):
            model, processor = make_model(task, *arguments)
            model.register_forward_pre_hook(full, with_kwargs=True)
            return model, processor

        monkeypatch.setattr(kind, "make_model", made)

    return limit


def results_of(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


@pytest.mark.parametrize(("limit", "total", "expected"), [(13, 96, (12, 8)), (1000, 32, (32, 1)), (1, 6, (1, 6))])
def test_the_largest_that_fits_and_divides_a_step(make_settings, tmp_path, memory, capsys, limit, total, expected):
    memory(limit)
    changes = {"max_train_steps": 3, "drop_path_rate": 0.2, "mixup_alpha": 0.8, "ema_decay": 0.9, "num_workers": 0}
    changes |= {"total_train_batch_size": total}
    auto = make_settings(**changes, per_device_train_batch_size="auto", output_dir=str(tmp_path / "auto"))
    train(auto)
    size, count = expected
    assert f"per_device_train_batch_size auto: {size}, {count} of them to a step" in capsys.readouterr().out
    assert results_of(tmp_path / "auto")["per_device_train_batch_size"] == size
    # Weights, generators and the order of the data are as if the number had been given.
    train(make_settings(**changes, per_device_train_batch_size=size, output_dir=str(tmp_path / "given")))
    assert_same(tmp_path / "auto", tmp_path / "given")


def test_a_step_has_as_many_images_as_without(make_settings, tmp_path, memory):
    memory(16)
    auto = make_settings(per_device_train_batch_size="auto", gradient_accumulation_steps=2, max_train_steps=1)
    train(auto)
    progress = json.loads((tmp_path / "run/checkpoints/step-1/progress.json").read_text())
    assert progress["global_batch"] == 128  # twice the demo recipe's 64
    assert progress["choices"]["per_device_train_batch_size"] == 16
    written = parse(["--config_file", str(tmp_path / "run/training_settings.yaml")])
    assert dataclasses.replace(written, config_file=None) == auto


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_it_keeps_to_what_it_chose(make_settings, tmp_path, memory, count):
    changes = {"total_train_batch_size": 64, "checkpointing_steps": "2", "num_train_epochs": 1, "logging_steps": 1}
    changes |= {"resume_from_checkpoint": "latest", "per_device_train_batch_size": "auto"}
    memory(8)
    whole = make_settings(**changes, output_dir=str(tmp_path / "whole"))
    assert run(whole, count)
    parts = make_settings(**changes, output_dir=str(tmp_path / "parts"))
    assert not run(parts, count, kill_at=3)
    memory(16)  # tried again, it would be another
    assert run(parts, count)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    assert results_of(tmp_path / "parts")["per_device_train_batch_size"] == 8


@pytest.mark.parametrize(
    "task", ["instance-segmentation", pytest.param("semantic-segmentation", marks=pytest.mark.slow)]
)
def test_of_segmenters_and_detectors(make_dense_settings, tmp_path, memory, task):  # noqa: F811
    memory(2, kind=DenseTraining)
    changes = {"max_train_steps": 1, "total_train_batch_size": 4, "num_workers": 0}
    train(make_dense_settings(task, **changes, per_device_train_batch_size="auto", output_dir=str(tmp_path / "auto")))
    train(make_dense_settings(task, **changes, per_device_train_batch_size=2, output_dir=str(tmp_path / "given")))
    assert results_of(tmp_path / "auto")["per_device_train_batch_size"] == 2
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("auto", "given"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_not_one_image_fits(make_settings, memory):
    memory(0)
    with pytest.raises(UserError, match=r"not one image fits .*--gradient_checkpointing"):
        train(make_settings(per_device_train_batch_size="auto"))


@pytest.mark.parametrize("most", [*range(1, 14), 48, 96])
def test_the_search_finds_the_largest(most):
    sizes = [size for size in range(1, 97) if 96 % size == 0]
    tried = []

    def fits(size):
        tried.append(size)
        return size <= most

    found, refused = search(sizes, fits, lambda size: True)
    assert found == max(size for size in sizes if size <= most)
    assert refused == min((size for size in sizes if size > most), default=0)
    assert len(tried) == len(set(tried)) <= 9


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_told_with_a_way_on(make_settings, error, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(ClassificationTraining, "losses", full)
    with pytest.raises(UserError, match="out of memory in step 1, with 32 images per device"):
        train(make_settings(max_train_steps=1))


def test_a_run_whose_memory_ran_out_goes_on(make_settings, tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory")
    settings = make_settings(num_train_epochs=2, checkpointing_steps="4", per_device_train_batch_size=32)
    losses, steps = ClassificationTraining.losses, iter(range(100))

    def full(task, trained, batch):
        if next(steps) == 6:
            raise error
        return losses(task, trained, batch)

    monkeypatch.setattr(ClassificationTraining, "losses", full)
    with pytest.raises(UserError) as told:
        train(settings)
    text = str(told.value)
    assert "out of memory in step 7, with 32 images per device" in text
    for flag in ("--per_device_train_batch_size auto", "--gradient_checkpointing", "--mixed_precision bf16"):
        assert flag in text
    assert f"The last checkpoint is {tmp_path}/run/checkpoints/step-4. To go on from it: " in text
    # What it says is a command that works: smaller micro-batches, steps as before.
    words = text.rpartition(" train ")[2].split()
    again = parse(words)
    assert (again.per_device_train_batch_size, again.total_train_batch_size) == (16, 32)
    monkeypatch.setattr(ClassificationTraining, "losses", losses)
    assert train(again)["step"] == 20


def test_other_errors_stay_what_they_are(make_settings, monkeypatch):
    def broken(*_):
        raise RuntimeError("the memory of elephants")

    monkeypatch.setattr(ClassificationTraining, "losses", broken)
    with pytest.raises(RuntimeError, match="elephants"):
        train(make_settings(max_train_steps=1))


def test_memory_that_runs_out_in_an_evaluation_costs_nothing(make_settings, tmp_path, memory):
    memory(1000, evaluating=20)
    settings = make_settings(
        num_train_epochs=2, eval_epochs=1, checkpointing_steps="no", per_device_eval_batch_size=32
    )
    with pytest.raises(UserError) as told:
        train(settings)
    text = str(told.value)
    assert "evaluating after step 10, with 32 images" in text and "--per_device_eval_batch_size" in text
    again = parse(text.rpartition(" train ")[2].split())
    assert again.per_device_eval_batch_size == 16
    train(again)
    train(dataclasses.replace(settings, per_device_eval_batch_size=16, output_dir=str(tmp_path / "whole")))
    assert_same(tmp_path / "run", tmp_path / "whole")
    rows = [row for row in map(json.loads, (tmp_path / "run/training_log.jsonl").open()) if "eval_loss" in row]
    assert [row["epoch"] for row in rows] == [1, 2]
