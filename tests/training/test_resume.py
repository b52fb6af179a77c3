"""Runs that are killed without warning and resumed are the runs that nobody killed, bit by bit."""

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from hf_poolformer.foundation.errors import UserError
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training import checkpoints, loop
from hf_poolformer.training.loop import train


FORK = multiprocessing.get_context("fork")  # what is imported need not be imported again
# Everything random that there is, checkpoints between and within epochs, windows that epochs do not end with.
SETTINGS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 3,
    "checkpointing_steps": "2",
    "logging_steps": 1,
    "shuffle_buffer_size": 40,
    "horizontal_flip": 0.5,
    "crop_min_scale": 0.5,
    "rand_augment_magnitude": 9.0,
    "random_erasing": 0.5,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "drop_path_rate": 0.2,
    "ema_decay": 0.9,
    "resume_from_checkpoint": "latest",
}


def run_process(settings: TrainingSettings, rank: int, count: int, port: int, kill_at: int | None) -> None:
    """What a process of a run does; it kills itself in the middle of the step `kill_at`."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    if count > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "1"})
        os.environ.update({name: str(value) for name, value in names.items()})
    step = loop.optimiser_step

    def killed(run, window):
        if run.progress.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(run, window)

    loop.optimiser_step = killed
    train(settings)


def run(settings, count=1, kill_at=None, kill_after=None) -> bool:
    """Whether a run of `count` processes came to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        FORK.Process(target=run_process, args=(settings, rank, count, port, kill_at), daemon=False)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + (kill_after if kill_after is not None else 300)
    while time.monotonic() < deadline and all(process.exitcode is None for process in processes):
        time.sleep(0.02)
    if all(process.exitcode == 0 for process in processes if process.exitcode is not None) and kill_after is None:
        for process in processes:
            process.join(60)
    for process in processes:
        if process.exitcode is None:
            process.kill()
        process.join()
    return all(process.exitcode == 0 for process in processes)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (folder / "training_log.jsonl").open()) if "loss" in row]


def assert_same(mine: Path, theirs: Path) -> None:
    weights, expected = (load_file(folder / "model.safetensors") for folder in (mine, theirs))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name
    assert losses(mine) == losses(theirs)


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


def test_grey_images_are_the_same_after_a_kill(make_settings, tmp_path):
    changes = {**SETTINGS, "num_workers": 0, "num_channels": 1, "num_train_epochs": 1}
    assert run(make_settings(**changes, output_dir=str(tmp_path / "whole")))
    parts = make_settings(**changes, output_dir=str(tmp_path / "parts"))
    assert not run(parts, kill_at=3)
    assert run(parts)
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_fully_sharded(make_settings, tmp_path, monkeypatch, ema_decay):
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

    changes = {**SETTINGS, "num_workers": 0, "ema_decay": ema_decay, "eval_epochs": 1}
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
    with pytest.raises(UserError, match="--keep_best accuracy: an evaluation gives eval_accuracy"):
        train(make_settings(max_train_steps=1, keep_best="accuracy"))
    folder = tmp_path / "kept"
    changes = {"num_train_epochs": 3, "eval_epochs": 1, "keep_best": "eval_accuracy", "save_total_limit": 1}
    train(make_settings(output_dir=str(folder), **changes))
    rows = [row for row in map(json.loads, (folder / "training_log.jsonl").open()) if "eval_accuracy" in row]
    best = max(rows, key=lambda row: row["eval_accuracy"])
    assert checkpoints.best_of(folder / "checkpoints") == (best["step"], best["eval_accuracy"])
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
